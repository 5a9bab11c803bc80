"""eval_linear.py end to end, as its users run it."""

import json
import math
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torchvision
from conftest import ROOT, run_training, torchrun

import eval_linear
import hubconf
import probes
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
            low, high = row[kind]["top1_interval"]
            assert low <= row[kind]["top1"] <= high and f"({low:.1f} to {high:.1f})" in out
    written = json.loads(trained.with_suffix(".eval.json").read_text())
    assert written["results"][eval_linear.key_of(result)] == result
    assert {name: value for name, value in written.items() if name != "results"} == result
    assert ("linear probe, epoch 2/2" in out) == (not mode)
    assert not list(trained.parent.glob("*.unfinished"))
    if not mode:
        saved = torch.load(trained.with_suffix(".linear.pth"), weights_only=True)
        assert saved["state_dict"]["fc.weight"].shape == (2, 64) and saved["classes"] == ["cats", "dogs"]
        assert saved["sizes"] == [20, 20] and saved["options"]["epochs"] == 2


def test_raw_pixels_are_not_enlarged(trained, images, monkeypatch, tmp_path):
    sizes = []

    def no_baselines(*arguments, pixel_transform, **_options):
        sizes.extend([arguments[3].size, pixel_transform.size])
        return {}

    monkeypatch.setattr(eval_linear, "baselines", no_baselines)
    evaluate(copied(trained, tmp_path), "--data_path", images, "--cached", "--size", "40")
    assert sizes == [40, 20]  # of features, of pixels


def test_the_probe_mirrors_images_as_training_did(trained, images, monkeypatch, tmp_path):
    path, seen, crop = copied(trained, tmp_path), [], eval_linear.ProbeCrop
    monkeypatch.setattr(eval_linear, "ProbeCrop", lambda *words: seen.append(words[1]) or crop(*words))
    contents = torch.load(path, weights_only=True)
    for flips in (0.5, 0.0, None):  # None: weights of others do not say it
        options = {name: value for name, value in contents["options"].items() if name != "hflip"}
        torch.save(contents | {"options": options | ({} if flips is None else {"hflip": flips})}, path)
        evaluate(path, "--data_path", images, "--cached", "--compare", "off")
    assert seen == [0.5, 0, 0.5]


def test_a_probe_whose_loss_is_not_finite_stops(trained, images):
    with pytest.raises(RunStopped, match="linear probe: the loss is nan in epoch .; try a lower --lr") as stopped:
        evaluate(trained, "--data_path", images, "--lr", "1e38", "--epochs", "4")
    assert stopped.value.code == 4


def copied(trained: Path, folder: Path) -> Path:
    return Path(shutil.copy(trained, folder / "copy.pth"))


def results_of(path: Path) -> list[dict]:
    return list(json.loads(path.with_suffix(".eval.json").read_text())["results"].values())


def test_results_of_other_settings_stay_beside_each_other(trained, images, tmp_path):
    path, options = copied(trained, tmp_path), ("--data_path", images, "--cached", "--compare", "off")
    old = {"checkpoint": str(path), "size": 16, "linear_probe": "cached features", "rows": {"checkpoint": {}}}
    path.with_suffix(".eval.json").write_text(json.dumps(old))  # as older versions wrote it
    first = evaluate(path, *options)
    assert list(first["rows"]) == ["checkpoint"]
    assert results_of(path) == [old, first]
    second = evaluate(path, *options, "--size", "16")
    assert results_of(path) == [old, first, second]
    again = evaluate(path, *options)
    assert results_of(path) == [old, again, second]
    newest = json.loads(path.with_suffix(".eval.json").read_text())
    assert newest["size"] == 20 and newest["rows"] == again["rows"]
    path.with_suffix(".eval.json").write_text("{half")
    assert evaluate(path, *options)["rows"] == again["rows"]
    assert results_of(path)[0]["rows"] == again["rows"] and len(results_of(path)) == 1
    assert (tmp_path / "copy.eval.damaged.json").read_text() == "{half"
    weights = torch.load(path, weights_only=True)
    weights["state_dict"]["layer4.0.bn2.bias"] += 0.1  # training went on
    torch.save(weights, path)
    evaluate(path, *options)
    assert len(results_of(path)) == 2


