"""The command compare: runs side by side."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kizu.cli import terminal
from kizu.cli.options import json_option, quiet_option
from kizu.errors import BadImage, OptionError

if TYPE_CHECKING:
    from kizu.evaluation.comparison import Disagreement, RecordedRun
    from kizu.evaluation.pages.html import Figure, Page

__all__ = ["compare"]

WHAT_IS_COMPARED = (
    "On the photographs that both judged. AUROC with 95 % confidence (DeLong); of verdicts, how many are stopped by "
    "this run alone (+) and by the first one alone (−), and how likely a difference this large is if both runs "
    "are equally good."
)
DISAGREEMENTS = "Photographs on which the verdicts differ; those first whose p-values are furthest apart."


@click.command()
@click.argument("runs", nargs=-1, required=True)
@click.option("--pictures", default=48, show_default=True, help="Show this many photographs on the page, at most.")
@click.option("--output", metavar="FILE", help="Write a page with the photographs on which the runs differ.")
@quiet_option
@json_option
def compare(runs: tuple[str, ...], pictures: int, output: str | None, quiet: bool, as_json: bool) -> None:
    """Two or more finished runs: figures, what was set differently, and the photographs on which they differ.

    Differences are those to the first run. A difference within its ± may be chance.

    \b
    Example:  kizu compare results/project/group/small results/project/group/large --output compare.html
    """
    from kizu.evaluation.comparison import disagreements, paired_rows, read_run, result_rows, setting_rows
    from kizu.evaluation.pages.html import write

    if len(runs) < 2:
        raise OptionError("kizu compare takes two runs or more")
    found = [read_run(Path(run), name) for run, name in zip(runs, _names(runs), strict=True)]
    differing = disagreements(found)
    if output:
        write(Path(output), _page(found, differing, pictures))
    if as_json:
        terminal.print_json(
            {
                "results": result_rows(found),
                "differences": paired_rows(found),
                "settings": setting_rows(found),
                "photographs": [_row(found, item) for item in differing],
            }
        )
        return
    for rows in (result_rows(found), paired_rows(found), setting_rows(found)):
        if rows:
            terminal.print_table(rows)
            click.echo()
    if not quiet:
        on = terminal.count(len(differing), "photograph")
        click.echo(f"The verdicts differ on {on}." + (f"\nPage: {output}" if output else ""))


def _names(runs: Sequence[str]) -> list[str]:
    """The runs' folders without what all of them begin with."""
    paths = [Path(run).resolve() for run in runs]
    if len(set(paths)) < len(paths):
        raise OptionError("kizu compare: the same run is named twice")
    common = os.path.commonpath(paths)
    return [os.path.relpath(path, common) for path in paths]


def _page(runs: "Sequence[RecordedRun]", differing: "Sequence[Disagreement]", pictures: int) -> "Page":
    from kizu.evaluation.comparison import paired_rows, result_rows, setting_rows
    from kizu.evaluation.experiment import command_line
    from kizu.evaluation.pages.html import Page, Section

    shown = differing[:pictures]
    left = len(differing) - len(shown)
    settings = setting_rows(runs)
    return Page(
        title=" | ".join(run.name for run in runs),
        finding=f"The verdicts differ on {terminal.count(len(differing), 'photograph')}.",
        lead=f"{terminal.count(len(runs), 'run')} side by side. A difference within its ± may be chance.",
        sections=[
            Section("Figures", "Each on all of its test photographs.", result_rows(runs)),
            Section("Differences to the first run", WHAT_IS_COMPARED, paired_rows(runs)),
            Section("What was set differently", "" if settings else "Nothing that was written down.", settings),
            Section(
                "Where they differ",
                DISAGREEMENTS + (f" {left:,} more are not shown." if left else "") if differing else "Nowhere.",
                figures=[_figure(runs, item) for item in shown],
            ),
        ],
        command=command_line(),
    )


def _figure(runs: "Sequence[RecordedRun]", item: "Disagreement") -> "Figure":
    from kizu.data import image
    from kizu.data.preprocessing import shown
    from kizu.evaluation.pages.html import Figure

    source = ""
    for run in runs:
        try:
            source = source or image.data_uri(image.small(shown(run.data / item.image)))
        except BadImage:  # moved since, or on another machine
            continue
    lines = [f"{name}: {answer}" for name, answer in _row(runs, item).items() if name not in ("photograph", "is")]
    stops_good = item.defect == "good"
    kind = "" if stops_good else "stop"
    return Figure(source, "Good" if stops_good else item.defect.replace("_", " "), kind, [*lines, item.image])


def _row(runs: "Sequence[RecordedRun]", item: "Disagreement") -> dict[str, str]:
    answers = {
        run.name: "not judged"
        if answer is None or answer.p_value is None
        else f"{answer.verdict}, p {answer.p_value:.3g}"
        for run, answer in zip(runs, item.answers, strict=True)
    }
    return {"photograph": item.image, "is": item.defect, **answers}
