"""What the feature of a whole image says: which good images it is near to, and which of its groups deviate."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Wholes"]

NEAREST, FEATURES = 3, 3  # good images, and features of a group, that a prediction names

Double = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Wholes:
    """Good images' whitened features (N, D), their numbers (N,), and how many features each group has (G,)."""

    good: npt.NDArray[np.float32]
    numbers: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    groups: Sequence[str]  # their names
    names: Sequence[str]  # of the training images

    def explain(self, parts: Double, contributions: Double, whitened: Double) -> list[dict[str, Any]]:
        """Of images with standardised scores (B, 2), what these add to the score (B, 2), and features (B, D).

        `structural` and `logical` score; which `kind` adds more; the `nearest` good images; and the `groups`.
        """
        return [
            {
                "kind": "logical" if both[1] > both[0] else "structural",
                "structural": float(part[0]),
                "logical": float(part[1]),
                "nearest": self._nearest(whole),
                "groups": self._groups(whole),
            }
            for part, both, whole in zip(parts, contributions, whitened, strict=True)
        ]

    def _nearest(self, whole: Double) -> list[dict[str, Any]]:
        """The good images that a feature (D,) is nearest to."""
        distances = np.linalg.norm(self.good - whole.astype(np.float32), axis=1)
        found = distances.argsort(kind="stable")[:NEAREST]
        return [{"image": self.names[self.numbers[n]], "distance": float(distances[n])} for n in found]

    def _groups(self, whole: Double) -> list[dict[str, Any]]:
        """Each group's share of a squared distance, the largest first, with its most deviating features."""
        total = float((whole**2).sum())
        groups = []
        for name, part in zip(self.groups, np.split(whole, self.sizes.cumsum()[:-1]), strict=True):
            most = np.abs(part).argsort(kind="stable")[::-1][:FEATURES]
            share = float((part**2).sum()) / total if total else 0.0
            groups.append({"group": name, "share": share, "features": {str(n): float(part[n]) for n in most}})
        return sorted(groups, key=lambda group: -group["share"])
