"""Drawn textures: pictures of nothing in particular, for training that needs photographs of other things.

Half are dead leaves (shapes of all sizes that cover each other), whose edges and sizes are distributed as those in
photographs (Lee, Mumford and Huang, 2001); a quarter are noise with a falling spectrum, a quarter gratings bent by it.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

__all__ = ["Texture"]

DISTINCT = 512  # after so many they repeat
SIDE = 320
SHAPES = 150  # in a picture of dead leaves


@dataclass(frozen=True)
class Texture:
    """A drawn picture. Equal seeds give equal pictures."""

    seed: int

    def read(self, at_least: tuple[int, int] | None = None) -> tuple[npt.NDArray[np.uint8], tuple[int, int]]:
        """RGB (320, 320, 3) and its (height, width)."""
        picture = _draw(self.seed % DISTINCT)
        return picture, (SIDE, SIDE)


@lru_cache(maxsize=DISTINCT)
def _draw(seed: int) -> npt.NDArray[np.uint8]:
    rng = np.random.default_rng([seed, SIDE])
    kind = seed % 4
    picture = _leaves(rng) if kind < 2 else _clouds(rng) if kind == 2 else _gratings(rng)
    picture += rng.normal(0, rng.uniform(0, 8), picture.shape)  # grain
    return np.clip(picture, 0, 255).astype(np.uint8)


def _leaves(rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Discs, boxes and stripes with radii r of density r⁻³, each with its own colour and shading."""
    y, x = np.mgrid[:SIDE, :SIDE]
    picture = np.broadcast_to(_colour(rng), (SIDE, SIDE, 3)).copy()
    radii = np.sort(9 / np.sqrt(rng.uniform(0.003, 1, SHAPES)))[::-1]  # the largest lie lowest
    for radius in radii:
        centre, angle, aspect = rng.uniform(0, SIDE, 2), rng.uniform(0, np.pi), rng.uniform(0.3, 1)
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
    y, x = np.mgrid[:SIDE, :SIDE]
    picture = np.broadcast_to(rng.uniform(60, 190, 3), (SIDE, SIDE, 3)).copy()
    for _ in range(rng.integers(1, 4)):
        angle, period = rng.uniform(0, np.pi), np.exp(rng.uniform(np.log(3), np.log(60)))
        along = x * np.cos(angle) + y * np.sin(angle) + rng.uniform(0, 6) * _noise(rng, 1.6)
        wave = np.sin(2 * np.pi * along / period)
        picture += (np.sign(wave) if rng.random() < 0.4 else wave)[..., None] * rng.normal(0, 40, 3)
    return picture


def _noise(rng: np.random.Generator, exponent: float) -> npt.NDArray[np.float64]:
    """(SIDE, SIDE) of deviation 1, amplitude ∝ frequency^-exponent."""
    frequency = np.hypot(np.fft.fftfreq(SIDE)[:, None], np.fft.rfftfreq(SIDE))
    frequency[0, 0] = np.inf
    values = np.fft.irfft2(np.fft.rfft2(rng.normal(size=(SIDE, SIDE))) * frequency**-exponent, (SIDE, SIDE))
    return np.asarray(values / values.std())
