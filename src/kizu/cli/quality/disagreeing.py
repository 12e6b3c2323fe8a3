"""A photograph on which runs differ: its picture and its row."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kizu.errors import BadImage

if TYPE_CHECKING:
    from kizu.evaluation.comparison.runs import Disagreement, RecordedRun
    from kizu.evaluation.pages.html import Figure

__all__ = ["figure", "row"]


def figure(runs: "Sequence[RecordedRun]", item: "Disagreement") -> "Figure":
    from kizu.data import image
    from kizu.data.preprocessing import shown
    from kizu.evaluation.pages.html import Figure

    source = ""
    for run in runs:
        try:
            source = source or image.data_uri(image.small(shown(run.data / item.image)))
        except BadImage:  # moved since, or on another machine
            continue
    lines = [f"{name}: {answer}" for name, answer in row(runs, item).items() if name not in ("photograph", "is")]
    stops_good = item.defect == "good"
    kind = "" if stops_good else "stop"
    return Figure(source, "Good" if stops_good else item.defect.replace("_", " "), kind, [*lines, item.image])


def row(runs: "Sequence[RecordedRun]", item: "Disagreement") -> dict[str, str]:
    answers = {
        run.name: "not judged"
        if answer is None or answer.p_value is None
        else f"{answer.verdict}, p {answer.p_value:.3g}"
        for run, answer in zip(runs, item.answers, strict=True)
    }
    return {"photograph": item.image, "is": item.defect, **answers}
