"""Photographs of a turned flange, rendered from its geometry.

Lengths are fractions of the picture's width. The part lies in its own frame: x right, y down, z towards the
camera, the origin on its axis. Light falls on a height field whose slopes are known; walls of holes, shadows and
the felt underneath are exact or nearly so. Every picture is drawn at twice its size and has its own seed.
"""

import math
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

__all__ = ["DEFECTS", "Job", "Studio", "new_studio", "photograph"]

DEFECTS = ("scratch", "dent", "stain", "missing_hole")

Array = npt.NDArray[np.floating[Any]]
Bool = npt.NDArray[np.bool_]
RGB = npt.NDArray[np.uint8]  # (H, W, 3)
Point = tuple[float, float]
Job = tuple[str, str, int]  # split, "good" or the defect, index
Length = TypeVar("Length", float, Array)

_BORE, _HUB, _GROOVE, _REGISTER, _RIM = 0.086, 0.164, 0.207, 0.352, 0.408
_PITCH, _BOLT, _SINK = 0.283, 0.0265, 0.0365  # pitch circle, bolt hole, its countersink
_KEYWAY = (0.018, 0.110)  # half width, how far out
_HUB_HEIGHT, _THICKNESS, _CAMERA = 0.022, 0.12, 1.7
_BINS = 4  # entries of a radial table per drawn pixel


@dataclass(frozen=True)
class Studio:
    """What all pictures of one data set share."""

    seed: int
    size: int
    slope: Array  # of the turned profile, by radius
    felt: Array  # larger than a picture: every picture sees a part of it

    @property
    def fine(self) -> int:
        return 2 * self.size


@dataclass(frozen=True)
class _Scene:
    """How the part lies under camera and lights in one picture. Directions are in the part's frame."""

    shift: Point
    angle: float
    scale: float
    key: Point  # horizontal direction to the key light, times the tangent of its angle from the vertical
    fill: Point
    brightness: Point  # of key and fill light
    gains: Array  # red, green, blue

    def place(self, x: Length, y: Length) -> tuple[Length, Length]:
        """From the picture's to the part's frame."""
        x, y = x - self.shift[0], y - self.shift[1]
        c, s = math.cos(self.angle) / self.scale, math.sin(self.angle) / self.scale
        return x * c + y * s, y * c - x * s

    def look(self, point: Point) -> Point:
        """From the part's to the picture's frame."""
        c, s = math.cos(self.angle) * self.scale, math.sin(self.angle) * self.scale
        return point[0] * c - point[1] * s + self.shift[0], point[1] * c + point[0] * s + self.shift[1]


@dataclass
class _Surface:
    """The metal, one value per drawn pixel."""

    x: Array
    y: Array
    radius: Array
    slope_x: Array
    slope_y: Array
    grain_x: Array  # unit vector across the tool marks
    grain_y: Array
    cover: Array  # 1 metal, 0 hole or felt


def photograph(studio: Studio, job: Job, flawless: bool = False) -> tuple[RGB, Bool]:
    """RGB and defect mask. `flawless` leaves the defect out and changes nothing else."""
    split, kind, index = job
    number = 0 if split == "train" else 1 + ("good", *DEFECTS).index(kind)
    seeds = np.random.SeedSequence([studio.seed, number, index]).spawn(4)
    pose, marks, whim, noise = (np.random.default_rng(seed) for seed in seeds)
    defect = "" if flawless else kind
    scene, holes = _scene(pose), _holes()
    surface = _turn(studio, scene)
    region = np.zeros_like(surface.cover, dtype=bool)
    if defect == "missing_hole":
        missing = holes.pop(int(whim.integers(1, 7)))
        region = missing.distance(surface.x, surface.y) < missing.chamfer + 0.5 / studio.size
    for hole in holes:
        _drill(studio, scene, surface, hole)
    if defect == "scratch":
        region = _scratch(surface, whim, 1 / studio.size)
    elif defect == "dent":
        region = _dent(surface, whim)
    key, fill = _shade(studio, scene, surface, marks)
    ground = _ground(scene, surface)
    for hole in holes:
        _see_through(studio, scene, surface, hole, key, fill, ground)
    layers = [_shrink(layer) for layer in (key, fill, ground * (1 - surface.cover))]
    metal = _shrink(surface.cover)
    mask = (_shrink(region.astype(np.float32)) > 0.1) & (metal > 0.5)
    tint = np.ones((studio.size, studio.size, 3), np.float32)
    if defect == "stain":
        tint, mask = _stain(studio, scene, metal, whim)
    return _develop(studio, scene, layers, tint, noise), mask


