"""How much memory there is, and how much may be used."""

import ctypes
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from kizu.errors import OptionError

__all__ = ["allow_tuning", "budget", "release", "tidy"]

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}

_tuning_allowed = False


def budget(asked: str | int | None = None) -> int:
    """Bytes that may be used: what was asked for ("2GB", "500 MB" or bytes), or half of what is free.

    Raises `OptionError` for something that is no amount, or too little to work with.
    """
    if asked is None:
        return max(_free() // 2, 2 * 10**8)
    if isinstance(asked, int):
        amount = float(asked)
    else:
        match = re.fullmatch(r"\s*([\d.]+)\s*([kmgt]?)i?b?\s*", asked.lower())
        if match is None:
            raise OptionError(f"`memory={asked}`: expected an amount such as 2GB or 500MB")
        amount = float(match[1]) * UNITS[match[2]]
    if amount < 10**8:
        raise OptionError(f"`memory={asked}`: at least 100MB are needed")
    return int(amount)


def _free() -> int:
    """Bytes that new work can have, as far as the system says."""
    try:
        with open("/proc/meminfo") as file:  # noqa: PTH123
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, ValueError, OSError):
        return 4 * 10**9


def release() -> None:
    """Hand freed memory back to the system, where the C library would keep it for later (glibc)."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def allow_tuning() -> None:
    """Let `tidy` set how this process allocates memory (glibc).

    The command line does so. A program that uses kizu as a library keeps its allocator as it is: glibc does not say
    what it is set to, so that nothing could set it back.
    """
    global _tuning_allowed
    _tuning_allowed = True


@contextmanager
def tidy() -> Iterator[None]:
    """Inside, what is large goes back to the system when it is freed, and leaves no holes between what stays.

    Afterwards the C library keeps freed memory, as it soon would by itself: batch after batch needs it again. Does
    nothing in a process that has not called `allow_tuning`.
    """
    if not _tuning_allowed:
        yield
        return
    _allocate(4 * 2**20, 2**17)
    try:
        yield
    finally:
        _allocate(32 * 2**20, 64 * 2**20)


def _allocate(apart: int, kept: int) -> None:
    """Sizes from which on memory is taken from the system apart, and up to which freed memory is kept."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            library = ctypes.CDLL("libc.so.6")
            library.mallopt(M_MMAP_THRESHOLD, apart)
            library.mallopt(M_TRIM_THRESHOLD, kept)
