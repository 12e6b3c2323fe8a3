"""EfficientAD's command line: what follows puad/efficientad/train.py.

<model_dir>/<size>_size/teacher/                  teacher.pt; mu.pt and sigma.pt of the network that it learned from
<model_dir>/<size>_size/<data set>/<category>/    student.pt, autoencoder.pt, mu.pt and sigma.pt of the teacher's
                                                  answers, quantile.pt, results.txt
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kizu.cli.reference.shared import category_data, device, place
from kizu.errors import ModelError, OptionError

if TYPE_CHECKING:
    from torch import Tensor

    from kizu.data.dataset import Dataset, Sample
    from kizu.detectors.base import Detector

__all__ = ["aurocs", "number", "places", "run", "validated"]

VALIDATION, SPLIT_SEED = 0.15, 42  # of the images, where the data set has no validation images


@click.command(short_help="What follows puad/efficientad/train.py.")
@click.argument("target", type=click.Choice(("teacher", "student")))
@click.argument("imagenet_path")
@click.argument("model_dir_path")
@click.option("--dataset_path", help="Folder of a category with train/good and test, for the student.")
@click.option("--size", type=click.Choice(("s", "m")), default="s", show_default=True)
@click.option("--gpu", multiple=True, type=int, help="Not published: number of the GPU; -1: CPU.")
@click.option(
    "--steps", type=click.IntRange(1), help="Not published: instead of 60,000 for a teacher, 70,000 for a student."
)
@click.option(
    "--batch_size", type=click.IntRange(1), help="Not published: instead of 16 for a teacher, 1 for a student."
)
@click.option(
    "--backbone", default="wideresnet101", show_default=True, help="Not published: what a teacher learns from."
)
@click.option("--layers", help="Not published: its layers.  [default: layer2,layer3 of a ResNet]")
@click.option("--weights", metavar="FILE", help="Not published: file with its weights.")
def run(target: str, imagenet_path: str, model_dir_path: str, **options: Any) -> None:
    """EfficientAD: the line after train.py. Photographs of anything will do for ImageNet.

    An interrupted training goes on where it was when the same line is given again.

    \b
    Example:  kizu reference efficientad student imagenet models --dataset_path mvtec/bottle --size s
    """
    from kizu.cli import terminal

    with terminal.progress(False) as progress, terminal.messages(False):
        if target == "teacher":
            _train_teacher(imagenet_path, Path(model_dir_path), options, progress("Teacher"))
        else:
            _train_student(imagenet_path, Path(model_dir_path), options, progress)


def places(dataset_path: str, model_dir: Path, size: str) -> tuple[Path, Path, str, str]:
    """The teacher's file, the category's folder, the data set's name and the category's, from the last two folders."""
    path = Path(dataset_path).resolve()
    top = model_dir / f"{size}_size"
    return top / "teacher" / "teacher.pt", top / path.parent.name / path.name, path.parent.name, path.name


def validated(found: "Dataset") -> tuple[list["Sample"], list["Sample"]]:
    """Images to learn from, and those that set quantiles: the data set's own, or the published 15 %."""
    import torch

    training, held_out = found.select(split="train"), found.select(split="validation")
    if held_out:
        return training, held_out
    kept = len(training) - int(VALIDATION * len(training))
    order = torch.randperm(len(training), generator=torch.Generator().manual_seed(SPLIT_SEED)).tolist()
    return [training[number] for number in order[:kept]], [training[number] for number in order[kept:]]


def aurocs(scored: "Sequence[tuple[Sample, float]]") -> Iterator[tuple[str, float | None]]:
    """ "" and the AUROC of all defects, then of each type of defect against all good images."""
    from kizu.cli.reference.scoring import auroc

    types = sorted({sample.defect for sample, _ in scored if sample.is_anomalous})
    for chosen in (None, *types):
        some = [pair for pair in scored if not pair[0].is_anomalous or chosen in (None, pair[0].defect)]
        yield chosen or "", auroc([score for _, score in some], [sample.is_anomalous for sample, _ in some])


