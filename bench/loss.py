"""Swapped loss and its gradient for scores [8, B, K], float32, two assigning crops: time and peak memory."""

from collections.abc import Callable, Sequence

import torch

import sinkhorn_ext
from bench import published
from bench.measure import fresh_process, measure, peak_bytes, prepare_for_peaks, report, run_in
from bench.published import EPSILON, ITERATIONS, TEMPERATURE
from bench.sinkhorn import random_scores

CROPS = 8


def run(
    device: torch.device,
    *,
    repetitions: int = 15,
    batch_size: Sequence[int] | None = None,
    nmb_prototypes: Sequence[int] | None = None,
) -> list[dict]:
    """Measure each size and print the table. Return one row per size."""
    print(f"\nloss: swapped loss in float32, V={CROPS}, forward and backward with given potentials, ms")
    print("published: a log_softmax for each pair of crops; batched: one for all crops; fallback: ours in plain torch;")
    print("read+write: floor, a copy of the scores; peak: MB that are needed besides the scores")
    rows = []
    for images in batch_size or [64, 256]:
        for prototypes in nmb_prototypes or [3000]:
            times = measure(loss_candidates(random_scores(CROPS, images, prototypes, device)), repetitions, device)
            ratios = [("published", "ours"), ("batched", "ours"), ("ours", "read+write")]
            row = report({"B": images, "K": prototypes}, times, ratios, header=not rows)
            with fresh_process() as process:
                peaks = run_in(process, loss_peaks, images, prototypes, device)
            row["peak_bytes"] = peaks
            if peaks:
                print("    peak:", ", ".join(f"{name} {peak / 1e6:.1f}" for name, peak in peaks.items()))
            rows.append(row)
    return rows


def loss_candidates(scores: torch.Tensor) -> dict[str, Callable]:
    """Return what computes the gradient for scores [V, B, K]. Checks first that ours equals the one of torch."""
    potentials = sinkhorn_ext.sinkhorn_potentials(scores[:2], EPSILON, ITERATIONS)  # [A, K]
    out, leaf = torch.empty_like(scores), scores.clone().requires_grad_()

    def gradient(loss: Callable) -> torch.Tensor:
        return torch.autograd.grad(loss(leaf, potentials), leaf)[0]

    expected = gradient(published.batched_loss)
    error = ((gradient(sinkhorn_ext.swav_loss) - expected).abs().max() / expected.abs().max()).item()
    assert error < 1e-4, f"our gradient differs by {error} of the largest entry"
    return {
        "published": lambda: gradient(published.loss),
        "batched": lambda: gradient(published.batched_loss),
        "fallback": lambda: fallback_loss(scores, potentials),
        "ours": lambda: gradient(sinkhorn_ext.swav_loss),
        "read+write": lambda: out.copy_(scores),
    }


def fallback_loss(scores: torch.Tensor, potentials: torch.Tensor) -> torch.Tensor:
    """Compute the gradient by our implementation in plain torch, compiled kernels or not."""
    settings = ([0, 1], TEMPERATURE, EPSILON)
    loss, logsumexps = sinkhorn_ext._swapped_loss.in_torch(scores, None, potentials, *settings)
    grad = torch.ones_like(loss)
    return sinkhorn_ext._swapped_loss_backward.in_torch(grad, scores, None, potentials, logsumexps, *settings)


def loss_peaks(batch_size: int, nmb_prototypes: int, device: torch.device) -> dict[str, int] | None:
    """Measure the peak memory of each candidate in bytes, and of the scores. None if the system does not report it.

    Call it in a fresh process: earlier allocations hide a peak.
    """
    if not prepare_for_peaks(device):
        return None
    scores = random_scores(CROPS, batch_size, nmb_prototypes, device)
    candidates = loss_candidates(scores)
    del candidates["read+write"]
    return {name: peak_bytes(call, device) for name, call in candidates.items()} | {"scores": scores.nbytes}
