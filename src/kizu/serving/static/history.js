// What was judged so far, the latest first.

import { blob } from "./api.js";

const SIDE = 128; // pixels of a thumbnail
const FRESH = 24; // entries that stay ready to be shown again

export class History {
  constructor(strip, tally, chosen) {
    this.strip = strip;
    this.tally = tally;
    this.chosen = chosen;
    this.entries = [];
    this.note = "";
  }

  add(entry) {
    this.entries.unshift(entry);
    this.strip.closest("section").hidden = false;
    this.strip.prepend(this.row(entry));
    if (entry.file) createImageBitmap(entry.seen).then((seen) => this.picture(entry, seen));
    else blob(`v1/verdicts/${entry.id}/thumbnail`).then((small) => this.load(entry, small));
    for (const old of this.entries.slice(FRESH)) if (old.id) old.result = null;
    this.count();
  }

  row(entry) {
    const item = document.createElement("li");
    const button = document.createElement("button");
    const name = document.createElement("span");
    const verdict = document.createElement("b");
    button.type = "button";
    entry.canvas = document.createElement("canvas");
    Object.assign(entry.canvas, { width: SIDE, height: SIDE });
    name.className = "file";
    name.textContent = entry.name.split("/").pop();
    verdict.textContent = entry.verdict.verdict;
    button.title = entry.name;
    button.append(entry.canvas, verdict, name);
    button.addEventListener("click", () => this.chosen(entry));
    item.dataset.verdict = entry.verdict.verdict;
    item.append(button);
    entry.row = item;
    this.mark(entry);
    return item;
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

  select(entry) {
    for (const other of this.entries) other.row.toggleAttribute("aria-current", other === entry);
    if (entry.row) this.strip.scrollLeft = entry.row.offsetLeft - (this.strip.clientWidth - entry.row.offsetWidth) / 2;
    this.selected = entry;
  }

  /** A newer or an older one. */
  step(by) {
    const next = this.entries[this.entries.indexOf(this.selected) + by];
    if (next) this.chosen(next);
  }

  mark(entry) {
    entry.row.dataset.feedback = entry.feedback ?? "";
    entry.row.firstChild.setAttribute("aria-label", this.words(entry));
    this.count();
  }

  words(entry) {
    const said = { good: ", marked good", bad: ", marked defective" }[entry.feedback] ?? "";
    return `${entry.name}: ${entry.verdict.verdict}${said}`;
  }

  busy(note) {
    this.note = note;
    this.count();
  }

  count() {
    const stopped = this.entries.filter((entry) => entry.verdict.verdict === "stop").length;
    this.tally.textContent = this.note || `${stopped} of ${this.entries.length} stopped`;
  }
}
