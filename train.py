"""Train SwAV (Caron et al. 2020) on one process or many, on GPUs or CPUs.

    python train.py                                                          # built-in images, minutes on a CPU
    python train.py @recipes/cifar10.args --epochs 100                       # a recipe, and a change to it
    torchrun --nproc_per_node=4 train.py --data_path imagenet/train          # 4 GPUs: the published 200 epochs at 256
    torchrun --nnodes=8 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \\
        train.py @recipes/800ep.args --data_path imagenet/train              # 64 GPUs, the same on each node

Checkpoints and metrics.jsonl go to --dump_path; the same command again goes on from the last finished epoch.
"""

import argparse
import json
import math
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from functools import partial
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import NoReturn

# Read when torch is loaded: how often a thread that waits for the others looks before it sleeps, some 10 us here, 3 ms
# by default, not at all with OMP_WAIT_POLICY=passive. On two cores of a Zen 5 860, 900 and 610 images/s; with two other
# programs on them 300, from 100 to 300, and 360.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from data import (
    DATASETS,
    CachedImages,
    CentreCrop,
    ImageFiles,
    MultiCrop,
    augment,
    cached_size,
    image_size,
    keep_freed_memory,
    open_images,
    place_batch,
    training_loader,
    typical_side,
)
from defaults import APEX_GROUP_SIZE, CROP_LISTS, DERIVED, RELATIVE_EPSILON, derive
from eval_linear import PATIENCE, Parser, choose_device, environment, number, run, say, setup_processes
from guard import CollapseGuard, is_stuck
from loss import SwAVLoss
from model import ARCHS, STEMS, SwAV, sync_batchnorm
from optim import LARS, warmup_cosine
from sinkhorn_ext import backend

SHAPES_RECIPE = Path(__file__).parent / "recipes" / "shapes.args"
REPLACED_BY_TORCHRUN = ("dist_url", "rank", "world_size", "local_rank")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
RECOVERIES = 3  # of --on_collapse recover
RECOVERABLE = ("relative_epsilon", "epsilon"), ("base_lr", "final_lr", "start_warmup")  # one of them at a time
SLOW_STEPS = 200  # that runs have stayed near ln K before they learned
LONG_RUN, LARGE_CROPS = 10_000, 128  # steps and pixels that make up for the minute or two that torch.compile takes
ARCHITECTURE = ("arch", "width", "blocks", "stem", "hidden_mlp", "feat_dim", "nmb_prototypes")


# Options


