"""How the cost of our training step grows with processes, prototypes, small crops and batch, one at a time.

The collectives of a step are timed on their own too. The cost for more GPUs than this machine has is computed from the
bytes that they send.
"""

import json
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
Collective = tuple[str, int, torch.dtype]  # "sum", "gather" or "broadcast", elements of a process, their dtype


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
    print("the other columns: collectives of a step, on their own (BN: BatchNorm over processes; means: of the scores,")
    print("with --relative_epsilon); in a step those of gradients overlap with the backward pass;", end=" ")
    print(f"{'NCCL' if on_gpu else 'gloo, a thread each'}; {places} {'GPU' if on_gpu else 'core'}(s)")
    if too_many:
        reason = "not measured" if on_gpu else "they share the cores, so their efficiency says little"
        print(f"{too_many} processes: {reason}")
    times = scaling_times(settings, arch, sizes, steps, repetitions, device.type)
    rows = []
    for setting, values in zip(settings, times, strict=True):
        is_wider = setting == base | {"W": setting["W"]}
        rows.append(report_setting(setting, values, times[0]["step"], arch, is_wider, header=not rows))
    published_ms = rows[settings.index(published)]["median_ms"]["step"] if on_gpu else None
    return {"measured": rows, "computed": compute_scaling(step_ms or published_ms)}


