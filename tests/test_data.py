"""Multi-crop against torchvision and its stated distributions, image sets, loaders, and the drawn shapes."""

import gzip
import io
import math
import os
import platform
import random
import struct
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
    ROW,
    STEPS,
    CachedImages,
    CentreCrop,
    ImageArrays,
    ImageFiles,
    LabelledImageFiles,
    MultiCrop,
    ProbeCrop,
    SeededImages,
    ShuffledBatches,
    augment,
    augment_singly,
    cached_size,
    cut_crop,
    draw_shape,
    image_size,
    open_images,
    ordered_loader,
    place_batch,
    read_image,
    sample_rows,
    step_of,
    to_pixels,
    training_loader,
    typical_side,
)

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


def test_crops_come_in_the_order_and_sizes_asked_for():
    crops = MultiCrop(*TWO_SIZES)(noise())
    assert [tuple(crop.shape) for crop in crops] == [(3, 24, 24)] * 2 + [(3, 16, 16)] * 3
    assert all(crop.dtype == torch.float32 and crop.is_contiguous() and not crop.is_inference() for crop in crops)


def test_crops_are_normalised_with_the_published_constants():
    black = Image.new("RGB", (60, 40))  # which no operation changes
    for seed in range(5):
        for crop in MultiCrop(*TWO_SIZES)(black, np.random.default_rng(seed)):
            torch.testing.assert_close(crop, (-MEAN / STD).expand_as(crop))


# Augmentation, in both of its forms

FORMS = {
    "singly": lambda pixels, rows, device="cpu": torch.from_numpy(augment_singly(pixels, rows)),
    "batched": lambda pixels, rows, device="cpu": augment(pixels.to(device), torch.from_numpy(rows).to(device)).cpu(),
}
PICTURES = {
    "noise": np.random.default_rng(0).integers(0, 256, (3, 24, 24)),
    "grey": np.random.default_rng(1).integers(0, 256, (1, 24, 24)).repeat(3, axis=0),
    "pure colours": np.random.default_rng(2).integers(0, 2, (3, 24, 24)) * 255,
    "ramps": np.stack([*np.meshgrid(np.arange(24), np.arange(24)), np.full((24, 24), 13)]) * 10,
}


def row_of(flip=False, jitter=(), grey=False, sigma=0.0):
    """The row of these operations, jitter in its order as (name, factor)."""
    names = [name for name, _ in jitter] + ["hue"]
    row = np.zeros(ROW, np.float32)
    row[:4] = flip, grey, sigma, dict(jitter).get("hue", 0)
    for name, factor in jitter:
        if name != "hue":
            start = 4 + 3 * step_of(name, names)
            row[start : start + 3] = 1 - factor, name == "saturation", name == "contrast"
    return row


def operations_of(row):
    """What `row_of` gave `row` for; operations that do nothing are left out."""
    jitter = []
    for step in range(STEPS):
        if step == STEPS // 2 and row[3]:
            jitter.append(("hue", float(row[3])))
        share, luminance, mean = row[4 + 3 * step : 7 + 3 * step]
        if share:
            jitter.append(("saturation" if luminance else "contrast" if mean else "brightness", float(1 - share)))
    return dict(flip=bool(row[0]), jitter=tuple(jitter), grey=bool(row[1]), sigma=float(row[2]))


def torchvisions(image, flip=False, jitter=(), grey=False, sigma=0.0, kernel=33):
    """The same, one torchvision operation after the other, on a float tensor or a PIL image; normalised."""
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
def test_each_operation_is_torchvisions(operations, picture, form):
    pixels = torch.from_numpy(PICTURES[picture].astype(np.uint8))
    ours = FORMS[form](pixels[None], row_of(**operations)[None])[0]
    error = ((ours - torchvisions(pixels / 255, **operations)) * STD * 255).abs()
    assert error.max() < 1 and error.mean() < 0.2
    if not operations.get("sigma"):  # a blur is cut at 3 sigma, torchvision's weights of grey differ by 0.0001
        assert error.max() < 0.12


@pytest.mark.parametrize("size", [7, 24, 70, 200])
@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
def test_both_blurs_are_torchvisions_of_the_same_reach(size, sigma):
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 3, size, size), dtype=np.uint8))
    expected = torchvisions(pixels[0] / 255, sigma=sigma, kernel=2 * math.ceil(3 * sigma) + 1)
    for form in FORMS.values():
        torch.testing.assert_close(form(pixels, row_of(sigma=sigma)[None])[0], expected, rtol=0, atol=2e-5)


