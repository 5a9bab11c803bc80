"""What a run measures of its model while it trains: how codes change, quality without labels, kNN.

    crops = quality_crops(images, multi_crop)
    measure_quality(model, crops, device, batch_size=64)    # {"rankme": ..., "lidar": ..., ...}

Each process measures its share, and all get the same figures. Nothing here changes the model or the random numbers of
training.
"""

import math
from collections.abc import Callable
from copy import copy
from itertools import islice

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

from data import (
    LEFT_OUT,
    BlackIfUnreadable,
    CentreCrop,
    CroppedBatches,
    MultiCrop,
    augment,
    normalize,
    readable_image,
    to_uint8,
)
from features import (
    accuracies,
    bf16_on_gpus,
    gather_rows,
    knn,
    lidar,
    neighbour_agreement,
    rankme,
    some_images,
    trivial_r2,
    unique_prototypes,
)
from labels import class_of, some
from launch import log, track

NO_FLOAT64 = ("mps",)  # devices without it

# How codes change


def tracked_images(images: Dataset, size: int, rank: int, world_size: int) -> torch.Tensor:
    """This process's share of the images whose codes a run tracks: [N, 3, size, size], the same in every run.

    256 in all, but at most a twentieth of the set, so that they cost little compared with an epoch, and at least one
    per process.
    """
    count = max(world_size, min(256, len(images) // 20))
    chosen = some_images(len(images), count)[rank::world_size]
    crop = CentreCrop(size, size)
    return torch.stack([crop(readable_image(images, 0, 0, i)[0]) for i in chosen])


@torch.no_grad()
def assigned_prototypes(
    model: nn.Module, codes: Callable, images: torch.Tensor, batch_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The prototype with the largest code entry for each image, int64 [N], and that entry, [N].

    With BatchNorm's running statistics. model: crops -> (embeddings, scores). codes: scores [N, K] -> codes [N, K].
    """
    dtype = next(model.parameters()).dtype
    model.eval()
    with torch.compiler.set_stance("force_eager"):  # so few forward passes are not worth a compiled graph
        scores = torch.cat([model([batch])[1] for batch in images.to(dtype).split(batch_size)])
    model.train()
    certainties, prototypes = codes(scores).max(1)
    return prototypes, certainties


# Quality without labels

QUALITY = ("rankme", "lidar", "unique_prototypes", "neighbour_agreement", "trivial_r2")
QUALITY_IMAGES, QUALITY_CROPS = 1000, 4
KNN_IMAGES = 2000, 1000  # of the training and of the validation split, at most
MEASURING_SHARE = 0.024  # of a run's forward passes: 1.5 to 1.9 % of its time, as training does more for each


def quality_epochs(epochs: int, every: int | None, *, images: int, multi_crop: MultiCrop, knn_size: int = 0) -> range:
    """Return the epochs after which to measure: the last one, and every `every` epochs before it. 0: none.

    every None: as often as MEASURING_SHARE allows; never in runs too short. knn_size: pixels of the images that kNN
    takes, 0 without labels.
    """
    if every is not None:
        return range(epochs, 0, -every) if every else range(0)
    areas = (n * size**2 for size, n in zip(multi_crop.size_crops, multi_crop.nmb_crops, strict=True))
    epoch = 3 * images * sum(areas)  # a step costs about three forward passes
    measured = QUALITY_CROPS * min(QUALITY_IMAGES, images) * multi_crop.size_crops[0] ** 2
    measured += sum(KNN_IMAGES) * knn_size**2
    every = math.ceil(measured / (MEASURING_SHARE * epoch))
    return range(epochs, 0, -every)[: epochs // every]


def quality_crops(
    images: Dataset, multi_crop: MultiCrop, rank: int = 0, world_size: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Crop this process's share of QUALITY_IMAGES images QUALITY_CROPS times, as in training; the same in every run.

    Returns uint8 [N, Q, 3, S, S] of the first resolution and their augmentation parameters [N, Q, PARAMS].
    """
    crop = copy(multi_crop)
    crop.size_crops, crop.nmb_crops, crop.scales = multi_crop.size_crops[:1], (QUALITY_CROPS,), multi_crop.scales[:1]
    crops = CroppedBatches(images, crop)
    chosen = some_images(len(images), max(QUALITY_IMAGES, world_size))[rank::world_size]
    pixels, params, (size,) = None, [], crop.size_crops
    for i, index in enumerate(track(chosen, "crops to measure quality on")):
        ((pixels_of_image, params_of_image),), _ = crops.__getitems__([(0, index)])  # [Q, 1, 3, S, S], [Q, 1, PARAMS]
        if pixels is None:
            pixels = pixels_of_image.new_empty(len(chosen), QUALITY_CROPS, 3, size, size)
        pixels[i] = pixels_of_image.squeeze(1)
        params.append(params_of_image.squeeze(1))
    return pixels, torch.stack(params)


@torch.no_grad()
def measure_quality(
    model: nn.Module, crops: tuple[torch.Tensor, torch.Tensor], device: torch.device, batch_size: int
) -> dict[str, float | None]:
    """Measure what a model has learned, without labels, by the functions named in QUALITY. Every process must call it.

    model: SwAV; BatchNorm uses its running statistics. crops: of `quality_crops`. batch_size: in images. None where
    embeddings are not finite or the images too few.
    """
    embeddings, seen, is_training = [], [], model.training
    model.eval()
    for pixels, params in zip(*(part.split(batch_size) for part in crops), strict=True):
        batch = augment(pixels.flatten(0, 1).to(device), params.flatten(0, 1).to(device))
        seen.append(F.adaptive_avg_pool2d(batch, 4).unflatten(0, (-1, QUALITY_CROPS)))
        with torch.compiler.set_stance("force_eager"), bf16_on_gpus(device):
            batch_embeddings, _ = model([batch.contiguous(memory_format=torch.channels_last)])
        embeddings.append(batch_embeddings.float().unflatten(0, (-1, QUALITY_CROPS)))
    model.train(is_training)
    embeddings, seen = (gather_rows(torch.cat(parts)) for parts in (embeddings, seen))  # [N, Q, ...]
    if not embeddings.isfinite().all():
        return dict.fromkeys(QUALITY)
    if device.type in NO_FLOAT64:
        embeddings, seen = embeddings.cpu(), seen.cpu()
    values = (
        rankme(embeddings.flatten(0, 1)),
        lidar(embeddings) if len(embeddings) > embeddings.shape[2] else None,
        unique_prototypes(model.prototypes.weight.detach()),
        neighbour_agreement(embeddings[:, 0], embeddings[:, 1]),
        trivial_r2(embeddings[:, 0], seen[:, 0]),
    )
    return dict(zip(QUALITY, values, strict=True))


# kNN while a run trains: the only measure here that uses labels. It never trains on them.


def knn_images(
    train_images: Dataset, val_images: Dataset, crop: CentreCrop, rank: int = 0, world_size: int = 1
) -> list[tuple[torch.Tensor, torch.Tensor]] | None:
    """Crop this process's share of KNN_IMAGES labelled images of the two splits; the same in every run.

    Returns uint8 [N, 3, S, S] and labels int64 [N] (LEFT_OUT: the image cannot be read) for each split. None, with a
    line that says so, where they share no class, or have fewer images than processes.
    """
    chosen = []
    for images, most in zip((train_images, val_images), KNN_IMAGES, strict=True):
        named = ((index, class_of(images, index)) for index in some_images(len(images), len(images)))
        chosen.append(list(islice(((index, name) for index, name in named if name is not None), max(most, world_size))))
    names = [{name for _, name in of_split} for of_split in chosen]
    if not names[0] & names[1]:
        train_names, val_names = (some(sorted(of_split)) or "none" for of_split in names)
        log(f"no kNN while training: training and validation share no class; they have {train_names} and {val_names}")
        return None
    if min(map(len, chosen)) < world_size:
        log(f"no kNN while training: one of the splits has fewer labelled images than the {world_size} processes")
        return None
    classes, held = sorted(names[0] | names[1]), []
    for images, of_split in zip((train_images, val_images), chosen, strict=True):
        readable, share = BlackIfUnreadable(images), of_split[rank::world_size]
        pixels, labels = torch.empty(len(share), 3, crop.size, crop.size, dtype=torch.uint8), []
        for i, (index, name) in enumerate(track(share, "crops to measure kNN on", unit="image")):
            image, label = readable[index]
            pixels[i] = to_uint8(crop(image))
            labels.append(LEFT_OUT if label == LEFT_OUT else classes.index(name))
        held.append((pixels, torch.tensor(labels)))
    return held


@torch.no_grad()
def measure_knn(
    model: nn.Module,
    held: list[tuple[torch.Tensor, torch.Tensor]] | None,
    device: torch.device,
    batch_size: int,
) -> dict[str, float | None]:
    """Measure {"knn": top-1 accuracy in percent} of a model's backbone. Every process must call it.

    model: with `features`; BatchNorm uses its running statistics. held: of `knn_images`; without it, the result is
    empty. None where features are not finite.
    """
    if held is None:
        return {}
    splits, is_training = [], model.training
    model.eval()
    for pixels, labels in held:
        parts = []
        for part in pixels.split(batch_size):
            batch = normalize(part.to(device).float()).contiguous(memory_format=torch.channels_last)
            with torch.compiler.set_stance("force_eager"), bf16_on_gpus(device):
                parts.append(model.features(batch).float())
        features, labels = gather_rows(torch.cat(parts)), gather_rows(labels.to(device))
        splits.append((features[labels >= 0], labels[labels >= 0]))
    model.train(is_training)
    (features, labels), (val_features, val_labels) = splits
    if not min(map(len, splits[0] + splits[1])) or not (features.isfinite().all() and val_features.isfinite().all()):
        return {"knn": None}
    classes = 1 + int(max(labels.max(), val_labels.max()))
    return {"knn": accuracies(knn(features, labels, val_features, classes=classes), val_labels)["top1"]}
