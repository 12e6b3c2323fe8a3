"""EfficientAD with the teacher that the part before made, trained on bottles and juice bottles, and PUAD on top.

The paper trains 70,000 steps of one photograph. Here a step is of several, and there are as many as the time allows.
"""

import time
from pathlib import Path

import numpy as np
import torch

import kizu
from kizu.data import dataset
from kizu.detectors.efficientad import teacher as teacher_module
from kizu.detectors.efficientad.networks import DIMENSION, PDN
from kizu.evaluation.evaluate import evaluate
from kizu.evaluation.metrics import ranking
from kizu.inference.prediction import Prediction
from on_gpu.efficientad import narrow
from on_gpu.measure import Job, first_line
from on_gpu.pack import CATEGORIES, few, photographs
from on_gpu.teacher import FOLDER

TRIAL = 30  # steps, that say how long a step takes
PARTS = {
    "EfficientAD": lambda prediction: prediction.parts["structural"],
    "PUAD, head alone": lambda prediction: prediction.parts["logical"],
    "PUAD, plain sum": lambda prediction: prediction.parts["structural"] + prediction.parts["logical"],
    "PUAD": lambda prediction: prediction.score,
}


def run(job: Job) -> None:
    path = job.output / FOLDER / "efficientad-s.safetensors"
    if not path.exists():
        job.row("teacher", remark=f"{path.name} is missing: random weights stand for it, and the AUROCs say nothing")
        torch.manual_seed(0)
        path.parent.mkdir(parents=True, exist_ok=True)
        teacher_module.save(
            path, PDN("s", *narrow(job, "s", DIMENSION)), {"made for": "a run without the part `teacher`"}
        )
    for number, category in enumerate(CATEGORIES):
        try:
            one(job, category, path, time.monotonic() + job.left() / (len(CATEGORIES) - number))
        except Exception as error:  # the other category goes on
            job.row(category, remark=first_line(error))


def one(job: Job, category: str, teacher: Path, end: float) -> None:
    """A category: as many steps as its time allows, AUROCs of the base, of the head, of their sum, of PUAD."""
    batch = 8 if job.full else 1
    data = dataset.find(photographs(job.pack, category))
    train, held_out, test = (list(data.select(split=split)) for split in ("train", "validation", "test"))
    if not job.full:
        bad, good = ([s for s in test if (s.defect != "good") is kind] for kind in (True, False))
        train, held_out, test = few(train, 3), few(held_out, 2), few(bad, 1) + few(good, 1)
    steps = 1
    if job.full:
        pace = Pace()
        start = time.monotonic()
        detector(job, teacher, TRIAL, batch).fit(train, held_out=held_out, progress=pace)
        each, beside = pace.each, time.monotonic() - start - pace.total
        steps = max(100, int((end - time.monotonic() - 2 * beside - 8) / each))
        job.number(f"{category}, training step", 1000 * each, "ms", batch=str(batch), rate=f"{1 / each:.1f}")
    start = time.monotonic()
    fitted = detector(job, teacher, steps, batch).fit(train, held_out=held_out)
    job.number(f"{category}, fit", time.monotonic() - start, "s", remark=f"{steps} steps of {batch}")
    judged = [(s.defect != "good", outcome) for s, outcome in fitted.judge(test)]
    labels = np.array([is_bad for is_bad, _ in judged])
    for name, value in PARTS.items():
        scores = np.array([value(outcome) for _, outcome in judged if isinstance(outcome, Prediction)])
        job.row(f"{category}, image AUROC", name, value=f"{ranking(scores, labels)[0]:.4f}")
    result = evaluate(fitted, test, category=category, root=data.root)
    for name in ("pixel_auroc", "au_pro"):
        value = result.metrics.get(name)
        job.row(f"{category}, {name}", "EfficientAD", value="n/a" if value is None else f"{value:.4f}")


def detector(job: Job, teacher: Path, steps: int, batch: int) -> kizu.PUAD:
    settings = {"network": "s", "teacher": str(teacher), "steps": steps, "batch_size": batch}
    settings |= {"penalty": str(job.pack / "natural"), "precision": "mixed" if job.full else "single"}
    made = kizu.PUAD(base="efficientad", base_settings=settings)
    made.device = job.device
    return made


class Pace:
    """Hears of a training's steps: how long each takes, once those that were begun with are over."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage == "Training":
            torch.cuda.synchronize()
            self.moments.append(time.monotonic())

    @property
    def each(self) -> float:
        return (self.moments[-1] - self.moments[5]) / (len(self.moments) - 6)

    @property
    def total(self) -> float:
        return self.moments[-1] - self.moments[0]
