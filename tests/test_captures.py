"""Photographs that no promise covers: each kind is refused with its reason, and good and defective parts are judged."""

import csv
import json

import numpy as np
import pytest
from PIL import Image, ImageFilter

import kizu
from kizu.calibration.captures import Capture, Captures
from kizu.data import dataset
from kizu.data.preprocessing import Preprocessing, batches
from kizu.detectors.loading import load
from kizu.errors import ModelError
from kizu.evaluation.robustness import CORRUPTIONS, check_robustness
from kizu.export import export
from kizu.inference.exported import load as load_exported
from kizu.inference.prediction import Photo
from kizu.inference.verdict import Verdict
from processes import kizu as command

SIZE = 96


def part(seed, spot=False):
    """A light disc on a dark ground, with some noise; a dark spot on it is a defect."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:SIZE, :SIZE]
    pixels = np.where((rows - 46) ** 2 + (columns - 40) ** 2 < 28**2, 170.0, 50.0) + rng.normal(0, 6, (SIZE, SIZE))
    pixels[20:26, :] += 30
    if spot:
        pixels[40:50, 36:46] = 60
    return np.repeat(pixels[..., None], 3, 2).clip(0, 255).astype(np.uint8)


def seen(pixels):
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)), pixels.shape[:2]


GOOD = [part(seed) for seed in range(24)]
BLURRED = np.asarray(Image.fromarray(part(50)).filter(ImageFilter.GaussianBlur(3)))
BAD = {
    "out of focus": BLURRED,
    "too dark": (0.4 * part(51)).astype(np.uint8),
    "too bright": (1.6 * part(52) + 20.0).clip(0, 255).astype(np.uint8),
    "sharper or noisier": (part(53) + np.random.default_rng(0).normal(0, 25, (SIZE, SIZE, 1)))
    .clip(0, 255)
    .astype("u1"),
    "has moved": np.roll(part(54), (14, 10), (0, 1)),
    "something else": np.repeat(np.random.default_rng(1).normal(90, 6, (SIZE, SIZE, 1)), 3, 2)
    .clip(0, 255)
    .astype("u1"),
    "other colours": (part(55) * [1.2, 1.0, 0.7]).astype(np.uint8),
    "wider": np.asarray(Image.fromarray(part(56)).resize((144, 96))),
    "fewer pixels": np.asarray(Image.fromarray(part(57)).resize((40, 40))),
}


def detector_that(answer, **settings):
    return kizu.PatchCore(size=SIZE, coreset=0.2, cannot_judge=answer, **settings).fit(GOOD)


@pytest.fixture(scope="module")
def asking():
    return detector_that("ask")


@pytest.mark.parametrize("reason", BAD)
def test_each_kind_of_bad_capture_has_its_reason(asking, reason):
    prediction = asking.predict(BAD[reason])
    assert prediction.verdict == "ask" and not prediction.is_anomalous
    assert reason in prediction.cannot_judge, prediction.cannot_judge
    assert "of good photographs" in prediction.cannot_judge


def test_good_and_defective_parts_are_judged(asking):
    for seed in range(100, 130):
        assert asking.predict(part(seed)).cannot_judge == ""
    defective = asking.predict(part(131, spot=True))
    assert (defective.cannot_judge, defective.verdict) == ("", "stop")


def test_what_is_done_is_the_users_choice(asking):
    stopping, passing, plain = (detector_that(answer) for answer in ("stop", "pass", None))
    for name, photo in BAD.items():
        assert stopping.predict(photo).is_anomalous, name
        assert not passing.predict(photo).is_anomalous, name
        assert passing.predict(photo).cannot_judge == asking.predict(photo).cannot_judge
        assert plain.predict(photo).cannot_judge == ""
        assert plain.predict(photo).score == passing.predict(photo).score
    assert plain.captures is None and "captures" not in plain.describe()


@pytest.mark.slow
def test_saved_exported_updated_and_merged_models_refuse_alike(asking, tmp_path):
    pytest.importorskip("onnxscript")
    photos = [*BAD.values(), part(60), part(61, spot=True)]
    expected = [Verdict.of("a", prediction, asking) for prediction in asking.predict_many(photos)]
    again = load(asking.save(tmp_path / "model"))
    export(again, tmp_path / "exported")
    exported = load_exported(tmp_path / "exported", check=None)
    for model in (again, exported):
        for one, other in zip(expected, model.predict_many(photos), strict=True):
            told = Verdict.of("a", other, model)
            assert (told.verdict, told.cannot_judge) == (one.verdict, one.cannot_judge)
    darker = [(0.7 * part(200 + n)).astype(np.uint8) for n in range(12)]
    assert "too dark" in again.predict(darker[0]).cannot_judge
    brightness = again.captures.ranges["brightness"]
    again.update([part(199)])  # one like the others changes next to nothing
    assert again.captures.ranges["brightness"] == brightness
    assert "too dark" in again.predict(darker[0]).cannot_judge
    again.update(darker[:10])
    assert again.predict(darker[11]).cannot_judge == ""
    both = kizu.PatchCore.merge([asking, detector_that("ask", seed=1)])
    assert both.predict(BAD["too dark"]).verdict == "ask"


def test_a_damaged_description_is_refused(asking, tmp_path):
    folder = asking.save(tmp_path / "model")
    about = json.loads((folder / "model.json").read_text())
    for key, wrong in {"views": "AAAA", "ranges": {"brightness": [1, 2]}}.items():
        changed = {**about, "captures": {**about["captures"], key: wrong}}
        (folder / "model.json").write_text(json.dumps(changed))
        with pytest.raises(ModelError, match="damaged"):
            load(folder)


def test_of_real_photographs_good_and_defective_ones_are_judged(real_data):
    def photos(kind):
        chosen = [s for s in samples if (s.split == "train") == (kind == "train") and s.is_anomalous == (kind == "bad")]
        for batch in batches(chosen[:80], Preprocessing((160, 160))):
            yield from zip(batch.pixels, batch.shapes, strict=True)

    for category in ("bottle", "pill"):
        samples = dataset.find(real_data / "mvtec_ad" / category).samples
        captures = Captures.learned(Capture.of(*photo) for photo in photos("train"))
        assert not any(captures.reason(*photo) for photo in photos("good"))
        refused = [bool(captures.reason(*photo)) for photo in photos("bad")]
        assert np.mean(refused) <= 0.05
        for pixels, shape in photos("good"):
            assert "too dark" in captures.reason((0.4 * pixels).astype(np.uint8), shape)
            assert captures.reason(np.roll(pixels, (24, -24), (1, 2)), shape)


def test_the_commands_say_and_count_it(tmp_path):
    for name, photos in {"good": GOOD, "new": [part(70), BAD["too dark"], part(71, spot=True)]}.items():
        (tmp_path / name).mkdir()
        for number, photo in enumerate(photos):
            Image.fromarray(photo).save(tmp_path / name / f"{number}.png")
    command(
        "train", "patchcore", tmp_path / "good", f"--size={SIZE}", "--coreset=0.2", "--cannot-judge=ask", "--name=a",
        "--output", tmp_path,
    )  # fmt: skip
    run = tmp_path / "project" / "group" / "a"
    judged = command("predict", run, tmp_path / "new", "--csv", tmp_path / "table.csv")
    assert "it is too dark" in judged.stdout and "1 ask" in judged.stderr
    with (tmp_path / "table.csv").open() as table:
        rows = list(csv.DictReader(table))
    assert [row["verdict"] for row in rows] == ["pass", "ask", "stop"]
    assert rows[1]["cannot_judge"].startswith("it is too dark")
    watched = command(
        "watch", tmp_path / "new", "--model", run, "--once", "--output", tmp_path / "rows.jsonl",
        "--csv", tmp_path / "watch.csv", "--settle=0",
    )  # fmt: skip
    assert "it is too dark" in watched.stdout
    assert "it is too dark" in (tmp_path / "watch.csv").read_text()
    for source in ("rows.jsonl", "watch.csv", "table.csv"):
        command("report", tmp_path / source, "--output", tmp_path / "day.html")
        page = (tmp_path / "day.html").read_text()
        assert "1 photograph could not be judged" in page and "it is too dark" in page, source
    drift = command("drift", run, tmp_path / "new")
    assert "left out" in drift.stderr and "in 2 parts" in drift.stdout
    (tmp_path / "bad").mkdir()
    (tmp_path / "new" / "2.png").rename(tmp_path / "bad" / "2.png")
    tuned = command("tune", run, tmp_path / "new", tmp_path / "bad")
    assert "left out" in tuned.stderr and "it is too dark" in tuned.stderr


def test_what_cannot_be_judged_says_nothing_of_robustness(asking):
    darker = next(corruption for corruption in CORRUPTIONS if corruption.name == "less light")
    outcomes = list(check_robustness(asking, [Photo(photo) for photo in GOOD[:2]], [darker]))
    assert outcomes[0].total == 2
    assert any(outcome.refused == 2 and outcome.verdict == "cannot judge" for outcome in outcomes)
