"""Folders of images: find out how they are laid out, and what each image is."""

import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kizu.data.layouts import EXPECTED, RECOGNISERS
from kizu.data.layouts.contents import Contents
from kizu.data.layouts.folders import Folder, Names, is_mask_folder, walk
from kizu.data.layouts.plain import sole_folder, unnamed_folder
from kizu.data.masks import Saturations, read_saturations
from kizu.data.photographs import is_photograph
from kizu.data.sample import Sample
from kizu.errors import DataError, OptionError, did_you_mean

__all__ = ["LAYOUTS", "Dataset", "Sample", "find"]

LAYOUTS: tuple[str, ...] = tuple(EXPECTED)
SPLITS = ("train", "validation", "test")
OTHER_MASKS = {".npy", ".npz", ".mat", ".json", ".xml", ".txt", ".csv", ".pt"}


@dataclass(frozen=True)
class Dataset:
    """The samples found in a folder."""

    root: Path
    layout: str  # one of LAYOUTS
    samples: tuple[Sample, ...]
    left_out: tuple[tuple[Path, str], ...] = ()  # what is in the folder but not used, and why
    notes: tuple[str, ...] = ()  # decisions that the user must know of
    saturations: Mapping[str, Saturations] = field(default_factory=dict)  # category → LOCO's saturation thresholds

    @property
    def categories(self) -> list[str]:
        return list(dict.fromkeys(sample.category for sample in self.samples))

    @property
    def remarks(self) -> list[str]:
        """The notes, and how many files are left out for each reason."""
        found = Counter(reason for path, reason in self.left_out if is_photograph(path) or path.is_dir())
        first = {reason: path for path, reason in reversed(self.left_out)}
        return [
            *self.notes,
            *(f"{count} left out, such as {first[reason].name}, which {reason}." for reason, count in found.items()),
        ]

    def select(self, category: str | None = None, split: str | None = None) -> list[Sample]:
        """The samples of one category, one split, or both."""
        return [
            sample for sample in self.samples if category in (None, sample.category) and split in (None, sample.split)
        ]


def find(
    path: str | Path,
    *,
    layout: str = "auto",
    categories: Sequence[str] = (),
    good: str | None = None,
    bad: str | Sequence[str] = (),
    defects_config: str | Path | None = None,
) -> Dataset:
    """Find out how a folder of images is laid out and what each image is.

    `layout` is "auto" or one of `LAYOUTS`; `categories` keeps only these; `good` names a folder of good images and
    `bad` one or several of bad ones, whose own names do not say so; `defects_config` is used in place of LOCO's own
    defects_config.json.

    Raises `DataError` when there is nothing to learn from or the folder can be read in two ways, and
    `OptionError` for a layout, category or folder name that does not exist.
    """
    root = _checked_folder(Path(path).expanduser())
    if layout not in ("auto", *LAYOUTS):
        hint = did_you_mean(layout, LAYOUTS)
        raise OptionError(f'`layout="{layout}"` is unknown; choose from auto, {", ".join(LAYOUTS)}.{hint}')
    folder = walk(root)
    names = _checked_names(folder, good, (bad,) if isinstance(bad, str) else tuple(bad))
    contents = _contents(folder, layout, names)
    known = sorted({sample.category for sample in contents.samples})
    unknown = [category for category in categories if category not in known]
    if unknown:
        raise OptionError(f"{root} has no category {', '.join(unknown)}; it has {', '.join(known)}.")
    dropped = {category for category in known if categories and category not in categories}
    samples = [sample for sample in contents.samples if not categories or sample.category in categories]
    left_out = contents.left_out + _unexplained(folder, contents)
    return Dataset(
        root=root,
        layout=contents.layout,
        samples=tuple(sorted(samples, key=_order)),
        left_out=tuple(
            (path, reason) for path, reason in sorted(left_out) if dropped.isdisjoint(path.parts[len(root.parts) :])
        ),
        notes=(*contents.notes, *_about_other_masks(folder, samples)),
        saturations=_saturations(contents, [category for category in known if category not in dropped], defects_config),
    )


def _checked_folder(path: Path) -> Path:
    if not path.exists():
        raise DataError(f"{path} does not exist: check the spelling of the folder.")
    if not path.is_dir():
        unpack = path.suffix.lower() in {".zip", ".gz", ".tar", ".tgz", ".xz", ".7z", ".rar", ".bz2"}
        way_out = "unpack it and give the folder" if unpack else "give the folder that holds the images"
        raise DataError(f"{path} is a file, not a folder: {way_out}.")
    if not os.access(path, os.R_OK | os.X_OK):
        raise DataError(f"{path} cannot be read: check its permissions.")
    return path


def _checked_names(folder: Folder, good: str | None, bad: tuple[str, ...]) -> Names:
    present = sorted({inner.name for inner in folder.tree() if inner is not folder})
    for setting, name in (("good", good), *(("bad", name) for name in bad)):
        if name is not None and name not in present:
            listed = ", ".join(present[:20]) or "none"
            raise OptionError(
                f'`{setting}="{name}"`: there is no folder of this name in {folder.path} (folders: {listed}).'
            )
    if good in bad:
        raise OptionError(f"`good` and `bad` both name {good}: a folder holds either good or bad images.")
    if "good" in bad:
        raise OptionError('`bad="good"`: a folder named good is always taken as good; rename it.')
    return Names(good, bad)


