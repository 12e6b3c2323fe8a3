"""The PUAD detector: another method scores what can be pointed at, a Gaussian of whole images the rest."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from kizu.calibration.threshold import calibrate
from kizu.config import PUADConfig
from kizu.data import image
from kizu.data.progress import Progress
from kizu.detectors import detector_class
from kizu.detectors.base import UNFITTED, Detector
from kizu.detectors.fitting import FitContext, FitResult, Split
from kizu.detectors.puad.gaussian import ROUNDING, Gaussian, cross_fitted
from kizu.detectors.stack import Stack
from kizu.errors import ModelError
from kizu.inference.image_features import GlobalFeatures

__all__ = ["PUAD", "PUADGraph"]

FOLDS = 10
VALIDATION_SHARE = 0.15  # of the good images, that `exact` standardises by where the base keeps none (as published)
REMEMBERED = 1000  # good images that others are compared with
QUIET_WEIGHT = 0.1  # weight of a logical score that good images reach too: adds 0.5 % to the deviation of their sums


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
        scores, anomaly_maps, _, _ = self.score_in_parts(images)
        return scores, anomaly_maps

    def score_in_parts(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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

        Behind the gate, the logical score counts in full only above the threshold that good images hardly ever reach.
        """
        structural, logical = parts.unbind(1)
        if self.gated:
            logical = QUIET_WEIGHT * logical + (1 - QUIET_WEIGHT) * (logical - self.level).clamp(min=0)
        return torch.stack([2 * (1 - self.balance) * structural, 2 * self.balance * logical], dim=1)


class _Head(NamedTuple):
    """A Gaussian, and distances of good images from it."""

    gaussian: Gaussian
    rows: Sequence[int]  # which of the base's scores belong to `distances`
    distances: Tensor  # (M,) of images that it is not fitted to
    fitted_distances: Tensor  # of those that it is


