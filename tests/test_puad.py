"""PUAD: the head's arithmetic against plain statements, the gate, what a prediction says, degenerate good images."""

import math

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from sklearn.covariance import LedoitWolf

import kizu
from kizu.detectors.puad.detector import joined
from kizu.detectors.puad.gaussian import Gaussian, cross_fitted, ledoit_wolf
from kizu.errors import OptionError
from teachers import tiny
from test_detectors import GOOD, part

SMALL = {"size": 64, "base_settings": {"coreset": 0.2}}


@pytest.fixture(scope="module")
def fitted():
    return kizu.PUAD(**SMALL).fit(GOOD)


@pytest.mark.parametrize(("count", "dimension"), [(200, 30), (20, 50), (2, 5), (1, 4)])
def test_the_shrunk_covariance_is_scikit_learns(count, dimension):
    rng = np.random.default_rng(count)
    features = rng.normal(size=(count, dimension)) @ rng.normal(size=(dimension, dimension)) + 5
    ours, share = ledoit_wolf(torch.from_numpy(features))
    if count == 1:  # scikit-learn takes one row for one feature's values
        assert not ours.any() and share == 0
        return
    theirs = LedoitWolf().fit(features)
    np.testing.assert_allclose(ours.numpy(), theirs.covariance_, rtol=1e-10, atol=1e-10)
    assert share == pytest.approx(theirs.shrinkage_, abs=1e-10)


def test_distances_are_mahalanobis_with_the_pseudo_inverse():
    features = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    features = torch.cat([features, torch.full((40, 2), 3.0)], dim=1)  # two that never vary
    head = Gaussian.fitted(features)
    inverse = np.linalg.pinv(LedoitWolf().fit(features.double().numpy()).covariance_)
    away = (features - features.mean(0)).double().numpy()
    np.testing.assert_allclose(head(features).numpy(), np.sqrt(np.einsum("ni,ij,nj->n", away, inverse, away)), 1e-6)


def test_cross_fitting_leaves_an_image_out_of_its_own_judgement():
    features = torch.randn(30, 4, generator=torch.Generator().manual_seed(1)).double()
    folds = list(torch.arange(30).split(7))
    crossed = cross_fitted(features, folds)
    others = torch.cat([features[:7], features[14:]])
    torch.testing.assert_close(crossed[7:14], Gaussian.fitted(others)(features[7:14]))
    assert cross_fitted(features[:1], [torch.tensor([0])]).isnan().all()


@pytest.mark.parametrize("with_validation", [True, False])
def test_exact_is_the_published_arithmetic(with_validation):
    settings = {**SMALL, "exact": True}
    held_out = [part(seed) for seed in range(40, 46)] if with_validation else []
    detector = kizu.PUAD(**settings).fit([part(seed) for seed in range(20)], held_out=held_out)
    check_exact(detector, [part(seed) for seed in range(20)], held_out)


def test_exact_over_efficientad_uses_its_student(tmp_path):
    teacher = tiny(tmp_path / "teacher-s.safetensors")
    held_out = [part(seed) for seed in range(40, 43)]
    for extractor in ("student", "teacher"):
        detector = kizu.PUAD(
            base="efficientad",
            base_settings={"teacher": str(teacher), "steps": 2},
            feature_extractor=extractor,
            exact=True,
        ).fit(GOOD[:6], held_out=held_out)
        graph = detector.graph
        pixels = torch.from_numpy(detector.preprocessing(GOOD[0]).transpose(2, 0, 1)[None].copy())
        with torch.inference_mode():
            teacher_out, student_out, _ = graph.base.outputs(pixels)
            seen = teacher_out if extractor == "teacher" else student_out[:, : teacher_out.shape[1]]
            torch.testing.assert_close(joined(graph.base.global_features(pixels, extractor)), seen.mean((2, 3)))
        check_exact(detector, GOOD[:6], held_out)


