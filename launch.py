"""What every script starts with: options, device, processes, CPU cores, precision, messages and one-line errors.

    parser = OptionParser(prog="my_script.py", description=__doc__)
    parser.add("epochs", 10, positive_int, "Train for this many epochs.", common="N")
    run_script(lambda: main(parser.parse_args(sys.argv[1:])))

Copy this file to use it elsewhere: it needs only torch.
"""

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import platform
import re
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
PROCESS_TIMEOUT = timedelta(minutes=10)  # how long a process waits for the others once training runs
START_TIMEOUT = timedelta(hours=1)  # and before: listing millions of files takes long
SILENCE = 60  # seconds without a sign of life after which a process counts as dead
BEAT = 1.0  # seconds between signs of life
GRACE = 4  # seconds that a process has to end by itself after another one failed
AGREED_CODES = (75, 130, 143)  # of runs that all processes end together, with their state saved
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# The largest numbers of an option; torch reports others in ways that are hard to read.
MAX_INT, FLOAT32 = 2**31 - 1, torch.finfo(torch.float32)
COMPILE_MIN_STEPS, COMPILE_MIN_CROP = 10_000, 128  # steps and pixels from which torch.compile repays its first minutes


# Errors


class UserError(ValueError):
    """Bad input. `run_script` prints it as one line; any other exception keeps its traceback."""


class RunStopped(RuntimeError):
    """The run ended itself, for example at a loss of NaN. `run_script` prints it as one line and exits with `code`."""

    def __init__(self, message: str = "", code: int = 1) -> None:
        super().__init__(message)
        self.code = code


@contextmanager
def user_errors(prefix: str = "") -> Iterator[None]:
    """Turn a ValueError of the calls inside into a UserError; `prefix` goes before its message.

    Only for calls that do nothing but check what the user gave: a ValueError elsewhere is a bug.
    """
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{prefix}{error}".replace("\n", " ")) from None


def run_script(main: Callable[[], object], after_interrupt: str = "") -> None:
    """Run a script's main function; an error that its user can do something about becomes one line.

    Exit code 2 for a UserError, that of a RunStopped, 1 for other errors. Of many processes, an error of one ends all:
    each machine's first process prints it, with host and rank. The traceback goes to the file of `log_to`; that of a
    bug is printed too. Loader workers do not outlive the script.
    """
    with suppress(AttributeError):  # of a stdout that somebody replaced
        sys.stdout.reconfigure(errors="backslashreplace")  # a path in another encoding must not end a run
    try:
        read_slurm_step()
        connect_processes()
        main()
    except KeyboardInterrupt:
        log(f"\ninterrupted{after_interrupt}")
        _exit(130)
    except Exception as error:
        _write_to_log_file(traceback.format_exc())
        _end_with(error)
    finally:
        kill_children()


def _end_with(error: Exception) -> None:
    """Print what `run_script` promises, and leave; raises the error again if it is a bug in a single process."""
    message, code = one_line(error), getattr(error, "code", 2 if isinstance(error, UserError) else 1)
    if code in AGREED_CODES:
        if environment("LOCAL_RANK", 0) == 0:
            print(message, file=sys.stderr, flush=True)
        leave_processes(limit=30)
    elif _peers is not None and message is None and _is_lost_connection(error):
        _peers.end(_peers.find_failure(error))
    elif message is None:
        if _peers is None:
            raise error
        traceback.print_exc()
        _peers.end(_peers.fail(traceback.format_exception_only(error)[-1].strip(), code))
    elif _peers is not None:
        _peers.end(_peers.fail(message, code))
    else:
        print(f"error: {message}", file=sys.stderr, flush=True)
    _exit(code)


def _exit(code: int) -> NoReturn:
    if not dist.is_initialized():
        sys.exit(code)
    kill_children()
    sys.stdout.flush()
    os._exit(code)  # a normal exit would wait for the other processes


def kill_children() -> None:
    """End the loader's workers, which ignore signals: one that hangs would keep the script from ending."""
    if threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch reports killed workers by it
    for child in multiprocessing.active_children():
        child.kill()


