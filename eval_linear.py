"""Judge a checkpoint: linear probe and kNN on its frozen features (Caron et al. 2020, section 4.1 and appendix A).

    python eval_linear.py                                              # newest checkpoint in runs/, on its own images
    python eval_linear.py runs/shapes/checkpoint.pth --cached          # quick: one pass over the images, no crops
    torchrun --nproc_per_node=4 eval_linear.py swav_800ep_pretrain.pth.tar --data_path imagenet

Takes checkpoints of train.py, published SwAV files and torchvision ResNets; their architecture is read off the weights.
Beside the results stand those of random weights and of raw pixels: features must beat both to be worth anything.
"""

import argparse
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, Subset

from data import (
    DATASETS,
    CentreCrop,
    ProbeCrop,
    keep_freed_memory,
    open_images,
    ordered_loader,
    training_loader,
    typical_side,
)
from model import ARCHS, ResNet, architecture_of, backbone_weights

PATIENCE = timedelta(hours=1)  # of a process that waits for others
LARGEST_PIXEL_TABLE = 2**30  # numbers; raw pixels of bigger sets are not compared


class Parser(argparse.ArgumentParser):
    """Options in `_` or `-` spelling, from the command line or from @FILE, one or more a line, # for comments."""

    def parse_args(self, argv: Sequence[str]) -> argparse.Namespace:
        return super().parse_args([_underscored(word) for word in argv])

    def convert_arg_line_to_args(self, line: str) -> list[str]:
        return [_underscored(word) for word in shlex.split(line, comments=True)]

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message.removeprefix('argument ')} (python {self.prog} --help lists the options)")


def _underscored(word: str) -> str:
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value if word.startswith("--") else word


