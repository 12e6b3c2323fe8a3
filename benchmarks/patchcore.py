"""kizu's PatchCore beside anomalib's: time, memory, accuracy, and how far each is from the machine's own limits.

python benchmarks/patchcore.py --anomalib PYTHON                     1 % and 10 % of MVTec AD's bottle
python benchmarks/patchcore.py --category pill --coreset 0.1         kizu alone
python benchmarks/patchcore.py --anomalib PYTHON --quick             a few images, a minute or two

PYTHON is the interpreter of an environment that has anomalib, made outside of this project:

    python3.11 -m venv ~/anomalib && ~/anomalib/bin/pip install anomalib==2.7.0 torch torchvision

Both learn from the same files with the same ResNet-18 weights (layer2, layer3), 256 × 256 input, share of patches kept
and scores (the paper's, with Eq. 7 over nine neighbours); everything else is each library's default. Each runs on the
CPU in a process of its own, one after the other.
Linux only: memory is read from /proc.
"""

import argparse
import csv
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor
from torch.nn import functional as F

from kizu.data import dataset, image
from kizu.data.files import write_text
from kizu.data.sample import Sample
from kizu.detectors.patchcore.coreset import select
from kizu.detectors.patchcore.nearest import nearest

HERE = Path(__file__).parent
DATA = Path(os.environ.get("KIZU_TEST_DATA", HERE.parents[1] / "shared" / "data"))
WEIGHTS = DATA.parent / "weights" / "resnet18_tv_in1k_layer123.pth"
LAYERS = ("layer2", "layer3")
DIMENSION = 384  # channels of both layers
ALIKE = {"fusion": "stack", "local_scale": False, "top": 0, "reweight": 9}  # the paper's scores, as the peer has them
REPEATED_IMAGES = 160  # prediction in batches is timed over at least this many
QUICK_IMAGES = 20


@dataclass(frozen=True)
class Row:
    """One line of the table; ratio is anomalib / kizu, or the share of a limit."""

    category: str
    coreset: str
    measure: str
    unit: str
    kizu: float | None
    anomalib: float | None = None
    ratio: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Machine:
    """What plain torch operations reach here: single-precision operations and bytes in a second."""

    flops: float
    bandwidth: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--category", action="append", help="a folder, or a name below mvtec_ad; repeatable")
    parser.add_argument("--coreset", nargs="+", type=float, default=[0.01, 0.1], help="shares of the patches kept")
    parser.add_argument("--anomalib", metavar="PYTHON", help="interpreter of an environment with anomalib")
    parser.add_argument("--extrapolate", type=int, default=500, metavar="N", help="picks of anomalib's to time at most")
    parser.add_argument("--full", action="store_true", help="let anomalib make all its picks, however long it takes")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="checkpoint of ResNet-18 up to layer3")
    parser.add_argument("--quick", action="store_true", help="a few images; writes no file unless --output is given")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure_kizu(json.loads(options.measure))))
        return
    if not options.weights.is_file():
        sys.exit(f"There are no weights at {options.weights}: name a file with --weights")
    if options.extrapolate < 2:
        sys.exit("--extrapolate needs at least 2 picks to draw a line through")
    busy = os.getloadavg()[0]
    machine = limits()
    rows = [
        Row("machine", "", "matrix product 2048³", "GFLOP/s", machine.flops / 1e9),
        Row("machine", "", "copy, read and written", "GB/s", machine.bandwidth / 1e9),
        search_alone(machine),
    ]
    for name in options.category or ["bottle"]:
        rows += compare(folder_of(name), machine, options)
    show(rows, options)
    if options.quick:
        print("So few images say nothing of a category's times and memory.")
    if busy > 0.5:
        print(f"The machine was busy with something else at the start (load {busy:.1f}): these times are no claims.")
    output = options.output or (None if options.quick else HERE / "results" / "patchcore.csv")
    if output:
        write_text(output, as_csv(rows))


def folder_of(name: str) -> Path:
    for folder in (Path(name), DATA / "mvtec_ad" / name):
        if folder.is_dir():
            return folder
    sys.exit(f"{name} is neither a folder nor a category at {DATA / 'mvtec_ad'}")


