// Where a score lies among those of good parts, and a threshold that can be moved between them.

const SVG = "http://www.w3.org/2000/svg";
const STEPS = 1000;
const INSET = 11; // pixels, half of the slider's thumb
const HEIGHT = 54;
const ACROSS = 3.2; // pixels, a good part's dot

const node = (name, attributes, text = "") => {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.textContent = text;
  return made;
};

export class Scale {
  constructor(plot, slider, moved) {
    this.plot = plot;
    this.slider = slider;
    slider.max = STEPS;
    slider.addEventListener("input", () => moved(this.value));
    new ResizeObserver(() => this.draw()).observe(plot);
  }

  show(good, score, threshold) {
    const marks = [...good, score, ...(threshold === null ? [] : [threshold])];
    const [low, high] = [Math.min(...marks), Math.max(...marks)];
    const room = (high - low || 1) * 0.06;
    Object.assign(this, { good, score, low: low - room, high: high + room });
    this.set(threshold ?? this.high);
  }

  get value() {
    const at = this.low + ((this.high - this.low) * this.slider.valueAsNumber) / STEPS;
    return this.exact !== undefined && Math.abs(at - this.exact) < (this.high - this.low) / STEPS ? this.exact : at;
  }

  /** Put the slider to a value, which it then gives back exactly. */
  set(threshold) {
    this.exact = threshold;
    this.slider.value = (STEPS * (threshold - this.low)) / (this.high - this.low);
    this.draw();
  }

  draw() {
    const width = this.plot.clientWidth;
    if (!this.good || width === 0) return;
    const x = (value) => INSET + ((width - 2 * INSET) * (value - this.low)) / (this.high - this.low);
    this.plot.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    const piles = new Map();
    const dots = this.good.map((value) => {
      const column = Math.round(x(value) / ACROSS);
      const row = piles.get(column) ?? 0;
      piles.set(column, row + 1);
      return [column * ACROSS, row];
    });
    const rise = Math.min(ACROSS, (HEIGHT - 22) / Math.max(1, ...piles.values()));
    const at = x(this.value);
    const parts = dots.map(([left, row]) =>
      node("circle", { class: left > at ? "dot over" : "dot", cx: left, cy: HEIGHT - 4 - row * rise, r: ACROSS / 2.4 }),
    );
    const mine = x(this.score);
    parts.push(node("line", { class: "level", x1: at, x2: at, y1: 16, y2: HEIGHT }));
    const stop = this.score > this.value;
    parts.push(node("path", { class: stop ? "mine stop" : "mine", d: `M${mine} 26l5 7l-5 7l-5-7z` }));
    const side = mine > width - 90 ? "end" : mine < 90 ? "start" : "middle";
    parts.push(node("text", { class: stop ? "mine stop" : "mine", x: mine, y: 12, "text-anchor": side }, "this part"));
    this.plot.replaceChildren(...parts);
  }
}
