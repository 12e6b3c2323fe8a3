"""What a data set holds, and what looks wrong with it."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from kizu.data.dataset import Dataset
from kizu.data.image import MIN_SIDE, size_of
from kizu.data.layouts.contents import NO_IMAGE_FOR_MASK, USUAL
from kizu.data.masks import read_doubted
from kizu.data.preprocessing import BitDepth
from kizu.data.sample import CIFAR_SIDE, Sample
from kizu.errors import BadImage

__all__ = ["Inspection", "about_doubts", "inspect"]

MIN_TRAIN_IMAGES = 10  # fewer good images rarely show how much good parts vary
MODES = {"1": "grey", "L": "grey", "LA": "grey", "F": "grey float", "P": "palette", "PA": "palette"}


@dataclass(frozen=True)
class Inspection:
    """Counts of a data set's images, and warnings."""

    rows: list[dict[str, str | int]]  # for each category, split and type of defect
    warnings: list[str]  # full sentences

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


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
        row["masks"] = sum(sample.has_mask for sample in samples)
        rows.append(
            row | {"size": _sizes(usable), "channels": ", ".join(sorted({header.channels for header in usable}))}
        )
    warnings = []
    for category in dataset.categories:
        samples = dataset.select(category)
        sentences = _about_images(samples, headers)
        sentences += _about_masks(samples, headers, mask_headers, dataset.root)
        sentences += _about_duplicates(samples, dataset.root)
        warnings += [f"{category}: {sentence}" for sentence in sentences]
    broken = [header for header in (*headers.values(), *mask_headers.values()) if isinstance(header, BadImage)]
    warnings += [f"{error}." for error in broken]
    orphans = [path for path, reason in dataset.left_out if reason == NO_IMAGE_FOR_MASK]
    if orphans:
        warnings.append(
            f"{_count(orphans, 'mask')} without an image of the same name: {_listed(orphans, dataset.root)}."
        )
    return Inspection(rows, warnings)


class _Header(NamedTuple):
    width: int  # upright, as the image is read
    height: int
    channels: str
    empty: bool = False  # of a mask: no pixel is set
    doubt: str = ""  # what makes a mask look as if it were read wrongly


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
    channels = MODES.get(mode, "grey 16-bit" if mode.startswith("I") else mode)
    return _Header(height, width, channels) if rotated else _Header(width, height, channels)


def _mask_header(path: Path) -> _Header | BadImage:
    try:
        mask, doubt = read_doubted(path)
        return _Header(mask.shape[1], mask.shape[0], "mask", empty=not mask.any(), doubt=doubt)
    except BadImage as error:
        return error


def _usable(samples: Iterable[Sample], headers: Headers) -> list[_Header]:
    packed = _Header(CIFAR_SIDE, CIFAR_SIDE, "RGB")
    known = (packed if sample.index is not None else headers[sample.path] for sample in samples)
    return [header for header in known if isinstance(header, _Header)]


def _about_images(samples: list[Sample], headers: Headers) -> list[str]:
    train = [sample for sample in samples if sample.split == "train"]
    sentences = []
    if len(train) < MIN_TRAIN_IMAGES:
        sentences.append(
            f"only {_count(train, 'image')} to learn from; with fewer than {MIN_TRAIN_IMAGES}, good parts that look a "
            "little different are easily taken for bad ones."
        )
    elif len(train) < USUAL:
        sentences.append(
            f"{len(train)} images to learn from can promise 1 false alarm in {len(train) + 1} good parts at best; 1 in "
            f"{USUAL + 1}, which is usual, needs {USUAL}."
        )
    if not any(sample.split == "test" for sample in samples):
        sentences.append("there are no test images, so a detector can be trained but not evaluated.")
    if remark := BitDepth.of(train).remark:
        sentences.append(f"{remark[0].lower()}{remark[1:]}")
    usable = _usable(samples, headers)
    sizes = {(header.width, header.height) for header in usable}
    channels = Counter(header.channels for header in usable)
    if len(sizes) > 1:
        sentences.append(f"the images have {len(sizes)} different sizes, {_sizes(usable)}.")
    if len(channels) > 1:
        listed = ", ".join(f"{number} {name}" for name, number in sorted(channels.items()))
        sentences.append(f"the images differ in channels: {listed}.")
    return sentences


