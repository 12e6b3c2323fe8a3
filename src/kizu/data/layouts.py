"""How data sets lay out their files: one recogniser each, from a folder to samples.

mvtec     train/good, test/<defect>, ground_truth/<defect>/<stem>_mask.png or <stem>.png; MPDD is the same
loco      mvtec with validation/good, and a folder of masks for each image, one for each region
btad      train/ok, test/ok, test/ko, ground_truth/ko
visa      a table, split_csv/1cls.csv, that gives every image its split, label and mask
ksdd      kos01/Part0.jpg beside kos01/Part0_label.bmp; a black label means good
ksdd2     train/10000.png beside train/10000_GT.png; a black label means good
cifar10   data_batch_1.bin …; each class in turn is the good one
folder    plain images: good ones alone, or good and bad ones in folders named so
"""

import csv
import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from kizu.data.folders import Folder, Names, is_mask_folder
from kizu.data.image import SUFFIXES
from kizu.data.masks import CONFIG_NAME, read_mask
from kizu.data.sample import CIFAR_RECORD, Sample
from kizu.errors import BadImage, DataError

__all__ = ["EXPECTED", "NO_IMAGE_FOR_MASK", "RECOGNISERS", "Contents", "sole_folder", "unnamed_folder"]

EXPECTED = {
    "mvtec": "train/good, test/<defect> and, for masks, ground_truth/<defect>",
    "loco": "train/good, validation/good and test/logical_anomalies or test/structural_anomalies",
    "btad": "train/ok, test/ok and test/ko",
    "visa": "split_csv/1cls.csv",
    "ksdd": "folders kos01, kos02, … with Part0.jpg and Part0_label.bmp",
    "ksdd2": "train and test with 10000.png and 10000_GT.png",
    "cifar10": "data_batch_1.bin, …, test_batch.bin and batches.meta.txt",
    "folder": "images, or folders of images named good and bad",
}
NO_IMAGE_FOR_MASK = "is a mask, but no image has its name"
TEST_SHARE = 0.2  # of the good images of a plain folder
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


class _Masks:
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


def _splits(folder: Folder, category: str, names: Names) -> Contents | None:
    """MVTec AD, MPDD, MVTec LOCO and BTAD."""
    train, test = folder.get("train", "training"), folder.get("test", "testing")
    validation = folder.get("validation", "val", "valid")
    if not any(part and any(part.all_images()) for part in (train, test)):
        return None
    if train is None or not any(train.all_images()):
        raise DataError(
            f"{folder.path} holds test images only: put images of good parts to learn from into "
            f"{folder.path / 'train' / 'good'}."
        )
    contents = Contents("mvtec")
    if test and test.get("logical_anomalies", "structural_anomalies"):
        contents.layout = "loco"
        table = folder.path / CONFIG_NAME
        if table.is_file():
            contents.saturations[category] = table
            contents.used.add(table)
    elif train.get("ok") and test and test.get("ko"):
        contents.layout = "btad"
    for split, part in (("train", train), ("validation", validation)):
        if part:
            _take_good(contents, part, category, split, names)
    for image in test.all_images() if test else ():
        parts = image.relative_to(test.path).parts[:-1] if test else ()
        if parts:
            contents.samples.append(Sample(image, category, "test", names.label(parts) or "/".join(parts)))
        else:
            contents.left_out.append(
                (image, "lies in test itself; its folder there must say good or the type of defect")
            )
    masks = _Masks(folder, [inner for inner in folder.folders if is_mask_folder(inner)])
    contents.samples = [sample for sample in contents.samples if sample.path not in masks.files]
    contents.left_out = [(path, reason) for path, reason in contents.left_out if path not in masks.files]
    masks.attach(contents, folder.all_images())
    return contents


