"""Options that several commands take: of a data set, of a run, and those made from a config's fields."""

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import click

from kizu.cli.wording import flagged
from kizu.errors import DataError, OptionError, did_you_mean, require
from kizu.evaluation.tracking import SERVICES

if TYPE_CHECKING:
    from kizu.data.dataset import Dataset

__all__ = [
    "cluster_options",
    "config_file_option",
    "config_option",
    "data_options",
    "find_data",
    "json_option",
    "quiet_option",
]
__all__ += ["ray_option", "run_options", "settings_text", "shards_option", "zone_options"]

quiet_option = click.option("-q", "--quiet", is_flag=True, help="Print nothing but results and errors.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")


def data_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say how a folder of images is to be understood."""
    for option in (
        click.option("--defects-config", metavar="FILE", help="LOCO: saturation thresholds, if not in the data."),
        click.option(
            "--bad", metavar="NAME", multiple=True, help="Plain folders: a folder of defective images. Repeatable."
        ),
        click.option("--good", metavar="NAME", help="Plain folders: the folder of good images."),
        click.option("--layout", default="auto", show_default=True, help="Name the layout instead of recognising it."),
        click.option("-c", "--category", "categories", multiple=True, help="Only this category. Repeatable."),
    ):
        command = option(command)
    return command


ray_option = click.option(
    "--ray",
    metavar="[ADDRESS]",
    is_flag=False,
    flag_value="",
    help="Work on a Ray cluster: HOST:PORT, auto for the one that runs here, local for a new one of this machine. "
    "Without ADDRESS: RAY_ADDRESS, or local.",
)


shards_option = click.option(
    "--shards",
    type=click.IntRange(1),
    help="With --ray: learn from so many shards of the photographs. Default: one for each hundred.",
)


def cluster_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of judging on a cluster."""
    for option in (
        click.option(
            "--part",
            metavar="PATTERN",
            help="With --ray: a regular expression that finds a part's name in a path. Default: the file's name.",
        ),
        click.option(
            "--actors", type=click.IntRange(1), help="With --ray: how many judge, each on a core. Default: all cores."
        ),
        click.option("--column", metavar="NAME", help="With --from: the column that holds the paths."),
        click.option(
            "--from",
            "listing",
            metavar="FILE",
            help="With --ray: what to judge: a path or address a line, or a CSV or Parquet table of them.",
        ),
        click.option("--parquet", metavar="DIR", help="With --ray: write a row a photograph there. Needed."),
        ray_option,
    ):
        command = option(command)
    return command


def find_data(path: str, options: dict[str, Any]) -> "Dataset":
    from kizu.data import dataset

    return dataset.find(
        path,
        layout=options["layout"],
        categories=options["categories"],
        good=options["good"],
        bad=options["bad"],
        defects_config=options["defects_config"],
    )


def run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options of a run."""
    for option in (
        click.option(
            "--oracle",
            is_flag=True,
            help="Also report the training round that is best on the test images; the report says so.",
        ),
        click.option("--save-segmentation-images", is_flag=True, help="Write test photographs with their maps."),
        click.option("--save-maps", is_flag=True, help="Write the test images' anomaly maps as float TIFF."),
        click.option(
            "--track",
            multiple=True,
            type=click.Choice(SERVICES),
            help="Tell Weights & Biases or MLflow of the run too. Repeatable.",
        ),
        click.option(
            "--memory", metavar="AMOUNT", help="Most RAM for working data, as in 2GB. Default: half of what is free."
        ),
        click.option(
            "--num-workers",
            type=click.IntRange(1, 64),
            default=2,
            show_default=True,
            help="Threads that read photographs.",
        ),
        click.option("--gpu", type=click.IntRange(-1), help="Number of the GPU; -1: CPU. Default: the first, if any."),
        click.option(
            "--ms",
            "milliseconds",
            type=click.FloatRange(1),
            help="With --auto: milliseconds that a photograph may take on this machine.",
        ),
        click.option("--minutes", type=click.FloatRange(0.1), help="With --auto: how long the choice may take."),
        click.option("--auto", is_flag=True, help="Choose the settings by made-up defects on the good images."),
        click.option("--profile", is_flag=True, help="Say where the time went."),
        click.option("--skip-bad", is_flag=True, help="Leave out training images that cannot be read."),
        click.option(
            "--group-by",
            metavar="PATTERN",
            help="Which photographs show the same part, which then counts once. A regular expression: those in whose "
            "names it finds the same. folder: those in one folder. none: no two. Default: told by names and likeness.",
        ),
        click.option(
            "--keep-copies", is_flag=True, help="Learn from every photograph of a part, also where several are alike."
        ),
        click.option("--overwrite", is_flag=True, help="Replace a run of the same name."),
        click.option("--resume", is_flag=True, help="Go on with a run that was interrupted."),
        click.option("--name", help="Sub-folder of GROUP. Default: run, run-2, …"),
        click.option("--group", default="group", show_default=True, help="Sub-folder of PROJECT."),
        click.option("--project", default="project", show_default=True, help="Sub-folder of OUTPUT."),
        click.option("--output", default="results", show_default=True, help="Folder for all results."),
    ):
        command = option(command)
    return command


def config_option(field: str, about: Any, *flags: str) -> click.Option:
    """The option that sets a field of a config, under its name or others; not given, it leaves the field's default."""
    default = about.get_default()
    shown = "x".join(map(str, default)) if isinstance(default, tuple) and default else default
    suffix = f"  [default: {shown}]" if shown not in (None, (), {}) else ""
    return click.Option(
        [field, *(flags or (_flags(field, about.annotation),))],
        type=_option_type(about.annotation),
        default=None,
        help=f"{flagged(about.description)}{suffix}",
    )