def compare(category: Path, machine: Machine, options: argparse.Namespace) -> Iterator[Row]:
    """Both libraries on one category at every share, then the coreset's quality."""
    data = dataset.find(category)
    train, test = data.select(data.categories[0], "train"), data.select(data.categories[0], "test")
    if options.quick:
        train, test = spread(train, QUICK_IMAGES), spread(test, QUICK_IMAGES)
    for share in options.coreset:
        with tempfile.TemporaryDirectory() as scratch:
            samples = lay_out(train, test, Path(scratch, "images"))
            job = {
                "folder": str(Path(scratch, "images")),
                "weights": str(options.weights.resolve()),
                "coreset": share,
                "extrapolate": options.extrapolate,
                "full": options.full,
            }
            ours = run([sys.executable, str(Path(__file__)), "--measure"], job, samples)
            theirs = None
            if options.anomalib:
                theirs = run([options.anomalib, str(HERE / "peers" / "anomalib_patchcore.py")], job, samples)
        yield from compared(category.name, f"{share:g}", ours, theirs)
        yield from against_limits(category.name, f"{share:g}", ours, machine)
    versions = "; ".join(side["version"] for side in (ours, theirs) if side)
    yield exactness(category.name, train, options)
    yield Row(category.name, "", "versions", "", None, note=versions)


def lay_out(train: Sequence[Sample], test: Sequence[Sample], folder: Path) -> dict[str, Sample]:
    """Copy the images to train/good, test/good and test/defect. Returns the test samples in order of their copies."""
    copies: dict[str, Sample] = {}
    for index, sample in enumerate([*train, *test]):
        kind = "defect" if sample.is_anomalous else "good"
        target = folder / sample.split / kind / f"{index:05d}{sample.path.suffix}"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(sample.path, target)
        if sample.split == "test":
            copies[str(target)] = sample
    return {path: copies[path] for path in sorted(copies)}


def spread(samples: Sequence[Sample], count: int) -> list[Sample]:
    """At most `count` of them, from the whole range."""
    return [samples[int(index)] for index in np.linspace(0, len(samples) - 1, min(count, len(samples)))]


def run(command: list[str], job: dict[str, Any], samples: dict[str, Sample]) -> dict[str, Any]:
    """Measure in a process of its own; add the accuracy from the scores and maps that it leaves."""
    with tempfile.TemporaryDirectory() as scratch:
        judged = Path(scratch, "judged.npz")
        finished = subprocess.run(
            [*command, json.dumps(job | {"judged": str(judged)})],
            stdout=subprocess.PIPE,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
            text=True,
        )
        if finished.returncode:
            sys.exit(f"{command[1]} failed; its own words are above")
        result: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
        if judged.exists():
            with np.load(judged) as outcome:
                result |= accuracy(outcome["scores"], outcome["maps"], list(samples.values()))
    return result


def accuracy(scores: Any, maps: Any, samples: Sequence[Sample]) -> dict[str, float | None]:
    """AUROC of images, and of pixels at the photographs' own resolution."""
    from sklearn.metrics import roc_auc_score  # after the processes that are measured have started without it

    labels = [sample.is_anomalous for sample in samples]
    values: dict[str, float | None] = {"image_auroc": float(roc_auc_score(labels, scores)), "pixel_auroc": None}
    pixels, truth = [], []
    for sample, values_of in zip(samples, maps, strict=True):
        mask = sample.mask(image.read(sample.path).shape[:2])
        if mask is not None:
            pixels.append(image.resize_map(values_of, mask.shape).ravel())
            truth.append(mask.ravel())
    if any(part.any() for part in truth):
        values["pixel_auroc"] = float(roc_auc_score(np.concatenate(truth), np.concatenate(pixels)))
    return values


