"""SimpleNet's defaults: accuracy over seeds, and the time of its training against the machine's own rate.

python benchmarks/simplenet.py                                        accuracy, then speed, with the embedded network
python benchmarks/simplenet.py --weights resnet18.pth --no-speed      accuracy with ResNet-18 (layer2, layer3)
python benchmarks/simplenet.py --category bottle --seeds 1 --fresh    one run, whatever was measured before

Accuracy is that of the last round of training, in one setting for all categories; nothing is chosen on test images.
Runs that are in results/simplenet.csv already are not repeated without --fresh.
"""

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import kizu
from accuracy import SHARED
from kizu.cli.terminal import print_table
from kizu.config import SimpleNetConfig, build
from kizu.data import dataset
from kizu.data.files import write_csv
from kizu.data.preprocessing import Stack
from kizu.detectors.fitting import FitContext
from kizu.detectors.simplenet.networks import hinge_loss, noise
from kizu.evaluation.evaluate import evaluate
from kizu.evaluation.experiment import machine, versions

RESULTS = Path(__file__).parent / "results"
CATEGORIES = ("bottle", "pill", "transistor")
MEASURES = ("image_auroc", "pixel_auroc", "au_pro")
KEY = ("backbone", "category", "seed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=SHARED / "mvtec_ad", help="MVTec AD's folder")
    parser.add_argument("--category", action="append", choices=CATEGORIES, help="Repeatable. Default: all.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--weights", help="checkpoint of ResNet-18, to be used instead of the embedded network")
    parser.add_argument("--fresh", action="store_true", help="repeat what was measured before")
    parser.add_argument("--speed", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    if not options.data.is_dir():
        sys.exit(f"There are no images at {options.data}: name MVTec AD's folder with --data")
    settings = (
        {"backbone": "resnet18", "layers": "layer2,layer3", "weights": options.weights} if options.weights else {}
    )
    target = RESULTS / "simplenet.csv"
    rows = measured(target)
    for category in options.category or CATEGORIES:
        for seed in range(options.seeds):
            config = build(SimpleNetConfig, {**settings, "seed": seed})
            key = (config.backbone, category, str(seed))
            if options.fresh or key not in rows:
                rows[key] = accuracy(config, options.data / category)
                write_csv(target, next(iter(rows.values())), (rows[key].values() for key in sorted(rows)))
    print_table([summary(rows, *pair) for pair in sorted({key[:2] for key in rows})])
    if options.speed:
        speeds = speed(options.data / "bottle")
        print_table(speeds)
        write_csv(RESULTS / "simplenet_speed.csv", speeds[0], map(dict.values, speeds))
    print(f"\n{machine()['summary']}; " + ", ".join(f"{name} {value}" for name, value in versions().items()))


def accuracy(config: SimpleNetConfig, folder: Path) -> dict[str, str]:
    data = dataset.find(folder)
    start = time.perf_counter()
    detector = kizu.SimpleNet(config).fit(data.select(split="train"))
    seconds = time.perf_counter() - start
    result = evaluate(detector, data.select(split="test"), category=folder.name, root=data.root)
    values = {name: result.metrics[name] for name in MEASURES}
    row = {
        "backbone": config.backbone,
        "category": folder.name,
        "seed": str(config.seed),
        **{name: "n/a" if value is None else f"{value:.6f}" for name, value in values.items()},
        "defects_stopped": f"{result.count(True, True)} of {result.count(True)}",
        "false_alarms": f"{result.count(False, True)} of {result.count(False)}",
        "fit_seconds": f"{seconds:.1f}",
    }
    print(", ".join(row.values()), file=sys.stderr)
    return row


def summary(rows: dict[tuple[str, str, str], dict[str, str]], backbone: str, category: str) -> dict[str, str]:
    """Mean ± standard deviation over the seeds."""
    runs = [row for key, row in rows.items() if key[:2] == (backbone, category)]
    shown = {"backbone": backbone, "category": category, "seeds": str(len(runs))}
    for name in MEASURES:
        values = [float(run[name]) for run in runs if run[name] != "n/a"]
        spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        shown[name.replace("_", " ")] = f"{statistics.mean(values):.4f}{spread}" if values else "n/a"
    shown["s to fit"] = f"{statistics.mean(float(run['fit_seconds']) for run in runs):.0f}"
    return shown


def speed(folder: Path) -> list[dict[str, str]]:
    """A pass with kept features against one that computes them; steps and prediction against plain matrix products."""
    data = dataset.find(folder)
    detector = kizu.SimpleNet(meta_epochs=1)
    photos, _ = detector.read(data.select(split="train"), 10**9)
    context = FitContext(photos, Stack(0, photos.batch(0, 1).shape[2:], 1), 10**9)
    learned = detector.learn(context)
    graph: Any = learned.graph
    numbers = list(range(learned.facts["images learned from"]))
    store = detector._start(graph, numbers, context)
    config = detector.config
    optimiser = torch.optim.Adam([*graph.projection.parameters(), *graph.discriminator.parameters()], lr=1e-9)
    for module in (graph.projection, graph.discriminator):
        module.train().requires_grad_(True)

    def step(rows: torch.Tensor) -> None:
        good = graph.adapt(rows)
        noisy = good + noise(good, config.noise_std, 1, torch.Generator().manual_seed(0))
        optimiser.zero_grad()
        hinge_loss(graph.discriminator, good, noisy, config.dsc_margin).loss.backward()
        optimiser.step()

    def once(kept: Any) -> None:
        for rows in detector._steps(graph, photos, numbers, kept, 1):
            step(rows)

    kept, computed = best(lambda: once(store), 9), best(lambda: once(None), 2)
    rows = next(iter(detector._steps(graph, photos, numbers, store, 1)))
    width, hidden = graph.projection.width, config.dsc_hidden
    multiplications = width * width + 2 * (width * hidden + hidden)  # of a row: projected once, judged with its copy
    training = 3 * 2 * len(rows) * multiplications / best(lambda: step(rows), 9)
    graph.eval()
    patches = graph.embed(torch.from_numpy(photos.batch(0, 16)))
    flat = patches.flatten(2).transpose(1, 2).flatten(0, 1).contiguous()
    with torch.inference_mode():
        seconds = best(lambda: graph.discriminator(graph.adapt(flat)), 9)
        image = best(lambda: graph(torch.from_numpy(photos.batch(0, 16))), 5) / 16
    judging = 2 * len(flat) * (width * width + width * hidden + hidden) / seconds
    square = torch.randn(2048, 2048)
    limit = 2 * 2048**3 / best(lambda: square @ square, 9)
    return [
        fact("images in a pass", f"{len(numbers)}", ""),
        fact("a pass, features kept", f"{kept:.3f}", "s"),
        fact("a pass, features computed again", f"{computed:.3f}", "s"),
        fact("ratio", f"{computed / kept:.1f}", ""),
        fact("matrix product 2048³", f"{limit / 1e9:.0f}", "GFLOP/s"),
        fact("training step", f"{training / 1e9:.0f}", "GFLOP/s"),
        fact("its share of the matrix product's rate", f"{training / limit:.2f}", ""),
        fact("projection and discriminator alone, predicting", f"{judging / 1e9:.0f}", "GFLOP/s"),
        fact("their share of the matrix product's rate", f"{judging / limit:.2f}", ""),
        fact("projection and discriminator alone, predicting", f"{1000 * seconds / 16:.2f}", "ms / image"),
        fact("whole graph, predicting 16", f"{1000 * image:.2f}", "ms / image"),
    ]


def fact(what: str, value: str, unit: str) -> dict[str, str]:
    return {"what": what, "value": value, "unit": unit}


def best(work: Callable[[], Any], times: int) -> float:
    """The shortest of several times, after one to warm up."""
    work()
    spent = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        spent.append(time.perf_counter() - start)
    return min(spent)


def measured(path: Path) -> dict[tuple[str, str, str], dict[str, str]]:
    if not path.exists():
        return {}
    return {tuple(row[name] for name in KEY): row for row in csv.DictReader(path.read_text().splitlines())}  # type: ignore[misc]


if __name__ == "__main__":
    main()
