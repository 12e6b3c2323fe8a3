"""Pictures that show why something is marked: the place, and the good patch from training that looks most like it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kizu.data import image as images

if TYPE_CHECKING:
    from kizu.inference.prediction import Evidence, Prediction

__all__ = ["MAX_REGIONS", "crop", "places", "side_by_side"]

MAX_REGIONS = 3  # of a photograph that are explained, the most anomalous first
CROP = 0.3  # of the network's input, shown around a place
TILE = 200  # pixels
GAP = 6

RGB = npt.NDArray[np.uint8]  # (H, W, 3)


def places(prediction: "Prediction") -> list[tuple[int, tuple[int, int]]]:
    """Number and place (x, y) of each marked region; where nothing is marked, number 0 and the map's highest place."""
    if prediction.regions:
        return [(number, region.place) for number, region in enumerate(prediction.regions, 1)]
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
    square[images.outline(frame)] = (255, 64, 96)
    return square


def side_by_side(evidence: "Sequence[Evidence]") -> RGB:
    """A row for each region: the marked place on the left, the nearest good patch on the right, or grey."""
    grey = np.full((TILE, TILE, 3), 128, np.uint8)
    column_gap, row_gap = (np.full(shape, 255, np.uint8) for shape in ((TILE, GAP, 3), (GAP, 2 * TILE + GAP, 3)))
    rows = []
    for item in evidence:
        query, match = (
            grey if picture is None else images.resize(picture, (TILE, TILE))
            for picture in (item.query_crop, item.match_crop)
        )
        rows += [np.concatenate([query, column_gap, match], axis=1), row_gap]
    return np.concatenate(rows[:-1])
