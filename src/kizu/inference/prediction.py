"""A photograph, what a model says of it, and why."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from kizu.calibration.threshold import p_value
from kizu.data import image
from kizu.data.geometry.alignment import Pose
from kizu.data.image import Float, Source
from kizu.data.preprocessing import Readable
from kizu.data.sample import Sample
from kizu.errors import BadImage
from kizu.inference.regions import HALF, MarkedRegion, Marking, find_regions, find_regions_in_cells

if TYPE_CHECKING:
    from kizu.inference.inspector import Inspector

__all__ = ["Evidence", "NearestPatch", "Photo", "Prediction", "name_of", "path_of", "readable"]

MAX_OVERLAY = 4_000_000  # pixels of the picture of a photograph that is judged in tiles
RGB = npt.NDArray[np.uint8]  # (H, W, 3)


@dataclass(frozen=True)
class Photo:
    """A photograph from anywhere: a file's path, encoded bytes, an array or a PIL image."""

    source: Source

    def __repr__(self) -> str:
        return f"Photo({self.name!r})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Photo):
            return NotImplemented
        if isinstance(self.source, np.ndarray) or isinstance(other.source, np.ndarray):
            return np.array_equal(self.source, other.source)  # type: ignore[arg-type]
        return self.source == other.source

    def __hash__(self) -> int:
        return hash(self.name)

    def read(
        self, at_least: tuple[int, int] | None = None, white: int = image.WHITE, *, large: bool = False
    ) -> tuple[RGB, tuple[int, int]]:
        return image.read_at_least(self.source, at_least, white, large=large)

    @property
    def name(self) -> str:
        return image.name_of(self.source)


@dataclass(frozen=True)
class NearestPatch:
    """The patch of a good training image that is nearest to a patch of the photograph."""

    image: str  # name of the training image
    number: int  # of the training image
    place: tuple[float, float] | None  # x, y of its centre, shares of width and height; None: in a varied copy
    distance: float  # in units of what is typical of good parts there


@dataclass(frozen=True)
class Evidence:
    """A marked place, the nearest good patch, and both as pictures."""

    region: int  # number of the marked region, from 1; 0: the highest place of a photograph without marked regions
    nearest: NearestPatch
    query_crop: RGB  # what the network sees around the marked place
    match_crop: RGB | None  # what it saw around the nearest good patch, where a picture of that image is at hand


