"""Backbones from files, and the image size to evaluate them at."""

import math
import sys
from argparse import ArgumentTypeError
from contextlib import nullcontext

import pytest
import torch
import torchvision
from conftest import assert_same

from backbones import (
    arch_name,
    choose_sizes,
    describe,
    foreign_backbone,
    load_backbone,
    new_backbone,
    read_backbone,
    sizes_taken,
)
from launch import UserError
from model import ResNet


@pytest.mark.parametrize(
    ("crops", "options", "side", "expected"),
    [
        ([16, 9], {}, 16, (16, 16)),  # images no larger than the crops: not cropped
        ([16, 9], {}, 24, (16, 18)),  # larger images: their centre, 7/8 of a side, as published
        ([48], {}, 64, (64, 64)),  # not much larger: their own size
        ([48], {}, 68, (48, 55)),
        ([96], {}, 128, (128, 128)),
        ([192], {}, 256, (192, 219)),  # large ones as published
        ([224, 96], {}, 256, (224, 256)),
        ([48], {"scales": [0.14]}, 64, (96, 96)),  # photographs: objects as large as in training's crops
        ([48], {"scales": [0.14], "size": 64}, 64, (64, 64)),
        ([48], {"scales": [0.14]}, 128, (96, 110)),
        ([160, 48], {"scales": [0.14, 0.05]}, 160, (224, 224)),
        ([192], {"scales": [0.14]}, 256, (224, 256)),
        ([48, 24], {"scales": [0.4, 0.1]}, 64, (64, 64)),
        ([224, 96], {"scales": [0.14, 0.05]}, 224, (224, 224)),
        ([224, 96], {"scales": [0.14, 0.05]}, 256, (224, 256)),
        ([32], {"scales": [0.14], "is_folder": False}, 32, (64, 64)),
        ([32], {"scales": [0.4], "is_folder": False}, 28, (32, 32)),
        (None, {}, 24, (224, 224)),
        (None, {}, 256, (224, 256)),
        (None, {"size": 20}, 24, (20, 23)),
        ([16, 9], {"is_folder": False}, 28, (28, 28)),
        ([32], {"is_folder": False}, 28, (32, 32)),
        (None, {"is_folder": False}, 28, (28, 28)),
        ([32], {"is_folder": False, "size": 28, "resize": 40}, 28, (28, 40)),
    ],
)
def test_small_images_keep_their_border_and_the_size_of_training(crops, options, side, expected):
    trained = {"size_crops": crops} if crops else {}
    options = {"is_folder": True, **options}
    if scales := options.pop("scales", None):
        trained["min_scale_crops"] = scales
    assert choose_sizes(trained, side, **options) == expected


def test_images_are_not_resized_below_the_size_of_their_crop():
    with pytest.raises(UserError, match="--resize: expected at least the 64 pixels of --size, got 32"):
        choose_sizes({}, 64, is_folder=True, size=64, resize=32)


# Files of other programs


SMALL = dict(width=8, blocks=(1, 1, 1, 1), stem="small")


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(0)
    return ResNet("resnet18", **SMALL).state_dict()


def named(prefix, weights, by=0.0):
    """The weights under other names; by: what is added, so that backbones in a file differ."""
    return {prefix + name: tensor + by if tensor.is_floating_point() else tensor for name, tensor in weights.items()}


def numbered(prefix, weights, parts="conv1 bn1 relu maxpool layer1 layer2 layer3 layer4"):
    """The names that nn.Sequential(*resnet.children()) gives."""
    numbers = {part: str(i) for i, part in enumerate(parts.split())}
    return {f"{prefix}{numbers[n.partition('.')[0]]}.{n.partition('.')[2]}": t for n, t in weights.items()}


HEAD = {"fc.weight": torch.ones(2, 2), "fc.bias": torch.ones(2)}

