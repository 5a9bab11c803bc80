"""launch.py: options and their help, errors, device, processes, cores, precision and progress lines."""

import argparse
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, needs_gpu, run_processes, script

import eval_linear
import launch
import machine
import processes
import train
from launch import OptionParser, RunStopped, UserError, positive_int, user_errors
from processes import run_script

CPU = torch.device("cpu")

# Help


COMMON = {
    "train.py": {
        *("data_path", "dataset", "arch", "epochs", "batch_size", "dump_path"),
        *("seed", "device", "workers", "precision", "on_collapse", "tensorboard"),
    },
    "eval_linear.py": {
        *("checkpoint", "data_path", "dataset", "size", "cached", "epochs", "knn_k", "workers", "device", "seed"),
    },
}
PARSERS = {"train.py": train.option_parser, "eval_linear.py": eval_linear.option_parser}


def help_of(parser: OptionParser, word: str, capsys) -> str:
    with pytest.raises(SystemExit) as leave:
        parser.parse_args([word])
    assert not leave.value.code
    return capsys.readouterr().out


def options_in(text: str) -> set[str]:
    """Names of the options and positional arguments that a help text lists."""
    return set(re.findall(r"^  (?:-h, )?(?:--)?(\w+)", text.partition("\n\n")[2], re.MULTILINE))


@pytest.mark.parametrize("word", ["--help", "-h"])
@pytest.mark.parametrize("name", PARSERS)
def test_help_shows_the_common_options_on_one_screen(name, word, capsys):
    text = help_of(PARSERS[name](), word, capsys)
    lines = text.splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 100
    assert options_in(text) == COMMON[name]
    assert "--help-all" in text


@pytest.mark.parametrize("word", ["--help-all", "--help_all"])
@pytest.mark.parametrize("name", PARSERS)
def test_help_all_shows_every_option_with_a_help_text(name, word, capsys):
    parser = PARSERS[name]()
    text = help_of(parser, word, capsys)
    actions = {action.dest if action.default != argparse.SUPPRESS else action.option_strings[-1][2:]: action
               for action in parser._actions}  # fmt: skip
    hidden = {option for option, action in actions.items() if action.help == argparse.SUPPRESS}
    assert hidden == (set(train.REPLACED_BY_TORCHRUN) if name == "train.py" else set())
    assert options_in(text) == actions.keys() - hidden
    assert all(action.help and action.help.strip() for action in actions.values())
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("name", PARSERS)
def test_help_of_a_script_exits_with_0(name):
    done = script(sys.executable, ROOT / name, "--help")
    assert done.returncode == 0 and done.stdout == PARSERS[name]().format_help() and not done.stderr


@pytest.mark.parametrize("name", PARSERS)
def test_every_option_declares_what_it_affects(name):
    parser = PARSERS[name]()
    declared = {action.dest for action in parser._actions if action.default != argparse.SUPPRESS}
    if name == "train.py":
        assert parser.affects.keys() == declared - set(train.REPLACED_BY_TORCHRUN)
        assert set(parser.affects.values()) == {"model", "learning", "nothing"}
    assert parser.affects.keys() <= declared and set(parser.affects.values()) <= {"model", "learning", "nothing"}


# Options


def small_parser() -> OptionParser:
    parser = OptionParser(prog="small.py", fromfile_prefix_chars="@")
    parser.start_group("numbers", affects="nothing")
    parser.add("step_count", 3, positive_int, "Take this many steps.", common="N")
    parser.add("side_lengths", [4, 5], positive_int, "sides in pixels", nargs="+", affects="model")
    return parser


def test_options_come_with_underscores_or_hyphens_from_a_file_or_the_command_line(tmp_path):
    (tmp_path / "o.args").write_text("# a comment\n--step-count 7  # another\n--side_lengths 1 2\n")
    assert vars(small_parser().parse_args([])) == {"step_count": 3, "side_lengths": [4, 5]}
    assert vars(small_parser().parse_args([f"@{tmp_path}/o.args"])) == {"step_count": 7, "side_lengths": [1, 2]}
    for words in (["--step-count=8"], ["--step_count", "8"]):
        args = small_parser().parse_args([f"@{tmp_path}/o.args", *words])
        assert (args.step_count, args.side_lengths) == (8, [1, 2])


