"""LARS and the learning-rate schedule against the float64 reference."""

import io
import math

import pytest
import reference
import torch

import optim
from optim import LARS, warmup_cosine

SHAPES = {
    "conv": (4, 3, 3, 3),
    "linear": (5, 4),
    "bias": (5,),
    "scalar": (),
    "zero parameter": (3,),
    "zero gradient": (6, 2),
    "gradient from step 4 on": (7,),
    "gradient now and then": (2, 2),
    "never a gradient": (2,),
}
GROUPS = [  # options, names
    (dict(lr=0.6, weight_decay=1e-6), ["conv", "zero parameter", "gradient from step 4 on", "never a gradient"]),
    (dict(lr=4.8, weight_decay=0.3), ["linear", "bias", "scalar", "zero gradient", "gradient now and then"]),
]


def new_params(dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    params = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}
    params["zero parameter"].zero_()
    return {name: p.to(device, dtype).requires_grad_() for name, p in params.items()}


def gradients(step, dtype=torch.float64):
    generator = torch.Generator().manual_seed(100 + step)
    grads = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}
    grads["zero gradient"].zero_()
    absent = {"never a gradient"}
    absent |= {"gradient from step 4 on"} if step < 4 else set()
    absent |= {"gradient now and then"} if step % 3 else set()
    return {name: None if name in absent else grad.to(dtype) for name, grad in grads.items()}


def new_optimizer(params, **options):
    groups = [dict(params=[params[name] for name in names], **own) for own, names in GROUPS]
    return LARS(groups, lr=1.0, **options)


def take_step(optimizer, params, step):
    for name, grad in gradients(step, next(iter(params.values())).dtype).items():
        params[name].grad = None if grad is None else grad.to(params[name].device)
    for group, (own, _) in zip(optimizer.param_groups, GROUPS, strict=True):
        group["lr"] = own["lr"] / (1 + step)
    optimizer.step()


@pytest.mark.parametrize("form", ["of CPUs", "of GPUs"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("options", [{}, dict(momentum=0.5, trust_coefficient=0.02, eps=0.1), dict(momentum=0.0)])
def test_ten_steps_follow_the_reference(options, dtype, tolerance, form, monkeypatch):
    if form == "of GPUs":
        monkeypatch.setattr(optim, "_update_one_by_one", optim._update_together)
    params = new_params(dtype)
    expected, buffers = {name: p.detach().double().clone() for name, p in params.items()}, {}
    optimizer = new_optimizer(params, **options)
    for step in range(10):
        take_step(optimizer, params, step)
        for own, names in GROUPS:
            group = {name: expected[name] for name in names}
            lr = own["lr"] / (1 + step)
            reference.lars_step(group, gradients(step, dtype), buffers, lr, own["weight_decay"], **options)
            expected |= group
        for name, p in params.items():
            torch.testing.assert_close(p.detach().double(), expected[name], rtol=tolerance, atol=tolerance)
            buffer = optimizer.state[p].get("momentum_buffer") if p in optimizer.state else None
            assert (buffer is None) == (name not in buffers), name
            if buffer is not None:
                torch.testing.assert_close(buffer.double(), buffers[name], rtol=tolerance, atol=tolerance)


def test_where_the_parameter_or_the_gradient_is_zero_the_gradient_counts_as_it_is():
    zero, still = torch.zeros(3, requires_grad=True), torch.ones(3, requires_grad=True)
    zero.grad, still.grad = torch.tensor([1.0, -2.0, 3.0]), torch.zeros(3)
    LARS([zero, still], lr=0.5, weight_decay=0.1).step()
    assert torch.equal(zero.detach(), -0.5 * zero.grad)
    assert torch.equal(still.detach(), torch.ones(3))


def test_gradients_are_left_as_they_were():
    params = new_params()
    optimizer = new_optimizer(params)
    for step in range(2):
        take_step(optimizer, params, step)
        for name, grad in gradients(step).items():
            assert params[name].grad is None if grad is None else torch.equal(params[name].grad, grad)


LAYOUTS = {
    "channels_last": lambda tensor: tensor.contiguous(memory_format=torch.channels_last),
    "transposed": lambda tensor: tensor.transpose(0, 1).contiguous().transpose(0, 1),
    "every other number": lambda tensor: torch.stack([tensor, -tensor], dim=-1)[..., 0],
}


@pytest.mark.parametrize("of_p", LAYOUTS)
@pytest.mark.parametrize("of_grad", LAYOUTS)
def test_the_order_of_numbers_in_memory_does_not_matter(of_p, of_grad):
    generator = torch.Generator().manual_seed(0)
    start, grad = (torch.randn(4, 3, 5, 2, dtype=torch.float64, generator=generator) for _ in range(2))
    results = []
    for p, its_grad in ((start.clone(), grad), (LAYOUTS[of_p](start), LAYOUTS[of_grad](grad))):
        optimizer = LARS([p.requires_grad_()], lr=0.5, weight_decay=0.1)
        for _ in range(2):
            p.grad = its_grad
            optimizer.step()
        results.append(p.detach())
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)


def test_no_value_is_read_on_the_host():
    params = new_params(device="meta")  # has no values: reading one raises
    optimizer = new_optimizer(params)
    for step in range(6):
        take_step(optimizer, params, step)
    assert optimizer.state[params["conv"]]["momentum_buffer"].is_meta


def test_resumed_steps_equal_uninterrupted_ones_bit_for_bit():
    params = new_params(torch.float32)
    optimizer = new_optimizer(params, momentum=0.8)
    for step in range(3):
        take_step(optimizer, params, step)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
    other = LARS([dict(params=[resumed[name] for name in names]) for _, names in GROUPS], lr=99.0)
    other.load_state_dict(torch.load(file, weights_only=True))
    for step in range(3, 7):
        take_step(optimizer, params, step)
        take_step(other, resumed, step)
    for name, p in params.items():
        assert torch.equal(p, resumed[name]), name


def test_closure_runs_with_gradient_and_its_loss_is_returned():
    p = torch.ones(2, requires_grad=True)

    def closure():
        loss = (p * p).sum()
        loss.backward()
        return loss

    assert LARS([p], lr=0.1).step(closure).item() == 2
    assert (p < 1).all()


@pytest.mark.parametrize(
    "name, value",
    [
        *((name, value) for name in ("lr", "momentum", "weight_decay", "eps") for value in (-1e-9, math.nan)),
        *(("trust_coefficient", value) for value in (0.0, -0.001, math.nan)),
    ],
)
def test_options_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"^{name}: .*{value}"):
        LARS([torch.ones(1, requires_grad=True)], **{"lr": 0.1, name: value})


