"""One backbone at several sizes of a photograph: a smaller one shows more of the whole, a larger one more detail."""

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

from kizu.features.backbone import Backbone

__all__ = ["SeveralSizes"]


class SeveralSizes(nn.Module):
    """Backbones, each with the size (height, width) at which it looks at the photograph; they are used like one."""

    def __init__(self, backbones: Sequence[Backbone], sizes: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.backbones = cast("Sequence[Backbone]", nn.ModuleList(backbones))
        self.sizes = list(sizes)
        self.layers = tuple(layer for backbone in backbones for layer in backbone.layers)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) uint8 → the feature maps of each backbone, one after the other."""
        looks = zip(self.backbones, self.sizes, strict=True)
        return [layer for backbone, size in looks for layer in backbone(_scaled(images, size))]

    def forward_with_global_features(self, images: Tensor, kind: str) -> tuple[list[Tensor], dict[str, Tensor]]:
        """As `forward`, and global features at the first size, as `Backbone` gives them."""
        first, *others = zip(self.backbones, self.sizes, strict=True)
        maps, global_features = first[0].forward_with_global_features(_scaled(images, first[1]), kind)
        for backbone, size in others:
            maps += backbone(_scaled(images, size))
        return maps, global_features


def _scaled(images: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(images.shape[2:]) == size:
        return images
    return F.interpolate(images.float(), size, mode="bilinear", align_corners=False)
