"""The suite's tests of a GPU, and then those of the methods, which learn and judge on it where there is one."""

import os
from collections import Counter
from pathlib import Path
from typing import Any

from on_gpu.measure import Job

TESTS = Path(__file__).parents[2] / "tests"
OF_GPU = "test_cuda.py"
OF_METHODS = ("test_distillation.py", "test_simplenet.py", "test_puad.py", "test_efficientad.py", "test_patchcore.py")


def run(job: Job) -> None:
    try:
        import pytest
    except ModuleNotFoundError:
        job.row("tests", remark="left out: pytest is not installed, and the pack has no wheel of it")
        return
    os.environ["KIZU_TEST_DEVICE"] = job.device_name
    os.chdir(TESTS.parent)
    for name in (OF_GPU, *OF_METHODS) if job.full else (OF_GPU,):
        if job.left() < 3:
            job.row(name, remark="left out: the time was over")
            continue
        heard = Heard(job, name)
        # warnings are errors in the versions that the suite is kept with, which are others here
        options = [] if job.full else ["-k", "backbone or nearest"]
        options += ["-p", "no:cacheprovider", "--override-ini", "filterwarnings=default", "--capture=sys", "-q"]
        code = pytest.main([*options, "--tb=no", "--no-header", "--no-summary", str(TESTS / name)], plugins=[heard])
        heard.tell(int(code))


class Heard:
    """A plug-in of pytest that makes rows: of each test that fails, and the count of all."""

    def __init__(self, job: Job, name: str) -> None:
        self.job, self.name = job, name
        self.counts: Counter[str] = Counter()
        self.reasons: set[str] = set()
        self.stopped = False

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            message = getattr(crash, "message", str(report.longrepr)).splitlines() or [""]
            self.job.row(self.name, report.nodeid.partition("::")[2], value="failed", remark=message[0][:200])
        if report.skipped and isinstance(report.longrepr, tuple):
            self.reasons.add(report.longrepr[2].removeprefix("Skipped: "))

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            lines = str(report.longrepr).splitlines() or [""]
            self.job.row(self.name, "cannot be read", value="failed", remark=lines[-1][:200])

    def pytest_runtest_logfinish(self, nodeid: str, location: Any) -> None:
        if self.job.left() < 1:
            self.stopped = True

    def pytest_runtest_protocol(self, item: Any, nextitem: Any) -> None:
        if self.stopped:
            item.session.shouldstop = "the time was over"

    def tell(self, code: int) -> None:
        counts = ", ".join(f"{number} {outcome}" for outcome, number in self.counts.items())
        remarks = [*sorted(self.reasons), *(["stopped: the time was over"] if self.stopped else [])]
        self.job.row(self.name, value=counts or f"pytest ended with {code}", remark="; ".join(remarks)[:300])
