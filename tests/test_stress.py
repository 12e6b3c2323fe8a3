"""Stresses do what they say, and what they show is counted right."""

import numpy as np
import pytest

from kizu.evaluation.robustness import CORRUPTIONS, Corruption, Outcome, first_broken

BY_NAME = {corruption.name: corruption for corruption in CORRUPTIONS}


def photograph(size=(400, 600)):
    y, x = np.mgrid[: size[0], : size[1]]
    grey = 60 + 80 * (np.hypot(y - 200, x - 300) < 100) + x / 20
    return np.stack([grey + 10, grey, grey - 10], axis=2).astype(np.uint8)


@pytest.mark.parametrize("corruption", CORRUPTIONS, ids=lambda corruption: corruption.name)
def test_every_corruption_keeps_shape_and_grows_with_its_steps(corruption: Corruption):
    before = photograph()
    away = []
    for step in corruption.steps:
        after = corruption.apply(before, step, np.random.default_rng(3))
        assert after.shape == before.shape and after.dtype == np.uint8
        away.append(np.abs(after.astype(float) - before).mean())
    assert away[0] > 0 and away == sorted(away)


def test_light_adds_up_as_light_does():
    before = photograph()
    after = BY_NAME["more light"].apply(before, 40, np.random.default_rng(0))
    shown, expected = (after.astype(float) / 255) ** 2.2, 1.4 * (before.astype(float) / 255) ** 2.2
    np.testing.assert_allclose(shown, expected, atol=0.006)


def test_warm_light_is_redder_and_less_blue():
    before = photograph()
    after = BY_NAME["warmer light"].apply(before, -1500, np.random.default_rng(0)).astype(float)
    change = (after - before).mean((0, 1))
    assert change[0] > 3 and abs(change[1]) < 0.5 and change[2] < -3


def test_moves_go_where_they_say():
    before = np.zeros((100, 100, 3), np.uint8)
    before[40:60, 40:60] = 200
    after = BY_NAME["camera nearer"].apply(before, 15, np.random.default_rng(0))
    assert (after[..., 0] > 100).sum() == pytest.approx(400 * 1.15**2, rel=0.1)
    y, x = np.nonzero(BY_NAME["shift"].apply(before, 8, np.random.default_rng(0))[..., 0] > 100)
    assert np.hypot(y.mean() - 49.5, x.mean() - 49.5) == pytest.approx(8, abs=0.5)
    turned = BY_NAME["rotation"].apply(before, 10, np.random.default_rng(0))[..., 0] > 100
    assert turned.sum() == pytest.approx(400, rel=0.1) and turned[50].sum() != turned[41].sum()


def test_verdicts_follow_from_the_numbers():
    def outcome(stopped, total=50, promised=0.02, step="1"):
        return Outcome("blur", step, stopped, total, promised)

    assert [outcome(stopped).verdict for stopped in (0, 1, 2, 3, 4, 50)] == [
        *("holds", "holds", "in doubt", "in doubt", "broken", "broken")
    ]
    assert outcome(0, total=4).verdict == "not refuted" and outcome(4, total=4).verdict == "broken"
    steps = [outcome(0, step="1"), outcome(30, step="2"), outcome(50, step="3")]
    assert first_broken(steps)["blur"].step == "2" and first_broken(steps[:1]) == {"blur": None}