def new_studio(seed: int, size: int) -> Studio:
    radius = np.arange(int(1.6 * size * _BINS), dtype=np.float32) / np.float32(2 * size * _BINS)

    def between(low: float, high: float) -> Array:
        return _step((radius - low) * size + 0.5) * _step((high - radius) * size + 0.5)

    slope = -0.9 * between(_RIM - 0.009, 1)
    slope -= 1.1 * between(_HUB - 0.006, _HUB + 0.004)
    slope -= 1.5 * between(_GROOVE, _GROOVE + 0.004)
    slope += 1.5 * between(_GROOVE + 0.008, _GROOVE + 0.012)
    slope -= 0.5 * between(_REGISTER, _REGISTER + 0.004)
    return Studio(seed, size, slope, _felt(np.random.default_rng([seed, 99]), size))


def _felt(rng: np.random.Generator, size: int) -> Array:
    """Charcoal felt: short fibres over a soft mottle, mean 1."""
    side = size + size // 2
    canvas = Image.new("L", (side, side), 118)
    draw = ImageDraw.Draw(canvas)
    count = side * side // 5
    starts, turns = rng.uniform(0, side, (count, 2)), rng.uniform(0, math.tau, count)
    lengths, greys = rng.gamma(2, size / 230, count), rng.normal(122, 30, count).clip(60, 250)
    for (x, y), turn, length, grey in zip(starts, turns, lengths, greys, strict=True):
        bend = turn + 0.6
        middle = (x + length * math.cos(turn), y + length * math.sin(turn))
        end = (middle[0] + length * math.cos(bend), middle[1] + length * math.sin(bend))
        draw.line([(x, y), middle, end], fill=int(grey))
    fibres = np.asarray(canvas.filter(ImageFilter.GaussianBlur(0.6)), np.float32)
    mottle = 0.05 * _mottle(rng, side, size / 18) + 0.05 * _mottle(rng, side, size / 5)
    return np.asarray(fibres / fibres.mean() * (1 + mottle))


def _scene(rng: np.random.Generator) -> _Scene:
    angle = math.radians(rng.uniform(-3, 3))
    warmth = rng.normal(0, 0.018)
    return _Scene(
        shift=(rng.uniform(-0.022, 0.022), rng.uniform(-0.022, 0.022)),
        angle=angle,
        scale=rng.uniform(0.99, 1.01),
        key=_direction(math.radians(228 + rng.uniform(-5, 5)) - angle, rng.uniform(0.78, 0.9)),
        fill=_direction(math.radians(338 + rng.uniform(-4, 4)) - angle, rng.uniform(1.1, 1.2)),
        brightness=(rng.uniform(0.93, 1.07), rng.uniform(0.85, 1.15)),
        gains=np.array([1 + warmth, 1, 1 - warmth], np.float32) * rng.uniform(0.95, 1.05),
    )


def _direction(angle: float, length: float) -> Point:
    return length * math.cos(angle), length * math.sin(angle)


def _turn(studio: Studio, scene: _Scene) -> _Surface:
    """The part as it leaves the lathe, before anything is drilled."""
    line = ((np.arange(studio.fine) + 0.5) / studio.fine - 0.5).astype(np.float32)
    x, y = scene.place(line[None, :], line[:, None])
    radius = np.sqrt(x * x + y * y) + np.float32(1e-6)
    slope = studio.slope[_bins(studio, radius)]
    grain_x, grain_y = x / radius, y / radius
    cover = _step((_RIM - radius) * studio.size + 0.5)
    return _Surface(x, y, radius, slope * grain_x, slope * grain_y, grain_x, grain_y, cover)


