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
import shlex
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryFile

# Must precede `import torch`. An idle GNU OpenMP thread then spins for 10 us, not 3 ms, and leaves its core to others.
if "OMP_WAIT_POLICY" not in os.environ:  # measured in MEASURED.md
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
from backbones import choose_sizes
from cache import CachedImages, cache_images, sizes_to_cache
from data import (
    CentreCrop,
    UnreadableImage,
    augment,
    batch_bytes,
    crops_to_device,
    reuse_freed_memory,
    start_epoch,
    training_loader,
)
from defaults import APEX_GROUP_SIZE, DERIVED
from guard import CollapseGuard, describe_collapse, describe_slow, diagnose_collapse
from images import GIVEN, BadImages, GivenImages, fingerprint, has_validation_split, open_images, typical_side
from launch import UserError, log
from model import SwAV, batchnorm_group, data_parallel, memory_layout, statistics_kept, sync_batchnorm
from monitor import (
    assigned_prototypes,
    knn_images,
    measure_knn,
    measure_quality,
    quality_crops,
    quality_epochs,
    tracked_images,
)
from optim import LARS, warmup_cosine
from options import (
    build_loss,
    build_model,
    build_multicrop,
    check_args,
    check_given,
    option_parser,
    parse_args,
    resolve_options,
    start_options,
)
from replay import replay
from run_log import RunLog, find_peak, kept_epochs, read_rows
from sinkhorn_ext import backend
from sinkhorn_ext.__main__ import report

MAX_RECOVERIES = 3  # of --on_collapse recover


# Set up


def set_threads_and_workers(args: argparse.Namespace, device: torch.device, in_memory: bool) -> tuple[int, int]:
    """Set torch's threads. Return the loader workers that the options ask for, and the bytes of a batch."""
    crop_only = args.augment != "workers"
    workers = machine.set_threads_and_workers(args.workers, device, crop_only=crop_only, in_memory=in_memory)
    return workers, batch_bytes(build_multicrop(args), args.batch_size, crop_only=crop_only)


def build_loader(
    args: argparse.Namespace, images: Dataset, rank: int, world_size: int, device: torch.device
) -> DataLoader:
    workers = machine.workers_that_fit(*set_threads_and_workers(args, device, in_memory=images.in_memory))
    sharing = dict(seed=args.seed, rank=rank, world_size=world_size, workers=workers)
    multi_crop, pin_memory, crop_only = build_multicrop(args), device.type == "cuda", args.augment != "workers"
    return training_loader(images, multi_crop, args.batch_size, pin_memory=pin_memory, crop_only=crop_only, **sharing)


# The run


def main(args: argparse.Namespace, images: Dataset | None = None) -> None:
    """Check, set up, train, clean up. Raises UserError for bad options, RunStopped if the run ends itself.

    images: a Dataset to train on, see images.GivenImages, with args of parse_args(["--dataset", "python", ...]). Each
    process gives its own, of the same images.
    """
    device = machine.choose_device(args.device)
    if args.replay:
        replay(args.replay, args.data_path, device, images)
        return
    check_given(args, images)
    machine.choose_precision(args.precision, device)  # to find errors first
    dump = Path(args.dump_path)
    rank, world_size = processes.setup_processes(device)
    check_args(args, world_size)
    open_dump_path(dump)
    with run_folder.locked(dump) if rank == 0 else nullcontext():
        log("options: " + launch.as_command_line({n: v for n, v in vars(args).items() if v not in (None, [])}))
        earlier = checkpoint.find(dump) if rank == 0 else None
        # A run that moves to another device keeps the precision and the range of 16-bit images that it began with.
        kept = [earlier["options"].get("precision"), earlier.get("value_range")] if earlier else [None, None]
        precision, value_range = processes.share("reading the run so far", lambda: kept)
        dtype = machine.choose_precision(args.precision or precision, device)
        check_same_options(args, dtype)
        args.precision = machine.name_of(dtype)
        images, settings, reasons = open_and_resolve(args, device, world_size, earlier, value_range, images)
        launch.log_to(dump / "log.txt")
        if rank == 0:
            facts = dict(world_size=world_size, device=str(device), sinkhorn=backend(device), sinkhorn_ext=report())
            run_folder.write_facts(dump, settings, reasons, **facts)
        with launch.stop_signals() as requested_stop, launch.at_exit(checkpoint.finish_write):
            while True:
                try:
                    train(args, images, settings, rank, world_size, device, dtype, requested_stop)
                    break
                except Collapse:
                    recover(args, settings)
                except UnreadableImage as error:  # the images tried in its place failed too
                    message = str(error).splitlines()[-1].removeprefix("data.UnreadableImage: ")
                    raise launch.RunStopped(message) from None
    processes.leave_processes()


