"""The defaults with one thing changed at a time: image AUROC over categories, one setting for all of them.

python benchmarks/ablation.py [DATA…]
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from accuracy import present
from kizu.cli.terminal import print_table
from kizu.config import PatchCoreConfig
from kizu.data import dataset
from kizu.data.files import write_csv
from kizu.detectors.patchcore.detector import PatchCore
from kizu.evaluation.experiment import machine
from kizu.evaluation.metrics import image_metrics
from kizu.inference.prediction import Prediction

TARGET = Path(__file__).parent / "results" / "ablation.csv"
PAPER = {"fusion": "stack", "local_scale": False, "top": 0}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "the paper's: stacked, no scales, worst patch": PAPER,
    "the paper's with Eq. 7": {**PAPER, "reweight": 9},
    "no local scales": {"local_scale": False},
    "stacked layers": {"fusion": "stack"},
    "worst patch alone": {"top": 0},
    "256 × 256": {"size": 256},
    "patchsize 5": {"patchsize": 5},
    "fine layer alone": {"layers": "blocks.2"},
    "coarse layer alone": {"layers": "blocks.4"},
    "1 % banks": {"coreset": 0.01},
    "4 % banks": {"coreset": 0.04},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", nargs="*")
    parser.add_argument("--only", help="variants whose name holds this word")
    options = parser.parse_args()
    found = [dataset.find(Path(folder)) for folder in options.data or present()]
    categories = [(data, category) for data in found for category in data.categories]
    rows = []
    for name, settings in VARIANTS.items():
        if options.only and options.only not in name:
            continue
        start = time.perf_counter()
        scores = {category: image_auroc(data, category, settings) for data, category in categories}
        mean = statistics.mean(scores.values())
        rows.append({"variant": name, **{c: f"{value:.4f}" for c, value in scores.items()}, "mean": f"{mean:.4f}"})
        print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    print_table(rows)
    print(f"\n{machine()['summary']}")
    if not options.only:
        write_csv(TARGET, rows[0], map(dict.values, rows))


def image_auroc(data: dataset.Dataset, category: str, settings: dict[str, Any]) -> float:
    detector = PatchCore(PatchCoreConfig(**settings))
    detector.fit(data.select(category, "train"), held_out=data.select(category, "validation"))
    judged = [
        (outcome.score, sample.is_anomalous)
        for sample, outcome in detector.judge(data.select(category, "test"))
        if isinstance(outcome, Prediction)
    ]
    values, _ = image_metrics([score for score, _ in judged], [label for _, label in judged])
    return values["image_auroc"] or 0.0


if __name__ == "__main__":
    main()
