"""Large photographs in tiles: which windows cover one, what the network sees of each, and one map of all their maps.

A tile is a window of the photograph that is scaled to the network's input. Neighbouring tiles overlap, and their maps
are blended there, so that the map of the photograph has no seams. It is kept in cells of 4 × 4 pixels of the input.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from PIL import Image

from kizu.data import image
from kizu.errors import OptionError

__all__ = ["CELL", "ENOUGH", "VISIBLE", "TileGrid", "TiledMap", "Tiling"]

CELL = 4  # pixels of the network's input a side: less than what maps are smoothed by
TOP = 0.01  # share of a tile's cells that the score of a photograph is the mean of
VISIBLE = 10  # pixels of the network's input that a defect has in a tile: discs of 8 to 13 are nearly always found
ENOUGH = 8  # in a photograph as a whole, which tiles would show hardly larger, and several times as slowly
OVERLAP = 32  # pixels, at least, where it is chosen
ENLARGED = 2  # times, at most, that a tile is scaled up: nothing is gained by more
MARGIN = 1 / 4  # of what tiles have in common, at either side: a network sees less well at its border

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Tiling:
    """Tiles of so many pixels (height, width) of a photograph, of which neighbours have at least `overlap` in common.

    Each is scaled to `size`, the network's input, whose sides are multiples of `CELL`.
    """

    tile: tuple[int, int]
    overlap: int
    size: tuple[int, int]

    @classmethod
    def showing(cls, defect: float, size: tuple[int, int], shape: tuple[int, int]) -> "Tiling | None":
        """Tiles in which a defect so many pixels long has `VISIBLE` pixels of the network's input (height, width).

        None where a photograph of this (height, width) shows enough of it as a whole. Raises `OptionError` for a defect
        too small to be seen.
        """
        if defect * ENLARGED < VISIBLE:
            needed = VISIBLE / ENLARGED
            raise OptionError(
                f"`smallest`: a defect of {defect:g} pixels is too small to be seen; take photographs in which it has "
                f"{needed:g} at least"
            )
        height, width = (int(defect * side / VISIBLE) for side in size)
        if all(defect * side >= ENOUGH * of_all for side, of_all in zip(size, shape, strict=True)):
            return None
        return cls((height, width), min(max(OVERLAP, math.ceil(defect)), min(height, width) // 2), size)

    @property
    def cells(self) -> tuple[int, int]:
        """Rows and columns of a tile's map."""
        return self.size[0] // CELL, self.size[1] // CELL

    def grid(self, shape: tuple[int, int]) -> "TileGrid":
        """The tiles of a photograph of this (height, width)."""
        return TileGrid(self, shape)


