"""Pictures that show why something is marked: the place, and the good patch from training that looks most like it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from kizu.data import image
from kizu.inference.prediction import NearestPatch

if TYPE_CHECKING:
    from kizu.inference.prediction import Evidence, Prediction

__all__ = ["MAX_REGIONS", "BankOutputs", "crop", "nearest_patch", "places", "side_by_side"]

MAX_REGIONS = 3  # of a photograph that are explained, the most anomalous first
CROP = 0.3  # of the network's input, shown around a place
TILE = 200  # pixels
GAP = 6
LINE = 16  # pixels, of a caption

RGB = npt.NDArray[np.uint8]  # (H, W, 3)


@dataclass(frozen=True)
class BankOutputs:
    """What a graph puts out about a memory bank, and the tables that lie beside it, by name."""

    entries: str  # (B, h, w) the bank's entry nearest to each patch,
    distances: str  # (B, h, w) and its distance, in units of what is typical of good parts there
    images: str  # (K,) the training image that each entry is from,
    places: str  # (K,) and its place there: row · columns + column of the grid of patches, or past it, in a copy

    @classmethod
    def of(cls, number: int) -> "BankOutputs":
        """The names for one of a graph's banks."""
        return cls(f"entry {number}", f"distance {number}", f"images {number}", f"places {number}")

    @classmethod
    def among(cls, outputs: Iterable[str]) -> "list[BankOutputs]":
        """The names for each bank of a graph with these outputs; none for a method without memory banks."""
        known = set(outputs)
        return list(takewhile(lambda bank: bank.entries in known, map(cls.of, count())))


def nearest_patch(
    outputs: Mapping[str, npt.NDArray[Any]],
    tables: Mapping[str, npt.NDArray[Any]],
    place: tuple[float, float],
    names: Sequence[str],
) -> NearestPatch | None:
    """The good patch nearest to a place of an image, in the bank to which that place is the most anomalous.

    `outputs` are the graph's of this image (B = 1), `tables` those of its banks, both named as `BankOutputs` says;
    `place` is x, y as shares of width and height; `names` are the training images'. None for a graph without memory
    banks, and for banks that another program made, which do not say what images they learned from.
    """
    candidates = []
    for bank in BankOutputs.among(outputs):
        height, width = outputs[bank.entries].shape[1:]
        patch = 0, int(place[1] * height), int(place[0] * width)
        entry = outputs[bank.entries][patch]
        row, column = divmod(int(tables[bank.places][entry]), width)
        match = None if row >= height else ((column + 0.5) / width, (row + 0.5) / height)
        candidates.append((float(outputs[bank.distances][patch]), int(tables[bank.images][entry]), match))
    if not candidates:
        return None
    distance, number, match = max(candidates, key=lambda candidate: candidate[0])
    return None if number < 0 else NearestPatch(names[number], number, match, distance)


def places(prediction: "Prediction") -> list[tuple[int, tuple[int, int]]]:
    """Number and place (x, y) of each marked region; where nothing is marked, number 0 and the map's highest place."""
    if prediction.regions:
        return [(number, region.place) for number, region in enumerate(prediction.regions, 1)]
    if prediction.detector.preprocessing.tiling is not None:  # its whole map would be large
        grid = prediction.detector.preprocessing.tiling.grid(prediction.shape)
        row, column = divmod(int(prediction.input_map.argmax()), prediction.input_map.shape[1])
        y, x = (
            min(int((cell + 0.5) * size), side - 1)
            for cell, size, side in zip((row, column), grid.cell, grid.shape, strict=True)
        )
        return [(0, (x, y))]
    y, x = divmod(int(prediction.anomaly_map.argmax()), prediction.shape[1])
    return [(0, (x, y))]


def crop(picture: RGB, x: float, y: float) -> RGB:
    """A square cut out around a place, moved inside where it would stick out; a frame marks the place."""
    height, width = picture.shape[:2]
    side = max(8, round(CROP * min(height, width)))
    left, top = (int(np.clip(round(at - side / 2), 0, length - side)) for at, length in ((x, width), (y, height)))
    square = picture[top : top + side, left : left + side].copy()
    mark = max(3, side // 6)
    column, row = (int(np.clip(round(at - mark / 2), 0, side - mark)) for at in (x - left, y - top))
    frame = np.zeros((side, side), bool)
    frame[row : row + mark, column : column + mark] = True
    square[image.outline(frame)] = (255, 64, 96)
    return square


def side_by_side(evidence: "Sequence[Evidence]") -> RGB:
    """A row for each region: the marked place on the left, the nearest good patch on the right, or grey; and words."""
    grey = np.full((TILE, TILE, 3), 128, np.uint8)
    column_gap, row_gap = (np.full(shape, 255, np.uint8) for shape in ((TILE, GAP, 3), (GAP, 2 * TILE + GAP, 3)))
    rows = []
    for item in evidence:
        query, match = (
            grey if picture is None else image.resize(picture, (TILE, TILE))
            for picture in (item.query_crop, item.match_crop)
        )
        what = f"region {item.region}" if item.region else "most unusual place"
        far = f"{item.nearest.distance:.1f} times the usual distance"
        name = Path(item.nearest.image).name
        caption = _caption([(what,), (far, name if item.nearest.place else f"a varied copy of {name}")])
        rows += [np.concatenate([query, column_gap, match], axis=1), caption, row_gap]
    return np.concatenate(rows[:-1])


def _caption(columns: Sequence[Sequence[str]]) -> RGB:
    """Lines under each of two pictures; what is too long is cut from the left, since files' names differ at the end."""
    strip = Image.new("RGB", (2 * TILE + GAP, LINE * max(map(len, columns))), "white")
    font, draw = ImageFont.load_default(0.75 * LINE), ImageDraw.Draw(strip)
    for column, lines in enumerate(columns):
        for row, text in enumerate(lines):
            shown = printable = "".join(letter if letter.isprintable() else "?" for letter in text)
            while draw.textlength(shown, font) > TILE:
                printable = printable[1:]
                shown = f"…{printable}"
            draw.text((column * (TILE + GAP), (row + 0.5) * LINE), shown, "black", font, anchor="lm")
    return np.asarray(strip)
