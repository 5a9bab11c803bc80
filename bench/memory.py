"""Memory and time of a training step against --accumulate and --checkpoint_activations.

Two tables: bytes of tensors that are alive at the peak of a step, counted without computing anything, on any machine;
and peak and time as measured on the device.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.measure import Times, fresh_process, measure, peak_bytes, prepare_for_peaks, report, run_in, setup_process
from bench.step import Trainer
from data import PARAMS, crops_to_device
from loss import SwAVLoss
from model import SwAV, checkpoint_activations

ARCH = "resnet50"
PARTS = (1, 2, 4, 8)


class Setting(NamedTuple):
    """A training step."""

    arch: str
    sides: tuple[int, ...]  # of the V crops, in pixels
    batch_size: int
    nmb_prototypes: int
    parts: int  # --accumulate
    checkpoints: bool  # --checkpoint_activations

    @property
    def name(self) -> str:
        return f"N={self.parts}" + ", checkpoints" * self.checkpoints


def run(
    device: torch.device,
    *,
    repetitions: int = 15,
    threads: int = 1,
    batch_size: Sequence[int] | None = None,
    nmb_prototypes: Sequence[int] | None = None,
    size_crops: Sequence[int] | None = None,
    nmb_crops: Sequence[int] | None = None,
) -> dict[str, list[dict]]:
    """Print both tables. Return their rows as "counted" and "measured"."""
    on_gpu = device.type == "cuda"
    prototypes = (nmb_prototypes or [3000])[0]

    def settings(images: int, sizes: Sequence[int]) -> list[Setting]:
        sides = tuple(side for side, n in zip(sizes, nmb_crops or [2, 6], strict=True) for _ in range(n))
        all_parts = [parts for parts in PARTS if images % parts == 0 and images // parts > 1]
        return [
            Setting(ARCH, sides, images, prototypes, n, checkpoints) for checkpoints in (False, True) for n in all_parts
        ]

    counted = [row for B in batch_size or [256] for row in count(settings(B, size_crops or [224, 96]))]
    sizes, images = ([224, 96], [256]) if on_gpu else ([64, 32], [16])
    measured = [compare(settings(B, size_crops or sizes), device, repetitions, threads) for B in batch_size or images]
    return {"counted": counted, "measured": measured}


# Counted


class AliveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that torch makes inside, while they are alive. peak: the most at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        results = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if torch.is_tensor(tensor):
                self.add(tensor)
        return results

    def add(self, tensor: torch.Tensor) -> None:
        """Count a tensor that was made outside."""
        storage = tensor.untyped_storage()
        if storage not in self.known:  # else the tensor is a view
            self.known.add(storage)
            self.alive += storage.nbytes()
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self._forget, storage.nbytes())

    def _forget(self, nbytes: int) -> None:
        self.alive -= nbytes


def count(settings: Sequence[Setting]) -> list[dict]:
    """Count the memory of steps in bf16 and print the table. Return one row per setting."""
    images, sides = settings[0].batch_size, settings[0].sides
    print(f"\nmemory: GB of tensors alive at the peak of a step, counted, {settings[0].arch} in bf16, B={images},")
    print(f"crops of {' '.join(map(str, sides))}; CUDA's context and the workspaces of convolutions come on top")
    print("model: weights and momentum; augment: working memory, on a stream of its own; rest: activations, gradients")
    print(f"{'':18} {'total':>8} {'crops':>8} {'model':>8} {'augment':>8} {'rest':>8}")
    rows = []
    for setting in settings:
        row = count_step(setting)
        rows.append({"B": images, "setting": setting.name} | row)
        print(f"{setting.name:18}", *(f"{value / 1e9:8.2f}" for value in row.values()), flush=True)
    return rows


def count_step(setting: Setting, dtype: torch.dtype = torch.bfloat16) -> dict[str, int]:
    """Count the bytes of a step's tensors, with activations of this dtype, without computing them."""
    cpu, images = torch.device("cpu"), setting.batch_size  # as large as those on a GPU
    trainer, mode = start(setting, cpu), FakeTensorMode()
    trainer.dtype = dtype
    trainer.optimizer.zero_grad = trainer.optimizer.step = lambda: None  # LARS reads values
    for module in trainer.model.modules():  # a fake tensor has a shape, but no numbers
        for name, parameter in module.named_parameters(recurse=False):
            module._parameters[name] = nn.Parameter(mode.from_tensor(parameter.data))
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = mode.from_tensor(buffer)
    weights = sum(p.nbytes for p in trainer.model.parameters())
    with mode, AliveBytes() as memory:
        batch = []
        for side in dict.fromkeys(setting.sides):
            crops = setting.sides.count(side)
            pixels = torch.empty(crops, images, 3, side, side, dtype=torch.uint8)
            batch.append((pixels, torch.empty(crops, images, PARAMS)))
        before = memory.alive
        crops = crops_to_device(batch, cpu, memory_format=torch.channels_last, parts=setting.parts)
        of_crops = memory.alive - before
        of_augment = memory.peak - memory.alive
        del batch
        for tensor in (*trainer.model.parameters(), *trainer.model.buffers()):
            memory.add(tensor)
        memory.peak = memory.alive
        trainer.step(crops)
    total = memory.peak + weights + of_augment  # these weights for the momentum, which is not there yet
    rest = total - of_crops - 2 * weights - of_augment
    return dict(total=total, crops=of_crops, model=2 * weights, augment=of_augment, rest=rest)


