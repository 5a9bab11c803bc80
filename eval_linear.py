"""Evaluate a checkpoint with labels: a linear probe and kNN on its frozen features, or fine-tuning on few labels.

    python eval_linear.py                                              # newest checkpoint in runs/
    python eval_linear.py runs/shapes/checkpoint.pth --cached          # quick: no random crops
    python eval_linear.py runs/shapes/checkpoint.pth --finetune --labels 0.1
    torchrun --nproc_per_node=4 eval_linear.py swav_800ep_pretrain.pth.tar --data_path imagenet

Takes every file that train.py --init takes, and reads the architecture from its weights.
Next to the results it prints those of random init and of raw pixels: useful features beat both. Rerun the
command to resume training. NAME.eval.json keeps the results of every kind. Source: Caron et al. 2020, section 4.1,
appendix A.
"""

import argparse
import json
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

import checkpoint
import page
from backbones import add_size_options, arch_name, choose_sizes, describe, load_backbone, new_backbone, start_backbone
from data import CentreCrop, ProbeCrop, reuse_freed_memory
from decode import shown
from features import (
    accuracies,
    accuracy_by_class,
    baselines,
    confusion_matrix,
    evaluate_features,
    extract_features,
    features_and_knn,
    logistic_regression,
)
from images import DATASETS, BadImages, check_data_path, fingerprint, open_splits, typical_side
from labels import ChosenImages, listed_images, stratified
from launch import (
    OptionParser,
    RunStopped,
    UserError,
    as_command_line,
    epoch_count,
    log,
    nonnegative,
    nonnegative_int,
    number,
    positive,
    positive_int,
)
from machine import add_machine_options, choose_device, set_threads_and_workers, workers_that_fit
from probes import SWEEP_LR, SWEEP_WD, Progress, fine_tune, fine_tuning_defaults, linear_probe
from processes import check_same, leave_processes, run_script, setup_processes

HELD_OUT = 0.1, 10_000  # share of the training images that choose the best of a sweep, and at most so many
RANDOM = "random init"  # a network of the same architecture with fresh weights
OUTCOMES = ("checkpoint", "images", "left_out", "rows", "sweep", "chosen", "per_class", "seconds", "results")


