"""What a fit gives a method, and what the method makes of it."""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from kizu.calibration.captures import Captures
from kizu.calibration.groups import highest
from kizu.calibration.sizes import Levels, SizeRules
from kizu.calibration.threshold import percent
from kizu.data.geometry.alignment import Alignment
from kizu.data.geometry.tiling import TiledMap, TileGrid
from kizu.data.image import WHITE, Float
from kizu.data.preprocessing import BitDepth, Preprocessing, Readable
from kizu.data.progress import Progress, silent
from kizu.detectors.ram import release
from kizu.detectors.stack import Stack
from kizu.errors import BadImage, OptionError
from kizu.features.anomaly_map import units_of

__all__ = [
    "AfterRound",
    "FitContext",
    "FitResult",
    "Outcomes",
    "Split",
    "View",
    "captures_of",
    "gpu_device",
    "ignore_round",
    "timed",
]

FEW = 8  # batches of maps that say which levels are usual
HIGH = 0.99  # of the pixels of good parts
ALIGNED = 32  # photographs that the reference pose is learned from
ALIKE = 0.5  # likeness below which photographs do not show one part
AfterRound = Callable[[nn.Module, int], None]  # hears of each round of a training: the graph as it is, and the number


@dataclass(frozen=True)
class Outcomes:
    """What is kept of a graph's scores and maps of good images."""

    scores: list[float] = field(default_factory=list)
    peaks: list[float] = field(default_factory=list)  # the maximum of each map
    medians: list[float] = field(default_factory=list)  # and its median

    @classmethod
    def of(
        cls,
        batches: Iterable[tuple[Tensor, Tensor]],
        rules: SizeRules | None,
        grids: Sequence[TileGrid] | None = None,
    ) -> Self:
        """Of scores (B,) and maps (B, 1, H, W); with rules for sizes, the scores follow from the maps.

        Of tiles, of which `grids` has those of each photograph, it is of their photographs, by the map of each.
        """
        outcomes = cls()
        if grids is not None:
            for values, score in _of_photographs(batches, grids):
                outcomes.scores.append(score if rules is None else rules.score(values))
                outcomes.peaks.append(float(values.max()))
                outcomes.medians.append(float(np.median(values)))
            return outcomes
        for scores, maps in batches:
            outcomes.scores.extend((scores if rules is None else rules.scores(maps.numpy(force=True))).tolist())
            outcomes.peaks.extend(maps.flatten(1).amax(1).tolist())
            outcomes.medians.extend(maps.flatten(1).median(1).values.tolist())
        return outcomes

    @staticmethod
    def levels(batches: Iterable[tuple[Tensor, Tensor]], zones: npt.NDArray[np.int64] | None) -> Levels:
        """Of the first maps (B, 1, H, W), where pixels are in zones (H, W), negative in none."""
        maps = [anomaly_map for _, maps in islice(batches, FEW) for anomaly_map in maps[:, 0].numpy(force=True)]
        inspected = [values if zones is None else values[zones >= 0] for values in maps] or [np.zeros(1)]
        medians, highs = ([float(np.quantile(values, share)) for values in inspected] for share in (0.5, HIGH))
        return Levels(statistics.median(medians), statistics.median(highs))

    def median(self, default: float) -> float:
        """What is typical of the maps; `default` where there are none."""
        return statistics.median(self.medians) if self.medians else default


def ignore_round(graph: nn.Module, number: int) -> None:
    """Nobody looks at the rounds."""


def _of_photographs(
    batches: Iterable[tuple[Tensor, Tensor]], grids: Sequence[TileGrid]
) -> Iterator[tuple[Float, float]]:
    """The map of each photograph and its score, of the maps of their tiles, in order."""
    maps = (anomaly_map for _, maps in batches for anomaly_map in maps[:, 0].numpy(force=True))
    for grid in grids:
        tiled_map = TiledMap(grid)
        for anomaly_map in islice(maps, len(grid)):
            tiled_map.lay(anomaly_map)
        yield tiled_map.values, tiled_map.score


def gpu_device(number: int) -> torch.device:
    """A GPU by its number, or the CPU for -1. Raises `OptionError` where there is none of that number."""
    count = torch.cuda.device_count()
    if number >= count:
        raise OptionError(f"`gpu={number}`: this machine has {count} that torch can use; -1 is the CPU")
    return torch.device("cpu" if number < 0 else f"cuda:{number}")


