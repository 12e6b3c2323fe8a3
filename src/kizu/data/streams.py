"""Endless streams of pictures for training, in an order that follows from the seed and can be entered anywhere.

The pictures are photographs in a folder, or textures: drawn pictures of nothing in particular. Half of these are dead
leaves (shapes of all sizes that cover each other), whose edges and sizes are distributed as those in photographs (Lee,
Mumford and Huang, 2001); a quarter are noise with a falling spectrum, a quarter gratings bent by it.
"""

import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kizu.data import image
from kizu.data.photographs import scan
from kizu.data.preprocessing import Preprocessing, Readable, batches
from kizu.errors import DataError

__all__ = ["Picture", "Texture", "cropped", "drawn", "endless", "photographs", "shuffled"]

log = logging.getLogger("kizu")
UNCROPPED = 0.1  # share of the crops that are the whole picture
MIN_CROP = 0.15  # of a crop's sides, as a share of the picture's
NUM_TEXTURES = 512  # after so many they repeat
TEXTURE_SIDE = 320
NUM_LEAVES = 150  # in a picture of dead leaves


@dataclass(frozen=True)
class Picture:
    """A photograph in a file, whole or a random part of it that follows from `crop`."""

    path: Path
    crop: tuple[int, ...] | None = None

    def read(
        self, at_least: tuple[int, int] | None = None, white: int = image.WHITE, *, large: bool = False
    ) -> tuple[npt.NDArray[np.uint8], tuple[int, int]]:
        if self.crop is None:
            return image.read_at_least(self.path, at_least, white)
        rng = np.random.default_rng(self.crop)
        rgb = image.read(self.path)
        share = 1.0 if rng.random() < UNCROPPED else np.exp(rng.uniform(np.log(MIN_CROP), 0))
        height, width = (max(image.MIN_SIDE, round(share * side)) for side in rgb.shape[:2])
        top, left = (rng.integers(0, n - m + 1) for n, m in zip(rgb.shape[:2], (height, width), strict=True))
        rgb = rgb[top : top + height, left : left + width]
        return (rgb[:, ::-1] if rng.random() < 0.5 else rgb), rgb.shape[:2]


@dataclass(frozen=True)
class Texture:
    """A drawn picture. Equal seeds give equal pictures."""

    seed: int

    def read(
        self, at_least: tuple[int, int] | None = None, white: int = image.WHITE, *, large: bool = False
    ) -> tuple[npt.NDArray[np.uint8], tuple[int, int]]:
        """RGB (320, 320, 3) and its (height, width)."""
        picture = _draw(self.seed % NUM_TEXTURES)
        return picture, (TEXTURE_SIDE, TEXTURE_SIDE)


def photographs(folder: str | Path) -> list[Path]:
    """All images below a folder. Raises `DataError` where there is none."""
    paths = list(scan(Path(folder))) if Path(folder).is_dir() else []
    if not paths:
        raise DataError(f"{folder}: there is no folder of that name with images in it")
    return paths


