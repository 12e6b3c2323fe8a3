"""How kizu's PatchCore grows: time and memory of fit with the number of images, of predict with the size of the bank.

python benchmarks/growth.py                                    100 … 5,000 images, an hour or more
python benchmarks/growth.py --sizes 100 1000 --memory 1GB      within a limit of memory
python benchmarks/growth.py --sizes 20 40 --images 10          a look, in a minute

The images are a category's good ones, each shifted by up to 8 pixels and made up to 5 % lighter or darker so that no
two are the same. Every fit and every prediction runs in a process of its own; memory is counted above the bare import
of torch and timm. Writes results/growth.csv and docs/images/growth.svg. Linux only: memory is read from /proc.
"""

import argparse
import csv
import io
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kizu.data import dataset, image
from kizu.data.files import write_text
from patchcore import folder_of, memory, one_by_one, spread

HERE = Path(__file__).parent
STAGES = ("decode", "features", "coreset", "calibration", "fit")
COLUMNS = ("images", *STAGES, "fit_mib", "bank", "predict_ms", "predict_mib", "image_auroc")
SHIFT, LIGHT = 8, 0.05  # pixels; share

Line = tuple[str, str, list[float]]  # name, colour, a value for each x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--category", default="bottle", help="a folder, or a name below mvtec_ad")
    parser.add_argument("--sizes", nargs="+", type=int, default=[100, 200, 500, 1000, 2000, 5000])
    parser.add_argument("--coreset", type=float, help="share of the patches kept; kizu's default without it")
    parser.add_argument("--memory", help="what fit may use, e.g. 1GB; kizu's default without it")
    parser.add_argument("--images", type=int, default=1000, metavar="N", help="test images at most")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "growth.csv")
    parser.add_argument("--plot", type=Path, default=HERE.parent / "docs" / "images" / "growth.svg")
    parser.add_argument("--measure", choices=MEASURES, help=argparse.SUPPRESS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(MEASURES[options.measure](options.job)))
        return
    rows = grow(options)
    write_text(options.output, as_csv(rows))
    write_text(options.plot, picture(rows))


def grow(options: argparse.Namespace) -> list[dict[str, float]]:
    """A row for each size, printed as it comes."""
    data = dataset.find(folder_of(options.category))
    category = data.categories[0]
    test = spread(data.select(category, "test"), options.images)
    settings = {} if options.coreset is None else {"coreset": options.coreset}
    limit = {} if options.memory is None else {"memory": options.memory}
    rows = []
    print("  ".join(f"{name:>11}" for name in COLUMNS))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        files = render(data.select(category, "train"), folder, max(options.sizes))
        job: dict[str, Any] = {"settings": settings, "limit": limit, "model": str(folder / "model")}
        job |= {"test": [str(one.path) for one in test], "labels": [one.is_anomalous for one in test]}
        for size in sorted(options.sizes):
            row = {"images": float(size)}
            row |= run("fit", job | {"files": files[:size]})
            row |= run("predict", job)
            rows.append(row)
            print("  ".join(f"{row[name]:11.4g}" for name in COLUMNS), flush=True)
    return rows


def render(samples: Sequence[dataset.Sample], folder: Path, count: int) -> list[str]:
    """`count` varied copies; a smaller number of images is the beginning of a larger one."""
    files = []
    for index in range(count):
        random = np.random.default_rng(index)
        target = folder / f"{index:05d}.jpg"
        image.write(target, varied(image.read(samples[index % len(samples)].path), random))
        files.append(str(target))
    return files