def test_the_default_ends_the_help_text_as_one_sentence():
    text = small_parser().format_full_help()
    assert "Take this many steps (default: 3)." in text and "sides in pixels (default: 4 5)." in text
    assert "side_lengths" not in small_parser().format_help()


@pytest.mark.parametrize(
    "words, message",
    [
        ("--step_count 0", "^--step_count: expected a whole number from 1, got 0 "),
        ("--step_count 1.5", "^--step_count: expected a whole number from 1, got 1.5 "),
        ("--step 4", "^unrecognized arguments: --step 4 "),  # no abbreviations
        ("--steps 4", r"\(python small.py --help-all lists the options\)$"),
        ("@none.args", "none.args"),
    ],
)
def test_bad_options_are_user_errors(words, message):
    with pytest.raises(UserError, match=message):
        small_parser().parse_args(words.split())


@pytest.mark.parametrize(
    "parse, good, bad",
    [
        (launch.nonnegative_int, {"0": 0, "12": 12}, ["-1", "1.5", "nan", "x"]),
        (launch.positive_int, {"1": 1}, ["0"]),
        (launch.nonnegative, {"0": 0.0, "1e-3": 0.001}, ["-1", "nan", "inf"]),
        (launch.positive, {"0.5": 0.5}, ["0", "nan", "inf", "-inf"]),
        (launch.workers_or_auto, {"auto": "auto", "0": 0, "1024": 1024}, ["-1", "some", "1025"]),
        (launch.epoch_count, {"1": 1, "10000000": 10**7}, ["0", "10000001"]),
        (launch.number(int, 2), {"2": 2}, ["1"]),
    ],
)
def test_numbers_of_options_are_checked(parse, good, bad):
    for text, value in good.items():
        assert parse(text) == value and type(parse(text)) is type(value)
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=f"^expected .* got {text}$"):
            parse(text)


def test_options_as_a_command_line():
    assert launch.as_command_line({"base_lr": 0.3, "nmb_crops": [2, 6], "stem": "small"}) == (
        "--base_lr 0.3 --nmb_crops 2 6 --stem small"
    )


# Errors


