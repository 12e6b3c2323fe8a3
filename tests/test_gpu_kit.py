"""benchmarks/gpu.py, rehearsed on the CPU: the pack, every part in its smallest form, and parts that fail."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

GPU = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
SECONDS = 150  # beside other tests; alone, it needs 20
PARTS = ("machine", "tests", "patchcore", "efficientad", "simplenet", "teacher", "training")
ALL_NEED_CUDA = "a CUDA graph needs CUDA"
pytestmark = pytest.mark.slow


def gpu(*arguments):
    return subprocess.run([sys.executable, GPU, *map(str, arguments)], capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def pack(real_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu") / "kit"
    made = gpu(
        "pack", folder, "--data", real_data, "--weights", real_data.parent / "weights", "--pictures", 20, "--no-wheels"
    )
    assert made.returncode == 0, made.stderr
    return folder


def test_a_pack_has_all_photographs_small(pack, real_data):
    for category, place in (("bottle", "mvtec_ad/bottle"), ("juice_bottle", "mvtec_loco/juice_bottle")):
        originals = {
            path.relative_to(real_data / place).with_suffix("") for path in (real_data / place).rglob("*.[jp][pn]g")
        }
        small = pack / "photographs" / category
        assert {path.relative_to(small).with_suffix("") for path in small.rglob("*.[jp][pn]g")} == originals
    assert len(list((pack / "natural").iterdir())) == 20
    again = gpu("pack", pack, "--data", real_data)
    assert again.returncode and "holds something already" in again.stderr


def test_every_part_runs_in_its_smallest_form(pack, tmp_path):
    run = gpu("--device", "cpu", "--seconds", SECONDS, "--pack", pack, "--output", tmp_path)
    assert run.returncode == 0, run.stderr
    rows = list(csv.DictReader((tmp_path / "gpu-rehearsal.csv").read_text().splitlines()))
    for part in PARTS:
        own = [row for row in rows if row["part"] == part]
        assert [row for row in own if row["what"] != "seconds" and row["value"]], part
        wrong = [row["remark"] for row in own if ("Error" in row["remark"] or row["what"] == "part")]
        assert [remark for remark in wrong if ALL_NEED_CUDA not in remark] == []
    tests = next(row for row in rows if row["what"] == "test_cuda.py")
    assert "passed" in tests["value"] and "failed" not in tests["value"]
    for row in rows:  # what computes the same, computes the same
        if row["off"] and "bf16" not in row["variant"]:
            assert abs(float(row["off"])) < 1e-4, row
    for size in ("s", "m"):
        with safe_open(tmp_path / "gpu-teachers" / f"efficientad-{size}.safetensors", "pt") as teacher:
            assert all(str(teacher.get_tensor(key).dtype) == "torch.float16" for key in teacher.keys())  # noqa: SIM118
    assert sum(float(row["value"]) for row in rows if row["what"] == "seconds") < SECONDS


FAILING = """
import sys, time
from pathlib import Path
sys.path.insert(0, {folder!r})
import gpu
from on_gpu.measure import Job

def fails(job):
    job.row("first", value="1")
    raise RuntimeError("the device is gone")

def hangs(job):
    job.row("second", value="2")
    time.sleep(60)

def dies(job):
    import os
    os.abort()

def works(job):
    job.row("third", value="3")

for part in (fails, hangs, dies, works):
    start = time.monotonic()
    rows = []
    problem = gpu.apart(part, Job(part.__name__, "cpu", Path(), Path(), start + 1), start + 1.5, rows.append)
    took = time.monotonic() - start
    print("|".join([part.__name__, problem, *(row.what + row.remark for row in rows), str(took < 4)]))
"""


def test_a_part_that_fails_hangs_or_dies_takes_nothing_with_it():
    ran = subprocess.run(
        [sys.executable, "-c", FAILING.format(folder=str(GPU.parent))], capture_output=True, text=True, timeout=120
    )
    assert ran.stdout.splitlines() == [
        "fails|its process ended with 1|first|partRuntimeError: the device is gone|True",
        "hangs|stopped: its share of the time was over|second|True",
        "dies|its process ended with -6|True",
        "works||third|True",
    ], ran.stderr
