// The photograph, its heat map and the outline of what is marked, on a canvas.

const STOPS = [[8, 6, 28], [66, 18, 104], [150, 36, 104], [222, 76, 54], [250, 158, 20], [252, 250, 180]];
const OUTLINE = "#ff4060";

/** Colour of a share 0 … 1 of the scale. */
function heat(share) {
  const at = Math.min(Math.max(share, 0), 1) * (STOPS.length - 1);
  const low = Math.min(Math.floor(at), STOPS.length - 2);
  return STOPS[low].map((value, channel) => value + (STOPS[low + 1][channel] - value) * (at - low));
}

export function bytes(text) {
  return Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
}

/** The values of a map that came as PNG: {values, width, height}. */
export async function decodeMap(map) {
  const file = new Blob([bytes(map.data)], { type: "image/png" });
  const picture = await createImageBitmap(file, { colorSpaceConversion: "none" });
  const canvas = new OffscreenCanvas(map.width, map.height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(picture, 0, 0);
  const pixels = context.getImageData(0, 0, map.width, map.height).data;
  const values = new Float32Array(map.width * map.height);
  for (let i = 0; i < values.length; i++) values[i] = map.low + ((map.high - map.low) * pixels[4 * i]) / 255;
  return { values, width: map.width, height: map.height };
}

/** The heat map as a picture whose opacity grows with the value. */
function glow({ values, width, height }, [low, high]) {
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d");
  const picture = context.createImageData(width, height);
  const palette = Array.from({ length: 256 }, (_, shade) => heat(shade / 255));
  for (let i = 0; i < values.length; i++) {
    const share = Math.min(Math.max((values[i] - low) / (high - low), 0), 1);
    picture.data.set(palette[Math.round(255 * share)], 4 * i);
    picture.data[4 * i + 3] = 255 * share;
  }
  context.putImageData(picture, 0, 0);
  return canvas;
}

/** Where a map passes a level, as line pieces in units of its width and height (marching squares). */
function contour({ values, width, height }, level) {
  const path = new Path2D();
  const crossing = (a, b) => (level - a) / (b - a);
  const above = (x, y) => (x < 0 || y < 0 || x >= width || y >= height ? -Infinity : values[y * width + x]);
  const point = (x, y) => [(x + 0.5) / width, (y + 0.5) / height];
  for (let y = -1; y < height; y++) {
    for (let x = -1; x < width; x++) {
      const corners = [above(x, y), above(x + 1, y), above(x + 1, y + 1), above(x, y + 1)];
      const inside = corners.map((value) => value > level);
      if (inside.every(Boolean) || !inside.some(Boolean)) continue;
      const places = [[x, y], [x + 1, y], [x + 1, y + 1], [x, y + 1]];
      const crossings = [];
      for (let side = 0; side < 4; side++) {
        const next = (side + 1) % 4;
        if (inside[side] === inside[next]) continue;
        const share = [corners[side], corners[next]].some((v) => v === -Infinity) ? 0.5 : crossing(corners[side], corners[next]);
        const [from, to] = [places[side], places[next]];
        crossings.push(point(from[0] + (to[0] - from[0]) * share, from[1] + (to[1] - from[1]) * share));
      }
      for (let i = 0; i + 1 < crossings.length; i += 2) {
        path.moveTo(...crossings[i]);
        path.lineTo(...crossings[i + 1]);
      }
    }
  }
  return path;
}

/** Regions above a level, the highest first, in pixels of the photograph: what the server marks at its own level. */
export function regionsAbove({ values, width, height }, level, size) {
  const seen = new Uint8Array(values.length);
  const [across, down] = [size.width / width, size.height / height];
  const regions = [];
  for (let start = 0; start < values.length; start++) {
    if (seen[start] || !(values[start] > level)) continue;
    let [left, right, top, bottom, peak] = [width, 0, height, 0, -Infinity];
    const open = [start];
    seen[start] = 1;
    while (open.length) {
      const at = open.pop();
      const [x, y] = [at % width, Math.floor(at / width)];
      [left, right] = [Math.min(left, x), Math.max(right, x)];
      [top, bottom] = [Math.min(top, y), Math.max(bottom, y)];
      peak = Math.max(peak, values[at]);
      for (let b = Math.max(0, y - 1); b <= Math.min(height - 1, y + 1); b++) {
        for (let a = Math.max(0, x - 1); a <= Math.min(width - 1, x + 1); a++) {
          const next = b * width + a;
          if (seen[next] || !(values[next] > level)) continue;
          seen[next] = 1;
          open.push(next);
        }
      }
    }
    const [x, y] = [Math.floor(left * across), Math.floor(top * down)];
    const [farX, farY] = [Math.ceil((right + 1) * across), Math.ceil((bottom + 1) * down)];
    const contour = [[x, y], [farX, y], [farX, farY], [x, farY]];
    regions.push({ box: [x, y, farX - x, farY - y], peak, contour });
  }
  return regions.sort((one, other) => other.peak - one.peak);
}

const STEP = 1.25; // of the zoom, for a key or a notch of the wheel
const DEEPEST = 8; // screen pixels for a pixel of the photograph

export class Viewer {
  /** `moved` is called when what is drawn where has changed. */
  constructor(canvas, frame, moved) {
    this.canvas = canvas;
    this.frame = frame;
    this.moved = moved;
    this.look = { opacity: 0.6, outlines: true, bare: false, level: Infinity, region: null };
    this.view = { zoom: 1, x: 0.5, y: 0.5 }; // and the place in the middle, as shares of the photograph
    this.pointers = new Map();
    this.listen();
    new ResizeObserver(() => this.draw()).observe(frame.parentElement);
  }

  /** Show a photograph (an ImageBitmap or picture element), its map and the colour scale. */
  show(photograph, size, map, scale) {
    this.photograph = photograph;
    this.size = size;
    this.map = map;
    this.heat = map && glow(map, scale);
    this.outline = null;
    this.fit();
  }

  set(look) {
    if ("level" in look && look.level !== this.look.level) this.outline = null;
    Object.assign(this.look, look);
    this.draw();
  }

  // ---- zoom

  get zoomed() {
    return this.view.zoom > 1;
  }

  /** Screen pixels for a pixel of the photograph, when all of it is in view. */
  get factor() {
    return this.frame.clientWidth / this.size.width;
  }

  get ready() {
    return Boolean(this.photograph) && this.frame.clientWidth > 0;
  }

  fit() {
    this.view = { zoom: 1, x: 0.5, y: 0.5 };
    this.draw();
  }

  /** Pixel by pixel around a place on the screen, or all of it again. */
  toggle(at) {
    if (!this.ready) return;
    if (this.zoomed) this.fit();
    else this.zoomTo(Math.max(2, 1 / this.factor), at);
  }

  zoomBy(factor, at) {
    this.zoomTo(this.view.zoom * factor, at);
  }

  closer(at) {
    this.zoomBy(STEP, at);
  }

  farther(at) {
    this.zoomBy(1 / STEP, at);
  }

  /** Change the zoom; what is at this place on the screen (pixels of the frame) stays there. */
  zoomTo(zoom, at = [this.frame.clientWidth / 2, this.frame.clientHeight / 2]) {
    if (!this.ready) return;
    const before = this.place(at);
    this.view.zoom = Math.min(Math.max(zoom, 1), Math.max(DEEPEST, DEEPEST / this.factor));
    const after = this.place(at);
    this.move(before[0] - after[0], before[1] - after[1]);
  }

  /** Move the view by shares of the photograph. */
  move(right, down) {
    const half = 0.5 / this.view.zoom;
    this.view.x = Math.min(Math.max(this.view.x + right, half), 1 - half);
    this.view.y = Math.min(Math.max(this.view.y + down, half), 1 - half);
    this.draw();
  }

  /** Pixels of the frame → shares of the photograph. */
  place([left, top]) {
    const { zoom, x, y } = this.view;
    return [x + (left / this.frame.clientWidth - 0.5) / zoom, y + (top / this.frame.clientHeight - 0.5) / zoom];
  }

  /** Shares of the photograph → shares of the frame. */
  at([right, down]) {
    const { zoom, x, y } = this.view;
    return [(right - x) * zoom + 0.5, (down - y) * zoom + 0.5];
  }

  listen() {
    const at = ({ clientX, clientY }) => {
      const { left, top } = this.canvas.getBoundingClientRect();
      return [clientX - left, clientY - top];
    };
    const { canvas, pointers } = this;
    canvas.addEventListener(
      "wheel",
      (event) => {
        if (event.deltaY > 0 && !this.zoomed) return; // the page scrolls on
        event.preventDefault();
        this.zoomBy(STEP ** (-Math.sign(event.deltaY) * Math.min(3, Math.abs(event.deltaY) / 50)), at(event));
      },
      { passive: false },
    );
    canvas.addEventListener("dblclick", (event) => this.toggle(at(event)));
    canvas.addEventListener("pointerdown", (event) => {
      if (event.button) return;
      canvas.setPointerCapture(event.pointerId);
      pointers.set(event.pointerId, at(event));
      this.set({ bare: pointers.size === 1 && !this.zoomed });
    });
    canvas.addEventListener("pointermove", (event) => {
      if (!pointers.has(event.pointerId)) return;
      const [before, other] = [pointers.get(event.pointerId), [...pointers].find(([id]) => id !== event.pointerId)?.[1]];
      const now = at(event);
      pointers.set(event.pointerId, now);
      if (other) {
        const apart = (from) => Math.hypot(from[0] - other[0], from[1] - other[1]);
        this.zoomBy(apart(now) / Math.max(1, apart(before)), [(now[0] + other[0]) / 2, (now[1] + other[1]) / 2]);
      } else if (this.zoomed) {
        const [from, to] = [this.place(before), this.place(now)];
        this.move(from[0] - to[0], from[1] - to[1]);
      }
    });
    for (const end of ["pointerup", "pointercancel", "pointerleave"]) {
      canvas.addEventListener(end, (event) => {
        pointers.delete(event.pointerId);
        this.set({ bare: false });
      });
    }
  }

  // ---- drawing

  draw() {
    if (!this.photograph || this.frame.parentElement.clientWidth === 0) return;
    const { width, height } = this.size;
    const room = this.frame.parentElement;
    const tallest = Math.max(260, window.innerHeight * (window.innerWidth < 880 ? 0.6 : 0.78));
    const factor = Math.min(room.clientWidth / width, tallest / height);
    const [wide, tall] = [Math.round(width * factor), Math.round(height * factor)];
    this.frame.style.width = `${wide}px`;
    this.frame.style.height = `${tall}px`;
    const density = window.devicePixelRatio || 1;
    const { zoom, x, y } = this.view;
    Object.assign(this.canvas, { width: wide * density, height: tall * density });
    this.canvas.toggleAttribute("data-zoomed", this.zoomed);
    this.moved();
    const context = this.canvas.getContext("2d");
    const scale = density * zoom;
    context.setTransform(scale, 0, 0, scale, scale * wide * (0.5 / zoom - x), scale * tall * (0.5 / zoom - y));
    context.imageSmoothingQuality = "high";
    context.imageSmoothingEnabled = !this.zoomed || factor * zoom < 1; // from one to one on, pixels are seen as they are
    context.drawImage(this.photograph, 0, 0, wide, tall);
    context.imageSmoothingEnabled = true;
    if (!this.map || this.look.bare) return;
    context.globalAlpha = this.look.opacity;
    context.drawImage(this.heat, 0, 0, wide, tall);
    context.globalAlpha = 1;
    if (this.look.outlines) this.drawOutline(context, wide, tall);
    if (this.look.region) this.drawRegion(context, factor);
  }

  drawOutline(context, wide, tall) {
    if (!Number.isFinite(this.look.level)) return;
    this.outline ??= contour(this.map, this.look.level);
    const path = new Path2D();
    path.addPath(this.outline, new DOMMatrix().scale(wide, tall));
    context.lineCap = "round";
    for (const [colour, width] of [["rgb(255 255 255 / 0.7)", 4], [OUTLINE, 2]]) {
      context.strokeStyle = colour;
      context.lineWidth = width / this.view.zoom;
      context.stroke(path);
    }
  }

  drawRegion(context, factor) {
    context.beginPath();
    for (const [x, y] of this.look.region.contour) context.lineTo(x * factor, y * factor);
    context.closePath();
    context.fillStyle = "rgb(255 255 255 / 0.35)";
    context.fill();
    context.strokeStyle = "#fff";
    context.lineWidth = 3 / this.view.zoom;
    context.stroke();
  }
}
