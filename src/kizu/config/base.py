"""Hyper-parameters: one frozen, validated object a method.

The command line's options, the API's keyword arguments and the saved model's JSON are all made from these fields,
so that a name is written once.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from kizu.config.backbone_names import without_seed
from kizu.errors import OptionError

__all__ = [
    "CONFIGS",
    "Augmented",
    "BackboneConfig",
    "Config",
    "DistillationConfig",
    "EfficientADConfig",
    "OtherConfig",
    "PUADConfig",
    "PatchCoreConfig",
    "SimpleNetConfig",
    "build",
]


def _pair(value: Any) -> Any:
    """256, "256", "256x512" (height × width) or a pair."""
    if isinstance(value, str):
        value = list(value.lower().replace("×", "x").split("x"))
    if isinstance(value, int | float):
        value = [value]
    if isinstance(value, list | tuple) and len(value) == 1:
        value = [value[0], value[0]]
    return value


def _names(value: Any) -> Any:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


def _settings(value: Any) -> dict[str, Any]:
    """A dictionary, JSON of one, or "size=320,layers=layer2,layer3": what has no = belongs to the value before it."""
    if isinstance(value, dict):
        return dict(value)
    if str(value).lstrip().startswith("{"):
        try:
            return dict(json.loads(value))
        except ValueError:
            raise ValueError(f"--base-settings {value}: this is not JSON") from None
    settings: dict[str, Any] = {}
    for part in str(value).split(","):
        before, equals, after = part.partition("=")
        if equals:
            name = before.strip().replace("-", "_")
            settings[name] = after.strip()
        elif settings:
            settings[name] += f",{part.strip()}"
        else:
            raise ValueError(f"--base-settings {value}: write name=value,name=value or JSON")
    return settings


Side = Annotated[int, Field(ge=32, le=4096)]


class Augmented(BaseModel):
    """How good images are varied while they are learned from. Strengths of 0 leave them as they are."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    augment: bool = Field(False, description="Vary a little, where no strength is given below.")
    rotate_degrees: float = Field(0.0, ge=0, le=180, description="Turn by up to this, either way.")
    translate: float = Field(0.0, ge=0, le=0.5, description="Shift by up to this share of the height and width.")
    scale: float = Field(0.0, ge=0, le=0.5, description="Shrink or enlarge by up to this share.")
    brightness: float = Field(0.0, ge=0, le=1, description="Darken or lighten by up to this share.")
    contrast: float = Field(0.0, ge=0, le=1, description="Less or more contrast by up to this share.")
    saturation: float = Field(0.0, ge=0, le=1, description="Less or more colour by up to this share.")
    gray: float = Field(0.0, ge=0, le=1, description="Share of the images that lose their colours.")
    hflip: float = Field(0.0, ge=0, le=1, description="Share of the images that are mirrored left to right.")
    vflip: float = Field(0.0, ge=0, le=1, description="Share of the images that are mirrored top to bottom.")


