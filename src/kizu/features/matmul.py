"""Matrix products of patches with patches: what the time of a memory bank goes into."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kizu.features.tracing import is_traced

__all__ = ["padded", "similarities"]

LEAST = 32  # rows and others from which on oneDNN is worth its preparations
MOST = 512  # others that are rounded up: larger banks are few
LINEAR: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def similarities(rows: Tensor, others: Tensor, half_norms: Tensor) -> Tensor:
    """r·o − ‖o‖² / 2 for rows (N, D) and others (K, D): (N, K), the largest in a row for the nearest to it.

    On CPUs by oneDNN, which torch has for its convolutions. The MKL that torch multiplies matrices with reaches less
    than half of its speed on processors of another maker. oneDNN compiles and keeps a kernel of half a megabyte for
    each shape that it meets, so sides are rounded up: `padded`.
    """
    few = len(others) < LEAST or rows.dtype != torch.float32 or rows.device.type != "cpu" or LINEAR is None
    if is_traced() or few or len(rows) < LEAST:
        return torch.addmm(-half_norms, rows, others.T)
    count = len(others)
    if count <= MOST and padded(count) > count:
        more = padded(count) - count
        others, half_norms = F.pad(others, (0, 0, 0, more)), F.pad(half_norms, (0, more))
    product: Tensor = LINEAR(rows, others, -half_norms, "none", [], "")
    return product[:, :count]


def padded(count: int) -> int:
    """So many rows or others, for oneDNN rounded up to a power of two."""
    return count if count < LEAST else 1 << (count - 1).bit_length()