def _bins(studio: Studio, radius: Array) -> npt.NDArray[np.int32]:
    return (radius * (studio.fine * _BINS)).astype(np.int32)


@dataclass(frozen=True)
class _Hole:
    centre: Point
    radius: float
    chamfer: float
    keyway: bool = False

    def distance(self, x: Array, y: Array) -> Array:
        """To the edge, negative inside."""
        x, y = x - self.centre[0], y - self.centre[1]
        distance = np.sqrt(x * x + y * y) - self.radius
        if self.keyway:
            half, end = _KEYWAY
            slot = np.maximum(np.abs(x) - half, np.maximum(y, -y - end))
            distance = np.minimum(distance, slot)
        return distance

    def window(self, studio: Studio, scene: _Scene) -> tuple[slice, slice]:
        """The drawn pixels that it can touch."""
        reach = 1.05 * (max(self.radius, _KEYWAY[1] if self.keyway else 0) + self.chamfer) + 2 / studio.size
        x, y = scene.look(self.centre)
        left, top = (int((value + 0.5 - reach) * studio.fine) for value in (x, y))
        side = math.ceil(2 * reach * studio.fine)
        return slice(max(top, 0), top + side), slice(max(left, 0), left + side)


def _holes() -> list[_Hole]:
    bolts = [_direction(math.radians(60 * number), _PITCH) for number in range(6)]
    return [_Hole((0, 0), _BORE, 0.008, keyway=True), *(_Hole(centre, _BOLT, _SINK - _BOLT) for centre in bolts)]


def _drill(studio: Studio, scene: _Scene, surface: _Surface, hole: _Hole) -> None:
    """Cut a hole with its chamfer into the surface."""
    window = hole.window(studio, scene)
    x, y = surface.x[window], surface.y[window]
    distance = hole.distance(x, y)
    step = np.float32(0.5 / studio.size)
    out_x = (hole.distance(x + step, y) - hole.distance(x - step, y)) / (2 * step)
    out_y = (hole.distance(x, y + step) - hole.distance(x, y - step)) / (2 * step)
    chamfer = _step((hole.chamfer - distance) * studio.size * 0.6 + 0.5)
    for field, slope in ((surface.slope_x, out_x), (surface.slope_y, out_y)):
        field[window] += chamfer * (0.8 * slope - field[window])
    for field, across in ((surface.grain_x, out_x), (surface.grain_y, out_y)):
        field[window] += chamfer * (across - field[window])
    surface.cover[window] *= _step(distance * studio.size + 0.5)


def _shade(studio: Studio, scene: _Scene, surface: _Surface, rng: np.random.Generator) -> tuple[Array, Array]:
    """Light that the metal sends to the camera: from the key light, and from the fill light and the room."""
    bins = _bins(studio, surface.radius)
    across, along = _marks(studio, rng, 0.16), _marks(studio, rng, 0.22)
    lobe_x = across[0][bins] + across[1][bins] * surface.grain_x + across[2][bins] * surface.grain_y
    lobe_y = along[0][bins] + along[1][bins] * surface.grain_x + along[2][bins] * surface.grain_y
    uneven = 1 + 0.05 * _mottle(rng, studio.fine, studio.fine / 7) + 0.02 * _mottle(rng, studio.fine, studio.fine / 53)
    flat = 1 / (1 + surface.slope_x**2 + surface.slope_y**2)
    key = _lobe(scene.key, surface, lobe_x, lobe_y) * 2.3
    away = surface.slope_x * scene.key[0] + surface.slope_y * scene.key[1]
    key += 0.075 * np.maximum(1 - 1.6 * away, 0) * flat
    key *= _hub_shadow(scene, surface)
    fill = _lobe(scene.fill, surface, lobe_x, lobe_y) * 0.55
    fill += (0.07 - 0.05 * surface.slope_y + 0.06 * surface.y) * flat * (1 + 0.25 * lobe_x)
    uneven *= surface.cover
    return key * uneven * scene.brightness[0], fill * uneven * scene.brightness[1]


