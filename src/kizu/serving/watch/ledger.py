"""The ledger: verdicts as lines of JSON, each written once, whatever happens to the process that writes them."""

import glob
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from kizu.data import files
from kizu.errors import DataError
from kizu.serving.watch.growing_file import GrowingFile

__all__ = ["Identity", "Ledger", "Row", "photograph_of", "rows", "state_of"]

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
        self.path = path
        self.count = 0
        self._known: set[bytes] = set()
        self._file = GrowingFile(path, "output")
        with self._file.closed_on_error():
            for row, _ in rows(path):
                self._remember(row)
            self._file.drop_cut_line(b'{"number": ')

    def append(self, new: Sequence[Row]) -> list[Row]:
        """Number rows from 1 on, write them to the disk itself, and return them with their numbers."""
        numbered = [{"number": self.count + place, **row} for place, row in enumerate(new, 1)]
        lines = "".join(files.json_text(row, indent=None) + "\n" for row in numbered)
        self._file.append(lines.encode(), durable=True)
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


def state_of(path: Path) -> tuple[int, int]:
    """What a file's identity has besides its name, which moving it does not alter: bytes and time of change."""
    state = path.stat()
    return state.st_size, state.st_mtime_ns


def photograph_of(row: Row, folders: Sequence[Path], max_bytes: int) -> bytes:
    """The file that was judged, wherever in the folders it is now; empty where it is gone or too large.

    It is known by its size and time of change, which moving it does not alter: its name may be another's by now.
    """
    state = row["bytes"], row["modified"]
    for folder in folders:
        path = Path(folder, row["image"])
        for candidate in (path, *sorted(path.parent.glob(f"{glob.escape(path.stem)}-*{path.suffix}"))):
            with suppress(OSError):
                if state_of(candidate) == state and state[0] <= max_bytes:
                    content = candidate.read_bytes()
                    if state_of(candidate) == state:
                        return content
    return b""


def _fingerprint(identity: Identity) -> bytes:
    text = "\0".join(map(str, identity)).encode("utf-8", "surrogateescape")
    return hashlib.blake2b(text, digest_size=12).digest()
