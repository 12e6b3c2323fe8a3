/** Draws zones on a photograph, by mouse, finger or keys, and saves them as the file that `kizu train --zones` takes. */

const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const COLOURS = ["#1f77ff", "#ff7f0e", "#2cb44a", "#e33cc8", "#17becf", "#bcaa22"];
const IGNORED = "#eb283c";
const REST = "elsewhere";
const CLOSE = 14; // screen pixels from its first corner, within which a polygon is closed
const PAINTED = 4; // polygons, above which a zone is shown without the lines between them
const DAB = 12; // corners of a brush's tip
const MAX_NAME = 60;
const MAX_CORNERS = 100_000; // of all zones, that training takes
const WHOLE = [[0, 0], [1, 0], [1, 1], [0, 1]];

let zones = []; // { name, ignored, rings }, a ring of corners [x, y] in shares of width and height, clockwise
let current = 0;
let tool = "rectangle";
let begun = []; // corners of what is being drawn
let cross = [0.5, 0.5]; // of the keys
let size = [1, 1]; // of the photograph, in pixels
const before = [], after = []; // what undo and redo go to

const clamp = (value) => Math.min(1, Math.max(0, value));
const area = (ring) => ring.reduce((sum, [x, y], n) => sum + x * ring[(n + 1) % ring.length][1] - y * ring[(n + 1) % ring.length][0], 0) / 2;
const clockwise = (ring) => (area(ring) < 0 ? [...ring].reverse() : ring);
const rounded = (ring) => ring.map((corner) => corner.map((value) => Math.round(value * 1e5) / 1e5));
const colour = (zone) => (zone.ignored ? IGNORED : COLOURS[zones.filter((other) => !other.ignored).indexOf(zone) % COLOURS.length]);
const path = (ring) => `M${ring.map(([x, y]) => `${x * size[0]} ${y * size[1]}`).join("L")}`;

const first = () => ({ name: "ignored 1", ignored: true, rings: [] });
const plain = (name) => name.replace(/[\p{C}\s]+/gu, " ").trim().slice(0, MAX_NAME).trim(); // as a zone may be called

function element(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

/** Change the zones so that it can be taken back. */
function change(act) {
  before.push(JSON.stringify({ zones, current }));
  after.length = 0;
  act();
  show();
}

function go(from, to) {
  if (!from.length) return;
  to.push(JSON.stringify({ zones, current }));
  ({ zones, current } = JSON.parse(from.pop()));
  begun = [];
  show();
}

function add(ignored) {
  begun = [];
  change(() => {
    const used = new Set(zones.map((zone) => zone.name));
    let number = 1;
    while (used.has(`${ignored ? "ignored" : "zone"} ${number}`)) number += 1;
    zones.push({ name: `${ignored ? "ignored" : "zone"} ${number}`, ignored, rings: [] });
    current = zones.length - 1;
  });
}

/** Give what was drawn to the current zone, if it covers anything. */
function finish(rings) {
  begun = [];
  const pixel = 1 / (size[0] * size[1]);
  const kept = rings.map(clockwise).map(rounded).filter((ring) => area(ring) > 4 * pixel);
  if (kept.length) change(() => zones[current].rings.push(...kept));
  else draw();
}

const box = ([x0, y0], [x1, y1]) => [[x0, y0], [x1, y0], [x1, y1], [x0, y1]];

/** A brush's way as polygons that lie over each other: its tip, swept along each step. */
function stroke(points) {
  const radius = ($("width").value / 100) * Math.min(...size);
  const around = ([x, y], angle) => [clamp(x + (radius * Math.cos(angle)) / size[0]), clamp(y + (radius * Math.sin(angle)) / size[1])];
  const arc = (point, from, turn) => Array.from({ length: DAB / 2 + 1 }, (_, n) => around(point, from + (turn * n) / (DAB / 2)));
  if (points.length === 1) return [[...arc(points[0], 0, Math.PI), ...arc(points[0], Math.PI, Math.PI)]];
  return points.slice(1).map((point, n) => {
    const last = points[n];
    const along = Math.atan2((point[1] - last[1]) * size[1], (point[0] - last[0]) * size[0]);
    return [...arc(point, along - Math.PI / 2, Math.PI), ...arc(last, along + Math.PI / 2, Math.PI)];
  });
}

/** The corners of a brush's way that are needed: no two nearer than half its width. */
function thinned(points) {
  const least = ($("width").value / 100) * Math.min(...size);
  const far = ([x0, y0], [x1, y1]) => Math.hypot((x1 - x0) * size[0], (y1 - y0) * size[1]) >= least;
  const kept = [points[0]];
  for (const point of points.slice(1)) if (far(kept.at(-1), point)) kept.push(point);
  return kept;
}

function at(event) {
  const frame = $("sheet").getBoundingClientRect();
  return [clamp((event.clientX - frame.left) / frame.width), clamp((event.clientY - frame.top) / frame.height)];
}

const closes = (point) => {
  const frame = $("sheet").getBoundingClientRect();
  return begun.length >= 3 && Math.hypot((point[0] - begun[0][0]) * frame.width, (point[1] - begun[0][1]) * frame.height) < CLOSE;
};

/** A corner of a polygon, or its end. */
function corner(point) {
  if (closes(point)) finish([begun]);
  else {
    begun.push(point);
    draw(point);
  }
}

function down(event) {
  if (event.button) return;
  event.preventDefault();
  $("sheet").focus({ focusVisible: false });
  const point = at(event);
  if (tool === "polygon") corner(point);
  else {
    begun = [point];
    $("sheet").setPointerCapture(event.pointerId);
    draw(point);
  }
}

function move(event) {
  if (!begun.length) return;
  const point = at(event);
  if (tool === "brush") begun.push(point);
  draw(point);
}

function up(event) {
  if (!begun.length || tool === "polygon") return;
  finish(tool === "rectangle" ? [box(begun[0], at(event))] : stroke(thinned(begun)));
}

function giveUp() {
  begun = [];
  draw();
}

const STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

function key(event) {
  if (event.target instanceof HTMLInputElement && event.target.type === "text") return;
  if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "z") {
    event.preventDefault();
    if (event.shiftKey) go(after, before);
    else go(before, after);
  } else if (event.target !== $("sheet")) return;
  else if (STEPS[event.key]) {
    event.preventDefault();
    const step = event.shiftKey ? 0.002 : 0.02;
    cross = cross.map((value, axis) => clamp(value + step * STEPS[event.key][axis]));
    draw(cross);
  } else if (event.key === "Enter") {
    event.preventDefault();
    if (tool === "polygon") corner([...cross]);
    else if (tool === "brush") finish(stroke([[...cross]]));
    else if (begun.length) finish([box(begun[0], cross)]);
    else {
      begun = [[...cross]];
      draw(cross);
    }
  } else if (event.key === "Escape") giveUp();
}

