"""Bad apples: training images that look unlike the others, for a second look before they teach the detector wrong."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Suspect", "suspects"]

OUTSIDE = 1.5  # interquartile ranges above the upper quartile: Tukey's fence
FEWEST = 8  # images below which nothing is said


@dataclass(frozen=True)
class Suspect:
    """A training image that the others do not explain."""

    number: int
    name: str
    score: float  # as if it had not been learned from

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Suspect":
        return cls(values["number"], values["name"], values["score"])


def suspects(scores: Mapping[int, float], names: Sequence[str]) -> list[Suspect]:
    """Images whose scores, each judged as if it were new, lie outside the others', the farthest first."""
    if len(scores) < FEWEST:
        return []
    low, high = np.quantile(list(scores.values()), [0.25, 0.75])
    limit = high + OUTSIDE * (high - low)
    found = [Suspect(number, names[number], score) for number, score in scores.items() if score > limit]
    return sorted(found, key=lambda suspect: -suspect.score)
