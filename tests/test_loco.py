"""MVTec LOCO: saturation, sPRO against its definition and cases worked by hand, maps for the official scripts."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import roc_auc_score

from kizu.data import dataset
from kizu.data.masks import Region, Saturation, read_regions, read_saturations
from kizu.errors import DataError, OptionError
from kizu.evaluation import loco_metrics, metrics
from kizu.evaluation.evaluate import evaluate
from test_detectors import part

ENTRY = {"defect_name": "one", "pixel_value": 255, "saturation_threshold": 3, "relative_saturation": False}


def oracle(images, limit):
    """sPRO at every threshold by the definition, positive strictly above it, then the area by trapezoids.

    `images`: (map, [(mask, saturation threshold, relative)]).
    """
    levels = sorted({float(v) for values, _ in images for v in values.ravel()}, reverse=True)
    points = []
    for level in [*levels, levels[-1] - 1]:
        shares, alarms, good = [], 0, 0
        for values, regions in images:
            positive = values > level
            union = np.zeros(values.shape, bool)
            for mask, threshold, relative in regions:
                union |= mask
                area = mask.sum()
                enough = max(1, int(threshold * area)) if relative else min(threshold, area)
                shares.append(min((positive & mask).sum() / enough, 1.0))
            alarms += (positive & ~union).sum()
            good += (~union).sum()
        points.append((alarms / good, float(np.mean(shares))))
    total = 0.0
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x1 > limit:
            if x0 >= limit:
                break
            y1 = y0 + (y1 - y0) * (limit - x0) / (x1 - x0)
            x1 = limit
        total += (x1 - x0) * (y0 + y1) / 2
    return total / limit


@st.composite
def scored_images(draw):
    """A few small images; regions overlap; few levels, so that scores tie."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    levels = draw(st.sampled_from([2, 3, 7, 1000]))
    images = []
    for number in range(draw(st.integers(1, 4))):
        shape = tuple(rng.integers(2, 9, 2))
        values = rng.integers(0, levels, shape).astype(np.float32) / 7
        regions = []
        for _ in range(rng.integers(1 if number == 0 else 0, 4)):
            mask = rng.random(shape) < rng.choice([0.1, 0.4, 0.8])
            mask[0, 0], mask[-1, -1] = True, False
            relative = bool(rng.random() < 0.5)
            regions.append(
                (mask, rng.choice([0.01, 0.3, 0.5, 1.0]) if relative else int(rng.integers(1, 30)), relative)
            )
        images.append((values, regions))
    return images


def as_regions(regions):
    return [
        Region(mask, Saturation("any", threshold, relative).pixels(int(mask.sum())))
        for mask, threshold, relative in regions
    ]


@settings(max_examples=500, deadline=None)
@given(scored_images())
def test_spro_equals_the_definition(images):
    areas, _ = metrics.au_spro(
        lambda: ((values, as_regions(regions)) for values, regions in images), loco_metrics.LIMITS
    )
    assert areas == pytest.approx([oracle(images, limit) for limit in loco_metrics.LIMITS], abs=1e-9)


def test_the_pieces_in_which_good_pixels_are_counted_change_nothing(monkeypatch):
    rng = np.random.default_rng(0)
    maps = rng.integers(0, 50, (9, 20, 30)).astype(np.float32)
    masks = rng.random((9, 20, 30)) < 0.02
    whole = metrics.pixel_metrics(maps, masks)[0]
    monkeypatch.setattr(metrics, "MIN_SORTED", 1)
    assert metrics.pixel_metrics(maps, masks)[0] == whole
    expected = (*metrics.ranking(maps.ravel(), masks.ravel()), metrics.au_pro(maps, masks))
    assert list(whole.values()) == pytest.approx(expected, abs=1e-12)


def row(*values):
    return np.array([values], dtype=np.float32)


def region(first, last, saturation, width):
    pixels = np.zeros((1, width), bool)
    pixels[0, first:last] = True
    return Region(pixels, saturation)


