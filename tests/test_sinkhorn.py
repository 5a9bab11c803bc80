"""The codes and the swapped loss of sinkhorn_ext against the float64 reference, on every device at hand.

check.sh runs this file twice: with the compiled kernels, and in plain torch (SINKHORN_EXT=torch).
"""

import os
import re
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import reference
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import DEVICES, needs_gpu, run_processes

import sinkhorn_ext
from sinkhorn_ext import backend, sinkhorn, sinkhorn_potentials, swav_loss

HOUSE = Path(__file__).resolve().parent.parent
IS_COMPILED = backend("cpu") == "cpp"
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SIZES = [1, 17, 129, 3000]


def cosines(nmb_images, nmb_prototypes, *, crops=None, seed=0, dtype=torch.float32, device="cpu"):
    """Scores as in training, products of unit vectors: [B, K], or [crops, B, K]."""
    generator = torch.Generator().manual_seed(seed)
    lead = () if crops is None else (crops,)
    images = torch.randn(*lead, nmb_images, 16, generator=generator, dtype=torch.float64)
    prototypes = torch.randn(nmb_prototypes, 16, generator=generator, dtype=torch.float64)
    return (F.normalize(images, dim=-1) @ F.normalize(prototypes, dim=-1).T).to(device, dtype)


def unnormalised(nmb_images, nmb_prototypes, *, dtype=torch.float32, device="cpu"):
    """Scores [B, K] as of vectors that nobody scaled: N(0, 100^2)."""
    generator = torch.Generator().manual_seed(1)
    return (100 * torch.randn(nmb_images, nmb_prototypes, generator=generator)).to(device, dtype)


def naive_sinkhorn(scores, epsilon=0.05, iterations=3):
    """The matrix form as one writes it first, in the dtype of the scores, shifted so that exp cannot overflow."""
    q = torch.exp(scores / epsilon - (scores / epsilon).max())
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(dim=0, keepdim=True) / q.shape[1]
        q = q / q.sum(dim=1, keepdim=True) / q.shape[0]
    return q / q.sum(dim=1, keepdim=True)


def logit_rounding(scores, epsilon, dtype):
    """Relative error of exp(scores / epsilon) that the rounding of one logit brings in."""
    return (scores.double().abs().max() / epsilon).item() * torch.finfo(dtype).eps


def max_error(codes, expected):
    """Largest absolute error; infinite where the codes are not numbers."""
    return (codes.double() - expected).abs().nan_to_num(nan=torch.inf).max().item()


# Codes


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("nmb_images, nmb_prototypes", list(product(SIZES, SIZES)))
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_at_most_twice_that_of_naive_torch(dtype, nmb_images, nmb_prototypes, device):
    if nmb_images == nmb_prototypes == 3000 and dtype != torch.float32:
        pytest.skip("one dtype is enough at this size")
    scores = cosines(nmb_images, nmb_prototypes, dtype=dtype, device=device)
    expected = reference.sinkhorn(scores)
    codes = sinkhorn(scores)
    floor = 4 * logit_rounding(scores, 0.05, codes.dtype) * expected.max().item()
    assert max_error(codes, expected) <= 2 * max_error(naive_sinkhorn(scores), expected) + floor


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread, epsilon", [(None, 0.01), (100, 0.05), (100, 0.01)])
def test_small_epsilon_and_unnormalised_scores_give_finite_and_right_codes(spread, epsilon, dtype, device):
    scores = cosines(129, 300, dtype=dtype, device=device)
    if spread:
        scores = unnormalised(129, 300, dtype=dtype, device=device)
    codes = sinkhorn(scores, epsilon)
    assert codes.isfinite().all()
    assert max_error(codes, reference.sinkhorn_log(scores, epsilon)) <= logit_rounding(scores, epsilon, codes.dtype)


