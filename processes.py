"""The processes of one run: how they find each other, agree, watch each other, and end together.

    def main():
        rank, world_size = setup_processes(torch.device("cpu"))
        ...
        leave_processes()

    run_script(main)  # python my_script.py, torchrun --nproc_per_node=4 my_script.py, or srun python my_script.py

Copy this file with launch.py to use it elsewhere: they need only torch.
"""

import hashlib
import json
import os
import platform
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist

import launch
from launch import STOP_CODES, RunStopped, UserError, environment, log, note_activity

T = TypeVar("T")
PROCESS_TIMEOUT = timedelta(minutes=10)  # how long a process waits for the others once training runs
START_TIMEOUT = timedelta(hours=1)  # and before: listing millions of files takes long
SILENCE = 60  # seconds without a sign of life after which a process counts as dead
BEAT = 1.0  # seconds between signs of life


# The script of a process


def run_script(main: Callable[[], object], after_interrupt: str = "") -> None:
    """Run a script's main function; an error that its user can do something about becomes one line.

    Exit code 2 for a UserError, that of a RunStopped, 1 for other errors. Of many processes, an error of one ends all:
    each machine's first process prints it, with host and rank. The traceback goes to the file of `log_to` (of a
    RunStopped the message); that of a bug is printed too. Loader workers do not outlive the script.
    """
    with suppress(AttributeError):  # of a stdout that somebody replaced
        sys.stdout.reconfigure(errors="backslashreplace")  # a path in another encoding must not end a run
    try:
        read_slurm_step()
        connect_processes()
        main()
        return
    except KeyboardInterrupt:
        log(f"\ninterrupted{after_interrupt}")
        code = 130
    except Exception as error:
        launch.write_to_log(f"{error}\n" if isinstance(error, RunStopped) else traceback.format_exc())
        code = _report(error)
    finally:
        launch.kill_children()
    if dist.is_initialized():  # a normal exit would wait for the other processes
        launch.end_process(code)
    sys.exit(code)


def _report(error: Exception) -> int:
    """Print what `run_script` promises, and return the exit code. Raises a bug of a single process again."""
    message, code = launch.one_line(error), error.code if isinstance(error, (UserError, RunStopped)) else 1
    if code in STOP_CODES.values():  # all agreed on it, and have saved their state
        if environment("LOCAL_RANK", 0) == 0:
            print(message, file=sys.stderr, flush=True)
        leave_processes(limit=30)
    elif _peers is None:
        if message is None:
            raise error
        print(f"error: {message}", file=sys.stderr, flush=True)
    elif message is None and isinstance(error, (RuntimeError, OSError)) and LOST_CONNECTION.search(str(error)):
        _peers.fail(*_peers.find_lost(error))
    elif message is None:
        traceback.print_exc()
        _peers.fail(traceback.format_exception_only(error)[-1].strip())
    else:
        _peers.fail(message, code=code)
    return code


# What an error says that may come from another process that ended or hangs.
LOST_CONNECTION = re.compile(
    r"gloo|nccl|connection|connect\(|socket|broken pipe|TCPStore|timed out|time-?out", re.IGNORECASE
)


# Find each other


# The first of Slurm's list of hosts, in parts: gpu[003-010,12],cpu1 gives gpu, 003.
FIRST_HOST = re.compile(r"^([^,\[\]]+)(?:\[([^,\-\]]+)[^\]]*\]([^,\[]*))?")


