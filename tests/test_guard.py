"""guard.py: measures of collapse, the rule, the likely cause, what it remembers over restarts."""

import io
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import run_processes

from defaults import RELATIVE_EPSILON
from guard import (
    COLLAPSED_STD,
    CROWDED_SHARE,
    SAFE_EPSILON,
    STUCK_LOSS,
    STUCK_LOSS_CROWDED,
    TRIVIAL_R2,
    TRIVIAL_SHARE,
    CollapseGuard,
    describe_collapse,
    describe_slow,
    diagnose_collapse,
    is_stuck,
)

A, B, D, K = 2, 6, 5, 8


def batch(images: int = B) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(A, images, K, generator=generator), F.normalize(
        torch.randn(images, D, generator=generator), dim=1
    )


def test_measures_are_what_their_names_say():
    logits, embeddings = batch()
    guard = CollapseGuard(K)
    guard.count(logits)
    row = guard.measure(1.5, logits, embeddings)
    codes = logits.double().softmax(2)
    mean_code = codes.mean((0, 1))
    assert row["loss_per_ln_k"] == pytest.approx(1.5 / math.log(K))
    assert row["code_entropy"] == pytest.approx(-(codes * codes.log()).sum(2).mean().item() / math.log(K))
    assert row["mean_code_entropy"] == pytest.approx(-(mean_code * mean_code.log()).sum().item() / math.log(K))
    assert row["prototypes_in_use"] == len(logits.argmax(2).unique()) / K
    expected = embeddings.double().var(0, correction=0).mean().sqrt().item() * D**0.5
    assert row["embedding_std"] == pytest.approx(expected)


def test_prototypes_in_use_are_those_since_the_last_log_line():
    guard = CollapseGuard(K)
    _, embeddings = batch()
    for used in ([0, 1], [1, 5]):
        logits = F.one_hot(torch.tensor(used), K).float().expand(A, 2, K) * 50
        guard.count(logits)
    row = guard.measure(1.0, logits, embeddings)
    assert row["prototypes_in_use"] == row["distinct_codes"] == 3 / K  # eight codes, eight prototypes
    guard.count(logits)
    row = guard.measure(1.0, logits, embeddings)
    assert row["prototypes_in_use"] == 2 / K and row["distinct_codes"] == 2 / (A * 2)
    assert row["code_entropy"] == pytest.approx(0, abs=1e-9)


def test_a_collapsed_batch_shows_in_every_measure():
    embeddings = torch.ones(B, D) / D**0.5
    row = CollapseGuard(K).measure(math.log(K), torch.zeros(A, B, K), embeddings)
    assert [row[name] for name in ("loss_per_ln_k", "code_entropy", "mean_code_entropy")] == pytest.approx([1, 1, 1])
    assert row["embedding_std"] == pytest.approx(0, abs=1e-3)


def share_of_processes(rank: int, world_size: int) -> dict:
    logits, embeddings = batch()
    share = slice(0, 2) if rank == 0 else slice(2, None)
    guard = CollapseGuard(K)
    guard.count(logits[:, share])
    return guard.measure(1.5, logits[:, share], embeddings[share])


def test_two_processes_measure_what_one_does():
    logits, embeddings = batch()
    guard = CollapseGuard(K)
    guard.count(logits)
    expected = guard.measure(1.5, logits, embeddings)
    for row in run_processes(share_of_processes, 2):
        assert row == pytest.approx(expected)  # distinct_codes too: fewer codes than prototypes in each process


def test_the_share_of_images_that_changed_their_prototype():
    guard = CollapseGuard(K)
    codes = torch.arange(6), torch.tensor([0, 9, 2, 3, 4, 9]), torch.arange(7)  # at last other images
    assert [guard.share_changed(of_images) for of_images in codes] == [None, 2 / 6, None]


def first_warning(losses: list[float], steps: int = 5000, **measures: float) -> float | None:
    """Share of the run done at the warning, given the loss over ln K of equally spaced log lines."""
    healthy = {"distinct_codes": 1.0, "embedding_std": 0.8}
    rows = [healthy | {"loss_per_ln_k": loss} | measures for loss in losses]
    return first_warning_of(rows, steps)


def first_warning_of(rows: list[dict[str, float]], steps: int) -> float | None:
    guard = CollapseGuard(K)
    shares = [(i + 1) / len(rows) for i in range(len(rows))]
    warnings = [
        share for share, row in zip(shares, rows, strict=True) if guard.update(row, share, step=round(share * steps))
    ]
    assert len(warnings) <= 1  # once per streak
    return warnings[0] if warnings else None


