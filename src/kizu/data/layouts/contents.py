"""What a recogniser makes of a folder, and what several of them need: masks by their names, a split of good images."""

import hashlib
import math
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from kizu.data.image import SUFFIXES
from kizu.data.layouts.folders import Folder, Names
from kizu.data.masks import read_mask
from kizu.data.sample import Sample
from kizu.errors import BadImage, DataError

__all__ = [
    "HELD_OUT",
    "NO_IMAGE_FOR_MASK",
    "USUAL",
    "Contents",
    "MaskFiles",
    "Recogniser",
    "ambiguous",
    "defective_by_mask",
    "hold_out",
]
__all__ += ["listed"]

NO_IMAGE_FOR_MASK = "is a mask, but no image has its name"
TEST_SHARE = 0.2  # of the good images of a plain folder
HELD_OUT = "are kept for the test split"
USUAL = 49  # good images to learn from, that the usual promise of 1 in 50 needs
_MASK_ENDING = re.compile(r"[_-](mask|gt|label|seg|segmentation)$", re.IGNORECASE)
_MASK_BEGINNING = re.compile(r"^(mask|gt|label|seg|segmentation)[_-]", re.IGNORECASE)


@dataclass
class Contents:
    """What a recogniser made of a folder."""

    layout: str
    samples: list[Sample] = field(default_factory=list)
    left_out: list[tuple[Path, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    used: set[Path] = field(default_factory=set)  # files other than images and their masks
    saturations: dict[str, Path] = field(default_factory=dict)  # category → LOCO's table of defects

    def add(self, other: "Contents") -> None:
        self.samples += other.samples
        self.left_out += other.left_out
        self.notes += [note for note in other.notes if note not in self.notes]
        self.used |= other.used
        self.saturations |= other.saturations


Recogniser = Callable[[Folder, str, Names], Contents | None]  # (folder, category, names); None: not this layout


class MaskFiles:
    """The masks below a folder, found for an image by its name."""

    def __init__(self, top: Folder, folders: Iterable[Folder]) -> None:
        self.top = top.path
        self.files: set[Path] = set()
        self._named: dict[tuple[Path, str], list[Path]] = defaultdict(list)  # (folder mirrored, stem)
        self._regions: dict[Path, list[Path]] = defaultdict(list)  # folder mirrored / stem
        for folder in folders:
            for mask in folder.all_images():
                mirrored = folder.path.parent / mask.parent.relative_to(folder.path)
                for stem in _stems(mask):
                    self._named[mirrored, stem].append(mask)
                self._regions[mirrored].append(mask)
                self.files.add(mask)
        self._add_neighbours(path for path in top.all_images() if path not in self.files)

    def _add_neighbours(self, paths: Iterable[Path]) -> None:
        """Take `<stem>_mask` beside `<stem>` as a mask; where none has its image, they are images themselves."""
        places = {(path.parent, path.stem): path for path in paths}
        endings = {place: _MASK_ENDING.sub("", place[1]) for place in places if _MASK_ENDING.search(place[1])}
        if any((parent, stem) in places for (parent, _), stem in endings.items()):
            for (parent, name), stem in endings.items():
                self._named[parent, stem].append(places[parent, name])
                self.files.add(places[parent, name])

    def of(self, image: Path) -> tuple[Path, ...]:
        for folder in self._mirrored(image.parent):
            masks = self._named.get((folder, image.stem))
            if not masks and folder.name == image.parent.name:
                masks = self._regions.get(folder / image.stem)
            if masks:
                return tuple(masks)
        return ()

    def _mirrored(self, folder: Path) -> Iterator[Path]:
        """Where masks of images in `folder` may be filed: below any folder above, leading folders left out."""
        yield folder
        parts = folder.relative_to(self.top).parts
        for depth in range(len(parts) - 1, -1, -1):
            for skipped in range(depth + 1, len(parts) + 1):
                yield self.top.joinpath(*parts[:depth], *parts[skipped:])

    def attach(self, contents: Contents, images: Iterable[Path]) -> None:
        """Give the anomalous samples their masks; leave out masks that fit several of them, or none of `images`."""
        owners: dict[Path, list[Path]] = defaultdict(list)
        for sample in contents.samples:
            for mask in self.of(sample.path) if sample.is_anomalous else ():
                owners[mask].append(sample.path)
        for index, sample in enumerate(contents.samples):
            if sample.is_anomalous:
                own = tuple(mask for mask in self.of(sample.path) if len(owners[mask]) == 1)
                contents.samples[index] = replace(sample, masks=own)
        unneeded = {mask for path in images if path not in self.files for mask in self.of(path)}
        contents.used |= self.files
        for mask in sorted(self.files):
            if len(owners[mask]) > 1:
                listed = ", ".join(str(image) for image in owners[mask][:2])
                contents.left_out.append(
                    (mask, f"is a mask that fits {len(owners[mask])} images by its name ({listed})")
                )
            elif not owners[mask] and mask not in unneeded:
                contents.left_out.append((mask, NO_IMAGE_FOR_MASK))


def _stems(mask: Path) -> set[str]:
    """What the image of a mask may be called, by the mask's name: 000_mask.png, mask_000.png, 000.jpg.png, 000.png."""
    stem = mask.stem
    plain = stem.removesuffix(Path(stem).suffix) if Path(stem).suffix.lower() in SUFFIXES else stem
    return {stem, plain, _MASK_ENDING.sub("", plain), _MASK_BEGINNING.sub("", plain)}


def defective_by_mask(images: Sequence[Path], masks: MaskFiles) -> dict[Path, bool | BadImage | None]:
    """Whether an image's masks have a white pixel; None without masks."""

    def judge(image: Path) -> bool | BadImage | None:
        try:
            own = masks.of(image)
            return any(bool(read_mask(mask).any()) for mask in own) if own else None
        except BadImage as error:
            return error

    with ThreadPoolExecutor() as pool:
        return dict(zip(images, pool.map(judge, images), strict=True))


def hold_out(contents: Contents, top: Path) -> None:
    """Move the defects and, if there are any, a fixed share of the good images from train to test."""
    good = [sample.path for sample in contents.samples if not sample.is_anomalous]
    if len(good) == len(contents.samples):
        return
    good.sort(key=lambda path: hashlib.blake2b(os.fsencode(path.relative_to(top).as_posix())).digest())
    kept = set(good[: _held_out(len(good))])
    contents.samples = [
        replace(sample, split="test") if sample.is_anomalous or sample.path in kept else sample
        for sample in contents.samples
    ]
    if kept:
        contents.notes.append(
            f"{len(kept)} of the {len(good)} good images, chosen by a hash of the file name, {HELD_OUT}."
        )


def _held_out(good: int) -> int:
    """How many of the good images are tested on: a fifth; fewer, down to a tenth, where that leaves `USUAL`."""
    if good < 2:
        return 0
    fifth = max(1, round(TEST_SHARE * good))
    return good - USUAL if good - fifth < USUAL <= good - math.ceil(good / 10) else fifth


def ambiguous(folder: Folder, candidates: Sequence[str], otherwise: str) -> DataError:
    return DataError(
        f"None of the folders in {folder.path} is known to hold good images (found: {listed(candidates)}). Name the "
        f'one that does (`good="FOLDER"`); folders beside it then hold defects.{otherwise}'
    )


def listed(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
