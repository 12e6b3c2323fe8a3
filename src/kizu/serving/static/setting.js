// A threshold that is set in the model itself, for everybody, by who has the key for that.

import { put } from "./api.js";

const $ = (id) => document.getElementById(id);
const NAME = "kizu-name"; // whoever set one last on this page

/** Ask for name and key, and set a model's threshold to a value, or to the one that its good parts give. */
export class Setting {
  constructor(done) {
    this.done = done; // called with the model as it is then
    $("setting-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send(event.submitter === $("setting-back") ? null : this.value);
    });
    $("setting-leave").addEventListener("click", () => $("setting").close());
    $("setting").addEventListener("close", () => ($("setting-key").value = ""));
  }

  /** `value` null: the slider stands where the model's threshold is. */
  open(model, value, promise) {
    Object.assign(this, { model, value });
    $("setting-title").textContent = value === null ? "Go back to the threshold from the good parts?" : `Set ${Number(value).toPrecision(4)} in the model?`;
    $("setting-promise").textContent = promise;
    $("setting-set").hidden = value === null;
    $("setting-back").hidden = !model.tuned;
    $("setting-name").value ||= sessionStorage.getItem(NAME) ?? "";
    this.refuse("");
    $("setting").showModal();
  }

  async send(value) {
    const about = new URLSearchParams({ version: this.model.version, by: $("setting-name").value.trim() });
    if (value !== null) about.set("value", value);
    this.refuse("");
    for (const id of ["setting-set", "setting-back"]) $(id).disabled = true;
    try {
      const model = await put(`v1/models/${encodeURIComponent(this.model.name)}/threshold?${about}`, $("setting-key").value.trim());
      sessionStorage.setItem(NAME, $("setting-name").value.trim());
      $("setting").close();
      this.done(model);
    } catch (error) {
      this.refuse(error.message);
    } finally {
      for (const id of ["setting-set", "setting-back"]) $(id).disabled = false;
    }
  }

  refuse(sentence) {
    $("setting-refused").textContent = sentence;
    $("setting-refused").hidden = !sentence;
  }
}
