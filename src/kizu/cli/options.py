"""Options that several commands take: of a data set, of a run, and those made from a config's fields."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import click

from kizu.cli.wording import flagged
from kizu.evaluation.tracking import SERVICES

if TYPE_CHECKING:
    from kizu.data.dataset import Dataset

__all__ = ["config_option", "data_options", "find_data", "json_option", "quiet_option", "run_options"]

quiet_option = click.option("-q", "--quiet", is_flag=True, help="Print nothing but results and errors.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")


def data_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say how a folder of images is to be understood."""
    for option in (
        click.option("--defects-config", metavar="FILE", help="LOCO: saturation thresholds, if not in the data."),
        click.option(
            "--bad", metavar="NAME", multiple=True, help="Plain folders: a folder of defective images. Repeatable."
        ),
        click.option("--good", metavar="NAME", help="Plain folders: the folder of good images."),
        click.option("--layout", default="auto", show_default=True, help="Name the layout instead of recognising it."),
        click.option("-c", "--category", "categories", multiple=True, help="Only this category. Repeatable."),
    ):
        command = option(command)
    return command


def find_data(path: str, options: dict[str, Any]) -> "Dataset":
    from kizu.data import dataset

    return dataset.find(
        path,
        layout=options["layout"],
        categories=options["categories"],
        good=options["good"],
        bad=options["bad"],
        defects_config=options["defects_config"],
    )


def run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options of a run."""
    for option in (
        click.option(
            "--oracle", is_flag=True, help="Also report the round of training best on the test images, marked as such."
        ),
        click.option("--save-segmentation-images", is_flag=True, help="Write test photographs with their maps."),
        click.option("--save-maps", is_flag=True, help="Write the test images' anomaly maps as float TIFF."),
        click.option(
            "--track",
            multiple=True,
            type=click.Choice(SERVICES),
            help="Tell Weights & Biases or MLflow of the run too. Repeatable.",
        ),
        click.option("--memory", metavar="AMOUNT", help="Bound the working data. Default: half of what is free."),
        click.option(
            "--num-workers", type=click.IntRange(1, 64), default=2, show_default=True, help="Reading threads."
        ),
        click.option("--gpu", type=click.IntRange(-1), help="Number of the GPU; -1: CPU. Default: the first, if any."),
        click.option(
            "--ms",
            "milliseconds",
            type=click.FloatRange(1),
            help="With --auto: milliseconds that a photograph may take on this machine.",
        ),
        click.option("--minutes", type=click.FloatRange(0.1), help="With --auto: how long the choice may take."),
        click.option("--auto", is_flag=True, help="Choose the settings from the good images, by made-up defects."),
        click.option("--profile", is_flag=True, help="Say where the time went."),
        click.option("--skip-bad", is_flag=True, help="Leave out training images that cannot be read."),
        click.option(
            "--group-by",
            metavar="PATTERN",
            help="How to know photographs of one part, which counts once: a regular expression finds the same in their "
            "names; or folder; or none. Default: names and likeness.",
        ),
        click.option("--keep-copies", is_flag=True, help="Learn from each of several photographs of one part."),
        click.option("--overwrite", is_flag=True, help="Replace a run of the same name."),
        click.option("--resume", is_flag=True, help="Go on with a run that was interrupted."),
        click.option("--name", help="Sub-folder of GROUP. Default: run, run-2, …"),
        click.option("--group", default="group", show_default=True, help="Sub-folder of PROJECT."),
        click.option("--project", default="project", show_default=True, help="Sub-folder of OUTPUT."),
        click.option("--output", default="results", show_default=True, help="Folder for all results."),
    ):
        command = option(command)
    return command


def config_option(field: str, about: Any, *flags: str) -> click.Option:
    """The option that sets a field of a config, under its name or others; not given, it leaves the field's default."""
    default = about.get_default()
    shown = "x".join(map(str, default)) if isinstance(default, tuple) and default else default
    suffix = f"  [default: {shown}]" if shown not in (None, (), {}) else ""
    return click.Option(
        [field, *(flags or (_flags(field, about.annotation),))],
        type=_option_type(about.annotation),
        default=None,
        help=f"{flagged(about.description)}{suffix}",
    )


def _flags(field: str, annotation: Any) -> str:
    name = field.replace("_", "-")
    return f"--{name}/--no-{name}" if annotation is bool else f"--{name}"


def _option_type(annotation: Any) -> Any:
    """What click shows and checks; the config checks the rest."""
    if get_origin(annotation) is Literal:
        return click.Choice(get_args(annotation))
    plain = [part for part in (get_args(annotation) or [annotation]) if part is not type(None)]
    return plain[0] if plain[0] in (int, float, bool) and get_origin(annotation) is not tuple else str
