"""Folders of images: find out what they are, turn them into samples, and look for what is wrong with them."""

import difflib
import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from kizu.data.folders import Folder, Names, walk
from kizu.data.image import MIN_SIDE, read_mask, size_of
from kizu.data.layouts import EXPECTED, NO_IMAGE_FOR_MASK, RECOGNISERS, Found, sole_folder, unnamed_folder
from kizu.data.loco_masks import Saturations, read_saturations
from kizu.data.sample import CIFAR_SIDE, Sample
from kizu.errors import BadImage, DataError, OptionError

__all__ = ["LAYOUTS", "Dataset", "Inspection", "Sample", "find", "inspect"]

LAYOUTS: tuple[str, ...] = tuple(EXPECTED)
FEW_IMAGES = 10  # fewer good images than this rarely show how much good parts vary
SPLITS = ("train", "validation", "test")
_MODES = {"1": "grey", "L": "grey", "LA": "grey", "F": "grey float", "P": "palette", "PA": "palette"}


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

    def select(self, category: str | None = None, split: str | None = None) -> list[Sample]:
        """The samples of one category, one split, or both."""
        return [
            sample for sample in self.samples if category in (None, sample.category) and split in (None, sample.split)
        ]


@dataclass(frozen=True)
class Inspection:
    """What a data set holds and what looks wrong with it."""

    rows: list[dict[str, str | int]]  # for each category, split and type of defect
    warnings: list[str]  # full sentences

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def find(
    path: str | Path,
    *,
    layout: str = "auto",
    categories: Sequence[str] = (),
    good: str | None = None,
    bad: str | None = None,
    defects_config: str | Path | None = None,
) -> Dataset:
    """Find out how a folder of images is laid out and what each image is.

    `layout` is "auto" or one of `LAYOUTS`; `categories` keeps only these; `good` and `bad` name a folder of good
    or bad images whose own name does not say so; `defects_config` is used in place of LOCO's own defects_config.json.

    Raises `DataError` when there is nothing to learn from or the folder can be read in two ways, and
    `OptionError` for a layout, category or folder name that does not exist.
    """
    root = _checked_folder(Path(path).expanduser())
    if layout not in ("auto", *LAYOUTS):
        near = difflib.get_close_matches(layout, LAYOUTS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise OptionError(f"--layout {layout} is unknown; choose from auto, {', '.join(LAYOUTS)}.{hint}")
    folder = walk(root)
    names = _checked_names(folder, good, bad)
    found = _found(folder, layout, names)
    known = sorted({sample.category for sample in found.samples})
    unknown = [category for category in categories if category not in known]
    if unknown:
        raise OptionError(f"{root} has no category {', '.join(unknown)}; it has {', '.join(known)}.")
    dropped = {category for category in known if categories and category not in categories}
    samples = [sample for sample in found.samples if not categories or sample.category in categories]
    left_out = found.left_out + _unexplained(folder, found)
    return Dataset(
        root=root,
        layout=found.layout,
        samples=tuple(sorted(samples, key=_order)),
        left_out=tuple(
            (path, reason) for path, reason in sorted(left_out) if dropped.isdisjoint(path.parts[len(root.parts) :])
        ),
        notes=tuple(found.notes),
        saturations=_saturations(found, [category for category in known if category not in dropped], defects_config),
    )


def inspect(dataset: Dataset) -> Inspection:
    """Count what a data set holds and list, as sentences, what looks wrong. Reads image headers, masks and hashes."""
    files = sorted({sample.path for sample in dataset.samples if sample.index is None})
    masks = sorted({mask for sample in dataset.samples for mask in sample.masks})
    with ThreadPoolExecutor() as pool:
        headers = dict(zip(files, pool.map(_header, files), strict=True))
        mask_headers = dict(zip(masks, pool.map(_mask_header, masks), strict=True))
    rows = []
    groups: dict[tuple[str, str, str], list[Sample]] = defaultdict(list)
    for sample in dataset.samples:
        groups[sample.category, sample.split, sample.defect].append(sample)
    for (category, split, defect), samples in groups.items():
        usable = _usable(samples, headers)
        row: dict[str, str | int] = {"category": category, "split": split, "defect": defect, "images": len(samples)}
        row["masks"] = sum(bool(sample.masks) for sample in samples)
        rows.append(row | {"size": _sizes(usable), "channels": ", ".join(sorted({one.channels for one in usable}))})
    warnings = []
    for category in dataset.categories:
        samples = dataset.select(category)
        sentences = _about_images(samples, headers)
        sentences += _about_masks(samples, headers, mask_headers, dataset.root)
        sentences += _about_duplicates(samples, dataset.root)
        warnings += [f"{category}: {sentence}" for sentence in sentences]
    broken = [one for one in (*headers.values(), *mask_headers.values()) if isinstance(one, BadImage)]
    warnings += [f"{error}." for error in broken]
    orphans = [path for path, reason in dataset.left_out if reason == NO_IMAGE_FOR_MASK]
    if orphans:
        warnings.append(f"{_count(orphans, 'mask')} without an image of the same name: {_some(orphans, dataset.root)}.")
    return Inspection(rows, warnings)


def _checked_folder(path: Path) -> Path:
    if not path.exists():
        raise DataError(f"{path} does not exist: check the spelling of the folder.")
    if not path.is_dir():
        unpack = path.suffix.lower() in {".zip", ".gz", ".tar", ".tgz", ".xz", ".7z", ".rar", ".bz2"}
        way_out = "unpack it and give the folder" if unpack else "give the folder that holds the images"
        raise DataError(f"{path} is a file, not a folder: {way_out}.")
    if not os.access(path, os.R_OK | os.X_OK):
        raise DataError(f"{path} may not be read: check its permissions.")
    return path


def _checked_names(folder: Folder, good: str | None, bad: str | None) -> Names:
    present = sorted({inner.name for inner in folder.tree() if inner is not folder})
    for option, name in (("--good", good), ("--bad", bad)):
        if name is not None and name not in present:
            listed = ", ".join(present[:20]) or "none"
            raise OptionError(f"{option} {name}: there is no folder of this name in {folder.path} (folders: {listed}).")
    if good is not None and good == bad:
        raise OptionError(f"--good and --bad both name {good}: a folder holds either good or bad images.")
    if bad == "good":
        raise OptionError("--bad good: a folder named good is always taken as good; rename it.")
    return Names(good, bad)


def _found(folder: Folder, layout: str, names: Names) -> Found:
    """Recognise a folder as a category or as a folder of categories; failing that, as plain images."""
    category = folder.path.resolve().name or "images"
    place: Folder | None = folder
    while place is not None:
        found = _recognise(place, place.path.resolve().name or category, layout, names) or _categories(
            place, layout, names
        )
        if found is not None:
            return found
        place = sole_folder(place, names)
    if not any(folder.all_images()):
        others = [path.name for inner in folder.tree() for path, _ in inner.others]
        seen = f" It holds only other files, such as {others[0]}." if others else " It is empty."
        raise DataError(f"{folder.path} has no images in it.{seen}")
    if layout not in ("auto", "folder"):
        raise DataError(f"{folder.path} is not laid out as {layout}, which has {EXPECTED[layout]}.")
    if names != Names():
        option = f"--good {names.good}" if names.good is not None else f"--bad {names.bad}"
        raise OptionError(f"{option}: no folder of this name lies, with images in it, directly in {folder.path}.")
    return unnamed_folder(folder, category, all_good=layout == "folder")


def _recognise(folder: Folder, category: str, layout: str, names: Names) -> Found | None:
    for layouts, recogniser in RECOGNISERS:
        found = recogniser(folder, category, names) if layout == "auto" or layout in layouts else None
        if found is not None and layout not in ("auto", found.layout):
            raise DataError(
                f"{folder.path} is laid out as {found.layout}, not as {layout}: leave --layout out, or give "
                f"--layout {found.layout}."
            )
        if found is not None:
            return found
    return None


def _categories(folder: Folder, layout: str, names: Names) -> Found | None:
    """Take every sub-folder that is recognised as a category; leave the others out."""
    by_layout: dict[str, list[str]] = defaultdict(list)
    merged = Found("")
    errors: list[DataError] = []
    for inner in folder.folders:
        try:
            found = _recognise(inner, inner.name, layout, names)
        except DataError as error:
            errors.append(error)
            merged.left_out.append((inner.path, f"is not usable as a category. {error}"))
            continue
        if found is not None:
            merged.add(found)
            by_layout[found.layout].append(inner.name)
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
            f"--layout {next(iter(by_layout))}."
        )
    merged.layout = next(iter(by_layout))
    return merged


