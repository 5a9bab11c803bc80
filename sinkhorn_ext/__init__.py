"""Sinkhorn-Knopp codes and the swapped-prediction loss (SwAV, Caron et al. 2020, sections 3.1-3.2 and appendix A.1).

    from sinkhorn_ext import sinkhorn
    codes = sinkhorn(scores, epsilon=0.05, iterations=3)    # scores [B, K] -> codes [B, K], rows sum to 1

The matrix form alternates between scaling the columns (prototypes) and the rows (images) of exp(scores / epsilon).
Row scales never have to be stored, and K, B and the overall total cancel, so all that the iterations carry is one
number per prototype, its *potential* g: codes = softmax(scores / epsilon + g). It is kept as a logarithm, which makes
any finite scores and any epsilon safe. Across processes only these K numbers travel, once an iteration.

Copy this folder to use it elsewhere: it needs torch alone.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist

__all__ = ["backend", "sinkhorn", "sinkhorn_potentials", "swav_loss"]


def sinkhorn(
    scores: torch.Tensor,
    epsilon: float = 0.05,
    iterations: int = 3,
    *,
    extra: torch.Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Codes of a batch: soft assignments to prototypes that are balanced over all images (section 3.1, eq. 3-5).

    scores [B, K]: float32, bfloat16, float16 or float64, any stride, any range; never modified, no gradient flows.
    epsilon: entropy weight, > 0. iterations: rounds of scaling prototypes, then images, >= 1.
    extra [Q, K]: scores of further images of this process (the queue's), balanced together with the batch, no codes.
    group: the processes whose images are balanced together; None: the default group if one is initialised.
    out [B, K]: receives the codes, if given.
    Returns codes [B, K], float32 (float64 for float64 scores); each row sums to 1.
    Raises ValueError for wrong shapes or values.
    """
    _check_scores("scores", scores, 2)
    if extra is not None:
        _check_scores("extra", extra, 2)
        extra = extra.unsqueeze(0)
    potentials = sinkhorn_potentials(scores.unsqueeze(0), epsilon, iterations, extra=extra, group=group)
    codes = torch.softmax(_accumulation(scores.detach()) / epsilon + potentials, dim=1)  # [B, K]
    if out is None:
        return codes
    if out.shape != codes.shape or out.dtype != codes.dtype:
        raise ValueError(
            f"out: expected shape {tuple(codes.shape)} and {codes.dtype}, got shape {tuple(out.shape)} and {out.dtype}"
        )
    return out.copy_(codes)


@torch.no_grad()
def sinkhorn_potentials(
    scores: torch.Tensor,
    epsilon: float = 0.05,
    iterations: int = 3,
    *,
    extra: torch.Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Log-scales g of the prototypes, from which codes = softmax(scores / epsilon + g), for A problems at once.

    scores [A, B, K], extra [A, Q, K]: as in `sinkhorn`, one independent problem for each of the A assigning crops.
    A process may hold any number of images, none included. Returns [A, K], float32 (float64 for float64 scores),
    the same on every process of the group. Raises ValueError for wrong shapes or values.
    """
    _check_scores("scores", scores, 3)
    _check_positive("epsilon", epsilon)
    if iterations < 1:
        raise ValueError(f"iterations: expected 1 or more, got {iterations}")
    if extra is not None:
        _check_scores("extra", extra, 3)
        if extra.shape[::2] != scores.shape[::2]:
            raise ValueError(
                f"extra: expected [{scores.shape[0]}, any, {scores.shape[2]}] as in scores, got {list(extra.shape)}"
            )
        scores = torch.cat([_accumulation(scores), _accumulation(extra)], dim=1)
    logits = _accumulation(scores) / epsilon  # [A, N, K]

    # Each process's own maximum is inside its logsumexp, so combining the K numbers of all processes is exact.
    potentials = -_logsumexp_over_processes(torch.logsumexp(logits, dim=1), group)  # [A, K]
    for _ in range(iterations - 1):
        totals = torch.softmax(logits + potentials.unsqueeze(1), dim=2).sum(dim=1)  # [A, K]
        if _has_peers(group):
            dist.all_reduce(totals, group=group)
        potentials = potentials - totals.log()
    return potentials


def swav_loss(
    scores: torch.Tensor,
    potentials: torch.Tensor,
    *,
    crops_for_assign: Sequence[int] = (0, 1),
    temperature: float = 0.1,
    epsilon: float = 0.05,
) -> torch.Tensor:
    """Swapped prediction (section 3.1, eq. 1-2, over multi-crop as in section 3.2): every crop predicts others' codes.

    scores [V, B, K] of all crops, with gradient; potentials [A, K] of the assigning crops, from `sinkhorn_potentials`.
    Returns a scalar: the mean over assigning crops i, over the other crops v != i and over images of
    -sum_k codes_i[k] log softmax(scores_v / temperature)[k]. No gradient flows through the codes.
    """
    _check_scores("scores", scores, 3)
    nmb_crops, batch_size, _ = scores.shape
    if potentials.shape != (len(crops_for_assign), scores.shape[2]):
        raise ValueError(
            f"potentials: expected [{len(crops_for_assign)}, {scores.shape[2]}], got {list(potentials.shape)}"
        )
    if nmb_crops < 2 or batch_size < 1:
        raise ValueError(f"scores: expected two crops of one image or more, got {list(scores.shape)}")
    if not crops_for_assign or not all(0 <= crop < nmb_crops for crop in crops_for_assign):
        raise ValueError(f"crops_for_assign: expected crops of 0..{nmb_crops - 1}, got {list(crops_for_assign)}")
    _check_positive("temperature", temperature)
    _check_positive("epsilon", epsilon)
    scores = _accumulation(scores)
    log_predictions = torch.log_softmax(scores / temperature, dim=2)  # [V, B, K]
    summed_over_crops = log_predictions.sum(dim=0)  # [B, K]
    agreement = scores.new_zeros(())
    for crop, potential in zip(crops_for_assign, potentials, strict=True):
        codes = torch.softmax(scores[crop].detach() / epsilon + potential.detach(), dim=1)  # [B, K]
        agreement = agreement + (codes * (summed_over_crops - log_predictions[crop])).sum()
    return -agreement / (len(crops_for_assign) * (nmb_crops - 1) * batch_size)


def backend(device: torch.device | str) -> str:
    """Which implementation serves tensors of this device. Plain torch operations serve every device."""
    torch.device(device)
    return "torch"


def _accumulation(scores: torch.Tensor) -> torch.Tensor:
    return scores if scores.dtype == torch.float64 else scores.float()


def _has_peers(group: dist.ProcessGroup | None) -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


def _logsumexp_over_processes(values: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    if not _has_peers(group):
        return values
    gathered = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, values, group=group)
    return torch.logsumexp(torch.stack(gathered), dim=0)


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name}: expected a number > 0, got {value}")


def _check_scores(name: str, scores: torch.Tensor, dimensions: int) -> None:
    expected = "[B, K]" if dimensions == 2 else "[crops, B, K]"
    if scores.dim() != dimensions or not scores.is_floating_point():
        raise ValueError(
            f"{name}: expected a floating-point tensor {expected}, got {scores.dtype} {list(scores.shape)}"
        )
    if scores.shape[-1] < 1:
        raise ValueError(f"{name}: expected at least one prototype, got {list(scores.shape)}")
