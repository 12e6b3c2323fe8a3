"""Which photographs are refused as taken otherwise: bad captures, other good photographs, defective parts.

python benchmarks/captures.py                 bottle, pill, transistor, magnetic tile and juice bottle
python benchmarks/captures.py DATA…
python benchmarks/captures.py --quick         a rendered category

What good photographs have in common is learned from a category's training images (`kizu.calibration.captures`), and
from 10 to 100 of all good ones in random splits. Eight kinds of bad captures are made of the good test photographs: out
of focus, too dark, too bright, in fog, the camera moved by a seventh of the frame, another category's photograph, an
empty place, red and blue exchanged (of grey categories a warm light).
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from accuracy import present
from kizu.calibration.captures import Capture, Captures
from kizu.cli.terminal import print_table
from kizu.data import dataset, demo
from kizu.data.files import write_csv
from kizu.data.preprocessing import Preprocessing, batches
from kizu.evaluation.experiment import machine

RESULTS = Path(__file__).parent / "results"
SIZE = (320, 320)
LEARNED, SPLITS = (10, 20, 50, 100), 10
Pixels = npt.NDArray[np.uint8]  # (H, W, 3)
Captured = tuple[npt.NDArray[np.uint8], tuple[int, int]]  # (3, h, w) as the network sees it, (height, width) as taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="*")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folders = options.data or ([demo.render(scratch)] if options.quick else present())
        categories = [captured(dataset.find(Path(folder)), name) for folder in folders for name in names(folder)]
    table = [
        row
        for number, category in enumerate(categories)
        for row in rows(category, categories[(number + 1) % len(categories)])
    ]
    print_table(table)
    print(f"\n{machine()['summary']}")
    if not options.quick:
        write_csv(RESULTS / "captures.csv", table[0], map(dict.values, table))


def names(folder: str | Path) -> Sequence[str]:
    return list(dataset.find(Path(folder)).categories)


def captured(data: dataset.Dataset, category: str) -> dict[str, Any]:
    """All photographs of a category."""
    samples = data.select(category)
    kinds = {
        "train": [s for s in samples if s.split == "train"],
        "good": [s for s in samples if s.split == "test" and not s.is_anomalous],
        "defective": [s for s in samples if s.is_anomalous],
    }
    photos = {
        kind: [
            (pixels, shape)
            for batch in batches(chosen, Preprocessing(SIZE))
            for pixels, shape in zip(batch.pixels, batch.shapes, strict=True)
        ]
        for kind, chosen in kinds.items()
    }
    return {"name": category, **photos}


def rows(category: dict[str, Any], other: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Of each kind of photographs how many are refused, and the most frequent reason."""
    captures = Captures.learned(Capture.of(*photo) for photo in category["train"])
    for kind in ("good", "defective"):
        yield row(category["name"], f"{kind}, as taken", [captures.reason(*photo) for photo in category[kind]])
    every, rng = [*category["train"], *category["good"]], np.random.default_rng(0)
    for count in LEARNED:
        reasons = []
        for _ in range(SPLITS):
            order = rng.permutation(len(every))
            few = Captures.learned(Capture.of(*every[number]) for number in order[:count])
            reasons += [few.reason(*every[number]) for number in order[count : count + 50]]
        yield row(category["name"], f"other good ones, learned from {count}", reasons)
    spoilt: dict[str, list[str]] = {}
    for number, (pixels, shape) in enumerate(category["good"]):
        photo = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
        for kind, worse in bad_captures(photo, rng):
            spoilt.setdefault(kind, []).append(captures.reason(np.ascontiguousarray(worse.transpose(2, 0, 1)), shape))
        if other is not category:
            foreign = other["good"][number % len(other["good"])][0]
            spoilt.setdefault("another part", []).append(captures.reason(foreign, shape))
    for kind, reasons in spoilt.items():
        yield row(category["name"], kind, reasons)


def bad_captures(photo: Image.Image, rng: np.random.Generator) -> Iterator[tuple[str, Pixels]]:
    """Kinds of bad captures, and how a photograph looks so."""
    pixels = np.asarray(photo)
    height, width = pixels.shape[:2]
    yield "out of focus", np.asarray(photo.filter(ImageFilter.GaussianBlur(2.5)))
    yield "too dark", (0.4 * pixels).astype(np.uint8)
    yield "too bright", (1.7 * pixels + 20).clip(0, 255).astype(np.uint8)
    yield "in fog", (0.5 * pixels + 100).clip(0, 255).astype(np.uint8)
    yield "moved", np.roll(pixels, (height // 7, -(width // 7)), (0, 1))
    background = np.median(pixels[: height // 16], axis=(0, 1))
    yield "empty", (background + rng.normal(0, 3, pixels.shape)).clip(0, 255).astype(np.uint8)
    means = pixels.mean((0, 1))
    grey = np.ptp(means) < 6
    yield "other colours", (pixels * [1.25, 1, 0.75]).clip(0, 255).astype(np.uint8) if grey else pixels[..., ::-1]


def row(category: str, kind: str, reasons: Sequence[str]) -> dict[str, Any]:
    told = [reason.split(" (")[0] for reason in reasons if reason]
    most = max(set(told), key=told.count) if told else ""
    return {"category": category, "photographs": kind, "refused": f"{len(told)} of {len(reasons)}", "reason": most}


if __name__ == "__main__":
    main()
