"""train.py and eval_linear.py end to end, as their users run them."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torchvision
from conftest import needs_gpu, run_processes
from PIL import Image
from torch.nn import functional as F

import eval_linear
import train
from data import ImageArrays, ShuffledBatches
from defaults import derive
from model import CPUSyncBatchNorm, ResNet, SwAV
from sinkhorn_ext import backend

ROOT = Path(__file__).parent.parent
TINY = (
    "--arch resnet18 --width 8 --blocks 1 1 1 1 --stem small --hidden_mlp 16 --feat_dim 8 --nmb_prototypes 6 "
    "--nmb_crops 2 1 --size_crops 16 9 --min_scale_crops 0.3 0.1 --max_scale_crops 1 0.3 --batch_size 4 --epochs 4 "
    "--queue_length 8 --epoch_queue_starts 1 --freeze_prototypes_niters 2 --checkpoint_freq 2 --workers 0 --device cpu "
    "--temperature 0.1 --epsilon 0.05 --base_lr 0.6 --final_lr 0.0006 --precision fp32"
).split()


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """train/ with 2 classes of 5 images and val/ with 2 of 3."""
    root = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 5), ("val", 3)):
        for label in ("cats", "dogs"):
            (root / split / label).mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(0, 256, (20, 24, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(root / split / label / f"{i}.png")
    return root


def run_training(images, dump, *more: str) -> dict:
    train.main(train.parse_args([*TINY, f"--data_path={images}", f"--dump_path={dump}", *more]))
    return torch.load(dump / "checkpoint.pth", weights_only=True)


def script(*words: object, **environment: str) -> subprocess.CompletedProcess:
    """A command as a user types it, in a fresh process."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([str(word) for word in words], capture_output=True, text=True, env=env, cwd=ROOT, timeout=120)


def torchrun(processes: int, *words: object, **environment: str) -> subprocess.CompletedProcess:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return script(*launcher, *words, **environment)


def assert_same(ours, theirs, name: str = "checkpoint") -> None:
    """Equal bit for bit, through dicts and lists."""
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), name
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), name
        for key in ours:
            assert_same(ours[key], theirs[key], f"{name}.{key}")
    elif isinstance(ours, list):
        assert len(ours) == len(theirs), name
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(a, b, f"{name}[{i}]")
    else:
        assert ours == theirs, name


# The run


