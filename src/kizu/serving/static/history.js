// What was judged so far, in the order and the choice that a person wants.

import { blob } from "./api.js";

const SIDE = 128; // pixels of a thumbnail
const FRESH = 24; // entries that stay ready to be shown again

const CHOICES = {
  all: () => true,
  stopped: (entry) => entry.shown === "stop",
  passed: (entry) => entry.shown === "pass",
  refused: (entry) => Boolean(entry.verdict.cannot_judge),
  marked: (entry) => Boolean(entry.feedback),
  unmarked: (entry) => !entry.feedback,
};
const ORDERS = {
  latest: null,
  highest: (one, other) => other.verdict.score - one.verdict.score,
  doubtful: (one, other) => one.doubt - other.doubt,
};

export class History {
  /** `doubt` says how far an entry is from the threshold; `chosen` opens one. */
  constructor(section, { doubt, chosen }) {
    this.section = section;
    this.strip = section.querySelector("#strip");
    this.tally = section.querySelector("#tally");
    this.doubt = doubt;
    this.chosen = chosen;
    this.entries = []; // the latest first
    this.levels = new Map(); // thresholds that were moved, by model
    this.note = "";
    this.choice = "all";
    this.order = "latest";
  }

  get ids() {
    return this.entries.map((entry) => entry.id).filter(Boolean);
  }

  /** Take entries in, each once. */
  add(entries) {
    const known = new Set(this.ids);
    const fresh = entries.filter((entry) => !entry.id || !known.has(entry.id));
    for (const entry of fresh) {
      entry.place = entry.id ?? Math.max(0, ...this.entries.map((other) => other.place)) + 0.5; // not kept by the server
      this.row(entry);
      this.judge(entry);
      if (entry.file) createImageBitmap(entry.seen).then((seen) => this.picture(entry, seen));
      else blob(`v1/verdicts/${entry.id}/thumbnail`).then((small) => this.load(entry, small)).catch(() => {});
    }
    this.entries = [...fresh, ...this.entries].sort((one, other) => other.place - one.place);
    this.section.hidden = this.entries.length === 0;
    for (const old of this.entries.slice(FRESH)) if (old.id && old !== this.selected) old.result = null;
    this.arrange();
  }

  row(entry) {
    const item = document.createElement("li");
    const button = document.createElement("button");
    const name = document.createElement("span");
    button.type = "button";
    entry.canvas = document.createElement("canvas");
    Object.assign(entry.canvas, { width: SIDE, height: SIDE });
    name.className = "file";
    name.textContent = entry.name.split("/").pop();
    button.title = `${entry.name}, by ${entry.model}`;
    button.append(entry.canvas, document.createElement("b"), name);
    button.addEventListener("click", () => this.chosen(entry));
    item.append(button);
    entry.row = item;
  }

  async load(entry, file) {
    this.picture(entry, await createImageBitmap(file));
  }

  /** Draw the middle of a photograph. */
  picture(entry, seen) {
    const side = Math.min(seen.width, seen.height);
    const corner = [(seen.width - side) / 2, (seen.height - side) / 2];
    entry.canvas.getContext("2d").drawImage(seen, ...corner, side, side, 0, 0, SIDE, SIDE);
  }

  /** The verdict that is shown: the model's, or that of the threshold that was moved. */
  judge(entry) {
    const level = this.levels.get(entry.model);
    entry.shown = level === undefined || entry.verdict.cannot_judge ? entry.verdict.verdict : entry.verdict.score > level ? "stop" : "pass";
    entry.doubt = this.doubt(entry, level);
    entry.row.dataset.verdict = entry.shown;
    entry.row.querySelector("b").textContent = entry.shown;
    this.label(entry);
  }

  /** Show the verdicts of a model by another threshold; without one, by its own. */
  follow(model, level) {
    if (level === undefined) this.levels.delete(model);
    else this.levels.set(model, level);
    for (const entry of this.entries) if (entry.model === model) this.judge(entry);
    this.arrange();
  }

  /** Forget what a model said beyond its verdicts: it was changed, and says it again when an entry is opened. */
  forget(model) {
    for (const entry of this.entries) if (entry.model === model) entry.result = null;
  }

  /** Show those of a kind ("stopped", "model: disc"), in an order. */
  arrange({ choice = this.choice, order = this.order } = {}) {
    Object.assign(this, { choice, order });
    const wanted = CHOICES[choice] ?? ((entry) => `model: ${entry.model}` === choice);
    this.shown = this.entries.filter(wanted);
    if (ORDERS[order]) this.shown.sort(ORDERS[order]);
    const rows = this.shown.map((entry) => entry.row);
    const same = rows.length === this.strip.children.length && rows.every((row, at) => row === this.strip.children[at]);
    if (!same) {
      const focused = this.strip.contains(document.activeElement) ? document.activeElement : null;
      this.strip.replaceChildren(...rows);
      if (focused?.isConnected) focused.focus({ preventScroll: true });
    }
    const index = this.shown.indexOf(this.selected);
    if (index >= 0) this.index = index;
    this.count();
  }

  select(entry) {
    for (const other of this.entries) other.row.toggleAttribute("aria-current", other === entry);
    if (entry?.row) this.strip.scrollLeft = entry.row.offsetLeft - (this.strip.clientWidth - entry.row.offsetWidth) / 2;
    this.selected = entry;
    this.index = this.shown?.indexOf(entry) ?? -1;
  }

  /** The next one to the right, or to the left. */
  step(by) {
    const there = this.shown[this.index] === this.selected; // or it left the choice, and another is in its place
    const next = this.shown[this.index + (there || by < 0 ? by : 0)];
    if (next) this.chosen(next);
  }

  mark(entry) {
    this.label(entry);
    this.arrange();
  }

  label(entry) {
    const said = { good: ", marked good", bad: ", marked defective" }[entry.feedback] ?? "";
    entry.row.dataset.feedback = entry.feedback ?? "";
    entry.row.firstChild.setAttribute("aria-label", `${entry.name}: ${entry.shown}${said}`);
  }

  busy(note) {
    this.note = note;
    this.count();
  }

  count() {
    const stopped = this.shown.filter((entry) => entry.shown === "stop").length;
    const moved = this.shown.some((entry) => this.levels.has(entry.model)) ? ", by the moved threshold" : "";
    this.tally.textContent = this.note || `${stopped} of the ${this.shown.length} shown here stopped${moved}`;
  }
}