def check_same_options(args: argparse.Namespace, dtype: torch.dtype) -> None:
    """Raise UserError if processes differ in their options. Machines may hold the images in different folders."""
    affects = option_parser().affects
    names = [name for name in vars(args) if affects.get(name, "nothing") != "nothing" and name != "data_path"]
    names += ["compile", "checkpoint_activations"]  # these decide how often, and in which dtype, processes all-reduce
    options = {f"--{name}": getattr(args, name) for name in names}
    processes.check_same("comparing options", options | {"--dump_path": args.dump_path, "precision": str(dtype)})


def open_and_resolve(
    args: argparse.Namespace,
    device: torch.device,
    world_size: int,
    earlier: dict | None,
    value_range: tuple[float, float] | None,
    given: Dataset | None = None,
) -> tuple[Dataset, dict, dict]:
    """Open the images, resolve options and cache, together with the other processes: (images, settings, reasons).

    earlier: the newest checkpoint of the run so far, in the first process. value_range: as in it. given: of --dataset
    python, see `main`.
    """
    read_off: dict[str, str] = {}
    if args.init:
        read_off = {name: f"as in {args.init}" for name in backbones.SHAPE_OPTIONS if getattr(args, name) is None}
        read_off["init_sha256"] = f"checksum of {args.init}"
        vars(args).update(processes.share("reading --init", lambda: start_options(args, earlier)))

    def open_them(is_first: bool) -> Dataset:
        if given is not None:
            return GivenImages(given)
        return open_images(args.dataset, args.data_path, "pretrain", download=is_first, value_range=value_range)

    # The first process of each machine downloads, builds the index of tar files, and finds errors.
    images = processes.in_turn("opening the images", open_them)
    if world_size > 1:
        found = fingerprint(images)
        processes.check_same("comparing images", {"images": found["images"], "their paths": found["paths"][:12]})
    if any(getattr(args, name) is None for name in DERIVED):
        log("derived from the images, or from the run so far:")
    settings, reasons = processes.share("choosing options", lambda: resolve_options(args, images, world_size, earlier))
    vars(args).update({name: settings["options"][name] for name in DERIVED})
    sizes = None
    if launch.environment("LOCAL_RANK", 0) == 0:
        workers, bytes_of_batch = set_threads_and_workers(args, device, in_memory=True)
        sizes = sizes_to_cache(images, args.cache, for_workers=machine.shared_memory_needed(workers, bytes_of_batch))
    return cache_images(images, sizes), settings, reasons | read_off


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
    components = dict(model=model, optimizer=optimizer, scaler=scaler, criterion=criterion, guard=guard)
    first_epoch, first_step, losses = checkpoint.resume(dump, settings, components, steps_per_epoch)
    steps_done = first_epoch * steps_per_epoch + first_step
    augment_crops, steps_left = augment, args.epochs * steps_per_epoch - steps_done
    if machine.use_compile(args.compile, device, steps_left, max(args.size_crops), processes.exchange):
        log("compiling: the first steps take a minute or two")
        warnings.filterwarnings("ignore", "TensorFloat32")  # torch advises TF32, which would change codes by up to 1 %
        model.features = torch.compile(model.features, dynamic=False)  # only the backbone; one graph per resolution
        augment_crops = torch.compile(augment, dynamic=False)
    place_options = dict(augment=augment_crops, memory_format=layout, parts=args.accumulate)
    place_options["stream"] = torch.cuda.Stream(device) if device.type == "cuda" else None
    network = data_parallel(model, device) if world_size > 1 else model  # which averages gradients over processes
    log_options = dict(log_freq=args.log_freq, ln_k=math.log(args.nmb_prototypes), tensorboard=args.tensorboard == "on")
    log_options |= dict(images_per_step=args.batch_size * world_size, device=device)
    run_log = RunLog(dump, epochs=args.epochs, steps_done=steps_done, steps_per_epoch=steps_per_epoch, **log_options)
    run_log.epoch_losses = losses
    saver_options = dict(sampler=loader.batch_sampler, minutes=args.checkpoint_minutes, requested_stop=requested_stop)
    saver = checkpoint.Saver(dump, components | {"run_log": run_log}, settings, **saver_options)
    bad_images = BadImages(images, args.max_bad_images, dump)
    tracked = tracked_images(images, args.size_crops[0], rank, world_size).to(device, memory_format=layout)
    measured_epochs, measured_on = plan_quality(args, images, first_epoch, rank, world_size)
    part_size = args.batch_size // args.accumulate  # images that fit into memory
    print_run_summary(args, images, loader, model, device, dtype)

    batches = start_epoch(loader, first_epoch, first_step) if first_epoch < args.epochs else None
    for epoch in range(first_epoch, args.epochs):
        if epoch >= args.epoch_queue_starts:
            criterion.start_queue()
        first = first_step if epoch == first_epoch else 0
        for step, (batch, _) in run_log.timed_steps(epoch, batches, first):  # step: of the whole run, from 0
            launch.note_activity(f"step {step + 1}")
            crops = crops_to_device(batch, device, **place_options)  # V of [B, 3, S, S]
            # 1. Prototypes to the unit sphere
            model.normalize_prototypes()
            # 2. Forward, of --accumulate parts one after the other
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                embeddings, scores = network(crops)  # [V*B, D], [V*B, K]
            # 3. Codes, the softmax of code_logits, and 4. swapped prediction
            loss, code_logits = criterion.loss_and_code_logits(embeddings, scores, model.prototypes.weight)
            # 5. Backward
            optimizer.zero_grad()
            with statistics_kept(model):
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
                    handle_collapse(args, settings, guard.last_row, step + 1)
            saver.save_if_due()

        is_last = epoch + 1 == args.epochs
        batches = None if is_last else start_epoch(loader, epoch + 1)  # workers load while the checkpoint is written
        assigned = assigned_prototypes(model, criterion.codes, tracked, part_size)
        codes, certainties = map(processes.gather_shares, assigned)
        quality = measure(model, measured_on, device, part_size) if epoch + 1 in measured_epochs else {}
        run_log.log_codes(codes, certainties)
        run_log.log_epoch(codes_changed=guard.share_changed(codes), **quality)
        if guard.is_slow(quality.get("trivial_r2"), run_log.share_done):
            launch.show_progress(describe_slow(quality["trivial_r2"], epoch + 1), keep=True)
        saver.save_epoch(
            keep=is_last or (epoch + 1) % args.checkpoint_freq == 0,
            is_good=args.on_collapse == "recover" and not guard.epoch_is_stuck(run_log.epoch_loss),
        )
    saver.finish()
    log_end(dump)


