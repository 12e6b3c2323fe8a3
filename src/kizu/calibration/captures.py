"""How good photographs are taken, and which ones are taken otherwise, so that no promise covers them.

A promise is of new parts that are photographed like those that set the threshold. Whether one is, a few statistics of
the network's input say: how bright, contrasty, sharp and colourful it is, where its content lies, and how much it looks
like a good photograph as a whole. The range of each is that of good photographs with a wide margin, so that hardly any
other good one is refused, and defects, which are small, change none of them enough.
"""

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
from PIL import Image

from kizu.data import image
from kizu.errors import BadImage

__all__ = ["Capture", "Captures", "kind_of"]

Gray = npt.NDArray[np.float32]  # (h, w)
Range = tuple[float, float]

VIEW, MAX_VIEWS = 32, 48  # pixels a side of a small good photograph, and how many of them are kept
LEAST, FACTOR, FEW = 5.0, 1.5, 20.0  # deviations that a range spans, at least; of the farthest good one; more of few
MOST = 4 * MAX_VIEWS  # of models that were merged or learned more
WIDENED = 0.1  # of a range, beyond what it is widened for
DARK, LIGHT = 5, 250  # grey levels up to which, and from which, a pixel is clipped
ANYWHERE = 0.07  # of the side: where good photographs are moved by more, it says nothing that one is
ONE_PART = 0.92  # likeness of good photographs of a part; others are of textures, which lie nowhere
ALIKE = 0.6  # of the usual likeness: what is less alike may show something else, and not only a large defect


class _Statistic(NamedTuple):
    """What is looked at: the smallest deviation that is taken for usual, and the reasons below and above the range."""

    deviation: float
    below: str
    above: str


BLURRED, SHARP, COLOURS, MOVED = (
    "it is out of focus or blurred",
    "it is sharper or noisier",
    "it has other colours",
    "the camera or the part has moved",
)
STATISTICS = {
    "proportions": _Statistic(0.01, "it is narrower", "it is wider"),
    "resolution": _Statistic(0.1, "it has fewer pixels", "it has more pixels"),
    "down": _Statistic(0.01, MOVED, MOVED),
    "right": _Statistic(0.01, MOVED, MOVED),
    "likeness": _Statistic(0.02, "it shows something else", ""),
    "brightness": _Statistic(4.0, "it is too dark", "it is too bright"),
    "contrast": _Statistic(0.06, "it has too little contrast", "it has too much contrast"),
    "fine detail": _Statistic(0.12, BLURRED, SHARP),
    "coarse detail": _Statistic(0.1, BLURRED, SHARP),
    "red": _Statistic(2.0, COLOURS, COLOURS),
    "blue": _Statistic(2.0, COLOURS, COLOURS),
    "colourfulness": _Statistic(2.0, COLOURS, COLOURS),
    "light": _Statistic(0.5, "", "it is lit otherwise"),
    "tint": _Statistic(0.5, "", COLOURS),
    "black": _Statistic(0.006, "it is overexposed", "it is underexposed"),
    "white": _Statistic(0.006, "it is underexposed", "it is overexposed"),
}


TOGETHER = {  # statistics by which the most similar good photograph is looked for
    "light": ("brightness", "contrast", "black", "white"),
    "tint": ("red", "blue", "colourfulness"),
}
WIDER = {"light": 1.4, "tint": 1.2}  # a distance in several statistics at once is large more often


class Capture(NamedTuple):
    """How one photograph was taken: its statistics, and a small, grey view of it."""

    statistics: dict[str, float]
    view: npt.NDArray[np.uint8]  # (VIEW, VIEW)

    @classmethod
    def of(cls, pixels: npt.NDArray[np.uint8], shape: tuple[int, int]) -> Self:
        """Of a photograph as the network sees it (3, h, w), with its own (height, width)."""
        return cls(_statistics(pixels, shape), _view(pixels))