def spelled(options: Mapping[str, object]) -> str:
    """Options as one writes them."""
    return " ".join(f"--{n} {' '.join(map(str, v)) if isinstance(v, list) else v}" for n, v in options.items())


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """The options of a command line, after those of recipes/shapes.args if it names no images. Raises ValueError."""
    names = {word.partition("=")[0].replace("_", "-") for word in argv}
    if not names & {"--data-path", "--dataset", "--help", "-h"} and not any(word.startswith("@") for word in argv):
        say(f"no images named: running the recipe {SHAPES_RECIPE}")
        argv = [f"@{SHAPES_RECIPE}", *argv]
    parser = Parser(
        prog="train.py",
        usage="train.py [@recipes/NAME.args] [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        fromfile_prefix_chars="@",
        allow_abbrev=False,
        epilog="Defaults that come from the images are printed at the start, with reasons (defaults.py). On ImageNet "
        "with 4 processes of 64 images, or batches in the thousands, they are the published runs.",
    )
    whole, counted, positive, weight = number(int, 0), number(int, 1), number(float, 0, above=True), number(float, 0)

    def option(group: argparse._ArgumentGroup, name: str, default: object, kind: Callable, help: str, **more) -> None:
        if name in DERIVED:
            help += " (default: from the images)"
        elif default is not None:
            help += f" (default: {' '.join(map(str, default)) if isinstance(default, list) else default})"
        group.add_argument(f"--{name}", default=default, type=kind, help=help, **more)

    add = partial(option, parser.add_argument_group("images"))
    add("data_path", None, str, "folder of images at any depth, no labels needed; its train/ if it has train/ and val/")
    add("dataset", "folder", str, "folder: --data_path; naming neither runs the recipe shapes", choices=DATASETS)
    add("nmb_crops", None, counted, "crops of each resolution, large ones first; small are for large sets", nargs="+")
    add("size_crops", None, counted, "side of the crops in pixels; multiples of 32 for ResNet-50", nargs="+")
    add("min_scale_crops", None, positive, "smallest share of the image's area in a crop", nargs="+")
    add("max_scale_crops", None, positive, "largest share of the image's area in a crop", nargs="+")
    add("blur_sigma", None, weight, "sigma of the strongest blur, in pixels, 0 for none; less keeps textures")

    add = partial(option, parser.add_argument_group("model"))
    add("arch", "resnet50", str, "backbone", choices=list(ARCHS))
    add("width", None, counted, "channels of its stem, to shrink or widen it (default: the arch's own)")
    add("blocks", None, counted, "residual blocks of its four stages (default: the arch's own)", nargs=4)
    add("stem", None, str, "imagenet: for crops of 96 pixels and more; medium: 48; small: 32 and less", choices=STEMS)
    add("hidden_mlp", 2048, whole, "hidden units of the projection head, 0 for a linear one")
    add("feat_dim", 128, counted, "size of an embedding")
    add("nmb_prototypes", None, number(int, 2), "clusters: several times the classes you expect")

    add = partial(option, parser.add_argument_group("loss"))
    add("crops_for_assign", None, whole, "crops whose codes the others predict: the large ones", nargs="+")
    add("temperature", None, positive, "of the predictions' softmax")
    add("epsilon", None, positive, "softness of the codes; alone it is in the published unit: small sets collapse")
    add("relative_epsilon", None, str, "epsilon in units of the scores' standard deviation: codes stay sharp when "
        "embeddings draw together; off: as published", choices=("on", "off"), nargs="?", const="on")  # fmt: skip
    add("sinkhorn_iterations", 3, counted, "rounds of balancing the codes")
    add("queue_length", None, whole, "past images that help to balance the codes, over all processes, for large sets "
        "where the global batch is smaller than nmb_prototypes; rounded down to a multiple of that batch")  # fmt: skip
    add("epoch_queue_starts", None, whole, "epoch from which the queue fills: when embeddings have settled")

    add = partial(option, parser.add_argument_group("optimisation"))
    add("epochs", 200, counted, "passes over the images")
    add("batch_size", None, counted, "images per process and step")
    add("base_lr", None, positive, "learning rate for the global batch (batch_size x processes), to be scaled with it")
    add("final_lr", None, weight, "learning rate at the end of the cosine")
    add("warmup_epochs", None, whole, "epochs of linear warm-up: 10 for batches in the thousands")
    add("start_warmup", None, weight, "learning rate at the start of the warm-up")
    add("wd", 1e-6, weight, "weight decay")
    add("freeze_prototypes_niters", None, whole, "steps at the start in which prototypes stay fixed: about an epoch")

    add = partial(option, parser.add_argument_group("machine"))
    add("device", "auto", str, "auto: the GPU if there is one", choices=("auto", "cuda", "cpu"))
    add("precision", None, str, "default: bf16 if the device has it, else fp32, on GPUs fp16", choices=tuple(DTYPES))
    add("use_fp16", None, str.lower, "older spelling: true is --precision fp16, false fp32", choices=("true", "false"))
    add("sync_bn", None, str, "pytorch: BatchNorm over all processes; apex: over groups of them, as published with "
        "apex, which is not needed; none: each its own, which shows in embeddings",
        choices=("pytorch", "apex", "none"))  # fmt: skip
    add("syncbn_process_group_size", None, counted, f"processes a group of --sync_bn apex (default: {APEX_GROUP_SIZE})")
    add("workers", "auto", lambda text: text if text == "auto" else whole(text),
        "loader processes of each training process; auto: by the cores at hand")  # fmt: skip
    add("augment", "auto", str, "where colours, flips and blur are done: device (auto): in batches, where it trains; "
        "workers: image by image, in the loader", choices=("auto", "device", "workers"))  # fmt: skip
    add("cache", "auto", str, "keep decoded images in memory, once a machine: ram, off, or auto: if a quarter of what "
        "is free is enough (sets of one file are in memory anyway)", choices=("auto", "off", "ram"))  # fmt: skip
    add("compile", "auto", str, "torch.compile for backbone and augmentation: a minute or two at the start, faster "
        f"steps on a GPU; auto: on one GPU, in runs of {LONG_RUN:,} steps and crops of {LARGE_CROPS} pixels or more",
        choices=("auto", "on", "off"), nargs="?", const="on")  # fmt: skip
    add("seed", 31, whole, "of the weights, the order of images and the crops")

    add = partial(option, parser.add_argument_group("output"))
    add("dump_path", "runs/swav", str, "folder of the run; a run that is there already is resumed")
    add("checkpoint_freq", 25, counted, "epochs between checkpoints that are kept; checkpoint.pth is of every epoch")
    add("log_freq", 50, counted, "steps between progress lines")
    add("tensorboard", "off", str, "the numbers of metrics.jsonl for TensorBoard, in dump_path/tensorboard",
        choices=("on", "off"), nargs="?", const="on")  # fmt: skip
    add("on_collapse", "warn", str, "when the loss stays at ln K or embeddings are all alike: warn, with the cause; "
        f"stop; or recover: go back to the last good epoch and change one thing, at most {RECOVERIES} times",
        choices=("warn", "stop", "recover"))  # fmt: skip
    for name in REPLACED_BY_TORCHRUN:
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    parser.set_defaults(recovered=[])  # options that --on_collapse recover changed
    args = parser.parse_args(argv)
    if args.use_fp16:
        args.precision = "fp16" if args.use_fp16 == "true" else "fp32"
    return args


