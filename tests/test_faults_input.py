"""Bad input, given as users give it: each ends in one line that says what happened, with exit code 2."""

import argparse
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TINY

import checkpoint
import eval_linear
import hubconf
import train
from bench.__main__ import parse_args as parse_bench
from defaults import derive
from launch import UserError
from model import ResNet
from processes import run_script


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


class OfAnotherProgram:
    """A class that a checkpoint may hold, and that does no harm."""


# What loads a file: train.py resumes from it, eval_linear.py evaluates it, torch.hub gives it to other programs.


def resume_from(file: Path, images: Path) -> None:
    dump = file.parent / "run"
    dump.mkdir()
    shutil.copy(file, dump / "checkpoint.pth")
    train.main(train.parse_args([*TINY, f"--data_path={images}", f"--dump_path={dump}"]))


def evaluate(file: Path, images: Path) -> None:
    words = [str(file), "--cached", "--data_path", str(images), "--workers", "0", "--device", "cpu"]
    eval_linear.main(eval_linear.parse_args(words))


def load_by_hub(file: Path, images: Path) -> None:
    hubconf.from_checkpoint(file)


LOADERS = {"train.py": resume_from, "eval_linear.py": evaluate, "hubconf": load_by_hub}
every_loader = pytest.mark.parametrize("loader", LOADERS.values(), ids=LOADERS)
every_format = pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "legacy"])


def weights() -> dict[str, torch.Tensor]:
    return ResNet("resnet18", width=2, blocks=(1, 1, 1, 1), stem="small").state_dict()


@every_loader
@every_format
def test_a_pickle_bomb_is_refused_by_its_name_and_creates_nothing(as_zip, loader, images, tmp_path):
    boom, file = tmp_path / "boom", tmp_path / "bomb.pth"
    contents = {"state_dict": weights(), "epoch": 1, "options": {}, "more": Bomb(boom)}
    torch.save(contents, file, _use_new_zipfile_serialization=as_zip)
    with pytest.raises(ValueError) as error:
        loader(file, images)
    message = str(error.value)
    assert f"holds a {os.mkdir.__module__}.mkdir, which is refused, as loading it could run code" in message
    assert len(message.splitlines()) == 1 and ".pth" in message and not boom.exists()
    pickle.loads(pickle.dumps(Bomb(boom)))  # what it would have done
    assert boom.exists()


@pytest.mark.parametrize("name", ["train.py", "eval_linear.py"])
def test_a_pickle_bomb_ends_a_command_with_one_line(name, images, tmp_path, capsys):
    torch.save({"state_dict": Bomb(tmp_path / "boom")}, tmp_path / "bomb.pth")
    with pytest.raises(SystemExit) as end:
        run_script(lambda: LOADERS[name](tmp_path / "bomb.pth", images))
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and line.startswith("error: ") and ".mkdir, which is refused" in line
    assert not (tmp_path / "boom").exists()


@every_loader
@every_format
def test_other_classes_are_refused_also_inside_a_namespace(as_zip, loader, images, tmp_path):
    contents = {"state_dict": weights(), "args": argparse.Namespace(inner=OfAnotherProgram())}
    torch.save(contents, tmp_path / "c.pth", _use_new_zipfile_serialization=as_zip)
    with pytest.raises(ValueError, match="holds a test_faults_input.OfAnotherProgram, which is refused"):
        loader(tmp_path / "c.pth", images)


@every_format
def test_published_files_with_a_namespace_still_load(as_zip, images, tmp_path):
    wrapped = {f"module.{name}": weight for name, weight in weights().items()}
    contents = {"state_dict": wrapped, "epoch": 3, "args": argparse.Namespace(arch="resnet18", crops=[224, 96])}
    contents["options"] = argparse.Namespace(size_crops=[224])  # as another program may call them
    torch.save(contents, tmp_path / "c.pth.tar", _use_new_zipfile_serialization=as_zip)
    assert torch.equal(hubconf.from_checkpoint(tmp_path / "c.pth.tar").conv1.weight, wrapped["module.conv1.weight"])
    assert checkpoint.load(tmp_path / "c.pth.tar")["args"] == contents["args"]
    evaluate(tmp_path / "c.pth.tar", images)
    with pytest.raises(UserError, match="it is not a checkpoint of train.py"):
        resume_from(tmp_path / "c.pth.tar", images)


# Files that are no checkpoints

