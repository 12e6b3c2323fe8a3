"""What is too small to matter: rules for the marked regions that stop a part, and the score that follows from them.

With a rule, a part is stopped where more regions than it allows are as large as it asks for. Its score is the highest
level of the anomaly map at which that is so, and so it is compared with a threshold as any other score is: the
promise of split conformal prediction holds for every function of a photograph, this one too.

An anomaly map is blurred, so that what lies above a level around a small spot is the wider the more the spot stands
out. Therefore a region is measured where it is at least half as high as its peak, above what is typical of good parts.
What it has at lower levels counts in proportion: its area at a quarter of the peak's height counts half.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Literal, NamedTuple, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field

from kizu.config import Config, Zone
from kizu.data.geometry.measures import extent
from kizu.data.geometry.outlines import labelled

__all__ = ["Levels", "RegionSize", "Ruler", "SizeRule", "SizeRules", "what_matters"]

Map = npt.NDArray[np.float32]  # (h, w)
Mask = npt.NDArray[np.bool_]  # (h, w)
Box = tuple[int, int, int, int]  # first row and column, last row and column
FIRST = 1024  # pixels that are sorted at first: a rule seldom asks for more
LEVELS = 4  # at which a marked region is measured
ROUNDING = 1e-9


@dataclass(frozen=True)
class SizeRule:
    """More than `max_count` regions of at least `min_area` and `min_length` stop a part."""

    min_area: float = 0.0
    min_length: float = 0.0
    max_count: int = 0

    @classmethod
    def of(cls, zone: Config | Zone, config: Config) -> Self:
        """The limits that a zone has of its own, and otherwise those of the config."""

        def limit(name: str) -> float:
            own = getattr(zone, name)
            return (getattr(config, name) or 0) if own is None else own

        return cls(float(limit("min_area")), float(limit("min_length")), int(limit("max_count")))

    def sentence(self, unit: str) -> str:
        """What stops a part; `unit` is "mm" or "px"."""
        size = " and ".join(
            ([f"{self.min_area:g} {unit}²"] if self.min_area else [])
            + ([f"{self.min_length:g} {unit} in length"] if self.min_length else [])
        )
        regions = f"more than {self.max_count} regions" if self.max_count else "a region"
        return f"{regions}{f' of at least {size}' if size else ''} {'are' if self.max_count else 'is'} marked"


def what_matters(config: Config) -> str:
    """What a config's rules for sizes stop a part for, in sentences; empty without rules."""
    if not config.rules_sizes:
        return ""
    unit = "px" if config.pixel_size is None else "mm"
    zones = [zone for zone in config.zones if not zone.ignored]
    rules = {zone.name: SizeRule.of(zone, config) for zone in zones} or {"": SizeRule.of(config, config)}
    if len({*rules.values()}) == 1:
        rules = {"": next(iter(rules.values()))}
    sentences = [
        f"{f'In {name}, a' if name else 'A'} part is stopped where {rule.sentence(unit)}."
        for name, rule in rules.items()
    ]
    smaller = any(rule.min_area or rule.min_length for rule in rules.values())
    return " ".join([*sentences, *(["Smaller ones are shown and stop nothing."] if smaller else [])])


class Levels(NamedTuple):
    """Values of maps of good parts."""

    typical: float  # the median: a region's height is measured from it
    lowest: float  # that is worth a look: one pixel in a hundred is higher


@dataclass(frozen=True)
class RegionSize:
    """How large a marked region is, by Feret's diameters."""

    area: Annotated[float, Field(description="in units²")]
    length: Annotated[float, Field(description="the largest distance between two points of its border")]
    width: Annotated[float, Field(description="the smallest distance between two parallels around it")]
    direction: Annotated[float, Field(description="of its length: degrees from the horizontal, anticlockwise")]
    unit: Annotated[Literal["px", "mm"], Field(description="mm where the model knows the size of a pixel")]

    def __str__(self) -> str:
        if self.unit == "px":
            return f"{self.length:.0f} × {self.width:.0f} px, {self.area:,.0f} px²"
        return f"{self.length:.3g} × {self.width:.3g} mm, {self.area:.3g} mm²"


