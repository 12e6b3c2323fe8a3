"""PatchCore against a slow, separate statement of the paper and the reference, and on real photographs."""

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file

import kizu
from kizu.data.dataset import find
from kizu.detectors import ram
from kizu.detectors.patchcore import coreset
from kizu.detectors.patchcore.leave_one_out import NEARLY
from kizu.detectors.ram import budget
from kizu.features import backbone
from test_detectors import part
from test_features import reference_features

PAPER = {"size": 64, "fusion": "stack", "local_scale": False, "top": 0}


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
        **PAPER,
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
    np.testing.assert_allclose(detector.graph.banks[0].entries.numpy(), bank, atol=2e-4)
    for picture in test:
        score, patches = slow_patchcore(features(picture), bank, reweight)
        ours = detector.predict(picture)
        assert ours.score == pytest.approx(score, rel=1e-4)
        assert ours.input_map.max() <= patches.max() + 1e-3


def test_scores_of_training_images_leave_their_own_entries_out():
    train = photographs(5)
    detector = kizu.PatchCore(**PAPER, sampler="identity").fit(train)
    for index, score in enumerate(detector.calibration_scores):
        others = kizu.PatchCore(**PAPER, sampler="identity").fit(train[:index] + train[index + 1 :])
        assert others.predict(train[index]).score == pytest.approx(score, rel=1e-5)


def test_an_image_judged_as_new_meets_stand_ins_for_its_own_entries():
    """Against a slow search: of the patches that an entry covers, the one farthest from what another image leaves."""
    train = photographs(6)
    detector = kizu.PatchCore(**PAPER, coreset=0.2).fit(train)
    bank = detector.graph.banks[0]
    pixels = torch.from_numpy(np.stack(train).transpose(0, 3, 1, 2).copy())
    rows = detector.graph.embed(pixels)[0].flatten(2).transpose(1, 2).numpy()  # (images, P, D)
    entries, images = bank.entries.numpy(), bank.images.numpy()
    table = np.linalg.norm(rows[:, :, None] - entries, axis=3)  # (images, P, K)
    home, radius = table.argmin(2), table.min(2).max()
    own = images == np.arange(6)[:, None, None]
    others = np.where(own, np.inf, table).min(2)
    taken = 0
    for number, score in enumerate(detector.calibration_scores):
        left = np.where(images == number, np.inf, table).min(2)  # distances to the bank without this image's entries
        distances = [others[number]]
        for entry in np.flatnonzero(images == number):
            covered = (home == entry) & (np.arange(6) != number)[:, None]
            if covered.any() and np.where(covered, left, -1).max() > NEARLY * radius:
                stand_in = rows.reshape(-1, rows.shape[2])[np.where(covered, left, -1).argmax()]
                distances.append(np.linalg.norm(rows[number] - stand_in, axis=1))
                taken += 1
        assert score == pytest.approx(np.min(distances, axis=0).max(), rel=1e-4)
    assert taken > 3


def test_training_images_score_as_if_the_bank_had_been_made_without_them():
    """Each image again with a bank of the others, as the threshold wants it and no fit can afford."""
    images = [part(number) for number in range(16)]
    settings = {"size": 64, "coreset": 0.2}
    detector = kizu.PatchCore(**settings).fit(images)
    without = [kizu.PatchCore(**settings).fit(images[:n] + images[n + 1 :]).predict(images[n]).score for n in range(16)]
    assert np.mean(detector.calibration_scores) == pytest.approx(np.mean(without), rel=0.05)
    assert max(detector.calibration_scores) == pytest.approx(max(without), rel=0.1)


