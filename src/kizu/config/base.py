"""What the hyper-parameters of all methods have in common: one frozen, validated object a method.

The command line's options, the API's keyword arguments and the saved model's JSON are all made from its fields, so that
a name is written once.
"""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from kizu.config.zones import LIMITS, Zones
from kizu.errors import OptionError, did_you_mean

__all__ = ["Augmented", "BackboneConfig", "Config", "Names", "Numbers", "OtherConfig", "Size", "build"]

Model = TypeVar("Model", bound=BaseModel)
MAX_SHOWN = 80  # letters of a wrong value


def _pair(value: Any) -> Any:
    """Height and width from 256, "256", "256x512" or a pair; what is none of these is left for the validator."""
    if isinstance(value, str):
        value = list(value.lower().replace("×", "x").split("x"))
    if isinstance(value, int | float):
        value = [value]
    if isinstance(value, list | tuple) and len(value) == 1:
        value = [value[0], value[0]]
    return value


def _names(value: Any) -> Any:
    """The parts of "layer2,layer3"."""
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


Side = Annotated[int, Field(ge=32, le=4096)]
TileSide = Annotated[int, Field(ge=32, le=16384)]
Tile = Annotated[tuple[TileSide, TileSide], BeforeValidator(_pair)]
Size = Annotated[tuple[Side, Side], BeforeValidator(_pair)]
Names = Annotated[tuple[str, ...], BeforeValidator(_names)]
Numbers = Annotated[tuple[int, ...], BeforeValidator(_names)]


class Augmented(BaseModel):
    """How training images are varied. A strength of 0 leaves them as they are."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    augment: bool = Field(False, description="Vary the training images a little, if no strength below is given.")
    rotate_degrees: float = Field(0.0, ge=0, le=180, description="Rotate by up to this angle, either way.")
    translate: float = Field(0.0, ge=0, le=0.5, description="Shift by up to this share of the height and width.")
    scale: float = Field(0.0, ge=0, le=0.5, description="Shrink or enlarge by up to this share.")
    brightness: float = Field(0.0, ge=0, le=1, description="Darken or lighten by up to this share.")
    contrast: float = Field(0.0, ge=0, le=1, description="Lower or raise the contrast by up to this share.")
    saturation: float = Field(0.0, ge=0, le=1, description="Lower or raise the saturation by up to this share.")
    gray: float = Field(0.0, ge=0, le=1, description="Share of the images that are turned gray.")
    hflip: float = Field(0.0, ge=0, le=1, description="Share of the images that are mirrored left to right.")
    vflip: float = Field(0.0, ge=0, le=1, description="Share of the images that are mirrored top to bottom.")


class Config(Augmented):
    """The settings of every method."""

    size: Size = Field((320, 320), description="Size of the network's input: 320, or height x width as in 256x512.")
    resize: int | None = Field(
        None,
        ge=32,
        le=8192,
        description="Scale the shorter side to this, then crop the centre to `size`. Default: no crop.",
    )
    tile: Tile | None = Field(
        None,
        description="Judge large photographs in tiles of so many pixels, each scaled to `size`: 320, or height x width."
        " Default: as a whole.",
    )
    overlap: int = Field(32, ge=0, le=4096, description="With `tile`: pixels that neighbouring tiles have in common.")
    align: bool = Field(
        False,
        description="Find how the part lies in each photograph, and turn and shift it to one common pose first.",
    )
    bits: int | None = Field(
        None,
        ge=8,
        le=16,
        description="Bits that a camera uses of 16, as 12. Default: found from the photographs.",
    )
    zones: Zones = Field(
        (),
        description="Zones as a run's zones.json holds them: parts of the frame that are inspected or ignored.",
    )
    min_area: float | None = Field(
        None,
        gt=0,
        description="Smallest area that matters: smaller marked regions stop no part. In pixels of the photograph, or "
        "in mm² with `pixel_size`.",
    )
    min_length: float | None = Field(
        None, gt=0, description="Smallest length that matters, in pixels, or in mm with `pixel_size`."
    )
    max_count: int | None = Field(
        None, ge=0, le=1000, description="How many regions that matter a part may have. Default with a size: none."
    )
    pixel_size: float | None = Field(
        None, gt=0, description="Millimetres that a pixel of the photograph shows: sizes are in mm."
    )
    cannot_judge: Literal["ask", "stop", "pass"] | None = Field(
        None,
        description="What becomes of a photograph taken unlike the good ones, as out of focus, too dark, moved or of "
        "another part: ask is a third verdict, for a person to look. Default: it is judged as any other.",
    )
    smoothing: float = Field(4.0, ge=0, le=64, description="Gaussian smoothing of the anomaly map: σ in input pixels.")
    false_alarms: float = Field(
        0.02, gt=0, lt=1, description="Share of good parts that may be stopped: 0.02 is 1 in 50."
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of everything random.")

    @property
    def rules_sizes(self) -> bool:
        """Whether regions of some size stop a part, or more of them than some number, instead of any score."""
        return any(getattr(self, name) is not None for name in LIMITS) or any(zone.has_limits for zone in self.zones)

    @property
    def measures(self) -> bool:
        """Whether marked regions are measured: rules are for their sizes, or a pixel's is known."""
        return self.rules_sizes or self.pixel_size is not None

    @property
    def own_rates(self) -> dict[int, float]:
        """The rates of false alarms that zones have of their own, by their number among those that are inspected."""
        inspected = [zone for zone in self.zones if not zone.ignored]
        return {number: zone.false_alarms for number, zone in enumerate(inspected) if zone.false_alarms is not None}

    @property
    def all_false_alarms(self) -> float:
        """The share of good parts that all zones together may stop: those with a rate of their own, and the others."""
        own = self.own_rates
        others = not own or len(own) < sum(not zone.ignored for zone in self.zones)
        return min(sum(own.values()) + (self.false_alarms if others else 0.0), 0.999)

    @model_validator(mode="after")
    def _crop_fits(self) -> "Config":
        if self.resize is not None and self.resize < min(self.size):
            raise ValueError(f"`resize={self.resize}` is smaller than `size={min(self.size)}`")
        return self

    @model_validator(mode="after")
    def _tiles_fit(self) -> "Config":
        if self.tile is None:
            return self
        other = "resize" if self.resize is not None else "align" if self.align else "zones" if self.zones else ""
        if other:
            raise ValueError(f"`tile` cannot be used with `{other}`, which is of photographs that are seen as a whole")
        if 2 * self.overlap > min(self.tile):
            raise ValueError(f"`overlap={self.overlap}` is more than half of `tile={min(self.tile)}`")
        if any(side % 4 for side in self.size):
            raise ValueError(f"`tile` needs a size of multiples of 4, not `size={self.size[0]}x{self.size[1]}`")
        return self


