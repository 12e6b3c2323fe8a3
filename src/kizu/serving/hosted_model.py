"""A model that the server answers with: loaded, and replaced while it works when its folder is replaced."""

import re
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from kizu import load
from kizu.data import files
from kizu.errors import ModelError, OptionError
from kizu.inference.model_folder import model_folder
from kizu.inference.model_folder import version as model_version
from kizu.serving.batcher import Batcher, LoadedModel

__all__ = ["HostedModel", "folders_by_name", "read_model"]

TRIES = 5  # to read a folder that is being replaced
PAUSE = 0.2

Stamp = tuple[tuple[str, int, int, int], ...]  # of each file: name, inode, size, time of change


class HostedModel:
    """A model and its queue. `reload` may be called from any thread."""

    def __init__(self, name: str, folder: Path, queue: Batcher, stamp: Stamp) -> None:
        self.name = name
        self.folder = folder
        self.queue = queue
        self._stamp = stamp
        self._last_seen: Stamp = stamp
        self._one_at_a_time = threading.Lock()

    @property
    def loaded(self) -> LoadedModel:
        return self.queue.loaded

    def reload(self) -> LoadedModel:
        """Read the folder again; the next batch runs on what is in it now.

        Raises `ModelError` where it cannot be read; the loaded model then stays.
        """
        with self._one_at_a_time:
            self.queue.loaded, self._stamp = read_model(self.folder)
            return self.queue.loaded

    def set_threshold(self, value: float | None, set_by: str, version: str) -> None:
        """Write another threshold into the folder, if what it holds is still of this version; nothing is read again.

        Raises `ModelError` where it is not, or cannot be changed; `BlockingIOError` where another process changes it.
        """
        with files.locked(self.folder):
            if model_version(self.folder) != version:
                raise ModelError(
                    f"{self.folder} has changed meanwhile: look at what it promises now, then set the threshold again"
                )
            load(self.folder).with_threshold(value, set_by=set_by).save(self.folder)

    def was_replaced(self) -> bool:
        """Whether the folder holds something else than what was loaded, and has not changed since the last call."""
        now = _stamp(self.folder)
        changed = bool(now) and now != self._stamp
        at_rest = now == self._last_seen
        self._last_seen = now
        return changed and at_rest

    def give_up(self) -> None:
        """Do not try again to load what is in the folder now."""
        self._stamp = _stamp(self.folder)


def read_model(folder: Path) -> tuple[LoadedModel, Stamp]:
    """The model in a folder, warmed up, from files that did not change meanwhile. Raises `ModelError`."""
    for _ in range(TRIES):
        before = _stamp(folder)
        try:
            version = model_version(folder)
            model = load(folder)
            if _stamp(folder) == before:
                model.predict(np.zeros((*model.preprocessing.size, 3), np.uint8))
                return LoadedModel(model, version, time.time()), before
        except (ModelError, OSError):
            if _stamp(folder) == before and before:
                raise
        time.sleep(PAUSE)
    raise ModelError(f"{folder} is not a kizu model, or is being changed all the time")


def folders_by_name(arguments: Iterable[str]) -> dict[str, Path]:
    """Models to serve, each FOLDER or NAME=FOLDER; a run's folder stands for all its models.

    Raises `OptionError` where there is none, or two have one name.
    """
    folders: dict[str, Path] = {}
    for argument in arguments:
        name, equals, path = argument.partition("=")
        if not equals or Path(argument).exists():
            name, path = "", argument
        if name and not re.fullmatch(r"[\w.-]+", name):
            raise OptionError(f"{argument}: a name is made of letters, digits, points, dashes and underscores")
        inside = [] if name else sorted(file.parent for file in Path(path).glob("models/*/model.json"))
        for folder in inside if len(inside) > 1 else [model_folder(path)]:
            called = name or folder.resolve().name
            if called in folders:
                raise OptionError(f"Two models are called {called}: name one of them, as in other={folder}")
            folders[called] = folder
    return folders


def _stamp(folder: Path) -> Stamp:
    try:
        files = sorted(path for path in folder.iterdir() if path.is_file())
        states = [(path.name, path.stat()) for path in files]
    except OSError:
        return ()
    return tuple((name, state.st_ino, state.st_size, state.st_mtime_ns) for name, state in states)
