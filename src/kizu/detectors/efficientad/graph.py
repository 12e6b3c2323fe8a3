"""EfficientAD's graph: teacher, student and autoencoder, the map of where they disagree, and the loss (§3.2–3.4)."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kizu.config import EfficientADConfig
from kizu.detectors.augmentation import jittered
from kizu.detectors.efficientad.networks import FIELD, FRAME, PDN, STRIDE, Autoencoder, grid_of, normalised
from kizu.features.anomaly_map import MapUpsampling

__all__ = ["LOSSES", "EfficientADGraph", "hard_loss"]

HARD_SHARE = 0.999  # of the errors, that the hard loss leaves out
LOSSES = ("hard", "penalty", "autoencoder", "student of autoencoder")
CENTRE = FIELD // 2  # the pixel that the first feature of an image is centred on


def hard_loss(errors: Tensor, share: float = HARD_SHARE) -> Tensor:
    """Mean of the squared errors (B, …) that reach their image's `share` quantile; mean over the images.

    The quantile is interpolated between two neighbours in order, and the upper one and all above it reach it.
    """
    flat = errors.flatten(1)
    most = flat.shape[1] - math.ceil(share * (flat.shape[1] - 1) - 1e-9)
    return flat.topk(most, dim=1, sorted=False).values.mean()


class EfficientADGraph(nn.Module):
    """uint8 images (B, 3, H, W) → scores (B,), anomaly maps (B, 1, H, W)."""

    mean: Tensor
    std: Tensor
    levels: Tensor
    surround: Tensor

    def __init__(self, config: EfficientADConfig, network: PDN) -> None:
        super().__init__()
        dimension = network.dimension
        self.frame = FRAME if config.border == "picture" else (0, 0)
        height, width = (side + sum(self.frame) for side in config.size)
        self.grid = grid_of((height, width))
        self.teacher = network
        self.student = PDN(network.size, 2 * dimension, network.widths)
        self.autoencoder = Autoencoder(config.size, self.grid, dimension)
        self.mimics_teacher = slice(dimension)  # the student's channels
        self.mimics_autoencoder = slice(dimension, None)
        self.register_buffer("mean", torch.zeros(dimension))
        self.register_buffer("std", torch.ones(dimension))
        self.register_buffer("levels", torch.tensor([[0.0, 1.0], [0.0, 1.0]]))  # (student, autoencoder) × (low, high)
        self.register_buffer("surround", torch.zeros(3))  # colour of the frame, normalised
        places = (None, None) if config.border == "stretch" else (CENTRE - self.frame[0], STRIDE)
        self.upsample = MapUpsampling(self.grid, config.size, config.smoothing, *places)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.score_outputs(*self.outputs(images))

    def forward_with_global_features(self, images: Tensor, kind: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """As `forward`, and from the same pass the mean over all places of what "student" or "teacher" sees, (B, C).

        Of the student it is the half that mimics the teacher; the teacher's is normalised.
        """
        teacher_out, student_out, autoencoder_out = self.outputs(images)
        features = teacher_out if kind == "teacher" else student_out[:, self.mimics_teacher]
        global_features = {kind: features.mean((2, 3))}  # first: scoring uses the outputs up
        return *self.score_outputs(teacher_out, student_out, autoencoder_out), global_features

    def global_features(self, images: Tensor, kind: str) -> dict[str, Tensor]:
        """Global features alone, as `forward_with_global_features` gives them."""
        framed = self.framed(normalised(images))
        features = self.teacher_out(framed) if kind == "teacher" else self.student(framed)[:, self.mimics_teacher]
        return {kind: features.mean((2, 3))}

    def outputs(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, 3, H, W) → what teacher, student and autoencoder put out, (B, C or 2 C, h, w)."""
        pixels = normalised(images)
        framed = self.framed(pixels)
        return self.teacher_out(framed), self.student(framed), self.autoencoder(pixels)

    def score_outputs(self, teacher_out: Tensor, student_out: Tensor, autoencoder_out: Tensor) -> tuple[Tensor, Tensor]:
        """The three networks' outputs → scores (B,) and anomaly maps (B, 1, H, W) (§3.4)."""
        low, high = self.levels.view(2, 2, 1, 1, 1).unbind(1)
        errors = self._squared_errors(teacher_out, student_out, autoencoder_out)
        grids = 0.1 * (torch.stack(errors) - low) / (high - low)  # (2, B, h, w)
        anomaly_maps: Tensor = self.upsample(self.upsample.zoned(grids.mean(0)))
        return anomaly_maps.flatten(1).amax(1), anomaly_maps

    def errors(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) → squared differences of the student to teacher and autoencoder, (B, h, w) each."""
        return self._squared_errors(*self.outputs(images))

    def _squared_errors(
        self, teacher_out: Tensor, student_out: Tensor, autoencoder_out: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Means over the channels. The teacher's and the autoencoder's outputs are used up."""
        local = teacher_out.sub_(student_out[:, self.mimics_teacher]).square_().mean(1)
        return local, autoencoder_out.sub_(student_out[:, self.mimics_autoencoder]).square_().mean(1)

    def framed(self, pixels: Tensor) -> Tensor:
        """With the frame, so that every pixel lies in the middle of a feature.

        One colour neither repeats what is near the border, as mirroring would, nor draws it out.
        """
        if self.frame == (0, 0):
            return pixels
        colour = self.surround.view(1, 3, 1, 1)
        return (F.pad(pixels - colour, 2 * self.frame) + colour).contiguous(memory_format=torch.channels_last)

    def teacher_out(self, framed: Tensor) -> Tensor:
        """The teacher's features in units of their spread over good images: T̂ = (T − μ) / σ."""
        features: Tensor = self.teacher(framed).float()
        return features.sub_(self.mean.view(1, -1, 1, 1)).div_(self.std.view(1, -1, 1, 1))

    def losses(self, images: Tensor, others: Tensor | None) -> Tensor:
        """uint8 good images (B, 3, H, W) and unrelated ones → the four terms of the loss, (4,), in order of LOSSES."""
        pixels, changed = normalised(images), normalised(jittered(images.float()))
        unrelated = [] if others is None or not len(others) else [normalised(others)]
        framed = self.framed(torch.cat([pixels, *unrelated, changed]))
        batch = len(pixels)
        with torch.no_grad():
            teachers = self.teacher_out(torch.cat([framed[:batch], framed[-batch:]]))
            teacher_out, teacher_out_changed = teachers.split(batch)
        trunk = self.student.trunk(framed)
        student_out = self.student.head(trunk[:-batch], self.mimics_teacher).float()
        autoencoder_out = self.autoencoder(changed).float()
        student_out_changed = self.student.head(trunk[-batch:], self.mimics_autoencoder).float()
        return torch.stack(
            [
                hard_loss((teacher_out - student_out[:batch]).square()),
                student_out[batch:].square().mean() if unrelated else student_out.new_zeros(()),
                (teacher_out_changed - autoencoder_out).square().mean(),
                (autoencoder_out - student_out_changed).square().mean(),
            ]
        )