def _train_teacher(photographs: str, model_dir: Path, options: dict[str, Any], progress: Any) -> None:
    from kizu.config import DistillationConfig, backbone_names, build
    from kizu.detectors.efficientad import distillation, teacher
    from kizu.export import reference_files

    folder = model_dir / f"{options['size']}_size" / "teacher"
    if (folder / "teacher.pt").exists():
        raise OptionError(f"{folder / 'teacher.pt'} exists, and is not overwritten: move it, or name another folder")
    layers = options["layers"] or ("layer2,layer3" if "resnet" in options["backbone"] else None)
    given = {
        "size": options["size"],
        "backbone": backbone_names.in_timm(options["backbone"]),
        "layers": layers,
        **{key: options[key] for key in ("steps", "batch_size", "weights")},
    }
    config = build(DistillationConfig, {key: value for key, value in given.items() if value is not None})
    working = folder / ".unfinished"
    known = _statistics(folder)
    made = distillation.distill(photographs, config, working, resume=True, statistics=known, progress=progress)
    mean, std = known or _measured(working)
    for name, values in (("mu", mean), ("sigma", std)):
        reference_files.write_tensors(folder / f"{name}.pt", values)
    reference_files.write_tensors(
        folder / "teacher.pt", reference_files.network_state(teacher.load(made, options["size"])[0])
    )
    for path in working.iterdir():
        path.unlink()
    working.rmdir()
    click.echo(f"{folder}: teacher.pt, mu.pt, sigma.pt")


def _statistics(folder: Path) -> "tuple[Tensor, Tensor] | None":
    """mu.pt and sigma.pt, where they were put beforehand: they hold for both sizes."""
    from kizu.detectors.efficientad.networks import DIMENSION
    from kizu.features.safe_load import read_tensors

    files = folder / "mu.pt", folder / "sigma.pt"
    if not all(path.exists() for path in files):
        return None
    found = []
    for path in files:
        values = read_tensors(path).get("")
        if values is None or values.numel() != DIMENSION:
            raise ModelError(f"{path}: should be {DIMENSION} numbers; remove it, and it is measured again")
        found.append(values.flatten().float())
    click.echo(f"Taken as they are: {files[0]}, {files[1]}")
    return found[0], found[1]


def _measured(working: Path) -> "tuple[Tensor, Tensor]":
    from safetensors.torch import load_file

    kept = load_file(next(working.glob("statistics-*.safetensors")))
    return kept["mean"], kept["std"]


def _train_student(photographs: str, model_dir: Path, options: dict[str, Any], progress: Any) -> None:
    from kizu.config import EfficientADConfig, build
    from kizu.data import files
    from kizu.detectors.efficientad.detector import EfficientAD
    from kizu.detectors.efficientad.graph import EfficientADGraph
    from kizu.export import reference_files

    if options["dataset_path"] is None:
        raise OptionError("student needs --dataset_path, the folder of a category with train/good and test")
    teacher_file, folder, data_set, category = places(options["dataset_path"], model_dir, options["size"])
    if not teacher_file.exists():
        raise OptionError(
            f"{teacher_file} is missing: train a teacher first (teacher instead of student), or put one there"
        )
    if (folder / "student.pt").exists():
        raise OptionError(f"{folder / 'student.pt'} exists, and is not overwritten: move it, or name another folder")
    found = category_data(options["dataset_path"])
    given = {
        "teacher": str(teacher_file),
        "network": options["size"],
        "penalty": photographs,
        "border": "stretch",
        "validation": 0.0,
        **{key: options[key] for key in ("steps", "batch_size")},
    }
    detector = EfficientAD(build(EfficientADConfig, {key: v for key, v in given.items() if v is not None}))
    place(detector, device(options["gpu"]), 2)
    training, held_out = validated(found)
    checkpoint = folder.with_name(f".{category}.training")
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    detector.fit(training, held_out=held_out, keep_copies=True, checkpoint=checkpoint, progress=progress(category))
    assert isinstance(detector.graph, EfficientADGraph)
    reference_files.write_efficientad(detector.graph, detector.config, model_dir, data_set, category)
    checkpoint.unlink(missing_ok=True)
    scored = _scores(detector, found.select(split="test"))
    lines = [f"{f'{kind} ' if kind else ''}auroc score = {number(value)}" for kind, value in aurocs(scored)]
    files.write_text(folder / "results.txt", "\n".join(lines) + "\n")
    click.echo("\n".join(lines))


def _scores(detector: "Detector", samples: "Sequence[Sample]") -> "list[tuple[Sample, float]]":
    from kizu.cli.reference import scoring

    return [(sample, outcome.score) for sample, outcome in scoring.judge(detector, samples)]


def number(value: float | None) -> str:
    return "n/a" if value is None else repr(float(value))
