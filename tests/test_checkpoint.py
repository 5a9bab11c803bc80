"""checkpoint.py: saving, loading and resuming runs, comparing options, rolling back after a collapse, the log."""

import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, STUCK, TINY, assert_same, run_training, torchrun, train_stuck

import checkpoint
import train
from images import ImageArrays
from launch import UserError


def load(dump) -> dict:
    return torch.load(dump / "checkpoint.pth")


# Write and read


def documented_keys() -> set[str]:
    names = re.findall(r"^    ((?:\w+, )*\w+)  +\S", checkpoint.__doc__, re.MULTILINE)
    return {name for line in names for name in line.split(", ")}


def test_a_checkpoint_has_exactly_the_documented_keys(images, tmp_path):
    contents = run_training(images, tmp_path, "--epochs", "1", "--tensorboard", "off")
    assert contents.keys() == documented_keys() and len(documented_keys()) == 9
    assert contents["queue"].keys() == {"embeddings", "started", "filled"}
    affects = train.option_parser().affects
    assert contents["options"].keys() - set(train.REPLACED_BY_TORCHRUN) == affects.keys() | {"global_batch_size"}
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


def test_an_interruption_while_saving_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pth"
    checkpoint.save({"epoch": 1}, path)

    def interrupted(contents, path):
        path.write_bytes(b"half a file")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "save", interrupted)
        checkpoint.save({"epoch": 2}, path)
    assert checkpoint.load(path) == {"epoch": 1}
    checkpoint.save({"epoch": 2}, path)
    assert checkpoint.load(path) == {"epoch": 2} and [file.name for file in tmp_path.iterdir()] == ["checkpoint.pth"]


def test_an_unreadable_checkpoint_is_refused_and_kept(images, tmp_path):
    (tmp_path / "checkpoint.pth").write_bytes(b"half a file")
    with pytest.raises(UserError, match="--dump_path: cannot resume from .*checkpoint.pth"):
        run_training(images, tmp_path)
    assert (tmp_path / "checkpoint.pth").read_bytes() == b"half a file"


@pytest.mark.parametrize("contents", [{"state_dict": {}}, [1, 2], {"epoch": 1, "state_dict": {}}])
def test_a_file_that_is_no_checkpoint_of_train_is_refused(contents, tmp_path):
    torch.save(contents, tmp_path / "checkpoint.pth")
    with pytest.raises(UserError, match="^--dump_path: cannot resume from .*pth: it is not a checkpoint of train.py"):
        checkpoint.load_run(tmp_path / "checkpoint.pth")


# Resume


def test_two_and_two_resumed_epochs_equal_four(images, tmp_path, capsys):
    straight = run_training(images, tmp_path / "straight", "--log_freq", "1")
    assert straight["queue"]["filled"] == 8
    (tmp_path / "resumed").mkdir()
    shutil.copy(tmp_path / "straight" / "checkpoints" / "ckp-2.pth", tmp_path / "resumed" / "checkpoint.pth")
    shutil.copy(tmp_path / "straight" / "metrics.jsonl", tmp_path / "resumed")  # also has rows of epochs 3 and 4
    resumed = run_training(images, tmp_path / "resumed", "--log_freq", "1")
    assert "2 of 4 epochs done" in capsys.readouterr().out
    straight["options"].pop("dump_path"), resumed["options"].pop("dump_path")
    assert_same(resumed, straight)
    kept = [[json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
            for run in ("straight", "resumed")]  # fmt: skip
    assert [row["step"] for row in kept[1]] == [row["step"] for row in kept[0]]


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
    assert torchrun(2, *command, "--dump_path", twice).returncode == 0
    whole, resumed = load(straight), load(twice)
    whole["options"].pop("dump_path"), resumed["options"].pop("dump_path")
    assert_same(resumed, whole)

    alone = run_training(images, once, "--epochs", "3", "--queue_length", "16")
    # The global batch is as large as before, so only epochs differ.
    assert "options changed: epochs 4 -> 3\n" in capsys.readouterr().out
    assert alone["step"] == 6 and alone["queue"]["filled"] == 16
    assert_same(run_training(images, twice, "--queue_length", "16")["state_dict"], resumed["state_dict"])
    with pytest.raises(UserError, match="finished run with other options .global_batch_size 4 -> 2"):
        run_training(images, twice, "--queue_length", "16", "--batch_size", "2")
    # Two processes learn the same as one: BatchNorm uses the images of both.
    run_training(images, tmp_path / "one", "--queue_length", "16")
    losses, expected = (
        [row["epoch_loss"] for row in map(json.loads, (folder / "metrics.jsonl").open()) if "epoch_loss" in row]
        for folder in (straight, tmp_path / "one")
    )
    assert losses == pytest.approx(expected, rel=1e-3) and len(losses) == 4
    # The batches of the resumed epoch lie in front of those of the two processes.
    assert torch.equal(alone["queue"]["embeddings"][:, 8:], half["queue"]["embeddings"][:, :8])


def test_a_changed_number_of_steps_and_another_queue_are_logged(images, tmp_path, capsys):
    run_training(images, tmp_path, "--epochs", "1")
    run_training(images, tmp_path, "--epochs", "2", "--batch_size", "2", "--queue_length", "0")
    out = capsys.readouterr().out
    assert "steps per epoch: now 5, before 2" in out
    assert "--queue_length: now 0 for 2 assigning crops, before 8 for 2: the queue starts empty" in out


def test_a_checkpoint_of_another_architecture_is_refused(images, tmp_path):
    run_training(images, tmp_path, "--epochs", "1")
    with pytest.raises(UserError, match="--dump_path: .* another architecture .*width 8 -> 16"):
        run_training(images, tmp_path, "--width", "16", "--epochs", "2")


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
        *("max_bad_images", "device", "workers", "augment", "cache", "compile"),
        *("dump_path", "checkpoint_freq", "log_freq", "eval_every", "tensorboard", "on_collapse"),
    }
    assert {name for name, kind in affects.items() if kind == "model"} == {
        *("arch", "width", "blocks", "stem", "hidden_mlp", "feat_dim", "nmb_prototypes")
    }