SCHEDULES = {
    "warm-up": dict(steps_per_epoch=313, epochs=100, base_lr=4.8, final_lr=0.0048, warmup_epochs=10, start_warmup=0.3),
    "no warm-up": dict(steps_per_epoch=50, epochs=20, base_lr=0.6, final_lr=0.0006),
    "warm-up from 0": dict(steps_per_epoch=7, epochs=3, base_lr=1.0, final_lr=0.5, warmup_epochs=1),
    "warm-up alone": dict(steps_per_epoch=5, epochs=2, base_lr=1.0, final_lr=0.1, warmup_epochs=2, start_warmup=0.2),
    "warm-up of one step": dict(steps_per_epoch=1, epochs=4, base_lr=1.0, final_lr=0.1, warmup_epochs=1),
    "no steps": dict(steps_per_epoch=0, epochs=4, base_lr=1.0, final_lr=0.1, warmup_epochs=1),
}


@pytest.mark.parametrize("case", SCHEDULES)
def test_schedule_follows_the_reference(case):
    rates = warmup_cosine(**SCHEDULES[case])
    assert len(rates) == SCHEDULES[case]["steps_per_epoch"] * SCHEDULES[case]["epochs"]
    assert rates == pytest.approx(reference.learning_rates(**SCHEDULES[case]), rel=1e-12)


def test_warm_up_includes_both_ends_and_the_cosine_starts_at_the_base():
    rates = warmup_cosine(10, 5, base_lr=4.8, final_lr=0.0048, warmup_epochs=2, start_warmup=0.3)
    assert rates[0] == 0.3
    assert rates[19] == pytest.approx(4.8) and rates[20] == pytest.approx(4.8)
    assert rates[1] - rates[0] == pytest.approx(rates[19] - rates[18])
    assert rates[20:] == sorted(rates[20:], reverse=True) and 0.0048 < rates[-1] < 0.05


def test_the_cosine_is_halfway_in_the_middle():
    rates = warmup_cosine(10, 4, base_lr=1.0, final_lr=0.2)
    assert rates[20] == pytest.approx(0.6)


def test_a_run_of_warm_up_alone_ends_at_the_base():
    assert warmup_cosine(4, 3, base_lr=1.0, final_lr=0.1, warmup_epochs=3)[-1] == pytest.approx(1.0)


def test_a_warm_up_longer_than_the_run_is_refused():
    with pytest.raises(ValueError, match="^warmup_epochs: .* 3 .* 4$"):
        warmup_cosine(10, 3, base_lr=1.0, final_lr=0.1, warmup_epochs=4)
