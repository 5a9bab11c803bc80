"""Compare the codes and the swapped loss of sinkhorn_ext with the float64 reference, on every available device.

check.sh runs this file twice: with the compiled kernels and in plain torch (SINKHORN_EXT=torch).
"""

import importlib.machinery
import os
import platform
import shutil
import sys
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import reference
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import DEVICES, forked, needs_gpu, run_processes

import sinkhorn_ext
from sinkhorn_ext import backend, moments, sinkhorn, sinkhorn_potentials, swav_loss

ROOT = Path(__file__).resolve().parent.parent
IS_COMPILED = backend("cpu") == "cpp"
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SIZES = [1, 17, 129, 3000]
# Both computing dtypes, with the error of results near 1. On CUDA, float64 is plain torch.
COMPUTING = [(torch.float64, 1e-9), (torch.float32, 3e-5)]


def cosine_scores(nmb_images, nmb_prototypes, *, crops=None, seed=0, dtype=torch.float32, device="cpu"):
    """Make scores as in training, products of unit vectors: [B, K], or [crops, B, K]."""
    generator = torch.Generator().manual_seed(seed)
    lead = () if crops is None else (crops,)
    images = torch.randn(*lead, nmb_images, 16, generator=generator, dtype=torch.float64)
    prototypes = torch.randn(nmb_prototypes, 16, generator=generator, dtype=torch.float64)
    return (F.normalize(images, dim=-1) @ F.normalize(prototypes, dim=-1).T).to(device, dtype)


def unnormalised_scores(nmb_images, nmb_prototypes, *, dtype=torch.float32, device="cpu"):
    """Make scores [B, K] as of vectors that were not normalised: N(0, 100^2)."""
    generator = torch.Generator().manual_seed(1)
    return (100 * torch.randn(nmb_images, nmb_prototypes, generator=generator)).to(device, dtype)


def naive_sinkhorn(scores, epsilon=0.05, iterations=3):
    """Compute codes by the plain matrix form, in the dtype of the scores, shifted so that exp cannot overflow."""
    q = torch.exp(scores / epsilon - (scores / epsilon).max())
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(dim=0, keepdim=True) / q.shape[1]
        q = q / q.sum(dim=1, keepdim=True) / q.shape[0]
    return q / q.sum(dim=1, keepdim=True)


def logit_rounding(scores, epsilon, dtype):
    """Bound the relative error of exp(scores / epsilon) that the rounding of one logit causes."""
    return (scores.double().abs().max() / epsilon).item() * torch.finfo(dtype).eps


def max_error(codes, expected):
    """Return the largest absolute error, which is infinite if a code is NaN."""
    return (codes.double() - expected).abs().nan_to_num(nan=torch.inf).max().item()


# Codes


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("nmb_images, nmb_prototypes", list(product(SIZES, SIZES)))
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_at_most_twice_that_of_naive_torch(dtype, nmb_images, nmb_prototypes, device):
    if nmb_images == nmb_prototypes == 3000 and dtype != torch.float32:
        pytest.skip("one dtype is enough at this size")
    scores = cosine_scores(nmb_images, nmb_prototypes, dtype=dtype, device=device)
    expected = reference.sinkhorn(scores)
    codes = sinkhorn(scores)
    floor = 4 * logit_rounding(scores, 0.05, codes.dtype) * expected.max().item()
    assert max_error(codes, expected) <= 2 * max_error(naive_sinkhorn(scores), expected) + floor


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread, epsilon", [(None, 0.01), (100, 0.05), (100, 0.01)])
def test_codes_are_finite_and_correct_for_small_epsilon_and_unnormalised_scores(spread, epsilon, dtype, device):
    scores = cosine_scores(129, 300, dtype=dtype, device=device)
    if spread:
        scores = unnormalised_scores(129, 300, dtype=dtype, device=device)
    codes = sinkhorn(scores, epsilon)
    assert codes.isfinite().all()
    assert max_error(codes, reference.sinkhorn_log(scores, epsilon)) <= logit_rounding(scores, epsilon, codes.dtype)


