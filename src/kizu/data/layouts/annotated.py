"""Images beside a file of annotations, as labelling tools export them."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from kizu.data.layouts.annotations import SUFFIXES, Annotated, Annotations, plain_name, read_annotations
from kizu.data.layouts.contents import Contents, hold_out
from kizu.data.layouts.folders import Folder, Names
from kizu.data.sample import Sample
from kizu.errors import DataError

__all__ = ["annotated"]

MAX_FILES = 50  # of JSON or XML that are looked into
SPLITS = {"train": "train", "training": "train", "val": "validation", "valid": "validation", "validation": "validation"}
SPLITS |= {"test": "test", "testing": "test"}
LEARNED_FROM = {name for name, split in SPLITS.items() if split != "test"}
COMBINED = "+"  # between the types of an image that has several


def annotated(folder: Folder, category: str, names: Names) -> Contents | None:
    """Images of which a file says what is to be seen on them.

    Those with nothing marked, or with what is called good, are good, and so are those that no file names in a folder
    that is called good. Defects are never learned from: where they lie in a folder of training images they count among
    the test images. Regions become masks.
    """
    train = folder.get("train", "training")
    if train is not None and any(names.is_good(inner.name) for inner in train.filled()):
        return None  # the folders say it
    found = list(_files(folder))
    if not found:
        return None
    contents = Contents("annotated", used={annotations.path for annotations in found})
    images = _Images(folder)
    moved = 0
    for annotations in found:
        for entry in annotations.images:
            image = images.of(entry.name, annotations.path.parent)
            if image is None:
                contents.left_out.append((annotations.path.parent / entry.name, _missing(annotations)))
            elif image not in images.taken:
                images.taken.add(image)
                sample = _sample(entry, image, folder, category, names, images.of(entry.mask, annotations.path.parent))
                moved += sample.is_anomalous and _outermost(image, folder) in LEARNED_FROM
                contents.samples.append(sample)
    masks = {mask for sample in contents.samples for mask in sample.masks}
    contents.samples = [sample for sample in contents.samples if sample.path not in masks]
    unnamed = [image for image in folder.all_images() if image not in images.taken and image not in masks]
    for image in unnamed:
        if names.label(image.relative_to(folder.path).parts[:-1]) == "good":
            contents.samples.append(Sample(image, category, _split(image, folder), "good"))
        else:
            contents.left_out.append((image, "is in no file of annotations, so nobody said that it is good"))
    if not any(not sample.is_anomalous for sample in contents.samples):
        raise DataError(
            f"Every image that {found[0].path} names in {folder.path} shows a defect: add images of good parts, and "
            "export the annotations with the images on which nothing is marked."
        )
    tools = " and ".join(dict.fromkeys(annotations.tool for annotations in found))
    contents.notes.append(f"Annotations of {tools} say which images are good, and where defects are.")
    if moved:
        contents.notes.append(f"Images in train that show defects, and are for testing only: {moved}.")
    if not {sample.split for sample in contents.samples if not sample.is_anomalous} - {"train"}:
        hold_out(contents, folder.path)
    return contents


def _files(folder: Folder) -> Iterator[Annotations]:
    candidates = [path for inner in folder.tree() for path, _ in inner.others]
    candidates = [path for path in candidates if path.suffix.lower() in SUFFIXES]
    for path in candidates[:MAX_FILES]:
        if (annotations := read_annotations(path)) is not None:
            yield annotations


class _Images:
    """The images below a folder, by the ends of their paths."""

    def __init__(self, folder: Folder) -> None:
        self.taken: set[Path] = set()
        self._named: dict[str, list[Path]] = defaultdict(list)
        for image in folder.all_images():
            self._named[image.name.casefold()].append(image)

    def of(self, name: str, beside: Path) -> Path | None:
        """The image that an annotation calls so: the one that shares most of the path's end, or else lies nearest."""
        if not name:
            return None
        parts = [
            part.casefold() for part in PurePosixPath(name.replace("\\", "/")).parts if part not in ("/", ".", "..")
        ]
        candidates = self._named.get(parts[-1] if parts else "") or self._named.get(plain_name(name).casefold()) or []
        return max(
            candidates, key=lambda image: (_shared_end(image, parts), image.is_relative_to(beside)), default=None
        )


def _shared_end(image: Path, parts: Sequence[str]) -> int:
    shared = 0
    for own, other in zip(reversed(image.parts), reversed(parts), strict=False):
        if own.casefold() != other:
            break
        shared += 1
    return shared


def _sample(entry: Annotated, image: Path, folder: Folder, category: str, names: Names, mask: Path | None) -> Sample:
    marks = [mark for mark in entry.marks if not names.is_good(mark.label)]
    if not marks:
        return Sample(image, category, _split(image, folder), "good")
    defect = COMBINED.join(sorted({mark.label.replace("/", "-") for mark in marks}))
    shapes = tuple(mark.shape for mark in marks if mark.shape is not None)
    return Sample(image, category, "test", defect, (mask,) if mask else (), shapes)


def _split(image: Path, folder: Folder) -> str:
    return SPLITS.get(_outermost(image, folder), "train")


def _outermost(image: Path, folder: Folder) -> str:
    """The name of the first folder on the way to an image that says what it is for."""
    parts = [part.casefold() for part in image.relative_to(folder.path).parts[:-1]]
    return next((part for part in parts if part in SPLITS), "")


def _missing(annotations: Annotations) -> str:
    return f"is named in {annotations.path.name}, but is not there"
