"""How well made-up defects tell which settings are best: beside each candidate's figure, its real one.

python benchmarks/choice.py                      the categories at hand, a table and benchmarks/results/choice.csv
python benchmarks/choice.py DATA… --only size    fewer

Every candidate learns from the same good photographs as `kizu train --auto` would let it, and is judged on the made-up
defects and on the test photographs. The last rows of a category say how the ranks agree (Spearman), and how much the
candidate with the best made-up figure loses against the best one. Pill and transistor come a second time with each
photograph turned by a random angle about its middle, and what lies behind the part continued at the margin.
"""

import argparse
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.stats import spearmanr

from accuracy import present
from kizu.cli.terminal import print_table
from kizu.config import PatchCoreConfig, build
from kizu.data import dataset
from kizu.data.files import write_csv
from kizu.detectors.patchcore.detector import PatchCore
from kizu.evaluation.choice.candidates import in_proportion
from kizu.evaluation.choice.trials import Material, run_trial, surprise
from kizu.evaluation.experiment import machine
from kizu.evaluation.metrics import image_metrics
from kizu.inference.prediction import Prediction

TARGET = Path(__file__).parent / "results" / "choice.csv"
TURNED = ("pill", "transistor")
CANDIDATES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "size × 0.8": {"size": 0.8},
    "size × 1.4": {"size": 1.4},
    "any pose": {"rotate_degrees": 180},
    "size × 1.4, any pose": {"size": 1.4, "rotate_degrees": 180},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="*")
    parser.add_argument("--only", help="candidates whose name holds this word, and the defaults")
    options = parser.parse_args()
    names = [name for name in CANDIDATES if not options.only or options.only in name or name == "defaults"]
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for folder in options.data or present():
            data = dataset.find(Path(folder))
            for category in data.categories:
                rows += compared(data, category, names)
                if category in TURNED:
                    rows += compared(turned(data, category, Path(scratch)), f"{category}, turned", names)
    print_table(rows)
    print(f"\n{machine()['summary']}")
    if not (options.only or options.data):
        write_csv(TARGET, rows[0], map(dict.values, rows))


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


def compared(data: dataset.Dataset, category: str, names: list[str]) -> list[dict[str, str]]:
    """A row for each candidate, and one for all of them."""
    test = data.select(category, "test")
    material = Material.of(data.select(category, "train"), seed=0)
    made_up, auroc, found, rows = [], [], [], []
    for name in names:
        start = time.perf_counter()
        detector = PatchCore(build(PatchCoreConfig, settings_of(CANDIDATES[name], material.shape)))
        trial = run_trial(detector, {}, material)
        judged = [(s, o.score) for s, o in detector.judge(test) if isinstance(o, Prediction)]
        scores, labels = [score for _, score in judged], [sample.is_anomalous for sample, _ in judged]
        good, bad = ([s for s, label in zip(scores, labels, strict=True) if label is kind] for kind in (False, True))
        made_up.append(trial.found)
        auroc.append(image_metrics(scores, labels)[0]["image_auroc"] or 0.0)
        found.append(float(surprise(good, bad).mean()))
        rows.append(row(category, name, made_up[-1], auroc[-1], found[-1]))
        print(f"{category}, {name}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    chosen = made_up.index(max(made_up))
    correlations = [float(spearmanr(made_up, real).statistic) for real in (auroc, found)]
    rows.append(row(category, "rank correlation", None, *correlations))
    losses = [max(real) - real[chosen] for real in (auroc, found)]
    rows.append(row(category, "loss of the best made-up figure", None, *losses))
    return rows


def settings_of(candidate: dict[str, Any], shape: tuple[int, int]) -> dict[str, Any]:
    """A candidate's settings, its size a factor of the default's in the photographs' proportions."""
    factor = candidate.get("size", 1.0)
    size = in_proportion((round(320 * factor / 32) * 32,) * 2, shape)
    return {**candidate, "size": size}


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
