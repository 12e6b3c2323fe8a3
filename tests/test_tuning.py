"""Operating points from labelled scores, and training images that do not belong."""

import getpass
from dataclasses import replace

import numpy as np
import pytest

import kizu
from kizu.calibration.outliers import find_outliers
from kizu.calibration.threshold import Threshold, by_hand, calibrate
from kizu.errors import DataError
from kizu.evaluation.evaluate import ImageScore, Outlier
from kizu.evaluation.operating_point import Costs, about_misses, cheapest_point, operating_points
from processes import kizu as command
from test_report import result


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("costs", [Costs(), Costs(1, 0.5), Costs(1000, 0.01), Costs(2, 0.1)])
def test_no_threshold_is_cheaper_than_the_best(seed, costs):
    rng = np.random.default_rng(seed)
    good, bad = rng.normal(0, 1, 40).round(1), rng.normal(1.5, 1, 25).round(1)
    chosen = cheapest_point(operating_points(good.tolist(), bad.tolist(), costs))
    for level in np.linspace(-5, 6, 2000):
        alarms, missed = (good > level).mean(), (bad <= level).mean()
        cost = 1000 * ((1 - costs.defective) * alarms + costs.defective * costs.miss * missed)
        assert cost >= chosen.cost - 1e-9
    assert chosen.false_alarms == (good > chosen.threshold).sum() and chosen.misses == (bad <= chosen.threshold).sum()


def test_where_nothing_is_mixed_the_level_lies_in_between():
    assert cheapest_point(operating_points([1.0, 2.0], [6.0, 7.0], Costs())).threshold == 4.0
    with pytest.raises(DataError, match="at least one of each"):
        operating_points([1.0], [], Costs())


def test_images_far_above_the_others_are_outliers_the_worst_first():
    rng = np.random.default_rng(0)
    scores = dict(enumerate(rng.normal(1, 0.1, 100).tolist()))
    names = [f"{number}.png" for number in range(100)]
    assert len(find_outliers(scores, names)) <= 2
    scores[7], scores[50] = 2.0, 3.0
    assert [one.name for one in find_outliers(scores, names)][:2] == ["50.png", "7.png"]
    assert find_outliers({0: 1.0, 1: 99.0}, names) == []  # two images say nothing of each other


@pytest.mark.slow
def test_an_exported_model_has_a_threshold_by_hand_too(exported_folder):
    model = kizu.load(exported_folder)
    changed = model.with_threshold(1e6)
    photo = np.zeros((96, 96, 3), np.uint8)
    assert changed._run is model._run and changed.predict(photo).score == model.predict(photo).score
    assert not changed.predict(photo).is_anomalous


def test_a_threshold_by_hand_says_so_and_what_follows(tmp_path, patchcore):
    changed = patchcore.with_threshold(1.5)
    assert changed.threshold.value == 1.5 and patchcore.threshold.value != 1.5 and changed.graph is patchcore.graph
    assert changed.threshold.statement.startswith("The threshold was set to 1.5 by hand; before, it was ")
    assert "of new good parts with 95 % confidence" in changed.threshold.statement
    for nonsense in (float("nan"), float("inf")):
        with pytest.raises(kizu.OptionError, match="finite number"):
            patchcore.with_threshold(nonsense)
    with pytest.raises(kizu.OptionError, match="with_threshold"):
        patchcore.threshold = 1.5
    unknown = by_hand(1.5, Threshold(float("inf"), 0.02, 0), [])
    assert unknown.statement.endswith(
        "before, there was none. The new one will stop an unknown share of new good parts."
    )
    folder = patchcore.save(tmp_path / "model")
    done = command("tune", folder, "--threshold", 1.5, "--set")
    assert f"by hand, by {getpass.getuser()} at 20" in done.stdout and "before" in done.stdout
    assert kizu.load(folder).threshold.value == 1.5 and "by hand, by" in command("info", folder).stdout
    command("tune", folder, "--reset")
    assert kizu.load(folder).threshold == patchcore.threshold


def test_where_many_defects_are_missed_it_says_what_would_stop_more():
    good = [1 + 0.01 * number for number in range(72)] + [3.0]
    defects = [1.6, 1.65, 1.69, 1.72, 1.9, 2.5, 3.5]
    rows = [ImageScore("bad/0.png", "scratch", score) for score in defects] + [ImageScore("good/0.png", "good", 1.695)]
    rows.append(ImageScore("good/1.png", "good", 1.1))
    one = result(rows, calibration_scores=good, threshold=3.0, outliers=[Outlier("good/odd.png", 3.0, "")])
    known, rate, highest = about_misses(one, 0.01)
    assert known == "1 of 7 known defects are stopped. With `auto=True` settings are chosen for these parts."
    level = calibrate(good, 0.05).value
    more = sum(score > level for score in defects)
    assert f"(`false_alarms=0.05`) {more} of 7 would be stopped, and 0 of the 2 good parts" in rate and more == 4
    assert highest.startswith(
        "good/odd.png alone sets the threshold of 3. Without it, the threshold would be about 1.71, and about 4 of 7"
    )
    assert about_misses(replace(one, threshold=1.5), 0.01) == []  # all are stopped
    assert "documentation" in about_misses(replace(one, choice={"rows": []}), 0.01)[0]
