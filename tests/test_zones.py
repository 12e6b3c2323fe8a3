"""Zones: what is ignored changes nothing, what is inspected has a threshold of its own, wherever it is drawn."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

import kizu
from kizu.config import Zone
from kizu.data.geometry.outlines import outlines
from kizu.data.geometry.zones import ZoneMap
from kizu.detectors.loading import load
from kizu.errors import BadImage, DataError, ModelError, OptionError
from kizu.export import export
from kizu.features.anomaly_map import MapUpsampling, upsampling_of
from kizu.inference.batch import FileVerdict
from kizu.inference.exported import load as load_exported
from kizu.inference.verdict import Verdict
from kizu.inference.zones import read_zones, zones_picture
from processes import kizu as command

HEIGHT, WIDTH = 120, 160


def panel(seed, left=None, right=None):
    """Two halves, a calm one and one with noise that differs much; a spot of that brightness in either."""
    rng = np.random.default_rng(seed)
    pixels = np.full((HEIGHT, WIDTH, 3), 120.0)
    pixels[:, : WIDTH // 2] += rng.normal(0, 2, (HEIGHT, WIDTH // 2, 1))
    pixels[:, WIDTH // 2 :] += rng.normal(0, 8 * rng.exponential(), (HEIGHT, WIDTH // 2, 1))
    for centre, brightness in ((WIDTH // 4, left), (3 * WIDTH // 4, right)):
        if brightness is not None:
            pixels[44:76, centre - 16 : centre + 16] += brightness
    return pixels.clip(0, 255).astype(np.uint8)


GOOD = [panel(seed) for seed in range(40)]
BORDER = 0.5
LEFT = Zone(name="calm", rings=(((0, 0), (BORDER, 0), (BORDER, 1), (0, 1)),))
RIGHT = Zone(name="noisy", rings=(((BORDER, 0), (1, 0), (1, 1), (BORDER, 1)),))
SMALL = {"size": (96, 128), "coreset": 0.2}


def pixels_of(zones, size, frame=(100, 100)):
    return ZoneMap.of(zones, frame, size, 0, 0, size)


masks = st.integers(0, 2**63).map(
    lambda seed: (
        np.asarray(
            Image.fromarray(np.random.default_rng(seed).integers(0, 256, (7, 9), np.uint8)).resize((27, 21), 0), int
        )
        > 110
    )
)


@given(masks)
def test_the_outlines_of_a_mask_cover_its_pixels_and_no_other(mask):
    if not mask.any():
        return
    height, width = mask.shape
    rings = [[(x / width, y / height) for x, y in ring] for ring in outlines(mask, tolerance=0)]
    zone = Zone(name="a", rings=rings)
    assert np.array_equal(pixels_of([zone], mask.shape).numbers == 0, mask)


def test_the_last_zone_counts_and_ignored_ones_before_all():
    inner = Zone(name="inner", rings=(((0.25, 0.25), (0.75, 0.25), (0.75, 0.75), (0.25, 0.75)),))
    whole = read_zones(["all"])[0]
    ignored = Zone(name="gap", rings=(((0.5, 0.0), (1, 0), (1, 0.5), (0.5, 0.5)),), ignored=True)
    zones = pixels_of([ignored, whole, inner], (8, 8))
    assert zones.names == ["elsewhere", "inner"]
    expected = np.zeros((8, 8), int)
    expected[2:6, 2:6] = 1
    expected[:4, 4:] = -1
    assert np.array_equal(zones.numbers, expected)
    only_ignored = pixels_of([ignored], (8, 8))
    assert only_ignored.names == [""]
    assert (only_ignored.numbers >= 0).mean() == 0.75


def test_a_centre_crop_keeps_zones_where_they_are_in_the_photograph():
    left = Zone(name="left", rings=(((0, 0), (0.5, 0), (0.5, 1), (0, 1)),), ignored=True)
    detector = kizu.PatchCore(size=64, resize=96, coreset=0.2, zones=[left]).fit(GOOD[:6])
    numbers = detector.preprocessing.zones.numbers
    assert numbers.shape == (64, 64)
    assert (numbers[:, :32] < 0).all() and (numbers[:, 32:] >= 0).all()


@pytest.fixture(scope="module")
def halves():
    return kizu.PatchCore(**SMALL, zones=[LEFT, RIGHT]).fit(GOOD)


def test_each_zone_has_a_threshold_of_its_own(halves):
    """A faint spot in the calm half is stopped, which the noisy half's spread would let pass."""
    plain = kizu.PatchCore(**SMALL).fit(GOOD)
    faint = [panel(seed, left=1.4) for seed in range(100, 112)]
    good = [panel(seed) for seed in range(200, 240)]
    stopped = {model: sum(model.predict(photo).is_anomalous for photo in faint) for model in (plain, halves)}
    assert stopped[plain] <= 4 and stopped[halves] >= 8
    assert sum(halves.predict(photo).is_anomalous for photo in good) <= 3
    limits = halves.zone_thresholds
    assert list(limits) == ["calm", "noisy"] and limits["calm"] < limits["noisy"]
    assert plain.zone_thresholds == {}