# program: (its file, given the backbone's weights; what is taken; the other backbones; what is left over)
PROGRAMS = {
    "torchvision, timm's ResNets, VICReg, Barlow Twins": (lambda w: w | HEAD, "", [], ["fc"]),
    "published SwAV": (
        lambda w: named(
            "module.", w | {"projection_head.0.weight": HEAD["fc.weight"], "prototypes.weight": torch.ones(2)}
        ),
        "module.",
        [],
        ["projection_head", "prototypes"],
    ),
    "MoCo": (
        lambda w: {
            "arch": "resnet18",
            "state_dict": named("module.encoder_k.", w | HEAD, 1)
            | named("module.encoder_q.", w | HEAD)
            | {"module.queue": torch.ones(2)},
            "optimizer": {"state": {0: {"momentum_buffer": torch.ones(2)}}},
        },
        "state_dict/module.encoder_q.",
        ["state_dict/module.encoder_k."],
        ["encoder_k", "fc", "queue"],
    ),
    "MoCo v3": (
        lambda w: {
            "state_dict": named("module.momentum_encoder.", w, 1)
            | named("module.base_encoder.", w)
            | {"module.predictor.0.weight": torch.ones(2)}
        },
        "state_dict/module.base_encoder.",
        ["state_dict/module.momentum_encoder."],
        ["predictor"],
    ),
    "DINO": (
        lambda w: {
            "student": named("module.backbone.", w, 1) | {"module.head.mlp.0.weight": torch.ones(2)},
            "teacher": named("module.backbone.", w) | {"module.head.mlp.0.weight": torch.ones(2)},
            "epoch": 3,
        },
        "teacher/module.backbone.",
        ["student/module.backbone."],
        ["head"],
    ),
    "SimCLR": (lambda w: named("encoder.", w) | {"projector.0.weight": torch.ones(2)}, "encoder.", [], ["projector"]),
    "SimCLR, in state_dict": (
        lambda w: {"state_dict": named("backbone.", w | HEAD)},
        "state_dict/backbone.",
        [],
        ["fc"],
    ),
    "solo-learn, of Lightning": (
        lambda w: {
            "epoch": 1,
            "state_dict": named("momentum_backbone.", w, 1)
            | named("backbone.", w)
            | {"classifier.weight": torch.ones(2)},
            "hyper_parameters": {"lr": 0.1},
        },
        "state_dict/backbone.",
        ["state_dict/momentum_backbone."],
        ["classifier"],
    ),
    "BYOL": (
        lambda w: named("target_encoder.net.", w, 1) | named("online_encoder.net.", w),
        "online_encoder.net.",
        ["target_encoder.net."],
        [],
    ),
    "timm, with a moving average": (
        lambda w: {"state_dict": named("", w, 1), "state_dict_ema": named("", w)},
        "state_dict_ema/",
        ["state_dict/"],
        [],
    ),
    "lightly": (
        lambda w: {"state_dict": numbered("backbone.", w) | {"projection_head.layers.0.weight": torch.ones(2)}},
        "state_dict/backbone.",
        [],
        ["projection_head"],
    ),
    "lightly, without modules that have no weights": (
        lambda w: numbered("backbone.", w, "conv1 bn1 layer1 layer2 layer3 layer4"),
        "backbone.",
        [],
        [],
    ),
    "compiled": (lambda w: {"model": named("_orig_mod.module.", w)}, "model/_orig_mod.module.", [], []),
    "CIFAR programs": (
        lambda w: {"model": {n.replace("downsample", "shortcut"): t for n, t in named("encoder.", w).items()}},
        "model/encoder.",
        [],
        [],
    ),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_backbone_of_every_program_is_found(program, weights, tmp_path):
    build, taken, others, left_over = PROGRAMS[program]
    torch.save(build(weights), tmp_path / "file.pth")
    found, architecture, trained = read_backbone(tmp_path / "file.pth", None)
    assert found[1:] == (taken, others, left_over)
    assert architecture == {"arch": "resnet18", **SMALL, "blocks": [1, 1, 1, 1]} and trained == {}
    backbone, _, _ = load_backbone(tmp_path / "file.pth", "resnet18")
    assert_same(dict(backbone.state_dict()), dict(weights))


def test_files_without_batchnorms_counters_are_whole(weights, tmp_path):
    torch.save({n: t for n, t in weights.items() if not n.endswith("num_batches_tracked")}, tmp_path / "old.pth")
    assert_same(dict(load_backbone(tmp_path / "old.pth", None)[0].state_dict()), dict(weights))


def test_a_backbone_of_lightly_itself_is_found(tmp_path):
    pytest.importorskip("lightly")
    from lightly.models.modules import SwaVProjectionHead

    torch.manual_seed(0)
    theirs = torchvision.models.resnet18()
    model = torch.nn.Module()
    model.backbone = torch.nn.Sequential(*list(theirs.children())[:-1])
    model.projection_head = SwaVProjectionHead(512, 8, 4)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "lightly.ckpt")
    backbone, architecture, _ = load_backbone(tmp_path / "lightly.ckpt", None)
    assert architecture["arch"] == "resnet18" and architecture["stem"] == "imagenet"
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(backbone.eval()(x), model.backbone.eval()(x).flatten(1))


