"""EfficientAD against slow, separate statements of the paper, and its teachers from everywhere."""

import logging
import os
import zipfile
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.transforms import functional as vision

import kizu
from kizu.config import EfficientADConfig
from kizu.data import dataset
from kizu.data import image as images
from kizu.detectors.augmentation import jittered
from kizu.detectors.efficientad import teacher
from kizu.detectors.efficientad.detector import quantile, split_images
from kizu.detectors.efficientad.graph import EfficientADGraph, hard_loss
from kizu.detectors.efficientad.networks import PDN, Autoencoder, normalised
from kizu.detectors.efficientad.training import ChannelStatistics, arithmetic
from kizu.evaluation import experiment
from kizu.features.safe_load import read_tensors
from teachers import tiny
from test_detectors import GOOD, part


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("teacher") / "efficientad-s.safetensors")


def random_graph(seed=0, dimension=16, **settings):
    torch.manual_seed(seed)
    graph = EfficientADGraph(EfficientADConfig(**{"network": "s", **settings}), PDN("s", dimension, (8, 8, 8))).eval()
    graph.mean.normal_(0, 0.1)
    graph.std.uniform_(0.05, 0.2)
    graph.surround.normal_()
    return graph.requires_grad_(False)


def plain_pdn(size, out, padding):
    """The published layers, one after the other."""
    p = int(padding)
    if size == "s":
        first, second, between = 128, 256, [nn.Conv2d(256, 256, 3, padding=p), nn.ReLU(), nn.Conv2d(256, out, 4)]
    else:
        first, second = 256, 512
        between = [nn.Conv2d(512, 512, 1), nn.ReLU(), nn.Conv2d(512, 512, 3, padding=p), nn.ReLU()]
        between += [nn.Conv2d(512, out, 4), nn.ReLU(), nn.Conv2d(out, out, 1)]
    start = [nn.Conv2d(3, first, 4, padding=3 * p), nn.ReLU(), nn.AvgPool2d(2, 2, padding=p)]
    start += [nn.Conv2d(first, second, 4, padding=3 * p), nn.ReLU(), nn.AvgPool2d(2, 2, padding=p)]
    return nn.Sequential(*start, *between)


@pytest.mark.parametrize(
    ("size", "out", "count"), [("s", 384, 2694144), ("m", 384, 8026624), ("s", 768, 4267392), ("m", 768, 11615488)]
)
def test_the_networks_are_the_published_ones(size, out, count):
    network = PDN(size, out)
    assert sum(parameter.numel() for parameter in network.parameters()) == count
    image = torch.randn(1, 3, 70, 57)
    for padding in (False, True):
        ours, plain = PDN(size, out, padding=padding), plain_pdn(size, out, padding)
        plain.load_state_dict(dict(zip(plain.state_dict(), ours.state_dict().values(), strict=True)))
        with torch.inference_mode():
            torch.testing.assert_close(ours(image), plain(image), atol=1e-5, rtol=1e-4)
            if size == "s" and out == 384:
                assert ours(torch.zeros(1, 3, 256, 256)).shape[2:] == ((64, 64) if padding else (56, 56))


