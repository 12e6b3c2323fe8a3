"""One pose for all photographs: it is found, undone in the map, and the same in every form of a model."""

import json
import pickle
import shutil
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageDraw

import kizu
from kizu.data.geometry.alignment import Alignment, Pose, Range, laid_back, moved, turned
from kizu.data.preprocessing import Preprocessing
from kizu.detectors import DETECTORS, detector_class
from kizu.errors import ModelError
from kizu.export import export
from kizu.export.reference_files import write_reference
from kizu.inference import model_json
from processes import kizu as command
from test_detectors import SETTINGS

HEIGHT, WIDTH = 120, 150


def bracket(degrees=0.0, shift=(0.0, 0.0), seed=0, spots=(), size=(HEIGHT, WIDTH)):
    """An L-shaped part with a hole on a table, turned clockwise and shifted by shares of the shorter side.

    Each of `spots` is a place (x, y) in shares of the shorter side from the middle of the unturned part.
    """
    height, width = size
    finer, shorter = 4, min(size)
    canvas = Image.new("RGB", (finer * width, finer * height), (52, 48, 44))
    angle = np.deg2rad(degrees)

    def at(x, y):
        across = np.cos(angle) * x - np.sin(angle) * y + shift[0]
        down = np.sin(angle) * x + np.cos(angle) * y + shift[1]
        return finer * (shorter * across + width / 2), finer * (shorter * down + height / 2)

    def disc(x, y, radius, colour):
        x, y = at(x, y)
        radius *= finer * shorter
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)

    pen = ImageDraw.Draw(canvas)
    corners = [(-0.25, -0.3), (-0.05, -0.3), (-0.05, 0.1), (0.25, 0.1), (0.25, 0.28), (-0.25, 0.28)]
    pen.polygon([at(x, y) for x, y in corners], fill=(172, 170, 180))
    disc(-0.15, -0.2, 0.05, (60, 56, 52))
    for x, y in spots:
        disc(x, y, 0.05, (240, 60, 40))
    pixels = np.asarray(canvas.resize((width, height), Image.Resampling.BOX), np.float32)
    noisy = pixels + np.random.default_rng(seed).normal(0, 3, pixels.shape)
    return np.clip(noisy, 0, 255).astype(np.uint8)


def poses(count, seed=0, most=0.1):
    rng = np.random.default_rng(seed)
    return [(float(rng.uniform(0, 360)), tuple(rng.uniform(-most, most, 2).tolist())) for _ in range(count)]


GOOD = [bracket(*pose, seed=number) for number, pose in enumerate(poses(12))]


@pytest.fixture(scope="module")
def alignment():
    return Alignment(Alignment.learned([bracket(seed=number) for number in range(4)])[0].reference)  # among all poses


@pytest.fixture(scope="module")
def fitted():
    return kizu.PatchCore(size=96, coreset=0.2, align=True).fit(iter(GOOD))


@pytest.fixture(scope="module")
def saved_and_exported(fitted, tmp_path_factory):
    return fitted.save(tmp_path_factory.mktemp("saved")), export(fitted, tmp_path_factory.mktemp("exported")).folder


@pytest.mark.parametrize("size", [(120, 150), (150, 120), (100, 260), (400, 400)])
def test_a_pose_is_found_wherever_the_part_lies(alignment, size):
    for number, (degrees, shift) in enumerate(poses(12, seed=5, most=0.15)):
        pose = alignment.pose(bracket(degrees, shift, seed=100 + number, size=size))
        assert abs((pose.degrees - degrees + 180) % 360 - 180) < 1, (pose, degrees)
        np.testing.assert_allclose(pose.shift, shift, atol=0.01)
        assert pose.likeness > 0.95


