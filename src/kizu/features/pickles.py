"""Pickles of plain values, as other systems leave them beside their models; anything else in them is refused unread."""

import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any, NoReturn

from kizu.data import files
from kizu.errors import ModelError

__all__ = ["read_plain", "write_plain"]

LARGEST = 10_000_000  # bytes
PLAIN = (type(None), bool, int, float, str, bytes)
ALLOWED = {("collections", "OrderedDict"): OrderedDict}


class _Plain(pickle.Unpickler):
    """Knows numbers, words and collections of them. Whatever would be imported or called stops it."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in ALLOWED:
            return ALLOWED[module, name]
        raise pickle.UnpicklingError(f"it names {module}.{name}")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise pickle.UnpicklingError("it refers to something outside of itself")


def read_plain(path: str | os.PathLike[str]) -> Any:
    """The plain values in a pickle. Nothing is imported or called. Raises `ModelError` for any other pickle."""
    path = Path(path)
    try:
        if path.stat().st_size > LARGEST:
            raise ModelError(f"{path} has more than {LARGEST:,} bytes: no file of plain values")
        with path.open("rb") as file:
            value = _Plain(file).load()
    except FileNotFoundError:
        raise ModelError(f"{path}: there is no such file") from None
    except ModelError:
        raise
    except Exception as error:  # a broken pickle raises anything
        raise ModelError(f"{path} is refused: it should hold plain values only, but {error}") from None
    return value


def write_plain(path: str | os.PathLike[str], value: Any) -> None:
    """Pickle plain values, whole or not at all. Raises `TypeError` for any other."""
    _check(value)
    with files.new_file(path) as temporary:
        temporary.write_bytes(pickle.dumps(value, protocol=4))


def _check(value: Any) -> None:
    if isinstance(value, dict):
        _check([*value, *value.values()])
    elif isinstance(value, list | tuple):
        for part in value:
            _check(part)
    elif type(value) not in PLAIN:
        raise TypeError(f"{type(value).__name__} is no plain value")
