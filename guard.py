"""Is a SwAV run collapsing? Measures of its codes and embeddings, a rule that warns early, the likely cause.

    guard = CollapseGuard(nmb_prototypes=3000)
    guard.count(code_logits)                                          # each step; the host does not wait
    row = guard.watch(mean_loss, code_logits, embeddings, share_done=step / steps, step=step)  # for each log line
    if row["collapsing"]: ...

A collapsed run stays at a loss of ln K. Its embeddings have become similar, so their scores differ by less than
epsilon; then codes are uniform, and uniform codes separate nothing. Balanced codes (Caron et al. 2020, section 3.1)
rule out that all images share one prototype; they do not rule out this. With many prototypes a run can be a percent or
two below ln K and have learned nothing: codes are nearly uniform, with their largest entries on few prototypes. With a
queue, all images of a step can share one embedding while the loss falls.
Copy this file to use it elsewhere: it needs only torch.
"""

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

# Thresholds. Their evidence is in MEASURED.md.
STUCK_LOSS = 0.99  # of ln K: at this loss nothing is learned (unstable runs vary around ln K by half a percent)
STUCK_LOSS_CROWDED = 0.98  # of ln K, where codes crowd on few prototypes
CROWDED_SHARE = 1 / 8  # distinct codes below this share crowd (0.05 in runs made to collapse, 0.2 and more in others)
COLLAPSED_STD = 0.05  # embedding_std below this: one embedding for all images (0.1 and more in 125 healthy runs)
GRACE_SHARE = 0.1  # share of the run at its start in which a loss near ln K is normal: first codes mean nothing yet
STREAK_SHARE = 0.1  # share of the run for which it must be stuck
GRACE_STEPS = STREAK_STEPS = 500  # upper limits of these shares
STREAK_LINES = 3  # log lines in which it must show
MIN_STEPS = 80  # no warning before this step: no run learns in so few
SLOW_STEPS = 200  # healthy runs can stay near ln K this long
TRIVIAL_R2 = 0.5  # share of the embeddings that colour and brightness explain in a run that learned little else
TRIVIAL_SHARE = 0.25  # share of the run at its start in which that is normal

NO_FLOAT64 = ("mps",)  # devices without it
SAFE_EPSILON = 0.3  # in units of the scores' std, see loss.py


