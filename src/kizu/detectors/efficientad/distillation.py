"""Teachers for EfficientAD: a small network learns what a large one says of patches of 33 × 33 pixels.

Batzner et al., "EfficientAD", WACV 2024. The large network sees a photograph at twice the size; two of its
layers, laid over each other and pooled to 384 channels together, in units of each channel's spread, are what the small
one has to say. Any photographs will do, thousands of them, as different as can be.
"""

import csv
import hashlib
import io
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kizu.config import DistillationConfig
from kizu.data import files, streams
from kizu.data.preprocessing import Preprocessing
from kizu.data.progress import Progress, silent
from kizu.detectors.augmentation import greyed
from kizu.detectors.efficientad import teacher
from kizu.detectors.efficientad.networks import DIMENSION, FRAME, PDN, normalised
from kizu.detectors.efficientad.training import ChannelStatistics, Pace, along_a_cosine, arithmetic
from kizu.errors import DataError, ModelError, OptionError
from kizu.features import backbone
from kizu.features.patch_features import PatchFeatures
from kizu.features.training_state import Checkpoint

__all__ = ["distill"]

log = logging.getLogger("kizu")

WEIGHT_DECAY = 1e-5
GREY = 0.1  # share of the photographs that lose their colour
ADVICE = "Fewer `steps` give a worse teacher; it can be interrupted, and goes on with `resume=True`."


@dataclass
class Source:
    """The large network's features for photographs at twice the teacher's size."""

    network: backbone.Backbone
    patches: PatchFeatures
    mean: Tensor  # (384,) of its features
    std: Tensor

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, 2s, 2s) → (B, 384, s / 4, s / 4)."""
        pooled: Tensor = self.patches(self.network(images))
        side = images.shape[-1] // 8
        return pooled if pooled.shape[-1] == side else F.interpolate(pooled, (side, side), mode="bilinear")

    def __call__(self, images: Tensor) -> Tensor:
        """The same in units of their spread."""
        return (self.features(images).float() - self.mean.view(1, -1, 1, 1)) / self.std.view(1, -1, 1, 1)


def distill(
    images: str | Path,
    config: DistillationConfig,
    folder: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    statistics: tuple[Tensor, Tensor] | None = None,
    progress: Progress = silent,
) -> Path:
    """Make a teacher from the photographs below a folder; returns its file, efficientad-s.safetensors or -m.

    Beside it: the loss over the steps as CSV, the channels' statistics (which the other size uses again), and while it
    lasts, the training's state. `statistics` are the channels' mean and deviation (384,), where they are known already.
    Raises `OptionError` where there is a teacher already, or a training that was begun.
    """
    paths = streams.photographs(images)
    target = folder / f"{config.teacher_for}-{config.size}.safetensors"
    state = target.with_suffix(".training")
    if target.exists() and not overwrite:
        raise OptionError(f"{target} exists: choose another `output`, or `overwrite` it")
    if state.exists() and not (resume or overwrite):
        raise OptionError(f"{state} holds a training that was interrupted: `resume` it, or `overwrite` it")
    if overwrite and not resume:
        state.unlink(missing_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        network = PDN(config.size).to(device)
        source, about = _source(paths, Path(images), config, folder, statistics, device, progress)
        curve = _train(network, source, paths, config, state, about, progress)
    files.write_text(target.with_suffix(".csv"), _as_csv(curve))
    teacher.save(target, network, {**about, "loss": curve[-1][1]})
    state.unlink(missing_ok=True)
    return target


def _source(
    paths: Sequence[Path],
    root: Path,
    config: DistillationConfig,
    folder: Path,
    known: tuple[Tensor, Tensor] | None,
    device: torch.device,
    progress: Progress,
) -> tuple[Source, dict[str, Any]]:
    """The large network with its channels' statistics, measured or found in the folder; and what it is."""
    network = backbone.create(config.backbone, config.layers, config.weights).to(device)
    names = "\n".join(path.relative_to(root).as_posix() for path in paths)
    about = {
        "images": f"{len(paths)} photographs (hash of their names {_hash(names)})",
        "backbone": config.backbone,
        "layers": ", ".join(network.layers),
        "weights": backbone.weights_hash(network),
        **config.model_dump(mode="json", exclude={"backbone", "layers", "weights"}),
    }
    shared = {key: value for key, value in about.items() if key not in ("size", "steps", "batch_size", "precision")}
    cache = folder / f"statistics-{_hash(repr(shared))}.safetensors"
    source = Source(network, PatchFeatures(1, None, DIMENSION), torch.zeros(DIMENSION), torch.ones(DIMENSION))
    if known is not None:
        mean, std = known
    elif cache.exists():
        try:
            kept = load_file(cache)
            mean, std = kept["mean"], kept["std"]
        except (OSError, SafetensorError, KeyError) as error:
            raise ModelError(f"{cache}: damaged ({error}); remove it, and it is measured again") from None
    else:
        mean, std = _measure(source, paths, config, device, progress)
        with files.new_file(cache) as temporary:
            save_file({"mean": mean.cpu(), "std": std.cpu()}, temporary)
    source.mean, source.std = mean.to(device), std.to(device)
    return source, about


