// The inspection page: photographs in, verdicts to look at, to question and to correct.

import { blob, json, post } from "./api.js";
import { History } from "./history.js";
import { Scale } from "./scale.js";
import { Setting } from "./setting.js";
import { Viewer, bytes, decodeMap, regionsAbove } from "./viewer.js";

const $ = (id) => document.getElementById(id);
const IMAGE = /\.(png|jpe?g|jpe|jfif|bmp|dib|tiff?|webp|gif|p[pgbn]m|jp2|j2k|avif|tga)$/i;

const MAX_REGIONS = 20; // regions that a lower threshold lists
const PAGE = 60; // verdicts that are fetched at a time
const NEWS = 5000; // milliseconds between looks for verdicts from elsewhere,
const MOST = 1000; // and how many of them are fetched at most

let models = [];
let current = null; // the entry on show
let promised = null; // what the threshold on show promises
const viewer = new Viewer($("canvas"), $("frame"), placeBadges);
const scale = new Scale($("plot"), $("threshold"), (value) => {
  if (!current?.result) return;
  history.follow(current.model, value); // it stays for the next photograph
  follow(value);
});
const setting = new Setting(async (changed) => {
  await refresh();
  history.forget(changed.name);
  history.follow(changed.name, undefined);
  if (current?.model === changed.name) await open(current);
  say(`${changed.name}: ${changed.statement}`);
});
const history = new History($("history"), { doubt, chosen: (entry) => open(entry) });

const model = () => models.find((one) => one.name === $("model").value) ?? models[0];
const digits = (value) => (value === null ? "–" : Number(value).toPrecision(4));
const rarely = (p) =>
  p >= 0.5 ? `At most ${Math.round(100 * p)} % of the good parts score as high` : `At most 1 good part in ${Math.floor(1 / p + 1e-9).toLocaleString("en-GB")} scores as high`;
const inGood = (p) =>
  p >= 0.5 ? `at most ${Math.round(100 * p)} % of good parts` : `at most 1 in ${Math.floor(1 / p + 1e-9).toLocaleString("en-GB")} good parts`;

/** A model that the server has, or what is known of another one by its verdict. */
function modelOf(entry) {
  const known = models.find((one) => one.name === entry.model);
  const { threshold } = entry.verdict ?? {};
  const statement = `This server does not have the model ${entry.model}: only its verdict on this photograph is shown.`;
  return known ?? { name: entry.model, threshold, statement, good_scores: [], map_peaks: [], scale: [0, 1], map_level: null, foreign: true };
}

/** How far an entry's score is from the threshold, in units of how far good parts usually are. */
function doubt({ model, verdict }, moved) {
  const level = moved ?? verdict.threshold;
  const middle = models.find((one) => one.name === model)?.middle ?? 0;
  return Math.abs(verdict.score - level) / (Math.abs(level - middle) || 1);
}

async function start() {
  await refresh();
  $("model").replaceChildren(...models.map((one) => new Option(one.name)));
  $("model-choice").hidden = models.length < 2;
  $("model-name").textContent = models.length < 2 ? models[0].name : "";
  $("empty-promise").textContent = model().statement;
  if (!("webkitdirectory" in $("folder"))) $("folder-choice").hidden = true;
  if (!navigator.mediaDevices) $("camera").hidden = true;
  for (const { name } of models.length > 1 ? models : []) $("choice").append(new Option(`model: ${name}`));
  await older();
  setInterval(() => document.hidden || news().catch(() => {}), NEWS);
}

/** The models as the server has them now. */
async function refresh() {
  models = await json("v1/models");
  for (const one of models) one.middle = one.good_scores[one.good_scores.length >> 1];
}

const kept = ({ id, model, verdict, feedback }) => ({ id, model, name: verdict.image, verdict, feedback });

/** The verdicts before those that there are. */
async function older() {
  $("older").disabled = true;
  try {
    const before = history.ids.length ? `&before=${Math.min(...history.ids)}` : "";
    const found = await json(`v1/verdicts?limit=${PAGE}${before}`);
    seen = Math.max(seen, ...found.map(({ id }) => id));
    history.add(found.map(kept));
    $("older").hidden = found.length < PAGE;
  } finally {
    $("older").disabled = false;
  }
}