def start(setting: Setting, device: torch.device) -> Trainer:
    """A model at its first step, with the step."""
    model = SwAV(setting.arch, nmb_prototypes=setting.nmb_prototypes)
    model = model.to(device, memory_format=torch.channels_last)
    model.parts = setting.parts
    if setting.checkpoints:
        checkpoint_activations(model)
    criterion = SwAVLoss(len(setting.sides))
    return Trainer(model, model, criterion.loss_and_code_logits, device)


# Measured


def compare(settings: Sequence[Setting], device: torch.device, repetitions: int, threads: int) -> dict:
    """Measure time and peak of each setting on the device and print them. Return the row."""
    first = settings[0]
    print(f"\nmemory: a step on crops on the device, {first.arch}, crops of {' '.join(map(str, first.sides))}, ms")
    print("peak: MB beside weights, momentum and crops")
    peaks = {}
    for setting in settings:
        with fresh_process() as process:
            peaks[setting.name] = run_in(process, step_peak, setting, device, threads)
    with fresh_process() as process:
        times = run_in(process, step_times, settings, device, repetitions, threads)
    row = report({"B": first.batch_size}, times, [(s.name, first.name) for s in settings[1:]], header=True)
    row["peak_bytes"] = peaks
    if peaks[first.name] is not None:
        print("    peak:", "; ".join(f"{name} {peak / 1e6:.0f}" for name, peak in peaks.items()))
    return row


def call_of(setting: Setting, device: torch.device) -> Callable[[], None]:
    """A step on random crops, to be called again and again."""
    trainer = start(setting, device)
    crops = [torch.randn(setting.batch_size, 3, side, side, device=device) for side in setting.sides]
    crops = [crop.to(memory_format=torch.channels_last) for crop in crops]

    def step() -> None:
        trainer.step(crops)
        trainer.optimizer.zero_grad()  # so that gradients are part of a peak

    return step


def step_peak(setting: Setting, device: torch.device, threads: int) -> int | None:
    """The memory that a step needs at its peak, in bytes; None if the system does not report it."""
    setup_process(threads, device, reuse_memory=False)
    return peak_bytes(call_of(setting, device), device) if prepare_for_peaks(device) else None


def step_times(settings: Sequence[Setting], device: torch.device, repetitions: int, threads: int) -> Times:
    """Time a step of each setting, in turns."""
    setup_process(threads, device)
    return measure({setting.name: call_of(setting, device) for setting in settings}, repetitions, device)
