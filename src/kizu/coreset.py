"""k-centre selection: the few patches that stand for all of them.

Greedy k-centre picks, again and again, the row that is farthest from all rows picked so far. Done literally, every
pick reads every row. Here the rows are read once for many picks: take the C rows that are farthest now. No other row
is, or can become, farther than the nearest of these, because distances only shrink. So picks are made among the
candidates alone, with their mutual distances, until the farthest of them falls below that bound; up to there they are
exactly the greedy picks. Then all rows are updated by one matrix product.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kizu.errors import OptionError

__all__ = ["Coreset", "Summary", "select"]

CANDIDATES = 512
DECAY = 0.95
BLOCK = 2048  # rows, and
CENTRES = 512  # centres at a time in a matrix product
CHUNK = 2**17  # rows that a summary reduces at a time
OVERSAMPLING = 2


@dataclass(frozen=True)
class Coreset:
    """Chosen rows, in the order of their choice, and the distance of the farthest row from its nearest chosen one."""

    indices: Tensor  # (K,) int64
    radius: float


def select(
    rows: Tensor,
    count: int,
    sampler: str = "k_center",
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Coreset:
    """Choose `count` of the rows (N, D) by the sampler of that name.

    k_center: greedy, from the row farthest from the mean. greedy_coreset and approx_greedy_coreset: as the reference
    starts them, on a random projection to 128 dimensions. random, identity: what they say.
    Raises `OptionError` for an unknown sampler or a count that does not fit.
    """
    total = rows.shape[0]
    if not 0 < count <= total:
        raise OptionError(f"--coreset: {count} of {total} patches cannot be chosen")
    generator = torch.Generator().manual_seed(seed)
    if sampler == "identity" or (count == total and sampler == "random"):
        return Coreset(torch.arange(total), 0.0)
    if sampler == "random":
        chosen = torch.randperm(total, generator=generator)[:count].sort().values
        return Coreset(chosen, _radius(rows, rows[chosen.to(rows.device)]))
    if sampler == "k_center":
        points = rows
        first = int(_distances_to(rows, rows.mean(0)).argmax())
        distances = _distances_to(rows, rows[first])
        picks = [first]
    elif sampler == "approx_greedy_coreset":
        points = _project(rows, generator)
        starts = torch.randperm(total, generator=generator)[: min(10, total)].to(rows.device)
        distances = torch.cdist(points, points[starts]).mean(1)
        picks = []
    elif sampler == "greedy_coreset":
        points = _project(rows, generator)
        distances = _total_distances(points)
        picks = []
    else:
        raise OptionError(f"--sampler {sampler} is unknown")
    return _farthest_first(points, distances, picks, count, progress)


def _farthest_first(
    points: Tensor,
    distances: Tensor,
    picks: list[int],
    count: int,
    progress: Callable[[int, int], None] | None,
) -> Coreset:
    """Exact greedy from given initial distances (N,), which are worked on in place."""
    half_norms = torch.cat([block.square().sum(1) for block in points.split(BLOCK)]) / 2
    seen = torch.full(distances.shape, len(picks), device=points.device)  # how many picks a row's distance knows of
    chosen = torch.tensor(picks, dtype=torch.long, device=points.device)
    distances[chosen] = -1  # never again
    level = math.inf  # distances above it are up to date, those below are upper bounds
    while len(chosen) < count:
        above = int((distances > level).sum())
        if above == 0:
            highest = float(distances.max())
            level = DECAY * highest if highest > 0 else -0.5
        else:
            bound, candidates = distances.topk(min(CANDIDATES, above))
            limit = float(bound[-1]) if above > CANDIDATES else level
            new = _among(points[candidates], bound, limit, count - len(chosen))
            chosen = torch.cat([chosen, candidates[new]])
            distances[candidates[new]] = -1
            if progress is not None:
                progress(len(chosen), count)
        rows = (distances > level).nonzero()[:, 0]
        _catch_up(points, half_norms, rows, seen, chosen, distances)
    return Coreset(chosen.cpu(), _cover(points, half_norms, seen, chosen, distances))


def _cover(points: Tensor, half_norms: Tensor, seen: Tensor, chosen: Tensor, distances: Tensor) -> float:
    """The largest distance once every row that could have it knows of all picks."""
    while (highest := float(distances.max())) > 0:
        rows = (distances >= DECAY * highest).nonzero()[:, 0]
        if bool((seen[rows] == len(chosen)).all()):
            return highest
        _catch_up(points, half_norms, rows, seen, chosen, distances)
    return 0.0


def _among(candidates: Tensor, distances: Tensor, limit: float, most: int) -> Tensor:
    """Greedy picks among candidates (C, D), farthest first, for as long as they beat `limit`; at least one."""
    mutual = torch.cdist(candidates, candidates, compute_mode="donot_use_mm_for_euclid_dist").numpy(force=True)
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


def _catch_up(
    points: Tensor, half_norms: Tensor, rows: Tensor, seen: Tensor, chosen: Tensor, distances: Tensor
) -> None:
    """distances[rows] ← min(distances[rows], distance to the nearest of the picks that a row does not know of)."""
    gathered = points.new_empty(BLOCK, points.shape[1])  # both written again and again: fresh memory costs more
    table = points.new_empty(BLOCK, CENTRES)  # than the product
    for known in seen[rows].unique().tolist():
        if known == len(chosen):
            continue
        stale = rows[seen[rows] == known]
        for some in chosen[known:].split(CENTRES):
            centres, norms = points[some].T, half_norms[some]
            cells = table.view(-1)[: BLOCK * len(some)].view(BLOCK, -1)
            for block in stale.split(BLOCK):
                those = torch.index_select(points, 0, block, out=gathered[: len(block)])
                nearest = torch.addmm(norms, those, centres, alpha=-1, out=cells[: len(block)]).amin(1)
                squared = (2 * (nearest + half_norms[block])).clamp_(min=0)
                distances[block] = torch.minimum(distances[block], squared.sqrt_())
    seen[rows] = len(chosen)


def _distances_to(rows: Tensor, point: Tensor) -> Tensor:
    return torch.cat([(block - point).norm(dim=1) for block in rows.split(BLOCK)])


def _project(rows: Tensor, generator: torch.Generator, dimension: int = 128) -> Tensor:
    """The reference's random linear map, U(−1/√D, 1/√D), where the rows have not 128 dimensions already."""
    width = rows.shape[1]
    if width == dimension:
        return rows
    matrix = (torch.rand(width, dimension, generator=generator) * 2 - 1) / width**0.5
    return torch.matmul(rows, matrix.to(rows.device))