/** Verdicts that came from elsewhere meanwhile: from kizu watch, or from another page. */
async function news() {
  if (judging) return;
  const found = await json("v1/verdicts?limit=1");
  while (found.length && found.at(-1).id > seen + 1 && found.length < MOST) {
    const before = await json(`v1/verdicts?limit=${PAGE}&before=${found.at(-1).id}`);
    if (!before.length) break;
    found.push(...before);
  }
  const fresh = found.filter(({ id }) => id > seen);
  if (judging || !fresh.length) return;
  seen = fresh[0].id;
  history.add(fresh.map(kept));
}

let judging = 0; // photographs that are being judged: their verdicts are not news
let seen = 0; // the latest verdict that was fetched
const ready = start();

// ---- photographs in

async function judge(files) {
  const pictures = [...files].filter((file) => file.type.startsWith("image/") || IMAGE.test(file.name));
  if (pictures.length === 0) return say("There is no photograph among these files.");
  leaveCamera();
  await ready;
  let shown = false;
  const chosen = model().name;
  judging += 1;
  for (const [number, file] of pictures.entries()) {
    if (pictures.length > 1) history.busy(`Judging ${number + 1} of ${pictures.length} …`);
    const entry = { file, model: chosen, name: file.webkitRelativePath || file.name };
    try {
      await look(entry, true);
      history.add([entry]);
      if (!shown || pictures.length === 1) await open(entry);
      shown = true;
    } catch (error) {
      say(error.message);
    }
  }
  judging -= 1;
  history.busy("");
}

/** What another model says of the photograph on show. */
async function judgeAgain() {
  $("empty-promise").textContent = model().statement;
  if (!current?.photograph || current.model === model().name || !$("viewfinder").hidden) return;
  await judge([new File([current.photograph], current.name, { type: "image/png" })]); // the server finds out what it is
}

/** Fill an entry with the server's answer. */
async function look(entry, keep) {
  const photograph = entry.file ?? entry.photograph ?? (await blob(`v1/verdicts/${entry.id}/photograph`));
  if (modelOf(entry).foreign) {
    const seen = await picture(photograph);
    if (!seen) throw new Error(`${entry.name} cannot be shown: this browser cannot read it, and the server does not have the model ${entry.model}.`);
    const result = { ...entry.verdict, regions: [], pairs: [], map: null, width: seen.width, height: seen.height };
    return Object.assign(entry, { photograph, result, seen: photograph });
  }
  const wishes = new URLSearchParams({ model: entry.model, map: "png", why: true, keep, name: entry.name.slice(-200) });
  if (!(await picture(photograph))) wishes.set("view", true);
  const answer = await post(`v1/predict?${wishes}`, photograph);
  const [result] = answer.results;
  if (answer.version !== modelOf(entry).version) await refresh(); // it was changed meanwhile
  const seen = result.view ? new Blob([bytes(result.view)], { type: "image/jpeg" }) : photograph;
  Object.assign(entry, { photograph, result, seen, verdict: entry.verdict ?? result, id: entry.id ?? result.id });
}

const picture = (file) => createImageBitmap(file, { imageOrientation: "from-image" }).catch(() => null);

// ---- one photograph on show

async function open(entry) {
  const before = current;
  current = entry;
  history.select(entry);
  if (!entry.result) {
    try {
      await look(entry, false);
    } catch (error) {
      if (current === entry) history.select((current = before?.result ? before : null)); // what is still on show
      return say(error.message);
    }
    if (current !== entry) return;
  }
  const about = modelOf(entry);
  const { result } = entry;
  const [seen, map] = await Promise.all([picture(entry.seen), result.map && decodeMap(result.map)]);
  if (current !== entry) return;
  history.picture(entry, seen);
  document.querySelector("main").dataset.state = "open";
  $("name").textContent = models.length > 1 || about.foreign ? `${entry.name}, by ${entry.model}` : entry.name;
  $("threshold").disabled = Boolean(about.foreign);
  viewer.show(seen, result, map, about.scale);
  const level = history.levels.get(about.name) ?? about.threshold;
  scale.show(about.good_scores, result.score, level);
  listRegions(result.regions, result);
  listPairs(result);
  showMark(entry.feedback, "");
  follow(level ?? scale.value);
}

