"""Train SwAV (Caron et al. 2020) on one process or many, on GPUs or CPUs.

    python train.py                                                          # built-in images, minutes on a CPU
    python train.py --data_path photos --arch resnet18                       # a folder of images
    python train.py @recipes/cifar10.args --epochs 100                       # a recipe, with one option changed
    torchrun --nproc_per_node=4 train.py --data_path imagenet/train          # 4 GPUs: the paper's 200 epochs, batch 256
    torchrun --nnodes=8 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \\
        train.py @recipes/800ep.args --data_path imagenet/train              # 64 GPUs: the same command on each node

Checkpoints and metrics.jsonl go to --dump_path. The same command resumes after the last saved step.
"""

import argparse
import math
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile

# Must precede `import torch`: how often a thread of GNU OpenMP looks for work before it sleeps, some 10 us here, 3 ms
# by default. Measured in MEASURED.md.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

import backbones
import checkpoint
import launch
import machine
import processes
import run_folder
from cache import CachedImages, cache_images, sizes_to_cache
from data import (
    CroppedBatches,
    MultiCrop,
    UnreadableImage,
    augment,
    batch_bytes,
    crops_to_device,
    reuse_freed_memory,
    start_epoch,
    training_loader,
)
from defaults import APEX_GROUP_SIZE, CROP_LISTS, DERIVED, LARGE_SET, derive
from features import (
    assigned_prototypes,
    describe_images,
    measure_quality,
    quality_crops,
    quality_epochs,
    tracked_images,
)
from guard import CollapseGuard, describe_collapse, describe_slow, diagnose_collapse
from images import DATASETS, BadImages, ImageFiles, fingerprint, open_images, typical_side
from launch import UserError, epoch_count, log, nonnegative, nonnegative_int, number, positive, positive_int
from loss import SwAVLoss
from model import STEMS, SwAV, batchnorm_group, data_parallel, memory_layout, sync_batchnorm
from optim import LARS, warmup_cosine
from run_log import RunLog
from sinkhorn_ext import backend
from sinkhorn_ext.__main__ import report

SHAPES_RECIPE = Path(__file__).parent / "recipes" / "shapes.args"
REPLACED_BY_TORCHRUN = ("dist_url", "rank", "world_size", "local_rank")
DEFAULT_ARCH = "resnet50"
MAX_RECOVERIES = 3  # of --on_collapse recover


# Options


