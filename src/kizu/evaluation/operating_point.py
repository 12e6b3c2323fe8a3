"""An operating point from labelled photographs: false alarms against misses, and what each choice costs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from kizu.calibration.threshold import in_the_long_run
from kizu.errors import DataError

if TYPE_CHECKING:
    from kizu.inference.inspector import Inspector

__all__ = ["Costs", "OperatingPoint", "cheapest_point", "operating_points", "point_at", "set_operating_point"]


@dataclass(frozen=True)
class Costs:
    """What mistakes cost, in units of one false alarm, and how many parts are defective."""

    miss: float = 100.0
    defective: float = 0.01

    def per_thousand(self, false_alarm_rate: float, miss_rate: float) -> float:
        """Cost of 1,000 parts."""
        return 1000 * ((1 - self.defective) * false_alarm_rate + self.defective * self.miss * miss_rate)


@dataclass(frozen=True)
class OperatingPoint:
    """What a threshold does to labelled photographs."""

    threshold: float
    false_alarms: int
    good: int
    misses: int
    bad: int
    cost: float  # of 1,000 parts

    @property
    def false_alarm_rate(self) -> float:
        return self.false_alarms / self.good

    @property
    def miss_rate(self) -> float:
        return self.misses / self.bad


def operating_points(good: Sequence[float], bad: Sequence[float], costs: Costs) -> list[OperatingPoint]:
    """A point for every way in which a threshold can divide the scores, from the lowest to the highest.

    Thresholds lie half-way between neighbouring scores. Raises `DataError` when one of the two kinds is missing.
    """
    if not good or not bad:
        raise DataError("kizu tune needs good and defective photographs that can be read, at least one of each")
    cuts = np.unique(np.concatenate([good, bad]))
    edges = np.diff(cuts).mean() / 2 if len(cuts) > 1 else 0.5
    thresholds = [cuts[0] - edges, *((cuts[1:] + cuts[:-1]) / 2), cuts[-1] + edges]
    return [point_at(float(threshold), good, bad, costs) for threshold in thresholds]


def point_at(threshold: float, good: Sequence[float], bad: Sequence[float], costs: Costs) -> OperatingPoint:
    """What one threshold does."""
    alarms, misses = sum(score > threshold for score in good), sum(score <= threshold for score in bad)
    cost = costs.per_thousand(alarms / len(good), misses / len(bad))
    return OperatingPoint(threshold, alarms, len(good), misses, len(bad), cost)


def cheapest_point(curve: Sequence[OperatingPoint]) -> OperatingPoint:
    """The cheapest point; of equals the middle one, which is the farthest from costing more."""
    lowest = min(point.cost for point in curve)
    cheapest = [point for point in curve if point.cost <= lowest + 1e-9]
    return cheapest[len(cheapest) // 2]


def set_operating_point(detector: "Inspector", point: OperatingPoint) -> None:
    """Set the detector's threshold, marked as tuned on labels in every statement from now on."""
    statement = (
        f"Tuned on labels, so there is no promise. Of the photographs that it was set on, {point.false_alarms} of "
        f"{point.good} good ones are stopped, and {point.misses} of {point.bad} defective ones are missed. It will "
        f"stop {in_the_long_run(point.threshold, detector.calibration_scores)}."
    )
    detector.set_threshold(replace(detector.threshold, value=point.threshold, tuned=statement))
