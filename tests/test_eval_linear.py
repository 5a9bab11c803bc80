"""eval_linear.py end to end, as its users run it."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import torchvision
from conftest import ROOT, run_training, torchrun

import eval_linear
from launch import RunStopped, UserError
from model import ResNet


def evaluate(*words: object) -> dict:
    quick = ["--epochs", "2", "--workers", "0", "--device", "cpu", *map(str, words)]
    return eval_linear.main(eval_linear.parse_args(quick))


@pytest.fixture(scope="session")
def trained(images, tmp_path_factory) -> Path:
    """The checkpoint of a tiny run."""
    folder = tmp_path_factory.mktemp("trained") / "runs" / "tiny"
    run_training(images, folder, "--epochs", "1")
    return folder / "checkpoint.pth"


@pytest.mark.parametrize("mode", [[], ["--cached"]], ids=["probe", "cached"])
def test_writes_probe_and_knn_of_the_checkpoint_and_of_all_baselines(mode, trained, images, capsys):
    result = evaluate(trained, "--data_path", images, *mode)
    out = capsys.readouterr().out
    rows = result["rows"]
    assert list(rows) == [
        "checkpoint",
        "random init, BatchNorm untouched",
        "random init, BatchNorm of the training images",
        "raw pixels",
    ]
    for name, row in rows.items():
        assert name in out
        assert 0 < row["spread"] < 1.5
        for kind in ("linear", "knn"):
            assert 0 <= row[kind]["top1"] <= row[kind]["top5"] == 100  # two classes
    assert json.loads(trained.with_suffix(".eval.json").read_text()) == result
    assert ("linear probe, epoch 2/2" in out) == (not mode)


def test_a_probe_whose_loss_is_not_finite_stops(trained, images):
    with pytest.raises(RunStopped, match="linear probe: the loss is nan in epoch .; try a lower --lr") as stopped:
        evaluate(trained, "--data_path", images, "--lr", "1e38", "--epochs", "4")
    assert stopped.value.code == 4


def test_finds_the_newest_checkpoint_and_its_images(trained, images, monkeypatch):
    monkeypatch.chdir(trained.parent.parent.parent)
    result = evaluate("--cached")
    assert result["checkpoint"] == "runs/tiny/checkpoint.pth"
    assert (result["dataset"], result["data_path"], result["size"]) == ("folder", str(images), 20)
    monkeypatch.chdir(images)
    with pytest.raises(UserError, match="no runs/"):
        evaluate()


def test_published_and_torchvision_files_are_evaluated_by_their_backbone(images, tmp_path):
    network = torchvision.models.resnet18()
    plain = network.state_dict()
    wrapped = {f"module.{name}": weight for name, weight in plain.items() if not name.startswith("fc.")}
    wrapped |= {"module.projection_head.0.weight": torch.zeros(3, 512), "module.prototypes.weight": torch.zeros(3, 3)}
    torch.save(plain, tmp_path / "torchvision.pth")
    torch.save(wrapped, tmp_path / "published.pth.tar")
    torch.save({"epoch": 3, "state_dict": wrapped, "optimizer": {}}, tmp_path / "resumable.pth.tar")
    options = ("--cached", "--data_path", images, "--size", "32")
    results = [evaluate(path, *options)["rows"] for path in sorted(tmp_path.iterdir())]
    assert len(results) == 3 and results[0] == results[1] == results[2]


def test_options_without_effect_are_said(trained, images, capsys):
    evaluate(trained, "--data_path", images, "--cached", "--lr", "1", "--batch_size", "4")
    said = [line for line in capsys.readouterr().out.splitlines() if "has no effect" in line]
    reason = "has no effect with --cached, which fits without SGD"
    assert said == [f"--epochs 2 {reason}", f"--lr 1.0 {reason}"]
    assert eval_linear.options_without_effect(eval_linear.parse_args(["--epochs", "2", "--wd", "0"])) == []


def test_features_over_two_processes_equal_those_of_one(trained, images, tmp_path):
    one = evaluate(trained, "--cached", "--data_path", images)["rows"]
    shutil.copy(trained, tmp_path / "copy.pth")
    words = [tmp_path / "copy.pth", "--cached", "--data_path", images, "--workers", "0", "--device", "cpu"]
    done = torchrun(2, ROOT / "eval_linear.py", *words)
    assert done.returncode == 0, done.stderr
    two = json.loads((tmp_path / "copy.eval.json").read_text())["rows"]
    for name in ("checkpoint", "random init, BatchNorm untouched", "raw pixels"):
        assert two[name] == one[name]


def test_probe_over_two_processes_equals_that_of_one(trained, images, tmp_path):
    shutil.copy(trained, tmp_path / "copy.pth")
    words = [tmp_path / "copy.pth", "--epochs", "2", "--data_path", images, "--workers", "0", "--device", "cpu"]
    done = torchrun(2, ROOT / "eval_linear.py", *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("linear probe, epoch 2/2") == 1
    two = json.loads((tmp_path / "copy.eval.json").read_text())["rows"]["checkpoint"]
    assert two == evaluate(trained, "--data_path", images)["rows"]["checkpoint"]


@pytest.mark.parametrize(
    "words, message",
    [
        ("{tmp}/none.pth", "checkpoint: cannot read .*none.pth"),
        ("{tmp}/half.pth", "checkpoint: cannot read .*half.pth"),
        ("{tmp}/other.pth", "checkpoint: expected the weights of a ResNet"),
        ("{tmp}/empty.pth", "checkpoint: expected the weights of a ResNet"),
        ("{tmp}/numbers.pth", "checkpoint: expected the weights of a ResNet"),
        ("{tmp}/stages.pth", "blocks: expected four numbers of 1 or more"),
        ("{tmp}/stem.pth", "checkpoint: expected a stem of 7x7, 5x5 or 3x3, got 9x9"),
        ("{tmp}/layer.pth", "checkpoint: .*layer.pth does not hold a whole ResNet"),
        ("{tmp}/nan.pth --data_path {images}", "checkpoint: .*nan.pth holds weights that are nan or inf"),
        ("{trained} --arch resnet50", "--arch: .* holds a resnet18.* got resnet50"),
        (
            "{trained} --data_path {tmp}",
            "data_path: .*/train: No such file or directory; labels need train/ and val/",
        ),
        ("{trained} --data_path {tmp}/none", "--data_path: expected a folder"),
        ("{trained} --pretrained {trained}", "--pretrained .*: expected none beside the checkpoint"),
        ("{trained} --dataset shapes --data_path {images}", "--data_path: expected none for --dataset shapes"),
        ("{trained} --data_path {images} --lr 0", "--lr: expected .* got 0"),
        ("{trained} --data_path {images} --resize 8 --size 16", "--resize: expected at least the 16"),
    ],
)
def test_bad_options_are_refused(words, message, trained, images, tmp_path):
    (tmp_path / "half.pth").write_bytes(b"PK\x03\x04 half a file")
    torch.save({"state_dict": {"fc.weight": torch.zeros(2, 2)}}, tmp_path / "other.pth")
    torch.save({"state_dict": None}, tmp_path / "empty.pth")
    torch.save({0: torch.zeros(2)}, tmp_path / "numbers.pth")
    weights = ResNet("resnet18", width=8).state_dict()
    torch.save({name: w for name, w in weights.items() if not name.startswith("layer2")}, tmp_path / "stages.pth")
    torch.save(weights | {"conv1.weight": torch.zeros(8, 3, 9, 9)}, tmp_path / "stem.pth")
    torch.save({name: w for name, w in weights.items() if name != "layer2.0.bn1.weight"}, tmp_path / "layer.pth")
    torch.save(weights | {"conv1.weight": weights["conv1.weight"] * math.nan}, tmp_path / "nan.pth")
    with pytest.raises(UserError, match=message):
        evaluate(*words.format(tmp=tmp_path, trained=trained, images=images).split())
