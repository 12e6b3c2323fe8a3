"""Exported models: do they say what torch says, and how fast; beside anomalib's own OpenVINO export.

python benchmarks/runtime.py --anomalib PYTHON      both tables
python benchmarks/runtime.py --only parity          50 photographs a method, torch, onnxruntime, OpenVINO
python benchmarks/runtime.py --only speed           milliseconds and photographs a second, decoding included

PYTHON is the interpreter of an environment that has anomalib, openvino, onnx and onnxscript (see
benchmarks/patchcore.py).

Speed: kizu's PatchCore on the embedded network at 256 × 256, from a file's name to score and map, one photograph after
the other (1), or 16 in a batch while threads decode ahead (16). Everything runs in processes of its own, in turns; each
figure is the median of a turn, and the best turn counts, since what else runs on a machine only ever slows it down.
"plain torch" is the exported graph run by torch as it is written: batch normalisation by itself, the default memory
layout, every patch compared with every entry. "torch" is what kizu runs: folded, channels last, a search in cells.
On ResNet-18, kizu's export and anomalib's have the same weights, the same number of entries and the paper's scores.
anomalib's graph takes two images at a time and no other number, so it is timed so, and halved.
"""

import argparse
import csv
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kizu.data.files import write_text

HERE = Path(__file__).parent
DATA = Path(os.environ.get("KIZU_TEST_DATA", HERE.parents[1] / "shared" / "data"))
WEIGHTS = DATA.parent / "weights" / "resnet18_tv_in1k_layer123.pth"
LAYERS = ("layer2", "layer3")
ALIKE = {"fusion": "stack", "local_scale": False, "top": 0, "reweight": 9}  # the paper's scores, as the peer has them
SIZE = 256
SHOWN = 50  # photographs whose outcomes are compared
TIMED = 24  # photographs of a turn, one by one
REPEATED = 64  # and in batches
STEPS = 12  # of EfficientAD: parity does not depend on how well it learned
PARITY = ("method", "runtime", "photographs", "score", "verdicts", "map_peak_pixels", "map")
SPEED = ("network", "runtime", "batch", "ms_per_image", "images_per_second", "against_plain_torch", "note")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["parity", "speed"])
    parser.add_argument("--methods", nargs="+", default=["patchcore", "simplenet", "efficientad", "puad"])
    parser.add_argument(
        "--category", type=Path, default=DATA / "mvtec_ad" / "bottle", help="a folder in MVTec's layout"
    )
    parser.add_argument("--anomalib", metavar="PYTHON", help="interpreter of an environment with anomalib")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="checkpoint of ResNet-18 up to layer3")
    parser.add_argument("--models", type=Path, help="keep the models in this folder, or take them from there")
    parser.add_argument("--networks", nargs="+", default=["embedded", "resnet18"], help="of the times")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--output", type=Path, default=HERE / "results")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(json.loads(options.measure))))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.models or Path(scratch)
        if options.only != "speed":
            rows = [row for method in options.methods for row in parity(method, folder, options.category)]
            show(PARITY, rows, options.output / "runtime_parity.csv")
        if options.only != "parity":
            show(SPEED, list(speed(folder, options)), options.output / "runtime.csv")
            print(f"{os.cpu_count()} cores; load at the end {os.getloadavg()[0]:.1f}")


def model(name: str, folder: Path, category: Path, weights: Path | None = None) -> Path:
    """A trained model's folder, made where it is not there yet."""
    import torch

    import kizu
    from kizu.detectors import detector_class
    from kizu.detectors.efficientad import teacher
    from kizu.detectors.efficientad.networks import PDN

    if (folder / name / "model.json").exists():
        return folder / name
    good = sorted((category / "train" / "good").iterdir())
    settings: dict[str, Any] = {"size": SIZE}
    if name == "efficientad":
        torch.manual_seed(0)
        teacher.save(folder / "teacher.safetensors", PDN("s"), {"made for": "parity"})
        settings |= {"teacher": str(folder / "teacher.safetensors"), "steps": STEPS}
        good = good[:60]
    if name == "resnet18":
        settings |= {"backbone": name, "layers": LAYERS, "weights": str(weights), "sampler": "random", **ALIKE}
        detector: Any = kizu.PatchCore(**settings)
    else:
        detector = detector_class(name)(**settings)
    saved: Path = detector.fit(good).save(folder / name)
    return saved


