"""A run on disk: one folder per run, safe checkpoints, exact resume.

A run's folder has checkpoint.pth, the newest state, and checkpoint_previous.pth, the one before; checkpoints/ckp-N.pth
(kept after N epochs), last_good.pth (with --on_collapse recover), run.json (command, options with reasons, versions),
run.lock (while a process trains), metrics.jsonl and log.txt; checkpoint_damaged.pth, a newest state that was damaged.
Keys of a checkpoint, for torch.load(path, map_location="cpu", weights_only=True):
    epoch, step         epochs and steps done
    step_of_epoch       steps done of the epoch after these; 0 at an epoch's end
    losses              of these steps, means over processes
    state_dict          weights of the model, under the published names
    optimizer, scaler   state of LARS, and of fp16's loss scaling (empty without)
    queue               embeddings [A, Q, D] over all processes, newest batch first; started, filled
    guard               what guard.CollapseGuard remembers
    rng                 state of torch's random generator on the CPU
    images              number and hash of the images' paths, by images.fingerprint
    value_range         16-bit values that became 0 and 255, see data.to_pixels; None for 8-bit images
    sizes               (size, resize) of data.CentreCrop with which evaluation reads these images
    options             every option of train.py with its value in this run, and global_batch_size
    user_options        the options before any were derived, as far as they change what is learned
    recovered           options that --on_collapse recover changed, one name for each time
"""

import argparse
import math
import os
import re
import shlex
import shutil
import sys
import threading
import time
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import torch

from defaults import CROP_LISTS, DERIVED
from launch import STOP_CODES, RunStopped, UserError, environment, log, show_progress
from processes import Votes, exchange

# Options that --on_collapse recover changes, one group at a time
RECOVERABLE = ("relative_epsilon", "epsilon"), ("queue_length",), ("base_lr", "final_lr", "start_warmup")
NEWEST, PREVIOUS, DAMAGED = "checkpoint.pth", "checkpoint_previous.pth", "checkpoint_damaged.pth"
WRITER = "checkpoint writer"  # the name of the thread that writes
WRITE_SECONDS = 20  # how long a run that fails waits for it; torchrun kills processes 30 s after another one failed


# Write


def write(contents: dict, path: Path, previous: Path | None = None) -> None:
    """Write a checkpoint so that a crash at any moment leaves a whole one: `path`, or `previous`.

    The new file gets its name once it is on the disk and has been read back. The old one becomes `previous`. Raises
    OSError if that fails, and removes what it has written.
    """
    unfinished = path.with_name(path.name + ".tmp")
    try:
        try:
            with unfinished.open("wb") as file:
                torch.save(contents, file)
                file.flush()
                os.fsync(file.fileno())
        except RuntimeError as error:  # torch's writer hides the system's error
            cause = error.__context__ if isinstance(error.__context__, OSError) else None
            raise cause or OSError(0, str(error).splitlines()[0]) from None
        if damage := find_damage(unfinished):
            raise OSError(0, f"the file read back differs from what was written: {damage}")
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(unfinished, path)
    except BaseException:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise
    with suppress(OSError):  # make the renames permanent; Windows and some network disks cannot
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def find_damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's bytes, by the checksums that torch writes; None if nothing is."""
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
    except Exception as error:  # zipfile raises whatever a damaged directory makes it run into
        return str(error) or "it ends early"
    return damaged and f"the checksum of {damaged} is wrong"


def link(source: Path, target: Path) -> None:
    """Give a checkpoint, which never changes in place, another name. Copies it where disks have no links."""
    target.parent.mkdir(exist_ok=True)
    unfinished = target.with_name(target.name + ".tmp")
    unfinished.unlink(missing_ok=True)
    try:
        os.link(source, unfinished)
    except OSError:
        shutil.copyfile(source, unfinished)
    os.replace(unfinished, target)


def on_host(value: Any) -> Any:
    """Copy the tensors in dicts and lists to the host. A GPU's copies are complete once its current stream is."""
    if isinstance(value, torch.Tensor):
        value = value.detach()
        is_on_gpu = value.device.type == "cuda"
        copy = torch.empty_like(value, device="cpu", pin_memory=is_on_gpu)
        return copy.copy_(value, non_blocking=is_on_gpu)
    if isinstance(value, Mapping):
        return {name: on_host(part) for name, part in value.items()}
    return [on_host(part) for part in value] if isinstance(value, list) else value