def check_args(args: argparse.Namespace, world_size: int = 1) -> None:
    """Raise ValueError, naming option, value and what is accepted, for all that can be known before work starts.

    What hangs on options that are still to be derived waits for `settle`. Rounds queue_length down to a multiple of
    the global batch, and says so.
    """
    for name in REPLACED_BY_TORCHRUN:
        if getattr(args, name) is not None:
            raise ValueError(f"--{name}: leave it out; torchrun --nproc_per_node=4 train.py ... sets it")
    group_size = args.syncbn_process_group_size or APEX_GROUP_SIZE
    if args.sync_bn == "apex" and world_size % min(group_size, world_size):
        raise ValueError(
            f"--syncbn_process_group_size: expected a divisor of the {world_size} processes, got {group_size}"
        )
    if args.dataset == "shapes" and args.data_path:
        raise ValueError(
            f"--data_path: expected none for --dataset shapes, whose images are drawn, got {args.data_path}; "
            "for a folder of your own write --dataset folder"
        )
    if args.dataset == "folder" and not os.path.isdir(args.data_path or ""):
        raise ValueError(f"--data_path: expected a folder, got {args.data_path or 'none'}")
    if args.tensorboard == "on" and find_spec("tensorboard") is None:
        raise ValueError("--tensorboard: needs its package: pip install tensorboard")
    if args.batch_size is not None and args.batch_size < 2:
        raise ValueError(f"--batch_size: expected 2 or more (BatchNorm needs several images), got {args.batch_size}")
    if args.warmup_epochs is not None and args.warmup_epochs > args.epochs:
        raise ValueError(f"--warmup_epochs: expected at most the {args.epochs} of --epochs, got {args.warmup_epochs}")
    dump = Path(args.dump_path)
    nearest = next(folder for folder in (dump, *dump.absolute().parents) if os.path.lexists(folder))
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ValueError(f"--dump_path: expected a folder that can be written, got {dump} ({nearest} is not one)")
    if any(getattr(args, name) is None for name in DERIVED):
        return
    global_batch = args.batch_size * world_size
    if args.queue_length % global_batch:
        rounded = args.queue_length - args.queue_length % global_batch
        say(
            f"--queue_length: {args.queue_length} is no multiple of the global batch of {global_batch}: using {rounded}"
        )
        args.queue_length = rounded
    try:
        build_multicrop(args)
        build_loss(args, world_size)
        with torch.device("meta"):
            build_model(args)
    except ValueError as error:
        raise ValueError(f"--{error}") from None


def settle(args: argparse.Namespace, images: Dataset, world_size: int) -> None:
    """Choose what the user left open, say what and why, and check it all.

    From the run in dump_path, if there is one to go on with, else from the images (defaults.py). Raises ValueError.
    """
    least = 2 * world_size
    if len(images) < least:
        raise ValueError(f"--data_path: expected {least} images or more (2 a process), got {len(images)}")
    args.asked = {name: getattr(args, name) for names in RECOVERABLE for name in names}
    chosen: dict[str, tuple[object, str]] = {}
    path = Path(args.dump_path) / "checkpoint.pth"
    if path.exists():
        before = load_checkpoint(path)["options"]
        args.recovered = before.get("recovered", [])
        asked = before.get("asked", args.asked)
        for names in RECOVERABLE:
            if any(name in args.recovered for name in names) and all(args.asked[n] == asked[n] for n in names):
                kept = {name: before[name] for name in names}
                vars(args).update(kept)
                say(f"after a collapse the run goes on with {spelled(kept)}")
    given = {name: getattr(args, name) for name in DERIVED if getattr(args, name) is not None}
    if path.exists():
        # There may be more or fewer processes now: each gets its share of the batch, where that can be, and BatchNorm's
        # groups are derived anew. So is epsilon where its unit is given, or the unit where it is, and which crops
        # assign where others are given.
        anew, epsilon_and_unit = {"batch_size", "sync_bn"}, {"epsilon", "relative_epsilon"}
        if epsilon_and_unit & given.keys():
            anew |= epsilon_and_unit
        if any(name in given and given[name] != before.get(name) for name in CROP_LISTS):
            anew.add("crops_for_assign")
        earlier = {n: before[n] for n in DERIVED if n not in given and n not in anew and before.get(n) is not None}
        chosen = {name: (value, "as the run so far") for name, value in earlier.items()}
        batch_size, left_over = divmod(before.get("global_batch_size", 0), world_size)
        if batch_size > 1 and not left_over and "batch_size" not in given:
            chosen["batch_size"] = (batch_size, "as many over all processes as in the run so far")
    given |= {name: value for name, (value, _) in chosen.items()}
    chosen |= derive(
        images=len(images), image_side=typical_side(images), world_size=world_size, epochs=args.epochs, given=given
    )
    for name, (value, reason) in chosen.items():
        setattr(args, name, value)
        say(f"  {spelled({name: value})}  ({reason})")
    check_args(args, world_size)
    args.global_batch_size = args.batch_size * world_size
    if args.queue_length and args.epoch_queue_starts >= args.epochs:
        say(f"--epoch_queue_starts {args.epoch_queue_starts}: the queue is not used in a run of {args.epochs} epochs")
    largest = len(images) // world_size
    if args.batch_size > largest:
        raise ValueError(
            f"--batch_size: expected at most {largest} ({len(images)} images over {world_size} process(es)), "
            f"got {args.batch_size}"
        )


def build_multicrop(args: argparse.Namespace) -> MultiCrop:
    return MultiCrop(
        args.size_crops, args.nmb_crops, args.min_scale_crops, args.max_scale_crops, blur_sigma=args.blur_sigma
    )


def build_model(args: argparse.Namespace) -> SwAV:
    options = dict(width=args.width, blocks=args.blocks, stem=args.stem)
    return SwAV(args.arch, args.hidden_mlp, args.feat_dim, args.nmb_prototypes, **options)


def build_loss(args: argparse.Namespace, world_size: int) -> SwAVLoss:
    return SwAVLoss(
        nmb_crops=sum(args.nmb_crops),
        crops_for_assign=args.crops_for_assign,
        temperature=args.temperature,
        epsilon=args.epsilon,
        sinkhorn_iterations=args.sinkhorn_iterations,
        queue_length=args.queue_length // world_size,
        feat_dim=args.feat_dim,
        relative_epsilon=args.relative_epsilon == "on",
    )


# Processes and device


def share_batchnorm(model: SwAV, sync_bn: str, group_size: int, world_size: int) -> SwAV:
    """The model with BatchNorm statistics of all processes (pytorch), of groups of them (apex) or of each (none)."""
    if world_size == 1 or sync_bn == "none":
        return model
    group = None
    if sync_bn == "apex" and group_size < world_size:
        group, _ = dist.new_subgroups(group_size, timeout=PATIENCE)
    return sync_batchnorm(model, group)


