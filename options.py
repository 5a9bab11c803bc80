"""The options of train.py: declared, checked, completed from the images, and what they describe.

To add one, declare it in `option_parser`. Options that are left open follow from the images, by defaults.py.
"""

import argparse
import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch.utils.data import Dataset

import backbones
import checkpoint
import launch
import machine
from backbones import choose_sizes
from data import MultiCrop, UnreadableImage
from defaults import APEX_GROUP_SIZE, DERIVED, LARGE_SET, derive
from features import describe_images
from images import DATASETS, GIVEN, check_data_path, fingerprint, typical_side
from launch import UserError, epoch_count, log, nonnegative, nonnegative_int, number, positive, positive_int
from loss import SwAVLoss
from model import STEMS, SwAV, checkpoint_activations

SHAPES_RECIPE = Path(__file__).parent / "recipes" / "shapes.args"
REPLACED_BY_TORCHRUN = ("dist_url", "rank", "world_size", "local_rank")
DEFAULT_ARCH = "resnet50"
DESCRIPTION = """Train SwAV on images without labels. Without --data_path and --dataset it trains on built-in images.
On 4 GPUs: torchrun --nproc_per_node=4 train.py [options]"""
EPILOG = """The other options follow from your images; they are printed at the start, with reasons.
--help-all shows them all. An interrupted run resumes with the same command."""


