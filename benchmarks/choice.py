"""How well made-up defects tell which settings are best: beside each candidate's figure, its real one.

python benchmarks/choice.py                      the categories at hand, a table and benchmarks/results/choice.csv
python benchmarks/choice.py DATA…                fewer
python benchmarks/choice.py --only "pill, turned"  one of them, whose rows replace those in the table

The candidates are those that `kizu train --auto` tries, what it takes of them together, and a larger input alone. Each
is judged on the made-up defects and, with the same model, on the test photographs, of which the choice knows nothing.
The last rows of a category say how the ranks agree (Spearman), and how much the chosen candidate loses against the best
one. Pill and transistor come a second time with each photograph turned by a random angle about its middle, and what
lies behind the part continued at the margin.
"""

import argparse
import csv
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from PIL import Image
from scipy.stats import spearmanr

import kizu
from accuracy import present
from kizu.cli.terminal import print_table
from kizu.config import PatchCoreConfig, build
from kizu.data import dataset
from kizu.data.files import write_csv
from kizu.data.sample import Sample
from kizu.detectors.patchcore.detector import PatchCore
from kizu.evaluation.choice import choose as choosing
from kizu.evaluation.choice.candidates import LARGER, other_size
from kizu.evaluation.choice.choose import words
from kizu.evaluation.choice.trials import Material, Trial, run_trial, surprise
from kizu.evaluation.experiment import machine
from kizu.evaluation.metrics import image_metrics
from kizu.inference.prediction import Prediction

TARGET = Path(__file__).parent / "results" / "choice.csv"
TURNED = ("pill", "transistor")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="*")
    parser.add_argument("--only", help="the category of this name, whose rows replace those in the table")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for folder in options.data or present():
            data = dataset.find(Path(folder))
            for category in data.categories:
                if options.only in (None, category):
                    rows += compared(data, category)
                if category in TURNED and options.only in (None, name := f"{category}, turned"):
                    rows += compared(turned(data, category, Path(scratch)), name)
    print_table(rows)
    print(f"\n{machine()['summary']}")
    if not options.data:
        _keep(rows)


def _keep(rows: list[dict[str, str]]) -> None:
    """Write down these rows, in the place of those of the same categories."""
    found = list(csv.DictReader(TARGET.read_text().splitlines())) if TARGET.exists() else []
    new = {row["category"] for row in rows}
    names = dict.fromkeys(row["category"] for row in [*found, *rows])
    kept = [row for name in names for row in (rows if name in new else found) if row["category"] == name]
    write_csv(TARGET, rows[0], map(dict.values, kept))


def turned(data: dataset.Dataset, category: str, scratch: Path) -> dataset.Dataset:
    """The same photographs, each turned about its middle."""
    for number, sample in enumerate(data.select(category)):
        angle = np.random.default_rng(number).uniform(0, 360)
        photo, _ = sample.read()
        around = max(photo.shape) // 2
        padded = Image.fromarray(np.pad(photo, ((around, around), (around, around), (0, 0)), mode="edge"))
        inner = (around, around, around + photo.shape[1], around + photo.shape[0])
        target = scratch / f"{category}, turned" / sample.split / sample.defect / f"{sample.path.stem}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        padded.rotate(angle, Image.Resampling.BILINEAR).crop(inner).save(target)
    return dataset.find(scratch / f"{category}, turned")


def compared(data: dataset.Dataset, category: str, name: str = "") -> list[dict[str, str]]:
    """A row for each candidate, and two for all of them."""
    test = data.select(category, "test")
    tried: list[tuple[dict[str, Any], float, float, float]] = []
    materials: list[Material] = []

    def judged(detector: PatchCore, settings: dict[str, Any], material: Material, *_: Any, **__: Any) -> Trial:
        start = time.perf_counter()
        trial = run_trial(detector, settings, material)
        materials.append(material)
        tried.append((settings, trial.found, *real(detector, test)))
        print(f"{name or category}, {name_of(settings)}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
        return trial

    with patch.object(choosing, "run_trial", judged):
        choice = kizu.choose(data.select(category, "train"))
    first = tried[0][0]
    larger = {**first, "size": other_size(first.get("size", PatchCoreConfig().size), LARGER)}
    for others in (choice.settings, larger):
        if others not in [settings for settings, *_ in tried]:
            judged(PatchCore(build(PatchCoreConfig, others)), others, materials[0])
    chosen = [settings for settings, *_ in tried].index(choice.settings)
    _, made_up, auroc, found = zip(*tried, strict=True)
    rows = [
        row(name or category, name_of(of) + (" (chosen)" if place == chosen else ""), *figures)
        for place, (of, *figures) in enumerate(tried)
    ]
    correlations = [float(spearmanr(made_up, figures).statistic) for figures in (auroc, found)]
    losses = [max(figures) - figures[chosen] for figures in (auroc, found)]
    rows.append(row(name or category, "rank correlation", None, *correlations))
    rows.append(row(name or category, "loss of the chosen one", None, *losses))
    return rows


def real(detector: PatchCore, test: Sequence[Sample]) -> tuple[float, float]:
    """Image AUROC, and the share of the real defects that is found, over rates of false alarms."""
    judged = [(s, o.score) for s, o in detector.judge(test) if isinstance(o, Prediction)]
    scores, labels = [score for _, score in judged], [sample.is_anomalous for sample, _ in judged]
    good, bad = ([s for s, label in zip(scores, labels, strict=True) if label is kind] for kind in (False, True))
    return image_metrics(scores, labels)[0]["image_auroc"] or 0.0, float(surprise(good, bad).mean())


def name_of(settings: dict[str, Any]) -> str:
    """The candidate's name in the table."""
    return words({"size": PatchCoreConfig().size, **settings}).removeprefix("size ")


def row(category: str, name: str, made_up: float | None, auroc: float, found: float) -> dict[str, str]:
    return {
        "category": category,
        "candidate": name,
        "made-up defects found": "" if made_up is None else f"{made_up:.3f}",
        "image AUROC": "n/a" if math.isnan(auroc) else f"{auroc:.4f}",
        "real defects found": "n/a" if math.isnan(found) else f"{found:.3f}",
    }


if __name__ == "__main__":
    main()
