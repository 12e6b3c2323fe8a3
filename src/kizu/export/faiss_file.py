"""faiss's file of a flat index, read and written without faiss.

A header of 45 bytes, little-endian, then the vectors, row by row:

    fourcc  "IxF2" (squared Euclidean distance)
    int32   dimension
    int64   vectors
    int64   twice, of no meaning (1 << 20)
    uint8   1: trained
    int32   metric, 1: squared Euclidean distance
    uint64  numbers that follow, float32
"""

import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kizu.data import files
from kizu.errors import ModelError

__all__ = ["read", "write"]

HEADER = struct.Struct("<4siqqqBiQ")
FOURCC, UNUSED, EUCLIDEAN = b"IxF2", 1 << 20, 1


def read(path: Path) -> npt.NDArray[np.float32]:
    """The vectors (N, D). Raises `ModelError` for any other kind of index, or a damaged file."""
    try:
        with path.open("rb") as file:
            head = file.read(HEADER.size)
            if head[:4] != FOURCC:
                raise ModelError(f"{path}: no flat index of faiss (it begins with {head[:4]!r}, not {FOURCC!r})")
            if len(head) < HEADER.size:
                raise ModelError(f"{path}: damaged, it ends in the header")
            _, dimension, count, _, _, _, metric, size = HEADER.unpack(head)
            left = path.stat().st_size - HEADER.size
            if metric != EUCLIDEAN or dimension < 1 or count < 1 or size != dimension * count or left != 4 * size:
                raise ModelError(
                    f"{path}: damaged, {count} vectors of {dimension} numbers do not go with {left} bytes of them"
                )
            vectors = np.fromfile(file, "<f4", size).reshape(count, dimension)
    except FileNotFoundError:
        raise ModelError(f"{path}: there is no such file") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from None
    if not np.isfinite(vectors).all():
        raise ModelError(f"{path}: holds numbers that are not finite")
    return vectors


def write(path: Path, vectors: npt.NDArray[np.float32]) -> None:
    """Write vectors (N, D) as faiss would, whole or not at all."""
    count, dimension = vectors.shape
    with files.new_file(path) as temporary, temporary.open("wb") as file:
        file.write(HEADER.pack(FOURCC, dimension, count, UNUSED, UNUSED, 1, EUCLIDEAN, vectors.size))
        file.write(np.ascontiguousarray(vectors, "<f4").data)
