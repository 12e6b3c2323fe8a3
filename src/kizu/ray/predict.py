"""Many photographs judged on a cluster into a folder of Parquet, from where an earlier command left off."""

import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kizu.data.progress import Progress, silent
from kizu.errors import OutputError, require
from kizu.inference.inspector import BATCH
from kizu.ray import parts
from kizu.ray.addresses import is_remote
from kizu.ray.judging import Judge, ModelFiles, check_expression, in_pool, model_files, num_cores
from kizu.ray.sources import photographs

__all__ = ["Judged", "predict"]

FEWEST, MOST = 16, 4096  # photographs in a part: what one loses when its actor dies, and what a file is worth
PARTS_AN_ACTOR = 64
MAX_REASONS = 3
MAX_ERRORED = 16  # parts that the model fails on


@dataclass
class Judged:
    """What became of the photographs that were asked for."""

    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(parts.VERDICTS, 0))  # with the earlier ones
    before: int = 0  # that an earlier command had judged
    now: int = 0
    missing: int = 0  # given up: the model failed on their batch
    seconds: float = 0.0  # of judging, without the listing
    bytes: int = 0  # of Parquet that this command wrote
    files: int = 0
    reasons: list[str] = field(default_factory=list)  # why photographs are missing

    @property
    def rate(self) -> float:
        """Photographs a second."""
        return self.now / self.seconds if self.seconds else 0.0


class Recorder:
    """An actor that writes its verdicts where it is, so that nothing but their number goes through Ray."""

    def __init__(self, model: ModelFiles, root: str, part: str | None, folder: str, claim: str) -> None:
        self.judge = Judge(model, root, part)
        self.folder, self.claim = folder, claim

    def __call__(self, table: Any) -> Any:
        return require("pyarrow").Table.from_pylist([parts.write_part(self.judge(table), self.folder, self.claim)])


def predict(
    model: str | Path,
    arguments: Sequence[str],
    folder: str,
    *,
    listing: str | None = None,
    column: str | None = None,
    actors: int | None = None,
    part: str | None = None,
    progress: Progress = silent,
) -> Judged:
    """Judge photographs on the cluster that this process is connected to, and write the verdicts to `folder`.

    `arguments`, `listing` and `column` say which, as `photographs` takes them. What `folder` holds already is not
    judged again, so that the same call goes on after whatever ended it. Raises `OptionError`, `DataError` and
    `ModelError` for what cannot be done, and `OutputError` where verdicts cannot be written.
    """
    folder = _reachable(folder)
    if part is not None:
        check_expression(part)
    shipped = model_files(model)
    claim = parts.begin(folder, shipped.version)
    names = photographs(arguments, listing, column, progress)
    names, outcome = _missing(names, folder)
    if not len(names):
        return outcome
    start = time.monotonic()
    recorder = (shipped, os.getcwd(), part, folder, claim)  # noqa: PTH109
    written = in_pool(_blocks(names, actors), Recorder, recorder, shipped, actors, None, alone=True)
    total = len(names)
    progress("Judging", 0, total)
    with _heard() as outcome.reasons:
        for row in written.iter_rows():
            _count(outcome, row, folder)
            outcome.seconds = time.monotonic() - start
            progress(f"Judging: {outcome.rate:,.1f} a second", outcome.now, total)
    outcome.missing = total - outcome.now
    return outcome


def _reachable(folder: str) -> str:
    """The folder as the workers, who are in other folders, find it."""
    folder = folder.removeprefix("file://")
    return folder.rstrip("/") if is_remote(folder) else str(Path(folder).absolute())


def _missing(names: Any, folder: str) -> tuple[Any, Judged]:
    """The photographs that the folder has no verdict on, and what it says of the others."""
    compute = require("pyarrow.compute")
    done = parts.judged(folder)
    outcome = Judged()
    if len(done):
        asked = done.filter(compute.is_in(done["path"], value_set=names))
        for row in compute.value_counts(asked["verdict"].combine_chunks()).to_pylist():
            outcome.counts[row["values"]] += row["counts"]
        outcome.before = len(asked)
        names = names.filter(compute.invert(compute.is_in(names, value_set=done["path"].combine_chunks())))
    return names, outcome


def _blocks(names: Any, actors: int | None) -> Any:
    """A Ray Data set of paths, divided into what becomes a part each. The driver keeps references to them alone."""
    ray, data, pa = require("ray"), require("ray.data"), require("pyarrow")
    context = data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.max_errored_blocks = MAX_ERRORED  # counted as missing; more are a fault of something else
    size = min(MOST, max(FEWEST, len(names) // ((actors or num_cores()) * PARTS_AN_ACTOR))) // BATCH * BATCH
    tables = (pa.table({"path": names.slice(start, size)}) for start in range(0, len(names), size))
    return data.from_arrow_refs([ray.put(table) for table in tables])


class _Reasons(logging.Handler):
    """What Ray Data says of the batches that it gives up: the last line, each once."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        line = next((line.strip() for line in reversed(str(error or "").splitlines()) if line.strip()), "")
        if line and line not in self.lines and len(self.lines) < MAX_REASONS:
            self.lines.append(line)


@contextmanager
def _heard() -> Iterator[list[str]]:
    """Ray Data's errors in a list, and its remarks in its own file alone."""
    logger, reasons = logging.getLogger("ray.data"), _Reasons()
    before = list(logger.handlers)
    logger.handlers = [h for h in before if not isinstance(h, logging.StreamHandler)] + [reasons]
    try:
        yield reasons.lines
    finally:
        logger.handlers = before


def _count(outcome: Judged, row: dict[str, Any], folder: str) -> None:
    if row["problem"]:
        raise OutputError(folder, row["problem"].partition(" cannot be written: ")[2] or row["problem"])
    for verdict in outcome.counts:
        outcome.counts[verdict] += row[verdict]
        outcome.now += row[verdict]
    outcome.bytes += row["bytes"]
    outcome.files += 1