def shuffled(count: int, seed: int, start: int = 0) -> Iterator[int]:
    """0 … count - 1 in random order, then in another one, and so on; from the `start`-th on."""
    for epoch in itertools.count(start // count):
        order = np.random.default_rng([seed, epoch]).permutation(count)
        yield from order[start % count if epoch == start // count else 0 :].tolist()


def drawn(seed: int, start: int = 0) -> Iterator[Texture]:
    """An endless stream of textures, from the `start`-th on."""
    return (Texture(seed + number) for number in itertools.count(start))


def cropped(paths: Sequence[Path], seed: int, start: int, crops: bool) -> Iterator[Picture]:
    """An endless stream of photographs in random order, from the `start`-th on, whole or in random parts."""
    for number, which in enumerate(shuffled(len(paths), seed, start), start):
        yield Picture(paths[which], (seed, number) if crops else None)


def endless(
    items: Iterator[Readable], preprocessing: Preprocessing, batch_size: int, workers: int = 2
) -> Iterator[npt.NDArray[np.uint8]]:
    """Batches (B, 3, h, w). A photograph that cannot be read is missing from its batch, and the log says so once."""
    reported: set[str] = set()
    for batch in batches(items, preprocessing, batch_size=batch_size, workers=workers):
        for _, error in batch.failures:
            if error.name not in reported:
                reported.add(error.name)
                log.warning("left out: %s", error)
        yield batch.pixels


@lru_cache(maxsize=NUM_TEXTURES)
def _draw(seed: int) -> npt.NDArray[np.uint8]:
    rng = np.random.default_rng([seed, TEXTURE_SIDE])
    kind = seed % 4
    picture = _leaves(rng) if kind < 2 else _clouds(rng) if kind == 2 else _gratings(rng)
    picture += rng.normal(0, rng.uniform(0, 8), picture.shape)  # grain
    return np.clip(picture, 0, 255).astype(np.uint8)


def _leaves(rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Discs, boxes and stripes with radii r of density r⁻³, each with its own colour and shading."""
    y, x = np.mgrid[:TEXTURE_SIDE, :TEXTURE_SIDE]
    picture = np.broadcast_to(_colour(rng), (TEXTURE_SIDE, TEXTURE_SIDE, 3)).copy()
    radii = np.sort(9 / np.sqrt(rng.uniform(0.003, 1, NUM_LEAVES)))[::-1]  # the largest lie lowest
    for radius in radii:
        centre, angle, aspect = rng.uniform(0, TEXTURE_SIDE, 2), rng.uniform(0, np.pi), rng.uniform(0.3, 1)
        top, left = np.maximum(centre - 1.5 * radius, 0).astype(int)
        bottom, right = (centre + 1.5 * radius).astype(int) + 1
        part = np.s_[top:bottom, left:right]
        u = (y[part] - centre[0]) * np.cos(angle) + (x[part] - centre[1]) * np.sin(angle)
        v = ((x[part] - centre[1]) * np.cos(angle) - (y[part] - centre[0]) * np.sin(angle)) / aspect
        inside = np.hypot(u, v) < radius if rng.random() < 0.6 else np.maximum(abs(u), abs(v)) < 0.9 * radius
        colour, slope = _colour(rng), rng.normal(0, 30)
        picture[part][inside] = colour + slope * u[inside, None] / radius
    return picture


def _colour(rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Any brightness, little tint."""
    return np.asarray(rng.uniform(0, 255) + rng.normal(0, 30, 3))


def _clouds(rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Noise whose amplitude falls with frequency, mixed into three channels."""
    exponent = rng.uniform(0.6, 1.8)
    grey, tint = _noise(rng, exponent), _noise(rng, exponent)
    mixed = grey[..., None] * rng.uniform(20, 70, 3) + tint[..., None] * rng.normal(0, 25, 3)
    return np.asarray(rng.uniform(60, 190, 3) + mixed)


def _gratings(rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """One to three waves, smooth or square, along bent lines."""
    y, x = np.mgrid[:TEXTURE_SIDE, :TEXTURE_SIDE]
    picture = np.broadcast_to(rng.uniform(60, 190, 3), (TEXTURE_SIDE, TEXTURE_SIDE, 3)).copy()
    for _ in range(rng.integers(1, 4)):
        angle, period = rng.uniform(0, np.pi), np.exp(rng.uniform(np.log(3), np.log(60)))
        along = x * np.cos(angle) + y * np.sin(angle) + rng.uniform(0, 6) * _noise(rng, 1.6)
        wave = np.sin(2 * np.pi * along / period)
        picture += (np.sign(wave) if rng.random() < 0.4 else wave)[..., None] * rng.normal(0, 40, 3)
    return picture


def _noise(rng: np.random.Generator, exponent: float) -> npt.NDArray[np.float64]:
    """(TEXTURE_SIDE, TEXTURE_SIDE) of deviation 1, amplitude ∝ frequency^-exponent."""
    frequency = np.hypot(np.fft.fftfreq(TEXTURE_SIDE)[:, None], np.fft.rfftfreq(TEXTURE_SIDE))
    frequency[0, 0] = np.inf
    values = np.fft.irfft2(
        np.fft.rfft2(rng.normal(size=(TEXTURE_SIDE, TEXTURE_SIDE))) * frequency**-exponent, (TEXTURE_SIDE, TEXTURE_SIDE)
    )
    return np.asarray(values / values.std())
