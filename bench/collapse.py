"""When does SwAV collapse, and why: training runs over small data sets and settings.

Each run is train.py and then eval_linear.py --cached, as a user runs them, in a process of its own. A run that has a
result is not repeated, so an interrupted study resumes and a larger one extends a smaller one. For another study use
`Run` and `results`, as learn.py does.
"""

import io
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

import eval_linear
import train
from bench.sets import dataset_options
from checkpoint import load_run
from guard import is_stuck
from loss import means_and_std
from monitor import QUALITY
from optim import LARS

# The smallest ResNet, so that a run takes a minute or two. Crops, batch and all else follow from the data set.
NETWORK = "--arch resnet18 --width 16 --blocks 1 1 1 1 --hidden_mlp 256 --device cpu --workers 0"
PUBLISHED = (
    "--batch_size 64 --nmb_prototypes 3000 --temperature 0.1 --relative_epsilon off --epsilon 0.05 --queue_length 0 "
    "--base_lr 0.6 --final_lr 0.0006 --warmup_epochs 0 --blur_sigma 2 --hflip 0.5 --crops_for_assign 0 1"
)
# name: (options of train.py, change to the program that no option makes, see `ChangedProgram`)
SETTINGS: dict[str, tuple[str, str]] = {
    "derived": ("", ""),
    "published": (PUBLISHED, ""),
    "batch 16": ("--batch_size 16", ""),
    "batch 32": ("--batch_size 32", ""),
    "K 3000": ("--nmb_prototypes 3000", ""),
    "K 300": ("--nmb_prototypes 300", ""),
    "K 100": ("--nmb_prototypes 100", ""),
    "K 30": ("--nmb_prototypes 30", ""),
    "epsilon 0.05": ("--epsilon 0.05", ""),
    "epsilon 0.02": ("--epsilon 0.02", ""),
    "relative epsilon 0.1": ("--relative_epsilon on --epsilon 0.1", ""),
    "relative epsilon 0.2": ("--relative_epsilon on --epsilon 0.2", ""),
    "temperature 0.2": ("--temperature 0.2", ""),
    "temperature 0.3": ("--temperature 0.3", ""),
    "rounds 10": ("--sinkhorn_iterations 10", ""),
    "lr 0.6": ("--base_lr 0.6", ""),
    "lr 6": ("--base_lr 6", ""),
    "no warm-up": ("--warmup_epochs 0", ""),
    "frozen an epoch": ("--freeze_prototypes_niters 40", ""),
    "frozen throughout": ("--freeze_prototypes_niters 1000000", ""),
    "queue 640": ("--queue_length 640 --epoch_queue_starts 1", ""),
    "4 small crops": ("--nmb_crops 2 4", ""),
    "2 small crops": ("--nmb_crops 2 2", ""),
    "2 crops": ("--nmb_crops 2", ""),
    "published crop scales": ("--min_scale_crops 0.14 0.05 --max_scale_crops 1 0.14", ""),
    "crops from 0.6": ("--min_scale_crops 0.6", ""),
    "blur 2": ("--blur_sigma 2", ""),
    "two crops assign": ("--crops_for_assign 0 1", ""),
    "linear head": ("--hidden_mlp 0", ""),
    "width 32": ("--width 32", ""),
    "two blocks": ("--blocks 2 2 2 2 --hidden_mlp 2048", ""),
    "whole ResNet-18": ("--width 64 --blocks 2 2 2 2 --hidden_mlp 2048", ""),
    "published, K 300": (PUBLISHED + " --nmb_prototypes 300", ""),
    "published, K 30": (PUBLISHED + " --nmb_prototypes 30", ""),
    "published, lr 3": (PUBLISHED + " --base_lr 3", ""),
    "published, queue 640": (PUBLISHED + " --queue_length 640 --epoch_queue_starts 1", ""),
    "published, frozen throughout": (PUBLISHED + " --freeze_prototypes_niters 1000000", ""),
    "published, relative epsilon": (PUBLISHED + " --relative_epsilon on --epsilon 0.3", ""),
    "head normalised": ("", "head"),
    "published, head normalised": (PUBLISHED, "head"),
    "2 processes": ("", "2 processes"),
    "crops from 0.4": ("--min_scale_crops 0.4", ""),
    "crops from 0.14": ("--min_scale_crops 0.14", ""),
    "crops from 0.08": ("--min_scale_crops 0.08", ""),
    "jitter 1": ("--color_strength 1", ""),
    "jitter 0.25": ("--color_strength 0.25", ""),
    "jitter 0": ("--color_strength 0", ""),
    "crops from 0.4, jitter 1": ("--min_scale_crops 0.4 --color_strength 1", ""),
    "crops from 0.14, jitter 0.5": ("--min_scale_crops 0.14 --color_strength 0.5", ""),
    "no greyscale": ("--grayscale 0", ""),
    "no blur": ("--blur_sigma 0", ""),
    "no flip": ("--hflip 0", ""),
    "made to collapse": (PUBLISHED + " --base_lr 30 --min_scale_crops 0.14 0.05 --max_scale_crops 1 0.14", ""),
    "LARS without biases": ("", "LARS"),
    "published, LARS without biases": (PUBLISHED, "LARS"),
}
RECORDED_STEPS, RECORD_EVERY = 200, 10
# heading: key of a result
COLUMNS = {
    "loss/ln K": "loss_per_ln_k", "code entropy": "code_entropy", "in use": "prototypes_in_use",
    "embed. std": "embedding_std", "feature std": "feature_std", "kNN": "knn", "random": "knn_random",
    "random, BN": "knn_random_batchnorm", "raw pixels": "knn_raw",
}  # fmt: skip


