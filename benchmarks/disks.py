"""Disks that are full, read-only, gone or odd, and what kizu's commands say of them (a part of `breaking.py`)."""

import ctypes
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from beside import beside
from kizu.inference import model_json

if TYPE_CHECKING:
    from breaking import Bench, Found

__all__ = ["DISKS", "disks"]

PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 24, 1, 2  # prctl(2), capabilities(7)
FULL = Path("/dev/full")
ENDS = (0, 1, 2, 141)  # done; done but for some; not done; nobody read it
ROOM = "40m"  # of a small disk: enough for the models that a command changes, before it is filled
Options = dict[str, Any]  # for `subprocess.run`
Disk = Callable[[Path, "Bench"], Any]  # a context, the options in it


class NotHere(Exception):
    """This machine cannot make such a disk, or not without more rights."""


def disks(bench: "Bench", count: int) -> "Found":
    """Each kind of disk under `count` commands that write, drawn at random: a sentence, and an exit code of ours."""
    found: Counter[str] = Counter()
    out = bench.folder / "out"
    for kind, disk in DISKS.items():
        commands = _commands(bench, out)
        for words in bench.rng.sample(commands, min(count, len(commands))):
            _clear(out)
            try:
                with disk(out, bench) as options:
                    done = bench.run(*words, **options)
            except NotHere as error:
                print(f"{kind}: not on this machine ({error})", file=sys.stderr)
                break
            finally:
                _clear(out)
            found["tried"] += 1
            found[f"{kind}, {words[0]}: traceback"] += "Traceback" in (done.stderr or "")
            found[f"{kind}, {words[0]}: exit code {done.returncode}"] += done.returncode not in ENDS
    model_json.check(bench.trained)
    found["leftovers"] += len(bench.leftovers())
    return +found


def _commands(bench: "Bench", out: Path) -> list[list[object]]:
    new, good, more, bad = (bench.folder / name for name in ("new", "good", "more", "bad"))
    fast = ["--size", 64, "--output", out / "results"]
    return [
        ["predict", bench.exported, new, "--csv", out / "v.csv"],
        ["predict", bench.exported, new, "--overlays", out / "seen", "--why", out / "why"],
        ["train", "patchcore", good, "--coreset", 0.2, *fast],
        ["train", "simplenet", good, "--meta-epochs", 1, "--gan-epochs", 1, *fast],
        ["update", out / "model", more],
        ["tune", out / "model", "--reset"],
        ["tune", bench.exported, more, bad, "--output", out / "tune"],
        ["export", bench.trained, "--to", "onnx", "--output", out / "exported"],
        ["merge", bench.trained, bench.trained, "--output", out / "merged"],
        ["check", bench.exported, new, "--images", 1, "--output", out / "check"],
        ["drift", bench.exported, new, "--history", out / "history.csv", "--output", out / "drift"],
        ["watch", new, "--model", bench.exported, "--output", out / "v.jsonl", "--once", "--settle", 0],
        ["evaluate", bench.trained, good, "--output", out / "again", "--save-maps"],
        ["demo", "--output", out / "demo"],
    ]


def _clear(out: Path) -> None:
    while subprocess.run(["umount", "-l", out], capture_output=True).returncode == 0:
        pass
    if out.is_symlink() or out.is_file():
        out.unlink()
    if out.is_dir():
        shutil.rmtree(out)


def _laid(out: Path, bench: "Bench") -> None:
    """What a command may find there: a model that it changes."""
    out.mkdir(exist_ok=True)
    shutil.copytree(bench.trained, out / "model")


@contextmanager
def _mounted(out: Path, bench: "Bench", more: str = "") -> Iterator[None]:
    out.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={ROOM}{more}", "tmpfs", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise NotHere(done.stderr.strip() or "mount failed")
    _laid(out, bench)
    yield


def _fill(out: Path, room: int) -> None:
    """Leave `room` bytes on the disk."""
    with suppress(OSError), (out / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))
    with suppress(OSError):
        os.truncate(out / "filler", max(0, (out / "filler").stat().st_size - room))


def _meanwhile(bench: "Bench", action: Callable[[], object]) -> AbstractContextManager[None]:
    """Something that happens at some moment in the seconds that a command takes."""

    def later(over: threading.Event) -> None:
        if not over.wait(bench.rng.uniform(0.3, 5)):
            with suppress(OSError):
                action()

    return beside(later)


@contextmanager
def short_files(out: Path, bench: "Bench") -> Iterator[Options]:
    limit = int(10 ** bench.rng.uniform(2.5, 5.5))
    _laid(out, bench)
    yield {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))}


@contextmanager
def full(out: Path, bench: "Bench") -> Iterator[Options]:
    with _mounted(out, bench):
        _fill(out, bench.rng.choice([0, 5_000, 50_000, 500_000]))
        yield {}


@contextmanager
def full_later(out: Path, bench: "Bench") -> Iterator[Options]:
    with _mounted(out, bench), _meanwhile(bench, lambda: _fill(out, 0)):
        yield {}


