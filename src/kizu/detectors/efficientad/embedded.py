"""EfficientAD with a pretrained network's own features in the teacher's place: no distillation, and quick on a CPU.

What differs from the paper, each for what it brings in minutes on two cores:

1. The teacher is the pretrained network, at reductions 8 (fine) and 16 (coarse); the autoencoder learns the coarse
   features.
2. The student begins with that network's features at reduction 4, so that it need not learn to see.
3. Differences are measured in units of how they vary on good photographs that were not learned from, in all channels
   together (Mahalanobis), and averaged over 3 × 3 places: many small ones that go together count, usual ones do not.
4. The map is the mean of two, as in the paper (§3.4): of where student and teacher differ, fine and coarse averaged,
   and of where student and autoencoder do.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kizu.config import EfficientADConfig
from kizu.data import streams
from kizu.detectors.efficientad.graph import hard_loss
from kizu.detectors.efficientad.training import Course, along_a_cosine
from kizu.features.anomaly_map import MapUpsampling
from kizu.features.backbone import Backbone
from kizu.features.feature_store import FeatureStore

__all__ = ["BACKBONE", "LAYERS", "EmbeddedGraph", "Features", "embedded_course", "others_in_a_step"]

BACKBONE = "efficientnet_lite2"
LAYERS = ("blocks.1", "blocks.2", "blocks.4")  # that are tapped, with their channels and reductions
CHANNELS, STEPS = (24, 48, 120), (4, 8, 16)
WIDTH, DEPTH = 96, 3  # of the student
HIDDEN, CODE = 64, 64  # channels of the autoencoder, and numbers that it has for the whole photograph
HARD_SHARE = 0.98  # of the errors, that the hard loss leaves out
LEARNING_RATE = 1e-3  # the highest
OTHERS = 0.25  # pictures of other things in a step, as a share of the good ones
SHRINKAGE = 0.01  # of the differences' covariance, towards equal channels


class EmbeddedGraph(nn.Module):
    """uint8 images (B, 3, H, W) → scores (B,), anomaly maps (B, 1, H, W)."""

    levels: Tensor

    def __init__(self, config: EfficientADConfig, network: Backbone) -> None:
        super().__init__()
        _, fine, coarse = CHANNELS
        self.grid, self.coarse_grid = ((-(-config.size[0] // step), -(-config.size[1] // step)) for step in STEPS[1:])
        self.backbone = network
        self.units = nn.ModuleList(Standardised(channels) for channels in CHANNELS)
        self.student = Student()
        self.autoencoder = FeatureAutoencoder(coarse, self.coarse_grid)
        self.differences = nn.ModuleList(Difference(channels) for channels in (fine, coarse, coarse))
        self.register_buffer("levels", torch.tensor([[0.0, 1.0]] * 3))  # (fine, coarse, whole) × (low, high)
        self.upsample = MapUpsampling(self.grid, config.size, config.smoothing)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self._scored(self.differences_of(self.features(images)))

    def forward_with_global_features(self, images: Tensor, kind: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """As `forward`, and from the same pass the mean over all places of what "student" or "teacher" sees, (B, C)."""
        features = self.features(images)
        return *self._scored(self.differences_of(features)), {kind: self._mean(features, kind)}

    def global_features(self, images: Tensor, kind: str) -> dict[str, Tensor]:
        """Global features alone, as `forward_with_global_features` gives them."""
        return {kind: self._mean(self.features(images), kind)}

    def features(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) → the network's features at reductions 4, 8 and 16, standardised."""
        return self.standardise(self.backbone(images))

    def standardise(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The network's features in units of each channel's mean and deviation over good photographs."""
        return [unit(layer) for unit, layer in zip(self.units, maps, strict=True)]

    def set_units(self, statistics: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Take each channel's mean and deviation, of each reduction."""
        for unit, (mean, std) in zip(self.units, statistics, strict=True):
            assert isinstance(unit, Standardised)
            unit.mean.copy_(mean[:, None, None])
            unit.std.copy_(std[:, None, None])

    def differences_of(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Of student and teacher, fine and coarse, and of student and autoencoder: (B, C, h, w) each."""
        shallow, fine, coarse = features
        fine_out, coarse_out, whole_out = self.student(shallow)
        return [fine - fine_out, _on(coarse, self.grid) - coarse_out, self.autoencoder(coarse) - whole_out]

    def errors(self, images: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, H, W) → how unusual each of the three differences is, (B, h, w) each."""
        return self._errors(self.differences_of(self.features(images)))

    def measure(self, differences: Iterable[Sequence[Tensor]]) -> None:
        """Learn what is usual from the differences of good photographs, batch by batch."""
        sums = [Moments(len(kind.middle), kind.middle.device) for kind in self._kinds]
        for batch in differences:
            for total, values in zip(sums, batch, strict=True):
                total.add(values)
        for kind, total in zip(self._kinds, sums, strict=True):
            kind.set(*total.result())

    def losses(self, features: Sequence[Tensor], others: Tensor | None) -> Tensor:
        """Standardised features of good photographs, and shallow ones of other pictures → the terms of the loss."""
        shallow, fine, coarse = features
        batch = len(shallow)
        seen = shallow if others is None else torch.cat([shallow, others])
        fine_out, coarse_out, whole_out = self.student(seen)
        restored = self.autoencoder(coarse)
        hard = [
            hard_loss((fine - fine_out[:batch]).square(), HARD_SHARE),
            hard_loss((_on(coarse, self.grid) - coarse_out[:batch]).square(), HARD_SHARE),
        ]
        loud = [out[batch:].square().mean() for out in (fine_out, coarse_out)] if others is not None else []
        return torch.stack(
            [
                torch.stack(hard).sum(),
                torch.stack(loud).sum() if loud else hard[0].new_zeros(()),
                (coarse - restored).square().mean(),
                (restored.detach() - whole_out[:batch]).square().mean(),
            ]
        )

    def _errors(self, differences: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(
            _on(kind(values)[:, None], self.grid)[:, 0] for kind, values in zip(self._kinds, differences, strict=True)
        )

    @property
    def _kinds(self) -> list["Difference"]:
        return [kind for kind in self.differences if isinstance(kind, Difference)]

    def _scored(self, differences: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        low, high = self.levels.view(3, 2, 1, 1, 1).unbind(1)
        fine, coarse, whole = (0.1 * (torch.stack(self._errors(differences)) - low) / (high - low)).unbind(0)
        grids = ((fine + coarse) / 2 + whole) / 2
        anomaly_maps: Tensor = self.upsample(self.upsample.zoned(grids))
        return anomaly_maps.flatten(1).amax(1), anomaly_maps

    def _mean(self, features: Sequence[Tensor], kind: str) -> Tensor:
        layers = features[1:] if kind == "teacher" else self.student(features[0])[:2]
        return torch.cat([layer.mean((2, 3)) for layer in layers], dim=1)


class Standardised(nn.Module):
    """Features (B, C, h, w) in units of each channel's mean and deviation over good photographs."""

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("std", torch.ones(channels, 1, 1))

    def forward(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.std


class Student(nn.Module):
    """Shallow features (B, 24, H/4, W/4) → its answers to fine and coarse ones, at reduction 8, and to the autoencoder.

    The last, (B, 120, H/16, W/16), sees more of the photograph.
    """

    def __init__(self) -> None:
        super().__init__()
        shallow, fine, coarse = CHANNELS
        self.begin = nn.Conv2d(shallow, WIDTH, 3, stride=2, padding=1)
        self.layers = nn.ModuleList(nn.Conv2d(WIDTH, WIDTH, 3, padding=1) for _ in range(DEPTH))
        self.local = nn.Conv2d(WIDTH, fine + coarse, 1)
        self.wider = nn.ModuleList(nn.Conv2d(WIDTH, WIDTH, 3, stride=step, padding=1) for step in (2, 1))
        self.whole = nn.Conv2d(WIDTH, coarse, 1)

    def forward(self, shallow: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        values = F.relu(self.begin(shallow), inplace=True)
        for layer in self.layers:
            values = F.relu(layer(values), inplace=True)
        fine, coarse = self.local(values).split(CHANNELS[1:], dim=1)
        for layer in self.wider:
            values = F.relu(layer(values), inplace=True)
        return fine, coarse, self.whole(values)


class FeatureAutoencoder(nn.Module):
    """Coarse features (B, C, h, w) through a few numbers for the whole photograph → coarse features."""

    def __init__(self, channels: int, grid: tuple[int, int]) -> None:
        super().__init__()
        halves = [(-(-height // 2), -(-width // 2)) for height, width in [grid]]
        halves.append((-(-halves[0][0] // 2), -(-halves[0][1] // 2)))
        self.sizes = [halves[0], grid]
        self.halving = nn.ModuleList(nn.Conv2d(before, HIDDEN, 3, stride=2, padding=1) for before in (channels, HIDDEN))
        self.code = nn.Conv2d(HIDDEN, CODE, halves[1])
        self.decode = nn.ConvTranspose2d(CODE, HIDDEN, halves[1])
        self.doubling = nn.ModuleList(nn.Conv2d(HIDDEN, HIDDEN, 3, padding=1) for _ in self.sizes)
        self.output = nn.Conv2d(HIDDEN, channels, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        values = features
        for layer in self.halving:
            values = F.relu(layer(values), inplace=True)
        values = F.relu(self.decode(self.code(values)), inplace=True)
        for layer, size in zip(self.doubling, self.sizes, strict=True):
            values = F.relu(layer(_on(values, size)), inplace=True)
        restored: Tensor = self.output(values)
        return restored


class Difference(nn.Module):
    """A difference (B, C, h, w) → how unusual it is, (B, h, w): 1 on average on good photographs, before averaging."""

    middle: Tensor
    whitening: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("middle", torch.zeros(channels, 1, 1))
        self.register_buffer("whitening", torch.eye(channels)[:, :, None, None].contiguous())

    def forward(self, values: Tensor) -> Tensor:
        whitened = F.conv2d(values - self.middle, self.whitening)
        return F.avg_pool2d(whitened, 3, 1, 1, count_include_pad=False).square().mean(1)

    def set(self, mean: Tensor, covariance: Tensor) -> None:
        """Take what is usual, (C,) and (C, C)."""
        usual = covariance.diagonal().mean().clamp(min=1e-12)
        covariance = covariance + SHRINKAGE * usual * torch.eye(len(covariance)).to(covariance)
        root = torch.linalg.cholesky(torch.linalg.inv(covariance))
        self.middle.copy_(mean[:, None, None])
        self.whitening.copy_(root.T[:, :, None, None])


class Moments:
    """Mean and covariance of the channels over any number of batches, in double precision."""

    def __init__(self, channels: int, device: torch.device) -> None:
        self.count = 0
        self.total = torch.zeros(channels, dtype=torch.float64, device=device)
        self.products = torch.zeros(channels, channels, dtype=torch.float64, device=device)

    def add(self, values: Tensor) -> None:
        """(B, C, h, w)."""
        rows = values.transpose(0, 1).flatten(1).double()
        self.count += rows.shape[1]
        self.total += rows.sum(1)
        self.products += rows @ rows.T

    def result(self) -> tuple[Tensor, Tensor]:
        """(C,) and (C, C)."""
        mean = self.total / self.count
        return mean, self.products / self.count - torch.outer(mean, mean)


class Features:
    """The network's features of photographs, computed once."""

    def __init__(self, count: int, config: EfficientADConfig, memory_bytes: int) -> None:
        """Of `count` photographs; what exceeds `memory_bytes` lies in files, as in `FeatureStore`."""
        height, width = config.size
        shapes = [
            (channels, -(-height // step), -(-width // step)) for channels, step in zip(CHANNELS, STEPS, strict=True)
        ]
        self.stores = [FeatureStore(count, shape, memory_bytes // len(shapes)) for shape in shapes]

    def append(self, maps: Sequence[Tensor]) -> None:
        """Add those of a batch (B, C, h, w), at each reduction."""
        for store, layer in zip(self.stores, maps, strict=True):
            store.append(layer)

    def take(self, positions: Sequence[int]) -> list[Tensor]:
        """Of the photographs at these positions, in single precision."""
        return [store.take(positions) for store in self.stores]


def embedded_course(
    graph: EmbeddedGraph,
    config: EfficientADConfig,
    count: int,
    features: Callable[[Sequence[int], int], Sequence[Tensor]],
    shallow: Tensor | None,
) -> Course:
    """The training of student and autoencoder.

    `features(positions, turn)` gives standardised ones of the `count` photographs to learn from, varied in each turn;
    `shallow` are those of other pictures, standardised too.
    """
    graph.train()
    graph.backbone.eval()

    def others(start: int) -> Iterator[Tensor | None]:
        if shallow is None:
            return itertools.repeat(None)
        each = others_in_a_step(config)
        order = streams.shuffled(len(shallow), config.seed, start * each)
        return (shallow[list(itertools.islice(order, each))].float() for _ in itertools.count())

    return Course(
        {"student": graph.student, "autoencoder": graph.autoencoder},
        count,
        features,
        others,
        graph.losses,
        lambda step: LEARNING_RATE * along_a_cosine(step, config.steps),
    )


def others_in_a_step(config: EfficientADConfig) -> int:
    """How many pictures of other things a step sees."""
    return max(1, round(OTHERS * config.batch_size))


def _on(values: Tensor, grid: tuple[int, int]) -> Tensor:
    """On another grid, bilinear."""
    same = tuple(values.shape[-2:]) == grid
    return values if same else F.interpolate(values, grid, mode="bilinear", align_corners=False)