def test_run_writes_checkpoints_metrics_and_lines(images, tmp_path, capsys):
    checkpoint = run_training(images, tmp_path / "run", "--log_freq", "1")
    out = capsys.readouterr().out
    assert (
        "10 images" in out
        and "2 steps an epoch" in out
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
    assert checkpoint["epoch"] == 4 and checkpoint["step"] == 8
    assert checkpoint["options"]["nmb_prototypes"] == 6
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["ckp-2.pth", "ckp-4.pth"]
    assert not list(tmp_path.rglob("*.tmp"))


def test_two_and_two_resumed_epochs_equal_four(images, tmp_path, capsys):
    straight = run_training(images, tmp_path / "straight", "--log_freq", "1")
    assert straight["queue"]["filled"] == 8
    (tmp_path / "resumed").mkdir()
    shutil.copy(tmp_path / "straight" / "checkpoints" / "ckp-2.pth", tmp_path / "resumed" / "checkpoint.pth")
    shutil.copy(tmp_path / "straight" / "metrics.jsonl", tmp_path / "resumed")  # rows of epochs to be run again go
    resumed = run_training(images, tmp_path / "resumed", "--log_freq", "1")
    assert "2 of 4 epochs done" in capsys.readouterr().out
    straight["options"].pop("dump_path"), resumed["options"].pop("dump_path")
    assert_same(resumed, straight)
    kept = [[json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
            for run in ("straight", "resumed")]  # fmt: skip
    assert [row["step"] for row in kept[1]] == [row["step"] for row in kept[0]]


def test_workers_do_not_change_what_is_learned(images, tmp_path):
    alone, helped = (run_training(images, tmp_path / w, "--workers", w, "--epochs", "2") for w in ("0", "2"))
    assert_same(helped["state_dict"], alone["state_dict"])


def losses(dump: Path) -> list[float]:
    rows = [json.loads(line) for line in (dump / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def test_where_crops_are_augmented_does_not_change_what_is_learned(images, tmp_path):
    for place in ("auto", "workers"):
        run_training(images, tmp_path / place, "--augment", place, "--log_freq", "1")
    assert len(losses(tmp_path / "auto")) == 8
    assert losses(tmp_path / "auto") == pytest.approx(losses(tmp_path / "workers"), rel=1e-3)


def test_compiled_it_learns_the_same(images, tmp_path, monkeypatch):
    compiled = []

    def compile_without_a_compiler(function, **options):
        compiled.append(function.__name__)
        return torch_compile(function, backend="aot_eager", **options)

    torch_compile = torch.compile
    monkeypatch.setattr(torch, "compile", compile_without_a_compiler)
    run_training(images, tmp_path / "off", "--log_freq", "1", "--epochs", "2")
    assert not compiled
    checkpoint = run_training(images, tmp_path / "on", "--log_freq", "1", "--epochs", "2", "--compile")
    assert compiled == ["features", "augment"]
    assert losses(tmp_path / "on") == pytest.approx(losses(tmp_path / "off"), rel=1e-3)
    assert checkpoint["state_dict"].keys() == train.build_model(train.parse_args(TINY)).state_dict().keys()


def test_it_compiles_by_itself_on_one_gpu_in_long_runs_of_large_crops(monkeypatch, capsys):
    def says(error=None, device="cuda:0", world_size=1, steps=10_000, crop_size=224):
        compiled = []

        def fake_compile(function):
            compiled.append(function)
            if error:
                raise error
            return lambda ones: None

        monkeypatch.setattr(torch, "compile", fake_compile)
        monkeypatch.setattr(torch, "ones", lambda *_, **__: None)
        pays = train.compiling_pays(torch.device(device), world_size, steps=steps, crop_size=crop_size)
        assert bool(compiled) is (pays or error is not None)
        return pays

    assert says()
    assert not any((says(device="cpu"), says(world_size=2), says(steps=9_999), says(crop_size=96)))
    assert not capsys.readouterr().out
    assert not says(error=RuntimeError("no C compiler\nfound"))
    assert "--compile off, as torch.compile does not work here (RuntimeError: no C compiler)" in capsys.readouterr().out


@needs_gpu
def test_compiling_works_on_this_gpu():
    assert train.compiling_pays(torch.device("cuda", 0), 1, steps=10_000, crop_size=224)


@pytest.mark.parametrize("cache", ["auto", "ram"])
def test_images_kept_in_memory_are_the_same(cache, images, tmp_path, capsys):
    without = run_training(images, tmp_path / "off", "--cache", "off", "--epochs", "2")
    assert "kept in memory" not in capsys.readouterr().out
    within = run_training(images, tmp_path / "on", "--cache", cache, "--epochs", "2")
    assert "kept in memory, 0 MiB" in capsys.readouterr().out
    assert_same(within["state_dict"], without["state_dict"])
    assert not list(Path("/dev/shm").glob("swav-*"))


def test_images_kept_in_memory_are_shared_by_processes(images, tmp_path):
    command = [ROOT / "train.py", *TINY, f"--data_path={images}", "--queue_length", "16", "--batch_size", "2"]
    checkpoints = []
    for cache in ("off", "ram"):
        done = torchrun(2, *command, "--cache", cache, "--workers", "1", "--dump_path", tmp_path / cache)
        assert done.returncode == 0, done.stderr
        assert ("kept in memory" in done.stdout) == (cache == "ram")
        checkpoints.append(torch.load(tmp_path / cache / "checkpoint.pth")["state_dict"])
    assert_same(*checkpoints)


def test_images_that_do_not_fit_into_memory_are_not_kept_there(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "cached_size", lambda images, share: (2**40, 2**33))
    run_training(images, tmp_path, "--epochs", "1")
    assert "kept in memory" not in capsys.readouterr().out
    with pytest.raises(
        ValueError, match="^--cache ram: expected at most 8.0 GiB .* got some 1024.0; write --cache off"
    ):
        run_training(images, tmp_path, "--cache", "ram")
    allowed = 10 * 20 * 24 * 3 - 1  # where the estimate is too low, the sizes of all decide
    monkeypatch.setattr(train, "cached_size", lambda images, share: (1, allowed))
    assert train.sizes_to_cache(train.open_images("folder", images), "auto") is None
    monkeypatch.setattr(train, "cached_size", lambda images, share: (1, allowed + 1))
    assert train.sizes_to_cache(train.open_images("folder", images), "auto") == [(24, 20)] * 10


@pytest.mark.parametrize("unit", ["off", "on"])
def test_a_run_reads_no_more_values_of_tensors_for_more_steps(unit, images, tmp_path):
    """What would make a GPU's queue run dry shows in a trace of a CPU too. At the end of an epoch reading is free."""
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
        if unit == "off" and backend("cpu") == "cpp":  # whose gradient is multiplied by a number, not a tensor
            counts[-1] = {name: count - steps for name, count in counts[-1].items()}
    assert counts[0] == counts[1]


@needs_gpu
@pytest.mark.parametrize("options", ["", "--relative_epsilon on --epsilon 0.3", "--epoch_queue_starts 0"])
def test_no_step_waits_for_the_gpu(options, images, tmp_path, monkeypatch):
    """Whatever waits raises, but in steps that have a line, where losses are read, and at the end of an epoch."""

    def in_mode(mode, function):
        def call(*arguments, **options):
            torch.cuda.set_sync_debug_mode(mode)
            return function(*arguments, **options)

        return call

    def place_pinned(batch, **options):
        assert batch[0][0].is_pinned() and options["stream"] != torch.cuda.current_stream()
        return place_batch(batch, **options)

    place_batch = train.place_batch
    monkeypatch.setattr(train, "place_batch", in_mode("error", place_pinned))  # each step begins with it
    for name in ("mean_over_processes", "probe_codes"):
        monkeypatch.setattr(train, name, in_mode("default", getattr(train, name)))
    try:
        words = ["--device", "cuda", "--batch_size", "2", "--queue_length", "4", *options.split()]
        run_training(images, tmp_path, *words)  # five steps an epoch, of which three have no line
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_workers_begin_an_epoch_before_the_checkpoint_of_the_last_is_written(images, tmp_path, monkeypatch):
    events = []
    order, save = ShuffledBatches.__iter__, train.save

    def noted_order(batches):
        for batch in order(batches):
            events.append(batch[0][0])  # its epoch
            yield batch

    monkeypatch.setattr(ShuffledBatches, "__iter__", noted_order)
    monkeypatch.setattr(train, "save", lambda contents, path: (events.append(path.name), save(contents, path)))
    run_training(images, tmp_path, "--workers", "1", "--epochs", "3", "--checkpoint_freq", "5")
    saved = "checkpoint.pth"
    assert events == [0, 0, 1, 1, saved, 2, 2, saved, saved, "ckp-3.pth"]
    events.clear()
    run_training(images, tmp_path, "--workers", "1", "--epochs", "3", "--checkpoint_freq", "5")
    assert not events


def test_weights_and_crops_lie_channels_last(images, tmp_path, monkeypatch):
    seen = []

    def noted(model, crops):
        tensors = [model.conv1.weight, *crops]
        seen.extend(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in tensors)
        return forward(model, crops)

    forward = SwAV.forward
    monkeypatch.setattr(SwAV, "forward", noted)
    run_training(images, tmp_path, "--epochs", "1")
    assert len(seen) > 8 and all(seen)


def test_finished_run_is_left_alone(images, tmp_path, capsys):
    before = run_training(images, tmp_path)
    after = run_training(images, tmp_path)
    assert "4 of 4 epochs done" in capsys.readouterr().out
    assert_same(after, before)
    with pytest.raises(ValueError, match="--dump_path: .* finished run with other options .*seed 31 -> 5"):
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
    whole, resumed = (torch.load(folder / "checkpoint.pth") for folder in (straight, twice))
    whole["options"].pop("dump_path"), resumed["options"].pop("dump_path")
    assert_same(resumed, whole)

    alone = run_training(images, once, "--epochs", "3", "--queue_length", "16")
    assert "options changed: epochs 4 -> 3\n" in capsys.readouterr().out, "a batch over both is as large as before"
    assert alone["step"] == 6 and alone["queue"]["filled"] == 16
    assert_same(run_training(images, twice, "--queue_length", "16")["state_dict"], resumed["state_dict"])
    with pytest.raises(ValueError, match="finished run with other options .global_batch_size 4 -> 2"):
        run_training(images, twice, "--queue_length", "16", "--batch_size", "2")
    # Two learn what one does: their BatchNorms see as many images.
    run_training(images, tmp_path / "one", "--queue_length", "16")
    losses, expected = (
        [row["epoch_loss"] for row in map(json.loads, (folder / "metrics.jsonl").open()) if "epoch_loss" in row]
        for folder in (straight, tmp_path / "one")
    )
    assert losses == pytest.approx(expected, rel=1e-3) and len(losses) == 4
    # The batches of the resumed epoch are in front of those of the two processes.
    assert torch.equal(alone["queue"]["embeddings"][:, 8:], half["queue"]["embeddings"][:, :8])


def test_changed_steps_an_epoch_are_said(images, tmp_path, capsys):
    run_training(images, tmp_path, "--epochs", "1")
    run_training(images, tmp_path, "--epochs", "2", "--batch_size", "2", "--queue_length", "0")
    out = capsys.readouterr().out
    assert "steps an epoch: now 5, were 2" in out
    assert "--queue_length: now 0 for 2 assigning crops, was 8 for 2: the queue starts empty" in out


@pytest.mark.parametrize(
    "processes, asked, in_workers, in_memory, in_files",
    [  # (workers, threads) of a process of eight cores or its part of them
        (1, "auto", (4, 4), (0, 8), (1, 8)),
        (1, 3, (3, 5), (3, 8), (3, 8)),
        (4, "auto", (1, 1), (0, 2), (1, 2)),
        (16, "auto", (0, 1), (0, 1), (0, 1)),
    ],
)
def test_cores_are_shared_between_processes_and_their_loaders(
    processes, asked, in_workers, in_memory, in_files, monkeypatch
):
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for cut_only, held, expected in ((False, True, in_workers), (True, True, in_memory), (True, False, in_files)):
        assert (train.share_cores(asked, torch.device("cpu"), cut_only, held), threads[-1]) == expected
    threads.clear()
    on_gpu = max(1, 8 // processes - 1) if asked == "auto" else asked
    assert train.share_cores(asked, torch.device("cuda", 0), True, True) == on_gpu and not threads


def test_threads_that_the_user_sets_are_kept(monkeypatch):
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    train.share_cores("auto", torch.device("cpu"), True, True)
    assert not threads


@pytest.mark.parametrize("on_terminal, expected", [(False, "one\ntwo\n"), (True, "\r\033[2Kone\r\033[2Ktwo\n")])
def test_progress_line_rewrites_itself_on_a_terminal_alone(on_terminal, expected, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: on_terminal)
    train.show_progress("one")
    train.show_progress("two", keep=True)
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize("words, epochs", [("", 20), ("--seed 3", 20), ("--epochs=5", 5)])
def test_command_that_names_no_images_runs_the_shapes_recipe_and_says_so(words, epochs, capsys):
    args = train.parse_args(words.split())
    first_line = capsys.readouterr().out.splitlines()[0]
    assert "no images named" in first_line and "recipes/shapes.args" in first_line
    assert args.dataset == "shapes" and args.arch == "resnet18" and args.epochs == epochs
    train.check_args(args)


@pytest.mark.parametrize("words", ["--dataset shapes", "--dataset=shapes", "--data-path .", "@recipes/200ep.args"])
def test_command_that_names_images_or_a_recipe_runs_no_other(words, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert train.parse_args(words.split()).arch == "resnet50"
    assert "recipe" not in capsys.readouterr().out


def test_recipe_for_images_that_are_not_named_asks_for_them():
    with pytest.raises(ValueError, match="^--data_path: expected a folder, got none$"):
        train.check_args(train.parse_args([f"@{ROOT}/recipes/200ep.args"]))


# Options


@pytest.mark.parametrize("recipe", sorted(path.name for path in (ROOT / "recipes").glob("*.args")))
def test_every_recipe_is_accepted(recipe, tmp_path):
    args = train.parse_args([f"@{ROOT}/recipes/{recipe}"])
    args.data_path = None if args.dataset == "shapes" else str(tmp_path)
    train.check_args(args)
    assert args.dump_path == f"runs/{recipe.removesuffix('.args')}"


def test_recipes_are_the_published_rows():
    """Global batch, crops, epochs, rates, queue and frozen steps of the published table."""
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
        asked = args.queue_length
        train.check_args(args, world_size)
        assert args.queue_length == asked, name


def test_the_defaults_are_the_published_run_at_256():
    defaults = train.parse_args(["--dataset", "folder"])
    recipe = train.parse_args([f"@{ROOT}/recipes/200ep_bs256.args"])
    for name, (value, _) in derive(images=1_281_167, image_side=375, world_size=4, epochs=200, given={}).items():
        setattr(defaults, name, value)
    different = {n for n, value in vars(recipe).items() if value is not None and vars(defaults)[n] != value}
    assert different == {"dump_path"}


def test_both_spellings_and_older_options_are_understood():
    args = train.parse_args("--nmb-crops 2 4 --base-lr=0.3 --use_fp16 False --dump-path a-b".split())
    assert (args.nmb_crops, args.base_lr, args.precision, args.dump_path) == ([2, 4], 0.3, "fp32", "a-b")
    assert train.parse_args(["--use_fp16", "true"]).precision == "fp16"


@pytest.mark.parametrize(
    "words, message",
    [
        ("--data_path {tmp}/nowhere", "--data_path: expected a folder, got .*nowhere$"),
        ("--data_path {tmp}", "data_path: expected image files .* found none"),
        ("--nmb_crops 2 6 --size_crops 224", "--nmb_crops: expected 1 values.* got .2, 6"),
        ("--blur_sigma 3", "--blur_sigma: expected 0 to 2 pixels, got 3"),
        ("--min_scale_crops 0.5 0.5 --max_scale_crops 1 0.3", "--min_scale_crops, max_scale_crops: expected 0 < min"),
        ("--crops_for_assign 0 3", "--crops_for_assign: expected crops of 0..2, got .0, 3"),
        ("--nmb_prototypes 1", "--nmb_prototypes: expected .* from 2, got 1"),
        ("--epsilon 0", "--epsilon: expected .* above 0, got 0"),
        ("--temperature nan", "--temperature: expected .* above 0, got nan"),
        ("--epochs 2 --warmup_epochs 3", "--warmup_epochs: expected at most the 2 of --epochs, got 3"),
        ("--arch resnet19", "--arch: .*resnet19.*resnet18"),
        ("--batch_size 1", "--batch_size: expected 2 or more"),
        ("--batch_size 11", r"--batch_size: expected at most 10 \(10 images"),
        ("--workers -1", "--workers: expected .* from 0, got -1"),
        ("--dump_path {tmp}/file/run", "--dump_path: expected a folder that can be written, got .*run"),
        ("--dataset shapes --data_path {tmp}", "--data_path: expected none for --dataset shapes.* --dataset folder"),
        ("--data_path {tmp}/one", "--data_path: expected 2 images or more .* got 1"),
        ("--dist_url tcp://x", "--dist_url: .*torchrun --nproc_per_node"),
        ("--world_size 4", "--world_size: .*torchrun --nproc_per_node"),
        ("--rank 0", "--rank: .*torchrun"),
        ("--local_rank 0", "--local_rank: .*torchrun"),
        ("--precision fp16", "--precision fp16: .*GPU"),
        ("--learning_rate 1", "unrecognized arguments: --learning_rate"),
        ("--base_lr much", "--base_lr: expected a number above 0, got much"),
        ("@{tmp}/none.args", "none.args"),
        ("--dataset cifar10 --data_path {tmp} --epochs 1", "data_path: cifar10 is not in"),
    ],
)
def test_bad_options_are_refused_before_any_work(words, message, images, tmp_path, monkeypatch):
    monkeypatch.setattr(
        torchvision.datasets.CIFAR10, "download", lambda self: (_ for _ in ()).throw(RuntimeError("no net"))
    )
    (tmp_path / "file").touch()
    (tmp_path / "one").mkdir()
    if "one" in words:
        Image.new("RGB", (20, 20)).save(tmp_path / "one" / "0.png")
    given = words.format(tmp=tmp_path).split()
    data = [] if "--data_path" in given else [f"--data_path={images}"]
    with pytest.raises(ValueError, match=message):
        train.main(train.parse_args([*TINY, f"--dump_path={tmp_path}/run", *data, *given]))
    assert not list(tmp_path.rglob("*.pth"))


def ranks_that_share(rank, world_size):
    """For statistics of all, of groups of two, of groups larger than all, and of each: ranks, or None for all."""
    found = []
    for sync_bn, size in (("pytorch", 2), ("apex", 2), ("apex", 8), ("none", 2)):
        model = SwAV("resnet18", hidden_mlp=8, feat_dim=4, nmb_prototypes=3, width=8, blocks=[1, 1, 1, 1])
        norm = train.share_batchnorm(model, sync_bn, size, world_size).bn1
        shared = isinstance(norm, CPUSyncBatchNorm)
        found.append(norm.group and dist.get_process_group_ranks(norm.group) if shared else [rank])
    return found


def test_batchnorm_is_shared_by_all_or_in_groups_as_published_with_apex():
    pairs = [0, 1], [0, 1], [2, 3], [2, 3]
    assert run_processes(ranks_that_share, 4) == [[None, pair, None, [rank]] for rank, pair in enumerate(pairs)]
    train.check_args(apex := train.parse_args("--dataset shapes --sync_bn apex".split()), 16)
    with pytest.raises(ValueError, match="--syncbn_process_group_size: expected a divisor of the 12 processes, got 8"):
        train.check_args(apex, 12)


def test_queue_is_rounded_down_and_one_that_never_starts_is_said(images, tmp_path, capsys):
    checkpoint = run_training(images, tmp_path, "--queue_length", "11", "--epochs", "1")
    out = capsys.readouterr().out
    assert "--queue_length: 11 is no multiple of the global batch of 4: using 8" in out
    assert "--epoch_queue_starts 1: the queue is not used in a run of 1 epochs" in out
    assert checkpoint["queue"]["embeddings"].shape == (2, 8, 8)


SPUN = [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "")]


@pytest.mark.parametrize("given, used", SPUN)
def test_threads_wait_briefly_unless_told_otherwise(monkeypatch, given, used):
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    asks = "import os, train; print(os.environ.get('GOMP_SPINCOUNT', ''))"
    assert script(sys.executable, "-c", asks, **given).stdout.strip() == used


def test_more_processes_than_gpus_says_what_to_type(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    for module in (train, eval_linear):
        with pytest.raises(ValueError, match=r"2 GPU\(s\).*--nproc_per_node=2"):
            module.choose_device("auto")


@pytest.mark.parametrize("has_bf16", [True, False])
def test_bf16_is_the_default_on_cpus_that_have_it(monkeypatch, has_bf16):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bf16)
    expected = torch.bfloat16 if has_bf16 else torch.float32
    assert train.choose_precision(None, torch.device("cpu")) == expected
    assert train.choose_precision("fp32", torch.device("cpu")) == torch.float32


def test_bf16_trains_on_a_cpu(images, tmp_path):
    checkpoint = run_training(images, tmp_path, "--precision", "bf16", "--epochs", "1")
    assert all(weight.isfinite().all() for weight in checkpoint["state_dict"].values())


# What goes wrong in the middle


def test_errors_are_one_line_said_once_by_many_processes(images, tmp_path):
    failed = torchrun(2, ROOT / "train.py", *TINY, "--data_path", tmp_path, "--dump_path", tmp_path / "run")
    assert failed.returncode != 0
    said = [line for line in failed.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "data_path: expected image files" in said[0]
    assert 'Traceback (most recent call last):\n  File "' + str(ROOT / "train.py") not in failed.stderr


def test_unreadable_image_is_named(images, tmp_path):
    shutil.copytree(images / "train", tmp_path / "broken")
    (tmp_path / "broken" / "cats" / "0.png").write_bytes(b"no image")
    words = [
        *TINY,
        "--data_path",
        tmp_path / "broken",
        "--dump_path",
        tmp_path / "run",
        "--workers",
        "1",
        "--batch_size",
        "5",
    ]
    failed = script(sys.executable, ROOT / "train.py", *words)
    assert failed.returncode == 2
    assert re.search(r"^error: .*cannot read .*cats/0.png as an image", failed.stderr, re.MULTILINE)


def test_error_of_another_process_than_the_first_is_said(images, tmp_path):
    shutil.copytree(images / "train", tmp_path / "broken")
    order = ShuffledBatches(10, 2, seed=31, rank=1, world_size=2)
    broken = sorted((tmp_path / "broken").rglob("*.png"))[next(iter(order))[0][1]]
    broken.write_bytes(b"no image")
    words = [*TINY, "--data_path", tmp_path / "broken", "--dump_path", tmp_path / "run", "--batch_size", "2"]
    failed = torchrun(2, ROOT / "train.py", *words)
    assert failed.returncode != 0
    assert re.search(rf"^error: .*cannot read {broken} as an image", failed.stderr, re.MULTILINE)


def test_checkpoint_of_another_architecture_is_refused(images, tmp_path):
    run_training(images, tmp_path, "--epochs", "1")
    with pytest.raises(ValueError, match="--dump_path: .* another architecture .*width 8 -> 16"):
        run_training(images, tmp_path, "--width", "16", "--epochs", "2")


def test_unreadable_checkpoint_is_refused_and_kept(images, tmp_path):
    (tmp_path / "checkpoint.pth").write_bytes(b"half a file")
    with pytest.raises(ValueError, match="--dump_path: cannot resume from .*checkpoint.pth"):
        run_training(images, tmp_path)
    assert (tmp_path / "checkpoint.pth").read_bytes() == b"half a file"


def test_bad_loss_stops_the_run_and_saves_the_batch(images, tmp_path, monkeypatch):
    forward, calls = train.SwAV.forward, []

    def forward_with_nan(self, crops):
        embeddings, scores = forward(self, crops)
        calls.extend([1] * self.training)  # not those that follow the codes of some images
        return embeddings, scores * (math.nan if len(calls) == 4 else 1.0)

    monkeypatch.setattr(train.SwAV, "forward", forward_with_nan)
    with pytest.raises(FloatingPointError, match=r"loss is nan at step 4 \(epoch 2\).*bad_loss-\*.pth"):
        run_training(images, tmp_path)
    saved = torch.load(tmp_path / "bad_loss-0.pth", weights_only=True)
    assert saved["step"] == 4 and len(saved["image_indices"]) == 4
    assert [crop.shape for crop in saved["last_batch"]["crops"]] == [(4, 3, 16, 16)] * 2 + [(4, 3, 9, 9)]
    assert all(weight.isfinite().all() for weight in saved["state_dict"].values())
    assert torch.load(tmp_path / "checkpoint.pth")["epoch"] == 1


# Collapse


STUCK = (
    "--data_path {images} --arch resnet18 --width 8 --blocks 1 1 1 1 --stem small --hidden_mlp 16 --feat_dim 8 "
    "--nmb_prototypes 6 --nmb_crops 2 --size_crops 16 --min_scale_crops 0.3 --max_scale_crops 1 --batch_size 4 "
    "--temperature 0.1 --relative_epsilon off --epsilon 100 --epochs 10 --log_freq 1 --workers 0 --device cpu"
)


def train_stuck(images, dump, *more: str, base_lr: float = 1e-9) -> None:
    """A run whose epsilon makes all codes uniform and whose weights hardly move: with one image's crops alike, ln K."""
    options = STUCK.format(images=images).split()
    with mock.patch("guard.LEAST_STEPS", 0):  # it has twenty
        train.main(train.parse_args([*options, "--base_lr", str(base_lr), "--dump_path", str(dump), *more]))


def test_collapse_is_told_with_cause_and_remedy_and_the_run_goes_on(images, tmp_path, capsys):
    train_stuck(images, tmp_path / "run")
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("collapsing")]
    assert len(told) == 1 and "--epsilon 100" in told[0]
    assert "try --relative_epsilon on --epsilon 0.3 with another --dump_path" in told[0]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["epoch"] == 10
    (at,) = [row["step"] / rows[-1]["step"] for row in rows if row.get("collapsing")]
    assert 0.2 <= at <= 1 / 3
    measures = {"loss_per_ln_k", "code_entropy", "mean_code_entropy", "prototypes_in_use", "distinct_codes"}
    assert measures | {"embedding_std"} <= rows[0].keys() and rows[0]["code_entropy"] == pytest.approx(1, abs=1e-3)
    changed = [row["codes_changed"] for row in rows if "epoch_loss" in row]
    assert changed[0] is None and all(0 <= share <= 1 for share in changed[1:])


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


def test_tensorboard_without_its_package_is_an_error_at_the_start(images, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--tensorboard: .*pip install tensorboard"):
        run_training(images, tmp_path / "run", "--tensorboard")
    assert not (tmp_path / "run").exists()


def test_collapse_stops_the_run_where_asked(images, tmp_path):
    with pytest.raises(FloatingPointError, match="collapsing: .* try --relative_epsilon on .*checkpoint.pth"):
        train_stuck(images, tmp_path / "run", "--on_collapse", "stop")
    assert torch.load(tmp_path / "run" / "checkpoint.pth")["epoch"] < 5


def test_recover_goes_back_changes_one_thing_a_time_and_ends(images, tmp_path, capsys, monkeypatch):
    good = train.CollapseGuard.is_collapsing
    seen = []

    def always_after_the_second_epoch(self, row, share_done, step):
        good(self, row, share_done, step)
        seen.append(share_done)
        return share_done > 0.25

    monkeypatch.setattr(train.CollapseGuard, "is_collapsing", always_after_the_second_epoch)
    monkeypatch.setattr(train, "is_stuck", lambda row: False)  # every epoch counts as good
    train_stuck(images, tmp_path / "run", "--on_collapse", "recover", base_lr=0.9)
    out = capsys.readouterr().out
    told = re.findall(r"recovering \((\d) of at most 3 times\): back to (\d) epochs done, (.*)", out)
    assert [(number, epochs) for number, epochs, _ in told] == [("1", "2"), ("2", "2"), ("3", "2")]
    assert told[0][2] == "--relative_epsilon off -> on, --epsilon 100.0 -> 0.3"
    assert told[1][2].startswith("--base_lr 0.9 -> 0.3, --final_lr")
    assert "recovered 3 times already, going on" in out
    checkpoint = torch.load(tmp_path / "run" / "checkpoint.pth")
    assert checkpoint["epoch"] == 10
    assert checkpoint["options"]["recovered"] == ["relative_epsilon", "base_lr", "base_lr"]

    # the same command, with two epochs more, keeps what was changed
    train_stuck(images, tmp_path / "run", "--on_collapse", "recover", "--epochs", "12", base_lr=0.9)
    options = torch.load(tmp_path / "run" / "checkpoint.pth")["options"]
    assert options["relative_epsilon"] == "on" and options["base_lr"] == pytest.approx(0.1) and options["epochs"] == 12
    # what another command asks for is done, and kept in its turn
    for epochs in ("13", "14"):
        train_stuck(images, tmp_path / "run", "--on_collapse", "recover", "--epochs", epochs, base_lr=0.7)
        options = torch.load(tmp_path / "run" / "checkpoint.pth")["options"]
        assert options["base_lr"] == 0.7 and options["relative_epsilon"] == "on" and options["epsilon"] == 0.3
    other_unit = ["--relative_epsilon", "off", "--epsilon", "50", "--epochs", "15"]
    train_stuck(images, tmp_path / "run", *other_unit, base_lr=0.7)
    options = torch.load(tmp_path / "run" / "checkpoint.pth")["options"]
    assert options["base_lr"] == 0.7 and options["relative_epsilon"] == "off" and options["epsilon"] == 50


def test_recover_keeps_what_was_learned_before_where_no_epoch_is_known_to_be_good(images, tmp_path, capsys):
    train_stuck(images, tmp_path / "run", "--epochs", "5")
    train_stuck(images, tmp_path / "run", "--on_collapse", "recover")
    assert "back to 0 epochs done, " in (out := capsys.readouterr().out) and "collapsed-1.pth" in out
    kept = torch.load(tmp_path / "run" / "collapsed-1.pth")
    assert kept["epoch"] >= 5
    args = train.parse_args(["--dump_path", str(tmp_path / "run"), *STUCK.format(images=images).split()])
    args.base_lr = args.final_lr = args.start_warmup = 0.1
    newest = torch.load(tmp_path / "run" / "checkpoint.pth")["epoch"]
    train.recover(args, rank=0)
    assert torch.load(tmp_path / "run" / "collapsed-1.pth")["epoch"] == kept["epoch"]
    assert torch.load(max((tmp_path / "run").glob("collapsed-*.pth")))["epoch"] == newest


def test_an_epoch_is_good_by_its_mean_loss_and_lowest_spread_not_by_its_last_line(images, tmp_path, monkeypatch):
    judged, spreads = [], []
    monkeypatch.setattr(
        train, "is_stuck", lambda row: judged.append(row["loss_per_ln_k"]) or spreads.append(row["embedding_std"])
    )
    train_stuck(images, tmp_path / "run", base_lr=0.9)  # a line a step
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert judged == [row["epoch_loss"] / row["ln_k"] for row in rows if "epoch_loss" in row]
    last_lines = [before["loss_per_ln_k"] for before, row in zip(rows, rows[1:], strict=False) if "epoch_loss" in row]
    assert len(judged) == 10 and judged != last_lines
    lines = [row["embedding_std"] for row in rows if "embedding_std" in row]  # two an epoch
    assert spreads == [min(lines[max(0, end - 3) : end]) for end in range(2, 21, 2)]


def test_recover_leaves_out_the_queue_before_it_slows_the_run(images, tmp_path, capsys, monkeypatch):
    judge = train.CollapseGuard.is_collapsing

    def after_the_second_epoch(self, row, share_done, step):
        judge(self, row, share_done, step)
        return share_done > 0.25

    monkeypatch.setattr(train.CollapseGuard, "is_collapsing", after_the_second_epoch)
    monkeypatch.setattr(train, "is_stuck", lambda row: False)  # every epoch counts as good
    words = ["--on_collapse", "recover", "--relative_epsilon", "on", "--queue_length", "4", "--epoch_queue_starts", "0"]
    train_stuck(images, tmp_path / "run", *words, base_lr=0.9)
    out = capsys.readouterr().out
    assert "likely cause: codes tell the 4 older embeddings of --queue_length from new ones" in out
    told = re.findall(r"recovering .* times\): back to (\d) epochs done, (.*)", out)
    assert told[0] == ("2", "--queue_length 4 -> 0") and told[1][1].startswith("--base_lr 0.9 -> 0.3")
    checkpoint = torch.load(tmp_path / "run" / "checkpoint.pth")
    assert checkpoint["epoch"] == 10 and checkpoint["queue"]["embeddings"].shape[1] == 0


def test_two_processes_recover_together(images, tmp_path):
    (tmp_path / "main.py").write_text("import sys, guard, train; guard.LEAST_STEPS = 0\n")
    with (tmp_path / "main.py").open("a") as file:
        file.write("if __name__ == '__main__': train.main(train.parse_args(sys.argv[1:]))\n")
    words = [*STUCK.format(images=images).split(), "--batch_size", "2", "--base_lr", "1e-9"]
    words += ["--on_collapse", "recover", "--dump_path", tmp_path / "run"]
    done = torchrun(2, tmp_path / "main.py", *words, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    assert re.findall(r"recovering \((\d)", done.stdout)[0] == "1" and "back to 0 epochs done" in done.stdout
    checkpoint = torch.load(tmp_path / "run" / "checkpoint.pth")
    assert checkpoint["epoch"] == 10 and checkpoint["options"]["relative_epsilon"] == "on"


def test_a_recovered_run_that_only_warns_counts_no_recoveries(images, tmp_path, capsys):
    args = train.parse_args([*STUCK.format(images=images).split(), "--dump_path", str(tmp_path)])
    args.final_lr = args.start_warmup = args.base_lr = 0.1
    args.recovered = ["relative_epsilon"]
    row = dict(loss_per_ln_k=1.0, code_entropy=1.0, prototypes_in_use=0.1, embedding_std=0.1, step=300)
    train.answer_collapse(args, row, tmp_path)
    assert "collapsing: " in (out := capsys.readouterr().out) and "recovered" not in out


def test_recover_without_a_good_state_begins_anew(images, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last_good.pth").write_text("of a run whose checkpoint was taken away")
    train_stuck(images, tmp_path / "run", "--on_collapse", "recover")
    out = capsys.readouterr().out
    assert "back to 0 epochs done, --relative_epsilon off -> on" in out
    assert torch.load(tmp_path / "run" / "checkpoint.pth")["epoch"] == 10


def test_every_process_of_many_has_images_whose_codes_are_followed():
    images = ImageArrays(np.zeros((1100, 8, 8, 3), dtype=np.uint8), np.zeros(1100))
    counts = [len(train.load_probe(images, 8, rank, 512)) for rank in (0, 255, 256, 511)]
    assert counts == [1, 1, 1, 1]
    assert [len(train.load_probe(images, 8, rank, 2)) for rank in (0, 1)] == [28, 27]  # a twentieth


def test_a_run_goes_on_with_what_is_asked_anew(images, tmp_path, capsys):
    run = ["--arch", "resnet18", "--width", "8", "--blocks", "1", "1", "1", "1", "--device", "cpu", "--workers", "0"]
    run += ["--data_path", str(images), "--dump_path", str(tmp_path), "--batch_size", "4"]
    train.main(train.parse_args([*run, "--epochs", "1"]))
    train.main(train.parse_args([*run, "--epochs", "2", "--wd", "0.1", "--relative_epsilon", "off"]))
    checkpoint = torch.load(tmp_path / "checkpoint.pth")
    assert [group["weight_decay"] for group in checkpoint["optimizer"]["param_groups"]] == [0.1]
    assert checkpoint["options"]["epsilon"] == 0.05  # not the 0.3 of the unit that was
    assert checkpoint["options"]["crops_for_assign"] == [0, 1, 2, 3]
    assert "wd 1e-06 -> 0.1" in capsys.readouterr().out
    train.main(train.parse_args([*run, "--epochs", "3", "--nmb_crops", "3"]))  # of which no fourth can assign
    assert "crops_for_assign [0, 1, 2, 3] -> [0, 1, 2]" in capsys.readouterr().out


def test_a_batch_that_is_not_given_stays_as_large_over_all_processes(images, tmp_path):
    run_training(images, tmp_path, "--batch_size", "8", "--epochs", "1")
    place = TINY.index("--batch_size")
    asked = TINY[:place] + TINY[place + 2 :]
    for world_size, batch_size in ((1, 8), (2, 4), (4, 2), (3, 4)):  # to 3 the 8 cannot be dealt out
        args = train.parse_args([*asked, "--epochs", "2", f"--data_path={images}", f"--dump_path={tmp_path}"])
        train.settle(args, ImageArrays(np.zeros((24, 20, 24, 3), np.uint8), np.zeros(24)), world_size)
        assert args.batch_size == batch_size


def test_what_is_derived_is_printed_as_options_and_kept_when_the_run_goes_on(images, tmp_path, capsys):
    run = ["--arch", "resnet18", "--width", "8", "--blocks", "1", "1", "1", "1", "--device", "cpu", "--workers", "0"]
    run += ["--data_path", str(images), "--dump_path", str(tmp_path / "run"), "--batch_size", "4"]
    train.main(train.parse_args([*run, "--epochs", "1"]))
    out = capsys.readouterr().out
    printed = dict(re.findall(r"^  --(\w+) (.*?)  \(.*\)$", out, re.M))
    assert printed["relative_epsilon"] == "on" and printed["size_crops"] == "32" and "batch_size" not in printed
    again = [word for name, value in printed.items() for word in (f"--{name}", *value.split())]
    first = torch.load(tmp_path / "run" / "checkpoint.pth")
    explicit = [*run[:-4], "--dump_path", str(tmp_path / "again"), "--batch_size", "4", *again, "--epochs", "1"]
    train.main(train.parse_args(explicit))
    assert_same(torch.load(tmp_path / "again" / "checkpoint.pth")["state_dict"], first["state_dict"])
    capsys.readouterr()
    train.main(train.parse_args([*run, "--epochs", "2"]))
    assert "as the run so far" in capsys.readouterr().out


# eval_linear.py


def judge(*words: object) -> dict:
    quick = ["--epochs", "2", "--workers", "0", "--device", "cpu", *map(str, words)]
    return eval_linear.main(eval_linear.parse_args(quick))


@pytest.fixture(scope="session")
def trained(images, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "runs" / "tiny"
    run_training(images, folder, "--epochs", "1")
    return folder / "checkpoint.pth"


@pytest.mark.parametrize("mode", [[], ["--cached"]], ids=["probe", "cached"])
def test_judging_writes_probe_knn_and_what_they_are_compared_with(mode, trained, images, capsys):
    result = judge(trained, "--data_path", images, *mode)
    out = capsys.readouterr().out
    rows = result["rows"]
    assert list(rows) == [
        "checkpoint",
        "random init, BatchNorm untouched",
        "random init, BatchNorm of the training images",
        "raw pixels",
    ]
    for name, row in rows.items():
        assert name in out
        assert 0 < row["spread"] < 1.5
        for kind in ("linear", "knn"):
            assert 0 <= row[kind]["top1"] <= row[kind]["top5"] == 100  # two classes
    assert json.loads(trained.with_suffix(".eval.json").read_text()) == result
    assert ("linear probe, epoch 2/2" in out) == (not mode)


def test_judging_finds_the_newest_checkpoint_and_its_images(trained, images, monkeypatch):
    monkeypatch.chdir(trained.parent.parent.parent)
    result = judge("--cached")
    assert result["checkpoint"] == "runs/tiny/checkpoint.pth"
    assert (result["dataset"], result["data_path"], result["size"]) == ("folder", str(images), 16)
    monkeypatch.chdir(images)
    with pytest.raises(ValueError, match="no runs/"):
        judge()


@pytest.mark.parametrize(
    ("crops", "options", "side", "expected"),
    [
        ([16, 9], "", 16, (16, 16)),  # no larger than the crops: whole
        ([16, 9], "", 24, (16, 18)),  # larger: the centre of them, at 7/8 as published
        (None, "", 24, (224, 224)),
        (None, "--size 20", 24, (20, 23)),
        ([16, 9], "--dataset fashion_mnist", 28, (28, 28)),
        ([32], "--dataset fashion_mnist", 28, (32, 32)),
        (None, "--dataset fashion_mnist", 28, (28, 28)),
        ([32], "--dataset fashion_mnist --size 28 --resize 40", 28, (28, 40)),
    ],
)
def test_small_images_are_judged_whole_at_the_size_trained_on(crops, options, side, expected, tmp_path, monkeypatch):
    few = ImageArrays(
        np.random.default_rng(0).integers(0, 256, (12, side, side, 3), np.uint8), np.arange(12) % 2, ["a", "b"]
    )
    monkeypatch.setattr(eval_linear, "open_images", lambda *_: few)
    checkpoint = {"state_dict": ResNet("resnet18", width=1, blocks=(1, 1, 1, 1)).state_dict()}
    torch.save(checkpoint | {"options": {"size_crops": crops} if crops else {}}, tmp_path / "c.pth")
    result = judge(tmp_path / "c.pth", "--cached", "--data_path", tmp_path, *options.split())
    assert (result["size"], result["resize"]) == expected


def test_published_and_torchvision_files_are_judged_as_their_backbone(images, tmp_path):
    network = torchvision.models.resnet18()
    plain = network.state_dict()
    wrapped = {f"module.{name}": weight for name, weight in plain.items() if not name.startswith("fc.")}
    wrapped |= {"module.projection_head.0.weight": torch.zeros(3, 512), "module.prototypes.weight": torch.zeros(3, 3)}
    torch.save(plain, tmp_path / "torchvision.pth")
    torch.save(wrapped, tmp_path / "published.pth.tar")
    torch.save({"epoch": 3, "state_dict": wrapped, "optimizer": {}}, tmp_path / "resumable.pth.tar")
    options = ("--cached", "--data_path", images, "--size", "32")
    results = [judge(path, *options)["rows"] for path in sorted(tmp_path.iterdir())]
    assert len(results) == 3 and results[0] == results[1] == results[2]


def test_judging_over_two_processes_equals_one(trained, images, tmp_path):
    one = judge(trained, "--cached", "--data_path", images)["rows"]
    shutil.copy(trained, tmp_path / "copy.pth")
    words = [tmp_path / "copy.pth", "--cached", "--data_path", images, "--workers", "0", "--device", "cpu"]
    done = torchrun(2, ROOT / "eval_linear.py", *words)
    assert done.returncode == 0, done.stderr
    two = json.loads((tmp_path / "copy.eval.json").read_text())["rows"]
    for name in ("checkpoint", "random init, BatchNorm untouched", "raw pixels"):
        assert two[name] == one[name]


def test_probe_over_two_processes_runs(trained, images, tmp_path):
    shutil.copy(trained, tmp_path / "copy.pth")
    words = [tmp_path / "copy.pth", "--epochs", "2", "--data_path", images, "--workers", "0", "--device", "cpu"]
    done = torchrun(2, ROOT / "eval_linear.py", *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("linear probe, epoch 2/2") == 1
    two = json.loads((tmp_path / "copy.eval.json").read_text())["rows"]["checkpoint"]
    assert two == judge(trained, "--data_path", images)["rows"]["checkpoint"]


def test_linear_classifiers_separate_what_is_separable():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 3
    features = torch.eye(3)[labels] * 4 + torch.randn(300, 3, generator=generator)
    split = features[:200], labels[:200], features[200:]
    for scores in (eval_linear.knn(*split, classes=3), eval_linear.logistic_regression(*split, classes=3)):
        assert eval_linear.accuracies(scores, labels[200:])["top1"] > 90
    padded = F.pad(features, (0, 2**15 - 3))  # so wide that 200 rows are taken in two parts
    in_parts = eval_linear.logistic_regression(padded[:200], labels[:200], padded[200:], classes=3)
    torch.testing.assert_close(in_parts, scores, rtol=1e-3, atol=1e-3)


def test_knn_weights_votes_by_similarity():
    train_features = torch.tensor([[1.0, 0.0], [0.9, 0.5], [0.9, -0.5], [-1.0, 0.0]])
    scores = eval_linear.knn(train_features, torch.tensor([0, 1, 1, 2]), torch.tensor([[2.0, 0.0]]), classes=3, k=3)
    neighbour = math.exp((0.9 / math.hypot(0.9, 0.5) - 1) / 0.07)
    torch.testing.assert_close(scores, torch.tensor([[1.0, 2 * neighbour, 0.0]]))


def test_knn_takes_any_temperature():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 4
    features = 1 + 0.1 * torch.eye(4)[labels] + 0.02 * torch.randn(200, 4, generator=generator)
    for temperature in (0.07, 0.01, 1e-4):
        scores = eval_linear.knn(features, labels, features, classes=4, temperature=temperature)
        assert scores.isfinite().all() and eval_linear.accuracies(scores, labels)["top1"] > 95


def test_features_that_were_constant_do_not_count_where_they_differ():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 3
    features = torch.eye(3)[labels] * 4 + torch.randn(300, 3, generator=generator)
    border = torch.full((300, 50), 0.9)
    border[200:, ::7] = 0.1
    split = torch.cat([features, border], dim=1)[:200], labels[:200], torch.cat([features, border], dim=1)[200:]
    scores = eval_linear.logistic_regression(*split, classes=3)
    torch.testing.assert_close(
        scores, eval_linear.logistic_regression(features[:200], labels[:200], features[200:], classes=3)
    )


def test_batchnorm_statistics_are_those_of_all_images_whatever_their_order():
    """Images in the order of their classes, dark and bright, in a number that leaves a small batch at the end."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 60, (65, 16, 16, 3), generator=generator, dtype=torch.uint8)
    pixels[33:] += 180
    images = ImageArrays(pixels.numpy(), np.zeros(65, dtype=np.int64))
    transform, loading = eval_linear.CentreCrop(16, 16), dict(rank=0, world_size=1, workers=0)
    for batch_size, tolerance in ((16, 0.35), (64, 0.05), (100, 1e-4), (1, None)):
        backbone = ResNet("resnet18", width=8, blocks=[1, 1, 1, 1], stem="small")
        take = dict(device=torch.device("cpu"), title="", batch_size=batch_size, **loading)
        eval_linear.take_batchnorm_statistics(backbone, images, transform, **take)
        maps = backbone.conv1(torch.stack([transform(image) for image, _ in images]))
        if tolerance is None:  # pairs of images
            assert (backbone.bn1.running_mean != 0).all()
        else:
            variance = maps.var((0, 2, 3))
            torch.testing.assert_close(backbone.bn1.running_var, variance, rtol=tolerance, atol=1e-4)
            shift = (backbone.bn1.running_mean - maps.mean((0, 2, 3))) / variance.sqrt()
            assert shift.abs().max() < tolerance


@pytest.mark.parametrize(
    "words, message",
    [
        ("{tmp}/none.pth", "checkpoint: cannot read .*none.pth"),
        ("{tmp}/half.pth", "checkpoint: cannot read .*half.pth"),
        ("{tmp}/other.pth", "checkpoint: expected the weights of a ResNet"),
        ("{tmp}/empty.pth", "checkpoint: expected the weights of a ResNet"),
        ("{tmp}/numbers.pth", "checkpoint: expected the weights of a ResNet"),
        ("{tmp}/nan.pth --data_path {images}", "checkpoint: .*nan.pth holds weights that are nan or inf"),
        ("{trained} --arch resnet50", "--arch: .* holds a resnet18.* got resnet50"),
        ("{trained} --data_path {tmp}", "data_path: expected .*train with a folder of images for each class"),
        ("{trained} --data_path {tmp}/none", "--data_path: expected a folder"),
        ("{trained} --data_path {images} --lr 0", "--lr: expected .* got 0"),
        ("{trained} --data_path {images} --resize 8 --size 16", "--resize: expected at least the 16"),
    ],
)
def test_bad_judging_options_are_refused(words, message, trained, images, tmp_path):
    (tmp_path / "half.pth").write_bytes(b"PK\x03\x04 half a file")
    torch.save({"state_dict": {"fc.weight": torch.zeros(2, 2)}}, tmp_path / "other.pth")
    torch.save({"state_dict": None}, tmp_path / "empty.pth")
    torch.save({0: torch.zeros(2)}, tmp_path / "numbers.pth")
    weights = ResNet("resnet18", width=8).state_dict()
    torch.save(weights | {"conv1.weight": weights["conv1.weight"] * math.nan}, tmp_path / "nan.pth")
    with pytest.raises(ValueError, match=message):
        judge(*words.format(tmp=tmp_path, trained=trained, images=images).split())
