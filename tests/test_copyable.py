"""Each piece that one may lift out is copied alone to an empty folder, imported there in a fresh process, and used."""

import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

HOUSE = Path(__file__).resolve().parent.parent
OURS = {path.stem for path in HOUSE.glob("*.py")} | {"sinkhorn_ext"}

# What is copied, whether it says that torch alone is needed, and a use of it.
PIECES = {
    "data": (
        ["data.py"],
        False,
        """
        from data import MultiCrop, draw_shape, ImageArrays, training_loader
        pixels, labels = zip(*(draw_shape("train", index) for index in range(4)))
        transform = MultiCrop([32, 16], [2, 1], [0.3, 0.1], [1.0, 0.3])
        loader = training_loader(ImageArrays(pixels, labels), transform, batch_size=2)
        crops, _ = next(iter(loader))
        assert [tuple(crop.shape) for crop in crops] == [(2, 3, 32, 32)] * 2 + [(2, 3, 16, 16)]
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
        assert not guard.is_collapsing(row, share_done=0.5, step=500)
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
    copied, needs_torch_alone, use = PIECES[piece]
    for name in copied:
        if (HOUSE / name).is_dir():
            shutil.copytree(HOUSE / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(HOUSE / name, tmp_path)
    program = [
        "import os, sys",
        "sys.path.insert(0, os.getcwd())",
        textwrap.dedent(use),
        f"loaded = {{name: sys.modules[name] for name in {sorted(OURS)} if name in sys.modules}}",
        f"assert sorted(loaded) == {sorted(Path(name).stem for name in copied)}, sorted(loaded)",
        "assert all(module.__file__.startswith(os.getcwd()) for module in loaded.values()), loaded",
        f"assert not ({needs_torch_alone} and 'torchvision' in sys.modules)",
    ]
    # -I: neither the environment nor the folder of the tests adds to the path.
    command = [sys.executable, "-I", "-c", "\n".join(program)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
