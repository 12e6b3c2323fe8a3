"""PatchCore learned from shards of the photographs, each a task of its own that may run on another machine.

A shard's photographs are read where its task runs, in four steps, each a function of the shard and of what is common:

1. `look`: small pictures of the photographs, by which those of one part are told, wherever they are.
2. `choose`: features; where those of all photographs would be too many for one machine, of them a coreset with
   several times the wanted share. The memory banks are chosen among what all shards give: all patches, or a coreset of
   coresets, as `coreset.py` makes it of chunks.
3. `search`: for photographs of all shards their neighbours among other images' entries of the finished banks; what
   they say of the entries' scales and stand-ins is joined.
4. `score`: each of these as if it had not been learned from, by scales and stand-ins of all. The threshold follows.

So the promise is that of one machine: nothing is scored by its own entries, nor by the bank of its shard alone. Where
all patches are chosen from, the model is that of one machine too. Who carries the tasks out, in which order and how
often, changes nothing.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kizu.calibration.captures import Capture
from kizu.calibration.copies import SIDE, small_picture
from kizu.config import PatchCoreConfig
from kizu.data.preprocessing import Readable, batches, digests
from kizu.data.progress import Progress, silent
from kizu.detectors.fitting import FitContext, View
from kizu.detectors.patchcore.coreset import select
from kizu.detectors.patchcore.detector import Member, PatchCore
from kizu.detectors.patchcore.feature_table import FeatureTable
from kizu.detectors.patchcore.graph import PatchCoreGraph, pretrained
from kizu.detectors.patchcore.leave_one_out import LeaveOneOut, Searched
from kizu.detectors.patchcore.memory_bank import Bank
from kizu.detectors.ram import budget, tidy
from kizu.detectors.stack import Stack, items_of, thumbnails, unusable
from kizu.errors import DataError, OptionError
from kizu.features.backbone import Backbone
from kizu.features.several_sizes import SeveralSizes

__all__ = ["Shard", "ShardedPatchCore", "Step", "check_shardable", "number_of_shards", "one_after_another"]

PHOTOGRAPHS = 100  # of a shard, where nobody says how many shards there are to be
MEMORY = "1GB"  # of a task's working data: what is free somewhere must not decide what is learned
OVERSAMPLING = 4  # times the wanted share that a shard's coreset has, where it does not give all its patches
SCORED_TOGETHER = 32  # photographs that are scored by one task, at least: each loads the whole bank


@dataclass(frozen=True)
class Shard:
    """Some of the photographs, and what a task must know of them."""

    items: Sequence[Readable]
    numbers: Sequence[int]  # of these among all
    digests: Sequence[str] = ()  # by which the same are known again
    candidates: Sequence[tuple[Tensor, Tensor]] = ()  # of each bank, patches and their images: where not all were given
    searched: Sequence[Searched] = ()  # of each bank: neighbours of these, and scales and stand-ins from all


Step = Callable[["ShardedPatchCore", Shard], Any]
Run = Callable[[Step, "ShardedPatchCore", Sequence[Shard], Callable[[int], None]], list[Any]]


def one_after_another(
    step: Step, detector: "ShardedPatchCore", shards: Sequence[Shard], done: Callable[[int], None]
) -> list[Any]:
    """What a step gives for each shard, in this process; `done` hears the number of each that is finished."""
    results = []
    for number, shard in enumerate(shards):
        results.append(step(detector, shard))
        done(number)
    return results


@dataclass
class Looked:
    """What is kept of a shard's photographs, without those that cannot be read."""

    pictures: list[npt.NDArray[np.uint8]] = field(default_factory=list)  # (3, h, w): small
    shapes: list[tuple[int, int]] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    captures: list[Capture] = field(default_factory=list)  # where others are not judged
    thumbnails: list[bytes] = field(default_factory=list)  # where they are kept
    was_read: list[bool] = field(default_factory=list)  # of each item
    errors: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Chosen:
    """What one shard has for a bank: patches that may become its entries."""

    rows: FeatureTable  # k rows (D,)
    images: Tensor  # (k,)
    places: Tensor  # (k,)
    radius: float
    total: int  # patches that they were chosen from
    grid: tuple[int, int]

    @property
    def all(self) -> bool:
        """Whether none was left out."""
        return len(self.rows) == self.total

    @classmethod
    def joined(cls, parts: "Sequence[Chosen]") -> "Chosen":
        """Those of several shards together, in their order."""
        images, places = (torch.cat([getattr(part, name) for part in parts]) for name in ("images", "places"))
        rows = FeatureTable.joined([part.rows for part in parts])
        radius, total = max(part.radius for part in parts), sum(part.total for part in parts)
        return cls(rows, images, places, radius, total, parts[0].grid)

    def patches(self) -> tuple[Tensor, Tensor]:
        """Features (k, D) and images (k,)."""
        return self.rows.span(0, len(self.rows)), self.images


