"""One self-contained HTML page that says what a run found, for people who build things."""

import base64
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from kizu.calibration.threshold import p_value
from kizu.data import files, image
from kizu.evaluation import loco_metrics
from kizu.evaluation.evaluate import CategoryResult, ImageScore, Picture
from kizu.evaluation.metrics import metric_plugins
from kizu.evaluation.pages.html import templates

__all__ = ["MAX_BYTES", "RunSummary", "render", "write"]

Scores = npt.NDArray[np.float64]  # (N,)

MAX_BYTES = 10_000_000
BINS = 48
SMALL_SIDE = 256  # pixels, when pictures have to shrink
PICTURE_KINDS = ("miss", "false alarm", "sample")  # in the order of the page; the last are the first to go
VERDICTS = ("stopped", "missed", "false alarm", "passed", "unreadable")


@dataclass(frozen=True)
class RunSummary:
    """What was run, on what and with what."""

    title: str
    method: str
    data: str
    backbone: str
    size: str
    settings: dict[str, str]
    machine: str
    versions: dict[str, str]
    command: str
    seed: int
    seconds: float  # the whole run
    remarks: Sequence[str] = ()  # on the data
    spelled: Callable[[str], str] = str  # a sentence, with the settings in it as its reader spells them


def render(summary: RunSummary, results: Sequence[CategoryResult]) -> str:
    """The page as HTML, smaller than `MAX_BYTES`.

    If it would be larger, pictures are made smaller and then left out, random samples first; the page says so.
    Raises `MissingExtra` without jinja2.
    """
    page = _page(summary, results, "")
    if _size(page) < MAX_BYTES:
        return page
    small = [replace(result, pictures=[_smaller(p) for p in result.pictures]) for result in results]
    page = _page(summary, small, "The pictures were made smaller to keep this file below 10 MB.")
    excess = _size(page) - MAX_BYTES
    if excess < 0:
        return page
    fewer, dropped = _drop(small, excess + 1000)
    names = ", ".join(f"{count} × {why}" for why, count in dropped.items())
    note = "The pictures were made smaller and some were left out to keep this file below 10 MB: "
    return _page(summary, fewer, f"{note}{names}.")


def write(path: str | os.PathLike[str], summary: RunSummary, results: Sequence[CategoryResult]) -> None:
    """Render to a file; an interrupted write leaves the old one, or none."""
    files.write_text(path, render(summary, results))


def _page(summary: RunSummary, results: Sequence[CategoryResult], note: str) -> str:
    environment = templates()
    filters = (_percent, _share, _ratio, _duration, _plural, _plain, _likely, _rarely)
    environment.filters.update({function.__name__.lstrip("_"): function for function in filters})
    sections = [_section(result) for result in results]
    page: str = environment.get_template("report.html.j2").render(
        summary=summary,
        sections=sections,
        total=Tally.of(chain.from_iterable(section.verdicts.values() for section in sections)),
        means={key: mean for key in _keys(results) if (mean := _mean(results, key)) is not None},
        limits=loco_metrics.LIMITS,
        plugin_metrics=list(metric_plugins()),
        palette=", ".join(f"rgb({r} {g} {b})" for r, g, b in image.heat(np.linspace(0, 1, 16, dtype="f4"), 0, 1)),
        note=note,
    )
    return page


@dataclass(frozen=True)
class Tally:
    """How many parts got which verdict, in the order of `VERDICTS`."""

    stopped: int
    missed: int
    false_alarms: int
    passed: int
    unreadable: int

    @classmethod
    def of(cls, verdicts: Iterable[str]) -> "Tally":
        counts = Counter(verdicts)
        return cls(*(counts[verdict] for verdict in VERDICTS))

    @property
    def defective(self) -> int:
        return self.stopped + self.missed

    @property
    def good(self) -> int:
        return self.false_alarms + self.passed

    @property
    def sentences(self) -> list[str]:
        """The verdict in plain words."""
        sentences = []
        if self.defective:
            sentences.append(f"Of {_plural(self.defective, 'defective part')} it stops {self.stopped:,}.")
        if self.good:
            noun = f"{self.good:,} good ones" if self.defective else _plural(self.good, "good part")
            sentences.append(f"Of {noun} it stops {self.false_alarms:,}.")
        return sentences or ["It has learned what good parts look like.", "It has not been tested yet."]


@dataclass(frozen=True)
class Panel:
    """The scores of one group of photographs: bars (left, width, height) in per cent of the panel."""

    name: str
    kind: str  # "good", "bad" or "held"
    count: int
    peak: int
    bars: list[tuple[float, float, float]]