def test_several_k(trained, images, tmp_path, capsys):
    options = copied(trained, tmp_path), "--data_path", images, "--cached", "--knn_k", "3", "1", "100"
    row = evaluate(*options)["rows"]["raw pixels"]
    assert list(row["knn_by_k"]) == ["3", "1", "100"] and row["knn"] == row["knn_by_k"]["3"]
    assert "kNN 100" in capsys.readouterr().out
    assert evaluate(*options[:-3], "1")["rows"]["raw pixels"]["knn"] == row["knn_by_k"]["1"]


def test_a_sweep_chooses_on_training_images_that_were_held_out(trained, images, tmp_path, capsys):
    rates = "--sweep", "--lr", "1e-9", "0.3", "1e38", "--wd", "0", "1e-4"
    result = evaluate(copied(trained, tmp_path), "--data_path", images, "--compare", "off", *rates)
    rows = result["sweep"]
    assert [(row["lr"], row["wd"]) for row in rows] == [(a, b) for a in (1e-9, 0.3, 1e38) for b in (0.0, 1e-4)]
    assert result["chosen"]["held_out"] == 2
    best = max(row["held_out"]["top1"] for row in rows)
    (chosen,) = (row for row in rows if all(row[name] == result["chosen"][name] for name in ("lr", "wd")))
    assert chosen["held_out"]["top1"] == best and chosen["val"] == result["rows"]["checkpoint"]["linear"]
    assert all(row["held_out"]["top1"] == row["val"]["top1"] == 0 for row in rows if row["lr"] == 1e38)
    out = capsys.readouterr().out
    assert "* has the best on 2 training images that were held out" in out and " *\n" in out


def test_fine_tuning_beside_random_weights_and_resumed(trained, images, tmp_path, monkeypatch, capsys):
    path, fit = copied(trained, tmp_path), probes._fit
    words = path, "--data_path", images, "--finetune", "--labels", "0.6", "--batch_size", "3", "--per_class"

    def stop_at_random(*arguments, **options):
        fitted = fit(*arguments, **options)
        if "random" in options["title"]:
            raise KeyboardInterrupt
        return fitted

    with monkeypatch.context() as patch:
        patch.setattr(probes, "_fit", stop_at_random)
        with pytest.raises(KeyboardInterrupt):
            evaluate(*words)
    assert len(list(tmp_path.glob("*.unfinished"))) == 2
    resumed = evaluate(*words)
    out = capsys.readouterr().out
    assert out.count("resuming after epoch 2/2") == 2 and "6 of 10 training images are used" in out
    assert not list(tmp_path.glob("*.unfinished"))
    result = evaluate(*words)
    assert result["rows"] == resumed["rows"] and list(result["rows"]) == ["checkpoint", "random init"]
    assert result["images"] == {"train": 6, "val": 6} and result["labels"] == 0.6
    assert [row["class"] for row in result["per_class"]] == ["cats", "dogs"]
    mean = sum(row["top1"] for row in result["per_class"]) / 2
    assert mean == pytest.approx(result["rows"]["checkpoint"]["finetune"]["top1"])
    assert (tmp_path / "copy.finetune.confusion.png").exists() == bool(find_spec("matplotlib"))
    tuned = tmp_path / "copy.finetune.pth"
    again = evaluate(tuned, "--data_path", images, "--cached")  # it loads as any other backbone, with its sizes
    assert again["rows"]["checkpoint"]["spread"] > 0 and again["size"] == resumed["size"]
    assert hubconf.from_checkpoint(tuned).preprocess.size == resumed["size"]
    assert len(results_of(path)) == 1