def finish_write() -> None:
    """Give the write that is under way WRITE_SECONDS, for launch.at_exit. After a KeyboardInterrupt it is cut off."""
    if isinstance(sys.exc_info()[1], KeyboardInterrupt):
        return
    for thread in (thread for thread in threading.enumerate() if thread.name == WRITER):
        thread.join(WRITE_SECONDS)
        if thread.is_alive():
            log(f"warning: the newest state is not saved: the disk took more than {WRITE_SECONDS} seconds")


class Saver:
    """Saves a run: after each epoch, every few minutes, and when it is asked to stop. One per process.

    The first process copies the state to the host and writes it in a thread, so that training goes on meanwhile. A
    write that fails is reported in one line and tried again at the next time.
    parts: model, optimizer, scaler, criterion, guard, run_log. settings: further keys of a checkpoint. sampler: of the
    loader (data.ShuffledBatches). minutes: between two saves. requested_stop: () -> name of a signal, or None
    (launch.stop_signals).
    """

    def __init__(
        self,
        dump: Path,
        parts: Mapping[str, Any],
        settings: Mapping[str, Any],
        *,
        sampler: Any,
        minutes: float,
        requested_stop: Callable[[], str | None],
    ) -> None:
        self.dump, self.parts, self.settings, self.sampler = dump, parts, settings, sampler
        self.run_log = parts["run_log"]
        self.seconds, self.requested_stop = 60 * minutes, requested_stop
        self.votes, self.is_first = Votes(), environment("RANK", 0) == 0
        self.stop: str | None = None  # the signal that all processes agreed on
        self.last_save = time.monotonic()
        self.thread: threading.Thread | None = None
        self.unsaved: str | None = None  # why the newest state is not on the disk

    def save_if_due(self) -> None:
        """After a step: save if it is time, and stop if a signal came (RunStopped). Every process must call it.

        All processes do so after the same step, at most two after the signal.
        """
        wish, wishes = self.requested_stop(), (None, "save", *STOP_CODES)
        if self.is_first and time.monotonic() - self.last_save >= self.seconds:
            self.last_save = time.monotonic()  # not asked for twice, as the answer comes a step later
            wish = wish or "save"
        agreed = wishes[self.votes.largest(wishes.index(wish))]
        self.stop = agreed if agreed in STOP_CODES else self.stop
        if agreed and self.run_log.step_of_epoch < self.run_log.steps_per_epoch:  # else the epoch's end saves
            self._save()

    def save_epoch(self, keep: bool, is_good: bool) -> None:
        """After an epoch: save; also as last_good.pth (is_good), also as checkpoints/ckp-N.pth (keep)."""
        kept = f"checkpoints/ckp-{self.run_log.epoch + 1}.pth"
        self._save(["last_good.pth"] * is_good + [kept] * keep)

    def _save(self, links: Sequence[str] = ()) -> None:
        self.stop_on_bad_step()
        contents = self._state()
        self.last_save = time.monotonic()
        if self.is_first:
            self.wait()
            contents = on_host(contents)
            copied = torch.cuda.current_stream().record_event() if torch.cuda.is_initialized() else None
            self.thread = threading.Thread(target=self._write, args=(contents, copied, links), name=WRITER, daemon=True)
            self.thread.start()
        if self.stop:
            self.finish()

    def _state(self) -> dict:
        parts, run_log = self.parts, self.run_log
        epoch, step_of_epoch = divmod(run_log.step, run_log.steps_per_epoch)
        return {
            "epoch": epoch,
            "step": run_log.step,
            "step_of_epoch": step_of_epoch,
            "losses": list(run_log.read_losses()) if step_of_epoch else [],
            "state_dict": parts["model"].state_dict(),
            "optimizer": parts["optimizer"].state_dict(),
            "scaler": parts["scaler"].state_dict(),
            "queue": parts["criterion"].gather_queue(self.sampler.batch_size),
            "guard": parts["guard"].gather(),
            "rng": torch.get_rng_state(),
            **self.settings,
        }

    def _write(self, contents: dict, copied: Any, links: Sequence[str]) -> None:
        self.unsaved = "see the error above"  # of another kind than the system's: a bug, or too little memory
        if copied:
            copied.synchronize()
        try:
            self.dump.mkdir(parents=True, exist_ok=True)
            write(contents, self.dump / NEWEST, self.dump / PREVIOUS)
            for name in links:
                link(self.dump / NEWEST, self.dump / name)
            self.unsaved = None
        except OSError as error:
            self.unsaved = error.strerror or str(error)
            show_progress(
                f"warning: the state after step {contents['step']} is not saved in {self.dump}: {self.unsaved}; "
                "training continues and saves again at the next time",
                keep=True,
            )

    def stop_on_bad_step(self) -> None:
        """Raise RunStopped if a loss or gradient was inf or nan since the last call. Every process must call it.

        LARS has changed nothing since then, so the weights of that step are still there: for train.py --replay, each
        process saves them in bad_step-RANK.pth with its image indices. In fp16, where gradients that overflow are
        normal, later steps may have changed them.
        """
        run_log, skipped = self.run_log, self.parts["optimizer"].skipped
        losses, skipped = run_log.read_losses(), 0 if skipped is None else int(skipped)
        bad = [i for i, loss in enumerate(reversed(losses)) if not math.isfinite(loss)]  # steps since then
        if not bad and not skipped:
            return
        steps_since = max([*bad, skipped - 1])
        loss = losses[-1 - steps_since]
        what = "gradients are inf or nan" if math.isfinite(loss) else f"the loss is {loss}"
        index = run_log.step_of_epoch - 1 - steps_since
        keys = list(self.sampler)[index - self.sampler.first_step]
        contents = {"epoch": run_log.epoch + 1, "step": run_log.step - steps_since, "steps_since": steps_since}
        contents |= {"image_indices": [image for _, image in keys], "reason": what, **self.settings}
        contents |= {"state_dict": self.parts["model"].state_dict(), "queue": self.parts["criterion"].state_dict()}
        path = self.dump / f"bad_step-{environment('RANK', 0)}.pth"
        with suppress(OSError):
            write(contents, path)
        self.wait()
        self.votes.close()  # torchrun ends all processes with the first: wait until each has saved
        raise RunStopped(
            f"{what} at step {contents['step']} (epoch {contents['epoch']}), so the run stopped; checkpoint.pth is "
            f"from before it; python train.py --replay {shlex.quote(str(path))} runs that step again and names the "
            "first bad tensor; try a lower --base_lr, or --precision fp32",
            code=4,
        )

    def wait(self) -> None:
        """Wait for the write that is under way."""
        if self.thread is not None:
            self.thread.join()

    def finish(self) -> None:
        """Wait for the last write. Raises RunStopped if it failed (exit code 3), or if a signal ends the run early."""
        self.wait()
        self.votes.close()
        stopped = self.stop and f"{self.stop}: stopped after step {self.run_log.step}"
        if self.unsaved:
            raise RunStopped(
                f"{stopped or 'the run is complete'}, but its last state is not saved in {self.dump}: {self.unsaved}; "
                "when this is mended, the same command repeats what came after the newest checkpoint",
                code=3,
            )
        if stopped:
            text = f"{stopped}, saved in {self.dump / NEWEST}; the same command resumes"
            raise RunStopped(text, STOP_CODES[self.stop])


