"""What this machine offers: device, precision, torch.compile, cores, memory, loader workers.

    device = choose_device("auto")
    workers = workers_that_fit(set_threads_and_workers("auto", device), batch_bytes=2**20)

Copy this file with launch.py to use it elsewhere: they need only torch.
"""

import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import torch

from launch import OptionParser, UserError, environment, log, workers_or_auto

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COMPILE_MIN_STEPS, COMPILE_MIN_CROP = 10_000, 128  # steps and pixels from which torch.compile repays its first minutes
PREFETCH = 2  # batches that each loader worker loads ahead, as in torch.utils.data.DataLoader


# Device, precision, torch.compile


def choose_device(device: str = "auto") -> torch.device:
    """This process's device. device: "cuda", "mps" (Apple's GPU), "cpu", or "auto": cuda if there is one, else cpu.

    Warns of a GPU that torch cannot use. Raises UserError if there are fewer GPUs than processes; with
    SWAV_BACKEND=gloo in the environment they share GPUs.
    """
    gpus, local_world_size = torch.cuda.device_count(), environment("LOCAL_WORLD_SIZE", 1)
    if device == "mps":
        if not torch.backends.mps.is_available():
            raise UserError("--device mps: this torch finds no Apple GPU; write --device cpu")
        if environment("WORLD_SIZE", 1) > 1:
            raise UserError("--device mps: expected a single process; write --device cpu for several")
        return torch.device("mps")
    if device == "cuda" and not gpus:
        reason = why_no_gpu() or "it finds none on this machine"
        raise UserError(
            f"--device cuda: torch cannot use a GPU: {reason}; write --device cpu, or install another torch"
        )
    if device == "auto" and not gpus and (reason := why_no_gpu()):
        log(f"warning: this machine has a GPU, but torch cannot use it: {reason}; running on the CPU")
    if device == "cpu" or not gpus:
        return torch.device("cpu")
    has_its_own = gpus == 1 and "SLURM_GPUS_PER_TASK" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ
    if local_world_size > gpus and not has_its_own and os.environ.get("SWAV_BACKEND") != "gloo":
        raise UserError(
            f"--nproc_per_node={local_world_size}: this machine has {gpus} GPU(s); write "
            f"torchrun --nproc_per_node={gpus} {Path(sys.argv[0]).name} ..., or add --device cpu"
        )
    return torch.device("cuda", environment("LOCAL_RANK", 0) % gpus)


def why_no_gpu() -> str | None:
    """Why torch does not use the NVIDIA GPU of this machine; None if there is none, or if it is hidden on purpose."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1") or not gpu_files():
        return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    try:
        torch.cuda.init()
    except Exception as error:  # torch and the driver raise several kinds
        return str(error).splitlines()[0]
    return "CUDA starts, but lists no GPU"


def gpu_files() -> list[Path]:
    """The files by which Linux offers NVIDIA GPUs."""
    return [*Path("/dev").glob("nvidia[0-9]*"), *Path("/dev").glob("dxg")]


def name_of(dtype: torch.dtype) -> str:
    """The name of a dtype, as in --precision."""
    return next(name for name in DTYPES if DTYPES[name] == dtype)


def choose_precision(precision: str | None, device: torch.device) -> torch.dtype:
    """The dtype of the forward pass, by name or (None) the best of the device. Raises UserError if it cannot train."""
    if precision is None and device.type == "cuda":  # GPUs before 2020 have only fp16
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif precision is None:  # CPUs: Intel's with AVX512-BF16 or AMX, AMD's from Zen 4 on; torch has no public name
        precision = "bf16" if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported() else "fp32"
    dtype = DTYPES[precision]
    if device.type == "mps" and dtype != torch.float32:
        raise UserError(f"--precision {precision}: expected fp32 on --device mps")
    if device.type == "cpu" and dtype == torch.float16:
        raise UserError("--precision fp16: expected fp32 or bf16 on a CPU; fp16 needs a GPU")
    return dtype


def add_machine_options(parser: OptionParser) -> None:
    """Add --workers and --device, as the scripts that do not train take them."""
    add = parser.add
    add("workers", "auto", workers_or_auto, "Load images in this many processes, or auto.", common="N")
    add("device", "auto", str, "Use cuda, cpu, mps, or auto: cuda if there is such a GPU, else cpu.",
        common="NAME", choices=("auto", "cuda", "cpu", "mps"))  # fmt: skip


def use_compile(
    choice: str,
    device: torch.device,
    steps: int,
    crop_size: int,
    exchange: Callable[[str, object], list] = lambda doing, value: [value],
) -> bool:
    """Whether to use torch.compile. choice: "on", "off", or "auto": if it saves time and works in every process.

    It saves time on GPUs, in long runs of large crops. It gains nothing on a CPU, nor for crops so small that the GPU
    waits for the host. steps: still to do. crop_size: of the largest crops, in pixels. exchange: gives the values of
    all processes, see processes.exchange. Every process must call this.
    """
    if choice == "on" and device.type == "mps":
        raise UserError("--compile on: expected off on --device mps")
    if choice != "auto":
        return choice == "on"
    if device.type != "cuda" or steps < COMPILE_MIN_STEPS or crop_size < COMPILE_MIN_CROP:
        return False
    # A single process without it would do other work than the others, which would wait for it.
    reasons = exchange("trying torch.compile", why_no_compile(device))
    failed = [rank for rank, reason in enumerate(reasons) if reason]
    if failed:
        where = f"on rank {failed[0]}" if len(reasons) > 1 else "here"
        log(f"--compile off: torch.compile does not work {where} ({reasons[failed[0]]}); it would make steps faster")
    return not failed


def why_no_compile(device: torch.device) -> str | None:
    """Why torch.compile fails on this device, by trying it; None if it works."""
    try:
        torch.compile(lambda x: x.square() + 1)(torch.ones(8, device=device))
    except Exception as error:  # without Triton, a C compiler or Python's headers it fails in many ways
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


# Cores, memory, loader workers


def available_cores() -> int:
    """CPU cores for each training process of this machine, within the CPU quota of its control groups."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min(cores, cpu_quota()))) // environment("LOCAL_WORLD_SIZE", 1)


