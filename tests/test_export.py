"""What holds for every exported model: the same verdicts without torch, and refusal of whatever says anything else."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import kizu
from kizu.detectors import DETECTORS, detector_class
from kizu.detectors.patchcore import nearest as neighbours
from kizu.export import onnx as exporting
from kizu.export.onnx import export
from kizu.inference import exported as runtime
from kizu.inference import model_json
from kizu.inference.parity import Cases, Tolerance
from processes import kizu as command
from processes import python
from test_detectors import GOOD, SETTINGS, part

LEFT = kizu.Zone(name="left", rings=(((0, 0), (0.5, 0), (0.5, 1), (0, 1)),), false_alarms=0.2)
RIGHT = kizu.Zone(name="right", rings=(((0.5, 0), (1, 0), (1, 1), (0.5, 1)),))
PICTURES = [part(50), part(99, spot=True), part(7)]

WITHOUT_TORCH = """
import json, sys
for name in ("torch", "torchvision", "timm", "scipy", "sklearn", "jinja2", "onnx", "pandas"):
    sys.modules[name] = None
import kizu, kizu.inference.exported
model = kizu.load(sys.argv[1])
told = []
for path in sys.argv[2:]:
    seen = model.predict(path)
    places = [int(number) for number in divmod(int(seen.anomaly_map.argmax()), seen.anomaly_map.shape[1])]
    nearest = [[one.nearest.image, one.nearest.distance, *one.nearest.place] for one in seen.why()]
    told.append([seen.score, seen.p_value, seen.is_anomalous, float(seen.anomaly_map.max()), places, len(seen.regions),
                 nearest, seen.parts])