def test_a_part_is_stopped_where_any_zone_passes_its_threshold():
    detector = kizu.PatchCore(**SMALL, top=0, zones=[LEFT, RIGHT]).fit(GOOD)
    upsample, verdicts = detector.graph.upsample, set()
    for seed in range(12):
        photo = panel(seed + 300, left=1.2 + seed / 12, right=6 * (seed % 3))
        pixels = torch.from_numpy(detector.preprocessing(photo).transpose(2, 0, 1)[None].copy())
        with torch.inference_mode():
            grid = detector.graph.score_images(pixels)[1][0] * upsample.unit + upsample.typical
        peaks = grid[:, :8].max(), grid[:, 8:].max()
        limits = detector.zone_thresholds
        expected = [peak > limit for peak, limit in zip(peaks, limits.values(), strict=True)]
        prediction = detector.predict(photo)
        assert prediction.is_anomalous == any(expected)
        verdicts.add(tuple(map(bool, expected)))
    assert len(verdicts) >= 2


def test_the_verdict_and_what_is_marked_say_in_which_zone(halves):
    for side, name in (("left", "calm"), ("right", "noisy")):
        prediction = halves.predict(panel(1000, **{side: 130}))
        assert prediction.is_anomalous and prediction.zone == name
        assert prediction.regions and prediction.regions[0].zone == name
        assert prediction.to_dict()["zone"] == name


@pytest.mark.slow
@pytest.mark.parametrize("method", ["PatchCore", "SimpleNet"])
def test_a_zone_keeps_a_promise_of_its_own(method, tmp_path):
    """Each zone alone, and the others together, stop as many good parts as they may, of those that set the level."""
    settings = {"coreset": 0.2} if method == "PatchCore" else {"meta_epochs": 2, "dsc_hidden": 32}
    held_out = [panel(seed) for seed in range(1000, 1060)]
    often = LEFT.model_copy(update={"false_alarms": 0.2})
    detector = getattr(kizu, method)(size=(96, 128), **settings, zones=[often, RIGHT])
    detector.fit(GOOD, held_out=held_out, keep_copies=True)
    limit = (1 + 1e-6) * detector.threshold.value  # which is the score of one of them
    upsample = upsampling_of(detector.graph)
    stopped = {}
    for zones in ({0}, {1}, {0, 1}):
        upsample.only = frozenset(zones)
        stopped[*zones] = sum(detector.predict(photo).score > limit for photo in held_out)
    upsample.only = None
    assert stopped == {(0,): 11, (1,): 0, (0, 1): 11}  # of 61, less than a fifth, and less than 1 in 50
    assert detector.threshold.rate == pytest.approx(0.22) and "At most 22 % of good" in detector.threshold.statement
    assert detector.threshold.value == detector.facts["zones"]["level"]
    loaded = load(detector.save(tmp_path / "model"))
    assert loaded.threshold == detector.threshold
    moved = loaded.with_threshold(9.0)
    assert moved.threshold.value == 9 and moved.with_threshold(None).threshold.value == detector.threshold.value
    if method == "PatchCore":
        loaded.update([panel(seed) for seed in range(2000, 2006)])
        assert loaded.threshold.value >= detector.threshold.value


