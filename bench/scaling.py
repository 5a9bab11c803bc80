"""How the cost of our training step grows with processes, prototypes, small crops and batch, one at a time.

The cost for more GPUs than this machine has is computed from the bytes that a step sends.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bench.measure import Times, report, setup_process, synchronize
from bench.published import EPSILON, ITERATIONS
from bench.step import Trainer
from machine import available_cores
from model import SwAV, sync_batchnorm
from sinkhorn_ext import sinkhorn_potentials, swav_loss

NVLINK, INFINIBAND = 450e9, 50e9  # bytes/s that an H100 sends within its node, and out of it
LATENCY = 20e-6  # seconds that a collective takes besides sending
BUCKET = 25 * 2**20  # bytes of gradients that DistributedDataParallel sends at once
BACKWARD_SHARE = 2 / 3  # of a step
Setting = dict[str, int]  # W processes, K prototypes, small crops, B images per process


def run(
    device: torch.device,
    *,
    repetitions: int = 15,
    batch_size: Sequence[int] | None = None,
    nmb_prototypes: Sequence[int] | None = None,
    size_crops: Sequence[int] | None = None,
    processes: Sequence[int] = (1, 2, 4),
    nmb_small_crops: Sequence[int] = (0, 2, 6),
    steps: int | None = None,
    step_ms: float | None = None,
) -> dict[str, list[dict]]:
    """Measure and compute, and print the tables. Return their rows as "measured" and "computed"."""
    on_gpu = device.type == "cuda"
    arch, sizes = ("resnet50", [224, 96]) if on_gpu else ("resnet18", [64, 32])
    sizes, steps = size_crops or sizes, steps or (16 if on_gpu else 1)
    places = torch.cuda.device_count() if on_gpu else available_cores()
    too_many = [count for count in processes if count > places]
    factors = {"W": sorted(set(processes) - set(too_many * on_gpu)) or [1]}
    factors["K"] = nmb_prototypes or [300, 3000, 10_000]
    factors |= {"small": nmb_small_crops, "B": batch_size or [16, 32, 64]}
    published = {"W": 1, "K": 3000, "small": 6, "B": 64}
    base, settings = choose_settings(factors, [published] * on_gpu)
    print(f"\nscaling: a step of ours, {arch}, ms. W: processes; small: crops of {sizes[1]} besides two of {sizes[0]};")
    print("B: images per process, one batch that stays in memory, so without loading; base: the first row;")
    print("all-reduce: of all gradients, on its own; in a step it overlaps with the backward pass;", end=" ")
    print(f"{'NCCL' if on_gpu else 'gloo, a thread each'}; {places} {'GPU' if on_gpu else 'core'}(s)")
    if too_many:
        reason = "not measured" if on_gpu else "they share the cores, so their efficiency says little"
        print(f"{too_many} processes: {reason}")
    times = scaling_times(settings, arch, sizes, steps, repetitions, device.type)
    rows = []
    for setting, values in zip(settings, times, strict=True):
        is_wider = setting == base | {"W": setting["W"]}
        rows.append(report_setting(setting, values, times[0]["step"], arch, on_gpu, is_wider, header=not rows))
    published_ms = rows[settings.index(published)]["median_ms"]["step"] if on_gpu else None
    return {"measured": rows, "computed": compute_scaling(step_ms or published_ms)}


def choose_settings(factors: dict[str, Sequence[int]], others: list[Setting]) -> tuple[Setting, list[Setting]]:
    """Vary each factor on its own. Return the base setting, and all settings with the base first."""
    base = {name: values[len(values) // 2] for name, values in factors.items()} | {"W": factors["W"][0]}
    settings = [base, *(base | {name: value} for name, values in factors.items() for value in values), *others]
    return base, [setting for i, setting in enumerate(settings) if setting not in settings[:i]]


def report_setting(
    setting: Setting, times: Times, base: list[float], arch: str, on_gpu: bool, is_wider: bool, *, header: bool
) -> dict:
    """Print a row of the table. is_wider: it differs from the base only in processes, so its efficiency counts."""
    candidates = {"step": times["step"], "base": base, "all-reduce": times["all-reduce"]}
    row = report(setting, candidates, [("step", "base")], header=header)
    with torch.device("meta"):
        model = SwAV(arch, nmb_prototypes=setting["K"])
    sent = traffic(model, setting["W"], resolutions=1 + (setting["small"] > 0), on_gpu=on_gpu)
    row["bytes_sent"] = {name: size for name, (size, _) in sent.items()}
    row["images_per_s"] = {"step": 1e3 * setting["W"] * setting["B"] / row["median_ms"]["step"]}
    row["efficiency"] = 1 / row["ratios"]["step/base"] if is_wider else None
    sizes = ", ".join(f"{name} {size / 1e6:.3f}" for name, size in row["bytes_sent"].items())
    print(f"    {row['images_per_s']['step']:.1f} images/s; MB sent by a process: {sizes}", end="")
    print(f"; weak-scaling efficiency {row['efficiency']:.2f}" if is_wider else "")
    return row


# Measured


def scaling_times(
    settings: list[Setting], arch: str, sizes: list[int], steps: int, repetitions: int, device_type: str
) -> list[Times]:
    """Measure the step and the all-reduce of each setting, in turns. Processes that a setting does not need wait."""
    world_size = max(setting["W"] for setting in settings)
    with TemporaryDirectory() as folder:
        rest = world_size, Path(folder), settings, arch, sizes, steps, repetitions, device_type
        mp.spawn(scaling_process, rest, nprocs=world_size)
        return json.loads((Path(folder) / "times.json").read_text())


def scaling_process(
    rank: int,
    world_size: int,
    folder: Path,
    settings: list[Setting],
    arch: str,
    sizes: list[int],
    steps: int,
    repetitions: int,
    device_type: str,
) -> None:
    """Take part in all settings as one of the processes. The first process writes times.json to the folder."""
    device = torch.device(f"cuda:{rank}" if device_type == "cuda" else "cpu")
    setup_process(1, device)
    options = dict(init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    options |= dict(timeout=timedelta(hours=1), device_id=device if device.type == "cuda" else None)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", **options)
    groups = {count: dist.new_group(range(count)) for count in sorted({setting["W"] for setting in settings})}
    calls = [
        scaling_calls(setting, arch, sizes, groups[setting["W"]], device) if rank < setting["W"] else {}
        for setting in settings
    ]
    times = [{name: [] for name in candidates} for candidates in calls]
    for repetition in range(repetitions + 1):  # the first is warm-up
        for candidates, values in zip(calls, times, strict=True):
            dist.barrier()
            for name, call in candidates.items():
                synchronize(device)
                start = time.perf_counter()
                for _ in range(steps):
                    call()
                synchronize(device)
                values[name] += [(time.perf_counter() - start) / steps] * (repetition > 0)
    if rank == 0:
        (folder / "times.json").write_text(json.dumps(times))
    dist.barrier()  # no process may leave while another needs it
    dist.destroy_process_group()


def scaling_calls(
    setting: Setting, arch: str, sizes: list[int], group: dist.ProcessGroup, device: torch.device
) -> dict[str, Callable[[], None]]:
    """Return a training step with the other processes of the group, on the same batch each time, and its all-reduce."""
    world_size, batch_size = setting["W"], setting["B"]
    torch.manual_seed(0)
    sides = [sizes[0]] * 2 + [sizes[1]] * setting["small"]
    crops = [torch.randn(batch_size, 3, side, side, device=device) for side in sides]
    crops = [crop.to(memory_format=torch.channels_last) for crop in crops]
    model = SwAV(arch, nmb_prototypes=setting["K"]).to(device, memory_format=torch.channels_last)
    network = model
    if world_size > 1:
        devices = [device.index] if device.type == "cuda" else None
        model = sync_batchnorm(model, group)
        options = dict(gradient_as_bucket_view=True, static_graph=True)
        network = DistributedDataParallel(model, device_ids=devices, process_group=group, **options)
    trainer = Trainer(network, model, partial(group_loss, len(crops), group), device)
    gradients = torch.zeros(sum(p.numel() for p in model.parameters()), device=device)
    return {
        "step": lambda: trainer.step(crops),
        "all-reduce": lambda: world_size > 1 and dist.all_reduce(gradients, group=group),
    }


def group_loss(
    crops: int, group: dist.ProcessGroup, embeddings: torch.Tensor, scores: torch.Tensor, prototypes: torch.Tensor
) -> tuple[torch.Tensor, None]:
    """Compute the loss of SwAVLoss without a queue, over the processes of a group. Returns no code logits."""
    scores = scores.unflatten(0, (crops, -1))  # [V, B, K]
    potentials = sinkhorn_potentials(scores[:2].detach(), EPSILON, ITERATIONS, group=group)
    return swav_loss(scores, potentials), None


# Computed


def traffic(model: SwAV, world_size: int, resolutions: int, on_gpu: bool) -> dict[str, tuple[float, int]]:
    """Compute what one process sends in a step: (bytes, number of collectives).

    In a ring of W processes each sends the bytes of a sum 2 (W - 1) / W times, and those of a gather W - 1 times.
    """
    summed, gathered = 2 * (world_size - 1) / world_size, world_size - 1
    gradients = sum(p.numel() * p.element_size() for p in model.parameters())
    codes = 2 * 4 * model.prototypes.out_features  # a float32 for each assigning crop and prototype
    sent = {"gradients": (summed * gradients, math.ceil(gradients / BUCKET))}
    # The first round gathers, the others sum.
    sent["codes"] = gathered * codes + (ITERATIONS - 1) * summed * codes, ITERATIONS
    passes = {nn.BatchNorm2d: resolutions, nn.BatchNorm1d: 1}
    layers = [(m.num_features, passes[type(m)]) for m in model.modules() if type(m) in passes]
    normalizations, channels = sum(count for _, count in layers), sum(width * count for width, count in layers)
    # On GPUs the forward pass gathers mean, deviation and count, and the backward pass sums two numbers per channel.
    # On CPUs both sum.
    forward = 4 * gathered * (2 * channels + normalizations) if on_gpu else 8 * summed * 2 * channels
    backward = (4 if on_gpu else 8) * summed * 2 * channels
    sent["BatchNorm"] = forward + backward, 2 * normalizations
    return sent


def compute_scaling(step_ms: float | None) -> list[dict]:
    """Compute the efficiency on many GPUs from links, bytes and the time of a step on one GPU. Measures nothing."""
    links = f"NVLink {NVLINK / 1e9:.0f} GB/s in a node of 8, InfiniBand {INFINIBAND / 1e9:.0f} GB/s per GPU outside"
    print(f"\ncomputed, not measured: ResNet-50, K=3000, 2 resolutions; {links};")
    print(f"computed with {LATENCY * 1e6:.0f} us per collective and rings that are as fast as their slowest link;")
    print("computed with gradients that overlap with the backward pass, 2/3 of a step; nothing else overlaps;")
    unknown = "without a step's time (no GPU here and no --step_ms), so without efficiency"
    print("computed", f"for a step of {step_ms:.1f} ms on one GPU" if step_ms else unknown)
    rows = []
    with torch.device("meta"):
        model = SwAV("resnet50")
    for gpus in (8, 64, 512):
        speed = NVLINK if gpus <= 8 else INFINIBAND
        sent = traffic(model, gpus, resolutions=2, on_gpu=True)
        row = {f"{name}_ms": 1e3 * (size / speed + LATENCY * count) for name, (size, count) in sent.items()}
        if step_ms:
            backward_ms = step_ms * BACKWARD_SHARE
            exposed = sum(row.values()) - min(row["gradients_ms"], backward_ms)
            row |= {"hidden_percent": 100 * min(1, backward_ms / row["gradients_ms"]), "exposed_ms": exposed}
            row["efficiency"] = step_ms / (step_ms + exposed)
        print(f"computed {gpus:>5} GPUs:", ", ".join(f"{name} {value:.3f}" for name, value in row.items()))
        rows.append({"GPUs": gpus, "step_ms": step_ms, **row})
    return rows
