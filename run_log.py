"""What a run logs: metrics.jsonl, codes.jsonl, a progress line, and TensorBoard if asked for.

A row of metrics.jsonl is one of a log line (loss, learning rate, throughput, measures of guard.py) or of an epoch
(epoch_loss, codes_changed, measures of features.py). Each step has at most one of each, also in resumed runs. A row of
codes.jsonl has the prototypes of the images that a run tracks, after an epoch.
"""

import errno
import json
import os
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch

from launch import environment, log, show_progress
from processes import mean_over_processes


def parse_row(line: str) -> dict | None:
    """A row of metrics.jsonl or codes.jsonl; None for one that an interruption cut short."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and {"epoch", "step"} <= row.keys() else None


def read_rows(path: Path) -> list[dict]:
    """The rows of metrics.jsonl or codes.jsonl, also while a run writes it; [] if there is no such file."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return []
    return [row for row in map(parse_row, lines) if row is not None]


class Rows:
    """A file of JSON rows, each with its "epoch" and "step", to which a run appends.

    epochs_done, steps: rows of these epochs are kept, and of the next one those of these steps. All others, and half a
    row, are of an interrupted run. Rows that a full disk does not take wait for the next one.
    """

    def __init__(self, path: Path, epochs_done: int, steps: range) -> None:
        self.name, self.unwritten = path.name, b""
        lines, kept = path.read_text().splitlines() if path.exists() else [], []
        for line in lines:
            row = parse_row(line)
            # Steps of earlier epochs may have higher numbers, if the batch was smaller then.
            if row and (row["epoch"] <= epochs_done or (row["epoch"] == epochs_done + 1 and row["step"] in steps)):
                kept.append(line)
        if kept != lines:
            unfinished = path.with_name(path.name + ".tmp")
            unfinished.write_text("".join(line + "\n" for line in kept))
            os.replace(unfinished, path)
        self.file = path.open("ab", buffering=0)

    def append(self, row: dict) -> bool:
        """Write a row, after those that wait. False if the disk is full."""
        is_first_failure = not self.unwritten
        self.unwritten += json.dumps(row).encode() + b"\n"
        size = os.fstat(self.file.fileno()).st_size
        try:
            if self.file.write(self.unwritten) < len(self.unwritten):  # a disk that fills up takes a part
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self.file.truncate(size)
            if is_first_failure:
                log(f"warning: {self.name} cannot be written ({error.strerror}); its rows are kept for the next line")
            return False
        self.unwritten = b""
        return True


