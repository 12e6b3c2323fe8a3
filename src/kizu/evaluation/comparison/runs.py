"""Two or more runs side by side: figures, settings that differ, and the photographs on which they disagree.

Differences are those to the first run, on the photographs that both judged. The interval of a difference of AUROCs is
DeLong's for paired curves (DeLong, DeLong and Clarke-Pearson, 1988); the chance of so uneven disagreements is that of
the exact sign test (McNemar's).
"""

import csv
import io
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kizu.data import files
from kizu.errors import DataError

__all__ = [
    "METRICS",
    "Disagreement",
    "RecordedRun",
    "disagreements",
    "paired_rows",
    "read_run",
    "result_rows",
    "setting_rows",
]

Key = tuple[str, str]  # category and image
Scores = npt.NDArray[np.float64]

METRICS = {"image_auroc": "image AUROC", "pixel_auroc": "pixel AUROC", "au_pro": "AU-PRO"}
TWO_SIDED = 1.959964  # standard errors for 95 % confidence


@dataclass(frozen=True)
class JudgedImage:
    """One row of predictions.csv."""

    defect: str
    score: float | None
    p_value: float | None
    verdict: str

    @property
    def is_good(self) -> bool:
        return self.defect == "good"


@dataclass(frozen=True)
class RecordedRun:
    """What a finished run wrote down."""

    name: str
    data: Path
    about: dict[str, Any]  # run.json
    results: dict[str, dict[str, str]]  # results.csv by category, and the mean
    images: dict[Key, JudgedImage]  # predictions.csv


@dataclass(frozen=True)
class Disagreement:
    """A photograph on which runs differ, with each run's answer in their order."""

    category: str
    image: str
    defect: str
    answers: list[JudgedImage | None]

    @property
    def distance(self) -> float:
        """How far apart the p-values are, on a logarithmic scale."""
        values = [math.log(answer.p_value) for answer in self.answers if answer and answer.p_value]
        return max(values) - min(values) if values else 0.0


def read_run(folder: Path, name: str) -> RecordedRun:
    """The tables of a finished run. Raises `DataError` where they are missing or damaged."""
    try:
        about = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        results = {row["category"]: row for row in _table(folder / "results.csv")}
        images = {
            (row["category"], files.from_cell(row["image"])): JudgedImage(
                row["defect"], _number(row["score"]), _number(row["p_value"]), row["verdict"]
            )
            for row in _table(folder / "predictions.csv")
        }
        return RecordedRun(name, Path(about["data"]), about, results, images)
    except FileNotFoundError as error:
        missing = Path(error.filename).name
        raise DataError(f"{folder}: there is no finished run of kizu (no {missing}); give the run's folder") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}: the run's files are damaged ({error})") from None


def result_rows(runs: Sequence[RecordedRun]) -> list[dict[str, str]]:
    """A row for each category and run, and the means where there are several categories."""
    categories = list(dict.fromkeys(category for run in runs for category in run.results if category != "mean"))
    several = len(categories) > 1
    return [
        {
            "category": category,
            "run": run.name,
            **{label: _figure(run.results[category].get(metric)) for metric, label in METRICS.items()},
            **_counts(run, None if category == "mean" else category),
            "ms/image": _figure(run.results[category].get("ms_per_image"), 0),
        }
        for category in [*categories, *(["mean"] if several else [])]
        for run in runs
        if category in run.results
    ]


def setting_rows(runs: Sequence[RecordedRun]) -> list[dict[str, str]]:
    """A row for each setting that is not the same in all runs, and for data, method and versions that differ."""
    facts = [_facts(run) for run in runs]
    names = dict.fromkeys(name for values in facts for name in values)
    rows = []
    for name in names:
        values = [fact.get(name, "–") for fact in facts]
        if len(set(values)) > 1:
            rows.append({"setting": name, **{run.name: value for run, value in zip(runs, values, strict=True)}})
    return rows


def paired_rows(runs: Sequence[RecordedRun]) -> list[dict[str, str]]:
    """Each run beside the first one, on the photographs that both judged."""
    first, *others = runs
    return [_pair(first, other) for other in others]


def disagreements(runs: Sequence[RecordedRun]) -> list[Disagreement]:
    """Photographs on which the verdicts are not all the same, those that are furthest apart first."""
    keys = dict.fromkeys(key for run in runs for key in run.images)
    found = []
    for category, image in keys:
        answers = [run.images.get((category, image)) for run in runs]
        known = [answer for answer in answers if answer is not None]
        if len(known) > 1 and len({answer.verdict for answer in known}) > 1:
            found.append(Disagreement(category, image, known[0].defect, answers))
    return sorted(found, key=lambda disagreement: -disagreement.distance)


