"""The command line as people use it: another process, real files, exit codes."""

import csv
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kizu.cli import terminal
from processes import kizu
from test_detectors import part
from test_image import bad_files

KIZU = Path(sys.executable).with_name("kizu")


def table(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def save(path, picture):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)
    return path


def factory(root, categories=("disc",)):
    """A small data set in MVTec's layout."""
    for number, category in enumerate(categories):
        for seed in range(8):
            save(root / category / "train" / "good" / f"{seed}.png", part(100 * number + seed))
        for seed in range(4):
            save(root / category / "test" / "good" / f"{seed}.png", part(100 * number + 20 + seed))
            save(root / category / "test" / "spot" / f"{seed}.png", part(100 * number + 40 + seed, spot=True))
            mask = np.zeros((96, 96), np.uint8)
            mask[30:42, 50:62] = 255
            save(root / category / "ground_truth" / "spot" / f"{seed}_mask.png", mask)
    return root


FAST = ("--size", "64", "--coreset", "0.2")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    data = factory(folder / "data") / "disc"
    output = kizu("train", "patchcore", data, "--output", folder / "results", "--name", "first", *FAST)
    return data, folder / "results" / "project" / "group" / "first", output


def test_help_is_quick_and_light():
    """In seconds of the processor, which other programs on the machine do not lengthen much."""

    def spent():
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    def seconds(*command):
        def once():
            start = spent()
            subprocess.run(command, capture_output=True, check=True)
            return spent() - start

        return min(once() for _ in range(5))

    assert seconds(KIZU, "--help") < 0.3
    assert seconds(KIZU, "train", "patchcore", "--help") < 0.45
    loaded = (
        "import sys, kizu, kizu.cli.main; heavy = ('torch', 'timm', 'numpy', 'pydantic')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True).stdout.strip() == "[]"


def test_every_command_has_help_with_an_example():
    commands = ["train", "update", "merge", "evaluate", "predict", "data", "demo", "info", "doctor"]
    commands += ["check", "drift", "tune", "reference", "import"]
    listing = kizu("--help").stdout
    for command in commands:
        assert command in listing
        text = kizu(command, "--help").stdout
        assert "Example:" in text and f"kizu {command}" in text
    assert "Example:" in kizu("train", "patchcore", "--help").stdout


def test_training_writes_the_promised_folder(trained):
    _, run, output = trained
    names = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    assert {"results.csv", "predictions.csv", "report.html", "run.json", "log.txt"} <= names
    assert {"models/disc/model.json", "models/disc/model.safetensors"} <= names
    assert any(name.startswith("tensorboard/disc/events") for name in names) and not (run / "unfinished").exists()
    rows = table(run / "results.csv")
    assert list(rows[0])[:8] == [
        *("category", "image_auroc", "image_ap", "image_f1max", "pixel_auroc", "pixel_ap", "pixel_f1max", "au_pro")
    ]
    assert list(rows[0])[-1] == "seconds" and [row["category"] for row in rows] == ["disc", "mean"]
    assert float(rows[0]["image_auroc"]) == 1.0 and float(rows[0]["au_pro"]) > 0.5
    about = json.loads((run / "run.json").read_text())
    assert about["seed"] == 0 and about["config"]["size"] == [64, 64] and about["versions"]["torch"]
    assert "1.0000" in output.stdout and str(run / "report.html") in output.stdout


def test_the_same_command_gives_the_same_model_and_predictions(trained, tmp_path):
    data, run, _ = trained
    kizu("train", "patchcore", data, "--output", tmp_path, "--name", "again", "-q", *FAST)
    again = tmp_path / "project" / "group" / "again"
    for name in ("models/disc/model.safetensors", "models/disc/model.json", "predictions.csv"):
        assert (run / name).read_bytes() == (again / name).read_bytes(), name


def test_predict_judges_files_folders_and_globs_and_survives_a_broken_one(trained, tmp_path):
    data, run, _ = trained
    (tmp_path / "bad").mkdir()
    bad = list(bad_files(tmp_path / "bad"))
    save(tmp_path / "more" / "0.png", part(77))
    done = kizu(
        *("predict", run, data / "test" / "spot" / "*.png", *(path for path, _ in bad), tmp_path / "more"),
        *("--csv", tmp_path / "out.csv", "--overlays", tmp_path / "seen", "--json"),
        code=2,  # one of them is a folder without an image
    )
    assert "folder.png: there are no images in this folder" in done.stderr
    bad = [(path, reason) for path, reason in bad if not path.is_dir()]
    done = kizu(
        *("predict", run, data / "test" / "spot" / "*.png", *(path for path, _ in bad), tmp_path / "more"),
        *("--csv", tmp_path / "out.csv", "--overlays", tmp_path / "seen", "--json"),
        code=1,
    )
    rows = json.loads(done.stdout)
    assert [row["verdict"] for row in rows] == ["stop"] * 4 + ["error"] * len(bad) + ["pass"]
    for row, (path, reason) in zip(rows[4:], bad, strict=False):
        assert row["path"] == str(path) and reason in row["error"] and row["score"] is None
    written = table(tmp_path / "out.csv")
    assert list(written[0]) == ["image", "score", "p_value", "verdict", "threshold", "seconds", "error"]
    assert [row["verdict"] for row in written] == [row["verdict"] for row in rows]
    overlays = sorted(path.name for path in (tmp_path / "seen").iterdir())
    assert len(overlays) == 5  # two files are named 0.png, and none overwrites the other
    assert "stop" in kizu("predict", run, data / "test" / "spot").stdout


def test_training_on_bad_files_stops_before_any_work_with_all_of_them(tmp_path):
    for seed in range(4):
        save(tmp_path / "photos" / f"good{seed}.png", part(seed))
    bad = [(path, reason) for path, reason in bad_files(tmp_path / "photos") if path.is_file()]
    command = ("train", "patchcore", tmp_path / "photos", "--output", tmp_path / "results", *FAST)
    errors = kizu(*command, code=2).stderr
    assert all(f"{path}: " in errors and reason in errors for path, reason in bad) and "--skip-bad" in errors
    assert not list((tmp_path / "results").rglob("model.json"))
    kizu(*command, "--skip-bad")
    assert "4 good images" in kizu("info", tmp_path / "results" / "project" / "group" / "run").stdout


def test_a_table_that_a_terminal_has_no_room_for_is_printed_line_by_line(monkeypatch, capsys):
    rows = [{"category": "bottle", "image AUROC": "1.0000", "false alarms": "0 of 20"}] * 2
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    for columns, expected in (
        (80, "bottle         1.0000       0 of 20"),
        (30, "bottle\n  image AUROC   1.0000\n  false alarms  0 of 20"),
    ):
        monkeypatch.setenv("COLUMNS", str(columns))
        terminal.print_table(rows)
        printed = capsys.readouterr().out
        assert printed.count(expected) == 2 and max(map(len, printed.splitlines())) <= columns


def test_models_are_updated_rolled_back_and_merged(trained, tmp_path):
    _, run, _ = trained
    model, more = tmp_path / "model", tmp_path / "more"
    shutil.copytree(run / "models" / "disc", model)
    for seed in range(5):
        save(more / f"{seed}.png", part(200 + seed))
    assert "13 good images" in kizu("update", model, more).stdout
    assert "13 good images" in kizu("info", model).stdout
    assert "Note: 8 photographs were learned" in kizu("merge", model, run, "--output", tmp_path / "both").stderr
    assert "21 good images" in kizu("info", tmp_path / "both").stdout
    assert "8 good images" in kizu("update", model, "--rollback").stdout
    assert "no previous model" in kizu("update", model, "--rollback", code=2).stderr
    tensors = "model.safetensors"
    assert (model / tensors).read_bytes() == (run / "models" / "disc" / tensors).read_bytes()


def test_profile_says_where_the_time_goes(trained):
    data, run, _ = trained
    printed = kizu("predict", run, data / "test" / "good", "--profile").stdout
    assert all(word in printed for word in ("decode", "backbone", "search and score"))


def test_evaluating_again_gives_the_same_numbers(trained, tmp_path):
    data, run, _ = trained
    kizu("evaluate", run, data, "--output", tmp_path / "again")
    assert (tmp_path / "again" / "predictions.csv").read_bytes() == (run / "predictions.csv").read_bytes()
    assert (tmp_path / "again" / "report.html").exists()
    printed = json.loads(kizu("evaluate", run / "models" / "disc", data, "--json").stdout)
    assert printed["categories"][0]["image_auroc"] == 1.0


def test_only_good_images_are_enough(tmp_path):
    for seed in range(6):
        save(tmp_path / "photos" / f"{seed}.jpg", part(seed))
    kizu("train", "patchcore", "photos", *FAST, cwd=tmp_path)
    run = tmp_path / "results" / "project" / "group" / "run"
    assert "n/a" in (run / "results.csv").read_text() and (run / "report.html").exists()
    kizu("train", "patchcore", "photos", *FAST, cwd=tmp_path)
    assert run.with_name("run-2").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("predict", "nowhere", "x.png"), "no kizu model"),
        (("train", "patchcore", "nowhere"), "nowhere"),
        (("train", "patchcore", ".", "--size", "7"), "--size"),
        (("train", "patchcore", ".", "--sampler", "best"), "k_center"),
        (("train", "patchcores", "."), "patchcores"),
        (("evaluate", ".", "nowhere"), "nowhere"),
        (("info", "."), "no kizu model"),
        (("data", "nowhere"), "nowhere"),
        (("fly",), "fly"),
    ],
)
def test_wrong_commands_get_one_sentence_and_exit_code_2(arguments, words, tmp_path):
    assert words in kizu(*arguments, code=2, cwd=tmp_path).stderr


