"""Commands about a verdict that is to hold: check, drift, tune."""

import getpass
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kizu.calibration.threshold import by_hand, calibrate, percent
from kizu.cli import terminal
from kizu.cli.models import held
from kizu.cli.options import json_option, quiet_option
from kizu.data import files
from kizu.errors import DataError, OptionError
from kizu.inference.model_folder import model_folder

if TYPE_CHECKING:
    from kizu.calibration.drift import DriftTest
    from kizu.evaluation.operating_point import Costs, OperatingPoint
    from kizu.evaluation.robustness import Outcome
    from kizu.inference.inspector import Inspector

__all__ = ["check", "drift", "tune"]

CHANGED = (
    "Lay new photographs beside old ones: light, lens, place, lot. If the parts are good as they are now, teach the "
    "model with kizu update, or train it again on photographs of today; until then its promise does not hold."
)

CURVE_POINTS = 400  # points of a drawn curve


@click.command()
@click.argument("model")
@click.argument("images", nargs=-1, required=True)
@click.option("--images", "most", default=50, show_default=True, help="Use at most so many, spread over all of them.")
@click.option("--output", metavar="DIR", help="Write check.csv and check.html there.")
@quiet_option
@json_option
def check(model: str, images: tuple[str, ...], most: int, output: str | None, **options: Any) -> None:
    """Will it hold tomorrow? Change good photographs as a camera could, and count false alarms.

    Light, contrast, colour temperature, blur, noise, JPEG, shift, rotation and scale, in steps; the threshold stays.
    The promise is broken where more good parts are stopped than was promised, with 95 % confidence.

    \b
    Example:  kizu check results/project/group/run photos/more_good --output stress
    """
    from kizu import load
    from kizu.evaluation.robustness import check_robustness
    from kizu.inference.batch import image_paths
    from kizu.inference.prediction import Photo

    detector = load(model_folder(model))
    paths = image_paths(images)
    if most < 1:
        raise OptionError("--images must be at least 1")
    chosen = [paths[number * len(paths) // most] for number in range(most)] if len(paths) > most else paths
    quiet = options["quiet"] or options["as_json"]
    with terminal.progress(quiet) as progress:
        outcomes = list(check_robustness(detector, [Photo(path) for path in chosen], progress=progress("Check")))
    known = detector.knows([Photo(path) for path in chosen])
    caveats = [_learned_from(known, len(chosen))] if known else []
    rows = [_outcome_row(outcome) for outcome in outcomes]
    if output:
        files.write_csv(Path(output) / "check.csv", rows[0], [row.values() for row in rows])
        _check_page(Path(output) / "check.html", detector, outcomes, caveats)
    if options["as_json"]:
        terminal.print_json({"finding": _check_finding(outcomes), "caveats": caveats, "steps": rows})
        return
    if not options["quiet"]:
        terminal.print_table(rows)
    click.echo("\n".join(["", _check_finding(outcomes), *caveats]))


@click.command()
@click.argument("model")
@click.argument("images", nargs=-1, required=True)
@click.option("--history", metavar="FILE", help="Go on from this file, and add to it: the test then spans all days.")
@click.option("--alarm", default=0.01, show_default=True, help="Probability of ever a false alarm, at most.")
@click.option("--exit-code", is_flag=True, help="Exit with 3 where something has changed.")
@click.option("--output", metavar="DIR", help="Write drift.csv and drift.html there.")
@quiet_option
@json_option
def drift(
    model: str, images: tuple[str, ...], history: str | None, alarm: float, output: str | None, **options: Any
) -> None:
    """Do recent parts still look like those that set the threshold, and if not, since when?

    Each photograph counts once, in the order of the times that they say they were taken, or else of their names. With
    --history the test goes on where it stopped, and may be looked at every day without crying wolf: however long it
    runs, it raises a false alarm with probability --alarm at most.

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
        raise DataError("This model has no scores of good images to compare with: train it on more images")
    test = DriftTest(detector.calibration_scores, alarm, steps=read_history(history) if history else [])
    before = len(test.steps)
    paths = image_paths(images)
    new = new_in_order(paths, test.steps)
    with terminal.progress(options["quiet"] or options["as_json"]) as progress:
        rows = predict_files(detector, [path for path, _ in new], progress=progress("Drift"))
    for row, (_, digest) in zip(rows, new, strict=True):
        if row.score is not None:
            test.add(row.image, row.score, digest)
        elif not options["as_json"]:
            click.echo(f"error  {row.image}: {row.error}", err=True)
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


@click.command()
@click.argument("model")
@click.argument("good", required=False)
@click.argument("bad", required=False)
@click.option("--miss-cost", default=100.0, show_default=True, help="What a missed defect costs, in false alarms.")
@click.option("--defective", default=0.01, show_default=True, help="Share of the parts that are defective.")
@click.option("--threshold", type=float, help="This threshold instead of the cheapest.")
@click.option("--set", "write", is_flag=True, help="Set the threshold in the model, marked as tuned on labels.")
@click.option("--reset", is_flag=True, help="Back to the threshold from good images alone.")
@click.option("--output", metavar="DIR", help="Write tune.csv and tune.html there.")
@quiet_option
@json_option
def tune(model: str, good: str | None, bad: str | None, output: str | None, **options: Any) -> None:
    """Where defects are known: false alarms against misses, what they cost, and a threshold that suits.

    GOOD and BAD are photographs that the model did not learn from. Nothing changes without --set. Without them,
    --threshold 1.5 --set sets a threshold by hand; the model keeps who did it, when, and what it was before.

    \b
    Example:  kizu tune results/project/group/run checked/good checked/bad --miss-cost 50 --set
    """
    folder = model_folder(model)
    changes = options["write"] or options["reset"]
    with held(folder) if changes else nullcontext():
        if options["reset"]:
            _reset(folder)
        elif good is None and options["threshold"] is not None and options["write"]:
            _set_by_hand(folder, options["threshold"])
        else:
            _tune(folder, good, bad, output, options)


def _reset(folder: Path) -> None:
    from kizu import load

    detector = load(folder)
    grouped = detector.threshold.grouped
    detector.threshold = replace(calibrate(detector.calibration_scores, detector.threshold.rate), grouped=grouped)
    detector.save(folder)
    click.echo(f"{folder}: {detector.threshold.statement}")


def _set_by_hand(folder: Path, value: float) -> None:
    from kizu import load

    detector = load(folder)
    whose = f" by {getpass.getuser()} at {datetime.now().astimezone():%Y-%m-%d %H:%M %z}"
    detector.threshold = by_hand(value, detector.threshold, detector.calibration_scores, whose)
    detector.save(folder)
    click.echo(f"{folder}: {detector.threshold.statement}")


def _tune(folder: Path, good: str | None, bad: str | None, output: str | None, options: dict[str, Any]) -> None:
    from kizu import load
    from kizu.evaluation.operating_point import Costs, cheapest_point, operating_points, point_at, set_operating_point
    from kizu.inference.batch import image_paths, predict_files

    if good is None or bad is None:
        raise OptionError(
            "kizu tune takes a folder of good and one of defective photographs, or --threshold and --set, or --reset"
        )
    if options["miss_cost"] < 0 or not 0 <= options["defective"] <= 1:
        raise OptionError("--miss-cost must not be negative, and --defective is a share between 0 and 1")
    detector = load(folder)
    costs = Costs(options["miss_cost"], options["defective"])
    scores: list[list[float]] = []
    failed = False
    with terminal.progress(options["quiet"] or options["as_json"]) as progress:
        for name, place in (("Good", good), ("Defective", bad)):
            rows = predict_files(detector, image_paths([place]), progress=progress(name))
            scores.append([row.score for row in rows if row.score is not None])
            failed |= any(row.error for row in rows)
            for row in rows:
                if row.error:
                    click.echo(f"error  {row.image}: {row.error}", err=True)
    good_scores, bad_scores = scores
    curve = operating_points(good_scores, bad_scores, costs)
    now = point_at(detector.threshold.value, good_scores, bad_scores, costs)
    chosen = cheapest_point(curve)
    if options["threshold"] is not None:
        chosen = point_at(options["threshold"], good_scores, bad_scores, costs)
    if options["write"]:
        set_operating_point(detector, chosen)
        detector.save(folder)
    _show_trade(detector, curve, chosen, now, (good_scores, bad_scores), costs, output, options)
    if failed:
        click.get_current_context().exit(1)


def _check_finding(outcomes: "Sequence[Outcome]") -> str:
    from kizu.evaluation.robustness import MIN_PHOTOS, first_broken

    if outcomes[0].verdict == "broken":
        return (
            f"The promise does not even hold for these photographs as they are: {outcomes[0].stopped} of "
            f"{outcomes[0].total} good parts are stopped."
        )
    broken = [outcome for outcome in first_broken(outcomes[1:]).values() if outcome]
    if not broken and outcomes[0].total < MIN_PHOTOS:
        return (
            f"The promise is not refuted, but {outcomes[0].total} photographs can hardly refute it: take "
            f"{MIN_PHOTOS} or more."
        )
    if not broken:
        return "The promise holds at every step, as far as so many photographs can tell."
    steps = ", ".join(f"{outcome.corruption} ({outcome.step})" for outcome in broken)
    return f"The promise breaks under {len(broken)} of {len(first_broken(outcomes[1:]))} kinds of change: {steps}."


def _learned_from(known: int, total: int) -> str:
    return (
        f"The model learned from {known} of these {total} photographs. It knows its own images, so the false alarms "
        "among them are too few: use other good photographs."
    )


def _outcome_row(outcome: "Outcome") -> dict[str, str]:
    low, high = outcome.interval
    return {
        "change": outcome.corruption,
        "step": outcome.step or "–",
        "stopped": f"{outcome.stopped} of {outcome.total}",
        "in the long run": f"{percent(low)} to {percent(high)}",
        "promise": outcome.verdict,
    }


def _check_page(path: Path, detector: "Inspector", outcomes: "Sequence[Outcome]", caveats: list[str]) -> None:
    from kizu.evaluation.experiment import command_line
    from kizu.evaluation.html import Page, Section, write
    from kizu.evaluation.robustness import first_broken

    broken = first_broken(outcomes[1:])
    names = list(broken)
    grid = {name: [outcome for outcome in outcomes if outcome.corruption == name] for name in names}
    summary = [
        {
            "change": name,
            "the promise breaks at": found.step if found else "no step tried",
            **{f"step {n}": f"{100 * o.rate:.0f} %" for n, o in enumerate(grid[name], 1)},
        }
        for name, found in broken.items()
    ]
    first = outcomes[0]
    page = Page(
        title="Will it hold tomorrow?",
        finding=_check_finding(outcomes).partition(":")[0].removesuffix(".") + ".",
        lead=(
            f"{first.total} good photographs were changed step by step as a camera, a lamp or a worn fixture could "
            f"change them, and judged at the model's fixed threshold. As they are, {first.stopped} of them are "
            f"stopped; at most {percent(first.promised)} of good parts was promised."
        ),
        caveats=caveats,
        sections=[
            Section(
                "How much of each change it bears",
                "Share of the good photographs that are stopped, step by step from slight to strong. A change that "
                "breaks the promise at an early step is one to keep an eye on: fix the lamp, or the camera, or the "
                "exposure; or let the model learn from photographs that vary so.",
                summary,
            ),
            Section(
                "Every step",
                "“In the long run” is the range of rates that so many photographs support with 95 % confidence. "
                "“Broken” means that even the most favourable of them is above what was promised; “in doubt”, that "
                "more were stopped here than promised, which may be chance.",
                [_outcome_row(outcome) for outcome in outcomes],
            ),
        ],
        command=command_line(),
    )
    write(path, page)


def _drift_page(path: Path, detector: "Inspector", test: "DriftTest") -> None:
    from kizu.evaluation.experiment import command_line
    from kizu.evaluation.html import Page, Section, chart, write

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


def _show_trade(
    detector: "Inspector",
    curve: "Sequence[OperatingPoint]",
    chosen: "OperatingPoint",
    now: "OperatingPoint",
    scores: tuple[Sequence[float], Sequence[float]],
    costs: "Costs",
    output: str | None,
    options: dict[str, Any],
) -> None:
    """Table, JSON, page of what tune found."""
    import numpy as np

    from kizu.evaluation.metrics import presorted_bad, presorted_good
    from kizu.evaluation.operating_point import point_at

    good, bad = (np.array(some, dtype=float) for some in scores)
    pg2, pb2 = presorted_good(good, bad), presorted_bad(good, bad)
    named = {"in use": now, "cheapest" if options["threshold"] is None else "chosen": chosen}
    for share in (0.0, 0.02, 0.05, 0.1):
        lowest = float(np.sort(bad)[int(share * len(bad))])
        named[f"misses ≤ {percent(share)}"] = point_at(float(np.nextafter(lowest, -np.inf)), *scores, costs)
    rows = [_point_row(name, point) for name, point in named.items()]
    sentences = [
        f"While at most 2 % of the defects are missed, {percent(pg2)} of the good parts pass (PG2); while at most 2 % "
        f"of the good parts are stopped, {percent(pb2)} of the defects are (PB2).",
        f"A missed defect costs as much as {costs.miss:g} false alarms; {percent(costs.defective)} of parts have one.",
        detector.threshold.statement
        if options["write"]
        else "Nothing was changed; --set puts the threshold into the model.",
    ]
    if output:
        table = [_point_row("", point) for point in curve]
        files.write_csv(Path(output) / "tune.csv", table[0], [row.values() for row in table])
        thresholds = np.linspace(curve[0].threshold, curve[-1].threshold, CURVE_POINTS)
        drawn = [point_at(float(threshold), *scores, costs) for threshold in thresholds]
        _tune_page(Path(output) / "tune.html", drawn, chosen, now, rows, sentences)
    if options["as_json"]:
        values = {"pg2": pg2, "pb2": pb2, "chosen": vars(chosen), "in_use": vars(now), "set": options["write"]}
        terminal.print_json({**values, "statement": detector.threshold.statement})
        return
    terminal.print_table(rows)
    click.echo("\n" + "\n".join(sentences))


def _point_row(name: str, point: "OperatingPoint") -> dict[str, str]:
    row = {"choice": name} if name else {}
    return row | {
        "threshold": f"{point.threshold:.6g}",
        "false alarms": f"{point.false_alarms} of {point.good}",
        "misses": f"{point.misses} of {point.bad}",
        "cost of 1,000 parts": f"{point.cost:.1f}",
    }


def _tune_page(
    path: Path,
    curve: "Sequence[OperatingPoint]",
    chosen: "OperatingPoint",
    now: "OperatingPoint",
    rows: list[dict[str, str]],
    sentences: Sequence[str],
) -> None:
    from kizu.evaluation.experiment import command_line
    from kizu.evaluation.html import Page, Section, chart, write

    thresholds = [point.threshold for point in curve]
    marks = [(chosen.threshold, "cheapest"), (now.threshold, "in use")]
    charts = [
        chart(
            "What goes wrong",
            "Share of good parts stopped (dark) and of defects missed (orange) ↑. Threshold →",
            thresholds,
            [[point.false_alarm_rate for point in curve], [point.miss_rate for point in curve]],
            per_cent=True,
            down=marks,
        ),
        chart(
            "What it costs",
            "Cost of 1,000 parts ↑. Threshold →",
            thresholds,
            [[point.cost for point in curve]],
            down=marks,
        ),
    ]
    page = Page(
        title="False alarms against misses",
        finding=f"At its cheapest it stops {chosen.false_alarms} of {chosen.good} good parts "
        f"and misses {chosen.misses} of {chosen.bad} defects.",
        lead=" ".join(sentences),
        caveats=[
            "A threshold that was chosen on labelled photographs looks better on them than it is. Judge it on others "
            "before you rely on it."
        ],
        sections=[
            Section("The choices", "Every threshold trades one mistake against the other.", rows, charts),
        ],
        command=command_line(),
    )
    write(path, page)