class OtherConfig(Config):
    """Settings of a method whose own class is not at hand: every value as model.json has it."""

    model_config = ConfigDict(extra="allow")


class BackboneConfig(Config):
    """The settings of every method with a pretrained backbone."""

    backbone: str = Field(
        "efficientnet_lite2",
        min_length=1,
        description="Pretrained network: efficientnet_lite2 comes with kizu; clip and any name of timm are downloaded.",
    )
    layers: Names = Field(
        (),
        description="Layers that features are taken from: layer2,layer3, or block numbers of a transformer. "
        "Default: those of reduction 8 and 16.",
    )
    weights: str | None = Field(
        None, description="File with the backbone's weights: safetensors, or a checkpoint of plain tensors."
    )


def build(kind: type[Model], settings: dict[str, Any]) -> Model:
    """A config from keyword arguments or JSON. Raises `OptionError` with a sentence for each wrong value."""
    try:
        return kind(**settings)
    except ValidationError as error:
        raise OptionError("; ".join(_sentence(kind, problem) for problem in error.errors())) from None


def _sentence(kind: type[BaseModel], problem: ErrorDetails) -> str:
    where = problem["loc"]
    message = problem["msg"].removeprefix("Value error, ")
    if not where:
        return str(message)
    if problem["type"] == "extra_forbidden":
        hint = did_you_mean(str(where[0]), kind.model_fields)
        return f"`{where[0]}` is not a setting of {kind.__name__.removesuffix('Config')}" + (f".{hint}" if hint else "")
    value = f'"{problem["input"]}"' if isinstance(problem["input"], str) else str(problem["input"])
    value = value if len(value) <= MAX_SHOWN else f"{value[:MAX_SHOWN]}…"
    return f"`{where[0]}={value}`: {message[0].lower()}{message[1:]}"
