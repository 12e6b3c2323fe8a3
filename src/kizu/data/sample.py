"""One image of a data set: where it is, and what is known of it."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kizu.data.image import WHITE, read_at_least
from kizu.data.masks import Shape, read_mask
from kizu.errors import BadImage, DataError

__all__ = ["CIFAR_RECORD", "CIFAR_SIDE", "Sample"]

CIFAR_SIDE = 32
CIFAR_RECORD = 1 + 3 * CIFAR_SIDE**2  # bytes: the class, then red, green and blue planes


@dataclass(frozen=True)
class Sample:
    """One image of a data set, and what is known of it."""

    path: Path
    category: str
    split: str  # "train", "validation" or "test"
    defect: str  # "good" or the type of defect
    masks: tuple[Path, ...] = ()
    shapes: tuple[Shape, ...] = ()  # regions of defects that are in no file of their own
    index: int | None = None  # record inside a packed file

    @property
    def is_anomalous(self) -> bool:
        return self.defect != "good"

    @property
    def has_mask(self) -> bool:
        """Whether it is known where the defect is."""
        return bool(self.masks or self.shapes)

    def name(self, root: Path) -> str:
        """Path relative to the data set, with forward slashes, and #record for a packed file."""
        path = self.path.relative_to(root) if self.path.is_relative_to(root) else self.path
        return path.as_posix() + ("" if self.index is None else f"#{self.index}")

    @property
    def source(self) -> Path | None:
        """The file of its own, if it has one."""
        return self.path if self.index is None else None

    def read(
        self, at_least: tuple[int, int] | None = None, white: int = WHITE, *, large: bool = False
    ) -> tuple[npt.NDArray[np.uint8], tuple[int, int]]:
        """The image as RGB uint8 (H, W, 3), no smaller than `at_least`, and its own (H, W). Raises `BadImage`."""
        if self.index is None:
            return read_at_least(self.path, at_least, white, large=large)
        try:
            with self.path.open("rb") as file:
                file.seek(self.index * CIFAR_RECORD + 1)
                planes = np.frombuffer(file.read(CIFAR_RECORD - 1), np.uint8)
            rgb = np.ascontiguousarray(planes.reshape(3, CIFAR_SIDE, CIFAR_SIDE).transpose(1, 2, 0))
            return rgb, (CIFAR_SIDE, CIFAR_SIDE)
        except (OSError, ValueError) as error:
            raise BadImage(f"{self.path}#{self.index}", f"cannot be read ({error})") from None

    def mask(self, shape: tuple[int, int]) -> npt.NDArray[np.bool_] | None:
        """Where the defect is, bool (H, W): zeros for a good image, None for a defect without masks.

        Raises `DataError` when a mask's size is not `shape`, the image's.
        """
        if self.is_anomalous and not self.has_mask:
            return None
        union = np.zeros(shape, dtype=np.bool_)
        for path in self.masks if self.is_anomalous else ():
            region = read_mask(path)
            if region.shape != union.shape:
                raise DataError(
                    f"The mask {path} has {region.shape[1]}×{region.shape[0]} pixels but its image {self.path} has "
                    f"{shape[1]}×{shape[0]}: scale the mask to its image, or remove it."
                )
            union |= region
        for drawing in self.shapes if self.is_anomalous else ():
            union |= drawing.drawn(shape)
        return union