def varied(photo: npt.NDArray[np.uint8], random: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Shifted, the border repeated, and lighter or darker."""
    height, width = photo.shape[:2]
    top, left = random.integers(0, 2 * SHIFT + 1, size=2)
    padded = np.pad(photo, ((SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)), mode="edge")
    factor = random.uniform(1 - LIGHT, 1 + LIGHT)
    shifted = padded[top : top + height, left : left + width] * factor
    return np.asarray(shifted.clip(0, 255).round().astype(np.uint8))


def run(measure: str, job: dict[str, Any]) -> dict[str, float]:
    """One measurement in a fresh process; its job goes through a file, as thousands of names are too many to say."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(job, file)
        file.flush()
        command = [sys.executable, __file__, "--measure", measure, "--job", file.name]
        finished = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if finished.returncode:
        sys.exit(f"{measure} failed; its own words are above")
    result: dict[str, float] = json.loads(finished.stdout.splitlines()[-1])
    return result


def measure_fit(path: str) -> dict[str, float]:
    bare = memory("VmRSS")
    import kizu
    from kizu.detectors.ram import allow_tuning

    allow_tuning()  # as the command line does
    job = json.loads(Path(path).read_text())
    detector = kizu.PatchCore(**job["settings"])
    start = time.perf_counter()
    detector.fit(job["files"], keep_copies=True, **job["limit"])
    seconds = detector.seconds | {"fit": time.perf_counter() - start}
    peak = memory("VmHWM") - bare
    detector.save(job["model"])
    return {stage: seconds.get(stage, 0.0) for stage in STAGES} | {"fit_mib": peak, "bank": sum(detector.facts["bank"])}


def measure_predict(path: str) -> dict[str, float]:
    bare = memory("VmRSS")
    import kizu

    job = json.loads(Path(path).read_text())
    detector = kizu.load(job["model"])
    files = [Path(file) for file in job["test"]]
    seconds = statistics.median(one_by_one(detector.predict, files))
    peak = memory("VmHWM") - bare
    from sklearn.metrics import roc_auc_score

    auroc = float(roc_auc_score(job["labels"], [detector.predict(file).score for file in files]))
    return {"predict_ms": 1e3 * seconds, "predict_mib": peak, "image_auroc": auroc}


MEASURES = {"fit": measure_fit, "predict": measure_predict}


def as_csv(rows: Sequence[dict[str, float]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([f"{row[name]:.6g}" for name in COLUMNS] for row in rows)
    return text.getvalue()


def picture(rows: Sequence[dict[str, float]]) -> str:
    """Three panels side by side, on no background, in colours that can be seen on light and dark pages."""

    def lines(**colours: str) -> list[Line]:
        return [(name, colour, [row[name] for row in rows]) for name, colour in colours.items()]

    images, bank = [row["images"] for row in rows], [row["bank"] for row in rows]
    times = lines(fit="#808080", features="#3987d6", coreset="#d9822b", calibration="#2f9e72")
    panels = [
        panel(0, "fit: seconds by images", images, times),
        panel(1, "fit: MiB by images", images, lines(fit_mib="#3987d6")),
        panel(2, "predict: ms / image by bank entries", bank, lines(predict_ms="#d9822b")),
    ]
    style = "font-family='system-ui, sans-serif' font-size='12' fill='#808080'"
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {3 * WIDTH} {HEIGHT}' {style}>\n"
        + "\n".join(panels)
        + "\n</svg>\n"
    )


WIDTH, HEIGHT = 320, 280
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 56, 30


def panel(position: int, title: str, x: Sequence[float], lines: Sequence[Line]) -> str:
    """Both axes logarithmic."""
    low, high = decade(min(min(values) for *_, values in lines)), 1.1 * max(max(values) for *_, values in lines)
    across = scale(min(x), max(x), LEFT, WIDTH - RIGHT)
    upward = scale(low, high, HEIGHT - BOTTOM, TOP)
    parts = [f"<g transform='translate({position * WIDTH} 0)'>", f"<text x='{LEFT}' y='18'>{title}</text>"]
    for value in ticks(low, high):
        y = upward(value)
        parts.append(f"<path d='M{LEFT} {y:.1f}H{WIDTH - RIGHT}' stroke='#808080' stroke-opacity='0.3'/>")
        parts.append(f"<text x='{LEFT - 6}' y='{y + 4:.1f}' text-anchor='end'>{value:,g}</text>")
    for value in sorted({min(x), max(x)}):
        anchor = "start" if value == min(x) else "end"
        parts.append(f"<text x='{across(value):.1f}' y='{HEIGHT - 10}' text-anchor='{anchor}'>{value:,g}</text>")
    for index, (name, colour, values) in enumerate(lines):
        points = [(across(a), upward(max(b, low))) for a, b in zip(x, values, strict=True)]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        parts.append(f"<polyline points='{path}' fill='none' stroke='{colour}' stroke-width='2'/>")
        parts += [f"<circle cx='{a:.1f}' cy='{b:.1f}' r='3' fill='{colour}'/>" for a, b in points]
        if len(lines) > 1:
            parts.append(f"<text x='{LEFT + 62 * index}' y='38' fill='{colour}'>{name}</text>")
    return "\n".join([*parts, "</g>"])


def decade(value: float) -> float:
    """The power of ten at or below, and not below a tenth: less is too short to be of interest."""
    return float(10.0 ** math.floor(math.log10(max(value, 0.1))))


def ticks(low: float, high: float) -> list[float]:
    """1, 10, 100 …; with 2 and 5 between where the range is short."""
    steps = (1, 2, 5) if high / low < 200 else (1,)
    values = [low * 10**power * step for power in range(8) for step in steps]
    return [value for value in values if value <= high]


def scale(low: float, high: float, start: float, end: float) -> Any:
    """Logarithmic, from values low … high to positions start … end."""
    span = math.log(high / low) or 1.0
    return lambda value: start + (end - start) * math.log(value / low) / span


if __name__ == "__main__":
    main()