def exported(trained: Path, to: str, category: Path, precision: str = "float32") -> Path:
    """An exported model's folder beside the trained one, made where it is not there yet."""
    from kizu.detectors.loading import load
    from kizu.export.onnx import export

    folder = trained.with_name(f"{trained.name}-{to}-{precision}")
    if not (folder / "model.json").exists():
        photographs = [] if precision == "float32" else sorted((category / "train" / "good").iterdir())
        export(load(trained), folder, to, precision=precision, photographs=photographs)  # type: ignore[arg-type]
    return folder


def parity(method: str, folder: Path, category: Path) -> Iterator[tuple[object, ...]]:
    """Outcomes of the exported models against torch's, photograph by photograph. Differences as they come, no floor."""
    import kizu

    trained = model(method, folder, category)
    every = sorted((category / "test").rglob("*.*"))
    files = [every[int(number)] for number in np.linspace(0, len(every) - 1, SHOWN)]
    truth = [kizu.load(trained).predict(file) for file in files]
    yield method, "torch", len(files), 0.0, 0, 0, 0.0
    for to, name in (("onnx", "onnxruntime"), ("openvino", "OpenVINO")):
        runtime = kizu.load(exported(trained, to, category))
        found = [runtime.predict(file) for file in files]
        pairs = list(zip(found, truth, strict=True))
        off = max(abs(one.score - other.score) / abs(other.score) for one, other in pairs)
        changed = sum(one.is_anomalous != other.is_anomalous for one, other in pairs)
        moved = max(int(np.abs(peak(one) - peak(other)).max()) for one, other in pairs)
        maps = max(float(np.abs(a.input_map - b.input_map).max() / np.abs(b.input_map).max()) for a, b in pairs)
        yield method, name, len(files), off, changed, moved, maps


def peak(prediction: Any) -> Any:
    """Row and column of the maximum of the map over the network's input."""
    return np.array(np.unravel_index(prediction.input_map.argmax(), prediction.input_map.shape))


def speed(folder: Path, options: argparse.Namespace) -> Iterator[tuple[object, ...]]:
    """Rows of times: the embedded network, then ResNet-18 beside anomalib."""
    category = options.category
    files = [str(file) for file in sorted((category / "test").rglob("*.*"))[:TIMED]]
    embedded = model("patchcore", folder, category)
    jobs: dict[tuple[str, str, int], dict[str, Any]] = {}
    for batch in (1, 16):
        jobs["embedded", "plain torch", batch] = {"model": str(embedded), "plain": True}
        jobs["embedded", "torch", batch] = {"model": str(embedded)}
        for to, precision, name in (
            ("onnx", "float32", "onnxruntime"),
            ("openvino", "float32", "OpenVINO"),
            ("onnx", "int8", "onnxruntime int8"),
        ):
            jobs["embedded", name, batch] = {"model": str(exported(embedded, to, category, precision))}
    if options.weights.is_file():
        resnet = model("resnet18", folder, category, options.weights)
        jobs["resnet18", "onnxruntime", 1] = {"model": str(exported(resnet, "onnx", category))}
        jobs["resnet18", "OpenVINO", 1] = {"model": str(exported(resnet, "openvino", category))}
        if options.anomalib:
            jobs |= anomalib_jobs(resnet, options)
    jobs = {key: job for key, job in jobs.items() if key[0] in options.networks}
    times: dict[tuple[str, str, int], list[float]] = {key: [] for key in jobs}
    for _ in range(options.turns):
        for (network, name, batch), job in jobs.items():
            command = [sys.executable, str(Path(__file__)), "--measure"]
            if "anomalib" in name:
                command = [options.anomalib, str(HERE / "peers" / "anomalib_openvino.py")]
            times[network, name, batch].append(run(command, job | {"files": files, "batch": batch})["seconds"])
    best = {key: min(turns) for key, turns in times.items()}
    for (network, name, batch), seconds in best.items():
        plain = best.get((network, "plain torch", batch))
        spread = f"turns {', '.join(f'{1000 * turn:.1f}' for turn in times[network, name, batch])}"
        yield network, name, batch, 1000 * seconds, 1 / seconds, plain and plain / seconds, spread


