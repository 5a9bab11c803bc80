"""Take a run elsewhere: features, clusters, similar images, weights, ONNX, torch.export.

    python export.py runs/photos features photos features.npz             # a feature vector of every image; or .csv
    python export.py runs/photos clusters photos clusters.csv             # the prototype of every image
    python export.py runs/photos similar photos/cat.jpg photos --k 10     # the nearest images
    python export.py runs/photos weights resnet50.pth --to torchvision    # or timm, swav; or .safetensors
    python export.py runs/photos onnx backbone.onnx
    python export.py runs/photos torch_export backbone.pt2

RUN is a run's folder or a checkpoint: of train.py, a published SwAV file or a torchvision ResNet. Each command prints
which preprocessing the weights expect.
"""

import argparse
import csv
import errno
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import checkpoint
import exchange
from backbones import add_size_options, choose_sizes, load_backbone, read_file
from data import LEFT_OUT, CentreCrop, expected_crop, ordered_loader, reuse_freed_memory
from decode import UnreadableImage, read_image, shown
from features import bf16_on_gpus
from images import BadImages, ImageFiles, typical_side
from launch import (
    OptionParser,
    RunStopped,
    UserError,
    environment,
    log,
    nonnegative_int,
    positive_int,
    track,
    user_errors,
)
from machine import add_machine_options, choose_device, set_threads_and_workers, workers_that_fit
from processes import run_script

# what: (its arguments, endings of the output, options that it takes beside size and resize)
READS_IMAGES = ("max_bad_images", "batch_size", "workers", "device")
COMMANDS = {
    "features": (("DIR", "OUT"), (".npz", ".csv"), READS_IMAGES),
    "clusters": (("DIR", "OUT"), (".csv",), READS_IMAGES),
    "similar": (("IMAGE", "DIR"), (), ("k", *READS_IMAGES)),
    "weights": (("OUT",), (".pth", ".safetensors"), ("to",)),
    "onnx": (("OUT",), (".onnx",), ()),
    "torch_export": (("OUT",), (".pt2",), ()),
}


def option_parser() -> OptionParser:
    parser = OptionParser(
        prog="export.py",
        usage="export.py RUN WHAT ... [options]",
        description=__doc__.partition("\n\nRUN is")[0],
        epilog="features  .npz: files (relative to root), features float32 [N, F], and how they were made;\n"
        "          .csv: file, then a column per feature.\n"
        "clusters  file, nearest prototype by cosine similarity, its certainty (softmax of the similarities over\n"
        "          all prototypes, at the training's temperature), second nearest prototype.\n"
        "weights   names of torchvision, of timm, or the published SwAV ones (with head and prototypes).\n"
        "onnx, torch_export  the backbone for any batch size, compared with PyTorch.\n"
        "An existing OUT is replaced once the new one is complete. --help-all shows the other options.",
    )
    parser.start_group("what to export", affects="nothing")
    for name, nargs, text in (
        ("run", None, "A run's folder or a checkpoint, ours, a published SwAV file or a torchvision ResNet."),
        ("what", None, f"{', '.join(COMMANDS)}."),
        ("paths", "*", "Its arguments, as above: DIR is a folder of images at any depth, OUT the file to write."),
    ):
        action = parser.group.add_argument(name, metavar="ARGUMENTS" if nargs else name.upper(), nargs=nargs, help=text)
        parser.common.append(action)
    add = parser.add
    add("k", 10, positive_int, "similar: Print this many images.", common="N")
    add("to", None, str, "weights: Use the names of torchvision, timm or swav.", common="NAMES",
        choices=exchange.NAMINGS)  # fmt: skip
    add_size_options(parser)
    add("max_bad_images", None, nonnegative_int, "unreadable images up to which the export goes on, without them "
        "(default: 1 %% of the images, at least 1)")  # fmt: skip
    parser.start_group("machine", affects="nothing")
    add("batch_size", 64, positive_int, "images at a time")
    add_machine_options(parser)
    return parser


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """The options of a command line, in `_` or `-` spelling. Raises UserError."""
    return option_parser().parse_args(argv)


