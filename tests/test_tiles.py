"""Large photographs in tiles: no seam, one score a photograph, the same exported and served; memory that is bounded."""

import json
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from click.testing import CliRunner
from fastapi.testclient import TestClient
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

import kizu
from kizu.cli.learn.train import train
from kizu.data import image
from kizu.data.geometry.tiling import CELL, ENOUGH, VISIBLE, TiledMap, Tiling
from kizu.data.preprocessing import Preprocessing
from kizu.detectors.patchcore import detector
from kizu.detectors.stack import read_all
from kizu.errors import BadImage, DataError, OptionError
from kizu.inference.batch import predict_files, profile
from kizu.inference.prediction import Photo
from kizu.inference.regions import Marking, find_regions, find_regions_in_cells
from kizu.serving.http import application
from kizu.serving.limits import Limits
from kizu.serving.service import Service
from processes import kizu as command

HEIGHT, WIDTH = 150, 210
SPOT = slice(100, 112), slice(140, 152)
SMALL = {"size": 96, "tile": 96, "overlap": 16}


def surface(seed, height=HEIGHT, width=WIDTH, spot=False):
    """A brushed surface; a defective one has a bright spot."""
    pixels = (
        120 + np.random.default_rng(seed).normal(0, 8, (height, width, 1)) + 20 * np.sin(np.arange(width) / 9)[:, None]
    )
    if spot:
        pixels[SPOT] += 80
    return np.repeat(pixels.clip(0, 255).astype(np.uint8), 3, axis=2)


GOOD = [surface(seed, HEIGHT + 10 * (seed % 3)) for seed in range(8)]


@pytest.fixture(scope="module")
def fitted():
    return kizu.PatchCore(**SMALL).fit(GOOD)


