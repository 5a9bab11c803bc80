"""LARS and the warm-up + cosine schedule of SwAV (Caron et al. 2020, section 4.1 and appendix A.1; You et al. 2017).

    optimizer = LARS(model.parameters(), lr=0.6, weight_decay=1e-6)
    learning_rates = warmup_cosine(steps_per_epoch, epochs, base_lr=0.6, final_lr=0.0006)  # one per step

Copy this file to use it elsewhere. It needs only torch.
"""

import math
from collections.abc import Callable, Iterable

import torch

Tensors = list[torch.Tensor]


class LARS(torch.optim.Optimizer):
    """SGD with momentum on gradients rescaled to the norms of their parameters (layer-wise adaptive rate scaling).

    One step, for every parameter p with gradient g, biases and BatchNorm included:
        g <- (g + weight_decay * p) * trust_coefficient * ||p|| / (||g|| + weight_decay * ||p|| + eps)
             (g unchanged, without weight decay, where ||p|| or ||g|| is zero)
        buffer <- momentum * buffer + g        (the first buffer is g)
        p <- p - lr * buffer
    A parameter without a gradient (None) is skipped, and so is its buffer. All parameters must be on one device. On a
    GPU, the step never waits for the device. Raises ValueError for values out of range.
    If a gradient is inf or nan, this step and all later ones change nothing, and `skipped`, a tensor on the device,
    counts them: parameters and buffers stay as they were before. steps: calls of `step`.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
        eps: float = 1e-8,
    ) -> None:
        for name, value in dict(lr=lr, momentum=momentum, weight_decay=weight_decay, eps=eps).items():
            if not value >= 0:
                raise ValueError(f"{name}: expected a number >= 0, got {value}")
        if not trust_coefficient > 0:
            raise ValueError(f"trust_coefficient: expected a number > 0, got {trust_coefficient}")
        defaults = dict(
            lr=lr, momentum=momentum, weight_decay=weight_decay, trust_coefficient=trust_coefficient, eps=eps
        )
        super().__init__(params, defaults)
        self.steps = 0
        self.skipped: torch.Tensor | None = None  # int64, once a step is done

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        """Update all parameters once. Returns the loss of the closure, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.steps += 1
        groups = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        groups = [(group, params, _norms([p.grad for p in params])) for group, params in groups if params]
        if not groups:
            return loss
        total = torch.stack([grad_norms.sum() for _, _, grad_norms in groups]).sum()
        if self.skipped is None:
            self.skipped = torch.zeros_like(total, dtype=torch.int64)
        applies = total.isfinite() & (self.skipped == 0)
        self.skipped += ~applies
        if total.device.type != "cpu" or applies.tolist():  # other devices select without the host
            for group, params, grad_norms in groups:
                self._step_group(params, grad_norms, applies, group)
        return loss

    def _step_group(self, params: Tensors, grad_norms: torch.Tensor, applies: torch.Tensor, group: dict) -> None:
        grads, param_norms = [p.grad for p in params], _norms(params)  # norms: [number of parameters]
        trust_ratios = (
            group["trust_coefficient"] * param_norms / (grad_norms + group["weight_decay"] * param_norms + group["eps"])
        )
        # Zero norms: ||p|| = 0 leaves g unchanged, and ||g|| = 0 makes the update 0, without weight decay. These cases
        # are selected on the device, because the host would have to wait to read the norms.
        trust_ratios = torch.where(param_norms == 0, 1.0, trust_ratios)
        trust_ratios = torch.where(grad_norms == 0, 0.0, trust_ratios)

        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        if params[0].device.type == "cpu":
            _update_one_by_one(params, grads, buffers, trust_ratios, group)
        else:
            _update_together(params, grads, buffers, trust_ratios, group, applies)


def _norms(tensors: Tensors) -> torch.Tensor:
    """Compute the 2-norm of each tensor: [number of tensors]."""
    on_cpu = tensors[0].device.type == "cpu"
    return torch.stack([_norm(tensor) for tensor in tensors] if on_cpu else torch._foreach_norm(tensors))


