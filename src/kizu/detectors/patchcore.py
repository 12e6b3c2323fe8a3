"""PatchCore: a memory bank of good patches; a patch is as anomalous as it is far from the nearest of them.

Roth et al., "Towards Total Recall in Industrial Anomaly Detection", CVPR 2022.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from kizu import backbone, coreset
from kizu.config import PatchCoreConfig
from kizu.detectors.detector import Detector, Learned, Progress
from kizu.maps import MapUpsampling
from kizu.neighbours import nearest
from kizu.patches import PatchFeatures

__all__ = ["PatchCore"]


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


class PatchCore(Detector):
    """A memory bank of good patches (PatchCore). Settings: the fields of `PatchCoreConfig`."""

    method = "patchcore"

    def learn(self, photos: npt.NDArray[np.uint8], held_out: npt.NDArray[np.uint8], progress: Progress) -> Learned:
        network = backbone.create(self.config.backbone, self.config.layers, self.config.weights)
        with torch.inference_mode():
            graph = PatchCoreGraph(self.config, network.to(self.device)).to(self.device)
            with self.timed("features"):
                features = torch.cat([graph.embed(batch) for batch in self.stream(photos, "Features", progress)])
            with self.timed("coreset"):
                rows = features.flatten(0, 1)  # (N · P, D)
                chosen = coreset.select(
                    rows,
                    max(1, int(len(rows) * self.config.coreset)),
                    self.config.sampler,
                    seed=self.config.seed,
                    progress=lambda done, total: progress("Memory bank", done, total),
                )
                entries = chosen.indices.to(self.device)
                graph.fill(rows[entries], entries // features.shape[1])
            with self.timed("calibration"):
                scores, maps = self._calibrate(graph, features, held_out, progress)
        facts = {"bank": len(entries), "dimension": rows.shape[1], "patches": len(rows), "radius": chosen.radius}
        known = scores.isfinite()  # an image that alone filled the bank has nothing else to be compared with
        peaks = maps.flatten(1).amax(1)[known]
        middle = float(maps[known].median()) if known.any() else 0.0
        return Learned(graph, scores[known].tolist(), peaks.tolist(), middle, facts)

    def _calibrate(
        self, graph: PatchCoreGraph, features: Tensor, held_out: npt.NDArray[np.uint8], progress: Progress
    ) -> tuple[Tensor, Tensor]:
        """Scores and maps of the held-out images, or else of the training images, each without its own entries."""
        if len(held_out):
            outcomes = [graph(batch) for batch in self.stream(held_out, "Threshold", progress)]
        else:
            outcomes = []
            for start in range(0, len(features), 4):
                own = torch.arange(start, min(start + 4, len(features)), device=features.device)
                outcomes.append(graph.compare(features[start : start + 4], own))
                progress("Threshold", start + len(own), len(features))
        return torch.cat([scores for scores, _ in outcomes]), torch.cat([maps for _, maps in outcomes])

    @classmethod
    def restore_graph(cls, config: Any, tensors: dict[str, Tensor]) -> nn.Module:
        grid = (tensors["upsample.rows"].shape[1], tensors["upsample.columns"].shape[1])
        graph = PatchCoreGraph(config, backbone.Backbone(config.backbone, config.layers), grid)
        graph.fill(tensors["bank"], tensors["bank_images"])
        return graph
