"""torch.hub entry points: backbones, new or trained, from any folder.

    backbone = torch.hub.load("PATH/OF/THIS/FOLDER", "from_checkpoint", "runs/photos/checkpoint.pth", source="local")
    features = backbone(images)  # [B, 3, S, S], normalised as in data.py -> [B, F]
    backbone = torch.hub.load("OWNER/REPOSITORY", "resnet50")  # of a copy on GitHub; weights are random

They need only torch, model.py and foreign.py; and timm for a run of train.py --arch timm/NAME.
"""

import argparse
import importlib.util
import os
import re
import sys
import types
from functools import partial as _partial

import torch
from torch import nn


def _import(file: str) -> types.ModuleType:
    """Import a file by its path, as the calling program may have one of this name."""
    path = os.path.join(os.path.dirname(__file__), file)
    spec = importlib.util.spec_from_file_location(f"swav_{file.removesuffix('.py')}", path)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


model, foreign = _import("model.py"), _import("foreign.py")

dependencies = ["torch"]
globals().update({name: _partial(model.ResNet, name) for name in model.ARCHS})  # each of them, with random weights


def from_checkpoint(path: str | os.PathLike) -> nn.Module:
    """Load the backbone of a file, in evaluation mode: of train.py, a published SwAV one or torchvision's ResNet.

    Reads architecture and size off the weights. Raises ValueError with the file's name if torch.save did not write it,
    if it holds a class that could run code, or no whole ResNet; OSError if it cannot be opened.
    """
    contents = _load(path)
    options = contents.get("options") if isinstance(contents, dict) else None
    arch = options.get("arch") if isinstance(options, dict) else None
    try:
        if isinstance(arch, str) and arch.startswith(foreign.TIMM):
            backbone = foreign.timm_network(arch, options["size_crops"])
            weights = foreign.find_backbone(contents, list(backbone.state_dict())).weights
        else:
            weights = model.backbone_weights(contents)
            backbone = model.ResNet(**model.architecture_of(weights))
        backbone.load_state_dict(weights)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{os.fspath(path)} holds no whole ResNet: {error}".replace("\n", " ")) from None
    return backbone.eval()


def _load(path: str | os.PathLike) -> object:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # which many programs save beside their weights
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever unpickling runs into; its advice is to run all code
        if isinstance(error, OSError) and error.filename:  # it cannot be opened
            raise
        refused = re.search(r"(?i)unsupported (?:global: )?(?:global|class) ([\w.]+)", str(error))
        reason = "is cut short, damaged, or not a file that torch.save wrote"
        if refused:
            reason = f"holds a {refused[1]}, which is refused, as loading it could run code; save the weights alone"
        raise ValueError(f"{os.fspath(path)} {reason}") from None
