"""Metrics against brute force."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from kizu.evaluation import metrics


def brute_force_au_pro(maps, masks, limit):
    """Every threshold, every region, by the definition."""
    regions = []
    for index, mask in enumerate(masks):
        labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
        regions += [(index, labels == label) for label in range(1, count + 1)]
    good = np.concatenate([values[~mask] for values, mask in zip(maps, masks, strict=True)])
    points = [(0.0, 0.0)]
    for level in np.unique(np.concatenate([values.ravel() for values in maps]))[::-1]:
        overlap = np.mean([(maps[index][region] >= level).mean() for index, region in regions])
        points.append((float((good >= level).mean()), float(overlap)))
    area = 0.0
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 >= limit:
            break
        if x1 > limit:
            y1 = y0 + (y1 - y0) * (limit - x0) / (x1 - x0)
            x1 = limit
        area += (x1 - x0) * (y0 + y1) / 2
    return area / limit


@st.composite
def scored_images(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count = draw(st.integers(1, 4))
    levels = draw(st.sampled_from([2, 3, 7, 1000]))  # few levels: many ties
    shapes = [tuple(rng.integers(2, 9, 2)) for _ in range(count)]
    maps = [rng.integers(0, levels, shape).astype(np.float32) / 7 for shape in shapes]
    masks = [rng.random(shape) < rng.choice([0.0, 0.1, 0.5]) for shape in shapes]
    masks[0][0, 0], masks[0][-1, -1] = True, False
    return maps, masks


@settings(max_examples=400, deadline=None)
@given(scored_images(), st.sampled_from([0.05, 0.3, 0.5, 1.0]))
def test_au_pro_equals_the_definition(images, limit):
    maps, masks = images
    assert metrics.au_pro(maps, masks, limit) == pytest.approx(brute_force_au_pro(maps, masks, limit), abs=1e-9)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 40), st.sampled_from([2, 5, 10_000]))
def test_ranking_equals_the_library_and_every_threshold(seed, count, levels):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, levels, count) / 3
    labels = rng.random(count) < 0.4
    labels[:2] = True, False
    auroc, average_precision, f1_max = metrics.ranking(scores, labels)
    assert auroc == pytest.approx(roc_auc_score(labels, scores))
    assert average_precision == pytest.approx(average_precision_score(labels, scores))
    assert f1_max == pytest.approx(max(f1_score(labels, scores >= level) for level in np.unique(scores)))


def test_presorted_shares_on_a_case_worked_by_hand():
    good, bad = np.arange(100.0), np.arange(50.0, 150.0)
    # 2 % quantile of bad: 51.98, below it lie 0…51; 98 % quantile of good: 97.02, above it lie 98…149
    assert metrics.presorted_good(good, bad) == 0.52
    assert metrics.presorted_bad(good, bad) == 0.52


@pytest.mark.parametrize(
    ("labels", "word"), [([], "no test images"), ([True, True], "no good"), ([False, False], "no defective")]
)
def test_a_missing_class_gives_a_reason_instead_of_a_number(labels, word):
    values, reasons = metrics.image_metrics([0.5] * len(labels), labels)
    assert set(values) == set(reasons) == set(metrics.IMAGE)
    assert not any(values.values()) and all(word in reason for reason in reasons.values())


def test_missing_masks_give_a_reason_instead_of_a_number():
    for masks in ([], [np.zeros((4, 4), bool)], [np.ones((4, 4), bool)]):
        values, reasons = metrics.pixel_metrics([np.zeros((4, 4), np.float32)] * len(masks), masks)
        assert set(values) == set(reasons) == set(metrics.PIXEL) and not any(values.values())
