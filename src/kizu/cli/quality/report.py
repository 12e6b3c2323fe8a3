"""The command report: what was judged in a day, on a page."""

from contextlib import ExitStack
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kizu.calibration.threshold import Threshold
from kizu.cli.options import quiet_option
from kizu.errors import DataError, OptionError
from kizu.inference.model_folder import description, model_folder

if TYPE_CHECKING:
    from kizu.evaluation.pages.day import Judged

__all__ = ["report"]

MIN_SCORES = 2  # of good parts, for a comparison


@click.command()
@click.argument("sources", nargs=-1, required=True)
@click.option("--day", metavar="DATE", help="The last day, as 2026-11-27.  [default: the last with a verdict]")
@click.option("--days", default=1, show_default=True, help="This many days; 7 for a week.")
@click.option("--photos", multiple=True, metavar="DIR", help="Look for the photographs here as well. Repeatable.")
@click.option("--model", help="The model that judged: its promise, and whether the parts have changed.")
@click.option("--pictures", default=24, show_default=True, help="Show this many of the stopped parts, at most.")
@click.option("--output", metavar="FILE", default="day.html", show_default=True, help="The page.")
@quiet_option
def report(
    sources: tuple[str, ...],
    day: str | None,
    days: int,
    photos: tuple[str, ...],
    model: str | None,
    pictures: int,
    output: str,
    quiet: bool,
) -> None:
    """A day's verdicts on a page to print: counts, what was stopped, what is doubtful.

    SOURCES are what other commands keep: verdicts.jsonl or the table of kizu watch, the folder of kizu serve --store,
    the table of kizu predict --csv or its JSON. Verdicts without a time are all taken.

    \b
    Example:  kizu report verdicts.jsonl --photos incoming --model results/project/group/run --output today.html
    """
    from kizu.cli.quality.judged import read_judged
    from kizu.evaluation.experiment import command_line
    from kizu.evaluation.pages.day import day_page, drift_of, finding
    from kizu.evaluation.pages.html import write

    if days < 1 or pictures < 0:
        raise OptionError("--days must be at least 1, and --pictures not negative")
    about = description(model_folder(model)) if model else None
    with ExitStack() as opened:
        every = read_judged(sources, photos, opened)
        if not every:
            raise DataError(f"{', '.join(sources)}: there are no verdicts yet")
        last = _date(day) if day else max((entry.time.date() for entry in every if entry.time), default=None)
        first = last and last - timedelta(days=days - 1)
        judged = [e for e in every if e.time is None or (first and last and first <= e.time.date() <= last)]
        if not judged:
            raise DataError(f"{', '.join(sources)}: there are no verdicts between {first} and {last}")
        scores = about["calibration_scores"] if about else []
        page = day_page(
            judged,
            _title(judged, first, last),
            command_line(),
            drift=drift_of(judged, scores) if len(scores) >= MIN_SCORES else None,
            promise=Threshold.from_json(about["threshold"]).statement if about else "",
            max_pictures=pictures,
        )
    write(Path(output), page)
    if not quiet:
        click.echo(f"{page.title}: {finding(judged)}\nPage: {output}")


def _title(judged: "list[Judged]", first: date | None, last: date | None) -> str:
    if first is None or last is None or all(entry.time is None for entry in judged):
        return "What was judged"
    written = f"{last.day} {last:%B %Y}"
    return f"What was judged on {written}" if first == last else f"What was judged in the days to {written}"


def _date(text: str) -> date:
    try:
        return datetime.strptime(text, "%Y-%m-%d").date()
    except ValueError:
        raise OptionError(f"--day {text}: a day as 2026-11-27") from None