class PUAD(Detector):
    """Another method and a head that sees the whole image (PUAD). Settings: the fields of `PUADConfig`."""

    method = "puad"
    config_class = PUADConfig

    def __init__(
        self, config: PUADConfig | None = None, *, fitted_base: Detector | None = None, **settings: Any
    ) -> None:
        """From a config or its fields. A `fitted_base` stays as it is, and only scores what is held out."""
        super().__init__(config, **settings)
        if fitted_base is not None and fitted_base.preprocessing.alignment is not None:
            raise ModelError("A base that aligns photographs cannot be given: let PUAD train it, with `align=True`.")
        if fitted_base is not None and fitted_base.preprocessing.zones is not None:
            raise ModelError("A base with zones cannot be given: let PUAD train it, with the same `zones`.")
        if fitted_base is not None and fitted_base.preprocessing.tiling is not None:
            raise ModelError("A base that judges in tiles cannot be given: PUAD judges the photograph as a whole.")
        self.fitted_base = fitted_base

    def learn(self, context: FitContext) -> FitResult:
        photos, held_out, progress = context.photos, context.held_out, context.progress
        if self.fitted_base is None:
            base = self._base()
            base.measure_on(self.measured_on)
            result = base.learn(context)
            self.curves, self.remarks = base.curves, [*self.remarks, *base.remarks]
        else:
            assert self.fitted_base.graph is not None
            result = self.fitted_base.score_held_out(self.fitted_base.graph, held_out, progress)
        with context.timed("whole images"), torch.inference_mode():
            good, groups = self._global_features(result.graph, photos, progress)
            others = self._global_features(result.graph, held_out, progress)[0] if len(held_out) else None
            return self._with_head(result, good, others, groups)

    def _base(self) -> Detector:
        base = detector_class(self.config.base)(self.config.base_config)
        base.device, base.workers = self.device, self.workers
        return base

    def _global_features(self, graph: Any, photos: Stack, progress: Progress) -> tuple[Tensor, dict[str, int]]:
        """Global features (N, D), and how many are of each group."""
        batches = [
            graph.global_features(pixels, self.config.whole)
            for _, pixels in self.stream(photos, "Whole images", progress)
        ]
        groups = {name: features.shape[1] for name, features in batches[0].items()}
        return torch.cat([joined(batch) for batch in batches]), groups

    def _with_head(self, base: FitResult, good: Tensor, others: Tensor | None, groups: dict[str, int]) -> FitResult:
        """The base's result with the head fitted to global features (N, D), and the scores of both."""
        head = self._fitted_head(good, others, base.scored_indices)
        graph = PUADGraph(self.config, base.graph, head.gaussian, min(len(good), REMEMBERED), len(groups))
        graph.to(good.device)
        graph.sizes = torch.tensor(list(groups.values()), device=good.device)
        graph.numbers = torch.linspace(0, len(good) - 1, len(graph.numbers), device=good.device).round().long()
        graph.good = head.gaussian.whitened(good[graph.numbers]).float()
        structural = [base.scores[row] for row in head.rows]
        standardised = self._standardise(graph, torch.tensor(structural, dtype=torch.float64), head.distances)
        threshold = calibrate(standardised[:, 1].tolist(), self.config.false_alarms)
        graph.level.fill_(threshold.value)
        self._remark(head.gaussian, good)
        facts = {
            **base.facts,
            "groups": groups,
            "shrinkage": head.gaussian.shrinkage,
            "distance of images learned from": _median(head.fitted_distances),
            "distance of images held out": _median(head.distances),
            "logical level": threshold.value if threshold.count else None,
        }
        return replace(base, graph=graph, scores=graph.combined(standardised).tolist(), facts=facts, again=None)

    def _fitted_head(self, good: Tensor, others: Tensor | None, scored: Sequence[int]) -> "_Head":
        """The head, and its distances of the images that the base scored, none of which it is fitted to.

        `scored` are their indices among those held out, or else among the good images.
        """
        rows = torch.tensor(scored, dtype=torch.int64, device=good.device)
        if others is not None:
            head = Gaussian.fitted(good)
            return _Head(head, range(len(scored)), head(others[rows]), head(good))
        if not self.config.exact:
            head = Gaussian.fitted(good)
            folds = [fold for fold in np.array_split(self._order(len(good)), FOLDS) if len(fold)]
            distances = cross_fitted(good, [torch.from_numpy(fold).to(good.device) for fold in folds])[rows]
            known = distances.isfinite()
            return _Head(head, known.nonzero()[:, 0].tolist(), distances[known], head(good))
        split = self._split(len(good), scored)
        head = Gaussian.fitted(good[split.train])
        row_of = {index: row for row, index in enumerate(scored)}
        rows_kept = [row_of[index] for index in split.calibrate]
        return _Head(head, rows_kept, head(good[split.calibrate]), head(good[split.train]))

    def _split(self, count: int, scored: Sequence[int]) -> Split:
        """Which good images the head of `exact` is fitted to, and which put its distances on a scale.

        These are the ones that the base kept; of a base that scored all, a share. An image alone is both.
        """
        kept = list(scored)
        if len(scored) == count:
            kept = sorted(self._order(count)[: max(1, int(VALIDATION_SHARE * count))].tolist())
        train = sorted(set(range(count)) - set(kept)) or list(range(count))
        return Split(train, [], kept)

    def _order(self, count: int) -> npt.NDArray[np.int64]:
        return np.random.default_rng([self.config.seed, count]).permutation(count)

    def _standardise(self, graph: PUADGraph, structural: Tensor, distances: Tensor) -> Tensor:
        """Both scores (M, 2) in deviations of good images held out (M,); a deviation that is not there is one."""
        structural = structural.to(distances.device)
        if len(distances) < 2:
            self.remarks.append(
                f"{len(distances)} good images are left to put the structural and the logical score on one scale, and "
                "two are needed: the scores are added unscaled. Give more good images."
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
        return graph.standardised(structural, distances)

    def _remark(self, head: Gaussian, good: Tensor) -> None:
        count, dimension = good.shape
        if head.is_flat:
            self.remarks.append(
                "Nothing differs between the good images' global features: the distance of the whole image says "
                "nothing. Give more good images."
            )
        elif count <= dimension:
            self.remarks.append(
                f"{count} good images are few for {dimension} global features: part of their covariance is guessed "
                f"(shrinkage {head.shrinkage:.2f}). Give more than {dimension}."
            )

    def score_in_parts(self, pixels: npt.NDArray[np.uint8]) -> tuple[image.Float, image.Float, list[dict[str, Any]]]:
        """Scores, maps, and of each image what `GlobalFeatures.explain` says."""
        if self.graph is None:
            raise ModelError(UNFITTED)
        with torch.inference_mode():
            scores, maps, extras = self.forward_with_extras(torch.from_numpy(pixels).to(self.device))
        arrays = [extras[name].numpy(force=True) for name in ("parts", "contributions", "whitened")]
        return scores.numpy(force=True), maps.numpy(force=True), self.global_features().explain(*arrays)

    def forward_with_extras(self, images: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        assert isinstance(self.graph, PUADGraph)
        scores, maps, parts, whitened = self.graph.score_in_parts(images)
        extras = {"parts": parts, "contributions": self.graph.contributions(parts), "whitened": whitened}
        return scores, maps, extras

    def export_tables(self) -> dict[str, Tensor]:
        assert isinstance(self.graph, PUADGraph)
        return {"good": self.graph.good, "numbers": self.graph.numbers, "sizes": self.graph.sizes}

    def global_features(self) -> GlobalFeatures:
        tables = {name: tensor.numpy(force=True) for name, tensor in self.export_tables().items()}
        return GlobalFeatures(**tables, groups=list(self.facts["groups"]), names=self.training["names"])

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


def joined(groups: dict[str, Tensor]) -> Tensor:
    """Groups of features (B, C) → (B, D)."""
    return torch.cat(list(groups.values()), dim=1)


def _median(values: Tensor) -> float | None:
    return float(values.median()) if len(values) else None
