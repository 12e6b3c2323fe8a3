"""Why something is marked: the good patch from training that looks most like it, side by side."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kizu.data import image as images

if TYPE_CHECKING:
    from kizu.inference.inspector import Prediction

__all__ = ["Evidence", "Lookalike", "evidence", "side_by_side"]

VIEW = 0.3  # of the network's input, shown around a place
MOST = 3  # regions of a photograph that are explained, the most anomalous first
TILE = 200  # pixels
GAP = 6

RGB = npt.NDArray[np.uint8]  # (H, W, 3)


@dataclass(frozen=True)
class Lookalike:
    """The good patch that is nearest to a marked one."""

    image: str  # name of the training image
    number: int  # of the training image
    place: tuple[float, float]  # x, y of the patch's centre, shares of the width and height that the network sees
    distance: float  # in units of what is usual among good parts there


@dataclass(frozen=True)
class Evidence:
    """A marked place, what is nearest to it among all good ones, and both as pictures."""

    region: int  # number of the marked region, from 1; 0: the highest place of a photograph without marked regions
    nearest: Lookalike
    here: RGB  # what the network sees around the place
    there: RGB | None  # around the nearest good patch, where a picture of that image is at hand


def evidence(prediction: "Prediction", most: int = MOST) -> list[Evidence]:
    """For the first marked regions, or the highest place of the map where nothing is marked, the nearest good patches.

    Empty for methods that remember no patches.
    """
    detector, preprocessing = prediction.detector, prediction.detector.preprocessing
    places = [(number, region.place) for number, region in enumerate(prediction.regions[:most], 1)]
    if not places:
        row, column = divmod(int(prediction.anomaly_map.argmax()), prediction.shape[1])
        places = [(0, (column, row))]
    seen = preprocessing(prediction.item.read(preprocessing.enough)[0])
    found = []
    for number, place in places:
        x, y = preprocessing.locate(place, prediction.shape)
        nearest = detector.nearest_good(seen, (x, y))
        if nearest is None:
            return []
        good = detector.picture(nearest.number)
        height, width = preprocessing.size
        there = None if good is None else _around(good, nearest.place[0] * width, nearest.place[1] * height)
        found.append(Evidence(number, nearest, _around(seen, x, y), there))
    return found


def side_by_side(found: Sequence[Evidence]) -> RGB:
    """A row for each region: the marked place on the left, the nearest good one on the right, or grey."""
    grey = np.full((TILE, TILE, 3), 128, np.uint8)
    rows = []
    for one in found:
        pair = [grey if part is None else images.resize(part, (TILE, TILE)) for part in (one.here, one.there)]
        rows.append(np.concatenate([pair[0], np.full((TILE, GAP, 3), 255, np.uint8), pair[1]], axis=1))
        rows.append(np.full((GAP, 2 * TILE + GAP, 3), 255, np.uint8))
    return np.concatenate(rows[:-1])


def _around(picture: RGB, x: float, y: float) -> RGB:
    """A square view around a place, moved inside where it would stick out; a frame where the place is."""
    height, width = picture.shape[:2]
    side = max(8, round(VIEW * min(height, width)))
    left, top = (int(np.clip(round(at - side / 2), 0, whole - side)) for at, whole in ((x, width), (y, height)))
    view = picture[top : top + side, left : left + side].copy()
    mark = max(3, side // 6)
    column, row = (int(np.clip(round(at - mark / 2), 0, side - mark)) for at in (x - left, y - top))
    frame = np.zeros((side, side), bool)
    frame[row : row + mark, column : column + mark] = True
    view[images.outline(frame)] = (255, 64, 96)
    return view
