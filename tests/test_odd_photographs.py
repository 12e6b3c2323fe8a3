"""Photographs as cameras, editors and broken disks leave them: each is judged or refused, and spoils no other."""

import io
import json
import os
import random
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import kizu
from kizu.data import image
from kizu.errors import BadImage
from kizu.inference.prediction import Photo, Prediction
from processes import kizu as command
from processes import python
from services import small_model
from test_detectors import part
from test_serve import RAW, client

FORMATS = ["PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF", "PPM", "JPEG2000", "AVIF", "TGA"]
TYPES = {"byte": 1, "text": 2, "short": 3, "long": 4, "rational": 5, "bytes": 7, "signed rational": 10, "double": 12}


def encoded(format, **options):
    buffer = io.BytesIO()
    Image.fromarray(part(3)).save(buffer, format, **options)
    return buffer.getvalue()


def exif(tag, kind, count, raw):
    """An EXIF block of one entry, whatever its type says of it."""
    value = raw if len(raw) <= 4 else struct.pack("<L", 26)
    entry = struct.pack("<HHL", tag, TYPES[kind], count) + value.ljust(4, b"\0")
    return b"Exif\0\0II*\0" + struct.pack("<LH", 8, 1) + entry + struct.pack("<L", 0) + (raw if len(raw) > 4 else b"")


@pytest.mark.parametrize("format", FORMATS)
def test_a_mutated_photograph_is_an_image_or_a_bad_one(format):
    """Bytes changed, cut out, doubled and put elsewhere, most of them in the header."""
    rng = np.random.default_rng(FORMATS.index(format))
    seed = encoded(format)
    for _ in range(150):
        content = bytearray(seed)
        for _ in range(rng.integers(1, 6)):
            place = int(rng.integers(0, min(len(content), 200) if rng.random() < 0.7 else len(content)))
            what = rng.integers(0, 4)
            if what == 0:
                content[place] = rng.integers(0, 256)
            elif what == 1:
                del content[place : place + int(rng.integers(1, 20))]
            elif what == 2:
                content[place:place] = content[place : place + 8]
            else:
                content[place : place + 4] = rng.bytes(4)
            if not content:
                break
        try:
            rgb = image.read(bytes(content))
        except BadImage as error:
            assert "\n" not in error.reason
        else:
            assert rgb.dtype == np.uint8 and rgb.ndim == 3


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("tag", [0x0112, 0x011A, 0x8769, 0x8825, 0x010F, 0x9C9C, 0xA005, 0x014A])
def test_odd_exif_does_not_keep_a_photograph_from_being_judged(tag, kind):
    for raw, count in ((b"\6\0\0\0", 1), (b"\6\0\6\0", 2), (b"\xff" * 8, 1), (b"", 0), (b"6\0", 2), (b"\0" * 8, 1)):
        rgb = image.read(encoded("JPEG", exif=exif(tag, kind, count, raw)))
        assert sorted(rgb.shape) == [3, 96, 96]


def test_what_pillow_could_start_a_program_for_is_no_photograph(tmp_path):
    path = tmp_path / "part.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\nshowpage\n")
    with pytest.raises(BadImage, match="format that is not supported"):
        image.read(path)