@contextmanager
def out_of_names(out: Path, bench: "Bench") -> Iterator[Options]:
    with _mounted(out, bench, ",nr_inodes=60"):
        with suppress(OSError):
            for number in range(60 - bench.rng.randrange(5)):
                (out / f"taken-{number}").touch()
        yield {}


@contextmanager
def read_only(out: Path, bench: "Bench") -> Iterator[Options]:
    with _mounted(out, bench):
        subprocess.run(["mount", "-o", "remount,ro", out], check=True)
        yield {}


@contextmanager
def read_only_later(out: Path, bench: "Bench") -> Iterator[Options]:
    remount = ["mount", "-o", "remount,ro", str(out)]  # refused while a file is being written: again a moment later

    def action() -> None:
        end = time.monotonic() + 2
        while subprocess.run(remount, capture_output=True).returncode and time.monotonic() < end:
            time.sleep(0.01)

    with _mounted(out, bench), _meanwhile(bench, action):
        yield {}


@contextmanager
def unmounted_later(out: Path, bench: "Bench") -> Iterator[Options]:
    unmount = ["umount", "-l", str(out)]
    with _mounted(out, bench), _meanwhile(bench, lambda: subprocess.run(unmount, capture_output=True)):
        yield {}


@contextmanager
def removed_later(out: Path, bench: "Bench") -> Iterator[Options]:
    _laid(out, bench)
    with _meanwhile(bench, lambda: shutil.rmtree(out, ignore_errors=True)):
        yield {}


@contextmanager
def moved_later(out: Path, bench: "Bench") -> Iterator[Options]:
    _laid(out, bench)
    away = out.with_name("away")
    with _meanwhile(bench, lambda: out.rename(away)):
        yield {}
    shutil.rmtree(away, ignore_errors=True)


@contextmanager
def a_file_later(out: Path, bench: "Bench") -> Iterator[Options]:
    _laid(out, bench)
    away = out.with_name("away")

    def action() -> None:
        out.rename(away)
        out.touch()

    with _meanwhile(bench, action):
        yield {}
    shutil.rmtree(away, ignore_errors=True)


@contextmanager
def a_file(out: Path, bench: "Bench") -> Iterator[Options]:
    out.touch()
    yield {}


@contextmanager
def a_link(out: Path, bench: "Bench", to: str) -> Iterator[Options]:
    out.symlink_to(to)
    yield {}


@contextmanager
def not_allowed(out: Path, bench: "Bench") -> Iterator[Options]:
    """A folder that may not be written to. Root does without its right to write everywhere."""
    _laid(out, bench)
    for path in (*out.rglob("*"), out):
        path.chmod(0o555 if path.is_dir() else 0o444)

    def give_up_rights() -> None:
        if os.getuid() == 0:
            for right in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
                ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, right, 0, 0, 0)

    yield {"preexec_fn": give_up_rights}
    for path in (out, *out.rglob("*")):
        path.chmod(0o755)


@contextmanager
def no_temporary_room(out: Path, bench: "Bench", place: str) -> Iterator[Options]:
    _laid(out, bench)
    yield {"env": bench.environment() | {"TMPDIR": place, "HOME": place, "XDG_CACHE_HOME": place}}


@contextmanager
def full_output(out: Path, bench: "Bench", stream: str) -> Iterator[Options]:
    if not FULL.exists():
        raise NotHere("no /dev/full")
    _laid(out, bench)
    with FULL.open("w") as device:
        yield {stream: device}


@contextmanager
def unread_output(out: Path, bench: "Bench") -> Iterator[Options]:
    _laid(out, bench)
    reading, writing = os.pipe()
    os.close(reading)
    file: IO[str] = os.fdopen(writing, "w")
    with file:
        yield {"stdout": file}


@contextmanager
def no_current_folder(out: Path, bench: "Bench") -> Iterator[Options]:
    _laid(out, bench)
    here = bench.folder / "here"
    here.mkdir()
    yield {"cwd": here, "preexec_fn": here.rmdir}


DISKS: dict[str, Disk] = {
    "short files": short_files,
    "full": full,
    "full later": full_later,
    "out of names": out_of_names,
    "read-only": read_only,
    "read-only later": read_only_later,
    "unmounted later": unmounted_later,
    "removed later": removed_later,
    "moved later": moved_later,
    "a file later": a_file_later,
    "a file": a_file,
    "a link to nowhere": lambda out, bench: a_link(out, bench, "/nowhere/at all"),
    "a link to itself": lambda out, bench: a_link(out, bench, out.name),
    "a link to a device": lambda out, bench: a_link(out, bench, "/dev/full"),
    "not allowed": not_allowed,
    "no folder for temporary files": lambda out, bench: no_temporary_room(out, bench, "/nowhere"),
    "a device for temporary files": lambda out, bench: no_temporary_room(out, bench, "/dev/full"),
    "full standard output": lambda out, bench: full_output(out, bench, "stdout"),
    "full standard error": lambda out, bench: full_output(out, bench, "stderr"),
    "unread standard output": unread_output,
    "no current folder": no_current_folder,
}
