"""SwAV's loss: codes, queue and swapped prediction (Caron et al. 2020, sections 3.1-3.2 and 4.2, appendix A.1).

    criterion = SwAVLoss(nmb_crops=8)
    embeddings, scores = model(crops)          # [V*B, D], [V*B, K], crop after crop
    loss = criterion(embeddings, scores, model.prototypes.weight)

Take this file together with the folder sinkhorn_ext/.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from sinkhorn_ext import moments, sinkhorn, sinkhorn_potentials, swav_loss


class SwAVLoss(nn.Module):
    """Loss of a batch of V crops of B images each, over all processes of the default group if there is one.

    nmb_crops: V. crops_for_assign: indices of the crops that get codes, which the other crops predict; the large ones.
    temperature: of the softmax of predictions. epsilon, sinkhorn_iterations: see `sinkhorn_ext.sinkhorn`.
    queue_length: embeddings of past images to keep, per process and assigning crop; a multiple of B, 0 for none.
    feat_dim: D, needed for the queue. relative_epsilon: measure epsilon in units of the scores' standard deviation
    (`means_and_std`), so that codes stay sharp when embeddings become similar. This is ours, not the paper's: with
    epsilon 0.3 small data sets keep learning where a fixed epsilon gets stuck at a loss of ln K.
    Raises ValueError for values out of range.
    """

    def __init__(
        self,
        nmb_crops: int = 8,
        crops_for_assign: Sequence[int] = (0, 1),
        temperature: float = 0.1,
        epsilon: float = 0.05,
        sinkhorn_iterations: int = 3,
        queue_length: int = 0,
        feat_dim: int = 128,
        relative_epsilon: bool = False,
    ) -> None:
        super().__init__()
        crops_for_assign = tuple(crops_for_assign)
        if nmb_crops < 2:
            raise ValueError(f"nmb_crops: expected 2 or more, got {nmb_crops}")
        if not crops_for_assign or not set(crops_for_assign) <= set(range(nmb_crops)):
            raise ValueError(f"crops_for_assign: expected crops of 0..{nmb_crops - 1}, got {list(crops_for_assign)}")
        if len(set(crops_for_assign)) < len(crops_for_assign):
            raise ValueError(f"crops_for_assign: expected each crop once, got {list(crops_for_assign)}")
        if temperature <= 0:
            raise ValueError(f"temperature: expected a number > 0, got {temperature}")
        if epsilon <= 0:
            raise ValueError(f"epsilon: expected a number > 0, got {epsilon}")
        if sinkhorn_iterations < 1:
            raise ValueError(f"sinkhorn_iterations: expected 1 or more, got {sinkhorn_iterations}")
        if queue_length < 0:
            raise ValueError(f"queue_length: expected 0 or more, got {queue_length}")
        self.nmb_crops = nmb_crops
        self.crops_for_assign = crops_for_assign
        self.temperature = temperature
        self.epsilon = epsilon
        self.sinkhorn_iterations = sinkhorn_iterations
        self.relative_epsilon = relative_epsilon
        # Embeddings, not scores, as scores are taken with the current prototypes. Newest first.
        self.register_buffer("queue", torch.zeros(len(crops_for_assign), queue_length, feat_dim))  # [A, Q, D]
        # Slots that hold an embedding. A tensor, as a Python int would make torch.compile recompile at each new value.
        self.register_buffer("queue_filled", torch.zeros((), dtype=torch.int64))
        self.queue_started = False

    def start_queue(self) -> None:
        """Begin to fill the queue: from now on each batch enters it. Codes use it once every slot is filled."""
        self.queue_started = True

    def forward(self, embeddings: torch.Tensor, scores: torch.Tensor, prototypes: torch.Tensor) -> torch.Tensor:
        """Compute the loss of this process, a scalar, and put the batch into the queue.

        embeddings [V*B, D], scores [V*B, K] in crop order, prototypes [K, D]. Raises ValueError for other shapes.
        """
        return self._loss(embeddings, scores, prototypes)[0]

    def loss_and_code_logits(
        self, embeddings: torch.Tensor, scores: torch.Tensor, prototypes: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the loss as `forward` does, and the code logits [A, B, K], whose softmax over K are the codes.

        The logits have no gradient; `guard.CollapseGuard` reads them.
        """
        loss, assigning, potentials = self._loss(embeddings, scores, prototypes)
        return loss, self._code_logits(assigning, potentials)

    def _loss(
        self, embeddings: torch.Tensor, scores: torch.Tensor, prototypes: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The loss, and what its codes are made of: scores of the assigning crops [A, B, K] and potentials [A, K]."""
        if len(scores) != len(embeddings) or len(scores) % self.nmb_crops:
            raise ValueError(
                f"scores: expected [V*B, K] with V = {self.nmb_crops} crops and as many rows as embeddings, "
                f"got {list(scores.shape)} and embeddings {list(embeddings.shape)}"
            )
        scores = scores.unflatten(0, (self.nmb_crops, -1))  # [V, B, K]
        embeddings = embeddings.detach().unflatten(0, (self.nmb_crops, -1))  # [V, B, D]
        uses_queue = self.queue_started and self.queue.shape[1] > 0
        queue_scores = self._queue_scores(prototypes.detach()) if uses_queue else None  # [A, Q, K]
        assigning = self._assigning(scores.detach())  # [A, B, K]
        if self.relative_epsilon:
            means, std = means_and_std(assigning)
            assigning = standardize(assigning, means, std)
            queue_scores = standardize(queue_scores, means, std) if uses_queue else None
        potentials = sinkhorn_potentials(
            assigning, self.epsilon, self.sinkhorn_iterations, extra=queue_scores
        )  # [A, K]
        if uses_queue:
            self._enqueue(self._assigning(embeddings))
        loss = swav_loss(
            scores,
            potentials,
            assigning=assigning if self.relative_epsilon else None,  # None: those among scores, which are read anyway
            crops_for_assign=self.crops_for_assign,
            temperature=self.temperature,
            epsilon=self.epsilon,
        )
        return loss, assigning, potentials

    def _code_logits(self, assigning: torch.Tensor, potentials: torch.Tensor) -> torch.Tensor:
        return torch.add(potentials.unsqueeze(1), assigning, alpha=1 / self.epsilon)  # [A, B, K]

    @torch.no_grad()
    def codes(self, scores: torch.Tensor) -> torch.Tensor:
        """Codes [N, K] of other images with scores [N, K], balanced over those of all processes, without the queue."""
        if self.relative_epsilon:
            means, std = means_and_std(scores.unsqueeze(0))
            scores = standardize(scores, means[0], std)
        return sinkhorn(scores, self.epsilon, self.sinkhorn_iterations)

    def _assigning(self, crops: torch.Tensor) -> torch.Tensor:
        """[V, B, ...] -> [A, B, ...], by stacking: to index with a list would copy it to the GPU and wait for that."""
        return torch.stack([crops[i] for i in self.crops_for_assign])

    def _queue_scores(self, prototypes: torch.Tensor) -> torch.Tensor:
        """Scores [A, Q, K] of the queue; -inf, which keeps them out of the balance, until every slot is filled."""
        return (self.queue @ prototypes.T).masked_fill_(self.queue_filled < self.queue.shape[1], -torch.inf)

    def _enqueue(self, embeddings: torch.Tensor) -> None:
        batch_size, queue_length = embeddings.shape[1], self.queue.shape[1]
        if queue_length % batch_size:
            raise ValueError(f"queue_length: expected a multiple of the batch of {batch_size}, got {queue_length}")
        self.queue.copy_(torch.cat([embeddings, self.queue[:, :-batch_size]], dim=1))
        self.queue_filled.add_(batch_size).clamp_(max=queue_length)

    def get_extra_state(self) -> dict[str, bool]:
        return {"started": self.queue_started}

    def set_extra_state(self, state: dict[str, bool]) -> None:
        self.queue_started = state["started"]

    def gather_queue(self, batch_size: int) -> dict[str, torch.Tensor | int | bool]:
        """Gather the queues of all processes into the one that a single process would have, for a checkpoint.

        batch_size: B, per process. Returns embeddings [A, W*Q, D], newest batch first, and how far it is filled.
        Every process must call it.
        """
        shards = [self.queue]
        if dist.is_initialized():
            shards = [torch.empty_like(self.queue) for _ in range(dist.get_world_size())]
            dist.all_gather(shards, self.queue)
        batches = torch.stack([shard.unflatten(1, (-1, batch_size)) for shard in shards], dim=2)  # [A, Q/B, W, B, D]
        filled = self.queue_filled.item() * len(shards)
        return {"embeddings": batches.flatten(1, 3), "started": self.queue_started, "filled": filled}

    def scatter_queue(self, state: dict[str, torch.Tensor | int | bool], batch_size: int) -> None:
        """Take this process's share of what `gather_queue` gave, also if the number of processes has changed."""
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        batches = state["embeddings"].unflatten(1, (-1, world_size, batch_size))  # [A, Q/B, W, B, D]
        self.queue.copy_(batches[:, :, rank].flatten(1, 2))
        self.queue_filled.fill_(state["filled"] // world_size)
        self.queue_started = state["started"]


def means_and_std(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean [A, 1, K] of each prototype's scores [A, B, K] over the images of all processes, and std of what remains.

    The std is a scalar, over crops, images and prototypes, of scores minus their means; both are float64, where the
    device has it. Sinkhorn makes up for the means, so what is left is what tells images apart. The std is at least
    1e-5 of the scores' root mean square: smaller differences are rounding, and should leave codes uniform.
    """
    sums = moments(scores)
    images = sums.new_full((1,), scores.shape[1])  # filled on the device, as a copy of a number would wait for it
    sums = torch.cat([sums, images])  # [A * K + 2]
    if dist.is_initialized():
        dist.all_reduce(sums)
    squares, images = sums[-2:].split(1)
    means = sums[:-2].view(len(scores), 1, -1) / images
    mean_square = squares / (images * means.numel())
    variance = torch.maximum(mean_square - means.square().mean(), 1e-10 * mean_square)
    return means, variance.clamp_min(torch.finfo(scores.dtype).tiny).sqrt().squeeze(0)


def standardize(scores: torch.Tensor, means: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """(scores - means) / std, float32 or float64. Codes do not depend on the means; leaving them out keeps digits."""
    dtype = torch.promote_types(scores.dtype, torch.float32)
    # Rounding a mean shifts all scores of a prototype alike, which changes no code.
    return scores.to(dtype).sub(means.to(dtype)).mul_(std.reciprocal().to(dtype))
