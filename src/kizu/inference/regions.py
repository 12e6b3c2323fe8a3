"""What is marked in a photograph: connected regions of the map above the pixel threshold."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import Field

from kizu.calibration.sizes import RegionSize, Ruler
from kizu.calibration.threshold import p_value
from kizu.data.geometry.outlines import contour, labelled

__all__ = ["MarkedRegion", "find_regions"]


@dataclass(frozen=True)
class MarkedRegion:
    """A connected region of the anomaly map above the pixel threshold, in pixels of the photograph."""

    box: Annotated[tuple[int, int, int, int], Field(description="left, top, width, height")]
    area: Annotated[int, Field(description="pixels")]
    peak: Annotated[float, Field(description="the map's largest value in it")]
    place: Annotated[tuple[int, int], Field(description="x, y of the peak")]
    p_value: Annotated[float, Field(description="at most this share of good images has so high a peak anywhere")]
    contour: Annotated[
        list[tuple[int, int]],
        Field(description="corners (x, y) of the outer border, clockwise; pixel (0, 0) spans (0, 0) to (1, 1)"),
    ]
    zone: Annotated[str, Field(description="name of the zone that the peak is in; empty where nobody named any")] = ""
    size: Annotated[RegionSize | None, Field(description="where the model has rules for sizes or knows a pixel's")] = (
        None
    )
    matters: Annotated[bool, Field(description="whether it is large enough to stop a part")] = True


def find_regions(
    values: npt.NDArray[np.float32],
    threshold: float,
    good_peaks: Sequence[float],
    *,
    ruler: Ruler | None = None,
    large_enough: npt.NDArray[np.bool_] | None = None,
) -> list[MarkedRegion]:
    """Regions of a map (H, W) above `threshold`; pixels that touch at a corner belong together.

    Those that matter come first, and of these the one with the highest peak.

    `good_peaks` are the largest map values of good images, for the p-values. With a `ruler` they are measured.
    Those regions matter that have pixels of the mask `large_enough` (H, W); without it all do.
    """
    labels, boxes = labelled(values > threshold)
    regions = []
    for number, (rows, columns) in enumerate(boxes, 1):
        region = labels[rows, columns] == number
        inside = np.where(region, values[rows, columns], -np.inf)
        y, x = np.unravel_index(inside.argmax(), inside.shape)
        left, top, peak = int(columns.start), int(rows.start), float(inside.max())
        regions.append(
            MarkedRegion(
                box=(left, top, region.shape[1], region.shape[0]),
                area=int(region.sum()),
                peak=peak,
                place=(left + int(x), top + int(y)),
                p_value=p_value(peak, good_peaks),
                contour=[(left + a, top + b) for a, b in contour(region)],
                size=None if ruler is None else ruler.measure(values[rows, columns], region, threshold),
                matters=large_enough is None or bool((large_enough[rows, columns] & region).any()),
            )
        )
    return sorted(regions, key=lambda region: (not region.matters, -region.peak))
