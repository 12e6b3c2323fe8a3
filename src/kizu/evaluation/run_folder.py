"""The folder of a run: claimed, held while the run lasts, gone on with after a kill, finished."""

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path
from typing import Any

from kizu.data import files
from kizu.errors import DataError, OptionError
from kizu.evaluation.evaluate import CategoryResult

__all__ = ["Run", "check_name", "open_run"]

RETRIES, PAUSE = 20, 0.05  # seconds
_RUNNING = "{} is still running, in another process: wait until it has ended, or choose another `name`"


@dataclass(frozen=True)
class Run:
    """Where a run writes to."""

    folder: Path
    inode: int = 0  # of the folder, which tells it from another of the same name

    @property
    def unfinished(self) -> Path:
        return self.folder / "unfinished"

    def model(self, category: str) -> Path:
        return self.folder / "models" / category

    def checkpoint(self, category: str) -> Path:
        """Where training is, for methods that learn in rounds."""
        return self.unfinished / f"{category}.checkpoint"

    def finished(self, category: str) -> CategoryResult | None:
        """The result of a category that is done already."""
        path = self.unfinished / f"{category}.json"
        if not path.exists() or not (self.model(category) / "model.json").exists():
            return None
        return CategoryResult.from_json(json.loads(path.read_text(encoding="utf-8")))

    def finish(self) -> None:
        """Take away the mark of an unfinished run, in a single step."""
        files.remove_folder(self.unfinished, self.folder.parent)


@contextmanager
def open_run(parent: Path, name: str | None, about: dict[str, Any], *, resume: bool, overwrite: bool) -> Iterator[Run]:
    """A new run folder, or an unfinished one to go on with, held against other processes while it is open.

    Without a name the first free one of run, run-2, … is taken, or with `resume` the last of them. Raises `OptionError`
    rather than mix two runs, overwrite the wrong one, or touch one that is still running.
    """
    run = _claim(parent, about) if name is None and not resume else _named(parent, name, about, resume, overwrite)
    with _kept(run):
        yield run


def check_name(name: str, setting: str) -> str:
    """Raise `OptionError` for the name of a folder that leads out of the folder it shall lie in."""
    path = Path(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in name:
        raise OptionError(f"`{setting}={name}`: the name of a folder inside the results, without ..")
    return name


@contextmanager
def _kept(run: Run) -> Iterator[None]:
    """Hold the folder of one's own run. Raises `OptionError` where another process has replaced it since its begin."""
    with ExitStack() as held:
        for attempt in range(RETRIES):
            try:
                held.enter_context(files.locked(run.folder))
                break
            except BlockingIOError:  # by one that is about to find out that the folder is not its own
                if attempt == RETRIES - 1:
                    raise OptionError(_RUNNING.format(run.folder)) from None
                time.sleep(PAUSE)
        if run.folder.stat().st_ino != run.inode:
            raise OptionError(f"{run.folder} was replaced by another process at the same moment: try again")
        yield


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    try:
        with files.locked(folder):
            yield
    except BlockingIOError:
        raise OptionError(_RUNNING.format(folder)) from None


def _claim(parent: Path, about: dict[str, Any]) -> Run:
    """A new run under the first free name, whoever else looks for one at the same time."""
    for name in _names():
        folder = parent / name
        if not folder.exists() or _is_remnant(folder):
            try:
                return _begin(folder, about, replace=False)
            except files.Taken:
                continue
    raise AssertionError("there are more names than folders")


def _named(parent: Path, name: str | None, about: dict[str, Any], resume: bool, overwrite: bool) -> Run:
    """The run of that name, new or gone on with; without a name, the last one."""
    if name is None:
        taken = list(takewhile(lambda other: (parent / other).exists(), _names()))
        name = next((other for other in reversed(taken) if not _is_remnant(parent / other)), "run")
    folder = parent / check_name(name, "name")
    if not folder.exists() or _is_remnant(folder):
        return _begin(folder, about, replace=False)
    with _held(folder):
        if resume:
            return _resumed(Run(folder, folder.stat().st_ino), about)
        if not overwrite:
            raise OptionError(
                f"{folder} exists: choose another `name`, or replace it with `overwrite=True`, or go on with "
                "`resume=True`"
            )
        if any(folder.iterdir()) and not (Run(folder).unfinished.exists() or (folder / "run.json").exists()):
            raise OptionError(f"{folder} exists and is no run of kizu: choose another `name`")
        return _begin(folder, about, replace=True)


def _resumed(run: Run, about: dict[str, Any]) -> Run:
    if not run.unfinished.exists():
        raise OptionError(f"{run.folder} is finished: there is nothing to resume (a new run needs no `resume=True`)")
    try:
        before = json.loads((run.unfinished / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{run.folder}: what it was started with cannot be read ({error}): replace it with `overwrite=True`"
        ) from None
    changed = [key for key in about if before.get(key) != about[key]]
    if changed:
        words = {"data_hash": "photographs", "config": "settings"}
        others = " and ".join(words.get(key, key) for key in changed)
        raise OptionError(
            f"{run.folder} was started with other {others}: `resume=True` needs the same; or choose another `name`"
        )
    return run


def _begin(folder: Path, about: dict[str, Any], replace: bool) -> Run:
    with files.new_folder(folder, replace=replace) as temporary:
        files.write_text(Run(temporary).unfinished / "run.json", files.json_text(about))
        inode = temporary.stat().st_ino
    return Run(folder, inode)


def _is_remnant(folder: Path) -> bool:
    """Remove what a kill left of a run that had not begun, and say whether that was it."""
    if not folder.is_dir() or any(path.name != "unfinished" for path in folder.iterdir()):
        return False
    inside = folder / "unfinished"
    if inside.exists() and any(inside.iterdir()):
        return False
    with suppress(OSError), files.locked(folder):
        shutil.rmtree(folder)
        return True
    return False


def _names() -> Iterator[str]:
    yield "run"
    yield from (f"run-{number}" for number in count(2))
