"""A memory bank: good patches, what is nearest to a query, and the distance typical of good patches at each entry."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kizu.detectors.patchcore import coreset
from kizu.detectors.patchcore.nearest import CellIndex, QuantisedIndex, nearest, sort_into_cells
from kizu.features.matmul import is_traced

__all__ = ["Bank", "Neighbours"]

MIN_ENTRIES_FOR_CELLS = 1000  # smaller banks are not sorted into cells
MIN_SCALE = 1e-3  # of the entries' length: images that are all alike say nothing of how good parts differ
PRIOR = 5  # patches: how firmly an entry's scale holds to that of all entries


class Neighbours(NamedTuple):
    """The entries of a bank nearest to N patches of images."""

    distances: Tensor  # (N, n)
    entries: Tensor  # (N, n)
    queries: Tensor | None  # (N, D), where Eq. 7 needs them
    query_image_ids: Tensor | None  # (N,) the training images that they are of, whose own entries did not count

    def split(self, patches: int) -> "list[Neighbours]":
        """One for each image of so many patches."""
        parts = [[None] * (len(self.distances) // patches) if p is None else p.split(patches) for p in self]
        return [Neighbours(*image) for image in zip(*parts, strict=True)]

    def moved_to(self, place: tuple[Tensor, Tensor], position: int) -> "Neighbours":
        """The same without queries, in a place for many: small tensors among large ones scatter over the memory."""
        distances, entries = place[0][position], place[1][position]
        distances[:], entries[:] = self.distances, self.entries
        return self._replace(distances=distances, entries=entries, queries=None)


class Bank(nn.Module):
    """A memory of K good patches (K, D), sorted into C cells if there are many. N queries, B images of P patches."""

    entries: Tensor  # (K, D)
    half_norms: Tensor  # (K,) ‖entry‖² / 2
    images: Tensor  # (K,) the training image that each is from,
    places: Tensor  # (K,) and its place there: row · columns + column of the grid of patches, or past it, in a copy
    sums: Tensor  # (K,) of the distances of the training patches nearest to each entry, other images' only,
    counts: Tensor  # (K,) and how many these are
    centres: Tensor  # (C, D)
    sizes: Tensor  # (C,) entries in each cell, which follow one another

    def __init__(
        self,
        entries: Tensor,
        images: Tensor,
        places: Tensor,
        sums: Tensor,
        counts: Tensor,
        centres: Tensor,
        sizes: Tensor,
    ) -> None:
        super().__init__()
        self.register_buffer("entries", entries)
        self.register_buffer("half_norms", entries.norm(dim=1).square_().div_(2))
        self.register_buffer("images", images)
        self.register_buffer("places", places)
        self.register_buffer("sums", sums)
        self.register_buffer("counts", counts)
        self.register_buffer("centres", centres)
        self.register_buffer("sizes", sizes)
        self._index: tuple[Tensor, CellIndex | QuantisedIndex] | None = None
        self._typical: tuple[Neighbours, bool, Tensor] | None = None  # without what was excluded last
        self.quantise: Callable[[Tensor, Tensor], QuantisedIndex] | None = None  # for a search that is not exact

    @classmethod
    def of(
        cls,
        entries: Tensor,
        images: Tensor,
        places: Tensor,
        sums: Tensor | None = None,
        counts: Tensor | None = None,
    ) -> "Bank":
        """A new bank of entries in any order, with what is known of the distances to each."""
        sums = torch.zeros_like(entries[:, 0]) if sums is None else sums
        counts = torch.zeros_like(entries[:, 0]) if counts is None else counts
        if len(entries) < MIN_ENTRIES_FOR_CELLS:
            return cls(entries, images, places, sums, counts, entries[:0], images[:0])
        order, centres, sizes = sort_into_cells(entries)
        return cls(entries[order], images[order], places[order], sums[order], counts[order], centres, sizes)

    def search(self, queries: Tensor, count: int, query_image_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Distances and entries (N, count) nearest to queries (N, D), none from the queries' own images (N,).

        What it computes, slowly: `nearest(queries, entries, count, image_ids=(query_image_ids, images))`.
        """
        in_cells = len(self.centres) > 0 and queries.device.type == "cpu"
        if count == 1 and (in_cells or self.quantise) and not is_traced():
            distances, entries = self.index().nearest(queries, query_image_ids)
            return distances[:, None], entries[:, None]
        return self._compare_all(queries, count, query_image_ids)

    def around(self, entries: Tensor, count: int, query_image_ids: Tensor | None = None) -> Tensor:
        """Indices (B, count) of what is nearest to entries of this bank (B, D): themselves first."""
        if len(self.centres) and entries.device.type == "cpu" and not self.quantise and not is_traced():
            index = self.index()
            assert isinstance(index, CellIndex)
            return index.several(entries, min(count, len(self.entries)), query_image_ids)[1]
        return self._compare_all(entries, count, query_image_ids)[1]

    def _compare_all(self, queries: Tensor, count: int, query_image_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        image_ids = None if query_image_ids is None else (query_image_ids, self.images)
        return nearest(queries, self.entries, count, half_norms=self.half_norms, image_ids=image_ids)

    @contextmanager
    def of_groups(self, groups: Tensor | None) -> Iterator[None]:
        """For a while, take the number of its group for the training image (N,) that each entry is from."""
        images, self._typical = self.images, None
        if groups is not None:
            self.images, self._index = groups[images], None
        try:
            yield
        finally:
            self._typical = None
            if groups is not None:
                self.images, self._index = images, None

    def index(self) -> CellIndex | QuantisedIndex:
        """The index of the present entries, made when first needed."""
        if self._index is None or self._index[0] is not self.entries:
            index = (
                self.quantise(self.entries, self.images)
                if self.quantise
                else CellIndex(self.entries, self.images, self.centres, self.sizes)
            )
            self._index = self.entries, index
        return self._index[1]

    def recall(self, queries: Tensor, query_image_ids: Tensor) -> float:
        """Share of the queries (N, D) for which the search finds an entry that is as near as the nearest."""
        distances, _ = self.search(queries, 1, query_image_ids)
        exact, _ = self._compare_all(queries, 1, query_image_ids)
        return float((distances <= exact * (1 + 1e-5) + 1e-6).float().mean())

    def learn_scale(self, distances: Tensor, entries: Tensor) -> None:
        """Remember the distances (N,) of training patches to their nearest entries (N,) from other images."""
        known = distances.isfinite()
        self.sums.index_add_(0, entries[known], distances[known])
        self.counts.index_add_(0, entries[known], torch.ones_like(distances[known]))

    def exchanged(self, rows: Tensor, image_ids: Tensor, places: Tensor) -> "Bank":
        """A bank of as many entries: of this one's and the rows (N, D), those that cover all of them best."""
        candidates = torch.cat([self.entries, rows])
        kept = coreset.select(candidates, len(self.entries)).indices.to(candidates.device).sort().values
        zeros = torch.zeros_like(rows[:, 0])
        sums, counts = torch.cat([self.sums, zeros]), torch.cat([self.counts, zeros])
        image_ids, places = torch.cat([self.images, image_ids]), torch.cat([self.places, places])
        return Bank.of(candidates[kept], image_ids[kept], places[kept], sums[kept], counts[kept])

    @classmethod
    def joined(cls, shards: "Sequence[Bank]", starts: Sequence[int]) -> "Bank":
        """The entries of several shards' banks in one, their images numbered from `starts`."""
        image_ids = torch.cat([shard.images + start for shard, start in zip(shards, starts, strict=True)])
        entries = torch.cat([shard.entries for shard in shards])
        places = torch.cat([shard.places for shard in shards])
        sums = torch.cat([shard.sums for shard in shards])
        return cls.of(entries, image_ids, places, sums, torch.cat([shard.counts for shard in shards]))

    def typical_distance(self, *, per_entry: bool, exclude: Neighbours | None = None) -> Tensor:
        """How far good patches typically are from each entry (K,), or, K times the same, from all entries.

        The mean distance of the training patches nearest to an entry, held to that of all entries as if by `PRIOR`
        patches more. `exclude` are the neighbours of a training image that is to be scored as if it had not been
        learned from.
        """
        if self._typical is not None and self._typical[0] is exclude and self._typical[1] is per_entry:
            return self._typical[2]
        sums, counts = self.sums, self.counts
        if exclude is not None:
            known = exclude.distances[:, 0].isfinite()
            distances, entries = exclude.distances[known, 0], exclude.entries[known, 0]
            sums = sums.index_add(0, entries, -distances)
            counts = counts.index_add(0, entries, -torch.ones_like(distances))
        size = (2 * self.half_norms.mean()).sqrt()  # of an entry: the scale where no other image gives one
        known_any = self.counts.sum() > 0
        unknown = torch.where(known_any, self.sums.sum() / self.counts.sum().clamp(min=1), size)
        overall = torch.where(counts.sum() > 0, sums.sum() / counts.sum().clamp(min=1), unknown)
        overall = overall.clamp(min=MIN_SCALE * size)
        typical = (sums + PRIOR * overall) / (counts + PRIOR) if per_entry else overall.expand_as(sums)
        if exclude is not None:  # many tiles of a photograph are scored without the same
            self._typical = exclude, per_entry, typical
        return typical
