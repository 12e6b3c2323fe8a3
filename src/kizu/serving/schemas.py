"""What the server answers, as its OpenAPI document describes it."""

from typing import Literal

from pydantic import BaseModel, Field

from kizu.inference.verdict import Verdict
from kizu.serving.feedback import Label

__all__ = ["Collected", "Health", "Judged", "Kept", "Map", "Model", "Pair", "Predictions", "Problem", "Promise"]


class Problem(BaseModel):
    """Why a request was not granted."""

    error: str


class Health(BaseModel):
    status: Literal["ok"] = "ok"
    models: int


class Model(BaseModel):
    """A model on duty."""

    name: str
    version: str = Field(description="changes whenever other contents are loaded")
    method: str
    loaded: float = Field(description="seconds since 1970")
    size: tuple[int, int] = Field(description="height and width that the network sees")
    images: int = Field(description="good images that it learned from")
    threshold: float | None = Field(description="a part is stopped above it; null: it stops nothing")
    statement: str = Field(description="the promise about false alarms")
    good_scores: list[float] = Field(description="scores of the good images behind the level, in ascending order")
    map_level: float | None = Field(description="what is above it in the map is marked")
    map_peaks: list[float] = Field(description="the largest map values of the good images behind the level, ascending")
    scale: tuple[float, float] = Field(description="map values that are drawn darkest and brightest")


class Promise(BaseModel):
    """What another threshold would promise."""

    threshold: float
    expected: float | None = Field(description="share of good parts stopped on average, at most; null: not known")
    bound: float | None = Field(description="the same with 95 % confidence")
    statement: str
    map_level: float | None = Field(description="the level of the map that good parts reach as rarely")


class Map(BaseModel):
    """An anomaly map."""

    format: Literal["png", "npy"]
    low: float = Field(description="png: the value that 0 stands for")
    high: float = Field(description="png: the value that 65535 stands for")
    height: int
    width: int
    data: str = Field(description="the file, in base64")


class Pair(BaseModel):
    """A marked place and the good patch from training that looks most like it."""

    region: int = Field(description="number of the region, from 1; 0: the highest place where nothing is marked")
    image: str = Field(description="name of the training image")
    distance: float = Field(description="in units of what is usual among good parts there")
    here: str = Field(description="JPEG in base64")
    there: str | None = Field(description="the same, where the model keeps thumbnails")


class Judged(Verdict):
    """A verdict, and what was asked for with it."""

    id: int | None = Field(None, description="its number among those that are kept")
    width: int | None = None
    height: int | None = None
    map: Map | None = None
    pairs: list[Pair] = Field([], description="of the first regions, or of the highest place")
    view: str | None = Field(None, description="the photograph as JPEG in base64")


class Predictions(BaseModel):
    """The verdicts on the photographs of a request, in their order."""

    model: str
    version: str
    results: list[Judged]


class Kept(BaseModel):
    """A verdict that is kept."""

    id: int
    time: float = Field(description="seconds since 1970")
    model: str
    version: str
    verdict: Verdict
    feedback: Label | None


class Collected(BaseModel):
    """Photographs that were marked."""

    files: list[str] = Field(description="where they are now")
    good: int = Field(description="photographs marked good so far, of this model")
    bad: int
