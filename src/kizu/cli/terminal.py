"""What a person sees in a terminal: progress, tables, sentences."""

import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kizu.cli.wording import flagged
from kizu.data import files
from kizu.data.progress import Progress, silent

if TYPE_CHECKING:
    from kizu.data.dataset import Dataset
    from kizu.evaluation.evaluate import CategoryResult
    from kizu.inference.batch import FileVerdict

__all__ = [
    "cluster",
    "coloured",
    "count",
    "messages",
    "print_facts",
    "print_json",
    "print_repetitions",
    "print_results",
    "print_table",
    "print_verdicts",
]
__all__ += ["progress", "summary"]

COLUMNS = {"image_auroc": "image AUROC", "pixel_auroc": "pixel AUROC", "au_pro": "AU-PRO"}
NOT_OUTLINED = "nothing is outlined: no pixel is above the pixel threshold (--overlays shows where the map is highest)"
MAX_LISTED = 8  # training images for a second look
LOCO_COLUMNS = {
    "image_auroc_logical": "logical AUROC",
    "au_spro_logical_0.05": "logical sPRO",
    "image_auroc_structural": "structural AUROC",
    "au_spro_structural_0.05": "structural sPRO",
}


@contextmanager
def progress(quiet: bool) -> Iterator[Callable[[str], Progress]]:
    """For a label, something to report (stage, done, total) to; bars on a terminal's standard error."""
    if quiet or not sys.stderr.isatty():
        yield lambda label: silent
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[tuple[str, str], Any] = {}

        def reporter(label: str) -> Progress:
            def report(stage: str, done: int, total: int) -> None:
                key = (label, stage.partition(":")[0])  # what follows the colon changes
                if key not in tasks:
                    tasks[key] = bars.add_task(f"{label}  {stage}", total=total)
                bars.update(tasks[key], description=f"{label}  {stage}", completed=done, total=total)
                if done >= total:
                    bars.remove_task(tasks.pop(key))

            return report

        yield reporter


@contextmanager
def cluster(address: str) -> Iterator[None]:
    """A Ray cluster. What Ray says of workers that died, among the results, goes to standard error."""
    from kizu.ray.cluster import cluster

    with redirect_stdout(sys.stderr), cluster(address):
        yield


class _Flagged(logging.Formatter):
    """Log records with the settings that they name spelled as flags."""

    def format(self, record: logging.LogRecord) -> str:
        return flagged(super().format(record))