def random_crops(count, size, seed=0):
    """uint8 [count, 3, size, size] of slopes and noise, and rows that MultiCrop draws."""
    rng = np.random.default_rng(seed)
    slopes = rng.uniform(-3, 3, (2, count, 3, 1, 1)) * np.stack(np.meshgrid(*2 * [np.arange(size)]))[:, None, None]
    pixels = rng.uniform(40, 215, (count, 3, 1, 1)) + slopes.sum(0) + rng.normal(0, 8, (count, 3, size, size))
    return torch.from_numpy(pixels.clip(0, 255).astype(np.uint8)), sample_rows(rng.random((count, 10)), blur_sigma=2.0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [7, 24, 65, 224])
def test_crops_in_batches_on_the_device_are_those_of_workers(size, device):
    pixels, rows = random_crops(40, size)
    before = pixels.clone()
    batched = FORMS["batched"](pixels, rows, device)
    torch.testing.assert_close(batched, FORMS["singly"](pixels, rows), rtol=0, atol=2e-4)
    assert batched.is_contiguous() and torch.equal(pixels, before)


def test_sampled_crops_are_torchvisions_and_close_to_those_of_8_bit_images():
    pixels, rows = random_crops(200, 32)
    rounded = []
    for ours, crop, row in zip(FORMS["singly"](pixels, rows), pixels, rows, strict=True):
        operations = operations_of(row)
        kernel = 2 * math.ceil(3 * operations["sigma"]) + 1
        assert np.allclose(row_of(**operations)[:4], row[:4])
        error = ((ours - torchvisions(crop / 255, **operations, kernel=kernel)) * STD * 255).abs()
        assert error.max() < 0.3, operations
        image = Image.fromarray(crop.permute(1, 2, 0).numpy())
        rounded.append(((ours - torchvisions(image, **operations, kernel=kernel)) * STD * 255).abs())
    # The published program rounds to 8 bits after each operation, and hue has but 256 values there.
    assert torch.stack(rounded).mean() < 1.5 and torch.stack(rounded).quantile(0.99) < 12


def test_a_batch_is_augmented_without_a_look_at_its_values():
    pixels, rows = random_crops(5, 24)
    out = augment(pixels.to("meta"), torch.from_numpy(rows).to("meta"))  # has no values: reading one raises
    assert out.shape == pixels.shape and out.dtype == torch.float32


