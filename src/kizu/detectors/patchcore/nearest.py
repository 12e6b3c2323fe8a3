"""Nearest neighbours in a memory bank, three ways to the same distances.

`nearest` compares every query with every entry. `CellIndex` finds the same entries and looks only where they can be:
the bank is sorted into cells (`sort_into_cells`), and bounds say which of them a query need not look into.
`QuantisedIndex` is the approximate search of the paper's appendix, for banks of millions.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from kizu.errors import OptionError, require
from kizu.features.matmul import is_traced, padded, similarities

__all__ = ["CellIndex", "QuantisedIndex", "nearest", "sort_into_cells"]

ROWS = 512  # queries at a time, and
ENTRIES = 4096  # of the bank at a time, in a table that stays in the cache;
GPU_FACTOR = 4  # times as many of each there
CELL_SAMPLE = 64  # entries a cell that place its centre
KMEANS_ROUNDS = 4
CELL_MULTIPLE = 64  # entries that a cell is rounded up to multiples of
ROUNDING = 1e-4  # that compared distances may be off
WORTHWHILE = 0.4  # share of the cells from which on comparing everything is faster

LISTS, PARTS, BITS = 512, 64, 8  # cells, parts that a vector is cut into, bits a part: the reference's
LISTS_PER_PROBE = 16  # one cell in so many is looked into
FETCHED = 16  # entries that the codes find nearest, of which exact distances then choose
ENTRIES_PER_LIST = 39  # that faiss wants to learn from, at least


def nearest(
    queries: Tensor,
    entries: Tensor,
    count: int = 1,
    *,
    half_norms: Tensor | None = None,
    image_ids: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Euclidean distances (N, count), ascending, and indices of the entries (K, D) nearest to each query (N, D).

    What it computes, slowly:

        table = torch.cdist(queries, entries).masked_fill(image_ids[0][:, None] == image_ids[1], torch.inf)
        distances, indices = table.topk(count, largest=False)

    `image_ids` are of the images that queries (N,) and entries (K,) are from: entries of a query's own image do not
    count. `half_norms` are ‖entry‖² / 2 (K,) where known.

    Which entries are nearest follows from  q·e − ‖e‖² / 2,  one matrix product. Their distances are then computed by
    subtraction, which is exact where the product's difference of large numbers is not.
    """
    if half_norms is None:
        half_norms = entries.square().sum(1) / 2
    count = min(count, len(entries))
    block = ROWS if queries.device.type == "cpu" else GPU_FACTOR * ROWS
    if is_traced() or len(queries) <= block:
        indices = _nearest_indices(queries, entries, half_norms, image_ids, count)
    else:
        indices = torch.empty(len(queries), count, dtype=torch.long, device=queries.device)
        for start in range(0, len(queries), block):
            span = slice(start, start + block)
            span_ids = None if image_ids is None else (image_ids[0][span], image_ids[1])
            indices[span] = _nearest_indices(queries[span], entries, half_norms, span_ids, count)
    distances = (queries[:, None] - entries[indices]).square().sum(2).sqrt()  # (N, count)
    if image_ids is not None:
        distances = distances.masked_fill(image_ids[1][indices] == image_ids[0][:, None], torch.inf)
    return distances, indices


