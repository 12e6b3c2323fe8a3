"""Where verdicts go besides the ledger, each to a sink of its own, by a courier that makes up for what was missed."""

import csv
import io
import threading
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Protocol

from kizu.data import files
from kizu.errors import BadImage, KizuError, OptionError
from kizu.inference.verdict import Verdict
from kizu.serving.batcher import Upload
from kizu.serving.history import History
from kizu.serving.responses import thumbnail
from kizu.serving.watch.camera import FrameFolder
from kizu.serving.watch.growing_file import GrowingFile
from kizu.serving.watch.ledger import Row, photograph_of, rows

__all__ = ["Courier", "CsvSink", "HistorySink", "Sink", "Undelivered"]

EARLIER = ("number", "time", "image", "verdict", "score", "p_value", "threshold", "model", "error")  # of version 0.1
COLUMNS = (*EARLIER, "zone", "cannot_judge")
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0  # seconds between tries
LAST_TRIES = 4  # in a row without success, once the end is near
LOOK = 0.05  # seconds between looks whether the end is near
MAX_KEPT = 50_000_000  # bytes of a photograph in the history


class Undelivered(KizuError):
    """A row did not arrive; it is tried again."""


class Sink(Protocol):
    """Takes rows one after the other. `delivered` is the number of the last row that arrived."""

    name: str
    delivered: int

    def wants(self, row: Row) -> bool:
        """Whether the row is to be delivered at all."""
        ...

    def deliver(self, row: Row) -> None:
        """Return when the row has arrived. Raises `Undelivered`."""
        ...

    def close(self) -> None: ...


class Courier:
    """A thread that carries the ledger's rows to a sink, in order, from the first that it has not delivered."""

    def __init__(self, ledger: Path, sink: Sink, on_warning: Callable[[str], None]) -> None:
        self._ledger = ledger
        self._sink = sink
        self._on_warning = on_warning
        self._news = threading.Event()
        self._deadline: float | None = None  # when to give up, once the end is near
        self._thread = threading.Thread(target=self._work, name=sink.name, daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Tell the thread that there are new rows."""
        self._news.set()

    def end(self, patience: float) -> int:
        """Deliver what is left, for at most `patience` seconds; returns how many rows did not arrive."""
        self._deadline = time.monotonic() + patience
        self._news.set()
        self._thread.join(patience)
        after = self._sink.delivered
        return sum(self._sink.wants(row) for row, _ in rows(self._ledger) if row["number"] > after)

    def _work(self) -> None:
        place, pause, failed = 0, FIRST_PAUSE, 0
        while True:
            self._news.clear()
            deadline = self._deadline
            try:
                for row, end in rows(self._ledger, place):
                    self._carry(row)
                    place, pause, failed = end, FIRST_PAUSE, 0
            except Exception as error:  # whatever the sink meets with, this thread goes on
                failed += 1
                if deadline is not None and (failed >= LAST_TRIES or time.monotonic() + pause > deadline):
                    break
                self._on_warning(f"{error}; trying again in {pause:g} seconds")
                if self._rest(pause):
                    pause = min(2 * pause, LONGEST_PAUSE)
                else:
                    pause, failed = FIRST_PAUSE, 0
                continue
            if deadline is not None:
                break
            self._news.wait()
        self._sink.close()

    def _carry(self, row: Row) -> None:
        if row["number"] > self._sink.delivered:
            if self._sink.wants(row):
                self._sink.deliver(row)
            self._sink.delivered = row["number"]

    def _rest(self, pause: float) -> bool:
        """Wait; False where the end came near meanwhile, and it is tried again at once."""
        until, before = time.monotonic() + pause, self._deadline
        while time.monotonic() < until:
            if self._deadline != before:
                return False
            time.sleep(LOOK)
        return True


class CsvSink:
    """A CSV file with a line for each row of a ledger."""

    name = "csv"

    def __init__(self, path: Path, ledger: Path) -> None:
        """Open a table of this ledger, or begin one. Raises `OptionError` for a table of something else."""
        self._file = GrowingFile(path, "csv")
        self._columns: tuple[str, ...] = COLUMNS
        with self._file.closed_on_error():
            self.delivered = self._last_number(path, ledger)

    def wants(self, row: Row) -> bool:
        return True

    def deliver(self, row: Row) -> None:
        self._file.append(_line([_cell(row.get(column)) for column in self._columns]), durable=False)

    def close(self) -> None:
        self._file.close()

    def _last_number(self, path: Path, ledger: Path) -> int:
        """The number in the last whole line; the header is written where there is none yet."""
        text = path.read_text(encoding="utf-8", errors="surrogateescape")
        lines = list(csv.reader(io.StringIO(text[: text.rfind("\n") + 1], newline="")))
        if not lines:
            self._file.drop_cut_line(_line(COLUMNS))
            self._file.append(_line(COLUMNS), durable=False)
            return 0
        if lines[0] == list(EARLIER):
            self._columns = EARLIER
        elif lines[0] != list(COLUMNS):
            raise OptionError(f"`csv={path}` is a table of something else: give another name")
        self._file.drop_cut_line(b"")
        if len(lines) == 1:
            return 0
        number, when = (*lines[-1], "", "")[:2]
        its_row = next((row for row, _ in rows(ledger) if str(row["number"]) == number), None)
        if its_row is None or its_row["time"] != when:
            raise OptionError(f"`csv={path}` is a table of other verdicts than {ledger}: give another name")
        return int(number)


class HistorySink:
    """The history that `kizu serve` shows, with the photographs: what was judged overnight can be looked at."""

    name = "history"

    def __init__(
        self, history: History, ledger: Path, folders: Sequence[Path], frames: FrameFolder | None = None
    ) -> None:
        """Go on with what this ledger has in the history. The photographs are in one of the folders, or frames."""
        self._history, self._folders, self._frames = history, folders, frames
        self._ledger, self._source = ledger, str(ledger.resolve())
        number, when = history.delivered(self._source)
        last, known = 0, False
        for row, _ in rows(ledger):
            last, known = row["number"], known or (row["number"] == number and row["time"] == when)
        number = number if known else 0  # a ledger that was begun anew has nothing there
        self.delivered = max(number, last - history.keep)  # what would be dropped at once is not brought
        if frames is not None:
            frames.tidy(ledger, self.delivered)

    def wants(self, row: Row) -> bool:
        return bool(row["verdict"] != "error")

    def deliver(self, row: Row) -> None:
        verdict = Verdict.from_row(row)
        when = datetime.fromisoformat(row["time"]).timestamp()
        content = self._frames.read(row) if self._frames else photograph_of(row, self._folders, MAX_KEPT)
        try:
            picture = thumbnail(Upload(content, row["image"])) if content else b""
        except BadImage:  # it was changed since it was judged
            content = picture = b""
        source = self._source, row["number"], row["time"]
        self._history.add(when, row["model"], "", verdict, content, picture, source)
        if self._frames is not None:
            self._frames.forget(row)

    def close(self) -> None:
        if self._frames is not None:
            self._frames.tidy(self._ledger, self.delivered)
        self._history.close()


def _line(cells: Sequence[object]) -> bytes:
    return files.csv_text([cells]).encode("utf-8", "surrogateescape")


def _cell(value: object) -> object:
    """As in one line of a table."""
    if isinstance(value, str):
        return " ".join(value.splitlines())
    return f"{value:.9g}" if isinstance(value, float) else value