class Pictures(Stack):
    """Small pictures of photographs, and what else is known of these, which stay where they are."""

    def __init__(self, most: int, memory: int) -> None:
        super().__init__(most, (SIDE, SIDE), memory)
        self.items: list[Readable] = []
        self.looks: list[Capture] = []
        self.thumbnails: list[bytes] = []

    def add(self, items: Sequence[Readable], looked: Looked) -> None:
        """Take what was found of these items."""
        if items:
            self.append(np.ascontiguousarray(np.stack(looked.pictures)), looked.shapes)
        self.digests[len(self.items) :] = looked.digests
        self.items += items
        self.looks += looked.captures
        self.thumbnails += looked.thumbnails

    def keep(self, numbers: Sequence[int]) -> None:
        super().keep(numbers)
        for name in ("items", "looks", "thumbnails"):
            values = getattr(self, name)
            setattr(self, name, [values[number] for number in numbers] if values else [])

    def captures(self) -> Iterator[Capture]:
        return iter(self.looks)

    @property
    def hash(self) -> str:
        return hashlib.blake2b("".join(self.digests).encode(), digest_size=16).hexdigest()

    def shard(self, numbers: Sequence[int]) -> Shard:
        """The photographs of these numbers."""
        return Shard([self.items[n] for n in numbers], numbers, [self.digests[n] for n in numbers])


def number_of_shards(photographs: int, asked: int | None = None) -> int:
    """How many shards so many photographs are divided into: as many as asked for, or one for each hundred."""
    return max(1, min(photographs, math.ceil(photographs / PHOTOGRAPHS) if asked is None else asked))


def check_shardable(config: PatchCoreConfig) -> None:
    """Raise `OptionError` for settings that need all photographs, or all of their features, in one place."""
    zones = sum(not zone.ignored for zone in config.zones)
    reasons = {
        "`align=True` looks for a pose in photographs of all shards": config.align,
        f"`tile={_sides(config.tile)}` chooses from the tiles of all photographs": config.tile is not None,
        "`zones` of which several are inspected have units that all photographs give together": zones > 1,
        '`sampler="identity"` keeps every patch of all photographs': config.sampler == "identity",
        '`search="ivfpq"` needs an index of all entries in every task': config.search != "exact",
    }
    for reason, holds in reasons.items():
        if holds:
            raise OptionError(f"{reason}, so that it cannot be learned in shards: train it without `ray`")


def _sides(size: tuple[int, int] | None) -> str:
    return "" if size is None else "x".join(map(str, size))


