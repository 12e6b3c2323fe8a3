"""Zones of the frame: what annotation files, masks and typed corners outline, and which pixels that is."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from kizu.data.geometry.outlines import outlines
from kizu.data.image import RGB
from kizu.data.image import SUFFIXES as PICTURES
from kizu.data.layouts.annotations import SUFFIXES, UNNAMED, read_annotations
from kizu.data.masks import Polygon, Shape, read_mask
from kizu.errors import DataError, OptionError

__all__ = ["Outlined", "Ring", "ZoneMap", "covered", "drawn_in", "is_file"]

IN_NONE = -1
BLANK = np.array([124, 116, 104], np.uint8)  # the mean colour of the pictures that networks learned from: nothing
REST = ""  # the name of what is inspected and in no zone
FINER = 4  # times the frame's pixels, in which a zone is drawn before it is said which pixels it has
SAME_SHAPE = 0.02  # of the proportions
MASK_SIDE = 1024  # pixels that a mask is outlined in, at most

Size = tuple[int, int]
Ring = tuple[tuple[float, float], ...]  # corners (x, y) in shares of width and height; clockwise, holes the other way
_CORNER = re.compile(r"(-?(?:\d+\.?\d*|\.\d+))(%?)\s*,\s*(-?(?:\d+\.?\d*|\.\d+))(%?)(?:\s+|;\s*|$)")


class Outlined(Protocol):
    """What a zone is here."""

    @property
    def name(self) -> str: ...
    @property
    def rings(self) -> tuple[Ring, ...]: ...
    @property
    def ignored(self) -> bool: ...


@dataclass(frozen=True, eq=False)
class ZoneMap:
    """Which pixels of the network's input are in which zone; those in none are blank for the network."""

    frame: tuple[int, int]  # height and width of the photograph that the zones were outlined on
    names: Sequence[str]
    numbers: npt.NDArray[np.int64]  # (h, w) whose name each pixel has, `IN_NONE` where it has none
    missed: Sequence[str] = ()  # ignored zones that lie outside

    @classmethod
    def of(
        cls, zones: Sequence[Outlined], frame: tuple[int, int], scaled: tuple[int, int], top: int, left: int, size: Size
    ) -> Self:
        """Of what lies `size` from `top` and `left` in photographs like `frame` that are `scaled`; (height, width) all.

        Where zones lie over each other, the last one counts, and what is ignored before all. Without a zone that is
        inspected, all the rest is one, without a name.
        """
        inspected = [zone for zone in zones if not zone.ignored]
        numbers = np.full(scaled, IN_NONE if inspected else 0, np.int64)
        for number, zone in enumerate(inspected):
            numbers[covered(zone.rings, scaled)] = number
        seen = slice(top, top + size[0]), slice(left, left + size[1])
        missed = []
        for zone in zones:
            if zone.ignored:
                inside = covered(zone.rings, scaled)
                numbers[inside] = IN_NONE
                missed += [] if inside[seen].any() else [zone.name]
        names = [zone.name for zone in inspected] or [REST]
        return cls(frame, names, numbers[seen], missed)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ZoneMap):
            return NotImplemented
        return (self.frame, self.names) == (other.frame, other.names) and np.array_equal(self.numbers, other.numbers)

    def __hash__(self) -> int:
        return hash(self.numbers.tobytes())

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a photograph (height, width, …) has the proportions of the frame, nearly."""
        return abs(shape[0] * self.frame[1] / (shape[1] * self.frame[0]) - 1) < SAME_SHAPE

    def check(self) -> None:
        """Raise `OptionError` where nothing is inspected, or a zone has no pixel."""
        if self.missed:
            raise OptionError(
                f"`zones`: {self.missed[0]} has no pixel. It lies outside of what is looked at: was it of other "
                "photographs?"
            )
        if not (self.numbers >= 0).any():
            raise OptionError("`zones` leave nothing to inspect: ignore less, or inspect more")
        for number, name in enumerate(self.names):
            if not (self.numbers == number).any():
                raise OptionError(
                    f"`zones`: {name} has no pixel. It lies outside of what is looked at, or others lie over it"
                )

    def blanked(self, pixels: RGB) -> RGB:
        """An input (h, w, 3) without what is in no zone: whatever is there, no model can tell."""
        return np.where(self.numbers[:, :, None] < 0, BLANK, pixels)

    def name_at(self, x: float, y: float) -> str:
        """The name of the zone of a place of the input; empty where it is in none, or in one without a name."""
        number = int(self.numbers[int(y), int(x)])
        return self.names[number] if number >= 0 else ""


def covered(rings: Sequence[Ring], size: Size) -> npt.NDArray[np.bool_]:
    """(height, width): the pixels of which half or more lie in clockwise rings and not in holes."""
    height, width = size
    layers = np.zeros((FINER * height, FINER * width), np.int16)
    inner, outer = ([ring for ring in rings if (_area(ring) > 0) is kind] for kind in (False, True))
    for together in [[ring] for ring in rings] if inner else [outer]:
        canvas = Image.new("L", (FINER * width, FINER * height))
        for ring in together:
            corners = [(FINER * width * x - 0.5, FINER * height * y - 0.5) for x, y in ring]
            ImageDraw.Draw(canvas).polygon(corners, fill=1)
        layers += np.asarray(canvas, np.int16) * (1 if _area(together[0]) > 0 else -1)
    inside = (layers > 0).reshape(height, FINER, width, FINER)
    return np.asarray(inside.mean((1, 3)) >= 0.5)


def _area(ring: Ring) -> float:
    x, y = np.asarray(ring, float).T
    return float(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2


def drawn_in(source: str, photograph: Callable[[], tuple[int, int]]) -> list[tuple[str, tuple[Ring, ...]]]:
    """What is outlined in a mask, in a file of annotations or in words; each with its label, which may be empty.

    Words are "all", or corners as in "40,40 200,40 200,120", in pixels of a photograph of `photograph()` (width,
    height), or in percent with a % behind each number. Raises `OptionError` for words and `DataError` for files that
    cannot be understood.
    """
    if source.strip() == "all":
        return [("", (((0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.0, 1.0)),))]
    path = Path(source)
    if path.suffix.lower() in SUFFIXES:
        return _annotated(path, photograph)
    if path.suffix.lower() in PICTURES or is_file(source):
        return [("", _outlined(read_mask(path), path))]
    return [("", (_typed(source, photograph),))]


def _typed(text: str, photograph: Callable[[], tuple[int, int]]) -> Ring:
    corners, at = [], 0
    while (corner := _CORNER.match(text.strip(), at)) is not None:
        corners.append(corner)
        at = corner.end()
    signs = {corner[sign] for corner in corners for sign in (2, 4)}
    if at < len(text.strip()) or len(corners) < 3 or len(signs) > 1:
        raise OptionError(
            f"{text[:60]!r} is no zone: name a mask (PNG), a file of annotations (JSON), or give three corners or "
            'more, in pixels as in "40,40 200,40 200,120", or all in percent'
        )
    size = (100, 100) if "%" in signs else photograph()
    return _clockwise([(float(corner[1]), float(corner[3])) for corner in corners], size)


def is_file(text: str) -> bool:
    """Whether a text names a file."""
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # it is too long for a name
        return False


def _annotated(path: Path, photograph: Callable[[], tuple[int, int]]) -> list[tuple[str, tuple[Ring, ...]]]:
    if not path.exists():
        raise DataError(f"{path} does not exist: check the spelling")
    annotations = read_annotations(path)
    if annotations is None:
        raise DataError(f"{path} holds no annotations that kizu knows: export COCO, Label Studio, VIA or CVAT")
    marks = [(mark.label, mark.shape) for image in annotations.images for mark in image.marks if mark.shape is not None]
    if not marks:
        raise DataError(f"{path} outlines nothing: draw a polygon or a rectangle on one of its photographs")
    if len(drawn := [image.name for image in annotations.images if any(mark.shape for mark in image.marks)]) > 1:
        raise DataError(
            f"{path} has outlines on {len(drawn)} photographs ({drawn[0]}, {drawn[1]}, …): zones are drawn on one"
        )
    return [("" if label == UNNAMED else label, _rings(shape, path, photograph)) for label, shape in marks]


def _rings(shape: Shape, path: Path, photograph: Callable[[], tuple[int, int]]) -> tuple[Ring, ...]:
    if isinstance(shape, Polygon):
        if len(shape.points) < 3:
            raise DataError(f"{path} has an outline of {len(shape.points)} corners: a zone needs three or more")
        return (_clockwise(shape.points, shape.size or photograph()),)
    return _outlined(shape.drawn((shape.size[1], shape.size[0])), path)


def _clockwise(points: Sequence[tuple[float, float]], size: tuple[float, float]) -> Ring:
    ring = tuple((round(x / size[0], 6), round(y / size[1], 6)) for x, y in points)
    return ring if _area(ring) > 0 else ring[::-1]


def _outlined(mask: npt.NDArray[np.bool_], path: Path) -> tuple[Ring, ...]:
    if not mask.any():
        raise DataError(f"{path} outlines nothing: in a mask, what is not zero is the zone")
    height, width = mask.shape
    if (scale := MASK_SIDE / max(height, width)) < 1:
        smaller = max(1, round(width * scale)), max(1, round(height * scale))
        shares = Image.fromarray(mask.astype(np.uint8) * 255).resize(smaller, Image.Resampling.BOX)
        mask = np.asarray(shares) >= 128
        width, height = smaller
    if not mask.any():
        raise DataError(f"{path} outlines next to nothing: draw a larger zone")
    return tuple(tuple((round(x / width, 6), round(y / height, 6)) for x, y in ring) for ring in outlines(mask))
