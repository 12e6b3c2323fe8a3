"""The papers' protocol, for comparison with their numbers: of all rounds of training, the one best on the test images.

Such a number says how well one could have done, not how well one will do. It decides nothing about a model.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor, nn

from kizu.data.dataset import Sample
from kizu.errors import BadImage, DataError
from kizu.evaluation import metrics
from kizu.evaluation.evaluate import CategoryResult, measure

if TYPE_CHECKING:
    from kizu.detectors.base import Detector
    from kizu.inference.prediction import Prediction

__all__ = ["Oracle"]


class Oracle:
    """Scores the test images after every round, and keeps the state of the round with the best image AUROC.

    Among equal rounds the best pixel AUROC decides, as in the published code.
    """

    def __init__(self, detector: "Detector", samples: Sequence[Sample]) -> None:
        self.detector, self.samples = detector, samples
        self.rounds = 0
        self.best: tuple[float, float] | None = None
        self.round = 0
        self.state: dict[str, Tensor] = {}  # of that round

    def measure_round(self, graph: nn.Module, number: int) -> None:
        """Score all test images with the graph as it is after round `number`."""
        self.rounds = number
        predictions = self._predict(graph)
        scores, labels = [p.score for _, p in predictions], [sample.is_anomalous for sample, _ in predictions]
        value = metrics.image_metrics(scores, labels)[0]["image_auroc"]
        if value is None or (self.best is not None and value < self.best[0]):
            return
        aurocs = (value, _pixel_auroc(predictions))
        if self.best is None or aurocs > self.best:
            self.best, self.round = aurocs, number
            self.state = {key: tensor.clone() for key, tensor in graph.state_dict().items()}

    def report(self, result: CategoryResult) -> None:
        """Write the best round's metrics beside those of the result; the detector stays as it is."""
        graph = self.detector.graph
        if self.best is None or graph is None:
            return
        last = {key: tensor.clone() for key, tensor in graph.state_dict().items()}
        graph.load_state_dict(self.state)
        result.oracle = {"round": float(self.round), **measure(self._predict(graph))[0]}
        graph.load_state_dict(last)
        result.notes.append(
            f"Oracle: of {self.rounds} rounds, round {self.round} was the best on the test images, with an image AUROC "
            f"of {self.best[0]:.4f}. Everything else here is of the model as it was learned, from good images alone."
        )

    def _predict(self, graph: nn.Module) -> "list[tuple[Sample, Prediction]]":
        self.detector.graph = graph.eval()
        outcomes = self.detector.judge(self.samples)
        return [(sample, outcome) for sample, outcome in outcomes if not isinstance(outcome, BadImage)]


def _pixel_auroc(predictions: "Sequence[tuple[Sample, Prediction]]") -> float:
    """Pixel AUROC over all test images; 0 where there are no masks."""
    maps, masks = [], []
    for sample, prediction in predictions:
        try:
            mask = sample.mask(prediction.shape)
        except DataError:
            continue
        if mask is not None:
            maps.append(prediction.anomaly_map.ravel())
            masks.append(mask.ravel())
    if not any(mask.any() for mask in masks):
        return 0.0
    return metrics.ranking(np.concatenate(maps), np.concatenate(masks))[0]
