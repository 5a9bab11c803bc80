"""features.py: kNN, logistic regression, BatchNorm statistics, what images show, quality without labels."""

import math
import os

import numpy as np
import pytest
import torch
from conftest import run_processes
from PIL import Image, ImageDraw, ImageFont
from torch.nn import functional as F

import features
from data import LEFT_OUT, CentreCrop, MultiCrop, UnreadableImage, normalize
from defaults import kind_of_images
from features import (
    accuracies,
    accuracy_by_class,
    class_of,
    describe_images,
    extract_features,
    knn,
    knn_images,
    lidar,
    logistic_regression,
    measure_knn,
    measure_quality,
    neighbour_agreement,
    quality_crops,
    quality_epochs,
    rankme,
    recompute_batchnorm,
    some_images,
    to_uint8,
    tracked_images,
    trivial_r2,
    unique_prototypes,
)
from images import ImageArrays, open_images
from launch import RunStopped
from model import ResNet, SwAV


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
        options = dict(device=torch.device("cpu"), title="", batch_size=batch_size, **loading)
        recompute_batchnorm(backbone, images, transform, **options)
        maps = backbone.conv1(torch.stack([transform(image) for image, _ in images]))
        if tolerance is None:  # batches of two images
            assert (backbone.bn1.running_mean != 0).all()
        else:
            variance = maps.var((0, 2, 3))
            torch.testing.assert_close(backbone.bn1.running_var, variance, rtol=tolerance, atol=1e-4)
            shift = (backbone.bn1.running_mean - maps.mean((0, 2, 3))) / variance.sqrt()
            assert shift.abs().max() < tolerance


def test_each_of_many_processes_tracks_at_least_one_image():
    images = ImageArrays(np.zeros((1100, 8, 8, 3), dtype=np.uint8), np.zeros(1100))
    counts = [len(tracked_images(images, 8, rank, 512)) for rank in (0, 255, 256, 511)]
    assert counts == [1, 1, 1, 1]
    assert [len(tracked_images(images, 8, rank, 2)) for rank in (0, 1)] == [28, 27]  # 55 together, a twentieth


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


@pytest.mark.parametrize("value", [0, 128, 255])
def test_images_of_one_value_are_described(value):
    images = ImageArrays(np.full((3, 20, 30, 3), value, np.uint8), np.zeros(3))
    assert all(math.isfinite(share) for share in describe_images(images).values())


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


MULTI_CROP = MultiCrop([16, 8], [2, 3], [0.4, 0.2], [1, 0.5])


def test_measures_of_quality_take_less_than_two_percent_of_a_run():
    for images in (50, 1000, 3452, 100_000):
        measured = 4 * min(1000, images)  # forward passes of large crops
        epoch = 3 * images * (2 + 3 / 4)
        for epochs in (1, 10, 50, 400):
            chosen = quality_epochs(epochs, None, images=images, multi_crop=MULTI_CROP)
            assert len(chosen) * measured <= 0.016 * epochs * epoch
            assert not chosen or chosen[0] == epochs
    assert list(quality_epochs(3, 4, images=50, multi_crop=MULTI_CROP)) == [3]
    assert list(quality_epochs(10, 4, images=50, multi_crop=MULTI_CROP)) == [10, 6, 2]
    assert not quality_epochs(10, 0, images=50, multi_crop=MULTI_CROP)


def quality(rank: int, world_size: int) -> dict[str, float]:
    images = photographs(101)
    torch.manual_seed(0)
    model = SwAV("resnet18", 16, 8, 12, width=8, blocks=[1, 1, 1, 1], stem="small")
    crops = quality_crops(images, MULTI_CROP, rank, world_size)
    assert crops[0].shape[1:] == (4, 3, 16, 16) and crops[0].dtype == torch.uint8
    measured = measure_quality(model, crops, torch.device("cpu"), batch_size=17)
    assert model.training
    return measured


def test_quality_is_the_same_on_any_number_of_processes():
    alone = quality(0, 1)
    assert alone.keys() == {"rankme", "lidar", "unique_prototypes", "neighbour_agreement", "trivial_r2"}
    for shared in run_processes(quality, 2):
        assert shared == pytest.approx(alone, rel=1e-4)


def test_quality_of_embeddings_that_are_not_finite_or_too_few_is_none():
    model = SwAV("resnet18", 16, 40, 12, width=8, blocks=[1, 1, 1, 1], stem="small")
    crops = quality_crops(photographs(30), MULTI_CROP)
    measured = measure_quality(model, crops, torch.device("cpu"), batch_size=30)
    assert measured["lidar"] is None and measured["rankme"] >= 1  # 40 dimensions
    with torch.no_grad():
        model.projection_head[0].weight[0, 0] = torch.nan
    assert set(measure_quality(model, crops, torch.device("cpu"), batch_size=30).values()) == {None}


def test_each_of_many_processes_measures_at_least_one_image():
    images = ImageArrays(np.zeros((1100, 17, 17, 3), dtype=np.uint8), np.zeros(1100))
    assert [len(quality_crops(images, MULTI_CROP, rank, 1024)[0]) for rank in (0, 1023)] == [1, 1]


