"""What trains on labels when a backbone is evaluated: linear probes, many at once, and fine-tuning.

    heads, history = linear_probe(backbone, images, crop, (val_features, val_labels), device, classes=10)
    network, history = fine_tune(backbone, images, val_images, crop, centre_crop, device, classes=10)

Sources: Caron et al. 2020, section 4.1 and appendix A; the published programs for rates that the paper lacks. Both
resume from a file: see `Progress`.
"""

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset

import checkpoint
from data import start_epoch, training_loader
from features import bf16_on_gpus, extract_features
from launch import RunStopped, UserError, environment, log, track
from model import memory_layout, sync_batchnorm

SWEEP_LR, SWEEP_WD = (0.03, 0.1, 0.3, 1.0, 3.0), (0.0, 1e-6, 1e-4)
VALIDATE_EVERY = 10  # epochs
DECAYS, GAMMA = (0.6, 0.8), 0.2  # of fine-tuning: after these shares of the epochs the learning rates fall to GAMMA
FEW_STEPS = 1000  # of fine-tuning; fewer leave a network of random weights untrained


class Heads(nn.Module):
    """Linear classifiers side by side that start from the same weights: features [B, F] -> scores [H, B, classes]."""

    def __init__(self, num_features: int, classes: int, count: int = 1) -> None:
        super().__init__()
        first = nn.Linear(num_features, classes)
        nn.init.normal_(first.weight, std=0.01)
        nn.init.zeros_(first.bias)
        self.heads = nn.ModuleList([first, *(deepcopy(first) for _ in range(count - 1))])

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return torch.stack([head(features) for head in self.heads])


# Resume


class Progress:
    """A file with the state of an unfinished training, from which the same settings resume.

    path: None keeps nothing. settings: what decides the result, as JSON can hold it. The first process reads and
    writes. What cannot be written is logged once, and training goes on.
    """

    def __init__(self, path: Path | None = None, settings: Mapping[str, object] | None = None) -> None:
        self.path = path if environment("RANK", 0) == 0 else None
        self.settings, self.is_writable = dict(settings or {}), True

    def load(self) -> dict | None:
        """The state that was saved, on every process; None if there is none or its settings differ, which is logged."""
        state = [self._read() if self.path else None]
        if dist.is_initialized():
            dist.broadcast_object_list(state, src=0)
        return state[0]

    def _read(self) -> dict | None:
        if not self.path.exists():
            return None
        try:
            state = checkpoint.load(self.path)
            before = state["settings"]
        except (UserError, LookupError, TypeError) as error:
            log(f"{self.path}: not resumed, starting anew: {error}")
            return None
        changed = [name for name in before.keys() | self.settings.keys() if before.get(name) != self.settings.get(name)]
        if changed:
            texts = (f"{name} {before.get(name)}, now {self.settings.get(name)}" for name in sorted(changed))
            log(f"{self.path}: not resumed, starting anew, as it has other settings: {'; '.join(texts)}")
            return None
        return state

    def save(self, state: dict) -> None:
        if self.path is None or not self.is_writable:
            return
        try:
            checkpoint.write(state | {"settings": self.settings}, self.path)
        except OSError as error:
            self.is_writable = False
            log(f"{self.path}: cannot be written ({error.strerror}): an interruption would start anew")

    def remove(self) -> None:
        """Delete the file, once the result is written."""
        if self.path is not None:
            with suppress(OSError):  # a folder that cannot be written
                self.path.unlink()


