"""The settings of PatchCore."""

import re
from typing import Literal, NamedTuple

from pydantic import Field, model_validator

from kizu.config.backbone_names import without_seed
from kizu.config.base import BackboneConfig, Names, Numbers

__all__ = ["Look", "PatchCoreConfig"]

PUBLISHED = '{} gives published scores: it needs `fusion="stack"`, `local_scale=False` and {}'
LAYER = re.compile(r"(?P<name>[^:@]+)(:(?P<side>[1-9]\d?))?(@(?P<share>\d?\.?\d+))?", re.ASCII)
MIN_SHARE = 0.25
LOOK_STEP = 32  # pixels: sides of a smaller size are multiples of it, so that every layer's grid covers it


class Look(NamedTuple):
    """A size at which the network sees the photograph, and what is taken from it there."""

    size: tuple[int, int]
    layers: tuple[str, ...]
    patchsizes: tuple[int | None, ...]  # of each layer, None: the usual one


class PatchCoreConfig(BackboneConfig):
    """PatchCore (Roth et al., CVPR 2022).

    An ensemble has several backbones, separated by commas; each layer starts with its backbone's number:
    0.layer2,0.layer3,1.layer2. A backbone with .seed-3 behind its name has its own seed. A layer with a number behind
    its name has its own patchsize, whose middle counts most, and may be there several times: layer2,layer2:5. One with
    a share behind its name looks at a smaller photograph: layer2,layer2@0.7 sees it at two sizes.
    """

    layers: Names = Field(
        (),
        description="Layers that features are taken from: layer2,layer3, or block numbers of a transformer. layer2:5 "
        "has a patchsize of its own, and a memory bank; layer2@0.7 sees the photograph at 0.7 of the size. "
        "Default: those of reduction 8 and 16.",
    )
    patchsize: int = Field(3, ge=1, le=15, description="Side of the neighbourhood that is averaged into a patch.")
    pretrain_embed_dimension: int | None = Field(
        None,
        ge=1,
        le=16384,
        description="Channels that each layer is pooled to. Default: as many as it has.",
    )
    target_embed_dimension: int | None = Field(
        None,
        ge=1,
        le=16384,
        description="Channels that all layers together are pooled to. Default: as many as they have.",
    )
    patchstride: int = Field(1, ge=1, le=15, description="Steps on the feature map from one patch to the next.")
    patchsize_aggregate: Numbers = Field(
        (), description="Sides of further neighbourhoods, whose averages are appended: 1,5."
    )
    sampler: Literal["k_center", "greedy_coreset", "approx_greedy_coreset", "random", "identity"] = Field(
        "k_center", description="How the patches of the memory bank are chosen."
    )
    coreset: float = Field(0.02, gt=0, le=1, description="Share of the training patches that the memory bank keeps.")
    neighbours: int = Field(
        1, ge=1, le=100, description="A patch's score is the mean distance to this many nearest entries of the bank."
    )
    search: Literal["exact", "ivfpq"] = Field(
        "exact",
        description="exact finds the nearest entry; ivfpq finds one of the nearest with faiss, for huge banks.",
    )
    faiss_on_gpu: bool = Field(False, description='With `search="ivfpq"`: search on the GPU.')
    fusion: Literal["separate", "stack"] = Field(
        "separate", description="separate: a bank for each layer. stack: one bank of all layers, as in the paper."
    )
    local_scale: bool = Field(
        True, description="Divide each distance by the typical distance around its bank entry. Paper: no."
    )
    squared: bool = Field(False, description="Square the distances, as the published code does. Paper: no.")
    top: float = Field(
        0.01,
        ge=0,
        le=1,
        description="An image's score is the mean of this share of its highest patch scores. Paper: 0, the highest.",
    )
    augmented_copies: int = Field(
        4, ge=1, le=100, description="With augmentation: varied copies of each image, besides itself."
    )
    reweight: int = Field(
        0, ge=0, le=100, description="Reweight the score by this many neighbours, Eq. 7 of the paper. Paper: 9. 0: off."
    )
    thumbnails: bool = Field(
        False, description="Keep thumbnails of the training images in the model, to show why a region is marked."
    )

    @model_validator(mode="after")
    def _settings_fit(self) -> "PatchCoreConfig":
        if (self.pretrain_embed_dimension is None) != (self.target_embed_dimension is None):
            raise ValueError("`pretrain_embed_dimension` and `target_embed_dimension` go together")
        if self.search == "ivfpq" and self.neighbours > 1:
            raise ValueError('`search="ivfpq"` finds one entry: it needs `neighbours=1`')
        if self.faiss_on_gpu and self.search != "ivfpq":
            raise ValueError('`faiss_on_gpu=True` needs `search="ivfpq"`; the exact search uses any GPU by itself')
        if self.target_embed_dimension is not None and self.fusion != "stack":
            raise ValueError('`target_embed_dimension` pools all layers together: it needs `fusion="stack"`')
        if any(not 1 <= size <= 15 for size in self.patchsize_aggregate):
            raise ValueError("`patchsize_aggregate` takes numbers from 1 to 15")
        if self.squared and (self.fusion != "stack" or self.local_scale or self.reweight > 1):
            raise ValueError(PUBLISHED.format("`squared=True`", "`reweight=0`"))
        if self.reweight > 1 and (self.fusion, self.local_scale, self.top) != ("stack", False, 0):
            raise ValueError(PUBLISHED.format("`reweight`", "`top=0`"))
        return self

    @model_validator(mode="after")
    def _neighbourhoods_fit(self) -> "PatchCoreConfig":
        own = [layer for layer in self.layers if ":" in layer or "@" in layer]
        for layer in own:
            parts = LAYER.fullmatch(layer)
            if parts is None or (parts["side"] and not (int(parts["side"]) % 2 and int(parts["side"]) <= 15)):
                raise ValueError(
                    f'`layers="{layer}"`: a patchsize of its own is an odd number up to 15, as in layer2:5'
                )
            if parts["share"] and not MIN_SHARE <= float(parts["share"]) <= 1:
                raise ValueError(f'`layers="{layer}"`: a share of the size is from {MIN_SHARE} to 1, as in layer2@0.7')
        if own and self.fusion != "separate":
            raise ValueError(f'`layers="{own[0]}"`: a patchsize or size of its own needs `fusion="separate"`')
        if any(":" in layer for layer in own) and (self.patchstride > 1 or self.patchsize_aggregate):
            raise ValueError(f'`layers="{own[0]}"` needs `patchstride=1`, and no `patchsize_aggregate`')
        return self

    @property
    def looks(self) -> tuple[Look, ...]:
        """At which sizes the photograph is looked at, and for which layers; without layers, for the default ones."""
        if not self.layers:
            return (Look(self.size, (), ()),)
        parts = [LAYER.fullmatch(layer) for layer in self.layers]
        found: dict[float, list[tuple[str, int | None]]] = {}
        for layer, part in zip(self.layers, parts, strict=True):
            name, side, share = (layer, None, None) if part is None else part.group("name", "side", "share")
            found.setdefault(float(share or 1), []).append((name, int(side) if side else None))
        return tuple(
            Look(self._share_of_size(share), tuple(name for name, _ in layers), tuple(side for _, side in layers))
            for share, layers in found.items()
        )

    def _share_of_size(self, share: float) -> tuple[int, int]:
        if share == 1:
            return self.size
        height, width = (max(LOOK_STEP, LOOK_STEP * round(share * side / LOOK_STEP)) for side in self.size)
        return height, width

    @property
    def patchsizes(self) -> tuple[int | None, ...]:
        """The own patchsize of each layer, where it has one, in the order of `looks`."""
        return tuple(side for look in self.looks for side in look.patchsizes)

    @model_validator(mode="after")
    def _members_fit(self) -> "PatchCoreConfig":
        count = len(self.backbone.split(","))
        if count == 1:
            return self
        for layer in self.layers:
            number = layer.partition(".")[0]
            if not number.isdigit() or int(number) >= count:
                raise ValueError(f'`layers="{layer}"`: with {count} backbones each layer starts with 0. … {count - 1}.')
        if self.weights is not None and len(self.weights.split(",")) != count:
            raise ValueError(f"`weights`: name {count} files, separated by commas, one for each backbone")
        return self

    def members(self) -> "list[PatchCoreConfig]":
        """The settings of each backbone of an ensemble; those of a single backbone are these."""
        names, seeds = zip(*(without_seed(name.strip()) for name in self.backbone.split(",")), strict=True)
        if len(names) == 1:
            return [self if seeds[0] is None else self.model_copy(update={"backbone": names[0], "seed": seeds[0]})]
        files = [file or None for file in (self.weights or "," * (len(names) - 1)).split(",")]
        return [
            self.model_copy(
                update={
                    "backbone": name,
                    "weights": file,
                    "seed": self.seed if seed is None else seed,
                    "layers": tuple(
                        layer.partition(".")[2] for layer in self.layers if layer.split(".")[0] == str(number)
                    ),
                }
            )
            for number, (name, file, seed) in enumerate(zip(names, files, seeds, strict=True))
        ]
