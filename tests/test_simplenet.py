"""SimpleNet against separate statements of the paper and the published code, and as its users use it."""

import pickle

import numpy as np
import pytest
import torch
from torch import nn

import kizu
from kizu.config import SimpleNetConfig
from kizu.data.dataset import find
from kizu.detectors.simplenet.networks import Discriminator, hinge_loss, noise
from kizu.features import backbone
from kizu.features.feature_store import FeatureStore
from kizu.features.patch_features import as_rows
from kizu.features.safe_load import read_plain, write_plain
from test_detectors import GOOD, SETTINGS, part

TINY = {**SETTINGS["simplenet"], "size": 64, "meta_epochs": 3}
QUICK = {**TINY, "meta_epochs": 12}


class PublishedNetworks(nn.Module):
    """The two networks as the published code builds them, for one projection and two discriminator layers."""

    def __init__(self, dimension, hidden):
        super().__init__()
        self.projection = nn.Linear(dimension, dimension)
        self.block = nn.Sequential(nn.Linear(dimension, hidden), nn.BatchNorm1d(hidden), nn.LeakyReLU(0.2))
        self.tail = nn.Linear(hidden, 1, bias=False)

    def forward(self, rows):
        return self.tail(self.block(self.projection(rows)))[:, 0]


def test_the_loss_is_the_truncated_hinge_of_equation_6():
    torch.manual_seed(0)
    discriminator = Discriminator(6, SimpleNetConfig(dsc_hidden=10)).eval()
    good, noisy = torch.randn(40, 6), 3 * torch.randn(40, 6)
    outcome = hinge_loss(discriminator, good, noisy, 0.5)
    above, below = discriminator(good).detach().numpy(), discriminator(noisy).detach().numpy()
    expected = np.mean([max(0, 0.5 - a) for a in above]) + np.mean([max(0, 0.5 + b) for b in below])
    assert outcome.loss.item() == pytest.approx(expected, rel=1e-5)
    assert outcome.p_true.item() == pytest.approx(np.mean(above >= 0.5))
    assert outcome.p_fake.item() == pytest.approx(np.mean(below < -0.5))


def test_noise_has_the_strengths_that_were_asked_for():
    drawn = noise(torch.zeros(4000, 200), 0.3, 3, torch.Generator().manual_seed(0)).numpy()
    deviations = np.sort(drawn.std(1))
    thirds = [third.mean() for third in np.array_split(deviations, 3)]
    np.testing.assert_allclose(thirds, [0.3, 0.33, 0.363], rtol=0.02)
    single = noise(torch.zeros(4000, 200), 0.3, 1, torch.Generator().manual_seed(0))
    assert single.std().item() == pytest.approx(0.3, rel=0.01)


