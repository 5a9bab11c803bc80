"""SwAV in float64, written from the description of the algorithm: slow and plain. All tests compare with it.

It imports nothing of ours. Steps are numbered as in train.py; the method is section 3.1 of Caron et al. 2020 (arXiv
2006.09882). Shapes: B images per process, W processes, V crops per image, A assigning crops, D dimensions of an
embedding, K prototypes, L queue slots per process. `params` and `buffers` are float64 dicts with the keys of a
checkpoint's state_dict (`new_state` makes them from one). Images, scores, codes and gradients of any float type are
converted to float64.
"""

import math

import torch
import torch.nn.functional as F

Tensors = dict[str, torch.Tensor]

PROTOTYPES = "prototypes.weight"


def normalize_prototypes(weight: torch.Tensor) -> torch.Tensor:
    """Step 1. Divide each row of weight [K, D] by its L2 norm, outside autograd; returns a new tensor [K, D]."""
    return l2_normalize(weight.detach().double())


def l2_normalize(x: torch.Tensor) -> torch.Tensor:
    """Scale the rows of x [N, D] to L2 norm 1; the minimum of 1e-12 only keeps an all-zero row at zero."""
    return x / x.square().sum(dim=1, keepdim=True).sqrt().clamp_min(1e-12)


def batch_norm(params: Tensors, buffers: Tensors, name: str, x: torch.Tensor, training: bool) -> torch.Tensor:
    """Normalise x [N, C] or [N, C, H, W], with eps 1e-5; training updates the running statistics in `buffers`.

    Training normalises with the biased variance of the batch. The running variance takes the unbiased one, with
    momentum 0.1.
    """
    channels = [1, -1] + [1] * (x.dim() - 2)
    if training:
        others = [dim for dim in range(x.dim()) if dim != 1]
        count = x.numel() // x.shape[1]
        mean = x.mean(dim=others)  # [C]
        var = (x - mean.view(channels)).square().mean(dim=others)  # [C]
        unbiased_var = var * count / (count - 1)
        for key, value in (("running_mean", mean), ("running_var", unbiased_var)):
            buffers[f"{name}.{key}"] = 0.9 * buffers[f"{name}.{key}"].double() + 0.1 * value.detach()
        if f"{name}.num_batches_tracked" in buffers:
            buffers[f"{name}.num_batches_tracked"] = buffers[f"{name}.num_batches_tracked"] + 1
    else:
        mean, var = buffers[f"{name}.running_mean"].double(), buffers[f"{name}.running_var"].double()
    x = (x - mean.view(channels)) / (var.view(channels) + 1e-5).sqrt()
    return x * params[f"{name}.weight"].view(channels) + params[f"{name}.bias"].view(channels)


def block(params: Tensors, buffers: Tensors, name: str, x: torch.Tensor, stride: int, training: bool) -> torch.Tensor:
    """Apply a BasicBlock, or a Bottleneck if it has a conv3: x [N, C, H, W] -> [N, C', H / stride, W / stride]."""

    def norm(key: str, y: torch.Tensor) -> torch.Tensor:
        return batch_norm(params, buffers, f"{name}.{key}", y, training)

    def conv(key: str, y: torch.Tensor, stride: int = 1, padding: int = 0) -> torch.Tensor:
        return F.conv2d(y, params[f"{name}.{key}.weight"], stride=stride, padding=padding)

    if f"{name}.conv3.weight" in params:
        out = torch.relu(norm("bn1", conv("conv1", x)))
        out = torch.relu(norm("bn2", conv("conv2", out, stride, padding=1)))
        out = norm("bn3", conv("conv3", out))
    else:
        out = torch.relu(norm("bn1", conv("conv1", x, stride, padding=1)))
        out = norm("bn2", conv("conv2", out, padding=1))
    if f"{name}.downsample.0.weight" in params:
        x = norm("downsample.1", conv("downsample.0", x, stride))
    return torch.relu(out + x)


