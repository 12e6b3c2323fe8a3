"""Photographs of one part count once: for the promise, and for the test of drift."""

import io
import json
import os

import numpy as np
import pytest
from PIL import Image

import kizu
from kizu.calibration.copies import first_of_each_part
from kizu.calibration.drift import Step, new_in_order
from kizu.data.preprocessing import digests
from kizu.detectors.stack import Stack
from processes import kizu as command
from services import encoded, small_model
from test_detectors import GOOD, SETTINGS, part


def varied(rgb, how, rng):
    """The same part again: saved, scaled, lit or moved as cameras and programs do."""
    height, width = rgb.shape[:2]
    photo = Image.fromarray(rgb)
    if how == "saved":
        saved = io.BytesIO()
        photo.save(saved, "JPEG", quality=60)
        return np.asarray(Image.open(saved))
    if how == "scaled":
        return np.asarray(photo.resize((width * 7 // 10, height * 7 // 10), Image.Resampling.LANCZOS))
    if how == "lit":
        return np.clip(rgb * 1.04, 0, 255).astype(np.uint8)
    if how == "noisy":
        return np.clip(rgb + rng.normal(0, 5, rgb.shape), 0, 255).astype(np.uint8)
    moved = np.roll(rgb, (2, 1), (0, 1)) * 1.02 + rng.normal(0, 4, rgb.shape)
    return np.clip(moved, 0, 255).astype(np.uint8)


def pixels(rgb):
    return np.asarray(Image.fromarray(rgb).resize((320, 320), reducing_gap=3.0)).transpose(2, 0, 1)


@pytest.mark.parametrize("how", ["saved", "scaled", "lit", "noisy", "moved"])
def test_copies_of_real_parts_are_found_and_different_parts_are_not(how, real_data):
    rng = np.random.default_rng(0)
    rgbs = [
        np.asarray(Image.open(path).convert("RGB")) for path in sorted(real_data.glob("full_resolution/*good*.png"))
    ]
    parts = [pixels(rgb) for rgb in rgbs]
    assert first_of_each_part(parts) == list(range(len(parts)))
    copies = [pixels(varied(rgb, how, rng)) for rgb in rgbs]
    assert first_of_each_part(parts + copies) == 2 * list(range(len(parts)))


CATEGORIES = ["mvtec_ad/bottle", "mvtec_ad/pill", "mvtec_ad/transistor", "mvtec_loco/juice_bottle"]


@pytest.mark.parametrize("category", CATEGORIES)
def test_hardly_any_good_parts_of_a_data_set_are_taken_for_one_another(category, real_data):
    paths = sorted((real_data / category / "train" / "good").iterdir())[:120]
    found = first_of_each_part(pixels(np.asarray(Image.open(path).convert("RGB"))) for path in paths)
    assert sum(number != first for number, first in enumerate(found)) <= 1


def test_each_part_counts_once_for_the_promise(real_data, tmp_path):
    paths = sorted((real_data / "magnetic_tile" / "train" / "good").iterdir())[:240:20]
    folder = tmp_path / "tiles"
    folder.mkdir()
    for path in paths:
        for copy in range(5):
            Image.open(path).convert("RGB").save(folder / f"{path.stem}-{copy}.jpg", quality=95 - 10 * copy)
    words = ("train", "patchcore", folder, "--size", 64, "--coreset", 0.1, "--output", tmp_path)
    done = command(*words)
    assert f"48 of {5 * len(paths)} photographs show the same part" in done.stdout and "1 in 13" in done.stdout
    about = json.loads((tmp_path / "project/group/run/models/tiles/model.json").read_text())
    assert (about["threshold"]["count"], about["training"]["images"]) == (12, 12)
    report = (tmp_path / "project/group/run/report.html").read_text()
    assert "With --keep-copies they are kept" in report and "keep_copies=True" not in report
    again = command("update", tmp_path / "project/group/run", folder, code=2).stderr
    assert "has learned from all of these images already" in again
    assert "the 60 good images that set the threshold" in command(*words, "--keep-copies", "--name", "all").stdout
    kept = json.loads((tmp_path / "project/group/all/models/tiles/model.json").read_text())
    assert kept["threshold"]["count"] == 60


@pytest.mark.parametrize("method", ["patchcore", "simplenet"])
def test_held_out_copies_of_what_was_learned_set_no_threshold(method):
    kind = {"patchcore": kizu.PatchCore, "simplenet": kizu.SimpleNet}[method]
    plain = kind(**SETTINGS[method]).fit(GOOD[:8], held_out=GOOD[8:])
    doubled = kind(**SETTINGS[method]).fit([*GOOD[:8], *GOOD[:3]], held_out=[*GOOD[8:], *GOOD[:4], GOOD[9]])
    assert doubled.calibration_scores == plain.calibration_scores
    assert doubled.training["hash"] == plain.training["hash"] and doubled.known([]) == []


@pytest.mark.parametrize("memory", [0, 10**9])
def test_a_stack_keeps_what_it_shall(memory):
    rng = np.random.default_rng(0)
    photos = rng.integers(0, 256, (7, 3, 8, 8), dtype=np.uint8)
    stack, kept = (Stack(7, (8, 8), memory) for _ in range(2))
    stack.append(photos)
    kept.append(photos[[0, 2, 3, 6]])
    with stack, kept:
        stack.keep([0, 2, 3, 6])
        assert np.array_equal(stack.batch(0, 9), photos[[0, 2, 3, 6]]) and len(stack) == 4
        assert stack.hash == kept.hash and stack.digests == kept.digests == digests(photos[[0, 2, 3, 6]])


# -------------------------------------------------------------------------------------------------------------- drift


def test_photographs_are_ordered_as_they_were_taken_or_named(tmp_path):
    names = [f"{number}.png" for number in (1, 10, 11, 2, 9)]
    for number, name in enumerate(names):
        (tmp_path / name).write_bytes(encoded(part(number)))
    paths = [tmp_path / name for name in sorted(names)]
    assert [path.name for path, _ in new_in_order(paths, [])] == ["1.png", "2.png", "9.png", "10.png", "11.png"]
    for place, name in enumerate(names):
        exif = Image.Exif()
        exif[0x8769] = {0x9003: f"2026:11:26 08:00:0{9 - place}"}
        Image.fromarray(part(place)).save(tmp_path / name, exif=exif)
    assert [path.name for path, _ in new_in_order(paths, [])] == names[::-1]


def test_each_photograph_counts_once(tmp_path):
    model = small_model(tmp_path / "model")
    days = tmp_path / "days"
    days.mkdir()
    for number in range(6):
        (days / f"{number}.png").write_bytes(encoded(part(number)))
    (days / "copy-of-3.png").write_bytes(encoded(part(3)))
    words = ("drift", model, days, "--history", tmp_path / "history.csv")
    assert json.loads(command(*words, "--json").stdout)["new"] == 6
    (days / "6.png").write_bytes(encoded(part(6)))
    (days / "0.png").rename(days / "moved.png")
    done = command(*words)
    assert done.stdout.startswith("1 new; 7 photographs were counted before") and "7 parts" in done.stdout
    (days / "damaged.png").touch()
    (days / "gone.png").symlink_to(days / "nothing.png")
    for _ in range(2):  # what cannot be read is named each time
        assert command(*words, code=1).stderr.count("error  ") == 2
    old = [Step(os.fspath(days / "1.png"), 1.0, 0.5, 0.0)]  # of version 0.1, without digests
    assert days / "1.png" not in [path for path, _ in new_in_order(sorted(days.iterdir()), old)]