def memory(field: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def measure_kizu(job: dict[str, Any]) -> dict[str, Any]:
    """What one process says of kizu; peers/anomalib_patchcore.py says the same of anomalib."""
    bare = memory("VmRSS")
    import kizu
    from kizu.detectors.ram import allow_tuning

    allow_tuning()  # as the command line does
    detector = kizu.PatchCore(
        backbone="resnet18", layers=LAYERS, weights=job["weights"], size=256, coreset=job["coreset"], **ALIKE
    )
    folder = Path(job["folder"])
    start = time.perf_counter()
    detector.fit(sorted(Path(folder, "train", "good").iterdir()))
    seconds = detector.seconds | {"fit": time.perf_counter() - start}
    files = sorted(Path(folder, "test").rglob("*.*"))
    result = {
        "seconds": seconds,
        "predict_1": statistics.median(one_by_one(detector.predict, files)),
        "predict_16": statistics.median(in_batches(detector, folder)),
        "memory": memory("VmHWM") - bare,
        "radius": detector.facts["radius"][0],
        "bank": detector.facts["bank"][0],
        "patches": detector.facts["patches"][0],
        "version": f"kizu {kizu.__version__}, torch {torch.__version__}, timm {timm.__version__}",
    }
    predictions = [detector.predict(file) for file in files]
    maps = np.stack([prediction.input_map for prediction in predictions])
    np.savez(job["judged"], scores=[prediction.score for prediction in predictions], maps=maps)
    return result


def one_by_one(predict: Callable[[Path], object], files: Sequence[Path]) -> Iterator[float]:
    """Seconds for each image, decoding included, after three to warm up."""
    for file in files[:3]:
        predict(file)
    for file in files:
        start = time.perf_counter()
        predict(file)
        yield time.perf_counter() - start


def in_batches(detector: Any, folder: Path) -> Iterator[float]:
    """Seconds an image, for each full batch of 16 but the first, while threads decode ahead."""
    samples = dataset.find(folder).select(split="test")
    repeated = samples * -(-REPEATED_IMAGES // len(samples))
    last = None
    for index, _ in enumerate(detector.judge(repeated, batch_size=16)):
        if index % 16 or len(repeated) - index < 16:
            continue
        now = time.perf_counter()  # all 16 of a batch come at the moment of its first
        if last is not None:
            yield (now - last) / 16
        last = now


def compared(category: str, share: str, ours: dict[str, Any], theirs: dict[str, Any] | None) -> Iterator[Row]:
    """Kizu beside anomalib: seconds, memory, accuracy, cover radius."""
    peer = theirs or {"seconds": {}, "extrapolated": False}
    guessed = "anomalib: extrapolated from its first picks" if peer["extrapolated"] else ""
    notes = {"features": "anomalib: decoding included", "coreset": guessed}
    notes["calibration"] = "anomalib: none without labelled images"
    notes["fit"] = guessed or "anomalib: no calibration"
    for stage in ("decode", "features", "coreset", "calibration", "fit"):
        mine, other = ours["seconds"].get(stage), peer["seconds"].get(stage)
        alike = stage in ("coreset", "fit")
        note = notes.get(stage, "") if theirs else ""
        yield Row(category, share, stage, "s", mine, other, quotient(other, mine) if alike else None, note)
    together = ours["seconds"]["decode"] + ours["seconds"]["features"]
    other = peer["seconds"].get("features")
    yield Row(category, share, "decode + features", "s", together, other, quotient(other, together))
    for size in (1, 16):
        mine, other = 1e3 * ours[f"predict_{size}"], scaled(peer.get(f"predict_{size}"), 1e3)
        yield Row(category, share, f"predict, batch {size}", "ms / image", mine, other, quotient(other, mine))
    mine, other = 1e3 * ours["predict_1"], scaled(peer.get("predict_engine"), 1e3)
    note = "anomalib: Engine.predict, an image at a time" if theirs else ""
    yield Row(category, share, "predict, as users call it", "ms / image", mine, other, quotient(other, mine), note)
    mine, other = ours["memory"], peer.get("memory")
    note = "anomalib: without its loader's processes" if theirs else ""
    yield Row(category, share, "memory above torch + timm", "MiB", mine, other, quotient(other, mine), note)
    radius = ours["radius"], peer.get("radius")
    yield Row(category, share, "cover radius", "", *radius, quotient(*reversed(radius)))
    yield Row(category, share, "bank", "entries", ours["bank"], peer.get("bank"))
    for measure in ("image_auroc", "pixel_auroc"):
        yield Row(
            category, share, measure.replace("_", " ").replace("auroc", "AUROC"), "", ours[measure], peer.get(measure)
        )


def against_limits(category: str, share: str, ours: dict[str, Any], machine: Machine) -> Iterator[Row]:
    """The operations of the coreset's and the calibration's distances, over the seconds of the stage."""
    for stage in ("coreset", "calibration"):
        operations = 2 * ours["patches"] * ours["bank"] * DIMENSION
        rate = operations / ours["seconds"][stage]
        note = "of the matrix product's rate"
        yield Row(category, share, f"{stage}: distances", "GFLOP/s", rate / 1e9, None, rate / machine.flops, note)


def limits() -> Machine:
    """The best of several: a matrix product, and a copy too large for any cache."""
    square = torch.randn(2048, 2048)
    product = min(timings(lambda: square @ square, 10))
    source = torch.ones(2**26)
    target = torch.empty_like(source)
    copy = min(timings(lambda: target.copy_(source), 10))
    return Machine(2 * 2048**3 / product, 2 * source.nbytes / copy)


def search_alone(machine: Machine) -> Row:
    """The search alone: one image's worth of queries in a bank of 20,000 random entries."""
    generator = torch.Generator().manual_seed(0)
    queries, bank = (
        torch.randn(1024, DIMENSION, generator=generator),
        torch.randn(20_000, DIMENSION, generator=generator),
    )
    half_norms = bank.square().sum(1) / 2
    with torch.inference_mode():
        seconds = statistics.median(timings(lambda: nearest(queries, bank, half_norms=half_norms), 15))
    rate = 2 * 1024 * 20_000 * DIMENSION / seconds
    measure = "search, 1,024 in 20,000 × 384"
    return Row(
        "machine", "", measure, "GFLOP/s", rate / 1e9, None, rate / machine.flops, "of the matrix product's rate"
    )


def timings(act: Callable[[], object], count: int) -> list[float]:
    """Seconds of each of `count` calls after one to warm up."""
    act()
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        act()
        seconds.append(time.perf_counter() - start)
    return seconds


def exactness(category: str, train: Sequence[Sample], options: argparse.Namespace) -> Row:
    """kizu's coreset against the plain greedy loop from the same first pick, on real patches."""
    wanted, share = (5_000 if options.quick else 20_000), 0.02
    rows = patches(spread(train, 32), options.weights)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:wanted]]
    count = int(share * len(rows))
    chosen = select(rows, count, "k_center").indices.cpu()
    mine, plain = cover_radius(rows, chosen), cover_radius(rows, plain_greedy(rows, int(chosen[0]), count))
    note = f"of plain greedy's, {len(rows):,} patches × {share:g}"
    return Row(category, f"{share:g}", "cover radius, sample", "", mine, None, mine / plain, note)


