"""Hyper-parameters: one frozen, validated object a method.

The command line's options, the API's keyword arguments and the saved model's JSON are all made from these fields,
so that a name is written once.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from kizu.errors import OptionError

__all__ = ["CONFIGS", "Config", "PatchCoreConfig", "build"]


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


Side = Annotated[int, Field(ge=32, le=4096)]


class Config(BaseModel):
    """What every method has."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    backbone: str = Field(
        "efficientnet_lite2",
        min_length=1,
        description="Pretrained network: efficientnet_lite2 comes with kizu, any other is a timm name.",
    )
    layers: Annotated[tuple[str, ...], BeforeValidator(_names)] = Field(
        (), description="Layers to take features from, e.g. layer2,layer3. Default: reductions 8 and 16."
    )
    weights: str | None = Field(
        None, description="File with the backbone's weights (safetensors, or a checkpoint of plain tensors)."
    )
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


class PatchCoreConfig(Config):
    """PatchCore (Roth et al., CVPR 2022).

    An ensemble has several backbones, separated by commas, with layers numbered by them: 0.layer2,0.layer3,1.layer2.
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
    top: float = Field(
        0.01,
        ge=0,
        le=1,
        description="An image's score is the mean of this share of its most anomalous patches. Paper: 0, one patch.",
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
        names = [name.strip() for name in self.backbone.split(",")]
        if len(names) == 1:
            return [self]
        files = [None] * len(names) if self.weights is None else self.weights.split(",")
        return [
            self.model_copy(
                update={
                    "backbone": name,
                    "weights": file,
                    "layers": tuple(
                        layer.partition(".")[2] for layer in self.layers if layer.split(".")[0] == str(number)
                    ),
                }
            )
            for number, (name, file) in enumerate(zip(names, files, strict=True))
        ]


CONFIGS: dict[str, type[Config]] = {"patchcore": PatchCoreConfig}


def build(kind: type[Config], settings: dict[str, Any]) -> Any:
    """A config from keyword arguments or JSON. Raises `OptionError` with a sentence for each wrong value."""
    try:
        return kind(**settings)
    except ValidationError as error:
        raise OptionError("; ".join(_sentence(kind, problem) for problem in error.errors())) from None


def _sentence(kind: type[Config], problem: Any) -> str:
    where = problem["loc"]
    message = problem["msg"].removeprefix("Value error, ")
    if not where:
        return str(message)
    option = "--" + str(where[0]).replace("_", "-")
    if problem["type"] == "extra_forbidden":
        return f"{option} is not an option of {kind.__name__.removesuffix('Config')}"
    return f"{option} {problem['input']}: {message[0].lower()}{message[1:]}"
