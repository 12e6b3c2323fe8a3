"""The picture in the README: four rendered defects, and what a detector that saw only good parts says of them.

python benchmarks/picture.py
"""

import tempfile
from pathlib import Path

import numpy as np

import kizu
from kizu import demo, image

TARGET = Path(__file__).parents[1] / "docs" / "images" / "flange.jpg"
CHOICE = {"scratch": 9, "dent": 2, "stain": 1, "missing_hole": 0}


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = demo.render(scratch)
        detector = kizu.PatchCore().fit(folder / "train" / "good")
        files = [folder / "test" / defect / f"{index:03d}.jpg" for defect, index in CHOICE.items()]
        photos = np.concatenate([image.read(file) for file in files], axis=1)
        overlays = np.concatenate([detector.predict(file).overlay() for file in files], axis=1)
    image.write(TARGET, np.concatenate([photos, overlays]))


if __name__ == "__main__":
    main()
