"""k-centre selection: the few patches that stand for all of them.

Greedy k-centre picks, again and again, the row that is farthest from all rows picked so far. Done literally, every
pick reads every row. Here the rows are read once for many picks: take the C rows that are farthest now. No other row
is, or can become, farther than the nearest of these, because distances only shrink. So picks are made among the
candidates alone, with their mutual distances, until the farthest of them falls below that bound; up to there they are
exactly the greedy picks. Then all rows are updated by one matrix product.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kizu.errors import OptionError

__all__ = ["Coreset", "select"]

CANDIDATES = 512
BLOCK = 8192  # rows at a time in a matrix product


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
        start = (rows - rows.mean(0)).norm(dim=1)
        first = int(start.argmax())
        distances = (rows - rows[first]).norm(dim=1)
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
    """Exact greedy from given initial distances (N,), many picks to a pass over the points."""
    half_norms = points.square().sum(1) / 2
    while len(picks) < count:
        size = min(CANDIDATES, points.shape[0])
        bound, candidates = distances.topk(size)
        limit = float(bound[-1]) if size < points.shape[0] else 0.0
        new = _among(points[candidates], bound.clone(), limit, count - len(picks))
        chosen = candidates[new]
        picks += chosen.tolist()
        _shrink(points, half_norms, chosen, distances)
        if progress is not None:
            progress(len(picks), count)
    return Coreset(torch.tensor(picks), max(0.0, float(distances.max())))


def _among(candidates: Tensor, distances: Tensor, limit: float, most: int) -> Tensor:
    """Greedy picks among candidates (C, D) for as long as they beat `limit`; at least one."""
    mutual = torch.cdist(candidates, candidates, compute_mode="donot_use_mm_for_euclid_dist").numpy(force=True)
    remaining = distances.numpy(force=True)
    picks: list[int] = []
    while len(picks) < most:
        best = int(remaining.argmax())
        if picks and remaining[best] < max(limit, 0):
            break
        picks.append(best)
        remaining = remaining.clip(max=mutual[best])
        remaining[best] = -1.0
    return torch.tensor(picks, device=candidates.device)


def _shrink(points: Tensor, half_norms: Tensor, chosen: Tensor, distances: Tensor) -> None:
    """distances ← min(distances, distance to the nearest chosen point), in place."""
    centres = points[chosen]
    norms = half_norms[chosen]
    for start in range(0, points.shape[0], BLOCK):
        block = slice(start, start + BLOCK)
        nearest = torch.addmm(norms, points[block], centres.T, alpha=-1).amin(1)
        squared = (2 * (nearest + half_norms[block])).clamp_(min=0)
        torch.minimum(distances[block], squared.sqrt_(), out=distances[block])
    distances[chosen] = -1  # never again


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


def _radius(rows: Tensor, centres: Tensor) -> float:
    return max(float(torch.cdist(rows[i : i + BLOCK], centres).amin(1).max()) for i in range(0, len(rows), BLOCK))