def option_parser() -> OptionParser:
    parser = OptionParser(
        prog="eval_linear.py",
        fromfile_prefix_chars="@",
        usage="eval_linear.py [checkpoint] [options]",
        description="Evaluate a checkpoint by a linear probe and kNN on its frozen features, or by fine-tuning.\n"
        "Without a checkpoint it takes the newest runs/*/checkpoint.pth. @FILE reads options from a file.",
        epilog="The images need labels: train/ and val/, with a folder per class in each. --help-all: all options.",
    )
    parser.start_group("checkpoint and images", affects="nothing")
    help = "Evaluate this checkpoint, of ours or of another program."
    parser.common.append(parser.group.add_argument("checkpoint", nargs="?", help=help))
    add = parser.add
    add("pretrained", None, str, "alias for the checkpoint")
    add("data_path", None, str, "Evaluate on this folder with train/ and val/.", common="DIR",
        default_text="as in training")  # fmt: skip
    add("dataset", None, str, "Evaluate on this named data set.", common="NAME", choices=DATASETS,
        default_text="folder with --data_path, else as in training")  # fmt: skip
    add("val_share", None, share, "validate on this share of each class, chosen by --seed, if there is only one folder "
        "of class folders (default: use val/)")  # fmt: skip
    add("val_labels", None, str, "file with a line NAME CLASS for each image of a val/ without class folders; CLASS is "
        "a folder of train/ or its number from 0. Also ImageNet's ILSVRC2012_validation_ground_truth.txt, beside "
        "its meta.mat")  # fmt: skip
    add("arch", None, arch_name, "refuse a checkpoint of another architecture (default: take any); weights of a "
        "network of timm need it: timm/NAME")  # fmt: skip
    add_size_options(parser)
    add("max_bad_images", None, nonnegative_int, "stop if more images of a split than this cannot be read; until "
        "then they are left out (default: 1 %% of the split, at least 1)")  # fmt: skip
    parser.start_group("evaluation", affects="nothing")

    def add_flag(name: str, help: str) -> None:
        parser.common.append(parser.group.add_argument(f"--{name}", action="store_true", help=help))

    add_flag("cached", "Fit a logistic regression to cached features, without random crops: quick.")
    add_flag("finetune", "Train all weights on the labels, not only a classifier.")
    add_flag("sweep", "Probe with several learning rates and weight decays at once.")
    add("labels", None, share, "Use this share of each class, such as 0.01, chosen by --seed.", common="SHARE",
        default_text="all")  # fmt: skip
    add("subset", None, str, "use the training images that this file lists, one name a line, as the published 1 %% and "
        "10 %% of ImageNet (default: all)")  # fmt: skip
    add("epochs", None, epoch_count, "Train for this many epochs.", common="N",
        default_text="100; --finetune: 20, more for few labels")  # fmt: skip
    add("batch_size", None, positive_int, "images per process (default: 256 over all processes; with --finetune fewer "
        "below 4,096 images)")  # fmt: skip
    add("lr", None, or_file(positive), "learning rate for the batches of all processes, not rescaled; several with "
        f"--sweep (default: 0.3; --sweep: {' '.join(map(str, SWEEP_LR))}; --finetune: for the backbone, "
        "0.01 * sqrt(batch / 256))", nargs="+")  # fmt: skip
    add("lr_last_layer", None, positive, "learning rate of --finetune's classifier (default: 0.2 * sqrt(batch / 256))")
    add("wd", None, or_file(nonnegative), "weight decay; several with --sweep (default: 1e-6; --finetune: 0; --sweep: "
        f"{' '.join(map(str, SWEEP_WD))})", nargs="+")  # fmt: skip
    add("knn_k", [20], or_file(positive_int), "Let this many neighbours vote; several are compared.", nargs="+",
        common="N")  # fmt: skip
    add("knn_temperature", 0.07, positive, "temperature of their votes; lower gives the nearest more weight")
    add("compare", "on", str, "on: evaluate random init and raw pixels too; off: the checkpoint alone",
        choices=("on", "off"))  # fmt: skip
    help = "print and save the accuracy of each class, and draw the confusion matrix"
    parser.group.add_argument("--per_class", action="store_true", help=help)
    parser.start_group("machine", affects="nothing")
    add_machine_options(parser)
    add("seed", 31, nonnegative_int, "Seed what is chosen at random, the probe and random init.", common="N")
    return parser


def share(text: str) -> float:
    """The type of an option: a number above 0 and below 1."""
    value = number(float, 0, above=True, most=1)(text)
    if value == 1:
        raise argparse.ArgumentTypeError(f"expected a share below 1, as 0.1 for 10 %, got {text}")
    return value


def or_file(kind: Callable[[str], float]) -> Callable[[str], float | str]:
    """The type of an option of several values, behind which a checkpoint may be typed, see `parse_args`."""

    def parse(text: str) -> float | str:
        is_file = text.endswith((".pth", ".pt", ".tar", ".safetensors")) or os.path.isfile(text)
        return text if is_file else kind(text)

    return parse


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """The options of a command line, in `_` or `-` spelling. Raises UserError."""
    args = option_parser().parse_args(argv)
    for name in ("lr", "wd", "knn_k"):  # argparse gives them the checkpoint that is typed behind them
        values = getattr(args, name) or []
        if args.checkpoint is None and len(values) > 1 and isinstance(values[-1], str):
            args.checkpoint = values.pop()
        for word in values:
            if isinstance(word, str):
                raise UserError(f"--{name}: expected numbers, got {word}")
    if args.checkpoint is None:
        args.checkpoint = args.pretrained
    elif args.pretrained is not None:
        raise UserError(f"--pretrained {args.pretrained}: expected none with the checkpoint {args.checkpoint}")
    return args


