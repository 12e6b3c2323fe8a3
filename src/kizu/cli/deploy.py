"""Commands that stay: serve, watch."""

import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kizu.cli.options import quiet_option
from kizu.cli.terminal import coloured
from kizu.cli.wording import flagged
from kizu.errors import OptionError
from kizu.inference.model_folder import model_folder

if TYPE_CHECKING:
    from kizu.serving.watch.camera import FrameFolder
    from kizu.serving.watch.incoming import Arrival
    from kizu.serving.watch.ledger import Ledger
    from kizu.serving.watch.sinks import Sink

__all__ = ["serve", "watch"]

MIN_KEY_LENGTH = 8


@click.command()
@click.argument("models", nargs=-1, required=True)
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Address to listen at; 0.0.0.0: all of this machine's."
)
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="Port to listen at; 0: any free one."
)
@click.option("--api-key", envvar="KIZU_API_KEY", help="Clients must send this key. Better given as KIZU_API_KEY.")
@click.option(
    "--threshold-key",
    envvar="KIZU_THRESHOLD_KEY",
    help="Who sends this key may set thresholds; without it nobody may. Better given as KIZU_THRESHOLD_KEY.",
)
@click.option("--store", default="served", show_default=True, metavar="DIR", help="Folder for feedback and verdicts.")
@click.option(
    "--keep",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Keep this many verdicts for the page; 0: none.",
)
@click.option(
    "--batch", type=click.IntRange(1, 256), default=8, show_default=True, help="Photographs judged together, at most."
)
@click.option(
    "--queue", type=click.IntRange(1, 65536), default=64, show_default=True, help="Photographs that may wait."
)
@click.option("--max-mb", type=click.FloatRange(0.001), default=32.0, show_default=True, help="Largest request, in MB.")
@click.option(
    "--max-megapixels",
    type=click.FloatRange(0.001),
    default=50.0,
    show_default=True,
    help="Largest photograph, in megapixels.",
)
@click.option("--timeout", type=click.FloatRange(0.01), default=30.0, show_default=True, help="Seconds for a request.")
@click.option(
    "--max-held-mb",
    type=click.FloatRange(1),
    default=1000.0,
    show_default=True,
    help="What all requests hold together, in MB.",
)
@click.option(
    "--max-feedback",
    type=click.IntRange(0),
    default=10_000,
    show_default=True,
    help="Photographs kept that people marked, for each model.",
)
@click.option(
    "--allow-host",
    multiple=True,
    metavar="NAME",
    help="A name by which clients know this server, behind a proxy. Repeatable.",
)
@click.option("--root-path", default="", metavar="PATH", help="Where a proxy puts the server, as in /inspection.")
@quiet_option
def serve(models: tuple[str, ...], host: str, port: int, quiet: bool, **options: Any) -> None:
    """Answer requests for verdicts over HTTP, with a page for people at /.

    MODELS are folders of models or of runs, each as it is or as NAME=FOLDER. A folder that is replaced is read again,
    as on SIGHUP; SIGTERM and Ctrl-C stop after the last answer.

    \b
    Example:  kizu serve results/project/group/run --port 8000 --keep 1000
    """
    from kizu.data import image
    from kizu.serving.hosted_model import folders_by_name
    from kizu.serving.http import application, listen, run
    from kizu.serving.limits import Limits
    from kizu.serving.observability import log, log_to_stderr
    from kizu.serving.service import Service

    image.give_back_large()
    key = _checked_key("API key", "KIZU_API_KEY", options["api_key"])
    threshold_key = _checked_key("key for thresholds", "KIZU_THRESHOLD_KEY", options["threshold_key"])
    if threshold_key is not None and threshold_key == key:
        raise OptionError(
            "The API key and the key for thresholds are the same: give two, so that not everybody may set thresholds"
        )
    root_path = options["root_path"].rstrip("/")
    if not re.fullmatch(r"(/[\w.~-]+)*", root_path, re.ASCII):
        raise OptionError(f"--root-path {root_path} is not a path: write it like /inspection")
    limits = Limits(
        bytes=int(options["max_mb"] * 1e6),
        pixels=int(options["max_megapixels"] * 1e6),
        seconds=options["timeout"],
        images=options["queue"],
        requests=4 * options["queue"],
        memory=int(options["max_held_mb"] * 1e6),
        feedback=options["max_feedback"],
    )
    bound = listen(host, port)
    log_to_stderr(quiet)
    store = Path(options["store"])
    service = Service(
        folders_by_name(models),
        limits,
        store=store,
        keep=options["keep"],
        batch=options["batch"],
        sets_thresholds=threshold_key is not None,
    )
    address, number = bound.getsockname()[:2]
    shown = f"http://{f'[{address}]' if ':' in address else address}:{number}{root_path}/"
    log.info("started", extra={"facts": {"address": shown, "models": list(service.models), "process": os.getpid()}})
    if key is None and host not in ("127.0.0.1", "::1", "localhost"):
        log.warning("open", extra={"facts": {"advice": f"Anyone who reaches {shown} may use it: give it an --api-key"}})
    if not quiet:
        click.echo(f"{', '.join(service.models)} at {shown} (Ctrl-C stops)")
    hosts = options["allow_host"]
    guarded = application(service, key=key, threshold_key=threshold_key, hosts=hosts, root_path=root_path)
    run(guarded, service, bound)


