"""What is too small to matter: rules for the marked regions that stop a part, and the score that follows from them.

With a rule, a part is stopped where more regions than it allows are as large as it asks for. Its score is the highest
level of the anomaly map at which that is so, and so it is compared with a threshold as any other score is: the
promise of split conformal prediction holds for every function of a photograph, this one too.

An anomaly map is blurred, so that what lies above a level around a small spot is the wider the more the spot stands
out. Therefore a region is measured where it is at least half as high as its peak, above what is typical of good parts.
What it has at lower levels counts in proportion: its area at a quarter of the peak's height counts half.
"""

import math
from collections import deque
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
LEVELS = 4  # at which a marked region is measured
DIRECTIONS = 16  # in which regions that grow are measured: their length comes out at most half a percent short
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
        count = "one region" if self.max_count == 1 else f"{self.max_count} regions"
        regions = f"more than {count}" if self.max_count else "a region"
        return f"{regions}{f' of at least {size}' if size else ''} {'are' if self.max_count > 1 else 'is'} marked"


def what_matters(config: Config) -> str:
    """What a config's rules for sizes stop a part for, in sentences; empty without rules."""
    if not config.rules_sizes:
        return ""
    unit = "px" if config.pixel_size is None else "mm"
    zones = [zone for zone in config.zones if not zone.ignored]
    own = {zone.name: SizeRule.of(zone, config) for zone in zones if zone.has_limits}
    general = {} if zones and len(own) == len(zones) else {"": SizeRule.of(config, config)}
    where = {name: f"In {name}, a" for name in own} | {"": "Elsewhere, a" if own else "A"}
    sentences = [
        f"{where[name]} part is stopped where {rule.sentence(unit)}." for name, rule in (own | general).items()
    ]
    if all(rule.min_area or rule.min_length for rule in (*own.values(), *general.values())):
        sentences.append("Smaller ones are shown and stop nothing.")
    return " ".join(sentences)


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
    """Rules for maps whose pixels are `unit` (high, wide) each, in what the rules count in."""

    rules: Sequence[SizeRule]
    unit: tuple[float, float]
    levels: Levels
    places: npt.NDArray[np.int64] | None = None  # (h, w): the number of the rule of each pixel; None: there is one

    @classmethod
    def of(cls, config: Config, unit: tuple[float, float], levels: Levels, zones: npt.NDArray[np.int64] | None) -> Self:
        """From a config: a rule for each zone with limits of its own, and one for all others together.

        `zones` (h, w) has the number of each pixel's zone, negative in none.
        """
        inspected = [zone for zone in config.zones if not zone.ignored]
        own = [number for number, zone in enumerate(inspected) if zone.has_limits]
        rules = [SizeRule.of(config, config), *(SizeRule.of(inspected[number], config) for number in own)]
        if zones is None or not own:
            return cls(rules[:1], unit, levels)
        places = np.zeros_like(zones)
        for place, number in enumerate(own, 1):
            places[zones == number] = place
        return cls(rules, unit, levels, places)

    def score(self, anomaly_map: Map, threshold: float = math.inf) -> float:
        """The highest level at which what lies above it in a map (h, w) stops the part; at none, the lowest there is.

        Regions that are apart at a level may have grown together at the `threshold`, and be no more than are allowed
        there: then the part is not stopped, and the score is the threshold.
        """
        levels = [self.levels.lowest]
        for rule, values in self._parts(anomaly_map):
            growing = _Growing(rule, self.unit, self.levels).grow(values)
            levels += islice((level for level, count in growing if count > rule.max_count), 1)
        score = max(levels)
        return threshold if score > threshold and not self._stops(anomaly_map, threshold) else score

    def scores(self, maps: Map, threshold: float = math.inf) -> npt.NDArray[np.float32]:
        """Of maps (B, 1, h, w): (B,)."""
        return np.array([self.score(anomaly_map, threshold) for anomaly_map in maps[:, 0]], np.float32)

    def large_enough(self, anomaly_map: Map, level: float) -> Mask:
        """(h, w): the pixels of regions above a level that are as large as their rule asks for."""
        masks = [growing.large_regions() for growing in self._above(anomaly_map, level)]
        return np.asarray(np.logical_or.reduce(masks))

    def _stops(self, anomaly_map: Map, level: float) -> bool:
        """Whether what lies above a level stops the part."""
        if not any(rule.max_count for rule in self.rules):
            return True  # one region is enough, and stays one however it grows
        above = zip(self._parts(anomaly_map), self._above(anomaly_map, level), strict=True)
        return any(len(growing.large) > rule.max_count for (rule, _), growing in above)

    def _above(self, anomaly_map: Map, level: float) -> "Iterator[_Growing]":
        """For each rule the regions above a level."""
        for rule, values in self._parts(anomaly_map):
            growing = _Growing(rule, self.unit, self.levels)
            deque(growing.grow(np.where(values > level, values, -np.inf)), maxlen=0)
            yield growing

    def _parts(self, anomaly_map: Map) -> Iterator[tuple[SizeRule, Map]]:
        """Each rule, and the map where it holds; it has no regions elsewhere."""
        if self.places is None:
            yield self.rules[0], anomaly_map
            return
        for number, rule in enumerate(self.rules):
            yield rule, np.where(self.places == number, anomaly_map, -np.inf).astype(np.float32)


