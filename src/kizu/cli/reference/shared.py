"""What the published command lines have in common: flags, the data set, the device, the number of a folder."""

import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kizu.errors import DataError, OptionError

if TYPE_CHECKING:
    import torch

    from kizu.cli.reference.scoring import Row
    from kizu.data.dataset import Dataset, Sample
    from kizu.detectors.base import Detector

__all__ = [
    "as_original_option",
    "category_data",
    "data_flags",
    "data_set",
    "device",
    "flags",
    "free_folder",
    "groups",
    "main_flags",
]
__all__ += ["parted", "place", "print_rows", "say", "weights_option"]

log = logging.getLogger("kizu")
Command = Callable[..., Any]

as_original_option = click.option(
    "--as-original",
    is_flag=True,
    help="The published arithmetic, which ignores some flags and scales scores by the test images.",
)
weights_option = click.option(
    "--weights", multiple=True, metavar="FILE", help="Not published: file with a backbone's weights. Repeatable."
)


def flags(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several options in one decorator, listed in this order."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


main_flags = flags(
    click.option("--gpu", multiple=True, type=int, help="The first is used; -1: CPU. Default: 0, if there is one."),
    click.option("--seed", type=int, default=0, show_default=True),
    click.option("--save_segmentation_images", is_flag=True, help="Write photographs, masks and maps side by side."),
)

data_flags = flags(
    click.argument("name"),
    click.argument("data_path"),
    click.option("--subdatasets", "-d", multiple=True, required=True, help="Category. Repeatable."),
    click.option(
        "--resize", type=int, default=256, show_default=True, help="Shorter side, before the centre is cut out."
    ),
    click.option("--imagesize", type=int, default=224, show_default=True, help="Side of the square that is cut out."),
    click.option("--augment", is_flag=True, help="Vary the training images a little."),
)


def groups(parts: Sequence[tuple[str, dict[str, Any]]], expected: Sequence[str]) -> list[dict[str, Any]]:
    """The options of each of the chained commands. Raises `OptionError` where one is missing or comes twice."""
    found = [name for name, _ in parts]
    if sorted(found) != sorted(expected):
        raise OptionError(
            f"The line should go on with {', '.join(expected)}, each once; it has {', '.join(found) or 'none'}"
        )
    by_name = dict(parts)
    return [by_name[name] for name in expected]


def data_set(name: str, path: str, categories: Sequence[str]) -> "Dataset":
    """The data set of that name; `mvtec` is whatever lies there in a layout that we know."""
    from kizu.data import dataset

    return dataset.find(path, layout="auto" if name == "mvtec" else name, categories=categories)


def category_data(path: str) -> "Dataset":
    """A folder with one category's train and test. Raises `DataError` where it has several."""
    from kizu.data import dataset

    found = dataset.find(path)
    if len(found.categories) != 1:
        raise DataError(f"{path} holds {len(found.categories)} categories: name the folder of one of them")
    return found


def parted(found: "Dataset", category: str, share: float) -> tuple[list["Sample"], list["Sample"]]:
    """Training images, and good ones held out: the data set's own, and what `share` leaves of the sorted ones."""
    training, held_out = found.select(category, "train"), found.select(category, "validation")
    if not 0 < share <= 1:
        raise OptionError(f"--train_val_split {share:g}: a share of the training images, above 0 and at most 1")
    kept = int(len(training) * share)
    if kept == 0:
        raise DataError(f"{category}: there is no training image left, of {len(training)}")
    return training[:kept], held_out + training[kept:]


def device(gpu: Sequence[int]) -> "torch.device":
    """The first of the GPUs; the CPU, with a word where one was asked for, if this machine has none at all."""
    import torch

    from kizu.detectors.fitting import gpu_device

    number = gpu[0] if gpu else 0
    if number >= 0 and not torch.cuda.is_available():
        if gpu:
            log.warning("--gpu %d: there is no GPU here that torch can use; this runs on the CPU", number)
        number = -1
    return gpu_device(number)


def place(detector: "Detector", device: "torch.device", workers: int, batch_size: int | None = None) -> None:
    """Put a detector, and its graph if it has one, on a device."""
    detector.device = device
    detector.workers, detector.batch_size = max(1, workers), batch_size
    if detector.graph is not None:
        detector.graph.to(device)


def say(detector: "Detector") -> None:
    """What a fitted detector has to say of the settings, to the user."""
    for remark in detector.remarks:
        log.warning("%s", remark)


def free_folder(folder: Path) -> Path:
    """The folder, or if it exists the first that does not of folder_0, folder_1, …"""
    return next(candidate for candidate in _numbered(folder) if not candidate.exists())


def _numbered(folder: Path) -> Iterator[Path]:
    yield folder
    yield from (folder.with_name(f"{folder.name}_{number}") for number in count())


def print_rows(rows: "Sequence[Row]", folder: Path) -> None:
    from dataclasses import asdict

    from kizu.cli import terminal

    shown = [
        {key: f"{v:.4f}" if isinstance(v, float) else v or "n/a" for key, v in asdict(row).items()} for row in rows
    ]
    terminal.print_table(shown)
    click.echo(f"\nResults: {folder / 'results.csv'}")