print(json.dumps(told))
"""


FAST = ("patchcore", "puad")  # the others for `make test-all`


@pytest.fixture(
    scope="module",
    params=[pytest.param(method, marks=() if method in FAST else pytest.mark.slow) for method in DETECTORS],
)
def pair(request, tmp_path_factory):
    """A detector and the folder that it is exported to."""
    if request.param == "patchcore":
        return request.getfixturevalue("patchcore"), request.getfixturevalue("exported_folder")
    folder = tmp_path_factory.mktemp(request.param) / "exported"
    detector = detector_class(request.param)(**SETTINGS[request.param]).fit(GOOD)
    export(detector, folder)
    return detector, folder


@pytest.fixture(scope="module")
def other(patchcore, tmp_path_factory):
    """One of the same settings that learned from other parts, exported."""
    detector = kizu.PatchCore(patchcore.config).fit([255 - picture for picture in GOOD])
    return export(detector, tmp_path_factory.mktemp("other") / "exported").folder


def altered(folder, target, change):
    """A copy of an exported model with another model.json."""
    shutil.copytree(folder, target)
    about = json.loads((target / "model.json").read_text())
    change(about)
    (target / "model.json").write_text(json.dumps(about))
    return target


def told_by(detector, path):
    """What `WITHOUT_TORCH` prints, from the trained model."""
    seen = detector.predict(path)
    places = [int(number) for number in np.unravel_index(seen.anomaly_map.argmax(), seen.anomaly_map.shape)]
    nearest = [[one.nearest.image, one.nearest.distance, *one.nearest.place] for one in seen.why()]
    peak = float(seen.anomaly_map.max())
    return [seen.score, seen.p_value, seen.is_anomalous, peak, places, len(seen.regions), nearest, seen.parts]


def numbers(told):
    """Every number in nested lists and dictionaries, in order."""
    if isinstance(told, dict):
        told = [*told, *told.values()]
    return [x for one in told for x in numbers(one)] if isinstance(told, list) else [told]


def test_without_torch_it_says_what_the_trained_one_says(pair, tmp_path):
    detector, folder = pair
    paths = []
    for number, picture in enumerate(PICTURES):
        paths.append(str(tmp_path / f"{number}.png"))
        Image.fromarray(picture).save(paths[-1])
    command = [sys.executable, "-c", WITHOUT_TORCH, str(folder), *paths]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for ours, theirs in zip(json.loads(done.stdout), (told_by(detector, path) for path in paths), strict=True):
        assert ours[:3] == pytest.approx(theirs[:3], rel=1e-4, abs=1e-4) and ours[4:6] == theirs[4:6]
        for one, other in zip(numbers(ours[6:]), numbers(theirs[6:]), strict=True):
            assert one == other if isinstance(other, str) else one == pytest.approx(other, rel=1e-3, abs=1e-3)


def test_any_number_of_images_in_one_run(pair):
    detector, folder = pair
    batch = np.stack([detector.preprocessing(part(seed)).transpose(2, 0, 1) for seed in range(11)])
    loaded = runtime.load(folder)
    scores, maps = detector(batch)
    found, found_maps = loaded(batch)
    assert found.dtype == found_maps.dtype == np.float32 and found_maps.shape == maps.shape
    np.testing.assert_allclose(found, scores, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(loaded(batch[3:4])[0], scores[3:4], rtol=1e-4, atol=1e-4)
    p_values, verdicts = loaded.outputs(batch, ("p_value", "verdict"))
    assert verdicts.tolist() == [bool(score > detector.threshold.value) for score in found]
    reached = [sum(good >= score for good in detector.calibration_scores) for score in found.tolist()]
    np.testing.assert_allclose(p_values, [(1 + n) / (1 + len(detector.calibration_scores)) for n in reached])


@pytest.mark.parametrize("fault", ["truncated", "flipped", "gone", "no cases", "format", "no export", "threshold"])
def test_whatever_was_changed_is_refused_with_a_sentence(pair, tmp_path, fault):
    _, folder = pair
    graph = tmp_path / "model" / "model.onnx"
    changes = {
        "format": lambda about: about["export"].update(format="tape"),
        "no export": lambda about: about.update(export={}),
        "threshold": lambda about: about["threshold"].update(value=-1e9),
    }
    model = altered(folder, tmp_path / "model", changes.get(fault, lambda about: None))
    if fault == "truncated":
        graph.write_bytes(graph.read_bytes()[:-1000])
    elif fault == "flipped":
        content = bytearray(graph.read_bytes())
        content[len(content) // 2] ^= 1
        graph.write_bytes(content)
    elif fault == "gone":
        graph.unlink()
    elif fault == "no cases":
        (model / "parity.safetensors").unlink()
    with pytest.raises(kizu.ModelError, match="model"):
        kizu.load(model)


def test_a_graph_that_does_not_reproduce_the_model_is_refused(exported_folder, other, tmp_path):
    graph = (other / "model.onnx").read_bytes()

    model = tmp_path / "model"
    shutil.copytree(exported_folder, model)
    about = json.loads((model / "model.json").read_text())
    (model / "model.json").unlink()
    (model / "model.onnx").write_bytes(graph)
    model_json.write(model, about)
    with pytest.raises(kizu.ModelError, match="does not give the results that it gave"):
        kizu.load(model)


@pytest.mark.slow
def test_a_graph_that_says_something_else_is_not_written(patchcore, tmp_path, monkeypatch):
    forward = kizu.PatchCore.forward_with_extras

    def a_little_more(self, images):
        scores, *others = forward(self, images)
        return scores * 1.001, *others

    monkeypatch.setattr(kizu.PatchCore, "forward_with_extras", a_little_more)
    with pytest.raises(kizu.ModelError, match="does not say what torch says"):
        export(patchcore, tmp_path / "exported")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_openvino_says_the_same(patchcore, tmp_path):
    pytest.importorskip("openvino")
    exported = export(patchcore, tmp_path / "exported", "openvino")
    for picture in PICTURES:
        ours, theirs = exported.predict(picture), patchcore.predict(picture)
        assert ours.score == pytest.approx(theirs.score, rel=1e-4) and ours.is_anomalous == theirs.is_anomalous
        np.testing.assert_allclose(ours.anomaly_map, theirs.anomaly_map, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"zones": [LEFT, RIGHT]},
        {"align": True},
        {"tile": 64, "overlap": 8, "min_area": 30.0, "cannot_judge": "ask"},
    ],
    ids=["zones", "aligned", "tiles, sizes and refusals"],
)
def test_openvino_looks_where_the_trained_model_looks(settings, tmp_path):
    pytest.importorskip("openvino")
    detector = kizu.PatchCore(**{"size": 64, "coreset": 0.2, **settings}).fit(GOOD)
    exported = export(detector, tmp_path / "exported", "openvino")
    for picture in PICTURES:
        ours, theirs = exported.predict(picture), detector.predict(picture)
        assert ours.score == pytest.approx(theirs.score, rel=1e-4)
        assert (ours.verdict, ours.zone, ours.cannot_judge) == (theirs.verdict, theirs.zone, theirs.cannot_judge)
        np.testing.assert_allclose(ours.anomaly_map, theirs.anomaly_map, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"fusion": "stack", "local_scale": False, "top": 0, "reweight": 9, "neighbours": 3},
        {"backbone": "efficientnet_lite2,efficientnet_lite2", "layers": "0.blocks.2,0.blocks.4,1.blocks.1"},
        {"layers": "blocks.2,blocks.2:5,blocks.6"},
        {"layers": "blocks.2@0.7,blocks.2,blocks.4", "size": 96},
    ],
    ids=["Eq. 7 and three neighbours", "ensemble", "several patchsizes", "several sizes"],
)
def test_every_kind_of_patchcore_can_be_exported(settings, tmp_path):
    detector = kizu.PatchCore(**{"size": 64, "coreset": 0.2, **settings}).fit(GOOD[:6])
    exported = export(detector, tmp_path / "exported")
    scores = [detector.predict(picture).score for picture in PICTURES]
    usual = np.median(np.abs(scores))  # an ensemble's are in deviations, and may be next to zero
    for picture, score in zip(PICTURES, scores, strict=True):
        assert exported.predict(picture).score == pytest.approx(score, rel=1e-4, abs=1e-4 * usual)


@pytest.mark.parametrize("count", [1, 3])
def test_search_in_parts_finds_the_nearest(count, monkeypatch):
    monkeypatch.setattr(neighbours, "ENTRIES", 7)
    random = torch.Generator().manual_seed(0)
    queries, bank = torch.randn(30, 5, generator=random), torch.randn(40, 5, generator=random)
    distances, indices = neighbours.nearest(queries, bank, count)
    every = np.linalg.norm(queries.numpy()[:, None] - bank.numpy(), axis=2)
    np.testing.assert_allclose(distances, np.sort(every)[:, :count], rtol=1e-5)
    np.testing.assert_array_equal(indices, every.argsort()[:, :count])


@pytest.mark.slow
def test_half_precision_is_smaller_measured_and_stated(patchcore, exported_folder, tmp_path):
    exported = export(patchcore, tmp_path / "half", precision="float16", photographs=GOOD)
    sizes = [(folder / "model.onnx").stat().st_size for folder in (exported_folder, exported.folder)]
    assert sizes[1] < 0.6 * sizes[0]
    measured = exported.export["measured"]
    assert measured["images"] == 2 * len(GOOD) and measured["verdicts changed"] <= 0.02 * measured["images"]
    assert 0 < measured["stopped"] < measured["images"]  # both verdicts are among those compared
    assert exported.predict(PICTURES[1]).score == pytest.approx(patchcore.predict(PICTURES[1]).score, rel=0.02)
    with pytest.raises(kizu.OptionError, match=r'`precision="int8"` .* 8 or more'):
        export(patchcore, tmp_path / "blind", precision="int8")


@pytest.mark.slow
def test_eight_bits_that_change_verdicts_are_refused(patchcore, other, tmp_path, monkeypatch):
    monkeypatch.setattr(
        exporting, "quantise", lambda source, target, pixels: shutil.copyfile(other / "model.onnx", target)
    )
    with pytest.raises(kizu.ModelError, match=r"int8\"` changes \d+ of 24 verdicts"):
        export(patchcore, tmp_path / "exported", precision="int8", photographs=GOOD)
    assert not (tmp_path / "exported").exists()


@pytest.mark.slow
def test_eight_bits_in_earnest(real_data, tmp_path):
    photographs = sorted((real_data / "mvtec_ad" / "bottle" / "train" / "good").iterdir())
    detector = kizu.PatchCore(size=256).fit(photographs[:60])
    exported = export(detector, tmp_path / "exported", precision="int8", photographs=photographs[60:92])
    measured = exported.export["measured"]
    assert measured["verdicts changed"] <= 0.02 * measured["images"] == 0.02 * 64
    assert measured["bytes"] < measured["bytes in float32"]


def test_trained_models_and_other_folders_are_not_replaced(patchcore, tmp_path):
    trained = patchcore.save(tmp_path / "trained")
    with pytest.raises(kizu.ModelError, match="trained model"):
        export(patchcore, trained)
    (tmp_path / "holiday").mkdir()
    (tmp_path / "holiday" / "me.txt").write_text("keep me")
    with pytest.raises(kizu.ModelError, match="not a kizu model"):
        export(patchcore, tmp_path / "holiday")
    with pytest.raises(kizu.ModelError, match="fit"):
        export(kizu.PatchCore(), tmp_path / "nothing")


def test_how_far_off_is_told_by_an_independent_count():
    scores, maps = np.array([1.0, 2.0], np.float32), np.zeros((2, 1, 8, 8), np.float32)
    maps[0, 0, 2, 3], maps[1, 0, 5, 5] = 1, 2
    cases = Cases.of(np.zeros((2, 3, 8, 8), np.uint8), scores, maps)
    moved = np.roll(maps, 2, axis=3)
    found = cases.difference(np.array([1.03, 1.9], np.float32), moved, 1.95, Tolerance())
    assert found.score == pytest.approx(0.05) and found.map == 0  # the second is off by 0.1 of 2
    assert found.place == 2 and found.verdicts == 1 and not found.within(Tolerance(score=1, map=1))
    same = cases.difference(scores, maps, 1.95, Tolerance())
    assert same.within(Tolerance()) and (same.score, same.place, same.verdicts) == (0, 0, 0)
    nan = cases.difference(scores * np.nan, maps, 1.95, Tolerance())
    assert not nan.within(Tolerance())


def test_the_command_line_treats_both_kinds_alike(patchcore, exported_folder, tmp_path):
    trained = patchcore.save(tmp_path / "trained")
    shutil.copytree(exported_folder, tmp_path / "exported")
    for number, picture in enumerate(PICTURES):
        Image.fromarray(picture).save(tmp_path / f"{number}.png")
    done = [
        python("-m", "kizu", *words, cwd=tmp_path)
        for words in (
            ["predict", "trained", "0.png", "1.png", "2.png", "--json"],
            ["predict", "exported", "0.png", "1.png", "2.png", "--json"],
            ["verify", "trained"],
            ["verify", "exported", "--json"],
            ["info", "exported"],
            ["tune", "exported", "--reset"],
        )
    ]
    assert [one.returncode for one in done] == [0, 0, 0, 0, 0, 2], [one.stderr for one in done]
    before, after = (json.loads(done[which].stdout) for which in (0, 1))
    assert [row["verdict"] for row in before] == [row["verdict"] for row in after]
    assert [row["score"] for row in before] == pytest.approx([row["score"] for row in after], rel=1e-4)
    assert "is whole" in done[2].stdout and json.loads(done[3].stdout)["verdicts"] == 0
    assert "onnx in float32" in done[4].stdout and "export it again" in done[5].stderr
    tensors = trained / "model.safetensors"
    content = tensors.read_bytes()
    place = content.rindex(b"conv_stem.weight")
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    at = start + next(entry["data_offsets"][0] for name, entry in header.items() if name.endswith("conv_stem.weight"))
    tensors.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    assert place < start
    assert "model.safetensors is damaged" in command("verify", "trained", cwd=tmp_path, code=2).stderr
    about = json.loads((trained / "model.json").read_text())
    (trained / "model.json").unlink()
    model_json.write(trained, about)
    assert "backbone's weights" in command("verify", "trained", cwd=tmp_path, code=2).stderr
