"""torch.hub's entry points: loaded from files and new, preprocessing, torch.fx, pickles in other processes."""

import copy
import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT, forked
from PIL import Image
from torchvision.models.feature_extraction import create_feature_extractor

import hubconf
from data import CentreCrop
from model import ARCHS, SwAV

SMALL = dict(arch="resnet18", width=4, blocks=[1, 1, 1, 1], stem="small")
HEAD = dict(hidden_mlp=6, feat_dim=5, nmb_prototypes=7)


def load(*words: object, **options: object) -> torch.nn.Module:
    return torch.hub.load(str(ROOT), *words, source="local", **options)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A checkpoint as train.py writes it, and its model."""
    model, path = SwAV(**SMALL, **HEAD).eval(), tmp_path_factory.mktemp("hub") / "checkpoint.pth"
    contents = {"state_dict": model.state_dict(), "options": {"size_crops": [16, 9]}, "sizes": [20, 24]}
    torch.save(contents, path)
    return path, model, contents


def test_torch_hub_has_the_backbones_also_next_to_another_model_file(tmp_path):
    # torch.hub.list takes these for entry points of a repository on GitHub.
    assert {name for name, value in vars(hubconf).items() if callable(value) and name[0] != "_"} == {
        *ARCHS,
        "from_checkpoint",
        "swav",
    }
    (tmp_path / "model.py").write_text("")  # of the program that loads it
    program = f"""
import torch, model
with torch.device("meta"):
    backbone = torch.hub.load({str(ROOT)!r}, "resnet50w2", source="local")
