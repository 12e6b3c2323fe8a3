"""Bad apples: defects put among the training images, how many of them are listed, and how many good images beside.

python benchmarks/suspects.py      a minute; writes benchmarks/results/suspects.csv
"""

import argparse
from pathlib import Path

import numpy as np

from accuracy import present
from kizu.cli.terminal import print_table
from kizu.data import dataset
from kizu.data.files import write_csv
from kizu.detectors.patchcore.detector import PatchCore

TARGET = Path(__file__).parent / "results" / "suspects.csv"
GOOD, DEFECTS = 120, 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="*")
    found = [dataset.find(Path(folder)) for folder in parser.parse_args().data or present()]
    rows = [row(data, category) for data in found for category in data.categories]
    print_table(rows)
    write_csv(TARGET, rows[0], map(dict.values, rows))


def row(data: dataset.Dataset, category: str) -> dict[str, str]:
    rng = np.random.default_rng(0)
    good = list(data.select(category, "train"))
    bad = [sample for sample in data.select(category, "test") if sample.is_anomalous]
    chosen = [good[i] for i in rng.permutation(len(good))[:GOOD]], [bad[i] for i in rng.permutation(len(bad))[:DEFECTS]]
    listed = [one["number"] for one in PatchCore().fit(chosen[0] + chosen[1]).training["suspects"]]
    hits = sum(number >= len(chosen[0]) for number in listed)
    return {
        "category": category,
        "defects": str(len(chosen[1])),
        "defects_listed": str(hits),
        "good": str(len(chosen[0])),
        "good_listed": str(len(listed) - hits),
    }


if __name__ == "__main__":
    main()
