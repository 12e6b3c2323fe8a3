"""What a disk, a copy or an editor did to a model is found when it is loaded."""

import json
import random
import shutil
from pathlib import Path

import pytest

import kizu
from kizu.data import files
from kizu.detectors import DETECTORS
from kizu.inference import model_json
from processes import kizu as command
from test_detectors import GOOD, SETTINGS

OLD = Path(__file__).parent / "models_of_0_1"
FLIPS = 100  # of a file
STRANGE = [None, True, -1, 0, 10**30, 1e308, "", "abc", [], {}, [[]], {"a": {"b": []}}, "…"]


QUICK = ("patchcore", "exported")
KINDS = [pytest.param(kind, marks=() if kind in QUICK else pytest.mark.slow) for kind in (*DETECTORS, "exported")]


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    place = tmp_path_factory.mktemp("whole") / request.param
    if request.param == "exported":
        return request.getfixturevalue("exported_folder")
    kind = {cls.method: cls for cls in (kizu.PatchCore, kizu.SimpleNet, kizu.EfficientAD, kizu.PUAD)}[request.param]
    return kind(**SETTINGS[request.param]).fit(GOOD).save(place)


def test_every_flipped_bit_is_found(folder, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(folder, model)
    about = model_json.read(model)
    rng = random.Random(0)
    for path in sorted(model.iterdir()):
        content = path.read_bytes()
        for _ in range(FLIPS):
            at, bit = rng.randrange(len(content)), 1 << rng.randrange(8)
            with path.open("r+b") as file:
                file.seek(at)
                file.write(bytes([content[at] ^ bit]))
            with pytest.raises(kizu.ModelError), model_json.checking(model, about):
                model_json.read(model)
                if path.name == model_json.FILE:
                    pytest.fail(f"bit {bit} of byte {at} of {content[at - 20 : at + 20]!r} was accepted")
            with path.open("r+b") as file:
                file.seek(at)
                file.write(content[at : at + 1])
    assert model_json.check(model)
    path = max(model.glob("model.*"), key=lambda file: file.stat().st_size)
    path.write_bytes(path.read_bytes()[:-1] + b"\0\1"[path.read_bytes()[-1] == 0 :][:1])
    with pytest.raises(kizu.ModelError, match=f"{path.name} is damaged"):
        kizu.load(model)


def leaves(value, path=()):
    yield path
    for key, inner in (
        value.items()
        if isinstance(value, dict)
        else enumerate(value[:2] if value else [])
        if (isinstance(value, list))
        else ()
    ):
        yield from leaves(inner, (*path, key))


@pytest.mark.parametrize("name", ["patchcore", "simplenet"])
def test_edits_of_a_model_without_hashes_are_refused_or_harmless(name, tmp_path):
    """Models of version 0.1 have none: what their model.json says is checked by what it can mean."""
    model = tmp_path / "model"
    shutil.copytree(OLD / name, model)
    text = (model / "model.json").read_text()
    refused = 0
    rng = random.Random(0)
    places = [path for path in leaves(json.loads(text)) if path]
    for path in places:
        about = json.loads(text)
        inner = about
        for key in path[:-1]:
            inner = inner[key]
        if rng.random() < 0.2:
            del inner[path[-1]]
        else:
            inner[path[-1]] = rng.choice(STRANGE)
        (model / "model.json").write_text(json.dumps(about))
        try:
            kizu.load(model).predict(GOOD[0])
        except kizu.ModelError:
            refused += 1
    assert refused > len(places) / 2


@pytest.mark.parametrize("value", ["NaN", '"abc"', "1e9", "null", "-1e9"])
def test_a_threshold_that_the_scores_do_not_give_is_refused(value, tmp_path):
    shutil.copytree(OLD / "patchcore", tmp_path / "model")
    text = (OLD / "patchcore" / "model.json").read_text()
    start = text.index('"value": ') + 9
    (tmp_path / "model" / "model.json").write_text(text[:start] + value + text[text.index(",", start) :])
    assert "damaged" in command("predict", tmp_path / "model", "no.png", code=2).stderr


def test_verify_says_what_it_compared(tmp_path):
    model = kizu.PatchCore(**SETTINGS["patchcore"]).fit(GOOD).save(tmp_path / "model")
    assert "is whole" in command("verify", model).stdout
    assert "before models had hashes" in command("verify", OLD / "patchcore").stdout
    kizu.load(model).save(model, keep_previous=True)
    thumbnails = model / "previous" / "model.safetensors"
    thumbnails.write_bytes(thumbnails.read_bytes()[:-4] + b"\0\1\2\3")
    assert "previous: model.safetensors is damaged" in command("verify", model, code=2).stderr


def test_a_model_of_before_gets_hashes_when_it_is_saved(tmp_path):
    model = kizu.load(OLD / "patchcore").save(tmp_path / "model")
    assert not model_json.check(OLD / "patchcore") and model_json.check(model)
    assert files.json_text({"a": float("inf"), "b": "pr\udcfcf"}, indent=None) == '{"a": null, "b": "pr\\udcfcf"}'
