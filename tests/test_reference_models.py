"""Models as the published programs write them: read, judged like there, written back; and files that are hostile."""

import os
import pickle
import shutil
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch import nn
from torch.nn import functional as F

import kizu
from kizu.cli.main import cli
from kizu.cli.reference import scoring
from kizu.data.dataset import find
from kizu.export import faiss_file
from kizu.export.reference_files import found_models, read_reference, write_reference
from kizu.features.patch_features import as_rows
from test_detectors import GOOD, part

LAYERS = ["blocks.2", "blocks.4"]


def pixels(detector, picture):
    return torch.from_numpy(detector.preprocessing(picture).transpose(2, 0, 1)[None].copy())


# PatchCore


def published_patchcore(folder, entries, prefix="", backbone="efficientnet_lite2", **more):
    """The two files as the published program leaves them: faiss's own, and a pickle of the highest protocol."""
    folder.mkdir(parents=True, exist_ok=True)
    index = faiss.IndexFlatL2(entries.shape[1])
    index.add(entries)
    faiss.write_index(index, str(folder / f"{prefix}nnscorer_search_index.faiss"))
    parameters = {
        "backbone.name": backbone,
        "layers_to_extract_from": LAYERS,
        "input_shape": (3, 64, 64),
        "pretrain_embed_dimension": 48,
        "target_embed_dimension": 32,
        "patchsize": 3,
        "patchstride": 1,
        "anomaly_scorer_num_nn": 1,
        **more,
    }
    content = pickle.dumps(parameters, pickle.HIGHEST_PROTOCOL)
    (folder / f"{prefix}patchcore_params.pkl").write_bytes(content)
    return folder


def bank(count, seed=0):
    """Features of real shape and size: of rows that the network gives, with noise."""
    settings = {"size": 64, "fusion": "stack", "local_scale": False, "layers": LAYERS}
    detector = kizu.PatchCore(**settings, pretrain_embed_dimension=48, target_embed_dimension=32, coreset=1).fit(GOOD)
    rows = detector.graph.banks[0].entries.numpy()
    random = np.random.default_rng(seed)
    return (rows[random.integers(len(rows), size=count)] + random.normal(0, 0.3, (count, 32))).astype(np.float32)


@pytest.mark.parametrize(("count", "neighbours"), [(300, 1), (1500, 1), (300, 3)])
def test_patchcore_judges_as_faiss_does_and_is_written_back_byte_for_byte(count, neighbours, tmp_path):
    entries = bank(count)
    folder = published_patchcore(tmp_path / "theirs", entries, anomaly_scorer_num_nn=neighbours)
    detector = read_reference(folder, resize=72)
    index = faiss.read_index(str(folder / "nnscorer_search_index.faiss"))
    picture = part(50, spot=True)
    with torch.inference_mode():
        features = as_rows(detector.graph.embed(pixels(detector, picture))[0]).numpy()
    squares, _ = index.search(features, neighbours)
    expected = squares.mean(1)
    prediction = detector.predict(picture)
    assert prediction.score == pytest.approx(expected.max(), rel=1e-4)
    grid = torch.from_numpy(expected).view(1, 1, 8, 8)
    upsampled = F.interpolate(grid, (64, 64), mode="bilinear", align_corners=False)[0, 0]
    np.testing.assert_allclose(prediction.input_map, gaussian_filter(upsampled.numpy(), 4), rtol=1e-3)
    assert not prediction.is_anomalous and prediction.why() == []  # no threshold, no training images
    saved = kizu.load(detector.save(tmp_path / "ours"))
    back = write_reference(saved, tmp_path / "back")
    name = "nnscorer_search_index.faiss"
    assert (back / name).read_bytes() == (folder / name).read_bytes()
    theirs, ours = (pickle.loads((f / "patchcore_params.pkl").read_bytes()) for f in (folder, back))
    assert ours == theirs and [type(v) for v in ours.values()] == [type(v) for v in theirs.values()]
    assert read_reference(back, resize=72).predict(picture).score == prediction.score