@pytest.mark.parametrize("device", DEVICES)
def test_codes_loss_and_gradient_are_finite_for_scores_up_to_1e6_epsilon(device):
    scores = torch.stack([unnormalised_scores(65, 300, device=device), -unnormalised_scores(65, 300, device=device)])
    scores *= 0.05e6 / scores.abs().max()
    scores.requires_grad_()
    potentials = sinkhorn_potentials(scores.detach())
    loss = swav_loss(scores, potentials)
    loss.backward()
    codes = sinkhorn(scores.detach()[0])
    assert codes.isfinite().all() and potentials.isfinite().all() and loss.isfinite() and scores.grad.isfinite().all()
    torch.testing.assert_close(codes.sum(1), torch.ones(65, device=device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("iterations", [1, 3, 100])
def test_codes_are_finite_and_correct_for_rows_with_distant_means(iterations, device):
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        nmb_images, nmb_prototypes = torch.randint(1, 20, (2,), generator=generator).tolist()
        scores = 1.5 * torch.randn(nmb_images, 1, generator=generator)
        scores = (scores + 0.1 * torch.randn(nmb_images, nmb_prototypes, generator=generator)).to(device)
        expected = reference.sinkhorn_log(scores, 0.05, iterations)
        potentials = sinkhorn_potentials(scores.unsqueeze(0), 0.05, iterations)  # they drift by log(B / K) per round
        rounding = logit_rounding(scores, 0.05, torch.float32) + logit_rounding(potentials, 1, torch.float32)
        assert max_error(sinkhorn(scores, 0.05, iterations), expected) <= rounding


@pytest.mark.parametrize("device", DEVICES)
def test_out_that_is_scores_is_refused_or_gives_correct_codes(device):
    scores = unnormalised_scores(12, 9, device=device)
    expected = sinkhorn(scores)
    if backend(device) == "torch":
        assert torch.equal(sinkhorn(scores, out=scores), expected)
    else:
        with pytest.raises(RuntimeError, match="single memory location"):
            sinkhorn(scores, out=scores)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_are_float32_or_float64_and_rows_sum_to_one(dtype, device):
    codes = sinkhorn(cosine_scores(129, 3000, dtype=dtype, device=device))
    assert codes.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert codes.shape == (129, 3000) and codes.device.type == device and (codes >= 0).all()
    torch.testing.assert_close(codes.double().sum(dim=1).cpu(), torch.ones(129).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_scores_are_computed_with_in_float32(dtype, device):
    scores = cosine_scores(129, 17, dtype=dtype, device=device)
    torch.testing.assert_close(sinkhorn(scores), sinkhorn(scores.float()), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype, tolerance", COMPUTING)
@pytest.mark.parametrize("iterations", [1, 2, 3, 10])
def test_codes_match_the_reference_for_any_number_of_iterations(iterations, dtype, tolerance, device):
    scores = cosine_scores(40, 25, dtype=dtype, device=device)
    expected = reference.sinkhorn(scores, 0.1, iterations)
    torch.testing.assert_close(sinkhorn(scores, 0.1, iterations).double(), expected, rtol=tolerance, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_prototype_totals_match_the_reference_and_are_not_uniform(device):
    scores = cosine_scores(300, 40, dtype=torch.float64, device=device)
    totals, expected = sinkhorn(scores).sum(dim=0), reference.sinkhorn(scores).sum(dim=0)
    torch.testing.assert_close(totals, expected)
    assert (expected * 40 / 300 - 1).abs().max() > 0.02  # three rounds must not balance them fully


LAYOUTS = {
    "transposed": lambda x: x.T,
    "every third row": lambda x: x[::3],
    "every second column": lambda x: x[:, 1::2],
    "one row repeated": lambda x: x[:1].expand(9, -1),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_may_have_any_stride_and_are_not_modified(layout, device):
    memory = cosine_scores(60, 44, device=device)
    before = memory.clone()
    scores = LAYOUTS[layout](memory)
    codes = sinkhorn(scores, extra=scores)
    torch.testing.assert_close(codes.double(), reference.sinkhorn(scores, extra=scores), rtol=1e-5, atol=1e-7)
    assert torch.equal(memory, before)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", [0.0, 0.7, -300.0])
@pytest.mark.parametrize("nmb_images, nmb_prototypes", [(1, 129), (17, 3000), (129, 17)])
def test_equal_scores_give_uniform_codes(nmb_images, nmb_prototypes, value, device):
    codes = sinkhorn(torch.full((nmb_images, nmb_prototypes), value, device=device))
    torch.testing.assert_close(codes, torch.full_like(codes, 1 / nmb_prototypes), rtol=1e-6, atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("position", [(0, 0), (7, 5), (39, 24)])
def test_one_nan_makes_all_codes_nan(position, device):
    scores = cosine_scores(40, 25, device=device)
    scores[position] = torch.nan
    assert sinkhorn(scores).isnan().all()
    assert sinkhorn(cosine_scores(40, 25, device=device), extra=scores).isnan().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype, tolerance", COMPUTING)
@pytest.mark.parametrize("epsilon", [0.05, 0.01])
@pytest.mark.parametrize("with_extra", [False, True])
def test_masked_prototypes_and_images_take_no_part(with_extra, epsilon, dtype, tolerance, device):
    scores = cosine_scores(40, 25, dtype=dtype, device=device)
    scores[:, [3, 24]] = -torch.inf
    scores[[0, 17], :] = -torch.inf
    prototypes = [k for k in range(25) if k not in (3, 24)]
    images = [b for b in range(40) if b not in (0, 17)]
    extra = scores[:20] if with_extra else None
    codes = sinkhorn(scores, epsilon, extra=extra)
    assert not codes[[0, 17]].any() and not codes[:, [3, 24]].any()
    extra = scores[1:17][:, prototypes].repeat(2, 1)[:16] if with_extra else None
    extra = torch.cat([extra, scores[18:20][:, prototypes]]) if with_extra else None
    expected = reference.sinkhorn_log(scores[images][:, prototypes], epsilon, extra=extra)
    torch.testing.assert_close(codes[images][:, prototypes].double(), expected, rtol=tolerance, atol=tolerance / 1000)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("nmb_images, nmb_prototypes", [(3, 65_536), (2, 10_000), (5000, 3)])
def test_codes_loss_and_gradient_match_the_reference_for_extreme_sizes(nmb_images, nmb_prototypes, device):
    scores = cosine_scores(nmb_images, nmb_prototypes, device=device)
    expected = reference.sinkhorn(scores)
    floor = 4 * logit_rounding(scores, 0.05, torch.float32) * expected.max().item()
    assert max_error(sinkhorn(scores), expected) <= 2 * max_error(naive_sinkhorn(scores), expected) + floor
    batch = cosine_scores(nmb_images, nmb_prototypes, crops=3, device=device)
    assert_loss_and_gradient(batch, (0, 1), 2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_threads_does_not_change_the_results(dtype):
    if not IS_COMPILED:
        pytest.skip("torch does not guarantee it")
    scores, batch = cosine_scores(300, 301, dtype=dtype), cosine_scores(40, 3001, crops=4, dtype=dtype)
    results, threads = [], torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        potentials = sinkhorn_potentials(batch[:2])
        loss = swav_loss(batch.requires_grad_(), potentials)
        (grad,) = torch.autograd.grad(loss, batch)
        results.append((sinkhorn(scores), sinkhorn(scores, extra=scores), potentials, loss, grad))
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_calls_give_the_same_bits(dtype, device):
    scores, extra = (
        cosine_scores(129, 301, dtype=dtype, device=device),
        cosine_scores(33, 301, seed=1, dtype=dtype, device=device),
    )
    assert torch.equal(sinkhorn(scores, extra=extra), sinkhorn(scores, extra=extra))
    batch = cosine_scores(17, 301, crops=4, dtype=dtype, device=device)
    potentials = sinkhorn_potentials(batch[:2])
    assert torch.equal(potentials, sinkhorn_potentials(batch[:2]))
    assert torch.equal(swav_loss(batch, potentials), swav_loss(batch, potentials))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype, tolerance", COMPUTING)
@pytest.mark.parametrize("nmb_extra", [0, 1, 50])
def test_extra_rows_take_part_in_the_balance_and_get_no_codes(nmb_extra, dtype, tolerance, device):
    scores = cosine_scores(20, 30, dtype=dtype, device=device)
    extra = cosine_scores(nmb_extra, 30, seed=1, dtype=dtype, device=device)
    codes = sinkhorn(scores, extra=extra)
    expected = reference.sinkhorn(scores, extra=extra)
    torch.testing.assert_close(codes.double(), expected, rtol=tolerance, atol=tolerance / 1000)
    torch.testing.assert_close(codes, sinkhorn(torch.cat([scores, extra]))[:20], rtol=tolerance, atol=0)
    assert torch.allclose(codes, sinkhorn(scores)) == (nmb_extra == 0)


@pytest.mark.parametrize("device", DEVICES)
def test_an_empty_batch_gives_empty_codes(device):
    assert sinkhorn(torch.empty(0, 5, device=device)).shape == (0, 5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_out_receives_the_codes_and_is_returned(layout, device):
    scores = cosine_scores(12, 9, device=device)
    out = torch.full((9, 12), torch.nan, device=device).T
    out = out.contiguous() if layout == "contiguous" else out
    assert sinkhorn(scores, out=out) is out
    assert torch.equal(out, sinkhorn(scores))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_codes_that_backward_needs_cannot_be_overwritten_unnoticed(layout, device):
    out = torch.empty(12, 9, device=device).T if layout == "transposed" else torch.empty(9, 12, device=device)
    log_predictions = cosine_scores(9, 12, seed=1, device=device).requires_grad_()
    loss = (sinkhorn(cosine_scores(9, 12, device=device), out=out) * log_predictions).sum()
    sinkhorn(cosine_scores(9, 12, seed=2, device=device), out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["codes", "sinkhorn"])
def test_operators_that_write_count_a_new_version(name, device):
    *arguments, out = operator_arguments(torch.float32, device)[name]
    getattr(torch.ops.sinkhorn_ext, name)(*arguments, out)
    assert out._version >= 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype, tolerance", COMPUTING)
def test_several_problems_at_once_are_independent(dtype, tolerance, device):
    scores = cosine_scores(12, 9, crops=3, dtype=dtype, device=device)
    extra = cosine_scores(7, 9, crops=3, seed=1, dtype=dtype, device=device)
    potentials = sinkhorn_potentials(scores, 0.1, 2, extra=extra)
    assert potentials.shape == (3, 9) and potentials.dtype == dtype
    for a in range(3):
        codes = torch.softmax(scores[a] / 0.1 + potentials[a], dim=1)
        torch.testing.assert_close(codes, sinkhorn(scores[a], 0.1, 2, extra=extra[a]), rtol=tolerance, atol=0)


X = torch.zeros(4, 6)
REFUSED = {
    "one dimension": lambda: sinkhorn(X[0]),
    "three dimensions": lambda: sinkhorn(X[None]),
    "integers": lambda: sinkhorn(X.long()),
    "no prototypes": lambda: sinkhorn(X[:, :0]),
    "epsilon 0": lambda: sinkhorn(X, epsilon=0),
    "epsilon below 0": lambda: sinkhorn(X, epsilon=-0.05),
    "no iterations": lambda: sinkhorn(X, iterations=0),
    "extra with fewer prototypes": lambda: sinkhorn(X, extra=X[:, :5]),
    "extra of one dimension": lambda: sinkhorn(X, extra=X[0]),
    "extra of integers": lambda: sinkhorn(X, extra=X.long()),
    "out of another shape": lambda: sinkhorn(X, out=torch.empty(6, 4)),
    "out of another dtype": lambda: sinkhorn(X, out=torch.empty(4, 6, dtype=torch.float64)),
    "out with gradient": lambda: sinkhorn(X, out=torch.empty(4, 6, requires_grad=True)),
    "potentials of two dimensions": lambda: sinkhorn_potentials(X),
    "potentials with extra of more crops": lambda: sinkhorn_potentials(X[None], extra=torch.zeros(2, 3, 6)),
    "loss of two dimensions": lambda: swav_loss(X, X[:2]),
    "loss of integers": lambda: swav_loss(X.expand(3, 4, 6).long(), X[:2]),
    "loss with too few potentials": lambda: swav_loss(X.expand(3, 4, 6), X[:1]),
    "loss with potentials of fewer prototypes": lambda: swav_loss(X.expand(3, 4, 6), X[:2, :5]),
    "loss with assigning scores of more crops": lambda: swav_loss(
        X.expand(3, 4, 6), X[:2], assigning=X.expand(3, 4, 6)
    ),
    "loss with assigning scores of integers": lambda: swav_loss(
        X.expand(3, 4, 6), X[:2], assigning=X.expand(2, 4, 6).long()
    ),
    "moments of two dimensions": lambda: moments(X),
    "loss with a crop too high": lambda: swav_loss(X.expand(3, 4, 6), X[:2], crops_for_assign=(0, 3)),
    "loss with a crop below 0": lambda: swav_loss(X.expand(3, 4, 6), X[:2], crops_for_assign=(0, -1)),
    "loss with a crop twice": lambda: swav_loss(X.expand(3, 4, 6), X[:2], crops_for_assign=(1, 1)),
    "loss of one crop": lambda: swav_loss(X[None], X[:1], crops_for_assign=(0,)),
    "loss at temperature 0": lambda: swav_loss(X.expand(3, 4, 6), X[:2], temperature=0),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_arguments_are_refused(case):
    with pytest.raises(ValueError, match="expected .* got "):
        REFUSED[case]()


# Codes over several processes

# For each case, two lists with one number per process: of images and of extra rows.
TWO_PROCESSES = [([12, 12], [0, 0]), ([20, 4], [3, 8]), ([24, 0], [0, 5]), ([0, 9], [0, 0])]
THREE_PROCESSES = [([8, 8, 8], [8, 8, 8]), ([1, 0, 16], [0, 7, 2]), ([0, 0, 5], [0, 0, 0])]


def shards(sizes, extra_sizes):
    scores = cosine_scores(sum(sizes), 30, dtype=torch.float64).split(sizes)
    extra = cosine_scores(sum(extra_sizes), 30, seed=1, dtype=torch.float64).split(extra_sizes)
    return scores, extra


def codes_of_shards(rank, world_size, cases):
    results = []
    for sizes, extra_sizes in cases:
        scores, extra = shards(sizes, extra_sizes)
        potentials = sinkhorn_potentials(scores[rank][None], extra=extra[rank][None])
        results.append((sinkhorn(scores[rank], extra=extra[rank]), potentials))
    return results


def codes_of_two_of_three(rank, world_size, sizes):
    group = dist.new_group([0, 2])
    scores, _ = shards(sizes, [0] * world_size)
    return [codes_of_shards(rank, world_size, THREE_PROCESSES), sinkhorn(scores[rank], group=group) if rank != 1 else 0]


def assert_equal_to_one_process(results, cases):
    for case, (sizes, extra_sizes) in enumerate(cases):
        scores, extra = (torch.cat(parts) for parts in shards(sizes, extra_sizes))
        codes = torch.cat([result[case][0] for result in results])
        torch.testing.assert_close(codes, reference.sinkhorn(scores, extra=extra))
        torch.testing.assert_close(codes, sinkhorn(scores, extra=extra), rtol=1e-12, atol=1e-15)
        assert all(torch.equal(result[case][1], results[0][case][1]) for result in results)


def test_two_processes_give_the_same_codes_as_one():
    assert_equal_to_one_process(run_processes(codes_of_shards, 2, TWO_PROCESSES), TWO_PROCESSES)


def test_three_processes_give_the_same_codes_as_one_and_a_group_balances_only_its_images():
    sizes = [6, 7, 8]
    results = run_processes(codes_of_two_of_three, 3, sizes)
    assert_equal_to_one_process([codes for codes, _ in results], THREE_PROCESSES)
    scores, _ = shards(sizes, [0, 0, 0])
    in_group = torch.cat([results[0][1], results[2][1]])
    torch.testing.assert_close(in_group, reference.sinkhorn(torch.cat([scores[0], scores[2]])))


# The swapped loss


def reference_loss(scores, crops_for_assign, temperature=0.1, epsilon=0.05):
    codes = [reference.sinkhorn_log(scores[crop], epsilon) for crop in crops_for_assign]
    return reference.swav_loss(list(scores), codes, crops_for_assign, temperature)


def assert_loss_and_gradient(scores, crops_for_assign, tolerance, **options):
    scores = scores.detach().requires_grad_()
    exact = scores.detach().double().requires_grad_()
    epsilon = options.get("epsilon", 0.05)
    potentials = sinkhorn_potentials(scores[list(crops_for_assign)], epsilon)
    loss = swav_loss(scores, potentials, crops_for_assign=crops_for_assign, **options)
    expected = reference_loss(exact, crops_for_assign, **options)
    assert loss.shape == () and loss.dtype == potentials.dtype
    torch.testing.assert_close(loss.double(), expected, rtol=min(tolerance, 1e-5), atol=0)
    (3 * loss).backward()
    (3 * expected).backward()
    assert scores.grad.dtype == scores.dtype
    assert max_error(scores.grad, exact.grad) <= tolerance * exact.grad.abs().max().item()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "nmb_crops, crops_for_assign",
    [(2, (0, 1)), (3, (0, 1, 2)), (4, (2,)), (5, (1, 0)), (6, (0, 1)), (7, (4, 5)), (8, (0, 1)), (8, (6, 0, 3))],
)
def test_loss_and_gradient_match_the_reference(nmb_crops, crops_for_assign, dtype, device):
    tolerance = {torch.float64: 1e-10, torch.float32: 2e-5}.get(dtype, torch.finfo(dtype).eps)
    scores = cosine_scores(17, 129, crops=nmb_crops, dtype=dtype, device=device)
    assert_loss_and_gradient(scores, crops_for_assign, tolerance)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype, tolerance", COMPUTING)
@pytest.mark.parametrize("temperature, epsilon", [(0.3, 0.05), (0.1, 0.02), (1.0, 1.0)])
def test_loss_and_gradient_match_the_reference_for_any_temperature_and_epsilon(
    temperature, epsilon, dtype, tolerance, device
):
    scores = cosine_scores(9, 20, crops=3, dtype=dtype, device=device)
    assert_loss_and_gradient(scores, (0, 1), tolerance, temperature=temperature, epsilon=epsilon)


@pytest.mark.parametrize("device", DEVICES)
def test_loss_of_strided_scores_matches_the_reference_and_does_not_modify_them(device):
    memory = cosine_scores(20, 17, crops=8, device=device)
    before = memory.clone()
    assert_loss_and_gradient(memory[::2].transpose(1, 2), (0, 1), 2e-5)
    assert torch.equal(memory, before)


def naive_loss(scores, potentials, crops_for_assign):
    """Compute the loss by its plain formula, in the dtype of the scores."""
    loss = 0
    for i, potential in zip(crops_for_assign, potentials.to(scores.dtype), strict=True):
        codes = torch.softmax(scores[i].detach() / 0.05 + potential, dim=1)
        for v in range(len(scores)):
            if v != i:
                loss = loss - (codes * F.log_softmax(scores[v] / 0.1, dim=1)).sum(dim=1).mean()
    return loss / len(crops_for_assign) / (len(scores) - 1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nmb_images, nmb_prototypes", [(1, 3000), (17, 129), (64, 3000)])
def test_error_of_loss_and_gradient_is_at_most_twice_that_of_naive_torch(nmb_images, nmb_prototypes, dtype, device):
    scores = cosine_scores(nmb_images, nmb_prototypes, crops=4, dtype=dtype, device=device).requires_grad_()
    exact = scores.detach().double().requires_grad_()
    potentials = sinkhorn_potentials(exact.detach()[:2])
    losses = [naive_loss(exact, potentials, (0, 1)), naive_loss(scores, potentials, (0, 1))]
    losses.append(swav_loss(scores, potentials))
    grads = [torch.autograd.grad(losses[0], exact)[0]] + [torch.autograd.grad(loss, scores)[0] for loss in losses[1:]]
    # Potentials in float32, and a gradient in half precision, are rounded once in every implementation.
    rounding = logit_rounding(scores, 0.05, potentials.float().dtype if dtype != torch.float64 else dtype)
    rounding += torch.finfo(dtype).eps if dtype in (torch.bfloat16, torch.float16) else 0
    for exact_value, naive, ours in (losses, grads):
        floor = 4 * rounding * exact_value.abs().max().item()
        assert max_error(ours, exact_value) <= 2 * max_error(naive, exact_value) + floor


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype, tolerance", COMPUTING)
def test_masked_prototypes_get_no_gradient_and_do_not_change_the_loss(dtype, tolerance, device):
    scores = cosine_scores(9, 20, crops=4, dtype=dtype, device=device)
    masked = scores.clone()
    masked[:, :, 5] = -torch.inf
    others = [k for k in range(20) if k != 5]
    results = []
    for leaf in (masked.requires_grad_(), scores[:, :, others].requires_grad_()):
        loss = swav_loss(leaf, sinkhorn_potentials(leaf[:2]))
        results.append((loss, torch.autograd.grad(loss, leaf)[0]))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=tolerance, atol=0)
    torch.testing.assert_close(results[0][1][:, :, others], results[1][1], rtol=tolerance, atol=tolerance / 1000)
    assert not results[0][1][:, :, 5].any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
@pytest.mark.parametrize("crop, crops_for_assign", [(3, (0, 1)), (0, (0, 1)), (0, (0,))])
def test_a_nan_or_a_masked_image_makes_the_loss_and_its_gradient_nan(crop, crops_for_assign, value, device):
    scores = cosine_scores(9, 20, crops=4, device=device)
    potentials = sinkhorn_potentials(scores[list(crops_for_assign)])
    scores[crop, 4] = value
    loss = swav_loss(scores.requires_grad_(), potentials, crops_for_assign=crops_for_assign)
    assert loss.isnan()
    (grad,) = torch.autograd.grad(loss, scores)
    assert grad[crop, 4].isnan().all() and grad[:, 5:].isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
def test_loss_and_gradient_match_the_reference_for_unnormalised_scores(device):
    assert_loss_and_gradient(unnormalised_scores(51, 20, device=device).unflatten(0, (3, 17)), (0, 1), 5e-3)


@pytest.mark.parametrize("device", DEVICES)
def test_gradcheck_in_float64(device):
    scores = cosine_scores(3, 4, crops=4, dtype=torch.float64, device=device).requires_grad_()
    potentials = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(device)

    # backward treats codes as constants. With a huge epsilon they are constant, so finite differences agree with it.
    def loss(scores):
        return swav_loss(scores, potentials, crops_for_assign=(2, 0), epsilon=1e9)

    assert torch.autograd.gradcheck(loss, (scores,))


@pytest.mark.parametrize("device", DEVICES)
def test_gradcheck_in_float64_with_assigning_scores(device):
    scores = cosine_scores(3, 4, crops=4, dtype=torch.float64, device=device).requires_grad_()
    assigning = cosine_scores(3, 4, crops=2, seed=1, dtype=torch.float64, device=device)
    potentials = sinkhorn_potentials(assigning)
    options = dict(assigning=assigning, crops_for_assign=(2, 0))
    assert torch.autograd.gradcheck(lambda scores: swav_loss(scores, potentials, **options), (scores,))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "nmb_images, nmb_prototypes, crops_for_assign", [(17, 129, (0, 1)), (1, 3000, (2,)), (5, 20, (3, 0, 2))]
)
def test_the_codes_of_assigning_scores_are_those_of_a_plain_formula(
    nmb_images, nmb_prototypes, crops_for_assign, dtype, device
):
    """With a range of values where a code by the scores themselves would be another one."""
    scores = cosine_scores(nmb_images, nmb_prototypes, crops=4, dtype=dtype, device=device).requires_grad_()
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    assigning = 3 * cosine_scores(nmb_images, nmb_prototypes, crops=len(crops_for_assign), seed=1, device=device).to(
        accumulated
    )
    potentials = sinkhorn_potentials(assigning, 0.3)
    options = dict(crops_for_assign=crops_for_assign, epsilon=0.3)
    loss = swav_loss(scores, potentials, assigning=assigning.transpose(1, 2).contiguous().transpose(1, 2), **options)
    exact = scores.detach().double().requires_grad_()
    codes = torch.softmax(assigning.double() / 0.3 + potentials.double().unsqueeze(1), dim=2)
    expected = reference.swav_loss(list(exact), list(codes), crops_for_assign, 0.1)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=0)
    assert loss.item() != swav_loss(scores, potentials, **options).item()
    gradients = torch.autograd.grad(loss, scores)[0], torch.autograd.grad(expected, exact)[0]
    tolerance = max(tolerance, torch.finfo(dtype).eps if dtype in (torch.bfloat16, torch.float16) else 0)
    assert max_error(*gradients) <= 3 * tolerance * gradients[1].abs().max().item()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype, tolerance", COMPUTING)
def test_more_assigning_crops_than_a_batch_has_large_ones(dtype, tolerance, device):
    scores = cosine_scores(3, 20, crops=80, dtype=dtype, device=device)
    assert_loss_and_gradient(scores, tuple(range(1, 70)), tolerance)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 17, 129), (1, 700, 33), (3, 1, 1), (2, 0, 5), (2, 64, 3000)])
def test_moments_are_sums_in_float64(shape, dtype, device):
    scores = 1 + 1e-3 * torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype).to(device)
    exact = scores.double()
    expected = torch.cat([exact.sum(1).flatten(), exact.square().sum().view(1)])
    for layout in (scores, scores.transpose(0, 2).contiguous().transpose(0, 2)):
        result = moments(layout)
        assert result.dtype == torch.float64
        torch.testing.assert_close(result, expected, rtol=1e-13, atol=0)
    assert torch.equal(moments(scores), moments(scores))


@pytest.mark.parametrize("device", DEVICES)
def test_codes_and_potentials_have_no_gradient(device):
    scores = cosine_scores(5, 7, crops=3, device=device).requires_grad_()
    assert not sinkhorn(scores[0], extra=scores[1]).requires_grad
    assert not sinkhorn_potentials(scores[:2], extra=scores[1:]).requires_grad


@pytest.mark.parametrize("device", DEVICES)
def test_moments_have_no_gradient_and_the_loss_none_for_potentials_and_assigning_scores(device):
    scores = cosine_scores(5, 7, crops=3, device=device).requires_grad_()
    assert not moments(scores).requires_grad
    potentials = sinkhorn_potentials(scores[:2]).requires_grad_()
    assigning = cosine_scores(5, 7, crops=2, seed=1, device=device).requires_grad_()
    swav_loss(scores, potentials, assigning=assigning).backward()
    assert potentials.grad is None and assigning.grad is None and scores.grad.any()


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_changes_no_result(device):
    scores = cosine_scores(40, 25, crops=3, device=device).requires_grad_()

    def results():
        potentials = sinkhorn_potentials(scores[:2])
        loss = swav_loss(scores, potentials)
        plain = sinkhorn_ext._potentials.in_torch(scores.detach(), None, 0.05, 3)
        return sinkhorn(scores[0]), potentials, loss, torch.autograd.grad(loss, scores)[0], moments(scores), plain

    expected = results()
    with torch.autocast(device, torch.bfloat16):  # compiled anew where it is fused, so rounding may differ
        torch.testing.assert_close(results(), expected, rtol=1e-5, atol=1e-6)


# The operators


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("nmb_extra", [0, 6])
@pytest.mark.parametrize("nmb_images", [0, 9])
@pytest.mark.parametrize("nmb_prototypes", [17, 1500, 3000, 4096, 5000])
def test_operators_for_several_processes_match_plain_torch_in_float64(nmb_prototypes, nmb_images, nmb_extra, device):
    """Test the kernels that a run with a single process does not use."""
    rows, extra = (cosine_scores(n + 1, nmb_prototypes, crops=2, device=device)[:, 1:] for n in (nmb_images, nmb_extra))
    extra = extra if nmb_extra else None
    potentials = torch.randn(2, nmb_prototypes, generator=torch.Generator().manual_seed(0)).to(device)
    for name, options in (("prototype_logsumexp", (0.05,)), ("prototype_totals", (potentials, 0.05))):
        result = getattr(torch.ops.sinkhorn_ext, name)(rows, extra, *options)
        exact = [value.double() if torch.is_tensor(value) else value for value in (rows, extra, *options)]
        expected = getattr(sinkhorn_ext, f"_{name}").in_torch(*exact)
        torch.testing.assert_close(result.double(), expected, rtol=5e-5, atol=1e-6)


def operator_arguments(dtype, device, images=5):
    scores, extra = (cosine_scores(n, 17, crops=4, dtype=dtype, device=device) for n in (images, 3))
    potentials = sinkhorn_potentials(scores[:2])
    out = torch.empty(images, 17, dtype=potentials.dtype, device=device)
    logsumexps = torch.randn(6, images, device=device).to(potentials.dtype)
    return {
        "prototype_logsumexp": (scores, extra, 0.05),
        "prototype_totals": (scores[:2], extra[:2], potentials, 0.05),
        "potentials": (scores, extra, 0.05, 3),
        "codes": (scores[0], potentials[0], 0.05, out),
        "sinkhorn": (scores[0], extra[0], 0.05, 3, out),
        "moments": (scores,),
        "swapped_loss": (scores.clone().requires_grad_(), None, potentials, [0, 1], 0.1, 0.05),
        "swapped_loss_backward": (potentials.sum(), scores.detach(), None, potentials, logsumexps, [0, 1], 0.1, 0.05),
    }


def with_assigning_scores(name, dtype, device):
    """Arguments of swapped_loss or its backward, with scores for the codes."""
    arguments = list(operator_arguments(dtype, device)[name])
    potentials = next(a for a in arguments if isinstance(a, torch.Tensor) and a.shape == (2, 17))
    arguments[arguments.index(None)] = cosine_scores(5, 17, crops=2, device=device).to(potentials.dtype)
    return arguments


OPERATORS = list(operator_arguments(torch.float32, "cpu"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name, dtype, device):
    torch.library.opcheck(getattr(torch.ops.sinkhorn_ext, name).default, operator_arguments(dtype, device)[name])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["swapped_loss", "swapped_loss_backward"])
def test_opcheck_with_assigning_scores(name, dtype, device):
    torch.library.opcheck(getattr(torch.ops.sinkhorn_ext, name).default, with_assigning_scores(name, dtype, device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", OPERATORS)
def test_compiled_operators_refuse_wrong_shapes(name, device):
    if backend(device) == "torch":
        pytest.skip("plain torch has its own messages")
    has_assigning = name.startswith("swapped_loss")
    arguments = (
        with_assigning_scores(name, torch.float32, device)
        if has_assigning
        else list(operator_arguments(torch.float32, device)[name])
    )
    tensors = [i for i, argument in enumerate(arguments) if isinstance(argument, torch.Tensor) and argument.dim() > 1]
    for i in tensors:
        wrong = [argument.detach()[..., :-1] if j == i else argument for j, argument in enumerate(arguments)]
        if name not in ("prototype_logsumexp", "moments") or len(tensors) > 1:
            with pytest.raises(RuntimeError, match="expected .* got "):
                getattr(torch.ops.sinkhorn_ext, name)(*wrong)


@needs_gpu
@pytest.mark.parametrize("nmb_prototypes", [300, 3000, 10_000])
def test_replaying_a_cuda_graph_equals_eager(nmb_prototypes):
    scores = cosine_scores(64, nmb_prototypes, crops=4, device="cuda").requires_grad_()

    def step():
        potentials = sinkhorn_potentials(scores.detach()[:2])
        loss = swav_loss(scores, potentials)
        return sinkhorn(scores[0]), potentials, loss, torch.autograd.grad(loss, scores)[0]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (1, 2):
        with torch.no_grad():
            scores.copy_(cosine_scores(64, nmb_prototypes, crops=4, seed=seed))
        graph.replay()
        replayed = [result.clone() for result in captured]
        assert all(torch.equal(a, b) for a, b in zip(replayed, step(), strict=True))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak memory is read from Linux's /proc")
def test_the_compiled_loss_needs_no_memory_for_the_codes():
    if not IS_COMPILED:
        pytest.skip("plain torch needs it")
    program = """
import torch
from sinkhorn_ext import sinkhorn_potentials, swav_loss

def kib(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))

def step(scores):
    swav_loss(scores, sinkhorn_potentials(scores.detach()[:2])).backward()

step(torch.rand(8, 2, 3000, requires_grad=True))
scores = torch.rand(8, 256, 3000, requires_grad=True)
open("/proc/self/clear_refs", "w").write("5")  # resets the peak
before = kib("VmRSS")
step(scores)
print((kib("VmHWM") - before) * 1024 / scores.nbytes)
"""
    peak = forked("-c", program)
    assert 0.9 < float(peak.stdout) < 1.4  # for the gradient and the totals of the slabs


# Plain torch, fused by torch.compile


@pytest.fixture
def fuse_on_cpu(monkeypatch):
    """Return a function that gives an operator's body as it runs on a GPU without kernels, and one that counts graphs.

    The graphs run as torch traced them: no code is generated, which would take seconds for each.
    """
    graphs = []

    def keep(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(sinkhorn_ext.fused, "devices", ("cpu",))
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=keep))
    torch._dynamo.reset()

    def fuse(name):
        return sinkhorn_ext.fused.where_possible(getattr(sinkhorn_ext, f"_{name}").in_torch.__wrapped__)

    return fuse, lambda: len(graphs)


def run_body(body, arguments):
    """Call an operator's body. Return its tensors, those that it writes included."""
    arguments = [argument.detach().clone() if torch.is_tensor(argument) else argument for argument in arguments]
    result = body(*arguments)
    return arguments[-1] if result is None else result


@pytest.mark.parametrize("name", OPERATORS)
def test_a_fused_body_gives_the_same_for_every_batch_size_and_compiles_twice(name, fuse_on_cpu, monkeypatch):
    fuse, count_graphs = fuse_on_cpu
    fused = fuse(name)
    for images in (5, 9, 13):
        with monkeypatch.context() as patch:  # other operators are not fused, nor is this one
            patch.setattr(sinkhorn_ext.fused, "devices", ())
            arguments = operator_arguments(torch.float64, "cpu", images=images)[name]
            expected = run_body(fused, arguments)
        result = run_body(fused, arguments)
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-15)
    assert count_graphs() == 2


def test_during_the_capture_of_a_cuda_graph_nothing_is_compiled(fuse_on_cpu, monkeypatch):
    fuse, count_graphs = fuse_on_cpu
    fused, scores = fuse("moments"), cosine_scores(5, 7, crops=2)
    expected = sinkhorn_ext._moments.in_torch.__wrapped__(scores)
    for is_capturing, graphs in ((True, 0), (False, 1), (True, 1)):
        monkeypatch.setattr(sinkhorn_ext.fused, "_is_capturing", lambda tensor, value=is_capturing: value)
        torch.testing.assert_close(fused(scores), expected)
        assert count_graphs() == graphs


def test_within_torch_compile_and_without_rows_nothing_is_compiled(fuse_on_cpu):
    fuse, count_graphs = fuse_on_cpu
    fused, scores = fuse("moments"), cosine_scores(5, 7, crops=2)
    assert torch.equal(fused(scores[:, :0]), torch.zeros(15, dtype=torch.float64)) and count_graphs() == 0
    outer = torch.compile(lambda scores: 2 * fused(scores), fullgraph=True)
    torch.testing.assert_close(outer(scores), 2 * sinkhorn_ext._moments.in_torch.__wrapped__(scores))
    assert count_graphs() == 1  # that of the whole


def test_where_torch_compile_does_not_work_plain_torch_runs_and_one_warning_says_so(fuse_on_cpu, monkeypatch):
    def broken(graph, example_inputs):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=broken))
    scores = cosine_scores(5, 7, crops=2)
    with pytest.warns(UserWarning, match="(?s)plain torch without torch.compile, .* no compiler here") as warned:
        for name in ("moments", "prototype_logsumexp"):
            body = fuse_on_cpu[0](name)
            plain = body.__wrapped__
            arguments = (scores,) if name == "moments" else (scores, None, 0.05)
            assert torch.equal(body(*arguments), plain(*arguments))
    assert len(warned) == 1 and sinkhorn_ext.fused.devices == ()


def test_an_error_that_is_not_of_torch_compile_is_raised(fuse_on_cpu):
    scores = cosine_scores(5, 7, crops=2)
    with pytest.raises(RuntimeError, match="must match"):
        fuse_on_cpu[0]("prototype_totals")(scores, None, torch.zeros(2, 6), 0.05)
    assert sinkhorn_ext.fused.devices == ("cpu",)


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="no C++ compiler")
def test_generated_code_gives_the_results_of_plain_torch():
    """With SINKHORN_EXT=fused, which makes a CPU do what GPUs do without kernels; also within torch.compile."""
    program = """
import warnings
warnings.simplefilter("error", UserWarning)
import torch
import sinkhorn_ext
from torch._dynamo.utils import counters
assert sinkhorn_ext.backend("cpu") == "torch" and "fused" in sinkhorn_ext._kernels_state
scores = torch.randn(2, 9, 7, dtype=torch.float64)
sums = torch.compile(lambda x: 1 * sinkhorn_ext.moments(x), backend="eager", fullgraph=True)(scores)
assert counters["stats"]["unique_graphs"] == 2 and sinkhorn_ext.fused.devices == ("cpu", "cuda")
sinkhorn_ext.fused.devices = ()
torch.testing.assert_close(sums, sinkhorn_ext.moments(scores), rtol=1e-12, atol=1e-15)
"""
    result = forked("-c", program, SINKHORN_EXT="fused")
    assert result.returncode == 0, result.stderr