def _marks(studio: Studio, rng: np.random.Generator, strength: float) -> Array:
    """What the tool left: random by radius, and its slow change around the axis (1, cos, sin)."""
    bins = len(studio.slope)
    place = np.arange(bins) / _BINS
    rows = []
    for weight in (1.0, 0.5, 0.5):
        row = np.zeros(bins)
        for pitch, part in ((1.6, 0.6), (3.5, 0.5), (9.0, 0.4), (30.0, 0.3)):
            knots = rng.normal(size=int(bins / _BINS / pitch) + 2)
            row += part * np.interp(place / pitch, np.arange(len(knots)), knots)
        rows.append(weight * row)
    return (strength * np.array(rows)).astype(np.float32)


def _lobe(light: Point, surface: _Surface, lobe_x: Array, lobe_y: Array) -> Array:
    """Highlight of a brushed metal: wide across the tool marks, narrow along them (GGX over slopes)."""
    tilt = 1 + math.sqrt(1 + light[0] ** 2 + light[1] ** 2)
    x = surface.slope_x + light[0] / tilt - 0.22 * surface.x
    y = surface.slope_y + light[1] / tilt - 0.22 * surface.y
    across = (x * surface.grain_x + y * surface.grain_y) * np.float32(1 / 0.42) + lobe_x
    along = (y * surface.grain_x - x * surface.grain_y) * np.float32(1 / 0.115) + lobe_y
    spread = 1 + across * across + along * along
    return 1 / (spread * np.sqrt(spread))


def _hub_shadow(scene: _Scene, surface: _Surface) -> Array:
    x = surface.x + scene.key[0] * _HUB_HEIGHT
    y = surface.y + scene.key[1] * _HUB_HEIGHT
    shade = _step((_HUB - np.sqrt(x * x + y * y)) * 160 + 0.5) * _step((surface.radius - _HUB) * 300)
    return 1 - 0.75 * shade


def _below(scene: _Scene, x: Array, y: Array) -> tuple[Array, Array]:
    """Where the lines of sight through the part's top meet the felt."""
    camera_x, camera_y = scene.place(0.0, 0.1)
    depth = _THICKNESS / _CAMERA
    return x + depth * (x - camera_x), y + depth * (y - camera_y)


def _ground(scene: _Scene, surface: _Surface) -> Array:
    """Light on the felt around the part."""
    x, y = _below(scene, surface.x, surface.y)
    outside = np.sqrt(x * x + y * y) - _RIM
    x, y = x + scene.key[0] * _THICKNESS, y + scene.key[1] * _THICKNESS
    lit = _step((np.sqrt(x * x + y * y) - _RIM) * 16 + 0.5)
    near = 1 / (1 + np.maximum(outside, 0) * 26)
    return (0.22 + 0.78 * lit) * (1 - 0.7 * near * near)


def _see_through(
    studio: Studio, scene: _Scene, surface: _Surface, hole: _Hole, key: Array, fill: Array, ground: Array
) -> None:
    """Draw the wall of a hole and the felt at its end."""
    window = hole.window(studio, scene)
    x, y = surface.x[window], surface.y[window]
    floor_x, floor_y = _below(scene, x, y)
    top, bottom = hole.distance(x, y), hole.distance(floor_x, floor_y)
    inside = 1 - surface.cover[window]
    wall = inside * _step(bottom * studio.size + 0.5)
    depth = np.clip(-top / np.maximum(bottom - top, 1e-6), 0, 1)
    step = np.float32(0.5 / studio.size)
    length = math.hypot(*scene.key)
    facing = (hole.distance(x - step * scene.key[0], y - step * scene.key[1]) - top) / (step * length)
    facing = np.clip(facing, 0, 1)
    reach = 2 * hole.radius * facing - depth * _THICKNESS * length
    key[window] += wall * facing * _step(reach * 60 + 0.5) * 0.75
    fill[window] += wall * (0.02 + 0.16 * (1 - depth) ** 2)
    through = hole.distance(floor_x + scene.key[0] * _THICKNESS, floor_y + scene.key[1] * _THICKNESS)
    light = (0.08 + 0.8 * _step(0.5 - through * 40)) * _step(0.3 - bottom * 25)
    ground[window] = np.where(inside > 0, light * (1 - wall / np.maximum(inside, 1e-6)), ground[window])


