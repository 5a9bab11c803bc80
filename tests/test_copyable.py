"""Files that people may copy work by themselves, top-level files import only what lies below, functions stay short.

Each piece is copied to an empty folder, imported there in a fresh process, and used.
"""

import ast
import shutil
import textwrap
from pathlib import Path

import pytest
from conftest import forked

ROOT = Path(__file__).resolve().parent.parent
FILES = {path.stem: path for path in ROOT.glob("*.py")}
OURS = FILES.keys() | {"sinkhorn_ext", "bench"}

# name: (what is copied, whether it needs only torch, a program that uses it)
PIECES = {
    "data": (
        ["data.py"],
        False,
        """
        import torch
        from data import MultiCrop, crops_to_device, start_epoch, training_loader
        class RandomImages(torch.utils.data.Dataset):
            def __len__(self):
                return 4
            def __getitem__(self, index):
                return torch.randint(256, (3, 40, 50), dtype=torch.uint8), index
        transform = MultiCrop([32, 16], [2, 1], [0.3, 0.1], [1.0, 0.3])
        for crop_only in (False, True):
            loader = training_loader(RandomImages(), transform, batch_size=2, crop_only=crop_only)
            batch, labels = next(start_epoch(loader, 0))
            crops = crops_to_device(batch, torch.device("cpu"))
            assert [tuple(crop.shape) for crop in crops] == [(2, 3, 32, 32)] * 2 + [(2, 3, 16, 16)]
            assert all(crop.dtype == torch.float32 for crop in crops) and len(labels) == 2
        """,
    ),
    "decode": (
        ["decode.py", "data.py"],
        False,
        """
        import numpy as np
        from PIL import Image
        from decode import UnreadableImage, image_size, read_image
        Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save("a.png")
        assert read_image("a.png").shape == (3, 20, 30) and image_size("a.png") == (30, 20)
        try:
            read_image("none.png")
        except UnreadableImage as error:
            assert error.reason == "No such file or directory"
        """,
    ),
    "shapes": (
        ["shapes.py"],
        True,
        """
        from shapes import SHAPES_CLASSES, draw_shape
        pixels, label = draw_shape("val", 3)
        assert pixels.shape == (64, 64, 3) and SHAPES_CLASSES[label] == "rings"
        """,
    ),
    "model": (
        ["model.py"],
        True,
        """
        import torch
        from model import ResNet, SwAV, architecture_of, backbone_weights
        model = SwAV("resnet18", hidden_mlp=8, feat_dim=4, nmb_prototypes=6, width=4, blocks=(1, 1, 1, 1), stem="small")
        model.normalize_prototypes()
        embeddings, scores = model([torch.randn(2, 3, 16, 16), torch.randn(2, 3, 8, 8)])
        scores.sum().backward()
        assert embeddings.shape == (4, 4) and scores.shape == (4, 6)
        weights = backbone_weights(model.state_dict())
        ResNet(**architecture_of(weights)).load_state_dict(weights)
        """,
    ),
    "foreign": (
        ["foreign.py"],
        True,
        """
        import torch
        from foreign import find_backbone
        names = ["conv1.weight", "layer4.0.conv1.weight"]
        weights = {f"module.encoder_q.{name}": torch.zeros(4, 3, 3, 3) for name in names}
        found = find_backbone({"state_dict": weights | {"module.queue": torch.zeros(2)}})
        assert list(found.weights) == names and found.left_over == ["queue"]
        """,
    ),
    "launch": (
        ["launch.py"],
        True,
        """
        from launch import OptionParser, UserError, log, positive_int, user_errors
        parser = OptionParser(prog="my_script.py", description="Count.")
        parser.add("epochs", 10, positive_int, "Train for this many epochs.", common="N")
        log(f"{parser.parse_args(['--epochs', '3']).epochs} epochs")
        for words in (["--epochs", "0"], ["--epoch", "1"]):
            try:
                parser.parse_args(words)
            except UserError as error:
                assert "--epoch" in str(error)
            else:
                raise AssertionError(words)
        """,
    ),
    "machine": (
        ["machine.py", "launch.py"],
        True,
        """
        import torch
        from machine import choose_device, choose_precision, set_threads_and_workers, workers_that_fit
        device = choose_device("cpu")
        assert workers_that_fit(set_threads_and_workers(0, device), batch_bytes=2**20) == 0
        assert choose_precision("fp32", device) == torch.float32
        """,
    ),
    "processes": (
        ["processes.py", "launch.py"],
        True,
        """
        import torch
        from launch import OptionParser, UserError, log, positive_int
        from processes import check_same, leave_processes, run_script, setup_processes, share
        parser = OptionParser(prog="my_script.py", description="Count.")
        parser.add("epochs", 10, positive_int, "Train for this many epochs.", common="N")
        def main(args):
            log(f"{args.epochs} epochs, rank and world size {setup_processes(torch.device('cpu'))}")
            check_same("comparing options", vars(args))
            assert share("counting", lambda: [1, 2]) == [1, 2]
            leave_processes()
        run_script(lambda: main(parser.parse_args(["--epochs", "3"])))
        try:
            run_script(lambda: main(parser.parse_args(["--epochs", "0"])))
        except SystemExit as leave:
            assert leave.code == 2
        else:
            raise AssertionError("no epochs")
        """,
    ),
    "defaults": (
        ["defaults.py"],
        False,
        """
        from defaults import derive
        assert derive(images=1400, image_side=32, world_size=1, epochs=30, given={})["base_lr"][0] > 0
        """,
    ),
    "guard": (
        ["guard.py"],
        True,
        """
        import torch
        from guard import CollapseGuard
        guard = CollapseGuard(6)
        guard.count(torch.randn(2, 4, 6))
        row = guard.measure(1.5, torch.randn(2, 4, 6), torch.randn(4, 3))
        assert not guard.update(row, share_done=0.5, step=500)
        row = guard.watch(1.5, torch.randn(2, 4, 6), torch.randn(4, 3), share_done=0.6, step=600)
        assert row["collapsing"] is False
        """,
    ),
    "optim": (
        ["optim.py"],
        True,
        """
        import torch
        from optim import LARS, warmup_cosine
        weight = torch.ones(3, requires_grad=True)
        optimizer = LARS([weight], lr=0.0, weight_decay=1e-6)
        for lr in warmup_cosine(2, 3, base_lr=0.6, final_lr=0.0006, warmup_epochs=1):
            optimizer.param_groups[0]["lr"] = lr
            weight.grad = weight.detach().clone()
            optimizer.step()
        assert (weight < 1).all()
        """,
    ),
    "sinkhorn_ext": (
        ["sinkhorn_ext"],
        True,
        """
        import torch
        from sinkhorn_ext import backend, sinkhorn, sinkhorn_potentials, swav_loss
        scores = torch.randn(3, 8, 5, requires_grad=True)
        codes = sinkhorn(scores[0], epsilon=0.05, iterations=3)
        assert torch.allclose(codes.sum(dim=1), torch.ones(8)) and backend("cpu")
        swav_loss(scores, sinkhorn_potentials(scores[:2], 0.05, 3)).backward()
        assert scores.grad.abs().sum() > 0
        """,
    ),
    "loss": (
        ["loss.py", "sinkhorn_ext"],
        True,
        """
        import torch
        from loss import SwAVLoss
        prototypes = torch.nn.functional.normalize(torch.randn(5, 4), dim=1)
        swav_loss = SwAVLoss(nmb_crops=3, queue_length=4, feat_dim=4)
        swav_loss.start_queue()
        for _ in range(3):
            embeddings = torch.nn.functional.normalize(torch.randn(6, 4), dim=1).requires_grad_()
            swav_loss(embeddings, embeddings @ prototypes.T, prototypes).backward()
        assert embeddings.grad.abs().sum() > 0
        """,
    ),
}