def test_options_that_affect_nothing_may_change_and_others_are_reported(images, tmp_path, capsys):
    run_training(images, tmp_path / "a", "--epochs", "1")
    shutil.move(tmp_path / "a", tmp_path / "b")  # another --dump_path
    capsys.readouterr()
    words = "--workers 1 --log_freq 7 --checkpoint_freq 9 --cache off --augment workers --compile off"
    words += " --on_collapse recover"
    run_training(images, tmp_path / "b", "--epochs", "1", *words.split())
    out = capsys.readouterr().out
    assert "1 of 1 epochs done\n" in out and "options changed" not in out
    run_training(images, tmp_path / "b", "--epochs", "2", "--temperature", "0.2", *words.split())
    assert "1 of 2 epochs done; options changed: " in (out := capsys.readouterr().out)
    assert "temperature 0.1 -> 0.2" in out and "epochs 1 -> 2" in out and "workers 0 -> 1" not in out


def test_a_resumed_run_takes_options_that_the_user_sets_now(images, tmp_path, capsys):
    run = ["--arch", "resnet18", "--width", "8", "--blocks", "1", "1", "1", "1", "--device", "cpu", "--workers", "0"]
    run += ["--data_path", str(images), "--dump_path", str(tmp_path), "--batch_size", "4"]
    train.main(train.parse_args([*run, "--epochs", "1"]))
    train.main(train.parse_args([*run, "--epochs", "2", "--wd", "0.1", "--relative_epsilon", "off"]))
    contents = load(tmp_path)
    assert [group["weight_decay"] for group in contents["optimizer"]["param_groups"]] == [0.1]
    assert contents["options"]["epsilon"] == 0.05  # not the 0.3 of the other unit
    assert contents["options"]["crops_for_assign"] == [0, 1, 2, 3]
    assert "wd 1e-06 -> 0.1" in capsys.readouterr().out
    train.main(train.parse_args([*run, "--epochs", "3", "--nmb_crops", "3"]))  # there is no fourth crop any more
    assert "crops_for_assign [0, 1, 2, 3] -> [0, 1, 2]" in capsys.readouterr().out


def test_without_a_batch_size_the_batch_over_all_processes_stays(images, tmp_path):
    run_training(images, tmp_path, "--batch_size", "8", "--epochs", "1")
    place = TINY.index("--batch_size")
    others = TINY[:place] + TINY[place + 2 :]
    for world_size, batch_size in ((1, 8), (2, 4), (4, 2), (3, 4)):  # 3 processes cannot share 8 images
        args = train.parse_args([*others, "--epochs", "2", f"--data_path={images}", f"--dump_path={tmp_path}"])
        train.resolve_options(args, ImageArrays(np.zeros((24, 20, 24, 3), np.uint8), np.zeros(24)), world_size)
        assert args.batch_size == batch_size


# Checkpoints of older versions


def as_older_version(contents: dict) -> dict:
    """The same, as versions wrote it that kept `recovered` and `asked` among the options and had no color_strength."""
    names = "relative_epsilon", "epsilon", "base_lr", "final_lr", "start_warmup"
    asked = {name: contents["user_options"].get(name) for name in names}
    options = contents["options"] | {"recovered": contents["recovered"], "asked": asked}
    options.pop("color_strength")
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


