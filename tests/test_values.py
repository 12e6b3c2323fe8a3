"""What a program finds: batches of photographs, values to keep, compare, print and hand to other processes."""

import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import kizu
from kizu.detectors import DETECTORS, detector_class
from test_detectors import GOOD, SETTINGS, part

PICTURES = [part(50), part(99, spot=True), part(7)]


@pytest.mark.parametrize("method", DETECTORS)
def test_a_pickled_detector_says_the_same_to_the_bit(method):
    detector = detector_class(method)(**SETTINGS[method]).fit(GOOD)
    again = pickle.loads(pickle.dumps(detector))
    for picture in PICTURES:
        assert again.predict(picture) == detector.predict(picture)
    assert pickle.loads(pickle.dumps(detector.predict(PICTURES[1]))) == detector.predict(PICTURES[1])


def test_a_pickled_exported_model_says_the_same_to_the_bit(exported_folder, tmp_path):
    model = kizu.load(exported_folder)
    (tmp_path / "model").write_bytes(pickle.dumps(model))
    Image.fromarray(PICTURES[1]).save(tmp_path / "1.png")
    other = "import pickle; print(pickle.load(open('model', 'rb')).predict('1.png').score.hex())"
    done = subprocess.run([sys.executable, "-c", other], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == model.predict(PICTURES[1]).score.hex(), done.stderr


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_many_photographs_are_judged_in_their_order(batch_size, patchcore, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    same = kizu.Photo(PICTURES[0])
    photographs = [same, tmp_path / "broken.png", PICTURES[1], same, tmp_path / "none.png", same, {}, PICTURES[2], same]
    outcomes = list(patchcore.predict_many((photograph for photograph in photographs), batch_size=batch_size))
    assert len(outcomes) == len(photographs)
    for photograph, outcome in zip(photographs, outcomes, strict=True):
        if isinstance(outcome, kizu.BadImage):
            assert not isinstance(photograph, np.ndarray | kizu.Photo)
        else:
            assert outcome.score == pytest.approx(patchcore.predict(photograph).score, rel=1e-5)
    assert "is a dict, not a path" in str(outcomes[6])


def test_it_works_on_as_photographs_come(patchcore):
    """A camera's stream has no end: the first is judged long before the last is there."""
    sent = []

    def camera():
        for seed in range(1000):
            sent.append(seed)
            yield part(seed)

    stream = patchcore.predict_many(camera(), batch_size=2)
    assert [next(stream).score for _ in range(3)] and len(sent) < 100


@pytest.mark.parametrize("kind", [torch.uint8, torch.float32])
def test_tensors_are_photographs(kind, patchcore):
    tensor = torch.from_numpy(PICTURES[1]).permute(2, 0, 1)
    tensor = tensor if kind == torch.uint8 else tensor.float() / 255
    assert patchcore.predict(tensor).score == patchcore.predict(PICTURES[1]).score
    assert patchcore.predict(bytearray(buffer := _encoded(PICTURES[1]))) == patchcore.predict(buffer)


def _encoded(picture):
    from kizu.data import image

    return image.encode(picture)


def test_predictions_are_values(patchcore, tmp_path):
    path = tmp_path / "bracket.png"
    path.write_bytes(_encoded(PICTURES[1]))
    one, same, other = patchcore.predict(path), patchcore.predict(path), patchcore.predict(PICTURES[0])
    assert one == same and one != other and one != "one" and len({one, same, other}) == 2
    assert {kizu.Photo(path), kizu.Photo(path)} == {kizu.Photo(path)}
    assert kizu.Photo(PICTURES[0]) == kizu.Photo(PICTURES[0].copy()) != kizu.Photo(PICTURES[1])
    plain = json.loads(json.dumps(one.to_dict()))
    assert plain["verdict"] == "stop" and plain["image"] == str(path) and plain["score"] == one.score
    assert plain["regions"][0]["box"] == list(one.regions[0].box)
    shown = repr(one)
    assert "bracket.png" in shown and "stop" in shown and len(shown) < 200
    picture = one._repr_png_()
    path.unlink()
    assert picture.startswith(b"\x89PNG") and patchcore.predict(PICTURES[0])._repr_png_() and one._repr_png_() is None


def test_what_is_printed_of_models_is_short(patchcore, exported_folder):
    assert repr(kizu.PatchCore(size=64)) == "<PatchCore not fitted, 64×64>"
    for model in (patchcore, kizu.load(exported_folder)):
        assert "of 12 photographs, stops above" in repr(model)
    assert repr(kizu.Photo("a.png")) == "Photo('a.png')"


def test_the_folder_of_a_run_stands_for_its_model(patchcore, tmp_path):
    patchcore.save(tmp_path / "run" / "models" / "bracket")
    assert kizu.load(tmp_path / "run").predict(PICTURES[0]) == patchcore.predict(PICTURES[0])
    patchcore.save(tmp_path / "run" / "models" / "other")
    with pytest.raises(kizu.OptionError, match="holds 2 models"):
        kizu.load(tmp_path / "run")
    with pytest.raises(kizu.ModelError, match=r"model\.json is missing"):
        kizu.load(tmp_path)