/** Verdict, outline and statement for a threshold, which may be another than the model's. */
async function follow(threshold) {
  const entry = current;
  const { result } = entry;
  const about = modelOf(entry);
  const moved = threshold !== about.threshold && !about.foreign && !(about.threshold === null && !history.levels.has(about.name));
  $("reset").hidden = !moved || about.threshold === null;
  $("set").hidden = !about.settable || !(moved || about.tuned);
  scale.draw();
  const refused = entry.verdict.cannot_judge;
  const asks = entry.verdict.verdict === "ask";
  const stop = refused ? entry.verdict.verdict === "stop" : result.score > threshold;
  $("verdict").textContent = asks ? "Cannot judge" : stop ? `Stop${result.zone && !refused ? `: ${result.zone}` : ""}` : "Pass";
  $("finding").dataset.verdict = asks ? "ask" : stop ? "stop" : "pass";
  $("because").textContent =
    (refused ? `No promise covers this photograph: ${refused}. ` : "") +
    (about.threshold === null && !moved
      ? `This photograph scores ${digits(result.score)}, and the model has no threshold.`
      : `This photograph scores ${digits(result.score)}, ${result.score > threshold ? "above" : "not above"} the threshold of ${digits(threshold)}. `) +
    (about.good_scores.length || about.foreign ? `${rarely(result.p_value)}.` : "");
  if (!moved && !refused && stop !== (entry.verdict.verdict === "stop"))
    $("because").textContent += ` When this photograph was judged, the part ${stop ? "passed" : "was stopped"}: the model has changed since.`;
  $("threshold").setAttribute("aria-valuetext", `${digits(threshold)}: ${asks ? "cannot judge" : stop ? "stop" : "pass"}`);
  promised = moved
    ? await json(`v1/models/${encodeURIComponent(about.name)}/promise?threshold=${threshold}`)
    : { threshold, statement: about.statement, map_level: about.map_level };
  if (current !== entry || (moved && scale.value !== threshold)) return;
  $("statement").textContent = promised.statement + (moved ? " This threshold holds on this page only." : "");
  const mapLevel = promised.map_level ?? Infinity;
  viewer.set({ level: mapLevel, region: null });
  const lowered = viewer.map && mapLevel < (about.map_level ?? Infinity);
  const regions = lowered ? marked(about, mapLevel, result) : result.regions;
  listRegions(regions, result);
  if (stop && viewer.map && Number.isFinite(mapLevel) && regions.every((region) => region.peak <= mapLevel))
    $("because").textContent += " No single place is above the pixel threshold, so that none is outlined.";
  for (const [number, region] of regions.entries()) {
    const below = region.peak <= mapLevel;
    $("regions").children[number].classList.toggle("below", below);
    $("badges").children[number].hidden = below;
  }
}

/** What a lower level marks beyond what the server did. */
function marked(about, level, result) {
  const good = about.map_peaks;
  const share = (peak) => (1 + good.filter((one) => one >= peak).length) / (good.length + 1);
  const found = regionsAbove(viewer.map, level, result).slice(0, MAX_REGIONS);
  return found.map((region) => ({ ...region, p_value: share(region.peak) }));
}