def _saturations(found: Found, categories: Sequence[str], given: str | Path | None) -> dict[str, Saturations]:
    tables = {category: path for category, path in found.saturations.items() if category in categories}
    if given is not None:
        if found.layout != "loco":
            raise OptionError(f"--defects-config belongs to the layout loco; this data is laid out as {found.layout}.")
        if len(categories) > 1:
            listed = ", ".join(categories)
            raise OptionError(f"--defects-config is of one category: name it with --category (there are {listed}).")
        tables = {categories[0]: Path(given)}
    return {category: read_saturations(path) for category, path in tables.items()}


def _unexplained(folder: Folder, found: Found) -> list[tuple[Path, str]]:
    """What lies in the folder but is neither used nor left out for a reason so far."""
    explained = found.used | {path for path, _ in found.left_out}
    for sample in found.samples:
        explained |= {sample.path, *sample.masks}
    rest = [(image, f"has no place in the layout {found.layout}") for image in folder.all_images()]
    rest += [other for inner in folder.tree() for other in inner.others]
    return [(path, why) for path, why in rest if path not in explained and explained.isdisjoint(path.parents)]


def _order(sample: Sample) -> tuple[str, int, bool, str, str, int]:
    split = SPLITS.index(sample.split)
    return sample.category, split, sample.is_anomalous, sample.defect, str(sample.path), sample.index or 0


