"""Varied photographs, held against torchvision and against what one sees."""

import numpy as np
import pytest
import torch
from torchvision.transforms import functional as reference

import kizu
from kizu.config import Config
from kizu.detectors.augmentation import Augmentation
from test_detectors import GOOD, SETTINGS, part


def photograph(height=60, width=80):
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 3, height, width), dtype=np.uint8))


@pytest.mark.parametrize(
    ("strength", "function", "place"),
    [
        ("brightness", reference.adjust_brightness, 0),
        ("contrast", reference.adjust_contrast, 1),
        ("saturation", reference.adjust_saturation, 2),
    ],
)
def test_colours_change_as_torchvision_would(strength, function, place):
    image, seed = photograph(), (3, 1, 4)
    ours, _ = Augmentation(**{strength: 0.8})(image, [seed])
    factor = 1 + 0.8 * np.random.default_rng(seed).uniform(-1, 1, 10)[place]
    theirs = function(image, factor)
    assert not torch.equal(ours, image)
    assert (ours.float() - theirs.float()).abs().max() <= 2


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"hflip": 1}, lambda image: image.flip(3)),
        ({"vflip": 1}, lambda image: image.flip(2)),
        ({"gray": 1}, lambda image: reference.rgb_to_grayscale(image, 3)),
    ],
)
def test_flips_and_grey_are_exact(settings, expected):
    image = photograph()
    ours, _ = Augmentation(**settings)(image, [(0,)])
    assert (ours.float() - expected(image).float()).abs().max() <= 1


@pytest.mark.parametrize("settings", [{"rotate_degrees": 40}, {"translate": 0.2}, {"scale": 0.2}])
def test_turns_shifts_and_scales_move_a_spot_and_its_mask_alike_and_keep_shapes(settings):
    image = torch.full((1, 3, 60, 90), 20, dtype=torch.uint8)
    image[..., 16:23, 60:67] = 250
    mask = image[:, 0] > 100
    centre = np.array([19.0, 63.0]) - [29.5, 44.5]
    distances = []
    for seed in range(20):
        varied, moved = Augmentation(**settings)(image, [(seed,)], mask)
        bright = varied[0, 0] > 135
        assert (bright ^ moved[0]).sum() <= 0.4 * moved.sum()
        where = torch.nonzero(moved[0]).double().mean(0).numpy() - [29.5, 44.5]
        distances.append(np.linalg.norm(where) / np.linalg.norm(centre))
        if "translate" not in settings:  # a circle stays round although the image is not square
            assert abs(moved.sum().item() / 49 - distances[-1] ** 2) < 0.35
    if "rotate_degrees" in settings:
        np.testing.assert_allclose(distances, 1, atol=0.03)
    else:
        assert np.std(distances) > 0.02


def test_the_seed_alone_decides_whatever_else_is_in_the_batch():
    images = photograph().repeat(3, 1, 1, 1)
    varied, _ = Augmentation.of(Config(augment=True))(images, [(1, 0), (1, 1), (1, 0)])
    assert torch.equal(varied[0], varied[2]) and not torch.equal(varied[0], varied[1])
    assert Augmentation.of(Config()) is None


@pytest.mark.parametrize("method", ["patchcore", pytest.param("simplenet", marks=pytest.mark.slow)])
def test_a_part_that_may_be_turned_is_no_defect(method):
    plain = {**SETTINGS[method], "smoothing": 0}
    lopsided = [np.where(np.arange(96)[None, :, None] < 48, picture, picture // 2) for picture in GOOD]
    turned = np.ascontiguousarray(np.where(np.arange(96)[None, :, None] < 48, part(50), part(50) // 2)[:, ::-1])
    rigid = kizu.detectors.detector_class(method)(**plain).fit(lopsided)
    tolerant = kizu.detectors.detector_class(method)(**plain, hflip=0.5).fit(lopsided)
    straight = np.where(np.arange(96)[None, :, None] < 48, part(51), part(51) // 2)
    gaps = [model.predict(turned).score - model.predict(straight).score for model in (rigid, tolerant)]
    assert gaps[1] < 0.5 * gaps[0]