@dataclass(frozen=True)
class Ruler:
    """What a pixel of a photograph measures (high, wide)."""

    pixel: tuple[float, float]
    unit: Literal["px", "mm"]
    levels: Levels

    def measure(self, values: Map, region: Mask, level: float) -> RegionSize:
        """A region above a level, in a map (h, w): the largest of what it is at some levels."""
        inside = np.where(region, values, -np.inf)
        place = np.unravel_index(int(inside.argmax()), inside.shape)
        peak = float(inside[place])
        sizes = []
        for lower in np.linspace(max(level, (peak + self.levels.typical) / 2), level, LEVELS).tolist():
            labels, boxes = labelled(inside > lower)
            if not labels[place]:  # the peak is no higher than the level
                continue
            box = boxes[labels[place] - 1]
            part = labels[box] == labels[place]
            share = _share(lower, peak, self.levels.typical)
            found, pixels = extent(part, self.pixel), int(part.sum())
            area = share * pixels * self.pixel[0] * self.pixel[1]
            sizes.append((area, math.sqrt(share) * found.length, math.sqrt(share) * found.width, found.direction))
        longest = max(sizes, key=lambda size: size[1])
        area, length, width = (float(f"{x:.5g}") for x in (max(size[0] for size in sizes), *longest[1:3]))
        return RegionSize(area, length, width, round(longest[3], 1) % 180, self.unit)


@dataclass(frozen=True, eq=False)
class SizeRules:
    """The rules of all zones, for maps whose pixels are `unit` (high, wide) each, in what the rules count in."""

    rules: Sequence[SizeRule]  # of each zone, by its number
    unit: tuple[float, float]
    levels: Levels
    zones: npt.NDArray[np.int64] | None = None  # (h, w): the number of each pixel's zone; None: all is one

    @classmethod
    def of(cls, config: Config, unit: tuple[float, float], levels: Levels, zones: npt.NDArray[np.int64] | None) -> Self:
        """From a config, which has limits for all and zones that may have their own."""
        inspected: list[Config | Zone] = [zone for zone in config.zones if not zone.ignored]
        return cls([SizeRule.of(zone, config) for zone in inspected or [config]], unit, levels, zones)

    def score(self, anomaly_map: Map) -> float:
        """The highest level at which what lies above it in a map (h, w) stops the part; at none, the lowest there is.

        Regions that have grown together are counted as those that were large enough before.
        """
        levels = [self.levels.lowest]
        for rule, values in self._parts(anomaly_map):
            growing = _Growing(rule, self.unit, self.levels).grow(values)
            levels += islice((level for level, count in growing if count > rule.max_count), 1)
        return max(levels)

    def scores(self, maps: Map) -> npt.NDArray[np.float32]:
        """Of maps (B, 1, h, w): (B,)."""
        return np.array([self.score(anomaly_map) for anomaly_map in maps[:, 0]], np.float32)

    def large_enough(self, anomaly_map: Map, level: float) -> Mask:
        """(h, w): the pixels of regions above a level that are as large as the rule of their zone asks for."""
        mask = np.zeros(anomaly_map.shape, bool)
        for rule, values in self._parts(anomaly_map):
            growing = _Growing(rule, self.unit, self.levels)
            for _ in growing.grow(np.where(values > level, values, -np.inf)):
                pass
            mask |= growing.large_regions()
        return mask

    def _parts(self, anomaly_map: Map) -> Iterator[tuple[SizeRule, Map]]:
        """Each rule, and the map where it holds; it has no regions elsewhere."""
        for rule in dict.fromkeys(self.rules):
            if self.zones is None or len(self.rules) == 1:
                yield rule, anomaly_map
            else:
                numbers = [number for number, own in enumerate(self.rules) if own == rule]
                yield rule, np.where(np.isin(self.zones, numbers), anomaly_map, -np.inf).astype(np.float32)


def _share(level: float, peak: float, typical: float) -> float:
    """How much of what a region is at a level counts, of one with this peak."""
    return min(1.0, max(0.0, 2 * (level - typical) / (peak - typical))) if peak > typical else 1.0


