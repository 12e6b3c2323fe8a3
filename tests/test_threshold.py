"""The level keeps its promise on exchangeable scores, and says what it cannot promise."""

import csv
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta

from kizu.calibration.threshold import Threshold, calibrate, images_needed, interval, p_value, refuse
from kizu.errors import OptionError


@pytest.mark.parametrize("rate", [0.02, 0.05, 0.1])
@pytest.mark.parametrize("count", [60, 209])
def test_good_parts_are_stopped_no_more_often_than_promised(rate, count):
    rng = np.random.default_rng(count)
    shares = []
    for _ in range(400):
        level = calibrate(rng.gamma(2, size=count).tolist(), rate)
        shares.append((rng.gamma(2, size=500) > level.value).mean())
    assert np.mean(shares) <= rate + 3 * np.std(shares) / 20
    assert np.mean(shares) >= rate - 1 / count - 3 * np.std(shares) / 20  # nor is it needlessly timid
    assert 0.9 <= np.mean(np.array(shares) <= level.bound) <= 1.0  # 95 % of the draws


@pytest.mark.parametrize(("rate", "count"), [(0.02, 209), (0.1, 60), (0.01, 240), (0.01, 99)])
def test_the_bound_is_the_quantile_of_the_beta_distribution(rate, count):
    allowed = int(np.floor(rate * (count + 1) + 1e-9))
    threshold = Threshold(1.0, rate, count)
    assert threshold.expected == pytest.approx(allowed / (count + 1)) and threshold.expected <= rate
    assert threshold.bound == pytest.approx(beta.ppf(0.95, allowed, count + 1 - allowed), abs=1e-9)


def test_intervals_are_the_exact_ones():
    assert interval(3, 50) == pytest.approx((beta.ppf(0.025, 3, 48), beta.ppf(0.975, 4, 47)), abs=1e-9)
    assert interval(0, 50) == pytest.approx((0, 1 - 0.025 ** (1 / 50)), abs=1e-9)
    assert interval(50, 50)[1] == 1


def test_the_promise_is_one_sentence_with_all_of_it():
    statement = Threshold(1.0, 0.01, 240).statement
    assert statement.startswith("At most 1 in 100 good parts") and statement.count(". ") == 0
    assert "on average" in statement and "95 % confidence at most 1 in 50" in statement
    assert "photographed like the 240 good images" in statement and "can promise 1 in 241 at best" in statement


def test_too_few_images_give_the_best_they_can_and_say_so():
    threshold = calibrate([3.0, 1.0, 2.0], 0.02)
    assert threshold.value == 3.0
    assert "1 in 50" in threshold.statement and "3 good images" in threshold.statement
    assert (
        threshold.statement.startswith("At most 1 in 4 good parts") and "for 1 in 50 add 46 more" in threshold.statement
    )
    assert calibrate(range(49), 0.02).statement.startswith("At most 1 in 50")


def test_a_rate_in_percent_reads_well():
    statement = calibrate([3.0, 1.0, 2.0], 0.15).statement
    assert statement.startswith("At most 1 in 4 good parts") and statement.endswith("for 15 % add 3 more.")


def test_no_images_stop_nothing():
    threshold = calibrate([], 0.02)
    assert threshold.value == float("inf") and "nothing is stopped" in threshold.statement
    assert p_value(5.0, []) == 1.0


def test_what_cannot_be_carried_is_refused_with_the_number_of_images():
    with pytest.raises(
        OptionError,
        match=r"needs 999 good images .* there are 20\. Add 979 more, or give `false_alarms=0.048`, 1 in 21",
    ):
        refuse(0.001, 20)
    refuse(0.02, 49)
    with pytest.raises(OptionError, match="1 more"):
        refuse(0.02, 48)
    assert [images_needed(rate) for rate in (0.5, 0.1, 0.02, 0.005, 0.003)] == [1, 9, 49, 199, 333]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=60), st.integers(-1, 10), st.floats(0.001, 0.9))
def test_a_p_value_is_small_exactly_where_the_part_is_stopped(good, score, rate):
    if len(good) >= images_needed(rate):
        assert (score > calibrate(good, rate).value) == (p_value(score, good) <= rate + 1e-12)


def test_the_measured_false_alarms_keep_the_promise_and_are_the_published_ones():
    root = Path(__file__).parents[1]
    text = (root / "docs" / "evidence.md").read_text()
    rows = [
        row
        for path in (root / "benchmarks" / "results").glob("false_alarms_*.csv")
        for row in csv.DictReader(path.read_text().splitlines())
        if row["rule"].startswith("kizu") and not row["category"].endswith((", kept", ", each alone"))  # which break it
    ]
    assert rows
    for row in rows:
        carried = 1 / 13 if "× 5" in row["category"] else 0  # twelve parts: what the level promises then
        promised = max(float(row["promised"]), carried)
        assert float(row["false_alarms"]) <= promised + 2 * float(row["standard_error"]), row
        if row["rule"] == "kizu":
            assert f"{100 * float(row['false_alarms']):.1f} %" in text, row
