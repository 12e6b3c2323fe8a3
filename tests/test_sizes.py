"""What is too small to matter: rules for marked regions, the score that follows from them, sizes in mm."""

import csv
import json
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

import kizu
from kizu.calibration.sizes import Levels, SizeRule, SizeRules, what_matters
from kizu.config import PatchCoreConfig, Zone
from kizu.data.geometry.measures import extent
from kizu.detectors import DETECTORS, detector_class
from kizu.detectors.loading import load
from kizu.errors import ModelError, OptionError
from kizu.export import export
from kizu.inference.batch import FileVerdict
from kizu.inference.exported import load as load_exported
from processes import kizu as command

SIDE = 128
LEVELS = Levels(-0.2, -0.1)
UNIT = (1.0, 1.0)
EVERYWHERE = np.ones((3, 3))


def part(seed, *spots):
    """A grey part with noise, and darker squares (x, y, side) on it."""
    rng = np.random.default_rng(seed)
    pixels = 150 + rng.normal(0, 4, (SIDE, SIDE, 1)) * np.ones(3)
    for x, y, side in spots:
        pixels[y : y + side, x : x + side] -= 40
    return pixels.clip(0, 255).astype(np.uint8)


GOOD = [part(seed) for seed in range(24)]
LARGE, SMALL = part(100, (40, 40, 48)), part(101, (56, 56, 8))
SETTINGS = {
    "patchcore": {"coreset": 0.2},
    "simplenet": {"gan_epochs": 1, "meta_epochs": 2},
    "efficientad": {"network": "embedded", "steps": 4},
}


def longest_shadow(region, unit):
    """Over sixteen directions."""
    corners = [(y + down, x + right) for y, x in np.argwhere(region) for down in (0, 1) for right in (0, 1)]
    angles = np.arange(16) * math.pi / 16
    shadows = np.array(corners) * unit @ np.array([np.sin(angles), np.cos(angles)])
    return float(np.ptp(shadows, axis=0).max())


def brute_force(values, rule, unit):
    """Level by level: the first with a region too many that is large enough, or holds one that was before."""
    before = []
    for level in sorted(np.unique(values[values > LEVELS.lowest]), reverse=True):
        labels, count = ndimage.label(values >= level, EVERYWHERE)
        large = 0
        for number in range(1, count + 1):
            region = labels == number
            peak = values[region].max()
            share = min(1, 2 * (level - LEVELS.typical) / (peak - LEVELS.typical))
            area = share * region.sum() * unit[0] * unit[1]
            length = math.sqrt(share) * longest_shadow(region, unit)
            enough = area >= rule.min_area * (1 - 1e-9) and length >= rule.min_length * (1 - 1e-9)
            if enough and not any(region[place] for place in before):
                before.append(tuple(np.argwhere(region)[0]))
            large += any(region[place] for place in before)
        if large > rule.max_count:
            return float(level)
    return LEVELS.lowest


rules = st.builds(SizeRule, st.sampled_from([0, 4, 25]), st.sampled_from([0, 5, 9]), st.integers(0, 2))


@settings(deadline=None)
@given(st.integers(0, 10**6), rules, st.sampled_from([UNIT, (0.5, 2.0)]), st.booleans())
def test_the_score_is_the_highest_level_at_which_the_rule_stops_the_part(seed, rule, unit, plateaus):
    values = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(14, 17)), 1).astype(np.float32)
    values = np.round(values * 20) / 20 if plateaus else values
    score = SizeRules([rule], unit, LEVELS).score(values)
    assert score == brute_force(values, rule, unit)
    if rule.max_count == 0 and score > LEVELS.lowest:
        assert not SizeRules([rule], unit, LEVELS).large_enough(values, score).any()
        assert SizeRules([rule], unit, LEVELS).large_enough(values, math.nextafter(score, -1) - 1e-6).any()


def test_regions_that_grew_together_at_the_threshold_are_one():
    values = np.zeros((20, 30), np.float32)
    values[5:9, 5:9], values[5:9, 15:19], values[6:8, 9:15] = 3, 2.5, 1
    rules = SizeRules([SizeRule(4, 0, 1)], UNIT, LEVELS)
    assert rules.score(values) == 2.5
    assert (rules.score(values, 2.0), rules.score(values, 0.5)) == (2.5, 0.5)  # two are marked, and one is


def test_a_zone_with_a_limit_of_its_own_counts_alone():
    values = np.zeros((20, 40), np.float32)
    values[5:8, 5:8], values[5:8, 30:33] = 1, 0.9
    halves = np.repeat([[0] * 20 + [1] * 20], 20, axis=0)
    left, right = (Zone(name=n, rings=(((a, 0), (b, 0), (b, 1)),)) for n, a, b in (("l", 0, 0.5), ("r", 0.5, 1)))
    together = PatchCoreConfig(zones=(left, right), max_count=1)
    assert SizeRules.of(together, UNIT, LEVELS, halves).score(values) == pytest.approx(0.9)
    own = [zone.model_copy(update={"max_count": 1}) for zone in (left, right)]
    apart = SizeRules.of(PatchCoreConfig(zones=tuple(own)), UNIT, LEVELS, halves)
    assert apart.score(values) == LEVELS.lowest
    assert what_matters(together) == "A part is stopped where more than one region is marked."
    assert what_matters(PatchCoreConfig(zones=(left, own[1]), min_area=5)) == (
        "In r, a part is stopped where more than one region of at least 5 px² is marked. Elsewhere, a part is stopped "
        "where a region of at least 5 px² is marked. Smaller ones are shown and stop nothing."
    )