def _checked_key(name: str, variable: str, given: str | None) -> str | None:
    """A key, None where there shall be none. Raises `OptionError`."""
    if given is None and variable not in os.environ:
        return None
    if not given:
        raise OptionError(f"The {name} is empty: unset {variable} to serve without one")
    if len(given) < MIN_KEY_LENGTH:
        raise OptionError(f"The {name} is too short to be a secret: at least {MIN_KEY_LENGTH} characters")
    if not re.fullmatch(r"[!-~]([ -~]*[!-~])?", given):
        raise OptionError(
            f"The {name} cannot be sent in an HTTP header: use ASCII letters, digits, punctuation, no space at an end"
        )
    return given


@click.command()
@click.argument("folder", required=False)
@click.option("--model", required=True, help="A model's folder, or a run's.")
@click.option("--camera", metavar="SOURCE", help="A camera's number or address, or a video file, instead of FOLDER.")
@click.option("--every", type=click.FloatRange(0), default=1.0, show_default=True, help="Seconds between two frames.")
@click.option(
    "--output",
    default="verdicts.jsonl",
    show_default=True,
    metavar="FILE",
    help="Verdicts as lines of JSON. It is read at the start, so that no photograph is judged twice.",
)
@click.option("--csv", "csv_file", metavar="FILE", help="The verdicts as a table too.")
@click.option("--store", metavar="DIR", help="The folder of kizu serve --store: its page shows the verdicts too.")
@click.option(
    "--keep",
    type=click.IntRange(1),
    help="With --store: how many verdicts stay there. Default: what kizu serve --keep says.",
)
@click.option("--webhook", metavar="URL", envvar="KIZU_WEBHOOK", show_envvar=True, help="POST each verdict there.")
@click.option(
    "--mqtt",
    metavar="URL",
    envvar="KIZU_MQTT",
    show_envvar=True,
    help="Publish each verdict: mqtt://user:password@host:1883/topic.",
)
@click.option(
    "--notify",
    type=click.Choice(["all", "stop"]),
    default="all",
    show_default=True,
    help="Verdicts for --webhook and --mqtt. With stop also those that ask.",
)
@click.option("--move-bad", metavar="DIR", help="Move photographs of stopped parts there.")
@click.option(
    "--settle",
    type=click.FloatRange(0),
    default=0.5,
    show_default=True,
    help="Seconds that a file must stay unchanged before it is read.",
)
@click.option(
    "--patience",
    type=click.FloatRange(0),
    default=10.0,
    show_default=True,
    help="Seconds to wait for a file that is not complete.",
)
@click.option(
    "--interval",
    type=click.FloatRange(0.01),
    default=0.25,
    show_default=True,
    help="Seconds between two looks into FOLDER.",
)
@click.option("--once", is_flag=True, help="Judge what is there, and end.")
@quiet_option
def watch(folder: str | None, model: str, camera: str | None, quiet: bool, **options: Any) -> None:
    """Judge photographs as they arrive in a folder, or a camera's frames.

    Files that are still being written are waited for. Each is judged once, also when the command is killed and started
    again with the same --output; deliveries that a kill or a broken line held up are made up for.

    \b
    Example:  kizu watch incoming --model results/project/group/run --csv today.csv --move-bad aside
    """
    if (folder is None) == (camera is None):
        raise OptionError("kizu watch takes either a folder or --camera SOURCE")
    if folder is not None and not Path(folder).is_dir():
        raise OptionError(f"{folder} is not a folder")
    aside = Path(options["move_bad"]) if options["move_bad"] else None
    if folder is not None and aside is not None and aside.resolve() == Path(folder).resolve():
        raise OptionError(f"--move-bad {aside} is the folder that is watched: give another")
    from kizu import load
    from kizu.data import image
    from kizu.serving.watch.camera import FrameFolder
    from kizu.serving.watch.ledger import Ledger
    from kizu.serving.watch.watcher import Watcher

    image.give_back_large()
    home = model_folder(model)
    ledger = Ledger(Path(options["output"]))
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    frames = FrameFolder(ledger.path) if camera is not None and options["store"] else None
    watcher = Watcher(
        ledger,
        sinks=_sinks(ledger.path, [Path(place) for place in (folder, aside) if place is not None], frames, options),
        stopped_folder=aside,
        frames=frames,
        on_row=(lambda row: None) if quiet else _say,
        on_warning=_warn,
    )
    before, closed = ledger.count, list[str]()  # folders that could not be opened

    def on_closed(sentence: str) -> None:
        closed.append(sentence)
        _warn(sentence)

    source = _photographs(folder, camera, ledger, aside, stop, on_closed, options)
    try:
        if folder is not None:
            watcher.catch_up(Path(folder))
        watcher.run(load(home), home.resolve().name, source, stop)
    finally:
        left = watcher.close(30.0 if options["once"] else 5.0)
    if options["once"] and ledger.count == before and not (quiet or closed):
        click.echo(f"Nothing new: {before} were judged before.")
    if left or (options["once"] and (watcher.errors or closed)):
        click.get_current_context().exit(1)


