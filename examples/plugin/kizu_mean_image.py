"""A method, a backbone and a metric for kizu. The method is a baseline: it needs parts that always lie alike."""

import numpy as np
import torch
import torchvision
from pydantic import Field
from torch import Tensor, nn

from kizu import Detector
from kizu.config import Config
from kizu.detectors.fitting import FitContext, FitResult
from kizu.features.anomaly_map import MapUpsampling


class MeanImageConfig(Config):
    """Mean image: each pixel against the mean of good images."""

    floor: float = Field(4.0, gt=0, le=255, description="Least deviation of a pixel's colour, in grey levels.")
    top: float = Field(0.01, gt=0, le=1, description="An image's score is the mean of this share of its pixels.")


class MeanImageGraph(nn.Module):
    """uint8 images (B, 3, H, W) → scores (B,), anomaly maps (B, 1, H, W)."""

    def __init__(self, config: MeanImageConfig) -> None:
        super().__init__()
        self.variance_floor, self.count = config.floor**2, max(1, round(config.top * config.size[0] * config.size[1]))
        self.register_buffer("mean", torch.zeros(3, *config.size))
        self.register_buffer("mean_square", torch.zeros(3, *config.size))
        self.smoothing = MapUpsampling(config.size, config.size, config.smoothing)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.score(images.float(), self.mean, self.mean_square)

    def score(self, images: Tensor, mean: Tensor, mean_square: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and maps of images, against the mean of any good images and the mean of their squares."""
        deviation = ((mean_square - mean**2).clamp(min=0) + self.variance_floor).sqrt()
        maps = self.smoothing(((images - mean).abs() / deviation).amax(1))
        return maps.flatten(1).topk(self.count).values.mean(1), maps


class MeanImage(Detector):
    """Each pixel against the mean of good images. Settings: the fields of `MeanImageConfig`."""

    method = "mean_image"
    config_class = MeanImageConfig

    @torch.no_grad()
    def learn(self, context: FitContext) -> FitResult:
        graph, count = MeanImageGraph(self.config).to(self.device), len(context.photos)
        for _, images in self.stream(context.photos, "Mean image", context.progress):
            graph.mean += images.float().sum(0) / count
            graph.mean_square += images.float().square().sum(0) / count
        if len(context.held_out) or count == 1:
            return self.score_held_out(graph, context.held_out, context.progress)
        results = []  # of each photograph against the mean of the others: leave one out
        for _, images in self.stream(context.photos, "Threshold", context.progress):
            x = images.float()
            others = ((count * graph.mean - x) / (count - 1), (count * graph.mean_square - x**2) / (count - 1))
            results.append(graph.score(x, *others))
        scores, maps = (torch.cat(parts).cpu() for parts in zip(*results, strict=True))
        loo_scores = dict(enumerate(scores.tolist()))
        peaks, median = maps.flatten(1).amax(1).tolist(), float(maps.median())
        return FitResult(graph, scores.tolist(), peaks, median, loo_scores=loo_scores)

    @classmethod
    def restore_graph(cls, config: MeanImageConfig, tensors: dict[str, Tensor]) -> nn.Module:
        return MeanImageGraph(config)


def shufflenet(pretrained: bool) -> nn.Module:
    """A backbone: kizu train patchcore DATA --backbone shufflenet --layers stage2,stage3."""
    return torchvision.models.shufflenet_v2_x1_0(weights="DEFAULT" if pretrained else None)


def caught(scores: np.ndarray, labels: np.ndarray) -> float:
    """A metric: the share of the defective parts that score higher than every good one."""
    return float((scores[labels] > scores[~labels].max(initial=-np.inf)).mean())
