"""Patch features, maps, neighbours and coresets against slow, separate statements of what they are."""

from contextlib import nullcontext
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from timm.layers import Conv2dSame
from torch import nn
from torch.nn import functional as F

from kizu.detectors.patchcore import coreset
from kizu.detectors.patchcore.feature_table import FeatureTable
from kizu.detectors.patchcore.nearest import CellIndex, nearest, sort_into_cells
from kizu.errors import OptionError
from kizu.features import backbone, matmul
from kizu.features.anomaly_map import MapUpsampling
from kizu.features.matmul import padded, similarities
from kizu.features.patch_features import PatchFeatures


def adaptive_mean(row, bins):
    """Bin i averages inputs floor(i·L/n) … ceil((i+1)·L/n) − 1."""
    length = len(row)
    return np.array([row[i * length // bins : -(-(i + 1) * length // bins)].mean() for i in range(bins)])


def reference_features(maps, patchsize, pretrain, target):
    """The reference's order: unfold, align each of the C·p·p planes, pool channels, pool layers. (rows, target)."""
    padding = (patchsize - 1) // 2
    layers = []
    for layer in maps:  # (C, H, W)
        channels, height, width = layer.shape
        padded = np.pad(layer, ((0, 0), (padding, padding), (padding, padding)))
        rows, columns = height + 2 * padding - patchsize + 1, width + 2 * padding - patchsize + 1
        planes = np.empty((channels, patchsize, patchsize, rows, columns))
        for i in range(patchsize):
            for j in range(patchsize):
                planes[:, i, j] = padded[:, i : i + rows, j : j + columns]
        layers.append(planes.reshape(-1, rows, columns))
    grid = layers[0].shape[1:]
    pooled = []
    for planes in layers:
        aligned = F.interpolate(torch.from_numpy(planes)[None], size=grid, mode="bilinear", align_corners=False)[0]
        rows = aligned.flatten(1).T.numpy()  # (h · w, C · p · p)
        pooled.append(np.stack([adaptive_mean(row, pretrain) for row in rows]))
    stacked = np.concatenate(pooled, axis=1)
    return np.stack([adaptive_mean(row, target) for row in stacked])


@pytest.mark.parametrize("patchsize", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(("pretrain", "target"), [(8, 8), (12, 24), (7, 5), (32, 20)])
def test_patch_features_are_the_references(patchsize, pretrain, target):
    rng = np.random.default_rng(patchsize * 100 + pretrain)
    maps = [rng.normal(size=(8, 10, 7)), rng.normal(size=(12, 5, 6))]
    expected = reference_features(maps, patchsize, pretrain, target)
    ours = PatchFeatures(patchsize, pretrain, target)([torch.from_numpy(m)[None] for m in maps])
    assert ours.shape[1] == target
    np.testing.assert_allclose(ours[0].flatten(1).T.numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("kernel", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("side", [(16, 16), (17, 20), (9, 31)])
def test_a_convolution_pads_in_its_kernel_what_tensorflow_pads_around_the_image(kernel, stride, side):
    torch.manual_seed(kernel)
    convolution = Conv2dSame(4, 4, kernel, stride, groups=4).requires_grad_(False)
    values = torch.randn(2, 4, *side)
    torch.testing.assert_close(backbone.SamePadded(convolution)(values), convolution(values))


@pytest.mark.parametrize(("padding", "groups"), [(0, 1), (0, 2), (1, 1)])
def test_a_pointwise_convolution_is_the_one_it_stands_for(padding, groups):
    convolution = nn.Conv2d(4, 6, 1, padding=padding, groups=groups).requires_grad_(False)
    values = torch.randn(2, 4, 9, 7)
    torch.testing.assert_close(backbone.Pointwise(convolution)(values), convolution(values))


@pytest.mark.parametrize(
    "grids", [[(8, 6), (4, 3)], [(9, 9), (5, 5), (1, 1)], [(6, 6), (6, 6), (2, 4)], [(4, 4), (8, 8)]]
)
@pytest.mark.parametrize("target", [None, 12])
def test_rows_kept_layer_by_layer_are_the_aligned_features(grids, target):
    torch.manual_seed(0)
    maps = [torch.randn(5, 6, *grid) for grid in grids]
    patches = PatchFeatures(3, None if target is None else 6, target)
    aligned = patches(maps).permute(0, 2, 3, 1).flatten(0, 2)
    pooled = patches.pooled(maps)
    rows = FeatureTable(5, [part.shape[1:] for part in pooled])
    rows.write(0, [part[:2] for part in pooled])
    rows.write(2, [part[2:] for part in pooled])
    assert (len(rows), rows.dimension) == aligned.shape
    indices = torch.randperm(len(rows))[:20]
    torch.testing.assert_close(rows.take(indices), aligned[indices])
    torch.testing.assert_close(rows.span(7, 31), aligned[7:31])
    picks = [coreset.select(table, 9).indices for table in (rows, rows.span(0, len(rows)))]
    assert torch.equal(*picks)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(1, 700), st.booleans())
def test_products_say_what_is_nearest_whatever_the_shapes_with_and_without_onednn(count, others, has_onednn):
    random = torch.Generator().manual_seed(count * others)
    rows, columns = torch.randn(count, 20, generator=random), torch.randn(others, 20, generator=random)
    with nullcontext() if has_onednn else mock.patch.object(matmul, "onednn_linear", return_value=None):
        products = similarities(rows, columns, columns.square().sum(1) / 2)
    expected = rows.double() @ columns.double().T - columns.double().square().sum(1) / 2
    torch.testing.assert_close(products.double(), expected, rtol=1e-4, atol=1e-4)
    assert padded(count) >= count


def test_this_torch_has_the_private_product_wherever_it_has_onednn():
    assert (matmul.onednn_linear() is not None) == torch.backends.mkldnn.is_available()


@pytest.mark.parametrize(
    "operations",
    [
        {},
        {"_linear_pointwise": lambda rows, others: rows @ others.T},
        {"_linear_pointwise": lambda rows, others, bias, *_: rows @ others.T - bias},
    ],
    ids=["gone", "other arguments", "another product"],
)
def test_a_private_product_that_is_gone_or_changed_is_left_alone(monkeypatch, operations):
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(**operations))
    assert matmul.onednn_linear.__wrapped__() is None


def test_without_dimensions_each_channel_is_averaged_over_its_neighbourhood():
    rng = np.random.default_rng(0)
    layer = rng.normal(size=(6, 9, 8))
    expected = np.stack([ndimage.uniform_filter(plane, 3, mode="constant") for plane in layer])
    ours = PatchFeatures(3)([torch.from_numpy(layer)[None]])[0]
    np.testing.assert_allclose(ours.numpy(), expected, atol=1e-12)


@pytest.mark.parametrize(
    ("grid", "size", "sigma"), [((8, 8), (64, 64), 4.0), ((5, 9), (40, 96), 2.5), ((4, 4), (32, 32), 0)]
)
def test_maps_are_upsampled_and_smoothed_as_scipy_would(grid, size, sigma):
    scores = torch.from_numpy(np.random.default_rng(1).random((3, *grid), dtype=np.float32))
    plain = F.interpolate(scores[:, None].double(), size=size, mode="bilinear", align_corners=False)[:, 0].numpy()
    expected = np.stack([ndimage.gaussian_filter(one, sigma, mode="reflect", truncate=4) for one in plain])
    ours = MapUpsampling(grid, size, sigma)(scores)
    assert ours.shape == (3, 1, *size)
    np.testing.assert_allclose(ours[:, 0].numpy(), expected, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 30), st.integers(1, 5))
def test_nearest_neighbours_are_exact(seed, queries, entries, count):
    rng = np.random.default_rng(seed)
    q = rng.normal(100, 1, size=(queries, 6)).astype(np.float32)  # far from the origin: cancellation shows
    b = rng.normal(100, 1, size=(entries, 6)).astype(np.float32)
    distances, indices = nearest(torch.from_numpy(q), torch.from_numpy(b), count)
    table = np.linalg.norm(q[:, None].astype(float) - b[None], axis=2)
    rounding = rounding_of(b)
    best = np.square(np.sort(table, axis=1)[:, :count])
    np.testing.assert_allclose(np.square(distances.numpy().astype(float)), best, rtol=1e-5, atol=rounding)
    np.testing.assert_allclose(np.take_along_axis(table, indices.numpy(), 1), distances.numpy(), rtol=1e-5)


def rounding_of(bank):
    """Of squared distances, where what is nearest is found by a product of single precision."""
    return 4 * np.finfo(np.float32).eps * float(np.square(bank.astype(float)).sum(1).max())


def test_an_image_can_be_left_out_of_the_bank():
    rng = np.random.default_rng(3)
    bank = torch.from_numpy(rng.normal(size=(30, 4)).astype(np.float32))
    images = torch.arange(30) // 10
    distances, indices = nearest(bank, bank, 2, image_ids=(images, images))
    assert (images[indices] != images[:, None]).all() and (distances > 0).all()
    nothing, _ = nearest(bank, bank, 1, image_ids=(torch.zeros(30), torch.zeros(30)))
    assert nothing.isinf().all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 40, 2000]), st.sampled_from([2, 30]), st.booleans())