@pytest.mark.parametrize("size", [(256, 256), (300, 421)])
def test_the_autoencoder_is_the_published_one(size):
    torch.manual_seed(0)
    grid = (-(-size[0] // 4) - 8, -(-size[1] // 4) - 8)
    network = Autoencoder(size, grid).eval()
    assert sum(parameter.numel() for parameter in network.parameters()) == 1096320
    values = iter(network.state_dict().values())
    image = torch.randn(2, 3, *size)

    def convolve(features, **settings):
        return F.conv2d(features, next(values), next(values), **settings)

    with torch.inference_mode():
        code = image
        for _ in range(5):
            code = convolve(code, stride=2, padding=1).relu()
        code = convolve(code)
        for scale in [lambda n: n // 64 - 1, lambda n: n // 32, lambda n: n // 16 - 1, lambda n: n // 8]:
            code = F.interpolate(code, [scale(n) for n in size], mode="bilinear")
            code = convolve(code, padding=2).relu()
        for scale in [lambda n: n // 4 - 1, lambda n: n // 2 - 1]:
            code = F.interpolate(code, [scale(n) for n in size], mode="bilinear")
            code = convolve(code, padding=2).relu()
        code = convolve(F.interpolate(code, grid, mode="bilinear"), padding=1).relu()
        torch.testing.assert_close(network(image), convolve(code, padding=1))


@pytest.mark.parametrize("shape", [(1, 4, 50, 50), (3, 5, 20, 20), (2, 1, 1, 1001), (1, 1, 1, 3)])
def test_hard_loss(shape):
    torch.manual_seed(0)
    errors = torch.rand(shape, dtype=torch.float64)
    slow = []
    for image in errors.numpy().reshape(shape[0], -1):
        level = np.quantile(image, 0.999)
        slow.append(image[image >= level].mean())
    assert float(hard_loss(errors)) == pytest.approx(np.mean(slow), rel=1e-12)


@pytest.mark.parametrize("count", [1, 2, 11, 1000, 2**24 + 5])
def test_quantiles_are_exact_at_any_size(count):
    values = np.random.default_rng(0).random(count, dtype=np.float32)
    ordered = np.sort(values)
    for share in (0.9, 0.995):
        rank = Fraction(str(share)) * (count - 1)
        below = rank.numerator // rank.denominator
        above = min(below + 1, count - 1)
        exact = float(ordered[below]) + float(rank - below) * (float(ordered[above]) - float(ordered[below]))
        assert quantile(values, share) == pytest.approx(exact, rel=1e-12)


def test_statistics_of_the_teacher_are_those_of_all_features_together():
    torch.manual_seed(0)
    batches = [1000 + torch.randn(count, 6, 9, 7) * torch.arange(6)[:, None, None] for count in (4, 1, 3)]
    measured = ChannelStatistics()
    for batch in batches:
        measured.add(batch)
    mean, deviation = measured.result()
    rows = torch.cat(batches).double().permute(1, 0, 2, 3).reshape(6, -1).numpy()
    np.testing.assert_allclose(mean.numpy(), rows.mean(1), rtol=1e-7)
    np.testing.assert_allclose(deviation.numpy()[1:], rows.std(1)[1:], rtol=1e-6)
    assert deviation[0] == 1  # a constant channel divides nothing


def test_variations_are_brightness_contrast_or_saturation():
    torch.manual_seed(0)
    image = 70 + 100 * torch.rand(3, 32, 32)  # far enough from black and white for any factor
    seen = set()
    for changed in jittered(image.expand(40, 3, 32, 32)):
        for adjust in (vision.adjust_brightness, vision.adjust_contrast, vision.adjust_saturation):
            far, near = adjust(image / 255, 1.2) * 255 - image, changed - image
            factor = 1 + 0.2 * float((near * far).sum() / far.square().sum())
            if torch.allclose(changed, adjust(image / 255, factor) * 255, atol=0.01):
                assert 0.799 < factor < 1.201
                seen.add(adjust.__name__)
                break
        else:
            raise AssertionError("none of the three")
    assert len(seen) == 3


def slow_maps(graph, config, image):
    """Map and score of one image (3, H, W), in double precision, pixel by pixel where it is not a network."""
    graph = graph.double()
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    pixels = (image.transpose(1, 2, 0) / 255 - mean) / std
    before, behind = (14, 18) if config.border == "picture" else (0, 0)
    framed = np.broadcast_to(graph.surround.numpy(), (*(side + before + behind for side in config.size), 3)).copy()
    framed[before : before + config.size[0], before : before + config.size[1]] = pixels
    framed, pixels = (torch.from_numpy(values).permute(2, 0, 1)[None] for values in (framed, pixels))
    features = ((graph.teacher(framed) - graph.mean[:, None, None]) / graph.std[:, None, None])[0].numpy()
    answers, wholes = graph.student(framed)[0].numpy(), graph.autoencoder(pixels)[0].numpy()
    dimension = len(features)
    both = [((features - answers[:dimension]) ** 2).mean(0), ((wholes - answers[dimension:]) ** 2).mean(0)]
    normal = [
        0.1 * (values - low) / (high - low) for values, (low, high) in zip(both, graph.levels.numpy(), strict=True)
    ]
    grid = 0.5 * normal[0] + 0.5 * normal[1]
    result = np.empty(config.size)
    for y in range(config.size[0]):
        for x in range(config.size[1]):
            i, j = (np.clip((place - 16 + before) / 4, 0, n - 1) for place, n in zip((y, x), grid.shape, strict=True))
            i0, j0 = min(int(i), grid.shape[0] - 2), min(int(j), grid.shape[1] - 2)
            corners = grid[i0 : i0 + 2, j0 : j0 + 2]
            result[y, x] = np.array([1 - i + i0, i - i0]) @ corners @ np.array([1 - j + j0, j - j0])
    return result, result.max()


@pytest.mark.parametrize("settings", [{}, {"border": "map"}, {"size": "258x301"}])
def test_maps_and_scores_are_the_papers_equations(settings):
    config = EfficientADConfig(network="s", **settings)
    graph = random_graph(**settings)
    graph.levels.copy_(torch.tensor([[0.2, 0.9], [0.01, 0.04]]))
    batch = np.random.default_rng(0).integers(0, 256, (2, 3, *config.size), dtype=np.uint8)
    with torch.inference_mode():
        scores, maps = graph(torch.from_numpy(batch))
        slow_map, slow_score = slow_maps(graph, config, batch[1])
    np.testing.assert_allclose(maps[1, 0].numpy(), slow_map, rtol=1e-4, atol=1e-4)
    assert float(scores[1]) == pytest.approx(slow_score, rel=1e-4)


def test_the_four_terms_of_the_loss_and_batches_as_single_images(monkeypatch):
    monkeypatch.setattr("kizu.detectors.efficientad.graph.jittered", lambda images: images.flip(3))
    graph = random_graph()
    photos = torch.randint(0, 256, (2, 3, 256, 256), dtype=torch.uint8)
    others = torch.randint(0, 256, (2, 3, 256, 256), dtype=torch.uint8)
    single = []
    for image, other in zip(photos, others, strict=True):
        normal, changed, unrelated = (
            vision.normalize(x / 255, efficientad_mean, efficientad_std)[None] for x in (image, image.flip(2), other)
        )

        def framed(pixels):
            wide = graph.surround[:, None, None].expand(1, 3, 288, 288).clone()
            wide[:, :, 14:270, 14:270] = pixels
            return wide

        def taught(pixels):
            return (graph.teacher(framed(pixels)) - graph.mean[:, None, None]) / graph.std[:, None, None]

        distance = (taught(normal) - graph.student(framed(normal))[:, :16]) ** 2
        level = np.quantile(distance.numpy(), 0.999)
        whole = graph.autoencoder(changed)
        single.append(
            [
                distance[distance >= level].mean(),
                (graph.student(framed(unrelated))[:, :16] ** 2).mean(),
                ((taught(changed) - whole) ** 2).mean(),
                ((whole - graph.student(framed(changed))[:, 16:]) ** 2).mean(),
            ]
        )
    np.testing.assert_allclose(graph.losses(photos, others).numpy(), np.mean(single, axis=0), rtol=1e-4)
    without = graph.losses(photos, None).numpy()
    assert without[1] == 0
    np.testing.assert_allclose(np.delete(without, 1), np.delete(np.mean(single, axis=0), 1), rtol=1e-4)


efficientad_mean, efficientad_std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Remembers(nn.Module):
    """An ideal student or autoencoder: it answers rightly for one image, whatever it is shown."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, images):
        return self.answer.clone()


@pytest.mark.parametrize("size", [(256, 256), (257, 322)])
def test_a_disturbance_anywhere_peaks_where_it_is_and_as_high(size):
    torch.manual_seed(1)
    graph = (
        EfficientADGraph(EfficientADConfig(network="s", size=size), PDN("s", 16, (8, 8, 8)))
        .eval()
        .requires_grad_(False)
    )
    for parameter in graph.teacher.parameters():
        parameter.abs_()  # a feature answers the more, the nearer to its centre a thing is
    clean = torch.full((1, 3, *size), 128, dtype=torch.uint8)
    graph.surround.copy_(normalised(clean)[0, :, 0, 0])
    with torch.inference_mode():
        features = graph.teacher_out(graph.framed(normalised(clean)))
        graph.student = Remembers(torch.cat([features, features], 1))
        graph.autoencoder = Remembers(features)
        peaks = {}
        bottom, right = size[0] - 1, size[1] - 1
        middle = (size[0] // 2 + 1, size[1] // 2 - 2)
        edges = [(0, 0), (0, right), (bottom, 0), (bottom, right), (0, middle[1]), (middle[0], right), (bottom, 70)]
        rng = np.random.default_rng(0)
        inside = [(int(rng.integers(4, bottom - 4)), int(rng.integers(4, right - 4))) for _ in range(12)]
        near = [(5, 9), (bottom - 6, right - 11), (12, right - 3), (3, 3)]
        for y, x in [middle, *edges, *near, *inside]:
            disturbed = clean.clone()
            disturbed[0, :, max(0, y - 2) : y + 3, max(0, x - 2) : x + 3] = 250
            anomaly_map = graph(disturbed)[1][0, 0]
            found = (anomaly_map > 0.9999 * anomaly_map.max()).nonzero()  # one pixel, or a few of an edge
            away = (found - torch.tensor([y, x])).abs().amax(1)
            assert away.min() <= 2 and away.max() <= 4, f"at {(y, x)}, found at {found.tolist()}"
            peaks[y, x] = float(anomaly_map.max())
            whole = (
                min(5, y + 3, size[0] - y + 2) * min(5, x + 3, size[1] - x + 2) / 25
            )  # the share of it that is in sight
            assert 0.5 * whole < (peaks[y, x] / peaks[middle]) ** 0.5 < 1.5 * whole, (y, x)  # neither dead nor bright


def test_images_are_split_without_overlap():
    for count, held_out in [(1, 0), (2, 0), (20, 0), (209, 0), (209, 30), (1, 5)]:
        split = split_images(count, held_out, 0.15, 0)
        train, select, calibrate = set(split.train), set(split.select), set(split.calibrate)
        assert not train & calibrate
        assert not (train & select) or count == 1
        assert bool(calibrate) == (held_out == 0 and count > 1)
        assert not (select & calibrate) or count < 60
        assert train | select | calibrate == set(range(count))


QUICK_AT_BFLOAT16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()


@pytest.mark.parametrize(
    "precision",
    [
        "single",
        pytest.param(
            "mixed",
            marks=[pytest.mark.slow, pytest.mark.skipif(not QUICK_AT_BFLOAT16, reason="bfloat16 takes minutes here")],
        ),
    ],
)
def test_a_killed_training_goes_on_to_the_same_result(taught, tmp_path, monkeypatch, precision):
    settings = {"teacher": str(taught), "steps": 6, "batch_size": 2, "precision": precision}
    undisturbed = kizu.EfficientAD(**settings).fit(GOOD)
    state = tmp_path / "training"
    monkeypatch.setattr("kizu.features.training_state.EVERY", 0)

    def kill(stage, done, total):
        if (stage, done) == ("Training", 3):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kizu.EfficientAD(**settings).fit(GOOD, checkpoint=state, progress=kill)
    with pytest.raises(kizu.ModelError, match="other settings"):
        kizu.EfficientAD(**settings, seed=1).fit(GOOD, checkpoint=state)
    seen = []
    resumed = kizu.EfficientAD(**settings)
    resumed.fit(GOOD, checkpoint=state, progress=lambda stage, done, total: seen.append((stage, done)))
    assert ("Training", 4) in seen and ("Training", 3) not in seen
    assert resumed.describe() == undisturbed.describe()
    for one, other in zip(resumed.graph.state_dict().values(), undisturbed.graph.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(kizu.ModelError, match="damaged"):
        kizu.EfficientAD(**settings).fit(GOOD, checkpoint=state)


def test_bfloat16_on_a_processor_without_it_is_warned_of(monkeypatch, caplog):
    for supported in (True, False):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda answer=supported: answer)
        for precision in ("single", "mixed"):
            arithmetic(precision, torch.device("cpu"))
            assert ("`precision=single` is many times faster" in caplog.text) == (
                precision == "mixed" and not supported
            )


def test_a_killed_run_goes_on_inside_a_category(taught, tmp_path, monkeypatch):
    for number, picture in enumerate(GOOD[:6]):
        images.write(tmp_path / "parts" / "good" / f"{number}.png", picture)
        images.write(tmp_path / "parts" / "bad" / f"{number}.png", part(50 + number, spot=True))
    monkeypatch.setattr("kizu.features.training_state.EVERY", 0)
    data = dataset.find(tmp_path / "parts")
    config = EfficientADConfig(teacher=str(taught), steps=5)
    seen = []

    def watch(stage, done, total):
        seen.append((stage, done))
        if seen.count(("Training", 3)) == 1 and seen[-1] == ("Training", 3):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        experiment.train("efficientad", config, data, tmp_path / "runs", progress=lambda category: watch)
    finished, results = experiment.train(
        "efficientad",
        config,
        data,
        tmp_path / "runs",
        experiment.RunOptions(resume=True),
        progress=lambda category: watch,
    )
    assert seen.count(("Training", 2)) == 1 and seen.count(("Training", 4)) == 1
    assert results[0].metrics["image_auroc"] > 0.5
    assert not finished.unfinished.exists() and "penalty: drawn textures" in (finished.folder / "log.txt").read_text()
    assert "efficientad-s.safetensors" in (finished.folder / "report.html").read_text()


@pytest.mark.slow
def test_training_brings_the_student_nearer_to_the_teacher(taught, monkeypatch):
    monkeypatch.setattr("kizu.detectors.efficientad.training.LEARNING_RATE", 3e-3)  # so few channels need it
    losses = kizu.EfficientAD(teacher=str(taught), steps=60).fit(GOOD).facts["loss"]
    assert losses["hard"][1] < 0.8 * losses["hard"][0]


def test_the_penalty_comes_from_a_folder_or_from_nowhere(taught, tmp_path):
    for number in range(2):
        images.write(tmp_path / f"{number}.png", part(number))
    (tmp_path / "broken.png").write_bytes(b"no image")
    settings = {"teacher": str(taught), "steps": 3}
    folder = kizu.EfficientAD(**settings, penalty=str(tmp_path)).fit(GOOD[:3])
    assert "3 photographs" in folder.facts["penalty"] and min(folder.facts["loss"]["penalty"]) >= 0
    nothing = kizu.EfficientAD(**settings, penalty="none").fit(GOOD[:3])
    assert nothing.facts["penalty"] == "none" and nothing.facts["loss"]["penalty"] == [0, 0]
    with pytest.raises(kizu.DataError, match="nowhere"):
        kizu.EfficientAD(**settings, penalty="nowhere").fit(GOOD[:3])


def test_a_medium_model_is_trained_and_saved(tmp_path):
    folder = tiny(tmp_path / "efficientad-m.safetensors", "m").parent
    detector = kizu.EfficientAD(teacher=str(folder), network="m", steps=2).fit(GOOD[:3])
    assert detector.facts["network"] == "PDN-M"
    loaded = kizu.load(detector.save(tmp_path / "model"))
    assert loaded.predict(GOOD[5]).score == detector.predict(GOOD[5]).score


def test_without_a_gpu_the_cost_is_told(taught, caplog, monkeypatch):
    monkeypatch.setattr("kizu.detectors.efficientad.training.WORTH_TELLING", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with caplog.at_level(logging.WARNING, "kizu"):
        kizu.EfficientAD(teacher=str(taught), steps=5).fit(GOOD[:3])
    assert "no GPU" in caplog.text and "5 steps" in caplog.text and "minutes" in caplog.text


def test_the_papers_small_network_learns_from_the_teacher_that_comes_with_kizu():
    network, about = teacher.load(None)
    assert (network.size, network.dimension, about["backbone"]) == ("s", 384, "efficientnet_lite2")
    assert teacher.SHIPPED.stat().st_size <= 6 * 10**6
    detector = kizu.EfficientAD(network="s", steps=1, penalty="none").fit(GOOD[:4])
    assert detector.pretrained() == {"name": f"teacher {teacher.SHIPPED.name}", "weights": teacher.fingerprint(network)}


def test_sentences_for_what_cannot_be(tmp_path):
    with pytest.raises(kizu.ModelError, match="kizu distill"):
        kizu.EfficientAD(network="m").fit(GOOD[:2])
    with pytest.raises(kizu.OptionError, match="at least 256"):
        kizu.EfficientAD(network="s", size="256x224")
    with pytest.raises(kizu.ModelError, match="no such teacher"):
        kizu.EfficientAD(teacher="nowhere.pth").fit(GOOD[:2])


class Published(nn.Module):
    """A module of the kind that others pickle whole; its class is not at hand when the file is read."""

    def __init__(self, size):
        super().__init__()
        layers = [layer for layer in plain_pdn(size, 384, False) if isinstance(layer, nn.Conv2d)]
        for number, layer in enumerate(layers, 1):
            setattr(self, f"conv{number}", layer)
        self.relu = torch.relu


@pytest.mark.parametrize("size", ["s", "m"])
def test_teachers_of_others_are_read(size, tmp_path, monkeypatch):
    word = {"s": "small", "m": "medium"}[size]
    plain, named = plain_pdn(size, 384, False), Published(size)
    image = torch.randn(1, 3, 48, 48)
    with torch.inference_mode():
        expected = plain(image)
    named.load_state_dict(dict(zip(named.state_dict(), plain.state_dict().values(), strict=True)))
    torch.save(plain.state_dict(), tmp_path / "state.pth")
    torch.save(plain, tmp_path / "module.pth")
    torch.save(named, tmp_path / "unknown.pth")
    nelson = tmp_path / "EfficientAD" / "models" / f"teacher_{word}.pth"
    anomalib = tmp_path / "efficientad_pretrained_weights.zip"
    puad = tmp_path / "mvtec_ad_models" / f"{size}_size" / "teacher" / "teacher.pt"
    for path, content in ((nelson, plain.state_dict()), (puad, named.state_dict())):
        path.parent.mkdir(parents=True)
        torch.save(content, path)
    with zipfile.ZipFile(anomalib, "w") as archive:
        archive.write(tmp_path / "state.pth", f"efficientad_pretrained_weights/pretrained_teacher_{word}.pth")
    monkeypatch.delattr("test_efficientad.Published")
    files = [tmp_path / "state.pth", tmp_path / "module.pth", tmp_path / "unknown.pth", nelson, puad]
    for path in [*files, nelson.parents[1], puad.parents[2], anomalib]:
        network, about = teacher.load(path, size)
        with torch.inference_mode():
            torch.testing.assert_close(network(image), expected, atol=1e-5, rtol=1e-4)
        assert network.size == size and about["file"]


class Hostile:
    def __reduce__(self):
        return os.system, ("touch HACKED",)


def test_a_hostile_file_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": torch.ones(2), "gift": Hostile()}, "mixed.pth")
    torch.save(Hostile(), "hostile.pth")
    torch.save({"weight": torch.ones(2)}, "old.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "text.pth").write_text("no archive")
    whole = (tmp_path / "mixed.pth").read_bytes()
    (tmp_path / "half.pth").write_bytes(whole[: len(whole) // 2])
    for name in ("mixed.pth", "hostile.pth", "old.pth", "text.pth", "half.pth"):
        with pytest.raises(kizu.ModelError, match=name):
            read_tensors(tmp_path / name)
    assert not (tmp_path / "HACKED").exists()


def test_what_is_no_teacher_is_refused(tmp_path):
    torch.save(nn.Linear(3, 4).state_dict(), tmp_path / "linear.pth")
    broken = plain_pdn("s", 384, False)
    broken[0].weight.data[0] = np.nan
    torch.save(broken.state_dict(), tmp_path / "nan.pth")
    torch.save(nn.Sequential(*(nn.Conv2d(3, 3, n) for n in (4, 4, 3, 5))).state_dict(), tmp_path / "other.pth")
    for name, words in {
        "linear": "no teacher of EfficientAD",
        "nan": "values that are no finite numbers",
        "other": "4, 4, 3, 5",
    }.items():
        with pytest.raises(kizu.ModelError, match=words):
            teacher.load(tmp_path / f"{name}.pth")
    with pytest.raises(kizu.ModelError, match="no teacher of size m"):
        teacher.load(tmp_path, "m")
    for folder in ("a", "b"):
        tiny(tmp_path / folder / "efficientad-s.safetensors")
    with pytest.raises(kizu.OptionError, match="2 teachers"):
        teacher.load(tmp_path)