def check_args(args: argparse.Namespace) -> None:
    """Raise UserError, naming option, value and what is accepted."""
    if args.checkpoint == "":
        raise UserError("checkpoint: expected a file, got an empty name; leave it out for the newest in runs/")
    if args.dataset == "shapes" and args.data_path is not None:
        raise UserError(
            f"--data_path: expected none for --dataset shapes, whose images are drawn, got {args.data_path}"
        )
    if args.data_path is not None and args.dataset in (None, "folder"):
        check_data_path(args.data_path)
    for pair in (("cached", "finetune"), ("cached", "sweep"), ("finetune", "sweep"), ("labels", "subset"),
                 ("val_share", "val_labels")):  # fmt: skip
        if all(getattr(args, name) not in (None, False) for name in pair):
            raise UserError(f"--{pair[0]}: expected none with --{pair[1]}; use one of the two")
    for name in ("lr", "wd"):
        values = getattr(args, name) or []
        if len(values) > 1 and not args.sweep:
            raise UserError(f"--{name}: expected one value, or --sweep for several, got {' '.join(map(str, values))}")


def options_without_effect(args: argparse.Namespace) -> list[str]:
    """A line for each option that the user set and that changes nothing."""
    reasons = {}
    if args.cached:
        reasons |= dict.fromkeys(("epochs", "lr", "wd"), "with --cached, which fits without SGD")
    if args.finetune:
        reasons |= dict.fromkeys(("knn_k", "knn_temperature"), "with --finetune, which has no neighbours")
    else:
        reasons["lr_last_layer"] = "without --finetune"
    default = option_parser().get_default
    idle = {name: getattr(args, name) for name in reasons if getattr(args, name) != default(name)}
    return [f"{as_command_line({name: value})} has no effect {reasons[name]}" for name, value in idle.items()]


# Evaluation


def log_bad_images(bad_images: dict[str, BadImages]) -> None:
    """Log which images of each split cannot be read, over all processes. Raises UserError if they are too many."""
    for split, bad in bad_images.items():
        try:
            bad.update()
        except RunStopped as error:
            raise UserError(str(error)) from None
        if bad.reasons:
            some = "; ".join(f"{shown(path)} ({reason})" for path, reason in list(bad.reasons.items())[:3])
            log(f"left out, as they cannot be read: {len(bad.reasons)} of {len(bad.images)} {split} images: {some}")


def weights_checksum(network: nn.Module) -> str:
    """CRC-32 of a network's weights and statistics, in hexadecimal: the same for the same file."""
    checksum = 0
    for tensor in network.state_dict().values():
        checksum = zlib.crc32(tensor.cpu().contiguous().numpy(), checksum)
    return f"{checksum:08x}"


def open_labelled(
    args: argparse.Namespace, dataset: str, data_path: str | None, world_size: int, value_range: tuple | None
) -> tuple[Dataset, Dataset]:
    """Training images, or the part of them that the options ask for, and validation images. Raises UserError."""
    if args.val_labels is not None and dataset != "folder":
        raise UserError(f"--val_labels: expected images in a folder, got --dataset {dataset}")
    options = dict(val_share=args.val_share, val_labels=args.val_labels, seed=args.seed)
    train_images, val_images = open_splits(dataset, data_path, world_size, value_range, **options)
    all_images = len(train_images)
    if args.labels is not None:
        train_images = ChosenImages(train_images, stratified(train_images.labels, args.labels, args.seed))
    if args.subset is not None:
        train_images = listed_images(train_images, args.subset)
    if len(train_images) < all_images:
        log(f"data: {len(train_images):,} of {all_images:,} training images are used with their labels")
    if len(train_images) < world_size:
        raise UserError(f"--labels, --subset: they leave {len(train_images)} images for {world_size} processes")
    return train_images, val_images


class Setup(NamedTuple):
    """What is evaluated, and on what."""

    networks: dict[str, nn.Module]  # the backbone of the "checkpoint" and, to compare, one of RANDOM weights
    progress: dict[str, Progress]  # of what trains on each
    trained: dict  # options of the backbone's training
    train_images: Dataset
    val_images: Dataset
    bad_images: dict[str, BadImages]
    crop: ProbeCrop
    transform: CentreCrop
    pixel_transform: CentreCrop  # of raw pixels: does not enlarge images
    device: torch.device
    loading: dict[str, int]
    settings: dict


