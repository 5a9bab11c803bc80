"""train.py --init and --arch: runs that start from weights, and runs of networks of timm."""

import json
from urllib.error import URLError

import pytest
import torch
import torchvision
from conftest import TINY, assert_same, run_processes, run_training

import backbones
import eval_linear
import guard
import hubconf
import train
from backbones import read_start, sha256, start_backbone, start_from
from launch import UserError
from model import ResNet, SwAV, data_parallel

STILL = "--base_lr", "1e-20", "--final_lr", "0", "--epochs", "1"  # weights stay as they are, but for BatchNorm's
SHAPE = TINY[: TINY.index("--hidden_mlp")]  # --arch --width --blocks --stem


@pytest.fixture(scope="module")
def start(images, tmp_path_factory):
    """A run to start from: (its checkpoint.pth, what it holds)."""
    dump = tmp_path_factory.mktemp("start")
    return dump / "checkpoint.pth", run_training(images, dump, "--epochs", "1", "--seed", "5")


def train_from(images, dump, init, *more, shape=()):
    """Train as `run_training`, with --init and without options of the architecture but `shape`."""
    words = [*TINY[len(SHAPE) :], *shape, f"--data_path={images}", f"--dump_path={dump}", f"--init={init}", *more]
    train.main(train.parse_args([str(word) for word in words]))
    return torch.load(dump / "checkpoint.pth", weights_only=True)


def is_of_backbone(name):
    return not name.startswith(("projection_head", "prototypes"))


def assert_started_from(state_dict, weights):
    """Learned weights of the backbone are the given ones, those of head and prototypes are not."""
    for name, tensor in state_dict.items():
        if tensor.is_floating_point() and "running" not in name and tensor.dim() > 1:
            assert torch.equal(tensor, weights[name]) == is_of_backbone(name), name


# A run that starts from weights


def test_the_backbone_starts_from_the_file_and_its_architecture_is_read_off(images, start, tmp_path, capsys):
    path, first = start
    run = train_from(images, tmp_path / "run", path, *STILL)
    assert_started_from(run["state_dict"], first["state_dict"])
    out = capsys.readouterr().out
    assert f"--init: starting from {path} (state_dict/*), a resnet18 of width 8\n" in out
    assert f"  --arch resnet18 --width 8 --blocks 1 1 1 1 --stem small  (read off {path})\n" in out
    assert "  left over in the file: projection_head, prototypes; new: projection head and prototypes\n" in out
    options = run["options"]
    assert {name: options[name] for name in ("arch", "width", "blocks", "stem")} == {
        name: first["options"][name] for name in ("arch", "width", "blocks", "stem")
    }
    facts = json.loads((tmp_path / "run" / "run.json").read_text())["options"]
    assert facts["arch"]["reason"] == facts["stem"]["reason"] == f"as in {path}"
    assert facts["init"]["reason"] == "set by the user"
    assert facts["init_sha256"] == {"value": sha256(path), "reason": f"checksum of {path}"}


def test_a_run_resumes_without_the_file(images, start, tmp_path, capsys):
    copy = tmp_path / "start.pth"
    copy.write_bytes(start[0].read_bytes())
    first = train_from(images, tmp_path / "run", copy, "--epochs", "2")
    copy.unlink()
    capsys.readouterr()
    resumed = train_from(images, tmp_path / "run", copy)
    out = capsys.readouterr().out
    assert f"--init: not read again, as the run in {tmp_path / 'run'} resumes with its own weights" in out
    assert resumed["epoch"] == 4 and resumed["options"]["init_sha256"] == first["options"]["init_sha256"]
    train_from(images, tmp_path / "other", start[0], "--epochs", "2")
    other = train_from(images, tmp_path / "other", start[0])  # whose file is there
    assert_same(resumed["state_dict"], other["state_dict"])


def test_a_run_with_another_start_is_not_resumed(images, start, tmp_path):
    train_from(images, tmp_path / "run", start[0], "--epochs", "1")
    with pytest.raises(UserError, match=r"--dump_path: .* other options \(.*init .*checkpoint.pth -> other.pth"):
        train_from(images, tmp_path / "run", "other.pth")
    with pytest.raises(UserError, match=r"--dump_path: .* other options \(.*init .*checkpoint.pth -> None"):
        run_training(images, tmp_path / "run")