def share_cores(workers: int | str, device: torch.device, cut_only: bool, in_memory: bool) -> int:
    """Deal this machine's cores out to its training processes; the number of loader workers of each.

    cut_only: workers leave augmentation to the device. in_memory: they need not read files either. On a CPU, workers
    that do it all get half of the cores, which training does without: a thread that waits for a core which a worker
    holds costs more than it adds. Cutting out is so little beside training that all cores train, and cutting crops
    out of images in memory is not worth a worker that would disturb them (two cores, threads waiting actively: 412
    images/s, 349 with a worker, 261 with a worker and a thread less). OMP_NUM_THREADS is respected, except that
    torchrun's own setting of 1 for several processes says nothing.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores //= environment("LOCAL_WORLD_SIZE", 1)
    if workers == "auto" and device.type == "cuda":
        workers = min(16, max(1, cores - 1))
    elif workers == "auto":
        workers = cores // 2 if not cut_only else 0 if in_memory else min(cores, max(1, cores // 8))
    set_by_user = "OMP_NUM_THREADS" in os.environ and environment("LOCAL_WORLD_SIZE", 1) == 1
    if device.type == "cpu" and not set_by_user:
        torch.set_num_threads(max(1, cores if cut_only else cores - workers))
    return workers


def choose_precision(precision: str | None, device: torch.device) -> torch.dtype:
    """The dtype of the forward pass. Raises ValueError where the device cannot train in it."""
    if precision is None and device.type == "cuda":  # GPUs before 2020 have fp16 alone
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif precision is None:  # Intel's CPUs with AVX512-BF16 or AMX, AMD's from Zen 4 on; torch names it nowhere else
        precision = "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"
    dtype = DTYPES[precision]
    if device.type == "cpu" and dtype == torch.float16:
        raise ValueError("--precision fp16: expected fp32 or bf16 on a CPU; fp16 needs a GPU")
    return dtype


def compiling_pays(device: torch.device, world_size: int, steps: int, crop_size: int) -> bool:
    """Whether to use torch.compile where nobody asked for it or against it: on one GPU, in long runs, if it works.

    On a CPU, and for crops so small that a GPU waits for its host, it gains nothing; among processes SyncBatchNorm
    breaks the graph in each layer.
    """
    if device.type != "cuda" or world_size > 1 or steps < LONG_RUN or crop_size < LARGE_CROPS:
        return False
    try:
        torch.compile(lambda x: x.square() + 1)(torch.ones(8, device=device))
    except Exception as error:  # it needs Triton, a C compiler and Python's headers, and says so in its own ways
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        say(f"--compile off, as torch.compile does not work here ({reason}); it would make steps faster")
        return False
    return True


# Output


def show_progress(line: str, keep: bool = False) -> None:
    """Rewrite one line on a terminal, unless it is to be kept; a line each time in a file."""
    on_terminal = sys.stdout.isatty()
    say(f"\r\033[2K{line}" if on_terminal else line, end="" if on_terminal and not keep else "\n")


def mean_over_processes(values: torch.Tensor) -> torch.Tensor:
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


def save(contents: dict, path: Path) -> None:
    """Write under another name first, so that an interruption leaves the file as it was."""
    unfinished = path.with_name(path.name + ".tmp")
    torch.save(contents, unfinished)
    os.replace(unfinished, path)


def load_checkpoint(path: Path) -> dict:
    """A checkpoint of ours. Raises ValueError if the file is unreadable or something else."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["state_dict"], checkpoint["options"], checkpoint["epoch"]
    except Exception as error:  # torch.load raises what unpickling happens to hit
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(
            f"--dump_path: cannot resume from {path}: {reason}; delete it, put one of checkpoints/ in its place, "
            "or write another --dump_path"
        ) from None
    return checkpoint


def changed_options(args: argparse.Namespace, checkpoint: dict) -> dict[str, tuple]:
    """name: (before, now), where both know the option and it matters to what is learned."""
    ignored = ("dump_path", "device", "workers", "augment", "cache", "compile", "log_freq", "checkpoint_freq")
    ignored += ("on_collapse", "recovered", "asked", "tensorboard")
    before = {name: value for name, value in checkpoint["options"].items() if name not in ignored}
    if "global_batch_size" in before:  # which is what counts, whatever the number of processes
        del before["batch_size"]
    return {name: (value, vars(args)[name]) for name, value in before.items() if vars(args).get(name, value) != value}


# The run


def main(args: argparse.Namespace) -> None:
    """Check, set up, train, clean up. Raises ValueError on bad options, FloatingPointError on a loss of nan or inf."""
    check_args(args, environment("WORLD_SIZE", 1))
    device = choose_device(args.device)
    dtype = choose_precision(args.precision, device)
    say("options: " + spelled({name: value for name, value in vars(args).items() if value not in (None, [])}))
    if any(getattr(args, name) is None for name in DERIVED):
        say("and what follows from the images, or from the run so far:")
    # One process a machine downloads and finds what is wrong; the others wait for it where the group forms.
    goes_first = environment("LOCAL_RANK", 0) == 0
    if goes_first:
        images = open_images(args.dataset, args.data_path, "pretrain", download=True)
        settle(args, images, environment("WORLD_SIZE", 1))
        sizes = sizes_to_cache(images, args.cache)
    rank, world_size = setup_processes(device)
    if not goes_first:
        images = open_images(args.dataset, args.data_path, "pretrain")
        settle(args, images, world_size)
    images = cache_images(images, sizes if goes_first else None)
    while True:
        try:
            train(args, images, rank, world_size, device, dtype)
            break
        except Collapse:
            recover(args, rank)
    if dist.is_initialized():  # not after an error: it must be said before the other processes see this one leave
        dist.destroy_process_group()