NOT_CHECKPOINTS: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.touch(),
    "text": lambda path: path.write_text("epoch 1, loss 3.2\n" * 30),
    "html": lambda path: path.write_text("<!DOCTYPE html><title>404 Not Found</title>"),
    "picture": lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100)),
    "zeros": lambda path: path.write_bytes(bytes(1000)),
    "pickle": lambda path: path.write_bytes(pickle.dumps({"state_dict": {}})),
    "cut": lambda path: path.write_bytes(path.with_name("whole").read_bytes()[:-2000]),
    "zeros_at_the_end": lambda path: path.write_bytes(path.with_name("whole").read_bytes()[:-2000] + bytes(2000)),
    "zip": lambda path: path.write_bytes(b"PK\x05\x06" + bytes(18)),
    "list": lambda path: torch.save([1, 2], path),
    "number": lambda path: torch.save(3.0, path),
    "tensor": lambda path: torch.save(torch.zeros(3), path),
}


@every_loader
@pytest.mark.parametrize("kind", NOT_CHECKPOINTS)
def test_files_that_are_no_checkpoints_are_named(kind, loader, images, tmp_path, recwarn):
    torch.save({"state_dict": weights(), "epoch": 1, "options": {}}, tmp_path / "whole")
    NOT_CHECKPOINTS[kind](tmp_path / "file.pth")
    with pytest.raises(ValueError) as error:
        loader(tmp_path / "file.pth", images)
    message = str(error.value)
    assert len(message.splitlines()) == 1 and ".pth" in message and "weights_only" not in message


@pytest.mark.parametrize(
    "name, reason", [("none.pth", "No such file"), ("folder", "Is a directory"), ("x" * 300, "File name too long")]
)
def test_files_that_cannot_be_opened_are_named_with_the_reason(name, reason, images, tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=f"^checkpoint: cannot read .*{name[:20]}.*: {reason}"):
        evaluate(tmp_path / name, images)
    with pytest.raises(OSError, match=reason):
        load_by_hub(tmp_path / name, images)


def test_a_checkpoint_without_permission_is_named(images, tmp_path):
    """Root reads everything, so a child of another user id tries."""
    torch.save({"state_dict": weights()}, tmp_path / "c.pth")
    (tmp_path / "c.pth").chmod(0)
    for folder in (tmp_path, *tmp_path.parents[:3]):  # that other users may look into
        folder.chmod(0o755)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if os.getuid() == 0:
                os.setuid(65534)
            checkpoint.load(tmp_path / "c.pth")
        except UserError as error:
            code = 0 if "c.pth: Permission denied" in str(error) else 1
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# Values of options. {tmp}: a folder with `file`, a text file. All are refused before any work.

