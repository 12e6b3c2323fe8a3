"""Features of training images, computed once and taken in many passes."""

import tempfile
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["FeatureStore"]

HALF = torch.finfo(torch.float16)


class FeatureStore:
    """Features of one shape for each image, in half precision.

    What exceeds `memory_bytes` lies in a temporary file that goes with the store.
    """

    def __init__(self, images: int, shape: Sequence[int], memory_bytes: int) -> None:
        every = (images, *shape)
        self.in_memory = 2 * int(np.prod(every)) <= memory_bytes
        if self.in_memory:
            self._array = np.empty(every, np.float16)
        else:
            with tempfile.TemporaryFile(prefix="kizu") as file:  # stays as long as it is mapped
                self._array = np.memmap(file, np.float16, "w+", shape=every)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def shape(self) -> tuple[int, ...]:
        """Of each image's features."""
        return tuple(self._array.shape[1:])

    def append(self, features: Tensor) -> None:
        """Add images' features (B, *shape)."""
        values = features.clamp(HALF.min, HALF.max).half().numpy(force=True)
        self._array[self._count : self._count + len(values)] = values
        self._count += len(values)

    def take(self, images: Sequence[int], places: Tensor | None = None) -> Tensor:
        """Features (B, *shape) of these images, or (B, k, …) of k `places` (B, k) of each, in single precision."""
        if places is None:
            chosen = self._array[list(images)]
        else:
            pairs = zip(images, places.numpy(force=True), strict=True)
            chosen = np.stack([self._array[image][indices] for image, indices in pairs])
        return torch.from_numpy(chosen).float()
