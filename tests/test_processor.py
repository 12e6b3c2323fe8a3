"""kizu's threads leave the processor to others while they wait."""

import os
import sys
import time
from subprocess import Popen
from threading import get_ident

import pytest
import torch

from kizu.features import threads
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


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", [list, tuple])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_beside_busy_programs_each_image_has_a_thread_of_its_own(count, kind, two_threads, monkeypatch):
    seen = []

    def network(images):
        seen.append((len(images), torch.get_num_threads(), get_ident() == here, torch.is_inference_mode_enabled()))
        return kind((images.sum((1, 2, 3)), images * 2))

    here, images = get_ident(), torch.rand(count, 3, 4, 5)
    with torch.inference_mode():
        monkeypatch.setattr(threads, "_is_busy", lambda: False)
        expected = threads.each_image(network, images)
        monkeypatch.setattr(threads, "_is_busy", lambda: True)
        got = threads.each_image(network, images)
    assert type(got) is kind
    assert all(map(torch.equal, got, expected))
    assert seen == [(count, 2, True, True)] + [(1, 1, False, True)] * count
    assert torch.get_num_threads() == 2


def test_an_error_of_one_image_is_that_of_the_batch(two_threads, monkeypatch):
    monkeypatch.setattr(threads, "_is_busy", lambda: True)

    def network(images):
        if images.max() > 0:
            raise ValueError("this one")
        return [images]

    with torch.inference_mode(), pytest.raises(ValueError, match="this one"):
        threads.each_image(network, torch.eye(3).view(3, 1, 1, 3) * torch.tensor([0.0, 1.0, 0.0]))


@pytest.mark.skipif(not threads.LOAD.exists(), reason="only Linux says how many programs want to run")
def test_other_programs_that_compute_are_noticed():
    programs = [Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in range(2 * (os.cpu_count() or 1))]
    try:
        deadline = time.monotonic() + 20
        while not threads._is_busy():
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        for program in programs:
            program.kill()
            program.wait()
