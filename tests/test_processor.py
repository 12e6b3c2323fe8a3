"""kizu's threads leave the processor to others while they wait."""

import os

import pytest

from kizu.inference import processor
from processes import python


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_torchs_threads_wait_asleep_unless_the_user_wants_it_otherwise(given, expected):
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {name: value for name, value in os.environ.items() if name not in names} | given
    done = python("-c", "import os, kizu; print(os.environ.get('GOMP_SPINCOUNT'))", env=environment)
    assert done.stdout.strip() == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("max 100000", 8), ("150000 100000", 2), ("10000 100000", 1), ("odd", 8), ("800000 100000", 8)],
)
def test_cores_are_those_that_the_control_group_gives(text, expected, tmp_path, monkeypatch):
    (tmp_path / "cpu.max").write_text(text)
    monkeypatch.setattr(processor, "QUOTAS", (str(tmp_path / "cpu.max"), str(tmp_path / "none")))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert processor.cores() == expected
    (tmp_path / "cpu.max").unlink()
    assert processor.cores() == 8
