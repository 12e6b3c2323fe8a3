"""A test set as the published tables report it: with our arithmetic, or with that of the published codes."""

import csv
import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from kizu.data import files, image
from kizu.data.dataset import Sample
from kizu.data.masks import read_mask_values
from kizu.data.progress import Progress, silent
from kizu.detectors.base import Detector
from kizu.detectors.patchcore.graph import EnsembleGraph
from kizu.errors import BadImage
from kizu.evaluation import metrics
from kizu.evaluation.evaluate import measure
from kizu.inference.inspector import Inspector
from kizu.inference.prediction import Prediction

__all__ = ["Row", "as_published", "auroc", "judge", "measured", "results_csv", "write_segmentations"]

log = logging.getLogger("kizu")
Judged = list[tuple[Sample, Prediction]]
Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]

HEADER = ("Row Names", "instance_auroc", "full_pixel_auroc", "anomaly_pixel_auroc")
LEVELS, DILATED, FPR_LIMIT = 200, 5, 0.3  # of the published SimpleNet's PRO
MASK = 255  # pixels of a scaled mask that are still wholly of a defect


@dataclass(frozen=True)
class Row:
    """A line of results.csv; None where a metric is not defined."""

    name: str
    instance_auroc: float | None
    full_pixel_auroc: float | None
    anomaly_pixel_auroc: float | None


def judge(detector: Detector, samples: Sequence[Sample], progress: Progress = silent) -> Judged:
    """What a detector says of test images, in their order; those that cannot be read are named in the log."""
    found: Judged = []
    for number, (sample, outcome) in enumerate(detector.judge(samples, batch_size=detector.batch_size or 8), 1):
        if isinstance(outcome, BadImage):
            log.warning("left out: %s", outcome)
        else:
            found.append((sample, outcome))
        progress("Evaluating", number, len(samples))
    return sorted(found, key=lambda pair: str(pair[0].path))


def measured(name: str, judged: Judged) -> Row:
    """Our arithmetic: over the whole photographs at their own resolution, with masks as they are."""
    values, _, notes = measure(judged)
    defective = [(sample, outcome) for sample, outcome in judged if sample.is_anomalous]
    among_defective = measure(defective)[0]["pixel_auroc"] if defective else None
    for note in notes:
        log.warning("%s: %s", name, note)
    return Row(name, values["image_auroc"], values["pixel_auroc"], among_defective)


def as_published(
    name: str,
    detector: Detector,
    samples: Sequence[Sample],
    progress: Progress = silent,
    *,
    pro: bool = False,
) -> Row:
    """The published arithmetic: over the centre that was cut out, with masks scaled bilinearly and cut off below 1.

    Scores and maps of each member of an ensemble are put between 0 and 1 by the smallest and largest of the test set,
    and averaged. With `pro` the last column is the published SimpleNet's PRO, under the name that it has there.
    """
    graph = detector.graph
    members = list(graph.members) if isinstance(graph, EnsembleGraph) else [graph]
    scores: list[Floats] = []
    maps: list[Floats] = []
    judged: Judged = []
    for member in members:
        detector.graph = member
        judged = judge(detector, samples, progress)
        if not judged:
            break
        scores.append(_from_0_to_1(np.array([outcome.score for _, outcome in judged], np.float32)))
        maps.append(_from_0_to_1(np.stack([outcome.input_map for _, outcome in judged])))
    detector.graph = graph
    if not judged:
        return Row(name, None, None, None)
    together, mean_maps = np.mean(scores, axis=0), np.mean(maps, axis=0)
    masks = [_mask(sample, detector) for sample, _ in judged]
    known = [mask for mask in masks if mask is not None]
    cut = np.stack(known) if known else np.zeros((0, *mean_maps.shape[1:]), bool)
    shown = mean_maps[[mask is not None for mask in masks]]
    marked = cut.any(axis=(1, 2))
    return Row(
        name,
        auroc(together.tolist(), [sample.is_anomalous for sample, _ in judged]),
        auroc(shown.ravel(), cut.ravel()),
        _published_pro(shown, cut) if pro else auroc(shown[marked].ravel(), cut[marked].ravel()),
    )


