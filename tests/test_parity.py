"""Ten steps against the float64 reference: losses and weights, of one process and of several."""

import json

import pytest
import reference
import torch
from conftest import run_processes
from PIL import Image
from torch.utils.data import DataLoader

import train
from data import MultiCrop, start_epoch, training_loader
from images import open_images
from loss import SwAVLoss
from model import SwAV, checkpoint_activations, data_parallel, statistics_kept, sync_batchnorm
from optim import LARS, warmup_cosine

# The last maps have several pixels and learning rates are low, so that a ReLU flipped by rounding has little effect.
STEPS, BATCH, SIZES = 10, 6, (24, 24, 16, 16)
LEARNING_RATES = {
    dtype: warmup_cosine(5, 2, base_lr=base_lr, final_lr=base_lr / 10, warmup_epochs=1, start_warmup=0.1)
    for dtype, base_lr in ((torch.float64, 0.3), (torch.float32, 0.2))  # at 0.3, AVX-512 gave an error of 1.6e-4
}
PRECISIONS = {torch.float64: 1e-9, torch.float32: 1e-4}  # relative error allowed after ten steps
CASES = {
    "plain": {},
    "queue": {"queue_length": 24, "queue_starts": 2},
    "frozen prototypes": {"freeze": 4},
    "three assigning crops": {"crops_for_assign": (0, 1, 2)},
    "all of them": {"queue_length": 24, "queue_starts": 1, "freeze": 3, "crops_for_assign": (0, 1, 2)},
}


def crops_of_step(step: int, images: int) -> list[torch.Tensor]:
    """V crops of the step's global batch, float64."""
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(images, 3, size, size, generator=generator, dtype=torch.float64) for size in SIZES]


def new_model(dtype: torch.dtype) -> SwAV:
    torch.manual_seed(0)
    model = SwAV("resnet18", hidden_mlp=16, feat_dim=8, nmb_prototypes=12, width=4, blocks=(1, 1, 1, 1), stem="small")
    return model.to(dtype)


def our_steps(
    rank: int,
    world_size: int,
    dtype: torch.dtype,
    batch_size: int,
    queue_length: int = 0,
    queue_starts: int = 0,
    freeze: int = 0,
    crops_for_assign: tuple[int, ...] = (0, 1),
    batch_norm: str = "own",
    relative_epsilon: bool = False,
    parts: int = 1,
    checkpoints: bool = False,
    order: list[int] | None = None,
) -> dict:
    """Train ten steps; return the losses of this process, final weights, queue and BatchNorm statistics.

    batch_norm: statistics "own" (of each process), "eval" (running ones), or "synced" over processes. parts: of the
    batch, see SwAV. checkpoints: of activations. order: of the images of a step, None as they come.
    """
    model = new_model(dtype)
    model.parts = parts
    if checkpoints:
        checkpoint_activations(model)
    if batch_norm == "eval":
        model.eval()
    if batch_norm == "synced" and world_size > 1:
        model = sync_batchnorm(model)
    network = data_parallel(model, torch.device("cpu")) if world_size > 1 else model
    options = dict(epsilon=0.3, relative_epsilon=True) if relative_epsilon else {}
    options["queue_length"] = queue_length // world_size
    swav_loss = SwAVLoss(len(SIZES), crops_for_assign, feat_dim=8, **options).to(dtype)
    optimizer = LARS(model.parameters(), lr=1.0, weight_decay=1e-6)
    losses = []
    for step in range(STEPS):
        if step >= queue_starts:
            swav_loss.start_queue()
        own = slice(rank * batch_size, (rank + 1) * batch_size)
        crops = [crop[order or slice(None)][own].to(dtype) for crop in crops_of_step(step, batch_size * world_size)]
        model.normalize_prototypes()
        loss = swav_loss(*network(crops), model.prototypes.weight)
        optimizer.zero_grad()
        with statistics_kept(model):
            loss.backward()
        if step < freeze:
            model.prototypes.weight.grad = None
        optimizer.param_groups[0]["lr"] = LEARNING_RATES[dtype][step]
        optimizer.step()
        losses.append(loss.item())
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    return {"losses": losses, "weights": weights, "queue": swav_loss.queue, "statistics": dict(model.named_buffers())}


# Of two processes. In float32 one case: the others differ from it by what float64 and a single process show.
OF_TWO = [*((case, torch.float64) for case in CASES), ("all of them", torch.float32)]


def steps_of_all_cases(rank: int, world_size: int) -> list[dict]:
    return [our_steps(rank, world_size, dtype, BATCH, **CASES[case]) for case, dtype in OF_TWO]