def option_parser() -> launch.OptionParser:
    """The options of train.py. To add one, declare it here; `affects` says whether a resumed run compares it."""
    parser = launch.OptionParser(
        prog="train.py",
        usage="train.py [@recipes/NAME.args] [options]",
        description="Train SwAV on images without labels. Without --data_path and --dataset it trains on built-in "
        "images.\nOn 4 GPUs: torchrun --nproc_per_node=4 train.py [options]",
        epilog="The other options follow from your images; they are printed at the start, with reasons.\n"
        "--help-all shows them all. An interrupted run resumes with the same command.",
        fromfile_prefix_chars="@",
    )

    def add(name: str, default: object, kind: Callable, help: str, **more) -> None:
        parser.add(
            name, default, kind, help, **{"default_text": "from the images" if name in DERIVED else None, **more}
        )

    parser.start_group("images")
    add("data_path", None, str, "Train on the images in this folder, at any depth.", common="DIR")
    add("dataset", "folder", str, f"Train on {', '.join(name for name in DATASETS if name != 'folder')}.",
        common="NAME", choices=DATASETS)  # fmt: skip
    add("nmb_crops", None, positive_int, "crops of each resolution, large ones first; small ones suit large sets",
        nargs="+")  # fmt: skip
    add("size_crops", None, positive_int, "side of the crops in pixels; multiples of 32 for ResNet-50", nargs="+")
    add("min_scale_crops", None, positive, "smallest area of a crop as a share of the image; raise it if images are "
        "centred objects, such as letters", nargs="+")  # fmt: skip
    add("max_scale_crops", None, positive, "largest area of a crop as a share of the image", nargs="+")
    add("hflip", 0.5, nonnegative, "probability of a horizontal flip; 0 for letters, digits and signs")
    add("vflip", 0.0, nonnegative, "probability of a vertical flip; 0.5 for images without a top, such as aerial ones")
    add("color_strength", None, nonnegative, "strength of the colour jitter: 1 as in the paper, 0 for none; lower "
        "it if colours tell your images apart")  # fmt: skip
    add("grayscale", 0.2, nonnegative, "probability of greyscale; 0 if colours tell your images apart")
    add("blur_sigma", None, nonnegative, "sigma of the strongest blur in pixels, 0 for none; lower it if fine textures "
        "tell your images apart")  # fmt: skip
    add("max_bad_images", None, nonnegative_int, "unreadable images up to which the run goes on, with others in their "
        "place; bad_images.txt lists them (default: 1 %% of the images, at least 1)", affects="nothing")  # fmt: skip

    parser.start_group("model", affects="model")
    add("arch", None, backbones.arch_name, "Train this network, or timm/NAME; list shows all.",
        common="NAME", default_text="resnet50")  # fmt: skip
    add("init", None, str, "Start from weights: a file, or torchvision's by name.", common="FILE",
        default_text="random", affects="learning")  # fmt: skip
    add("width", None, positive_int, "channels of its stem, to shrink or widen it (default: that of the arch)")
    add("blocks", None, positive_int, "residual blocks of its four stages (default: those of the arch)", nargs=4)
    add("stem", None, str, "imagenet: for crops from 96 pixels on; medium: about 48; small: up to 32", choices=STEMS)
    add("hidden_mlp", 2048, nonnegative_int, "hidden units of the projection head, 0 for a linear head")
    add("feat_dim", 128, positive_int, "dimensions of an embedding")
    add("nmb_prototypes", None, number(int, 2), "number of prototypes: several times the classes that you expect")

    parser.start_group("loss")
    add("crops_for_assign", None, nonnegative_int, "indices of the crops that get codes, which the other crops "
        "predict; the large ones", nargs="+")  # fmt: skip
    add("temperature", None, positive, "temperature of the predictions' softmax; lower is sharper")
    add("epsilon", None, positive, "Sinkhorn's entropy weight; lower gives sharper codes. Without --relative_epsilon "
        "on it is absolute, as in the paper, and small data sets may collapse")  # fmt: skip
    add("relative_epsilon", None, str, "on: measure epsilon in units of the scores' standard deviation, so that codes "
        "stay sharp when embeddings become similar; off: as in the paper", choices=("on", "off"), nargs="?",
        const="on")  # fmt: skip
    add("sinkhorn_iterations", 3, positive_int, "rounds of Sinkhorn-Knopp")
    add("queue_length", None, nonnegative_int, "past images that help to balance codes, over all processes; for large "
        "sets if the global batch is smaller than nmb_prototypes; rounded down to a multiple of it")  # fmt: skip
    add("epoch_queue_starts", None, nonnegative_int, "epoch from which the queue fills; later is safer")

    parser.start_group("optimisation")
    add("epochs", 200, epoch_count, "Train for this many passes over the images.", common="N")
    add("batch_size", None, positive_int, "Take this many images per process and step.", common="N")
    add("base_lr", None, positive, "learning rate for the global batch (batch_size x processes), not rescaled for you")
    add("final_lr", None, nonnegative, "learning rate at the end of the cosine schedule")
    add("warmup_epochs", None, nonnegative_int, "epochs of linear warm-up: 10 for batches in the thousands")
    add("start_warmup", None, nonnegative, "learning rate at the start of the warm-up")
    add("wd", 1e-6, nonnegative, "weight decay")
    add("freeze_prototypes_niters", None, nonnegative_int, "steps at the start in which prototypes do not change: "
        "about an epoch")  # fmt: skip

    parser.start_group("machine", affects="nothing")
    add("device", "auto", str, "Train on cuda, cpu, mps, or auto: cuda if there is such a GPU, else cpu.",
        common="NAME", choices=("auto", "cuda", "cpu", "mps"))  # fmt: skip
    add("precision", None, str, "Compute in bf16, fp16 or fp32 (default: bf16 if the device supports it).",
        common="NAME", choices=tuple(machine.DTYPES), affects="learning")  # fmt: skip
    add("use_fp16", None, str.lower, "alias: true is --precision fp16, false is fp32", choices=("true", "false"),
        affects="learning")  # fmt: skip
    add("sync_bn", None, str, "BatchNorm statistics. pytorch: over all processes; apex: over groups of them, as the "
        "paper's large batches (without apex); none: per process, which lets embeddings encode the process",
        choices=("pytorch", "apex", "none"), affects="learning")  # fmt: skip
    add("syncbn_process_group_size", None, positive_int, "processes per group of --sync_bn apex (default: "
        f"{APEX_GROUP_SIZE})", affects="learning")  # fmt: skip
    add("workers", "auto", launch.workers_or_auto, "Load images in this many worker processes.", common="N")
    add("augment", "auto", str, "where to flip, jitter and blur. device (auto): batched, on the training device; "
        "workers: in the loader's workers", choices=("auto", "device", "workers"))  # fmt: skip
    add("cache", "auto", str, "keep decoded images in memory, once per machine. auto: if they fit into a quarter of "
        "the free memory; ram: into 80 %%, else fail; off: never", choices=("auto", "off", "ram"))  # fmt: skip
    add("compile", "auto", str, "torch.compile for backbone and augmentation: a minute or two at the start, faster "
        "steps on a GPU. auto: in long runs of large crops on one GPU", choices=("auto", "on", "off"), nargs="?",
        const="on")  # fmt: skip
    add("seed", 31, nonnegative_int, "Seed the weights, the order of images and the crops.", common="N",
        affects="learning")  # fmt: skip

    parser.start_group("output", affects="nothing")
    parser.add("dump_path", None, str, "Write, or resume, the run in this folder.", common="DIR",
        default_text="runs/ and the name of the images")  # fmt: skip
    add("checkpoint_freq", 25, positive_int, "epochs between checkpoints that are kept; checkpoint.pth is written "
        "after every epoch")  # fmt: skip
    add("checkpoint_minutes", 15.0, positive, "also write checkpoint.pth this often within an epoch")
    parser.add("resume_anyway", None, str, "resume an unfinished run in dump_path with other images or options: on "
        "or off", choices=("on", "off"), nargs="?", const="on", default_text="off")  # fmt: skip
    add("replay", None, str, "run the step of a bad_step-RANK.pth again and name its first bad tensor; no training")
    add("log_freq", 50, positive_int, "steps between log lines")
    add("eval_every", None, nonnegative_int, "epochs between label-free quality measures (RankMe, LiDAR and others, "
        "see features.py); 0: never (default: as often as about 1.5 %% of the time allows)")  # fmt: skip
    add("tensorboard", "off", str, "Also log to dump_path/tensorboard: on or off.", common="NAME",
        choices=("on", "off"), nargs="?", const="on")  # fmt: skip
    add("on_collapse", "warn", str, "If the run collapses, warn, stop, or recover.", common="NAME",
        choices=("warn", "stop", "recover"))  # fmt: skip
    for name in REPLACED_BY_TORCHRUN:
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    return parser


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """The options of a command line, after those of recipes/shapes.args if it names no images. Raises UserError."""
    names = {word.partition("=")[0].replace("_", "-") for word in argv}
    names_images = names & {"--data-path", "--dataset", "--help", "--help-all", "-h", "--replay"}
    if not names_images and not any(word.startswith("@") for word in argv):
        log(f"no images named: running the recipe {SHAPES_RECIPE}")
        argv = [f"@{SHAPES_RECIPE}", *argv]
    args = option_parser().parse_args(argv)
    if args.use_fp16:
        precision = "fp16" if args.use_fp16 == "true" else "fp32"
        if args.precision not in (None, precision):
            raise UserError(f"--use_fp16 {args.use_fp16}: expected --precision {precision} or none beside it, got "
                            f"{args.precision}; leave one of them out")  # fmt: skip
        args.precision = precision
    if args.arch is None and args.init is None:
        args.arch = DEFAULT_ARCH
    if args.dump_path is None:
        args.dump_path = str(Path("runs", name_of_images(args)))
    return args


