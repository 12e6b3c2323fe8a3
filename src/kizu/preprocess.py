"""From photographs to fixed-size uint8 batches, and from maps back to photographs."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from kizu import image as images
from kizu.errors import BadImage

__all__ = ["Batch", "Preprocessing", "Readable", "batches"]


class Readable(Protocol):
    """Anything that can be read as a photograph: a sample of a data set, or a `Photo`."""

    def read(self) -> npt.NDArray[np.uint8]: ...


Item = TypeVar("Item", bound=Readable)


@dataclass(frozen=True)
class Preprocessing:
    """How a photograph becomes the network's input of `size` (height, width).

    Without `resize` the whole photograph is scaled to `size`, whatever its shape. With it, the shorter side is
    scaled to `resize` and the centre of `size` is cut out, as the papers do.
    """

    size: tuple[int, int]
    resize: int | None = None

    def __call__(self, rgb: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """(H, W, 3) uint8 → (height, width, 3) uint8."""
        if self.resize is None:
            return images.resize(rgb, self.size)
        scaled = images.resize(rgb, self._scaled(rgb.shape[:2]))
        top, left = self._corner(scaled.shape[:2])
        return scaled[top : top + self.size[0], left : left + self.size[1]]

    def restore(self, anomaly_map: images.Float, shape: tuple[int, int]) -> images.Float:
        """Lay a map of `size` back over a photograph of `shape`. What was cropped away gets the map's minimum."""
        if self.resize is None:
            return images.resize_map(anomaly_map, shape)
        scaled = self._scaled(shape)
        top, left = self._corner(scaled)
        canvas = np.full(scaled, anomaly_map.min(), dtype=np.float32)
        canvas[top : top + self.size[0], left : left + self.size[1]] = anomaly_map
        return images.resize_map(canvas, shape)

    def _scaled(self, shape: tuple[int, ...]) -> tuple[int, int]:
        assert self.resize is not None
        factor = max(self.resize / min(shape[:2]), self.size[0] / shape[0], self.size[1] / shape[1])
        return max(self.size[0], round(shape[0] * factor)), max(self.size[1], round(shape[1] * factor))

    def _corner(self, shape: tuple[int, ...]) -> tuple[int, int]:
        return (shape[0] - self.size[0]) // 2, (shape[1] - self.size[1]) // 2


@dataclass
class Batch(Generic[Item]):
    """Up to a batch size of photographs that could be read, and those that could not."""

    pixels: npt.NDArray[np.uint8]  # (B, 3, height, width)
    items: list[Item]  # B of them, in order
    shapes: list[tuple[int, int]]  # of the photographs as read
    failures: list[tuple[Item, BadImage]] = field(default_factory=list)


def batches(
    items: Iterable[Item], preprocessing: Preprocessing, *, batch_size: int = 16, workers: int = 2
) -> Iterator[Batch[Item]]:
    """Read and scale photographs in threads, a few batches ahead of the consumer, in order.

    A photograph that cannot be read becomes a failure of its batch; the others go on.
    """

    def prepare(item: Item) -> tuple[npt.NDArray[np.uint8], tuple[int, int]]:
        rgb = item.read()
        return preprocessing(rgb), (rgb.shape[0], rgb.shape[1])

    with ThreadPoolExecutor(max_workers=workers, thread_name_prefix="decode") as pool:
        source = iter(items)
        ahead = [(item, pool.submit(prepare, item)) for item in islice(source, 3 * batch_size)]
        try:
            while ahead:
                now, ahead = ahead[:batch_size], ahead[batch_size:]
                batch = _gather(now, preprocessing.size)
                ahead += [(item, pool.submit(prepare, item)) for item in islice(source, len(now))]
                yield batch
        finally:
            for _, future in ahead:
                future.cancel()


def _gather(
    now: Sequence[tuple[Item, Future[tuple[npt.NDArray[np.uint8], tuple[int, int]]]]], size: tuple[int, int]
) -> Batch[Item]:
    batch: Batch[Item] = Batch(np.empty((0, 3, *size), np.uint8), [], [])
    pixels = []
    for item, future in now:
        try:
            rgb, shape = future.result()
        except BadImage as error:
            batch.failures.append((item, error))
            continue
        pixels.append(rgb)
        batch.items.append(item)
        batch.shapes.append(shape)
    if pixels:
        batch.pixels = np.ascontiguousarray(np.stack(pixels).transpose(0, 3, 1, 2))
    return batch
