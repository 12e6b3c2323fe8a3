"""The command tune: where defects are known, a threshold that suits; or one set by hand."""

import getpass
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kizu.calibration.threshold import percent
from kizu.cli import terminal
from kizu.cli.models import held
from kizu.cli.options import json_option, quiet_option
from kizu.cli.quality.check import not_learned_from
from kizu.data import files
from kizu.errors import OptionError
from kizu.inference.model_folder import model_folder

if TYPE_CHECKING:
    from kizu.evaluation.operating_point import Costs, OperatingPoint
    from kizu.inference.inspector import Inspector

__all__ = ["tune"]

LOOKS_BETTER = "A threshold that was chosen on labelled photographs looks better on them than it is."
CURVE_POINTS = 400  # points of a drawn curve


@click.command()
@click.argument("model")
@click.argument("good", required=False)
@click.argument("bad", required=False)
@click.option("--miss-cost", default=100.0, show_default=True, help="What a missed defect costs, in false alarms.")
@click.option("--defective", default=0.01, show_default=True, help="Share of the parts that are defective.")
@click.option("--threshold", type=float, help="This threshold instead of the cheapest.")
@click.option("--set", "write", is_flag=True, help="Set the threshold in the model, which then says how it was set.")
@click.option("--reset", is_flag=True, help="Back to the threshold from good images alone.")
@click.option("--output", metavar="DIR", help="Write tune.csv and tune.html there.")
@quiet_option
@json_option
def tune(model: str, good: str | None, bad: str | None, output: str | None, **options: Any) -> None:
    """Where defects are known: false alarms against misses, what they cost, and a threshold that suits.

    GOOD and BAD are photographs that the model did not learn from. Only --set and --reset change the model.
    Without GOOD and BAD, --threshold 1.5 --set sets a threshold by hand; the model keeps who set it, when, and the
    one before.

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

    detector = load(folder).with_threshold(None)
    detector.save(folder)
    click.echo(f"{folder}: {detector.threshold.statement}")


def _set_by_hand(folder: Path, value: float) -> None:
    from kizu import load

    detector = load(folder).with_threshold(value, set_by=getpass.getuser())
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
    caveats: list[str] = []
    failed = False
    with terminal.progress(options["quiet"] or options["as_json"]) as progress:
        for name, place in (("Good", good), ("Defective", bad)):
            paths, remarks = not_learned_from(detector, image_paths([place]))
            caveats += remarks
            rows = predict_files(detector, paths, progress=progress(name))
            scores.append([row.score for row in rows if row.score is not None and not row.cannot_judge])
            failed |= any(row.error for row in rows)
            for row in rows:
                if row.error:
                    click.echo(f"error  {row.image}: {row.error}", err=True)
                elif row.cannot_judge:
                    click.echo(f"left out  {row.image}: {row.cannot_judge}", err=True)
    good_scores, bad_scores = scores
    curve = operating_points(good_scores, bad_scores, costs)
    now = point_at(detector.threshold.value, good_scores, bad_scores, costs)
    chosen = cheapest_point(curve)
    if options["threshold"] is not None:
        chosen = point_at(options["threshold"], good_scores, bad_scores, costs)
    elif now.cost <= chosen.cost + 1e-9:
        chosen = now  # whose promise is worth more than a threshold that is as cheap
    if options["write"] and chosen is not now:
        set_operating_point(detector, chosen)
        detector.save(folder)
    for caveat in caveats:
        click.echo(f"Note: {caveat}", err=True)
    _show_trade(detector, curve, chosen, now, (good_scores, bad_scores), costs, output, options)
    if failed:
        click.get_current_context().exit(1)


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
    name = "cheapest" if options["threshold"] is None else "chosen"
    named = {"in use, " + name: now} if chosen is now else {"in use": now, name: chosen}
    for share in (0.1, 0.05, 0.02, 0.0):
        lowest = float(np.sort(bad)[int(share * len(bad))])
        point = point_at(float(np.nextafter(lowest, -np.inf)), *scores, costs)
        if point not in named.values():
            named[f"misses ≤ {percent(share)}"] = point
    rows = [_point_row(name, point) for name, point in named.items()]
    sentences = [
        f"With at most 2 % of the defects missed, {percent(pg2)} of the good parts pass (PG2). With at most 2 % of the "
        f"good parts stopped, {percent(pb2)} of the defects are stopped (PB2). Both lie between two thresholds.",
        f"A missed defect costs as much as {costs.miss:g} false alarms; {percent(costs.defective)} of the parts are "
        "defective.",
        _what_was_done(detector, chosen is now, options["write"]),
    ]
    if output:
        table = [_point_row("", point) for point in curve]
        files.write_csv(Path(output) / "tune.csv", table[0], [row.values() for row in table])
        thresholds = np.linspace(curve[0].threshold, curve[-1].threshold, CURVE_POINTS)
        drawn = [point_at(float(threshold), *scores, costs) for threshold in thresholds]
        _tune_page(Path(output) / "tune.html", drawn, name, chosen, now, rows, sentences)
    if options["as_json"]:
        values = {"pg2": pg2, "pb2": pb2, "chosen": vars(chosen), "in_use": vars(now), "set": options["write"]}
        terminal.print_json({**values, "statement": detector.threshold.statement})
        return
    terminal.print_table(rows)
    click.echo("\n" + "\n".join([*sentences, LOOKS_BETTER]))


def _what_was_done(detector: "Inspector", as_it_was: bool, write: bool) -> str:
    if as_it_was:
        return "No threshold is cheaper than the one in use: it stays, and so does its promise."
    return detector.threshold.statement if write else "Nothing was changed; --set puts the threshold into the model."


def _point_row(name: str, point: "OperatingPoint") -> dict[str, str]:
    row = {"choice": name} if name else {}
    return row | {
        "threshold": f"{point.threshold:.6g}",
        "false alarms": f"{point.false_alarms} of {point.good}",
        "misses": f"{point.misses} of {point.bad}",
        "cost of 1,000 parts, in false alarms": f"{point.cost:.1f}",
    }


def _tune_page(
    path: Path,
    curve: "Sequence[OperatingPoint]",
    name: str,
    chosen: "OperatingPoint",
    now: "OperatingPoint",
    rows: list[dict[str, str]],
    sentences: Sequence[str],
) -> None:
    from kizu.evaluation.experiment import command_line
    from kizu.evaluation.pages.html import Page, Section, chart, write

    thresholds = [point.threshold for point in curve]
    marks = [(chosen.threshold, name), (now.threshold, "in use")]
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
            "Cost of 1,000 parts, in false alarms ↑. Threshold →",
            thresholds,
            [[point.cost for point in curve]],
            down=marks,
        ),
    ]
    page = Page(
        title="False alarms against misses",
        finding=f"The {name} threshold stops {chosen.false_alarms} of {chosen.good} good parts "
        f"and misses {chosen.misses} of {chosen.bad} defective ones.",
        lead=" ".join(sentences),
        caveats=[f"{LOOKS_BETTER} Judge it on others before you rely on it."],
        sections=[
            Section("The choices", "Every threshold trades one mistake against the other.", rows, charts),
        ],
        command=command_line(),
    )
    write(path, page)
