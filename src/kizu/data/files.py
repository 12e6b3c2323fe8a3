"""Files and folders that appear whole or not at all, on the disk itself, and what killed commands left of theirs.

What is being written has a name that begins with `UNFINISHED` and is locked by its writer. A kill ends the lock, and
the next command that writes to the same place removes what is there without one.
"""

import csv
import errno
import io
import json
import math
import os
import re
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any

from kizu.errors import KizuError, OutputError

__all__ = ["Taken", "check_regular", "csv_text", "from_cell", "json_text", "locked", "new_file", "new_folder"]
__all__ += ["recover", "remove_folder", "scratch_folder", "short_name", "write_csv", "write_text", "writing"]

UNFINISHED = ".kizu-"
ABANDONED = 86_400.0  # seconds after which something unfinished is removed where the system knows no locks
MAX_NAME = 255  # bytes that a file's name may have
MAX_SUFFIX = 16
PAUSE = 0.05  # seconds between two looks at a folder that is just being replaced
_swept: set[str] = set()
_FORMULA = re.compile(r"[=+\-@\t\r]")  # what a spreadsheet takes for the beginning of one


class Taken(Exception):
    """There is a filled folder of this name already."""


def check_regular(path: str | os.PathLike[str], max_bytes: int) -> None:
    """Raise `OSError` where a file is none that can be read to its end: a pipe, a device, or more than `max_bytes`."""
    status = os.stat(path)  # noqa: PTH116
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is a pipe, a socket or a device, not a file")
    if status.st_size > max_bytes:
        raise OSError(errno.EFBIG, f"it has more than {max_bytes / 1e6:.0f} MB")


@contextmanager
def new_file(path: str | os.PathLike[str], *, durable: bool = True) -> Iterator[Path]:
    """A temporary name beside `path` to write to; renamed to `path` at the end, removed on any exception.

    What is not `durable` may be lost when the power fails: it is made again more cheaply than it is waited for.
    Raises `OutputError` where it cannot be written.
    """
    path = _target(path)
    if path.exists() and not (path.is_file() or path.is_dir()):
        with _device(path) as temporary:
            yield temporary
        return
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path.parent)
        suffix = path.suffix if len(os.fsencode(path.suffix)) <= MAX_SUFFIX else ""
        temporary, lock = _reserve(path.parent, suffix)
        try:
            yield temporary
            _open_to_all(temporary)
            if durable:
                _sync(temporary)
            temporary.replace(path)
            if durable:
                _sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
            os.close(lock)


