"""The command line's options of a run: where it goes and how it is done, whatever the method."""

from collections.abc import Callable
from typing import Any

import click

__all__ = ["PASSED_ON", "run_options"]

# to `run.train`, by the same names
PASSED_ON = (
    "name",
    "resume",
    "overwrite",
    "skip_bad",
    "memory",
    "gpu",
    "num_workers",
    "oracle",
    "save_segmentation_images",
    "save_maps",
)


def run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options of a run."""
    for option in (
        click.option(
            "--oracle", is_flag=True, help="Also report the round of training best on the test images, marked as such."
        ),
        click.option("--save-segmentation-images", is_flag=True, help="Write test photographs with their maps."),
        click.option("--save-maps", is_flag=True, help="Write the test images' anomaly maps as float TIFF."),
        click.option("--memory", metavar="AMOUNT", help="Bound the working data. Default: half of what is free."),
        click.option(
            "--num-workers", type=click.IntRange(1, 64), default=2, show_default=True, help="Reading threads."
        ),
        click.option("--gpu", type=click.IntRange(-1), help="Number of the GPU; -1: CPU. Default: the first, if any."),
        click.option("--profile", is_flag=True, help="Say where the time went."),
        click.option("--skip-bad", is_flag=True, help="Leave out training images that cannot be read."),
        click.option("--overwrite", is_flag=True, help="Replace a run of the same name."),
        click.option("--resume", is_flag=True, help="Go on with a run that was interrupted."),
        click.option("--name", help="Sub-folder of GROUP. Default: run, run-2, …"),
        click.option("--group", default="group", show_default=True, help="Sub-folder of PROJECT."),
        click.option("--project", default="project", show_default=True, help="Sub-folder of OUTPUT."),
        click.option("--output", default="results", show_default=True, help="Folder for all results."),
    ):
        command = option(command)
    return command
