"""Ground truth: masks of defects however they are stored or drawn, and how much has to be found (MVTec LOCO)."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from kizu.data.image import Source, name_of, opened
from kizu.errors import BadImage, DataError

__all__ = [
    "CONFIG_NAME",
    "Polygon",
    "Region",
    "Runs",
    "Saturation",
    "Saturations",
    "Shape",
    "read_doubted",
    "read_mask",
]
__all__ += ["read_mask_values", "read_regions", "read_saturations"]

CONFIG_NAME = "defects_config.json"
FAINT = 16  # grey levels below which a compressed mask says nothing
MAX_OTHER = 0.2  # share of pixels that may have other values than the two most frequent ones
Values = npt.NDArray[Any]


class Saturation(NamedTuple):
    """From which size on the found part of a region counts as all of it."""

    defect: str
    threshold: float  # pixels, or a share of the region
    relative: bool  # a share

    def pixels(self, area: int) -> int:
        """Of a region of `area` pixels: between 1 and `area`."""
        return max(1, int(self.threshold * area) if self.relative else min(int(self.threshold), area))


Saturations = Mapping[int, Saturation]  # a mask's value → what it stands for


@dataclass(frozen=True)
class Polygon:
    """A region with straight edges, as a person drew it."""

    points: tuple[tuple[float, float], ...]  # x, y
    size: tuple[float, float] | None = None  # width and height that these are numbers of; None: the image's own

    def drawn(self, shape: tuple[int, int]) -> npt.NDArray[np.bool_]:
        """Its pixels in an image of this shape, (H, W); at least those that its border crosses."""
        height, width = shape
        across, down = (1.0, 1.0) if self.size is None else (width / self.size[0], height / self.size[1])
        canvas = Image.new("L", (width, height))
        scaled = [(x * across, y * down) for x, y in self.points]
        if len(scaled) < 3:
            ImageDraw.Draw(canvas).line(scaled * (3 - len(scaled)), fill=1)
        else:
            ImageDraw.Draw(canvas).polygon(scaled, fill=1, outline=1)
        return np.asarray(canvas, bool)


@dataclass(frozen=True)
class Runs:
    """A region as lengths of runs of pixels, the first of them outside, within a box of an image of `size`."""

    lengths: tuple[int, ...]
    box: tuple[int, int, int, int]  # left, top, width, height
    size: tuple[int, int]  # width, height
    by_columns: bool = False

    def drawn(self, shape: tuple[int, int]) -> npt.NDArray[np.bool_]:
        """Its pixels in an image of this shape, (H, W). Raises `ValueError` where the runs do not fill the box."""
        left, top, width, height = self.box
        inside = np.arange(len(self.lengths)) % 2 == 1
        flat = np.repeat(inside, self.lengths)
        pixels = flat.reshape(width, height).T if self.by_columns else flat.reshape(height, width)
        whole = np.zeros((self.size[1], self.size[0]), bool)
        whole[top : top + height, left : left + width] = pixels
        if whole.shape == shape:
            return whole
        return np.asarray(Image.fromarray(whole).resize((shape[1], shape[0]), Image.Resampling.NEAREST), bool)


Shape = Polygon | Runs


class Region(NamedTuple):
    """One defect region of an image; regions may overlap."""

    pixels: npt.NDArray[np.bool_]  # (H, W)
    saturation: int  # of its pixels, as many count as all


def read_mask(source: Source) -> npt.NDArray[np.bool_]:
    """Read a ground-truth mask. Shape (H, W).

    A pixel is part of a defect where it is not zero; in JPEG, which blurs edges, above half of the brightest. Where no
    pixel is zero, it is the rarer of two values, or what transparency says.
    """
    return _understood(source)[0]


def read_doubted(source: Source) -> tuple[npt.NDArray[np.bool_], str]:
    """As `read_mask`, and what makes it look as if it were stored in another way; empty where nothing does."""
    mask, levels = _understood(source)
    counts = np.sort(np.unique(levels, return_counts=True)[1])[::-1]
    if mask.all():
        return mask, "is set at every pixel"
    if counts[2:].sum() > MAX_OTHER * levels.size:
        return mask, "has many grey levels, as photographs have"
    return mask, "is set at more than half of its pixels, as an inverted mask is" if mask.mean() > 0.5 else ""


def read_mask_values(source: Source) -> npt.NDArray[np.uint8]:
    """Read a ground-truth mask whose values mean something, 0 to 255; of several channels the highest. Shape (H, W)."""
    values = _channels(source)[0].max(axis=2)
    if values.dtype != np.bool_ and (values.min() < 0 or values.max() > 255):
        raise BadImage(name_of(source), "holds values outside 0…255")
    return np.asarray(values * 255 if values.dtype == np.bool_ else values).astype(np.uint8)


def _understood(source: Source) -> tuple[npt.NDArray[np.bool_], Values]:
    """The mask (H, W), and a number for each value of its pixels (H, W)."""
    colours, alpha, compressed = _channels(source)
    if alpha is not None and np.ptp(alpha) and not np.ptp(colours.reshape(-1, colours.shape[2]), axis=0).any():
        colours = alpha[:, :, None]
    brightness = colours.max(axis=2)
    if compressed:
        half = max(int(brightness.max()), 2 * FAINT) / 2
        return np.asarray(brightness > half), np.asarray(brightness > half)
    mask = np.asarray(colours.any(axis=2))
    values = np.unique(colours.reshape(-1, colours.shape[2]), axis=0) if mask.all() else colours[:1, 0]
    if len(values) == 2:
        first = np.asarray((colours == values[0]).all(axis=2))
        mask = first if first.mean() < 0.5 else ~first
    return mask, np.asarray(mask if len(values) == 2 else brightness)


def _channels(source: Source) -> tuple[Values, Values | None, bool]:
    """A mask's values (H, W, C) without alpha, its alpha (H, W), and whether compression has changed them."""
    if isinstance(source, np.ndarray):
        return source.reshape((*source.shape[:2], -1)), None, False
    with opened(source) as image:
        compressed = image.format in ("JPEG", "MPO")
        values = np.asarray(image.convert("RGBA" if image.mode == "PA" else "RGB") if image.mode[0] == "P" else image)
    values = values.reshape((*values.shape[:2], -1))
    if values.shape[2] in (2, 4) and not compressed:
        return values[:, :, :-1], values[:, :, -1], False
    return values, None, compressed


