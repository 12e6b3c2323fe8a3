"""Which photographs to judge: from folders, globs and buckets, or from a list or a table that names them.

All of them are held as one Arrow column: some hundred bytes a photograph, where Python's own text takes several times
as much.
"""

import csv
import posixpath
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from kizu.data import image
from kizu.data.photographs import FOREIGN, is_set_aside
from kizu.data.progress import Progress, silent
from kizu.errors import DataError, OptionError, require
from kizu.inference.batch import image_paths
from kizu.ray.addresses import is_remote, located

__all__ = ["photographs"]

CHUNK = 65_536  # photographs that are turned into Arrow together
COLUMNS = ("path", "image", "file", "filename", "uri", "url", "address")  # that are looked for in a table
TABLES = (".parquet", ".csv")


def photographs(
    arguments: Sequence[str], listing: str | None = None, column: str | None = None, progress: Progress = silent
) -> Any:
    """An Arrow column of paths and addresses, each once, in order.

    `arguments` are files, folders, globs and addresses. `listing` is a text file of one path or address a line, or a
    CSV or Parquet table (a file, or a folder of Parquet files) with a `column` of them. Raises `DataError` where there
    are none, and `OptionError` for a table without such a column.
    """
    pa, compute = require("pyarrow"), require("pyarrow.compute")
    chunks = []
    names = _named(arguments, listing, column)
    while names_now := list(islice(names, CHUNK)):
        chunks.append(pa.array([_as_text(name) for name in names_now], pa.large_string()))
        progress("Listing photographs", CHUNK * len(chunks), CHUNK * (len(chunks) + 1))
    progress("Listing photographs", 1, 1)
    if not chunks:
        raise DataError(f"{listing or ', '.join(arguments)}: there are no photographs")
    return compute.unique(pa.chunked_array(chunks))


def _named(arguments: Sequence[str], listing: str | None, column: str | None) -> Iterator[str]:
    local = [argument for argument in arguments if not is_remote(argument)]
    for argument in arguments:
        if is_remote(argument):
            yield from _below(argument)
    if local:
        yield from map(str, image_paths(local))
    if listing is not None:
        for name in _in_table(listing, column) if _is_table(listing) else _in_text(listing):
            yield name if is_remote(name) else str(Path(name))


def _as_text(name: str) -> str:
    """As UTF-8, which Arrow holds; bytes of a file's name that are none are shown as such, and not found again."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _below(address: str) -> Iterator[str]:
    """An address itself, or the photographs below it, folder by folder, told by their names."""
    system, start = located(address)
    fs = require("pyarrow.fs")
    try:
        if system.get_file_info(start).type == fs.FileType.File:
            yield address
            return
        folders = [start]
        while folders:
            inside = system.get_file_info(fs.FileSelector(folders.pop()))
            folders += sorted(
                (i.path for i in inside if i.is_file is False and not is_set_aside(i.base_name)), reverse=True
            )
            for name in sorted(item.path for item in inside if item.is_file and _is_photograph(item.base_name)):
                yield posixpath.join(address, posixpath.relpath(name, start))
    except OSError as error:
        raise DataError(f"{address} cannot be listed: {str(error).partition(chr(10))[0]}") from None


def _is_photograph(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in image.SUFFIXES | FOREIGN and not is_set_aside(name)


def _is_table(listing: str) -> bool:
    return listing.lower().endswith(TABLES) or (not is_remote(listing) and Path(listing).is_dir())


def _in_text(listing: str) -> Iterator[str]:
    try:
        with open(listing, encoding="utf-8", errors="surrogateescape") as lines:  # noqa: PTH123
            yield from (name for line in lines if (name := line.rstrip("\r\n")))
    except OSError as error:
        raise DataError(f"{listing} cannot be read: {error.strerror}") from None


def _in_table(listing: str, column: str | None) -> Iterator[str]:
    """The column of a CSV or Parquet table, part by part."""
    pa = require("pyarrow")
    try:
        if listing.lower().endswith(".csv"):
            with open(listing, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:  # noqa: PTH123
                rows = csv.DictReader(file)
                name = _column(rows.fieldnames or (), listing, column)
                yield from (row[name] for row in rows if row[name])
            return
        system, path = located(listing)
        table = require("pyarrow.dataset").dataset(path, filesystem=system, format="parquet")
        name = _column(table.schema.names, listing, column)
        for batch in table.to_batches(columns=[name]):
            yield from (str(value) for value in batch.column(0).to_pylist() if value)
    except (OSError, pa.ArrowException, csv.Error, UnicodeError) as error:
        raise DataError(f"{listing} cannot be read: {str(error).partition(chr(10))[0]}") from None


def _column(names: Iterable[str], listing: str, column: str | None) -> str:
    names = list(names)
    if column is not None and column in names:
        return column
    found = [name for wanted in COLUMNS for name in names if name.lower() == wanted] if column is None else []
    if not found:
        wanted = f"no column {column}" if column else f"none of the columns {', '.join(COLUMNS)}"
        raise OptionError(f"{listing} has {wanted}: `column` names the one that holds paths ({', '.join(names)})")
    return found[0]
