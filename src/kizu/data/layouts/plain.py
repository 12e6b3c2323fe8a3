"""Plain folders of images: good ones alone, or good and bad ones in folders named so."""

import os
from pathlib import Path

from kizu.data.layouts.contents import Contents, MaskFiles, ambiguous, defective_by_mask, hold_out, listed
from kizu.data.layouts.folders import Folder, Names, is_mask_folder
from kizu.data.sample import Sample
from kizu.errors import BadImage, DataError

__all__ = ["named_folders", "sole_folder", "unnamed_folder"]


def named_folders(folder: Folder, category: str, names: Names) -> Contents | None:
    """A plain folder in which at least one sub-folder's name says good or bad."""
    trunk = folder
    while (inner := sole_folder(trunk, names)) is not None:
        trunk = inner
    if not any(names.known(inner.name) for inner in trunk.filled()):
        return None
    contents = Contents("folder")
    masks = MaskFiles(folder, [inner for inner in folder.tree() if inner is not folder and is_mask_folder(inner)])
    images = [image for image in trunk.all_images() if image not in masks.files]
    labels = {image: names.label(image.relative_to(trunk.path).parts[:-1]) for image in images}
    _label_the_unnamed(contents, trunk, labels, names)
    if "good" not in labels.values():
        raise DataError(
            f"{trunk.path} holds images of defects only: add a folder of good images to learn from, for example "
            f"{trunk.path / 'good'}."
        )
    contents.samples = [Sample(image, category, "train", label) for image, label in labels.items() if label is not None]
    hold_out(contents, folder.path)
    masks.attach(contents, images)
    return contents


def _label_the_unnamed(contents: Contents, trunk: Folder, labels: dict[Path, str | None], names: Names) -> None:
    """Settle images whose folder is named neither good nor bad, or say why that cannot be settled."""
    unnamed = [image for image, label in labels.items() if label is None]
    nested = sorted({image.relative_to(trunk.path).parts[0] for image in unnamed if image.parent != trunk.path})
    has_good = "good" in labels.values()
    has_bad = any(label not in (None, "good") for label in labels.values())
    if not has_good and nested and not names.bad:
        raise ambiguous(trunk, nested, "")
    if unnamed and not has_good:
        labels |= dict.fromkeys(unnamed, "good")
        contents.notes.append(f"All images of {trunk.name} outside the folder of bad ones are taken as good.")
    elif nested and (not has_bad or (names.good is not None and not names.bad)):
        labels |= {
            image: image.parent.relative_to(trunk.path).as_posix() for image in unnamed if image.parent != trunk.path
        }
        contents.notes.append(f"These folders beside the good images are taken as types of defect: {listed(nested)}.")
    for image in unnamed:
        if labels[image] is None:
            contents.left_out.append((image, "is beside folders named good or bad, but in neither"))


def unnamed_folder(folder: Folder, category: str, all_good: bool) -> Contents:
    """A plain folder without names that say good or bad: images of good parts, unless a mask shows a defect.

    Raises `DataError` when the images lie in several folders, unless the user said that all are good.
    """
    masks = MaskFiles(folder, [inner for inner in folder.tree() if inner is not folder and is_mask_folder(inner)])
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
        raise ambiguous(folder, nested, way_out)
    contents = Contents("folder")
    for image, defective in defective_by_mask(images, masks).items():
        if isinstance(defective, BadImage):
            contents.left_out.append((image, f"has a mask that cannot be read: {defective}"))
        else:
            contents.samples.append(Sample(image, category, "train", "defect" if defective else "good"))
    if any(sample.is_anomalous for sample in contents.samples):
        contents.notes.append("No folder is named good or bad: images whose mask is not black are taken as defects.")
    else:
        contents.notes.append("No folder is named good or bad: all images are taken as images of good parts.")
    hold_out(contents, folder.path)
    masks.attach(contents, images)
    return contents


def sole_folder(folder: Folder, names: Names) -> Folder | None:
    """The one sub-folder that holds all images, when its name says neither good nor bad."""
    filled = [inner for inner in folder.filled() if not is_mask_folder(inner)]
    return filled[0] if len(filled) == 1 and not folder.images and not names.known(filled[0].name) else None