def name_of_images(args: argparse.Namespace) -> str:
    """The data set's name, or that of its folder: imagenet for imagenet/train."""
    if args.dataset != "folder" or not args.data_path:
        return args.dataset
    folder = Path(args.data_path).absolute()
    return (folder.parent if folder.name == "train" else folder).name or "folder"


def check_args(args: argparse.Namespace, world_size: int = 1) -> None:
    """Raise UserError, naming option, value and what is accepted, for all that can be known before work starts.

    `resolve_options` calls it again when the options that the user left open are known.
    """
    for name in REPLACED_BY_TORCHRUN:
        if getattr(args, name) is not None:
            raise UserError(f"--{name}: leave it out; torchrun --nproc_per_node=4 train.py ... sets it")
    group_size = args.syncbn_process_group_size or APEX_GROUP_SIZE
    if args.sync_bn == "apex" and world_size % min(group_size, world_size):
        raise UserError(
            f"--syncbn_process_group_size: expected a divisor of the {world_size} processes, got {group_size}"
        )
    if args.dataset == "shapes" and args.data_path:
        raise UserError(
            f"--data_path: expected none for --dataset shapes, whose images are drawn, got {args.data_path}; "
            "for a folder of your own write --dataset folder"
        )
    if args.dataset == "folder" and not os.path.isdir(args.data_path or ""):
        raise UserError(f"--data_path: expected a folder, got {args.data_path or 'none'}")
    if args.tensorboard == "on" and find_spec("tensorboard") is None:
        raise UserError("--tensorboard: needs its package: pip install tensorboard")
    if args.batch_size is not None and args.batch_size < 2:
        raise UserError(f"--batch_size: expected 2 or more (BatchNorm needs several images), got {args.batch_size}")
    if args.warmup_epochs is not None and args.warmup_epochs > args.epochs:
        raise UserError(f"--warmup_epochs: expected at most the {args.epochs} of --epochs, got {args.warmup_epochs}")
    dump = Path(args.dump_path)
    try:
        os.lstat(args.dump_path or "\0")  # "" would be the current folder
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is empty, or holds a zero byte"
        raise UserError(f"--dump_path: expected a folder, got {args.dump_path[:100]!r}: {reason}") from None
    nearest = next(folder for folder in (dump, *dump.absolute().parents) if os.path.lexists(folder))
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(f"--dump_path: expected a folder that can be written, got {dump} ({nearest} is not one)")
    if args.arch and args.arch.startswith(backbones.TIMM):
        given = {name: getattr(args, name) for name in ("width", "blocks", "stem")}
        given = {name: value for name, value in given.items() if value not in (None, "imagenet")}
        if given:
            raise UserError(f"{launch.as_command_line(given)}: leave it out with --arch {args.arch}, whose name has it")
    if any(getattr(args, name) is None for name in (*DERIVED, "arch")):
        return
    try:
        with launch.user_errors("--"), torch.device("meta"):
            build_multicrop(args)
            build_model(args)
            build_loss(args, world_size)
    except RuntimeError as error:  # of torch, whose messages are long
        reason = str(error).splitlines()[0]
        raise UserError(f"--width, --blocks, --queue_length: expected smaller ones; torch says: {reason}") from None