def sizes_to_cache(images: Dataset, cache: str) -> list[tuple[int, int]] | None:
    """(width, height) of each image, if they are to be in memory. Raises ValueError where --cache ram is too much."""
    if cache == "off":
        return None
    share = 1 / 4 if cache == "auto" else 0.8
    needed, allowed = cached_size(images, share)
    if 0 < needed <= allowed:
        say("cache: reading the sizes of all images ...")
        sizes = [image_size(path) for path in images.paths]
        needed = sum(3 * width * height for width, height in sizes)
        if needed <= allowed:
            return sizes
    if cache == "ram" and needed:
        raise ValueError(
            f"--cache ram: expected at most {allowed / 2**30:.1f} GiB of decoded images ({share:.0%} of the free "
            f"memory, no more than Linux' /dev/shm has), got some {needed / 2**30:.1f}; write --cache off"
        )
    return None


def cache_images(images: Dataset, sizes: list[tuple[int, int]] | None) -> Dataset:
    """The images, or the same in memory if the first process of this machine, who alone gives their sizes, wants it."""
    offer = None
    if sizes:
        descriptor, path = tempfile.mkstemp(prefix="swav-", dir="/dev/shm")
        os.close(descriptor)
        offer = sizes, path
    try:
        if dist.is_initialized():
            offers = [None] * dist.get_world_size()
            dist.all_gather_object(offers, offer)
            offer = offers[dist.get_rank() - environment("LOCAL_RANK", 0)]
        if offer is not None:
            images = CachedImages(images, *offer)
        if dist.is_initialized():
            dist.barrier()
    finally:
        if sizes:
            os.unlink(path)  # the memory stays for those who have it open, and goes with them
    return images