assert backbone.num_features == 4096 and not hasattr(model, "ResNet")
"""
    result = forked("-c", program, folder=tmp_path)
    assert result.returncode == 0, result.stderr


def test_preprocess_is_that_of_the_evaluation_of_the_run(file, tmp_path):
    path, model, contents = file
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8))
    backbone = load("from_checkpoint", path)
    ready = backbone.preprocess(image)
    assert torch.equal(ready, CentreCrop(resize=24, size=20)(image)) and ready.shape == (3, 20, 20)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert torch.equal(backbone.preprocess(pixels), ready)
    with torch.no_grad():
        assert torch.equal(backbone(ready[None]), model.features(ready[None]))
    assert load("from_checkpoint", path, size=10).preprocess(image).shape == (3, 10, 10)
    assert load("from_checkpoint", path, size=10).preprocess.resize == 12
    with pytest.raises(ValueError, match="resize: expected at least the 20 pixels of size, got 19"):
        load("from_checkpoint", path, resize=19)
    torch.save({name: contents[name] for name in ("state_dict", "options")}, tmp_path / "older.pth")
    older = load("from_checkpoint", tmp_path / "older.pth").preprocess
    assert (older.size, older.resize) == (16, 18)
    torch.save({"state_dict": contents["state_dict"], "options": [1], "sizes": "M"}, tmp_path / "foreign.pth")
    foreign = load("from_checkpoint", tmp_path / "foreign.pth").preprocess
    assert (foreign.size, foreign.resize) == (224, 256)


def test_swav_gives_the_whole_model_of_a_file(file, tmp_path):
    path, model, contents = file
    published = {f"module.{name}": weight for name, weight in contents["state_dict"].items()}
    torch.save(published, tmp_path / "published.pth.tar")
    images = torch.randn(2, 3, 16, 16)
    for name in (path, tmp_path / "published.pth.tar"):
        whole = load("swav", name)
        assert not whole.training and all(map(torch.equal, whole([images]), model([images])))
    assert load("swav", path).preprocess.size == 20
    linear = SwAV(**SMALL, **HEAD | {"hidden_mlp": 0})
    torch.save({"state_dict": linear.state_dict()}, tmp_path / "linear.pth")
    assert torch.equal(load("swav", tmp_path / "linear.pth").projection_head.weight, linear.projection_head.weight)
    assert load("swav", arch="resnet18", nmb_prototypes=9).prototypes.out_features == 9


def test_swav_names_what_a_file_lacks(file, tmp_path):
    path, _, contents = file
    for left_out in ("prototypes.", "projection_head."):
        weights = {name: w for name, w in contents["state_dict"].items() if not name.startswith(left_out)}
        torch.save(weights, tmp_path / "part.pth")
        with pytest.raises(ValueError, match="part.pth holds no whole SwAV model: expected the weights of a proj"):
            load("swav", tmp_path / "part.pth")
    with pytest.raises(ValueError, match="swav: expected no nmb_prototypes beside a file"):
        load("swav", path, nmb_prototypes=3)


@pytest.mark.parametrize("size", [16, 64])
def test_torch_fx_extracts_features_of_inner_layers(size):
    # With 16 pixels, the last stages have maps so small that Conv3x3 computes their gradient in another way.
    for name in ("resnet18", "resnet50"):
        backbone = load(name, width=4, blocks=[1, 1, 1, 1], stem="small")
        theirs = create_feature_extractor(backbone, ["layer3", "layer4.0.conv2", "flatten"])
        images, found = torch.randn(2, 3, size, size), []
        backbone.layer3.register_forward_hook(lambda module, inputs, output, found=found: found.append(output))
        for network in (backbone.train(), theirs.train()):
            torch.manual_seed(0)
            out = network(images)
            (out if network is backbone else out["flatten"]).square().sum().backward()
        torch.testing.assert_close(out["layer3"], found[0])
        assert out["layer4.0.conv2"].shape == (2, 32, size // 8, size // 8)
        gradients = dict(theirs.named_parameters())
        for parameter, weight in backbone.named_parameters():
            torch.testing.assert_close(gradients[parameter].grad, weight.grad, rtol=1e-3, atol=1e-3)


def test_pickles_and_copies_of_what_torch_hub_loads(file):
    path, model, _ = file
    backbone, images = load("from_checkpoint", path), torch.randn(2, 3, 16, 16)
    whole = load("swav", path)  # runs hubconf.py once more, whose classes are the same
    assert type(whole).__mro__[1] is type(backbone)
    expected = model.features(images)
    for again in (pickle.loads(pickle.dumps(backbone)), copy.deepcopy(backbone), copy.copy(backbone)):
        assert type(again) is type(backbone) and torch.equal(again(images), expected)
        assert again.preprocess.size == 20 and again.state_dict().keys() == backbone.state_dict().keys()
    probe = pickle.loads(pickle.dumps(torch.nn.Sequential(whole.layer1, torch.nn.Flatten())))
    assert type(probe[0][0].conv1).__name__ == "Conv3x3"


def test_a_backbone_of_torch_hub_goes_to_a_spawned_process(file):
    backbone = load("from_checkpoint", file[0]).requires_grad_(False)
    layer, image = pickle.dumps(backbone.layer1), torch.arange(3 * 30 * 30).reshape(3, 30, 30).to(torch.uint8)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert not pool.submit(eval, "'swav_model' in __import__('sys').modules").result(60)
        features = pool.submit(backbone, torch.ones(2, 3, 16, 16)).result(60)
        ready = pool.submit(backbone.preprocess, image).result(60)
        part = pool.submit(pickle.loads, layer).result(60)
    assert torch.equal(features, backbone(torch.ones(2, 3, 16, 16)))
    assert torch.equal(ready, backbone.preprocess(image))
    assert torch.equal(part[0].conv1.weight, backbone.layer1[0].conv1.weight)


def test_a_torchvision_file_is_loaded_bit_for_bit(tmp_path):
    network = torchvision.models.resnet18().eval()
    torch.save(network.state_dict(), tmp_path / "resnet18.pth")
    backbone, images = load("from_checkpoint", tmp_path / "resnet18.pth"), torch.randn(2, 3, 64, 64)
    network.fc = torch.nn.Identity()
    assert torch.equal(backbone(images), network(images))