class RunLog:
    """Logs a run and counts what a line reports: steps, time, time spent waiting for data, losses. One per process.

    steps_done: rows of later steps, from an interrupted run, are dropped (see `Rows`). ln_k: ln(nmb_prototypes).
    epoch_losses: losses of the epoch so far, means over processes; a resumed run sets those from before.
    """

    def __init__(
        self,
        dump: Path,
        *,
        epochs: int,
        steps_done: int,
        steps_per_epoch: int,
        images_per_step: int,
        log_freq: int,
        ln_k: float,
        device: torch.device,
        tensorboard: bool = False,
    ) -> None:
        self.epochs, self.steps_per_epoch, self.images_per_step = epochs, steps_per_epoch, images_per_step
        self.log_freq, self.ln_k, self.device = log_freq, ln_k, device
        self.total_steps = epochs * steps_per_epoch
        self.epoch, self.step_of_epoch = divmod(steps_done, steps_per_epoch)  # the current step counts as done
        self.epoch_losses: list[float] = []
        self.unread_losses: list[torch.Tensor] = []  # still on the device
        self.line_is_due = False
        self.metrics = self.codes = self.board = None  # of the first process
        if environment("RANK", 0) != 0:
            return
        kept = self.epoch, range(self.epoch * steps_per_epoch + 1, steps_done + 1)
        self.metrics, self.codes = (Rows(dump / name, *kept) for name in ("metrics.jsonl", "codes.jsonl"))
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # needs a package that few have

            self.board = SummaryWriter(str(dump / "tensorboard"), purge_step=steps_done + 1)

    @property
    def step(self) -> int:
        """Steps done, with the current one."""
        return self.epoch * self.steps_per_epoch + self.step_of_epoch

    @property
    def share_done(self) -> float:
        return self.step / self.total_steps

    def timed_steps(self, epoch: int, batches: Iterator, first: int = 0) -> Iterator[tuple[int, Any]]:
        """Yield (step, batch) for an epoch's steps from its `first` on.

        step: of the whole run, from 0, as first is of the epoch. batches: of these steps.
        """
        self.epoch = epoch
        if not first:
            self.epoch_losses = []
        self.unread_losses, self.epoch_steps = [], self.steps_per_epoch - first
        epoch_start = time.perf_counter()
        self._start_interval(epoch_start)
        for step_of_epoch in range(first + 1, self.steps_per_epoch + 1):
            self.step_of_epoch = step_of_epoch
            is_last = step_of_epoch == self.steps_per_epoch
            self.line_is_due = self.step == 1 or step_of_epoch % self.log_freq == 0 or is_last
            wait_start = time.perf_counter()
            batch = next(batches)
            self.waited += time.perf_counter() - wait_start
            self.interval_steps += 1
            yield self.step - 1, batch
        self.epoch_seconds = time.perf_counter() - epoch_start

    def _start_interval(self, now: float) -> None:
        self.interval_start, self.interval_steps, self.waited = now, 0, 0.0

    def record_loss(self, loss: torch.Tensor) -> None:
        """Record the loss of a step; `read_losses` reads it, as to read means to wait for the GPU."""
        self.unread_losses.append(loss.detach())

    def read_losses(self) -> list[float]:
        """Average over processes the losses recorded since the last call. Return all of the epoch so far."""
        if self.unread_losses:
            self.epoch_losses += mean_over_processes(torch.stack(self.unread_losses)).tolist()
            self.unread_losses = []
        return self.epoch_losses

    @property
    def interval_loss(self) -> float:
        """Mean loss since the last line; lines come at the same steps in a resumed run."""
        last_line = (self.step_of_epoch - 1) // self.log_freq * self.log_freq
        if self.epoch == last_line == 0 and self.step > 1:
            last_line = 1
        losses = self.read_losses()[last_line - self.step_of_epoch :]
        return sum(losses) / len(losses)

    @property
    def epoch_loss(self) -> float:
        return sum(self.read_losses()) / len(self.epoch_losses)

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
        bad = f"{row['bad_images']} bad image{'s' * (row['bad_images'] > 1)}  " if row.get("bad_images") else ""
        skipped = f"{row['skipped_steps']} steps skipped  " if row.get("skipped_steps") else ""
        show_progress(
            f"epoch {row['epoch']}/{self.epochs}  step {row['step']}/{self.total_steps}  "
            f"loss {row['loss']:.4f} (ln K {self.ln_k:.3f})  lr {lr:.4g}  {row['images_per_s']:.0f} images/s  "
            f"data wait {row['data_wait_percent']:.0f}%  {memory}{skipped}{bad}"
            f"ETA {timedelta(seconds=round(row['eta_s']))}"
        )
        self._start_interval(now)
        return row

    def log_epoch(self, **measures: float | None) -> None:
        """Log the epoch that ended."""
        images_per_s = self.epoch_steps * self.images_per_step / self.epoch_seconds
        row = {"epoch": self.epoch + 1, "step": self.step, "epoch_loss": self.epoch_loss, "ln_k": self.ln_k}
        row |= {"epoch_seconds": self.epoch_seconds, "epoch_images_per_s": images_per_s, **measures}
        self._write(row)
        shown = {"LiDAR": measures.get("lidar"), "trivial R2": measures.get("trivial_r2")}
        quality = "".join(f"  {name} {value:.3g}" for name, value in shown.items() if value is not None)
        quality += "" if measures.get("knn") is None else f"  kNN {measures['knn']:.1f}%"
        show_progress(
            f"epoch {self.epoch + 1}/{self.epochs} done: loss {self.epoch_loss:.4f} (ln K {self.ln_k:.3f})  "
            f"{images_per_s:.0f} images/s  {self.epoch_seconds:.1f} s{quality}",
            keep=True,
        )

    def log_codes(self, prototypes: torch.Tensor, certainties: torch.Tensor) -> None:
        """Log the codes of the images that a run tracks, after an epoch.

        prototypes: of all of them, int64 [N]. certainties: their largest code entries, [N].
        """
        if self.codes is not None:
            row = {"epoch": self.epoch + 1, "step": self.step, "prototypes": prototypes.tolist()}
            row["certainties"] = [float(f"{certainty:.3g}") for certainty in certainties.tolist()]
            self.codes.append(row)

    def _write(self, row: dict) -> None:
        if self.metrics is None or not self.metrics.append(row) or self.board is None:
            return
        try:
            for name, value in row.items():
                if value is not None:
                    self.board.add_scalar(name, value, row["step"])
            self.board.flush()
        except OSError as error:
            log(f"warning: tensorboard cannot be written ({error.strerror})")