def _norm(tensor: torch.Tensor) -> torch.Tensor:
    """Compute the 2-norm, first of each row: torch uses all CPU threads for rows, but one thread for a full norm."""
    if tensor.ndim > 1:
        tensor = torch.linalg.vector_norm(tensor, dim=tuple(range(1, tensor.ndim)))
    return torch.linalg.vector_norm(tensor)


INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of a number


def _update_together(
    params: Tensors,
    grads: Tensors,
    buffers: Tensors,
    trust_ratios: torch.Tensor,
    group: dict,
    applies: torch.Tensor,
) -> None:
    """Update many parameters per kernel, for GPUs, where launching kernels takes most of the time.

    applies: a bool on the device. If it is False, nothing changes but the gradients, which become 0: as integers, since
    nan times 0 is nan.
    """
    bits = INTEGERS[grads[0].element_size()]
    torch._foreach_mul_([grad.view(bits) for grad in grads], applies.to(bits))
    updates = torch._foreach_add(grads, params, alpha=group["weight_decay"])
    torch._foreach_mul_(updates, list(torch.where(applies, trust_ratios, 0.0).unbind()))
    share = applies.to(buffers[0].dtype)  # 1 or 0
    torch._foreach_mul_(buffers, share * group["momentum"] + (1 - share))
    torch._foreach_add_(buffers, updates)
    del updates  # of the size of the model
    torch._foreach_add_(params, torch._foreach_mul(buffers, share * -group["lr"]))


def _update_one_by_one(
    params: Tensors, grads: Tensors, buffers: Tensors, trust_ratios: torch.Tensor, group: dict
) -> None:
    """Update one parameter at a time, in one pass if torch can: on CPUs, memory access takes most of the time."""
    momentum, weight_decay, lr = group["momentum"], group["weight_decay"], group["lr"]
    options = dict(momentum=momentum, weight_decay=weight_decay, lr=lr, nesterov=False, maximize=False)
    for p, grad, buffer, trust_ratio in zip(params, grads, buffers, trust_ratios.tolist(), strict=True):
        # The fused kernel ignores strides: it goes through the memory of all three tensors in order.
        if momentum and _is_dense(p) and p.stride() == grad.stride() == buffer.stride():
            # torch's SGD adds (1 - dampening) * (g + weight_decay * p) to the buffer.
            torch._fused_sgd_([p], [grad], [buffer], dampening=1 - trust_ratio, is_first_step=False, **options)
        else:
            buffer.mul_(momentum).add_(grad, alpha=trust_ratio).add_(p, alpha=trust_ratio * weight_decay)
            p.add_(buffer, alpha=-lr)


def _is_dense(tensor: torch.Tensor) -> bool:
    return tensor.is_contiguous() or (tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last))


def warmup_cosine(
    steps_per_epoch: int,
    epochs: int,
    base_lr: float,
    final_lr: float,
    warmup_epochs: int = 0,
    start_warmup: float = 0.0,
) -> list[float]:
    """Compute the learning rate of every step: a linear warm-up, then half a cosine (appendix A.1).

    The warm-up goes from start_warmup to base_lr, both included. The cosine starts at base_lr and approaches final_lr.
    Returns steps_per_epoch * epochs learning rates. Raises ValueError if the warm-up is longer than the run.
    """
    if not 0 <= warmup_epochs <= epochs:
        raise ValueError(f"warmup_epochs: expected 0 to {epochs} (epochs), got {warmup_epochs}")
    warmup_steps = warmup_epochs * steps_per_epoch
    cosine_steps = steps_per_epoch * epochs - warmup_steps
    warmup = [start_warmup + (base_lr - start_warmup) * i / max(warmup_steps - 1, 1) for i in range(warmup_steps)]
    cosine = [
        final_lr + 0.5 * (base_lr - final_lr) * (1 + math.cos(math.pi * i / cosine_steps)) for i in range(cosine_steps)
    ]
    return warmup + cosine
