"""An endless supply of pictures, in an order that follows from the seed and can be entered anywhere."""

import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kizu.data import image as images
from kizu.data.preprocessing import Preprocessing, Readable, batches
from kizu.data.textures import Texture
from kizu.errors import DataError

__all__ = ["Picture", "cropped", "drawn", "endless", "photographs", "shuffled"]

log = logging.getLogger("kizu")
WHOLE = 0.1  # share of the crops that are the whole picture
SMALLEST = 0.15  # of a crop's sides, as a share of the picture's


@dataclass(frozen=True)
class Picture:
    """A photograph in a file, whole or a random part of it that follows from `crop`."""

    path: Path
    crop: tuple[int, ...] | None = None

    def read(self, at_least: tuple[int, int] | None = None) -> tuple[npt.NDArray[np.uint8], tuple[int, int]]:
        if self.crop is None:
            return images.read_at_least(self.path, at_least)
        rng = np.random.default_rng(self.crop)
        rgb = images.read(self.path)
        share = 1.0 if rng.random() < WHOLE else np.exp(rng.uniform(np.log(SMALLEST), 0))
        height, width = (max(images.MIN_SIDE, round(share * side)) for side in rgb.shape[:2])
        top, left = (rng.integers(0, n - m + 1) for n, m in zip(rgb.shape[:2], (height, width), strict=True))
        rgb = rgb[top : top + height, left : left + width]
        return (rgb[:, ::-1] if rng.random() < 0.5 else rgb), rgb.shape[:2]


def photographs(folder: str | Path) -> list[Path]:
    """All images below a folder. Raises `DataError` where there is none."""
    found = list(images.scan(Path(folder))) if Path(folder).is_dir() else []
    if not found:
        raise DataError(f"{folder}: there is no folder of that name with images in it")
    return found


def shuffled(count: int, seed: int, start: int = 0) -> Iterator[int]:
    """0 … count - 1 in random order, then in another one, and so on; from the `start`-th on."""
    for epoch in itertools.count(start // count):
        order = np.random.default_rng([seed, epoch]).permutation(count)
        yield from order[start % count if epoch == start // count else 0 :].tolist()


def drawn(seed: int, start: int = 0) -> Iterator[Texture]:
    """Textures from the `start`-th on."""
    return (Texture(seed + number) for number in itertools.count(start))


def cropped(paths: Sequence[Path], seed: int, start: int, crops: bool) -> Iterator[Picture]:
    """Photographs in random order, whole or in random parts."""
    for number, which in enumerate(shuffled(len(paths), seed, start), start):
        yield Picture(paths[which], (seed, number) if crops else None)


def endless(
    items: Iterator[Readable], preprocessing: Preprocessing, batch_size: int, workers: int = 2
) -> Iterator[npt.NDArray[np.uint8]]:
    """Batches (B, 3, h, w). A photograph that cannot be read is missing from its batch, and the log says so once."""
    told: set[str] = set()
    for batch in batches(items, preprocessing, batch_size=batch_size, workers=workers):
        for _, error in batch.failures:
            if error.name not in told:
                told.add(error.name)
                log.warning("left out: %s", error)
        yield batch.pixels
