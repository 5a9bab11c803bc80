"""data.py: multi-crop against torchvision and its stated distributions, transforms, batches and loaders."""

import gc
import math
import os
import platform
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import DEVICES
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as F

import data
from data import (
    BLENDS,
    LEFT_OUT,
    PARAMS,
    CentreCrop,
    MultiCrop,
    ProbeCrop,
    SeededImages,
    ShuffledBatches,
    UnreadableImage,
    augment,
    augment_one_by_one,
    blend_slot,
    by_name,
    crop_and_resize,
    crops_to_device,
    normalize,
    ordered_loader,
    readable_image,
    sample_params,
    start_epoch,
    to_pixels,
    to_uint8,
    training_loader,
)
from images import ImageArrays

ROOT = Path(__file__).parent.parent
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.228, 0.224, 0.225]).view(3, 1, 1)
TWO_SIZES = ([24, 16], [2, 3], [0.3, 0.1], [1.0, 0.3])


def noise(width=60, height=47, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def numbered_images(count):
    """Images whose labels are their indices."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, 40, 40, 3), dtype=np.uint8)
    return ImageArrays(pixels, np.arange(count))


def equal(crops, others):
    return len(crops) == len(others) and all(torch.equal(a, b) for a, b in zip(crops, others, strict=True))


# Multi-crop


def test_crops_have_the_given_sizes_in_order():
    crops = MultiCrop(*TWO_SIZES)(noise())
    assert [tuple(crop.shape) for crop in crops] == [(3, 24, 24)] * 2 + [(3, 16, 16)] * 3
    assert all(crop.dtype == torch.float32 and crop.is_contiguous() and not crop.is_inference() for crop in crops)


def test_crops_are_normalised_with_the_published_constants():
    black = Image.new("RGB", (60, 40))  # no operation changes it
    for seed in range(5):
        for crop in MultiCrop(*TWO_SIZES)(black, np.random.default_rng(seed)):
            torch.testing.assert_close(crop, (-MEAN / STD).expand_as(crop))


# Augmentation, in both forms


def augment_batch(pixels, params, device="cpu"):
    return augment(pixels.to(device), torch.from_numpy(params).to(device)).cpu()


def augment_each(pixels, params):
    return torch.from_numpy(augment_one_by_one(pixels, params))


FORMS = {"one by one": augment_each, "batch": augment_batch}
PICTURES = {
    "noise": np.random.default_rng(0).integers(0, 256, (3, 24, 24)),
    "grey": np.random.default_rng(1).integers(0, 256, (1, 24, 24)).repeat(3, axis=0),
    "pure colours": np.random.default_rng(2).integers(0, 2, (3, 24, 24)) * 255,
    "ramps": np.stack([*np.meshgrid(np.arange(24), np.arange(24)), np.full((24, 24), 13)]) * 10,
}


def params_of(flip=False, jitter=(), grey=False, sigma=0.0):
    """Parameters [PARAMS] of these operations; jitter: (name, factor) in the order of the operations."""
    order = [name for name, _ in jitter] + ["hue"]
    params = np.zeros(PARAMS, np.float32)
    named = by_name(params)  # views: values written to them end up in params
    named.hflip[...], named.grey[...], named.sigma[...] = flip, grey, sigma
    for name, factor in jitter:
        if name == "hue":
            named.hue[...] = factor
        else:
            named.blends[blend_slot(name, order)] = 1 - factor, name == "saturation", name == "contrast"
    return params


def operations_of(params):
    """The inverse of `params_of`. Operations that do nothing are left out."""
    named, jitter = by_name(params), []
    for slot, (weight, of_luminance, of_mean) in enumerate(named.blends):
        if slot == BLENDS // 2 and named.hue:
            jitter.append(("hue", float(named.hue)))
        if weight:
            name = "saturation" if of_luminance else "contrast" if of_mean else "brightness"
            jitter.append((name, float(1 - weight)))
    return dict(flip=bool(named.hflip), jitter=tuple(jitter), grey=bool(named.grey), sigma=float(named.sigma))


def torchvision_augment(image, flip=False, jitter=(), grey=False, sigma=0.0, kernel=33):
    """Apply the same operations with torchvision to a float tensor or a PIL image, and normalise."""
    adjust = {
        "brightness": F.adjust_brightness,
        "contrast": F.adjust_contrast,
        "saturation": F.adjust_saturation,
        "hue": F.adjust_hue,
    }
    image = F.horizontal_flip(image) if flip else image
    for name, factor in jitter:
        image = adjust[name](image, factor)
    image = F.rgb_to_grayscale(image, num_output_channels=3) if grey else image
    pixels = F.to_dtype(F.to_image(image), torch.float32, scale=True).as_subclass(torch.Tensor)
    pixels = F.gaussian_blur(pixels, [kernel, kernel], [sigma, sigma]) if sigma else pixels
    return (pixels - MEAN) / STD


JITTER = (("hue", -0.2), ("contrast", 1.8), ("brightness", 0.4), ("saturation", 1.7))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("picture", PICTURES)
@pytest.mark.parametrize(
    "operations",
    [
        {},
        dict(flip=True),
        *(dict(jitter=((name, factor),)) for name in ("brightness", "contrast", "saturation") for factor in (0.2, 1.8)),
        *(dict(jitter=(("hue", turns),)) for turns in (-0.2, -0.03, 0.1, 0.2)),
        dict(jitter=JITTER),
        dict(jitter=JITTER[::-1]),
        dict(grey=True),
        *(dict(sigma=sigma) for sigma in (0.1, 0.3, 0.75, 1.3, 2.0)),
        dict(flip=True, jitter=JITTER, grey=True, sigma=1.9),
    ],
    ids=str,
)
def test_each_operation_equals_torchvisions(operations, picture, form):
    pixels = torch.from_numpy(PICTURES[picture].astype(np.uint8))
    ours = FORMS[form](pixels[None], params_of(**operations)[None])[0]
    error = ((ours - torchvision_augment(pixels / 255, **operations)) * STD * 255).abs()
    assert error.max() < 1 and error.mean() < 0.2
    if not operations.get("sigma"):  # a blur stops at 3 sigma, torchvision's weights of grey differ by 0.0001
        assert error.max() < 0.12


@pytest.mark.parametrize("size", [7, 24, 70, 200])
@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
def test_both_blurs_equal_torchvisions_with_the_same_kernel_size(size, sigma):
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 3, size, size), dtype=np.uint8))
    expected = torchvision_augment(pixels[0] / 255, sigma=sigma, kernel=2 * math.ceil(3 * sigma) + 1)
    for form in FORMS.values():
        torch.testing.assert_close(form(pixels, params_of(sigma=sigma)[None])[0], expected, rtol=0, atol=2e-5)


def random_crops(count, size, seed=0):
    """Crops uint8 [count, 3, size, size] of slopes and noise, and parameters as MultiCrop samples them."""
    rng = np.random.default_rng(seed)
    slopes = rng.uniform(-3, 3, (2, count, 3, 1, 1)) * np.stack(np.meshgrid(*2 * [np.arange(size)]))[:, None, None]
    pixels = rng.uniform(40, 215, (count, 3, 1, 1)) + slopes.sum(0) + rng.normal(0, 8, (count, 3, size, size))
    params = sample_params(rng.random((count, 10)), blur_sigma=2.0, hflip=0.5, color_strength=1.0, grayscale=0.2)
    return torch.from_numpy(pixels.clip(0, 255).astype(np.uint8)), params


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [7, 24, 65, 224])
def test_batches_augmented_on_the_device_equal_crops_augmented_in_workers(size, device):
    pixels, params = random_crops(40, size)
    before = pixels.clone()
    batch = augment_batch(pixels, params, device)
    torch.testing.assert_close(batch, augment_each(pixels, params), rtol=0, atol=2e-4)
    assert batch.is_contiguous() and torch.equal(pixels, before)


def test_sampled_crops_equal_torchvisions_and_are_close_to_those_of_8_bit_images():
    pixels, params = random_crops(200, 32)
    rounded = []
    for ours, crop, params_of_crop in zip(augment_each(pixels, params), pixels, params, strict=True):
        operations = operations_of(params_of_crop)
        kernel = 2 * math.ceil(3 * operations["sigma"]) + 1
        assert all(map(np.allclose, by_name(params_of(**operations))[:4], by_name(params_of_crop)[:4]))
        error = ((ours - torchvision_augment(crop / 255, **operations, kernel=kernel)) * STD * 255).abs()
        assert error.max() < 0.3, operations
        image = Image.fromarray(crop.permute(1, 2, 0).numpy())
        rounded.append(((ours - torchvision_augment(image, **operations, kernel=kernel)) * STD * 255).abs())
    # The published program rounds to 8 bits after each operation, and its hue has only 256 values.
    assert torch.stack(rounded).mean() < 1.5 and torch.stack(rounded).quantile(0.99) < 12


def test_a_batch_is_augmented_without_reading_its_values():
    pixels, params = random_crops(5, 24)
    out = augment(pixels.to("meta"), torch.from_numpy(params).to("meta"))  # meta tensors have none: reading raises
    assert out.shape == pixels.shape and out.dtype == torch.float32


def test_augment_compiles_into_one_graph():
    pixels, params = random_crops(5, 70)
    compiled = torch.compile(augment, fullgraph=True, dynamic=False, backend="aot_eager")
    expected = augment(pixels, torch.from_numpy(params))
    torch.testing.assert_close(compiled(pixels, torch.from_numpy(params)), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size, box", [(24, (3, 5, 31, 40)), (48, (0, 0, 20, 27)), (9, (10, 20, 37, 40))])
def test_boxes_are_cropped_and_resized_as_pillow_does(size, box):
    image = noise()
    top, left, height, width = box
    expected = image.crop((left, top, left + width, top + height)).resize((size, size), Image.Resampling.BILINEAR)
    error = crop_and_resize(to_pixels(image), box, size).astype(int) - np.array(expected).transpose(2, 0, 1)
    assert error.dtype == int and np.abs(error).max() <= 1


# Distributions of what is sampled


@pytest.fixture(scope="module")
def boxes_and_params():
    """Of 4000 crops of an image so large that every box fits and rounding to pixels does not matter."""
    transform = MultiCrop([96], [4000], [0.05], [0.14])
    boxes, params = transform.sample([(4000, 3000)], [np.random.default_rng(0)])
    return boxes[0], params[0]


@pytest.fixture(scope="module")
def boxes(boxes_and_params):
    return boxes_and_params[0]


@pytest.fixture(scope="module")
def params(boxes_and_params):
    return boxes_and_params[1]


def assert_uniform(values, low, high):
    """Kolmogorov-Smirnov test: bound the largest distance to the uniform distribution function by 2 / sqrt(n).

    Uniform values exceed the bound once in 1500 times.
    """
    shares = (np.sort(values) - low) / (high - low)
    ranks = np.arange(len(shares) + 1) / len(shares)
    assert shares[0] >= -1e-3 and shares[-1] <= 1 + 1e-3  # boxes are rounded to pixels
    assert max((ranks[1:] - shares).max(), (shares - ranks[:-1]).max()) < 2 / math.sqrt(len(shares))


def test_probabilities_of_flip_jitter_grey_and_blur(params):
    sampled = [operations_of(params_of_crop) for params_of_crop in params]
    for name, expected in dict(flip=0.5, jitter=0.8, grey=0.2, sigma=0.5).items():
        assert np.mean([bool(operations[name]) for operations in sampled]) == pytest.approx(expected, abs=0.025), name


def test_boxes_are_uniform_in_area_log_aspect_and_place(boxes):
    top, left, height, width = boxes.T
    assert_uniform(height * width / (4000 * 3000), 0.05, 0.14)
    assert_uniform(np.log(width / height), math.log(3 / 4), math.log(4 / 3))
    assert_uniform((top + 0.5) / (3000 - height + 1), 0, 1)
    assert_uniform((left + 0.5) / (4000 - width + 1), 0, 1)


def jitters_of(params):
    """The jitter of the crops that have one."""
    return [operations_of(params_of_crop)["jitter"] for params_of_crop in params if by_name(params_of_crop).hue]


def test_jitter_factors_and_blur_are_uniform_in_their_ranges(params):
    jitters = [dict(jitter) for jitter in jitters_of(params)]
    assert all(len(jitter) == 4 for jitter in jitters)
    for name, low, high in (
        ("brightness", 0.2, 1.8),
        ("contrast", 0.2, 1.8),
        ("saturation", 0.2, 1.8),
        ("hue", -0.2, 0.2),
    ):
        assert_uniform([jitter[name] for jitter in jitters], low, high)
    sigmas = by_name(params).sigma
    assert_uniform(sigmas[sigmas > 0], 0.1, 2.0)


@pytest.mark.parametrize("blur_sigma, min_sigma", [(0, 0), (0.05, 0.05), (0.43, 0.1), (2, 0.1)])
def test_a_weaker_blur_changes_nothing_else(boxes, params, blur_sigma, min_sigma):
    transform = MultiCrop([96], [4000], [0.05], [0.14], blur_sigma=blur_sigma)
    (new_boxes,), (new_params,) = transform.sample([(4000, 3000)], [np.random.default_rng(0)])
    before, now = by_name(params), by_name(new_params)
    assert (new_boxes == boxes).all()
    for name in ("hflip", "vflip", "grey", "hue", "blends"):
        assert (getattr(now, name) == getattr(before, name)).all(), name
    is_blurred = before.sigma > 0
    assert (now.sigma[~is_blurred] == 0).all()
    shares = (before.sigma[is_blurred] - 0.1) / 1.9
    expected = min_sigma + (blur_sigma - min_sigma) * shares
    np.testing.assert_allclose(now.sigma[is_blurred], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("blur_sigma", [-0.1, 2.5, float("nan")])
def test_a_blur_out_of_range_is_refused(blur_sigma):
    with pytest.raises(ValueError, match="blur_sigma: expected 0 to 2 pixels, got "):
        MultiCrop(*TWO_SIZES, blur_sigma=blur_sigma)


def named_params(count=4000, **options):
    """The augmentation parameters of some crops, by name."""
    transform = MultiCrop([96], [count], [0.05], [0.14], **options)
    return by_name(transform.sample([(4000, 3000)], [np.random.default_rng(0)])[1][0])


@pytest.mark.parametrize("probability", [0, 0.1, 0.9, 1])
@pytest.mark.parametrize("option, column", [("hflip", "hflip"), ("vflip", "vflip"), ("grayscale", "grey")])
def test_flips_and_greyscale_have_the_probability_that_is_asked_for(option, column, probability):
    given, default = named_params(**{option: probability}), named_params()
    assert getattr(given, column).mean() == pytest.approx(probability, abs=0.02 if 0 < probability < 1 else 0)
    for name in set(given._fields) - {column}:
        assert (getattr(given, name) == getattr(default, name)).all(), f"{option} changes {name}"


@pytest.mark.parametrize("strength", [0, 0.25, 0.5, 1])
def test_the_strength_of_colours_scales_the_jitter_and_nothing_else(strength):
    given, paper = named_params(color_strength=strength), named_params()
    np.testing.assert_allclose(given.hue, strength * paper.hue, rtol=1e-6, atol=0)
    np.testing.assert_allclose(given.blends[..., 0], strength * paper.blends[..., 0], rtol=1e-6, atol=0)
    for name in ("hflip", "vflip", "grey", "sigma"):
        assert (getattr(given, name) == getattr(paper, name)).all()
    jittered = paper.hue != 0
    factors = 1 - given.blends[jittered][..., 0]
    assert np.abs(factors - 1).max() == pytest.approx(0.8 * strength, abs=0.01)
    assert np.abs(given.hue).max() == pytest.approx(0.2 * strength, abs=0.001)


def test_a_vertical_flip_turns_the_same_crop_upside_down():
    options = dict(hflip=0, color_strength=0, grayscale=0, blur_sigma=0)
    upright = MultiCrop(*TWO_SIZES, **options)(noise(), np.random.default_rng(0))
    flipped = MultiCrop(*TWO_SIZES, **options, vflip=1)(noise(), np.random.default_rng(0))
    assert equal(flipped, [crop.flip(1) for crop in upright])
    mixed = MultiCrop([24], [200], [0.3], [1.0], **options, vflip=0.5)(noise(), np.random.default_rng(0))
    expected = MultiCrop([24], [200], [0.3], [1.0], **options)(noise(), np.random.default_rng(0))
    turned = [torch.equal(crop, other.flip(1)) for crop, other in zip(mixed, expected, strict=True)]
    assert 0.35 < np.mean(turned) < 0.65
    assert all(t or torch.equal(crop, other) for t, crop, other in zip(turned, mixed, expected, strict=True))


@pytest.mark.parametrize("option", ["hflip", "vflip", "color_strength", "grayscale"])
@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_flips_and_colours_out_of_range_are_refused(option, value):
    with pytest.raises(ValueError, match=f"{option}: expected 0 to 1, got "):
        MultiCrop(*TWO_SIZES, **{option: value})


def test_jitter_comes_in_all_24_orders_equally_often(params):
    orders = [tuple(name for name, _ in jitter) for jitter in jitters_of(params)]
    counts = [orders.count(order) for order in set(orders)]
    assert len(counts) == 24 and all(len(set(order)) == 4 for order in orders)
    assert min(counts) > 0.6 * len(orders) / 24 and max(counts) < 1.4 * len(orders) / 24


def test_what_is_sampled_is_independent(boxes, params):
    """No two of flip, grey, blur, hue, the first blend and the box are correlated."""
    named = by_name(params)
    first_weight = named.blends[:, 0, 0]
    columns = np.stack([named.hflip, named.grey, named.sigma, named.hue, first_weight, *boxes.T])
    correlations = np.corrcoef(columns[:, named.hue != 0])
    correlations[-2:, :] = correlations[:, -2:] = 0  # height and width share one area, and bound the place
    assert np.abs(correlations - np.diag(np.diag(correlations))).max() < 4 / math.sqrt(0.8 * 4000)


def boxes_of(width, height, scale, count):
    transform = MultiCrop([24], [count], [scale[0]], [scale[1]])
    return transform.sample([(width, height)], [np.random.default_rng(0)])[0][0].tolist()


@pytest.mark.parametrize("scale", [(0.05, 0.14), (0.14, 1.0), (1.0, 1.0)])
@pytest.mark.parametrize("width, height", [(64, 64), (37, 91), (500, 333), (3000, 20), (2, 1000), (1, 1)])
def test_boxes_lie_in_the_image_with_an_allowed_area_and_aspect(width, height, scale):
    for top, left, box_height, box_width in boxes_of(width, height, scale, 200):
        assert 0 <= top <= top + box_height <= height and box_height > 0
        assert 0 <= left <= left + box_width <= width and box_width > 0
        assert box_width <= (box_height + 0.5) * 4 / 3 + 0.5 and box_height <= (box_width + 0.5) * 4 / 3 + 0.5
        assert box_width * box_height <= (math.sqrt(scale[1] * width * height) + 1) ** 2


@pytest.mark.parametrize(
    "width, height, box", [(4000, 30, [0, 1980, 30, 40]), (30, 4000, [1980, 0, 40, 30]), (50, 50, [0, 0, 50, 50])]
)
def test_if_no_box_fits_the_largest_centred_one_is_taken(width, height, box):
    assert boxes_of(width, height, (1.0, 1.0), 1) == [box]


def test_every_place_that_fits_is_sampled_edges_included():
    boxes = boxes_of(12, 12, (0.5, 0.5), 2000)
    assert {top for top, _, height, _ in boxes if height == 8} == set(range(5))
    assert {left for _, left, _, width in boxes if width == 8} == set(range(5))


@pytest.mark.parametrize(
    "name, lists",
    [
        ("nmb_crops", ([24, 16], [2], [0.3, 0.1], [1, 0.3])),
        ("min_scale_crops", ([24, 16], [2, 3], [0.3], [1, 0.3])),
        ("max_scale_crops", ([24, 16], [2, 3], [0.3, 0.1], [1, 0.3, 0.2])),
        ("size_crops", ([24, 6], [2, 3], [0.3, 0.1], [1, 0.3])),
        ("size_crops", ([], [], [], [])),
        ("nmb_crops", ([24, 16], [2, 0], [0.3, 0.1], [1, 0.3])),
        ("min_scale_crops", ([24, 16], [2, 3], [0.0, 0.1], [1, 0.3])),
        ("min_scale_crops", ([24, 16], [2, 3], [0.3, 0.4], [1, 0.3])),
        ("max_scale_crops", ([24, 16], [2, 3], [0.3, 0.1], [1.1, 0.3])),
    ],
)
def test_wrong_lists_are_refused_by_name(name, lists):
    with pytest.raises(ValueError, match=f"{name}.*: expected .* got "):
        MultiCrop(*lists)


# What the randomness depends on


def crops_by_image(loaders, epoch=0):
    """{index of the image: its crops}, over the loaders of all processes."""
    crops = {}
    for loader in loaders:
        for batch, labels in start_epoch(loader, epoch):
            crops |= {label: [crop[b] for crop in batch] for b, label in enumerate(labels.tolist())}
    return crops


def loaders(seed=0, workers=0, world_size=1, **more):
    images, transform, batch_size = numbered_images(12), MultiCrop(*TWO_SIZES), 4 // world_size
    options = dict(seed=seed, workers=workers, world_size=world_size, **more)
    return [training_loader(images, transform, batch_size, rank=rank, **options) for rank in range(world_size)]


class ProcessLabels(torch.utils.data.Dataset):
    """Images whose label encodes the process that reads them, and its number of threads."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.zeros(3, 8, 8, dtype=torch.uint8), 1000 * os.getpid() + torch.get_num_threads()


@pytest.mark.parametrize("crop_only", [False, True])
def test_workers_stay_between_epochs_and_use_one_thread_each(crop_only):
    transform = MultiCrop([8], [2], [0.5], [1.0])
    loader = training_loader(ProcessLabels(), transform, 2, workers=2, crop_only=crop_only)
    first, second = ({label for _, labels in loader for label in labels.tolist()} for _ in range(2))
    assert first == second and len(first) == 2
    assert all(label % 1000 == 1 and label // 1000 != os.getpid() for label in first)


class FrozenObjects(ProcessLabels):
    """Images whose label is the number of objects that garbage collections leave out."""

    def __getitem__(self, index):
        return torch.zeros(3, 8, 8, dtype=torch.uint8), gc.get_freeze_count()


def test_garbage_collections_of_workers_leave_out_what_they_share_with_the_parent():
    loader = training_loader(FrozenObjects(), MultiCrop([8], [2], [0.5], [1.0]), 8, workers=1)
    _, frozen = next(iter(loader))
    assert frozen.min() > 10_000 and gc.get_freeze_count() == 0


@pytest.mark.parametrize("workers, world_size", [(1, 1), (2, 1), (0, 2), (2, 2), (0, 4)])
def test_crops_do_not_depend_on_workers_and_processes(workers, world_size):
    expected, others = loaders(), loaders(workers=workers, world_size=world_size)
    for epoch in (0, 3):
        crops, other_crops = crops_by_image(expected, epoch), crops_by_image(others, epoch)
        assert sorted(crops) == sorted(other_crops) == list(range(12))
        assert all(equal(crops[index], other_crops[index]) for index in crops)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("workers, world_size", [(0, 1), (2, 1), (0, 2)])
def test_crops_augmented_on_the_device_equal_those_of_workers(workers, world_size, device):
    pairs = zip(loaders(world_size=world_size), loaders(3, workers, world_size, crop_only=True), strict=True)
    for in_workers, on_device in pairs:
        on_device.dataset.seed = on_device.batch_sampler.seed = 0
        batches = zip(start_epoch(in_workers, 3), start_epoch(on_device, 3), strict=True)
        for (crops, labels), (batch, other_labels) in batches:
            assert all(pixels.dtype == torch.uint8 and pixels.is_contiguous() for pixels, _ in batch)
            stream = torch.cuda.Stream() if device == "cuda" else None
            options = dict(stream=stream, memory_format=torch.channels_last)
            augmented_there = crops_to_device(batch, torch.device(device), **options)
            augmented_before = crops_to_device(crops, torch.device(device), **options)
            assert torch.equal(labels, other_labels) and len(augmented_there) == len(augmented_before) == 5
            in_parts = crops_to_device(batch, torch.device(device), parts=len(labels), **options)
            torch.testing.assert_close(in_parts, augmented_there, rtol=0, atol=1e-5)
            for ours, theirs in zip(augmented_there, augmented_before, strict=True):
                assert ours.is_contiguous(memory_format=torch.channels_last)
                torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4)


def test_large_images_are_cropped_a_few_at_a_time(monkeypatch):
    (at_once,), counts = loaders(crop_only=True), []
    batches = list(at_once)
    monkeypatch.setattr(data, "MAX_BATCH_BYTES", 2 * 3 * 40 * 40 - 1)
    crop = MultiCrop.crop
    monkeypatch.setattr(MultiCrop, "crop", lambda self, some, rngs: counts.append(len(some)) or crop(self, some, rngs))
    (in_parts,) = loaders(crop_only=True)
    for (batch, _), (other, _) in zip(batches, in_parts, strict=True):
        assert all(torch.equal(a, b) for pair in zip(batch, other, strict=True) for a, b in zip(*pair, strict=True))
    assert counts == [2] * 6


@pytest.mark.parametrize("image", [torch.rand(3, 8, 8), torch.zeros(1, 8, 8, dtype=torch.uint8)])
def test_tensors_that_are_not_images_are_refused(image):
    with pytest.raises(ValueError, match="^image: expected PIL or uint8 .* got torch"):
        MultiCrop([8], [1], [0.5], [1.0])(image)


@pytest.mark.parametrize("seed, epoch", [(0, 1), (1, 0)])
def test_crops_change_with_epoch_and_seed(seed, epoch):
    crops, others = crops_by_image(loaders()), crops_by_image(loaders(seed), epoch)
    assert not any(torch.equal(a, b) for index in crops for a, b in zip(crops[index], others[index], strict=True))


def test_crops_of_one_image_and_of_equal_images_differ():
    images = SeededImages([(noise(), 0), (noise(), 1)], MultiCrop([24], [3], [0.3], [1.0]))
    crops = images[0, 0][0] + images[0, 1][0]
    assert not any(torch.equal(a, b) for i, a in enumerate(crops) for b in crops[:i])


def test_global_random_state_is_neither_used_nor_changed():
    images = SeededImages(numbered_images(3), MultiCrop(*TWO_SIZES), seed=5)
    crops, _ = images[2, 1]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = random.getstate(), str(np.random.get_state()), torch.get_rng_state()
    others, label = images[2, 1]
    assert equal(crops, others) and label == 1
    assert before[:2] == (random.getstate(), str(np.random.get_state()))
    assert torch.equal(before[2], torch.get_rng_state())


@pytest.mark.parametrize("workers", [0, 2])
def test_as_the_transform_of_another_dataset_it_follows_torchs_seed(workers):
    images = torchvision.datasets.FakeData(4, (3, 48, 48), transform=MultiCrop(*TWO_SIZES))

    def crops(seed):
        torch.manual_seed(seed)
        return [crop for batch, _ in DataLoader(images, batch_size=2, num_workers=workers) for crop in batch]

    assert equal(crops(0), crops(0))
    assert not any(torch.equal(a, b) for a, b in zip(crops(0), crops(1), strict=True))


# Transforms of the evaluation


def test_centre_crop_equals_torchvisions_resize_and_centre_crop():
    image = noise(90, 61)
    pixels = F.to_image(F.center_crop(F.resize(image, [32], antialias=True), [24, 24]))
    expected = (F.to_dtype(pixels, torch.float32, scale=True) - MEAN) / STD
    error = (CentreCrop(32, 24)(image) - expected.as_subclass(torch.Tensor)).abs() * STD * 255
    assert error.max() < 1.01 and error.mean() < 0.02  # torch and Pillow resize to within one 8-bit step


def test_probe_crop_crops_and_flips_but_keeps_colours():
    rng = np.random.default_rng(0)
    half = Image.new("RGB", (64, 64), (255, 0, 0))
    half.paste((0, 0, 255), (32, 0, 64, 64))  # red on the left, blue on the right
    crops = [ProbeCrop(16)(half, rng) * STD + MEAN for _ in range(100)]
    assert {tuple(crop.shape) for crop in crops} == {(3, 16, 16)}
    for crop in crops:
        torch.testing.assert_close(crop[0] + crop[2], torch.ones(16, 16), rtol=0, atol=0.01)
        assert crop[1].abs().max() < 1e-5
    sides = [torch.sign(crop[0, 0, 0] - crop[0, 0, -1]).item() for crop in crops if crop[0, 0].std() > 0.1]
    assert 0.3 < np.mean([side > 0 for side in sides]) < 0.7
    unturned = [ProbeCrop(16, hflip=0)(half, rng) for _ in range(50)]
    assert all(crop[0, 0, 0] >= crop[0, 0, -1] for crop in unturned)


# Order


@pytest.mark.parametrize("images, world_size", [(100, 1), (100, 4), (103, 4), (119, 2)])
def test_each_image_comes_at_most_once_per_epoch_and_an_incomplete_batch_is_dropped(images, world_size):
    samplers = [ShuffledBatches(images, 5, rank=rank, world_size=world_size) for rank in range(world_size)]
    for sampler in samplers:
        sampler.epoch = 7
    batches = [batch for sampler in samplers for batch in sampler]
    steps = images // (5 * world_size)
    assert [len(sampler) for sampler in samplers] == [steps] * world_size
    assert [len(batch) for batch in batches] == [5] * steps * world_size
    indices = [index for batch in batches for epoch, index in batch if epoch == 7]
    assert len(indices) == len(set(indices)) == steps * 5 * world_size
    assert set(indices) <= set(range(images))


def global_batches(world_size, seed=0, epoch=0):
    samplers = [
        ShuffledBatches(70, 8 // world_size, seed=seed, rank=r, world_size=world_size) for r in range(world_size)
    ]
    for sampler in samplers:
        sampler.epoch = epoch
    return [sum(parts, []) for parts in zip(*samplers, strict=True)]


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_global_batch_of_a_step_does_not_depend_on_the_number_of_processes(world_size):
    assert global_batches(world_size) == global_batches(1)


def test_the_order_depends_only_on_epoch_and_seed():
    orders = [[i for batch in global_batches(1, s, e) for _, i in batch] for s, e in ((0, 0), (0, 1), (1, 0), (1, 1))]
    assert len({tuple(order) for order in orders}) == 4 and sorted(orders[0]) != orders[0]
    assert global_batches(1, 1, 1) == global_batches(1, 1, 1)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 3])
