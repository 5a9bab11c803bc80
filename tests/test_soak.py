"""bench soak and steady: their parts, and a short soak of whole processes."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import train
from bench import soak, steady


def write_run(dump, *, steps=(1, 2, 3, 4), weight=1.0, queue=8, done=4, seconds=1.0):
    """A finished run of two epochs, as far as compare_runs looks at it."""
    dump.mkdir()
    rows = [{"epoch": (step + 1) // 2, "step": step, "loss": 1.5, "images_per_s": seconds} for step in steps]
    rows += [{"epoch": epoch, "step": 2 * epoch, "epoch_loss": 1.5, "epoch_seconds": seconds} for epoch in (1, 2)]
    (dump / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    contents = {"epoch": 2, "step": done, "state_dict": {"w": torch.tensor([weight, 2.0])}}
    contents["optimizer"] = {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}
    contents["queue"] = {"embeddings": torch.zeros(2, queue, 4), "started": True, "filled": 4}
    torch.save(contents, dump / "checkpoint.pth")
    return dump


@pytest.mark.parametrize(
    ("change", "bit_for_bit", "difference"),
    [
        ({"seconds": 2.0}, True, ""),  # timings do not count
        ({"weight": 1.0 + 2**-23}, True, "different state_dict"),
        ({"weight": 1.5}, False, ""),  # on another number of processes
        ({"queue": 4}, False, "queue"),
        ({"steps": (1, 2, 2, 3, 4)}, False, "metrics.jsonl has 7 rows or other steps, not the 6 of each step once"),
        ({"steps": (1, 2, 4)}, True, "metrics.jsonl has 5 rows"),
        ({"done": 3}, False, "step 3, not 4"),
    ],
)
def test_a_run_that_ended_differently_is_told(change, bit_for_bit, difference, tmp_path):
    runs = write_run(tmp_path / "a"), write_run(tmp_path / "b", **change)
    found = soak.compare_runs(*runs, bit_for_bit=bit_for_bit)
    assert found.startswith(difference) and bool(found) == bool(difference)


def test_the_newest_step_is_that_of_the_newest_file_that_can_be_read(tmp_path):
    assert soak.newest_step(tmp_path) == 0
    torch.save({"step": 7}, tmp_path / "checkpoint_previous.pth")
    torch.save({"step": 9}, tmp_path / "checkpoint.pth")
    assert soak.newest_step(tmp_path) == 9
    os.truncate(tmp_path / "checkpoint.pth", 200)
    assert soak.newest_step(tmp_path) == 7 and soak.step_of(tmp_path / "checkpoint.pth") is None


def test_checksums_tell_images_apart_on_any_number_of_processes():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (2, 4, 3, 5, 5), generator=generator, dtype=torch.uint8)
    params = torch.randn(2, 4, 6, generator=generator)
    whole = soak.checksums([(pixels, params)])
    assert len(set(whole)) == 4
    assert soak.checksums([(pixels[:, :2], params[:, :2])]) + soak.checksums([(pixels[:, 2:], params[:, 2:])]) == whole
    params[1, 2, 3] += 1
    changed = soak.checksums([(pixels, params)])
    assert [a == b for a, b in zip(whole, changed, strict=True)] == [True, True, False, True]


def test_lanes_are_added_up():
    a = {"faults": {"SIGTERM": 1, "SIGKILL of all": 2}, "runs": 1, "epochs_lost": 0.5, "mismatches": ["x"]}
    b = {"faults": {"SIGTERM": 3}, "runs": 2, "epochs_lost": 0.0, "mismatches": []}
    total = {"faults": {"SIGTERM": 4, "SIGKILL of all": 2}, "runs": 3, "epochs_lost": 0.5, "mismatches": ["x"]}
    assert soak.merge([a, b]) == total and soak.merge([a]) == a


def test_waiting_has_an_end(monkeypatch):
    monkeypatch.setattr(soak, "TIMEOUT", 0.02)
    soak.wait_for(lambda: True, "nothing")
    with pytest.raises(soak.Unexpected, match="no step in 0.02 s"):
        soak.wait_for(lambda: False, "no step")


def sleep_for_a_minute(*_arguments):
    time.sleep(60)


def test_a_run_that_hangs_is_ended(monkeypatch, tmp_path):
    monkeypatch.setattr(soak, "TIMEOUT", 0.1)
    monkeypatch.setattr(soak, "be_rank", sleep_for_a_minute)
    start = soak.Start("", 2, tmp_path / "dump", 0)
    with pytest.raises(soak.Unexpected, match="none after 0 steps in 0.1 s"):
        soak.finish(start)
    assert start.codes() == [-9, -9]


def write_options(argv, _rank, _world_size, _port, prefix):
    Path(f"{prefix}.argv").write_text("\n".join(argv))


def test_a_run_may_have_a_folder_with_spaces(monkeypatch, tmp_path):
    monkeypatch.setattr(soak, "be_rank", write_options)
    dump = tmp_path / "every 0.12 s"
    start = soak.Start("--epochs 2", 1, dump, 0)
    start.ranks[0].join()
    argv = Path(f"{start.prefix}.argv").read_text().splitlines()
    assert argv == ["--epochs", "2", "--dump_path", str(dump), "--batch_size", str(soak.GLOBAL_BATCH)]


def test_memory_of_a_process_and_of_what_it_started():
    if not os.path.exists("/proc/self/smaps_rollup"):
        pytest.skip("needs /proc/PID/smaps_rollup")
    assert steady.memory_of(2**22 + 1) == {"main_pss": 0, "main_rss": 0, "others_pss": 0}
    child = subprocess.Popen(["sleep", "60"])
    try:
        assert child.pid in steady.descendants(os.getpid())
        memory = steady.memory_of(os.getpid())
        assert 0 < memory["main_pss"] <= memory["main_rss"] and memory["others_pss"] > 0
    finally:
        child.kill()
        child.wait()
    assert child.pid not in steady.descendants(os.getpid())


def test_growth_is_that_after_the_warm_up():
    samples = [{"step": step, "main_pss": 50 if step < 100 else 100 + step / 100} for step in range(0, 1001, 10)]
    growth = steady.summarize_memory(samples, "main_pss")
    assert growth["before"] == pytest.approx(101.85, abs=0.2) and growth["after"] == pytest.approx(109.1, abs=0.2)
    assert growth["growth"] == pytest.approx(growth["after"] / growth["before"] - 1)


def test_the_time_of_a_step_leaves_out_the_warm_up(tmp_path):
    rows = [{"step": step, "images_per_s": 1.0 if step <= 2 else 400.0} for step in range(1, 21)]
    rows.append({"step": 20, "epoch_loss": 1.0})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert steady.mean_step(tmp_path) == pytest.approx(0.01)


SAVES_WITHIN_EPOCHS = "checkpoint_minutes" in train.option_parser().affects


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_short_soak_finds_nothing_lost(processes, tmp_path):
    """One run of whole processes, disturbed for a minute. Without saves within epochs: only by SIGKILL."""
    faults = list(soak.FAULTS) if SAVES_WITHIN_EPOCHS else [soak.KILL_ALL, soak.KILL_ONE]
    words = soak.OFTEN if SAVES_WITHIN_EPOCHS else ""
    program = "import torch; from bench import soak; import json, sys\n"
    program += f"print(json.dumps(soak.run(torch.device('cpu'), minutes=0.5, jobs=1, seeds=[{processes}], epochs=3, "
    program += f"faults={faults}, words={words!r})))"
    command = [sys.executable, "-c", f"if __name__ == '__main__':\n  exec({program!r})"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["mismatches"] == [] and found["epochs_lost"] == 0 and found["runs"] >= 1
    assert sum(found["faults"].values()) >= 1 and found["starts"] > found["runs"]
    assert not list(tmp_path.glob("runs/soak/[0-9]*"))  # what is kept is of runs with a mismatch
