"""The watcher: judges each photograph that arrives once, and writes it down once, whatever happens in between."""

import filecmp
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from kizu.data import files, image
from kizu.errors import BadImage, OutputError
from kizu.inference.inspector import Inspector
from kizu.inference.verdict import Verdict
from kizu.serving.watch.camera import FrameFolder
from kizu.serving.watch.incoming import Arrival, Arrivals
from kizu.serving.watch.ledger import Ledger, Row, state_of
from kizu.serving.watch.ledger import rows as read_rows
from kizu.serving.watch.sinks import Courier, Sink

__all__ = ["Watcher", "from_folder"]


class Watcher:
    """Judges what arrives, writes the ledger, then does what follows from a verdict.

    The ledger comes first. What follows from its rows (deliveries, moving files) is done again after a kill where it
    was not done before.
    """

    def __init__(
        self,
        ledger: Ledger,
        *,
        sinks: Sequence[Sink] = (),
        stopped_folder: Path | None = None,
        frames: FrameFolder | None = None,
        on_row: Callable[[Row], None] = lambda row: None,
        on_warning: Callable[[str], None] = lambda sentence: None,
    ) -> None:
        """Photographs that are stopped go to `stopped_folder`, what is in no file to `frames`, for the sinks.

        `on_row` gets each row, `on_warning` each problem.
        """
        self._ledger = ledger
        self._stopped_folder, self._frames = stopped_folder, frames
        self._on_row = on_row
        self._on_warning = on_warning
        self._not_moved = 0
        self.errors = 0  # photographs of this run that could not be judged
        self._couriers = [Courier(ledger.path, sink, on_warning) for sink in sinks]

    def run(self, model: Inspector, name: str, source: Iterator[list[Arrival]], stop: threading.Event) -> None:
        """Judge by a model, called `name` in the rows, until the source ends or `stop` is set."""
        for batch in source:
            if batch:
                self._judge(model, name, batch)
            if stop.is_set():
                return

    def _judge(self, model: Inspector, name: str, batch: Sequence[Arrival]) -> None:
        """Judge a batch and write its rows. What cannot be read and is not final is left for later."""
        arrival_of = {id(arrival.photo): arrival for arrival in batch}
        new: dict[int, Row] = {}
        for photo, outcome in model.judge([arrival.photo for arrival in batch], batch_size=len(batch)):
            arrival = arrival_of[id(photo)]
            if isinstance(outcome, BadImage) and not arrival.final:
                continue
            row = new[id(photo)] = _row(arrival, Verdict.of(arrival.identity[0], outcome, model), name)
            if self._stopped_folder is not None and arrival.path is None and row["verdict"] == "stop":
                image.write(
                    self._stopped_folder / f"{arrival.identity[0]}.png", photo.read(large=True)[0], durable=True
                )
            if self._frames is not None and row["verdict"] != "error":
                self._frames.write(arrival.identity[0], photo.read(large=True)[0])
        judged = [arrival for arrival in batch if id(arrival.photo) in new]
        rows = self._ledger.append([new[id(arrival.photo)] for arrival in judged])
        self.errors += sum(row["verdict"] == "error" for row in rows)
        for arrival, row in zip(judged, rows, strict=True):
            self._move(arrival.path, row)
            self._on_row(row)
        for courier in self._couriers:
            courier.wake()

    def catch_up(self, folder: Path) -> None:
        """Move photographs that the last run stopped and did not move before it ended."""
        if self._stopped_folder is not None:
            for row, _ in read_rows(self._ledger.path):
                self._move(folder / row["image"], row)

    def close(self, patience: float) -> int:
        """Deliver what `patience` seconds allow; returns how many deliveries and moves are left for the next time."""
        missing = sum(courier.end(patience) for courier in self._couriers)
        if missing:
            deliveries = "1 delivery was" if missing == 1 else f"{missing} deliveries were"
            self._on_warning(f"{deliveries} not made; the next run with the same output goes on with them")
        self._ledger.close()
        return missing + self._not_moved

    def _move(self, path: Path | None, row: Row) -> None:
        """Move a stopped part's file, if it is still the one that was judged."""
        if self._stopped_folder is None or path is None or row["verdict"] != "stop":
            return
        try:
            if state_of(path) != (row["bytes"], row["modified"]):
                return
            target = self._stopped_folder / row["image"]
            if target.exists() and path.samefile(target):
                return
            if target.exists() and filecmp.cmp(path, target, shallow=False):  # a kill came after the copy
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
        except OutputError as error:
            self._not_moved += 1
            self._on_warning(f"{path} could not be moved: {error}")
        except FileNotFoundError:
            return
        except OSError as error:
            self._not_moved += 1
            self._on_warning(f"{path} could not be moved: {error.strerror or error}")


def from_folder(arrivals: Arrivals, interval: float, once: bool, stop: threading.Event) -> Iterator[list[Arrival]]:
    """Batches of a folder, looked for each `interval` seconds; with `once` until all that is there is judged."""
    while True:
        batch = arrivals.take()
        yield batch
        if not batch:
            if once and not arrivals.settling:
                return
            stop.wait(interval)


def _row(arrival: Arrival, verdict: Verdict, model: str) -> Row:
    _, size, modified = arrival.identity
    when = datetime.now(UTC).isoformat(timespec="milliseconds")
    about = {"model": model, "bytes": size, "modified": modified}
    return {"time": when, **verdict.model_dump(mode="json"), **about, **arrival.facts}


def _free(path: Path) -> Path:
    """A name that no file has."""
    candidate, number = path, 2
    while candidate.exists():
        candidate = path.with_name(files.short_name(path.stem, f"-{number}{path.suffix}"))
        number += 1
    return candidate
