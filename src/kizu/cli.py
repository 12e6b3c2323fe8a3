"""The command line: parse, call, print. Nothing heavy is imported before a command needs it.

Exit codes: 0 done; 1 done, but some images could not be judged; 2 not done, a sentence says why; 130 interrupted.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kizu import __version__
from kizu.detectors import DETECTORS
from kizu.errors import KizuError, OptionError

if TYPE_CHECKING:
    from kizu.config import Config
    from kizu.dataset import Dataset
    from kizu.evaluation import CategoryResult

__all__ = ["main"]

GROUPS = {
    "Learn": ("train", "evaluate", "demo"),
    "Judge": ("predict",),
    "Look": ("data", "info", "doctor"),
}


class Commands(click.Group):
    """Commands listed under headings, in the order in which one meets them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for names in GROUPS.values() for name in names]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for heading, names in GROUPS.items():
            with formatter.section(heading):
                formatter.write_dl([(name, self.commands[name].get_short_help_str(90)) for name in names])


class Methods(click.Group):
    """One `train` command a method, its options made from the method's config when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(DETECTORS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        return _train_command(name) if name in DETECTORS else None


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, "-V", "--version", message="kizu %(version)s")
def cli() -> None:
    """Visual inspection learned from photographs of good parts only.

    \b
    kizu demo                                a whole run on rendered parts, in a minute
    kizu train patchcore photos/good         learn what good parts look like
    kizu predict results/…/models/good new/  judge new photographs
    """


def main() -> None:
    """Run a command; errors are one sentence, Ctrl-C is quiet."""
    try:
        code = cli(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        code = 2
    except KizuError as error:
        click.echo(f"kizu: {error}", err=True)
        code = 2
    except (KeyboardInterrupt, click.Abort):
        click.echo("kizu: interrupted", err=True)
        code = 130
    except BrokenPipeError:
        sys.stderr.close()
        code = 0
    sys.exit(code if isinstance(code, int) else 0)


quiet_option = click.option("-q", "--quiet", is_flag=True, help="Print nothing but results and errors.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")


def data_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say how a folder of images is to be understood."""
    for option in (
        click.option("--bad", metavar="NAME", help="Plain folders: the folder of defective images."),
        click.option("--good", metavar="NAME", help="Plain folders: the folder of good images."),
        click.option("--layout", default="auto", show_default=True, help="Name the layout instead of recognising it."),
        click.option("-c", "--category", "categories", multiple=True, help="Only this category. Repeatable."),
    ):
        command = option(command)
    return command


def _find(path: str, options: dict[str, Any]) -> "Dataset":
    from kizu import dataset

    return dataset.find(
        path,
        layout=options["layout"],
        categories=options["categories"],
        good=options["good"],
        bad=options["bad"],
    )


@cli.group(cls=Methods, subcommand_metavar="METHOD DATA [OPTIONS]")
def train() -> None:
    """Learn from good images, evaluate, write a results folder.

    \b
    Example:  kizu train patchcore mvtec/bottle --name first
    """


def _train_command(method: str) -> click.Command:
    from kizu.config import CONFIGS

    kind = CONFIGS[method]

    @click.command(method, short_help=(kind.__doc__ or "").strip())
    @click.argument("data")
    @data_options
    @click.option("--output", default="results", show_default=True, help="Folder for all results.")
    @click.option("--project", default="project", show_default=True, help="Sub-folder of OUTPUT.")
    @click.option("--group", default="group", show_default=True, help="Sub-folder of PROJECT.")
    @click.option("--name", help="Sub-folder of GROUP. Default: run, run-2, …")
    @click.option("--resume", is_flag=True, help="Go on with a run that was interrupted.")
    @click.option("--overwrite", is_flag=True, help="Replace a run of the same name.")
    @click.option("--skip-bad", is_flag=True, help="Leave out training images that cannot be read.")
    @quiet_option
    @json_option
    def command(data: str, **options: Any) -> None:
        from kizu import run
        from kizu.config import build

        settings = {key: options[key] for key in kind.model_fields if options[key] is not None}
        config: Config = build(kind, settings)
        found = _find(data, options)
        _say(options, _summary(found))
        with _progress(options["quiet"] or options["as_json"]) as progress:
            finished, results = run.train(
                method,
                config,
                found,
                Path(options["output"]) / options["project"] / options["group"],
                progress=progress,
                **{key: options[key] for key in ("name", "resume", "overwrite", "skip_bad")},
            )
        _print_results(results, finished.folder, options)

    command.help = f"""{(kind.__doc__ or "").strip()}: learn from DATA's good images and evaluate on its test images.

    DATA is a folder of good images, or a data set (see  kizu data --help).

    \b
    Example:  kizu train {method} mvtec/bottle --size 320 --name fine
    """
    for field, about in kind.model_fields.items():
        default = about.get_default()
        shown = "x".join(map(str, default)) if isinstance(default, tuple) and default else default
        suffix = f"  [default: {shown}]" if shown not in (None, ()) else ""
        option = click.Option(
            [f"--{field.replace('_', '-')}"],
            type=_option_type(about.annotation),
            help=f"{about.description}{suffix}",
        )
        command.params.append(option)
    return command


