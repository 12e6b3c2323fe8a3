"""Training images of a memory bank, each judged as if it had not been learned from.

A bank without an image's own entries has holes: of patches that are alike k-centre took only one, and where it took
this image's, a bank made without the image would hold another's. So each entry has a stand-in: of the other images'
patches that it is nearest to, the farthest, as k-centre takes what is farthest. An image is compared with the other
images' entries and the stand-ins of its own.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from kizu.detectors.patchcore.memory_bank import Bank, Hits
from kizu.detectors.patchcore.nearest import nearest

__all__ = ["LeaveOneOut", "Searching"]

TOGETHER = 4  # images searched for at a time


class Searching(Protocol):
    """A graph with memory banks, for grids of patches (h, w)."""

    grids: list[tuple[int, int]]
    banks: Sequence[Bank]

    def search(self, bank: Bank, queries: Tensor, own: Tensor | None = None) -> Hits: ...

    def as_if_new(self, hits: Sequence[Hits], among_others: Sequence[Hits]) -> tuple[Tensor, Tensor]: ...


class LeaveOneOut:
    """Judges training images of these numbers, whose patch features (B · P, D) for each bank `features` gives."""

    def __init__(
        self, graph: Searching, numbers: Sequence[int], features: Callable[[Sequence[int]], list[Tensor]]
    ) -> None:
        self.graph, self.numbers, self.features = graph, numbers, features
        self.standing_in = [_StandIns(bank) for bank in graph.banks]
        self.kept: list[tuple[Tensor, Tensor]] = []  # distances and entries (M, P, n) of all images, for each bank

    def judged(self, progress: Callable[[int, int], None]) -> tuple[Tensor, Tensor]:
        """Scores (M,) and patch scores (M, h, w); the banks learn their scales on the way."""
        total = 2 * len(self.numbers)
        among_others = []
        for start in range(0, len(self.numbers), TOGETHER):
            among_others += self._search(start)
            progress(len(among_others), total)
        entries = self.graph.banks[0].entries
        scores, grids = entries.new_empty(len(among_others)), entries.new_empty(len(among_others), *self.graph.grids[0])
        for start in range(0, len(self.numbers), TOGETHER):
            some = among_others[start : start + TOGETHER]
            for number, (hits, before) in enumerate(self._nearer(start, some), start):
                scores[number : number + 1], grids[number : number + 1] = self.graph.as_if_new(hits, before)
            progress(len(among_others) + start + len(some), total)
        return scores, grids

    def _search(self, start: int) -> list[list[Hits]]:
        """For some images, what is nearest in each bank among other images' entries."""
        found = []
        numbers = self.numbers[start : start + TOGETHER]
        for which, (bank, rows) in enumerate(zip(self.graph.banks, self.features(numbers), strict=True)):
            patches = len(rows) // len(numbers)
            own = torch.tensor(numbers, device=rows.device).repeat_interleave(patches)
            hits = self.graph.search(bank, rows, own)
            bank.learn_scale(hits.distances[:, 0], hits.entries[:, 0])
            self.standing_in[which].learn(rows, hits.distances[:, 0], hits.entries[:, 0])
            if len(self.kept) == which:  # small tensors among large ones would scatter over the memory
                shape = (len(self.numbers), patches, hits.distances.shape[1])
                self.kept.append((hits.distances.new_empty(shape), hits.entries.new_empty(shape)))
            images = enumerate(hits.split(patches), start)
            found.append([hit.moved_to(self.kept[which], position) for position, hit in images])
        return [list(image) for image in zip(*found, strict=True)]

    def _nearer(self, start: int, among_others: Sequence[Sequence[Hits]]) -> Iterator[tuple[list[Hits], list[Hits]]]:
        """For some images, what is nearest when stand-ins take the places of their own entries, and without these."""
        numbers = self.numbers[start : start + TOGETHER]
        layers = self.features(numbers)
        for position, (number, image) in enumerate(zip(numbers, among_others, strict=True)):
            parts = [rows.view(len(numbers), -1, rows.shape[1])[position] for rows in layers]
            before = [hits._replace(queries=rows) for rows, hits in zip(parts, image, strict=True)]
            both = zip(self.standing_in, before, strict=True)
            yield [stand_ins.replaced(number, hits) for stand_ins, hits in both], before


class _StandIns:
    """For each entry of a bank, a patch of another image: the farthest of those to which the entry is the nearest."""

    def __init__(self, bank: Bank) -> None:
        self.bank = bank
        self.rows = torch.empty_like(bank.entries)  # (K, D)
        self.distances = torch.full_like(bank.half_norms, -torch.inf)  # (K,)

    def learn(self, rows: Tensor, distances: Tensor, entries: Tensor) -> None:
        """From patches (N, D) and their nearest entries (N,) of other images."""
        distances = distances.masked_fill(distances.isinf(), -torch.inf)
        self.distances.scatter_reduce_(0, entries, distances, "amax")
        farthest_yet = (distances == self.distances[entries]) & distances.isfinite()
        self.rows[entries[farthest_yet]] = rows[farthest_yet]

    def replaced(self, number: int, hits: Hits) -> Hits:
        """An image's hits, where they are not nearer to its patches than the stand-ins of its own entries."""
        assert hits.queries is not None
        own = ((self.bank.images == number) & self.distances.isfinite()).nonzero()[:, 0]
        if not len(own):
            return hits
        count = hits.distances.shape[1]
        distances, which = nearest(hits.queries, self.rows[own], count)
        best = torch.cat([hits.distances, distances], 1).topk(count, dim=1, largest=False)
        entries = torch.cat([hits.entries, own[which]], 1).gather(1, best.indices)
        return hits._replace(distances=best.values, entries=entries)
