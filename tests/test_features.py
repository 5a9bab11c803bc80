"""features.py: kNN, logistic regression, BatchNorm statistics, what images show, quality without labels."""

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.nn import functional as F

from data import CentreCrop
from defaults import MIRROR_IMAGES, kind_of_images
from features import (
    accuracies,
    accuracy_by_class,
    describe_images,
    extract_features,
    knn,
    lidar,
    logistic_regression,
    neighbour_agreement,
    rankme,
    recompute_batchnorm,
    some_images,
    trivial_r2,
    unique_prototypes,
)
from images import ImageArrays, open_images
from launch import RunStopped
from model import ResNet


def test_classifiers_separate_what_is_linearly_separable():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 3
    features = torch.eye(3)[labels] * 4 + torch.randn(300, 3, generator=generator)
    split = features[:200], labels[:200], features[200:]
    for scores in (knn(*split, classes=3), logistic_regression(*split, classes=3)):
        assert accuracies(scores, labels[200:])["top1"] > 90
    padded = F.pad(features, (0, 2**15 - 3))  # so wide that 200 rows are split into two chunks
    in_chunks = logistic_regression(padded[:200], labels[:200], padded[200:], classes=3)
    torch.testing.assert_close(in_chunks, scores, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_features_that_are_not_finite_are_refused(bad):
    def network(images):
        features = images.mean((2, 3))
        features[images[:, 0].amax((1, 2)) > 2] = bad  # the white image
        return features

    pixels = np.zeros((9, 8, 8, 3), np.uint8)
    pixels[5] = 255
    arrays, transform, cpu = ImageArrays(pixels, np.zeros(9)), CentreCrop(8, 8), torch.device("cpu")
    with pytest.raises(RunStopped, match="features of 1 of 9 training images are inf or nan") as stopped:
        extract_features(network, arrays, transform, cpu, "training images", batch_size=4)
    assert stopped.value.code == 4


def test_knn_weights_votes_by_similarity():
    train_features = torch.tensor([[1.0, 0.0], [0.9, 0.5], [0.9, -0.5], [-1.0, 0.0]])
    scores = knn(train_features, torch.tensor([0, 1, 1, 2]), torch.tensor([[2.0, 0.0]]), classes=3, k=3)
    neighbour = math.exp((0.9 / math.hypot(0.9, 0.5) - 1) / 0.07)
    torch.testing.assert_close(scores, torch.tensor([[1.0, 2 * neighbour, 0.0]]))


def clusters(count: int, classes: int = 4, dimensions: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Overlapping clouds of features [N, F] around a random point for each class, with labels [N]."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (count,), generator=generator)
    centres = torch.randn(classes, dimensions, generator=generator)
    return centres[labels] + 1.5 * torch.randn(count, dimensions, generator=generator), labels


@pytest.mark.parametrize("k", [1, 20, 1000])
def test_knn_is_the_weighted_vote(k):
    features, labels = clusters(900)
    train, val = features[:600].double(), features[600:].double()
    scores = knn(train, labels[:600], val, classes=4, k=k)
    a, b = train.numpy(), val.numpy()
    cosines = (b / np.linalg.norm(b, axis=1, keepdims=True)) @ (a / np.linalg.norm(a, axis=1, keepdims=True)).T
    expected = np.zeros((300, 4))
    for i, row in enumerate(cosines):
        for j in sorted(range(600), key=lambda j: -row[j])[:k]:
            expected[i, labels[j]] += math.exp((row[j] - row.max()) / 0.07)
    np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-10)
    neighbors = pytest.importorskip("sklearn.neighbors")
    theirs = neighbors.KNeighborsClassifier(
        min(k, 600), metric="cosine", weights=lambda distances: np.exp(-distances / 0.07)
    ).fit(a, labels[:600].numpy())
    assert (theirs.predict(b) == scores.argmax(1).numpy()).all()


def test_logistic_regression_is_that_of_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model")
    features, labels = clusters(3000)
    features = features * torch.linspace(0.1, 10, 16) + 3  # of different scales
    scores = logistic_regression(features[:1000], labels[:1000], features[1000:], classes=4)
    mean, std = features[:1000].mean(0), features[:1000].std(0)
    train, val = ((part - mean) / std for part in features.split([1000, 2000]))
    theirs = linear_model.LogisticRegression(C=1, max_iter=1000).fit(train.numpy(), labels[:1000].numpy())
    top1 = accuracies(scores, labels[1000:])["top1"]
    assert abs(top1 - 100 * theirs.score(val.numpy(), labels[1000:].numpy())) < 0.5
    np.testing.assert_allclose(scores.softmax(1).numpy(), theirs.predict_proba(val.numpy()), atol=0.01)


@pytest.mark.parametrize(
    ("right", "count", "expected"),  # of statsmodels.stats.proportion.proportion_confint(method="wilson")
    [(50, 100, (40.383, 59.617)), (0, 10, (0, 27.753)), (10, 10, (72.247, 100)), (3000, 3925, (75.079, 77.736))],
)
def test_the_interval_of_an_accuracy(right, count, expected):
    labels = torch.arange(count) % 7
    scores = torch.nn.functional.one_hot(torch.where(torch.arange(count) < right, labels, labels + 1), 8).float()
    row = accuracies(scores, labels)
    assert row["top1"] == pytest.approx(100 * right / count)
    assert row["top1_interval"] == pytest.approx(expected, abs=2e-3)
    assert row["top5_interval"][0] <= row["top5"] <= row["top5_interval"][1]


def test_the_accuracy_of_each_class():
    labels, taken_for = torch.tensor([0, 0, 0, 0, 1, 1]), torch.tensor([0, 2, 2, 1, 1, 1])
    rows = accuracy_by_class(F.one_hot(taken_for, 3).float(), labels, ["a", "b", "c"])
    assert [(row["images"], row["top1"], row["taken_for"]) for row in rows] == [
        (4, 25, "c"),
        (2, 100, None),
        (0, None, None),
    ]
    assert rows[0]["taken_for_share"] == 50


def test_knn_accepts_any_temperature():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 4
    features = 1 + 0.1 * torch.eye(4)[labels] + 0.02 * torch.randn(200, 4, generator=generator)
    for temperature in (0.07, 0.01, 1e-4):
        scores = knn(features, labels, features, classes=4, temperature=temperature)
        assert scores.isfinite().all() and accuracies(scores, labels)["top1"] > 95


def test_features_that_are_constant_in_training_do_not_count_in_validation():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 3
    features = torch.eye(3)[labels] * 4 + torch.randn(300, 3, generator=generator)
    border = torch.full((300, 50), 0.9)
    border[200:, ::7] = 0.1
    split = torch.cat([features, border], dim=1)[:200], labels[:200], torch.cat([features, border], dim=1)[200:]
    scores = logistic_regression(*split, classes=3)
    torch.testing.assert_close(scores, logistic_regression(features[:200], labels[:200], features[200:], classes=3))


def test_batchnorm_statistics_are_those_of_all_images_in_any_order():
    """Dark images come before bright ones, and their number leaves a small batch at the end."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 60, (65, 16, 16, 3), generator=generator, dtype=torch.uint8)
    pixels[33:] += 180
    images = ImageArrays(pixels.numpy(), np.zeros(65, dtype=np.int64))
    transform, loading = CentreCrop(16, 16), dict(rank=0, world_size=1, workers=0)
    for batch_size, tolerance in ((16, 0.35), (64, 0.05), (100, 1e-4), (1, None)):
        backbone = ResNet("resnet18", width=8, blocks=[1, 1, 1, 1], stem="small")
        options = dict(device=torch.device("cpu"), batch_size=batch_size, **loading)
        recompute_batchnorm(backbone, images, transform, **options)
        maps = backbone.conv1(torch.stack([transform(image) for image, _ in images]))
        if tolerance is None:  # batches of two images
            assert (backbone.bn1.running_mean != 0).all()
        else:
            variance = maps.var((0, 2, 3))
            torch.testing.assert_close(backbone.bn1.running_var, variance, rtol=tolerance, atol=1e-4)
            shift = (backbone.bn1.running_mean - maps.mean((0, 2, 3))) / variance.sqrt()
            assert shift.abs().max() < tolerance


# What the images are


def photographs(count: int, side: int = 48) -> ImageArrays:
    """Coloured noise whose amplitude falls as 1 / frequency, as in photographs (Field 1987), with shared colours."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side)[None])
    frequency[0, 0] = 1 / side
    fields = np.fft.ifft2(np.fft.fft2(rng.standard_normal((count, 4, side, side))) / frequency).real
    fields /= fields.std((2, 3), keepdims=True)
    colours = fields[:, :3] * 15 + fields[:, 3:] * 40 + 120
    return ImageArrays(colours.clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1), np.zeros(count))


