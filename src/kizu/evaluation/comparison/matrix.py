"""Every category × method × setting × seed: one run each, one table of means and spreads, one page.

A cell is a run's folder, <output>/<data>/<category>/<method and setting>/seed-<seed>. What is finished there is taken
as it is, what was interrupted is gone on with, so that a matrix that was killed is filled by the same call.
"""

import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from kizu.config import Config, build
from kizu.data import files
from kizu.data.dataset import Dataset
from kizu.data.progress import Progress, silent
from kizu.errors import KizuError, OptionError
from kizu.evaluation import experiment
from kizu.evaluation.comparison.runs import METRICS, RecordedRun, read_run
from kizu.evaluation.run_folder import Run

__all__ = [
    "Cell",
    "Outcome",
    "begin",
    "carry_out",
    "cell_rows",
    "cells_of",
    "one_after_another",
    "side_by_side_rows",
    "summary_rows",
    "write_tables",
]

FAILED = "failed"


@dataclass(frozen=True)
class Cell:
    """One training and its evaluation."""

    data: Dataset  # of one category
    method: str
    setting: str  # as in "size=320 coreset=0.05"; empty: the method's defaults
    config: Config  # with the seed
    folder: Path  # of the run
    fingerprint: str  # of the photographs

    @property
    def category(self) -> str:
        return self.data.categories[0]

    @property
    def seed(self) -> int:
        return self.config.seed

    @property
    def variant(self) -> str:
        """The method with its setting."""
        return f"{self.method} {self.setting}".strip()


@dataclass(frozen=True)
class Outcome:
    """What became of a cell."""

    cell: Cell
    problem: str = ""  # why it has no run

    @property
    def run(self) -> RecordedRun | None:
        return None if self.problem else read_run(self.cell.folder, self.cell.variant)


def cells_of(
    data: Sequence[Dataset], methods: Sequence[str], settings: Sequence[str], seeds: Sequence[int], output: Path
) -> list[Cell]:
    """The cells, category by category. Raises `OptionError` for what cannot be compared, before any work."""
    from kizu.detectors import config_class

    names = [one.root.resolve().name for one in data]
    if len(set(names)) < len(names):
        raise OptionError(f"two data sets are called {max(names, key=names.count)}: rename the folder of one of them")
    configs = [
        (method, setting, build(config_class(method), {**_values(setting), "seed": seed}))
        for method in dict.fromkeys(methods)
        for setting in _settings_of(method, methods, settings)
        for seed in seeds
    ]
    cells = []
    for name, whole in zip(names, data, strict=True):
        for category in whole.categories:
            one = replace(whole, samples=tuple(whole.select(category)))
            if not one.select(split="train"):
                continue
            mark = experiment.fingerprint(one.samples)
            for method, setting, config in configs:
                variant = re.sub(r"[^\w.,@=-]+", "-", f"{method} {setting}".strip())
                folder = output / name / files.short_name(category) / files.short_name(variant) / f"seed-{config.seed}"
                cells.append(Cell(one, method, setting, config, folder, mark))
    if not cells:
        raise OptionError("none of the data sets holds training images of good parts")
    return cells


def _settings_of(method: str, methods: Sequence[str], settings: Sequence[str]) -> list[str]:
    """Those that are for every method, and those that begin with this one's name; the defaults if there are none."""
    chosen = []
    for setting in settings:
        name, colon, values = setting.partition(":")
        if not (colon and name.strip() in methods):
            chosen.append(setting.strip())
        elif name.strip() == method:
            chosen.append(values.strip())
    return list(dict.fromkeys(chosen)) or [""]


def _values(setting: str) -> dict[str, str]:
    pairs = [word.partition("=") for word in setting.split()]
    if any(not (name and equals) for name, equals, _ in pairs):
        raise OptionError(f"`setting={setting}`: names and values, as in size=320 coreset=0.05")
    return {name.replace("-", "_"): value for name, _, value in pairs}


def begin(cells: Sequence[Cell], output: Path, resume: bool) -> list[Cell]:
    """The cells that are not finished. Raises `OptionError` where there is something else in their places."""
    if not resume and output.exists() and any(output.iterdir()):
        raise OptionError(f"{output} exists: choose another `output`, or fill its gaps with `resume=True`")
    return [cell for cell in cells if not _is_finished(cell)]


def _is_finished(cell: Cell) -> bool:
    if not (cell.folder / "run.json").exists() or Run(cell.folder).unfinished.exists():
        return False
    about = read_run(cell.folder, cell.variant).about
    if about.get("config") != cell.config.model_dump(mode="json") or about.get("data_hash") != cell.fingerprint:
        raise OptionError(f"{cell.folder} is of other photographs or settings: choose another `output`")
    return True


def carry_out(cell: Cell, progress: Progress = silent) -> Outcome:
    """Train and evaluate one cell, from where it was interrupted. Whatever goes wrong is its outcome."""
    if _is_finished(cell):
        return Outcome(cell)
    options = experiment.RunOptions(name=cell.folder.name, resume=True)
    try:
        experiment.train(
            cell.method, cell.config, cell.data, cell.folder.parent, options, progress=lambda category: progress
        )
    except KizuError as error:
        return Outcome(cell, str(error))
    except Exception as error:  # of a method from elsewhere, or of a GPU without memory: the other cells go on
        return Outcome(cell, f"{type(error).__name__}: {error}")
    return Outcome(cell)


