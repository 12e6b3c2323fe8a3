"""The SimpleNet detector: features once, passes over them, a threshold from images that it was not trained on."""

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from kizu.calibration.threshold import images_needed
from kizu.config import SimpleNetConfig
from kizu.detectors.base import Detector
from kizu.detectors.fitting import FitContext, FitResult, Split
from kizu.detectors.loading import load
from kizu.detectors.simplenet import published
from kizu.detectors.simplenet.networks import SimpleNetGraph, first_layer
from kizu.detectors.simplenet.training import DIVISION, ORDER, Training, generator
from kizu.detectors.stack import Stack
from kizu.errors import ModelError, OptionError
from kizu.features import backbone
from kizu.features.feature_store import FeatureStore
from kizu.features.patch_features import as_rows

__all__ = ["SimpleNet"]

DEVIATION_IMAGES = 16  # that the features' deviation is measured on
MAX_CALIBRATION_SHARE = 1 / 4  # of the good images
SELECTION_SHARE, MAX_SELECTION = 1 / 10, 64  # so many of them, and no more images, select a round


class SimpleNet(Detector):
    """A discriminator of good and noisy features (SimpleNet). Settings: the fields of `SimpleNetConfig`."""

    method = "simplenet"
    config_class = SimpleNetConfig
    learns_in_rounds = True

    def learn(self, context: FitContext) -> FitResult:
        config: SimpleNetConfig = self.config
        photos, held_out = context.photos, context.held_out
        split = _split(len(photos), len(held_out) > 0, config)
        network = backbone.create(config.backbone, config.layers, config.weights, config.size)
        graph = SimpleNetGraph(config, network).to(self.device)
        with context.timed("features"):
            store = self._start(graph, split.train, context)
        training = Training(graph, config, self.device)
        with context.timed("training"):
            training.run(
                lambda number: self._steps(graph, photos, split.train, store, number),
                self._rows(graph, photos, split.select) if split.select else None,
                context,
            )
        self.curves = {name: [losses[name] for losses in training.history] for name in training.history[0]}
        facts = {
            "dimension": graph.projection.width,
            "deviation": float(graph.unit),
            "images learned from": len(split.train),
            "rounds": training.best["round"] if training.best else len(training.history),
        }
        with context.timed("calibration"):
            self.learn_units(graph, photos, split.train, context.progress)
            photos, only = (held_out, None) if len(held_out) else (photos, split.calibrate)
            return self.score_held_out(
                graph, photos, context.progress, only=only, facts=facts, default_median=-config.dsc_margin
            )

    def calibrates_with(self, photos: int, held_out: int) -> int:
        return held_out or len(_split(photos, False, self.config).calibrate)

    def _start(self, graph: SimpleNetGraph, train: Sequence[int], context: FitContext) -> "FeatureStore | None":
        """Measure features and complete the graph; keep all features where each pass would compute the same ones."""
        measured = train[:: math.ceil(len(train) / DEVIATION_IMAGES)]
        with torch.inference_mode():
            features = torch.cat([graph.embed(self.pixels(context.photos, [index])) for index in measured])
        self.remarks += graph.patches.remarks((features.shape[2], features.shape[3]))
        if self.config.auto_noise:
            graph.unit.fill_(as_rows(features).std(0, correction=0).mean().clamp(min=1e-6))
        graph.complete(features.shape[1], (features.shape[2], features.shape[3]))
        graph.upsample.inspect(context.zones, context.seen)
        if self.config.train_backbone or self.augmentation is not None:
            return None
        shape = features[0, 0].numel(), features.shape[1]
        store = FeatureStore(len(train), shape, context.memory_bytes // 3)
        with torch.inference_mode():
            for _, pixels in self.stream(context.photos, "Features", context.progress, only=train):
                store.append(graph.embed(pixels).flatten(2).transpose(1, 2))
        return store

    def _steps(
        self, graph: SimpleNetGraph, photos: Stack, train: Sequence[int], store: "FeatureStore | None", number: int
    ) -> Iterator[Tensor]:
        """Rows (N, D) of each step of a pass: images in a new order, of each a share of its patches."""
        random = generator(self.config.seed, ORDER, number)
        for positions in torch.randperm(len(train), generator=random).split(self.config.batch_size):
            if store is not None:
                patches = self._sampled(len(positions), store.shape[0], random)
                rows = store.take(positions.tolist(), patches).flatten(0, 1).to(self.device)
            else:
                pixels = self.pixels(photos, [train[position] for position in positions.tolist()], turn=number + 1)
                with torch.set_grad_enabled(self.config.train_backbone):
                    features = graph.embed(pixels).flatten(2).transpose(1, 2)  # (B, P, D)
                patches = self._sampled(len(positions), features.shape[1], random).to(self.device)
                rows = features[torch.arange(len(positions), device=self.device)[:, None], patches].flatten(0, 1)
            yield rows if len(rows) > 1 else rows.repeat(2, 1)  # batch normalisation needs two

    def _sampled(self, images: int, patches: int, random: torch.Generator) -> Tensor:
        """(images, k): which patches of each image."""
        count = max(1, round(self.config.sampled * patches))
        return torch.rand(images, patches, generator=random).topk(count, dim=1).indices

    @torch.inference_mode()
    def _rows(self, graph: SimpleNetGraph, photos: Stack, indices: Sequence[int]) -> Tensor:
        return torch.cat([as_rows(graph.embed(self.pixels(photos, [index]))) for index in indices])

    @classmethod
    def restore_graph(cls, config: Any, tensors: dict[str, Tensor]) -> nn.Module:
        graph = SimpleNetGraph(config, backbone.blank(config.backbone, config.layers, config.size))
        network, weight = first_layer(config)
        dimension = tensors[f"{network.removeprefix('pre_')}.{weight}"].shape[1]
        graph.complete(dimension, (tensors["upsample.rows"].shape[1], tensors["upsample.columns"].shape[1]))
        graph.upsample.restore(tensors)
        return graph

    def save_to_path(self, folder: str | os.PathLike[str]) -> Path:
        """Write `ckpt.pth` and `params.pkl` in the published layout; the backbone's weights are not inside."""
        if not isinstance(self.graph, SimpleNetGraph):
            raise ModelError("There is nothing to save: call fit first.")
        if self.preprocessing.alignment is not None:
            raise ModelError("The published systems do not align photographs: train without `align=True`.")
        if self.preprocessing.tiling is not None:
            raise ModelError("The published systems do not judge in tiles: train without `tile`.")
        states = {"discriminator": self.graph.discriminator.state_dict()}
        if self.config.pre_proj:
            states["pre_projection"] = self.graph.projection.state_dict()
        if self.config.train_backbone:
            states["backbone"] = self.graph.backbone.state_dict()
        about = self.describe()
        thresholds = {key: about[key] for key in ("threshold", "calibration_scores", "map", "facts", "training")}
        model = published.Published(self.config, states, thresholds)
        return published.write(folder, model, list(self.graph.backbone.layers), self.graph.unit)

    def load_from_path(self, folder: str | os.PathLike[str]) -> Self:
        """Become the model in a folder: kizu's own, or `ckpt.pth` with or without `params.pkl`.

        Of a run, models/0 is the model of its first category. Raises `ModelError` where there is none, or where there
        are several. A model without a threshold stops nothing.
        """
        folder = _located(Path(folder))
        if (folder / "model.json").exists() or not (folder / published.CHECKPOINT).exists():
            loaded = load(folder)
            if not isinstance(loaded, SimpleNet):
                raise ModelError(f"{folder} is a model of {loaded.method}: open it with kizu.load")
        else:
            model = published.read(folder, self.config)
            loaded = SimpleNet(model.config)
            try:
                loaded.graph = _graph_of(model, self.config.weights).to(self.device)
            except (KeyError, TypeError, AttributeError, RuntimeError) as error:
                raise published.misfit(folder, error) from None
            if model.thresholds:
                loaded.restore_thresholds(model.thresholds)
        self.__dict__.update(loaded.__dict__)
        return self


def _split(count: int, has_held_out: bool, config: SimpleNetConfig) -> Split:
    """Which of `count` images to train on, to select a round by, and to set the threshold by.

    The threshold takes as many as its false-alarm rate needs, but no more than a quarter; none where others are held
    out for it.
    """
    most = int(MAX_CALIBRATION_SHARE * count)
    calibrating = 0 if has_held_out else min(images_needed(config.false_alarms), most)
    selecting = max(1, min(int(SELECTION_SHARE * count), MAX_SELECTION)) if config.select == "held_out" else 0
    if selecting and count - calibrating - selecting < 1:
        raise OptionError(
            f'`select="held_out"`: of {count} images none would be left to learn from; use `select="last"`'
        )
    order = torch.randperm(count, generator=generator(config.seed, DIVISION)).tolist()
    aside = calibrating + selecting
    return Split(sorted(order[aside:]), sorted(order[calibrating:aside]), sorted(order[:calibrating]))


def _graph_of(model: published.Published, weights: str | None) -> SimpleNetGraph:
    """The graph of a published model; `weights` are the backbone's, where they are not the config's."""
    config = model.config
    weights = config.weights if weights is None else weights
    graph = SimpleNetGraph(config, backbone.create(config.backbone, config.layers, weights, config.size))
    with torch.inference_mode():
        features = graph.embed(torch.zeros(1, 3, *config.size, dtype=torch.uint8))
    graph.complete(features.shape[1], (features.shape[2], features.shape[3]))
    graph.discriminator.load_state_dict(model.states["discriminator"])
    if config.pre_proj:
        graph.projection.load_state_dict(model.states["pre_projection"])
    if "backbone" in model.states:
        graph.backbone.load_state_dict(model.states["backbone"])
    return graph.eval().requires_grad_(False)


def _located(folder: Path) -> Path:
    """The folder that holds the model: the given one, or what models/0 stands for.

    Of kizu's runs that is the first of the models in models/; in those of the published code the category's folder lies
    in models/0. Raises `ModelError` where several do.
    """
    if not folder.exists() and folder.name.isdigit():
        models = sorted(path.parent for path in folder.parent.glob("*/model.json"))
        return models[int(folder.name)] if int(folder.name) < len(models) else folder
    below = sorted(path.parent for path in folder.glob(f"*/{published.CHECKPOINT}"))
    if not below or any((folder / name).exists() for name in ("model.json", published.CHECKPOINT)):
        return folder
    if len(below) > 1:
        raise ModelError(f"{folder} holds several models: name one of {', '.join(path.name for path in below)}")
    return below[0]
