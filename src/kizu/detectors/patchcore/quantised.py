"""Approximate search in a memory bank: product-quantised cells (IVF-PQ) of faiss, as in PatchCore's appendix."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from kizu.errors import OptionError, require

__all__ = ["QuantisedCells"]

LISTS, PARTS, BITS = 512, 64, 8  # cells, parts that a vector is cut into, bits a part: the reference's
PROBED = 16  # one cell in so many is looked into
FETCHED = 16  # entries that the codes find nearest, of which exact distances then choose
LEAST = 39  # entries a cell that faiss wants to learn from


class QuantisedCells:
    """An index over bank entries (K, D). Made anew from them whenever needed, never saved."""

    def __init__(self, entries: Tensor, images: Tensor, on_gpu: bool = False) -> None:
        """`images` (K,) that each is from. Raises `OptionError` for a bank that is too small to be quantised."""
        faiss: Any = require("faiss")
        count, dimension = entries.shape
        if count < LEAST * 2**BITS:
            raise OptionError(
                f"--search ivfpq needs a bank of at least {LEAST * 2**BITS:,} entries to learn its codes from, and "
                f"this one has {count:,}: use --search exact, which is faster here"
            )
        self.entries, self.images = entries, images
        parts = max(part for part in range(1, PARTS + 1) if dimension % part == 0)
        lists = min(LISTS, count // LEAST)
        self.coarse = faiss.IndexFlatL2(dimension)
        self.index = faiss.IndexIVFPQ(self.coarse, dimension, lists, parts, BITS)
        vectors = np.ascontiguousarray(entries.numpy(force=True))
        self.index.train(vectors)
        self.index.add(vectors)
        self.index.nprobe = max(1, lists // PROBED)
        if on_gpu:
            if not hasattr(faiss, "StandardGpuResources"):
                raise OptionError("--faiss-on-gpu needs faiss with GPU support, and the one installed has none")
            options = faiss.GpuClonerOptions()
            options.useFloat16 = True
            self.index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, self.index, options)

    def nearest(self, queries: Tensor, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Distances (N,) and places (N,) of the entries found nearest to queries (N, D), not of their images `own`.

        The distances are exact; the entries may not be the nearest. Infinite where only the own image's were found.
        """
        found = self.index.search(np.ascontiguousarray(queries.numpy(force=True)), FETCHED)[1]
        places = torch.from_numpy(found).to(queries.device)  # (N, FETCHED), -1 where fewer were found
        left_out = places < 0
        places = places.clamp(min=0)
        if own is not None:
            left_out |= self.images[places] == own[:, None]
        distances = torch.stack([(queries - self.entries[column]).square().sum(1) for column in places.T], 1)
        best, column = distances.masked_fill(left_out, torch.inf).min(1)
        return best.sqrt(), places.gather(1, column[:, None])[:, 0]
