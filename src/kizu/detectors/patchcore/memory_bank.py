"""A memory bank: good patches, what is nearest to a query, and how far good patches usually are from each entry."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kizu.detectors.patchcore import coreset
from kizu.detectors.patchcore.nearest import Cells, arrange, nearest
from kizu.detectors.patchcore.quantised import QuantisedCells
from kizu.features.tracing import is_traced

__all__ = ["Bank", "Hits"]

LARGE = 1000  # entries from which on a bank is sorted into cells
PRIOR = 5  # patches: how firmly an entry's scale holds to that of all entries


class Hits(NamedTuple):
    """What a search in a bank found, for N patches of images."""

    distances: Tensor  # (N, n)
    entries: Tensor  # (N, n)
    queries: Tensor | None  # (N, D), where Eq. 7 needs them
    own: Tensor | None  # (N,) the training images that they are of, whose own entries did not count

    def split(self, patches: int) -> "list[Hits]":
        """One for each image of so many patches."""
        parts = [[None] * (len(self.distances) // patches) if p is None else p.split(patches) for p in self]
        return [Hits(*image) for image in zip(*parts, strict=True)]

    def moved_to(self, place: tuple[Tensor, Tensor], position: int) -> "Hits":
        """The same without queries, in a place for many: small tensors among large ones scatter over the memory."""
        distances, entries = place[0][position], place[1][position]
        distances[:], entries[:] = self.distances, self.entries
        return self._replace(distances=distances, entries=entries, queries=None)


class Bank(nn.Module):
    """A memory of K good patches (K, D), sorted into C cells if there are many. N queries, B images of P patches."""

    entries: Tensor  # (K, D)
    half_norms: Tensor  # (K,) ‖entry‖² / 2
    images: Tensor  # (K,) the training image that each is from,
    places: Tensor  # (K,) and its place there: row · columns + column of the grid of patches
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
        self._index: tuple[Tensor, Cells | QuantisedCells] | None = None
        self.quantise: Callable[[Tensor, Tensor], QuantisedCells] | None = None  # for a search that is not exact

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
        if len(entries) < LARGE:
            return cls(entries, images, places, sums, counts, entries[:0], images[:0])
        order, centres, sizes = arrange(entries)
        return cls(entries[order], images[order], places[order], sums[order], counts[order], centres, sizes)

    def search(self, queries: Tensor, count: int, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Distances and entries (N, count) nearest to queries (N, D), none from the queries' own images (N,)."""
        sorted_here = len(self.centres) > 0 and queries.device.type == "cpu"
        if count == 1 and (sorted_here or self.quantise) and not is_traced():
            distances, entries = self.index().nearest(queries, own)
            return distances[:, None], entries[:, None]
        return nearest(queries, self.entries, count, half_norms=self.half_norms, images=_both(own, self.images))

    def around(self, entries: Tensor, count: int, own: Tensor | None = None) -> Tensor:
        """Indices (B, count) of what is nearest to entries of this bank (B, D): themselves first."""
        if len(self.centres) and entries.device.type == "cpu" and not self.quantise and not is_traced():
            index = self.index()
            assert isinstance(index, Cells)
            return index.several(entries, min(count, len(self.entries)), own)[1]
        return nearest(entries, self.entries, count, half_norms=self.half_norms, images=_both(own, self.images))[1]

    def index(self) -> Cells | QuantisedCells:
        """Search by cells in the present entries, made when first needed."""
        if self._index is None or self._index[0] is not self.entries:
            made = (
                self.quantise(self.entries, self.images)
                if self.quantise
                else Cells(self.entries, self.images, self.centres, self.sizes)
            )
            self._index = self.entries, made
        return self._index[1]

    def recall(self, queries: Tensor, own: Tensor) -> float:
        """Share of the queries (N, D) for which the search finds an entry that is as near as the nearest."""
        found = self.search(queries, 1, own)[0]
        exact, _ = nearest(queries, self.entries, half_norms=self.half_norms, images=(own, self.images))
        return float((found <= exact * (1 + 1e-5) + 1e-6).float().mean())

    def learn_scale(self, distances: Tensor, entries: Tensor) -> None:
        """Remember the distances (N,) of training patches to their nearest entries (N,) from other images."""
        known = distances.isfinite()
        self.sums.index_add_(0, entries[known], distances[known])
        self.counts.index_add_(0, entries[known], torch.ones_like(distances[known]))

    def exchanged(self, rows: Tensor, images: Tensor, places: Tensor) -> "Bank":
        """A bank of as many entries, those of this one and of the rows (N, D) that cover both best."""
        both = torch.cat([self.entries, rows])
        kept = coreset.select(both, len(self.entries)).indices.to(both.device).sort().values
        nothing = torch.zeros_like(rows[:, 0])
        sums, counts = torch.cat([self.sums, nothing]), torch.cat([self.counts, nothing])
        images, places = torch.cat([self.images, images]), torch.cat([self.places, places])
        return Bank.of(both[kept], images[kept], places[kept], sums[kept], counts[kept])

    @classmethod
    def joined(cls, shards: "Sequence[Bank]", starts: Sequence[int]) -> "Bank":
        """The entries of several shards' banks in one, their images numbered from `starts`."""
        images = torch.cat([shard.images + start for shard, start in zip(shards, starts, strict=True)])
        entries = torch.cat([shard.entries for shard in shards])
        places = torch.cat([shard.places for shard in shards])
        sums = torch.cat([shard.sums for shard in shards])
        return cls.of(entries, images, places, sums, torch.cat([shard.counts for shard in shards]))

    def usual(self, local: bool, without: Hits | None = None) -> Tensor:
        """How far good patches usually are from each entry (K,), or from all of them.

        `without` are the hits of a training image that is to be judged as if it had not been learned from.
        """
        sums, counts = self.sums, self.counts
        if without is not None:
            known = without.distances[:, 0].isfinite()
            distances, entries = without.distances[known, 0], without.entries[known, 0]
            sums = sums.index_add(0, entries, -distances)
            counts = counts.index_add(0, entries, -torch.ones_like(distances))
        overall = (sums.sum() / counts.sum().clamp(min=1)).clamp(min=1e-6)
        return (sums + PRIOR * overall) / (counts + PRIOR) if local else overall.expand_as(sums)


def _both(own: Tensor | None, images: Tensor) -> tuple[Tensor, Tensor] | None:
    return None if own is None else (own, images)