def _scratch(surface: _Surface, rng: np.random.Generator, pixel: float) -> Bool:
    """A thin groove along a bow, with thrown-up edges."""
    length, width = rng.uniform(0.2, 0.45) * 2 * _RIM, rng.uniform(0.62, 0.95) * pixel
    while True:
        radius, angle, turn = rng.uniform(0.2, 0.38), rng.uniform(0, math.tau), rng.uniform(0, math.pi)
        bend, sway = rng.uniform(-0.5, 0.5), rng.normal(0, 0.002, 2)
        centre, (c, s) = _direction(angle, radius), _direction(turn, 1)
        along = np.linspace(-0.5, 0.5, 40) * length
        off = _bow(along, length, bend, sway)
        x, y = centre[0] + along * c - off * s, centre[1] + along * s + off * c
        reach = np.hypot(x, y)
        if reach.min() > _HUB + 0.012 and reach.max() < _RIM - 0.012 and _on_face(x, y).mean() > 0.8:
            break
    x, y = surface.x - centre[0], surface.y - centre[1]
    u, v = x * c + y * s, y * c - x * s
    off = v - _bow(u, length, bend, sway)
    place = u / length + 0.5
    fading = np.interp(np.linspace(0, 1, 200), np.linspace(0, 1, 9), rng.uniform(0.6, 1, 9))
    depth = fading[np.clip(place * 199, 0, 199).astype(np.int32)].astype(np.float32)
    depth *= _step(place * 7) * _step((1 - place) * 4) * rng.uniform(1, 2)
    across = off / width
    face = (surface.radius > _HUB + 0.006) & (surface.radius < _RIM - 0.009)
    face &= (surface.slope_x**2 + surface.slope_y**2) < 0.05
    touched: Bool = face & (np.abs(across) < 2) & (depth > 0.06)
    groove = np.where(touched, depth * across * (1.6 - 0.55 * across**2) * np.exp(-0.5 * across**2), 0)
    surface.slope_x -= groove * s
    surface.slope_y += groove * c
    fresh = np.where(touched, 0.5 * np.minimum(depth, 1) * np.exp(-(across**2)), 0)
    surface.grain_x += fresh * (-s - surface.grain_x)
    surface.grain_y += fresh * (c - surface.grain_y)
    return touched


def _bow(along: Array, length: float, bend: float, sway: Array) -> Array:
    place = along / length
    swing = sway[0] * np.sin(5 * place) + sway[1] * np.cos(9 * place)
    return np.asarray(bend * length * (place * place - 0.1) + swing, np.float32)


def _on_face(x: Length, y: Length, margin: float = 0.0) -> Bool:
    """Whether points lie on the flat of the flange, off every hole."""
    radius = np.hypot(x, y)
    free = (radius > _GROOVE + 0.012 + margin) & (radius < _RIM - 0.009 - margin)
    for hole in _holes()[1:]:
        free &= np.hypot(x - hole.centre[0], y - hole.centre[1]) > _SINK + margin
    return np.asarray(free)


def _dent(surface: _Surface, rng: np.random.Generator) -> Bool:
    """A smooth dimple."""
    size = rng.uniform(0.02, 0.042)
    while True:
        centre = _direction(rng.uniform(0, math.tau), rng.uniform(0.22, _RIM))
        if _on_face(*centre, size):
            break
    squeeze, (c, s) = rng.uniform(0.75, 1), _direction(rng.uniform(0, math.tau), 1)
    x, y = surface.x - centre[0], surface.y - centre[1]
    u, v = (x * c + y * s) / size, (y * c - x * s) / (size * squeeze)
    inside = np.maximum(1 - u * u - v * v, 0)
    slope = rng.uniform(0.55, 1.5) * inside
    surface.slope_x += slope * (u * c - v * s)
    surface.slope_y += slope * (u * s + v * c)
    return np.asarray(inside > 0.04)