class _Header(NamedTuple):
    width: int  # upright, as the image is read
    height: int
    channels: str
    empty: bool = False  # of a mask: no pixel is set


Headers = dict[Path, _Header | BadImage]


def _header(path: Path) -> _Header | BadImage:
    try:
        size_of(path)
        with Image.open(path) as image:
            width, height, mode = image.width, image.height, image.mode
            rotated = (image.format != "PNG" or "exif" in image.info) and image.getexif().get(0x0112, 1) >= 5
        if min(width, height) < MIN_SIDE:
            reason = f"is only {width}×{height} pixels; at least {MIN_SIDE}×{MIN_SIDE} are needed"
            return BadImage(str(path), reason)
    except BadImage as error:
        return error
    except (OSError, SyntaxError, ValueError) as error:
        return BadImage(str(path), f"cannot be opened ({error})")
    channels = _MODES.get(mode, "grey 16-bit" if mode.startswith("I") else mode)
    return _Header(height, width, channels) if rotated else _Header(width, height, channels)


def _mask_header(path: Path) -> _Header | BadImage:
    try:
        mask = read_mask(path)
    except BadImage as error:
        return error
    return _Header(mask.shape[1], mask.shape[0], "mask", empty=not mask.any())


def _usable(samples: Iterable[Sample], headers: Headers) -> list[_Header]:
    packed = _Header(CIFAR_SIDE, CIFAR_SIDE, "RGB")
    found = (packed if sample.index is not None else headers[sample.path] for sample in samples)
    return [one for one in found if isinstance(one, _Header)]


def _about_images(samples: list[Sample], headers: Headers) -> list[str]:
    train = [sample for sample in samples if sample.split == "train"]
    sentences = []
    if len(train) < FEW_IMAGES:
        sentences.append(
            f"only {_count(train, 'image')} to learn from; with fewer than {FEW_IMAGES}, good parts that look a "
            "little different are easily taken for bad ones."
        )
    if not any(sample.split == "test" for sample in samples):
        sentences.append("there are no test images, so a detector can be trained but not evaluated.")
    usable = _usable(samples, headers)
    sizes = {(one.width, one.height) for one in usable}
    channels = Counter(one.channels for one in usable)
    if len(sizes) > 1:
        sentences.append(f"the images have {len(sizes)} different sizes, {_sizes(usable)}.")
    if len(channels) > 1:
        listed = ", ".join(f"{number} {name}" for name, number in sorted(channels.items()))
        sentences.append(f"the images differ in channels: {listed}.")
    return sentences


