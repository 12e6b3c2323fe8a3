"""The command check: what a photograph may be changed by until the promise breaks."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kizu.calibration.threshold import percent
from kizu.cli import terminal
from kizu.cli.options import json_option, quiet_option
from kizu.data import files
from kizu.errors import OptionError
from kizu.inference.model_folder import model_folder

if TYPE_CHECKING:
    from kizu.evaluation.robustness import Outcome
    from kizu.inference.inspector import Inspector

__all__ = ["check", "not_learned_from"]


@click.command()
@click.argument("model")
@click.argument("images", nargs=-1, required=True)
@click.option(
    "--images", "most", default=50, show_default=True, help="Use at most this many photographs, spread over all."
)
@click.option("--output", metavar="DIR", help="Write check.csv and check.html there.")
@quiet_option
@json_option
def check(model: str, images: tuple[str, ...], most: int, output: str | None, **options: Any) -> None:
    """Will the promise hold tomorrow? Change good photographs as a camera could, and count false alarms.

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
    if most < 1:
        raise OptionError("--images must be at least 1")
    new, caveats = not_learned_from(detector, image_paths(images))
    chosen = [Photo(path) for path in ([new[n * len(new) // most] for n in range(most)] if len(new) > most else new)]
    quiet = options["quiet"] or options["as_json"]
    with terminal.progress(quiet) as progress:
        outcomes = list(check_robustness(detector, chosen, progress=progress("Check")))
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
            f"Nothing here speaks against the promise, but {outcomes[0].total} photographs are too few to test it: "
            f"take {MIN_PHOTOS} or more."
        )
    if not broken:
        doubts = sum(outcome.verdict == "in doubt" for outcome in outcomes)
        steps = f"; {doubts} of the steps {'is' if doubts == 1 else 'are'} in doubt" if doubts else ""
        return f"No step breaks the promise, as far as {outcomes[0].total} photographs can tell{steps}."
    steps = ", ".join(f"{outcome.corruption} ({outcome.step})" for outcome in broken)
    return f"The promise breaks under {len(broken)} of {len(first_broken(outcomes[1:]))} kinds of change: {steps}."


def not_learned_from(detector: "Inspector", paths: list[Path]) -> tuple[list[Path], list[str]]:
    """The photographs that a model did not learn from, or all where it knows all; and what is to be said of that."""
    from kizu.inference.prediction import Photo

    photos = {Photo(path): path for path in paths}
    known = {*detector.known(photos)}
    others = [path for photo, path in photos.items() if photo not in known]
    learned = f"The model has learned from {len(known)} of these {len(paths)} photographs"
    if known and others:
        return others, [f"{learned}: they were left out."]
    if known:
        return paths, [f"{learned}, and makes fewer mistakes on them than on others: use other photographs."]
    return paths, []


def _outcome_row(outcome: "Outcome") -> dict[str, str]:
    low, high = outcome.interval
    return {
        "change": outcome.corruption,
        "step": outcome.step or "–",
        "stopped": f"{outcome.stopped} of {outcome.total}"
        + (f", {outcome.refused} cannot be judged" if outcome.refused else ""),
        "stopped in the long run": f"{percent(low)} to {percent(high)}",
        "promise": outcome.verdict,
    }


def _check_page(path: Path, detector: "Inspector", outcomes: "Sequence[Outcome]", caveats: list[str]) -> None:
    from kizu.evaluation.experiment import command_line
    from kizu.evaluation.pages.html import Page, Section, write
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
        title="Will the promise hold tomorrow?",
        finding=_check_finding(outcomes).partition(":")[0].removesuffix(".") + ".",
        lead=(
            f"{first.total} good photographs were changed step by step as a camera, a lamp or a worn fixture could "
            f"change them, and judged at the model's fixed threshold. As they are, {first.stopped} of them are "
            f"stopped; at most {percent(first.promised)} of good parts was promised."
        ),
        caveats=caveats,
        sections=[
            Section(
                "How much of each change the model bears",
                "Share of the good photographs that are stopped, step by step from slight to strong. A change that "
                "breaks the promise at an early step is one to keep an eye on: fix the lamp, or the camera, or the "
                "exposure; or let the model learn from photographs that vary so.",
                summary,
            ),
            Section(
                "Every step",
                "“In the long run” is the range of rates that this many photographs support with 95 % confidence. "
                "“Broken” means that even the most favourable of them is above what was promised; “in doubt”, that "
                "more were stopped here than promised, which may be chance.",
                [_outcome_row(outcome) for outcome in outcomes],
            ),
        ],
        command=command_line(),
    )
    write(path, page)
