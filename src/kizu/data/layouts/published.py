"""The layouts of published data sets: MVTec AD and LOCO, MPDD, BTAD, VisA, KolektorSDD and SDD2, CIFAR-10."""

import csv
import re
from pathlib import Path

import numpy as np

from kizu.data.layouts.contents import Contents, MaskFiles, ambiguous, defective_by_mask
from kizu.data.layouts.folders import Folder, Names, is_mask_folder
from kizu.data.masks import CONFIG_NAME
from kizu.data.sample import CIFAR_RECORD, Sample
from kizu.errors import BadImage, DataError

__all__ = ["cifar10", "ksdd", "ksdd2", "splits", "visa"]


def splits(folder: Folder, category: str, names: Names) -> Contents | None:
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
                (
                    image,
                    "lies directly in test: move it into test/good, or into a folder of test named after the defect",
                )
            )
    masks = MaskFiles(folder, [inner for inner in folder.folders if is_mask_folder(inner)])
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
        raise ambiguous(part, [inner.name for inner in filled if not names.is_bad(inner.name)] or ["NAME"], "")
    taken = {image for inner in good for image in inner.all_images()}
    contents.samples += [Sample(image, category, split, "good") for image in sorted(taken)]
    for image in part.all_images():
        if image not in taken:
            reason = f"is in {part.name} but not in a folder of good images; {part.name} takes nothing else"
            contents.left_out.append((image, reason))


def visa(folder: Folder, category: str, names: Names) -> Contents | None:
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
            contents.left_out.append(
                (
                    image,
                    f"has the split '{split}' and label '{row['label']}' in {table.name}; splits are train, validation "
                    "and test, labels normal and anomaly",
                )
            )
        elif split != "test" and label != "good":
            contents.left_out.append((image, f"shows a defect but is in {split}, which takes good images only"))
        else:
            listed = label != "good" and mask != folder.path
            if listed and mask not in present:
                contents.left_out.append((mask, f"is listed as a mask in {table.name} but is not there"))
            masks = (mask,) if listed and mask in present else ()
            contents.samples.append(Sample(image, row["object"], split, label, masks))
    return contents


def ksdd(folder: Folder, category: str, names: Names) -> Contents | None:
    items = [inner for inner in folder.folders if re.fullmatch(r"kos\d+", inner.name, re.IGNORECASE)]
    masks = MaskFiles(folder, []) if items else None
    if masks is None or not masks.files:
        return None
    contents = Contents("ksdd")
    contents.notes.append(
        "KolektorSDD has no split of its own: every second item folder, in order of name, is for testing; of the "
        "others the good images are for training."
    )
    splits = {image: "train" if n % 2 == 0 else "test" for n, item in enumerate(items) for image in item.images}
    return _by_labels(contents, splits, category, masks)


def ksdd2(folder: Folder, category: str, names: Names) -> Contents | None:
    parts = {split: folder.get(split) for split in ("train", "test")}
    splits = {image: split for split, part in parts.items() if part for image in part.images}
    masks = MaskFiles(folder, []) if splits else None
    if masks is None or not masks.files.intersection(splits):
        return None
    return _by_labels(Contents("ksdd2"), splits, category, masks)


def _by_labels(contents: Contents, splits: dict[Path, str], category: str, masks: MaskFiles) -> Contents:
    """Add images that their label image, black or not, calls good or defective."""
    images = [image for image in splits if image not in masks.files]
    for image, defective in defective_by_mask(images, masks).items():
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


def cifar10(folder: Folder, category: str, names: Names) -> Contents | None:
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
