"""SimpleNet: a small network that tells good features from noisy ones judges patches.

Liu et al., "SimpleNet: A Simple Network for Image Anomaly Detection and Localization", CVPR 2023. Beyond the paper, and
switchable: noise in units of the features' own deviation (`auto_noise`), a share of the patches a step (`sampled`),
and an image score from its most anomalous patches instead of one (`top`). Nothing is ever chosen on test images.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from kizu.config import SimpleNetConfig
from kizu.data.preprocessing import Stack
from kizu.detectors.base import Detector, load
from kizu.detectors.fitting import FitContext, FitResult
from kizu.detectors.simplenet import published
from kizu.detectors.simplenet.feature_store import FeatureStore
from kizu.detectors.simplenet.networks import Discriminator, Projection
from kizu.detectors.simplenet.training import DIVISION, ORDER, Training, generator
from kizu.errors import ModelError, OptionError
from kizu.features import backbone
from kizu.features.anomaly_map import MapUpsampling
from kizu.features.patch_features import PatchFeatures, as_rows

__all__ = ["SimpleNet", "SimpleNetGraph"]

MEASURED = 16  # images that the features' deviation is measured on
HELD_OUT = 1 / 4  # at most so many of the good images set the threshold
SELECTING, MOST = 1 / 10, 64  # so many of them, and no more images, select a round, where one is selected


class SimpleNetGraph(nn.Module):
    """uint8 images (B, 3, H, W) → scores (B,), anomaly maps (B, 1, H, W)."""

    unit: Tensor  # () what features are divided by

    def __init__(self, config: SimpleNetConfig, network: backbone.Backbone) -> None:
        super().__init__()
        self.config = config
        self.backbone = network
        self.patches = PatchFeatures(config.patchsize, config.pretrain_embed_dimension, config.target_embed_dimension)
        self.register_buffer("unit", torch.ones(()))

    def complete(self, dimension: int, grid: tuple[int, int]) -> None:
        """Give it the two networks, newly initialised, for features (B, dimension, *grid)."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            self.projection = Projection(dimension, self.config).to(self.unit.device)
            self.discriminator = Discriminator(self.projection.width, self.config).to(self.unit.device)
        self.upsample = MapUpsampling(grid, self.config.size, self.config.smoothing).to(self.unit.device)

    def embed(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) → patch features (B, D, h, w)."""
        features: Tensor = self.patches(self.backbone(images))
        return features

    def adapt(self, rows: Tensor) -> Tensor:
        """Features (N, D) in units of their deviation, projected (N, E)."""
        adapted: Tensor = self.projection(rows / self.unit)
        return adapted

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.rate(self.embed(images))

    def forward_with_global_features(self, images: Tensor, kind: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """As `forward`, and the global features of `Backbone.forward_with_global_features` from the same pass."""
        maps, global_features = self.backbone.forward_with_global_features(images, kind)
        return *self.rate(self.patches(maps)), global_features

    def global_features(self, images: Tensor, kind: str) -> dict[str, Tensor]:
        """Global features alone, as `forward_with_global_features` gives them."""
        return self.backbone.forward_with_global_features(images, kind)[1]

    def rate(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Patch features (B, D, h, w) → scores (B,) and anomaly maps (B, 1, H, W)."""
        count, _, height, width = features.shape
        grid = -self.discriminator(self.adapt(as_rows(features))).view(count, height, width)
        most = max(1, round(self.config.top * height * width))
        scores = grid.flatten(1).topk(most, dim=1).values.mean(1)
        return scores, self.upsample(grid)


