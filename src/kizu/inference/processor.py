"""How kizu's threads share the processor with whatever else runs on the machine."""

import math
import os
from pathlib import Path

__all__ = ["cores", "share", "use"]

SPINS = "1000"  # turns that a thread waits awake for the others (libgomp): some microseconds, instead of milliseconds
NO_LIMIT = 1 << 16
QUOTAS = ("/sys/fs/cgroup/cpu.max", "/sys/fs/cgroup/cpu/cpu.cfs_quota_us")
_most = NO_LIMIT


def cores() -> int:
    """How many cores this process may use, by what it is bound to and by the time that its control group is given."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(bound, _quota(), _most))


def use(count: int) -> None:
    """Have models that this process loads from now on use so many cores at most: others of its kind have the rest."""
    global _most
    _most = count


def share() -> None:
    """Have torch's threads, once it is imported, give way to other programs.

    Threads that wait awake for one that is not scheduled take the time that it waits for: beside two busy programs on
    two cores, a photograph takes 40 times as long. Whoever sets OMP_WAIT_POLICY, GOMP_SPINCOUNT or OMP_NUM_THREADS is
    left alone. `benchmarks/busy.py` measures it.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    if _quota() < (os.cpu_count() or 1):
        os.environ.setdefault("OMP_NUM_THREADS", str(cores()))


def _quota() -> int:
    """Cores' worth of time that the control group may have, rounded up; a large number where it has no limit."""
    try:
        unified = Path(QUOTAS[0])
        if unified.exists():
            quota, period = unified.read_text().split()
        else:
            quota, period = (
                Path(QUOTAS[1]).with_name(f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period")
            )
        return max(1, math.ceil(int(quota) / int(period))) if int(quota) > 0 else NO_LIMIT
    except (OSError, ValueError):
        return NO_LIMIT
