"""Large photographs: mosaics and strips of real bottles judged in tiles: what is found, how long it takes, what memory.

python benchmarks/large.py                                 mosaics of 5, 60, 150 megapixels, a strip of 2,000 × 60,000
python benchmarks/large.py --megapixels 5 60 --no-strip    fewer
python benchmarks/large.py --method simplenet              another method
python benchmarks/large.py --quick                         one of 5 megapixels, after a short training

Good photographs of a category (bottle) are laid side by side, each turned by quarters at random, and cut anywhere. The
model learns from 24 mosaics of 16 parts, each of six photographs that are in no other mosaic, so that each mosaic that
is scored as if it were new shows parts that nothing else was learned from. The large ones show photographs that the
model has not seen. Each is judged with a single defect of 20 pixels, a piece of a real one, and some as they are.
First, each of the category's real defects gives such a piece, and a mosaic with it is judged by the tiles around it.

Every photograph is judged in a process of its own, from a PNG file. `tiles_seconds` is what the network alone takes for
the same tiles, in memory (from every third batch of eight); `ratio` that of all to it, and `processor_ratio` by the
processor's time. Memory is counted above that of the loaded model that has judged one tile. Writes
results/large_METHOD.csv, results/large_pieces_METHOD.csv and, with --pictures FOLDER, what to look at. Linux.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import kizu
from kizu.cli.terminal import print_table
from kizu.config import CONFIGS, build
from kizu.data import dataset, image
from kizu.data.files import write_csv
from kizu.data.sample import Sample
from kizu.detectors import detector_class
from patchcore import folder_of, memory

RESULTS = Path(__file__).parent / "results"
MOSAICS, PLACES, OWN = 24, 4, 6  # to learn from; places a side of each, and photographs in it
PART = 400  # pixels of a photograph of one part
DEFECT = 20  # pixels
TIMED = 3  # of so many batches of tiles, one is timed alone
STRIP = 2000, 60_000

Pixels = npt.NDArray[np.uint8]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--category", default="bottle", help="a folder, or a name below mvtec_ad")
    parser.add_argument("--method", default="patchcore", choices=CONFIGS)
    parser.add_argument("--megapixels", nargs="+", type=float, default=[5, 60, 150])
    parser.add_argument("--no-strip", action="store_true")
    parser.add_argument("--tile", type=int, default=320)
    parser.add_argument("--overlap", type=int, default=32)
    parser.add_argument("--model", type=Path, help="a model's folder to use, or to write where there is none")
    parser.add_argument("--pictures", type=Path, help="folder for overlays and parts of them")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--judge", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.judge:
        print(json.dumps(judge(*map(Path, options.judge), options.pictures)))
        return
    if options.quick:
        options.megapixels, options.no_strip = [5], True
    data = dataset.find(folder_of(options.category))
    category = data.categories[0]
    good = [sample for sample in data.select(category) if not sample.is_anomalous]
    order = np.random.default_rng(0).permutation(len(good))
    learned, others = order[: MOSAICS * OWN], order[MOSAICS * OWN :]
    defects = [sample for sample in data.select(category, "test") if sample.is_anomalous]
    with tempfile.TemporaryDirectory() as scratch:
        model = options.model or Path(scratch, "model")
        if not (model / "model.json").exists():
            own = [[good[n] for n in learned[m * OWN : (m + 1) * OWN]] for m in range(MOSAICS)]
            learn(own[:8] if options.quick else own, model, options)
        unseen = [good[n] for n in others]
        pieces = pieces_found(kizu.load(model), unseen, defects)
        print_table(pieces)
        rows = []
        piece = next(sample for sample in defects if sample.defect == "contamination")
        for name, height, width in shapes(options):
            photo, corner = mosaic(unseen, height, width, seed=7)
            for kind in ("good", "defect") if height * width < 10**8 else ("defect",):
                place = put(photo, corner, piece, seed=3) if kind == "defect" else None
                file = Path(scratch, f"{name.replace(' ', '-')}-{kind}.png")
                image.write(file, photo)
                rows.append({"photograph": f"{name}, {kind}", **measured(file, model, options.pictures, place)})
                file.unlink()
                print(rows[-1], flush=True)
    print_table(rows)
    if not options.quick:
        write_csv(RESULTS / f"large_{options.method}.csv", rows[0], map(dict.values, rows))
        write_csv(RESULTS / f"large_pieces_{options.method}.csv", pieces[0], map(dict.values, pieces))


def shapes(options: argparse.Namespace) -> list[tuple[str, int, int]]:
    """Name, height and width of each photograph."""
    sides = [(f"{size:g} MP", PART * round((size * 1e6) ** 0.5 / PART)) for size in options.megapixels]
    squares = [(name, side, side) for name, side in sides]
    return squares if options.no_strip else [*squares, (f"{STRIP[0]} × {STRIP[1]}", *STRIP)]


def learn(own: Sequence[Sequence[Sample]], model: Path, options: argparse.Namespace) -> None:
    """Learn from a mosaic of each of these photographs, and save the model."""
    config = build(CONFIGS[options.method], {"tile": options.tile, "overlap": options.overlap})
    side = PLACES * PART
    photos = [mosaic(samples, side, side, seed)[0] for seed, samples in enumerate(own)]
    start = time.perf_counter()
    detector = detector_class(options.method)(config).fit(photos)
    detector.save(model)
    print(f"learned from {len(photos)} mosaics of {side} × {side} in {time.perf_counter() - start:.0f} s, {detector}")
    print(", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in detector.seconds.items()), flush=True)


def mosaic(samples: Sequence[Sample], height: int, width: int, seed: int) -> tuple[Pixels, tuple[int, int]]:
    """A photograph (height, width, 3) of good parts in rows, in random order and turned by quarters.

    Also the corner (top, left) of the first whole part.
    """
    rng = np.random.default_rng(seed)
    parts = [image.read(sample.path) for sample in samples]
    photo = np.empty((height, width, 3), np.uint8)
    first = rng.integers(PART, size=2)
    numbers: list[int] = []
    for top in range(int(first[0]) - PART, height, PART):
        for left in range(int(first[1]) - PART, width, PART):
            numbers = numbers or rng.permutation(len(parts)).tolist()
            part = np.rot90(parts[numbers.pop()], rng.integers(4))[max(0, -top) :, max(0, -left) :]
            here = photo[max(0, top) : top + PART, max(0, left) : left + PART]
            here[:] = part[: here.shape[0], : here.shape[1]]
    return photo, (int(first[0]), int(first[1]))


def put(photo: Pixels, corner: tuple[int, int], defect: Sample, seed: int) -> list[int]:
    """Put a disc of `DEFECT` pixels from the middle of a real defect on one of the parts, where it is on its own.

    Returns where (x, y) its middle is.
    """
    own = image.read(defect.path)
    mask = defect.mask(own.shape[:2])
    assert mask is not None
    rows, columns = mask.nonzero()
    middle = int(((rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2).argmin())
    half = DEFECT // 2
    y, x = (int(np.clip(at[middle], half, PART - half)) for at in (rows, columns))
    rng = np.random.default_rng(seed)
    row, column = (int(rng.integers((n - at) // PART)) for n, at in zip(photo.shape, corner, strict=False))
    top, left = corner[0] + row * PART + y - half, corner[1] + column * PART + x - half
    steps = np.arange(DEFECT) - half + 0.5
    disc = np.hypot(steps[:, None], steps) < half
    photo[top : top + DEFECT, left : left + DEFECT][disc] = own[y - half : y + half, x - half : x + half][disc]
    return [left + half, top + half]


def pieces_found(detector: kizu.Detector, unseen: Sequence[Sample], defects: Sequence[Sample]) -> list[dict[str, Any]]:
    """For each kind of real defects, how many pieces of 20 pixels stop a mosaic of four parts, and are marked in it."""
    found: dict[str, list[tuple[bool, bool]]] = {}
    for seed, defect in enumerate(defects):
        photo, corner = mosaic(unseen[seed % 8 * 9 : seed % 8 * 9 + 9], 2 * PART, 2 * PART, seed)
        x, y = put(photo, corner, defect, seed)
        prediction = detector.predict(photo)
        boxes = [region.box for region in prediction.regions]
        marked = any(left <= x < left + w and top <= y < top + h for left, top, w, h in boxes)
        found.setdefault(defect.defect, []).append((prediction.is_anomalous, marked))
    return [
        {
            "defect": kind,
            "pieces": len(outcomes),
            "stopped": sum(s for s, _ in outcomes),
            "marked": sum(m for _, m in outcomes),
        }
        for kind, outcomes in found.items()
    ]


def measured(file: Path, model: Path, pictures: Path | None, place: list[int] | None) -> dict[str, Any]:
    """What a process of its own says of a photograph with a defect at a place (x, y), or without one."""
    command = [sys.executable, __file__, "--judge", str(file), str(model)]
    command += ["--pictures", str(pictures)] if pictures else []
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    boxes = found.pop("boxes")
    found["marked"] = len(boxes)
    if place is not None:
        at = (n for n, (x, y, w, h) in enumerate(boxes, 1) if x <= place[0] < x + w and y <= place[1] < y + h)
        found["defect_is_region"] = next(at, 0)
    return {"defect_is_region": "", **found}


class Spent:
    """Seconds by the clock, and of the processor, which other programs on the machine do not change as much."""

    def __init__(self, wall: float | None = None, processor: float | None = None) -> None:
        self.wall = time.perf_counter() if wall is None else wall
        self.processor = time.process_time() if processor is None else processor

    def __sub__(self, other: "Spent") -> "Spent":
        return Spent(self.wall - other.wall, self.processor - other.processor)

    def __add__(self, other: "Spent") -> "Spent":
        return Spent(self.wall + other.wall, self.processor + other.processor)


def judge(file: Path, model: Path, pictures: Path | None) -> dict[str, Any]:
    """Judge a photograph, and time the network alone on its tiles."""
    detector = kizu.load(model)
    detector.predict(np.zeros((64, 64, 3), np.uint8))
    before = memory("VmHWM")
    start = Spent()
    prediction = detector.predict(file)
    boxes = [region.box for region in prediction.regions]
    spent = Spent() - start
    peak = memory("VmHWM") - before
    if pictures is not None:
        draw(prediction, pictures / file.stem)
    photo = image.read(file, large=True)
    grid = detector.preprocessing.tiling.grid(photo.shape[:2])
    timed, alone = 0, Spent(0, 0)
    for number, pixels in enumerate(grid.batches(photo, 8)):
        if number % TIMED == 0:
            start = Spent()
            detector(pixels)
            alone, timed = alone + (Spent() - start), timed + len(pixels)
    share = len(grid) / timed
    return {
        "megapixels": round(photo.shape[0] * photo.shape[1] / 1e6, 1),
        "tiles": len(grid),
        "score": round(prediction.score, 4),
        "threshold": round(prediction.threshold, 4),
        "verdict": "stop" if prediction.is_anomalous else "pass",
        "seconds": round(spent.wall, 1),
        "tiles_seconds": round(alone.wall * share, 1),
        "ratio": round(spent.wall / alone.wall / share, 3),
        "processor_ratio": round(spent.processor / alone.processor / share, 3),
        "peak_mib": round(peak),
        "boxes": boxes,
    }


def draw(prediction: kizu.Prediction, name: Path) -> None:
    """The overlay of a photograph, and what is around the first marked regions at its own resolution."""
    name.parent.mkdir(parents=True, exist_ok=True)
    image.write(name.with_suffix(".jpg"), image.small(prediction.overlay(), 2000))
    photo, size = prediction.photograph(), 400
    for number, region in enumerate(prediction.regions[:3], 1):
        left, top = (
            max(0, min(at - size // 2, n - size)) for at, n in zip(region.place, photo.shape[1::-1], strict=True)
        )
        part = np.s_[top : top + size, left : left + size]
        grid = prediction.detector.preprocessing.tiling.grid(prediction.shape)
        around = grid.part_over(prediction.input_map, part[0], part[1])
        model = prediction.detector
        glow = image.overlay(photo[part], around, *model.heat_map_range, model.pixel_threshold)
        image.write(name.with_name(f"{name.stem}-{number}.png"), np.concatenate([photo[part], glow], axis=1))


if __name__ == "__main__":
    main()