Rated = tuple[dict, tuple[torch.Tensor, torch.Tensor], dict]


def evaluate_frozen(setup: Setup) -> Rated:
    """Probe frozen features: (outcomes, (scores, labels) of the checkpoint's classifier, its weights if it trained)."""
    evaluation = setup.train_images, setup.val_images, setup.transform, setup.device
    options = {name: setup.settings[name] for name in ("knn_k", "knn_temperature")} | setup.loading
    log("checkpoint ...")
    splits, row = features_and_knn(setup.networks["checkpoint"], *evaluation, **options)
    features, labels, *validation = splits
    log_bad_images(setup.bad_images)  # all have been read once
    if setup.settings["kind"] == "cached":
        scores = logistic_regression(features, labels, validation[0], classes=len(setup.train_images.classes))
        weights, outcomes = {}, {}
    else:
        del splits, features  # may be large
        scores, weights, row["linear_by_epoch"], outcomes = probe(setup, validation)
    row["linear"] = accuracies(scores, validation[1])
    rows = {"checkpoint": row}
    if RANDOM in setup.networks:
        if (start := start_backbone(setup.trained)) is not None:
            rows[f"the start, {setup.trained['init']}"] = evaluate_features(start, *evaluation, **options)
        rows |= baselines(setup.networks[RANDOM], *evaluation, pixel_transform=setup.pixel_transform, **options)
    return outcomes | {"rows": rows}, (scores, validation[1]), weights


def probe(setup: Setup, validation: Sequence[torch.Tensor]) -> tuple[torch.Tensor, dict, dict[str, float], dict]:
    """Train the linear probe, or those of a sweep: (scores of validation images, weights, top-1 by epoch, outcomes).

    The best of a sweep is chosen on training images that no classifier was trained on: validation images that choose
    would make their own accuracy too high.
    """
    images, settings, held_out, best, outcomes = setup.train_images, setup.settings, None, 0, {}
    rates = [(lr, decay) for lr in settings["lr"] for decay in settings["wd"]]
    if settings["kind"] == "sweep":
        part = min(HELD_OUT[0], HELD_OUT[1] / len(images))
        chosen = stratified(images.labels, part, settings["seed"], leave_one=True)
        if not len(chosen):
            raise UserError("--sweep: expected two training images or more of a class, to hold one out, found none")
        held_out = ChosenImages(images, chosen)
        images = ChosenImages(images, np.setdiff1d(np.arange(len(images)), chosen))
        if len(images) < setup.loading["world_size"]:
            raise UserError(f"--sweep: {len(images)} images are left for {setup.loading['world_size']} processes")
    heads, fitted = linear_probe(
        setup.networks["checkpoint"], images, setup.crop, validation, setup.device,
        classes=len(images.classes), rates=rates, epochs=settings["epochs"], seed=settings["seed"],
        progress=setup.progress["checkpoint"], **setup.loading,
    )  # fmt: skip
    if held_out:
        held_features, held_labels = extract_features(
            setup.networks["checkpoint"], held_out, setup.transform, setup.device, "held-out images", **setup.loading
        )
        with torch.no_grad():
            held_scores = heads(held_features)
        rows = [{"lr": lr, "wd": decay} for lr, decay in rates]
        for i, row in enumerate(rows):
            row["held_out"] = accuracies(held_scores[i], held_labels)
            row["val"] = accuracies(fitted["scores"][i], validation[1])
        best = max(range(len(rates)), key=lambda i: rows[i]["held_out"]["top1"])
        outcomes = {"sweep": rows, "chosen": {"lr": rates[best][0], "wd": rates[best][1], "held_out": len(held_out)}}
    by_epoch = {str(epoch): top1[best] for epoch, top1 in fitted["history"].items()}
    weights = {name: value.cpu() for name, value in heads.heads[best].state_dict(prefix="fc.").items()}
    return fitted["scores"][best], weights, by_epoch, outcomes


