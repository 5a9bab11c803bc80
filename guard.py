"""Is a SwAV run collapsing? Measures of its codes and embeddings, and a rule that tells early.

    guard = CollapseGuard(nmb_prototypes=3000)
    guard.count(code_logits)                                   # each step; nothing waits for the device
    row = guard.measure(mean_loss, code_logits, embeddings)    # when a line is logged
    if guard.is_collapsing(row, share_done=step / steps, step=step): ...

A collapsed run sits at a loss of ln K: embeddings have drawn together, their scores differ by less than epsilon, so
codes are uniform, and uniform codes pull nothing apart. The balance of codes (Caron et al. 2020, section 3.1) rules out
that all images share one prototype, not this. Where prototypes are many, a run can leave ln K by a percent or two while
nearly uniform codes, balanced as they are, have their largest entries on a few prototypes: that has learned nothing
either. Nor has one in which all images of a step have one embedding, which a queue rewards with a loss that falls.
Copy this file to use it elsewhere: it needs torch alone.
"""

import math
from collections import deque

import torch
import torch.distributed as dist

STUCK = 0.99  # of ln K: a loss above it has learned nothing (unstable runs swing about ln K by half a percent)
STUCK_CROWDED = 0.98  # the same where codes crowd
CROWDED = 1 / 8  # distinct codes below it (0.05 in runs made to collapse, 0.2 and more in others, `bench.py collapse`)
ALIKE = 0.05  # embedding_std below it: one embedding for all images (0.1 and more in 125 other runs)
GRACE = 0.1  # share of the run in which a loss near ln K is usual: first codes mean nothing yet
STREAK = 0.1  # share of the run that it must last
LINES = 3  # and measures in which it must show
LEAST_STEPS = 80  # of the run before anything is said: in so few no run learns


class CollapseGuard:
    """Measures of a run with K = nmb_prototypes, over all processes of the default group if there is one."""

    def __init__(self, nmb_prototypes: int, device: torch.device | str = "cpu") -> None:
        self.used = torch.zeros(nmb_prototypes, device=device)  # [K], 1 where a code had its largest entry
        self.counted = 0  # codes since the last line, of this process
        self.prototypes: torch.Tensor | None = None  # of `share_changed`
        self.spreads: deque[float] = deque(maxlen=LINES)  # embedding_std of the latest lines
        self.streak: list[tuple[float, int]] = []  # share of the run and steps done at the latest lines, all stuck

    @torch.no_grad()
    def count(self, code_logits: torch.Tensor) -> None:
        """Note the prototypes in use by a step's codes, softmax of [A, B, K] for A assigning crops."""
        first_choices = code_logits.argmax(dim=2).flatten()
        self.used.index_fill_(0, first_choices, 1.0)
        self.counted += len(first_choices)

    @torch.no_grad()
    def measure(self, loss: float, code_logits: torch.Tensor, embeddings: torch.Tensor) -> dict[str, float]:
        """Numbers for a log line, after which `count` begins anew. Waits for the device; every process must call it.

        loss: mean since the last line, over all processes. code_logits [A, B, K] and embeddings [B, D] (of one crop,
        unit length): the newest step's. Returns, each 1 at its largest:
        loss_per_ln_k: 1 for predictions that know nothing.
        code_entropy: mean entropy of a code over ln K; 1 for uniform codes; sharp ones have 1 - ln B / ln K if K > B.
        mean_code_entropy: entropy of the mean code over ln K; 1 for codes in balance.
        prototypes_in_use: share that was the first choice of a code since the last line.
        distinct_codes: their number over the most that there could be, which is that of the codes if K is larger.
        embedding_std: standard deviation of a dimension of the embeddings, times sqrt(D); 0 for embeddings all alike.
        """
        codes = code_logits.softmax(dim=2)  # [A, B, K]
        embeddings = embeddings.double()
        entropies = -torch.special.xlogy(codes, codes).sum(2)  # [A, B]
        sizes = embeddings.new_tensor([entropies.numel(), len(embeddings), self.counted])
        sums = torch.cat(
            [
                sizes,
                entropies.sum(dtype=torch.double).view(1),
                codes.sum((0, 1), dtype=torch.double),
                self.used.double(),
                embeddings.sum(0),
                embeddings.square().sum().view(1),
            ]
        )
        if dist.is_initialized():
            dist.all_reduce(sums)
        k = len(self.used)
        nmb_codes, images, counted, entropy, mean_code, used, embedding, squares = sums.split(
            [1, 1, 1, 1, k, k, embeddings.shape[1], 1]
        )
        mean_code = mean_code / nmb_codes
        variance = squares / images - (embedding / images).square().sum()  # summed over dimensions
        in_use = (used > 0).double().sum()
        ln_k = math.log(max(2, k))
        values = {
            "code_entropy": entropy / nmb_codes / ln_k,
            "mean_code_entropy": -torch.special.xlogy(mean_code, mean_code).sum() / ln_k,
            "prototypes_in_use": in_use / k,
            "distinct_codes": in_use / counted.clamp(1, k),
            "embedding_std": variance.clamp_min(0).sqrt(),
        }
        self.used.zero_()
        self.counted = 0
        read = torch.stack([value.squeeze() for value in values.values()]).tolist()
        return {"loss_per_ln_k": loss / ln_k} | dict(zip(values, read, strict=True))

    def share_changed(self, prototypes: torch.Tensor) -> float | None:
        """Share of a fixed set of images whose code has another first prototype than at the call before.

        prototypes: this process's share of the images, int64 [N]. None the first time. Every process must call it.
        """
        before, self.prototypes = self.prototypes, prototypes
        if before is None:
            return None
        changed = torch.stack([(before != prototypes).sum(), torch.tensor(len(before), device=before.device)]).double()
        if dist.is_initialized():
            dist.all_reduce(changed)
        changed, images = changed.tolist()
        return changed / images

    def is_collapsing(self, row: dict[str, float], share_done: float, step: int) -> bool:
        """The rule: after a tenth of the run, it is stuck for another tenth and three lines, and 80 steps are done.

        row: of `measure`. share_done: of the run's steps. step: steps done. True once a streak.
        """
        self.spreads.append(row["embedding_std"])
        if not is_stuck(self.with_lowest_spread(row)) or share_done < GRACE:
            self.streak = []
            return False
        self.streak.append((share_done, step))
        was, now = (self._is_long(streak) for streak in (self.streak[:-1], self.streak))
        return now and not was

    def with_lowest_spread(self, row: dict[str, float]) -> dict[str, float]:
        """The row with the lowest embedding_std of the latest lines that `is_collapsing` has seen.

        One line is not enough: where all images get alike, now and then a batch has one that differs from the rest.
        """
        return row | {"embedding_std": min(self.spreads)}

    @staticmethod
    def _is_long(streak: list[tuple[float, int]]) -> bool:
        if len(streak) < LINES:
            return False
        (first, _), (last, step) = streak[0], streak[-1]
        return last - first >= STREAK and step >= LEAST_STEPS


def is_stuck(row: dict[str, float]) -> bool:
    """Whether a row of `CollapseGuard.measure` is one of a run that learns nothing."""
    mark = STUCK_CROWDED if row["distinct_codes"] < CROWDED else STUCK
    return row["loss_per_ln_k"] >= mark or row["embedding_std"] < ALIKE