def resolve_options(
    args: argparse.Namespace, images: Dataset, world_size: int, earlier: dict | None = None
) -> tuple[dict, dict[str, str]]:
    """Fill the options that the user left open, print them with reasons, and check all. Raises UserError.

    They come from the run to resume, if there is one, else from the images (defaults.py). earlier: its newest state.
    Returns what checkpoints keep of this (from options to value_range, see checkpoint.py), and the reasons by option.
    """
    if len(images) < 2 * world_size:
        raise UserError(f"--data_path: expected {2 * world_size} images or more (2 per process), got {len(images)}")
    parser, dump = option_parser(), Path(args.dump_path)
    affects = parser.affects
    user_options = {n: v for n, v in vars(args).items() if v is not None and affects.get(n, "nothing") != "nothing"}
    chosen, recovered = {}, []
    if earlier:
        recovered = earlier["recovered"]
        chosen = checkpoint.inherited_options(
            earlier, user_options, derived=DERIVED, crop_lists=CROP_LISTS, world_size=world_size
        )
    given = {name: user_options[name] for name in DERIVED if name in user_options}
    given |= {name: value for name, (value, _) in chosen.items()}
    if args.arch.startswith(backbones.TIMM):  # it has a stem of its own
        args.stem = given["stem"] = "imagenet"
    facts = dict(images=len(images), image_side=typical_side(images), world_size=world_size, epochs=args.epochs)
    facts["init"] = args.init is not None
    if len(images) < LARGE_SET and not {"min_scale_crops", "color_strength"} <= given.keys():
        try:
            facts["described"] = describe_images(images)
        except UnreadableImage as error:
            raise UserError(str(error)) from None
    derived = derive(**facts, given=given)
    if "size_crops" in derived:
        wanted, reason = derived["size_crops"]
        sizes = backbones.sizes_taken(args.arch, wanted)
        if sizes != wanted:
            derived = derive(**facts, given={**given, "size_crops": sizes})
            derived["size_crops"] = (
                sizes,
                f"{reason}: the nearest to {' '.join(map(str, wanted))} that {args.arch} takes",
            )
    chosen |= derived
    for name, (value, reason) in chosen.items():
        setattr(args, name, value)
        log(f"  {launch.as_command_line({name: value})}  ({reason})")
    global_batch_size = args.batch_size * world_size
    remainder = args.queue_length % global_batch_size
    if remainder:
        args.queue_length -= remainder
        log(f"--queue_length: rounded down to {args.queue_length}, a multiple of the global batch {global_batch_size}")
    check_args(args, world_size)
    for line in options_without_effect(args, user_options, world_size):
        log(line)
    most = len(images) // world_size
    if args.batch_size > most:
        raise UserError(
            f"--batch_size: expected at most {most} ({len(images)} images over {world_size} process(es)), "
            f"got {args.batch_size}"
        )
    options = {**vars(args), "global_batch_size": global_batch_size}
    settings = {"options": options, "user_options": user_options, "recovered": recovered}
    settings |= {"images": fingerprint(images), "value_range": images.value_range}
    if earlier:
        checkpoint.check_same_run(dump, earlier, settings, affects, args.resume_anyway == "on")
    usual = {**{name: parser.get_default(name) for name in options}, "arch": DEFAULT_ARCH}
    reasons = {name: "default" for name, value in options.items() if value == usual[name]}
    return settings, reasons | {name: reason for name, (_, reason) in chosen.items()}


def options_without_effect(args: argparse.Namespace, user_options: dict, world_size: int) -> list[str]:
    """A line for each option that the user set, to something else than 0, and that changes nothing in this run.

    args: with all options known. user_options: those that the user set.
    """
    set_options = {**user_options, "cache": args.cache == "ram" and "ram"}
    never = f"as it starts at epoch {args.epoch_queue_starts}, in a run of {args.epochs} epochs"
    checks = (
        ("start_warmup", not args.warmup_epochs, "without --warmup_epochs"),
        ("final_lr", args.warmup_epochs == args.epochs, "as the warm-up takes the whole run"),
        ("queue_length", args.queue_length and args.epoch_queue_starts >= args.epochs, never),
        ("epoch_queue_starts", not args.queue_length, "without --queue_length"),
        ("sync_bn", world_size == 1, "in a single process"),
        ("syncbn_process_group_size", args.sync_bn != "apex", "without --sync_bn apex"),
        ("cache", args.dataset != "folder", f"as the images of {args.dataset} are in memory anyway"),
    )
    found = [(name, reason) for name, is_idle, reason in checks if is_idle and set_options.get(name)]
    return [f"{launch.as_command_line({name: set_options[name]})} has no effect {reason}" for name, reason in found]


