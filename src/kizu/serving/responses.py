"""A verdict with what was asked for beside it: map, neighbours, the photograph itself, as text that JSON can carry."""

import base64
import io
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from kizu.calibration.threshold import Threshold, calibrate, finite, p_value
from kizu.data import image as images
from kizu.errors import BadImage
from kizu.inference.inspector import Inspector
from kizu.inference.prediction import Evidence, Prediction
from kizu.serving.batcher import Answer, Loaded, Upload
from kizu.serving.schemas import Judged, Map, Model, Pair, Promise

__all__ = ["Wishes", "about", "judged", "promise", "thumbnail"]

VIEW = 1600  # pixels, the longer side
SMALL = 160
DEPTH = 65535


@dataclass(frozen=True)
class Wishes:
    """What a client wants beside a verdict."""

    map: Literal["none", "png", "npy"]
    map_size: int
    why: bool
    view: bool


def judged(upload: Upload, answer: Answer, wishes: Wishes) -> Judged:
    """The whole answer about one photograph."""
    outcome, model = answer.outcome, answer.loaded.model
    found = Judged.of(upload.name, outcome, model)
    if isinstance(outcome, BadImage):
        return found
    found.height, found.width = outcome.shape
    if wishes.map != "none":
        found.map = _map(outcome, model, wishes.map, wishes.map_size)
    found.pairs = [_pair(one) for one in answer.evidence]
    if wishes.view:
        found.view = _jpeg(_shrunk(upload, VIEW))
    return found


def about(name: str, loaded: Loaded) -> Model:
    """A model, as the server describes it."""
    model = loaded.model
    return Model(
        name=name,
        version=loaded.version,
        method=model.method,
        loaded=loaded.time,
        size=model.preprocessing.size,
        images=model.training.get("images", 0),
        threshold=finite(model.threshold.value),
        statement=model.threshold.statement,
        good_scores=sorted(model.calibration_scores),
        map_level=finite(model.pixel_threshold),
        map_peaks=sorted(model.map_peaks),
        scale=model.heat_map_range,
    )


def promise(model: Inspector, value: float) -> Promise:
    """What the good images behind the level say of another threshold."""
    good = model.calibration_scores
    if not good:
        statement = model.threshold.statement
        return Promise(threshold=value, expected=None, bound=None, statement=statement, map_level=None)
    expected = p_value(math.nextafter(value, math.inf), good)
    there = Threshold(value, expected, len(good))
    level = calibrate(model.map_peaks, min(expected, len(good) / (len(good) + 1))).value
    if value > max(good) > 0:
        level *= value / max(good)
    if value == model.threshold.value:
        there, level = model.threshold, model.pixel_threshold
    statement = there.statement if expected < 1 else "Every good part may be stopped: all good images lie above it."
    bound = there.bound if not there.tuned else None
    return Promise(threshold=value, expected=expected, bound=bound, statement=statement, map_level=finite(level))


def thumbnail(upload: Upload) -> bytes:
    """A small JPEG."""
    return images.encode(_shrunk(upload, SMALL), "JPEG", quality=80)


def _map(prediction: Prediction, model: Inspector, format: Literal["png", "npy"], longest: int) -> Map:
    """The map over the whole photograph, its longer side at most so many pixels; 0: as the photograph."""
    height, width = prediction.shape
    factor = min(1.0, longest / max(height, width)) if longest else 1.0
    shape = max(1, round(height * factor)), max(1, round(width * factor))
    values = model.preprocessing.restore(prediction.input_map, shape)
    low = min(model.heat_map_range[0], float(values.min()))
    high = max(model.heat_map_range[1], float(values.max()), low + 1e-9)
    buffer = io.BytesIO()
    if format == "npy":
        np.save(buffer, values.astype(np.float32))
    else:
        buffer.write(images.encode(np.rint((values - low) / (high - low) * DEPTH).astype(np.uint16)))
    return Map(format=format, low=low, high=high, height=shape[0], width=shape[1], data=_text(buffer.getvalue()))


def _pair(one: Evidence) -> Pair:
    there = None if one.match_crop is None else _jpeg(one.match_crop)
    near = one.nearest
    return Pair(region=one.region, image=near.image, distance=near.distance, here=_jpeg(one.query_crop), there=there)


def _shrunk(upload: Upload, side: int) -> npt.NDArray[np.uint8]:
    rgb, (height, width) = upload.read((side, side))
    factor = min(1.0, side / max(height, width))
    return images.resize(rgb, (max(1, round(height * factor)), max(1, round(width * factor))))


def _jpeg(rgb: npt.NDArray[np.uint8]) -> str:
    return _text(images.encode(rgb, "JPEG", quality=88))


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode()
