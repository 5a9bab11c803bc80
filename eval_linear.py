"""Evaluate a checkpoint: linear probe and kNN on its frozen features (Caron et al. 2020, section 4.1, appendix A).

    python eval_linear.py                                              # newest checkpoint in runs/, on its own images
    python eval_linear.py runs/shapes/checkpoint.pth --cached          # quick: one pass over the images, no crops
    torchrun --nproc_per_node=4 eval_linear.py swav_800ep_pretrain.pth.tar --data_path imagenet

Takes checkpoints of train.py, published SwAV files and torchvision ResNets, and reads the architecture off the weights.
Next to the results it prints those of random weights and of raw pixels: useful features beat both.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset

import checkpoint
from backbones import arch_name, choose_sizes, describe, load_backbone, new_backbone, start_backbone
from data import CentreCrop, ProbeCrop, reuse_freed_memory, start_epoch, training_loader
from decode import shown
from features import accuracies, baselines, bf16_on_gpus, evaluate_features, extract_features
from images import DATASETS, BadImages, fingerprint, open_splits, typical_side
from launch import (
    OptionParser,
    RunStopped,
    UserError,
    epoch_count,
    log,
    nonnegative,
    nonnegative_int,
    positive,
    positive_int,
    track,
    workers_or_auto,
)
from machine import choose_device, set_threads_and_workers, workers_that_fit
from processes import check_same, leave_processes, run_script, setup_processes


def option_parser() -> OptionParser:
    parser = OptionParser(
        prog="eval_linear.py",
        usage="eval_linear.py [checkpoint] [options]",
        description="Evaluate a checkpoint by a linear probe and kNN on its frozen features, next to random weights\n"
        "and raw pixels. Without a checkpoint it takes the newest runs/*/checkpoint.pth.",
        epilog="The images need labels: train/ and val/, with a folder per class in each.\n"
        "--help-all shows the other options.",
    )
    parser.start_group("checkpoint and images", affects="nothing")
    checkpoint_option = parser.group.add_argument(
        "checkpoint", nargs="?", help="Evaluate this file, ours, a published SwAV one or a torchvision ResNet."
    )
    parser.common.append(checkpoint_option)
    add = parser.add
    add("pretrained", None, str, "alias for the checkpoint")
    add("data_path", None, str, "Evaluate on this folder with train/ and val/.", common="DIR",
        default_text="as in training")  # fmt: skip
    add("dataset", None, str, "Evaluate on this named data set.", common="NAME", choices=DATASETS,
        default_text="folder with --data_path, else as in training")  # fmt: skip
    add("arch", None, arch_name, "refuse a checkpoint of another architecture (default: take any); weights of a "
        "network of timm need it: timm/NAME")  # fmt: skip
    add("size", None, positive_int, "Resize images to this many pixels.", common="N",
        default_text="their own; for larger images that of the training crops, or 224")  # fmt: skip
    add("resize", None, positive_int, "shorter side in pixels before the centre crop (default: 8/7 of --size for "
        "larger images, else --size)")  # fmt: skip
    add("max_bad_images", None, nonnegative_int, "unreadable images of a split up to which the evaluation goes on, "
        "without them (default: 1 %% of the split, at least 1)")  # fmt: skip
    parser.start_group("evaluation", affects="nothing")
    parser.common.append(
        parser.group.add_argument(
            "--cached",
            action="store_true",
            help="Fit a logistic regression to cached features, instead of SGD over random crops: quick.",
        )
    )
    add("epochs", 100, epoch_count, "Train the linear probe for this many epochs.", common="N")
    add("batch_size", None, positive_int, "images per process (default: 256 over all processes)")
    add(
        "lr",
        0.3,
        positive,
        "learning rate at the start of the cosine schedule, for 256 images over all processes; not rescaled",
    )
    add("wd", 1e-6, nonnegative, "weight decay")
    add("knn_k", 20, positive_int, "Let this many nearest neighbours vote.", common="N")
    add("knn_temperature", 0.07, positive, "temperature of their votes; lower gives the nearest more weight")
    parser.start_group("machine", affects="nothing")
    add("workers", "auto", workers_or_auto, "Load images in this many processes, or auto.", common="N")
    add("device", "auto", str, "Use cuda, cpu, mps, or auto: cuda if there is such a GPU, else cpu.",
        common="NAME", choices=("auto", "cuda", "cpu", "mps"))  # fmt: skip
    add("seed", 31, nonnegative_int, "Seed the probe and the random weights.", common="N")
    return parser


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """The options of a command line, in `_` or `-` spelling. Raises UserError."""
    args = option_parser().parse_args(argv)
    if None not in (args.checkpoint, args.pretrained):
        raise UserError(f"--pretrained {args.pretrained}: expected none beside the checkpoint {args.checkpoint}")
    args.checkpoint = args.pretrained if args.checkpoint is None else args.checkpoint
    return args


def check_args(args: argparse.Namespace) -> None:
    """Raise UserError, naming option, value and what is accepted."""
    if args.checkpoint == "":
        raise UserError("checkpoint: expected a file, got an empty name; leave it out for the newest in runs/")
    if args.dataset == "shapes" and args.data_path is not None:
        raise UserError(
            f"--data_path: expected none for --dataset shapes, whose images are drawn, got {args.data_path}"
        )
    if args.data_path is not None and args.dataset in (None, "folder") and not os.path.isdir(args.data_path):
        raise UserError(f"--data_path: expected a folder, got {args.data_path}, which is none")


def options_without_effect(args: argparse.Namespace) -> list[str]:
    """A line for each option that the user set and that changes nothing."""
    default = option_parser().get_default
    idle = [name for name in ("epochs", "lr", "wd") if args.cached and getattr(args, name) != default(name)]
    return [f"--{name} {getattr(args, name)} has no effect with --cached, which fits without SGD" for name in idle]


# What is evaluated, on which images


def choose_images(args: argparse.Namespace, trained: dict) -> tuple[str, str | None]:
    """Data set and folder: those asked for, else those of the checkpoint's training, else shapes."""
    if args.dataset or args.data_path:
        return args.dataset or "folder", args.data_path
    return trained.get("dataset", "shapes"), trained.get("data_path")


