"""Every speed that we claim, measured against a peer and a floor in the same run.

    python bench.py sinkhorn            # codes of a batch, B x K
    python bench.py loss                # swapped loss, forward and backward, with peak memory
    python bench.py sinkhorn loss --device cuda

Prints tables and writes all figures to --json. Candidates take turns, so that what else the machine does hits all
alike. A figure is the median over --repetitions in ms, with half the distance of the quartiles in percent of it.
Leave the machine alone meanwhile.
"""

import argparse
import ctypes
import json
import multiprocessing
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

import sinkhorn_ext
from sinkhorn_ext import backend, sinkhorn, sinkhorn_potentials, swav_loss

EPSILON, ITERATIONS, TEMPERATURE = 0.05, 3, 0.1
Times = dict[str, list[float]]  # seconds per call of each candidate


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("what", nargs="+", choices=BENCHMARKS, metavar="what", help=" or ".join(BENCHMARKS))
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--repetitions", type=int, default=15, help="of each candidate (default: 15)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="on a CPU (default: all cores)")
    parser.add_argument("--batch_size", type=int, nargs="+", help="B (default: the published grid)")
    parser.add_argument("--nmb_prototypes", type=int, nargs="+", help="K (default: the published grid)")
    parser.add_argument("--json", type=Path, default=Path("runs/bench.json"), help="file for all figures")
    args = parser.parse_args(argv)
    for name, numbers in vars(args).items():
        if name in ("repetitions", "threads", "batch_size", "nmb_prototypes") and numbers is not None:
            if min(numbers if isinstance(numbers, list) else [numbers]) < 1:
                parser.error(f"--{name}: expected 1 or more, got {numbers}")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {args.device}: expected a device that is here ({str(error).splitlines()[0]})")
    return args


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    machine = describe(device)
    print(", ".join(f"{name} {value}" for name, value in machine.items()), flush=True)
    results = {name: BENCHMARKS[name](args, device) for name in args.what}
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps({"machine": machine, **results}, indent=1))
    print(f"all figures: {args.json}")


def describe(device: torch.device) -> dict[str, str | int]:
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line.split(": ", 1)[1] for line in Path("/proc/cpuinfo").open() if line.startswith("model name")]
        processor = names[0].strip() if names else processor
    machine = {"processor": processor, "threads": torch.get_num_threads(), "torch": torch.__version__}
    if device.type == "cuda":
        machine["GPU"] = torch.cuda.get_device_name(device)
    return machine | {"sinkhorn_ext": backend(device)}


def bench_sinkhorn(args: argparse.Namespace, device: torch.device) -> list[dict]:
    """Codes [B, K] of scores [B, K], float32, three rounds."""
    print(
        f"\nsinkhorn, float32, {ITERATIONS} rounds. ours: into a reused out=; new: into new memory; the rest are floors"
    )
    rows = []
    for batch_size in args.batch_size or [64, 256, 1024, 4096]:
        for nmb_prototypes in args.nmb_prototypes or [300, 3000, 10_000]:
            candidates = sinkhorn_candidates(cosines(1, batch_size, nmb_prototypes, device)[0])
            times = measure(candidates, args.repetitions, device)
            ratios = [("published", "ours"), ("published", "new"), ("ours", "read+exp+write")]
            rows.append(report({"B": batch_size, "K": nmb_prototypes}, times, ratios, is_first=not rows))
    return rows