def test_ordered_loaders_cover_every_image_once_in_order(world_size, workers):
    shares = []
    for rank in range(world_size):
        options = dict(rank=rank, world_size=world_size, workers=workers)
        batches = list(ordered_loader(numbered_images(11), CentreCrop(32, 24), 2, **options))
        assert all(len(pixels) == len(labels) <= 2 for pixels, labels in batches)
        shares.append([label for _, labels in batches for label in labels.tolist()])
    assert all(share == sorted(share) for share in shares)
    assert sorted(sum(shares, [])) == list(range(11))


# Images that cannot be read


class SomeUnreadable(torch.utils.data.Dataset):
    """Images whose labels are their indices, of which those in `bad` cannot be read."""

    def __init__(self, count, bad):
        self.images, self.bad = numbered_images(count), bad

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        if index in self.bad:
            raise UnreadableImage(f"cannot read {index}", "it is bad")
        return self.images[index]


def test_another_image_takes_the_place_of_an_unreadable_one():
    images = SomeUnreadable(40, bad={3, 7, 8, 9})
    assert [readable_image(images, 0, 0, i)[1] for i in range(3)] == [0, 1, 2]
    labels = {
        key: readable_image(images, *key)[1] for key in [(s, e, i) for s in (0, 1) for e in range(40) for i in (3, 7)]
    }
    assert not set(labels.values()) & images.bad and len(set(labels.values())) > 25  # spread over the set
    assert all(readable_image(images, *key)[1] == label for key, label in labels.items())