def test_a_layer_may_have_banks_of_several_patchsizes(tmp_path):
    train, picture = photographs(6), photographs(1, seed=9)[0]
    settings = {"size": 64, "coreset": 0.2}
    pixels = torch.from_numpy(picture.transpose(2, 0, 1)[None].copy())
    alone = [kizu.PatchCore(**settings, layers=layer).fit(train) for layer in ("blocks.2", "blocks.2:5", "blocks.6:1")]
    together = kizu.PatchCore(**settings, layers="blocks.2,blocks.2:5,blocks.6:1").fit(train)
    assert [bank.entries.shape[1] for bank in together.graph.banks] == [48, 48, 352]
    fine, wide, coarse = (detector.graph.score_images(pixels)[1] for detector in alone)
    coarse = torch.nn.functional.interpolate(coarse[None], size=fine.shape[1:], mode="bilinear")[0]
    expected = together.graph.upsample((fine + wide + coarse) / 3)[0, 0].numpy()
    np.testing.assert_allclose(together.predict(picture).input_map, expected, rtol=1e-4)
    assert kizu.load(together.save(tmp_path / "model")).predict(picture).score == together.predict(picture).score

    (layer,) = alone[1].graph.backbone(pixels)
    window = torch.tensor([1.0, 2, 3, 2, 1]) / 9
    inner = torch.einsum("bchwij,i,j->bchw", layer.unfold(2, 5, 1).unfold(3, 5, 1), window, window)
    torch.testing.assert_close(alone[1].graph.embed(pixels)[0][..., 2:-2, 2:-2], inner)
    for wrong in ("blocks.2:x", "blocks.2:4"):
        with pytest.raises(kizu.OptionError, match=r"a patchsize of its own is an odd number up to 15, as in layer2:5"):
            kizu.PatchCore(layers=wrong)
    with pytest.raises(kizu.OptionError, match=r'needs `fusion="separate"`'):
        kizu.PatchCore(layers="blocks.2:5", fusion="stack")


def test_a_layer_may_look_at_a_smaller_photograph(tmp_path):
    train, more, picture = photographs(6), photographs(3, seed=5), photographs(1, seed=9)[0]
    settings = {"coreset": 0.2, "smoothing": 0}
    names = "blocks.2@0.7", "blocks.2:5@0.7", "blocks.4", "blocks.6:1@0.7"
    detector = kizu.PatchCore(**settings, size=96, layers=",".join(names)).fit(train)
    pixels = torch.from_numpy(picture.transpose(2, 0, 1)[None].copy())
    pixels = torch.nn.functional.interpolate(pixels.float(), (96, 96), mode="area").byte()
    smaller = torch.nn.functional.interpolate(pixels.float(), (64, 64), mode="bilinear")
    looks = backbone.create("efficientnet_lite2", ("blocks.2", "blocks.2", "blocks.6"))(smaller)
    looks += backbone.create("efficientnet_lite2", ("blocks.4",))(pixels)
    for found, expected in zip(detector.graph.backbone(pixels), looks, strict=True):
        torch.testing.assert_close(found, expected)
    assert [tuple(grid) for grid in detector.graph.grids] == [(8, 8), (8, 8), (2, 2), (6, 6)]

    _, grid = detector.graph.score_images(pixels)  # each bank counts alike
    neighbours = detector.graph.search(detector.graph.embed(pixels))
    alone = [
        detector.graph.patch_scores(bank, nearest, None).view(1, 1, *shape)
        for bank, nearest, shape in zip(detector.graph.banks, neighbours, detector.graph.grids, strict=True)
    ]
    aligned = [torch.nn.functional.interpolate(scored, (8, 8), mode="bilinear") for scored in alone]
    torch.testing.assert_close(grid, torch.cat(aligned, 1).mean(1))

    before = detector.predict(picture).score
    again = kizu.load(detector.save(tmp_path / "model"))
    assert again.predict(picture).score == before
    assert again.update(more).training["images"] == 9
    for wrong in ("blocks.2@0.1", "blocks.2@1.5", "blocks.2@x", "blocks.2@0.7:5"):
        with pytest.raises(kizu.OptionError, match="layers"):
            kizu.PatchCore(layers=wrong)
    with pytest.raises(kizu.OptionError, match=r'needs `fusion="separate"`'):
        kizu.PatchCore(layers="blocks.2@0.7", fusion="stack")


def test_with_local_scales_too_training_images_score_like_new_ones():
    images = photographs(60)
    detector = kizu.PatchCore(size=64, coreset=0.1).fit(images[:30])
    new = [detector.predict(picture).score for picture in images[30:]]
    assert np.mean(detector.calibration_scores) == pytest.approx(np.mean(new), rel=0.03)


