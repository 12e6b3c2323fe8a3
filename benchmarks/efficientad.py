"""EfficientAD's inference on a CPU beside anomalib's, and a short training that shows that it learns.

python benchmarks/efficientad.py --anomalib PYTHON                          time per image, PDN-S and PDN-M, 256 × 256
python benchmarks/efficientad.py --learn FOLDER --teacher FILE --steps 1 N  AUROC after one step and after N

PYTHON is the interpreter of an environment that has anomalib (see benchmarks/patchcore.py). Both get the same kind of
networks with random weights, which costs as much as trained ones, and the same 256 × 256 pixels in memory: nothing is
decoded. Each runs in a process of its own, in turns; times are medians over all turns. kizu's `map` border is the
published 56 × 56 network, anomalib's; `picture` is kizu's default with 64 × 64 features.
"""

import argparse
import csv
import io
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kizu.data.files import write_text

HERE = Path(__file__).parent
SIDE = 256
COLUMNS = ("network", "batch", "what", "kizu", "kizu onnxruntime", "anomalib", "ratio", "of convolution rate")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--anomalib", metavar="PYTHON", help="interpreter of an environment with anomalib")
    parser.add_argument("--sizes", nargs="+", choices=["s", "m"], default=["s", "m"])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--learn", type=Path, metavar="FOLDER", help="a category to train on, for a short while")
    parser.add_argument("--teacher")
    parser.add_argument("--steps", nargs="+", type=int, default=[1, 400], help="one training for each")
    parser.add_argument("--precision", default="mixed")
    parser.add_argument("--checkpoint", type=Path, help="state of the short training, to go on from")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(json.loads(options.measure))))
    elif options.learn:
        learn(options)
    else:
        compare(options)


def compare(options: argparse.Namespace) -> None:
    """The table of times."""
    rows = []
    for size in options.sizes:
        job = json.dumps({"size": size, "side": SIDE, "batches": [1, 16]})
        ours, theirs = [], []
        for _ in range(options.turns):
            ours.append(run([sys.executable, str(Path(__file__)), "--measure", job]))
            if options.anomalib:
                theirs.append(run([options.anomalib, str(HERE / "peers" / "anomalib_efficientad.py"), job]))
        for batch in ("1", "16"):
            other = median(theirs, batch)
            for border in ("map", "picture"):
                mine, exported = median(ours, f"{border} {batch}"), median(ours, f"{border} {batch} exported")
                share = operations(size, border) / mine / 1e6 / max(turn["rate"] for turn in ours) if mine else None
                ratio = other / mine if other and mine else None
                rows.append((f"PDN-{size.upper()}", batch, border, mine, exported, other, ratio, share))
    versions = "; ".join(side[0]["version"] for side in (ours, theirs) if side)
    lines = [COLUMNS, *(tuple(cell(value) for value in row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS))]
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())
    print(f"ms per image; ratio: anomalib / kizu in torch. {os.cpu_count()} cores; {versions}")
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([COLUMNS, *([cell(value) for value in row] for row in rows)])
    write_text(options.output or HERE / "results" / "efficientad.csv", table.getvalue())


def run(command: list[str]) -> dict[str, Any]:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    finished = subprocess.run(command, stdout=subprocess.PIPE, env=environment, text=True)
    if finished.returncode:
        sys.exit(f"{command[1]} failed; its own words are above")
    result: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return result


def median(turns: list[dict[str, Any]], key: str) -> float | None:
    values = [value for turn in turns for value in turn.get(key, [])]
    return statistics.median(values) if values else None


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds per image of kizu's graph, in torch and exported; and what plain convolutions reach."""
    import kizu
    from kizu.config import EfficientADConfig
    from kizu.detectors.efficientad.graph import EfficientADGraph
    from kizu.detectors.efficientad.networks import PDN

    result: dict[str, Any] = {"version": f"kizu {kizu.__version__}, torch {torch.__version__}", "rate": rate()}
    for border in ("map", "picture"):
        torch.manual_seed(0)
        graph = (
            EfficientADGraph(EfficientADConfig(network=job["size"], border=border), PDN(job["size"]))
            .eval()
            .requires_grad_(False)
        )
        graph.levels[:, 1] = 1.0
        for batch in job["batches"]:
            images = torch.randint(0, 256, (batch, 3, job["side"], job["side"]), dtype=torch.uint8)
            with torch.inference_mode():
                result[f"{border} {batch}"] = timed(lambda graph=graph, images=images: graph(images), batch)
            if (session := exported(graph, images)) is not None:
                result[f"{border} {batch} exported"] = timed(session, batch)
    return result


