"""Several detectors' graphs as one, each scaled by what it says of good images."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["EnsembleGraph"]


class EnsembleGraph(nn.Module):
    """The mean of several graphs, each scaled by what it says of good images held out."""

    score_stats: Tensor  # (members, 2): mean and deviation
    map_stats: Tensor

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.register_buffer("score_stats", torch.ones(len(members), 2))
        self.register_buffer("map_stats", torch.ones(len(members), 2))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.combine([member(images) for member in self.members])

    def forward_with_global_features(self, images: Tensor, kind: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """As `forward`, and each member's global features, by number and layer."""
        outcomes = [member.forward_with_global_features(images, kind) for member in self._members()]
        scores, maps = self.combine([(scores, maps) for scores, maps, _ in outcomes])
        return scores, maps, _numbered([features for _, _, features in outcomes])

    def global_features(self, images: Tensor, kind: str) -> dict[str, Tensor]:
        """Global features alone, as `forward_with_global_features` gives them."""
        return _numbered([member.global_features(images, kind) for member in self._members()])

    def _members(self) -> list[Any]:
        return list(self.members)

    def forward_with_extras(self, images: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """As `forward`, and the first member's extras."""
        first, *others = self._members()
        scores, maps, extras = first.forward_with_extras(images)
        return *self.combine([(scores, maps), *(member(images) for member in others)]), extras

    def learn_stats(self, rated: Sequence[tuple[Tensor, Tensor]]) -> None:
        """From each member's scores (M,) and patch scores (M, h, w) of good images."""
        for number, (scores, grids) in enumerate(rated):
            known = scores.isfinite()
            for stats, values in ((self.score_stats, scores[known]), (self.map_stats, grids[known])):
                if len(values):
                    stats[number] = torch.stack([values.mean(), values.std(correction=0).clamp(min=1e-6)])

    def combine(self, outcomes: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Scores (B,) and maps (B, 1, H, W) of each member → of all together."""
        scores = [(s - mean) / std for (s, _), (mean, std) in zip(outcomes, self.score_stats, strict=True)]
        maps = [(m - mean) / std for (_, m), (mean, std) in zip(outcomes, self.map_stats, strict=True)]
        return torch.stack(scores).mean(0), torch.stack(maps).mean(0)


def _numbered(members: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{number}.{name}": values for number, features in enumerate(members) for name, values in features.items()}
