"""Cameras of 10, 12 or 14 bits in files of 16: the same verdicts, in every form of a model."""

import base64
import io
import json
import struct
import zlib
from urllib.request import Request, urlopen

import numpy as np
import pytest
from PIL import Image

import kizu
from kizu.data.dataset import find
from kizu.data.inspection import inspect
from kizu.data.preprocessing import BitDepth
from kizu.errors import BadImage
from kizu.inference.prediction import Photo
from processes import kizu as command
from test_detectors import part

SMALL = {"size": 96, "coreset": 0.2}


def stored(seed, bits, spot=False):
    """A part as a camera of so many bits stores it, (96, 96) uint16."""
    return part(seed, spot=spot)[..., 0].astype(np.uint16) << (bits - 8)


def colours_of_16_bits(pixels):
    """An RGB PNG (H, W, 3) of 16 bits a channel, which Pillow does not write."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def eight():
    return kizu.PatchCore(**SMALL).fit([part(seed) for seed in range(12)])


@pytest.mark.parametrize("bits", [10, 12, 14, 16])
@pytest.mark.parametrize("kind", ["array", "png", "tiff"])
def test_the_bits_of_a_camera_are_found_and_change_no_verdict(bits, kind, eight, tmp_path):
    def source(seed, spot=False):
        pixels = stored(seed, bits, spot)
        if kind == "array":
            return pixels
        path = tmp_path / f"{seed}{spot}.{kind}"
        Image.fromarray(pixels).save(path)
        return path

    model = kizu.PatchCore(**SMALL).fit([source(seed) for seed in range(12)])
    assert model.facts.get("bits", 16) == bits
    assert any(f"use {bits}" in remark for remark in model.remarks) == (bits < 16)
    loaded = kizu.load(model.save(tmp_path / "model"))
    for seed in (50, 51):
        for spot in (False, True):
            expected = eight.predict(part(seed, spot=spot))
            found = loaded.predict(source(seed, spot))
            assert found.is_anomalous == expected.is_anomalous == spot
            assert found.score == pytest.approx(expected.score, rel=0.05)
            assert np.median(abs(found.overlay().astype(int) - expected.overlay())) <= 4


def test_another_number_of_bits_is_not_judged_but_a_glare_is():
    model = kizu.PatchCore(**SMALL).fit([stored(seed, 12) for seed in range(12)])
    with pytest.raises(BadImage, match=r"values up to [\d,]+, and the model learned from photographs of up to 4,095"):
        model.predict(stored(50, 16))
    glare = stored(50, 12)
    glare[40:48, 40:48] = 65535
    assert model.predict(glare).is_anomalous
    assert not model.predict(part(51)).is_anomalous  # of 8 bits


def test_signed_values_and_stuck_pixels_change_nothing():
    assert (kizu.Photo(np.full((16, 16), 300, np.int16)).read()[0] == 1).all()
    stuck = np.full((200, 200), 4000, np.uint16)
    stuck[3, 3] = 65535
    assert BitDepth.of([Photo(stuck)]).bits == 12


def test_the_bits_may_be_set_and_then_nothing_is_guessed():
    dark = [stored(seed, 12) for seed in range(12)]
    model = kizu.PatchCore(**SMALL, bits=16).fit(dark, keep_copies=True)
    assert "bits" not in model.facts and model.remarks == []
    assert kizu.PatchCore(**SMALL, bits=14).fit(dark, keep_copies=True).facts["bits"] == 14


def test_colours_whose_lower_bits_are_lost_are_told_of(tmp_path):
    folder = tmp_path / "panel" / "good"
    folder.mkdir(parents=True)
    for seed in range(12):
        pixels = np.repeat(stored(seed, 12)[..., None], 3, axis=2)
        (folder / f"{seed}.png").write_bytes(colours_of_16_bits(pixels))
    assert Photo(folder / "0.png").read()[0].max() < 16
    assert any("colours of 16 bits" in warning for warning in inspect(find(tmp_path / "panel")).warnings)
    assert any("colours of 16 bits" in remark for remark in kizu.PatchCore(**SMALL).fit(folder).remarks)
    bright = np.repeat(stored(0, 16)[..., None], 3, axis=2)
    assert not BitDepth.of([Photo(colours_of_16_bits(bright))]).lost


def test_the_commands_say_and_keep_it(tmp_path):
    folder = tmp_path / "panel" / "good"
    folder.mkdir(parents=True)
    for seed in range(12):
        Image.fromarray(stored(seed, 12)).save(folder / f"{seed}.png")
    Image.fromarray(stored(60, 12, spot=True)).save(tmp_path / "bad.png")
    Image.fromarray(stored(61, 16)).save(tmp_path / "other.png")
    assert "use 12" in command("data", tmp_path / "panel").stdout
    trained = command("train", "patchcore", tmp_path / "panel", "--size", 96, "--output", tmp_path / "r")
    assert "use 12" in trained.stdout + trained.stderr and "--bits" in trained.stdout + trained.stderr
    judged = command("predict", tmp_path / "r/project/group/run", tmp_path / "bad.png", tmp_path / "other.png", code=1)
    assert judged.stdout.startswith("stop") and "other.png: has values up to" in judged.stdout


@pytest.mark.slow
def test_an_exported_model_and_the_server_read_as_many_bits(tmp_path):
    pytest.importorskip("onnxscript")
    from kizu.export import export
    from kizu.inference.exported import load
    from services import serving

    model = kizu.PatchCore(**SMALL).fit([stored(seed, 12) for seed in range(12)])
    folder = export(model, tmp_path / "exported").folder
    Image.fromarray(stored(50, 12, spot=True)).save(tmp_path / "bad.png")
    expected = model.predict(tmp_path / "bad.png")
    assert load(folder).predict(tmp_path / "bad.png").score == pytest.approx(expected.score, rel=1e-4)
    with serving(folder, log=tmp_path / "log") as (_, url):
        content = (tmp_path / "bad.png").read_bytes()
        asked = Request(f"{url}v1/predict?view=true", content, {"Content-Type": "image/png"})
        with urlopen(asked) as response:
            result = json.load(response)["results"][0]
    assert result["score"] == pytest.approx(expected.score, rel=1e-4)
    view = np.asarray(Image.open(io.BytesIO(base64.b64decode(result["view"]))))
    assert view.max() > 200  # and not black
