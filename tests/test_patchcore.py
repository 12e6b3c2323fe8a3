"""PatchCore against a slow, separate statement of the paper and the reference, and on real photographs."""

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

import kizu
from kizu import backbone
from kizu.dataset import find
from test_features import reference_features


def photographs(count, seed=0, size=64):
    rng = np.random.default_rng(seed)
    smooth = rng.normal(size=(count, size // 8, size // 8, 3)).repeat(8, 1).repeat(8, 2)
    return list(np.clip(128 + 40 * smooth + rng.normal(0, 6, (count, size, size, 3)), 0, 255).astype(np.uint8))


def slow_patchcore(features, bank, reweight):
    """Scores by exhaustive search and Eq. 7, in double precision; features of one image (P, D)."""
    table = np.linalg.norm(features[:, None] - bank[None], axis=2)
    worst = table.min(1).argmax()
    nearest = table[worst].argmin()
    score = table[worst, nearest]
    if reweight:
        around = np.linalg.norm(bank - bank[nearest], axis=1).argsort(kind="stable")[:reweight]
        score *= 1 - np.exp(score) / np.exp(table[worst, around]).sum()
    return score, table.min(1)


@pytest.mark.parametrize("reweight", [0, 4])
@pytest.mark.parametrize("dimensions", [(64, 96), (100, 100)])
def test_the_exact_mode_is_the_references_arithmetic(reweight, dimensions):
    train, test = photographs(4), photographs(3, seed=9)
    detector = kizu.PatchCore(
        size=64,
        sampler="identity",
        reweight=reweight,
        pretrain_embed_dimension=dimensions[0],
        target_embed_dimension=dimensions[1],
        smoothing=0,
    ).fit(train)
    network = backbone.create("efficientnet_lite2").double()

    def features(picture):
        pixels = torch.from_numpy(picture.transpose(2, 0, 1).copy())[None]
        normal = (pixels.double() / 255 - 0.5) / 0.5
        maps = network.network(normal)
        return reference_features([layer[0].numpy() for layer in maps], 3, *dimensions)

    bank = np.concatenate([features(picture) for picture in train])
    np.testing.assert_allclose(detector.graph.bank.numpy(), bank, atol=2e-4)
    for picture in test:
        score, patches = slow_patchcore(features(picture), bank, reweight)
        ours = detector.predict(picture)
        assert ours.score == pytest.approx(score, rel=1e-4)
        assert ours.input_map.max() <= patches.max() + 1e-3


def test_scores_of_training_images_leave_their_own_entries_out():
    train = photographs(5)
    detector = kizu.PatchCore(size=64, sampler="identity").fit(train)
    for index, score in enumerate(detector.calibration_scores):
        others = kizu.PatchCore(size=64, sampler="identity").fit(train[:index] + train[index + 1 :])
        assert others.predict(train[index]).score == pytest.approx(score, rel=1e-5)


def test_weights_from_a_file_are_loaded_strictly(tmp_path):
    torch.manual_seed(0)
    network = timm.create_model("resnet18")
    state = network.state_dict()
    save_file(state, tmp_path / "net.safetensors")
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "net.pth")
    scores = set()
    for name in ("net.safetensors", "net.pth"):
        settings = {"backbone": "resnet18", "layers": "layer1,layer2", "weights": str(tmp_path / name)}
        detector = kizu.PatchCore(size=64, **settings).fit(photographs(3))
        scores.add(detector.predict(photographs(1, seed=5)[0]).score)
        (model := tmp_path / f"{name}.model")
        assert kizu.load(detector.save(model)).predict(photographs(1, seed=5)[0]).score in scores
    assert len(scores) == 1
    state["layer1.0.conv1.weight"] = state["layer1.0.conv1.weight"][:5]
    save_file(state, tmp_path / "other.safetensors")
    del state["layer1.0.conv1.weight"]
    save_file(state, tmp_path / "less.safetensors")
    for name, word in (("other", "shape"), ("less", "missing")):
        with pytest.raises(kizu.ModelError, match=word):
            backbone.create("resnet18", ("layer1",), str(tmp_path / f"{name}.safetensors"))


def test_a_weights_file_that_would_run_code_is_refused(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    torch.save({"conv1.weight": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(kizu.ModelError, match="refused"):
        backbone.create("resnet18", (), str(tmp_path / "trap.pth"))
    assert not (tmp_path / "sprung").exists()


def test_without_a_network_the_two_ways_on_are_named(monkeypatch):
    def unreachable(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", unreachable)
    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_url", unreachable)
    with pytest.raises(kizu.ModelError, match="--weights FILE"):
        backbone.create("resnet18")


def test_nothing_behind_the_last_tap_is_kept():
    network = backbone.Backbone("resnet18", ("layer1", "layer2"))
    assert not any("layer3" in name or "fc" in name for name, _ in network.named_parameters())
    assert [tuple(m.shape[1:]) for m in network(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))] == [
        (64, 16, 16),
        (128, 8, 8),
    ]


def test_taps_keep_the_order_in_which_they_were_asked_for():
    network = backbone.Backbone("resnet18", ("layer3", "layer1"))
    assert [m.shape[1] for m in network(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))] == [256, 64]


def test_thirty_real_bottles_are_enough_to_find_broken_ones(real_data):
    data = find(real_data / "mvtec_ad" / "bottle")
    test = data.select(split="test")
    detector = kizu.PatchCore(size=192).fit(data.select(split="train")[:30])
    scores = {sample: outcome.score for sample, outcome in detector.judge(test[::4])}
    good = [score for sample, score in scores.items() if not sample.is_anomalous]
    bad = [score for sample, score in scores.items() if sample.is_anomalous]
    assert np.mean([b > g for b in bad for g in good]) >= 0.99
    broken = next(sample for sample in test if sample.defect == "broken_large")
    prediction = detector.predict(broken.path)
    mask = broken.mask(prediction.shape)
    assert mask[np.unravel_index(prediction.anomaly_map.argmax(), mask.shape)]
