"""Scores of training images as if each had not been learned from (leave one out), nor those that belong to it.

A bank without an image's own entries has holes: of patches that are alike k-centre took only one, and where it took
this image's, a bank made without the image would hold another's. K-centre takes what is farthest from all entries, as
long as that is farther than the radius within which the bank covers all patches. So an entry has a stand-in where,
without its image's entries, another image's patch would be farther from all than the radius, nearly: of the patches
that the entry covers, the one that would be farthest out. An image is compared with the other images' entries and the
stand-ins of its own.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kizu.detectors.patchcore.graph import PatchCoreGraph
from kizu.detectors.patchcore.memory_bank import Bank, Neighbours
from kizu.detectors.patchcore.nearest import nearest

__all__ = ["LeaveOneOut", "Searched"]

BATCH = 4  # images searched for at a time
NEARLY = 0.98  # of the radius: without an image there are entries to spare, which would cover all a little better


@dataclass(frozen=True)
class Searched:
    """What some of the training images say of a bank, and what was found for them in it."""

    sums: Tensor  # (K,) of the distances to each entry, from these images' patches nearest to it,
    counts: Tensor  # (K,) and how many these are
    radius: float  # within which the bank covers their patches
    entries: Tensor  # (k,) that may have a stand-in among these patches,
    rows: Tensor  # (k, D) the stand-ins,
    outside: Tensor  # (k,) and how far these are from what would be left of the bank
    distances: Tensor  # (M, P, n) of each image's patches to the nearest of the other images' entries,
    neighbours: Tensor  # (M, P, n) and these

    @classmethod
    def joined(cls, parts: "Sequence[Searched]") -> "Searched":
        """The same of all parts together, in their order, whatever order they were searched in."""
        sums, counts = (torch.stack([getattr(part, name) for part in parts]).sum(0) for name in ("sums", "counts"))
        outside = torch.full_like(sums, -torch.inf)
        rows = parts[0].rows.new_zeros(len(sums), parts[0].rows.shape[1])
        for part in parts:
            farther = part.outside > outside[part.entries]
            outside[part.entries[farther]] = part.outside[farther]
            rows[part.entries[farther]] = part.rows[farther]
        radius = max(part.radius for part in parts)
        entries = (outside > NEARLY * radius).nonzero()[:, 0]
        distances, neighbours = (torch.cat([getattr(p, name) for p in parts]) for name in ("distances", "neighbours"))
        return cls(sums, counts, radius, entries, rows[entries], outside[entries], distances, neighbours)

    def to(self, device: torch.device) -> "Searched":
        """The same on a device."""
        moved: dict[str, Any] = {name: value.to(device) for name, value in vars(self).items() if name != "radius"}
        return replace(self, **moved)

    def of_images(self, first: int, last: int) -> "Searched":
        """The same with the neighbours of the images first … last - 1 alone."""
        return replace(self, distances=self.distances[first:last], neighbours=self.neighbours[first:last])


class LeaveOneOut:
    """Scores training images of these ids, whose patch features (B · P, D) for each bank `features` gives.

    `groups` has a number for each training image, equal for those that are left out together; without it each is alone.
    Where banks were not chosen from all patches, `radii` say within which radius each covers those that it was chosen
    from, and `find_stand_ins` takes these.
    """

    def __init__(
        self,
        graph: PatchCoreGraph,
        image_ids: Sequence[int],
        features: Callable[[Sequence[int]], list[Tensor]],
        groups: Sequence[int] | None = None,
        radii: Sequence[float] | None = None,
    ) -> None:
        self.graph, self.image_ids, self.features = graph, image_ids, features
        self.groups = None if groups is None else torch.tensor(groups, device=graph.banks[0].entries.device)
        self.group_of = None if groups is None else list(groups)
        self.members: dict[int, list[int]] = {}  # of each group, the positions of its images
        for position, image_id in enumerate(image_ids):
            self.members.setdefault(self._group(image_id), []).append(position)
        self._last: tuple[int, list[Neighbours]] | None = None  # a group, and the neighbours of all its images
        self.from_all = radii is None
        self.stand_ins = [
            _StandIns(bank, None if radii is None else radii[number]) for number, bank in enumerate(graph.banks)
        ]
        self.kept: list[tuple[Tensor, Tensor]] = []  # distances and entries (M, P, n) of all images, for each bank
        self.loo_neighbours: list[list[Neighbours]] = []  # of each image, in each bank, among other images' entries

    def scores(self, progress: Callable[[int, int], None]) -> tuple[Tensor, Tensor]:
        """Scores (M,) and patch scores (M, h, w); the banks learn their typical distances on the way."""
        total = 2 * len(self.image_ids)
        self.search(lambda done: progress(done, total))
        with self._grouped():
            return self._scores(lambda done: progress(len(self.loo_neighbours) + done, total))

    def scores_again(self) -> tuple[Tensor, Tensor]:
        """The same once more, for a graph that makes other scores of the same distances now."""
        with self._grouped():
            return self._scores(lambda done: None)

    def search(self, progress: Callable[[int], None]) -> None:
        """Find the images' neighbours; the banks learn their typical distances."""
        with self._grouped():
            for start in range(0, len(self.image_ids), BATCH):
                self.loo_neighbours += self._among_others(start)
                progress(len(self.loo_neighbours))

    def find_stand_ins(self, candidates: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Look for stand-ins among patches (N, D) of images (N,) that each bank was chosen from: all, or some."""
        with self._grouped():
            for bank, stand_ins, (rows, images) in zip(self.graph.banks, self.stand_ins, candidates, strict=True):
                groups = images if self.groups is None else self.groups[images]
                distances, entries = bank.search(rows, 1, groups)
                stand_ins.learn(rows, distances[:, 0], entries[:, 0], groups)

    def searched(self) -> list[Searched]:
        """What the search found in each bank, whose typical distances were unknown before it."""
        found = zip(self.graph.banks, self.stand_ins, self.kept, strict=True)
        return [
            Searched(bank.sums.clone(), bank.counts.clone(), *stand_ins.known(), *kept)
            for bank, stand_ins, kept in found
        ]

    def adopt(self, searched: Sequence[Searched]) -> None:
        """Go on from a search of all images, of which these are some; the banks take the distances typical of all."""
        for bank, stand_ins, found in zip(self.graph.banks, self.stand_ins, searched, strict=True):
            bank.sums.copy_(found.sums)
            bank.counts.copy_(found.counts)
            stand_ins.adopt(found)
        self.kept = [(found.distances, found.neighbours) for found in searched]
        self.loo_neighbours = [
            [self._kept(number, position) for number in range(len(self.kept))]
            for position in range(len(self.image_ids))
        ]

    def _kept(self, number: int, position: int) -> Neighbours:
        distances, entries = (values[position] for values in self.kept[number])
        query_image_ids = torch.full_like(entries[:, 0], self._group(self.image_ids[position]))
        return Neighbours(distances, entries, None, query_image_ids)

    @contextmanager
    def _grouped(self) -> Iterator[None]:
        with ExitStack() as banks:
            for bank in self.graph.banks:
                banks.enter_context(bank.of_groups(self.groups))
            yield

    def _group(self, image_id: int) -> int:
        return image_id if self.group_of is None else self.group_of[image_id]

    def _scores(self, progress: Callable[[int], None]) -> tuple[Tensor, Tensor]:
        like = self.graph.banks[0].entries
        self._last = None
        scores = like.new_empty(len(self.loo_neighbours))
        grids = like.new_empty(len(self.loo_neighbours), *self.graph.grids[0])
        for start in range(0, len(self.image_ids), BATCH):
            batch = self.loo_neighbours[start : start + BATCH]
            for number, (neighbours, others) in enumerate(self._with_stand_ins(start, batch), start):
                score, grid = self.graph.loo_scores(neighbours, others, self._of_group(number, others))
                scores[number : number + 1], grids[number : number + 1] = score, grid
            progress(start + len(batch))
        return scores, grids

    def _among_others(self, start: int) -> list[list[Neighbours]]:
        """For each image of a batch, its neighbours in each bank among other images' entries."""
        by_bank = []
        image_ids = self.image_ids[start : start + BATCH]
        for number, (bank, rows) in enumerate(zip(self.graph.banks, self.features(image_ids), strict=True)):
            patches = len(rows) // len(image_ids)
            query_groups = [self._group(image_id) for image_id in image_ids]
            query_image_ids = torch.tensor(query_groups, device=rows.device).repeat_interleave(patches)
            neighbours = self.graph.neighbours(bank, rows, query_image_ids)
            bank.learn_scale(neighbours.distances[:, 0], neighbours.entries[:, 0])
            if self.from_all:
                stand_ins = self.stand_ins[number]
                stand_ins.learn(rows, neighbours.distances[:, 0], neighbours.entries[:, 0], query_image_ids)
            if len(self.kept) == number:  # small tensors among large ones would scatter over the memory
                shape = (len(self.image_ids), patches, neighbours.distances.shape[1])
                self.kept.append((neighbours.distances.new_empty(shape), neighbours.entries.new_empty(shape)))
            images = enumerate(neighbours.split(patches), start)
            by_bank.append([image.moved_to(self.kept[number], position) for position, image in images])
        return [list(image) for image in zip(*by_bank, strict=True)]

    def _with_stand_ins(
        self, start: int, loo_neighbours: Sequence[Sequence[Neighbours]]
    ) -> Iterator[tuple[list[Neighbours], list[Neighbours]]]:
        """For each image of a batch, its neighbours among other images' entries and stand-ins, and without these."""
        image_ids = self.image_ids[start : start + BATCH]
        layers = self.features(image_ids)
        for position, (image_id, image) in enumerate(zip(image_ids, loo_neighbours, strict=True)):
            parts = [rows.view(len(image_ids), -1, rows.shape[1])[position] for rows in layers]
            others = [near._replace(queries=rows) for rows, near in zip(parts, image, strict=True)]
            pairs = zip(self.stand_ins, others, strict=True)
            yield [stand_ins.improve(self._group(image_id), near) for stand_ins, near in pairs], others

    def _of_group(self, position: int, others: list[Neighbours]) -> list[Neighbours]:
        """In each bank the neighbours of all images of one's group, `others` being its own."""
        if self.groups is None:
            return others
        group = self._group(self.image_ids[position])
        if self._last is None or self._last[0] != group:
            members = self.members[group]
            of_group = [
                near._replace(distances=distances[members].flatten(0, 1), entries=entries[members].flatten(0, 1))
                for near, (distances, entries) in zip(others, self.kept, strict=True)
            ]
            self._last = group, of_group
        return self._last[1]


class _StandIns:
    """For each entry of a bank, the patch of another image that would be farthest out without its image's entries."""

    def __init__(self, bank: Bank, radius: float | None) -> None:
        self.bank = bank
        self.rows = torch.empty_like(bank.entries)  # (K, D)
        self.distances = torch.full_like(bank.half_norms, -torch.inf)  # (K,) to what would be left of the bank
        self.radius = 0.0 if radius is None else radius  # within which the bank covers what it was chosen from
        self.learns_radius = radius is None  # as which it takes that of all patches so far

    def learn(self, rows: Tensor, distances: Tensor, entries: Tensor, image_ids: Tensor) -> None:
        """Consider patches (N, D) of images (N,), of which these entries (N,) are the nearest of other images."""
        to_own = self._to_own(rows, image_ids)
        if self.learns_radius:
            covered = torch.minimum(distances, to_own)
            known = covered[covered.isfinite()]
            self.radius = max(self.radius, float(known.max()) if len(known) else 0.0)
        outside = ((distances < to_own) & (to_own > NEARLY * self.radius)).nonzero()[:, 0]
        if not len(outside):
            return
        rows, entries = rows[outside], entries[outside]
        left = self.bank.search(rows, 1, self.bank.images[entries])[0][:, 0]
        left = left.masked_fill(left.isinf(), -torch.inf)
        self.distances.scatter_reduce_(0, entries, left, "amax")
        farthest_yet = (left == self.distances[entries]) & left.isfinite()
        self.rows[entries[farthest_yet]] = rows[farthest_yet]

    def known(self) -> tuple[float, Tensor, Tensor, Tensor]:
        """The radius, the entries that may have a stand-in, these, and how far out they are."""
        entries = (self.distances > NEARLY * self.radius).nonzero()[:, 0]
        return self.radius, entries, self.rows[entries], self.distances[entries]

    def adopt(self, searched: Searched) -> None:
        """Take the stand-ins that were found by all."""
        self.radius = searched.radius
        self.rows[searched.entries], self.distances[searched.entries] = searched.rows, searched.outside

    def _to_own(self, rows: Tensor, image_ids: Tensor) -> Tensor:
        """How far patches (N, D) are from the nearest entry of their own image (N,)."""
        distances = torch.full_like(rows[:, 0], torch.inf)
        for image_id in image_ids.unique().tolist():
            queries, own = (image_ids == image_id).nonzero()[:, 0], (self.bank.images == image_id).nonzero()[:, 0]
            if len(own):
                distances[queries] = nearest(rows[queries], self.bank.entries[own], 1)[0][:, 0]
        return distances

    def improve(self, image_id: int, neighbours: Neighbours) -> Neighbours:
        """An image's neighbours, with the stand-ins of its own entries where these are nearer."""
        assert neighbours.queries is not None
        own = ((self.bank.images == image_id) & (self.distances > NEARLY * self.radius)).nonzero()[:, 0]
        if not len(own):
            return neighbours
        count = neighbours.distances.shape[1]
        distances, indices = nearest(neighbours.queries, self.rows[own], count)
        best = torch.cat([neighbours.distances, distances], 1).topk(count, dim=1, largest=False)
        entries = torch.cat([neighbours.entries, own[indices]], 1).gather(1, best.indices)
        return neighbours._replace(distances=best.values, entries=entries)