/** The sheet: every zone, and what is being drawn up to a point. */
function draw(point = null) {
  const shapes = zones.map((zone, number) => {
    const shape = element("path", { d: zone.rings.map((ring) => `${path(ring)}Z`).join(""), fill: colour(zone), stroke: colour(zone) });
    shape.classList.toggle("ignored", zone.ignored);
    shape.classList.toggle("other", number !== current);
    shape.classList.toggle("painted", zone.rings.length > PAINTED);
    return shape;
  });
  if (begun.length) {
    const line = tool === "rectangle" ? box(begun[0], point ?? begun[0]) : tool === "polygon" && point ? [...begun, point] : begun;
    const drawn = { d: path(line) + (tool === "rectangle" ? "Z" : ""), class: "begun" };
    if (tool === "brush") drawn.d = stroke(thinned(begun)).map((ring) => `${path(ring)}Z`).join("");
    shapes.push(element("path", drawn));
  }
  const [x, y] = [cross[0] * size[0], cross[1] * size[1]];
  const arm = Math.max(...size) / 40;
  shapes.push(element("path", { d: `M${x - arm} ${y}H${x + arm}M${x} ${y - arm}V${y + arm}`, class: "cross" }));
  $("sheet").replaceChildren(...shapes);
  $("hint").textContent = HINTS[tool](begun.length);
}

const HINTS = {
  rectangle: () => "Drag from one corner to the opposite one.",
  polygon: (corners) => (corners < 3 ? "Set the corners one after the other." : "Set the first corner again to close it."),
  brush: () => "Paint over the zone.",
};

/** The list of zones, and what they mean. */
function show() {
  current = Math.min(current, zones.length - 1);
  $("zones").replaceChildren(...zones.map(row));
  const inspected = zones.filter((zone) => !zone.ignored && zone.rings.length);
  $("rest-choice").hidden = !inspected.length;
  const names = zones.map((zone) => zone.name.trim());
  const twice = names.find((name, number) => names.indexOf(name) !== number) ?? (inspected.length && $("rest").checked && names.includes(REST) ? REST : undefined);
  const drawn = zones.filter((zone) => zone.rings.length);
  const corners = zones.flatMap((zone) => zone.rings).reduce((sum, ring) => sum + ring.length, 0);
  $("save").disabled = !drawn.length || names.includes("") || twice !== undefined || corners > MAX_CORNERS;
  $("undo").disabled = !before.length;
  $("redo").disabled = !after.length;
  $("meaning").textContent = names.includes("") ? "Give every zone a name."
    : twice !== undefined ? `Two zones would be called ${twice}.`
    : corners > MAX_CORNERS ? "These are more corners than training takes: undo, and use a wider brush."
    : !drawn.length ? "Draw the first zone on the photograph."
    : !inspected.length ? "What is red is ignored; all else is inspected as one."
    : $("rest").checked ? "Each zone has a threshold of its own, and so has the rest."
    : "Only these zones are inspected, each with a threshold of its own.";
  draw();
}

