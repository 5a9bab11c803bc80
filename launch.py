"""What every script starts with: options, device, processes, CPU cores, precision, messages and one-line errors.

    parser = OptionParser(prog="my_script.py", description=__doc__)
    parser.add("epochs", 10, positive_int, "Train for this many epochs.", common="N")
    run_script(lambda: main(parser.parse_args(sys.argv[1:])))

Copy this file to use it elsewhere: it needs only torch.
"""

import argparse
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

PROCESS_TIMEOUT = timedelta(hours=1)  # how long a process waits for the others
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# The largest numbers of an option; torch reports others in ways that are hard to read.
MAX_INT, FLOAT32 = 2**31 - 1, torch.finfo(torch.float32)
COMPILE_MIN_STEPS, COMPILE_MIN_CROP = 10_000, 128  # steps and pixels from which torch.compile repays its first minutes


# Errors


class UserError(ValueError):
    """Bad input. `run_script` prints it as one line; any other exception keeps its traceback."""


class RunStopped(RuntimeError):
    """The run ended itself, for example at a loss of NaN. `run_script` prints it as one line."""


@contextmanager
def user_errors(prefix: str = "") -> Iterator[None]:
    """Turn a ValueError of the calls inside into a UserError; `prefix` goes before its message."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{prefix}{error}".replace("\n", " ")) from None


def run_script(main: Callable[[], object], after_interrupt: str = "") -> None:
    """Run a script's main function. A UserError becomes one line per machine and exit code 2, a RunStopped code 1."""
    try:
        main()
    except (UserError, RunStopped) as error:
        if environment("LOCAL_RANK", 0) != 0:
            time.sleep(15)  # if the first process has the same error, torchrun ends this one meanwhile
        *_, message = str(error).splitlines() or [repr(error)]  # a loader worker's error comes below its traceback
        print(f"error: {message.removeprefix('launch.UserError: ')}", file=sys.stderr, flush=True)
        leave = os._exit if dist.is_initialized() else sys.exit  # a normal exit would wait for the other processes
        leave(2 if isinstance(error, UserError) else 1)
    except KeyboardInterrupt:
        log(f"\ninterrupted{after_interrupt}")
        sys.exit(130)


# Options


class OptionParser(argparse.ArgumentParser):
    """Command-line options with two tiers of help: --help shows the common ones, --help-all every one.

    Takes `_` or `-` in names, and options from a file (@FILE: one or more per line, # starts a comment).
    affects: {option: what it changes}, see `add`. parse_args raises UserError.
    """

    def __init__(self, **options: object) -> None:
        super().__init__(add_help=False, allow_abbrev=False, formatter_class=_HelpFormatter, **options)
        self.affects: dict[str, str] = {}
        self.common: list[argparse.Action] = []
        self.start_group("help")
        self.group.add_argument("-h", "--help", action=_ShowHelp, help="Show the common options.")
        self.group.add_argument("--help_all", action=_ShowHelp, help="Show all options.")

    def start_group(self, title: str, affects: str = "learning") -> None:
        """Put the options that are added next into a group of --help-all. affects: their default in `add`."""
        self.group, self.group_affects = self.add_argument_group(title), affects

    def add(
        self,
        name: str,
        default: object,
        kind: Callable[[str], object],
        help: str,
        *,
        common: str | None = None,
        affects: str | None = None,
        default_text: str | None = None,
        **more: object,
    ) -> None:
        """Add the option --NAME.

        common: for an option that --help shows, the name of its value there. affects: "model" if it shapes the
        weights, "learning" if it changes what is learned, "nothing" otherwise; a resumed run compares options by this.
        default_text: what the help says of the default, if not the value.
        """
        if default_text is None and default is not None:
            default_text = " ".join(map(str, default)) if isinstance(default, list) else str(default)
        if default_text is not None:
            help = f"{help.removesuffix('.')} (default: {default_text})."
        action = self.group.add_argument(f"--{name}", default=default, type=kind, help=help, metavar=common, **more)
        self.affects[name] = affects or self.group_affects
        if common:
            self.common.append(action)

    def format_help(self) -> str:
        """The text of --help."""
        return self._format_help([("options", self.common)])

    def format_full_help(self) -> str:
        """The text of --help-all."""
        return self._format_help([(group.title, group._group_actions) for group in self._action_groups])

    def _format_help(self, sections: Iterable[tuple[str, list[argparse.Action]]]) -> str:
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, [], [])
        formatter.add_text(self.description)
        for title, actions in sections:
            formatter.start_section(title)
            formatter.add_arguments(actions)
            formatter.end_section()
        formatter.add_text(self.epilog)
        return formatter.format_help()

    def parse_args(self, argv: Sequence[str]) -> argparse.Namespace:
        return super().parse_args([_underscored(word) for word in argv])

    def convert_arg_line_to_args(self, line: str) -> list[str]:
        return [_underscored(word) for word in shlex.split(line, comments=True)]

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')} (python {self.prog} --help-all lists the options)")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=24, width=100)