@pytest.mark.parametrize("lines", [12, 30, 300, 4000])
def test_warns_of_a_run_that_stays_at_ln_k_in_its_first_third(lines):
    assert first_warning([1.02] + [1.0] * (lines - 1)) <= 1 / 3
    assert first_warning([1.03, *[1.0, 0.993] * (lines // 2)]) <= 1 / 3  # as with a high learning rate


def test_does_not_warn_of_runs_that_learn_slowly_or_start_at_ln_k():
    assert first_warning([1.02, 1.0, 0.993, *[0.98] * 9]) is None
    assert first_warning([1.0] * 30 + [0.985] * 170) is None
    assert first_warning([0.999 if i % 3 else 0.985 for i in range(200)]) is None


def test_does_not_warn_in_the_first_steps():
    assert first_warning([1.0] * 40, steps=40) is None
    assert first_warning([1.0] * 100, steps=100) == pytest.approx(0.8)
    assert first_warning([1.0] * 12, steps=264) <= 1 / 3


HEALTHY_ROW = {"distinct_codes": 1.0, "embedding_std": 0.8, "loss_per_ln_k": 0.9}
STUCK_ROW = HEALTHY_ROW | {"loss_per_ln_k": 1.0}


@pytest.mark.parametrize("steps", [10_000, 1_000_000])
def test_speaks_within_a_thousand_steps_of_long_runs(steps):
    guard = CollapseGuard(K)
    rows = ((step, guard.update(STUCK_ROW, step / steps, step)) for step in range(50, steps, 50))
    assert next(step for step, warns in rows if warns) == 1000
    healthy = CollapseGuard(K)
    assert not any(healthy.update(STUCK_ROW if s < 900 else HEALTHY_ROW, s / steps, s) for s in range(50, 5000, 50))


@pytest.mark.parametrize("interrupted_after", [0, 1, 3, 5])
def test_a_resumed_guard_remembers(interrupted_after):
    logits, embeddings = batch()
    results = []
    for is_resumed in (False, True):
        guard, rows = CollapseGuard(K), []
        for line in range(8):
            if is_resumed and line == interrupted_after:
                state, guard = guard.gather(), CollapseGuard(K)
                guard.load_state(torch.load(save(state), weights_only=True))
            guard.count(logits[:, : line % 3 + 1])
            if line % 2:
                row = guard.measure(math.log(K), logits, embeddings)
                rows += [row, guard.update(row | {"loss_per_ln_k": 1.0}, line / 8, 100 + line)]
            rows.append(guard.share_changed(torch.arange(5) % (line + 1)))
        results.append([*rows, guard.streak, list(guard.recent_stds), guard.last_row])
    assert results[0] == results[1] and results[0].count(True) == 1  # warned of once


def save(state: dict) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


def gathered(rank: int, world_size: int, state: dict | None) -> dict:
    guard = CollapseGuard(K)
    if state:
        guard.load_state(state)
    else:
        guard.count(F.one_hot(torch.tensor([rank]), K).float().expand(A, 1, K))
        guard.share_changed(torch.arange(7))
    state = guard.gather()
    return state | {"changed": guard.share_changed(torch.tensor([0, 1, 2, 3, 4, 9, 9]))}


def test_processes_gather_what_one_loads_and_the_other_way_round():
    first, second = run_processes(gathered, 2, None)
    assert first["used"].tolist() == second["used"].tolist() == [1, 1] + [0] * (K - 2)
    assert first["counted"] == 2 * A and first["codes"].tolist() == list(range(7))
    alone = gathered(0, 1, first)
    assert alone["changed"] == first["changed"] == pytest.approx(2 / 7) and alone["counted"] == 2 * A
    for state in run_processes(gathered, 2, alone):
        assert state["counted"] == 2 * A and state["changed"] == pytest.approx(2 / 7)


def test_warns_of_a_run_that_collapses_late():
    assert first_warning([0.9] * 50 + [1.0] * 50) == pytest.approx(0.61, abs=0.02)


def test_warns_a_little_below_ln_k_if_codes_crowd_on_few_prototypes():
    assert first_warning([1.02] + [0.985] * 11, distinct_codes=0.05) <= 1 / 3
    assert first_warning([1.02] + [0.985] * 11, distinct_codes=0.2) is None
    assert first_warning([1.02] + [0.9] * 11, distinct_codes=0.05) is None  # few clusters, well predicted
    for distinct, limit in ((CROWDED_SHARE - 0.01, STUCK_LOSS_CROWDED), (CROWDED_SHARE, STUCK_LOSS)):
        for loss in (limit, limit - 1e-6):
            row = {"loss_per_ln_k": loss, "distinct_codes": distinct, "embedding_std": COLLAPSED_STD}
            assert is_stuck(row) == (loss >= limit)


def test_warns_at_any_loss_if_all_embeddings_are_alike():
    assert first_warning([1.02] + [0.8] * 29, embedding_std=COLLAPSED_STD - 0.01) <= 1 / 3
    assert first_warning([1.02] + [0.8] * 29, embedding_std=COLLAPSED_STD) is None
    now_and_then = [
        {"loss_per_ln_k": 0.8, "distinct_codes": 0.3, "embedding_std": 0.0 if i % 3 == 0 else 0.4} for i in range(30)
    ]
    assert first_warning_of(now_and_then, steps=5000) <= 1 / 3


def test_watch_measures_and_applies_the_rule():
    logits, embeddings = torch.zeros(A, B, K), torch.ones(B, D) / D**0.5  # collapsed
    watching, apart = CollapseGuard(K), CollapseGuard(K)
    for share_done in (0.1, 0.2, 0.3):
        for guard in (watching, apart):
            guard.count(logits)
        row = apart.measure(math.log(K), logits, embeddings)
        row["collapsing"] = apart.update(row, share_done, step=500)
        assert watching.watch(math.log(K), logits, embeddings, share_done=share_done, step=500) == row
    assert row["collapsing"]


def test_an_epoch_is_stuck_by_its_own_loss_and_the_lowest_of_the_recent_stds():
    guard = CollapseGuard(K)
    row = {"loss_per_ln_k": 0.5, "distinct_codes": 1.0}
    for std, loss, expected in ((0.8, 0.5, False), (0.8, 1.0, True), (0.01, 0.5, True), (0.8, 0.5, True)):
        guard.update(row | {"embedding_std": std}, share_done=0.5, step=500)
        assert guard.epoch_is_stuck(loss * math.log(K)) == expected
    for _ in range(2):  # the low value is now older than three log lines
        guard.update(row | {"embedding_std": 0.8}, share_done=0.5, step=500)
    assert not guard.epoch_is_stuck(0.5 * math.log(K))


OPTIONS = dict(
    relative_epsilon="on", epsilon=0.3, queue_length=0, base_lr=0.9, final_lr=0.0009, start_warmup=0.0, other=1
)


@pytest.mark.parametrize(
    "options, cause, change",
    [
        ({"relative_epsilon": "off", "epsilon": 5.0, "queue_length": 64}, "--epsilon 5",
         {"relative_epsilon": "on", "epsilon": 0.3}),
        ({"queue_length": 64}, "64 older embeddings of --queue_length", {"queue_length": 0}),
        ({}, "--base_lr 0.9", {"base_lr": 0.3, "final_lr": 0.0003}),
        ({"start_warmup": 0.1}, "--base_lr 0.9", {"base_lr": 0.3, "final_lr": 0.0003, "start_warmup": 0.03333}),
    ],
)  # fmt: skip
def test_the_likely_cause_of_a_collapse_and_the_options_to_change(options, cause, change):
    text, changed = diagnose_collapse(OPTIONS | options)
    assert cause in text and changed == change
    row = dict(loss_per_ln_k=0.9991, code_entropy=1.0, prototypes_in_use=0.25, embedding_std=0.04)
    message = describe_collapse(row, diagnose_collapse(OPTIONS | options)[0], step=200)
    assert message.startswith("collapsing: the loss is 0.999 ln K") and message.endswith(text)
    assert all(share in message for share in ("100%", "25%", "4%"))
    assert "some runs need 200 steps" in describe_collapse(row, diagnose_collapse(OPTIONS | options)[0], step=199)


def test_the_safe_epsilon_is_the_default_of_small_sets():
    assert SAFE_EPSILON == RELATIVE_EPSILON


def test_a_run_that_learned_only_colour_and_brightness_is_slow_once():
    guard = CollapseGuard(8)
    late, high = TRIVIAL_SHARE, TRIVIAL_R2
    assert not guard.is_slow(high, late - 0.01) and not guard.is_slow(high - 0.01, late) and not guard.is_slow(None, 1)
    assert [guard.is_slow(high, share) for share in (late, 0.5, 0.6)] == [True, False, False]
    assert not guard.is_slow(0.1, 0.7) and guard.is_slow(0.9, 0.8)  # it came back
    assert describe_slow(0.62, 7).startswith("slow: after epoch 7 colour and brightness explain 62% of the embeddings")
