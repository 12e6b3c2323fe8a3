"""A small form of what benchmarks/breaking.py tries: it must find nothing, and find what is there."""

import importlib.util
import random
import sys
from collections import Counter
from pathlib import Path

import pytest

import kizu

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
KILLED = ("kill-update", "kill-tune", "kill-export", "kill-train", "kill-watch")
SMALL = {"images": 300, "flips": 20, "requests": 200, "disks": 1} | dict.fromkeys(KILLED, 2)


@pytest.fixture(scope="module")
def breaking():
    spec = importlib.util.spec_from_file_location("breaking", BENCHMARKS / "breaking.py")
    module = importlib.util.module_from_spec(spec)
    sys.path.append(str(BENCHMARKS))  # for what it imports
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bench(breaking, tmp_path_factory):
    pytest.importorskip("onnxscript")
    return breaking.Bench(tmp_path_factory.mktemp("bench"), random.Random(0))


@pytest.mark.parametrize("part", ["images", "requests"])
def test_nothing_breaks(part, breaking, bench):
    found = breaking.PARTS[part][0](bench, SMALL[part])
    assert found.pop("tried") >= SMALL[part] and found == Counter()


@pytest.mark.slow
@pytest.mark.parametrize("part", ["flips", *KILLED, "disks"])
def test_nothing_breaks_in_minutes(part, breaking, bench):
    found = breaking.PARTS[part][0](bench, SMALL[part])
    assert found.pop("tried") >= SMALL[part] and found == Counter()


def test_what_breaks_is_found(breaking, bench, monkeypatch):
    """The counts are no decoration."""
    monkeypatch.setattr(breaking.kizu, "load", lambda folder: None)
    assert breaking.flips(bench, 1)["accepted in model.json"] == 2
    monkeypatch.undo()
    (bench.exported / "model.onnx").write_bytes(b"")
    with pytest.raises(kizu.ModelError):
        kizu.load(bench.exported)
    assert breaking.images(bench, 5)["photographs without a row"] == 5