def plan_quality(
    args: argparse.Namespace, images: Dataset, first_epoch: int, rank: int, world_size: int
) -> tuple[range, tuple | None]:
    """The epochs after which to measure quality, and this process's share of the images for it, if any are left.

    The latter, for `measure`: crops for measures without labels, and images with labels, or None.
    """
    multi_crop, validation = build_multicrop(args), open_validation(args, images)
    costs = dict(images=len(images), multi_crop=multi_crop, knn_size=validation[1].size if validation else 0)
    epochs = quality_epochs(args.epochs, args.eval_every, **costs)
    if max(epochs, default=0) <= first_epoch:
        return epochs, None
    crops = quality_crops(images, multi_crop, rank, world_size)
    if world_size > 1:
        processes.check_same("comparing images", {"validation images": validation and len(validation[0])})
    return epochs, (crops, validation and knn_images(images, *validation, rank, world_size))


def open_validation(args: argparse.Namespace, images: Dataset) -> tuple[Dataset, CentreCrop] | None:
    """Images with labels to measure kNN on, of a named set or next to train/, and their transform; None without."""
    has_labels = has_validation_split(args.data_path) if args.dataset == "folder" else args.dataset != GIVEN
    if not has_labels or args.eval_every == 0:
        return None
    try:
        val_images = open_images(args.dataset, args.data_path, "val", value_range=images.value_range)
        side = typical_side(val_images)
    except UserError as error:
        log(f"no kNN while training: {error}")
        return None
    # Unlike in the evaluation, photographs are not enlarged, which would take four times as long.
    size, resize = choose_sizes(vars(args) | {"min_scale_crops": [1.0]}, side, is_folder=args.dataset == "folder")
    return val_images, CentreCrop(resize, size)


