"""Interrupt small runs of train.py again and again, and compare what they end with to runs that nothing disturbed.

A run is started, disturbed at a random step, and started again with the same command until it ends. Its processes are
those that torchrun would start (rank and world size in the environment, gloo), forked from a process that has imported
torch already: so a start takes a fraction of a second. As torchrun does, the others are ended if one is killed.
"""

import contextlib
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import train
from bench.measure import fresh_process, run_in
from processes import run_script

KILL_ALL, KILL_ONE, KILL_WHILE_SAVING = "SIGKILL of all", "SIGKILL of one", "SIGKILL while saving"
TRUNCATE, TERMINATE = "newest checkpoint truncated", "SIGTERM"
FAULTS = {KILL_ALL: 2, KILL_ONE: 2, KILL_WHILE_SAVING: 4, TRUNCATE: 2, TERMINATE: 2}  # and how often, relatively
IMAGES, GLOBAL_BATCH = 40, 4
STEPS_PER_EPOCH = IMAGES // GLOBAL_BATCH
NETWORK = (
    "--arch resnet18 --width 8 --blocks 1 1 1 1 --stem small --hidden_mlp 64 --feat_dim 16 --nmb_prototypes 12 "
    "--nmb_crops 2 1 --size_crops 16 9 --min_scale_crops 0.3 0.1 --max_scale_crops 1 0.3 --color_strength 0.5 "
    "--temperature 0.1 --epsilon 0.05 --base_lr 0.3 --final_lr 0.0003 --warmup_epochs 2 --start_warmup 0.1 "
    "--queue_length 16 --epoch_queue_starts 2 --freeze_prototypes_niters 5 --precision fp32 --device cpu --workers 0 "
    "--cache off --log_freq 1 --eval_every 0 --checkpoint_freq 10"
)
OFTEN = "--checkpoint_minutes 0.002"  # a checkpoint every 0.12 s, in the middle of epochs too
TIMINGS = {"images_per_s", "data_wait_percent", "gpu_memory_gib", "eta_s", "epoch_seconds", "epoch_images_per_s"}
TIMEOUT = 180.0  # seconds without an event that has to come: the run hangs
LEAVE_SECONDS = 30.0  # that processes have to leave after SIGTERM; then torchrun kills them


def run(
    device: torch.device,
    *,
    minutes: float = 5.0,
    jobs: int = 2,
    seeds: Sequence[int] = (1,),
    epochs: int = 10,
    faults: Sequence[str] = tuple(FAULTS),
    words: str = OFTEN,
) -> dict[str, Any]:
    """Disturb runs until the minutes are over, `jobs` at a time, and print what came of it. Return the figures.

    device: not used, as the runs are on the CPU. seeds: the first one counts. faults: some of FAULTS. words: more
    options of train.py.
    """
    print(
        f"\nsoak: runs of {epochs} epochs of {STEPS_PER_EPOCH} steps, {minutes:g} minutes, {jobs} at a time", flush=True
    )
    folder = Path("runs/soak")
    shutil.rmtree(folder, ignore_errors=True)
    write_images(folder / "images")
    words = f"{NETWORK} {words} --data_path {folder / 'images'} --epochs {epochs}"
    tasks = [(folder, words, epochs, faults, 1000 * seeds[0] + job, jobs, minutes) for job in range(jobs)]
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(jobs) as pool:
        processes = [stack.enter_context(fresh_process()) for _ in tasks]
        lanes = list(pool.map(lambda process, task: run_in(process, soak, *task), processes, tasks))
    total = merge(lanes)
    for name, value in total.items():
        if name == "mismatches":
            print(f"{len(value)} mismatches", *value[:20], sep="\n  ")
        else:
            shown = ", ".join(f"{kind} {count}" for kind, count in value.items()) if isinstance(value, dict) else value
            print(f"{name.replace('_', ' ')}: {shown}")
    print(f"{sum(total['faults'].values())} faults, {total['epochs_lost']:g} epochs lost", flush=True)
    return total


def merge(results: list[dict]) -> dict[str, Any]:
    """Add up the figures of several lanes."""
    total = {name: value for name, value in results[0].items()}
    for result in results[1:]:
        for name, value in result.items():
            total[name] = dict(Counter(total[name]) + Counter(value)) if name == "faults" else total[name] + value
    return total


