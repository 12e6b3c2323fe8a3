import json
import time
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kizu.data.dataset import LAYOUTS, Dataset, find
from kizu.data.inspection import inspect
from kizu.errors import BadImage, DataError, OptionError


def photo(path: Path, size: tuple[int, int] = (16, 12), mode: str = "RGB") -> Path:
    """Write an image, unlike any other, of (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(zlib.crc32(str(path).encode()))
    pixels = random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


def mask(path: Path, column: int | None = 0, size: tuple[int, int] = (16, 12)) -> Path:
    """Write a mask with one white column, or a black one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((size[1], size[0]), np.uint8)
    if column is not None:
        pixels[:, column] = 255
    Image.fromarray(pixels).save(path)
    return path


def photos(folder: Path, count: int, suffix: str = ".png") -> None:
    for number in range(count):
        photo(folder / f"{number:03}{suffix}")


def counts(dataset: Dataset) -> dict[str, int]:
    """Images by category, split and defect, and the masks of all."""
    found = Counter(f"{sample.category} {sample.split} {sample.defect}" for sample in dataset.samples)
    return dict(found) | {"masks": sum(len(sample.masks) for sample in dataset.samples)}


def reasons(dataset: Dataset) -> dict[str, str]:
    return {path.relative_to(dataset.root).as_posix(): reason for path, reason in dataset.left_out}


def mvtec(root: Path) -> dict[str, int]:
    for category in ("cap", "nut"):
        photos(root / category / "train" / "good", 3)
        photos(root / category / "test" / "good", 2)
        photos(root / category / "test" / "dent", 2, ".jpg")
    photo(root / "cap" / "train" / "dent" / "000.png")
    mask(root / "cap" / "ground_truth" / "dent" / "000_mask.png")
    mask(root / "cap" / "ground_truth" / "dent" / "001.png")
    (root / "readme.txt").write_text("licence")
    one = {"train good": 3, "test good": 2, "test dent": 2}
    return {f"{name} {key}": value for name in ("cap", "nut") for key, value in one.items()} | {"masks": 2}


def loco(root: Path) -> dict[str, int]:
    photos(root / "juice" / "train" / "good", 3)
    photos(root / "juice" / "validation" / "good", 2)
    photos(root / "juice" / "test" / "logical_anomalies", 2)
    for image, regions in (("000", 1), ("001", 2)):
        for region in range(regions):
            mask(root / "juice" / "ground_truth" / "logical_anomalies" / image / f"{region:03}.png", column=region)
    return {
        "juice train good": 3,
        "juice validation good": 2,
        "juice test logical_anomalies": 2,
        "masks": 3,
    }


def btad(root: Path) -> dict[str, int]:
    photos(root / "01" / "train" / "ok", 2, ".bmp")
    photos(root / "01" / "test" / "ok", 1, ".bmp")
    photos(root / "01" / "test" / "ko", 2, ".bmp")
    mask(root / "01" / "ground_truth" / "ko" / "000.bmp")
    mask(root / "01" / "ground_truth" / "ko" / "001.png")
    return {"01 train good": 2, "01 test good": 1, "01 test ko": 2, "masks": 2}


def visa(root: Path) -> dict[str, int]:
    lines = ["object,split,label,image,mask"]
    for number, split in enumerate(["train", "train", "test"]):
        name = f"candle/Data/Images/Normal/{number}.JPG"
        photo(root / name)
        lines.append(f"candle,{split},normal,{name},")
    photo(root / "candle/Data/Images/Anomaly/000.JPG")
    mask(root / "candle/Data/Masks/Anomaly/000.png")
    lines.append("candle,test,anomaly,candle/Data/Images/Anomaly/000.JPG,candle/Data/Masks/Anomaly/000.png")
    lines.append("candle,test,normal,candle/Data/Images/Normal/gone.JPG,")
    (root / "split_csv").mkdir()
    (root / "split_csv" / "1cls.csv").write_text("\n".join(lines))
    return {"candle train good": 2, "candle test good": 1, "candle test anomaly": 1, "masks": 1}


def ksdd(root: Path) -> dict[str, int]:
    for item in ("kos01", "kos02"):
        for part in range(3):
            photo(root / item / f"Part{part}.jpg")
            mask(root / item / f"Part{part}_label.bmp", column=1 if part == 2 else None)
    return {f"{root.name} train good": 2, f"{root.name} test good": 2, f"{root.name} test defect": 1, "masks": 1}