def _photographs(
    folder: str | None,
    camera: str | None,
    ledger: "Ledger",
    aside: Path | None,
    stop: threading.Event,
    on_warning: Callable[[str], None],
    options: dict[str, Any],
) -> "Iterator[list[Arrival]]":
    """Batches of what comes in, from a folder or a camera."""
    from kizu.serving.watch.incoming import Arrivals
    from kizu.serving.watch.watcher import from_folder

    if folder is None:
        from kizu.serving.watch.camera import frames

        return frames(str(camera), options["every"], ledger.knows, ledger.count + 1)
    arrivals = Arrivals(
        Path(folder),
        ledger.knows,
        leave_out=[aside] if aside else [],
        settle=options["settle"],
        patience=options["patience"],
        on_warning=on_warning,
    )
    return from_folder(arrivals, options["interval"], options["once"], stop)


def _warn(sentence: str) -> None:
    with suppress(OSError):  # where nobody listens any more, the watch goes on
        click.echo(f"kizu: {flagged(sentence)}", err=True)


def _sinks(
    ledger: Path, folders: Sequence[Path], frames: "FrameFolder | None", options: dict[str, Any]
) -> "list[Sink]":
    """Where verdicts go besides the ledger; the photographs are in one of the folders, or frames."""
    from kizu.serving.history import HISTORY, History
    from kizu.serving.watch.remote import MqttSink, WebhookSink
    from kizu.serving.watch.sinks import CsvSink, HistorySink

    only = ("stop", "ask") if options["notify"] == "stop" else None
    sinks: list[Sink] = []
    if options["csv_file"]:
        sinks.append(CsvSink(Path(options["csv_file"]), ledger))
    if options["store"]:
        sinks.append(HistorySink(History(Path(options["store"]) / HISTORY, options["keep"]), ledger, folders, frames))
    if options["webhook"]:
        sinks.append(WebhookSink(options["webhook"], ledger, only))
    if options["mqtt"]:
        sinks.append(MqttSink(options["mqtt"], ledger, only))
    return sinks


def _say(row: dict[str, Any]) -> None:
    score = "" if row["score"] is None else f"{row['score']:.6g}"
    click.echo(f"{coloured(row['verdict'])}  {score:9}  {row['image']}  {row['error'] or row['cannot_judge']}".rstrip())