REMEDIES = {  # what an error's text holds: what happened, and what to do
    r"DataLoader timed out after (\d+) seconds": (
        "the loader's workers gave no batch for {0} seconds: the storage of the images is stuck or slow, /dev/shm is "
        "full, or memory is short; look at these, or lower --workers (0: none)"
    ),
    r"killed by signal: Bus error|unable to allocate shared memory|unable to (?:mmap|write to file) .*torch_": (
        "a loader worker found /dev/shm full; make it larger (docker run --shm-size=8g), or lower --workers (0: none)"
    ),
    r"DataLoader worker .*(?:killed by signal|exited unexpectedly)": (
        "a loader worker was killed or ended by itself, most likely as memory or /dev/shm was short: lower --workers "
        "or --batch_size; --workers 0 shows its error"
    ),
    r"can't allocate memory|Cannot allocate memory": "memory is short; lower --batch_size or --workers",
    r"Too many open files|received 0 items of ancdata": (
        "too many open files; raise the limit (ulimit -n 65536), or lower --workers"
    ),
}


def one_line(error: Exception) -> str | None:
    """What an error means and what to do about it, in one line; None if it is a bug."""
    text = str(error)
    if isinstance(error, (UserError, RunStopped)):
        *_, message = text.splitlines() or [repr(error)]  # a loader worker's error comes below its traceback
        return message.removeprefix("launch.UserError: ")
    if isinstance(error, torch.OutOfMemoryError):
        return "the GPU is out of memory; lower --batch_size, or use fewer or smaller crops"
    if isinstance(error, MemoryError):
        return "memory is short; lower --batch_size or --workers"
    for pattern, message in REMEDIES.items():
        if isinstance(error, (RuntimeError, OSError)) and (found := re.search(pattern, text)):
            return message.format(*found.groups())
    return None


# Options


class OptionParser(argparse.ArgumentParser):
    """Command-line options with two tiers of help: --help shows the common ones, --help-all every one.

    Takes `_` or `-` in names, and options from a file (@FILE, see `read_option_file`; fromfile_prefix_chars as in
    argparse). affects: {option: what it changes}, see `add`. parse_args raises UserError.
    """

    def __init__(self, fromfile_prefix_chars: str = "", **options: object) -> None:
        self.file_marks = tuple(fromfile_prefix_chars)
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
        lines = []  # (the file and line, or "", and its words)
        for word in argv:
            from_file = word.startswith(self.file_marks or "\0")
            lines += read_option_file(word[1:]) if from_file else [("", [word])]
        lines = [(place, list(map(_underscored, words))) for place, words in lines]
        try:
            return super().parse_args([word for _, words in lines for word in words])
        except UserError as error:
            for end, (place, _) in enumerate(lines, 1):  # the first line with which the error comes
                try:
                    super().parse_args([word for _, words in lines[:end] for word in words])
                except UserError as same:
                    if place and str(same) == str(error):
                        raise UserError(f"{place}: {error}") from None
            raise

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')} (python {self.prog} --help-all lists the options)")


def read_option_file(path: str) -> list[tuple[str, list[str]]]:
    """Read options from a file, one or more per line: [("FILE, line N", words)].

    Spaces separate words. Quotes around a word, or around the value in --name=value, keep its spaces; within words
    they mean nothing, nor does a backslash. A # at the start of a line or after a space starts a comment. Raises
    UserError with file and line.
    """
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:  # paths may have any encoding
            lines = file.read().split("\n")
    except OSError as error:
        raise UserError(f"@{path}: cannot read this file of options: {error.strerror}") from None
    words_of_lines = []
    for number_of_line, line in enumerate(lines, 1):
        place, words = f"{path}, line {number_of_line}", []
        for match in OPTION_WORD.finditer(line):
            name, quoted, quote_left_open, plain = match.group("name", "quoted", "open", "plain")
            if quote_left_open:
                raise UserError(f"{place}: expected a second {quote_left_open[0]} at the end of {quote_left_open}")
            words += [name + quoted[1:-1]] if quoted else [plain] if plain else []
        words_of_lines.append((place, words))
    return words_of_lines


# The words of a line; comments and spaces match as none of the groups.
OPTION_WORD = re.compile(
    r"""\s+|\#.*|(?P<name>(?:--[\w-]+=)?)(?:(?P<quoted>(?:".*?"|'.*?')(?=\s|$))|(?P<open>["'].*))|(?P<plain>\S+)"""
)


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
    if local_world_size > gpus and not has_its_own and backend_of("cuda") == "nccl":
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


