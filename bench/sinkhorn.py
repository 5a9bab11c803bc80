"""Codes [B, K] of scores [B, K], float32, three rounds: ours, the published matrix form, also compiled, and floors."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

import sinkhorn_ext
from bench import published
from bench.measure import measure, report
from bench.published import EPSILON, ITERATIONS


def run(
    device: torch.device,
    *,
    repetitions: int = 15,
    batch_size: Sequence[int] | None = None,
    nmb_prototypes: Sequence[int] | None = None,
) -> list[dict]:
    """Measure each size and print the table. Return one row per size."""
    print(f"\nsinkhorn: codes of scores in float32, {ITERATIONS} rounds, ms")
    print("published: the matrix form; compiled: the same with torch.compile; fallback: ours without kernels;")
    print("ours: into a reused out=; new: into new memory; read+write, exp: floors, one pass over the scores each")
    rows = []
    for images in batch_size or [64, 256, 1024, 4096]:
        for prototypes in nmb_prototypes or [300, 3000, 10_000]:
            candidates = sinkhorn_candidates(random_scores(1, images, prototypes, device)[0])
            times = measure(candidates, repetitions, device)
            ratios = [(peer, "ours") for peer in ("published", "compiled") if peer in times] + [("ours", "exp")]
            rows.append(report({"B": images, "K": prototypes}, times, ratios, header=not rows))
    return rows


def random_scores(crops: int, batch_size: int, nmb_prototypes: int, device: torch.device) -> torch.Tensor:
    """Draw scores [V, B, K] like those of training: cosines of random vectors with 128 dimensions."""
    generator = torch.Generator().manual_seed(0)
    embeddings = F.normalize(torch.randn(crops, batch_size, 128, generator=generator), dim=2)
    prototypes = F.normalize(torch.randn(nmb_prototypes, 128, generator=generator), dim=1)
    return (embeddings @ prototypes.T).to(device)


def sinkhorn_candidates(scores: torch.Tensor) -> dict[str, Callable]:
    """Return what computes the codes of scores [B, K]. Checks first that ours and the published codes are equal."""
    out = sinkhorn_ext.sinkhorn(scores, EPSILON, ITERATIONS)
    error = (published.sinkhorn(scores) - out).abs().max().item()
    assert error < 1e-5, f"our codes differ from the published ones by {error}"
    return {
        "published": lambda: published.sinkhorn(scores),
        **published.compiled(published.sinkhorn, lambda form: form(scores)),
        **fallback(scores, lambda: fallback_sinkhorn(scores, out)),
        "ours": lambda: sinkhorn_ext.sinkhorn(scores, EPSILON, ITERATIONS, out=out),
        "new": lambda: sinkhorn_ext.sinkhorn(scores, EPSILON, ITERATIONS),
        "read+write": lambda: out.copy_(scores),
        "exp": lambda: torch.exp(scores, out=out),
    }


def fallback(scores: torch.Tensor, form: Callable) -> dict[str, Callable]:
    """Return the candidate "fallback", but not beside CUDA kernels, where torch.compile takes seconds for each size."""
    return {} if sinkhorn_ext.backend(scores.device) == "cuda" else {"fallback": form}


def fallback_sinkhorn(scores: torch.Tensor, out: torch.Tensor) -> None:
    """Compute codes into out [B, K] by our implementation in torch, with compiled kernels or not."""
    sinkhorn_ext._sinkhorn.in_torch(scores, None, EPSILON, ITERATIONS, out)
