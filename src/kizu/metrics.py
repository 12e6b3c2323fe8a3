"""How well scores and maps tell defects from good parts. Scores: higher is more anomalous; labels: True is defective.

All of these need labels: they are reports and never decide anything about a detector.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from sklearn import metrics as sklearn_metrics

__all__ = ["IMAGE", "PIXEL", "au_pro", "image_metrics", "pixel_metrics", "presorted_bad", "presorted_good", "ranking"]

IMAGE = ("image_auroc", "image_ap", "image_f1max", "pg2", "pb2")
PIXEL = ("pixel_auroc", "pixel_ap", "pixel_f1max", "au_pro")

Floats = npt.NDArray[np.floating[Any]]
Bools = npt.NDArray[np.bool_]
Values = dict[str, float | None]  # metric → value, or None where it is not defined
Reasons = dict[str, str]  # metric → why it is None

EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=int)


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


def pixel_metrics(maps: Sequence[Floats], masks: Sequence[Bools]) -> tuple[Values, Reasons]:
    """The metrics of `PIXEL`, for maps (H, W) and masks of the same shapes; good images have masks without a True."""
    if not any(mask.any() for mask in masks):
        reason = "there are no ground-truth masks of defects" if masks else "there are no test images with known masks"
        return dict.fromkeys(PIXEL), dict.fromkeys(PIXEL, reason)
    if all(mask.all() for mask in masks):
        return dict.fromkeys(PIXEL), dict.fromkeys(PIXEL, "the masks leave no good pixel")
    y = np.concatenate([mask.ravel() for mask in masks])
    s = np.concatenate([values.ravel() for values in maps])
    return dict(zip(PIXEL, (*ranking(s, y), au_pro(maps, masks)), strict=True)), {}


def ranking(scores: Floats, labels: Bools) -> tuple[float, float, float]:
    """AUROC, average precision (step sum) and maximal F1, from one sort. Both classes must be there."""
    false_rate, true_rate, _ = sklearn_metrics.roc_curve(labels, scores, drop_intermediate=False)
    positives = int(labels.sum())
    hits, alarms = true_rate * positives, false_rate * (len(labels) - positives)
    precision = hits[1:] / (hits[1:] + alarms[1:])
    average_precision = float(np.sum(np.diff(true_rate) * precision))
    f1 = 2 * hits / (positives + hits + alarms)
    return float(sklearn_metrics.auc(false_rate, true_rate)), average_precision, float(f1.max())


def au_pro(maps: Sequence[Floats], masks: Sequence[Bools], limit: float = 0.3) -> float:
    """Area under the per-region-overlap curve up to a false-positive rate of `limit`, divided by `limit`.

    As MVTec defines it (Bergmann et al., IJCV 2021): regions are 8-connected; the rate counts all good pixels of all
    images; points between thresholds are interpolated. Exact: every distinct score is a threshold. Only the pixels
    above the score at which the rate reaches the limit are sorted.
    """
    regions = list(_region_pixels(maps, masks))
    good = np.concatenate([values[~mask] for values, mask in zip(maps, masks, strict=True)])
    rank = max(1, int(np.ceil(limit * len(good) - 1e-9)))
    cut = np.partition(good, len(good) - rank)[len(good) - rank]
    alarms = good[good >= cut]
    hits = np.concatenate([scores for scores, _ in regions])
    shares = np.concatenate([np.full(len(scores), share) for scores, share in regions]) / len(regions)
    kept = hits >= cut
    scores = np.concatenate([alarms, hits[kept]])
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))  # the last pixel of each tied score
    is_good = order < len(alarms)
    overlap = np.concatenate([np.zeros(len(alarms)), shares[kept]])[order]
    x = np.append(0.0, np.cumsum(is_good)[ends] / len(good))
    y = np.append(0.0, np.cumsum(overlap)[ends])
    return _area(x, y, limit) / limit


def presorted_good(good: Floats, bad: Floats, missed: float = 0.02) -> float:
    """PG2: the share of good images below the level that lets 2 % of the defective ones pass (Baitieva et al. 2025)."""
    return float(np.mean(good < np.quantile(bad, missed)))


def presorted_bad(good: Floats, bad: Floats, false_alarms: float = 0.02) -> float:
    """PB2: the share of defective images above the level that stops 2 % of the good ones (Baitieva et al., 2025)."""
    return float(np.mean(bad > np.quantile(good, 1 - false_alarms)))


def _region_pixels(maps: Sequence[Floats], masks: Sequence[Bools]) -> Iterator[tuple[Floats, float]]:
    """For each connected defect region: its scores and 1 / its size."""
    for values, mask in zip(maps, masks, strict=True):
        labels, _ = ndimage.label(mask, structure=EIGHT_NEIGHBOURS)
        for label, box in enumerate(ndimage.find_objects(labels), start=1):
            scores = values[box][labels[box] == label]
            yield scores, 1 / len(scores)


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