def check_exact(detector, good, held_out):
    """Scores of new images equal §2 of the paper in NumPy: fitted on training images, standardised on validation."""
    base = detector.graph.base

    def looked_at(pictures):
        with torch.inference_mode():  # in the batches that the detector learned in: rounding depends on it
            found = [
                base.forward_with_global_features(torch.from_numpy(pixels(pictures[n : n + 4])), detector.config.whole)
                for n in range(0, len(pictures), 4)
            ]
        features = torch.cat([joined(wholes) for _, _, wholes in found])
        return torch.cat([scores for scores, _, _ in found]).double().numpy(), features.double().numpy()

    def pixels(pictures):
        return np.stack([detector.preprocessing(picture).transpose(2, 0, 1) for picture in pictures])

    features = looked_at(good)[1]
    if held_out:
        structural, validation = looked_at(held_out)
    else:  # which were kept is in no file: those whose scores set the threshold are the base's, as if new
        order = np.random.default_rng([detector.config.seed, len(good)]).permutation(len(good))
        kept = sorted(order[: int(0.15 * len(good))])
        alone = kizu.PatchCore(detector.config.base_config).fit(good)
        structural, validation = np.array(alone.calibration_scores)[kept], features[kept]
        features = np.delete(features, kept, axis=0)
    mean, inverse = features.mean(0), np.linalg.pinv(LedoitWolf().fit(features).covariance_)

    def distance(rows):
        return np.sqrt(np.maximum(0, np.einsum("ni,ij,nj->n", rows - mean, inverse, rows - mean)))

    unpicturable = distance(validation)
    unseen = [part(90), part(91, spot=True)]
    new_structural, new = looked_at(unseen)
    expected = (new_structural - structural.mean()) / structural.std()
    expected += (distance(new) - unpicturable.mean()) / unpicturable.std()
    np.testing.assert_allclose(detector(pixels(unseen))[0], expected, rtol=1e-6)


def test_the_balance_goes_from_the_base_to_the_head():
    pictures = [part(seed, spot=seed % 2 == 0) for seed in range(60, 70)]
    base = kizu.PatchCore(size=64, coreset=0.2).fit(GOOD)
    only = kizu.PUAD(**SMALL, balance=0).fit(GOOD)
    head = kizu.PUAD(**SMALL, balance=1).fit(GOOD)
    ranked = np.argsort([base.predict(picture).score for picture in pictures])
    assert (ranked == np.argsort([only.predict(picture).score for picture in pictures])).all()
    logical = [head.predict(picture).parts["logical"] for picture in pictures]
    assert (np.argsort(logical) == np.argsort([head.predict(picture).score for picture in pictures])).all()


def test_behind_the_gate_the_head_is_heard_where_good_images_are_not(fitted):
    level = fitted.facts["logical level"]
    parts = torch.tensor([[0.0, level - 1], [0.0, level], [0.0, level + 1]], dtype=torch.float64)
    quiet, edge, loud = fitted.graph.combined(parts).tolist()
    assert edge - quiet == pytest.approx(0.1) and loud - edge == pytest.approx(1)
    always = kizu.PUAD(**SMALL, gate=False).fit(GOOD)
    prediction = always.predict(part(5))
    assert prediction.score == pytest.approx(prediction.parts["structural"] + prediction.parts["logical"], rel=1e-6)
    assert fitted.threshold.count == always.threshold.count == len(GOOD)  # each as if it were new


def test_map_score_and_feature_come_from_one_pass(fitted):
    passes = []
    hook = fitted.graph.base.backbone.register_forward_hook(lambda *_: passes.append(1))
    prediction = fitted.predict(part(3))
    hook.remove()
    assert len(passes) == 1
    alone = kizu.PatchCore(fitted.config.base_config).fit(GOOD).predict(part(3))
    np.testing.assert_array_equal(prediction.input_map, alone.input_map)


def test_a_prediction_says_what_kind_it_is_and_what_to_look_at(fitted, tmp_path):
    taller = np.roll(part(5), 30, axis=1)  # nothing that is not on good parts, in another place
    prediction = kizu.load(fitted.save(tmp_path / "model")).predict(taller)
    parts = prediction.parts
    assert parts["kind"] in ("structural", "logical")
    assert [near["distance"] for near in parts["nearest"]] == sorted(near["distance"] for near in parts["nearest"])
    assert {near["image"] for near in parts["nearest"]} <= set(fitted.training["names"])
    assert sum(group["share"] for group in parts["groups"]) == pytest.approx(1)
    assert {group["group"] for group in parts["groups"]} == set(fitted.graph.base.backbone.layers)
    itself = fitted.predict(GOOD[4])
    assert min(near["distance"] for near in itself.parts["nearest"]) < 0.05 < parts["nearest"][0]["distance"]


