"""A training step from JPEG files to new weights, the published program's and ours, and two of its parts.

The parts are LARS on the parameters of ResNet-50, and a ResNet-18 on images so small that its last maps have 2x2
pixels.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from bench import published
from bench.measure import Mark, Times, fresh_process, measure, no_mark, report, run_in, setup_process, synchronize
from bench.pipeline import PHOTO, describe_crops, write_photos
from bench.published import LEARNING_RATE, WEIGHT_DECAY
from data import MultiCrop, augment, crops_to_device, training_loader
from guard import CollapseGuard
from images import ImageFiles
from loss import SwAVLoss
from machine import choose_precision
from model import ResNet, SwAV, statistics_kept
from optim import LARS

SMALL_SIDE = 32  # pixels of an image whose maps in the last stage have 2x2
PARTS = ("data wait", "copy", "augment", "forward", "codes + loss", "guard", "backward", "all-reduce", "LARS", "other")
GUARD_LINE, LINE_EVERY = "guard, at a progress line", 50  # steps


class Setup(NamedTuple):
    """What both programs train."""

    arch: str
    multi_crop: MultiCrop
    nmb_prototypes: int
    batch_size: int
    steps: int  # per turn
    workers: int
    device: torch.device
    is_compiled: bool  # only ours


def run(
    device: torch.device,
    *,
    repetitions: int = 15,
    threads: int = 1,
    batch_size: Sequence[int] | None = None,
    nmb_prototypes: Sequence[int] | None = None,
    images: int = 32,
    size_crops: Sequence[int] | None = None,
    nmb_crops: Sequence[int] | None = None,
    workers: int | None = None,
    compile: str | None = None,
    steps: int | None = None,
) -> dict[str, list[dict]]:
    """Measure and print all three. Return their rows as "steps", "lars" and "small maps"."""
    on_gpu = device.type == "cuda"
    arch, sizes, counts = ("resnet50", [224, 96], [2, 6]) if on_gpu else ("resnet18", [64, 32], [2, 4])
    multi_crop = MultiCrop(size_crops or sizes, nmb_crops or counts, *published.SCALES)
    workers = workers or (10 if on_gpu else 1)
    steps = steps or (2 * workers if on_gpu else 4)
    is_compiled = compile == "on" or (on_gpu and compile is None)
    setups = [
        Setup(arch, multi_crop, prototypes, size, steps, workers, device, is_compiled)
        for size in batch_size or [64 if on_gpu else 32]
        for prototypes in nmb_prototypes or [3000]
    ]
    crops = 4 * (batch_size or [32])[0]  # train.py takes four crops of one size from small images
    return {
        "steps": compare_steps(setups, images, threads, repetitions),
        "lars": compare_lars(device, threads, repetitions),
        "small maps": compare_small_maps(crops, threads, repetitions),
    }


# Whole steps


def compare_steps(setups: Sequence[Setup], images: int, threads: int, repetitions: int) -> list[dict]:
    """Measure both programs on each setup and print the tables."""
    arch, multi_crop, _, _, steps, workers, device, is_compiled = setups[0]
    on_gpu = device.type == "cuda"
    # On a CPU, workers that augment need their own cores. Workers that only crop do not: train.py gives them none.
    program_threads = {"published": threads if on_gpu else max(1, threads - workers), "ours": threads}
    ours = str(choose_precision(None, device)).removeprefix("torch.") + ", compiled" * is_compiled
    theirs, on_threads = ("float16 with GradScaler", "") if on_gpu else ("float32", f"threads: {program_threads}; ")
    width, height = PHOTO
    print(f"\nstep: files of {width}x{height} pixels to new weights, {arch}, {describe_crops(multi_crop)}, ms per step")
    print(f"published: {theirs}; ours: {ours}; {on_threads}{workers} loader worker(s) each;")
    print(f"turns of {steps} step(s), each from the arrival of one batch to the arrival of the next")
    rows = []
    for setup in setups:
        with TemporaryDirectory() as folder, ExitStack() as stack:
            write_photos(Path(folder), images, *PHOTO)
            programs = {name: stack.enter_context(fresh_process()) for name in program_threads}
            started = [
                programs[name].submit(start_training, name, folder, setup, count)
                for name, count in program_threads.items()
            ]
            for start in started:
                start.result()
            times, parts = step_times(programs, repetitions)
        sizes = {"B": setup.batch_size, "K": setup.nmb_prototypes}
        row = report(sizes, times, [("published", "ours")], header=True, images=setup.batch_size)
        rows.append(row | {"parts_ms": report_parts(parts)})
    return rows


def step_times(programs: dict[str, ProcessPoolExecutor], repetitions: int) -> tuple[Times, dict[str, Times]]:
    """Measure seconds per step of each program, and of each of its parts, in turns. The first turn is warm-up."""
    times = {name: [] for name in programs}
    parts = {name: {part: [] for part in PARTS} for name in programs}
    for repetition in range(repetitions + 1):
        for name, process in programs.items():
            seconds, seconds_of_parts = run_in(process, time_step), run_in(process, time_parts)
            print(f"    turn {repetition}, {name}: {seconds * 1e3:.1f} ms per step", flush=True)  # it may be stopped
            if repetition:
                times[name].append(seconds)
                for part in PARTS:
                    parts[name][part].append(seconds_of_parts[part])
    return times, parts


def report_parts(parts: dict[str, Times]) -> dict[str, dict[str, float]]:
    """Print the parts of a step in ms and percent. Return the ms."""
    medians = {
        name: {part: statistics.median(values) * 1e3 for part, values in times.items()} for name, times in parts.items()
    }
    print("    parts, in turns of their own; all-reduce: one process needs none, `scaling` times it for several")
    print(f"    guard: its count at each step, and 1/{LINE_EVERY} of what it measures for a progress line")
    print(f"    {'':12}", *[f"{name + ', ms':>16}     %" for name in medians])
    for part in PARTS:
        cells = [f"{ms[part]:16.3f} {ms[part] / sum(ms.values()):5.0%}" for ms in medians.values()]
        print(f"    {part:12}", *cells)
    return medians


# In the process of a program

_turns: "Turns"  # of this process


def start_training(program: str, folder: str, setup: Setup, threads: int) -> None:
    """Prepare this process for `time_step` and `time_parts`. program: "published" or "ours"."""
    global _turns
    setup_process(threads, setup.device, reuse_memory=program == "ours")
    images = ImageFiles(folder)
    images.paths = np.resize(images.paths, setup.batch_size * (setup.steps + setup.workers))  # repeats them
    if program == "published":
        options = dict(arch=setup.arch, nmb_prototypes=setup.nmb_prototypes, batch_size=setup.batch_size)
        options |= dict(workers=setup.workers, device=setup.device)
        _turns = Turns(published.Program(images.paths, setup.multi_crop, **options), setup)
    else:
        _turns = Turns(OurProgram(images, setup), setup)


def time_step() -> float:
    """Train for a turn. Return seconds per step."""
    return _turns.time_step(no_mark)


def time_parts() -> dict[str, float]:
    """Train for a turn. Return the seconds of each part of a step."""
    return _turns.time_parts()


class Turns:
    """Train a program for a turn and time it. program: has a `loader`, and `step(batch, mark)`."""

    def __init__(self, program: "published.Program | OurProgram", setup: Setup) -> None:
        self.program, self.setup = program, setup

    def time_step(self, mark: Mark) -> float:
        """Return seconds per step."""
        batches = iter(self.program.loader)
        for _ in range(self.setup.workers):  # the first batches arrive all at once, faster than workers make them
            batch = next(batches)
        synchronize(self.setup.device)
        start = time.perf_counter()
        mark("start")
        for _ in range(self.setup.steps):
            self.program.step(batch, mark)
            mark("other")
            batch = next(batches)
            mark("data wait")
        synchronize(self.setup.device)
        return (time.perf_counter() - start) / self.setup.steps

    def time_parts(self) -> dict[str, float]:
        """Return seconds per step of each part. On a GPU they lie between events, so the host need not wait."""
        marks, on_gpu = [], self.setup.device.type == "cuda"

        def mark(part: str) -> None:
            marks.append((part, torch.cuda.Event(enable_timing=True) if on_gpu else time.perf_counter()))
            if on_gpu:
                marks[-1][1].record()

        self.time_step(mark)
        seconds = dict.fromkeys((*PARTS, GUARD_LINE), 0.0)
        for (_, before), (part, after) in pairwise(marks):
            seconds[part] += (before.elapsed_time(after) / 1e3 if on_gpu else after - before) / self.setup.steps
        seconds["guard"] += seconds.pop(GUARD_LINE) / LINE_EVERY
        return seconds


class OurProgram:
    """Loader and training step of train.py, on one process."""

    def __init__(self, images: ImageFiles, setup: Setup) -> None:
        self.device, on_gpu = setup.device, setup.device.type == "cuda"
        options = dict(workers=setup.workers, pin_memory=on_gpu, crop_only=True)
        self.loader = training_loader(images, setup.multi_crop, setup.batch_size, **options)
        model = SwAV(setup.arch, nmb_prototypes=setup.nmb_prototypes)
        model = model.to(setup.device, memory_format=torch.channels_last)
        criterion = SwAVLoss(sum(setup.multi_crop.nmb_crops)).to(setup.device)
        self.augment = augment
        if setup.is_compiled:
            model.features = torch.compile(model.features, dynamic=False)
            self.augment = torch.compile(augment, dynamic=False)
        guard = CollapseGuard(setup.nmb_prototypes, setup.device)
        self.trainer = Trainer(model, model, criterion.loss_and_code_logits, setup.device, guard)
        self.stream = torch.cuda.Stream(setup.device) if on_gpu else None

    def step(self, batch: tuple, mark: Mark) -> None:
        """Train on a batch of the loader."""

        def marked_augment(pixels: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
            mark("copy")
            crops = self.augment(pixels, params).contiguous(memory_format=torch.channels_last)
            mark("augment")
            return crops

        options = dict(memory_format=torch.channels_last, augment=marked_augment)
        options["stream"] = self.stream if mark is no_mark else None  # parts that overlap cannot be timed apart
        self.trainer.step(crops_to_device(batch[0], self.device, **options), mark)


class Trainer:
    """Training step of train.py on crops that are on the device, with LARS and the device's default precision.

    network: the model, or DistributedDataParallel around it. loss: embeddings, scores, prototypes -> loss and code
    logits, as `SwAVLoss.loss_and_code_logits`. guard: None to leave it out.
    """

    def __init__(
        self, network: nn.Module, model: SwAV, loss: Callable, device: torch.device, guard: CollapseGuard | None = None
    ) -> None:
        self.network, self.model, self.loss, self.device, self.guard = network, model, loss, device, guard
        self.dtype = choose_precision(None, device)
        self.optimizer = LARS(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)

    def step(self, crops: Sequence[torch.Tensor], mark: Mark = no_mark) -> None:
        """Train on V crops [B, 3, S, S]."""
        self.model.normalize_prototypes()
        mark("other")
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            embeddings, scores = self.network(crops)
        mark("forward")
        loss, code_logits = self.loss(embeddings, scores, self.model.prototypes.weight)
        mark("codes + loss")
        self.optimizer.zero_grad()
        mark("other")
        with statistics_kept(self.model):
            loss.backward()
        mark("backward")
        self.optimizer.step()
        mark("LARS")
        if self.guard is not None:
            self.guard.count(code_logits)
            mark("guard")
            if mark is not no_mark:
                self.guard.measure(0.0, code_logits, embeddings[: len(crops[0])].detach())
                mark(GUARD_LINE)


# LARS


def compare_lars(device: torch.device, threads: int, repetitions: int) -> list[dict]:
    """Measure LARS on the parameters of ResNet-50 and print the table."""
    print(
        "\nLARS on the parameters of ResNet-50, ms. published: one by one, the host reads the norms; fused SGD: floor,"
    )
    print("it reads parameters, gradients and momentum once, and writes parameters and momentum")
    with torch.device("meta"):
        shapes = [p.shape for p in SwAV("resnet50").parameters()]
    with fresh_process() as process:
        times = run_in(process, lars_times, shapes, repetitions, threads, device)
    ratios = [("published", "ours"), ("ours", "fused SGD")]
    return [report({"params": len(shapes)}, times, ratios, header=True)]


def lars_times(shapes: Sequence[torch.Size], repetitions: int, threads: int, device: torch.device) -> Times:
    """Time a step of each optimizer."""
    setup_process(threads, device)
    return measure(lars_candidates(shapes, device), repetitions, device)


def lars_candidates(shapes: Sequence[torch.Size], device: torch.device) -> dict[str, Callable]:
    """Return a step of each optimizer, with its own copy of the parameters. Checks first that both LARS agree."""
    generator = torch.Generator().manual_seed(0)
    start, gradients = ([torch.randn(shape, generator=generator) for shape in shapes] for _ in range(2))
    start[0].zero_()  # LARS neither decays nor rescales it

    def copy_parameters() -> list[nn.Parameter]:
        return [nn.Parameter(p.to(device, copy=True)) for p in start]

    optimizers = {
        "published": published.LARS(copy_parameters()),
        "ours": LARS(copy_parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY),
        "fused SGD": torch.optim.SGD(copy_parameters(), LEARNING_RATE, momentum=0.9, fused=True),
    }
    parameters = {name: optimizer.param_groups[0]["params"] for name, optimizer in optimizers.items()}
    for _ in range(2):
        for name, optimizer in optimizers.items():
            for p, gradient in zip(parameters[name], gradients, strict=True):
                p.grad = gradient.to(device, copy=True)  # a new copy, as the published one rescales it in place
            optimizer.step()
    for theirs, ours in zip(parameters["published"], parameters["ours"], strict=True):
        assert torch.allclose(theirs, ours, rtol=1e-5, atol=1e-7), "our LARS differs from the published one"
    return {name: optimizer.step for name, optimizer in optimizers.items()}


# Small maps


def compare_small_maps(crops: int, threads: int, repetitions: int) -> list[dict]:
    """Measure a ResNet-18 on small crops and print the table."""
    print(f"\nsmall maps: ResNet-18 on {crops} crops of {SMALL_SIDE} pixels, forward and backward on a CPU, ms")
    print("torch's: with torch's own convolutions")
    with fresh_process() as process:
        times = run_in(process, small_map_times, crops, repetitions, threads)
    return [report({"crops": crops}, times, [("torch's", "ours")], header=True, images=crops)]


def small_map_times(images: int, repetitions: int, threads: int) -> Times:
    """Time forward and backward with torch's 3x3 convolutions and with ours."""
    cpu = torch.device("cpu")
    setup_process(threads, cpu)
    crops = torch.randn(images, 3, SMALL_SIDE, SMALL_SIDE).to(memory_format=torch.channels_last)
    networks = {name: ResNet("resnet18", stem="medium") for name in ("torch's", "ours")}
    published.use_torch_convolutions(networks["torch's"])
    for network in networks.values():
        network.to(memory_format=torch.channels_last)
    return measure({name: lambda n=n: n(crops).sum().backward() for name, n in networks.items()}, repetitions, cpu)
