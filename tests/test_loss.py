"""loss.py: the loss, the queue and epsilon in units of the scores' std, against the float64 reference."""

import pytest
import reference
import torch
import torch.nn.functional as F
from conftest import run_processes

from loss import SwAVLoss

V, B, D, K = 4, 3, 5, 7


def batch(seed: int, images: int = B) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    embeddings = F.normalize(torch.randn(V * images, D, generator=generator, dtype=torch.float64), dim=1)
    prototypes = F.normalize(torch.randn(K, D, generator=torch.Generator().manual_seed(99), dtype=torch.float64), dim=1)
    return embeddings, embeddings @ prototypes.T, prototypes


def expected_loss(scores: torch.Tensor, crops_for_assign: tuple[int, ...], extra: dict[int, torch.Tensor]) -> float:
    crops = list(scores.split(B))
    codes = [reference.sinkhorn(crops[i], extra=extra.get(i)) for i in crops_for_assign]
    return reference.swav_loss(crops, codes, crops_for_assign).item()


@pytest.mark.parametrize("crops_for_assign", [(0, 1), (1,), (3, 0, 2)])
def test_loss_without_queue_is_the_reference(crops_for_assign):
    embeddings, scores, prototypes = batch(0)
    loss = SwAVLoss(V, crops_for_assign)(embeddings, scores, prototypes)
    assert loss.item() == pytest.approx(expected_loss(scores, crops_for_assign, {}), rel=1e-12)


def test_relative_epsilon_is_in_units_of_the_std_of_scores_minus_their_means():
    embeddings, scores, prototypes = batch(0)
    assigning = scores.view(V, B, K)[[0, 2]]
    std = (assigning - assigning.mean(1, keepdim=True)).square().mean().sqrt().item()
    relative = SwAVLoss(V, (0, 2), epsilon=0.3, relative_epsilon=True)
    fixed = SwAVLoss(V, (0, 2), epsilon=0.3 * std)
    ours, theirs = (scores.clone().requires_grad_() for _ in range(2))
    pairs = [
        module.loss_and_code_logits(embeddings, s, prototypes) for module, s in ((relative, ours), (fixed, theirs))
    ]
    losses = [loss for loss, _ in pairs]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-10)
    gradients = [torch.autograd.grad(loss, s)[0] for loss, s in zip(losses, (ours, theirs), strict=True)]
    torch.testing.assert_close(*gradients)
    codes = [code_logits.softmax(2) for _, code_logits in pairs]
    torch.testing.assert_close(*codes)
    torch.testing.assert_close(codes[1], torch.stack([reference.sinkhorn(s, epsilon=0.3 * std) for s in assigning]))


def test_relative_epsilon_keeps_codes_sharp_when_embeddings_are_close():
    embeddings, scores, prototypes = batch(0)
    entropies = []
    for shrink in (1.0, 1e-3):
        swav_loss = SwAVLoss(V, epsilon=0.3, relative_epsilon=True)
        close = scores.mean(0) + shrink * (scores - scores.mean(0))
        _, code_logits = swav_loss.loss_and_code_logits(embeddings, close, prototypes)
        codes = code_logits.softmax(2)
        entropies.append(-torch.special.xlogy(codes, codes).sum(2).mean().item())
    assert entropies[0] == pytest.approx(entropies[1], rel=1e-6)


@pytest.mark.parametrize("angle", [1e-1, 1e-2, 1e-3, 1e-4])
def test_relative_epsilon_is_accurate_in_float32_for_embeddings_that_are_almost_equal(angle):
    swav_loss = SwAVLoss(V, epsilon=0.3, relative_epsilon=True)
    embeddings, _, prototypes = batch(0)
    embeddings = F.normalize(embeddings[:1] + angle * embeddings, dim=1)
    scores = embeddings @ prototypes.T
    codes = []
    for dtype in (torch.float64, torch.float32):
        leaf = scores.to(dtype).requires_grad_()
        loss, code_logits = swav_loss.loss_and_code_logits(embeddings.to(dtype), leaf, prototypes.to(dtype))
        assert loss.isfinite() and torch.autograd.grad(loss, leaf)[0].isfinite().all()
        codes.append(code_logits.softmax(2).double())
    assert (codes[0] - codes[1]).abs().max() < 1e-6 / angle


@pytest.mark.parametrize("score", [0.0, 0.7])
def test_relative_epsilon_gives_uniform_codes_if_all_embeddings_are_alike(score):
    swav_loss = SwAVLoss(V, epsilon=0.3, relative_epsilon=True)
    embeddings, scores, prototypes = (tensor.float() for tensor in batch(0))
    scores = (score * scores[:1]).expand_as(scores).contiguous().requires_grad_()
    loss, code_logits = swav_loss.loss_and_code_logits(embeddings, scores, prototypes)
    codes = code_logits.softmax(2)
    torch.testing.assert_close(codes, torch.full_like(codes, 1 / K), rtol=1e-4, atol=0)
    assert torch.autograd.grad(loss, scores)[0].isfinite().all()