def steps_of_one_case(rank: int, world_size: int, options: dict) -> dict:
    return our_steps(rank, world_size, torch.float64, BATCH, **options)


def reference_steps(
    world_size: int,
    batch_size: int,
    learning_rates: list[float],
    queue_length: int = 0,
    queue_starts: int = 0,
    freeze: int = 0,
    crops_for_assign: tuple[int, ...] = (0, 1),
) -> tuple[list[list[float]], dict]:
    """Train ten steps with the reference; return the losses of each step's processes, and the final state."""
    queues = reference.new_queues(queue_length, batch_size, world_size, len(crops_for_assign), 8)
    state = reference.new_state(new_model(torch.float64).state_dict(), world_size, queues)
    losses = []
    for step in range(STEPS):
        crops = crops_of_step(step, batch_size * world_size)
        shares = [[crop[w * batch_size : (w + 1) * batch_size] for crop in crops] for w in range(world_size)]
        options = {"crops_for_assign": crops_for_assign, "freeze_prototypes_niters": freeze}
        options["start_queue"] = step >= queue_starts
        losses.append(reference.train_step(state, shares, learning_rates[step], **options))
    return losses, state


def assert_weights_close(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], relative: float) -> None:
    for name, weight in ours.items():
        # A bias in front of a BatchNorm has no effect and a gradient of zero: in float32, LARS scales up its rounding.
        if name == "projection_head.0.bias" and weight.dtype == torch.float32:
            continue
        error = (weight.double() - expected[name]).norm() / expected[name].norm().clamp_min(1e-3)
        assert error < relative, f"{name}: off by {error:.1e}"


@pytest.mark.parametrize("dtype, relative", PRECISIONS.items(), ids=["float64", "float32"])
@pytest.mark.parametrize("case", CASES)
def test_one_process_follows_the_reference(case, dtype, relative):
    ours = our_steps(0, 1, dtype, BATCH, **CASES[case])
    losses, state = reference_steps(1, BATCH, LEARNING_RATES[dtype], **CASES[case])
    assert ours["losses"] == pytest.approx([loss for (loss,) in losses], rel=relative)
    assert_weights_close(ours["weights"], state["params"], relative)
    if state["queues"]:
        assert state["queues"][0]["filled"] >= 24  # the queue was used
        torch.testing.assert_close(ours["queue"].double(), state["queues"][0]["embeddings"], rtol=0, atol=10 * relative)


def test_two_processes_follow_the_reference():
    processes = run_processes(steps_of_all_cases, 2)
    for i, (case, dtype) in enumerate(OF_TWO):
        relative = PRECISIONS[dtype]
        losses, state = reference_steps(2, BATCH, LEARNING_RATES[dtype], **CASES[case])
        for rank, process in enumerate(processes):
            ours = process[i]
            assert ours["losses"] == pytest.approx([step[rank] for step in losses], rel=relative), case
            assert_weights_close(ours["weights"], state["params"], relative)
            if state["queues"]:
                expected = state["queues"][rank]["embeddings"]
                torch.testing.assert_close(ours["queue"].double(), expected, rtol=0, atol=10 * relative)


@pytest.mark.parametrize("batch_norm", ["eval", "synced"])
def test_two_processes_equal_one_with_twice_the_batch(batch_norm):
    """Only BatchNorm statistics of single processes depend on which process has which images."""
    options = {"queue_length": 24, "queue_starts": 1, "batch_norm": batch_norm}
    processes = run_processes(steps_of_one_case, 2, options)
    alone = our_steps(0, 1, torch.float64, 2 * BATCH, **options)
    means = [sum(pair) / 2 for pair in zip(*(process["losses"] for process in processes), strict=True)]
    assert means == pytest.approx(alone["losses"], rel=1e-9)
    for process in processes:
        assert_weights_close(process["weights"], alone["weights"], 1e-9)
        assert process["statistics"].keys() == alone["statistics"].keys()
        for name, statistic in alone["statistics"].items():
            torch.testing.assert_close(process["statistics"][name], statistic, rtol=1e-9, atol=1e-12)


def assert_equal_runs(ours: dict, expected: dict) -> None:
    assert ours["losses"] == pytest.approx(expected["losses"], rel=1e-9)
    assert_weights_close(ours["weights"], expected["weights"], 1e-9)
    for tensors in ("queue", "statistics"):
        torch.testing.assert_close(ours[tensors], expected[tensors], rtol=1e-9, atol=1e-9)


WITH_ALL = {"queue_length": 24, "queue_starts": 1, "freeze": 3, "batch_norm": "eval", "relative_epsilon": True}


