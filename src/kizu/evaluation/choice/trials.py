"""How good settings are, measured without a defective part: good photographs, and made-up defects on them.

Part of the good photographs is learned from; others, and made-up defects on these, are judged. All settings are tried
on the same photographs and the same defects, so that small differences count.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from kizu.calibration.copies import first_of_each_part
from kizu.calibration.groups import highest, named, recognised
from kizu.calibration.threshold import calibrate, p_value
from kizu.data.geometry.alignment import Alignment
from kizu.data.image import RGB, WHITE, Float
from kizu.data.preprocessing import BitDepth, Preprocessing, Readable, batches
from kizu.data.progress import Progress, silent
from kizu.detectors.base import Detector
from kizu.detectors.patchcore.detector import PatchCore
from kizu.errors import DataError
from kizu.evaluation.choice.synthetic_defects import Poses, with_defect
from kizu.evaluation.metrics import image_metrics
from kizu.inference.prediction import Photo, path_of

__all__ = ["Material", "Trial", "gain", "run_trial", "strange_when_turned", "surprise", "unlikeness_left"]

Item = TypeVar("Item")

LEARN, HELD_OUT = 64, 40  # photographs at most
HELD_OUT_SHARE = 1 / 3
DEFECTS_EACH = 4  # on each photograph that is held out
MIN_PARTS = 10
LOOK = (64, 64)  # pixels of a first look at the photographs
ENOUGH = (1280, 1280)  # pixels above which a photograph may be read smaller
TIMED = 3  # photographs, one at a time
MAX_TURNED = 20  # photographs that are turned
MAX_ALIGNED = 16  # photographs by which is seen whether they are more alike in one pose


@dataclass(frozen=True)
class Material:
    """Good photographs to learn from, good ones to judge, and made-up defects on these."""

    learn: list[Readable]
    held_out: list[Readable]
    defects: list[Photo]
    kinds: list[str]  # of the defects
    shape: tuple[int, int]  # height and width of the photograph whose proportions are in the middle
    parts: int  # different ones that there are photographs of
    groups: list[int]  # a number for each photograph to learn from, equal for those that belong together,
    held_out_groups: list[int]  # and for each that is held out
    white: int = WHITE  # of photographs of more than 8 bits

    @property
    def defects_of(self) -> list[list[Photo]]:
        """The defects by the photograph that they are on."""
        return [self.defects[n : n + DEFECTS_EACH] for n in range(0, len(self.defects), DEFECTS_EACH)]

    @classmethod
    def of(
        cls,
        good: Sequence[Readable],
        seed: int,
        group_by: str | None = None,
        progress: Progress = silent,
        bits: int | None = None,
    ) -> "Material":
        """Divide good photographs evenly and make defects up. Raises `DataError` where they are too few."""
        white = BitDepth.of(good).white if bits is None else 2**bits - 1
        items, shapes, small = _each_part_once(good, white, progress)
        groups = _groups(items, small, group_by)
        every = list(dict.fromkeys(groups))
        if len(every) < MIN_PARTS:
            raise DataError(
                f"`auto`: there are photographs of {len(every)} different good parts, and the settings can be chosen "
                f"by {MIN_PARTS} or more; without `auto` the defaults are taken."
            )
        apart = {*_evenly(every, min(HELD_OUT, round(HELD_OUT_SHARE * len(every))))}
        rest, held_out = ([n for n, group in enumerate(groups) if (group in apart) is kind] for kind in (False, True))
        held_out = _evenly(held_out, min(HELD_OUT, len(held_out)))
        poses = Poses(small)
        defects, kinds = [], []
        for number, photo in enumerate(held_out):
            pixels, _ = items[photo].read(ENOUGH, white)
            for turn in range(DEFECTS_EACH):
                other, _ = items[rest[(number + turn * len(held_out)) % len(rest)]].read(ENOUGH, white)
                made = with_defect(pixels, other, poses, (seed, number, turn))
                defects.append(Photo(made.pixels))
                kinds.append(made.kind)
            progress("Made-up defects", number + 1, len(held_out))
        learn = _evenly(rest, min(LEARN, len(rest)))
        return cls(
            learn=[items[n] for n in learn],
            held_out=[items[n] for n in held_out],
            defects=defects,
            kinds=kinds,
            shape=sorted(shapes, key=lambda shape: shape[0] / shape[1])[len(shapes) // 2],
            parts=len(every),
            groups=[groups[n] for n in learn],
            held_out_groups=[groups[n] for n in held_out],
            white=white,
        )


@dataclass(frozen=True, eq=False)
class Trial:
    """Settings that were tried, and what they are worth."""

    settings: dict[str, Any]  # that differ from those that the choice began with
    learned: list[float]  # scores of the good parts that were learned from, each as if it were new,
    held_out: list[float]  # of those that were not,
    defects: list[float]  # and of the made-up defects
    rate: float  # of false alarms that was asked for
    milliseconds: float  # for one photograph that has been read, on this machine, with a bank of all photographs
    seconds: float  # that the trial took

    @cached_property
    def surprises(self) -> Float:
        """(D,): for each made-up defect the share of the rates of false alarms at which it is stopped."""
        return surprise(self._good, self.defects)

    @property
    def found(self) -> float:
        """What decides: the share of the made-up defects that are stopped, on average over the rates."""
        return float(self.surprises.mean())

    @property
    def stopped(self) -> float:
        """The share of the made-up defects that are stopped at the rate that was asked for."""
        level = calibrate(self._good, self.rate).value
        return sum(score > level for score in self.defects) / len(self.defects)

    @property
    def image_auroc(self) -> float:
        labels = [False] * len(self._good) + [True] * len(self.defects)
        return image_metrics([*self._good, *self.defects], labels)[0]["image_auroc"] or 0.0

    def within(self, other: "Trial") -> "Trial":
        """This trial by as much of the material as another one judged."""
        if len(other.defects) == len(self.defects):
            return self
        return replace(self, held_out=self.held_out[: len(other.held_out)], defects=self.defects[: len(other.defects)])

    @property
    def _good(self) -> list[float]:
        return [*self.learned, *self.held_out]


def run_trial(
    detector: PatchCore,
    settings: dict[str, Any],
    material: Material,
    progress: Progress = silent,
    hopeless: Callable[[Trial], bool] = lambda trial: False,
    *,
    growth: float = 1.0,
    rate: float = 0.02,
) -> Trial:
    """Learn from part of the material with a detector of these settings, and judge the rest.

    Half of the rest is judged first; the trial ends with it, if it is `hopeless` by then. A bank of all photographs is
    larger by the factor `growth`; `rate` is that of false alarms which was asked for.
    """
    start = time.perf_counter()
    detector.fit(material.learn, keep_copies=True, group_by=material.groups, progress=progress)
    milliseconds = _milliseconds(detector, material.held_out, growth)
    half = len(material.held_out) // 2
    held_out, defects = list[float](), list[float]()
    for part in (slice(0, half), slice(half, None)):
        held_out += _scores(detector, material.held_out[part])
        defects += _scores(detector, [d for each in material.defects_of[part] for d in each])
        trial = Trial(
            settings,
            list(detector.calibration_scores),
            highest(held_out, material.held_out_groups[: len(held_out)]),
            defects,
            rate,
            milliseconds,
            time.perf_counter() - start,
        )
        if part.start == 0 and hopeless(trial):
            break
    return trial


def strange_when_turned(detector: Detector, material: Material) -> float:
    """How strange good parts look to a detector when they are turned by a quarter: 0.5 not at all, 1 all of them.

    It is the AUROC of photographs that were not learned from, turned either way, against the same as they are; of their
    squares in the middle, because a quarter exchanges the sides.
    """
    items = _evenly(material.held_out, min(MAX_TURNED, len(material.held_out)))
    squares = [_middle(item.read(ENOUGH, material.white)[0]) for item in items]
    plain = _scores(detector, [Photo(square) for square in squares])
    turned = _scores(detector, [Photo(np.rot90(square, turn).copy()) for square in squares for turn in (1, 3)])
    metrics, _ = image_metrics([*plain, *turned], [False] * len(plain) + [True] * len(turned))
    return metrics["image_auroc"] or 0.0


def unlikeness_left(material: Material) -> float:
    """How much of what good photographs differ in is left when they lie in one pose: 0 nothing, 1 all of it."""
    items = _evenly(material.learn, min(MAX_ALIGNED, len(material.learn)))
    photos = [item.read(ENOUGH, material.white)[0] for item in items]
    as_they_lie = Alignment.of_mean(photos)
    before = np.median([as_they_lie.likeness(photo) for photo in photos])
    after = np.median([pose.likeness for pose in Alignment.learned(photos)[1]])
    return float((1 - after) / max(1 - before, 1e-6))


def gain(trial: Trial, other: Trial) -> tuple[float, float]:
    """By how much more a trial finds than another one, and the standard error of that over the defects.

    Of a trial that ended early, among the defects that it judged.
    """
    differences = trial.surprises - other.within(trial).surprises
    return float(differences.mean()), float(differences.std(ddof=1) / np.sqrt(len(differences)))


def surprise(good: Sequence[float], defects: Sequence[float]) -> Float:
    """For each defect the share of all rates of false alarms, on a logarithmic scale, at which it would be stopped.

    The rates run from 1 to 1 in n + 1, the lowest that n good parts carry: with the p-value p of a defect among the
    good parts this is log p / log 1/(n + 1). A single rate would hang on one or two photographs.
    """
    p_values = np.array([p_value(score, good) for score in defects])
    return np.asarray(np.log(p_values) / -np.log(len(good) + 1), np.float32)


def _scores(detector: Detector, items: Sequence[Readable]) -> list[float]:
    read = batches(items, detector.preprocessing, batch_size=4, workers=detector.workers)
    return [float(score) for batch in read for score in detector.score_images(batch.pixels)[0]]


def _middle(photo: RGB) -> RGB:
    side = min(photo.shape[:2])
    top, left = (photo.shape[0] - side) // 2, (photo.shape[1] - side) // 2
    return photo[top : top + side, left : left + side]


def _milliseconds(detector: PatchCore, items: Sequence[Readable], growth: float) -> float:
    """For one photograph, the median of a few, if the search took longer by a factor."""
    seconds = []
    for batch in batches(items[: TIMED + 1], detector.preprocessing, batch_size=1):
        start = time.perf_counter()
        detector(batch.pixels)
        both = time.perf_counter() - start
        seconds.append(both + (growth - 1) * detector.search_seconds(batch.pixels))
        if detector.preprocessing.alignment is not None:
            seconds[-1] += _aligning_seconds(detector, batch.items[0])
    return 1000 * statistics.median(seconds[1:])


def _aligning_seconds(detector: Detector, item: Readable) -> float:
    photo, _ = detector.preprocessing.read(item, detector.preprocessing.enough)
    start = time.perf_counter()
    detector.preprocessing(photo)
    return time.perf_counter() - start


def _each_part_once(
    good: Sequence[Readable], white: int, progress: Progress
) -> tuple[list[Readable], list[tuple[int, int]], list[npt.NDArray[np.uint8]]]:
    """Those that can be read, one of each part; their shapes, and small pictures (h, w, 3) of them."""
    items: list[Readable] = []
    shapes: list[tuple[int, int]] = []
    small: list[npt.NDArray[np.uint8]] = []
    for batch in batches(good, Preprocessing(LOOK, white=white)):
        items += batch.items
        shapes += batch.shapes
        small += list(batch.pixels)
        progress("Looking", len(items), len(good))
    first = first_of_each_part(small)
    kept = [number for number, original in enumerate(first) if number == original]
    pictures = [small[number].transpose(1, 2, 0) for number in kept]
    return [items[number] for number in kept], [shapes[number] for number in kept], pictures


def _groups(items: Sequence[Readable], pictures: Sequence[npt.NDArray[np.uint8]], group_by: str | None) -> list[int]:
    """A number for each photograph, equal for those that belong together."""
    paths = [path_of(item) for item in items]
    groups = recognised(paths, pictures) if group_by is None else named(paths, group_by)
    return groups or list(range(len(items)))


def _evenly(items: Sequence[Item], count: int) -> list[Item]:
    """So many of the items, from the first to the last."""
    return [items[round(place)] for place in np.linspace(0, len(items) - 1, count)]
