"""Incoming photographs: files of a folder, each as soon as all of it is there."""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from kizu.data import files, image
from kizu.data.photographs import FOREIGN, is_photograph, is_set_aside
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
    given again and again until `patience` seconds have passed without a change, the last time as final. Folders that
    cannot be opened, or are gone, are told to `on_warning`, once, and looked at again.
    """

    def __init__(
        self,
        folder: Path,
        known: Callable[[Identity], bool],
        *,
        leave_out: Iterable[Path] = (),
        settle: float = 0.5,
        patience: float = 10.0,
        on_warning: Callable[[str], None] = lambda sentence: None,
    ) -> None:
        self._folder = folder
        self._known = known
        self._leave_out = {path.resolve() for path in leave_out}
        self._settle = settle
        self._patience = patience
        self._waiting: dict[Path, _Wait] = {}
        self._ready: list[Path] = []
        self._on_warning = on_warning
        self._problems: dict[Path, str] = {}  # folders that could not be opened at the last look
        self._others: dict[Path, tuple[int, int]] = {}  # files that are no photographs, as they were

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
        found = self._files(self._folder, set())
        states = {path: (state.st_size, state.st_mtime_ns) for path, state in found}
        now = time.monotonic()
        for gone in (self._waiting.keys() | self._others.keys()) - states.keys():
            self._waiting.pop(gone, None)
            self._others.pop(gone, None)
        ready = []
        for path, state in states.items():
            if self._others.get(path) == state or self._known((self._name(path), *state)):
                self._waiting.pop(path, None)
                continue
            wait = self._waiting.get(path)
            if wait is None or wait.state != state:
                self._waiting[path] = wait = _Wait(state, now, now + self._settle)
            if now < wait.due:
                continue
            if is_photograph(path):
                ready.append((state[1], path))
            else:
                self._others[path] = state
                del self._waiting[path]
        return [path for _, path in sorted(ready)]

    def _read(self, path: Path) -> Arrival | None:
        """A file's content, if it is still what it was when it settled."""
        wait = self._waiting.get(path)
        if wait is None:
            return None
        now = time.monotonic()
        final = now - wait.since >= self._patience or path.suffix.lower() in FOREIGN
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

    def _files(self, folder: Path, seen: set[tuple[int, int]]) -> Iterator[tuple[Path, os.stat_result]]:
        """Files below a folder that may be photographs; what goes away meanwhile is left out.

        Links to folders are followed, each folder once: `seen` are those that were.
        """
        try:
            status = folder.stat()
            entries = list(os.scandir(folder))
        except OSError as error:
            self._note(folder, error)
            return
        self._note(folder, None)
        if (place := (status.st_dev, status.st_ino)) in seen:
            return
        seen.add(place)
        for entry in sorted(entries, key=os.DirEntry.is_symlink):  # the folder itself before a link to it
            if is_set_aside(entry.name) or entry.name.lower().endswith(UNFINISHED):
                continue
            try:
                if not entry.is_dir():
                    yield Path(entry.path), entry.stat()
                elif Path(entry.path).resolve() not in self._leave_out:
                    yield from self._files(Path(entry.path), seen)
            except OSError:
                continue

    def _note(self, folder: Path, error: OSError | None) -> None:
        """Warn of a folder that cannot be opened, and say when it can be again; each once."""
        if error is not None and isinstance(error, FileNotFoundError) and folder != self._folder:
            return  # it went away between two looks
        reason = "" if error is None else error.strerror or str(error)
        if reason == self._problems.get(folder, ""):
            return
        if reason:
            self._problems[folder] = reason
            self._on_warning(f"{folder} cannot be opened ({reason}): nothing in it is judged until it can")
        else:
            del self._problems[folder]
            self._on_warning(f"{folder} can be opened again")