def backbone(params: Tensors, buffers: Tensors, images: torch.Tensor, training: bool) -> torch.Tensor:
    """Step 2. Apply a ResNet whose depth and width the keys give: images [N, 3, S, S] -> pooled features [N, F]."""
    stem = params["conv1.weight"]  # [C, 3, kernel, kernel]
    stride, padding = {7: (2, 3), 5: (2, 2), 3: (1, 1)}[stem.shape[-1]]
    x = F.conv2d(images.double(), stem, stride=stride, padding=padding)
    x = torch.relu(batch_norm(params, buffers, "bn1", x, training))
    if stem.shape[-1] == 7:
        x = F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
    for layer in (1, 2, 3, 4):
        n = 0
        while f"layer{layer}.{n}.conv1.weight" in params:
            stride = 2 if layer > 1 and n == 0 else 1
            x = block(params, buffers, f"layer{layer}.{n}", x, stride, training)
            n += 1
    return x.mean(dim=(2, 3))


def head(params: Tensors, buffers: Tensors, features: torch.Tensor, training: bool) -> torch.Tensor:
    """Step 2. Linear, BatchNorm1d, ReLU, Linear, L2 normalisation: features [N, F] -> embeddings [N, D]."""
    x = features.double() @ params["projection_head.0.weight"].T + params["projection_head.0.bias"]
    x = torch.relu(batch_norm(params, buffers, "projection_head.1", x, training))
    x = x @ params["projection_head.3.weight"].T + params["projection_head.3.bias"]
    return l2_normalize(x)