def option_parser() -> launch.OptionParser:
    """The options of train.py. To add one, declare it here; `affects` says whether a resumed run compares it."""
    texts = dict(usage="train.py [@recipes/NAME.args] [options]", description=DESCRIPTION, epilog=EPILOG)
    parser = launch.OptionParser(prog="train.py", fromfile_prefix_chars="@", **texts)

    def add(name: str, default: object, kind: Callable, help: str, **more) -> None:
        text = "from the images" if name in DERIVED else None
        parser.add(name, default, kind, help, **{"default_text": text, **more})

    parser.start_group("images")
    add("data_path", None, str, "Train on this folder of images or .tar files, or on a .txt list of paths.",
        common="DIR")  # fmt: skip
    add("dataset", "folder", str, f"Train on {', '.join(name for name in DATASETS if name != 'folder')}.",
        common="NAME", choices=(*DATASETS, GIVEN))  # fmt: skip
    add("nmb_crops", None, positive_int, "crops of each resolution, large ones first; small ones suit large sets",
        nargs="+")  # fmt: skip
    add("size_crops", None, positive_int, "side of the crops in pixels; multiples of 32 for ResNet-50", nargs="+")
    add("min_scale_crops", None, positive, "smallest area of a crop as a share of the image; raise it if images are "
        "centred objects, such as letters", nargs="+")  # fmt: skip
    add("max_scale_crops", None, positive, "largest area of a crop as a share of the image", nargs="+")
    add("hflip", None, nonnegative, "probability of a horizontal flip; 0 for letters, digits and signs")
    add("vflip", 0.0, nonnegative, "probability of a vertical flip; 0.5 for images without a top, such as aerial ones")
    add("color_strength", None, nonnegative, "strength of the colour jitter: 1 as in the paper, 0 for none; lower "
        "it if colours tell your images apart")  # fmt: skip
    add("grayscale", 0.2, nonnegative, "probability of greyscale; 0 if colours tell your images apart")
    add("blur_sigma", None, nonnegative, "sigma of the strongest blur in pixels, 0 for none; lower it if fine textures "
        "tell your images apart")  # fmt: skip
    add("max_bad_images", None, nonnegative_int, "stop if more images cannot be read; until then others take their "
        "place; bad_images.txt lists them (default: 1 %% of the images, at least 1)", affects="nothing")  # fmt: skip

    parser.start_group("model", affects="model")
    add("arch", None, backbones.arch_name, "Train this network, or timm/NAME; list shows all.",
        common="NAME", default_text="resnet50")  # fmt: skip
    add("init", None, str, "Start from weights: a file, or torchvision's by name.", common="FILE",
        default_text="random", affects="learning")  # fmt: skip
    add("width", None, positive_int, "channels of its stem, to shrink or widen it (default: that of the arch)")
    add("blocks", None, positive_int, "residual blocks of its four stages (default: those of the arch)", nargs=4)
    add("stem", None, str, "imagenet: for crops from 96 pixels; medium: for smaller ones; small: up to 32 pixels, at "
        "four times the cost of medium", choices=STEMS)  # fmt: skip
    add("hidden_mlp", 2048, nonnegative_int, "hidden units of the projection head, 0 for a linear head")
    add("feat_dim", 128, positive_int, "dimensions of an embedding")
    add("nmb_prototypes", None, number(int, 2), "number of prototypes: several times the classes that you expect")

    parser.start_group("loss")
    add("crops_for_assign", None, nonnegative_int, "indices of the crops that get codes, which the other crops "
        "predict; the large ones", nargs="+")  # fmt: skip
    add("temperature", None, positive, "temperature of the predictions' softmax; lower is sharper")
    add("epsilon", None, positive, "Sinkhorn's entropy weight; lower gives sharper codes. With --relative_epsilon "
        "off it is absolute, as in the paper; small data sets may then collapse")  # fmt: skip
    add("relative_epsilon", None, str, "on: measure epsilon in units of the scores' standard deviation, so that codes "
        "stay sharp when embeddings become similar; off: as in the paper", choices=("on", "off"), nargs="?",
        const="on")  # fmt: skip
    add("sinkhorn_iterations", 3, positive_int, "rounds of Sinkhorn-Knopp")
    add("queue_length", None, nonnegative_int, "past images that help to balance codes, over all processes; for large "
        "sets whose global batch is below nmb_prototypes; rounded down to a multiple of that batch")  # fmt: skip
    add("epoch_queue_starts", None, nonnegative_int, "epoch from which the queue fills; later is safer")

    parser.start_group("optimisation")
    add("epochs", 200, epoch_count, "Train for this many passes over the images.", common="N")
    add("batch_size", None, positive_int, "Take this many images per process and step.", common="N")
    add("accumulate", 1, positive_int, "parts in which a step works through its batch_size images: less memory, but "
        "forward runs twice. Codes and gradients are those of all; BatchNorm has statistics of each part")  # fmt: skip
    add("base_lr", None, positive, "learning rate for the global batch (batch_size x processes), not rescaled for you")
    add("final_lr", None, nonnegative, "learning rate at the end of the cosine schedule")
    add("warmup_epochs", None, nonnegative_int, "epochs of linear warm-up: a tenth of the run, 10 at most; 0 for large "
        "sets with small batches")  # fmt: skip
    add("start_warmup", None, nonnegative, "learning rate at the start of the warm-up")
    add("wd", 1e-6, nonnegative, "weight decay")
    add("freeze_prototypes_niters", None, nonnegative_int, "steps at the start with frozen prototypes: about an "
        "epoch for large sets, 0 for small ones")  # fmt: skip

    parser.start_group("machine", affects="nothing")
    add("device", "auto", str, "Train on cuda, cpu, mps, or auto: cuda if there is such a GPU, else cpu.",
        common="NAME", choices=("auto", "cuda", "cpu", "mps"))  # fmt: skip
    add("precision", None, str, "Compute in bf16, fp16 or fp32 (default: bf16 if the device supports it).",
        common="NAME", choices=tuple(machine.DTYPES), affects="learning")  # fmt: skip
    add("use_fp16", None, str.lower, "alias: true is --precision fp16, false is fp32", choices=("true", "false"),
        affects="nothing")  # fmt: skip
    add("sync_bn", None, str, "BatchNorm statistics. pytorch: over all processes; apex: over groups of them, as in "
        "the paper for large batches (apex is not needed); none: per process, which lets embeddings encode the process",
        choices=("pytorch", "apex", "none"), affects="learning")  # fmt: skip
    add("syncbn_process_group_size", None, positive_int, "processes per group of --sync_bn apex (default: "
        f"{APEX_GROUP_SIZE})", affects="learning")  # fmt: skip
    add("workers", "auto", launch.workers_or_auto, "Use this many loader workers per process.", common="N")
    add("augment", "auto", str, "where to flip, jitter and blur. device (auto): batched, on the training device; "
        "workers: in the loader's workers", choices=("auto", "device", "workers"))  # fmt: skip
    add("cache", "auto", str, "keep decoded images in memory, once per machine. auto: if they fit into a quarter of "
        "the free memory; ram: into 80 %%, else fail; off: never", choices=("auto", "off", "ram"))  # fmt: skip
    add("compile", "auto", str, "torch.compile for backbone and augmentation: a minute or two at the start, faster "
        "steps on GPUs. auto: on GPUs, in long runs of large crops", choices=("auto", "on", "off"), nargs="?",
        const="on")  # fmt: skip
    add("checkpoint_activations", "off", str, "on: keep only the inputs of blocks for backward: less memory, but "
        "forward runs twice", choices=("on", "off"), nargs="?", const="on")  # fmt: skip
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
    add("eval_every", None, nonnegative_int, "epochs between quality measures: without labels (RankMe, LiDAR and "
        "others, see features.py), and kNN if there is a labelled validation split (of a named set, or next to train/; "
        "never trained on). 0: never (default: so that they take less than 2 %% of the time)")  # fmt: skip
    add("tensorboard", "off", str, "Also log to dump_path/tensorboard: on or off.", common="NAME",
        choices=("on", "off"), nargs="?", const="on")  # fmt: skip
    add("on_collapse", "warn", str, "On collapse: warn, stop, or recover by changing an option.", common="NAME",
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
            raise UserError(f"--use_fp16 {args.use_fp16}: expected --precision {precision} or none with it, got "
                            f"{args.precision}; leave one of them out")  # fmt: skip
        args.precision, args.use_fp16 = precision, None
    if args.arch is None and args.init is None:
        args.arch = DEFAULT_ARCH
    if args.dump_path is None:
        args.dump_path = str(Path("runs", name_of_images(args)))
    return args


def name_of_images(args: argparse.Namespace) -> str:
    """The data set's name, or that of its folder or file: imagenet for imagenet/train and for imagenet.txt."""
    if args.dataset != "folder" or not args.data_path:
        return args.dataset
    path = Path(os.path.abspath(args.data_path))  # without ..
    path = path.with_suffix("") if path.suffix.lower() in (".txt", ".tar") else path
    return (path.parent if path.name == "train" else path).name or "folder"


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
    if args.dataset == GIVEN and args.data_path:
        raise UserError(f"--data_path: expected none for --dataset {GIVEN}, got {args.data_path}")
    if args.dataset == "folder":
        check_data_path(args.data_path)
    if args.tensorboard == "on" and find_spec("tensorboard") is None:
        raise UserError("--tensorboard: needs its package: pip install tensorboard")
    if args.batch_size is not None and args.batch_size < 2:
        raise UserError(f"--batch_size: expected 2 or more (BatchNorm needs several images), got {args.batch_size}")
    if args.batch_size is not None:
        check_accumulate(args.accumulate, args.batch_size)
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


def check_accumulate(parts: int, batch_size: int) -> None:
    """Raise UserError unless a batch divides into equal parts of 2 images or more, as BatchNorm needs several."""
    if batch_size % parts or batch_size < 2 * parts:
        fitting = [str(n) for n in range(1, min(batch_size // 2, 1024) + 1) if batch_size % n == 0]
        raise UserError(
            f"--accumulate: expected {', '.join(fitting)} (equal parts of 2 images or more of the --batch_size "
            f"{batch_size}), got {parts}"
        )


def resolve_options(
    args: argparse.Namespace, images: Dataset, world_size: int, earlier: dict | None = None
) -> tuple[dict, dict[str, str]]:
    """Fill the options that the user left open, print them with reasons, and check all. Raises UserError.

    They come from the run to resume, if there is one, else from the images (defaults.py). earlier: its newest state.
    Returns what checkpoints keep of this (from images to recovered, see checkpoint.py), and the reasons by option.
    """
    if len(images) < 2 * world_size:
        raise UserError(f"--data_path: expected {2 * world_size} images or more (2 per process), got {len(images)}")
    parser, dump = option_parser(), Path(args.dump_path)
    affects = parser.affects
    user_options = {n: v for n, v in vars(args).items() if v is not None and affects.get(n, "nothing") != "nothing"}
    chosen, recovered = {}, []
    if earlier:
        recovered = earlier["recovered"]
        chosen = checkpoint.inherited_options(earlier, user_options, world_size)
    given = {name: user_options[name] for name in DERIVED if name in user_options}
    given |= {name: value for name, (value, _) in chosen.items()}
    if args.arch.startswith(backbones.TIMM):  # it has a stem of its own
        args.stem = given["stem"] = "imagenet"
    facts = dict(images=len(images), image_side=typical_side(images), world_size=world_size, epochs=args.epochs)
    facts["init"] = args.init is not None
    if len(images) < LARGE_SET and not {"min_scale_crops", "color_strength", "hflip"} <= given.keys():
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
    settings["sizes"] = list(choose_sizes(options, facts["image_side"], is_folder=args.dataset in ("folder", GIVEN)))
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
        ("cache", args.dataset == GIVEN, "as sizes of images that a Dataset gives are not known"),
        ("cache", args.dataset not in ("folder", GIVEN), f"as the images of {args.dataset} are in memory anyway"),
    )
    found = [(name, reason) for name, is_idle, reason in checks if is_idle and set_options.get(name)]
    return [f"{launch.as_command_line({name: set_options[name]})} has no effect {reason}" for name, reason in found]


def check_given(args: argparse.Namespace, images: Dataset | None) -> None:
    """Raise UserError unless a Dataset is given exactly with --dataset python."""
    if (args.dataset == GIVEN) != (images is not None):
        raise UserError(
            f"--dataset: expected {GIVEN} with a Dataset from Python, and only then, got {args.dataset} "
            f"{'without' if images is None else 'with'} one; write "
            f'train.main(train.parse_args(["--dataset", "{GIVEN}", ...]), images=dataset)'
        )


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


# What the options describe


def build_multicrop(args: argparse.Namespace) -> MultiCrop:
    scales = args.min_scale_crops, args.max_scale_crops
    names = "blur_sigma", "hflip", "vflip", "color_strength", "grayscale"
    return MultiCrop(args.size_crops, args.nmb_crops, *scales, **{name: getattr(args, name) for name in names})


def build_model(args: argparse.Namespace) -> SwAV:
    options = dict(width=args.width, blocks=args.blocks, stem=args.stem)
    options["backbone"] = backbones.foreign_backbone(args.arch, args.size_crops)
    model = SwAV(args.arch, args.hidden_mlp, args.feat_dim, args.nmb_prototypes, **options)
    model.parts = args.accumulate
    if args.checkpoint_activations == "on":
        checkpoint_activations(model)
    return model


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