def test_a_batch_is_augmented_in_one_graph():
    pixels, rows = random_crops(5, 70)
    whole = torch.compile(augment, fullgraph=True, dynamic=False, backend="aot_eager")
    expected = augment(pixels, torch.from_numpy(rows))
    torch.testing.assert_close(whole(pixels, torch.from_numpy(rows)), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size, box", [(24, (3, 5, 31, 40)), (48, (0, 0, 20, 27)), (9, (10, 20, 37, 40))])
def test_boxes_are_cut_out_as_pillow_does(size, box):
    image = noise()
    top, left, height, width = box
    expected = image.crop((left, top, left + width, top + height)).resize((size, size), Image.Resampling.BILINEAR)
    error = cut_crop(to_pixels(image), box, size).astype(int) - np.array(expected).transpose(2, 0, 1)
    assert error.dtype == int and np.abs(error).max() <= 1


# What is drawn


@pytest.fixture(scope="module")
def draws():
    """Boxes and rows of 4000 crops of an image so large that every box fits and whole pixels do not matter."""
    transform = MultiCrop([96], [4000], [0.05], [0.14])
    boxes, rows = transform.sample([(4000, 3000)], [np.random.default_rng(0)])
    return boxes[0], rows[0]


def assert_uniform(values, low, high):
    """Kolmogorov-Smirnov: the largest distance between the two distribution functions; 2 / sqrt(n) is 1 in 1500."""
    shares = (np.sort(values) - low) / (high - low)
    ranks = np.arange(len(shares) + 1) / len(shares)
    assert shares[0] >= -1e-3 and shares[-1] <= 1 + 1e-3  # boxes have whole pixels
    assert max((ranks[1:] - shares).max(), (shares - ranks[:-1]).max()) < 2 / math.sqrt(len(shares))


def test_probabilities_of_flip_jitter_grey_and_blur(draws):
    drawn = [operations_of(row) for row in draws[1]]
    for name, expected in dict(flip=0.5, jitter=0.8, grey=0.2, sigma=0.5).items():
        assert np.mean([bool(operations[name]) for operations in drawn]) == pytest.approx(expected, abs=0.025), name


def test_boxes_are_uniform_in_area_log_aspect_and_place(draws):
    top, left, height, width = draws[0].T
    assert_uniform(height * width / (4000 * 3000), 0.05, 0.14)
    assert_uniform(np.log(width / height), math.log(3 / 4), math.log(4 / 3))
    assert_uniform((top + 0.5) / (3000 - height + 1), 0, 1)
    assert_uniform((left + 0.5) / (4000 - width + 1), 0, 1)


def test_jitter_factors_and_blur_are_uniform_in_their_ranges(draws):
    jitters = [dict(operations_of(row)["jitter"]) for row in draws[1] if row[3]]
    assert all(len(jitter) == 4 for jitter in jitters)
    for name, low, high in (
        ("brightness", 0.2, 1.8),
        ("contrast", 0.2, 1.8),
        ("saturation", 0.2, 1.8),
        ("hue", -0.2, 0.2),
    ):
        assert_uniform([jitter[name] for jitter in jitters], low, high)
    assert_uniform([row[2] for row in draws[1] if row[2]], 0.1, 2.0)


@pytest.mark.parametrize("blur_sigma, least", [(0, 0), (0.05, 0.05), (0.43, 0.1), (2, 0.1)])
def test_a_weaker_blur_leaves_all_else_that_is_drawn(draws, blur_sigma, least):
    transform = MultiCrop([96], [4000], [0.05], [0.14], blur_sigma=blur_sigma)
    boxes, rows = (drawn[0] for drawn in transform.sample([(4000, 3000)], [np.random.default_rng(0)]))
    assert (boxes == draws[0]).all() and (np.delete(rows, 2, axis=1) == np.delete(draws[1], 2, axis=1)).all()
    blurred = draws[1][:, 2] > 0
    assert (rows[~blurred, 2] == 0).all()
    shares = (draws[1][blurred, 2] - 0.1) / 1.9
    np.testing.assert_allclose(rows[blurred, 2], least + (blur_sigma - least) * shares, rtol=0, atol=1e-6)


@pytest.mark.parametrize("blur_sigma", [-0.1, 2.5, float("nan")])
def test_a_blur_out_of_range_is_refused(blur_sigma):
    with pytest.raises(ValueError, match="blur_sigma: expected 0 to 2 pixels, got "):
        MultiCrop(*TWO_SIZES, blur_sigma=blur_sigma)


def test_jitter_comes_in_all_24_orders_equally_often(draws):
    orders = [tuple(name for name, _ in operations_of(row)["jitter"]) for row in draws[1] if row[3]]
    counts = [orders.count(order) for order in set(orders)]
    assert len(counts) == 24 and all(len(set(order)) == 4 for order in orders)
    assert min(counts) > 0.6 * len(orders) / 24 and max(counts) < 1.4 * len(orders) / 24


def test_what_is_drawn_is_independent(draws):
    """Flip, grey, blur, hue, the first step and the box: no two of them tell of each other."""
    columns = np.concatenate([draws[1][:, :5], draws[0]], axis=1)
    correlations = np.corrcoef(columns[draws[1][:, 3] != 0].T)
    correlations[-2:, :] = correlations[:, -2:] = 0  # height and width follow from one area, and bound the place
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
def test_where_no_box_fits_it_is_the_largest_centred_one(width, height, box):
    assert boxes_of(width, height, (1.0, 1.0), 1) == [box]


def test_every_place_that_fits_is_taken_edges_included():
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
    """Index of the image -> its crops, over the loaders of all processes."""
    crops = {}
    for loader in loaders:
        loader.batch_sampler.epoch = epoch
        for batch, labels in loader:
            crops |= {label: [crop[b] for crop in batch] for b, label in enumerate(labels.tolist())}
    return crops


def loaders(seed=0, workers=0, world_size=1, **more):
    images, transform, batch_size = numbered_images(12), MultiCrop(*TWO_SIZES), 4 // world_size
    options = dict(seed=seed, workers=workers, world_size=world_size, **more)
    return [training_loader(images, transform, batch_size, rank=rank, **options) for rank in range(world_size)]


class Whereabouts(torch.utils.data.Dataset):
    """Images whose label tells the process that read them, and its threads."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.zeros(3, 8, 8, dtype=torch.uint8), 1000 * os.getpid() + torch.get_num_threads()


@pytest.mark.parametrize("cut_only", [False, True])
def test_workers_stay_between_epochs_and_take_a_thread_each(cut_only):
    transform = MultiCrop([8], [2], [0.5], [1.0])
    loader = training_loader(Whereabouts(), transform, 2, workers=2, cut_only=cut_only)
    first, second = ({label for _, labels in loader for label in labels.tolist()} for _ in range(2))
    assert first == second and len(first) == 2
    assert all(label % 1000 == 1 and label // 1000 != os.getpid() for label in first)


@pytest.mark.parametrize("workers, world_size", [(1, 1), (2, 1), (0, 2), (2, 2), (0, 4)])
def test_crops_do_not_depend_on_workers_and_processes(workers, world_size):
    expected, others = loaders(), loaders(workers=workers, world_size=world_size)
    for epoch in (0, 3):
        crops, other_crops = crops_by_image(expected, epoch), crops_by_image(others, epoch)
        assert sorted(crops) == sorted(other_crops) == list(range(12))
        assert all(equal(crops[index], other_crops[index]) for index in crops)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("workers, world_size", [(0, 1), (2, 1), (0, 2)])
def test_crops_augmented_on_the_device_are_the_same(workers, world_size, device):
    pairs = zip(loaders(world_size=world_size), loaders(3, workers, world_size, cut_only=True), strict=True)
    for in_workers, on_device in pairs:
        on_device.dataset.seed = on_device.batch_sampler.seed = 0
        for loader in (in_workers, on_device):
            loader.batch_sampler.epoch = 3
        for (crops, labels), (batch, other_labels) in zip(in_workers, on_device, strict=True):
            assert all(pixels.dtype == torch.uint8 and pixels.is_contiguous() for pixels, _ in batch)
            stream = torch.cuda.Stream() if device == "cuda" else None
            options = dict(stream=stream, memory_format=torch.channels_last)
            placed = place_batch(batch, torch.device(device), **options)
            finished = place_batch(crops, torch.device(device), **options)
            assert torch.equal(labels, other_labels) and len(placed) == len(finished) == 5
            for ours, theirs in zip(placed, finished, strict=True):
                assert ours.is_contiguous(memory_format=torch.channels_last)
                torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4)


def test_large_images_are_cut_some_at_a_time(monkeypatch):
    (whole,), images = loaders(cut_only=True), []
    batches = list(whole)
    monkeypatch.setattr(data, "BYTES_AT_A_TIME", 2 * 3 * 40 * 40 - 1)
    cut = MultiCrop.cut
    monkeypatch.setattr(MultiCrop, "cut", lambda self, some, rngs: images.append(len(some)) or cut(self, some, rngs))
    (portioned,) = loaders(cut_only=True)
    for (batch, _), (other, _) in zip(batches, portioned, strict=True):
        assert all(torch.equal(a, b) for pair in zip(batch, other, strict=True) for a, b in zip(*pair, strict=True))
    assert images == [2] * 6


@pytest.mark.parametrize("image", [torch.rand(3, 8, 8), torch.zeros(1, 8, 8, dtype=torch.uint8)])
def test_tensors_that_are_no_images_are_refused(image):
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


def test_global_random_state_is_neither_used_nor_touched():
    images = SeededImages(numbered_images(3), MultiCrop(*TWO_SIZES), seed=5)
    crops, _ = images[2, 1]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = random.getstate(), str(np.random.get_state()), torch.get_rng_state()
    others, label = images[2, 1]
    assert equal(crops, others) and label == 1
    assert before[:2] == (random.getstate(), str(np.random.get_state()))
    assert torch.equal(before[2], torch.get_rng_state())


@pytest.mark.parametrize("workers", [0, 2])
def test_as_transform_of_another_dataset_it_repeats_with_torchs_seed(workers):
    images = torchvision.datasets.FakeData(4, (3, 48, 48), transform=MultiCrop(*TWO_SIZES))

    def crops(seed):
        torch.manual_seed(seed)
        return [crop for batch, _ in DataLoader(images, batch_size=2, num_workers=workers) for crop in batch]

    assert equal(crops(0), crops(0))
    assert not any(torch.equal(a, b) for a, b in zip(crops(0), crops(1), strict=True))


# Transforms of the probe


def test_centre_crop_is_torchvisions_resize_and_centre_crop():
    image = noise(90, 61)
    pixels = F.to_image(F.center_crop(F.resize(image, [32], antialias=True), [24, 24]))
    expected = (F.to_dtype(pixels, torch.float32, scale=True) - MEAN) / STD
    error = (CentreCrop(32, 24)(image) - expected.as_subclass(torch.Tensor)).abs() * STD * 255
    assert error.max() < 1.01 and error.mean() < 0.02  # torch resizes to within a step of Pillow


def test_probe_crop_cuts_and_flips_but_leaves_colours():
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


# Order


@pytest.mark.parametrize("images, world_size", [(100, 1), (100, 4), (103, 4), (119, 2)])
def test_each_image_comes_at_most_once_an_epoch_and_an_incomplete_batch_is_dropped(images, world_size):
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
def test_the_global_batch_of_a_step_does_not_depend_on_the_processes(world_size):
    assert global_batches(world_size) == global_batches(1)


def test_the_order_is_shuffled_anew_by_epoch_and_seed_alone():
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


# Image files


def save(path, colour=(1, 2, 3), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 12), colour).convert(mode).save(path, **options)


def test_image_files_are_found_at_any_depth_in_order_of_path(tmp_path):
    for name in ("b.png", "a.JPG", "0/er/c.jpeg", "0/D.WebP", ".hidden.png"):
        save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "0" / "png").write_text("no image")
    images = ImageFiles(tmp_path)
    names = [path.removeprefix(f"{tmp_path}/") for path in images.paths]
    assert names == ["0/D.WebP", "0/er/c.jpeg", "a.JPG", "b.png"] and len(images) == 4
    assert all(label == -1 for _, label in images)


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="Linux tells a process's own memory")
@pytest.mark.parametrize("kind", [ImageFiles, LabelledImageFiles])
def test_a_worker_that_reads_paths_copies_none(kind, tmp_path, monkeypatch):
    (tmp_path / "cats").mkdir()
    names = [f"{i:080d}.png" for i in range(100_000)]
    monkeypatch.setattr(os, "walk", lambda root, **_: [(str(root), [], names)])
    images = kind(tmp_path)
    assert len(images) == len(names)
    paths = images.paths

    def own_bytes():
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty"))

    worker = os.fork()
    if worker == 0:
        before = own_bytes()
        for i in range(len(paths)):
            paths[i]
        os._exit(own_bytes() - before > 4_000_000)  # a list's would take 17 MB
    assert os.waitpid(worker, 0)[1] == 0


def test_hidden_files_and_folders_are_no_images_in_training_nor_judging(tmp_path):
    for split in ("train", "val"):
        for name in (
            "cats/0.png",
            "dogs/0.png",
            "dogs/._0.png",
            ".cache/0.png",
            ".cache/dogs/0.png",
            "cats/.cache/0.png",
        ):
            save(tmp_path / split / name)
    assert len(open_images("folder", tmp_path)) == 2
    labelled = open_images("folder", tmp_path, "train")
    assert len(labelled) == 2 and labelled.classes == ["cats", "dogs"]


def test_a_folder_that_cannot_be_read_is_said(tmp_path, monkeypatch):
    save(tmp_path / "open" / "0.png")
    save(tmp_path / "closed" / "0.png")
    scandir = os.scandir

    def closed(folder):
        if str(folder).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.warns(UserWarning, match="^data_path: .*closed is left out: Permission denied"):
        assert len(ImageFiles(tmp_path)) == 1


def test_sixteen_bits_are_scaled_to_eight_and_more_are_refused(tmp_path):
    values = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(values).save(tmp_path / "16.png")
    Image.fromarray(values).save(tmp_path / "16.tif")
    (tmp_path / "16.pgm").write_bytes(b"P5 256 256 65535\n" + values.byteswap().tobytes())
    expected = torch.from_numpy((values / 257 + 0.5).astype(np.uint8))
    for name in ("16.png", "16.tif", "16.pgm"):
        pixels = read_image(str(tmp_path / name))
        assert pixels.shape == (3, 256, 256) and all(torch.equal(channel, expected) for channel in pixels), name
    for kind in (np.int32, np.float32):
        Image.fromarray(values.astype(kind)).save(tmp_path / "32.tif")
        with pytest.raises(ValueError, match="^data_path: cannot read .*32.tif .*expected 8 or 16 bits a channel"):
            read_image(str(tmp_path / "32.tif"))


def test_jpeg_files_are_read_as_pillow_reads_them(tmp_path):
    smooth = noise(9, 7).resize((61, 47), Image.Resampling.BICUBIC)
    for name, image, options in (
        ("rgb.jpg", smooth, {}),
        ("progressive.jpg", smooth, dict(progressive=True)),
        ("grey.jpg", smooth.convert("L"), {}),
        ("cmyk.jpg", smooth.convert("CMYK"), {}),
    ):
        image.save(tmp_path / name, quality=95, **options)
        pixels = read_image(tmp_path / name)
        assert pixels.dtype == torch.uint8 and image_size(tmp_path / name) == (61, 47)
        expected = np.array(Image.open(tmp_path / name).convert("RGB")).transpose(2, 0, 1).astype(int)
        assert np.abs(pixels.numpy() - expected).max() <= 3, name
    content = (tmp_path / "rgb.jpg").read_bytes()
    (tmp_path / "more.jpg").write_bytes(content + b"appended")
    assert torch.equal(read_image(tmp_path / "more.jpg"), to_pixels(Image.open(tmp_path / "rgb.jpg")))


def test_the_typical_side_is_the_median_read_from_headers_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "read_image", lambda _: pytest.fail("decoded"))
    for i, side in enumerate((10, 12, 40)):
        (tmp_path / "val" / "a").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (50, side)).save(tmp_path / "val" / "a" / f"{i}.png")
    assert typical_side(open_images("folder", tmp_path, "val")) == typical_side(ImageFiles(tmp_path)) == 12
    assert typical_side(ImageArrays(np.zeros((3, 9, 7, 3), np.uint8), np.zeros(3, int))) == 7


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1"])
def test_images_of_any_mode_become_rgb(tmp_path, mode):
    save(tmp_path / "image.png", (255, 255, 255), mode)
    pixels, _ = ImageFiles(tmp_path)[0]
    assert pixels.shape == (3, 12, 20) and pixels.dtype == torch.uint8 and (pixels == 255).all()


@pytest.mark.parametrize("kind", ["missing", "empty", "file"])
def test_a_path_without_images_is_refused_by_name(tmp_path, kind):
    path = tmp_path / kind
    if kind == "empty":
        path.mkdir()
    if kind == "file":
        save(path.with_suffix(".png"))
        path = path.with_suffix(".png")
    for call in (ImageFiles, lambda path: open_images("folder", path)):
        with pytest.raises(ValueError, match=f"^data_path: .*{path.name}"):
            call(path)


def encoded(format):
    file = io.BytesIO()
    noise().save(file, format)
    return bytearray(file.getvalue())


def vast_bmp():
    content = encoded("bmp")
    content[18:26] = struct.pack("<ii", 60000, 60000)  # width and height
    return content


UNREADABLE = {
    "text.jpg": lambda: b"no image",
    "empty.png": lambda: b"",
    "cut short.jpg": lambda: encoded("jpeg")[:500],
    "cut short.png": lambda: encoded("png")[:500],
    "wrong chunk.png": lambda: encoded("png").replace(b"IDAT", b"I\xa1AT"),
    "wrong header.ppm": lambda: b"P6 2x0 200 255 ",
    "vast.bmp": vast_bmp,
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_an_unreadable_image_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(UNREADABLE[name]())
    with pytest.raises(ValueError, match=f"^data_path: .*{name}"):
        ImageFiles(tmp_path)[0]


# Images in memory


@pytest.fixture
def cached(tmp_path):
    """(files, the same in memory): five images of different sizes."""
    rng = np.random.default_rng(0)
    for i in range(5):
        Image.fromarray(rng.integers(0, 256, (8 + i, 11, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    files = ImageFiles(tmp_path)
    memory = tmp_path / "memory"
    images = CachedImages(files, [image_size(path) for path in files.paths], str(memory))
    memory.unlink()
    return files, images


def test_images_in_memory_are_those_of_the_files_and_read_once(cached, monkeypatch):
    files, images = cached
    expected = [files[i][0] for i in range(5)]
    for _ in range(2):
        assert len(images) == 5 and all(torch.equal(images[i][0], expected[i]) and images[i][1] == -1 for i in range(5))
        monkeypatch.setattr(data, "read_image", None)


def test_what_a_worker_reads_is_in_memory_for_all(cached, monkeypatch):
    files, images = cached
    expected = [files[i][0] for i in range(5)]
    loader = training_loader(images, MultiCrop([8], [1], [0.5], [1.0]), 5, workers=2, cut_only=True)
    assert len(list(loader)) == 1
    monkeypatch.setattr(data, "read_image", None)
    assert all(torch.equal(images[i][0], expected[i]) for i in range(5))


def test_the_size_in_memory_is_known_before(cached):
    files, images = cached
    needed, allowed = cached_size(files)
    assert needed == sum(3 * 11 * (8 + i) for i in range(5)) == images.ends[-1] - 5 and allowed > 2**20
    assert cached_size(files, share=1e-9) == (needed, pytest.approx(allowed * 4e-9, abs=10))
    assert cached_size(numbered_images(3)) == (0, 0)


@pytest.mark.parametrize(
    "groups, limits, expected",
    [
        ("0::/job/step\n", {"job/memory.max": "4096", "job/step/memory.max": "max"}, 4096),
        ("0::/\n", {"memory.max": "512"}, 512),
        ("5:devices:/a\n4:memory:/a/b\n0::/\n", {"memory/memory.limit_in_bytes": "99", "memory/a/b/other": "1"}, 99),
        ("0::/job\n", {"job/memory.max": "max"}, math.inf),
    ],
)
def test_memory_is_limited_by_every_control_group_above(groups, limits, expected, monkeypatch):
    files = {"/proc/self/cgroup": groups} | {f"/sys/fs/cgroup/{name}": text for name, text in limits.items()}

    def read_text(path):
        if str(path) not in files:
            raise FileNotFoundError(path)
        return files[str(path)]

    monkeypatch.setattr(Path, "read_text", read_text)
    assert data.memory_limit() == expected


def test_a_cache_takes_its_share_of_what_control_groups_leave(cached, monkeypatch):
    monkeypatch.setattr(data, "memory_limit", lambda: 4000)
    assert cached_size(cached[0])[1] == 1000


def test_memory_of_freed_tensors_is_used_again():
    code = (
        "import resource, torch, data\n"
        "def faults():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    for _ in range(20): torch.ones(2**22)\n"  # 16 MiB, 4096 pages
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "data.keep_freed_memory(); faults(); print(faults())"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert platform.libc_ver()[0] != "glibc" or int(result.stdout) < 4096


def test_large_freed_tensors_are_given_back_so_that_the_gaps_they_leave_cannot_add_up():
    code = (
        "import resource, torch, data\n"
        "def resident(): return int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize() // 2**20\n"
        "data.keep_freed_memory(); large = torch.ones(2**24); before = resident()\n"  # 64 MiB
        "del large; print(before - resident())"
    )
    if sys.platform == "linux":
        result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        assert int(result.stdout) > 48


@pytest.fixture
def labelled(tmp_path):
    """train/ with 2 + 1 images of the classes cat and dog, val/ with 1 + 1."""
    for name in ("train/cat/0.png", "train/cat/1.png", "train/dog/0.png", "val/cat/0.png", "val/dog/0.png"):
        save(tmp_path / name)
    return tmp_path


def test_pretraining_on_a_folder_with_splits_takes_its_train_folder_alone(labelled):
    assert len(open_images("folder", labelled)) == 3
    assert len(open_images("folder", labelled / "train")) == 3
    (labelled / "val").rename(labelled / "other")
    assert len(open_images("folder", labelled)) == 5


@pytest.mark.parametrize("below", ["", "train", "train/"])
def test_labelled_splits_are_found_from_the_folder_or_from_its_train_folder(labelled, below):
    for split, expected in (("train", [0, 0, 1]), ("val", [0, 1])):
        images = open_images("folder", f"{labelled}/{below}", split)
        assert [label for _, label in images] == expected and images.classes == ["cat", "dog"]
        assert images[0][0].shape == (3, 12, 20)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_missing_split_and_one_without_class_folders_are_refused(labelled, split):
    (labelled / split).rename(labelled / "other")
    with pytest.raises(ValueError, match=f"^data_path: .*{split}"):
        open_images("folder", labelled, split)
    save(labelled / split / "flat.png")
    with pytest.raises(ValueError, match=f"^data_path: .*{split}"):
        open_images("folder", labelled, split)


# Named sets


def write_fashion_mnist(folder):
    """The four files, with 6 images to train on and 3 to validate; pixels and labels are those of the generator."""
    rng, contents = np.random.default_rng(0), {}
    for prefix, count in (("train", 6), ("t10k", 3)):
        pixels = rng.integers(0, 4, (count, 28, 28), dtype=np.uint8)
        labels = rng.integers(0, 10, count, dtype=np.uint8)
        images_header = struct.pack(">iiii", 2051, count, 28, 28)
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images_header + pixels.tobytes()))
        labels_header = struct.pack(">ii", 2049, count)
        (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels_header + labels.tobytes()))
        contents[prefix] = pixels, labels
    return contents


@pytest.mark.parametrize("split, prefix", [("pretrain", "train"), ("train", "train"), ("val", "t10k")])
def test_fashion_mnist_is_read_from_its_four_files(tmp_path, split, prefix):
    pixels, labels = write_fashion_mnist(tmp_path)[prefix]
    images = open_images("fashion_mnist", tmp_path, split)
    assert len(images) == len(pixels)
    for index, (image, label) in enumerate(images[i] for i in range(len(images))):
        assert label == labels[index] and np.array_equal(image, np.repeat(pixels[index][None], 3, axis=0))


CORRUPT = {
    "no gzip": lambda content: b"no gzip",
    "empty": lambda content: b"",
    "cut short": lambda content: content[: len(content) // 2],
    "header alone": lambda content: gzip.compress(bytes(3)),
    "checksum": lambda content: content[:-8] + bytes(8),
    "overwritten": lambda content: content[:40] + bytes(40) + content[80:],
    "part of an image": lambda content: gzip.compress(gzip.decompress(content)[:-5]),
}


@pytest.mark.parametrize("damage", CORRUPT)
def test_a_corrupt_fashion_mnist_file_is_named(tmp_path, damage):
    write_fashion_mnist(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(CORRUPT[damage](path.read_bytes()))
    with pytest.raises(ValueError, match=f"^data_path: .*{path.name}"):
        open_images("fashion_mnist", tmp_path, "train")


def test_a_missing_fashion_mnist_file_is_named(tmp_path):
    write_fashion_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(ValueError, match="^data_path: .*t10k-labels-idx1-ubyte.gz"):
        open_images("fashion_mnist", tmp_path, "val")


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "stl10", "fashion_mnist"])
@pytest.mark.parametrize("split", ["pretrain", "val"])
def test_a_named_set_that_is_not_there_is_refused_without_download(tmp_path, dataset, split):
    with pytest.raises(ValueError, match=f"^data_path: {dataset} is not in .*nowhere"):
        open_images(dataset, tmp_path / "nowhere", split)


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("dataset", ("imagenet", "somewhere")),
        ("split", ("shapes", None, "test")),
        ("data_path", ("folder",)),
        ("data_path", ("cifar10", None)),
    ],
)
def test_unknown_sets_and_splits_and_a_missing_path_are_refused_by_name(name, arguments):
    with pytest.raises(ValueError, match=f"^{name}: "):
        open_images(*arguments)


# Shapes


def test_shapes_are_the_same_in_every_call_and_differ_by_split_and_index():
    assert all(np.array_equal(draw_shape("train", i)[0], draw_shape("train", i)[0]) for i in range(10))
    drawn = [draw_shape(split, i)[0].tobytes() for split in ("train", "val") for i in range(40)]
    assert len(set(drawn)) == 80


def test_the_first_shape_is_the_stored_one():
    # Means over squares of 16 pixels. Sines differ in the last bit from processor to processor, which moves a pixel
    # here and there by one of its 255 steps.
    stored = [
        [148.56, 131.51, 112.68, 102.80],
        [167.07, 163.49, 125.14, 135.73],
        [142.56, 154.52, 136.43, 131.55],
        [94.32, 122.37, 131.71, 139.95],
    ]
    image, label = draw_shape("train", 0)
    assert label == 0 and image.shape == (64, 64, 3) and image.dtype == np.uint8
    np.testing.assert_allclose(image.reshape(4, 16, 4, 16, 3).mean(axis=(1, 3, 4)), stored, rtol=0, atol=0.02)


@pytest.mark.parametrize("split, count", [("pretrain", 30), ("train", 30), ("val", 20)])
def test_shapes_are_small_colour_images_with_balanced_labels(monkeypatch, split, count):
    assert all(full % len(data.SHAPES_CLASSES) == 0 for full in data.SHAPES_COUNTS.values())
    monkeypatch.setattr(data, "SHAPES_COUNTS", {"train": 30, "val": 20})
    images = open_images("shapes", split=split)
    assert images.pixels.shape == (count, 64, 64, 3) and images.pixels.dtype == np.uint8
    assert np.bincount(images.labels).tolist() == [count // 10] * 10 and len(images.classes) == 10
    image, label = images[3]
    assert image.shape == (3, 64, 64) and label == images.labels[3]
    drawn, _ = draw_shape("val" if split == "val" else "train", 3)
    assert np.array_equal(image.permute(1, 2, 0), drawn)
