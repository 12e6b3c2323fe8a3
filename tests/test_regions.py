"""Marked regions: what is marked, where, how large; contours that can be filled again."""

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy import ndimage

from kizu.data.geometry.outlines import contour
from kizu.inference.regions import Marking, find_regions


def test_regions_say_where_how_large_and_how_unusual():
    values = np.zeros((40, 60), np.float32)
    values[5:9, 10:13] = 2.0
    values[6, 11] = 3.0
    values[9, 13] = 2.5  # touches at a corner
    values[30:34, 50:58] = 4.0
    first, second = find_regions(values, Marking(1.0, [0.5, 3.5, 1.0]))
    assert (first.box, first.area, first.peak) == ((50, 30, 8, 4), 32, 4.0)
    assert first.contour == [(50, 30), (58, 30), (58, 34), (50, 34)]
    assert (second.box, second.area, second.place) == ((10, 5, 4, 5), 13, (11, 6))
    assert (first.p_value, second.p_value) == (1 / 4, 2 / 4)
    assert find_regions(values, Marking(4.0, [])) == []


@pytest.mark.parametrize("seed", range(20))
def test_a_contour_filled_again_is_the_region_without_its_holes(seed):
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(50, 70)), 1.5)
    for found in find_regions(noise.astype(np.float32), Marking(0.15, [])):
        left, top, width, height = found.box
        labels, _ = ndimage.label(noise.astype(np.float32) > 0.15, np.ones((3, 3)))
        x, y = found.place
        region = labels[top : top + height, left : left + width] == labels[y, x]
        whole = ndimage.binary_fill_holes(region)  # of 4-connected background, as the border runs
        exact = contour(region, 0)
        canvas = Image.new("1", (8 * width, 8 * height))
        ImageDraw.Draw(canvas).polygon([(8 * a, 8 * b) for a, b in exact], fill=1)
        again = np.asarray(canvas)[4::8, 4::8]
        np.testing.assert_array_equal(again, whole)
        assert len(contour(region)) <= len(exact)


@pytest.mark.parametrize("density", [0, 0.1, 0.4, 0.6, 1])
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (24, 37)])
def test_regions_are_those_of_an_independent_labelling(shape, density):
    values = np.random.default_rng(5).random(shape).astype(np.float32)
    labels, count = ndimage.label(values > 1 - density, np.ones((3, 3)))
    boxes = [(x.start, y.start, x.stop - x.start, y.stop - y.start) for y, x in ndimage.find_objects(labels)]
    areas = ndimage.sum_labels(values > 1 - density, labels, range(1, count + 1)).astype(int).tolist()
    found = find_regions(values, Marking(1 - density, []))
    assert sorted((region.box, region.area) for region in found) == sorted(zip(boxes, areas, strict=True))
