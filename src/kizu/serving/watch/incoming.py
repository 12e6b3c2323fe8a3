"""Incoming photographs: files of a folder, each as soon as all of it is there."""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from kizu.data import files, image
from kizu.inference.prediction import Photo
from kizu.serving.watch.ledger import Identity

__all__ = ["Arrival", "Arrivals"]

PAUSE = 0.5  # seconds between two tries to read a file
BATCH = 8  # photographs given at once
UNFINISHED = (".tmp", ".part", ".partial", ".filepart", ".crdownload")


@dataclass(frozen=True)
class Arrival:
    """A photograph that came in."""

    identity: Identity
    photo: Photo
    path: Path | None = None  # where its file lies, if it has one
    final: bool = True  # False: if it cannot be read, the rest of it may still come
    facts: dict[str, float] = field(default_factory=dict)  # more columns for its row


@dataclass
class _Wait:
    state: tuple[int, int]  # bytes, time of change
    since: float
    due: float  # when it is looked at again


class Arrivals:
    """The new files of a folder and of all folders below it, oldest first.

    A file is given when its size and time have stayed the same for `settle` seconds. If it cannot be read then, it is
    given again and again until `patience` seconds have passed without a change, the last time as final.
    """

    def __init__(
        self,
        folder: Path,
        known: Callable[[Identity], bool],
        *,
        leave_out: Iterable[Path] = (),
        settle: float = 0.5,
        patience: float = 10.0,
    ) -> None:
        self._folder = folder
        self._known = known
        self._leave_out = {path.resolve() for path in leave_out}
        self._settle = settle
        self._patience = patience
        self._waiting: dict[Path, _Wait] = {}
        self._ready: list[Path] = []

    @property
    def settling(self) -> bool:
        """Whether there are files that are still to be judged."""
        return bool(self._waiting)

    def take(self) -> list[Arrival]:
        """The photographs that are ready, at most a batch."""
        if not self._ready:
            self._ready = self._look()
        batch, self._ready = self._ready[:BATCH], self._ready[BATCH:]
        return [arrival for path in batch if (arrival := self._read(path)) is not None]

    def _look(self) -> list[Path]:
        """Files that have settled, in the order in which they were written."""
        found = _files(self._folder, self._leave_out, set())
        states = {path: (state.st_size, state.st_mtime_ns) for path, state in found}
        now = time.monotonic()
        for path in self._waiting.keys() - states.keys():
            del self._waiting[path]
        ready = []
        for path, state in states.items():
            if self._known((self._name(path), *state)):
                self._waiting.pop(path, None)
                continue
            wait = self._waiting.get(path)
            if wait is None or wait.state != state:
                self._waiting[path] = wait = _Wait(state, now, now + self._settle)
            if now >= wait.due:
                ready.append((state[1], path))
        return [path for _, path in sorted(ready)]

    def _read(self, path: Path) -> Arrival | None:
        """A file's content, if it is still what it was when it settled."""
        wait = self._waiting.get(path)
        if wait is None:
            return None
        now = time.monotonic()
        final = now - wait.since >= self._patience
        wait.due = now + max(self._settle, PAUSE)
        identity = self._name(path), *wait.state
        try:
            files.check_regular(path, image.MAX_FILE_BYTES)
        except OSError:  # which its row says
            return Arrival(identity, Photo(path), path, final=True) if path.exists() else None
        try:
            content = path.read_bytes()
            state = path.stat()
        except OSError:
            return Arrival(identity, Photo(path), path) if final and path.exists() else None
        if (state.st_size, state.st_mtime_ns) != wait.state:
            return None
        return Arrival(identity, Photo(content), path, final)

    def _name(self, path: Path) -> str:
        return path.relative_to(self._folder).as_posix()


def _files(folder: Path, leave_out: set[Path], seen: set[tuple[int, int]]) -> Iterator[tuple[Path, os.stat_result]]:
    """Image files below a folder; hidden ones, unfinished downloads and what goes away meanwhile are left out.

    Links to folders are followed, each folder once: `seen` are those that were.
    """
    try:
        status = folder.stat()
        entries = list(os.scandir(folder))
    except OSError:
        return
    if (place := (status.st_dev, status.st_ino)) in seen:
        return
    seen.add(place)
    for entry in sorted(entries, key=os.DirEntry.is_symlink):  # the folder itself before a link to it
        if entry.name.startswith(".") or entry.name.lower().endswith(UNFINISHED):
            continue
        try:
            if entry.is_dir():
                if Path(entry.path).resolve() not in leave_out:
                    yield from _files(Path(entry.path), leave_out, seen)
            elif image.is_image_name(entry.name):
                yield Path(entry.path), entry.stat()
        except OSError:
            continue
