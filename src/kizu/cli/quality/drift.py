"""The command drift: whether recent parts still look like those that set the threshold."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kizu.cli import terminal
from kizu.cli.options import json_option, quiet_option
from kizu.errors import DataError, OptionError
from kizu.inference.model_folder import model_folder

if TYPE_CHECKING:
    from kizu.calibration.drift import DriftTest
    from kizu.inference.inspector import Inspector

__all__ = ["drift"]

CHANGED = (
    "Lay new photographs beside old ones: light, lens, place, lot. If the parts are good as they are now, teach the "
    "model with kizu update, or train it again on photographs of today; until then its promise does not hold."
)


@click.command()
@click.argument("model")
@click.argument("images", nargs=-1, required=True)
@click.option("--history", metavar="FILE", help="Go on from this file, and add to it: the test then spans all days.")
@click.option("--alarm", default=0.01, show_default=True, help="Highest probability that it ever raises a false alarm.")
@click.option("--exit-code", is_flag=True, help="Exit with 3 where something has changed.")
@click.option("--output", metavar="DIR", help="Write drift.csv and drift.html there.")
@quiet_option
@json_option
def drift(
    model: str, images: tuple[str, ...], history: str | None, alarm: float, output: str | None, **options: Any
) -> None:
    """Do recent parts still look like those that set the threshold, and if not, since when?

    Each photograph counts once, in the order in which they were taken, or of their names where they do not say when.
    With --history the test goes on where it stopped, and may be looked at every day: however long it runs, the
    probability that it ever raises a false alarm is --alarm at most.

    \b
    Example:  kizu drift results/project/group/run today --history drift.csv
    """
    from kizu import load
    from kizu.calibration.drift import DriftTest, new_in_order, read_history, write_history
    from kizu.inference.batch import image_paths, predict_files

    if not 0 < alarm < 1:
        raise OptionError(f"--alarm {alarm}: a probability between 0 and 1")
    detector = load(model_folder(model))
    if len(detector.calibration_scores) < 2:
        raise DataError(
            f"{model}: fewer than two good images set its threshold, too few to compare with. Train it on more images, "
            "or import it with --good"
        )
    test = DriftTest(detector.calibration_scores, alarm, steps=read_history(history) if history else [])
    before = len(test.steps)
    paths = image_paths(images)
    new = new_in_order(paths, test.steps)
    with terminal.progress(options["quiet"] or options["as_json"]) as progress:
        rows = predict_files(detector, [path for path, _ in new], progress=progress("Drift"))
    for row, (_, digest) in zip(rows, new, strict=True):
        if row.score is not None and not row.cannot_judge:
            test.add(row.image, row.score, digest)
        elif not options["as_json"]:
            what = f"error  {row.image}: {row.error}" if row.error else f"left out  {row.image}: {row.cannot_judge}"
            click.echo(what, err=True)
    if history:
        write_history(history, test.steps)
    if output:
        write_history(Path(output) / "drift.csv", test.steps)
        _drift_page(Path(output) / "drift.html", detector, test)
    if options["as_json"]:
        since = None if test.since is None else test.steps[test.since].image
        at = None if test.alarm_at is None else test.steps[test.alarm_at].image
        outcome = {"finding": test.sentence(), "alarm": at is not None, "alarm_at": at, "since": since}
        outcome |= {"new": len(new), "counted_before": len(paths) - len(new)}
        steps = [{"image": s.image, "score": s.score, "p_value": s.p_value, "evidence": s.evidence} for s in test.steps]
        terminal.print_json({**outcome, "steps": steps[before:]})
    else:
        if before or len(new) < len(paths):
            known = terminal.count(len(paths) - len(new), "photograph was", "photographs were")
            click.echo(f"{len(new)} new; {known} counted before, or came twice.")
        click.echo(test.sentence())
        if test.alarm_at is not None:
            click.echo(CHANGED)
    if test.alarm_at is not None and options["exit_code"]:
        click.get_current_context().exit(3)
    if any(row.error for row in rows):
        click.get_current_context().exit(1)


def _drift_page(path: Path, detector: "Inspector", test: "DriftTest") -> None:
    from kizu.evaluation.experiment import command_line
    from kizu.evaluation.pages.html import Page, Section, chart, write

    evidence = [step.evidence for step in test.steps]
    marks = [(float(test.since + 1), "changed since")] if test.since is not None else []
    marks += [(float(test.alarm_at + 1), "alarm")] if test.alarm_at is not None else []
    numbers = [float(number) for number in range(1, len(evidence) + 1)]
    threshold = detector.threshold.value
    charts = (
        [
            chart(
                "Evidence for a change",
                "Powers of ten ↑: 2 is 100 to 1. Part after part →",
                numbers,
                [evidence],
                across=[(test.alarm_evidence, "alarm")],
                down=marks,
            ),
            chart(
                "Scores",
                "How unlike the good parts ↑. Part after part →",
                numbers,
                [[step.score for step in test.steps]],
                across=[(threshold, "stopped above")] if threshold < float("inf") else [],
                down=marks,
            ),
        ]
        if len(numbers) > 1
        else []
    )
    page = Page(
        title="Do recent parts still look like the good ones?",
        finding="Something has changed." if test.alarm_at is not None else "No sign of a change.",
        lead=test.sentence(),
        sections=[
            Section(
                "Part after part",
                "Somebody bets against “nothing has changed”, at fair odds, after every part. While nothing changes, "
                "the capital can hardly grow; when parts score higher than they used to, it grows fast. The line shows "
                "it in powers of ten.",
                charts=charts,
            )
        ],
        command=command_line(),
    )
    write(path, page)