def test_local_scales_are_the_usual_distances_around_the_entries():
    detector = kizu.PatchCore(size=64, coreset=0.1, fusion="stack", layers="blocks.2").fit(photographs(6))
    bank = detector.graph.banks[0]
    features = torch.cat(
        [detector.graph.embed(torch.from_numpy(p.transpose(2, 0, 1).copy())[None])[0] for p in photographs(6)]
    )
    sums, counts = np.zeros(len(bank.entries)), np.zeros(len(bank.entries))
    for image, rows in enumerate(features.flatten(2).transpose(1, 2).numpy()):
        table = np.linalg.norm(rows[:, None] - bank.entries.numpy()[None], axis=2)
        table[:, bank.images.numpy() == image] = np.inf
        np.add.at(sums, table.argmin(1), table.min(1))
        np.add.at(counts, table.argmin(1), 1)
    expected = (sums + 5 * sums.sum() / counts.sum()) / (counts + 5)
    np.testing.assert_allclose(bank.typical_distance(per_entry=True).numpy(), expected, rtol=1e-4)


def test_in_little_memory_the_result_is_nearly_the_same(monkeypatch):
    monkeypatch.setattr(coreset, "CHUNK", 600)
    images, tests = photographs(40), photographs(10, seed=5)
    whole = kizu.PatchCore(size=64, coreset=0.1).fit(images)
    little = kizu.PatchCore(size=64, coreset=0.1)
    monkeypatch.setattr("kizu.detectors.base.budget", lambda asked: asked)
    little.fit(images, memory=1_000_000)  # features alone are 1.2 MB, of which a third is allowed
    assert little.facts["bank"] == whole.facts["bank"]
    assert little.facts["radius"][0] <= 2.5 * whole.facts["radius"][0]
    for picture in tests:
        assert little.predict(picture).score == pytest.approx(whole.predict(picture).score, rel=0.1)
    with pytest.raises(kizu.OptionError, match="do not fit in `memory`"):
        kizu.PatchCore(size=64, sampler="identity").fit(images, memory=1_000_000)


@pytest.mark.parametrize(("asked", "amount"), [("2GB", 2 * 10**9), ("500 mb", 5 * 10**8), (10**9, 10**9)])
def test_amounts_of_memory(asked, amount):
    assert budget(asked) == amount
    assert budget() > 10**8
    for wrong in ("much", "2", "GB"):
        with pytest.raises(kizu.OptionError, match="`memory="):
            budget(wrong)


def test_the_allocator_is_set_only_in_a_process_that_allows_it(monkeypatch):
    settings = []
    monkeypatch.setattr(ram, "_allocate", lambda *sizes: settings.append(sizes))
    monkeypatch.setattr(ram, "_tuning_allowed", False)
    with ram.tidy():
        pass
    assert not settings
    ram.allow_tuning()
    with ram.tidy():
        assert len(settings) == 1
    assert len(settings) == 2


@pytest.mark.slow
def test_the_approximate_search_states_its_recall_and_keeps_the_verdicts(tmp_path):
    pytest.importorskip("faiss")
    settings = {**PAPER, "size": 320, "layers": ["blocks.2"], "sampler": "identity"}
    train, test = photographs(8, size=320), [*photographs(2, seed=9, size=320), np.zeros((320, 320, 3), np.uint8)]
    exact = kizu.PatchCore(**settings).fit(train)
    quick = kizu.PatchCore(**settings, search="ivfpq").fit(train)
    assert 0.5 < quick.facts["recall"][0] <= 1 and "recall" not in exact.facts
    again = kizu.load(quick.save(tmp_path / "model"))
    for picture in test:
        assert quick.predict(picture).score >= exact.predict(picture).score * 0.999  # another entry is never nearer
        assert quick.predict(picture).score == pytest.approx(exact.predict(picture).score, rel=0.05)
        assert again.predict(picture).score == pytest.approx(quick.predict(picture).score, rel=1e-6)
    with pytest.raises(kizu.OptionError, match='`search="exact"`'):
        kizu.PatchCore(size=64, search="ivfpq").fit(train[:3])


def test_an_update_learns_what_is_new_and_can_be_taken_back(tmp_path):
    old, new = [part(seed) for seed in range(12)], [255 - part(seed) for seed in range(12)]
    detector = kizu.PatchCore(size=64, coreset=0.1).fit(old)
    sizes = detector.facts["bank"]
    before = detector.predict(new[-1]).score
    detector.save(tmp_path / "model")
    detector.update(new[:-1])
    assert detector.predict(new[-1]).score < 0.6 * before
    assert [len(bank.entries) for bank in detector.graph.banks] == sizes
    assert detector.training["images"] == 23 and detector.threshold.count == 23
    detector.save(tmp_path / "model", keep_previous=True)
    assert kizu.load(tmp_path / "model").predict(new[-1]).score == detector.predict(new[-1]).score
    assert kizu.load(tmp_path / "model" / "previous").predict(new[-1]).score == before


