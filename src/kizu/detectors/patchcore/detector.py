"""PatchCore as a detector: it learns from good images, learns more of them later, and is merged with others."""

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from kizu.calibration.captures import Captures
from kizu.calibration.threshold import images_needed
from kizu.config import PatchCoreConfig
from kizu.data.preprocessing import Readable
from kizu.data.progress import Progress, silent
from kizu.detectors.base import Detector
from kizu.detectors.fitting import FitContext, FitResult
from kizu.detectors.patchcore.coreset import StreamingCoreset
from kizu.detectors.patchcore.feature_table import FeatureTable
from kizu.detectors.patchcore.graph import EnsembleGraph, PatchCoreGraph, pretrained, seen_by
from kizu.detectors.patchcore.leave_one_out import LeaveOneOut
from kizu.detectors.patchcore.memory_bank import Bank
from kizu.detectors.patchcore.merging import each_photograph_once
from kizu.detectors.ram import budget, tidy
from kizu.detectors.stack import Stack, Tiles
from kizu.errors import DataError, ModelError
from kizu.features import backbone
from kizu.features.backbone import weights_hash
from kizu.inference.evidence import BankOutputs, nearest_patch
from kizu.inference.prediction import NearestPatch

__all__ = ["Member", "PatchCore"]

SCORED_IMAGES = 1000  # that set scales and threshold where their features must be computed again for it
MAP_BATCH = 16  # maps made at a time
MAX_TILES = 4000  # of large photographs, from which memory banks are chosen,
MAX_ENTRIES = 20_000  # and the entries of each: a tile of a material is like many others


@dataclass(frozen=True)
class Member:
    """What is learned with one backbone."""

    graph: PatchCoreGraph
    scored: tuple[Tensor, Tensor]  # scores (M,) and patch scores (M, h, w) of the images that set the threshold
    loo_scores: Tensor  # (L,) of training images, each as if it were new,
    image_ids: Sequence[int]  # and which these are
    facts: dict[str, Any]
    again: Callable[[], tuple[Tensor, Tensor]]  # `scored` once more, for a graph that was changed meanwhile


