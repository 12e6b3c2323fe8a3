from kizu_mean_image import MeanImage

from kizu.testing import check_detector


def test_mean_image_is_a_detector():
    check_detector(MeanImage, size=64)
