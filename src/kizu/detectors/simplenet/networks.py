"""SimpleNet's two small networks, the graph that they make with a backbone, and the loss that they learn by.

Modules are named as in the published code, so that its checkpoints fit without renaming.
"""

from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kizu.config import SimpleNetConfig
from kizu.features.anomaly_map import MapUpsampling
from kizu.features.backbone import Backbone
from kizu.features.patch_features import PatchFeatures, as_rows

__all__ = ["Discriminator", "HingeLoss", "Projection", "SimpleNetGraph", "first_layer", "hinge_loss", "noise"]

SLOPE = 0.2
STEP = 1.1  # from one strength of mixed noise to the next


class Projection(nn.Module):
    """The feature adaptor G (§3.2): linear layers, with something between them or nothing. (N, D) → (N, E)."""

    def __init__(self, dimension: int, config: SimpleNetConfig) -> None:
        super().__init__()
        self.width = config.embedding_size or dimension
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for number in range(config.pre_proj):
            layers[f"{number}fc"] = nn.Linear(dimension if number == 0 else self.width, self.width)
            if number == config.pre_proj - 1:
                break
            if config.proj_layer_type == 1:
                layers[f"{number}bn"] = nn.BatchNorm1d(self.width)
            elif config.proj_layer_type == 2:
                layers[f"{number}relu"] = nn.LeakyReLU(SLOPE)
        self.layers = nn.Sequential(layers)
        self.apply(_initialise)

    def forward(self, features: Tensor) -> Tensor:
        projected: Tensor = self.layers(features)
        return projected


class Discriminator(nn.Module):
    """D (§3.4): high for good features, low for noisy ones. (N, E) → (N,)."""

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
        outputs: Tensor = self.tail(self.body(features))
        return outputs[:, 0]


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_normal_(module.weight)


class SimpleNetGraph(nn.Module):
    """uint8 images (B, 3, H, W) → scores (B,), anomaly maps (B, 1, H, W)."""

    unit: Tensor  # () what features are divided by

    def __init__(self, config: SimpleNetConfig, network: Backbone) -> None:
        super().__init__()
        self.config = config
        self.backbone = network
        self.patches = PatchFeatures(config.patchsize, config.pretrain_embed_dimension, config.target_embed_dimension)
        self.register_buffer("unit", torch.ones(()))

    def complete(self, dimension: int, grid: tuple[int, int]) -> None:
        """Give it the two networks, newly initialised, for features (B, dimension, *grid)."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            self.projection = Projection(dimension, self.config).to(self.unit.device)
            self.discriminator = Discriminator(self.projection.width, self.config).to(self.unit.device)
        self.upsample = MapUpsampling(grid, self.config.size, self.config.smoothing).to(self.unit.device)

    def embed(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) → patch features (B, D, h, w) (§3.1)."""
        features: Tensor = self.patches(self.backbone(images))
        return features

    def adapt(self, rows: Tensor) -> Tensor:
        """Features (N, D) in units of their deviation, projected (N, E) (§3.2)."""
        adapted: Tensor = self.projection(rows / self.unit)
        return adapted

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.score_embeddings(self.embed(images))

    def score_embeddings(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Patch features (B, D, h, w) → scores (B,) and anomaly maps (B, 1, H, W) (§3.6).

        A patch's score is −D; an image's is the mean of its most anomalous patches.
        """
        count, _, height, width = features.shape
        grid = -self.discriminator(self.adapt(as_rows(features))).view(count, height, width)
        grid = self.upsample.zoned(grid)
        return self.upsample.scores(grid, self.config.top), self.upsample(grid)

    def forward_with_global_features(self, images: Tensor, kind: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """As `forward`, and the global features of `Backbone.forward_with_global_features` from the same pass."""
        maps, global_features = self.backbone.forward_with_global_features(images, kind)
        return *self.score_embeddings(self.patches(maps)), global_features

    def global_features(self, images: Tensor, kind: str) -> dict[str, Tensor]:
        """Global features alone, as `forward_with_global_features` gives them."""
        return self.backbone.forward_with_global_features(images, kind)[1]


def first_layer(config: SimpleNetConfig) -> tuple[str, str]:
    """The layer that takes the features: its network, as the published checkpoints call it, and its weight's name."""
    if config.pre_proj:
        return "pre_projection", "layers.0fc.weight"
    return "discriminator", "body.block1.0.weight" if config.dsc_layers > 1 else "tail.weight"


def noise(features: Tensor, deviation: float, strengths: int, generator: torch.Generator) -> Tensor:
    """Gaussian noise (N, E), of a deviation times 1.1^k, with k drawn for each row from 0 … strengths − 1 (§3.3)."""
    drawn = torch.randn(features.shape, generator=generator, device=features.device) * deviation
    if strengths > 1:
        k = torch.randint(strengths, (len(drawn), 1), generator=generator, device=features.device)
        drawn = drawn * STEP**k
    return drawn


class HingeLoss(NamedTuple):
    """Means over a batch."""

    loss: Tensor
    p_true: Tensor  # share of good features above the margin
    p_fake: Tensor  # share of noisy features below minus the margin


def hinge_loss(discriminator: Discriminator, good: Tensor, noisy: Tensor, margin: float) -> HingeLoss:
    """The truncated hinge loss, mean max(0, m − D(good)) + mean max(0, m + D(noisy)) (Eq. 6), both in one batch."""
    above, below = discriminator(torch.cat([good, noisy])).split([len(good), len(noisy)])
    loss = F.relu(margin - above).mean() + F.relu(margin + below).mean()
    shares = (above >= margin).float().mean(), (below < -margin).float().mean()
    return HingeLoss(loss, *shares)