def test_a_run_of_an_older_version_keeps_its_colour_jitter(images, tmp_path, monkeypatch):
    photographs = dict(plain_ground=0.1, mean_image=0.0, between_cells=0.5)
    monkeypatch.setattr(train, "describe_images", lambda images: photographs)
    contents = run_training(images, tmp_path, "--epochs", "1")
    assert contents["options"]["color_strength"] == 0.5
    torch.save(as_older_version(contents), tmp_path / "checkpoint.pth")
    assert run_training(images, tmp_path, "--epochs", "2")["options"]["color_strength"] == 1


# Roll back after a collapse


def test_a_queue_that_a_recovery_dropped_stays_dropped(images, tmp_path, capsys, collapsing):
    words = ["--on_collapse", "recover", "--relative_epsilon", "on", "--epoch_queue_starts", "0"]
    train_stuck(images, tmp_path, *words, "--queue_length", "4", base_lr=0.9)
    assert load(tmp_path)["recovered"] == ["queue_length", "base_lr", "base_lr"]
    assert load(tmp_path)["user_options"]["queue_length"] == 4
    capsys.readouterr()
    train_stuck(images, tmp_path, *words, "--queue_length", "4", "--epochs", "12", base_lr=0.9)
    contents = load(tmp_path)
    assert contents["epoch"] == 12 and contents["options"]["queue_length"] == 0
    assert contents["queue"]["embeddings"].shape[1] == 0
    assert "--queue_length 0  (changed after a collapse of this run)" in capsys.readouterr().out
    # Another queue is what the user wants now.
    train_stuck(images, tmp_path, *words, "--queue_length", "8", "--epochs", "13", base_lr=0.9)
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


# Log


def new_log(dump, epochs_done: int = 0) -> checkpoint.RunLog:
    """Of a run of 2 epochs of 3 steps, with a line after every second step."""
    options = dict(steps_per_epoch=3, images_per_step=4, log_freq=2, ln_k=1.0, device=torch.device("cpu"))
    return checkpoint.RunLog(dump, epochs=2, epochs_done=epochs_done, **options)


def test_lines_are_due_at_the_first_step_each_log_freq_and_the_end_of_an_epoch(tmp_path, capsys):
    for epochs_done, expected in ((0, {0: [0, 1, 2], 1: [4, 5]}), (1, {1: [3, 4, 5]})):
        run_log = new_log(tmp_path, epochs_done)
        for epoch in range(epochs_done, 2):
            due = []
            for step, batch in run_log.timed_steps(epoch, iter("abc")):
                assert batch == "abc"[step % 3] and run_log.record_loss(torch.tensor(float(step)))
                if run_log.line_is_due:
                    due.append(step)
                    row = run_log.log_step({"more": 0.5}, lr=0.1)
                    previous = due[-2] if len(due) > 1 else 3 * epoch - 1
                    assert row["loss"] == sum(range(previous + 1, step + 1)) / (step - previous)
                    assert (row["epoch"], row["step"]) == (epoch + 1, step + 1)
                    assert (row["lr"], row["more"], row["ln_k"]) == (0.1, 0.5, 1.0)
            assert due == expected[epoch] and run_log.epoch_loss == 3 * epoch + 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_found(bad, tmp_path):
    run_log = new_log(tmp_path)
    found = [run_log.record_loss(torch.tensor(bad if s == 1 else 1.0)) for s, _ in run_log.timed_steps(0, iter("abc"))]
    assert found == [True, False, True]


def test_rows_of_later_epochs_and_half_written_rows_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"epoch": 1, "step": 3}\n{"epoch": 2, "step": 4}\n{"epoch": 1, "st{"epoch": 1}\n{"epoch": 1, "st')
    new_log(tmp_path, epochs_done=1)
    assert path.read_text() == '{"epoch": 1, "step": 3}\n'


def test_only_the_first_process_writes_metrics(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    run_log = new_log(tmp_path)
    for _ in run_log.timed_steps(0, iter("abc")):
        run_log.record_loss(torch.tensor(1.0))
        run_log.log_step({}, lr=0.1)
    run_log.log_epoch(codes_changed=None)
    assert not list(tmp_path.iterdir()) and not capsys.readouterr().out


def test_tensorboard_has_the_rows_of_the_metrics(images, tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for epochs in ("3", "4"):
        run_training(images, tmp_path / "run", "--tensorboard", "--epochs", epochs)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    events = reader.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    for name in ("loss", "code_entropy", "epoch_loss", "codes_changed"):
        expected = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        written = [(event.step, event.value) for event in events.Scalars(name)]
        assert [step for step, _ in written] == [step for step, _ in expected]
        assert [value for _, value in written] == pytest.approx([value for _, value in expected], rel=1e-6)