def _option_type(annotation: Any) -> Any:
    """What click shows and checks; the config checks the rest."""
    from typing import Literal, get_args, get_origin

    if get_origin(annotation) is Literal:
        return click.Choice(get_args(annotation))
    plain = [part for part in (get_args(annotation) or [annotation]) if part is not type(None)]
    return plain[0] if plain[0] in (int, float) and get_origin(annotation) is not tuple else str


@cli.command()
@click.argument("model")
@click.argument("data")
@data_options
@click.option("--output", metavar="DIR", help="Write results.csv, predictions.csv and report.html there.")
@quiet_option
@json_option
def evaluate(model: str, data: str, output: str | None, **options: Any) -> None:
    """Measure a model on the test images of a data set.

    MODEL is a model's folder, or a run's folder with one model a category.

    \b
    Example:  kizu evaluate results/project/group/run mvtec/bottle --output again
    """
    import time

    from kizu import evaluation, load, run

    start = time.time()
    found = _find(data, options)
    results = []
    about: dict[str, Any] = {}
    with _progress(options["quiet"] or options["as_json"]) as progress:
        for category in found.categories:
            detector = load(_model_folder(model, category))
            samples = found.select(category, "test")
            results.append(
                evaluation.evaluate(detector, samples, category=category, root=found.root, progress=progress(category))
            )
            about = {"method": detector.method, "config": detector.config.model_dump(mode="json")}
    if output is not None:
        about |= {
            "data": str(found.root),
            "machine": run.machine(),
            "versions": run.versions(),
            "command": run.command_line(),
            "seconds": time.time() - start,
        }
        run.write_tables(Path(output), about, results)
    _print_results(results, None if output is None else Path(output), options)


@cli.command()
@click.argument("model")
@click.argument("images", nargs=-1, required=True)
@click.option("--csv", "csv_file", metavar="FILE", help="Write a row an image.")
@click.option("--overlays", metavar="DIR", help="Write each photograph with its heat map and contours.")
@quiet_option
@json_option
def predict(model: str, images: tuple[str, ...], csv_file: str | None, overlays: str | None, **options: Any) -> None:
    """Judge new photographs: files, folders (with all below them) or globs.

    A file that cannot be read gets a row that says why; the others are judged, and the exit code is 1.

    \b
    Example:  kizu predict results/project/group/run new/*.png --csv verdicts.csv --overlays seen
    """
    from kizu import load
    from kizu.prediction import judge, listing, write_csv

    detector = load(_model_folder(model))
    paths = listing(images)
    with _progress(options["quiet"] or options["as_json"]) as progress:
        rows = judge(detector, paths, Path(overlays) if overlays else None, progress("Predicting"))
    if csv_file:
        write_csv(Path(csv_file), rows)
    if options["as_json"]:
        click.echo(json.dumps([row.to_json() for row in rows], indent=1, ensure_ascii=False))
    else:
        _print_verdicts(rows, options)
    if any(row.error for row in rows):
        click.get_current_context().exit(1)


