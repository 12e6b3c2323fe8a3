"""PatchCore: a memory bank of good patches; a patch is as anomalous as it is far from the nearest of them.

Roth et al., "Towards Total Recall in Industrial Anomaly Detection", CVPR 2022.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kizu import backbone, coreset
from kizu.config import PatchCoreConfig
from kizu.detectors.detector import Detector, Learned, Progress
from kizu.maps import MapUpsampling
from kizu.neighbours import nearest
from kizu.patches import PatchFeatures
from kizu.preprocess import Stack

__all__ = ["PatchCore"]

CALIBRATED = 1000  # images that set the threshold where features must be computed again for it


class PatchCoreGraph(nn.Module):
    """uint8 images (B, 3, H, W) → scores (B,), anomaly maps (B, 1, H, W). P = h · w patches, K bank entries."""

    bank: Tensor
    half_norms: Tensor
    bank_images: Tensor

    def __init__(self, config: PatchCoreConfig, network: nn.Module, grid: tuple[int, int] | None = None) -> None:
        """The grid (h, w) of patches is found by a trial run where it is not known."""
        super().__init__()
        self.neighbours, self.reweight = config.neighbours, config.reweight
        self.backbone = network
        self.patches = PatchFeatures(config.patchsize, config.pretrain_embed_dimension, config.target_embed_dimension)
        if grid is None:
            device = next(network.parameters()).device
            trial: Tensor = self.patches(network(torch.zeros(1, 3, *config.size, dtype=torch.uint8, device=device)))
            grid = (trial.shape[2], trial.shape[3])
        self.grid = grid
        self.upsample = MapUpsampling(grid, config.size, config.smoothing)

    def fill(self, bank: Tensor, bank_images: Tensor) -> None:
        """Give it its memory: entries (K, D), and which training image each came from (K,)."""
        self.register_buffer("bank", bank)
        self.register_buffer("half_norms", bank.square().sum(1) / 2)
        self.register_buffer("bank_images", bank_images)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.compare(self.embed(images))

    def embed(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) → patch features (B, P, D), row by row over the grid."""
        features: Tensor = self.patches(self.backbone(images))
        return features.flatten(2).transpose(1, 2)

    def compare(self, features: Tensor, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Scores and maps of patch features (B, P, D). Bank entries from the image's `own` (B,) do not count."""
        count, patches, _ = features.shape
        queries = features.reshape(count * patches, -1)
        excluded = None if own is None else own.repeat_interleave(patches)
        distances, entries = self.nearest(queries, self.neighbours, excluded)
        patch_scores = distances.mean(1).view(count, patches)
        scores, worst = patch_scores.max(1)
        if self.reweight > 1:
            worst = worst + torch.arange(count, device=worst.device) * patches
            scores = scores * self.weight(queries[worst], entries[worst, 0], own)
        return scores, self.upsample(patch_scores.view(count, *self.grid))

    def weight(self, worst: Tensor, entry: Tensor, own: Tensor | None) -> Tensor:
        """Eq. 7, 1 − exp‖m_t − m*‖ / Σ exp‖m_t − m‖ over the bank's m nearest to m*, itself among them.

        `worst` (B, D) are the test patches m_t, `entry` (B,) says which bank entries are their m*.
        """
        _, around = self.nearest(self.bank[entry], self.reweight, own)  # (B, b), m* first
        distances = (worst[:, None] - self.bank[around]).norm(dim=2)
        return 1 - torch.softmax(distances, dim=1)[:, 0]

    def nearest(self, queries: Tensor, count: int, own: Tensor | None) -> tuple[Tensor, Tensor]:
        """Distances (N, count) and bank entries (N, count) of queries (N, D) from the images `own` (N,)."""
        images = None if own is None else self.bank_images
        return nearest(queries, self.bank, count, half_norms=self.half_norms, query_images=own, bank_images=images)


class EnsembleGraph(nn.Module):
    """The mean of several graphs, each scaled by what it says of good images held out."""

    def __init__(self, members: Sequence[PatchCoreGraph]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.register_buffer("score_stats", torch.ones(len(members), 2))  # mean, deviation
        self.register_buffer("map_stats", torch.ones(len(members), 2))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.combine([member(images) for member in self.members])

    def combine(self, outcomes: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Scores (B,) and maps (B, 1, H, W) of each member → of all together."""
        scores = [(s - mean) / std for (s, _), (mean, std) in zip(outcomes, self.score_stats, strict=True)]
        maps = [(m - mean) / std for (_, m), (mean, std) in zip(outcomes, self.map_stats, strict=True)]
        return torch.stack(scores).mean(0), torch.stack(maps).mean(0)

    score_stats: Tensor
    map_stats: Tensor


class PatchCore(Detector):
    """A memory bank of good patches (PatchCore). Settings: the fields of `PatchCoreConfig`."""

    method = "patchcore"

    def learn(self, photos: Stack, held_out: Stack, memory: int, progress: Progress) -> Learned:
        members, outcomes, facts = [], [], []
        with torch.inference_mode():
            for config in self.config.members():
                graph, outcome, fact = self._learn_one(config, photos, held_out, memory, progress)
                members.append(graph)
                outcomes.append(outcome)
                facts.append(fact)
            if len(members) == 1:
                return _learned(members[0], *outcomes[0], facts[0])
            ensemble = EnsembleGraph(members).to(self.device)
            for number, (scores, maps) in enumerate(outcomes):
                for stats, values in ((ensemble.score_stats, scores), (ensemble.map_stats, maps)):
                    values = values[scores.isfinite()]
                    if len(values):
                        spread = values.std(correction=0).clamp(min=1e-6)
                        stats[number] = torch.stack([values.mean(), spread])
            return _learned(ensemble, *ensemble.combine(outcomes), {"members": facts})

    def _learn_one(
        self, config: PatchCoreConfig, photos: Stack, held_out: Stack, memory: int, progress: Progress
    ) -> tuple[PatchCoreGraph, tuple[Tensor, Tensor], dict[str, Any]]:
        """One member: its graph, its scores and maps of good images held out, and facts."""
        network = backbone.create(config.backbone, config.layers, config.weights)
        graph = PatchCoreGraph(config, network.to(self.device)).to(self.device)
        with self.timed("features"):
            patches, total = graph.grid[0] * graph.grid[1], 0
            for numbers, pixels in self.stream(photos, "Features", progress):
                features = graph.embed(pixels)
                if total == 0:
                    total, width = len(photos) * patches, features.shape[2]
                    summary = coreset.Summary(
                        total, width, config.coreset, memory // 3, config.sampler, config.seed, self.device
                    )
                summary.add(features.flatten(0, 1), numbers.repeat_interleave(patches))
        with self.timed("coreset"):
            bank, images, radius = summary.choose(lambda done, most: progress("Memory bank", done, most))
            graph.fill(bank, images)
        with self.timed("calibration"):
            whole = summary.rows.view(len(photos), patches, width) if summary.is_whole else None
            outcome = self._calibrate(graph, photos, whole, held_out, progress)
        facts = {"bank": len(bank), "dimension": width, "patches": total, "radius": radius}
        return graph, outcome, facts

    def _calibrate(
        self, graph: PatchCoreGraph, photos: Stack, features: Tensor | None, held_out: Stack, progress: Progress
    ) -> tuple[Tensor, Tensor]:
        """Scores (M,) and maps of the held-out images, or else of the training images, each without its own entries.

        Where the features (N, P, D) are not at hand any more, they are computed again, of at most `CALIBRATED` images.
        """
        outcomes = []
        if len(held_out):
            outcomes = [graph(pixels) for _, pixels in self.stream(held_out, "Threshold", progress)]
        elif features is not None:
            for own in torch.arange(len(features), device=features.device).split(4):
                outcomes.append(graph.compare(features[own], own))
                progress("Threshold", int(own[-1]) + 1, len(features))
        else:
            step = max(1, len(photos) // CALIBRATED)
            for number in range(0, len(photos), step):
                pixels = torch.from_numpy(photos.batch(number, number + 1)).to(self.device)
                outcomes.append(graph.compare(graph.embed(pixels), torch.tensor([number], device=self.device)))
                progress("Threshold", min(number + step, len(photos)), len(photos))
        return torch.cat([scores for scores, _ in outcomes]), torch.cat([maps for _, maps in outcomes])

    @classmethod
    def restore_graph(cls, config: Any, tensors: dict[str, Tensor]) -> nn.Module:
        members = config.members()
        if len(members) == 1:
            return _restore_one(config, tensors, "")
        return EnsembleGraph([_restore_one(one, tensors, f"members.{n}.") for n, one in enumerate(members)])


def _restore_one(config: PatchCoreConfig, tensors: dict[str, Tensor], prefix: str) -> PatchCoreGraph:
    grid = (tensors[f"{prefix}upsample.rows"].shape[1], tensors[f"{prefix}upsample.columns"].shape[1])
    graph = PatchCoreGraph(config, backbone.Backbone(config.backbone, config.layers), grid)
    graph.fill(tensors[f"{prefix}bank"], tensors[f"{prefix}bank_images"])
    return graph


def _learned(graph: nn.Module, scores: Tensor, maps: Tensor, facts: dict[str, Any]) -> Learned:
    known = scores.isfinite()  # an image that alone filled the bank has nothing else to be compared with
    peaks = maps.flatten(1).amax(1)[known]
    middle = float(maps[known].median()) if known.any() else 0.0
    return Learned(graph, scores[known].tolist(), peaks.tolist(), middle, facts)