def test_auto_noise_makes_the_result_independent_of_the_features_scale(monkeypatch):
    usual = kizu.SimpleNet(**TINY).fit(GOOD)
    scores = [usual.predict(part(seed)).score for seed in (50, 51)]
    plain = backbone.Backbone.forward
    monkeypatch.setattr(backbone.Backbone, "forward", lambda self, x: [8 * layer for layer in plain(self, x)])
    louder = kizu.SimpleNet(**TINY).fit(GOOD)
    assert louder.facts["deviation"] == pytest.approx(8 * usual.facts["deviation"], rel=1e-4)
    assert [louder.predict(part(seed)).score for seed in (50, 51)] == pytest.approx(scores, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize(
    "settings",
    [
        {"pre_proj": 0, "dsc_layers": 1},
        {"pre_proj": 3, "proj_layer_type": 1, "embedding_size": 40, "dsc_hidden": 0, "dsc_layers": 3},
        {"pre_proj": 2, "proj_layer_type": 2, "mix_noise": 4, "cos_lr": True, "gan_epochs": 2},
        {"pretrain_embed_dimension": 100, "target_embed_dimension": 64, "auto_noise": False, "noise_std": 2.0},
        {"train_backbone": True},
        {"augment": True, "hflip": 0.5, "batch_size": 1},
        {"select": "held_out", "patience": 1},
        {"patchsize": 4},
    ],
)
def test_every_part_can_be_had_in_other_ways_and_saved(settings, tmp_path):
    detector = kizu.SimpleNet(**{**TINY, **settings}).fit(GOOD)
    spotted, plain = detector.predict(part(99, spot=True)), detector.predict(part(98))
    loaded = kizu.load(detector.save(tmp_path / "model"))
    assert loaded.predict(part(99, spot=True)).score == spotted.score != plain.score
    again = kizu.SimpleNet().load_from_path(detector.save_to_path(tmp_path / "published"))
    assert again.config == detector.config and again.threshold == detector.threshold
    assert again.predict(part(98)).score == pytest.approx(plain.score, rel=1e-3, abs=1e-3)


@pytest.mark.slow
def test_training_the_backbone_changes_it_and_only_then(tmp_path):
    pretrained = backbone.create("efficientnet_lite2").state_dict()
    for trained in (False, True):
        detector = kizu.SimpleNet(**TINY, train_backbone=trained, backbone_lr=1e-3).fit(GOOD)
        tensors = kizu.load(detector.save(tmp_path / "model")).graph.backbone.state_dict()
        assert all(torch.equal(tensors[key], pretrained[key]) for key in pretrained) != trained
        assert not any(parameter.requires_grad for parameter in detector.graph.parameters())


def test_held_out_images_are_not_trained_on():
    outlier = np.full_like(GOOD[0], 200)
    held = kizu.SimpleNet(**QUICK).fit(GOOD[:8], held_out=[outlier])
    assert held.threshold.count == 1 and held.facts["images learned from"] == 8
    assert held.calibration_scores[0] > 1.5 * abs(held.predict(GOOD[9]).score)
    alone = kizu.SimpleNet(**TINY).fit(GOOD)
    assert alone.threshold.count == 3 and alone.facts["images learned from"] == 9


def test_selecting_keeps_the_best_round_on_images_of_its_own():
    settings = {**TINY, "meta_epochs": 30, "dsc_lr": 0.05, "select": "held_out"}
    detector = kizu.SimpleNet(**settings).fit(GOOD)
    losses = detector.curves["held_out_loss"]
    assert detector.facts["rounds"] == 1 + int(np.argmin(losses)) and len(losses) == 30
    patient = kizu.SimpleNet(**settings, patience=2).fit(GOOD)
    best = patient.facts["rounds"]
    assert len(patient.curves["loss"]) in (best + 2, 30)
    assert detector.facts["images learned from"] == 8  # three set the threshold, one selects


@pytest.mark.parametrize(
    "settings",
    [
        {"augment": True},
        *(
            pytest.param(more, marks=pytest.mark.slow)
            for more in ({}, {"select": "held_out"}, {"train_backbone": True})
        ),
    ],
)
def test_training_that_was_interrupted_goes_on_to_the_same_result(settings, tmp_path):
    settings = {**TINY, "meta_epochs": 5, **settings}
    whole = kizu.SimpleNet(**settings).fit(GOOD)

    def interrupt(stage, done, total):
        if stage.startswith("Training") and done == 3:
            raise KeyboardInterrupt

    checkpoint = tmp_path / "checkpoint"
    with pytest.raises(KeyboardInterrupt):
        kizu.SimpleNet(**settings).fit(GOOD, checkpoint=checkpoint, progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    rounds = []
    resumed = kizu.SimpleNet(**settings)
    resumed.fit(GOOD, checkpoint=checkpoint, progress=lambda stage, done, total: rounds.append((stage, done)))
    assert [done for stage, done in rounds if stage.startswith("Training")] == [4, 5]
    assert resumed.curves == whole.curves
    one, two = whole.save(tmp_path / "one"), resumed.save(tmp_path / "two")
    for name in ("model.safetensors", "model.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    with pytest.raises(kizu.ModelError, match="training with other images"):
        kizu.SimpleNet(**settings).fit(GOOD[1:], checkpoint=checkpoint)
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(kizu.ModelError, match="damaged"):
        kizu.SimpleNet(**settings).fit(GOOD, checkpoint=checkpoint)


def test_features_that_do_not_fit_lie_in_a_file_and_are_the_same():
    features = torch.randn(6, 5, 3, 4, generator=torch.Generator().manual_seed(0))
    stores = [FeatureStore(6, (12, 5), memory) for memory in (10**6, 100)]
    for store in stores:
        for some in features.split([4, 2]):
            store.append(some.flatten(2).transpose(1, 2))
    assert [store.in_memory for store in stores] == [True, False]
    images, patches = [5, 0], torch.tensor([[3, 1], [11, 0]])
    expected = torch.stack([as_rows(features[i : i + 1])[p] for i, p in ((5, 3), (5, 1), (0, 11), (0, 0))])
    for store in stores:
        torch.testing.assert_close(store.take(images, patches).flatten(0, 1), expected, atol=2e-3, rtol=1e-3)
        assert len(store) == 6 and store.shape == (12, 5) and store.take(images).shape == (2, 12, 5)


def test_the_published_layout_gives_the_published_arithmetic(tmp_path):
    detector = kizu.SimpleNet(**QUICK, top=0, smoothing=0).fit(GOOD)
    folder = detector.save_to_path(tmp_path / "models" / "0")
    assert sorted(path.name for path in folder.iterdir()) == ["ckpt.pth", "params.pkl"]
    states = torch.load(folder / "ckpt.pth", weights_only=True)
    parameters = pickle.loads((folder / "params.pkl").read_bytes())
    assert parameters["patchsize"] == 3 and parameters["input_shape"] == (3, 64, 64)
    theirs = PublishedNetworks(168, 128).eval()
    theirs.projection.load_state_dict({k.removeprefix("layers.0fc."): v for k, v in states["pre_projection"].items()})
    theirs.block.load_state_dict(
        {k.removeprefix("body.block1."): v for k, v in states["discriminator"].items() if "body" in k}
    )
    theirs.tail.load_state_dict({"weight": states["discriminator"]["tail.weight"]})
    picture = torch.from_numpy(part(99, spot=True)[:64, :64].transpose(2, 0, 1).copy())[None]
    with torch.inference_mode():
        patches = -theirs(as_rows(detector.graph.embed(picture)))
    score, _ = detector(picture.numpy())
    assert score[0] == pytest.approx(patches.max().item(), rel=1e-3)


def test_a_checkpoint_of_the_published_code_needs_no_params(tmp_path):
    torch.manual_seed(1)
    theirs = PublishedNetworks(168, 50).eval()
    states = {
        "discriminator": {f"body.block1.{k}": v for k, v in theirs.block.state_dict().items()}
        | {"tail.weight": theirs.tail.weight.data},
        "pre_projection": {f"layers.0fc.{k}": v for k, v in theirs.projection.state_dict().items()},
    }
    net = kizu.SimpleNet(size=64, top=0)
    (category := tmp_path / "models" / "0" / "mvtec_bottle").mkdir(parents=True)  # where the published code puts it
    torch.save(states, category / "ckpt.pth")
    net.load_from_path(tmp_path / "models" / "0")
    (other := category.with_name("mvtec_pill")).mkdir()
    torch.save(states, other / "ckpt.pth")
    with pytest.raises(kizu.ModelError, match="several models: name one of mvtec_bottle, mvtec_pill"):
        kizu.SimpleNet().load_from_path(tmp_path / "models" / "0")
    score, mask = net.predict(part(0))
    with torch.inference_mode():
        pixels = torch.from_numpy(net.preprocessing(part(0)).transpose(2, 0, 1).copy())[None]
        expected = -theirs(as_rows(net.graph.embed(pixels)))
    assert score == pytest.approx(expected.max().item(), rel=1e-4) and mask.shape == (96, 96)
    assert "nothing is stopped" in net.threshold.statement
    del states["discriminator"]["tail.weight"]
    torch.save(states, category / "ckpt.pth")
    with pytest.raises(kizu.ModelError, match="no discriminator"):
        net.load_from_path(category)


def test_models_0_is_the_first_model_of_a_run(tmp_path):
    detector = kizu.SimpleNet(**TINY).fit(GOOD)
    detector.save(tmp_path / "models" / "bottle")
    net = kizu.SimpleNet()
    net.load_from_path(f"{tmp_path}/models/0")
    score, _ = net.predict(part(5))
    assert score == detector.predict(part(5)).score
    with pytest.raises(kizu.ModelError, match="models/1"):
        net.load_from_path(f"{tmp_path}/models/1")


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_pickles_that_would_run_code_are_refused(tmp_path):
    detector = kizu.SimpleNet(**TINY).fit(GOOD)
    folder = detector.save_to_path(tmp_path / "model")
    good = (folder / "params.pkl").read_bytes()
    for content in (pickle.dumps({"patchsize": Trap(tmp_path / "sprung")}), b"cos\nsystem\n(S'true'\ntR.", good[:50]):
        (folder / "params.pkl").write_bytes(content)
        with pytest.raises(kizu.ModelError, match=r"params\.pkl is refused"):
            kizu.SimpleNet().load_from_path(folder)
    (folder / "params.pkl").write_bytes(good)
    torch.save({"discriminator": Trap(tmp_path / "sprung")}, folder / "ckpt.pth")
    with pytest.raises(kizu.ModelError, match=r"ckpt\.pth"):
        kizu.SimpleNet().load_from_path(folder)
    assert not (tmp_path / "sprung").exists()


def test_plain_values_survive_a_pickle(tmp_path):
    values = {"name": "x", "numbers": [1, 2.5, None, True], "pair": (3, b"y")}
    write_plain(tmp_path / "a.pkl", values)
    assert read_plain(tmp_path / "a.pkl") == values
    with pytest.raises(TypeError, match="ndarray"):
        write_plain(tmp_path / "b.pkl", {"array": np.zeros(2)})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mix_noise": 0}, "`mix_noise=0`"),
        ({"noise_std": 0}, "`noise_std=0`"),
        ({"dsc_margin": -1}, "`dsc_margin=-1`"),
        ({"batch_size": 0}, "`batch_size=0`"),
        ({"patience": 3}, '`patience` needs `select="held_out"`'),
        ({"pre_proj": 0, "embedding_size": 5}, "`pre_proj=1`"),
        ({"cos_lr": True, "meta_epochs": 4, "aed_meta_epochs": 4}, "`aed_meta_epochs=4`"),
        ({"pretrain_embed_dimension": 5}, "go together"),
        ({"rotate_degrees": 999}, "`rotate_degrees=999`"),
        ({"backbone": "clip", "layers": "12", "size": 224}, "no layer 12.* 0 … 11"),
        ({"backbone": "clip", "size": 100}, "`size=100x100`.*patches of 32.*96x96"),
        ({"select": "held_out"}, '`select="held_out"`: of 1 images'),
        ({"patchsize": 14, "layers": "blocks.6"}, "`patchsize=14` does not fit"),
    ],
)
def test_wrong_values_get_a_sentence(settings, words):
    with pytest.raises(kizu.OptionError, match=words):
        kizu.SimpleNet(**{"size": 32, **settings}).fit(GOOD[:1])


def test_a_patchsize_that_is_even_or_too_large_is_accepted_with_a_word():
    detector = kizu.SimpleNet(**{**TINY, "patchsize": 10}).fit(GOOD[:4])
    assert [word.split(":")[0] for word in detector.remarks] == [
        "`patchsize=10` is even",
        "`patchsize=10` averages over most of the 7×7 grid",
    ]


def test_ten_rounds_tell_real_broken_bottles_from_whole_ones(real_data):
    data = find(real_data / "mvtec_ad" / "bottle")
    test = data.select(split="test")[::3]
    detector = kizu.SimpleNet(size=192, meta_epochs=10, dsc_hidden=256, sampled=1 / 8).fit(
        data.select(split="train")[:100]
    )
    scores = {sample: outcome.score for sample, outcome in detector.judge(test)}
    good = [score for sample, score in scores.items() if not sample.is_anomalous]
    bad = [score for sample, score in scores.items() if sample.is_anomalous]
    assert np.mean([b > g for b in bad for g in good]) >= 0.98
