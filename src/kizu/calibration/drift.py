"""Do recent parts still look like those that set the threshold? A test that may be read after every part, for ever.

Each new score is ranked among all before it, those behind the threshold first. If nothing has changed, these p-values
are independent and uniform, and capital that is bet against that is a martingale: the probability that it ever reaches
1 / a is at most a (Ville). The bets are on small p-values, scores higher than before; a mixture of them that moves a
little of its stake at every part (Herbster and Warmuth, 1998) reacts also after a long quiet time. See Vovk et al.,
"Retrain or not retrain: conformal test martingales for change-point detection", COPA 2021.
"""

import bisect
import csv
import hashlib
import io
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kizu.data import files
from kizu.data.image import taken_at
from kizu.errors import DataError

__all__ = ["DriftTest", "Step", "new_in_order", "read_history", "write_history"]

POWERS = (0.85, 0.6, 0.35)  # κ of the bets κ p^(κ − 1); the remaining bet keeps the stake
SHARED = 0.01  # of the stake that moves to the other bets at every part
MIN_P_VALUE = 1e-12
MAX_BYTES = 10**10  # of a photograph


@dataclass(frozen=True)
class Step:
    """One part of the sequence."""

    image: str
    score: float
    p_value: float  # of its rank among all before it
    evidence: float  # log10 of the capital: 2 is 100 to 1 against "nothing has changed"
    digest: str = ""  # of the photograph's file


@dataclass
class DriftTest:
    """Capital bet against "nothing has changed", part after part. An alarm stays one."""

    calibration: Sequence[float]  # scores of good images, behind the threshold
    alarm: float = 0.01  # probability of ever a false alarm, at most
    seed: int = 0
    steps: list[Step] = field(default_factory=list)

    def __post_init__(self) -> None:
        earlier, self.steps = list(self.steps), []
        self._ranked = sorted(self.calibration)
        self._stakes = np.full(len(POWERS) + 1, 1 / (len(POWERS) + 1))
        self._log_capital = 0.0
        self._rng = np.random.default_rng(self.seed)
        for step in earlier:
            self.add(step.image, step.score, step.digest)

    def add(self, image: str, score: float, digest: str = "") -> Step:
        """Bet on the next part."""
        low, high = bisect.bisect_left(self._ranked, score), bisect.bisect_right(self._ranked, score)
        above, equal = len(self._ranked) - high, high - low
        p = (above + self._rng.random() * (equal + 1)) / (len(self._ranked) + 1)
        bisect.insort(self._ranked, score)
        bets = np.array([power * max(p, MIN_P_VALUE) ** (power - 1) for power in POWERS] + [1.0])
        stakes = self._stakes * bets
        self._log_capital += math.log10(stakes.sum())
        stakes /= stakes.sum()
        self._stakes = (1 - SHARED) * stakes + SHARED / len(stakes)
        step = Step(image, score, p, self._log_capital, digest)
        self.steps.append(step)
        return step

    @property
    def alarm_evidence(self) -> float:
        """log10 of the capital at which an alarm is raised."""
        return -math.log10(self.alarm)

    @property
    def alarm_at(self) -> int | None:
        """The number of the part, from 0, at which the alarm was raised."""
        return next((number for number, step in enumerate(self.steps) if step.evidence >= self.alarm_evidence), None)

    @property
    def since(self) -> int | None:
        """If there was an alarm, the part where the change most likely began: the evidence grew most from there."""
        if self.alarm_at is None:
            return None
        gains = [math.log(0.35 * max(step.p_value, MIN_P_VALUE) ** -0.65) for step in self.steps[: self.alarm_at + 1]]
        gathered = np.cumsum(gains[::-1])[::-1]
        return int(gathered.argmax())

    def sentence(self) -> str:
        """The finding in plain words."""
        count, promise = len(self.steps), f"1 in {round(1 / self.alarm):,}"
        if self.alarm_at is not None and self.since is not None:
            return (
                f"Something has changed, most likely since {self.steps[self.since].image} (number {self.since + 1} of "
                f"{count}); the alarm came at number {self.alarm_at + 1}. Where nothing changes, at most "
                f"{promise} such tests ever raises an alarm."
            )
        strongest = max((step.evidence for step in self.steps), default=0.0)
        return (
            f"No sign of a change in {count} parts: the evidence was never stronger than {_odds(strongest)}, and the "
            f"alarm is at {round(1 / self.alarm):,} to 1."
        )


def read_history(path: str | os.PathLike[str]) -> list[Step]:
    """Read what `write_history` wrote; no file is an empty history. Raises `DataError` for a file of another kind."""
    path = Path(path)
    if not path.exists():
        return []
    try:
        text = path.read_text(encoding="utf-8", errors="surrogateescape")
        rows = csv.DictReader(io.StringIO(text, newline=""))
        return [
            Step(
                files.from_cell(row["image"]),
                float(row["score"]),
                float(row["p_value"]),
                float(row["evidence_log10"]),
                row.get("digest") or "",
            )
            for row in rows
        ]
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except (KeyError, ValueError, TypeError):
        raise DataError(f"{path} is no history of kizu drift: name another file with `history`") from None


def write_history(path: str | os.PathLike[str], steps: Sequence[Step]) -> None:
    """A row a part, in order; written whole or not at all."""
    rows = (
        [step.image, repr(step.score), f"{step.p_value:.6g}", f"{step.evidence:.6g}", step.digest] for step in steps
    )
    files.write_csv(path, ["image", "score", "p_value", "evidence_log10", "digest"], rows)


def new_in_order(paths: Sequence[Path], steps: Sequence[Step]) -> list[tuple[Path, str]]:
    """Photographs that are in no step yet, each once, with the digest of its file, in the order of their taking.

    That is the time that each says in its EXIF data, where all do; otherwise the order of their names, 2 before 10.
    """
    known = {step.digest or step.image for step in steps}  # version 0.1 noted names alone
    new: dict[str, tuple[Path, str]] = {}
    for path in paths:
        digest = _digest(path)
        if known.isdisjoint((digest, str(path)) if digest else ()):
            new.setdefault(digest or str(path), (path, digest))
    times = {path: taken_at(path) for path, _ in new.values()}
    if None in times.values():
        return sorted(new.values(), key=lambda item: _natural(item[0]))
    return sorted(new.values(), key=lambda item: (times[item[0]], *_natural(item[0])))


def _natural(path: Path) -> tuple[Any, ...]:
    """Numbers in names count as numbers."""
    parts = re.split(r"(\d+)", str(path))
    return tuple((0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts if part)


def _digest(path: Path) -> str:
    """Of a file's content, empty where it cannot be read."""
    try:
        files.check_regular(path, MAX_BYTES)
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)).hexdigest()
    except OSError:
        return ""


def _odds(evidence: float) -> str:
    return "1 to 1" if evidence < 0.02 else f"{10**evidence:.2g} to 1" if evidence < 2 else f"{10**evidence:,.0f} to 1"
