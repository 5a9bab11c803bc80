"""Compute Sinkhorn-Knopp codes and the swapped-prediction loss of SwAV (Caron et al. 2020, sections 3.1-3.2, A.1).

    from sinkhorn_ext import sinkhorn
    codes = sinkhorn(scores, epsilon=0.05, iterations=3)    # scores [B, K] -> codes [B, K], rows sum to 1

The matrix form alternates between scaling the columns (prototypes) and the rows (images) of exp(scores / epsilon).
Row scales never have to be stored, and K, B and the overall total cancel. So the iterations carry only one number per
prototype, its *potential* g: codes = softmax(scores / epsilon + g). It is stored as a logarithm, so every epsilon is
safe, and so are scores up to 1e6 * epsilon (in larger ones, float32 hardly resolves a difference of epsilon).
Processes exchange only these K numbers, once per iteration.

A score of -inf excludes this prototype for this image. A prototype whose scores are all -inf takes no part, and its
codes are 0. An image whose scores are all -inf takes no part either: its codes are 0, but its loss is NaN. One NaN
score makes every result NaN.

Copy this folder to use it elsewhere. It needs only torch, and runs on every device. With setup.py next to the folder,
`pip install --no-build-isolation .` compiles faster kernels for the operators below. On GPUs without them,
torch.compile fuses the plain torch, which takes seconds at the first call. `python -m sinkhorn_ext` prints what runs
and how it was built; put its output into a bug report.
"""

import importlib
import importlib.machinery
import importlib.util
import os
import re
import warnings
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.autograd.graph import increment_version

from . import fused

__all__ = ["backend", "moments", "sinkhorn", "sinkhorn_potentials", "swav_loss"]