def test_a_wide_blob_takes_no_time():
    rows, columns = np.mgrid[:320, :320]
    blob = (3 * np.exp(-((rows - 160) ** 2 + (columns - 160) ** 2) / 2 / 38**2)).astype(np.float32)
    start = time.perf_counter()
    assert SizeRules([SizeRule(100, 85, 0)], UNIT, Levels(0, 0.1)).score(blob) > 0.1
    assert time.perf_counter() - start < 5


def test_without_a_limit_the_score_is_the_maps_maximum():
    values = np.random.default_rng(0).random((40, 50)).astype(np.float32)
    assert SizeRules([SizeRule()], UNIT, LEVELS).score(values) == values.max()


@settings(deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([UNIT, (0.1, 0.3)]))
def test_lengths_and_widths_are_those_of_all_pairs_of_corners_and_all_directions(seed, unit):
    mask = np.random.default_rng(seed).random((6, 9)) > 0.6
    if not mask.any():
        return
    corners = {(x + right, y + down) for y, x in np.argwhere(mask) for right in (0, 1) for down in (0, 1)}
    points = np.array(sorted(corners)) * np.array([unit[1], unit[0]])
    found = extent(mask, unit)
    assert found.length == pytest.approx(max(np.hypot(*(a - b)) for a in points for b in points))
    angles = np.radians(np.arange(0, 180, 0.25))
    shadows = np.ptp(points @ np.stack([np.cos(angles), np.sin(angles)]), axis=0)
    assert shadows.min() * 0.98 <= found.width <= shadows.min() + 1e-9
    far = math.radians(found.direction)
    assert np.ptp(points @ np.array([math.cos(far), -math.sin(far)])) == pytest.approx(found.length)


def test_directions_run_anticlockwise_from_the_horizontal():
    falling = np.eye(9, dtype=bool)
    assert extent(np.ones((1, 20), bool)).direction in (pytest.approx(2.9, abs=0.1), pytest.approx(177.1, abs=0.1))
    assert extent(falling).direction == pytest.approx(135)
    assert extent(falling[::-1]).direction == pytest.approx(45)


@pytest.fixture(scope="module", params=["patchcore", pytest.param("simplenet", marks=pytest.mark.slow)])
def detector(request):
    settings = {"size": SIDE, "min_area": 32, "pixel_size": 0.1, **SETTINGS[request.param]}
    return detector_class(request.param)(**settings).fit(GOOD)


def test_what_is_too_small_is_shown_and_stops_nothing(detector):
    large, small = detector.predict(LARGE), detector.predict(SMALL)
    assert large.is_anomalous and large.score > large.threshold
    assert [region.matters for region in large.regions][:1] == [True]
    assert not small.is_anomalous
    assert all(not region.matters for region in small.regions)
    assert "of at least 32 mm² is marked. Smaller ones are shown" in " ".join(detector.remarks)
    assert detector.pixel_threshold == detector.threshold.value
    assert len(detector.calibration_scores) == detector.threshold.count


def test_a_part_is_stopped_exactly_where_a_region_that_matters_is_marked(detector):
    photos = [part(200 + n, (30 + n, 40, 4 + 2 * n)) for n in range(8)]
    for prediction in detector.predict_many([*photos, *GOOD[:4]]):
        assert prediction.is_anomalous == any(region.matters for region in prediction.regions)


def test_sizes_are_told_in_millimetres_of_the_photographs_learned_from(detector):
    size = detector.predict(LARGE).regions[0].size
    assert size.unit == "mm" and 4.8 < size.width <= size.length < 14  # a square of 4.8, and the blur of the map
    twice = np.asarray(Image.fromarray(LARGE).resize((2 * SIDE, 2 * SIDE), 0))
    assert detector.predict(twice).regions[0].size.area == pytest.approx(size.area, rel=0.1)
    strong = LARGE.copy()
    strong[40:88, 40:88] //= 2
    assert detector.predict(strong).regions[0].size.length == pytest.approx(size.length, rel=0.2)