def exported(graph: torch.nn.Module, images: torch.Tensor) -> Callable[[], Any] | None:
    """The graph in onnxruntime, where that is installed."""
    try:
        import onnxruntime
    except ModuleNotFoundError:
        return None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "graph.onnx")
        torch.onnx.export(graph, (images,), str(file), dynamo=False)
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(str(file), settings, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: images.numpy()}
    scores, _ = session.run(None, feed)
    with torch.inference_mode():
        np.testing.assert_allclose(scores, graph(images)[0].numpy(), rtol=1e-3)
    return lambda: session.run(None, feed)


def timed(act: Callable[[], object], batch: int) -> list[float]:
    """Milliseconds per image, after two calls to warm up."""
    act()
    act()
    times = []
    for _ in range(max(3, 12 // batch)):
        start = time.perf_counter()
        act()
        times.append(1000 * (time.perf_counter() - start) / batch)
    return times


def rate() -> float:
    """Floating-point operations a second of the largest convolution alone, in the faster of both memory layouts."""
    layer = torch.nn.Conv2d(256, 384, 4).eval().requires_grad_(False)
    features = torch.randn(4, 256, 59, 59)
    count = 2 * 4 * 56 * 56 * 384 * 256 * 16
    best = math.inf
    with torch.inference_mode():
        for layout in (torch.contiguous_format, torch.channels_last):
            laid_out = features.contiguous(memory_format=layout)
            best = min(best, *timed(lambda laid_out=laid_out: layer(laid_out), 1))
    return count / best * 1000


def operations(size: str, border: str) -> float:
    """Operations of teacher and student for an image (the autoencoder's few per cent left out), times 1e9 / s → ms."""
    from kizu.detectors.efficientad.networks import FRAME, KERNELS, PDN

    total = 0
    for network in (PDN(size), PDN(size, 768)):  # type: ignore[arg-type]
        side = SIDE + (sum(FRAME) if border == "picture" else 0)
        for number, (layer, kernel) in enumerate(zip(network.layers, KERNELS[size], strict=True)):  # type: ignore[index]
            side = side - kernel + 1
            total += 2 * side**2 * layer.weight.numel()
            side = side // 2 if number < 2 else side
    return total * 1e9


def learn(options: argparse.Namespace) -> None:
    """AUROC of detectors trained for so many steps each, on the test images of a category."""
    import kizu
    from kizu.data import dataset
    from kizu.evaluation.evaluate import evaluate

    data = dataset.find(options.learn)
    category = data.categories[0]
    train, test = data.select(category, "train"), data.select(category, "test")
    rows = []
    for steps in options.steps:
        detector = kizu.EfficientAD(teacher=options.teacher, steps=steps, precision=options.precision)
        start = time.perf_counter()
        detector.fit(train, checkpoint=options.checkpoint if steps == max(options.steps) else None)
        seconds = time.perf_counter() - start
        result = evaluate(detector, test, category=category, root=data.root)
        rows.append(
            (steps, seconds, result.metrics["image_auroc"], result.metrics["pixel_auroc"], detector.facts["loss"])
        )
        print(f"{steps} steps, {seconds:.0f} s: image AUROC {rows[-1][2]}, pixel AUROC {rows[-1][3]}, {rows[-1][4]}")
    if options.output:
        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(["category", "steps", "image_auroc", "pixel_auroc"])
        writer.writerows((category, steps, image, pixel) for steps, _, image, pixel, _ in rows)
        write_text(options.output, table.getvalue())


def cell(value: object) -> str:
    if not isinstance(value, float):
        return "n/a" if value is None else str(value)
    return f"{value:.3g}" if value < 10 else f"{value:.0f}"


if __name__ == "__main__":
    main()
