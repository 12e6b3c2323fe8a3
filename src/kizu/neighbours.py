"""Exact nearest neighbours in a memory bank."""

import torch
from torch import Tensor

__all__ = ["nearest"]

ROWS = 512  # queries at a time, and
CELLS = 2**23  # cells of the table of ranks at most: 32 MB, written again and again


def nearest(
    queries: Tensor,
    bank: Tensor,
    count: int = 1,
    *,
    half_norms: Tensor | None = None,
    excluded: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Euclidean distances (N, count), ascending, and indices of the bank entries nearest to each query.

    queries (N, D), bank (K, D), `half_norms` ‖b‖² / 2 of the bank entries (K,) where known; `excluded` entries (K,) do
    not count. Where too few are left, the distance is infinite.

    Which entries are nearest follows from  ‖b‖² / 2 − q·b,  one matrix product. Their distances are then computed by
    subtraction, which is exact where the product's difference of large numbers is not.
    """
    if half_norms is None:
        half_norms = bank.square().sum(1) / 2
    if excluded is not None:
        half_norms = half_norms.masked_fill(excluded, torch.inf)
    count = min(count, len(bank))
    rows = max(1, min(ROWS, CELLS // len(bank)))
    if len(queries) <= rows:
        indices = _best(torch.addmm(half_norms, queries, bank.T, alpha=-1), count)
    else:
        indices = torch.empty(len(queries), count, dtype=torch.long, device=queries.device)
        table = queries.new_empty(rows, len(bank))
        for some, found in zip(queries.split(rows), indices.split(rows), strict=True):
            ranks = torch.addmm(half_norms, some, bank.T, alpha=-1, out=table[: len(some)])  # (rows, K)
            found[:] = _best(ranks, count)
    distances = (queries[:, None] - bank[indices]).square().sum(2).sqrt()  # (N, count)
    if excluded is not None:
        distances = distances.masked_fill(excluded[indices], torch.inf)
    return distances, indices


def _best(ranks: Tensor, count: int) -> Tensor:
    """Columns (N, count) of the smallest values in each row, ascending."""
    return ranks.argmin(1, keepdim=True) if count == 1 else ranks.topk(count, largest=False).indices
