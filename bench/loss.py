"""Swapped loss and its gradient for scores [8, B, K], float32, two assigning crops: time and peak memory."""

from collections.abc import Callable, Sequence
from functools import partial

import torch

import sinkhorn_ext
from bench import published
from bench.measure import Times, fresh_process, measure, peak_bytes, prepare_for_peaks, report, run_in
from bench.published import EPSILON, ITERATIONS, TEMPERATURE
from bench.sinkhorn import fallback, random_scores
from loss import SwAVLoss

CROPS = 8
RELATIVE_EPSILON = 0.3  # in units of the scores' spread: what derived defaults take


def run(
    device: torch.device,
    *,
    repetitions: int = 15,
    batch_size: Sequence[int] | None = None,
    nmb_prototypes: Sequence[int] | None = None,
) -> list[dict]:
    """Measure each size and print both tables. Return one row per size, with that of the second table in "relative"."""
    print(f"\nloss: swapped loss in float32, V={CROPS}, forward and backward with given potentials, ms")
    print("published: a log_softmax for each pair of crops; compiled: the same with torch.compile;")
    print("batched: one for all crops; fallback: ours without kernels; read+write: floor, a copy of the scores;")
    print("peak: MB that are needed besides the scores")
    rows = []
    for images in batch_size or [64, 256]:
        for prototypes in nmb_prototypes or [3000]:
            scores = random_scores(CROPS, images, prototypes, device)
            times = measure(compiled_loss(scores) | loss_candidates(scores), repetitions, device)
            row = report({"B": images, "K": prototypes}, times, ratios(times), header=not rows)
            with fresh_process() as process:
                peaks = run_in(process, loss_peaks, images, prototypes, device)
            row["peak_bytes"] = peaks
            if peaks:
                print("    peak:", ", ".join(f"{name} {peak / 1e6:.1f}" for name, peak in peaks.items()))
            rows.append(row)
    print(f"\nloss with codes: the same with potentials, epsilon {RELATIVE_EPSILON} in units of the scores' spread, ms")
    for row in rows:
        scores = random_scores(CROPS, row["B"], row["K"], device)
        times = measure(relative_candidates(scores), repetitions, device)
        sizes = {"B": row["B"], "K": row["K"]}
        row["relative"] = report(sizes, times, ratios(times), header=row is rows[0])
    return rows


def ratios(times: Times) -> list[tuple[str, str]]:
    """Return the pairs of candidates to divide, of those that were timed."""
    peers = [(peer, "ours") for peer in ("published", "compiled", "batched") if peer in times]
    return [*peers, ("ours", "read+write")]


def gradient(loss: Callable, scores: torch.Tensor, *arguments: object) -> torch.Tensor:
    """Compute the gradient of loss(scores, *arguments) for scores [V, B, K]."""
    leaf = scores.detach().requires_grad_()
    return torch.autograd.grad(loss(leaf, *arguments), leaf)[0]


def check_gradient(ours: torch.Tensor, expected: torch.Tensor) -> None:
    """Check that two gradients are equal within the rounding of float32."""
    error = ((ours - expected).abs().max() / expected.abs().max()).item()
    assert error < 1e-4, f"our gradient differs by {error} of the largest entry"


def loss_candidates(scores: torch.Tensor) -> dict[str, Callable]:
    """Return what computes the gradient for scores [V, B, K]. Checks first that ours equals the one of torch."""
    potentials = sinkhorn_ext.sinkhorn_potentials(scores[:2], EPSILON, ITERATIONS)  # [A, K]
    out = torch.empty_like(scores)
    candidates = {
        "published": partial(gradient, published.loss, scores, potentials),
        "batched": partial(gradient, published.batched_loss, scores, potentials),
        **fallback(scores, partial(fallback_loss, scores, potentials)),
        "ours": partial(gradient, sinkhorn_ext.swav_loss, scores, potentials),
        "read+write": partial(out.copy_, scores),
    }
    check_gradient(candidates["ours"](), candidates["batched"]())
    return candidates


def compiled_loss(scores: torch.Tensor) -> dict[str, Callable]:
    """Return the candidate "compiled" beside those of `loss_candidates`."""
    potentials = sinkhorn_ext.sinkhorn_potentials(scores[:2], EPSILON, ITERATIONS)
    return published.compiled(published.loss, lambda form: gradient(form, scores, potentials))


def relative_candidates(scores: torch.Tensor) -> dict[str, Callable]:
    """Return what computes codes, loss and gradient for scores [V, B, K], as derived defaults do. Checks ours first."""
    criterion = SwAVLoss(len(scores), epsilon=RELATIVE_EPSILON, relative_epsilon=True, feat_dim=1)
    no_queue = [scores.new_empty(count, 1) for count in (scores.shape[0] * scores.shape[1], scores.shape[2])]

    def ours(leaf: torch.Tensor) -> torch.Tensor:
        return criterion(no_queue[0], leaf.flatten(0, 1), no_queue[1])

    theirs = partial(published.relative_loss, epsilon=RELATIVE_EPSILON)
    out = torch.empty_like(scores)
    check_gradient(gradient(ours, scores), gradient(theirs, scores))
    return {
        "published": partial(gradient, theirs, scores),
        **published.compiled(theirs, lambda form: gradient(form, scores)),
        "ours": partial(gradient, ours, scores),
        "read+write": partial(out.copy_, scores),
    }


def fallback_loss(scores: torch.Tensor, potentials: torch.Tensor) -> torch.Tensor:
    """Compute the gradient by our implementation in torch, with compiled kernels or not."""
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
