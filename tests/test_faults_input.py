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
from launch import UserError, run_script
from model import ResNet


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
