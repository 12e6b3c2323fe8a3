"""PatchCore's parts: features, coreset, search, the whole fit, and judging."""

import copy
import os
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn

import kizu
from kizu.data import dataset
from kizu.data.sample import Sample
from kizu.detectors.patchcore.coreset import select
from kizu.detectors.patchcore.nearest import nearest
from kizu.evaluation.metrics import ranking
from kizu.features import backbone
from kizu.features.patch_features import PatchFeatures, as_rows
from on_gpu.measure import (
    VARIANTS,
    Job,
    Variant,
    captured,
    elapsed,
    first_line,
    measure,
    products,
    seconds,
    shown,
)
from on_gpu.pack import WEIGHTS, few, photographs

ROWS, DIMENSION, PICKS = 160_000, 384, 16_000
TRIAL = 500  # picks of the plain loop that say how long all of them take
COMPARED = 500  # first picks that are compared one by one


def run(job: Job) -> None:
    for measured in (whole, features, search, coreset, compiled):
        try:
            measured(job)
        except Exception as error:  # the others go on
            job.row(measured.__name__, remark=first_line(error))


@cache
def network_of(name: str, pack: Path) -> backbone.Backbone:
    if name == "resnet18":
        return backbone.create(name, ("layer2", "layer3"), str(pack / WEIGHTS))
    return backbone.create(name)


def names(job: Job) -> list[str]:
    return ["efficientnet_lite2", *(["resnet18"] if job.full and (job.pack / WEIGHTS).exists() else [])]


class NetworkAlone(nn.Module):
    """A backbone's network on normalised float images (B, 3, H, W), in one of both memory formats."""

    def __init__(self, network: nn.Module, memory_format: torch.memory_format) -> None:
        super().__init__()
        self.network, self.memory_format = network, memory_format
        self.network.to(memory_format=memory_format)

    def forward(self, images: Tensor) -> list[Tensor]:
        images = images.contiguous(memory_format=self.memory_format)
        maps: list[Tensor] = self.network(images.to(next(self.network.parameters()).dtype))
        return maps


def features(job: Job) -> None:
    """The network alone: what memory format and arithmetic bring. kizu's is channels last."""
    side, batches = (320, (1, 32)) if job.full else (64, (1,))
    kept = (
        Variant("strict float32", strict=True),
        Variant("as it comes"),
        Variant("bf16", bf16=True),
        Variant("CUDA graph", captured=True),
    )
    make = partial(noise, side, job.device)
    for name in names(job):
        network = network_of(name, job.pack).network.to(job.device)
        for layout in (torch.contiguous_format, torch.channels_last):
            what = f"{name}, {str(layout).removeprefix('torch.').replace('_', ' ')}"
            measure(job, what, NetworkAlone(copy.deepcopy(network), layout), make, batches, kept)
        exact, half = (NetworkAlone(copy.deepcopy(network), torch.channels_last) for _ in range(2))
        variants = (Variant("bf16 weights"), Variant("CUDA graph, bf16 weights", captured=True))
        measure(job, f"{name}, channels last", half.bfloat16(), make, batches, variants, reference=exact)


def noise(side: int, device: torch.device, batch: int) -> Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(batch)).to(device)