def number(kind: type, least: float, above: bool = False) -> Callable[[str], int | float]:
    """An option's type: an int or a finite float that is `least` or more, or above it."""

    def parse(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (value > least if above else value >= least) or value == math.inf:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"expected {what} {'above' if above else 'from'} {least}, got {text}")
        return value

    return parse


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """The options of a command line, in `_` or `-` spelling. Raises ValueError."""
    parser = Parser(
        prog="eval_linear.py",
        usage="eval_linear.py [checkpoint] [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    whole, counted, positive = number(int, 0), number(int, 1), number(float, 0, above=True)

    def add(name: str, default: object, kind: Callable, help: str, **more) -> None:
        help += "" if default is None else f" (default: {default})"
        parser.add_argument(f"--{name}", default=default, type=kind, help=help, **more)

    parser.add_argument("checkpoint", nargs="?", help="default: the newest runs/*/checkpoint.pth")
    add("pretrained", None, str, "older spelling of the same")
    add(
        "data_path", None, str, "folder with train/ and val/, with a folder per class in each (default: as in training)"
    )
    add("dataset", None, str, "default: folder with --data_path, else as in training, else shapes", choices=DATASETS)
    add("arch", None, str, "refuse a checkpoint of another architecture (default: take any)", choices=list(ARCHS))
    parser.add_argument("--cached", action="store_true", help="quick: logistic regression on the features of one pass "
                        "over uncropped images, instead of SGD over many with crops")  # fmt: skip
    add("epochs", 100, counted, "of the linear probe")
    add("batch_size", None, counted, "images per process (default: 256 over all processes)")
    add("lr", 0.3, positive, "learning rate at the start of the cosine, for 256 images over all processes")
    add("wd", 1e-6, number(float, 0), "weight decay")
    add("knn_k", 20, counted, "neighbours that vote")
    add("knn_temperature", 0.07, positive, "of their votes")
    add("size", None, counted, "side of the images in pixels (default: that of the large crops in training, or 224; of "
        "a named set, its images' own if that is larger or no crops are known)")  # fmt: skip
    add("resize", None, counted, "shorter side before the centre crop (default: 8/7 of --size, of a folder's images if "
        "larger than it; else --size: the largest square)")  # fmt: skip
    add("workers", None, whole, "loader processes of each process (default: by the cores at hand)")
    add("device", "auto", str, "auto: the GPU if there is one", choices=("auto", "cuda", "cpu"))
    add("seed", 31, whole, "of the classifier and of the random weights compared with")
    args = parser.parse_args(argv)
    args.checkpoint = args.checkpoint or args.pretrained
    return args


def check_args(args: argparse.Namespace) -> None:
    """Raise ValueError, naming option, value and what is accepted."""
    if args.data_path is not None and args.dataset in (None, "folder") and not os.path.isdir(args.data_path):
        raise ValueError(f"--data_path: expected a folder, got {args.data_path}, which is none")


# Checkpoint and processes


def environment(name: str, default: int) -> int:
    """A number that torchrun sets for each of its processes."""
    return int(os.environ.get(name, default))


def newest_checkpoint() -> Path:
    found = sorted(Path("runs").glob("*/checkpoint.pth"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ValueError(
            "checkpoint: none given and no runs/*/checkpoint.pth here; run python train.py first, or name one"
        )
    return found[-1]


def load_checkpoint(path: str | Path) -> dict:
    """What torch.load gives; raises ValueError that names the file if it is missing or unreadable."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises what unpickling happens to hit
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"checkpoint: cannot read {path}: {reason}") from None


def choose_device(device: str = "auto") -> torch.device:
    """This process's device. Raises ValueError if there are fewer GPUs than processes."""
    gpus, local_world_size = torch.cuda.device_count(), environment("LOCAL_WORLD_SIZE", 1)
    if device == "cuda" and not gpus:
        raise ValueError("--device cuda: torch finds no GPU here; write --device cpu, or install a CUDA build of torch")
    if device == "cpu" or not gpus:
        return torch.device("cpu")
    if local_world_size > gpus:
        raise ValueError(
            f"--nproc_per_node={local_world_size}: this machine has {gpus} GPU(s); write "
            f"torchrun --nproc_per_node={gpus} {Path(sys.argv[0]).name} ..., or add --device cpu"
        )
    return torch.device("cuda", environment("LOCAL_RANK", 0))


def setup_processes(device: torch.device) -> tuple[int, int]:
    """Join torchrun's other processes, if any, with NCCL on GPUs and gloo on CPUs; this one's rank and their number."""
    world_size = environment("WORLD_SIZE", 1)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    return environment("RANK", 0), world_size


def say(text: str, end: str = "\n") -> None:
    """Print from the first process only."""
    if environment("RANK", 0) == 0:
        print(text, end=end, flush=True)


def run(main: Callable[[], object], after_interrupt: str = "") -> None:
    """Run a script's main with errors as one line, said once a machine, instead of a traceback from each process."""
    try:
        main()
    except (ValueError, FloatingPointError) as error:
        if environment("LOCAL_RANK", 0) != 0:
            time.sleep(15)  # if the first process has the same to say, torchrun ends this one meanwhile
        *_, message = str(error).splitlines() or [repr(error)]  # below the traceback of a loader's worker
        print(f"error: {message}", file=sys.stderr, flush=True)
        leave = os._exit if dist.is_initialized() else sys.exit  # a clean exit would wait for the other processes
        leave(2 if isinstance(error, ValueError) else 1)
    except KeyboardInterrupt:
        say(f"\ninterrupted{after_interrupt}")
        sys.exit(130)


def track(loader: DataLoader, title: str) -> Iterator:
    """The loader's batches, with a progress line: rewritten each second on a terminal, every 30 s in a file."""
    interval = 1 if sys.stdout.isatty() else 30
    start = said = time.perf_counter()
    for done, batch in enumerate(loader, 1):
        yield batch
        now = time.perf_counter()
        if now - said > interval:
            eta = timedelta(seconds=round((now - start) / done * (len(loader) - done)))
            line = f"{title}: batch {done}/{len(loader)}  ETA {eta}"
            say(f"\r\033[2K{line}" if interval == 1 else line, end="" if interval == 1 else "\n")
            said = now
    if interval == 1 and said > start:
        say("\r\033[2K", end="")


# Features


def half_precision(device: torch.device) -> torch.autocast:
    """The frozen backbone's forward pass is in bf16 on GPUs that have it, in float32 elsewhere."""
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=has_bf16)


@torch.no_grad()
def extract_features(
    backbone: nn.Module, images: Dataset, transform: Callable, device: torch.device, title: str, **loading: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pooled features [N, F] float32 and labels [N] of all images, in their order, on every process.

    Each process computes its share. loading: rank, world_size, workers, batch_size.
    """
    features, labels, done = None, [], 0
    loader = ordered_loader(images, transform, pin_memory=device.type == "cuda", **loading)
    for batch, batch_labels in track(loader, title):
        batch = batch.to(device, non_blocking=True, memory_format=torch.channels_last)
        with half_precision(device):
            found = backbone(batch).float()
        if features is None:  # room for all at once, as their batches and one tensor of them may not fit
            features = found.new_empty(len(loader.sampler), found.shape[1])
        features[done : done + len(found)] = found
        done += len(found)
        labels.append(batch_labels.to(device))
    return _gather(features, len(images)), _gather(torch.cat(labels), len(images))


def _gather(share: torch.Tensor, total: int) -> torch.Tensor:
    """Put together what was dealt out as rank, rank + world_size, ..."""
    if not dist.is_initialized():
        return share
    world_size = dist.get_world_size()
    longest = math.ceil(total / world_size)
    whole = share.new_zeros(longest, world_size, *share.shape[1:])
    for start in range(0, longest, 2**13):  # a part at a time, as two copies of all may not fit
        part = share[start : start + 2**13]
        padded = share.new_zeros(min(2**13, longest - start), *share.shape[1:])
        padded[: len(part)] = part
        parts = [torch.empty_like(padded) for _ in range(world_size)]
        dist.all_gather(parts, padded)
        whole[start : start + len(padded)] = torch.stack(parts, dim=1)
    return whole.flatten(0, 1)[:total]


@torch.no_grad()
def take_batchnorm_statistics(
    backbone: nn.Module, images: Dataset, transform: Callable, device: torch.device, title: str, **loading: int
) -> None:
    """Set the running statistics of all BatchNorms to their average over the images, each process's share alike.

    In an order of chance, as batches of one class are normalised otherwise; a smaller batch at the end is left out.
    """
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).tolist()
    loading["batch_size"] = max(2, loading["batch_size"])  # one image alone may have no variance
    norms = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average
    backbone.train()
    for step, (batch, _) in enumerate(track(ordered_loader(Subset(images, order), transform, **loading), title)):
        if len(batch) == loading["batch_size"] or (step == 0 and len(batch) > 1):
            backbone(batch.to(device, memory_format=torch.channels_last))
    backbone.eval()
    if dist.is_initialized():
        for statistic in (statistic for norm in norms for statistic in (norm.running_mean, norm.running_var)):
            dist.all_reduce(statistic)
            statistic /= dist.get_world_size()


# Classifiers on features


def spread(features: torch.Tensor) -> float:
    """Mean standard deviation of a dimension of unit-length features [N, F], times sqrt(F): near 0 they collapsed."""
    directions = [F.normalize(chunk, dim=1) for chunk in features.split(2**13)]
    mean = sum(chunk.sum(0) for chunk in directions) / len(features)
    variance = sum((chunk - mean).square().sum(0) for chunk in directions) / len(features)
    return variance.sqrt().mean().item() * features.shape[1] ** 0.5


def accuracies(scores: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Top-1 and top-5 in percent, of scores [N, classes] and labels [N]."""
    ranked = scores.topk(min(5, scores.shape[1]), dim=1).indices == labels.unsqueeze(1)
    return {"top1": 100 * ranked[:, 0].double().mean().item(), "top5": 100 * ranked.any(1).double().mean().item()}


@torch.no_grad()
def knn(
    train_features: torch.Tensor,
    train_labels: torch.Tensor,
    val_features: torch.Tensor,
    *,
    classes: int,
    k: int = 20,
    temperature: float = 0.07,
) -> torch.Tensor:
    """Scores [N, classes]: votes of the k nearest by cosine, each weighted exp((cosine - largest) / temperature)."""
    lengths = train_features.norm(dim=1).clamp_min(1e-12)
    scores = []
    for chunk in F.normalize(val_features, dim=1).split(512):
        cosines, neighbours = (chunk @ train_features.T / lengths).topk(min(k, len(train_features)), dim=1)  # [n, k]
        weights = ((cosines - cosines[:, :1]) / temperature).exp()  # a difference, as others may overflow
        votes = chunk.new_zeros(len(chunk), classes)
        scores.append(votes.scatter_add_(1, train_labels[neighbours], weights))
    return torch.cat(scores)


def logistic_regression(
    train_features: torch.Tensor, train_labels: torch.Tensor, val_features: torch.Tensor, *, classes: int
) -> torch.Tensor:
    """Scores [N, classes] of a linear classifier fitted to all features at once (L-BFGS, standardised, L2 of 1/N)."""
    mean, std = train_features.mean(0), train_features.std(0)
    # Features that are constant but for rounding say nothing, and must not where other images differ in them.
    scale = torch.where(std > 1e-5 * mean.abs(), 1 / (std + 1e-6), 0)
    linear = nn.Linear(train_features.shape[1], classes, device=train_features.device)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=100, line_search_fn="strong_wolfe")
    rows = max(1, 2**22 // train_features.shape[1])  # as a standardised copy of all may not fit
    chunks = list(zip(train_features.split(rows), train_labels.split(rows), strict=True))

    def objective() -> torch.Tensor:
        optimizer.zero_grad()
        total = linear.weight.square().sum() / (2 * len(train_features))
        total.backward()
        for features, labels in chunks:
            loss = F.cross_entropy(linear((features - mean) * scale), labels, reduction="sum") / len(train_features)
            loss.backward()
            total = total + loss.detach()
        return total.detach()

    optimizer.step(objective)
    with torch.no_grad():
        return linear((val_features - mean) * scale)


def linear_probe(
    backbone: ResNet,
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
    """The published probe: SGD on random crops, cosine per epoch. Scores [N, classes] and labels of the val images."""
    torch.manual_seed(seed)
    linear = nn.Linear(backbone.num_features, classes).to(device)
    nn.init.normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
    probe = linear
    if world_size > 1:
        probe = DistributedDataParallel(linear, device_ids=[device.index] if device.type == "cuda" else None)
    optimizer = torch.optim.SGD(linear.parameters(), lr=lr, momentum=0.9, weight_decay=weight_decay)
    batch_size = min(batch_size, len(train_images) // world_size)
    loading = dict(rank=rank, world_size=world_size, workers=workers)
    pin_memory = device.type == "cuda"
    loader = training_loader(train_images, train_transform, batch_size, seed=seed, pin_memory=pin_memory, **loading)
    start = time.perf_counter()
    for epoch in range(epochs):
        optimizer.param_groups[0]["lr"] = 0.5 * lr * (1 + math.cos(math.pi * epoch / epochs))
        loader.batch_sampler.epoch = epoch
        total = torch.zeros((), device=device)
        for images, labels in track(loader, f"linear probe, epoch {epoch + 1}/{epochs}"):
            images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
            with torch.no_grad(), half_precision(device):
                features = backbone(images).float()
            loss = F.cross_entropy(probe(features), labels.to(device, non_blocking=True))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach()
        left = timedelta(seconds=round((time.perf_counter() - start) / (epoch + 1) * (epochs - epoch - 1)))
        say(f"linear probe, epoch {epoch + 1}/{epochs}: loss {total.item() / len(loader):.4f}  ETA {left}")
    features, labels = extract_features(
        backbone, val_images, val_transform, device, "validation", batch_size=batch_size, **loading
    )
    with torch.no_grad():
        return linear(features), labels


# The whole judgement


def evaluate(args: argparse.Namespace, rank: int, world_size: int, device: torch.device) -> dict:
    """Load the checkpoint, judge it and what it is compared with, print the table; returns it as a dict."""
    path = Path(args.checkpoint) if args.checkpoint else newest_checkpoint()
    checkpoint = load_checkpoint(path)
    weights = backbone_weights(checkpoint)
    architecture = architecture_of(weights)
    if args.arch not in (None, architecture["arch"]):
        raise ValueError(f"--arch: {path} holds a {architecture['arch']}, got {args.arch}")
    backbone = ResNet(**architecture)
    try:
        backbone.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"checkpoint: {path} does not hold a whole ResNet: {error}".replace("\n", " ")) from None
    if not all(tensor.isfinite().all() for tensor in weights.values()):
        raise ValueError(f"checkpoint: {path} holds weights that are nan or inf")
    trained = checkpoint.get("options") or {}
    dataset, data_path = choose_images(args, trained)
    train_images, val_images = (open_images(dataset, data_path, split, world_size == 1) for split in ("train", "val"))
    names = train_images.classes
    if names != val_images.classes:
        raise ValueError(
            f"data_path: expected the same class folders in train/ and val/, got {names} and {val_images.classes}"
        )
    classes = len(names)
    if min(len(train_images), len(val_images)) < world_size:
        raise ValueError(f"data_path: expected at least an image for each of {world_size} processes in train/ and val/")

    is_folder, side = dataset == "folder", typical_side(val_images)
    crops = trained.get("size_crops", [224] if is_folder else [])
    size = args.size or max(crops if is_folder else [side, *crops])
    is_cut = is_folder and side > size  # of small images a cut takes off what tells them apart
    resize = args.resize or (round(size * 8 / 7) if is_cut else size)
    if resize < size:
        raise ValueError(f"--resize: expected at least the {size} pixels of --size, got {resize}")
    whole = CentreCrop(resize, size)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores //= environment("LOCAL_WORLD_SIZE", 1)
    workers = min(10, max(1, cores) if device.type == "cuda" else cores // 2) if args.workers is None else args.workers
    if device.type == "cpu" and not ("OMP_NUM_THREADS" in os.environ and environment("LOCAL_WORLD_SIZE", 1) == 1):
        torch.set_num_threads(max(1, cores - workers))
    keep_freed_memory()
    batch_size = args.batch_size or max(1, 256 // world_size)
    loading = dict(rank=rank, world_size=world_size, workers=workers, batch_size=batch_size)
    say(
        f"{path}: {architecture['arch']} of width {architecture['width']}, {backbone.num_features} features; "
        f"{dataset}{f' in {data_path}' if data_path else ''}: {len(train_images)} training and {len(val_images)} "
        f"validation images of {classes} classes, {size} pixels; {device}, {world_size} process(es)"
    )

    rows: dict[str, dict] = {}

    def judge(name: str, network: nn.Module, with_linear: bool = True) -> None:
        say(f"{name} ...")
        network.to(device, memory_format=torch.channels_last).eval()
        features, labels = extract_features(network, train_images, whole, device, "training images", **loading)
        val_features, val_labels = extract_features(network, val_images, whole, device, "validation images", **loading)
        votes = knn(features, labels, val_features, classes=classes, k=args.knn_k, temperature=args.knn_temperature)
        rows[name] = {"knn": accuracies(votes, val_labels), "spread": spread(features)}
        if with_linear:
            scores = logistic_regression(features, labels, val_features, classes=classes)
            rows[name]["linear"] = accuracies(scores, val_labels)

    judge("checkpoint", backbone, with_linear=args.cached)
    if not args.cached:
        probing = dict(classes=classes, epochs=args.epochs, lr=args.lr, weight_decay=args.wd, seed=args.seed, **loading)
        scores, labels = linear_probe(backbone, train_images, val_images, ProbeCrop(size), whole, device, **probing)
        rows["checkpoint"]["linear"] = accuracies(scores, labels)
    torch.manual_seed(args.seed)
    random_backbone = ResNet(**architecture)
    judge("random init, BatchNorm untouched", random_backbone)
    take_batchnorm_statistics(random_backbone, train_images, whole, device, "BatchNorm statistics", **loading)
    judge("random init, BatchNorm of the training images", random_backbone)
    if (len(train_images) + len(val_images)) * 3 * size**2 <= LARGEST_PIXEL_TABLE:
        judge("raw pixels", nn.Flatten())
    else:
        say("raw pixels: left out, too many to hold")
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
        "rows": rows,
    }


def choose_images(args: argparse.Namespace, trained: dict) -> tuple[str, str | None]:
    """Data set and folder to judge on: those asked for, else those of the checkpoint's training, else shapes."""
    if args.dataset or args.data_path:
        return args.dataset or "folder", args.data_path
    return trained.get("dataset", "shapes"), trained.get("data_path")


def print_table(result: dict) -> None:
    say(f"\nlinear probe of the checkpoint: {result['linear_probe']}; of the others: cached features")
    say(f"{'accuracy in %':46s}  linear top-1  top-5    kNN top-1  top-5    spread (0: collapsed)")
    for name, row in result["rows"].items():
        cells = [row[kind][top] for kind in ("linear", "knn") for top in ("top1", "top5")]
        say("{:46s}  {:12.1f} {:6.1f} {:12.1f} {:6.1f}    {:6.2f}".format(name, *cells, row["spread"]))


def main(args: argparse.Namespace) -> dict:
    """Judge, print, and write NAME.eval.json beside the checkpoint. Raises ValueError on bad options or files."""
    check_args(args)
    device = choose_device(args.device)
    rank, world_size = setup_processes(device)
    result = evaluate(args, rank, world_size, device)
    print_table(result)
    if rank == 0:
        path = Path(result["checkpoint"]).with_suffix(".eval.json")
        try:
            path.write_text(json.dumps(result, indent=1) + "\n")
            say(f"written to {path}")
        except OSError as error:
            say(f"not written to {path}: {error.strerror}")
    if dist.is_initialized():  # not after an error: it must be said before the other processes see this one leave
        dist.destroy_process_group()
    return result


if __name__ == "__main__":
    run(lambda: main(parse_args(sys.argv[1:])))
