"""Exact nearest neighbours in a memory bank: everything compared, or only what can be nearest."""

import torch
from torch import Tensor

__all__ = ["Cells", "arrange", "nearest", "traced"]

ROWS = 512  # queries at a time, and
ENTRIES = 4096  # of the bank at a time, where an exported graph compares everything
CELLS = 2**23  # numbers in the table of ranks at most: 32 MB, written again and again
SAMPLE = 64  # entries a cell that place its centre
ROUNDS = 4
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

    Which entries are nearest follows from  ‖b‖² / 2 − q·b,  one matrix product. Their distances are then computed by
    subtraction, which is exact where the product's difference of large numbers is not.
    """
    if half_norms is None:
        half_norms = bank.square().sum(1) / 2
    count = min(count, len(bank))
    rows = max(1, min(ROWS, CELLS // len(bank)))
    if len(queries) <= rows:
        indices = _best(_ranks(queries, bank, half_norms, images, None), count)
    else:
        indices = torch.empty(len(queries), count, dtype=torch.long, device=queries.device)
        table = queries.new_empty(rows, len(bank))
        for start in range(0, len(queries), rows):
            some = slice(start, start + rows)
            those = None if images is None else (images[0][some], images[1])
            found = indices[some]
            found[:] = _best(_ranks(queries[some], bank, half_norms, those, table[: len(found)]), count)
    distances = (queries[:, None] - bank[indices]).square().sum(2).sqrt()  # (N, count)
    if images is not None:
        distances = distances.masked_fill(images[1][indices] == images[0][:, None], torch.inf)
    return distances, indices


def traced(queries: Tensor, bank: Tensor, half_norms: Tensor, count: int = 1) -> tuple[Tensor, Tensor]:
    """As `nearest`, in operations that can be exported for any number of queries; the bank in parts of equal size."""
    count, parts = min(count, len(bank)), -(-len(bank) // ENTRIES)
    size = -(-len(bank) // parts)
    ranks, places = [], []
    for start in range(0, len(bank), size):
        table = torch.addmm(half_norms[start : start + size], queries, -bank[start : start + size].T)
        best = table.topk(min(count, table.shape[1]), largest=False)
        ranks.append(best.values)
        places.append(best.indices + start)
    indices = places[0]
    if len(places) > 1:
        best = torch.cat(ranks, 1).topk(count, largest=False)
        indices = torch.cat(places, 1).gather(1, best.indices)
    distances = (queries[:, None] - bank[indices]).square().sum(2).sqrt()  # (N, count)
    return distances, indices


def _ranks(
    queries: Tensor, bank: Tensor, half_norms: Tensor, images: tuple[Tensor, Tensor] | None, table: Tensor | None
) -> Tensor:
    """(N, K), ascending with distance; infinite where an entry does not count. Written to `table` if there is one."""
    if table is None:
        ranks = torch.addmm(half_norms, queries, bank.T, alpha=-1)
    else:
        ranks = torch.addmm(half_norms, queries, bank.T, alpha=-1, out=table)
    return ranks if images is None else ranks.masked_fill_(images[0][:, None] == images[1], torch.inf)


def _best(ranks: Tensor, count: int) -> Tensor:
    """Columns (N, count) of the smallest values in each row, ascending."""
    return ranks.argmin(1, keepdim=True) if count == 1 else ranks.topk(count, largest=False).indices


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
        self.half_norms = entries.square().sum(1) / 2
        self.centre_norms = (centres.square().sum(1) / 2).masked_fill(sizes == 0, torch.inf)  # never near
        self.ends = sizes.cumsum(0)
        self.starts = self.ends - sizes
        self.radii = centres.new_zeros(len(centres))
        for cell, (start, end) in enumerate(zip(self.starts.tolist(), self.ends.tolist(), strict=True)):
            if end > start:
                self.radii[cell] = (entries[start:end] - centres[cell]).norm(dim=1).max()
        self.between = torch.cdist(centres, centres).clamp_(min=1e-9)

    def nearest(self, queries: Tensor, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Distances (N,) and indices (N,) of the entries nearest to queries (N, D), as `nearest` finds them.

        `own` (N,) are the numbers of the queries' images, whose entries do not count.
        """
        half_norms = queries.square().sum(1) / 2
        squares = torch.addmm(self.centre_norms, queries, self.centres.T, alpha=-1)  # (N, C), soon ‖q − c‖² / 2
        squares.add_(half_norms[:, None]).clamp_(min=0)
        at_home, home = squares.min(1)
        who = home.argsort()
        ranks, places = self._visit(queries, who, home, own)
        best = torch.empty_like(half_norms).scatter_(0, who, ranks)
        place = torch.empty_like(home).scatter_(0, who, places)
        upper = (2 * (best + half_norms)).clamp_(min=0).sqrt_().mul_(1 + SLACK).add_(SLACK)
        halfway = (squares - at_home[:, None]).div_(self.between[home])
        needed = halfway < upper[:, None]
        needed &= (2 * squares).sqrt_().sub_(self.radii) < upper[:, None]
        needed.scatter_(1, home[:, None], False)
        if float(needed.mean(dtype=torch.float32)) > WORTHWHILE:
            return self._everywhere(queries, own)
        cell, who = needed.T.nonzero().unbind(1)
        ranks, places = self._visit(queries, who, cell, own)
        best.scatter_reduce_(0, who, ranks, "amin")
        nearer = ranks == best[who]
        place.scatter_(0, who[nearer], places[nearer])
        distances = (queries - self.entries[place]).square_().sum(1).sqrt_()
        return distances.masked_fill_(best.isinf(), torch.inf), place

    def several(self, queries: Tensor, count: int, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Distances (B, count), ascending, and indices of the entries nearest to a few queries (B, D), one by one."""
        found = []
        for number, query in enumerate(queries):
            lower = (self.centres - query).norm(dim=1) - self.radii
            order = lower.masked_fill(self.ends == self.starts, torch.inf).argsort()
            enough = int(torch.searchsorted((self.ends - self.starts)[order].cumsum(0), 4 * count)) + 1
            places = self._places(order[:enough])
            most = self._distances(query, places, own, number).topk(count, largest=False).values[-1]
            places = self._places((lower <= most * (1 + SLACK) + SLACK).nonzero()[:, 0])
            best, which = self._distances(query, places, own, number).topk(count, largest=False)
            found.append((best, places[which]))
        return torch.stack([best for best, _ in found]), torch.stack([indices for _, indices in found])

    def _places(self, cells: Tensor) -> Tensor:
        """Of all entries in these cells."""
        return torch.cat([torch.arange(int(self.starts[cell]), int(self.ends[cell])) for cell in cells.tolist()])

    def _distances(self, query: Tensor, places: Tensor, own: Tensor | None, number: int) -> Tensor:
        distances: Tensor = (self.entries[places] - query).norm(dim=1)
        return distances if own is None else distances.masked_fill(self.images[places] == own[number], torch.inf)

    def _everywhere(self, queries: Tensor, own: Tensor | None) -> tuple[Tensor, Tensor]:
        images = None if own is None else (own, self.images)
        distances, places = nearest(queries, self.entries, half_norms=self.half_norms, images=images)
        return distances[:, 0], places[:, 0]

    def _visit(self, queries: Tensor, who: Tensor, cell: Tensor, own: Tensor | None) -> tuple[Tensor, Tensor]:
        """For queries `who` (P,), each in one cell, in ascending order of these: the best rank, and its place."""
        ranks, places = torch.empty(len(who)), torch.empty(len(who), dtype=torch.long)
        counts = torch.bincount(cell, minlength=len(self.centres))
        at = 0
        for number, start, end in zip(counts.tolist(), self.starts.tolist(), self.ends.tolist(), strict=True):
            bank, norms = self.entries[start:end].T, self.half_norms[start:end]
            for first in range(at, at + number, ROWS):
                some = slice(first, min(first + ROWS, at + number))
                table = torch.addmm(norms, queries.index_select(0, who[some]), bank, alpha=-1)
                if own is not None:
                    table.masked_fill_(own[who[some]][:, None] == self.images[start:end], torch.inf)
                torch.min(table, 1, out=(ranks[some], places[some]))
            at += number
        return ranks, places + torch.repeat_interleave(self.starts, counts)


def arrange(entries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sort bank entries (K, D) into √K cells: their order (K,), the cells' centres (C, D) and sizes (C,).

    Each entry is in the cell whose centre is nearest. The centres are found by k-means on a sample.
    """
    count = round(len(entries) ** 0.5)
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
    return torch.addmm(half_norms, rows, centres.T, alpha=-1).argmin(1)
