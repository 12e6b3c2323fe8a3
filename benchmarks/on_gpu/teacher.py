"""Teachers for EfficientAD, S and M: as many steps of the distillation as the part's share of the time allows.

The large network's answers to crops of the pack's pictures are computed once and kept on the GPU with the crops, in
half precision: a step is then the small network's alone. What `kizu distill` does in a second, which computes them in
every step and reads the pictures meanwhile, stands beside it. Everything else is its own code: loss, cosine, running
mean, checkpoint, file.
"""

import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kizu.config import DistillationConfig
from kizu.data import files, streams
from kizu.data.files import write_csv
from kizu.data.preprocessing import Preprocessing
from kizu.detectors.augmentation import greyed
from kizu.detectors.efficientad import teacher
from kizu.detectors.efficientad.distillation import Source, distill, distillation_loss
from kizu.detectors.efficientad.networks import DIMENSION, PDN
from kizu.detectors.efficientad.training import ChannelStatistics, along_a_cosine, arithmetic
from kizu.features import backbone
from kizu.features.patch_features import PatchFeatures
from kizu.features.training_state import Checkpoint
from on_gpu.efficientad import narrow
from on_gpu.measure import Job, first_line, seconds

FOLDER = "gpu-teachers"
GREY = 0.1  # share of the crops that lose their colour
CROPS = 8  # of each picture, at most
SHARE_OF_MEMORY = 0.45  # of the GPU's that is free
SHARES = {"s": 0.5, "m": 0.9}  # of the time that is left when a network's turn comes
RECIPE = {"learning_rate": 1e-3, "cosine": True, "average": 0.999, "crops": True, "precision": "mixed"}
CURVE = 200  # points
LARGEST = 16_000_000 + 2**19  # bytes of a teacher's file


@dataclass
class Answers:
    """Crops, and what the large network says of them in units of each channel's spread."""

    pixels: Tensor  # (N, 3, 2s, 2s) uint8
    targets: Tensor  # (N, 384, s / 4, s / 4) half

    def loss(self, network: PDN, chosen: Tensor) -> Tensor:
        return distillation_loss(network, Fixed(self.targets[chosen]), self.pixels[chosen].float())


@dataclass
class Fixed:
    """Stands for the large network: its answers are known."""

    targets: Tensor

    def __call__(self, images: Tensor) -> Tensor:
        return self.targets.float()


def run(job: Job) -> None:
    side = 256 if job.full else 64
    pictures = streams.photographs(job.pack / "natural")
    job.row("pictures", value=str(len(pictures)), remark=f"crops of {2 * side} pixels")
    answers = kept_answers(job, pictures, side)
    for size in ("s", "m"):
        try:
            with_answers(job, answers, size, side)
        except Exception as error:  # the other size goes on
            job.row(f"teacher {size.upper()}", remark=first_line(error))
    try:
        as_distill_does(job, side)
    except Exception as error:
        job.row("kizu distill", remark=first_line(error))