# Which implementation runs


@pytest.mark.parametrize("device", DEVICES)
def test_backend_names_an_implementation_and_the_environment_can_force_torch(device):
    name = backend(device)
    assert name == backend(torch.device(device))
    assert name in ("torch", {"cpu": "cpp", "cuda": "cuda"}[device])
    assert name == "torch" or os.environ.get("SINKHORN_EXT") != "torch"
    assert backend("meta") == "torch"


def test_built_kernels_are_used_unless_the_environment_says_torch():
    suffixes = importlib.machinery.EXTENSION_SUFFIXES
    is_built = any((ROOT / "sinkhorn_ext" / f"_C{suffix}").exists() for suffix in suffixes)
    assert backend("cpu") == ("cpp" if is_built and os.environ.get("SINKHORN_EXT") != "torch" else "torch")


@pytest.mark.skipif(not IS_COMPILED, reason="no compiled kernels")
def test_build_info_describes_the_kernels():
    info = sinkhorn_ext._C.build_info()
    assert info["compiler"].startswith(("GCC ", "Clang ", "MSVC ")) and info["cxx_standard"].startswith("C++")
    assert torch.__version__.startswith(info["torch"])
    (file,) = (ROOT / "sinkhorn_ext").glob("_C.*")
    assert f"sinkhorn_ext for torch {info['torch']}".encode() in file.read_bytes()  # told if it does not load
    if backend("cuda") == "cuda":
        assert info["cuda"].split(".")[0] == torch.version.cuda.split(".")[0] and info["cuda_architectures"]
    else:
        assert info["cuda"] is None and info["cuda_architectures"] is None
    assert info["threads"] == (torch.get_num_threads() if info["openmp"] else 1)
    has_code_paths = info["compiler"].startswith("GCC") and (sys.platform, platform.machine()) == ("linux", "x86_64")
    if has_code_paths and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        assert info["cpu_capability"] in ("avx2", "x86-64-v3", "x86-64-v4")
    else:
        assert info["cpu_capability"]


