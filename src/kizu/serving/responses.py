"""What the server says of a photograph and of a model, with maps and pictures as text that JSON can carry."""

import base64
import io
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from kizu.calibration.sizes import what_matters
from kizu.calibration.threshold import Threshold, finite, p_value
from kizu.data import image
from kizu.inference.inspector import Inspector
from kizu.inference.prediction import Evidence, Prediction
from kizu.serving.batcher import Answer, LoadedModel, Upload
from kizu.serving.schemas import Map, Model, Pair, Promise, Result

__all__ = ["ResponseOptions", "describe_model", "map_shape", "promise_at", "thumbnail", "to_response"]

VIEW_SIDE = 1600  # pixels, the longer side
THUMBNAIL_SIDE = 160
MAX_UINT16 = 65535


@dataclass(frozen=True)
class ResponseOptions:
    """What a client wants beside a verdict."""

    map: Literal["none", "png", "npy"]
    map_size: int
    why: bool
    view: bool


def to_response(upload: Upload, answer: Answer, options: ResponseOptions) -> Result:
    """The verdict on an upload, and what the client wants beside it."""
    outcome, model = answer.outcome, answer.loaded.model
    result = Result.of(upload.name, outcome, model)
    if not isinstance(outcome, Prediction):
        return result
    result.height, result.width = outcome.shape
    if options.map != "none":
        result.map = _map(outcome, model, options.map, options.map_size)
    result.pairs = [_pair(evidence) for evidence in answer.evidence]
    if options.view:
        result.view = _jpeg(_shrunk(upload, VIEW_SIDE, model.preprocessing.white))
    return result


def describe_model(name: str, loaded: LoadedModel, *, settable: bool) -> Model:
    """A model and what it promises; whether its threshold may be set."""
    model = loaded.model
    return Model(
        name=name,
        version=loaded.version,
        method=model.method,
        loaded=loaded.time,
        size=model.preprocessing.size,
        images=model.training.get("images", 0),
        threshold=finite(model.threshold.value),
        statement=f"{model.threshold.statement} {what_matters(model.config)}".rstrip(),
        good_scores=sorted(model.calibration_scores),
        map_level=finite(model.pixel_threshold),
        map_peaks=sorted(model.map_peaks),
        scale=model.heat_map_range,
        tuned=bool(model.threshold.tuned),
        settable=settable,
    )


def promise_at(model: Inspector, value: float) -> Promise:
    """What the good images behind the model's threshold promise of another threshold."""
    good = model.calibration_scores
    if not good:
        statement = model.threshold.statement
        return Promise(threshold=value, expected=None, bound=None, statement=statement, map_level=None)
    expected = p_value(math.nextafter(value, math.inf), good)
    threshold = Threshold(value, expected, len(good), grouped=model.threshold.grouped)
    pixel_threshold = model.pixel_threshold_at(value)
    if value == model.threshold.value:
        threshold, pixel_threshold = model.threshold, model.pixel_threshold
    return Promise(
        threshold=value,
        expected=expected,
        bound=None if threshold.tuned else threshold.bound,
        statement=threshold.statement
        if expected < 1
        else "Every good part may be stopped: all good images score above this threshold.",
        map_level=finite(pixel_threshold),
    )


def thumbnail(upload: Upload, white: int = image.WHITE) -> bytes:
    """A small JPEG of a photograph; `white` is the value of more than 8 bits that becomes 255."""
    return image.encode(_shrunk(upload, THUMBNAIL_SIDE, white), "JPEG", quality=80)


def map_shape(photograph: tuple[int, int], longest: int) -> tuple[int, int]:
    """(height, width) of the map over a photograph of this (height, width); `longest` 0: as the photograph."""
    height, width = photograph
    factor = min(1.0, longest / max(height, width)) if longest else 1.0
    return max(1, round(height * factor)), max(1, round(width * factor))


def _map(prediction: Prediction, model: Inspector, format: Literal["png", "npy"], longest: int) -> Map:
    """The map over the whole photograph, its longer side at most so many pixels; 0: as the photograph."""
    shape = map_shape(prediction.shape, longest)
    values = prediction.map_of(shape)
    low = min(model.heat_map_range[0], float(values.min()))
    high = max(model.heat_map_range[1], float(values.max()), low + 1e-9)
    buffer = io.BytesIO()
    if format == "npy":
        np.save(buffer, values.astype(np.float32))
    else:
        buffer.write(image.encode(np.rint((values - low) / (high - low) * MAX_UINT16).astype(np.uint16)))
    return Map(format=format, low=low, high=high, height=shape[0], width=shape[1], data=_base64(buffer.getvalue()))


def _pair(evidence: Evidence) -> Pair:
    return Pair(
        region=evidence.region,
        image=evidence.nearest.image,
        distance=evidence.nearest.distance,
        here=_jpeg(evidence.query_crop),
        there=None if evidence.match_crop is None else _jpeg(evidence.match_crop),
    )


def _shrunk(upload: Upload, side: int, white: int) -> npt.NDArray[np.uint8]:
    rgb, (height, width) = upload.read((side, side), white, large=True)
    factor = min(1.0, side / max(height, width))
    return image.resize(rgb, (max(1, round(height * factor)), max(1, round(width * factor))))


def _jpeg(rgb: npt.NDArray[np.uint8]) -> str:
    return _base64(image.encode(rgb, "JPEG", quality=88))


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()
