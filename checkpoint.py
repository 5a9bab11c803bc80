"""A run on disk: checkpoints, how to resume from them, and metrics.jsonl.

A run's folder has checkpoint.pth (of the last finished epoch), checkpoints/ckp-N.pth (kept after N epochs),
last_good.pth (with --on_collapse recover) and metrics.jsonl. Keys of a checkpoint, for
torch.load(path, map_location="cpu", weights_only=True):
    epoch, step         epochs and steps done
    state_dict          weights of the model, under the published names
    optimizer, scaler   state of LARS, and of fp16's loss scaling (empty without)
    queue               embeddings [A, Q, D] over all processes, newest batch first; started, filled
    options             every option of train.py with its value in this run, and global_batch_size
    user_options        the options before any were derived, as far as they change what is learned
    recovered           options that --on_collapse recover changed, one name for each time
"""

import argparse
import json
import math
import os
import re
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import nn

from launch import RunStopped, UserError, environment, log, mean_over_processes, show_progress

# Options that --on_collapse recover changes, one group at a time
RECOVERABLE = ("relative_epsilon", "epsilon"), ("queue_length",), ("base_lr", "final_lr", "start_warmup")


# Write and read


def save(contents: dict, path: Path) -> None:
    """Write a checkpoint under a temporary name first, so that an interruption leaves the old file as it was."""
    unfinished = path.with_name(path.name + ".tmp")
    torch.save(contents, unfinished)
    os.replace(unfinished, path)


def save_epoch(
    dump: Path,
    contents: dict,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    keep: bool,
    is_good: bool,
) -> None:
    """Write checkpoint.pth after an epoch; also last_good.pth (is_good), also checkpoints/ckp-N.pth (keep).

    contents: the keys that the other arguments do not give.
    """
    states = {name: part.state_dict() for name, part in (("optimizer", optimizer), ("scaler", scaler))}
    contents = contents | {"state_dict": model.state_dict()} | states
    save(contents, dump / "checkpoint.pth")
    if is_good:
        save(contents, dump / "last_good.pth")
    if keep:
        (dump / "checkpoints").mkdir(exist_ok=True)
        save(contents, dump / "checkpoints" / f"ckp-{contents['epoch']}.pth")


def load(path: str | Path) -> dict:
    """Load any checkpoint, ours or another program's, without running code that it may hold.

    Tensors, plain Python values and argparse.Namespace are read; a file with any other class is refused. Raises
    UserError with the file's name, and with the class.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other formats; the error below says it
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever unpickling runs into
        refused = re.search(r"(?i)unsupported (?:global: )?(?:global|class) ([\w.]+)", str(error))
        if refused:
            reason = f"{path} holds a {refused[1]}, which is refused, as loading it could run code; save the weights "
            reason += "alone, by torch.save(model.state_dict(), FILE), where you trust the file"
        elif isinstance(error, OSError) and error.filename:  # it cannot be opened
            reason = f"cannot read {path}: {error.strerror}"
        else:
            cause = f"{type(error).__name__}: {error}".splitlines()[0].partition(". ")[0]
            cause = "" if "eights" in cause else f" ({cause})"  # torch's advice is to load it without weights_only
            reason = f"cannot read {path}: it is cut short, damaged, or not a file that torch.save wrote{cause}"
        raise UserError(f"checkpoint: {reason}") from None


def load_run(path: Path) -> dict:
    """Load a checkpoint of train.py, also one of an older version. Raises UserError for anything else."""
    try:
        checkpoint = load(path)
        _, _, options = (checkpoint[key] for key in ("state_dict", "epoch", "options"))
        options.setdefault("color_strength", 1.0)  # of versions without this option
    except (UserError, LookupError, TypeError, AttributeError) as error:
        reason = error if isinstance(error, UserError) else "it is not a checkpoint of train.py"
        raise UserError(
            f"--dump_path: cannot resume from {path}: {reason}; delete it, put one of checkpoints/ in its place, "
            "or write another --dump_path"
        ) from None
    # Older versions kept these two among the options.
    recovered, asked = options.pop("recovered", []), options.pop("asked", None)
    return {"recovered": recovered, "user_options": asked} | checkpoint


def newest_checkpoint() -> Path:
    """The newest runs/*/checkpoint.pth. Raises UserError if there is none."""
    found = sorted(Path("runs").glob("*/checkpoint.pth"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError(
            "checkpoint: none given and no runs/*/checkpoint.pth here; run python train.py first, or name one"
        )
    return found[-1]


# Resume


