"""A training repeated: with other seeds, or with each part of the good images left out and judged in turn."""

import hashlib
import os
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from kizu.calibration.groups import named
from kizu.config import Config, build
from kizu.data.dataset import Dataset
from kizu.data.layouts.contents import HELD_OUT
from kizu.data.sample import Sample
from kizu.errors import DataError, OptionError
from kizu.evaluation.evaluate import CategoryResult

__all__ = ["Repetition", "repetitions", "seeds_in", "summary_rows"]

METRICS = {"image_auroc": "image AUROC", "pixel_auroc": "pixel AUROC", "au_pro": "AU-PRO"}
MAX_SEEDS = 100


@dataclass(frozen=True)
class Repetition:
    """One of several trainings, and what is added to its name."""

    suffix: str
    config: Config
    data: Dataset


def seeds_in(text: str) -> list[int]:
    """The seeds that a text lists, as in 0-4 or 1,5,7. Raises `OptionError` for any other text."""
    try:
        ranges = [part.split("-") for part in text.split(",")]
        seeds = [seed for first, *last in ranges for seed in range(int(first), int((last or [first])[0]) + 1)]
    except ValueError:
        seeds = []
    if not seeds or len(set(seeds)) < len(seeds) or len(seeds) > MAX_SEEDS or any(len(part) > 2 for part in ranges):
        raise OptionError(f"`seeds={text}`: up to {MAX_SEEDS} different numbers, as in 0-4 or 1,5,7")
    return seeds


def repetitions(
    config: Config, data: Dataset, seeds: Sequence[int], folds: int, group_by: str | None = None
) -> Iterator[Repetition]:
    """A training for each seed and each fold; without any, this one alone.

    With folds, the good images to learn from and to test on are divided evenly, by a hash of their names, photographs
    that belong together (`group_by`) staying together. Each part in turn is for testing, with all defects. Raises
    `DataError` where there are fewer good images than folds.
    """
    every: Sequence[int | None] = seeds or [None]
    for seed in every:
        varied = (
            config if seed is None else build(type(config), {**config.model_dump(exclude_unset=True), "seed": seed})
        )
        for fold in range(max(1, folds)):
            parts = [f"seed-{seed}"] if seed is not None else []
            parts += [f"fold-{fold + 1}"] if folds else []
            yield Repetition("-".join(parts), varied, _folded(data, fold, folds, group_by) if folds else data)


def summary_rows(runs: Sequence[Sequence[CategoryResult]]) -> list[dict[str, str]]:
    """A row a category: mean and standard deviation of the figures over the runs, and all verdicts together."""
    by_category: dict[str, list[CategoryResult]] = defaultdict(list)
    for run in runs:
        for result in run:
            by_category[result.category].append(result)
    return [
        {
            "category": category,
            "runs": str(len(results)),
            **{label: _spread([result.metrics.get(name) for result in results]) for name, label in METRICS.items()},
            "defects stopped": _of_all(results, defective=True),
            "false alarms": _of_all(results, defective=False),
        }
        for category, results in by_category.items()
    ]


def _folded(data: Dataset, fold: int, folds: int, group_by: str | None) -> Dataset:
    """The data set with one part of the good images for testing, and the others to learn from."""
    splits: dict[Sample, str] = {}
    for category in data.categories:
        good = [s for s in data.select(category) if not s.is_anomalous and s.split in ("train", "test")]
        groups = named([sample.path for sample in good], group_by) if group_by else list(range(len(good)))
        members: dict[int, list[Sample]] = defaultdict(list)
        for sample, group in zip(good, groups, strict=True):
            members[group].append(sample)
        if len(members) < folds:
            raise DataError(f"{category}: {len(members)} good parts cannot be divided into {folds} `folds`")
        ordered = sorted(members.values(), key=lambda together: _digest(together[0], data))
        for place, together in enumerate(ordered):
            splits |= dict.fromkeys(together, "test" if place % folds == fold else "train")
    samples = tuple(replace(s, split=splits.get(s, s.split)) for s in data.samples)
    notes = tuple(note for note in data.notes if HELD_OUT not in note)  # of another division
    return replace(
        data, samples=samples, notes=(*notes, f"Part {fold + 1} of {folds} of the good images is for testing.")
    )


def _digest(sample: Sample, data: Dataset) -> bytes:
    return hashlib.blake2b(os.fsencode(sample.name(data.root))).digest()


def _spread(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "n/a"
    return f"{statistics.mean(known):.4f} ± {statistics.stdev(known):.4f}" if len(known) > 1 else f"{known[0]:.4f}"


def _of_all(results: Sequence[CategoryResult], *, defective: bool) -> str:
    stopped = sum(result.count(defective=defective, stopped=True) for result in results)
    return f"{stopped} of {sum(result.count(defective=defective) for result in results)}"
