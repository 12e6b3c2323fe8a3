"""A file that only grows, by whole pieces, and has one writer."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kizu.data import files
from kizu.errors import DataError, OptionError

__all__ = ["GrowingFile"]

STEP = 4096


class GrowingFile:
    """Whatever happens, it ends with a whole piece or with the beginning of one, which `drop_cut_line` removes."""

    def __init__(self, path: Path, setting: str) -> None:
        """Open a file, or begin one. Raises `OptionError`, which names the `setting`, while another process has it."""
        self.path = path
        with files.writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b", buffering=0)
        self._lock(setting)

    def append(self, piece: bytes, *, durable: bool) -> None:
        """Write a piece that ends a line, all of it or nothing. Raises `OutputError`."""
        end = self._file.seek(0, io.SEEK_END)
        with files.writing(self.path):
            try:
                rest = memoryview(piece)
                while rest:
                    rest = rest[self._file.write(rest) :]
                if durable:
                    os.fsync(self._file.fileno())
            except OSError:
                self._file.truncate(end)
                raise

    def drop_cut_line(self, whole_lines_begin: bytes) -> None:
        """Remove what follows the last complete line, if it is the beginning of a line of this kind of file.

        Raises `DataError` where it is anything else.
        """
        end = self._file.seek(0, io.SEEK_END)
        keep = self._end_of_lines(end)
        self._file.seek(keep)
        rest = self._file.read(len(whole_lines_begin))
        if not whole_lines_begin.startswith(rest):
            raise DataError(f"{self.path} holds {rest[:40]!r}, which nothing here wrote: name another file")
        if keep < end:
            self._file.truncate(keep)

    @contextmanager
    def closed_on_error(self) -> Iterator[None]:
        """While its content is looked at."""
        try:
            yield
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        self._file.close()

    def _lock(self, setting: str) -> None:
        try:
            import fcntl
        except ImportError:  # Windows: nothing keeps a second writer away
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            sentence = f"{self.path}: another kizu watch writes to it; give this one another `{setting}`"
            raise OptionError(sentence) from None
        except OSError:  # a file system without locks
            return

    def _end_of_lines(self, end: int) -> int:
        """The byte behind the last newline."""
        while end > 0:
            start = max(0, end - STEP)
            self._file.seek(start)
            newline = self._file.read(end - start).rfind(b"\n")
            if newline >= 0:
                return start + newline + 1
            end = start
        return 0