class Config(Augmented):
    """What every method has."""

    size: Annotated[tuple[Side, Side], BeforeValidator(_pair)] = Field(
        (320, 320), description="Network input: 320, or height x width as in 256x512."
    )
    resize: int | None = Field(
        None,
        ge=32,
        le=8192,
        description="Scale the shorter side to this and cut SIZE out of the centre. Default: no cutting.",
    )
    smoothing: float = Field(4.0, ge=0, le=64, description="Gaussian smoothing of the map, σ in input pixels.")
    false_alarms: float = Field(
        0.02, gt=0, lt=1, description="Share of good parts that the threshold may stop: 0.02 is 1 in 50."
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Everything random follows from it.")

    @model_validator(mode="after")
    def _crop_fits(self) -> "Config":
        if self.resize is not None and self.resize < min(self.size):
            raise ValueError(f"--resize {self.resize} is smaller than --size {min(self.size)}")
        return self


class OtherConfig(Config):
    """Settings of a method whose own class is not at hand: every value as model.json has it."""

    model_config = ConfigDict(extra="allow")


class BackboneConfig(Config):
    """What every method has that looks through a pretrained backbone."""

    backbone: str = Field(
        "efficientnet_lite2",
        min_length=1,
        description="Pretrained network: efficientnet_lite2 comes with kizu, clip or any other is a timm name.",
    )
    layers: Annotated[tuple[str, ...], BeforeValidator(_names)] = Field(
        (),
        description="Layers to take features from, e.g. layer2,layer3; 0 … 11 of a transformer. "
        "Default: reductions 8 and 16.",
    )
    weights: str | None = Field(
        None, description="File with the backbone's weights (safetensors, or a checkpoint of plain tensors)."
    )


class PatchCoreConfig(BackboneConfig):
    """PatchCore (Roth et al., CVPR 2022).

    An ensemble has several backbones, separated by commas, with layers numbered by them: 0.layer2,0.layer3,1.layer2.
    One with .seed-3 behind its name has its own seed.
    """

    patchsize: int = Field(3, ge=1, le=15, description="Side of the neighbourhood that is averaged.")
    pretrain_embed_dimension: int | None = Field(
        None,
        ge=1,
        le=16384,
        description="Channels that each layer is pooled to, as in the reference. Default: its own.",
    )
    target_embed_dimension: int | None = Field(
        None,
        ge=1,
        le=16384,
        description="Channels that all layers together are pooled to. Default: their sum.",
    )
    patchstride: int = Field(1, ge=1, le=15, description="Grid places from one patch to the next.")
    patchsize_aggregate: Annotated[tuple[int, ...], BeforeValidator(_names)] = Field(
        (), description="Sides of further neighbourhoods, whose averages join the first one's: 1,5."
    )
    sampler: Literal["k_center", "greedy_coreset", "approx_greedy_coreset", "random", "identity"] = Field(
        "k_center", description="How the memory bank is chosen from the training patches."
    )
    coreset: float = Field(0.02, gt=0, le=1, description="Share of the training patches kept in the memory bank.")
    neighbours: int = Field(
        1, ge=1, le=100, description="A patch's score is the mean distance to this many bank entries."
    )
    search: Literal["exact", "ivfpq"] = Field(
        "exact",
        description="Find the nearest entry for sure, or one of the nearest with faiss (extra faiss, for huge banks).",
    )
    faiss_on_gpu: bool = Field(False, description="With --search ivfpq: search on the GPU.")
    fusion: Literal["separate", "stack"] = Field(
        "separate", description="A bank for each layer, or one of all layers stacked as in the paper."
    )
    local_scale: bool = Field(
        True, description="Measure distances in units of what is usual around a bank entry. Paper: no."
    )
    squared: bool = Field(False, description="Square the distances, as the published code does. Paper: no.")
    top: float = Field(
        0.01,
        ge=0,
        le=1,
        description="An image's score is the mean of this share of its most anomalous patches. Paper: 0, one patch.",
    )
    augmented_copies: int = Field(
        4, ge=1, le=100, description="Copies of each image beside itself, if there is augmentation."
    )
    reweight: int = Field(
        0, ge=0, le=100, description="Eq. 7 of the paper over this many neighbours in the bank (paper: 9). 0: off."
    )
    thumbnails: bool = Field(
        False, description="Keep small pictures of the training images in the model, to show why something is marked."
    )

    @model_validator(mode="after")
    def _parts_fit(self) -> "PatchCoreConfig":
        if (self.pretrain_embed_dimension is None) != (self.target_embed_dimension is None):
            raise ValueError("--pretrain-embed-dimension and --target-embed-dimension go together")
        if self.search == "ivfpq" and self.neighbours > 1:
            raise ValueError("--search ivfpq finds one entry: it needs --neighbours 1")
        if self.faiss_on_gpu and self.search != "ivfpq":
            raise ValueError("--faiss-on-gpu needs --search ivfpq; the exact search uses a GPU wherever there is one")
        if self.target_embed_dimension is not None and self.fusion != "stack":
            raise ValueError("--target-embed-dimension pools all layers together: it needs --fusion stack")
        if any(not 1 <= size <= 15 for size in self.patchsize_aggregate):
            raise ValueError("--patchsize-aggregate takes numbers from 1 to 15")
        if self.squared and (self.fusion != "stack" or self.local_scale or self.reweight > 1):
            raise ValueError("--squared is for the published scores: --fusion stack --no-local-scale, no --reweight")
        if self.reweight > 1 and (self.fusion, self.local_scale, self.top) != ("stack", False, 0):
            raise ValueError("--reweight (Eq. 7) is for the paper's scores: --fusion stack --no-local-scale --top 0")
        return self

    @model_validator(mode="after")
    def _members_are_complete(self) -> "PatchCoreConfig":
        count = len(self.backbone.split(","))
        if count == 1:
            return self
        for layer in self.layers:
            number = layer.partition(".")[0]
            if not number.isdigit() or int(number) >= count:
                raise ValueError(f"--layers {layer}: with {count} backbones each layer starts with 0. … {count - 1}.")
        if self.weights is not None and len(self.weights.split(",")) != count:
            raise ValueError(f"--weights: name {count} files, separated by commas, one for each backbone")
        return self

    def members(self) -> "list[PatchCoreConfig]":
        """The config of each backbone of an ensemble; of a single one, itself."""
        names, seeds = zip(*(without_seed(name.strip()) for name in self.backbone.split(",")), strict=True)
        if len(names) == 1:
            return [self if seeds[0] is None else self.model_copy(update={"backbone": names[0], "seed": seeds[0]})]
        files = [file or None for file in (self.weights or "," * (len(names) - 1)).split(",")]
        return [
            self.model_copy(
                update={
                    "backbone": name,
                    "weights": file,
                    "seed": self.seed if seed is None else seed,
                    "layers": tuple(
                        layer.partition(".")[2] for layer in self.layers if layer.split(".")[0] == str(number)
                    ),
                }
            )
            for number, (name, file, seed) in enumerate(zip(names, files, seeds, strict=True))
        ]


class SimpleNetConfig(BackboneConfig):
    """SimpleNet (Liu et al., CVPR 2023)."""

    patchsize: int = Field(3, ge=1, le=15, description="Side of the neighbourhood that is averaged.")
    pretrain_embed_dimension: int | None = Field(
        None, ge=1, le=16384, description="Channels that each layer is pooled to. Default: its own. Paper: 1536."
    )
    target_embed_dimension: int | None = Field(
        None, ge=1, le=16384, description="Channels of all layers together. Default: their sum. Paper: 1536."
    )
    pre_proj: int = Field(1, ge=0, le=8, description="Linear layers of the projection. 0: none.")
    proj_layer_type: int = Field(
        0, ge=0, le=2, description="Between these: 0 nothing, 1 batch normalisation, 2 leaky ReLU."
    )
    embedding_size: int | None = Field(
        None, ge=1, le=16384, description="Channels that the projection gives. Default: as many as it takes."
    )
    dsc_layers: int = Field(2, ge=1, le=8, description="Layers of the discriminator.")
    dsc_hidden: int = Field(
        1024, ge=0, le=16384, description="Width of its hidden layers. 0: each two thirds of the one before."
    )
    dsc_margin: float = Field(
        0.5, gt=0, le=10, description="Good patches shall be above it, noisy ones below minus it."
    )
    dsc_lr: float = Field(2e-4, gt=0, le=1, description="The discriminator's learning rate.")
    proj_lr: float = Field(1e-4, gt=0, le=1, description="The projection's learning rate.")
    noise_std: float = Field(0.3, gt=0, le=100, description="Standard deviation of the noise. Paper: 0.015.")
    auto_noise: bool = Field(
        True, description="Noise in units of the features' own deviation, measured on good patches. Paper: no."
    )
    mix_noise: int = Field(1, ge=1, le=20, description="Noise of this many strengths, each 1.1 times the one before.")
    meta_epochs: int = Field(40, ge=1, le=10000, description="Rounds of training; after each a checkpoint is written.")
    gan_epochs: int = Field(4, ge=1, le=1000, description="Passes over the images in a round.")
    aed_meta_epochs: int = Field(1, ge=0, le=10000, description="With --cos-lr: the last rounds, at the lowest rate.")
    cos_lr: bool = Field(False, description="Lower the discriminator's learning rate along a cosine to 0.4 of itself.")
    batch_size: int = Field(32, ge=1, le=1024, description="Images in a training step. Paper: 8.")
    sampled: float = Field(
        1 / 32, gt=0, le=1, description="Share of an image's patches in a step, drawn afresh. Paper: 1."
    )
    train_backbone: bool = Field(False, description="Train the backbone too. Slow: nothing can be kept.")
    backbone_lr: float = Field(1e-5, gt=0, le=1, description="The backbone's learning rate, if it is trained.")
    select: Literal["last", "held_out"] = Field(
        "last", description="Keep the last round, or the one best at good images held out and noisy copies of them."
    )
    patience: int = Field(
        0, ge=0, le=10000, description="With --select held_out: stop after so many rounds without gain. 0: never."
    )
    top: float = Field(
        0.01, ge=0, le=1, description="An image's score is the mean of this share of its patches. Paper: 0, one patch."
    )

    @model_validator(mode="after")
    def _parts_fit(self) -> "SimpleNetConfig":
        if (self.pretrain_embed_dimension is None) != (self.target_embed_dimension is None):
            raise ValueError("--pretrain-embed-dimension and --target-embed-dimension go together")
        if self.embedding_size is not None and self.pre_proj == 0:
            raise ValueError("--embedding-size is the width of the projection: it needs --pre-proj 1 or more")
        if self.cos_lr and self.aed_meta_epochs >= self.meta_epochs:
            raise ValueError(
                f"--aed-meta-epochs {self.aed_meta_epochs} leaves no rounds: --meta-epochs is {self.meta_epochs}"
            )
        if self.patience and self.select != "held_out":
            raise ValueError("--patience needs --select held_out: without it nothing says when to stop")
        return self


class EfficientADConfig(Config):
    """EfficientAD (Batzner et al., WACV 2024)."""

    teacher: str | None = Field(
        None, description="Trained teacher: a file, or a folder or zip archive with one of each size."
    )
    network: Literal["s", "m"] = Field(
        "s", description="Small or medium, where --teacher has both; a file is of one size itself."
    )
    steps: int = Field(70_000, ge=1, description="Training steps; the learning rate falls to a tenth for the last 5 %.")
    batch_size: int = Field(1, ge=1, le=256, description="Images a step. Each counts as if it were alone. Paper: 1.")
    penalty: str | None = Field(
        None,
        description="Folder of photographs of anything else, which the student learns to be silent on. "
        "Default: drawn textures; none: without.",
    )
    border: Literal["picture", "map", "stretch"] = Field(
        "picture",
        description="picture: photographs get a frame, so that every pixel is looked at alike. map: the map's rim "
        "stands for the outer 16 pixels. A quarter quicker, and as published. stretch: the map is laid over the whole "
        "photograph, up to 16 pixels off, as PUAD's published models expect.",
    )
    validation: float = Field(
        0.15,
        ge=0,
        le=0.5,
        description="Share of the good images kept for the maps' scale and the threshold. 0: none, where others are "
        "held out.",
    )
    precision: Literal["single", "mixed"] = Field(
        "single", description="mixed: train the convolutions in bfloat16, for processors and GPUs that are quick at it."
    )
    size: Annotated[tuple[Side, Side], BeforeValidator(_pair)] = Field(
        (256, 256), description="Network input, at least 256 a side: 256, or height x width as in 256x512."
    )
    smoothing: float = Field(0.0, ge=0, le=64, description="Gaussian smoothing of the map, σ in input pixels.")

    @model_validator(mode="after")
    def _autoencoder_fits(self) -> "EfficientADConfig":
        if min(self.size) < 256:
            raise ValueError(f"--size {min(self.size)}: EfficientAD's autoencoder needs at least 256 pixels a side")
        return self


class PUADConfig(Config):
    """PUAD (Sugawara & Imamura, ICIP 2024).

    It has the size and smoothing of its base, unless they are given.
    """

    base: Literal["patchcore", "simplenet", "efficientad"] = Field(
        "patchcore", description="Method that judges what can be pointed at."
    )
    base_settings: dict[str, Any] = Field(
        {}, description="The base's own options: coreset=0.05,layers=layer2,layer3, or JSON."
    )
    balance: float = Field(
        0.5, ge=0, le=1, description="0: only what can be pointed at, 1: only the whole image, 0.5: both alike."
    )
    gate: bool = Field(True, description="Hear the whole image in full only where it exceeds what good images reach.")
    feature: Literal["mean", "token", "both"] = Field(
        "mean", description="What stands for the whole image: the layers' means, a transformer's class tokens, or both."
    )
    feature_extractor: Literal["student", "teacher"] = Field(
        "student", description="With --base efficientad: whose features stand for the whole image."
    )
    exact: bool = Field(False, description="The published arithmetic: both scores standardised and added, no gate.")

    @model_validator(mode="before")
    @classmethod
    def _completed_by_its_base(cls, values: dict[str, Any]) -> dict[str, Any]:
        kind = CONFIGS.get(values.get("base", "patchcore"))
        if kind is None or kind is cls:
            return values
        own = _settings(values.get("base_settings") or {})
        values = {**values, **{name: own.pop(name) for name in list(own) if name in Config.model_fields}}
        for name, field in kind.model_fields.items():
            if name in Config.model_fields and field.default != Config.model_fields[name].default:
                values.setdefault(name, field.default)
        plain = build(kind, own).model_dump(mode="json")
        return {**values, "base_settings": {name: plain[name] for name in own}}

    @model_validator(mode="after")
    def _parts_fit(self) -> "PUADConfig":
        build(CONFIGS[self.base], self._of_the_base)
        if self.exact and self.balance != 0.5:
            raise ValueError("--exact adds both scores alike: it goes with no --balance")
        return self

    @property
    def _of_the_base(self) -> dict[str, Any]:
        given = {name: getattr(self, name) for name in Config.model_fields if name in self.model_fields_set}
        return {**given, **self.base_settings}

    @property
    def base_config(self) -> Config:
        """The base's."""
        config: Config = build(CONFIGS[self.base], self._of_the_base)
        return config

    @property
    def whole(self) -> str:
        """What stands for the whole image: "mean", "token", "both", "student" or "teacher"."""
        return self.feature_extractor if self.base == "efficientad" else self.feature


CONFIGS: dict[str, type[Config]] = {
    "patchcore": PatchCoreConfig,
    "simplenet": SimpleNetConfig,
    "efficientad": EfficientADConfig,
    "puad": PUADConfig,
}


class DistillationConfig(BaseModel):
    """How a teacher is made."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    teacher_for: Literal["efficientad"] = Field("efficientad", description="Method that the teacher is for.")
    size: Literal["s", "m"] = Field("s", description="Small or medium network.")
    backbone: str = Field(
        "efficientnet_lite2",
        min_length=1,
        description="Network to learn from: efficientnet_lite2 comes with kizu, any other is a timm name.",
    )
    layers: Annotated[tuple[str, ...], BeforeValidator(_names)] = Field(
        (), description="Its layers, pooled to 384 channels together. Default: reductions 8 and 16."
    )
    weights: str | None = Field(None, description="File with its weights (safetensors, or a plain checkpoint).")
    steps: int = Field(60_000, ge=1, description="Training steps.")
    batch_size: int = Field(16, ge=1, le=1024, description="Photographs a step.")
    crops: bool = Field(False, description="Random parts of the photographs, mirrored or not, instead of whole ones.")
    measured: int = Field(10_000, ge=1, description="Photographs that set the mean and deviation of each channel.")
    side: int = Field(256, ge=64, le=2048, multiple_of=32, description="Pixels of the teacher's square input.")
    precision: Literal["single", "mixed"] = Field("single", description="mixed: convolutions in bfloat16.")
    seed: int = Field(0, ge=0, lt=2**32, description="Everything random follows from it.")


def build(kind: type[BaseModel], settings: dict[str, Any]) -> Any:
    """A config from keyword arguments or JSON. Raises `OptionError` with a sentence for each wrong value."""
    try:
        return kind(**settings)
    except ValidationError as error:
        raise OptionError("; ".join(_sentence(kind, problem) for problem in error.errors())) from None


def _sentence(kind: type[BaseModel], problem: Any) -> str:
    where = problem["loc"]
    message = problem["msg"].removeprefix("Value error, ")
    if not where:
        return str(message)
    option = "--" + str(where[0]).replace("_", "-")
    if problem["type"] == "extra_forbidden":
        return f"{option} is not an option of {kind.__name__.removesuffix('Config')}"
    return f"{option} {problem['input']}: {message[0].lower()}{message[1:]}"