# Read


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
    contents = load(path)
    options = contents.get("options") if isinstance(contents, dict) else None
    if not isinstance(options, dict) or not {"state_dict", "epoch"} <= contents.keys():
        raise UserError("it is not a checkpoint of train.py")
    for name, value in (("color_strength", 1.0), ("hflip", 0.5), ("accumulate", 1)):  # which older versions do not have
        options.setdefault(name, value)
    older = {"recovered": options.pop("recovered", []), "user_options": options.pop("asked", None)}
    older |= {"step_of_epoch": 0, "losses": [], "guard": None}
    return older | contents


def exists(dump: Path) -> bool:
    """Whether the folder holds a state to resume from, damaged or not."""
    return (dump / NEWEST).exists() or (dump / PREVIOUS).exists()


def find(dump: Path, quiet: bool = False) -> dict | None:
    """Find the newest state of a run whose bytes are whole; None if the folder holds no run.

    If checkpoint.pth is damaged or missing, checkpoint_previous.pth is used. Unless quiet, this is reported, and a
    damaged checkpoint.pth gets another name: the next save would put it in the place of the only whole file. Raises
    UserError if no file is left, so that a run never starts from scratch unasked.
    """
    newest, previous, problems = dump / NEWEST, dump / PREVIOUS, []
    for path in filter(Path.exists, (newest, previous)):
        try:
            contents = load_run(path)
            damage = find_damage(path)
        except UserError as error:
            damage = str(error).removeprefix(f"checkpoint: cannot read {path}: ")
        if damage:
            problems.append(f"cannot resume from {path}: {damage}")
            continue
        if path == previous and not quiet:
            using = f"using {path}, the state after step {contents['step']}"
            if problems:
                log(f"warning: {problems[0]}; {using}; the damaged file is now {DAMAGED}")
                os.replace(newest, dump / DAMAGED)
            else:
                log(f"warning: {newest} is missing; {using}")
        return contents
    if not problems:
        return None
    raise UserError(
        f"--dump_path: {'; '.join(problems)}; put one of {dump / 'checkpoints'} in the place of {NEWEST}, write "
        f"another --dump_path, or delete {dump}"
    )


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
    if before.get("precision") is None:  # in older checkpoints: what the device had
        before.pop("precision", None)
    return {name: (value, options[name]) for name, value in before.items() if options.get(name, value) != value}


