"""processes.py: how a script ends, the backend, votes. Several processes that fail: test_faults_processes.py."""

import sys

import pytest
import torch
from conftest import ROOT, TINY, run_processes, script

import processes
from launch import RunStopped, UserError
from processes import run_script

# How a script ends


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


def test_a_bug_keeps_its_traceback(images, tmp_path):
    (tmp_path / "main.py").write_text(
        "import sys, processes, train\n"
        "def buggy_step(optimizer): raise ValueError('this is a bug')\n"
        "train.LARS.step = buggy_step\n"
        "processes.run_script(lambda: train.main(train.parse_args(sys.argv[1:])))\n"
    )
    words = [*TINY, f"--data_path={images}", f"--dump_path={tmp_path}/run"]
    failed = script(sys.executable, tmp_path / "main.py", *words, PYTHONPATH=str(ROOT))
    assert failed.returncode == 1
    assert failed.stderr.startswith("Traceback (most recent call last):") and "in buggy_step" in failed.stderr
    assert failed.stderr.endswith("ValueError: this is a bug\n") and "\nerror: " not in failed.stderr


# The backend


def test_the_backend_is_nccl_for_gpus_and_gloo_on_request(monkeypatch):
    monkeypatch.setenv("SWAV_BACKEND", "gloo")
    assert processes.backend_of("cuda") == processes.backend_of("cpu") == "gloo"
    monkeypatch.setenv("SWAV_BACKEND", "mpi")
    with pytest.raises(UserError, match=r"^SWAV_BACKEND \(environment\): expected gloo, or leave it out, got mpi$"):
        processes.backend_of("cuda")
    monkeypatch.setenv("SWAV_BACKEND", "")
    assert (processes.backend_of("cuda"), processes.backend_of("cpu")) == ("nccl", "gloo")


# Shares


def gathered_shares(rank: int, world_size: int) -> list[torch.Tensor]:
    return [processes.gather_shares(whole[rank::world_size]) for whole in (torch.arange(5), torch.arange(4) / 10)]


def test_shares_are_joined_in_order():
    for integers, floats in [gathered_shares(0, 1), *run_processes(gathered_shares, 2)]:
        assert torch.equal(integers, torch.arange(5)) and torch.equal(floats, torch.arange(4) / 10)


# Votes


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