@dataclass(frozen=True)
class Histogram:
    """Panels that share a score axis; positions in per cent of its length."""

    panels: list[Panel]
    threshold: float | None  # None: there is none
    ticks: list[tuple[float, str]]


@dataclass(frozen=True)
class Curve:
    """A line in the unit square and the point on it where the threshold works."""

    points: str  # as in an SVG polyline
    working_point: tuple[float, float] | None


@dataclass(frozen=True)
class DefectType:
    name: str
    tally: Tally
    auroc: float | None
    lowest: float


@dataclass(frozen=True)
class PictureRow:
    picture: Picture
    defect: str
    score: float | None
    verdict: str


@dataclass(frozen=True)
class Section:
    """One category as the template wants it."""

    result: CategoryResult
    verdicts: dict[str, str]  # image → verdict
    tally: Tally
    decimals: int
    histogram: Histogram | None
    roc: Curve | None
    precision_recall: Curve | None
    defect_types: list[DefectType]
    unavailable: dict[str, list[str]]  # reason → keys of metrics
    loco: dict[str, list[float | None]]  # kind of anomaly → image AUROC, map AUROC, AU-sPRO up to each limit
    loco_reasons: list[str]  # why some of them are None
    pictures: dict[str, list[PictureRow]]  # why → rows
    unreadable: list[ImageScore]
    p_values: dict[str, float]  # image → how often a good part looks so unusual, at most

    def score(self, value: float) -> str:
        """A score with as many decimals as tell it from the threshold."""
        return f"{value:.{self.decimals}f}"

    @property
    def has_threshold(self) -> bool:
        """Whether anything can be stopped: without good images to set it from, the threshold is infinite."""
        return math.isfinite(self.result.threshold)


def _section(result: CategoryResult) -> Section:
    verdicts = {row.image: _outcome(row, result) for row in result.scores}
    good, bad = _scores(result, good=True), _scores(result, good=False)
    roc, precision_recall = _curves(good, bad, result.threshold)
    names = sorted({row.defect for row in result.scores if row.defect != "good" and row.score is not None})
    unavailable: dict[str, list[str]] = {}
    loco_rows = {
        kind: _loco_keys(kind)
        for kind in (*loco_metrics.TYPES, "by_type")
        if loco_metrics.spro_key(0.05) in result.metrics
    }
    loco_keys = set(chain.from_iterable(loco_rows.values()))
    for key, value in result.metrics.items():
        if value is None and key not in loco_keys:
            unavailable.setdefault(result.reasons.get(key, "It was not computed."), []).append(key)
    return Section(
        result=result,
        verdicts=verdicts,
        tally=Tally.of(verdicts.values()),
        decimals=_decimals(result),
        histogram=_histogram(good, bad, np.array(result.calibration_scores, dtype=float), result.threshold),
        roc=roc,
        precision_recall=precision_recall,
        defect_types=[_defect_type(name, result, verdicts, good) for name in names],
        unavailable=unavailable,
        loco={kind: [result.metrics[key] for key in keys] for kind, keys in loco_rows.items()},
        loco_reasons=sorted({result.reasons[key] for key in loco_keys if result.metrics[key] is None}),
        pictures=_picture_rows(result, verdicts),
        p_values={
            row.image: p_value(row.score, result.calibration_scores)
            for row in result.scores
            if row.score is not None and result.calibration_scores
        },
        unreadable=[row for row in result.scores if row.score is None],
    )


def _loco_keys(kind: str) -> list[str]:
    """The metrics of one kind of anomaly, in the order of the columns."""
    return [f"{name}_{kind}" for name in loco_metrics.BY_TYPE] + [
        loco_metrics.spro_key(limit, kind) for limit in loco_metrics.LIMITS
    ]


def _outcome(row: ImageScore, result: CategoryResult) -> str:
    outcomes = {
        "error": ("unreadable",) * 2,
        "ask": ("not judged",) * 2,
        "stop": ("false alarm", "stopped"),
        "pass": ("passed", "missed"),
    }
    good, defective = outcomes[result.verdict(row)]
    return good if row.defect == "good" else defective


def _scores(result: CategoryResult, good: bool) -> Scores:
    rows = (row for row in result.scores if (row.defect == "good") == good)
    return np.array([row.score for row in rows if row.score is not None], dtype=float)


