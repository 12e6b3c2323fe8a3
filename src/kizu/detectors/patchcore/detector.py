"""PatchCore: memory banks of good patches; a patch is as anomalous as it is far from the nearest of them.

Roth et al., "Towards Total Recall in Industrial Anomaly Detection", CVPR 2022. Beyond the paper, and switchable: a bank
a layer instead of one of all layers (`fusion`), distances measured in units of what is usual around a bank entry
(`local_scale`), and an image score from its most anomalous patches instead of one (`top`).
"""

import hashlib
import math
import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any, Self, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kizu.calibration.threshold import images_needed
from kizu.config import PatchCoreConfig
from kizu.data.progress import Progress, silent
from kizu.detectors.base import Detector
from kizu.detectors.fitting import FitContext, FitResult
from kizu.detectors.patchcore import coreset
from kizu.detectors.patchcore.feature_table import Rows
from kizu.detectors.patchcore.graph import EnsembleGraph
from kizu.detectors.patchcore.leave_one_out import LeaveOneOut
from kizu.detectors.patchcore.memory_bank import Bank, Hits
from kizu.detectors.patchcore.quantised import QuantisedCells
from kizu.detectors.ram import budget, tidy
from kizu.errors import DataError, ModelError
from kizu.features import backbone
from kizu.features.anomaly_map import MapUpsampling
from kizu.features.backbone import weights_hash
from kizu.features.patch_features import PatchFeatures, as_rows
from kizu.inference.prediction import NearestPatch

__all__ = ["PatchCore"]

CALIBRATED = 1000  # images that set scales and threshold where their features must be computed again for it


