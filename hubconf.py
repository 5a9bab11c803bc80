"""torch.hub entry points: backbones, new or trained, from any folder.

    backbone = torch.hub.load("PATH/OF/THIS/FOLDER", "from_checkpoint", "runs/swav/checkpoint.pth", source="local")
    features = backbone(images)  # [B, 3, S, S], normalised as in data.py -> [B, F]
    backbone = torch.hub.load("OWNER/REPOSITORY", "resnet50")  # of a copy on GitHub; weights are random

They need torch and model.py alone.
"""

import os

import torch

import model
from model import resnet18, resnet50, resnet50w2, resnet50w4, resnet50w5  # noqa: F401 (entry points)

dependencies = ["torch"]


def from_checkpoint(path: str | os.PathLike) -> model.ResNet:
    """The backbone in a file, in evaluation mode: of train.py, a published SwAV one or torchvision's ResNet.

    Architecture and size are read off the weights. Raises ValueError where the file holds no ResNet.
    """
    weights = model.backbone_weights(torch.load(path, map_location="cpu", weights_only=True))
    backbone = model.ResNet(**model.architecture_of(weights))
    backbone.load_state_dict(weights)
    return backbone.eval()
