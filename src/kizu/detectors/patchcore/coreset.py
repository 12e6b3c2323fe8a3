"""The coreset of section 3.2: the few patches that stand for all of them (Eq. 5, Algorithm 1).

`select` chooses rows of a table; `k_center` is the greedy choice that it rests on; `StreamingCoreset` chooses from more
rows than memory holds.

Greedy k-centre picks, again and again, the row that is farthest from all rows picked so far. Done literally, every
pick reads every row. Here the rows are read once for many picks: take the C rows that are farthest now. No other row
is, or can become, farther than the nearest of these, because distances only shrink. So picks are made among the
candidates alone, with their mutual distances, until the farthest of them falls below that bound; up to there they are
exactly the greedy picks. Then all rows are updated by one matrix product.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from kizu.detectors.patchcore.feature_table import FeatureTable, Shape
from kizu.detectors.ram import release
from kizu.errors import OptionError
from kizu.features.matmul import padded, similarities

__all__ = ["Coreset", "StreamingCoreset", "k_center", "select"]

CANDIDATES = 512  # rows among which the next picks are made
DECAY = 0.95  # of the largest distance: rows that are as far are brought up to date
BLOCK = 2048  # rows, and
CENTRES = 512  # centres at a time in a matrix product
PIVOTS = 128  # picks that divide the rows into cells, at most
MAX_TABLE = 2**24  # distances between pivots and picks: where there are many picks, there are fewer pivots
ROUNDING = 1e-4  # that compared distances may be off
CHUNK = 2**17  # rows that a streaming coreset reduces at a time
OVERSAMPLING = 2, 8  # times its share that a chunk is reduced to: at least, and at most where memory allows it


@dataclass(frozen=True)
class Coreset:
    """Chosen rows, in the order of their choice, and the distance of the farthest row from its nearest chosen one."""

    indices: Tensor  # (K,) int64
    radius: float


def select(
    rows: Tensor | FeatureTable,
    count: int,
    sampler: str = "k_center",
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Coreset:
    """Choose `count` of the rows (N, D) by the sampler of that name.

    "k_center" is greedy from the row farthest from the mean; "greedy_coreset" and "approx_greedy_coreset" start as the
    reference's do, on a random projection to 128 dimensions; "random" draws, "identity" keeps every row.
    Raises `OptionError` for an unknown sampler or a count that does not fit.
    """
    rows = rows if isinstance(rows, FeatureTable) else FeatureTable.of(rows)
    total = len(rows)
    if not 0 < count <= total:
        raise OptionError(f"`coreset`: {count} of {total} patches cannot be chosen")
    generator = torch.Generator().manual_seed(seed)
    if sampler == "identity" or (count == total and sampler == "random"):
        return Coreset(torch.arange(total), 0.0)
    if sampler == "random":
        chosen = torch.randperm(total, generator=generator)[:count].sort().values
        return Coreset(chosen, _radius(rows, rows.take(chosen.to(rows.device))))
    if sampler == "k_center":
        points = rows
        first = int(_distances_to(rows, _mean(rows)).argmax())
        distances = _distances_to(rows, rows.span(first, first + 1))
        picks = [first]
    elif sampler == "approx_greedy_coreset":
        points = _project(rows, generator)
        starts = points.take(torch.randperm(total, generator=generator)[: min(10, total)].to(rows.device))
        distances = _of_each(points, torch.float32, lambda block: torch.cdist(block, starts).mean(1))
        picks = []
    elif sampler == "greedy_coreset":
        points = _project(rows, generator)
        distances = _total_distances(points)
        picks = []
    else:
        raise OptionError(f'`sampler="{sampler}"` is unknown')
    return k_center(points, distances, picks, count, progress)


def k_center(
    points: FeatureTable,
    distances: Tensor,
    picks: list[int],
    count: int,
    progress: Callable[[int, int], None] | None = None,
) -> Coreset:
    """Greedy k-centre, to `count` picks: those given, then the farthest row again and again.

    `distances` (N,) are those to the nearest of the given picks, or what else the choice starts from. What it computes,
    slowly (Algorithm 1 of the paper):

        while len(picks) < count:
            picks.append(int(distances.argmax()))
            distances = torch.minimum(distances, (points - points[picks[-1]]).norm(dim=1))
        radius = distances.max()
    """
    cover = _Cover(points, distances, picks, count)
    pivots = min(PIVOTS, max(1, MAX_TABLE // count))
    current = math.inf  # distances above it are up to date; those below are upper bounds
    while cover.filled < count:
        if len(cover.cells) == 1 and cover.filled >= pivots and points.device.type == "cpu":
            cover.divide(pivots)
        above = int((cover.distances > current).sum())
        if above == 0:
            highest = float(cover.distances.max())
            current = DECAY * highest if highest > 0 else -0.5
        else:
            bound, candidates = cover.distances.topk(min(CANDIDATES, above))
            limit = float(bound[-1]) if above > CANDIDATES else current
            cover.pick(candidates[_among(cover.rows(candidates), bound, limit, count - cover.filled)])
            if progress is not None:
                progress(cover.filled, count)
        cover.catch_up((cover.distances > current).nonzero()[:, 0])
    return Coreset(cover.order[cover.chosen].cpu(), cover.radius())


class _Cover:
    """How far each row is from the nearest pick, worked out only where it matters.

    The first picks divide the rows into cells, each row to the pick p that is nearest to it. By the triangle
    inequality a later pick c can be nearer to a row x than all before it only if ‖c − p‖ < ‖x − p‖ + distance(x), so a
    cell's rows are compared with the few picks that are near the cell.

    A row is named by its position, in an order in which cells are contiguous.
    """

    def __init__(self, points: FeatureTable, distances: Tensor, picks: list[int], count: int) -> None:
        self.points = points
        self.order = torch.arange(len(points), device=points.device)  # position → row
        self.half_norms = _of_each(points, torch.float32, lambda rows: rows.square().sum(1) / 2)
        self.distances = distances  # (N,) to the nearest pick that a row knows of; -1 once it is a pick itself
        self.seen = torch.full(distances.shape, len(picks), device=points.device)  # how many picks that are
        self.chosen = torch.empty(count, dtype=torch.long, device=points.device)  # positions of the picks
        self.centres = distances.new_empty(count, points.dimension)  # their features
        self.centre_norms = distances.new_empty(count)  # ‖centre‖² / 2
        self.cells = [len(points)]  # rows in each
        self.pivots = distances.new_zeros(1, points.dimension)  # (cells, D)
        self.to_pivots = distances.new_full((count, 1), -torch.inf)  # (count, cells): of picks
        self.to_own_pivot = torch.zeros_like(distances)  # (N,) distance to the pivot of the row's cell
        self.filled = 0
        self._gathered = distances.new_zeros(BLOCK, points.dimension)  # written again and again: fresh memory costs
        self.pick(torch.tensor(picks, dtype=torch.long, device=points.device))

    def rows(self, positions: Tensor | slice) -> Tensor:
        """Features (n, D) of the rows at these positions."""
        return self.points.take(self.order[positions])

    def pick(self, positions: Tensor) -> None:
        """Make these rows the next picks."""
        end = self.filled + len(positions)
        self.chosen[self.filled : end] = positions
        self.centres[self.filled : end] = self.rows(positions)
        self.centre_norms[self.filled : end] = self.half_norms[positions]
        self.distances[positions] = -1
        if len(self.cells) > 1:
            self.to_pivots[self.filled : end] = torch.cdist(self.centres[self.filled : end], self.pivots)
        self.filled = end

    def divide(self, count: int) -> None:
        """Sort the rows into a cell for each of the first picks."""
        self.pivots = self.centres[:count].clone()
        norms = self.centre_norms[:count]
        owner = _of_each(self.points, torch.long, lambda rows: similarities(rows, self.pivots, norms).argmax(1))
        owner = owner[self.order]
        sorting = owner.argsort(stable=True)
        place = torch.empty_like(sorting)
        place[sorting] = torch.arange(len(sorting), device=sorting.device)
        self.chosen[: self.filled] = place[self.chosen[: self.filled]]
        self.order, self.distances = self.order[sorting], self.distances[sorting]
        self.seen, self.half_norms = self.seen[sorting], self.half_norms[sorting]
        self.cells = torch.bincount(owner, minlength=count).tolist()
        self.to_pivots = self.distances.new_empty(len(self.chosen), count)
        self.to_pivots[: self.filled] = torch.cdist(self.centres[: self.filled], self.pivots)
        owner = owner[sorting]
        for start in range(0, len(owner), BLOCK):
            block = slice(start, start + BLOCK)
            self.to_own_pivot[block] = (self.rows(block) - self.pivots[owner[block]]).norm(dim=1)

    def catch_up(self, positions: Tensor) -> None:
        """Bring the distances of these rows, in ascending order, up to date with all picks."""
        positions = positions[self.seen[positions] < self.filled]
        if not len(positions):
            return
        ends = torch.tensor(self.cells, device=positions.device).cumsum(0)
        bounds = torch.searchsorted(positions, ends)
        counts = bounds.diff(prepend=bounds.new_zeros(1))
        cell = torch.repeat_interleave(torch.arange(len(self.cells), device=positions.device), counts)
        known = counts.new_full((len(self.cells),), self.filled).scatter_reduce_(0, cell, self.seen[positions], "amin")
        reach = self.to_own_pivot[positions] + self.distances[positions]
        reach = reach.new_full((len(self.cells),), -torch.inf).scatter_reduce_(0, cell, reach, "amax")
        first = int(known.min())
        near = self.to_pivots[first : self.filled] < reach * (1 + ROUNDING)
        near &= torch.arange(first, self.filled, device=known.device)[:, None] >= known
        picks = near.T.nonzero()[:, 1] + first
        picks_by_cell, rows_by_cell = picks.split(near.sum(0).tolist()), positions.split(counts.tolist())
        for cell_picks, cell_rows in zip(picks_by_cell, rows_by_cell, strict=True):
            if len(cell_picks) and len(cell_rows):
                self._compare(cell_rows, cell_picks)
        self.seen[positions] = self.filled

    def _compare(self, positions: Tensor, picks: Tensor) -> None:
        """distances[positions] ← min(distances[positions], distance to the nearest of these picks)."""
        rows = self.order[positions]
        similar = self.half_norms.new_full(rows.shape, -torch.inf)
        for part in picks.split(CENTRES):
            repeated = F.pad(part, (0, padded(len(part)) - len(part)), value=int(part[0]))
            centres = self.centres.index_select(0, repeated)
            norms = self.centre_norms[repeated]
            for block, best in zip(rows.split(BLOCK), similar.split(BLOCK), strict=True):
                self.points.take(block, out=self._gathered[: len(block)])
                table = similarities(self._gathered[: padded(len(block))], centres, norms)[: len(block)]
                torch.maximum(best, table.amax(1), out=best)
        distances = (2 * (self.half_norms[positions] - similar)).clamp_(min=0).sqrt_()
        self.distances[positions] = torch.minimum(self.distances[positions], distances)

    def radius(self) -> float:
        """The largest distance, once every row that could have it knows of all picks."""
        while (highest := float(self.distances.max())) > 0:
            rows = (self.distances >= DECAY * highest).nonzero()[:, 0]
            if bool((self.seen[rows] == self.filled).all()):
                return highest
            self.catch_up(rows)
        return 0.0


def _among(candidates: Tensor, distances: Tensor, limit: float, most: int) -> Tensor:
    """Greedy picks among candidates (C, D), farthest first, for as long as they beat `limit`; at least one."""
    mutual = torch.cdist(candidates.double(), candidates.double()).float().numpy(force=True)
    remaining = distances.numpy(force=True)
    picks: list[int] = []
    while len(picks) < most:
        best = int(remaining.argmax())
        if picks and remaining[best] <= limit and not remaining[best] == limit == 0:
            break
        picks.append(best)
        remaining = remaining.clip(max=mutual[best])
        remaining[best] = -1.0
    return torch.tensor(picks, device=candidates.device)


def _mean(rows: FeatureTable) -> Tensor:
    """(D,)"""
    total = sum(rows.span(start, start + BLOCK).sum(0) for start in range(0, len(rows), BLOCK))
    assert isinstance(total, Tensor)
    return total / len(rows)


def _distances_to(rows: FeatureTable, point: Tensor) -> Tensor:
    return _of_each(rows, torch.float32, lambda block: (block - point).norm(dim=1))


def _of_each(rows: FeatureTable, dtype: torch.dtype, function: Callable[[Tensor], Tensor]) -> Tensor:
    """A number (N,) of each row, block by block, into one place: small results would scatter over the memory."""
    results = torch.empty(len(rows), dtype=dtype, device=rows.device)
    for start in range(0, len(rows), BLOCK):
        results[start : start + BLOCK] = function(rows.span(start, start + BLOCK))
    return results


def _project(rows: FeatureTable, generator: torch.Generator, dimension: int = 128) -> FeatureTable:
    """The reference's random linear map, U(−1/√D, 1/√D), where the rows have not 128 dimensions already."""
    width = rows.dimension
    if width == dimension:
        return rows
    matrix = ((torch.rand(width, dimension, generator=generator) * 2 - 1) / width**0.5).to(rows.device)
    points = torch.empty(len(rows), dimension, device=rows.device)
    for start in range(0, len(rows), BLOCK):
        torch.matmul(rows.span(start, start + BLOCK), matrix, out=points[start : start + BLOCK])
    return FeatureTable.of(points)