def test_merged_shards_know_what_each_knows():
    parts = [[part(seed) for seed in range(8)], [255 - part(seed) for seed in range(8)]]
    models = [kizu.PatchCore(size=64, coreset=0.1).fit(images) for images in parts]
    merged = kizu.PatchCore.merge(models)
    assert merged.training["images"] == 16 and merged.threshold.count == 16
    for images, model, other in zip(parts, models, reversed(models), strict=True):
        assert merged.predict(images[0]).score < 0.6 * other.predict(images[0]).score
        assert merged.predict(images[0]).score < 1.3 * model.predict(images[0]).score
    twice = kizu.PatchCore.merge([models[0], kizu.PatchCore(size=64, coreset=0.1).fit([*parts[0][:3], *parts[1]])])
    assert twice.threshold.count == 16 and "3 photographs were learned from by several" in twice.remarks[0]
    with pytest.raises(kizu.ModelError, match="same settings"):
        kizu.PatchCore.merge([models[0], kizu.PatchCore(size=96, coreset=0.1).fit(parts[0])])


@pytest.mark.parametrize("thumbnails", [True, False])
def test_parts_that_several_merged_models_have_photographs_of_count_once(thumbnails, tmp_path):
    noise = np.random.default_rng(0)
    again = [np.clip(part(seed) + noise.normal(0, 2, part(seed).shape), 0, 255).astype(np.uint8) for seed in range(5)]
    shards = [[part(seed) for seed in range(8)], [*again, *(part(seed) for seed in range(8, 13))]]
    models = [
        kizu.load(kizu.PatchCore(size=64, coreset=0.1, thumbnails=thumbnails).fit(images).save(tmp_path / str(number)))
        for number, images in enumerate(shards)
    ]
    merged = kizu.PatchCore.merge(models)
    assert merged.threshold.count == (13 if thumbnails else 18)
    assert ("5 photographs show the same part" if thumbnails else "cannot be seen") in merged.remarks[0]


def test_an_ensemble_is_the_mean_of_its_members_in_units_of_good_images(tmp_path):
    train, test = photographs(10), photographs(3, seed=7)
    layers = ("blocks.2", "blocks.4")
    members = [kizu.PatchCore(size=64, coreset=0.1, layers=layer).fit(train) for layer in layers]
    both = kizu.PatchCore(
        size=64, coreset=0.1, backbone="efficientnet_lite2,efficientnet_lite2", layers="0.blocks.2,1.blocks.4"
    ).fit(train)
    for picture in test:
        parts = [
            (member.predict(picture).score - np.mean(member.calibration_scores)) / np.std(member.calibration_scores)
            for member in members
        ]
        assert both.predict(picture).score == pytest.approx(np.mean(parts), abs=1e-3)
    loaded = kizu.load(both.save(tmp_path / "model"))
    assert loaded.predict(test[0]).score == both.predict(test[0]).score
    with pytest.raises(kizu.ModelError, match="one backbone"):
        both.update(train)
    with pytest.raises(kizu.OptionError, match="starts with 0"):
        kizu.PatchCore(backbone="resnet18,resnet34", layers="layer1")


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


def test_torchvisions_weight_files_are_taken_too(tmp_path):
    network = torchvision.models.resnet18(weights=None).eval()
    torch.save(network.state_dict(), tmp_path / "resnet18.pth")
    tapped = backbone.create("resnet18", ("layer2",), str(tmp_path / "resnet18.pth"))
    pixels = torch.from_numpy(photographs(1)[0].transpose(2, 0, 1).copy())[None]
    feature = (pixels - tapped.mean) / tapped.std
    for part_of_it in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2"):
        feature = getattr(network, part_of_it)(feature)
    torch.testing.assert_close(tapped(pixels)[0], feature.detach(), rtol=1e-4, atol=1e-4)


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
    with pytest.raises(kizu.ModelError, match="`weights=FILE`"):
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
