"""Commands that learn: train, distill, demo."""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kizu.cli import terminal
from kizu.cli.learn.tiles import smallest_option, tiles_for
from kizu.cli.options import (
    config_file_option,
    config_option,
    data_options,
    find_data,
    json_option,
    quiet_option,
    ray_option,
    run_options,
    settings_text,
    shards_option,
    zone_options,
)
from kizu.cli.wording import flagged
from kizu.detectors import DETECTORS, config_class, methods
from kizu.errors import OptionError

if TYPE_CHECKING:
    from kizu.config import Config
    from kizu.data.dataset import Dataset
    from kizu.evaluation.experiment import Learner

__all__ = ["demo", "distill", "train"]

_OPTION_NAME = re.compile(r"^--\w[\w-]*")


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


@click.group(cls=Methods, subcommand_metavar="METHOD DATA [OPTIONS]")
def train() -> None:
    """Learn from good images, evaluate, write a results folder.

    \b
    Example:  kizu train patchcore mvtec/bottle --name first
    """


def _train_command(method: str) -> click.Command:
    from kizu.config import BackboneConfig

    kind = config_class(method)
    about_method = (kind.__doc__ or method).split("\n")[0].rstrip(".")

    @click.command(method, cls=TrainCommand)
    @click.argument("data", required=False, metavar="DATA")
    @data_options
    @run_options
    @click.option(
        "--seeds", metavar="LIST", help="Train once for each seed, as in 0-4: mean and spread of the figures."
    )
    @click.option(
        "--folds",
        type=click.IntRange(2, 100),
        help="Cross-validation: train this many times, each time judging another part of the good images.",
    )
    @smallest_option
    @shards_option
    @ray_option
    @click.option("--print-config", is_flag=True, help="Print the settings as a file for --config, and end.")
    @quiet_option
    @json_option
    def command(data: str | None, **options: Any) -> None:
        from kizu.config import build

        given = {key: options[key] for key in kind.model_fields if options[key] is not None}
        given |= _zones(data, options)
        config = build(kind, given)
        if options["smallest"] is not None:
            config = build(kind, given | tiles_for(options["smallest"], config, given, data, options))
        if options["print_config"]:
            click.echo(settings_text(config))
        elif data is None:
            _check_address(options)  # which DATA may have been taken for
            raise click.MissingParameter(param_hint="'DATA'", param_type="argument")
        else:
            _learn(method, config, data, options)

    command.headings = _headings(kind)
    command.help = f"""{about_method}: learn from DATA's good images and evaluate on its test images.

    DATA is a folder of good images, or a data set (see  kizu data --help).

    \b
    Example:  kizu train {method} mvtec/bottle --name first
    """
    for param in command.params:  # settings are chosen for methods with a pretrained network
        if isinstance(param, click.Option) and param.name in ("auto", "minutes", "milliseconds"):
            param.hidden = not issubclass(kind, BackboneConfig)
    command.params += [config_option(field, about) for field, about in kind.model_fields.items()]
    zone_options(command)
    command.params.append(config_file_option())
    return command


def _headings(kind: "type[Config]") -> dict[str, Sequence[str]]:
    """The options of a method under headings, by their names."""
    from kizu.config import Augmented, Config

    every_method = [name for name in Config.model_fields if name not in {*Augmented.model_fields, "zones"}]
    every_method.insert(every_method.index("tile"), "smallest")
    return {
        "Data": ("categories", "layout", "good", "bad", "defects_config", "skip_bad", "keep_copies", "group_by"),
        "Method": [name for name in kind.model_fields if name not in Config.model_fields],
        "Every method": every_method,
        "Zones": ("inspect", "ignore", *(f"zone_{setting}" for setting in ZONE_SETTINGS), "zones"),
        "Augmentation": list(Augmented.model_fields),
    }


