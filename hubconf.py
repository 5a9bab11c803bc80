"""torch.hub entry points: backbones, new or trained, from any folder.

    backbone = torch.hub.load("PATH/OF/THIS/FOLDER", "from_checkpoint", "runs/photos/checkpoint.pth", source="local")
    features = backbone(images)  # [B, 3, S, S], normalised as in data.py -> [B, F]
    backbone = torch.hub.load("OWNER/REPOSITORY", "resnet50")  # of a copy on GitHub; weights are random

They need only torch and model.py.
"""

import argparse
import importlib.util
import os
import re
import sys

import torch

# By its path, as the calling program may have a model.py of its own.
spec = importlib.util.spec_from_file_location("swav_model", os.path.join(os.path.dirname(__file__), "model.py"))
sys.modules["swav_model"] = model = importlib.util.module_from_spec(spec)
spec.loader.exec_module(model)

dependencies = ["torch"]
resnet18, resnet50 = model.resnet18, model.resnet50
resnet50w2, resnet50w4, resnet50w5 = model.resnet50w2, model.resnet50w4, model.resnet50w5


def from_checkpoint(path: str | os.PathLike) -> model.ResNet:
    """Load the backbone of a file, in evaluation mode: of train.py, a published SwAV one or torchvision's ResNet.

    Reads architecture and size off the weights. Raises ValueError with the file's name if torch.save did not write it,
    if it holds a class that could run code, or no whole ResNet; OSError if it cannot be opened.
    """
    contents = _load(path)
    try:
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