@dataclass(frozen=True, eq=False, repr=False)
class Prediction:
    """What a model says of one photograph. Unpacks to (score, anomaly map).

    Predictions are equal where score, threshold and every value of the map are. A notebook shows the overlay.
    """

    score: float
    threshold: float
    input_map: Float  # (h, w), of the network's input; of a photograph that is judged in tiles, in cells of it
    shape: tuple[int, int]  # of the photograph
    item: Readable
    detector: "Inspector"
    parts: dict[str, Any] = field(default_factory=dict)  # what the score is made of, where the method says more
    pose: Pose | None = None  # that the part was found in, by a model that aligns photographs
    cannot_judge: str = ""  # why no promise covers the photograph, as of one that is out of focus; empty where one does

    def __iter__(self) -> Iterator[Any]:
        return iter((self.score, self.anomaly_map))

    def __repr__(self) -> str:
        score, threshold = f"score {self.score:.4g}", f"threshold {self.threshold:.4g}"
        return f"Prediction({name_of(self.item)!r}, {self.verdict}: {score}, {threshold})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Prediction):
            return NotImplemented
        same = (self.score, self.threshold, self.shape) == (other.score, other.threshold, other.shape)
        return same and np.array_equal(self.input_map, other.input_map)

    def __hash__(self) -> int:
        return hash((self.score, self.threshold, self.shape))

    def to_dict(self) -> dict[str, Any]:
        """The verdict as plain values, as the server gives it."""
        from kizu.inference.verdict import Verdict

        return Verdict.of(name_of(self.item), self, self.detector).model_dump()

    def _repr_png_(self) -> bytes | None:
        try:
            return image.encode(self.overlay())
        except BadImage:  # it was moved meanwhile: the text is shown
            return None

    @property
    def verdict(self) -> Literal["pass", "stop", "ask"]:
        """What to do with the part. What cannot be judged gets the answer that the settings have for it."""
        if self.cannot_judge:
            answer: Literal["pass", "stop", "ask"] = self.detector.config.cannot_judge
            return answer
        return "stop" if self.score > self.threshold else "pass"

    @property
    def is_anomalous(self) -> bool:
        """Whether to stop the part."""
        return self.verdict == "stop"

    @property
    def p_value(self) -> float:
        """At most this share of good parts scores as high. At or below the promised rate, the part is stopped."""
        return p_value(self.score, self.detector.calibration_scores)

    @cached_property
    def anomaly_map(self) -> Float:
        """(H, W) float32 over the photograph: how anomalous each pixel's surroundings are."""
        return self.map_of(self.shape)

    def map_of(self, size: tuple[int, int]) -> Float:
        """The anomaly map scaled to another (height, width), and not kept."""
        preprocessing = self.detector.preprocessing
        if preprocessing.tiling is not None:
            return preprocessing.tiling.grid(self.shape).over(self.input_map, size)
        return preprocessing.restore(self.input_map, size, self.pose)

    @property
    def marked(self) -> npt.NDArray[np.bool_]:
        """(H, W): the pixels above the pixel threshold, which no more good images reach than may be stopped."""
        return self.anomaly_map > self.detector.pixel_threshold

    @cached_property
    def regions(self) -> list[MarkedRegion]:
        """What is marked, region by region: what matters first, and of that the most anomalous."""
        threshold = self.detector.pixel_threshold
        if not self.input_map.max() > threshold:
            return []
        preprocessing, rules = self.detector.preprocessing, self.detector.size_rules
        marking = Marking(threshold, self.detector.map_peaks, self.detector.ruler(self.shape))
        large = None if rules is None else rules.large_enough(self.input_map, threshold)
        if preprocessing.tiling is not None:
            return find_regions_in_cells(preprocessing.tiling.grid(self.shape), self.input_map, marking, large)
        if large is not None:
            large = preprocessing.restore(large.astype(np.float32), self.shape, self.pose) > HALF
        found = find_regions(self.anomaly_map, marking, large)
        if preprocessing.zones is None:
            return found
        places = [preprocessing.locate(region.place, self.shape, self.pose) for region in found]
        names = [preprocessing.zones.name_at(*place) for place in places]
        return [replace(region, zone=name) for region, name in zip(found, names, strict=True)]

    @property
    def zone(self) -> str:
        """The name of the zone where the photograph is most anomalous; empty where nobody named any."""
        zones = self.detector.preprocessing.zones
        y, x = divmod(int(self.input_map.argmax()), self.input_map.shape[1])
        return "" if zones is None else zones.name_at(x, y)

    def photograph(self) -> RGB:
        """The photograph as the model reads it, (H, W, 3). Raises `BadImage` when it cannot be read any more."""
        return self.detector.preprocessing.read(self.item)[0]

    def why(self) -> list[Evidence]:
        """For the most anomalous places, the good patches from training that look most like them.

        Empty for methods that remember no patches. Raises `BadImage` when the photograph cannot be read any more.
        """
        return self.detector.explain(self)

    def overlay(self) -> RGB:
        """The photograph, its map glowing over it, contours and numbered boxes where it is marked. (H, W, 3) uint8.

        Of a photograph that is judged in tiles it has 4 megapixels at most.
        """
        photo, boxes = self.photograph(), [region.box for region in self.regions]
        if self.detector.preprocessing.tiling is not None:
            share = min(1.0, (MAX_OVERLAY / (self.shape[0] * self.shape[1])) ** 0.5)
            photo = image.small(photo, round(max(self.shape) * share))
            boxes = [tuple(round(length * share) for length in box) for box in boxes]
        anomaly_map = self.anomaly_map if photo.shape[:2] == self.shape else self.map_of(photo.shape[:2])
        glow = image.overlay(photo, anomaly_map, *self.detector.heat_map_range, self.detector.pixel_threshold)
        return image.framed(glow, boxes, sum(region.matters for region in self.regions))


def readable(source: Source | Sample | Photo) -> Sample | Photo:
    """Samples and photos as they are; paths, arrays, bytes and PIL images as photos."""
    return source if isinstance(source, Sample | Photo) else Photo(source)


def path_of(item: Readable) -> Path | None:
    """The file that a photograph is read from, if it is from one."""
    source = item.path if isinstance(item, Sample) else getattr(item, "source", None)
    return Path(source) if isinstance(source, str | os.PathLike) else None


def name_of(item: Readable) -> str:
    """What to call a photograph in a list."""
    return item.path.name if isinstance(item, Sample) else getattr(item, "name", "image")
