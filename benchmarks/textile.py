"""Simulated textiles with local and global defects, as a folder that kizu reads: 200 to learn from, 300 to test on.

pip install conformal-clip-data==0.1.4          in any environment; 2,000 images, MIT (Megahed et al., arXiv 2501.12596)
python benchmarks/textile.py textile            writes textile/train/good and textile/test/{good,global,local}
python benchmarks/textile.py textile --measure  and says what PatchCore's defaults make of it, defect by defect
python benchmarks/textile.py textile --source SITE_PACKAGES/conformal_clip_data

A local defect is a spot in the weave; a global one changes the whole of it and leaves no place to point at.
"""

import argparse
import importlib.util
import shutil
import sys
from pathlib import Path

from kizu.data import files
from kizu.errors import DataError

PACKAGE = "conformal_clip_data"
SPLIT = {  # folder → (folder in the package, first image, images); nominal images are used once
    "train/good": ("nominal", 0, 200),
    "test/good": ("nominal", 200, 100),
    "test/local": ("local", 0, 100),
    "test/global": ("global", 0, 100),
}


def split(folder: Path, source: Path | None = None) -> Path:
    """Copy the split into `folder`, which appears whole; one that is there already is left as it is.

    `source` is the package's folder where it is not installed beside kizu. Raises `DataError` when it is not found or
    holds fewer images than the split needs.
    """
    if folder.exists():
        return folder
    images = (source or _installed()) / "data" / "textile_images" / "simulated"
    with files.new_folder(folder) as temporary:
        for target, (kind, first, count) in SPLIT.items():
            chosen = sorted((images / kind).glob("textile_*.jpg"))[first : first + count]
            if len(chosen) < count:
                raise DataError(f"{images / kind} holds too few images: install {PACKAGE.replace('_', '-')} again.")
            (temporary / target).mkdir(parents=True)
            for image in chosen:
                shutil.copyfile(image, temporary / target / image.name)
    return folder


def _installed() -> Path:
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        name = PACKAGE.replace("_", "-")
        raise DataError(f"{name} is not installed: run  pip install {name}  or name its folder with --source.")
    return Path(found.submodule_search_locations[0])


def measure(folder: Path) -> list[dict[str, str]]:
    """AUROC of PatchCore's scores, and of its maps' maxima, for each kind of defect."""
    from kizu import PatchCore
    from kizu.data import dataset
    from kizu.evaluation.metrics import image_metrics

    data = dataset.find(folder)
    detector = PatchCore().fit(data.select(split="train"))
    rows = [(sample.defect, prediction) for sample, prediction in detector.judge(data.select(split="test"))]
    table = []
    for defect in ("local", "global"):
        chosen = [(prediction, kind != "good") for kind, prediction in rows if kind in ("good", defect)]
        labels = [label for _, label in chosen]
        scores, _ = image_metrics([prediction.score for prediction, _ in chosen], labels)
        peaks, _ = image_metrics([float(prediction.input_map.max()) for prediction, _ in chosen], labels)
        columns = {"AUROC of scores": scores, "of the maps' maxima": peaks}
        table.append({"defect": defect, **{name: f"{found['image_auroc']:.4f}" for name, found in columns.items()}})
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--source", type=Path)
    parser.add_argument("--measure", action="store_true")
    options = parser.parse_args()
    try:
        split(options.folder, options.source)
    except DataError as error:
        sys.exit(str(error))
    if options.measure:
        from kizu.cli.terminal import print_table

        print_table(measure(options.folder))


if __name__ == "__main__":
    main()
