"""The level keeps its promise on exchangeable scores, and says what it cannot promise."""

import numpy as np
import pytest

from kizu.threshold import calibrate


@pytest.mark.parametrize("rate", [0.02, 0.05, 0.1])
@pytest.mark.parametrize("count", [60, 209])
def test_good_parts_are_stopped_no_more_often_than_promised(rate, count):
    rng = np.random.default_rng(count)
    shares = []
    for _ in range(400):
        level = calibrate(rng.gamma(2, size=count).tolist(), rate).value
        shares.append((rng.gamma(2, size=500) > level).mean())
    assert np.mean(shares) <= rate + 3 * np.std(shares) / 20
    assert np.mean(shares) >= rate - 1 / count - 3 * np.std(shares) / 20  # nor is it needlessly timid


def test_too_few_images_give_the_best_they_can_and_say_so():
    threshold = calibrate([3.0, 1.0, 2.0], 0.02)
    assert threshold.value == 3.0
    assert "1 in 50" in threshold.statement and "3 good images" in threshold.statement
    assert "49 good images are needed" in threshold.statement
    assert calibrate(range(49), 0.02).statement.startswith("About 1 in 50")


def test_no_images_stop_nothing():
    threshold = calibrate([], 0.02)
    assert threshold.value == float("inf") and "nothing is stopped" in threshold.statement
