"""What settings chosen from good photographs (`kizu train patchcore --auto`) bring and cost, beside the defaults.

python benchmarks/auto.py                        the categories at hand, a table and benchmarks/results/auto.csv
python benchmarks/auto.py --only pill            one of them, whose rows replace those in the table

For each category: settings are chosen from its good training photographs, with the default bounds; the method learns
from all of them with these settings, and with the defaults; both are judged on the test photographs. Seconds are those
of the choice and of the training, milliseconds those of one photograph, from its file to its verdict. Pill and
transistor come a second time with each photograph turned by a random angle.
"""

import argparse
import csv
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import kizu
from accuracy import present
from choice import TURNED, name_of, turned
from kizu.cli.terminal import print_table
from kizu.config import PatchCoreConfig
from kizu.data import dataset
from kizu.data.files import write_csv
from kizu.detectors.patchcore.detector import PatchCore
from kizu.evaluation.evaluate import evaluate
from kizu.evaluation.experiment import machine

TARGET = Path(__file__).parent / "results" / "auto.csv"
TIMED = 20  # photographs, one at a time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="the category of this name")
    only = parser.parse_args().only
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for data, category in _categories(Path(scratch)):
            if only in (None, category):
                rows += compared(data, category)
                _keep(rows)
    print_table(rows)
    print(f"\n{machine()['summary']}")


def _categories(scratch: Path) -> Iterator[tuple[dataset.Dataset, str]]:
    for folder in present():
        data = dataset.find(folder)
        for category in data.categories:
            yield data, category
            if category in TURNED:
                yield turned(data, category, scratch), f"{category}, turned"


def compared(data: dataset.Dataset, category: str) -> list[dict[str, str]]:
    """A row of the defaults, and a row of what was chosen."""
    start = time.perf_counter()
    choice = kizu.choose(data.select(category, "train"))
    seconds = time.perf_counter() - start
    print(f"{category}: {choice.sentence}", *choice.reasons, sep="\n  ", file=sys.stderr)
    chosen = name_of(choice.settings)
    return [
        judged(data, category, "defaults", PatchCoreConfig(), None),
        judged(data, category, f"auto: {chosen}", choice.config, seconds),
    ]


def judged(
    data: dataset.Dataset, category: str, name: str, config: PatchCoreConfig, choosing: float | None
) -> dict[str, str]:
    """Learn from all good photographs, and judge the test photographs."""
    detector = PatchCore(config)
    start = time.perf_counter()
    detector.fit(data.select(category, "train"), held_out=data.select(category, "validation"))
    training = time.perf_counter() - start
    test = data.select(category, "test")
    result = evaluate(detector, test, category=category, root=data.root)
    milliseconds = []
    for sample in test[:: max(1, len(test) // TIMED)]:
        start = time.perf_counter()
        detector.predict(sample.path)
        milliseconds.append(1000 * (time.perf_counter() - start))
    good, bad = result.count(defective=False), result.count(defective=True)
    row = {
        "category": category,
        "settings": name,
        **{metric: _figure(result.metrics.get(metric)) for metric in ("image_auroc", "pixel_auroc", "au_pro")},
        "stopped": f"{bad - result.count(defective=True, stopped=False)} of {bad}",
        "false alarms": f"{result.count(defective=False, stopped=True)} of {good}",
        "ms a photograph": f"{statistics.median(milliseconds[1:]):.0f}",
        "seconds of training": f"{training:.0f}",
        "seconds of the choice": "" if choosing is None else f"{choosing:.0f}",
    }
    print(row, file=sys.stderr, flush=True)
    return row


def _figure(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.4f}"


def _keep(rows: list[dict[str, str]]) -> None:
    """Write down these rows, beside those of other categories."""
    found = list(csv.DictReader(TARGET.read_text().splitlines())) if TARGET.exists() else []
    kept = {(row["category"], row["settings"] == "defaults"): row for row in [*found, *rows]}
    write_csv(TARGET, rows[0], [list(row.values()) for row in kept.values()])


if __name__ == "__main__":
    main()