class ShardedPatchCore(PatchCore):
    """A PatchCore whose `fit` is carried out in shards, which `run` gives to whom it likes."""

    def __init__(self, config: PatchCoreConfig, shards: int | None = None, run: Run = one_after_another) -> None:
        """In so many shards, by default one for each hundred photographs.

        Raises `OptionError` for settings that cannot be learned so.
        """
        check_shardable(config)
        super().__init__(config)
        self.asked, self.shards, self.run = shards, 1, run
        self.network: Backbone | SeveralSizes | None = None  # of a detector that is sent to the tasks,
        self.groups: Sequence[int] | None = None  # which needs these,
        self.learned = 0  # how many photographs there are in all shards,
        self.radii: Sequence[float] | None = None  # and of each bank's choice, where it was not made among all patches
        self.memory_bytes = budget(MEMORY)

    def fit(self, good: Any, **options: Any) -> Self:
        """As `PatchCore.fit`, but `memory` bounds the working data of each task: 1 GB by default."""
        items = items_of(good)
        self.shards = number_of_shards(len(items), self.asked)
        return super().fit(items, **options)

    def _memory_bytes(self, memory: str | int | None) -> int:
        self.memory_bytes = budget(MEMORY if memory is None else memory)
        return self.memory_bytes

    def read(
        self, good: Any, memory_bytes: int, skip_bad: bool = False, progress: Progress = silent
    ) -> tuple[Stack, list[Readable]]:
        """Small pictures of the photographs, which themselves stay where they are."""
        items = items_of(good)
        pictures, errors = Pictures(len(items), memory_bytes), list[str]()
        shards = [Shard([items[n] for n in numbers], numbers) for numbers in _divided(range(len(items)), self.shards)]
        looked_at = self._carried_out(look, self._worker(self.config), shards, "Reading", progress)
        for shard, looked in zip(shards, looked_at, strict=True):
            pictures.add([item for item, read in zip(shard.items, looked.was_read, strict=True) if read], looked)
            errors += looked.errors
        if errors and not skip_bad:
            raise unusable(errors, len(items))
        return pictures, list(pictures.items)

    @property
    def keeps_thumbnails(self) -> bool:
        return False  # of the small pictures: `remember` takes those that the tasks made

    def remember(self, photos: Stack, items: Sequence[Readable], loo_scores: Mapping[int, float]) -> None:
        super().remember(photos, items, loo_scores)
        assert isinstance(photos, Pictures)
        self.thumbnails += photos.thumbnails

    def _learn_member(self, config: PatchCoreConfig, context: FitContext) -> Member:
        photos = context.photos
        assert isinstance(photos, Pictures)
        worker = self._worker(config)
        worker.network, worker.groups, worker.learned = pretrained(config), context.groups, len(photos)
        with context.timed("features"):
            shards = [photos.shard(numbers) for numbers in _divided(range(len(photos)), self.shards)]
            by_shard = self._carried_out(choose, worker, shards, "Features", context.progress)
        graph = worker.graph = PatchCoreGraph(config, worker.network)
        grids, device = [chosen.grid for chosen in by_shard[0]], torch.device("cpu")
        graph.set_grids(grids, device, lambda upsample: upsample.inspect(context.zones, context.seen))
        if not any(config.patchsizes):
            self.remarks += graph.taps[0][1].remarks(grids[0])
        with context.timed("coreset"), tidy():
            facts, radii = _fill_banks(graph, by_shard, context.progress)
        from_all = all(given.all for of_shard in by_shard for given in of_shard)
        image_ids, chosen = self._scored_ids(photos, from_all), [] if from_all else by_shard
        worker.radii = None if from_all else radii
        with context.timed("calibration"):
            loo_scored = self._score_as_if_new(worker, photos, image_ids, chosen, context)
            graph.upsample.learn_units(loo_scored[1][loo_scored[0].isfinite()])
            scored = self._score_new(worker, context) if len(context.held_out) else loo_scored
        graph.to(self.device)
        return Member(graph, scored, loo_scored[0], image_ids, facts | {"shards": len(shards)}, lambda: scored)

    def _score_as_if_new(
        self,
        worker: "ShardedPatchCore",
        photos: "Pictures",
        image_ids: Sequence[int],
        chosen: list[list["Chosen"]],
        context: FitContext,
    ) -> tuple[Tensor, Tensor]:
        """Scores (M,) and patch scores (M, h, w) of training images; the banks learn their scales from all of these.

        Stand-ins are looked for among what was `chosen` in each shard, or, where that is nothing, in these images.
        """
        count = min(self.shards, max(1, len(image_ids) // SCORED_TOGETHER))
        parts = _divided(image_ids, count, context.groups)
        shards = [
            replace(
                photos.shard(numbers),
                candidates=[Chosen.joined(of_bank).patches() for of_bank in zip(*some, strict=True)],
            )
            for numbers, some in zip(parts, (chosen[number :: len(parts)] for number in range(len(parts))), strict=True)
        ]
        by_shard = self._carried_out(search, worker, shards, "Neighbours", context.progress)
        searched = [Searched.joined(parts) for parts in zip(*by_shard, strict=True)]
        ends = np.cumsum([0, *map(len, parts)]).tolist()
        shards = [
            replace(shard, candidates=(), searched=[of_bank.of_images(first, last) for of_bank in searched])
            for shard, first, last in zip(shards, ends[:-1], ends[1:], strict=True)
        ]
        scored = self._carried_out(score, worker, shards, "Threshold", context.progress)
        for bank, of_bank in zip(worker.banks, searched, strict=True):
            bank.sums.copy_(of_bank.sums)
            bank.counts.copy_(of_bank.counts)
        order = np.argsort([number for numbers in parts for number in numbers]).tolist()
        scores, grids = (torch.cat(values)[order] for values in zip(*scored, strict=True))
        return scores, grids

    def _score_new(self, worker: "ShardedPatchCore", context: FitContext) -> tuple[Tensor, Tensor]:
        """Scores (M,) and patch scores of the images held out."""
        held_out = context.held_out
        assert isinstance(held_out, Pictures)
        shards = [held_out.shard(numbers) for numbers in _divided(range(len(held_out)), self.shards)]
        scored = self._carried_out(score_new, worker, shards, "Threshold", context.progress)
        scores, grids = (torch.cat(values) for values in zip(*scored, strict=True))
        return scores, grids

    def _worker(self, config: PatchCoreConfig) -> "ShardedPatchCore":
        """The detector that is sent to the tasks."""
        worker = ShardedPatchCore(config)
        worker.preprocessing, worker.memory_bytes, worker.workers = self.preprocessing, self.memory_bytes, self.workers
        return worker

    def _carried_out(
        self, step: "Step", worker: "ShardedPatchCore", shards: Sequence["Shard"], stage: str, progress: Progress
    ) -> list[Any]:
        """What a step gives for each shard."""
        finished, total = 0, sum(len(shard.items) for shard in shards)

        def done(number: int) -> None:
            nonlocal finished
            finished += len(shards[number].items)
            progress(stage, finished, total)

        progress(stage, 0, max(1, total))
        results = self.run(step, worker, shards, done)
        progress(stage, max(1, total), max(1, total))
        return results

    # In a task

    @property
    def banks(self) -> Sequence[Bank]:
        assert isinstance(self.graph, PatchCoreGraph)
        return self.graph.banks

    @contextmanager
    def photographs(self, shard: "Shard") -> Iterator[Stack]:
        """A shard's photographs, read again. Raises `DataError` where they are no longer what they were."""
        photos, _ = PatchCore.read(self, shard.items, self.memory_bytes // 8)
        with photos:
            if photos.digests != list(shard.digests):
                raise DataError(f"The photographs changed while they were learned from, such as {shard.items[0]}")
            yield photos

    def leave_one_out(self, photos: Stack, shard: "Shard") -> LeaveOneOut:
        """What scores a shard's photographs as if they were new."""
        graph, places = self.graph, {number: place for place, number in enumerate(shard.numbers)}
        assert isinstance(graph, PatchCoreGraph)

        def features(numbers: Sequence[int]) -> list[Tensor]:
            return graph.rows(graph.embed(self.pixels(photos, [places[number] for number in numbers])))

        return LeaveOneOut(graph, shard.numbers, features, self.groups, self.radii)


def look(detector: ShardedPatchCore, shard: Shard) -> Looked:
    """The first step: what is kept of a shard's photographs on the machine that leads."""
    looked = Looked()
    for batch in batches(shard.items, detector.preprocessing, workers=detector.workers):
        looked.pictures += [small_picture(photo).transpose(2, 0, 1) for photo in batch.pixels]
        looked.shapes += batch.shapes
        looked.digests += digests(batch.pixels)
        looked.was_read += batch.was_read
        looked.errors += [str(error) for _, error in batch.failures]
        if detector.config.cannot_judge is not None:
            looked.captures += map(Capture.of, batch.pixels, batch.shapes)
        if detector.config.thumbnails:
            looked.thumbnails += thumbnails(batch.pixels)
    return looked


@torch.inference_mode()
def choose(detector: ShardedPatchCore, shard: Shard) -> list[Chosen]:
    """The second step: for each bank, all of a shard's patches, or some that cover these.

    All, where those of all shards fit into what one machine keeps of features with as much memory.
    """
    config = detector.config
    sampler = "random" if config.sampler == "random" else "k_center"
    seed = (config.seed + shard.numbers[0]) % 2**32  # no two shards draw the same
    more = {"coreset": min(1.0, OVERSAMPLING * config.coreset), "sampler": sampler, "seed": seed}
    assert detector.network is not None
    graph = PatchCoreGraph(config.model_copy(update=more), detector.network.to(detector.device))
    with detector.photographs(shard) as photos:
        view = View(detector.preprocessing)
        context = FitContext(photos, Stack(0, photos.size, 0), detector.memory_bytes, view=view)
        coresets, images = detector._embed(graph, context), detector.learned * (1 + detector._copies())
        found = []
        for coreset, places in zip(coresets, graph.places, strict=True):
            if coreset.would_hold(images):
                rows, patch_ids, radius = coreset.rows, coreset.patch_ids, 0.0
            else:
                entries, patch_ids, radius = coreset.choose()
                rows = FeatureTable.of(entries)
            image_ids, of_grid = places.images_and_places(patch_ids)
            ids = image_ids.cpu() + shard.numbers[0], of_grid.cpu()
            found.append(Chosen(rows.cpu(), *ids, radius, coreset.total, places.grid))
    return found


@torch.inference_mode()
def search(detector: ShardedPatchCore, shard: Shard) -> list[Searched]:
    """The third step: what photographs say of the scales and stand-ins of each bank, and their neighbours there."""
    assert detector.graph is not None
    detector.graph.to(detector.device)
    for bank in detector.banks:
        bank.sums.zero_()
        bank.counts.zero_()
    with detector.photographs(shard) as photos:
        leave_one_out = detector.leave_one_out(photos, shard)
        leave_one_out.search(lambda done: None)
        if shard.candidates:
            leave_one_out.find_stand_ins([(r.to(detector.device), i.to(detector.device)) for r, i in shard.candidates])
        return [of_bank.to(torch.device("cpu")) for of_bank in leave_one_out.searched()]


@torch.inference_mode()
def score(detector: ShardedPatchCore, shard: Shard) -> tuple[Tensor, Tensor]:
    """The fourth step: scores (M,) and patch scores (M, h, w) of photographs, each as if it were new."""
    assert detector.graph is not None
    detector.graph.to(detector.device)
    with detector.photographs(shard) as photos:
        leave_one_out = detector.leave_one_out(photos, shard)
        leave_one_out.adopt([of_bank.to(detector.device) for of_bank in shard.searched])
        scores, grids = leave_one_out.scores_again()
    return scores.cpu(), grids.cpu()


@torch.inference_mode()
def score_new(detector: ShardedPatchCore, shard: Shard) -> tuple[Tensor, Tensor]:
    """Scores (M,) and patch scores (M, h, w) of photographs that were not learned from."""
    assert isinstance(detector.graph, PatchCoreGraph)
    graph = detector.graph.to(detector.device)
    with detector.photographs(shard) as photos:
        stream = detector.stream(photos, "Threshold", silent)
        scores, grids = zip(*(graph.score_images(pixels) for _, pixels in stream), strict=True)
    return torch.cat(scores).cpu(), torch.cat(grids).cpu()


def _fill_banks(
    graph: PatchCoreGraph, by_shard: Sequence[Sequence[Chosen]], progress: Progress
) -> tuple[dict[str, Any], list[float]]:
    """Give the graph its memory banks, chosen from what all shards gave.

    Returns what is worth knowing of them, and the radius within which each covers what it was chosen from.
    """
    config, banks, radii = graph.config, list[Bank](), list[float]()
    by_bank = [Chosen.joined(parts) for parts in zip(*by_shard, strict=True)]
    for given in by_bank:
        count = min(len(given.rows), max(1, int(given.total * config.coreset)))
        found = select(given.rows, count, config.sampler, seed=config.seed, progress=partial(progress, "Memory bank"))
        entries = given.rows.take(found.indices)
        banks.append(Bank.of(entries, given.images[found.indices], given.places[found.indices]))
        radii.append(found.radius)
    graph.set_banks(banks)
    facts = {
        "bank": [len(bank.entries) for bank in banks],
        "dimension": [bank.entries.shape[1] for bank in banks],
        "patches": [given.total for given in by_bank],
        "radius": [given.radius + radius for given, radius in zip(by_bank, radii, strict=True)],
    }
    return facts, radii


def _divided(numbers: Sequence[int], count: int, groups: Sequence[int] | None = None) -> list[list[int]]:
    """Numbers in so many parts of about the same size, in order, or in that of their groups, which stay together."""
    if groups is None:
        return [part.tolist() for part in np.array_split(np.asarray(numbers, np.int64), count) if len(part)]
    members: dict[int, list[int]] = {}
    for number in numbers:
        members.setdefault(groups[number], []).append(number)
    parts: list[list[int]] = [[] for _ in range(count)]
    placed = 0
    for group in members.values():
        parts[placed * count // len(numbers)] += group
        placed += len(group)
    return [part for part in parts if part]
