"""Made-up defects: photographs of good parts, changed at one place as if the part were flawed there.

Real defects are scratches, dents, stains, missing, foreign and misplaced pieces, of any size and strength. What is
drawn here is meant to be like them in how it stands out, not in how it looks: small and large, faint and strong, soft
and sharp, on the part rather than beside it; and parts that lie wrongly, or have something of another part.
Cut-and-paste defects: Li et al., CutPaste, CVPR 2021; foreign textures: Zavrtanik et al., DRAEM, ICCV 2021.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

from kizu.data import image
from kizu.data.streams import Texture

__all__ = ["KINDS", "MadeUp", "Poses", "part_of", "with_defect"]

RADII = 0.01, 0.25  # of a defect, as shares of the photograph's shorter side; small ones as often as large ones
STRENGTHS = 0.25, 1.0  # how much of the defect covers the part
VISIBLE = 8.0  # grey levels by which a defect must differ from the part, on average, so that a person sees it,
ROUGHER = 1.5  # and how many times as much as the part differs there from itself, smoothed
TRIES = 30  # until one is visible; the last is taken anyway
WHOLE_TRIES = 8  # until a piece is visibly another; otherwise another kind is drawn
BORDER = 0.03  # of the shorter side: the margin that shows what lies behind a part
WHOLE = 0.4  # share of the defects that concern the part as a whole
LARGE = 0.12, 0.4  # radii of a piece that is exchanged for that of another part or place
PIECES = 24  # of which that is taken whose seam shows least
TURN, SHIFT = 12.0, 0.08  # degrees, and share of the sides, by which a misplaced part lies wrongly at least
STRANGER = 1.25  # times as far from all good photographs as any of these from the others: a part that lies wrongly
TURNED, ANGLES = 16, (40.0, 140.0, 250.0)  # photographs, turned by so many degrees, that say whether any pose is usual
POSE_SIDE = 32  # pixels of the pictures that poses are compared by
PARTS = 0.03, 0.85  # a part covers no less and no more of its photograph; otherwise the whole photograph is the part

MISPLACED, EXCHANGED, DISPLACED = WHOLE_KINDS = "misplaced part", "exchanged piece", "displaced piece"
Rgb = npt.NDArray[np.uint8]
Values = npt.NDArray[np.float32]


@dataclass(frozen=True)
class MadeUp:
    """A photograph (H, W, 3) with a made-up defect, what kind it is, and where (H, W)."""

    kind: str
    pixels: Rgb
    mask: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class _Scene:
    """What a kind of defect is painted from: a square of the photograph and what else there is."""

    square: Values  # (S, S, 3), where the defect will be
    alpha: Values  # (S, S), how much of the defect covers the part, before its strength
    photo: Rgb  # (H, W, 3)
    other: Rgb  # (H', W', 3), another photograph of a good part
    places: npt.NDArray[np.int64]  # (N, 2), rows and columns on the part
    rng: np.random.Generator


def part_of(photo: Rgb) -> npt.NDArray[np.bool_]:
    """(H, W, 3) → (H, W): where the part is, as far as it differs from what the photograph's margin shows."""
    values = photo.astype(np.float32)
    width = max(2, round(BORDER * min(photo.shape[:2])))
    margin = np.concatenate(
        [side.reshape(-1, 3) for side in (values[:width], values[-width:], values[:, :width], values[:, -width:])]
    )
    background = np.median(margin, axis=0)
    differs = _largest(np.abs(values - background))
    level = max(VISIBLE, float(np.quantile(np.abs(margin - background).max(1), 0.9)))
    part: npt.NDArray[np.bool_] = differs > level
    return part if PARTS[0] <= part.mean() <= PARTS[1] else np.ones_like(part)


class Poses:
    """How good parts lie: small grey pictures of them."""

    def __init__(self, photos: Sequence[Rgb]) -> None:
        self.pictures = np.stack([_small(photo) for photo in photos])  # (N, pixels)
        norms = np.square(self.pictures, dtype=np.float64).sum(1)
        squares = norms[:, None] + norms - 2 * (self.pictures @ self.pictures.T)
        np.fill_diagonal(squares, np.inf)
        self.usual = math.sqrt(max(0.0, float(squares.min(1).max())) / self.pictures.shape[1])
        turned = [_posed(photo, angle, (0, 0), "edge") for photo in photos[:TURNED] for angle in ANGLES]
        self.any_is_usual = sum(map(self.is_strange, turned)) < len(turned) / 2

    def is_strange(self, photo: Rgb) -> bool:
        """Whether no good part lies like this one."""
        distance = np.sqrt(np.square(self.pictures - _small(photo)).mean(1).min())
        return bool(distance > max(STRANGER * self.usual, VISIBLE))