def check_args(args: argparse.Namespace) -> None:
    """Raise UserError, naming argument or option, value and what is accepted."""
    if args.what not in COMMANDS:
        raise UserError(f"WHAT: expected one of {', '.join(COMMANDS)} after RUN, got {args.what}")
    names, endings, _ = COMMANDS[args.what]
    if len(args.paths) != len(names):
        raise UserError(
            f"{args.what}: expected python export.py RUN {args.what} {' '.join(names)}, "
            f"got {' '.join(args.paths) or 'nothing'} after {args.what}"
        )
    for name, path in zip(names, args.paths, strict=True):
        if name == "DIR" and not os.path.exists(path):
            raise UserError(f"DIR: expected a folder of images, got {shown(path)}, which does not exist")
        if name == "IMAGE" and not os.path.isfile(path):
            raise UserError(f"IMAGE: expected an image file, got {shown(path)}, which is none")
        if name == "OUT" and not path.lower().endswith(endings):
            raise UserError(f"OUT: expected a name that ends in {' or '.join(endings)}, got {shown(path)}")
        if name == "OUT" and os.path.isdir(path):
            raise UserError(f"OUT: expected a file, got {shown(path)}, which is a folder")
    if args.what == "weights" and args.to is None:
        raise UserError(f"--to: expected one of {', '.join(exchange.NAMINGS)} for weights, got none")
    if environment("WORLD_SIZE", 1) > 1:
        raise UserError("torchrun: export.py runs in one process; start it as python export.py ...")


def options_without_effect(args: argparse.Namespace) -> list[str]:
    """A line for each option that the user set and that this command does not take."""
    default, others = option_parser().get_default, {"k", "to", *READS_IMAGES}.difference(COMMANDS[args.what][2])
    idle = [name for name in vars(args) if name in others and getattr(args, name) != default(name)]
    return [f"--{name} {getattr(args, name)} has no effect on {args.what}" for name in idle]


def checkpoint_of(run: str) -> Path:
    """The checkpoint of a run's folder, or the file itself. Raises UserError."""
    path = Path(run)
    if not path.is_dir():
        return path
    if (path / checkpoint.NEWEST).exists():
        return path / checkpoint.NEWEST
    raise UserError(f"RUN: expected a run's folder or a checkpoint, got {shown(path)} without {checkpoint.NEWEST}")


