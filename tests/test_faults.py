"""Signals and kills of whole runs, as users and clusters send them.

Further faults: test_faults_images.py (files and folders), test_faults_input.py (options, files that are no checkpoints)
and test_faults_processes.py (processes, loader workers, memory). Those that take long: python -m pytest -m slow.
"""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, without_times

LONG = ["--epochs", "200", "--batch_size", "2", "--log_freq", "1"]  # 5 steps an epoch


LIMIT = 240  # seconds that a run may take for what a test waits for, on a busy machine


@pytest.fixture
def start(images):
    """start(processes, dump, *words) -> Popen of a long run, which ends with the test. Its output: dump/out.txt."""
    runs = []

    def start(processes: int, dump, *words: str) -> subprocess.Popen:
        dump.mkdir(exist_ok=True)
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "--max_restarts=1"]
        launcher = launcher if processes > 1 else []
        command = [sys.executable, *launcher, ROOT / "train.py", *TINY, *LONG, f"--data_path={images}", *words]
        with (dump / "out.txt").open("a") as out:
            options = dict(stdout=out, stderr=out, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True)
            runs.append(subprocess.Popen([*map(str, command), f"--dump_path={dump}"], **options))
        return runs[-1]

    yield start
    for run in runs:
        with suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
        run.wait()


def children_of(pid: int) -> list[int]:
    stats = [path.read_text().rsplit(")", 1) for path in Path("/proc").glob("[0-9]*/stat")]
    return [int(start.split()[0]) for start, rest in stats if int(rest.split()[1]) == pid]


def wait_for(dump, text: str, run: subprocess.Popen, times: int = 1) -> None:
    deadline = time.monotonic() + LIMIT
    while (dump / "out.txt").read_text().count(text) < times:
        assert run.poll() is None and time.monotonic() < deadline, (dump / "out.txt").read_text()
        time.sleep(0.05)


@pytest.mark.parametrize("name, code", [("SIGTERM", 143), ("SIGUSR1", 75), ("SIGINT", 130)])
def test_a_signal_saves_and_gives_the_exit_code_that_resumes(name, code, start, tmp_path):
    run = start(1, tmp_path)
    wait_for(tmp_path, "step 7/", run)
    run.send_signal(getattr(signal, name))
    assert run.wait(timeout=LIMIT) == code
    out = (tmp_path / "out.txt").read_text()
    assert f"{name}: stopped after step " in out and "the same command resumes" in out and "Traceback" not in out
    last_line = (tmp_path / "log.txt").read_text().splitlines()[-1]
    assert last_line.startswith(f"{name}: stopped after step ") and last_line in out
    contents = torch.load(tmp_path / "checkpoint.pth")
    assert f"stopped after step {contents['step']}, saved in " in out and contents["step"] >= 7
    assert not (tmp_path / "run.lock").exists()
    assert without_times(tmp_path)[-1]["step"] == contents["step"]


def test_torchrun_passes_a_signal_on_and_all_processes_save_the_same_step(start, tmp_path):
    words = ["--batch_size", "2", "--sync_bn", "none", "--workers", "1"]
    run = start(2, tmp_path, *words)
    wait_for(tmp_path, "step 5/", run)
    run.send_signal(signal.SIGTERM)
    run.wait(timeout=LIMIT)
    out = (tmp_path / "out.txt").read_text()
    assert run.returncode != 0 and out.count("SIGTERM: stopped after step ") == 1
    step = torch.load(tmp_path / "checkpoint.pth")["step"]
    assert f"stopped after step {step}, saved in " in out and not (tmp_path / "run.lock").exists()
    again = start(2, tmp_path, *words)
    wait_for(tmp_path, f"step {step + 2}/", again)
    again.send_signal(signal.SIGTERM)
    again.wait(timeout=LIMIT)
    steps = [row["step"] for row in without_times(tmp_path) if "loss" in row]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > step


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc")
def test_a_killed_process_of_two_comes_back_with_max_restarts(start, tmp_path):
    dump = tmp_path / "run"
    run = start(2, dump, "--epochs", "15")  # 2 steps an epoch
    wait_for(dump, "step 7/", run)
    os.kill(max(children_of(run.pid)), signal.SIGKILL)
    assert run.wait(timeout=LIMIT) == 0, (dump / "out.txt").read_text()
    assert "resuming from " in (dump / "out.txt").read_text()
    steps = [row["step"] for row in without_times(dump) if "loss" in row]
    assert steps == list(range(1, 31))


def test_a_second_run_in_a_folder_is_refused_while_the_first_goes_on(start, tmp_path):
    run = start(1, tmp_path)
    wait_for(tmp_path, "step 6/", run)
    second = start(1, tmp_path)
    assert second.wait(timeout=LIMIT) == 2
    out = (tmp_path / "out.txt").read_text()
    assert f"error: --dump_path: another run writes to {tmp_path}: process {run.pid} on " in out
    steps = out.count(" step ")
    wait_for(tmp_path, " step ", run, times=steps + 3)
    run.kill()
    run.wait(timeout=LIMIT)
    third = start(1, tmp_path)  # the lock of a killed run is taken over
    wait_for(tmp_path, "run.lock: taken over", third)
    wait_for(tmp_path, "resuming from ", third)
    third.send_signal(signal.SIGTERM)
    assert third.wait(timeout=LIMIT) == 143