def choose_settings(factors: dict[str, Sequence[int]], others: list[Setting]) -> tuple[Setting, list[Setting]]:
    """Vary each factor on its own. Return the base setting, and all settings with the base first."""
    base = {name: values[len(values) // 2] for name, values in factors.items()} | {"W": factors["W"][0]}
    settings = [base, *(base | {name: value} for name, values in factors.items() for value in values), *others]
    return base, [setting for i, setting in enumerate(settings) if setting not in settings[:i]]


def report_setting(
    setting: Setting, times: Times, base: list[float], arch: str, is_wider: bool, *, header: bool
) -> dict:
    """Print a row of the table. is_wider: it differs from the base only in processes, so its efficiency counts."""
    row = report(setting, {"step": times["step"], "base": base, **times}, [("step", "base")], header=header)
    with torch.device("meta"):
        model = SwAV(arch, nmb_prototypes=setting["K"])
    sent = traffic(collectives(model, resolutions=1 + (setting["small"] > 0)), setting["W"])
    row["bytes_sent"] = {name: size for name, (size, _) in sent.items()}
    row["collectives"] = {name: count for name, (_, count) in sent.items()}
    row["images_per_s"] = {"step": 1e3 * setting["W"] * setting["B"] / row["median_ms"]["step"]}
    row["efficiency"] = 1 / row["ratios"]["step/base"] if is_wider else None
    sizes = ", ".join(f"{name} {size / 1e6:.3f} ({count})" for name, (size, count) in sent.items())
    print(f"    {row['images_per_s']['step']:.1f} images/s; MB sent by a process (collectives): {sizes}", end="")
    print(f"; weak-scaling efficiency {row['efficiency']:.2f}" if is_wider else "")
    return row


# Measured


def scaling_times(
    settings: list[Setting], arch: str, sizes: list[int], steps: int, repetitions: int, device_type: str
) -> list[Times]:
    """Measure the step and the collectives of each setting, in turns. Processes that a setting does not need wait."""
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
    """Return a training step with the other processes of the group, on the same batch each time; its collectives."""
    world_size, batch_size = setting["W"], setting["B"]
    torch.manual_seed(0)
    sides = [sizes[0]] * 2 + [sizes[1]] * setting["small"]
    crops = [torch.randn(batch_size, 3, side, side, device=device) for side in sides]
    crops = [crop.to(memory_format=torch.channels_last) for crop in crops]
    model = SwAV(arch, nmb_prototypes=setting["K"]).to(device, memory_format=torch.channels_last)
    network, parts = model, collectives(model, resolutions=1 + (setting["small"] > 0))
    if world_size > 1:
        devices = [device.index] if device.type == "cuda" else None
        model = sync_batchnorm(model, group)
        options = dict(gradient_as_bucket_view=True, static_graph=True)
        network = DistributedDataParallel(model, device_ids=devices, process_group=group, **options)
    trainer = Trainer(network, model, partial(group_loss, len(crops), group), device)
    alone = {name: partial(run_collectives, part, group, device) for name, part in parts.items()}
    return {"step": lambda: trainer.step(crops)} | alone


def group_loss(
    crops: int, group: dist.ProcessGroup, embeddings: torch.Tensor, scores: torch.Tensor, prototypes: torch.Tensor
) -> tuple[torch.Tensor, None]:
    """Compute the loss of SwAVLoss without a queue, over the processes of a group. Returns no code logits."""
    scores = scores.unflatten(0, (crops, -1))  # [V, B, K]
    potentials = sinkhorn_potentials(scores[:2].detach(), EPSILON, ITERATIONS, group=group)
    return swav_loss(scores, potentials), None


def run_collectives(part: Sequence[Collective], group: dist.ProcessGroup, device: torch.device) -> None:
    """Run collectives one after the other, on zeros. Does nothing in a single process, as a step."""
    world_size = dist.get_world_size(group)
    for kind, size, dtype in part if world_size > 1 else ():
        values = torch.zeros(size, dtype=dtype, device=device)
        if kind == "sum":
            dist.all_reduce(values, group=group)
        elif kind == "broadcast":
            dist.broadcast(values, 0, group=group)
        else:
            dist.all_gather([torch.empty_like(values) for _ in range(world_size)], values, group=group)


# Computed


def collectives(model: SwAV, resolutions: int) -> dict[str, list[Collective]]:
    """List the collectives of a step, by what they are for."""
    passes = {nn.BatchNorm2d: resolutions, nn.BatchNorm1d: 1}
    widths = [m.num_features for m in model.modules() for _ in range(passes.get(type(m), 0))]
    buffers = [buffer for buffer in model.buffers() if buffer.dim()]  # others count steps
    gradients, per_bucket = sum(p.numel() for p in model.parameters()), BUCKET // 4
    buckets = [min(per_bucket, gradients - start) for start in range(0, gradients, per_bucket)]
    scores = 2 * model.prototypes.out_features  # a number for each assigning crop and prototype
    # The first round of Sinkhorn gathers, the others sum.
    codes = [("gather", scores, torch.float32)] + [("sum", scores, torch.float32)] * (ITERATIONS - 1)
    return {
        "gradients": [("sum", size, torch.float32) for size in buckets],
        "BN forward": [("sum", 2 * width, torch.float64) for width in widths],
        "BN backward": [("sum", 2 * width, torch.float32) for width in widths],
        "codes": codes,
        "means": [("sum", scores + 2, torch.float64)],
        # DistributedDataParallel sends the first process's buffers before each step, those of each dtype at once.
        "buffers": [
            ("broadcast", sum(map(torch.numel, buffers)), torch.float32),
            ("broadcast", len(widths), torch.int64),
        ],
    }


def traffic(parts: dict[str, list[Collective]], world_size: int) -> dict[str, tuple[float, int]]:
    """Compute what one process sends in a step: (bytes, number of collectives).

    In a ring of W processes each sends the bytes of a sum 2 (W - 1) / W times, those of a gather W - 1 times, and those
    of a broadcast once.
    """
    times = {"sum": 2 * (world_size - 1) / world_size, "gather": world_size - 1, "broadcast": world_size > 1}
    return {
        name: (sum(times[kind] * size * dtype.itemsize for kind, size, dtype in part), len(part))
        for name, part in parts.items()
    }


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
        sent = traffic(collectives(model, resolutions=2), gpus)
        row = {f"{name}_ms": 1e3 * (size / speed + LATENCY * count) for name, (size, count) in sent.items()}
        if step_ms:
            backward_ms = step_ms * BACKWARD_SHARE
            exposed = sum(row.values()) - min(row["gradients_ms"], backward_ms)
            row |= {"hidden_percent": 100 * min(1, backward_ms / row["gradients_ms"]), "exposed_ms": exposed}
            row["efficiency"] = step_ms / (step_ms + exposed)
        print(f"computed {gpus:>5} GPUs:", ", ".join(f"{name} {value:.3f}" for name, value in row.items()))
        rows.append({"GPUs": gpus, "step_ms": step_ms, **row})
    return rows
