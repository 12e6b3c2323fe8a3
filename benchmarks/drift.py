"""How soon the drift test finds a change, and how often it finds one where there is none; on simulated scores.

python benchmarks/drift.py      half a minute; writes benchmarks/results/drift.csv

Scores are Gamma(2); 209 are behind the level. A change by s standard deviations comes after 200 parts.
"""

import statistics
from pathlib import Path

import numpy as np

from kizu.calibration.drift import DriftTest
from kizu.cli.terminal import print_table
from kizu.data.files import write_csv

TARGET = Path(__file__).parent / "results" / "drift.csv"
BEFORE, GOOD, DEVIATION = 200, 209, 2**0.5


def main() -> None:
    rows = [row(0.0, alarm, runs=400, parts=600) for alarm in (0.1, 0.01)]
    rows += [row(shift, 0.01, runs=100, parts=600) for shift in (0.5, 1.0, 1.5, 2.0, 3.0)]
    print_table(rows)
    write_csv(TARGET, rows[0], map(dict.values, rows))


def row(shift: float, alarm: float, runs: int, parts: int) -> dict[str, str]:
    tests = [watched(seed, shift, alarm, parts) for seed in range(runs)]
    found = [test for test in tests if test.alarm_at is not None]
    late = [test.alarm_at + 1 - BEFORE for test in found if test.alarm_at is not None]
    off = [abs(test.since - BEFORE) for test in found if test.since is not None]
    return {
        "shift": f"{shift:g}",
        "alarm": f"{alarm:g}",
        "runs": str(runs),
        "alarms": str(len(found)),
        "parts_until_alarm": f"{statistics.median(late):g}" if shift and late else "n/a",
        "dated_off_by": f"{statistics.median(off):g}" if shift and off else "n/a",
    }


def watched(seed: int, shift: float, alarm: float, parts: int) -> DriftTest:
    rng = np.random.default_rng(seed)
    test = DriftTest(rng.gamma(2, size=GOOD).tolist(), alarm, seed)
    scores = rng.gamma(2, size=parts)
    scores[BEFORE:] += shift * DEVIATION
    for number, score in enumerate(scores.tolist()):
        test.add(str(number), score)
    return test


if __name__ == "__main__":
    main()