@cli.command()
@click.argument("path")
@data_options
@json_option
def data(path: str, **options: Any) -> None:
    """Say what a folder of images is: layout, splits, counts, and what looks wrong.

    Recognised: MVTec AD and LOCO, VisA, BTAD, MPDD, KolektorSDD and SDD2, CIFAR-10 (binary), and plain folders of good
    images, with or without defective ones and masks.

    \b
    Example:  kizu data mvtec
    """
    from kizu import dataset

    found = _find(path, options)
    inspection = dataset.inspect(found)
    if options["as_json"]:
        click.echo(json.dumps(inspection.to_json(), indent=1, ensure_ascii=False))
        return
    click.echo(f"{found.root}: {found.layout}, {_count(len(found.categories), 'category', 'categories')}\n")
    _print_table(inspection.rows)
    for note in found.notes:
        click.echo(f"\nNote: {note}")
    if found.left_out:
        click.echo(f"\nLeft out: {_count(len(found.left_out), 'file')}")
        for file, reason in found.left_out[:10]:
            click.echo(f"  {file}: {reason}")
        if len(found.left_out) > 10:
            click.echo(f"  … and {len(found.left_out) - 10} more (--json lists all)")
    if inspection.warnings:
        click.echo("\nWorth a look:")
        for warning in inspection.warnings:
            click.echo(f"  {warning}")


@cli.command()
@click.option("--output", default="demo", show_default=True, help="Folder for the images and the results.")
@click.option("--seed", default=0, show_default=True, help="Another seed renders other parts.")
@quiet_option
@json_option
def demo(output: str, seed: int, **options: Any) -> None:
    """Render a machined part, good and defective; learn, evaluate, report.

    \b
    Example:  kizu demo
    """
    from kizu import dataset, run
    from kizu.config import PatchCoreConfig
    from kizu.demo import render

    images = Path(output) / f"images-{seed}"
    with _progress(options["quiet"] or options["as_json"]) as progress:
        rendering = progress("flange")
        if not (images / "flange").exists():
            render(images, seed=seed, progress=lambda done, total: rendering("Rendering", done, total))
        finished, results = run.train(
            "patchcore",
            PatchCoreConfig(seed=seed),
            dataset.find(images / "flange"),
            Path(output) / "results" / "demo" / "patchcore",
            progress=progress,
        )
    _print_results(results, finished.folder, options)
    if not (options["quiet"] or options["as_json"]):
        click.echo(
            "\nOn your own photographs:\n"
            "  kizu data PHOTOS                          what kizu sees in a folder\n"
            "  kizu train patchcore PHOTOS --name mine   learn from its good images\n"
            "  kizu predict results/project/group/mine NEW_PHOTOS --overlays seen"
        )


@cli.command()
@click.argument("model")
@json_option
def info(model: str, as_json: bool) -> None:
    """Say what a model is: learned from what, how, and how it decides.

    \b
    Example:  kizu info results/project/group/run
    """
    folder = _model_folder(model)
    from kizu.doctor import describe_model

    about = describe_model(folder)
    if as_json:
        click.echo(json.dumps(about, indent=1, ensure_ascii=False))
    else:
        _print_facts(about)


@cli.command()
@json_option
def doctor(as_json: bool) -> None:
    """Say what this machine can do: extras, GPU, weights, hub.

    \b
    Example:  kizu doctor
    """
    from kizu.doctor import examine

    findings = examine()
    if as_json:
        click.echo(json.dumps(findings, indent=1, ensure_ascii=False))
    else:
        _print_facts(findings)


def _model_folder(path: str, category: str | None = None) -> Path:
    """A model's folder from itself, or from a run or its models folder, by category where there are several."""
    folder = Path(path)
    if (folder / "model.json").exists():
        return folder
    models = folder / "models" if (folder / "models").is_dir() else folder
    names = sorted(candidate.parent.name for candidate in models.glob("*/model.json")) if models.is_dir() else []
    if category in names:
        return models / str(category)
    if len(names) == 1:
        return models / names[0]
    if not names:
        raise OptionError(f"{path}: there is no kizu model (a folder with model.json and model.safetensors)")
    raise OptionError(f"{path} holds {len(names)} models; name one: {', '.join(str(models / name) for name in names)}")


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[str], Callable[[str, int, int], None]]]:
    """For a label, something to report (stage, done, total) to; bars on a terminal's standard error."""
    if quiet or not sys.stderr.isatty():
        yield lambda label: lambda stage, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[tuple[str, str], Any] = {}

        def reporter(label: str) -> Callable[[str, int, int], None]:
            def report(stage: str, done: int, total: int) -> None:
                key = (label, stage)
                if key not in tasks:
                    tasks[key] = bars.add_task(f"{label}  {stage}", total=total)
                bars.update(tasks[key], completed=done, total=total)
                if done >= total:
                    bars.remove_task(tasks.pop(key))

            return report

        yield reporter


