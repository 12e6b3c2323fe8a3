"""Patch features of many images, kept as their layers came and aligned only when they are read."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from kizu.features.patch_features import as_rows

__all__ = ["FeatureTable", "Shape"]

Shape = tuple[int, int, int]  # channels, height, width


class FeatureTable:
    """N patches of D numbers each, like a tensor (N, D).

    The first layer has the grid of patches. What a patch is given of a coarser layer is, in bilinear interpolation, a
    weighted sum of four places: keeping these instead of the patches takes a quarter of the memory, or less.
    """

    def __init__(
        self,
        num_images: int,
        shapes: Sequence[Shape],
        device: torch.device | None = None,
        places: Tensor | None = None,
    ) -> None:
        """Room for images whose layers are of `shapes`, none of which has more places than the first.

        Only patches at `places` of the first layer's grid, row · columns + column, are rows of the table; None: all.
        """
        self.shapes, self.places = list(shapes), places
        self.patches = shapes[0][1] * shapes[0][2] if places is None else len(places)  # of an image
        self.layers = [
            torch.empty(num_images * height * width, channels, device=device) for channels, height, width in shapes
        ]
        self.taps = [_taps(shape, shapes[0], device) for shape in shapes]

    @classmethod
    def of(cls, tensor: Tensor) -> "FeatureTable":
        """A tensor (N, D) as rows, without copying it."""
        rows = cls(0, [(tensor.shape[1], 1, 1)], tensor.device)
        rows.layers = [tensor]
        return rows

    @classmethod
    def joined(cls, tables: Sequence["FeatureTable"]) -> "FeatureTable":
        """The rows of several tables of the same shapes, in their order."""
        first = tables[0]
        rows = cls(0, first.shapes, first.device, first.places)
        rows.layers = [torch.cat(layers) for layers in zip(*(table.layers for table in tables), strict=True)]
        return rows

    def cpu(self) -> "FeatureTable":
        """The same table in the memory of the processor."""
        moved = FeatureTable(0, self.shapes, None, None if self.places is None else self.places.cpu())
        moved.layers = [layer.cpu() for layer in self.layers]
        return moved

    @staticmethod
    def bytes(num_images: int, shapes: Sequence[Shape]) -> int:
        """What so many images take."""
        return 4 * num_images * sum(channels * height * width for channels, height, width in shapes)

    def __len__(self) -> int:
        height, width = self.shapes[0][1:]
        return len(self.layers[0]) // (height * width) * self.patches

    @property
    def dimension(self) -> int:
        """Numbers of a patch, D."""
        return sum(layer.shape[1] for layer in self.layers)

    @property
    def device(self) -> torch.device:
        return self.layers[0].device

    def write(self, first: int, maps: Sequence[Tensor]) -> None:
        """Images from number `first` on, each layer (B, C, h, w)."""
        for layer, values in zip(self.layers, maps, strict=True):
            rows = as_rows(values)
            start = first * values.shape[2] * values.shape[3]
            layer[start : start + len(rows)] = rows

    def take(self, indices: Tensor, out: Tensor | None = None) -> Tensor:
        """The patches of these indices (n,): (n, D), written to `out` if there is one."""
        if len(self.layers) == 1 and self.places is None:
            return torch.index_select(self.layers[0], 0, indices, out=out)
        image_ids, place = indices // self.patches, indices % self.patches
        if self.places is not None:
            place = self.places[place]
            indices = image_ids * (self.shapes[0][1] * self.shapes[0][2]) + place
        parts = []
        for layer, (_, height, width), taps in zip(self.layers, self.shapes, self.taps, strict=True):
            if taps is None:
                parts.append(layer.index_select(0, indices))
            else:
                places, weights = (table.index_select(0, place) for table in taps)
                places = places + (image_ids * (height * width))[:, None]
                parts.append(F.embedding_bag(places, layer, per_sample_weights=weights, mode="sum"))
        return torch.cat(parts, 1, out=out)

    def span(self, start: int, stop: int) -> Tensor:
        """The patches from start to stop: (stop − start, D)."""
        if len(self.layers) == 1 and self.places is None:
            return self.layers[0][start:stop]
        return self.take(torch.arange(start, min(stop, len(self)), device=self.device))


def _taps(shape: Shape, finest: Shape, device: torch.device | None) -> tuple[Tensor, Tensor] | None:
    """For each patch of the finest grid, places of this layer and their weights (P, 4); none where the grids agree."""
    if shape[1:] == finest[1:]:
        return None
    (rows, down), (columns, across) = (_sides(*sides) for sides in zip(shape[1:], finest[1:], strict=True))
    places = rows[:, None, :, None] * shape[2] + columns[None, :, None, :]  # (H, W, 2, 2)
    weights = down[:, None, :, None] * across[None, :, None, :]
    return places.reshape(-1, 4).to(device), weights.reshape(-1, 4).to(device)


def _sides(length: int, size: int) -> tuple[Tensor, Tensor]:
    """Of `size` points along `length` places: the places on either side and their weights (size, 2)."""
    points = ((torch.arange(size, device="cpu") + 0.5) * length / size - 0.5).clamp(min=0)
    below = points.long().clamp(max=length - 1)
    share = points - below
    return torch.stack([below, (below + 1).clamp(max=length - 1)], 1), torch.stack([1 - share, share], 1)