def anomalib_jobs(resnet: Path, options: argparse.Namespace) -> dict[tuple[str, str, int], dict[str, Any]]:
    """Have anomalib export the same network with as many entries; what is to be timed of it."""
    folder = resnet.with_name("anomalib")
    if not any(folder.rglob("model.xml")):
        folder.mkdir(exist_ok=True)
        entries = json.loads((resnet / "model.json").read_text())["facts"]["bank"][0]
        train = [str(file) for file in sorted((options.category / "train" / "good").iterdir())[:30]]
        job = {"folder": str(folder), "train": train, "weights": str(options.weights.resolve()), "entries": entries}
        run([options.anomalib, str(HERE / "peers" / "anomalib_openvino.py")], job)
    return {
        ("resnet18", f"anomalib's OpenVINO, {precision}", 1): {"folder": str(folder), "precision": precision}
        for precision in ("default", "f32")
    }


def run(command: list[str], job: dict[str, Any]) -> dict[str, Any]:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    finished = subprocess.run([*command, json.dumps(job)], stdout=subprocess.PIPE, env=environment, text=True)
    if finished.returncode:
        sys.exit(f"{command[1]} failed; its own words are above")
    result: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return result


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds for each photograph, in this process."""
    import kizu

    detector = kizu.load(job["model"])
    if job.get("plain"):
        make_plain(detector)
    files = [Path(file) for file in job["files"]]
    if job["batch"] == 1:
        return {"seconds": statistics.median(one_by_one(detector, files))}
    return {"seconds": statistics.median(in_batches(detector, files, job["batch"]))}


def one_by_one(detector: Any, files: Sequence[Path]) -> Iterator[float]:
    """Seconds for each photograph, decoding included, after three to warm up."""
    for file in files[:3]:
        detector.predict(file)
    for file in files:
        start = time.perf_counter()
        detector.predict(file)
        yield time.perf_counter() - start


def in_batches(detector: Any, files: Sequence[Path], batch: int) -> Iterator[float]:
    """Seconds a photograph, for each batch but the first, while threads decode ahead."""
    from kizu import Photo

    photos = [Photo(files[number % len(files)]) for number in range(REPEATED)]
    last = None
    for number, _ in enumerate(detector.judge(photos, batch_size=batch)):
        if number % batch:
            continue
        now = time.perf_counter()  # all of a batch come at the moment of its first
        if last is not None:
            yield (now - last) / batch
        last = now


def make_plain(detector: Any) -> None:
    """Undo what kizu does for speed in torch: folding, memory layout, cells."""
    from kizu.detectors.patchcore import memory_bank as bank
    from kizu.features import backbone

    class Plain(backbone.Backbone):
        def forward(self, images: Any) -> Any:
            maps = self.network((images.float() - self.mean) / self.std)
            return [maps[index] for index in self.order]

    config = detector.config
    network = Plain(config.backbone, config.layers, config.size)
    backbone._load(network.network, backbone._embedded(config.backbone), config.backbone)
    detector.graph.backbone = network.eval().requires_grad_(False)
    bank._is_exported = lambda: True  # the search as it is exported


def show(columns: Sequence[str], rows: Iterable[Sequence[object]], target: Path) -> None:
    """Print a table and write it."""
    lines = [tuple(columns), *(tuple(cell(value) for value in row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(columns))]
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows(lines)
    write_text(target, table.getvalue())


def cell(value: object) -> str:
    if not isinstance(value, float):
        return "" if value is None else str(value)
    return f"{value:.1e}" if 0 < value < 0.01 else f"{value:.4g}"


if __name__ == "__main__":
    main()