function row(zone, number) {
  const item = document.createElement("li");
  item.style.setProperty("--colour", colour(zone));
  const choice = Object.assign(document.createElement("input"), { type: "radio", name: "current", checked: number === current });
  choice.setAttribute("aria-label", `Draw ${zone.name}`);
  choice.addEventListener("change", () => { current = number; begun = []; draw(); });
  const name = Object.assign(document.createElement("input"), { type: "text", value: zone.name, maxLength: 60 });
  name.setAttribute("aria-label", "Name");
  name.addEventListener("change", () => change(() => { zone.name = plain(name.value); }));
  const kind = document.createElement("select");
  kind.setAttribute("aria-label", `What to do with ${zone.name}`);
  for (const [value, text] of [["", "inspect"], ["ignored", "ignore"]]) kind.append(new Option(text, value, false, zone.ignored === Boolean(value)));
  kind.addEventListener("change", () => change(() => { zone.ignored = Boolean(kind.value); }));
  const remove = Object.assign(document.createElement("button"), { type: "button", textContent: "×" });
  remove.setAttribute("aria-label", `Remove ${zone.name}`);
  remove.addEventListener("click", () => change(() => {
    zones.splice(number, 1);
    if (!zones.length) zones.push(first());
  }));
  item.append(choice, name, kind, remove);
  return item;
}

/** The file: zones that were drawn, and the rest before them, if it is inspected too. */
function saved() {
  const drawn = zones.filter((zone) => zone.rings.length).map(({ name, rings, ignored, false_alarms }) => ({ name: name.trim(), rings, ignored, false_alarms }));
  const rest = drawn.some((zone) => !zone.ignored) && $("rest").checked ? [{ name: REST, rings: [WHOLE], ignored: false }] : [];
  return [...rest, ...drawn];
}

function save() {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([`${JSON.stringify(saved(), null, 1)}\n`], { type: "application/json" }));
  link.download = "zones.json";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

async function open(file) {
  try {
    const value = JSON.parse(await file.text());
    const list = Array.isArray(value) ? value : value.config.zones;
    const isCorner = (corner) => Array.isArray(corner) && corner.length === 2 && corner.every(Number.isFinite);
    const isRing = (ring) => Array.isArray(ring) && ring.length >= 3 && ring.every(isCorner);
    const isZone = (zone) => typeof zone.name === "string" && zone.rings.length && zone.rings.every(isRing);
    if (!list.length || !list.every(isZone)) throw new Error();
    const isRest = (zone) => zone.name === REST && !zone.ignored && JSON.stringify(zone.rings) === JSON.stringify([WHOLE]);
    const own = list.filter((zone) => !isRest(zone));
    change(() => {
      zones = own.map(({ name, rings, ignored, false_alarms }) => ({ name: plain(name), rings, ignored: Boolean(ignored), false_alarms }));
      if (!zones.length) zones.push(first());
      current = 0;
      $("rest").checked = own.length < list.length;
    });
  } catch {
    say(`${file.name} holds no zones that kizu wrote.`);
  }
}

async function take(file) {
  const address = URL.createObjectURL(file);
  try {
    await place(address);
  } catch {
    say(`${file.name} cannot be shown by this browser: save it as PNG or JPEG.`);
  }
}

/** Show a photograph; zones stay where they are, in shares of its sides. */
async function place(address) {
  const picture = $("picture");
  picture.src = address;
  await picture.decode();
  size = [picture.naturalWidth, picture.naturalHeight];
  $("sheet").setAttribute("viewBox", `0 0 ${size[0]} ${size[1]}`);
  document.querySelector("main").dataset.state = "open";
  show();
}

let silence;
function say(sentence) {
  $("toast").textContent = sentence;
  $("toast").hidden = false;
  clearTimeout(silence);
  silence = setTimeout(() => { $("toast").hidden = true; }, 6000);
}

for (const [kind, act] of [["pointerdown", down], ["pointermove", move], ["pointerup", up], ["pointercancel", giveUp]]) $("sheet").addEventListener(kind, act);
addEventListener("keydown", key);
for (const choice of document.getElementsByName("tool"))
  choice.addEventListener("change", () => {
    tool = choice.value;
    $("width-choice").hidden = tool !== "brush";
    giveUp();
  });
$("undo").addEventListener("click", () => go(before, after));
$("redo").addEventListener("click", () => go(after, before));
$("inspect").addEventListener("click", () => add(false));
$("ignore").addEventListener("click", () => add(true));
$("rest").addEventListener("change", show);
$("save").addEventListener("click", save);
$("saved").addEventListener("change", (event) => { if (event.target.files[0]) open(event.target.files[0]); event.target.value = ""; });
$("photograph").addEventListener("change", (event) => { if (event.target.files[0]) take(event.target.files[0]); });
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => {
  event.preventDefault();
  const file = event.dataTransfer.files[0];
  if (file) (file.name.endsWith(".json") ? open : take)(file);
});

zones = [first()];
const given = document.querySelector("meta[name=photograph]");
if (given) await place(given.content);
else show();