def build_multicrop(args: argparse.Namespace) -> MultiCrop:
    scales = args.min_scale_crops, args.max_scale_crops
    names = "blur_sigma", "hflip", "vflip", "color_strength", "grayscale"
    return MultiCrop(args.size_crops, args.nmb_crops, *scales, **{name: getattr(args, name) for name in names})


def choose_workers(args: argparse.Namespace, device: torch.device, in_memory: bool) -> tuple[int, int]:
    """(loader workers that the options ask for, bytes of a batch). Sets torch's threads."""
    crop_only = args.augment != "workers"
    workers = machine.set_threads_and_workers(args.workers, device, crop_only=crop_only, in_memory=in_memory)
    return workers, batch_bytes(build_multicrop(args), args.batch_size, crop_only=crop_only)


def build_loader(
    args: argparse.Namespace, images: Dataset, rank: int, world_size: int, device: torch.device
) -> DataLoader:
    workers = machine.workers_that_fit(*choose_workers(args, device, in_memory=not isinstance(images, ImageFiles)))
    sharing = dict(seed=args.seed, rank=rank, world_size=world_size, workers=workers)
    multi_crop, pin_memory, crop_only = build_multicrop(args), device.type == "cuda", args.augment != "workers"
    return training_loader(images, multi_crop, args.batch_size, pin_memory=pin_memory, crop_only=crop_only, **sharing)


def build_model(args: argparse.Namespace) -> SwAV:
    options = dict(width=args.width, blocks=args.blocks, stem=args.stem)
    options["backbone"] = backbones.foreign_backbone(args.arch, args.size_crops)
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


# The run


def main(args: argparse.Namespace) -> None:
    """Check, set up, train, clean up. Raises UserError for bad options, RunStopped if the run ends itself."""
    device = machine.choose_device(args.device)
    if args.replay:
        replay(args.replay, args.data_path, device)
        return
    dtype, dump = machine.choose_precision(args.precision, device), Path(args.dump_path)
    rank, world_size = processes.setup_processes(device)
    check_args(args, world_size)
    open_dump_path(dump)
    with run_folder.locked(dump) if rank == 0 else nullcontext():
        log("options: " + launch.as_command_line({n: v for n, v in vars(args).items() if v not in (None, [])}))
        check_same_options(args, dtype)
        images, settings, reasons = open_and_resolve(args, device, world_size)
        launch.log_to(dump / "log.txt")
        if rank == 0:
            facts = dict(world_size=world_size, device=str(device), sinkhorn=backend(device), sinkhorn_ext=report())
            run_folder.write_facts(dump, settings, reasons, **facts)
        with launch.stop_signals() as requested_stop:
            while True:
                try:
                    train(args, images, settings, rank, world_size, device, dtype, requested_stop)
                    break
                except Collapse:
                    recover(args, settings)
                except UnreadableImage as error:  # nor are those that were tried in its place
                    message = str(error).splitlines()[-1].removeprefix("data.UnreadableImage: ")
                    raise launch.RunStopped(message) from None
    processes.leave_processes()


def check_same_options(args: argparse.Namespace, dtype: torch.dtype) -> None:
    """Raise UserError if processes have other options. Machines may hold the images in different folders."""
    affects = option_parser().affects
    names = (name for name in vars(args) if affects.get(name, "nothing") != "nothing" and name != "data_path")
    options = {f"--{name}": getattr(args, name) for name in names}
    processes.check_same("comparing options", options | {"--dump_path": args.dump_path, "precision": str(dtype)})


def open_and_resolve(args: argparse.Namespace, device: torch.device, world_size: int) -> tuple[Dataset, dict, dict]:
    """Open the images, resolve options and cache, together with the other processes: (images, settings, reasons)."""
    earlier = checkpoint.find(Path(args.dump_path)) if launch.environment("RANK", 0) == 0 else None
    # A set that has grown is scaled as before.
    scale = processes.share("reading the run so far", lambda: (earlier or {}).get("value_range"))
    read_off: dict[str, str] = {}
    if args.init:
        read_off = {name: f"as in {args.init}" for name in backbones.SHAPE_OPTIONS if getattr(args, name) is None}
        read_off["init_sha256"] = f"checksum of {args.init}"
        vars(args).update(processes.share("reading --init", lambda: start_options(args, earlier)))
    # The first process of each machine downloads and finds errors.
    images = processes.in_turn(
        "opening the images",
        lambda is_first: open_images(args.dataset, args.data_path, "pretrain", download=is_first, value_range=scale),
    )
    if world_size > 1:
        found = fingerprint(images)
        processes.check_same("comparing images", {"images": found["images"], "their paths": found["paths"][:12]})
    if any(getattr(args, name) is None for name in DERIVED):
        log("derived from the images, or from the run so far:")
    settings, reasons = processes.share("choosing options", lambda: resolve_options(args, images, world_size, earlier))
    vars(args).update({name: settings["options"][name] for name in DERIVED})
    sizes = None
    if launch.environment("LOCAL_RANK", 0) == 0:
        workers, bytes_of_batch = choose_workers(args, device, in_memory=True)
        sizes = sizes_to_cache(images, args.cache, for_workers=machine.shared_memory_needed(workers, bytes_of_batch))
    return cache_images(images, sizes), settings, reasons | read_off


