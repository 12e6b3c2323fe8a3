"""What every model is, freshly learned, loaded or exported: photographs in, verdicts out. Needs no torch."""

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from kizu.calibration.threshold import Threshold, p_value
from kizu.data import image as images
from kizu.data.preprocessing import Preprocessing, Readable, batches, digests
from kizu.data.sample import Sample
from kizu.errors import BadImage
from kizu.inference.evidence import Evidence, Lookalike, evidence
from kizu.inference.regions import MarkedRegion, find_regions

__all__ = ["BATCH", "Inspector", "Photo", "Prediction", "name_of", "readable"]

BATCH = 8
Item = TypeVar("Item", bound=Readable)


@dataclass(frozen=True)
class Photo:
    """A photograph from anywhere: a file's path, encoded bytes, an array or a PIL image."""

    source: images.Source

    def read(self, at_least: tuple[int, int] | None = None) -> tuple[npt.NDArray[np.uint8], tuple[int, int]]:
        return images.read_at_least(self.source, at_least)

    @property
    def name(self) -> str:
        return images.name_of(self.source)


@dataclass(frozen=True)
class Prediction:
    """What a detector says of one photograph. Unpacks to (score, anomaly map)."""

    score: float
    threshold: float
    input_map: images.Float  # (h, w), of the network's input
    shape: tuple[int, int]  # of the photograph
    item: Readable
    detector: "Inspector"
    parts: dict[str, Any] = field(default_factory=dict)  # what the score is made of, where a method says more

    def __iter__(self) -> Iterator[Any]:
        return iter((self.score, self.anomaly_map))

    @property
    def is_anomalous(self) -> bool:
        """Whether to stop the part."""
        return self.score > self.threshold

    @property
    def p_value(self) -> float:
        """How often a good part looks at least so unusual, at most. Stopped is what lies at or below the rate."""
        return p_value(self.score, self.detector.calibration_scores)

    @cached_property
    def anomaly_map(self) -> images.Float:
        """(H, W) float32 over the photograph: how anomalous each pixel's surroundings are."""
        return self.detector.preprocessing.restore(self.input_map, self.shape)

    @property
    def marked(self) -> npt.NDArray[np.bool_]:
        """(H, W): the pixels above the level that good images reach as rarely as the threshold is passed."""
        return self.anomaly_map > self.detector.map_level

    @cached_property
    def regions(self) -> list[MarkedRegion]:
        """What is marked, region by region, the most anomalous first."""
        level = self.detector.map_level
        return find_regions(self.anomaly_map, level, self.detector.map_peaks) if self.input_map.max() > level else []

    def why(self) -> list[Evidence]:
        """For the most anomalous places, the good patches from training that look most like them.

        Empty for methods that remember no patches. Raises `BadImage` when the photograph cannot be read any more.
        """
        return evidence(self)

    def overlay(self) -> npt.NDArray[np.uint8]:
        """The photograph, its map glowing over it, contours and numbered boxes where it is marked. (H, W, 3) uint8."""
        glow = images.overlay(self.item.read()[0], self.anomaly_map, *self.detector.scale, self.detector.map_level)
        return images.framed(glow, [region.box for region in self.regions])


class Inspector(ABC):
    """Base of whatever judges photographs: preprocessing, levels, what was learned from; a subclass gives the call."""

    method: str  # by which it learned
    config: Any  # the method's hyper-parameters

    def __init__(self, preprocessing: Preprocessing, rate: float) -> None:
        self.preprocessing = preprocessing
        self.threshold = Threshold(float("inf"), rate, 0)
        self.calibration_scores: list[float] = []
        self.map_peaks: list[float] = []
        self.map_level = float("inf")
        self.scale = (0.0, 1.0)
        self.training: dict[str, Any] = {}
        self.facts: dict[str, Any] = {}
        self.thumbnails: list[bytes] = []  # of the training images, encoded, if they are kept
        self.good_items: list[Readable | None] = []  # the training images, as long as their files are at hand
        self.remarks: list[str] = []  # on the settings, for the user
        self.curves: dict[str, list[float]] = {}  # of training, a value a round
        self.seconds: dict[str, float] = {}  # of training, by stage
        self.workers = 2  # threads that read photographs

    @abstractmethod
    def __call__(self, pixels: npt.NDArray[np.uint8]) -> tuple[images.Float, images.Float]:
        """The graph on a batch: (B, 3, h, w) uint8 → scores (B,), maps (B, 1, h, w)."""

    @abstractmethod
    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the model as a folder. Raises `ModelError` where it cannot be written."""

    def predict(self, image: images.Source | Readable) -> Prediction:
        """Judge one photograph. Raises `BadImage` when it cannot be read."""
        for _, outcome in self.judge([readable(image)], batch_size=1):
            if isinstance(outcome, BadImage):
                raise outcome
            return outcome
        raise AssertionError("one image gives one outcome")

    def judge(
        self, items: Iterable[Item], *, batch_size: int = BATCH, workers: int | None = None
    ) -> Iterator[tuple[Item, Prediction | BadImage]]:
        """Judge many, in threads ahead of the network; what cannot be read comes with its error."""
        for batch in batches(items, self.preprocessing, batch_size=batch_size, workers=workers or self.workers):
            yield from batch.failures
            if not batch.items:
                continue
            judged = zip(batch.items, batch.shapes, *self.explained(batch.pixels), strict=True)
            for item, shape, score, anomaly_map, parts in judged:
                yield item, Prediction(float(score), self.threshold.value, anomaly_map[0], shape, item, self, parts)

    def explained(self, pixels: npt.NDArray[np.uint8]) -> tuple[images.Float, images.Float, list[dict[str, Any]]]:
        """As a call, and what each image's score is made of: nothing to say, unless a method has more."""
        return *self(pixels), [{} for _ in pixels]

    def picture(self, number: int) -> npt.NDArray[np.uint8] | None:
        """A training image as the network sees it, from the model's thumbnails or its own file; None if neither is."""
        if number < len(self.thumbnails):
            return images.resize(images.read(self.thumbnails[number]), self.preprocessing.size)
        item = self.good_items[number] if number < len(self.good_items) else None
        try:
            return None if item is None else self.preprocessing(item.read(self.preprocessing.enough)[0])
        except BadImage:
            return None

    def nearest_good(self, seen: npt.NDArray[np.uint8], place: tuple[float, float]) -> Lookalike | None:
        """The training patch nearest to a place (x, y) of a photograph as the network sees it (h, w, 3).

        None for methods that remember no patches.
        """
        return None

    def knows(self, items: Iterable[Readable]) -> int:
        """How many of these photographs it has learned from."""
        learned = set(self.training["digests"])
        return sum(d in learned for batch in batches(items, self.preprocessing) for d in digests(batch.pixels))

    def restore_levels(self, about: dict[str, Any]) -> None:
        """Take levels and facts as `describe` gave them."""
        level = about["threshold"]
        self.threshold = Threshold(_finite(level["value"]), level["rate"], level["count"], level["tuned"])
        self.calibration_scores, self.map_peaks = about["calibration_scores"], about["map"]["peaks"]
        self.map_level, self.scale = _finite(about["map"]["level"]), tuple(about["map"]["scale"])
        self.facts, self.training = about["facts"], about["training"]


def _finite(level: float | None) -> float:
    return math.inf if level is None else level


def readable(image: Any) -> Readable:
    """Samples and photos as they are; paths, arrays, bytes and PIL images as photos."""
    return image if isinstance(image, Sample | Photo) else Photo(image)


def name_of(item: Readable) -> str:
    return item.path.name if isinstance(item, Sample) else getattr(item, "name", "image")
