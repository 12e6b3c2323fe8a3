"""Everything in a folder that a person would call a photograph is judged or named, and nothing else is judged."""

import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

import kizu
from kizu.data import image
from kizu.data.photographs import is_photograph, scan
from kizu.inference.batch import _output_names
from processes import kizu as command
from services import encoded, small_model
from test_detectors import part

PHOTO = part(1)
JUDGED = {"plain.png", "UPPER.JPG", "noname", "photo.dat", "IMG.1", "linked/inner.jpg", "small-copy.tif", "two.mpo.jpg"}
NAMED = {"x.HEIC", "raw.dng", "pages.tif", "film.gif", "film.webp", "film.png", "pipe.png"}
NOT = {"notes.txt", "table.csv", "seen/plain.png.png", "program", "@eaDir/plain.png/SYNOPHOTO_THUMB_S.jpg"}
NOT |= {"#recycle/old.png", "$RECYCLE.BIN/$R1.jpg", ".snapshot/plain.png", ".hidden.png", "._plain.png"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small_model(tmp_path_factory.mktemp("photographs") / "disc")


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "in"
    photo = Image.fromarray(PHOTO)
    for name in JUDGED | NAMED | NOT:
        place = folder / name if not name.startswith("linked/") else tmp_path / "elsewhere" / "inner.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        if name not in ("pipe.png", "seen/plain.png.png"):
            place.write_bytes(encoded(PHOTO, "JPEG" if name.lower().endswith("jpg") else "PNG"))
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "again").symlink_to(folder)
    os.mkfifo(folder / "pipe.png")
    image.write_picture(folder / "seen" / "plain.png.png", PHOTO)
    (folder / "noname").write_bytes(encoded(PHOTO, "JPEG"))
    (folder / "x.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    photo.resize((32, 32)).save(folder / "raw.dng", format="TIFF", tiffinfo={254: 1})
    (folder / "program").write_bytes(b"\x7fELF" + bytes(100))
    for name in ("notes.txt", "table.csv"):
        (folder / name).write_text("a,b\n")
    for name in ("pages.tif", "film.gif", "film.webp", "film.png"):
        photo.save(folder / name, save_all=True, append_images=[Image.fromarray(255 - PHOTO)])
    photo.save(folder / "small-copy.tif", save_all=True, append_images=[photo.resize((24, 24))])
    mark_as_copy(folder / "small-copy.tif")
    photo.save(folder / "two.mpo.jpg", format="MPO", save_all=True, append_images=[photo.resize((48, 48))])
    return folder


def mark_as_copy(path):
    """Set NewSubfileType of the second page to 1, as cameras do for thumbnails."""
    first, second = Image.fromarray(PHOTO), Image.fromarray(PHOTO).resize((24, 24))
    second.encoderinfo = {"tiffinfo": {254: 1}}
    first.save(path, save_all=True, append_images=[second])
    with Image.open(path) as saved:
        saved.seek(1)
        assert saved.tag_v2[254] == 1


def test_predict_judges_or_names_each(model, folder):
    done = command("predict", model, folder, "--json", code=1)
    rows = {os.path.relpath(row["path"], folder): row for row in json.loads(done.stdout)}
    assert rows.keys() == JUDGED | NAMED
    assert {name for name, row in rows.items() if row["verdict"] == "error"} == NAMED
    assert all("several pages" in rows[name]["error"] for name in ("pages.tif", "film.gif", "film.webp", "film.png"))


def test_watch_judges_or_names_each(model, folder, tmp_path):
    words = ("watch", folder, "--model", model, "--output", tmp_path / "v.jsonl", "--once", "--settle", 0)
    command(*words, "--patience", 0, code=1)
    rows = {row["image"]: row for row in map(json.loads, (tmp_path / "v.jsonl").read_text().splitlines())}
    assert rows.keys() == JUDGED | NAMED
    assert {name for name, row in rows.items() if row["verdict"] == "error"} == NAMED
    assert "Nothing new" in command(*words).stdout


def test_what_cannot_be_learned_from_is_said_before_anything_is_learned(folder, tmp_path):
    done = command(
        "train", "patchcore", folder, "--layout", "folder", "--size", 64, "--output", tmp_path / "results", code=2
    )
    assert f"{len(NAMED) - 1} of " in done.stderr and "x.HEIC" in done.stderr and "pages.tif" in done.stderr
    listed = json.loads(command("data", folder, "--layout", "folder", "--json").stdout)
    assert not any("SYNOPHOTO" in str(row) for row in listed["warnings"])


def test_a_folder_that_cannot_be_opened_is_named(model, tmp_path, monkeypatch):
    closed = tmp_path / "in" / "closed"
    closed.mkdir(parents=True)
    Image.fromarray(PHOTO).save(tmp_path / "in" / "a.png")
    scandir, listdir = os.scandir, os.listdir

    def refuse(of):
        def opened(path="."):
            if os.fspath(path) == os.fspath(closed):
                raise PermissionError(13, "Permission denied", os.fspath(path))
            return of(path)

        return opened

    monkeypatch.setattr(os, "scandir", refuse(scandir))
    monkeypatch.setattr(os, "listdir", refuse(listdir))
    assert list(scan(tmp_path / "in")) == [tmp_path / "in" / "a.png", closed]
    with pytest.raises(kizu.BadImage, match="nothing in it was judged"):
        image.read(closed)
    with pytest.raises(kizu.DataError, match="closed cannot be opened"):
        kizu.PatchCore(size=64).fit(tmp_path / "in")


def test_pictures_are_named_after_their_photographs_by_as_much_as_tells_them_apart(tmp_path):
    def names(*paths):
        return [path.name for path in _output_names([tmp_path / path for path in paths], tmp_path, "-why.png").values()]

    assert names("a/x.png", "a/y.jpg") == ["x-why.png", "y-why.png"]
    assert names("a/x.png", "a/x.jpg") == ["x.png-why.png", "x.jpg-why.png"]
    assert names("a/x.png", "b/x.png", "b/y.png") == ["a_x.png-why.png", "b_x.png-why.png", "b_y.png-why.png"]


def test_pictures_of_what_was_found_are_no_photographs(model, folder, tmp_path):
    shutil.rmtree(folder)
    folder.mkdir()
    Image.fromarray(PHOTO).save(folder / "a.png")
    for _ in range(2):
        done = command("predict", model, folder, "--overlays", folder, "--why", folder / "why", "--json")
        assert [row["path"] for row in json.loads(done.stdout)] == [str(folder / "a.png")]
    assert sorted(path.name for path in folder.glob("*.png")) == ["a-overlay.png", "a.png"]
    assert not is_photograph(folder / "a-overlay.png") and is_photograph(folder / "a.png")
    assert np.array_equal(image.read(folder / "a.png"), PHOTO)