def train(
    args: argparse.Namespace, images: Dataset, rank: int, world_size: int, device: torch.device, dtype: torch.dtype
) -> None:
    """The run. Raises ValueError if dump_path holds another, FloatingPointError on a loss that is not finite."""
    torch.manual_seed(args.seed)
    dump = Path(args.dump_path)
    dump.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()
    cut_only = args.augment != "workers"
    in_memory = not isinstance(images, ImageFiles)
    loader = training_loader(
        images,
        build_multicrop(args),
        args.batch_size,
        seed=args.seed,
        rank=rank,
        world_size=world_size,
        workers=share_cores(args.workers, device, cut_only, in_memory),
        pin_memory=device.type == "cuda",
        cut_only=cut_only,
    )
    placing = dict(device=device, stream=torch.cuda.Stream(device) if device.type == "cuda" else None)
    steps_per_epoch = len(loader)
    learning_rates = warmup_cosine(
        steps_per_epoch, args.epochs, args.base_lr, args.final_lr, args.warmup_epochs, args.start_warmup
    )
    model = build_model(args)
    # channels_last is faster, but torch 2.14's CPU gradients of fewer than 8 channels overwrite memory in it.
    safe = device.type == "cuda" or model.conv1.out_channels >= 8
    layout = torch.channels_last if safe else torch.contiguous_format
    model = model.to(device, memory_format=layout)
    model = share_batchnorm(model, args.sync_bn, args.syncbn_process_group_size or APEX_GROUP_SIZE, world_size)
    swav_loss = build_loss(args, world_size).to(device)
    optimizer = LARS(model.parameters(), lr=args.base_lr, weight_decay=args.wd)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    first_epoch = resume(args, dump, model, optimizer, scaler, swav_loss, steps_per_epoch)
    steps_to_do, largest = (args.epochs - first_epoch) * steps_per_epoch, max(args.size_crops)
    if args.compile == "on" or (args.compile == "auto" and compiling_pays(device, world_size, steps_to_do, largest)):
        say("compiling: the first steps take a minute or two")  # a graph for each resolution
        warnings.filterwarnings("ignore", "TensorFloat32")  # which puts codes off by up to a percent
        model.features = torch.compile(model.features, dynamic=False)
        placing["augment"] = torch.compile(augment, dynamic=False)
    network = model
    if world_size > 1:
        options = dict(gradient_as_bucket_view=True, static_graph=True)
        devices = [device.index] if device.type == "cuda" else None
        network = DistributedDataParallel(model, device_ids=devices, **options)
    metrics = open_metrics(dump, first_epoch, args.tensorboard == "on") if rank == 0 else lambda row: None
    describe(args, images, loader, model, device, dtype)

    ln_k = math.log(args.nmb_prototypes)
    guard = CollapseGuard(args.nmb_prototypes, device)
    probe = load_probe(images, args.size_crops[0], rank, world_size).to(device, memory_format=layout)
    step = first_epoch * steps_per_epoch  # steps done

    def batches_of(epoch: int) -> Iterator:
        loader.batch_sampler.epoch = epoch
        return iter(loader)

    next_batches: Iterator | None = None
    for epoch in range(first_epoch, args.epochs):
        if epoch >= args.epoch_queue_starts:
            swav_loss.start_queue()
        batches = next_batches or batches_of(epoch)
        epoch_start = interval_start = time.perf_counter()
        epoch_losses: list[float] = []
        unread: list[torch.Tensor] = []  # losses that are still on the device
        interval_steps, waited = 0, 0.0
        for step_of_epoch in range(1, steps_per_epoch + 1):
            asked = time.perf_counter()
            batch, _ = next(batches)
            waited += time.perf_counter() - asked
            crops = place_batch(batch, memory_format=layout, **placing)  # V of [B, 3, S, S]

            # 1. prototypes to the unit sphere, 2. forward
            model.normalize_prototypes()
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                embeddings, scores = network(crops)  # [V*B, D], [V*B, K]
            # 3. codes, 4. swapped prediction
            loss = swav_loss(embeddings, scores, model.prototypes.weight)
            unread.append(loss.detach())
            code_logits = swav_loss.code_logits()  # [A, B, K]
            guard.count(code_logits)
            is_first = step == first_epoch * steps_per_epoch
            line_is_due = is_first or step_of_epoch % args.log_freq == 0 or step_of_epoch == steps_per_epoch
            if line_is_due or device.type == "cpu":  # reading a loss makes a GPU's queue run dry, so seldom there
                newest = mean_over_processes(torch.stack(unread)).tolist()
                epoch_losses += newest
                unread = []
                if not all(math.isfinite(value) for value in newest):
                    batch = {"crops": crops, "embeddings": embeddings.detach(), "scores": scores.detach()}
                    path = dump / f"bad_loss-{rank}.pth"
                    stop_on_bad_loss(args, path, epoch, epoch_losses, list(loader.batch_sampler), model, batch)
            # 5. backward
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            if step < args.freeze_prototypes_niters:
                model.prototypes.weight.grad = None
            # 6. LARS
            for group in optimizer.param_groups:
                group["lr"] = learning_rates[step]
            scaler.step(optimizer)
            scaler.update()
            step += 1
            interval_steps += 1

            if line_is_due:
                now = time.perf_counter()
                seconds_per_step = (now - interval_start) / interval_steps
                interval_loss = sum(epoch_losses[-interval_steps:]) / interval_steps
                of_first = embeddings.detach().unflatten(0, (len(crops), -1))[args.crops_for_assign[0]]  # [B, D]
                row = {
                    "epoch": epoch + 1,
                    "step": step,
                    "loss": interval_loss,
                    "ln_k": ln_k,
                    **guard.measure(interval_loss, code_logits, of_first),
                    "lr": learning_rates[step - 1],
                    "images_per_s": args.global_batch_size / seconds_per_step,
                    "data_wait_percent": 100 * waited / (now - interval_start),
                    "gpu_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0,
                    "eta_s": (args.epochs * steps_per_epoch - step) * seconds_per_step,
                }
                row["collapsing"] = guard.is_collapsing(row, step / (args.epochs * steps_per_epoch), step)
                metrics(row)
                show_progress(step_line(row, args.epochs, args.epochs * steps_per_epoch))
                if row["collapsing"]:
                    answer_collapse(args, row, dump)
                interval_start, interval_steps, waited = now, 0, 0.0

        if epoch + 1 < args.epochs:  # workers go on while codes are compared and the checkpoint is written
            next_batches = batches_of(epoch + 1)
        seconds, epoch_loss = time.perf_counter() - epoch_start, sum(epoch_losses) / steps_per_epoch
        images_per_s = steps_per_epoch * args.global_batch_size / seconds
        ends_well = not is_stuck(guard.with_lowest_spread(row) | {"loss_per_ln_k": epoch_loss / ln_k})
        row = {"epoch": epoch + 1, "step": step, "epoch_loss": epoch_loss, "ln_k": ln_k}
        row |= {"epoch_seconds": seconds, "epoch_images_per_s": images_per_s}
        row["codes_changed"] = guard.share_changed(probe_codes(model, swav_loss, probe, args.batch_size))
        done = f"epoch {epoch + 1}/{args.epochs} done: loss {epoch_loss:.4f} (ln K {ln_k:.3f})"
        metrics(row)
        show_progress(f"{done}  {images_per_s:.0f} images/s  {seconds:.1f} s", keep=True)
        queue = swav_loss.gather_queue(args.batch_size)
        if rank == 0:
            contents = {
                "epoch": epoch + 1,
                "step": step,
                "state_dict": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(),
                "queue": queue,
                "options": vars(args),
            }
            save(contents, dump / "checkpoint.pth")
            if args.on_collapse == "recover" and ends_well:
                save(contents, dump / "last_good.pth")
            if (epoch + 1) % args.checkpoint_freq == 0 or epoch + 1 == args.epochs:
                (dump / "checkpoints").mkdir(exist_ok=True)
                save(contents, dump / "checkpoints" / f"ckp-{epoch + 1}.pth")
    say(f"done: {dump / 'checkpoint.pth'}; to judge it: python eval_linear.py {dump / 'checkpoint.pth'}")