@dataclass(frozen=True, eq=False)
class Captures:
    """What photographs of good parts have in common, whatever they show of the part."""

    ranges: Mapping[str, Range]  # lowest and highest value of each statistic
    views: npt.NDArray[np.uint8]  # (N, VIEW, VIEW): small, grey good photographs
    lights: npt.NDArray[np.float64]  # (N, 7): the statistics of these that are looked at together

    @classmethod
    def learned(cls, captures: Iterable[Capture]) -> Self:
        """From how good photographs were taken."""
        rows, views = [], []
        for statistics, view in captures:
            rows.append(dict(statistics))
            views.append(view)
        chosen = _spread(len(views))
        kept, lights = np.stack([views[n] for n in chosen]), np.array([_light(rows[n]) for n in chosen])
        places = {int(number): place for place, number in enumerate(chosen)}
        for number, (row, view) in enumerate(zip(rows, views, strict=True)):
            others = np.arange(len(kept)) != places.get(number, -1) if len(kept) > 1 else np.array([True])
            row |= _content(view, kept[others]) | _farther(row, lights[others])
        ranges = {name: _range(name, np.array([row[name] for row in rows])) for name in STATISTICS}
        if np.median([row["likeness"] for row in rows]) < ONE_PART:
            ranges |= {"down": (-math.inf, math.inf), "right": (-math.inf, math.inf)}
        return cls(ranges, kept, lights)

    def reason(self, pixels: npt.NDArray[np.uint8], shape: tuple[int, int]) -> str:
        """Why no promise covers a photograph (3, h, w) that was of `shape`; empty where one does."""
        return self._reason(self._values(Capture.of(pixels, shape)))

    def _values(self, capture: Capture) -> dict[str, float]:
        """All statistics of a photograph by their names, also those that compare it with the good ones."""
        values = capture.statistics | _content(capture.view, self.views)
        return values | _farther(values, self.lights)

    def _reason(self, values: Mapping[str, float]) -> str:
        for name, statistic in STATISTICS.items():
            low, high = self.ranges[name]
            if low <= values[name] <= high:
                continue
            if name in ("down", "right") and values["likeness when moved"] < (1 + self.ranges["likeness"][0]) / 2:
                continue  # it shows something else
            why = statistic.below if values[name] < low else statistic.above
            return f"{why} ({name} {_shown(name, values[name])}, of good photographs {_between(name, low, high)})"
        return ""

    def widened(self, captures: Iterable[Capture]) -> "Captures":
        """What covers these good photographs too, each end by no more than it takes and a little."""
        ranges, views, lights = dict(self.ranges), [], []
        for capture in captures:
            values = self._values(capture)
            for name, (low, high) in ranges.items():
                more = WIDENED * (high - low) if math.isfinite(high - low) else WIDENED * abs(values[name])
                if values[name] < low:
                    ranges[name] = values[name] - more, high
                elif values[name] > high:
                    ranges[name] = low, values[name] + more
            if self._reason(values):
                views.append(capture.view)
                lights.append(_light(values))
        if not views:
            return Captures(ranges, self.views, self.lights)
        return Captures(
            ranges, np.concatenate([self.views, views])[:MOST], np.concatenate([self.lights, lights])[:MOST]
        )

    @classmethod
    def joined(cls, parts: "Sequence[Captures]") -> "Captures":
        """What covers whatever one of these covers."""
        ranges = {
            name: (min(part.ranges[name][0] for part in parts), max(part.ranges[name][1] for part in parts))
            for name in STATISTICS
        }
        views, lights = (np.concatenate([getattr(part, name) for part in parts]) for name in ("views", "lights"))
        chosen = _spread(len(views), MOST)
        return cls(ranges, views[chosen], lights[chosen])

    def to_json(self) -> dict[str, Any]:
        """For a model's JSON: the ranges, and all views in one picture."""
        picture = image.encode(np.repeat(self.views.reshape(-1, VIEW, 1), 3, axis=2))
        return {
            "ranges": {name: [None if math.isinf(end) else end for end in ends] for name, ends in self.ranges.items()},
            "views": base64.b64encode(picture).decode(),
            "lights": self.lights.tolist(),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """What `to_json` gave. Raises `ValueError` for anything else."""
        ranges = {
            name: (-math.inf if low is None else low, math.inf if high is None else high)
            for name, (low, high) in values["ranges"].items()
        }
        views, lights = _views_in(values["views"]), np.array(values["lights"], np.float64)
        if any(low > high for low, high in ranges.values()):
            raise ValueError("a range of good photographs ends before it begins")
        if ranges.keys() != STATISTICS.keys() or lights.shape != (len(views), sum(map(len, TOGETHER.values()))):
            raise ValueError("what is known of good photographs is not complete")
        return cls(ranges, views, lights)


def kind_of(reason: str) -> str:
    """Why a photograph cannot be judged, without the figures: "it is too dark"."""
    return reason.split(" (")[0]


def _views_in(text: str) -> npt.NDArray[np.uint8]:
    """The small photographs (N, VIEW, VIEW) in a model's JSON. Raises `ValueError` for anything else."""
    try:
        picture = image.read(base64.b64decode(text, validate=True))
    except BadImage as error:
        raise ValueError(f"the picture of good photographs {error.reason}") from None
    height, width = picture.shape[:2]
    if width != VIEW or height % VIEW or height > VIEW * MOST:
        raise ValueError(f"the picture of good photographs is {width}×{height} pixels large")
    return picture[..., 0].reshape(-1, VIEW, VIEW)


def _spread(count: int, most: int = MAX_VIEWS) -> npt.NDArray[np.int64]:
    """At most so many of `count` numbers, spread evenly over all."""
    return np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(np.int64))


