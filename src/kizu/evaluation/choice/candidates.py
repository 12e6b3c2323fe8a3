"""The settings that are tried: one thing changed at a time, from what is best so far."""

import math
from typing import Any

from kizu.config import Augmented, BackboneConfig

__all__ = ["in_proportion", "other_size", "variations"]

STEP = 32  # pixels: each side of an input is a multiple of it, so that every layer's grid covers it
NEARLY_SQUARE = 1.25  # ratio of the sides up to which a photograph is squeezed into a square
MIN_SIDE, MAX_SIDE = 192, 1024
ANY_POSE = {"rotate_degrees": 180.0}


def in_proportion(size: tuple[int, int], shape: tuple[int, int]) -> tuple[int, int]:
    """An input (height, width) of about as many pixels as `size`, in the proportions of photographs of `shape`."""
    if max(shape) <= NEARLY_SQUARE * min(shape):
        return size
    area, ratio = size[0] * size[1], shape[0] / shape[1]
    return _rounded(math.sqrt(area * ratio)), _rounded(math.sqrt(area / ratio))


def other_size(size: tuple[int, int], factor: float) -> tuple[int, int] | None:
    """The same input with both sides larger or smaller; None where that leaves the bounds."""
    sides = tuple(_rounded(factor * side) for side in size)
    return (sides[0], sides[1]) if all(MIN_SIDE <= side <= MAX_SIDE for side in sides) else None


def variations(config: BackboneConfig) -> list[dict[str, Any]]:
    """Changes of other settings than the size: copies of each photograph in any pose."""
    return [] if config.model_fields_set.intersection(Augmented.model_fields) else [ANY_POSE]


def _rounded(side: float) -> int:
    return max(STEP, STEP * round(side / STEP))
