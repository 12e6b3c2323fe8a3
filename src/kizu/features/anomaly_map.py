"""From a grid of patch scores to an anomaly map over the whole input."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["MapUpsampling"]


class MapUpsampling(nn.Module):
    """Bilinear upsampling, then Gaussian smoothing with a mirrored border.

    Both are linear along each axis, so together they are one matrix a side: map = R · grid · Cᵀ. The grid covers the
    map evenly, or its first point lies on pixel `first` and the others follow every `stride` pixels.
    """

    rows: Tensor
    columns: Tensor

    def __init__(
        self,
        grid: tuple[int, int],
        size: tuple[int, int],
        sigma: float,
        first: float | None = None,
        stride: float | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("rows", _matrix(grid[0], size[0], sigma, first, stride))  # (H, h)
        self.register_buffer("columns", _matrix(grid[1], size[1], sigma, first, stride))  # (W, w)

    def forward(self, grid: Tensor) -> Tensor:
        """(B, h, w) → (B, 1, H, W)."""
        return (self.rows @ grid @ self.columns.T)[:, None]


def _matrix(length: int, size: int, sigma: float, first: float | None, stride: float | None) -> Tensor:
    """(size, length): upsample to `size`, then convolve with a Gaussian cut at 4σ, as scipy.ndimage does."""
    unit = torch.eye(length, dtype=torch.float64, device="cpu")
    if first is None or stride is None:
        upsampled = F.interpolate(unit[None], size=size, mode="linear", align_corners=False)[0].T
    else:
        places = ((torch.arange(size, device="cpu").double() - first) / stride).clamp(0, length - 1)
        below = places.long().clamp(max=max(length - 2, 0))
        above = (below + 1).clamp(max=length - 1)
        upsampled = torch.lerp(unit[below], unit[above], (places - below)[:, None])
    if sigma == 0:
        return upsampled.float()
    radius = int(4 * sigma + 0.5)
    offsets = torch.arange(-radius, radius + 1, device="cpu")
    kernel = torch.exp(-(offsets.double() ** 2) / (2 * sigma**2))
    kernel /= kernel.sum()
    positions = (torch.arange(size, device="cpu")[:, None] + offsets) % (2 * size)  # mirrored: … 1 0 0 1 … n n n-1 …
    positions = torch.minimum(positions, 2 * size - 1 - positions)
    smoothing = torch.zeros(size, size, dtype=torch.float64, device="cpu")
    smoothing.scatter_add_(1, positions, kernel.expand(size, -1).contiguous())
    return (smoothing @ upsampled).float()