def test_spro_of_a_case_worked_by_hand():
    # Region of 4 pixels scored 9 7 3 1, of which 2 are enough: a half found above 7, all found from 7 down.
    # Good pixels 8 6 5 4 and 0 × 6: the rate is 0.1 between 8 and 6. So sPRO is ½ up to the rate 0.1 and 1 after it.
    images = [(row(9, 7, 3, 1, 8, 6, 5, 4, 0, 0, 0, 0, 0, 0), [region(0, 4, 2, 14)])]
    areas, _ = metrics.au_spro(lambda: images, (0.05, 0.1, 0.3, 1.0))
    assert areas == pytest.approx([0.5, 0.5, (0.05 + 0.2) / 0.3, 0.95])
    # Saturated by all 4: found ¼ at 9, the rate goes to 0.1 at 8; ½ at 7, the rate goes to 0.4 at 6 5 4; ¾ and 1 below.
    images = [(images[0][0], [region(0, 4, 4, 14)])]
    areas, _ = metrics.au_spro(lambda: images, (0.1, 1.0))
    assert areas == pytest.approx([0.25, 0.25 * 0.1 + 0.5 * 0.3 + 1.0 * 0.6])


def test_spro_with_ties_and_overlap_worked_by_hand():
    # Regions 0–1 (saturated by 1) and 1–3 (by 2) share pixel 1. All of 5 5 2 2 | 5 2: two levels.
    # Level 5: found 1 and ½, mean ¾, rate ½; level 2: 1 and 1, rate 1. Trapezoids from (0, 0): slope 1.5, then to 1.
    images = [(row(5, 5, 2, 2, 5, 2), [region(0, 2, 1, 6), region(1, 4, 2, 6)])]
    areas, _ = metrics.au_spro(lambda: images, (0.3, 1.0))
    assert areas == pytest.approx([1.5 * 0.3 / 2, 0.5 * 0.75 / 2 + 0.5 * (0.75 + 1) / 2])


def test_constant_maps_rise_evenly():
    images = [(row(1, 1, 1, 1), [region(0, 2, 1, 4)]), (row(1, 1, 1, 1), [])]
    assert metrics.au_spro(lambda: images, (0.05, 1.0))[0] == pytest.approx([0.025, 0.5])


def test_saturation_is_counted_in_whole_pixels_between_one_and_the_region():
    assert [Saturation("", 0.5, True).pixels(area) for area in (1, 2, 5)] == [1, 1, 2]
    assert [Saturation("", 3, False).pixels(area) for area in (1, 3, 9)] == [1, 3, 3]


def test_images_are_ranked_by_type_and_pooled():
    defects = ["good", "good", "logical_anomalies", "structural_anomalies", "structural_anomalies"]
    scores, peaks = [0.0, 2.0, 1.0, 3.0, 2.0], [0.0, 1.0, 2.0, 2.0, 1.0]
    values, reasons = loco_metrics.detection(defects, scores, peaks)
    # of scores: 1 of 2 good ones below 1; both below 3; one below and one equal to 2
    assert values["image_auroc_logical"] == 0.5 and values["image_auroc_structural"] == 0.875
    assert values["image_auroc_by_type"] == 0.6875 and not reasons
    assert values["map_auroc_logical"] == 1.0 and values["map_auroc_structural"] == 0.875
    pooled, _ = metrics.image_metrics(scores, [defect != "good" for defect in defects])
    assert pooled["image_auroc"] == pytest.approx(roc_auc_score([0, 0, 1, 1, 1], scores)) == pytest.approx(0.75)


def test_a_missing_type_is_said_and_not_averaged():
    values, reasons = loco_metrics.detection(["good", "logical_anomalies"], [0.0, 1.0], [0.0, 1.0])
    assert values["image_auroc_logical"] == 1.0 and values["image_auroc_by_type"] is None
    assert "structural" in reasons["image_auroc_structural"] and "both" in reasons["image_auroc_by_type"]
    images = [(row(0, 0), []), (row(1, 0), [region(0, 1, 1, 2)])]
    values, reasons = loco_metrics.localisation(["good", "logical_anomalies"], images.__getitem__)
    assert values["au_spro_logical_0.05"] == 1.0 and values["au_spro_by_type_0.05"] is None
    assert len(values) == 15 and len(reasons) == 10


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "JSON"),
        ("{}", "not a list"),
        ([{"defect_name": "x"}], "entry 1, lacks"),
        ([ENTRY | {"pixel_value": 256}], "from 1 to 255"),
        ([ENTRY, ENTRY], "entry 2, has the pixel_value 255"),
        ([ENTRY | {"relative_saturation": 1}], "true or false"),
        ([ENTRY | {"saturation_threshold": 0}], "above 0"),
        ([ENTRY | {"relative_saturation": True}], "at most 1"),
    ],
)
def test_a_wrong_table_is_refused_with_its_place(tmp_path, content, words):
    path = tmp_path / "defects_config.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(DataError, match=words):
        read_saturations(path)


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