def test_search_by_cells_finds_what_a_comparison_with_every_entry_finds(seed, entries, dimension, left_out):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(6, dimension)) * 5 + 20
    bank = (centres[rng.integers(0, 6, entries)] + rng.normal(size=(entries, dimension))).astype(np.float32)
    queries = np.concatenate([bank[:20], rng.normal(size=(50, dimension)) * 9 + 20]).astype(np.float32)
    images = torch.from_numpy(rng.integers(0, 3, entries))
    own = torch.from_numpy(rng.integers(0, 3, len(queries))) if left_out else None
    order, centres, sizes = sort_into_cells(torch.from_numpy(bank))
    rows = torch.from_numpy(bank)[order]
    bank = rows.numpy()
    distances, indices = CellIndex(rows, images, centres, sizes).nearest(torch.from_numpy(queries), own)
    table = np.linalg.norm(queries[:, None].astype(float) - bank[None], axis=2)
    if own is not None:
        table[(own[:, None] == images).numpy()] = np.inf
    np.testing.assert_allclose(distances.numpy() ** 2, table.min(1) ** 2, rtol=1e-4, atol=rounding_of(bank))
    at = np.take_along_axis(table, indices.numpy()[:, None], 1)[:, 0]
    np.testing.assert_allclose(at, distances.numpy(), rtol=1e-4, atol=1e-4)
    count = min(9, entries)
    several, _ = CellIndex(rows, images, centres, sizes).several(torch.from_numpy(queries), count, own)
    np.testing.assert_allclose(several.numpy(), np.sort(table, axis=1)[:, :count], rtol=1e-4, atol=1e-4)


