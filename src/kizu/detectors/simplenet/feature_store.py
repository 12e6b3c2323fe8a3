"""Patch features of many images, computed once: half precision, in memory or in a temporary file."""

import tempfile

import numpy as np
import torch
from torch import Tensor

__all__ = ["FeatureStore"]

HALF = torch.finfo(torch.float16)


class FeatureStore:
    """Features (images, patches, dimension). What exceeds `memory` bytes lies in a file that goes with the store."""

    def __init__(self, images: int, patches: int, dimension: int, memory: int) -> None:
        shape = (images, patches, dimension)
        self.in_memory = 2 * images * patches * dimension <= memory
        if self.in_memory:
            self._array = np.empty(shape, np.float16)
        else:
            with tempfile.TemporaryFile(prefix="kizu") as file:  # stays as long as it is mapped
                self._array = np.memmap(file, np.float16, "w+", shape=shape)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def patches(self) -> int:
        """Of each image."""
        return int(self._array.shape[1])

    def append(self, features: Tensor) -> None:
        """Add images' features (B, D, h, w)."""
        rows = features.flatten(2).transpose(1, 2).clamp(HALF.min, HALF.max)
        self._array[self._count : self._count + len(rows)] = rows.half().numpy(force=True)
        self._count += len(rows)

    def take(self, images: Tensor, patches: Tensor | None = None) -> Tensor:
        """(B,) images and (B, k) of their patches, or all → (B · k, D), single precision."""
        chosen = (
            self._array[images.numpy(force=True)]
            if patches is None
            else np.stack(
                [
                    self._array[image][some]
                    for image, some in zip(images.tolist(), patches.numpy(force=True), strict=True)
                ]
            )
        )
        return torch.from_numpy(chosen).flatten(0, 1).float()