def test_safetensors_files_are_read(weights, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "weights.safetensors"
    safetensors.save_file(named("encoder.", weights), path)
    assert_same(dict(load_backbone(path, None)[0].state_dict()), dict(weights))
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(UserError, match="^checkpoint: cannot read .*weights.safetensors: it is cut short, damaged"):
        load_backbone(path, None)
    with pytest.raises(UserError, match="^checkpoint: cannot read .*none.safetensors: "):
        load_backbone(tmp_path / "none.safetensors", None)


def test_absent_packages_are_named(weights, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="x.safetensors needs safetensors: pip install safetensors"):
        load_backbone(tmp_path / "x.safetensors", None)
    with pytest.raises(ArgumentTypeError, match="^timm/convnext_atto needs timm: pip install timm"):
        arch_name("timm/convnext_atto")
    torch.save({"state_dict": {}, "options": {"arch": "timm/convnext_atto"}}, tmp_path / "run.pth")
    with pytest.raises(UserError, match="run.pth: arch: timm/convnext_atto needs timm: pip install timm"):
        load_backbone(tmp_path / "run.pth", None)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: {"fc.weight": torch.ones(2)}, "expected the weights of a ResNet .*, in .*file.pth"),
        (
            lambda w: {n: t for n, t in w.items() if n != "layer2.0.bn1.weight"},
            "does not hold a whole ResNet: .*layer2",
        ),
        (lambda w: w | {"layer1.0.se.fc.weight": torch.ones(2)}, "does not hold a whole ResNet: .*layer1.0.se"),
        (
            lambda w: w | {"layer3.0.conv1.weight": torch.ones(2, 2, 3, 3)},
            "does not hold a whole ResNet: .*size mismatch",
        ),
        (lambda w: named("", w, math.nan), "holds weights that are nan or inf"),
        (lambda w: w | {"conv1.weight": torch.ones(8, 3, 9, 9)}, "expected a stem of 7x7, 5x5 or 3x3, got 9x9"),
    ],
)
def test_weights_that_are_not_whole_are_refused_with_the_files_name(change, message, weights, tmp_path):
    torch.save(change(weights), tmp_path / "file.pth")
    with pytest.raises(UserError, match=f"^checkpoint: .*{message}") as error:
        load_backbone(tmp_path / "file.pth", None)
    assert "file.pth" in str(error.value) and "\n" not in str(error.value)


def test_another_architecture_than_asked_for_is_refused(weights, tmp_path):
    torch.save(weights, tmp_path / "file.pth")
    with pytest.raises(UserError, match="^--arch: .*file.pth holds a resnet18, got resnet34"):
        load_backbone(tmp_path / "file.pth", "resnet34")


@pytest.mark.parametrize("name, close", [("resnet19", "resnet18"), ("resnext101_32x4d", "resnext101_32x8d")])
def test_unknown_architectures_are_refused_with_close_names(name, close):
    with pytest.raises(ArgumentTypeError, match=rf"^expected one of resnet18, .* got {name}; close names: .*{close}"):
        arch_name(name)


# Networks of timm


TIMM_NETWORKS = "timm/test_convnext", "timm/test_efficientnet", "timm/test_vit", "timm/mobilenetv3_small_050"


@pytest.mark.parametrize("arch", TIMM_NETWORKS)
def test_networks_of_timm_give_features_of_several_sizes(arch, tmp_path, capsys):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    theirs = timm.create_model(arch.removeprefix("timm/"))
    torch.save({"teacher": named("module.backbone.", theirs.state_dict())}, tmp_path / "theirs.pth")
    backbone, architecture, _ = load_backbone(tmp_path / "theirs.pth", arch)
    assert describe(architecture) == arch
    normalised_otherwise = "may expect images with a mean of 0.5, here it is 0.485" in capsys.readouterr().out
    assert normalised_otherwise == (theirs.default_cfg["mean"][0] == 0.5)
    assert {*backbone.state_dict()} <= {*theirs.state_dict()}
    side = theirs.default_cfg["input_size"][1]
    x = torch.randn(2, 3, side, side)
    expected = theirs.eval().forward_head(theirs.forward_features(x), pre_logits=True)
    assert torch.equal(backbone.eval()(x), expected)
    for size in (96, 64):
        assert backbone(torch.randn(2, 3, size, size)).shape == (2, backbone.num_features)
    fresh = new_backbone(architecture)
    assert fresh.state_dict().keys() == backbone.state_dict().keys()
    with pytest.raises(UserError, match="^checkpoint: expected the weights of the network: (no|it lacks) "):
        load_backbone(tmp_path / "theirs.pth", "timm/test_byobnet")