def test_images_are_chosen_from_all_classes_in_random_order():
    labels = np.arange(5000) % 10
    for order in (labels, np.sort(labels)):
        for half in (some_images(5000, 1000)[:500], some_images(5000, 1000)[500:]):
            assert (np.bincount(order[half], minlength=10) > 25).all()
    assert sorted(some_images(7, 100)) == list(range(7))


# kNN while a run trains


def split(count: int, seed: int) -> ImageArrays:
    """Images of noise with a dark half: class 0 above, class 1 below; every tenth without a label."""
    pixels = np.random.default_rng(seed).integers(128, 256, size=(count, 20, 30, 3), dtype=np.uint8)
    labels = np.arange(count) % 2
    for image, label in zip(pixels, labels, strict=True):
        image[10 * label : 10 * label + 10] //= 8
    labels[::10] = -1
    return ImageArrays(pixels, labels, ["above", "below"])


class Pixels(torch.nn.Module):
    def features(self, images: torch.Tensor) -> torch.Tensor:
        assert not self.training
        return images.flatten(1)


def knn_of_pixels(rank: int, world_size: int, sizes: list[int], shift: int) -> dict:
    train_images, val_images = split(sizes[0], 0), split(sizes[1], 1)
    val_images.labels = np.where(val_images.labels < 0, -1, (val_images.labels + shift) % 2)
    held = knn_images(train_images, val_images, CentreCrop(20, 20), rank, world_size)
    return measure_knn(Pixels().train(), held, torch.device("cpu"), batch_size=7)


def test_knn_is_measured_on_labelled_images_of_both_splits_by_any_number_of_processes():
    state = torch.get_rng_state()
    assert knn_of_pixels(0, 1, [60, 31], 0) == {"knn": 100.0}
    assert knn_of_pixels(0, 1, [60, 31], 1) == {"knn": 0.0}
    assert torch.equal(torch.get_rng_state(), state)
    assert run_processes(knn_of_pixels, 2, [61, 32], 0) == [{"knn": 100.0}] * 2


def test_at_most_so_many_images_are_held_and_they_are_those_of_evaluation(monkeypatch):
    monkeypatch.setattr(features, "KNN_IMAGES", (20, 10))
    (pixels, labels), (val_pixels, val_labels) = knn_images(split(90, 0), split(90, 1), CentreCrop(20, 20))
    assert (len(pixels), len(val_pixels)) == (20, 10) and min(labels.min(), val_labels.min()) == 0
    assert pixels.dtype == torch.uint8
    chosen = [i for i in some_images(90, 90) if i % 10][:20]
    for i, image in zip(chosen, pixels, strict=True):
        assert torch.equal(image, split(90, 0)[i][0][:, :, 5:25])


def test_knn_is_left_out_without_labels_or_common_classes_and_none_where_features_are_not_finite():
    crop, images = CentreCrop(20, 20), split(20, 0)
    others = ImageArrays(images.pixels, images.labels, ["left", "right"])
    assert knn_images(images, others, crop) is None
    assert knn_images(ImageArrays(images.pixels, np.full(20, -1)), images, crop) is None
    assert knn_images(images, split(3, 0), crop, 0, 8) is None
    assert measure_knn(Pixels(), None, torch.device("cpu"), 4) == {}
    pixels = Pixels()
    pixels.features = lambda images: images.flatten(1) / 0
    assert measure_knn(pixels, knn_images(images, images, crop), torch.device("cpu"), 4) == {"knn": None}


def test_images_that_cannot_be_read_are_left_out_of_knn():
    class Unreadable(ImageArrays):
        def __getitem__(self, index):
            if index < 15:
                raise UnreadableImage("gone")
            return super().__getitem__(index)

    images = split(40, 0)
    held = knn_images(Unreadable(images.pixels, images.labels, images.classes), images, CentreCrop(20, 20))
    assert (held[0][1] == LEFT_OUT).sum() == 13  # two of the 15 have no label
    assert measure_knn(Pixels(), held, torch.device("cpu"), 9) == {"knn": 100.0}
    nothing = [(pixels, torch.full_like(labels, LEFT_OUT)) for pixels, labels in held]
    assert measure_knn(Pixels(), nothing, torch.device("cpu"), 9) == {"knn": None}


def test_classes_of_files_are_their_first_folder(tmp_path):
    for path in ("a b/deep/x.png", "a b/y.png", "c/z.png", "top.png"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(tmp_path / path)
    images = open_images("folder", tmp_path)
    named = {os.path.basename(images.paths[i]): class_of(images, i) for i in range(4)}
    assert named == {"x.png": "a b", "y.png": "a b", "z.png": "c", "top.png": None}
    assert class_of(split(20, 0), 1) == "below" and class_of(split(20, 0), 0) is None
    assert class_of(torch.utils.data.TensorDataset(torch.zeros(1)), 0) is None


def test_to_uint8_undoes_normalising():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(3, -1, -1)
    assert torch.equal(to_uint8(normalize(pixels.float().clone())), pixels)