@pytest.mark.parametrize("piece", PIECES)
def test_a_piece_copied_alone_works(tmp_path, piece):
    copied, needs_only_torch, use = PIECES[piece]
    for name in copied:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, tmp_path)
    program = [
        "import os, sys",
        f"hidden = ['torchvision', *(name for name in sys.modules if 'torchvision' in name)] * {needs_only_torch}",
        "sys.modules |= dict.fromkeys(hidden)  # to import them is an error",
        textwrap.dedent(use),
        f"loaded = {{name: sys.modules[name] for name in {sorted(OURS)} if name in sys.modules}}",
        f"assert sorted(loaded) == {sorted(Path(name).stem for name in copied)}, sorted(loaded)",
        "assert all(module.__file__.startswith(os.getcwd()) for module in loaded.values()), loaded",
    ]
    result = forked("-c", "\n".join(program), folder=tmp_path)
    assert result.returncode == 0, result.stderr


def test_multi_crop_is_in_data():
    from data import MultiCrop  # people's programs import it by this name

    assert MultiCrop.__module__ == "data"


# Imports between the top-level files: arrows point down, from scripts to files that import nothing of ours


SCRIPTS = {"train", "eval_linear", "export", "look"}  # all but other scripts
ALLOWED = {
    **dict.fromkeys(("data", "model", "optim", "guard", "defaults", "launch", "setup", "shapes", "foreign"), set()),
    "loss": {"sinkhorn_ext"},
    "machine": {"launch"},
    "processes": {"launch"},
    "checkpoint": {"defaults", "launch", "processes"},
    "run_log": {"launch", "processes"},
    "run_folder": {"launch"},
    "decode": {"data"},
    "tars": {"decode", "launch"},
    "sources": {"decode", "launch", "tars"},
    "labels": {"launch"},
    "images": {"data", "decode", "labels", "launch", "machine", "processes", "shapes", "sources"},
    "cache": {"data", "decode", "images", "launch", "machine", "processes"},
    "features": {"data", "launch"},
    "monitor": {"data", "features", "labels", "launch"},
    "probes": {"checkpoint", "data", "features", "launch", "model"},
    "backbones": {"checkpoint", "data", "foreign", "launch", "model"},
    "exchange": {"checkpoint", "data", "launch", "model"},
    "page": set(),
    "sections": {"data", "decode", "features", "guard", "launch", "page", "run_folder", "run_log"},
    "options": {
        "backbones",
        "checkpoint",
        "data",
        "defaults",
        "features",
        "images",
        "launch",
        "loss",
        "machine",
        "model",
    },
    "replay": {"checkpoint", "data", "images", "launch", "machine", "options"},
    "hubconf": set(),  # loads model.py, foreign.py and data.py by their paths
}