def test_recovering_from_the_beginning_starts_from_the_file_again(images, start, tmp_path, monkeypatch, collapsing):
    monkeypatch.setattr(guard.CollapseGuard, "epoch_is_stuck", lambda self, epoch_loss: True)  # none is good
    starts = []

    def note(model, *words):
        start_from(model, *words)
        starts.append(model.conv1.weight.detach().clone())

    monkeypatch.setattr(backbones, "start_from", note)
    train_from(images, tmp_path / "run", start[0], "--on_collapse", "recover", "--log_freq", "1")
    assert len(starts) == 1 + train.MAX_RECOVERIES
    assert all(torch.equal(weight, start[1]["state_dict"]["conv1.weight"]) for weight in starts)


def started(rank, world_size, path):
    torch.manual_seed(rank)
    model = SwAV("resnet18", 16, 8, 6, width=8, blocks=(1, 1, 1, 1), stem="small")
    if rank == 0:
        start_from(model, path, "resnet18")
    data_parallel(model, torch.device("cpu"))
    return [model.conv1.weight.detach(), model.bn1.running_mean, model.prototypes.weight.detach()]


def test_all_processes_start_from_the_weights_that_the_first_one_reads(start):
    results = run_processes(started, 2, str(start[0]))
    weights = start[1]["state_dict"]
    for conv, mean, prototypes in results:
        assert torch.equal(conv, weights["conv1.weight"]) and torch.equal(mean, weights["bn1.running_mean"])
        assert torch.equal(prototypes, results[0][2])


@pytest.mark.parametrize("shape", [[], ["--arch", "resnet18"], SHAPE], ids=["open", "arch", "all"])
def test_the_users_shape_may_be_as_in_the_file(images, start, tmp_path, shape):
    args = train.parse_args([*shape, "--init", str(start[0]), f"--data_path={images}"])
    found = train.start_options(args, None)
    assert {name: found[name] for name in backbones.SHAPE_OPTIONS} == {
        name: start[1]["options"][name] for name in backbones.SHAPE_OPTIONS
    }


def test_a_resnet101_may_be_asked_for_by_its_blocks(tmp_path):
    with torch.device("meta"):
        names = ResNet("resnet101", width=4).state_dict()
    torch.save({name: torch.zeros_like(tensor, device="cpu") for name, tensor in names.items()}, tmp_path / "101.pth")
    asked = dict(arch=None, width=None, blocks=None, stem=None)
    found = read_start(str(tmp_path / "101.pth"), asked)
    assert (found["arch"], found["width"], found["blocks"]) == ("resnet50", 4, [3, 4, 23, 3])  # of no known width
    asked = dict(arch="resnet101", width=4, blocks=None, stem=None)
    assert read_start(str(tmp_path / "101.pth"), asked)["blocks"] == [3, 4, 23, 3]


@pytest.mark.parametrize(
    "words, message",
    [
        (
            "--init {tmp}/none.pth",
            "^--init: expected a file, or torchvision's weights for resnet50 .IMAGENET1K_V1, .*none",
        ),
        ("--init IMAGENET1K_V9 --arch resnet18", "^--init: .*weights for resnet18 .IMAGENET1K_V1.* got IMAGENET1K_V9"),
        ("--init IMAGENET1K_V1 --arch resnet50w2", "^--init: expected a file, or no weights of resnet50w2 by name"),
        ("--init {tmp}", "^--init: cannot read {tmp}: Is a directory"),
        ("--init {tmp}/half.pth", "^--init: cannot read {tmp}/half.pth: it is cut short, damaged"),
        ("--init {tmp}/other.pth", "^--init: expected the weights of a ResNet .* in {tmp}/other.pth"),
        ("--init {tmp}/nan.pth", "^--init: {tmp}/nan.pth holds weights that are nan or inf"),
        ("--init {tmp}/layer.pth", "^--init: {tmp}/layer.pth does not hold a whole ResNet: .*layer2.0.bn1.weight"),
        ("--init {start} --arch resnet34", "^--arch: .* of --init holds resnet18, got resnet34; leave the option out"),
        ("--init {start} --width 16", "^--width: .* of --init holds 8, got 16"),
        ("--init {start} --blocks 1 1 1 2", "^--blocks: .* of --init holds 1 1 1 1, got 1 1 1 2"),
        ("--init {start} --stem imagenet", "^--stem: .* of --init holds small, got imagenet"),
    ],
)
def test_a_wrong_start_is_refused_before_the_run(images, start, tmp_path, words, message):
    weights = {name: w for name, w in start[1]["state_dict"].items() if is_of_backbone(name)}
    (tmp_path / "half.pth").write_bytes(start[0].read_bytes()[:5000])
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    torch.save(weights | {"conv1.weight": weights["conv1.weight"] * torch.nan}, tmp_path / "nan.pth")
    torch.save({name: w for name, w in weights.items() if name != "layer2.0.bn1.weight"}, tmp_path / "layer.pth")
    words = words.format(tmp=tmp_path, start=start[0]).split()
    words += [*TINY[len(SHAPE) :], f"--data_path={images}", f"--dump_path={tmp_path / 'run'}"]
    with pytest.raises(UserError, match=message.format(tmp=tmp_path)) as error:
        train.main(train.parse_args(words))
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "run").glob("*.pth"))


