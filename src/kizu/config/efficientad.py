"""The settings of EfficientAD."""

from typing import Literal

from pydantic import Field, model_validator

from kizu.config.base import Config, Size

__all__ = ["EfficientADConfig"]


class EfficientADConfig(Config):
    """EfficientAD (Batzner et al., WACV 2024)."""

    teacher: str | None = Field(
        None, description="The trained teacher: a file, or a folder or zip archive with a file for each size."
    )
    network: Literal["s", "m"] = Field("s", description="Small or medium network, where `teacher` holds both sizes.")
    steps: int = Field(70_000, ge=1, description="Training steps. The learning rate falls to a tenth for the last 5 %.")
    batch_size: int = Field(
        1, ge=1, le=256, description="Images in a training step; the loss of each is computed by itself. Paper: 1."
    )
    penalty: str | None = Field(
        None,
        description="Folder of other photographs, on which the student must not learn to imitate the teacher. "
        "Default: drawn textures. none: no penalty.",
    )
    border: Literal["picture", "map", "stretch"] = Field(
        "picture",
        description="How the outer 16 pixels are scored. picture: photographs are padded. map: the map's rim is "
        "repeated, as published; a quarter quicker. stretch: the map is stretched, up to 16 pixels off, as PUAD's "
        "published models expect.",
    )
    validation: float = Field(
        0.15,
        ge=0,
        le=0.5,
        description="Share of the good images that sets the maps' range and the threshold instead of training. 0: "
        "none, where the data set has validation images.",
    )
    precision: Literal["single", "mixed"] = Field(
        "single", description="mixed: train the convolutions in bfloat16, where the processor or GPU is quick at it."
    )
    size: Size = Field(
        (256, 256),
        description="Size of the network's input, at least 256 a side: 256, or height x width as in 256x512.",
    )
    smoothing: float = Field(0.0, ge=0, le=64, description="Gaussian smoothing of the anomaly map: σ in input pixels.")

    @model_validator(mode="after")
    def _autoencoder_fits(self) -> "EfficientADConfig":
        if min(self.size) < 256:
            raise ValueError(f"`size={min(self.size)}`: EfficientAD's autoencoder needs at least 256 pixels a side")
        return self
