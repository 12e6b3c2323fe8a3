"""Commands that bring a model to the line: export, verify."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from kizu.cli import terminal
from kizu.cli.options import json_option, quiet_option
from kizu.errors import ModelError, OptionError
from kizu.inference.model_folder import model_folder

__all__ = ["export", "verify"]


@click.command()
@click.argument("model")
@click.option(
    "--to",
    required=True,
    type=click.Choice(["onnx", "openvino", "reference"]),
    help="What to write: onnx or openvino run it, reference is read by the published program.",
)
@click.option("--output", metavar="FOLDER", help="Folder for the exported model. Default: beside the trained one.")
@click.option(
    "--precision",
    type=click.Choice(["float32", "float16", "int8"]),
    default="float32",
    show_default=True,
    help="float16: half the size. int8: faster on processors that compute in 8 bits. Both need --images.",
)
@click.option("--images", metavar="FOLDER", help="Good photographs to compare on, better unknown to the model.")
@click.option("--tolerance", default=0.02, show_default=True, help="Share of the verdicts that --precision may change.")
@quiet_option
def export(model: str, to: Any, output: str | None, images: str | None, **options: Any) -> None:
    """Write a model as one graph that predicts without torch, and check that both give the same.

    Or, with --to reference, as the files that the published program reads.

    The graph takes pixels and gives score, p-value, verdict and map. It is not written where its results differ from
    torch's. The folder also holds some of the photographs and torch's results, so that it can be verified anywhere.

    \b
    Example:  kizu export results/project/group/run --to onnx
    """
    if not 0 <= options["tolerance"] < 1:
        raise OptionError("--tolerance is a share of the verdicts: at least 0 and below 1")
    folder = model_folder(model)
    target = Path(output) if output else _beside(folder, f"{folder.name}-{to}")
    if to == "reference":
        _as_published(folder, target, images, options)
        return
    if options["precision"] != "float32" and not images:
        raise OptionError(
            "A lower --precision is measured on photographs of good parts: name their folder with --images"
        )
    from kizu.detectors.loading import load
    from kizu.export.onnx import export as export_graph
    from kizu.inference.batch import image_paths

    photographs = image_paths([images]) if images else []
    with terminal.progress(options["quiet"]) as progress:
        exported = export_graph(
            load(folder),
            target,
            to,
            precision=options["precision"],
            photographs=photographs,
            tolerance=options["tolerance"],
            progress=progress("Export"),
        )
    if not options["quiet"]:
        click.echo(f"{exported.folder}: {exported.promise}")
        if measured := exported.export.get("measured"):
            terminal.print_facts(measured)


def _as_published(folder: Path, target: Path, images: str | None, options: dict[str, Any]) -> None:
    from kizu.detectors.loading import load
    from kizu.export.reference_files import write_reference

    if images or options["precision"] != "float32":
        raise OptionError("--to reference writes the tensors as they are: leave --precision and --images out")
    if target.exists():
        raise OptionError(f"{target} exists: choose another --output")
    detector = load(folder)
    write_reference(detector, target)
    if not options["quiet"]:
        (height, _), resize = detector.config.size, detector.config.resize
        click.echo(f"{target}: as the published program lays it out")
        if detector.method != "efficientad":
            click.echo("  These files do not say how photographs are scaled. To read them again:")
            click.echo(f"  kizu import {target} --resize {resize or height}")


@click.command()
@click.argument("model")
@quiet_option
@json_option
def verify(model: str, quiet: bool, as_json: bool) -> None:
    """Say whether a model is whole, and says on this machine what it said when it was made.

    Every file is compared with its hash. An exported model judges the photographs in its folder again. Of a trained
    one, the backbone's weights are compared with those that it learned with.

    \b
    Example:  kizu verify results/project/group/run
    """
    folder = model_folder(model)
    from kizu.inference.model_folder import description

    about = description(folder)
    if "export" in about:
        from kizu.inference.exported import load as load_exported

        exported = load_exported(folder, check=0)
        difference = exported.verify()
        sentence = (
            f"{folder} gives the results that it gave when it was exported: {difference.sentence(exported.tolerance)}."
        )
        facts = {"model": str(folder), **difference.to_json(), "tolerance": asdict(exported.tolerance)}
    else:
        from kizu.detectors.loading import load
        from kizu.inference import model_json

        if load(folder).pretrained() != about["backbone"]:
            raise ModelError(
                f"{folder}: the backbone's weights here are not those that the model learned with: install these, or "
                "train again"
            )
        if (folder / "previous").exists():
            model_json.check(folder / "previous")
        sealed = model_json.check(folder)
        found = "is whole" if sealed else "can be read, and was saved before models had hashes"
        sentence = f"{folder} {found}; its backbone is the one that it learned with."
        facts = {"model": str(folder), "backbone": about["backbone"], "hashes": sealed}
    if as_json:
        terminal.print_json(facts)
    elif not quiet:
        click.echo(sentence)


def _beside(folder: Path, name: str) -> Path:
    """Beside a model, but outside of a run's models, which are all trained."""
    return folder.parents[1] / "exported" / name if folder.parent.name == "models" else folder.with_name(name)
