"""The settings that are tried: one thing changed at a time, from what is best so far."""

import math
from typing import Any

from kizu.config import Augmented, PatchCoreConfig
from kizu.features import backbone

__all__ = [
    "LARGER",
    "SMALLER",
    "at_two_sizes",
    "in_any_pose",
    "in_one_pose",
    "in_proportion",
    "other_size",
    "seen_wider",
]

STEP = 32  # pixels: each side of an input is a multiple of it, so that every layer's grid covers it
LARGER, SMALLER = 1.4, 0.8  # factors of both sides
NEARLY_SQUARE = 1.25  # ratio of the sides up to which a photograph is squeezed into a square
SHARE_OF_TURNED = 0.4
MIN_SIDE, MAX_SIDE = 192, 1024


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


def seen_wider(config: PatchCoreConfig) -> dict[str, Any] | None:
    """Larger neighbourhoods of the same layers, and a coarser layer, each with a memory bank of its own, half as large.

    None where the settings or the network leave no room for them.
    """
    given = {"layers", "patchsize", "patchsize_aggregate"} & config.model_fields_set
    if given or config.fusion == "stack" or len(config.members()) > 1:
        return None
    network = backbone.blank(config.backbone, (), config.size)
    layers = [name for layer in network.layers for name in (layer, f"{layer}:{config.patchsize + 2}")]
    banks = (*layers, *([] if network.coarser is None else [f"{network.coarser}:1"]))
    return {"layers": banks} | ({} if "coreset" in config.model_fields_set else {"coreset": config.coreset / 2})


def at_two_sizes(config: PatchCoreConfig, size: tuple[int, int]) -> dict[str, Any] | None:
    """`seen_wider` at this size, and the usual layers at a larger one, where small things are better seen.

    None where the settings, the network or the bounds of a size leave no room for them.
    """
    wider, larger = seen_wider(config), other_size(size, LARGER)
    if wider is None or larger is None:
        return None
    usual = backbone.blank(config.backbone, (), config.size).layers
    layers = (*(f"{layer}@{1 / LARGER:.2f}" for layer in wider["layers"]), *usual)
    return {**wider, "size": larger, "layers": layers}


def in_one_pose(config: PatchCoreConfig) -> dict[str, Any] | None:
    """Each photograph turned to one pose first; None where the settings say so already, or how to vary photographs."""
    given = {"align", *Augmented.model_fields} & config.model_fields_set
    return None if given else {"align": True}


def in_any_pose(config: PatchCoreConfig) -> dict[str, Any] | None:
    """Turned copies of each photograph, of which banks keep a smaller share; None where the settings say how to vary.

    There are five times as many patches, and nearly as much is alike among them: banks of twice the size do.
    """
    if config.align or config.model_fields_set.intersection(Augmented.model_fields):
        return None
    given = "coreset" in config.model_fields_set
    return {"rotate_degrees": 180.0} | ({} if given else {"coreset": SHARE_OF_TURNED * config.coreset})


def _rounded(side: float) -> int:
    return max(STEP, STEP * round(side / STEP))
