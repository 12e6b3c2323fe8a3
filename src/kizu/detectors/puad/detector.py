"""PUAD: what can be pointed at, judged by another method, and what cannot: the whole image's feature.

Sugawara & Imamura, "PUAD: Frustratingly Simple Method for Robust Anomaly Detection", ICIP 2024. The head is the
Mahalanobis distance of the mean feature. Beyond the paper, and switchable: any method under it, a balance, and a gate
whose level good images alone set (`gate`). One pass of the network gives map, score and feature.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from kizu.calibration.threshold import calibrate
from kizu.config import PUADConfig
from kizu.data import image as images
from kizu.data.preprocessing import Stack
from kizu.data.progress import Progress
from kizu.detectors import detector_class
from kizu.detectors.base import Detector
from kizu.detectors.fitting import FitContext, FitResult
from kizu.detectors.puad.gaussian import ROUNDING, Gaussian, cross_fitted
from kizu.errors import ModelError
from kizu.inference.image_features import GlobalFeatures

__all__ = ["PUAD", "PUADGraph"]

FOLDS = 10
VALIDATED = 0.15  # share of the good images that --exact standardises by, where the base keeps none (reference: 0.15)
REMEMBERED = 1000  # good images that others are compared with
WHISPER = 0.1  # weight of a logical score that good images reach too: adds 0.5 % to the deviation of their sums


class PUADGraph(nn.Module):
    """uint8 images (B, 3, H, W) → scores (B,), anomaly maps (B, 1, H, W)."""

    mean: Tensor
    unit: Tensor
    level: Tensor
    good: Tensor
    numbers: Tensor
    sizes: Tensor

    def __init__(self, config: PUADConfig, base: nn.Module, head: Gaussian, good: int, groups: int) -> None:
        super().__init__()
        self.base: Any = base
        self.head, self.kind = head, config.whole
        self.balance, self.gated = config.balance, config.gate and not config.exact
        self.register_buffer("mean", torch.zeros(2, dtype=torch.float64))  # of (structural, logical), of good images
        self.register_buffer("unit", torch.ones(2, dtype=torch.float64))  # their deviation
        self.register_buffer("level", torch.tensor(torch.inf, dtype=torch.float64))  # few good images' logical scores
        self.register_buffer("good", torch.zeros(good, len(head.mean)))  # whitened features of good images
        self.register_buffer("numbers", torch.zeros(good, dtype=torch.int64))  # their numbers among the images
        self.register_buffer("sizes", torch.zeros(groups, dtype=torch.int64))  # features of each group

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        scores, anomaly_maps, _, _ = self.explained(images)
        return scores, anomaly_maps

    def explained(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Scores, maps, both standardised scores (B, 2), and the whole images' whitened features (B, D)."""
        structural, anomaly_maps, global_features = self.base.forward_with_global_features(images, self.kind)
        whitened = self.head.whitened(joined(global_features))
        parts = self.standardised(structural, whitened.norm(dim=1))
        return self.combined(parts).to(structural.dtype), anomaly_maps, parts, whitened

    def standardised(self, structural: Tensor, distances: Tensor) -> Tensor:
        """(B,) and (B,) → (B, 2): in deviations of good images above their mean."""
        return (torch.stack([structural.double(), distances], dim=1) - self.mean) / self.unit

    def combined(self, parts: Tensor) -> Tensor:
        """(B, 2) → (B,)."""
        return self.contributions(parts).sum(1)

    def contributions(self, parts: Tensor) -> Tensor:
        """(B, 2): what each adds to the score.

        Behind the gate, the logical score is heard in full only where it exceeds what good images hardly ever reach.
        """
        structural, logical = parts.unbind(1)
        if self.gated:
            logical = WHISPER * logical + (1 - WHISPER) * (logical - self.level).clamp(min=0)
        return torch.stack([2 * (1 - self.balance) * structural, 2 * self.balance * logical], dim=1)