def _share(level: float, peak: float, typical: float) -> float:
    """How much of what a region is at a level counts, of one with this peak."""
    return min(1.0, max(0.0, 2 * (level - typical) / (peak - typical))) if peak > typical else 1.0


class _Growing:
    """Connected regions above a level that sinks, by union-find (Tarjan, 1975), and which of them are large enough.

    A region is as long as its longest shadow in some directions. What has been large enough stays so.
    """

    def __init__(self, rule: SizeRule, unit: tuple[float, float], levels: Levels) -> None:
        self.levels = levels
        self.least_pixels = rule.min_area * (1 - ROUNDING) / (unit[0] * unit[1])
        self.least_length = rule.min_length * (1 - ROUNDING)
        angles = np.arange(DIRECTIONS) * math.pi / DIRECTIONS
        self.down, self.right = unit[0] * np.sin(angles), unit[1] * np.cos(angles)
        self.half = (np.abs(self.down) + np.abs(self.right)) / 2  # of a pixel's shadow
        self.members: dict[int, list[int]] = {}  # pixels of each region, by the one that stands for it,
        self.shadows: dict[int, npt.NDArray[np.float64]] = {}  # (2, DIRECTIONS): how far it reaches, either way,
        self.peaks: dict[int, float] = {}  # and how high it is
        self.large: set[int] = set()  # the regions that are large enough

    def grow(self, values: Map) -> Iterator[tuple[float, int]]:
        """Add the pixels of a map (h, w) that are worth a look, the highest first.

        Gives each level, and how many regions above or at it are large enough.
        """
        self.shape = values.shape
        self.stride = values.shape[1] + 2  # with a border of pixels that are never added
        self.parents: list[int] = [-1] * ((values.shape[0] + 2) * self.stride)
        self.around = tuple(down + right for down in (-self.stride, 0, self.stride) for right in (-1, 0, 1))
        flat = values.ravel()
        places = np.flatnonzero(flat > self.levels.lowest)
        places = places[np.argsort(-flat[places], kind="stable")]
        if not len(places):
            return
        ends = np.flatnonzero(np.diff(flat[places], append=-np.inf)) + 1
        for start, end in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True):
            value = float(flat[places[start]])
            added = [self._add(place, value) for place in places[start:end].tolist()]
            for root in {self._root(pixel) for pixel in added}:
                if root not in self.large and self._is_large(root, value):
                    self.large.add(root)
            yield value, len(self.large)

    def large_regions(self) -> Mask:
        """(h, w): the pixels of regions that are large enough."""
        mask = np.zeros((self.shape[0] + 2) * self.stride, bool)
        for root in self.large:
            mask[self.members[root]] = True
        return mask.reshape(-1, self.stride)[1:-1, 1:-1]

    def _root(self, pixel: int) -> int:
        """The pixel that stands for the region of one."""
        parents: list[int] = self.parents
        while parents[pixel] != pixel:
            parents[pixel] = parents[parents[pixel]]
            pixel = parents[pixel]
        return pixel

    def _add(self, place: int, value: float) -> int:
        """Add a pixel, and join the regions around it; returns its number."""
        y, x = divmod(place, self.shape[1])
        pixel: int = (y + 1) * self.stride + x + 1
        root = pixel
        self.parents[root], self.peaks[root], self.members[root] = root, value, [root]
        if self.least_length:
            middle = y * self.down + x * self.right
            self.shadows[root] = np.stack([middle + self.half, self.half - middle])
        for step in self.around:
            other = pixel + step
            if self.parents[other] >= 0 and (other := self._root(other)) != root:
                root = self._joined(root, other)
        return pixel

    def _joined(self, root: int, other: int) -> int:
        """The pixel that stands for both regions together."""
        if len(self.members[other]) > len(self.members[root]):
            root, other = other, root
        self.parents[other] = root
        self.members[root] += self.members.pop(other)
        self.peaks[root] = max(self.peaks[root], self.peaks.pop(other))
        if self.least_length:
            np.maximum(self.shadows[root], self.shadows.pop(other), out=self.shadows[root])
        if other in self.large:
            self.large.remove(other)
            self.large.add(root)
        return root

    def _is_large(self, root: int, value: float) -> bool:
        """Whether a region is large enough at a level."""
        share = _share(value, self.peaks[root], self.levels.typical)
        if share * len(self.members[root]) < self.least_pixels:
            return False
        if not self.least_length:
            return True
        return math.sqrt(share) * float(self.shadows[root].sum(0).max()) >= self.least_length
