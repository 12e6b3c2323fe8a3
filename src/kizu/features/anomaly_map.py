"""From a grid of patch scores to an anomaly map over the whole input."""

from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["MapUpsampling", "learn_units", "units_of", "upsampling_of"]

BUFFERS = ("inspected", "outlined", "pixels", "zones", "typical", "unit", "floor")
HIGH = 0.75  # quantile of good images' highest scores in a zone: higher ones hang on few images
LEAST = 1e-3  # of what is typical: a unit is no smaller


class MapUpsampling(nn.Module):
    """Bilinear upsampling, then Gaussian smoothing with a mirrored border.

    Both are linear along each axis, so together they are one matrix a side: map = R · grid · Cᵀ. The grid covers the
    map evenly, or its first point lies on pixel `first` and the others follow every `stride` pixels.

    Before, `zoned` leaves out what is not inspected, and puts the scores of each of several zones into units of its
    own: 0 is typical of good parts there, and 1 is what a quarter of them reach there.
    """

    rows: Tensor
    columns: Tensor
    inspected: Tensor | None  # (h, w) bool: which places count; None: all
    outlined: Tensor | None  # (h, w) bool: which lie in zones; None: all
    pixels: Tensor | None  # (H, W) bool: the same for the map
    zones: Tensor | None  # (h, w) the number of the zone that each place is in; None: all is one
    typical: Tensor | None  # (h, w) the score that is 0 there,
    unit: Tensor | None  # (h, w) and how far above it the score is that is 1
    floor: Tensor | None  # () what is typical of all that counts: what does not count has no more

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
        self.counts = [grid[0] * grid[1]]  # places of each zone
        self.only: frozenset[int] | None = None  # zones that count for now, of all
        self.factors: Tensor | None = None  # (N, zones) of units without each of the images that they were learned from
        for name in BUFFERS:
            self.register_buffer(name, None)

    def inspect(self, zones: npt.NDArray[np.int64] | None, seen: npt.NDArray[np.bool_] | None) -> None:
        """Take the zones of the pixels (H, W), negative in none, and which pixels all photographs show; None: all.

        A place of the grid counts where half or more of its pixels do, and is in the zone that has most of them. A zone
        that has no place so has the one that it fills most.
        """
        grid = self.rows.shape[1], self.columns.shape[1]
        if zones is not None:
            count = int(zones.max()) + 1
            layers = torch.from_numpy(zones)[None] == torch.arange(count)[:, None, None]
            shares = F.adaptive_avg_pool2d(layers.float(), grid)  # (zones, h, w)
            numbers, outlined = shares.argmax(0), shares.sum(0) >= 0.5
            for number in range(count):
                if not (outlined & (numbers == number)).any():
                    place = divmod(int(shares[number].argmax()), grid[1])
                    numbers[place], outlined[place] = number, True
            self._keep(outlined=outlined, inspected=outlined, pixels=torch.from_numpy(zones >= 0))
            if count > 1:
                self._keep(zones=numbers)
        if seen is not None:
            inspected = F.adaptive_avg_pool2d(torch.from_numpy(seen)[None].float(), grid)[0] >= 0.5
            self._keep(inspected=inspected if self.outlined is None else inspected & self.outlined.cpu())

    def _keep(self, **buffers: Tensor) -> None:
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor.to(self.rows.device, copy=True))
        if self.outlined is not None:
            numbers = self.outlined.long() - 1 if self.zones is None else torch.where(self.outlined, self.zones, -1)
            self.counts = torch.bincount(numbers[numbers >= 0]).tolist()

    def learn_units(self, grids: Tensor) -> None:
        """Learn from scores (N, h, w) of good images what is typical, and put each of several zones into its own units.

        What is typical is the median of a zone's places; what a quarter of good parts reach is a quantile of its peaks.
        """
        if self.inspected is None or not len(grids):
            return
        self._keep(floor=grids[:, self.inspected].median())
        if self.zones is None:
            return
        typical, unit = torch.zeros_like(grids[0]), torch.ones_like(grids[0])
        self.factors = grids.new_ones(len(grids), int(self.zones.max()) + 1)
        for number in range(int(self.zones.max()) + 1):
            places = self.inspected & (self.zones == number)
            if not places.any():  # it lies where some poses show nothing
                continue
            scores = grids[:, places]
            middle, peaks = scores.median(), scores.amax(1)
            least = float(middle.abs().clamp(min=1.0)) * LEAST
            own = (peaks.quantile(HIGH) - middle).clamp(min=least)
            typical[places], unit[places] = middle, own
            for image in range(len(peaks)) if len(peaks) > 1 else ():
                others = torch.cat([peaks[:image], peaks[image + 1 :]]).quantile(HIGH) - middle
                self.factors[image, number] = own / others.clamp(min=least)
        self._keep(typical=typical, unit=unit, floor=grids.new_zeros(()))

    def as_if_new(self, scores: Tensor, grids: Tensor, top: float) -> tuple[Tensor, Tensor]:
        """Scores (N,) and zoned scores (N, h, w) of the images that the units were learned from, each without its part.

        Otherwise the more zones there are, the more the images that set a threshold look like what set the units.
        """
        if self.factors is None or len(scores) != len(self.factors):
            return scores, grids
        means = self._zone_means(grids, top)
        ratio = (means * self.factors[:, : means.shape[1]]).amax(1) / means.amax(1)
        ratio = torch.where(means.amax(1) > 0, ratio, 1.0)
        return scores * ratio, grids * ratio[:, None, None]

    def restore(self, tensors: Mapping[str, Tensor | None], prefix: str = "") -> None:
        """Take what is inspected from a saved model's tensors."""
        for name in BUFFERS:
            self.register_buffer(name, tensors.get(f"{prefix}upsample.{name}"))
        self._keep()

    def inherit(self, other: "MapUpsampling") -> None:
        """Inspect what another one does."""
        self.restore({f"upsample.{name}": getattr(other, name) for name in BUFFERS})

    def zoned(self, grid: Tensor) -> Tensor:
        """Scores (…, h, w) in units of their zones; where nothing is inspected, the lowest score of the image."""
        if self.typical is not None and self.unit is not None:
            grid = (grid - self.typical) / self.unit
        if self.inspected is None:
            return grid
        inspected = self.inspected
        if self.only is not None and self.zones is not None:
            inspected = inspected & torch.isin(self.zones, torch.tensor(sorted(self.only), device=grid.device))
        return torch.where(inspected, grid, self._lowest(grid))

    def scores(self, grid: Tensor, top: float) -> Tensor:
        """(B,) from (B, …, h, w): the mean of the most anomalous places, a share `top` of all, one at least.

        Of several zones it is the highest of their means, over as many places in each, at most a quarter of it.
        """
        flat = grid.flatten(1)
        if self.zones is None:
            return _mean_of_highest(flat, round(top * self.counts[0]))
        return self._zone_means(grid, top).amax(1)

    def _zone_means(self, grid: Tensor, top: float) -> Tensor:
        """(B, zones): the mean of each zone's most anomalous places; of one that has no place, the lowest."""
        assert self.zones is not None
        flat, zones = grid.flatten(1), self.zones.flatten()
        numbers = zones if self.outlined is None else torch.where(self.outlined.flatten(), zones, -1)
        most = round(top * sum(self.counts))
        means = [
            _mean_of_highest(torch.where(numbers == number, flat, -torch.inf), min(most, count // 4))
            if count
            else flat.amin(1)
            for number, count in enumerate(self.counts)
        ]
        return torch.stack(means, dim=1)

    def stretch(self, number: int, factor: float) -> None:
        """Multiply the unit of a zone's scores."""
        assert self.zones is not None and self.unit is not None
        self._keep(unit=torch.where(self.zones == number, factor * self.unit, self.unit))

    def forward(self, grid: Tensor) -> Tensor:
        """(B, h, w) → (B, 1, H, W); what lies in no zone gets the lowest value of the image."""
        maps = (self.rows @ grid @ self.columns.T)[:, None]
        return maps if self.pixels is None else torch.where(self.pixels, maps, self._lowest(maps))

    def _lowest(self, values: Tensor) -> Tensor:
        """(…, 1, 1): of an image, and no more than is typical."""
        lowest = values.amin((-2, -1), keepdim=True)
        return lowest if self.floor is None else torch.minimum(lowest, self.floor)


def _mean_of_highest(flat: Tensor, count: int) -> Tensor:
    return flat.topk(max(1, count), dim=1).values.mean(1)


def learn_units(graph: nn.Module, good: Iterable[Tensor]) -> None:
    """Teach what makes a graph's maps what is typical, by good images (B, 3, H, W), where it must know and does not."""
    upsample = upsampling_of(graph)
    if upsample is None or upsample.inspected is None or upsample.floor is not None:
        return
    grid = upsample.inspected.shape
    grids = [F.adaptive_max_pool2d(graph(pixels)[1][:, 0], grid) for pixels in good]
    upsample.learn_units(torch.cat([upsample.rows.new_empty(0, *grid), *grids]))


def upsampling_of(graph: nn.Module) -> MapUpsampling | None:
    """What makes the maps of a graph; of an ensemble, its first member's."""
    return next((module for module in graph.modules() if isinstance(module, MapUpsampling)), None)


def units_of(graph: nn.Module) -> dict[str, list[float]]:
    """Of a graph with several zones, for each zone the score that is typical there and the unit of what lies above."""
    upsample = getattr(graph, "upsample", None)  # otherwise the graph's scores are of another scale than its maps'
    if upsample is None or upsample.zones is None or upsample.typical is None or upsample.unit is None:
        return {}
    values: dict[str, list[float]] = {"typical": [], "unit": []}
    for number in range(int(upsample.zones.max()) + 1):
        places = upsample.zones == number
        if upsample.inspected is not None:
            places &= upsample.inspected
        known = bool(places.any())  # a zone smaller than a place may share it with another, which then has it
        values["typical"].append(float(upsample.typical[places][0]) if known else 0.0)
        values["unit"].append(float(upsample.unit[places][0]) if known else 1.0)
    return values


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
