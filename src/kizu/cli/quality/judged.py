"""Verdicts that were kept, from what predict, watch and serve write: tables, lines of JSON, the history of a server."""

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from datetime import datetime
from functools import partial
from pathlib import Path

from kizu.data import files
from kizu.errors import DataError
from kizu.evaluation.pages.day import Judged
from kizu.inference.verdict import Verdict

__all__ = ["read_judged"]

MAX_BYTES = 50_000_000  # of a photograph
MAX_TABLE_BYTES = 1_000_000_000
LEDGER_KEYS = {"number", "bytes", "modified"}


def read_judged(sources: Sequence[str], photos: Sequence[str], opened: ExitStack) -> list[Judged]:
    """All verdicts of the sources, in the order of their times; those without one come last, as they are.

    `photos` are folders where photographs are looked for besides the places that the sources name. What the photographs
    are read from is closed with `opened`. Raises `DataError` for a source that holds no verdicts.
    """
    judged = [entry for source in sources for entry in _read(Path(source), [Path(folder) for folder in photos], opened)]
    timed = sorted((entry for entry in judged if entry.time is not None), key=lambda entry: entry.time or datetime.min)
    return [*timed, *(entry for entry in judged if entry.time is None)]


def _read(path: Path, photos: Sequence[Path], opened: ExitStack) -> Iterator[Judged]:
    from kizu.serving.history import HISTORY

    if path.is_dir() and not (path / HISTORY).is_file():
        raise DataError(f"{path}: there is no {HISTORY} of kizu serve or kizu watch --store in this folder")
    if path.is_dir():
        return _history(path / HISTORY, opened)
    try:
        files.check_regular(path, MAX_TABLE_BYTES)
        with path.open("rb") as file:
            start = file.read(16)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    if start.startswith(b"SQLite format 3"):
        return _history(path, opened)
    if start.lstrip().startswith(b"["):
        return _predictions(path, photos)
    return _ledger(path, photos) if start.startswith(b"{") or not start else _table(path, photos)


def _history(path: Path, opened: ExitStack) -> Iterator[Judged]:
    """What a server kept, or a watch with a store."""
    from kizu.serving.history import History

    history = opened.enter_context(closing(History(path)))
    for entry in reversed(history.last(history.keep)):
        when = datetime.fromtimestamp(entry.time).astimezone()
        yield Judged(entry.verdict, when, entry.model, entry.feedback, partial(history.photograph, entry.id))


def _ledger(path: Path, photos: Sequence[Path]) -> Iterator[Judged]:
    """The lines of a watch."""
    from kizu.serving.watch.ledger import photograph_of, rows

    for row, _ in rows(path):
        try:
            when = datetime.fromisoformat(row["time"]).astimezone()
            verdict = Verdict.from_row(row)
        except (KeyError, TypeError, ValueError):
            raise DataError(f"{path}: line {row['number']} is no verdict of kizu watch") from None
        folders = photos or [path.parent]
        yield Judged(verdict, when, str(row.get("model", "")), None, partial(photograph_of, row, folders, MAX_BYTES))


def _predictions(path: Path, photos: Sequence[Path]) -> Iterator[Judged]:
    """What `predict` prints as JSON."""
    try:
        for row in json.loads(path.read_bytes().decode("utf-8", "surrogateescape")):
            known = {name: value for name, value in row.items() if name in Verdict.model_fields}
            yield Judged(Verdict(image=row["path"], **known), photograph=_finder(row["path"], photos))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DataError(f"{path}: this is nothing that kizu predict prints as JSON") from None


def _table(path: Path, photos: Sequence[Path]) -> Iterator[Judged]:
    """A table of verdicts, of `predict` or of a watch."""
    text = path.read_text(encoding="utf-8", errors="surrogateescape")
    try:
        for row in csv.DictReader(io.StringIO(text, newline="")):
            name = files.from_cell(row["image"])
            when = datetime.fromisoformat(row["time"]).astimezone() if row.get("time") else None
            verdict = Verdict.model_validate(
                {
                    "image": name,
                    "verdict": row["verdict"],
                    **{key: _number(row[key]) for key in ("score", "p_value", "threshold")},
                    "cannot_judge": files.from_cell(row.get("cannot_judge") or ""),
                    "error": files.from_cell(row.get("error") or ""),
                }
            )
            yield Judged(verdict, when, files.from_cell(row.get("model") or ""), None, _finder(name, photos))
    except (KeyError, TypeError, ValueError, csv.Error):
        raise DataError(
            f"{path}: this is no table of verdicts: give what kizu predict --csv, kizu predict --json or kizu watch "
            "wrote, or the folder of kizu serve --store"
        ) from None


def _number(cell: str) -> float | None:
    value = float(cell) if cell else None
    return None if value in (float("inf"), float("-inf")) else value


def _finder(name: str, photos: Sequence[Path]) -> Callable[[], bytes | None]:
    """Where a photograph of this name is, when it is asked for."""

    def find() -> bytes | None:
        for path in (Path(name), *(folder / Path(name).name for folder in photos)):
            try:
                files.check_regular(path, MAX_BYTES)
                return path.read_bytes()
            except OSError:
                continue
        return None

    return find
