"""How long and wide a region is, and in which direction it lies."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Extent", "extent"]

Points = npt.NDArray[np.float64]  # (N, 2): x, y


@dataclass(frozen=True)
class Extent:
    """Feret's diameters, which calipers measure: the largest is the length, the smallest the width."""

    length: float
    width: float
    direction: float  # of the length: degrees from the horizontal, anticlockwise, from 0 to below 180


def extent(region: npt.NDArray[np.bool_], unit: tuple[float, float] = (1.0, 1.0)) -> Extent:
    """Of the pixels of a mask (h, w) that has some, each `unit` (high, wide)."""
    rows = np.flatnonzero(region.any(1))
    left, right = region[rows].argmax(1), region.shape[1] - region[rows, ::-1].argmax(1)
    corners = [np.stack([x, rows + below], 1) for x in (left, right) for below in (0, 1)]
    hull = _hull(np.unique(np.concatenate(corners), axis=0) * np.array([unit[1], unit[0]]))
    between = hull[:, None] - hull[None]
    distances = np.hypot(between[..., 0], between[..., 1])
    right_way, down = between[np.unravel_index(int(distances.argmax()), distances.shape)]
    edges = np.roll(hull, -1, axis=0) - hull
    normals = np.stack([edges[:, 1], -edges[:, 0]], 1) / np.hypot(*edges.T)[:, None]
    widths = np.ptp(normals @ hull.T, axis=1)
    direction = math.degrees(math.atan2(-down, right_way)) % 180
    return Extent(float(distances.max()), float(widths.min()), direction % 180)


def _hull(points: Points) -> Points:
    """The corners of the convex hull of points in order of x, then y (Andrew, 1979)."""
    return np.array(_half(points) + _half(points[::-1]))


def _half(points: Points) -> list[tuple[float, float]]:
    chain: list[tuple[float, float]] = []
    for x, y in points.tolist():
        while len(chain) > 1 and _turn(chain[-2], chain[-1], (x, y)) <= 0:
            chain.pop()
        chain.append((x, y))
    return chain[:-1]


def _turn(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> float:
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])
