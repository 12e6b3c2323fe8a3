"""Matrix products of patches with patches: what the time of a memory bank goes into."""

from functools import cache
from typing import Protocol, cast

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["is_traced", "padded", "similarities"]

MIN_ROWS = 32  # rows and others from which on oneDNN is worth its preparations
MAX_PADDED = 512  # others that are rounded up: larger banks are few


class Linear(Protocol):
    """rows (N, D) · others (K, D)ᵀ + bias (K,); then an activation by name, with its numbers and its algorithm."""

    def __call__(
        self, rows: Tensor, others: Tensor, bias: Tensor, activation: str, numbers: list[float], algorithm: str, /
    ) -> Tensor: ...


def similarities(rows: Tensor, others: Tensor, half_norms: Tensor) -> Tensor:
    """r·o − ‖o‖² / 2 for rows (N, D) and others (K, D): (N, K), the largest in a row for the nearest to it.

    What it computes, slowly: `rows @ others.T - half_norms`, where `half_norms` are `others.square().sum(1) / 2`.

    On CPUs by oneDNN, which torch has for its convolutions. The MKL that torch multiplies matrices with reaches less
    than half of its speed on processors of another maker. oneDNN compiles and keeps a kernel of half a megabyte for
    each shape that it meets, so sides are rounded up: `padded`.
    """
    if is_traced():  # asked first: a number of rows that is looked at would be fixed in an export
        return torch.addmm(-half_norms, rows, others.T)
    small = len(rows) < MIN_ROWS or len(others) < MIN_ROWS
    on_cpu = rows.device.type == "cpu" and rows.dtype == torch.float32
    linear = onednn_linear() if on_cpu and not small else None
    if linear is None:
        return torch.addmm(-half_norms, rows, others.T)
    count = len(others)
    if count <= MAX_PADDED and padded(count) > count:
        more = padded(count) - count
        others, half_norms = F.pad(others, (0, 0, 0, more)), F.pad(half_norms, (0, more))
    return linear(rows, others, -half_norms, "none", [], "")[:, :count]


def padded(count: int) -> int:
    """So many rows or others, for oneDNN rounded up to a power of two."""
    return count if count < MIN_ROWS else 1 << (count - 1).bit_length()


@cache
def onednn_linear() -> Linear | None:
    """oneDNN's product, a private operation of torch; None where this torch has none, or one that computes another."""
    if not torch.backends.mkldnn.is_available():
        return None
    rows, bias = torch.linspace(-1, 1, MIN_ROWS**2).view(MIN_ROWS, MIN_ROWS), torch.linspace(0, 1, MIN_ROWS)
    try:
        linear = cast(Linear, torch.ops.mkldnn._linear_pointwise)
        product = linear(rows, rows, bias, "none", [], "")
        same = torch.allclose(product, rows @ rows.T + bias, atol=1e-4)
    except Exception:  # an operation that is gone or takes other arguments raises anything
        return None
    return linear if same else None


def is_traced() -> bool:
    """Whether a graph is being recorded, for another engine and any number of images, rather than run."""
    return torch.compiler.is_compiling() or bool(torch.jit.is_tracing())  # type: ignore[attr-defined,no-untyped-call]
