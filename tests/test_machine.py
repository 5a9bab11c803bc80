"""machine.py: device, precision, torch.compile, cores, memory."""

import math
import os
import sys
from pathlib import Path

import pytest
import torch
from conftest import needs_gpu, script

import eval_linear
import machine
import train
from launch import UserError

CPU = torch.device("cpu")


# Device, precision, torch.compile


def test_more_processes_than_gpus_says_what_to_type(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    for module in (machine, eval_linear):
        with pytest.raises(UserError, match=r"2 GPU\(s\).*--nproc_per_node=2"):
            module.choose_device("auto")


@pytest.fixture
def unusable_gpu(monkeypatch):
    """A machine with a GPU, and a torch that was built without CUDA."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(machine, "gpu_files", lambda: [Path("/dev/nvidia0")])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_warns_once_of_a_gpu_that_torch_cannot_use(unusable_gpu, capsys):
    assert machine.choose_device("auto") == CPU
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("warning: ") and f"torch {torch.__version__} was built without CUDA" in line
    with pytest.raises(UserError, match="^--device cuda: .* was built without CUDA; write --device cpu"):
        machine.choose_device("cuda")
    assert machine.choose_device("cpu") == CPU and not capsys.readouterr().out


def test_the_warning_gives_the_reason_of_the_driver(unusable_gpu, monkeypatch, capsys):
    def init():
        raise RuntimeError("the driver is too old\nmore lines")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", init)
    assert machine.choose_device("auto") == CPU
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("warning: ") and "the driver is too old; running on the CPU" in line


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_a_gpu_that_is_hidden_on_purpose_causes_no_warning(unusable_gpu, hidden, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert machine.choose_device("auto") == CPU
    assert not capsys.readouterr().out


def test_a_machine_without_a_gpu_causes_no_warning(unusable_gpu, monkeypatch, capsys):
    monkeypatch.setattr(machine, "gpu_files", lambda: [])
    assert machine.choose_device("auto") == CPU
    assert not capsys.readouterr().out
    with pytest.raises(UserError, match="^--device cuda: .* it finds none on this machine"):
        machine.choose_device("cuda")


@pytest.mark.parametrize("has_bf16", [True, False])
def test_bf16_is_the_default_on_cpus_that_have_it(monkeypatch, has_bf16):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bf16)
    expected = torch.bfloat16 if has_bf16 else torch.float32
    assert machine.choose_precision(None, CPU) == expected
    assert machine.choose_precision("fp32", CPU) == torch.float32


def test_compiles_on_its_own_only_on_gpus_in_long_runs_of_large_crops(monkeypatch, capsys):
    def decision(error=None, device="cuda:0", steps=10_000, crop_size=224, others=()):
        compiled, exchanged = [], []

        def fake_compile(function):
            compiled.append(function)
            if error:
                raise error
            return lambda ones: None

        def exchange(doing, value):
            exchanged.append(doing)
            return [value, *others]

        monkeypatch.setattr(torch, "compile", fake_compile)
        monkeypatch.setattr(torch, "ones", lambda *_, **__: None)
        options = dict(steps=steps, crop_size=crop_size, exchange=exchange)
        compiles = machine.use_compile("auto", torch.device(device), **options)
        assert len(compiled) == len(exchanged) == (compiles or bool(error or others))  # all processes exchange, or none
        return compiles

    assert decision() and decision(others=[None, None])
    assert not any(decision(**other) for other in (dict(device="cpu"), dict(steps=9_999), dict(crop_size=96)))
    assert not capsys.readouterr().out
    assert not decision(error=RuntimeError("no C compiler\nfound"))
    out = capsys.readouterr().out
    assert "--compile off: torch.compile does not work here (RuntimeError: no C compiler)" in out
    assert not decision(others=[None, "ImportError: triton", "OSError: x"])
    out = capsys.readouterr().out
    assert out.startswith("--compile off: torch.compile does not work on rank 2 (ImportError: triton); ")


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_compiles_as_the_user_says(device):
    for steps, crop_size in ((10_000, 224), (1, 32)):
        options = dict(steps=steps, crop_size=crop_size)
        assert machine.use_compile("on", torch.device(device), **options) is True
        assert machine.use_compile("off", torch.device(device), **options) is False


@needs_gpu
def test_compiling_works_on_this_gpu():
    assert machine.use_compile("auto", torch.device("cuda", 0), steps=10_000, crop_size=224)


# Cores


@pytest.mark.parametrize(
    "processes, workers, augmenting, cropping_in_memory, cropping_files",
    [  # (workers, threads) of each process that shares eight cores
        (1, "auto", (4, 4), (0, 8), (1, 8)),
        (1, 3, (3, 5), (3, 8), (3, 8)),
        (4, "auto", (1, 1), (0, 2), (1, 2)),
        (16, "auto", (0, 1), (0, 1), (0, 1)),
    ],
)
def test_cores_are_divided_between_processes_and_their_workers(
    processes, workers, augmenting, cropping_in_memory, cropping_files, monkeypatch
):
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for crop_only, in_memory, expected in (
        (False, True, augmenting),
        (True, True, cropping_in_memory),
        (True, False, cropping_files),
    ):
        options = dict(crop_only=crop_only, in_memory=in_memory)
        assert (machine.set_threads_and_workers(workers, CPU, **options), threads[-1]) == expected
    threads.clear()
    on_gpu = max(1, 8 // processes - 1) if workers == "auto" else workers
    gpu = torch.device("cuda", 0)
    assert machine.set_threads_and_workers(workers, gpu, crop_only=True, in_memory=True) == on_gpu and not threads


def test_threads_that_the_user_sets_are_kept(monkeypatch):
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    machine.set_threads_and_workers("auto", CPU, crop_only=True, in_memory=True)
    assert not threads


def use_control_groups(groups: str, limits: dict[str, str], monkeypatch) -> None:
    """Let files below /proc and /sys say that this process is in these control groups, with these limits."""
    files = {"/proc/self/cgroup": groups} | {f"/sys/fs/cgroup/{name}": text for name, text in limits.items()}

    def read_text(path):
        if str(path) not in files:
            raise FileNotFoundError(path)
        return files[str(path)]

    monkeypatch.setattr(Path, "read_text", read_text)


@pytest.mark.parametrize(
    "groups, limits, expected",
    [
        ("0::/job/step\n", {"job/memory.max": "4096", "job/step/memory.max": "max"}, 4096),
        ("0::/\n", {"memory.max": "512"}, 512),
        ("5:devices:/a\n4:memory:/a/b\n0::/\n", {"memory/memory.limit_in_bytes": "99", "memory/a/b/other": "1"}, 99),
        ("0::/job\n", {"job/memory.max": "max"}, math.inf),
        ("0::/job\n", {"job/memory.max": "900", "job/memory.current": "600"}, 300),
        (  # files that the system may drop do not count
            "0::/\n",
            {"memory.max": "900", "memory.current": "600", "memory.stat": "anon 1\ninactive_file 250\n"},
            550,
        ),
        (
            "4:memory:/\n",
            {"memory/memory.limit_in_bytes": "99", "memory/memory.usage_in_bytes": "120"},
            0,
        ),
        ("0::/\n", {"memory.max": "damaged"}, math.inf),
    ],
)
def test_memory_is_limited_by_every_parent_control_group(groups, limits, expected, monkeypatch):
    use_control_groups(groups, limits, monkeypatch)
    assert machine.memory_left() == expected


@pytest.mark.parametrize(
    "groups, limits, cores",
    [
        ("0::/job/step\n", {"job/cpu.max": "250000 100000", "job/step/cpu.max": "max 100000"}, 2),
        ("0::/\n", {"cpu.max": "50000 100000"}, 1),
        ("0::/\n", {"cpu.max": "max 100000"}, 8),
        ("3:cpu,cpuacct:/a\n", {"cpu/a/cpu.cfs_quota_us": "300000", "cpu/a/cpu.cfs_period_us": "100000"}, 3),
        ("3:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ("3:cpuset:/\n", {"cpuset/cpu.cfs_quota_us": "1000", "cpuset/cpu.cfs_period_us": "100000"}, 8),
    ],
)
def test_cpu_quotas_of_control_groups_limit_the_cores(groups, limits, cores, monkeypatch):
    use_control_groups(groups, limits, monkeypatch)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert machine.available_cores() == cores
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert machine.available_cores() == cores // 2
    assert machine.set_threads_and_workers("auto", torch.device("cuda", 0)) == max(1, cores // 2 - 1)


# Other systems than Linux


def test_a_system_without_proc_dev_shm_and_affinity(monkeypatch):
    def missing(*_):
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    monkeypatch.setattr(machine.shutil, "disk_usage", missing)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert machine.memory_left() == machine.shared_memory_left() == math.inf
    assert machine.available_cores() == 6 and machine.workers_that_fit(4, 2**40) == 4


@pytest.fixture
def apple_gpu(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


def test_an_apple_gpu_is_used_if_asked_for(apple_gpu, monkeypatch):
    mps = torch.device("mps")
    assert machine.choose_device("mps") == mps and machine.choose_device("auto") == CPU
    assert machine.choose_precision(None, mps) == machine.choose_precision("fp32", mps) == torch.float32
    for name in ("bf16", "fp16"):
        with pytest.raises(UserError, match=f"^--precision {name}: expected fp32 on --device mps$"):
            machine.choose_precision(name, mps)
    options = dict(steps=10**6, crop_size=224)
    assert not machine.use_compile("auto", mps, **options) and not machine.use_compile("off", mps, **options)
    with pytest.raises(UserError, match="^--compile on: expected off on --device mps$"):
        machine.use_compile("on", mps, **options)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="^--device mps: expected a single process"):
        machine.choose_device("mps")


def test_an_apple_gpu_that_is_missing_is_refused():
    if torch.backends.mps.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(UserError, match="^--device mps: this torch finds no Apple GPU; write --device cpu$"):
        train.main(train.parse_args(["--dataset", "shapes", "--device", "mps"]))


# GPUs that processes share


def test_gloo_on_request_lets_processes_share_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("SWAV_BACKEND", "gloo")
    assert machine.choose_device("auto") == torch.device("cuda", 1)
    monkeypatch.delenv("SWAV_BACKEND")
    with pytest.raises(UserError, match="^--nproc_per_node=4: this machine has 2"):
        machine.choose_device("auto")


def test_a_task_of_slurm_with_a_gpu_of_its_own_takes_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in dict(LOCAL_WORLD_SIZE="4", LOCAL_RANK="3", SLURM_GPUS_PER_TASK="1").items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert machine.choose_device("auto") == torch.device("cuda", 0)
    monkeypatch.delenv("SLURM_GPUS_PER_TASK")
    with pytest.raises(UserError, match="^--nproc_per_node=4: this machine has 1"):
        machine.choose_device("auto")


@pytest.mark.skipif(sys.platform == "win32", reason="no limits of files")
def test_a_limit_of_files_that_is_below_a_batch_leaves_no_workers(capsys):
    program = "import machine; print(machine.workers_that_fit(4, 300_000), machine.workers_that_fit(4, 10_000))"
    done = script("bash", "-c", f"ulimit -f 100; exec {sys.executable} -c '{program}'")
    assert "--workers: 0 in place of 4, as files may have 0.1 MiB at most (ulimit -f)\n0 4\n" in done.stdout, (
        done.stderr
    )