function listRegions(regions, result) {
  $("marked").hidden = regions.length === 0;
  const rows = regions.map((region, number) => {
    const row = document.createElement("button");
    row.type = "button";
    row.title = `The map reaches ${digits(region.peak)} here, as in ${inGood(region.p_value)}`;
    row.append(
      span("number", number + 1),
      span("what", `${region.zone ? `${region.zone}: ` : ""}${sizeOf(region)}`),
      span("quiet", region.matters === false ? "too small to matter" : inGood(region.p_value)),
    );
    const point = (on) => () => viewer.set({ region: on ? region : null });
    for (const [event, on] of [["pointerenter", 1], ["focus", 1], ["pointerleave", 0], ["blur", 0]]) row.addEventListener(event, point(on));
    const item = document.createElement("li");
    item.append(row);
    item.classList.toggle("small", region.matters === false);
    return item;
  });
  $("regions").replaceChildren(...rows);
  const badges = regions.map(({ box: [left, top, width], matters }, number) => {
    const badge = document.createElement("li");
    badge.textContent = number + 1;
    badge.classList.toggle("small", matters === false);
    badge.corner = [(left + width) / result.width, top / result.height];
    return badge;
  });
  $("badges").replaceChildren(...badges);
  placeBadges();
}

/** Its length, width and area where the model measures them, otherwise the box around it. */
function sizeOf({ box, size }) {
  if (!size) return `${box[2]} × ${box[3]} pixels`;
  const [length, width, area] = [size.length, size.width, size.area].map((value) => Number(value.toPrecision(3)));
  return `${length} × ${width} ${size.unit}, ${area} ${size.unit}²`;
}

/** Each number at its region's corner, wherever the view is now. */
function placeBadges() {
  $("closer").setAttribute("aria-pressed", String(viewer.zoomed));
  for (const badge of $("badges").children) {
    const [right, down] = viewer.at(badge.corner);
    badge.style.left = `min(${100 * right}%, 100% - 2rem)`;
    badge.style.top = `max(${100 * down}%, 1rem)`;
    badge.classList.toggle("outside", viewer.zoomed && !(right > 0 && right < 1 && down > 0 && down < 1));
  }
}

function listPairs(result) {
  const pairs = result.pairs.filter((pair) => pair.there);
  $("beside").hidden = pairs.length === 0;
  $("pairs").replaceChildren(
    ...pairs.map((pair) => {
      const figure = document.createElement("figure");
      const what = pair.region ? `region ${pair.region}` : "the most unusual place";
      const words = document.createElement("figcaption");
      words.append(
        `Left, ${what}; right, the most similar place in any good photograph it learned from, `,
        span("file", pair.image),
        `. They differ ${pair.distance.toFixed(1)} times as much as good parts usually do there.`,
      );
      figure.append(image(pair.here, what), image(pair.there, `the nearest good place, in ${pair.image}`), words);
      return figure;
    }),
  );
}

// ---- good or bad

async function mark(label) {
  const entry = current;
  if (!entry?.photograph) return;
  const about = new URLSearchParams({ label, model: entry.model, name: entry.name.slice(-200) });
  if (entry.id) about.set("id", entry.id);
  try {
    const kept = await post(`v1/feedback?${about}`, entry.photograph);
    entry.feedback = label;
    history.mark(entry);
    const alarm = label === "good" && $("finding").dataset.verdict === "stop";
    const miss = label === "bad" && $("finding").dataset.verdict === "pass";
    const what = alarm ? "A false alarm, noted." : miss ? "A missed defect, noted." : "Noted.";
    if (current === entry) showMark(label, `${what} ${kept.good} good and ${kept.bad} defective collected so far, for kizu update and kizu tune.`);
  } catch (error) {
    say(error.message);
  }
}

function showMark(label, thanks) {
  for (const id of ["good", "bad"]) $(id).setAttribute("aria-pressed", String(id === label));
  $("thanks").textContent = thanks;
}

// ---- camera

async function openCamera() {
  try {
    const stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment", width: { ideal: 1920 } } });
    $("video").srcObject = stream;
    await $("video").play();
    $("viewfinder").hidden = false;
    document.querySelector("main").dataset.state = "camera";
  } catch (error) {
    say(`The camera cannot be used: ${error.message}`);
  }
}