def changed_options(options: Mapping[str, object], checkpoint: dict, affects: Mapping[str, str]) -> dict[str, tuple]:
    """{name: (before, now)} of the options that changed, as far as they affect what is learned.

    affects: what each option affects, from launch.OptionParser.
    """
    before = {name: value for name, value in checkpoint["options"].items() if affects.get(name, "nothing") != "nothing"}
    if "global_batch_size" in checkpoint["options"]:  # this is what counts, on any number of processes
        before.pop("batch_size", None)
        before["global_batch_size"] = checkpoint["options"]["global_batch_size"]
    return {name: (value, options[name]) for name, value in before.items() if options.get(name, value) != value}


def inherited_options(
    checkpoint: dict,
    user_options: Mapping[str, object],
    *,
    derived: Sequence[str],
    crop_lists: Sequence[str],
    world_size: int,
) -> dict[str, tuple[object, str]]:
    """{name: (value, reason)} of options that a resumed run takes from its checkpoint.

    These are the `derived` ones that the user did not set, and those that a recovery changed, unless the user sets
    others now. Not inherited, as they follow from what the user may have changed: the batch per process, BatchNorm's
    groups, one of epsilon and its unit where the other is set, and which crops get codes where other crops are set.
    """
    before, user_before = checkpoint["options"], checkpoint["user_options"]
    inherited: dict[str, tuple[object, str]] = {}
    for names in RECOVERABLE:
        is_unchanged = user_before is None or all(user_options.get(name) == user_before.get(name) for name in names)
        if is_unchanged and any(name in checkpoint["recovered"] for name in names):
            inherited |= {name: (before[name], "changed after a collapse of this run") for name in names}
    given = {**user_options, **{name: value for name, (value, _) in inherited.items()}}
    left_out = {"batch_size", "sync_bn"}
    if {"epsilon", "relative_epsilon"} & given.keys():
        left_out |= {"epsilon", "relative_epsilon"}
    if any(name in given and given[name] != before.get(name) for name in crop_lists):
        left_out.add("crops_for_assign")
    for name in derived:
        if name not in given and name not in left_out and before.get(name) is not None:
            inherited[name] = before[name], "as in the run so far"
    batch_size, remainder = divmod(before.get("global_batch_size", 0), world_size)
    if batch_size > 1 and not remainder and "batch_size" not in given:
        inherited["batch_size"] = batch_size, "over all processes as many as in the run so far"
    return inherited