def _fit(
    network: Callable[[torch.Tensor], torch.Tensor],
    trained: nn.Module,
    optimizer: torch.optim.Optimizer,
    factor: Callable[[int], float],
    images: Dataset,
    transform: Callable,
    validate: Callable[[], tuple[torch.Tensor, torch.Tensor]],
    device: torch.device,
    progress: Progress,
    *,
    title: str,
    epochs: int,
    batch_size: int,
    world_size: int = 1,
    layout: torch.memory_format = torch.channels_last,
    **loading: int,
) -> dict:
    """Train classifiers by cross-entropy, each with its share of the optimizer's parameters; resumes.

    network: images [B, 3, S, S] -> scores [H, B, classes]. trained: holds all that is trained. factor: epoch -> what
    multiplies each learning rate. validate: () -> (scores [H, N, classes], labels [N]); called each VALIDATE_EVERY
    epochs, or tenth of them if that is more, and at the end. loading: seed, rank and workers. Returns {"scores",
    "labels", "history"}: of the last call, and {epoch: top-1 of each classifier}. Raises RunStopped when every loss is
    inf or nan.
    """
    batch_size = min(batch_size, len(images) // world_size)
    loading |= dict(world_size=world_size, pin_memory=device.type == "cuda")
    loader = training_loader(images, transform, batch_size, **loading)
    first, history = 0, {}
    if state := progress.load():
        trained.load_state_dict(state["state_dict"])
        optimizer.load_state_dict(state["optimizer"])
        first, history = state["epoch"], state["history"]
        log(f"{title}: resuming after epoch {first}/{epochs}, from {progress.path}")
    start, every = time.perf_counter(), max(VALIDATE_EVERY, epochs // 10)
    for epoch in range(first, epochs):
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor(epoch)
        total = torch.zeros((), device=device)
        for batch, labels in track(start_epoch(loader, epoch), f"{title}, epoch {epoch + 1}/{epochs}"):
            scores = network(batch.to(device, non_blocking=True, memory_format=layout))  # [H, B, classes]
            labels = labels.to(device, non_blocking=True).repeat(len(scores))
            losses = F.cross_entropy(scores.flatten(0, 1), labels, reduction="none").view(len(scores), -1).mean(1)
            optimizer.zero_grad()
            losses.sum().backward()
            optimizer.step()
            total = total + losses.detach()  # [H]
        losses = total / len(loader)
        if not losses.isfinite().any():
            raise RunStopped(f"{title}: the loss is {losses[0].item()} in epoch {epoch + 1}; try a lower --lr", code=4)
        line = f"{title}, epoch {epoch + 1}/{epochs}: loss {losses[losses.isfinite()].min().item():.4f}"
        is_due = (epoch + 1) % every == 0 and epoch + 1 < epochs
        if is_due:
            history[epoch + 1] = top1_of(*validate())
            line += f"  validation top-1 {max(history[epoch + 1]):.1f} %"
        left = timedelta(seconds=round((time.perf_counter() - start) / (epoch + 1 - first) * (epochs - epoch - 1)))
        if is_due or (epoch + 1) % math.ceil(epochs / 100) == 0:
            log(f"{line}  ETA {left}")
        state = {"state_dict": trained.state_dict(), "optimizer": optimizer.state_dict()}
        progress.save(state | {"epoch": epoch + 1, "history": history})
    scores, labels = validate()
    history[epochs] = top1_of(scores, labels)
    return {"scores": scores, "labels": labels, "history": history}


def top1_of(scores: torch.Tensor, labels: torch.Tensor) -> list[float]:
    """Top-1 in percent of each classifier, of scores [H, N, classes]; 0 for one whose scores are inf or nan."""
    right = (scores.argmax(2) == labels).double().mean(1) * scores.isfinite().all(2).all(1)
    return (100 * right).tolist()


def _wrapped(module: nn.Module, device: torch.device) -> nn.Module:
    """The module, with gradients that are means over all processes."""
    if not dist.is_initialized():
        return module
    return DistributedDataParallel(module, device_ids=[device.index] if device.type == "cuda" else None)


def linear_probe(
    backbone: nn.Module,
    images: Dataset,
    transform: Callable,
    validation: tuple[torch.Tensor, torch.Tensor],
    device: torch.device,
    *,
    classes: int,
    rates: Sequence[tuple[float, float]] = ((0.3, 1e-6),),
    epochs: int = 100,
    batch_size: int = 256,
    seed: int = 0,
    progress: Progress | None = None,
    **loading: int,
) -> tuple[Heads, dict]:
    """Train the paper's linear probe: SGD on random crops, cosine schedule per epoch. Returns (heads, of `_fit`).

    rates: (learning rate, weight decay) of each classifier; all see the same batches, and the backbone runs once.
    backbone: has num_features, is on the device and in evaluation mode. validation: (features [N, F], labels [N]).
    batch_size: per process; learning rates are for the batches of all. loading: rank, world_size and workers.
    """
    torch.manual_seed(seed)
    heads = Heads(backbone.num_features, classes, len(rates)).to(device)
    groups = [
        dict(params=head.parameters(), lr=lr, base_lr=lr, weight_decay=decay)
        for head, (lr, decay) in zip(heads.heads, rates, strict=True)
    ]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    wrapped = _wrapped(heads, device)

    def network(batch: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), bf16_on_gpus(device):
            features = backbone(batch).float()
        return wrapped(features)

    @torch.no_grad()
    def validate() -> tuple[torch.Tensor, torch.Tensor]:
        features, labels = validation
        return heads(features), labels

    return heads, _fit(
        network, heads, optimizer, lambda epoch: 0.5 * (1 + math.cos(math.pi * epoch / epochs)), images, transform,
        validate, device, progress or Progress(), title="linear probe", epochs=epochs, seed=seed, batch_size=batch_size,
        **loading,
    )  # fmt: skip


def fine_tune(
    backbone: nn.Module,
    images: Dataset,
    val_images: Dataset,
    transform: Callable,
    val_transform: Callable,
    device: torch.device,
    *,
    classes: int,
    lr: float = 0.01,
    lr_last_layer: float = 0.2,
    weight_decay: float = 0.0,
    epochs: int = 20,
    batch_size: int = 256,
    seed: int = 0,
    title: str = "fine-tuning",
    progress: Progress | None = None,
    **loading: int,
) -> tuple[nn.Sequential, dict]:
    """Train a backbone and a classifier on its features with labels: SGD on random crops. Returns (network, of `_fit`).

    network: `backbone`, which changes in place, then `heads`, the classifier. lr: of the backbone; its BatchNorm
    trains, with statistics of all processes. batch_size, loading: as in `linear_probe`. Learning rates fall to GAMMA
    after each of DECAYS, as in the published program for 1 % and 10 % of ImageNet's labels (epochs 12 and 16 of 20).
    """
    torch.manual_seed(seed)
    network = nn.Sequential(OrderedDict(backbone=backbone, heads=Heads(backbone.num_features, classes))).to(device)
    if dist.is_initialized():
        sync_batchnorm(network)
    layout = memory_layout(network, device)
    network.to(memory_format=layout)
    groups = [
        dict(params=network.backbone.parameters(), lr=lr, base_lr=lr),
        dict(params=network.heads.parameters(), lr=lr_last_layer, base_lr=lr_last_layer),
    ]
    optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=weight_decay)
    wrapped = _wrapped(network, device)

    def scores_of(batch: torch.Tensor) -> torch.Tensor:
        network.train()
        with bf16_on_gpus(device):
            return wrapped(batch).float()

    def validate() -> tuple[torch.Tensor, torch.Tensor]:
        network.eval()
        images_to_scores = nn.Sequential(network, nn.Flatten(0, 1))  # [1, B, classes] -> [B, classes]
        evaluated = val_images, val_transform, device, "validation images"
        scores, labels = extract_features(images_to_scores, *evaluated, batch_size=batch_size, **loading)
        return scores.unsqueeze(0), labels

    return network, _fit(
        scores_of, network, optimizer, lambda epoch: decay_factor(epoch, epochs), images, transform, validate,
        device, progress or Progress(), title=title, epochs=epochs, seed=seed, batch_size=batch_size, layout=layout,
        **loading,
    )  # fmt: skip


def decay_factor(epoch: int, epochs: int) -> float:
    """What multiplies the learning rates of fine-tuning in an epoch, counted from 0."""
    return GAMMA ** sum(epoch >= round(share * epochs) for share in DECAYS)


def fine_tuning_defaults(images: int, epochs: int | None, batch_size: int | None) -> tuple[int, int, float, float]:
    """(epochs, batch size, learning rate of the backbone, of the classifier) for fine-tuning on so many images.

    epochs, batch_size over all processes: those given, where not None. The published 20 epochs, 256 images and rates
    for 10 % of ImageNet suit 12,800 images and more. Fewer images get smaller batches, 16 of them an epoch, but at
    least 16 images each, and as many epochs as FEW_STEPS steps take. Rates are for 256 images, times the square root
    of the batch's share of these: unscaled, 25 images lost 8 points on photographs.
    """
    batch_size = batch_size or min(256, images, max(16, images // 16))
    steps = max(1, images // batch_size)
    scale = math.sqrt(batch_size / 256)
    lr, lr_last_layer = (float(f"{rate * scale:.3g}") for rate in (0.01, 0.2))
    return epochs or max(20, math.ceil(FEW_STEPS / steps)), batch_size, lr, lr_last_layer