def _take_good(contents: Contents, part: Folder, category: str, split: str, names: Names) -> None:
    """Add the good images of a train or validation folder; leave out the others."""
    filled = part.filled()
    good = [inner for inner in filled if names.is_good(inner.name)]
    if not filled:
        good = [part]
        if part.images:
            contents.notes.append(f"All images directly in {part.name} are taken as images of good parts.")
    elif not good and split == "train":
        raise _ambiguous(part, [inner.name for inner in filled if not names.is_bad(inner.name)] or ["NAME"], "")
    taken = {image for inner in good for image in inner.all_images()}
    contents.samples += [Sample(image, category, split, "good") for image in sorted(taken)]
    for image in part.all_images():
        if image not in taken:
            reason = f"is in {part.name} but not in a folder of good images; {part.name} takes nothing else"
            contents.left_out.append((image, reason))


def _visa(folder: Folder, category: str, names: Names) -> Contents | None:
    tables = [folder.path / "split_csv" / "1cls.csv", folder.path / "1cls.csv"]
    table = next((path for path in tables if path.is_file()), None)
    if table is None:
        return None
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{table} cannot be read as a table ({error}).") from None
    missing = {"object", "split", "label", "image", "mask"} - set(rows[0] if rows else ())
    if missing:
        raise DataError(f"{table} lacks rows, or the columns {', '.join(sorted(missing))}: copy it from VisA again.")
    contents = Contents("visa", used={table})
    present = set(folder.all_images())
    for row in rows:
        image, mask = (folder.path / (row[key] or "").strip().replace("\\", "/") for key in ("image", "mask"))
        split, label = row["split"], {"normal": "good", "anomaly": "anomaly"}.get(row["label"])
        if image not in present:
            contents.left_out.append((image, f"is listed in {table.name} but is not there"))
        elif split not in ("train", "validation", "test") or label is None:
            contents.left_out.append((image, f"has the split '{split}' and label '{row['label']}' in {table.name}"))
        elif split != "test" and label != "good":
            contents.left_out.append((image, f"shows a defect but is in {split}, which takes good images only"))
        else:
            listed = label != "good" and mask != folder.path
            if listed and mask not in present:
                contents.left_out.append((mask, f"is listed as a mask in {table.name} but is not there"))
            masks = (mask,) if listed and mask in present else ()
            contents.samples.append(Sample(image, row["object"], split, label, masks))
    return contents


def _ksdd(folder: Folder, category: str, names: Names) -> Contents | None:
    items = [inner for inner in folder.folders if re.fullmatch(r"kos\d+", inner.name, re.IGNORECASE)]
    masks = _Masks(folder, []) if items else None
    if masks is None or not masks.files:
        return None
    contents = Contents("ksdd")
    contents.notes.append(
        "KolektorSDD has no split of its own: every second item folder, in order of name, is for testing; of the "
        "others the good images are for training."
    )
    splits = {image: "train" if n % 2 == 0 else "test" for n, item in enumerate(items) for image in item.images}
    return _by_labels(contents, splits, category, masks)


def _ksdd2(folder: Folder, category: str, names: Names) -> Contents | None:
    parts = {split: folder.get(split) for split in ("train", "test")}
    splits = {image: split for split, part in parts.items() if part for image in part.images}
    masks = _Masks(folder, []) if splits else None
    if masks is None or not masks.files.intersection(splits):
        return None
    return _by_labels(Contents("ksdd2"), splits, category, masks)


def _by_labels(contents: Contents, splits: dict[Path, str], category: str, masks: _Masks) -> Contents:
    """Add images that their label image, black or not, calls good or defective."""
    images = [image for image in splits if image not in masks.files]
    for image, defective in _defective(images, masks).items():
        if isinstance(defective, BadImage):
            contents.left_out.append((image, f"has a label that cannot be read: {defective}"))
        elif defective is None:
            contents.left_out.append((image, "has no label image beside it"))
        elif defective and splits[image] == "train":
            contents.left_out.append((image, "shows a defect but is in train, which takes good images only"))
        else:
            contents.samples.append(Sample(image, category, splits[image], "defect" if defective else "good"))
    masks.attach(contents, images)
    return contents


