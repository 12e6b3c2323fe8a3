"""What holds for every registered detector."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import kizu
from kizu.config import CONFIGS
from kizu.detectors import DETECTORS, detector_class
from kizu.inference.prediction import Photo
from teachers import TEACHER

SETTINGS = {
    "patchcore": {"size": 64, "coreset": 0.2},
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
    "puad": {"size": 64, "base_settings": {"coreset": 0.2}},
}
WITH_BACKBONE = [method for method in DETECTORS if "backbone" in CONFIGS[method].model_fields]


def part(seed, spot=False):
    """A grey disc on a dark table, with noise; `spot` puts a bright square on it."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:96, :96]
    disc = 40 + 120 * (np.hypot(y - 48, x - 48) < 36) + rng.normal(0, 4, (96, 96))
    if spot:
        disc[30:42, 50:62] = 250
    return np.repeat(np.clip(disc, 0, 255).astype(np.uint8)[..., None], 3, axis=2)


GOOD = [part(seed) for seed in range(12)]


@pytest.fixture(scope="module", params=DETECTORS)
def fitted(request):
    return detector_class(request.param)(**SETTINGS[request.param]).fit(GOOD)


def test_a_defect_is_found_where_it_is(fitted):
    prediction = fitted.predict(part(99, spot=True))
    score, mask = prediction
    assert score == prediction.score > fitted.predict(part(98)).score
    assert prediction.is_anomalous and score > prediction.threshold
    assert mask.shape == (96, 96) and mask.dtype == np.float32
    peak = np.unravel_index(mask.argmax(), mask.shape)
    assert 26 <= peak[0] <= 46 and 46 <= peak[1] <= 66
    assert prediction.marked[36, 56] and not prediction.marked[5, 5]
    assert prediction.overlay().shape == (96, 96, 3)


def test_one_graph_uint8_in_scores_and_maps_out(fitted):
    batch = np.stack([fitted.preprocessing(part(seed)).transpose(2, 0, 1) for seed in range(3)])
    scores, maps = fitted(batch)
    assert scores.shape == (3,) and maps.shape == (3, 1, *fitted.config.size)
    assert scores.dtype == maps.dtype == np.float32 and np.isfinite(maps).all()


def test_saved_and_loaded_it_gives_bit_identical_scores(fitted, tmp_path):
    loaded = kizu.load(fitted.save(tmp_path / "model"))
    assert type(loaded) is type(fitted) and loaded.config == fitted.config
    assert loaded.threshold == fitted.threshold
    for seed in (1, 50):
        ours, theirs = fitted.predict(part(seed)), loaded.predict(part(seed))
        assert ours.score == theirs.score
        np.testing.assert_array_equal(ours.anomaly_map, theirs.anomaly_map)
        np.testing.assert_array_equal(ours.overlay(), theirs.overlay())


def test_the_same_seed_gives_the_same_files(fitted, tmp_path):
    again = type(fitted)(fitted.config).fit(GOOD)
    one, two = fitted.save(tmp_path / "one"), again.save(tmp_path / "two")
    for name in ("model.safetensors", "model.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()


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


@pytest.mark.parametrize("method", DETECTORS)
@pytest.mark.parametrize("count", [1, 2])
def test_hardly_any_images_give_defined_results(method, count, tmp_path):
    detector = detector_class(method)(**SETTINGS[method]).fit(GOOD[:count])
    assert np.isfinite(detector.predict(GOOD[5]).score)
    assert "good images" in detector.threshold.statement or "nothing is stopped" in detector.threshold.statement
    loaded = kizu.load(detector.save(tmp_path / "model"))
    assert loaded.threshold == detector.threshold
    json.loads((tmp_path / "model" / "model.json").read_text(), parse_constant=pytest.fail)  # plain JSON, no Infinity


@pytest.mark.parametrize("method", DETECTORS)
def test_images_held_out_set_the_threshold_and_teach_nothing(method):
    detector = detector_class(method)(**SETTINGS[method])
    detector.fit(GOOD[:8], held_out=GOOD[8:])
    assert detector.training["images"] == 8 and detector.threshold.count == 4


@pytest.mark.parametrize("method", DETECTORS)
@pytest.mark.parametrize("turned", [False, True])
def test_rectangular_input(method, turned):
    side = max(detector_class(method)(**SETTINGS[method]).config.size)
    size = (side + 32, side) if turned else f"{side}x{side + 32}"
    detector = detector_class(method)(**{**SETTINGS[method], "size": size}).fit(GOOD[:3])
    prediction = detector.predict(part(7, spot=True))
    peak = np.unravel_index(prediction.anomaly_map.argmax(), (96, 96))
    assert 24 <= peak[0] <= 48 and 44 <= peak[1] <= 68


@pytest.mark.parametrize("method", DETECTORS)
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"size": 8}, "--size"),
        ({"size": "big"}, "--size"),
        ({"resize": 100, "size": 128}, "--resize 100"),
        ({"false_alarms": 0}, "--false-alarms"),
        ({"colour": 1}, "--colour is not an option"),
        ({"smoothing": -1}, "--smoothing"),
    ],
)
def test_wrong_settings_are_named(method, settings, words):
    with pytest.raises(kizu.OptionError, match=words):
        detector_class(method)(**settings)


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


def test_what_has_learned_nothing_says_so(tmp_path):
    for method in DETECTORS:
        with pytest.raises(kizu.ModelError, match="fit"):
            detector_class(method)().predict(GOOD[0])
        with pytest.raises(kizu.ModelError, match="fit"):
            detector_class(method)().save(tmp_path / "model")
        with pytest.raises(kizu.DataError, match="no image"):
            detector_class(method)().fit([])


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
