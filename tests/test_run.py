"""train.py end to end, as its users run it."""

import json
import math
import re
import shlex
import shutil
import tempfile
import warnings
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torchvision
from conftest import (
    DEVICES,
    ROOT,
    STUCK,
    TINY,
    assert_same,
    forked,
    forked_ranks,
    needs_gpu,
    run_processes,
    run_training,
    torchrun,
    train_stuck,
    without_times,
)
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import checkpoint
import guard
import launch
import loss
import monitor
import options
import replay
import run_log
import sinkhorn_ext
import train
from data import ShuffledBatches
from defaults import derive
from features import describe_images
from images import ImageArrays
from launch import RunStopped, UserError
from model import SwAV, SyncBatchNorm
from sinkhorn_ext import backend

# The run


def test_run_writes_checkpoints_metrics_and_lines(images, tmp_path, capsys):
    contents = run_training(images, tmp_path / "run", "--log_freq", "1")
    out = capsys.readouterr().out
    assert (
        "10 images" in out
        and "2 steps per epoch" in out
        and "device: cpu" in out
        and f"sinkhorn: {backend('cpu')}" in out
        and "--arch resnet18" in out
    )
    lines = re.findall(r"epoch (\d)/4  step (\d)/8  loss [\d.]+ \(ln K 1.792\)  lr \S+  \d+ images/s  data wait", out)
    assert lines == [(str(step // 2 + 1), str(step + 1)) for step in range(8)]
    assert "ETA" in out and "python eval_linear.py" in out
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps, summaries = [r for r in rows if "loss" in r], [r for r in rows if "epoch_loss" in r]
    assert [row["step"] for row in steps] == list(range(1, 9))
    assert {"epoch", "loss", "ln_k", "lr", "images_per_s", "data_wait_percent", "gpu_memory_gib", "eta_s"} <= set(
        steps[0]
    )
    assert [row["epoch"] for row in summaries] == [1, 2, 3, 4]
    for epoch, summary in enumerate(summaries):
        assert summary["epoch_loss"] == pytest.approx(sum(row["loss"] for row in steps[2 * epoch : 2 * epoch + 2]) / 2)
    assert contents["epoch"] == 4 and contents["step"] == 8
    assert contents["options"]["nmb_prototypes"] == 6
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["ckp-2.pth", "ckp-4.pth"]
    assert not list(tmp_path.rglob("*.tmp"))


RECIPES = sorted(p.name for p in (ROOT / "recipes").glob("*.args") if not p.name.startswith("finetune"))
QUALITY = {"rankme", "lidar", "unique_prototypes", "neighbour_agreement", "trivial_r2"}


@pytest.mark.parametrize("every, epochs", [("1", [1, 2, 3, 4]), ("3", [1, 4]), ("2", [2, 4]), ("0", []), ("5", [4])])
def test_quality_is_logged_every_few_epochs_and_changes_nothing_else(every, epochs, images, tmp_path, capsys):
    measured = run_training(images, tmp_path / "run", "--eval_every", every)
    printed = re.findall(
        r"epoch (\d)/4 done: .* s  LiDAR [\d.]+  trivial R2 [\d.]+  kNN [\d.]+%\n", capsys.readouterr().out
    )
    assert [int(epoch) for epoch in printed] == epochs
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows if "rankme" in row] == epochs
    assert all(row.keys() >= QUALITY and row["lidar"] >= 1 for row in rows if "rankme" in row)
    assert all(("knn" in row) == ("rankme" in row) for row in rows)
    unmeasured = run_training(images, tmp_path / "off", "--eval_every", "0")
    for key in ("state_dict", "optimizer", "rng", "queue"):
        assert_same(measured[key], unmeasured[key])


def test_knn_is_measured_only_where_a_validation_split_has_labels(images, tmp_path, capsys):
    def measured(data_path, name: str, *more: str) -> list:
        words = ["--eval_every", "1", "--epochs", "1", "--data_path", str(data_path), *more]
        run_training(images, tmp_path / name, *words)
        (row,) = (row for row in without_times(tmp_path / name) if "epoch_loss" in row)
        assert row.keys() >= QUALITY
        return [row[key] for key in ("knn",) if key in row]

    (of_root,), (of_train,) = measured(images, "root"), measured(images / "train", "train")
    assert of_root == of_train and 0 <= of_root <= 100
    assert measured(images, "cached", "--cache", "ram") == [of_root]
    assert measured(images / "val", "sorted") == []  # class folders, but of no split
    shutil.copytree(images / "train", tmp_path / "data" / "train")
    (tmp_path / "data" / "val").mkdir()
    capsys.readouterr()
    assert measured(tmp_path / "data", "empty") == []
    assert "no kNN while training: data_path: expected a folder for each class in" in capsys.readouterr().out
    for name in ("cats", "dogs"):
        (tmp_path / "data" / "val" / name).mkdir()
        (tmp_path / "data" / "val" / name / "0.png").write_bytes(b"no image")
    assert measured(tmp_path / "data", "unreadable") == []


def test_codes_of_tracked_images_are_recorded_after_each_epoch(images, tmp_path):
    run_training(images, tmp_path / "run", "--epochs", "2")
    first = (tmp_path / "run" / "codes.jsonl").read_text()
    contents = run_training(images, tmp_path / "run")  # resumes after epoch 2
    assert (tmp_path / "run" / "codes.jsonl").read_text().startswith(first)
    rows = [json.loads(line) for line in (tmp_path / "run" / "codes.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert rows[-1]["prototypes"] == contents["guard"]["codes"].tolist()
    assert all(0 < certainty <= 1 for row in rows for certainty in row["certainties"])


def test_the_end_of_a_run_names_a_kept_checkpoint_that_was_better(images, tmp_path, monkeypatch, capsys):
    values, dump = iter([{"knn": 50.0}, {"knn": 80.0}, {"knn": 60.0}, {"knn": 70.0}]), tmp_path / "my photos"
    monkeypatch.setattr(train, "measure_knn", lambda *_: next(values))
    run_training(images, dump, "--eval_every", "1")
    *_, peak, done = lines = capsys.readouterr().out.splitlines()
    start = "quality peaked at epoch 2 of those kept: kNN 80 %, 70 % at epoch 4; evaluate also: python eval_linear.py "
    assert peak.startswith(start) and "see it with: python look.py " in done
    # Commands can be pasted, although the path has spaces.
    commands = [shlex.split(words) for words in re.findall(r"python (.+?)(?:;|$)", "\n".join(lines), re.M)]
    kept, newest = dump / "checkpoints" / "ckp-2.pth", dump / "checkpoint.pth"
    assert commands == [["eval_linear.py", str(kept)], ["eval_linear.py", str(newest)], ["look.py", str(dump)]]
    nan_at_step(1, "scores", monkeypatch)
    with pytest.raises(RunStopped) as stopped:
        run_training(images, tmp_path / "a b")
    (words,) = re.findall("python (.+?) runs that step", str(stopped.value))
    assert shlex.split(words) == ["train.py", "--replay", str(tmp_path / "a b" / "bad_step-0.pth")]


def test_a_slow_run_is_warned_of_once(images, tmp_path, monkeypatch, capsys):
    low = dict.fromkeys(QUALITY, 1.0) | {"trivial_r2": 0.1}
    rows = iter([low | {"trivial_r2": 0.9}, low | {"trivial_r2": 0.8}, low, low])
    monkeypatch.setattr(train, "measure_quality", lambda *_: next(rows))
    run_training(images, tmp_path, "--eval_every", "1")
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("slow: ")]
    assert len(warnings) == 1 and "after epoch 1 colour and brightness explain 90% of the embeddings" in warnings[0]


def test_what_images_show_is_not_looked_at_if_the_user_decides(images, tmp_path, monkeypatch):
    looked = []
    monkeypatch.setattr(options, "describe_images", lambda images: looked.append(1) or describe_images(images))
    run_training(images, tmp_path / "one", "--epochs", "1")
    assert looked == [1]  # TINY has crops, but neither --color_strength nor --hflip
    run_training(images, tmp_path / "two", "--epochs", "1", "--color_strength", "0.5", "--hflip", "0.5")
    run_training(images, tmp_path / "one", "--epochs", "2")  # resumes: as in the run so far
    assert looked == [1]


def losses(dump: Path) -> list[float]:
    """The loss of each log line."""
    rows = [json.loads(line) for line in (dump / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def test_the_place_of_augmentation_does_not_change_what_is_learned(images, tmp_path):
    for place in ("auto", "workers"):
        run_training(images, tmp_path / place, "--augment", place, "--log_freq", "1")
    assert len(losses(tmp_path / "auto")) == 8
    assert losses(tmp_path / "auto") == pytest.approx(losses(tmp_path / "workers"), rel=1e-3)


def count_compilations(monkeypatch) -> tuple[list[str], list[int]]:
    """Compile without a compiler. Returns what is compiled, and how many graphs there were after each epoch."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled, graphs = [], []
    torch_compile, assigned_prototypes = torch.compile, train.assigned_prototypes

    def compile_without_a_compiler(function, **options):
        compiled.append(function.__name__)
        return torch_compile(function, backend="aot_eager", **options)

    def count_after_epoch(*arguments):
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        return assigned_prototypes(*arguments)

    monkeypatch.setattr(torch, "compile", compile_without_a_compiler)
    monkeypatch.setattr(train, "assigned_prototypes", count_after_epoch)
    return compiled, graphs


# Two epochs of crops of two sizes, with a queue in use from the second step.
COMPILED_RUN = ["--epochs", "2", "--log_freq", "1", "--epoch_queue_starts", "0", "--queue_length", "8"]


def test_a_compiled_run_learns_the_same_without_graph_breaks_or_late_compilations(images, tmp_path, monkeypatch):
    compiled, graphs = count_compilations(monkeypatch)
    run_training(images, tmp_path / "off", *COMPILED_RUN)
    assert not compiled and graphs == [0, 0]
    contents = run_training(images, tmp_path / "on", *COMPILED_RUN, "--compile")
    assert compiled == ["features", "augment"]
    assert graphs[2:] == [4, 4] and not torch._dynamo.utils.counters["graph_break"]
    assert losses(tmp_path / "on") == pytest.approx(losses(tmp_path / "off"), rel=1e-4)
    assert contents["state_dict"].keys() == train.build_model(train.parse_args(TINY)).state_dict().keys()


def test_activations_that_are_computed_again_change_nothing(images, tmp_path):
    kept = run_training(images, tmp_path / "kept", "--epochs", "2", "--precision", "bf16")
    assert all(weight.isfinite().all() for weight in kept["state_dict"].values())
    again = run_training(
        images, tmp_path / "again", "--epochs", "2", "--precision", "bf16", "--checkpoint_activations", "on"
    )
    for key in ("state_dict", "optimizer", "queue", "rng"):
        assert_same(again[key], kept[key])


class Shallow(torch.nn.Module):
    """A backbone that compiles in seconds."""

    num_features = 8

    def __init__(self):
        super().__init__()
        layers = torch.nn.Conv2d(3, 8, 3, stride=2), torch.nn.BatchNorm2d(8), torch.nn.ReLU(inplace=True)
        self.layers = torch.nn.Sequential(*layers, torch.nn.Conv2d(8, 8, 3), torch.nn.BatchNorm2d(8))

    def forward(self, x):
        return self.layers(x).mean((2, 3))


def compiled_processes(rank: int, world_size: int, folder: str) -> list:
    """Train without and with torch.compile in several processes: graphs after each epoch, and graph breaks."""
    images = ImageArrays(np.random.default_rng(0).integers(0, 256, (24, 20, 24, 3), dtype=np.uint8), np.zeros(24))
    with pytest.MonkeyPatch.context() as monkeypatch:
        _, graphs = count_compilations(monkeypatch)
        sizes = dict(hidden_mlp=16, feat_dim=8, nmb_prototypes=6)
        monkeypatch.setattr(train, "build_model", lambda args: SwAV(backbone=Shallow(), **sizes))
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size}.items():
            monkeypatch.setenv(name, str(value))
        for choice in ("off", "on"):
            # Augmentation takes longest to compile, and knows no processes.
            words = ["--augment", "workers", "--compile", choice, "--data_path", folder]
            words += ["--dump_path", f"{folder}/{choice}"]
            Path(folder, choice).mkdir(exist_ok=True)
            args = train.parse_args([*TINY, *COMPILED_RUN, *words])
            settings, _ = train.resolve_options(args, images, world_size)
            train.train(args, images, settings, rank, world_size, torch.device("cpu"), torch.float32)
    return [graphs, list(torch._dynamo.utils.counters["graph_break"])]


def test_compiled_processes_learn_the_same_without_graph_breaks_or_late_compilations(tmp_path):
    for graphs, breaks in run_processes(compiled_processes, 2, str(tmp_path)):
        assert graphs == [0, 0, 2, 2] and not breaks
    assert len(losses(tmp_path / "on")) == 6
    assert losses(tmp_path / "on") == pytest.approx(losses(tmp_path / "off"), rel=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_two_processes_train_as_one_with_their_images(images, tmp_path, device, monkeypatch):
    """With BatchNorm over both, a queue, and resumed as one. On a GPU they share it, over gloo."""
    words = ["--device", device, "--log_freq", "1", "--checkpoint_freq", "2", "--queue_length", "8"]
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    one = run_training(images, tmp_path / "one", *words, "--batch_size", "8")
    command = [ROOT / "train.py", *TINY, f"--data_path={images}", *words]
    done = forked_ranks(2, *command, "--dump_path", tmp_path / "two", SWAV_BACKEND="gloo", NVIDIA_TF32_OVERRIDE="0")
    assert done.returncode == 0, done.stderr
    shutil.copytree(tmp_path / "two", tmp_path / "resumed")
    for name in ("checkpoint.pth", "checkpoint_previous.pth"):
        shutil.copy(tmp_path / "two" / "checkpoints" / "ckp-2.pth", tmp_path / "resumed" / name)
    run_training(images, tmp_path / "resumed", *words, "--batch_size", "8")
    for name in ("two", "resumed"):
        other = torch.load(tmp_path / name / "checkpoint.pth", weights_only=True)
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one"), rel=1e-3)
        for weight in ("conv1.weight", "bn1.running_var", "layer4.0.bn2.weight", "prototypes.weight"):
            torch.testing.assert_close(other["state_dict"][weight], one["state_dict"][weight], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(other["queue"], one["queue"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("cache", ["auto", "ram"])
def test_cached_images_are_the_same(cache, images, tmp_path, capsys, monkeypatch):
    files, mkstemp = [], tempfile.mkstemp  # others may be made by tests that run at the same time
    monkeypatch.setattr(tempfile, "mkstemp", lambda **options: files.append(mkstemp(**options)) or files[-1])
    without = run_training(images, tmp_path / "off", "--cache", "off", "--epochs", "2")
    assert "cached in memory" not in capsys.readouterr().out
    cached = run_training(images, tmp_path / "on", "--cache", cache, "--epochs", "2")
    assert "cached in memory, 0 MiB" in capsys.readouterr().out
    assert_same(cached["state_dict"], without["state_dict"])
    assert len(files) == 1 and not Path(files[0][1]).exists()


def test_processes_share_cached_images(images, tmp_path):
    command = [
        ROOT / "train.py",
        *TINY,
        f"--data_path={images}",
        *"--queue_length 16 --batch_size 2 --epochs 2".split(),
    ]
    weights = []
    for cache in ("off", "ram"):
        done = forked_ranks(2, *command, "--cache", cache, "--workers", "1", "--dump_path", tmp_path / cache)
        assert done.returncode == 0, done.stderr
        assert ("cached in memory" in done.stdout) == (cache == "ram")
        weights.append(torch.load(tmp_path / cache / "checkpoint.pth")["state_dict"])
    assert_same(*weights)


@pytest.mark.parametrize("unit", ["off", "on"])
def test_a_run_reads_no_more_values_of_tensors_for_more_steps(unit, images, tmp_path, monkeypatch):
    """Reading a value makes the host wait for the GPU. A trace on a CPU shows it too.

    At the end of an epoch values may be read.
    """
    monkeypatch.setattr(sinkhorn_ext, "_rows_are_in_range", lambda _: False)  # read on CPUs alone, in plain torch
    counts = []
    for batch_size in (4, 2):  # 2 and 5 steps
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            run_training(
                images,
                tmp_path / str(batch_size),
                "--batch_size",
                str(batch_size),
                *f"--epochs 1 --epoch_queue_starts 0 --relative_epsilon {unit}".split(),
            )
        calls = {event.key.removeprefix("aten::"): event.count for event in profile.key_averages()}
        reads = "item", "_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2", "argwhere"
        counts.append({name: calls[name] for name in reads if name in calls})
        steps = {4: 2, 2: 5}[batch_size]
        assert calls["sinkhorn_ext::potentials"] >= steps
        if backend("cpu") == "cpp":  # the kernel multiplies its gradient by a number
            counts[-1] |= {name: counts[-1][name] - steps for name in ("item", "_local_scalar_dense")}
    assert counts[0] == counts[1]


@needs_gpu
@pytest.mark.parametrize(
    "options",
    [
        "",
        "--relative_epsilon on --epsilon 0.3",
        "--epoch_queue_starts 0",
        "--accumulate 2 --checkpoint_activations",
    ],
)
def test_no_step_waits_for_the_gpu(options, images, tmp_path, monkeypatch):
    """Waiting for the GPU raises, except in steps with a log line, which read losses, and at the end of an epoch."""

    def in_mode(mode, function):
        def call(*arguments, **options):
            torch.cuda.set_sync_debug_mode(mode)
            return function(*arguments, **options)

        return call

    def copy_pinned(batch, device, **options):
        assert batch[0][0].is_pinned() and options["stream"] != torch.cuda.current_stream()
        return crops_to_device(batch, device, **options)

    crops_to_device = train.crops_to_device
    monkeypatch.setattr(train, "crops_to_device", in_mode("error", copy_pinned))  # each step begins with it
    for module, name in ((run_log, "mean_over_processes"), (train, "assigned_prototypes")):
        monkeypatch.setattr(module, name, in_mode("default", getattr(module, name)))
    try:
        words = ["--device", "cuda", "--batch_size", "2", "--queue_length", "4", *options.split()]
        run_training(images, tmp_path, *words)  # five steps per epoch, three of them without a log line
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_workers_begin_an_epoch_before_the_checkpoint_of_the_previous_one_is_written(images, tmp_path, monkeypatch):
    events = []
    order, save = ShuffledBatches.__iter__, checkpoint.Saver.save_epoch

    def recorded_order(batches):
        for batch in order(batches):
            events.append(batch[0][0])  # its epoch
            yield batch

    monkeypatch.setattr(ShuffledBatches, "__iter__", recorded_order)
    monkeypatch.setattr(
        checkpoint.Saver, "save_epoch", lambda *args, **more: (events.append("saved"), save(*args, **more))
    )
    run_training(images, tmp_path, "--workers", "1", "--epochs", "3", "--checkpoint_freq", "5")
    assert events == [0, 0, 1, 1, "saved", 2, 2, "saved", "saved"]
    events.clear()
    run_training(images, tmp_path, "--workers", "1", "--epochs", "3", "--checkpoint_freq", "5")
    assert not events


def test_weights_and_crops_are_in_channels_last_format(images, tmp_path, monkeypatch):
    is_channels_last = []

    def recorded(model, crops):
        tensors = [model.conv1.weight, *crops]
        is_channels_last.extend(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in tensors)
        return forward(model, crops)

    forward = SwAV.forward
    monkeypatch.setattr(SwAV, "forward", recorded)
    run_training(images, tmp_path, "--epochs", "1", "--width", "16")
    assert len(is_channels_last) > 8 and all(is_channels_last)


SPIN_COUNTS = [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "")]


@pytest.mark.parametrize("given, used", SPIN_COUNTS)
def test_threads_wait_only_briefly_unless_the_user_sets_it(monkeypatch, given, used):
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    program = "import os, train; print(os.environ.get('GOMP_SPINCOUNT', ''))"
    assert forked("-c", program, **given).stdout.strip() == used


# Options


@pytest.mark.parametrize("words, epochs", [("", 20), ("--seed 3", 20), ("--epochs=5", 5)])
def test_a_command_that_names_no_images_runs_the_shapes_recipe(words, epochs, capsys):
    args = train.parse_args(words.split())
    first_line = capsys.readouterr().out.splitlines()[0]
    assert "no images named" in first_line and "recipes/shapes.args" in first_line
    assert args.dataset == "shapes" and args.arch == "resnet18" and args.epochs == epochs
    train.check_args(args)


@pytest.mark.parametrize("words", ["--dataset shapes", "--dataset=shapes", "--data-path .", "@recipes/200ep.args"])
def test_a_command_that_names_images_or_a_recipe_runs_no_other_recipe(words, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert train.parse_args(words.split()).arch == "resnet50"
    assert "recipe" not in capsys.readouterr().out


def test_a_recipe_without_images_asks_for_them():
    with pytest.raises(
        UserError, match="^--data_path: expected a folder, a .tar file or a .txt list of paths, got none$"
    ):
        train.check_args(train.parse_args([f"@{ROOT}/recipes/200ep.args"]))


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_accepted(recipe, tmp_path):
    args = train.parse_args([f"@{ROOT}/recipes/{recipe}"])
    args.data_path = None if args.dataset == "shapes" else str(tmp_path)
    train.check_args(args)
    assert args.dump_path == f"runs/{recipe.removesuffix('.args')}"


def test_recipes_are_the_published_rows():
    """Global batch, crops, epochs, learning rates, queue and frozen steps are those of the published table."""
    large = dict(world=64, batch_size=64, warmup_epochs=10, start_warmup=0.3, base_lr=4.8, final_lr=0.0048)
    large |= dict(queue_length=0, freeze_prototypes_niters=313, nmb_crops=[2, 6], arch="resnet50")
    small = dict(world=4, batch_size=64, warmup_epochs=0, base_lr=0.6, final_lr=0.0006, queue_length=3840)
    small |= dict(epoch_queue_starts=15, freeze_prototypes_niters=5005, nmb_crops=[2, 6], arch="resnet50")
    rows = {f"{epochs}ep": large | dict(epochs=epochs) for epochs in (100, 200, 400, 800)}
    rows |= {f"{epochs}ep_bs256": small | dict(epochs=epochs) for epochs in (200, 400)}
    rows["400ep_2x224"] = large | dict(epochs=400, nmb_crops=[2], size_crops=[224])
    rows["rn50w2"] = large | dict(epochs=400, arch="resnet50w2")
    rows["rn50w4"] = large | dict(epochs=400, arch="resnet50w4", batch_size=40, queue_length=2560, epoch_queue_starts=0)
    for name, expected in rows.items():
        args = train.parse_args([f"@{ROOT}/recipes/{name}.args", "--data_path", str(ROOT)])
        world_size = expected.pop("world")
        assert {option: getattr(args, option) for option in expected} == expected, name
        train.check_args(args, world_size)
        assert args.queue_length % (args.batch_size * world_size) == 0, name  # so nothing is rounded


def test_the_defaults_are_the_published_run_at_256():
    defaults = train.parse_args(["--dataset", "folder"])
    recipe = train.parse_args([f"@{ROOT}/recipes/200ep_bs256.args"])
    for name, (value, _) in derive(images=1_281_167, image_side=375, world_size=4, epochs=200, given={}).items():
        setattr(defaults, name, value)
    different = {n for n, value in vars(recipe).items() if value is not None and vars(defaults)[n] != value}
    assert different == {"dump_path"}


@pytest.mark.parametrize(
    "words, folder",
    [
        ("--data_path imagenet/train", "runs/imagenet"),
        ("--data_path photos/", "runs/photos"),
        ("--data_path /data/a.b/train/", "runs/a.b"),
        ("--data_path train", f"runs/{Path.cwd().name}"),
        ("--data_path ..", f"runs/{Path.cwd().parent.name}"),
        ("--data_path photos/train/..", "runs/photos"),
        ("--dataset shapes", "runs/shapes"),
        ("--dataset cifar10 --data_path data", "runs/cifar10"),
        ("--data_path photos --dump_path here", "here"),
    ],
)
def test_the_default_folder_of_a_run_has_the_name_of_its_images(words, folder):
    assert train.parse_args(words.split()).dump_path == folder


def test_both_spellings_and_aliases_of_options_are_accepted():
    args = train.parse_args("--nmb-crops 2 4 --base-lr=0.3 --use_fp16 False --dump-path a-b".split())
    assert (args.nmb_crops, args.base_lr, args.precision, args.dump_path) == ([2, 4], 0.3, "fp32", "a-b")
    assert train.parse_args(["--use_fp16", "true"]).precision == "fp16"


@pytest.mark.parametrize(
    "words, message",
    [
        ("--data_path {tmp}/nowhere", "--data_path: expected a folder, .* got .*nowhere$"),
        ("--data_path {tmp}", "data_path: expected image files .* found none"),
        ("--nmb_crops 2 6 --size_crops 224", "--nmb_crops: expected 1 values.* got .2, 6"),
        ("--blur_sigma 3", "--blur_sigma: expected 0 to 2 pixels, got 3"),
        ("--vflip 2", "--vflip: expected 0 to 1, got 2"),
        ("--color_strength 1.5", "--color_strength: expected 0 to 1, got 1.5"),
        ("--min_scale_crops 0.5 0.5 --max_scale_crops 1 0.3", "--min_scale_crops, max_scale_crops: expected 0 < min"),
        ("--crops_for_assign 0 3", "--crops_for_assign: expected crops of 0..2, got .0, 3"),
        ("--nmb_prototypes 1", "--nmb_prototypes: expected .* from 2, got 1"),
        ("--epsilon 0", "--epsilon: expected .* above 0, got 0"),
        ("--temperature nan", "--temperature: expected .* above 0, got nan"),
        ("--epochs 2 --warmup_epochs 3", "--warmup_epochs: expected at most the 2 of --epochs, got 3"),
        ("--arch resnet19", "--arch: .*resnet19.*resnet18"),
        ("--batch_size 1", "--batch_size: expected 2 or more"),
        ("--accumulate 0", "--accumulate: expected .* from 1, got 0"),
        ("--accumulate 3", r"--accumulate: expected 1, 2 \(equal parts of 2 .* of the --batch_size 4\), got 3"),
        ("--batch_size 6 --accumulate 6", r"--accumulate: expected 1, 2, 3 \(equal parts .* --batch_size 6\), got 6"),
        ("--batch_size 11", r"--batch_size: expected at most 10 \(10 images"),
        ("--dataset shapes --data_path {tmp}", "--data_path: expected none for --dataset shapes.* --dataset folder"),
        ("--data_path {tmp}/one", "--data_path: expected 2 images or more .* got 1"),
        ("--dist_url tcp://x", "--dist_url: .*torchrun --nproc_per_node"),
        ("--world_size 4", "--world_size: .*torchrun --nproc_per_node"),
        ("--rank 0", "--rank: .*torchrun"),
        ("--local_rank 0", "--local_rank: .*torchrun"),
        ("--precision fp16", "--precision fp16: .*GPU"),
        ("--dataset cifar10 --data_path {tmp} --epochs 1", "data_path: cifar10 is not in"),
    ],
)
def test_bad_options_are_refused_before_any_work(words, message, images, tmp_path, monkeypatch):
    monkeypatch.setattr(
        torchvision.datasets.CIFAR10, "download", lambda self: (_ for _ in ()).throw(RuntimeError("no net"))
    )
    (tmp_path / "one").mkdir()
    if "one" in words:
        Image.new("RGB", (20, 20)).save(tmp_path / "one" / "0.png")
    given = words.format(tmp=tmp_path).split()
    data = [] if "--data_path" in given else [f"--data_path={images}"]
    with pytest.raises(UserError, match=message):
        train.main(train.parse_args([*TINY, f"--dump_path={tmp_path}/run", *data, *given]))
    assert not list(tmp_path.rglob("*.pth"))


def batchnorm_ranks(rank: int, world_size: int, folder: str) -> list:
    """For each way to share BatchNorm statistics, the processes of a run that share them: their ranks."""

    class Found(Exception):
        pass

    def find_ranks(model: SwAV, device: torch.device) -> None:
        if isinstance(model.bn1, SyncBatchNorm):
            group = dist.distributed_c10d._resolve_process_group(model.bn1.group_name)
            raise Found(dist.get_process_group_ranks(group))
        raise Found([rank])

    train.data_parallel = find_ranks  # train calls it once the model is complete
    images, ranks = ImageArrays(np.zeros((8, 20, 24, 3), np.uint8), np.zeros(8)), []
    for words in ("pytorch", "apex", "apex --syncbn_process_group_size 1", "none"):
        args = train.parse_args([*TINY, "--data_path", folder, "--dump_path", folder, "--sync_bn", *words.split()])
        settings = train.resolve_options(args, images, world_size)
        try:
            train.train(args, images, settings, rank, world_size, torch.device("cpu"), torch.float32)
        except Found as found:
            ranks += found.args
    return ranks


def test_batchnorm_statistics_are_shared_as_sync_bn_says(tmp_path):
    shared = [[[0, 1], [0, 1], [rank], [rank]] for rank in (0, 1)]
    assert run_processes(batchnorm_ranks, 2, str(tmp_path)) == shared


def test_groups_of_sync_bn_must_divide_the_processes():
    train.check_args(apex := train.parse_args("--dataset shapes --sync_bn apex".split()), 16)
    with pytest.raises(UserError, match="--syncbn_process_group_size: expected a divisor of the 12 processes, got 8"):
        train.check_args(apex, 12)


def test_the_queue_is_rounded_down(images, tmp_path, capsys):
    contents = run_training(images, tmp_path, "--queue_length", "11", "--epochs", "1")
    out = capsys.readouterr().out
    assert "--queue_length: rounded down to 8, a multiple of the global batch 4" in out
    assert contents["queue"]["embeddings"].shape == (2, 8, 8)


IDLE = {  # words that are added to a run of two epochs: the line about an option without effect
    "--queue_length 8 --epoch_queue_starts 2": "--queue_length 8 has no effect as it starts at epoch 2, in a run of 2",
    "--queue_length 0 --epoch_queue_starts 1": "--epoch_queue_starts 1 has no effect without --queue_length",
    "--warmup_epochs 0 --start_warmup 0.1": "--start_warmup 0.1 has no effect without --warmup_epochs",
    "--warmup_epochs 2": "--final_lr 0.0006 has no effect as the warm-up takes the whole run",
    "--sync_bn apex": "--sync_bn apex has no effect in a single process",
    "--syncbn_process_group_size 2": "--syncbn_process_group_size 2 has no effect without --sync_bn apex",
    "--cache ram": "--cache ram has no effect as the images of shapes are in memory anyway",
    "--warmup_epochs 0 --start_warmup 0": None,
    "": None,
}


@pytest.mark.parametrize("words, line", IDLE.items(), ids=str)
def test_options_without_effect_are_said(words, line, tmp_path, capsys):
    few = ImageArrays(np.zeros((8, 20, 24, 3), np.uint8), np.zeros(8))
    base = [*TINY, "--epochs", "2", "--dataset", "shapes", "--dump_path", str(tmp_path)]
    args = train.parse_args([*base, *words.split()])
    train.resolve_options(args, few, world_size=1)
    said = [text for text in capsys.readouterr().out.splitlines() if "has no effect" in text]
    assert len(said) == (line is not None) and all(text.startswith(line) for text in said)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_option_of_a_recipe_has_an_effect(recipe):
    args = train.parse_args([f"@{ROOT}/recipes/{recipe}"])
    user_options = {name: value for name, value in vars(args).items() if value is not None}
    for name, (value, _) in derive(
        images=1_281_167, image_side=375, world_size=64, epochs=200, given=user_options
    ).items():
        setattr(args, name, value)
    assert options.options_without_effect(args, user_options, world_size=64) == []


@pytest.mark.parametrize("words", ["--use_fp16 true --precision bf16", "--use_fp16 false --precision fp16"])
def test_two_precisions_are_refused(words):
    with pytest.raises(UserError, match="--use_fp16 .*: expected --precision fp.* or none with it, got"):
        train.parse_args(words.split())
    assert train.parse_args("--use_fp16 true --precision fp16".split()).precision == "fp16"


def test_derived_options_are_printed_as_one_types_them_and_kept_by_a_resumed_run(images, tmp_path, capsys):
    run = ["--arch", "resnet18", "--width", "8", "--blocks", "1", "1", "1", "1", "--device", "cpu", "--workers", "0"]
    run += ["--data_path", str(images), "--dump_path", str(tmp_path / "run"), "--batch_size", "4"]
    train.main(train.parse_args([*run, "--epochs", "1"]))
    out = capsys.readouterr().out
    printed = dict(re.findall(r"^  --(\w+) (.*?)  \(.*\)$", out, re.M))
    assert printed["relative_epsilon"] == "on" and printed["size_crops"] == "32" and "batch_size" not in printed
    words = [word for name, value in printed.items() for word in (f"--{name}", *value.split())]
    first = torch.load(tmp_path / "run" / "checkpoint.pth")
    explicit = [*run[:-4], "--dump_path", str(tmp_path / "again"), "--batch_size", "4", *words, "--epochs", "1"]
    train.main(train.parse_args(explicit))
    assert_same(torch.load(tmp_path / "again" / "checkpoint.pth")["state_dict"], first["state_dict"])
    capsys.readouterr()
    train.main(train.parse_args([*run, "--epochs", "2"]))
    assert "as in the run so far" in capsys.readouterr().out


def test_tensorboard_without_its_package_is_an_error_at_the_start(images, tmp_path, monkeypatch):
    monkeypatch.setattr(options, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="--tensorboard: .*pip install tensorboard"):
        run_training(images, tmp_path / "run", "--tensorboard")
    assert not (tmp_path / "run").exists()


class WithoutFloat64(TorchDispatchMode):
    """Fail as a device without float64 does."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        assert not (torch.is_tensor(out) and out.dtype == torch.float64), func
        return out


def test_a_device_without_float64_trains(images, tmp_path, monkeypatch):
    for module in (monitor, guard):
        monkeypatch.setattr(module, "NO_FLOAT64", ("cpu",))
    monkeypatch.setattr(sinkhorn_ext, "_widest_dtype", lambda scores: torch.float32)
    monkeypatch.setattr(loss, "moments", sinkhorn_ext._moments.in_torch)  # such a device has no compiled kernels
    # Two steps: after four, one unit in the last place of the std has changed weights by 2e-4.
    more = ["--relative_epsilon", "on", "--epochs", "1", "--eval_every", "0"]
    train_loop = train.train

    def train_without(*args):  # what comes before it looks at images on the CPU
        with WithoutFloat64():
            train_loop(*args)

    monkeypatch.setattr(train, "train", train_without)
    run = run_training(images, tmp_path / "without", *more)
    monkeypatch.undo()
    expected = run_training(images, tmp_path / "with", *more)
    for name, tensor in expected["state_dict"].items():
        torch.testing.assert_close(run["state_dict"][name], tensor, rtol=1e-3, atol=1e-4)


# What can go wrong during a run


def test_an_error_of_many_processes_is_one_line(images, tmp_path):
    failed = torchrun(2, ROOT / "train.py", *TINY, "--data_path", tmp_path, "--dump_path", tmp_path / "run")
    assert failed.returncode != 0
    errors = [line for line in failed.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "data_path: expected image files" in errors[0]
    assert 'Traceback (most recent call last):\n  File "' + str(ROOT / "train.py") not in failed.stderr


def test_unreadable_images_are_named_by_any_process(images, tmp_path):
    shutil.copytree(images / "train", tmp_path / "broken")
    order = ShuffledBatches(10, 2, seed=31, rank=1, world_size=2)
    broken = sorted((tmp_path / "broken").rglob("*.png"))[next(iter(order))[0][1]]
    broken.write_bytes(b"no image")
    words = [*TINY, "--data_path", tmp_path / "broken", "--dump_path", tmp_path / "run", "--batch_size", "2"]
    failed = torchrun(2, ROOT / "train.py", *words, "--workers", "1", "--max_bad_images", "0")
    assert failed.returncode != 0
    line = rf"^error: 1 of 10 images cannot be read, and --max_bad_images allows 0: {broken} "
    assert (
        len(re.findall(line, failed.stderr, re.MULTILINE)) == 1 and "Traceback" not in failed.stderr.split("torch/")[0]
    )
    assert str(broken) in (tmp_path / "run" / "bad_images.txt").read_text()


def nan_at_step(step: int, where: str, monkeypatch) -> None:
    """Make a run's step (from 1) bad: nan in the scores, or only in a gradient."""
    forward, calls = SwAV.forward, []

    class BadGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, scores):
            return scores.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * math.nan

    def forward_with_nan(self, crops):
        embeddings, scores = forward(self, crops)
        calls.extend([1] * self.training)  # not those of the tracked images
        if len(calls) == step and self.training:
            scores = scores * math.nan if where == "scores" else BadGradient.apply(scores)
        return embeddings, scores

    monkeypatch.setattr(SwAV, "forward", forward_with_nan)


@pytest.mark.parametrize("where", ["scores", "gradient"])
def test_a_bad_step_is_not_applied_and_stops_the_run_at_the_next_line(where, images, tmp_path, monkeypatch):
    steps = ["--batch_size", "2", "--log_freq", "5", "--epochs", "2", "--queue_length", "0"]  # lines: 1, 5, 6, 10
    nan_at_step(8, where, monkeypatch)
    what = "the loss is nan" if where == "scores" else "gradients are inf or nan"
    with pytest.raises(RunStopped, match=rf"^{what} at step 8 \(epoch 2\).*--replay .*bad_step-0.pth") as stopped:
        run_training(images, tmp_path / "bad", *steps)
    assert stopped.value.code == 4
    saved = torch.load(tmp_path / "bad" / "bad_step-0.pth", weights_only=True)
    assert (saved["epoch"], saved["step"], saved["steps_since"], len(saved["image_indices"])) == (2, 8, 2, 2)
    assert torch.load(tmp_path / "bad" / "checkpoint.pth")["step"] == 5
    # The weights are those before the step: of a run that a signal stops after seven steps.
    monkeypatch.undo()
    calls = []
    monkeypatch.setattr(
        launch, "stop_signals", lambda: nullcontext(lambda: calls.append(1) or ("SIGTERM" if len(calls) == 7 else None))
    )
    with pytest.raises(RunStopped, match="SIGTERM"):
        run_training(images, tmp_path / "good", *steps)
    before = torch.load(tmp_path / "good" / "checkpoint.pth")
    assert before["step"] == 7
    for name, weight in before["state_dict"].items():
        if not name.endswith(("running_mean", "running_var", "num_batches_tracked")):
            ours = saved["state_dict"][name]
            if name == "prototypes.weight":  # each step normalises them first
                ours, weight = (torch.nn.functional.normalize(prototypes) for prototypes in (ours, weight))
            torch.testing.assert_close(ours, weight, rtol=0, atol=1e-6 if name == "prototypes.weight" else 0)
    order = np.random.default_rng((31, 1)).permutation(10)
    assert saved["image_indices"] == order[4:6].tolist()


@pytest.mark.parametrize("where, name", [("weights", "weight layer2.0.conv1.weight"), ("nothing", None)])
def test_replay_names_the_first_bad_tensor(where, name, images, tmp_path, monkeypatch, capsys):
    nan_at_step(4, "scores", monkeypatch)
    with pytest.raises(RunStopped):
        run_training(images, tmp_path)
    monkeypatch.undo()
    path = tmp_path / "bad_step-0.pth"
    if name:
        contents = torch.load(path)
        contents["state_dict"]["layer2.0.conv1.weight"][0, 0, 0, 0] = math.nan
        torch.save(contents, path)
    train.main(train.parse_args(["--replay", str(path), "--device", "cpu"]))
    out = capsys.readouterr().out
    assert "step 4 again: " in out and "in the run, the loss is nan" in out
    assert (f"first bad tensor: {name}\n" if name else "no bad tensor: here the step is finite\n") in out


def test_replay_names_what_is_bad_in_forward_and_backward(images, tmp_path, monkeypatch, capsys):
    nan_at_step(4, "scores", monkeypatch)
    with pytest.raises(RunStopped):
        run_training(images, tmp_path)
    for where, name in (
        ("scores", "output of the model"),
        ("gradient", "Function 'BadGradientBackward' returned nan "),
    ):
        monkeypatch.undo()
        nan_at_step(1, where, monkeypatch)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a line says it, not torch's warning
            bad = train.replay(str(tmp_path / "bad_step-0.pth"), None, torch.device("cpu"))
        assert bad.startswith(name)


# The queue holds 3 batches. The bad step is the newest, the one before, and the newest while the queue fills.
@pytest.mark.parametrize("step, log_freq, is_full", [(7, 2, True), (7, 3, True), (2, 1, False)])
def test_replay_has_the_queue_that_the_bad_step_had(step, log_freq, is_full, images, tmp_path, monkeypatch):
    compute, queues = loss.SwAVLoss._loss, []

    def watched(self, embeddings, scores, prototypes):
        queues.append((self.queue.clone(), int(self.queue_filled)))
        bad = math.nan if len(queues) == step else 1
        return compute(self, embeddings * bad, scores * bad, prototypes)

    monkeypatch.setattr(loss.SwAVLoss, "_loss", watched)
    words = ["--batch_size", "2", "--epoch_queue_starts", "0", "--queue_length", "6", "--log_freq", str(log_freq)]
    with pytest.raises(RunStopped, match=f" at step {step} "):
        run_training(images, tmp_path, *words, "--epochs", "2")
    queue, filled = queues[step - 1]
    assert (filled == queue.shape[1]) == is_full
    assert train.replay(str(tmp_path / "bad_step-0.pth"), None, torch.device("cpu")) is None
    ours, our_filled = queues[-1]
    assert len(ours[0]) >= 2 and torch.equal(ours, queue[:, : ours.shape[1]])
    assert (our_filled == ours.shape[1]) == is_full


def test_replay_scales_16_bits_as_the_run_did(tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    for i in range(8):
        values = np.random.default_rng(i).integers(0, 4000, (20, 24), dtype=np.uint16)
        Image.fromarray(values).save(tmp_path / "images" / f"{i}.png")
    nan_at_step(1, "scores", monkeypatch)
    with pytest.raises(RunStopped):
        run_training(tmp_path / "images", tmp_path / "run")
    monkeypatch.undo()
    known = torch.load(tmp_path / "run" / "bad_step-0.pth")["value_range"]
    for i in range(8):  # now their own values tell another range
        Image.fromarray(np.full((20, 24), 9000 * (i + 1) // 8, np.uint16)).save(tmp_path / "images" / f"{i}.png")
    opened, open_images = [], replay.open_images
    monkeypatch.setattr(replay, "open_images", lambda *a, **k: opened.append(open_images(*a, **k)) or opened[0])
    train.replay(str(tmp_path / "run" / "bad_step-0.pth"), None, torch.device("cpu"))
    assert known[1] < 4000 and opened[0].value_range == known


def test_a_bad_step_in_parts_is_not_applied_and_replayed(images, tmp_path, monkeypatch, capsys):
    words = ["--accumulate", "2", "--checkpoint_activations", "--log_freq", "1", "--queue_length", "0"]
    nan_at_step(2, "gradient", monkeypatch)
    with pytest.raises(RunStopped, match="^gradients are inf or nan at step 2 "):
        run_training(images, tmp_path / "bad", *words)
    monkeypatch.undo()
    saved = torch.load(tmp_path / "bad" / "bad_step-0.pth", weights_only=True)
    assert all(weight.isfinite().all() for weight in saved["state_dict"].values())
    assert train.replay(str(tmp_path / "bad" / "bad_step-0.pth"), None, torch.device("cpu")) is None
    assert "no bad tensor" in capsys.readouterr().out


def test_replay_of_another_file_is_refused(images, tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="--replay: expected a bad_step-RANK.pth of a run that stopped, got "):
        train.main(train.parse_args(["--replay", str(tmp_path / "other.pth"), "--device", "cpu"]))


# Collapse


def test_a_collapse_is_reported_with_cause_and_remedy_and_training_continues(images, tmp_path, capsys):
    train_stuck(images, tmp_path / "run")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("collapsing")]
    assert len(lines) == 1 and "--epsilon 100" in lines[0]
    assert "try --relative_epsilon on --epsilon 0.3 with another --dump_path" in lines[0]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["epoch"] == 10
    (share_done,) = [row["step"] / rows[-1]["step"] for row in rows if row.get("collapsing")]
    assert 0.2 <= share_done <= 1 / 3
    measures = {"loss_per_ln_k", "code_entropy", "mean_code_entropy", "prototypes_in_use", "distinct_codes"}
    assert measures | {"embedding_std"} <= rows[0].keys() and rows[0]["code_entropy"] == pytest.approx(1, abs=1e-3)
    changed = [row["codes_changed"] for row in rows if "epoch_loss" in row]
    assert changed[0] is None and all(0 <= share <= 1 for share in changed[1:])


def test_a_collapse_stops_the_run_with_on_collapse_stop(images, tmp_path):
    with pytest.raises(RunStopped, match="collapsing: .* try --relative_epsilon on .*checkpoint.pth"):
        train_stuck(images, tmp_path / "run", "--on_collapse", "stop")
    assert torch.load(tmp_path / "run" / "checkpoint.pth")["epoch"] < 5


def test_the_warning_shows_what_the_rule_used(images, tmp_path, monkeypatch, capsys):
    def measure(guard, *arguments):
        shares = dict.fromkeys(("code_entropy", "mean_code_entropy", "prototypes_in_use", "distinct_codes"), 0.5)
        return shares | {"loss_per_ln_k": 0.9, "embedding_std": 0.4 if len(guard.streak) % 2 else 0.01}

    monkeypatch.setattr(train.CollapseGuard, "measure", measure)
    train_stuck(images, tmp_path / "run")
    assert "embeddings have 1% of the largest std" in capsys.readouterr().out


def test_recover_goes_back_and_changes_one_thing_at_a_time(images, tmp_path, capsys, collapsing):
    train_stuck(images, tmp_path / "run", "--on_collapse", "recover", base_lr=0.9)
    out = capsys.readouterr().out
    recoveries = re.findall(r"recovering \((\d) of at most 3 times\): back to (\d) epochs done, (.*)", out)
    assert [(number, epochs) for number, epochs, _ in recoveries] == [("1", "2"), ("2", "2"), ("3", "2")]
    assert recoveries[0][2] == "--relative_epsilon off -> on, --epsilon 100.0 -> 0.3"
    assert recoveries[1][2].startswith("--base_lr 0.9 -> 0.3, --final_lr")
    assert "recovered 3 times already, training continues" in out
    contents = torch.load(tmp_path / "run" / "checkpoint.pth")
    assert contents["epoch"] == 10
    assert contents["recovered"] == ["relative_epsilon", "base_lr", "base_lr"]

    # The same command, with two epochs more, keeps what was changed.
    train_stuck(images, tmp_path / "run", "--on_collapse", "recover", "--epochs", "12", base_lr=0.9)
    options = torch.load(tmp_path / "run" / "checkpoint.pth")["options"]
    assert options["relative_epsilon"] == "on" and options["base_lr"] == pytest.approx(0.1) and options["epochs"] == 12
    # What the user sets now takes effect, and is kept too.
    for epochs in ("13", "14"):
        words = ["--on_collapse", "recover", "--resume_anyway"]
        train_stuck(images, tmp_path / "run", *words, "--epochs", epochs, base_lr=0.7)
        options = torch.load(tmp_path / "run" / "checkpoint.pth")["options"]
        assert options["base_lr"] == 0.7 and options["relative_epsilon"] == "on" and options["epsilon"] == 0.3
    other_unit = ["--relative_epsilon", "off", "--epsilon", "50", "--epochs", "15", "--resume_anyway"]
    train_stuck(images, tmp_path / "run", *other_unit, base_lr=0.7)
    options = torch.load(tmp_path / "run" / "checkpoint.pth")["options"]
    assert options["base_lr"] == 0.7 and options["relative_epsilon"] == "off" and options["epsilon"] == 50


def test_an_epoch_is_good_by_its_mean_loss_and_lowest_std_not_by_its_last_line(images, tmp_path, monkeypatch):
    epoch_losses, stds = [], []
    epoch_is_stuck, update = guard.CollapseGuard.epoch_is_stuck, guard.CollapseGuard.update

    def recorded(self, epoch_loss):
        def record(row):
            epoch_losses.append(row["loss_per_ln_k"])
            stds.append(row["embedding_std"])
            return False

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(guard, "is_stuck", record)
            return epoch_is_stuck(self, epoch_loss)

    monkeypatch.setattr(guard.CollapseGuard, "epoch_is_stuck", recorded)
    monkeypatch.setattr(guard.CollapseGuard, "update", lambda *args, **options: update(*args, **options) and False)
    train_stuck(images, tmp_path / "run", "--on_collapse", "recover", base_lr=0.9)  # with a line for each step
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert epoch_losses == [row["epoch_loss"] / row["ln_k"] for row in rows if "epoch_loss" in row]
    last_lines = [before["loss_per_ln_k"] for before, row in zip(rows, rows[1:], strict=False) if "epoch_loss" in row]
    assert len(epoch_losses) == 10 and epoch_losses != last_lines
    lines = [row["embedding_std"] for row in rows if "embedding_std" in row]  # two per epoch
    assert stds == [min(lines[max(0, end - 3) : end]) for end in range(2, 21, 2)]


def test_two_processes_recover_together(images, tmp_path):
    (tmp_path / "main.py").write_text("import sys, guard, train; guard.MIN_STEPS = 0\n")
    with (tmp_path / "main.py").open("a") as file:
        file.write("if __name__ == '__main__': train.main(train.parse_args(sys.argv[1:]))\n")
    words = [*STUCK.format(images=images).split(), "--batch_size", "2", "--base_lr", "1e-9"]
    words += ["--on_collapse", "recover", "--dump_path", tmp_path / "run"]
    done = forked_ranks(2, tmp_path / "main.py", *words, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    assert re.findall(r"recovering \((\d)", done.stdout)[0] == "1" and "back to 0 epochs done" in done.stdout
    contents = torch.load(tmp_path / "run" / "checkpoint.pth")
    assert contents["epoch"] == 10 and contents["options"]["relative_epsilon"] == "on"


def test_a_recovered_run_that_only_warns_counts_no_recoveries(images, tmp_path, capsys):
    args = train.parse_args([*STUCK.format(images=images).split(), "--dump_path", str(tmp_path)])
    args.final_lr = args.start_warmup = args.base_lr = 0.1
    settings = {"options": {**vars(args)}, "user_options": {}, "recovered": ["relative_epsilon"] * 3}
    measures = dict(loss_per_ln_k=1.0, code_entropy=1.0, prototypes_in_use=0.1, embedding_std=0.1)
    train.handle_collapse(args, settings, measures, 300)
    assert "collapsing: " in (out := capsys.readouterr().out) and "recovered" not in out
