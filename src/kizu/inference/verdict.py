"""The verdict on one photograph as plain values: the one shape for commands, server, watcher and what they keep."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import BaseModel, Field

from kizu.calibration.threshold import finite
from kizu.errors import BadImage
from kizu.inference.regions import MarkedRegion

if TYPE_CHECKING:
    from kizu.inference.inspector import Inspector
    from kizu.inference.prediction import Prediction

__all__ = ["Verdict"]


class Verdict(BaseModel):
    """A photograph's verdict, or why there is none."""

    image: str = Field(description="the photograph's name")
    verdict: Literal["pass", "stop", "ask", "error"]
    score: float | None = Field(None, description="how anomalous")
    p_value: float | None = Field(None, description="at most this share of good parts scores as high")
    threshold: float | None = Field(None, description="a part is stopped above it; null: the model stops nothing")
    zone: str = Field("", description="name of the zone that is the most anomalous; empty where nobody named any")
    regions: list[MarkedRegion] = Field(
        [], description="what is marked: what matters first, and of that the most anomalous"
    )
    parts: dict[str, Any] = Field({}, description="what the score is made of, where a method says more")
    cannot_judge: str = Field("", description="why no promise covers the photograph, whatever the verdict is then")
    error: str = Field("", description="why there is no verdict")

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Self:
        """The verdict in a row that holds more, or less: an earlier version wrote fewer fields."""
        return cls(**{name: row[name] for name in cls.model_fields if name in row})

    @classmethod
    def of(cls, image: str, outcome: "Prediction | BadImage", model: "Inspector", **values: Any) -> Self:
        """What the model says of a photograph called `image`; a subclass takes its other fields as `values`."""
        threshold = finite(model.threshold.value)
        if isinstance(outcome, BadImage):
            return cls(image=image, verdict="error", threshold=threshold, error=outcome.reason, **values)
        return cls(
            image=image,
            verdict=outcome.verdict,
            cannot_judge=outcome.cannot_judge,
            score=outcome.score,
            p_value=outcome.p_value,
            threshold=threshold,
            zone=outcome.zone,
            regions=outcome.regions,
            parts=outcome.parts,
            **values,
        )
