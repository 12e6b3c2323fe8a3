"""The threshold between pass and stop, from scores of good images only, and what it promises.

Split conformal prediction (Papadopoulos et al., 2002; Vovk et al., 2005): if a new good part's score is exchangeable
with the n scores behind the threshold, the part is stopped with probability at most j / (n + 1), where j − 1 of the n
scores lie above the threshold. Over the draw of the n images, the share of good parts stopped follows
Beta(j, n + 1 − j).
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Self

from kizu.errors import OptionError

__all__ = ["CONFIDENCE", "Threshold", "calibrate", "finite", "from_finite", "images_needed", "in_the_long_run"]
__all__ += ["by_hand", "interval", "one_in", "p_value", "percent", "pixel_threshold_at", "refuse", "upper"]

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Threshold:
    """A part is stopped when its score is greater than `value`."""

    value: float
    rate: float  # the share of good parts that may be stopped, as asked for
    count: int  # good images behind it
    tuned: str = ""  # the sentence that says on which labelled images it was set instead
    grouped: bool = False  # whether each of these is a part with several photographs

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Self:
        """The threshold that a model.json holds."""
        value, grouped = from_finite(saved["value"]), saved.get("grouped", False)
        return cls(value, saved["rate"], saved["count"], saved["tuned"], grouped)

    @property
    def supported(self) -> float:
        """The lowest rate that so many images can carry: 1 in count + 1."""
        return 1 / (self.count + 1)

    @property
    def expected(self) -> float:
        """The share of good parts that it stops on average, at most."""
        return _allowed(self.rate, self.count) / (self.count + 1)

    @property
    def bound(self) -> float:
        """The share of good parts that it stops at most, for 95 % of all draws of the images behind it."""
        return upper(_allowed(self.rate, self.count) - 1, self.count)

    def promised(self, good: Sequence[float]) -> float:
        """The share of good parts that it stops on average, at most, also where it was tuned; `good` are its scores."""
        return p_value(math.nextafter(self.value, math.inf), good) if self.tuned else self.expected

    @property
    def statement(self) -> str:
        """The promise in one sentence."""
        if self.tuned:
            return self.tuned
        if self.count == 0:
            return "No good image was left over to set a threshold from, so nothing is stopped: train on more images."
        reached = self.rate >= self.supported - 1e-12
        rate = one_in(self.rate if reached else self.supported).replace("%", "% of")
        images = "good parts of several photographs each" if self.grouped else "good images"
        promise = (
            f"At most {rate} good parts will be stopped on average, and with 95 % confidence at most "
            f"{_at_most(self.bound)}, as long as new parts are made and photographed like the {self.count} {images} "
            "that set the threshold"
        )
        if reached:
            return f"{promise}; {self.count} can promise {one_in(self.supported)} at best."
        more = images_needed(self.rate) - self.count
        return f"{promise}. They can promise no lower rate: for {one_in(self.rate)} add {more} more."


def by_hand(value: float, before: Threshold, good: Sequence[float], set_by: str = "") -> Threshold:
    """A threshold that somebody chose now; `good` are the scores behind the one before, `set_by` says who.

    Raises `OptionError` for a value that is no finite number.
    """
    if not math.isfinite(value):
        raise OptionError(f"`threshold={value}`: a threshold is a finite number")
    whose = f", by {set_by} at {datetime.now().astimezone():%Y-%m-%d %H:%M %z}" if set_by else ""
    old = f"it was {before.value:.6g}" if math.isfinite(before.value) else "there was none"
    sentence = (
        f"The threshold was set to {value:.6g} by hand{whose}; before, {old}. The new one "
        f"will stop {in_the_long_run(value, good)}."
    )
    return replace(before, value=float(value), tuned=sentence)


def pixel_threshold_at(value: float, good: Sequence[float], map_peaks: Sequence[float]) -> float:
    """The pixel threshold that as few good images reach as have scores above a threshold of this value.

    Above all good scores, both rise by the same factor.
    """
    expected = p_value(math.nextafter(value, math.inf), good)
    level = calibrate(map_peaks, min(expected, len(good) / (len(good) + 1))).value
    return level * value / max(good) if good and value > max(good) > 0 else level


def in_the_long_run(value: float, good: Sequence[float]) -> str:
    """What share of new good parts lies above a value, by the scores of n good ones, as the end of a sentence."""
    if not good:
        return "an unknown share of new good parts"
    low, high = interval(sum(score > value for score in good), len(good))
    return (
        f"{percent(low)} to {percent(high)} of new good parts with 95 % confidence, by the {len(good)} scores of "
        "good parts that set the one before"
    )


def calibrate(scores: Sequence[float], rate: float) -> Threshold:
    """The threshold that a new good part passes with probability at least 1 − rate, if it is like these (n of them).

    It is the ⌈(n + 1)(1 − rate)⌉-th smallest score, or the largest where n is too small, or infinite where there is
    none.
    """
    ordered = sorted(scores)
    value = float(ordered[-_allowed(rate, len(ordered))]) if ordered else math.inf
    return Threshold(value, rate, len(ordered))


def finite(value: float) -> float | None:
    """A threshold as JSON can say it: None where it is infinite, so that nothing is stopped."""
    return value if math.isfinite(value) else None


def from_finite(value: float | None) -> float:
    """The threshold that `finite` wrote."""
    return math.inf if value is None else value


def p_value(score: float, good: Iterable[float]) -> float:
    """At most this share of good parts scores as high: (1 + how many of n good scores reach it) / (n + 1).

    It is at most α exactly where the score is above `calibrate(good, α)`, for every α that n carries.
    """
    reached = [other >= score for other in good]
    return (1 + sum(reached)) / (1 + len(reached))


def images_needed(rate: float) -> int:
    """The fewest good images that carry a rate."""
    return math.ceil(1 / rate - 1e-9) - 1


def refuse(rate: float, count: int) -> None:
    """Raise `OptionError` where so many good images cannot carry the rate."""
    needed = images_needed(rate)
    if count < needed:
        lowest = math.ceil(1000 / (count + 1)) / 1000
        lower = f", or give `false_alarms={lowest:g}`, {one_in(1 / (count + 1))}" if count else ""
        raise OptionError(
            f"`false_alarms={rate:g}` needs {needed} good images to set the threshold, and there are {count}. "
            f"Add {needed - count} more{lower}."
        )


def upper(hits: int, total: int, confidence: float = CONFIDENCE) -> float:
    """The largest rate of which `hits` or fewer in `total` still come with probability 1 − confidence, exactly.

    It is the quantile of Beta(hits + 1, total − hits), Clopper and Pearson's bound.
    """
    if hits >= total:
        return 1.0
    return _solve(lambda rate: _at_most_hits(hits, total, rate) > 1 - confidence)


def interval(hits: int, total: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Where the true rate lies, given `hits` of `total` (Clopper and Pearson)."""
    one_sided = (1 + confidence) / 2
    return 1 - upper(total - hits, total, one_sided), upper(hits, total, one_sided)