def ksdd2(root: Path) -> dict[str, int]:
    for split in ("train", "test"):
        for part in range(3):
            photo(root / split / f"1000{part}.png")
            mask(root / split / f"1000{part}_GT.png", column=1 if part == 2 else None)
    return {f"{root.name} train good": 2, f"{root.name} test good": 2, f"{root.name} test defect": 1, "masks": 1}


def cifar10(root: Path) -> dict[str, int]:
    (root / "batches.meta.txt").write_text("cat\ndog\n\n")
    for name, labels in (("data_batch_1.bin", [0, 1, 1]), ("test_batch.bin", [1, 0])):
        records = [bytes([label]) + bytes([10 * label + 1, 2, 3, 4] * 768) for label in labels]
        (root / name).write_bytes(b"".join(records))
    return {
        "cat train good": 1,
        "cat test good": 1,
        "cat test dog": 1,
        "dog train good": 2,
        "dog test good": 1,
        "dog test cat": 1,
        "masks": 0,
    }


def annotated(root: Path) -> dict[str, int]:
    photos(root / "images", 10)
    images = [{"id": number, "file_name": path.name} for number, path in enumerate(sorted((root / "images").iterdir()))]
    marks = [
        {"image_id": 0, "category_id": 1, "bbox": [1, 1, 3, 2]},
        {"image_id": 1, "category_id": 1, "bbox": [2, 3, 4, 4]},
    ]
    export = {"images": images, "annotations": marks, "categories": [{"id": 1, "name": "dent"}]}
    (root / "instances.json").write_text(json.dumps(export))
    return {f"{root.name} train good": 6, f"{root.name} test good": 2, f"{root.name} test dent": 2, "masks": 0}


def folder(root: Path) -> dict[str, int]:
    photos(root / "OK", 10)
    photos(root / "NG" / "scratch", 2)
    photo(root / "NG" / "unsorted.webp")
    mask(root / "masks" / "scratch" / "000_mask.png")
    mask(root / "masks" / "NG" / "scratch" / "001.png")
    mask(root / "NG" / "unsorted_mask.png")
    name = root.name
    return {
        f"{name} train good": 8,
        f"{name} test good": 2,
        f"{name} test scratch": 2,
        f"{name} test NG": 1,
        "masks": 3,
    }


BUILDERS: list[Callable[[Path], dict[str, int]]] = [mvtec, loco, btad, visa, ksdd, ksdd2, cifar10, annotated, folder]


@pytest.mark.parametrize("build", BUILDERS, ids=lambda build: build.__name__)
def test_layout_is_recognised_and_complete(tmp_path: Path, build: Callable[[Path], dict[str, int]]) -> None:
    expected = build(tmp_path)
    dataset = find(tmp_path)
    assert dataset.layout == build.__name__
    assert counts(dataset) == expected
    assert find(tmp_path, layout=build.__name__) == dataset
    for sample in dataset.samples:
        shape = sample.read()[1]
        region = sample.mask(shape)
        assert region is None if sample.is_anomalous and not sample.has_mask else region.any() == sample.is_anomalous
    inspection = inspect(dataset)
    assert sum(row["images"] for row in inspection.rows) == len(dataset.samples)
    assert not any("mask" in warning for warning in inspection.warnings)


def test_every_layout_has_a_builder() -> None:
    assert {build.__name__ for build in BUILDERS} == set(LAYOUTS)


def test_one_category_and_what_is_left_out(tmp_path: Path) -> None:
    mvtec(tmp_path)
    photo(tmp_path / "misc" / "a" / "x.png")
    photo(tmp_path / "misc" / "b" / "x.png")
    (tmp_path / "cap" / "train" / "good" / ".hidden.png").touch()
    dataset = find(tmp_path)
    left_out = reasons(dataset)
    assert set(left_out) == {"cap/train/dent/000.png", "cap/train/good/.hidden.png", "misc", "readme.txt"}
    assert "not in a folder of good images" in left_out["cap/train/dent/000.png"]
    assert find(tmp_path, categories=["nut"]).categories == ["nut"] == find(tmp_path / "nut").categories
    assert len(dataset.select("cap", "test")) == 4
    assert dataset.samples[0].name(tmp_path) == "cap/train/good/000.png"
    with pytest.raises(OptionError, match=r"no category nail; it has cap, nut"):
        find(tmp_path, categories=["nail"])
    with pytest.raises(DataError, match='`layout="mvtec"`'):
        find(tmp_path / "nut", layout="loco")


