"""Faults of processes, loader workers and memory: each ends, or recovers, with the line that is expected.

Most run in forks of this process, each of which stands in for a machine, as starting Python with torch takes seconds.
"""

import ctypes
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, TINY, script
from PIL import Image

import cache
import checkpoint
import data
import launch
import machine
import processes
import train
from data import MultiCrop, start_epoch, training_loader
from launch import RunStopped, UserError

LIMIT = 60  # seconds until a process counts as hanging; the machine that runs tests may be busy


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def forked(main: Callable[[], object], console: Path) -> int:
    """Run main in a fork through run_script, with its console in a file; returns its process id."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        with open(console, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        processes.run_script(main)
        code = 0
    except SystemExit as leave:
        code = leave.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait_for(pids: list[int]) -> list[int]:
    """Exit codes of processes, negative for signals. None for those that hang, or stay stopped by SIGSTOP."""
    codes, stopped, end = {}, set(), time.monotonic() + LIMIT
    while len(codes) + len(stopped) < len(pids) and time.monotonic() < end:
        for pid in set(pids) - codes.keys():
            done, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED)
            if done and os.WIFSTOPPED(status):
                stopped.add(pid)
            elif done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    for pid in set(pids) - codes.keys():
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return [codes.get(pid) for pid in pids]


def run_alone(main: Callable[[], object], folder: Path) -> tuple[int, str]:
    """(exit code, console) of main in a fork."""
    (code,) = wait_for([forked(main, folder / "console")])
    return code, (folder / "console").read_text()


def run_machines(main: Callable[[int], object], folder: Path, count: int = 2, **patches) -> tuple[list[int], list[str]]:
    """(exit codes, consoles) of main(rank) on machines of one process each, whose current folders are 0, 1, ...

    patches: of processes.py, in all processes.
    """
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    port, pids = free_port(), []
    for rank in range(count):
        (folder / str(rank)).mkdir(exist_ok=True)

        place = dict(RANK=rank, WORLD_SIZE=count, LOCAL_RANK=0, LOCAL_WORLD_SIZE=1, GROUP_RANK=rank)
        place |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        before = Path.cwd(), processes.BEAT
        try:  # a fork has all this from its start, as run_script connects before it calls main
            os.chdir(folder / str(rank))
            os.environ.update({name: str(value) for name, value in place.items()})
            saved = {name: getattr(processes, name) for name in patches}
            vars(processes).update(BEAT=0.2, **patches)
            pids.append(forked(partial(main, rank), folder / f"console-{rank}"))
        finally:
            os.chdir(before[0])
            for name in place:
                os.environ.pop(name)
            vars(processes).update(BEAT=before[1], **saved)
    codes = wait_for(pids)
    return codes, [(folder / f"console-{rank}").read_text() for rank in range(count)]


def errors(console: str) -> list[str]:
    lines = console.replace("\0", "").splitlines()  # torch writes a NUL after its own message of a bus error
    return [line for line in lines if line.startswith("error: ")]


HOST = socket.gethostname()


# Two machines, of which one has a fault at the start


@pytest.fixture
def machines(tmp_path) -> Path:
    """Folders 0 and 1, each with images/ of the same names."""
    for name in "01":
        (tmp_path / name / "images").mkdir(parents=True)
        for i in range(8):
            Image.new("RGB", (20, 20), (i, 0, 0)).save(tmp_path / name / "images" / f"{i}.png")
    return tmp_path


def start_training(*more: str) -> None:
    words = [*TINY, "--batch_size", "2", "--data_path", "images", "--dump_path", "run", *more]
    train.main(train.parse_args(words))


def on_the_second(fault: Callable[[], object]) -> Callable[[int], object]:
    """Training on two machines, with a fault on the second one."""

    def main(rank: int) -> None:
        more = fault() if rank == 1 else None
        start_training(*(more or ()))

    return main


def no_images() -> None:
    os.rename("images", "elsewhere")


def an_image_less() -> None:
    os.unlink("images/0.png")


def an_image_renamed() -> None:
    os.rename("images/0.png", "images/other.png")


def a_file_as_dump_path() -> None:
    Path("run").touch()


def other_versions() -> None:
    processes.versions = lambda: {"Python": "3.10.1", "torch": torch.__version__, "program": "0"}


def another_program() -> None:
    versions = processes.versions()
    processes.versions = lambda: versions | {"program": "0123456789ab"}


def no_gpu() -> None:
    machine.choose_device = lambda name: (_ for _ in ()).throw(UserError("--device cuda: torch cannot use a GPU: why"))


def a_dump_path_that_nobody_can_write() -> None:
    os.symlink("/proc/self", "run")  # not even root, who can write a read-only folder


ON_ONE = {  # name: (fault of the second machine, its message)
    "missing folder": (
        no_images,
        f"host {HOST}, rank 1: --data_path: expected a folder, a .tar file or a .txt list of paths, got images",
    ),
    "fewer images": (
        an_image_less,
        f"images: expected the same in all processes, got 8 on rank 0 ({HOST}) and 7 on rank 1",
    ),
    "other names of images": (an_image_renamed, "their paths: expected the same in all processes, got "),
    "dump_path is a file": (
        a_file_as_dump_path,
        f"host {HOST}, rank 1: --dump_path: expected a folder that can be writ",
    ),
    "dump_path is read-only": (
        a_dump_path_that_nobody_can_write,
        f"host {HOST}, rank 1: --dump_path: expected a folder that can be writ",
    ),
    "another learning rate": (
        lambda: ["--base_lr", "3"],
        "--base_lr: expected the same in all processes, got 0.6 on rank 0",
    ),
    "another seed": (
        lambda: ["--seed", "3"],
        f"--seed: expected the same in all processes, got 31 on rank 0 ({HOST}) and 3",
    ),
    "another dump_path": (
        lambda: ["--dump_path", "x"],
        "--dump_path: expected the same in all processes, got run on rank",
    ),
    "unknown option": (lambda: ["--sead", "3"], f"host {HOST}, rank 1: unrecognized arguments: --sead 3"),
    "another precision": (lambda: ["--precision", "bf16"], "--precision: expected the same in all processes, got fp32"),
    "another Python": (other_versions, "Python: expected the same in all processes, got 3."),
    "other files of the program": (another_program, "program: expected the same in all processes, got "),
    "no GPU": (no_gpu, f"host {HOST}, rank 1: --device cuda: torch cannot use a GPU: why"),
}


@pytest.mark.parametrize("name", ON_ONE)
def test_a_fault_on_one_machine_ends_both_with_the_reason(name, machines):
    fault, message = ON_ONE[name]
    codes, consoles = run_machines(on_the_second(fault), machines)
    assert codes == [2, 2], consoles
    for console in consoles:
        (line,) = errors(console)
        assert line.startswith(f"error: {message}") and "Traceback" not in console
    assert not list(machines.glob("*/run/checkpoint*"))


def test_an_error_of_all_machines_names_none(machines):
    codes, consoles = run_machines(lambda rank: start_training("--batch_size", "1"), machines)
    assert codes == [2, 2]
    for console in consoles:
        assert errors(console) == ["error: --batch_size: expected 2 or more (BatchNorm needs several images), got 1"]


def test_two_machines_train(machines):
    codes, consoles = run_machines(lambda rank: start_training("--epochs", "1"), machines)
    assert codes == [0, 0], consoles
    assert (machines / "0" / "run" / "checkpoint.pth").exists() and "done; evaluate" in consoles[0]
    assert "done; evaluate" in (machines / "0" / "run" / "log.txt").read_text() and not consoles[1]


def raise_error() -> None:
    raise UserError("data_path: the disk is gone")


@pytest.mark.parametrize("fault", [raise_error, lambda: os.kill(os.getpid(), signal.SIGKILL)], ids=["fails", "killed"])
def test_the_lock_is_removed_when_another_process_ends_a_run_whose_main_thread_hangs(fault, machines):
    def main(rank):
        def hang(*_):
            assert rank == 1 or os.path.exists("run/run.lock")
            print("hangs", flush=True)
            signal.pause()

        train.train = hang if rank == 0 else lambda *_: (time.sleep(1), fault())
        start_training()

    codes, consoles = run_machines(main, machines, SILENCE=2)
    assert 0 not in codes and "hangs" in consoles[0] and len(errors(consoles[0])) == 1, consoles
    assert not (machines / "0" / "run" / "run.lock").exists()


def test_a_write_under_way_ends_before_another_process_ends_the_run(machines):
    def main(rank):
        def write():
            time.sleep(3)
            assert os.path.exists("run/run.lock")
            Path("written").touch()

        def hang(*_):
            threading.Thread(target=write, name=checkpoint.WRITER, daemon=True).start()
            signal.pause()

        train.train = hang if rank == 0 else lambda *_: raise_error()
        start_training()

    codes, consoles = run_machines(main, machines)
    assert codes == [2, 2] and len(errors(consoles[0])) == 1, consoles
    assert (machines / "0" / "written").exists() and not (machines / "0" / "run" / "run.lock").exists()


# Processes that die, hang or fail


def join_and(work: Callable[[int], object]) -> Callable[[int], object]:
    def main(rank: int) -> None:
        processes.setup_processes(torch.device("cpu"))
        work(rank)
        processes.leave_processes()

    return main


def test_a_bug_in_one_process_ends_all_and_keeps_its_traceback(tmp_path):
    def work(rank):
        if rank == 1:
            raise ValueError("this is a bug")
        dist.barrier()

    codes, (first, second) = run_machines(join_and(work), tmp_path)
    assert codes == [1, 1]
    assert errors(first) == errors(second) == [f"error: host {HOST}, rank 1: ValueError: this is a bug"]
    assert "Traceback" in second and "Traceback" not in first


@pytest.mark.parametrize("killed", [0, 1, 2])
def test_a_process_that_is_killed_in_a_collective_is_named(killed, tmp_path):
    def work(rank):
        if rank == killed:
            time.sleep(0.5)  # others wait already
            os.kill(os.getpid(), signal.SIGKILL)
        dist.all_reduce(torch.ones(3))

    codes, consoles = run_machines(join_and(work), tmp_path, 3)
    assert codes == [-9 if rank == killed else 1 for rank in range(3)]
    for rank in {0, 1, 2} - {killed}:
        (line,) = errors(consoles[rank])
        assert f"rank {killed} ({HOST}" in line or (killed == 0 and f"connection to rank 0 ({HOST})" in line)
        assert "Traceback" not in consoles[rank]


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_process_that_is_killed_or_stopped_at_the_start_ends_the_others(stopped, tmp_path):
    def main(rank):
        if rank == stopped:
            launch.note_activity("opening the images")
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGSTOP if stopped else signal.SIGKILL)
        processes.exchange("waiting", None)

    codes, consoles = run_machines(main, tmp_path, SILENCE=2)
    other = 1 - stopped
    assert codes[other] == 1
    (line,) = errors(consoles[other])
    if stopped:
        assert f"rank 1 ({HOST}, opening the images) gave no sign of life for 2 seconds" in line
    else:
        assert f"lost the connection to rank 0 ({HOST})" in line


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_never_starts_is_named(rank, tmp_path):
    place = dict(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))

    def run():
        os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
        os.environ.update(place)
        processes.PROCESS_TIMEOUT = timedelta(seconds=1)
        processes.run_script(lambda: None)

    code, console = run_alone(run, tmp_path)
    (line,) = errors(console)
    assert code == 1
    if rank == 0:
        assert line == "error: starting: rank 1 (not started) did not come within 1 seconds"
    else:
        assert f"rank 1 ({HOST}) cannot reach the first process at 127.0.0.1:{place['MASTER_PORT']}" in line


def test_a_process_whose_main_thread_hangs_is_ended_when_another_fails(tmp_path):
    def work(rank):
        if rank == 1:
            raise UserError("data_path: the disk is gone")
        signal.pause()  # as in a wait for NCCL, which no error ends

    codes, consoles = run_machines(join_and(work), tmp_path)
    assert codes == [2, 2]
    assert all(errors(text) == [f"error: host {HOST}, rank 1: data_path: the disk is gone"] for text in consoles)


def test_the_process_that_is_behind_is_named_when_training_stands_still(tmp_path):
    def work(rank):
        launch.note_activity(f"step {4 - rank}")
        signal.pause()

    codes, consoles = run_machines(join_and(work), tmp_path, PROCESS_TIMEOUT=timedelta(seconds=5))
    assert codes == [1, 1]
    for console in consoles:
        assert errors(console)[0].startswith(f"error: rank 1 ({HOST}, step 3) did not come to step 4 for ")


def test_processes_that_work_long_between_steps_are_left_alone(tmp_path):
    def work(rank):
        launch.note_activity("step 4")
        time.sleep(4)

    codes, consoles = run_machines(join_and(work), tmp_path, PROCESS_TIMEOUT=timedelta(seconds=3))
    assert codes == [0, 0], consoles


@pytest.mark.parametrize("code", [75, 143])
def test_an_end_that_all_agreed_on_is_no_error(code, tmp_path):
    def work(rank):
        time.sleep(rank)  # the other one is not disturbed: it may be saving
        Path("saved").touch()
        raise RunStopped("stopped, state saved; the same command resumes", code)

    codes, consoles = run_machines(join_and(work), tmp_path)
    assert codes == [code, code]
    assert consoles == ["stopped, state saved; the same command resumes\n"] * 2
    assert all((tmp_path / rank / "saved").exists() for rank in "01")


def test_a_run_that_stops_in_one_process_ends_all_with_its_code(tmp_path):
    def work(rank):
        if rank == 0:
            raise RunStopped("the last state could not be saved", 3)
        dist.barrier()

    codes, consoles = run_machines(join_and(work), tmp_path)
    assert codes == [3, 3]
    assert all(errors(text) == [f"error: host {HOST}, rank 0: the last state could not be saved"] for text in consoles)


def test_a_collective_that_takes_too_long_names_what_the_others_do(tmp_path):
    def work(rank):
        launch.note_activity("step 7")
        if rank == 0:
            dist.all_reduce(torch.ones(1))
        signal.pause()

    codes, consoles = run_machines(join_and(work), tmp_path, PROCESS_TIMEOUT=timedelta(seconds=3))
    assert codes == [1, 1]
    for console in consoles:
        (line,) = errors(console)
        assert line.startswith(f"error: host {HOST}, rank 0: lost the other processes at step 7 (")
        assert "Timed out" in line and line.endswith(f"; rank 1 ({HOST}, step 7)")


def test_machines_do_their_first_process_first_and_share_what_the_very_first_finds(tmp_path):
    def work(rank):
        done = processes.in_turn("downloading", lambda is_first: [rank, is_first])
        assert done == [rank, True]
        assert processes.share("choosing", lambda: {"chosen": [rank, 0.1, None]}) == {"chosen": [0, 0.1, None]}
        assert processes.exchange("all", rank) == [0, 1]
        print("ok")

    codes, consoles = run_machines(join_and(work), tmp_path)
    assert codes == [0, 0] and consoles == ["ok\n"] * 2


# Loader workers and memory


class Faulty(torch.utils.data.Dataset):
    """Eight small images; reading the last one runs into a fault, in a worker."""

    def __init__(self, fault: Callable[[], object]) -> None:
        self.fault = fault

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if index == 7:
            self.fault()
        return torch.zeros(3, 20, 20, dtype=torch.uint8), -1


def load_all(fault: Callable[[], object]) -> None:
    loader = training_loader(Faulty(fault), MultiCrop([8], [1], [0.5], [1.0]), 2, workers=2, crop_only=True)
    assert len(list(start_epoch(loader, 0))) == 4


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def leave() -> None:
    os._exit(7)


def bus_error() -> None:
    os.kill(os.getpid(), signal.SIGBUS)


def hang() -> None:
    signal.pause()


def allocate() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33))
    torch.zeros(2**36, dtype=torch.uint8)


WORKERS = {  # name: (fault of a worker, what the line says, what it advises)
    "killed": (die, "a loader worker was killed or ended by itself, most likely as memory or", "lower --workers"),
    "left": (leave, "a loader worker was killed or ended by itself", "--workers 0"),
    "bus error": (bus_error, "a loader worker was killed", "/dev/shm was short: lower --workers"),
    "hangs": (hang, "the loader's workers gave no batch for 2 seconds: the storage", "lower --workers (0: none)"),
    "out of memory": (allocate, "memory is short", "lower --batch_size or --workers"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WORKERS)
def test_a_fault_of_a_worker_is_one_line_and_its_traceback_is_in_the_log(name, tmp_path, monkeypatch):
    fault, what, advice = WORKERS[name]
    monkeypatch.setattr(data, "LOADER_TIMEOUT", 2 if name == "hangs" else 50)

    def main():
        launch.log_to(tmp_path / "log.txt")
        load_all(fault)

    code, console = run_alone(main, tmp_path)
    assert code == 1
    (line,) = errors(console)
    assert what in line and advice in line and "Traceback" not in console
    assert "Traceback (most recent call last)" in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize(
    "error, line",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), "the GPU is out of memory; lower --batch_size"),
        (MemoryError(), "memory is short; lower --batch_size or --workers"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "memory is short"),
        (RuntimeError("unable to write to file </torch_12_34>: No space left"), "a loader worker found /dev/shm full"),
        (OSError(24, "Too many open files"), "too many open files; raise the limit (ulimit -n"),
    ],
    ids=["GPU", "Python", "CPU", "shm", "files"],
)
def test_an_error_of_memory_is_one_line(error, line, tmp_path):
    def main():
        raise error

    code, console = run_alone(main, tmp_path)
    assert code == 1 and console.startswith(f"error: {line}") and console.count("\n") == 1


def test_memory_that_is_really_short_is_one_line(tmp_path):
    code, console = run_alone(allocate, tmp_path)
    advice = "lower --batch_size or --workers, or choose a smaller model, queue or crops"
    assert (code, console) == (1, f"error: memory is short; {advice}\n")


@pytest.mark.parametrize("words", ["--nmb_prototypes 2000000000", "--queue_length 2000000000", "--size_crops 20000 9"])
def test_a_model_queue_or_crops_that_do_not_fit_into_memory_are_one_line(words, machines, monkeypatch):
    def main():
        resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33))
        start_training(*words.split())

    monkeypatch.chdir(machines / "0")
    code, console = run_alone(main, machines)
    (line,) = errors(console)
    assert code == 1 and line.startswith("error: memory is short; ") and "Traceback" not in console


def test_workers_leave_signals_to_their_parent(tmp_path):
    def main():
        def signals():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                os.kill(os.getpid(), number)

        load_all(signals)
        print("loaded")

    assert run_alone(main, tmp_path) == (0, "loaded\n")


def test_a_worker_that_hangs_does_not_keep_a_script_from_ending(tmp_path):
    def main():
        loader = training_loader(Faulty(hang), MultiCrop([8], [1], [0.5], [1.0]), 8, workers=1, crop_only=True)
        start_epoch(loader, 0)
        raise UserError("--epochs: bad")

    code, console = run_alone(main, tmp_path)
    assert (code, console) == (2, "error: --epochs: bad\n")


# /dev/shm


def mount_small_shm(mebibytes: int) -> None:
    """Mount a small tmpfs over /dev/shm for this process alone, as Docker does. Exit with 99 if that is forbidden."""
    libc, private, recursive = ctypes.CDLL(None, use_errno=True), 1 << 18, 1 << 14
    if (
        libc.unshare(0x00020000)  # CLONE_NEWNS
        or libc.mount(b"none", b"/", None, recursive | private, None)
        or libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, f"size={mebibytes}m".encode())
    ):
        os._exit(99)


def with_small_shm(mebibytes: int, main: Callable[[], object], folder: Path) -> tuple[int, str]:
    def mounted():
        mount_small_shm(mebibytes)
        main()

    code, console = run_alone(mounted, folder)
    if code == 99:
        pytest.skip("mount namespaces are not allowed here")
    return code, console


def test_workers_that_dev_shm_cannot_hold_are_left_out(tmp_path):
    def main():
        assert machine.workers_that_fit(4, 2**20) == 4
        assert machine.workers_that_fit(8, 8 * 2**20) == 3
        assert machine.workers_that_fit(4, 65 * 2**20) == 0
        os.environ["LOCAL_WORLD_SIZE"] = "4"
        assert machine.workers_that_fit(4, 4 * 2**20) == 1

    code, console = with_small_shm(64, main, tmp_path)
    assert code == 0, console
    first, _, last = console.splitlines()
    assert first.startswith("--workers: 3 in place of 8, as /dev/shm has 64 MiB free") and "--shm-size" in first
    assert last.startswith("--workers: 1 in place of 4 in each of 4 processes")


@pytest.mark.filterwarnings("ignore")
def test_training_with_a_dev_shm_of_one_mebibyte(images, tmp_path):
    sizes = ["--size_crops", "160", "16", "--batch_size", "4", "--epochs", "1", "--cache", "off"]
    words = [*TINY, "--data_path", str(images), "--dump_path", str(tmp_path / "run"), *sizes, "--workers", "3"]
    code, console = with_small_shm(1, lambda: train.main(train.parse_args(words)), tmp_path)
    assert code == 0, console
    assert "--workers: 0 in place of 3, as /dev/shm has 1 MiB free" in console and "done; evaluate" in console


@pytest.mark.filterwarnings("ignore")
def test_a_dev_shm_that_others_fill_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "LOADER_TIMEOUT", 2)  # torch's worker hangs

    def main():
        loader = training_loader(Faulty(int), MultiCrop([1200], [2], [0.5], [1.0]), 2, workers=1, crop_only=True)
        next(start_epoch(loader, 0))

    code, console = with_small_shm(1, main, tmp_path)
    assert code == 1 and "/dev/shm is full" in errors(console)[0] and "lower --workers" in console, console


def test_a_cache_that_cannot_be_allocated_is_left_out(tmp_path):
    def main():
        assert cache._allocate_cache([(600, 500)] * 4) is None and not os.listdir("/dev/shm")
        path = cache._allocate_cache([(100, 100)] * 4)
        assert os.path.getsize(path) == 4 + 120_000 <= os.stat(path).st_blocks * 512  # a hole would have no blocks

    code, console = with_small_shm(1, main, tmp_path)
    assert code == 0, console
    assert console == "cache: none, as 3 MiB of /dev/shm could not be allocated: No space left on device\n"


def test_a_cache_that_leaves_no_room_for_its_sizes_is_left_out(tmp_path):
    def main():
        save, saved = cache.np.save, []
        cache.np.save = lambda path, sizes: saved.append(os.path.getsize(path[:-4])) or save(path, sizes)
        assert cache._allocate_cache([(591, 591)]) is None and not os.listdir("/dev/shm")
        assert saved == [1 + 3 * 591**2]  # the memory itself did fit

    code, console = with_small_shm(1, main, tmp_path)
    assert code == 0, console


# Log


def test_a_full_disk_does_not_end_a_run_that_logs(tmp_path):
    def main():
        launch.log("before")
        launch.log_to("/dev/full")
        launch.log("after")

    assert run_alone(main, tmp_path) == (0, "before\nafter\n")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_does_not_end_a_run_that_prints(tmp_path):
    words = (
        f"import launch; launch.log('a'); launch.log_to({str(tmp_path / 'log.txt')!r}); "
        "launch.show_progress('b'); launch.log('c')"
    )
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", words], stdout=full, stderr=subprocess.PIPE, cwd=ROOT, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (tmp_path / "log.txt").read_text() == "a\nb\nc\n"


def test_the_log_has_all_lines_from_the_start_and_the_traceback_of_a_bug(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "_log_file", None)  # of runs of other tests in this process

    def main():
        launch.log("before")
        launch.log_to(tmp_path / "log.txt")
        launch.show_progress("epoch 1")
        raise KeyError("a bug")

    code, console = run_alone(main, tmp_path)
    text = (tmp_path / "log.txt").read_text()
    assert code == 1 and text.startswith("before\nepoch 1\nTraceback") and text.endswith("KeyError: 'a bug'\n")
    assert "KeyError: 'a bug'" in console


# Slurm

STEP = dict(
    SLURM_JOB_ID="77", SLURM_STEP_ID="0", SLURM_STEP_NUM_TASKS="6", SLURM_PROCID="4", SLURM_LOCALID="0",
    SLURM_NODEID="2", SLURM_STEP_TASKS_PER_NODE="2(x3)", SLURM_STEP_NODELIST="gpu[007-009]",
)  # fmt: skip
PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR")


@pytest.fixture
def step(monkeypatch):
    """The environment of a task that srun started."""
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    for name in (*PLACE, "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that what read_slurm_step sets goes away with the test
        monkeypatch.delenv(name)
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_a_task_of_srun_finds_its_place(step):
    processes.read_slurm_step()
    assert [os.environ[name] for name in PLACE] == ["4", "6", "0", "2", "2", "gpu007"]
    port = int(os.environ["MASTER_PORT"])
    assert 1024 < port < 32768  # below the ports that systems give to clients
    step.delenv("RANK")
    step.setenv("SLURM_STEP_ID", "1")
    processes.read_slurm_step()
    assert int(os.environ["MASTER_PORT"]) != port


@pytest.mark.parametrize(
    "changes",
    [
        dict(SLURM_STEP_NUM_TASKS="1"),  # salloc's shell, or srun --ntasks=1 torchrun
        dict(
            SLURM_STEP_ID=None, SLURM_STEP_NUM_TASKS=None, SLURM_NTASKS="6", SLURM_PROCID="0"
        ),  # a plain sbatch script
        dict(SLURM_STEP_ID=None, SLURM_PROCID=None, SLURM_NTASKS="6"),  # salloc
        dict.fromkeys(STEP),  # no Slurm
        dict(RANK="0"),  # torchrun in a step
    ],
    ids=["one task", "sbatch", "salloc", "no Slurm", "torchrun"],
)
def test_a_command_that_srun_did_not_start_stays_alone(changes, step):
    for name, value in changes.items():
        step.delenv(name, raising=False) if value is None else step.setenv(name, value)
    processes.read_slurm_step()
    assert "WORLD_SIZE" not in os.environ


@pytest.mark.parametrize(
    "name, value",
    [
        ("SLURM_LOCALID", None),
        ("SLURM_STEP_NODELIST", None),
        ("SLURM_STEP_NODELIST", "[,"),
        ("SLURM_STEP_TASKS_PER_NODE", None),
        ("SLURM_PROCID", "6"),
        ("SLURM_PROCID", "x"),
        ("SLURM_JOB_ID", None),
    ],
)
def test_tasks_that_do_not_know_their_place_never_train_side_by_side(name, value, step):
    step.delenv(name) if value is None else step.setenv(name, value)
    with pytest.raises(
        UserError, match="^Slurm started 6 tasks, .*; start one task per GPU with srun, .* or torchrun$"
    ):
        processes.read_slurm_step()


def test_several_tasks_without_the_variables_of_a_step_are_refused(step):
    step.delenv("SLURM_STEP_NUM_TASKS")
    step.setenv("SLURM_NTASKS", "2")
    step.delenv("SLURM_STEP_NODELIST")
    with pytest.raises(UserError, match="^Slurm started 2 tasks"):
        processes.read_slurm_step()


@pytest.mark.parametrize(
    "hosts, first",
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu[003-010,12],cpu1", "gpu003"),
        ("gpu[7]", "gpu7"),
        ("rack[1-2]-ib", "rack1-ib"),
        ("a-b.example.org", "a-b.example.org"),
    ],
)
def test_the_first_host_of_a_list_is_where_processes_meet(hosts, first, step):
    step.setenv("SLURM_STEP_NODELIST", hosts)
    processes.read_slurm_step()
    assert os.environ["MASTER_ADDR"] == first


def test_tasks_of_srun_train_together(machines, monkeypatch):
    for name, value in (STEP | dict(SLURM_STEP_NUM_TASKS="2", SLURM_STEP_TASKS_PER_NODE="1(x2)")).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_STEP_NODELIST", "localhost")
    monkeypatch.setenv("SLURM_JOB_ID", str(free_port()))
    pids = []
    for rank in range(2):
        monkeypatch.setenv("SLURM_PROCID", str(rank))
        monkeypatch.setenv("SLURM_NODEID", str(rank))
        monkeypatch.chdir(machines / str(rank))
        pids.append(forked(lambda: start_training("--epochs", "1"), machines / f"console-{rank}"))
    assert wait_for(pids) == [0, 0], [(machines / f"console-{rank}").read_text() for rank in range(2)]
    assert "2 processes (gloo)" in (machines / "console-0").read_text()


@pytest.mark.parametrize("code, requeued", [(75, True), (0, False), (1, False), (143, False)])
def test_the_job_script_goes_back_to_the_queue_when_the_time_is_up(code, requeued, tmp_path):
    """With scripts that stand in for srun and scontrol."""
    for name, text in (("srun", f'echo "srun $*"; exit {code}'), ("scontrol", 'echo "scontrol $*"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = script("bash", ROOT / "recipes/slurm.sbatch", "@my recipe.args", "--seed", "1", PATH=path, SLURM_JOB_ID="42")
    assert done.returncode == (0 if requeued else code) and not done.stderr
    started, *lines = done.stdout.splitlines()
    assert started == "srun --kill-on-bad-exit=0 python -u train.py @my recipe.args --seed 1"
    assert ("scontrol requeue 42" in lines) is requeued


def test_the_job_script_asks_slurm_for_a_signal_and_a_task_per_gpu():
    text = (ROOT / "recipes/slurm.sbatch").read_text()
    asked = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in text.splitlines() if "#SBATCH" in line)
    assert asked["ntasks-per-node"] == asked["gpus-per-node"] and asked["signal"] == "USR1@300"
    assert asked["open-mode"] == "append" and "requeue" in asked
    assert script("bash", ROOT / "recipes/slurm.sbatch").returncode == 2


# Two torchrun agents, each of which stands in for a machine


def two_agents(folder: Path, *words: str, of_the_second: Sequence[str] = ()) -> tuple[list[int], list[str]]:
    """(exit codes, consoles) of train.py under two agents whose current folders are 0 and 1.

    of_the_second: more words for the second one.
    """
    port, started = free_port(), []
    for node in range(2):
        launcher = f"-m torch.distributed.run --nnodes=2 --node_rank={node} --nproc_per_node=1 --master_port={port}"
        command = [sys.executable, *launcher.split(), "--master_addr=127.0.0.1", str(ROOT / "train.py"), *TINY, *words]
        command += of_the_second if node else ()
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        file = open(folder / f"console-{node}", "w")
        started.append(subprocess.Popen(command, stdout=file, stderr=file, env=env, cwd=folder / str(node)))
    try:
        codes = [agent.wait(timeout=300) for agent in started]
    finally:
        for agent in started:
            agent.kill()
    return codes, [(folder / f"console-{node}").read_text() for node in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["missing folder", "dump_path is read-only", "fewer images", "another learning rate"])
def test_a_fault_under_one_of_two_agents_ends_both_with_the_reason(name, machines, monkeypatch):
    fault, message = ON_ONE[name]
    with monkeypatch.context() as patch:
        patch.chdir(machines / "1")
        more = fault() or []
    words = ["--batch_size", "2", "--data_path", "images", "--dump_path", "run"]
    codes, consoles = two_agents(machines, *words, of_the_second=more)
    assert 0 not in codes
    for console in consoles:
        (line,) = errors(console)
        assert line.startswith(f"error: {message}")
