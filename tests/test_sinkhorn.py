"""The codes and the swapped loss of sinkhorn_ext against the float64 reference, on every device at hand."""

import os
from itertools import product

import pytest
import reference
import torch
import torch.distributed as dist
from conftest import run_processes

from sinkhorn_ext import backend, sinkhorn, sinkhorn_potentials, swav_loss

HAS_CUDA = torch.cuda.is_available()
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not HAS_CUDA, reason="no GPU"))]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SIZES = [1, 17, 129, 3000]


def cosines(nmb_images, nmb_prototypes, *, crops=None, seed=0, dtype=torch.float32, device="cpu"):
    """Scores as in training, products of unit vectors: [B, K], or [crops, B, K]."""
    generator = torch.Generator().manual_seed(seed)
    lead = () if crops is None else (crops,)
    images = torch.randn(*lead, nmb_images, 16, generator=generator, dtype=torch.float64)
    prototypes = torch.randn(nmb_prototypes, 16, generator=generator, dtype=torch.float64)
    unit = torch.nn.functional.normalize
    return (unit(images, dim=-1) @ unit(prototypes, dim=-1).T).to(device, dtype)


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
    "potentials of two dimensions": lambda: sinkhorn_potentials(X),
    "potentials with other extra crops": lambda: sinkhorn_potentials(X[None], extra=torch.zeros(2, 3, 6)),
    "loss of two dimensions": lambda: swav_loss(X, X[:2]),
    "loss of whole numbers": lambda: swav_loss(X.expand(3, 4, 6).long(), X[:2]),
    "loss with too few potentials": lambda: swav_loss(X.expand(3, 4, 6), X[:1]),
    "loss with other prototypes": lambda: swav_loss(X.expand(3, 4, 6), X[:2, :5]),
    "loss with a crop too high": lambda: swav_loss(X.expand(3, 4, 6), X[:2], crops_for_assign=(0, 3)),
    "loss with a crop below 0": lambda: swav_loss(X.expand(3, 4, 6), X[:2], crops_for_assign=(0, -1)),
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


@pytest.mark.parametrize("device", DEVICES)
def test_backend_names_an_implementation_and_the_environment_can_force_torch(device):
    name = backend(device)
    assert name == backend(torch.device(device))
    assert name in ("torch", {"cpu": "cpp", "cuda": "cuda"}[device])
    assert name == "torch" or os.environ.get("SINKHORN_EXT") != "torch"
