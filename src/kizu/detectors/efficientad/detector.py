"""EfficientAD: a student learns on good parts to answer as its teacher does; where it fails to, there is an anomaly.

Batzner et al., "EfficientAD: Accurate Visual Anomaly Detection at Millisecond-Level Latencies", WACV 2024. The student
also learns to answer as an autoencoder does, which sees the whole part at once: where those two disagree, things that
are right by themselves are together wrong. Different from the published code, and switchable: photographs get a frame
in the mean colour of good ones' borders (`border`), so that the map reaches to the edge and lies where the defect is.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kizu.config import EfficientADConfig
from kizu.data import streams as supply
from kizu.data.preprocessing import Preprocessing, Stack
from kizu.data.progress import Progress
from kizu.detectors.base import Detector
from kizu.detectors.colours import greyed, varied
from kizu.detectors.efficientad import teacher
from kizu.detectors.efficientad.channels import ChannelStatistics
from kizu.detectors.efficientad.networks import FIELD, FRAME, PDN, STRIDE, Autoencoder, grid_of, normalised
from kizu.detectors.efficientad.training import Pace
from kizu.detectors.fitting import FitContext, FitResult
from kizu.errors import ModelError
from kizu.features.anomaly_map import MapUpsampling
from kizu.features.training_state import Checkpoint, Stateful

__all__ = ["EfficientAD"]

log = logging.getLogger("kizu")

LEARNING_RATE, WEIGHT_DECAY = 1e-4, 1e-5
FALL = 0.95  # share of the steps after which the learning rate falls to a tenth
HARD = 0.999  # share of the errors that the hard loss leaves out
GREY_PENALTY = 0.3  # share of the penalty's photographs that lose their colour
LOW, HIGH = 0.9, 0.995  # quantiles of good pixels that become 0 and 0.1
LOSSES = ("hard", "penalty", "autoencoder", "student of autoencoder")
CENTRE = FIELD // 2  # the pixel that the first feature of an image is centred on
ADVICE = (
    "Fewer --steps learn less; PatchCore learns from the same photographs in minutes, and judges them faster on a CPU."
)


def hard_loss(errors: Tensor, share: float = HARD) -> Tensor:
    """Mean of the squared errors (B, …) that reach their image's `share` quantile; mean over the images.

    The quantile is interpolated between two neighbours in order, and the upper one and all above it reach it.
    """
    flat = errors.flatten(1)
    most = flat.shape[1] - math.ceil(share * (flat.shape[1] - 1) - 1e-9)
    return flat.topk(most, dim=1, sorted=False).values.mean()


def quantile(values: npt.NDArray[np.float32], share: float) -> float:
    """The quantile of any number of values, interpolated linearly, in double precision throughout."""
    rank = share * (values.size - 1)
    below, above = math.floor(rank), math.ceil(rank)
    low, high = np.partition(values.ravel(), (below, above))[[below, above]].astype(np.float64)
    return float(low + (rank - below) * (high - low))


class EfficientADGraph(nn.Module):
    """uint8 images (B, 3, H, W) → scores (B,), anomaly maps (B, 1, H, W)."""

    mean: Tensor
    std: Tensor
    levels: Tensor
    surround: Tensor

    def __init__(self, config: EfficientADConfig, network: PDN) -> None:
        super().__init__()
        dimension = network.dimension
        self.frame = FRAME if config.border == "picture" else (0, 0)
        height, width = (side + sum(self.frame) for side in config.size)
        self.grid = grid_of((height, width))
        self.teacher = network
        self.student = PDN(network.size, 2 * dimension, network.widths)
        self.autoencoder = Autoencoder(config.size, self.grid, dimension)
        self.mimics_teacher = slice(dimension)  # the student's channels
        self.mimics_autoencoder = slice(dimension, None)
        self.register_buffer("mean", torch.zeros(dimension))
        self.register_buffer("std", torch.ones(dimension))
        self.register_buffer("levels", torch.tensor([[0.0, 1.0], [0.0, 1.0]]))  # (student, autoencoder) × (low, high)
        self.register_buffer("surround", torch.zeros(3))  # colour of the frame, normalised
        places = (None, None) if config.border == "stretch" else (CENTRE - self.frame[0], STRIDE)
        self.upsample = MapUpsampling(self.grid, config.size, config.smoothing, *places)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.rate(*self.views(images))

    def forward_with_global_features(self, images: Tensor, kind: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """As `forward`, and from the same pass the mean over all places of what "student" or "teacher" sees, (B, C).

        Of the student it is the half that mimics the teacher; the teacher's is normalised.
        """
        views = self.views(images)
        wholes = self._means(views, kind)
        return *self.rate(*views), wholes

    def global_features(self, images: Tensor, kind: str) -> dict[str, Tensor]:
        """The last of these alone."""
        framed = self.framed(normalised(images))
        views = (self.taught(framed), None) if kind == "teacher" else (None, self.student(framed))
        return self._means(views, kind)

    def _means(self, views: Sequence[Tensor | None], kind: str) -> dict[str, Tensor]:
        taught, answers = views[:2]
        seen = taught if answers is None or kind == "teacher" else answers[:, self.mimics_teacher]
        assert seen is not None
        return {kind: seen.mean((2, 3))}

    def rate(self, taught: Tensor, answers: Tensor, wholes: Tensor) -> tuple[Tensor, Tensor]:
        """What teacher, student and autoencoder see → scores (B,) and anomaly maps (B, 1, H, W)."""
        low, high = self.levels.view(2, 2, 1, 1, 1).unbind(1)
        errors = self.differences(taught, answers, wholes)
        grids = 0.1 * (torch.stack(errors) - low) / (high - low)  # (2, B, h, w)
        anomaly_maps: Tensor = self.upsample(grids.mean(0))
        return anomaly_maps.flatten(1).amax(1), anomaly_maps

    def errors(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) → squared differences of the student to teacher and autoencoder, (B, h, w) each."""
        return self.differences(*self.views(images))

    def views(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, 3, H, W) → what teacher, student and autoencoder see, (B, C or 2 C, h, w)."""
        pixels = normalised(images)
        framed = self.framed(pixels)
        return self.taught(framed), self.student(framed), self.autoencoder(pixels)

    def differences(self, taught: Tensor, answers: Tensor, wholes: Tensor) -> tuple[Tensor, Tensor]:
        """Of the views, the first and the last of which are used up."""
        teacher_errors = taught.sub_(answers[:, self.mimics_teacher]).square_().mean(1)
        return teacher_errors, wholes.sub_(answers[:, self.mimics_autoencoder]).square_().mean(1)

    def framed(self, pixels: Tensor) -> Tensor:
        """With the frame, so that every pixel lies in the middle of a feature.

        One colour neither repeats what is near the border, as mirroring would, nor draws it out.
        """
        if self.frame == (0, 0):
            return pixels
        colour = self.surround.view(1, 3, 1, 1)
        return (F.pad(pixels - colour, 2 * self.frame) + colour).contiguous(memory_format=torch.channels_last)

    def taught(self, framed: Tensor) -> Tensor:
        """The teacher's features in units of their spread over good images: T̂ = (T − μ) / σ."""
        answers: Tensor = self.teacher(framed).float()
        return answers.sub_(self.mean.view(1, -1, 1, 1)).div_(self.std.view(1, -1, 1, 1))

    def losses(self, images: Tensor, others: Tensor | None) -> Tensor:
        """uint8 good images (B, 3, H, W) and unrelated ones → the four terms of the loss, (4,), in order of LOSSES."""
        pixels, changed = normalised(images), normalised(varied(images.float()))
        unrelated = [] if others is None or not len(others) else [normalised(others)]
        framed = self.framed(torch.cat([pixels, *unrelated, changed]))
        batch = len(pixels)
        with torch.no_grad():
            taught, taught_changed = self.taught(torch.cat([framed[:batch], framed[-batch:]])).split(batch)
        trunk = self.student.trunk(framed)
        answers = self.student.head(trunk[:-batch], self.mimics_teacher).float()
        wholes = self.autoencoder(changed).float()
        answers_whole = self.student.head(trunk[-batch:], self.mimics_autoencoder).float()
        return torch.stack(
            [
                hard_loss((taught - answers[:batch]).square()),
                answers[batch:].square().mean() if unrelated else answers.new_zeros(()),
                (taught_changed - wholes).square().mean(),
                (wholes - answers_whole).square().mean(),
            ]
        )


