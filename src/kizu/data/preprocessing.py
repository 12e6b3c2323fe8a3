"""From photographs to fixed-size uint8 batches, and from maps back to photographs."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any, Generic, Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt

from kizu.data import image
from kizu.data.geometry.alignment import Alignment, Pose, laid_back, moved, turned, within
from kizu.data.geometry.tiling import Tiling
from kizu.data.geometry.zones import Outlined, ZoneMap
from kizu.errors import BadImage

__all__ = ["Batch", "BitDepth", "Preprocessing", "Readable", "batches", "digests", "shown", "whole"]


class Readable(Protocol):
    """Anything that can be read as a photograph: a sample of a data set, or a `Photo`."""

    def read(
        self, at_least: tuple[int, int] | None = None, white: int = image.WHITE, *, large: bool = False
    ) -> tuple[npt.NDArray[np.uint8], tuple[int, int]]:
        """RGB (H, W, 3), at `at_least` possibly smaller than the photograph, and the photograph's (height, width).

        `white` is the value of more than 8 bits that becomes 255; what may be `large` is as `image.read` has it.
        """
        ...


Item = TypeVar("Item", bound=Readable)
NEARLY_ALL = 0.95  # of the photographs
USUAL_BITS = 8, 10, 12, 14, 16  # of cameras
LOOKED_AT = 32  # photographs whose bits are looked at
READ_AHEAD = 2**26  # pixels of a photograph, at most, beside which the next one is read
HARDLY_ANYTHING = 128  # the highest value of 255 that is below this shows that a camera uses fewer bits
_Prepared = tuple[npt.NDArray[np.uint8], Pose | None, tuple[int, int]]  # input, pose, shape of the photograph


@dataclass(frozen=True)
class Preprocessing:
    """How a photograph becomes the network's input of `size` (height, width).

    Without `resize` the whole photograph is scaled to `size`, whatever its shape. With it, the shorter side is
    scaled to `resize` and the centre of `size` is cut out, as the papers do. With `alignment` the photograph is turned
    and shifted to one pose before. With `zones`, what lies in none is blank.

    With `tiling` the network sees tiles of the photograph at its own resolution, and what is said here of the input is
    of a small picture of the whole, by which photographs are told apart.
    """

    size: tuple[int, int]
    resize: int | None = None
    alignment: Alignment | None = None
    zones: ZoneMap | None = None
    white: int = image.WHITE  # the value that becomes 255, of photographs of more than 8 bits
    tiling: Tiling | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self:
        """As a method's settings say, without what is learned from photographs."""
        (height, width), tile = config["size"], config.get("tile")
        tiling = None if tile is None else Tiling((tile[0], tile[1]), config["overlap"], (height, width))
        return cls((height, width), config["resize"], tiling=tiling)

    @property
    def enough(self) -> tuple[int, int]:
        """The size (height, width) above which a photograph holds more than the network can see."""
        side = 0 if self.resize is None else self.resize
        return 2 * max(self.size[0], side), 2 * max(self.size[1], side)

    def read(
        self, item: Readable, at_least: tuple[int, int] | None = None
    ) -> tuple[npt.NDArray[np.uint8], tuple[int, int]]:
        """A photograph (H, W, 3), with its whole range of values, and its own (height, width)."""
        if self.tiling is not None:
            return item.read(None, self.white, large=True)
        return item.read(at_least) if self.white == image.WHITE else item.read(at_least, self.white)

    def __call__(self, rgb: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """(H, W, 3) uint8 → (height, width, 3) uint8."""
        return self.posed(rgb)[0]

    def inputs(self, rgb: npt.NDArray[np.uint8], size: int = 8) -> Iterator[npt.NDArray[np.uint8]]:
        """All that the network sees of a photograph (H, W, 3): (1, 3, h, w), or up to `size` of its tiles at a time."""
        if self.tiling is None:
            yield self(rgb).transpose(2, 0, 1)[None].copy()
        else:
            yield from self.tiling.grid((rgb.shape[0], rgb.shape[1])).batches(rgb, size)

    def posed(self, rgb: npt.NDArray[np.uint8], pose: Pose | None = None) -> tuple[npt.NDArray[np.uint8], Pose | None]:
        """The network's input, and the pose that the part is in: as given, or found, if the alignment looks for one."""
        if self.zones is not None and self.resize is not None and not self.zones.fits(rgb.shape):
            height, width = self.zones.frame
            reason = f"is not shaped like the photograph of {width}×{height} pixels on which zones were outlined"
            raise BadImage("photograph", reason)
        if pose is None and self.alignment is not None:
            pose = self.alignment.pose(rgb)
        scaled = self._scaled(rgb.shape[:2])
        pixels = image.resize(rgb, scaled) if pose is None else turned(rgb, pose, scaled)
        top, left = self._corner(scaled)
        seen = pixels[top : top + self.size[0], left : left + self.size[1]]
        return seen if self.zones is None else self.zones.blanked(seen), pose

    def restore(self, anomaly_map: image.Float, shape: tuple[int, int], pose: Pose | None = None) -> image.Float:
        """Lay a map of `size` back over a photograph of `shape`. What the network did not see gets its minimum."""
        scaled = self._scaled(shape)
        if scaled != self.size:
            top, left = self._corner(scaled)
            canvas = np.full(scaled, anomaly_map.min(), dtype=np.float32)
            canvas[top : top + self.size[0], left : left + self.size[1]] = anomaly_map
            anomaly_map = canvas
        if pose is not None:
            anomaly_map = laid_back(anomaly_map, pose, shape)
        return image.resize_map(anomaly_map, shape)

    def locate(
        self, place: tuple[float, float], shape: tuple[int, int], pose: Pose | None = None
    ) -> tuple[float, float]:
        """Where a pixel (x, y) of a photograph of `shape` lies in the network's input."""
        scaled = self._scaled(shape)
        top, left = self._corner(scaled)
        x, y = ((at + 0.5) * new / old for at, new, old in zip(place, scaled[::-1], shape[::-1], strict=True))
        if pose is not None:
            x, y = moved((x, y), pose, shape, scaled)
        return min(max(x - left, 0.0), self.size[1] - 0.001), min(max(y - top, 0.0), self.size[0] - 0.001)

    def inspected(self, poses: Sequence[Pose], shapes: Sequence[tuple[int, int]]) -> npt.NDArray[np.bool_]:
        """(height, width): which pixels of the input lie within nearly all photographs of these poses and shapes."""
        counts = np.zeros(self.size, np.int64)
        for pose, shape in zip(poses, shapes, strict=True):
            scaled = self._scaled(shape)
            top, left = self._corner(scaled)
            counts += within(pose, shape, scaled)[top : top + self.size[0], left : left + self.size[1]]
        return np.asarray(counts >= NEARLY_ALL * len(poses))

    def outlined(self, zones: Sequence[Outlined], frame: tuple[int, int]) -> Self:
        """The same for photographs in which zones are outlined, `frame` (height, width) being the shape of one."""
        scaled = self._scaled(frame)
        return replace(self, zones=ZoneMap.of(zones, frame, scaled, *self._corner(scaled), self.size))

    def pixel(self, shape: tuple[int, int]) -> tuple[float, float]:
        """How many pixels (high, wide) of a photograph of `shape` one of the network's input shows, or a cell."""
        if self.tiling is not None:
            return self.tiling.grid(shape).cell
        scaled = self._scaled(shape)
        return shape[0] / scaled[0], shape[1] / scaled[1]

    def _scaled(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """The size of the whole photograph, of which the network sees the middle."""
        if self.resize is None:
            return self.size
        factor = max(self.resize / min(shape[:2]), self.size[0] / shape[0], self.size[1] / shape[1])
        return max(self.size[0], round(shape[0] * factor)), max(self.size[1], round(shape[1] * factor))

    def _corner(self, shape: tuple[int, ...]) -> tuple[int, int]:
        return (shape[0] - self.size[0]) // 2, (shape[1] - self.size[1]) // 2


@dataclass(frozen=True)
class BitDepth:
    """How many bits the values of photographs have that are stored with more than 8."""

    bits: int | None  # None: they are stored with 8
    highest: int  # value in the photographs that were looked at
    lost: bool  # whether they are colours of 16 bits, of which the lower 8 are not read, and hardly anything is left

    @classmethod
    def of(cls, items: Sequence[Readable]) -> Self:
        """From files or arrays among the items, spread evenly over all; those that cannot be read say nothing."""
        values, colours = [0], [255]
        places = np.linspace(0, len(items) - 1, min(LOOKED_AT, len(items))).round().astype(int)
        for number in dict.fromkeys(places.tolist()):
            source = getattr(items[number], "source", None)
            try:
                if source is not None:
                    values.append(image.highest(source) or 0)
                    if not isinstance(source, np.ndarray) and _loses_bits(source):
                        colours.append(int(image.read(source, large=True).max()))
            except BadImage:
                continue
        return cls(_bits(max(values)), max(values), min(colours) < HARDLY_ANYTHING)

    @property
    def white(self) -> int:
        return image.WHITE if self.bits is None else 2**self.bits - 1

    @property
    def remark(self) -> str:
        """What a user should know of it; empty where all is as usual."""
        if self.lost:
            return (
                "The photographs have colours of 16 bits, of which only the upper 8 can be read, and those are almost "
                "black: the camera uses fewer bits. Save them with 8 bits a colour, or as grey with 16."
            )
        if self.bits in (None, 16):
            return ""
        return (
            f"The photographs are stored in 16 bits and use {self.bits} (values up to {self.highest:,}): "
            f"{self.white:,} is taken for white, and a photograph with clearly higher values is not judged. "
            "`bits` sets another number."
        )


def _loses_bits(source: image.Source) -> bool:
    """Whether a file has colours of 16 bits a channel, of which decoders give the upper 8."""
    with image.opened(source) as file:
        return file.mode in ("RGB", "RGBA") and any(";16" in str(tile[3]) for tile in getattr(file, "tile", ()))


def _bits(highest: int) -> int | None:
    return next((bits for bits in USUAL_BITS if highest < 2**bits), 16) if highest else None


def shown(source: image.Source) -> npt.NDArray[np.uint8]:
    """A photograph (H, W, 3) for people to look at, whatever bits its camera uses. Raises `BadImage`."""
    bits = _bits(image.highest(source) or 0)
    return image.read(source, image.WHITE if bits is None else 2**bits - 1, large=True)


@dataclass
class Batch(Generic[Item]):
    """Up to a batch size of photographs that could be read, and those that could not."""

    pixels: npt.NDArray[np.uint8]  # (B, 3, height, width)
    items: list[Item]  # B of them, in order
    shapes: list[tuple[int, int]]  # of the photographs as read
    poses: list[Pose | None] = field(default_factory=list)  # that their parts were found in
    failures: list[tuple[Item, BadImage]] = field(default_factory=list)
    was_read: list[bool] = field(default_factory=list)  # of each photograph, in order


def digests(pixels: npt.NDArray[np.uint8]) -> list[str]:
    """A short hash of each photograph (B, 3, h, w)."""
    return [hashlib.blake2b(photo.tobytes(), digest_size=8).hexdigest() for photo in pixels]


def batches(
    items: Iterable[Item], preprocessing: Preprocessing, *, batch_size: int = 16, workers: int = 2
) -> Iterator[Batch[Item]]:
    """Read and scale photographs in threads, a few batches ahead of the consumer, in order.

    A photograph that cannot be read becomes a failure of its batch; the others go on. One alone needs no thread.
    """

    def prepare(item: Item) -> _Prepared:
        rgb, shape = preprocessing.read(item, preprocessing.enough)
        return *preprocessing.posed(rgb), shape

    source = iter(items)
    first = list(islice(source, 3 * batch_size))
    if len(first) == 1:
        yield _gather([(first[0], partial(prepare, first[0]))], preprocessing.size)
        return
    with ThreadPoolExecutor(max_workers=workers, thread_name_prefix="decode") as pool:
        ahead = [(item, pool.submit(prepare, item)) for item in first]
        try:
            while ahead:
                now, ahead = ahead[:batch_size], ahead[batch_size:]
                batch = _gather([(item, future.result) for item, future in now], preprocessing.size)
                ahead += [(item, pool.submit(prepare, item)) for item in islice(source, len(now))]
                yield batch
        finally:
            for _, future in ahead:
                future.cancel()


def _gather(now: Sequence[tuple[Item, Callable[[], _Prepared]]], size: tuple[int, int]) -> Batch[Item]:
    batch: Batch[Item] = Batch(np.empty((0, 3, *size), np.uint8), [], [])
    pixels = []
    for item, read in now:
        try:
            rgb, pose, shape = read()
        except BadImage as error:
            batch.failures.append((item, error))
            batch.was_read.append(False)
            continue
        batch.was_read.append(True)
        pixels.append(rgb)
        batch.items.append(item)
        batch.shapes.append(shape)
        batch.poses.append(pose)
    if pixels:
        batch.pixels = np.ascontiguousarray(np.stack(pixels).transpose(0, 3, 1, 2))
    return batch


def whole(
    items: Iterable[Item], preprocessing: Preprocessing
) -> Iterator[tuple[Item, npt.NDArray[np.uint8] | BadImage]]:
    """Photographs (H, W, 3) in their order, or what is wrong with them, for a model that sees them in tiles.

    The next one is read while one is in use, unless that one is very large: two of these need much memory.
    """

    def read(item: Item) -> npt.NDArray[np.uint8] | BadImage:
        try:
            return preprocessing.read(item)[0]
        except BadImage as error:
            return error

    source = iter(items)
    item = next(source, None)
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="decode") as thread:
        photo = None if item is None else read(item)
        while item is not None and photo is not None:
            following = next(source, None)
            at_once = isinstance(photo, BadImage) or photo.size <= 3 * READ_AHEAD
            future = thread.submit(read, following) if following is not None and at_once else None
            yield item, photo
            photo = None
            if following is not None:
                photo = read(following) if future is None else future.result()
            item = following