class PUAD(Detector):
    """Another method and a head that sees the whole image (PUAD). Settings: the fields of `PUADConfig`."""

    method = "puad"
    config_class = PUADConfig
    over: Detector | None = None  # a base that has learned already: it stays as it is, and judges what is held out

    def learn(self, context: FitContext) -> FitResult:
        photos, held_out, progress = context.photos, context.held_out, context.progress
        base = self._base()
        if self.over is None:
            learned = base.learn(context)
        else:
            assert self.over.graph is not None
            learned = self.over.score_held_out(self.over.graph, held_out, progress)
        self.curves, self.remarks = base.curves, [*self.remarks, *base.remarks]
        with context.timed("whole images"), torch.inference_mode():
            good, groups = self._wholes(learned.graph, photos, progress)
            others = self._wholes(learned.graph, held_out, progress)[0] if len(held_out) else None
            return self._with_head(learned, good, others, groups)

    def _base(self) -> Detector:
        base = detector_class(self.config.base)(self.config.base_config)
        base.device, base.workers = self.device, self.workers
        return base

    def _wholes(self, graph: Any, photos: Stack, progress: Progress) -> tuple[Tensor, dict[str, int]]:
        """Whole images' features (N, D), and how many are of each group."""
        found = [
            graph.global_features(pixels, self.config.whole)
            for _, pixels in self.stream(photos, "Whole images", progress)
        ]
        return torch.cat([joined(wholes) for wholes in found]), {name: w.shape[1] for name, w in found[0].items()}

    def _with_head(self, learned: FitResult, good: Tensor, others: Tensor | None, groups: dict[str, int]) -> FitResult:
        """The base's result with the head fitted to whole images' features (N, D), and the scores of both."""
        head, places, distances, usual = self._judged_as_new(good, others, learned.scored_indices)
        graph = PUADGraph(self.config, learned.graph, head, min(len(good), REMEMBERED), len(groups))
        graph.to(good.device)
        graph.sizes = torch.tensor(list(groups.values()), device=good.device)
        graph.numbers = torch.linspace(0, len(good) - 1, len(graph.numbers), device=good.device).round().long()
        graph.good = head.whitened(good[graph.numbers]).float()
        structural = torch.tensor([learned.scores[place] for place in places], dtype=torch.float64, device=good.device)
        self._standardise(graph, structural, distances)
        parts = graph.standardised(structural, distances)
        level = calibrate(parts[:, 1].tolist(), self.config.false_alarms)
        graph.level.fill_(level.value)
        scores = graph.combined(parts).tolist()
        self._remark(head, good)
        facts = {
            **learned.facts,
            "groups": groups,
            "shrinkage": head.shrinkage,
            "distance of images learned from": _median(usual),
            "distance of images held out": _median(distances),
            "logical level": level.value if level.count else None,
        }
        return replace(learned, graph=graph, scores=scores, facts=facts)

    def _judged_as_new(
        self, good: Tensor, others: Tensor | None, judged: Sequence[int]
    ) -> tuple[Gaussian, Sequence[int], Tensor, Tensor]:
        """The head; which of the base's scores the images are of that it is measured on; the distances of these as if
        new (M,), and of the images that the head was fitted to.
        """
        rows = torch.tensor(judged, dtype=torch.int64, device=good.device)
        everything = range(len(judged))
        if others is not None:
            head = Gaussian.fitted(good)
            return head, everything, head(others[rows]), head(good)
        order = np.random.default_rng([self.config.seed, len(good)]).permutation(len(good))
        if not self.config.exact:
            head = Gaussian.fitted(good)
            folds = [torch.from_numpy(fold).to(good.device) for fold in np.array_split(order, FOLDS) if len(fold)]
            distances = cross_fitted(good, folds)[rows]
            known = distances.isfinite()
            return head, known.nonzero()[:, 0].tolist(), distances[known], head(good)
        places: Sequence[int] = everything
        if len(judged) == len(good):
            places = sorted(order[: max(1, int(VALIDATED * len(good)))].tolist())
        kept = rows[torch.tensor(places, dtype=torch.int64, device=good.device)]
        fitted = torch.ones(len(good), dtype=torch.bool, device=good.device)
        fitted[kept] = len(good) == len(kept)  # an image alone is fitted to all the same
        head = Gaussian.fitted(good[fitted])
        return head, places, head(good[kept]), head(good[fitted])

    def _standardise(self, graph: PUADGraph, structural: Tensor, distances: Tensor) -> None:
        """By the scores (M,) of good images held out; a deviation that is not there is one."""
        if len(distances) < 2:
            self.remarks.append(
                f"{len(distances)} good images are left to put both scores on one scale, and two are needed: they are "
                "added as they are. Give more good images."
            )
        for number, (values, name) in enumerate(((structural, "structural"), (distances, "logical"))):
            if not len(values):
                continue
            deviation = float(values.std(correction=0))
            graph.mean[number] = values.mean()
            if deviation > ROUNDING * abs(float(values.mean())):
                graph.unit[number] = deviation
            elif len(values) > 1:
                self.remarks.append(
                    f"All good images held out have the same {name} score: it is added in its own unit."
                )

    def _remark(self, head: Gaussian, good: Tensor) -> None:
        count, dimension = good.shape
        if head.is_flat:
            self.remarks.append(
                "Nothing differs between the good images' features as wholes: the distance of the whole image says "
                "nothing. Give more good images."
            )
        elif count <= dimension:
            self.remarks.append(
                f"{count} good images have {dimension} features as wholes: their covariance is half guessed "
                f"(shrinkage {head.shrinkage:.2f}); more than {dimension} images settle it."
            )

    def score_in_parts(self, pixels: npt.NDArray[np.uint8]) -> tuple[images.Float, images.Float, list[dict[str, Any]]]:
        """Scores, maps, and of each image what `GlobalFeatures.explain` says."""
        if self.graph is None:
            raise ModelError("This detector has learned nothing yet: call fit first, or kizu.load a saved model.")
        with torch.inference_mode():
            scores, maps, told = self.forward_with_extras(torch.from_numpy(pixels).to(self.device))
        said = self.wholes().explain(*(told[name].numpy(force=True) for name in ("parts", "contributions", "whitened")))
        return scores.numpy(force=True), maps.numpy(force=True), said

    def forward_with_extras(self, images: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        assert isinstance(self.graph, PUADGraph)
        scores, maps, parts, whitened = self.graph.explained(images)
        told = {"parts": parts, "contributions": self.graph.contributions(parts), "whitened": whitened}
        return scores, maps, told

    def export_tables(self) -> dict[str, Tensor]:
        assert isinstance(self.graph, PUADGraph)
        return {"good": self.graph.good, "numbers": self.graph.numbers, "sizes": self.graph.sizes}

    def wholes(self) -> GlobalFeatures:
        kept = {name: tensor.numpy(force=True) for name, tensor in self.export_tables().items()}
        return GlobalFeatures(**kept, groups=list(self.facts["groups"]), names=self.training["names"])

    @classmethod
    def pretrained_name(cls, config: Any) -> str:
        return detector_class(config.base).pretrained_name(config.base_config)

    def pretrained(self) -> dict[str, str]:
        assert isinstance(self.graph, PUADGraph)
        base = self._base()
        base.graph, base.facts = self.graph.base, self.facts
        return base.pretrained()

    @classmethod
    def restore_graph(cls, config: Any, tensors: dict[str, Tensor]) -> nn.Module:
        state = {key.removeprefix("base."): value for key, value in tensors.items() if key.startswith("base.")}
        base = detector_class(config.base).restore_graph(config.base_config, state)
        good, dimension = tensors["good"].shape
        return PUADGraph(config, base, Gaussian(dimension), good, len(tensors["sizes"]))


def joined(wholes: dict[str, Tensor]) -> Tensor:
    """Groups (B, C) → (B, D)."""
    return torch.cat(list(wholes.values()), dim=1)


def _median(values: Tensor) -> float | None:
    return float(values.median()) if len(values) else None
