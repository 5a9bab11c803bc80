"""Measure time and peak memory of several candidates, and print the table.

    times = measure({"published": call, "ours": other_call}, repetitions=15, device=device)
    row = report({"B": 64}, times, ratios=[("published", "ours")], header=True)

The candidates run in turns, so that other work on the machine slows all of them alike.
"""

import ctypes
import multiprocessing
import platform
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from data import reuse_freed_memory
from sinkhorn_ext import backend

MIN_TURN = 20e-3  # seconds: a faster candidate is called several times in its turn
Times = dict[str, list[float]]  # candidate: seconds per call, one value per turn
Mark = Callable[[str], None]  # called with the name of a part of a step when this part ends


def no_mark(part: str) -> None:
    """Ignore the end of a part: the Mark of a turn that times whole steps."""


# Processes


def describe_machine(device: torch.device) -> dict[str, str | int]:
    """Return what the figures depend on: processor, threads, torch, GPU, implementation of sinkhorn_ext."""
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line.split(": ", 1)[1] for line in Path("/proc/cpuinfo").open() if line.startswith("model name")]
        processor = names[0].strip() if names else processor
    machine = {"processor": processor, "threads": torch.get_num_threads(), "torch": torch.__version__}
    if device.type == "cuda":
        machine["GPU"] = torch.cuda.get_device_name(device)
    return machine | {"sinkhorn_ext": backend(device)}


def fresh_process() -> ProcessPoolExecutor:
    """Start a process in which nothing ran before. It may start processes itself; those of a Pool may not."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))


def run_in(process: ProcessPoolExecutor, function: Callable, *arguments: object) -> Any:
    """Call a function in a fresh process and return its result."""
    return process.submit(function, *arguments).result()


def setup_process(threads: int, device: torch.device, *, reuse_memory: bool = True) -> None:
    """Prepare a fresh process as train.py does. reuse_memory: keep freed memory for reuse, as train.py does."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    if reuse_memory:
        reuse_freed_memory()
    if device.type == "cuda":
        torch.cuda.set_device(device)


# Time


def measure(candidates: dict[str, Callable], repetitions: int, device: torch.device) -> Times:
    """Time all candidates, in turns. Three turns each come first, as warm-up."""
    calls = {
        name: 1 + int(MIN_TURN / min(_time_turn(call, 1, device) for _ in range(3)))
        for name, call in candidates.items()
    }
    times = {name: [] for name in candidates}
    for _ in range(repetitions):
        for name, call in candidates.items():
            times[name].append(_time_turn(call, calls[name], device))
    return times


def _time_turn(call: Callable, calls: int, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / calls


def synchronize(device: torch.device) -> None:
    """Wait until the GPU has done all its work. A CPU has done it already."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# Memory


def prepare_for_peaks(device: torch.device) -> bool:
    """Make a fresh process ready for `peak_bytes`. Return False if the system does not report peaks."""
    if device.type == "cpu":
        if sys.platform != "linux":
            return False
        ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: return freed memory to the system at once
    return True


def peak_bytes(call: Callable, device: torch.device) -> int:
    """Measure the memory that a second call needs at its peak, without what was allocated before."""
    call()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _resident_bytes("VmRSS")
    call()
    return _resident_bytes("VmHWM") - before


def _resident_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


# Tables


def report(
    sizes: dict[str, int], times: Times, ratios: list[tuple[str, str]], *, header: bool, images: int = 0
) -> dict[str, Any]:
    """Print one row of a table and return all its figures.

    Each cell is the median in ms, with half the distance between the quartiles in percent of it. ratios: pairs
    (slower, faster) of candidates, whose medians are divided. images: number that a call processes, to print
    images/s too (0: not printed).
    """
    medians = {name: statistics.median(values) * 1e3 for name, values in times.items()}
    quartiles = {name: [q * 1e3 for q in statistics.quantiles(values, n=4)] for name, values in times.items()}
    speedups = {f"{slow}/{fast}": medians[slow] / medians[fast] for slow, fast in ratios}
    if header:
        names = [f"{name:>13}" for name in medians] + [f"{name:>{len(name) + 1}}" for name in speedups]
        print(*[f"{name:>6}" for name in sizes], *names)
    cells = [f"{size:>6}" for size in sizes.values()]
    for name, (low, middle, high) in quartiles.items():
        cells.append(f"{medians[name]:8.3f} \u00b1{(high - low) / 2 / middle:3.0%}")
    cells += [f"{ratio:{len(name) + 1}.2f}" for name, ratio in speedups.items()]
    print(*cells, flush=True)
    row = {**sizes, "median_ms": medians, "quartiles_ms": quartiles, "ratios": speedups}
    if images:
        row["images_per_s"] = {name: 1e3 * images / median for name, median in medians.items()}
        print("    images/s:", ", ".join(f"{name} {speed:.1f}" for name, speed in row["images_per_s"].items()))
    return row
