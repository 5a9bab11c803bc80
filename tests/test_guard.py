"""Measures of collapse, and the rule."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import run_processes

from guard import ALIKE, CROWDED, STUCK, STUCK_CROWDED, CollapseGuard, is_stuck

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


def test_prototypes_in_use_are_those_of_the_steps_since_the_last_line():
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


def share_of_processes(rank: int, world_size: int) -> tuple:
    logits, embeddings = batch()
    share = slice(0, 2) if rank == 0 else slice(2, None)
    guard = CollapseGuard(K)
    guard.count(logits[:, share])
    row = guard.measure(1.5, logits[:, share], embeddings[share])
    changed = [guard.share_changed(codes[share]) for codes in (torch.arange(6), torch.tensor([0, 9, 2, 3, 4, 9]))]
    return row, changed


def test_two_processes_measure_what_one_does():
    processes = run_processes(share_of_processes, 2)
    logits, embeddings = batch()
    guard = CollapseGuard(K)
    guard.count(logits)
    expected = guard.measure(1.5, logits, embeddings)
    for row, changed in processes:
        assert row == pytest.approx(expected)  # distinct_codes too: fewer codes than prototypes in each process
        assert changed == [None, pytest.approx(2 / 6)]


def first_word(losses: list[float], steps: int = 5000, **measures: float) -> float | None:
    """Share of the run done when the rule speaks, given the loss over ln K of equally spaced lines."""
    healthy = {"distinct_codes": 1.0, "embedding_std": 0.8}
    rows = [healthy | {"loss_per_ln_k": loss} | measures for loss in losses]
    return first_of(rows, steps)


def first_of(rows: list[dict[str, float]], steps: int) -> float | None:
    guard = CollapseGuard(K)
    shares = [(i + 1) / len(rows) for i in range(len(rows))]
    spoken = [
        share
        for share, row in zip(shares, rows, strict=True)
        if guard.is_collapsing(row, share, step=round(share * steps))
    ]
    assert len(spoken) <= 1  # once a streak
    return spoken[0] if spoken else None


@pytest.mark.parametrize("lines", [12, 30, 300, 4000])
def test_a_run_that_stays_at_ln_k_is_told_in_its_first_third(lines):
    assert first_word([1.02] + [1.0] * (lines - 1)) <= 1 / 3
    assert first_word([1.03, *[1.0, 0.993] * (lines // 2)]) <= 1 / 3  # a high rate


def test_runs_that_learn_slowly_or_start_at_ln_k_are_left_alone():
    assert first_word([1.02, 1.0, 0.993, *[0.98] * 9]) is None
    assert first_word([1.0] * 30 + [0.985] * 170) is None
    assert first_word([0.999 if i % 3 else 0.985 for i in range(200)]) is None


def test_nothing_is_said_of_a_few_steps():
    assert first_word([1.0] * 40, steps=40) is None
    assert first_word([1.0] * 100, steps=100) == pytest.approx(0.8)
    assert first_word([1.0] * 12, steps=264) <= 1 / 3


def test_a_run_that_collapses_late_is_told_too():
    assert first_word([0.9] * 50 + [1.0] * 50) == pytest.approx(0.61, abs=0.02)


def test_codes_that_crowd_on_few_prototypes_tell_it_a_little_below_ln_k():
    assert first_word([1.02] + [0.985] * 11, distinct_codes=0.05) <= 1 / 3
    assert first_word([1.02] + [0.985] * 11, distinct_codes=0.2) is None
    assert first_word([1.02] + [0.9] * 11, distinct_codes=0.05) is None  # few clusters, well predicted
    for distinct, mark in ((CROWDED - 0.01, STUCK_CROWDED), (CROWDED, STUCK)):
        for loss in (mark, mark - 1e-6):
            row = {"loss_per_ln_k": loss, "distinct_codes": distinct, "embedding_std": ALIKE}
            assert is_stuck(row) == (loss >= mark)


def test_embeddings_that_are_all_alike_tell_it_at_any_loss():
    assert first_word([1.02] + [0.8] * 29, embedding_std=ALIKE - 0.01) <= 1 / 3
    assert first_word([1.02] + [0.8] * 29, embedding_std=ALIKE) is None
    now_and_then = [
        {"loss_per_ln_k": 0.8, "distinct_codes": 0.3, "embedding_std": 0.0 if i % 3 == 0 else 0.4} for i in range(30)
    ]
    assert first_of(now_and_then, steps=5000) <= 1 / 3
