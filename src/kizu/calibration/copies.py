"""Copies: photographs that show the same part as another one, saved again or taken in the same moment.

What is promised of new parts follows from how parts differ from each other. A copy differs from its original by what a
codec or a sensor adds, which says nothing of the next part: each part counts once.
"""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
from PIL import Image

__all__ = ["SIDE", "first_of_each_part", "small_picture"]

SIDE, BLOCK = 64, 8  # pixels of the small pictures that are compared, and of their blocks
MAX_COPIES, STRANGERS = 24, 8  # with how many pictures each is compared that may be copies, and that are surely none
ALIKE = 3.0  # grey levels, root mean square, that nine tenths of a copy's blocks stay below
WORTH_A_LOOK = 6.0  # the same in a first and coarser comparison; what is above it is surely no copy
VERY_ALIKE = 0.7  # the same for copies of a plain surface, since different ones are nearly as alike
MAX_GROUP, MAX_SHARE = 10, 0.25  # where more pictures, or a larger share of all, look like one, it is a plain surface
MAX_SHIFT = 0.25  # pixels of the small pictures by which a camera may move between two frames
NEARER = 0.8  # a copy is nearer than this share of the distance to the nearest picture that is none

Small = npt.NDArray[np.float32]


def first_of_each_part(photos: Iterable[npt.NDArray[np.uint8]]) -> list[int]:
    """For each photograph (3, h, w), the index of the first that shows the same part: its own, if it is no copy."""
    small = [small_picture(photo) for photo in photos]
    if not small:
        return []
    pictures = np.stack(small)
    coarse = _coarse(pictures)
    first = list(range(len(pictures)))
    for number in range(len(pictures)):
        squares = np.square(coarse - coarse[number]).mean(2)
        near = _nine_tenths(squares) < WORTH_A_LOOK**2
        if np.count_nonzero(near) > 1:  # more than itself
            for copy in _copies(pictures, number, _worth_comparing(squares.sum(1), near, number)):
                _join(first, number, copy)
    return [_root(first, number) for number in first]


def small_picture(photo: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """What is compared of a photograph: (3, h, w) → (SIDE, SIDE, 3). Of a small picture it is the same picture."""
    picture = Image.fromarray(np.ascontiguousarray(photo.transpose(1, 2, 0)))
    return np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BILINEAR, reducing_gap=3.0))


def _coarse(pictures: npt.NDArray[np.uint8]) -> Small:
    """(N, blocks, 12): grey levels of four places in each block, whatever the exposure."""
    across, step = SIDE // BLOCK, BLOCK // 2
    means = pictures.reshape(len(pictures), across, 2, step, across, 2, step, 3).mean((3, 6), dtype=np.float32)
    values = means.transpose(0, 1, 3, 2, 4, 5).reshape(len(pictures), across * across, -1)
    brightness = values.mean((1, 2), keepdims=True)
    return np.asarray(values * (brightness.mean() / np.maximum(brightness, 1)))


def _nine_tenths(distances: Small) -> Small:
    """(N, blocks) → (N,): what nine tenths of the blocks stay below."""
    place = int(0.9 * distances.shape[1])
    return np.asarray(np.partition(distances, place, axis=1)[:, place])


def _worth_comparing(distances: Small, near: npt.NDArray[np.bool_], number: int) -> npt.NDArray[np.int64]:
    """Indices of pictures that may be copies of one, the nearest first, and of the nearest that are none."""
    order = distances.argsort()
    order = order[order != number]
    return np.concatenate([order[near[order]][:MAX_COPIES], order[~near[order]][:STRANGERS]])


def _copies(pictures: npt.NDArray[np.uint8], number: int, others: npt.NDArray[np.int64]) -> list[int]:
    """Those of the others that are copies of a picture."""
    if not len(others):
        return []
    distances = _block_distances(pictures[others].astype(np.float32), pictures[number].astype(np.float32))
    nine_tenths = _nine_tenths(distances)
    alike = nine_tenths < ALIKE
    many = np.count_nonzero(alike)
    if alike.all() or many > MAX_GROUP or many + 1 > max(2, MAX_SHARE * len(pictures)):  # plain
        return [int(other) for other in others[nine_tenths < VERY_ALIKE]]
    nearest = distances[~alike].min(0)
    nearer = np.median(distances / (nearest + 1e-6), axis=1) < NEARER
    return [int(other) for other in others[alike & nearer]]


def _block_distances(pictures: Small, picture: Small) -> Small:
    """(N, S, S, 3) and (S, S, 3) → (N, blocks), root mean squares, without what exposure and a tiny shift explain."""
    pictures = pictures * (picture.mean() / np.maximum(pictures.mean((1, 2, 3), keepdims=True), 1))
    residual = pictures - picture
    slopes = np.stack([np.gradient(picture, axis=axis) for axis in (0, 1)])  # (2, S, S, 3)
    flat = slopes.reshape(2, -1)
    shifts = residual.reshape(len(pictures), -1) @ flat.T @ np.linalg.inv(flat @ flat.T + np.eye(2, dtype=np.float32))
    shifts = np.clip(shifts, -MAX_SHIFT, MAX_SHIFT).astype(np.float32)
    residual -= np.tensordot(shifts, slopes, 1)
    per_side = SIDE // BLOCK
    squares = np.square(residual).reshape(-1, per_side, BLOCK, per_side, BLOCK, 3)
    return np.asarray(np.sqrt(squares.mean((2, 4, 5))).reshape(len(pictures), -1), np.float32)


def _root(first: list[int], number: int) -> int:
    while first[number] != number:
        number = first[number]
    return number


def _join(first: list[int], one: int, other: int) -> None:
    low, high = sorted((_root(first, one), _root(first, other)))
    first[high] = low
