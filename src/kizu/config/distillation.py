"""The settings of a distillation."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from kizu.config.base import Names

__all__ = ["DistillationConfig"]


class DistillationConfig(BaseModel):
    """How a teacher is trained."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    teacher_for: Literal["efficientad"] = Field("efficientad", description="Method that the teacher is for.")
    size: Literal["s", "m"] = Field("s", description="Small or medium network.")
    backbone: str = Field(
        "efficientnet_lite2",
        min_length=1,
        description="Network to imitate: efficientnet_lite2 comes with kizu; any name of timm is downloaded.",
    )
    layers: Names = Field(
        (), description="Layers of that network, pooled to 384 channels together. Default: those of reduction 8 and 16."
    )
    weights: str | None = Field(
        None, description="File with that network's weights: safetensors, or a checkpoint of plain tensors."
    )
    steps: int = Field(60_000, ge=1, description="Training steps.")
    batch_size: int = Field(16, ge=1, le=1024, description="Photographs in a training step.")
    learning_rate: float = Field(1e-4, gt=0, le=1, description="Learning rate. Paper: 1e-4 throughout.")
    cosine: bool = Field(
        False,
        description="Let the learning rate rise over the first tenth of the steps, and fall along a cosine to nothing.",
    )
    average: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Keep a running mean of the weights, of which each step leaves this share as it was: 0.999. 0: the "
        "last weights.",
    )
    crops: bool = Field(False, description="Train on random crops, mirrored or not, instead of whole photographs.")
    measured: int = Field(
        10_000, ge=1, description="Photographs that each channel's mean and standard deviation are measured on."
    )
    side: int = Field(256, ge=64, le=2048, multiple_of=32, description="Side of the teacher's square input, in pixels.")
    precision: Literal["single", "mixed"] = Field(
        "single", description="mixed: train the convolutions in bfloat16, where the processor or GPU is quick at it."
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of everything random.")