def bench_loss(args: argparse.Namespace, device: torch.device) -> list[dict]:
    """Swapped loss and its gradient for scores [8, B, K], float32, two assigning crops."""
    print("\nswapped loss, float32, V=8, forward and backward, potentials given")
    print("published: a log_softmax for each pair of crops; batched: one for all crops; peak: MB beside the scores")
    rows = []
    for batch_size in args.batch_size or [64, 256]:
        for nmb_prototypes in args.nmb_prototypes or [3000]:
            times = measure(loss_candidates(cosines(8, batch_size, nmb_prototypes, device)), args.repetitions, device)
            ratios = [("published", "ours"), ("batched", "ours"), ("ours", "read+write")]
            row = report({"B": batch_size, "K": nmb_prototypes}, times, ratios, is_first=not rows)
            with multiprocessing.get_context("spawn").Pool(1) as fresh_process:
                peaks = fresh_process.apply(loss_peaks, (batch_size, nmb_prototypes, device))
            row["peak_bytes"] = peaks
            if peaks:
                print("    peak:", ", ".join(f"{name} {peak / 1e6:.1f}" for name, peak in peaks.items()))
            rows.append(row)
    return rows


BENCHMARKS = {"sinkhorn": bench_sinkhorn, "loss": bench_loss}


# The peers


def published_sinkhorn(scores: torch.Tensor) -> torch.Tensor:
    """The matrix form, prototypes first, as the published program orders it (appendix A.1): 39 walks over B x K."""
    q = torch.exp(scores / EPSILON).t()  # [K, B]
    nmb_prototypes, batch_size = q.shape
    q /= q.sum()
    for _ in range(ITERATIONS):
        q /= q.sum(dim=1, keepdim=True)
        q /= nmb_prototypes
        q /= q.sum(dim=0, keepdim=True)
        q /= batch_size
    q *= batch_size
    return q.t()


def fallback_sinkhorn(scores: torch.Tensor, out: torch.Tensor) -> None:
    potentials = sinkhorn_ext._potentials.in_torch(scores.unsqueeze(0), None, EPSILON, ITERATIONS)
    sinkhorn_ext._codes.in_torch(scores, potentials[0], EPSILON, out)


def published_loss(scores: torch.Tensor, potentials: torch.Tensor) -> torch.Tensor:
    loss = 0
    for i, potential in enumerate(potentials):
        codes = torch.softmax(scores[i].detach() / EPSILON + potential, dim=1)
        others = [v for v in range(len(scores)) if v != i]
        pairs = [-(codes * F.log_softmax(scores[v] / TEMPERATURE, dim=1)).sum(dim=1).mean() for v in others]
        loss = loss + sum(pairs) / len(others)
    return loss / len(potentials)


def batched_loss(scores: torch.Tensor, potentials: torch.Tensor) -> torch.Tensor:
    log_predictions = F.log_softmax(scores / TEMPERATURE, dim=2)  # [V, B, K]
    all_crops = log_predictions.sum(dim=0)
    loss = 0
    for i, potential in enumerate(potentials):
        codes = torch.softmax(scores[i].detach() / EPSILON + potential, dim=1)
        loss = loss - (codes * (all_crops - log_predictions[i])).sum()
    return loss / (len(potentials) * (len(scores) - 1) * scores.shape[1])


def fallback_loss(scores: torch.Tensor, potentials: torch.Tensor) -> torch.Tensor:
    settings = ([0, 1], TEMPERATURE, EPSILON)
    loss, logsumexps = sinkhorn_ext._swapped_loss.in_torch(scores, potentials, *settings)
    grad = torch.ones_like(loss)
    return sinkhorn_ext._swapped_loss_backward.in_torch(grad, scores, potentials, logsumexps, *settings)


def sinkhorn_candidates(scores: torch.Tensor) -> dict[str, Callable]:
    out = sinkhorn(scores, EPSILON, ITERATIONS)
    error = (published_sinkhorn(scores) - out).abs().max().item()
    assert error < 1e-5, f"our codes are off by {error}"
    return {
        "published": lambda: published_sinkhorn(scores),
        "fallback": lambda: fallback_sinkhorn(scores, out),
        "ours": lambda: sinkhorn(scores, EPSILON, ITERATIONS, out=out),
        "new": lambda: sinkhorn(scores, EPSILON, ITERATIONS),
        "read": lambda: scores.sum(),
        "read+write": lambda: out.copy_(scores),
        "read+exp+write": lambda: torch.exp(scores, out=out),
    }


