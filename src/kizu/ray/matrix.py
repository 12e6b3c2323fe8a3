"""The cells of a matrix of methods as tasks of a cluster."""

from collections.abc import Iterator, Sequence
from typing import Any

from kizu.errors import require
from kizu.evaluation.comparison.matrix import Cell, Outcome, carry_out

__all__ = ["as_tasks"]

RETRIES = 3  # of a cell whose worker died


def as_tasks(cells: Sequence[Cell]) -> Iterator[Outcome]:
    """Each cell as a task with a core, and a GPU where the cluster has some, in the order in which they are finished.

    The runs' folders and the data lie where every machine of the cluster finds them under the same path. Ray repeats a
    cell whose worker died, which goes on in the cell's folder; one that keeps dying says so.
    """
    ray = require("ray")
    gpus = 1 if ray.cluster_resources().get("GPU", 0) else 0
    task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=RETRIES)(_carried_out)
    data = {id(cell.data): cell.data for cell in cells}
    stored = {key: ray.put(value) for key, value in data.items()}
    waiting = {task.remote(_without_data(cell), stored[id(cell.data)]): cell for cell in cells}
    while waiting:
        (done, *_), _ = ray.wait(list(waiting), num_returns=1)
        cell = waiting.pop(done)
        try:
            yield Outcome(cell, ray.get(done))
        except ray.exceptions.RayError as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            yield Outcome(cell, f"its worker died {RETRIES + 1} times ({lines[0] if lines else type(error).__name__})")


def _without_data(cell: Cell) -> dict[str, Any]:
    """What travels with a task: the data set of a category is stored once for all of its cells."""
    names = ("method", "setting", "config", "folder", "fingerprint")
    return {name: getattr(cell, name) for name in names}


def _carried_out(cell: dict[str, Any], data: Any) -> str:
    """Runs on a worker; returns the problem, if there is one."""
    return carry_out(Cell(data=data, **cell)).problem