@given(
    defect=st.floats(5, 2000),
    size=st.tuples(*[st.integers(16, 200).map(lambda side: 4 * side)] * 2),
    shape=st.tuples(*[st.integers(8, 20_000)] * 2),
)
def test_tiles_are_chosen_so_that_the_smallest_defect_can_be_seen(defect, size, shape):
    tiling = Tiling.showing(defect, size, shape)
    tile = shape if tiling is None else tiling.tile
    shown = [defect * side / covered for side, covered in zip(size, tile, strict=True)]
    assert min(shown) >= (ENOUGH if tiling is None else VISIBLE) * 0.999
    if tiling is not None:
        assert any(covered < side for covered, side in zip(tile, shape, strict=True)), "one tile is the photograph"
        assert tiling.overlap >= min(defect, min(tile) // 2) and tiling.grid(shape).shape == shape


def test_the_command_line_chooses_tiles_by_the_smallest_defect(tmp_path):
    for number in range(3):
        Image.fromarray(surface(number)).save(tmp_path / f"{number}.png")

    def run(*options):
        return CliRunner().invoke(train, ["patchcore", str(tmp_path), "--size=96", *options, "--print-config"])

    found = run("--smallest=0.5", "--pixel-size=0.05")
    assert found.exit_code == 0, found.output
    assert "--tile 96x96 --overlap 32 shows a defect of 10 pixels with 10 of" in found.output
    assert "\ntile = " in found.output and "\noverlap = 32" in found.output
    assert "too small to be seen; take photographs in which it has 5 at least" in str(run("--smallest=4").exception)
    assert "`tile` cannot be used with `zones`" in str(run("--smallest=10", "--ignore=0,0 9,0 9,9").exception)
    whole = run("--smallest=40")
    assert (
        "Without tiles, photographs of 210 x 150 show a defect of 40 pixels with 18 of" in whole.output
        and "# tile =" in whole.output
    )
    refused = run("--smallest=10", "--tile=96")
    assert isinstance(refused.exception, OptionError) and "--smallest chooses --tile" in str(refused.exception)


@pytest.fixture(scope="module")
def saved(fitted, tmp_path_factory):
    return fitted.save(tmp_path_factory.mktemp("tiles") / "model")


sides = st.integers(1, 400)
tilings = st.builds(
    lambda tile, size, overlap: Tiling(
        (tile[0], tile[1]), min(overlap, min(tile) // 2), (CELL * size[0], CELL * size[1])
    ),
    st.tuples(st.integers(32, 150), st.integers(32, 150)),
    st.tuples(st.integers(8, 24), st.integers(8, 24)),
    st.integers(0, 75),
)


@settings(max_examples=60, deadline=None)
@given(tilings, st.tuples(sides, sides))
def test_tiles_cover_every_photograph_and_a_constant_has_no_seam(tiling, shape):
    grid = tiling.grid(shape)
    covered = np.zeros(shape, bool)
    laid = TiledMap(grid)
    for number in range(len(grid)):
        top, left = grid.corner(number)
        covered[top : top + tiling.tile[0], left : left + tiling.tile[1]] = True
        laid.lay(np.full(tiling.size, 2.5, np.float32))
    assert covered.all() and laid.is_whole
    np.testing.assert_allclose(laid.values, 2.5, rtol=1e-5)
    assert laid.score == pytest.approx(2.5, rel=1e-5)
    over = grid.over(laid.values, shape)
    assert over.shape == shape
    for starts, tile, cell in zip(grid.starts, tiling.cells, grid.cell, strict=True):
        common = [first + tile - second for first, second in pairwise(starts)]
        assert all(cells * cell >= tiling.overlap - 1e-6 for cells in common)


@settings(max_examples=60, deadline=None)
@given(tilings, st.tuples(sides, sides), st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_a_place_is_found_in_a_tile(tiling, shape, share):
    grid = tiling.grid(shape)
    x, y = int(share[0] * (shape[1] - 1)), int(share[1] * (shape[0] - 1))
    number, (at_x, at_y) = grid.tile_at((x, y))
    top, left = grid.corner(number)
    for corner, at, tile, size, place in zip(
        (left, top), (at_x, at_y), tiling.tile[::-1], tiling.size[::-1], (x, y), strict=True
    ):
        assert 0 <= at < size and abs(corner + at * tile / size - (place + 0.5)) < 1e-6 + 0.002 * tile / size


def test_maps_that_agree_make_the_map_that_they_are_cut_from():
    """Tiles of a map that was made of a whole make that whole again, wherever they overlap."""
    tiling = Tiling((64, 64), 24, (64, 64))
    grid, rng = tiling.grid((200, 300)), np.random.default_rng(0)
    cells = rng.normal(size=grid.cells).astype(np.float32)
    whole = np.kron(cells, np.ones((CELL, CELL), np.float32))
    laid = TiledMap(grid)
    for number in range(len(grid)):
        top, left = grid.corner(number)
        laid.lay(whole[top : top + 64, left : left + 64])
    np.testing.assert_allclose(laid.values, cells, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([(64, 64), (80, 48), (160, 200)]))
def test_regions_are_those_of_the_whole_map(seed, tile):
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, 300, 2).tolist())
    grid = Tiling(tile, 8, (64, 64)).grid(shape)
    values = rng.normal(size=grid.cells).astype(np.float32) ** 3
    whole = grid.over(values, shape)
    assume(np.abs(whole - 1).min() > 1e-4)  # no pixel is marked or not by rounding
    found = find_regions_in_cells(grid, values, Marking(1.0, [2.0]))
    expected = find_regions(whole, Marking(1.0, [2.0]))
    assert sorted(region.box for region in found) == sorted(region.box for region in expected)
    assert [region.peak for region in found] == pytest.approx([region.peak for region in expected], rel=1e-4)
    assert sum(region.area for region in found) == sum(region.area for region in expected)


def test_one_verdict_a_photograph_of_any_size(fitted, saved):
    assert fitted.training["images"] == len(fitted.calibration_scores) == len(GOOD)
    assert fitted.threshold.count == len(GOOD)
    good, bad = fitted.predict(surface(50)), fitted.predict(surface(51, spot=True))
    assert bad.is_anomalous and bad.score > 2 * good.score
    assert bad.anomaly_map.shape == (HEIGHT, WIDTH) == bad.overlay().shape[:2]
    x, y = bad.regions[0].place
    assert SPOT[0].start - 4 <= y < SPOT[0].stop + 4 and SPOT[1].start - 4 <= x < SPOT[1].stop + 4
    evidence = bad.why()[0]
    assert evidence.region == 1 and 0 <= evidence.nearest.number < len(GOOD)
    for shape in ((1, 700), (30, 40), (97, 97), (500, 120)):
        prediction = fitted.predict(np.full((*shape, 3), 120, np.uint8))
        assert prediction.anomaly_map.shape == shape and np.isfinite(prediction.score)
    loaded = kizu.load(saved)
    assert loaded.predict(surface(51, spot=True)) == bad
    assert loaded.known([Photo(GOOD[3]), Photo(surface(50))]) == [Photo(GOOD[3])]


def test_a_photograph_is_not_judged_by_its_own_tiles(fitted):
    """A mark that all tiles of one photograph have is strange to the others, however many tiles it is in."""
    marked = surface(90)
    for offset in range(6):
        marked[offset::48, offset::48] = 255
    odd = kizu.PatchCore(**SMALL).fit([*GOOD, marked])
    assert max(odd.calibration_scores) == odd.calibration_scores[-1] > 1.3 * max(fitted.calibration_scores)
    assert odd.training["suspects"][0]["number"] == len(GOOD)


def test_memory_banks_are_bounded_and_every_tile_sets_the_threshold(fitted, monkeypatch):
    monkeypatch.setattr(detector, "MAX_TILES", 10)
    monkeypatch.setattr(detector, "MAX_ENTRIES", 40)
    bounded = kizu.PatchCore(**SMALL, thumbnails=True).fit(GOOD)
    assert max(bounded.facts["bank"]) <= 40 < max(fitted.facts["bank"])
    assert len(bounded.calibration_scores) == len(GOOD)
    assert bounded.predict(surface(51, spot=True)).is_anomalous
    assert bounded.predict(surface(51, spot=True)).why()[0].match_crop is not None
    assert len(bounded.thumbnails) == len(bounded.tiles) > len(GOOD)


def test_what_is_too_small_does_not_matter_and_a_dark_photograph_is_not_judged():
    sized = kizu.PatchCore(**SMALL, pixel_size=0.1, min_area=0.2, cannot_judge="ask").fit(GOOD)
    bad = sized.predict(surface(51, spot=True))
    assert bad.verdict == "stop" and bad.regions[0].matters and bad.regions[0].size.unit == "mm"
    assert 1 < bad.regions[0].size.length <= 0.1 * np.hypot(*bad.regions[0].box[2:])
    assert sized.predict(surface(51, spot=True) // 3).verdict == "ask"
    lenient = kizu.PatchCore(**SMALL, min_area=20_000).fit(GOOD)
    assert not lenient.predict(surface(51, spot=True)).is_anomalous


def test_surfaces_that_are_alike_from_afar_are_different_parts_and_copies_are_not(fitted, tmp_path):
    assert not fitted.remarks
    saved_again = image.read(image.encode(GOOD[0], "JPEG", quality=90))
    again = kizu.PatchCore(**SMALL).fit([*GOOD[:6], saved_again])
    assert again.training["images"] == 6 and "show the same part" in again.remarks[0]


def test_exported_it_says_the_same(fitted, tmp_path):
    pytest.importorskip("onnxscript")
    from kizu.export import export

    exported = export(fitted, tmp_path / "exported", photographs=GOOD[:2])
    for photo in (surface(51, spot=True), surface(52, 97, 500)):
        one, other = fitted.predict(photo), exported.predict(photo)
        assert other.score == pytest.approx(one.score, rel=1e-4)
        np.testing.assert_allclose(other.input_map, one.input_map, rtol=1e-4, atol=1e-4 * one.input_map.max())
        assert [region.box for region in one.regions] == [region.box for region in other.regions]
    assert exported.verify().cases == 8
    one, other = (model.predict(surface(51, spot=True)).why()[0].nearest for model in (fitted, exported))
    assert (one.number, one.place) == (other.number, other.place)


@pytest.mark.slow
def test_it_learns_more_later_and_is_merged(fitted, saved):
    model = kizu.load(saved)
    more = [surface(seed) for seed in (70, 71, 72)]
    model.update(more)
    assert len(model.training["shapes"]) == model.training["images"] == len(model.calibration_scores) == 11
    assert model.update([*more, surface(73)]).training["images"] == 12
    assert len(model.calibrate([surface(seed) for seed in range(80, 85)]).calibration_scores) == 5
    halves = [kizu.PatchCore(**SMALL).fit(half) for half in (GOOD[:4], GOOD[4:])]
    merged = kizu.PatchCore.merge(halves)
    bad = merged.predict(surface(51, spot=True))
    assert bad.is_anomalous and bad.why()[0].nearest.number < len(GOOD) == merged.training["images"]


@pytest.mark.parametrize(
    ("method", "more"),
    [
        pytest.param(kizu.SimpleNet, {"meta_epochs": 8, "gan_epochs": 1}, marks=pytest.mark.slow),
        pytest.param(kizu.EfficientAD, {"steps": 60, "size": 128, "tile": 128}, marks=pytest.mark.slow),
    ],
)
def test_other_methods_hold_whole_photographs_out(method, more):
    model = method(**SMALL | more).fit(GOOD)
    assert model.training["images"] + len(model.calibration_scores) == len(GOOD)
    assert model.predict(surface(51, spot=True)).score > 2 * max(model.calibration_scores)


def test_what_cannot_be_is_said():
    for settings_, word in (
        ({"resize": 400}, "`resize`"),
        ({"align": True}, "`align`"),
        ({"overlap": 60}, "more than half"),
        ({"size": 98}, "multiples of 4"),
    ):
        with pytest.raises(OptionError, match=word):
            kizu.PatchCore(**SMALL | settings_)
    with pytest.raises(OptionError, match="PUAD judges the photograph as a whole"):
        kizu.PUAD(**SMALL)
    with pytest.raises(OptionError, match="without `tile`"):
        kizu.choose(GOOD, kizu.config.PatchCoreConfig(**SMALL))
    with pytest.raises(DataError, match="One photograph cannot be learned from and set the threshold"):
        kizu.SimpleNet(**SMALL).fit(GOOD[:1])


def test_many_tiles_lie_in_a_file(monkeypatch):
    preprocessing = Preprocessing.of(kizu.config.PatchCoreConfig(**SMALL).model_dump())
    items = [Photo(photo) for photo in GOOD]
    kept, _ = read_all(items, preprocessing, 10**9, False, 1, lambda *_: None)
    filed, _ = read_all(items, preprocessing, 100_000, False, 1, lambda *_: None)
    for stack in (kept, filed):
        stack.keep([1, 4, 7])
    np.testing.assert_array_equal(kept.tiles.batch(0, 10**6), filed.tiles.batch(0, 10**6))
    assert kept.tiles.hash == filed.tiles.hash and len(kept.tiles) == sum(map(len, kept.tiles.grids))
    filed.__exit__()


def test_the_limit_of_pixels_is_larger_for_tiles_alone(fitted, patchcore, monkeypatch):
    monkeypatch.setattr(image, "MAX_PIXELS", 20_000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20_000)
    content = image.encode(surface(50), "PNG")
    with pytest.raises(BadImage, match=r"have it judged in tiles \(`tile=320`\)"):
        image.read(content)
    monkeypatch.setattr(image, "MAX_LARGE_PIXELS", 30_000)
    with pytest.raises(BadImage, match="cut it first"):
        fitted.predict(content)
    assert Image.MAX_IMAGE_PIXELS == 20_000


def test_served_and_predicted_alike(fitted, saved, tmp_path):
    path = tmp_path / "strip.png"
    image.write(path, surface(51, spot=True))
    seen = []
    row = predict_files(fitted, [path], overlays=tmp_path, progress=lambda *report: seen.append(report))[0]
    tiles = len(fitted.preprocessing.tiling.grid((HEIGHT, WIDTH)))
    assert ("Tiles: " + str(path), tiles, tiles) in seen and row.verdict == "stop"
    service = Service({"parts": saved}, Limits(), store=tmp_path / "store", keep=4)
    with TestClient(application(service), base_url="http://127.0.0.1") as client:
        files = {"image": ("strip.png", path.read_bytes(), "image/png")}
        result = client.post("/v1/predict?map=png&map_size=100&why=true&view=true", files=files).json()["results"][0]
    assert result["verdict"] == "stop" and result["score"] == pytest.approx(row.score, rel=1e-6)
    assert (result["map"]["height"], result["map"]["width"]) == (71, 100)
    assert [region["box"] for region in result["regions"]] == [list(region.box) for region in row.regions]
    assert profile(fitted, [path])["decode"] > 0


@pytest.mark.slow
def test_watched_alike(fitted, saved, tmp_path):
    image.write(tmp_path / "strip.png", surface(51, spot=True))
    command("watch", tmp_path, "--model", saved, "--output", tmp_path / "verdicts.jsonl", "--once")
    watched = json.loads((tmp_path / "verdicts.jsonl").read_text().splitlines()[0])
    assert watched["score"] == pytest.approx(fitted.predict(tmp_path / "strip.png").score, rel=1e-6)


@pytest.mark.slow
def test_on_the_command_line(tmp_path):
    for number, photo in enumerate(GOOD):
        image.write(tmp_path / "parts" / "good" / f"{number}.png", photo)
    image.write(tmp_path / "parts" / "bad" / "x.png", surface(51, spot=True))
    tiles = ("--size", "96", "--tile", "96", "--overlap", "16")
    command("train", "patchcore", tmp_path / "parts", *tiles, "--name", "x", "--output", tmp_path / "out")
    model = next(tmp_path.glob("**/model.json")).parent
    assert "seen at 1 of its resolution" in command("info", model).stdout
    assert len(next(tmp_path.glob("**/report.html")).read_bytes()) < 10**6


MEASURE = """
import resource, sys, numpy as np
from kizu.data import image
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
image.read(sys.argv[1], large=True)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["RGB", "L", "I;16"])
def test_a_large_photograph_takes_the_memory_that_is_stated(mode, tmp_path):
    pixels = 5000 * 6000
    Image.new(mode, (6000, 5000)).save(tmp_path / "large.png", compress_level=1)
    run = [sys.executable, "-c", MEASURE, str(tmp_path / "large.png")]
    taken = int(subprocess.run(run, check=True, capture_output=True, text=True).stdout)
    assert taken < 8 * pixels + 60e6
