"""Commands that stay: serve, watch."""

import os
from pathlib import Path
from typing import Any

import click

from kizu.arguments import quiet_option
from kizu.errors import OptionError

__all__ = ["serve"]


@click.command()
@click.argument("models", nargs=-1, required=True)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at; 0.0.0.0 is the whole net.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any that is free.")
@click.option("--api-key", envvar="KIZU_API_KEY", help="Ask for this key. Better given as KIZU_API_KEY.")
@click.option("--store", default="served", show_default=True, metavar="DIR", help="Folder for feedback and verdicts.")
@click.option("--keep", type=click.IntRange(0), default=0, show_default=True, help="Keep so many verdicts in SQLite.")
@click.option("--batch", type=click.IntRange(1, 256), default=8, show_default=True, help="Photographs at once.")
@click.option(
    "--queue", type=click.IntRange(1, 65536), default=64, show_default=True, help="Photographs that may wait."
)
@click.option("--max-mb", type=click.FloatRange(0.001), default=32.0, show_default=True, help="Size of a request.")
@click.option(
    "--max-megapixels", type=click.FloatRange(0.001), default=50.0, show_default=True, help="Of a photograph."
)
@click.option("--timeout", type=click.FloatRange(0.01), default=30.0, show_default=True, help="Seconds for a request.")
@quiet_option
def serve(models: tuple[str, ...], host: str, port: int, api_key: str | None, quiet: bool, **options: Any) -> None:
    """Answer requests for verdicts over HTTP, with a page for people at /.

    MODELS are folders of models or of runs, each as it is or as NAME=FOLDER. A folder that is replaced is read again,
    as on SIGHUP; SIGTERM and Ctrl-C stop after the last answer.

    \b
    Example:  kizu serve results/project/group/run --port 8000 --keep 1000
    """
    from kizu.logbook import log, open_logbook
    from kizu.serve import application, listen, run
    from kizu.served import folders_by_name
    from kizu.service import Service
    from kizu.uploads import Limits

    if api_key is not None and len(api_key) < 8:
        raise OptionError("--api-key is too short to be a secret: at least 8 characters")
    limits = Limits(
        bytes=int(options["max_mb"] * 1e6),
        pixels=int(options["max_megapixels"] * 1e6),
        seconds=options["timeout"],
        images=options["queue"],
        requests=4 * options["queue"],
    )
    bound = listen(host, port)
    open_logbook(quiet)
    store = Path(options["store"])
    service = Service(folders_by_name(models), limits, store=store, keep=options["keep"], batch=options["batch"])
    address, number = bound.getsockname()[:2]
    shown = f"http://{f'[{address}]' if ':' in address else address}:{number}/"
    log.info("started", extra={"facts": {"address": shown, "models": list(service.models), "process": os.getpid()}})
    if api_key is None and host not in ("127.0.0.1", "::1", "localhost"):
        log.warning("open", extra={"facts": {"advice": f"Anyone who reaches {shown} may use it: give it an --api-key"}})
    if not quiet:
        click.echo(f"{', '.join(service.models)} at {shown} (Ctrl-C stops)")
    run(application(service, key=api_key), service, bound)
