"""What a finished detector says of good images that it did not learn from; its levels, from these alone."""

import statistics
from collections.abc import Iterable
from typing import Any

import torch

from kizu.detectors.detector import Detector, Learned, Progress
from kizu.errors import DataError, ModelError
from kizu.preprocess import Stack

__all__ = ["judged", "set_levels"]


def judged(detector: Detector, photos: Stack, progress: Progress) -> Learned:
    """The detector's graph, and its scores and maps of all the photos."""
    if detector.graph is None:
        raise ModelError("This detector has learned nothing yet: call fit first, or kizu.load a saved model.")
    scores: list[float] = []
    peaks: list[float] = []
    medians: list[float] = []
    with torch.inference_mode():
        for _, pixels in detector.stream(photos, "Threshold", progress):
            some, maps = detector.graph(pixels)
            scores += some.tolist()
            peaks += maps.flatten(1).amax(1).tolist()
            medians += maps.flatten(1).median(1).values.tolist()
    median = statistics.median(medians) if medians else 0.0
    return Learned(detector.graph, scores, peaks, median, detector.facts, judged=list(range(len(scores))))


def set_levels(detector: Detector, good: Iterable[Any], progress: Progress = lambda stage, done, total: None) -> None:
    """Give a detector a threshold from photographs of good parts that it did not learn from.

    Raises `DataError` where there are none, or some of them cannot be read.
    """
    photos, _ = detector.read(good, 1 << 30, False, progress)
    with photos:
        if not len(photos):
            raise DataError("There is no photograph of a good part to set the threshold with.")
        detector.adopt(judged(detector, photos, progress))
