"""checkpoint.py: saving, loading and resuming runs, comparing options, rolling back after a collapse."""

import errno
import os
import re
import shutil
import signal
import sys
import threading
import time
from contextlib import contextmanager
from itertools import count

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    STUCK,
    TINY,
    assert_same,
    forked_ranks,
    run_training,
    script,
    torchrun,
    train_stuck,
    without_times,
)

import checkpoint
import launch
import options
import train
from images import ImageArrays
from launch import RunStopped, UserError


def load(dump) -> dict:
    return torch.load(dump / "checkpoint.pth")


# Write and read


def documented_keys() -> set[str]:
    names = re.findall(r"^    ((?:\w+, )*\w+)  +\S", checkpoint.__doc__, re.MULTILINE)
    return {name for line in names for name in line.split(", ")}


def test_a_checkpoint_has_exactly_the_documented_keys(images, tmp_path):
    contents = run_training(images, tmp_path, "--epochs", "1", "--tensorboard", "off")
    assert contents.keys() == documented_keys() and len(documented_keys()) == 16
    assert contents["queue"].keys() == {"embeddings", "started", "filled"}
    affects = train.option_parser().affects
    assert contents["options"].keys() - set(options.REPLACED_BY_TORCHRUN) == affects.keys() | {"global_batch_size"}
    assert contents["options"]["global_batch_size"] == 4 and contents["recovered"] == []
    assert_same(torch.load(tmp_path / "checkpoints" / "ckp-1.pth"), contents)


def test_user_options_are_what_the_user_set_as_far_as_it_changes_what_is_learned(images, tmp_path):
    contents = run_training(images, tmp_path, "--epochs", "1")
    affects = train.option_parser().affects
    given = {word.removeprefix("--") for word in TINY if word.startswith("--")} | {"data_path"}
    expected = {name: contents["options"][name] for name in given if affects[name] != "nothing"}
    assert expected.items() <= contents["user_options"].items() and len(expected) > 20
    assert not contents["user_options"].keys() & {"blur_sigma", "crops_for_assign", "sync_bn"}  # from the images
    assert not contents["user_options"].keys() & {name for name, kind in affects.items() if kind == "nothing"}


def test_an_interruption_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pth"
    checkpoint.write({"epoch": 1}, path)

    def interrupted(contents, file):
        file.write(b"half a file")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "save", interrupted)
        checkpoint.write({"epoch": 2}, path)
    assert checkpoint.load(path) == {"epoch": 1}
    checkpoint.write({"epoch": 2}, path, tmp_path / "previous.pth")
    assert checkpoint.load(path) == {"epoch": 2} and checkpoint.load(tmp_path / "previous.pth") == {"epoch": 1}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["checkpoint.pth", "previous.pth"]


@pytest.mark.parametrize("damage", ["flipped bit", "truncated", "empty", "text"])
def test_a_damaged_file_is_found_by_its_checksums(damage, tmp_path):
    path = tmp_path / "checkpoint.pth"
    checkpoint.write({"weights": torch.arange(1000)}, path)
    assert checkpoint.find_damage(path) is None
    content = bytearray(path.read_bytes())
    if damage == "flipped bit":
        content[content.index(torch.arange(1000).numpy().tobytes()) + 4000] ^= 1
    changed = {"flipped bit": content, "truncated": content[:-100], "empty": b"", "text": b"half a file"}[damage]
    path.write_bytes(changed)
    assert checkpoint.find_damage(path)


def test_any_damage_to_the_directory_of_a_file_is_found_without_an_error(tmp_path):
    path = tmp_path / "checkpoint.pth"
    checkpoint.write({"epoch": 1}, path)
    whole = path.read_bytes()
    for place in range(whole.index(b"PK\1\2"), len(whole)):  # zipfile raises errors of many kinds
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        damage = checkpoint.find_damage(path)
        assert damage is None or isinstance(damage, str) and damage