def test_relative_epsilon_scores_the_queue_in_the_same_unit():
    swav_loss = SwAVLoss(V, (0, 2), queue_length=B, feat_dim=D, epsilon=0.3, relative_epsilon=True).double()
    swav_loss.start_queue()
    embeddings, scores, prototypes = batch(0)
    swav_loss(embeddings, scores, prototypes)
    embeddings, scores, _ = batch(1)
    queued = swav_loss.queue.clone() @ prototypes.T
    _, code_logits = swav_loss.loss_and_code_logits(embeddings, scores, prototypes)
    assigning = scores.view(V, B, K)[[0, 2]]
    epsilon = 0.3 * (assigning - assigning.mean(1, keepdim=True)).square().mean().sqrt().item()
    expected = [reference.sinkhorn(s, epsilon=epsilon, extra=q) for s, q in zip(assigning, queued, strict=True)]
    torch.testing.assert_close(code_logits.softmax(2), torch.stack(expected))


def test_the_queue_is_used_once_it_is_full_and_scored_with_the_current_prototypes():
    swav_loss = SwAVLoss(V, (0, 2), queue_length=2 * B, feat_dim=D).double()
    swav_loss.start_queue()
    past = [batch(seed) for seed in range(3)]
    for embeddings, scores, prototypes in past[:2]:
        loss = swav_loss(embeddings, scores, prototypes)
        assert loss.item() == pytest.approx(expected_loss(scores, (0, 2), {}), rel=1e-12)
    embeddings, scores, _ = past[2]
    current = F.normalize(torch.randn(K, D, dtype=torch.float64), dim=1)
    newest_first = {i: torch.cat([past[s][0].split(B)[i] for s in (1, 0)]) for i in (0, 2)}
    extra = {i: queued @ current.T for i, queued in newest_first.items()}
    torch.testing.assert_close(swav_loss.queue, torch.stack([newest_first[0], newest_first[2]]))
    loss = swav_loss(embeddings, embeddings @ current.T, current)
    assert loss.item() == pytest.approx(expected_loss(embeddings @ current.T, (0, 2), extra), rel=1e-12)
    assert abs(loss.item() - expected_loss(embeddings @ current.T, (0, 2), {})) > 1e-6


@pytest.mark.parametrize("options", [{}, {"epsilon": 0.3, "relative_epsilon": True}])
def test_code_logits_come_with_the_same_loss_and_without_gradient(options):
    embeddings, scores, prototypes = batch(0)
    scores.requires_grad_()
    loss, code_logits = SwAVLoss(V, (0, 2), **options).loss_and_code_logits(embeddings, scores, prototypes)
    assert torch.equal(loss, SwAVLoss(V, (0, 2), **options)(embeddings, scores, prototypes))
    assert code_logits.shape == (2, B, K) and not code_logits.requires_grad
    std = 1.0
    if options:
        assigning = scores.detach().view(V, B, K)[[0, 2]]
        std = (assigning - assigning.mean(1, keepdim=True)).square().mean().sqrt().item()
    epsilon = options.get("epsilon", 0.05) * std
    codes = torch.stack([reference.sinkhorn(scores.view(V, B, K)[i], epsilon=epsilon) for i in (0, 2)])
    torch.testing.assert_close(code_logits.softmax(2), codes)


@pytest.mark.parametrize("queue_length", [0, 12 * B])
def test_compiles_into_one_graph_also_while_the_queue_fills(queue_length):
    eager, to_compile = (SwAVLoss(V, queue_length=queue_length, feat_dim=D).double() for _ in range(2))
    torch._dynamo.reset()
    compiled = torch.compile(to_compile, fullgraph=True, backend="aot_eager")
    for seed in range(16):
        if seed == 2:
            eager.start_queue()
            to_compile.start_queue()
        results = []
        for module in (eager, compiled):
            embeddings, scores, prototypes = batch(seed)
            loss = module(embeddings, scores.requires_grad_(), prototypes)
            loss.backward()
            results.append((loss, scores.grad))
        torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-14)
    assert queue_length == to_compile.queue_filled


def test_queue_stays_empty_until_started():
    swav_loss = SwAVLoss(V, queue_length=B, feat_dim=D).double()
    for seed in range(3):
        swav_loss(*batch(seed))
    assert swav_loss.queue_filled == 0 and not swav_loss.queue.any()


