"""The settings of EfficientAD."""

from typing import Any, Literal

from pydantic import Field, model_validator

from kizu.config.base import Config, Size

__all__ = ["EfficientADConfig"]

OF_PAPER: dict[str, Any] = {"steps": 70_000, "batch_size": 1, "size": (256, 256), "smoothing": 0.0}  # with s and m


class EfficientADConfig(Config):
    """EfficientAD (Batzner et al., WACV 2024).

    Defaults are those of the embedded network; the paper's networks have the paper's.
    """

    network: Literal["embedded", "s", "m"] = Field(
        "embedded",
        description="The teacher: the pretrained network that comes with kizu, which needs no GPU, or the paper's "
        "small or medium one. With a `teacher` alone it is s.",
    )
    teacher: str | None = Field(
        None,
        description="With networks s and m, the trained teacher: a file, or a folder or zip archive with a file for "
        "each size. Default of s: the one that comes with kizu; m needs one.",
    )
    steps: int = Field(2_400, ge=1, description="Training steps. Paper, and default of its networks: 70,000.")
    batch_size: int = Field(
        8,
        ge=1,
        le=256,
        description="Images in a training step; the loss of each is computed by itself. Paper, and default of its "
        "networks: 1.",
    )
    penalty: str | None = Field(
        None,
        description="Folder of other photographs, on which the student must not learn to imitate the teacher. "
        "Default: drawn textures. none: no penalty.",
    )
    border: Literal["picture", "map", "stretch"] = Field(
        "picture",
        description="How networks s and m score the outer 16 pixels. picture: photographs are padded. map: the map's "
        "rim is repeated, as published; a quarter quicker. stretch: the map is stretched, up to 16 pixels off, as "
        "PUAD's published models expect.",
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
        (320, 320),
        description="Size of the network's input: 320, or height x width as in 256x512. Default of networks s and m, "
        "which need as much at least: 256.",
    )
    smoothing: float = Field(
        8.0,
        ge=0,
        le=64,
        description="Gaussian smoothing of the anomaly map: σ in input pixels. Default of networks s and m: 0.",
    )

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, values: dict[str, Any]) -> dict[str, Any]:
        network = "embedded" if values.get("teacher") is None else "s"
        values = {"network": network, **values}
        return values if values["network"] == "embedded" else {**OF_PAPER, **values}

    @model_validator(mode="after")
    def _settings_fit(self) -> "EfficientADConfig":
        if self.network != "embedded":
            if min(self.size) < 256:
                raise ValueError(f"`size={min(self.size)}`: EfficientAD's autoencoder needs at least 256 pixels a side")
            return self
        if self.teacher is not None:
            raise ValueError("`teacher` goes with `network=s` or `network=m`: the embedded network needs none")
        if self.border != "picture":
            raise ValueError(
                f"`border={self.border}` goes with `network=s` or `network=m`: the embedded one has no rim"
            )
        return self
