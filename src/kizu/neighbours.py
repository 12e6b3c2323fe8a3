"""Exact nearest neighbours in a memory bank."""

import torch
from torch import Tensor

__all__ = ["nearest"]

BLOCK = 2048  # queries at a time: bounds the distance matrix to BLOCK × bank entries


def nearest(
    queries: Tensor,
    bank: Tensor,
    count: int = 1,
    *,
    half_norms: Tensor | None = None,
    query_images: Tensor | None = None,
    bank_images: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Euclidean distances (N, count), ascending, and indices of the bank entries nearest to each query.

    queries (N, D), bank (K, D), `half_norms` ‖b‖² / 2 of the bank entries (K,) where known. With `query_images` (N,)
    and `bank_images` (K,), entries from a query's own image do not count: leave one image out.
    Where no others are left, the distance is infinite.

    Which entries are nearest follows from  ‖b‖² / 2 − q·b,  one matrix product. Their distances are then computed by
    subtraction, which is exact where the product's difference of large numbers is not.
    """
    if half_norms is None:
        half_norms = bank.square().sum(1) / 2
    count = min(count, bank.shape[0])
    if queries.shape[0] <= BLOCK and query_images is None:
        return _search(queries, bank, half_norms, count, None)
    parts = []
    for start in range(0, queries.shape[0], BLOCK):
        own = None
        if query_images is not None and bank_images is not None:
            own = query_images[start : start + BLOCK, None] == bank_images
        parts.append(_search(queries[start : start + BLOCK], bank, half_norms, count, own))
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def _search(queries: Tensor, bank: Tensor, half_norms: Tensor, count: int, own: Tensor | None) -> tuple[Tensor, Tensor]:
    ranks = torch.addmm(half_norms, queries, bank.T, alpha=-1)  # (N, K)
    if own is not None:
        ranks = ranks.masked_fill_(own, torch.inf)
    indices = ranks.argmin(1, keepdim=True) if count == 1 else ranks.topk(count, largest=False).indices
    distances = (queries[:, None] - bank[indices]).square().sum(2).sqrt()  # (N, count)
    if own is not None:
        distances = distances.masked_fill(ranks.gather(1, indices).isinf(), torch.inf)
    return distances, indices
