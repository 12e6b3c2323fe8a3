"""What is marked in a photograph: connected regions of the map above the pixel threshold."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import Field

from kizu.calibration.sizes import RegionSize, Ruler
from kizu.calibration.threshold import p_value
from kizu.data.geometry.outlines import contour, labelled
from kizu.data.geometry.tiling import TileGrid

__all__ = ["HALF", "MarkedRegion", "Marking", "find_regions", "find_regions_in_cells"]

HALF = 0.5  # of a pixel: where a mask that was scaled still holds
AROUND = 8  # cells on which the map between those of a region depends, and more


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


@dataclass(frozen=True)
class Marking:
    """What is marked, and what is said of it."""

    threshold: float  # what lies above it in a map is marked
    good_peaks: Sequence[float]  # the largest map values of good images, for the p-values
    ruler: Ruler | None = None  # measures the regions


def find_regions(
    values: npt.NDArray[np.float32], marking: Marking, large_enough: npt.NDArray[np.bool_] | None = None
) -> list[MarkedRegion]:
    """The marked regions of a map (H, W); pixels that touch at a corner belong together.

    Those matter that have pixels of the mask `large_enough` (H, W); without it all do. They come first, and of these
    the one with the highest peak.
    """
    labels, boxes = labelled(values > marking.threshold)
    regions, ruler = [], marking.ruler
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
                p_value=p_value(peak, marking.good_peaks),
                contour=[(left + a, top + b) for a, b in contour(region)],
                size=None if ruler is None else ruler.measure(values[rows, columns], region, marking.threshold),
                matters=large_enough is None or bool((large_enough[rows, columns] & region).any()),
            )
        )
    return _in_order(regions)


def find_regions_in_cells(
    grid: TileGrid,
    values: npt.NDArray[np.float32],
    marking: Marking,
    large_enough: npt.NDArray[np.bool_] | None = None,
) -> list[MarkedRegion]:
    """What `find_regions` finds in a map of cells (rows, columns) over a photograph, without making all of that map.

    Between cells the map is interpolated, so that it is above the threshold only beside a cell that is. `large_enough`
    is of cells too.
    """
    near = np.pad(values > marking.threshold, 1)
    near[1:-1] |= near[:-2] | near[2:]
    near[:, 1:-1] |= near[:, :-2] | near[:, 2:]
    labels, boxes = labelled(near[1:-1, 1:-1])
    regions = []
    for number, box in enumerate(boxes, 1):
        rows, columns = (
            slice(int(cells.start * size), min(math.ceil(cells.stop * size), side))
            for cells, size, side in zip(box, grid.cell, grid.shape, strict=True)
        )
        around = tuple(slice(max(0, cells.start - AROUND), cells.stop + AROUND) for cells in box)
        first = around[0].start, around[1].start
        alone = np.where((labels[around] == 0) | (labels[around] == number), values[around], marking.threshold)
        part = grid.part_over(alone, rows, columns, first)
        large = None
        if large_enough is not None:
            large = grid.part_over(large_enough[around].astype(np.float32), rows, columns, first) > HALF
        for region in find_regions(part, marking, large):
            left, top, width, height = region.box
            at = columns.start, rows.start
            regions.append(
                replace(
                    region,
                    box=(left + at[0], top + at[1], width, height),
                    place=(region.place[0] + at[0], region.place[1] + at[1]),
                    contour=[(x + at[0], y + at[1]) for x, y in region.contour],
                )
            )
    return _in_order(regions)


def _in_order(regions: list[MarkedRegion]) -> list[MarkedRegion]:
    return sorted(regions, key=lambda region: (not region.matters, -region.peak))