def start_options(args: argparse.Namespace, earlier: dict | None) -> dict[str, object]:
    """The options that the weights of --init decide, and init_sha256, their file's checksum. Raises UserError.

    earlier: the newest state of the run to resume, which has weights of its own: the file is not needed any more.
    """
    asked = {name: getattr(args, name) for name in backbones.SHAPE_OPTIONS}
    if not earlier:
        return backbones.read_start(args.init, asked)
    before = earlier["options"]
    log(f"--init: not read again, as the run in {args.dump_path} resumes with its own weights")
    known = {name: before.get(name) if value is None else value for name, value in asked.items()}
    return known | {"init_sha256": before.get("init_sha256")}


def open_dump_path(dump: Path) -> None:
    """Make the folder, and check on each machine that it can be written. Raises UserError."""
    try:
        dump.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=dump).close()
    except OSError as error:
        raise UserError(f"--dump_path: expected a folder that can be written, got {dump} ({error.strerror})") from None


def train(
    args: argparse.Namespace,
    images: Dataset,
    settings: dict,
    rank: int,
    world_size: int,
    device: torch.device,
    dtype: torch.dtype,
    requested_stop: Callable[[], str | None] = lambda: None,
) -> None:
    """Train from the first step to the last, or from the checkpoint in dump_path. The numbers 1 to 6 are the method.

    settings: from `resolve_options`. requested_stop: see launch.stop_signals. Raises UserError if dump_path holds
    another run, RunStopped at inf or nan, after a signal or as --on_collapse says, Collapse if the caller should
    `recover` and call this again.
    """
    torch.manual_seed(args.seed)
    dump = Path(args.dump_path)
    reuse_freed_memory()
    loader = build_loader(args, images, rank, world_size, device)
    steps_per_epoch = len(loader)
    schedule = args.base_lr, args.final_lr, args.warmup_epochs, args.start_warmup
    learning_rates = warmup_cosine(steps_per_epoch, args.epochs, *schedule)
    model = build_model(args)
    if args.init and rank == 0 and not checkpoint.exists(dump):  # the others get its weights from data_parallel
        backbones.start_from(model, args.init, args.arch)
    layout = memory_layout(model, device)
    model = model.to(device, memory_format=layout)
    if world_size > 1 and args.sync_bn != "none":
        group_size = args.syncbn_process_group_size or APEX_GROUP_SIZE
        model = sync_batchnorm(model, batchnorm_group(args.sync_bn, group_size, processes.PROCESS_TIMEOUT))
    criterion = build_loss(args, world_size).to(device)
    optimizer = LARS(model.parameters(), lr=args.base_lr, weight_decay=args.wd)  # each step sets its learning rate
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    guard = CollapseGuard(args.nmb_prototypes, device)
    parts = dict(model=model, optimizer=optimizer, scaler=scaler, criterion=criterion, guard=guard)
    first_epoch, first_step, losses = checkpoint.resume(dump, settings, parts, steps_per_epoch)
    steps_done = first_epoch * steps_per_epoch + first_step
    augment_crops, steps = augment, args.epochs * steps_per_epoch
    if machine.use_compile(args.compile, device, world_size, steps=steps - steps_done, crop_size=max(args.size_crops)):
        log("compiling: the first steps take a minute or two")
        warnings.filterwarnings("ignore", "TensorFloat32")  # torch advises TF32, which would change codes by up to 1 %
        model.features = torch.compile(model.features, dynamic=False)  # only the backbone; one graph per resolution
        augment_crops = torch.compile(augment, dynamic=False)
    place_options = dict(memory_format=layout, stream=torch.cuda.Stream(device) if device.type == "cuda" else None)
    network = data_parallel(model, device) if world_size > 1 else model  # which averages gradients over processes
    log_options = dict(log_freq=args.log_freq, ln_k=math.log(args.nmb_prototypes), tensorboard=args.tensorboard == "on")
    log_options |= dict(images_per_step=args.batch_size * world_size, device=device)
    run_log = RunLog(dump, epochs=args.epochs, steps_done=steps_done, steps_per_epoch=steps_per_epoch, **log_options)
    run_log.epoch_losses = losses
    saver_options = dict(sampler=loader.batch_sampler, minutes=args.checkpoint_minutes, requested_stop=requested_stop)
    saver = checkpoint.Saver(dump, parts | {"run_log": run_log}, settings, **saver_options)
    bad_images = BadImages(images, args.max_bad_images, dump)
    tracked = tracked_images(images, args.size_crops[0], rank, world_size).to(device, memory_format=layout)
    multi_crop = build_multicrop(args)
    measured_epochs = quality_epochs(args.epochs, args.eval_every, images=len(images), multi_crop=multi_crop)
    measures_quality = max(measured_epochs, default=0) > first_epoch
    measured_on = quality_crops(images, multi_crop, rank, world_size) if measures_quality else None
    print_run_summary(args, images, loader, model, device, dtype)

    batches = start_epoch(loader, first_epoch, first_step) if first_epoch < args.epochs else None
    for epoch in range(first_epoch, args.epochs):
        if epoch >= args.epoch_queue_starts:
            criterion.start_queue()
        first = first_step if epoch == first_epoch else 0
        for step, (batch, _) in run_log.timed_steps(epoch, batches, first):  # step: of the whole run, from 0
            launch.note_activity(f"step {step + 1}")
            crops = crops_to_device(batch, device, augment=augment_crops, **place_options)  # V of [B, 3, S, S]
            # 1. Prototypes to the unit sphere
            model.normalize_prototypes()
            # 2. Forward
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                embeddings, scores = network(crops)  # [V*B, D], [V*B, K]
            # 3. Codes, the softmax of code_logits, and 4. swapped prediction
            loss, code_logits = criterion.loss_and_code_logits(embeddings, scores, model.prototypes.weight)
            # 5. Backward
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            if step < args.freeze_prototypes_niters:
                model.prototypes.weight.grad = None
            # 6. Learning rate, and LARS, which changes nothing if a gradient is inf or nan
            for group in optimizer.param_groups:
                group["lr"] = learning_rates[step]
            scaler.step(optimizer)
            scaler.update()

            # Not part of the method: watch, log, save
            run_log.record_loss(loss)
            guard.count(code_logits)
            if run_log.line_is_due:
                saver.stop_on_bad_step()
                one_crop = embeddings.detach().chunk(len(crops))[args.crops_for_assign[0]]  # [B, D]
                progress = dict(share_done=run_log.share_done, step=step + 1)
                measures = guard.watch(run_log.interval_loss, code_logits, one_crop, **progress)
                if scaler.is_enabled():
                    measures["skipped_steps"] = step + 1 - steps_done - optimizer.steps
                measures["bad_images"] = bad_images.update()
                run_log.log_step(measures, lr=learning_rates[step])
                if measures["collapsing"]:
                    saver.wait()  # for the state that it may go back to
                    handle_collapse(args, settings, measures, step + 1)
            saver.save_if_due()

        is_last = epoch + 1 == args.epochs
        batches = None if is_last else start_epoch(loader, epoch + 1)  # workers load while the checkpoint is written
        codes = assigned_prototypes(model, criterion.codes, tracked, args.batch_size)
        quality = measure_quality(model, measured_on, device, args.batch_size) if epoch + 1 in measured_epochs else {}
        run_log.log_epoch(codes_changed=guard.share_changed(codes), **quality)
        warn_if_slow(guard, quality, epoch + 1, args.epochs)
        saver.save_epoch(
            keep=is_last or (epoch + 1) % args.checkpoint_freq == 0,
            is_good=args.on_collapse == "recover" and not guard.epoch_is_stuck(run_log.epoch_loss),
        )
    saver.finish()
    log(f"done; evaluate it with: python eval_linear.py {dump / 'checkpoint.pth'}")


