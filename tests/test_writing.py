"""Nothing half written, nothing lost, nothing left over; what cannot be written is a sentence."""

import csv
import io
import json
import os
import re
import shutil
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

import kizu
from kizu.data import files
from kizu.evaluation import run_folder
from kizu.evaluation.run_folder import open_run
from processes import kizu as command
from processes import python
from services import KIZU, encoded, small_model
from test_detectors import GOOD, SETTINGS, part

PHOTOS = [part(seed) for seed in range(100, 112)]
LIMITED = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
sys.argv = ["kizu", *{words!r}]
runpy.run_module("kizu", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return small_model(tmp_path_factory.mktemp("writing") / "disc")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return kizu.PatchCore(**SETTINGS["patchcore"]).fit(GOOD).save(tmp_path_factory.mktemp("writing") / "trained")


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, photo in enumerate(PHOTOS):
        Image.fromarray(photo).save(folder / f"{number}.png")
    return folder


def hidden(folder):
    return [path.name for path in folder.rglob(".*")]


# ------------------------------------------------------------------------------------------------ whole or not at all


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_folder_is_replaced_in_one_step_or_put_back(exchanges, tmp_path, monkeypatch):
    """Where the system cannot exchange two folders, a kill between the two steps is made up for."""
    if not exchanges:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    model = tmp_path / "model"
    for content in ("old", "new"):
        with files.new_folder(model) as temporary:
            (temporary / "what").write_text(content)
    assert (model / "what").read_text() == "new" and list(tmp_path.iterdir()) == [model]
    killed = f"""
import os, pathlib
from kizu.data import files
from kizu.evaluation import run_folder
from kizu.evaluation.run_folder import open_run
files._exchange = lambda one, other: False
rename, times = pathlib.Path.rename, []
pathlib.Path.rename = lambda self, other: os._exit(9) if times else times.append(rename(self, other))
with files.new_folder({str(model)!r}) as temporary:
    (temporary / "what").write_text("newer")
"""
    assert python("-c", killed).returncode == 9
    assert not model.exists()
    files.recover(model)
    assert (model / "what").read_text() == "new"
    files._swept.clear()
    with files.new_file(tmp_path / "another"):
        pass
    assert hidden(tmp_path) == []


def test_what_killed_commands_left_is_removed_and_what_is_being_written_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_swept", set())
    monkeypatch.setattr(files.tempfile, "tempdir", str(tmp_path))
    (tmp_path / ".kizu-killed" / "inside").mkdir(parents=True)
    (tmp_path / ".kizu-killed.png").touch()
    (tmp_path / ".mine").touch()
    os.mkfifo(tmp_path / ".kizu-pipe")
    busy = tmp_path / ".kizu-busy"
    busy.mkdir()
    with files.locked(busy), files.scratch_folder() as scratch:
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([".mine", busy.name, scratch.name])


def test_links_stay_links_and_devices_devices(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with files.new_folder(tmp_path / "link") as temporary:
        (temporary / "what").write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "what").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    read = []
    reader.start()
    files.write_text(tmp_path / "pipe", "hello")
    reader.join(10)
    assert read == ["hello"] and (tmp_path / "pipe").is_fifo() and hidden(tmp_path) == []


# -------------------------------------------------------------------------------------------------------------- locks


def test_updates_of_one_model_at_once_are_all_kept(trained, photos, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(trained, model)
    places = []
    for number, photo in enumerate(sorted(photos.iterdir())[:4]):
        places.append(tmp_path / f"lot-{number}")
        places[-1].mkdir()
        photo.rename(places[-1] / photo.name)
    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda place: command("update", model, place), places))
    assert json.loads((model / "model.json").read_text())["training"]["images"] == len(GOOD) + len(places)
    assert any("another command is changing this model" in one.stderr for one in done)
    with files.locked(model), pytest.raises(BlockingIOError), files.locked(model):
        pass


def test_runs_that_are_running_are_left_alone(photos, tmp_path):
    words = ("train", "patchcore", photos, "--size", 64, "--coreset", 0.2, "--output", tmp_path / "results", "-q")
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: command(*words), range(2)))
    group = tmp_path / "results" / "project" / "group"
    assert sorted(path.name for path in group.iterdir()) == ["run", "run-2"]
    with files.locked(group / "run"):
        for option in ("--resume", "--overwrite"):
            assert "still running" in command(*words, "--name", "run", option, code=2).stderr
    (group / "run-3" / "unfinished").mkdir(parents=True)  # what a kill left of a run in version 0.1
    command(*words)
    assert (group / "run-3" / "report.html").exists() and hidden(group) == []


