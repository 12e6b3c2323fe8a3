"""From pixels to scores and maps, as the paper orders it: embedding, nearest neighbours, image score, anomaly map."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kizu.config import PatchCoreConfig
from kizu.config.patchcore import Look
from kizu.detectors.patchcore.memory_bank import Bank, Neighbours
from kizu.detectors.patchcore.nearest import QuantisedIndex
from kizu.features import backbone
from kizu.features.anomaly_map import MapUpsampling
from kizu.features.backbone import Backbone
from kizu.features.patch_features import PatchFeatures
from kizu.features.places import Places
from kizu.features.several_sizes import SeveralSizes
from kizu.inference.evidence import BankOutputs

__all__ = ["EnsembleGraph", "PatchCoreGraph", "pretrained", "seen_by"]


class PatchCoreGraph(nn.Module):
    """uint8 images (B, 3, H, W) → scores (B,), anomaly maps (B, 1, H, W)."""

    banks: Sequence[Bank]  # one for each tap; an nn.ModuleList, so that they are saved with the graph
    places: Sequence[Places]  # for each bank, those of its grid that lie in zones

    def __init__(self, config: PatchCoreConfig, network: Backbone | SeveralSizes) -> None:
        super().__init__()
        self.config = config
        self.backbone = network
        self.taps = _taps(config, len(network.layers))
        self.banks = cast("Sequence[Bank]", nn.ModuleList())

    def set_grids(
        self, grids: Sequence[tuple[int, int]], device: torch.device, inspect: Callable[[MapUpsampling], None]
    ) -> None:
        """Set the grid of patches (h, w) of each bank; the map is made from the first, which `inspect` sets zones for.

        Only patches of places that lie in zones are kept and compared.
        """
        self.grids = list(grids)
        self.register_buffer("grid_sizes", torch.tensor(grids))  # so that a saved model knows them
        self.upsample = MapUpsampling(grids[0], self.config.size, self.config.smoothing).to(device)
        inspect(self.upsample)
        places = (Places(grid, self.upsample.outlined) for grid in grids)
        self.places = cast("Sequence[Places]", nn.ModuleList(places))

    def set_banks(self, banks: Sequence[Bank]) -> None:
        """Set the memory banks, whose grids are known."""
        self.banks = cast("Sequence[Bank]", nn.ModuleList(banks))
        if self.config.search == "ivfpq":
            for bank in banks:
                bank.quantise = partial(QuantisedIndex, on_gpu=self.config.faiss_on_gpu)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self._with_maps(self.score_images(images))

    def forward_with_extras(self, images: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """As `forward`, and for each bank the entry nearest to each patch (B, h, w), and its distance in typical ones.

        `kizu.inference.evidence` makes the nearest good patch of them.
        """
        embeddings = self.embed(images)
        neighbours = self.search(embeddings)
        scores, maps = self._with_maps(self.score_from_neighbours(neighbours, images.shape[0]))
        extras = {}
        for number, (bank, nearest, layer) in enumerate(zip(self.banks, neighbours, embeddings, strict=True)):
            names, places = BankOutputs.of(number), self.places[number]
            entries = nearest.entries[:, 0]
            typical = bank.typical_distance(per_entry=self.config.local_scale)[entries]
            extras[names.entries] = places.laid_out(entries, layer.shape[0])
            extras[names.distances] = places.laid_out(nearest.distances[:, 0] / typical, layer.shape[0])
        return scores, maps, extras

    def forward_with_global_features(self, images: Tensor, kind: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """As `forward`, and the global features of `Backbone.forward_with_global_features` from the same pass."""
        maps, global_features = self.backbone.forward_with_global_features(images, kind)
        return *self._with_maps(self.score_embeddings(self.embed_maps(maps))), global_features

    def global_features(self, images: Tensor, kind: str) -> dict[str, Tensor]:
        """Global features alone, as `forward_with_global_features` gives them."""
        return self.backbone.forward_with_global_features(images, kind)[1]

    # Embedding: section 3.1

    def embed(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) → patch features (B, D, h, w) for each bank."""
        return self.embed_maps(self.backbone(images))

    def embed_maps(self, maps: list[Tensor]) -> list[Tensor]:
        """The backbone's feature maps → patch features for each bank."""
        return [patches(maps[layers]) for layers, patches in self.taps]

    def pooled_layers(self, images: Tensor) -> list[list[Tensor]]:
        """(B, 3, H, W) → for each bank what its patch features are stacked from, layer by layer (B, C, h', w')."""
        maps = self.backbone(images)
        return [patches.pooled(maps[layers]) for layers, patches in self.taps]

    # Nearest neighbours and scores: section 3.3

    def search(self, embeddings: Sequence[Tensor]) -> list[Neighbours]:
        """For each bank, the entries nearest to patch features (B, D, h, w)."""
        return [self.neighbours(bank, rows) for bank, rows in zip(self.banks, self.rows(embeddings), strict=True)]

    def rows(self, embeddings: Sequence[Tensor]) -> list[Tensor]:
        """For each bank, the patch features (B · P, D) of the places that lie in zones."""
        return [places.pick(layer) for places, layer in zip(self.places, embeddings, strict=True)]

    def neighbours(self, bank: Bank, queries: Tensor, query_image_ids: Tensor | None = None) -> Neighbours:
        """The entries of a bank nearest to queries (N, D), leaving out those of the queries' own images (N,)."""
        distances, entries = bank.search(queries, self.config.neighbours, query_image_ids)
        return Neighbours(distances, entries, queries if self.config.reweight > 1 else None, query_image_ids)

    def score_images(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) → scores (B,) and patch scores (B, h, w)."""
        return self.score_embeddings(self.embed(images))

    def score_embeddings(self, embeddings: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Patch features for each bank → scores (B,) and patch scores (B, h, w)."""
        return self.score_from_neighbours(self.search(embeddings), embeddings[0].shape[0])

    def loo_scores(
        self,
        neighbours: Sequence[Neighbours],
        loo_neighbours: Sequence[Neighbours],
        exclude: Sequence[Neighbours],
    ) -> tuple[Tensor, Tensor]:
        """The score and patch scores of one training image as if it had not been learned from.

        `loo_neighbours` are its neighbours among other images' entries, which Eq. 7 looks around. What the neighbours
        to `exclude` added to the typical distances, its own and those of the images that it belongs to, is taken out.
        """
        return self.score_from_neighbours(neighbours, 1, exclude=exclude, loo_neighbours=loo_neighbours)

    def score_from_neighbours(
        self,
        neighbours: Sequence[Neighbours],
        images: int,
        exclude: Sequence[Neighbours] | None = None,
        loo_neighbours: Sequence[Neighbours] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Scores and patch scores of so many images from their neighbours in each bank.

        The score is the mean of the most anomalous patches (`top`): of one patch, it is s* of Eq. 6.
        """
        grids = []
        for number, (bank, nearest, places) in enumerate(zip(self.banks, neighbours, self.places, strict=True)):
            patch_scores = self.patch_scores(bank, nearest, None if exclude is None else exclude[number])
            grids.append(places.laid_out(patch_scores, images)[:, None])
        grid = grids[0]
        if len(grids) > 1:
            align = partial(F.interpolate, size=self.grids[0], mode="bilinear", align_corners=False)
            grid = torch.stack([grid, *map(align, grids[1:])]).mean(0)
        grid = self.upsample.zoned(grid)
        scores = self.upsample.scores(grid, self.config.top)
        if self.config.reweight > 1:
            worst = self.places[0].rows_of(grid.flatten(1).argmax(1))
            scores = scores * self.score_weights((neighbours if loo_neighbours is None else loo_neighbours)[0], worst)
        return scores, grid[:, 0]

    def patch_scores(self, bank: Bank, neighbours: Neighbours, exclude: Neighbours | None) -> Tensor:
        """(N,): distances as they are, or in units of the distance typical of the entries, or of the whole bank."""
        distances = neighbours.distances
        if self.config.fusion == "stack" and not self.config.local_scale:
            return (distances.square() if self.config.squared else distances).mean(1)
        typical = bank.typical_distance(per_entry=self.config.local_scale, exclude=exclude)
        return (distances / typical[neighbours.entries]).mean(1)

    def score_weights(self, neighbours: Neighbours, worst: Tensor) -> Tensor:
        """Eq. 7, 1 − exp‖m_t − m*‖ / Σ exp‖m_t − m‖ over the bank's m nearest to m*, itself among them.

        `worst` (B,) says which queries are the images' most anomalous patches m_t.
        """
        bank = self.banks[0]
        assert neighbours.queries is not None
        nearest_entries = bank.entries[neighbours.entries[worst, 0]]  # m* (B, D)
        image_ids = None if neighbours.query_image_ids is None else neighbours.query_image_ids[worst]
        around = bank.around(nearest_entries, self.config.reweight, image_ids)  # (B, b), m* first
        distances = (neighbours.queries[worst][:, None] - bank.entries[around]).norm(dim=2)
        return 1 - torch.softmax(distances, dim=1)[:, 0]

    # Map: section 3.3, last paragraph

    def _with_maps(self, scored: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Scores and patch scores (B, h, w) → scores and anomaly maps (B, 1, H, W)."""
        scores, grid = scored
        return scores, self.upsample(grid)


class EnsembleGraph(nn.Module):
    """The mean of several graphs, each scaled by its scores and maps of good images."""

    members: Sequence[PatchCoreGraph]  # an nn.ModuleList
    score_stats: Tensor  # (members, 2): mean and deviation
    map_stats: Tensor

    def __init__(self, members: Sequence[PatchCoreGraph]) -> None:
        super().__init__()
        self.members = cast("Sequence[PatchCoreGraph]", nn.ModuleList(members))
        self.register_buffer("score_stats", torch.ones(len(members), 2))
        self.register_buffer("map_stats", torch.ones(len(members), 2))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.combine([member(images) for member in self.members])

    def forward_with_extras(self, images: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """As `forward`, and the first member's extras."""
        first, *others = self.members
        scores, maps, extras = first.forward_with_extras(images)
        return *self.combine([(scores, maps), *(member(images) for member in others)]), extras

    def forward_with_global_features(self, images: Tensor, kind: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """As `forward`, and each member's global features, by number and layer."""
        outcomes = [member.forward_with_global_features(images, kind) for member in self.members]
        scores, maps = self.combine([(scores, maps) for scores, maps, _ in outcomes])
        return scores, maps, _numbered([features for _, _, features in outcomes])

    def global_features(self, images: Tensor, kind: str) -> dict[str, Tensor]:
        """Global features alone, as `forward_with_global_features` gives them."""
        return _numbered([member.global_features(images, kind) for member in self.members])

    def learn_stats(self, scored: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Set the scales from each member's scores (M,) and patch scores (M, h, w) of good images."""
        for number, (scores, grids) in enumerate(scored):
            known = scores.isfinite()
            for stats, values in ((self.score_stats, scores[known]), (self.map_stats, grids[known])):
                if len(values):
                    stats[number] = torch.stack([values.mean(), values.std(correction=0).clamp(min=1e-6)])

    def combine(self, outcomes: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Scores (B,) and maps (B, 1, H, W) of each member → of all together."""
        scores = [(s - mean) / std for (s, _), (mean, std) in zip(outcomes, self.score_stats, strict=True)]
        maps = [(m - mean) / std for (_, m), (mean, std) in zip(outcomes, self.map_stats, strict=True)]
        return torch.stack(scores).mean(0), torch.stack(maps).mean(0)


def seen_by(config: PatchCoreConfig, make: Callable[[Look], Backbone]) -> Backbone | SeveralSizes:
    """The backbone of these settings, `make` being what gives one for a look; for several looks, one for each."""
    looks = config.looks
    if [look.size for look in looks] == [config.size]:
        return make(looks[0])
    return SeveralSizes([make(look) for look in looks], [look.size for look in looks])


def pretrained(config: PatchCoreConfig) -> Backbone | SeveralSizes:
    """The backbone of these settings, with its weights."""
    return seen_by(config, lambda look: backbone.create(config.backbone, look.layers, config.weights, look.size))


def _taps(config: PatchCoreConfig, layers: int) -> list[tuple[slice, PatchFeatures]]:
    """For each bank the layers that it is of, and how patches are made of them."""
    usual = PatchFeatures(
        config.patchsize,
        config.pretrain_embed_dimension,
        config.target_embed_dimension,
        config.patchstride,
        config.patchsize_aggregate,
    )
    if config.fusion == "stack":
        return [(slice(None), usual)]
    sizes = config.patchsizes or (None,) * layers
    return [
        (slice(number, number + 1), usual if size is None else PatchFeatures.weighted(size))
        for number, size in enumerate(sizes)
    ]


def _numbered(members: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{number}.{name}": values for number, features in enumerate(members) for name, values in features.items()}
