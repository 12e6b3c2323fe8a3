"""The JSON that the server answers, as its OpenAPI document describes it."""

from typing import Literal

from pydantic import BaseModel, Field

from kizu.inference.verdict import Verdict
from kizu.serving.feedback import Label

__all__ = ["Collected", "Health", "KeptVerdict", "Map", "Model", "Pair", "Predictions", "Problem", "Promise", "Result"]


class Problem(BaseModel):
    """Why a request was not granted."""

    error: str


class Health(BaseModel):
    """The server is up."""

    status: Literal["ok"] = "ok"
    models: int


class Model(BaseModel):
    """A model that the server answers with."""

    name: str
    version: str = Field(description="changes whenever other contents are loaded")
    method: str
    loaded: float = Field(description="seconds since 1970")
    size: tuple[int, int] = Field(description="height and width that the network sees")
    images: int = Field(description="good images that it learned from")
    threshold: float | None = Field(description="a part is stopped above it; null: it stops nothing")
    statement: str = Field(description="the promise about false alarms")
    good_scores: list[float] = Field(description="scores of the good images that set the threshold, ascending")
    map_level: float | None = Field(description="the pixel threshold: what is above it in the map is marked")
    map_peaks: list[float] = Field(description="each good image's largest map value, ascending")
    scale: tuple[float, float] = Field(description="map values that are drawn darkest and brightest")
    tuned: bool = Field(
        description="whether the threshold was set by hand or on labels, instead of by the good images alone"
    )
    settable: bool = Field(description="whether its threshold may be set, by who has the key for that")


class Promise(BaseModel):
    """What another threshold would promise."""

    threshold: float
    expected: float | None = Field(description="at most this share of good parts is stopped on average; null: unknown")
    bound: float | None = Field(description="at most this share, with 95 % confidence")
    statement: str
    map_level: float | None = Field(
        description="the pixel threshold that goes with it: as few good images reach it as score above the threshold"
    )


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

    region: int = Field(description="number of the region, from 1; 0: the highest place of a map without regions")
    image: str = Field(description="name of the training image")
    distance: float = Field(description="in units of what is typical of good parts there")
    here: str = Field(description="the marked place as JPEG, in base64")
    there: str | None = Field(description="the good patch as JPEG, in base64, where the model keeps thumbnails")


class Result(Verdict):
    """A verdict, and what the request asked for with it."""

    id: int | None = Field(None, description="number of the verdict in the history, if it is kept")
    not_kept: str = Field("", description="why it is not in the history, where it was to be kept")
    width: int | None = None
    height: int | None = None
    map: Map | None = None
    pairs: list[Pair] = Field([], description="the nearest good patches of the first regions, or of the highest place")
    view: str | None = Field(None, description="the photograph as JPEG, in base64")


class Predictions(BaseModel):
    """The verdicts on the photographs of a request, in their order."""

    model: str
    version: str
    results: list[Result]


class KeptVerdict(BaseModel):
    """A verdict in the history."""

    id: int
    time: float = Field(description="seconds since 1970")
    model: str
    version: str
    verdict: Verdict
    feedback: Label | None


class Collected(BaseModel):
    """Where photographs that a person marked are now."""

    files: list[str] = Field(description="paths of the photographs")
    good: int = Field(description="photographs marked good so far, for this model")
    bad: int = Field(description="photographs marked bad so far, for this model")
