"""What holds for every registered detector."""

import shutil
import time
from pathlib import Path

import pytest
from PIL import Image

import kizu
from kizu.config import CONFIGS
from kizu.detectors import DETECTORS, detector_class
from kizu.inference.prediction import Photo
from kizu.testing import CHECKS, Subject, check_export, check_threads
from kizu.testing import photograph as part
from teachers import TEACHER

SETTINGS = {
    "patchcore": {"size": 96, "coreset": 0.2},
    "simplenet": {
        "size": 96,
        "meta_epochs": 40,
        "gan_epochs": 1,
        "batch_size": 2,
        "sampled": 1,
        "dsc_hidden": 128,
        "dsc_lr": 2e-3,
        "seed": 3,
    },
    "efficientad": {"teacher": str(TEACHER), "steps": 4},
    "puad": {"size": 96, "base_settings": {"coreset": 0.2}},
}
WITH_BACKBONE = [method for method in DETECTORS if "backbone" in CONFIGS[method].model_fields]


GOOD = [part(seed) for seed in range(12)]


@pytest.fixture(scope="module", params=DETECTORS)
def subject(request):
    return Subject(detector_class(request.param), SETTINGS[request.param])


@pytest.fixture
def fitted(subject):
    return subject.fitted


@pytest.mark.parametrize("check", [check for check in CHECKS if check is not check_export])  # tests/test_export.py does
def test_each_method_does_what_every_method_promises(subject, check):
    check(subject)


def test_a_graph_that_changes_while_it_is_used_is_found(monkeypatch):
    subject = Subject(kizu.PatchCore, SETTINGS["patchcore"])
    judge = kizu.PatchCore.__call__

    def forgetful(self, images):
        self.images = images
        time.sleep(0.05)
        return judge(self, self.images)

    check_threads(subject)
    monkeypatch.setattr(kizu.PatchCore, "__call__", forgetful)
    with pytest.raises(AssertionError, match="while other threads judge"):
        check_threads(subject)


def test_files_bytes_and_arrays_are_judged_alike(fitted, tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(GOOD[0]).save(path)
    scores = {fitted.predict(source).score for source in (path, str(path), path.read_bytes(), GOOD[0], Photo(path))}
    assert len(scores) == 1


def test_a_bad_photograph_among_many_does_not_stop_the_others(fitted, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no image")
    outcomes = list(fitted.judge([Photo(GOOD[0]), Photo(tmp_path / "bad.png"), Photo(GOOD[1])]))
    kinds = sorted(type(outcome).__name__ for _, outcome in outcomes)
    assert kinds == ["BadImage", "Prediction", "Prediction"]
    with pytest.raises(kizu.BadImage, match=r"bad\.png"):
        fitted.predict(tmp_path / "bad.png")


@pytest.mark.parametrize("method", DETECTORS)
def test_training_stops_with_the_list_of_all_bad_files_or_skips_them(method, tmp_path):
    for number, picture in enumerate(GOOD[:4]):
        Image.fromarray(picture).save(tmp_path / f"{number}.png")
    (tmp_path / "x.png").write_bytes(b"")
    (tmp_path / "y.png").write_bytes(b"no image")
    with pytest.raises(kizu.DataError) as caught:
        detector_class(method)(**SETTINGS[method]).fit(tmp_path)
    assert "x.png" in str(caught.value) and "y.png" in str(caught.value) and "`skip_bad=True`" in str(caught.value)
    assert detector_class(method)(**SETTINGS[method]).fit(tmp_path, skip_bad=True).training["images"] == 4


@pytest.mark.parametrize("method", WITH_BACKBONE)
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"backbone": "resnet19"}, "resnet19"),
        ({"layers": "layer9"}, r"layer9.*blocks\.2"),
        ({"weights": "nowhere.pth"}, "nowhere.pth"),
    ],
)
def test_backbones_and_layers_that_do_not_exist_are_named(method, settings, words):
    with pytest.raises(kizu.KizuError, match=words):
        detector_class(method)(**{**SETTINGS[method], **settings}).fit(GOOD[:2])


@pytest.mark.parametrize("method", [method for method in DETECTORS if method != "patchcore"])
def test_what_a_method_cannot_do_is_a_sentence(method):
    detector = detector_class(method)()
    with pytest.raises(kizu.ModelError, match=f"{method} cannot be updated"):
        detector.update(GOOD)
    with pytest.raises(kizu.ModelError, match=f"{method} cannot be merged"):
        detector.merge([detector, detector])


def test_learning_anew_forgets_the_images_of_before():
    detector = kizu.PatchCore(**SETTINGS["patchcore"], thumbnails=True).fit(GOOD[:4]).fit(GOOD[4:7])
    assert detector.training["images"] == len(detector.thumbnails) == len(detector.good_items) == 3


def test_a_finished_detector_gets_its_threshold_from_other_good_images():
    detector = kizu.SimpleNet(**SETTINGS["simplenet"]).fit(GOOD[:3])
    assert detector.threshold.count == 0
    assert detector.calibrate(GOOD[3:]).threshold.count == len(detector.calibration_scores) == 9
    with pytest.raises(kizu.DataError, match="no photograph"):
        detector.calibrate([])


@pytest.mark.parametrize(
    "fault", ["no folder", "no tensors", "half the tensors", "half the json", "other format", "list"]
)
def test_damaged_models_are_refused_with_a_sentence(fitted, tmp_path, fault):
    model = fitted.save(tmp_path / "model")
    tensors, about = model / "model.safetensors", model / "model.json"
    if fault == "no folder":
        shutil.rmtree(model)
    elif fault == "no tensors":
        tensors.unlink()
    elif fault == "half the tensors":
        tensors.write_bytes(tensors.read_bytes()[: tensors.stat().st_size // 2])
    elif fault == "half the json":
        about.write_text(about.read_text()[:300])
    elif fault == "other format":
        about.write_text(about.read_text().replace('"format": 2', '"format": 99'))
    elif fault == "list":
        about.write_text("[]")
    with pytest.raises(kizu.ModelError, match="model"):
        kizu.load(model)


def test_a_folder_that_is_no_model_is_not_replaced(fitted, tmp_path):
    (tmp_path / "holiday.txt").write_text("keep me")
    with pytest.raises(kizu.ModelError, match="not a kizu model"):
        fitted.save(tmp_path)
    assert (tmp_path / "holiday.txt").exists()


def test_an_interrupted_save_leaves_the_old_model(fitted, tmp_path, monkeypatch):
    model = fitted.save(tmp_path / "model")
    before = {path.name: path.read_bytes() for path in model.iterdir()}

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(fitted), "describe", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fitted.save(model)
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before
    assert [path.name for path in Path(tmp_path).iterdir()] == ["model"]
