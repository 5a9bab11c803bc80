"""Signals and kills of whole runs, as users and clusters send them.

Further faults: test_faults_images.py (files and folders), test_faults_input.py (options, files that are no checkpoints)
and test_faults_processes.py (processes, loader workers, memory). Those that take long: python -m pytest -m slow.
"""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, TINY, without_times

LONG = ["--epochs", "200", "--batch_size", "2", "--log_freq", "1"]  # 5 steps an epoch


def start(processes: int, images, dump, *words: str) -> subprocess.Popen:
    """Start a long run whose output goes to dump/out.txt."""
    dump.mkdir(exist_ok=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    command = [sys.executable, *launcher, ROOT / "train.py", *TINY, *LONG, f"--data_path={images}", *words]
    with (dump / "out.txt").open("a") as out:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen([*map(str, command), f"--dump_path={dump}"], stdout=out, stderr=out, env=environment)


def wait_for(dump, text: str, run: subprocess.Popen, times: int = 1) -> None:
    deadline = time.monotonic() + 100
    while (dump / "out.txt").read_text().count(text) < times:
        assert run.poll() is None and time.monotonic() < deadline, (dump / "out.txt").read_text()
        time.sleep(0.05)


@pytest.mark.parametrize("name, code", [("SIGTERM", 143), ("SIGUSR1", 75), ("SIGINT", 130)])
def test_a_signal_saves_and_gives_the_exit_code_that_resumes(name, code, images, tmp_path):
    run = start(1, images, tmp_path)
    wait_for(tmp_path, "step 7/", run)
    run.send_signal(getattr(signal, name))
    assert run.wait(timeout=60) == code
    out = (tmp_path / "out.txt").read_text()
    assert f"{name}: stopped after step " in out and "the same command resumes" in out and "Traceback" not in out
    contents = torch.load(tmp_path / "checkpoint.pth")
    assert f"stopped after step {contents['step']}, saved in " in out and contents["step"] >= 7
    assert not (tmp_path / "run.lock").exists()
    assert without_times(tmp_path)[-1]["step"] == contents["step"]


def test_torchrun_passes_a_signal_on_and_all_processes_save_the_same_step(images, tmp_path):
    words = ["--batch_size", "2", "--sync_bn", "none", "--workers", "1"]
    run = start(2, images, tmp_path, *words)
    wait_for(tmp_path, "step 5/", run)
    run.send_signal(signal.SIGTERM)
    run.wait(timeout=60)
    out = (tmp_path / "out.txt").read_text()
    assert run.returncode != 0 and out.count("SIGTERM: stopped after step ") == 1
    step = torch.load(tmp_path / "checkpoint.pth")["step"]
    assert f"stopped after step {step}, saved in " in out and not (tmp_path / "run.lock").exists()
    again = start(2, images, tmp_path, *words)
    wait_for(tmp_path, f"step {step + 2}/", again)
    again.send_signal(signal.SIGTERM)
    again.wait(timeout=60)
    steps = [row["step"] for row in without_times(tmp_path) if "loss" in row]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > step


def test_a_killed_process_of_two_comes_back_with_max_restarts(images, tmp_path):
    dump = tmp_path / "run"
    dump.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max_restarts=1"]
    command += [ROOT / "train.py", *TINY, "--epochs", "40", "--batch_size", "2", "--log_freq", "1"]
    command += [f"--data_path={images}", f"--dump_path={dump}"]
    with (dump / "out.txt").open("w") as out:
        run = subprocess.Popen([str(word) for word in command], stdout=out, stderr=out, env={**os.environ})
    wait_for(dump, "step 7/", run)
    (worker, *_) = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True).stdout.split()[-1:]
    os.kill(int(worker), signal.SIGKILL)
    assert run.wait(timeout=100) == 0, (dump / "out.txt").read_text()
    assert "resuming from " in (dump / "out.txt").read_text()
    steps = [row["step"] for row in without_times(dump) if "loss" in row]
    assert steps == list(range(1, 81))


def test_a_second_run_in_a_folder_is_refused_while_the_first_goes_on(images, tmp_path):
    run = start(1, images, tmp_path)
    wait_for(tmp_path, "step 6/", run)
    second = start(1, images, tmp_path)
    assert second.wait(timeout=60) == 2
    out = (tmp_path / "out.txt").read_text()
    assert f"error: --dump_path: another run writes to {tmp_path}: process {run.pid} on " in out
    steps = out.count(" step ")
    wait_for(tmp_path, " step ", run, times=steps + 3)
    run.kill()
    run.wait(timeout=60)
    third = start(1, images, tmp_path)  # the lock of a killed run is taken over
    wait_for(tmp_path, "run.lock: taken over", third)
    third.send_signal(signal.SIGTERM)
    assert third.wait(timeout=60) == 143