@pytest.mark.parametrize("device", DEVICES)
def test_scores_up_to_1e6_epsilon_give_finite_codes_loss_and_gradient(device):
    scores = torch.stack([unnormalised(65, 300, device=device), -unnormalised(65, 300, device=device)])
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
def test_rows_far_apart_give_finite_and_right_codes(iterations, device):
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        nmb_images, nmb_prototypes = torch.randint(1, 20, (2,), generator=generator).tolist()
        scores = 1.5 * torch.randn(nmb_images, 1, generator=generator)
        scores = (scores + 0.1 * torch.randn(nmb_images, nmb_prototypes, generator=generator)).to(device)
        expected = reference.sinkhorn_log(scores, 0.05, iterations)
        potentials = sinkhorn_potentials(scores.unsqueeze(0), 0.05, iterations)  # which drift by log(B / K) a round
        rounding = logit_rounding(scores, 0.05, torch.float32) + logit_rounding(potentials, 1, torch.float32)
        assert max_error(sinkhorn(scores, 0.05, iterations), expected) <= rounding


@pytest.mark.parametrize("device", DEVICES)
def test_out_that_is_scores_is_refused_or_served_right(device):
    scores = unnormalised(12, 9, device=device)
    expected = sinkhorn(scores)
    if backend(device) == "torch":
        assert torch.equal(sinkhorn(scores, out=scores), expected)
    else:
        with pytest.raises(RuntimeError, match="single memory location"):
            sinkhorn(scores, out=scores)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_are_float32_or_float64_and_rows_sum_to_one(dtype, device):
    codes = sinkhorn(cosines(129, 3000, dtype=dtype, device=device))
    assert codes.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert codes.shape == (129, 3000) and codes.device.type == device and (codes >= 0).all()
    torch.testing.assert_close(codes.double().sum(dim=1).cpu(), torch.ones(129).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_scores_are_only_read_not_computed_with(dtype, device):
    scores = cosines(129, 17, dtype=dtype, device=device)
    torch.testing.assert_close(sinkhorn(scores), sinkhorn(scores.float()), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("iterations", [1, 2, 3, 10])
def test_any_number_of_iterations_follows_the_reference(iterations, device):
    scores = cosines(40, 25, dtype=torch.float64, device=device)
    torch.testing.assert_close(sinkhorn(scores, 0.1, iterations), reference.sinkhorn(scores, 0.1, iterations))


@pytest.mark.parametrize("device", DEVICES)
def test_prototype_totals_are_those_of_the_reference_not_uniform(device):
    scores = cosines(300, 40, dtype=torch.float64, device=device)
    totals, expected = sinkhorn(scores).sum(dim=0), reference.sinkhorn(scores).sum(dim=0)
    torch.testing.assert_close(totals, expected)
    assert (expected * 40 / 300 - 1).abs().max() > 0.02  # three rounds are short of balance, and have to be


LAYOUTS = {
    "transposed": lambda x: x.T,
    "rows apart": lambda x: x[::3],
    "columns apart": lambda x: x[:, 1::2],
    "one row repeated": lambda x: x[:1].expand(9, -1),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_stride_is_read_right_and_never_written(layout, device):
    whole = cosines(60, 44, device=device)
    before = whole.clone()
    scores = LAYOUTS[layout](whole)
    codes = sinkhorn(scores, extra=scores)
    torch.testing.assert_close(codes.double(), reference.sinkhorn(scores, extra=scores), rtol=1e-5, atol=1e-7)
    assert torch.equal(whole, before)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", [0.0, 0.7, -300.0])
@pytest.mark.parametrize("nmb_images, nmb_prototypes", [(1, 129), (17, 3000), (129, 17)])
def test_equal_scores_give_uniform_codes(nmb_images, nmb_prototypes, value, device):
    codes = sinkhorn(torch.full((nmb_images, nmb_prototypes), value, device=device))
    torch.testing.assert_close(codes, torch.full_like(codes, 1 / nmb_prototypes), rtol=1e-6, atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("where", [(0, 0), (7, 5), (39, 24)])
def test_one_nan_makes_all_codes_nan(where, device):
    scores = cosines(40, 25, device=device)
    scores[where] = torch.nan
    assert sinkhorn(scores).isnan().all()
    assert sinkhorn(cosines(40, 25, device=device), extra=scores).isnan().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("epsilon", [0.05, 0.01])
@pytest.mark.parametrize("with_extra", [False, True])
def test_masked_prototypes_and_images_take_no_part(with_extra, epsilon, device):
    scores = cosines(40, 25, dtype=torch.float64, device=device)
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
    torch.testing.assert_close(codes[images][:, prototypes], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("nmb_images, nmb_prototypes", [(3, 65_536), (2, 10_000), (5000, 3)])
def test_extreme_sizes_follow_the_reference(nmb_images, nmb_prototypes, device):
    scores = cosines(nmb_images, nmb_prototypes, device=device)
    expected = reference.sinkhorn(scores)
    floor = 4 * logit_rounding(scores, 0.05, torch.float32) * expected.max().item()
    assert max_error(sinkhorn(scores), expected) <= 2 * max_error(naive_sinkhorn(scores), expected) + floor
    batch = cosines(nmb_images, nmb_prototypes, crops=3, device=device)
    assert_loss_and_gradient(batch, (0, 1), 2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_threads_does_not_change_a_bit(dtype):
    if not IS_COMPILED:
        pytest.skip("torch itself makes no such promise")
    scores, batch = cosines(300, 301, dtype=dtype), cosines(40, 3001, crops=4, dtype=dtype)
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
def test_two_calls_agree_bit_for_bit(dtype, device):
    scores, extra = cosines(129, 301, dtype=dtype, device=device), cosines(33, 301, seed=1, dtype=dtype, device=device)
    assert torch.equal(sinkhorn(scores, extra=extra), sinkhorn(scores, extra=extra))
    batch = cosines(17, 301, crops=4, dtype=dtype, device=device)
    potentials = sinkhorn_potentials(batch[:2])
    assert torch.equal(potentials, sinkhorn_potentials(batch[:2]))
    assert torch.equal(swav_loss(batch, potentials), swav_loss(batch, potentials))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("nmb_extra", [0, 1, 50])
def test_extra_rows_join_the_balance_and_get_no_codes(nmb_extra, device):
    scores = cosines(20, 30, dtype=torch.float64, device=device)
    extra = cosines(nmb_extra, 30, seed=1, dtype=torch.float64, device=device)
    codes = sinkhorn(scores, extra=extra)
    torch.testing.assert_close(codes, reference.sinkhorn(scores, extra=extra))
    torch.testing.assert_close(codes, sinkhorn(torch.cat([scores, extra]))[:20])
    assert torch.allclose(codes, sinkhorn(scores)) == (nmb_extra == 0)


@pytest.mark.parametrize("device", DEVICES)
def test_an_empty_batch_gives_empty_codes(device):
    assert sinkhorn(torch.empty(0, 5, device=device)).shape == (0, 5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_out_receives_the_codes_and_is_returned(layout, device):
    scores = cosines(12, 9, device=device)
    out = torch.full((9, 12), torch.nan, device=device).T
    out = out.contiguous() if layout == "contiguous" else out
    assert sinkhorn(scores, out=out) is out
    assert torch.equal(out, sinkhorn(scores))


@pytest.mark.parametrize("device", DEVICES)
def test_several_problems_at_once_are_independent(device):
    scores = cosines(12, 9, crops=3, dtype=torch.float64, device=device)
    extra = cosines(7, 9, crops=3, seed=1, dtype=torch.float64, device=device)
    potentials = sinkhorn_potentials(scores, 0.1, 2, extra=extra)
    assert potentials.shape == (3, 9) and potentials.dtype == torch.float64
    for a in range(3):
        codes = torch.softmax(scores[a] / 0.1 + potentials[a], dim=1)
        torch.testing.assert_close(codes, sinkhorn(scores[a], 0.1, 2, extra=extra[a]))


X = torch.zeros(4, 6)
REFUSED = {
    "one dimension": lambda: sinkhorn(X[0]),
    "three dimensions": lambda: sinkhorn(X[None]),
    "whole numbers": lambda: sinkhorn(X.long()),
    "no prototypes": lambda: sinkhorn(X[:, :0]),
    "epsilon 0": lambda: sinkhorn(X, epsilon=0),
    "epsilon below 0": lambda: sinkhorn(X, epsilon=-0.05),
    "no iterations": lambda: sinkhorn(X, iterations=0),
    "extra with other prototypes": lambda: sinkhorn(X, extra=X[:, :5]),
    "extra of one dimension": lambda: sinkhorn(X, extra=X[0]),
    "extra of whole numbers": lambda: sinkhorn(X, extra=X.long()),
    "out of other shape": lambda: sinkhorn(X, out=torch.empty(6, 4)),
    "out of other dtype": lambda: sinkhorn(X, out=torch.empty(4, 6, dtype=torch.float64)),
    "out with gradient": lambda: sinkhorn(X, out=torch.empty(4, 6, requires_grad=True)),
    "potentials of two dimensions": lambda: sinkhorn_potentials(X),
    "potentials with other extra crops": lambda: sinkhorn_potentials(X[None], extra=torch.zeros(2, 3, 6)),
    "loss of two dimensions": lambda: swav_loss(X, X[:2]),
    "loss of whole numbers": lambda: swav_loss(X.expand(3, 4, 6).long(), X[:2]),
    "loss with too few potentials": lambda: swav_loss(X.expand(3, 4, 6), X[:1]),
    "loss with other prototypes": lambda: swav_loss(X.expand(3, 4, 6), X[:2, :5]),
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

# Per process: images, extra rows.
TWO_PROCESSES = [([12, 12], [0, 0]), ([20, 4], [3, 8]), ([24, 0], [0, 5]), ([0, 9], [0, 0])]
THREE_PROCESSES = [([8, 8, 8], [8, 8, 8]), ([1, 0, 16], [0, 7, 2]), ([0, 0, 5], [0, 0, 0])]


def shards(sizes, extra_sizes):
    scores = cosines(sum(sizes), 30, dtype=torch.float64).split(sizes)
    extra = cosines(sum(extra_sizes), 30, seed=1, dtype=torch.float64).split(extra_sizes)
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


def assert_rows_of_one_process(results, cases):
    for case, (sizes, extra_sizes) in enumerate(cases):
        scores, extra = (torch.cat(parts) for parts in shards(sizes, extra_sizes))
        codes = torch.cat([of_rank[case][0] for of_rank in results])
        torch.testing.assert_close(codes, reference.sinkhorn(scores, extra=extra))
        torch.testing.assert_close(codes, sinkhorn(scores, extra=extra), rtol=1e-12, atol=1e-15)
        assert all(torch.equal(of_rank[case][1], results[0][case][1]) for of_rank in results)


def test_two_processes_give_the_rows_of_one():
    assert_rows_of_one_process(run_processes(codes_of_shards, 2, TWO_PROCESSES), TWO_PROCESSES)


def test_three_processes_give_the_rows_of_one_and_a_group_balances_its_own():
    sizes = [6, 7, 8]
    results = run_processes(codes_of_two_of_three, 3, sizes)
    assert_rows_of_one_process([of_all for of_all, _ in results], THREE_PROCESSES)
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
def test_loss_and_gradient_follow_the_reference(nmb_crops, crops_for_assign, dtype, device):
    tolerance = {torch.float64: 1e-10, torch.float32: 2e-5}.get(dtype, torch.finfo(dtype).eps)
    scores = cosines(17, 129, crops=nmb_crops, dtype=dtype, device=device)
    assert_loss_and_gradient(scores, crops_for_assign, tolerance)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("temperature, epsilon", [(0.3, 0.05), (0.1, 0.02), (1.0, 1.0)])
def test_loss_follows_temperature_and_epsilon(temperature, epsilon, device):
    scores = cosines(9, 20, crops=3, dtype=torch.float64, device=device)
    assert_loss_and_gradient(scores, (0, 1), 1e-10, temperature=temperature, epsilon=epsilon)


@pytest.mark.parametrize("device", DEVICES)
def test_loss_of_strided_scores_follows_the_reference_and_leaves_them(device):
    whole = cosines(20, 17, crops=8, device=device)
    before = whole.clone()
    assert_loss_and_gradient(whole[::2].transpose(1, 2), (0, 1), 2e-5)
    assert torch.equal(whole, before)


def naive_loss(scores, potentials, crops_for_assign):
    """The loss as one writes it first, in the dtype of the scores."""
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
    scores = cosines(nmb_images, nmb_prototypes, crops=4, dtype=dtype, device=device).requires_grad_()
    exact = scores.detach().double().requires_grad_()
    potentials = sinkhorn_potentials(exact.detach()[:2])
    losses = [naive_loss(exact, potentials, (0, 1)), naive_loss(scores, potentials, (0, 1))]
    losses.append(swav_loss(scores, potentials))
    grads = [torch.autograd.grad(losses[0], exact)[0]] + [torch.autograd.grad(loss, scores)[0] for loss in losses[1:]]
    # Both potentials in float32 and a gradient in half precision are rounded once, whatever computes them.
    rounding = logit_rounding(scores, 0.05, potentials.float().dtype if dtype != torch.float64 else dtype)
    rounding += torch.finfo(dtype).eps if dtype in (torch.bfloat16, torch.float16) else 0
    for exact_value, naive, ours in (losses, grads):
        floor = 4 * rounding * exact_value.abs().max().item()
        assert max_error(ours, exact_value) <= 2 * max_error(naive, exact_value) + floor


@pytest.mark.parametrize("device", DEVICES)
def test_masked_prototypes_get_no_gradient_and_leave_the_loss_as_without_them(device):
    scores = cosines(9, 20, crops=4, dtype=torch.float64, device=device)
    masked = scores.clone()
    masked[:, :, 5] = -torch.inf
    others = [k for k in range(20) if k != 5]
    results = []
    for leaf in (masked.requires_grad_(), scores[:, :, others].requires_grad_()):
        loss = swav_loss(leaf, sinkhorn_potentials(leaf[:2]))
        results.append((loss, torch.autograd.grad(loss, leaf)[0]))
    torch.testing.assert_close(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1][:, :, others], results[1][1])
    assert not results[0][1][:, :, 5].any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
@pytest.mark.parametrize("crop, crops_for_assign", [(3, (0, 1)), (0, (0, 1)), (0, (0,))])
def test_loss_and_gradient_of_a_nan_or_of_a_masked_image_are_nan(crop, crops_for_assign, value, device):
    scores = cosines(9, 20, crops=4, device=device)
    potentials = sinkhorn_potentials(scores[list(crops_for_assign)])
    scores[crop, 4] = value
    loss = swav_loss(scores.requires_grad_(), potentials, crops_for_assign=crops_for_assign)
    assert loss.isnan()
    (grad,) = torch.autograd.grad(loss, scores)
    assert grad[crop, 4].isnan().all() and grad[:, 5:].isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
def test_loss_of_unnormalised_scores_is_finite_and_right(device):
    assert_loss_and_gradient(unnormalised(51, 20, device=device).unflatten(0, (3, 17)), (0, 1), 5e-3)


@pytest.mark.parametrize("device", DEVICES)
def test_gradcheck_in_float64(device):
    scores = cosines(3, 4, crops=4, dtype=torch.float64, device=device).requires_grad_()
    potentials = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(device)

    # The codes count as constants: with a vast epsilon they are, so that finite differences see what backward sees.
    def loss(scores):
        return swav_loss(scores, potentials, crops_for_assign=(2, 0), epsilon=1e9)

    assert torch.autograd.gradcheck(loss, (scores,))


@pytest.mark.parametrize("device", DEVICES)
def test_codes_and_potentials_carry_no_gradient(device):
    scores = cosines(5, 7, crops=3, device=device).requires_grad_()
    assert not sinkhorn(scores[0], extra=scores[1]).requires_grad
    assert not sinkhorn_potentials(scores[:2], extra=scores[1:]).requires_grad


@pytest.mark.parametrize("device", DEVICES)
def test_the_loss_sends_no_gradient_into_potentials(device):
    scores = cosines(5, 7, crops=3, device=device).requires_grad_()
    potentials = sinkhorn_potentials(scores[:2]).requires_grad_()
    swav_loss(scores, potentials).backward()
    assert potentials.grad is None


# The operators


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("nmb_queued", [0, 6])
@pytest.mark.parametrize("nmb_images", [0, 9])
@pytest.mark.parametrize("nmb_prototypes", [17, 1500, 3000, 4096, 5000])
def test_what_processes_exchange_is_that_of_plain_torch(nmb_prototypes, nmb_images, nmb_queued, device):
    """Kernels that a run of one process does not meet; in float64, beside float32."""
    rows, queued = (cosines(n + 1, nmb_prototypes, crops=2, device=device)[:, 1:] for n in (nmb_images, nmb_queued))
    extra = queued if nmb_queued else None
    potentials = torch.randn(2, nmb_prototypes, generator=torch.Generator().manual_seed(0)).to(device)
    for name, more in (("prototype_logsumexp", (0.05,)), ("prototype_totals", (potentials, 0.05))):
        found = getattr(torch.ops.sinkhorn_ext, name)(rows, extra, *more)
        exact = [value.double() if torch.is_tensor(value) else value for value in (rows, extra, *more)]
        expected = getattr(sinkhorn_ext, f"_{name}").in_torch(*exact)
        torch.testing.assert_close(found.double(), expected, rtol=5e-5, atol=1e-6)


def operator_arguments(dtype, device):
    scores, extra = (cosines(n, 17, crops=4, dtype=dtype, device=device) for n in (5, 3))
    potentials = sinkhorn_potentials(scores[:2])
    out = torch.empty(5, 17, dtype=potentials.dtype, device=device)
    logsumexps = torch.randn(6, 5, device=device).to(potentials.dtype)
    return {
        "prototype_logsumexp": (scores, extra, 0.05),
        "prototype_totals": (scores[:2], extra[:2], potentials, 0.05),
        "potentials": (scores, extra, 0.05, 3),
        "codes": (scores[0], potentials[0], 0.05, out),
        "sinkhorn": (scores[0], extra[0], 0.05, 3, out),
        "swapped_loss": (scores.clone().requires_grad_(), potentials, [0, 1], 0.1, 0.05),
        "swapped_loss_backward": (potentials.sum(), scores.detach(), potentials, logsumexps, [0, 1], 0.1, 0.05),
    }


OPERATORS = list(operator_arguments(torch.float32, "cpu"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name, dtype, device):
    torch.library.opcheck(getattr(torch.ops.sinkhorn_ext, name).default, operator_arguments(dtype, device)[name])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", OPERATORS)
def test_compiled_operators_refuse_what_does_not_fit(name, device):
    if backend(device) == "torch":
        pytest.skip("plain torch has its own words")
    arguments = list(operator_arguments(torch.float32, device)[name])
    tensors = [i for i, argument in enumerate(arguments) if isinstance(argument, torch.Tensor) and argument.dim() > 1]
    for i in tensors:
        wrong = [a.detach()[..., :-1] if j == i else a for j, a in enumerate(arguments)]
        if name != "prototype_logsumexp" or len(tensors) > 1:
            with pytest.raises(RuntimeError, match="expected .* got "):
                getattr(torch.ops.sinkhorn_ext, name)(*wrong)


@needs_gpu
@pytest.mark.parametrize("nmb_prototypes", [300, 3000, 10_000])
def test_replaying_a_cuda_graph_equals_eager(nmb_prototypes):
    scores = cosines(64, nmb_prototypes, crops=4, device="cuda").requires_grad_()

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
            scores.copy_(cosines(64, nmb_prototypes, crops=4, seed=seed))
        graph.replay()
        replayed = [result.clone() for result in captured]
        assert all(torch.equal(a, b) for a, b in zip(replayed, step(), strict=True))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_the_compiled_loss_holds_no_second_matrix():
    if not IS_COMPILED:
        pytest.skip("plain torch does")
    program = """
import torch
from sinkhorn_ext import sinkhorn_potentials, swav_loss

def kib(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))

def step(scores):
    swav_loss(scores, sinkhorn_potentials(scores.detach()[:2])).backward()

step(torch.rand(8, 2, 3000, requires_grad=True))
scores = torch.rand(8, 256, 3000, requires_grad=True)
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
before = kib("VmRSS")
step(scores)
print((kib("VmHWM") - before) * 1024 / scores.nbytes)
"""
    peak = subprocess.run([sys.executable, "-c", program], cwd=HOUSE, capture_output=True, text=True, check=True)
    assert 0.9 < float(peak.stdout) < 1.4  # the gradient, and the totals of the slabs


# Which implementation runs


@pytest.mark.parametrize("device", DEVICES)
def test_backend_names_an_implementation_and_the_environment_can_force_torch(device):
    name = backend(device)
    assert name == backend(torch.device(device))
    assert name in ("torch", {"cpu": "cpp", "cuda": "cuda"}[device])
    assert name == "torch" or os.environ.get("SINKHORN_EXT") != "torch"
    assert backend("meta") == "torch"


def test_built_kernels_are_used_unless_the_environment_says_torch():
    is_built = any((HOUSE / "sinkhorn_ext").glob("_C.*"))
    assert backend("cpu") == ("cpp" if is_built and os.environ.get("SINKHORN_EXT") != "torch" else "torch")


@pytest.fixture
def imported(tmp_path):
    """Imports a copy of the folder without compiled kernels, in a fresh process: its backend, and what it warned."""
    shutil.copytree(HOUSE / "sinkhorn_ext", tmp_path / "sinkhorn_ext", ignore=shutil.ignore_patterns("_C.*", "__pyc*"))

    def run(sinkhorn_ext_variable=None):
        environment = {name: value for name, value in os.environ.items() if name != "SINKHORN_EXT"}
        if sinkhorn_ext_variable is not None:
            environment["SINKHORN_EXT"] = sinkhorn_ext_variable
        program = "import sinkhorn_ext; print(sinkhorn_ext.backend('cpu'))"
        return subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
        )

    return run


def test_without_kernels_torch_serves_silently(imported):
    result = imported()
    assert (result.returncode, result.stdout, result.stderr) == (0, "torch\n", "")


def test_kernels_that_do_not_load_are_said_once_with_the_reason(imported, tmp_path):
    (tmp_path / "sinkhorn_ext" / "_C.abi3.so").write_text("not a library")
    result = imported()
    assert (result.returncode, result.stdout) == (0, "torch\n")
    assert len(re.findall("UserWarning: sinkhorn_ext runs in plain torch", result.stderr)) == 1
    assert "_C.abi3.so" in result.stderr and "pip install" in result.stderr
    assert imported("torch").stderr == ""


@pytest.mark.skipif(not IS_COMPILED, reason="no compiled kernels to put beside other operators")
def test_kernels_of_other_operators_are_said_and_left_out(imported, tmp_path):
    (library,) = (HOUSE / "sinkhorn_ext").glob("_C.*")
    shutil.copy(library, tmp_path / "sinkhorn_ext")
    source = tmp_path / "sinkhorn_ext" / "__init__.py"
    source.write_text(source.read_text().replace("potentials(Tensor scores,", "potentials(int another, Tensor scores,"))
    result = imported()
    assert result.returncode == 0 and "UserWarning: sinkhorn_ext runs in plain torch" in result.stderr


def test_an_unknown_choice_of_implementation_is_refused(imported):
    assert "ValueError: SINKHORN_EXT: expected torch or nothing" in imported("cuda").stderr
