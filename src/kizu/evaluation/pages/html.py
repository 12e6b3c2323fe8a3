"""Pages of a finding, its charts, tables and pictures, one self-contained HTML file each."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from kizu.data import files
from kizu.errors import require

__all__ = ["Chart", "Figure", "Page", "Section", "chart", "templates", "write"]

ALERTS = ("broken", "alarm")  # cells that stand out


@dataclass(frozen=True)
class Chart:
    """Lines in the unit square, with ticks and rules at their places in it."""

    title: str
    axes: str
    lines: list[str]  # as in an SVG polyline; the first one in the colour of text
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    across: list[tuple[float, str]] = field(default_factory=list)  # rules with their labels
    down: list[tuple[float, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Figure:
    """A picture with what is to be said of it."""

    source: str  # a data URI; empty where there is no picture
    caption: str
    kind: str  # stop, pass: the caption's colour
    lines: Sequence[str]


@dataclass(frozen=True)
class Section:
    heading: str
    text: str
    rows: Sequence[dict[str, Any]] = ()
    charts: Sequence[Chart] = ()
    figures: Sequence[Figure] = ()


@dataclass(frozen=True)
class Page:
    title: str
    finding: str  # the answer, large
    lead: str  # what was done, in a sentence or two
    sections: Sequence[Section]
    command: str
    caveats: Sequence[str] = ()


def templates() -> Any:
    """The environment of the pages' templates. Raises `MissingExtra` without jinja2."""
    jinja2 = require("jinja2")
    return jinja2.Environment(
        loader=jinja2.ChoiceLoader(
            [jinja2.PackageLoader("kizu.evaluation.pages"), jinja2.PackageLoader("kizu.serving", "static")]
        ),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def write(path: str | os.PathLike[str], page: Page) -> None:
    """Render to a file, whole or not at all. Raises `MissingExtra` without jinja2."""
    files.write_text(path, templates().get_template("page.html.j2").render(page=page, ALERTS=ALERTS))


def chart(
    title: str,
    axes: str,
    x: Sequence[float],
    lines: Sequence[Sequence[float]],
    *,
    per_cent: bool = False,
    across: Sequence[tuple[float, str]] = (),
    down: Sequence[tuple[float, str]] = (),
) -> Chart:
    """Lines over the same x, scaled to hold them and the rules; rules outside of x are left out."""
    left, right = min(x), max(x)
    values = [value for line in lines for value in line] + [value for value, _ in across]
    low, high = (0.0, max(values)) if min(values) >= 0 else (min(values), max(values))
    wide, tall = (right - left) or 1.0, (high - low) or 1.0

    def y_label(value: float) -> str:
        return f"{100 * value:g} %" if per_cent else f"{value:g}"

    return Chart(
        title,
        axes,
        [
            " ".join(f"{(a - left) / wide:.4f},{(b - low) / tall:.4f}" for a, b in zip(x, line, strict=True))
            for line in lines
        ],
        [((value - left) / wide, f"{value:g}") for value in _ticks(left, right)],
        [((value - low) / tall, y_label(value)) for value in _ticks(low, high)],
        [((value - low) / tall, label) for value, label in across],
        sorted(((value - left) / wide, label) for value, label in down if left <= value <= right),
    )


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers between two ends."""
    rough = ((high - low) or 1.0) / 5
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next((factor * magnitude for factor in (1, 2, 5) if factor * magnitude >= rough), 10 * magnitude)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{number * step:.6g}") for number in range(first, last + 1)]