@pytest.mark.parametrize("error", [TypeError("a"), struct.error("b"), RuntimeError("c"), RecursionError(), KeyError(1)])
def test_whatever_a_decoder_raises_is_a_bad_image(error, monkeypatch):
    def fail(*_):
        raise error

    for place in ("load", "getexif", "draft"):
        with monkeypatch.context() as patch:
            patch.setattr("PIL.PngImagePlugin.PngImageFile." + place, fail)
            if place == "getexif":
                assert image.read(encoded("PNG")).shape == (96, 96, 3)
                continue
            with pytest.raises(BadImage, match="damaged"):
                image.read_at_least(encoded("PNG"), (64, 64))
    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(BadImage, match="cannot be opened"):
        image.read(encoded("PNG"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_model(tmp_path_factory.mktemp("odd") / "disc")


class OddModel:
    """Fails, or says what is no number, where a photograph's first pixel is 13."""

    def __init__(self, model, answer):
        self.model, self.answer = model, answer

    def __call__(self, pixels):
        odd = pixels[:, 0, 0, 0] == 13
        if odd.any() and isinstance(self.answer, Exception):
            raise self.answer
        scores, maps, parts = self.model(pixels)
        if odd.any():
            (scores if self.answer == "score" else maps)[odd] = np.nan
        return scores, maps, parts


@pytest.mark.parametrize("answer", [RuntimeError("odd"), MemoryError(), "score", "map"])
def test_one_odd_photograph_takes_no_others_with_it(answer, folder, tmp_path, monkeypatch):
    detector = kizu.load(folder)
    odd = part(5)
    odd[:4, :4] = 13
    photographs = [Photo(part(0)), Photo(odd), Photo(part(1))]
    expected = [outcome.score for _, outcome in detector.judge([photographs[0], photographs[2]])]
    monkeypatch.setattr(detector, "score_in_parts", OddModel(detector.score_in_parts, answer))
    outcomes = [outcome for _, outcome in detector.judge(photographs)]
    assert [type(outcome) for outcome in outcomes] == [Prediction, BadImage, Prediction]
    assert [outcomes[0].score, outcomes[2].score] == pytest.approx(expected, rel=1e-5)
    with client(tmp_path, models={"disc": folder}) as web:
        hosted = web.service.models["disc"].loaded.model
        monkeypatch.setattr(hosted, "score_in_parts", OddModel(hosted.score_in_parts, answer))
        buffers = [io.BytesIO() for _ in photographs]
        for buffer, photograph in zip(buffers, (part(0), odd, part(1)), strict=True):
            Image.fromarray(photograph).save(buffer, "PNG")
        answers = web.post("/v1/predict", files=[("image", buffer.getvalue()) for buffer in buffers]).json()["results"]
        assert [row["verdict"] for row in answers] == ["pass", "error", "pass"]
        alone = web.post("/v1/predict", content=buffers[1].getvalue(), headers=RAW)
        assert alone.status_code in (422, 500) and "verdict" not in alone.text


def test_what_decoders_print_of_damage_is_the_rows_reason(folder, tmp_path):
    """Also of an image that libtiff goes on with, all grey from the damage on."""
    rng, spoilt = random.Random(0), tmp_path / "spoilt"
    spoilt.mkdir()
    for compression in ("group4", "tiff_lzw", "tiff_adobe_deflate", "jpeg"):
        picture = Image.fromarray(part(0)).convert("1" if compression == "group4" else "RGB")
        buffer = io.BytesIO()
        picture.save(buffer, "TIFF", compression=compression)
        (spoilt / f"{compression}.tif").write_bytes(buffer.getvalue())
        for number in range(20):
            content = bytearray(buffer.getvalue())
            for _ in range(3):
                content[rng.randrange(len(content))] = rng.randrange(256)
            (spoilt / f"{compression}-{number}.tif").write_bytes(content)
    done = command("predict", folder, spoilt, "--json", code=1)
    rows = {Path(row["path"]).name: row for row in json.loads(done.stdout)}
    assert len(rows) == 84 and not [line for line in done.stderr.splitlines() if "spoilt" not in line], done.stderr
    reasons = [row["error"] for row in rows.values() if row["verdict"] == "error"]
    for said in ("Fax4Decode: ", "ZIPDecode: ", "not yet in table", "cannot be decoded whole"):
        assert any(said in reason for reason in reasons)
    assert all(rows[name]["verdict"] != "error" for name in rows if "-" not in name)


FIRST_TOGETHER = """
import sys, threading
from kizu.data import image
from kizu.errors import BadImage

sys.setswitchinterval(1e-6)
content, barrier, said = open(sys.argv[1], "rb").read(), threading.Barrier(8), []

def read():
    barrier.wait()
    for _ in range(20):
        try:
            image.read(content)
        except BadImage as error:
            said.append(str(error))

threads = [threading.Thread(target=read) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(len(said), len(set(said)))
"""


def test_the_first_photographs_of_a_process_may_be_damaged_and_decoded_together(tmp_path):
    """What libtiff calls with its errors must be there for good, whichever thread was the first."""
    buffer = io.BytesIO()
    Image.fromarray(part(0)).convert("1").save(buffer, "TIFF", compression="group4")
    damaged = tmp_path / "damaged.tif"
    damaged.write_bytes(buffer.getvalue()[:-40] + bytes(40))
    for _ in range(8):
        done = python("-c", FIRST_TOGETHER, damaged)
        assert (done.returncode, done.stdout) == (0, "160 1\n"), done


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("exported", [False, True])
def test_a_model_with_values_that_are_no_numbers_is_refused(value, exported, request, tmp_path):
    from safetensors.numpy import load_file, save_file

    source = request.getfixturevalue("exported_folder" if exported else "folder")
    for name in ("model.safetensors", "keepsakes.safetensors"):
        if not (source / name).exists():
            continue
        tensors = load_file(source / name)
        numbers = [key for key, tensor in tensors.items() if tensor.dtype.kind == "f" and tensor.size > 1]
        for key in {*numbers[::10], *(key for key in numbers if "bank" in key)}:
            tensor = tensors[key]
            spoilt = tensor.copy()
            spoilt.flat[spoilt.size // 2] = value
            target = tmp_path / "spoilt"
            target.mkdir(exist_ok=True)
            for file in source.iterdir():
                if file.is_file():
                    (target / file.name).write_bytes(file.read_bytes())
            save_file(tensors | {key: spoilt}, target / name)
            with pytest.raises(kizu.ModelError):
                kizu.load(target)
            if key.endswith("entries"):
                assert "Traceback" not in command("predict", target, os.devnull, code=2).stderr


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_description_with_what_is_no_number_is_refused(number, folder, tmp_path):
    text = (folder / "model.json").read_text()
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    for key in ("value", "level"):
        start = text.index(f'"{key}": ') + len(key) + 4
        (tmp_path / "model.json").write_text(text[:start] + number + text[text.index(",", start) :])
        with pytest.raises(kizu.ModelError, match="damaged"):
            kizu.load(tmp_path)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("local_scale", [False, True])
def test_a_few_or_equal_photographs_give_sane_scores(count, alike, local_scale):
    good = [part(0 if alike else seed) for seed in range(count)]
    detector = kizu.PatchCore(size=64, coreset=0.2, local_scale=local_scale).fit(good)
    scores = [detector.predict(part(50, spot=spot)).score for spot in (False, True)]
    assert all(0 <= score < 1e4 for score in scores) and max(map(abs, detector.heat_map_range)) < 1e4
    with pytest.raises(kizu.ModelError, match="no finite numbers"):
        detector.graph.banks[0].entries = detector.graph.banks[0].entries * float("nan")
        detector.save("nowhere")


@pytest.fixture
def odd_folder(tmp_path):
    """Two photographs, a pipe, a link to an endless device, a file of holes, and folders that contain themselves."""
    folder = tmp_path / "new"
    (folder / "inner").mkdir(parents=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for number, path in enumerate((folder / "0.png", folder / "inner" / "1.png", elsewhere / "2.png")):
        image.write(path, part(number))
    os.mkfifo(folder / "pipe.png")
    (folder / "endless.png").symlink_to("/dev/zero")
    with (folder / "holes.png").open("wb") as file:
        file.truncate(20 * 10**9)
    (folder / "loop").symlink_to(".")
    (folder / "inner" / "loop").symlink_to("..")
    (folder / "linked").symlink_to(elsewhere)
    return folder


ODD = {"pipe.png": "not a file", "endless.png": "not a file", "holes.png": "more than 2000 MB"}


def test_predict_judges_each_photograph_once_and_hangs_on_nothing(folder, odd_folder, tmp_path):
    done = command("predict", folder, odd_folder, "--csv", tmp_path / "rows.csv", code=1)
    rows = [line.split(",") for line in (tmp_path / "rows.csv").read_text().splitlines()[1:]]
    assert sorted(Path(row[0]).name for row in rows if row[3] != "error") == ["0.png", "1.png", "2.png"]
    assert {Path(row[0]).name for row in rows if row[3] == "error"} == set(ODD)
    for name, sentence in ODD.items():
        assert any(name in line and sentence in line for line in done.stdout.splitlines()), done.stdout


def test_watch_judges_each_photograph_once_and_hangs_on_nothing(folder, odd_folder, tmp_path):
    out = tmp_path / "verdicts.jsonl"
    arguments = ("watch", odd_folder, "--model", folder, "--output", out, "--settle", 0.05, "--patience", 0.2, "--once")
    for judged, code in ((6, 1), (6, 0)):
        command(*arguments, code=code)
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        assert len(rows) == judged
    assert {row["image"] for row in rows if row["verdict"] == "error"} == set(ODD)
    assert sorted(Path(row["image"]).name for row in rows if row["verdict"] != "error") == [
        *("0.png", "1.png", "2.png")
    ]


@pytest.mark.parametrize("name", ["model.json", "model.safetensors", "thumbnails.safetensors"])
def test_a_pipe_in_a_model_is_refused_at_once(name, folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(kizu.ModelError, match="not a file"):
        kizu.load(tmp_path)


def test_a_description_nested_too_deep_is_refused(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.json").write_text("[" * 100_000)
    with pytest.raises(kizu.ModelError, match="damaged"):
        kizu.load(tmp_path)