BIG = "99999999999999999999999"
LONG = "9" * 5000
TRAIN = [
    ("--seed -1", "--seed: expected a whole number from 0, got -1"),
    (f"--seed {BIG}", f"--seed: expected a whole number from 0 to 2147483647, got {BIG}"),
    (f"--seed {LONG}", r"--seed: .* got 9{50}\.\.\. \(5000 characters\)"),
    ("--seed=", "--seed: expected a whole number from 0, got "),
    ("--seed 0x1F", "--seed: expected a whole number from 0, got 0x1F"),
    ("--epochs 1e3", "--epochs: expected a whole number from 1, got 1e3"),
    (f"--epochs {BIG}", "--epochs: expected a whole number from 1 to 10000000, got 9999"),
    ("--epochs 10000001", "--epochs: expected a whole number from 1 to 10000000, got 10000001"),
    ("--workers 1025", "--workers: expected a whole number from 0 to 1024, got 1025"),
    ("--epochs 0", "--epochs: expected a whole number from 1, got 0"),
    (f"--queue_length {BIG}", "--queue_length: expected a whole number from 0 to 2147483647"),
    ("--width 100000000", "--width, --blocks, --queue_length: expected smaller ones; torch says: .* overflow"),
    ("--base_lr inf", "--base_lr: expected a number from 1.1755e-38 to 3.402823466e"),
    ("--base_lr nan", "--base_lr: expected a number above 0, got nan"),
    ("--wd -0.1", "--wd: expected a number from 0, got -0.1"),
    ("--epsilon 1e-300", "--epsilon: expected a number from 1.1755e-38"),
    ("--temperature 1e300", "--temperature: expected a number from 1.1755e-38"),
    ("--hflip nan", "--hflip: expected a number from 0, got nan"),
    ("--size_crops 1 9", "--size_crops: expected 7 pixels or more each"),
    ("--crops_for_assign 0 0", "--crops_for_assign: expected each crop once"),
    ("--crops_for_assign 0 999", "--crops_for_assign: expected crops of 0..2"),
    ("--nmb_crops", "--nmb_crops: expected at least one argument"),
    ("--device tpu", "--device: invalid choice: 'tpu'"),
    ("--workers=", "--workers: expected a whole number from 0, got "),
    ("stray", "unrecognized arguments: stray"),
    ("--", "unrecognized arguments: --"),
    ("@{tmp}", "Is a directory"),
    ("--data_path=", "--data_path: expected a folder, .* got none"),
    ("--data_path {tmp}/file", "--data_path: expected a folder, .* got .*file"),
    ("--data_path a\0b", "--data_path: expected a folder, .* got a\0b"),
    ("--dump_path=", "--dump_path: expected a folder, got '': it is empty"),
    ("--dump_path a\0b", "--dump_path: expected a folder, got 'a.x00b': .* a zero byte"),
    (f"--dump_path {'d' * 300}", "--dump_path: expected a folder, got 'ddd.*': File name too long"),
    ("--dump_path {tmp}/file", "--dump_path: expected a folder that can be written"),
    ("--dump_path {tmp}/file/run", "--dump_path: expected a folder that can be written"),
]
EVALUATE = [
    ("--checkpoint x", "unrecognized arguments: --checkpoint"),
    ("--knn_k 0", "--knn_k: expected a whole number from 1, got 0"),
    ("--knn_temperature 1e-300", "--knn_temperature: expected a number from 1.1755e-38"),
    ("--lr nan", "--lr: expected a number above 0, got nan"),
    ("--batch_size 0", "--batch_size: expected a whole number from 1, got 0"),
    (f"--batch_size {BIG}", "--batch_size: expected a whole number from 1 to 2147483647"),
    ("--seed -1", "--seed: expected a whole number from 0, got -1"),
    ("--epochs 10000001", "--epochs: expected a whole number from 1 to 10000000, got 10000001"),
    ("--workers 1025", "--workers: expected a whole number from 0 to 1024, got 1025"),
    ("--dataset imagenet", "--dataset: invalid choice: 'imagenet'"),
    ("--data_path=", "--data_path: expected a folder, a .tar file or a .txt list of paths, got "),
    ("--data_path {tmp}/file", "--data_path: expected a folder, a .tar file or a .txt list of paths, got .*file"),
    ("--data_path a\0b", "--data_path: expected a folder, a .tar file or a .txt list of paths, got a\0b"),
    ("--pretrained=", "checkpoint: expected a file, got an empty name"),
    ("a b", "unrecognized arguments: b"),
]
BENCH = [
    ("loss --repetitions x", "--repetitions: invalid int value: 'x'"),
    (f"loss --batch_size {BIG}", "--batch_size: expected 2147483647 or less"),
    (f"loss --threads {BIG}", "--threads: expected 2147483647 or less"),
    ("loss --json=", "--json: expected a place that can be written, got ."),
    ("loss --json {tmp}", "--json: expected a place that can be written, got "),
    ("loss --json {tmp}/file/b.json", "--json: expected a place that can be written, got .*b.json"),
    ("collapse --dump_path {tmp}/file", "--dump_path: expected a place that can be written, got .*file"),
    ("loss --device=", "--device : expected a device of this machine"),
    ("soak --minutes 0", "--minutes: expected a number above 0, got 0"),
    ("soak --minutes nan", "--minutes: expected a number above 0, got nan"),
]


def check_train(words: list[str]) -> None:
    args = train.parse_args([*TINY, *words])
    train.check_args(args)
    given = {name: value for name, value in vars(args).items() if value is not None}
    for name, (value, _) in derive(images=10, image_side=20, world_size=1, epochs=4, given=given).items():
        setattr(args, name, value)
    train.check_args(args)


def check_evaluation(words: list[str]) -> None:
    eval_linear.check_args(eval_linear.parse_args(words))


CHECKS = {check_train: TRAIN, check_evaluation: EVALUATE, parse_bench: BENCH}


@pytest.mark.parametrize("check, words, message", [(check, *row) for check, rows in CHECKS.items() for row in rows])
def test_bad_values_are_refused_by_the_options_name(check, words, message, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("text\n")
    monkeypatch.chdir(tmp_path)
    given = words.format(tmp=tmp_path).split(" ")
    if check is check_train and not any(word.startswith("--data_path") for word in given):
        given = [f"--data_path={tmp_path}", *given]
    with pytest.raises(UserError, match=message) as error:
        check(given)
    assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 1000
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