class PatchCoreGraph(nn.Module):
    """uint8 images (B, 3, H, W) → scores (B,), anomaly maps (B, 1, H, W)."""

    banks: Sequence[Bank]  # one for each tap; an nn.ModuleList, so that they are saved with the graph

    def __init__(self, config: PatchCoreConfig, network: backbone.Backbone) -> None:
        super().__init__()
        self.config = config
        self.backbone = network
        taps = [slice(None)] if config.fusion == "stack" else [slice(n, n + 1) for n in range(len(network.layers))]
        self.taps = taps  # the layers of each bank
        self.patches = PatchFeatures(
            config.patchsize,
            config.pretrain_embed_dimension,
            config.target_embed_dimension,
            config.patchstride,
            config.patchsize_aggregate,
        )
        self.banks = cast("Sequence[Bank]", nn.ModuleList())

    def complete(self, banks: Sequence[Bank], grids: Sequence[tuple[int, int]]) -> None:
        """Give it its memory, and the grid of patches (h, w) that each bank is for; the map is made from the first."""
        self.banks, self.grids = cast("Sequence[Bank]", nn.ModuleList(banks)), list(grids)
        if self.config.search == "ivfpq":
            for bank in banks:
                bank.quantise = partial(QuantisedCells, on_gpu=self.config.faiss_on_gpu)
        self.register_buffer("grid_sizes", torch.tensor(grids))  # so that a saved model knows them
        self.upsample = MapUpsampling(grids[0], self.config.size, self.config.smoothing).to(banks[0].entries.device)

    def embed(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) → patch features (B, D, h, w) for each bank."""
        return self.gather(self.backbone(images))

    def gather(self, maps: list[Tensor]) -> list[Tensor]:
        """The layers' maps → patch features for each bank."""
        return [self.patches(maps[tap]) for tap in self.taps]

    def parts(self, images: Tensor) -> list[list[Tensor]]:
        """(B, 3, H, W) → for each bank what its patch features are stacked from, layer by layer (B, C, h', w')."""
        maps = self.backbone(images)
        return [self.patches.pooled(maps[tap]) for tap in self.taps]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        scores, grid = self.rate(images)
        anomaly_maps: Tensor = self.upsample(grid)
        return scores, anomaly_maps

    def forward_with_global_features(self, images: Tensor, kind: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """As `forward`, and the global features of `Backbone.forward_with_global_features` from the same pass."""
        maps, global_features = self.backbone.forward_with_global_features(images, kind)
        scores, grid = self.rate_layers(self.gather(maps))
        return scores, self.upsample(grid), global_features

    def global_features(self, images: Tensor, kind: str) -> dict[str, Tensor]:
        """Global features alone, as `forward_with_global_features` gives them."""
        return self.backbone.forward_with_global_features(images, kind)[1]

    def forward_with_extras(self, images: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """As `forward`, and for each bank the entry nearest to each patch (B, h, w), and how unusually far it is."""
        layers = self.embed(images)
        hits = [self.search(bank, as_rows(layer)) for bank, layer in zip(self.banks, layers, strict=True)]
        scores, grid = self.judge(hits, [layer.shape for layer in layers])
        extras = {}
        for number, (bank, hit, layer) in enumerate(zip(self.banks, hits, layers, strict=True)):
            entries, grid_shape = hit.entries[:, 0], (layer.shape[0], *layer.shape[2:])
            usual = bank.usual(self.config.local_scale)[entries]
            extras[f"entry {number}"] = entries.view(grid_shape)
            extras[f"distance {number}"] = (hit.distances[:, 0] / usual).view(grid_shape)
        return scores, self.upsample(grid), extras

    def rate(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) → scores (B,) and patch scores (B, h, w)."""
        return self.rate_layers(self.embed(images))

    def rate_layers(self, layers: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """As `rate`, from patch features for each bank."""
        hits = [self.search(bank, as_rows(layer)) for bank, layer in zip(self.banks, layers, strict=True)]
        return self.judge(hits, [layer.shape for layer in layers])

    def search(self, bank: Bank, queries: Tensor, own: Tensor | None = None) -> Hits:
        """What is nearest in a bank to queries (N, D), among the entries that are not from their own images (N,)."""
        distances, entries = bank.search(queries, self.config.neighbours, own)
        return Hits(distances, entries, queries if self.config.reweight > 1 else None, own)

    def as_if_new(self, hits: Sequence[Hits], among_others: Sequence[Hits]) -> tuple[Tensor, Tensor]:
        """As `rate`, a training image from its hits, as if it had not been learned from.

        What it found among other images' entries is taken out of the scales, and is where Eq. 7 looks.
        """
        shapes = [(1, 0, *grid) for grid in self.grids]
        return self.judge(hits, shapes, among_others)

    def judge(
        self, hits: Sequence[Hits], shapes: Sequence[Sequence[int]], without: Sequence[Hits] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Scores and patch scores of images from their hits in each bank, for features of `shapes`."""
        grids = []
        for number, (bank, hit, (count, _, height, width)) in enumerate(zip(self.banks, hits, shapes, strict=True)):
            rated = self.patch_scores(bank, hit, None if without is None else without[number])
            grids.append(rated.view(count, 1, height, width))
        grid = grids[0]
        if len(grids) > 1:
            aligned = [F.interpolate(one, self.grids[0], mode="bilinear", align_corners=False) for one in grids[1:]]
            grid = torch.stack([grid, *aligned]).mean(0)
        flat = grid.flatten(1)
        most = max(1, round(self.config.top * flat.shape[1]))
        scores = flat.topk(most, dim=1).values.mean(1)
        if self.config.reweight > 1:
            images = torch.arange(flat.shape[0], device=flat.device)  # len() would fix their number in an export
            worst = flat.argmax(1) + images * flat.shape[1]
            scores = scores * self.weight((hits if without is None else without)[0], worst)
        return scores, grid[:, 0]

    def patch_scores(self, bank: Bank, hit: Hits, without: Hits | None) -> Tensor:
        """(N,): distances as they are, or in units of what is usual around the entries, or in the whole bank."""
        if self.config.fusion == "stack" and not self.config.local_scale:
            return (hit.distances.square() if self.config.squared else hit.distances).mean(1)
        usual = bank.usual(self.config.local_scale, without)
        return (hit.distances / usual[hit.entries]).mean(1)

    def nearest(self, image: Tensor, place: tuple[float, float]) -> tuple[float, int, tuple[float, float]]:
        """What is nearest to a place of an image (1, 3, H, W), in the bank to which it is the most unusual.

        The distance in units of what is usual there, the training image, and the place there; places are x, y as shares
        of width and height.
        """
        found = []
        for bank, layer, (height, width) in zip(self.banks, self.embed(image), self.grids, strict=True):
            column, row = int(place[0] * width), int(place[1] * height)
            distances, entries = bank.search(layer[:, :, row, column], 1)
            entry = int(entries[0, 0])
            row, column = divmod(int(bank.places[entry]), width)
            distance = float(distances[0, 0] / bank.usual(self.config.local_scale)[entry])
            found.append((distance, int(bank.images[entry]), ((column + 0.5) / width, (row + 0.5) / height)))
        return max(found)

    def weight(self, hit: Hits, worst: Tensor) -> Tensor:
        """Eq. 7, 1 − exp‖m_t − m*‖ / Σ exp‖m_t − m‖ over the bank's m nearest to m*, itself among them.

        `worst` (B,) says which queries are the images' most anomalous patches m_t.
        """
        bank = self.banks[0]
        assert hit.queries is not None
        nearest_entries = bank.entries[hit.entries[worst, 0]]  # m* (B, D)
        own = None if hit.own is None else hit.own[worst]
        around = bank.around(nearest_entries, self.config.reweight, own)  # (B, b), m* first
        distances = (hit.queries[worst][:, None] - bank.entries[around]).norm(dim=2)
        return 1 - torch.softmax(distances, dim=1)[:, 0]


class PatchCore(Detector):
    """Memory banks of good patches (PatchCore). Settings: the fields of `PatchCoreConfig`."""

    method = "patchcore"
    config_class = PatchCoreConfig

    def learn(self, context: FitContext) -> FitResult:
        photos, held_out = context.photos, context.held_out
        with torch.inference_mode():
            learned = [self._learn_one(config, context) for config in self.config.members()]
            graphs, rated, as_new, facts = zip(*learned, strict=True)
            searched = self._searched(len(photos), len(as_new[0]) == len(photos))
            numbers = range(len(held_out)) if len(held_out) else searched
            if len(graphs) == 1:
                return _learned(graphs[0], graphs, rated, as_new[0], facts[0], numbers, searched)
            ensemble = EnsembleGraph(graphs).to(self.device)
            ensemble.learn_stats(rated)
            scaled = [(scores - mean) / std for scores, (mean, std) in zip(as_new, ensemble.score_stats, strict=True)]
            alike = len({len(scores) for scores in scaled}) == 1  # the members judged the same images
            together = torch.stack(scaled).mean(0) if alike else scaled[0]
            return _learned(ensemble, graphs, rated, together, {"members": list(facts)}, numbers, searched)

    def _learn_one(
        self, config: PatchCoreConfig, context: FitContext
    ) -> tuple[PatchCoreGraph, tuple[Tensor, Tensor], Tensor, dict[str, Any]]:
        """One member: its graph, its scores and patch scores of good images held out, its scores of the training images
        as if each were new, and facts."""
        network = backbone.create(config.backbone, config.layers, config.weights, config.size)
        graph = PatchCoreGraph(config, network.to(self.device))
        summaries: list[coreset.Summary] = []
        photos, copies = context.photos, self._copies()
        with context.timed("features"):
            for numbers, pixels in self.stream(photos, "Features", context.progress, copies=copies):
                each = graph.parts(pixels)
                if not summaries:
                    grids = [(parts[0].shape[2], parts[0].shape[3]) for parts in each]
                    self.remarks += graph.patches.remarks(grids[0])
                    summaries = _summaries(config, each, len(photos) * (1 + copies), context.memory_bytes)
                for summary, parts in zip(summaries, each, strict=True):
                    summary.add(parts, _patch_numbers(numbers, parts[0].shape[2] * parts[0].shape[3]))
        with context.timed("coreset"), tidy():
            banks, radii = [], []
            for summary, (height, width) in zip(summaries, grids, strict=True):
                entries, patches, radius = summary.choose(
                    lambda done, total: context.progress("Memory bank", done, total)
                )
                banks.append(Bank.of(entries, patches // (height * width), patches % (height * width)))
                radii.append(radius)
            del entries, patches
            graph.complete(banks, grids)
        facts: dict[str, Any] = {
            "bank": [len(bank.entries) for bank in banks],
            "dimension": [bank.entries.shape[1] for bank in banks],
            "patches": [summary.total for summary in summaries],
            "radius": radii,
        }
        with context.timed("calibration"), tidy():
            outcome, as_new = self._calibrate(graph, summaries, context)
            if config.search != "exact":
                facts["recall"] = _recalls(graph, torch.from_numpy(photos.batch(0, 4)).to(self.device))
        return graph, outcome, as_new, facts

    def _calibrate(
        self, graph: PatchCoreGraph, summaries: Sequence[coreset.Summary], context: FitContext
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Scores (M,) and patch scores of the held-out images, or else of the training images; and the latter's scores.

        Training images are judged each as if it were new.
        """
        photos, held_out, progress = context.photos, context.held_out, context.progress
        at_hand = all(summary.is_whole for summary in summaries)
        places = [height * width for height, width in graph.grids]

        def features(numbers: Sequence[int]) -> list[Tensor]:
            if at_hand:  # originals come first
                first, last = numbers[0], numbers[-1] + 1
                return [summary.rows.span(first * p, last * p) for summary, p in zip(summaries, places, strict=True)]
            return [as_rows(layer) for layer in graph.embed(self.pixels(photos, numbers))]

        numbers = self._searched(len(photos), at_hand)
        as_new = LeaveOneOut(graph, numbers, features).judged(lambda *done: progress("Threshold", *done))
        if not len(held_out):
            return as_new, as_new[0]
        rated = [graph.rate(pixels) for _, pixels in self.stream(held_out, "Threshold", progress)]
        return (torch.cat([scores for scores, _ in rated]), torch.cat([grids for _, grids in rated])), as_new[0]

    def _searched(self, images: int, at_hand: bool) -> range:
        """The training images that are judged as if they were new; fewer where each costs time."""
        enough = max(CALIBRATED, images_needed(self.config.false_alarms))
        return range(0, images, 1 if at_hand else max(1, images // enough))

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
        kept: dict[str, Tensor] = {}
        for number, bank in enumerate(self._first().banks):
            kept |= {f"images {number}": bank.images, f"places {number}": bank.places}
        return kept

    def _first(self) -> PatchCoreGraph:
        """The only member, or an ensemble's first."""
        graph = self.graph.members[0] if isinstance(self.graph, EnsembleGraph) else self.graph
        assert isinstance(graph, PatchCoreGraph)
        return graph

    def nearest_good(self, seen: npt.NDArray[np.uint8], place: tuple[float, float]) -> NearestPatch | None:
        graph = self._first()
        with torch.inference_mode():
            pixels = torch.from_numpy(seen.transpose(2, 0, 1)[None].copy()).to(self.device)
            distance, number, (x, y) = graph.nearest(pixels, (place[0] / seen.shape[1], place[1] / seen.shape[0]))
        if number < 0:  # of an image that another program learned from
            return None
        return NearestPatch(self.training["names"][number], number, (x, y), distance)

    def update(
        self,
        good: Any,
        *,
        memory: str | int | None = None,
        skip_bad: bool = False,
        progress: Progress | None = None,
    ) -> Self:
        """Learn more good images without the old ones; the banks keep their sizes.

        New patches compete with the old entries for their places (k-centre over both). The levels follow from the old
        images' scores, as they were, and the new ones', each as if it were new. Raises `ModelError` for an ensemble.
        """
        graph = self._single("updated")
        progress = progress or silent
        photos, items = self.read(good, budget(memory) // 8, skip_bad, progress)
        if len(photos) == 0:
            raise DataError("There is no image to learn from.")
        before = self.training["images"]
        with torch.inference_mode(), photos:
            for numbers, pixels in self.stream(photos, "Features", progress, copies=self._copies()):
                layers = [as_rows(layer) for layer in graph.embed(pixels)]
                banks = []
                for bank, rows in zip(graph.banks, layers, strict=True):
                    count = len(rows) // len(numbers)
                    patches = _patch_numbers(numbers + before, count)
                    banks.append(bank.exchanged(rows, patches // count, patches % count))
                graph.complete(banks, graph.grids)

            def features(numbers: Sequence[int]) -> list[Tensor]:
                some = [number - before for number in numbers]
                return [as_rows(layer) for layer in graph.embed(self.pixels(photos, some))]

            added = range(before, before + len(photos))
            judged = LeaveOneOut(graph, added, features).judged(lambda *done: progress("Threshold", *done))
            every = range(len(photos))
            new = _learned(graph, [graph], [judged], judged[0], self.facts, every, every)
            self.remember(photos, items, new.loo_scores)
        both = (self.training["hash"] + photos.hash).encode()
        self.training["hash"] = hashlib.blake2b(both, digest_size=16).hexdigest()
        new.scores = self.calibration_scores + new.scores
        new.map_peaks = self.map_peaks + new.map_peaks
        new.map_median = self.heat_map_range[0]
        return self.adopt(new)

    @classmethod
    def merge(cls, parts: Sequence[Self]) -> Self:
        """One detector from several that were fitted on shards of the good images: their banks side by side.

        The levels follow from all their scores, which were measured against each shard's bank alone and are therefore
        on the safe side. Raises `ModelError` when the parts do not look at images in the same way.
        """
        graphs = [part._single("merged") for part in parts]
        first = parts[0]
        settings = {part.config.model_copy(update={"seed": 0}) for part in parts}
        if len(settings) > 1 or len({weights_hash(graph) for graph in graphs}) > 1:
            raise ModelError("Only models with the same settings and the same backbone can be merged.")
        merged = cls(first.config)
        graph = PatchCoreGraph(first.config, graphs[0].backbone)
        starts = [sum(part.training["images"] for part in parts[:number]) for number in range(len(parts))]
        banks = [Bank.joined(shards, starts) for shards in zip(*(graph.banks for graph in graphs), strict=True)]
        graph.complete(banks, graphs[0].grids)
        merged.training = {
            "images": sum(part.training["images"] for part in parts),
            "hash": hashlib.blake2b("".join(p.training["hash"] for p in parts).encode(), digest_size=16).hexdigest(),
            "names": [name for part in parts for name in part.training["names"]],
            "digests": [digest for part in parts for digest in part.training["digests"]],
            "suspects": [
                {**one, "number": one["number"] + start}
                for part, start in zip(parts, starts, strict=True)
                for one in part.training["suspects"]
            ],
        }
        if all(part.thumbnails for part in parts):
            merged.thumbnails = [picture for part in parts for picture in part.thumbnails]
        scores = [score for part in parts for score in part.calibration_scores]
        peaks = [peak for part in parts for peak in part.map_peaks]
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
            return _restore_one(config, tensors, "")
        return EnsembleGraph([_restore_one(one, tensors, f"members.{n}.") for n, one in enumerate(members)])


def _patch_numbers(images: Tensor, patches: int) -> Tensor:
    """(B,) → (B · patches,): image · patches + place, one number for each patch."""
    return (images[:, None] * patches + torch.arange(patches, device=images.device)).flatten()


def _summaries(
    config: PatchCoreConfig, banks: Sequence[Sequence[Tensor]], images: int, memory: int
) -> list[coreset.Summary]:
    """One for each bank's layers: a third of the memory, shared by the size of their features."""
    shapes = [[(part.shape[1], part.shape[2], part.shape[3]) for part in parts] for parts in banks]
    sizes = [Rows.bytes(1, layers) for layers in shapes]
    rooms = [int(memory / 3 * size / sum(sizes)) for size in sizes]
    return [
        coreset.Summary(images, layers, config.coreset, room, config.sampler, config.seed, parts[0].device)
        for layers, room, parts in zip(shapes, rooms, banks, strict=True)
    ]


def _restore_one(config: PatchCoreConfig, tensors: dict[str, Tensor], prefix: str) -> PatchCoreGraph:
    graph = PatchCoreGraph(config, backbone.blank(config.backbone, config.layers, config.size))
    names = [f"{prefix}banks.{number}" for number in range(len(graph.taps))]
    parts = ("entries", "images", "places", "sums", "counts", "centres", "sizes")
    banks = [Bank(*(tensors[f"{name}.{part}"] for part in parts)) for name in names]
    graph.complete(banks, [(height, width) for height, width in tensors[f"{prefix}grid_sizes"].tolist()])
    return graph


def _recalls(graph: PatchCoreGraph, images: Tensor) -> list[float]:
    """Of each bank's approximate search, for the first training images (B, 3, H, W)."""
    numbers = torch.arange(len(images), device=images.device)
    layers = [as_rows(layer) for layer in graph.embed(images)]
    both = zip(graph.banks, layers, strict=True)
    return [bank.recall(rows, numbers.repeat_interleave(len(rows) // len(images))) for bank, rows in both]


def _learned(
    graph: nn.Module,
    members: Sequence[PatchCoreGraph],
    rated: Sequence[tuple[Tensor, Tensor]],
    as_new: Tensor,
    facts: dict[str, Any],
    numbers: Sequence[int],
    searched: Sequence[int],
) -> FitResult:
    """What follows from the members' scores (M,) and patch scores of good images of these numbers.

    `as_new` are scores of the training images that were searched for. Maps are made a few at a time.
    """
    known = rated[0][0].isfinite()  # an image that alone filled the bank has nothing else to be compared with
    scores: list[float] = []
    peaks: list[float] = []
    medians: list[float] = []
    for some in known.nonzero()[:, 0].split(16):
        outcomes = [(s[some], member.upsample(grids[some])) for member, (s, grids) in zip(members, rated, strict=True)]
        both = graph.combine(outcomes) if isinstance(graph, EnsembleGraph) else outcomes[0]
        scores += both[0].tolist()
        peaks += both[1].flatten(1).amax(1).tolist()
        medians += both[1].flatten(1).median(1).values.tolist()
    median = statistics.median(medians) if medians else 0.0
    pairs = zip(searched, as_new.tolist(), strict=True)
    known_as_new = {number: score for number, score in pairs if math.isfinite(score)}
    judged = [numbers[row] for row in known.nonzero()[:, 0].tolist()]
    return FitResult(graph, scores, peaks, median, facts, known_as_new, judged)