class _ShowHelp(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:
        super().__init__(option_strings, dest=argparse.SUPPRESS, default=argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser: OptionParser, *_: object) -> None:
        print(parser.format_full_help() if "--help_all" in self.option_strings else parser.format_help(), end="")
        parser.exit()


def _underscored(word: str) -> str:
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value if word.startswith("--") else word


def number(kind: type, least: float, above: bool = False) -> Callable[[str], int | float]:
    """The type of an option: an int or a finite float that is `least` or more, or (above) more than `least`."""

    def parse(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        what = "a whole number" if kind is int else "a number"
        text = text if len(text) < 50 else f"{text[:50]}... ({len(text)} characters)"
        if not (value > least if above else value >= least):
            raise argparse.ArgumentTypeError(f"expected {what} {'above' if above else 'from'} {least}, got {text}")
        smallest, largest = (1, MAX_INT) if kind is int else (FLOAT32.tiny, FLOAT32.max)
        if value > largest or 0 < value < smallest:
            raise argparse.ArgumentTypeError(f"expected {what} from {smallest:.5g} to {largest:.10g}, got {text}")
        return value

    return parse


nonnegative_int, positive_int = number(int, 0), number(int, 1)
nonnegative, positive = number(float, 0), number(float, 0, above=True)


def int_or_auto(text: str) -> int | str:
    """The type of an option: "auto", or an int that is 0 or more."""
    return text if text == "auto" else nonnegative_int(text)


def as_command_line(options: Mapping[str, object]) -> str:
    """Options as a user would type them."""
    return " ".join(f"--{n} {' '.join(map(str, v)) if isinstance(v, list) else v}" for n, v in options.items())


# Device, processes, cores, precision


def environment(name: str, default: int) -> int:
    """A number that torchrun sets for each of its processes."""
    return int(os.environ.get(name, default))


def choose_device(device: str = "auto") -> torch.device:
    """This process's device. device: "auto", "cuda" or "cpu".

    Warns of a GPU that torch cannot use. Raises UserError if there are fewer GPUs than processes.
    """
    gpus, local_world_size = torch.cuda.device_count(), environment("LOCAL_WORLD_SIZE", 1)
    if device == "cuda" and not gpus:
        reason = why_no_gpu() or "it finds none on this machine"
        raise UserError(
            f"--device cuda: torch cannot use a GPU: {reason}; write --device cpu, or install another torch"
        )
    if device == "auto" and not gpus and (reason := why_no_gpu()):
        log(f"warning: this machine has a GPU, but torch cannot use it: {reason}; running on the CPU")
    if device == "cpu" or not gpus:
        return torch.device("cpu")
    if local_world_size > gpus:
        raise UserError(
            f"--nproc_per_node={local_world_size}: this machine has {gpus} GPU(s); write "
            f"torchrun --nproc_per_node={gpus} {Path(sys.argv[0]).name} ..., or add --device cpu"
        )
    return torch.device("cuda", environment("LOCAL_RANK", 0))


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


def setup_processes(device: torch.device) -> tuple[int, int]:
    """Join the other processes that torchrun started, with NCCL on GPUs and gloo on CPUs. Returns (rank, world size).

    A single process forms no group.
    """
    world_size = environment("WORLD_SIZE", 1)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PROCESS_TIMEOUT)
    return environment("RANK", 0), world_size


def leave_processes() -> None:
    """Leave the process group. Not for errors: their message has to be printed before the other processes notice."""
    if dist.is_initialized():
        dist.destroy_process_group()


def mean_over_processes(values: torch.Tensor) -> torch.Tensor:
    """Average over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


def available_cores() -> int:
    """CPU cores for each training process of this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores // environment("LOCAL_WORLD_SIZE", 1)


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


def choose_precision(precision: str | None, device: torch.device) -> torch.dtype:
    """The dtype of the forward pass, by name or (None) the best of the device. Raises UserError if it cannot train."""
    if precision is None and device.type == "cuda":  # GPUs before 2020 have only fp16
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif (
        precision is None
    ):  # Intel's CPUs with AVX512-BF16 or AMX, AMD's from Zen 4 on; torch has no public name for it
        precision = "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"
    dtype = DTYPES[precision]
    if device.type == "cpu" and dtype == torch.float16:
        raise UserError("--precision fp16: expected fp32 or bf16 on a CPU; fp16 needs a GPU")
    return dtype


def use_compile(choice: str, device: torch.device, world_size: int, *, steps: int, crop_size: int) -> bool:
    """Whether to use torch.compile. choice: "on", "off", or "auto": if it saves time and works on this machine.

    It saves time on one GPU, in long runs of large crops. It gains nothing on a CPU, nor for crops so small that the
    GPU waits for the host. With several processes SyncBatchNorm breaks the graph in each layer.
    """
    if choice != "auto":
        return choice == "on"
    if device.type != "cuda" or world_size > 1 or steps < COMPILE_MIN_STEPS or crop_size < COMPILE_MIN_CROP:
        return False
    try:
        torch.compile(lambda x: x.square() + 1)(torch.ones(8, device=device))
    except Exception as error:  # without Triton, a C compiler or Python's headers it fails in many ways
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        log(f"--compile off: torch.compile does not work here ({reason}); it would make steps faster")
        return False
    return True


# Messages


def log(text: str, end: str = "\n") -> None:
    """Print from the first process only."""
    if environment("RANK", 0) == 0:
        print(text, end=end, flush=True)


def show_progress(line: str, keep: bool = False) -> None:
    """Print a progress line. On a terminal the next line overwrites it, unless it is to be kept."""
    on_terminal = sys.stdout.isatty()
    log(f"\r\033[2K{line}" if on_terminal else line, end="" if on_terminal and not keep else "\n")


def track(batches: Iterable, title: str) -> Iterator:
    """Yield the batches, with a progress line: each second on a terminal, every 30 s in a file."""
    interval = 1 if sys.stdout.isatty() else 30
    start = last_line = time.perf_counter()
    for done, batch in enumerate(batches, 1):
        yield batch
        now = time.perf_counter()
        if now - last_line > interval:
            left = timedelta(seconds=round((now - start) / done * (len(batches) - done)))
            show_progress(f"{title}: batch {done}/{len(batches)}  ETA {left}")
            last_line = now
    if interval == 1 and last_line > start:
        log("\r\033[2K", end="")