@contextmanager
def new_folder(path: str | os.PathLike[str], *, replace: bool = True) -> Iterator[Path]:
    """A temporary folder beside `path` to fill; it takes the place of `path` at the end, or disappears.

    Whoever looks meanwhile finds the old folder or the new one. Raises `OutputError` where it cannot be written, and
    `Taken` where `path` is a filled folder that it may not `replace`.
    """
    path = _target(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        recover(path)
        _sweep(path.parent)
        temporary, lock = _reserve(path.parent, None)
        try:
            yield temporary
            _finish(temporary)
            _put(temporary, path, replace)
            _sync(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            os.close(lock)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder for what is not kept, where the system has such folders; it disappears, at the latest next time."""
    parent = Path(tempfile.gettempdir())
    with writing(parent):
        _sweep(parent)
        temporary, lock = _reserve(parent, None)
        try:
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            os.close(lock)


@contextmanager
def locked(folder: Path, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold a folder, so that no other process that asks for it does so too; the end of the process ends it as well.

    While another one holds it, `on_wait` is called once and the other one is waited for; without `on_wait`,
    `BlockingIOError` is raised. Where the system knows no locks, nothing is held.
    """
    while True:
        lock = _lock(folder, on_wait)
        try:
            if lock is None or _same(lock, folder):  # no one has put another folder there meanwhile
                yield
                return
        finally:
            if lock is not None:
                os.close(lock)


def recover(path: Path) -> None:
    """Put a folder back whose replacement was killed between the two steps that it takes on some systems."""
    aside = _aside(path)
    for _ in range(20):
        if path.exists() or not aside.is_dir():
            return
        with suppress(OSError), locked(aside):  # held while its writer is at work, who is done in a moment
            aside.rename(path)
            return
        time.sleep(PAUSE)


def remove_folder(folder: Path, aside: Path) -> None:
    """Remove a folder in a single step, by way of the folder `aside`, where what a kill leaves of it is swept up."""
    with writing(folder):
        temporary, lock = _reserve(aside, None)
        try:
            folder.rename(temporary / "removed")
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            os.close(lock)


def short_name(name: str, end: str = "") -> str:
    """A file's name with something behind it, cut where it is too long for a file system, and still unlike others'."""
    if len(os.fsencode(name + end)) <= MAX_NAME:
        return name + end
    mark = "~" + blake2b(os.fsencode(name), digest_size=6).hexdigest() + end
    return os.fsencode(name)[: MAX_NAME - len(os.fsencode(mark))].decode(errors="ignore") + mark


def write_csv(path: str | os.PathLike[str], header: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Write a CSV file, whole or not at all."""
    write_text(path, csv_text([header, *rows]))


def csv_text(rows: Iterable[Iterable[object]]) -> str:
    """Rows as lines of CSV; None is an empty cell. Text that a spreadsheet would run as a formula begins with a '."""
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([_cell(value) for value in row] for row in rows)
    return table.getvalue()


def from_cell(text: str) -> str:
    """The text that `csv_text` wrote as this cell."""
    return text[1:] if text.startswith("'") and _FORMULA.match(text, 1) else text


def json_text(value: Any, *, indent: int | None = 1, ascii_only: bool = False) -> str:
    """A value as JSON that every program reads: numbers that are not finite are null, bytes of names are escaped."""
    text = json.dumps(_plain(value), indent=indent, ensure_ascii=ascii_only, allow_nan=False)
    return re.sub(r"[\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text)


def write_text(path: str | os.PathLike[str], text: str, *, durable: bool = True) -> None:
    """Write a text file in UTF-8, whole or not at all. Names of files that are none stay the bytes that they are."""
    with new_file(path, durable=durable) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape")


def _cell(value: object) -> object:
    return f"'{value}" if isinstance(value, str) and _FORMULA.match(value) and not _is_number(value) else value


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?inf", text, re.ASCII) is not None


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Whatever the system says against writing to `path`, finished or not, is said in a sentence.

    Raises `OutputError`; of files elsewhere that are read or written meanwhile, what they raise themselves.
    """
    try:
        yield
    except OutputError as error:
        if not _is_unfinished(error.name):
            raise
        raise OutputError(str(path), error.reason) from None
    except KizuError:
        raise
    except OSError as error:
        if isinstance(error.filename, str) and _is_elsewhere(Path(error.filename), path):
            raise
        raise OutputError(str(path), _no_folder(path) or error.strerror or str(error)) from error
    except Exception as error:  # of libraries in Rust, which quote the system
        if found := re.search(r"\(os error (\d+)\)", str(error)):
            raise OutputError(str(path), os.strerror(int(found[1]))) from error
        raise


def _is_unfinished(name: str | Path) -> bool:
    return any(part.startswith(UNFINISHED) for part in Path(name).parts)


def _is_elsewhere(file: Path, path: Path) -> bool:
    file, path = file.absolute(), path.absolute()
    return not (_is_unfinished(file) or file.is_relative_to(path) or path.is_relative_to(file))


def _no_folder(path: Path) -> str:
    """Why `path` cannot be in its folder: there is something else in the place of one. Empty where there is nothing."""
    for parent in reversed(path.parents):
        if os.path.lexists(parent) and not os.path.isdir(parent):  # noqa: PTH112 - Path's raises where it may not look
            return f"{parent} is a link that leads nowhere" if parent.is_symlink() else f"{parent} is no folder"
    return ""


def _target(path: str | os.PathLike[str]) -> Path:
    """What a link leads to, so that it stays one."""
    path = Path(path)
    return path.resolve() if path.is_symlink() else path


@contextmanager
def _device(path: Path) -> Iterator[Path]:
    """A temporary name to write to for a pipe or a device, which is written into and not replaced."""
    with scratch_folder() as scratch, writing(path):
        yield scratch / "content"
        with (scratch / "content").open("rb") as content, path.open("wb") as device:
            shutil.copyfileobj(content, device)


def _reserve(parent: Path, suffix: str | None) -> tuple[Path, int]:
    """A new file, or without a suffix a new folder, in `parent`, and what locks it."""
    while True:
        if suffix is None:
            temporary = Path(tempfile.mkdtemp(dir=parent, prefix=UNFINISHED))
            _open_to_all(temporary)
            lock = os.open(temporary, os.O_RDONLY) if os.name == "posix" else os.open(os.devnull, os.O_RDONLY)
        else:
            lock, name = tempfile.mkstemp(dir=parent, prefix=UNFINISHED, suffix=suffix)
            temporary = Path(name)
        with suppress(OSError):
            _flock(lock, wait=False)
        if temporary.exists():  # another process took it for a leftover before it was locked
            return temporary, lock
        os.close(lock)


def _sweep(folder: Path) -> None:
    """Remove what killed commands left unfinished in a folder; once a process."""
    if (name := str(folder.resolve())) in _swept:
        return
    _swept.add(name)
    found = []
    with suppress(OSError), os.scandir(folder) as entries:  # of a folder that may be written to, but not listed
        found = [Path(entry.path) for entry in entries if entry.name.startswith(UNFINISHED)]
    for path in found:
        with suppress(OSError):
            lock = _lock(path, None)
            try:
                if lock is None and time.time() - path.stat().st_mtime < ABANDONED:
                    continue
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            finally:
                if lock is not None:
                    os.close(lock)


def _lock(path: Path, on_wait: Callable[[], None] | None) -> int | None:
    """An open descriptor that locks a file or folder; None where there are no locks. Raises `BlockingIOError`."""
    if os.name != "posix":
        return None
    lock = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # whatever lies there, a pipe among them
    try:
        if not _flock(lock, wait=False):
            os.close(lock)
            return None
    except BlockingIOError:
        if on_wait is None:
            os.close(lock)
            raise
        on_wait()
        _flock(lock, wait=True)
    return lock


def _flock(lock: int, wait: bool) -> bool:
    """Lock a descriptor; False where the file system cannot. Raises `BlockingIOError` while another holds it."""
    if sys.platform == "win32":
        return False
    import fcntl

    try:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


def _same(lock: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(lock), path.stat())
    except FileNotFoundError:
        return False


def _finish(folder: Path) -> None:
    """Readable by everybody, whatever the writers of its files made them, and on the disk."""
    for inside in [*folder.rglob("*")]:
        _open_to_all(inside)
        _sync(inside)
    _sync(folder)


def _open_to_all(path: Path) -> None:
    with suppress(PermissionError):  # of file systems that know no such thing
        path.chmod(0o755 if path.is_dir() else 0o644)


def _sync(path: Path) -> None:
    """Have the system write a file or a folder to the disk itself, where it can."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
            raise
    finally:
        os.close(descriptor)


def _put(temporary: Path, path: Path, replace: bool) -> None:
    """A filled folder under its own name; what had it before is then at `temporary`, or gone."""
    aside = _aside(path)
    shutil.rmtree(aside, ignore_errors=True)
    if not replace or not path.exists():
        try:
            temporary.rename(path)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise Taken(str(path)) from None
            raise
    elif not _exchange(temporary, path):
        try:
            lock = _lock(path, None)  # so that nobody puts it back between the two steps
        except BlockingIOError:
            lock = None  # held already, by the command that replaces it
        path.rename(aside)
        try:
            temporary.rename(path)
        except OSError:
            aside.rename(path)
            raise
        finally:
            if lock is not None:
                os.close(lock)
        shutil.rmtree(aside)


def _aside(path: Path) -> Path:
    """Where a folder lies while another one takes its place, on systems that cannot exchange them."""
    whole = Path(os.path.abspath(path))  # noqa: PTH100
    return whole.parent / (".replaced-" + blake2b(os.fsencode(whole.name), digest_size=8).hexdigest())


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in a single step; False where the system has none for it."""
    import ctypes

    swap, here = 2, -100  # RENAME_EXCHANGE or RENAME_SWAP; AT_FDCWD
    names = os.fsencode(one), os.fsencode(other)
    with suppress(AttributeError, OSError, TypeError):
        library = ctypes.CDLL(None)
        if sys.platform == "darwin":
            return bool(library.renamex_np(*names, swap) == 0)
        return bool(library.renameat2(here, names[0], here, names[1], swap) == 0)
    return False