def _about_masks(samples: list[Sample], headers: Headers, masks: Headers, root: Path) -> list[str]:
    anomalous = [sample for sample in samples if sample.is_anomalous]
    unmasked = [sample.path for sample in anomalous if not sample.has_mask]
    empty, misfits = [], []
    for sample in anomalous:
        image = headers.get(sample.path)
        own = [(path, mask) for path in sample.masks if isinstance(mask := masks[path], _Header)]
        if own and len(own) == len(sample.masks) and all(mask.empty for _, mask in own):
            empty.append(own[0][0])
        if isinstance(image, _Header):
            misfits += [path for path, mask in own if mask[:2] != image[:2]]
    sentences = []
    if unmasked and len(unmasked) < len(anomalous):
        sentences.append(
            f"{_count(unmasked, 'image')} of defects without a mask although others have one: "
            f"{_listed(unmasked, root)}."
        )
    if empty:
        sentences.append(f"{_count(empty, 'mask')} of defects without a single pixel set: {_listed(empty, root)}.")
    doubts = {path: mask.doubt for path, mask in masks.items() if isinstance(mask, _Header) and mask.doubt}
    sentences += about_doubts({path: doubts[path] for s in anomalous for path in s.masks if path in doubts}, root)
    if misfits:
        sentences.append(f"{_count(misfits, 'mask')} of another size than the image: {_listed(misfits, root)}.")
    return sentences


def about_doubts(doubts: Mapping[Path, str], root: Path | None = None) -> list[str]:
    """A sentence for each way in which masks look as if they were read wrongly."""
    sentences = []
    for reason in sorted(set(doubts.values())):
        paths = [path for path in doubts if doubts[path] == reason]
        one = len(paths) == 1
        sentences.append(
            f"{_count(paths, 'mask')} of defects {reason if one else _plural(reason)}: {_listed(paths, root)}. A mask "
            "is 0 where the part is good and anything else where it is not; otherwise pixel metrics are wrong."
        )
    return sentences


def _plural(reason: str) -> str:
    return {"is": "are", "has": "have"}[reason.split()[0]] + reason[reason.index(" ") :].replace("if it", "if they")


def _about_duplicates(samples: list[Sample], root: Path) -> list[str]:
    by_path = {sample.path: sample for sample in samples if sample.index is None}
    leaks, repeats, contradictions = [], [], []
    for group in _same_content(by_path):
        copies = [by_path[path] for path in group]
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
            f"{_count(leaks, 'image')} in more than one split: remove the copies, because results look better than "
            f"they are. {_listed(leaks)}."
        )
    if contradictions:
        sentences.append(
            f"{_count(contradictions, 'image')} found both as good and as a defect: {_listed(contradictions)}."
        )
    if repeats:
        sentences.append(f"{_count(repeats, 'image')} found more than once in train: {_listed(repeats)}.")
    return sentences


def _same_content(paths: Iterable[Path]) -> list[list[Path]]:
    """Groups of files that are byte for byte the same; only files of equal size are hashed."""
    by_size: dict[int, list[Path]] = defaultdict(list)
    for path in paths:
        if path.is_file() and (size := path.stat().st_size):
            by_size[size].append(path)
    candidates = [path for group in by_size.values() if len(group) > 1 for path in group]
    by_digest: dict[bytes, list[Path]] = defaultdict(list)
    with ThreadPoolExecutor() as pool:
        for path, digest in zip(candidates, pool.map(_digest, candidates), strict=True):
            if digest is not None:
                by_digest[digest].append(path)
    return [group for group in by_digest.values() if len(group) > 1]


def _digest(path: Path) -> bytes | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, hashlib.blake2b).digest()
    except OSError:
        return None


def _sizes(headers: Sequence[_Header]) -> str:
    """Width × height, as a range where the images differ."""
    spans = [sorted({header[axis] for header in headers}) for axis in (0, 1)]
    return "×".join(f"{span[0]}" if len(span) == 1 else f"{span[0]}–{span[-1]}" for span in spans if span)


def _count(things: Sequence[object], noun: str) -> str:
    return f"{len(things)} {noun}{'' if len(things) == 1 else 's'}"


def _listed(things: Sequence[str | Path], root: Path | None = None) -> str:
    """The names of the first three, and how many there are beside them."""
    names = [
        thing.relative_to(root).as_posix() if isinstance(thing, Path) and root else str(thing) for thing in things[:3]
    ]
    return ", ".join(names) + (f" and {len(things) - 3} more" if len(things) > 3 else "")