def test_bytes_that_the_disk_changed_are_not_taken(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pth"
    checkpoint.write({"epoch": 1}, path)
    save = torch.save

    def damaged(contents, file):
        save(contents, file)
        file.seek(file.tell() - 50)
        file.write(b"x" * 20)

    monkeypatch.setattr(torch, "save", damaged)
    with pytest.raises(OSError, match="read back differs"):
        checkpoint.write({"epoch": 2}, path)
    assert checkpoint.load(path) == {"epoch": 1} and [file.name for file in tmp_path.iterdir()] == ["checkpoint.pth"]


@pytest.mark.parametrize("newest", ["damaged", "missing"])
def test_a_damaged_or_missing_checkpoint_gives_way_to_the_previous_one(newest, images, tmp_path, capsys):
    straight = run_training(images, tmp_path / "straight", "--log_freq", "1")
    assert straight["queue"]["filled"] == 8
    (tmp_path / "run").mkdir()
    shutil.copy(tmp_path / "straight" / "metrics.jsonl", tmp_path / "run")  # also has rows of epochs 3 and 4
    content = (tmp_path / "straight" / "checkpoint.pth").read_bytes()
    shutil.copy(tmp_path / "straight" / "checkpoints" / "ckp-2.pth", tmp_path / "run" / "checkpoint_previous.pth")
    if newest == "damaged":
        (tmp_path / "run" / "checkpoint.pth").write_bytes(content[: len(content) // 2])
    capsys.readouterr()
    resumed = run_training(images, tmp_path / "run", "--log_freq", "1")  # two and two epochs equal four
    out = capsys.readouterr().out
    reason = "missing" if newest == "missing" else "cannot resume from .*"
    kept = "" if newest == "missing" else "; the damaged file is now checkpoint_damaged.pth"
    assert (
        len(re.findall(f"^warning: .*{reason}; using .*_previous.pth, the state after step 4{kept}$", out, re.M)) == 1
    )
    assert "2 of 4 epochs done" in out
    straight["options"].pop("dump_path"), resumed["options"].pop("dump_path")
    assert_same(resumed, straight)
    assert without_times(tmp_path / "run") == without_times(tmp_path / "straight")


def test_a_damaged_checkpoint_never_takes_the_place_of_the_only_whole_one(images, tmp_path, monkeypatch):
    run_training(images, tmp_path, "--epochs", "2")
    newest, previous = tmp_path / "checkpoint.pth", tmp_path / "checkpoint_previous.pth"
    newest.write_bytes(newest.read_bytes()[:-100])
    damaged, replace = newest.read_bytes(), os.replace

    def killed_once_it_has_a_name(source, target):
        replace(source, target)
        if target in (newest, previous):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed_once_it_has_a_name)
        patch.setattr(threading, "excepthook", lambda _: None)
        with pytest.raises(RunStopped):
            run_training(images, tmp_path, "--epochs", "2")
    assert checkpoint.find(tmp_path)["epoch"] == 2
    assert checkpoint.find_damage(newest) is None and checkpoint.load(previous)["epoch"] == 1
    assert (tmp_path / "checkpoint_damaged.pth").read_bytes() == damaged


def test_a_run_without_a_whole_checkpoint_is_refused_and_kept(images, tmp_path):
    for name in ("checkpoint.pth", "checkpoint_previous.pth"):
        (tmp_path / name).write_bytes(b"half a file")
        with pytest.raises(UserError, match="--dump_path: cannot resume from .*checkpoint.pth"):
            run_training(images, tmp_path)
        assert (tmp_path / name).read_bytes() == b"half a file"


@pytest.mark.parametrize("contents", [{"state_dict": {}}, [1, 2], {"epoch": 1, "state_dict": {}}])
def test_a_file_that_is_no_checkpoint_of_train_is_refused(contents, tmp_path):
    torch.save(contents, tmp_path / "checkpoint.pth")
    with pytest.raises(UserError, match="^it is not a checkpoint of train.py"):
        checkpoint.load_run(tmp_path / "checkpoint.pth")


# Resume


def test_a_resumed_run_in_parts_equals_a_straight_one_and_refuses_other_parts(images, tmp_path):
    words = ["--accumulate", "2", "--checkpoint_activations"]
    straight = run_training(images, tmp_path / "straight", *words)
    (tmp_path / "resumed").mkdir()
    shutil.copy(tmp_path / "straight" / "checkpoints" / "ckp-2.pth", tmp_path / "resumed" / "checkpoint.pth")
    with pytest.raises(UserError, match="an unfinished run with other options .accumulate 2 -> 1."):
        run_training(images, tmp_path / "resumed")
    resumed = run_training(images, tmp_path / "resumed", *words[:2])  # activations may be kept or not
    for key in ("state_dict", "optimizer", "queue", "rng", "guard"):
        assert_same(resumed[key], straight[key])


def test_a_finished_run_is_left_alone(images, tmp_path, capsys):
    before = run_training(images, tmp_path)
    after = run_training(images, tmp_path)
    assert "4 of 4 epochs done" in capsys.readouterr().out
    assert_same(after, before)
    with pytest.raises(UserError, match="--dump_path: .* finished run with other options .*seed 31 -> 5"):
        run_training(images, tmp_path, "--seed", "5")


def test_two_processes_train_and_resume_on_two_and_on_one(images, tmp_path, capsys):
    folders = straight, twice, once = [tmp_path / name for name in ("straight", "twice", "once")]
    command = [ROOT / "train.py", *TINY, f"--data_path={images}", "--queue_length", "16", "--batch_size", "2"]
    done = torchrun(2, *command, "--dump_path", straight)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("options: ") == 1 and "2 processes (gloo)" in done.stdout
    half = torch.load(straight / "checkpoints" / "ckp-2.pth")
    assert half["epoch"] == 2 and half["queue"]["embeddings"].shape == (2, 16, 8) and half["queue"]["filled"] == 8
    for folder in folders[1:]:
        folder.mkdir()
        shutil.copy(straight / "checkpoints" / "ckp-2.pth", folder / "checkpoint.pth")
    assert forked_ranks(2, *command, "--dump_path", twice).returncode == 0
    whole, resumed = load(straight), load(twice)
    whole["options"].pop("dump_path"), resumed["options"].pop("dump_path")
    assert_same(resumed, whole)

    alone = run_training(images, once, "--epochs", "3", "--queue_length", "16")  # the global batch is as before
    assert "2 of 3 epochs done\n" in capsys.readouterr().out
    assert alone["step"] == 6 and alone["queue"]["filled"] == 16
    assert_same(run_training(images, twice, "--queue_length", "16")["state_dict"], resumed["state_dict"])
    with pytest.raises(UserError, match="finished run with other options .global_batch_size 4 -> 2"):
        run_training(images, twice, "--queue_length", "16", "--batch_size", "2")
    # The batches of the resumed epoch lie in front of those of the two processes.
    assert torch.equal(alone["queue"]["embeddings"][:, 8:], half["queue"]["embeddings"][:, :8])


def test_a_changed_number_of_steps_and_another_queue_are_logged(images, tmp_path, capsys):
    run_training(images, tmp_path, "--epochs", "1")
    changed = ["--epochs", "2", "--batch_size", "2", "--queue_length", "0"]
    with pytest.raises(
        UserError, match="unfinished run with other options .*--dump_path, add --resume_anyway .*delete"
    ):
        run_training(images, tmp_path, *changed)
    run_training(images, tmp_path, *changed, "--resume_anyway")
    out = capsys.readouterr().out
    assert "steps per epoch: now 5, before 2" in out
    assert "--queue_length: now 0 for 2 assigning crops, before 8 for 2: the queue starts empty" in out


def test_a_checkpoint_of_another_architecture_is_refused(images, tmp_path):
    run_training(images, tmp_path, "--epochs", "1")
    with pytest.raises(UserError, match="--dump_path: .* another architecture .*width 8 -> 16"):
        run_training(images, tmp_path, "--width", "16", "--epochs", "2")


# Resume from any step


STEPS = ["--batch_size", "2", "--epochs", "3", "--log_freq", "2", "--queue_length", "6"]  # 3 epochs of 5 steps


@pytest.fixture(scope="session")
def straight(images, tmp_path_factory):
    """A run of 15 steps that nothing disturbs: its folder."""
    dump = tmp_path_factory.mktemp("straight")
    run_training(images, dump, *STEPS)
    return dump


def assert_as_straight(dump, straight) -> None:
    contents, expected = load(dump), load(straight)
    for named in (contents["options"], expected["options"]):
        for name in ("dump_path", "workers", "checkpoint_minutes"):
            named.pop(name)
    assert_same(contents, expected)
    assert without_times(dump) == without_times(straight)


def stop_after(monkeypatch, steps: int, name: str = "SIGTERM") -> None:
    """Let a signal come after so many steps of the next run."""
    calls = count(1)

    @contextmanager
    def signals():
        yield lambda: name if next(calls) >= steps else None

    monkeypatch.setattr(launch, "stop_signals", signals)


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize("stops", [(1, 1), (4, 1), (3, 3, 6)])
def test_a_run_stopped_after_any_step_ends_as_one_that_was_not(stops, workers, images, straight, tmp_path, monkeypatch):
    if workers == "2" and stops != (3, 3, 6):
        pytest.skip("one case with workers is enough")
    done = 0
    for steps in stops:
        stop_after(monkeypatch, steps)
        done += steps
        with pytest.raises(RunStopped, match=f"SIGTERM: stopped after step {done}, saved in ") as stopped:
            run_training(images, tmp_path, *STEPS, "--workers", workers)
        assert stopped.value.code == 143 and load(tmp_path)["step"] == done
    stop_after(monkeypatch, 100)
    run_training(images, tmp_path, *STEPS, "--workers", workers)
    assert_as_straight(tmp_path, straight)


@pytest.mark.parametrize("steps, before, batch_size, now", [(4, 5, "4", 2), (1, 2, "2", 5)])
def test_a_first_epoch_begins_again_with_another_batch(
    steps, before, batch_size, now, images, tmp_path, monkeypatch, capsys
):
    first = {5: "2", 2: "4"}[before]
    stop_after(monkeypatch, steps)
    with pytest.raises(RunStopped, match=f"stopped after step {steps}"):
        run_training(images, tmp_path, "--queue_length", "0", "--batch_size", first)
    stop_after(monkeypatch, 100)
    words = ["--queue_length", "0", "--batch_size", batch_size, "--epochs", "2", "--resume_anyway"]
    contents = run_training(images, tmp_path, *words)
    out = capsys.readouterr().out
    assert f"steps per epoch: now {now}, before {before}" in out and "0 of 2 epochs done\n" in out
    assert contents["step"] == 2 * now
    assert [row["step"] for row in without_times(tmp_path) if "epoch_loss" in row] == [now, 2 * now]


def test_saves_within_an_epoch_and_keeps_the_last_two(images, straight, tmp_path, monkeypatch):
    seen, write = [], checkpoint.write

    def watched(contents, path, previous=None):
        write(contents, path, previous)
        seen.append((contents["epoch"], contents["step"], contents["step_of_epoch"], len(contents["losses"])))
        if previous.exists():
            assert load(tmp_path)["step"] == seen[-1][1] and torch.load(previous)["step"] == seen[-2][1]

    monkeypatch.setattr(checkpoint, "write", watched)
    run_training(images, tmp_path, *STEPS, "--checkpoint_minutes", "1e-9")
    within = [(epoch, 5 * epoch + i, i, i) for epoch in range(3) for i in range(1, 5)]
    assert seen == sorted(within + [(epoch, 5 * epoch, 0, 0) for epoch in (1, 2, 3)])
    assert_as_straight(tmp_path, straight)
    assert sorted(path.name for path in tmp_path.glob("**/*.pth")) == [
        *("checkpoint.pth", "checkpoint_previous.pth", "ckp-2.pth", "ckp-3.pth")
    ]


def test_a_run_killed_while_it_writes_resumes_exactly(images, straight, tmp_path):
    words = [*TINY, *STEPS, f"--data_path={images}", f"--dump_path={tmp_path}", "--checkpoint_minutes", "1e-9"]
    (tmp_path / "main.py").write_text(
        "import os, signal, sys, checkpoint, torch, train\n"
        "fsync, calls = os.fsync, []\n"
        "def killed(file):\n"  # at its n-th call: a file that is written but has no name yet, or a folder
        "    calls.append(1)\n"
        "    if len(calls) == int(sys.argv[1]):\n"
        "        os.truncate(file, 5000) if sys.argv[1] == '7' else None\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    fsync(file)\n"
        "os.fsync = killed\n"
        "if __name__ == '__main__': train.main(train.parse_args(sys.argv[2:]))\n"
    )
    for moment in (7, 6):
        done = script(sys.executable, tmp_path / "main.py", moment, *words, PYTHONPATH=str(ROOT))
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert load(tmp_path)["step"] > 0
    run_training(images, tmp_path, *STEPS)
    (tmp_path / "main.py").unlink()
    assert_as_straight(tmp_path, straight)
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("before, after", [(2, 1), (1, 2)])
def test_another_number_of_processes_resumes_within_an_epoch(before, after, images, tmp_path):
    others = ["--batch_size", "4", "--epochs", "2", "--log_freq", "1", "--queue_length", "8"]
    run_training(images, tmp_path / "straight", *others)
    command = [ROOT / "train.py", *TINY, f"--data_path={images}", f"--dump_path={tmp_path / 'run'}", *others]
    for processes, part in ((before, ["--checkpoint_minutes", "1e-9"]), (after, [])):
        words = [*command, *part, "--batch_size", 4 // processes]
        if part:  # until the first of two steps is saved, then as after a SIGKILL
            words += ["--epochs", "2", "--checkpoint_freq", "1"]
        done = forked_ranks(processes, *words)
        assert done.returncode == 0, done.stderr
        if part:
            contents = torch.load(tmp_path / "run" / "checkpoint_previous.pth")
            assert contents["step_of_epoch"] == 1 and len(contents["losses"]) == 1
            shutil.copy(tmp_path / "run" / "checkpoint_previous.pth", tmp_path / "run" / "checkpoint.pth")
    ours, expected = without_times(tmp_path / "run"), without_times(tmp_path / "straight")
    assert [row["step"] for row in ours] == [row["step"] for row in expected]
    for row, other in zip(ours, expected, strict=True):
        key = "loss" if "loss" in row else "epoch_loss"
        assert row[key] == pytest.approx(other[key], rel=1e-3)
    queues = [load(tmp_path / name)["queue"]["embeddings"] for name in ("run", "straight")]
    torch.testing.assert_close(*queues, rtol=1e-2, atol=1e-2)


# An error while a checkpoint is written


def fail_in_the_second_epoch(error: BaseException, write, images, dump, monkeypatch) -> None:
    """Train until an error in the first step after the first save. write: in the place of checkpoint.write."""
    place, calls = train.crops_to_device, count(1)

    def place_or_fail(*args, **options):
        if next(calls) == 3:  # an epoch has two steps
            raise error
        return place(*args, **options)

    monkeypatch.setattr(train, "crops_to_device", place_or_fail)
    monkeypatch.setattr(checkpoint, "write", write)
    with pytest.raises(type(error)):
        run_training(images, dump)


def test_an_error_lets_the_write_that_is_under_way_end(images, tmp_path, monkeypatch):
    write = checkpoint.write

    def slow(*args):
        time.sleep(0.5)
        write(*args)
        assert (tmp_path / "run.lock").exists()

    fail_in_the_second_epoch(RuntimeError("out of memory"), slow, images, tmp_path, monkeypatch)
    assert load(tmp_path)["epoch"] == 1 and not (tmp_path / "run.lock").exists()


@pytest.mark.parametrize("error, is_said", [(RuntimeError(), True), (KeyboardInterrupt(), False)])
def test_a_write_that_hangs_does_not_keep_a_run_from_ending(error, is_said, images, tmp_path, monkeypatch, capsys):
    released = threading.Event()
    monkeypatch.setattr(checkpoint, "WRITE_SECONDS", 0.1 if is_said else 1000)
    fail_in_the_second_epoch(error, lambda *_: released.wait(100), images, tmp_path, monkeypatch)
    assert ("the newest state is not saved: the disk took more than" in capsys.readouterr().out) == is_said
    released.set()
    (writing,) = [thread for thread in threading.enumerate() if thread.name == checkpoint.WRITER]
    writing.join()
    assert not (tmp_path / "run.lock").exists()


# A full disk


def test_a_full_disk_ends_no_run_but_is_exit_code_3_at_its_end(images, tmp_path, monkeypatch, capsys):
    save, fails = torch.save, [False, True, False, True]  # epochs

    def full(contents, file):
        save({"part": torch.zeros(10)}, file)
        if fails.pop(0):
            raise OSError(errno.ENOSPC, "No space left on device")
        file.seek(0), file.truncate()
        save(contents, file)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(RunStopped, match="complete, but its last state is not saved .*No space left") as stopped:
        run_training(images, tmp_path)
    assert stopped.value.code == 3 and not list(tmp_path.glob("**/*.tmp"))
    out = capsys.readouterr().out
    assert (
        len(
            re.findall("^warning: the state after step . is not saved .* No space left on device; training ", out, re.M)
        )
        == 2
    )
    assert load(tmp_path)["epoch"] == 3
    monkeypatch.undo()
    assert run_training(images, tmp_path)["epoch"] == 4


def test_a_run_stopped_on_a_full_disk_is_exit_code_3(images, tmp_path, monkeypatch):
    def full(contents, file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    stop_after(monkeypatch, 1)
    message = "SIGTERM: stopped after step 1, but its last state is not saved .*No space left"
    with pytest.raises(RunStopped, match=message) as stopped:
        run_training(images, tmp_path)
    assert stopped.value.code == 3


def test_a_write_that_ends_with_a_bug_is_exit_code_3(images, tmp_path, monkeypatch):
    def buggy(contents, file):
        raise TypeError("this is a bug")

    seen = []
    monkeypatch.setattr(torch, "save", buggy)
    monkeypatch.setattr(threading, "excepthook", lambda error: seen.append(error.exc_type))
    with pytest.raises(
        RunStopped, match="complete, but its last state is not saved .*: see the error above"
    ) as stopped:
        run_training(images, tmp_path, "--epochs", "1")
    assert stopped.value.code == 3 and seen == [TypeError]


def test_the_size_limit_of_files_is_a_full_disk_too(images, tmp_path):
    words = " ".join(map(str, [*TINY, f"--data_path={images}", f"--dump_path={tmp_path}"]))
    done = script("bash", "-c", f"ulimit -f 40; exec {sys.executable} {ROOT / 'train.py'} {words}")
    assert done.returncode == 3, done.stderr
    assert "is not saved" in done.stdout and "File too large" in done.stdout and "Traceback" not in done.stderr
    assert not list(tmp_path.glob("**/*.tmp")) and not list(tmp_path.glob("**/*.pth"))


def test_a_run_with_other_images_is_refused(images, tmp_path, capsys):
    run_training(images, tmp_path / "run", "--epochs", "1")
    shutil.copytree(images, tmp_path / "copy")
    run_training(tmp_path / "copy", tmp_path / "run", "--epochs", "2")  # a folder may move
    image = tmp_path / "copy" / "train" / "cats" / "0.png"
    image.rename(image.with_name("renamed.png"))
    with pytest.raises(UserError, match=r"unfinished run with other options \(images 10 \(.*\) -> 10 \("):
        run_training(tmp_path / "copy", tmp_path / "run", "--epochs", "3")
    run_training(tmp_path / "copy", tmp_path / "run", "--epochs", "3", "--resume_anyway")
    with pytest.raises(UserError, match="finished run with other options .*images 10"):
        run_training(images, tmp_path / "run", "--epochs", "3")


# Compare and inherit options


def test_options_are_compared_by_what_they_affect():
    affects = train.option_parser().affects
    before = dict.fromkeys(affects, 1) | {"global_batch_size": 8}
    contents = {"options": before}
    for name, kind in affects.items():
        changes = checkpoint.changed_options(before | {name: 2}, contents, affects)
        # The batch per process does not matter, but that over all processes does.
        is_compared = kind != "nothing" and name != "batch_size"
        assert changes == ({name: (1, 2)} if is_compared else {}), name
    assert checkpoint.changed_options(before | {"global_batch_size": 4}, contents, affects) == {
        "global_batch_size": (8, 4)
    }
    assert {name for name, kind in affects.items() if kind == "nothing"} == {
        *("max_bad_images", "device", "workers", "augment", "cache", "compile", "checkpoint_activations"),
        *("dump_path", "checkpoint_freq", "checkpoint_minutes", "log_freq", "eval_every", "tensorboard"),
        *("on_collapse", "resume_anyway", "replay", "use_fp16"),
    }
    older = {"options": before | {"precision": None}}  # which did not keep what the device had
    assert checkpoint.changed_options(before | {"precision": "bf16"}, older, affects) == {}
    assert {name for name, kind in affects.items() if kind == "model"} == {
        *("arch", "width", "blocks", "stem", "hidden_mlp", "feat_dim", "nmb_prototypes")
    }


def test_a_run_resumes_in_its_precision_however_that_is_written(images, tmp_path):
    dump = tmp_path / "run"
    contents = run_training(images, dump, "--epochs", "1", "--use_fp16", "false", "--precision", "fp32")
    assert contents["options"]["precision"] == "fp32"
    with pytest.raises(UserError, match="finished run with other options .precision fp32 -> bf16"):
        run_training(images, dump, "--epochs", "2", "--precision", "bf16")
    assert run_training(images, dump, "--epochs", "2")["epoch"] == 2  # with --precision fp32 alone


def test_the_precision_of_the_device_is_kept(images, tmp_path, monkeypatch):
    words = [word for word in TINY if word not in ("--precision", "fp32")]
    for is_supported in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda found=is_supported: found)
        dump = tmp_path / str(is_supported)
        train.main(train.parse_args([*words, f"--data_path={images}", f"--dump_path={dump}", "--epochs", "1"]))
        options = torch.load(dump / "checkpoint.pth", weights_only=True)["options"]
        assert options["precision"] == ("bf16" if is_supported else "fp32")
    # Without the option a run keeps its precision, also where the device would choose another one.
    train.main(train.parse_args([*words, f"--data_path={images}", f"--dump_path={tmp_path / 'True'}", "--epochs", "2"]))
    contents = torch.load(tmp_path / "True" / "checkpoint.pth", weights_only=True)
    assert (contents["options"]["precision"], contents["epoch"]) == ("bf16", 2)


def test_options_that_affect_nothing_may_change_and_others_are_reported(images, tmp_path, capsys):
    run_training(images, tmp_path / "a", "--epochs", "1")
    shutil.move(tmp_path / "a", tmp_path / "b")  # another --dump_path
    capsys.readouterr()
    words = "--workers 1 --log_freq 7 --checkpoint_freq 9 --cache off --augment workers --compile off"
    words += " --on_collapse recover"
    run_training(images, tmp_path / "b", "--epochs", "1", *words.split())
    out = capsys.readouterr().out
    assert "1 of 1 epochs done\n" in out and "options changed" not in out
    run_training(images, tmp_path / "b", "--epochs", "2", "--temperature", "0.2", "--resume_anyway", *words.split())
    out = capsys.readouterr().out
    assert "1 of 2 epochs done\n" in out and "--resume_anyway: options changed: temperature 0.1 -> 0.2\n" in out


def test_a_resumed_run_takes_options_that_the_user_sets_now(images, tmp_path, capsys):
    run = ["--arch", "resnet18", "--width", "8", "--blocks", "1", "1", "1", "1", "--device", "cpu", "--workers", "0"]
    run += ["--data_path", str(images), "--dump_path", str(tmp_path), "--batch_size", "4"]
    train.main(train.parse_args([*run, "--epochs", "1"]))
    train.main(train.parse_args([*run, "--epochs", "2", "--wd", "0.1", "--relative_epsilon", "off", "--resume_anyway"]))
    contents = load(tmp_path)
    assert [group["weight_decay"] for group in contents["optimizer"]["param_groups"]] == [0.1]
    assert contents["options"]["epsilon"] == 0.05  # not the 0.3 of the other unit
    assert contents["options"]["crops_for_assign"] == [0, 1, 2, 3]
    assert "wd 1e-06 -> 0.1" in capsys.readouterr().out
    train.main(
        train.parse_args([*run, "--epochs", "3", "--nmb_crops", "3", "--resume_anyway"])
    )  # there is no fourth crop any more
    assert "crops_for_assign [0, 1, 2, 3] -> [0, 1, 2]" in capsys.readouterr().out


def test_without_a_batch_size_the_batch_over_all_processes_stays(images, tmp_path):
    run_training(images, tmp_path, "--batch_size", "8", "--epochs", "1")
    place = TINY.index("--batch_size")
    others = TINY[:place] + TINY[place + 2 :]
    many = [*others, "--epochs", "2", f"--data_path={images}", f"--dump_path={tmp_path}", "--resume_anyway"]
    arrays = ImageArrays(np.zeros((24, 20, 24, 3), np.uint8), np.zeros(24))
    for world_size, batch_size in ((1, 8), (2, 4), (4, 2)):
        args = train.parse_args(many)
        train.resolve_options(args, arrays, world_size, checkpoint.find(tmp_path))
        assert args.batch_size == batch_size
    for world_size in (3, 5, 8):  # BatchNorm needs two images in each
        with pytest.raises(
            UserError, match=f"{world_size} processes cannot share .* of 8 images; expected 1, 2, 4 proc"
        ):
            train.resolve_options(train.parse_args(many), arrays, world_size, checkpoint.find(tmp_path))


LARGE = ImageArrays(np.zeros((20_000, 20, 24, 3), np.uint8), np.zeros(20_000))


def resolve_large(dump, world_size: int, *words: str, earlier: dict | None = None) -> dict:
    """The settings of a run on a set whose options are those of large ones."""
    args = train.parse_args(["--dump_path", str(dump), "--base_lr", "4.8", *words])
    return train.resolve_options(args, LARGE, world_size, earlier)[0]


@pytest.fixture
def large_set(monkeypatch) -> None:
    import defaults

    monkeypatch.setattr(defaults, "LARGE_SET", 10_000)
    monkeypatch.setattr(options, "LARGE_SET", 10_000)


def as_checkpoint(settings: dict) -> dict:
    return {"epoch": 1, "step": 4, **settings}


def test_groups_of_batchnorm_that_nobody_set_follow_the_number_of_processes(large_set, tmp_path, capsys):
    earlier = as_checkpoint(resolve_large(tmp_path, 8, "--batch_size", "256"))
    assert earlier["options"]["sync_bn"] == "apex"
    capsys.readouterr()
    now = resolve_large(tmp_path, 4, "--batch_size", "512", earlier=earlier)
    assert now["options"]["sync_bn"] == "pytorch"
    assert (
        "\n--sync_bn: now pytorch, before apex: it follows the number of processes and the batch\n"
        in capsys.readouterr().out
    )
    with pytest.raises(UserError, match="other options .sync_bn apex -> pytorch."):
        resolve_large(tmp_path, 8, "--batch_size", "256", "--sync_bn", "pytorch", earlier=earlier)
    earlier = as_checkpoint(resolve_large(tmp_path, 8, "--batch_size", "256", "--sync_bn", "apex"))
    with pytest.raises(UserError, match="other options .sync_bn apex -> pytorch."):
        resolve_large(tmp_path, 4, "--batch_size", "512", earlier=earlier)


def test_a_batch_for_another_number_of_processes_is_said_how_to_write(large_set, tmp_path):
    earlier = as_checkpoint(resolve_large(tmp_path, 8, "--batch_size", "256"))
    changed = "global_batch_size 2048 -> 1024."
    with pytest.raises(UserError, match=f"{changed}; write --batch_size 512 to keep the global batch of 2048 images, "):
        resolve_large(tmp_path, 4, "--batch_size", "256", earlier=earlier)
    with pytest.raises(UserError, match="global_batch_size 2048 -> 768.; write another --dump_path"):
        resolve_large(tmp_path, 3, "--batch_size", "256", earlier=earlier)


# Checkpoints of older versions


def as_older_version(contents: dict) -> dict:
    """The same, as versions wrote it that kept `recovered` and `asked` among the options, without colour jitter."""
    names = "relative_epsilon", "epsilon", "base_lr", "final_lr", "start_warmup"
    asked = {name: contents["user_options"].get(name) for name in names}
    options = contents["options"] | {"recovered": contents["recovered"], "asked": asked}
    options.pop("color_strength"), options.pop("hflip")
    keys = "epoch", "step", "state_dict", "optimizer", "scaler", "queue"
    return {name: contents[name] for name in keys} | {"options": options}


def test_a_checkpoint_of_an_older_version_is_resumed_with_what_a_recovery_changed(images, tmp_path, collapsing):
    train_stuck(images, tmp_path / "new", "--on_collapse", "recover", base_lr=0.9)
    contents = load(tmp_path / "new")
    assert contents["recovered"] == ["relative_epsilon", "base_lr", "base_lr"]
    (tmp_path / "old").mkdir()
    torch.save(as_older_version(contents), tmp_path / "old" / "checkpoint.pth")
    for run in ("new", "old"):
        train_stuck(images, tmp_path / run, "--on_collapse", "recover", "--epochs", "12", base_lr=0.9)
    new, old = load(tmp_path / "new"), load(tmp_path / "old")
    assert old["epoch"] == 12 and old["recovered"] == contents["recovered"]
    assert old["options"]["relative_epsilon"] == "on" and old["options"]["base_lr"] == pytest.approx(0.1)
    new["options"].pop("dump_path"), old["options"].pop("dump_path")
    old.pop("guard"), new.pop("guard")  # older versions did not keep it
    assert_same(old, new)


def test_a_finished_run_of_an_older_version_is_left_alone(images, tmp_path, capsys):
    older = as_older_version(run_training(images, tmp_path, "--epochs", "1"))
    torch.save(older, tmp_path / "checkpoint.pth")
    capsys.readouterr()
    assert_same(run_training(images, tmp_path, "--epochs", "1"), older)
    out = capsys.readouterr().out
    assert "1 of 1 epochs done\n" in out and "changed after a collapse" not in out
    with pytest.raises(UserError, match="finished run with other options .base_lr 0.6 -> 0.5"):
        run_training(images, tmp_path, "--epochs", "1", "--base_lr", "0.5")


@pytest.mark.parametrize("name, mean_image, now, then", [("color_strength", 0, 0.5, 1), ("hflip", 0.4, 0, 0.5)])
def test_a_run_of_an_older_version_keeps_its_augmentation(name, mean_image, now, then, images, tmp_path, monkeypatch):
    described = dict(plain_ground=0.1, mean_image=mean_image, between_cells=0.5, mirror_images=0.9)
    monkeypatch.setattr(options, "describe_images", lambda images: described)
    contents = run_training(images, tmp_path, "--epochs", "1")
    assert contents["options"][name] == now
    torch.save(as_older_version(contents), tmp_path / "checkpoint.pth")
    assert run_training(images, tmp_path, "--epochs", "2")["options"][name] == then


# Roll back after a collapse


def test_recover_drops_the_queue_before_it_lowers_the_learning_rate_for_good(images, tmp_path, capsys, collapsing):
    words = ["--on_collapse", "recover", "--relative_epsilon", "on", "--epoch_queue_starts", "0"]
    train_stuck(images, tmp_path, *words, "--queue_length", "4", base_lr=0.9)
    out = capsys.readouterr().out
    assert "likely cause: codes separate the 4 older embeddings of --queue_length from new ones" in out
    recoveries = re.findall(r"recovering .* times\): back to (\d) epochs done, (.*)", out)
    assert recoveries[0] == ("2", "--queue_length 4 -> 0") and recoveries[1][1].startswith("--base_lr 0.9 -> 0.3")
    assert load(tmp_path)["epoch"] == 10 and load(tmp_path)["queue"]["embeddings"].shape[1] == 0
    assert load(tmp_path)["recovered"] == ["queue_length", "base_lr", "base_lr"]
    assert load(tmp_path)["user_options"]["queue_length"] == 4
    train_stuck(images, tmp_path, *words, "--queue_length", "4", "--epochs", "12", base_lr=0.9)
    contents = load(tmp_path)
    assert contents["epoch"] == 12 and contents["options"]["queue_length"] == 0
    assert contents["queue"]["embeddings"].shape[1] == 0
    assert "--queue_length 0  (changed after a collapse of this run)" in capsys.readouterr().out
    # Another queue is what the user wants now.
    train_stuck(images, tmp_path, *words, "--queue_length", "8", "--epochs", "13", "--resume_anyway", base_lr=0.9)
    assert load(tmp_path)["options"]["queue_length"] == 8


def test_recover_keeps_a_collapsed_run_that_has_no_good_epoch(images, tmp_path, capsys):
    train_stuck(images, tmp_path, "--epochs", "5")
    train_stuck(images, tmp_path, "--on_collapse", "recover")
    out = capsys.readouterr().out
    assert "back to 0 epochs done, " in out and "collapsed-1.pth" in out
    kept = torch.load(tmp_path / "collapsed-1.pth")
    assert kept["epoch"] >= 5
    args = train.parse_args(["--dump_path", str(tmp_path), *STUCK.format(images=images).split()])
    args.base_lr = args.final_lr = args.start_warmup = 0.1
    newest = load(tmp_path)["epoch"]
    train.recover(args, {"options": {**vars(args)}, "user_options": {}, "recovered": []})
    assert torch.load(tmp_path / "collapsed-1.pth")["epoch"] == kept["epoch"]
    assert torch.load(max(tmp_path.glob("collapsed-*.pth")))["epoch"] == newest


def test_recover_does_not_use_the_good_epoch_of_an_earlier_run(images, tmp_path, capsys):
    (tmp_path / "last_good.pth").write_text("left over from a run whose checkpoint was deleted")
    train_stuck(images, tmp_path, "--on_collapse", "recover")
    out = capsys.readouterr().out
    assert "back to 0 epochs done, --relative_epsilon off -> on" in out
    assert load(tmp_path)["epoch"] == 10
