"""Does bounded memory cost accuracy? Each category fitted with all its patches at hand, and in as little as is allowed.

python benchmarks/bounded.py                    every category that is here; writes benchmarks/results/bounded.csv
python benchmarks/bounded.py DATA --memory 150MB
"""

import argparse
import csv
import io
import sys
from pathlib import Path

import kizu
from accuracy import present
from kizu.data import dataset
from kizu.data.files import write_text
from kizu.evaluation.evaluate import evaluate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="*")
    parser.add_argument("--memory", default="100MB", help="for the bounded fit")
    parser.add_argument("--output", default=str(Path(__file__).parent / "results" / "bounded.csv"))
    options = parser.parse_args()
    rows = []
    for folder in options.data or present():
        data = dataset.find(Path(folder))
        for category in data.categories:
            rows.append([category, *compared(data, category, options.memory)])
            print("  ".join(rows[-1]), file=sys.stderr)
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["category", "memory", "unbounded_auroc", "bounded_auroc", "unbounded_radius", "bounded_radius"])
    table.writerows(rows)
    write_text(options.output, text.getvalue())


def compared(data: dataset.Dataset, category: str, memory: str) -> list[str]:
    """The bound, image AUROC without and with it, and the cover radii reached (with it: at most) in each bank."""
    aurocs, radii = [], []
    for bound in (None, memory):
        detector = kizu.PatchCore()
        detector.fit(data.select(category, "train"), held_out=data.select(category, "validation"), memory=bound)
        result = evaluate(detector, data.select(category, "test"), category=category, root=data.root)
        aurocs.append(f"{result.metrics['image_auroc']:.4f}")
        radii.append(" ".join(f"{radius:.2f}" for radius in detector.facts["radius"]))
    return [memory, *aurocs, *radii]


if __name__ == "__main__":
    main()
