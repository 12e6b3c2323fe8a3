"""The EfficientAD detector: a student learns, the maps get their range, held-out images set the threshold."""

import logging
import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from kizu.config import EfficientADConfig
from kizu.data.progress import Progress
from kizu.detectors.base import Detector
from kizu.detectors.efficientad import teacher
from kizu.detectors.efficientad.embedded import (
    BACKBONE,
    LAYERS,
    EmbeddedGraph,
    Features,
    embedded_course,
    others_in_a_step,
)
from kizu.detectors.efficientad.graph import EfficientADGraph
from kizu.detectors.efficientad.networks import normalised
from kizu.detectors.efficientad.training import (
    ChannelStatistics,
    paper_course,
    penalty_pictures,
    penalty_source,
    train,
)
from kizu.detectors.fitting import FitContext, FitResult, Split
from kizu.detectors.stack import Stack
from kizu.features import backbone

__all__ = ["EfficientAD", "quantile", "split_images"]

log = logging.getLogger("kizu")
LOW, HIGH = 0.9, 0.995  # quantiles of good pixels that become 0 and 0.1
BATCH = 16
OTHERS_KEPT = 256  # pictures of other things, with the embedded network


class EfficientAD(Detector):
    """Student, teacher and autoencoder (EfficientAD). Settings: the fields of `EfficientADConfig`."""

    method = "efficientad"
    config_class = EfficientADConfig

    def learn(self, context: FitContext) -> FitResult:
        config: EfficientADConfig = self.config
        photos, held_out = context.photos, context.held_out
        split = split_images(len(photos), len(held_out), config.validation, config.seed)
        scored = held_out if len(held_out) else photos
        calibrating = range(len(held_out)) if len(held_out) else split.calibrate
        scaling = (photos, split.select) if split.select else (scored, calibrating)
        learned = self._embedded if config.network == "embedded" else self._distilled
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(config.seed)
            graph, about = learned(context, split)
        graph.eval().requires_grad_(False)
        with context.timed("calibration"), torch.inference_mode():
            self._scale(graph, *scaling, context.progress)
        images = {
            "learned from": len(split.train),
            "scale of the maps": len(scaling[1]),
            "threshold": len(calibrating),
        }
        facts = {**about, "images": images, "penalty": penalty_source(config)}
        with context.timed("calibration"):
            self.learn_units(graph, photos, split.train, context.progress)
            return self.score_held_out(graph, scored, context.progress, only=calibrating, facts=facts)

    def _distilled(self, context: FitContext, split: Split) -> tuple[EfficientADGraph, dict[str, Any]]:
        """The paper's networks, trained; and what there is to tell of it."""
        config: EfficientADConfig = self.config
        network, origin = teacher.load(config.teacher, "m" if config.network == "m" else "s")
        log.info("%d steps; teacher %s; penalty: %s", config.steps, origin["file"], penalty_source(config))
        graph = EfficientADGraph(config, network).to(self.device)
        graph.upsample.inspect(context.zones, context.seen)
        with context.timed("teacher"):
            self._measure(graph, context.photos, split.train, context.progress)
        with context.timed("training"):
            pixels = partial(self._varied, context.photos, split.train)
            trained = train(paper_course(graph, config, len(split.train), pixels), config, context, self.device)
        return graph, {"teacher": origin, "network": f"PDN-{network.size.upper()}", **trained}

    def _embedded(self, context: FitContext, split: Split) -> tuple[EmbeddedGraph, dict[str, Any]]:
        """The embedded network with a student, trained; and what there is to tell of it."""
        config: EfficientADConfig = self.config
        log.info("%d steps; network %s; penalty: %s", config.steps, BACKBONE, penalty_source(config))
        graph = EmbeddedGraph(config, backbone.create(BACKBONE, LAYERS)).to(self.device)
        graph.upsample.inspect(context.zones, context.seen)
        with context.timed("features"), torch.inference_mode():
            kept = self._features(graph, context, split.train)
            others = self._shallow_features_of_others(graph, context.progress)
        with context.timed("training"):
            features = partial(self._varied_features, graph, context.photos, split.train, kept)
            course = embedded_course(graph, config, len(split.train), features, others)
            trained = train(course, config, context, self.device)
        graph.eval()
        with context.timed("calibration"), torch.inference_mode():
            batches = torch.arange(len(split.train)).split(BATCH)
            graph.measure(graph.differences_of(features(batch.tolist(), 0)) for batch in batches)
        return graph, {"network": BACKBONE, **trained}

    def _features(self, graph: EmbeddedGraph, context: FitContext, train: Sequence[int]) -> Features | None:
        """Measure each channel's mean and deviation; keep the features where each step would compute the same ones."""
        kept = Features(len(train), self.config, context.memory_bytes // 3) if self.augmentation is None else None
        statistics = [ChannelStatistics() for _ in LAYERS]
        for pixels in self._pick(context.photos, train, 4, "Features", context.progress):
            maps = graph.backbone(pixels)
            for measured, layer in zip(statistics, maps, strict=True):
                measured.add(layer)
            if kept is not None:
                kept.append(maps)
        graph.set_units([measured.result() for measured in statistics])
        return kept

    def _shallow_features_of_others(self, graph: EmbeddedGraph, progress: Progress) -> Tensor | None:
        """(N, C, h, w) of pictures that the student shall be silent on, in half precision."""
        pictures = penalty_pictures(self.config, 0, 4)
        if pictures is None:
            return None
        found: list[Tensor] = []
        needed = min(OTHERS_KEPT, self.config.steps * others_in_a_step(self.config))
        for number in range(0, needed, 4):
            if len(pixels := next(pictures)):  # without those that cannot be read
                found += graph.features(torch.from_numpy(pixels).to(self.device))[0].half().unbind()
            progress("Other pictures", min(number + 4, needed), needed)
        return torch.stack(found) if found else None

    def _varied_features(
        self,
        graph: EmbeddedGraph,
        photos: Stack,
        train: Sequence[int],
        kept: Features | None,
        positions: Sequence[int],
        turn: int,
    ) -> list[Tensor]:
        """Standardised features of the photos at these positions of `train`: kept ones, or in each turn new ones."""
        if kept is not None:
            return graph.standardise([layer.to(self.device) for layer in kept.take(positions)])
        with torch.no_grad():
            return graph.features(self._varied(photos, train, positions, turn))

    def calibrates_with(self, photos: int, held_out: int) -> int:
        return held_out or len(split_images(photos, 0, self.config.validation, self.config.seed).calibrate)

    def _measure(self, graph: EfficientADGraph, photos: Stack, indices: Sequence[int], progress: Progress) -> None:
        """The border's mean colour, then mean and deviation of the teacher's channels, over the good images."""
        rims, channels = ChannelStatistics(), ChannelStatistics()
        with torch.inference_mode():
            for pixels in self._pick(photos, indices, BATCH, "Borders", progress):
                for rim in (pixels[:, :, :1], pixels[:, :, -1:], pixels[:, :, :, :1], pixels[:, :, :, -1:]):
                    rims.add(normalised(rim))
            graph.surround.copy_(rims.result()[0])
            for pixels in self._pick(photos, indices, 4, "Teacher", progress):
                channels.add(graph.teacher(graph.framed(normalised(pixels))))
        mean, std = channels.result()
        graph.mean.copy_(mean)
        graph.std.copy_(std)

    def _varied(self, photos: Stack, train: Sequence[int], positions: Sequence[int], turn: int) -> Tensor:
        """Of the photos to learn from, those at these positions, varied in their own way in each turn."""
        return self.pixels(photos, [train[position] for position in positions], turn)

    def _scale(
        self,
        graph: EfficientADGraph | EmbeddedGraph,
        photos: Stack,
        indices: Sequence[int],
        progress: Progress,
    ) -> None:
        """The range of each map from the pixels of good images: quantiles that become 0 and 0.1 (§3.4)."""
        errors = [graph.errors(pixels) for pixels in self._pick(photos, indices, BATCH, "Scale of the maps", progress)]
        if self.config.border == "stretch":  # the published quantiles are those of the stretched maps
            errors = [tuple(map(graph.upsample, maps)) for maps in errors]
        for which, maps in enumerate(zip(*errors, strict=True)):
            values = torch.cat(maps).cpu().numpy()
            low, high = quantile(values, LOW), quantile(values, HIGH)
            graph.levels[which] = torch.tensor([low, max(high, low * (1 + 1e-6) + 1e-12)])

    def _pick(
        self, photos: Stack, indices: Sequence[int], batch_size: int, stage: str, progress: Progress
    ) -> Iterator[Tensor]:
        """The photos of these indices (B, 3, H, W), batch by batch on the device."""
        for start in range(0, len(indices), batch_size):
            batch = indices[start : start + batch_size]
            yield self.pixels(photos, batch)
            progress(stage, start + len(batch), len(indices))

    @classmethod
    def pretrained_name(cls, config: Any) -> str:
        return BACKBONE if config.network == "embedded" else f"teacher {Path(config.teacher or teacher.SHIPPED).name}"

    def pretrained(self) -> dict[str, str]:
        if isinstance(self.graph, EmbeddedGraph):
            return super().pretrained()
        assert isinstance(self.graph, EfficientADGraph)
        return {"name": f"teacher {self.facts['teacher']['file']}", "weights": teacher.fingerprint(self.graph.teacher)}

    @classmethod
    def restore_graph(cls, config: Any, tensors: dict[str, Tensor]) -> nn.Module:
        graph: EfficientADGraph | EmbeddedGraph
        if config.network == "embedded":
            graph = EmbeddedGraph(config, backbone.blank(BACKBONE, LAYERS))
        else:
            keys = [key for key in tensors if key.startswith("teacher.")]
            state = {key.removeprefix("teacher."): tensors[key] for key in keys}
            graph = EfficientADGraph(config, teacher.assemble(state, "the model's teacher"))
        graph.upsample.restore(tensors)
        return graph


def quantile(values: npt.NDArray[np.float32], share: float) -> float:
    """The quantile of any number of values, interpolated linearly, in double precision throughout."""
    rank = share * (values.size - 1)
    below, above = math.floor(rank), math.ceil(rank)
    low, high = np.partition(values.ravel(), (below, above))[[below, above]].astype(np.float64)
    return float(low + (rank - below) * (high - low))


def split_images(count: int, held_out: int, share: float, seed: int) -> Split:
    """Which of `count` images to learn from, to scale the maps by, and to set the threshold by.

    `share` of the images are kept from learning. Where others are held out for the threshold, all of these scale the
    maps; otherwise a third of them do and the rest sets the threshold, or, of fewer than 9, all do both. With a `share`
    of 0 the images held out for the threshold scale the maps as well.
    """
    order = np.random.default_rng([seed, count]).permutation(count).tolist()
    kept = max(1, round(share * count)) if count > 1 else 0
    if held_out and share == 0:
        return Split(order, [], [])
    train, others = order[kept:], order[:kept]
    if held_out or kept < 9:
        return Split(train, others or train, [] if held_out else others)
    return Split(train, others[: kept // 3], others[kept // 3 :])