def with_defect(photo: Rgb, other: Rgb, poses: Poses, seed: Sequence[int]) -> MadeUp:
    """A good part's photograph with one defect; `other` is of another good part. Equal seeds give equal defects.

    Where parts lie in any pose, or are all alike, none is misplaced or has a piece of another one.
    """
    made = _drawn(photo, other, poses, np.random.default_rng(seed))
    if (photo == photo[..., :1]).all():  # of a camera without colours
        made = replace(made, pixels=np.repeat(made.pixels.mean(2, keepdims=True).astype(np.uint8), 3, axis=2))
    return made


def _drawn(photo: Rgb, other: Rgb, poses: Poses, rng: np.random.Generator) -> MadeUp:
    places = np.argwhere(part_of(photo))
    if rng.random() < WHOLE and (made := _whole(photo, other, places, poses, rng)):
        return made
    return _painted(photo, other, places, list(KINDS)[rng.integers(len(KINDS))], rng)


def _whole(
    photo: Rgb, other: Rgb, places: npt.NDArray[np.int64], poses: Poses, rng: np.random.Generator
) -> MadeUp | None:
    """A defect of the part as a whole; None where the one that is drawn would be none."""
    kind = WHOLE_KINDS[rng.integers(len(WHOLE_KINDS))]
    if kind == MISPLACED:
        if poses.any_is_usual:
            return None
        made, bare = _misplaced(photo, rng)
        return made if poses.is_strange(bare) else None
    for _ in range(WHOLE_TRIES):
        made = _large_piece(kind, photo, other, places, rng)
        if _is_visible(photo, made.pixels, made.mask):
            return made
    return None


def _is_visible(before: Rgb, after: Rgb, mask: npt.NDArray[np.bool_]) -> bool:
    """Whether a person sees what changed inside the mask."""
    if not mask.any():
        return False
    values = before.astype(np.float32)
    changed = _largest(np.abs(after - values))[mask].mean()
    rough = _largest(np.abs(values - _smooth(values, 4)))[mask].mean()
    return bool(changed >= max(VISIBLE, ROUGHER * rough))


def _painted(photo: Rgb, other: Rgb, places: npt.NDArray[np.int64], kind: str, rng: np.random.Generator) -> MadeUp:
    """A defect of this kind on the part, the first of some tries that a person sees, or the last."""
    for _ in range(TRIES):
        radius = min(photo.shape[:2]) * math.exp(rng.uniform(math.log(RADII[0]), math.log(RADII[1])))
        row, column = places[rng.integers(len(places))]
        half = math.ceil((3.0 if kind == "scratch" else 1.6) * radius) + 2
        alpha = _line(half, radius, rng) if kind == "scratch" else _blob(half, radius, rng)
        square = _square(photo, row, column, half)
        scene = _Scene(square, alpha, photo, other, places, rng)
        cover = (alpha * rng.uniform(*STRENGTHS))[..., None]
        painted = np.clip((square + cover * (KINDS[kind](scene) - square)).round(), 0, 255).astype(np.uint8)
        window, inner = _overlap(photo, row, column, half)
        if _is_visible(photo[window], painted[inner], alpha[inner] > 0.5):
            break
    return _pasted(kind, photo, painted, alpha, row, column)


