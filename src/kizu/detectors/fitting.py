"""What a fit gives a method, and what the method makes of it."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from kizu.calibration.groups import highest
from kizu.calibration.threshold import percent
from kizu.data.geometry.alignment import Alignment
from kizu.data.geometry.zones import Outlined
from kizu.data.image import WHITE
from kizu.data.preprocessing import BitDepth, Preprocessing, Readable, Stack
from kizu.data.progress import Progress, silent
from kizu.detectors.ram import release
from kizu.errors import BadImage
from kizu.features.anomaly_map import units_of

__all__ = ["AfterRound", "FitContext", "FitResult", "Split", "View", "ignore_round", "timed"]

ALIGNED = 32  # photographs that the reference pose is learned from
ALIKE = 0.5  # likeness below which photographs do not show one part
AfterRound = Callable[[nn.Module, int], None]  # hears of each round of a training: the graph as it is, and the number


def ignore_round(graph: nn.Module, number: int) -> None:
    """Nobody looks at the rounds."""


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
        return cls(_outlined(preprocessing, config.zones, items), depth, one_pose, remarks)

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


def _outlined(preprocessing: Preprocessing, zones: Sequence[Outlined], items: Sequence[Readable]) -> Preprocessing:
    """The same for a config's zones, which were outlined on photographs like the first that can be read."""
    for item in items if zones else ():
        try:
            with_zones = preprocessing.outlined(zones, preprocessing.read(item, preprocessing.enough)[1])
        except BadImage:  # it is reported when all are read
            continue
        assert with_zones.zones is not None
        with_zones.zones.check()
        return with_zones
    return preprocessing


@dataclass(frozen=True)
class FitContext:
    """The photographs of one fit, and the conditions that hold while it lasts."""

    photos: Stack  # good images to learn from
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