def kept_answers(job: Job, pictures: list[Path], side: int) -> Answers:
    """The large network's answers to as many crops as there is memory for."""
    network = backbone.create("efficientnet_lite2").to(job.device)
    source = Source(network, PatchFeatures(1, None, DIMENSION), torch.zeros(DIMENSION), torch.ones(DIMENSION))
    each = 12 * side**2 + 2 * DIMENSION * (side // 4) ** 2  # bytes
    room = SHARE_OF_MEMORY * torch.cuda.mem_get_info()[0] if job.full else 2**28
    count = min(CROPS * len(pictures) if job.full else 16, int(room / each))
    pixels = torch.empty(count, 3, 2 * side, 2 * side, dtype=torch.uint8, device=job.device)
    targets = torch.empty(count, DIMENSION, side // 4, side // 4, dtype=torch.float16, device=job.device)
    statistics, done, start = ChannelStatistics(), 0, time.perf_counter()
    torch.manual_seed(0)
    batches = streams.endless(
        streams.cropped(pictures, 0, 0, crops=True), Preprocessing((2 * side, 2 * side)), 32 if job.full else 4, 16
    )
    with torch.inference_mode():
        for batch in batches:
            some = greyed(torch.from_numpy(batch).to(job.device), GREY)[: count - done]
            features = source.features(some).float()
            statistics.add(features)
            pixels[done : done + len(some)] = some.round().to(torch.uint8)
            targets[done : done + len(some)] = features.clamp(-6e4, 6e4).half()
            done += len(some)
            if done >= count or job.left() < 0.5 * (job.left() + time.perf_counter() - start):
                break
        mean, std = (values.to(job.device).view(1, -1, 1, 1) for values in statistics.result())
        for span in torch.arange(done, device=job.device).split(256):
            targets[span] = ((targets[span].float() - mean) / std).half()
    took = time.perf_counter() - start
    job.number("answers of the large network", took, "s", rate=f"{done / took:.0f}", remark=f"{done} crops")
    return Answers(pixels[:done].clone(), targets[:done].clone()) if done < count else Answers(pixels, targets)


def with_answers(job: Job, answers: Answers, size: str, side: int) -> None:
    """A teacher of as many steps as fit into this network's share of the time."""
    end = time.monotonic() + SHARES[size] * job.left()
    batch = 16 if job.full else 2
    each = step_time(job, answers, size, batch)
    steps = max(2, int((end - time.monotonic() - 3) / each)) if job.full else 3
    config = DistillationConfig(size=size, side=side, batch_size=batch, steps=steps, **RECIPE)
    job.number(f"{size.upper()}, step", 1000 * each, "ms", "answers kept", batch=str(batch), rate=f"{1 / each:.1f}")
    torch.manual_seed(config.seed)
    network = new(job, size)
    about = {
        "images": f"{len(answers.pixels)} crops of the pictures of other things",
        "backbone": "efficientnet_lite2",
        **config.model_dump(mode="json", exclude={"backbone", "layers", "weights", "steps"}),
    }
    target = job.output / FOLDER / f"efficientad-{size}.safetensors"
    curve = trained(job, network, answers, config, target, about, end)
    write_csv(target.with_suffix(".csv"), ("step", "loss"), ((step, f"{loss:.6f}") for step, loss in curve))
    teacher.save(target, network, {**about, "loss": curve[-1][1], "steps": curve[-1][0]})
    job.row(f"{size.upper()}, steps", value=str(curve[-1][0]))
    for step, loss in (curve[0], curve[-1]):
        job.row(f"{size.upper()}, loss", value=f"{loss:.4f}", remark=f"around step {step}")
    written = target.stat().st_size
    small = "" if written <= LARGEST else "larger than a teacher's file should be"
    job.number(f"{size.upper()}, file", written / 1e6, "MB", remark=small or target.name)


def new(job: Job, size: str) -> PDN:
    network = PDN(size, *narrow(job, size, DIMENSION)).to(job.device)  # type: ignore[arg-type]
    return network.to(memory_format=torch.channels_last)


def step_time(job: Job, answers: Answers, size: str, batch: int) -> float:
    """Seconds of a step, of a network that is thrown away."""
    network = new(job, size)
    mean = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    optimiser = torch.optim.Adam(network.parameters(), weight_decay=1e-5)
    chosen = torch.arange(batch, device=job.device) % len(answers.pixels)
    return seconds(lambda: step(network, mean, optimiser, answers, chosen, job), job.device, job.longest)


def step(
    network: PDN, mean: AveragedModel, optimiser: torch.optim.Optimizer, answers: Answers, chosen: Tensor, job: Job
) -> Tensor:
    with arithmetic("mixed" if job.full else "single", job.device):
        loss = answers.loss(network, chosen)
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    optimiser.step()
    mean.update_parameters(network)
    return loss.detach()


def trained(
    job: Job, network: PDN, answers: Answers, config: DistillationConfig, target: Path, about: dict, end: float
) -> list[tuple[int, float]]:
    """Train the network; its loss over the steps, which end with the time at the latest.

    A training that was ended before goes on: as many steps follow as fit into the time.
    """
    mean = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(config.average))
    optimiser = torch.optim.Adam(network.parameters(), weight_decay=1e-5)
    target.parent.mkdir(parents=True, exist_ok=True)
    state = target.with_suffix(".training")
    checkpoint = Checkpoint(state, about, {"teacher": network, "mean": mean, "optimiser": optimiser})
    start, extra = checkpoint.restore()
    curve: list[tuple[int, float]] = extra.get("curve", [])
    steps = start + config.steps
    every = max(1, config.steps // CURVE)
    total, count = torch.zeros((), device=job.device), 0
    order = streams.shuffled(len(answers.pixels), config.seed, start * config.batch_size)
    for number in range(start, steps):
        for group in optimiser.param_groups:
            group["lr"] = config.learning_rate * along_a_cosine(number, steps)
        chosen = torch.tensor([next(order) for _ in range(config.batch_size)], device=job.device)
        total, count = total + step(network, mean, optimiser, answers, chosen, job), count + 1
        if (number + 1) % every == 0:
            curve.append((number + 1, float(total) / count))
            total, count = torch.zeros_like(total), 0
            if time.monotonic() > end:
                break
            if checkpoint.due:
                checkpoint.write(number + 1, {"curve": curve})
    network.load_state_dict(mean.module.state_dict())
    state.unlink(missing_ok=True)
    return curve


def as_distill_does(job: Job, side: int) -> None:
    """Steps a second of `kizu distill` itself, which keeps nothing."""
    steps, batch = (200, 16) if job.full else (2, 2)
    config = DistillationConfig(size="s", side=side, batch_size=batch, steps=steps, measured=batch, **RECIPE)
    if not job.full:
        config = config.model_copy(update={"precision": "single"})
    moments: list[float] = []
    limit = max(2.0, job.left() - 2)
    start = time.monotonic()

    def watch(stage: str, done: int, total: int) -> None:
        if stage == "Distilling":
            moments.append(time.monotonic())
            if time.monotonic() - start > limit:
                raise TimeoutError

    with files.scratch_folder() as folder, suppress(TimeoutError):
        distill(job.pack / "natural", config, folder, progress=watch)
    if len(moments) > 1:
        first = len(moments) // 4  # until the pictures that were read ahead are used up
        each = (moments[-1] - moments[first]) / (len(moments) - 1 - first)
        remark = "answers computed, pictures read in every step"
        job.number(
            "S, step", 1000 * each, "ms", "kizu distill", batch=str(batch), rate=f"{1 / each:.1f}", remark=remark
        )
    else:
        job.row("S, step", "kizu distill", remark="left out: the time was over")