def read_slurm_step() -> None:
    """Where srun started several tasks, set torchrun's variables from those of the step.

    Without srun, as in a plain sbatch script or salloc, and under torchrun, it does nothing. Raises UserError if
    several tasks run but the step's variables do not say which one this is: they would train side by side.
    """
    given = os.environ
    tasks = given.get("SLURM_STEP_NUM_TASKS", given.get("SLURM_NTASKS", "1"))
    if "RANK" in given or "SLURM_STEP_ID" not in given or "SLURM_PROCID" not in given or tasks == "1":
        return
    try:
        world_size, rank, node = int(tasks), int(given["SLURM_PROCID"]), int(given.get("SLURM_NODEID", 0))
        local_rank, per_node = int(given["SLURM_LOCALID"]), given["SLURM_STEP_TASKS_PER_NODE"]  # such as 4(x2),1
        counts = [int(n) for n, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", per_node) for _ in range(int(times or 1))]
        host = "".join(FIRST_HOST.findall(given["SLURM_STEP_NODELIST"])[0])
        port = 15000 + (97 * int(given["SLURM_JOB_ID"]) + int(given["SLURM_STEP_ID"])) % 15000
        if not 0 <= local_rank <= rank < world_size:
            raise ValueError(f"SLURM_PROCID={rank} of SLURM_STEP_NUM_TASKS={world_size}")
        values = dict(RANK=rank, WORLD_SIZE=world_size, LOCAL_RANK=local_rank, LOCAL_WORLD_SIZE=counts[node])
        values |= dict(GROUP_RANK=node, MASTER_ADDR=host, MASTER_PORT=port)
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(
            f"Slurm started {tasks} tasks, but its variables do not say which one this is ({error!r}); start one task "
            "per GPU with srun, as recipes/slurm.sbatch does, or torchrun"
        ) from None
    os.environ.update({name: str(value) for name, value in values.items()})


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


def backend_of(device_type: str) -> str:
    """The backend of the process group: nccl for CUDA, else gloo. SWAV_BACKEND=gloo takes gloo for CUDA as well."""
    chosen = os.environ.get("SWAV_BACKEND", "")
    if chosen not in ("", "gloo"):
        raise UserError(f"SWAV_BACKEND (environment): expected gloo, or leave it out, got {chosen}")
    return chosen or ("nccl" if device_type == "cuda" else "gloo")


def versions() -> dict[str, str]:
    """What has to be the same on all machines: versions of Python and torch, a checksum of the program's files."""
    program = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        program.update(path.read_bytes())
    return {"Python": platform.python_version(), "torch": torch.__version__, "program": program.hexdigest()[:12]}


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


# Agree


def exchange(doing: str, value: object) -> list:
    """Give every process the values of all, in order of rank: anything that JSON can hold.

    Waits up to START_TIMEOUT, unlike a collective of the group, and logs whom it waits for. doing: what this is for.
    """
    return _gather(value) if _peers is None else _peers.exchange(doing, value)


def _gather(value: object) -> list:
    """The values of all processes, in order of rank, through the process group."""
    values = [value] * (dist.get_world_size() if dist.is_initialized() else 1)
    if dist.is_initialized():
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


def mean_over_processes(values: torch.Tensor) -> torch.Tensor:
    """Average over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


def gather_shares(share: torch.Tensor) -> torch.Tensor:
    """Join the shares [rank::world_size] of all processes, in order, on the CPU. Every process must call it."""
    shares = _gather(share.cpu())
    joined = torch.empty(sum(map(len, shares)), dtype=share.dtype)
    for rank, part in enumerate(shares):
        joined[rank :: len(shares)] = part
    return joined


class Votes:
    """Lets all processes act after the same step: each gives a number, and all get the largest a step later.

    Nobody waits for a GPU, as the numbers go through gloo. A single process gets its own number at once.
    """

    def __init__(self) -> None:
        self.group = dist.new_group(backend="gloo", timeout=PROCESS_TIMEOUT) if dist.is_initialized() else None
        self.numbers, self.pending = torch.tensor(0), None

    def largest(self, number: int) -> int:
        """Give a number of 0 or more; get the largest of those that processes gave at the last call, first 0."""
        if self.group is None:
            return number
        if self.pending is not None:
            self.pending.wait()
        agreed, self.numbers = int(self.numbers), torch.tensor(number)
        self.pending = dist.all_reduce(self.numbers, dist.ReduceOp.MAX, group=self.group, async_op=True)
        return agreed

    def close(self) -> None:
        """Wait until all processes have called it."""
        if self.group is not None:
            if self.pending is not None:
                self.pending.wait()
            dist.barrier(self.group)


# Watch each other, and end together


class Peers:
    """The processes of a run, which watch each other through a key-value store beside the process group.

    Each writes a sign of life every second, with what it is doing. The first process watches those of all, the others
    that of the first one. An error of one goes to the store too, and ends all within seconds, whatever they wait for.
    Every process needs one; the first hosts the store, unless torchrun does.
    """

    def __init__(self) -> None:
        self.rank, self.world_size = environment("RANK", 0), environment("WORLD_SIZE", 1)
        self.hosts_store = self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        self.store, self.exchanges = self.connect("peers", self.hosts_store), 0
        self.has_left, self.is_ending = threading.Event(), threading.Lock()
        self.hosts = ["not started"] * self.world_size
        self.hosts = self.exchange("starting", socket.gethostname(), PROCESS_TIMEOUT.total_seconds())
        threading.Thread(target=self._watch, daemon=True).start()

    def connect(self, name: str, is_host: bool = False) -> dist.Store:
        """A connection to the store, for keys of this name. One for each use, as a waiting one blocks other calls."""
        address, port = os.environ.get("MASTER_ADDR", "localhost"), environment("MASTER_PORT", 29500)
        try:
            store = dist.TCPStore(address, port, None, is_host, PROCESS_TIMEOUT, wait_for_workers=False)
        except RuntimeError as error:
            what = "host the meeting point of the processes" if is_host else "reach the first process"
            place, reason = f"rank {self.rank} ({socket.gethostname()})", str(error).splitlines()[0]
            raise RunStopped(f"{place} cannot {what} at {address}:{port}: {reason}") from None
        return dist.PrefixStore(f"swav/{environment('TORCHELASTIC_RESTART_COUNT', 0)}/{name}", store)

    def exchange(self, doing: str, value: object, limit: float = START_TIMEOUT.total_seconds()) -> list:
        """See the function `exchange`. Raises RunStopped after `limit` seconds."""
        note_activity(doing)
        self.exchanges += 1
        keys = [f"exchange/{self.exchanges}/{rank}" for rank in range(self.world_size)]
        self.store.set(keys[self.rank], json.dumps(value))
        pause, waited, next_line, start = 0.005, 0.0, 30.0, time.monotonic()
        while not self.store.check(keys):  # if one fails, the watch ends this process
            if waited > min(limit, next_line):
                missing = self._name([rank for rank, key in enumerate(keys) if not self.store.check([key])])
                if waited > limit:
                    raise RunStopped(f"{doing}: {missing} did not come within {limit:.0f} seconds")
                log(f"waiting for {missing}")
                next_line += 30
            time.sleep(pause)
            pause, waited = min(2 * pause, 0.5), time.monotonic() - start
        return [json.loads(text) for text in self.store.multi_get(keys)]

    def _get(self, key: str) -> object:
        """A value of the store; None if it is not there, or the store is gone."""
        with suppress(RuntimeError):
            return json.loads(self.store.get(key)) if self.store.check([key]) else None
        return None

    def _name(self, ranks: Sequence[int]) -> str:
        """Ranks with their hosts and what they were last doing."""
        activities = {rank: (self._get(f"beat/{rank}") or [None])[0] for rank in ranks[:8]}
        named = [f"rank {r} ({self.hosts[r]}{f', {doing}' if doing else ''})" for r, doing in activities.items()]
        return ", ".join(named) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")

    def _watch(self) -> None:
        seen: dict[int, tuple[list | None, int]] = {}  # rank: (its last sign of life, how often it was seen again)
        while not self.has_left.is_set():
            try:
                doing, since = launch.activity
                self.store.set(f"beat/{self.rank}", json.dumps([doing, time.monotonic() - since]))
                for rank in range(self.world_size) if self.rank == 0 else [0]:
                    beat, (last, times) = self._get(f"beat/{rank}"), seen.get(rank, (None, 0))
                    seen[rank] = beat, (times + 1 if beat == last else 0)
                fault = ("", []) if self._get("failure") else self._find_fault(seen)
            except RuntimeError:
                host = f"rank 0 ({self.hosts[0]})"
                fault = f"lost the connection to {host}: it ended, see its messages, or the network", []
            if fault and not self.has_left.is_set():
                self.fail(*fault)
            self.has_left.wait(BEAT)

    def _find_fault(self, seen: Mapping[int, tuple[list | None, int]]) -> tuple[str, list[int]] | None:
        """What is wrong, and the ranks at fault: those without a sign of life, or, where training stands still, behind.

        Counts looks, not the time: after a pause of the whole machine nobody is blamed.
        """
        beats = {rank: beat for rank, (beat, _) in seen.items() if beat}
        silent = [rank for rank in beats if seen[rank][1] * BEAT > SILENCE]
        if silent:
            return f"{self._name(silent)} gave no sign of life for {SILENCE} seconds: killed, or stopped", silent
        steps = {rank: int(doing[5:]) for rank, (doing, _) in beats.items() if re.fullmatch(r"step \d+", doing)}
        behind = [rank for rank, step in steps.items() if step < max(steps.values())]
        waited = min((seconds for _, seconds in beats.values()), default=0)
        # Earlier than NCCL, which would end the process with a stack of C++ calls.
        if behind and len(steps) == self.world_size and waited > 0.95 * PROCESS_TIMEOUT.total_seconds():
            return f"{self._name(behind)} did not come to step {max(steps.values())} for {waited:.0f} s", behind
        return None

    def find_lost(self, error: Exception) -> tuple[str, list[int]]:
        """Why the connection to the others broke, and the ranks that are dead. ("", []) if another process wrote it."""
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        beats = {rank: self._get(f"beat/{rank}") for rank in others}
        for _ in range(16):
            if self._get("failure"):
                return "", []
            time.sleep(BEAT / 4)
        dead = [rank for rank in others if beats[rank] and self._get(f"beat/{rank}") == beats[rank]]
        if dead:
            return f"{self._name(dead)} ended without a message: killed? Where memory was short, dmesg tells", dead
        doing, first_line = launch.activity[0], str(error).splitlines()[0]
        return f"lost the other processes at {doing} ({first_line}); {self._name(others)}", []

    def fail(self, reason: str, silent: Sequence[int] = (), code: int = 1) -> NoReturn:
        """End this process and all others. Of several reasons the first counts; each machine prints it once.

        reason: "" if another process gave it. silent: ranks that cannot do so themselves. code: the exit code.
        """
        failure = dict(rank=self.rank, host=self.hosts[self.rank], reason=reason, code=code, silent=list(silent))
        with suppress(RuntimeError):
            if reason:
                self.store.set(f"reason/{self.rank}", json.dumps(reason))
            failure = json.loads(self.store.compare_set("failure", "", json.dumps(failure)))
        self.is_ending.acquire()  # another thread that comes here waits until this one ends the process
        time.sleep(0.3)  # others may fail for the same reason
        local_rank, silent = environment("LOCAL_RANK", 0), failure["silent"]
        if local_rank == 0 or self.rank - local_rank in silent:
            reasons = {self._get(f"reason/{rank}") for rank in range(self.world_size)}
            where = f"host {failure['host']}, rank {failure['rank']}: "
            line = f"error: {'' if silent or reasons == {failure['reason']} else where}{failure['reason']}"
            print(line, file=sys.stderr, flush=True)
            launch.write_to_log(line + "\n")
        self._meet("ended", 3, len(silent))  # torchrun stops the others once one has left
        self._meet("gone", 3 if self.hosts_store else 0, len(silent))  # they would complain of a lost connection
        launch.end_process(failure["code"])

    def leave(self, limit: float) -> None:
        """Wait until all processes leave, or `limit` seconds; the one that hosts the store goes last."""
        with suppress(RunStopped):
            self.exchange("leaving", None, limit)
        self.has_left.set()
        with suppress(RuntimeError):
            self.store.delete_key(f"beat/{self.rank}")
        self._meet("left", 5 if self.hosts_store else 0)

    def _meet(self, counter: str, limit: float, absent: int = 0) -> None:
        """Wait until all processes, but for those that are absent, have come here, or `limit` seconds."""
        with suppress(RuntimeError):
            self.store.add(counter, 1)
            for _ in range(round(limit / 0.1)):
                if self.store.add(counter, 0) >= self.world_size - absent:
                    break
                time.sleep(0.1)