def test_what_cannot_keep_a_promise_of_its_own_is_refused():
    rare = LEFT.model_copy(update={"false_alarms": 0.001})
    with pytest.raises(OptionError, match="needs 999 good images"):
        kizu.PatchCore(**SMALL, zones=[rare, RIGHT]).fit(GOOD)
    with pytest.raises(OptionError, match="rates of false alarms of their own: there must be several"):
        kizu.PUAD(size=96, zones=[LEFT.model_copy(update={"false_alarms": 0.2}), RIGHT]).fit(GOOD)
    with pytest.raises(OptionError, match="is ignored: it stops no part"):
        kizu.PatchCore(zones=[{"name": "a", "rings": LEFT.rings, "ignored": True, "false_alarms": 0.1}])
    with pytest.raises(OptionError, match="no zone is called prnt"):
        read_zones(["print=all"], false_alarms={"prnt": 0.01})
    (zone,) = read_zones(["print=all"], false_alarms={"print": 0.01})
    assert zone.false_alarms == 0.01


def test_only_inspected_places_are_kept_and_compared():
    ignored = RIGHT.model_copy(update={"ignored": True})
    detector = kizu.PatchCore(**SMALL, zones=[ignored]).fit(GOOD)
    whole = kizu.PatchCore(**SMALL).fit(GOOD)
    for bank, all_of_it, (height, width) in zip(
        detector.graph.banks, whole.graph.banks, detector.graph.grids, strict=True
    ):
        assert ((bank.places % width) < width / 2).all() and (bank.places < height * width).all()
        assert len(bank.entries) == len(all_of_it.entries) // 2
    photo = panel(77, left=130, right=130)
    prediction = detector.predict(photo)
    assert prediction.input_map[:, 64:].max() == prediction.input_map.min()
    assert all(region.box[0] + region.box[2] <= WIDTH // 2 + 2 for region in prediction.regions)
    assert [evidence.nearest.place[0] < 0.5 for evidence in prediction.why()] == [True]


@pytest.mark.parametrize("settings", [{"local_scale": False}, {"local_scale": False, "reweight": 3, "top": 0}])
def test_scores_of_some_places_are_what_comparing_all_with_the_bank_gives(settings):
    """Slowly: every place against the bank, and those that are not inspected left out at the end."""
    ignored = RIGHT.model_copy(update={"ignored": True})
    detector = kizu.PatchCore(**SMALL, fusion="stack", **settings, zones=[ignored]).fit(GOOD[:20])
    photo, graph, bank = panel(55, left=60), detector.graph, detector.graph.banks[0]
    with torch.inference_mode():
        pixels = torch.from_numpy(detector.preprocessing(photo).transpose(2, 0, 1)[None].copy())
        rows = graph.embed(pixels)[0][0, :, :, :8].flatten(1).T
        nearest = torch.cdist(rows, bank.entries).amin(1)
        most = max(1, round(detector.config.top * len(rows)))
        expected = nearest.topk(most).values.mean()
        if detector.config.reweight > 1:
            entry = bank.entries[torch.cdist(rows, bank.entries)[nearest.argmax()].argmin()]
            around = bank.entries[torch.cdist(entry[None], bank.entries)[0].topk(3, largest=False).indices]
            expected *= 1 - torch.softmax((rows[nearest.argmax()] - around).norm(dim=1), 0)[0]
    assert detector.predict(photo).score == pytest.approx(float(expected), rel=1e-3)


def test_trained_loaded_updated_and_exported_models_agree(halves, tmp_path):
    pytest.importorskip("onnxscript")
    photos = [panel(400, left=40), panel(401, right=120), panel(402)]
    loaded = load(halves.save(tmp_path / "trained"))
    assert [loaded.predict(photo) == halves.predict(photo) for photo in photos] == [True] * 3
    exported = load_exported(export(halves, tmp_path / "exported").folder, check=None)
    assert exported.zone_thresholds == halves.zone_thresholds
    for photo in photos:
        one, other = halves.predict(photo), exported.predict(photo)
        assert other.score == pytest.approx(one.score, abs=1e-4)
        assert (other.zone, other.is_anomalous) == (one.zone, one.is_anomalous)
        assert [region.zone for region in other.regions] == [region.zone for region in one.regions]
    loaded.update([panel(seed) for seed in range(500, 506)])
    assert loaded.predict(photos[0]).zone == "calm"
    with pytest.raises(ModelError, match="several zones cannot be merged"):
        kizu.PatchCore.merge([halves, loaded])


def test_aligned_photographs_have_their_zones_on_the_part():
    from test_alignment import bracket, poses

    hole = Zone(name="hole", rings=(((0.25, 0.12), (0.42, 0.12), (0.42, 0.5), (0.25, 0.5)),), ignored=True)
    turned = [bracket(), *(bracket(*pose, seed=n) for n, pose in enumerate(poses(23), 1))]
    detector = kizu.PatchCore(size=(96, 120), coreset=0.2, align=True, zones=[hole]).fit(turned)
    pose = poses(30)[25]
    on_hole, elsewhere = (bracket(*pose, seed=50, spots=[spot]) for spot in ((-0.15, -0.2), (0.12, 0.19)))
    clean = detector.predict(bracket(*pose, seed=50))
    assert detector.predict(on_hole).score < 1.2 * clean.score
    assert detector.predict(elsewhere).is_anomalous


@pytest.mark.slow
def test_several_zones_of_every_method_are_put_on_one_scale():
    for method, settings in (
        ("SimpleNet", {"meta_epochs": 2, "dsc_hidden": 32}),
        ("EfficientAD", {"network": "embedded", "steps": 3}),
        ("PUAD", {"base_settings": {"coreset": 0.2}}),
    ):
        detector = getattr(kizu, method)(size=(96, 128), **settings, zones=[LEFT, RIGHT]).fit(GOOD)
        assert list(detector.zone_thresholds) == ([] if method == "PUAD" else ["calm", "noisy"]), method
        assert detector.predict(GOOD[0]).zone in ("calm", "noisy")


# Where zones come from


def coco(path):
    value = {
        "images": [{"id": 1, "file_name": "a.png", "width": 200, "height": 100}],
        "categories": [{"id": 1, "name": "edge"}, {"id": 2, "name": "print"}],
        "annotations": [
            {"image_id": 1, "category_id": 1, "segmentation": [[20, 10, 20, 50, 100, 50, 100, 10]]},
            {"image_id": 1, "category_id": 2, "bbox": [120, 60, 40, 20]},
            {"image_id": 1, "category_id": 2, "bbox": [120, 10, 40, 20]},
        ],
    }
    path.write_text(json.dumps(value))
    return str(path)


def via(path):
    shape = {"name": "rect", "x": 20, "y": 10, "width": 80, "height": 40}
    region = {"shape_attributes": shape, "region_attributes": {"zone": "edge"}}
    path.write_text(json.dumps({"a.png1": {"filename": "a.png", "size": 1, "regions": [region]}}))
    return str(path)


def label_studio(path):
    value = {"x": 10, "y": 10, "width": 40, "height": 40, "rectanglelabels": ["edge"]}
    result = {"type": "rectanglelabels", "value": value, "original_width": 200, "original_height": 100}
    path.write_text(json.dumps([{"data": {"image": "a.png"}, "annotations": [{"result": [result]}]}]))
    return str(path)


def mask(path):
    picture = Image.new("L", (200, 100))
    ImageDraw.Draw(picture).rectangle((20, 10, 99, 49), fill=255)
    picture.save(path)
    return str(path)


@pytest.mark.parametrize("make", [coco, via, label_studio, mask, lambda path: "20,10 100,10 100,50 20,50"])
def test_zones_come_from_annotations_masks_and_typed_corners(make, tmp_path):
    source = make(tmp_path / ("edge.png" if make is mask else "edge.json"))
    first, *others = read_zones([source], ignore=["rim=0%,0% 100%,0% 100%,5% 0%,5%"], photograph=(200, 100))
    assert first.name == ("zone 1" if "," in source else "edge")
    assert (pixels_of([first], (100, 200)).numbers == 0).sum() == 80 * 40
    assert (pixels_of([first], (100, 200)).numbers[10:50, 20:100] == 0).all()
    assert others[-1].name == "rim" and others[-1].ignored
    assert len(others) == (2 if make is coco else 1)
    if make is coco:
        assert (others[0].name, len(others[0].rings)) == ("print", 2)


@pytest.mark.parametrize(
    ("source", "kind", "words"),
    [
        ("20,10 100,10", OptionError, "three corners"),
        ("nonsense", OptionError, "is no zone"),
        ("20,10 100,10 100,50", OptionError, "photograph"),
        ("missing.json", DataError, "does not exist"),
        ("empty.png", DataError, "outlines nothing"),
        ("other.json", DataError, "no annotations"),
        ("1%,1% 2%,2% 3%,3%", OptionError, "covers nothing"),
        ("9900%,0% 9900%,9% 9999%,9%", OptionError, "less than or equal to 2"),
    ],
)
def test_what_outlines_nothing_is_refused_with_a_sentence(source, kind, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("L", (20, 20)).save("empty.png")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(kind, match=words):
        read_zones([source])


def test_zones_that_leave_nothing_are_refused():
    everything = read_zones(ignore=["all"])
    with pytest.raises(OptionError, match="nothing to inspect"):
        kizu.PatchCore(**SMALL, zones=everything).fit(GOOD[:4])
    covered = [LEFT, read_zones(["over=all"])[0]]
    with pytest.raises(OptionError, match="calm has no pixel"):
        kizu.PatchCore(**SMALL, zones=covered).fit(GOOD[:4])
    with pytest.raises(OptionError, match="several zones are called calm"):
        kizu.PatchCore(zones=[LEFT, LEFT])


def test_a_picture_shows_the_zones():
    ignored = RIGHT.model_copy(update={"ignored": True})
    picture = zones_picture(np.full((100, 200, 3), 128, np.uint8), [LEFT, ignored])
    red, _, blue = picture[50, 150].astype(int)
    assert red > blue + 20  # a wash over what is ignored
    assert (picture[50, 50] == 128).all()


def test_the_command_line_takes_zones_and_says_where(tmp_path):
    for number, pixels in enumerate(GOOD[:20]):
        folder = tmp_path / "panel/train/good"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    Image.fromarray(panel(77, left=140)).save(tmp_path / "left.png")
    Image.fromarray(panel(78, right=140)).save(tmp_path / "right.png")
    small = ["--size", "96x128", "--coreset", "0.2", "--output", tmp_path / "results"]
    zones = ["--inspect", "calm=0,0 80,0 80,120 0,120", "--inspect", "noisy=50%,0% 100%,0% 100%,60% 50%,60%"]
    zones += ["--zone-false-alarms", "noisy=0.1", "--ignore", "foot=80,72 160,72 160,120 80,120"]
    run = command("train", "patchcore", tmp_path / "panel", *zones, *small, "--name", "first")
    assert run.returncode == 0, run.stderr
    results = tmp_path / "results/project/group"
    assert [zone["name"] for zone in json.loads((results / "first/zones.json").read_text())] == [
        "calm",
        "noisy",
        "foot",
    ]
    assert "foot (ignored)" in (results / "first/report.html").read_text()
    told = command("predict", results / "first", tmp_path / "left.png", tmp_path / "right.png")
    assert "left.png  zone calm" in told.stdout and "right.png  zone noisy" in told.stdout
    about = command("info", results / "first").stdout
    assert "calm: stopped above" in about and "foot: ignored" in about and "1 in 10 good parts" in about
    more = ["--config", results / "first/run.json", "--ignore", "more=1%,1% 9%,1% 9%,9%", "--print-config"]
    assert "more" in command("train", "patchcore", tmp_path / "panel", *more).stdout  # beside those of the file
    for again in (["--zones", results / "first/zones.json"], ["--config", results / "first/run.json"]):
        run = command("train", "patchcore", tmp_path / "panel", *again, *small, "--name", "again", "--overwrite")
        assert run.returncode == 0, run.stderr
        models = [(results / name / "models/panel/model.safetensors").read_bytes() for name in ("first", "again")]
        assert models[0] == models[1]


def test_a_table_has_a_column_of_zones_only_where_there_are_some(halves, tmp_path):
    from kizu.inference.batch import predict_files, write_csv

    Image.fromarray(panel(77, left=140)).save(tmp_path / "a.png")
    plain = kizu.PatchCore(**SMALL).fit(GOOD[:6])
    heads = []
    for model in (halves, plain):
        verdicts: list[FileVerdict] = predict_files(model, [tmp_path / "a.png"])
        write_csv(tmp_path / "a.csv", verdicts)
        heads.append((tmp_path / "a.csv").read_text().splitlines()[0])
    assert heads[0] == heads[1] + ",zone"


@pytest.mark.parametrize("count", [1, pytest.param(16, marks=pytest.mark.slow)])
def test_many_zones_keep_the_promise_of_few_photographs(count):
    """Ten good parts set the level: no more of the others are stopped than may be, on average over the draws."""
    rng, stopped, size = np.random.default_rng(0), [], (8, 16)
    columns = np.linspace(0, size[1], count + 1).round().astype(int)
    numbers = np.repeat(np.arange(count), np.diff(columns))[None].repeat(size[0], 0)
    for _ in range(200):
        upsample = MapUpsampling(size, size, 0)
        upsample.inspect(numbers, None)
        grids = torch.from_numpy(rng.exponential(size=(110, *size)).astype(np.float32))
        learned, new = grids[:10], grids[10:]
        upsample.learn_units(learned)
        zoned = upsample.zoned(learned)
        scores, _ = upsample.as_if_new(upsample.scores(zoned, 0), zoned, 0)
        stopped.append(float((upsample.scores(upsample.zoned(new), 0) > scores.max()).float().mean()))
    assert np.mean(stopped) <= 1 / 11 + 0.012


def test_merged_models_ignore_what_their_parts_did():
    ignored = RIGHT.model_copy(update={"ignored": True})
    parts = [kizu.PatchCore(**SMALL, zones=[ignored]).fit(GOOD[n : n + 10]) for n in (0, 10)]
    merged = kizu.PatchCore.merge(parts)
    assert merged.predict(panel(77, right=140)) == merged.predict(panel(77))
    deep = [[photo.astype(np.uint16) << 4 for photo in GOOD[n : n + 10]] for n in (0, 10)]
    merged = kizu.PatchCore.merge([kizu.PatchCore(**SMALL).fit(photos) for photos in deep])
    assert merged.preprocessing.white == 4095
    with pytest.raises(ModelError, match="one shape and bit depth"):
        kizu.PatchCore.merge([kizu.PatchCore(**SMALL).fit(GOOD[:10]), kizu.PatchCore(**SMALL).fit(deep[1])])


def test_photographs_of_other_proportions_are_not_judged_by_zones_in_a_crop():
    zone = Zone(name="left", rings=(((0, 0), (0.5, 0), (0.5, 1), (0, 1)),), ignored=True)
    detector = kizu.PatchCore(size=64, resize=96, coreset=0.2, zones=[zone]).fit(GOOD[:6])
    with pytest.raises(BadImage, match="not shaped like the photograph of 160×120"):
        detector.predict(GOOD[0][:, :120])


def test_what_lies_outside_or_is_mixed_is_refused():
    outside = read_zones(ignore=["500,10 790,10 790,90"], photograph=(400, 100))
    with pytest.raises(OptionError, match="ignored 1 has no pixel"):
        kizu.PatchCore(**SMALL, zones=outside).fit(GOOD[:4])
    with pytest.raises(OptionError, match="all in percent"):
        read_zones(["10%,10 50,10 50,90"], photograph=(400, 400))
    many = " ".join(f"{50 + 40 * np.cos(a):.3f}%,{50 + 40 * np.sin(a):.3f}%" for a in np.linspace(0, 6, 90))
    assert len(read_zones([many])[0].rings[0]) == 90
    assert read_zones([".5%, 1% 10%, 1% 10%,20.%"])[0].rings[0][0] == (0.005, 0.01)
    names = [zone.name for zone in read_zones(["zone 2=all", "1%,1% 9%,1% 9%,9%"])]
    assert len(set(names)) == 2


def test_labels_of_any_kind_become_names(tmp_path):
    value = json.loads(Path(coco(tmp_path / "a.json")).read_text())
    for category, name in zip(value["categories"], ("rim \n", "x" * 90), strict=True):
        category["name"] = name
    (tmp_path / "a.json").write_text(json.dumps(value))
    assert [zone.name for zone in read_zones([str(tmp_path / "a.json")])] == ["rim", "x" * 60]
    for content in (
        '{"config": 3}',
        '{"config": []}',
        "[1]",
        '[{"name": "a\\u001b[31m", "rings": [[[0,0],[1,0],[1,1]]]}]',
    ):
        (tmp_path / "z.json").write_text(content)
        with pytest.raises((DataError, OptionError)):
            read_zones(file=str(tmp_path / "z.json"))


def test_what_an_earlier_version_wrote_is_read(halves):
    row = {**halves.predict(panel(77, left=140)).to_dict(), "time": "2026-01-01", "number": 1}
    assert Verdict.from_row(row).zone == "calm"
    del row["zone"]
    for region in row["regions"]:
        del region["zone"]
    assert (Verdict.from_row(row).zone, Verdict.from_row(row).verdict) == ("", "stop")