def test_what_good_parts_never_do_is_not_put_right():
    """A part upside down, or beside its place, is a defect where good parts lie alike."""
    lying = [(float(degrees), (0.01 * number - 0.03, 0.0)) for number, degrees in enumerate((-4, -1, 0, 0, 1, 2, 4))]
    alignment, poses = Alignment.learned([bracket(*pose, seed=number) for number, pose in enumerate(lying)])
    assert 4 < alignment.range.degrees[1] < 20 and 0.02 < alignment.range.right[1] < 0.1 > alignment.range.down[1]
    assert np.ptp([pose.degrees for pose in poses]) == pytest.approx(8, abs=1)
    for degrees, shift in ((180.0, (0.0, 0.0)), (60.0, (0.0, 0.0)), (0.0, (0.2, 0.0)), (0.0, (0.0, -0.2))):
        wrong = alignment.pose(bracket(degrees, shift, seed=50))
        assert alignment.range.nearest(wrong.degrees, *wrong.shift) == pytest.approx(
            (wrong.degrees, *wrong.shift), abs=1e-3
        )
        assert wrong.likeness < min(pose.likeness for pose in poses) - 0.05
    model = kizu.PatchCore(size=96, coreset=0.2, align=True)
    model.fit([bracket(*pose, seed=10 * turn + number) for turn in range(3) for number, pose in enumerate(lying)])
    assert model.predict(bracket(180.0, seed=90)).is_anomalous
    assert model.predict(bracket(0.0, (0.2, 0.1), seed=91)).is_anomalous
    assert not model.predict(bracket(1.5, (0.01, 0.0), seed=92)).is_anomalous


def test_the_range_of_poses_goes_all_round_where_good_parts_do():
    anyhow = Range.of([Pose(15.0 * number, (0.0, 0.0), 1.0) for number in range(24)])
    assert anyhow.degrees[1] == 180 and anyhow.nearest(179.0, 0.0, 0.0)[0] == 179.0
    across = Range.of([Pose(angle, (0.0, 0.0), 1.0) for angle in (178.0, 180.0, -178.0, -179.0)])
    assert across.nearest(-177.0, 0.0, 0.0)[0] % 360 == pytest.approx(183.0)
    assert across.nearest(0.0, 0.0, 0.0)[0] % 360 == pytest.approx(180, abs=8)


def test_a_defect_does_not_turn_the_part(alignment):
    for number, (degrees, shift) in enumerate(poses(8, seed=6)):
        whole = alignment.pose(bracket(degrees, shift, seed=number))
        spoilt = alignment.pose(bracket(degrees, shift, seed=number, spots=[(0.15, 0.2), (-0.15, 0.0)]))
        assert abs((whole.degrees - spoilt.degrees + 180) % 360 - 180) < 1.5
        np.testing.assert_allclose(whole.shift, spoilt.shift, atol=0.015)


def test_a_photograph_of_nothing_has_some_pose(alignment):
    for nothing in (np.zeros((60, 60, 3), np.uint8), np.full((8, 300, 3), 255, np.uint8)):
        pose = alignment.pose(nothing)
        assert np.isfinite([pose.degrees, *pose.shift, pose.likeness]).all() and pose.likeness < 0.5


def test_a_very_long_photograph_takes_no_more_memory_than_others(alignment):
    preprocessing = Preprocessing((96, 96), None, alignment)
    strip = np.random.default_rng(0).integers(0, 256, (8, 1_000_000, 3), dtype=np.uint8)
    tracemalloc.start()
    for photo in (strip, strip.transpose(1, 0, 2)):
        seen, pose = preprocessing.posed(photo)
        assert seen.shape == (96, 96, 3) and np.isfinite(pose.degrees)
        turned(photo, Pose(90.0, (0.1, 0.1), 0.5), (96, 96))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 100e6


@pytest.mark.parametrize("resize", [None, 110])
@pytest.mark.parametrize("size", [(96, 96), (96, 160)])
def test_a_map_is_laid_back_to_where_it_was_seen(alignment, size, resize):
    preprocessing = Preprocessing(size, resize, alignment)
    for number, (degrees, shift) in enumerate(poses(6, seed=7)):
        photo = bracket(degrees, shift, seed=number, spots=[(0.1, 0.18)])
        seen, pose = preprocessing.posed(photo)
        assert seen.shape == (*size, 3)
        red = seen[..., 0].astype(np.float32) - seen[..., 2]
        back = preprocessing.restore(red, photo.shape[:2], pose)
        was_red = photo[..., 0].astype(np.float32) - photo[..., 2] > 100
        y, x = np.unravel_index(back.argmax(), back.shape)
        assert was_red[y, x]
        middle = tuple(float(np.mean(places)) for places in np.nonzero(was_red)[::-1])
        column, row = preprocessing.locate(middle, photo.shape[:2], pose)
        assert red[int(row), int(column)] > 100


