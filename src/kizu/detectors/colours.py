"""Random changes of colour."""

import torch
from torch import Tensor

__all__ = ["greyed", "varied"]

FACTORS = (0.8, 1.2)  # of brightness, contrast or saturation
GREY = (0.2989, 0.587, 0.114)


def varied(images: Tensor) -> Tensor:
    """Float images (B, 3, H, W) in [0, 255], each with another brightness, contrast or saturation."""
    count = len(images)
    grey = _grey(images)
    kinds = torch.randint(0, 3, (count,)).to(images.device)[:, None, None, None]
    factors = torch.empty(count, 1, 1, 1).uniform_(*FACTORS).to(images.device)
    mean = grey.mean((2, 3), keepdim=True).expand_as(grey)
    towards = torch.where(kinds == 0, torch.zeros_like(grey), torch.where(kinds == 1, mean, grey))
    return (factors * images + (1 - factors) * towards).clamp(0, 255)


def greyed(images: Tensor, share: float) -> Tensor:
    """uint8 images (B, 3, H, W) → float, a `share` of them without colour."""
    which = (torch.rand(len(images), 1, 1, 1) < share).to(images.device)
    colour = images.float()
    return torch.where(which, _grey(colour), colour)


def _grey(images: Tensor) -> Tensor:
    """(B, 3, H, W) → (B, 1, H, W)."""
    return (images * images.new_tensor(GREY).view(1, 3, 1, 1)).sum(1, keepdim=True)