def _decimals(result: CategoryResult) -> int:
    """Four significant digits of the threshold, more where a score would look equal to it and is not."""
    threshold = result.threshold
    scores = [row.score for row in result.scores if row.score is not None]
    scale = abs(threshold) if math.isfinite(threshold) else max(map(abs, scores), default=0.0)
    fewest = int(np.clip(3 - math.floor(math.log10(scale or 1)), 0, 9))
    for decimals in range(fewest, fewest + 6):
        shown = f"{threshold:.{decimals}f}"
        if all(f"{score:.{decimals}f}" != shown for score in scores if score != threshold):
            return decimals
    return fewest + 6


def _defect_type(name: str, result: CategoryResult, verdicts: dict[str, str], good: Scores) -> DefectType:
    rows = [row for row in result.scores if row.defect == name]
    scores = np.array([row.score for row in rows if row.score is not None], dtype=float)
    return DefectType(
        name=name,
        tally=Tally.of(verdicts[row.image] for row in rows),
        auroc=_auroc(good, scores) if good.size else None,
        lowest=float(scores.min()),
    )


def _auroc(good: Scores, bad: Scores) -> float:
    """How often a score of `bad` is above one of `good`; a tie counts half."""
    good = np.sort(good)
    below = (np.searchsorted(good, bad, "left") + np.searchsorted(good, bad, "right")) / 2
    return float(below.mean() / good.size)


def _curves(good: Scores, bad: Scores, threshold: float) -> tuple[Curve | None, Curve | None]:
    """ROC and precision–recall, or nothing where a class is missing."""
    if not good.size or not bad.size:
        return None, None
    cuts = np.append(np.unique(np.concatenate([good, bad]))[::-1], threshold)
    alarms = good.size - np.searchsorted(np.sort(good), cuts)
    stopped = bad.size - np.searchsorted(np.sort(bad), cuts)
    alarm_rate, recall = alarms / good.size, stopped / bad.size
    precision = stopped / np.maximum(alarms + stopped, 1)
    working_point = float(alarm_rate[-1]), float(recall[-1]), float(precision[-1])
    roc = Curve(_points(np.append(0, alarm_rate[:-1]), np.append(0, recall[:-1])), working_point[:2])

    rises = np.flatnonzero(np.diff(stopped[:-1], prepend=0))
    steps = _points(np.append(0, np.repeat(recall[rises], 2)[:-1]), np.repeat(precision[rises], 2))
    return roc, Curve(steps, working_point[1:] if alarms[-1] + stopped[-1] else None)


def _points(x: Scores, y: Scores) -> str:
    return " ".join(dict.fromkeys(f"{a:.3f},{b:.3f}" for a, b in zip(x, y, strict=True)))


def _histogram(good: Scores, bad: Scores, held: Scores, threshold: float) -> Histogram | None:
    """Bins are counted from the threshold, so that no bar stands on both sides of it."""
    groups = [("Good", "good", good), ("Defective", "bad", bad), ("Good, that set the threshold", "held", held)]
    groups = [group for group in groups if group[2].size]
    if not groups:
        return None
    everything = np.concatenate([group[2] for group in groups])
    low, high = float(everything.min()), float(everything.max())
    origin = threshold if math.isfinite(threshold) else low
    low, high = min(low, origin), max(high, origin)
    span = (high - low) or abs(origin) or 1.0
    if origin == threshold:
        low, high = min(low, origin - 0.2 * span), max(high, origin + 0.2 * span)
    width = span / BINS
    first, last = (math.floor((end - origin) / width) for end in (low, high))
    bins = last - first + 1
    panels = []
    for name, kind, scores in groups:
        counts = np.bincount(np.floor((scores - origin) / width).astype(int) - first, minlength=bins)
        peak = int(counts.max())
        bars = [(100 * int(i) / bins, 100 / bins, 100 * int(counts[i]) / peak) for i in np.flatnonzero(counts)]
        panels.append(Panel(name, kind, scores.size, peak, bars))
    left = origin + first * width
    place = 100 * -first / bins if origin == threshold else None
    return Histogram(panels, place, _ticks(left, left + bins * width))


def _ticks(left: float, right: float) -> list[tuple[float, str]]:
    """Round numbers between two ends, each with its position in per cent."""
    rough = (right - left) / 5
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next((factor * magnitude for factor in (1, 2, 5) if factor * magnitude >= rough), 10 * magnitude)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    values = (i * step for i in range(math.ceil(left / step), math.floor(right / step) + 1))
    return [(100 * (value - left) / (right - left), f"{value:.{decimals}f}") for value in values]