class PatchCore(Detector):
    """Memory banks of good patches (PatchCore). Settings: the fields of `PatchCoreConfig`."""

    method = "patchcore"
    config_class = PatchCoreConfig
    leaves_groups_out = True

    def learn(self, context: FitContext) -> FitResult:
        with torch.inference_mode():
            members = [self._learn_member(config, context) for config in self.config.members()]
            first, graphs, scored = members[0], [m.graph for m in members], [m.scored for m in members]
            image_ids = first.image_ids
            scored_indices = range(len(context.held_out)) if len(context.held_out) else image_ids
            scored_in = context.held_out if len(context.held_out) else context.photos
            result_of = partial(
                self._result,
                scored_indices=scored_indices,
                loo_indices=image_ids,
                scored_in=scored_in,
                learned_in=context.photos,
            )
            if len(members) == 1:
                loo_scores, facts = first.loo_scores, first.facts
                result = result_of(first.graph, graphs, scored, loo_scores, facts)
                if self.config.own_rates:
                    result.again = lambda: result_of(first.graph, graphs, [first.again()], loo_scores, facts)
                return result
            ensemble = EnsembleGraph(graphs).to(self.device)
            ensemble.learn_stats(scored)
            scaled = [
                (member.loo_scores - mean) / std
                for member, (mean, std) in zip(members, ensemble.score_stats, strict=True)
            ]
            comparable = all(member.image_ids == image_ids for member in members)
            loo_scores = torch.stack(scaled).mean(0) if comparable else scaled[0]
            facts = {"members": [member.facts for member in members]}
            return result_of(ensemble, graphs, scored, loo_scores, facts)

    def _learn_member(self, config: PatchCoreConfig, context: FitContext) -> Member:
        """One backbone's memory banks and scores: section 3.2 of the paper, and the threshold that it leaves open."""
        graph = PatchCoreGraph(config, pretrained(config).to(self.device))
        with context.timed("features"):
            coresets = self._embed(graph, context)
        with context.timed("coreset"), tidy():
            radii = _fill_banks(graph, coresets, context)
        facts: dict[str, Any] = {
            "bank": [len(bank.entries) for bank in graph.banks],
            "dimension": [bank.entries.shape[1] for bank in graph.banks],
            "patches": [coreset.total for coreset in coresets],
            "radius": radii,
        }
        with context.timed("calibration"), tidy():
            kept = all(coreset.holds_all for coreset in coresets) and _learned_tiles(context.photos) is None
            image_ids = self._scored_ids(context.photos, kept)
            leave_one_out = self._leave_one_out(graph, coresets if kept else [], image_ids, context)
            loo_scored = leave_one_out.scores(lambda done, total: context.progress("Threshold", done, total))
            graph.upsample.learn_units(loo_scored[1][loo_scored[0].isfinite()])
            if graph.upsample.zones is not None:
                loo_scored = _as_if_new(graph, leave_one_out)
            again = partial(_as_if_new, graph, leave_one_out)
            if len(context.held_out):
                again = partial(self._score_held_out, graph, context)
            scored = again() if len(context.held_out) else loo_scored
            if config.search != "exact":
                facts["recall"] = _recalls(graph, torch.from_numpy(context.photos.batch(0, 4)).to(self.device))
        return Member(graph, scored, loo_scored[0], image_ids, facts, again)

    def _embed(self, graph: PatchCoreGraph, context: FitContext) -> list[StreamingCoreset]:
        """For each bank, the patch features of all photos and of their varied copies, as many as memory allows."""
        coresets: list[StreamingCoreset] = []
        photos, copies, seen = context.photos, self._copies(), 0
        only = _learned_tiles(photos)
        learned = len(photos) if only is None else len(only)
        for image_ids, pixels in self.stream(photos, "Features", context.progress, only=only, copies=copies):
            layers_by_bank = graph.pooled_layers(pixels)
            if not coresets:
                grids = [(layers[0].shape[2], layers[0].shape[3]) for layers in layers_by_bank]
                graph.set_grids(grids, pixels.device, lambda upsample: upsample.inspect(context.zones, context.seen))
                if not any(graph.config.patchsizes):
                    self.remarks += graph.taps[0][1].remarks(grids[0])
                most = MAX_ENTRIES if isinstance(photos, Tiles) else None
                coresets = _streaming_coresets(
                    graph, layers_by_bank, learned * (1 + copies), context.memory_bytes, most
                )
            for coreset, layers, places in zip(coresets, layers_by_bank, graph.places, strict=True):
                coreset.add(layers, places.patch_ids(image_ids, of_copies=seen >= learned))
            seen += len(image_ids)
        return coresets

    def _leave_one_out(
        self,
        graph: PatchCoreGraph,
        coresets: Sequence[StreamingCoreset],
        image_ids: Sequence[int],
        context: FitContext,
    ) -> LeaveOneOut:
        """What scores training images, each as if it were new; the banks learn their scales.

        Where the `coresets` hold all features they need not be computed again.
        """

        def features(numbers: Sequence[int]) -> list[Tensor]:
            if coresets:  # originals come first
                first, last = numbers[0], numbers[-1] + 1
                patches = [coreset.rows.patches for coreset in coresets]
                return [coreset.rows.span(first * p, last * p) for coreset, p in zip(coresets, patches, strict=True)]
            return graph.rows(graph.embed(self.pixels(context.photos, numbers)))

        return LeaveOneOut(graph, image_ids, features, context.groups)

    def _score_held_out(self, graph: PatchCoreGraph, context: FitContext) -> tuple[Tensor, Tensor]:
        """Scores (M,) and patch scores of the images held out."""
        stream = self.stream(context.held_out, "Threshold", context.progress)
        scores, grids = zip(*(graph.score_images(pixels) for _, pixels in stream), strict=True)
        return torch.cat(scores), torch.cat(grids)

    def _result(
        self,
        graph: nn.Module,
        members: Sequence[PatchCoreGraph],
        scored: Sequence[tuple[Tensor, Tensor]],
        loo_scores: Tensor,
        facts: dict[str, Any],
        *,
        scored_indices: Sequence[int],
        loo_indices: Sequence[int],
        scored_in: Stack,
        learned_in: Stack,
    ) -> FitResult:
        """What follows from the members' scores (M,) and patch scores of good images of `scored_indices`.

        `loo_scores` are those of the training images `loo_indices`, as if each were new. Maps are made a few at a
        time. Of what is in a stack of tiles, the result is of their photographs.
        """
        known = scored[0][0].isfinite()  # an image that alone filled the bank has nothing else to be compared with
        known_indices = [scored_indices[row] for row in known.nonzero()[:, 0].tolist()]
        pairs = zip(loo_indices, loo_scores.tolist(), strict=True)
        known_loo_scores = {index: score for index, score in pairs if math.isfinite(score)}
        grids = None
        if isinstance(scored_in, Tiles) and isinstance(learned_in, Tiles):
            known_loo_scores = learned_in.by_photograph(known_loo_scores)
            known_indices = list(scored_in.by_photograph(dict.fromkeys(known_indices, 0.0)))
            grids = [scored_in.grids[number] for number in known_indices]

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            for batch in known.nonzero()[:, 0].split(MAP_BATCH):
                each = [(s[batch], member.upsample(g[batch])) for member, (s, g) in zip(members, scored, strict=True)]
                yield graph.combine(each) if isinstance(graph, EnsembleGraph) else each[0]

        found = self.outcomes(batches, grids)
        median = found.median(0.0)
        result = FitResult(graph, found.scores, found.peaks, median, facts, known_loo_scores, known_indices)
        return replace(result, map_levels=self.map_levels)

    def _scored_ids(self, photos: Stack, kept: bool) -> Sequence[int]:
        """The training images that are scored as if they were new: all whose features are kept, else enough of them.

        Of photographs in tiles, all tiles of enough of them.
        """
        needed = images_needed(self.config.false_alarms)
        if not isinstance(photos, Tiles):
            enough = max(SCORED_IMAGES, needed)
            return range(0, len(photos), 1 if kept else max(1, len(photos) // enough))
        enough = max(needed, SCORED_IMAGES * len(photos.grids) // max(1, len(photos)))
        return photos.numbers_of(range(0, len(photos.grids), 1 if kept else max(1, len(photos.grids) // enough)))

    @property
    def keeps_thumbnails(self) -> bool:
        return bool(self.config.thumbnails)

    def check_exportable(self) -> None:
        super().check_exportable()
        if self.config.search != "exact":
            raise ModelError(
                f'A model with `search="{self.config.search}"` has no exported form: train it with `search="exact"`'
            )

    def forward_with_extras(self, images: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        assert isinstance(self.graph, PatchCoreGraph | EnsembleGraph)
        return self.graph.forward_with_extras(images)

    def export_tables(self) -> dict[str, Tensor]:
        tables: dict[str, Tensor] = {}
        for number, bank in enumerate(self._first().banks):
            names = BankOutputs.of(number)
            tables |= {names.images: bank.images, names.places: bank.places}
        return tables

    def _first(self) -> PatchCoreGraph:
        """The only member, or an ensemble's first."""
        graph = self.graph.members[0] if isinstance(self.graph, EnsembleGraph) else self.graph
        assert isinstance(graph, PatchCoreGraph)
        return graph

    def nearest_good(self, seen: npt.NDArray[np.uint8], place: tuple[float, float]) -> NearestPatch | None:
        with torch.inference_mode():
            pixels = torch.from_numpy(seen.transpose(2, 0, 1)[None].copy()).to(self.device)
            extras = self._first().forward_with_extras(pixels)[2]
        outputs, tables = (
            {name: tensor.numpy(force=True) for name, tensor in tensors.items()}
            for tensors in (extras, self.export_tables())
        )
        share = place[0] / seen.shape[1], place[1] / seen.shape[0]
        return nearest_patch(outputs, tables, share, self.names)

    def search_seconds(self, pixels: npt.NDArray[np.uint8]) -> float:
        """What the search takes of the time for a batch (B, 3, H, W); it grows with the bank."""
        graph = self._first()
        with torch.inference_mode():
            embeddings = graph.embed(torch.from_numpy(pixels).to(self.device))
            start = time.perf_counter()
            graph.search(embeddings)
            return time.perf_counter() - start

    def update(
        self,
        good: Any,
        *,
        memory: str | int | None = None,
        skip_bad: bool = False,
        progress: Progress | None = None,
    ) -> Self:
        """Learn more good images without the old ones; the banks keep their sizes.

        New patches compete with the old entries for their places (k-centre over both). The thresholds follow from the
        old images' scores, as they were, and the added ones', each as if it were new. Raises `ModelError` for an
        ensemble.
        """
        graph = self._single("updated")
        progress = progress or silent
        photos, items = self.read(good, budget(memory) // 8, skip_bad, progress)
        self.remarks, read = [], photos.digests
        items = self._leave_out_known(photos, items)
        if len(photos) == 0:
            raise DataError("The model has learned from all of these images already: give new ones.")
        owners, tiles = [photo for photo, _ in self.tiles] or list(range(self.training["images"])), photos.seen
        before = len(owners)
        with torch.inference_mode(), photos:
            seen = 0
            for image_ids, pixels in self.stream(tiles, "Features", progress, copies=self._copies()):
                banks = []
                for bank, rows, places in zip(graph.banks, graph.rows(graph.embed(pixels)), graph.places, strict=True):
                    patch_ids = places.patch_ids(image_ids + before, of_copies=seen >= len(tiles))
                    banks.append(bank.exchanged(rows, *places.images_and_places(patch_ids)))
                seen += len(image_ids)
                graph.set_banks(banks)

            def features(numbers: Sequence[int]) -> list[Tensor]:
                pixels = self.pixels(tiles, [number - before for number in numbers])
                return graph.rows(graph.embed(pixels))

            grouped = self.grouped
            groups = self._grouped(None, items, range(len(items)), [photos])
            self.grouped |= grouped
            every = [*owners, *(before + group for group in photos.of_each_seen(groups))]
            all_groups = every if self.grouped or isinstance(tiles, Tiles) else None
            leave_one_out = LeaveOneOut(graph, range(before, before + len(tiles)), features, all_groups)
            scored = leave_one_out.scores(lambda done, total: progress("Threshold", done, total))
            of_added = {"scored_indices": range(len(tiles)), "loo_indices": range(len(tiles))}
            result = self._result(
                graph, [graph], [scored], scored[0], self.facts, scored_in=tiles, learned_in=tiles, **of_added
            )
            if self.grouped:
                result = result.of_groups(groups)
            self.remember(photos, items, result.loo_scores)
            if self.captures is not None:
                self.captures = self.captures.widened(photos.captures())
        self.training["copies"] = sorted({*self.training.get("copies", []), *read} - {*self.training["digests"]})
        hashes = (self.training["hash"] + photos.hash).encode()
        self.training["hash"] = hashlib.blake2b(hashes, digest_size=16).hexdigest()
        result.scores = self.calibration_scores + result.scores
        result.map_peaks = self.map_peaks + result.map_peaks
        result.map_median = self.heat_map_range[0]
        return self.adopt(result)

    def _leave_out_known(self, photos: Stack, items: list[Readable]) -> list[Readable]:
        """Keep the photographs that the model has not learned from, one of each part."""
        learned = {*self.training["digests"], *self.training.get("copies", [])}
        new = [number for number, digest in enumerate(photos.digests) if digest not in learned]
        if len(new) < len(photos):
            self.remarks.append(f"{len(photos) - len(new)} of {len(photos)} photographs were learned before.")
            photos.keep(new)
            items = [items[number] for number in new]
        return [items[number] for number in self.leave_out_copies(photos, None, items)]

    @classmethod
    def merge(cls, parts: Sequence[Self]) -> Self:
        """One detector from several that were fitted on shards of the good images: their banks side by side.

        The thresholds follow from all their scores, which were measured against each shard's bank alone and are
        therefore on the safe side; a part that several learned from, by one photograph or by nearly the same, counts
        once. Raises `ModelError` when the parts do not look at images in the same way.
        """
        graphs = [part._single("merged") for part in parts]
        first = parts[0]
        if any(part.preprocessing.alignment != first.preprocessing.alignment for part in parts):
            raise ModelError("Models that align photographs cannot be merged: each turns them to a pose of its own.")
        if any(graph.upsample.zones is not None for graph in graphs):
            raise ModelError("Models of several zones cannot be merged: each has units of its own for their scores.")
        settings = {part.config.model_copy(update={"seed": 0}) for part in parts}
        if len(settings) > 1 or len({weights_hash(graph) for graph in graphs}) > 1:
            raise ModelError("Only models with the same settings and the same backbone can be merged.")
        if any((p.preprocessing, p.measured_on) != (first.preprocessing, first.measured_on) for p in parts):
            raise ModelError("Only models of photographs of one shape and bit depth can be merged.")
        merged = cls(first.config)
        merged.preprocessing = first.preprocessing
        merged.measure_on(first.measured_on, first.map_levels)
        if captures := [part.captures for part in parts if part.captures is not None]:
            merged.captures = Captures.joined(captures)
        graph = PatchCoreGraph(first.config, graphs[0].backbone)
        starts = [sum(part.training["images"] for part in parts[:number]) for number in range(len(parts))]
        first_tiles = [sum(len(part.tiles) for part in parts[:number]) for number in range(len(parts))]
        first_images = starts if first.preprocessing.tiling is None else first_tiles
        banks = [Bank.joined(shards, first_images) for shards in zip(*(graph.banks for graph in graphs), strict=True)]
        inspected = graphs[0].upsample
        graph.set_grids(graphs[0].grids, banks[0].entries.device, lambda upsample: upsample.inherit(inspected))
        graph.set_banks(banks)
        merged.training = {
            "images": sum(part.training["images"] for part in parts),
            "hash": hashlib.blake2b("".join(p.training["hash"] for p in parts).encode(), digest_size=16).hexdigest(),
            "names": [name for part in parts for name in part.training["names"]],
            "digests": [digest for part in parts for digest in part.training["digests"]],
            "copies": [digest for part in parts for digest in part.training.get("copies", [])],
            "suspects": [
                {**outlier, "number": outlier["number"] + start}
                for part, start in zip(parts, starts, strict=True)
                for outlier in part.training["suspects"]
            ],
        }
        if first.preprocessing.tiling is not None:
            merged.training["shapes"] = [shape for part in parts for shape in part.training["shapes"]]
        if all(part.thumbnails for part in parts):
            merged.thumbnails = [picture for part in parts for picture in part.thumbnails]
        scores, peaks, merged.remarks = each_photograph_once(parts)
        merged.grouped = any(part.grouped for part in parts)
        facts = {**first.facts, "bank": [len(bank.entries) for bank in banks]}
        return merged.adopt(FitResult(graph, scores, peaks, first.heat_map_range[0], facts))

    def _copies(self) -> int:
        """Varied copies of each image, whose patches compete for the bank like its own."""
        return 0 if self.augmentation is None else int(self.config.augmented_copies)

    def _single(self, what: str) -> PatchCoreGraph:
        if not isinstance(self.graph, PatchCoreGraph):
            raise ModelError(f"Only a fitted PatchCore with one backbone can be {what}; fit this one again instead.")
        return self.graph

    @classmethod
    def restore_graph(cls, config: Any, tensors: dict[str, Tensor]) -> nn.Module:
        members = config.members()
        if len(members) == 1:
            return _restore(config, tensors, "")
        return EnsembleGraph([_restore(member, tensors, f"members.{n}.") for n, member in enumerate(members)])


def _learned_tiles(photos: Stack) -> list[int] | None:
    """Of photographs in tiles, those that memory banks are chosen from, spread evenly over all; None: all."""
    if not isinstance(photos, Tiles) or len(photos) <= MAX_TILES:
        return None
    return [int(number) for number in np.linspace(0, len(photos) - 1, MAX_TILES).round()]


def _streaming_coresets(
    graph: PatchCoreGraph,
    layers_by_bank: Sequence[Sequence[Tensor]],
    images: int,
    memory_bytes: int,
    most: int | None = None,
) -> list[StreamingCoreset]:
    """One for each bank's layers: a third of the memory, shared by the size of their features.

    A bank is to have `most` entries, or a smaller share of them.
    """
    config = graph.config
    shapes = [[(layer.shape[1], layer.shape[2], layer.shape[3]) for layer in layers] for layers in layers_by_bank]
    device = layers_by_bank[0][0].device
    sizes = [FeatureTable.bytes(1, layers) for layers in shapes]
    shares = [int(memory_bytes / 3 * size / sum(sizes)) for size in sizes]
    kept = [config.coreset if most is None else min(config.coreset, most / (images * len(p))) for p in graph.places]
    return [
        StreamingCoreset(images, layers, of_all, share, config.sampler, config.seed, places.chosen, device)
        for layers, of_all, share, places in zip(shapes, kept, shares, graph.places, strict=True)
    ]


def _fill_banks(graph: PatchCoreGraph, coresets: Sequence[StreamingCoreset], context: FitContext) -> list[float]:
    """Give the graph its memory banks, chosen from the features; the cover radius of each."""
    banks, radii = [], []
    for coreset, places in zip(coresets, graph.places, strict=True):
        entries, patch_ids, radius = coreset.choose(lambda done, total: context.progress("Memory bank", done, total))
        banks.append(Bank.of(entries, *places.images_and_places(patch_ids)))
        radii.append(radius)
    graph.set_banks(banks)
    return radii


def _restore(config: PatchCoreConfig, tensors: dict[str, Tensor], prefix: str) -> PatchCoreGraph:
    network = seen_by(config, lambda look: backbone.blank(config.backbone, look.layers, look.size))
    graph = PatchCoreGraph(config, network)
    names = [f"{prefix}banks.{number}" for number in range(len(graph.taps))]
    buffers = ("entries", "images", "places", "sums", "counts", "centres", "sizes")
    banks = [Bank(*(tensors[f"{name}.{buffer}"] for buffer in buffers)) for name in names]
    grids = [(height, width) for height, width in tensors[f"{prefix}grid_sizes"].tolist()]
    graph.set_grids(grids, banks[0].entries.device, lambda upsample: upsample.restore(tensors, prefix))
    graph.set_banks(banks)
    return graph


def _as_if_new(graph: PatchCoreGraph, leave_one_out: LeaveOneOut) -> tuple[Tensor, Tensor]:
    """Scores (L,) and patch scores of training images, each as if its part in the units of zones were taken out too."""
    scores, grids = leave_one_out.scores_again()
    known = scores.isfinite()
    scores[known], grids[known] = graph.upsample.as_if_new(scores[known], grids[known], graph.config.top)
    return scores, grids


def _recalls(graph: PatchCoreGraph, images: Tensor) -> list[float]:
    """Of each bank's approximate search, for the first training images (B, 3, H, W)."""
    image_ids = torch.arange(len(images), device=images.device)
    pairs = zip(graph.banks, graph.rows(graph.embed(images)), strict=True)
    return [bank.recall(rows, image_ids.repeat_interleave(len(rows) // len(images))) for bank, rows in pairs]