def assert_greedy(points, start, picks, radius):
    """Each pick is the farthest row at its time, up to the rounding of single precision."""
    distances = start.astype(float)
    for pick in picks:
        assert distances[pick] >= distances.max() - 1e-3
        distances = np.minimum(distances, np.linalg.norm(points - points[pick], axis=1))
    assert radius == pytest.approx(distances.max(), abs=1e-3)
    assert len(set(picks)) == len(picks)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([50, 700, 2500]), st.sampled_from([0.01, 0.1, 0.5, 1.0]))
def test_k_center_makes_the_greedy_picks(seed, total, share):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(5, 12)) * 4
    points = (centres[rng.integers(0, 5, total)] + rng.normal(size=(total, 12))).astype(np.float32)
    count = max(1, int(total * share))
    first = int(np.linalg.norm(points - points.mean(0), axis=1).argmax())
    start = np.linalg.norm(points - points[first], axis=1)
    chosen = coreset.select(torch.from_numpy(points), count)
    assert chosen.indices[0] == first and len(chosen.indices) == count
    assert_greedy(points, start, chosen.indices.tolist()[1:], chosen.radius)


def test_greedy_coreset_starts_from_the_row_norms_of_the_distance_matrix():
    points = np.random.default_rng(4).normal(size=(300, 128)).astype(np.float32)  # 128 wide: no projection
    table = np.linalg.norm(points[:, None].astype(float) - points[None], axis=2)
    chosen = coreset.select(torch.from_numpy(points), 40, "greedy_coreset")
    assert_greedy(points, np.linalg.norm(table, axis=1), chosen.indices.tolist(), chosen.radius)


def test_approx_greedy_coreset_starts_from_the_mean_distance_to_ten_rows():
    points = np.random.default_rng(5).normal(size=(300, 128)).astype(np.float32)
    starts = torch.randperm(300, generator=torch.Generator().manual_seed(7))[:10].numpy()
    mean = np.linalg.norm(points[:, None].astype(float) - points[starts][None], axis=2).mean(1)
    chosen = coreset.select(torch.from_numpy(points), 40, "approx_greedy_coreset", seed=7)
    assert_greedy(points, mean, chosen.indices.tolist(), chosen.radius)


@pytest.mark.parametrize("sampler", ["k_center", "greedy_coreset", "approx_greedy_coreset", "random", "identity"])
def test_samplers_keep_different_rows_and_say_how_well_they_cover(sampler):
    points = torch.from_numpy(np.random.default_rng(6).normal(size=(500, 20)).astype(np.float32))
    count = 500 if sampler == "identity" else 60
    chosen = coreset.select(points, count, sampler, seed=1)
    assert len(set(chosen.indices.tolist())) == count
    assert torch.equal(chosen.indices, coreset.select(points, count, sampler, seed=1).indices)
    if sampler in ("k_center", "random", "identity"):  # the others measure in their random projection
        actual = nearest(points, points[chosen.indices])[0].max()
        assert chosen.radius == pytest.approx(float(actual), abs=1e-2)


def test_identical_rows_are_selected_without_end_or_repetition():
    chosen = coreset.select(torch.ones(600, 8), 550)
    assert len(set(chosen.indices.tolist())) == 550 and chosen.radius == 0


def test_a_count_that_cannot_be_is_refused():
    with pytest.raises(OptionError, match="7 of 5"):
        coreset.select(torch.zeros(5, 2), 7)
