"""What a fit gives a method, and what the method makes of it."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from kizu.calibration.groups import highest
from kizu.data.preprocessing import Stack
from kizu.data.progress import Progress, silent
from kizu.detectors.ram import release

__all__ = ["AfterRound", "FitContext", "FitResult", "Split", "ignore_round", "timed"]

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

    def of_groups(self, groups: Sequence[int]) -> "FitResult":
        """The same with one score and one peak for each group: the highest of its images. `groups` numbers each.

        Where nothing says which images were scored, it was each, in order.
        """
        scored = [groups[index] for index in self.scored_indices or range(len(self.scores))]
        return replace(self, scores=highest(self.scores, scored), map_peaks=highest(self.map_peaks, scored))


@dataclass(frozen=True)
class Split:
    """Indices of good images by what they are for."""

    train: Sequence[int]
    select: Sequence[int]  # choose or scale what is learned: a round of the training, the range of the maps
    calibrate: Sequence[int]  # set the threshold
