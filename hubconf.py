"""torch.hub entry points: backbones, new or trained, from any folder.

    backbone = torch.hub.load("PATH/OF/THIS/FOLDER", "from_checkpoint", "runs/swav/checkpoint.pth", source="local")
    features = backbone(images)  # [B, 3, S, S], normalised as in data.py -> [B, F]
    backbone = torch.hub.load("OWNER/REPOSITORY", "resnet50")  # of a copy on GitHub; weights are random

They need only torch and model.py.
"""

import importlib.util
import os
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

    Reads architecture and size off the weights. Raises ValueError if they are not those of a ResNet.
    """
    weights = model.backbone_weights(torch.load(path, map_location="cpu", weights_only=True))
    backbone = model.ResNet(**model.architecture_of(weights))
    backbone.load_state_dict(weights)
    return backbone.eval()