def backend_of(device_type: str) -> str:
    """The backend of the process group: nccl for CUDA, else gloo. SWAV_BACKEND=gloo takes gloo for CUDA as well."""
    chosen = os.environ.get("SWAV_BACKEND", "")
    if chosen not in ("", "gloo"):
        raise UserError(f"SWAV_BACKEND (environment): expected gloo, or leave it out, got {chosen}")
    return chosen or ("nccl" if device_type == "cuda" else "gloo")


def read_slurm_step() -> None:
    """Where srun started several tasks, set torchrun's variables from those of the step.

    Without srun, as in a plain sbatch script or salloc, and under torchrun, it does nothing. Raises UserError if
    several tasks run but the step's variables do not say which one this is: they would train side by side.
    """
    given = os.environ
    if "RANK" in given or "SLURM_STEP_ID" not in given or "SLURM_PROCID" not in given:
        return
    tasks = given.get("SLURM_STEP_NUM_TASKS", given.get("SLURM_NTASKS", "1"))
    if tasks == "1":
        return
    try:
        world_size, rank = int(tasks), int(given["SLURM_PROCID"])
        local_rank, node = int(given["SLURM_LOCALID"]), int(given.get("SLURM_NODEID", 0))
        per_node = given.get("SLURM_STEP_TASKS_PER_NODE") or given["SLURM_NTASKS_PER_NODE"]
        counts = [int(n) for n, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", per_node) for _ in range(int(times or 1))]
        local_world_size = counts[min(node, len(counts) - 1)]
        host = first_host(given["SLURM_STEP_NODELIST"])
        port = 15000 + (97 * int(given["SLURM_JOB_ID"]) + int(given["SLURM_STEP_ID"])) % 15000
        if not 0 <= local_rank <= rank < world_size:
            raise ValueError(f"SLURM_PROCID={rank} of SLURM_STEP_NUM_TASKS={world_size}")
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(
            f"Slurm started {tasks} tasks, but its variables do not say which one this is ({error}); start one task "
            "per GPU with srun, as recipes/slurm.sbatch does, or torchrun"
        ) from None
    values = dict(RANK=rank, WORLD_SIZE=world_size, LOCAL_RANK=local_rank, LOCAL_WORLD_SIZE=local_world_size)
    values |= dict(GROUP_RANK=node, MASTER_ADDR=host, MASTER_PORT=port)
    os.environ.update({name: str(value) for name, value in values.items()})


def first_host(hosts: str) -> str:
    """The first of Slurm's list of hosts: "gpu[003-010,12],cpu1" gives "gpu003"."""
    found = re.match(r"([^,\[\]]+)(?:\[([^,\-\]]+)[^\]]*\]([^,\[]*))?", hosts)
    if found is None:
        raise ValueError(f"SLURM_STEP_NODELIST={hosts}")
    return "".join(part or "" for part in found.groups())


_peers: "Peers | None" = None


def connect_processes() -> None:
    """Connect to the other processes that torchrun or srun started, if there are any. `run_script` does it first."""
    global _peers
    if _peers is None and environment("WORLD_SIZE", 1) > 1:
        _peers = Peers()


def setup_processes(device: torch.device) -> tuple[int, int]:
    """Join the other processes that torchrun or srun started. Returns (rank, world size).

    With NCCL on GPUs and gloo on CPUs. A single process forms no group. Raises UserError if the processes differ in
    their versions of Python, torch or this program.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    connect_processes()
    if _peers is not None:
        check_same("comparing versions", versions())
        note_activity("joining the other processes")
        places = dict(store=_peers.connect("groups"), rank=_peers.rank, world_size=_peers.world_size)
        dist.init_process_group(backend_of(device.type), timeout=PROCESS_TIMEOUT, **places)
    return environment("RANK", 0), environment("WORLD_SIZE", 1)


def leave_processes(limit: float = START_TIMEOUT.total_seconds()) -> None:
    """Leave the process group, when all processes do, or after `limit` seconds.

    Not for errors: `run_script` tells the others of these.
    """
    global _peers
    if _peers is not None:
        _peers.leave(limit)
        _peers = None
    if dist.is_initialized():
        dist.destroy_process_group()


def versions() -> dict[str, str]:
    """What has to be the same on all machines: versions of Python and torch, a checksum of the program's files."""
    program = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        program.update(path.read_bytes())
    return {"Python": platform.python_version(), "torch": torch.__version__, "program": program.hexdigest()[:12]}


def note_activity(doing: str) -> None:
    """Tell the other processes what this one does; errors and time-outs name it. Costs nothing."""
    if _peers is not None:
        _peers.doing = doing


def exchange(doing: str, value: object) -> list:
    """Give every process the values of all, in order of rank: anything that JSON can hold.

    Waits up to START_TIMEOUT, unlike a collective of the group, and logs whom it waits for. doing: what this is for.
    """
    if _peers is not None:
        return _peers.exchange(doing, value)
    values = [value]
    if dist.is_initialized():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


def check_same(doing: str, facts: Mapping[str, object]) -> None:
    """Raise UserError if processes differ in facts, naming both values and the ranks that differ from the first."""
    everyone = exchange(doing, [socket.gethostname(), dict(facts)])
    (first_host, first), *_ = everyone
    for name in first:
        others = [rank for rank, (_, theirs) in enumerate(everyone) if theirs.get(name) != first[name]]
        if others:
            host, theirs = everyone[others[0]]
            ranks = ", ".join(map(str, others[:8])) + (" ..." if len(others) > 8 else "")
            raise UserError(
                f"{name}: expected the same in all processes, got {first[name]} on rank 0 ({first_host}) and "
                f"{theirs.get(name)} on rank {ranks} ({host})"
            )


def share(doing: str, work: Callable[[], T]) -> T:
    """Do work on the first process only, and give its result, anything that JSON can hold, to all."""
    note_activity(doing)
    return exchange(doing, work() if environment("RANK", 0) == 0 else None)[0]


def in_turn(doing: str, work: Callable[[bool], T]) -> T:
    """Call work(True) on the first process of each machine, then work(False) on its others: one downloads for all."""
    note_activity(doing)
    is_first = environment("LOCAL_RANK", 0) == 0
    result = work(True) if is_first else None
    exchange(doing, None)
    return result if is_first else work(False)


def _is_lost_connection(error: Exception) -> bool:
    """Whether an error may come from another process that ended or hangs."""
    words = r"gloo|nccl|connection|connect\(|socket|broken pipe|TCPStore|timed out|time-?out"
    return isinstance(error, (RuntimeError, OSError)) and bool(re.search(words, str(error), re.IGNORECASE))


class Peers:
    """The processes of a run, which watch each other through a key-value store beside the process group.

    Each writes a sign of life every second, with what it is doing. The first process watches those of all, the others
    that of the first one. An error of one goes to the store too, and ends all within seconds, whatever they wait for.
    Every process needs one; the first hosts the store, unless torchrun does.
    """

    def __init__(self) -> None:
        self.rank, self.world_size = environment("RANK", 0), environment("WORLD_SIZE", 1)
        self.host, self.doing, self.failure, self.exchanges = socket.gethostname(), "starting", None, 0
        self.hosts_store = self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        self.has_left, self.is_ending, self.main_is_done = threading.Event(), threading.Lock(), threading.Event()
        self.last_beats: dict[int, tuple[bytes, int]] = {}  # rank: (its last sign of life, watches without a new one)
        self.unchanged_since, self.last_activities = time.monotonic(), None
        self.store = self.connect("peers", is_host=self.hosts_store)
        self.store.set(f"host/{self.rank}", self.host)
        threading.Thread(target=self._watch, daemon=True).start()
        self.exchange("starting", None, PROCESS_TIMEOUT.total_seconds())
        self.first_host = self._get("host/0")

    def connect(self, name: str, is_host: bool = False) -> dist.Store:
        """A connection to the store, for keys of this name. One for each use, as a waiting one blocks other calls."""
        address, port = os.environ.get("MASTER_ADDR", "localhost"), environment("MASTER_PORT", 29500)
        try:
            store = dist.TCPStore(address, port, None, is_host, PROCESS_TIMEOUT, wait_for_workers=False)
        except RuntimeError as error:
            what = f"cannot host the meeting point of the processes at {address}:{port}" if is_host else (
                f"cannot reach the first process at {address}:{port} within {PROCESS_TIMEOUT}"
            )  # fmt: skip
            raise RunStopped(f"rank {self.rank} ({self.host}) {what}: {str(error).splitlines()[0]}") from None
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return dist.PrefixStore(f"swav/{restart}/{name}", store)

    def name(self, ranks: Sequence[int]) -> str:
        """Ranks with their hosts and what they were last doing."""
        named = []
        for rank in ranks[:8]:
            host = self._get(f"host/{rank}") or "not started"
            _, _, doing = (self._get(f"beat/{rank}") or "").partition(" ")
            named.append(f"rank {rank} ({host}{', ' if doing else ''}{doing})")
        return ", ".join(named) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")

    def _get(self, key: str) -> str | None:
        with suppress(RuntimeError):
            return self.store.get(key).decode() if self.store.check([key]) else None
        return None

    def exchange(self, doing: str, value: object, limit: float = START_TIMEOUT.total_seconds()) -> list:
        """See launch.exchange. Raises RunStopped after `limit` seconds."""
        self.doing = doing
        self.exchanges += 1
        keys = [f"exchange/{self.exchanges}/{rank}" for rank in range(self.world_size)]
        self.store.set(keys[self.rank], json.dumps(value))
        start = last_line = time.monotonic()
        pause = 0.005
        while not self.store.check(keys):
            if self.failure is not None:
                self.end(self.failure)
            time.sleep(pause)
            pause, now = min(2 * pause, 0.5), time.monotonic()
            if now - last_line > 30 or now - start > limit:
                last_line = now
                missing = self.name([rank for rank, key in enumerate(keys) if not self.store.check([key])])
                if now - start > limit:
                    raise RunStopped(f"{doing}: {missing} did not come within {limit:.0f} seconds")
                log(f"waiting for {missing}")
        return [json.loads(text) for text in self.store.multi_get(keys)]

    # Watch each other

    def _watch(self) -> None:
        beats = 0
        while not self.has_left.wait(BEAT) and not self.main_is_done.is_set():
            beats += 1
            try:
                self.store.set(f"beat/{self.rank}", f"{beats} {self.doing}")
                self.failure = self._read_failure() or self._find_silent() or self._find_stuck()
            except RuntimeError:
                if self.has_left.is_set():
                    return
                reason = (
                    f"lost the connection to rank 0 ({self.first_host}): it ended, see its messages, or the network"
                )
                self.failure = dict(rank=self.rank, host=self.host, reason=reason, code=1, silent=[])
            if self.failure is not None:
                self.end(self.failure, from_watch=True)

    def _read_failure(self) -> dict | None:
        text = self._get("failure")
        return json.loads(text) if text else None

    def _find_silent(self) -> dict | None:
        silent = [rank for rank in (range(self.world_size) if self.rank == 0 else [0]) if self._is_silent(rank)]
        if not silent:
            return None
        return self.fail(
            f"{self.name(silent)} gave no sign of life for {SILENCE} seconds: killed, or stopped", 1, silent
        )

    def _is_silent(self, rank: int) -> bool:
        """Count this watch, not the time: after a pause of the whole machine nobody is blamed."""
        beat = (self._get(f"beat/{rank}") or "").encode()
        last, watches = self.last_beats.get(rank, (b"", 0))
        self.last_beats[rank] = beat, (0 if beat != last else watches + 1)
        return bool(beat) and watches * BEAT > SILENCE and not beat.endswith(b" left")

    def _find_stuck(self) -> dict | None:
        """If training has stood still for as long as processes may wait: those that are behind the others."""
        activities = {rank: beat.partition(b" ")[2].decode() for rank, (beat, _) in self.last_beats.items()}
        if activities != self.last_activities:
            self.unchanged_since, self.last_activities = time.monotonic(), activities
        steps = {rank: int(doing[5:]) for rank, doing in activities.items() if re.fullmatch(r"step \d+", doing)}
        waited = time.monotonic() - self.unchanged_since
        # Earlier than NCCL, which would end the process with a stack of C++ calls.
        if self.rank or len(steps) < self.world_size or waited < 0.95 * PROCESS_TIMEOUT.total_seconds():
            return None
        behind = [rank for rank, step in steps.items() if step < max(steps.values())]
        if not behind:
            return None
        return self.fail(
            f"{self.name(behind)} did not come to step {max(steps.values())} for {waited:.0f} s", 1, behind
        )

    def find_failure(self, error: Exception) -> dict:
        """Why the connection to the others broke: what another process wrote, or which ones are dead or behind."""
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        beats = {rank: self._get(f"beat/{rank}") for rank in others}
        for _ in range(round(4 * BEAT / 0.25)):
            if failure := self.failure or self._read_failure():
                return failure
            time.sleep(0.25)
        missing = [rank for rank in others if self._get(f"beat/{rank}") == beats[rank] != "0 left"]
        if missing:
            reason = "ended without a message: killed? Where memory was short, dmesg tells"
            return self.fail(f"{self.name(missing)} {reason}", 1, missing)
        reason = f"lost the other processes at {self.doing} ({str(error).splitlines()[0]}); {self.name(others)}"
        return self.fail(reason, 1)

    # End together

    def fail(self, reason: str | None, code: int, silent: Sequence[int] = ()) -> dict:
        """Tell all why this process, or the silent ones, ended, unless another was first. Returns what was first."""
        failure = dict(rank=self.rank, host=self.host, reason=reason, code=code, silent=list(silent))
        with suppress(RuntimeError):
            self.store.set(f"reason/{self.rank}", reason or "")
            if self.store.add("failures", 1) == 1:
                self.store.set("failure", json.dumps(failure))
            for _ in range(20):
                if first := self._read_failure():
                    return first
                time.sleep(0.1)
        return failure

    def end(self, failure: dict, from_watch: bool = False) -> NoReturn:
        """Print why all end, once per machine; wait until the other machines know, then leave with its exit code."""
        if not from_watch:
            self.main_is_done.set()
        if not self.is_ending.acquire(blocking=False):
            threading.Event().wait()  # the other thread ends the process
        time.sleep(0.3)
        local_rank = environment("LOCAL_RANK", 0)
        if local_rank == 0 or self.rank - local_rank in failure["silent"]:
            reasons = {self._get(f"reason/{rank}") for rank in range(self.world_size)}
            is_of_all = reasons == {failure["reason"]} or failure["silent"]
            where = "" if is_of_all else f"host {failure['host']}, rank {failure['rank']}: "
            print(f"error: {where}{failure['reason']}", file=sys.stderr, flush=True)
            _write_to_log_file(f"error: {where}{failure['reason']}\n")
        with suppress(RuntimeError):
            self.store.add("ended", 1)
            self._wait_for("ended", self.world_size - len(failure["silent"]), 3)
        if from_watch:
            self.main_is_done.wait(GRACE)
        with suppress(RuntimeError):
            self.store.add("gone", 1)
            if self.hosts_store:  # the others would complain of a lost connection
                self._wait_for("gone", self.world_size - len(failure["silent"]), GRACE)
        kill_children()
        sys.stdout.flush()
        os._exit(failure["code"])

    def _wait_for(self, counter: str, count: int, limit: float) -> None:
        """Wait until a counter of the store has come to `count`, at most `limit` seconds."""
        for _ in range(round(limit / 0.1)):
            if self.store.add(counter, 0) >= count:
                break
            time.sleep(0.1)

    def leave(self, limit: float) -> None:
        """Wait until all processes leave, or `limit` seconds; the one that hosts the store goes last."""
        with suppress(RunStopped):
            self.exchange("leaving", None, limit)
        self.has_left.set()
        with suppress(RuntimeError):
            self.store.set(f"beat/{self.rank}", "0 left")
            self.store.add("left", 1)
            if self.hosts_store:
                self._wait_for("left", self.world_size, 5)


def mean_over_processes(values: torch.Tensor) -> torch.Tensor:
    """Average over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


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


def shared_memory_needed(workers: int, batch_bytes: int, prefetch: int = 2) -> int:
    """Bytes of /dev/shm that loader workers of all processes of this machine need, as in `workers_that_fit`."""
    return environment("LOCAL_WORLD_SIZE", 1) * (prefetch * workers + 1) * batch_bytes if workers else 0


def workers_that_fit(workers: int, batch_bytes: int, prefetch: int = 2) -> int:
    """How many of the loader's workers /dev/shm holds the batches of; says so if these are fewer than `workers`.

    batch_bytes: of a batch of one process. Each worker loads `prefetch` batches ahead, and one more is in use.
    """
    free, fit = shared_memory_left(), workers
    while shared_memory_needed(fit, batch_bytes, prefetch) > free:
        fit -= 1
    if fit < workers:
        processes = environment("LOCAL_WORLD_SIZE", 1)
        of_each = f" in each of {processes} processes" if processes > 1 else ""
        log(
            f"--workers: {fit} in place of {workers}{of_each}, as /dev/shm has {free / 2**20:.0f} MiB free and each "
            f"worker needs {prefetch} batches of {batch_bytes / 2**20:.1f} MiB there; more: docker run --shm-size=8g"
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


def use_compile(choice: str, device: torch.device, world_size: int, *, steps: int, crop_size: int) -> bool:
    """Whether to use torch.compile. choice: "on", "off", or "auto": if it saves time and works on this machine.

    It saves time on one GPU, in long runs of large crops. It gains nothing on a CPU, nor for crops so small that the
    GPU waits for the host. With several processes SyncBatchNorm breaks the graph in each layer.
    """
    if choice == "on" and device.type == "mps":
        raise UserError("--compile on: expected off on --device mps")
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


# Signals

STOP_CODES = {"SIGUSR1": 75, "SIGINT": 130, "SIGTERM": 143}  # exit codes of a run that a signal stopped; 75: try again
REPEAT_SECONDS = 1  # torchrun passes on a SIGINT that the terminal has sent to all processes already


@contextmanager
def stop_signals() -> Iterator[Callable[[], str | None]]:
    """Note SIGTERM, SIGUSR1 and a first SIGINT instead of ending at once. A second SIGINT interrupts as usual.

    Yields a function that gives the name of the signal that came, or None. Does nothing outside of the main thread.
    """
    came: list[tuple[str, float]] = []

    def note(number: int, _frame: object) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        if name == "SIGINT" and any(n == name and now - then > REPEAT_SECONDS for n, then in came):
            raise KeyboardInterrupt
        came.append((name, now))

    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    numbers = [getattr(signal, name) for name in STOP_CODES if hasattr(signal, name)]
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield lambda: came[-1][0] if came else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Votes:
    """Lets all processes act after the same step: each gives a number, and all get the largest a step later.

    Nobody waits for a GPU, as the numbers go through gloo. A single process gets its own number at once.
    """

    def __init__(self) -> None:
        self.group = dist.new_group(backend="gloo", timeout=PROCESS_TIMEOUT) if dist.is_initialized() else None
        self.pending: dist.Work | None = None

    def largest(self, number: int) -> int:
        """Give a number of 0 or more; get the largest of those that processes gave at the last call, first 0."""
        if self.group is None:
            return number
        agreed = 0
        if self.pending is not None:
            self.pending.wait()
            agreed = int(self.numbers)
        self.numbers = torch.tensor(number)
        self.pending = dist.all_reduce(self.numbers, dist.ReduceOp.MAX, group=self.group, async_op=True)
        return agreed

    def close(self) -> None:
        """Wait until all processes have called it."""
        if self.group is not None:
            if self.pending is not None:
                self.pending.wait()
            dist.barrier(self.group)


# Messages


_early_lines: deque[str] = deque(maxlen=1000)  # what was logged before `log_to`
_log_file: Path | None = None


def log_to(path: str | Path) -> None:
    """Append what the first process logs, and has logged so far, to a file; and tracebacks of errors."""
    global _log_file
    if environment("RANK", 0) == 0:
        _log_file = Path(path)
        _write_to_log_file("".join(_early_lines))
        _early_lines.clear()


def _write_to_log_file(text: str) -> None:
    if _log_file is None:
        _early_lines.append(text)
        return
    with suppress(OSError), _log_file.open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)  # a full disk does not end a run


def log(text: str, end: str = "\n", *, to_file: bool = True) -> None:
    """Print from the first process only, and append to the file of `log_to`."""
    if environment("RANK", 0) == 0:
        print(text, end=end, flush=True)
        if to_file:
            _write_to_log_file(text.removeprefix("\r\033[2K") + "\n")


def show_progress(line: str, keep: bool = False, *, to_file: bool = True) -> None:
    """Print a progress line. On a terminal the next line overwrites it, unless it is to be kept."""
    on_terminal = sys.stdout.isatty()
    log(f"\r\033[2K{line}" if on_terminal else line, end="" if on_terminal and not keep else "\n", to_file=to_file)


def track(batches: Iterable, title: str, unit: str = "batch") -> Iterator:
    """Yield the batches, with a progress line: each second on a terminal, every 30 s in a file."""
    on_terminal = sys.stdout.isatty()
    interval = 1 if on_terminal else 30
    start = last_line = time.perf_counter()
    for done, batch in enumerate(batches, 1):
        note_activity(f"{title}: {unit} {done}")
        yield batch
        now = time.perf_counter()
        if now - last_line > interval:
            left = timedelta(seconds=round((now - start) / done * (len(batches) - done)))
            show_progress(f"{title}: {unit} {done}/{len(batches)}  ETA {left}", to_file=not on_terminal)
            last_line = now
    if on_terminal and last_line > start:
        log("\r\033[2K", end="", to_file=False)