def test_masks_go_by_name_not_by_order(tmp_path: Path) -> None:
    photos(tmp_path / "train" / "good", 2)
    for stem, column in (("b", None), ("c", 3), ("d", 4)):
        photo(tmp_path / "test" / "dent" / f"{stem}.png")
        if column:
            mask(tmp_path / "ground_truth" / "dent" / f"{stem}_mask.png", column)
    mask(tmp_path / "ground_truth" / "dent" / "a_mask.png", 9)
    dataset = find(tmp_path)
    first, second, third = dataset.select(split="test")
    assert first.mask((12, 16)) is None
    for sample, column in ((second, 3), (third, 4)):
        region = sample.mask((12, 16))
        assert region is not None and region[:, column].all() and region.sum() == 12
    warnings = " ".join(inspect(dataset).warnings)
    assert "1 mask without an image of the same name: ground_truth/dent/a_mask.png" in warnings
    assert "1 image of defects without a mask although others have one: test/dent/b.png" in warnings


def test_several_masks_of_one_image_are_united(tmp_path: Path) -> None:
    loco(tmp_path)
    sample = find(tmp_path).select(split="test")[1]
    region = sample.mask((12, 16))
    assert [path.name for path in sample.masks] == ["000.png", "001.png"]
    assert region is not None and region[:, :2].all() and not region[:, 2:].any()


def test_a_mask_that_fits_two_images_belongs_to_neither(tmp_path: Path) -> None:
    photos(tmp_path / "good", 2)
    photo(tmp_path / "bad" / "dent" / "000.png")
    photo(tmp_path / "bad" / "scratch" / "000.png")
    mask(tmp_path / "masks" / "000.png")
    dataset = find(tmp_path)
    assert counts(dataset)["masks"] == 0
    assert "fits 2 images" in reasons(dataset)["masks/000.png"]


def test_held_out_good_images_do_not_depend_on_where_the_folder_is(tmp_path: Path) -> None:
    held_out = []
    for place in (tmp_path / "here", tmp_path / "there"):
        photos(place / "part" / "normal", 11)
        photos(place / "part" / "scratch", 1)
        dataset = find(place / "part")
        held_out.append([sample.path.name for sample in dataset.select(split="test") if not sample.is_anomalous])
        assert any("2 of the 11 good images" in note for note in dataset.notes)
        assert any("types of defect: scratch" in note for note in dataset.notes)
    assert held_out[0] == held_out[1] and len(held_out[0]) == 2


def test_images_without_named_folders_are_all_good(tmp_path: Path) -> None:
    photos(tmp_path / "flat", 4)
    photos(tmp_path / "nested" / "line" / "shots", 3, ".JPG")
    for name, number in (("flat", 4), ("nested", 3)):
        dataset = find(tmp_path / name)
        assert counts(dataset) == {f"{name} train good": number, "masks": 0}
        assert "all images are taken as images of good parts" in dataset.notes[0]