def resume(
    dump: Path,
    options: Mapping[str, Any],
    affects: Mapping[str, str],
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    criterion: nn.Module,
    steps_per_epoch: int,
) -> int:
    """Load dump/checkpoint.pth if it exists; returns the number of epochs done.

    options: of this run, by name. affects: as in `changed_options`. Every process must call it. The number of processes
    may change: `inherited_options` keeps the global batch, data.ShuffledBatches the images of each step, and
    loss.SwAVLoss.scatter_queue the queue. Raises UserError if the checkpoint does not fit.
    """
    path = dump / "checkpoint.pth"
    checkpoint = load_run(path) if path.exists() else None
    epochs_done = 0 if checkpoint is None else checkpoint["epoch"]
    if dist.is_initialized():
        epochs_seen = [None] * dist.get_world_size()
        dist.all_gather_object(epochs_seen, epochs_done)
        if len(set(epochs_seen)) > 1:
            raise UserError(
                f"--dump_path: expected a folder that all machines share, but they see different runs in {dump}"
            )
    if checkpoint is None:
        if environment("RANK", 0) == 0:
            (dump / "last_good.pth").unlink(missing_ok=True)  # of a run whose checkpoint was deleted
        return 0
    changes = changed_options(options, checkpoint, affects)
    changes_text = ", ".join(f"{name} {before} -> {now}" for name, (before, now) in changes.items())
    advice = f"write another --dump_path, or delete {dump}"
    if any(affects.get(name) == "model" for name in changes):
        raise UserError(f"--dump_path: {path} is of another architecture ({changes_text}); {advice}")
    if changes and epochs_done >= options["epochs"]:
        raise UserError(f"--dump_path: {dump} holds a finished run with other options ({changes_text}); {advice}")
    try:
        model.load_state_dict(checkpoint["state_dict"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    except (RuntimeError, ValueError) as error:
        raise UserError(f"--dump_path: {path} does not fit this model: {error}; {advice}".replace("\n", " ")) from None
    for group in optimizer.param_groups:
        group["weight_decay"] = options["wd"]
    if checkpoint["scaler"]:
        scaler.load_state_dict(checkpoint["scaler"])
    log(
        f"resuming from {path}: {epochs_done} of {options['epochs']} epochs done"
        + (f"; options changed: {changes_text}" if changes else "")
    )
    if checkpoint["step"] != epochs_done * steps_per_epoch:
        before = checkpoint["step"] // epochs_done
        log(f"steps per epoch: now {steps_per_epoch}, before {before}: the schedule follows the new number")
    queues, queue_length, _ = checkpoint["queue"]["embeddings"].shape
    if (queues, queue_length) == (len(options["crops_for_assign"]), options["queue_length"]):
        criterion.scatter_queue(checkpoint["queue"], options["batch_size"])
    elif queue_length:
        log(
            f"--queue_length: now {options['queue_length']} for {len(options['crops_for_assign'])} assigning crops, "
            f"before {queue_length} for {queues}: the queue starts empty"
        )
    return epochs_done


def roll_back(dump: Path, settings: dict) -> tuple[int, Path | None]:
    """Put last_good.pth in the place of checkpoint.pth, with these settings. Every process must call it.

    settings: the keys options, user_options and recovered. Without a last_good.pth the run starts from scratch, and
    checkpoint.pth gets another name. Returns the epochs done now, and that other name (on the first process).
    """
    good, path = dump / "last_good.pth", dump / "checkpoint.pth"
    is_first = environment("RANK", 0) == 0
    contents, renamed = load_run(good) if good.exists() else None, None
    if dist.is_initialized():
        dist.barrier()  # all have read it
    if is_first and contents:
        save(contents | settings, path)
    elif is_first and path.exists():
        renamed = next(name for i in count(1) if not (name := dump / f"collapsed-{i}.pth").exists())
        os.replace(path, renamed)
    if dist.is_initialized():
        dist.barrier()
    return contents["epoch"] if contents else 0, renamed


# Log


def _epoch_of(row: str) -> float:
    """The epoch of a row of metrics.jsonl; infinite for a row that an interruption cut short."""
    try:
        return json.loads(row)["epoch"]
    except (ValueError, KeyError, TypeError):
        return math.inf


class RunLog:
    """Logs a run: metrics.jsonl, a progress line, and TensorBoard if asked for. Every process needs one.

    It also counts what a log line reports: steps, time, time spent waiting for data, losses.
    epochs_done: rows of later epochs, from an interrupted run, are dropped. ln_k: ln(nmb_prototypes).
    """

    def __init__(
        self,
        dump: Path,
        *,
        epochs: int,
        epochs_done: int,
        steps_per_epoch: int,
        images_per_step: int,
        log_freq: int,
        ln_k: float,
        device: torch.device,
        tensorboard: bool = False,
    ) -> None:
        self.epochs, self.steps_per_epoch, self.images_per_step = epochs, steps_per_epoch, images_per_step
        self.log_freq, self.ln_k, self.device = log_freq, ln_k, device
        self.steps_resumed, self.total_steps = epochs_done * steps_per_epoch, epochs * steps_per_epoch
        self.epoch, self.step = epochs_done, self.steps_resumed  # step: steps done, with the current one
        self.epoch_losses: list[float] = []
        self.unread_losses: list[torch.Tensor] = []  # still on the device
        self.line_is_due = False
        self.file = self.board = None
        if environment("RANK", 0) != 0:
            return
        path = dump / "metrics.jsonl"
        rows = path.read_text().splitlines() if path.exists() else []
        kept = [row for row in rows if _epoch_of(row) <= epochs_done]
        path.write_text("".join(row + "\n" for row in kept))
        self.file = path.open("a", buffering=1)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # needs a package that few have

            last_step = json.loads(kept[-1])["step"] if kept else -1
            self.board = SummaryWriter(str(dump / "tensorboard"), purge_step=last_step + 1)

    def timed_steps(self, epoch: int, batches: Iterator) -> Iterator[tuple[int, Any]]:
        """Yield (step, batch) for the steps of an epoch; step counts from the start of the run, from 0."""
        self.epoch = epoch
        self.epoch_losses, self.unread_losses = [], []
        epoch_start = time.perf_counter()
        self._start_interval(epoch_start)
        for step_of_epoch in range(1, self.steps_per_epoch + 1):
            self.step = epoch * self.steps_per_epoch + step_of_epoch
            self.line_is_due = (
                self.step == self.steps_resumed + 1
                or step_of_epoch % self.log_freq == 0
                or step_of_epoch == self.steps_per_epoch
            )
            wait_start = time.perf_counter()
            batch = next(batches)
            self.waited += time.perf_counter() - wait_start
            self.interval_steps += 1
            yield self.step - 1, batch
        self.epoch_seconds = time.perf_counter() - epoch_start

    def _start_interval(self, now: float) -> None:
        self.interval_start, self.interval_steps, self.waited = now, 0, 0.0

    def record_loss(self, loss: torch.Tensor) -> bool:
        """Record the loss of a step; False if it, or an earlier one that is read only now, is NaN or infinite.

        To read a loss means to wait for the GPU, so there they are read when a line is due; on a CPU at each step.
        """
        self.unread_losses.append(loss.detach())
        if not self.line_is_due and self.device.type != "cpu":
            return True
        losses = mean_over_processes(torch.stack(self.unread_losses)).tolist()
        self.epoch_losses += losses
        self.unread_losses = []
        return all(map(math.isfinite, losses))

    @property
    def share_done(self) -> float:
        return self.step / self.total_steps

    @property
    def interval_loss(self) -> float:
        """Mean loss since the last line."""
        return sum(self.epoch_losses[-self.interval_steps :]) / self.interval_steps

    @property
    def epoch_loss(self) -> float:
        return sum(self.epoch_losses) / self.steps_per_epoch

    def log_step(self, measures: Mapping[str, float], lr: float) -> dict:
        """Log the steps since the last line; measures: more numbers for metrics.jsonl. Returns the row."""
        now = time.perf_counter()
        seconds_per_step = (now - self.interval_start) / self.interval_steps
        row = {"epoch": self.epoch + 1, "step": self.step, "loss": self.interval_loss, "ln_k": self.ln_k, **measures}
        row |= {
            "lr": lr,
            "images_per_s": self.images_per_step / seconds_per_step,
            "data_wait_percent": 100 * self.waited / (now - self.interval_start),
            "gpu_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else 0.0,
            "eta_s": (self.total_steps - self.step) * seconds_per_step,
        }
        self._write(row)
        memory = f"GPU {row['gpu_memory_gib']:.1f} GiB  " if row["gpu_memory_gib"] else ""
        show_progress(
            f"epoch {row['epoch']}/{self.epochs}  step {row['step']}/{self.total_steps}  "
            f"loss {row['loss']:.4f} (ln K {self.ln_k:.3f})  lr {lr:.4g}  {row['images_per_s']:.0f} images/s  "
            f"data wait {row['data_wait_percent']:.0f}%  {memory}ETA {timedelta(seconds=round(row['eta_s']))}"
        )
        self._start_interval(now)
        return row

    def log_epoch(self, **measures: float | None) -> None:
        """Log the epoch that ended."""
        images_per_s = self.steps_per_epoch * self.images_per_step / self.epoch_seconds
        row = {"epoch": self.epoch + 1, "step": self.step, "epoch_loss": self.epoch_loss, "ln_k": self.ln_k}
        row |= {"epoch_seconds": self.epoch_seconds, "epoch_images_per_s": images_per_s, **measures}
        self._write(row)
        shown = {"LiDAR": measures.get("lidar"), "trivial R2": measures.get("trivial_r2")}
        quality = "".join(f"  {name} {value:.3g}" for name, value in shown.items() if value is not None)
        show_progress(
            f"epoch {self.epoch + 1}/{self.epochs} done: loss {self.epoch_loss:.4f} (ln K {self.ln_k:.3f})  "
            f"{images_per_s:.0f} images/s  {self.epoch_seconds:.1f} s{quality}",
            keep=True,
        )

    def _write(self, row: dict) -> None:
        if self.file is not None:
            self.file.write(json.dumps(row) + "\n")
        if self.board is not None:
            for name, value in row.items():
                if value is not None:
                    self.board.add_scalar(name, value, row["step"])
            self.board.flush()


def stop_on_bad_loss(
    dump: Path, run_log: RunLog, *, options: dict, model: nn.Module, indices: Sequence, **last_batch: Any
) -> NoReturn:
    """Save what led to a loss of NaN or infinity in bad_loss-RANK.pth, and raise RunStopped. Every process calls it.

    indices: this process's (epoch, image index) of each step of the epoch. last_batch: tensors of the latest step. On
    a CPU that is the bad step, and the weights are still good. On a GPU losses are read when a log line is due: weights
    may be NaN by then, and the bad batch has to be loaded again from its image indices.
    """
    losses = run_log.epoch_losses
    bad = next(i for i, loss in enumerate(losses) if not math.isfinite(loss))
    epoch = run_log.epoch + 1
    contents = {"epoch": epoch, "step": run_log.epoch * run_log.steps_per_epoch + bad + 1, "losses": losses}
    contents |= {"image_indices": [index for _, index in indices[bad]], "last_batch": last_batch, "options": options}
    save(contents | {"state_dict": model.state_dict()}, dump / f"bad_loss-{environment('RANK', 0)}.pth")
    if dist.is_initialized():
        dist.barrier()  # torchrun ends all processes with the first: wait until each has saved
    raise RunStopped(
        f"the loss is {losses[bad]} at step {contents['step']} (epoch {epoch}), so the run stopped; its images, the "
        f"latest batch and the weights are in {dump / 'bad_loss-*.pth'}, one file per process; checkpoint.pth is that "
        "of the last finished epoch; try a lower --base_lr, or --precision fp32"
    )