def test_the_report_names_the_backends_and_tells_how_the_kernels_were_built():
    lines = lines_of(forked("-m", "sinkhorn_ext"))
    assert all(lines[f"backend on {device}"] == backend(device) for device in ("cpu", "cuda"))
    assert torch.__version__ in lines["torch"] and lines["Python"] == platform.python_version()
    assert (lines["compiled kernels"].startswith("_C.")) == IS_COMPILED
    assert lines["plain torch, fused on"] == (", ".join(sinkhorn_ext.fused.devices) or "no device")
    for name, value in sinkhorn_ext._C.build_info().items() if IS_COMPILED else []:
        assert lines[f"  {name}"] == str(value) or name == "threads"


def lines_of(report):
    """Return the lines of the report that `python -m sinkhorn_ext` prints, as a dict."""
    assert report.returncode == 0, report.stderr
    return {line[:22].rstrip(): line[22:] for line in report.stdout.splitlines()}


@pytest.fixture
def run_copy(tmp_path):
    """Run `python -m sinkhorn_ext` with a copy of the folder that has no compiled kernels."""
    shutil.copytree(ROOT / "sinkhorn_ext", tmp_path / "sinkhorn_ext", ignore=shutil.ignore_patterns("_C.*", "__pyc*"))

    def run(**variables):
        return forked("-m", "sinkhorn_ext", folder=tmp_path, **{"SINKHORN_EXT": "", **variables})

    return run


