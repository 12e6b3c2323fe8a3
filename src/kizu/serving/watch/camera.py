"""Frames of a camera or a video file, through OpenCV (extra camera)."""

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from kizu.data import image
from kizu.data.image import RGB
from kizu.errors import OptionError, require
from kizu.inference.prediction import Photo
from kizu.serving.watch.incoming import Arrival
from kizu.serving.watch.ledger import Identity, Row, rows

__all__ = ["FrameFolder", "frames"]

PAUSE = 2.0  # seconds until a camera that fell silent is tried again


class FrameFolder:
    """A camera's frames as PNG, beside the ledger: each from before its row is written until a sink has taken it."""

    def __init__(self, ledger: Path) -> None:
        self._folder = ledger.with_suffix(".frames")

    def write(self, name: str, frame: RGB) -> None:
        """Raises `OutputError` where it cannot be written."""
        image.write(self._path(name), frame, durable=True)

    def read(self, row: Row) -> bytes:
        """The frame of a row; empty where there is none."""
        with suppress(OSError):
            return self._path(row["image"]).read_bytes()
        return b""

    def forget(self, row: Row) -> None:
        self._path(row["image"]).unlink(missing_ok=True)

    def tidy(self, ledger: Path, after: int) -> None:
        """Forget all frames but those of rows after this number; the folder too, where none are left."""
        waiting = {self._path(row["image"]) for row, _ in rows(ledger) if row["number"] > after}
        for path in {*self._folder.glob("*.png")} - waiting:
            path.unlink(missing_ok=True)
        with suppress(OSError):
            self._folder.rmdir()

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.png"


def frames(source: str, every: float, known: Callable[[Identity], bool], first: int) -> Iterator[list[Arrival]]:
    """A frame each `every` seconds, of a video file to its end, of a camera (its number or address) for ever.

    Frames of a file that are known already are left out; a camera's frames are numbered from `first` on. While there
    is no frame, an empty list comes. Raises `OptionError` where the source cannot be opened.
    """
    cv2 = require("cv2")
    if source.isdigit() or "://" in source:
        address = int(source) if source.isdigit() else source
        video = cv2.VideoCapture(address)
        if not video.isOpened():
            raise OptionError(f"`camera={source}`: there is no camera that OpenCV can open")
        return _camera(cv2, video, address, every, first)
    path = Path(source)
    if not path.is_file():
        raise OptionError(f"`camera={path}`: there is no such file (a camera is a number or an address)")
    video = cv2.VideoCapture(str(path))
    if not video.isOpened():
        raise OptionError(f"`camera={path}`: OpenCV cannot read it as a video")
    return _file(cv2, video, path, every, known)


def _file(cv2: Any, video: Any, path: Path, every: float, known: Callable[[Identity], bool]) -> Iterator[list[Arrival]]:
    state = path.stat()
    try:
        rate = video.get(cv2.CAP_PROP_FPS) or 25.0
        step = max(1, round(rate * every))
        number = 0
        while video.grab():
            identity = f"{path.name}-{number:06}", state.st_size, state.st_mtime_ns
            if number % step == 0 and not known(identity):
                read, frame = video.retrieve()
                if read:
                    yield [Arrival(identity, Photo(_rgb(frame)), facts={"seconds": number / rate})]
            number += 1
    finally:
        video.release()


def _camera(cv2: Any, video: Any, address: int | str, every: float, first: int) -> Iterator[list[Arrival]]:
    name = f"camera-{address}" if isinstance(address, int) else "camera"
    number, due = first, time.monotonic()
    try:
        while True:
            if not video.grab():  # every frame is taken as it comes, so that the judged one is never old
                video.release()
                yield []
                time.sleep(PAUSE)
                video = cv2.VideoCapture(address)
                continue
            if time.monotonic() < due:
                yield []
                continue
            due = time.monotonic() + every
            read, frame = video.retrieve()
            if read:
                yield [Arrival((f"{name}-{number:06}", 0, time.time_ns()), Photo(_rgb(frame)))]
                number += 1
    finally:
        video.release()


def _rgb(frame: Any) -> Any:
    return frame[:, :, ::-1].copy() if frame.ndim == 3 else frame