def count_bad_images(bad_images: dict[str, BadImages]) -> dict[str, int]:
    """{split: images that cannot be read}, over all processes; logs which. Raises UserError if there are too many."""
    try:
        counts = {split: bad.update() for split, bad in bad_images.items()}
    except RunStopped as error:
        raise UserError(str(error)) from None
    for split, bad in bad_images.items():
        if bad.reasons:
            some = "; ".join(f"{shown(path)} ({reason})" for path, reason in list(bad.reasons.items())[:3])
            log(f"left out, as they cannot be read: {len(bad.reasons)} of {len(bad.images)} {split} images: {some}")
    return counts


# Evaluation


def linear_probe(
    backbone: nn.Module,
    train_images: Dataset,
    val_images: Dataset,
    train_transform: Callable,
    val_transform: Callable,
    device: torch.device,
    *,
    classes: int,
    epochs: int = 100,
    batch_size: int = 256,
    lr: float = 0.3,
    weight_decay: float = 1e-6,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Train the paper's linear probe: SGD on random crops, cosine schedule per epoch.

    batch_size is per process, lr for the batches of all. Returns scores [N, classes] and labels of the val images.
    """
    torch.manual_seed(seed)
    linear = nn.Linear(backbone.num_features, classes).to(device)
    nn.init.normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
    probe = linear
    if world_size > 1:
        probe = DistributedDataParallel(linear, device_ids=[device.index] if device.type == "cuda" else None)
    optimizer = torch.optim.SGD(linear.parameters(), lr=lr, momentum=0.9, weight_decay=weight_decay)
    batch_size = min(batch_size, len(train_images) // world_size)
    sharing = dict(rank=rank, world_size=world_size, workers=workers)
    pin_memory = device.type == "cuda"
    loader = training_loader(train_images, train_transform, batch_size, seed=seed, pin_memory=pin_memory, **sharing)
    start = time.perf_counter()
    for epoch in range(epochs):
        optimizer.param_groups[0]["lr"] = 0.5 * lr * (1 + math.cos(math.pi * epoch / epochs))
        batches = start_epoch(loader, epoch)
        total_loss = torch.zeros((), device=device)
        for images, labels in track(batches, f"linear probe, epoch {epoch + 1}/{epochs}"):
            images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
            with torch.no_grad(), bf16_on_gpus(device):
                features = backbone(images).float()
            loss = F.cross_entropy(probe(features), labels.to(device, non_blocking=True))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total_loss += loss.detach()
        left = timedelta(seconds=round((time.perf_counter() - start) / (epoch + 1) * (epochs - epoch - 1)))
        mean_loss = total_loss.item() / len(loader)
        if not math.isfinite(mean_loss):
            raise RunStopped(f"linear probe: the loss is {mean_loss} in epoch {epoch + 1}; try a lower --lr", code=4)
        log(f"linear probe, epoch {epoch + 1}/{epochs}: loss {mean_loss:.4f}  ETA {left}")
    features, labels = extract_features(
        backbone, val_images, val_transform, device, "validation", batch_size=batch_size, **sharing
    )
    with torch.no_grad():
        return linear(features), labels


def evaluate(args: argparse.Namespace, rank: int, world_size: int, device: torch.device) -> dict:
    """Evaluate the checkpoint, random weights and raw pixels; returns what is written to NAME.eval.json."""
    path = Path(args.checkpoint) if args.checkpoint else checkpoint.newest_checkpoint()
    backbone, architecture, trained = load_backbone(path, args.arch)
    dataset, data_path = choose_images(args, trained)
    train_images, val_images = open_splits(dataset, data_path, world_size, trained.get("value_range"))
    splits = {"train": train_images, "val": val_images}
    bad_images = {split: BadImages(images, args.max_bad_images) for split, images in splits.items()}
    if world_size > 1:
        found = {"training": fingerprint(train_images), "validation": fingerprint(val_images)}
        check_same("comparing images", {f"{part} {key}": value for part in found for key, value in found[part].items()})
    size, resize = choose_sizes(
        trained, typical_side(val_images), is_folder=dataset == "folder", size=args.size, resize=args.resize
    )
    classes, val_transform = len(train_images.classes), CentreCrop(resize, size)
    reuse_freed_memory()
    batch_size = args.batch_size or max(1, 256 // world_size)
    workers = workers_that_fit(set_threads_and_workers(args.workers, device), 12 * batch_size * size**2)
    loading = dict(rank=rank, world_size=world_size, workers=workers, batch_size=batch_size)
    log(
        f"{path}: {describe(architecture)}, {backbone.num_features} features; "
        f"{dataset}{f' in {data_path}' if data_path else ''}: {len(train_images)} training and {len(val_images)} "
        f"validation images of {classes} classes, {size} pixels; {device}, {world_size} process(es)"
    )

    evaluation = train_images, val_images, val_transform, device
    options = dict(classes=classes, knn_k=args.knn_k, knn_temperature=args.knn_temperature, **loading)
    log("checkpoint ...")
    rows = {"checkpoint": evaluate_features(backbone, *evaluation, with_linear=args.cached, **options)}
    count_bad_images(bad_images)  # all have been read once
    if not args.cached:
        probing = dict(classes=classes, epochs=args.epochs, lr=args.lr, weight_decay=args.wd, seed=args.seed, **loading)
        transforms = ProbeCrop(size), val_transform
        scores, labels = linear_probe(backbone, train_images, val_images, *transforms, device, **probing)
        rows["checkpoint"]["linear"] = accuracies(scores, labels)
    if (start := start_backbone(trained)) is not None:
        rows[f"the start, {trained['init']}"] = evaluate_features(start, *evaluation, **options)
    torch.manual_seed(args.seed)
    rows |= baselines(new_backbone(architecture), *evaluation, **options)
    return {
        "checkpoint": str(path),
        "dataset": dataset,
        "data_path": data_path,
        "size": size,
        "resize": resize,
        "linear_probe": "cached features" if args.cached else f"random crops, {args.epochs} epochs",
        "knn_k": args.knn_k,
        "knn_temperature": args.knn_temperature,
        "seed": args.seed,
        "left_out": count_bad_images(bad_images),
        "rows": rows,
    }


def print_table(result: dict) -> None:
    log(f"\nlinear probe of the checkpoint: {result['linear_probe']}; of the others: cached features")
    log(f"{'accuracy in %':46s}  linear top-1  top-5    kNN top-1  top-5    feature std (0: collapsed)")
    for name, row in result["rows"].items():
        cells = [row[kind][top] for kind in ("linear", "knn") for top in ("top1", "top5")]
        log("{:46s}  {:12.1f} {:6.1f} {:12.1f} {:6.1f}    {:6.2f}".format(name, *cells, row["spread"]))


def main(args: argparse.Namespace) -> dict:
    """Evaluate, print the table, and write NAME.eval.json next to the checkpoint. Raises UserError for bad input."""
    device = choose_device(args.device)
    rank, world_size = setup_processes(device)
    check_args(args)
    for line in options_without_effect(args):
        log(line)
    check_same("comparing options", {f"--{n}": v for n, v in vars(args).items() if n not in ("data_path", "workers")})
    result = evaluate(args, rank, world_size, device)
    print_table(result)
    if rank == 0:
        path = Path(result["checkpoint"]).with_suffix(".eval.json")
        try:
            path.write_text(json.dumps(result, indent=1) + "\n")
            log(f"written to {path}")
        except OSError as error:
            log(f"not written to {path}: {error.strerror}")
    leave_processes()
    return result


if __name__ == "__main__":
    run_script(lambda: main(parse_args(sys.argv[1:])))
