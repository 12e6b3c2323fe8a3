"""Verdicts on photographs as they arrive, each judged once and written down once, whatever happens in between."""

import filecmp
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kizu.data import files
from kizu.data import image as images
from kizu.errors import BadImage
from kizu.inference.inspector import Inspector
from kizu.inference.verdict import Verdict
from kizu.serving.watch.incoming import Arrival, Arrivals
from kizu.serving.watch.ledger import Ledger, rows
from kizu.serving.watch.sinks import Courier, Sink

__all__ = ["Watch", "from_folder"]

Row = dict[str, Any]


class Watch:
    """Judges what arrives, writes the ledger, then does what follows from a verdict.

    The ledger comes first. What follows from its rows (deliveries, moving files) is done again after a kill where it
    was not done before.
    """

    def __init__(
        self,
        ledger: Ledger,
        *,
        sinks: Sequence[Sink] = (),
        aside: Path | None = None,
        said: Callable[[Row], None] = lambda row: None,
        warn: Callable[[str], None] = lambda sentence: None,
    ) -> None:
        """`aside` is a folder for what is stopped; `said` hears each row, `warn` what goes wrong on the way."""
        self._ledger = ledger
        self._aside = aside
        self._said = said
        self._warn = warn
        self._couriers = [Courier(ledger.path, sink, warn) for sink in sinks]

    def run(self, model: Inspector, name: str, source: Iterator[list[Arrival]], stop: threading.Event) -> None:
        """Judge by a model, called `name` in the rows, until the source ends or `stop` is set."""
        for some in source:
            if some:
                self._judge(model, name, some)
            if stop.is_set():
                return

    def _judge(self, model: Inspector, name: str, some: Sequence[Arrival]) -> None:
        """Judge a few and write them down. What cannot be read and is not final is left for later."""
        asked = {id(arrival.photo): arrival for arrival in some}
        judged: dict[int, Row] = {}
        for photo, outcome in model.judge([arrival.photo for arrival in some], batch_size=len(some)):
            arrival = asked[id(photo)]
            if isinstance(outcome, BadImage) and not arrival.final:
                continue
            judged[id(photo)] = _row(arrival, Verdict.of(arrival.identity[0], outcome, model), name)
            if self._aside is not None and arrival.path is None and judged[id(photo)]["verdict"] == "stop":
                images.write(self._aside / f"{arrival.identity[0]}.png", photo.read()[0])
        written = [arrival for arrival in some if id(arrival.photo) in judged]
        for arrival, row in zip(written, self._ledger.append([judged[id(a.photo)] for a in written]), strict=True):
            self._move(arrival.path, row)
            self._said(row)
        for courier in self._couriers:
            courier.wake()

    def catch_up(self, folder: Path) -> None:
        """Move what was stopped and is still there, because the last run ended in between."""
        if self._aside is not None:
            for row, _ in rows(self._ledger.path):
                self._move(folder / row["image"], row)

    def close(self, patience: float) -> None:
        """Deliver what can be delivered within so many seconds; the rest is delivered next time."""
        arrived = [courier.end(patience) for courier in self._couriers]
        if not all(arrived):
            self._warn("Not everything was delivered; the next run goes on with it")
        self._ledger.close()

    def _move(self, path: Path | None, row: Row) -> None:
        """Put a stopped part's file aside, if it is still the one that was judged."""
        if self._aside is None or path is None or row["verdict"] != "stop":
            return
        try:
            if _state(path) != (row["bytes"], row["modified"]):
                return
            target = self._aside / row["image"]
            if target.exists() and path.samefile(target):
                return
            if target.exists() and filecmp.cmp(path, target, shallow=False):  # copied, when a kill came
                path.unlink()
                return
            target = _free(target)
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                path.rename(target)
            except OSError:  # another file system
                with files.new_file(target) as temporary:
                    shutil.copy2(path, temporary)
                path.unlink()
        except FileNotFoundError:
            return
        except OSError as error:
            self._warn(f"{path} could not be put aside: {error}")


def from_folder(arrivals: Arrivals, interval: float, once: bool, stop: threading.Event) -> Iterator[list[Arrival]]:
    """What arrives, with a look every so many seconds; with `once` until all that was there is judged."""
    while True:
        some = arrivals.take()
        yield some
        if not some:
            if once and not arrivals.settling:
                return
            stop.wait(interval)


def _row(arrival: Arrival, verdict: Verdict, model: str) -> Row:
    _, size, modified = arrival.identity
    when = datetime.now(UTC).isoformat(timespec="milliseconds")
    about = {"model": model, "bytes": size, "modified": modified}
    return {"time": when, **verdict.model_dump(mode="json"), **about, **arrival.facts}


def _state(path: Path) -> tuple[int, int]:
    state = path.stat()
    return state.st_size, state.st_mtime_ns


def _free(path: Path) -> Path:
    """A name that no file has."""
    candidate, number = path, 2
    while candidate.exists():
        candidate = path.with_name(f"{path.stem}-{number}{path.suffix}")
        number += 1
    return candidate