def test_unnamed_folders_are_not_guessed(tmp_path: Path) -> None:
    for name in ("monday", "tuesday"):
        photos(tmp_path / name, 2)
    with pytest.raises(DataError, match=r'monday, tuesday.*`good="FOLDER"`.*`layout="folder"`'):
        find(tmp_path)
    name = tmp_path.name
    assert counts(find(tmp_path, layout="folder")) == {f"{name} train good": 4, "masks": 0}
    chosen = counts(find(tmp_path, good="tuesday"))
    assert chosen == {f"{name} train good": 1, f"{name} test good": 1, f"{name} test monday": 2, "masks": 0}
    assert counts(find(tmp_path, bad="monday")) == chosen
    with pytest.raises(OptionError, match=r'`good="friday"`.*monday, tuesday'):
        find(tmp_path, good="friday")
    with pytest.raises(DataError, match=r'`layout="folder"`. If only monday holds defects, say `bad="monday"`'):
        photos(tmp_path / "loose", 1)
        photos(tmp_path / "loose" / "monday", 1)
        find(tmp_path / "loose")
    photos(tmp_path / "faulty", 2)
    with pytest.raises(DataError, match=r'loose, monday, tuesday.*`good="FOLDER"`'):
        find(tmp_path)
    photos(tmp_path / "fine", 2)
    kept = find(tmp_path, good="fine", bad="faulty")
    assert {sample.defect for sample in kept.samples} == {"good", "faulty"}
    assert "in neither" in reasons(kept)["monday/000.png"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "has no images in it. It is empty"),
        (["notes.txt"], "has no images in it. It holds only other files, such as notes.txt"),
        (["test/good/0.png", "test/dent/0.png"], "holds test images only"),
        (["bad/0.png"], "holds images of defects only"),
        (["masks/0.png"], "holds masks only"),
        (["train/first/0.png", "train/second/0.png", "test/good/0.png"], '`good="FOLDER"`'),
        (["cap/train/good/0.png", "nut/train/ok/0.png", "nut/test/ko/0.png"], "different layouts"),
        (["data_batch_1", "batches.meta"], "cifar-10-binary.tar.gz"),
    ],
)
def test_unusable_folders_are_explained(tmp_path: Path, files: list[str], message: str) -> None:
    for name in files:
        if name.endswith(".png"):
            photo(tmp_path / name)
        else:
            (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError) as caught:
        find(tmp_path)
    assert message in str(caught.value)


def test_wrong_paths_and_layouts_are_explained(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        find(tmp_path / "gone")
    with pytest.raises(DataError, match="is a file, not a folder: unpack it"):
        (tmp_path / "set.zip").touch()
        find(tmp_path / "set.zip")
    with pytest.raises(OptionError, match="Did you mean mvtec"):
        find(tmp_path, layout="mvtecad")


def test_links_that_lead_back_do_not_hang(tmp_path: Path) -> None:
    photos(tmp_path / "good", 2)
    (tmp_path / "good" / "again").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "itself").symlink_to(tmp_path / "itself")
    dataset = find(tmp_path)
    assert len(dataset.samples) == 2
    assert set(reasons(dataset)) == {"good/again", "itself"}


def test_packed_records_are_read(tmp_path: Path) -> None:
    cifar10(tmp_path)
    dataset = find(tmp_path, categories=["dog"])
    sample = dataset.select("dog", "train")[0]
    assert sample.name(tmp_path) == "data_batch_1.bin#1"
    assert sample.read()[0].shape == (32, 32, 3) and sample.read()[0][0, :4, 1].tolist() == [11, 2, 3, 4]
    (tmp_path / "data_batch_1.bin").write_bytes(b"short")
    with pytest.raises(BadImage, match=r"data_batch_1[.]bin#1"):
        sample.read()
    with pytest.raises(DataError, match="3073-byte records"):
        find(tmp_path)


def test_inspect_reports_what_is_wrong(tmp_path: Path) -> None:
    good, test, truth = tmp_path / "train" / "good", tmp_path / "test", tmp_path / "ground_truth"
    photos(good, 4)
    photo(good / "large.png", size=(20, 20))
    photo(good / "grey.png", mode="L")
    (good / "copy.png").write_bytes((good / "000.png").read_bytes())
    (good / "broken.png").write_bytes(b"not an image")
    (good / "empty.png").touch()
    photo(good / "tiny.png", size=(4, 4))
    photos(test / "good", 1)
    (test / "good" / "leak.png").write_bytes((good / "001.png").read_bytes())
    for stem in ("empty", "small", "fine"):
        photo(test / "dent" / f"{stem}.png")
    mask(truth / "dent" / "empty_mask.png", None)
    small = mask(truth / "dent" / "small_mask.png", size=(8, 6))
    mask(truth / "dent" / "fine_mask.png")
    dataset = find(tmp_path)
    inspection = inspect(dataset)
    text = "\n".join(inspection.warnings)
    for sentence in (
        "2 different sizes, 16–20×12–20",
        ", 1 grey.",
        "1 mask of defects without a single pixel set: ground_truth/dent/empty_mask.png",
        "1 mask of another size than the image: ground_truth/dent/small_mask.png",
        "1 image in more than one split",
        "test/good/leak.png",
        "1 image found more than once in train: train/good/000.png = train/good/copy.png",
        "broken.png: is not an image",
        "empty.png: is empty",
        "tiny.png: is only 4×4 pixels",
    ):
        assert sentence in text
    assert inspection.to_json()["rows"][0] == {
        "category": tmp_path.name,
        "split": "train",
        "defect": "good",
        "images": 10,
        "masks": 0,
        "size": "16–20×12–20",
        "channels": "RGB, grey",
    }
    sample = next(sample for sample in dataset.samples if small in sample.masks)
    with pytest.raises(DataError, match=r"small_mask.png has 8×6 pixels .*small.png has 16×12"):
        sample.mask((12, 16))