@cache
def rows_of(job: Job) -> Tensor:
    """Patch features (N, 384) of photographs of bottles, by ResNet-18; random ones where its weights are missing."""
    count, dimension = (ROWS, DIMENSION) if job.full else (2000, 32)
    if "resnet18" not in names(job):
        job.row("rows", value=f"{count} × {dimension}", remark="random")
        centres = torch.randn(max(8, count // 64), dimension, generator=torch.Generator().manual_seed(0))
        spread = 0.3 * torch.randn(count, dimension, generator=torch.Generator().manual_seed(1))
        return (centres.repeat(-(-count // len(centres)), 1)[:count] + spread).to(job.device)
    detector = kizu.PatchCore()
    good, _ = dataset_of(job, most=count // 1600 + 1)
    photos, _ = detector.read(good, 10**10)
    network, pooled = network_of("resnet18", job.pack).to(job.device), PatchFeatures(3)
    with torch.inference_mode(), photos:
        maps = [as_rows(pooled(network(pixels))) for _, pixels in detector.stream(photos, "", lambda *_: None)]
    job.row("rows", value=f"{count} × {dimension}", remark="ResNet-18's features of bottles")
    return torch.cat(maps)[:count].contiguous()


def coreset(job: Job) -> None:
    """kizu's choice against the paper's loop (Algorithm 1) in plain torch, eager and as a CUDA graph."""
    rows = rows_of(job)
    count = PICKS if job.full else 100
    what = f"coreset of {len(rows)} × {rows.shape[1]} to {count}"
    with torch.inference_mode():
        select(rows[:5000], 50)
        found = []
        took = elapsed(lambda: found.append(select(rows, count)), job.device)
        chosen = found[0].indices.to(rows.device)
        job.number(what, took, "s", "kizu", rate=shown(count / took), off="0", remark=f"radius {found[0].radius:.5g}")
        plain: dict[str, Callable[[Tensor, int], Tensor]] = {
            "plain loop": plain_loop,
            "plain loop, bf16": lambda rows, count: plain_loop(rows.bfloat16(), count),
            "plain loop, TF32": with_tf32,
            "plain loop, CUDA graph": captured_loop,
            "plain loop, CUDA graph, bf16": lambda rows, count: captured_loop(rows.bfloat16(), count),
        }
        for name, choose in plain.items():
            try:
                estimate = elapsed(partial(choose, rows, min(TRIAL, count)), job.device) * count / min(TRIAL, count)
                if estimate > job.left() / 2:
                    job.number(what, estimate, "s", name, remark=f"extrapolated from {min(TRIAL, count)} picks")
                    continue
                picks: list[Tensor] = []
                took = elapsed(lambda choose=choose, picks=picks: picks.append(choose(rows, count)), job.device)
                same = float((picks[0][:COMPARED] == chosen[:COMPARED]).float().mean())
                radius = cover_radius(rows, picks[0])
                remark = f"radius {radius:.5g}; {100 * same:.0f} % of the first {min(COMPARED, count)} picks the same"
                off = f"{radius / found[0].radius - 1:+.1e}"
                job.number(what, took, "s", name, rate=shown(count / took), off=off, remark=remark)
            except Exception as error:
                job.row(what, name, remark=first_line(error))


def cover_radius(rows: Tensor, picks: Tensor) -> float:
    return float(nearest(rows, rows[picks])[0].max())


class Greedy:
    """The paper's loop: pick the farthest row, take the minimum of distances. It never waits for the GPU."""

    def __init__(self, rows: Tensor, count: int) -> None:
        self.rows, self.half_norms = rows, rows.float().square().sum(1) / 2
        mean = rows.float().mean(0)
        self.pick = (rows.float() - mean).norm(dim=1).argmax().view(1)
        self.nearest = torch.full_like(self.half_norms, torch.inf)  # ‖row − nearest pick‖² / 2
        self.picks = torch.zeros(count, dtype=torch.long, device=rows.device)
        self.number = torch.zeros(1, dtype=torch.long, device=rows.device)

    def step(self) -> None:
        self.picks.index_copy_(0, self.number, self.pick)
        similar = (self.rows @ self.rows.index_select(0, self.pick)[0]).float()
        squares = self.half_norms + self.half_norms.index_select(0, self.pick) - similar
        torch.minimum(self.nearest, squares, out=self.nearest)
        self.nearest.index_fill_(0, self.pick, -1.0)
        torch.argmax(self.nearest, dim=0, keepdim=True, out=self.pick)
        self.number += 1


def plain_loop(rows: Tensor, count: int) -> Tensor:
    greedy = Greedy(rows, count)
    for _ in range(count):
        greedy.step()
    return greedy.picks


def with_tf32(rows: Tensor, count: int) -> Tensor:
    with products(convolutions=True, matrices=True):
        return plain_loop(rows, count)


def captured_loop(rows: Tensor, count: int) -> Tensor:
    greedy = Greedy(rows, count)
    first = greedy.pick.clone()
    replay = captured(lambda _: greedy.step(), first)
    greedy.nearest.fill_(torch.inf)
    greedy.pick.copy_(first)
    greedy.number.zero_()
    for _ in range(count):
        replay(first)
    return greedy.picks


def search(job: Job) -> None:
    """The nearest of the bank's entries: kizu's search and other ways to it, for one photograph and for 32."""
    rows = rows_of(job)
    patches, banks = (1600, PICKS) if job.full else (64, 256)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).to(rows.device)
    entries, queries = rows[order[:banks]].contiguous(), rows[order[banks:]]
    half_norms = entries.square().sum(1) / 2
    halved = entries.bfloat16()

    def in_one_product(asked: Tensor) -> tuple[Tensor, Tensor]:
        found = torch.addmm(-half_norms, asked, entries.T).argmax(1)
        return (asked - entries[found]).norm(dim=1), found

    def in_halves(asked: Tensor) -> tuple[Tensor, Tensor]:
        found = ((asked.bfloat16() @ halved.T).float() - half_norms).argmax(1)
        return (asked - entries[found]).norm(dim=1), found

    def by_cdist(asked: Tensor) -> tuple[Tensor, Tensor]:
        distances, found = torch.cdist(asked, entries).min(1)
        return distances, found

    def kizus(asked: Tensor) -> tuple[Tensor, Tensor]:
        distances, found = nearest(asked, entries, half_norms=half_norms)
        return distances[:, 0], found[:, 0]

    ways: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
        "kizu": kizus,
        "kizu, TF32": kizus,
        "cdist": by_cdist,
        "one product": in_one_product,
        "one product, TF32": in_one_product,
        "one product in bf16": in_halves,
        "kizu, CUDA graph": kizus,
        "one product in bf16, CUDA graph": in_halves,
    }
    with torch.inference_mode():
        for batch in (1, 32) if job.full else (1,):
            asked = queries[: batch * patches].contiguous()
            expected = kizus(asked)[1].clone()
            for name, way in ways.items():
                try:
                    with products(convolutions=True, matrices="TF32" in name):
                        run = captured(way, asked) if "CUDA graph" in name else way
                        other = float((run(asked)[1] != expected).float().mean())
                        ms = 1000 * seconds(lambda run=run, asked=asked: run(asked), job.device, job.longest) / batch
                    what = f"search of {patches} patches an image in {banks}"
                    rate = shown(1000 / ms)
                    job.number(what, ms, "ms / image", name, batch=str(batch), rate=rate, off=f"{other:.1e}")
                except Exception as error:
                    job.row(f"search in {banks}", name, batch=str(batch), remark=first_line(error))


def dataset_of(job: Job, most: int = 10**6, category: str = "bottle") -> tuple[list[Sample], list[Sample]]:
    """Good photographs to learn from, and test photographs; a few of each in a rehearsal."""
    data = dataset.find(photographs(job.pack, category))
    train, test = list(data.select(split="train")), list(data.select(split="test"))
    if job.full:
        return train[:most], test
    bad, good = ([s for s in test if (s.defect != "good") is kind] for kind in (True, False))
    return few(train, 8), few(bad, 3) + few(good, 3)


@cache
def fitted(job: Job, number: int) -> kizu.PatchCore:
    """One of several detectors that were fitted in the same way."""
    detector = kizu.PatchCore(size=320 if job.full else 64)
    detector.device = job.device
    good, _ = dataset_of(job)
    detector.fit(good)
    return detector


def whole(job: Job) -> None:
    """kizu's defaults on bottles: fit, stage by stage, AUROC, and judging at batch 1 and 32."""
    good, test = dataset_of(job)
    if job.full:
        fitted(job, 1)  # so that libraries are loaded
    detector = fitted(job, 0)
    for stage, took in detector.seconds.items():
        job.number(f"fit of {len(good)} photographs", took, "s", stage)
    job.number(f"fit of {len(good)} photographs", sum(detector.seconds.values()), "s", "all stages")
    judged = [(s.defect != "good", outcome.score) for s, outcome in detector.judge(test)]  # type: ignore[union-attr]
    labels, scores = zip(*judged, strict=True)
    job.number(f"image AUROC on {len(test)} photographs", auroc(scores, labels), "")
    for workers in dict.fromkeys((2, min(16, os.cpu_count() or 2)) if job.full else (2,)):
        took = elapsed(lambda workers=workers: list(detector.judge(test, workers=workers)), job.device)
        each = 1000 * took / len(test)
        job.number("judging of files", each, "ms / image", f"{workers} threads read", rate=shown(1000 / each))
    assert detector.graph is not None
    side = detector.config.size[0]
    kept = tuple(variant for variant in VARIANTS if not variant.compiled)
    measure(job, "graph", detector.graph, partial(real, good, side, job.device), (1, 32) if job.full else (1,), kept)


def compiled(job: Job) -> None:
    """The whole graph, compiled: last, because it takes long."""
    good, _ = dataset_of(job)
    detector = fitted(job, 0)
    assert detector.graph is not None
    kept = (
        Variant("compiled", compiled=True),
        Variant("compiled, CUDA graph, bf16", compiled=True, captured=True, bf16=True),
    )
    make = partial(real, good, detector.config.size[0], job.device)
    measure(job, "graph", detector.graph, make, (32, 1) if job.full else (1,), kept)


def real(good: Sequence[Sample], side: int, device: torch.device, batch: int) -> Tensor:
    """uint8 photographs (B, 3, H, W)."""
    photos, _ = kizu.PatchCore(size=side).read(few(good, batch), 10**9)
    with photos:
        pixels = torch.from_numpy(photos.batch(0, batch).copy())
    return pixels.repeat(-(-batch // len(pixels)), 1, 1, 1)[:batch].to(device)


def auroc(scores: Sequence[float], labels: Sequence[bool]) -> float:
    import numpy as np

    return ranking(np.array(scores), np.array(labels))[0]
