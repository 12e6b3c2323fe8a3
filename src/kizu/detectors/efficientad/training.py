"""EfficientAD's training: the teacher's channels measured, then the steps of student and autoencoder (§3.2, §3.3)."""

import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from kizu.config import EfficientADConfig
from kizu.data import streams
from kizu.data.preprocessing import Preprocessing
from kizu.detectors.augmentation import greyed
from kizu.detectors.efficientad.graph import LOSSES, EfficientADGraph
from kizu.detectors.efficientad.teacher import fingerprint
from kizu.detectors.fitting import FitContext
from kizu.features.training_state import Checkpoint

__all__ = ["ChannelStatistics", "Course", "Pace", "along_a_cosine", "arithmetic", "paper_course"]
__all__ += ["penalty_pictures", "penalty_source", "train"]

log = logging.getLogger("kizu")

LEARNING_RATE, WEIGHT_DECAY = 1e-4, 1e-5
WARM_UP = 0.1  # share of the steps until a learning rate along a cosine is the highest
FALL = 0.95  # share of the steps after which the learning rate falls to a tenth
GREY_PENALTY = 0.3  # share of the penalty's photographs that lose their colour
ADVICE = (
    "Fewer `steps` learn less; PatchCore learns from the same photographs in minutes, and judges them faster on a CPU."
)
WORTH_TELLING = 600  # seconds
MEASURED_STEPS = 3  # after the first


@dataclass(frozen=True)
class Course:
    """What is trained, and on what."""

    modules: Mapping[str, nn.Module]
    count: int  # photographs of good parts to learn from
    good: Callable[[Sequence[int], int], Any]  # those at some positions, as `losses` takes them, varied in each turn
    others: Callable[[int], Iterator[Tensor | None]]  # what is no part, a batch a step, from a step on
    losses: Callable[[Any, Tensor | None], Tensor]  # the terms of the loss, in order of LOSSES
    rate: Callable[[int], float]  # the learning rate of a step
    about: Mapping[str, Any] = field(default_factory=dict)  # what must be the same when a training goes on