def one_in(rate: float) -> str:
    """0.02 → "1 in 50"."""
    return f"1 in {round(1 / rate):,}" if 1 / rate >= 9.5 or rate == 1 / round(1 / rate) else f"{100 * rate:.0f} %"


def percent(rate: float) -> str:
    """0.021 → "2.1 %"."""
    return f"{100 * rate:.1f}".removesuffix(".0") + " %"


def _at_most(rate: float) -> str:
    """As `one_in`, rounded to the safe side."""
    return f"1 in {math.floor(1 / rate + 1e-9):,}" if rate < 0.105 else f"{math.ceil(100 * rate - 1e-9)} %"


def _allowed(rate: float, count: int) -> int:
    """j: one more than the scores that may lie above the threshold."""
    return max(1, math.floor(rate * (count + 1) + 1e-9))


def _at_most_hits(hits: int, total: int, rate: float) -> float:
    """P(X ≤ hits) for X ~ Binomial(total, rate), 0 < rate < 1."""

    def log_probability(k: int) -> float:
        log_ways = math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1)
        return log_ways + k * math.log(rate) + (total - k) * math.log1p(-rate)

    return math.fsum(math.exp(log_probability(k)) for k in range(hits + 1))


def _solve(below: Callable[[float], bool]) -> float:
    """The rate in (0, 1) up to which `below` holds, by bisection."""
    low, high = 0.0, 1.0
    while high - low > 1e-12:
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) else (low, middle)
    return high