def inherited_options(
    checkpoint: dict, user_options: Mapping[str, object], world_size: int
) -> dict[str, tuple[object, str]]:
    """{name: (value, reason)} of options that a resumed run takes from its checkpoint.

    These are the ones of defaults.DERIVED that the user did not set, and those that a recovery changed, unless the user
    sets others now. Not inherited, as they follow from what the user may have changed: the batch per process,
    BatchNorm's groups, one of epsilon and its unit where the other is set, and which crops get codes where other crops
    are set. Raises UserError if the processes cannot share the global batch.
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
    if any(name in given and given[name] != before.get(name) for name in CROP_LISTS):
        left_out.add("crops_for_assign")
    for name in DERIVED:
        if name not in given and name not in left_out and before.get(name) is not None:
            inherited[name] = before[name], "as in the run so far"
    if (global_batch := before.get("global_batch_size")) and "batch_size" not in given:
        if global_batch % world_size or global_batch < 2 * world_size:
            fitting = [str(n) for n in range(1, global_batch // 2 + 1) if global_batch % n == 0]
            raise UserError(
                f"--nproc_per_node: {world_size} processes cannot share this run's global batch of {global_batch} "
                f"images; expected {', '.join(fitting)} processes in all, or another --dump_path"
            )
        inherited["batch_size"] = global_batch // world_size, "over all processes as many as in the run so far"
    return inherited


def check_same_run(
    dump: Path, checkpoint: dict, settings: Mapping[str, Any], affects: Mapping[str, str], resume_anyway: bool
) -> None:
    """Raise UserError if dump_path holds a run of other images, or with other options that change what is learned.

    checkpoint: its newest state. settings: options and images of this run. affects: as in `changed_options`.
    resume_anyway: log the changes of an unfinished run instead, unless it is of another architecture.
    BatchNorm's groups, where the user left them open, may change with the number of processes: that is logged.
    """
    options, changes = settings["options"], changed_options(settings["options"], checkpoint, affects)
    changes.pop("epochs", None)  # a run may become longer
    typed = settings["user_options"].keys() | (checkpoint["user_options"] or {}).keys()
    if "sync_bn" in changes and "sync_bn" not in typed:
        before, now = changes.pop("sync_bn")
        log(f"--sync_bn: now {now}, before {before}: it follows the number of processes and the batch")
    before, now = checkpoint.get("images"), settings["images"]
    if before is not None:
        changes.pop("data_path", None)  # a folder may move
        if before != now:
            changes["images"] = tuple(f"{known['images']} ({known['paths'][:8]})" for known in (before, now))
    if not changes:
        return
    text = ", ".join(f"{name} {before} -> {now}" for name, (before, now) in changes.items())
    advice = f"write another --dump_path, or delete {dump}"
    if any(affects.get(name) == "model" for name in changes):
        raise UserError(f"--dump_path: {dump} holds a run of another architecture ({text}); {advice}")
    batch, _ = changes.get("global_batch_size", (0, 0))
    world_size = options["global_batch_size"] // options["batch_size"]
    keep_batch = ""
    if batch >= 2 * world_size and batch % world_size == 0:
        keep_batch = f"write --batch_size {batch // world_size} to keep the global batch of {batch} images, "
    if checkpoint["epoch"] >= options["epochs"]:
        note = "; --resume_anyway does not apply, as all epochs are done" if resume_anyway else ""
        raise UserError(
            f"--dump_path: {dump} holds a finished run with other options ({text}){note}; {keep_batch}{advice}"
        )
    if not resume_anyway:
        raise UserError(
            f"--dump_path: {dump} holds an unfinished run with other options ({text}); {keep_batch}write another "
            f"--dump_path, add --resume_anyway to continue it with the new ones, or delete {dump}"
        )
    log(f"--resume_anyway: options changed: {text}")


def resume(
    dump: Path, settings: Mapping[str, Any], parts: Mapping[str, Any], steps_per_epoch: int
) -> tuple[int, int, list[float]]:
    """Load the newest state in dump, if any, into the parts of a run. Every process must call it.

    Returns the epochs done, the steps done of the next one, and their losses. settings: options of this run, under
    their key. parts: as in `Saver`. The number of processes may change: `inherited_options` keeps the global batch,
    data.ShuffledBatches the images of each step, and loss.SwAVLoss.scatter_queue the queue. Raises UserError if the
    state does not fit, or if processes see different ones.
    """
    checkpoint = find(dump, quiet=True)
    step = 0 if checkpoint is None else checkpoint["step"]
    if len(set(exchange("comparing the runs to resume", step))) > 1:
        raise UserError(
            f"--dump_path: expected a folder that all machines share, but they see different runs in {dump}"
        )
    if checkpoint is None:
        if environment("RANK", 0) == 0:
            (dump / "last_good.pth").unlink(missing_ok=True)  # of a run whose checkpoint was deleted
        return 0, 0, []
    options, criterion = settings["options"], parts["criterion"]
    try:
        parts["model"].load_state_dict(checkpoint["state_dict"])
        parts["optimizer"].load_state_dict(checkpoint["optimizer"])
    except (RuntimeError, ValueError) as error:
        reason = f"--dump_path: {dump} does not fit this model: {error}; write another --dump_path, or delete {dump}"
        raise UserError(reason.replace("\n", " ")) from None
    for group in parts["optimizer"].param_groups:
        group["weight_decay"] = options["wd"]
    if checkpoint["scaler"]:
        parts["scaler"].load_state_dict(checkpoint["scaler"])
    if checkpoint["guard"]:
        parts["guard"].load_state(checkpoint["guard"])
        if checkpoint["options"]["on_collapse"] != options["on_collapse"]:
            parts["guard"].streak.clear()  # so that a collapse already warned of is found again, and acted on
    if "rng" in checkpoint:
        torch.set_rng_state(checkpoint["rng"])
    epochs_done, step_of_epoch, losses = (checkpoint[name] for name in ("epoch", "step_of_epoch", "losses"))
    images, batch = checkpoint.get("images"), checkpoint["options"].get("global_batch_size")
    # Within the first epoch the steps done do not tell; older checkpoints, which lack these, are of whole epochs.
    before = images["images"] // batch if images and batch else step // max(1, epochs_done)
    if before != steps_per_epoch:  # another global batch, or other images
        log(f"steps per epoch: now {steps_per_epoch}, before {before}: the schedule follows the new number")
        step_of_epoch, losses = 0, []
    within = f", and {step_of_epoch} of {steps_per_epoch} steps of the next" if step_of_epoch else ""
    log(f"resuming from {dump}: {epochs_done} of {options['epochs']} epochs done{within}")
    queues, queue_length, _ = checkpoint["queue"]["embeddings"].shape
    if (queues, queue_length) == (len(options["crops_for_assign"]), options["queue_length"]):
        criterion.scatter_queue(checkpoint["queue"], options["batch_size"])
    elif queue_length:
        log(
            f"--queue_length: now {options['queue_length']} for {len(options['crops_for_assign'])} assigning crops, "
            f"before {queue_length} for {queues}: the queue starts empty"
        )
    return epochs_done, step_of_epoch, losses


def roll_back(dump: Path, settings: dict) -> tuple[int, Path | None]:
    """Put last_good.pth in the place of checkpoint.pth, with these settings. Every process must call it.

    settings: the keys options, user_options and recovered. Without a last_good.pth the run starts from scratch, and
    checkpoint.pth gets another name. Returns the epochs done now, and that other name (on the first process).
    """
    good, path, renamed = dump / "last_good.pth", dump / NEWEST, None
    contents = load_run(good) if good.exists() else None
    exchange("going back", None)  # all have read it
    if environment("RANK", 0) == 0:
        (dump / PREVIOUS).unlink(missing_ok=True)
        if contents:
            write(contents | settings, path)
        elif path.exists():
            renamed = next(name for i in count(1) if not (name := dump / f"collapsed-{i}.pth").exists())
            os.replace(path, renamed)
    exchange("going back", None)
    return contents["epoch"] if contents else 0, renamed