def one_after_another(cells: Iterable[Cell], progress: Progress = silent) -> Iterator[Outcome]:
    """Each cell in turn, on this machine."""
    return (carry_out(cell, progress) for cell in cells)


@dataclass
class _Figures:
    """What the runs of one row say."""

    metrics: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in METRICS})
    stopped: dict[bool, list[int]] = field(default_factory=lambda: {True: [0, 0], False: [0, 0]})  # by: is it good
    runs: int = 0
    failed: int = 0

    def row(self) -> dict[str, str]:
        return {
            "runs": f"{self.runs}" + (f" ({self.failed} {FAILED})" if self.failed else ""),
            **{label: _spread(self.metrics[name]) for name, label in METRICS.items()},
            "defects stopped": "{} of {}".format(*self.stopped[False]),
            "false alarms": "{} of {}".format(*self.stopped[True]),
        }


def summary_rows(outcomes: Sequence[Outcome]) -> list[dict[str, str]]:
    """Mean and standard deviation over the seeds: a row for each category and method, and each method's mean over all.

    The spread of a mean over categories is that of the seeds' means. Rows and figures do not depend on the order in
    which cells were finished.
    """
    categories = list(dict.fromkeys(_place(outcome.cell) for outcome in outcomes))
    variants = list(dict.fromkeys(outcome.cell.variant for outcome in outcomes))
    rows = []
    for category in categories:
        for variant in variants:
            chosen = [o for o in outcomes if (_place(o.cell), o.cell.variant) == (category, variant)]
            rows.append({"category": category, "method": variant, **_figures(chosen).row()})
    if len(categories) > 1:
        for variant in variants:
            rows.append(
                {"category": "mean", "method": variant, **_means([o for o in outcomes if o.cell.variant == variant])}
            )
    return rows


def side_by_side_rows(outcomes: Sequence[Outcome]) -> list[dict[str, str]]:
    """The image AUROC: a row a category, a column a method."""
    label = METRICS["image_auroc"]
    rows: dict[str, dict[str, str]] = {}
    for row in summary_rows(outcomes):
        rows.setdefault(row["category"], {"category": row["category"]})[row["method"]] = row[label]
    return list(rows.values())


def _place(cell: Cell) -> str:
    """The category, and the data set's name where that says more."""
    name = cell.data.root.resolve().name
    return cell.category if name == cell.category else f"{name}/{cell.category}"


def _figures(outcomes: Sequence[Outcome]) -> _Figures:
    figures = _Figures()
    for outcome in outcomes:
        run = outcome.run
        if run is None:
            figures.failed += 1
            continue
        figures.runs += 1
        result = next(iter(run.results.values()))
        for name, values in figures.metrics.items():
            if result.get(name) not in (None, "", "n/a"):
                values.append(float(result[name]))
        for image in run.images.values():
            if image.verdict != "error":
                figures.stopped[image.is_good][0] += image.verdict == "stop"
                figures.stopped[image.is_good][1] += 1
    return figures


def _means(outcomes: Sequence[Outcome]) -> dict[str, str]:
    """Of each seed the mean over the categories; of these mean and spread."""
    whole = _figures(outcomes)
    for name in METRICS:
        by_seed = []
        for seed in dict.fromkeys(outcome.cell.seed for outcome in outcomes):
            values = _figures([outcome for outcome in outcomes if outcome.cell.seed == seed]).metrics[name]
            by_seed += [statistics.mean(values)] if values else []
        whole.metrics[name] = by_seed
    return whole.row()


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "n/a"
    return f"{statistics.mean(values):.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")


def cell_rows(outcomes: Sequence[Outcome]) -> list[dict[str, str]]:
    """A row a cell: its figures, where its run is, or why there is none."""
    rows = []
    for outcome in outcomes:
        cell, figures = outcome.cell, _figures([outcome])
        rows.append(
            {
                "category": _place(cell),
                "method": cell.method,
                "setting": cell.setting,
                "seed": str(cell.seed),
                **{name: f"{values[0]:.6f}" if values else "n/a" for name, values in figures.metrics.items()},
                "misses": str(figures.stopped[False][1] - figures.stopped[False][0]) if figures.runs else "n/a",
                "false_alarms": str(figures.stopped[True][0]) if figures.runs else "n/a",
                "run": "" if outcome.problem else str(cell.folder),
                "error": outcome.problem,
            }
        )
    return rows


def write_tables(output: Path, outcomes: Sequence[Outcome], spelled: Callable[[str], str] = str) -> None:
    """matrix.csv with means and spreads, cells.csv with a row a cell."""
    for name, rows in (("matrix.csv", summary_rows(outcomes)), ("cells.csv", cell_rows(outcomes))):
        table = [[spelled(value) if key == "error" else value for key, value in row.items()] for row in rows]
        files.write_csv(output / name, rows[0], table)