def test_an_ensemble_keeps_its_members(tmp_path):
    for number, (seed, count) in enumerate(((1, 200), (2, 1200)), 1):
        published_patchcore(tmp_path / "theirs", bank(count, seed), prefix=f"Ensemble-{number}-2_")
    detector = read_reference(tmp_path / "theirs")
    back = write_reference(detector, tmp_path / "back")
    for path in (tmp_path / "theirs").glob("*.faiss"):
        assert (back / path.name).read_bytes() == path.read_bytes()
    picture = part(60, spot=True)
    assert read_reference(back).predict(picture).score == detector.predict(picture).score
    assert detector.predict(picture).score > 2 * detector.predict(part(61)).score
    (tmp_path / "theirs" / "Ensemble-1-2_nnscorer_search_index.faiss").unlink()
    with pytest.raises(kizu.ModelError, match="not complete"):
        read_reference(tmp_path / "theirs")


def test_published_names_are_timms(tmp_path):
    folder = published_patchcore(tmp_path / "theirs", bank(20), backbone="wideresnet50")
    with pytest.raises(kizu.KizuError, match=r"wide_resnet50_2\.tv_in1k has no layer blocks"):
        read_reference(folder)


def test_the_flat_index_is_faisss(tmp_path):
    vectors = np.random.default_rng(0).normal(size=(37, 11)).astype(np.float32)
    index = faiss.IndexFlatL2(11)
    index.add(vectors)
    faiss.write_index(index, str(tmp_path / "theirs.faiss"))
    faiss_file.write(tmp_path / "ours.faiss", vectors)
    assert (tmp_path / "ours.faiss").read_bytes() == (tmp_path / "theirs.faiss").read_bytes()
    np.testing.assert_array_equal(faiss_file.read(tmp_path / "theirs.faiss"), vectors)
    assert faiss.read_index(str(tmp_path / "ours.faiss")).ntotal == 37
    content = (tmp_path / "ours.faiss").read_bytes()
    inner = faiss.IndexFlatIP(11)
    inner.add(vectors)
    faiss.write_index(inner, str(tmp_path / "inner.faiss"))
    for number, broken in enumerate((content[:20], content[:-1], content[:4] + b"\xff" * 41 + content[45:], b"", b"x")):
        (tmp_path / f"{number}.faiss").write_bytes(broken)
        with pytest.raises(kizu.ModelError, match=rf"{number}\.faiss"):
            faiss_file.read(tmp_path / f"{number}.faiss")
    with pytest.raises(kizu.ModelError, match="no flat index"):
        faiss_file.read(tmp_path / "inner.faiss")


