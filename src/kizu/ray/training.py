"""PatchCore learned from shards of the photographs, each of them a task of a cluster in every step."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from kizu.config import Config, PatchCoreConfig
from kizu.data.dataset import Dataset
from kizu.detectors.patchcore.sharded import Shard, ShardedPatchCore, Step, check_shardable, number_of_shards
from kizu.errors import DataError, KizuError, require
from kizu.evaluation.experiment import Learner
from kizu.inference import processor

__all__ = ["as_tasks", "learner"]

RETRIES = 3  # of a shard whose worker died


def learner(config: Config, data: Dataset, shards: int | None = None) -> Learner:
    """Who learns the categories of a data set in so many shards each, on the cluster that this process belongs to.

    By default a shard has a hundred photographs. Their number alone decides which are in it: neither the cluster nor
    what happens to it changes the model. Raises `OptionError` for settings that cannot be learned so.
    """
    assert isinstance(config, PatchCoreConfig)
    check_shardable(config)
    photographs = {category: len(data.select(category, "train")) for category in data.categories}
    return Learner(
        lambda config: ShardedPatchCore(config, shards, as_tasks),
        {"shards": {category: number_of_shards(count, shards) for category, count in photographs.items() if count}},
    )


def as_tasks(step: Step, detector: ShardedPatchCore, shards: Sequence[Shard], done: Callable[[int], None]) -> list[Any]:
    """What a step gives for each shard, as a task with a core, and a GPU where the cluster has some.

    `done` hears the number of each shard that is finished. Ray repeats a task whose worker died. Raises `DataError` for
    a shard that cannot be learned from, or whose workers keep dying.
    """
    ray = require("ray")
    gpus = 1 if ray.cluster_resources().get("GPU", 0) else 0
    task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=RETRIES)(_of_shard)
    common = ray.put(detector)
    waiting = {task.remote(step, common, shard): number for number, shard in enumerate(shards)}
    results: list[Any] = [None] * len(shards)
    try:
        while waiting:
            (finished, *_), _ = ray.wait(list(waiting), num_returns=1)
            number = waiting.pop(finished)
            results[number] = _result(ray, finished, shards[number])
            done(number)
    finally:
        for task in waiting:
            ray.cancel(task)
    return results


def _result(ray: Any, finished: Any, shard: Shard) -> Any:
    try:
        result, problem = ray.get(finished)
    except ray.exceptions.RayError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        first, last = shard.numbers[0] + 1, shard.numbers[-1] + 1
        why = (
            lines[-1] if isinstance(error, ray.exceptions.RayTaskError) and lines else "its worker died again and again"
        )
        raise DataError(f"The shard of photographs {first} to {last} cannot be learned from: {why}") from None
    if problem:
        raise DataError(problem)
    return result


def _of_shard(step: Step, detector: ShardedPatchCore, shard: Shard) -> tuple[Any, str]:
    """Runs on a worker; returns what the step gives, and the problem, if there is one."""
    processor.use(1)
    torch.set_num_threads(1)  # the last digit of a sum may depend on it
    detector.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return step(detector, shard), ""
    except KizuError as error:
        return None, str(error)
