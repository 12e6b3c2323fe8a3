"""How torch's threads share the images of a batch where other programs want the processor too."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from threading import Barrier
from typing import TypeVar, cast

import torch
from torch import Tensor

from kizu.features.matmul import is_traced

__all__ = ["each_image"]

LOAD, TASKS = Path("/proc/loadavg"), Path("/proc/self/task")  # Linux
Made = TypeVar("Made", bound=Sequence[Tensor])  # a list or a tuple


def each_image(network: Callable[[Tensor], Made], images: Tensor) -> Made:
    """What a network makes of images (B, …), tensors with a row an image: `network(images)`.

    Beside busy programs on a CPU, each image has a thread of its own, as many at a time as torch has threads. Threads
    that work on one image together wait for each other at every layer, and there each wait takes until the programs
    had their turns. `benchmarks/busy.py` measures it.
    """
    count = torch.get_num_threads()
    if images.device.type != "cpu" or is_traced() or torch.is_grad_enabled() or count == 1 or not _is_busy():
        return network(images)
    made = list(_workers(count).map(lambda image: _without_gradients(network, image), images.split(1)))
    rows = [torch.cat(of_images) for of_images in zip(*made, strict=True)]
    return cast(Made, rows if isinstance(made[0], list) else tuple(rows))


def _without_gradients(network: Callable[[Tensor], Made], images: Tensor) -> Made:
    with torch.inference_mode():
        return network(images)


def _is_busy() -> bool:
    """Whether other programs want to run now on as many cores as there are."""
    cores = os.cpu_count() or 1
    try:
        running = int(LOAD.read_text().split()[3].partition("/")[0])
        return running > cores and running - sum(map(_runs, TASKS.iterdir())) >= cores
    except (OSError, ValueError, IndexError):
        return False


def _runs(task: Path) -> bool:
    return (task / "stat").read_text().rpartition(")")[2].split()[0] == "R"


@cache
def _workers(count: int) -> ThreadPoolExecutor:
    """So many threads, in each of which torch uses that one alone."""
    all_there = Barrier(count + 1)

    def alone() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # settles it for this thread: what is set later is for others
        all_there.wait()

    workers = ThreadPoolExecutor(count, "image", initializer=alone)
    for _ in range(count):
        workers.submit(int)
    all_there.wait()
    torch.set_num_threads(count)
    return workers


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_workers.cache_clear)  # threads stay with the parent
