"""Levels for a detector that is finished already, from good images that it did not learn from."""

from collections.abc import Iterable
from typing import Any

from kizu.detectors.base import Detector, Progress
from kizu.errors import DataError

__all__ = ["set_levels"]


def set_levels(detector: Detector, good: Iterable[Any], progress: Progress = lambda stage, done, total: None) -> None:
    """Give a detector a threshold from photographs of good parts that it did not learn from.

    Raises `DataError` where there are none, or some of them cannot be read.
    """
    photos, _ = detector.read(good, 1 << 30, False, progress)
    with photos:
        if not len(photos):
            raise DataError("There is no photograph of a good part to set the threshold with.")
        assert detector.graph is not None
        detector.adopt(detector.judged(detector.graph, photos, progress))
