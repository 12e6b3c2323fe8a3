"""What is said of one photograph, as plain values: one shape for the server, the watcher and what they keep."""

import math
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, Field

from kizu.errors import BadImage

if TYPE_CHECKING:
    from kizu.inference.inspector import Inspector, Prediction

__all__ = ["Region", "Verdict", "finite", "verdict_of"]


class Region(BaseModel):
    """A marked region, in pixels of the photograph."""

    box: tuple[int, int, int, int] = Field(description="left, top, width, height")
    area: int = Field(description="pixels")
    peak: float = Field(description="the map's largest value in it")
    place: tuple[int, int] = Field(description="x, y of the peak")
    p_value: float = Field(description="how often a good image has so high a peak anywhere, at most")
    contour: list[tuple[int, int]] = Field(description="corners (x, y) of the outer border, clockwise")


class Verdict(BaseModel):
    """A photograph's verdict, or why there is none."""

    image: str = Field(description="the photograph's name")
    verdict: Literal["pass", "stop", "error"]
    score: float | None = Field(None, description="how anomalous")
    p_value: float | None = Field(None, description="how often a good part looks at least so unusual, at most")
    threshold: float | None = Field(None, description="a part is stopped above it; null: the model stops nothing")
    regions: list[Region] = Field([], description="what is marked, the most anomalous first")
    parts: dict[str, Any] = Field({}, description="what the score is made of, where a method says more")
    error: str = Field("", description="why there is no verdict")


def verdict_of(name: str, outcome: "Prediction | BadImage", model: "Inspector") -> Verdict:
    """The verdict on a photograph called `name`."""
    level = finite(model.threshold.value)
    if isinstance(outcome, BadImage):
        return Verdict(image=name, verdict="error", threshold=level, error=outcome.reason)
    return Verdict(
        image=name,
        verdict="stop" if outcome.is_anomalous else "pass",
        score=outcome.score,
        p_value=outcome.p_value,
        threshold=level,
        regions=[Region(**vars(region)) for region in outcome.regions],
        parts=outcome.parts,
    )


def finite(value: float) -> float | None:
    """Numbers that JSON knows."""
    return value if math.isfinite(value) else None
