"""From a grid of patch scores to an anomaly map over the whole input."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["MapUpsampling"]


class MapUpsampling(nn.Module):
    """Bilinear upsampling, then Gaussian smoothing with a mirrored border.

    Both are linear along each axis, so together they are one matrix a side: map = R · grid · Cᵀ. The grid covers the
    map evenly, or its first point lies on pixel `first` and the others follow every `stride` pixels. What is
    not inspected gets the lowest score of the grid from `only_inspected`.
    """

    rows: Tensor
    columns: Tensor
    inspected: Tensor | None  # (h, w) bool; None: all of the grid

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
        self.register_buffer("inspected", None)

    def inspect(self, pixels: npt.NDArray[np.bool_] | None) -> None:
        """Inspect only places of the grid of which half or more lie on these pixels (H, W); None changes nothing."""
        if pixels is not None:
            grid = self.rows.shape[1], self.columns.shape[1]
            shares = F.adaptive_avg_pool2d(torch.from_numpy(pixels)[None, None].float(), grid)[0, 0]
            self.register_buffer("inspected", (shares >= 0.5).to(self.rows.device))

    def only_inspected(self, grid: Tensor) -> Tensor:
        """Scores (…, h, w); where nothing is inspected, the lowest score of the image."""
        if self.inspected is None:
            return grid
        return torch.where(self.inspected, grid, grid.amin((-2, -1), keepdim=True))

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
