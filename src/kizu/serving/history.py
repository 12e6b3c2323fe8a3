"""The last verdicts and their photographs, in a SQLite file."""

import sqlite3
import threading
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kizu.errors import DataError
from kizu.inference.verdict import Verdict

__all__ = ["Entry", "Journal"]

LAYOUT = 1
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


class Journal:
    """Keeps the last verdicts; threads may share it."""

    def __init__(self, path: Path, keep: int) -> None:
        """Open or begin a file. Raises `DataError` when it is something else."""
        self.keep = keep
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._base = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        try:
            layout = self._base.execute("PRAGMA user_version").fetchone()[0]
            if layout not in (0, LAYOUT):
                raise DataError(f"{path}: written by another version of kizu (layout {layout}, not {LAYOUT})")
            for step in ("auto_vacuum = INCREMENTAL", "journal_mode = WAL", "synchronous = NORMAL"):
                self._base.execute(f"PRAGMA {step}")
            self._base.execute(TABLE)
            self._base.execute(f"PRAGMA user_version = {LAYOUT}")
        except sqlite3.DatabaseError as error:
            raise DataError(f"{path}: this is no file of verdicts ({error})") from None

    def add(self, time: float, model: str, version: str, verdict: Verdict, photograph: bytes, thumbnail: bytes) -> int:
        """Keep a verdict, let the oldest go, and give its number."""
        row = (time, model, version, verdict.model_dump_json(), photograph, thumbnail)
        with self._lock, self._base:
            self._base.execute("BEGIN")
            number = self._base.execute(
                "INSERT INTO verdicts (time, model, version, verdict, photograph, thumbnail) VALUES (?, ?, ?, ?, ?, ?)",
                row,
            ).lastrowid
            assert number is not None
            self._base.execute("DELETE FROM verdicts WHERE id <= ?", (number - self.keep,))
        return number

    def last(self, count: int, before: int | None = None) -> list[Entry]:
        """The latest first, all of them before a number if one is given."""
        limit = 2**62 if before is None else before
        found = self._all(f"SELECT {SHOWN} FROM verdicts WHERE id < ? ORDER BY id DESC LIMIT ?", limit, count)
        return [_entry(row) for row in found]

    def entry(self, number: int) -> Entry | None:
        """A verdict by its number, while it is kept."""
        found = self._all(f"SELECT {SHOWN} FROM verdicts WHERE id = ?", number)
        return _entry(found[0]) if found else None

    def photograph(self, number: int) -> bytes | None:
        """The photograph as it was sent."""
        found = self._all("SELECT photograph FROM verdicts WHERE id = ?", number)
        return bytes(found[0][0]) if found else None

    def thumbnail(self, number: int) -> bytes | None:
        """A small JPEG of it."""
        found = self._all("SELECT thumbnail FROM verdicts WHERE id = ?", number)
        return bytes(found[0][0]) if found else None

    def mark(self, number: int, feedback: str) -> None:
        """Remember what a person said of it."""
        self._all("UPDATE verdicts SET feedback = ? WHERE id = ?", feedback, number)

    def close(self) -> None:
        with self._lock:
            self._base.execute("PRAGMA incremental_vacuum")
            self._base.close()

    def _all(self, statement: str, *values: Any) -> list[Any]:
        with self._lock, closing(self._base.execute(statement, values)) as cursor:
            return cursor.fetchall()


def _entry(row: tuple[Any, ...]) -> Entry:
    number, time, model, version, verdict, feedback = row
    return Entry(number, time, model, version, Verdict.model_validate_json(verdict), feedback)
