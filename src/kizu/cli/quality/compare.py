"""The command compare: runs side by side."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kizu.cli import terminal
from kizu.cli.options import data_options, json_option, quiet_option, ray_option
from kizu.cli.quality import matrix
from kizu.cli.quality.disagreeing import figure, row
from kizu.errors import OptionError

if TYPE_CHECKING:
    from kizu.evaluation.comparison.runs import Disagreement, RecordedRun
    from kizu.evaluation.pages.html import Page

__all__ = ["compare"]

WHAT_IS_COMPARED = (
    "On the photographs that both judged. AUROC with 95 % confidence (DeLong); of verdicts, how many are stopped by "
    "this run alone (+) and by the first one alone (−), and how likely a difference this large is if both runs "
    "are equally good."
)
DISAGREEMENTS = "Photographs on which the verdicts differ; those first whose p-values are furthest apart."


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN RUN… | DATA…")
@click.option(
    "--methods", metavar="LIST", help="Train these methods, as patchcore,simplenet, on every category of DATA…"
)
@click.option("--seeds", metavar="LIST", help="With --methods: each once for each seed, as in 0-4.  [default: 0]")
@click.option(
    "--setting",
    "settings",
    multiple=True,
    metavar="'NAME=VALUE …'",
    help="With --methods: each with these settings, as 'size=320 false_alarms=0.05'; one alone, as 'patchcore: "
    "coreset=0.05'. Repeatable: each is a variant.",
)
@click.option("--resume", is_flag=True, help="With --methods: fill the gaps of a comparison that was ended, or failed.")
@ray_option
@data_options
@click.option("--pictures", default=48, show_default=True, help="Show this many photographs on the page, at most.")
@click.option(
    "--output",
    metavar="FILE|DIR",
    help="Write a page with the photographs on which the runs differ; with --methods, the folder of all results.",
)
@quiet_option
@json_option
def compare(runs: tuple[str, ...], pictures: int, output: str | None, **options: Any) -> None:
    """Two or more finished runs: figures, what was set differently, and the photographs on which they differ.

    Differences are those to the first run. A difference within its ± may be chance.

    With --methods, every category of DATA… × method × setting × seed is trained and evaluated first: one table with
    mean and spread, and a page. With --ray a cluster does it, a training on each core.

    \b
    Examples:
      kizu compare results/project/group/small results/project/group/large --output compare.html
      kizu compare mvtec/bottle mvtec/screw --methods patchcore,simplenet --seeds 0-4 --output methods
    """
    if options["methods"]:
        matrix.compare_methods(runs, options | {"pictures": pictures, "output": output})
        return
    for name in ("seeds", "settings", "resume", "ray"):
        if options[name] not in (None, (), False):
            raise OptionError(f"--{'setting' if name == 'settings' else name} belongs to --methods")
    _compare_runs(runs, pictures, output, options["quiet"], options["as_json"])


def _compare_runs(runs: tuple[str, ...], pictures: int, output: str | None, quiet: bool, as_json: bool) -> None:
    from kizu.evaluation.comparison.runs import disagreements, paired_rows, read_run, result_rows, setting_rows
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
                "photographs": [row(found, item) for item in differing],
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
    from kizu.evaluation.comparison.runs import paired_rows, result_rows, setting_rows
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
                figures=[figure(runs, item) for item in shown],
            ),
        ],
        command=command_line(),
    )
