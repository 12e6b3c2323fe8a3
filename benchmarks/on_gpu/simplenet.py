"""SimpleNet: kizu's defaults, and the published setting, of whose 40 rounds as many are done as the time allows."""

import tempfile
import time
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file

import kizu
from on_gpu.measure import Job, first_line
from on_gpu.pack import WEIGHTS
from on_gpu.patchcore import auroc, dataset_of

PUBLISHED: dict[str, Any] = {  # Liu et al., CVPR 2023, and their code's run.sh
    "size": 288,
    "resize": 329,
    "patchsize": 3,
    "pretrain_embed_dimension": 1536,
    "target_embed_dimension": 1536,
    "noise_std": 0.015,
    "auto_noise": False,
    "batch_size": 8,
    "sampled": 1.0,
    "top": 0,
    "gan_epochs": 4,
}
ROUNDS = 40
LAYERS = "layer2,layer3"


def run(job: Job) -> None:
    small: dict[str, Any] = {} if job.full else {"size": 64, "resize": None, "dsc_hidden": 64, "gan_epochs": 1}
    tiny: dict[str, Any] = {"meta_epochs": ROUNDS} if job.full else {"meta_epochs": 1}
    fit(job, "kizu's defaults", {**small, **tiny}, job.left() / 3)
    weights = job.pack / WEIGHTS
    if weights.exists():
        settings = {**PUBLISHED, **small, "backbone": "resnet18", "layers": LAYERS, "weights": str(weights)}
        as_many_rounds(job, "published setting, ResNet-18", settings, 0.6 * job.left())
    else:
        job.row("published setting, ResNet-18", remark="left out: the pack has no weights of it")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "weights.safetensors")
        if job.full:
            network = timm.create_model("wide_resnet50_2", features_only=True, out_indices=(2, 3))
            save_file(network.state_dict(), path)
            settings = {**PUBLISHED, "backbone": "wide_resnet50_2", "layers": LAYERS, "weights": str(path)}
            # the published network, whose weights no pack has room for: its times are those of trained ones
            one_round(job, "published setting, WideResNet-50 with random weights", settings)


def as_many_rounds(job: Job, what: str, settings: dict[str, Any], share: float) -> None:
    end = time.monotonic() + share
    each, beside = one_round(job, what, settings)
    rounds = 1
    if job.full:
        rounds = max(1, min(ROUNDS, int((end - time.monotonic() - 1.5 * beside) / each)))
    fit(job, what, {**settings, "meta_epochs": rounds}, share)


def one_round(job: Job, what: str, settings: dict[str, Any]) -> tuple[float, float]:
    """Seconds of a round of training, and of all else of a fit."""
    moments: list[float] = []
    start = time.monotonic()
    good, _ = dataset_of(job)
    detector = made(job, {**settings, "meta_epochs": 2 if job.full else 1})
    detector.fit(good, after_round=lambda graph, number: moments.append(time.monotonic()))
    took = detector.seconds["training"] / len(moments)
    job.number(f"{what}, a round", took, "s", remark=f"{ROUNDS} rounds are {ROUNDS * took:.0f} s")
    return took, time.monotonic() - start - detector.seconds["training"]


def fit(job: Job, what: str, settings: dict[str, Any], share: float) -> None:
    try:
        good, test = dataset_of(job)
        start = time.monotonic()
        detector = made(job, settings).fit(good)
        rounds = f"{settings.get('meta_epochs', ROUNDS)} of {ROUNDS} rounds"
        job.number(f"{what}, fit", time.monotonic() - start, "s", remark=rounds)
        for stage, took in detector.seconds.items():
            job.number(f"{what}, fit", took, "s", stage)
        start = time.monotonic()
        judged = [(s.defect != "good", outcome.score) for s, outcome in detector.judge(test)]  # type: ignore[union-attr]
        each = 1000 * (time.monotonic() - start) / len(test)
        labels, scores = zip(*judged, strict=True)
        job.row(f"{what}, image AUROC", value=f"{auroc(scores, labels):.4f}", remark=rounds)
        job.number(f"{what}, judging of files", each, "ms / image", rate=f"{1000 / each:.0f}")
    except Exception as error:  # the others go on
        job.row(what, remark=first_line(error))


def made(job: Job, settings: dict[str, Any]) -> kizu.SimpleNet:
    detector = kizu.SimpleNet(**settings)
    detector.device = torch.device(job.device_name)
    return detector
