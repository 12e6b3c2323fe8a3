"""Pillow's decoders: what they may open, how many pages a file has, and what libtiff says of damage."""

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from PIL import Image, ImageFile

__all__ = ["USUAL_LIMIT", "has_pages", "heard", "is_reduced", "opening"]

USUAL_LIMIT = 89_478_485  # pixels; Pillow's own against decompression bombs: about 9,459 × 9,459
MAX_PAGES = 16  # that are looked at
REDUCED = 254  # TIFF's tag NewSubfileType, whose lowest bit says that a page is a smaller copy of another one

_pillows_limit = threading.Lock()
_heard = threading.local()  # `lines`: of the image that this thread decodes


def heard() -> list[str]:
    """A list that fills with what libtiff says in this thread from now on, until the next call."""
    lines: list[str] = []
    _heard.lines = lines
    return lines


def is_reduced(page: Image.Image) -> bool:
    """Whether this page of a TIFF says that it is a smaller copy of something else."""
    return page.format == "TIFF" and bool(page.tag_v2.get(REDUCED, 0) & 1)  # type: ignore[attr-defined]


def has_pages(image: ImageFile.ImageFile) -> bool:
    """Whether there is more in a file than a picture and smaller copies of it."""
    if image.format != "TIFF":
        return image.format != "MPO" and getattr(image, "is_animated", False)
    try:
        for number in range(1, MAX_PAGES):
            image.seek(number)
            if not is_reduced(image):
                return True
    except Exception:  # there is no further page, or none that can be read
        pass
    finally:
        image.seek(0)
    return False


@contextmanager
def opening(pixels: int) -> Iterator[None]:
    """For the moment in which an image is opened, raise Pillow's limit, which is the process's, to so many pixels."""
    if pixels <= USUAL_LIMIT:
        yield
        return
    with _pillows_limit:
        before = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = None if before is None else max(before, pixels)
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _set_handler() -> Any:
    """Have libtiff, which Pillow brings along, tell its errors here. Where it cannot be found it goes on printing them.

    Returned is what libtiff calls from then on, in any thread: it must never be freed.
    """
    try:
        set_handler = ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler  # type: ignore[attr-defined]
        fill_in = ctypes.CDLL(None).vsnprintf
    except (AttributeError, OSError, TypeError):
        return None

    def hear(place: bytes | None, template: bytes, values: int) -> None:
        line = ctypes.create_string_buffer(200)
        fill_in(line, ctypes.c_size_t(len(line)), template, ctypes.c_void_p(values))
        lines = _heard.__dict__.setdefault("lines", [])
        if len(lines) < 10:
            lines.append(f"{(place or b'libtiff').decode('ascii', 'replace')}: {line.value.decode('ascii', 'replace')}")

    handler = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p)(hear)
    set_handler(handler)
    return handler


_HANDLER = _set_handler()  # here, where no two threads can be the first