@dataclass(frozen=True)
class TileGrid:
    """The tiles of a photograph of one shape, row by row. They are spread evenly, and together cover all of it.

    Where the photograph is smaller than a tile, or no multiple of a cell, its border is mirrored.
    """

    tiling: Tiling
    shape: tuple[int, int]

    @cached_property
    def cell(self) -> tuple[float, float]:
        """Height and width of a cell in pixels of the photograph."""
        height, width = (side / cells for side, cells in zip(self.tiling.tile, self.tiling.cells, strict=True))
        return height, width

    @cached_property
    def cells(self) -> tuple[int, int]:
        """Rows and columns of the map; the last ones may lie on the photograph in part only."""
        rows, columns = (math.ceil(side / cell - 1e-9) for side, cell in zip(self.shape, self.cell, strict=True))
        return rows, columns

    @cached_property
    def starts(self) -> tuple[list[int], list[int]]:
        """The first cell of each row of tiles, and of each column."""
        rows, columns = (
            _spread(cells, own, math.ceil(self.tiling.overlap / cell - 1e-9))
            for cells, own, cell in zip(self.cells, self.tiling.cells, self.cell, strict=True)
        )
        return rows, columns

    @cached_property
    def _weights(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """(rows of tiles, cells of a tile), and of columns: what each counts for; over all tiles they add to 1."""
        rows, columns = (_weights(starts, own) for starts, own in zip(self.starts, self.tiling.cells, strict=True))
        return rows, columns

    def __len__(self) -> int:
        return len(self.starts[0]) * len(self.starts[1])

    def _first_cell(self, number: int) -> tuple[int, int]:
        row, column = divmod(number, len(self.starts[1]))
        return self.starts[0][row], self.starts[1][column]

    def corner(self, number: int) -> tuple[int, int]:
        """Where a tile begins in the photograph (top, left)."""
        top, left = (round(first * cell) for first, cell in zip(self._first_cell(number), self.cell, strict=True))
        return top, left

    def seen(self, photo: Pixels, number: int) -> Pixels:
        """What the network sees (h, w, 3) of a tile of the photograph (H, W, 3)."""
        (top, left), (height, width) = self.corner(number), self.tiling.tile
        part = photo[top : top + height, left : left + width]
        if part.shape[:2] != (height, width):
            rows, columns = _mirrored(top, height, self.shape[0]), _mirrored(left, width, self.shape[1])
            part = photo[rows[:, None], columns]
        return image.resize(np.ascontiguousarray(part), self.tiling.size)

    def batches(self, photo: Pixels, size: int) -> Iterator[Pixels]:
        """All tiles of a photograph (H, W, 3) as the network sees them, up to `size` at a time: (B, 3, h, w)."""
        for start in range(0, len(self), size):
            tiles = [self.seen(photo, number) for number in range(start, min(start + size, len(self)))]
            yield np.ascontiguousarray(np.stack(tiles).transpose(0, 3, 1, 2))

    def tile_at(self, place: tuple[float, float]) -> tuple[int, tuple[float, float]]:
        """The tile in which a pixel (x, y) of the photograph counts most, and where in the network's input it is."""
        numbers, positions = [], []
        for starts, weights, at, cell, side, tile, size in zip(
            self.starts,
            self._weights,
            place[::-1],
            self.cell,
            self.shape,
            self.tiling.tile,
            self.tiling.size,
            strict=True,
        ):
            pixel = min(max(at, 0), side - 1) + 0.5
            inside = (int(pixel / cell) - first for first in starts)
            number = int(np.argmax([w[n] if 0 <= n < len(w) else -1 for n, w in zip(inside, weights, strict=True)]))
            numbers.append(number)
            positions.append(min((pixel - round(starts[number] * cell)) * size / tile, size - 0.001))
        return numbers[0] * len(self.starts[1]) + numbers[1], (positions[1], positions[0])

    def over(self, values: image.Float, size: tuple[int, int]) -> image.Float:
        """A map of cells over the photograph, scaled to (height, width)."""
        return self._scaled(values, size, (0.0, 0.0, float(self.shape[1]), float(self.shape[0])))

    def part_over(
        self, values: image.Float, rows: slice, columns: slice, first: tuple[int, int] = (0, 0)
    ) -> image.Float:
        """As much of a map over the photograph: `over(values, shape)[rows, columns]`.

        `values` need be no more than the cells around, from the `first` (row, column) on.
        """
        box = columns.start, rows.start, columns.stop, rows.stop
        return self._scaled(values, (rows.stop - rows.start, columns.stop - columns.start), box, first)

    def _scaled(
        self,
        values: image.Float,
        size: tuple[int, int],
        box: tuple[float, float, float, float],
        first: tuple[int, int] = (0, 0),
    ) -> image.Float:
        """What lies on a box (left, top, right, bottom) of the photograph."""
        (height, width), (left, top, right, bottom) = self.cell, box
        inside = (
            left / width - first[1],
            top / height - first[0],
            min(right / width - first[1], values.shape[1]),
            min(bottom / height - first[0], values.shape[0]),
        )
        cells = Image.fromarray(np.ascontiguousarray(values, dtype=np.float32))
        return np.asarray(cells.resize((size[1], size[0]), Image.Resampling.BILINEAR, box=inside))


class TiledMap:
    """The map over a photograph, from those of its tiles."""

    def __init__(self, grid: TileGrid) -> None:
        self.grid = grid
        self._cells = np.zeros([max(all_, own) for all_, own in zip(grid.cells, grid.tiling.cells, strict=True)], "f4")
        self._laid = 0

    @property
    def is_whole(self) -> bool:
        return self._laid == len(self.grid)

    @property
    def values(self) -> image.Float:
        """(rows, columns) of cells, once it is whole."""
        rows, columns = self.grid.cells
        return self._cells[:rows, :columns]

    @property
    def score(self) -> float:
        """The photograph's: the mean of its highest cells, as many as a hundredth of a tile's."""
        rows, columns = self.grid.tiling.cells
        values, count = self.values.ravel(), min(max(1, round(TOP * rows * columns)), self.values.size)
        return float(np.partition(values, -count)[-count:].mean(dtype=np.float64))

    def lay(self, anomaly_map: image.Float) -> None:
        """Lay the map (h, w) of the next tile, in their order, among the others."""
        row, column = divmod(self._laid, len(self.grid.starts[1]))
        rows, columns = self.grid.tiling.cells
        cells = anomaly_map.reshape(rows, CELL, columns, CELL).mean((1, 3), dtype=np.float32)
        down, across = (weights[number] for weights, number in zip(self.grid._weights, (row, column), strict=True))
        top, left = self.grid._first_cell(self._laid)
        self._cells[top : top + rows, left : left + columns] += down[:, None] * across * cells
        self._laid += 1


def _spread(cells: int, own: int, overlap: int) -> list[int]:
    """First cells of tiles of `own` cells that cover so many, evenly, with at least this overlap."""
    if cells <= own:
        return [0]
    count = math.ceil((cells - own) / max(1, own - overlap)) + 1
    return [int(first) for first in np.linspace(0, cells - own, count).round()]


def _weights(starts: Sequence[int], own: int) -> npt.NDArray[np.float32]:
    """(tiles, own): in what two tiles have in common, from one to the other; at the ends, and alone, 1."""
    weights = np.ones((len(starts), own))
    for number, (first, second) in enumerate(pairwise(starts)):
        common = first + own - second
        if common > 0:
            ramp = ((np.arange(common) + 0.5) / common - MARGIN) / (1 - 2 * MARGIN)
            ramp = ramp.clip(0, 1)
            weights[number + 1, :common] *= ramp
            weights[number, own - common :] *= 1 - ramp
    total = np.zeros(starts[-1] + own)
    for first, weight in zip(starts, weights, strict=True):
        total[first : first + own] += weight
    return np.stack([w / total[first : first + own] for first, w in zip(starts, weights, strict=True)]).astype("f4")


def _mirrored(start: int, count: int, length: int) -> npt.NDArray[np.int64]:
    """Indices of so many pixels from `start` on; beyond the last of `length` they run back, and forth again."""
    places = np.arange(start, start + count) % (2 * length)
    return np.minimum(places, 2 * length - 1 - places)
