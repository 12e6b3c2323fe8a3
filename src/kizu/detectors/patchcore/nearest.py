"""Exact nearest neighbours in a memory bank: everything compared, or only what can be nearest."""

import torch
from torch import Tensor
from torch.nn import functional as F

from kizu.features.matmul import padded, similarities
from kizu.features.tracing import is_traced

__all__ = ["Cells", "arrange", "nearest"]

ROWS = 512  # queries at a time, and
ENTRIES = 4096  # of the bank at a time, in a table that stays in the cache;
ON_GPU = 4  # times as many of each there
SAMPLE = 64  # entries a cell that place its centre
ROUNDS = 4
CELL = 64  # entries that a cell is rounded up to multiples of
SLACK = 1e-4  # for rounding, where bounds are compared
WORTHWHILE = 0.4  # share of the cells from which on comparing everything is faster


def nearest(
    queries: Tensor,
    bank: Tensor,
    count: int = 1,
    *,
    half_norms: Tensor | None = None,
    images: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Euclidean distances (N, count), ascending, and indices of the bank entries nearest to each query.

    queries (N, D), bank (K, D), `half_norms` ‖b‖² / 2 of the bank entries (K,) where known; `images` are the numbers of
    the images that queries (N,) and entries (K,) are from: entries of a query's own image do not count. Where too few
    are left, the distance is infinite.

    Which entries are nearest follows from  q·b − ‖b‖² / 2,  one matrix product. Their distances are then computed by
    subtraction, which is exact where the product's difference of large numbers is not.
    """
    if half_norms is None:
        half_norms = bank.square().sum(1) / 2
    count = min(count, len(bank))
    block = ROWS if queries.device.type == "cpu" else ON_GPU * ROWS
    if is_traced() or len(queries) <= block:
        indices = _best(queries, bank, half_norms, images, count)
    else:
        indices = torch.empty(len(queries), count, dtype=torch.long, device=queries.device)
        for start in range(0, len(queries), block):
            some = slice(start, start + block)
            those = None if images is None else (images[0][some], images[1])
            indices[some] = _best(queries[some], bank, half_norms, those, count)
    distances = (queries[:, None] - bank[indices]).square().sum(2).sqrt()  # (N, count)
    if images is not None:
        distances = distances.masked_fill(images[1][indices] == images[0][:, None], torch.inf)
    return distances, indices


def _best(
    queries: Tensor, bank: Tensor, half_norms: Tensor, images: tuple[Tensor, Tensor] | None, count: int
) -> Tensor:
    """Indices (N, count) of the nearest entries, in ascending distance; the bank in parts of equal size."""
    most = ENTRIES if queries.device.type == "cpu" else ON_GPU * ENTRIES
    size = -(-len(bank) // -(-len(bank) // most))
    values, places = [], []
    for start in range(0, len(bank), size):
        some = slice(start, start + size)
        table = similarities(queries, bank[some], half_norms[some])
        if images is not None:
            table.masked_fill_(images[0][:, None] == images[1][some], -torch.inf)
        fast = count == 1 and not is_traced()
        best = table.max(1, keepdim=True) if fast else table.topk(min(count, table.shape[1]))
        values.append(best[0])
        places.append(best[1] + start)
    if len(places) == 1:
        return places[0]
    return torch.cat(places, 1).gather(1, torch.cat(values, 1).topk(count).indices)


class Cells:
    """Search in a bank that is sorted into cells, most of which a query need not look into.

    A query first searches the cell whose centre g is nearest. With the distance u of what it found there, another cell
    with centre c and radius r can hold something nearer only if both

        ‖q − c‖ − r < u    (triangle inequality)  and
        (‖q − c‖² − ‖q − g‖²) / 2 ‖c − g‖ < u    (the plane halfway between c and g, which the cell lies behind).

    What is left is searched cell by cell, each as one matrix product with all queries that need it.
    """

    def __init__(self, entries: Tensor, images: Tensor, centres: Tensor, sizes: Tensor) -> None:
        """Of bank entries (K, D) in the order of `arrange`, and the images that each is from (K,)."""
        self.entries, self.images, self.centres = entries, images, centres
        self.half_norms = entries.norm(dim=1).square_().div_(2)
        self.centre_norms = (centres.square().sum(1) / 2).masked_fill(sizes == 0, torch.inf)  # never near
        self.ends = sizes.cumsum(0)
        self.starts = self.ends - sizes
        wide = (sizes + CELL - 1) // CELL * CELL  # where a few entries more do no harm: see `products`
        ends = (self.starts + wide).clamp(max=len(entries))
        self.wide_starts = (ends - wide).clamp(min=0)
        self.wide = self.wide_starts.tolist(), ends.tolist()
        self.radii = centres.new_zeros(len(centres))
        for cell, members in enumerate(entries.split(sizes.tolist())):
            if len(members):
                self.radii[cell] = (members - centres[cell]).norm(dim=1).max()
        self.between = torch.cdist(centres, centres).clamp_(min=1e-9)

    def nearest(self, queries: Tensor, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Distances (N,) and indices (N,) of the entries nearest to queries (N, D), as `nearest` finds them.

        `own` (N,) are the numbers of the queries' images, whose entries do not count.
        """
        half_norms = queries.square().sum(1) / 2
        similar = similarities(queries, self.centres, self.centre_norms)  # (N, C)
        squares = torch.sub(half_norms[:, None], similar, out=similar).clamp_(min=0)  # ‖q − c‖² / 2
        at_home, home = squares.min(1)
        who = home.argsort()
        similar, places = self._visit(queries, who, home, own)
        best = torch.empty_like(half_norms).scatter_(0, who, similar)
        place = torch.empty_like(home).scatter_(0, who, places)
        upper = (2 * (half_norms - best)).clamp_(min=0).sqrt_().mul_(1 + SLACK).add_(SLACK)
        halfway = (squares - at_home[:, None]).div_(self.between[home])
        needed = halfway < upper[:, None]
        needed &= (2 * squares).sqrt_().sub_(self.radii) < upper[:, None]
        needed.scatter_(1, home[:, None], False)
        if float(needed.mean(dtype=torch.float32)) > WORTHWHILE:
            return self._everywhere(queries, own)
        cell, who = needed.T.nonzero().unbind(1)
        similar, places = self._visit(queries, who, cell, own)
        best.scatter_reduce_(0, who, similar, "amax")
        nearer = similar == best[who]
        place.scatter_(0, who[nearer], places[nearer])
        distances = torch.empty_like(best)
        for some, found, those in zip(queries.split(ROWS), place.split(ROWS), distances.split(ROWS), strict=True):
            torch.linalg.vector_norm(some - self.entries[found], dim=1, out=those)
        return distances.masked_fill_(best.isinf(), torch.inf), place

    def several(self, queries: Tensor, count: int, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Distances (B, count), ascending, and indices of the entries nearest to a few queries (B, D), one by one."""
        distances = queries.new_full((len(queries), count), torch.inf)
        places = torch.zeros(distances.shape, dtype=torch.long)
        for number, query in enumerate(queries):
            lower, cells = ((self.centres - query).norm(dim=1) - self.radii).sort()
            for least, cell in zip(lower.tolist(), cells.tolist(), strict=True):
                if least > float(distances[number, -1]) * (1 + SLACK) + SLACK:
                    break
                members = torch.arange(int(self.starts[cell]), int(self.ends[cell]))
                those = (self.entries[int(self.starts[cell]) : int(self.ends[cell])] - query).norm(dim=1)
                if own is not None:
                    those.masked_fill_(self.images[members] == own[number], torch.inf)
                best = torch.cat([distances[number], those]).topk(count, largest=False)
                distances[number], places[number] = best.values, torch.cat([places[number], members])[best.indices]
        return distances, places

    def _everywhere(self, queries: Tensor, own: Tensor | None) -> tuple[Tensor, Tensor]:
        images = None if own is None else (own, self.images)
        distances, places = nearest(queries, self.entries, half_norms=self.half_norms, images=images)
        return distances[:, 0], places[:, 0]

    def _visit(self, queries: Tensor, who: Tensor, cell: Tensor, own: Tensor | None) -> tuple[Tensor, Tensor]:
        """For queries `who` (P,), each in one cell, in ascending order of these: the best similarity, and its place."""
        best, places = torch.empty(len(who)), torch.empty(len(who), dtype=torch.long)
        wanted = F.pad(who, (0, padded(ROWS)))
        counts = torch.bincount(cell, minlength=len(self.centres))
        at = 0
        for number, first, last in zip(counts.tolist(), *self.wide, strict=True):
            bank, norms = self.entries[first:last], self.half_norms[first:last]
            for start in range(at, at + number, ROWS):
                end = min(start + ROWS, at + number)
                more = wanted[start : start + padded(end - start)]
                table = similarities(queries.index_select(0, more), bank, norms)[: end - start]
                if own is not None:
                    table.masked_fill_(own[who[start:end]][:, None] == self.images[first:last], -torch.inf)
                torch.max(table, 1, out=(best[start:end], places[start:end]))
            at += number
        return best, places + torch.repeat_interleave(self.wide_starts, counts)


def arrange(entries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sort bank entries (K, D) into √K / 2 cells: their order (K,), the cells' centres (C, D) and sizes (C,).

    Each entry is in the cell whose centre is nearest. The centres are found by k-means on a sample.
    """
    count = max(1, round(len(entries) ** 0.5 / 2))
    chosen = torch.randperm(len(entries), generator=torch.Generator().manual_seed(0))[: SAMPLE * count]
    sample = entries[chosen.to(entries.device)]
    centres = sample[:count].clone()
    for _ in range(ROUNDS):
        owner = _owner(sample, centres, centres.square().sum(1) / 2)
        sizes = torch.bincount(owner, minlength=count)[:, None]
        means = torch.zeros_like(centres).index_add_(0, owner, sample) / sizes.clamp(min=1)
        centres = torch.where(sizes > 0, means, centres)
    half_norms = centres.square().sum(1) / 2
    owner = torch.cat([_owner(rows, centres, half_norms) for rows in entries.split(ROWS)])
    return owner.argsort(stable=True), centres, torch.bincount(owner, minlength=count)


def _owner(rows: Tensor, centres: Tensor, half_norms: Tensor) -> Tensor:
    return similarities(rows, centres, half_norms).argmax(1)
