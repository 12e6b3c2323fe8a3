"""The settings of SimpleNet."""

from typing import Literal

from pydantic import Field, model_validator

from kizu.config.base import BackboneConfig

__all__ = ["SimpleNetConfig"]


class SimpleNetConfig(BackboneConfig):
    """SimpleNet (Liu et al., CVPR 2023)."""

    patchsize: int = Field(3, ge=1, le=15, description="Side of the neighbourhood that is averaged into a patch.")
    pretrain_embed_dimension: int | None = Field(
        None,
        ge=1,
        le=16384,
        description="Channels that each layer is pooled to. Default: as many as it has. Paper: 1536.",
    )
    target_embed_dimension: int | None = Field(
        None,
        ge=1,
        le=16384,
        description="Channels that all layers together are pooled to. Default: as many as they have. Paper: 1536.",
    )
    pre_proj: int = Field(1, ge=0, le=8, description="Linear layers of the projection. 0: no projection.")
    proj_layer_type: int = Field(
        0, ge=0, le=2, description="Between the projection's layers: 0 nothing, 1 batch normalisation, 2 leaky ReLU."
    )
    embedding_size: int | None = Field(
        None, ge=1, le=16384, description="Channels that the projection gives. Default: as many as its input has."
    )
    dsc_layers: int = Field(2, ge=1, le=8, description="Layers of the discriminator.")
    dsc_hidden: int = Field(
        1024,
        ge=0,
        le=16384,
        description="Width of the discriminator's hidden layers. 0: two thirds of the layer before.",
    )
    dsc_margin: float = Field(
        0.5, gt=0, le=10, description="The loss pushes good patches above this output, noisy patches below minus this."
    )
    dsc_lr: float = Field(2e-4, gt=0, le=1, description="Learning rate of the discriminator.")
    proj_lr: float = Field(1e-4, gt=0, le=1, description="Learning rate of the projection.")
    noise_std: float = Field(0.3, gt=0, le=100, description="Standard deviation of the noise. Paper: 0.015.")
    auto_noise: bool = Field(
        True, description="Scale the noise by the standard deviation of the good patches' features. Paper: no."
    )
    mix_noise: int = Field(1, ge=1, le=20, description="Number of noise strengths, each 1.1 times the one before.")
    meta_epochs: int = Field(40, ge=1, le=10000, description="Rounds of training. A checkpoint is written after each.")
    gan_epochs: int = Field(4, ge=1, le=1000, description="Passes over the images in each round.")
    aed_meta_epochs: int = Field(
        1, ge=0, le=10000, description="With `cos_lr`: number of last rounds at the lowest learning rate."
    )
    cos_lr: bool = Field(
        False, description="Lower the discriminator's learning rate along a cosine, to 0.4 of its start."
    )
    batch_size: int = Field(32, ge=1, le=1024, description="Images in a training step. Paper: 8.")
    sampled: float = Field(
        1 / 32, gt=0, le=1, description="Share of each image's patches that a training step draws. Paper: 1."
    )
    train_backbone: bool = Field(
        False, description="Train the backbone too. Slow, because features cannot be computed once and kept."
    )
    backbone_lr: float = Field(1e-5, gt=0, le=1, description="With `train_backbone`: learning rate of the backbone.")
    select: Literal["last", "held_out"] = Field(
        "last", description="Keep the last round, or the one that best tells held-out good images from noisy copies."
    )
    patience: int = Field(
        0,
        ge=0,
        le=10000,
        description='With `select="held_out"`: stop after this many rounds without improvement. 0: never.',
    )
    top: float = Field(
        0.01,
        ge=0,
        le=1,
        description="An image's score is the mean of this share of its highest patch scores. Paper: 0, the highest.",
    )

    @model_validator(mode="after")
    def _settings_fit(self) -> "SimpleNetConfig":
        if (self.pretrain_embed_dimension is None) != (self.target_embed_dimension is None):
            raise ValueError("`pretrain_embed_dimension` and `target_embed_dimension` go together")
        if self.embedding_size is not None and self.pre_proj == 0:
            raise ValueError("`embedding_size` is the width of the projection: it needs `pre_proj=1` or more")
        if self.cos_lr and self.aed_meta_epochs >= self.meta_epochs:
            raise ValueError(
                f"`aed_meta_epochs={self.aed_meta_epochs}` leaves no rounds of `meta_epochs={self.meta_epochs}`"
            )
        if self.patience and self.select != "held_out":
            raise ValueError('`patience` needs `select="held_out"`: without it nothing says when to stop')
        return self