class EfficientAD(Detector):
    """Student, teacher and autoencoder (EfficientAD). Settings: the fields of `EfficientADConfig`."""

    method = "efficientad"
    config_class = EfficientADConfig

    def learn(self, context: FitContext) -> FitResult:
        config: EfficientADConfig = self.config
        photos, held_out, progress = context.photos, context.held_out, context.progress
        if config.teacher is None:
            raise ModelError(teacher.MISSING)
        network, origin = teacher.load(config.teacher, config.network)
        learned, scaling, judging = parted(len(photos), len(held_out), config.validation, config.seed)
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(config.seed)
            graph = EfficientADGraph(config, network).to(self.device)
            with context.timed("teacher"):
                self._measure(graph, photos, learned, progress)
            with context.timed("training"):
                trained = self._train(graph, learned, origin, context)
        graph.eval().requires_grad_(False)
        with context.timed("calibration"), torch.inference_mode():
            numbers = range(len(held_out)) if len(held_out) else judging
            self._scale(graph, *((photos, scaling) if scaling else (held_out, numbers)), progress)
        images = {"learned from": len(learned), "scale of the maps": len(scaling or numbers), "threshold": len(numbers)}
        facts = {"teacher": origin, "network": f"PDN-{network.size.upper()}", "images": images, **trained}
        with context.timed("calibration"):
            return self.score_held_out(
                graph, held_out if len(held_out) else photos, progress, only=numbers, facts=facts
            )

    def calibrates_with(self, photos: int, held_out: int) -> int:
        return held_out or len(parted(photos, 0, self.config.validation, self.config.seed)[2])

    def _measure(self, graph: EfficientADGraph, photos: Stack, numbers: Sequence[int], progress: Progress) -> None:
        """The border's mean colour, then mean and deviation of the teacher's channels, over the good images."""
        rims = ChannelStatistics()
        measured = ChannelStatistics()
        with torch.inference_mode():
            for pixels in self._pick(photos, numbers, 16, "Borders", progress):
                for rim in (pixels[:, :, :1], pixels[:, :, -1:], pixels[:, :, :, :1], pixels[:, :, :, -1:]):
                    rims.add(normalised(rim))
            graph.surround.copy_(rims.result()[0])
            for pixels in self._pick(photos, numbers, 4, "Teacher", progress):
                measured.add(graph.teacher(graph.framed(normalised(pixels))))
        mean, std = measured.result()
        graph.mean.copy_(mean)
        graph.std.copy_(std)

    def _train(
        self, graph: EfficientADGraph, numbers: Sequence[int], origin: dict[str, Any], context: FitContext
    ) -> dict[str, Any]:
        """Train student and autoencoder; what there is to tell of it."""
        config: EfficientADConfig = self.config
        graph.train()
        graph.teacher.eval()
        trainable = [*graph.student.parameters(), *graph.autoencoder.parameters()]
        optimiser = torch.optim.Adam(trainable, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        about = {
            "settings": config.model_dump_json(),
            "images": context.photos.hash,
            "teacher": teacher.fingerprint(graph.teacher),
        }
        parts: dict[str, Stateful] = {
            "student": graph.student,
            "autoencoder": graph.autoencoder,
            "optimiser": optimiser,
        }
        checkpoint = Checkpoint(context.checkpoint, about, parts)
        start, extra = checkpoint.restore()
        curve: list[list[float]] = extra.get("curve", [])
        sums = torch.tensor(extra.get("sums", [0.0] * len(LOSSES)), dtype=torch.float64, device=self.device)
        every = max(1, config.steps // 100)
        others, penalty = self._others(start)
        log.info("%d steps; teacher %s; penalty: %s", config.steps, origin["file"], penalty)
        order = supply.shuffled(len(numbers), config.seed, start * config.batch_size)
        pace = Pace(config.steps - start, self.device, ADVICE)
        for step in range(start, config.steps):
            for group in optimiser.param_groups:
                group["lr"] = LEARNING_RATE * (0.1 if step >= int(FALL * config.steps) else 1)
            chosen = [numbers[next(order)] for _ in range(config.batch_size)]
            pixels = self.pixels(context.photos, chosen, turn=step + 1)
            unrelated = None if others is None else greyed(torch.from_numpy(next(others)).to(self.device), GREY_PENALTY)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "mixed"):
                losses = graph.losses(pixels, unrelated)
            optimiser.zero_grad(set_to_none=True)
            losses.sum().backward()
            optimiser.step()
            sums += losses.detach()
            if (step + 1) % every == 0:
                curve.append((sums / every).tolist())
                sums.zero_()
                named = ", ".join(f"{name} {value:.4f}" for name, value in zip(LOSSES, curve[-1], strict=True))
                log.info("step %d of %d: %s", step + 1, config.steps, named)
            if checkpoint.due or step + 1 == config.steps:
                checkpoint.write(step + 1, {"curve": curve, "sums": sums.tolist()})
            pace.step()
            context.progress("Training", step + 1, config.steps)
        return {"penalty": penalty, "steps": config.steps, "loss": _first_and_last(curve)}

    def _others(self, start: int) -> tuple[Iterator[npt.NDArray[np.uint8]] | None, str]:
        """Unrelated pictures from the step `start` on, a batch a step, and what they are."""
        config: EfficientADConfig = self.config
        if config.penalty == "none":
            return None, "none"
        first = start * config.batch_size
        if config.penalty is None:
            textures = supply.drawn(config.seed, first)
            return supply.endless(textures, Preprocessing(config.size), config.batch_size), "drawn textures"
        paths = supply.photographs(config.penalty)
        pictures = supply.cropped(paths, config.seed, first, crops=False)
        twice = Preprocessing(config.size, 2 * max(config.size))
        return supply.endless(pictures, twice, config.batch_size), f"{len(paths)} photographs in {config.penalty}"

    def _scale(self, graph: EfficientADGraph, photos: Stack, numbers: Sequence[int], progress: Progress) -> None:
        """The levels of both maps from the pixels of good images."""
        errors = [graph.errors(pixels) for pixels in self._pick(photos, numbers, 16, "Scale of the maps", progress)]
        if self.config.border == "stretch":  # the published quantiles are those of the stretched maps
            errors = [(graph.upsample(ours), graph.upsample(theirs)) for ours, theirs in errors]
        for which, maps in enumerate(zip(*errors, strict=True)):
            values = torch.cat(maps).cpu().numpy()
            low, high = quantile(values, LOW), quantile(values, HIGH)
            graph.levels[which] = torch.tensor([low, max(high, low * (1 + 1e-6) + 1e-12)])

    def _pick(
        self, photos: Stack, numbers: Sequence[int], batch_size: int, stage: str, progress: Progress
    ) -> Iterator[Tensor]:
        """Some of the photos (B, 3, H, W), batch by batch on the device."""
        for start in range(0, len(numbers), batch_size):
            chosen = numbers[start : start + batch_size]
            yield self.pixels(photos, chosen)
            progress(stage, start + len(chosen), len(numbers))

    @classmethod
    def pretrained_name(cls, config: Any) -> str:
        return f"teacher {Path(config.teacher).name}"

    def pretrained(self) -> dict[str, str]:
        assert isinstance(self.graph, EfficientADGraph)
        return {"name": f"teacher {self.facts['teacher']['file']}", "weights": teacher.fingerprint(self.graph.teacher)}

    @classmethod
    def restore_graph(cls, config: Any, tensors: dict[str, Tensor]) -> nn.Module:
        state = {key.removeprefix("teacher."): value for key, value in tensors.items() if key.startswith("teacher.")}
        return EfficientADGraph(config, teacher.assemble(state, "the model's teacher"))


def parted(count: int, held_out: int, share: float, seed: int) -> tuple[list[int], list[int], list[int]]:
    """Which of `count` images are learned from, which scale the maps, and which set the threshold.

    `share` of the images are kept from learning. Where others are held out for the threshold, all of these scale the
    maps; otherwise a third of them do and the rest sets the threshold, or, of fewer than 9, all do both. With a `share`
    of 0 the images held out for the threshold scale the maps as well.
    """
    order = np.random.default_rng([seed, count]).permutation(count).tolist()
    kept = max(1, round(share * count)) if count > 1 else 0
    if held_out and share == 0:
        return order, [], []
    learned, others = order[kept:], order[:kept]
    if held_out or kept < 9:
        return learned, others or learned, [] if held_out else others
    return learned, others[: kept // 3], others[kept // 3 :]


def _first_and_last(curve: Sequence[Sequence[float]]) -> dict[str, list[float]]:
    """Each term of the loss, averaged over the first and the last hundredth of the steps."""
    ends = (curve[0], curve[-1])
    return {name: [round(end[number], 6) for end in ends] for number, name in enumerate(LOSSES)}