def test_geometry_of_a_pose_is_undone_exactly():
    shape, size = (90, 140), (64, 96)
    for number, (degrees, shift) in enumerate(poses(6, seed=8)):
        pose = Pose(degrees, shift, 1.0)
        values = np.zeros(size, np.float32)
        values[20 + number, 40 - number] = 1
        y, x = np.unravel_index(laid_back(values, pose, shape).argmax(), size)
        column, row = moved((x + 0.5, y + 0.5), pose, shape, size)
        assert abs(column - (40.5 - number)) < 1 and abs(row - (20.5 + number)) < 1


def test_turning_by_nothing_changes_nothing_but_the_size():
    photo = bracket()
    seen = turned(photo, Pose(0, (0, 0), 1), (HEIGHT, WIDTH))
    assert np.abs(seen.astype(int) - photo).mean() < 2


def test_what_lies_outside_in_other_poses_is_not_inspected():
    still, shapes = [Pose(0.0, (0.0, 0.0), 1.0)] * 20, [(50, 50)] * 20
    assert Preprocessing((32, 32)).inspected(still, shapes).all()
    anyhow = [Pose(18.0 * number, (0.0, 0.0), 1.0) for number in range(20)]
    y, x = np.mgrid[:64, :64] - 31.5
    for resize, radius in (
        (None, 32),
        (80, 40),
    ):  # of the disc that lies in every photograph; 80: its middle is cut out
        seen = Preprocessing((64, 64), resize).inspected(anyhow, shapes)
        assert seen[np.hypot(y, x) < radius - 1].all() and not seen[np.hypot(y, x) > radius + 2].any()


def test_an_aligned_model_finds_what_is_wrong_in_any_pose(fitted):
    assert 0.4 < fitted.facts["alignment"]["inspected"] < 0.65  # the largest disc, less what shifts take
    assert any("inspected" in remark for remark in fitted.remarks)
    for number, pose in enumerate(poses(6, seed=9)):
        good = fitted.predict(bracket(*pose, seed=50 + number))
        bad = fitted.predict(bracket(*pose, seed=50 + number, spots=[(0.12, 0.19)]))
        assert bad.is_anomalous and not good.is_anomalous
        box = bad.regions[0].box
        photo = bracket(*pose, seed=50 + number, spots=[(0.12, 0.19)]).astype(int)
        y, x = (int(np.mean(places)) for places in np.nonzero(photo[..., 0] - photo[..., 2] > 100))
        assert box[0] - 8 <= x <= box[0] + box[2] + 8 and box[1] - 8 <= y <= box[1] + box[3] + 8


def test_what_is_not_inspected_raises_no_alarm(fitted):
    photo = bracket(20.0, seed=70)
    spoilt = photo.copy()
    spoilt[:8, :8] = 255
    assert fitted.predict(spoilt).score == pytest.approx(fitted.predict(photo).score, rel=0.05)


@pytest.mark.parametrize(
    "method", [pytest.param(method, marks=() if method == "patchcore" else pytest.mark.slow) for method in DETECTORS]
)
def test_each_method_aligns_alike_saved_pickled_and_loaded(method, tmp_path):
    settings = {**SETTINGS[method], "align": True}
    detector = detector_class(method)(**settings).fit(GOOD)
    loaded = kizu.load(detector.save(tmp_path / method))
    photo = bracket(77.0, (0.05, -0.04), seed=80, spots=[(0.1, 0.18)])
    first = detector.predict(photo)
    assert first.pose is not None and abs(first.input_map[0, 0] - first.input_map.min()) < 0.1 * np.ptp(first.input_map)
    for other in (loaded, pickle.loads(pickle.dumps(loaded))):
        assert other.preprocessing == detector.preprocessing
        assert other.predict(photo) == first and other.predict(photo).pose == first.pose


