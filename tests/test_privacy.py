"""Nothing is told to anybody: no host is looked up, no file is written but the model's and the output's."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import kizu
from kizu.export.onnx import export
from test_detectors import GOOD, part

STRACE = shutil.which("strace")
COMMANDS = {
    "predict": ["predict", "onnx", "new", "--csv", "rows.csv", "--overlays", "seen"],
    "watch": ["watch", "new", "--model", "onnx", "--output", "verdicts.jsonl", "--once"],
    "openvino": ["predict", "openvino", "new"],
    "trained": ["predict", "trained", "new"],
    "export": ["export", "trained", "--to", "openvino", "--output", "again"],
}
SLOW = {"openvino", "trained", "export"}
NAMES = [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in COMMANDS]


EXPORTED = Path(__file__).with_name("models_of_0_1") / "patchcore-exported"


@pytest.fixture
def workplace(tmp_path, request):
    """An exported model and photographs; for slow tests, a trained one and its export to OpenVINO too."""
    folder = tmp_path / "workplace"
    (folder / "new").mkdir(parents=True)
    for seed in range(3):
        Image.fromarray(part(seed)).save(folder / "new" / f"{seed}.png")
    shutil.copytree(EXPORTED, folder / "onnx")
    if request.node.get_closest_marker("slow"):
        detector = kizu.PatchCore(size=64, coreset=0.2).fit(GOOD)
        detector.save(folder / "trained")
        export(detector, folder / "openvino", "openvino")
    return folder


def run(name, workplace, home, *tracer):
    done = subprocess.run(
        [*tracer, sys.executable, "-m", "kizu", *COMMANDS[name]],
        cwd=workplace,
        env=os.environ | {"HOME": str(home), "TMPDIR": str(home / "tmp"), "CI": "", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, 1), done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_a_command_leaves_nothing_in_the_users_folders(name, workplace, tmp_path):
    home = tmp_path / "home"
    (home / "tmp").mkdir(parents=True)
    run(name, workplace, home)
    assert [path for path in home.rglob("*") if path.name != "tmp"] == []


@pytest.mark.skipif(STRACE is None, reason="strace is not on PATH")
@pytest.mark.parametrize("name", NAMES)
def test_a_command_opens_no_socket_and_writes_only_what_it_is_asked_for(name, workplace, tmp_path):
    home, trace = tmp_path / "home", tmp_path / "trace"
    (home / "tmp").mkdir(parents=True)
    run(name, workplace, home, STRACE, "-f", "-qq", "-y", "-e", "trace=network,openat,open,creat", "-o", trace)
    lines = trace.read_text(errors="replace").splitlines()
    assert len(lines) > 100
    assert [line for line in lines if "AF_INET" in line] == []
    written = {match[1] for line in lines if (match := re.search(r'"([^"]*)", O_(?:WRONLY|RDWR)[^)]*\) = \d', line))}
    allowed = ("/dev/", "/proc/self/", str(workplace), str(home / "tmp"))
    assert {path for path in written if path.startswith("/") and not path.startswith(allowed)} == set()
