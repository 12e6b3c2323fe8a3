"""The command line: parse, call, print. Nothing heavy is imported before a command needs it.

Exit codes: 0 done; 1 done, but some images could not be judged; 2 not done, a sentence says why; 130 interrupted.
"""

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kizu import __version__
from kizu.cli import deploy as services
from kizu.cli import export as delivery
from kizu.cli import quality as commands
from kizu.cli import terminal
from kizu.cli.arguments import json_option, quiet_option
from kizu.cli.options import PASSED_ON, config_option, run_options
from kizu.cli.reference.commands import import_models, reference
from kizu.cli.wording import flagged
from kizu.detectors import DETECTORS, config_class, methods
from kizu.detectors.ram import allow_tuning
from kizu.errors import KizuError, OptionError, missing_extra
from kizu.inference.model_folder import model_folder

if TYPE_CHECKING:
    from kizu.data.dataset import Dataset

__all__ = ["main"]

_OPTION_NAME = re.compile(r"^--\w[\w-]*")
GROUPS = {
    "Learn": ("train", "distill", "update", "merge", "evaluate", "demo"),
    "Judge": ("predict", "check", "drift", "tune"),
    "On the line": ("export", "verify", "serve", "watch"),
    "Look": ("data", "info", "doctor"),
    "Coming from the originals": ("reference", "import"),
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
        return list(methods())

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        return _train_command(name) if name in DETECTORS or name in methods() else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Without asking for any of them, which would import plug-ins."""
        with formatter.section("Commands"):
            formatter.write_dl(list(methods().items()))


class TrainCommand(click.Command):
    """A command whose options are listed under headings: the method's own, all methods', the data's, the run's."""

    headings: dict[str, Sequence[str]]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """--mix_noise is --mix-noise, as in the published command lines."""
        return super().parse_args(ctx, [_OPTION_NAME.sub(lambda name: name[0].replace("_", "-"), arg) for arg in args])

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rest = {
            param.name: param.get_help_record(ctx) for param in self.get_params(ctx) if isinstance(param, click.Option)
        }
        for heading, names in self.headings.items():
            with formatter.section(heading):
                formatter.write_dl([record for name in names if (record := rest.pop(name, None))])
        with formatter.section("Run"):
            formatter.write_dl([record for record in rest.values() if record])


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, "-V", "--version", message="kizu %(version)s")
def cli() -> None:
    """Visual inspection learned from photographs of good parts only.

    \b
    kizu demo                                a whole run on rendered parts, in a minute
    kizu train patchcore photos/good         learn what good parts look like
    kizu predict results/…/models/good new/  judge new photographs

    Exit codes: 0 done; 1 done, but some images could not be judged; 2 not done; 130 interrupted.
    """


def main() -> None:
    """Run a command; errors are one sentence, Ctrl-C is quiet."""
    allow_tuning()
    try:
        code = cli(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        code = 2
    except KizuError as error:
        click.echo(f"kizu: {flagged(str(error))}", err=True)
        code = 2
    except ModuleNotFoundError as error:
        if isinstance(missing := missing_extra(error), ModuleNotFoundError):
            raise
        click.echo(f"kizu: {missing}", err=True)
        code = 2
    except (KeyboardInterrupt, click.Abort):
        click.echo("kizu: interrupted", err=True)
        code = 130
    except BrokenPipeError:
        sys.stderr.close()
        code = 0
    sys.exit(code if isinstance(code, int) else 0)


def data_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say how a folder of images is to be understood."""
    for option in (
        click.option("--defects-config", metavar="FILE", help="LOCO: saturation thresholds, if not in the data."),
        click.option("--bad", metavar="NAME", help="Plain folders: the folder of defective images."),
        click.option("--good", metavar="NAME", help="Plain folders: the folder of good images."),
        click.option("--layout", default="auto", show_default=True, help="Name the layout instead of recognising it."),
        click.option("-c", "--category", "categories", multiple=True, help="Only this category. Repeatable."),
    ):
        command = option(command)
    return command


def _find(path: str, options: dict[str, Any]) -> "Dataset":
    from kizu.data import dataset

    return dataset.find(
        path,
        layout=options["layout"],
        categories=options["categories"],
        good=options["good"],
        bad=options["bad"],
        defects_config=options["defects_config"],
    )


@cli.group(cls=Methods, subcommand_metavar="METHOD DATA [OPTIONS]")
def train() -> None:
    """Learn from good images, evaluate, write a results folder.

    \b
    Example:  kizu train patchcore mvtec/bottle --name first
    """


def _train_command(method: str) -> click.Command:
    from kizu.config import Augmented, Config, build

    kind = config_class(method)
    about_method = (kind.__doc__ or method).split("\n")[0].rstrip(".")

    @click.command(method, cls=TrainCommand)
    @click.argument("data")
    @data_options
    @run_options
    @quiet_option
    @json_option
    def command(data: str, **options: Any) -> None:
        from kizu.evaluation import experiment as run

        settings = {key: options[key] for key in kind.model_fields if options[key] is not None}
        config = build(kind, settings)
        found = _find(data, options)
        if not (options["quiet"] or options["as_json"]):
            click.echo(terminal.summary(found), err=True)
        quiet = options["quiet"] or options["as_json"]
        with terminal.progress(quiet) as progress, terminal.messages(quiet, warnings_only=True):
            finished, results = run.train(
                method,
                config,
                found,
                Path(options["output"]) / options["project"] / options["group"],
                progress=progress,
                **{key: options[key] for key in PASSED_ON},
            )
        terminal.print_results(results, finished.folder, options)
        if options["profile"]:
            rows = [{"category": r.category, **{k: f"{v:.3f} s" for k, v in r.seconds.items()}} for r in results]
            terminal.print_table(rows)

    command.headings = {
        "Data": ("categories", "layout", "good", "bad", "defects_config", "skip_bad"),
        "Method": [name for name in kind.model_fields if name not in Config.model_fields],
        "Every method": [name for name in Config.model_fields if name not in Augmented.model_fields],
        "Augmentation": list(Augmented.model_fields),
    }
    command.help = f"""{about_method}: learn from DATA's good images and evaluate on its test images.

    DATA is a folder of good images, or a data set (see  kizu data --help).

    \b
    Example:  kizu train {method} mvtec/bottle --size 320 --name fine
    """
    command.params += [config_option(field, about) for field, about in kind.model_fields.items()]
    return command


class DistillCommand(click.Command):
    """A command with options made from the distillation's config when they are asked for."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        from kizu.config import DistillationConfig

        if not any(param.name == "steps" for param in self.params):
            fields = DistillationConfig.model_fields.items()
            flags = {"backbone": "--from"}
            self.params += [config_option(field, about, flags.get(field)) for field, about in fields]
        return super().get_params(ctx)


@cli.command(cls=DistillCommand)
@click.argument("images")
@click.option("--output", default="teachers", show_default=True, help="Folder for the teacher.")
@click.option("--resume", is_flag=True, help="Go on with a training that was interrupted.")
@click.option("--overwrite", is_flag=True, help="Replace a teacher of the same size.")
@quiet_option
def distill(images: str, output: str, resume: bool, overwrite: bool, quiet: bool, **settings: Any) -> None:
    """Make a teacher for EfficientAD from photographs of anything.

    IMAGES is a folder of thousands, at any depth. A small network learns to say of 33 × 33 pixels what two layers
    of a large one say. Published teachers took 1.3 million photographs and 60,000 steps on a GPU.

    \b
    Example:  kizu distill photographs --teacher-for efficientad --size s --from wide_resnet101_2
    """
    from kizu.config import DistillationConfig, build

    config = build(DistillationConfig, {key: value for key, value in settings.items() if value is not None})
    from kizu.detectors.efficientad.distillation import distill

    with terminal.progress(quiet) as progress, terminal.messages(quiet):
        reporting = progress("Teacher")
        target = distill(images, config, Path(output), resume=resume, overwrite=overwrite, progress=reporting)
    if not quiet:
        click.echo(f"{target}\nUse it:  kizu train efficientad PHOTOS --teacher {target}")


@cli.command()
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
    import time

    from kizu import load
    from kizu.evaluation import evaluate as evaluation
    from kizu.evaluation import experiment as run

    if save_maps and output is None:
        raise OptionError("--save-maps needs --output DIR, where the folder maps is written")
    start = time.time()
    found = _find(data, options)
    results, about = [], dict[str, Any]()
    with terminal.progress(options["quiet"] or options["as_json"]) as progress:
        for category in found.categories:
            detector = load(model_folder(model, category))
            result = evaluation.evaluate(
                detector,
                found.select(category, "test"),
                category=category,
                root=found.root,
                saturations=found.saturations.get(category),
                maps=Path(str(output)) / "maps" if save_maps else None,
                progress=progress(category),
            )
            results.append(result)
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
    terminal.print_results(results, None if output is None else Path(output), options)


@cli.command()
@click.argument("model")
@click.argument("images", required=False)
@click.option("--rollback", is_flag=True, help="Take the last update back.")
@click.option("--skip-bad", is_flag=True, help="Leave out images that cannot be read.")
@quiet_option
def update(model: str, images: str | None, rollback: bool, skip_bad: bool, quiet: bool) -> None:
    """Teach a model more good images, without the old ones.

    The memory bank keeps its size. The model as it was before is kept inside, for --rollback.

    \b
    Example:  kizu update results/project/group/run photos/more_good
    """
    folder = model_folder(model)
    if rollback == (images is not None):
        raise OptionError("kizu update takes either a folder of good images or --rollback")
    from kizu.detectors.base import load

    if rollback:
        if not (folder / "previous" / "model.json").exists():
            raise OptionError(f"{folder} holds no previous model: it was not updated, or was rolled back already")
        detector = load(folder / "previous")
    else:
        detector = load(folder)
        with terminal.progress(quiet) as progress:
            detector.update(images, skip_bad=skip_bad, progress=progress("Updating"))
    detector.save(folder, keep_previous=not rollback)
    if not quiet:
        click.echo(f"{folder}: {detector.training['images']} good images. {detector.threshold.statement}")


@cli.command()
@click.argument("models", nargs=-1, required=True)
@click.option("--output", required=True, metavar="DIR", help="Folder for the joined model.")
@quiet_option
def merge(models: tuple[str, ...], output: str, quiet: bool) -> None:
    """Join models that learned from different images of the same part.

    \b
    Example:  kizu merge results/a/group/run results/b/group/run --output models/both
    """
    from kizu.detectors.base import load

    parts = [load(model_folder(model)) for model in models]
    if len({part.method for part in parts}) > 1:
        raise OptionError("Only models of the same method can be merged")
    merged = parts[0].merge(parts)
    merged.save(output)
    if not quiet:
        click.echo(f"{output}: {merged.training['images']} good images. {merged.threshold.statement}")


@cli.command()
@click.argument("model")
@click.argument("images", nargs=-1, required=True)
@click.option("--csv", "csv_file", metavar="FILE", help="Write a row an image.")
@click.option("--overlays", metavar="DIR", help="Write each photograph with its heat map and contours.")
@click.option("--why", metavar="DIR", help="Write what is marked beside the good patches that look most like it.")
@click.option("--profile", is_flag=True, help="Say where the time goes, over the first 20 photographs.")
@quiet_option
@json_option
def predict(model: str, images: tuple[str, ...], csv_file: str | None, overlays: str | None, **options: Any) -> None:
    """Judge new photographs: files, folders (with all below them) or globs.

    A file that cannot be read gets a row that says why; the others are judged, and the exit code is 1.

    \b
    Example:  kizu predict results/project/group/run new/*.png --csv verdicts.csv --overlays seen
    """
    from kizu import load
    from kizu.inference.batch import image_paths, predict_files, profile, write_csv

    detector = load(model_folder(model))
    paths = image_paths(images)
    with terminal.progress(options["quiet"] or options["as_json"]) as progress:
        overlay_folder, why = (Path(folder) if folder else None for folder in (overlays, options["why"]))
        rows = predict_files(detector, paths, overlays=overlay_folder, why=why, progress=progress("Predicting"))
    if csv_file:
        write_csv(Path(csv_file), rows)
    if options["as_json"]:
        click.echo(json.dumps([row.to_json() for row in rows], indent=1, ensure_ascii=False))
    else:
        terminal.print_verdicts(rows, options)
    if options["profile"]:
        readable = [path for path, row in zip(paths, rows, strict=True) if not row.error]
        spent = profile(detector, readable) if readable else {}
        terminal.print_table([{"where": name, "ms an image": f"{value:.1f}"} for name, value in spent.items()])
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
    from kizu.data.inspection import inspect

    found = _find(path, options)
    inspection = inspect(found)
    if options["as_json"]:
        click.echo(json.dumps(inspection.to_json(), indent=1, ensure_ascii=False))
        return
    click.echo(f"{found.root}: {found.layout}, {terminal.count(len(found.categories), 'category', 'categories')}\n")
    terminal.print_table(inspection.rows)
    for note in found.notes:
        click.echo(f"\nNote: {note}")
    if found.left_out:
        click.echo(f"\nLeft out: {terminal.count(len(found.left_out), 'file')}")
        for file, reason in found.left_out[:10]:
            click.echo(f"  {file}: {flagged(reason)}")
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
    from kizu.config import PatchCoreConfig
    from kizu.data import dataset
    from kizu.data.demo import render
    from kizu.evaluation import experiment as run

    images = Path(output) / f"images-{seed}"
    with terminal.progress(options["quiet"] or options["as_json"]) as progress:
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
    terminal.print_results(results, finished.folder, options)
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
    folder = model_folder(model)
    from kizu.cli.doctor import describe_model

    _say(describe_model(folder), as_json)


@cli.command()
@json_option
def doctor(as_json: bool) -> None:
    """Say what this machine can do: extras, GPU, weights, hub.

    \b
    Example:  kizu doctor
    """
    from kizu.cli.doctor import examine

    _say(examine(), as_json)


def _say(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(facts, indent=1, ensure_ascii=False))
    else:
        terminal.print_facts(facts)


MORE = (commands.check, commands.drift, commands.tune, delivery.export, delivery.verify, services.serve, services.watch)
for command in (*MORE, reference, import_models):
    cli.add_command(command)