def forward(
    params: Tensors, buffers: Tensors, crops: list[torch.Tensor], training: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Step 2. V crops, each [B, 3, S, S] -> embeddings [V*B, D], scores [V*B, K], both in crop order.

    All crops of one resolution share one backbone pass and its BatchNorm statistics, at any place in the list. Passes
    run in the order in which resolutions first appear. The head takes all crops at once.
    """
    features: list[torch.Tensor] = [torch.empty(0)] * len(crops)
    for size in dict.fromkeys(crop.shape[-2:] for crop in crops):
        members = [v for v, crop in enumerate(crops) if crop.shape[-2:] == size]
        out = backbone(params, buffers, torch.cat([crops[v] for v in members]), training)
        for v, crop_features in zip(members, out.split([len(crops[v]) for v in members]), strict=True):
            features[v] = crop_features  # [B, F]
    embeddings = head(params, buffers, torch.cat(features), training)  # [V*B, D]
    return embeddings, embeddings @ params[PROTOTYPES].T


def sinkhorn(
    scores: torch.Tensor, epsilon: float = 0.05, iterations: int = 3, extra: torch.Tensor | None = None
) -> torch.Tensor:
    """Step 3. Codes [B, K] of scores [B, K], the batch rows of all processes; extra [Q, K] are further rows.

    The extra rows take part in the balance and get no codes. The global maximum of scores / epsilon is subtracted
    before exp; the first scaling, to a total of 1, cancels it exactly. A row or a prototype more than about
    745 * epsilon below that maximum still becomes 0 / 0; `sinkhorn_log` has no such limit.
    """
    rows = scores.detach().double() if extra is None else torch.cat([scores, extra]).detach().double()
    nmb_images, nmb_prototypes = rows.shape
    q = torch.exp(rows / epsilon - (rows / epsilon).max())  # [B+Q, K]
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(dim=0, keepdim=True) / nmb_prototypes  # each prototype's total is 1/K
        q = q / q.sum(dim=1, keepdim=True) / nmb_images  # each sample's total is 1/N
    q = q / q.sum(dim=1, keepdim=True)
    return q[: len(scores)]


def sinkhorn_log(
    scores: torch.Tensor, epsilon: float = 0.05, iterations: int = 3, extra: torch.Tensor | None = None
) -> torch.Tensor:
    """Step 3. The same as `sinkhorn`, line by line, on log q: finite for any finite scores."""
    rows = scores.detach().double() if extra is None else torch.cat([scores, extra]).detach().double()
    nmb_images, nmb_prototypes = rows.shape
    log_q = rows / epsilon  # [B+Q, K]
    log_q = log_q - log_q.flatten().logsumexp(dim=0)
    for _ in range(iterations):
        log_q = log_q - log_q.logsumexp(dim=0, keepdim=True) - math.log(nmb_prototypes)
        log_q = log_q - log_q.logsumexp(dim=1, keepdim=True) - math.log(nmb_images)
    log_q = log_q - log_q.logsumexp(dim=1, keepdim=True)
    return log_q.exp()[: len(scores)]


def new_queues(queue_length: int, batch_size: int, world_size: int, nmb_assigning: int, feat_dim: int) -> list[dict]:
    """Make an empty queue for each process, or [] if there are no slots; queue_length: slots over all processes.

    Each is {"embeddings": [A, L, D], newest first; "filled": slots filled so far; "started": bool}.
    """
    queue_length -= queue_length % (batch_size * world_size)
    if queue_length == 0:
        return []
    shape = (nmb_assigning, queue_length // world_size, feat_dim)
    empty = [torch.zeros(shape, dtype=torch.float64) for _ in range(world_size)]
    return [{"embeddings": slots, "filled": 0, "started": False} for slots in empty]


def queue_scores(queue: dict, a: int, prototypes: torch.Tensor) -> torch.Tensor:
    """Score the queue of the a-th assigning crop with the current prototypes [K, D]: [L, K], or [0, K] until full."""
    is_full = queue["filled"] >= queue["embeddings"].shape[1]
    return (queue["embeddings"][a] if is_full else queue["embeddings"][a, :0]) @ prototypes.T


def queue_push(queue: dict, embeddings: list[torch.Tensor]) -> None:
    """Put the embeddings of the A assigning crops, each [B, D], at the front, and drop the oldest at the end."""
    length = queue["embeddings"].shape[1]
    batch = torch.stack(embeddings).detach()  # [A, B, D]
    queue["embeddings"] = torch.cat([batch, queue["embeddings"]], dim=1)[:, :length]
    queue["filled"] = min(length, queue["filled"] + batch.shape[1])


def swav_loss(
    scores_per_crop: list[torch.Tensor],
    codes_per_assigning_crop: list[torch.Tensor],
    crops_for_assign: tuple[int, ...] = (0, 1),
    temperature: float = 0.1,
) -> torch.Tensor:
    """Step 4. Compute the loss of one process from V scores [B, K] and the codes [B, K] of each assigning crop."""
    log_p = [torch.log_softmax(scores.double() / temperature, dim=1) for scores in scores_per_crop]  # V of [B, K]
    per_assigning_crop = []
    for i, codes in zip(crops_for_assign, codes_per_assigning_crop, strict=True):
        others = [-(codes.double() * log_p[v]).sum(dim=1).mean() for v in range(len(log_p)) if v != i]
        per_assigning_crop.append(torch.stack(others).mean())
    return torch.stack(per_assigning_crop).mean()


def lars_step(
    params: Tensors,
    grads: dict[str, torch.Tensor | None],
    momentum_buffers: Tensors,
    lr: float,
    weight_decay: float,
    momentum: float = 0.9,
    trust_coefficient: float = 0.001,
    eps: float = 1e-8,
) -> None:
    """Step 6. Take a LARS step; replaces the entries of params and of momentum_buffers, which starts as {}.

    A parameter whose gradient is None or missing is skipped: neither it nor its momentum buffer changes.
    """
    for name in params:
        if grads.get(name) is None:
            continue
        p, g = params[name].detach().double(), grads[name].detach().double()
        p_norm, g_norm = p.norm().item(), g.norm().item()
        if p_norm != 0 and g_norm != 0:
            g = (g + weight_decay * p) * (trust_coefficient * p_norm / (g_norm + weight_decay * p_norm + eps))
        momentum_buffers[name] = momentum * momentum_buffers[name] + g if name in momentum_buffers else g.clone()
        params[name] = p - lr * momentum_buffers[name]


def learning_rates(
    steps_per_epoch: int,
    epochs: int,
    base_lr: float,
    final_lr: float,
    warmup_epochs: int = 0,
    start_warmup: float = 0.0,
) -> list[float]:
    """The learning rate of each step of a run: linear warm-up from start_warmup to base_lr, then half a cosine."""
    warmup_steps = warmup_epochs * steps_per_epoch
    cosine_steps = epochs * steps_per_epoch - warmup_steps
    rates = []
    for s in range(warmup_steps):
        share = s / max(1, warmup_steps - 1)  # 0 to 1, both included; a warm-up of one step is only start_warmup
        rates.append((1 - share) * start_warmup + share * base_lr)
    for t in range(cosine_steps):
        rates.append(final_lr + (base_lr - final_lr) / 2 * (1 + math.cos(math.pi * t / cosine_steps)))
    return rates


def new_state(state_dict: Tensors, world_size: int = 1, queues: list[dict] | None = None) -> dict:
    """The state of a run of `world_size` processes at step 0, from a model's state_dict (copied to float64).

    {"params": {name: tensor}, shared, as all processes have the same weights;
     "buffers": one {name: tensor} per process: running_mean, running_var, num_batches_tracked;
     "momentum": {name: tensor}, empty before the first step;
     "queues": one queue per process from `new_queues`, or [];
     "step": steps done since the start of the run}
    """
    suffixes = ("running_mean", "running_var", "num_batches_tracked")
    copies = {
        name: value.detach().to("cpu", torch.float64 if value.is_floating_point() else value.dtype, copy=True)
        for name, value in state_dict.items()
    }
    return {
        "params": {name: value for name, value in copies.items() if not name.endswith(suffixes)},
        "buffers": [{n: v.clone() for n, v in copies.items() if n.endswith(suffixes)} for _ in range(world_size)],
        "momentum": {},
        "queues": queues or [],
        "step": 0,
    }


def train_step(
    state: dict,
    crops_per_process: list[list[torch.Tensor]],
    lr: float,
    *,
    crops_for_assign: tuple[int, ...] = (0, 1),
    temperature: float = 0.1,
    epsilon: float = 0.05,
    iterations: int = 3,
    weight_decay: float = 1e-6,
    momentum: float = 0.9,
    freeze_prototypes_niters: int = 0,
    start_queue: bool = False,
) -> list[float]:
    """Take steps 1 to 6 for W processes: updates `state` and returns the loss of each process before the update.

    state: from `new_state`. Its entries are replaced, so tensors taken from it keep their values.
    crops_per_process: for each process a list of V crops, each [B, 3, S, S]. lr: of this step.
    start_queue: True from the step at which the queues begin to fill; once started they stay so.
    """
    params, queues = state["params"], state["queues"]
    params[PROTOTYPES] = normalize_prototypes(params[PROTOTYPES])  # 1.
    prototypes = params[PROTOTYPES]  # [K, D]
    frozen = {PROTOTYPES} if state["step"] < freeze_prototypes_niters else set()
    leaves = {name: p.detach().clone().requires_grad_(name not in frozen) for name, p in params.items()}
    trained = [name for name in leaves if name not in frozen]

    # 2. One forward pass per process; embeddings[w][v] is [B, D], scores[w][v] is [B, K].
    embeddings, scores = [], []
    for buffers, crops in zip(state["buffers"], crops_per_process, strict=True):
        z, s = forward(leaves, buffers, crops, training=True)
        sizes = [len(crop) for crop in crops]
        embeddings.append(z.detach().split(sizes))
        scores.append(s.split(sizes))

    # 3. Codes of each assigning crop over all processes; codes[w][a] is [B, K]. Batches enter the queue afterwards.
    codes: list[list[torch.Tensor]] = [[] for _ in scores]
    for a, i in enumerate(crops_for_assign):
        batch = [s[i].detach() for s in scores]
        extra = torch.cat([queue_scores(queue, a, prototypes) for queue in queues]) if queues else None
        all_codes = sinkhorn(torch.cat(batch), epsilon, iterations, extra)  # [sum of B over processes, K]
        for w, own_codes in enumerate(all_codes.split([len(rows) for rows in batch])):
            codes[w].append(own_codes)
    for w, queue in enumerate(queues):
        queue["started"] = queue["started"] or start_queue
        if queue["started"]:
            queue_push(queue, [embeddings[w][i] for i in crops_for_assign])

    # 4. and 5. Each process's loss and gradients; gradients are averaged.
    losses = [swav_loss(list(s), q, crops_for_assign, temperature) for s, q in zip(scores, codes, strict=True)]
    per_process = [torch.autograd.grad(loss, [leaves[name] for name in trained]) for loss in losses]
    grads = {name: torch.stack(gs).mean(dim=0) for name, *gs in zip(trained, *per_process, strict=True)}

    lars_step(params, grads, state["momentum"], lr, weight_decay, momentum)  # 6. Frozen parameters have no gradient.
    state["step"] += 1
    return [loss.item() for loss in losses]