def test_torchvisions_weights_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    weights = torchvision.models.get_model_weights("resnet18").IMAGENET1K_V1
    asked = dict(arch="resnet18", width=None, blocks=None, stem=None)

    def offline(self, **_):
        raise URLError("Name or service not known")

    with monkeypatch.context() as patch:
        patch.setattr(type(weights), "get_state_dict", offline)
        message = r"^--init: cannot download IMAGENET1K_V1 for resnet18 \(Name or service not known\); download http"
        with pytest.raises(UserError, match=message):
            read_start("IMAGENET1K_V1", asked)
    (tmp_path / "checkpoints").mkdir()  # as if it had been downloaded
    theirs = torchvision.models.resnet18()
    torch.save(theirs.state_dict(), tmp_path / "checkpoints" / weights.url.rpartition("/")[2])
    assert read_start("IMAGENET1K_V1", asked)["stem"] == "imagenet"
    assert "left over in the file: fc; new: projection head and prototypes" in capsys.readouterr().out
    model = SwAV("resnet18", 16, 8, 6)
    start_from(model, "IMAGENET1K_V1", "resnet18")
    assert_same({n: t for n, t in model.state_dict().items() if is_of_backbone(n)},
                {n: t for n, t in theirs.state_dict().items() if not n.startswith("fc")})  # fmt: skip


# The evaluation's row


def test_the_start_is_evaluated_beside_the_run_while_its_file_is_there(images, start, tmp_path):
    copy = tmp_path / "start.pth"
    copy.write_bytes(start[0].read_bytes())
    run = train_from(images, tmp_path / "run", copy, "--epochs", "1")
    trained = run["options"]
    backbone = start_backbone(trained)
    assert torch.equal(backbone.conv1.weight, start[1]["state_dict"]["conv1.weight"])
    words = [str(tmp_path / "run" / "checkpoint.pth"), "--cached", "--workers", "0", "--device", "cpu"]
    rows = eval_linear.main(eval_linear.parse_args(words))["rows"]
    row = rows[f"the start, {copy}"]
    alone = eval_linear.main(eval_linear.parse_args([str(copy), *words[1:], f"--data_path={images}"]))["rows"]
    assert row == alone["checkpoint"] and row != rows["checkpoint"]
    assert not any(name.startswith("the start") for name in alone)
    copy.write_bytes(copy.read_bytes() + b" ")
    assert start_backbone(trained) is None
    copy.unlink()
    assert start_backbone(trained) is None and start_backbone({}) is None


# Networks of timm


SIZES = "--size_crops", "64", "32"


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_efficientnet"])
def test_a_network_of_timm_trains_resumes_and_is_evaluated(images, tmp_path, name):
    timm = pytest.importorskip("timm")
    arch, dump = f"timm/{name}", tmp_path / "run"
    words = [*TINY[len(SHAPE) :], *SIZES, "--arch", arch, f"--data_path={images}", "--eval_every", "1"]
    train.main(train.parse_args([*words, "--dump_path", str(tmp_path / "whole"), "--epochs", "2"]))
    train.main(train.parse_args([*words, f"--dump_path={dump}", "--epochs", "1"]))
    at_first = torch.load(dump / "checkpoint.pth")
    train.main(train.parse_args([*words, f"--dump_path={dump}", "--epochs", "2"]))
    run, path = torch.load(dump / "checkpoint.pth"), dump / "checkpoint.pth"
    assert run["options"]["arch"] == arch
    names = {name.split(".")[0] for name in run["state_dict"]}
    assert names == {"backbone", "projection_head", "prototypes"}
    weights = {n.removeprefix("backbone."): t for n, t in run["state_dict"].items() if n.startswith("backbone.")}
    assert weights.keys() <= timm.create_model(name).state_dict().keys()
    assert any(not torch.equal(t, at_first["state_dict"][f"backbone.{n}"]) for n, t in weights.items())
    backbone, architecture, trained = backbones.load_backbone(path, None)
    assert architecture["arch"] == trained["arch"] == arch
    assert_same(dict(backbone.state_dict()), weights)
    x = torch.randn(2, 3, 64, 64)
    hub = hubconf.from_checkpoint(path)
    assert torch.equal(hub(x), backbone.eval()(x)) and not hub.training
    rows = eval_linear.main(eval_linear.parse_args([str(path), "--cached", "--workers", "0", "--device", "cpu"]))[
        "rows"
    ]
    has_batchnorm = name == "test_efficientnet"
    assert ("random init, BatchNorm of the training images" in rows) == has_batchnorm
    with pytest.raises(UserError, match=f"^--arch: .* holds a {arch}, got resnet18"):
        backbones.load_backbone(path, "resnet18")