def evaluate_finetuned(setup: Setup) -> Rated:
    """Fine-tune the checkpoint, and random init: (outcomes, (scores, labels) of the checkpoint, all its weights)."""
    rows, settings, rated, weights = {}, setup.settings, None, {}
    for name, backbone in setup.networks.items():
        network, fitted = fine_tune(
            backbone, setup.train_images, setup.val_images, setup.crop, setup.transform, setup.device,
            classes=len(setup.train_images.classes), lr=settings["lr"][0], lr_last_layer=settings["lr_last_layer"],
            weight_decay=settings["wd"][0], epochs=settings["epochs"], seed=settings["seed"],
            title=f"fine-tuning {name}", progress=setup.progress[name], **setup.loading,
        )  # fmt: skip
        scores, labels = fitted["scores"][0], fitted["labels"]
        by_epoch = {str(epoch): top1 for epoch, (top1,) in fitted["history"].items()}
        rows[name] = {"finetune": accuracies(scores, labels), "finetune_by_epoch": by_epoch}
        if name == "checkpoint":
            log_bad_images(setup.bad_images)  # all have been read once
            rated, weights = (scores, labels), network.backbone.state_dict()
            weights |= network.heads.heads[0].state_dict(prefix="fc.")
            weights = {key: value.cpu() for key, value in weights.items()}
    return {"rows": rows}, rated, weights