def _contents(folder: Folder, layout: str, names: Names) -> Contents:
    """Recognise a folder as a category or as a folder of categories; failing that, as plain images."""
    category = folder.path.resolve().name or "images"
    place: Folder | None = folder
    while place is not None:
        contents = _recognise(place, place.path.resolve().name or category, layout, names) or _categories(
            place, layout, names
        )
        if contents is not None:
            return contents
        place = sole_folder(place, names)
    if not any(folder.all_images()):
        others = [path.name for inner in folder.tree() for path, _ in inner.others]
        seen = f" It holds only other files, such as {others[0]}." if others else " It is empty."
        raise DataError(f"{folder.path} has no images in it.{seen}")
    if layout not in ("auto", "folder"):
        raise DataError(f"{folder.path} is not laid out as {layout}, which has {EXPECTED[layout]}.")
    if names != Names():
        setting = f'`good="{names.good}"`' if names.good is not None else f'`bad="{names.bad[0]}"`'
        raise OptionError(f"{setting}: no folder of this name lies, with images in it, directly in {folder.path}.")
    return unnamed_folder(folder, category, all_good=layout == "folder")


def _recognise(folder: Folder, category: str, layout: str, names: Names) -> Contents | None:
    for layouts, recogniser in RECOGNISERS:
        contents = recogniser(folder, category, names) if layout == "auto" or layout in layouts else None
        if contents is not None and layout not in ("auto", contents.layout):
            raise DataError(
                f"{folder.path} is laid out as {contents.layout}, not as {layout}: leave `layout` out, or give "
                f'`layout="{contents.layout}"`.'
            )
        if contents is not None:
            return contents
    return None


def _categories(folder: Folder, layout: str, names: Names) -> Contents | None:
    """Take every sub-folder that is recognised as a category; leave the others out."""
    by_layout: dict[str, list[str]] = defaultdict(list)
    merged = Contents("")
    errors: list[DataError] = []
    for inner in folder.folders:
        try:
            contents = _recognise(inner, inner.name, layout, names)
        except DataError as error:
            errors.append(error)
            merged.left_out.append((inner.path, f"cannot be used as a category: {str(error).removesuffix('.')}"))
            continue
        if contents is not None:
            merged.add(contents)
            by_layout[contents.layout].append(inner.name)
        elif any(inner.all_images()):
            merged.left_out.append((inner.path, "is not itself recognised as a category"))
    if not by_layout:
        if errors:
            raise errors[0]
        return None
    if len(by_layout) > 1:
        listed = "; ".join(f"{name}: {', '.join(inner)}" for name, inner in by_layout.items())
        raise DataError(
            f"{folder.path} holds categories of different layouts ({listed}): choose one, for example "
            f'`layout="{next(iter(by_layout))}"`.'
        )
    merged.layout = next(iter(by_layout))
    return merged


def _saturations(contents: Contents, categories: Sequence[str], given: str | Path | None) -> dict[str, Saturations]:
    tables = {category: path for category, path in contents.saturations.items() if category in categories}
    if given is not None:
        if contents.layout != "loco":
            raise OptionError(
                f"`defects_config` belongs to the layout loco; this data is laid out as {contents.layout}."
            )
        if len(categories) > 1:
            listed = ", ".join(categories)
            raise OptionError(f"`defects_config` is of one category: choose one of {listed}.")
        tables = {categories[0]: Path(given)}
    return {category: read_saturations(path) for category, path in tables.items()}


def _about_other_masks(folder: Folder, samples: Sequence[Sample]) -> list[str]:
    """A note on ground truth that is stored as something else than images."""
    places = [inner for inner in folder.tree() if is_mask_folder(inner)]
    found = {path for place in places for inner in place.tree() for path, _ in inner.others}
    found = {path for path in found if path.suffix.lower() in OTHER_MASKS}
    if not found or not any(sample.is_anomalous and not sample.has_mask for sample in samples):
        return []
    return [
        f"{len(found)} files of ground truth, such as {min(found).name}, are no images and were left out: a mask is an "
        "image, 0 where the part is good and anything else where it is not."
    ]


def _unexplained(folder: Folder, contents: Contents) -> list[tuple[Path, str]]:
    """What lies in the folder but is neither used nor left out for a reason so far."""
    explained = contents.used | {path for path, _ in contents.left_out}
    for sample in contents.samples:
        explained |= {sample.path, *sample.masks}
    rest = [(image, f"has no place in the layout {contents.layout}") for image in folder.all_images()]
    rest += [other for inner in folder.tree() for other in inner.others]
    return [(path, why) for path, why in rest if path not in explained and explained.isdisjoint(path.parents)]


def _order(sample: Sample) -> tuple[str, int, bool, str, str, int]:
    split = SPLITS.index(sample.split)
    return sample.category, split, sample.is_anomalous, sample.defect, str(sample.path), sample.index or 0
