"""The base of every model, freshly trained, loaded or exported: photographs in, predictions out."""

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import numpy.typing as npt

from kizu.calibration.captures import Captures
from kizu.calibration.sizes import Levels, Ruler, SizeRules
from kizu.calibration.threshold import Threshold, by_hand, calibrate, from_finite, pixel_threshold_at
from kizu.data.geometry.alignment import Alignment
from kizu.data.geometry.tiling import TiledMap
from kizu.data.image import Float, Source, read, resize
from kizu.data.preprocessing import Batch, Preprocessing, Readable, batches, digests, whole
from kizu.data.progress import Progress, silent
from kizu.data.sample import Sample
from kizu.errors import BadImage, OptionError
from kizu.inference.evidence import MAX_REGIONS, crop, places
from kizu.inference.prediction import Evidence, NearestPatch, Photo, Prediction, name_of, readable

__all__ = ["BATCH", "Inspector"]

BATCH = 8
NO_SCORE = "got a score or a map with values that are no finite numbers: the model cannot judge it"
Item = TypeVar("Item", bound=Readable)


class Inspector(ABC):
    """A model with its preprocessing, thresholds and what is known of its training; a subclass gives the call."""

    method: str  # patchcore, simplenet, …
    config: Any  # the method's hyper-parameters
    graph: Any = None  # the torch module of a trained model; an exported one's has no parts to tell apart

    def __init__(self, preprocessing: Preprocessing, rate: float) -> None:
        self.preprocessing = preprocessing
        self._threshold = Threshold(float("inf"), rate, 0)
        self.calibration_scores: list[float] = []
        self.map_peaks: list[float] = []
        self.pixel_threshold = float("inf")
        self.heat_map_range = (0.0, 1.0)
        self.size_rules: SizeRules | None = None  # what is too small to matter, where the settings say so,
        self.measured_on: tuple[int, int] | None = None  # on photographs of this (height, width)
        self.map_levels: Levels | None = None  # from which they are measured
        self.captures: Captures | None = None  # how good photographs are taken, where others are not judged
        self.training: dict[str, Any] = {}
        self.facts: dict[str, Any] = {}
        self.thumbnails: list[bytes] = []  # of the training images, or their tiles, encoded, if they are kept
        self.good_items: list[Readable | None] = []  # the training images, as long as their files are at hand
        self.remarks: list[str] = []  # on the settings, for the user
        self.curves: dict[str, list[float]] = {}  # of training, a value a round
        self.seconds: dict[str, float] = {}  # of training, by stage
        self.workers = 2  # threads that read photographs

    def __repr__(self) -> str:
        height, width = self.preprocessing.size
        learned = self.training.get("images", 0)
        state = f"of {learned} photographs, stops above {self.threshold.value:.4g}" if learned else "not fitted"
        return f"<{type(self).__name__} {state}, {width}×{height}>"

    @property
    def zone_thresholds(self) -> dict[str, float]:
        """For each of several zones, the score of a place in it above which it stops a part, in the method's units."""
        units = self.facts.get("zones", {})
        if self.preprocessing.zones is None or "unit" not in units:
            return {}
        rows = zip(self.preprocessing.zones.names, units["typical"], units["unit"], strict=True)
        return {name: typical + self.threshold.value * unit for name, typical, unit in rows}

    @property
    def threshold(self) -> Threshold:
        """Above which score a part is stopped, and what that promises."""
        return self._threshold

    @threshold.setter
    def threshold(self, threshold: Threshold) -> None:
        if not isinstance(threshold, Threshold):
            raise OptionError(
                f"`threshold={threshold}` is no Threshold; with_threshold gives a model with such a value"
            )
        self._threshold = threshold

    def with_threshold(self, value: float | None, *, set_by: str = "") -> Self:
        """The same model with a threshold that was chosen by hand; its statement says so, and what follows from it.

        None is the one that the good images give. `set_by`, with the time, goes into the statement. The pixel threshold
        moves with it. Raises `OptionError` for a value that is no finite number, or too low for rules for sizes.
        """
        changed = object.__new__(type(self))
        changed.__dict__ |= self.__dict__  # with the graph as it is, which a copy of an exported model would open again
        if value is None:
            before = self.threshold
            changed.threshold = replace(self.calibrated(before.rate), grouped=before.grouped)
            changed.pixel_threshold = changed.calibrated_pixels(before.rate)
        else:
            changed.set_threshold(by_hand(value, self.threshold, self.calibration_scores, set_by))
        return changed

    def calibrated(self, rate: float) -> Threshold:
        """The threshold that the good images give; with zones that have promises of their own, the one that keeps all.

        That one lies no lower, so that it keeps the promise for all zones together too.
        """
        threshold = calibrate(self.calibration_scores, rate)
        level = self.facts.get("zones", {}).get("level")
        return threshold if level is None else replace(threshold, value=max(level, threshold.value))

    @property
    def graph_decides(self) -> bool:
        """Whether a graph's score is what is compared with the threshold, and not one that follows from its maps."""
        return self.size_rules is None and self.preprocessing.tiling is None

    def calibrated_pixels(self, rate: float) -> float:
        """The pixel threshold that the good images give; with rules for sizes it is the threshold itself."""
        return calibrate(self.map_peaks, rate).value if self.size_rules is None else self.threshold.value

    def set_threshold(self, threshold: Threshold) -> None:
        """Set the threshold, and the pixel threshold that goes with it.

        Raises `OptionError` for one that is lower than rules for sizes look at.
        """
        if self.size_rules is not None and threshold.value < self.size_rules.levels.lowest:
            raise OptionError(
                f"`threshold={threshold.value:g}`: with rules for sizes it is no lower than "
                f"{self.size_rules.levels.lowest:.4g}, which places of good parts reach"
            )
        self.threshold = threshold
        self.pixel_threshold = self.pixel_threshold_at(threshold.value)

    def pixel_threshold_at(self, value: float) -> float:
        """The pixel threshold that goes with another threshold."""
        if self.size_rules is not None:
            return max(value, self.size_rules.levels.lowest)
        return pixel_threshold_at(value, self.calibration_scores, self.map_peaks)

    def measure_on(self, frame: tuple[int, int] | None, levels: Levels | None = None) -> None:
        """Take the settings' rules for sizes, which are those on photographs of this (height, width).

        They hold as soon as it is known which `levels` maps of good parts have.
        """
        self.measured_on, self.map_levels, self.size_rules = frame, levels, None
        if frame is not None and levels is not None and self.config.rules_sizes:
            high, wide = self.preprocessing.pixel(frame)
            unit, zones = self.config.pixel_size or 1.0, self.preprocessing.zones
            numbers = None if zones is None else zones.numbers
            self.size_rules = SizeRules.of(self.config, (unit * high, unit * wide), levels, numbers)

    def ruler(self, shape: tuple[int, int]) -> Ruler | None:
        """What measures in a photograph of `shape`, where the settings speak of sizes.

        A photograph of another size than those learned from is taken to show as much.
        """
        if self.measured_on is None or self.map_levels is None:
            return None
        size: float | None = self.config.pixel_size
        if self.preprocessing.tiling is not None:  # of photographs of any size, taken from as far
            shape = self.measured_on
        high, wide = ((size or 1.0) * learned / side for learned, side in zip(self.measured_on, shape, strict=True))
        return Ruler((high, wide), "px" if size is None else "mm", self.map_levels)

    @abstractmethod
    def __call__(self, pixels: npt.NDArray[np.uint8]) -> tuple[Float, Float]:
        """The graph on a batch: (B, 3, h, w) uint8 → scores (B,), maps (B, 1, h, w)."""

    def score_images(self, pixels: npt.NDArray[np.uint8]) -> tuple[Float, Float]:
        """As a call, but with scores as the threshold is for."""
        scores, maps = self(pixels)
        return self.ruled(scores, maps), maps

    def ruled(self, scores: Float, maps: Float) -> Float:
        """Scores (B,) as the threshold is for: with rules for sizes, those that follow from the maps (B, 1, h, w).

        Of tiles they stay as they are: the rules are for the map of the whole photograph.
        """
        if self.size_rules is None or self.preprocessing.tiling is not None:
            return scores
        return self.size_rules.scores(maps, self.threshold.value)

    @abstractmethod
    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the model as a folder. Raises `ModelError` where it cannot be written."""

    def predict(self, image: Source | Sample | Photo) -> Prediction:
        """Judge one photograph. Raises `BadImage` when it cannot be read."""
        for _, outcome in self.judge([readable(image)], batch_size=1):
            if isinstance(outcome, BadImage):
                raise outcome
            return outcome
        raise AssertionError("one image gives one outcome")

    def predict_many(
        self, images: Iterable[Source | Sample | Photo], *, batch_size: int = BATCH, workers: int | None = None
    ) -> Iterator[Prediction | BadImage]:
        """Judge many photographs, in their order: a prediction, or the `BadImage` of one that cannot be read."""
        judged = self.judge(map(readable, images), batch_size=batch_size, workers=workers)
        return (outcome for _, outcome in judged)

    def judge(
        self,
        items: Iterable[Item],
        *,
        batch_size: int = BATCH,
        workers: int | None = None,
        progress: Progress = silent,
    ) -> Iterator[tuple[Item, Prediction | BadImage]]:
        """Judge many photographs, in their order, read in threads ahead of the network.

        One that cannot be read comes with its error and stops no other. `progress` hears of the tiles of each that is
        judged in tiles.
        """
        if self.preprocessing.tiling is not None:
            for item, photo in whole(items, self.preprocessing):
                outcome = photo if isinstance(photo, BadImage) else self._judged_in_tiles(item, photo, progress)
                del photo  # before the next one is read
                yield item, outcome
            return
        for batch in batches(items, self.preprocessing, batch_size=batch_size, workers=workers or self.workers):
            outcomes, failures = self._judged(batch), iter(batch.failures)
            for was_read in batch.was_read:
                yield next(outcomes) if was_read else next(failures)

    def _judged(self, batch: Batch[Item]) -> Iterator[tuple[Item, Prediction | BadImage]]:
        scored = self._scored(batch.pixels) if batch.items else []
        photos = zip(batch.items, batch.shapes, batch.poses, batch.pixels, scored, strict=True)
        for item, shape, pose, pixels, outcome in photos:
            if isinstance(outcome, str):
                yield item, BadImage(name_of(item), outcome)
                continue
            score, anomaly_map, parts = outcome
            why = "" if self.captures is None else self.captures.reason(pixels, shape)
            yield item, Prediction(score, self.threshold.value, anomaly_map, shape, item, self, parts, pose, why)

    def _judged_in_tiles(
        self, item: Readable, photo: npt.NDArray[np.uint8], progress: Progress
    ) -> Prediction | BadImage:
        """The verdict on a photograph (H, W, 3), by the map that those of its tiles make together."""
        assert self.preprocessing.tiling is not None
        grid = self.preprocessing.tiling.grid((photo.shape[0], photo.shape[1]))
        tiled_map, done = TiledMap(grid), 0
        for pixels in grid.batches(photo, BATCH):
            for outcome in self._scored(pixels):
                if isinstance(outcome, str):
                    return BadImage(name_of(item), outcome)
                tiled_map.lay(outcome[1])
            done += len(pixels)
            progress(f"Tiles: {name_of(item)}", done, len(grid))
        values = tiled_map.values
        score = tiled_map.score if self.size_rules is None else self.size_rules.score(values, self.threshold.value)
        seen = self.preprocessing(photo).transpose(2, 0, 1) if self.captures is not None else photo
        why = "" if self.captures is None else self.captures.reason(seen, grid.shape)
        return Prediction(score, self.threshold.value, values, grid.shape, item, self, cannot_judge=why)

    def _scored(self, pixels: npt.NDArray[np.uint8]) -> list[tuple[float, Float, dict[str, Any]] | str]:
        """For each image its score, map and parts, or why it has none.

        A batch that fails is scored again image by image, so that none takes others with it; if all fail, the model
        does, and the error is raised.
        """
        try:
            scores, maps, parts = self.score_in_parts(pixels)
        except Exception:
            if len(pixels) == 1:
                raise
            return self._scored_one_by_one(pixels)
        if np.isfinite(maps).all():
            scores = self.ruled(scores, maps)
        rows = zip(scores.tolist(), maps[:, 0], parts, strict=True)
        return [row if math.isfinite(row[0]) and np.isfinite(row[1]).all() else NO_SCORE for row in rows]

    def _scored_one_by_one(self, pixels: npt.NDArray[np.uint8]) -> list[tuple[float, Float, dict[str, Any]] | str]:
        outcomes: list[tuple[float, Float, dict[str, Any]] | str] = []
        errors: list[Exception] = []
        for number in range(len(pixels)):
            try:
                outcomes += self._scored(pixels[number : number + 1])
            except Exception as error:
                errors.append(error)
                outcomes.append(f"could not be judged ({type(error).__name__}: {error})")
        if len(errors) == len(pixels):
            raise errors[0]
        return outcomes

    def score_in_parts(self, pixels: npt.NDArray[np.uint8]) -> tuple[Float, Float, list[dict[str, Any]]]:
        """Scores and maps as of a call, and what each score is made of: an empty dict, unless a method says more."""
        return *self(pixels), [{} for _ in pixels]

    @property
    def tiles(self) -> list[tuple[int, int]]:
        """Of each tile that the model learned from, the number of its photograph, and its number among those of it."""
        tiling, shapes = self.preprocessing.tiling, self.training.get("shapes", [])
        if tiling is None:
            return []
        return [(photo, tile) for photo, (h, w) in enumerate(shapes) for tile in range(len(tiling.grid((h, w))))]

    @property
    def names(self) -> list[str]:
        """What the pictures that the network learned from are called: the training images, or those of their tiles."""
        names: list[str] = self.training["names"]
        return names if self.preprocessing.tiling is None else [names[photo] for photo, _ in self.tiles]

    def _of_photograph(self, nearest: NearestPatch) -> NearestPatch:
        """A patch of a tile as one of its photograph."""
        tiling = self.preprocessing.tiling
        if tiling is None:
            return nearest
        photo, tile = self.tiles[nearest.number]
        height, width = self.training["shapes"][photo]
        if nearest.place is None:
            return replace(nearest, number=photo)
        top, left = tiling.grid((height, width)).corner(tile)
        x, y = left + nearest.place[0] * tiling.tile[1], top + nearest.place[1] * tiling.tile[0]
        return replace(nearest, number=photo, place=(min(x / width, 1.0), min(y / height, 1.0)))

    def picture_of_tile(self, number: int) -> npt.NDArray[np.uint8] | None:
        """A tile that was learned from, as the network sees it; None where neither thumbnail nor file is at hand."""
        if number < len(self.thumbnails):
            return resize(read(self.thumbnails[number]), self.preprocessing.size)
        photo, tile = self.tiles[number]
        item = self.good_items[photo] if photo < len(self.good_items) else None
        assert self.preprocessing.tiling is not None
        try:
            pixels = None if item is None else self.preprocessing.read(item)[0]
        except BadImage:
            return None
        return None if pixels is None else self.preprocessing.tiling.grid(pixels.shape[:2]).seen(pixels, tile)

    def picture(self, number: int) -> npt.NDArray[np.uint8] | None:
        """A training image as the network sees it, from the model's thumbnails or its own file; None if neither is."""
        if number < len(self.thumbnails) and self.preprocessing.tiling is None:
            return resize(read(self.thumbnails[number]), self.preprocessing.size)
        item = self.good_items[number] if number < len(self.good_items) else None
        try:
            return (
                None
                if item is None
                else self.preprocessing(self.preprocessing.read(item, self.preprocessing.enough)[0])
            )
        except BadImage:
            return None

    def nearest_good(self, seen: npt.NDArray[np.uint8], place: tuple[float, float]) -> NearestPatch | None:
        """The good patch nearest to a place (x, y) of a photograph as the network sees it (h, w, 3).

        None for methods that remember no patches.
        """
        return None

    def explain(self, prediction: Prediction, max_regions: int = MAX_REGIONS) -> list[Evidence]:
        """The good patches nearest to the first marked regions, or to the highest place where nothing is marked.

        Empty for methods that remember no patches. Raises `BadImage` when the photograph cannot be read any more.
        """
        height, width = self.preprocessing.size
        photo, _ = self.preprocessing.read(prediction.item, self.preprocessing.enough)
        tiling = self.preprocessing.tiling
        seen, pose = (photo, None) if tiling is not None else self.preprocessing.posed(photo, prediction.pose)
        evidence = []
        for region, place in places(prediction)[:max_regions]:
            if tiling is None:
                x, y = self.preprocessing.locate(place, prediction.shape, pose)
            else:
                tile, (x, y) = (grid := tiling.grid(prediction.shape)).tile_at(place)
                seen = grid.seen(photo, tile)
            nearest = self.nearest_good(seen, (x, y))
            if nearest is None:
                return []
            match = self.picture(nearest.number) if tiling is None else self.picture_of_tile(nearest.number)
            if match is not None and nearest.place is not None:  # otherwise all of it is shown
                match = crop(match, nearest.place[0] * width, nearest.place[1] * height)
            evidence.append(Evidence(region, self._of_photograph(nearest), crop(seen, x, y), match))
        return evidence

    def known(self, items: Iterable[Item]) -> list[Item]:
        """Those of these photographs that the model has learned from."""
        learned = {*self.training["digests"], *self.training.get("copies", [])}
        return [
            item
            for batch in batches(items, self.preprocessing)
            for item, digest in zip(batch.items, digests(batch.pixels), strict=True)
            if digest in learned
        ]

    def restore_thresholds(self, about: dict[str, Any]) -> None:
        """Take thresholds, alignment, facts and training from a model.json."""
        if alignment := about.get("alignment"):
            self.preprocessing = replace(self.preprocessing, alignment=Alignment.from_json(alignment))
        if captures := about.get("captures"):
            self.captures = Captures.from_json(captures)
        if zones := about["facts"].get("zones"):
            height, width = zones["frame"]
            self.preprocessing = self.preprocessing.outlined(self.config.zones, (height, width))
        if bits := about["facts"].get("bits"):
            self.preprocessing = replace(self.preprocessing, white=2**bits - 1)
        if sizes := about["facts"].get("sizes"):
            self.measure_on((sizes["frame"][0], sizes["frame"][1]), Levels(sizes["typical"], sizes["lowest"]))
        self.threshold = Threshold.from_json(about["threshold"])
        self.calibration_scores, self.map_peaks = about["calibration_scores"], about["map"]["peaks"]
        self.pixel_threshold, self.heat_map_range = from_finite(about["map"]["level"]), tuple(about["map"]["scale"])
        self.facts, self.training = about["facts"], about["training"]
