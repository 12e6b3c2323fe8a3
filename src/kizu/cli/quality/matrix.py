"""Methods side by side on data sets: every category × method × setting × seed."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kizu.cli import terminal
from kizu.cli.options import find_data
from kizu.cli.quality.disagreeing import figure
from kizu.cli.wording import flagged
from kizu.data.progress import Progress

if TYPE_CHECKING:
    from kizu.evaluation.comparison.matrix import Cell, Outcome
    from kizu.evaluation.comparison.runs import Disagreement, RecordedRun
    from kizu.evaluation.pages.html import Page

__all__ = ["compare_methods"]

MEANING = "Mean ± standard deviation over the seeds; verdicts of all seeds together. Each seed is a run of its own."


def compare_methods(data: Sequence[str], options: dict[str, Any]) -> None:
    """Train and evaluate what is missing, write tables and page, print the table."""
    from kizu.evaluation import repetition
    from kizu.evaluation.comparison import matrix
    from kizu.evaluation.pages.html import write

    output = Path(options["output"] or "comparison").absolute()
    seeds = repetition.seeds_in(options["seeds"]) if options["seeds"] else [0]
    methods = [name.strip() for name in options["methods"].split(",") if name.strip()]
    datasets = [find_data(str(Path(path).expanduser().absolute()), options) for path in data]
    cells = matrix.cells_of(datasets, methods, options["settings"], seeds, output)
    missing = matrix.begin(cells, output, options["resume"])
    quiet = options["quiet"] or options["as_json"]
    problems: dict[Path, str] = {}
    with terminal.progress(quiet) as progress:
        done = len(cells) - len(missing)
        report = progress("Comparison")
        report("Cells", done, len(cells))
        for number, outcome in enumerate(_carried_out(missing, options["ray"], progress("Cell")), done + 1):
            problems[outcome.cell.folder] = outcome.problem
            report("Cells", number, len(cells))
    outcomes = [matrix.Outcome(cell, problems.get(cell.folder, "")) for cell in cells]
    matrix.write_tables(output, outcomes, flagged)
    write(output / "matrix.html", _page(outcomes, options["pictures"]))
    _print(outcomes, output, options)
    if any(outcome.problem for outcome in outcomes):
        click.get_current_context().exit(1)


def _carried_out(cells: "Sequence[Cell]", address: str | None, progress: Progress) -> "Iterator[Outcome]":
    from kizu.evaluation.comparison.matrix import one_after_another

    if address is None:
        yield from one_after_another(cells, progress)
    elif cells:
        from kizu.ray.matrix import as_tasks

        with terminal.cluster(address):
            yield from as_tasks(cells)


def _print(outcomes: "Sequence[Outcome]", output: Path, options: dict[str, Any]) -> None:
    from kizu.evaluation.comparison import matrix

    rows = matrix.summary_rows(outcomes)
    if options["as_json"]:
        terminal.print_json({"folder": str(output), "table": rows, "cells": matrix.cell_rows(outcomes)})
        return
    terminal.print_table(rows)
    for outcome in outcomes:
        if outcome.problem:
            cell = outcome.cell
            click.echo(
                f"Failed: {cell.category}, {cell.variant}, seed {cell.seed}: {flagged(outcome.problem)}", err=True
            )
    if not options["quiet"]:
        click.echo(f"\n{MEANING}\nResults: {output}\nPage:    {output / 'matrix.html'}")


def _page(outcomes: "Sequence[Outcome]", pictures: int) -> "Page":
    from kizu.evaluation.comparison import matrix
    from kizu.evaluation.experiment import command_line
    from kizu.evaluation.pages.html import Page, Section

    rows = matrix.summary_rows(outcomes)
    cells = matrix.cell_rows(outcomes)
    failed = [
        {
            "category": r["category"],
            "method": f"{r['method']} {r['setting']}",
            "seed": r["seed"],
            "why": flagged(r["error"]),
        }
        for r in cells
        if r["error"]
    ]
    best = _best(rows)
    shown = _disagreements(outcomes, pictures)
    sections = [
        Section("Image AUROC", MEANING, matrix.side_by_side_rows(outcomes)),
        Section("All figures", "Runs that failed are left out.", rows),
        Section("Each run", "Its own report lies in its folder.", [_without(r, "run", "error") for r in cells]),
        Section(
            "Where they differ",
            "Photographs on which the first seed's verdicts differ; those first whose p-values are furthest apart."
            if shown
            else "Nowhere.",
            figures=[figure(runs, item) for runs, item in shown],
        ),
    ]
    if failed:
        sections.insert(1, Section("Failed", "Not in the figures. The same command with --resume tries again.", failed))
    variants = list(dict.fromkeys(outcome.cell.variant for outcome in outcomes))
    return Page(
        title=" | ".join(variants),
        finding=best,
        lead=f"{terminal.count(len(outcomes), 'run')} side by side. A difference within the spread may be chance.",
        sections=sections,
        command=command_line(),
    )


def _best(rows: Sequence[dict[str, str]]) -> str:
    """The highest mean image AUROC, over all categories where there are several."""
    means = [row for row in rows if row["category"] == "mean"] or rows
    known = [row for row in means if row["image AUROC"] != "n/a"]
    if not known:
        return "No image AUROC is defined here: there are no defective images, or nothing could be trained."
    best = max(known, key=lambda row: float(row["image AUROC"].split()[0]))
    return f"Highest mean image AUROC: {best['image AUROC']}, {best['method']}."


def _without(row: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in row.items() if name not in names}


def _disagreements(outcomes: "Sequence[Outcome]", pictures: int) -> "list[tuple[list[RecordedRun], Disagreement]]":
    """Of each category the photographs on which the methods' first seeds differ."""
    from kizu.evaluation.comparison.runs import disagreements

    first = [o for o in outcomes if not o.problem and o.cell.seed == outcomes[0].cell.seed]
    found = []
    for folder in dict.fromkeys(outcome.cell.folder.parents[1] for outcome in first):
        runs = [run for o in first if o.cell.folder.parents[1] == folder and (run := o.run) is not None]
        found += [(runs, item) for item in disagreements(runs)] if len(runs) > 1 else []
    return sorted(found, key=lambda pair: -pair[1].distance)[:pictures]
