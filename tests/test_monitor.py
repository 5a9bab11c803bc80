"""What is measured while a run trains: the same on any number of processes, and none where it means nothing."""

from itertools import product

import numpy as np
import pytest
import torch
from conftest import run_processes

import monitor
from data import LEFT_OUT, CentreCrop, MultiCrop, UnreadableImage
from features import some_images
from images import ImageArrays
from model import SwAV
from monitor import knn_images, measure_knn, measure_quality, quality_crops, quality_epochs, tracked_images


def test_each_of_many_processes_tracks_at_least_one_image():
    images = ImageArrays(np.zeros((1100, 8, 8, 3), dtype=np.uint8), np.zeros(1100))
    counts = [len(tracked_images(images, 8, rank, 512)) for rank in (0, 255, 256, 511)]
    assert counts == [1, 1, 1, 1]
    assert [len(tracked_images(images, 8, rank, 2)) for rank in (0, 1)] == [28, 27]  # 55 together, a twentieth


MULTI_CROP = MultiCrop([16, 8], [2, 3], [0.4, 0.2], [1, 0.5])


def noise(count: int) -> ImageArrays:
    """Images of noise, each around a colour of its own."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(100, size=(count, 48, 48, 3)) + rng.integers(150, size=(count, 1, 1, 3))
    return ImageArrays(pixels.astype(np.uint8), np.zeros(count))


def test_measures_of_quality_take_less_than_two_percent_of_a_run():
    for images, knn_size in product((50, 1000, 3452, 100_000), (0, 16, 24)):
        measured = 4 * min(1000, images) + 3000 * (knn_size / 16) ** 2  # forward passes of large crops
        epoch = 3 * images * (2 + 3 / 4)
        for epochs in (1, 10, 50, 400):
            chosen = quality_epochs(epochs, None, images=images, multi_crop=MULTI_CROP, knn_size=knn_size)
            # MEASURED.md has the times: at most 1.9 %
            assert len(chosen) * measured <= 0.024 * epochs * epoch
            assert not chosen or chosen[0] == epochs
            assert len(chosen) == epochs or (len(chosen) + 1) * measured > 0.012 * epochs * epoch
    assert list(quality_epochs(3, 4, images=50, multi_crop=MULTI_CROP)) == [3]
    assert list(quality_epochs(10, 4, images=50, multi_crop=MULTI_CROP)) == [10, 6, 2]
    assert not quality_epochs(10, 0, images=50, multi_crop=MULTI_CROP)


def quality(rank: int, world_size: int) -> dict[str, float]:
    images = noise(101)
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
    crops = quality_crops(noise(30), MULTI_CROP)
    measured = measure_quality(model, crops, torch.device("cpu"), batch_size=30)
    assert measured["lidar"] is None and measured["rankme"] >= 1  # 40 dimensions
    with torch.no_grad():
        model.projection_head[0].weight[0, 0] = torch.nan
    assert set(measure_quality(model, crops, torch.device("cpu"), batch_size=30).values()) == {None}


def test_each_of_many_processes_measures_at_least_one_image():
    images = ImageArrays(np.zeros((1100, 17, 17, 3), dtype=np.uint8), np.zeros(1100))
    assert [len(quality_crops(images, MULTI_CROP, rank, 1024)[0]) for rank in (0, 1023)] == [1, 1]


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
    monkeypatch.setattr(monitor, "KNN_IMAGES", (20, 10))
    (pixels, labels), (val_pixels, val_labels) = knn_images(split(90, 0), split(90, 1), CentreCrop(20, 20))
    assert (len(pixels), len(val_pixels)) == (20, 10) and min(labels.min(), val_labels.min()) == 0
    assert pixels.dtype == torch.uint8
    chosen = [i for i in some_images(90, 90) if i % 10][:20]
    for i, image in zip(chosen, pixels, strict=True):
        assert torch.equal(image, split(90, 0)[i][0][:, :, 5:25])


def test_knn_is_left_out_without_labels_or_common_classes_and_none_where_features_are_not_finite(capsys):
    crop, images = CentreCrop(20, 20), split(20, 0)
    others = ImageArrays(images.pixels, images.labels, ["left", "right"])
    assert knn_images(images, others, crop) is None
    assert knn_images(ImageArrays(images.pixels, np.full(20, -1)), images, crop) is None
    assert knn_images(images, split(3, 0), crop, 0, 8) is None
    start = "no kNN while training: "
    assert capsys.readouterr().out.splitlines() == [
        start + "training and validation share no class; they have above, below and left, right",
        start + "training and validation share no class; they have none and above, below",
        start + "one of the splits has fewer labelled images than the 8 processes",
    ]
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