def zone_options(command: click.Command) -> None:
    """Give a command the options that name zones of the frame."""
    what = "[NAME=]WHAT"
    command.params += [
        click.Option(
            ["--inspect"],
            metavar=what,
            multiple=True,
            help="Inspect only this zone, with a threshold of its own. WHAT is a mask (PNG), annotations (COCO, Label "
            'Studio, VIA, CVAT), corners in pixels as in "40,40 200,40 200,120", or all. Repeatable.',
        ),
        click.Option(
            ["--zone-false-alarms"],
            metavar="NAME=RATE",
            multiple=True,
            help="Share of good parts that this zone alone may stop, as print=0.005. Repeatable.",
        ),
        *(
            click.Option(
                [f"--zone-{name}"],
                metavar=f"NAME={value}",
                multiple=True,
                help=f"--{name} for this zone, instead of the one for all. Repeatable.",
            )
            for name, value in (("min-area", "AREA"), ("min-length", "LENGTH"), ("max-count", "COUNT"))
        ),
        click.Option(["--ignore"], metavar=what, multiple=True, help="Ignore this part of the frame. Repeatable."),
    ]


def config_file_option() -> click.Option:
    """--config FILE: options from a file, under their long names; what the command line says wins."""
    return click.Option(
        ["--config", "config_file"],
        metavar="FILE",
        is_eager=True,
        expose_value=False,
        callback=_take_settings,
        help="Take options from a TOML, YAML or JSON file, kizu train also from a run.json. The command line wins.",
    )


def _take_settings(ctx: click.Context, param: click.Parameter, file: str | None) -> None:
    if file is None:
        return
    options: dict[str, click.Option] = {}
    for option in ctx.command.get_params(ctx):
        if isinstance(option, click.Option) and option is not param:
            longs = [flag.removeprefix("--").replace("-", "_") for flag in option.opts if flag.startswith("--")]
            options |= dict.fromkeys([*longs, str(option.name)], option)
    taken = {}
    for key, value in _settings(Path(file), ctx).items():
        found = options.get(str(key).replace("-", "_"))
        if found is None:
            hint = did_you_mean(str(key), options)
            raise OptionError(f"{file}: {key} is no option of {_name(ctx)}.{hint}")
        if value is not None:
            taken[str(found.name)] = _for(found, value)
    ctx.default_map = {**(ctx.default_map or {}), **taken}


def _for(option: click.Option, value: Any) -> Any:
    """A value of a file as the option takes it from the command line."""
    if option.multiple:
        return value if isinstance(value, list) else [value]
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return json.dumps(value)
    if isinstance(value, list):
        return ("x" if option.name == "size" else ",").join(map(str, value))
    return json.dumps(value) if isinstance(value, dict) else value


def _settings(path: Path, ctx: click.Context) -> dict[str, Any]:
    """What a file says; of a run.json, the settings of its method. Raises `DataError` where it says none."""
    try:
        values = _parsed(path.suffix.lower(), path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path} is not {path.suffix.removeprefix('.').upper() or 'JSON'} ({reason})") from None
    if not isinstance(values, dict):
        raise DataError(f"{path} holds no options: write each as a name and a value, in TOML as size = 320")
    if not (isinstance(values.get("config"), dict) and isinstance(values.get("method"), str)):
        return values
    if values["method"] != ctx.command.name:
        raise OptionError(f"{path} is a run of {values['method']}: its settings do not fit {_name(ctx)}")
    return _changed(values)


def _changed(run: dict[str, Any]) -> dict[str, Any]:
    """Of a run.json, the settings that are not the method's defaults."""
    from kizu.detectors import config_class

    defaults = config_class(run["method"])().model_dump(mode="json")
    return {name: value for name, value in run["config"].items() if value != defaults.get(name)}


def _name(ctx: click.Context) -> str:
    """kizu train patchcore."""
    names = []
    while ctx.parent is not None:
        names.append(str(ctx.command.name))
        ctx = ctx.parent
    return " ".join(["kizu", *reversed(names)])


def _parsed(suffix: str, text: str) -> Any:
    """Raises `ValueError`."""
    if suffix == ".toml":
        return tomllib.loads(text)
    if suffix not in (".yaml", ".yml"):
        return json.loads(text)
    yaml = require("yaml")
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


def settings_text(config: Any) -> str:
    """A config as a TOML file for --config: each setting below what it is for, those at their defaults as comments."""
    lines = []
    for name, value in config.model_dump(mode="json").items():
        lines.append(f"# {flagged(type(config).model_fields[name].description or '')}")
        as_json = isinstance(value, dict) or (name == "zones" and value)
        plain = json.dumps(value) if as_json else value  # as the option takes it
        written = f"{name} =" if value is None else f"{name} = {json.dumps(plain, ensure_ascii=False)}"
        lines.append(written if name in config.model_fields_set else f"# {written}")
    return "\n".join(lines)


def _flags(field: str, annotation: Any) -> str:
    name = field.replace("_", "-")
    return f"--{name}/--no-{name}" if annotation is bool else f"--{name}"


def _option_type(annotation: Any) -> Any:
    """What click shows and checks; the config checks the rest."""
    parts = [annotation] if get_origin(annotation) is Literal else get_args(annotation) or [annotation]
    plain = [part for part in parts if part is not type(None)]
    if get_origin(plain[0]) is Literal:
        return click.Choice(get_args(plain[0]))
    return plain[0] if plain[0] in (int, float, bool) and get_origin(annotation) is not tuple else str