def loss_candidates(scores: torch.Tensor) -> dict[str, Callable]:
    potentials = sinkhorn_potentials(scores[:2], EPSILON, ITERATIONS)  # [A, K]
    out, leaf = torch.empty_like(scores), scores.clone().requires_grad_()

    def gradient(loss: Callable) -> torch.Tensor:
        return torch.autograd.grad(loss(leaf, potentials), leaf)[0]

    expected = gradient(batched_loss)
    error = ((gradient(swav_loss) - expected).abs().max() / expected.abs().max()).item()
    assert error < 1e-4, f"our gradient is off by {error}"
    return {
        "published": lambda: gradient(published_loss),
        "batched": lambda: gradient(batched_loss),
        "fallback": lambda: fallback_loss(scores, potentials),
        "ours": lambda: gradient(swav_loss),
        "read+write": lambda: out.copy_(scores),
    }


# Measuring


def cosines(crops: int, batch_size: int, nmb_prototypes: int, device: torch.device) -> torch.Tensor:
    """Scores [V, B, K] like those of training: products of unit vectors of 128 dimensions."""
    generator = torch.Generator().manual_seed(0)
    embeddings = F.normalize(torch.randn(crops, batch_size, 128, generator=generator), dim=2)
    prototypes = F.normalize(torch.randn(nmb_prototypes, 128, generator=generator), dim=1)
    return (embeddings @ prototypes.T).to(device)


def measure(candidates: dict[str, Callable], repetitions: int, device: torch.device) -> Times:
    """Seconds per call. Candidates take turns; a short one is called several times in its turn, for 20 ms or more."""

    def turn(call: Callable, calls: int) -> float:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        synchronize(device)
        return (time.perf_counter() - start) / calls

    calls = {name: 1 + int(20e-3 / min(turn(call, 1) for _ in range(3))) for name, call in candidates.items()}
    times = {name: [] for name in candidates}
    for _ in range(repetitions):
        for name, call in candidates.items():
            times[name].append(turn(call, calls[name]))
    return times


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def loss_peaks(batch_size: int, nmb_prototypes: int, device: torch.device) -> dict[str, int] | None:
    """Bytes that each candidate needs at a time beside what was there before, in a process that has done nothing else.

    None where nothing tells.
    """
    if device.type == "cpu":
        if sys.platform != "linux":
            return None
        ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: what is freed goes back to the system at once
    scores = cosines(8, batch_size, nmb_prototypes, device)
    candidates = loss_candidates(scores)
    del candidates["read+write"]
    return {name: peak_bytes(call, device) for name, call in candidates.items()} | {"scores": scores.nbytes}


def peak_bytes(call: Callable, device: torch.device) -> int:
    call()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before

    def resident(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


def report(sizes: dict[str, int], times: Times, ratios: list[tuple[str, str]], is_first: bool) -> dict:
    """Prints a row of the table, with the ratios of medians (slower, faster); returns all of it."""
    medians = {name: statistics.median(values) * 1e3 for name, values in times.items()}
    quartiles = {name: [q * 1e3 for q in statistics.quantiles(values, n=4)] for name, values in times.items()}
    speedups = {f"{slow}/{fast}": medians[slow] / medians[fast] for slow, fast in ratios}
    if is_first:
        names = [f"{name:>15}" for name in medians] + [f"{name:>{len(name) + 1}}" for name in speedups]
        print(*[f"{name:>5}" for name in sizes], *names)
    cells = [f"{size:>5}" for size in sizes.values()]
    for name, (low, middle, high) in quartiles.items():
        cells.append(f"{medians[name]:9.3f} \u00b1{(high - low) / 2 / middle:4.0%}")
    cells += [f"{ratio:{len(name) + 1}.2f}" for name, ratio in speedups.items()]
    print(*cells, flush=True)
    return {**sizes, "median_ms": medians, "quartiles_ms": quartiles, "ratios": speedups}


if __name__ == "__main__":
    main(parse_args())
