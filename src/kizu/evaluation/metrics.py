"""How well scores and maps tell defects from good parts. Scores: higher is more anomalous; labels: True is defective.

All of these need labels: they are reports and never decide anything about a detector.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from sklearn import metrics as sklearn_metrics

from kizu.config.plugins import load, plugins
from kizu.data.masks import Region
from kizu.errors import KizuError, OptionError

__all__ = ["IMAGE", "PIXEL", "Reasons", "Values", "au_pro", "au_spro", "image_metrics", "metric_plugins"]
__all__ += ["pixel_metrics", "plugin_metrics", "presorted_bad", "presorted_good", "ranking"]

IMAGE = ("image_auroc", "image_ap", "image_f1max", "pg2", "pb2")
PIXEL = ("pixel_auroc", "pixel_ap", "pixel_f1max", "au_pro")

Floats = npt.NDArray[np.floating[Any]]
Counts = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Values = dict[str, float | None]  # metric → value, or None where it is not defined
Reasons = dict[str, str]  # metric → why it is None

EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=int)
MIN_SORTED = 1 << 24  # good pixels that are sorted at once, at least


def image_metrics(scores: Sequence[float], labels: Sequence[bool]) -> tuple[Values, Reasons]:
    """The metrics of `IMAGE`. Without good or without defective images they are None, with the reason."""
    y, s = np.asarray(labels, dtype=bool), np.asarray(scores, dtype=np.float64)
    if y.all() or not y.any():
        reason = (
            "there are no test images"
            if len(y) == 0
            else f"there are no {'good' if y.all() else 'defective'} test images"
        )
        return dict.fromkeys(IMAGE), dict.fromkeys(IMAGE, reason)
    good, bad = s[~y], s[y]
    values = (*ranking(s, y), presorted_good(good, bad), presorted_bad(good, bad))
    return dict(zip(IMAGE, values, strict=True)), {}


def pixel_metrics(maps: Iterable[Floats], masks: Iterable[Bools]) -> tuple[Values, Reasons]:
    """The metrics of `PIXEL`, for maps (H, W) and masks of the same shapes; good images have masks without a True.

    Exact. Both are gone through twice and may make their items anew each time: memory grows with the defects' pixels.
    """
    curve = _region_curve(maps, masks)
    if isinstance(curve, str):
        return dict.fromkeys(PIXEL), dict.fromkeys(PIXEL, curve)
    values = (curve.auroc(), curve.average_precision(), curve.f1_max(), curve.area(0.3))
    return dict(zip(PIXEL, values, strict=True)), {}


def metric_plugins() -> dict[str, EntryPoint]:
    """The metrics that other packages bring, by the names of their columns."""
    return {name: plugin for name, plugin in plugins("kizu.metrics").items() if name not in (*IMAGE, *PIXEL)}


def plugin_metrics(scores: Sequence[float], labels: Sequence[bool]) -> tuple[Values, Reasons]:
    """What these metrics give. One that fails is None, with the reason."""
    values: Values = {}
    reasons: Reasons = {}
    for name, plugin in metric_plugins().items():
        try:
            values[name] = _plugin_value(plugin, scores, labels)
        except KizuError as error:
            values[name], reasons[name] = None, str(error)
    return values, reasons


def _plugin_value(plugin: EntryPoint, scores: Sequence[float], labels: Sequence[bool]) -> float:
    function = load(plugin)
    try:
        value = float(function(np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=bool)))
    except Exception as error:  # somebody else's code raises anything
        raise OptionError(f"{plugin.value} fails ({type(error).__name__}: {error})") from None
    if not np.isfinite(value):
        raise OptionError(f"{plugin.value} gives {value}")
    return value


def ranking(scores: Floats, labels: Bools) -> tuple[float, float, float]:
    """AUROC, average precision (step sum) and maximal F1, from one sort. Both classes must be there."""
    false_rate, true_rate, _ = sklearn_metrics.roc_curve(labels, scores, drop_intermediate=False)
    positives = int(labels.sum())
    hits, alarms = true_rate * positives, false_rate * (len(labels) - positives)
    precision = hits[1:] / (hits[1:] + alarms[1:])
    average_precision = float(np.sum(np.diff(true_rate) * precision))
    f1 = 2 * hits / (positives + hits + alarms)
    return float(sklearn_metrics.auc(false_rate, true_rate)), average_precision, float(f1.max())


def au_pro(maps: Iterable[Floats], masks: Iterable[Bools], limit: float = 0.3) -> float:
    """Area under the per-region-overlap curve up to a false-positive rate of `limit`, divided by `limit`.

    As MVTec defines it (Bergmann et al., IJCV 2021): regions are 8-connected; the rate counts all good pixels of all
    images; points between thresholds are interpolated. Exact: every distinct score is a threshold.
    """
    curve = _region_curve(maps, masks)
    if isinstance(curve, str):
        raise ValueError(curve)
    return curve.area(limit)


def au_spro(
    images: Callable[[], Iterable[tuple[Floats, Sequence[Region]]]], limits: Sequence[float]
) -> tuple[list[float] | None, str]:
    """For each limit, the area under the saturated per-region-overlap curve up to it, divided by it; or why not.

    As MVTec LOCO defines it (Bergmann et al., IJCV 2022): of a region with saturation s, min(hits / s, 1) is
    found; the rate counts the pixels of all images that lie in no region. That minimum is the share found of the s
    highest scores of the region, whatever the threshold, so that only these matter. Exact: every distinct score is a
    threshold. `images` is called twice for maps (H, W) with the regions in them.
    """
    hits, shares = [], []
    for values, regions in images():
        for region in regions:
            scores = values[region.pixels]
            hits.append(np.partition(scores, len(scores) - region.saturation)[len(scores) - region.saturation :])
            shares.append(np.full(region.saturation, 1 / region.saturation))
    if not hits:
        return None, "no masks show where the defects are, which only these figures need"
    curve = _curve(hits, shares, len(hits), (_outside(values, regions) for values, regions in images()))
    return (None, curve) if isinstance(curve, str) else ([curve.area(limit) for limit in limits], "")


def presorted_good(good: Floats, bad: Floats, missed: float = 0.02) -> float:
    """PG2 (Baitieva et al., 2025): the share of good images that pass while 2 % of the defective ones are missed."""
    return float(np.mean(good < np.quantile(bad, missed)))


def presorted_bad(good: Floats, bad: Floats, false_alarms: float = 0.02) -> float:
    """PB2 (Baitieva et al., 2025): the share of defective images that are stopped while 2 % of the good ones are."""
    return float(np.mean(bad > np.quantile(good, 1 - false_alarms)))


@dataclass(frozen=True)
class _Curve:
    """What passes when the threshold is one of the distinct scores of defect pixels, from the highest down.

    The thresholds between them, scores of good pixels only, add nothing to any of the areas but straight lines.
    """

    hits: Counts  # (L,) defect pixels at or above
    overlap: Floats  # (L,) the regions' mean share at or above
    alarms_above: Counts  # (L,) good pixels above
    alarms: Counts  # (L,) good pixels at or above
    good: int  # all good pixels

    def auroc(self) -> float:
        passed = np.diff(self.hits, prepend=0) @ (self.good - (self.alarms_above + self.alarms) / 2)
        return float(passed / (self.hits[-1] * self.good))

    def average_precision(self) -> float:
        return float(np.diff(self.hits, prepend=0) @ (self.hits / (self.hits + self.alarms)) / self.hits[-1])

    def f1_max(self) -> float:
        return float((2 * self.hits / (self.hits[-1] + self.hits + self.alarms)).max())

    def area(self, limit: float) -> float:
        """Under overlap against false-positive rate, up to `limit`, divided by it."""
        x = np.stack([self.alarms_above, self.alarms], axis=1).ravel() / self.good
        y = np.repeat(np.append(0.0, self.overlap), 2)[1:-1]
        return _area(np.append(np.append(0.0, x), 1.0), np.append(np.append(0.0, y), 1.0), limit) / limit


def _region_curve(maps: Iterable[Floats], masks: Iterable[Bools]) -> _Curve | str:
    """With connected regions, each pixel a share of 1 / area; or why there is none."""
    hits, shares, regions, images = [], [], 0, 0
    for values, mask in zip(maps, masks, strict=True):
        images += 1
        if mask.any():
            labels, count = ndimage.label(mask, structure=EIGHT_NEIGHBOURS)
            region_numbers = labels[mask]
            hits.append(values[mask])
            shares.append(1 / np.bincount(region_numbers)[region_numbers])
            regions += count
    if not regions:
        return (
            "no masks show where the defects are, which only these figures need"
            if images
            else "there are no test images with known masks"
        )
    return _curve(hits, shares, regions, (values[~mask] for values, mask in zip(maps, masks, strict=True)))


def _curve(hits: Sequence[Floats], shares: Sequence[Floats], regions: int, good: Iterable[Floats]) -> _Curve | str:
    thresholds, places = np.unique(np.concatenate(hits), return_inverse=True)  # ascending
    counts = np.bincount(places)[::-1]
    rises = np.bincount(places, weights=np.concatenate(shares))[::-1] / regions
    below, equal, total = np.zeros(len(thresholds), dtype=np.int64), np.zeros(len(thresholds), dtype=np.int64), 0
    for scores in _gathered(good, max(len(thresholds), MIN_SORTED)):
        scores.sort()
        first = np.asarray(np.searchsorted(scores, thresholds))
        below += first
        tied = np.flatnonzero(scores.take(first, mode="clip") == thresholds)
        equal[tied] += np.searchsorted(scores, thresholds[tied], side="right") - first[tied]
        total += len(scores)
    if total == 0:
        return "the masks leave no good pixel"
    alarms = total - below[::-1]
    return _Curve(np.cumsum(counts), np.cumsum(rises), alarms - equal[::-1], alarms, total)


def _gathered(arrays: Iterable[Floats], least: int) -> Iterator[Floats]:
    """The same numbers in new arrays of at least `least` of them; the last may be shorter."""
    waiting: list[Floats] = []
    for array in arrays:
        waiting.append(array)
        if sum(map(len, waiting)) >= least:
            yield np.concatenate(waiting)
            waiting = []
    if any(map(len, waiting)):
        yield np.concatenate(waiting)


def _outside(values: Floats, regions: Sequence[Region]) -> Floats:
    """The scores of the pixels in no region."""
    inside = np.zeros(values.shape, dtype=np.bool_)
    for region in regions:
        inside |= region.pixels
    return values[~inside]


def _area(x: Floats, y: Floats, limit: float) -> float:
    """Of the polyline (x, y), x ascending from 0, up to x = limit, by trapezoids."""
    inside = int(np.searchsorted(x, limit, side="right"))
    if inside < len(x) and x[inside - 1] < limit:
        slope = (y[inside] - y[inside - 1]) / (x[inside] - x[inside - 1])
        x = np.append(x[:inside], limit)
        y = np.append(y[:inside], y[inside - 1] + slope * (limit - x[inside - 1]))
    else:
        x, y = x[:inside], y[:inside]
    return float(np.trapezoid(y, x))
