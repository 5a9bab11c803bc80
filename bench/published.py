"""How the published program does each thing, for comparison with ours.

Each part follows facebookresearch/swav in the order of its operations, in current torch: `sinkhorn`, `loss`, `Crops`,
`LARS` and `Program`, a whole training step. `batched_loss` is ours: a faster form of `loss`, still in plain torch.
`compiled` puts any of them through torch.compile, which is what somebody without our kernels would do today.
"""

import random
import sys
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from bench.measure import Mark
from data import MEAN, STD, MultiCrop
from model import Conv3x3, ResNet, SwAV

EPSILON, ITERATIONS, TEMPERATURE = 0.05, 3, 0.1
SCALES = [0.14, 0.05], [1.0, 0.14]  # smallest and largest share of the image's area, for large and small crops
LEARNING_RATE, WEIGHT_DECAY = 0.01, 1e-6


# Codes and loss


def sinkhorn(scores: torch.Tensor, epsilon: float = EPSILON) -> torch.Tensor:
    """Compute codes [B, K] of scores [B, K] in the matrix form (appendix A.1): 39 passes over B x K numbers."""
    q = torch.exp(scores / epsilon).t()  # [K, B]
    nmb_prototypes, batch_size = q.shape
    q /= q.sum()
    for _ in range(ITERATIONS):
        q /= q.sum(dim=1, keepdim=True)
        q /= nmb_prototypes
        q /= q.sum(dim=0, keepdim=True)
        q /= batch_size
    q *= batch_size
    return q.t()


def loss(scores: torch.Tensor, potentials: torch.Tensor) -> torch.Tensor:
    """Compute the swapped loss of scores [V, B, K] with the codes that potentials [A, K] give."""
    codes = torch.softmax(scores[: len(potentials)].detach() / EPSILON + potentials[:, None], 2)  # [A, B, K]
    return swapped_loss(scores, codes)


def swapped_loss(scores: torch.Tensor, codes: Sequence[torch.Tensor]) -> torch.Tensor:
    """Compute the swapped loss of scores [V, B, K] and codes A x [B, K], with a log_softmax for each pair of crops."""
    loss = 0
    for i, crop_codes in enumerate(codes):
        others = [v for v in range(len(scores)) if v != i]
        pairs = [-(crop_codes * F.log_softmax(scores[v] / TEMPERATURE, dim=1)).sum(dim=1).mean() for v in others]
        loss = loss + sum(pairs) / len(others)
    return loss / len(codes)


def batched_loss(scores: torch.Tensor, potentials: torch.Tensor) -> torch.Tensor:
    """Compute the same as `loss`, with one log_softmax for all crops."""
    log_predictions = F.log_softmax(scores / TEMPERATURE, dim=2)  # [V, B, K]
    all_crops = log_predictions.sum(dim=0)
    loss = 0
    for i, potential in enumerate(potentials):
        codes = torch.softmax(scores[i].detach() / EPSILON + potential, dim=1)
        loss = loss - (codes * (all_crops - log_predictions[i])).sum()
    return loss / (len(potentials) * (len(scores) - 1) * scores.shape[1])