@pytest.mark.slow
def test_saved_updated_and_exported_models_judge_alike(detector, tmp_path):
    pytest.importorskip("onnxscript")
    expected = [(p.score, p.is_anomalous) for p in detector.predict_many([LARGE, SMALL, *GOOD[:3]])]
    again = load(detector.save(tmp_path / "model"))
    assert [(p.score, p.is_anomalous) for p in again.predict_many([LARGE, SMALL, *GOOD[:3]])] == expected
    exported = export(again, tmp_path / "exported")
    assert {"p_value", "verdict"}.isdisjoint(exported.export["outputs"])  # they would be of another score
    exported = load_exported(exported.folder, check=None)
    for (score, stopped), prediction in zip(expected, exported.predict_many([LARGE, SMALL, *GOOD[:3]]), strict=True):
        assert prediction.score == pytest.approx(score, rel=1e-4)
        assert prediction.is_anomalous == stopped
    size, expected_size = (model.predict(LARGE).regions[0].size for model in (exported, detector))
    assert size.length == pytest.approx(expected_size.length, rel=0.02)
    if detector.method == "patchcore":
        again.update([part(300 + n) for n in range(6)])
        assert again.predict(LARGE).is_anomalous and not again.predict(SMALL).is_anomalous
        assert again.pixel_threshold == again.threshold.value
        with pytest.raises(ModelError, match="same settings"):
            type(again).merge([detector, kizu.PatchCore(size=SIDE, coreset=0.2).fit(GOOD)])
    with pytest.raises(OptionError, match="no lower than"):
        detector.with_threshold(detector.map_levels.lowest - 1)
    moved = detector.with_threshold(detector.threshold.value + 1)
    assert moved.pixel_threshold == moved.threshold.value
    assert moved.with_threshold(None).threshold == detector.threshold


def test_each_zone_may_have_a_rule_of_its_own():
    left, right = (
        Zone(name=name, rings=(((a, 0), (b, 0), (b, 1), (a, 1)),), min_area=area)
        for name, a, b, area in (("left", 0, 0.5, None), ("right", 0.5, 1, 5000))
    )
    detector = kizu.PatchCore(size=SIDE, coreset=0.2, zones=(left, right), max_count=0).fit(GOOD)
    assert "In right, a part is stopped where a region of at least 5000 px² is marked" in what_matters(detector.config)
    here, there = part(400, (8, 60, 4)), part(400, (116, 60, 4))
    assert detector.predict(here).is_anomalous
    assert not detector.predict(there).is_anomalous


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(set(DETECTORS) - {"puad"}))
def test_every_method_takes_the_rules(method):
    settings = SETTINGS.get(method, {})
    detector = detector_class(method)(size=SIDE, min_length=60, **settings).fit(GOOD)
    assert detector.size_rules.rules == [SizeRule(min_length=60)]
    scores, maps = detector.score_images(np.stack(GOOD[:2]).transpose(0, 3, 1, 2).copy())
    assert (scores <= np.maximum(maps.max((1, 2, 3)), detector.map_levels.lowest)).all()


def test_what_scores_a_photograph_as_a_whole_takes_no_rules():
    with pytest.raises(OptionError, match="marked regions: use patchcore"):
        kizu.PUAD(min_area=10)
    with pytest.raises(OptionError, match="nothing in it matters"):
        kizu.PatchCore(zones=[{"name": "a", "rings": [[(0, 0), (1, 0), (1, 1)]], "ignored": True, "min_area": 3}])


def test_a_model_without_rules_says_nothing_of_them(patchcore):
    assert what_matters(patchcore.config) == ""
    assert patchcore.size_rules is None and "sizes" not in patchcore.facts
    assert what_matters(PatchCoreConfig(max_count=2)) == "A part is stopped where more than 2 regions are marked."


def test_the_commands_take_rules_and_say_sizes(tmp_path):
    for name, photos in {"good": GOOD, "new": [LARGE, SMALL]}.items():
        (tmp_path / name).mkdir()
        for number, photo in enumerate(photos):
            Image.fromarray(photo).save(tmp_path / name / f"{number}.png")
    settings = [f"--size={SIDE}", "--coreset=0.2", "--pixel-size=0.1", "--min-area=30", "--name=a"]
    zones = ["--inspect=top=0%,0% 100%,0% 100%,90% 0%,90%", "--zone-min-length=top=5.5"]
    learned = command("train", "patchcore", tmp_path / "good", *settings, *zones, "--output", tmp_path)
    assert "at least 30 mm² and 5.5 mm in length" in learned.stdout, learned.stderr
    run = tmp_path / "project" / "group" / "a"
    judged = command("predict", run, tmp_path / "new", "--csv", tmp_path / "table.csv")
    assert " mm² at " in judged.stdout and "too small to matter" in judged.stdout
    with (tmp_path / "table.csv").open() as table:
        rows = list(csv.DictReader(table))
    assert float(rows[0]["area"]) >= 30 and rows[0]["unit"] == "mm" and rows[0]["regions"] == "1"
    assert [row["verdict"] for row in rows] == ["stop", "pass"] and rows[1]["regions"] == "0"
    row = json.loads(command("predict", run, tmp_path / "new", "--json").stdout)[0]
    assert row["regions"][0]["size"]["length"] >= 5.5
    assert FileVerdict.from_row({"image": "a", "seconds": 0.1, **row}).regions[0].matters
    assert "at least 30 mm²" in command("info", run).stdout
    wrong = command("train", "patchcore", tmp_path / "good", "--zone-min-area=side=3", *zones, code=2)
    assert "no zone is called side: there are top" in wrong.stderr