def _nearest_indices(
    queries: Tensor, entries: Tensor, half_norms: Tensor, image_ids: tuple[Tensor, Tensor] | None, count: int
) -> Tensor:
    """Indices (N, count) of the nearest entries, in ascending distance; these in parts of equal size."""
    most = ENTRIES if queries.device.type == "cpu" else GPU_FACTOR * ENTRIES
    size = -(-len(entries) // -(-len(entries) // most))
    values, places = [], []
    for start in range(0, len(entries), size):
        span = slice(start, start + size)
        table = similarities(queries, entries[span], half_norms[span])
        if image_ids is not None:
            table.masked_fill_(image_ids[0][:, None] == image_ids[1][span], -torch.inf)
        fast = count == 1 and not is_traced()
        best = table.max(1, keepdim=True) if fast else table.topk(min(count, table.shape[1]))
        values.append(best[0])
        places.append(best[1] + start)
    if len(places) == 1:
        return places[0]
    return torch.cat(places, 1).gather(1, torch.cat(values, 1).topk(count).indices)


class CellIndex:
    """Exact search in a bank that is sorted into cells, most of which a query need not look into.

    A query first searches the cell whose centre g is nearest. With the distance u of what it found there, another cell
    with centre c and radius r can hold something nearer only if both

        ‖q − c‖ − r < u    (triangle inequality)  and
        (‖q − c‖² − ‖q − g‖²) / 2 ‖c − g‖ < u    (the plane halfway between c and g, which the cell lies behind).

    What is left is searched cell by cell, each as one matrix product with all queries that need it.
    """

    def __init__(self, entries: Tensor, image_ids: Tensor, centres: Tensor, sizes: Tensor) -> None:
        """Of bank entries (K, D) in the order of `sort_into_cells`, and the images that each is from (K,)."""
        self.entries, self.image_ids, self.centres = entries, image_ids, centres
        self.half_norms = entries.norm(dim=1).square_().div_(2)
        self.centre_norms = (centres.square().sum(1) / 2).masked_fill(sizes == 0, torch.inf)  # never near
        self.ends = sizes.cumsum(0)
        self.starts = self.ends - sizes
        wide = (sizes + CELL_MULTIPLE - 1) // CELL_MULTIPLE * CELL_MULTIPLE  # fewer shapes: see `similarities`
        ends = (self.starts + wide).clamp(max=len(entries))
        self.wide_starts = (ends - wide).clamp(min=0)
        self.wide = self.wide_starts.tolist(), ends.tolist()
        self.radii = centres.new_zeros(len(centres))
        for cell, members in enumerate(entries.split(sizes.tolist())):
            if len(members):
                self.radii[cell] = (members - centres[cell]).norm(dim=1).max()
        self.between = torch.cdist(centres, centres).clamp_(min=1e-9)

    def nearest(self, queries: Tensor, query_image_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Distances (N,) and indices (N,) of the entries nearest to queries (N, D), none of the queries' own images'.

        What it computes, slowly: `nearest(queries, entries, 1, image_ids=(query_image_ids, image_ids))`.
        """
        half_norms = queries.square().sum(1) / 2
        similar = similarities(queries, self.centres, self.centre_norms)  # (N, C)
        squares = torch.sub(half_norms[:, None], similar, out=similar).clamp_(min=0)  # ‖q − c‖² / 2
        at_home, home = squares.min(1)
        who = home.argsort()
        similar, places = self._visit(queries, who, home, query_image_ids)
        best = torch.empty_like(half_norms).scatter_(0, who, similar)
        place = torch.empty_like(home).scatter_(0, who, places)
        upper = (2 * (half_norms - best)).clamp_(min=0).sqrt_().mul_(1 + ROUNDING).add_(ROUNDING)
        halfway = (squares - at_home[:, None]).div_(self.between[home])
        needed = halfway < upper[:, None]
        needed &= (2 * squares).sqrt_().sub_(self.radii) < upper[:, None]
        needed.scatter_(1, home[:, None], False)
        if float(needed.mean(dtype=torch.float32)) > WORTHWHILE:
            return self._everywhere(queries, query_image_ids)
        cell, who = needed.T.nonzero().unbind(1)
        similar, places = self._visit(queries, who, cell, query_image_ids)
        best.scatter_reduce_(0, who, similar, "amax")
        nearer = similar == best[who]
        place.scatter_(0, who[nearer], places[nearer])
        distances = torch.empty_like(best)
        for rows, winners, out in zip(queries.split(ROWS), place.split(ROWS), distances.split(ROWS), strict=True):
            torch.linalg.vector_norm(rows - self.entries[winners], dim=1, out=out)
        return distances.masked_fill_(best.isinf(), torch.inf), place

    def several(self, queries: Tensor, count: int, query_image_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Distances (B, count), ascending, and indices of the entries nearest to a few queries (B, D), one by one.

        What it computes, slowly: `nearest(queries, entries, count, image_ids=(query_image_ids, image_ids))`.
        """
        distances = queries.new_full((len(queries), count), torch.inf)
        places = torch.zeros(distances.shape, dtype=torch.long)
        for number, query in enumerate(queries):
            lower, cells = ((self.centres - query).norm(dim=1) - self.radii).sort()
            for least, cell in zip(lower.tolist(), cells.tolist(), strict=True):
                if least > float(distances[number, -1]) * (1 + ROUNDING) + ROUNDING:
                    break
                members = torch.arange(int(self.starts[cell]), int(self.ends[cell]))
                to_members = (self.entries[int(self.starts[cell]) : int(self.ends[cell])] - query).norm(dim=1)
                if query_image_ids is not None:
                    to_members.masked_fill_(self.image_ids[members] == query_image_ids[number], torch.inf)
                best = torch.cat([distances[number], to_members]).topk(count, largest=False)
                distances[number], places[number] = best.values, torch.cat([places[number], members])[best.indices]
        return distances, places

    def _everywhere(self, queries: Tensor, query_image_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        image_ids = None if query_image_ids is None else (query_image_ids, self.image_ids)
        distances, places = nearest(queries, self.entries, half_norms=self.half_norms, image_ids=image_ids)
        return distances[:, 0], places[:, 0]

    def _visit(
        self, queries: Tensor, who: Tensor, cell: Tensor, query_image_ids: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """For queries `who` (P,), each in one cell, in ascending order of these: the best similarity, and its place."""
        best, places = torch.empty(len(who)), torch.empty(len(who), dtype=torch.long)
        wanted = F.pad(who, (0, padded(ROWS)))
        counts = torch.bincount(cell, minlength=len(self.centres))
        at = 0
        for number, first, last in zip(counts.tolist(), *self.wide, strict=True):
            entries, half_norms = self.entries[first:last], self.half_norms[first:last]
            for start in range(at, at + number, ROWS):
                end = min(start + ROWS, at + number)
                rows = queries.index_select(0, wanted[start : start + padded(end - start)])
                table = similarities(rows, entries, half_norms)[: end - start]
                if query_image_ids is not None:
                    own = query_image_ids[who[start:end]][:, None] == self.image_ids[first:last]
                    table.masked_fill_(own, -torch.inf)
                torch.max(table, 1, out=(best[start:end], places[start:end]))
            at += number
        return best, places + torch.repeat_interleave(self.wide_starts, counts)


def sort_into_cells(entries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sort bank entries (K, D) into about √K / 2 cells: their order (K,), the cells' centres (C, D) and sizes (C,).

    Each entry is in the cell whose centre is nearest. The centres are found by k-means on a sample.
    """
    count = max(1, round(len(entries) ** 0.5 / 2))
    chosen = torch.randperm(len(entries), generator=torch.Generator().manual_seed(0))[: CELL_SAMPLE * count]
    sample = entries[chosen.to(entries.device)]
    centres = sample[:count].clone()
    for _ in range(KMEANS_ROUNDS):
        owner = _owner(sample, centres, centres.square().sum(1) / 2)
        sizes = torch.bincount(owner, minlength=count)[:, None]
        means = torch.zeros_like(centres).index_add_(0, owner, sample) / sizes.clamp(min=1)
        centres = torch.where(sizes > 0, means, centres)
    half_norms = centres.square().sum(1) / 2
    owner = torch.cat([_owner(rows, centres, half_norms) for rows in entries.split(ROWS)])
    return owner.argsort(stable=True), centres, torch.bincount(owner, minlength=count)


def _owner(rows: Tensor, centres: Tensor, half_norms: Tensor) -> Tensor:
    return similarities(rows, centres, half_norms).argmax(1)


class QuantisedIndex:
    """Approximate search with faiss: product-quantised cells (IVF-PQ), made when needed and never saved."""

    def __init__(self, entries: Tensor, image_ids: Tensor, on_gpu: bool = False) -> None:
        """Of bank entries (K, D), and the images that each is from (K,).

        Raises `OptionError` for a bank that is too small to be quantised.
        """
        faiss: Any = require("faiss")
        count, dimension = entries.shape
        if count < ENTRIES_PER_LIST * 2**BITS:
            raise OptionError(
                f'`search="ivfpq"` needs a bank of at least {ENTRIES_PER_LIST * 2**BITS:,} entries to learn its codes '
                f'from, and this one has {count:,}: use `search="exact"`, which is faster here'
            )
        self.entries, self.image_ids = entries, image_ids
        parts = max(part for part in range(1, PARTS + 1) if dimension % part == 0)
        lists = min(LISTS, count // ENTRIES_PER_LIST)
        self.coarse = faiss.IndexFlatL2(dimension)
        self.index = faiss.IndexIVFPQ(self.coarse, dimension, lists, parts, BITS)
        vectors = np.ascontiguousarray(entries.numpy(force=True))
        self.index.train(vectors)
        self.index.add(vectors)
        self.index.nprobe = max(1, lists // LISTS_PER_PROBE)
        if on_gpu:
            if not hasattr(faiss, "StandardGpuResources"):
                raise OptionError("`faiss_on_gpu=True` needs faiss with GPU support, and the one installed has none")
            options = faiss.GpuClonerOptions()
            options.useFloat16 = True
            self.index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, self.index, options)

    def nearest(self, queries: Tensor, query_image_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Distances (N,) and indices (N,) of entries near to queries (N, D), none of the queries' own images'.

        The distances are exact; the entries may not be the nearest. Infinite where only the own image's were found.
        """
        fetched = self.index.search(np.ascontiguousarray(queries.numpy(force=True)), FETCHED)[1]
        places = torch.from_numpy(fetched).to(queries.device)  # (N, FETCHED), -1 where fewer were found
        left_out = places < 0
        places = places.clamp(min=0)
        if query_image_ids is not None:
            left_out |= self.image_ids[places] == query_image_ids[:, None]
        distances = torch.stack([(queries - self.entries[column]).square().sum(1) for column in places.T], 1)
        best, column = distances.masked_fill(left_out, torch.inf).min(1)
        return best.sqrt(), places.gather(1, column[:, None])[:, 0]