def test_what_the_published_patchcore_cannot_compute_is_not_written(tmp_path):
    with pytest.raises(kizu.ModelError, match="`local_scale=False`"):
        write_reference(kizu.PatchCore(size=64).fit(GOOD[:3]), tmp_path / "model")
    plain = {"size": 64, "fusion": "stack", "local_scale": False, "top": 0, "layers": LAYERS}
    detector = kizu.PatchCore(**plain).fit(GOOD[:3])
    with pytest.raises(kizu.ModelError, match="`pretrain_embed_dimension"):
        write_reference(detector, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    one = kizu.PatchCore(**{**plain, "layers": LAYERS[:1]}).fit(GOOD[:3])
    again = read_reference(write_reference(one, tmp_path / "one"), resize=64)
    assert again.predict(part(9)).score > 0


# SimpleNet


def published_simplenet(folder, dimension=48, hidden=32):
    """ckpt.pth as the published program writes it: two states, no parameters beside them."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    projection = nn.Linear(dimension, dimension)
    block, tail = nn.Sequential(nn.Linear(dimension, hidden), nn.BatchNorm1d(hidden)), nn.Linear(hidden, 1, bias=False)
    block[1].running_mean.normal_()
    states = {
        "pre_projection": {f"layers.0fc.{key}": value for key, value in projection.state_dict().items()},
        "discriminator": {
            **{f"body.block1.{key}": value for key, value in block.state_dict().items()},
            "tail.weight": tail.weight.data,
        },
    }
    torch.save(states, folder / "ckpt.pth")
    return folder, states, nn.Sequential(projection, block, nn.LeakyReLU(0.2), tail).eval()


def test_simplenet_there_and_back(tmp_path):
    folder, states, plain = published_simplenet(tmp_path / "models" / "0" / "mvtec_bottle")
    settings = {"layers": LAYERS, "pretrain_embed_dimension": 48, "target_embed_dimension": 48}
    detector = read_reference(folder, size=64, settings=settings)
    assert detector.config.resize == 73 and found_models(tmp_path) == [folder]
    picture = part(50, spot=True)
    with torch.inference_mode():
        expected = -plain(as_rows(detector.graph.embed(pixels(detector, picture)))).min()
    assert detector.predict(picture).score == pytest.approx(expected.item(), rel=1e-4)
    back = write_reference(detector, tmp_path / "back")
    written = torch.load(back / "ckpt.pth", weights_only=True)
    assert written.keys() == states.keys()
    for name, state in states.items():
        assert list(written[name]) == list(state)
        assert all(torch.equal(written[name][key], value) for key, value in state.items())
    assert read_reference(back).predict(picture).score == detector.predict(picture).score


# EfficientAD


class PublishedPDN(nn.Module):
    def __init__(self, out):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 4), nn.Conv2d(6, 8, 4)
        self.conv3, self.conv4 = nn.Conv2d(8, 8, 3), nn.Conv2d(8, out, 4)

    def forward(self, x):
        x = F.avg_pool2d(F.relu(self.conv1(x)), 2)
        x = F.avg_pool2d(F.relu(self.conv2(x)), 2)
        return self.conv4(F.relu(self.conv3(x)))


class PublishedAutoencoder(nn.Module):
    def __init__(self, out):
        super().__init__()
        self.encoder, self.decoder = nn.Module(), nn.Module()
        channels = [3, 32, 32, 64, 64, 64]
        for n in range(5):
            setattr(self.encoder, f"enconv{n + 1}", nn.Conv2d(channels[n], channels[n + 1], 4, 2, 1))
        self.encoder.enconv6 = nn.Conv2d(64, 64, 8)
        for n in range(6):
            setattr(self.decoder, f"deconv{n + 1}", nn.Conv2d(64, 64, 4, padding=2))
        self.decoder.deconv7, self.decoder.deconv8 = nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, out, 3, padding=1)

    def forward(self, x):
        for n in range(1, 6):
            x = F.relu(getattr(self.encoder, f"enconv{n}")(x))
        x = self.encoder.enconv6(x)
        for n, side in enumerate((3, 8, 15, 32, 63, 127), 1):
            x = F.relu(getattr(self.decoder, f"deconv{n}")(F.interpolate(x, side, mode="bilinear")))
        return self.decoder.deconv8(F.relu(self.decoder.deconv7(F.interpolate(x, 56, mode="bilinear"))))


def published_efficientad(models, whole_modules=False):
    """The published tree, and its score of a photograph by the published formulas."""
    torch.manual_seed(1)
    teacher, student, autoencoder = PublishedPDN(16).eval(), PublishedPDN(32).eval(), PublishedAutoencoder(16).eval()
    mu, sigma = torch.randn(16), torch.rand(16) + 0.5
    quantile = dict(
        zip(("q_a_student", "q_b_student", "q_a_autoencoder", "q_b_autoencoder"), torch.rand(4), strict=True)
    )
    quantile["q_b_student"] += 1
    quantile["q_b_autoencoder"] += 1
    folder = models / "s_size" / "mvtec" / "bottle"
    for path, content in (
        (models / "s_size" / "teacher" / "teacher.pt", teacher),
        (folder / "student.pt", student),
        (folder / "autoencoder.pt", autoencoder),
        *((folder / f"{name}.pt", v) for name, v in (("mu", mu), ("sigma", sigma), ("quantile", quantile))),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        is_state = isinstance(content, nn.Module) and not whole_modules
        torch.save(content.state_dict() if is_state else content, path)

    @torch.no_grad()
    def score(x):
        normalised = (teacher(x) - mu[:, None, None]) / sigma[:, None, None]
        st = (normalised - student(x)[:, :16]).square().mean(1, keepdim=True)
        ae = (autoencoder(x) - student(x)[:, 16:]).square().mean(1, keepdim=True)
        maps = [F.interpolate(m, (256, 256), mode="bilinear") for m in (st, ae)]
        scaled = [
            0.1 * (m - quantile[f"q_a_{name}"]) / (quantile[f"q_b_{name}"] - quantile[f"q_a_{name}"])
            for m, name in zip(maps, ("student", "autoencoder"), strict=True)
        ]
        return (0.5 * scaled[0] + 0.5 * scaled[1]).max().item()

    return folder, score


@pytest.mark.parametrize("whole_modules", [False, True])
def test_efficientad_there_and_back(whole_modules, tmp_path):
    folder, score = published_efficientad(tmp_path / "theirs", whole_modules)
    detector = read_reference(folder)
    picture = part(50, spot=True)
    x = pixels(detector, picture).float() / 255
    x = (x - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    assert detector.predict(picture).score == pytest.approx(score(x), rel=1e-4)
    saved = kizu.load(detector.save(tmp_path / "ours"))
    back = write_reference(saved, tmp_path / "back", data_set="mvtec", category="bottle")
    assert back == tmp_path / "back" / "s_size" / "mvtec" / "bottle"
    if not whole_modules:
        theirs = {path.relative_to(tmp_path / "theirs") for path in (tmp_path / "theirs").rglob("*.pt")}
        assert theirs == {path.relative_to(tmp_path / "back") for path in (tmp_path / "back").rglob("*.pt")}
        for path in theirs:
            before, after = (torch.load(tmp_path / root / path, weights_only=True) for root in ("theirs", "back"))
            before, after = (x if isinstance(x, dict) else {"": x} for x in (before, after))
            assert list(before) == list(after) and all(torch.equal(before[key], after[key]) for key in before)
    assert read_reference(back).predict(picture).score == detector.predict(picture).score
    with pytest.raises(kizu.ModelError, match='`border="stretch"`'):
        other = kizu.EfficientAD(teacher=str(tmp_path / "theirs" / "s_size" / "teacher" / "teacher.pt"), steps=1)
        write_reference(other.fit(GOOD[:3]), tmp_path / "other")


# Importing, and what is hostile


def test_import_makes_models_with_a_threshold(tmp_path):
    published_patchcore(tmp_path / "run" / "models" / "mvtec_disc", bank(400))
    published_efficientad(tmp_path / "run" / "efficientad")
    (tmp_path / "good").mkdir()
    for seed in range(20):
        Image.fromarray(part(200 + seed)).save(tmp_path / "good" / f"{seed}.png")
    output = ("--output", str(tmp_path / "models"))
    command = ["import", str(tmp_path / "run"), "--good", str(tmp_path / "good"), "--resize", "72", *output]
    done = CliRunner().invoke(cli, command, catch_exceptions=False)
    model = tmp_path / "models" / "models" / "mvtec_disc"
    assert f"{model}: patchcore, 64×64 of photographs scaled to 72" in done.output and "20 good images" in done.output
    detector = kizu.load(model)
    assert detector.predict(part(77, spot=True)).is_anomalous and detector.threshold.count == 20
    assert kizu.load(tmp_path / "models" / "efficientad" / "s_size" / "mvtec" / "bottle").method == "efficientad"
    with pytest.raises(kizu.OptionError, match="exists"):
        CliRunner().invoke(cli, command, catch_exceptions=False)
    with pytest.raises(kizu.OptionError, match="no published model here"):
        CliRunner().invoke(cli, ["import", str(tmp_path / "good")], catch_exceptions=False)


class Hostile:
    def __reduce__(self):
        return os.system, ("touch HACKED",)


def test_hostile_files_are_refused_with_a_sentence_and_nothing_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    patchcore = published_patchcore(tmp_path / "patchcore", bank(20))
    simplenet, states, _ = published_simplenet(tmp_path / "simplenet")
    efficientad, _ = published_efficientad(tmp_path / "efficientad")
    shutil.copytree(simplenet, tmp_path / "simplenet2")
    teacher = efficientad.parents[1] / "teacher" / "teacher.pt"
    trapped = [
        (patchcore, patchcore / "patchcore_params.pkl", pickle.dumps({"backbone.name": Hostile()})),
        (patchcore, patchcore / "nnscorer_search_index.faiss", pickle.dumps(Hostile())),
        (tmp_path / "simplenet2", tmp_path / "simplenet2" / "params.pkl", pickle.dumps({"config": Hostile()})),
        (simplenet, simplenet / "ckpt.pth", {**states, "gift": Hostile()}),
        (efficientad, teacher, None),
        *((efficientad, efficientad / f"{n}.pt", None) for n in ("student", "autoencoder", "mu", "sigma", "quantile")),
    ]
    for folder, path, content in trapped:
        before = path.read_bytes() if path.exists() else None
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content or {"weight": torch.load(path, weights_only=True), "gift": Hostile()}, path)
        with pytest.raises(kizu.ModelError, match=path.name.replace(".", r"\.")):
            read_reference(folder)
        assert not Path("HACKED").exists(), path
        if before is not None:
            path.write_bytes(before)
    assert read_reference(efficientad).method == "efficientad"


# The published arithmetic


def test_as_published_is_the_published_protocol(tmp_path):
    """Everything anew from scores, maps and masks: min-max over the test set, cut masks, PRO with the grown map."""
    for split, name, spot in (("train", "good", False), ("test", "good", False), ("test", "spot", True)):
        for seed in range(4):
            path = tmp_path / "disc" / split / name / f"{seed}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(part(10 * len(name) + seed, spot)).save(path)
    mask = np.zeros((96, 96), np.uint8)
    mask[30:42, 50:62] = 255
    (tmp_path / "disc" / "ground_truth" / "spot").mkdir(parents=True)
    for seed in range(4):
        Image.fromarray(mask).save(tmp_path / "disc" / "ground_truth" / "spot" / f"{seed}_mask.png")
    data = find(tmp_path / "disc")
    settings = {"size": 64, "resize": 72, "fusion": "stack", "local_scale": False, "top": 0, "squared": True}
    detector = kizu.PatchCore(
        **settings, backbone="efficientnet_lite2,efficientnet_lite2", layers=("0.blocks.2", "1.blocks.4"), coreset=0.1
    ).fit(data.select(split="train"))
    samples = data.select(split="test")
    batch = torch.cat([pixels(detector, np.array(Image.open(sample.path))) for sample in samples])
    members = [member(batch) for member in detector.graph.members]
    scores = np.mean([(s - s.min()) / (s.max() - s.min()) for s, _ in members], axis=0)
    maps = np.mean([((m - m.min()) / (m.max() - m.min()))[:, 0] for _, m in members], axis=0)
    small = np.array(Image.fromarray(mask).resize((72, 72), Image.Resampling.BILINEAR))[4:68, 4:68] == 255
    masks = np.array([small if sample.is_anomalous else np.zeros_like(small) for sample in samples])

    def auroc(positive, negative):
        return np.mean([(p > negative).mean() + (p == negative).mean() / 2 for p in positive])

    labels = np.array([sample.is_anomalous for sample in samples])
    row = scoring.as_published("disc", detector, samples, pro=True)
    assert row.instance_auroc == pytest.approx(auroc(scores[labels], scores[~labels]))
    assert row.full_pixel_auroc == pytest.approx(auroc(maps[masks], maps[~masks]), abs=1e-5)
    points = []
    for level in np.linspace(maps.min(), maps.max(), 200, endpoint=False):
        covered = []
        for anomaly_map, region in zip(maps, masks, strict=True):
            if region.any():
                grown = np.pad(anomaly_map > level, 2)
                near = [grown[y : y + 64, x : x + 64] for y in range(5) for x in range(5)]
                covered.append(np.any(near, axis=0)[region].mean())
        points.append(((maps > level)[~masks].mean(), np.mean(covered)))
    kept = np.array([point for point in points if point[0] < 0.3])[::-1]
    expected = np.trapezoid(kept[:, 1], kept[:, 0] / kept[:, 0].max())
    assert row.anomaly_pixel_auroc == pytest.approx(expected, abs=1e-4)
    only = scoring.as_published("disc", detector, samples).anomaly_pixel_auroc
    assert only == pytest.approx(auroc(maps[labels][masks[labels]], maps[labels][~masks[labels]]), abs=1e-5)
