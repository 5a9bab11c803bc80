"""Weights and networks in the forms of other programs: they load there, give the same features, and come back."""

import json
import sys

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision.transforms import v2

import exchange
import model
from backbones import load_backbone
from data import CentreCrop
from launch import RunStopped, UserError
from model import ResNet, SwAV

CROP = CentreCrop(resize=18, size=16)
SMALL = dict(arch="resnet18", width=4, blocks=(1, 1, 1, 1), stem="small")


def renamed(network, naming, **contents):
    weights = model.backbone_weights(network.state_dict())
    return exchange.rename_weights(network, model.architecture_of(weights), naming, contents)


def assert_comes_back(path, network):
    weights = load_backbone(path, None)[0].state_dict()
    assert weights.keys() == network.state_dict().keys()
    assert all(torch.equal(weights[name], w) for name, w in network.state_dict().items())


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_torchvision_takes_the_weights_and_they_come_back(arch, tmp_path):
    network = ResNet(arch).eval()
    exchange.write_weights(renamed(network, "torchvision"), tmp_path / "w.pth", CROP)
    weights = torch.load(tmp_path / "w.pth", weights_only=True)
    assert weights._metadata["preprocess"] == exchange.preprocessing(CROP)
    with torch.device("meta"):
        theirs = torchvision.models.get_model(arch).eval()
    result = theirs.load_state_dict(weights, strict=False, assign=True)
    assert result.missing_keys == ["fc.weight", "fc.bias"] and not result.unexpected_keys
    theirs.fc, images = torch.nn.Identity(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(theirs(images), network(images))
    assert_comes_back(tmp_path / "w.pth", network)


def test_timm_takes_the_weights_and_they_come_back(tmp_path):
    timm = pytest.importorskip("timm")
    network = ResNet("resnet50").eval()
    exchange.write_weights(renamed(network, "timm"), tmp_path / "w.pth", CROP)
    theirs = timm.create_model("resnet50", num_classes=0).eval()
    theirs.load_state_dict(torch.load(tmp_path / "w.pth", weights_only=True))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), network(images))
    assert_comes_back(tmp_path / "w.pth", network)


def test_timm_takes_the_weights_of_a_network_of_its_own():
    timm = pytest.importorskip("timm")

    class Wrapped(torch.nn.Module):  # as a backbone of another program lies in a module of ours
        def __init__(self):
            super().__init__()
            self.network = timm.create_model("convnext_atto", num_classes=0)

    wrapped = Wrapped()
    weights = exchange.rename_weights(wrapped, {"arch": "timm/convnext_atto"}, "timm", {})
    timm.create_model("convnext_atto", num_classes=0).load_state_dict(weights)
    for naming, message in (
        ("swav", "expected a ResNet, got timm/convnext_atto"),
        ("torchvision", "torchvision has no"),
    ):
        with pytest.raises(UserError, match=f"--to {naming}: {message}"):
            exchange.rename_weights(wrapped, {"arch": "timm/convnext_atto"}, naming, {})


@pytest.mark.parametrize("hidden_mlp", [6, 0])
def test_published_names_have_the_whole_model_and_come_back(hidden_mlp, tmp_path):
    whole = SwAV(**SMALL, hidden_mlp=hidden_mlp, feat_dim=5, nmb_prototypes=7).eval()
    whole.normalize_prototypes()
    network = ResNet(**SMALL)
    network.load_state_dict(model.backbone_weights(whole.state_dict()))
    exchange.write_weights(renamed(network, "swav", state_dict=whole.state_dict()), tmp_path / "w.pth", CROP)
    weights = torch.load(tmp_path / "w.pth", weights_only=True)
    assert weights.keys() == {f"module.{name}" for name in whole.state_dict()}
    assert all(torch.equal(weights[f"module.{name}"], w) for name, w in whole.state_dict().items())
    assert_comes_back(tmp_path / "w.pth", network)
    head, prototypes = exchange.load_head(weights, tmp_path / "w.pth")
    images = torch.randn(2, 3, 16, 16)
    scores = prototypes(torch.nn.functional.normalize(head(network.eval()(images)), dim=1))
    torch.testing.assert_close(scores, whole([images])[1])


def test_a_head_of_other_layers_is_refused():
    weights = {"projection_head.1.weight": torch.ones(4, 6), "projection_head.1.bias": torch.ones(4)}
    with pytest.raises(UserError, match="RUN: w.pth holds no whole projection head: .*projection_head.weight"):
        exchange.load_head(weights | {"prototypes.weight": torch.ones(7, 4)}, "w.pth")