def train(course: Course, config: EfficientADConfig, context: FitContext, device: torch.device) -> dict[str, Any]:
    """Train; what there is to tell of it."""
    parameters = [parameter for module in course.modules.values() for parameter in module.parameters()]
    optimiser = torch.optim.Adam(parameters, weight_decay=WEIGHT_DECAY)
    about = {"settings": config.model_dump_json(), "images": context.photos.hash, **course.about}
    checkpoint = Checkpoint(context.checkpoint, about, {**course.modules, "optimiser": optimiser})
    start, extra = checkpoint.restore()
    curve: list[list[float]] = extra.get("curve", [])
    sums = torch.tensor(extra.get("sums", [0.0] * len(LOSSES)), dtype=torch.float64, device=device)
    every = max(1, config.steps // 100)
    order, others = streams.shuffled(course.count, config.seed, start * config.batch_size), course.others(start)
    precision = arithmetic(config.precision, device)
    pace = Pace(config.steps - start, device, ADVICE)
    for step in range(start, config.steps):
        for group in optimiser.param_groups:
            group["lr"] = course.rate(step)
        good = course.good([next(order) for _ in range(config.batch_size)], step + 1)
        other = next(others)
        with precision:
            losses = course.losses(good, other)
        optimiser.zero_grad(set_to_none=True)
        losses.sum().backward()
        optimiser.step()
        sums += losses.detach()
        if (step + 1) % every == 0:
            curve.append((sums / every).tolist())
            sums.zero_()
            terms = ", ".join(f"{name} {value:.4f}" for name, value in zip(LOSSES, curve[-1], strict=True))
            log.info("step %d of %d: %s", step + 1, config.steps, terms)
        if checkpoint.due or step + 1 == config.steps:
            checkpoint.write(step + 1, {"curve": curve, "sums": sums.tolist()})
        pace.step()
        context.progress("Training", step + 1, config.steps)
    return {"steps": config.steps, "loss": _first_and_last(curve)}


def paper_course(
    graph: EfficientADGraph, config: EfficientADConfig, count: int, pixels: Callable[[Sequence[int], int], Tensor]
) -> Course:
    """The paper's training of student and autoencoder (§3.2, §3.3).

    `pixels(positions, turn)` gives photographs (B, 3, H, W) of the `count` ones to learn from, varied in each turn.
    """
    device = graph.mean.device
    graph.train()
    graph.teacher.eval()

    def others(start: int) -> Iterator[Tensor | None]:
        pictures = penalty_pictures(config, start, config.batch_size)
        if pictures is None:
            return itertools.repeat(None)
        return (greyed(torch.from_numpy(some).to(device), GREY_PENALTY) for some in pictures)

    return Course(
        {"student": graph.student, "autoencoder": graph.autoencoder},
        count,
        pixels,
        others,
        graph.losses,
        lambda step: LEARNING_RATE * (0.1 if step >= int(FALL * config.steps) else 1),
        {"teacher": fingerprint(graph.teacher)},
    )


def along_a_cosine(step: int, steps: int) -> float:
    """The share of the highest learning rate: it rises over the first tenth of the steps, and falls to nothing."""
    share = (step + 1) / steps
    if share < WARM_UP:
        return share / WARM_UP
    return (1 + math.cos(math.pi * (share - WARM_UP) / (1 - WARM_UP))) / 2


def arithmetic(precision: str, device: torch.device) -> torch.autocast:
    """The context to train in: with `mixed`, convolutions are computed in bfloat16. Warns where that is slow."""
    mixed = precision == "mixed"
    if mixed and device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        log.warning("This processor has no arithmetic for bfloat16: `precision=single` is many times faster here.")
    return torch.autocast(device.type, torch.bfloat16, enabled=mixed)


def penalty_source(config: EfficientADConfig) -> str:
    """What the pictures are that the student shall be silent on."""
    if config.penalty is None:
        return "drawn textures"
    if config.penalty == "none":
        return "none"
    return f"{len(streams.photographs(config.penalty))} photographs in {config.penalty}"


def penalty_pictures(config: EfficientADConfig, start: int, batch_size: int) -> Iterator[npt.NDArray[np.uint8]] | None:
    """Those pictures (B, 3, H, W), a batch a step, from the step `start` on; None where there are to be none."""
    if config.penalty == "none":
        return None
    first = start * batch_size
    if config.penalty is None:
        return streams.endless(streams.drawn(config.seed, first), Preprocessing(config.size), batch_size)
    pictures = streams.cropped(streams.photographs(config.penalty), config.seed, first, crops=False)
    return streams.endless(pictures, Preprocessing(config.size, 2 * max(config.size)), batch_size)


def _first_and_last(curve: Sequence[Sequence[float]]) -> dict[str, list[float]]:
    """Each term of the loss, averaged over the first and the last hundredth of the steps."""
    ends = (curve[0], curve[-1])
    return {name: [round(end[number], 6) for end in ends] for number, name in enumerate(LOSSES)}


class ChannelStatistics:
    """Mean and deviation of each channel over any number of batches, in one pass and double precision (Chan, 1979)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean, self.squares = torch.zeros(()), torch.zeros(())

    def add(self, features: Tensor) -> None:
        """(B, C, h, w)."""
        values = features.transpose(0, 1).flatten(1).double()
        count, mean = values.shape[1], values.mean(1)
        total = self.count + count
        apart = mean - self.mean.to(mean)
        self.squares = self.squares.to(mean) + values.sub(mean[:, None]).square().sum(1)
        self.squares += apart.square() * self.count * count / total
        self.mean = self.mean.to(mean) + apart * count / total
        self.count = total

    def result(self) -> tuple[Tensor, Tensor]:
        """Mean (C,) and population deviation (C,), 1 for a channel that is constant; float32."""
        deviation = (self.squares / self.count).sqrt().float()
        return self.mean.float(), deviation.masked_fill(deviation < 1e-6, 1.0)


class Pace:
    """Measures the first steps and says what all of them will take where there is no GPU."""

    def __init__(self, steps: int, device: torch.device, advice: str) -> None:
        self.left, self.device, self.advice = steps, device, advice
        self.taken, self.started = 0, 0.0

    def step(self) -> None:
        """A step is done."""
        self.taken += 1
        if self.taken == 1:
            self.started = time.perf_counter()
        elif self.taken == 1 + MEASURED_STEPS and self.device.type == "cpu":
            each = (time.perf_counter() - self.started) / MEASURED_STEPS
            if (total := each * self.left) > WORTH_TELLING:
                duration = f"{total / 60:.0f} minutes" if total < 2 * 3600 else f"{total / 3600:.1f} hours"
                log.warning(
                    "There is no GPU that torch can use: %s steps of %.1f s take about %s. %s",
                    *(f"{self.left:,}", each, duration, self.advice),
                )
