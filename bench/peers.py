"""Other methods on the same images with the same network, for as many seconds as a run of ours took: see learn.py.

Each method is a function (backbone, size of the crops, classes) -> (transform, step, optimizer, batch size). transform:
PIL image -> views. step: (views, labels) -> loss. lightly's methods have the settings of its Imagenette benchmark, but
for crops of our size, and batches of 128, half of its own, since few images give few steps. SwAV's learning rate is
half of its own too; SimCLR keeps its own, with which it learns faster in minutes.
"""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import to_pil_image

from backbones import choose_sizes
from data import MEAN, STD, CentreCrop, ordered_loader
from features import accuracies, evaluate_features
from images import open_images, typical_side
from machine import choose_precision
from model import ResNet

Method = tuple[Callable, Callable, torch.optim.Optimizer, int]


class PeerRun(NamedTuple):
    """A run of one of PEERS. ours: folder of the run of ours whose images, network and seconds it gets."""

    peer: str
    seed: int
    ours: Path
    folder: Path


def with_labels(backbone: ResNet, size: int, classes: int) -> Method:
    """Cross-entropy, on crops from 0.2 of the area with flips and colour jitter: the ceiling for this network."""
    classifier = nn.Linear(backbone.num_features, classes)
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(size, (0.2, 1), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(0.4, 0.4, 0.4, 0.1),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    network = nn.Sequential(backbone, classifier)
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    backbone.classify = classifier  # `accuracy_of_classifier` needs it

    def step(views: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(network(views), labels)

    return transform, step, optimizer, 64


def lightly_simclr(backbone: ResNet, size: int, classes: int) -> Method:
    """SimCLR: two crops from 0.08 of the area, jitter 0.5, NT-Xent at a temperature of 0.5, SGD."""
    from lightly.loss import NTXentLoss
    from lightly.models.modules.heads import SimCLRProjectionHead
    from lightly.transforms import SimCLRTransform

    head, criterion = SimCLRProjectionHead(backbone.num_features, backbone.num_features, 128), NTXentLoss()
    network = nn.Sequential(backbone, head)
    optimizer = torch.optim.SGD(network.parameters(), 0.06, momentum=0.9, weight_decay=5e-4)

    def step(views: list[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        return criterion(*(network(view) for view in views))

    return SimCLRTransform(input_size=size, cj_strength=0.5), step, optimizer, 128


def lightly_swav(backbone: ResNet, size: int, classes: int) -> Method:
    """SwAV: two crops and six of half their size, jitter 0.5, 3,000 prototypes, Adam."""
    from lightly.loss import SwaVLoss
    from lightly.models.modules.heads import SwaVProjectionHead, SwaVPrototypes
    from lightly.transforms import SwaVTransform

    head, prototypes = SwaVProjectionHead(backbone.num_features, 2048, 128), SwaVPrototypes(128, 3000)
    network, criterion = nn.Sequential(backbone, head), SwaVLoss()
    optimizer = torch.optim.Adam([*network.parameters(), *prototypes.parameters()], 5e-4, weight_decay=1e-6)

    def step(views: list[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        prototypes.normalize()
        scores = [prototypes(nn.functional.normalize(network(view), dim=1)) for view in views]
        return criterion(scores[:2], scores[2:])

    transform = SwaVTransform(crop_sizes=(size, size // 2), crop_counts=(2, 6), cj_strength=0.5)
    return transform, step, optimizer, 128


PEERS = {"with labels": with_labels, "lightly SimCLR": lightly_simclr, "lightly SwAV": lightly_swav}


class Views(Dataset):
    """(transform(PIL image), label) of a data set."""

    def __init__(self, images: Dataset, transform: Callable) -> None:
        self.images = [(to_pil_image(pixels), label) for pixels, label in images]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor | list[torch.Tensor], int]:
        image, label = self.images[index]
        return self.transform(image), label


def do_peer(run: PeerRun, threads: int) -> None:
    """Train, evaluate and write result.json to the run's folder."""
    torch.set_num_threads(threads)
    torch.manual_seed(run.seed)
    ours = json.loads((run.ours / "result.json").read_text())
    options = ours["all_options"]
    train_images, val_images = (
        open_images(options["dataset"], options["data_path"], split) for split in ("train", "val")
    )
    network = {name: options[name] for name in ("width", "blocks", "stem")}
    backbone = ResNet(options["arch"], **network).to(memory_format=torch.channels_last)
    transform, step, optimizer, batch_size = PEERS[run.peer](
        backbone, options["size_crops"][0], len(train_images.classes)
    )
    batch_size = min(batch_size, len(train_images))
    loader = DataLoader(Views(train_images, transform), batch_size, shuffle=True, drop_last=True)
    dtype = choose_precision(options["precision"], torch.device("cpu"))  # as train.py does
    schedule = one_cycle if run.peer == "with labels" else cosine
    steps, seconds, loss = train_for(ours["seconds"], loader, step, optimizer, schedule=schedule, dtype=dtype)
    side = typical_side(val_images)
    size, resize = choose_sizes(options, side, is_folder=options["dataset"] == "folder")
    evaluation = dict(device=torch.device("cpu"), batch_size=256)
    result = evaluate_features(backbone, train_images, val_images, CentreCrop(resize, size), **evaluation)
    result = {kind: result[kind]["top1"] for kind in ("knn", "linear")}
    if run.peer == "with labels":
        result["top1"] = accuracy_of_classifier(backbone, val_images, CentreCrop(resize, size))
    result |= {"steps": steps, "epochs": steps / len(loader), "seconds": seconds, "loss": loss}
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "result.json").write_text(json.dumps(result))


def train_for(
    seconds: float,
    loader: DataLoader,
    step: Callable,
    optimizer: torch.optim.Optimizer,
    *,
    schedule: Callable[[float], float],
    dtype: torch.dtype = torch.float32,
) -> tuple[int, float, float]:
    """Train until these seconds are over. Returns steps, seconds and the last loss.

    schedule: share of the seconds that is over -> share of the optimizer's learning rate. It follows the clock, so that
    it is whole however fast the machine is.
    """
    start, steps, base_lr, loss = time.perf_counter(), 0, optimizer.param_groups[0]["lr"], torch.tensor(math.nan)
    while True:
        for views, labels in loader:
            share = (time.perf_counter() - start) / seconds
            if share >= 1:
                return steps, time.perf_counter() - start, loss.item()
            for group in optimizer.param_groups:
                group["lr"] = base_lr * schedule(share)
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                loss = step(views, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps += 1


def cosine(share: float) -> float:
    """Share of the learning rate, from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * share))


def one_cycle(share: float) -> float:
    """Share of the learning rate: rises from 0.04 for 30 % of the run, then falls along a cosine."""
    return 0.04 + 0.96 * share / 0.3 if share < 0.3 else cosine((share - 0.3) / 0.7)


@torch.no_grad()
def accuracy_of_classifier(backbone: ResNet, images: Dataset, transform: Callable) -> float:
    """Top-1 in % of the classifier that was trained with the backbone."""
    scores, labels = [], []
    for batch, batch_labels in ordered_loader(images, transform, 256):
        scores.append(backbone.classify(backbone(batch)))
        labels.append(batch_labels)
    return accuracies(torch.cat(scores), torch.cat(labels))["top1"]