@pytest.fixture
def juice(tmp_path):
    """A LOCO category: a spot as structural anomaly, two overlapping regions as logical one."""
    root = tmp_path / "juice"
    for number in range(12):
        save(root / "train" / "good" / f"{number:03}.png", part(number))
    for number in range(3):
        save(root / "test" / "good" / f"{number:03}.png", part(40 + number))
    side = part(0).shape[:2]
    for number, kind in enumerate(loco_metrics.TYPES.values()):
        save(root / "test" / kind / "000.png", part(50 + number, spot=True))
        for file, value in enumerate((255, 254) if number == 0 else (253,)):
            mask = np.zeros(side, np.uint8)
            mask[: side[0] // 2, : side[1] // (file + 2)] = value
            save(root / "ground_truth" / kind / "000" / f"{file:03}.png", mask)
    table = [ENTRY, ENTRY | {"pixel_value": 254, "saturation_threshold": 0.5, "relative_saturation": True}]
    table.append(ENTRY | {"pixel_value": 253, "saturation_threshold": 9, "defect_name": "spot"})
    (root / "defects_config.json").write_text(json.dumps(table))
    return root


def test_masks_become_regions_by_their_value(juice):
    data = dataset.find(juice)
    assert data.layout == "loco" and not data.left_out
    sample = next(sample for sample in data.select(split="test") if sample.defect == "logical_anomalies")
    height, width = part(0).shape[:2]
    first, second = read_regions(sample.masks, (height, width), data.saturations["juice"])
    assert first.saturation == 3 and second.saturation == (height // 2) * (width // 3) // 2
    assert all(whole.saturation == whole.pixels.sum() for whole in read_regions(sample.masks, (height, width), None))
    with pytest.raises(DataError, match="scale it"):
        read_regions(sample.masks, (5, 5), None)
    with pytest.raises(DataError, match="has the values 255 besides 0"):
        read_regions(sample.masks, (height, width), {7: Saturation("other", 1, False)})


def test_another_table_may_be_named(juice, tmp_path):
    other = tmp_path / "other.json"
    other.write_text(json.dumps([ENTRY]))
    assert set(dataset.find(juice, defects_config=other).saturations["juice"]) == {255}
    with pytest.raises(DataError, match="does not exist"):
        dataset.find(juice, defects_config=tmp_path / "none.json")
    save(tmp_path / "plain" / "0.png", part(0))
    with pytest.raises(OptionError, match="layout loco"):
        dataset.find(tmp_path / "plain", defects_config=other)


@pytest.mark.slow
def test_an_evaluation_has_locos_metrics_and_its_maps_are_what_they_were_made_from(juice, tmp_path):
    from kizu import PatchCore
    from kizu.evaluation.tables import results_csv

    data = dataset.find(juice)
    detector = PatchCore(size=(64, 64)).fit(data.select(split="train"))
    test = data.select(split="test")
    result = evaluate(
        detector, test, category="juice", root=data.root, saturations=data.saturations["juice"], maps=tmp_path / "maps"
    )
    written = {path.relative_to(tmp_path / "maps").as_posix() for path in (tmp_path / "maps").rglob("*.tiff")}
    assert "juice/test/logical_anomalies/000.tiff" in written and len(written) == 5
    images = []
    for sample in test:
        with Image.open(tmp_path / "maps" / "juice" / "test" / sample.defect / f"{sample.path.stem}.tiff") as tiff:
            values = np.asarray(tiff)
        assert values.dtype == np.float32 and values.shape == part(0).shape[:2]
        masks = [np.asarray(Image.open(path)) for path in sample.masks]
        rules = {255: (3, False), 254: (0.5, True), 253: (9, False)}
        images.append((sample.defect, (values, [(mask > 0, *rules[int(mask.max())]) for mask in masks])))
    areas = []
    for kind, defect in loco_metrics.TYPES.items():
        chosen = [image for of, image in images if of in ("good", defect)]
        areas.append(result.metrics[loco_metrics.spro_key(0.3, kind)])
        assert areas[-1] == pytest.approx(oracle(chosen, 0.3), abs=1e-9)
    assert result.metrics["au_spro_by_type_0.3"] == pytest.approx(np.mean(areas))
    assert loco_metrics.NO_CONFIG not in result.notes
    head = results_csv([result]).splitlines()[0].split(",")
    assert head[9] == "pb2" and "au_spro_structural_0.01" in head and head[-1] == "seconds"
    bare = evaluate(detector, test, category="juice", root=data.root)
    assert loco_metrics.NO_CONFIG in bare.notes
    assert bare.metrics["au_spro_logical_0.3"] != result.metrics["au_spro_logical_0.3"]
