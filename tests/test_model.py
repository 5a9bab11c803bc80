"""model.py: backbones against torchvision's, the model against the float64 reference, BatchNorm, checkpoints."""

import copy
import itertools
import weakref
from types import SimpleNamespace

import pytest
import reference
import torch
import torch.distributed as dist
import torchvision
from conftest import DEVICES, run_processes
from torch._dynamo.backends.registry import lookup_backend

import model as models
from foreign import timm_network
from model import (
    ARCHS,
    STEMS,
    ResNet,
    SwAV,
    SyncBatchNorm,
    architecture_of,
    backbone_weights,
    batchnorm_group,
    checkpoint_activations,
    data_parallel,
    memory_layout,
    statistics_kept,
    sync_batchnorm,
)

SMALL = dict(width=4, blocks=(1, 2, 1, 1), stem="small")


def small_swav(arch="resnet18", **options):
    torch.manual_seed(0)
    return SwAV(arch, **{"hidden_mlp": 12, "feat_dim": 5, "nmb_prototypes": 7, **SMALL, **options})


def images(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def on_meta(build, *args, **options):
    with torch.device("meta"):
        return build(*args, **options)


def shapes(state_dict):
    return {name: tensor.shape for name, tensor in state_dict.items()}


# Backbones


def torchvision_twin(arch):
    """Our backbone and torchvision's, without classifier, with the same weights."""
    torch.manual_seed(0)
    ours, theirs = getattr(models, arch)(), getattr(torchvision.models, arch)()
    theirs.fc = torch.nn.Identity()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


TORCHVISIONS = [arch for arch in ARCHS if arch in torchvision.models.list_models()]


def test_the_whole_family_of_torchvision_is_there():
    names = torchvision.models.list_models(torchvision.models)
    assert sorted(TORCHVISIONS) == sorted(name for name in names if "resnet" in name or "resnext" in name)


@pytest.mark.parametrize("arch", TORCHVISIONS)
def test_features_equal_torchvisions_bit_for_bit_with_its_weights(arch):
    theirs = on_meta(getattr(torchvision.models, arch)).to_empty(device="cpu")
    theirs.fc = torch.nn.Identity()
    weights = theirs.state_dict()
    for module in theirs.modules():  # cheaper than torchvision's own start
        if isinstance(module, torch.nn.BatchNorm2d):
            module.reset_parameters()
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.uniform_(module.weight, -0.1, 0.1)
    architecture = architecture_of(weights)
    assert architecture["arch"] == arch
    ours = on_meta(ResNet, **architecture)
    ours.load_state_dict({name: tensor.clone() for name, tensor in weights.items()}, assign=True)
    x = images(2, 3, 32, 32)
    for training in (True, False):
        features = ours.train(training)(x)
        assert features.isfinite().all() and features.std() > 0
        assert torch.equal(features, theirs.train(training)(x))


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_features_and_statistics_equal_torchvisions_bit_for_bit_and_gradients_up_to_rounding(arch):
    ours, theirs = torchvision_twin(arch)
    x = images(3, 3, 64, 64)
    for training in (True, False):  # training first, so that the statistics used by eval are not the initial ones
        ours.train(training), theirs.train(training)
        features = ours(x)
        assert torch.equal(features, theirs(x))
        assert torch.equal(features, ours.features(x))
        ours.load_state_dict(theirs.state_dict())  # our statistics were updated once more
    ours.double().train(), theirs.double().train()
    x = x.double()
    ours(x).square().sum().backward(), theirs(x).square().sum().backward()
    expected = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, expected[name].grad, rtol=1e-9, atol=1e-11, msg=name)
    buffers = dict(theirs.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in ours.named_buffers())


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    "height, width, is_small", [(1, 1, True), (2, 3, True), (3, 3, True), (4, 2, True), (7, 8, False)]
)
def test_a_3x3_convolution_equals_torchs_on_maps_of_any_size(monkeypatch, height, width, is_small, stride):
    monkeypatch.setattr(models, "SMALL_MAPS_ARE_SLOW", True)
    conv = models.Conv3x3(5, 4, stride).double().to(memory_format=torch.channels_last)
    x = images(3, 5, height, width, dtype=torch.float64).requires_grad_()
    out = conv(x)
    expected = torch.nn.functional.conv2d(x, conv.weight, stride=stride, padding=1)
    assert torch.equal(out, expected)
    assert (out.grad_fn.name() == "SmallMapConvolutionBackward") == is_small
    gradient = images(*out.shape, dtype=torch.float64, seed=1)
    for ours, theirs in zip(
        *(torch.autograd.grad(y, (x, conv.weight), gradient) for y in (out, expected)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        assert ours.stride() == theirs.stride()


def test_a_convolution_of_small_maps_works_without_a_gradient_of_its_input(monkeypatch):
    monkeypatch.setattr(models, "SMALL_MAPS_ARE_SLOW", True)
    conv = models.Conv3x3(5, 4)
    x = images(3, 5, 2, 2)
    (conv(x).sum()).backward()
    expected = torch.autograd.grad(torch.nn.functional.conv2d(x, conv.weight, padding=1).sum(), conv.weight)[0]
    torch.testing.assert_close(conv.weight.grad, expected)


@pytest.mark.parametrize("is_slow", [True, False])
def test_a_grouped_3x3_convolution_equals_torchs_on_small_maps(monkeypatch, is_slow):
    monkeypatch.setattr(models, "SMALL_MAPS_ARE_SLOW", is_slow)
    conv = models.Conv3x3(8, 12, 2, groups=4).double()
    x = images(3, 8, 3, 3, dtype=torch.float64).requires_grad_()
    expected = torch.nn.functional.conv2d(x, conv.weight, stride=2, padding=1, groups=4)
    assert torch.equal(conv(x), expected)
    ours, theirs = (torch.autograd.grad(y.square().sum(), (x, conv.weight)) for y in (conv(x), expected))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("side", [1, 2, 3, 6])
def test_convolutions_have_accurate_gradients_in_bfloat16(side, stride):
    # With stride 2 on 1x1 maps some CPU builds return uninitialised memory. So fill it with large numbers first.
    conv = models.Conv3x3(256, 512, stride)
    x = images(64 if side < 3 else 12, 256, side, side).to(memory_format=torch.channels_last).requires_grad_()

    def gradients(in_bfloat16):
        with torch.autocast("cpu", torch.bfloat16, enabled=in_bfloat16):
            loss = conv(x).float().square().sum()
        filled = [torch.full_like(conv.weight, 1e4, dtype=dtype) for dtype in (torch.bfloat16, torch.float32) * 2]
        del filled
        return torch.autograd.grad(loss, (x, conv.weight))

    exact = gradients(in_bfloat16=False)
    for rounded in (gradients(in_bfloat16=True) for _ in range(5)):
        assert all((ours - best).norm() < 0.02 * best.norm() for ours, best in zip(rounded, exact, strict=True))


def test_small_maps_use_torchs_convolution_if_it_is_fast(monkeypatch):
    monkeypatch.setattr(models, "SMALL_MAPS_ARE_SLOW", False)
    out = models.Conv3x3(5, 4)(images(3, 5, 2, 2))
    assert "Convolution" in out.grad_fn.name() and out.grad_fn.name() != "SmallMapConvolutionBackward"


@pytest.mark.parametrize("arch, features", [("resnet18", 512), ("resnet50", 2048)])
def test_the_state_dict_is_torchvisions_with_head_and_prototypes_instead_of_the_classifier(arch, features):
    expected = shapes(on_meta(getattr(torchvision.models, arch)).state_dict())
    del expected["fc.weight"], expected["fc.bias"]
    expected |= {
        "projection_head.0.weight": (2048, features),
        "projection_head.0.bias": (2048,),
        "projection_head.1.weight": (2048,),
        "projection_head.1.bias": (2048,),
        "projection_head.1.running_mean": (2048,),
        "projection_head.1.running_var": (2048,),
        "projection_head.1.num_batches_tracked": (),
        "projection_head.3.weight": (128, 2048),
        "projection_head.3.bias": (128,),
        "prototypes.weight": (3000, 128),
    }
    assert shapes(on_meta(SwAV, arch).state_dict()) == expected
    assert shapes(on_meta(getattr(models, arch)).state_dict()).items() <= expected.items()


def test_our_state_dict_loads_into_torchvision_with_only_the_classifier_missing():
    ours = on_meta(SwAV, "resnet50").to_empty(device="cpu").state_dict()
    theirs = on_meta(torchvision.models.resnet50).to_empty(device="cpu")
    result = theirs.load_state_dict(ours, strict=False)
    assert set(result.missing_keys) == {"fc.weight", "fc.bias"}
    assert {name.split(".")[0] for name in result.unexpected_keys} == {"projection_head", "prototypes"}
    result = theirs.load_state_dict(backbone_weights({"state_dict": ours}), strict=False)
    assert set(result.missing_keys) == {"fc.weight", "fc.bias"} and not result.unexpected_keys


@pytest.mark.parametrize(
    "arch, features, stem",
    [
        ("resnet18", 512, 64),
        ("resnet50", 2048, 64),
        ("resnet50w2", 4096, 128),
        ("resnet50w4", 8192, 256),
        ("resnet50w5", 10240, 320),
    ],
)
def test_wide_networks_are_wider_in_every_layer(arch, features, stem):
    backbone = on_meta(getattr(models, arch))
    assert backbone(torch.empty(2, 3, 96, 96, device="meta")).shape == (2, features)
    assert backbone.num_features == features
    assert backbone.conv1.weight.shape == (stem, 3, 7, 7)
    if arch.startswith("resnet50"):
        for name, narrow in shapes(on_meta(models.resnet50).state_dict()).items():
            wide = [stem // 64 * n for n in narrow[:2]] + list(narrow[2:])
            wide[1:2] = [3] if name == "conv1.weight" else wide[1:2]
            assert list(backbone.state_dict()[name].shape) == wide, name


def test_convolutions_start_with_he_initialisation_over_their_outputs():
    torch.manual_seed(0)
    for name, weight in ResNet("resnet50", width=16).state_dict().items():
        if weight.dim() == 4:
            fan_out = weight.numel() / weight.shape[1]
            assert weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1), name


@pytest.mark.parametrize("stem, side", [("imagenet", 2), ("medium", 4), ("small", 8)])
def test_stems_differ_in_their_stride(stem, side):
    backbone = ResNet("resnet18", width=4, stem=stem)
    sides = []
    backbone.layer4.register_forward_hook(lambda module, args, out: sides.append(tuple(out.shape[2:])))
    backbone(images(2, 3, 64, 64))
    assert sides == [(side, side)]


@pytest.mark.parametrize(
    "name, options",
    [
        ("arch", dict(arch="resnet49")),
        ("stem", dict(stem="large")),
        ("width", dict(width=0)),
        ("blocks", dict(blocks=(1, 1, 1))),
        ("blocks", dict(blocks=(1, 0, 1, 1))),
        ("width", dict(arch="resnext50_32x4d", width=8)),
        ("nmb_prototypes", dict(nmb_prototypes=0)),
    ],
)
def test_wrong_options_are_refused_by_name(name, options):
    with pytest.raises(ValueError, match=f"^{name}: expected .* got .*"):
        on_meta(SwAV, **options)


def test_weights_of_other_convolutions_are_refused():
    weights = ResNet("resnext50_32x4d", width=16, blocks=(1, 1, 1, 1)).state_dict()
    weights["layer1.0.conv2.weight"] = torch.empty(32, 2, 3, 3)
    with pytest.raises(
        ValueError, match=r"^checkpoint: expected a ResNet like .* got .*layer1.0.conv2 of \[32, 2, 3, 3\]"
    ):
        architecture_of(weights)
    del weights["layer1.0.conv2.weight"]
    with pytest.raises(ValueError, match="^checkpoint: expected a ResNet like .* got .* of no weights"):
        architecture_of(weights)


# SwAV


class Means(torch.nn.Module):
    """A network without BatchNorm and convolutions."""

    num_features = 6

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 6)

    def forward(self, x):
        return self.linear(x.mean((2, 3)))


def test_another_backbone_takes_the_place_of_the_resnet():
    swav = SwAV(hidden_mlp=8, feat_dim=4, nmb_prototypes=5, backbone=Means())
    assert {name.split(".")[0] for name in swav.state_dict()} == {"backbone", "projection_head", "prototypes"}
    crops = [images(2, 3, 8, 8), images(2, 3, 5, 5, seed=1)]
    embeddings, scores = swav(crops)
    assert embeddings.shape == (4, 4) and scores.shape == (4, 5)
    assert torch.equal(swav.features(crops[0]), swav.backbone(crops[0]))
    scores.sum().backward()
    assert swav.backbone.linear.weight.grad.abs().sum() > 0
    assert memory_layout(swav, torch.device("cpu")) == torch.channels_last


RESOLUTIONS = {  # sides of the crops, and for each backbone pass (side, number of crops)
    "one": ([16, 16], [(16, 2)]),
    "large first": ([24, 24, 16, 16, 16], [(24, 2), (16, 3)]),
    "alternating": ([16, 24, 16, 20, 24], [(16, 2), (24, 2), (20, 1)]),
}


@pytest.mark.parametrize("sides, passes", RESOLUTIONS.values(), ids=RESOLUTIONS)
@pytest.mark.parametrize("arch, options", [("resnet18", {}), ("resnet50", dict(stem="imagenet"))])
def test_forward_and_statistics_follow_the_reference(arch, options, sides, passes):
    swav = small_swav(arch, **options).double()
    crops = [images(4, 3, side, side, dtype=torch.float64, seed=v) for v, side in enumerate(sides)]
    state = reference.new_state(swav.state_dict())
    for training in (True, False):
        embeddings, scores = swav.train(training)(crops)
        expected = reference.forward(state["params"], state["buffers"][0], crops, training)
        torch.testing.assert_close(embeddings, expected[0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(scores, expected[1], rtol=1e-9, atol=1e-9)
        for name, buffer in state["buffers"][0].items():
            torch.testing.assert_close(swav.state_dict()[name], buffer, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sides, passes", RESOLUTIONS.values(), ids=RESOLUTIONS)
def test_each_resolution_takes_one_backbone_pass_and_the_head_one_pass_for_all(sides, passes):
    swav = small_swav()
    backbone, head = [], []
    swav.conv1.register_forward_hook(lambda module, args, out: backbone.append((args[0].shape[2], len(args[0]) // 4)))
    swav.projection_head.register_forward_hook(lambda module, args, out: head.append(len(args[0])))
    swav([images(4, 3, side, side) for side in sides])
    assert backbone == passes
    assert head == [4 * len(sides)]


@pytest.mark.parametrize("hidden_mlp", [12, 0])
def test_outputs_are_in_crop_order_unit_embeddings_and_their_products_with_prototypes(hidden_mlp):
    swav = small_swav(hidden_mlp=hidden_mlp).eval()
    crops = [images(3, 3, side, side, seed=v) for v, side in enumerate([16, 24, 16])]
    embeddings, scores = swav(crops)
    assert embeddings.shape == (9, 5) and scores.shape == (9, 7)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(9))
    torch.testing.assert_close(scores, embeddings @ swav.prototypes.weight.T)
    for v, crop in enumerate(crops):  # in eval mode a crop alone gives the same
        torch.testing.assert_close(embeddings[3 * v : 3 * v + 3], swav([crop])[0], rtol=1e-4, atol=1e-5)


def test_without_hidden_layer_the_head_is_one_linear_layer():
    head = {n: t.shape for n, t in on_meta(SwAV, hidden_mlp=0).state_dict().items() if n.startswith("projection_head")}
    assert head == {"projection_head.weight": (128, 2048), "projection_head.bias": (128,)}


def test_scores_are_float32_and_exact_under_bfloat16_autocast():
    swav = small_swav()
    convolutions = []
    swav.conv1.register_forward_hook(lambda module, args, out: convolutions.append(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        embeddings, scores = swav([images(8, 3, 16, 16)])
    assert convolutions == [torch.bfloat16]
    assert embeddings.dtype == scores.dtype == torch.float32
    expected = embeddings.double() @ swav.prototypes.weight.double().T
    torch.testing.assert_close(scores.double(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(8), rtol=0, atol=1e-6)


def test_prototypes_are_normalised_in_place_outside_autograd():
    swav = small_swav()
    weight = swav.prototypes.weight
    expected = reference.normalize_prototypes(weight)
    swav.normalize_prototypes()
    assert swav.prototypes.weight is weight and weight.requires_grad and weight.grad_fn is None
    torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(weight.norm(dim=1), torch.ones(7))


# Batches in parts, and activations that backward computes again


def gradients(swav, crops):
    """Gradients and buffers of a step. Outputs have different weights, so that their order counts."""
    embeddings, scores = swav(crops)
    weights = torch.linspace(1, 2, scores.numel(), dtype=scores.dtype).view_as(scores)
    with statistics_kept(swav):
        (scores * weights).sum().backward()
    return {name: p.grad for name, p in swav.named_parameters()}, {n: b.clone() for n, b in swav.named_buffers()}


def test_parts_of_a_batch_follow_the_reference_and_update_statistics_once():
    swav = small_swav().double()
    swav.parts = 2
    crops = [images(6, 3, side, side, dtype=torch.float64, seed=v) for v, side in enumerate([16, 9, 16])]
    state = reference.new_state(swav.state_dict())
    halves = [[crop[:3] for crop in crops], [crop[3:] for crop in crops]]
    outputs = [reference.forward(state["params"], state["buffers"][0], half, True) for half in halves]
    scores = torch.cat([of_half.view(3, 3, -1) for _, of_half in outputs], dim=1).flatten(0, 1)
    torch.testing.assert_close(swav(crops)[1], scores, rtol=1e-9, atol=1e-9)
    swav.load_state_dict(small_swav().state_dict())
    _, buffers = gradients(swav, crops)
    for name, buffer in state["buffers"][0].items():
        torch.testing.assert_close(buffers[name], buffer, rtol=1e-9, atol=1e-9)


def test_parts_must_divide_the_batch():
    swav = small_swav()
    swav.parts = 4
    with pytest.raises(ValueError, match="crops: expected a multiple of the 4 parts of images, got 6"):
        swav([images(6, 3, 16, 16)])


def test_a_part_is_freed_before_the_next():
    """While backward runs forward again, at most one part's activations exist."""
    swav = small_swav()
    swav.parts = 3
    alive, most = weakref.WeakSet(), []

    def note(module, args, out):
        alive.add(out.untyped_storage())
        most.append(len(alive))

    swav.layer4[0].conv2.register_forward_hook(note)
    scores = swav([images(6, 3, 16, 16)])[1]
    assert len(most) == 3 and not alive  # forward keeps none
    scores.sum().backward()
    assert most[3:] == [1, 1, 1] and not alive


def checkpointed(make, crops):
    """Gradients and buffers of a step, of a model as made by a function, and of one that keeps no activations."""
    plain, checkpointing = make(), make()
    checkpoint_activations(checkpointing)
    return gradients(plain, crops), gradients(checkpointing, crops)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_activations_computed_again_give_the_same_gradients_and_statistics(arch):
    width = 16 if "resnext" in arch else 4
    crops = [images(4, 3, side, side, dtype=torch.float64, seed=v) for v, side in enumerate([16, 16, 9])]
    for expected, ours in zip(*checkpointed(lambda: small_swav(arch, width=width).double(), crops), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_blocks_run_again_in_backward_only_with_checkpoints():
    for checkpoints, (forward, backward) in {False: (5, 0), True: (5, 5)}.items():
        swav, calls = small_swav(), []
        if checkpoints:
            checkpoint_activations(swav)
        for block in (block for stage in (swav.layer1, swav.layer2, swav.layer3, swav.layer4) for block in stage):
            block.conv1.register_forward_hook(lambda *_: calls.append(1))  # noqa: B023
        scores = swav([images(4, 3, 16, 16)])[1]
        assert len(calls) == forward
        scores.sum().backward()
        assert len(calls) == forward + backward
        with torch.no_grad():
            swav.features(images(4, 3, 16, 16))


def test_compiled_features_of_all_parts_and_steps_take_one_graph():
    assert run_processes(compiled_in_parts, 1) == [1]  # in a process group, for BatchNorm over processes


def compiled_in_parts(rank: int, world_size: int) -> int:
    """Check compiled features against those that are not. Return the number of graphs."""
    crops = [images(4, 3, 16, 16, dtype=torch.float64)]
    results, graphs = [], []

    def compile_without_a_compiler(graph, inputs):
        graphs.append(graph)
        return lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    for compiles in (False, True):
        swav = sync_batchnorm(small_swav(blocks=(1, 1, 1, 1)).double())
        swav.parts = 2
        checkpoint_activations(swav)
        if compiles:
            swav.features = torch.compile(swav.features, backend=compile_without_a_compiler, fullgraph=True)
        gradients(swav, crops)
        results.append(gradients(swav, crops))
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-9)
    return len(graphs)


@pytest.mark.parametrize("arch", ["resnet10t", "vit_tiny_patch16_224"])
def test_networks_of_timm_compute_activations_again(arch):
    pytest.importorskip("timm")
    crops = [images(2, 3, 32, 32, dtype=torch.float64)]

    def make():
        torch.manual_seed(0)
        backbone = timm_network(f"timm/{arch}", [32])
        return SwAV(hidden_mlp=12, feat_dim=5, nmb_prototypes=7, backbone=backbone).double()

    for expected, ours in zip(*checkpointed(make, crops), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_a_backbone_without_checkpoints_is_refused():
    swav = SwAV(hidden_mlp=8, feat_dim=4, nmb_prototypes=5, backbone=Means())
    with pytest.raises(ValueError, match="checkpoint_activations: expected off, as Means cannot do it"):
        checkpoint_activations(swav)


# Memory format and BatchNorm over processes


@pytest.mark.parametrize(
    "device, width, expected",
    [("cpu", 16, "channels_last"), ("cpu", 15, "contiguous_format"), ("cuda", 7, "channels_last")],
)
def test_weights_are_channels_last_except_with_few_channels_on_a_cpu(device, width, expected):
    layout = memory_layout(on_meta(ResNet, "resnet18", width=width), torch.device(device))
    assert layout == getattr(torch, expected)


def batchnorm_ranks(rank: int, world_size: int) -> list:
    """Ranks that share statistics with this process: over all, in groups of two, in groups larger than all."""
    ranks = []
    for sync_bn, group_size in (("pytorch", 2), ("apex", 2), ("apex", 8)):
        model = sync_batchnorm(small_swav(), batchnorm_group(sync_bn, group_size))
        norms = [norm for norm in model.modules() if isinstance(norm, torch.nn.modules.batchnorm._BatchNorm)]
        assert len(norms) > 10 and all(isinstance(norm, SyncBatchNorm) for norm in norms)
        ((name, size),) = {(norm.group_name, norm.world_size) for norm in norms}
        ranks.append(dist.get_process_group_ranks(dist.distributed_c10d._resolve_process_group(name)))
        assert len(ranks[-1]) == size
    return ranks


def test_batchnorm_is_shared_by_all_processes_or_by_groups_of_them():
    pairs = [0, 1], [0, 1], [2, 3], [2, 3]
    assert run_processes(batchnorm_ranks, 4) == [[[0, 1, 2, 3], pair, [0, 1, 2, 3]] for pair in pairs]


VALUES = {  # (dtype, mean of the values, their standard deviation)
    "float64": (torch.float64, 0, 1),
    "float32": (torch.float32, 0, 1),
    "float32 far from 0": (torch.float32, 1e3, 1e-2),
    "bfloat16": (torch.bfloat16, 0, 1),
}
LAYOUTS = {"contiguous": (12, 6, 5, 5), "channels_last": (12, 6, 5, 5), "no pixels": (12, 6)}
COMPILED = [("float64", "compiled"), ("float32 far from 0", "compiled")]


def new_norm(dtype):
    """A BatchNorm with random parameters, in float64 for float64 and in float32 for all others."""
    norm = torch.nn.BatchNorm2d(6, momentum=1.0)  # running statistics are those of the batch
    norm._check_input_dim = lambda x: None  # it takes [B, C] too
    with torch.no_grad():
        norm.weight.copy_(images(6, seed=3) + 2), norm.bias.copy_(images(6, seed=4))
    return norm.double() if dtype == torch.float64 else norm


def normalized(norm, case, layout, own=slice(None), device="cpu", forward=None):
    """Output, gradients and new running statistics of a norm, for the images `own`, in the norm's dtype if float64."""
    dtype, mean, std = VALUES[case]
    x, gradient = (images(*LAYOUTS[layout], dtype=torch.float64, seed=seed) for seed in (1, 2))
    x, gradient = (values[own].to(device, dtype).contiguous() for values in (x * std + mean, gradient))
    if norm.weight.dtype == torch.float64:
        x, gradient = x.double(), gradient.double()
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    out = (forward or norm.forward)(x.requires_grad_())
    out.backward(gradient)
    assert out.dtype == x.grad.dtype == x.dtype and out.stride() == x.grad.stride() == x.stride()
    return [out.detach(), x.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var]


def normalized_share(rank: int, world_size: int, device: str) -> dict:
    """`normalized` of all cases with BatchNorm over processes, for its images; gradients of parameters summed."""
    results = {}
    for case, layout in [*itertools.product(VALUES, LAYOUTS), *COMPILED]:
        norm, forward = sync_batchnorm(torch.nn.Sequential(new_norm(VALUES[case][0])).to(device))[0], None
        if layout == "compiled":
            forward = torch.compile(norm.forward, backend="aot_eager", fullgraph=True, dynamic=False)
        shape = "contiguous" if layout == "compiled" else layout
        results[case, layout] = normalized(norm, case, shape, slice(rank, None, world_size), device, forward)
        for parameter in norm.parameters():
            dist.all_reduce(parameter.grad)
    return results


@pytest.fixture(scope="module", params=DEVICES)
def normalized_by_two(request):
    """Of two processes, on a GPU over gloo, too."""
    return run_processes(normalized_share, 2, request.param)


@pytest.mark.parametrize("case, layout", [*itertools.product(VALUES, LAYOUTS), *COMPILED])
def test_a_batchnorm_over_two_processes_is_one_over_all_images(case, layout, normalized_by_two):
    shape = "contiguous" if layout == "compiled" else layout
    of_torch, exact = (normalized(new_norm(dtype), case, shape) for dtype in (VALUES[case][0], torch.float64))
    # At 1000 float32 holds a deviation of 0.01 to 0.6 %. A difference of squares would hold nothing of it.
    tolerances = {"float64": 1e-12, "float32": 1e-6, "float32 far from 0": 3e-2}
    for rank, results in enumerate(normalized_by_two):
        for i, (ours, theirs, best) in enumerate(zip(results[case, layout], of_torch, exact, strict=True)):
            if i < 2:  # of single images
                theirs, best = theirs[rank::2], best[rank::2]
            error, torchs_error = ((v.cpu() - best).abs().max() / best.abs().max() for v in (ours, theirs))
            assert error <= tolerances.get(case, 2 * torchs_error + 1e-6), (rank, i, error, torchs_error)


def counted(rank: int, world_size: int) -> dict:
    """How often a model's step calls each collective: forward and backward in data_parallel, after a first step."""
    counts = {}
    for sync_bn in ("pytorch", "none"):
        model = small_swav()
        network = data_parallel(sync_batchnorm(model) if sync_bn == "pytorch" else model, torch.device("cpu"))
        crops = [images(4, 3, side, side, seed=rank) for side in (16, 9)]
        for _ in range(2):
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                network(crops)[1].square().mean().backward()
        names = "_c10d_functional::all_reduce", "c10d::allreduce_", "c10d::broadcast_"
        counts[sync_bn] = {name: sum(event.name == name for event in profile.events()) for name in names}
    return counts


def test_each_pass_through_a_batchnorm_takes_one_collective_forward_and_one_backward():
    norms = [module for module in small_swav().modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
    passes = 2 * (len(norms) - 1) + 1  # two resolutions; the head has one pass
    for counts in run_processes(counted, 2):
        assert counts["pytorch"]["_c10d_functional::all_reduce"] == 2 * passes
        assert counts["none"]["_c10d_functional::all_reduce"] == 0
        assert counts["pytorch"]["c10d::broadcast_"] == 2  # DistributedDataParallel's, of buffers of two dtypes


PRETENDED = SimpleNamespace(group_name="pretended", size=lambda: 2)  # in evaluation, nothing is exchanged


def test_batchnorm_over_processes_keeps_tensors_names_and_mode():
    model = small_swav()
    model.layer1.eval()
    tensors = model.state_dict(keep_vars=True)
    synced = sync_batchnorm(model, PRETENDED)
    assert isinstance(synced.layer1[0].bn1, SyncBatchNorm) and not synced.layer1[0].bn1.training
    assert synced.bn1.training and synced.bn1.eps == 1e-5 and synced.bn1.momentum == 0.1
    ours = copy.deepcopy(synced).state_dict(keep_vars=True)
    assert shapes(ours) == shapes(tensors)
    assert all(tensor is tensors[name] for name, tensor in synced.state_dict(keep_vars=True).items())


def test_a_model_with_batchnorm_over_processes_is_traced_and_exported_in_evaluation():
    network = ResNet("resnet18", **SMALL).eval()
    x = images(2, 3, 16, 16)
    expected = network(x).detach()
    network = sync_batchnorm(network, PRETENDED)
    assert torch.equal(network(x), expected)
    assert torch.equal(torch.fx.symbolic_trace(network)(x), expected)
    torch.testing.assert_close(torch.export.export(network, (x,)).module()(x), expected)


def test_a_single_value_per_channel_is_refused():
    alone = sync_batchnorm(torch.nn.Sequential(torch.nn.BatchNorm1d(3)), SimpleNamespace(group_name="", size=lambda: 1))
    with pytest.raises(ValueError, match=r"^BatchNorm: expected more than one value per channel .* got \[1, 3\]"):
        alone(images(1, 3))


class NormAndActivation(torch.nn.BatchNorm2d):
    """As timm's BatchNormAct2d: an activation inside."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = torch.nn.ReLU()

    def forward(self, x):
        return self.act(super().forward(x))


def activated(rank: int, world_size: int) -> list:
    """Outputs of a BatchNorm with an activation over the processes, for this one's images."""
    model = sync_batchnorm(torch.nn.Sequential(NormAndActivation(3)))
    assert isinstance(model[0], SyncBatchNorm) and list(model.state_dict())[0] == "0.weight"
    return [model(images(4, 3, 2, 2)[rank::world_size]).detach(), model.eval()(images(4, 3, 2, 2)).detach()]


def test_an_activation_inside_of_a_batchnorm_is_kept_over_processes():
    norm = NormAndActivation(3)
    expected = norm(images(4, 3, 2, 2))
    for rank, (out, evaluated) in enumerate(run_processes(activated, 2)):
        torch.testing.assert_close(out, expected[rank::2].detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(evaluated, norm.eval()(images(4, 3, 2, 2)).detach(), rtol=1e-5, atol=1e-5)


# Checkpoints


WRAPPINGS = {
    "bare": lambda weights: weights,
    "in state_dict": lambda weights: {"epoch": 3, "state_dict": weights},
    "module. prefix": lambda weights: {f"module.{name}": tensor for name, tensor in weights.items()},
    "both": lambda weights: {"state_dict": {f"module.{name}": tensor for name, tensor in weights.items()}},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_backbone_weights_are_found_in_every_wrapping(wrapping):
    swav = small_swav()
    weights = backbone_weights(WRAPPINGS[wrapping](swav.state_dict()))
    backbone = ResNet(**architecture_of(weights))
    backbone.load_state_dict(weights)
    x = images(2, 3, 16, 16)
    assert torch.equal(backbone.eval()(x), swav.eval().features(x))


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_backbone_weights_of_torchvision_leave_out_the_classifier(arch):
    theirs = on_meta(getattr(torchvision.models, arch)).state_dict()
    weights = backbone_weights(theirs)
    assert set(theirs) - set(weights) == {"fc.weight", "fc.bias"}
    assert architecture_of(weights)["arch"] == arch
    on_meta(ResNet, **architecture_of(weights)).load_state_dict(weights, assign=True)


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize(
    "arch, width, blocks",
    [
        *((arch, width, blocks) for arch, (_, blocks, width, *_) in ARCHS.items()),
        ("resnet18", 8, (1, 1, 1, 1)),
        ("resnet34", 64, (3, 4, 6, 3)),
        ("resnext50_32x4d", 16, (1, 1, 1, 1)),
        ("wide_resnet50_2", 16, (1, 2, 1, 1)),
        ("resnet50", 4, (1, 2, 3, 1)),
        ("resnet50", 64, (3, 4, 23, 12)),
    ],
)
def test_architecture_is_read_off_the_weights(arch, width, blocks, stem):
    weights = backbone_weights(on_meta(SwAV, arch, width=width, blocks=blocks, stem=stem).state_dict())
    expected = {"arch": arch, "width": width, "blocks": list(blocks), "stem": stem}
    assert architecture_of(weights) == expected
    assert shapes(on_meta(ResNet, **expected).state_dict()) == shapes(weights)


@pytest.mark.parametrize("checkpoint", [{}, [1], None, {"state_dict": {}}, {"fc.weight": torch.ones(1)}, {"epoch": 3}])
def test_a_checkpoint_without_resnet_is_refused(checkpoint):
    with pytest.raises(ValueError, match="^checkpoint: expected the weights of a ResNet"):
        backbone_weights(checkpoint)


def test_an_unknown_stem_is_refused():
    with pytest.raises(ValueError, match="^checkpoint: expected a stem .* got 11x11"):
        architecture_of({"conv1.weight": torch.empty(64, 3, 11, 11)})