def write_images(folder: Path) -> None:
    """Write tiny images of noise, the same in every call."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(IMAGES):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(folder / f"{i:02}.png")


# Runs


def soak(
    folder: Path, words: str, epochs: int, faults: Sequence[str], seed: int, stride: int, minutes: float
) -> dict[str, Any]:
    """Disturb one run after the other, with seeds `stride` apart, until the minutes are over."""
    torch.set_num_threads(1)  # forks of a process with threads may hang
    end = time.monotonic() + 60 * minutes
    found = {"faults": {}, "runs": 0, "starts": 0, "changes_of_processes": 0}
    found |= {"epochs_lost": 0.0, "left_waiting": 0, "mismatches": []}
    while time.monotonic() < end:
        longest = epochs * STEPS_PER_EPOCH // 4  # steps from a start to the fault
        try:
            disturb_run(folder / str(seed), f"{words} --seed {seed}", faults, longest, end, random.Random(seed), found)
            shutil.rmtree(folder / str(seed), ignore_errors=not found["mismatches"])
        except Unexpected as error:
            found["mismatches"].append(f"seed {seed}: {error}")  # and its folder stays
        seed += stride
    return found


class Unexpected(Exception):
    """What should not have happened in a run; ends it."""


def disturb_run(
    folder: Path, words: str, faults: Sequence[str], longest: int, end: float, rng: random.Random, found: dict
) -> None:
    """Do an undisturbed run, then a disturbed one, and compare them. Adds to `found`; raises Unexpected."""
    world_size = rng.choice((1, 2))
    undisturbed = Start(words, world_size, folder / "undisturbed", 0)
    finish(undisturbed)
    crops = undisturbed.crops()
    dump, has_changed = folder / "disturbed", False
    for number in range(1000):
        expected = newest_step(dump)  # what the newest whole checkpoint holds
        start = Start(words, world_size, dump, number)
        found["starts"] += 1
        fault = None if time.monotonic() > end else rng.choices(faults, [FAULTS[name] for name in faults])[0]
        try:
            fault = disturb(start, fault, rng.randrange(longest), dump, rng, found)
        finally:
            start.end(0)
        if start.steps:
            resumed = start.steps[0] - 1
            found["epochs_lost"] += max(0, expected - resumed) / STEPS_PER_EPOCH
            differ = [step for step, images in start.crops().items() if images != crops.get(step)]
            if differ:
                raise Unexpected(f"start {number}, {world_size} processes: other images or crops at step {differ[0]}")
        if fault is None:
            break
        found["faults"][fault] = found["faults"].get(fault, 0) + 1
        if rng.random() < 0.25:
            world_size, has_changed = 3 - world_size, True
            found["changes_of_processes"] += 1
    found["runs"] += 1
    difference = compare_runs(folder / "undisturbed", dump, bit_for_bit=not has_changed)
    if difference:
        raise Unexpected(f"{difference}, at the end{' on other numbers of processes' * has_changed}")


def disturb(start: "Start", fault: str | None, steps: int, dump: Path, rng: random.Random, found: dict) -> str | None:
    """Disturb a start of a run after some steps more than one. Returns the fault, None if the run ended before.

    SIGKILL while saving counts as such if the temporary file was there after all processes had ended.
    """
    if fault is None:
        finish(start)
        return None
    wait_for_steps(start, 1)
    if start.is_over() and not start.steps:
        finish(start)  # all steps were done before; anything else is unexpected
        return None
    wait_for_steps(start, steps + 1)
    time.sleep(rng.uniform(0, 0.02))
    if fault == KILL_WHILE_SAVING:
        unfinished = dump / "checkpoint.pth.tmp"
        wait_for(lambda: unfinished.exists() or start.is_over(), f"{start.name}: no checkpoint", pause=0)
        time.sleep(rng.uniform(0, 0.002))
    if start.is_over():
        finish(start)
        return None
    if fault == TERMINATE:
        return terminate(start, dump, found)
    if fault == KILL_ONE and len(start.ranks) > 1:
        start.send(signal.SIGKILL, [rng.choice(start.ranks)])
        found["left_waiting"] += start.end(LEAVE_SECONDS)
        return KILL_ONE
    start.end(0)
    if fault == KILL_WHILE_SAVING:
        return KILL_WHILE_SAVING if unfinished.exists() else KILL_ALL
    newest = dump / "checkpoint.pth"
    if fault == TRUNCATE and step_of(newest) is not None and step_of(dump / "checkpoint_previous.pth") is not None:
        os.truncate(newest, rng.randrange(newest.stat().st_size))
        return TRUNCATE
    return KILL_ALL


def terminate(start: "Start", dump: Path, found: dict) -> str | None:
    """Send SIGTERM to all processes. The steps until then have to be saved, and the exit code has to say so.

    Processes that do not leave in time are counted as left waiting.
    """
    late = start.end(LEAVE_SECONDS)
    if late:
        found["left_waiting"] += late
        return TERMINATE
    codes = start.codes()
    if set(codes) == {0}:  # it had ended before
        return None
    if set(codes) != {143}:
        raise Unexpected(f"{start.name}: exit codes {codes} after SIGTERM, not 143; {start.last_line()}")
    if newest_step(dump) < start.read_steps()[-1]:
        raise Unexpected(f"{start.name}: after SIGTERM step {newest_step(dump)} is saved, not {start.steps[-1]}")
    return TERMINATE


def finish(start: "Start") -> None:
    """Wait for the end of a run that is not to be disturbed. Raises Unexpected if it fails. No process is left."""
    try:
        wait_for_steps(start, math.inf)
        codes = start.codes()
    finally:
        start.end(0)
    if set(codes) != {0}:
        raise Unexpected(f"{start.name}: exit codes {codes}; {start.last_line()}")
    start.read_steps()


def wait_for_steps(start: "Start", steps: float) -> None:
    """Wait until a start has logged this many steps, or is over. Raises Unexpected if one takes longer than TIMEOUT."""
    while len(start.read_steps()) < steps and not start.is_over():
        done = len(start.steps)
        what = f"{start.name}: none after {done} steps"
        wait_for(lambda done=done: len(start.read_steps()) > done or start.is_over(), what)


def wait_for(condition: Callable[[], object], what: str, pause: float = 0.005) -> None:
    """Wait until the condition holds. Raises Unexpected after TIMEOUT."""
    start = time.monotonic()
    while not condition():
        if time.monotonic() - start > TIMEOUT:
            raise Unexpected(f"{what} in {TIMEOUT:g} s")
        time.sleep(pause)


# Processes


class Start:
    """A start of train.py: its processes, and what they have written so far."""

    def __init__(self, words: str, world_size: int, dump: Path, number: int) -> None:
        self.name = f"start {number}, {world_size} processes"
        self.steps: list[int] = []  # of the log lines so far
        self.world_size, self.prefix = world_size, dump.with_name(f"{dump.name}-{number}")
        dump.parent.mkdir(parents=True, exist_ok=True)
        argv = [*words.split(), "--dump_path", str(dump), "--batch_size", str(GLOBAL_BATCH // world_size)]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        context = multiprocessing.get_context("fork")
        arguments = [(argv, rank, world_size, port, str(self.prefix)) for rank in range(world_size)]
        self.ranks = [context.Process(target=be_rank, args=arguments[rank]) for rank in range(world_size)]
        for process in self.ranks:
            process.start()

    def send(self, number: signal.Signals, ranks: list | None = None) -> None:
        for process in self.ranks if ranks is None else ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)

    def is_over(self) -> bool:
        """Whether all processes have ended, or one has failed."""
        codes = self.codes()
        return None not in codes or any(codes)

    def codes(self) -> list[int | None]:
        return [process.exitcode for process in self.ranks]

    def end(self, seconds: float) -> int:
        """End all processes: by SIGTERM, and after the seconds by SIGKILL. Returns how many needed that."""
        if seconds:
            self.send(signal.SIGTERM, [process for process in self.ranks if process.exitcode is None])
            until = time.monotonic() + seconds
            for process in self.ranks:
                process.join(max(0, until - time.monotonic()))
        late = [process for process in self.ranks if process.exitcode is None]
        self.send(signal.SIGKILL, late)
        for process in self.ranks:
            process.join()
        return len(late)

    def read_steps(self) -> list[int]:
        """The steps that were logged so far."""
        path = Path(f"{self.prefix}.txt")
        text = path.read_text(errors="replace") if path.exists() else ""
        self.steps = [int(step) for step in re.findall(r"  step (\d+)/\d+  loss", text)]
        return self.steps

    def last_line(self) -> str:
        lines = Path(f"{self.prefix}.txt").read_text(errors="replace").splitlines()
        errors = [line for line in lines if line.startswith("error: ") or "Error" in line]
        return (errors or lines or [""])[-1][:300]

    def crops(self) -> dict[int, list[str]]:
        """{step: checksums of its images' crops, of all processes}; steps that some process did not begin left out."""
        if not self.read_steps():
            return {}
        paths = [Path(f"{self.prefix}-{rank}.crops") for rank in range(self.world_size)]
        lines = [path.read_text().splitlines() for path in paths]
        steps = zip(*lines, strict=False)
        return {self.steps[0] + i: sorted(" ".join(parts).split()) for i, parts in enumerate(steps)}


def be_rank(argv: list[str], rank: int, world_size: int, port: int, prefix: str) -> None:
    """Run train.py in this process, as torchrun starts it."""
    output = os.open(f"{prefix}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ["OMP_NUM_THREADS"] = "1"
    if world_size > 1:
        ranks = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world_size, LOCAL_WORLD_SIZE=world_size)
        os.environ.update({name: str(value) for name, value in ranks.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    crops_to_device = train.crops_to_device
    file = os.open(f"{prefix}-{rank}.crops", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def recorded(batch: Any, *arguments: Any, **options: Any) -> list[torch.Tensor]:
        os.write(file, (" ".join(checksums(batch)) + "\n").encode())
        return crops_to_device(batch, *arguments, **options)

    train.crops_to_device = recorded
    run_script(lambda: train.main(train.parse_args(argv)))


def checksums(batch: list[tuple[torch.Tensor, torch.Tensor]]) -> list[str]:
    """A checksum of each image's crops and their parameters. batch: of data.training_loader with crop_only."""
    sums = []
    for i in range(batch[0][0].shape[1]):
        parts = (tensor[:, i].contiguous().numpy().tobytes() for part in batch for tensor in part)
        sums.append(f"{zlib.crc32(b''.join(parts)):08x}")
    return sums


# Results


def step_of(path: Path) -> int | None:
    """Steps done in a checkpoint; None if it is missing or cannot be read."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)["step"]
    except Exception:  # torch.load raises whatever unpickling runs into
        return None


def newest_step(dump: Path) -> int:
    """Steps done in the newest checkpoint that can be read; 0 without one."""
    return max(step_of(dump / name) or 0 for name in ("checkpoint.pth", "checkpoint_previous.pth"))


def read_rows(dump: Path, timings: bool = False) -> list[dict]:
    """The rows of metrics.jsonl. timings: with what depends on time."""
    rows = [json.loads(line) for line in (dump / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if timings or name not in TIMINGS} for row in rows]


def compare_runs(undisturbed: Path, disturbed: Path, *, bit_for_bit: bool) -> str:
    """Say in which way a run ended differently; "" for the same.

    bit_for_bit: weights, momentum, queue and metrics have to be equal. Else the same steps, each once, and a queue of
    the same length and state.
    """
    theirs, ours = (
        torch.load(dump / "checkpoint.pth", map_location="cpu", weights_only=True) for dump in (undisturbed, disturbed)
    )
    rows = [read_rows(dump) for dump in (undisturbed, disturbed)]
    places = [[("epoch_loss" in row, row["epoch"], row["step"]) for row in part] for part in rows]
    if places[0] != places[1]:
        return f"metrics.jsonl has {len(places[1])} rows or other steps, not the {len(places[0])} of each step once"
    shapes = [{name: (value.shape if torch.is_tensor(value) else value) for name, value in state["queue"].items()}
              for state in (theirs, ours)]  # fmt: skip
    for name, a, b in (
        ("epoch", theirs["epoch"], ours["epoch"]),
        ("step", theirs["step"], ours["step"]),
        ("queue", *shapes),
    ):
        if a != b:
            return f"{name} {b}, not {a}"
    if not bit_for_bit:
        return ""
    names = ("state_dict", "optimizer", "queue")
    different = [name for name in names if not is_same(theirs[name], ours[name])]
    different += [f"row of step {b['step']}" for a, b in zip(*rows, strict=True) if a != b][:1]
    return f"different {', '.join(different)}" if different else ""


def is_same(ours: Any, theirs: Any) -> bool:
    """Whether two parts of checkpoints are equal bit for bit, through dicts and lists."""
    if isinstance(ours, torch.Tensor):
        return torch.equal(ours, theirs)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(is_same(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, list):
        return len(ours) == len(theirs) and all(map(is_same, ours, theirs))
    return ours == theirs
