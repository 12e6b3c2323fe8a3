"""How large a spot of known size is told to be, by how much it stands out.

python benchmarks/sizes.py                    bottle and pill, at 320 and 640 pixels
python benchmarks/sizes.py DATA… --size 320
python benchmarks/sizes.py --quick            a rendered category, a few spots

PatchCore learns from 100 good photographs. Discs, darker on bright places and brighter on dark ones, are painted near
the middle of 20 others, and the marked region that has its peak there is measured.
"""

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

import kizu
from kizu.cli.terminal import print_table
from kizu.data import dataset, demo, image
from kizu.data.files import write_csv
from kizu.evaluation.experiment import machine

RESULTS = Path(__file__).parent / "results"
DATA = Path(__file__).parents[2] / "shared" / "data" / "mvtec_ad"
CONTRASTS = (60, 150)  # grey levels of 255
DIAMETERS = (4, 8, 12, 16, 24, 32, 48, 64)  # pixels of the photograph
LEARNED, PAINTED = 100, 20
FINER = 4  # times the photograph's pixels, in which a disc is drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="*")
    parser.add_argument("--size", type=int, nargs="+", default=[320, 640])
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folders = options.data or ([demo.render(scratch)] if options.quick else [DATA / "bottle", DATA / "pill"])
        sizes, diameters = ([160], (16, 48)) if options.quick else (options.size, DIAMETERS)
        table = [row for folder in folders for size in sizes for row in measured(Path(folder), size, diameters)]
    print_table(table)
    print(f"\n{machine()['summary']}")
    if not options.quick:
        write_csv(RESULTS / "sizes.csv", table[0], map(dict.values, table))


def measured(folder: Path, size: int, diameters: Sequence[int]) -> list[dict[str, Any]]:
    """A row for each contrast and diameter."""
    good = [sample.path for sample in dataset.find(folder).samples if sample.split == "train"]
    learned, painted = good[:LEARNED], good[LEARNED : LEARNED + PAINTED] or good[-PAINTED:]
    detector = kizu.PatchCore(size=size, pixel_size=1).fit(learned)  # sizes in pixels
    table = []
    for contrast in CONTRASTS:
        for diameter in diameters:
            rng, lengths = np.random.default_rng(diameter), []
            for path in painted:
                photo, (x, y) = with_disc(image.read(path), diameter, contrast, rng)
                near = [
                    region
                    for region in detector.predict(photo).regions
                    if np.hypot(region.place[0] - x, region.place[1] - y) < diameter / 2 + 16
                ]
                lengths += [region.size.length for region in near[:1] if region.size is not None]
            table.append(
                {
                    "category": folder.name,
                    "input": size,
                    "photograph": image.read(painted[0]).shape[1],
                    "contrast": contrast,
                    "diameter": diameter,
                    "marked": f"{len(lengths)} of {len(painted)}",
                    "length": f"{statistics.median(lengths):.0f}" if lengths else "",
                    "10 %": f"{np.percentile(lengths, 10):.0f}" if lengths else "",
                    "90 %": f"{np.percentile(lengths, 90):.0f}" if lengths else "",
                }
            )
    return table


def with_disc(
    photo: npt.NDArray[np.uint8], diameter: int, contrast: int, rng: np.random.Generator
) -> tuple[npt.NDArray[np.uint8], tuple[float, float]]:
    """A photograph with a disc somewhere near its middle, and where that is."""
    height, width = photo.shape[:2]
    x, y = width * (0.5 + rng.uniform(-0.12, 0.12)), height * (0.5 + rng.uniform(-0.1, 0.1))
    canvas = Image.new("L", (FINER * width, FINER * height))
    corners = [FINER * (at + sign * diameter / 2) for sign in (-1, 1) for at in (x, y)]
    ImageDraw.Draw(canvas).ellipse(corners, fill=255)
    share = np.asarray(canvas.resize((width, height)), float)[..., None] / 255
    sign = -1 if photo[int(y), int(x)].mean() > 127 else 1
    return (photo + sign * contrast * share).clip(0, 255).astype(np.uint8), (x, y)


if __name__ == "__main__":
    main()
