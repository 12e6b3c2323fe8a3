"""Variations of photographs that are still photographs of good parts, of their masks, and of colours alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from kizu.config import Augmented

__all__ = ["Augmentation", "greyed", "jittered"]

GENTLE = {"rotate_degrees": 5.0, "translate": 0.02, "scale": 0.02, "brightness": 0.1, "contrast": 0.1}
GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601
TORCHVISION_GREY = (0.2989, 0.587, 0.114)  # the same, as the published codes round it
JITTER = (0.8, 1.2)  # factors of brightness, contrast or saturation


@dataclass(frozen=True)
class Augmentation:
    """Strengths as in `Augmented`. Calling it varies uint8 photographs; each photograph's seed decides how."""

    rotate_degrees: float = 0.0
    translate: float = 0.0
    scale: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    gray: float = 0.0
    hflip: float = 0.0
    vflip: float = 0.0

    @classmethod
    def of(cls, config: Augmented) -> Self | None:
        """What a config asks for; None if nothing."""
        strengths = {field.name: getattr(config, field.name) for field in fields(cls)}
        if any(strengths.values()):
            return cls(**strengths)
        return cls(**GENTLE) if config.augment else None

    def __call__(
        self, images: Tensor, seeds: Sequence[Sequence[int]], masks: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Images (B, 3, H, W) uint8, a seed for each, masks (B, H, W) or None → the same, varied.

        Colours first, then flips, grey, and the turn, shift and scale about the centre; outside, the image is mirrored.
        """
        varied, moved = [], []
        for number, seed in enumerate(seeds):
            draw = np.random.default_rng(seed).uniform(-1, 1, 10).tolist()
            varied.append(self._moved(self._coloured(images[number], draw), draw, "bilinear"))
            if masks is not None:
                moved.append(self._moved(masks[number][None].float(), draw, "nearest")[0].to(masks.dtype))
        return torch.stack(varied).round().to(torch.uint8), torch.stack(moved) if moved else None

    def _coloured(self, image: Tensor, draw: Sequence[float]) -> Tensor:
        """(3, H, W) → float, 0 … 255; mixtures with black, with the mean grey, with grey."""
        image = image.float()
        if self.brightness:
            image = _mixed(image, torch.zeros_like(image), self.brightness * draw[0])
        if self.contrast:
            image = _mixed(image, _grey(image).mean().expand_as(image), self.contrast * draw[1])
        if self.saturation:
            image = _mixed(image, _grey(image).expand_as(image), self.saturation * draw[2])
        return _grey(image).expand_as(image) if _happens(self.gray, draw[3]) else image

    def _moved(self, image: Tensor, draw: Sequence[float], mode: str) -> Tensor:
        """(C, H, W) → the same shape, flipped, turned, shifted and scaled."""
        if _happens(self.hflip, draw[4]):
            image = image.flip(2)
        if _happens(self.vflip, draw[5]):
            image = image.flip(1)
        if not (self.rotate_degrees or self.translate or self.scale):
            return image
        height, width = image.shape[1:]
        angle, factor = math.radians(self.rotate_degrees * draw[6]), 1 + self.scale * draw[7]
        right, down = self.translate * width * draw[8], self.translate * height * draw[9]
        cosine, sine = math.cos(angle) / factor, math.sin(angle) / factor
        # where each output pixel comes from: R⁻¹ (x − shift) / factor, in units of half the width and height
        turn = torch.tensor([[cosine, sine], [-sine, cosine]], dtype=torch.float64)
        half = torch.tensor([width / 2, height / 2], dtype=torch.float64)
        shift = -(turn @ torch.tensor([right, down], dtype=torch.float64))
        theta = torch.cat([turn * half[None] / half[:, None], (shift / half)[:, None]], dim=1).float()
        grid = F.affine_grid(theta[None], [1, *image.shape], align_corners=False).to(image.device)
        moved: Tensor = F.grid_sample(image[None], grid, mode=mode, padding_mode="reflection", align_corners=False)
        return moved[0]


def jittered(images: Tensor) -> Tensor:
    """Float images (B, 3, H, W) in [0, 255], each with another brightness, contrast or saturation."""
    count = len(images)
    grey = _grey(images, TORCHVISION_GREY)
    kinds = torch.randint(0, 3, (count,)).to(images.device)[:, None, None, None]
    factors = torch.empty(count, 1, 1, 1).uniform_(*JITTER).to(images.device)
    mean = grey.mean((2, 3), keepdim=True).expand_as(grey)
    towards = torch.where(kinds == 0, torch.zeros_like(grey), torch.where(kinds == 1, mean, grey))
    return (factors * images + (1 - factors) * towards).clamp(0, 255)


def greyed(images: Tensor, share: float) -> Tensor:
    """uint8 images (B, 3, H, W) → float, a `share` of them without colour."""
    without_colour = (torch.rand(len(images), 1, 1, 1) < share).to(images.device)
    colours = images.float()
    return torch.where(without_colour, _grey(colours, TORCHVISION_GREY), colours)


def _mixed(image: Tensor, other: Tensor, strength: float) -> Tensor:
    return (other + (1 + strength) * (image - other)).clamp(0, 255)


def _grey(images: Tensor, weights: tuple[float, float, float] = GREY) -> Tensor:
    """(…, 3, H, W) → (…, 1, H, W)."""
    return (images * images.new_tensor(weights)[:, None, None]).sum(-3, keepdim=True)


def _happens(probability: float, draw: float) -> bool:
    return (draw + 1) / 2 < probability
