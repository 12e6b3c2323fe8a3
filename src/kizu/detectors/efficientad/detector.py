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
from kizu.data.preprocessing import Stack
from kizu.data.progress import Progress
from kizu.detectors.base import Detector
from kizu.detectors.efficientad import teacher
from kizu.detectors.efficientad.graph import EfficientADGraph
from kizu.detectors.efficientad.networks import normalised
from kizu.detectors.efficientad.training import ChannelStatistics, penalty_source, train
from kizu.detectors.fitting import FitContext, FitResult, Split
from kizu.errors import ModelError

__all__ = ["EfficientAD", "quantile", "split_images"]

log = logging.getLogger("kizu")
LOW, HIGH = 0.9, 0.995  # quantiles of good pixels that become 0 and 0.1


class EfficientAD(Detector):
    """Student, teacher and autoencoder (EfficientAD). Settings: the fields of `EfficientADConfig`."""

    method = "efficientad"
    config_class = EfficientADConfig

    def learn(self, context: FitContext) -> FitResult:
        config: EfficientADConfig = self.config
        photos, held_out, progress = context.photos, context.held_out, context.progress
        if config.teacher is None:
            raise ModelError(teacher.MISSING)
        network, origin = teacher.load(config.teacher, config.network)
        split = split_images(len(photos), len(held_out), config.validation, config.seed)
        penalty = penalty_source(config)
        log.info("%d steps; teacher %s; penalty: %s", config.steps, origin["file"], penalty)
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(config.seed)
            graph = EfficientADGraph(config, network).to(self.device)
            graph.upsample.inspect(context.inspected)
            with context.timed("teacher"):
                self._measure(graph, photos, split.train, progress)
            with context.timed("training"):
                trained = train(graph, config, len(split.train), partial(self._varied, photos, split.train), context)
        graph.eval().requires_grad_(False)
        scored = held_out if len(held_out) else photos
        calibrating = range(len(held_out)) if len(held_out) else split.calibrate
        with context.timed("calibration"), torch.inference_mode():
            self._scale(graph, *((photos, split.select) if split.select else (scored, calibrating)), progress)
        images = {
            "learned from": len(split.train),
            "scale of the maps": len(split.select or calibrating),
            "threshold": len(calibrating),
        }
        network_name = f"PDN-{network.size.upper()}"
        facts = {"teacher": origin, "network": network_name, "images": images, "penalty": penalty, **trained}
        with context.timed("calibration"):
            return self.score_held_out(graph, scored, progress, only=calibrating, facts=facts)

    def calibrates_with(self, photos: int, held_out: int) -> int:
        return held_out or len(split_images(photos, 0, self.config.validation, self.config.seed).calibrate)

    def _measure(self, graph: EfficientADGraph, photos: Stack, indices: Sequence[int], progress: Progress) -> None:
        """The border's mean colour, then mean and deviation of the teacher's channels, over the good images."""
        rims, channels = ChannelStatistics(), ChannelStatistics()
        with torch.inference_mode():
            for pixels in self._pick(photos, indices, 16, "Borders", progress):
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

    def _scale(self, graph: EfficientADGraph, photos: Stack, indices: Sequence[int], progress: Progress) -> None:
        """The range of both maps from the pixels of good images: quantiles that become 0 and 0.1 (§3.4)."""
        errors = [graph.errors(pixels) for pixels in self._pick(photos, indices, 16, "Scale of the maps", progress)]
        if self.config.border == "stretch":  # the published quantiles are those of the stretched maps
            errors = [(graph.upsample(local), graph.upsample(whole)) for local, whole in errors]
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
        return f"teacher {Path(config.teacher).name}"

    def pretrained(self) -> dict[str, str]:
        assert isinstance(self.graph, EfficientADGraph)
        return {"name": f"teacher {self.facts['teacher']['file']}", "weights": teacher.fingerprint(self.graph.teacher)}

    @classmethod
    def restore_graph(cls, config: Any, tensors: dict[str, Tensor]) -> nn.Module:
        state = {key.removeprefix("teacher."): value for key, value in tensors.items() if key.startswith("teacher.")}
        graph = EfficientADGraph(config, teacher.assemble(state, "the model's teacher"))
        graph.upsample.inspected = tensors.get("upsample.inspected")
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