@contextmanager
def complete_file(out: Path, source: Path) -> Iterator[Path]:
    """Yield the path of a temporary file, which gets the name `out` after the block; if that fails it is removed.

    source: the checkpoint, which is not overwritten. Raises UserError if out cannot be written.
    """
    if out.exists() and out.samefile(source):
        raise UserError(f"OUT: expected another file than the checkpoint {shown(source)}, which would be overwritten")
    unfinished = out.with_name(f"{out.stem}.unfinished{out.suffix.lower()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        unfinished.touch()
        mode = unfinished.stat().st_mode
    except OSError as error:
        raise UserError(f"OUT: cannot write {shown(out)}: {error.strerror}") from None
    try:
        yield unfinished
        os.chmod(unfinished, mode)  # safetensors keeps its files from other users
        os.replace(unfinished, out)
    except BaseException as error:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        cause = error if isinstance(error, OSError) else error.__context__  # torch's writers hide the system's error
        if getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise RunStopped(f"cannot write {shown(out)}: {cause.strerror}; make room, or write elsewhere") from None
        raise
    log(f"written to {shown(out)}")


# Images of a folder through a network


class Source(NamedTuple):
    """What an export of images reads."""

    path: Path  # of the checkpoint
    backbone: nn.Module
    trained: dict  # options of its training, {} if unknown
    images: ImageFiles
    crop: CentreCrop
    device: torch.device


def open_source(args: argparse.Namespace, folder: str, contents: Mapping | None = None) -> Source:
    """Load the backbone and list the images below a folder. contents: of the checkpoint, if read. Raises UserError."""
    device, path = choose_device(args.device), checkpoint_of(args.run)
    backbone, architecture, trained = load_backbone(path, None, contents)
    images = ImageFiles(folder, trained.get("value_range"))
    size, resize = choose_sizes(trained, typical_side(images), is_folder=True, size=args.size, resize=args.resize)
    crop = CentreCrop(resize, size, images.value_range)
    log(f"{shown(path)}: {architecture['arch']}; {shown(folder)}: {len(images):,} images; {device}")
    log(f"images: {exchange.describe_preprocessing(crop)}")
    backbone.to(device, memory_format=torch.channels_last).eval()
    return Source(path, backbone, trained, images, crop, device)


def names_of(images: ImageFiles) -> list[str]:
    """The paths of images, relative to their folder."""
    return [os.path.relpath(str(image), images.root) for image in images.paths]


@torch.no_grad()
def features_of(source: Source, args: argparse.Namespace) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Yield (indices of images, features float32 [B, F]) batch by batch, for the images that can be read.

    Logs which cannot. Raises RunStopped if these are too many, or if features are inf or nan.
    """
    images, device = source.images, source.device
    reuse_freed_memory()
    batch_size = min(args.batch_size, len(images))
    workers = workers_that_fit(set_threads_and_workers(args.workers, device), 12 * batch_size * source.crop.size**2)
    loader = ordered_loader(images, source.crop, batch_size, workers=workers, pin_memory=device.type == "cuda")
    bad, done = BadImages(images, args.max_bad_images), 0
    for batch, labels in track(loader, args.what):
        batch = batch.to(device, non_blocking=True, memory_format=torch.channels_last)
        with bf16_on_gpus(device):
            features = source.backbone(batch).float().cpu()
        bad.update()
        is_read = labels != LEFT_OUT
        if not features[is_read].isfinite().all():
            raise RunStopped(f"{args.what}: features are inf or nan: the network overflows", code=4)
        yield (done + is_read.nonzero().flatten()).tolist(), features[is_read]
        done += len(batch)
    if bad.reasons:
        some = "; ".join(f"{shown(path)} ({reason})" for path, reason in list(bad.reasons.items())[:3])
        log(f"left out, as they cannot be read: {len(bad.reasons)} of {len(images)} images: {some}")
    if len(bad.reasons) == len(images):
        raise UserError(f"DIR: none of the {len(images)} images can be read; python images.py DIR tells why")


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write rows as they come. Names that are not UTF-8 keep their bytes."""
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


# Commands


def export_features(args: argparse.Namespace) -> None:
    """Write a feature vector of each image, as .npz or .csv."""
    folder, out = args.paths[0], Path(args.paths[1])
    source = open_source(args, folder)
    names, width = names_of(source.images), source.backbone.num_features

    def rows() -> Iterator[list]:
        for indices, features in features_of(source, args):
            for i, row in zip(indices, features.tolist(), strict=True):
                yield [names[i], *map("{:.9g}".format, row)]  # float32, exactly

    with complete_file(out, source.path) as path:
        if out.suffix.lower() == ".csv":
            write_csv(path, ["file", *(f"feature_{i}" for i in range(width))], rows())
            return
        features, read = np.empty((len(names), width), np.float32), []
        for indices, part in features_of(source, args):
            features[len(read) : len(read) + len(part)] = part
            read += indices
        facts = {"root": os.path.abspath(folder), "checkpoint": os.path.abspath(source.path)}
        facts |= {name: value for name, value in exchange.preprocessing(source.crop).items() if value is not None}
        np.savez(path, files=np.array([names[i] for i in read]), features=features[: len(read)], **facts)
        log(f"{len(read):,} images of {width} features")


def export_clusters(args: argparse.Namespace) -> None:
    """Write the nearest prototype of each image, how certain it is, and the second nearest, as .csv."""
    folder, out = args.paths[0], Path(args.paths[1])
    path = checkpoint_of(args.run)
    contents = read_file(path)
    head, prototypes = exchange.load_head(contents, path)
    source = open_source(args, folder, contents)
    names, temperature = names_of(source.images), source.trained.get("temperature", 0.1)
    log(f"{prototypes.out_features} prototypes; certainty at temperature {temperature:g}")

    def rows() -> Iterator[list]:
        for indices, features in features_of(source, args):
            found = nearest_prototypes(features, head, prototypes, temperature)
            if not all(map(math.isfinite, found[1])):
                raise RunStopped("clusters: certainties are inf or nan: the head's weights are, or overflow", code=4)
            for i, first, certainty, second in zip(indices, *found, strict=True):
                yield [names[i], first, f"{certainty:.4f}", second]

    with complete_file(out, source.path) as path:
        write_csv(path, ["file", "prototype", "certainty", "second_choice"], rows())


@torch.no_grad()
def nearest_prototypes(
    features: torch.Tensor, head: nn.Module, prototypes: nn.Linear, temperature: float
) -> tuple[list[int], list[float], list[int]]:
    """For features [B, F]: the nearest prototype by cosine, its certainty, the second nearest (-1: there is one alone).

    Certainty is the softmax of the cosines over all prototypes, divided by the temperature, as in the loss (section 3.1
    of the paper, equation 2).
    """
    cosines = prototypes(F.normalize(head(features), dim=1))  # [B, K]
    nearest = cosines.topk(min(2, cosines.shape[1]), dim=1).indices  # [B, 2], of one prototype [B, 1]
    second = nearest[:, 1].tolist() if cosines.shape[1] > 1 else [-1] * len(nearest)
    return nearest[:, 0].tolist(), (cosines / temperature).softmax(1).amax(1).tolist(), second


def print_similar(args: argparse.Namespace) -> None:
    """Print the k images that are nearest to one by the cosine similarity of features; the image itself is left out."""
    image, folder = args.paths
    source, similar = open_source(args, folder), []
    try:
        pixels = read_image(image, source.images.value_range)
    except UnreadableImage as error:
        raise UserError(f"IMAGE: {str(error).removeprefix('data_path: ')}") from None
    with torch.no_grad(), bf16_on_gpus(source.device):
        query = source.backbone(source.crop(pixels)[None].to(source.device)).float().cpu()  # [1, F]
    for indices, features in features_of(source, args):
        similar += zip(F.cosine_similarity(features, query).tolist(), indices, strict=True)
    paths = [str(path) for path in source.images.paths]
    others = [(cosine, paths[i]) for cosine, i in similar if not is_same_file(paths[i], image)]
    if len(others) < len(similar):
        log(f"left out: {shown(image)} itself")
    log("cosine  file")
    for cosine, path in sorted(others, key=lambda pair: -pair[0])[: args.k]:
        log(f"{cosine:6.4f}  {shown(path)}")


def is_same_file(path: str, other: str) -> bool:
    return os.path.exists(path) and os.path.samefile(path, other)  # an image in a tar file has no path of its own


def export_network(args: argparse.Namespace) -> None:
    """Write the weights, or the backbone as ONNX or by torch.export, with the preprocessing that they expect."""
    source, out = checkpoint_of(args.run), Path(args.paths[0])
    contents = read_file(source)
    backbone, architecture, trained = load_backbone(source, None, contents)
    backbone.eval()
    contents = contents if trained or args.to == "swav" else {}
    with user_errors("--"):
        crop = expected_crop(contents, args.size, args.resize)
    log(f"{shown(source)}: {architecture['arch']}, {backbone.num_features} features")
    with complete_file(out, source) as path:
        if args.what == "weights":
            weights = exchange.rename_weights(backbone, architecture, args.to, contents)
            exchange.write_weights(weights, path, crop)
        else:
            write = exchange.write_onnx if args.what == "onnx" else exchange.write_torch_export
            difference = write(backbone, path, crop)
            log(f"images [N, 3, {crop.size}, {crop.size}] -> features [N, {backbone.num_features}], any N")
            log(f"largest difference from PyTorch: {difference:.2g}, over batches of 1 and 3 random images")
    log(f"the weights expect: {exchange.describe_preprocessing(crop)}")


def main(args: argparse.Namespace) -> None:
    """Run the command of a command line. Raises UserError for bad input."""
    check_args(args)
    for line in options_without_effect(args):
        log(line)
    commands = {"features": export_features, "clusters": export_clusters, "similar": print_similar}
    commands.get(args.what, export_network)(args)


if __name__ == "__main__":
    run_script(lambda: main(parse_args(sys.argv[1:])))