def evaluate(args: argparse.Namespace, rank: int, world_size: int, device: torch.device) -> dict:
    """Evaluate the checkpoint, random init and raw pixels; returns and saves the result, next to earlier ones."""
    start = time.perf_counter()
    path = Path(args.checkpoint) if args.checkpoint else checkpoint.newest_checkpoint()
    backbone, architecture, trained = load_backbone(path, args.arch)
    dataset, data_path = trained.get("dataset", "shapes"), trained.get("data_path")
    if args.dataset or args.data_path:
        dataset, data_path = args.dataset or "folder", args.data_path
    train_images, val_images = open_labelled(args, dataset, data_path, world_size, trained.get("value_range"))
    splits = {"train": train_images, "val": val_images}
    bad_images = {split: BadImages(images, args.max_bad_images) for split, images in splits.items()}
    found = {split: fingerprint(images) for split, images in splits.items()}
    check_same("comparing images", {f"{split} {key}": value for split in found for key, value in found[split].items()})
    side = typical_side(val_images)
    size, resize = choose_sizes(trained, side, is_folder=dataset == "folder", size=args.size, resize=args.resize)
    reuse_freed_memory()
    settings = settings_of(args, len(train_images), world_size)
    settings |= {"size": size, "resize": resize, "weights": weights_checksum(backbone)}
    batch_size = args.batch_size or max(1, settings.get("batch_size", 256) // world_size)
    workers = workers_that_fit(set_threads_and_workers(args.workers, device), 12 * batch_size * size**2)
    loading = dict(rank=rank, world_size=world_size, workers=workers, batch_size=batch_size)
    log(
        f"{path}: {describe(architecture)}, {backbone.num_features} features; "
        f"{dataset}{f' in {data_path}' if data_path else ''}: {len(train_images)} training and {len(val_images)} "
        f"validation images of {len(train_images.classes)} classes, {size} pixels; {device}, {world_size} process(es)"
    )
    networks = {"checkpoint": backbone}
    if args.compare == "on":
        torch.manual_seed(args.seed)
        networks[RANDOM] = new_backbone(architecture)
    # What decides the trained weights: neighbours do not. Images may have moved.
    deciding = {name: value for name, value in settings.items() if not name.startswith("knn")}
    deciding |= {"classes": list(train_images.classes), **found}
    progress = {"checkpoint": Progress(path.with_suffix(f".{settings['kind']}.unfinished"), deciding)}
    if args.finetune:
        own = {"weights": weights_checksum(networks[RANDOM])} if RANDOM in networks else {}
        progress[RANDOM] = Progress(path.with_suffix(".finetune_random.unfinished"), deciding | own)
    probe_crop = ProbeCrop(size, trained.get("hflip", 0.5))  # flips as in training
    crops = probe_crop, CentreCrop(resize, size), CentreCrop(min(resize, side), min(size, side))
    setup = Setup(networks, progress, trained, *splits.values(), bad_images, *crops, device, loading, settings)
    outcomes, rated, weights = (evaluate_finetuned if args.finetune else evaluate_frozen)(setup)
    result = {
        "checkpoint": str(path),
        "dataset": dataset,
        "data_path": data_path,
        **settings,
        "images": {split: len(bad.images) for split, bad in bad_images.items()},
        "left_out": {split: len(bad.reasons) for split, bad in bad_images.items()},
        **outcomes,
        "seconds": round(time.perf_counter() - start, 1),
    }
    if args.per_class:
        result["per_class"] = accuracy_by_class(*rated, train_images.classes)
    print_result(result)
    if rank == 0:
        save(result, path, rated, weights, train_images.classes, trained)
        for file in progress.values():
            file.remove()
    return result


def settings_of(args: argparse.Namespace, images: int, world_size: int) -> dict:
    """What tells one result of a checkpoint from another, in addition to images and sizes."""
    kind = "finetune" if args.finetune else "cached" if args.cached else "sweep" if args.sweep else "linear"
    settings = {"kind": kind}
    settings |= {name: getattr(args, name) for name in ("labels", "subset", "val_share", "val_labels", "seed")}
    batch_size = None if args.batch_size is None else args.batch_size * world_size
    if args.finetune:
        epochs, batch_size, lr, lr_last_layer = fine_tuning_defaults(images, args.epochs, batch_size)
        lr, decay = [lr], [0.0]
        settings |= {"lr_last_layer": args.lr_last_layer or lr_last_layer}
    else:
        epochs, batch_size = args.epochs or 100, batch_size or 256
        lr, decay = (list(SWEEP_LR), list(SWEEP_WD)) if args.sweep else ([0.3], [1e-6])
        settings |= {"linear_probe": "cached features" if args.cached else f"random crops, {epochs} epochs"}
        settings |= {"knn_k": args.knn_k, "knn_temperature": args.knn_temperature}
    if not args.cached:
        settings |= {"epochs": epochs, "batch_size": batch_size, "lr": args.lr or lr, "wd": args.wd or decay}
    return settings


# What is printed and saved


def with_interval(accuracy: dict, top: str) -> str:
    low, high = accuracy[f"{top}_interval"]
    return f"{accuracy[top]:.1f} ({low:.1f} to {high:.1f})"


def print_result(result: dict) -> None:
    """Print the table of accuracies, and below it those of a sweep and of classes."""
    if result["kind"] == "finetune":
        log(f"\nfine-tuning on {result['images']['train']:,} images, {result['epochs']} epochs")
    else:
        others = "; of the others: cached features" if len(result["rows"]) > 1 else ""
        log(f"\nlinear probe of the checkpoint: {result['linear_probe']}{others}")
    log(f"{'accuracy in %, with its 95 % interval':47s} {'':9s} {'top-1':22s} top-5")
    for name, row in result["rows"].items():
        lines = {kind: row[kind] for kind in ("linear", "finetune") if kind in row}
        lines |= {f"kNN {k}": accuracy for k, accuracy in row.get("knn_by_k", {}).items()}
        for i, (kind, accuracy) in enumerate(lines.items()):
            cells = (with_interval(accuracy, top) for top in ("top1", "top5"))
            log("{:47s} {:9s} {:22s} {:22s}".format("" if i else name, kind, *cells).rstrip())
        if "spread" in row:
            log(f"{'':47s} feature std (0: collapsed) {row['spread']:.2f}")
    if "sweep" in result:
        chosen, count = result["chosen"], result["chosen"]["held_out"]
        log(f"\nsweep: top-1 in %; * has the best on {count:,} training images that were held out from all classifiers")
        log(f"{'lr':>10s} {'wd':>10s} {'held out':>22s} {'validation':>22s}")
        for row in result["sweep"]:
            mark = " *" if (row["lr"], row["wd"]) == (chosen["lr"], chosen["wd"]) else ""
            cells = (with_interval(row[part], "top1") for part in ("held_out", "val"))
            log("{:>10g} {:>10g} {:>22s} {:>22s}{}".format(row["lr"], row["wd"], *cells, mark))
        log("* was chosen without the validation images; it is the checkpoint's linear row above")
    if "per_class" in result:
        log(f"\n{'class':30s} {'images':>7s}   {'top-1 in %, 95 % interval':25s} most often taken for")
        for row in result["per_class"]:
            top1 = with_interval(row, "top1") if row["images"] else "-"
            wrong = f"{row['taken_for']} ({row['taken_for_share']:.1f} %)" if row["taken_for"] else ""
            log(f"{row['class'][:30]:30s} {row['images']:7d}   {top1:25s} {wrong}".rstrip())


def save(result: dict, path: Path, rated: tuple, weights: dict, classes: Sequence[str], trained: dict) -> None:
    """Write NAME.eval.json, the trained classifier and, where asked for, the confusion matrix next to NAME.

    trained: options of the backbone's training. What the weights expect goes along with them.
    """
    with logged(path.with_suffix(".eval.json")) as target:
        write_result(result, target)
    if weights:
        contents = {"state_dict": weights, "classes": list(classes), "value_range": trained.get("value_range")}
        contents["sizes"] = [result["size"], result["resize"]]
        contents["options"] = {name: value for name, value in result.items() if name not in OUTCOMES}
        contents["options"] |= {"size_crops": [result["size"]], "arch": trained.get("arch", "")}
        name = "finetune" if result["kind"] == "finetune" else "linear"
        with logged(path.with_suffix(f".{name}.pth")) as target:
            checkpoint.write(contents, target)
    if "per_class" in result and find_spec("matplotlib"):
        with logged(path.with_suffix(f".{result['kind']}.confusion.png")) as target:
            target.write_bytes(page.confusion_chart(confusion_matrix(*rated).cpu().numpy(), classes))
    elif "per_class" in result:
        log("no picture of the confusion matrix, as matplotlib is not installed: pip install matplotlib")


@contextmanager
def logged(path: Path) -> Iterator[Path]:
    """Log that the block has written a file, or why it could not, which does not end the evaluation."""
    try:
        yield path
        log(f"written to {path}")
    except OSError as error:
        log(f"not written to {path}: {error.strerror}")


def key_of(result: dict) -> str:
    """The settings of a result, as text: what tells it from others of its checkpoint."""
    settings = {name: value for name, value in result.items() if name not in OUTCOMES and value is not None}
    texts = {n: " ".join(map(str, v)) if isinstance(v, list) else v for n, v in settings.items()}
    return ", ".join(f"{name} {text}" for name, text in texts.items())


def write_result(result: dict, path: Path) -> None:
    """Put a result into NAME.eval.json: its keys at the top, as the newest one, and all, by settings, in "results".

    A result of the same settings is replaced, all others stay, also those of files without "results".
    """
    results = {}
    if path.exists():
        try:
            before = json.loads(path.read_text())
            before["rows"], before["checkpoint"]
            results = before.get("results") or {key_of(before): before}
        except (ValueError, LookupError, TypeError):
            kept = path.with_suffix(".damaged.json")
            os.replace(path, kept)
            log(f"{path} is not an evaluation result; kept as {kept}")
    text = json.dumps(result | {"results": results | {key_of(result): result}}, indent=1) + "\n"
    unfinished = path.with_name(path.name + ".tmp")
    try:
        unfinished.write_text(text)
        os.replace(unfinished, path)
    except OSError:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise


def main(args: argparse.Namespace) -> dict:
    """Evaluate, print the table, and write NAME.eval.json next to the checkpoint. Raises UserError for bad input."""
    device = choose_device(args.device)
    rank, world_size = setup_processes(device)
    check_args(args)
    for line in options_without_effect(args):
        log(line)
    check_same("comparing options", {f"--{n}": v for n, v in vars(args).items() if n not in ("data_path", "workers")})
    result = evaluate(args, rank, world_size, device)
    leave_processes()
    return result


if __name__ == "__main__":
    run_script(lambda: main(parse_args(sys.argv[1:])))