def _about_masks(samples: list[Sample], headers: Headers, masks: Headers, root: Path) -> list[str]:
    anomalous = [sample for sample in samples if sample.is_anomalous]
    bare = [sample.path for sample in anomalous if not sample.masks]
    empty, misfits = [], []
    for sample in anomalous:
        image = headers.get(sample.path)
        own = [(path, one) for path in sample.masks if isinstance(one := masks[path], _Header)]
        if own and len(own) == len(sample.masks) and all(one.empty for _, one in own):
            empty.append(own[0][0])
        if isinstance(image, _Header):
            misfits += [path for path, one in own if one[:2] != image[:2]]
    sentences = []
    if bare and len(bare) < len(anomalous):
        sentences.append(
            f"{_count(bare, 'image')} of defects without a mask although others have one: {_some(bare, root)}."
        )
    if empty:
        sentences.append(f"{_count(empty, 'mask')} of defects without a single pixel set: {_some(empty, root)}.")
    if misfits:
        sentences.append(f"{_count(misfits, 'mask')} of another size than the image: {_some(misfits, root)}.")
    return sentences


def _about_duplicates(samples: list[Sample], root: Path) -> list[str]:
    by_path = {sample.path: sample for sample in samples if sample.index is None}
    leaks, repeats, contradictions = [], [], []
    for same in _same_content(by_path):
        copies = [by_path[path] for path in same]
        pair = " = ".join(sample.name(root) for sample in (copies[0], copies[-1]))
        if len({sample.split for sample in copies}) > 1:
            leaks.append(pair)
        if len({sample.is_anomalous for sample in copies}) > 1:
            contradictions.append(pair)
        if sum(sample.split == "train" for sample in copies) > 1:
            repeats.append(pair)
    sentences = []
    if leaks:
        sentences.append(
            f"{_count(leaks, 'image')} in more than one split, which makes results look better than they are: "
            f"{_some(leaks)}."
        )
    if contradictions:
        sentences.append(f"{_count(contradictions, 'image')} both as good and as a defect: {_some(contradictions)}.")
    if repeats:
        sentences.append(f"{_count(repeats, 'image')} more than once in train: {_some(repeats)}.")
    return sentences


def _same_content(paths: Iterable[Path]) -> list[list[Path]]:
    """Groups of files that are byte for byte the same; only files of equal size are hashed."""
    by_size: dict[int, list[Path]] = defaultdict(list)
    for path in paths:
        if path.is_file() and (size := path.stat().st_size):
            by_size[size].append(path)
    candidates = [path for same in by_size.values() if len(same) > 1 for path in same]
    by_digest: dict[bytes, list[Path]] = defaultdict(list)
    with ThreadPoolExecutor() as pool:
        for path, digest in zip(candidates, pool.map(_digest, candidates), strict=True):
            if digest is not None:
                by_digest[digest].append(path)
    return [same for same in by_digest.values() if len(same) > 1]


def _digest(path: Path) -> bytes | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, hashlib.blake2b).digest()
    except OSError:
        return None


def _sizes(headers: Sequence[_Header]) -> str:
    """Width × height, each with its smallest and largest where they differ."""
    spans = [sorted({one[axis] for one in headers}) for axis in (0, 1)]
    return "×".join(f"{span[0]}" if len(span) == 1 else f"{span[0]}–{span[-1]}" for span in spans if span)


def _count(things: Sequence[object], noun: str) -> str:
    return f"{len(things)} {noun}{'' if len(things) == 1 else 's'}"


def _some(things: Sequence[str | Path], root: Path | None = None) -> str:
    """A few of them by name."""
    names = [
        thing.relative_to(root).as_posix() if isinstance(thing, Path) and root else str(thing) for thing in things[:3]
    ]
    return ", ".join(names) + (f" and {len(things) - 3} more" if len(things) > 3 else "")
