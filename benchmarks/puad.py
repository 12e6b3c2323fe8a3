"""PUAD over PatchCore, or over another base: image AUROC of base, head, plain sum and gated sum.

python benchmarks/puad.py --textile textile                     all categories, and the textile (benchmarks/textile.py)
python benchmarks/puad.py --category juice_bottle --fresh       one of them, whatever was measured before
python benchmarks/puad.py --base efficientad                    over EfficientAD, in results/puad_efficientad.csv

The flange is the demo's rendered part. Each category is learned once, with kizu's defaults; the scores are parts of the
same predictions. The gain is that of what PUAD says over its base, with a 95 % interval from 2,000 bootstrap samples of
the test images, good and defective apart. Written to results/puad.csv; what is there already is not measured again
without --fresh.
"""

import argparse
import csv
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

import kizu
from accuracy import SHARED
from kizu.cli.terminal import print_table
from kizu.data import dataset, demo
from kizu.data.files import write_csv
from kizu.evaluation.experiment import machine, versions
from kizu.evaluation.metrics import ranking
from kizu.inference.prediction import Prediction

TARGET = Path(__file__).parent / "results" / "puad.csv"
FOLDERS = {
    "bottle": SHARED / "mvtec_ad" / "bottle",
    "pill": SHARED / "mvtec_ad" / "pill",
    "transistor": SHARED / "mvtec_ad" / "transistor",
    "magnetic_tile": SHARED / "magnetic_tile",
    "juice_bottle": SHARED / "mvtec_loco" / "juice_bottle",
}
SAMPLES = 2000
Scores = npt.NDArray[np.float64]  # (N,)
VARIANTS: dict[str, Callable[[Prediction], float]] = {
    "map's maximum": lambda prediction: float(prediction.input_map.max()),
    "base only": lambda prediction: prediction.parts["structural"],
    "head only": lambda prediction: prediction.parts["logical"],
    "always sum": lambda prediction: prediction.parts["structural"] + prediction.parts["logical"],
    "PUAD": lambda prediction: prediction.score,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--category", action="append", choices=[*FOLDERS, "textile", "flange"], help="Repeatable. Default: all."
    )
    parser.add_argument("--textile", type=Path, help="folder that benchmarks/textile.py wrote")
    parser.add_argument("--fresh", action="store_true", help="repeat what was measured before")
    parser.add_argument("--base", default="patchcore", choices=["patchcore", "simplenet", "efficientad"])
    options = parser.parse_args()
    target = TARGET if options.base == "patchcore" else TARGET.with_stem(f"puad_{options.base}")
    folders = FOLDERS | ({"textile": options.textile} if options.textile else {})
    rows = list(csv.DictReader(target.read_text().splitlines())) if target.exists() else []
    for category in options.category or [*folders, "flange"]:
        if options.fresh or not any(row["category"].split(", ")[0] == category for row in rows):
            with tempfile.TemporaryDirectory() as scratch:
                folder = Path(demo.render(scratch)) if category == "flange" else folders.get(category)
                if folder is None or not folder.is_dir():
                    sys.exit(f"There are no images of {category}: name the textile's folder with --textile")
                new = measure(category, folder, options.base)
            rows = [row for row in rows if row["category"].split(", ")[0] != category] + new
            write_csv(target, rows[0], map(dict.values, rows))
    print_table(rows)
    print(f"\n{machine()['summary']}; " + ", ".join(f"{name} {value}" for name, value in versions().items()))


def measure(category: str, folder: Path, base: str) -> list[dict[str, str]]:
    """A row; for textile and flange one of each kind of defect."""
    start = time.perf_counter()
    data = dataset.find(folder)
    detector = kizu.PUAD(base=base).fit(data.select(split="train"), held_out=data.select(split="validation"))
    judged = [(sample.defect, outcome) for sample, outcome in detector.judge(data.select(split="test"))]
    print(f"{category}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    kinds = sorted({defect for defect, _ in judged} - {"good"})
    if category not in ("textile", "flange"):
        return [{"category": category, **compared(judged, kinds), **heard(detector)}]
    return [
        {"category": f"{category}, {kind.replace('_', ' ')}", **compared(judged, [kind]), **heard(detector)}
        for kind in kinds
    ]


def compared(judged: list[tuple[str, object]], kinds: list[str]) -> dict[str, str]:
    chosen = [(d, outcome) for d, outcome in judged if d in ("good", *kinds) and isinstance(outcome, Prediction)]
    labels = np.array([defect != "good" for defect, _ in chosen])
    scores = {name: np.array([value(outcome) for _, outcome in chosen]) for name, value in VARIANTS.items()}
    found = {name: f"{auroc(values, labels):.4f}" for name, values in scores.items()}
    gain = auroc(scores["PUAD"], labels) - auroc(scores["base only"], labels)
    low, high = interval(scores["PUAD"], scores["base only"], labels)
    return {**found, "gain": f"{gain:+.4f}", "95 % interval": f"{low:+.4f} … {high:+.4f}"}


def heard(detector: kizu.PUAD) -> dict[str, str]:
    """The level above which the head is heard, and its distances of good images."""
    facts = detector.facts
    fitted, held_out = facts["distance of images learned from"], facts["distance of images held out"]
    return {
        "level": f"{facts['logical level']:.2f}",
        "distance, learned": f"{fitted:.1f}",
        "distance, held out": f"{held_out:.1f}",
    }


def auroc(scores: Scores, labels: npt.NDArray[np.bool_]) -> float:
    return ranking(scores, labels)[0]


def interval(ours: Scores, base: Scores, labels: npt.NDArray[np.bool_]) -> tuple[float, float]:
    """2.5 % and 97.5 % of the difference of both AUROCs over bootstrap samples of the images."""
    rng = np.random.default_rng(0)
    groups = [np.flatnonzero(labels), np.flatnonzero(~labels)]
    differences = []
    for _ in range(SAMPLES):
        some = np.concatenate([rng.choice(group, len(group)) for group in groups])
        differences.append(auroc(ours[some], labels[some]) - auroc(base[some], labels[some]))
    low, high = np.quantile(differences, [0.025, 0.975])
    return float(low.round(6)) + 0.0, float(high.round(6)) + 0.0


if __name__ == "__main__":
    main()