class _Growing:
    """Connected regions above a level that sinks, by union-find (Tarjan, 1975), and which of them are large enough."""

    def __init__(self, rule: SizeRule, unit: tuple[float, float], levels: Levels) -> None:
        self.unit, self.levels = unit, levels
        self.least_pixels = rule.min_area * (1 - ROUNDING) / (unit[0] * unit[1])
        self.least_length = rule.min_length * (1 - ROUNDING)
        self.members: dict[int, list[int]] = {}  # pixels of each region, by the one that stands for it,
        self.boxes: dict[int, Box] = {}  # where it lies,
        self.peaks: dict[int, float] = {}  # and how high it is
        self.large: set[int] = set()  # the regions that hold one that has been large enough

    def grow(self, values: Map) -> Iterator[tuple[float, int]]:
        """Add the pixels of a map (h, w) that are worth a look, the highest first.

        Whenever a region becomes large enough, gives its pixel's value and how many have been so by then.
        """
        self.shape = values.shape
        self.stride = values.shape[1] + 2  # with a border of pixels that are never added
        self.parents = [-1] * ((values.shape[0] + 2) * self.stride)
        self.around = tuple(down + right for down in (-self.stride, 0, self.stride) for right in (-1, 0, 1))
        flat, seen, size, count = values.ravel(), 0, FIRST, 0
        while seen < flat.size:
            size = min(size, flat.size)
            highest = np.argpartition(flat, flat.size - size)[flat.size - size :]
            for place in highest[np.argsort(-flat[highest], kind="stable")][seen:].tolist():
                value = float(flat[place])
                if value <= self.levels.lowest:
                    return
                y, x = divmod(place, values.shape[1])
                if self._add(y, x, value):
                    count += 1
                    yield value, count
            seen, size = size, 8 * size

    def large_regions(self) -> Mask:
        """(h, w): the pixels of regions that hold one that has been large enough."""
        mask = np.zeros((self.shape[0] + 2) * self.stride, bool)
        for root in self.large:
            mask[self.members[root]] = True
        return mask.reshape(-1, self.stride)[1:-1, 1:-1]

    def _add(self, y: int, x: int, value: float) -> bool:
        """Add a pixel; whether a region has become large enough by it that holds none that was so before."""
        parents, joined = self.parents, 0
        pixel = root = (y + 1) * self.stride + x + 1
        parents[root], self.peaks[root] = root, value
        self.members[root], self.boxes[root] = [root], (y, x, y, x)
        for step in self.around:
            other = pixel + step
            if parents[other] < 0:
                continue
            while parents[other] != other:
                parents[other] = other = parents[parents[other]]
            if other != root:
                root, joined = self._joined(root, other), joined + 1
        if root in self.large or not self._is_large(root, y, x, joined, value):
            return False
        self.large.add(root)
        return True

    def _joined(self, root: int, other: int) -> int:
        """The pixel that stands for both regions together."""
        if len(self.members[other]) > len(self.members[root]):
            root, other = other, root
        self.parents[other] = root
        self.members[root] += self.members.pop(other)
        self.peaks[root] = max(self.peaks[root], self.peaks.pop(other))
        (top, left, bottom, right), (up, west, down, east) = self.boxes[root], self.boxes.pop(other)
        self.boxes[root] = min(top, up), min(left, west), max(bottom, down), max(right, east)
        if other in self.large:
            self.large.remove(other)
            self.large.add(root)
        return root

    def _is_large(self, root: int, y: int, x: int, joined: int, value: float) -> bool:
        """Whether a region has become large enough by a pixel, with which `joined` regions have grown together."""
        share = _share(value, self.peaks[root], self.levels.typical)
        if share * len(self.members[root]) < self.least_pixels:
            return False
        if not self.least_length:
            return True
        least = self.least_length / math.sqrt(share) if share > 0 else math.inf
        top, left, bottom, right = self.boxes[root]
        high, wide = bottom - top + 1, right - left + 1
        if joined == 1 and not self.least_pixels:  # it was not long before, and what is new in it ends at the pixel
            high, wide = max(y - top, bottom - y) + 1, max(x - left, right - x) + 1
        if math.hypot(high * self.unit[0], wide * self.unit[1]) < least:
            return False
        region = np.zeros((bottom - top + 1, right - left + 1), bool)
        rows, columns = np.divmod(np.array(self.members[root]), self.stride)
        region[rows - top - 1, columns - left - 1] = True
        return extent(region, self.unit).length >= least