@contextmanager
def messages(quiet: bool, warnings_only: bool = False) -> Iterator[None]:
    """Show what kizu logs, line by line, on standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Flagged())
    handler.setLevel(logging.ERROR if quiet else logging.WARNING if warnings_only else logging.INFO)
    logger = logging.getLogger("kizu")
    logger.addHandler(handler)
    if not warnings_only:
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def summary(dataset: "Dataset") -> str:
    splits = ((split, len(dataset.select(split=split))) for split in ("train", "validation", "test"))
    counts = ", ".join(f"{number} {split}" for split, number in splits if number)
    lines = [
        f"{dataset.root}: {dataset.layout}, {count(len(dataset.categories), 'category', 'categories')}, {counts} images"
    ]
    lines += [f"Note: {flagged(note)}" for note in dataset.remarks]
    return "\n".join(lines)


def print_results(results: "Sequence[CategoryResult]", folder: Path | None, options: dict[str, Any]) -> None:
    if options["as_json"]:
        rows = [
            {
                "category": result.category,
                **result.metrics,
                "threshold": result.threshold,
                "false_alarms": result.count(defective=False, stopped=True),
                "misses": result.count(defective=True, stopped=False),
                "promise": result.statement,
                "unlike_the_others": [outlier.image for outlier in result.outliers],
                **({"choice": result.choice} if result.choice else {}),
            }
            for result in results
        ]
        print_json({"folder": folder and str(folder), "categories": rows})
        return
    loco = any(LOCO_COLUMNS.keys() <= result.metrics.keys() for result in results)
    print_table([_result_row(result, COLUMNS | LOCO_COLUMNS if loco else COLUMNS) for result in results])
    for result in results:
        click.echo(f"\n{result.category}: {result.statement}" if result.statement else "")
        if result.choice:
            click.echo(f"  {result.choice['sentence']}")
            print_table(result.choice["rows"])
            for reason in result.choice["reasons"]:
                click.echo(f"  {reason}")
        for reason in sorted(set(result.reasons.values())):
            names = ", ".join(name for name in result.reasons if result.reasons[name] == reason)
            click.echo(f"  n/a: {names}: {flagged(reason)}")
        for note in result.notes:
            click.echo(f"  Note: {flagged(note)}")
        if result.outliers:
            names = ", ".join(outlier.image for outlier in result.outliers[:MAX_LISTED])
            remainder = f" and {len(result.outliers) - MAX_LISTED} more" if len(result.outliers) > MAX_LISTED else ""
            click.echo(
                f"  Unlike the other training images: {names}{remainder}. Where one shows a defect, remove it and "
                "train again."
            )
        for row in result.scores:
            if row.error:
                click.echo(f"  Not judged: {row.image} {flagged(row.error)}")
    if folder is not None:
        click.echo(f"\nResults: {folder}\nReport:  {folder / 'report.html'}")


def print_repetitions(runs: "Sequence[tuple[Path, Sequence[CategoryResult]]]", options: dict[str, Any]) -> None:
    """Several trainings of the same: mean and spread, and where each is."""
    from kizu.evaluation.repetition import summary_rows

    rows = summary_rows([results for _, results in runs])
    if options["as_json"]:
        each = [
            {"folder": str(folder), "categories": [{"category": r.category, **r.metrics} for r in results]}
            for folder, results in runs
        ]
        print_json({"summary": rows, "runs": each})
        return
    print_table(rows)
    click.echo("\nMean ± standard deviation over the runs; verdicts of all runs together.")
    for folder, _ in runs:
        click.echo(f"Results: {folder}")


def _result_row(result: "CategoryResult", names: dict[str, str]) -> dict[str, str]:
    good, bad = result.count(defective=False), result.count(defective=True)
    values = {key: result.metrics.get(key) for key in names}
    return {
        "category": result.category,
        **{names[key]: "n/a" if value is None else f"{value:.4f}" for key, value in values.items()},
        "defects stopped": f"{result.count(defective=True, stopped=True)} of {bad}",
        "false alarms": f"{result.count(defective=False, stopped=True)} of {good}",
        "ms/image": f"{1000 * result.seconds.get('per image', 0):.0f}" if result.scores else "n/a",
    }


def print_verdicts(rows: "Sequence[FileVerdict]", options: dict[str, Any], *, measured: bool = False) -> None:
    """A line for each photograph, and below one that is stopped why; if `measured`, the size of what is marked."""
    for row in rows:
        if row.error:
            click.echo(f"{coloured('error')}  {row.image}: {flagged(row.error)}")
        elif not options["quiet"] or row.verdict in ("stop", "ask"):
            zone = f"  zone {row.zone}" if row.zone and row.verdict == "stop" else ""
            click.echo(f"{coloured(row.verdict)}  {row.score:10.4f}  p {row.p_value:<7.3g} {row.image}{zone}")
            if row.cannot_judge:
                click.echo(f"{'':19}cannot be judged: {row.cannot_judge}")
            if row.verdict == "stop" and row.parts:
                click.echo(f"{'':19}{_explanation(row.parts)}")
            elif row.verdict == "stop" and not row.regions and not row.cannot_judge:
                click.echo(f"{'':19}{NOT_OUTLINED}")
            for region in row.regions if measured else ():
                small = "" if region.matters else ", too small to matter"
                click.echo(f"{'':19}{region.size} at {region.place[0]}, {region.place[1]}{small}")
    if not options["quiet"]:
        counts = {word: sum(row.verdict == word for row in rows) for word in ("stop", "pass", "ask", "error")}
        threshold = next((row.threshold for row in rows if not row.error), None)
        counted = ", ".join(f"{number} {word}" for word, number in counts.items() if number)
        click.echo(f"\n{counted}" + ("" if threshold is None else f"; stopped above {threshold:.4f}"), err=True)


def coloured(verdict: str) -> str:
    """A verdict in five columns; red where it needs somebody, on a terminal and unless NO_COLOR is set."""
    alarms = verdict != "pass" and not os.environ.get("NO_COLOR")
    return click.style(f"{verdict:5}", fg="red", bold=True) if alarms else f"{verdict:5}"


def _explanation(parts: dict[str, Any]) -> str:
    """In a line: the kind of anomaly, and for one that has no place what to compare the photograph with."""
    summary_line = f"{parts['kind']} (structural {parts['structural']:+.1f}, logical {parts['logical']:+.1f})"
    if parts["kind"] == "structural":
        return summary_line
    near, groups = ", ".join(str(found["image"]) for found in parts["nearest"]), parts["groups"]
    return f"{summary_line}; compare with {near}; differs most in {groups[0]['group']} ({groups[0]['share']:.0%})"


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Columns as wide as their content: text left, numbers right. On a terminal too narrow for them, line by line."""
    if not rows:
        return
    if sys.stdout.isatty() and _width(rows) > shutil.get_terminal_size().columns:
        _print_blocks(rows)
        return
    cells = [list(rows[0])] + [[str(value) for value in row.values()] for row in rows]
    columns = range(len(cells[0]))
    widths = [max(len(line[column]) for line in cells) for column in columns]
    left = [not all(line[column][:1].isdigit() or line[column] == "n/a" for line in cells[1:]) for column in columns]
    for line in cells:
        padded = (
            cell.ljust(width) if is_left else cell.rjust(width)
            for cell, width, is_left in zip(line, widths, left, strict=True)
        )
        click.echo("  ".join(padded).rstrip())


def _width(rows: Sequence[dict[str, Any]]) -> int:
    return sum(2 + max(len(name), *(len(str(row[name])) for row in rows)) for name in rows[0]) - 2


def _print_blocks(rows: Sequence[dict[str, Any]]) -> None:
    """A block for each row: its first cell, and below it the others, each with its column's name."""
    _, *names = rows[0]
    width = max(map(len, names), default=0)
    for row in rows:
        first, *others = row.values()
        click.echo(first)
        for name, value in zip(names, others, strict=True):
            if value != "":
                click.echo(f"  {name:{width}}  {value}".rstrip())


def print_json(value: Any) -> None:
    """JSON for programs, whatever the terminal can show."""
    encoding = (getattr(sys.stdout, "encoding", None) or "ascii").lower()
    click.echo(files.json_text(value, ascii_only="utf" not in encoding))


def print_description(facts: dict[str, Any], as_json: bool) -> None:
    """What `info` and `doctor` found out, as JSON or line by line."""
    if as_json:
        print_json(facts)
    else:
        print_facts(facts)


def print_facts(facts: dict[str, Any]) -> None:
    width = max(len(key) for key in facts)
    for key, value in facts.items():
        lines = value if isinstance(value, list) else [value]
        for number, line in enumerate(lines or ["none"]):
            click.echo(f"{key if number == 0 else '':{width}}  {line}")


def count(number: int, singular: str, plural: str | None = None) -> str:
    return f"{number} {singular if number == 1 else plural or singular + 's'}"