def auroc(scores: Sequence[float] | Floats, labels: Sequence[bool] | Bools) -> float | None:
    """None where there are not both kinds."""
    truth = np.asarray(labels, dtype=bool)
    return None if not len(truth) or truth.all() or not truth.any() else metrics.ranking(np.asarray(scores), truth)[0]


def results_csv(rows: Sequence[Row]) -> str:
    """The published header, a row a data set, and the mean of what there is."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(HEADER)
    columns = list(zip(*(_values(row) for row in rows), strict=True))
    known = [[value for value in column if value is not None] for column in columns]
    means = tuple(sum(column) / len(column) if column else None for column in known)
    for name, values in [*((row.name, _values(row)) for row in rows), ("Mean", means)]:
        writer.writerow([name, *("n/a" if value is None else repr(float(value)) for value in values)])
    return table.getvalue()


def write_segmentations(judged: Judged, folder: Path, *, each_alone: bool = False) -> None:
    """For each test image a strip of what the network saw, the mask and the map, on one scale for all of them.

    With `each_alone` every map has its own, as in the published pictures. Names are the last four parts of the path.
    """
    if not judged:
        return
    maps = [outcome.input_map for _, outcome in judged]
    usual = float(np.median([np.median(one) for one in maps])), float(max(one.max() for one in maps))
    for (sample, outcome), anomaly_map in zip(judged, maps, strict=True):
        detector = outcome.detector
        scale = detector.heat_map_range if detector.threshold.count else usual
        low, high = (float(anomaly_map.min()), float(anomaly_map.max())) if each_alone else scale
        mask = _mask(sample, detector)
        shown = np.zeros((*anomaly_map.shape, 3), np.uint8)
        if mask is not None:
            shown[mask] = 255
        seen = detector.preprocessing(detector.preprocessing.read(sample, detector.preprocessing.enough)[0])
        strip = np.concatenate([seen, shown, image.heat(anomaly_map, low, high)], axis=1)
        image.write(folder / files.short_name("_".join(sample.path.parts[-4:])), strip)


def _values(row: Row) -> tuple[float | None, float | None, float | None]:
    return row.instance_auroc, row.full_pixel_auroc, row.anomaly_pixel_auroc


def _from_0_to_1(values: Floats) -> Floats:
    spread = values.max() - values.min()
    return np.asarray((values - values.min()) / (spread or 1), np.float32)


def _mask(sample: Sample, detector: Inspector) -> Bools | None:
    """The mask as the network's input would show it; None where a defect has none."""
    side = detector.preprocessing.size
    if not sample.is_anomalous:
        return np.zeros(side, bool)
    if not sample.masks:
        return None
    union = np.maximum.reduce([read_mask_values(path) for path in sample.masks])
    scaled = detector.preprocessing(np.repeat(union[..., None], 3, axis=2))[..., 0]
    return np.asarray(scaled == MASK)


def _published_pro(maps: Floats, masks: Bools) -> float | None:
    """Over 200 levels: regions covered by the map grown by 2 pixels, against the share of good pixels marked by the map
    as it is, for shares below 0.3; the area below the curve, once the shares are divided by their largest."""
    regions = []
    for number, mask in enumerate(masks):
        labels, count = ndimage.label(mask, np.ones((3, 3)))
        regions += [(number, labels == region) for region in range(1, count + 1)]
    if not regions:
        return None
    good = ~masks
    points = []
    for threshold in np.arange(LEVELS) * (maps.max() - maps.min()) / LEVELS + maps.min():
        marked = maps > threshold
        grown = ndimage.maximum_filter(marked, size=(1, DILATED, DILATED))
        covered = np.mean([grown[number][region].mean() for number, region in regions])
        points.append((float((marked & good).sum() / good.sum()), float(covered)))
    kept = sorted(point for point in points if point[0] < FPR_LIMIT)
    shares, pros = (np.array(values) for values in zip(*kept, strict=True))
    return float(np.trapezoid(pros, shares / shares.max())) if shares.max() > 0 else None
