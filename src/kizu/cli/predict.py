"""Commands that judge photographs and measure how well: predict, evaluate, data."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import click

from kizu.cli import terminal
from kizu.cli.options import cluster_options, data_options, find_data, json_option, quiet_option
from kizu.cli.wording import flagged
from kizu.errors import OptionError
from kizu.inference.model_folder import model_folder

__all__ = ["data", "evaluate", "predict"]

MAX_LISTED = 10  # files that are left out, named one by one


@click.command()
@click.argument("model")
@click.argument("images", nargs=-1)
@click.option("--csv", "csv_file", metavar="FILE", help="Write a table with a row for each image.")
@click.option("--overlays", metavar="DIR", help="Write each photograph with its heat map and contours.")
@click.option("--why", metavar="DIR", help="Write what is marked beside the good patches that look most like it.")
@click.option("--profile", is_flag=True, help="Say where the time goes, over the first 20 photographs.")
@cluster_options
@quiet_option
@json_option
def predict(model: str, images: tuple[str, ...], csv_file: str | None, overlays: str | None, **options: Any) -> None:
    """Judge new photographs: files, folders (with all below them) or globs.

    A file that cannot be read gets a row that says why; the others are judged, and the exit code is 1.

    With --ray and --parquet a cluster judges them, and addresses as s3://bucket/photos too. The same command again goes
    on where it was ended.

    \b
    Example:  kizu predict results/project/group/run new/*.png --csv verdicts.csv --overlays seen
    """
    if options["ray"] is not None:
        _predict_on_ray(model, images, options | {"csv": csv_file, "overlays": overlays})
        return
    for name in ("parquet", "listing", "column", "actors", "part"):
        if options[name] is not None:
            raise OptionError(f"{_flag(name)} belongs to --ray")
    if not images:
        raise OptionError("kizu predict MODEL takes photographs: files, folders or globs")
    from kizu import load
    from kizu.inference.batch import image_paths, predict_files, profile, write_csv

    detector = load(model_folder(model))
    paths = image_paths(images)
    with terminal.progress(options["quiet"] or options["as_json"]) as progress:
        overlay_folder, why = (Path(folder) if folder else None for folder in (overlays, options["why"]))
        rows = predict_files(detector, paths, overlays=overlay_folder, why=why, progress=progress("Predicting"))
    if why and not detector.thumbnails and any(why.glob("*")):
        sentence = "The pictures of --why are grey where the good part should be: this model keeps no pictures of those"
        click.echo(f"Note: {sentence} that it learned from. Train it with --thumbnails.", err=True)
    if csv_file:
        write_csv(Path(csv_file), rows, detector)
    if options["as_json"]:
        terminal.print_json([row.to_json() for row in rows])
    else:
        terminal.print_verdicts(rows, options, measured=detector.measured_on is not None)
    if options["profile"]:
        readable = [path for path, row in zip(paths, rows, strict=True) if not row.error]
        spent = profile(detector, readable) if readable else {}
        terminal.print_table([{"where": name, "ms an image": f"{value:.1f}"} for name, value in spent.items()])
    if any(row.error for row in rows):
        click.get_current_context().exit(1)


def _predict_on_ray(model: str, images: tuple[str, ...], options: dict[str, Any]) -> None:
    from kizu.ray.cluster import check_address
    from kizu.ray.predict import predict as judge

    if options["ray"]:
        check_address(options["ray"])
    for name in ("csv", "overlays", "why", "profile"):
        if options[name]:
            raise OptionError(f"{_flag(name)} does not go with --ray: judge the photographs in question without it")
    if options["parquet"] is None:
        raise OptionError("--ray needs --parquet DIR, where a row a photograph is written")
    if not images and options["listing"] is None:
        raise OptionError(
            "kizu predict MODEL --ray takes photographs: files, folders, globs or addresses, or --from FILE"
        )
    quiet = options["quiet"] or options["as_json"]
    with terminal.cluster(options["ray"]), terminal.progress(quiet) as progress:
        judged = judge(
            model,
            images,
            options["parquet"],
            listing=options["listing"],
            column=options["column"],
            actors=options["actors"],
            part=options["part"],
            progress=progress("Ray"),
        )
    if options["as_json"]:
        terminal.print_json({**dataclasses.asdict(judged), "folder": options["parquet"]})
    else:
        row = {
            "photographs": f"{sum(judged.counts.values()) + judged.missing:,}",
            **{name: f"{count:,}" for name, count in judged.counts.items() if count or name != "ask"},
            **({"given up": f"{judged.missing:,}"} if judged.missing else {}),
            "judged before": f"{judged.before:,}",
            "seconds": f"{judged.seconds:.1f}",
            "a second": f"{judged.rate:.1f}",
        }
        terminal.print_table([row])
        if not options["quiet"]:
            click.echo(f"\nVerdicts: {options['parquet']}")
    for reason in judged.reasons:
        click.echo(f"Given up: {reason}", err=True)
    if judged.counts["error"] or judged.missing:
        click.get_current_context().exit(1)


def _flag(name: str) -> str:
    return {"listing": "--from"}.get(name, f"--{name}")


@click.command()
@click.argument("model")
@click.argument("data")
@data_options
@click.option("--output", metavar="DIR", help="Write results.csv, predictions.csv and report.html there.")
@click.option("--save-maps", is_flag=True, help="Write the test images' anomaly maps there, as float TIFF.")
@quiet_option
@json_option
def evaluate(model: str, data: str, output: str | None, save_maps: bool, **options: Any) -> None:
    """Measure a model on the test images of a data set.

    MODEL is a model's folder, or a run's folder with one model a category.

    \b
    Example:  kizu evaluate results/project/group/run mvtec/bottle --output again
    """
    from kizu import load
    from kizu.evaluation import experiment
    from kizu.evaluation.evaluate import evaluate as measure

    if save_maps and output is None:
        raise OptionError("--save-maps needs --output DIR, where the folder maps is written")
    start = time.time()
    dataset = find_data(data, options)
    for note in dataset.notes:
        click.echo(f"Note: {flagged(note)}", err=True)
    results, about = [], dict[str, Any]()
    with terminal.progress(options["quiet"] or options["as_json"]) as progress:
        for category in dataset.categories:
            detector = load(model_folder(model, category))
            result = measure(
                detector,
                dataset.select(category, "test"),
                category=category,
                root=dataset.root,
                saturations=dataset.saturations.get(category),
                maps=Path(str(output)) / "maps" if save_maps else None,
                progress=progress(category),
            )
            results.append(result)
            about = {"method": detector.method, "config": detector.config.model_dump(mode="json")}
    if output is not None:
        about |= {
            "data": str(dataset.root),
            "machine": experiment.machine(),
            "versions": experiment.versions(),
            "command": experiment.command_line(),
            "seconds": time.time() - start,
        }
        experiment.write_tables(Path(output), about, results, flagged)
    terminal.print_results(results, None if output is None else Path(output), options)
    if any(row.error for result in results for row in result.scores):
        click.get_current_context().exit(1)


@click.command()
@click.argument("path")
@data_options
@json_option
def data(path: str, **options: Any) -> None:
    """Say what a folder of images is: layout, splits, counts, and what looks wrong.

    Recognised: MVTec AD and LOCO, VisA, BTAD, MPDD, KolektorSDD and SDD2, CIFAR-10 (binary), images with what COCO,
    Label Studio, VIA, CVAT or Lookout for Vision say of them, and plain folders of good images, with or without
    defective ones and masks.

    \b
    Example:  kizu data mvtec
    """
    from kizu.data.inspection import inspect

    dataset = find_data(path, options)
    inspection = inspect(dataset)
    if options["as_json"]:
        terminal.print_json(inspection.to_json())
        return
    click.echo(
        f"{dataset.root}: {dataset.layout}, {terminal.count(len(dataset.categories), 'category', 'categories')}\n"
    )
    terminal.print_table(inspection.rows)
    for note in dataset.notes:
        click.echo(f"\nNote: {flagged(note)}")
    if dataset.left_out:
        click.echo(f"\nLeft out: {terminal.count(len(dataset.left_out), 'file')}")
        for file, reason in dataset.left_out[:MAX_LISTED]:
            click.echo(f"  {file}: {flagged(reason)}")
        if len(dataset.left_out) > MAX_LISTED:
            click.echo(f"  … and {len(dataset.left_out) - MAX_LISTED} more (--json lists all)")
    if inspection.warnings:
        click.echo("\nWorth a look:")
        for warning in inspection.warnings:
            click.echo(f"  {flagged(warning)}")