def _overlap(photo: Rgb, row: int, column: int, half: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Where a square around a place lies in the photograph, and which part of the square that is."""
    window, inner = [], []
    for at, length in zip((row, column), photo.shape, strict=False):
        first, last = max(0, at - half), min(length, at + half + 1)
        window.append(slice(first, last))
        inner.append(slice(first - at + half, last - at + half))
    return (window[0], window[1]), (inner[0], inner[1])


def _pasted(kind: str, photo: Rgb, square: Rgb, alpha: Values, row: int, column: int) -> MadeUp:
    """The photograph with a square around a place, which differs from it where alpha is not 0."""
    window, inner = _overlap(photo, row, column, len(square) // 2)
    pixels, mask = photo.copy(), np.zeros(photo.shape[:2], np.bool_)
    pixels[window], mask[window] = square[inner], alpha[inner] > 0.5
    return MadeUp(kind, pixels, mask)


def _square(photo: Rgb, row: int, column: int, half: int) -> Values:
    """(2 · half + 1, the same, 3) around a place; outside, the photograph's margin goes on."""
    rows, columns = (np.arange(-half, half + 1) + at for at in (row, column))
    rows, columns = np.clip(rows, 0, photo.shape[0] - 1), np.clip(columns, 0, photo.shape[1] - 1)
    return photo[rows[:, None], columns].astype(np.float32)


def _misplaced(photo: Rgb, rng: np.random.Generator) -> tuple[MadeUp, Rgb]:
    """The whole part turned or shifted, with the photograph mirrored beyond its margin; and with the margin continued.

    What is mirrored may show the part again, which would be strange in whatever pose it lies: the second says that.
    """
    height, width = photo.shape[:2]
    turn, right, down = 0.0, 0.0, 0.0
    if rng.random() < 0.5:
        turn = float(rng.choice([-1, 1]) * rng.uniform(TURN, 180))
    else:
        angle, far = rng.uniform(0, 2 * math.pi), rng.uniform(SHIFT, 3 * SHIFT)
        right, down = width * far * math.cos(angle), height * far * math.sin(angle)
    pixels, bare = (_posed(photo, turn, (round(right), round(down)), mode) for mode in ("symmetric", "edge"))
    return MadeUp(MISPLACED, pixels, _largest(np.abs(pixels.astype(np.float32) - photo)) > VISIBLE), bare


def _posed(photo: Rgb, turn: float, shift: tuple[int, int], beyond: Any) -> Rgb:
    """Turned and shifted; what lies beyond the margin is as NumPy's pad says."""
    around = math.ceil(0.5 * max(photo.shape[:2]))
    padded = Image.fromarray(np.pad(photo, ((around, around), (around, around), (0, 0)), mode=beyond))
    shifted = padded.rotate(turn, Image.Resampling.BILINEAR, translate=shift)
    return np.ascontiguousarray(np.asarray(shifted)[around:-around, around:-around])


def _large_piece(kind: str, photo: Rgb, other: Rgb, places: npt.NDArray[np.int64], rng: np.random.Generator) -> MadeUp:
    """A piece of another good part at its place, or of the same part where it does not belong.

    All of it is known, only not there, or not together. Of some pieces the one whose seam shows least is taken.
    """
    source = image.resize(other, photo.shape[:2]) if kind == EXCHANGED else photo
    radius = min(photo.shape[:2]) * rng.uniform(*LARGE)
    half = math.ceil(1.6 * radius) + 2
    alpha = _blob(half, radius, rng)
    inside, seam = alpha > 0.5, (alpha > 0.05) & (alpha < 0.95)
    best, least = MadeUp(kind, photo, np.zeros(photo.shape[:2], np.bool_)), math.inf
    if not (inside.any() and seam.any()):  # of a photograph of a few pixels
        return best
    for row, column in places[rng.integers(len(places), size=PIECES)]:
        origin = (row, column) if kind == EXCHANGED else rng.integers(photo.shape[:2])
        here, there = _square(photo, row, column, half), _square(source, origin[0], origin[1], half)
        difference = _largest(np.abs(there - here))
        shown = difference[seam].mean() / max(VISIBLE, difference[inside].mean())
        if shown < least:
            piece = (here + alpha[..., None] * (there - here)).round().astype(np.uint8)
            best, least = _pasted(kind, photo, piece, alpha, row, column), shown
    return best


def _largest(values: Values) -> Values:
    """(H, W, 3) → (H, W): of the three colours."""
    return np.asarray(np.maximum(np.maximum(values[..., 0], values[..., 1]), values[..., 2]))


def _small(photo: Rgb) -> Values:
    picture = Image.fromarray(photo).convert("L").resize((POSE_SIDE, POSE_SIDE), Image.Resampling.BOX)
    return np.asarray(picture, np.float32).ravel()


# --------------------------------------------------------------------------------------------------------------- shapes


def _blob(half: int, radius: float, rng: np.random.Generator) -> Values:
    """(S, S), 1 inside an irregular, more or less long shape and 0 outside, with an edge from sharp to soft."""
    y, x = np.mgrid[-half : half + 1, -half : half + 1] / radius
    turn, aspect = rng.uniform(0, math.pi), math.exp(rng.uniform(math.log(0.3), 0))
    u, v = x * math.cos(turn) + y * math.sin(turn), (y * math.cos(turn) - x * math.sin(turn)) / aspect
    angle = np.arctan2(v, u)
    edge = 1 + sum(rng.normal(0, 0.25 / k) * np.cos(k * angle + rng.uniform(0, 2 * math.pi)) for k in range(2, 6))
    softness = max(rng.uniform(0.05, 0.5), 1 / radius)
    return np.asarray(np.clip((0.9 * np.clip(edge, 0.4, 1.6) - np.hypot(u, v)) / softness + 0.5, 0, 1), np.float32)


def _line(half: int, radius: float, rng: np.random.Generator) -> Values:
    """(S, S), 1 on a bent line through the middle and 0 elsewhere."""
    turn, bend = rng.uniform(0, 2 * math.pi), rng.normal(0, 0.5)
    along = np.linspace(-1, 1, 40) * 2.4 * radius
    across = bend * radius * (1 - (along / (2.4 * radius)) ** 2) + np.cumsum(rng.normal(0, 0.01 * radius, 40))
    x = half + along * math.cos(turn) - across * math.sin(turn)
    y = half + along * math.sin(turn) + across * math.cos(turn)
    canvas = Image.new("L", (2 * half + 1, 2 * half + 1))
    width = max(1, round(radius * rng.uniform(0.08, 0.3)))
    ImageDraw.Draw(canvas).line(list(zip(x.tolist(), y.tolist(), strict=True)), fill=255, width=width)
    drawn = np.asarray(canvas.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.8))), np.float32)
    return np.asarray(drawn / 255, np.float32)