def test_without_kernels_it_runs_in_plain_torch_without_a_warning(run_copy):
    result = run_copy()
    assert lines_of(result)["backend on cpu"] == "torch" and lines_of(result)["compiled kernels"] == "not built"
    assert result.stderr == ""


def test_kernels_that_do_not_load_cause_one_warning_with_the_reason(run_copy, tmp_path):
    (tmp_path / "sinkhorn_ext" / "_C.abi3.so").write_text("not a library, but sinkhorn_ext for torch 1.2.3")
    result = run_copy()
    assert lines_of(result)["backend on cpu"] == "torch"
    assert lines_of(result)["compiled kernels"].startswith("built, but does not load: ")
    assert result.stderr.count("UserWarning: sinkhorn_ext runs in plain torch") == 1
    assert "_C.abi3.so" in result.stderr and "pip install" in result.stderr
    assert f"They were built for torch 1.2.3, this is {torch.__version__}. " in result.stderr
    result = run_copy(SINKHORN_EXT="torch")
    assert "SINKHORN_EXT=torch" in lines_of(result)["compiled kernels"] and result.stderr == ""


@pytest.mark.skipif(not IS_COMPILED, reason="no compiled kernels to copy")
def test_kernels_load_only_for_the_torch_and_the_operators_that_they_were_compiled_for(run_copy, tmp_path):
    (library,) = (ROOT / "sinkhorn_ext").glob("_C.*")
    shutil.copy(library, tmp_path / "sinkhorn_ext")
    result = run_copy()
    assert lines_of(result)["backend on cpu"] == "cpp" and result.stderr == ""
    copy, version = tmp_path / "sinkhorn_ext" / library.name, f"sinkhorn_ext for torch {torch.__version__[0]}".encode()
    copy.write_bytes(library.read_bytes().replace(version, version[:-1] + b"1"))
    result = run_copy()
    assert lines_of(result)["backend on cpu"] == "torch" and "They were built for torch 1." in result.stderr
    shutil.copy(library, copy)
    source = tmp_path / "sinkhorn_ext" / "__init__.py"
    source.write_text(source.read_text().replace("potentials(Tensor scores,", "potentials(int another, Tensor scores,"))
    result = run_copy()
    assert lines_of(result)["backend on cpu"] == "torch"
    assert "UserWarning: sinkhorn_ext runs in plain torch" in result.stderr


def test_an_unknown_choice_of_implementation_is_refused(run_copy):
    assert "ValueError: SINKHORN_EXT: expected torch, fused or nothing" in run_copy(SINKHORN_EXT="cuda").stderr