def test_where_all_images_are_unreadable_the_first_is_named():
    with pytest.raises(UnreadableImage, match="^cannot read 2; 49 other images, tried in its place, cannot be read"):
        readable_image(SomeUnreadable(4, bad=range(4)), 0, 0, 2)


def test_an_unreadable_image_keeps_its_place_in_an_ordered_loader():
    pixels, labels = zip(*ordered_loader(SomeUnreadable(5, bad={1, 4}), CentreCrop(32, 24), 2), strict=True)
    assert torch.cat(labels).tolist() == [0, LEFT_OUT, 2, 3, LEFT_OUT]
    black = torch.cat(pixels)[[1, 4]] * STD + MEAN
    torch.testing.assert_close(black, torch.zeros(2, 3, 24, 24), rtol=0, atol=1e-6)


def test_an_unreadable_image_of_a_worker_keeps_its_message():
    loader = training_loader(SomeUnreadable(4, bad=range(4)), CentreCrop(32, 24), 2, workers=1)
    with pytest.raises(UnreadableImage) as raised:
        list(start_epoch(loader, 0))
    assert "data.UnreadableImage: cannot read " in str(raised.value).splitlines()[-1]


@pytest.mark.parametrize(
    "value_range, expected", [(None, [0, 4, 16]), ((0, 4096), [0, 64, 255]), ((1024, 4096), [0, 0, 255])]
)
def test_16_bits_are_scaled_by_the_range(value_range, expected):
    image = Image.fromarray(np.array([[0, 1024, 4096]], np.uint16))
    assert to_pixels(image, value_range)[0, 0].tolist() == expected
    as_8_bits = torch.tensor(expected, dtype=torch.uint8).expand(3, 1, -1)
    assert torch.equal(CentreCrop(1, 1, value_range)(image), CentreCrop(1, 1)(as_8_bits))