# ---------------------------------------------------------------------------------------------------------------- kinds


def _colour(scene: _Scene) -> Values:
    """One that differs from the part's there: darker or lighter, and often tinted."""
    mean = scene.square.mean((0, 1))
    towards = scene.rng.choice([0.0, 255.0]) if scene.rng.random() < 0.7 else scene.rng.uniform(0, 255, 3)
    tint = scene.rng.normal(0, 20, 3) if np.ptp(mean) > VISIBLE else 0.0
    return np.asarray(mean + scene.rng.uniform(0.3, 1) * (towards - mean) + tint, np.float32)


def _scratch(scene: _Scene) -> Values:
    return np.broadcast_to(_colour(scene), scene.square.shape).astype(np.float32)


def _stain(scene: _Scene) -> Values:
    """The part's own structure, tinted."""
    return np.asarray(scene.square + 0.6 * (_colour(scene) - scene.square.mean((0, 1))), np.float32)


def _dent(scene: _Scene) -> Values:
    """Light on one side and shadow on the other."""
    half = scene.square.shape[0] // 2
    y, x = np.mgrid[-half : half + 1, -half : half + 1] / half
    turn = scene.rng.uniform(0, 2 * math.pi)
    slope = x * math.cos(turn) + y * math.sin(turn)
    return np.asarray(scene.square + scene.rng.uniform(60, 160) * slope[..., None], np.float32)


def _moved(scene: _Scene) -> Values:
    """Another place of the same part, turned."""
    return _piece(scene, scene.photo)


def _exchanged(scene: _Scene) -> Values:
    """A place of another good part."""
    return _piece(scene, scene.other)


def _foreign(scene: _Scene) -> Values:
    """A texture of something else."""
    texture, _ = Texture(int(scene.rng.integers(2**31))).read()
    side = scene.square.shape[0]
    picture = Image.fromarray(texture).resize((max(side, 64),) * 2, Image.Resampling.BILINEAR)
    return np.asarray(picture, np.float32)[:side, :side]


def _blurred(scene: _Scene) -> Values:
    """Out of focus, or worn."""
    return _smooth(scene.square, scene.square.shape[0] * scene.rng.uniform(0.08, 0.2))


def _faded(scene: _Scene) -> Values:
    """With less contrast or more, and lighter or darker."""
    mean = scene.square.mean((0, 1))
    contrast = scene.rng.choice([0.2, 0.4, 1.8, 2.5])
    return np.asarray(mean + contrast * (scene.square - mean) + scene.rng.normal(0, 30), np.float32)


def _missing(scene: _Scene) -> Values:
    """Painted over with what lies around it."""
    outside = scene.square[scene.alpha < 0.1]
    grain = scene.rng.normal(0, 2, scene.square.shape)
    return np.asarray(np.median(outside if len(outside) else scene.square.reshape(-1, 3), axis=0) + grain, np.float32)


def _turned(scene: _Scene) -> Values:
    """The same piece, turned in its place or mirrored."""
    turns = int(scene.rng.integers(1, 4))
    turned = np.rot90(scene.square, turns)
    return turned[:, ::-1] if scene.rng.random() < 0.3 else turned


def _piece(scene: _Scene, source: Rgb) -> Values:
    """A square as large as the scene's, of the source, around a place on the part, turned by quarters or mirrored."""
    side = scene.square.shape[0]
    row, column = scene.places[scene.rng.integers(len(scene.places))]
    piece = np.rot90(_square(source, row, column, side // 2), int(scene.rng.integers(4)))
    return np.asarray(piece[:, ::-1] if scene.rng.random() < 0.5 else piece, np.float32)


def _smooth(square: Values, radius: float) -> Values:
    picture = Image.fromarray(np.clip(square, 0, 255).astype(np.uint8))
    return np.asarray(picture.filter(ImageFilter.GaussianBlur(radius)), np.float32)


KINDS: dict[str, Callable[[_Scene], Values]] = {
    "scratch": _scratch,
    "stain": _stain,
    "dent": _dent,
    "moved piece": _moved,
    "piece of another part": _exchanged,
    "foreign texture": _foreign,
    "blur": _blurred,
    "faded": _faded,
    "missing piece": _missing,
    "turned piece": _turned,
}
