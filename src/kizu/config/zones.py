"""Zones: parts of the frame that are inspected with a threshold of their own, or not at all."""

import json
import math
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

__all__ = ["LIMITS", "Zone", "Zones"]

LIMITS = ("min_area", "min_length", "max_count")  # what says that something is too small to matter
MAX_POINTS = 100_000  # of all zones together
MAX_ZONES = 64

Share = Annotated[float, Field(ge=-1, le=2, allow_inf_nan=False)]
Ring = Annotated[tuple[tuple[Share, Share], ...], Field(min_length=3)]


class Zone(BaseModel):
    """A part of the frame with a name.

    `rings` are polygons of corners (x, y), in shares of the photograph's width and height: those that run clockwise are
    in the zone, those that run the other way are holes in it. A zone is inspected, with a threshold of its own, or
    `ignored`. With `false_alarms` it has a promise of its own: the share of good parts that this zone alone may stop.
    `min_area`, `min_length` and `max_count` say what is too small to matter there, instead of what they say for all.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, max_length=60)
    rings: tuple[Ring, ...] = Field(min_length=1)
    ignored: bool = False
    false_alarms: float | None = Field(None, gt=0, lt=1)
    min_area: float | None = Field(None, gt=0)
    min_length: float | None = Field(None, gt=0)
    max_count: int | None = Field(None, ge=0, le=1000)

    @property
    def has_limits(self) -> bool:
        """Whether it says on its own what is too small to matter."""
        return any(getattr(self, name) is not None for name in LIMITS)

    @model_validator(mode="after")
    def _covers_something(self) -> "Zone":
        if self.name != self.name.strip() or not self.name.isprintable():
            raise ValueError(f"a zone's name is a line of text without blanks around it, not {self.name!r}")
        if self.ignored and self.false_alarms is not None:
            raise ValueError(f"zone {self.name} is ignored: it stops no part, and has no rate of false alarms")
        if self.ignored and self.has_limits:
            raise ValueError(f"zone {self.name} is ignored: nothing in it matters, whatever its size")
        if any(abs(area(ring)) < 1e-9 for ring in self.rings):
            raise ValueError(f"zone {self.name} has an outline that covers nothing")
        return self


def area(ring: Any) -> float:
    """Of a polygon; negative where it runs counterclockwise, y being down."""
    after = [*ring[1:], ring[0]]
    return math.fsum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in zip(ring, after, strict=True)) / 2


def _checked(zones: tuple[Zone, ...]) -> tuple[Zone, ...]:
    names = [zone.name for zone in zones]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"several zones are called {repeated[0]}: give each a name of its own")
    if len(zones) > MAX_ZONES:
        raise ValueError(f"{len(zones)} zones; no more than {MAX_ZONES} are possible")
    if (points := sum(len(ring) for zone in zones for ring in zone.rings)) > MAX_POINTS:
        raise ValueError(f"the zones have {points:,} corners; no more than {MAX_POINTS:,} are possible")
    return zones


def _parsed(value: Any) -> Any:
    """Zones as JSON, as an option has them."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise ValueError("zones are a list of objects with name, rings and ignored, in JSON") from None


Zones = Annotated[tuple[Zone, ...], BeforeValidator(_parsed), AfterValidator(_checked)]
