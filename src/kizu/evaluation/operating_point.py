"""An operating point from labelled photographs: false alarms against misses, and what each choice costs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from kizu.calibration.threshold import calibrate, in_the_long_run
from kizu.errors import DataError

if TYPE_CHECKING:
    from kizu.evaluation.evaluate import CategoryResult
    from kizu.inference.inspector import Inspector

__all__ = ["Costs", "OperatingPoint", "about_misses", "cheapest_point", "operating_points", "point_at"]
__all__ += ["set_operating_point"]

MOST = 0.8  # of the known defects: where fewer are stopped, kizu says what would stop more
OTHER_RATES = (0.05, 0.1)


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


def about_misses(result: "CategoryResult", rate: float) -> list[str]:
    """Where many of the known defects are missed at this rate of false alarms: what would stop more, as sentences."""
    defective, stopped = result.count(defective=True), result.count(defective=True, stopped=True)
    if stopped >= MOST * defective:
        return []
    notes = []
    if 2 * stopped < defective:
        wayout = (
            'The page "It misses defects" of the documentation says what else helps.'
            if result.choice
            else "With `auto=True` settings are chosen for these parts."
        )
        notes.append(f"{stopped} of {defective} known defects are stopped. {wayout}")
    good = sorted(result.calibration_scores)
    for other in (other for other in OTHER_RATES if other > max(rate, 1 / (len(good) + 1))):
        at = replace(result, threshold=calibrate(good, other).value)
        if (more := at.count(defective=True, stopped=True)) > stopped:
            alarms, harmless = at.count(defective=False, stopped=True), at.count(defective=False)
            notes.append(
                f"With 1 false alarm in {round(1 / other)} (`false_alarms={other:g}`) {more} of {defective} would be "
                f"stopped, and {alarms} of the {harmless} good parts that were tested."
            )
            break
    return notes + _about_the_highest(result, good, rate, stopped)


def _about_the_highest(result: "CategoryResult", good: list[float], rate: float, stopped: int) -> list[str]:
    """Whether a single training photograph sets the threshold, and what would be without it."""
    names = [outlier.image for outlier in result.outliers if good and outlier.score == good[-1]]
    if not names or result.threshold != good[-1]:
        return []
    without = calibrate(good[:-1], rate).value
    more = replace(result, threshold=without).count(defective=True, stopped=True)
    if more <= stopped:
        return []
    return [
        f"{names[0]} alone sets the threshold of {good[-1]:.4g}. Without it, the threshold would be about "
        f"{without:.4g}, and about {more} of {result.count(defective=True)} known defects would be stopped. "
        "Look at this photograph. If the part is defective after all, or later photographs will not look like this, "
        "remove it and train again. If good parts may look like this, keep it: otherwise such good parts will be "
        "stopped, and more often than promised."
    ]