def _total_distances(points: Tensor) -> Tensor:
    """L2 norm of each row of the distance matrix, without the matrix: Σ_j ‖x_i − x_j‖² in closed form."""
    centred = points - points.mean(0)
    squares = centred.square().sum(1)
    return (points.shape[0] * squares + squares.sum()).sqrt()


class Summary:
    """Rows of any number of images in bounded memory: a coreset of coresets (merge and reduce).

    As long as all rows fit they are kept as they are. Beyond that, each full chunk is reduced to `OVERSAMPLING` times
    its share by k-centre, and the final choice is made among what is left. Every row is then within the largest radius
    of the chunks plus the final radius of a chosen one, by the triangle inequality.
    """

    def __init__(
        self, total: int, dimension: int, share: float, memory: int, sampler: str, seed: int, device: torch.device
    ) -> None:
        """For `total` rows of which a share is to be chosen by a sampler, in at most `memory` bytes.

        Raises `OptionError` where the sampler is to keep everything and that does not fit.
        """
        fits = memory // (4 * dimension)
        if sampler == "identity" and total > fits:
            raise OptionError(
                f"--sampler identity: {total:,} patches of {dimension} numbers do not fit in --memory; choose k_center"
            )
        self.total, self.share, self.sampler, self.seed = total, share, sampler, seed
        self.most = max(1, fits // 3)  # entries of a bank that leave room to choose them
        self.rows = torch.empty(min(total, max(fits, 2)), dimension, device=device)
        self.images = torch.empty(len(self.rows), dtype=torch.long, device=device)
        self.is_whole = total <= fits
        self.radius = 0.0
        self._settled = self._filled = 0

    def add(self, rows: Tensor, images: Tensor) -> None:
        """Rows (N, D) and the image that each is from (N,)."""
        while len(rows):
            if not self.is_whole and (self._filled == len(self.rows) or self._filled - self._settled >= CHUNK):
                self._reduce()
            room = len(self.rows) - self._filled
            room = room if self.is_whole else min(room, CHUNK)
            some, rows = rows[:room], rows[room:]
            end = self._filled + len(some)
            self.rows[self._filled : end], self.images[self._filled : end] = some, images[: len(some)]
            images = images[len(some) :]
            self._filled = end

    def choose(self, progress: Callable[[int, int], None] | None = None) -> tuple[Tensor, Tensor, float]:
        """The bank: entries (K, D), their images (K,), and how far the farthest row is from an entry, at most."""
        count = min(max(1, int(self.total * self.share)), self.most if not self.is_whole else self._filled)
        rows, images = self.rows[: self._filled], self.images[: self._filled]
        chosen = select(rows, min(count, len(rows)), self.sampler, seed=self.seed, progress=progress)
        indices = chosen.indices.to(rows.device)
        return rows[indices], images[indices], self.radius + chosen.radius

    def _reduce(self) -> None:
        """Make room: reduce the unsettled chunk to its share, or everything to a half when that leaves too little."""
        chunk = self.rows[self._settled : self._filled]
        count = min(len(chunk), max(1, round(len(chunk) * self.share * OVERSAMPLING)))
        if self._settled + count > len(self.rows) // 2:
            self._settled, chunk = 0, self.rows[: self._filled]
            count = len(self.rows) // 4
        chosen = select(chunk, count, "random" if self.sampler == "random" else "k_center", seed=self.seed)
        kept = chosen.indices.to(chunk.device).sort().values
        end = self._settled + count
        self.rows[self._settled : end] = chunk[kept]
        self.images[self._settled : end] = self.images[self._settled : self._filled][kept]
        self.radius = max(self.radius, chosen.radius) if self._settled else self.radius + chosen.radius
        self._settled = self._filled = end


def _radius(rows: Tensor, centres: Tensor) -> float:
    return max(float(torch.cdist(rows[i : i + BLOCK], centres).amin(1).max()) for i in range(0, len(rows), BLOCK))
