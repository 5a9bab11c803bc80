"""features.py: kNN, logistic regression, BatchNorm statistics, and the images whose codes a run tracks."""

import math

import numpy as np
import torch
from torch.nn import functional as F

from data import CentreCrop
from features import accuracies, knn, logistic_regression, recompute_batchnorm, tracked_images
from images import ImageArrays
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


def test_knn_weights_votes_by_similarity():
    train_features = torch.tensor([[1.0, 0.0], [0.9, 0.5], [0.9, -0.5], [-1.0, 0.0]])
    scores = knn(train_features, torch.tensor([0, 1, 1, 2]), torch.tensor([[2.0, 0.0]]), classes=3, k=3)
    neighbour = math.exp((0.9 / math.hypot(0.9, 0.5) - 1) / 0.07)
    torch.testing.assert_close(scores, torch.tensor([[1.0, 2 * neighbour, 0.0]]))


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