def _say(options: dict[str, Any], text: str) -> None:
    if not (options["quiet"] or options["as_json"]):
        click.echo(text, err=True)


def _summary(found: "Dataset") -> str:
    splits = ((split, len(found.select(split=split))) for split in ("train", "validation", "test"))
    counts = ", ".join(f"{number} {split}" for split, number in splits if number)
    lines = [
        f"{found.root}: {found.layout}, {_count(len(found.categories), 'category', 'categories')}, {counts} images"
    ]
    lines += [f"Note: {note}" for note in found.notes]
    return "\n".join(lines)


def _print_results(results: "Sequence[CategoryResult]", folder: Path | None, options: dict[str, Any]) -> None:
    if options["as_json"]:
        rows = [
            {
                "category": result.category,
                **result.metrics,
                "threshold": result.threshold,
                "false_alarms": result.count(defective=False, stopped=True),
                "misses": result.count(defective=True, stopped=False),
            }
            for result in results
        ]
        click.echo(json.dumps({"folder": folder and str(folder), "categories": rows}, indent=1))
        return
    _print_table([_result_row(result) for result in results])
    for result in results:
        click.echo(f"\n{result.category}: {result.statement}" if result.statement else "")
        for reason in sorted(set(result.reasons.values())):
            names = ", ".join(name for name in result.reasons if result.reasons[name] == reason)
            click.echo(f"  n/a: {names}: {reason}")
        for note in result.notes:
            click.echo(f"  Note: {note}")
        for row in result.judged:
            if row.error:
                click.echo(f"  Not judged: {row.image} {row.error}")
    if folder is not None:
        click.echo(f"\nResults: {folder}\nReport:  {folder / 'report.html'}")


def _result_row(result: "CategoryResult") -> dict[str, str]:
    good, bad = result.count(defective=False), result.count(defective=True)
    names = {"image_auroc": "image AUROC", "pixel_auroc": "pixel AUROC", "au_pro": "AU-PRO"}
    values = {key: result.metrics.get(key) for key in names}
    return {
        "category": result.category,
        **{names[key]: "n/a" if value is None else f"{value:.4f}" for key, value in values.items()},
        "defects stopped": f"{result.count(defective=True, stopped=True)} of {bad}",
        "false alarms": f"{result.count(defective=False, stopped=True)} of {good}",
        "ms/image": f"{1000 * result.seconds.get('per image', 0):.0f}" if result.judged else "n/a",
    }


def _print_verdicts(rows: Sequence[Any], options: dict[str, Any]) -> None:
    for row in rows:
        if row.error:
            click.echo(f"error  {row.path}: {row.error}")
        elif not options["quiet"] or row.verdict == "stop":
            click.echo(f"{row.verdict:5}  {row.score:10.4f}  {row.path}")
    if not options["quiet"]:
        counts = {word: sum(row.verdict == word for row in rows) for word in ("stop", "pass", "error")}
        level = next((row.threshold for row in rows if not row.error), None)
        counted = ", ".join(f"{number} {word}" for word, number in counts.items() if number)
        click.echo(f"\n{counted}" + ("" if level is None else f"; stopped above {level:.4f}"), err=True)


def _print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Columns as wide as their content: text left, numbers right."""
    if not rows:
        return
    cells = [list(rows[0])] + [[str(value) for value in row.values()] for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    left = [not any(line[column][:1].isdigit() for line in cells[1:]) for column in range(len(cells[0]))]
    for line in cells:
        padded = (
            cell.ljust(width) if is_left else cell.rjust(width)
            for cell, width, is_left in zip(line, widths, left, strict=True)
        )
        click.echo("  ".join(padded).rstrip())


def _print_facts(facts: dict[str, Any]) -> None:
    width = max(len(key) for key in facts)
    for key, value in facts.items():
        lines = value if isinstance(value, list) else [value]
        for number, line in enumerate(lines or ["none"]):
            click.echo(f"{key if number == 0 else '':{width}}  {line}")


def _count(number: int, singular: str, plural: str | None = None) -> str:
    return f"{number} {singular if number == 1 else plural or singular + 's'}"
