"""Exports of labelling tools: what is good, what is not, and where."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

import kizu
from kizu.data import dataset
from kizu.data.layouts.annotations import _coco_lengths, read_annotations
from kizu.data.masks import Polygon, Runs
from processes import kizu as command
from test_detectors import part

WIDTH, HEIGHT = 80, 60
LEFT, TOP, WIDE, HIGH = 20, 12, 24, 30  # of the defect on bad.png
BOX = np.zeros((HEIGHT, WIDTH), bool)
BOX[TOP : TOP + HIGH, LEFT : LEFT + WIDE] = True
CORNERS = [(LEFT, TOP), (LEFT + WIDE, TOP), (LEFT + WIDE, TOP + HIGH), (LEFT, TOP + HIGH)]
HUGE = {"image_id": 5, "category_id": 3, "segmentation": {"counts": [10**12], "size": [10**6, 10**6]}}
ENTITIES = "".join(f'<!ENTITY e{n + 1} "{f"&e{n};" * 10}">' for n in range(12))
BOMB = f'<!DOCTYPE a [<!ENTITY e0 "x">{ENTITIES}]><annotations>&e12;<image/></annotations>'
GOOD = [f"good{number}.png" for number in range(5)]


def lengths(mask):
    """Runs of a flat mask, the first of them outside."""
    edges = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0, append=0))
    return np.diff([0, *edges, mask.size]).tolist() if edges.size else [mask.size]


def coco(shape):
    drawn = {
        "polygon": {"segmentation": [[float(number) for corner in CORNERS for number in corner]]},
        "box": {"bbox": [LEFT, TOP, WIDE, HIGH], "segmentation": []},
        "runs": {"segmentation": {"counts": lengths(BOX.T.ravel()), "size": [HEIGHT, WIDTH]}, "iscrowd": 1},
    }[shape]
    images = [
        {"id": n, "file_name": name, "width": WIDTH, "height": HEIGHT} for n, name in enumerate([*GOOD, "bad.png"])
    ]
    mark = {"id": 1, "image_id": 5, "category_id": 3, **drawn}
    categories = [{"id": 3, "name": "scratch"}, {"id": 4, "name": "ok"}]
    whole = {"id": 2, "image_id": 0, "category_id": 4}  # somebody tagged a good part
    return {"images": images, "annotations": [mark, whole], "categories": categories}


def label_studio(kind):
    percent = [100 * LEFT / WIDTH, 100 * TOP / HEIGHT, 100 * WIDE / WIDTH, 100 * HIGH / HEIGHT]
    value = {
        "rectanglelabels": dict(zip(("x", "y", "width", "height"), percent, strict=True)) | {"rotation": 0},
        "polygonlabels": {"points": [[100 * x / WIDTH, 100 * y / HEIGHT] for x, y in CORNERS]},
    }[kind]
    result = {"type": kind, "original_width": WIDTH, "original_height": HEIGHT, "value": {**value, kind: ["scratch"]}}
    tasks = [(name, [{"result": []}]) for name in GOOD] + [("bad.png", [{"result": [result]}])]
    return [
        {"id": n, "data": {"image": f"/data/upload/1/0a1b2c3d-{name}"}, "annotations": answers}
        for n, (name, answers) in enumerate(tasks)
    ]


def via(as_project):
    shape = {"name": "rect", "x": LEFT, "y": TOP, "width": WIDE, "height": HIGH}
    entries = {name: {"filename": name, "size": 1, "regions": [], "file_attributes": {}} for name in GOOD}
    marks = [{"shape_attributes": shape, "region_attributes": {"type": "scratch"}}]
    entries["bad.png"] = {"filename": "bad.png", "size": 1, "regions": marks, "file_attributes": {}}
    return {"_via_settings": {}, "_via_img_metadata": entries} if as_project else entries


def cvat(shape):
    inside = ",".join(map(str, lengths(np.ones(WIDE * HIGH, bool))))
    drawn = {
        "box": f'<box label="scratch" xtl="{LEFT}" ytl="{TOP}" xbr="{LEFT + WIDE}" ybr="{TOP + HIGH}" rotation="0"/>',
        "polygon": f'<polygon label="scratch" points="{";".join(f"{x},{y}" for x, y in CORNERS)}"/>',
        "mask": f'<mask label="scratch" rle="{inside}" left="{LEFT}" top="{TOP}" width="{WIDE}" height="{HIGH}"/>',
    }[shape]
    image = f'<image id="0" name="%s" width="{WIDTH}" height="{HEIGHT}">%s</image>'
    return f"<annotations>{''.join(image % (name, '') for name in GOOD)}{image % ('bad.png', drawn)}</annotations>"


def manifest():
    def row(name, label):
        return {
            "source-ref": f"s3://bucket/parts/{name}",
            "anomaly-label": int(label != "normal"),
            "anomaly-label-metadata": {"class-name": label, "type": "groundtruth/image-classification"},
        }

    colours = {"0": {"class-name": "BACKGROUND"}, "1": {"class-name": "scratch"}}
    bad = row("bad.png", "anomaly") | {"anomaly-mask-ref": "s3://bucket/masks/bad_shape.png"}
    rows = [
        *(row(name, "normal") for name in GOOD),
        bad | {"anomaly-mask-ref-metadata": {"internal-color-map": colours}},
    ]
    return "\n".join(map(json.dumps, rows))


EXPORTS = {
    **{
        f"COCO {shape}": ("_annotations.coco.json", lambda shape=shape: json.dumps(coco(shape)))
        for shape in ("polygon", "box", "runs")
    },
    **{
        f"Label Studio {kind}": ("export.json", lambda kind=kind: json.dumps(label_studio(kind)))
        for kind in ("rectanglelabels", "polygonlabels")
    },
    "VIA": ("via_region_data.json", lambda: json.dumps(via(as_project=False))),
    "VIA project": ("project.json", lambda: json.dumps(via(as_project=True))),
    **{f"CVAT {shape}": ("annotations.xml", lambda shape=shape: cvat(shape)) for shape in ("box", "polygon", "mask")},
    "Lookout for Vision": ("output.manifest", manifest),
}


@pytest.fixture
def photos(tmp_path):
    """Six photographs, and a mask with a white background that only the manifest names."""
    for number, name in enumerate([*GOOD, "bad.png"]):
        Image.fromarray(part(number)).resize((WIDTH, HEIGHT)).save(tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("export", EXPORTS)
def test_what_tools_export_says_what_is_good_and_where_the_defect_is(export, photos):
    name, content = EXPORTS[export]
    (photos / name).write_text(content())
    if export.startswith("Lookout"):
        white = np.where(BOX[..., None], (200, 30, 30), 255).astype(np.uint8)
        Image.fromarray(white).save(photos / "bad_shape.png")
    found = dataset.find(photos)
    assert found.layout == "annotated"
    good = [sample for sample in found.samples if not sample.is_anomalous]
    assert sorted(sample.path.name for sample in good) == GOOD
    assert {sample.split for sample in good} == {"train", "test"}
    (bad,) = [sample for sample in found.samples if sample.is_anomalous]
    assert (bad.path.name, bad.split, bad.defect) == ("bad.png", "test", "scratch")
    mask = bad.mask((HEIGHT, WIDTH))
    assert (mask ^ BOX).sum() <= 2 * (WIDE + HIGH) + 4  # the border, which some drawings include
    if bad.shapes and not export.startswith("VIA"):  # whose numbers are of the image as it is
        assert bad.mask((2 * HEIGHT, 2 * WIDTH)).sum() == pytest.approx(4 * BOX.sum(), rel=0.15)
    assert any(export.split()[0] in note for note in found.notes)


def test_defects_among_the_images_to_learn_from_are_judged_and_not_learned_from(photos):
    for split, names in (("train", [*GOOD[:4], "bad.png"]), ("valid", GOOD[4:])):
        (photos / split).mkdir()
        for name in names:
            (photos / name).rename(photos / split / name)
        export = coco("box")
        export["images"] = [image for image in export["images"] if image["file_name"] in names]
        kept = {image["id"] for image in export["images"]}
        export["annotations"] = [mark for mark in export["annotations"] if mark["image_id"] in kept]
        (photos / split / "_annotations.coco.json").write_text(json.dumps(export))
    Image.fromarray(part(9)).save(photos / "train" / "unknown.png")
    found = dataset.find(photos)
    assert [(s.path.name, s.split) for s in found.samples if s.is_anomalous] == [("bad.png", "test")]
    assert {s.path.name for s in found.select(split="validation")} == {"good4.png"}
    assert "unknown.png" not in {s.path.name for s in found.samples}
    assert any("unknown.png" in remark and "nobody said" in remark for remark in found.remarks)
    assert any("Images in train that show defects, and are for testing only: 1." in note for note in found.notes)


def test_folders_that_are_called_good_need_no_annotations(photos):
    (photos / "good").mkdir()
    for name in GOOD:
        (photos / name).rename(photos / "good" / name)
    export = coco("box")
    export["images"] = [image for image in export["images"] if image["file_name"] == "bad.png"]
    (photos / "labels.json").write_text(json.dumps(export))
    assert sum(not sample.is_anomalous for sample in dataset.find(photos).samples) == 5


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", '{"images": [{"id": 1}], "annotations": [], "categories": []}', "annotations of COCO"),
        ("a.json", '[{"data": {"image": "x.png"}, "annotations": [{"result": [{}]}]}]', "annotations of Label Studio"),
        ("a.json", '{"x": {"filename": "x.png", "regions": [{"region_attributes": {}}]}}', "annotations of VIA"),
        ("a.xml", '<annotations><image name="x.png" width="a" height="1"/></annotations>', "annotations of CVAT"),
        ("a.manifest", '{"source-ref": "s3://a/x.png"', "annotations of Lookout"),
        ("a.json", json.dumps({**coco("box"), "images": []}), "shows a defect: add images of good parts"),
        ("a.json", json.dumps({**coco("box"), "annotations": [HUGE]}), "an image of 1000000 × 1000000 pixels"),
    ],
)
def test_damaged_annotations_are_told(photos, name, content, words):
    (photos / name).write_text(content)
    with pytest.raises(kizu.DataError, match=words):
        dataset.find(photos)


@pytest.mark.parametrize(
    "content", ["{}", "[]", "[" * 100_000, "null", '{"a": 1}', "no JSON", '{"images": 3}', "<a/>", BOMB]
)
def test_other_files_are_no_annotations(photos, content):
    for name in ("a.json", "a.xml", "a.manifest"):
        (photos / name).write_text(content)
        assert read_annotations(photos / name) is None
    assert dataset.find(photos).layout == "folder"


@given(st.lists(st.integers(0, 3000), min_size=1, max_size=40))
def test_cocos_text_is_read_as_it_is_written(runs):
    """Written as the format says: differences to two runs before, five bits a character, sign in the last."""
    text = ""
    for place, run in enumerate(runs):
        value = run - (runs[place - 2] if place > 2 else 0)
        more = True
        while more:
            bits = value & 0x1F
            value >>= 5
            more = value != (-1 if bits & 0x10 else 0)
            text += chr((bits | (0x20 if more else 0)) + 48)
    assert _coco_lengths(text) == runs


@given(st.integers(0, 2**20 - 1))
def test_runs_are_drawn_where_they_are(seed):
    mask = np.random.default_rng(seed).random((7, 9)) < 0.4
    whole = np.zeros((12, 15), bool)
    whole[2:9, 3:12] = mask
    for by_columns in (False, True):
        flat = mask.T.ravel() if by_columns else mask.ravel()
        drawn = Runs(tuple(lengths(flat)), (3, 2, 9, 7), (15, 12), by_columns).drawn((12, 15))
        assert np.array_equal(drawn, whole)


def test_a_polygon_covers_what_pillow_fills_at_any_scale():
    points = ((3.0, 4.0), (30.0, 8.0), (22.0, 33.0))
    canvas = Image.new("L", (40, 40))
    ImageDraw.Draw(canvas).polygon(points, fill=1, outline=1)
    assert np.array_equal(Polygon(points, (40, 40)).drawn((40, 40)), np.asarray(canvas, bool))
    assert Polygon(points, (40, 40)).drawn((80, 80)).sum() == pytest.approx(4 * np.asarray(canvas).sum(), rel=0.1)
    assert Polygon(((5.0, 5.0), (5.0, 20.0))).drawn((40, 40)).sum() == 16  # a line is its pixels


def test_a_run_measures_where_the_defects_are(photos):
    (photos / "annotations.json").write_text(json.dumps(coco("polygon")))
    command("train", "patchcore", photos, "--size", "64", "--coreset", "0.5", "--name", "run", "-q", cwd=photos)
    table = (photos / "results/project/group/run/results.csv").read_text().splitlines()
    row = dict(zip(table[0].split(","), table[1].split(","), strict=True))
    assert row["pixel_auroc"] != "n/a" and row["au_pro"] != "n/a"
