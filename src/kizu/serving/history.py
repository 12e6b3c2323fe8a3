"""The history of verdicts: the last ones and their photographs, in a SQLite file."""

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kizu.errors import DataError, OutputError
from kizu.inference.verdict import Verdict

__all__ = ["HISTORY", "Entry", "History"]

HISTORY = "verdicts.sqlite"  # in the folder of what a server keeps
LAYOUT = 1
MAX_ID = 2**62
TABLE = """
CREATE TABLE IF NOT EXISTS verdicts (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    time REAL NOT NULL,      -- seconds since 1970
    model TEXT NOT NULL,
    version TEXT NOT NULL,
    verdict TEXT NOT NULL,   -- JSON
    feedback TEXT,           -- good, bad or nothing
    photograph BLOB NOT NULL,
    thumbnail BLOB NOT NULL
)
"""
SOURCES = """
CREATE TABLE IF NOT EXISTS sources (
    path TEXT PRIMARY KEY,    -- of a ledger that verdicts come from
    number INTEGER NOT NULL,  -- of its last row that is kept,
    time TEXT NOT NULL        -- and when that was judged
)
"""
KEPT = "CREATE TABLE IF NOT EXISTS kept (id INTEGER PRIMARY KEY, number INTEGER NOT NULL)"
USUAL = 1000  # verdicts that are kept where nobody said how many
SHOWN = "id, time, model, version, verdict, feedback"


@dataclass(frozen=True)
class Entry:
    """A verdict that is kept."""

    id: int
    time: float
    model: str
    version: str
    verdict: Verdict
    feedback: str | None


class History:
    """Keeps the last verdicts; threads may share it. Whatever it writes may raise `OutputError`."""

    def __init__(self, path: Path, keep: int | None = None) -> None:
        """Open a file, or begin one, of so many verdicts; without a number, of as many as it has been told before.

        Raises `DataError` for a file of another kind.
        """
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._database = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        try:
            layout = self._database.execute("PRAGMA user_version").fetchone()[0]
            if layout not in (0, LAYOUT):
                raise DataError(f"{path}: written by another version of kizu (layout {layout}, not {LAYOUT})")
            for step in ("auto_vacuum = INCREMENTAL", "journal_mode = WAL", "synchronous = NORMAL"):
                self._database.execute(f"PRAGMA {step}")
            self._database.execute("PRAGMA busy_timeout = 10000")  # another process may write to it too
            self._database.execute(TABLE)
            self._database.execute(SOURCES)
            self._database.execute(KEPT)
            if keep is not None:
                self._database.execute("INSERT OR REPLACE INTO kept VALUES (1, ?)", (keep,))
            self._database.execute(f"PRAGMA user_version = {LAYOUT}")
        except sqlite3.OperationalError as error:
            raise OutputError(str(path), str(error)) from None
        except sqlite3.DatabaseError as error:
            raise DataError(f"{path}: this is no file of verdicts ({error})") from None

    def add(
        self,
        time: float,
        model: str,
        version: str,
        verdict: Verdict,
        photograph: bytes,
        thumbnail: bytes,
        source: tuple[str, int, str] | None = None,
    ) -> int:
        """Keep a verdict, drop the oldest, and return the new one's number.

        `source` is the ledger that it comes from, the row's number there and its time: what `delivered` then tells.
        """
        row, keep = (time, model, version, verdict.model_dump_json(), photograph, thumbnail), self.keep
        with self._lock, _writing(self._path), self._database:
            self._database.execute("BEGIN IMMEDIATE")
            number = self._database.execute(
                "INSERT INTO verdicts (time, model, version, verdict, photograph, thumbnail) VALUES (?, ?, ?, ?, ?, ?)",
                row,
            ).lastrowid
            assert number is not None
            if source is not None:
                self._database.execute("INSERT OR REPLACE INTO sources VALUES (?, ?, ?)", source)
            self._database.execute("DELETE FROM verdicts WHERE id <= ?", (number - keep,))
        return number

    @property
    def keep(self) -> int:
        """How many verdicts are kept: what the last process said that did."""
        rows = self._rows("SELECT number FROM kept")
        return int(rows[0][0]) if rows else USUAL

    def delivered(self, source: str) -> tuple[int, str]:
        """The number and time of a ledger's last row that was kept; 0 where there is none."""
        rows = self._rows("SELECT number, time FROM sources WHERE path = ?", source)
        return (int(rows[0][0]), str(rows[0][1])) if rows else (0, "")

    def last(self, count: int, before: int | None = None) -> list[Entry]:
        """The latest `count` verdicts, the latest first; those whose number is below `before`, if it is given."""
        limit = MAX_ID if before is None else before
        rows = self._rows(f"SELECT {SHOWN} FROM verdicts WHERE id < ? ORDER BY id DESC LIMIT ?", limit, count)
        return [_entry(row) for row in rows]

    def entry(self, number: int) -> Entry | None:
        """A verdict by its number, while it is kept."""
        rows = self._rows(f"SELECT {SHOWN} FROM verdicts WHERE id = ?", number)
        return _entry(rows[0]) if rows else None

    def photograph(self, number: int) -> bytes | None:
        """The photograph as it was sent, where it was there to be kept."""
        rows = self._rows("SELECT photograph FROM verdicts WHERE id = ? AND length(photograph) > 0", number)
        return bytes(rows[0][0]) if rows else None

    def thumbnail(self, number: int) -> bytes | None:
        """A small JPEG of the photograph, where there is one."""
        rows = self._rows("SELECT thumbnail FROM verdicts WHERE id = ? AND length(thumbnail) > 0", number)
        return bytes(rows[0][0]) if rows else None

    def mark(self, number: int, feedback: str) -> None:
        """Remember what a person said of a verdict's photograph."""
        self._rows("UPDATE verdicts SET feedback = ? WHERE id = ?", feedback, number)

    def close(self) -> None:
        with self._lock:
            with suppress(sqlite3.Error):  # of a disk that is full
                self._database.execute("PRAGMA incremental_vacuum")
            self._database.close()

    def _rows(self, statement: str, *values: Any) -> list[Any]:
        with self._lock, _writing(self._path), closing(self._database.execute(statement, values)) as cursor:
            return cursor.fetchall()


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        raise OutputError(str(path), str(error)) from None


def _entry(row: tuple[Any, ...]) -> Entry:
    number, time, model, version, verdict, feedback = row
    return Entry(number, time, model, version, Verdict.model_validate_json(verdict), feedback)