def test_a_name_is_not_used_twice_by_accident(trained):
    data, run, _ = trained
    before = (run / "run.json").read_bytes()
    again = ("train", "patchcore", data, "--output", run.parents[2], "--name", "first", *FAST)
    assert "--overwrite" in kizu(*again, code=2).stderr
    assert "nothing to resume" in kizu(*again, "--resume", code=2).stderr
    assert (run / "run.json").read_bytes() == before


@pytest.mark.parametrize("ending", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_a_killed_run_looks_unfinished_and_can_be_resumed(tmp_path, ending):
    data = factory(tmp_path / "data", ("a", "b", "c"))
    command = [KIZU, "train", "patchcore", data, "--output", tmp_path / "results", "--name", "killed", *FAST]
    run = tmp_path / "results" / "project" / "group" / "killed"
    process = subprocess.Popen(
        [*map(str, command)],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where a shell started us behind &
    )
    while not (run / "unfinished" / "a.json").exists():
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(ending)
    _, errors = process.communicate(timeout=30)
    if ending == signal.SIGINT:
        assert process.returncode == 130 and b"Traceback" not in errors
    assert (run / "unfinished").exists()
    assert not any((run / name).exists() for name in ("results.csv", "predictions.csv", "report.html", "run.json"))
    first = (run / "models" / "a" / "model.safetensors").stat().st_mtime_ns
    assert "started with other settings" in kizu(*command[1:], "--seed", "5", "--resume", code=2).stderr
    kizu(*command[1:], "--resume")
    assert (run / "models" / "a" / "model.safetensors").stat().st_mtime_ns == first  # was not learned again
    rows = table(run / "results.csv")
    assert [row["category"] for row in rows] == ["a", "b", "c", "mean"] and not (run / "unfinished").exists()


def test_info_data_and_doctor_speak_to_people_and_programs(trained):
    data, run, _ = trained
    assert "8 good images" in kizu("info", run).stdout
    assert json.loads(kizu("info", run, "--json").stdout)["method"] == "patchcore"
    assert "spot" in kizu("data", data).stdout
    assert json.loads(kizu("data", data, "--json").stdout)["rows"]
    findings = json.loads(kizu("doctor", "--json").stdout)
    assert findings["extra train"] == "installed" and "embedded weights" in findings


def test_a_missing_extra_is_one_sentence(tmp_path):
    blocker = tmp_path / "sitecustomize.py"
    blocker.write_text(
        "import sys\nclass Blocker:\n  def find_spec(self, name, *_):\n"
        "    if name == 'torch': raise ModuleNotFoundError(f'No module named {name}', name=name)\n"
        "sys.meta_path.insert(0, Blocker())\n"
    )
    save(tmp_path / "photos" / "0.png", part(0))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [KIZU, "train", "patchcore", tmp_path / "photos", "--output", tmp_path / "results"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and "pip install 'kizu[train]'" in done.stderr and "Traceback" not in done.stderr
