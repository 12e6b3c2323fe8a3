"""The tables of a run: results.csv, a row a category, and predictions.csv, a row a test image."""

from collections.abc import Sequence

from kizu.calibration.threshold import p_value
from kizu.data.files import csv_text
from kizu.evaluation.evaluate import CategoryResult

__all__ = ["predictions_csv", "results_csv"]

METRICS = ("image_auroc", "image_ap", "image_f1max", "pixel_auroc", "pixel_ap", "pixel_f1max", "au_pro", "pg2", "pb2")
COUNTS = ("train_images", "test_good", "test_defective", "false_alarms", "misses")
TIMES = ("ms_per_image", "seconds")
ORACLE = (*METRICS, "round")
PREDICTIONS = ("category", "image", "defect", "score", "p_value", "verdict", "threshold", "error")

Cells = list[float | None]


def results_csv(results: Sequence[CategoryResult]) -> str:
    """A row a category, metrics to six places, n/a where there is none, and the mean of what there is.

    Columns that begin with oracle_, if there are any, are of the round of training that is the best on the test images.
    """
    metrics = [*METRICS, *dict.fromkeys(name for r in results for name in r.metrics if name not in METRICS)]
    oracle = ORACLE if any(result.oracle for result in results) else ()
    header = ["category", *metrics, *COUNTS, *TIMES, *(f"oracle_{name}" for name in oracle)]
    rows = [_values(result, metrics, oracle) for result in results]
    means = [_mean(column) for column in zip(*rows, strict=True)]
    places = [*[6] * len(metrics), *[0] * len(COUNTS), 1, 2, *(0 if name == "round" else 6 for name in oracle)]
    mean_places = [*[6] * len(metrics), *[1] * len(COUNTS), *places[len(metrics) + len(COUNTS) :]]
    lines = [[result.category, *_cells(row, places)] for result, row in zip(results, rows, strict=True)]
    return csv_text([header, *lines, ["mean", *_cells(means, mean_places)]])


def predictions_csv(results: Sequence[CategoryResult]) -> str:
    """A row a test image: what it is, its score and the verdict, or why there is none."""
    lines = []
    for result in results:
        for row in result.scores:
            score = "" if row.score is None else f"{row.score:.9g}"
            p = "" if row.score is None else f"{p_value(row.score, result.calibration_scores):.6g}"
            threshold = f"{result.threshold:.9g}"
            verdict = result.verdict(row)
            lines.append(
                [result.category, row.image, row.defect, score, p, verdict, threshold, row.error or row.cannot_judge]
            )
    return csv_text([PREDICTIONS, *lines])


def _values(result: CategoryResult, metrics: Sequence[str], oracle: Sequence[str]) -> Cells:
    spent = sum(seconds for stage, seconds in result.seconds.items() if stage != "per image")
    return [
        *(result.metrics.get(name) for name in metrics),
        result.train_images,
        result.count(defective=False),
        result.count(defective=True),
        result.count(defective=False, stopped=True),
        result.count(defective=True, stopped=False),
        1000 * result.seconds.get("per image", 0.0),
        spent,
        *(result.oracle.get(name) for name in oracle),
    ]


def _cells(values: Sequence[float | None], places: Sequence[int]) -> list[str]:
    return ["n/a" if value is None else f"{value:.{digits}f}" for value, digits in zip(values, places, strict=True)]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
