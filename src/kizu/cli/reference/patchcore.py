"""PatchCore's two command lines: what follows run_patchcore.py, and what follows load_and_evaluate_patchcore.py."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kizu.cli.reference.shared import (
    as_original_option,
    data_flags,
    data_set,
    device,
    flags,
    free_folder,
    groups,
    main_flags,
    parted,
    place,
    print_rows,
    say,
    weights_option,
)
from kizu.errors import OptionError

if TYPE_CHECKING:
    from kizu.cli.reference.scoring import Row
    from kizu.config import PatchCoreConfig
    from kizu.data.dataset import Sample
    from kizu.data.progress import Progress
    from kizu.detectors.base import Detector

__all__ = ["evaluate", "run"]

SAMPLERS = ("identity", "greedy_coreset", "approx_greedy_coreset", "random")
MEANS = ("preprocessing", "aggregation")  # options whose other values the published code takes for "mean"
Parts = Sequence[tuple[str, dict[str, Any]]]

search_flags = flags(
    click.option("--faiss_on_gpu", is_flag=True, help="Search on the GPU, where the network is."),
    click.option("--faiss_num_workers", type=click.IntRange(1), help="Threads of the search. Default: torch's."),
)


@click.group(
    chain=True, short_help="What follows run_patchcore.py.", subcommand_metavar="patch_core … sampler … dataset …"
)
@click.argument("results_path")
@main_flags
@click.option("--log_group", default="group", show_default=True, help="Folder of the run.")
@click.option("--log_project", default="project", show_default=True, help="Folder above it.")
@click.option("--save_patchcore_model", is_flag=True, help="Write models/<data set>_<category>.")
@click.option("--log_online", is_flag=True, help="Tell Weights & Biases of the results.")
@click.option("--log_wandb_key", metavar="KEY", help="Its key; otherwise its own settings are used.")
@as_original_option
def run(**_: Any) -> None:
    """PatchCore: the line after run_patchcore.py.

    \b
    Example:  kizu reference patchcore --save_patchcore_model results patch_core -b efficientnet_lite2
                -le blocks.2 -le blocks.3 sampler -p 0.1 approx_greedy_coreset dataset -d bottle mvtec DATA
    """


@run.command("patch_core")
@click.option("--backbone_names", "-b", multiple=True, required=True, help="Published name, or timm's. Repeatable.")
@click.option(
    "--layers_to_extract_from", "-le", multiple=True, help="Layer; of several backbones, idx.layer. Repeatable."
)
@click.option("--pretrain_embed_dimension", type=int, default=1024, show_default=True)
@click.option("--target_embed_dimension", type=int, default=1024, show_default=True)
@click.option("--preprocessing", type=click.Choice(("mean", "conv")), default="mean", show_default=True)
@click.option("--aggregation", type=click.Choice(("mean", "mlp")), default="mean", show_default=True)
@click.option("--anomaly_scorer_num_nn", type=int, default=5, show_default=True, help="Nearest entries averaged over.")
@click.option("--patchsize", type=int, default=3, show_default=True)
@click.option("--patchscore", type=click.Choice(("max", "mean")), default="max", show_default=True)
@click.option("--patchoverlap", type=float, help="Share that neighbouring patches overlap. Default: one step apart.")
@click.option("--patchsize_aggregate", "-pa", type=int, multiple=True, help="A further patchsize. Repeatable.")
@search_flags
@weights_option
def patch_core(**options: Any) -> tuple[str, dict[str, Any]]:
    """The network and the memory bank."""
    return "patch_core", options


@run.command("sampler")
@click.argument("name", type=click.Choice(SAMPLERS))
@click.option("--percentage", "-p", type=float, default=0.1, show_default=True, help="Share of the patches kept.")
def sampler(**options: Any) -> tuple[str, dict[str, Any]]:
    """How the memory bank is chosen."""
    return "sampler", options


@run.command("dataset")
@data_flags
@click.option(
    "--train_val_split", type=float, default=1.0, show_default=True, help="Share learned from; the rest is held out."
)
@click.option("--batch_size", type=click.IntRange(1), default=2, show_default=True)
@click.option("--num_workers", type=click.IntRange(0), default=8, show_default=True)
def dataset(**options: Any) -> tuple[str, dict[str, Any]]:
    """Which photographs."""
    return "dataset", options


@run.result_callback()
def finish(parts: Parts, **main: Any) -> None:
    from kizu.cli import terminal
    from kizu.detectors.patchcore.detector import PatchCore
    from kizu.evaluation import tracking
    from kizu.export import reference_files

    network, choice, data = groups(parts, ("patch_core", "sampler", "dataset"))
    config = _config(main, network, choice, data)
    if main["save_patchcore_model"]:
        reference_files.check_patchcore(config)
    tracking.check_services(["wandb"] if main["log_online"] else [])
    found = data_set(data["name"], data["data_path"], data["subdatasets"])
    folder = free_folder(Path(main["results_path"]) / main["log_project"] / main["log_group"])
    _set_threads(network["faiss_num_workers"])
    rows: list[Row] = []
    with terminal.progress(False) as progress, terminal.messages(False, warnings_only=True):
        on = device(main["gpu"])
        for category in data["subdatasets"]:
            name = f"{data['name']}_{category}"
            detector = PatchCore(config)
            place(detector, on, data["num_workers"], data["batch_size"])
            training, held_out = parted(found, category, data["train_val_split"])
            detector.fit(training, held_out=held_out, keep_copies=True, progress=progress(name))
            say(detector)
            if main["save_patchcore_model"]:
                reference_files.write_reference(detector, folder / "models" / name)
            pictures = folder / "segmentation_images" / name if main["save_segmentation_images"] else None
            test = found.select(category, "test")
            rows.append(_evaluated(detector, test, name, main["as_original"], pictures, progress(name)))
        _write_results(folder, rows)
        if main["log_online"]:
            _log_online(main, config, rows, folder)
    print_rows(rows, folder)


@click.group(
    chain=True,
    short_help="What follows load_and_evaluate_patchcore.py.",
    subcommand_metavar="patch_core_loader … dataset …",
)
@click.argument("results_path")
@main_flags
@as_original_option
def evaluate(**_: Any) -> None:
    """PatchCore: the line after load_and_evaluate_patchcore.py.

    \b
    Example:  kizu reference patchcore-evaluate again patch_core_loader -p results/project/group/models/mvtec_bottle
                dataset -d bottle mvtec DATA
    """


@evaluate.command("patch_core_loader")
@click.option("--patch_core_paths", "-p", multiple=True, required=True, help="Folder of a model. Repeatable.")
@search_flags
@weights_option
def patch_core_loader(**options: Any) -> tuple[str, dict[str, Any]]:
    """The models, one for each category, or one for all."""
    return "patch_core_loader", options


@evaluate.command("dataset")
@data_flags
@click.option("--batch_size", type=click.IntRange(1), default=1, show_default=True)
@click.option("--num_workers", type=click.IntRange(0), default=8, show_default=True)
def evaluated_dataset(**options: Any) -> tuple[str, dict[str, Any]]:
    """Which photographs."""
    return "dataset", options


@evaluate.result_callback()
def finish_evaluation(parts: Parts, **main: Any) -> None:
    from kizu.cli import terminal
    from kizu.export import reference_files

    loader, data = groups(parts, ("patch_core_loader", "dataset"))
    paths, categories = loader["patch_core_paths"], data["subdatasets"]
    if len(paths) not in (1, len(categories)):
        raise OptionError(
            f"{len(paths)} models (-p) for {len(categories)} categories (-d): give one for each, or one for all"
        )
    found = data_set(data["name"], data["data_path"], categories)
    folder = Path(main["results_path"])
    _set_threads(loader["faiss_num_workers"])
    rows = []
    with terminal.progress(False) as progress, terminal.messages(False, warnings_only=True):
        on = device(main["gpu"])
        for number, category in enumerate(categories):
            weights = ",".join(loader["weights"]) or None
            path = paths[number if len(paths) > 1 else 0]
            detector = reference_files.read_reference(
                path,
                size=data["imagesize"],
                resize=data["resize"],
                weights=weights,
                neighbours=1 if main["as_original"] else None,
            )
            place(detector, on, data["num_workers"], data["batch_size"])
            name = f"{data['name']}_{category}"
            pictures = folder if main["save_segmentation_images"] else None
            test = found.select(category, "test")
            rows.append(_evaluated(detector, test, name, main["as_original"], pictures, progress(name)))
        _write_results(folder, rows)
    print_rows(rows, folder)


def _config(
    main: dict[str, Any], network: dict[str, Any], choice: dict[str, Any], data: dict[str, Any]
) -> "PatchCoreConfig":
    """What the flags say; with --as-original, what the published code makes of them."""
    from kizu.config import PatchCoreConfig, backbone_names, build

    original = main["as_original"]
    for option in MEANS:
        if network[option] != "mean" and not original:
            raise OptionError(
                f"--{option} {network[option]}: nothing trains such weights, and the published program takes the mean "
                "all the same; leave it out, or add --as-original"
            )
    everything = choice["name"] == "identity" or choice["percentage"] == 1
    settings = {
        "backbone": backbone_names.joined(network["backbone_names"]),
        "layers": network["layers_to_extract_from"],
        "weights": ",".join(network["weights"]) or None,
        **{key: network[key] for key in ("pretrain_embed_dimension", "target_embed_dimension", "patchsize")},
        "patchstride": 1 if original else _stride(network["patchsize"], network["patchoverlap"]),
        "patchsize_aggregate": () if original else network["patchsize_aggregate"],
        "neighbours": 1 if original else network["anomaly_scorer_num_nn"],
        "top": 1.0 if network["patchscore"] == "mean" and not original else 0.0,
        "sampler": "identity" if everything else choice["name"],
        "coreset": 1.0 if everything else choice["percentage"],
        "fusion": "stack",
        "local_scale": False,
        "squared": True,
        "size": data["imagesize"],
        "resize": data["resize"],
        "augment": data["augment"] and not original,
        "seed": main["seed"],
    }
    return build(PatchCoreConfig, settings)


def _stride(patchsize: int, overlap: float | None) -> int:
    """Grid places from one patch to the next."""
    if overlap is None:
        return 1
    if not 0 <= overlap < 1:
        raise OptionError(f"--patchoverlap {overlap:g}: a share from 0 to below 1")
    return max(1, round(patchsize * (1 - overlap)))


def _evaluated(
    detector: "Detector",
    test: "Sequence[Sample]",
    name: str,
    original: bool,
    pictures: Path | None,
    progress: "Progress",
) -> "Row":
    from kizu.cli.reference import scoring

    row = scoring.as_published(name, detector, test, progress) if original else None
    if row is None or pictures is not None:
        judged = scoring.judge(detector, test, progress)
        row = row or scoring.measured(name, judged)
        if pictures is not None:
            scoring.write_segmentations(judged, pictures, each_alone=original)
    return row


def _write_results(folder: Path, rows: "Sequence[Row]") -> None:
    from kizu.cli.reference.scoring import results_csv
    from kizu.data import files

    files.write_text(folder / "results.csv", results_csv(rows))


def _set_threads(count: int | None) -> None:
    import torch

    if count is not None:
        torch.set_num_threads(count)


def _log_online(main: dict[str, Any], config: "PatchCoreConfig", rows: "Sequence[Row]", folder: Path) -> None:
    from dataclasses import asdict

    from kizu.evaluation.tracking import RunRecord, log_run

    metrics = {row.name: {key: v for key, v in asdict(row).items() if key != "name"} for row in rows}
    settings = config.model_dump(mode="json")
    record = RunRecord(main["log_project"], main["log_group"], folder.name, settings, metrics)
    log_run(["wandb"], record, main["log_wandb_key"])
