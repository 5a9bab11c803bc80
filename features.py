"""Features of a backbone and what they are worth: extraction, kNN, logistic regression, baselines, measures
without labels.

    features, labels = extract_features(backbone, images, transform, device, "training images", batch_size=256)
    scores = knn(features, labels, val_features, classes=10)    # [N, classes]
    accuracies(scores, val_labels)                              # {"top1": ..., "top5": ...} in percent

Whatever evaluates a backbone calls this file; it works with any module that maps images to features [B, F].
"""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import Dataset, Subset

from data import LEFT_OUT, CentreCrop, ordered_loader, readable_image, to_grey
from launch import RunStopped, UserError, log, track

MAX_PIXEL_TABLE = 2**30  # numbers; raw pixels of larger sets are not compared


def some_images(total: int, count: int) -> list[int]:
    """Indices of at most `count` images in random order, the same in every run; folders are sorted by class."""
    return np.random.default_rng(0).permutation(total)[:count].tolist()


# Extraction


def bf16_on_gpus(device: torch.device) -> torch.autocast:
    """Autocast for a frozen backbone's forward pass: bf16 on GPUs that have it, float32 elsewhere."""
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=has_bf16)


@torch.no_grad()
def extract_features(
    backbone: nn.Module, images: Dataset, transform: Callable, device: torch.device, title: str, **loading: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Extract pooled features [N, F] float32 and labels [N] of all images, in their order, on every process.

    Each process computes its share. title: of the progress line. loading: batch_size of each process, and rank,
    world_size and workers of data.ordered_loader. Images that cannot be read are left out (images.new_bad_images tells
    which). Raises UserError if there are no others, RunStopped if features are inf or nan.
    """
    features, labels, done = None, [], 0
    loader = ordered_loader(images, transform, pin_memory=device.type == "cuda", **loading)
    for batch, batch_labels in track(loader, title):
        batch = batch.to(device, non_blocking=True, memory_format=torch.channels_last)
        with bf16_on_gpus(device):
            batch_features = backbone(batch).float()
        if features is None:  # allocate all at once: the batches and one tensor of them may not fit together
            features = batch_features.new_empty(len(loader.sampler), batch_features.shape[1])
        features[done : done + len(batch_features)] = batch_features
        done += len(batch_features)
        labels.append(batch_labels.to(device))
    features, labels = gather_rows(features), gather_rows(torch.cat(labels))
    is_finite = torch.cat([chunk.isfinite().all(1) for chunk in features.split(2**13)])
    if not is_finite.all():
        count = len(features) - int(is_finite.sum())
        raise RunStopped(f"features of {count} of {len(images)} {title} are inf or nan: the network overflows", code=4)
    is_read = labels != LEFT_OUT
    if is_read.all():
        return features, labels
    if not is_read.any():
        raise UserError(f"data_path: none of the {len(images)} {title} can be read; python images.py DIR tells why")
    return features[is_read], labels[is_read]


def gather_rows(share: torch.Tensor) -> torch.Tensor:
    """Put together the rows that processes hold as rank, rank + world_size, ..."""
    if not dist.is_initialized():
        return share
    total = torch.tensor(len(share), device=share.device)
    dist.all_reduce(total)
    world_size = dist.get_world_size()
    longest = math.ceil(total.item() / world_size)
    gathered = share.new_zeros(longest, world_size, *share.shape[1:])
    for start in range(0, longest, 2**13):  # a part at a time, as two copies of all may not fit
        part = share[start : start + 2**13]
        padded = share.new_zeros(min(2**13, longest - start), *share.shape[1:])
        padded[: len(part)] = part
        parts = [torch.empty_like(padded) for _ in range(world_size)]
        dist.all_gather(parts, padded)
        gathered[start : start + len(padded)] = torch.stack(parts, dim=1)
    return gathered.flatten(0, 1)[: total.item()]


def batchnorms(network: nn.Module) -> list[nn.Module]:
    """The BatchNorms of a network; transformers have none."""
    return [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def recompute_batchnorm(
    backbone: nn.Module, images: Dataset, transform: Callable, device: torch.device, *, batch_size: int, **loading: int
) -> None:
    """Set the running statistics of every BatchNorm to their mean over the images of all processes.

    In random order, so that batches mix classes; leaves out a smaller last batch. loading: as in `extract_features`.
    """
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).tolist()
    batch_size = max(2, batch_size)  # a single image may have no variance
    loader = ordered_loader(Subset(images, order), transform, batch_size, **loading)

    def batches() -> Iterator[torch.Tensor]:
        for step, (batch, labels) in enumerate(track(loader, "BatchNorm statistics")):
            is_whole = len(batch) == batch_size or step == 0
            batch = batch[labels != LEFT_OUT]  # without the images that cannot be read
            if is_whole and len(batch) > 1:
                yield batch.to(device, memory_format=torch.channels_last)

    update_bn(batches(), backbone)
    if dist.is_initialized():
        for norm in batchnorms(backbone):
            for statistic in (norm.running_mean, norm.running_var):
                dist.all_reduce(statistic)
                statistic /= dist.get_world_size()


# What features are worth


def accuracies(scores: torch.Tensor, labels: torch.Tensor) -> dict[str, float | list[float]]:
    """Top-1 and top-5 accuracy in percent, of scores [N, classes] and labels [N], each with its 95 % interval.

    {"top1": ..., "top1_interval": [low, high], "top5": ..., "top5_interval": ...}, see `wilson_interval`. A classifier
    with a score that is inf or nan counts as wrong everywhere.
    """
    ranked = scores.topk(min(5, scores.shape[1]), dim=1).indices == labels.unsqueeze(1)
    ranked &= scores.isfinite().all()
    shares = {"top1": ranked[:, 0].double().mean().item(), "top5": ranked.any(1).double().mean().item()}
    values = {name: 100 * share for name, share in shares.items()}
    return values | {f"{name}_interval": wilson_interval(share, len(labels)) for name, share in shares.items()}


def wilson_interval(share: float, count: int) -> list[float]:
    """95 % confidence interval [low, high] in percent of a share that was right among `count` images.

    It counts the chance in which images validate, not that of training. Source: Wilson 1927 (score interval).
    """
    if not count:
        return [0.0, 100.0]
    z = 1.959964  # of 95 %
    centre = share + z**2 / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    low, high = ((centre + sign * half) / (1 + z**2 / count) for sign in (-1, 1))
    return [100 * max(0.0, min(low, share)), 100 * min(1.0, max(high, share))]  # rounding: it holds the share


def accuracy_by_class(scores: torch.Tensor, labels: torch.Tensor, classes: Sequence[str]) -> list[dict]:
    """A row for each class, of scores [N, classes] and labels [N]: images, top1, its interval, what it is taken for.

    taken_for: the most frequent wrong class (None if there is none), taken_for_share: its share of the images in
    percent. top1 is None for a class without images.
    """
    confusion = confusion_matrix(scores, labels).cpu()
    totals, hits = confusion.sum(1).tolist(), confusion.diag().tolist()
    misses, taken_for = (column.tolist() for column in confusion.fill_diagonal_(0).max(1))
    return [
        {
            "class": name,
            "images": images,
            "top1": 100 * right / images if images else None,
            "top1_interval": wilson_interval(right / max(1, images), images),
            "taken_for": classes[other] if wrong else None,
            "taken_for_share": 100 * wrong / max(1, images),
        }
        for name, images, right, wrong, other in zip(classes, totals, hits, misses, taken_for, strict=True)
    ]


def confusion_matrix(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """int64 [classes, classes]: how many images of each class (row) were taken for each class (column)."""
    classes = scores.shape[1]
    return torch.bincount(labels * classes + scores.argmax(1), minlength=classes**2).view(classes, classes)


def feature_std(features: torch.Tensor) -> float:
    """Mean std of each dimension of the normalised features [N, F], times sqrt(F): 1 if isotropic, 0 if collapsed."""
    directions = [F.normalize(chunk, dim=1) for chunk in features.split(2**13)]
    mean = sum(chunk.sum(0) for chunk in directions) / len(features)
    variance = sum((chunk - mean).square().sum(0) for chunk in directions) / len(features)
    return variance.sqrt().mean().item() * features.shape[1] ** 0.5


@torch.no_grad()
def knn(
    train_features: torch.Tensor,
    train_labels: torch.Tensor,
    val_features: torch.Tensor,
    *,
    classes: int,
    k: int = 20,
    temperature: float = 0.07,
) -> torch.Tensor:
    """Scores [N, classes]: votes of the k nearest by cosine, weighted by exp((cosine - largest) / temperature)."""
    cosines, neighbours = nearest(train_features, val_features, k)
    return votes(cosines, train_labels[neighbours], classes=classes, temperature=temperature)


@torch.no_grad()
def nearest(train_features: torch.Tensor, features: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k nearest training features by cosine, or all if fewer: (cosines [N, k], largest first, indices [N, k])."""
    lengths, found = train_features.norm(dim=1).clamp_min(1e-12), []
    for chunk in F.normalize(features, dim=1).split(512):
        found.append((chunk @ train_features.T / lengths).topk(min(k, len(train_features)), dim=1))
    return torch.cat([cosines for cosines, _ in found]), torch.cat([indices for _, indices in found])


def votes(cosines: torch.Tensor, labels: torch.Tensor, *, classes: int, temperature: float) -> torch.Tensor:
    """Scores [N, classes]: votes of neighbours with labels [N, k], by their cosines [N, k] as in `knn`."""
    weights = ((cosines - cosines[:, :1]) / temperature).exp()  # the difference cannot overflow
    return cosines.new_zeros(len(cosines), classes).scatter_add_(1, labels, weights)


def logistic_regression(
    train_features: torch.Tensor, train_labels: torch.Tensor, val_features: torch.Tensor, *, classes: int
) -> torch.Tensor:
    """Scores [N, classes] of a linear classifier, fitted by L-BFGS to standardised features with an L2 of 1/N."""
    mean, std = train_features.mean(0), train_features.std(0)
    # Leave out features that are constant but for rounding: other images may differ in them.
    scale = torch.where(std > 1e-5 * mean.abs(), 1 / (std + 1e-6), 0)
    linear = nn.Linear(train_features.shape[1], classes, device=train_features.device)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=100, line_search_fn="strong_wolfe")
    rows = max(1, 2**22 // train_features.shape[1])  # in chunks, as a standardised copy of all may not fit
    chunks = list(zip(train_features.split(rows), train_labels.split(rows), strict=True))

    def objective() -> torch.Tensor:
        optimizer.zero_grad()
        total = linear.weight.square().sum() / (2 * len(train_features))
        total.backward()
        for features, labels in chunks:
            loss = F.cross_entropy(linear((features - mean) * scale), labels, reduction="sum") / len(train_features)
            loss.backward()
            total = total + loss.detach()
        return total.detach()

    optimizer.step(objective)
    with torch.no_grad():
        return linear((val_features - mean) * scale)


def features_and_knn(
    network: nn.Module,
    train_images: Dataset,
    val_images: Dataset,
    transform: Callable,
    device: torch.device,
    *,
    knn_k: Sequence[int] = (20,),
    knn_temperature: float = 0.07,
    **loading: int,
) -> tuple[tuple[torch.Tensor, ...], dict[str, dict | float]]:
    """Extract the features of two splits, with BatchNorm's running statistics, and rate them by kNN.

    Returns (features, labels, val_features, val_labels) and {"knn": accuracies with the first k, "knn_by_k":
    {k: accuracies}, "spread": feature_std}. loading: as in `extract_features`.
    """
    network.to(device, memory_format=torch.channels_last).eval()
    features, labels = extract_features(network, train_images, transform, device, "training images", **loading)
    val_split = extract_features(network, val_images, transform, device, "validation images", **loading)
    cosines, neighbours = nearest(features, val_split[0], max(knn_k))
    options, by_k = dict(classes=len(train_images.classes), temperature=knn_temperature), {}
    for k in knn_k:
        by_k[str(k)] = accuracies(votes(cosines[:, :k], labels[neighbours[:, :k]], **options), val_split[1])
    row = {"knn": by_k[str(knn_k[0])], "knn_by_k": by_k, "spread": feature_std(features)}
    return (features, labels, *val_split), row


def evaluate_features(
    network: nn.Module,
    train_images: Dataset,
    val_images: Dataset,
    transform: Callable,
    device: torch.device,
    **options: object,
) -> dict[str, dict | float]:
    """Evaluate a network's features: the row of `features_and_knn`, and accuracies of a logistic regression, "linear".

    options: as `features_and_knn` takes them.
    """
    splits, row = features_and_knn(network, train_images, val_images, transform, device, **options)
    scores = logistic_regression(*splits[:3], classes=len(train_images.classes))
    return row | {"linear": accuracies(scores, splits[3])}


def baselines(
    random_backbone: nn.Module,
    train_images: Dataset,
    val_images: Dataset,
    transform: CentreCrop,
    device: torch.device,
    *,
    pixel_transform: CentreCrop,
    knn_k: Sequence[int],
    knn_temperature: float,
    **loading: int,
) -> Iterator[tuple[str, dict]]:
    """Evaluate what features have to beat: random weights and raw pixels. Yields (name, row of `evaluate_features`).

    random_backbone: the same architecture with fresh weights, evaluated as it is and, if it has BatchNorm, with
    statistics of the training images. pixel_transform: of raw pixels, which gain nothing where images are enlarged.
    """

    def evaluated(name: str, network: nn.Module, transform: CentreCrop = transform) -> tuple[str, dict]:
        log(f"{name} ...")
        options = dict(knn_k=knn_k, knn_temperature=knn_temperature, **loading)
        return name, evaluate_features(network, train_images, val_images, transform, device, **options)

    yield evaluated("random init, BatchNorm untouched", random_backbone)
    if batchnorms(random_backbone):
        recompute_batchnorm(random_backbone, train_images, transform, device, **loading)
        yield evaluated("random init, BatchNorm of the training images", random_backbone)
    if (len(train_images) + len(val_images)) * 3 * pixel_transform.size**2 > MAX_PIXEL_TABLE:
        log("raw pixels: left out, they do not fit into memory")
    else:
        yield evaluated("raw pixels", nn.Flatten(), pixel_transform)


# What the images are, for defaults.derive


def describe_images(images: Dataset) -> dict[str, float]:
    """Describe what images show by four shares from 0 to 1, of at most 200 images as squares of 32 pixels.

    plain_ground: share of an image's pixels whose brightness lies within 0.1 std of one value (median over images).
    mean_image: share of the brightness's variance, over images and places, that is in the mean image: high for aligned
    images.
    between_cells: share of the brightness's variance within images that lies between 4 x 4 cells: low for textures.
    mirror_images: share of images whose mirror image is less like the other images than they are: 0.5 where the set
    could hold mirror images too, more for letters and for objects that all face one way.
    """
    crop = CentreCrop(32, 32)
    chosen = track(some_images(len(images), 200), "describing images")
    pixels = torch.stack([crop(readable_image(images, 0, 0, i)[0]) for i in chosen])
    brightness = to_grey(pixels).squeeze(1).double()  # [N, 32, 32]
    variances, stds = brightness.var((1, 2), correction=0), brightness.std((1, 2)).clamp_min(1e-2)
    cells = F.avg_pool2d(brightness.unsqueeze(1), 8).flatten(1)
    values = brightness.flatten(1).sort(1).values
    above = torch.searchsorted(values, values + 0.2 * stds.unsqueeze(1), right=True)
    plain = (above - torch.arange(values.shape[1])).amax(1) / values.shape[1]
    mean_image = brightness.mean(0).var(correction=0)
    if len(brightness) > 1:  # the mean of few images differs from place to place by chance
        mean_image = mean_image - brightness.var(0).mean() / len(brightness)
    likeness = (_most_alike(turned, brightness) for turned in (brightness, brightness.flip(2)))
    return {
        "plain_ground": plain.median().item(),
        "mean_image": max(0.0, (mean_image / brightness.var(correction=0).clamp_min(1e-4)).item()),
        "between_cells": (cells.var(1, correction=0).sum() / variances.sum().clamp_min(1e-4)).item(),
        "mirror_images": (0.5 + 0.5 * torch.sub(*likeness).sign().mean()).item(),
    }


def _most_alike(images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """The correlation of each of images [N, H, W] with the most similar of others [N, H, W], but for its own: [N]."""
    ours, theirs = (F.normalize((x - x.mean((1, 2), keepdim=True)).flatten(1)) for x in (images, others))
    return (ours @ theirs.T).fill_diagonal_(-1).amax(1)


# Quality without labels


def rankme(features: torch.Tensor) -> float:
    """Effective rank of features [N, F], 1 to min(N, F): exp of the entropy of their singular values' shares.

    Source: Garrido et al. 2023 (RankMe, arXiv 2210.02885), equation 1, there for 25,600 images.
    """
    return _effective_rank(torch.linalg.svdvals(features.double()))


def lidar(embeddings: torch.Tensor, delta: float = 1e-4) -> float:
    """Effective rank of the differences between images, relative to those between crops of one image; 1 to D.

    embeddings [N, Q, D]: of Q crops of each of N images; more than D images. delta: added to the variance within
    images. Source: Thilak et al. 2023 (LiDAR, arXiv 2312.04000), section 4, there for 1,000 images of 50 crops. With
    few crops the means of images still hold noise, a Q-th of the variance within images, which is subtracted here.
    """
    embeddings = embeddings.double()
    crops = embeddings.shape[1]
    means = embeddings.mean(1)  # [N, D]
    centred = means - means.mean(0)
    around = (embeddings - means.unsqueeze(1)).flatten(0, 1)
    within = around.T @ around / (len(means) * max(1, crops - 1))
    between = centred.T @ centred / max(1, len(means) - 1) - within / crops
    variances, axes = torch.linalg.eigh(within)
    whitening = axes * (variances.clamp_min(0) + delta).rsqrt()
    return _effective_rank(torch.linalg.eigvalsh(whitening.T @ between @ whitening).clamp_min(0))


def _effective_rank(values: torch.Tensor) -> float:
    shares = values / values.sum().clamp_min(1e-30)
    return torch.special.entr(shares).sum().exp().item()


def unique_prototypes(prototypes: torch.Tensor, distance: float = 0.025) -> float:
    """Share of prototypes [K, D] that are left when those within a cosine distance of each other are merged.

    Each prototype joins the first one kept before it that is near enough. Source: Govindarajan et al. 2024 (partial
    prototype collapse, arXiv 2410.14060), with their distance.
    """
    directions = F.normalize(prototypes.float(), dim=1)
    kept = torch.zeros(len(directions), dtype=torch.bool)
    for start in range(0, len(directions), 1024):  # in chunks, as all cosines may not fit
        is_near = (directions[start : start + 1024] @ directions.T > 1 - distance).cpu()
        for i, is_near_to in enumerate(is_near, start):
            kept[i] = not (is_near_to & kept).any()
    return kept.double().mean().item()


def neighbour_agreement(first: torch.Tensor, second: torch.Tensor, k: int = 10) -> float:
    """Share of an image's k nearest by the embeddings [N, D] of one crop that are among those by another crop's.

    1 if crops make no difference, about k / N by chance. Nearest by cosine, the image itself left out. A mutual-kNN
    alignment (Huh et al. 2024, arXiv 2405.07987) of two crops in the place of two networks. For few images k is at
    most a quarter of the others.
    """
    neighbours, k = [], max(1, min(k, (len(first) - 1) // 4))
    for embeddings in (first, second):
        directions = F.normalize(embeddings.double(), dim=1)
        cosines = (directions @ directions.T).fill_diagonal_(-2)
        nearest = cosines.topk(k, dim=1).indices
        neighbours.append(torch.zeros_like(cosines, dtype=torch.bool).scatter_(1, nearest, True))
    return ((neighbours[0] & neighbours[1]).sum() / neighbours[0].sum()).item()


def trivial_r2(embeddings: torch.Tensor, images: torch.Tensor, cells: int = 4) -> float:
    """R squared of embeddings [N, D] as a linear function of mean colour and of brightness in cells x cells.

    images [N, 3, S, S]: what the network saw. Fitted to the first half of the images, which come in random order,
    measured on the other one. Near 1: a run learned little more than colour and brightness.
    """
    brightness = F.adaptive_avg_pool2d(images.double().mean(1, keepdim=True), cells).flatten(1)  # [N, cells^2]
    inputs = torch.cat([images.double().mean((2, 3)), brightness], dim=1)
    inputs = (inputs - inputs.mean(0)) / inputs.std(0).clamp_min(1e-6)
    inputs = torch.cat([inputs, torch.ones_like(inputs[:, :1])], dim=1)
    embeddings, half = embeddings.double(), len(embeddings) // 2
    fit, rest = inputs[:half], embeddings[half:]
    ridge = 1e-3 * torch.eye(inputs.shape[1], dtype=inputs.dtype, device=inputs.device)  # grey: equal columns
    weights = torch.linalg.solve(fit.T @ fit / half + ridge, fit.T @ embeddings[:half] / half)
    unexplained = (rest - inputs[half:] @ weights).square().sum()
    return max(0.0, 1 - (unexplained / (rest - rest.mean(0)).square().sum().clamp_min(1e-30)).item())