# Which checkpoint is best?


class Peak(NamedTuple):
    """A kept epoch that is better than the last kept one."""

    measure: str
    epoch: int
    measured: int  # after this epoch, the nearest that was measured
    value: float
    last_epoch: int
    last_value: float

    def describe(self, dump: Path) -> str:
        """Say what peaked when, and which file to evaluate."""
        unit = " %" if self.measure == "kNN" else ""
        when = "" if self.measured == self.epoch else f" (measured after epoch {self.measured})"
        doubt = "" if self.measure == "kNN" else "; it needs no labels, and is not reliable on all images"
        path = shlex.quote(str(dump / "checkpoints" / f"ckp-{self.epoch}.pth"))
        return (
            f"quality peaked at epoch {self.epoch} of those kept{when}: {self.measure} {self.value:.3g}{unit}, "
            f"{self.last_value:.3g}{unit} at epoch {self.last_epoch}{doubt}; evaluate also: "
            f"python eval_linear.py {path}"
        )


def kept_epochs(dump: Path) -> list[int]:
    """The epochs N of a run's checkpoints/ckp-N.pth."""
    names = [path.stem.removeprefix("ckp-") for path in dump.glob("checkpoints/ckp-*.pth")]
    return sorted(int(name) for name in names if name.isdecimal())


def find_peak(rows: Sequence[Mapping], kept: Sequence[int]) -> Peak | None:
    """The kept epoch at which quality peaked; None if that is the last one, or cannot be told.

    By kNN, else by LiDAR. A kept epoch has the value of the nearest measured epoch that no other kept epoch is nearer
    to. rows: of metrics.jsonl.
    """
    for measure in ("kNN", "LiDAR"):
        key = measure.lower()
        if measured := {row["epoch"]: row[key] for row in rows if row.get(key) is not None}:
            break
    nearest = {epoch: min(measured, key=lambda m: (abs(m - epoch), m)) for epoch in kept if measured}
    own = {epoch: at for epoch, at in nearest.items() if abs(at - epoch) == min(abs(at - other) for other in kept)}
    if not own or max(own) != max(kept):
        return None
    best, last = max(own, key=lambda epoch: (measured[own[epoch]], epoch)), max(own)
    value, last_value = measured[own[best]], measured[own[last]]
    # kNN of 1,000 images has a standard error of about a point.
    if value < (last_value + 1 if measure == "kNN" else 1.05 * last_value):
        return None
    return Peak(measure, best, own[best], value, last, last_value)