def print_run_summary(
    args: argparse.Namespace,
    images: Dataset,
    loader: DataLoader,
    model: SwAV,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Print what the run uses: device, processes, data, model."""
    world_size = launch.environment("WORLD_SIZE", 1)
    group = f"{world_size} processes ({dist.get_backend()})" if dist.is_initialized() else "1 process"
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    log(
        f"device: {where}; {group}; {loader.num_workers} loader workers each; {str(dtype).removeprefix('torch.')}; "
        f"sinkhorn: {backend(device)}"
    )
    source = getattr(images, "root", None) or args.data_path or "drawn in memory"
    if isinstance(images, CachedImages):
        source = f"{source}, cached in memory, {images.ends[-1] / 2**20:.0f} MiB"
    log(
        f"data: {len(images)} images ({args.dataset}, {source}); {len(loader)} steps per epoch of "
        f"{args.batch_size * world_size} images; {args.epochs} epochs"
    )
    parameters = sum(p.numel() for p in model.parameters())
    log(
        f"model: {args.arch}, {parameters / 1e6:.2f} M parameters, {model.num_features} features, "
        f"{args.nmb_prototypes} prototypes (ln K = {math.log(args.nmb_prototypes):.3f})"
    )


# A bad step


def replay(path: str, data_path: str | None, device: torch.device) -> str | None:
    """Run the step of a bad_step-RANK.pth again, with anomaly detection. Return its first bad tensor, or None.

    data_path: where the images are now; None: as in the run. Of several processes it runs the images of one, so codes
    are balanced over fewer images. Embeddings that the queue got since the bad step are left out.
    """
    contents = checkpoint.load(path)
    if "image_indices" not in contents:
        raise UserError(f"--replay: expected a bad_step-RANK.pth of a run that stopped, got {path}")
    args = argparse.Namespace(**contents["options"])
    images = open_images(args.dataset, data_path or args.data_path, "pretrain")
    keys = [(contents["epoch"] - 1, index) for index in contents["image_indices"]]
    batch, _ = CroppedBatches(images, build_multicrop(args), args.seed).__getitems__(keys)
    dtype, model, criterion = machine.choose_precision(args.precision, device), build_model(args), build_loss(args, 1)
    model.load_state_dict(contents["state_dict"])
    queue, filled = (contents["queue"][name] for name in ("queue", "queue_filled"))
    criterion.queue = queue[:, contents["steps_since"] * len(keys) :]  # [A, Q, D], newest first
    criterion.queue_filled = filled.clamp(max=criterion.queue.shape[1])
    criterion.queue_started = contents["queue"]["_extra_state"]["started"]
    model, criterion = model.to(device), criterion.to(device)
    bad: list[str] = []

    def check(name: str, *tensors: torch.Tensor) -> None:
        if not all(tensor.isfinite().all() for tensor in tensors):
            bad.append(name)

    def check_output(name: str) -> Callable:
        return lambda _module, _inputs, out: check(f"output of {name}", *(out if isinstance(out, tuple) else [out]))

    for name, module in model.named_modules():
        module.register_forward_hook(check_output(name or "the model"))
    crops = crops_to_device(batch, device)
    for i, crop in enumerate(crops):
        check(f"crop {i}", crop)
    for name, weight in model.named_parameters():
        check(f"weight {name}", weight)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32), torch.autograd.set_detect_anomaly(True):
        embeddings, scores = model(crops)
        loss = criterion(embeddings, scores, model.prototypes.weight)
    check("the loss", loss)
    try:
        with torch.autograd.set_detect_anomaly(True):
            loss.backward()
    except RuntimeError as error:  # names the operation whose gradient is nan
        bad.append(str(error).splitlines()[0])
    for name, weight in reversed(list(model.named_parameters())):  # in the order of backward
        if weight.grad is not None:
            check(f"gradient of {name}", weight.grad)
    log(f"step {contents['step']} again: the loss is {loss.item():.4f}; in the run, {contents['reason']}")
    log(f"first bad tensor: {bad[0]}" if bad else "no bad tensor: here the step is finite")
    return bad[0] if bad else None


# Collapse


class Collapse(Exception):
    """The run collapses, and is to go back to its last good epoch with one option changed."""


def handle_collapse(args: argparse.Namespace, settings: dict, measures: dict, step: int) -> None:
    """Do what --on_collapse says: print a warning with the cause, stop (RunStopped), or recover (Collapse)."""
    cause, change = diagnose_collapse(settings["options"])
    message = f"{describe_collapse(measures, cause, step)}; try {launch.as_command_line(change)}"
    if args.on_collapse != "recover":
        message += " with another --dump_path"  # this one would resume from the collapsed weights
    if args.on_collapse == "stop":
        path = Path(args.dump_path) / "checkpoint.pth"
        raise launch.RunStopped(f"{message}; the run stopped, {path} is that of the last finished epoch")
    gives_up = args.on_collapse == "recover" and len(settings["recovered"]) >= MAX_RECOVERIES
    if gives_up:
        message += f"; recovered {MAX_RECOVERIES} times already, training continues"
    launch.show_progress(message, keep=True)
    if args.on_collapse == "recover" and not gives_up:
        raise Collapse


def warn_if_slow(guard: CollapseGuard, quality: dict, epoch: int, epochs: int) -> None:
    """Print once that a run has learned little but colour and brightness. quality: of `measure_quality`, or empty."""
    if guard.is_slow(quality.get("trivial_r2"), epoch / epochs):
        launch.show_progress(describe_slow(quality["trivial_r2"], epoch), keep=True)


def recover(args: argparse.Namespace, settings: dict) -> None:
    """Change one option in args and settings, and go back to the last good checkpoint for the next resume."""
    _, change = diagnose_collapse(settings["options"])
    message = ", ".join(f"--{name} {getattr(args, name)} -> {value}" for name, value in change.items())
    vars(args).update(change)
    settings["options"].update(change)
    settings["recovered"].append(next(iter(change)))
    epochs_done, renamed = checkpoint.roll_back(Path(args.dump_path), settings)
    if renamed:
        message += f"; the collapsed run is kept in {renamed}"
    log(
        f"recovering ({len(settings['recovered'])} of at most {MAX_RECOVERIES} times): "
        f"back to {epochs_done} epochs done, {message}"
    )


if __name__ == "__main__":
    processes.run_script(lambda: main(parse_args(sys.argv[1:])), "; the same command resumes after the last saved step")