def imported_by(path: Path) -> set[str]:
    """Our modules that a file imports anywhere, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or ""))
    return {name.partition(".")[0] for name in names} & OURS


@pytest.mark.parametrize("name", FILES)
def test_a_file_imports_only_what_it_may(name):
    allowed = OURS - SCRIPTS - {"hubconf", "setup", "bench"} if name in SCRIPTS else ALLOWED[name]
    assert imported_by(FILES[name]) <= allowed


def test_hubconf_loads_only_model_foreign_and_data():
    source = FILES["hubconf"].read_text()
    loaded = {node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)}
    assert {name for name in OURS if f"{name}.py" in loaded} == {"model", "foreign", "data"}


def test_sinkhorn_ext_imports_nothing_of_ours():
    for path in (ROOT / "sinkhorn_ext").glob("*.py"):
        assert imported_by(path) <= {"sinkhorn_ext"}, path


# Length of functions


LONG_FUNCTIONS = {("train", "train"), ("options", "option_parser")}  # 100 to 120 lines; all others up to 100


@pytest.mark.parametrize("name", FILES)
def test_no_function_is_too_long(name):
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            most = 120 if (name, node.name) in LONG_FUNCTIONS else 100
            assert length <= most, f"{name}.{node.name} has {length} lines, of at most {most}"
