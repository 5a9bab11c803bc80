"""Compare LARS and the learning-rate schedule with the float64 reference."""

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
    "gradient from step 4": (7,),
    "gradient every third step": (2, 2),
    "no gradient": (2,),
}
GROUPS = [  # options, names
    (dict(lr=0.6, weight_decay=1e-6), ["conv", "zero parameter", "gradient from step 4", "no gradient"]),
    (dict(lr=4.8, weight_decay=0.3), ["linear", "bias", "scalar", "zero gradient", "gradient every third step"]),
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
    absent = {"no gradient"}
    absent |= {"gradient from step 4"} if step < 4 else set()
    absent |= {"gradient every third step"} if step % 3 else set()
    return {name: None if name in absent else grad.to(dtype) for name, grad in grads.items()}


def new_optimizer(params, **options):
    groups = [dict(params=[params[name] for name in names], **group_options) for group_options, names in GROUPS]
    return LARS(groups, lr=1.0, **options)


def take_step(optimizer, params, step):
    for name, grad in gradients(step, next(iter(params.values())).dtype).items():
        params[name].grad = None if grad is None else grad.to(params[name].device)
    for group, (group_options, _) in zip(optimizer.param_groups, GROUPS, strict=True):
        group["lr"] = group_options["lr"] / (1 + step)
    optimizer.step()


def use_form(form: str, monkeypatch) -> None:
    if form == "for GPUs":
        monkeypatch.setattr(
            optim, "_update_one_by_one", lambda *args: optim._update_together(*args, torch.tensor(True))
        )


@pytest.mark.parametrize("form", ["for CPUs", "for GPUs"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("options", [{}, dict(momentum=0.5, trust_coefficient=0.02, eps=0.1), dict(momentum=0.0)])
def test_ten_steps_match_the_reference(options, dtype, tolerance, form, monkeypatch):
    use_form(form, monkeypatch)
    params = new_params(dtype)
    expected, buffers = {name: p.detach().double().clone() for name, p in params.items()}, {}
    optimizer = new_optimizer(params, **options)
    for step in range(10):
        take_step(optimizer, params, step)
        for group_options, names in GROUPS:
            group = {name: expected[name] for name in names}
            lr, weight_decay = group_options["lr"] / (1 + step), group_options["weight_decay"]
            reference.lars_step(group, gradients(step, dtype), buffers, lr, weight_decay, **options)
            expected |= group
        for name, p in params.items():
            torch.testing.assert_close(p.detach().double(), expected[name], rtol=tolerance, atol=tolerance)
            buffer = optimizer.state[p].get("momentum_buffer") if p in optimizer.state else None
            assert (buffer is None) == (name not in buffers), name
            if buffer is not None:
                torch.testing.assert_close(buffer.double(), buffers[name], rtol=tolerance, atol=tolerance)


def test_a_zero_parameter_or_a_zero_gradient_leaves_the_gradient_unchanged():
    zero_parameter, zero_gradient = torch.zeros(3, requires_grad=True), torch.ones(3, requires_grad=True)
    zero_parameter.grad, zero_gradient.grad = torch.tensor([1.0, -2.0, 3.0]), torch.zeros(3)
    LARS([zero_parameter, zero_gradient], lr=0.5, weight_decay=0.1).step()
    assert torch.equal(zero_parameter.detach(), -0.5 * zero_parameter.grad)
    assert torch.equal(zero_gradient.detach(), torch.ones(3))


def test_gradients_are_not_modified():
    params = new_params()
    optimizer = new_optimizer(params)
    for step in range(2):
        take_step(optimizer, params, step)
        for name, grad in gradients(step).items():
            assert params[name].grad is None if grad is None else torch.equal(params[name].grad, grad)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_gradient_that_is_not_finite_stops_all_updates_and_is_counted(bad):
    params = new_params()
    optimizer = new_optimizer(params)
    for step in range(2):
        take_step(optimizer, params, step)
    before = [p.detach().clone() for p in params.values()]
    buffers = [optimizer.state[p]["momentum_buffer"].clone() for p in params.values() if p in optimizer.state]
    assert optimizer.skipped == 0
    for p in params.values():
        p.grad = torch.ones_like(p)
    params["conv"].grad.view(-1)[1] = bad
    optimizer.step()
    take_step(optimizer, params, 3)  # these gradients are finite again
    assert optimizer.skipped == 2 and optimizer.steps == 4
    assert all(torch.equal(p.detach(), old) for p, old in zip(params.values(), before, strict=True))
    now = [optimizer.state[p]["momentum_buffer"] for p in params.values() if p in optimizer.state]
    assert all(torch.equal(buffer, old) for buffer, old in zip(now, buffers, strict=True))


def test_steps_that_loss_scaling_skips_are_not_counted():
    p = torch.ones(3, requires_grad=True)
    optimizer, scaler = LARS([p], lr=0.5), torch.amp.GradScaler("cpu", init_scale=4.0)
    for step, gradient in enumerate((1.0, torch.inf, 1.0), 1):
        optimizer.zero_grad()
        scaler.scale((p * gradient).sum()).backward()
        before = p.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(p.detach(), before) == (gradient == torch.inf)
        assert step - optimizer.steps == (step >= 2)  # what a log line says: skipped_steps
    assert optimizer.skipped == 0  # such steps are normal in fp16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_form_for_gpus_leaves_everything_as_it_is_without_reading_a_value(dtype):
    params, grads, buffers = ([torch.randn(3, 4).to(dtype), torch.randn(5).to(dtype)] for _ in range(3))
    grads[0][1, 2] = torch.nan
    before = [tensor.clone() for tensor in params + buffers]
    group, ratios = dict(lr=0.5, momentum=0.9, weight_decay=0.1), torch.tensor([torch.nan, 1.0], dtype=dtype)
    optim._update_together(params, grads, buffers, ratios, group, torch.tensor(False))
    assert all(torch.equal(now, old) for now, old in zip(params + buffers, before, strict=True))
    assert not any(grad.any() for grad in grads)


LAYOUTS = {
    "channels_last": lambda tensor: tensor.contiguous(memory_format=torch.channels_last),
    "transposed": lambda tensor: tensor.transpose(0, 1).contiguous().transpose(0, 1),
    "every second element": lambda tensor: torch.stack([tensor, -tensor], dim=-1)[..., 0],
}


@pytest.mark.parametrize("param_layout", LAYOUTS)
@pytest.mark.parametrize("grad_layout", LAYOUTS)
def test_memory_layouts_do_not_change_the_result(param_layout, grad_layout):
    generator = torch.Generator().manual_seed(0)
    start, grad = (torch.randn(4, 3, 5, 2, dtype=torch.float64, generator=generator) for _ in range(2))
    results = []
    for p, p_grad in ((start.clone(), grad), (LAYOUTS[param_layout](start), LAYOUTS[grad_layout](grad))):
        optimizer = LARS([p.requires_grad_()], lr=0.5, weight_decay=0.1)
        for _ in range(2):
            p.grad = p_grad
            optimizer.step()
        results.append(p.detach())
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)


def test_no_value_is_read_by_the_host():
    params = new_params(device="meta")  # without values: reading one raises an error
    optimizer = new_optimizer(params)
    for step in range(6):
        take_step(optimizer, params, step)
    assert optimizer.state[params["conv"]]["momentum_buffer"].is_meta


def test_resumed_steps_equal_uninterrupted_steps_bit_for_bit():
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


def test_the_closure_runs_with_gradients_and_its_loss_is_returned():
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
def test_an_option_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"^{name}: .*{value}"):
        LARS([torch.ones(1, requires_grad=True)], **{"lr": 0.1, name: value})


SCHEDULES = {
    "warm-up": dict(steps_per_epoch=313, epochs=100, base_lr=4.8, final_lr=0.0048, warmup_epochs=10, start_warmup=0.3),
    "no warm-up": dict(steps_per_epoch=50, epochs=20, base_lr=0.6, final_lr=0.0006),
    "warm-up from 0": dict(steps_per_epoch=7, epochs=3, base_lr=1.0, final_lr=0.5, warmup_epochs=1),
    "only warm-up": dict(steps_per_epoch=5, epochs=2, base_lr=1.0, final_lr=0.1, warmup_epochs=2, start_warmup=0.2),
    "warm-up of one step": dict(steps_per_epoch=1, epochs=4, base_lr=1.0, final_lr=0.1, warmup_epochs=1),
    "no steps": dict(steps_per_epoch=0, epochs=4, base_lr=1.0, final_lr=0.1, warmup_epochs=1),
}


@pytest.mark.parametrize("case", SCHEDULES)
def test_the_schedule_matches_the_reference(case):
    learning_rates = warmup_cosine(**SCHEDULES[case])
    assert len(learning_rates) == SCHEDULES[case]["steps_per_epoch"] * SCHEDULES[case]["epochs"]
    assert learning_rates == pytest.approx(reference.learning_rates(**SCHEDULES[case]), rel=1e-12)


def test_the_warm_up_includes_both_ends_and_the_cosine_starts_at_base_lr():
    learning_rates = warmup_cosine(10, 5, base_lr=4.8, final_lr=0.0048, warmup_epochs=2, start_warmup=0.3)
    warmup, cosine = learning_rates[:20], learning_rates[20:]
    assert warmup[0] == 0.3
    assert warmup[-1] == pytest.approx(4.8) and cosine[0] == pytest.approx(4.8)
    assert warmup[1] - warmup[0] == pytest.approx(warmup[-1] - warmup[-2])
    assert cosine == sorted(cosine, reverse=True) and 0.0048 < cosine[-1] < 0.05


def test_the_cosine_is_halfway_at_half_of_the_steps():
    learning_rates = warmup_cosine(10, 4, base_lr=1.0, final_lr=0.2)
    assert learning_rates[20] == pytest.approx(0.6)


def test_a_run_that_is_only_warm_up_ends_at_base_lr():
    assert warmup_cosine(4, 3, base_lr=1.0, final_lr=0.1, warmup_epochs=3)[-1] == pytest.approx(1.0)


def test_a_warm_up_longer_than_the_run_is_refused():
    with pytest.raises(ValueError, match="^warmup_epochs: .* 3 .* 4$"):
        warmup_cosine(10, 3, base_lr=1.0, final_lr=0.1, warmup_epochs=4)