def _defective(images: Sequence[Path], masks: _Masks) -> dict[Path, bool | BadImage | None]:
    """Whether an image's masks have a white pixel; None without masks."""

    def judge(image: Path) -> bool | BadImage | None:
        try:
            own = masks.of(image)
            return any(bool(read_mask(mask).any()) for mask in own) if own else None
        except BadImage as error:
            return error

    with ThreadPoolExecutor() as pool:
        return dict(zip(images, pool.map(judge, images), strict=True))


def _cifar10(folder: Folder, category: str, names: Names) -> Contents | None:
    """One category for each class: learned from its training records, tested on all test records."""
    for place in (folder, *folder.folders):
        batches = [path for path, _ in place.others if re.fullmatch(r"(data_batch_\d+|test_batch)\.bin", path.name)]
        if any(path.name.startswith("data") for path in batches):
            break
        if {"data_batch_1", "batches.meta"} <= {path.name for path, _ in place.others}:
            raise DataError(
                f"{place.path} is the Python version of CIFAR-10, made of pickles, which kizu does not open because "
                "they can run code. Use the binary version, cifar-10-binary.tar.gz, of the same images."
            )
    else:
        return None
    table = place.path / "batches.meta.txt"
    if not table.is_file():
        raise DataError(f"{table}, the names of the classes, is missing: copy it from the same archive.")
    classes = table.read_text(encoding="utf-8", errors="replace").split()
    contents = Contents("cifar10", used={table, *batches})
    if len(batches) < 6:
        contents.notes.append(f"Only {len(batches)} of the 6 batches of CIFAR-10 are in {place.path}.")
    for path in batches:
        content = np.fromfile(path, np.uint8)
        if content.size == 0 or content.size % CIFAR_RECORD:
            raise DataError(f"{path} is not a whole number of {CIFAR_RECORD}-byte records: unpack the archive again.")
        labels = content[::CIFAR_RECORD]
        if labels.max() >= len(classes):
            raise DataError(f"{path} holds class {labels.max()}, but {table} names only {len(classes)} classes.")
        for index, label in enumerate(labels.tolist()):
            if path.name == "test_batch.bin":
                for one in classes:
                    defect = "good" if one == classes[label] else classes[label]
                    contents.samples.append(Sample(path, one, "test", defect, index=index))
            else:
                contents.samples.append(Sample(path, classes[label], "train", "good", index=index))
    return contents


def _named_folders(folder: Folder, category: str, names: Names) -> Contents | None:
    """A plain folder in which at least one sub-folder's name says good or bad."""
    trunk = folder
    while (inner := sole_folder(trunk, names)) is not None:
        trunk = inner
    if not any(names.known(inner.name) for inner in trunk.filled()):
        return None
    contents = Contents("folder")
    masks = _Masks(folder, [inner for inner in folder.tree() if inner is not folder and is_mask_folder(inner)])
    images = [image for image in trunk.all_images() if image not in masks.files]
    labels = {image: names.label(image.relative_to(trunk.path).parts[:-1]) for image in images}
    _label_the_unnamed(contents, trunk, labels, names)
    if "good" not in labels.values():
        raise DataError(
            f"{trunk.path} holds images of defects only: add a folder of good images to learn from, for example "
            f"{trunk.path / 'good'}."
        )
    contents.samples = [Sample(image, category, "train", label) for image, label in labels.items() if label is not None]
    _hold_out(contents, folder.path)
    masks.attach(contents, images)
    return contents


def _label_the_unnamed(contents: Contents, trunk: Folder, labels: dict[Path, str | None], names: Names) -> None:
    """Settle images whose folder is named neither good nor bad, or say why that cannot be settled."""
    unnamed = [image for image, label in labels.items() if label is None]
    nested = sorted({image.relative_to(trunk.path).parts[0] for image in unnamed if image.parent != trunk.path})
    has_good = "good" in labels.values()
    has_bad = any(label not in (None, "good") for label in labels.values())
    if not has_good and nested and not names.bad:
        raise _ambiguous(trunk, nested, "")
    if unnamed and not has_good:
        labels |= dict.fromkeys(unnamed, "good")
        contents.notes.append(f"All images of {trunk.name} outside the folder of bad ones are taken as good.")
    elif nested and (not has_bad or (names.good is not None and not names.bad)):
        labels |= {
            image: image.parent.relative_to(trunk.path).as_posix() for image in unnamed if image.parent != trunk.path
        }
        contents.notes.append(f"These folders beside the good images are taken as types of defect: {_listed(nested)}.")
    for image in unnamed:
        if labels[image] is None:
            contents.left_out.append((image, "is beside folders named good or bad, but in neither"))