def test_without_matplotlib_the_missing_picture_is_said(trained, images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(eval_linear, "find_spec", lambda name: None)
    evaluate(copied(trained, tmp_path), "--data_path", images, "--cached", "--compare", "off", "--per_class")
    out = capsys.readouterr().out
    assert "no picture of the confusion matrix, as matplotlib is not installed: pip install matplotlib" in out
    assert not list(tmp_path.glob("*.png"))


def test_labels_from_one_folder_from_a_list_and_from_a_subset(trained, images, tmp_path):
    path, options = copied(trained, tmp_path), ("--cached", "--compare", "off")
    result = evaluate(path, "--data_path", images / "train", *options, "--val_share", "0.2")
    assert result["images"] == {"train": 8, "val": 2} and result["left_out"] == {"train": 0, "val": 0}
    (tmp_path / "list.txt").write_text("cats/1.png\ndogs/1.png\ndogs/2.png\n")
    result = evaluate(path, "--data_path", images, *options, "--subset", tmp_path / "list.txt")
    assert result["images"] == {"train": 3, "val": 6}
    assert len(results_of(path)) == 2


@pytest.mark.parametrize("name, rates, share", [("1percent", (0.02, 5), 0.01), ("10percent", (0.01, 0.2), 0.1)])
def test_recipes_of_fine_tuning_are_the_published_rows(name, rates, share):
    args = eval_linear.parse_args([f"@{ROOT}/recipes/finetune_{name}.args", "a.pth"])
    eval_linear.check_args(args)
    assert args.checkpoint == "a.pth" and args.finetune and args.labels == share
    settings = eval_linear.settings_of(args, 12_811, world_size=8)
    assert (settings["lr"], settings["lr_last_layer"]) == ([rates[0]], rates[1])
    assert (settings["epochs"], settings["batch_size"], settings["wd"]) == (20, 256, [0])
    assert eval_linear.options_without_effect(args) == []


def test_a_checkpoint_may_follow_an_option_of_several_values():
    for words in ("--lr 0.1 a.pth", "--knn_k 10 20 a.pth --wd 1", "a.pth --lr 0.1 --wd 0", "--wd 0 a.pth"):
        args = eval_linear.parse_args(words.split())
        assert args.checkpoint == "a.pth" and args.knn_k in ([20], [10, 20]) and args.lr in (None, [0.1])
    for words in ("a.pth --lr 0.1 b.pth", "--lr a.pth 0.1", "--wd 0.1x", "--lr a.pth", "--knn_k a.pth"):
        with pytest.raises(UserError, match="^--(lr|wd|knn_k): expected (numbers|a number)"):
            eval_linear.parse_args(words.split())


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
    words = ["--finetune", "--knn_k", "1", "2", "--lr_last_layer", "1"]
    said = eval_linear.options_without_effect(eval_linear.parse_args(words))
    assert said == ["--knn_k 1 2 has no effect with --finetune, which has no neighbours"]
    (said,) = eval_linear.options_without_effect(eval_linear.parse_args(["--lr_last_layer", "1"]))
    assert said == "--lr_last_layer 1.0 has no effect without --finetune"


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
        ("{trained} --pretrained {trained}", "--pretrained .*: expected none with the checkpoint"),
        ("{trained} --dataset shapes --data_path {images}", "--data_path: expected none for --dataset shapes"),
        ("{trained} --data_path {images} --lr 0", "--lr: expected .* got 0"),
        ("{trained} --cached --finetune", "--cached: expected none with --finetune"),
        ("{trained} --finetune --sweep", "--finetune: expected none with --sweep"),
        ("{trained} --lr 1 2", "--lr: expected one value, or --sweep for several, got 1.0 2.0"),
        ("{trained} --labels 10", "--labels: expected a number from .* to 1, got 10"),
        ("{trained} --labels 1", "--labels: expected a share below 1, as 0.1 for 10 %, got 1"),
        ("{trained} --labels 0.1 --subset a", "--labels: expected none with --subset"),
        (
            "{trained} --dataset shapes --val_labels a",
            "--val_labels: expected images in a folder, got --dataset shapes",
        ),
        ("{tmp}/plain.pth --val_labels a", "--val_labels: expected images in a folder, got --dataset shapes"),
        ("{trained} --data_path {images} --subset {tmp}/none", "--subset: cannot read .*none'"),
        ("{trained} --data_path {images} --resize 8 --size 16", "--resize: expected at least the 16"),
    ],
)
def test_bad_options_are_refused(words, message, trained, images, tmp_path):
    (tmp_path / "half.pth").write_bytes(b"PK\x03\x04 half a file")
    torch.save({"state_dict": {"fc.weight": torch.zeros(2, 2)}}, tmp_path / "other.pth")
    torch.save({"state_dict": None}, tmp_path / "empty.pth")
    torch.save({0: torch.zeros(2)}, tmp_path / "numbers.pth")
    weights = ResNet("resnet18", width=8).state_dict()
    torch.save(weights, tmp_path / "plain.pth")
    torch.save({name: w for name, w in weights.items() if not name.startswith("layer2")}, tmp_path / "stages.pth")
    torch.save(weights | {"conv1.weight": torch.zeros(8, 3, 9, 9)}, tmp_path / "stem.pth")
    torch.save({name: w for name, w in weights.items() if name != "layer2.0.bn1.weight"}, tmp_path / "layer.pth")
    torch.save(weights | {"conv1.weight": weights["conv1.weight"] * math.nan}, tmp_path / "nan.pth")
    with pytest.raises(UserError, match=message):
        evaluate(*words.format(tmp=tmp_path, trained=trained, images=images).split())
