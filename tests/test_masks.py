"""Masks that look right: each is read as it is meant, or named."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

import kizu
from kizu.data.dataset import find
from kizu.data.masks import read_doubted, read_mask
from processes import kizu as command
from test_detectors import GOOD, SETTINGS, part

REGION = np.zeros((96, 96), bool)
REGION[40:60, 30:75] = True
REGION[10:14, 10:14] = True


def grey(values):
    return Image.fromarray(np.asarray(values, np.uint8))


def palette(colours):
    picture = Image.new("P", REGION.shape)
    picture.putdata(REGION.ravel().astype(int).tolist())
    picture.putpalette(colours + [0] * (768 - len(colours)))
    return picture


def rgba(colour, alpha):
    return Image.merge("RGBA", [grey(np.full(REGION.shape, level)) for level in colour] + [grey(alpha)])


READ = {
    "white on black": (grey(255 * REGION), ".png"),
    "one on zero": (grey(REGION), ".png"),
    "bilevel": (Image.fromarray(REGION), ".png"),
    "16 bits": (Image.fromarray(REGION.astype(np.uint16) * 65535), ".png"),
    "labels 1 and 2": (grey(1 + REGION), ".png"),
    "JPEG": (grey(255 * REGION), ".jpg"),
    "JPEG of labels": (grey(100 * REGION), ".jpg"),
    "palette": (palette([68, 1, 84, 253, 231, 37]), ".png"),
    "palette of black and red": (palette([0, 0, 0, 255, 0, 0]), ".png"),
    "alpha of black": (rgba((0, 0, 0), 255 * REGION), ".png"),
    "alpha of white": (rgba((255, 255, 255), 255 * REGION), ".png"),
    "red": (Image.merge("RGB", [grey(255 * REGION), grey(0 * REGION), grey(0 * REGION)]), ".png"),
    "painted on grey": (Image.merge("RGB", [grey(128 + 127 * REGION), grey(128 - REGION), grey(128 - REGION)]), ".png"),
}
DOUBTED = {
    "inverted": (grey(255 * ~REGION), ".png", "inverted"),
    "inverted JPEG": (grey(255 * ~REGION), ".jpg", "inverted"),
    "everything": (grey(255 + 0 * REGION), ".png", "every pixel"),
    "a photograph": (Image.fromarray(part(np.random.default_rng(0), spot=True)), ".png", "grey levels|every pixel"),
}
NAMES = ["{}_mask.png", "{}.png", "mask_{}.png", "{}.jpg.png", "{}_seg.png", "{}_MASK.PNG", "{}-gt.bmp", "{}_mask.jpg"]


@pytest.mark.parametrize("kind", READ)
def test_masks_are_read_as_they_are_meant(kind, tmp_path):
    picture, suffix = READ[kind]
    picture.save(tmp_path / f"m{suffix}", **({"quality": 75} if suffix == ".jpg" else {}))
    assert (read_mask(tmp_path / f"m{suffix}") == REGION).mean() > (0.995 if suffix == ".jpg" else 0.9999)
    assert read_doubted(tmp_path / f"m{suffix}")[1] == ""


@pytest.mark.parametrize("kind", DOUBTED)
def test_masks_that_cannot_be_meant_so_are_doubted(kind, tmp_path):
    picture, suffix, reason = DOUBTED[kind]
    picture.save(tmp_path / f"m{suffix}")
    assert any(word in read_doubted(tmp_path / f"m{suffix}")[1] for word in reason.split("|"))


def data_set(folder, save, name="{}_mask.png"):
    shutil.rmtree(folder, ignore_errors=True)
    rng = np.random.default_rng(0)
    for place in ("train/good", "test/good", "test/spot", "ground_truth/spot"):
        (folder / place).mkdir(parents=True)
    for number in range(3):
        for place in ("train/good", "test/good", "test/spot"):
            Image.fromarray(part(rng, spot=place == "test/spot")).save(folder / place / f"{number:03}.png")
        save(folder / "ground_truth" / "spot" / name.format(f"{number:03}"))
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_masks_are_found_by_their_names(name, tmp_path):
    found = find(data_set(tmp_path / "part", grey(255 * REGION).save, name))
    assert all(len(sample.masks) == 1 for sample in found.samples if sample.is_anomalous)


def test_what_is_doubted_is_said_by_every_command(tmp_path):
    model = kizu.PatchCore(**SETTINGS["patchcore"]).fit(GOOD).save(tmp_path / "model")
    folder = data_set(tmp_path / "part", grey(255 * ~REGION).save)
    assert "as an inverted mask is" in str(json.loads(command("data", folder, "--json").stdout)["warnings"])
    assert "as an inverted mask is" in command("evaluate", model, folder).stdout
    trained = command("train", "patchcore", folder, "--size", 64, "--output", tmp_path / "results")
    assert "as an inverted mask is" in trained.stdout
    folder = data_set(tmp_path / "arrays", lambda path: np.save(path, REGION), "{}_mask.npy")
    for words in (["data", folder], ["evaluate", model, folder], ["train", "patchcore", folder, "--size", 64]):
        done = command(*words, cwd=tmp_path)
        assert "3 files of ground truth, such as 000_mask.npy, are no images" in done.stdout + done.stderr