# Memory


def test_memory_of_freed_tensors_is_reused():
    code = (
        "import resource, torch, data\n"
        "def faults():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    for _ in range(20): torch.ones(2**22)\n"  # 16 MiB, 4096 pages
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "data.reuse_freed_memory(); faults(); print(faults())"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert platform.libc_ver()[0] != "glibc" or int(result.stdout) < 4096


def test_large_freed_tensors_are_returned_to_the_system():  # the gaps that they leave would add up
    code = (
        "import resource, torch, data\n"
        "def resident(): return int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize() // 2**20\n"
        "data.reuse_freed_memory(); large = torch.ones(2**24); before = resident()\n"  # 64 MiB
        "del large; print(before - resident())"
    )
    if sys.platform == "linux":
        result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        assert int(result.stdout) > 48


@pytest.mark.parametrize("crop_only", [True, False])
def test_the_bytes_of_a_batch_are_known(crop_only):
    multi_crop = MultiCrop([16, 8], [2, 3], [0.3, 0.1], [1.0, 0.3])
    loader = training_loader(numbered_images(4), multi_crop, 4, crop_only=crop_only)
    batch, _ = next(start_epoch(loader, 0))
    tensors = [tensor for part in batch for tensor in (part if crop_only else [part])]
    assert data.batch_bytes(multi_crop, 4, crop_only=crop_only) == sum(tensor.nbytes for tensor in tensors)


def test_workers_start_where_a_system_has_no_sigusr1(monkeypatch):
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    monkeypatch.delattr(signal, "SIGUSR1")
    try:
        data._start_worker(0)
        assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        gc.unfreeze()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_of_long_images_only_the_centre_is_resized(monkeypatch):
    resized, resize = [], data.F.resize
    monkeypatch.setattr(data.F, "resize", lambda pixels, *more, **options: resized.append(pixels.shape)
                        or resize(pixels, *more, **options))  # fmt: skip
    columns = torch.arange(5001) // 20
    crop = CentreCrop(32, 24)
    for image in (columns.expand(3, 2, -1), columns.view(-1, 1).expand(3, -1, 2)):
        seen = crop(image.to(torch.uint8))
        middle = crop(image[:, -20:, -20:].new_full((3, 20, 20), 125).to(torch.uint8))
        assert torch.allclose(seen, middle, atol=0.05)
    assert [max(shape) for shape in resized] == [16, 20, 16, 20]


def test_to_uint8_undoes_normalising():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(3, -1, -1)
    assert torch.equal(to_uint8(normalize(pixels.float().clone())), pixels)