def test_over_simplenet_the_whole_is_the_mean_of_the_layers_that_it_sees(tmp_path):
    rounds = {"meta_epochs": 2, "sampled": 1, "gan_epochs": 1, "dsc_hidden": 32}
    detector = kizu.PUAD(size=64, base="simplenet", base_settings=rounds).fit(GOOD)
    picture = part(7, spot=True)
    alone = kizu.SimpleNet(detector.config.base_config).fit(GOOD)
    prediction = detector.predict(picture)
    np.testing.assert_allclose(prediction.input_map, alone.predict(picture).input_map, rtol=1e-5, atol=1e-6)
    pixels = torch.from_numpy(detector.preprocessing(picture).transpose(2, 0, 1)[None].copy())
    seen = [layer.mean((2, 3)) for layer in detector.graph.base.backbone(pixels)]
    distance = detector.graph.head(torch.cat(seen, 1))
    logical = (distance - detector.graph.mean[1]) / detector.graph.unit[1]
    assert prediction.parts["logical"] == pytest.approx(float(logical), rel=1e-5)
    assert kizu.load(detector.save(tmp_path / "model")).predict(picture).score == prediction.score


@pytest.mark.parametrize(("feature", "dimensions"), [("token", 2 * 64), ("both", 4 * 64), ("mean", 2 * 64)])
def test_with_a_transformer_the_whole_may_be_its_class_token(feature, dimensions, tmp_path):
    torch.manual_seed(0)
    network = timm.create_model("test_vit")
    save_file(network.state_dict(), tmp_path / "vit.safetensors")
    base = {"coreset": 0.2, "backbone": "test_vit", "layers": ["1", "3"], "weights": str(tmp_path / "vit.safetensors")}
    detector = kizu.PUAD(size=160, feature=feature, base_settings=base).fit(GOOD)
    assert len(detector.graph.head.mean) == dimensions
    if feature == "token":
        pixels = torch.from_numpy(np.stack([detector.preprocessing(picture) for picture in GOOD[:2]]))
        normal = (pixels.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
        tokens = []
        with torch.inference_mode():
            network.eval()
            x = network._pos_embed(network.patch_embed(normal))
            for number, block in enumerate(network.blocks[:4]):
                x = block(x)
                tokens += [x[:, 0]] if number in (1, 3) else []
            ours = torch.cat(list(detector.graph.base.global_features(pixels.permute(0, 3, 1, 2), "token").values()), 1)
        torch.testing.assert_close(ours, torch.cat(tokens, 1), rtol=1e-3, atol=1e-4)
    loaded = kizu.load(detector.save(tmp_path / "model"))
    assert loaded.predict(part(5)).parts == detector.predict(part(5)).parts


@pytest.mark.parametrize("pictures", [[GOOD[0]], [GOOD[0]] * 5, GOOD[:2], [np.full((96, 96, 3), 80, np.uint8)] * 3])
@pytest.mark.parametrize("exact", [False, True])
def test_too_little_to_learn_from_gives_defined_results_and_a_sentence(pictures, exact):
    detector = kizu.PUAD(**SMALL, exact=exact).fit(pictures)
    prediction = detector.predict(part(9, spot=True))
    assert math.isfinite(prediction.score) and np.isfinite(prediction.anomaly_map).all()
    assert all(math.isfinite(prediction.parts[name]) for name in ("structural", "logical"))
    assert any("good images" in remark for remark in detector.remarks)


def test_base_settings_are_checked_as_the_bases_own():
    config = kizu.PUAD(base_settings="coreset=0.5,layers=blocks.2,blocks.3,size=128").config
    assert config.size == (128, 128) and config.base_config.coreset == 0.5
    assert config.base_config.layers == ("blocks.2", "blocks.3")
    assert kizu.PUAD(base="efficientad").config.size == (320, 320)
    assert kizu.PUAD(base="efficientad", base_settings="network=s").config.size == (256, 256)
    assert kizu.PUAD(base_settings='{"top": 0}').config.base_config.top == 0
    for settings, words in (
        ({"base_settings": "coreset=2"}, '`coreset="2"`'),
        ({"base_settings": "colour=2"}, "`colour` is not a setting of PatchCore"),
        ({"base_settings": "fast"}, '`base_settings="fast"`'),
        ({"base": "efficientad", "base_settings": "network=m", "size": 64}, "`size=64`"),
        ({"base": "yolo"}, '`base="yolo"`'),
        ({"exact": True, "balance": 0.2}, "`exact=True`"),
    ):
        with pytest.raises(OptionError, match=words):
            kizu.PUAD(**settings)
    with pytest.raises(OptionError, match='`feature="token"`'):
        kizu.PUAD(**SMALL, feature="token").fit(GOOD[:3])