def control_groups(controller: str) -> Iterator[tuple[Path, bool]]:
    """Folders of this process's control groups (Docker, Slurm), each with whether it is of version 2.

    Parents too, as their limits hold for their children. controller: "memory" or "cpu".
    """
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if not controllers or controller in controllers.split(","):
                for folder in (Path(group), *Path(group).parents):
                    mount = Path("/sys/fs/cgroup", controller if controllers else "")
                    yield mount / str(folder)[1:], not controllers


def _numbers(path: Path) -> list[float]:
    """The numbers in a file of a control group; "max" is no limit. Empty if there is no such file."""
    try:
        return [math.inf if word == "max" else float(word) for word in path.read_text().split()]
    except (OSError, ValueError):
        return []


def cpu_quota() -> float:
    """CPU cores that this process's control groups grant; inf without a limit."""
    cores = math.inf
    for folder, is_v2 in control_groups("cpu"):
        names = ("cpu.max",) if is_v2 else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        quota, period, *_ = [number for name in names for number in _numbers(folder / name)] + [-1, -1]
        if quota > 0 and period > 0:  # -1 is no limit
            cores = min(cores, quota / period)
    return cores


def memory_left() -> float:
    """Bytes of memory that this process may still take, of the machine's and of its control groups'."""
    left = math.inf
    with suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        left = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    for folder, is_v2 in control_groups("memory"):
        limit, used = ("memory.max", "memory.current") if is_v2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        if limits := _numbers(folder / limit):
            left = min(left, limits[0] - sum(_numbers(folder / used)) + _reclaimable(folder))
    return max(0, left)


def _reclaimable(folder: Path) -> int:
    """Bytes of files that a control group caches and the system may drop."""
    with suppress(OSError):
        lines = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return int(lines.get("total_inactive_file", lines.get("inactive_file", 0)))
    return 0


def shared_memory_left() -> float:
    """Bytes free in /dev/shm, through which loader workers hand over batches; inf where a system has none."""
    try:
        return shutil.disk_usage("/dev/shm").free
    except OSError:
        return math.inf


def shared_memory_needed(workers: int, batch_bytes: int) -> int:
    """Bytes of /dev/shm that loader workers of all processes of this machine need, as in `workers_that_fit`."""
    return environment("LOCAL_WORLD_SIZE", 1) * (PREFETCH * workers + 1) * batch_bytes if workers else 0


def largest_file() -> float:
    """Bytes that a file may have, also those in /dev/shm; inf without a limit."""
    try:
        import resource
    except ImportError:  # on Windows
        return math.inf
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    return math.inf if limit == resource.RLIM_INFINITY else limit


def workers_that_fit(workers: int, batch_bytes: int) -> int:
    """How many of the loader's workers /dev/shm holds the batches of; says so if these are fewer than `workers`.

    batch_bytes: of a batch of one process. Each worker loads some batches ahead, and one more is in use.
    """
    if workers and batch_bytes > largest_file():
        largest = f"{largest_file() / 2**20:.1f} MiB"
        log(f"--workers: 0 in place of {workers}, as files may have {largest} at most (ulimit -f)")
        return 0
    free, fit = shared_memory_left(), workers
    while shared_memory_needed(fit, batch_bytes) > free:
        fit -= 1
    if fit < workers:
        processes = environment("LOCAL_WORLD_SIZE", 1)
        of_each = f" in each of {processes} processes" if processes > 1 else ""
        log(
            f"--workers: {fit} in place of {workers}{of_each}, as /dev/shm has {free / 2**20:.0f} MiB free and each "
            f"worker needs {PREFETCH} batches of {batch_bytes / 2**20:.1f} MiB there; more: docker run --shm-size=8g"
        )
    return fit


def set_threads_and_workers(
    workers: int | str, device: torch.device, *, crop_only: bool = False, in_memory: bool = False
) -> int:
    """Divide the cores between computing and loading: set torch's threads, return the number of loader workers.

    workers: a number, or "auto". crop_only: workers leave augmentation to the device. in_memory: no files to read.
    On a CPU, workers that augment get half of the cores, and training the others. Workers that only crop take so
    little time that training keeps all cores; for images in memory they are not worth a process. Measured in
    MEASURED.md. OMP_NUM_THREADS is respected, except for the 1 that torchrun sets for several processes.
    """
    cores = available_cores()
    if workers == "auto" and device.type == "cuda":
        workers = min(16, max(1, cores - 1))
    elif workers == "auto" and not crop_only:
        workers = cores // 2
    elif workers == "auto":
        workers = 0 if in_memory else min(cores, max(1, cores // 8))
    set_by_user = "OMP_NUM_THREADS" in os.environ and environment("LOCAL_WORLD_SIZE", 1) == 1
    if device.type == "cpu" and not set_by_user:
        torch.set_num_threads(max(1, cores if crop_only else cores - workers))
    return workers
