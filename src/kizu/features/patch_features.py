"""From layer maps to patch features: neighbourhood pooling, alignment, channel pooling (PatchCore, §3.1)."""

from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kizu.errors import OptionError

__all__ = ["PatchFeatures", "as_rows"]


class PatchFeatures(nn.Module):
    """Locally aware patch features.

    With the two dimensions of the reference, each layer's (channels × patchsize × patchsize) neighbourhood is averaged
    to `pretrain_embed_dimension` values and all layers together to `target_embed_dimension`. Without them, each
    channel is averaged over its neighbourhood and the layers are stacked.

    The reference aligns the layers before it pools their channels. Both are linear and act on different axes, so
    pooling first gives the same result with patchsize² times less work, and less memory where many are kept.
    """

    def __init__(
        self,
        patchsize: int,
        pretrain_embed_dimension: int | None = None,
        target_embed_dimension: int | None = None,
        stride: int = 1,
        more_sizes: tuple[int, ...] = (),
        again: int = 1,
    ) -> None:
        """`stride` is in places of a layer's grid; `more_sizes` are neighbourhoods whose averages are stacked too.

        The averages are averaged `again` over so many places on either axis, which weights what is near more.
        """
        super().__init__()
        self.patchsize = patchsize
        self.stride = stride
        self.sizes = (patchsize, *more_sizes)
        self.again = again
        self.pretrain_embed_dimension = pretrain_embed_dimension
        self.target_embed_dimension = target_embed_dimension

    @classmethod
    def weighted(cls, size: int) -> Self:
        """Neighbourhoods of an odd size whose places count 1 2 … 2 1 on either axis: means of means."""
        first = size // 4 * 2 + 1
        return cls(first, again=size + 1 - first)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """[(B, C_l, H_l, W_l)] → (B, D, H_0, W_0)."""
        return self.stacked(self.pooled(maps))

    def pooled(self, maps: list[Tensor]) -> list[Tensor]:
        """Each layer's part of the features (B, D_l, H'_l, W'_l), as coarse as it is: what `stacked` aligns."""
        pooled = [self.pool(layer, size) for size in self.sizes for layer in maps]
        if self.again > 1:
            pooled = [F.avg_pool2d(layer, self.again, 1, (self.again - 1) // 2) for layer in pooled]
        target = self.target_embed_dimension
        if target is not None:
            if len({layer.shape[1] for layer in pooled}) > 1 or target % len(pooled):  # a mean would mix layers
                return [_pool_channels(self.stacked(pooled), target)]
            pooled = [_pool_channels(layer, target // len(pooled)) for layer in pooled]
        grid = pooled[0].shape[-2:]
        return [_align(layer, grid) if layer.shape[-2:].numel() > grid.numel() else layer for layer in pooled]

    def stacked(self, pooled: list[Tensor]) -> Tensor:
        """All parts on the grid of the first: (B, D, H_0, W_0)."""
        aligned = [_align(layer, pooled[0].shape[-2:]) for layer in pooled]
        return aligned[0] if len(aligned) == 1 else torch.cat(aligned, dim=1)

    def remarks(self, grid: tuple[int, int]) -> list[str]:
        """What a user should know of a patchsize on layers of `grid`."""
        size, (height, width) = self.patchsize, grid
        sentences = []
        if size % 2 == 0:
            sentences.append(
                f"`patchsize={size}` is even: the grid of patches is one smaller and half a patch off; use {size - 1}."
            )
        if size > 1 and 2 * size > min(grid):
            sentences.append(
                f"`patchsize={size}` averages over most of the {height}×{width} grid: maps are too coarse to say "
                "where a defect is; choose a smaller one or a larger `size`."
            )
        return sentences

    def pool(self, layer: Tensor, size: int) -> Tensor:
        """(B, C, H, W) → (B, C or pretrain_embed_dimension, H', W'); an even size shrinks the grid by one."""
        padding, stride = (size - 1) // 2, self.stride
        channels, height, width = layer.shape[1:]
        if min(height, width) + 2 * padding < size:
            raise OptionError(f"`patchsize={size}` does not fit a layer of {height}×{width}: choose a smaller one")
        if self.pretrain_embed_dimension in (None, channels):
            return F.avg_pool2d(layer, size, stride, padding) if max(size, stride) > 1 else layer
        values = F.unfold(layer, size, padding=padding, stride=stride)  # (B, C · p · p, H' · W')
        values = _pool_channels(values, self.pretrain_embed_dimension)
        grid = ((height + 2 * padding - size) // stride + 1, (width + 2 * padding - size) // stride + 1)
        return values.reshape(*values.shape[:2], *grid)


def _align(layer: Tensor, grid: torch.Size) -> Tensor:
    same = layer.shape[-2:] == grid
    return layer if same else F.interpolate(layer, size=grid, mode="bilinear", align_corners=False)


def _pool_channels(values: Tensor, dimension: int) -> Tensor:
    """Adaptive average pooling over axis 1: (B, C, …) → (B, dimension, …)."""
    if values.shape[1] == dimension:
        return values
    rows = values.flatten(2).transpose(1, 2)  # (B, positions, C)
    pooled = F.adaptive_avg_pool1d(rows, dimension)
    return pooled.transpose(1, 2).reshape(values.shape[0], dimension, *values.shape[2:])


def as_rows(features: Tensor) -> Tensor:
    """(B, D, h, w) → (B · h · w, D)."""
    return features.permute(0, 2, 3, 1).flatten(0, 2)