def letters(count: int, side: int = 32, spread: int = 0, paper: int = 0) -> ImageArrays:
    """Letters in many sizes; spread: shift them by up to this many pixels; paper: std of noise on the white ground."""
    rng, pixels = np.random.default_rng(0), []
    for i in range(count):
        image = Image.new("L", (side, side), 255)
        place = side // 2 + rng.integers(-spread, spread + 1, 2)
        font = ImageFont.load_default(size=int(rng.integers(side // 2, side)))
        ImageDraw.Draw(image).text(tuple(int(p) for p in place), "ABCDEFGHIJ"[i % 10], 0, font=font, anchor="mm")
        pixels.append(np.array(image) + paper * rng.standard_normal((side, side)))
    return ImageArrays(np.array(pixels).clip(0, 255).astype(np.uint8), np.zeros(count))


KINDS = {
    "photographs": (photographs(300), "photographs"),
    "few photographs": (photographs(12), "photographs"),
    "letters": (letters(200), "objects on a plain ground"),
    "letters anywhere": (letters(200, 64, spread=20), "objects on a plain ground"),
    "letters on paper": (letters(200, paper=6), "objects on a plain ground"),
    "white letters": (ImageArrays(255 - letters(200).pixels, np.zeros(200)), "objects on a plain ground"),
    "shapes": (open_images("shapes", split="val"), "textures"),
}


@pytest.mark.parametrize("name", KINDS)
def test_images_are_described_so_that_defaults_tell_what_they_show(name):
    images, kind = KINDS[name]
    described = describe_images(images)
    assert all(0 <= value <= 1 for value in described.values())
    assert kind_of_images(described) == kind
    assert describe_images(images) == described


def test_aligned_images_share_their_mean_image():
    faces, noise = photographs(200), photographs(200, 32)
    aligned = faces.pixels // 2 + photographs(1).pixels // 2
    described = describe_images(ImageArrays(aligned, faces.labels))
    assert kind_of_images(described) == "aligned objects" and describe_images(noise)["mean_image"] < 0.02


def test_mirror_images_of_letters_look_foreign_unless_the_set_holds_some():
    both = letters(200).pixels.copy()
    both[:100] = both[:100, :, ::-1]
    one_way, mixed = (describe_images(ImageArrays(pixels, np.zeros(200))) for pixels in (letters(200).pixels, both))
    assert one_way["mirror_images"] > 0.8 and 0.4 < mixed["mirror_images"] < MIRROR_IMAGES
    assert 0.4 < describe_images(photographs(200))["mirror_images"] < MIRROR_IMAGES


@pytest.mark.parametrize("value", [0, 128, 255])
def test_images_of_one_value_are_described(value):
    images = ImageArrays(np.full((3, 20, 30, 3), value, np.uint8), np.zeros(3))
    described = describe_images(images)
    assert all(math.isfinite(share) for share in described.values()) and described["mirror_images"] == 0.5


# Quality without labels


def test_rankme_is_the_number_of_directions_in_use():
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(200, 8, generator=generator)).Q  # orthonormal columns
    for rank in (1, 3, 8):
        assert rankme(basis[:, :rank] @ torch.eye(8)[:rank]) == pytest.approx(rank, rel=1e-4)
    assert rankme(torch.zeros(10, 4)) == pytest.approx(1)
    shares = torch.tensor([0.7, 0.2, 0.1])
    expected = math.exp(-(shares * shares.log()).sum())
    assert rankme(5 * basis[:, :3] * shares) == pytest.approx(expected, rel=1e-4)


def test_lidar_counts_directions_in_which_images_differ_more_than_their_crops():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2000, 1, 6, generator=generator)
    noise = torch.randn(2000, 4, 6, generator=generator)
    assert lidar(images + 0.1 * noise) == pytest.approx(6, rel=0.02)
    wide = torch.tensor([10.0, 10, 1, 1, 1, 1])
    assert lidar(images * wide + 0.1 * noise * wide) == pytest.approx(6, rel=0.02)  # whatever their scale
    some = torch.tensor([1.0, 1, 0, 0, 0, 0])
    assert lidar(images * some + 0.1 * noise) == pytest.approx(2, rel=0.1)
    assert math.isfinite(lidar(torch.zeros(20, 2, 6)))


@pytest.mark.parametrize("crops, most", [(50, 4.5), (4, 10)])
def test_lidar_does_not_count_the_noise_of_few_crops(crops, most):
    generator = torch.Generator().manual_seed(0)
    images, noise = torch.zeros(1000, 1, 128), torch.randn(1000, crops, 128, generator=generator)
    images[..., :4] = 3 * torch.randn(1000, 1, 4, generator=generator)
    assert 3.5 < lidar(images + noise) < most  # 38 with four crops whose noise is left in


def test_prototypes_within_the_distance_count_once():
    generator = torch.Generator().manual_seed(0)
    prototypes = F.normalize(torch.randn(20, 64, generator=generator), dim=1)
    near = prototypes + 0.1 * F.normalize(torch.randn(20, 64, generator=generator), dim=1)  # cosine distance 0.005
    assert unique_prototypes(prototypes) == 1
    assert unique_prototypes(torch.cat([prototypes, 3 * near])) == 0.5
    assert unique_prototypes(prototypes[:1].expand(50, -1)) == 1 / 50
    many = F.normalize(torch.randn(1500, 64, generator=generator), dim=1)  # more than a chunk
    assert unique_prototypes(many) == 1 and unique_prototypes(torch.cat([many, many.flip(0)])) == 0.5


def test_neighbours_agree_if_crops_do_and_by_chance_otherwise():
    first, second = torch.randn(2, 400, 16, generator=torch.Generator().manual_seed(0))
    assert neighbour_agreement(first, 2 * first) == 1
    assert neighbour_agreement(first, second) == pytest.approx(10 / 399, abs=0.01)
    assert neighbour_agreement(first, first + 0.1 * second) > 0.6
    assert neighbour_agreement(first[:9], second[:9]) < 1  # not all others are neighbours


def test_trivial_r2_is_the_share_that_colour_and_brightness_explain():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(600, 3, 16, 16, generator=generator) + 3 * torch.randn(600, 3, 1, 1, generator=generator)
    colours = images.mean((2, 3)) @ torch.randn(3, 8, generator=generator)
    noise = torch.randn(600, 8, generator=generator) * colours.std(0)
    assert trivial_r2(colours, images) > 0.99
    assert trivial_r2(colours + noise, images) == pytest.approx(0.5, abs=0.06)
    assert trivial_r2(noise, images) < 0.02
    grey = images[:, :1].expand(-1, 3, -1, -1)
    assert trivial_r2(grey.mean((2, 3)), grey) > 0.99
    assert trivial_r2(torch.ones(20, 4), images[:20]) == 0


def test_images_are_chosen_from_all_classes_in_random_order():
    labels = np.arange(5000) % 10
    for order in (labels, np.sort(labels)):
        for half in (some_images(5000, 1000)[:500], some_images(5000, 1000)[500:]):
            assert (np.bincount(order[half], minlength=10) > 25).all()
    assert sorted(some_images(7, 100)) == list(range(7))
