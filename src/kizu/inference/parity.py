"""Parity: whether an exported model says what the trained one said of the same photographs."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from kizu.errors import ModelError

__all__ = ["Cases", "Difference", "Tolerance"]

Float = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Tolerance:
    """How far scores and maps may differ, as shares of themselves, or of the mean size where they are smaller."""

    score: float = 1e-4
    map: float = 1e-4  # of a map's maximum
    place: int = 1  # pixels by which the maximum may move; farther, if the map is as high in both places


@dataclass(frozen=True)
class Difference:
    """How far an exported model's outcomes differ at most, in the units of `Tolerance`."""

    cases: int
    score: float
    map: float
    place: float
    verdicts: int  # that differ, where the score is farther from the threshold than the tolerance

    def within(self, tolerance: Tolerance) -> bool:
        scores, maps = self.score <= tolerance.score, self.map <= tolerance.map  # false for NaN
        return scores and maps and self.place <= tolerance.place and self.verdicts == 0

    def sentence(self, tolerance: Tolerance) -> str:
        return (
            f"on {self.cases} photographs, scores differ by at most {self.score:.1e} (allowed {tolerance.score:.1e}), "
            f"the highest values of the maps by {self.map:.1e} (allowed {tolerance.map:.1e}), their places by "
            f"{self.place:g} pixels (allowed {tolerance.place}), and {self.verdicts} verdicts differ"
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Cases:
    """Photographs as the network sees them, and what torch says of them."""

    images: npt.NDArray[np.uint8]  # (N, 3, H, W)
    scores: Float  # (N,)
    peaks: Float  # (N,) maxima of the maps
    places: npt.NDArray[np.int64]  # (N, 2) where these lie: row, column
    usual: npt.NDArray[np.float64]  # (2,) the mean sizes of scores and of peaks; the name is that in the file

    @classmethod
    def of(cls, images: npt.NDArray[np.uint8], scores: Float, maps: Float) -> Self:
        """From scores (N,) and maps (N, 1, H, W)."""
        peaks = maps.max((1, 2, 3))
        usual = [max(float(np.abs(sizes).mean(dtype=np.float64)), 1e-12) for sizes in (scores, peaks)]
        return cls(images, scores, peaks, _places(maps), np.array(usual))

    def take(self, numbers: Sequence[int]) -> "Cases":
        chosen = list(numbers)
        return Cases(self.images[chosen], self.scores[chosen], self.peaks[chosen], self.places[chosen], self.usual)

    def difference(self, scores: Float, maps: Float, threshold: float, tolerance: Tolerance) -> Difference:
        """How far the scores (N,) and maps (N, 1, H, W) of another way to run the model differ from torch's."""
        sizes, heights = (np.maximum(np.abs(v), u) for v, u in zip((self.scores, self.peaks), self.usual, strict=True))
        rows, columns = self.places.T
        at_places = maps[np.arange(len(maps)), 0, rows, columns]
        moved = np.abs(_places(maps) - self.places).max(1)
        peaks = maps.max((1, 2, 3))
        as_high = peaks - at_places <= tolerance.map * heights
        in_doubt = np.abs(self.scores - threshold) <= tolerance.score * sizes
        changed = ((scores > threshold) != (self.scores > threshold)) & ~in_doubt
        return Difference(
            cases=len(scores),
            score=float((np.abs(scores - self.scores) / sizes).max()),
            map=float((np.abs(peaks - self.peaks) / heights).max()),
            place=float(np.where(as_high, 0, moved).max()),
            verdicts=int(changed.sum()),
        )

    def write(self, path: Path) -> None:
        save_file({name: np.ascontiguousarray(values) for name, values in vars(self).items()}, path)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises `ModelError` where the file holds no cases."""
        try:
            cases = cls(**load_file(path))
        except (OSError, TypeError, ValueError, SafetensorError) as error:
            raise ModelError(f"{path}: the parity cases are damaged ({error})") from None
        return cases


def _places(maps: Float) -> npt.NDArray[np.int64]:
    """Row and column (N, 2) of the maximum of each map (N, 1, H, W)."""
    return np.stack(np.unravel_index(maps.reshape(len(maps), -1).argmax(1), maps.shape[2:]), axis=1)