class SimpleNet(Detector):
    """A discriminator of good and noisy features (SimpleNet). Settings: the fields of `SimpleNetConfig`."""

    method = "simplenet"
    config_class = SimpleNetConfig
    learns_in_rounds = True

    def learn(self, context: FitContext) -> FitResult:
        config: SimpleNetConfig = self.config
        photos, held_out = context.photos, context.held_out
        learning, selecting, calibrating = _divided(len(photos), len(held_out) > 0, config)
        network = backbone.create(config.backbone, config.layers, config.weights, config.size)
        graph = SimpleNetGraph(config, network).to(self.device)
        with context.timed("features"):
            store = self._start(graph, learning, context)
        training = Training(graph, config, self.device)
        with context.timed("training"):
            training.run(
                lambda number: self._steps(graph, photos, learning, store, number),
                self._rows(graph, photos, selecting) if selecting else None,
                checkpoint=context.checkpoint,
                key=self._key(photos),
                progress=context.progress,
                after_round=lambda number: context.after_round(graph.eval(), number),
            )
        self.curves = {name: [facts[name] for facts in training.history] for name in training.history[0]}
        facts = {
            "dimension": graph.projection.width,
            "deviation": float(graph.unit),
            "images learned from": len(learning),
            "rounds": training.best["round"] if training.best else len(training.history),
        }
        with context.timed("calibration"):
            photos, only = (held_out, None) if len(held_out) else (photos, calibrating)
            return self.score_held_out(
                graph, photos, context.progress, only=only, facts=facts, default_median=-config.dsc_margin
            )

    def calibrates_with(self, photos: int, held_out: int) -> int:
        return held_out or len(_divided(photos, False, self.config)[2])

    def _start(self, graph: SimpleNetGraph, learning: Sequence[int], context: FitContext) -> FeatureStore | None:
        """Measure features and complete the graph; keep all features where each pass would compute the same ones."""
        photos = context.photos
        some = learning[:: math.ceil(len(learning) / MEASURED)]
        with torch.inference_mode():
            features = torch.cat([graph.embed(self.pixels(photos, [number])) for number in some])
        self.remarks += graph.patches.remarks((features.shape[2], features.shape[3]))
        if self.config.auto_noise:
            graph.unit.fill_(as_rows(features).std(0, correction=0).mean().clamp(min=1e-6))
        graph.complete(features.shape[1], (features.shape[2], features.shape[3]))
        if self.config.train_backbone or self.augmentation is not None:
            return None
        store = FeatureStore(len(learning), features[0, 0].numel(), features.shape[1], context.memory_bytes // 3)
        with torch.inference_mode():
            for _, pixels in self.stream(photos, "Features", context.progress, only=learning):
                store.append(graph.embed(pixels))
        return store

    def _steps(
        self, graph: SimpleNetGraph, photos: Stack, learning: Sequence[int], store: FeatureStore | None, number: int
    ) -> Iterator[Tensor]:
        """Rows (N, D) of each step of a pass: images in a new order, of each a share of its patches."""
        random = generator(self.config.seed, ORDER, number)
        for some in torch.randperm(len(learning), generator=random).split(self.config.batch_size):
            if store is not None:
                rows = store.take(some, self._sampled(len(some), store.patches, random)).to(self.device)
            else:
                pixels = self.pixels(photos, [learning[place] for place in some.tolist()], turn=number + 1)
                with torch.set_grad_enabled(self.config.train_backbone):
                    features = graph.embed(pixels).flatten(2).transpose(1, 2)  # (B, P, D)
                chosen = self._sampled(len(some), features.shape[1], random).to(self.device)
                rows = features[torch.arange(len(some), device=self.device)[:, None], chosen].flatten(0, 1)
            yield rows if len(rows) > 1 else rows.repeat(2, 1)  # batch normalisation needs two

    def _sampled(self, images: int, patches: int, random: torch.Generator) -> Tensor:
        """(images, k): which patches of each image."""
        count = max(1, round(self.config.sampled * patches))
        return torch.rand(images, patches, generator=random).topk(count, dim=1).indices

    @torch.inference_mode()
    def _rows(self, graph: SimpleNetGraph, photos: Stack, numbers: Sequence[int]) -> Tensor:
        return torch.cat([as_rows(graph.embed(self.pixels(photos, [number]))) for number in numbers])

    def save_to_path(self, folder: str | os.PathLike[str]) -> Path:
        """Write `ckpt.pth` and `params.pkl` in the published layout; the backbone's weights are not inside."""
        if not isinstance(self.graph, SimpleNetGraph):
            raise ModelError("There is nothing to save: call fit first.")
        levels = {key: self.describe()[key] for key in ("threshold", "calibration_scores", "map", "facts", "training")}
        return published.write(folder, self.graph, levels)

    def load_from_path(self, folder: str | os.PathLike[str]) -> Self:
        """Become the model in a folder: kizu's own, or `ckpt.pth` with or without `params.pkl`.

        Of a run, models/0 is the model of its first category. Raises `ModelError` where there is none. A model without
        levels stops nothing.
        """
        folder = _numbered(Path(folder))
        if (folder / "model.json").exists() or not (folder / published.CHECKPOINT).exists():
            loaded = load(folder)
            if not isinstance(loaded, SimpleNet):
                raise ModelError(f"{folder} is a model of {loaded.method}: open it with kizu.load")
        else:
            config, graph, levels = published.read(folder, self.config)
            loaded = SimpleNet(config)
            loaded.graph = graph.to(self.device)
            if levels:
                loaded.restore_thresholds(levels)
        self.__dict__.update(loaded.__dict__)
        return self

    def _key(self, photos: Stack) -> str:
        """Of everything that training depends on."""
        settings = json.dumps(self.config.model_dump(mode="json"), sort_keys=True)
        return hashlib.blake2b((photos.hash + settings).encode(), digest_size=16).hexdigest()

    @classmethod
    def restore_graph(cls, config: Any, tensors: dict[str, Tensor]) -> nn.Module:
        graph = SimpleNetGraph(config, backbone.blank(config.backbone, config.layers, config.size))
        network, key = published.first_layer(config)
        first = f"{network.removeprefix('pre_')}.{key}"
        grid = tensors["upsample.rows"].shape[1], tensors["upsample.columns"].shape[1]
        graph.complete(tensors[first].shape[1], grid)
        return graph


def _numbered(folder: Path) -> Path:
    """models/0 → the first of the models that lie in models/, where no folder has such a name."""
    if folder.exists() or not folder.name.isdigit():
        return folder
    models = sorted(path.parent for path in folder.parent.glob("*/model.json"))
    return models[int(folder.name)] if int(folder.name) < len(models) else folder


def _divided(count: int, has_others: bool, config: SimpleNetConfig) -> tuple[list[int], list[int], list[int]]:
    """Numbers of the images to learn from, to select a round by, and to set the threshold by.

    The threshold takes as many as its false-alarm rate needs, but no more than a quarter; none where there are others.
    """
    needed = math.ceil(1 / config.false_alarms) - 1
    calibrating = 0 if has_others else min(needed, int(HELD_OUT * count))
    selecting = max(1, min(int(SELECTING * count), MOST)) if config.select == "held_out" else 0
    if selecting and count - calibrating - selecting < 1:
        raise OptionError(f"--select held_out: of {count} images none would be left to learn from; use --select last")
    order = torch.randperm(count, generator=generator(config.seed, DIVISION)).tolist()
    aside = calibrating + selecting
    return sorted(order[aside:]), sorted(order[calibrating:aside]), sorted(order[:calibrating])
