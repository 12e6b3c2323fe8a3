"""The places of a grid of patches that lie in zones: only their features are kept and compared."""

import torch
from torch import Tensor, nn

from kizu.features.patch_features import as_rows

__all__ = ["Places"]


class Places(nn.Module):
    """Some places of a grid, or all: picks their features out, and lays their scores back over the grid."""

    chosen: Tensor | None  # (P,) numbers of these places, row · columns + column; None: all
    nearest: Tensor | None  # (h · w,) for each place which of the chosen is nearest: itself, if it is chosen

    def __init__(self, grid: tuple[int, int], outlined: Tensor | None = None) -> None:
        """Of a grid (h, w), those where `outlined` (h', w') is, on a grid of the same frame; None: all."""
        super().__init__()
        self.grid = grid
        self.register_buffer("chosen", None, persistent=False)
        self.register_buffer("nearest", None, persistent=False)
        if outlined is None:
            return
        height, width = grid
        rows, columns = (
            ((torch.arange(length, device=outlined.device) + 0.5) * finer / length).long()
            for length, finer in zip(grid, outlined.shape, strict=True)
        )
        on_grid = outlined[rows[:, None], columns[None]]
        if bool(on_grid.all()):
            return
        if not bool(on_grid.any()):
            first = outlined.nonzero()[0]
            on_grid[int(first[0]) * height // outlined.shape[0], int(first[1]) * width // outlined.shape[1]] = True
        chosen = on_grid.flatten().nonzero()[:, 0]
        places = torch.cartesian_prod(*(torch.arange(length, device=outlined.device) for length in grid)).float()
        self.register_buffer("chosen", chosen, persistent=False)
        self.register_buffer("nearest", torch.cdist(places, places[chosen]).argmin(1), persistent=False)

    def __len__(self) -> int:
        return self.grid[0] * self.grid[1] if self.chosen is None else len(self.chosen)

    def pick(self, features: Tensor) -> Tensor:
        """(B, D, h, w) → (B · P, D)."""
        if self.chosen is None:
            return as_rows(features)
        return features.flatten(2)[:, :, self.chosen].transpose(1, 2).flatten(0, 1)

    def laid_out(self, values: Tensor, images: int) -> Tensor:
        """Values (B · P,) of so many images → (B, h, w); a place that is not chosen has that of the nearest."""
        if self.nearest is not None:
            values = values.view(images, -1)[:, self.nearest]
        return values.view(images, *self.grid)

    def rows_of(self, places: Tensor) -> Tensor:
        """For one place (B,) of each image, numbered over the whole grid, the row that `pick` gives it."""
        positions = torch.arange(places.shape[0], device=places.device)  # len() would fix their number in an export
        chosen = places if self.nearest is None else self.nearest[places]
        return chosen + positions * len(self)

    def patch_ids(self, image_ids: Tensor, *, of_copies: bool) -> Tensor:
        """(B,) → (B · P,): a number for each patch, of its image and place.

        In a varied copy, a patch lies somewhere else than in its image: all of its patches have a place past the last.
        """
        numbers, past = self.numbers().to(image_ids.device), self.grid[0] * self.grid[1]
        return (image_ids[:, None] * (past + 1) + (torch.full_like(numbers, past) if of_copies else numbers)).flatten()

    def images_and_places(self, patch_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Image and place (N,) of patches, by their numbers (N,)."""
        past = self.grid[0] * self.grid[1]
        return patch_ids // (past + 1), patch_ids % (past + 1)

    def numbers(self) -> Tensor:
        """(P,): row · columns + column of each place."""
        return torch.arange(len(self)) if self.chosen is None else self.chosen
