"""The ledger: verdicts as lines of JSON, each written once, whatever happens to the process that writes them."""

import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kizu.errors import DataError, OptionError

__all__ = ["Identity", "Ledger", "Row", "rows"]

Identity = tuple[str, int, int]  # of a photograph: name, bytes, time of change in nanoseconds
Row = dict[str, Any]


class Ledger:
    """A file of rows that only grows, and the photographs that it has rows about.

    A last line that a kill cut off is removed: its photograph counts as not judged.
    """

    def __init__(self, path: Path) -> None:
        """Open a file, or begin one.

        Raises `OptionError` while another process writes to the file, and `DataError` for a file of another kind.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.count = 0
        self._known: set[bytes] = set()
        self._file = path.open("a+b")
        self._lock()
        self._drop_cut_line()
        for row, _ in rows(path):
            self._remember(row)

    def append(self, new: Sequence[Row]) -> list[Row]:
        """Number rows from 1 on, write them to the disk itself, and return them with their numbers."""
        numbered = [{"number": self.count + place, **row} for place, row in enumerate(new, 1)]
        lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in numbered)
        self._file.write("".join(lines).encode("utf-8", "surrogateescape"))
        self._file.flush()
        os.fsync(self._file.fileno())
        for row in numbered:
            self._remember(row)
        return numbered

    def knows(self, identity: Identity) -> bool:
        """Whether there is a row about this photograph."""
        return _fingerprint(identity) in self._known

    def close(self) -> None:
        self._file.close()

    def _remember(self, row: Row) -> None:
        self.count = row["number"]
        self._known.add(_fingerprint((row["image"], row["bytes"], row["modified"])))

    def _lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # Windows: nothing keeps a second writer away
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OptionError(f"{self.path}: another kizu watch writes to it; give this one another `output`") from None

    def _drop_cut_line(self) -> None:
        """Remove what follows the end of the last complete line."""
        end = self._file.seek(0, io.SEEK_END)
        keep, step = end, 4096
        while keep > 0:
            start = max(0, keep - step)
            self._file.seek(start)
            newline = self._file.read(keep - start).rfind(b"\n")
            if newline >= 0:
                keep = start + newline + 1
                break
            keep = start
        if keep < end:
            self._file.truncate(keep)


def rows(path: Path, start: int = 0) -> Iterator[tuple[Row, int]]:
    """The complete rows of a file from the byte `start` on, each with the byte at which it ends.

    Raises `DataError` for a line that is no row.
    """
    with path.open("rb") as file:
        end = file.seek(start)
        for line in file:
            end += len(line)
            if not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line.decode("utf-8", "surrogateescape"))
                row["number"], row["image"], row["bytes"], row["modified"]
            except (ValueError, KeyError, TypeError):
                raise DataError(
                    f"{path} holds {line[:40]!r}, which is no verdict of kizu watch: give another `output`"
                ) from None
            yield row, end


def _fingerprint(identity: Identity) -> bytes:
    text = "\0".join(map(str, identity)).encode("utf-8", "surrogateescape")
    return hashlib.blake2b(text, digest_size=12).digest()