def test_derived_crops_are_of_sizes_that_the_network_takes(images, capsys):
    pytest.importorskip("timm")
    args = train.parse_args(["--arch", "timm/test_vit", "--nmb_crops", "2", "2", f"--data_path={images}"])
    settings, reasons = train.resolve_options(args, train.open_images("folder", images, "pretrain"), world_size=1)
    assert settings["options"]["size_crops"] == [32, 16] and args.stem == "imagenet"
    args = train.parse_args(["--arch", "timm/test_convnext", "--nmb_crops", "2", "2", f"--data_path={images}"])
    settings, reasons = train.resolve_options(args, train.open_images("folder", images, "pretrain"), world_size=1)
    assert settings["options"]["size_crops"] == [32, 32]
    assert reasons["size_crops"].endswith(": the nearest to 32 16 that timm/test_convnext takes")


def test_a_network_of_timm_starts_from_its_weights(images, tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(3)
    theirs = timm.create_model("test_vit").state_dict()
    torch.save(theirs, tmp_path / "vit.pth")
    shape = ["--arch", "timm/test_vit", *SIZES]
    run = train_from(images, tmp_path / "run", tmp_path / "vit.pth", *STILL, shape=shape)
    learned = {n.removeprefix("backbone."): t for n, t in run["state_dict"].items() if n.startswith("backbone.")}
    theirs = {name: tensor for name, tensor in theirs.items() if not name.startswith("head.")}
    torch.testing.assert_close(learned, theirs, rtol=0, atol=1e-15)
    assert_same(dict(start_backbone(run["options"]).state_dict()), theirs)
    again = train_from(
        images, tmp_path / "again", tmp_path / "run" / "checkpoint.pth", *STILL, *SIZES
    )  # names its arch
    assert again["options"]["arch"] == "timm/test_vit"
    with pytest.raises(UserError, match="^--arch: .*checkpoint.pth .*holds timm/test_vit, got resnet18"):
        train_from(images, tmp_path / "other", tmp_path / "run" / "checkpoint.pth", shape=["--arch", "resnet18"])


@pytest.mark.parametrize(
    "words, message",
    [
        (
            "--arch timm/test_vit --size_crops 50 32",
            "^--size_crops: expected sizes that timm/test_vit takes, such as 48",
        ),
        ("--arch timm/test_convnext --size_crops 64 16", "^--size_crops: expected sizes that timm/test_convnext takes"),
        ("--arch timm/test_vit --width 8", "^--width 8: leave it out with --arch timm/test_vit"),
        ("--arch timm/test_vit --stem small --blocks 1 1 1 1", "^--blocks 1 1 1 1 --stem small: leave it out"),
        ("--arch timm/no_such_network", "--arch: timm .* has no no_such_network"),
        ("--arch resnext50_32x4d --width 8", "^--width: expected a multiple of 16 for resnext50_32x4d, got 8"),
    ],
)
def test_what_a_network_cannot_take_is_refused_before_the_run(images, tmp_path, words, message):
    if "timm" in words:
        pytest.importorskip("timm")
    words = [*TINY[len(SHAPE) :], "--stem", "imagenet", *words.split()]
    with pytest.raises(UserError, match=message):
        train.main(train.parse_args([*words, f"--data_path={images}", f"--dump_path={tmp_path / 'run'}"]))
    assert not list(tmp_path.glob("run/*.pth"))