def read_saturations(path: Path) -> dict[int, Saturation]:
    """A defects_config.json. Raises `DataError` that says what is wrong with it."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: check the spelling of `defects_config`.") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON ({error}): copy it from MVTec LOCO again.") from None
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{path} is not a list of defects: copy it from MVTec LOCO again.")
    saturations: dict[int, Saturation] = {}
    for number, entry in enumerate(entries, start=1):
        value, saturation = _checked(entry, f"{path}, entry {number},")
        if value in saturations:
            raise DataError(
                f"{path}, entry {number}, has the pixel_value {value} of another entry: each needs its own."
            )
        saturations[value] = saturation
    return saturations


def read_regions(masks: Iterable[Path], shape: tuple[int, int], saturations: Saturations | None) -> list[Region]:
    """One region a file, of the pixels (H, W) that are not zero; an empty file gives none.

    Their value says which saturation holds. Without `saturations` a region has to be found whole. Raises `DataError`
    when a mask's size is not `shape`, or its value not one that is listed.
    """
    regions = []
    for path in masks:
        values = read_mask_values(path)
        if values.shape != shape:
            raise DataError(f"The mask {path} has the shape {values.shape}, its image {shape}: scale it to its image.")
        present = 1 + np.flatnonzero(np.bincount(values.ravel())[1:])
        if not present.size:
            continue
        pixels = values > 0
        area = int(np.count_nonzero(pixels))
        if saturations is None:
            regions.append(Region(pixels, area))
        elif present.size > 1 or int(present[0]) not in saturations:
            found = ", ".join(map(str, present[:5])) + (" …" if present.size > 5 else "")
            raise DataError(
                f"The mask {path} has the values {found} besides 0, but needs exactly one of those in {CONFIG_NAME} "
                f"({', '.join(map(str, sorted(saturations)))}): use the published masks, unscaled."
            )
        else:
            regions.append(Region(pixels, saturations[int(present[0])].pixels(area)))
    return regions


def _checked(entry: Any, where: str) -> tuple[int, Saturation]:
    keys = ("defect_name", "pixel_value", "saturation_threshold", "relative_saturation")
    if not isinstance(entry, dict) or not all(key in entry for key in keys):
        raise DataError(f"{where} lacks one of {', '.join(keys)}.")
    name, value, threshold, relative = (entry[key] for key in keys)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 255:
        raise DataError(f"{where} has the pixel_value {value!r}; it must be a whole number from 1 to 255.")
    if not isinstance(relative, bool):
        raise DataError(f"{where} has the relative_saturation {relative!r}; it must be true or false.")
    if not isinstance(threshold, int | float) or isinstance(threshold, bool) or not threshold > 0:
        raise DataError(f"{where} has the saturation_threshold {threshold!r}; it must be a number above 0.")
    if relative and threshold > 1:
        raise DataError(f"{where} has the saturation_threshold {threshold!r}; a share of the region is at most 1.")
    return value, Saturation(str(name), threshold, relative)
