"""Memory and step time of a long run of train.py: does memory grow, and do checkpoints slow down steps?

Runs of a small network on the CPU, as bench/soak.py starts them. Memory: of the training process and, together, of all
that it started (loader workers), from /proc. Step time, in turns: a checkpoint every 0.12 s, every 1.5 s, and none. The
default of train.py is one in 15 minutes.
"""

import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from bench import soak
from bench.measure import Times, fresh_process, report, run_in, setup_process

MEMORY_STEPS, STEP_TIME_STEPS = 2000, 200
WARM_UP = 0.1  # share of the steps that come before the measurement: buffers and caches grow to their size
WIDER = "--width 32"
CHECKPOINTS = {  # name of a candidate: options
    "every 0.12 s": soak.OFTEN,
    "every 1.5 s": "--checkpoint_minutes 0.025 --checkpoint_freq 1000000",
    "none": "--checkpoint_minutes 1e6 --checkpoint_freq 1000000",
}


def run(device: torch.device, *, repetitions: int = 15, steps: int | None = None) -> dict:
    """Measure both and print them. Return the figures.

    device: not used, as the runs are on the CPU. steps: of the memory's run.
    """
    folder = Path("runs/steady")
    shutil.rmtree(folder, ignore_errors=True)
    soak.write_images(folder / "images")
    words = f"{soak.NETWORK} {WIDER} --data_path {folder / 'images'} --seed 1"
    print(f"\nsteady: memory in MiB over {steps or MEMORY_STEPS} steps, one loader worker, {soak.OFTEN}", flush=True)
    with fresh_process() as process:
        samples = run_in(process, memory_of_run, folder, f"{words} {soak.OFTEN} --workers 1", steps or MEMORY_STEPS)
    growth = {name: summarize_memory(samples, name) for name in ("main_pss", "main_rss", "others_pss")}
    for name, figures in growth.items():
        print(f"  {name:12} {figures['before']:9.1f} -> {figures['after']:9.1f}  {figures['growth']:+.1%}", flush=True)
    print(f"steady: mean of {STEP_TIME_STEPS} steps, ms", flush=True)
    with fresh_process() as process:
        times = run_in(process, step_times, folder, words, repetitions)
    ratios = [(name, "none") for name in CHECKPOINTS if name != "none"]
    row = report({"B": soak.GLOBAL_BATCH}, times, ratios, header=True)
    return {"memory": growth, "step": row}


def epochs_of(steps: int) -> int:
    return -(-steps // soak.STEPS_PER_EPOCH)


def memory_of_run(folder: Path, words: str, steps: int) -> list[dict[str, float]]:
    """Sample the memory of a run: rows of the steps done and, in MiB, main_pss, main_rss and others_pss."""
    setup_process(1, torch.device("cpu"), reuse_memory=False)
    start = soak.Start(f"{words} --epochs {epochs_of(steps)}", 1, folder / "memory", 0)
    main, samples = start.ranks[0].pid, []
    try:
        while not start.is_over():
            done = start.read_steps()
            row = {"step": done[-1] if done else 0} | memory_of(main)
            if done and row["main_pss"]:
                samples.append(row)
            time.sleep(0.2)
        soak.finish(start)
    finally:
        start.end(0)
    return samples


def memory_of(process: int) -> dict[str, float]:
    """Memory in MiB of a process and, together, of all that it started; zeros for processes that have ended."""
    own, others = memory_fields(process), [memory_fields(child) for child in descendants(process)]
    return {"main_pss": own["Pss"], "main_rss": own["Rss"], "others_pss": sum(fields["Pss"] for fields in others)}


def memory_fields(process: int) -> dict[str, float]:
    fields = {"Pss": 0.0, "Rss": 0.0}
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has just ended
        return fields
    return fields | {
        name: int(line.split()[1]) / 1024 for line in lines for name in fields if line.startswith(name + ":")
    }


def descendants(process: int) -> list[int]:
    """The processes that a process started, and those that they started."""
    try:
        children = [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:
        return []
    return children + [pid for child in children for pid in descendants(child)]


def summarize_memory(samples: list[dict[str, float]], name: str) -> dict[str, float]:
    """Medians of the first and the last fifth of the samples after the warm-up, and the growth between them."""
    last = samples[-1]["step"]
    values = [row[name] for row in samples if row["step"] >= WARM_UP * last]
    part = max(1, len(values) // 5)
    before, after = statistics.median(values[:part]), statistics.median(values[-part:])
    return {"before": before, "after": after, "growth": after / before - 1 if before else 0.0}


def step_times(folder: Path, words: str, repetitions: int) -> Times:
    """Mean seconds of a step in runs with CHECKPOINTS, in turns; one value per run."""
    setup_process(1, torch.device("cpu"), reuse_memory=False)
    times: dict[str, list[float]] = {name: [] for name in CHECKPOINTS}
    for _ in range(repetitions):
        for name, more in CHECKPOINTS.items():
            shutil.rmtree(folder / name, ignore_errors=True)
            start = soak.Start(f"{words} {more} --epochs {epochs_of(STEP_TIME_STEPS)}", 1, folder / name, 0)
            try:
                soak.finish(start)
            finally:
                start.end(0)
            times[name].append(mean_step(folder / name))
    return times


def mean_step(dump: Path) -> float:
    """Mean seconds of the steps after the warm-up, of a run with a log line for each step."""
    rows: list[dict[str, Any]] = [row for row in soak.read_rows(dump, timings=True) if "images_per_s" in row]
    return statistics.fmean(soak.GLOBAL_BATCH / row["images_per_s"] for row in rows[int(WARM_UP * len(rows)) :])
