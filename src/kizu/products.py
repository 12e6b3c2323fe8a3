"""Matrix products of patches with patches: what the time of a memory bank goes into."""

from typing import Any

import torch
from torch import Tensor

from kizu.tracing import is_traced

__all__ = ["PADDED", "padded", "similarities"]

PADDED = 64  # oneDNN compiles a kernel for each shape that it meets: sides are rounded up to multiples, so few are
LINEAR: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def similarities(rows: Tensor, others: Tensor, half_norms: Tensor) -> Tensor:
    """r·o − ‖o‖² / 2 for rows (N, D) and others (K, D): (N, K), the largest in a row for the nearest to it.

    On CPUs by oneDNN, which torch has for its convolutions. The MKL that torch multiplies matrices with reaches less
    than half of its speed on processors of another maker. Few rows are faster without its preparations.
    """
    if is_traced() or LINEAR is None or rows.device.type != "cpu" or rows.dtype != torch.float32 or len(rows) < PADDED:
        return torch.addmm(-half_norms, rows, others.T)
    product: Tensor = LINEAR(rows, others, -half_norms, "none", [], "")
    return product


def padded(count: int) -> int:
    """So many rows, for oneDNN rounded up to multiples of 64, or of 256 where that is little more."""
    if count < PADDED:
        return count
    step = PADDED if count <= 4 * PADDED else 4 * PADDED
    return -(-count // step) * step