def _stain(studio: Studio, scene: _Scene, metal: Array, rng: np.random.Generator) -> tuple[Array, Bool]:
    """A brown film of old oil: what it lets through, and where it lies."""
    radius = rng.uniform(0.036, 0.065)
    centre = scene.look(_direction(rng.uniform(0, math.tau), rng.uniform(0.23, 0.37)))
    line = ((np.arange(studio.size) + 0.5) / studio.size - 0.5).astype(np.float32)
    x, y = line[None, :] - centre[0], line[:, None] - centre[1]
    stretch, turn = rng.uniform(0.65, 1), rng.uniform(0, math.tau)
    u, v = x * math.cos(turn) + y * math.sin(turn), (y * math.cos(turn) - x * math.sin(turn)) / stretch
    pixels = studio.size / 320
    ragged = 0.32 * _mottle(rng, studio.size, 16 * pixels) + 0.12 * _mottle(rng, studio.size, 5 * pixels)
    inside = 1 - np.sqrt(u * u + v * v) / radius + ragged * _step((1.7 * radius - np.hypot(u, v)) / radius)
    film = _step(inside * 2) * _step(metal * 2 - 1)
    rim = film * (1 - _step(inside * 2.2 - 0.3))
    strength = rng.uniform(0.4, 0.85)
    thickness = strength * film * (0.75 + 0.2 * _mottle(rng, studio.size, 9 * pixels)) + 0.25 * strength * rim
    absorb = np.array([0.75, 1.0, 1.45], np.float32)
    return np.exp(-thickness[..., None] * absorb), film > 0.08


def _develop(studio: Studio, scene: _Scene, layers: list[Array], tint: Array, rng: np.random.Generator) -> RGB:
    """Colour, lens, sensor and tone curve."""
    key, fill, ground = layers
    size = studio.size
    left, top = rng.integers(0, len(studio.felt) - size, 2)
    felt = studio.felt[top : top + size, left : left + size] * ground * 0.045
    rgb = key[..., None] * np.array([1.0, 0.985, 0.955], np.float32)
    rgb += fill[..., None] * np.array([0.93, 1.0, 1.09], np.float32)
    rgb *= tint
    rgb += felt[..., None] * np.array([0.95, 1.0, 1.1], np.float32)
    line = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    rgb *= (1 - 0.42 * (line[:, None] ** 2 + line**2))[..., None] * scene.gains
    glow = Image.fromarray(rgb.mean(axis=2)).resize((size // 10, size // 10), Image.Resampling.BILINEAR)
    rgb += 0.03 * np.asarray(glow.resize((size, size), Image.Resampling.BICUBIC))[..., None]
    rgb += 0.002
    grain = rng.standard_normal(rgb.shape, np.float32)
    rgb += grain * np.sqrt(np.maximum(rgb, 0) * np.float32(1.2e-4) + np.float32(4e-7))
    bright = 1 - np.exp(-1.55 * np.maximum(rgb, 0))
    return np.asarray(255 * np.power(bright, np.float32(1 / 2.2)), dtype=np.uint8)


def _step(value: Array) -> Array:
    """0 below 0, 1 above 1, smooth between."""
    value = np.clip(value, 0, 1)
    return value * value * (3 - 2 * value)


def _shrink(layer: Array) -> Array:
    """To half the size, with a lens's softness."""
    side = len(layer) // 2
    return np.asarray(Image.fromarray(layer).resize((side, side), Image.Resampling.BILINEAR))


def _mottle(rng: np.random.Generator, side: int, scale: float) -> Array:
    """Smooth noise of standard deviation about 1 whose features are `scale` pixels wide."""
    cells = math.ceil(side / scale) + 3
    knots = rng.standard_normal((cells, cells), np.float32) * 1.5
    box = (1, 1, 1 + side / scale, 1 + side / scale)
    return np.asarray(Image.fromarray(knots).resize((side, side), Image.Resampling.BICUBIC, box=box))