def load_probe(images: Dataset, size: int, rank: int, world_size: int) -> torch.Tensor:
    """This process's share of the images whose codes are followed: [N, 3, size, size], the same in every run.

    256 in all, but no more than a twentieth of the set, so that they cost little beside an epoch, nor less than one a
    process.
    """
    count = max(world_size, min(256, len(images) // 20))
    chosen = [len(images) * i // count for i in range(rank, count, world_size)]
    crop = CentreCrop(size, size)
    return torch.stack([crop(images[i][0]) for i in chosen])


@torch.no_grad()
def probe_codes(model: SwAV, swav_loss: SwAVLoss, images: torch.Tensor, batch_size: int) -> torch.Tensor:
    """The first prototype of each image's code, int64 [N], with BatchNorm's running statistics."""
    model.eval()
    with torch.compiler.set_stance("force_eager"):  # so few forward passes are not worth graphs of their own
        batches = images.to(model.conv1.weight.dtype).split(batch_size)
        scores = torch.cat([model([batch])[1] for batch in batches])
    model.train()
    return swav_loss.codes(scores).argmax(1)


class Collapse(Exception):
    """Nothing is learned, and the run is to go back and change something."""


def answer_collapse(args: argparse.Namespace, row: dict, dump: Path) -> None:
    """Say that the run is collapsing, and why; then go on, or raise as --on_collapse has it."""
    cause, change = remedy(args)
    told = (
        f"collapsing: the loss is at {row['loss_per_ln_k']:.3f} ln K, codes have {row['code_entropy']:.0%} of their "
        f"largest entropy and choose {row['prototypes_in_use']:.0%} of the prototypes, embeddings have "
        f"{row['embedding_std']:.0%} of their largest spread; "
        f"likely cause: {cause}; try {spelled(change)}"
    )
    if args.on_collapse != "recover":
        told += " with another --dump_path"  # as this one would go on from the collapsed weights
    if row["step"] < SLOW_STEPS:
        told += f" (or more epochs: some runs leave ln K after {SLOW_STEPS} steps only)"
    if args.on_collapse == "stop":
        raise FloatingPointError(f"{told}; stopped, {dump / 'checkpoint.pth'} is as after the last whole epoch")
    is_last = args.on_collapse == "recover" and len(args.recovered) >= RECOVERIES
    show_progress(told + (f"; recovered {RECOVERIES} times already, going on" if is_last else ""), keep=True)
    if args.on_collapse == "recover" and not is_last:
        raise Collapse


def remedy(args: argparse.Namespace) -> tuple[str, dict[str, str | float]]:
    """The likely cause of a collapse, and the options to change."""
    if args.relative_epsilon == "off":
        cause = (
            f"scores of different images differ by too little beside --epsilon {args.epsilon:g}, so codes are uniform"
        )
        return cause, {"relative_epsilon": "on", "epsilon": RELATIVE_EPSILON}
    if args.queue_length:
        cause = f"codes tell the {args.queue_length} older embeddings of --queue_length from new ones, not images"
        return cause, {"queue_length": 0}
    rates = {name: getattr(args, name) for name in ("base_lr", "final_lr", "start_warmup")}
    rates = {name: float(f"{rate / 3:.4g}") for name, rate in rates.items() if rate}
    return f"weights move too fast at --base_lr {args.base_lr:g} for codes to settle", rates


def recover(args: argparse.Namespace, rank: int) -> None:
    """Change one thing in args and put the last good state in the place of checkpoint.pth, for the next resume.

    Without one the run begins anew, and checkpoint.pth is kept under another name.
    """
    _, change = remedy(args)
    before = {name: getattr(args, name) for name in change}
    vars(args).update(change)
    args.recovered = [*args.recovered, next(iter(change))]
    dump = Path(args.dump_path)
    good = dump / "last_good.pth"
    epochs_done = 0
    told = ", ".join(f"--{name} {before[name]} -> {value}" for name, value in change.items())
    if good.exists():
        checkpoint = load_checkpoint(good)
        epochs_done = checkpoint["epoch"]
    if dist.is_initialized():
        dist.barrier()  # all have read it
    if rank == 0 and epochs_done:
        save(checkpoint | {"options": vars(args)}, dump / "checkpoint.pth")
    elif rank == 0 and (dump / "checkpoint.pth").exists():
        aside = next(path for i in count(1) if not (path := dump / f"collapsed-{i}.pth").exists())
        os.replace(dump / "checkpoint.pth", aside)
        told += f"; what was learned so far is in {aside}"
    if dist.is_initialized():
        dist.barrier()
    say(f"recovering ({len(args.recovered)} of at most {RECOVERIES} times): back to {epochs_done} epochs done, {told}")


def resume(
    args: argparse.Namespace,
    dump: Path,
    model: SwAV,
    optimizer: LARS,
    scaler: torch.amp.GradScaler,
    swav_loss: SwAVLoss,
    steps_per_epoch: int,
) -> int:
    """Load dump/checkpoint.pth if there is one; the number of epochs done. Raises ValueError if it does not fit."""
    path = dump / "checkpoint.pth"
    checkpoint = load_checkpoint(path) if path.exists() else None
    epochs_done = 0 if checkpoint is None else checkpoint["epoch"]
    if dist.is_initialized():
        seen = [None] * dist.get_world_size()
        dist.all_gather_object(seen, epochs_done)
        if len(set(seen)) > 1:
            raise ValueError(
                f"--dump_path: expected a folder that all machines share, but they see different runs in {dump}"
            )
    if checkpoint is None:
        if environment("RANK", 0) == 0:
            (dump / "last_good.pth").unlink(missing_ok=True)  # of a run whose checkpoint was taken away
        return 0
    changes = changed_options(args, checkpoint)
    told = ", ".join(f"{name} {before} -> {now}" for name, (before, now) in changes.items())
    other_folder = f"write another --dump_path, or delete {dump}"
    if any(name in changes for name in ARCHITECTURE):
        raise ValueError(f"--dump_path: {path} is of another architecture ({told}); {other_folder}")
    if changes and epochs_done >= args.epochs:
        raise ValueError(f"--dump_path: {dump} holds a finished run with other options ({told}); {other_folder}")
    try:
        model.load_state_dict(checkpoint["state_dict"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        for group in optimizer.param_groups:
            group["weight_decay"] = args.wd
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"--dump_path: {path} does not fit this model: {error}; {other_folder}".replace("\n", " ")
        ) from None
    if checkpoint["scaler"]:  # empty where the run so far needed none
        scaler.load_state_dict(checkpoint["scaler"])
    say(
        f"resuming from {path}: {epochs_done} of {args.epochs} epochs done"
        + (f"; options changed: {told}" if told else "")
    )
    if checkpoint["step"] != epochs_done * steps_per_epoch:
        before = checkpoint["step"] // epochs_done
        say(
            f"steps an epoch: now {steps_per_epoch}, were {before}: schedule and prototype freeze follow the new number"
        )
    queues, queue_length, _ = checkpoint["queue"]["embeddings"].shape
    if (queues, queue_length) == (len(args.crops_for_assign), args.queue_length):
        swav_loss.scatter_queue(checkpoint["queue"], args.batch_size)
    elif queue_length:
        say(
            f"--queue_length: now {args.queue_length} for {len(args.crops_for_assign)} assigning crops, "
            f"was {queue_length} for {queues}: the queue starts empty"
        )
    return epochs_done


def open_metrics(dump: Path, epochs_done: int, tensorboard: bool) -> Callable[[dict], None]:
    """What writes a row to metrics.jsonl, and to TensorBoard if wanted; rows of an interrupted epoch are taken out."""
    path = dump / "metrics.jsonl"
    rows = path.read_text().splitlines() if path.exists() else []
    kept = [row for row in rows if row.endswith("}") and json.loads(row)["epoch"] <= epochs_done]
    path.write_text("".join(row + "\n" for row in kept))
    file = path.open("a", buffering=1)
    board = None
    if tensorboard:
        from torch.utils.tensorboard import SummaryWriter  # which needs a package that few have

        last_step = json.loads(kept[-1])["step"] if kept else -1
        board = SummaryWriter(str(dump / "tensorboard"), purge_step=last_step + 1)

    def write(row: dict) -> None:
        file.write(json.dumps(row) + "\n")
        for name, value in row.items():
            if board is not None and value is not None:
                board.add_scalar(name, value, row["step"])
        if board is not None:
            board.flush()

    return write


def describe(
    args: argparse.Namespace,
    images: Dataset,
    loader: DataLoader,
    model: SwAV,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """The first lines of a run."""
    world_size = environment("WORLD_SIZE", 1)
    group = f"{world_size} processes ({dist.get_backend()})" if dist.is_initialized() else "1 process"
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    say(
        f"device: {where}; {group}; {loader.num_workers} loader workers each; {str(dtype).removeprefix('torch.')}; "
        f"sinkhorn: {backend(device)}"
    )
    source = getattr(images, "root", None) or args.data_path or "drawn in memory"
    if isinstance(images, CachedImages):
        source = f"{source}, kept in memory, {images.ends[-1] / 2**20:.0f} MiB"
    say(
        f"data: {len(images)} images ({args.dataset}, {source}); {len(loader)} steps an epoch of "
        f"{args.global_batch_size} images; {args.epochs} epochs"
    )
    parameters = sum(p.numel() for p in model.parameters())
    say(
        f"model: {args.arch}, {parameters / 1e6:.2f} M parameters, {model.num_features} features, "
        f"{args.nmb_prototypes} prototypes (ln K = {math.log(args.nmb_prototypes):.3f})"
    )


def step_line(row: dict, epochs: int, steps: int) -> str:
    memory = f"GPU {row['gpu_memory_gib']:.1f} GiB  " if row["gpu_memory_gib"] else ""
    return (
        f"epoch {row['epoch']}/{epochs}  step {row['step']}/{steps}  loss {row['loss']:.4f} (ln K {row['ln_k']:.3f})  "
        f"lr {row['lr']:.4g}  {row['images_per_s']:.0f} images/s  data wait {row['data_wait_percent']:.0f}%  "
        f"{memory}ETA {timedelta(seconds=round(row['eta_s']))}"
    )


def stop_on_bad_loss(
    args: argparse.Namespace,
    path: Path,
    epoch: int,
    losses: list[float],
    batches: list[list[tuple[int, int]]],
    model: SwAV,
    last_batch: dict[str, torch.Tensor],
) -> NoReturn:
    """Save what led to a loss that is not finite and raise FloatingPointError.

    losses: of this epoch's steps so far. batches: this process's (epoch, image index) of each step. last_batch: the
    newest one. On a CPU that is the bad one and the weights are still good; on a GPU losses are read when a line is
    due, so the weights may be spoiled by then, and the bad batch is to be drawn again from its image indices.
    """
    bad = next(i for i, loss in enumerate(losses) if not math.isfinite(loss))
    contents = {"epoch": epoch + 1, "step": epoch * len(batches) + bad + 1, "losses": losses, "options": vars(args)}
    contents |= {"image_indices": [index for _, index in batches[bad]], "last_batch": last_batch}
    save(contents | {"state_dict": model.state_dict()}, path)
    if dist.is_initialized():
        dist.barrier()  # torchrun ends all processes with the first: not before each has saved
    saved = path.with_name("bad_loss-*.pth")
    raise FloatingPointError(
        f"the loss is {losses[bad]} at step {contents['step']} (epoch {epoch + 1}), stopped; its images, the newest "
        f"batch and the weights are in {saved}, one file a process; checkpoint.pth there is as after the last whole "
        "epoch; a lower --base_lr or --precision fp32 may help"
    )


if __name__ == "__main__":
    run(lambda: main(parse_args(sys.argv[1:])), "; the same command goes on from the last finished epoch")