def captures_of(config: Any, stacks: Sequence[Stack]) -> Captures | None:
    """How the photographs of stacks were taken, where a config asks what to do with others."""
    if config.cannot_judge is None:
        return None
    return Captures.learned(capture for stack in stacks for capture in stack.captures())


@contextmanager
def timed(stage: str, seconds: dict[str, float]) -> Iterator[None]:
    """Add the time spent inside to `seconds[stage]`; leave no freed memory behind."""
    start = time.perf_counter()
    try:
        yield
    finally:
        release()
        seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class OnePose:
    """The pose that photographs are turned to, and what that leaves of them."""

    preprocessing: Preprocessing
    inspected: npt.NDArray[np.bool_] | None  # (H, W): pixels that lie in the photographs of nearly all poses
    facts: dict[str, Any]

    @classmethod
    def learned(cls, items: Sequence[Readable], preprocessing: Preprocessing, progress: Progress) -> "OnePose | None":
        """From good photographs, spread evenly over all; None where none can be read."""
        photos, shapes = [], []
        numbers = sorted({*np.linspace(0, len(items) - 1, min(ALIGNED, len(items))).round().astype(int).tolist()})
        for done, number in enumerate(numbers, 1):
            try:
                photo, shape = preprocessing.read(items[number], preprocessing.enough)
            except BadImage:  # it is reported when all are read
                continue
            photos.append(photo)
            shapes.append(shape)
            progress("Alignment", done, len(numbers))
        if not photos:
            return None
        alignment, poses = Alignment.learned(photos)
        seen = preprocessing.inspected(poses, shapes)
        degrees = [pose.degrees for pose in poses]
        facts = {
            "degrees": [round(min(degrees)), round(max(degrees))],
            "shift": round(float(max(abs(length) for pose in poses for length in pose.shift)), 3),
            "likeness": round(float(np.median([pose.likeness for pose in poses])), 3),
            "inspected": round(float(seen.mean()), 3),
        }
        return cls(replace(preprocessing, alignment=alignment), None if seen.all() else seen, facts)

    @property
    def remark(self) -> str:
        """What was done to the photographs, for the user."""
        first, last = self.facts["degrees"]
        shift, area, likeness = percent(self.facts["shift"]), percent(self.facts["inspected"]), self.facts["likeness"]
        sentences = [
            f"Photographs are turned ({first}° to {last}°) and shifted (by up to {shift} of the shorter side) to one "
            "pose."
        ]
        if likeness < ALIKE:
            sentences.append(
                f"They are too unlike each other for that (likeness {likeness:.2f}, usually {ALIKE} or more): train "
                "without `align=True`."
            )
        if self.inspected is not None:
            sentences.append(
                f"Only {area} of the frame is inspected: what lies outside is not in every photograph, and a defect "
                "there is not found."
            )
        return " ".join(sentences)


@dataclass(frozen=True)
class View:
    """How photographs are seen: their range of values, the pose that they are turned to, the zones outlined in them."""

    preprocessing: Preprocessing
    bit_depth: BitDepth | None = None
    one_pose: OnePose | None = None
    remarks: list[str] = field(default_factory=list)
    measured_on: tuple[int, int] | None = None  # height and width of photographs, where sizes matter

    @classmethod
    def learned(
        cls, config: Any, preprocessing: Preprocessing, items: Sequence[Readable], progress: Progress
    ) -> "View":
        """From a config and good photographs. Raises `OptionError` where nothing is inspected, or a zone is empty."""
        depth = BitDepth.of(items)
        remarks = [depth.remark] if depth.remark and (depth.lost or config.bits is None) else []
        if depth.bits is not None and config.bits is not None:
            depth = replace(depth, bits=config.bits)
        preprocessing = replace(preprocessing, white=depth.white, alignment=None, zones=None)
        one_pose = OnePose.learned(items, preprocessing, progress) if config.align else None
        if one_pose is not None:
            preprocessing = one_pose.preprocessing
            remarks.append(one_pose.remark)
        frame = _first_shape(preprocessing, items) if config.zones else None
        if frame is not None:
            preprocessing = preprocessing.outlined(config.zones, frame)
            assert preprocessing.zones is not None
            preprocessing.zones.check()
        return cls(preprocessing, depth, one_pose, remarks)

    def measured_by(self, shapes: Sequence[tuple[int, int]], remarks: list[str]) -> "View":
        """The same with sizes measured on photographs of the most frequent shape; a remark where they differ."""
        (usual, count), *others = Counter(shapes).most_common()
        if others:
            remarks.append(
                f"Sizes are those on photographs of {usual[1]}×{usual[0]} pixels, which {count} of {len(shapes)} have: "
                "the others are taken to show as much."
            )
        return replace(self, measured_on=usual)

    def facts(self, graph: nn.Module) -> dict[str, Any]:
        """What is worth knowing of it, once a graph has learned."""
        facts: dict[str, Any] = {}
        if self.preprocessing.white != WHITE and self.bit_depth is not None:
            facts["bits"] = self.bit_depth.bits
        if self.one_pose is not None:
            facts["alignment"] = self.one_pose.facts
        if self.preprocessing.zones is not None:
            facts["zones"] = {"frame": self.preprocessing.zones.frame, **units_of(graph)}
        return facts


