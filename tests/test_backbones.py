"""Backbones from files, and the image size to evaluate them at."""

import pytest

from backbones import choose_sizes
from launch import UserError


@pytest.mark.parametrize(
    ("crops", "options", "side", "expected"),
    [
        ([16, 9], {}, 16, (16, 16)),  # images no larger than the crops: not cropped
        ([16, 9], {}, 24, (16, 18)),  # larger images: their centre, 7/8 of a side, as published
        ([48], {}, 64, (64, 64)),  # not much larger: their own size
        ([48], {}, 68, (48, 55)),
        ([96], {}, 128, (128, 128)),
        ([192], {}, 256, (192, 219)),  # large ones as published
        ([224, 96], {}, 256, (224, 256)),
        (None, {}, 24, (224, 224)),
        (None, {}, 256, (224, 256)),
        (None, {"size": 20}, 24, (20, 23)),
        ([16, 9], {"is_folder": False}, 28, (28, 28)),
        ([32], {"is_folder": False}, 28, (32, 32)),
        (None, {"is_folder": False}, 28, (28, 28)),
        ([32], {"is_folder": False, "size": 28, "resize": 40}, 28, (28, 40)),
    ],
)
def test_small_images_keep_their_border_and_the_size_of_training(crops, options, side, expected):
    trained = {"size_crops": crops} if crops else {}
    assert choose_sizes(trained, side, **{"is_folder": True, **options}) == expected


def test_images_are_not_resized_below_the_size_of_their_crop():
    with pytest.raises(UserError, match="--resize: expected at least the 64 pixels of --size, got 32"):
        choose_sizes({}, 64, is_folder=True, size=64, resize=32)