def _ordered(result: CategoryResult) -> list[Picture]:
    """Pictures by kind, the worst first; samples as they come."""
    scores = {row.image: row.score or 0.0 for row in result.scores}
    sign = {"miss": 1, "false alarm": -1, "sample": 0}
    order = PICTURE_KINDS.index
    return sorted(result.pictures, key=lambda p: (order(p.why), sign[p.why] * scores.get(p.image, 0.0)))


def _picture_rows(result: CategoryResult, verdicts: dict[str, str]) -> dict[str, list[PictureRow]]:
    by_image = {row.image: row for row in result.scores}
    rows: dict[str, list[PictureRow]] = {}
    for picture in _ordered(result):
        row = by_image.get(picture.image, ImageScore(picture.image, "unknown", None))
        verdict = verdicts.get(picture.image, "not judged")
        rows.setdefault(picture.why, []).append(PictureRow(picture, row.defect, row.score, verdict))
    return rows


def _drop(results: Sequence[CategoryResult], excess: int) -> tuple[list[CategoryResult], Counter[str]]:
    """Leave out pictures of at least `excess` bytes; of each kind the last in every category go first."""
    kept = [_ordered(result) for result in results]
    dropped: Counter[str] = Counter()
    for why in reversed(PICTURE_KINDS):
        while excess > 0 and (longest := max(kept, key=lambda row: sum(p.why == why for p in row), default=[])):
            last = max((i for i, picture in enumerate(longest) if picture.why == why), default=None)
            if last is None:
                break
            picture = longest.pop(last)
            excess -= len(picture.photo) + len(picture.heat) + len(picture.overlay)
            excess -= sum(len(pair.query) + len(pair.match) for pair in picture.pairs)
            dropped[why] += 1
    return [replace(result, pictures=pictures) for result, pictures in zip(results, kept, strict=True)], dropped


def _smaller(picture: Picture) -> Picture:
    parts: dict[str, Any] = {}
    for part in ("photo", "heat", "overlay"):
        uri = getattr(picture, part)
        rgb = image.read(base64.b64decode(uri.partition(",")[2]))
        factor = min(1.0, SMALL_SIDE / max(rgb.shape[:2]))
        size = (max(1, round(rgb.shape[0] * factor)), max(1, round(rgb.shape[1] * factor)))
        jpeg = image.encode(image.resize(rgb, size), "JPEG", quality=70)
        parts[part] = min(uri, f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}", key=len)
    return replace(picture, **parts)


def _keys(results: Sequence[CategoryResult]) -> list[str]:
    return list(dict.fromkeys(chain.from_iterable(result.metrics for result in results)))


def _mean(results: Sequence[CategoryResult], key: str) -> float | None:
    values = [value for result in results if (value := result.metrics.get(key)) is not None]
    return sum(values) / len(values) if values else None


def _size(page: str) -> int:
    return len(page.encode(errors="surrogateescape"))


def _percent(fraction: float) -> str:
    """For people: 98.7 %, and never 100 % or 0 % of what is not."""
    if 0 < fraction < 0.001:
        return "<\u00a00.1\u00a0%"
    if 0.999 < fraction < 1:
        return ">\u00a099.9\u00a0%"
    return f"{fraction * 100:.1f}".removesuffix(".0") + "\u00a0%"


def _share(count: int, total: int) -> str:
    return f"{count:,} of {total:,}" if total else "–"


def _ratio(value: float | None) -> str:
    """A measure between 0 and 1; a dash where there is none."""
    if value is None:
        return "–"
    return ">\u00a00.999" if 0.9995 <= value < 1 - 1e-9 else f"{value:.3f}"


def _rarely(p: float) -> str:
    """A p-value for people."""
    how_many = f"{100 * p:.0f}\u00a0% of" if p >= 0.1 else f"1 in {int(1 / p + 1e-9):,}"
    return f"at most {how_many} good parts score as high"


def _duration(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _plain(name: str) -> str:
    """A folder's name as words: metal_nut → Metal nut."""
    words = name.replace("_", " ").strip() or name
    return words[:1].upper() + words[1:]


def _likely(hits: int, total: int) -> str:
    """Where the true rate lies with 95 % confidence, by Wilson's interval, given `hits` of `total`."""
    z = 1.96
    rate, spread = hits / total, z * z / total
    middle = (rate + spread / 2) / (1 + spread)
    reach = z * math.sqrt(rate * (1 - rate) / total + spread / total / 4) / (1 + spread)
    if hits == 0:
        return f"at most {_percent(middle + reach)}"
    if hits == total:
        return f"at least {_percent(middle - reach)}"
    return f"between {_percent(middle - reach)} and {_percent(middle + reach)}"