function leaveCamera() {
  if ($("viewfinder").hidden) return;
  for (const track of $("video").srcObject.getTracks()) track.stop();
  $("viewfinder").hidden = true;
  document.querySelector("main").dataset.state = current ? "open" : "empty";
}

async function shoot() {
  const video = $("video");
  const canvas = new OffscreenCanvas(video.videoWidth, video.videoHeight);
  canvas.getContext("2d").drawImage(video, 0, 0);
  const taken = await canvas.convertToBlob({ type: "image/png" });
  await judge([new File([taken], `camera ${new Date().toLocaleTimeString("en-GB")}.png`, { type: "image/png" })]);
}

// ---- small things

function span(kind, text) {
  const made = document.createElement("span");
  made.className = kind;
  made.textContent = text;
  return made;
}

function image(text, alternative) {
  const made = new Image();
  made.src = `data:image/jpeg;base64,${text}`;
  made.alt = alternative;
  return made;
}

let silence = 0;
function say(sentence) {
  $("toast").textContent = sentence;
  $("toast").hidden = false;
  clearTimeout(silence);
  silence = setTimeout(() => ($("toast").hidden = true), 8000);
}

/** Move what is near, where the photograph has the keyboard; whether it was so. */
function pan(event, right, down) {
  if (event.target !== $("canvas") || !viewer.zoomed) return false;
  event.preventDefault();
  const step = 0.2 / viewer.view.zoom;
  viewer.move(right * step, down * step);
  return true;
}

const bare = (on) => viewer.set({ bare: on });

for (const id of ["files", "folder"]) {
  $(id).addEventListener("change", async (event) => {
    const files = [...event.target.files];
    event.target.value = "";
    await judge(files);
  });
}
$("camera").addEventListener("click", openCamera);
$("leave").addEventListener("click", leaveCamera);
$("shoot").addEventListener("click", shoot);
$("good").addEventListener("click", () => mark("good"));
$("bad").addEventListener("click", () => mark("bad"));
$("toast").addEventListener("click", () => ($("toast").hidden = true));
$("outlines").addEventListener("change", (event) => viewer.set({ outlines: event.target.checked }));
$("opacity").addEventListener("input", (event) => {
  $("opacity-value").textContent = `${event.target.value} %`;
  viewer.set({ opacity: event.target.valueAsNumber / 100 });
});
$("reset").addEventListener("click", () => {
  const about = modelOf(current);
  history.follow(about.name, undefined);
  scale.set(about.threshold);
  follow(about.threshold);
});
$("set").addEventListener("click", () => {
  const about = modelOf(current);
  setting.open(about, scale.value === about.threshold ? null : scale.value, promised.statement);
});
$("model").addEventListener("change", judgeAgain);
$("closer").addEventListener("click", () => viewer.toggle());
for (const id of ["choice", "order"]) $(id).addEventListener("change", (event) => history.arrange({ [id]: event.target.value }));
$("older").addEventListener("click", () => older().catch((error) => say(error.message)));

for (const event of ["dragover", "dragleave", "drop"]) {
  addEventListener(event, (dragged) => {
    dragged.preventDefault();
    document.body.classList.toggle("over", event === "dragover");
    if (event === "drop") judge(dragged.dataTransfer.files);
  });
}
addEventListener("paste", (event) => event.clipboardData.files.length && judge(event.clipboardData.files));
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, select")) return;
  const keys = {
    ArrowLeft: () => pan(event, -1, 0) || history.step(-1),
    ArrowRight: () => pan(event, 1, 0) || history.step(1),
    ArrowUp: () => pan(event, 0, -1),
    ArrowDown: () => pan(event, 0, 1),
    g: () => mark("good"),
    b: () => mark("bad"),
    h: () => bare(true),
    o: () => $("files").click(),
    "+": () => viewer.closer(),
    "=": () => viewer.closer(),
    "-": () => viewer.farther(),
    0: () => viewer.fit(),
    Escape: leaveCamera,
  };
  keys[event.key]?.();
});
addEventListener("keyup", (event) => event.key === "h" && bare(false));

ready.catch((error) => say(error.message));