@pytest.mark.slow
def test_an_exported_model_aligns_alike(fitted, saved_and_exported):
    exported = kizu.load(saved_and_exported[1])
    for number, pose in enumerate(poses(4, seed=10)):
        photo = bracket(*pose, seed=90 + number, spots=[(0.1, 0.18)][: number % 2])
        first, second = fitted.predict(photo), exported.predict(photo)
        assert first.pose == second.pose and first.score == pytest.approx(second.score, rel=1e-4)
        np.testing.assert_allclose(first.anomaly_map, second.anomaly_map, atol=1e-4 * first.anomaly_map.max())
    evidence = exported.predict(photo).why()
    assert evidence and evidence[0].query_crop.shape == fitted.predict(photo).why()[0].query_crop.shape


def test_an_updated_model_keeps_its_pose_and_what_it_inspects(tmp_path):
    model = kizu.load(kizu.PatchCore(size=96, coreset=0.2, align=True).fit(GOOD).save(tmp_path / "model"))
    before, area = model.preprocessing, model.graph.upsample.inspected
    model.update([bracket(*pose, seed=200 + number) for number, pose in enumerate(poses(4, seed=11))])
    assert model.preprocessing == before and (model.graph.upsample.inspected == area).all()


@pytest.mark.parametrize(
    "method", [pytest.param(method, marks=() if method == "patchcore" else pytest.mark.slow) for method in DETECTORS]
)
def test_the_published_systems_have_no_files_for_it(method, tmp_path):
    plain = {
        "patchcore": {"fusion": "stack", "local_scale": False, "top": 0, "patchsize_aggregate": ""},
        "efficientad": {"border": "stretch", "size": 256, "smoothing": 0},
    }
    settings = {**SETTINGS[method], **plain.get(method, {}), "align": True}
    detector = detector_class(method)(**settings).fit(GOOD)
    with pytest.raises(ModelError, match="do not align"):
        write_reference(detector, tmp_path / "published")
    assert not (tmp_path / "published").exists()


def test_models_of_different_poses_are_not_merged(fitted):
    other = kizu.PatchCore(size=96, coreset=0.2, align=True).fit(
        [bracket(degrees + 90, shift, seed=300 + n) for n, (degrees, shift) in enumerate(poses(8))]
    )
    with pytest.raises(ModelError, match="pose of its own"):
        kizu.PatchCore.merge([fitted, other])


def test_a_model_without_the_reference_that_its_settings_speak_of_is_refused(fitted, tmp_path):
    folder = fitted.save(tmp_path / "model")
    about = model_json.read(folder)
    del about["alignment"]
    (folder / "model.json").unlink()
    model_json.write(folder, about)
    with pytest.raises(ModelError, match="reference"):
        kizu.load(folder)


@pytest.mark.parametrize(
    "text", ["", "no base64", "AAAA", Alignment(np.zeros((99, 99, 3), np.uint8)).to_json()["reference"]]
)
def test_a_damaged_reference_is_refused(text, saved_and_exported, tmp_path):
    for model in saved_and_exported:
        folder = shutil.copytree(model, tmp_path / model.name)
        about = model_json.read(folder)
        about["alignment"]["reference"] = text
        (folder / "model.json").unlink()
        model_json.write(folder, about)
        with pytest.raises(ModelError, match="damaged"):
            kizu.load(folder)


def test_photographs_of_unlike_things_are_said_to_be_unfit():
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, (96, 96, 3), dtype=np.uint8) for _ in range(6)]
    detector = kizu.PatchCore(size=96, coreset=0.2, align=True).fit(noise)
    assert any("too unlike" in remark and "is inspected" in remark for remark in detector.remarks)


def test_the_command_line_aligns(tmp_path):
    for number, photo in enumerate(GOOD):
        path = tmp_path / "parts" / "good" / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo).save(path)
    options = ["--size", "96", "--coreset", "0.2", "--align", "--output", tmp_path / "results", "--name", "one"]
    done = command("train", "patchcore", tmp_path / "parts", *options)
    assert "to one pose" in done.stdout + done.stderr


def test_an_alignment_is_kept_without_loss(alignment):
    again = Alignment.from_json(json.loads(json.dumps(alignment.to_json())))
    photo = bracket(33.0, (0.02, 0.03), seed=1)
    assert again == alignment and again.pose(photo) == alignment.pose(photo)
    assert replace(Preprocessing((96, 96)), alignment=again) == Preprocessing((96, 96), None, alignment)