def _first_shape(preprocessing: Preprocessing, items: Sequence[Readable]) -> tuple[int, int] | None:
    """(height, width) of the first photograph that can be read."""
    for item in items:
        try:
            return preprocessing.read(item, preprocessing.enough)[1]
        except BadImage:  # it is reported when all are read
            continue
    return None


@dataclass(frozen=True)
class FitContext:
    """The photographs of one fit, and the conditions that hold while it lasts."""

    photos: Stack  # good images to learn from; of large photographs the tiles
    held_out: Stack  # good images that set the threshold and teach nothing; may be empty
    memory_bytes: int  # that working data should stay below
    progress: Progress = silent
    checkpoint: Path | None = None  # the file that a long training writes its state to and goes on from
    after_round: AfterRound = ignore_round
    seconds: dict[str, float] = field(default_factory=dict)  # spent so far, by stage
    groups: Sequence[int] | None = None  # a number for each photo, equal for those that belong together
    view: View | None = None  # how photographs are seen

    @property
    def zones(self) -> npt.NDArray[np.int64] | None:
        """(H, W): the number of the zone that each pixel is in, negative where it is in none; None: all is one."""
        zones = None if self.view is None else self.view.preprocessing.zones
        return None if zones is None else zones.numbers

    @property
    def seen(self) -> npt.NDArray[np.bool_] | None:
        """(H, W): the pixels that lie in the photographs of nearly all poses, where not all of them do."""
        one_pose = None if self.view is None else self.view.one_pose
        return None if one_pose is None else one_pose.inspected

    def facts(self, result: "FitResult") -> dict[str, Any]:
        """What is worth knowing of how photographs are seen, once something was learned."""
        facts = {} if self.view is None else self.view.facts(result.graph)
        if result.level is not None:
            facts["zones"]["level"] = result.level
        if self.view is not None and self.view.measured_on is not None and result.map_levels is not None:
            facts["sizes"] = {"frame": self.view.measured_on, **result.map_levels._asdict()}
        return facts

    def timed(self, stage: str) -> AbstractContextManager[None]:
        """Add the time spent inside to `seconds[stage]`; leave no freed memory behind."""
        return timed(stage, self.seconds)


@dataclass
class FitResult:
    """The finished graph, and what it says of good images that it did not learn from."""

    graph: nn.Module
    scores: list[float]
    map_peaks: list[float]  # the maximum of each image's map
    map_median: float  # the typical value of a good pixel
    facts: dict[str, Any] = field(default_factory=dict)  # worth knowing, e.g. the size of a memory bank
    loo_scores: dict[int, float] = field(default_factory=dict)  # leave one out: each training image as if it were new
    scored_indices: list[int] = field(default_factory=list)  # which held-out images, or else photos, were scored
    again: Callable[[], "FitResult"] | None = None  # the same once more, for a graph that was changed meanwhile
    level: float | None = None  # the threshold, where the scores alone do not give it
    map_levels: Levels | None = None  # of maps of good parts, where sizes are measured

    def of_groups(self, groups: Sequence[int] | None) -> "FitResult":
        """The same with one score and one peak for each group: the highest of its images. `groups` numbers each.

        Where nothing says which images were scored, it was each, in order. None: each image is alone.
        """
        if groups is None:
            return self
        scored = [groups[index] for index in self.scored_indices or range(len(self.scores))]
        return replace(self, scores=highest(self.scores, scored), map_peaks=highest(self.map_peaks, scored))


@dataclass(frozen=True)
class Split:
    """Indices of good images by what they are for."""

    train: Sequence[int]
    select: Sequence[int]  # choose or scale what is learned: a round of the training, the range of the maps
    calibrate: Sequence[int]  # set the threshold
