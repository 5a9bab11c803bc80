"""run_log.py: when lines are due, what they say, rows of resumed runs, a full disk."""

import json
import math

import pytest
import torch
from conftest import run_training

from run_log import RunLog, find_peak, kept_epochs, read_rows


def new_log(dump, steps_done: int = 0, steps_per_epoch: int = 3) -> RunLog:
    """Of a run of 2 epochs of 3 steps, with a line after every second step."""
    options = dict(steps_per_epoch=steps_per_epoch, images_per_step=4, log_freq=2, ln_k=1.0, device=torch.device("cpu"))
    return RunLog(dump, epochs=2, steps_done=steps_done, **options)


def test_lines_are_due_at_the_first_step_each_log_freq_and_the_end_of_an_epoch(tmp_path, capsys):
    rows = {}
    for steps_done in (0, 1, 2, 3, 4, 5):  # a run from its start, and resumed ones: lines come at the same steps
        run_log = new_log(tmp_path, steps_done)
        first_epoch, first = divmod(steps_done, 3)
        run_log.epoch_losses = [float(step) for step in range(3 * first_epoch, steps_done)]
        for epoch in range(first_epoch, 2):
            first = first if epoch == first_epoch else 0
            for step, batch in run_log.timed_steps(epoch, iter("abc"[first:]), first):
                assert batch == "abc"[step % 3]
                run_log.record_loss(torch.tensor(float(step)))
                if run_log.line_is_due:
                    row = run_log.log_step({"more": 0.5}, lr=0.1)
                    assert (row["epoch"], row["lr"], row["more"], row["ln_k"]) == (epoch + 1, 0.1, 0.5, 1.0)
                    assert rows.setdefault(row["step"], row["loss"]) == row["loss"]
            assert run_log.epoch_loss == 3 * epoch + 1
    assert rows == {1: 0.0, 2: 1.0, 3: 2.0, 5: 3.5, 6: 5.0}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_kept(bad, tmp_path):
    run_log = new_log(tmp_path)
    for step, _ in run_log.timed_steps(0, iter("abc")):
        run_log.record_loss(torch.tensor(bad if step == 1 else 1.0))
    assert str(run_log.read_losses()) == str([1.0, bad, 1.0])


def test_rows_wait_while_the_disk_is_full(tmp_path, capsys):
    run_log = new_log(tmp_path)
    file, path = run_log.metrics.file, tmp_path / "metrics.jsonl"

    class FullDisk:
        def __getattr__(self, name):
            return getattr(file, name)

        def write(self, content):
            return file.write(content[:7])

    for step, _ in run_log.timed_steps(0, iter("abc")):
        run_log.record_loss(torch.tensor(1.0))
        run_log.metrics.file = FullDisk() if step < 2 else file
        run_log.log_step({}, lr=0.1)
        assert len(path.read_text().splitlines()) == (0 if step < 2 else 3)
    assert [json.loads(row)["step"] for row in path.read_text().splitlines()] == [1, 2, 3]
    assert capsys.readouterr().out.count("warning: metrics.jsonl cannot be written (No space left on device)") == 1


