"""Global features: of a whole image, which good images it is near to, and which groups of its features deviate."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["GlobalFeatures"]

NUM_NEAREST = 3  # good images that a prediction names
NUM_FEATURES = 3  # features of a group that a prediction names

Double = npt.NDArray[np.float64]


@dataclass(frozen=True)
class GlobalFeatures:
    """The whitened features of good images, to compare others with."""

    good: npt.NDArray[np.float32]  # (N, D)
    numbers: npt.NDArray[np.int64]  # (N,) of the training images
    sizes: npt.NDArray[np.int64]  # (G,) how many features each group has
    groups: Sequence[str]  # names of the groups
    names: Sequence[str]  # of the training images

    def explain(self, parts: Double, contributions: Double, whitened: Double) -> list[dict[str, Any]]:
        """The parts of each image's score, from standardised scores (B, 2), what these add (B, 2), features (B, D).

        `structural` and `logical` score; which `kind` adds more; the `nearest` good images; and the `groups`.
        """
        return [
            {
                "kind": "logical" if added[1] > added[0] else "structural",
                "structural": float(part[0]),
                "logical": float(part[1]),
                "nearest": self._nearest(feature),
                "groups": self._groups(feature),
            }
            for part, added, feature in zip(parts, contributions, whitened, strict=True)
        ]

    def _nearest(self, feature: Double) -> list[dict[str, Any]]:
        """The good images that a feature (D,) is nearest to."""
        distances = np.linalg.norm(self.good - feature.astype(np.float32), axis=1)
        nearest = distances.argsort(kind="stable")[:NUM_NEAREST]
        return [{"image": self.names[self.numbers[n]], "distance": float(distances[n])} for n in nearest]

    def _groups(self, feature: Double) -> list[dict[str, Any]]:
        """Each group's share of the squared distance, the largest first, with the features that deviate most."""
        total = float((feature**2).sum())
        groups = []
        for name, part in zip(self.groups, np.split(feature, self.sizes.cumsum()[:-1]), strict=True):
            deviating = np.abs(part).argsort(kind="stable")[::-1][:NUM_FEATURES]
            share = float((part**2).sum()) / total if total else 0.0
            groups.append({"group": name, "share": share, "features": {str(n): float(part[n]) for n in deviating}})
        return sorted(groups, key=lambda group: -group["share"])
