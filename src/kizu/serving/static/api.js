// Requests to the server: the key goes with each, refusals become errors with the server's own sentence.

const KEY = "kizu-key";
let unlock = null;

/** With `options.key` that key goes along, and a refusal of it is an error; otherwise this server's own is asked for. */
export async function ask(path, options = {}) {
  for (;;) {
    const key = options.key ?? sessionStorage.getItem(KEY);
    const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
    let response;
    try {
      response = await fetch(path, { ...options, headers });
    } catch {
      throw new Error("The server does not answer. Is it still running?");
    }
    if (response.ok) return response;
    if (response.status === 401 && options.key === undefined) {
      await askForKey();
    } else if (response.status === 429) {
      await new Promise((resolve) => setTimeout(resolve, 1000));
    } else {
      const problem = await response.json().catch(() => ({}));
      throw new Error(problem.error || `The server says ${response.status}.`);
    }
  }
}

export const json = async (path, options) => (await ask(path, options)).json();
export const blob = async (path, options) => (await ask(path, options)).blob();
export const post = (path, body) => json(path, { method: "POST", body, headers: { "Content-Type": "application/octet-stream" } });
export const put = (path, key) => json(path, { method: "PUT", key });

function askForKey() {
  if (unlock) return unlock;
  const dialog = document.getElementById("lock");
  const field = document.getElementById("key");
  unlock = new Promise((resolve) => {
    dialog.addEventListener(
      "close",
      () => {
        sessionStorage.setItem(KEY, field.value.trim());
        field.value = "";
        unlock = null;
        resolve();
      },
      { once: true },
    );
  });
  dialog.showModal();
  return unlock;
}
