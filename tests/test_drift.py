"""The drift test finds a change and does not cry wolf, on scores and on photographs."""

import json

import numpy as np
import pytest
from scipy.stats import binom

from kizu.calibration.drift import DriftTest, read_history, write_history
from kizu.errors import DataError


def scores(seed, count):
    return np.random.default_rng(seed).gamma(2, size=count).tolist()


def watched(calibration, stream, alarm):
    test = DriftTest(calibration, alarm)
    for number, score in enumerate(stream):
        test.add(str(number), score)
    return test


def test_without_a_change_at_most_the_promised_number_of_runs_ever_raise_an_alarm():
    alarms = 0
    for seed in range(50):
        values = scores(seed, 209 + 600)
        alarms += watched(values[:209], values[209:], 0.1).alarm_at is not None
    assert alarms <= binom.ppf(0.99, 50, 0.1)


def test_parts_that_look_better_than_the_good_ones_raise_none():
    assert watched(scores(0, 200), [score * 0.8 for score in scores(1, 600)], 0.1).alarm_at is None


@pytest.mark.parametrize("seed", range(10))
def test_a_change_at_image_200_is_found_and_dated(seed):
    stream = scores(seed, 400)
    stream[200:] = [score + 2 for score in stream[200:]]  # 1.4 standard deviations
    test = watched(scores(100 + seed, 209), stream, 0.01)
    assert 200 <= test.alarm_at < 250 and 185 <= test.since <= 215
    assert "changed" in test.sentence() and f"number {test.since + 1} of 400" in test.sentence()


def test_the_evidence_is_what_fair_bets_on_uniform_p_values_give():
    """One step by hand: the mean of κ p^(κ − 1) over the bets and the stake that is kept."""
    test = DriftTest([1.0, 2.0, 3.0], 0.01)
    step = test.add("a", 2.5)
    assert 1 / 4 <= step.p_value <= 2 / 4  # one of four is above it, itself counts in part
    p = step.p_value
    expected = np.mean([0.85 * p**-0.15, 0.6 * p**-0.4, 0.35 * p**-0.65, 1])
    assert step.evidence == pytest.approx(np.log10(expected))


def test_a_history_goes_on_as_if_it_had_never_stopped(tmp_path):
    calibration, stream = scores(0, 100), scores(1, 60)
    first = watched(calibration, stream[:25], 0.01)
    write_history(tmp_path / "drift.csv", first.steps)
    later = DriftTest(calibration, 0.01, steps=read_history(tmp_path / "drift.csv"))
    for number, score in enumerate(stream[25:], 25):
        later.add(str(number), score)
    assert json.dumps([vars(s) for s in later.steps]) == json.dumps(
        [vars(s) for s in watched(calibration, stream, 0.01).steps]
    )
    assert read_history(tmp_path / "none.csv") == []
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="no history"):
        read_history(tmp_path / "other.csv")
