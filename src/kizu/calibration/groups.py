"""Photographs that belong together: several of one part, of one burst, of one lot.

They are more alike than photographs of different parts, so a promise that counts them one by one is broken. Each group
counts once: its photographs are scored as if the whole group were new, and the highest of their scores is the group's.
The promise then speaks of groups: the part is stopped if any of its photographs is.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import PurePath

import numpy as np
import numpy.typing as npt

from kizu.data import image
from kizu.errors import OptionError

__all__ = ["highest", "named", "recognised"]

MIN_GROUPS, MAX_MEMBERS = 10, 20  # of what is recognised: fewer groups, or larger ones, are something else
MOSTLY = 0.9  # of the photographs are in a group with others
NEARER = 3.0  # times as often as by chance, the photograph nearest to one is of its own group,
DEVIATIONS = 4.0  # and by so many deviations more often than by chance
SIDE = 16  # pixels of the pictures that are compared


def named(paths: Sequence[PurePath | None], pattern: str) -> list[int]:
    """The group of each photograph, by what a regular expression finds in its file's name, or by its "folder".

    An expression that finds nothing in any name looks in the whole paths. If a part of it is bracketed, that part
    counts. A photograph in which nothing is found is a group of its own; with "none" all are. Raises `OptionError` for
    what is no expression or finds nothing anywhere.
    """
    if pattern == "none":
        return list(range(len(paths)))
    if pattern == "folder":
        return _numbered([None if path is None else str(path.parent) for path in paths])
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise OptionError(f"`group_by={pattern}` is no regular expression ({error})") from None
    found = [None if path is None else expression.search(path.name) for path in paths]
    if not any(found):
        found = [None if path is None else expression.search(path.as_posix()) for path in paths]
    if not any(found):
        raise OptionError(f"`group_by={pattern}` finds nothing in the photographs' names, such as {paths[0]}")
    return _numbered([None if match is None else match[1 if expression.groups else 0] for match in found])


def recognised(paths: Sequence[PurePath | None], pictures: Iterable[npt.NDArray[np.uint8]]) -> list[int] | None:
    """The group of each photograph where names and likeness agree that there are groups; None where they do not.

    Names: those in one folder, or that are the same up to their last number. Likeness: of the photographs (h, w, 3),
    which are looked at only where their names suggest groups.
    """
    known = [path for path in paths if path is not None]
    if len(known) < len(paths):
        return None
    stems = [re.fullmatch(r"(.*\D)\d+\D*", path.stem) for path in known]
    series = [
        str(path) if stem is None else f"{path.parent}/{stem[1]}" for path, stem in zip(known, stems, strict=True)
    ]
    suggested = [
        groups for keys in (series, [str(path.parent) for path in known]) if _plausible(groups := _numbered(keys))
    ]
    if not suggested:
        return None
    small = np.stack([_small(picture) for picture in pictures])
    return next((groups for groups in suggested if _are_alike(groups, small)), None)


def highest(values: Sequence[float], groups: Sequence[int]) -> list[float]:
    """The highest value of each group, in the order in which they first come."""
    most: dict[int, float] = {}
    for value, group in zip(values, groups, strict=True):
        most[group] = max(value, most.get(group, value))
    return list(most.values())


def _plausible(groups: Sequence[int]) -> bool:
    sizes = Counter(groups)
    together = sum(size for size in sizes.values() if size > 1)
    return len(sizes) >= MIN_GROUPS and max(sizes.values()) <= MAX_MEMBERS and together >= MOSTLY * len(groups)


def _are_alike(groups: Sequence[int], pictures: npt.NDArray[np.float32]) -> bool:
    """Whether the picture (pixels,) nearest to one is clearly more often of its own group than by chance."""
    apart = pictures - pictures.mean(0)
    squares = np.square(apart).sum(1)
    distances = squares[:, None] + squares - 2 * apart @ apart.T
    np.fill_diagonal(distances, np.inf)
    ids = np.asarray(groups)
    same = int((ids[distances.argmin(1)] == ids).sum())
    by_chance = float(((np.bincount(ids)[ids] - 1) / (len(ids) - 1)).sum())
    deviation = math.sqrt(2 * by_chance)  # of what chance gives; twice a count's variance, as most are each other's
    return same >= max(NEARER * by_chance, by_chance + DEVIATIONS * deviation)


def _small(picture: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """(h, w, 3) → (pixels,): grey."""
    return np.asarray(image.resize(picture, (SIDE, SIDE)).mean(2).ravel(), np.float32)


def _numbered(keys: Sequence[str | None]) -> list[int]:
    """A number for each key, from 0 on; None is a key of its own each time."""
    numbers: dict[str | int, int] = {}
    return [numbers.setdefault(place if key is None else key, len(numbers)) for place, key in enumerate(keys)]
