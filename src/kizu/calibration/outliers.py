"""Outliers: training images that look unlike the others, for a second look before they teach the model wrong."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Outlier", "find_outliers"]

FENCE = 1.5  # interquartile ranges above the upper quartile (Tukey)
MIN_IMAGES = 8  # fewer say nothing of each other


@dataclass(frozen=True)
class Outlier:
    """A training image that the others do not explain."""

    number: int
    name: str
    score: float  # as if the model had not learned from it


def find_outliers(scores: Mapping[int, float], names: Sequence[str]) -> list[Outlier]:
    """The images that score far above the others, the farthest first.

    `scores` are by the number of an image, each as if the model had not learned from it.
    """
    if len(scores) < MIN_IMAGES:
        return []
    lower, upper = np.quantile(list(scores.values()), [0.25, 0.75])
    limit = upper + FENCE * (upper - lower)
    outliers = [Outlier(number, names[number], score) for number, score in scores.items() if score > limit]
    return sorted(outliers, key=lambda outlier: -outlier.score)