def relative_loss(scores: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Compute the swapped loss of scores [V, B, K] with two assigning crops; epsilon is in units of their spread."""
    assigning = scores[:2].detach()
    deviations = assigning - assigning.mean(dim=1, keepdim=True)
    std = deviations.square().mean().sqrt()
    return swapped_loss(scores, [sinkhorn(crop, epsilon) for crop in deviations / std])


def compiled(function: Callable, call: Callable) -> dict[str, Callable]:
    """Return the candidate "compiled", which does call(function) with the function compiled for these sizes.

    Where torch.compile does not work, it prints why and returns no candidate.
    """
    torch.compiler.reset()  # it keeps few forms of a function: those of other sizes leave room
    form = torch.compile(function, dynamic=False, fullgraph=True)
    try:
        call(form)
    except Exception as error:  # no C++ compiler or no Triton, for example
        reason = " ".join(str(error).strip().splitlines()[:2])
        print(f'    no column "compiled", as torch.compile does not work here: {reason}')
        return {}
    return {"compiled": lambda: call(form)}


# Images


class Crops(Dataset):
    """Index -> crops of an image file, each made by its own chain of Pillow and torchvision operations."""

    def __init__(self, paths: Sequence[str], multi_crop: MultiCrop) -> None:
        self.paths, self.chains = paths, []
        jitter = transforms.RandomApply([transforms.ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.8)
        chain = [transforms.RandomHorizontalFlip(), jitter, transforms.RandomGrayscale(0.2)]
        chain += [transforms.RandomApply([blur], p=0.5), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
        for size, count, scale in zip(multi_crop.size_crops, multi_crop.nmb_crops, multi_crop.scales, strict=True):
            self.chains += [transforms.Compose([transforms.RandomResizedCrop(size, scale), *chain])] * count

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> list[torch.Tensor]:
        with Image.open(self.paths[index]) as file:
            image = file.convert("RGB")
        return [chain(image) for chain in self.chains]


def blur(image: Image.Image) -> Image.Image:
    """Blur an image with a random sigma."""
    return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2)))


# Training


class LARS(torch.optim.SGD):
    """LARS around momentum SGD, parameter by parameter. The host compares the norms, so it waits for the device."""

    def __init__(self, params: Iterable[nn.Parameter]) -> None:
        super().__init__(params, LEARNING_RATE, momentum=0.9, foreach=False)

    @torch.no_grad()
    def step(self) -> None:
        """Update all parameters. Rescales the gradients in place."""
        for p in self.param_groups[0]["params"]:
            p_norm, g_norm = p.norm(), p.grad.norm()
            if p_norm != 0 and g_norm != 0:
                ratio = 0.001 * p_norm / (g_norm + WEIGHT_DECAY * p_norm + 1e-8)
                p.grad.add_(p, alpha=WEIGHT_DECAY).mul_(ratio)
        super().step()


def use_torch_convolutions(model: ResNet) -> ResNet:
    """Replace our 3x3 convolutions by those of torch, in place."""
    for module in model.modules():
        if isinstance(module, Conv3x3):
            module.__class__ = nn.Conv2d
    return model


class Program:
    """Loader and training step in the published order, on one process."""

    def __init__(
        self,
        paths: Sequence[str],
        multi_crop: MultiCrop,
        *,
        arch: str,
        nmb_prototypes: int,
        batch_size: int,
        workers: int,
        device: torch.device,
    ) -> None:
        self.device, on_gpu = device, device.type == "cuda"
        options = dict(num_workers=workers, pin_memory=on_gpu, persistent_workers=True)
        options["multiprocessing_context"] = "fork" if sys.platform == "linux" else None  # as in our loader
        self.loader = DataLoader(Crops(paths, multi_crop), batch_size, shuffle=True, **options)
        self.model = use_torch_convolutions(SwAV(arch, nmb_prototypes=nmb_prototypes)).to(device)
        self.optimizer = LARS(self.model.parameters())
        self.scaler = torch.amp.GradScaler(device.type, enabled=on_gpu)

    def step(self, batch: list[torch.Tensor], mark: Mark) -> None:
        """Train on a batch of the loader, V crops [B, 3, S, S]."""
        crops = [crop.to(self.device, non_blocking=True) for crop in batch]
        mark("copy")
        self.model.normalize_prototypes()
        mark("other")
        with torch.autocast(self.device.type, torch.float16, enabled=self.device.type == "cuda"):
            scores = self.model(crops)[1].unflatten(0, (len(crops), -1))  # [V, B, K]
        mark("forward")
        loss = swapped_loss(scores, [sinkhorn(crop_scores) for crop_scores in scores[:2].detach()])
        mark("codes + loss")
        self.optimizer.zero_grad()
        mark("other")
        self.scaler.scale(loss).backward()
        mark("backward")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        mark("LARS")
        loss.item()  # the published program reads it at each step, for a running mean
