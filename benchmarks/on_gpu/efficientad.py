"""EfficientAD-S and -M: an image's time beside an equal network in plain torch, and a training step's."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kizu.config import EfficientADConfig
from kizu.detectors.efficientad import graph as graph_module
from kizu.detectors.efficientad.graph import EfficientADGraph
from kizu.detectors.efficientad.networks import MEAN, PDN, STD
from on_gpu.measure import Job, Variant, first_line, measure, seconds, shown
from on_gpu.plain import WIDTHS, PlainEfficientAD

SIDE = 256
RUN = (
    Variant("strict float32", strict=True),
    Variant("as it comes"),
    Variant("bf16", bf16=True),
    Variant("CUDA graph, bf16", captured=True, bf16=True),
)
COMPILED = (Variant("compiled, CUDA graph, bf16", compiled=True, captured=True, bf16=True),)
SMALL = (Variant("as it comes"), Variant("bf16", bf16=True))


def run(job: Job) -> None:
    sizes, batches = (("s", "m"), (1, 16, 64)) if job.full else (("s", "m"), (1,))
    for size in sizes:
        for measured in (training_steps, predictions):
            try:
                measured(job, size, batches)
            except Exception as error:  # the others go on
                job.row(f"{measured.__name__}, {size.upper()}", remark=first_line(error))
    if job.full:
        for size in sizes:
            graph = made(job, size, "stretch")
            with constants(job.device):
                measure(job, f"{size.upper()}, kizu, whole map", graph, partial(images, job.device), (1, 16), COMPILED)


def narrow(job: Job, size: str, channels: int = 16) -> tuple[Any, ...]:
    """In a rehearsal, few channels instead of the published ones."""
    return () if job.full else (channels, (8,) * len(WIDTHS[size]))


def made(job: Job, size: str, border: str) -> EfficientADGraph:
    """Random weights, which cost as much as trained ones."""
    torch.manual_seed(0)
    config = EfficientADConfig(network=size, teacher="any", border=border)
    graph = EfficientADGraph(config, PDN(size, *narrow(job, size))).to(job.device)  # type: ignore[arg-type]
    graph.levels[:, 1] = 1.0
    return graph.eval().requires_grad_(False)


def made_plain(job: Job, size: str) -> PlainEfficientAD:
    return PlainEfficientAD(size, *narrow(job, size)).to(job.device).eval().requires_grad_(False)


def images(device: torch.device, batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randint(0, 256, (batch, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator).to(device)


@contextmanager
def constants(device: torch.device) -> Iterator[None]:
    """Mean and deviation of ImageNet made once: in kizu each call makes them, which no CUDA graph can record."""
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) * 255 for values in (MEAN, STD))
    before = graph_module.normalised

    def normalised(pixels: Tensor) -> Tensor:
        return (pixels.contiguous(memory_format=torch.channels_last).float() - mean) / std

    graph_module.normalised = normalised
    try:
        yield
    finally:
        graph_module.normalised = before


class ChannelsLast(nn.Module):
    """A network with its weights and inputs so."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.to(memory_format=torch.channels_last)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        scored: tuple[Tensor, Tensor] = self.network(pixels.contiguous(memory_format=torch.channels_last))
        return scored


def predictions(job: Job, size: str, batches: tuple[int, ...]) -> None:
    """kizu's graph with the published 56 × 56 features (`border="stretch"`) is equal to the plain network."""
    graph = made(job, size, "stretch")
    plain = made_plain(job, size).take(graph)
    make, variants, name = partial(images, job.device), RUN if job.full else SMALL, size.upper()
    with constants(job.device):
        measure(job, f"{name}, plain torch", plain, make, batches, variants, reference=graph)
        measure(job, f"{name}, kizu, whole map", graph, make, batches, variants, reference=plain)
        if job.full:
            framed = made(job, size, "picture")
            measure(job, f"{name}, kizu, default border", framed, make, batches, variants)
    if job.full:
        last = ChannelsLast(made_plain(job, size).take(graph))
        measure(job, f"{name}, plain torch, channels last", last, make, batches, variants[1:3], reference=graph)


def training_steps(job: Job, size: str, batches: tuple[int, ...]) -> None:
    """Steps a second on images that lie on the GPU: student and autoencoder, a picture of other things for each."""
    for batch in batches[:2]:
        good, others = images(job.device, batch), images(job.device, batch)
        graph = made(job, size, "picture")
        plain = made_plain(job, size)
        steps: dict[str, tuple[nn.Module, Callable[[], Tensor]]] = {
            "plain torch": (plain, partial(plain.losses, good, others)),
            "kizu": (graph, partial(graph.losses, good, others)),
        }
        for name, (module, losses) in steps.items():
            for precision in ("single", "mixed") if job.full else ("single",):
                if job.left() < 1:
                    job.row(
                        f"{size.upper()}, training step", f"{name}, {precision}", remark="left out: the time was over"
                    )
                    continue
                each = seconds(stepping(module, losses, precision, job.device), job.device, job.longest)
                what = f"{size.upper()}, training step"
                each_shown = {"batch": str(batch), "rate": shown(1 / each)}
                job.number(what, 1000 * each, "ms / step", f"{name}, {precision}", **each_shown)


def stepping(
    module: nn.Module, losses: Callable[[], Tensor], precision: str, device: torch.device
) -> Callable[[], None]:
    """One step of training."""
    module.train()
    parts = [getattr(module, name).requires_grad_(True) for name in ("student", "autoencoder")]
    optimiser = torch.optim.Adam([p for part in parts for p in part.parameters()], lr=1e-4, weight_decay=1e-5)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "mixed"):
            loss = losses().sum()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()

    return step
