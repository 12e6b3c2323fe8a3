"""Verdicts on photographs: promises, evidence, outliers; check, drift and tune from the command line."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

import kizu
from kizu.calibration.threshold import calibrate
from kizu.cli.main import cli
from kizu.evaluation.robustness import CORRUPTIONS, check_robustness
from kizu.inference.prediction import Photo
from processes import kizu as command
from test_cli import FAST, factory, save, table
from test_detectors import part

GOOD = [part(seed) for seed in range(24)]
SETTINGS = {"size": 64, "coreset": 0.2}


@pytest.fixture(scope="module")
def fitted():
    return kizu.PatchCore(**SETTINGS).fit(GOOD)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verdicts")
    for seed in range(24):
        save(folder / "photos" / f"{seed}.png", GOOD[seed])
    kizu.PatchCore(**SETTINGS, thumbnails=True).fit(folder / "photos").save(folder / "model")
    for seed in range(30):
        save(folder / "good" / f"{seed:02}.png", part(200 + seed))
        save(folder / "bad" / f"{seed:02}.png", part(300 + seed, spot=True))
    return folder


def test_a_prediction_has_a_p_value_and_the_regions_that_are_marked(fitted):
    bad, good = fitted.predict(part(99, spot=True)), fitted.predict(part(98))
    assert bad.p_value == 1 / 25 and good.p_value > bad.p_value
    first = bad.regions[0]
    left, top, width, height = first.box
    assert left <= 56 <= left + width and top <= 36 <= top + height
    assert first.peak == pytest.approx(bad.anomaly_map.max()) and first.area <= bad.marked.sum()
    assert sum(region.area for region in bad.regions) == bad.marked.sum()
    assert good.regions == [] or good.anomaly_map.max() > fitted.pixel_threshold


def test_a_promise_that_was_asked_for_is_kept_or_refused_before_any_work(monkeypatch):
    assert kizu.PatchCore(**SETTINGS, false_alarms=0.04).fit(GOOD).threshold.expected == 0.04
    monkeypatch.setattr(kizu.PatchCore, "learn", lambda *_: pytest.fail("it began to learn"))
    with pytest.raises(
        kizu.OptionError,
        match=r"needs 49 good images .* there are 24\. Add 25 more, or give `false_alarms=0.04`, 1 in 25",
    ):
        kizu.PatchCore(**SETTINGS, false_alarms=0.02).fit(GOOD)
    with pytest.raises(kizu.OptionError, match=r"there are 5\. .* 1 in 6"):
        kizu.PatchCore(**SETTINGS, false_alarms=0.04).fit(GOOD, held_out=[part(seed) for seed in range(900, 905)])


def test_the_nearest_good_patch_is_known_by_image_and_place(fitted):
    """Each training image has its own mark somewhere; a patch of it finds that image and that place again."""
    marked = []
    for number, picture in enumerate(GOOD[:6]):
        marked.append(picture.copy())
        marked[-1][40:56, 8 + 12 * number : 24 + 12 * number, number % 3] = 255
    detector = kizu.PatchCore(**SETTINGS, layers=["blocks.2"], sampler="identity").fit(marked)
    for number, picture in enumerate(marked):
        seen = detector.preprocessing(picture)
        x, y = (16 + 12 * number) * 64 / 96, 48 * 64 / 96
        nearest = detector.nearest_good(seen, (x, y))
        assert nearest.number == number and nearest.distance == pytest.approx(0, abs=0.01)
        assert abs(nearest.place[0] * 64 - x) <= 8 and abs(nearest.place[1] * 64 - y) <= 8


def test_a_saved_model_shows_why_and_merging_and_updating_keep_it(trained, tmp_path):
    detector = kizu.load(trained / "model")
    found = detector.predict(trained / "bad" / "00.png").why()
    assert found[0].region == 1 and found[0].match_crop is not None and found[0].nearest.distance > 1
    assert found[0].nearest.image in {f"{seed}.png" for seed in range(24)}
    detector.update([part(seed) for seed in range(60, 64)])
    assert detector.training["images"] == len(detector.training["names"]) == len(detector.thumbnails) == 28
    again = kizu.load(detector.save(tmp_path / "again"))
    assert again.thumbnails == detector.thumbnails and again.picture(27).shape == (64, 64, 3)
    both = kizu.PatchCore.merge([again, again])
    assert len(both.thumbnails) == 56 and both.predict(part(5, spot=True)).why()[0].match_crop is not None


def test_a_defect_among_the_training_images_is_listed_with_its_number(tmp_path):
    detector = kizu.PatchCore(**SETTINGS).fit([*GOOD[:11], part(77, spot=True), *GOOD[11:]])
    listed = [one["number"] for one in detector.training["suspects"]]
    assert listed[0] == 11 and len(listed) <= 8
    again = kizu.load(detector.save(tmp_path / "model"))
    assert again.training["suspects"] == detector.training["suspects"]


def test_check_counts_false_alarms_as_the_detector_makes_them(fitted):
    good = [part(400 + seed) for seed in range(12)]
    noise = [corruption for corruption in CORRUPTIONS if corruption.name == "sensor noise"]
    outcomes = list(check_robustness(fitted, [Photo(picture) for picture in good], noise))
    assert [outcome.step for outcome in outcomes] == ["", "2 levels", "4 levels", "8 levels", "12 levels", "20 levels"]
    assert outcomes[0].stopped == sum(fitted.predict(picture).is_anomalous for picture in good)
    assert outcomes[-1].stopped == 12 and outcomes[-1].verdict == "broken"
    assert outcomes[0].promised == 1 / 25
    learned, new = Photo(GOOD[3]), Photo(good[0])
    assert fitted.known([learned, new]) == [learned]


def test_drift_is_found_in_photographs_and_told_to_people(trained, tmp_path):
    for seed in range(60):
        picture = part(500 + seed).astype(float)
        if seed >= 30:
            picture += np.random.default_rng(seed).normal(0, 12, picture.shape)  # a noisy camera
        save(tmp_path / "parts" / f"{seed:03}.png", np.clip(picture, 0, 255).astype(np.uint8))
    history = tmp_path / "history.csv"
    quiet = command("drift", trained / "model", tmp_path / "parts" / "00*.png", "--history", history)
    assert "No sign of a change in 10 parts" in quiet.stdout
    done = command(
        *("drift", trained / "model", tmp_path / "parts" / "0[1-9]*.png", "--history", history, "--json"),
        *("--output", tmp_path / "page"),
    )
    found = json.loads(done.stdout)
    assert found["alarm"] and 27 <= int(found["since"][-7:-4]) <= 34 and len(found["steps"]) == 50
    told = command("drift", trained / "model", tmp_path / "parts", "--history", history, "--exit-code", code=3)
    assert "kizu update" in told.stdout
    assert len(table(history)) == 60 and "Something has changed" in (tmp_path / "page" / "drift.html").read_text()


def test_tune_shows_the_trade_sets_a_marked_level_and_takes_it_back(trained, tmp_path):
    model = kizu.load(trained / "model").save(tmp_path / "model")
    shown = command("tune", model, trained / "good", trained / "bad", "--output", tmp_path / "page")
    assert "PG2" in shown.stdout and "Nothing was changed" in shown.stdout
    assert kizu.load(model).threshold == kizu.load(trained / "model").threshold
    some = command("tune", model, trained / "photos", trained / "bad")  # which it has learned from
    assert "has learned from 24 of these 24 photographs, and makes fewer mistakes on them" in some.stderr
    values = json.loads(command("tune", model, trained / "good", trained / "bad", "--set", "--json").stdout)
    tuned = kizu.load(model)
    assert tuned.threshold.value == values["chosen"]["threshold"] and values["chosen"]["misses"] == 0
    assert tuned.threshold.statement.startswith("Tuned on labels")
    assert "Tuned on labels" in json.loads((model / "model.json").read_text())["threshold"]["tuned"]
    assert "Tuned on labels" in command("info", model).stdout
    again = command("tune", model, trained / "good", trained / "bad", "--set").stdout
    assert "No threshold is cheaper than the one in use: it stays" in again and "in use, cheapest" in again
    assert kizu.load(model).threshold == tuned.threshold
    assert "At most" in command("tune", model, "--reset").stdout and "can promise" in command("info", model).stdout
    assert kizu.load(model).threshold == calibrate(tuned.calibration_scores, 0.02)
    assert "false alarms" in (tmp_path / "page" / "tune.csv").read_text()


def test_the_nearest_patch_of_a_turned_copy_has_no_place_in_its_photograph():
    turned = [np.rot90(part(seed, spot=seed == 3), 1).copy() for seed in range(12)]
    detector = kizu.PatchCore(size=96, coreset=0.5, rotate_degrees=180.0, thumbnails=True).fit(turned)
    bank, (height, width) = detector.graph.banks[0], detector.graph.grids[0]
    of_copies = bank.places == height * width
    assert bank.places.max() <= height * width and of_copies.any() and not of_copies.all()
    assert bank.images.max() == 11
    seen = [one for seed in range(50, 66) for one in detector.predict(np.rot90(part(seed), seed % 4).copy()).why()]
    for one in seen:
        assert one.match_crop.shape == ((96, 96, 3) if one.nearest.place is None else one.query_crop.shape)
    assert any(one.nearest.place is None for one in seen)


def test_a_model_without_thumbnails_says_that_it_has_no_pictures(trained, tmp_path):
    kizu.PatchCore(**SETTINGS).fit(trained / "photos").save(tmp_path / "plain")
    for model, says in ((trained / "model", False), (tmp_path / "plain", True)):
        done = command("predict", model, trained / "bad" / "00.png", "--why", tmp_path / "why")
        assert ("Train it with --thumbnails" in done.stderr) is says


def test_what_needs_somebody_is_red_on_a_terminal_alone(trained, monkeypatch):
    words = ["predict", str(trained / "model"), str(trained / "bad"), str(trained / "good")]
    runner = CliRunner()
    red = "\x1b[31m\x1b[1mstop \x1b[0m"
    shown = runner.invoke(cli, words, color=True).stdout
    assert shown.count(red) == shown.count("stop") > 0 and "\x1b" not in shown.replace(red, "")
    assert "\x1b" not in runner.invoke(cli, words).stdout
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in runner.invoke(cli, words, color=True).stdout


def test_predict_says_why_and_check_writes_its_page(trained, tmp_path):
    done = command("predict", trained / "model", trained / "bad" / "00.png", "--why", tmp_path / "why", "--json")
    row = json.loads(done.stdout)[0]
    assert row["nearest"][0]["image"].endswith(".png") and row["regions"][0]["contour"]
    assert [path.name for path in (tmp_path / "why").iterdir()] == ["00-why.png"]
    done = command("check", trained / "model", trained / "photos", "--images", 4, "--output", tmp_path / "check")
    assert "has learned from 24 of these 24" in done.stdout
    for seed in (201, 202):
        save(tmp_path / "new" / f"{seed}.png", part(seed))
    some = command("check", trained / "model", trained / "photos", tmp_path / "new", "--images", 2)
    assert "has learned from 24 of these 26 photographs: they were left out" in some.stdout
    rows = table(tmp_path / "check" / "check.csv")
    assert len(rows) == 1 + sum(len(corruption.steps) for corruption in CORRUPTIONS)
    assert "Will the promise hold tomorrow" in (tmp_path / "check" / "check.html").read_text()


def test_train_refuses_what_it_cannot_promise_and_does_without_the_option(tmp_path):
    data = factory(tmp_path / "data") / "disc"
    done = command("train", "patchcore", data, "--output", tmp_path, "--false-alarms", 0.01, *FAST, code=2)
    assert "--false-alarms 0.01 needs 99 good images" in done.stderr and not (tmp_path / "project").exists()
    done = command("train", "patchcore", data, "--output", tmp_path, "-q", *FAST)
    assert "At most 1 in 9 good parts" in done.stdout and "for 1 in 50 add 41 more" in done.stdout