def test_rows_of_later_epochs_and_half_written_rows_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"epoch": 1, "step": 3}\n{"epoch": 2, "step": 4}\n{"epoch": 1, "st{"epoch": 1}\n{"epoch": 1, "st')
    new_log(tmp_path, steps_done=3)
    assert path.read_text() == '{"epoch": 1, "step": 3}\n'


def test_rows_of_finished_epochs_are_kept_when_the_steps_per_epoch_change(tmp_path):
    """The third epoch, which was interrupted, begins again with batches of another size."""
    path, finished = tmp_path / "metrics.jsonl", '{"epoch": 1, "step": 5}\n{"epoch": 2, "step": 10}\n'
    for steps_per_epoch in (3, 50):  # 5 before
        path.write_text(finished + '{"epoch": 3, "step": 11}\n')
        new_log(tmp_path, steps_done=2 * steps_per_epoch, steps_per_epoch=steps_per_epoch)
        assert path.read_text() == finished


def test_only_the_first_process_writes_metrics(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    run_log = new_log(tmp_path)
    for _ in run_log.timed_steps(0, iter("abc")):
        run_log.record_loss(torch.tensor(1.0))
        run_log.log_step({}, lr=0.1)
    run_log.log_epoch(codes_changed=None)
    run_log.log_codes(torch.tensor([1]), torch.tensor([0.5]))
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


def test_codes_of_each_epoch_are_logged_once_also_by_resumed_runs(tmp_path):
    for steps_done in (0, 3, 3):  # the second run repeats what the first did after its checkpoint
        run_log = new_log(tmp_path, steps_done)
        for epoch in range(steps_done // 3, 2):
            list(run_log.timed_steps(epoch, iter("abc")))
            run_log.log_codes(torch.tensor([4, epoch]), torch.tensor([1 / 3, 1.0]))
        path = tmp_path / "codes.jsonl"
        with path.open("a") as file:
            file.write('{"epoch": 3, "step": 9, "proto')  # killed in the middle of a write
        rows = read_rows(path)
        assert [(row["epoch"], row["step"]) for row in rows] == [(1, 3), (2, 6)]
        assert rows[1]["prototypes"] == [4, 1] and rows[1]["certainties"] == [0.333, 1.0]
    assert read_rows(tmp_path / "none.jsonl") == []


# Which checkpoint is best?


def rows_of(key: str, values: dict) -> list[dict]:
    return [{"epoch": epoch, "step": epoch, key: value} for epoch, value in values.items()]


def test_the_peak_is_the_best_kept_epoch_by_knn():
    knn = rows_of("knn", {5: 50.0, 10: 70.0, 15: 90.0, 20: 65.0, 25: 60.0, 30: 55.0})
    peak = find_peak([*knn, *rows_of("lidar", {30: 5.0})], [10, 20, 30])
    assert (peak.measure, peak.epoch, peak.value, peak.last_epoch, peak.last_value) == ("kNN", 10, 70.0, 30, 55.0)
    assert find_peak(rows_of("knn", {10: 55.5, 20: 40.0, 30: 55.0}), [10, 20, 30]) is None  # by less than a point
    assert find_peak(rows_of("knn", {10: 50.0, 20: 60.0}), [10, 20]) is None  # the last one
    assert find_peak(knn, [30]) is None and find_peak([], [10, 30]) is None and find_peak(knn, []) is None


def test_a_kept_epoch_has_the_value_of_the_measured_one_nearest_to_it():
    peak = find_peak(rows_of("knn", {9: 80.0, 16: 10.0, 23: 60.0, 30: 50.0}), [10, 20, 30])
    assert (peak.epoch, peak.measured, peak.value) == (10, 9, 80.0)
    peak = find_peak(rows_of("knn", {22: 80.0, 30: 50.0}), [10, 20, 30])
    assert (peak.epoch, peak.measured) == (20, 22)  # nothing was measured near 10
    assert find_peak(rows_of("knn", {9: 80.0, 16: 10.0}), [10, 20, 60]) is None  # nor near the last


def test_without_labels_the_peak_is_by_lidar_and_says_what_that_is_worth(tmp_path):
    peak = find_peak(rows_of("lidar", {1: 9.0, 2: 5.0}), [1, 2])
    text = peak.describe(tmp_path)
    assert "LiDAR 9, 5 at epoch 2; it needs no labels, and is not reliable on all images" in text
    assert f"python eval_linear.py {tmp_path}/checkpoints/ckp-1.pth" in text
    assert find_peak([{"epoch": 1, "knn": None, "lidar": 9.0}, {"epoch": 2, "lidar": 8.9}], [1, 2]) is None


def test_kept_epochs_are_those_of_the_files(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    for name in ("ckp-100.pth", "ckp-25.pth", "ckp-x.pth", "ckp-30.pth.tmp"):
        (tmp_path / "checkpoints" / name).touch()
    assert kept_epochs(tmp_path) == [25, 100] and kept_epochs(tmp_path / "none") == []
