"""`kizu reference` and `kizu import`. A system's command line is imported when it is asked for."""

import importlib
from pathlib import Path
from typing import Any

import click

from kizu.cli import terminal
from kizu.cli.options import quiet_option
from kizu.errors import OptionError

__all__ = ["import_models", "reference"]

# command → module, name in it, what it is
SYSTEMS = {
    "patchcore": ("patchcore", "run", "What follows run_patchcore.py."),
    "patchcore-evaluate": ("patchcore", "evaluate", "What follows load_and_evaluate_patchcore.py."),
    "simplenet": ("simplenet", "run", "What follows main.py in SimpleNet's run.sh."),
    "efficientad": ("efficientad", "run", "What follows puad/efficientad/train.py."),
    "puad": ("puad", "run", "What follows main.py of PUAD."),
}


class Systems(click.Group):
    """One command a system."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(SYSTEMS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in SYSTEMS:
            return None
        module, command, _ = SYSTEMS[name]
        found: click.Command = getattr(importlib.import_module(f"kizu.cli.reference.{module}"), command)
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, about) for name, (_, _, about) in SYSTEMS.items()])


@click.group(cls=Systems)
def reference() -> None:
    """The published command lines, with their folders and files.

    Paste what follows the program's name in the published README.

    \b
    Example:  kizu reference puad mvtec_loco/breakfast_box mvtec_loco_ad_models
    """


@click.command("import")
@click.argument("path")
@click.option("--output", default="models", show_default=True, metavar="DIR", help="Folder for the models.")
@click.option(
    "--good",
    metavar="DIR",
    help="Photographs of good parts that set the threshold: others than the model learned from.",
)
@click.option("--imagesize", type=int, help="Side of the network's input. Default: what the files say, or 224.")
@click.option(
    "--resize",
    type=int,
    help="Shorter side before the centre is cut out. Default: as in the published recipes. Not for EfficientAD.",
)
@click.option(
    "--weights",
    metavar="FILE",
    help="File with the backbone's weights. Of several backbones: their files, separated by commas.",
)
@click.option(
    "--backbone", default="wideresnet50", show_default=True, help="Backbone of a SimpleNet whose files do not say it."
)
@click.option("--layers", default="layer2,layer3", show_default=True, help="Layers of such a SimpleNet.")
@click.option(
    "--dimension", type=int, default=1536, show_default=True, help="Both embed dimensions of such a SimpleNet."
)
@quiet_option
def import_models(path: str, output: str, good: str | None, quiet: bool, **options: Any) -> None:
    """Read models that the published programs made, and write them as kizu's.

    PATH is a model's folder (PatchCore: *.faiss and *.pkl; SimpleNet: ckpt.pth; EfficientAD: student.pt and others), or
    any folder above several. Nothing in the files is executed.

    \b
    Example:  kizu import results/project/group/models --output models --good photos/more_good
    """
    from kizu.export import reference_files
    from kizu.inference.batch import image_paths

    found = reference_files.found_models(path)
    if not found:
        raise OptionError(
            f"{path}: there is no published model here, which has *.faiss and *.pkl, or ckpt.pth, or student.pt"
        )
    settings = {
        "backbone": options["backbone"],
        "layers": options["layers"],
        "pretrain_embed_dimension": options["dimension"],
        "target_embed_dimension": options["dimension"],
        "size": options["imagesize"] or 224,
    }
    for folder in found:
        target = Path(output) / folder.relative_to(path) if len(found) > 1 else Path(output) / folder.name
        if target.exists():
            raise OptionError(f"{target} exists: choose another --output")
        detector = reference_files.read_reference(
            folder, size=options["imagesize"], resize=options["resize"], weights=options["weights"], settings=settings
        )
        if good is not None:
            with terminal.progress(quiet) as progress:
                detector.calibrate(image_paths([good]), progress=progress(folder.name))
        detector.save(target)
        if not quiet:
            seen = "×".join(map(str, detector.config.size))
            cut = f" of photographs scaled to {detector.config.resize}" if detector.config.resize else ""
            threshold = detector.threshold
            promise = (
                threshold.statement
                if threshold.count
                else "No threshold: --good sets one; until then nothing is stopped."
            )
            click.echo(f"{target}: {detector.method}, {seen}{cut}. {promise}")