def measure(model: SwAV, measured_on: tuple, device: torch.device, batch_size: int) -> dict[str, float | None]:
    """Measure what the model has learned. measured_on: of `plan_quality`. Every process must call it."""
    crops, labelled = measured_on
    return measure_quality(model, crops, device, batch_size) | measure_knn(model, labelled, device, batch_size)


def log_end(dump: Path) -> None:
    """Log how to evaluate a run that is done, and which kept checkpoint was better than the last, if one was."""
    peak = find_peak(read_rows(dump / "metrics.jsonl"), kept_epochs(dump))
    if peak:
        log(peak.describe(dump))
    path, folder = (shlex.quote(str(name)) for name in (dump / "checkpoint.pth", dump))
    log(f"done; evaluate it with: python eval_linear.py {path}; see it with: python look.py {folder}")


def print_run_summary(
    args: argparse.Namespace, images: Dataset, loader: DataLoader, model: SwAV, device: torch.device, dtype: torch.dtype
) -> None:
    """Print what the run uses: device, processes, data, model."""
    world_size = launch.environment("WORLD_SIZE", 1)
    group = f"{world_size} processes ({dist.get_backend()})" if dist.is_initialized() else "1 process"
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    log(
        f"device: {where}; {group}; {loader.num_workers} loader workers each; {str(dtype).removeprefix('torch.')}; "
        f"sinkhorn: {backend(device)}"
    )
    source = getattr(images, "source", None) or args.data_path or "drawn in memory"
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


# Collapse


class Collapse(Exception):
    """The run collapses, and is to go back to its last good epoch with one option changed."""


def handle_collapse(args: argparse.Namespace, settings: dict, measures: dict, step: int) -> None:
    """Do what --on_collapse says: print a warning with the cause, stop (RunStopped), or recover (Collapse).

    measures: those that the guard's rule used.
    """
    cause, change = diagnose_collapse(settings["options"])
    message = f"{describe_collapse(measures, cause, step)}; try {launch.as_command_line(change)}"
    if args.on_collapse != "recover":
        message += " with another --dump_path"  # this one would resume from the collapsed weights
    if args.on_collapse == "stop":
        path = Path(args.dump_path) / "checkpoint.pth"
        saved = f", {path} is its last saved state" if path.exists() else ""
        raise launch.RunStopped(f"{message}; the run stopped{saved}")
    gives_up = args.on_collapse == "recover" and len(settings["recovered"]) >= MAX_RECOVERIES
    if gives_up:
        message += f"; recovered {MAX_RECOVERIES} times already, training continues"
    launch.show_progress(message, keep=True)
    if args.on_collapse == "recover" and not gives_up:
        raise Collapse


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
