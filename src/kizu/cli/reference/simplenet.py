"""SimpleNet's command line: what follows main.py in run.sh.

<results_path>/<log_project>/<log_group>/<run_name>/
├── models/0/           ckpt.pth and params.pkl of the first category, models/1/ of the second, …
├── tensorboard/        curves of the training, metrics
└── results.csv
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kizu.cli.reference.shared import (
    as_original_option,
    data_flags,
    data_set,
    device,
    flags,
    groups,
    main_flags,
    parted,
    place,
    print_rows,
    say,
    weights_option,
)
from kizu.errors import DataError, OptionError

if TYPE_CHECKING:
    from kizu.cli.reference.scoring import Row
    from kizu.config import SimpleNetConfig
    from kizu.data.dataset import Sample
    from kizu.detectors.simplenet.detector import SimpleNet

__all__ = ["run"]

AS_THEY_ARE = (
    *("pretrain_embed_dimension", "target_embed_dimension", "patchsize", "pre_proj", "mix_noise", "train_backbone"),
    *("meta_epochs", "gan_epochs", "aed_meta_epochs", "dsc_layers", "dsc_margin", "dsc_lr", "cos_lr"),
)
STRENGTHS = ("rotate_degrees", "translate", "scale", "brightness", "contrast", "saturation", "gray", "hflip", "vflip")
OWN = {"models", "tensorboard", "results.csv", "segmentation_images"}  # what lies in a run's folder


@click.group(chain=True, short_help="What follows main.py in run.sh.", subcommand_metavar="net … dataset …")
@main_flags
@click.option("--results_path", default="results", show_default=True)
@click.option("--log_group", default="group", show_default=True)
@click.option("--log_project", default="project", show_default=True)
@click.option("--run_name", default="test", show_default=True)
@click.option("--test", is_flag=True, help="Measure the models of a run that is there already.")
@click.option("--overwrite", is_flag=True, help="Not published: replace a run of the same name.")
@as_original_option
def run(**_: Any) -> None:
    """SimpleNet: the line after main.py.

    \b
    Example:  kizu reference simplenet --run_name first net -b efficientnet_lite2 -le blocks.2 -le blocks.4
                --pre_proj 1 dataset --resize 329 --imagesize 288 -d bottle mvtec DATA
    """


@run.command("net")
@click.option(
    "--backbone_names",
    "-b",
    multiple=True,
    default=("wideresnet50",),
    show_default=True,
    help="Published name, timm's, or clip.",
)
@click.option(
    "--layers_to_extract_from",
    "-le",
    multiple=True,
    help="Layer, or 0 … 11 of clip. Repeatable. Default: layer2, layer3.",
)
@click.option("--pretrain_embed_dimension", type=int, default=1024, show_default=True)
@click.option("--target_embed_dimension", type=int, default=1024, show_default=True)
@click.option("--patchsize", type=int, default=3, show_default=True)
@click.option(
    "--embedding_size", type=int, help="Channels that the projection gives. Default: as many as its input has."
)
@click.option("--meta_epochs", type=int, default=1, show_default=True)
@click.option("--aed_meta_epochs", type=int, default=1, show_default=True)
@click.option("--gan_epochs", type=int, default=1, show_default=True)
@click.option("--dsc_layers", type=int, default=2, show_default=True)
@click.option("--dsc_hidden", type=int, help="Default: each layer two thirds of the one before.")
@click.option("--noise_std", type=float, default=0.05, show_default=True)
@click.option("--dsc_margin", type=float, default=0.8, show_default=True)
@click.option("--dsc_lr", type=float, default=2e-4, show_default=True)
@click.option(
    "--auto_noise",
    type=float,
    default=0.0,
    show_default=True,
    help="Noise in units of the features' deviation, instead of --noise_std.",
)
@click.option("--train_backbone", is_flag=True)
@click.option("--cos_lr", is_flag=True)
@click.option("--pre_proj", type=int, default=0, show_default=True)
@click.option("--proj_layer_type", type=int, default=0, show_default=True)
@click.option("--mix_noise", type=int, default=1, show_default=True)
@weights_option
def net(**options: Any) -> tuple[str, dict[str, Any]]:
    """The networks and their training."""
    return "net", options


@run.command("dataset")
@data_flags
@click.option(
    "--train_val_split", type=float, default=1.0, show_default=True, help="Share learned from; the rest is held out."
)
@click.option("--batch_size", type=int, default=2, show_default=True)
@click.option("--num_workers", type=click.IntRange(0), default=2, show_default=True)
@flags(*(click.option(f"--{name}", type=float, default=0.0) for name in STRENGTHS))
def dataset(**options: Any) -> tuple[str, dict[str, Any]]:
    """Which photographs, and how they are varied."""
    return "dataset", options


@run.result_callback()
def finish(parts: Sequence[tuple[str, dict[str, Any]]], **main: Any) -> None:
    from kizu.cli import terminal
    from kizu.cli.reference import scoring
    from kizu.data import files
    from kizu.detectors.simplenet.detector import SimpleNet

    network, data = groups(parts, ("net", "dataset"))
    folder = Path(main["results_path"]) / main["log_project"] / main["log_group"] / main["run_name"]
    configs = _configs(main, network, data)
    found = data_set(data["name"], data["data_path"], data["subdatasets"])
    if not main["test"]:
        _clear(folder, main["overwrite"])
    rows: list[Row] = []
    curves: dict[str, Mapping[str, Sequence[float]]] = {}
    with terminal.progress(False) as progress, terminal.messages(False, warnings_only=True):
        on = device(main["gpu"])
        for number, category in enumerate(data["subdatasets"]):
            for network_number, config in enumerate(configs):
                name = f"{data['name']}_{category}"
                model = folder / "models" / str(number)
                if len(configs) > 1:  # as the published code numbers them
                    model = folder / "models" / str(network_number) / name
                    name = f"{name}_network_{network_number}"
                detector = SimpleNet(config)
                place(detector, on, data["num_workers"])
                test = found.select(category, "test")
                if main["test"]:
                    published = folder / "models" / "0" / f"{data['name']}_{category}"
                    detector.load_from_path(published if len(configs) == 1 and published.exists() else model)
                    place(detector, on, data["num_workers"])
                else:
                    training, held_out = parted(found, category, data["train_val_split"])
                    _fit(detector, training, held_out, test, main["as_original"], progress(name))
                    detector.save_to_path(model)
                rows.append(_row(name, detector, test, main, folder, progress(name)))
                curves[name] = detector.curves
        files.write_text(folder / "results.csv", scoring.results_csv(rows))
        if not main["test"]:
            _tensorboard(folder / "tensorboard", rows, curves, "pro" if main["as_original"] else "anomaly-p-auroc")
    print_rows(rows, folder)


def _row(
    name: str,
    detector: "SimpleNet",
    test: "Sequence[Sample]",
    main: dict[str, Any],
    folder: Path,
    progress: Any,
) -> "Row":
    """What the table has of a model; its pictures, where they are wanted."""
    from kizu.cli.reference import scoring

    row = scoring.as_published(name, detector, test, progress, pro=True) if main["as_original"] else None
    if row is None or main["save_segmentation_images"]:
        judged = scoring.judge(detector, test, progress)
        row = row or scoring.measured(name, judged)
        if main["save_segmentation_images"]:
            pictures = folder / "segmentation_images" / name
            scoring.write_segmentations(judged, pictures, each_alone=main["as_original"])
    return row


def _configs(main: dict[str, Any], network: dict[str, Any], data: dict[str, Any]) -> "list[SimpleNetConfig]":
    """One for each network, which is trained alone: layers are then numbered, as in 0.layer2, and 1.layer3."""
    names, layers = network["backbone_names"], network["layers_to_extract_from"]
    if len(network["weights"]) > len(names):
        raise OptionError(f"--weights: there are {len(network['weights'])} files for {len(names)} networks")
    weights = [*network["weights"], *[""] * (len(names) - len(network["weights"]))]
    if len(names) == 1:
        return [_config(main, network, data, names[0], layers, weights[0])]
    strangers = [layer for layer in layers if layer.partition(".")[0] not in map(str, range(len(names)))]
    if strangers:
        raise OptionError(f"-le {strangers[0]}: with {len(names)} networks say whose layer it is, as in 0.layer2")
    parts = [tuple(le.partition(".")[2] for le in layers if le.startswith(f"{n}.")) for n in range(len(names))]
    triples = zip(names, parts, weights, strict=True)
    return [_config(main, network, data, *triple) for triple in triples]


def _config(
    main: dict[str, Any], network: dict[str, Any], data: dict[str, Any], given: str, layers: Sequence[str], weights: str
) -> "SimpleNetConfig":
    """What the flags say of one network; with --as-original, what the published code makes of them."""
    from kizu.config import SimpleNetConfig, backbone_names, build

    name, seed = backbone_names.without_seed(given)
    original, noise = main["as_original"], network["auto_noise"]
    between = network["proj_layer_type"]
    if (
        network["embedding_size"] not in (None, network["target_embed_dimension"])
        and network["pre_proj"]
        and not original
    ):
        click.echo(
            f"--embedding_size {network['embedding_size']}: the projection gets so many channels, and the published "
            "program, which ignores the flag, cannot load the model. --as-original ignores it too",
            err=True,
        )
    settings = {
        **{key: network[key] for key in AS_THEY_ARE},
        **{key: data[key] for key in STRENGTHS},
        "backbone": backbone_names.in_timm(name),
        "layers": tuple(layers) or (("layer2", "layer3") if "resnet" in name else ()),
        "weights": weights or None,
        "dsc_hidden": network["dsc_hidden"] or 0,
        "embedding_size": None if original else network["embedding_size"],
        "proj_layer_type": 0 if original and between == 1 else between,
        "auto_noise": noise > 0 and not original,
        "noise_std": noise if noise > 0 and not original else network["noise_std"],
        "batch_size": data["batch_size"],
        "sampled": 1.0,
        "top": 0.0,
        "augment": data["augment"] and not original,
        "size": data["imagesize"],
        "resize": data["resize"],
        "seed": main["seed"] if seed is None else seed,
    }
    return build(SimpleNetConfig, settings)


def _fit(
    detector: "SimpleNet",
    training: "Sequence[Sample]",
    held_out: "Sequence[Sample]",
    test: "Sequence[Sample]",
    original: bool,
    progress: Any,
) -> None:
    """Learn; with the published protocol from all images, keeping the round that is the best on the test images."""
    from kizu.detectors.fitting import FitResult
    from kizu.evaluation.oracle import Oracle

    oracle = Oracle(detector, test) if original else None
    others = held_out or (training[:1] if original else ())
    after_round = None if oracle is None else oracle.measure_round
    detector.fit(training, held_out=others, keep_copies=True, progress=progress, after_round=after_round)
    say(detector)
    if oracle is not None and oracle.state and detector.graph is not None:
        detector.graph.load_state_dict(oracle.state)
        detector.adopt(FitResult(detector.graph, [], [], 0.0, detector.facts))  # no threshold: it was another round's
        click.echo(
            f"--as-original: round {oracle.round} of {oracle.rounds} is kept, the best on the test images", err=True
        )


def _clear(folder: Path, overwrite: bool) -> None:
    """Make room for a run. Raises `OptionError` rather than take an old one for a new one."""
    import shutil

    if not folder.exists():
        return
    if not overwrite:
        raise OptionError(
            f"{folder} exists: choose another --run_name, --overwrite it, or measure it again with --test"
        )
    if any(path.name not in OWN for path in folder.iterdir()):
        raise DataError(f"{folder} holds other things than a run of SimpleNet: choose another --run_name")
    shutil.rmtree(folder)


def _tensorboard(
    folder: Path, rows: "Sequence[Row]", curves: Mapping[str, Mapping[str, Sequence[float]]], last: str
) -> None:
    """Curves and metrics by their published names, the `last` column by its own."""
    from torch.utils.tensorboard.writer import SummaryWriter

    for row in rows:
        with SummaryWriter(str(folder / row.name)) as writer:
            for name, values in curves[row.name].items():
                for number, value in enumerate(values, 1):
                    writer.add_scalar(name, value, number)
            found = (row.instance_auroc, row.full_pixel_auroc, row.anomaly_pixel_auroc)
            for tag, metric in zip(("i-auroc", "p-auroc", last), found, strict=True):
                if metric is not None:
                    writer.add_scalar(tag, metric)