def test_a_resnet_of_timm_is_loaded_as_either(tmp_path):
    timm = pytest.importorskip("timm")
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "resnet.pth")
    x = torch.randn(2, 3, 32, 32)
    ours, theirs = (load_backbone(tmp_path / "resnet.pth", arch)[0].eval() for arch in (None, "timm/resnet18"))
    assert isinstance(ours, ResNet) and not isinstance(theirs, ResNet)
    torch.testing.assert_close(ours(x), theirs(x))


def test_unknown_networks_of_timm_are_refused_with_close_names():
    pytest.importorskip("timm")
    with pytest.raises(ArgumentTypeError, match="^timm .* has no convnext_ato; close names: .*convnext_atto"):
        arch_name("timm/convnext_ato")


@pytest.mark.parametrize(
    "arch, sizes, message",
    [
        ("timm/test_vit", [64, 32], None),
        ("timm/test_vit", [50, 32], "sizes that timm/test_vit takes, such as 48 and 64, got 50 32"),
        ("timm/test_convnext", [64, 32], None),
        ("timm/test_convnext", [64, 16], "sizes that timm/test_convnext takes, such as 32, got 64 16"),
        ("timm/mixer_s32_224", [64], None),
        ("timm/mixer_s32_224", [64, 32], "one size, as timm/mixer_s32_224 takes images of only one, got 64 32"),
        ("timm/test_efficientnet", [50, 9], None),
    ],
)
def test_sizes_that_a_network_cannot_take_are_refused(arch, sizes, message):
    pytest.importorskip("timm")
    with torch.device("meta"), pytest.raises(ValueError) if message else nullcontext() as error:
        assert foreign_backbone(arch, sizes).num_features
    assert message is None or str(error.value) == f"size_crops: expected {message}"
    assert foreign_backbone("resnet18", sizes) is None


def test_evaluation_takes_the_nearest_size_of_a_network(tmp_path):
    pytest.importorskip("timm")
    trained = {"arch": "timm/test_vit", "size_crops": [48, 32]}
    assert choose_sizes(trained, 50, is_folder=True) == (48, 55)
    assert choose_sizes(trained, 64, is_folder=True) == (64, 64)
    assert choose_sizes(trained, 50, is_folder=True, size=32) == (32, 37)
    with pytest.raises(UserError, match="^--size: expected one that timm/test_vit takes, such as 48, got 50"):
        choose_sizes(trained, 50, is_folder=True, size=50)
    assert choose_sizes({"arch": "timm/mixer_s32_224", "size_crops": [64]}, 80, is_folder=True) == (64, 73)


def test_derived_sizes_become_those_that_a_network_takes():
    assert sizes_taken("resnet18", [50, 24]) == [50, 24]
    pytest.importorskip("timm")
    assert sizes_taken("timm/test_vit", [50, 48, 24]) == [48, 48, 16]
    assert sizes_taken("timm/test_convnext", [64, 24]) == [64, 32]
    assert sizes_taken("timm/mixer_s32_224", [64, 24]) == [64, 24]  # which is refused later


def test_of_several_networks_the_one_that_is_used_is_named(tmp_path, capsys):
    network = ResNet("resnet18", width=8)
    weights = {f"{which}.{name}": value for which in ("encoder_q", "encoder_k") for name, value in
               network.state_dict().items()}  # fmt: skip
    torch.save({"state_dict": weights}, tmp_path / "moco.pth")
    backbone, _, _ = load_backbone(tmp_path / "moco.pth", None)
    assert_same(backbone.state_dict(), network.state_dict())
    line = "moco.pth holds several networks: weights of state_dict/encoder_q.* are used, not state_dict/encoder_k.*\n"
    assert capsys.readouterr().out.endswith(line)
    torch.save({"state_dict": network.state_dict()}, tmp_path / "moco.pth")
    load_backbone(tmp_path / "moco.pth", None)
    assert not capsys.readouterr().out


def test_contents_that_were_read_are_not_read_again(tmp_path):
    network = ResNet("resnet18", width=8)
    backbone, _, _ = load_backbone(tmp_path / "replaced.pth", None, {"state_dict": network.state_dict()})
    assert_same(backbone.state_dict(), network.state_dict())