def _pair(first: RecordedRun, other: RecordedRun) -> dict[str, str]:
    common = [key for key in first.images if key in other.images]
    judged = [key for key in common if None not in (first.images[key].score, other.images[key].score)]
    differences, variances = [], []
    for category in dict.fromkeys(category for category, _ in judged):
        keys = [key for key in judged if key[0] == category]
        good = np.array([first.images[key].is_good for key in keys])
        if 1 < good.sum() < len(keys) - 1:
            scores = [np.array([run.images[key].score for key in keys], float) for run in (first, other)]
            difference, variance = auroc_difference(scores[1], scores[0], good)
            differences.append(difference)
            variances.append(variance)
    row = {"run": f"{other.name} – {first.name}", "photographs of both": str(len(common))}
    if differences:
        error = math.sqrt(sum(variances)) / len(variances)
        row["image AUROC"] = f"{statistics.mean(differences):+.4f} ± {TWO_SIDED * error:.4f}".replace("-", "−")
    else:
        row["image AUROC"] = "n/a"
    for label, kind in (("defects stopped", False), ("good parts stopped", True)):
        pairs = [(first.images[key], other.images[key]) for key in judged if first.images[key].is_good is kind]
        lost = sum(a.verdict == "stop" and b.verdict != "stop" for a, b in pairs)
        won = sum(a.verdict != "stop" and b.verdict == "stop" for a, b in pairs)
        row[label] = f"+{won} −{lost} (p {sign_test(won, lost):.2g})" if won or lost else "the same"
    return row


def auroc_difference(scores: Scores, others: Scores, good: npt.NDArray[np.bool_]) -> tuple[float, float]:
    """The first AUROC minus the second one, of scores (N,) for the same images, and its variance (DeLong)."""
    of_bad, of_good = (a - b for a, b in zip(_placements(scores, good), _placements(others, good), strict=True))
    return float(of_bad.mean()), float(of_bad.var(ddof=1) / len(of_bad) + of_good.var(ddof=1) / len(of_good))


def sign_test(won: int, lost: int) -> float:
    """The chance of a split at least as uneven, where both are equally likely."""
    total = won + lost
    ways = sum(math.comb(total, hits) for hits in range(min(won, lost) + 1))
    return min(1.0, math.ldexp(ways, 1 - total))


def _placements(scores: Scores, good: npt.NDArray[np.bool_]) -> tuple[Scores, Scores]:
    """For each defective image the share of good ones below it, and for each good one that of defective ones above."""

    def below(values: Scores, among: Scores) -> Scores:
        ordered = np.sort(among)
        left, right = (np.searchsorted(ordered, values, side) for side in ("left", "right"))
        return np.asarray((left + right) / (2 * len(ordered)))

    return below(scores[~good], scores[good]), 1 - below(scores[good], scores[~good])


def _counts(run: RecordedRun, category: str | None) -> dict[str, str]:
    images = [image for (of, _), image in run.images.items() if category in (None, of) and image.verdict != "error"]
    stopped = {good: [i.verdict == "stop" for i in images if i.is_good is good] for good in (False, True)}
    named = {"defects stopped": stopped[False], "false alarms": stopped[True]}
    return {label: f"{sum(values)} of {len(values)}" for label, values in named.items()}


def _facts(run: RecordedRun) -> dict[str, str]:
    """Everything that may explain a difference, as text."""
    about = run.about
    chosen = {
        f"{name}, {category}" if len(about["choices"]) > 1 else name: value
        for category, choice in about.get("choices", {}).items()
        for name, value in choice.get("config", {}).items()
    }
    facts = {"method": about["method"], "data": about["data"], "images": about.get("data_hash", "")}
    facts |= {**about["config"], **chosen, **about.get("versions", {})}
    return {name.replace("_", " "): _plain(value) for name, value in facts.items()}


def _plain(value: Any) -> str:
    if isinstance(value, list):  # of zones, which have many corners, the names
        return ", ".join(str(part.get("name", part)) if isinstance(part, dict) else str(part) for part in value)
    return str(value)


def _table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8", errors="surrogateescape"), newline="")))


def _number(cell: str) -> float | None:
    return float(cell) if cell else None


def _figure(cell: str | None, places: int = 4) -> str:
    return "n/a" if cell in (None, "", "n/a") else f"{float(cell):.{places}f}"
