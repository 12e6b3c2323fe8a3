"""SimpleNet's two small networks, and the loss that tells good features from noisy ones (§3.2–3.5).

Modules are named as in the published code, so that its checkpoints fit without renaming.
"""

from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kizu.config import SimpleNetConfig

__all__ = ["Discriminator", "Judgement", "Projection", "judge", "noise"]

SLOPE = 0.2
STEP = 1.1  # from one strength of mixed noise to the next


class Projection(nn.Module):
    """The feature adaptor G: linear layers, with something between them or nothing. (N, D) → (N, E)."""

    def __init__(self, dimension: int, config: SimpleNetConfig) -> None:
        super().__init__()
        self.width = config.embedding_size or dimension
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        for number in range(config.pre_proj):
            parts[f"{number}fc"] = nn.Linear(dimension if number == 0 else self.width, self.width)
            if number == config.pre_proj - 1:
                break
            if config.proj_layer_type == 1:
                parts[f"{number}bn"] = nn.BatchNorm1d(self.width)
            elif config.proj_layer_type == 2:
                parts[f"{number}relu"] = nn.LeakyReLU(SLOPE)
        self.layers = nn.Sequential(parts)
        self.apply(_initialise)

    def forward(self, features: Tensor) -> Tensor:
        projected: Tensor = self.layers(features)
        return projected


class Discriminator(nn.Module):
    """D: high for good features, low for noisy ones. (N, E) → (N,)."""

    def __init__(self, width: int, config: SimpleNetConfig) -> None:
        super().__init__()
        blocks: OrderedDict[str, nn.Module] = OrderedDict()
        for number in range(1, config.dsc_layers):
            hidden = config.dsc_hidden or max(1, int(width / 1.5))
            blocks[f"block{number}"] = nn.Sequential(
                nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.LeakyReLU(SLOPE)
            )
            width = hidden
        self.body = nn.Sequential(blocks)
        self.tail = nn.Linear(width, 1, bias=False)
        self.apply(_initialise)

    def forward(self, features: Tensor) -> Tensor:
        judged: Tensor = self.tail(self.body(features))
        return judged[:, 0]


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_normal_(module.weight)


class Judgement(NamedTuple):
    """Means over a batch."""

    loss: Tensor
    p_true: Tensor  # share of good features above the margin
    p_fake: Tensor  # share of noisy features below minus the margin


def noise(features: Tensor, deviation: float, strengths: int, generator: torch.Generator) -> Tensor:
    """Gaussian noise (N, E), of a deviation times 1.1^k, with k drawn for each row from 0 … strengths − 1 (§3.3)."""
    drawn = torch.randn(features.shape, generator=generator, device=features.device) * deviation
    if strengths > 1:
        k = torch.randint(strengths, (len(drawn), 1), generator=generator, device=features.device)
        drawn = drawn * STEP**k
    return drawn


def judge(discriminator: Discriminator, good: Tensor, noisy: Tensor, margin: float) -> Judgement:
    """The truncated hinge loss, Eq. 6: mean max(0, m − D(good)) + mean max(0, m + D(noisy)); both in one batch."""
    above, below = discriminator(torch.cat([good, noisy])).split([len(good), len(noisy)])
    loss = F.relu(margin - above).mean() + F.relu(margin + below).mean()
    shares = (above >= margin).float().mean(), (below < -margin).float().mean()
    return Judgement(loss, *shares)