class CollapseGuard:
    """Watches a run with K = nmb_prototypes, over all processes of the default group if there is one."""

    def __init__(self, nmb_prototypes: int, device: torch.device | str = "cpu") -> None:
        self.used = torch.zeros(nmb_prototypes, device=device)  # [K], 1 where a code had its largest entry
        self.counted = 0  # codes of this process since the last log line
        self.previous_codes: torch.Tensor | None = None  # of `share_changed`
        self.recent_stds: deque[float] = deque(maxlen=STREAK_LINES)  # embedding_std of the latest log lines
        self.last_row: dict[str, float] = {}
        self.streak: list[list[float]] = []  # [share of the run, step] of the latest log lines, all stuck
        self.knows_that_run_is_slow = False

    @torch.no_grad()
    def count(self, code_logits: torch.Tensor) -> None:
        """Note which prototypes a step's codes use: the softmax of code_logits [A, B, K]."""
        first_choices = code_logits.argmax(dim=2).flatten()
        self.used.index_fill_(0, first_choices, 1.0)
        self.counted += len(first_choices)

    def watch(
        self, loss: float, code_logits: torch.Tensor, embeddings: torch.Tensor, share_done: float, step: int
    ) -> dict[str, float | bool]:
        """Measure (see `measure`) and update the rule (see `update`): the measures, and "collapsing"."""
        row = self.measure(loss, code_logits, embeddings)
        return row | {"collapsing": self.update(row, share_done, step)}

    @torch.no_grad()
    def measure(self, loss: float, code_logits: torch.Tensor, embeddings: torch.Tensor) -> dict[str, float]:
        """Measure for a log line, and restart `count`. Waits for the device. Every process must call it.

        loss: mean since the last log line, over all processes. code_logits [A, B, K] and embeddings [B, D] (of one
        crop, unit length): of the latest step. Returns shares of 1 (loss_per_ln_k may be above 1):
        loss_per_ln_k: 1 if predictions know nothing.
        code_entropy: mean entropy of a code over ln K; 1 for uniform codes, 1 - ln B / ln K for sharp balanced ones if
        K > B.
        mean_code_entropy: entropy of the mean code over ln K; 1 for balanced codes.
        prototypes_in_use: share that was the largest entry of a code since the last log line.
        distinct_codes: prototypes in use over the most possible: K, or the number of codes if that is smaller.
        embedding_std: std of each dimension of the embeddings, times sqrt(D); 0 if all embeddings are the same.
        """
        codes = code_logits.softmax(dim=2)  # [A, B, K]
        exact = torch.float32 if embeddings.device.type in NO_FLOAT64 else torch.float64
        embeddings = embeddings.to(exact)
        entropies = -torch.special.xlogy(codes, codes).sum(2)  # [A, B]
        parts = [
            embeddings.new_tensor([entropies.numel(), len(embeddings), self.counted]),
            entropies.sum(dtype=exact).view(1),
            codes.sum((0, 1), dtype=exact),
            self.used.to(exact),
            embeddings.sum(0),
            embeddings.square().sum().view(1),
        ]
        sums = torch.cat(parts)
        if dist.is_initialized():
            dist.all_reduce(sums)
        counts, entropy, mean_code, used, embedding, squares = sums.split([len(part) for part in parts])
        nmb_codes, images, counted = counts
        k = len(self.used)
        mean_code = mean_code / nmb_codes
        variance = squares / images - (embedding / images).square().sum()  # summed over dimensions
        in_use = (used > 0).to(exact).sum()
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
        numbers = torch.stack([value.squeeze() for value in values.values()]).tolist()
        return {"loss_per_ln_k": loss / ln_k} | dict(zip(values, numbers, strict=True))

    def update(self, row: dict[str, float], share_done: float, step: int) -> bool:
        """Apply the rule to a row of `measure`; True once for each time that the run is found to collapse.

        Rule: after the first tenth of the run, it has been stuck (`is_stuck`) for another tenth and three log lines,
        and 80 steps are done. A tenth is at most 500 steps. share_done: share of the run's steps.
        step: steps done.
        """
        self.recent_stds.append(row["embedding_std"])
        self.last_row = row | {"embedding_std": min(self.recent_stds)}
        if not is_stuck(self.last_row) or (share_done < GRACE_SHARE and step < GRACE_STEPS):
            self.streak = []
            return False
        self.streak.append([share_done, step])
        was_long, is_long = (_is_long(streak) for streak in (self.streak[:-1], self.streak))
        return is_long and not was_long

    def is_slow(self, trivial_r2: float | None, share_done: float) -> bool:
        """Whether the run has learned little but colour and brightness; True once. trivial_r2: see features.py."""
        is_slow = trivial_r2 is not None and trivial_r2 >= TRIVIAL_R2 and share_done >= TRIVIAL_SHARE
        is_new, self.knows_that_run_is_slow = is_slow and not self.knows_that_run_is_slow, is_slow
        return is_new

    def epoch_is_stuck(self, epoch_loss: float) -> bool:
        """Whether the epoch that ends now learned nothing, by its mean loss and the latest rows given to `update`.

        The lowest of the recent embedding_std counts: among embeddings that are all alike one may differ, now and then.
        """
        return is_stuck(self.last_row | {"loss_per_ln_k": epoch_loss / math.log(max(2, len(self.used)))})

    def share_changed(self, codes: torch.Tensor) -> float | None:
        """Share of tracked images whose largest code entry is on another prototype than at the last call.

        codes: index of that prototype for each of the images, int64 [N], on the CPU, the same in all processes. None at
        the first call, or for another number of images.
        """
        before, self.previous_codes = self.previous_codes, codes
        if before is None or len(before) != len(codes):
            return None
        return (before != codes).sum().item() / len(codes)

    def gather(self) -> dict[str, Any]:
        """Gather what the guards of all processes remember, for a checkpoint. Every process must call it."""
        used, counted = self.used.clone(), self.counted
        if dist.is_initialized():
            total = torch.tensor(counted, device=used.device)
            dist.all_reduce(total)
            dist.all_reduce(used, dist.ReduceOp.MAX)
            counted = int(total)
        return {
            "used": used,
            "counted": counted,
            "codes": self.previous_codes,
            "streak": list(self.streak),
            "recent_stds": list(self.recent_stds),
            "last_row": self.last_row,
            "knows_that_run_is_slow": self.knows_that_run_is_slow,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Load what `gather` gave, also if the number of processes has changed."""
        if len(state["used"]) == len(self.used):
            self.used.copy_(state["used"])
            is_first = not dist.is_initialized() or dist.get_rank() == 0
            self.counted = state["counted"] if is_first else 0
        self.previous_codes, self.streak = state["codes"], list(state["streak"])
        self.recent_stds.extend(state["recent_stds"])
        self.last_row, self.knows_that_run_is_slow = state["last_row"], state["knows_that_run_is_slow"]


def _is_long(streak: list[list[float]]) -> bool:
    if len(streak) < STREAK_LINES:
        return False
    (first, first_step), (last, step) = streak[0], streak[-1]
    return (last - first >= STREAK_SHARE or step - first_step >= STREAK_STEPS) and step >= MIN_STEPS


def is_stuck(row: Mapping[str, float]) -> bool:
    """Whether a row of `CollapseGuard.measure` is that of a run that learns nothing."""
    stuck_loss = STUCK_LOSS_CROWDED if row["distinct_codes"] < CROWDED_SHARE else STUCK_LOSS
    return row["loss_per_ln_k"] >= stuck_loss or row["embedding_std"] < COLLAPSED_STD


def diagnose_collapse(options: Mapping[str, Any]) -> tuple[str, dict[str, str | float]]:
    """Give the likely cause of a collapse, and the options of train.py to change: one thing at a time.

    options: relative_epsilon ("on" or "off"), epsilon, queue_length, base_lr, final_lr and start_warmup of the run.
    """
    if options["relative_epsilon"] == "off":
        cause = f"scores of different images differ by less than --epsilon {options['epsilon']:g}, so codes are uniform"
        return cause, {"relative_epsilon": "on", "epsilon": SAFE_EPSILON}
    if queue_length := options["queue_length"]:
        cause = f"codes separate the {queue_length} older embeddings of --queue_length from new ones, not images"
        return cause, {"queue_length": 0}
    lrs = {name: options[name] for name in ("base_lr", "final_lr", "start_warmup") if options[name]}
    cause = f"weights move too fast at --base_lr {options['base_lr']:g} for codes to settle"
    return cause, {name: float(f"{lr / 3:.4g}") for name, lr in lrs.items()}


def describe_collapse(row: Mapping[str, float], cause: str, step: int) -> str:
    """Say what a row of `CollapseGuard.measure` shows of a collapsing run, with the cause from `diagnose_collapse`."""
    patience = f" (or it is slow: some runs need {SLOW_STEPS} steps to leave ln K)" if step < SLOW_STEPS else ""
    return (
        f"collapsing: the loss is {row['loss_per_ln_k']:.3f} ln K, codes have {row['code_entropy']:.0%} of the largest "
        f"entropy and use {row['prototypes_in_use']:.0%} of the prototypes, embeddings have "
        f"{row['embedding_std']:.0%} of the largest std; likely cause: {cause}{patience}"
    )


def describe_slow(trivial_r2: float, epoch: int) -> str:
    """Say what a run that `CollapseGuard.is_slow` has learned, and what to do."""
    return (
        f"slow: after epoch {epoch} colour and brightness explain {trivial_r2:.0%} of the embeddings, so the run has "
        "learned little else; it may still learn more; otherwise leave out --nmb_prototypes and --blur_sigma if you "
        "set them, or try another --seed, with another --dump_path"
    )