def test_few_images_and_no_test_images(tmp_path: Path) -> None:
    photos(tmp_path, 3)
    few, no_test = inspect(find(tmp_path)).warnings
    assert "only 3 images to learn from" in few
    assert "no test images" in no_test


@pytest.mark.parametrize(
    ("name", "layout", "train", "validation", "good", "bad", "masks"),
    [
        ("mvtec_ad/bottle", "mvtec", 209, 0, 20, 63, 63),
        ("mvtec_ad/pill", "mvtec", 267, 0, 26, 141, 141),
        ("mvtec_ad/transistor", "mvtec", 213, 0, 60, 40, 0),
        ("mvtec_loco/juice_bottle", "loco", 280, 54, 55, 71, 71),
        ("magnetic_tile", "mvtec", 300, 0, 80, 150, 150),
    ],
)
def test_real_data(
    real_data: Path, name: str, layout: str, train: int, validation: int, good: int, bad: int, masks: int
) -> None:
    dataset = find(real_data / name)
    test = dataset.select(split="test")
    anomalous = [sample for sample in test if sample.is_anomalous]
    assert dataset.layout == layout and dataset.left_out == ()
    assert [len(dataset.select(split=split)) for split in ("train", "validation")] == [train, validation]
    assert [len(test) - len(anomalous), len(anomalous)] == [good, bad]
    assert sum(len(sample.masks) for sample in anomalous) == masks


def test_real_data_is_inspected_fast(real_data: Path) -> None:
    start = time.perf_counter()
    dataset = find(real_data / "mvtec_ad")
    inspection = inspect(dataset)
    assert time.perf_counter() - start < 3
    assert dataset.categories == ["bottle", "pill", "transistor"]
    assert inspection.warnings == []


def test_folders_in_other_languages_are_known(tmp_path: Path) -> None:
    for name, number in {"Gutteile": 5, "Ausschuss": 2, "n.i.O.": 1}.items():
        photos(tmp_path / name, number)
    found = find(tmp_path)
    assert {sample.defect for sample in found.select(split="train")} == {"good"}
    assert Counter(sample.defect for sample in found.samples) == {"good": 5, "Ausschuss": 2, "n.i.O.": 1}


def test_each_of_several_bad_folders_counts(tmp_path: Path) -> None:
    for name, number in {"fine": 5, "monday": 2, "tuesday": 1}.items():
        photos(tmp_path / name, number)
    found = find(tmp_path, good="fine", bad=["monday", "tuesday"])
    assert sum(sample.is_anomalous for sample in found.samples) == 3
    with pytest.raises(OptionError, match='bad="wednesday"'):
        find(tmp_path, bad=["monday", "wednesday"])


def test_what_is_left_out_is_counted_in_a_sentence(tmp_path: Path) -> None:
    for name, number in {"good": 5, "bad": 2, "unclear": 3}.items():
        photos(tmp_path / name, number)
    (remark,) = [remark for remark in find(tmp_path).remarks if "left out" in remark]
    assert remark == "3 left out, such as 000.png, which is beside folders named good or bad, but in neither."


@pytest.mark.parametrize(
    ("good", "tested"), [(2, 1), (10, 2), (50, 10), (54, 11), (55, 6), (60, 11), (61, 12), (100, 20)]
)
def test_a_fifth_is_tested_on_or_less_where_that_leaves_what_the_usual_promise_needs(
    good: int, tested: int, tmp_path: Path
) -> None:
    for number in range(good):
        photo(tmp_path / "good" / f"{number}.png")
    photo(tmp_path / "bad" / "0.png")
    found = find(tmp_path)
    (category,) = found.categories
    kept = [sample for sample in found.select(category, "test") if not sample.is_anomalous]
    assert len(kept) == tested and f"{tested} of the {good} good images" in " ".join(found.notes)