def test_of_many_that_replace_a_run_at_once_each_has_its_own_or_is_told(tmp_path, monkeypatch):
    """Eight at the same moment, again and again: whoever goes on finds its own settings from the first to the last."""
    begin = run_folder._begin
    monkeypatch.setattr(run_folder, "_begin", lambda *a, **o: (begin(*a, **o), time.sleep(0.003))[0])
    with open_run(tmp_path, "run", {"n": -1}, resume=False, overwrite=False):
        pass
    for _ in range(12):
        together, outcomes = threading.Barrier(8), []

        def one(number, together=together, outcomes=outcomes):
            together.wait()
            try:
                with open_run(tmp_path, "run", {"n": number}, resume=False, overwrite=True) as run:
                    for _ in range(5):
                        assert json.loads((run.unfinished / "run.json").read_text()) == {"n": number}
                        time.sleep(0.002)
                    outcomes.append("done")
            except kizu.OptionError as error:
                outcomes.append("told" if "running" in str(error) or "replaced" in str(error) else str(error))
            except Exception as error:
                outcomes.append(repr(error))

        threads = [threading.Thread(target=one, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(outcomes) <= {"done", "told"} and "done" in outcomes


# ----------------------------------------------------------------------------------------------- what cannot be written


def cases(trained, exported, photos, out):
    return {
        "csv": ["predict", exported, photos, "--csv", out / "v.csv"],
        "overlays": ["predict", exported, photos, "--overlays", out / "seen"],
        "train": ["train", "patchcore", photos, "--size", 64, "--output", out / "results"],
        "update": ["update", trained, photos],
        "export": ["export", trained, "--to", "onnx", "--output", out / "exported"],
        "check": ["check", exported, photos, "--images", 1, "--output", out / "check"],
        "drift": ["drift", exported, photos, "--history", out / "history.csv"],
        "watch": ["watch", photos, "--model", exported, "--output", out / "v.jsonl", "--once", "--settle", 0],
    }


@pytest.mark.parametrize("name", list(cases(Path(), Path(), Path(), Path())))
def test_a_full_disk_and_a_place_that_is_none_are_sentences(name, trained, exported, photos, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(trained, model)
    out = tmp_path / "out"
    before = {path: path.read_bytes() for path in model.iterdir()}
    words = [str(word) for word in cases(model, exported, photos, out)[name]]
    done = python("-c", LIMITED.format(limit=1200, words=words))
    assert done.returncode == 2, done.stdout + done.stderr
    assert "cannot be written: File too large" in done.stderr
    assert "Traceback" not in done.stderr and {path: path.read_bytes() for path in model.iterdir()} == before
    assert hidden(tmp_path) == []
    shutil.rmtree(out, ignore_errors=True)
    if name != "update":
        out.touch()  # a file where a folder should be
        assert "cannot be written" in command(*words, code=2).stderr


@pytest.mark.parametrize(
    "words", [["predict", "MODEL", "PHOTOS"], ["predict", "MODEL", "PHOTOS", "--json"], ["--help"]]
)
def test_output_that_nobody_can_take_is_a_sentence(words, exported, photos):
    full = "import os; os.dup2(os.open('/dev/full', os.O_WRONLY), 1)\n"
    words = [{"MODEL": str(exported), "PHOTOS": str(photos)}.get(word, word) for word in words]
    done = python("-c", full + LIMITED.format(limit=-1, words=words))
    assert (done.returncode, done.stderr) == (2, "kizu: the output cannot be written: No space left on device\n")


def test_what_nobody_foresaw_is_written_down(exported, photos):
    broken = "import kizu.inference.batch as b; b.image_paths = lambda _: 1 / 0\n"
    words = ["predict", str(exported), str(photos), "--csv", "x"]
    done = python("-c", broken + LIMITED.format(limit=-1, words=words))
    assert done.returncode == 70 and "Traceback" not in done.stderr
    report = Path(done.stderr.partition("written down in ")[2].partition(": please")[0])
    assert "ZeroDivisionError" in report.read_text() and str(exported) in report.read_text()
    report.unlink()


# -------------------------------------------------------------------------------------------------------------- names


def test_names_that_are_no_text_or_as_long_as_can_be_work_everywhere(trained, exported, tmp_path):
    folder = tmp_path / "odd"
    folder.mkdir()
    names = [b"pr\xfcf.jpg", b"n" * 251 + b".png", b"=1+1.png", b"-x.png", "傷 \n.png".encode()]
    for name, photo in zip(names, PHOTOS[:5], strict=True):
        (folder / os.fsdecode(name)).write_bytes(encoded(photo, "JPEG" if name.endswith(b"jpg") else "PNG"))
    (tmp_path / "more").mkdir()
    Image.fromarray(PHOTOS[7]).save(tmp_path / "more" / "x.png")
    out = tmp_path / "out"
    done = command("predict", exported, folder, "--csv", out / "v.csv", "--overlays", out / "seen", "--json")
    assert {os.fsencode(Path(row["path"]).name) for row in json.loads(done.stdout)} == set(names)
    assert len(list((out / "seen").iterdir())) == len(names)
    text = (out / "v.csv").read_bytes().decode(errors="surrogateescape")
    assert {Path(row["image"]).name for row in csv.DictReader(io.StringIO(text, newline=""))} == {
        *map(os.fsdecode, names)
    }
    for _ in range(2):
        command("drift", exported, folder, "--history", out / "history.csv", "--output", out / "drift")
    command("train", "patchcore", folder, "--size", 64, "--coreset", 0.2, "--output", out / "results", "--name", "odd")
    command("watch", folder, "--model", exported, "--output", out / "v.jsonl", "--csv", out / "w.csv", "--once")
    assert len((out / "v.jsonl").read_text(encoding="utf-8").splitlines()) == len(names)
    command("update", out / "results/project/group/odd", tmp_path / "more")
    command("check", exported, folder, "--images", 2, "--output", out / "check", "-q")
    command("evaluate", out / "results/project/group/odd", folder, "--output", out / "again", "--save-maps")


def test_a_spreadsheet_runs_nothing(exported, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(photos)
    formulas = ["=cmd|'!A1'.png", "@sum.png", "+1+1.png", "-2.png"]
    for name in formulas:
        shutil.copy("0.png", name)
    command("predict", exported, *formulas[:3], f"./{formulas[3]}", "--csv", tmp_path / "v.csv", cwd=photos)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "v.csv").read_text(), newline="")))
    assert not any(row["image"][0] in "=@+-" for row in rows)
    assert [files.from_cell(row["image"]) for row in rows] == formulas
    assert files.csv_text([["-1.5", "+3e-5", -2, "\t=x", "'quoted'", "-inf"]]) == "-1.5,+3e-5,-2,'\t=x,'quoted',-inf\n"


