"""The photographs that a model learns from, as the network sees them, in memory or in a file."""

import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
import numpy.typing as npt

from kizu.calibration.captures import Capture
from kizu.calibration.groups import highest
from kizu.data import dataset, image
from kizu.data.geometry.tiling import TileGrid, Tiling
from kizu.data.preprocessing import Preprocessing, Readable, batches, digests, whole
from kizu.data.progress import Progress
from kizu.errors import BadImage, DataError
from kizu.inference.prediction import readable

__all__ = ["Stack", "TiledStack", "Tiles", "items_of", "read_all", "show_the_same", "thumbnails", "unusable"]

MAX_TILES = 1000  # that a method learns from which sees each of them many times
BATCH = 16  # tiles that are cut at a time
LOOKED_AT = 16  # tiles of a photograph among which the liveliest is looked for
CORRELATED = 0.5  # correlation from which on tiles show the same


class Stack:
    """Photographs of one size, appended once, read in order; what exceeds `memory` bytes lies in a temporary file."""

    def __init__(self, most: int, size: tuple[int, int], memory: int) -> None:
        self.size = size
        self._shape = (3, *size)
        self._bytes = 3 * size[0] * size[1]
        self._memory = memory
        self._count = 0
        self._digest = hashlib.blake2b(digest_size=16)
        self.digests: list[str] = []  # of each photograph, to know it again
        self.shapes: list[tuple[int, int]] = []  # (height, width) of each as it was read
        fits = most * self._bytes <= memory
        self._array = np.empty((most, *self._shape), np.uint8) if fits else None
        self._file = None if fits else _file()

    def __len__(self) -> int:
        return self._count

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def append(self, pixels: npt.NDArray[np.uint8], shapes: Sequence[tuple[int, int]] | None = None) -> None:
        """Add photographs (B, 3, h, w), each read from one of (height, width); without `shapes`, as large as here."""
        self.shapes += [self.size] * len(pixels) if shapes is None else shapes
        self._digest.update(pixels.data)
        self.digests += digests(pixels)
        self._make_room(self._count + len(pixels))
        if self._array is not None:
            self._array[self._count : self._count + len(pixels)] = pixels
        elif self._file is not None:
            self._file.seek(0, os.SEEK_END)
            self._file.write(pixels.data)
        self._count += len(pixels)

    def _make_room(self, count: int) -> None:
        """For so many photographs, where more come than were announced."""
        if self._array is None or count <= len(self._array):
            return
        before, most = self._array[: self._count], max(count, 2 * len(self._array))
        if most * self._bytes > self._memory:
            self._array, self._file = None, _file()
            self._file.write(before.data)
        else:
            self._array = np.empty((most, *self._shape), np.uint8)
            self._array[: self._count] = before

    def batch(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Photographs start … stop - 1, (B, 3, h, w)."""
        stop = min(stop, self._count)
        if self._array is not None:
            return self._array[start:stop]
        assert self._file is not None
        self._file.seek(start * self._bytes)
        content = bytearray(self._file.read((stop - start) * self._bytes))
        return np.frombuffer(content, np.uint8).reshape(-1, *self._shape)

    def take(self, numbers: Sequence[int]) -> npt.NDArray[np.uint8]:
        """Photographs of these numbers, (B, 3, h, w)."""
        if list(numbers) == list(range(numbers[0], numbers[0] + len(numbers))):
            return self.batch(numbers[0], numbers[-1] + 1)
        return np.concatenate([self.batch(number, number + 1) for number in numbers])

    def keep(self, numbers: Sequence[int]) -> None:
        """Forget all photographs but those of these numbers, which rise."""
        self._digest = hashlib.blake2b(digest_size=16)
        for place, number in enumerate(numbers):
            photo = self.batch(number, number + 1)
            self._digest.update(photo.data)
            if self._array is not None:
                self._array[place] = photo[0]
            elif self._file is not None and place != number:
                self._file.seek(place * self._bytes)
                self._file.write(photo.data)
        self.digests = [self.digests[number] for number in numbers]
        self.shapes = [self.shapes[number] for number in numbers]
        self._count = len(numbers)
        if self._file is not None:
            self._file.truncate(self._count * self._bytes)

    def part(self, numbers: Sequence[int]) -> "Stack":
        """A stack of those of these numbers."""
        part = Stack(len(numbers), self.size, self._memory)
        for number in numbers:
            part.append(self.batch(number, number + 1), self.shapes[number : number + 1])
        return part

    def captures(self) -> Iterator[Capture]:
        """How each photograph was taken."""
        for number, shape in enumerate(self.shapes):
            yield Capture.of(self.batch(number, number + 1)[0], shape)

    @property
    def seen(self) -> "Stack":
        """What the network sees of the photographs: themselves."""
        return self

    def at_most(self, count: int = MAX_TILES) -> "Stack":
        """What is learned from by a method that sees each picture many times: all."""
        return self

    def of_each_seen(self, values: Sequence[int]) -> Sequence[int]:
        """Of a value for each photograph, that of each picture that the network sees."""
        return values

    @property
    def hash(self) -> str:
        """Of the pixels, in order."""
        return self._digest.hexdigest()


class Tiles(Stack):
    """The tiles of photographs, as the network sees them: those of each photograph follow one another."""

    def __init__(self, size: tuple[int, int], memory: int) -> None:
        super().__init__(0, size, memory)
        self.grids: list[TileGrid] = []  # of each photograph

    @property
    def owners(self) -> list[int]:
        """The number of the photograph that each tile is of."""
        return [number for number, grid in enumerate(self.grids) for _ in range(len(grid))]

    def numbers_of(self, photographs: Iterable[int]) -> list[int]:
        """The numbers of the tiles of these photographs."""
        ends = np.cumsum([0, *map(len, self.grids)]).tolist()
        return [number for photo in photographs for number in range(ends[photo], ends[photo + 1])]

    def of_photographs(self, photographs: Sequence[int]) -> "Tiles":
        """The tiles of these photographs alone."""
        tiles = Tiles(self.size, self._memory)
        tiles.grids = [self.grids[photo] for photo in photographs]
        for number in self.numbers_of(photographs):
            tiles.append(self.batch(number, number + 1))
        return tiles

    def at_most(self, count: int = MAX_TILES) -> Stack:
        """So many tiles, spread evenly over all, or all."""
        if len(self) <= count:
            return self
        return self.part([int(number) for number in np.linspace(0, len(self) - 1, count).round()])

    def by_photograph(self, values: Mapping[int, float]) -> dict[int, float]:
        """For each photograph the highest value of its tiles, of values by the numbers of tiles."""
        owners = self.owners
        photos = [owners[number] for number in values]
        return dict(zip(dict.fromkeys(photos), highest(list(values.values()), photos), strict=True))


class TiledStack(Stack):
    """Photographs that the network sees in tiles: here a small picture of each as a whole, by which it is known."""

    def __init__(self, most: int, tiling: Tiling, memory: int) -> None:
        super().__init__(most, tiling.size, memory)
        self.tiling = tiling
        self.tiles = Tiles(tiling.size, memory)

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self.tiles.__exit__()

    def add(self, photo: npt.NDArray[np.uint8], picture: npt.NDArray[np.uint8]) -> None:
        """Add a photograph (H, W, 3), and the small picture (h, w, 3) of it."""
        grid = self.tiling.grid((photo.shape[0], photo.shape[1]))
        self.append(np.ascontiguousarray(picture.transpose(2, 0, 1)[None]), [grid.shape])
        self.tiles.grids.append(grid)
        for tiles in grid.batches(photo, BATCH):
            self.tiles.append(tiles)

    def keep(self, numbers: Sequence[int]) -> None:
        self.tiles.keep(self.tiles.numbers_of(numbers))
        self.tiles.grids = [self.tiles.grids[number] for number in numbers]
        super().keep(numbers)

    def part(self, numbers: Sequence[int]) -> "TiledStack":
        part = TiledStack(len(numbers), self.tiling, self._memory)
        for number in numbers:
            part.append(self.batch(number, number + 1), self.shapes[number : number + 1])
        part.tiles = self.tiles.of_photographs(numbers)
        return part

    @property
    def seen(self) -> Tiles:
        """What the network sees of the photographs: their tiles."""
        return self.tiles

    def of_each_seen(self, values: Sequence[int]) -> Sequence[int]:
        return [values[photo] for photo in self.tiles.owners]


def read_all(
    items: Sequence[Readable],
    preprocessing: Preprocessing,
    memory_bytes: int,
    skip_bad: bool,
    workers: int,
    progress: Progress,
) -> tuple[Stack, list[Readable]]:
    """All photographs, and what they are from; without those that cannot be read, if `skip_bad`.

    Raises `DataError` with a list of these otherwise.
    """
    photos = (
        Stack(len(items), preprocessing.size, memory_bytes)
        if preprocessing.tiling is None
        else TiledStack(len(items), preprocessing.tiling, memory_bytes)
    )
    items_read: list[Readable] = []
    errors: list[BadImage] = []
    read = _read_in_tiles if isinstance(photos, TiledStack) else _read_as_a_whole
    for read_now, failed in read(photos, items, preprocessing, workers):
        items_read += read_now
        errors += failed
        progress("Reading", len(items_read) + len(errors), len(items))
    if errors and not skip_bad:
        photos.__exit__()
        raise unusable(errors, len(items))
    return photos, items_read


def thumbnails(pixels: npt.NDArray[np.uint8]) -> list[bytes]:
    """Encoded pictures of photographs (B, 3, h, w), as a model keeps them."""
    return [image.encode(picture, "JPEG", quality=85) for picture in pixels.transpose(0, 2, 3, 1)]


def unusable(errors: Sequence[object], total: int) -> DataError:
    """What to raise for errors of some of so many images."""
    listing = "\n".join(f"  {error}" for error in errors)
    return DataError(
        f"{len(errors)} of {total} training images cannot be used (`skip_bad=True` leaves them out):\n{listing}"
    )


def _read_as_a_whole(
    photos: Stack, items: Sequence[Readable], preprocessing: Preprocessing, workers: int
) -> Iterator[tuple[list[Readable], list[BadImage]]]:
    for batch in batches(items, preprocessing, workers=workers):
        photos.append(batch.pixels, batch.shapes)
        yield batch.items, [error for _, error in batch.failures]


def _read_in_tiles(
    photos: Stack, items: Sequence[Readable], preprocessing: Preprocessing, workers: int
) -> Iterator[tuple[list[Readable], list[BadImage]]]:
    assert isinstance(photos, TiledStack)
    for item, photo in whole(items, preprocessing):
        if isinstance(photo, BadImage):
            yield [], [photo]
        else:
            photos.add(photo, preprocessing(photo))
            del photo  # before the next one is read
            yield [item], []


def show_the_same(stack: Stack, number: int, other: Stack, other_number: int) -> bool:
    """Whether two photographs of which small pictures are alike are of one part: of those in tiles, by their texture.

    Small pictures of large photographs of one material are alike, whatever the part.
    """
    if not isinstance(stack, TiledStack) or not isinstance(other, TiledStack):
        return True
    if stack.tiles.grids[number].shape != other.tiles.grids[other_number].shape:
        return False
    own, others = stack.tiles.numbers_of([number]), other.tiles.numbers_of([other_number])
    places = np.linspace(0, len(own) - 1, min(LOOKED_AT, len(own))).round().astype(int)
    lively = max(places.tolist(), key=lambda place: float(stack.tiles.batch(own[place], own[place] + 1).std()))
    pictures = [
        tiles.batch(numbers[lively], numbers[lively] + 1).mean((0, 1))
        for tiles, numbers in ((stack.tiles, own), (other.tiles, others))
    ]
    first, second = (picture - picture.mean() for picture in pictures)
    scale = float(np.sqrt((first**2).sum() * (second**2).sum()))
    return bool((pictures[0] == pictures[1]).all()) or (
        scale > 0 and float((first * second).sum()) > CORRELATED * scale
    )


def _file() -> IO[bytes]:
    return tempfile.TemporaryFile(prefix="kizu")


def items_of(good: str | os.PathLike[str] | Iterable[Any]) -> list[Readable]:
    """Whatever `fit` takes, as a list of things to read."""
    if isinstance(good, str | os.PathLike):
        data = dataset.find(Path(good))
        if len(data.categories) > 1:
            raise DataError(f"{good} holds {len(data.categories)} categories; fit one: {', '.join(data.categories)}")
        return list(data.select(split="train"))
    return [readable(item) for item in good]
