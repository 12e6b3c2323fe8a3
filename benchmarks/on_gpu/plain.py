"""EfficientAD's networks in plain torch, as its published code has them: what kizu's graph is measured against."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIDE = 256
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


KERNELS = {"s": (4, 4, 3, 4), "m": (4, 4, 1, 3, 4, 1)}
WIDTHS = {"s": (128, 256, 256), "m": (256, 512, 512, 512)}


def pdn(size: str, channels: int, widths: Sequence[int]) -> nn.Sequential:
    """The patch description network without padding: 56 × 56 features of 256 × 256 pixels."""
    kernels = KERNELS[size]
    sides = [3, *widths, *[channels] * (len(kernels) - len(widths))]
    layers: list[nn.Module] = []
    for number, kernel in enumerate(kernels):
        layers.append(nn.Conv2d(sides[number], sides[number + 1], kernel))
        if number < len(kernels) - 1:
            layers.append(nn.ReLU(inplace=True))
        if number < 2:
            layers.append(nn.AvgPool2d(2, 2))
    return nn.Sequential(*layers)


def autoencoder(channels: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in ((3, 32), (32, 32), (32, 64), (64, 64), (64, 64)):
        layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.ReLU(inplace=True)]
    layers.append(nn.Conv2d(64, 64, 8))
    for side in (3, 8, 15, 32, 63, 127):
        layers += [nn.Upsample((side, side), mode="bilinear"), nn.Conv2d(64, 64, 4, padding=2), nn.ReLU(inplace=True)]
        layers.append(nn.Dropout(0.2))
    layers += [nn.Upsample((56, 56), mode="bilinear"), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Conv2d(64, channels, 3, padding=1))


class PlainEfficientAD(nn.Module):
    """uint8 images (B, 3, 256, 256) → scores (B,), maps (B, 1, 256, 256): teacher, student, autoencoder, their maps."""

    def __init__(self, size: str, channels: int = 384, widths: Sequence[int] = ()) -> None:
        super().__init__()
        self.channels, widths = channels, widths or WIDTHS[size]
        self.teacher, self.student = pdn(size, channels, widths), pdn(size, 2 * channels, widths)
        self.autoencoder = autoencoder(channels)
        self.register_buffer("pixel_mean", torch.tensor(MEAN).view(1, 3, 1, 1))
        self.register_buffer("pixel_std", torch.tensor(STD).view(1, 3, 1, 1))
        self.register_buffer("mean", torch.zeros(1, channels, 1, 1))
        self.register_buffer("std", torch.ones(1, channels, 1, 1))
        self.register_buffer("levels", torch.tensor([[0.0, 1.0], [0.0, 1.0]]))

    def take(self, graph: Any) -> "PlainEfficientAD":
        """The weights of kizu's graph, whose convolutions are in the same order."""
        for name in ("teacher", "student", "autoencoder"):
            ours = [part for part in getattr(self, name).modules() if isinstance(part, nn.Conv2d)]
            theirs = [part for part in getattr(graph, name).modules() if isinstance(part, nn.Conv2d)]
            for part, other in zip(ours, theirs, strict=True):
                part.load_state_dict(other.state_dict())
        return self

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        pixels = (images.float() / 255 - self.pixel_mean) / self.pixel_std
        teacher_out = (self.teacher(pixels) - self.mean) / self.std
        student_out, autoencoder_out = self.student(pixels), self.autoencoder(pixels)
        errors = (
            (teacher_out - student_out[:, : self.channels]).pow(2).mean(1, keepdim=True),
            (autoencoder_out - student_out[:, self.channels :]).pow(2).mean(1, keepdim=True),
        )
        scaled = [0.1 * (e - low) / (high - low) for e, (low, high) in zip(errors, self.levels, strict=True)]
        maps = F.interpolate((scaled[0] + scaled[1]) / 2, (SIDE, SIDE), mode="bilinear")
        return maps.flatten(1).amax(1), maps

    def losses(self, images: Tensor, others: Tensor) -> Tensor:
        """The loss of a step of the published training, for good images and one batch of others."""
        pixels, unrelated = ((x.float() / 255 - self.pixel_mean) / self.pixel_std for x in (images, others))
        with torch.no_grad():
            teacher_out = (self.teacher(pixels) - self.mean) / self.std
        student_out = self.student(pixels)
        errors = (teacher_out - student_out[:, : self.channels]).pow(2)
        hard = hard_quantile(errors)
        penalty = self.student(unrelated)[:, : self.channels].pow(2).mean()
        autoencoder_out = self.autoencoder(pixels)
        of_teacher = (teacher_out - autoencoder_out).pow(2).mean()
        of_autoencoder = (autoencoder_out - self.student(pixels)[:, self.channels :]).pow(2).mean()
        return hard + penalty + of_teacher + of_autoencoder


def hard_quantile(errors: Tensor) -> Tensor:
    """The mean of the errors that lie above the 0.999 quantile, by sorting: quantile() refuses so many numbers."""
    flat = errors.flatten().float()
    threshold = flat.kthvalue(int(0.999 * len(flat))).values
    return flat[flat >= threshold].mean()
