"""Commands about a model's folder: update, merge, info."""

from contextlib import AbstractContextManager
from pathlib import Path

import click

from kizu.cli import terminal
from kizu.cli.options import json_option, quiet_option
from kizu.cli.wording import flagged
from kizu.data import files
from kizu.errors import OptionError
from kizu.inference.model_folder import model_folder

__all__ = ["held", "info", "merge", "update"]


def held(folder: Path) -> AbstractContextManager[None]:
    """A model that no other command changes meanwhile; one that is at it is waited for."""
    return files.locked(
        folder,
        lambda: click.echo(f"{folder}: another command is changing this model; waiting until it is done", err=True),
    )


@click.command()
@click.argument("model")
@click.argument("images", required=False)
@click.option("--rollback", is_flag=True, help="Take the last update back.")
@click.option("--skip-bad", is_flag=True, help="Leave out images that cannot be read.")
@quiet_option
def update(model: str, images: str | None, rollback: bool, skip_bad: bool, quiet: bool) -> None:
    """Teach a model more good images, without the old ones.

    For PatchCore, whose memory bank keeps its size. The model before the update stays in its folder, for --rollback.

    \b
    Example:  kizu update results/project/group/run photos/more_good
    """
    folder = model_folder(model)
    if rollback == (images is not None):
        raise OptionError("kizu update takes either a folder of good images or --rollback")
    from kizu.detectors.loading import load

    with held(folder):
        if rollback:
            if not (folder / "previous" / "model.json").exists():
                raise OptionError(f"{folder} holds no previous model: it was not updated, or was rolled back already")
            detector = load(folder / "previous")
        else:
            detector = load(folder)
            with terminal.progress(quiet) as progress:
                detector.update(images, skip_bad=skip_bad, progress=progress("Updating"))
        detector.save(folder, keep_previous=not rollback)
    for remark in detector.remarks:
        click.echo(f"Note: {flagged(remark)}", err=True)
    if not quiet:
        click.echo(f"{folder}: {detector.training['images']} good images. {detector.threshold.statement}")
        report = folder.parent.parent / "report.html"
        if report.is_file() and not rollback:
            click.echo(f"{report} is of the model as it was trained; kizu evaluate judges with this one.")


@click.command()
@click.argument("models", nargs=-1, required=True)
@click.option("--output", required=True, metavar="DIR", help="Folder for the joined model.")
@quiet_option
def merge(models: tuple[str, ...], output: str, quiet: bool) -> None:
    """Join models that learned from different images of the same part.

    \b
    Example:  kizu merge results/a/group/run results/b/group/run --output models/both
    """
    from kizu.detectors.loading import load

    parts = [load(model_folder(model)) for model in models]
    if len({part.method for part in parts}) > 1:
        raise OptionError("Only models of the same method can be merged")
    merged = parts[0].merge(parts)
    merged.save(output)
    for remark in merged.remarks:
        click.echo(f"Note: {flagged(remark)}", err=True)
    if not quiet:
        click.echo(f"{output}: {merged.training['images']} good images. {merged.threshold.statement}")


@click.command()
@click.argument("model")
@json_option
def info(model: str, as_json: bool) -> None:
    """Say what a model is: learned from what, how, and how it decides.

    \b
    Example:  kizu info results/project/group/run
    """
    from kizu.cli.description import describe_model

    terminal.print_description(describe_model(model_folder(model)), as_json)