def run(
    device: torch.device,
    *,
    threads: int = 1,
    sets: Sequence[str] | None = None,
    settings: Sequence[str] | None = None,
    seeds: Sequence[int] = (1,),
    epochs: int = 10,
    jobs: int = 2,
    dump_path: Path | None = None,
    photographs: Path | None = None,
) -> list[dict]:
    """Do the runs that have no result yet, `jobs` at a time on a CPU, and print the table of all. Return its rows."""
    dump_path = dump_path or Path("runs/collapse")
    sets, settings = sets or ("shapes",), settings or ("derived", "published")
    options = {name: dataset_options(name, dump_path / "sets", photographs) for name in sets}
    rows = [{"set": name, "setting": setting, "seed": seed} for setting in settings for name in sets for seed in seeds]
    runs = []
    for name, setting, seed in (row.values() for row in rows):
        folder = dump_path / f"{name}-{epochs}" / setting.replace(" ", "_") / str(seed)
        runs.append(run_of_setting(setting, options[name], epochs, seed, folder))
    done = sum(has_result(run) for run in runs)
    print(f"\ncollapse: {len(runs)} runs of {epochs} epochs, {done} of them done before", flush=True)
    print(f"{'set':20s} {'setting':32s} {'seed':>4s} " + " ".join(f"{name:>12s}" for name in COLUMNS), flush=True)
    for row, result in zip(rows, results(runs, jobs, max(1, threads // jobs)), strict=True):
        row |= result
        cells = " ".join(f"{row[key]:12.3g}" for key in COLUMNS.values())
        guard = f"  guard at {row['collapsing_at']:.0%}" if row["collapsing_at"] else ""
        collapsed = "  COLLAPSED" * row["collapsed"]
        print(f"{row['set']:20s} {row['setting']:32s} {row['seed']:4d} {cells}{collapsed}{guard}", flush=True)
    return rows


# Runs


class Run(NamedTuple):
    """A training run and its evaluation. argv: options of train.py but for --dump_path. change: "" for none."""

    argv: list[str]
    seed: int  # of the evaluation
    folder: Path
    change: str = ""


def run_of_setting(setting: str, dataset: str, epochs: int, seed: int, folder: Path, network: str = NETWORK) -> Run:
    """Return the run of one of SETTINGS. dataset: of `dataset_options`."""
    options, change = SETTINGS[setting]
    argv = f"{dataset} {network} {options} --epochs {epochs} --seed {seed}".split()
    return Run(argv, seed, folder, change)


def has_result(run: NamedTuple) -> bool:
    """Whether the run is done."""
    return (run.folder / "result.json").exists()


def results(runs: Sequence[NamedTuple], jobs: int, threads: int, do: Callable | None = None) -> Iterator[dict]:
    """Yield the result of each run, in order. Does those that have none yet, `jobs` at a time.

    do: called with a run and threads in a process of its own; writes result.json to run.folder (default: `do_run`).
    """
    with ThreadPoolExecutor(jobs) as pool:
        running = [None if has_result(run) else pool.submit(_in_process, do or do_run, run, threads) for run in runs]
        for run, future in zip(runs, running, strict=True):
            if future is not None:
                future.result()
            yield json.loads((run.folder / "result.json").read_text())


def _in_process(do: Callable, run: NamedTuple, threads: int) -> None:
    """Call `do` in a process of its own, since it sets threads and replaces parts of train.py."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        process.submit(do, run, threads).result()


def do_run(run: Run, threads: int) -> None:
    """Train, evaluate and write result.json to the run's folder. Keeps no checkpoint."""
    os.environ["OMP_NUM_THREADS"] = str(threads)  # train.py respects it
    torch.set_num_threads(threads)
    shutil.rmtree(run.folder, ignore_errors=True)
    argv = [*run.argv, "--dump_path", str(run.folder)]
    first_steps: list[dict[str, float]] = []
    with redirect_stdout(io.StringIO()):
        if run.change == "2 processes":
            launcher = [sys.executable, *"-m torch.distributed.run --standalone --nproc_per_node=2".split()]
            subprocess.run([*launcher, train.__file__, *argv], check=True, stdout=subprocess.DEVNULL)
        else:
            first_steps = ChangedProgram(run.change).first_steps
            train.main(train.parse_args(argv))
        options = f"--cached --seed {run.seed} --workers 0 --device cpu".split()
        args = eval_linear.parse_args([str(run.folder / "checkpoint.pth"), *options])
        accuracies = eval_linear.main(args)["rows"]
    path = run.folder / "checkpoint.pth"
    result = summarize(run.folder / "metrics.jsonl", accuracies) | {"options": run.argv, "first_steps": first_steps}
    result["all_options"] = load_run(path)["options"]
    path.unlink()
    shutil.rmtree(run.folder / "checkpoints")
    (run.folder / "result.json").write_text(json.dumps(result, default=str))


def summarize(metrics: Path, accuracies: dict[str, dict]) -> dict:
    """Return the figures of a run: the last row of metrics.jsonl, the accuracies, and whether it collapsed."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    measured, epochs = ([row for row in rows if name in row] for name in ("loss_per_ln_k", "epoch_loss"))
    result = measured[-1] | {"loss_per_ln_k": epochs[-1]["epoch_loss"] / epochs[-1]["ln_k"]}
    result["collapsing_at"] = next((row["step"] / result["step"] for row in measured if row["collapsing"]), None)
    features = {
        "knn": "checkpoint",
        "knn_random": "random init, BatchNorm untouched",
        "knn_random_batchnorm": "random init, BatchNorm of the training images",
        "knn_raw": "raw pixels",
    }
    result |= {key: accuracies[name]["knn"]["top1"] for key, name in features.items()}
    trained = accuracies["checkpoint"]
    result |= {"linear": trained["linear"]["top1"], "feature_std": trained["spread"], "accuracies": accuracies}
    result["seconds"] = sum(row["epoch_seconds"] for row in epochs)
    result |= next(({name: row[name] for name in QUALITY} for row in reversed(epochs) if "lidar" in row), {})
    return result | {"collapsed": is_stuck(result), "epochs": epochs}


# What train.py has no option for


class ChangedProgram:
    """train.py with a change, and with a record of the first steps. Takes effect when made, for the whole process.

    change: "head" ends the projection head with BatchNorm, "LARS" is `LARSWithoutBiases`, "" changes nothing.
    first_steps: a row for every tenth of the first 200 steps.
    """

    def __init__(self, change: str) -> None:
        self.change = change
        self.first_steps: list[dict[str, float]] = []
        self.step = 0
        self.original_model, self.original_loss = train.build_model, train.build_loss
        train.build_model, train.build_loss, train.LARS = self.build_model, self.build_loss, self.build_optimizer

    def build_model(self, args: Namespace) -> nn.Module:
        """Build the model of train.py, with the change."""
        self.model = self.original_model(args)
        if self.change == "head":
            self.model.projection_head.append(nn.BatchNorm1d(args.feat_dim, affine=False))
        return self.model

    def build_loss(self, args: Namespace, world_size: int) -> nn.Module:
        """Build the loss of train.py, and keep what each step gives it and gets from it."""
        self.criterion = self.original_loss(args, world_size)
        loss_and_code_logits = self.criterion.loss_and_code_logits

        def record(*inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            loss, code_logits = loss_and_code_logits(*inputs)
            embeddings, scores, _ = inputs
            self.newest = embeddings.detach(), scores.detach(), loss.detach(), code_logits
            return loss, code_logits

        self.criterion.loss_and_code_logits = record
        return self.criterion

    def build_optimizer(self, parameters: Iterable[nn.Parameter], **options: float) -> LARS:
        """Build the optimizer of train.py, with the change, and record the first steps."""
        optimizer = (LARSWithoutBiases if self.change == "LARS" else LARS)(parameters, **options)
        optimizer.register_step_pre_hook(self.record_step)
        return optimizer

    def record_step(self, *_: object) -> None:
        """Add a row to `first_steps` if it is due: losses, codes and gradients just before the weights change."""
        if self.step < RECORDED_STEPS and self.step % RECORD_EVERY == 0:
            weights = {"prototypes": self.model.prototypes.weight, "conv1": self.model.conv1.weight}
            weights["head"] = [p for p in self.model.projection_head.parameters() if p.dim() == 2][-1]
            norms = {f"gradient_{n}": 0.0 if p.grad is None else p.grad.norm().item() for n, p in weights.items()}
            self.first_steps.append({"step": self.step, **self.describe_newest(), **norms})
        self.step += 1

    def describe_newest(self) -> dict[str, float]:
        """Return the figures of the newest step's loss, scores, codes and embeddings."""
        embeddings, scores, loss, code_logits = self.newest
        scores = scores.unflatten(0, (self.criterion.nmb_crops, -1))  # [V, B, K]
        codes = code_logits.softmax(2)  # [A, B, K]
        score_std = means_and_std(scores[list(self.criterion.crops_for_assign)])[1].item()
        return {
            "loss": loss.item(),
            "score_std": score_std,
            "epsilon": self.criterion.epsilon * (score_std if self.criterion.relative_epsilon else 1),
            "code_entropy": -torch.special.xlogy(codes, codes).sum(2).mean().item(),
            "agreeing_codes": (codes[0].argmax(1) == codes[1].argmax(1)).double().mean().item(),
            "mean_cosine": embeddings[: scores.shape[1]].mean(0).square().sum().item(),
        }


class LARSWithoutBiases(LARS):
    """LARS for weights and plain momentum SGD for biases and BatchNorm, as common LARS programs group them."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, **options: float) -> None:
        parameters = list(parameters)
        super().__init__([p for p in parameters if p.dim() > 1], lr, **options)
        self.sgd = torch.optim.SGD([p for p in parameters if p.dim() == 1], lr, momentum=0.9)

    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        """Update all parameters. SGD gets a tenth of the learning rate, since its gradients are not rescaled."""
        self.sgd.param_groups[0]["lr"] = 0.1 * self.param_groups[0]["lr"]
        loss = super().step(closure)
        self.sgd.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of all parameters."""
        super().zero_grad(set_to_none)
        self.sgd.zero_grad(set_to_none)