def test_the_state_dict_holds_the_queue_and_how_far_it_is_filled():
    first, second = (SwAVLoss(V, queue_length=2 * B, feat_dim=D).double() for _ in range(2))
    first.start_queue()
    first(*batch(0))
    second.load_state_dict(first.state_dict())
    for seed in (1, 2):
        assert first(*batch(seed)).item() == second(*batch(seed)).item()
    assert second.queue_filled == 2 * B


def test_no_gradient_flows_through_codes_or_queue():
    embeddings, scores, prototypes = batch(0)
    scores.requires_grad_()
    SwAVLoss(V)(embeddings, scores, prototypes).backward()
    same_scores = scores.detach().clone().requires_grad_()
    codes = [reference.sinkhorn(same_scores.detach().split(B)[i]) for i in (0, 1)]
    (expected,) = torch.autograd.grad(reference.swav_loss(list(same_scores.split(B)), codes), same_scores)
    torch.testing.assert_close(scores.grad, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "options, name",
    [
        ({"nmb_crops": 1}, "nmb_crops"),
        ({"crops_for_assign": (0, 8)}, "crops_for_assign"),
        ({"crops_for_assign": (-1,)}, "crops_for_assign"),
        ({"crops_for_assign": ()}, "crops_for_assign"),
        ({"crops_for_assign": (1, 1)}, "crops_for_assign"),
        ({"temperature": 0.0}, "temperature"),
        ({"epsilon": -0.1}, "epsilon"),
        ({"sinkhorn_iterations": 0}, "sinkhorn_iterations"),
        ({"queue_length": -1}, "queue_length"),
    ],
)
def test_bad_options_are_named(options, name):
    with pytest.raises(ValueError, match=f"^{name}: expected .* got"):
        SwAVLoss(**options)


def test_batches_that_do_not_fit_are_refused():
    embeddings, scores, prototypes = batch(0)
    with pytest.raises(ValueError, match="scores: expected"):
        SwAVLoss(5)(embeddings, scores, prototypes)
    swav_loss = SwAVLoss(V, queue_length=4, feat_dim=D).double()
    swav_loss.start_queue()
    with pytest.raises(ValueError, match="queue_length: expected a multiple of the batch of 3, got 4"):
        swav_loss(embeddings, scores, prototypes)


def test_a_gathered_queue_equals_that_of_one_process_and_scatters_to_any_number():
    alone = SwAVLoss(V, queue_length=8, feat_dim=D).double()
    alone.start_queue()
    for seed in range(3):
        alone(*batch(seed, images=4))
    for gathered, is_restored in run_processes(gather_and_scatter, 2, alone.gather_queue(4)):
        assert gathered["filled"] == 8 and gathered["started"]
        torch.testing.assert_close(gathered["embeddings"], alone.queue, rtol=0, atol=0)
        assert is_restored


def test_relative_epsilon_is_in_units_of_the_spread_over_all_processes():
    embeddings, scores, prototypes = batch(0, images=4)
    criterion = SwAVLoss(V, (0, 2), epsilon=0.3, relative_epsilon=True)
    loss, code_logits = criterion.loss_and_code_logits(embeddings, scores, prototypes)
    losses, logits = zip(*run_processes(loss_and_codes_of_shards, 2), strict=True)
    torch.testing.assert_close(torch.stack(losses).mean(), loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.cat(logits, dim=1).softmax(2), code_logits.softmax(2), rtol=1e-10, atol=1e-14)


def loss_and_codes_of_shards(rank: int, world_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and code logits of this process, which has two of the four images."""
    own = [4 * v + 2 * rank + i for v in range(V) for i in range(2)]
    embeddings, scores, prototypes = batch(0, images=4)
    criterion = SwAVLoss(V, (0, 2), epsilon=0.3, relative_epsilon=True)
    return criterion.loss_and_code_logits(embeddings[own], scores[own], prototypes)


def gather_and_scatter(rank: int, world_size: int, of_one_process: dict) -> tuple[dict, bool]:
    """The queue gathered from two processes, and whether the queue of one process restores theirs."""
    swav_loss, restored = (SwAVLoss(V, queue_length=4, feat_dim=D).double() for _ in range(2))
    swav_loss.start_queue()
    for seed in range(3):
        own = [4 * v + 2 * rank + i for v in range(V) for i in range(2)]
        embeddings, scores, prototypes = batch(seed, images=4)
        swav_loss(embeddings[own], scores[own], prototypes)
    restored.scatter_queue(of_one_process, 2)
    is_restored = (
        torch.equal(restored.queue, swav_loss.queue)
        and torch.equal(restored.queue_filled, swav_loss.queue_filled)
        and restored.queue_started == swav_loss.queue_started
    )
    return swav_loss.gather_queue(2), is_restored
