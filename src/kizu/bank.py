"""A memory bank: good patches, what is nearest to a query, and how far good patches usually are from each entry."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kizu import coreset
from kizu.neighbours import nearest

__all__ = ["Bank", "Hits"]

PRIOR = 5  # patches: how firmly an entry's scale holds to that of all entries


class Hits(NamedTuple):
    """What a search in a bank found, for N patches of images."""

    distances: Tensor  # (N, n)
    entries: Tensor  # (N, n)
    queries: Tensor | None  # (N, D), where Eq. 7 needs them
    own: int | None  # the training image that they are of, whose own entries did not count

    def moved_to(self, place: tuple[Tensor, Tensor], position: int) -> "Hits":
        """The same in a place for many: small tensors among large ones would scatter over the memory."""
        distances, entries = place[0][position], place[1][position]
        distances[:], entries[:] = self.distances, self.entries
        return self._replace(distances=distances, entries=entries)


class Bank(nn.Module):
    """A memory of K good patches (K, D). N queries, B images of P patches."""

    entries: Tensor  # (K, D)
    half_norms: Tensor  # (K,) ‖entry‖² / 2
    images: Tensor  # (K,) the training image that each is from
    sums: Tensor  # (K,) of the distances of the training patches nearest to each entry, other images' only,
    counts: Tensor  # (K,) and how many these are

    def __init__(self, entries: Tensor, images: Tensor) -> None:
        super().__init__()
        self.register_buffer("entries", entries)
        self.register_buffer("half_norms", entries.square().sum(1) / 2)
        self.register_buffer("images", images)
        self.register_buffer("sums", torch.zeros_like(self.half_norms))
        self.register_buffer("counts", torch.zeros_like(self.half_norms))

    def search(self, queries: Tensor, count: int, own: int | None = None) -> tuple[Tensor, Tensor]:
        """Distances and entries (N, count) nearest to queries (N, D), none of them from the training image `own`."""
        excluded = None if own is None else self.images == own
        return nearest(queries, self.entries, count, half_norms=self.half_norms, excluded=excluded)

    def learn_scale(self, distances: Tensor, entries: Tensor) -> None:
        """Remember the distances (N,) of training patches to their nearest entries (N,) from other images."""
        known = distances.isfinite()
        self.sums.index_add_(0, entries[known], distances[known])
        self.counts.index_add_(0, entries[known], torch.ones_like(distances[known]))

    def exchange(self, rows: Tensor, images: Tensor) -> None:
        """Keep as many entries as before, those of the old ones and the rows (N, D) that cover both best."""
        both = torch.cat([self.entries, rows])
        kept = coreset.select(both, len(self.entries)).indices.to(both.device).sort().values
        nothing = torch.zeros_like(rows[:, 0])
        self.half_norms = both[kept].square().sum(1) / 2
        self.images = torch.cat([self.images, images])[kept]
        self.sums, self.counts = torch.cat([self.sums, nothing])[kept], torch.cat([self.counts, nothing])[kept]
        self.entries = both[kept]

    @classmethod
    def joined(cls, shards: "Sequence[Bank]", starts: Sequence[int]) -> "Bank":
        """The banks of several shards side by side, whose images are numbered from `starts`."""
        images = torch.cat([shard.images + start for shard, start in zip(shards, starts, strict=True)])
        bank = cls(torch.cat([shard.entries for shard in shards]), images)
        bank.sums = torch.cat([shard.sums for shard in shards])
        bank.counts = torch.cat([shard.counts for shard in shards])
        return bank

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