@pytest.mark.parametrize("naming", ["torchvision", "timm"])
@pytest.mark.parametrize(
    "options, message",
    [
        (dict(arch="resnet50w2"), "{naming} has no resnet50w2; write --to swav"),
        (dict(arch="resnet18", stem="small"), r"differs .* conv1.weight is \[64, 3, 3, 3\], there \[64, 3, 7, 7\]"),
        (dict(arch="resnet18", width=32), "this resnet18 differs from {naming}'s in stem, width or blocks"),
        (dict(arch="resnet18", blocks=(1, 1, 1, 1)), r"layer1.1.bn1.bias is none, there \[64\]; write --to swav"),
    ],
)
def test_what_others_cannot_express_is_refused(options, message, naming):
    if naming == "timm":
        pytest.importorskip("timm")
    with pytest.raises(UserError, match=f"^--to {naming}: .*{message.format(naming=naming)}"):
        with torch.device("meta"):  # names and shapes are enough
            network = ResNet(**options)
        renamed(network, naming)


def test_a_backbone_alone_has_no_published_names():
    with pytest.raises(UserError, match="--to swav: RUN holds a backbone alone; write --to torchvision"):
        renamed(ResNet(**SMALL), "swav", state_dict={})


def test_safetensors_holds_the_weights_and_the_preprocessing(tmp_path):
    safetensors = pytest.importorskip("safetensors")
    network = ResNet("resnet18").to(memory_format=torch.channels_last)
    exchange.write_weights(renamed(network, "torchvision"), tmp_path / "w.safetensors", CROP)
    with safetensors.safe_open(tmp_path / "w.safetensors", "pt") as file:
        assert json.loads(file.metadata()["preprocess"]) == exchange.preprocessing(CROP)
        assert set(file.keys()) == network.state_dict().keys()
        assert all(torch.equal(file.get_tensor(name), w) for name, w in network.state_dict().items())


def test_a_program_can_follow_the_preprocessing():
    known = exchange.preprocessing(CROP)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8))
    steps = [v2.PILToTensor(), v2.Resize(known["resize"], antialias=True), v2.CenterCrop(known["size"])]
    steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(known["mean"], known["std"])]
    torch.testing.assert_close(v2.Compose(steps)(image), CROP(image))
    assert known["std"][0] == 0.228 and json.loads(json.dumps(known)) == known
    with_range = CentreCrop(18, 16, (5.0, 4000.0))
    assert exchange.preprocessing(with_range)["value_range"] == [5, 4000]
    assert exchange.describe_preprocessing(with_range).startswith("16-bit values from 5 to 4000 scaled to 0 to 255, ")


# Networks. Maps of the last stages: 2x2 of 16 pixels, where Conv3x3 has a form of its own in training


def test_onnx_gives_the_same_features_for_any_batch(tmp_path):
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    network, path = ResNet(**SMALL).eval(), tmp_path / "b.onnx"
    assert exchange.write_onnx(network, path, CROP) < 1e-4
    assert [file.name for file in tmp_path.iterdir()] == ["b.onnx"]  # weights too
    metadata = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert json.loads(metadata["preprocess"]) == exchange.preprocessing(CROP)
    session, images = onnxruntime.InferenceSession(path), torch.randn(5, 3, 16, 16)
    (features,) = session.run(["features"], {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(features), network(images).detach(), rtol=1e-4, atol=1e-4)


def test_torch_export_gives_the_same_features_for_any_batch(tmp_path):
    network, path, images = ResNet(**SMALL).eval(), tmp_path / "b.pt2", torch.randn(5, 3, 16, 16)
    assert exchange.write_torch_export(network, path, CROP) < 1e-4
    found = {"preprocess.json": ""}
    program = torch.export.load(path, extra_files=found)
    assert json.loads(found["preprocess.json"]) == exchange.preprocessing(CROP)
    torch.testing.assert_close(program.module()(images), network(images))
    assert "model" not in str(program.graph)  # it needs no class of ours


def test_an_export_that_differs_is_refused():
    network = ResNet(**SMALL).eval()
    assert exchange.largest_difference(network, network, 16) == 0
    for wrong in (lambda images: network(images) * 1.001, lambda images: network(images) * torch.nan):
        with pytest.raises(RunStopped, match="differs from PyTorch's by up to .*; it is not written"):
            exchange.largest_difference(wrong, network, 16)


def test_missing_packages_are_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setitem(sys.modules, "onnx", sys)
    monkeypatch.setitem(sys.modules, "onnxruntime", sys)
    with pytest.raises(UserError, match="needs onnxscript, .* pip install onnxruntime onnx onnxscript$"):
        exchange.write_onnx(ResNet(**SMALL), tmp_path / "b.onnx", CROP)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(UserError, match="pip install safetensors$"):
        exchange.write_weights({}, tmp_path / "w.safetensors", CROP)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="pip install timm$"):
        renamed(ResNet(**SMALL), "timm")
    assert not list(tmp_path.iterdir())


def test_networks_too_large_for_onnx_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(exchange, "need", lambda *packages: None)
    monkeypatch.setattr(exchange, "LARGEST_ONNX", 1000)
    with pytest.raises(UserError, match="onnx: expected weights of at most 2 GB, got .*; use torch_export"):
        exchange.write_onnx(ResNet(**SMALL), tmp_path / "b.onnx", CROP)