def _range(name: str, values: npt.NDArray[np.float64]) -> Range:
    """The values that are as usual as those of good photographs, with a margin."""
    middle = float(np.median(values))
    around = np.abs(values - middle)
    deviation = max(1.4826 * float(np.median(around)), float(values.std()), STATISTICS[name].deviation)
    wider = WIDER.get(name, 1.0)
    margin = wider * max((LEAST + FEW / len(values)) * deviation, FACTOR * float(around.max()))
    if name in ("down", "right") and around.max() > ANYWHERE:
        return -math.inf, math.inf
    if name in TOGETHER:
        return -math.inf, middle + margin
    if name == "likeness":
        return min(middle - margin, ALIKE * middle), math.inf
    return middle - margin, middle + margin


def _statistics(pixels: npt.NDArray[np.uint8], shape: tuple[int, int]) -> dict[str, float]:
    """Those of STATISTICS but what the content says."""
    means = pixels.mean((1, 2))
    lowest, highest = pixels.min(0), pixels.max(0)
    gray = np.asarray(_gray(pixels), np.float32)
    half = _halved(gray)
    detail = [_detail(gray), _detail(half), _detail(_halved(half))]
    return {
        "proportions": math.log(shape[1] / shape[0]),
        "resolution": math.log(shape[0] * shape[1]) / 2,
        "black": float((highest <= DARK).mean()),
        "white": float((lowest >= LIGHT).mean()),
        "brightness": float(gray.mean()),
        "contrast": math.log1p(float(gray.std())),
        "fine detail": detail[0] - detail[1],
        "coarse detail": detail[1] - detail[2],
        "red": float(means[0] - means[1]),
        "blue": float(means[2] - means[1]),
        "colourfulness": float((highest - lowest).mean()),
    }


def _light(values: Mapping[str, float]) -> list[float]:
    """The statistics that are looked at together, each in its smallest deviations."""
    return [values[name] / STATISTICS[name].deviation for names in TOGETHER.values() for name in names]


def _farther(values: Mapping[str, float], lights: npt.NDArray[np.float64]) -> dict[str, float]:
    """The distances to the good photograph that is lit most alike, and to the one that is coloured most alike."""
    squares, distances, start = (lights - np.array(_light(values))) ** 2, {}, 0
    for name, names in TOGETHER.items():
        distances[name] = math.sqrt(float(squares[:, start : start + len(names)].sum(1).min()))
        start += len(names)
    return distances


def _content(view: npt.NDArray[np.uint8], others: npt.NDArray[np.uint8]) -> dict[str, float]:
    """How much a small photograph looks like the most similar of others, where it lies, and how alike it is there."""
    standard = _standardised(view[None])[0]
    every = _standardised(others)
    correlation = np.fft.ifft2(np.fft.fft2(standard) * np.conj(np.fft.fft2(every.mean(0))))
    down, right = np.unravel_index(int(correlation.real.argmax()), correlation.shape)
    moved = np.roll(standard, (-int(down), -int(right)), (0, 1))
    half = VIEW // 2
    return {
        "likeness": float((every * standard).sum((1, 2)).max()),
        "likeness when moved": float((every * moved).sum((1, 2)).max()),
        "down": ((int(down) + half) % VIEW - half) / VIEW,
        "right": ((int(right) + half) % VIEW - half) / VIEW,
    }


def _standardised(views: npt.NDArray[np.uint8]) -> Gray:
    centred = views - views.mean((1, 2), keepdims=True, dtype=np.float32)
    norms = np.sqrt((centred**2).sum((1, 2), keepdims=True))
    return np.asarray(centred / np.maximum(norms, 1e-6), np.float32)


def _view(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    return np.asarray(_gray(pixels).resize((VIEW, VIEW), Image.Resampling.BOX))


def _gray(pixels: npt.NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).convert("L")


def _halved(gray: Gray) -> Gray:
    height, width = gray.shape[0] // 2, gray.shape[1] // 2
    return np.asarray(gray[: 2 * height, : 2 * width].reshape(height, 2, width, 2).mean((1, 3)), np.float32)


def _detail(gray: Gray) -> float:
    """The logarithm of the mean square of the Laplacian."""
    around = gray[:-2, 1:-1] + gray[2:, 1:-1] + gray[1:-1, :-2] + gray[1:-1, 2:]
    return math.log(float(np.square(4 * gray[1:-1, 1:-1] - around).mean()) + 0.5)


def _between(name: str, low: float, high: float) -> str:
    if low == -math.inf:
        return f"at most {_shown(name, high)}"
    return f"at least {_shown(name, low)}" if high == math.inf else f"{_shown(name, low)} to {_shown(name, high)}"


def _shown(name: str, value: float) -> str:
    """As a person reads it."""
    if name in ("black", "white", "down", "right"):
        return f"{100 * value:.1f} %"
    if name == "resolution":
        return f"{math.exp(value):,.0f}"
    if name in ("proportions", "contrast", "fine detail", "coarse detail"):
        return f"{math.exp(value):.3g}"
    return f"{value:.3g}"
