"""The networks of EfficientAD: patch description networks (teacher and student) and the autoencoder.

Batzner et al., "EfficientAD: Accurate Visual Anomaly Detection at Millisecond-Level Latencies", WACV 2024.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["DIMENSION", "FIELD", "FRAME", "KERNELS", "PDN", "STRIDE", "Autoencoder", "Size", "grid_of", "normalised"]

Size = Literal["s", "m"]
DIMENSION = 384  # channels of the published teachers
FIELD = 33  # side of the square of pixels that one feature sees
STRIDE = 4  # pixels from one feature to the next
FRAME = (14, 18)  # pixels put before and behind an image for ⌈H / 4⌉ features, the first centred on its pixel 2
KERNELS: dict[Size, tuple[int, ...]] = {"s": (4, 4, 3, 4), "m": (4, 4, 1, 3, 4, 1)}
WIDTHS: dict[Size, tuple[int, ...]] = {"s": (128, 256, 256), "m": (256, 512, 512, 512)}  # the others are the output's
PADDING = {1: 0, 3: 1, 4: 3}  # by kernel, of the padded variant
POOLED = (0, 1)  # convolutions that are followed by a pooling to half the size

MEAN = (0.485, 0.456, 0.406)  # ImageNet's
STD = (0.229, 0.224, 0.225)


def normalised(images: Tensor) -> Tensor:
    """(B, 3, H, W), uint8 or float in [0, 255] → float in units of ImageNet's deviation."""
    mean = torch.tensor(MEAN, device=images.device).view(1, 3, 1, 1) * 255
    std = torch.tensor(STD, device=images.device).view(1, 3, 1, 1) * 255
    return (images.contiguous(memory_format=torch.channels_last).float() - mean) / std


def grid_of(size: tuple[int, int]) -> tuple[int, int]:
    """The (height, width) of the features of an image of `size`: each side ⌈H / 4⌉ − 8."""
    return -(-size[0] // STRIDE) - 8, -(-size[1] // STRIDE) - 8


class PDN(nn.Module):
    """A patch description network: normalised images (B, 3, H, W) → features (B, dimension, ⌈H/4⌉ − 8, ⌈W/4⌉ − 8).

    Each feature sees 33 × 33 pixels, the first the image's first 33. `padding` gives ⌈H/4⌉ instead, with zeros inside
    the network, as the published teachers were trained. `widths` are the channels of the layers before the output's.
    """

    def __init__(
        self, size: Size, dimension: int = DIMENSION, widths: Sequence[int] = (), padding: bool = False
    ) -> None:
        super().__init__()
        self.size = size
        self.dimension = dimension
        self.widths = tuple(widths) or WIDTHS[size]
        kernels = KERNELS[size]
        channels = (3, *self.widths, *(dimension,) * (len(kernels) - len(self.widths)))
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, kernel, padding=PADDING[kernel] if padding and number < len(self.widths) else 0)
            for number, (kernel, (before, after)) in enumerate(zip(kernels, pairwise(channels), strict=True))
        )
        self.pool = nn.AvgPool2d(2, padding=int(padding))

    @property
    def layers(self) -> list[nn.Conv2d]:
        return [layer for layer in self.convolutions if isinstance(layer, nn.Conv2d)]

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.layers[-1](self.trunk(images))
        return features

    def trunk(self, images: Tensor) -> Tensor:
        """All but the last convolution."""
        features = images
        for number, layer in enumerate(self.layers[:-1]):
            features = F.relu(layer(features), inplace=True)
            if number in POOLED:
                features = self.pool(features)
        return features

    def head(self, features: Tensor, channels: slice) -> Tensor:
        """Only some channels of the last convolution, of what `trunk` returned."""
        last = self.layers[-1]
        assert last.bias is not None
        return F.conv2d(features, last.weight[channels], last.bias[channels], padding=last.padding)


class Autoencoder(nn.Module):
    """Normalised images (B, 3, H, W) through a bottleneck → features (B, dimension, *grid). Needs H, W ≥ 256."""

    def __init__(self, size: tuple[int, int], grid: tuple[int, int], dimension: int = DIMENSION) -> None:
        super().__init__()
        channels = (3, 32, 32, 64, 64, 64)
        halving = [nn.Conv2d(before, after, 4, stride=2, padding=1) for before, after in pairwise(channels)]
        self.encoder = nn.ModuleList([*halving, nn.Conv2d(64, 64, 8)])
        self.decoder = nn.ModuleList(
            [*(nn.Conv2d(64, 64, 4, padding=2) for _ in range(6)), nn.Conv2d(64, 64, 3, padding=1)]
        )
        self.output = nn.Conv2d(64, dimension, 3, padding=1)
        self.sizes = [
            (size[0] // share - less, size[1] // share - less)
            for share, less in ((64, 1), (32, 0), (16, 1), (8, 0), (4, 1), (2, 1))
        ]
        self.grid = grid

    def forward(self, images: Tensor) -> Tensor:
        code = images
        for layer in self.encoder[:-1]:
            code = F.relu(layer(code), inplace=True)
        code = self.encoder[-1](code)  # (B, 64, ⌊H/32⌋ − 7, ⌊W/32⌋ − 7)
        for layer, size in zip(self.decoder, [*self.sizes, self.grid], strict=True):
            code = F.interpolate(code, size, mode="bilinear", align_corners=False)
            code = F.relu(layer(code), inplace=True)
            if layer is not self.decoder[-1]:
                code = F.dropout(code, 0.2, self.training)
        features: Tensor = self.output(code)
        return features