@pytest.mark.parametrize(
    "error, code, line",
    [
        (UserError("--epochs: expected 1 or more"), 2, "error: --epochs: expected 1 or more\n"),
        (RunStopped("the loss is nan"), 1, "error: the loss is nan\n"),
        (RunStopped("the last state could not be saved", 3), 3, "error: the last state could not be saved\n"),
        (RunStopped("stopped, state saved", code=143), 143, "stopped, state saved\n"),
        (
            UserError("Caught in worker 0:\n  Traceback ...\nlaunch.UserError: cannot read x"),
            2,
            "error: cannot read x\n",
        ),
        (UserError(), 2, "error: UserError()\n"),
    ],
    ids=["user error", "run stopped", "not saved", "signal", "worker", "no message"],
)
def test_a_user_error_or_a_stopped_run_ends_with_one_line(error, code, line, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as leave:
        run_script(main)
    assert leave.value.code == code
    assert capsys.readouterr() == ("", line)


def test_an_interrupt_ends_with_one_line_that_says_how_to_resume(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as leave:
        run_script(main, "; the same command resumes")
    assert leave.value.code == 130
    assert capsys.readouterr().out == "\ninterrupted; the same command resumes\n"


def run_with_a_bug(images: Path, folder: Path, *more: str) -> subprocess.CompletedProcess:
    """Train with an optimizer that raises ValueError at its first step."""
    (folder / "main.py").write_text(
        "import sys, launch, train\n"
        "def buggy_step(optimizer): raise ValueError('this is a bug')\n"
        "train.LARS.step = buggy_step\n"
        "processes.run_script(lambda: train.main(train.parse_args(sys.argv[1:])))\n"
    )
    words = [*TINY, f"--data_path={images}", f"--dump_path={folder}/run", *more]
    return script(sys.executable, folder / "main.py", *words, PYTHONPATH=str(ROOT))


def test_a_bug_keeps_its_traceback(images, tmp_path):
    failed = run_with_a_bug(images, tmp_path)
    assert failed.returncode == 1
    assert failed.stderr.startswith("Traceback (most recent call last):") and "in buggy_step" in failed.stderr
    assert failed.stderr.endswith("ValueError: this is a bug\n") and "\nerror: " not in failed.stderr


def test_a_user_error_of_a_script_is_one_line_and_exit_code_2(images, tmp_path):
    refused = run_with_a_bug(images, tmp_path, "--batch_size", "1")
    assert refused.returncode == 2
    assert refused.stderr == "error: --batch_size: expected 2 or more (BatchNorm needs several images), got 1\n"


def test_user_errors_turns_a_value_error_into_a_user_error_with_a_prefix():
    with pytest.raises(UserError, match="^--size_crops: too small$") as caught, user_errors("--"):
        raise ValueError("size_crops:\ntoo small")
    assert caught.value.__cause__ is None and caught.value.__suppress_context__
    original = UserError("--epochs: too few")
    with pytest.raises(UserError) as caught, user_errors("--"):
        raise original
    assert caught.value is original
    with pytest.raises(KeyError), user_errors("--"):
        raise KeyError("a bug")


# Device, precision, torch.compile


def test_more_processes_than_gpus_says_what_to_type(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    for module in (launch, eval_linear):
        with pytest.raises(UserError, match=r"2 GPU\(s\).*--nproc_per_node=2"):
            module.choose_device("auto")


@pytest.fixture
def unusable_gpu(monkeypatch):
    """A machine with a GPU, and a torch that was built without CUDA."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(launch, "gpu_files", lambda: [Path("/dev/nvidia0")])
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
    monkeypatch.setattr(launch, "gpu_files", lambda: [])
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


def test_compiles_on_its_own_only_on_one_gpu_in_long_runs_of_large_crops(monkeypatch, capsys):
    def decision(error=None, device="cuda:0", world_size=1, steps=10_000, crop_size=224):
        compiled = []

        def fake_compile(function):
            compiled.append(function)
            if error:
                raise error
            return lambda ones: None

        monkeypatch.setattr(torch, "compile", fake_compile)
        monkeypatch.setattr(torch, "ones", lambda *_, **__: None)
        compiles = machine.use_compile("auto", torch.device(device), world_size, steps=steps, crop_size=crop_size)
        assert bool(compiled) is (compiles or error is not None)
        return compiles

    assert decision()
    others = dict(device="cpu"), dict(world_size=2), dict(steps=9_999), dict(crop_size=96)
    assert not any(decision(**other) for other in others)
    assert not capsys.readouterr().out
    assert not decision(error=RuntimeError("no C compiler\nfound"))
    out = capsys.readouterr().out
    assert "--compile off: torch.compile does not work here (RuntimeError: no C compiler)" in out


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_compiles_as_the_user_says(device):
    for steps, crop_size in ((10_000, 224), (1, 32)):
        options = dict(steps=steps, crop_size=crop_size)
        assert machine.use_compile("on", torch.device(device), 1, **options) is True
        assert machine.use_compile("off", torch.device(device), 1, **options) is False


@needs_gpu
def test_compiling_works_on_this_gpu():
    assert machine.use_compile("auto", torch.device("cuda", 0), 1, steps=10_000, crop_size=224)


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
    files = {"/proc/self/cgroup": groups} | {f"/sys/fs/cgroup/{name}": text for name, text in limits.items()}

    def read_text(path):
        if str(path) not in files:
            raise FileNotFoundError(path)
        return files[str(path)]

    monkeypatch.setattr(Path, "read_text", read_text)
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
    monkeypatch.setattr(launch.shutil, "disk_usage", missing)
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
    assert not machine.use_compile("auto", mps, 1, **options) and not machine.use_compile("off", mps, 1, **options)
    with pytest.raises(UserError, match="^--compile on: expected off on --device mps$"):
        machine.use_compile("on", mps, 1, **options)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="^--device mps: expected a single process"):
        machine.choose_device("mps")


def test_an_apple_gpu_that_is_missing_is_refused():
    if torch.backends.mps.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(UserError, match="^--device mps: this torch finds no Apple GPU; write --device cpu$"):
        train.main(train.parse_args(["--dataset", "shapes", "--device", "mps"]))


# Backend


def test_gloo_on_request_lets_processes_share_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("SWAV_BACKEND", "gloo")
    assert machine.choose_device("auto") == torch.device("cuda", 1)
    assert processes.backend_of("cuda") == processes.backend_of("cpu") == "gloo"
    monkeypatch.setenv("SWAV_BACKEND", "mpi")
    with pytest.raises(UserError, match=r"^SWAV_BACKEND \(environment\): expected gloo, or leave it out, got mpi$"):
        machine.choose_device("auto")
    monkeypatch.setenv("SWAV_BACKEND", "")
    assert (processes.backend_of("cuda"), processes.backend_of("cpu")) == ("nccl", "gloo")


def test_a_task_of_slurm_with_a_gpu_of_its_own_takes_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in dict(LOCAL_WORLD_SIZE="4", LOCAL_RANK="3", SLURM_GPUS_PER_TASK="1").items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert machine.choose_device("auto") == torch.device("cuda", 0)
    monkeypatch.delenv("SLURM_GPUS_PER_TASK")
    with pytest.raises(UserError, match="^--nproc_per_node=4: this machine has 1"):
        machine.choose_device("auto")


# Messages


@pytest.mark.parametrize("on_terminal, expected", [(False, "one\ntwo\n"), (True, "\r\033[2Kone\r\033[2Ktwo\n")])
def test_a_progress_line_is_overwritten_only_on_a_terminal(on_terminal, expected, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: on_terminal)
    launch.show_progress("one")
    launch.show_progress("two", keep=True)
    assert capsys.readouterr().out == expected


def test_only_the_first_process_logs(monkeypatch, capsys):
    launch.log("one")
    monkeypatch.setenv("RANK", "1")
    launch.log("two")
    assert capsys.readouterr().out == "one\n"


# Signals


def test_signals_are_noted_and_a_second_interrupt_is_one(monkeypatch):
    before = {name: signal.getsignal(getattr(signal, name)) for name in launch.STOP_CODES}
    for name in launch.STOP_CODES:
        with launch.stop_signals() as requested_stop:
            assert requested_stop() is None
            os.kill(os.getpid(), getattr(signal, name))
            assert requested_stop() == name
            os.kill(os.getpid(), getattr(signal, name))  # torchrun passes on what the terminal sent
            if name == "SIGINT":
                monkeypatch.setattr(launch, "REPEAT_SECONDS", 0)
                with pytest.raises(KeyboardInterrupt):
                    os.kill(os.getpid(), signal.SIGINT)
                    time.sleep(5)
    assert before == {name: signal.getsignal(getattr(signal, name)) for name in launch.STOP_CODES}


def test_signals_are_left_alone_in_other_threads_and_where_they_do_not_exist(monkeypatch):
    def in_thread():
        with launch.stop_signals() as requested_stop:
            results.append(requested_stop())

    results = []
    thread = threading.Thread(target=in_thread)
    thread.start()
    thread.join()
    assert results == [None]
    monkeypatch.delattr(signal, "SIGUSR1")  # as on Windows
    with launch.stop_signals() as requested_stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert requested_stop() == "SIGTERM"


def votes_of(rank: int, world_size: int) -> list[int]:
    votes = processes.Votes()
    seen = [votes.largest(number) for number in ([0, 3, 0, 1, 0], [2, 0, 0, 5, 0])[rank]]
    votes.close()
    return seen


def test_all_processes_get_the_largest_vote_one_step_later():
    assert run_processes(votes_of, 2) == [[0, 2, 3, 0, 5]] * 2
    alone = processes.Votes()
    assert [alone.largest(number) for number in (0, 3, 1)] == [0, 3, 1]
    alone.close()
