"""SwAV's loss: codes, queue and swapped prediction (Caron et al. 2020, sections 3.1-3.2 and 4.2, appendix A.1).

    swav_loss = SwAVLoss(nmb_crops=8)
    embeddings, scores = model(crops)          # [V*B, D], [V*B, K], crop after crop
    loss = swav_loss(embeddings, scores, model.prototypes.weight)

Take this file together with the folder sinkhorn_ext/.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from sinkhorn_ext import sinkhorn, sinkhorn_potentials, swav_loss


class SwAVLoss(nn.Module):
    """Loss of a batch of V crops of B images each, over all processes of the default group if there is one.

    nmb_crops: V. crops_for_assign: the crops whose codes the others predict (the large ones).
    temperature: of the prediction's softmax. epsilon, sinkhorn_iterations: of the codes, see `sinkhorn_ext.sinkhorn`.
    queue_length: embeddings of past images kept per process and assigning crop; a multiple of B, 0 for none.
    feat_dim: D, needed for the queue. relative_epsilon: epsilon is in units of the scores' spread, see
    `means_and_spread`, so that codes are as sharp for embeddings that have drawn together as for those that have not
    (ours, not the paper's; with epsilon 0.3 small data sets keep learning where the published form gets stuck at ln K).
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
        # Embeddings, not scores: they are scored with today's prototypes. Newest first.
        self.register_buffer("queue", torch.zeros(len(crops_for_assign), queue_length, feat_dim))  # [A, Q, D]
        # Slots that hold an embedding. A tensor, as torch.compile would begin anew with each number.
        self.register_buffer("queue_filled", torch.zeros((), dtype=torch.int64))
        self.queue_started = False

    def start_queue(self) -> None:
        """From now on each batch enters the queue; codes use the queue once every slot holds an embedding."""
        self.queue_started = True

    def forward(self, embeddings: torch.Tensor, scores: torch.Tensor, prototypes: torch.Tensor) -> torch.Tensor:
        """embeddings [V*B, D] and scores [V*B, K] in crop order, prototypes [K, D] -> scalar loss of this process."""
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
            means, unit = means_and_spread(assigning)
            assigning = in_units(assigning, means, unit)
            queue_scores = in_units(queue_scores, means, unit) if uses_queue else None
        potentials = sinkhorn_potentials(
            assigning, self.epsilon, self.sinkhorn_iterations, extra=queue_scores
        )  # [A, K]
        self.newest = assigning, potentials
        if uses_queue:
            self._enqueue(self._assigning(embeddings))
        if self.relative_epsilon:
            codes = self.code_logits().softmax(dim=2)  # [A, B, K]
            return swapped_prediction(scores, codes, self.crops_for_assign, self.temperature)
        return swav_loss(
            scores,
            potentials,
            crops_for_assign=self.crops_for_assign,
            temperature=self.temperature,
            epsilon=self.epsilon,
        )

    def code_logits(self) -> torch.Tensor:
        """[A, B, K], whose softmax over K are the codes of the newest batch. Without gradient."""
        assigning, potentials = self.newest
        return torch.add(potentials.unsqueeze(1), assigning, alpha=1 / self.epsilon)

    @torch.no_grad()
    def codes(self, scores: torch.Tensor) -> torch.Tensor:
        """Codes [N, K] of other images' scores [N, K], balanced over them and those of all processes, without queue."""
        if self.relative_epsilon:
            means, unit = means_and_spread(scores.unsqueeze(0))
            scores = in_units(scores, means[0], unit)
        return sinkhorn(scores, self.epsilon, self.sinkhorn_iterations)

    def _assigning(self, crops: torch.Tensor) -> torch.Tensor:
        """[V, B, ...] -> [A, B, ...]. Stacked, as indexing with a list would copy it to the GPU and wait for that."""
        return torch.stack([crops[i] for i in self.crops_for_assign])

    def _queue_scores(self, prototypes: torch.Tensor) -> torch.Tensor:
        """[A, Q, K]; until every slot holds an embedding all -inf, which keeps these images out of the balance."""
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
        """The queues of all processes as the one that a single process would have, for a checkpoint.

        batch_size: B, per process. Returns embeddings [A, W*Q, D], newest batch first, and the state of filling.
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
        """Take this process's share of what `gather_queue` gave, whatever the number of processes then and now."""
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        batches = state["embeddings"].unflatten(1, (-1, world_size, batch_size))  # [A, Q/B, W, B, D]
        self.queue.copy_(batches[:, :, rank].flatten(1, 2))
        self.queue_filled.fill_(state["filled"] // world_size)
        self.queue_started = state["started"]


def means_and_spread(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each prototype's mean [A, 1, K] of scores [A, B, K] over the images of all processes, and the standard deviation.

    Both in float64, the latter a scalar. The balance of the codes makes up for the means, so what is left is what tells
    images apart. Never less than 1e-5 of the scores' root mean square: differences below that are rounding, and are to
    leave codes uniform.
    """
    tiny = torch.finfo(scores.dtype).tiny
    scores = scores.double()  # as the squares' mean and the mean's square differ by little where images are alike
    images = scores.new_full((1,), scores.shape[1])  # filled there: a copy of a number would wait for the device
    sums = torch.cat([scores.sum(1).flatten(), scores.square().sum().view(1), images])
    if dist.is_initialized():
        dist.all_reduce(sums)
    squares, images = sums[-2:].split(1)
    means = sums[:-2].view(len(scores), 1, -1) / images
    mean_square = squares / (images * means.numel())
    variance = torch.maximum(mean_square - means.square().mean(), 1e-10 * mean_square)
    return means, variance.clamp_min(tiny).sqrt().squeeze(0)


def in_units(scores: torch.Tensor, means: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """(scores - means) / unit, float32 or float64. Without their means scores keep more digits; codes are the same."""
    return ((scores - means) / unit).to(torch.promote_types(scores.dtype, torch.float32))


def swapped_prediction(
    scores: torch.Tensor, codes: torch.Tensor, crops_for_assign: Sequence[int], temperature: float
) -> torch.Tensor:
    """Mean cross-entropy of scores [V, B, K] of crops v with codes [A, B, K] of crops i, over all i and all v != i."""
    log_predictions = (scores.to(codes.dtype) / temperature).log_softmax(dim=2)  # [V, B, K]
    all_crops = log_predictions.sum(0)
    others = torch.stack([all_crops - log_predictions[i] for i in crops_for_assign])  # [A, B, K]
    return -(codes * others).sum(2).mean() / (len(scores) - 1)
