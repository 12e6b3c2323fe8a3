"""Connected regions of a mask, and their borders as polygons."""

import numpy as np
import numpy.typing as npt

__all__ = ["contour", "labelled", "outlines"]

TOLERANCE = 1.0  # pixels that a contour may be off the region's border
STEPS = ((1, 0), (0, 1), (-1, 0), (0, -1))  # east, south, west, north: (x, y)

Mask = npt.NDArray[np.bool_]
Ring = list[tuple[int, int]]  # corners (x, y); the last is joined with the first


def outlines(mask: Mask, tolerance: float = TOLERANCE) -> list[Ring]:
    """The borders of all regions of a mask (H, W): outer ones clockwise, those of holes counterclockwise."""
    rings: list[Ring] = []
    labels, boxes = labelled(mask)
    for number, (rows, columns) in enumerate(boxes, 1):
        region = labels[rows, columns] == number
        left, top = int(columns.start), int(rows.start)
        rings.append([(left + x, top + y) for x, y in contour(region, tolerance)])
        outside, inner = labelled(~np.pad(region, 1), corners=False)
        for hole, (hole_rows, hole_columns) in enumerate(inner, 1):
            if hole != outside[0, 0]:
                x0, y0 = left + int(hole_columns.start) - 1, top + int(hole_rows.start) - 1
                ring = contour(outside[hole_rows, hole_columns] == hole, tolerance, corners=False)
                rings.append([(x0 + x, y0 + y) for x, y in reversed(ring)])
    return rings


def labelled(mask: Mask, *, corners: bool = True) -> tuple[npt.NDArray[np.int32], list[tuple[slice, slice]]]:
    """Which region each pixel (H, W) belongs to, from 1, 0 outside; and each region's rows and columns.

    Pixels that touch at a corner belong together, unless `corners` is off. Runs of pixels in a row are joined with
    those that they touch in the next row.
    """
    edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    (rows, starts), ends = (edges == 1).nonzero(), (edges == -1).nonzero()[1]  # ends are one behind the last pixel
    stride = mask.shape[1] + 2  # more than any end, so that rows do not mix
    first = np.searchsorted(rows * stride + ends, (rows + 1) * stride + starts, side="left" if corners else "right")
    behind = np.searchsorted(rows * stride + starts, (rows + 1) * stride + ends, side="right" if corners else "left")
    counts = np.maximum(behind - first, 0)
    above = np.repeat(np.arange(len(rows)), counts)
    below = np.arange(len(above)) + np.repeat(first - (counts.cumsum() - counts), counts)
    names, regions = np.unique(_joined(len(rows), above, below), return_inverse=True)
    labels = np.zeros(mask.shape, np.int32)
    labels[mask] = np.repeat((regions + 1).astype(np.int32), ends - starts)
    tops, lefts = np.full(len(names), mask.shape[0]), np.full(len(names), mask.shape[1])
    bottoms, rights = np.zeros(len(names), int), np.zeros(len(names), int)
    np.minimum.at(tops, regions, rows)
    np.minimum.at(lefts, regions, starts)
    np.maximum.at(bottoms, regions, rows + 1)
    np.maximum.at(rights, regions, ends)
    sides = zip(tops.tolist(), bottoms.tolist(), lefts.tolist(), rights.tolist(), strict=True)
    return labels, [(slice(top, bottom), slice(left, right)) for top, bottom, left, right in sides]


def _joined(count: int, first: npt.NDArray[np.int_], second: npt.NDArray[np.int_]) -> npt.NDArray[np.int_]:
    """For each of `count` runs the lowest number that it is connected with; first[i] and second[i] touch."""
    names = np.arange(count)
    while (names[first] != names[second]).any():
        lowest = np.minimum(names[first], names[second])
        for ends in (first, second):
            np.minimum.at(names, names[ends], lowest)
        while (names[names] != names).any():
            names = names[names]
    return names


def contour(region: Mask, tolerance: float = TOLERANCE, *, corners: bool = True) -> Ring:
    """Corners (x, y) of the outer border of a connected region (h, w), clockwise, within `tolerance` of it.

    Its pixels may be connected at corners, unless `corners` is off.
    """
    turns = np.array(_border(region, corners))
    if tolerance == 0 or len(turns) <= 4:
        return [(int(x), int(y)) for x, y in turns]
    far = int(((turns - turns[0]) ** 2).sum(1).argmax())
    out, back = turns[: far + 1], np.concatenate([turns[far:], turns[:1]])
    kept = _thinned(out, tolerance)[:-1] + _thinned(back, tolerance)[:-1]
    return kept if len(kept) >= 3 else [(int(x), int(y)) for x, y in turns]


def _border(region: Mask, connected_at_corners: bool) -> Ring:
    """The turns of a walk along the outer edge with the region on the right-hand side."""
    padded = np.pad(region, 1)
    start = x, y = int(region[0].argmax()), 0
    heading, corners = 0, [start]
    while True:
        x, y = x + STEPS[heading][0], y + STEPS[heading][1]
        (ahead_x, ahead_y), (right_x, right_y) = STEPS[heading], STEPS[(heading + 1) % 4]
        # of the four pixels around this corner, those ahead: on the left-hand and on the right-hand side
        left = padded[y + (ahead_y - right_y + 1) // 2, x + (ahead_x - right_x + 1) // 2]
        right = padded[y + (ahead_y + right_y + 1) // 2, x + (ahead_x + right_x + 1) // 2]
        if left and (right or connected_at_corners):
            turned = (heading - 1) % 4
        else:
            turned = heading if right else (heading + 1) % 4
        if (x, y) == start and turned == 0:
            return corners
        if turned != heading:
            corners.append((x, y))
        heading = turned


def _thinned(line: npt.NDArray[np.int_], tolerance: float) -> list[tuple[int, int]]:
    """Points of a line (N, 2) that keep it within `tolerance` (Douglas and Peucker, 1973), its ends among them."""
    keep = np.zeros(len(line), bool)
    keep[[0, -1]] = True
    spans = [(0, len(line) - 1)]
    while spans:
        first, last = spans.pop()
        if last - first < 2:
            continue
        along, offsets = line[last] - line[first], line[first + 1 : last] - line[first]
        distances = np.abs(along[0] * offsets[:, 1] - along[1] * offsets[:, 0]) / max(float(np.hypot(*along)), 1e-9)
        worst = int(distances.argmax())
        if distances[worst] > tolerance:
            middle = first + 1 + worst
            keep[middle] = True
            spans += [(first, middle), (middle, last)]
    return [(int(x), int(y)) for x, y in line[keep]]