def sinkhorn(
    scores: torch.Tensor,
    epsilon: float = 0.05,
    iterations: int = 3,
    *,
    extra: torch.Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute the codes of a batch: soft assignments to prototypes, balanced over all images (section 3.1, eq. 3-5).

    scores [B, K]: float32, bfloat16, float16 or float64; any stride; up to 1e6 * epsilon. Never modified.
    epsilon: weight of the entropy, > 0. iterations: rounds of scaling prototypes, then images, >= 1.
    extra [Q, K]: scores of more images of this process (those of the queue). They take part in the balance but get no
    codes.
    group: the processes whose images are balanced together. None: the default group, if one is initialised.
    out [B, K]: if given, receives the codes. It must not share memory with scores.
    Returns codes [B, K], float32 (float64 for float64 scores), without gradient. Each row sums to 1.
    Raises ValueError for wrong shapes or values.
    """
    _check_scores("scores", scores, 2)
    dtype = _accumulation_dtype(scores)
    if out is not None:
        _expect(out.shape == scores.shape and out.dtype == dtype, "out", out, dtype, scores.shape)
        _expect(not out.requires_grad, "out", "one with gradient", "a tensor without gradient")
    scores, extra = _check_problem(scores, epsilon, iterations, extra)
    has_contiguous_rows = out is not None and (out.stride(1) == 1 or out.shape[1] == 1)
    codes = out if has_contiguous_rows else torch.empty(scores.shape, dtype=dtype, device=scores.device)
    if _has_peers(group):
        extra = None if extra is None else extra.unsqueeze(0)
        potentials = sinkhorn_potentials(scores.unsqueeze(0), epsilon, iterations, extra=extra, group=group)
        _without_autograd(_codes, scores, potentials[0], epsilon, codes)
    else:
        _without_autograd(_sinkhorn, scores, extra, epsilon, iterations, codes)
    if out is not None and not torch.compiler.is_compiling():
        increment_version(codes)  # so that backward refuses codes that it saved and that were overwritten since
    return codes if out is None or has_contiguous_rows else out.copy_(codes)


def sinkhorn_potentials(
    scores: torch.Tensor,
    epsilon: float = 0.05,
    iterations: int = 3,
    *,
    extra: torch.Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Compute the potentials g of the prototypes for A problems; codes = softmax(scores / epsilon + g) (eq. 3-5).

    scores [A, B, K], extra [A, Q, K]: as in `sinkhorn`, with one independent problem per assigning crop.
    epsilon, iterations, group: as in `sinkhorn`. A process may hold any number of images, even none.
    Returns potentials [A, K], float32 (float64 for float64 scores), the same on every process of the group.
    Raises ValueError for wrong shapes or values.
    """
    _check_scores("scores", scores, 3)
    scores, extra = _check_problem(scores, epsilon, iterations, extra)
    if not _has_peers(group):
        return _without_autograd(_potentials, scores, extra, epsilon, iterations)

    # logsumexp shifts by the maximum of its own process and undoes that shift, so combining the processes is exact.
    own_logsumexp = _without_autograd(_prototype_logsumexp, scores, extra, epsilon)  # [A, K]
    gathered = [torch.empty_like(own_logsumexp) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, own_logsumexp, group=group)
    potentials = _first_potentials(torch.logsumexp(torch.stack(gathered), dim=0))
    for _ in range(iterations - 1):
        totals = _without_autograd(_prototype_totals, scores, extra, potentials, epsilon)  # [A, K]
        dist.all_reduce(totals, group=group)
        potentials = _next_potentials(potentials, totals)
    return potentials


def swav_loss(
    scores: torch.Tensor,
    potentials: torch.Tensor,
    *,
    assigning: torch.Tensor | None = None,
    crops_for_assign: Sequence[int] = (0, 1),
    temperature: float = 0.1,
    epsilon: float = 0.05,
) -> torch.Tensor:
    """Compute the swapped-prediction loss: every crop predicts the codes of the others (sections 3.1-3.2, eq. 1-2).

    scores [V, B, K]: of all crops, dtypes as in `sinkhorn`, with gradient.
    potentials [A, K]: of the assigning crops, from `sinkhorn_potentials`.
    assigning [A, B, K]: the scores that codes are made of, as given to `sinkhorn_potentials`; of the potentials' dtype.
    None: those of the assigning crops in scores. Others are needed where epsilon is relative, as in loss.py.
    crops_for_assign: the A assigning crops, in the order of potentials. The CUDA kernels take at most 512.
    temperature: divides the scores of the predictions, > 0. epsilon: as given to `sinkhorn_potentials`.
    Returns a scalar, float32 (float64 for float64 scores): the mean over assigning crops i, over the other crops v != i
    and over images of -sum_k codes_i[k] log softmax(scores_v / temperature)[k].
    No gradient flows through the codes, and there is no second derivative. The compiled kernels never store the codes:
    besides scores and gradient, they need memory for one row at a time.
    Raises ValueError for wrong shapes or values.
    """
    _check_scores("scores", scores, 3)
    nmb_crops, batch_size, nmb_prototypes = scores.shape
    crops = list(crops_for_assign)
    _expect(nmb_crops > 1 and batch_size > 0, "scores", scores, "at least two crops and one image")
    are_crops = 0 < len(crops) == len(set(crops)) and 0 <= min(crops) and max(crops) < nmb_crops
    _expect(are_crops, "crops_for_assign", crops, "different crops below", nmb_crops)
    shape = (len(crops), batch_size, nmb_prototypes)
    _expect(potentials.shape == shape[::2], "potentials", potentials, shape[::2])
    _expect(temperature > 0, "temperature", temperature, "a number > 0")
    _expect(epsilon > 0, "epsilon", epsilon, "a number > 0")
    potentials = potentials.detach().to(_accumulation_dtype(scores))
    if assigning is not None:
        is_right = assigning.shape == shape and assigning.is_floating_point()
        _expect(is_right, "assigning", assigning, "a floating-point tensor", shape)
        assigning = assigning.detach().to(potentials.dtype)
    return _swapped_loss(scores, assigning, potentials, crops, temperature, epsilon)[0]


def moments(scores: torch.Tensor) -> torch.Tensor:
    """Sum scores [A, B, K] over images, and the squares of all: float64 [A * K + 1], the sum of squares last.

    Reads the scores once. scores: dtypes as in `sinkhorn`. Without gradient. float32 on devices without float64.
    Results of several processes can be added. Raises ValueError for another shape.
    """
    _check_scores("scores", scores, 3)
    return _without_autograd(_moments, scores.detach())


def backend(device: torch.device | str) -> str:
    """Name the implementation for tensors on a device: "cuda" or "cpp" (compiled kernels), or "torch" (any device).

    SINKHORN_EXT=torch in the environment forces "torch"; SINKHORN_EXT=fused too, but fused by torch.compile, on CPUs as
    well. On GPUs, float64 is plain torch in any case.
    """
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(torch.device(device).type)
    is_compiled = key and torch._C._dispatch_has_kernel_for_dispatch_key("sinkhorn_ext::potentials", key)
    return {"CPU": "cpp", "CUDA": "cuda"}[key] if is_compiled else "torch"


# Plain torch computes exponentials [A, N, K] once in three rounds; between them, only a scale [A, K] changes. As
# prototype totals lie between 1 / K and N, a round changes a scale by at most K * N, and float32's range holds three.
ROUNDS_PER_EXPONENTIAL = 3
MIN_ROW_MAXIMUM = 1e-10  # of an image's largest exponential, so that its smaller ones do not underflow


# The operators. Each body is the implementation in plain torch. csrc/ registers faster kernels for CPU and CUDA under
# the same names. scores [A, N, K] and extra [A, Q, K] have one dtype; potentials [A, K] are float32 or float64.


def _operator(schema: str, mutates_args: Sequence[str] = ()):
    """Turn a function into the operator with this schema. Its attribute `in_torch` is what runs without kernels."""
    name = schema.split("(")[0]

    def define(function):
        in_torch = fused.where_possible(function)
        operator = torch.library.custom_op(
            f"sinkhorn_ext::{name}", in_torch, mutates_args=mutates_args, schema=schema[len(name) :]
        )
        operator.in_torch = in_torch
        return operator

    return define


def _without_autograd(operator, *arguments):
    """Call an operator that has no gradient without autograd's wrappers, which take longer than a small problem."""
    if torch.compiler.is_compiling():
        return operator(*arguments)
    with torch._C._AutoDispatchBelowADInplaceOrView():
        return operator(*arguments)


@_operator("prototype_logsumexp(Tensor scores, Tensor? extra, float epsilon) -> Tensor")
def _prototype_logsumexp(scores, extra, epsilon):
    return torch.logsumexp(_logits(scores, extra, epsilon), dim=1)  # [A, K]


@_operator("prototype_totals(Tensor scores, Tensor? extra, Tensor potentials, float epsilon) -> Tensor")
def _prototype_totals(scores, extra, potentials, epsilon):
    logits = _logits(scores, extra, epsilon).add_(potentials.unsqueeze(1))
    return _totals(_exponentials(logits, dim=2)[0], torch.ones_like(potentials))  # [A, K]


@_operator("potentials(Tensor scores, Tensor? extra, float epsilon, int iterations) -> Tensor")
def _potentials(scores, extra, epsilon, iterations):
    logits = _logits(scores, extra, epsilon)  # [A, N + Q, K]
    if logits.numel() == 0:
        return logits.new_zeros(logits.shape[::2])
    exponentials, largest = _exponentials(logits, dim=1)
    sums = exponentials.sum(dim=1)  # [A, K]
    potentials, scales = _first_potentials(largest + sums.log()), torch.where(sums == 0, 1, sums.reciprocal())
    for done in range(iterations - 1):
        is_first = done == 0 and _rows_are_in_range(exponentials)
        if done % ROUNDS_PER_EXPONENTIAL == 0 and not is_first:
            logits = _logits(scores, extra, epsilon).add_(potentials.unsqueeze(1))
            exponentials, scales = _exponentials(logits, dim=2)[0], torch.ones_like(potentials)
        totals = _totals(exponentials, scales)
        potentials = _next_potentials(potentials, totals)
        scales = torch.where(totals == 0, scales, scales / totals)
    return potentials


@_operator("codes(Tensor scores, Tensor potentials, float epsilon, Tensor(a!) out) -> ()", mutates_args=["out"])
def _codes(scores, potentials, epsilon, out):
    out.copy_(_softmax(scores.to(out.dtype) / epsilon + potentials))  # [B, K]


@_operator(
    "sinkhorn(Tensor scores, Tensor? extra, float epsilon, int iterations, Tensor(a!) out) -> ()", mutates_args=["out"]
)
def _sinkhorn(scores, extra, epsilon, iterations, out):
    extra = None if extra is None else extra.unsqueeze(0)
    potentials = _potentials.in_torch(scores.unsqueeze(0), extra, epsilon, iterations)
    _codes.in_torch(scores, potentials[0], epsilon, out)


@_operator("moments(Tensor scores) -> Tensor")
def _moments(scores):
    scores = scores.to(_widest_dtype(scores))
    return torch.cat([scores.sum(dim=1).flatten(), scores.square().sum().view(1)])


# assigning [A, B, K] are the scores of the codes, if they are not those of the assigning crops, in potentials' dtype.
# logsumexps [V + A, B] are those of each image's predictions and codes. From them, backward computes both again.
@_operator(
    "swapped_loss(Tensor scores, Tensor? assigning, Tensor potentials, int[] crops_for_assign, float temperature,"
    " float epsilon)"
    " -> (Tensor loss, Tensor logsumexps)"
)
def _swapped_loss(scores, assigning, potentials, crops_for_assign, temperature, epsilon):
    scores = scores.to(potentials.dtype)  # [V, B, K]
    log_sums = [torch.logsumexp(crop / temperature, dim=1) for crop in scores]  # V times [B]
    log_sums = [torch.where(log_sum == -torch.inf, torch.nan, log_sum) for log_sum in log_sums]
    all_crops = scores.sum(dim=0)  # [B, K]
    all_log_sums = torch.stack(log_sums).sum()
    loss = scores.new_zeros(())
    for a, i in enumerate(crops_for_assign):
        logits = (scores[i] if assigning is None else assigning[a]) / epsilon + potentials[a]  # [B, K]
        log_sums.append(torch.logsumexp(logits, dim=1))
        codes = _softmax(logits)
        agreement = torch.where(codes == 0, 0, codes * (all_crops - scores[i])).sum() / temperature
        loss = loss + all_log_sums - log_sums[i].sum() - agreement
    return loss / (len(potentials) * (len(scores) - 1) * scores.shape[1]), torch.stack(log_sums)


@_operator(
    "swapped_loss_backward(Tensor grad, Tensor scores, Tensor? assigning, Tensor potentials, Tensor logsumexps,"
    " int[] crops_for_assign, float temperature, float epsilon) -> Tensor"
)
def _swapped_loss_backward(grad, scores, assigning, potentials, logsumexps, crops_for_assign, temperature, epsilon):
    nmb_crops, batch_size, _ = scores.shape
    grad = grad / (len(potentials) * (nmb_crops - 1) * batch_size * temperature)
    log_sums = logsumexps.unsqueeze(2)  # [V + A, B, 1]
    codes = {}  # of [B, K]
    for a, i in enumerate(crops_for_assign):
        code_scores = scores[i].to(grad.dtype) if assigning is None else assigning[a]
        codes[i] = torch.exp(code_scores / epsilon + potentials[a] - log_sums[nmb_crops + a])
    all_codes = sum(codes.values())  # [B, K]
    result = torch.empty(scores.shape, dtype=scores.dtype, device=scores.device)  # [V, B, K]
    for v in range(nmb_crops):
        others = all_codes - codes[v] if v in codes else all_codes
        predictions = torch.exp(scores[v].to(grad.dtype) / temperature - log_sums[v])  # [B, K]
        result[v] = grad * ((len(potentials) - (v in codes)) * predictions - others)
    return result


@_prototype_logsumexp.register_fake
@_prototype_totals.register_fake
@_potentials.register_fake
def _(scores, extra, *_):
    return scores.new_empty(scores.shape[::2], dtype=_accumulation_dtype(scores))


@_moments.register_fake
def _(scores):
    return scores.new_empty(scores.shape[0] * scores.shape[2] + 1, dtype=_widest_dtype(scores))


@_swapped_loss.register_fake
def _(scores, assigning, potentials, crops_for_assign, temperature, epsilon):
    return potentials.new_empty(()), potentials.new_empty(scores.shape[0] + len(crops_for_assign), scores.shape[1])


@_swapped_loss_backward.register_fake
def _(grad, scores, *_):
    return torch.empty(scores.shape, dtype=scores.dtype, device=scores.device)


def _save_for_backward(ctx, inputs, output):
    scores, assigning, potentials, *ctx.settings = inputs
    ctx.save_for_backward(scores, assigning, potentials, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad_loss, _):
    grad_scores = _swapped_loss_backward(grad_loss, *ctx.saved_tensors, *ctx.settings)
    return grad_scores, None, None, None, None, None


_swapped_loss.register_autograd(_backward, setup_context=_save_for_backward)


def _first_potentials(logsumexp: torch.Tensor) -> torch.Tensor:
    # A prototype without a finite score takes no part, whatever its potential is. Its potential stays 0.
    return torch.where(logsumexp == -torch.inf, 0, -logsumexp)


def _next_potentials(potentials: torch.Tensor, totals: torch.Tensor) -> torch.Tensor:
    return torch.where(totals == 0, potentials, potentials - totals.log())


def _logits(scores: torch.Tensor, extra: torch.Tensor | None, epsilon: float) -> torch.Tensor:
    rows = scores if extra is None else torch.cat([scores, extra], dim=1)
    return rows.to(_accumulation_dtype(rows)) / epsilon  # [A, N + Q, K]


def _softmax(logits: torch.Tensor) -> torch.Tensor:
    """Compute the softmax over the last dimension, with zeros where every logit is -inf."""
    codes = torch.softmax(logits, dim=-1)
    return codes.masked_fill_(logits.amax(dim=-1, keepdim=True) == -torch.inf, 0)


def _exponentials(logits: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute exp(logits - largest), in place, and the largest logits along a dimension, or 0 for -inf."""
    largest = logits.amax(dim=dim)
    largest = largest.masked_fill_(largest == -torch.inf, 0)
    return logits.sub_(largest.unsqueeze(dim)).exp_(), largest


def _rows_are_in_range(exponentials: torch.Tensor) -> bool:
    """Whether each image has an exponential that is large enough to compute with, if that can be seen.

    On GPUs the host would have to wait for it, and torch.compile cannot trace it.
    """
    can_be_seen = exponentials.is_cpu and not torch.compiler.is_compiling()
    return can_be_seen and bool((exponentials.amax(dim=2) > MIN_ROW_MAXIMUM).all())


def _totals(exponentials: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Sum the rows of exponentials [A, N, K] * scales [A, K] over N, after dividing each by its sum: [A, K]."""
    totals = torch.empty_like(scales)
    row_sums = scales.new_empty(exponentials.shape[:2])
    for problem, scale, row_sum, total in zip(exponentials, scales, row_sums, totals, strict=True):
        # Autocast and TF32 would round a product of matrices; they spare one with a vector that writes into out=.
        torch.mv(problem, scale, out=row_sum)
        torch.mv(problem.T, torch.where(row_sum == 0, 0, row_sum.reciprocal()), out=total)  # 0: all scores are -inf
    return totals.mul_(scales)


def _accumulation_dtype(scores: torch.Tensor) -> torch.dtype:
    return torch.float64 if scores.dtype == torch.float64 else torch.float32


def _widest_dtype(scores: torch.Tensor) -> torch.dtype:
    return torch.float32 if scores.device.type == "mps" else torch.float64  # mps has no float64


def _has_peers(group: dist.ProcessGroup | None) -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


def _check_problem(
    scores: torch.Tensor, epsilon: float, iterations: int, extra: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Check the arguments of a problem. Return scores and extra, without gradient and with one dtype."""
    _expect(epsilon > 0, "epsilon", epsilon, "a number > 0")
    _expect(iterations >= 1, "iterations", iterations, "1 or more")
    scores = scores.detach()
    if extra is None:
        return scores, None
    extra = extra.detach()
    _check_scores("extra", extra, scores.dim())
    is_right = extra.shape[:-2] == scores.shape[:-2] and extra.shape[-1] == scores.shape[-1]
    _expect(is_right, "extra", extra, "the shape of scores", scores.shape, "except for B")
    if extra.dtype != scores.dtype:
        scores, extra = scores.to(_accumulation_dtype(scores)), extra.to(_accumulation_dtype(scores))
    return scores, extra


def _check_scores(name: str, scores: torch.Tensor, dimensions: int) -> None:
    expected = "[B, K]" if dimensions == 2 else "[crops, B, K]"
    is_right = scores.dim() == dimensions and scores.is_floating_point() and scores.shape[-1] > 0
    _expect(is_right, name, scores, "a floating-point tensor", expected, "with K > 0")


def _expect(is_right: bool, name: str, got: object, *expected: object) -> None:
    """Raise ValueError unless is_right. Only then it formats what it got, which takes longer than a check."""
    if not is_right:
        if isinstance(got, torch.Tensor):
            got = f"{got.dtype} {list(got.shape)}"
        words = [str(list(word)) if isinstance(word, tuple) else str(word) for word in expected]
        raise ValueError(f"{name}: expected {' '.join(words)}, got {got}")


def _load_kernels() -> str:
    """Import _C, which registers the compiled kernels. Return "loaded", or why they are not."""
    if _choice:
        return f"not loaded, because of SINKHORN_EXT={_choice} in the environment"
    this_folder = globals().get("__path__", [])
    built = importlib.machinery.PathFinder.find_spec(f"{__name__}._C", this_folder)
    if built is None:
        return "not built"
    with open(built.origin, "rb") as file:
        found = re.search(rb"sinkhorn_ext for torch ([\w.+]+)", file.read())
    version = found[1].decode() if found else torch.__version__
    try:
        if version.split(".")[:2] != torch.__version__.split(".")[:2]:
            raise ImportError(f"{built.origin} may crash with another release of torch")
        importlib.import_module(f"{__name__}._C")
    except ImportError as error:
        fits = f"They were built for torch {version}, this is {torch.__version__}. " if found else ""
        warnings.warn(
            f"sinkhorn_ext runs in plain torch, because its compiled kernels do not load. {fits}"
            f"To rebuild them: pip install --no-build-isolation -e . The reason: {error}",
            stacklevel=3,
        )
        return f"built, but does not load: {error}"
    return "loaded"


_choice = os.environ.get("SINKHORN_EXT", "")
_expect(_choice in ("", "torch", "fused"), "SINKHORN_EXT", _choice, "torch, fused or nothing in the environment")
_kernels_state = _load_kernels()
# On a CPU, torch.compile takes a C++ compiler, which can compile the kernels.
fused.devices = ("cuda",) if importlib.util.find_spec("triton") and _choice != "torch" else ()
if _choice == "fused":
    fused.devices = ("cpu", "cuda")
