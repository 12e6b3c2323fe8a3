"""EfficientAD with the embedded network: its arithmetic against slow statements of it, and what methods promise."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import kizu
from kizu.config import EfficientADConfig, build
from kizu.data import dataset
from kizu.data import image as images
from kizu.detectors.efficientad.detector import EfficientAD
from kizu.detectors.efficientad.embedded import (
    BACKBONE,
    LAYERS,
    Difference,
    EmbeddedGraph,
    Features,
    Moments,
    embedded_course,
)
from kizu.errors import ModelError, OptionError
from kizu.evaluation.evaluate import evaluate
from kizu.export.reference_files import write_reference
from kizu.features import backbone
from kizu.testing import CHECKS, Subject, check_few_images, check_rectangle
from processes import kizu as run
from test_detectors import GOOD, part

SMALL = {"size": 128, "steps": 30, "batch_size": 4}


@pytest.fixture(scope="module")
def subject():
    return Subject(EfficientAD, SMALL)


HEAVY = (check_few_images, check_rectangle)  # several trainings each


@pytest.mark.parametrize(
    "check",
    [pytest.param(check, id=check.__name__, marks=pytest.mark.slow if check in HEAVY else ()) for check in CHECKS],
)
def test_it_does_what_every_method_promises(subject, check):
    check(subject)


def random_graph(size=(64, 96)):
    torch.manual_seed(0)
    graph = EmbeddedGraph(EfficientADConfig(size=size, smoothing=0), backbone.create(BACKBONE, LAYERS)).eval()
    return graph.requires_grad_(False)


def pixels(count, size=(64, 96)):
    return torch.from_numpy(np.random.default_rng(1).integers(0, 256, (count, 3, *size), dtype=np.uint8))


def test_a_difference_is_as_unusual_as_its_distance_from_usual_ones():
    """Mahalanobis' distance of the mean over each place's neighbours, per channel."""
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(5, 5))
    usual = (mixing @ rng.normal(size=(5, 4000)) + 3).reshape(5, 40, 100)
    moments = Moments(5, torch.device("cpu"))
    for rows in torch.from_numpy(usual.astype(np.float32)).split(10, dim=1):
        moments.add(rows[None])
    kind = Difference(5)
    kind.set(*moments.result())
    new = rng.normal(size=(5, 6, 7)).astype(np.float32)
    found = kind(torch.from_numpy(new)[None])[0].numpy()
    flat = usual.reshape(5, -1)
    covariance = np.cov(flat, bias=True)
    covariance += 0.01 * np.trace(covariance) / 5 * np.eye(5)
    for row in range(6):
        for column in range(7):
            near = new[:, max(0, row - 1) : row + 2, max(0, column - 1) : column + 2].mean((1, 2)) - flat.mean(1)
            assert found[row, column] == pytest.approx(near @ np.linalg.solve(covariance, near) / 5, rel=1e-3)


def test_the_map_is_the_mean_of_both_kinds_of_differences():
    graph, photos = random_graph(), pixels(3)
    graph.levels.copy_(torch.tensor([[0.5, 1.5], [0.2, 2.2], [1.0, 4.0]]))
    fine, coarse, whole = graph.errors(photos)
    expected = (0.1 * (fine - 0.5) + 0.1 * (coarse - 0.2) / 2) / 2 / 2 + 0.1 * (whole - 1) / 3 / 2
    assert fine.shape == coarse.shape == whole.shape == (3, 8, 12)
    scores, maps = graph(photos)
    torch.testing.assert_close(maps, F.interpolate(expected[:, None], (64, 96), mode="bilinear"), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(scores, maps.flatten(1).amax(1))


def test_the_loss_is_of_the_hardest_places_of_silence_and_of_the_autoencoder():
    graph, photos = random_graph(), pixels(2)
    shallow, fine, coarse = graph.features(photos)
    others = torch.randn(1, *shallow.shape[1:])
    losses = graph.losses([shallow, fine, coarse], others)
    answers, silence = graph.student(shallow), graph.student(others)
    on_grid = F.interpolate(coarse, fine.shape[-2:], mode="bilinear")
    hard = 0.0
    for teacher, student in ((fine, answers[0]), (on_grid, answers[1])):
        for errors in (teacher - student).square().flatten(1):
            hardest = errors.sort(descending=True).values
            hard += float(hardest[: int(0.02 * len(errors)) + 1].mean()) / 2
    restored = graph.autoencoder(coarse)
    expected = [
        hard,
        float(silence[0].square().mean() + silence[1].square().mean()),
        float((coarse - restored).square().mean()),
        float((restored - answers[2]).square().mean()),
    ]
    assert losses.tolist() == pytest.approx(expected, rel=2e-3)
    assert graph.losses([shallow, fine, coarse], None)[1] == 0


def test_global_features_are_means_of_what_is_seen():
    graph, photos = random_graph(), pixels(2)
    shallow, fine, coarse = graph.features(photos)
    teacher = torch.cat([fine.mean((2, 3)), coarse.mean((2, 3))], 1)
    student = torch.cat([out.mean((2, 3)) for out in graph.student(shallow)[:2]], 1)
    for kind, expected in (("teacher", teacher), ("student", student)):
        torch.testing.assert_close(graph.global_features(photos, kind)[kind], expected)
        scores, maps, found = graph.forward_with_global_features(photos, kind)
        torch.testing.assert_close(found[kind], expected)
        torch.testing.assert_close((scores, maps), graph(photos))


def test_the_learning_rate_rises_and_falls_to_nothing():
    config = EfficientADConfig(size=64, steps=100)
    graph = random_graph((64, 64))
    rate = embedded_course(graph, config, 4, lambda positions, turn: [], None).rate
    rates = [rate(step) for step in range(100)]
    assert max(rates) == rates[9] == pytest.approx(1e-3) and rates[-1] < 1e-9
    assert rates[:10] == sorted(rates[:10]) and rates[9:] == sorted(rates[9:], reverse=True)


def test_the_network_decides_what_is_the_default():
    ours, papers = EfficientADConfig(), EfficientADConfig(teacher="teacher.pt")
    assert (ours.network, ours.size, ours.batch_size, ours.smoothing) == ("embedded", (320, 320), 8, 8)
    assert (papers.network, papers.size, papers.batch_size, papers.smoothing) == ("s", (256, 256), 1, 0)
    assert papers.steps == 70_000 and EfficientADConfig(network="m").steps == 70_000
    for wrong, words in (
        ({"network": "embedded", "teacher": "teacher.pt"}, "embedded network needs none"),
        ({"border": "map"}, "`border=map` goes with"),
        ({"network": "s", "size": 128}, "at least 256"),
        ({"network": "large"}, '`network="large"`'),
    ):
        with pytest.raises(OptionError, match=words):
            build(EfficientADConfig, wrong)


def test_features_that_do_not_fit_into_memory_lie_in_files_and_are_the_same(subject):
    config = subject.new().config
    maps = [torch.rand(3, *store.shape) for store in Features(0, config, 0).stores]
    assert [layer.shape[1:] for layer in maps] == [(24, 32, 32), (48, 16, 16), (120, 8, 8)]
    kept, in_files = (Features(3, config, memory) for memory in (10**8, 10**4))
    for features in (kept, in_files):
        features.append(maps)
    assert [store.in_memory for store in (*kept.stores, *in_files.stores)] == [True] * 3 + [False] * 3
    for one, other, layer in zip(kept.take([2, 0]), in_files.take([2, 0]), maps, strict=True):
        assert torch.equal(one, other) and torch.equal(one, layer[[2, 0]].half().float())


def test_good_parts_that_are_new_are_no_stranger_than_those_that_set_the_threshold(subject):
    """What is usual is not learned from the few photographs that set the threshold: these would look too usual."""
    scores = np.array([subject.fitted.predict(part(seed)).score for seed in range(300, 320)])
    assert np.median(scores) < 1.5 * max(subject.fitted.calibration_scores)


@pytest.mark.slow
def test_varied_photographs_are_learned_from(subject):
    varied = subject.new(brightness=0.3).fit(subject.good)
    assert varied.facts["loss"]["hard"][0] != subject.fitted.facts["loss"]["hard"][0]
    assert varied.predict(part(80, spot=True)).is_anomalous


@pytest.mark.parametrize("penalty", ["none", "folder"])
def test_the_other_pictures_come_from_a_folder_or_from_nowhere(penalty, subject, tmp_path):
    images.write(tmp_path / "0.png", part(0))
    (tmp_path / "broken.png").write_bytes(b"no image")
    fitted = subject.new(penalty="none" if penalty == "none" else str(tmp_path), steps=6).fit(subject.good[:4])
    assert (fitted.facts["loss"]["penalty"] == [0, 0]) == (penalty == "none")
    assert fitted.facts["penalty"] == ("none" if penalty == "none" else f"2 photographs in {tmp_path}")


def test_a_killed_training_goes_on_to_the_same_result(subject, tmp_path, monkeypatch):
    undisturbed = subject.new(steps=6).fit(subject.good)
    monkeypatch.setattr("kizu.features.training_state.EVERY", 0)

    def kill(stage, done, total):
        if (stage, done) == ("Training", 3):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        subject.new(steps=6).fit(subject.good, checkpoint=tmp_path / "state", progress=kill)
    resumed = subject.new(steps=6).fit(subject.good, checkpoint=tmp_path / "state")
    assert resumed.describe() == undisturbed.describe()
    for one, other in zip(resumed.graph.state_dict().values(), undisturbed.graph.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_the_published_systems_have_no_files_for_it(subject, tmp_path):
    with pytest.raises(ModelError, match="network=s"):
        write_reference(subject.fitted, tmp_path / "published")


def test_puad_stands_on_it():
    detector = kizu.PUAD(base="efficientad", base_settings={"steps": 30, "batch_size": 4}, size=128).fit(GOOD)
    assert detector.config.smoothing == 8 and detector.graph.base.grid == (16, 16)
    assert detector.predict(part(80, spot=True)).score > max(detector.predict(photo).score for photo in GOOD)


@pytest.mark.slow
def test_real_bottles_in_a_few_steps(real_data):
    data = dataset.find(real_data / "mvtec_ad")
    detector = kizu.EfficientAD(size=128, steps=50).fit(data.select("bottle", "train")[::5])
    result = evaluate(detector, data.select("bottle", "test")[::2], category="bottle", root=data.root)
    assert result.metrics["image_auroc"] > 0.95 and result.metrics["pixel_auroc"] > 0.85


@pytest.mark.slow
def test_the_command_line_needs_no_teacher(tmp_path):
    for number, picture in enumerate(GOOD):
        images.write(tmp_path / "parts" / f"{number}.png", picture)
    arguments = [
        "train",
        "efficientad",
        "parts",
        "--size",
        "96",
        "--steps",
        "10",
        "--batch-size",
        "2",
        "--name",
        "first",
    ]
    run(*arguments, cwd=tmp_path)
    assert (tmp_path / "results" / "project" / "group" / "first" / "models").is_dir()