def unnamed_folder(folder: Folder, category: str, all_good: bool) -> Contents:
    """A plain folder without names that say good or bad: images of good parts, unless a mask shows a defect.

    Raises `DataError` when the images lie in several folders, unless the user said that all are good.
    """
    masks = _Masks(folder, [inner for inner in folder.tree() if inner is not folder and is_mask_folder(inner)])
    images = [image for image in folder.all_images() if image not in masks.files]
    places = sorted({image.parent.relative_to(folder.path).as_posix() for image in images})
    if not images:
        raise DataError(f"{folder.path} holds masks only: the images that they belong to are missing.")
    if len(places) > 1 and not all_good:
        above = Path(os.path.commonpath(places))
        nested = sorted({Path(place).relative_to(above).parts[0] for place in places if Path(place) != above})
        way_out = ' If all images are of good parts, say `layout="folder"`.'
        if above.as_posix() in places and len(nested) == 1:
            way_out += f' If only {nested[0]} holds defects, say `bad="{nested[0]}"`.'
        raise _ambiguous(folder, nested, way_out)
    contents = Contents("folder")
    for image, defective in _defective(images, masks).items():
        if isinstance(defective, BadImage):
            contents.left_out.append((image, f"has a mask that cannot be read: {defective}"))
        else:
            contents.samples.append(Sample(image, category, "train", "defect" if defective else "good"))
    if any(sample.is_anomalous for sample in contents.samples):
        contents.notes.append("No folder is named good or bad: images whose mask is not black are taken as defects.")
    else:
        contents.notes.append("No folder is named good or bad: all images are taken as images of good parts.")
    _hold_out(contents, folder.path)
    masks.attach(contents, images)
    return contents


def sole_folder(folder: Folder, names: Names) -> Folder | None:
    """The one sub-folder that holds all images, when its name says neither good nor bad."""
    filled = [inner for inner in folder.filled() if not is_mask_folder(inner)]
    return filled[0] if len(filled) == 1 and not folder.images and not names.known(filled[0].name) else None


def _hold_out(contents: Contents, top: Path) -> None:
    """Move the defects and, if there are any, a fixed share of the good images from train to test."""
    good = [sample.path for sample in contents.samples if not sample.is_anomalous]
    if len(good) == len(contents.samples):
        return
    good.sort(key=lambda path: hashlib.blake2b(os.fsencode(path.relative_to(top).as_posix())).digest())
    kept = set(good[: max(1, round(TEST_SHARE * len(good)))] if len(good) > 1 else ())
    contents.samples = [
        replace(sample, split="test") if sample.is_anomalous or sample.path in kept else sample
        for sample in contents.samples
    ]
    if kept:
        contents.notes.append(
            f"{TEST_SHARE:.0%} of the good images, chosen by a hash of the file name, are kept for the test split."
        )


def _ambiguous(folder: Folder, candidates: Sequence[str], otherwise: str) -> DataError:
    return DataError(
        f"None of the folders in {folder.path} is known to hold good images (found: {_listed(candidates)}). Name the "
        f'one that does (`good="FOLDER"`); folders beside it then hold defects.{otherwise}'
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


RECOGNISERS: tuple[tuple[tuple[str, ...], Recogniser], ...] = (
    (("visa",), _visa),
    (("cifar10",), _cifar10),
    (("ksdd",), _ksdd),
    (("ksdd2",), _ksdd2),
    (("mvtec", "loco", "btad"), _splits),
    (("folder",), _named_folders),
)
