"""On a GPU: what it computes is what the CPU computes, and a model learned there is one for anywhere.

Where torch can use none, all of them are skipped. KIZU_TEST_DEVICE=cpu runs them on the CPU, to test the tests.
"""

import os

import numpy as np
import pytest
import torch

import kizu
from kizu.config import DistillationConfig
from kizu.data import image
from kizu.data.streams import Texture
from kizu.detectors import detector_class
from kizu.detectors.efficientad import teacher
from kizu.detectors.efficientad.distillation import distill
from kizu.detectors.patchcore.coreset import select
from kizu.detectors.patchcore.nearest import nearest
from kizu.features import backbone
from test_detectors import GOOD, SETTINGS, part

DEVICE = torch.device(os.environ.get("KIZU_TEST_DEVICE", "cuda"))
pytestmark = pytest.mark.skipif(
    DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="there is no GPU that torch can use"
)
CPU = torch.device("cpu")
QUERIES = [part(seed) for seed in range(100, 104)]
LEARNING = [
    ("patchcore", {}),
    ("simplenet", {"meta_epochs": 2}),
    ("efficientad", {}),
    ("efficientad", {"precision": "mixed"}),
    ("efficientad", {"teacher": None, "network": "embedded", "size": 96, "steps": 4, "penalty": "none"}),
    ("puad", {}),
]


@pytest.fixture(autouse=True)
def in_single_precision(monkeypatch):
    """Convolutions as exact as on the CPU: TF32 has ten bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def rows(count, dimension=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(40, dimension, generator=generator)
    return (
        centres[torch.randint(40, (count,), generator=generator)]
        + torch.randn(count, dimension, generator=generator) / 4
    )


def test_the_backbone_sees_the_same():
    network = backbone.create("efficientnet_lite2")
    pixels = torch.from_numpy(np.stack(QUERIES)[:, :96, :96].transpose(0, 3, 1, 2).copy())
    with torch.inference_mode():
        expected = network(pixels)
        found = network.to(DEVICE)(pixels.to(DEVICE))
    for ours, theirs in zip(expected, found, strict=True):
        torch.testing.assert_close(theirs.cpu(), ours, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sampler", ["k_center", "greedy_coreset", "approx_greedy_coreset"])
def test_a_coreset_covers_as_well(sampler):
    points = rows(3000)
    expected, found = select(points, 300, sampler), select(points.to(DEVICE), 300, sampler)
    assert len(found.indices.unique()) == 300
    assert found.radius == pytest.approx(expected.radius, rel=0.02)
    if sampler != "approx_greedy_coreset":
        assert (found.indices[:50] == expected.indices[:50]).float().mean() > 0.9


@pytest.mark.parametrize("count", [1, 3])
def test_the_nearest_entries_are_the_same(count):
    queries, entries = rows(5000, seed=1), rows(9000)
    ids = torch.arange(5000) % 50, torch.arange(9000) % 50
    expected, _ = nearest(queries, entries, count, image_ids=ids)
    on_device = tuple(numbers.to(DEVICE) for numbers in ids)
    distances, found = nearest(queries.to(DEVICE), entries.to(DEVICE), count, image_ids=on_device)
    torch.testing.assert_close(distances.cpu(), expected, rtol=1e-4, atol=1e-4)
    assert (ids[1][found.cpu()] != ids[0][:, None]).all()


@pytest.mark.parametrize("method, settings", LEARNING, ids=lambda value: value if isinstance(value, str) else "")
def test_what_is_learned_there_judges_alike_anywhere(method, settings, tmp_path):
    settings = {**SETTINGS[method], **settings}
    detector = detector_class(method)(**{name: value for name, value in settings.items() if value is not None})
    detector.device = DEVICE
    detector.fit(GOOD)
    assert next(detector.graph.buffers()).device.type == DEVICE.type
    judged = [detector.predict(photo) for photo in QUERIES]
    loaded = kizu.load(detector.save(tmp_path / "model"))
    loaded.device = CPU
    loaded.graph.to(CPU)
    for there, query in zip(judged, QUERIES, strict=True):
        here = loaded.predict(query)
        scale = float(np.abs(here.anomaly_map).max())
        assert there.score == pytest.approx(here.score, rel=1e-3, abs=1e-3 * scale)
        np.testing.assert_allclose(there.anomaly_map, here.anomaly_map, atol=1e-3 * scale)


@pytest.mark.parametrize("method", ["efficientad", "simplenet"])
def test_a_training_that_was_ended_goes_on(method, tmp_path, monkeypatch):
    """With the random numbers of the GPU: what it ends with is what it would have ended with."""
    monkeypatch.setattr("kizu.features.training_state.EVERY", 0)
    settings = {**SETTINGS[method], **({"meta_epochs": 3} if method == "simplenet" else {})}

    def learn(path, progress=None):
        detector = detector_class(method)(**settings)
        detector.device = DEVICE
        return detector.fit(GOOD, checkpoint=path, progress=progress)

    def end(stage, done, total):
        if stage.startswith("Training") and done == 2:
            raise KeyboardInterrupt

    whole = learn(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        learn(tmp_path / "ended", end)
    resumed = learn(tmp_path / "ended")
    for photo in QUERIES[:2]:
        assert resumed.predict(photo).score == pytest.approx(whole.predict(photo).score, rel=1e-3)


@pytest.mark.parametrize("precision", ["single", "mixed"])
def test_a_teacher_is_distilled(precision, tmp_path):
    for number in range(4):
        image.write(tmp_path / "photographs" / f"{number}.png", Texture(number).read()[0])
    config = DistillationConfig(side=64, batch_size=2, steps=3, measured=4, crops=True, precision=precision)
    made, about = teacher.load(distill(tmp_path / "photographs", config, tmp_path / "teachers"))
    assert about["loss"] > 0
    assert all(torch.isfinite(parameter).all() for parameter in made.parameters())
