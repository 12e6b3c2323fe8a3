"""Verdicts as lines of JSON, each written once, whatever happens to the process that writes them."""

import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kizu.errors import DataError, OptionError

__all__ = ["Identity", "Ledger", "rows"]

Identity = tuple[str, int, int]  # of a photograph: name, bytes, time of change in nanoseconds


class Ledger:
    """A file of rows that only grows, and the memory of what stands in it.

    A last line that was cut off by a kill is removed: what it was about has not been written down.
    """

    def __init__(self, path: Path) -> None:
        """Open or begin a file. Raises `OptionError` while another process writes to it, `DataError` if it is none."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.count = 0
        self._known: set[bytes] = set()
        self._file = path.open("a+b")
        self._lock()
        self._cut()
        for row, _ in rows(path):
            self._remember(row)

    def append(self, some: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Write rows, numbered from 1 on, to the disk itself; gives them with their numbers."""
        numbered = [{"number": self.count + place, **row} for place, row in enumerate(some, 1)]
        lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in numbered)
        self._file.write("".join(lines).encode("utf-8", "surrogateescape"))
        self._file.flush()
        os.fsync(self._file.fileno())
        for row in numbered:
            self._remember(row)
        return numbered

    def knows(self, identity: Identity) -> bool:
        """Whether there is a row about this photograph."""
        return _short(identity) in self._known

    def close(self) -> None:
        self._file.close()

    def _remember(self, row: dict[str, Any]) -> None:
        self.count = row["number"]
        self._known.add(_short((row["image"], row["bytes"], row["modified"])))

    def _lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # Windows: nothing keeps a second writer away
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OptionError(f"{self.path}: another kizu watch writes to it; give this one another --output") from None

    def _cut(self) -> None:
        """Remove what follows the last line's end."""
        end = self._file.seek(0, io.SEEK_END)
        keep, step = end, 4096
        while keep > 0:
            start = max(0, keep - step)
            self._file.seek(start)
            found = self._file.read(keep - start).rfind(b"\n")
            if found >= 0:
                keep = start + found + 1
                break
            keep = start
        if keep < end:
            self._file.truncate(keep)


def rows(path: Path, start: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
    """The complete rows of a file from a place in it on, in order, and where each ends.

    Raises `DataError` for a line that is none.
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
                    f"{path} holds {line[:40]!r}, which is no verdict of kizu watch: give another --output"
                ) from None
            yield row, end


def _short(identity: Identity) -> bytes:
    text = "\0".join(map(str, identity)).encode("utf-8", "surrogateescape")
    return hashlib.blake2b(text, digest_size=12).digest()
