"""The pass/fail level, from scores of good images only."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Threshold", "calibrate"]


@dataclass(frozen=True)
class Threshold:
    """A part is stopped when its score is greater than `value`."""

    value: float
    rate: float  # the share of good parts that may be stopped, as asked for
    count: int  # good images behind it

    @property
    def supported(self) -> float:
        """The lowest rate that so many images can carry: 1 in count + 1."""
        return 1 / (self.count + 1)

    @property
    def statement(self) -> str:
        """The promise in one sentence."""
        if self.count == 0:
            return "No good image was left over to set a level from, so nothing is stopped: train on more images."
        if self.rate >= self.supported - 1e-12:
            return (
                f"About {one_in(self.rate)} good parts will be stopped: the level comes from {self.count} good images, "
                "each judged as if it were new."
            )
        needed = math.ceil(1 / self.rate) - 1
        return (
            f"{one_in(self.rate)} was asked for, but {self.count} good images carry at best {one_in(self.supported)}, "
            f"and that is where the level lies; {needed} good images are needed."
        )


def calibrate(scores: Sequence[float], rate: float) -> Threshold:
    """The level that a new good part passes with probability at least 1 − rate, if it is like these (n of them).

    It is the ⌈(n + 1)(1 − rate)⌉-th smallest score (split conformal prediction), or the largest where n is too small,
    or infinite where there is none.
    """
    ordered = sorted(scores)
    if not ordered:
        return Threshold(math.inf, rate, 0)
    rank = math.ceil((len(ordered) + 1) * (1 - rate) - 1e-9)
    return Threshold(float(ordered[min(rank, len(ordered)) - 1]), rate, len(ordered))


def one_in(rate: float) -> str:
    """0.02 → "1 in 50"."""
    return f"1 in {round(1 / rate):,}" if 1 / rate >= 9.5 or rate == 1 / round(1 / rate) else f"{rate:.0%}"
