"""PUAD's command line: what follows main.py. The EfficientAD models that it stands on lie in the published tree."""

from pathlib import Path
from typing import Any

import click

from kizu.cli.reference.efficientad import aurocs, number, places, validated
from kizu.cli.reference.shared import category_data, device, place, say
from kizu.errors import DataError, OptionError

__all__ = ["run"]


@click.command(short_help="What follows main.py of PUAD.")
@click.argument("dataset_path")
@click.argument("model_dir_path")
@click.option("--size", type=click.Choice(("s", "m")), default="s", show_default=True)
@click.option("--feature_extractor", type=click.Choice(("student", "teacher")), default="student", show_default=True)
@click.option("--gpu", multiple=True, type=int, help="Not published: number of the GPU; -1: CPU.")
@click.option("--save", metavar="DIR", help="Not published: keep the detector there, as a model of kizu's.")
def run(dataset_path: str, model_dir_path: str, size: str, feature_extractor: str, **options: Any) -> None:
    """PUAD: the line after main.py.

    \b
    Example:  kizu reference puad mvtec_anomaly_detection/bottle mvtec_ad_models --size s
    """
    from kizu.cli import terminal
    from kizu.cli.reference import scoring
    from kizu.config import PUADConfig, build
    from kizu.detectors.puad.detector import PUAD
    from kizu.export import reference_files

    teacher_file, folder, data_set, category = places(dataset_path, Path(model_dir_path), size)
    for path in (teacher_file, folder / "student.pt"):
        if not path.exists():
            raise OptionError(f"{path} is missing: train it first (kizu reference efficientad), or name another folder")
    found = category_data(dataset_path)
    if not found.select(split="test"):
        raise DataError(f"{dataset_path} has no test images")
    about = {"dataset name": data_set, "category": category, "size": size, "feature extractor": feature_extractor}
    click.echo("\n".join(f"{name} : {value}" for name, value in about.items()))
    base = reference_files.read_reference(folder)
    settings = base.config.model_dump(include={"teacher", "network", "border"})
    given = {"base": "efficientad", "base_settings": settings, "feature_extractor": feature_extractor, "exact": True}
    detector = PUAD(build(PUADConfig, given), fitted_base=base)
    on = device(options["gpu"])
    place(base, on, 2)
    place(detector, on, 2)
    with terminal.progress(False) as progress, terminal.messages(False, warnings_only=True):
        training, held_out = validated(found)
        detector.fit(training, held_out=held_out, keep_copies=True, progress=progress(category))
        say(detector)
        judged = scoring.judge(detector, found.select(split="test"), progress(category))
    structural = [(sample, outcome.parts["structural"]) for sample, outcome in judged]
    click.echo(f"efficient_ad auroc : {number(next(aurocs(structural))[1])}")
    for kind, value in aurocs([(sample, outcome.score) for sample, outcome in judged]):
        click.echo(f"puad auroc for {kind}: {number(value)}" if kind else f"puad auroc : {number(value)}")
    if options["save"]:
        detector.save(options["save"])
