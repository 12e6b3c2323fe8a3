"""What the published arithmetic does to the published columns, beside ours, on the same models.

python benchmarks/originals.py                        PatchCore and SimpleNet on bottle and pill
python benchmarks/originals.py --second resnet18:FILE    and an ensemble with a second network, from a weights file
python benchmarks/originals.py --seeds 5              PatchCore with other seeds, which choose other memory banks

PatchCore: 256 → 224 pixels, 1024 dimensions, 1 % of the patches. SimpleNet: 329 → 288 pixels, 10 rounds of 1 pass over
an eighth of the patches; the published protocol keeps the round that is best on the test images. Every fourth training
image, all test images. Written to results/originals.csv. With --seeds all training images are learned from; written to
results/seeds.csv.
"""

import argparse
import csv
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import kizu
from accuracy import SHARED
from kizu.cli.reference import scoring
from kizu.cli.terminal import print_table
from kizu.data import dataset
from kizu.data.files import write_text
from kizu.detectors.base import Detector
from kizu.evaluation.evaluate import measure
from kizu.evaluation.experiment import machine
from kizu.evaluation.oracle import Oracle

Row = dict[str, Any]

TARGET = Path(__file__).parent / "results" / "originals.csv"
PUBLISHED: Row = {"fusion": "stack", "local_scale": False, "top": 0, "squared": True, "size": 224, "resize": 256}
COMMON: Row = {**PUBLISHED, "coreset": 0.01, "pretrain_embed_dimension": 1024, "target_embed_dimension": 1024}
SIMPLE: Row = {"size": 288, "resize": 329, "top": 0, "meta_epochs": 10, "gan_epochs": 1, "sampled": 1 / 8}
COLUMNS = ("instance_auroc", "full_pixel_auroc", "anomaly_pixel_auroc")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--category", action="append", choices=["bottle", "pill"], help="Repeatable. Default: both.")
    parser.add_argument("--second", metavar="NAME:FILE", help="second network of an ensemble, and its weights")
    parser.add_argument("--seeds", type=int, help="so many, instead of the comparison of the arithmetics")
    options = parser.parse_args()
    if options.seeds:
        seeds(range(options.seeds), options.category or ["bottle", "pill"])
        return
    chosen = options.category or ["bottle", "pill"]
    before = csv.DictReader(TARGET.read_text().splitlines()) if TARGET.exists() else ()
    rows: list[Row] = [row for row in before if row["category"] not in chosen]
    for category in chosen:
        data = dataset.find(SHARED / "mvtec_ad" / category)
        for row in [*patchcore(data, options.second), *simplenet(data)]:
            rows.append({"category": category, **row})
            print(rows[-1], flush=True)
    _keep(TARGET, rows)


def seeds(numbers: Sequence[int], categories: Sequence[str]) -> None:
    """PatchCore's published settings, and kizu's: mean, spread and range over the seeds."""
    rows: list[Row] = []
    for category in categories:
        data = dataset.find(SHARED / "mvtec_ad" / category)
        published = COMMON | {"sampler": "approx_greedy_coreset"}
        for label, settings in (("published 1 %", published), ("kizu's", {})):
            found: dict[str, list[float]] = {"image_auroc": [], "pixel_auroc": [], "au_pro": []}
            for seed in numbers:
                detector = kizu.PatchCore(**settings, seed=seed).fit(data.select(split="train"))
                metrics = measure(scoring.judge(detector, data.select(split="test")))[0]
                for name, values in found.items():
                    values.append(metrics[name] or 0.0)
            spread = {
                name: f"{statistics.mean(v):.4f} ± {statistics.stdev(v):.4f} ({min(v):.4f} to {max(v):.4f})"
                for name, v in found.items()
            }
            rows.append({"category": category, "settings": label, "seeds": len(numbers), **spread})
            print(rows[-1], flush=True)
    _keep(TARGET.with_name("seeds.csv"), rows)


def _keep(target: Path, rows: list[Row]) -> None:
    lines = [",".join(rows[0]), *(",".join(str(value) for value in row.values()) for row in rows)]
    write_text(target, "\n".join(lines) + "\n")
    print_table(rows)
    print(machine()["summary"])


def patchcore(data: dataset.Dataset, second: str | None) -> Iterator[Row]:
    """One neighbour and five; an ensemble."""
    variants: dict[str, Row] = {"PatchCore; k = 1": {}, "PatchCore; k = 5": {"neighbours": 5}}
    if second:
        name, file = second.split(":")
        taps = ("0.blocks.2", "0.blocks.4", "1.layer2", "1.layer3")
        variants["PatchCore; ensemble"] = {
            "backbone": f"efficientnet_lite2,{name}",
            "weights": f",{file}",
            "layers": taps,
            "target_embed_dimension": 384,
        }
    for label, settings in variants.items():
        detector = kizu.PatchCore(**{**COMMON, **settings}).fit(data.select(split="train")[::4])
        yield from both(label, detector, data)


def simplenet(data: dataset.Dataset) -> Iterator[Row]:
    """The last round by our arithmetic, the best one by the published; and our AU-PRO beside the published PRO."""
    detector = kizu.SimpleNet(**SIMPLE)
    test = data.select(split="test")
    oracle = Oracle(detector, test)
    detector.fit(data.select(split="train")[::4], after_round=oracle.measure_round)
    yield shown("SimpleNet; last round", "ours", scoring.measured("", scoring.judge(detector, test)))
    assert detector.graph is not None
    published = scoring.as_published("", detector, test, pro=True)
    yield shown("SimpleNet; last round", "published; last column PRO", published)
    au_pro = measure(scoring.judge(detector, test))[0]["au_pro"]
    yield {
        "model": "SimpleNet; last round",
        "arithmetic": "our AU-PRO",
        **dict.fromkeys(COLUMNS, ""),
        COLUMNS[2]: cell(au_pro),
    }
    detector.graph.load_state_dict(oracle.state)
    best = scoring.as_published("", detector, test, pro=True)
    yield shown(f"SimpleNet; round {oracle.round} of 10", "published; last column PRO", best)


def both(label: str, detector: Detector, data: dataset.Dataset) -> Iterator[Row]:
    test = data.select(split="test")
    yield shown(label, "ours", scoring.measured("", scoring.judge(detector, test)))
    yield shown(label, "published", scoring.as_published("", detector, test))


def shown(label: str, arithmetic: str, row: scoring.Row) -> Row:
    values = (row.instance_auroc, row.full_pixel_auroc, row.anomaly_pixel_auroc)
    return {"model": label, "arithmetic": arithmetic, **dict(zip(COLUMNS, map(cell, values), strict=True))}


def cell(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.4f}"


if __name__ == "__main__":
    main()