@pytest.mark.parametrize("setting", ["--name", "--group", "--project"])
@pytest.mark.parametrize("value", ["../../x", "/tmp/x", "..", ".", "a/../../x"])
def test_results_stay_in_their_folder(setting, value, photos, tmp_path):
    words = ("train", "patchcore", photos, "--output", tmp_path / "a" / "b", setting, value)
    assert "the name of a folder inside" in command(*words, code=2).stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos"]


def test_json_is_json_also_without_a_threshold(photos, tmp_path):
    model = kizu.SimpleNet(**SETTINGS["simplenet"]).fit(GOOD[:3]).save(tmp_path / "model")

    def refuse(number):
        raise AssertionError(f"{number} is no JSON")

    for words in (["predict", model, photos], ["info", model], ["tune", model, photos, photos], ["verify", model]):
        json.loads(command(*words, "--json").stdout, parse_constant=refuse)


def test_what_cannot_be_written_is_named_by_its_own_name(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    (tmp_path / "loop").symlink_to("loop")
    reasons = {
        "file": "is no folder",
        "nowhere": "is a link that leads nowhere",
        "loop": "is a link that leads nowhere",
    }
    for name, reason in reasons.items():
        with pytest.raises(kizu.OutputError, match=re.escape(f"{tmp_path / name} {reason}")):
            files.write_text(tmp_path / name / "deeper" / "a.txt", "text")
        with (
            pytest.raises(kizu.OutputError) as caught,
            files.scratch_folder() as scratch,
            files.new_folder(tmp_path / name / "model"),
        ):
            (scratch / "x").touch()
        assert caught.value.name == str(tmp_path / name / "model")
    with pytest.raises(kizu.OutputError) as caught, files.new_folder(tmp_path / "model") as folder:
        files.write_text(folder / "file", "text")
        files.write_text(folder / "file" / "a", "text")
    assert caught.value.name == str(tmp_path / "model")
    with pytest.raises(FileNotFoundError, match=r"photograph\.png"), files.new_folder(tmp_path / "model"):
        (tmp_path / "photograph.png").read_bytes()


def test_output_that_nobody_reads_and_a_folder_that_is_gone(trained, tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([KIZU, "info", trained], stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")
    here = tmp_path / "here"
    here.mkdir()
    done = subprocess.run([KIZU, "info", trained], cwd=here, preexec_fn=here.rmdir, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("kizu: the current folder does not exist")