def _measure(
    source: Source, paths: Sequence[Path], config: DistillationConfig, device: torch.device, progress: Progress
) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel over some of the photographs."""
    measured = ChannelStatistics()
    count = min(config.measured, len(paths)) if not config.crops else config.measured
    done = 0
    with torch.inference_mode():
        for pixels in _batches(paths, config, start=0):
            if len(pixels):
                measured.add(source.features(torch.from_numpy(pixels[: count - done]).to(device)))
            done += config.batch_size
            progress("Statistics", min(done, count), count)
            if done >= count:
                break
    if measured.count == 0:
        raise DataError(f"None of the {len(paths)} photographs could be read.")
    mean, std = measured.result()
    return mean.clone(), std.clone()  # which may be used outside of inference mode


def _train(
    network: PDN,
    source: Source,
    paths: Sequence[Path],
    config: DistillationConfig,
    state: Path,
    about: dict[str, Any],
    progress: Progress,
) -> list[tuple[int, float]]:
    """Train the small network; returns its loss, averaged over each two-hundredth of the steps, with the step."""
    device = source.mean.device
    optimiser = torch.optim.Adam(network.parameters(), weight_decay=WEIGHT_DECAY)
    mean = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(config.average))
    checkpoint = Checkpoint(state, about, {"teacher": network, "mean": mean, "optimiser": optimiser})
    start, extra = checkpoint.restore()
    curve: list[tuple[int, float]] = extra.get("curve", [])
    total, count = extra.get("sum", [0.0, 0])
    summed = torch.tensor(total, dtype=torch.float64, device=device)
    every = max(1, config.steps // 200)
    pictures = _batches(paths, config, start * config.batch_size)
    precision = arithmetic(config.precision, device)
    pace = Pace(config.steps - start, device, ADVICE)
    for step in range(start, config.steps):
        for group in optimiser.param_groups:
            group["lr"] = config.learning_rate * (along_a_cosine(step, config.steps) if config.cosine else 1)
        pixels = torch.from_numpy(next(pictures)).to(device)
        if len(pixels):
            with precision:
                loss = distillation_loss(network, source, greyed(pixels, GREY))
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            mean.update_parameters(network)
            summed, count = summed + loss.detach(), count + 1
        if (step + 1) % every == 0 and count:
            curve.append((step + 1, float(summed) / count))
            summed, count = torch.zeros_like(summed), 0
            log.info("step %d of %d: loss %.4f", step + 1, config.steps, curve[-1][1])
        if checkpoint.due:
            checkpoint.write(step + 1, {"curve": curve, "sum": [float(summed), count]})
        pace.step()
        progress("Distilling", step + 1, config.steps)
    if not curve:
        raise DataError(f"None of the {len(paths)} photographs could be read.")
    network.load_state_dict(mean.module.state_dict())
    return curve


def distillation_loss(network: PDN, source: Source, images: Tensor) -> Tensor:
    """Mean squared difference of the small network's output to the large one's, for float images (B, 3, 2s, 2s)."""
    with torch.no_grad():
        target = source(images)
    halved = F.avg_pool2d(images, 2)
    student_out = network(F.pad(normalised(halved), 2 * FRAME))
    loss: Tensor = (student_out.float() - target).square().mean()
    return loss


def _batches(paths: Sequence[Path], config: DistillationConfig, start: int) -> Iterator[npt.NDArray[np.uint8]]:
    """Photographs (B, 3, 2s, 2s) without end, from the `start`-th on."""
    pictures = streams.cropped(paths, config.seed, start, config.crops)
    side = 2 * config.side
    workers = min(16, os.cpu_count() or 2)
    return streams.endless(pictures, Preprocessing((side, side)), config.batch_size, workers)


def _hash(text: str) -> str:
    return hashlib.blake2b(os.fsencode(text), digest_size=8).hexdigest()


def _as_csv(curve: Sequence[tuple[int, float]]) -> str:
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["step", "loss"])
    writer.writerows((step, f"{loss:.6f}") for step, loss in curve)
    return table.getvalue()