def patches(samples: Sequence[Sample], weights: Path) -> Tensor:
    """Patch features (N, 384) by plain timm and torch."""
    network = timm.create_model("resnet18", features_only=True, out_indices=(2, 3)).eval()
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    rows = []
    with torch.inference_mode():
        for sample in samples:
            pixels = torch.from_numpy(image.resize(image.read(sample.path), (256, 256)).copy()).permute(2, 0, 1) / 255
            fine, coarse = (F.avg_pool2d(layer, 3, 1, 1) for layer in network(((pixels - mean) / std)[None]))
            coarse = F.interpolate(coarse, fine.shape[-2:], mode="bilinear")
            rows.append(torch.cat([fine, coarse], 1)[0].flatten(1).T)
    return torch.cat(rows)


def plain_greedy(rows: Tensor, first: int, count: int) -> Tensor:
    """k-centre as it is written down: the farthest row, again and again."""
    picks = [first]
    distances = (rows - rows[first]).norm(dim=1)
    while len(picks) < count:
        picks.append(int(distances.argmax()))
        distances = torch.minimum(distances, (rows - rows[picks[-1]]).norm(dim=1))
    return torch.tensor(picks)


def cover_radius(rows: Tensor, chosen: Tensor) -> float:
    return max(float(torch.cdist(part, rows[chosen]).amin(1).max()) for part in torch.split(rows, 4096))


def quotient(top: float | None, bottom: float | None) -> float | None:
    return top / bottom if top is not None and bottom else None


def scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def show(rows: Sequence[Row], options: argparse.Namespace) -> None:
    from kizu.evaluation import experiment as kizu_run

    header = ("category", "coreset", "measure", "unit", "kizu", "anomalib", "ratio", "note")
    lines = [header, *(tuple(cell(value) for value in asdict(row).values()) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())
    print(f"\n{kizu_run.machine()['summary']}, {torch.get_num_threads()} threads. ", end="")
    print("Ratio: anomalib / kizu where both are measured. anomalib's set-up and checkpoint are not timed.")
    if not options.anomalib:
        print("Without --anomalib PYTHON there is nothing to compare with: no ratios.")
    elif not options.full:
        print(f"anomalib's coresets of more than {options.extrapolate} picks are extrapolated: the first")
        print("are timed in its own loop, all cost the same; its bank is then filled with random patches,")
        print("so that prediction is timed at the right size, and has no accuracy. --full makes all picks.")


def cell(value: object) -> str:
    if value is None:
        return "n/a"
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.4g}"


def as_csv(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(field.name for field in fields(Row))
    for row in rows:
        values = asdict(row).values()
        writer.writerow(
            "n/a" if value is None else f"{value:.6g}" if isinstance(value, float) else value for value in values
        )
    return text.getvalue()


if __name__ == "__main__":
    main()