def _zones(data: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """The setting that --zones, --inspect and --ignore give, if any of them is there."""
    own = {setting: _by_zone(options, setting) for setting in ZONE_SETTINGS}
    if not (options["inspect"] or options["ignore"] or options["zones"] or any(own.values())):
        return {}
    from kizu.inference.zones import read_zones

    def photograph() -> tuple[int, int]:
        if data is None:
            raise OptionError("corners in pixels are of DATA's photographs: name it, or write them in percent")
        train = [sample for sample in find_data(data, options).samples if sample.split == "train"]
        if not train:
            raise OptionError(f"{data} holds no photograph that corners in pixels could be of: write them in percent")
        height, width = train[0].read()[1]
        return width, height

    file = str(options["zones"] or "")
    return {"zones": read_zones(options["inspect"], options["ignore"], file=file, photograph=photograph, **own)}


def _by_zone(options: dict[str, Any], setting: str) -> dict[str, Any]:
    """The values that an option gives zones, by their names."""
    kind, example = ZONE_SETTINGS[setting]
    values = {}
    for text in options[f"zone_{setting}"]:
        name, _, value = text.rpartition("=")
        try:
            values[name.strip()] = kind(value)
        except ValueError:
            flag = f"--zone-{setting.replace('_', '-')}"
            raise OptionError(f"{flag} {text}: write the zone's name and a number, as {example}") from None
    return values


def _check_ray(method: str, data: str, options: dict[str, Any]) -> str:
    """DATA as every machine of a cluster finds it. Raises `OptionError` for what does not go with --ray."""
    if options["ray"] is None:
        if options["shards"] is not None:
            raise OptionError("--shards belongs to --ray")
        return data
    if method != "patchcore":
        raise OptionError(
            f"--ray: {method} learns a category on one machine; kizu compare DATA --methods {method} --ray trains each "
            "category, setting and seed as a task of its own"
        )
    _check_address(options)
    if options["auto"]:
        raise OptionError("--auto does not go with --ray: choose the settings with some of the photographs, without it")
    if options["gpu"] is not None:
        raise OptionError("--gpu does not go with --ray: each task takes a GPU where the cluster has some")
    return str(Path(data).expanduser().absolute())


def _check_address(options: dict[str, Any]) -> None:
    from kizu.ray.cluster import check_address

    if options["ray"]:
        check_address(options["ray"])


@contextmanager
def _learner(config: "Config", data: "Dataset", options: dict[str, Any]) -> "Iterator[Learner | None]":
    """Who learns, as long as the cluster is there; nobody but this process without --ray."""
    if options["ray"] is None:
        yield None
        return
    from kizu.ray.training import learner

    learns = learner(config, data, options["shards"])
    with terminal.cluster(options["ray"]):
        yield learns


def _learn(method: str, config: "Config", data: str, options: dict[str, Any]) -> None:
    from kizu.evaluation import experiment, repetition
    from kizu.evaluation.run_folder import check_name

    for place in ("project", "group"):
        check_name(options[place], place)
    for flag, name in (("--minutes", "minutes"), ("--ms", "milliseconds")):
        if options[name] is not None and not options["auto"]:
            raise OptionError(f"{flag} bounds the choice of settings: it needs --auto")
    dataset = find_data(_check_ray(method, data, options), options)
    if not (options["quiet"] or options["as_json"]):
        click.echo(terminal.summary(dataset), err=True)
    quiet = options["quiet"] or options["as_json"]
    seeds, folds = repetition.seeds_in(options["seeds"]) if options["seeds"] else [], options["folds"] or 0
    chosen = {field.name: options[field.name] for field in dataclasses.fields(experiment.RunOptions)}
    runs = []
    for one in repetition.repetitions(config, dataset, seeds, folds, options["group_by"]):
        name = f"{options['name'] or 'run'}-{one.suffix}" if one.suffix else options["name"]
        with (
            _learner(one.config, one.data, options) as learner,
            terminal.progress(quiet) as progress,
            terminal.messages(quiet, warnings_only=True),
        ):
            finished, results = experiment.train(
                method,
                one.config,
                one.data,
                Path(options["output"]) / options["project"] / options["group"],
                experiment.RunOptions(**{**chosen, "name": name}),
                learner=learner,
                progress=progress,
                spelled=flagged,
            )
        runs.append((finished.folder, results))
    if seeds or folds:
        terminal.print_repetitions(runs, options)
        return
    terminal.print_results(results, finished.folder, options)
    if options["profile"]:
        rows = [{"category": r.category, **{k: f"{v:.3f} s" for k, v in r.seconds.items()}} for r in results]
        terminal.print_table(rows)


ZONE_SETTINGS: dict[str, tuple[type, str]] = {
    "false_alarms": (float, "print=0.005"),
    "min_area": (float, "print=40"),
    "min_length": (float, "print=12"),
    "max_count": (int, "print=3"),
}
FLAGS_OF_DISTILL = {"backbone": ("--from", "--backbone")}


class DistillCommand(click.Command):
    """A command with options made from the distillation's config when they are asked for."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        from kizu.config import DistillationConfig

        if not any(param.name == "steps" for param in self.params):
            for field, about in DistillationConfig.model_fields.items():
                self.params.append(config_option(field, about, *FLAGS_OF_DISTILL.get(field, ())))
        return super().get_params(ctx)


@click.command(cls=DistillCommand)
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


@click.command()
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
    from kizu.data.dataset import find
    from kizu.data.demo import render
    from kizu.evaluation import experiment

    images = Path(output) / f"images-{seed}"
    with terminal.progress(options["quiet"] or options["as_json"]) as progress:
        rendering = progress("flange")
        if not (images / "flange").exists():
            render(images, seed=seed, progress=lambda done, total: rendering("Rendering", done, total))
        finished, results = experiment.train(
            "patchcore",
            PatchCoreConfig(seed=seed),
            find(images / "flange"),
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