def _total_distances(points: FeatureTable) -> Tensor:
    """L2 norm of each row of the distance matrix, without the matrix: Σ_j ‖x_i − x_j‖² in closed form."""
    mean = _mean(points)
    squares = _of_each(points, torch.float32, lambda block: (block - mean).square().sum(1))
    return (len(points) * squares + squares.sum()).sqrt()


class StreamingCoreset:
    """Rows of any number of images in bounded memory: a coreset of coresets (merge and reduce).

    As long as all rows fit they are kept as they are. Beyond that, each full chunk is reduced by k-centre to a few
    times its share (`OVERSAMPLING`), and the final choice is made among what is left. Every row is then within the
    largest radius of the chunks plus the final radius of a chosen one, by the triangle inequality.
    """

    def __init__(
        self,
        num_images: int,
        shapes: Sequence[Shape],
        share: float,
        memory_bytes: int,
        sampler: str,
        seed: int,
        places: Tensor | None,
        device: torch.device,
    ) -> None:
        """For images with layers of `shapes`, of whose rows a share is to be chosen, in at most `memory_bytes`.

        The rows are those of these `places` of the first layer's grid; None: all.

        Raises `OptionError` where the sampler is to keep everything and that does not fit.
        """
        patches = shapes[0][1] * shapes[0][2] if places is None else len(places)
        dimension = sum(channels for channels, *_ in shapes)
        self.total, self.share, self.shapes, self.places = num_images * patches, share, shapes, places
        self.sampler, self.seed = sampler, seed
        self.memory_bytes = memory_bytes
        self.holds_all = self.would_hold(num_images)
        fits = memory_bytes // (4 * dimension)
        if sampler == "identity" and not self.holds_all:
            everything = f"{self.total:,} patches of {dimension} numbers"
            raise OptionError(f'`sampler="identity"`: {everything} do not fit in `memory`; choose `sampler="k_center"`')
        self.most = max(1, fits // 3)  # entries of a bank that leave room to choose them
        self.rows = (
            FeatureTable(num_images, shapes, device, places)
            if self.holds_all
            else FeatureTable(max(fits, 2), [(dimension, 1, 1)], device)
        )
        self.patch_ids = torch.empty(len(self.rows), dtype=torch.long, device=device)
        least, most = (times * share for times in OVERSAMPLING)
        self.kept = min(max(least, min(most, len(self.rows) / 2 / self.total)), 1.0)  # of a chunk's rows
        self.radius = 0.0
        self._settled = self._filled = 0

    def would_hold(self, num_images: int) -> bool:
        """Whether all rows of so many images would fit."""
        return FeatureTable.bytes(num_images, self.shapes) <= self.memory_bytes

    def add(self, layers: Sequence[Tensor], patch_ids: Tensor) -> None:
        """Take images, each layer (B, C, h, w), and the number of each of their patches (N,)."""
        if self.holds_all:
            self.rows.write(self._filled // self.rows.patches, layers)
            self.patch_ids[self._filled : self._filled + len(patch_ids)] = patch_ids
            self._filled += len(patch_ids)
            return
        table = FeatureTable(len(layers[0]), self.shapes, layers[0].device, self.places)
        table.write(0, layers)
        rows = table.span(0, len(table))
        while len(rows):
            if self._filled == len(self.rows) or self._filled - self._settled >= CHUNK:
                self._reduce()
            count = min(len(rows), len(self.rows) - self._filled, CHUNK)
            end = self._filled + count
            self.rows.layers[0][self._filled : end] = rows[:count]
            self.patch_ids[self._filled : end] = patch_ids[:count]
            rows, patch_ids = rows[count:], patch_ids[count:]
            self._filled = end

    def choose(self, progress: Callable[[int, int], None] | None = None) -> tuple[Tensor, Tensor, float]:
        """Entries of a memory bank (K, D), their patches (K,), and how far the farthest row is from one, at most."""
        count = min(max(1, int(self.total * self.share)), self._filled if self.holds_all else self.most)
        rows = self.rows if self.holds_all else FeatureTable.of(self.rows.layers[0][: self._filled])
        chosen = select(rows, min(count, len(rows)), self.sampler, seed=self.seed, progress=progress)
        release()
        indices = chosen.indices.to(rows.device)
        entries = torch.empty(len(indices), rows.dimension, device=rows.device)
        for block, out in zip(indices.split(BLOCK), entries.split(BLOCK), strict=True):
            rows.take(block, out=out)
        return entries, self.patch_ids[indices], self.radius + chosen.radius

    def _reduce(self) -> None:
        """Make room: reduce the unsettled chunk to its share, or everything to a half when that leaves too little."""
        rows = self.rows.layers[0]
        chunk = rows[self._settled : self._filled]
        count = max(1, round(len(chunk) * self.kept))
        if self._settled + count > len(rows) // 2:
            self._settled, chunk = 0, rows[: self._filled]
            count = len(rows) // 4
        chosen = select(chunk, count, "random" if self.sampler == "random" else "k_center", seed=self.seed)
        kept = chosen.indices.to(chunk.device).sort().values
        end = self._settled + count
        rows[self._settled : end] = chunk[kept]
        self.patch_ids[self._settled : end] = self.patch_ids[self._settled : self._filled][kept]
        self.radius = max(self.radius, chosen.radius) if self._settled else self.radius + chosen.radius
        self._settled = self._filled = end


def _radius(rows: FeatureTable, centres: Tensor) -> float:
    return float(_of_each(rows, torch.float32, lambda block: torch.cdist(block, centres).amin(1)).max())