@pytest.mark.parametrize("parts, checkpoints", [(2, False), (3, True), (1, True)])
@pytest.mark.parametrize("options", [{"batch_norm": "eval"}, WITH_ALL], ids=["plain", "all"])
def test_a_batch_in_parts_equals_the_undivided_batch(options, parts, checkpoints):
    """Without BatchNorm's statistics of the batch, which each part has of its own."""
    whole = our_steps(0, 1, torch.float64, BATCH, **options)
    assert_equal_runs(our_steps(0, 1, torch.float64, BATCH, parts=parts, checkpoints=checkpoints, **options), whole)


def steps_in_parts(rank: int, world_size: int) -> list[dict]:
    settings = {}, {"parts": 3}, {"parts": 3, "batch_norm": "synced", "checkpoints": True}
    return [our_steps(rank, world_size, torch.float64, BATCH, **(WITH_ALL | options)) for options in settings]


def test_batches_of_two_processes_in_parts():
    """They equal undivided ones; with BatchNorm over processes, those of one process whose parts have their images."""
    processes = run_processes(steps_in_parts, 2)
    images = torch.arange(2 * BATCH).view(2, 3, -1).transpose(0, 1).flatten().tolist()
    expected = our_steps(0, 1, torch.float64, 2 * BATCH, parts=3, order=images, **{**WITH_ALL, "batch_norm": "own"})
    means = [[sum(pair) / 2 for pair in zip(*losses, strict=True)] for losses in zip(
        *([of_setting["losses"] for of_setting in process] for process in processes), strict=True)]  # fmt: skip
    assert means[2] == pytest.approx(expected["losses"], rel=1e-9)
    for whole, in_parts, synced in processes:
        assert_equal_runs(in_parts, whole)
        assert_weights_close(synced["weights"], expected["weights"], 1e-9)
        torch.testing.assert_close(synced["statistics"], expected["statistics"], rtol=1e-9, atol=1e-9)


def double_precision_loader(*args, **options) -> DataLoader:
    loader = training_loader(*args, **options)
    collate = loader.collate_fn
    loader.collate_fn = lambda batch: ([crop.double() for crop in collate(batch)[0]], None)
    return loader


@pytest.fixture
def double_precision(monkeypatch):
    monkeypatch.setattr(train, "training_loader", double_precision_loader)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_a_run_of_train_follows_the_reference(tmp_path, double_precision):
    """train.py on image files, with schedule, freeze and queue, by its metrics and its checkpoint."""
    generator = torch.Generator().manual_seed(1)
    (tmp_path / "images").mkdir()
    for i in range(13):
        pixels = torch.randint(0, 256, (24, 20, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / "images" / f"{i}.png")
    options = f"""--data_path {tmp_path}/images --nmb_crops 2 2 --size_crops 16 9 --min_scale_crops 0.3 0.1
        --max_scale_crops 1 0.3 --blur_sigma 2 --arch resnet18 --width 4 --blocks 1 1 1 1 --stem small --hidden_mlp 16
        --feat_dim 8 --nmb_prototypes 12 --batch_size 4 --epochs 4 --warmup_epochs 1 --start_warmup 0.3 --base_lr 2
        --final_lr 0.1 --freeze_prototypes_niters 5 --queue_length 8 --epoch_queue_starts 1 --seed 7 --workers 0
        --log_freq 1 --temperature 0.1 --epsilon 0.05 --augment workers --device cpu --dump_path {tmp_path}/run"""
    args = train.parse_args(options.split())
    train.main(args)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = [row["loss"] for row in rows if "loss" in row]

    torch.manual_seed(7)
    state = reference.new_state(train.build_model(args).state_dict(), 1, reference.new_queues(8, 4, 1, 2, 8))
    multicrop = MultiCrop([16, 9], [2, 2], [0.3, 0.1], [1, 0.3])
    loader = training_loader(open_images("folder", tmp_path / "images"), multicrop, 4, seed=7)
    learning_rates = reference.learning_rates(3, 4, 2.0, 0.1, 1, 0.3)
    expected = []
    for epoch in range(4):
        for crops, _ in start_epoch(loader, epoch):
            options = {"freeze_prototypes_niters": 5, "start_queue": epoch >= 1}
            expected += reference.train_step(state, [crops], learning_rates[state["step"]], **options)
    assert len(logged) == 12
    assert logged == pytest.approx(expected, rel=1e-9)
    contents = torch.load(tmp_path / "run" / "checkpoint.pth")
    assert_weights_close({n: contents["state_dict"][n] for n in state["params"]}, state["params"], 1e-9)
    torch.testing.assert_close(contents["queue"]["embeddings"], state["queues"][0]["embeddings"], rtol=0, atol=1e-8)
