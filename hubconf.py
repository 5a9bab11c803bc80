"""torch.hub entry points: backbones and the whole model, new or trained, from any folder.

    backbone = torch.hub.load("PATH/OF/THIS/FOLDER", "from_checkpoint", "runs/photos/checkpoint.pth", source="local")
    features = backbone(backbone.preprocess(pil_image)[None])  # [1, F]
    swav = torch.hub.load("PATH/OF/THIS/FOLDER", "swav", "runs/photos/checkpoint.pth", source="local")
    embeddings, scores = swav([swav.preprocess(pil_image)[None]])  # [1, D], [1, K]
    backbone = torch.hub.load("OWNER/REPOSITORY", "resnet50")  # of a copy on GitHub; weights are random

They need only torch, torchvision, model.py, foreign.py and data.py, and timm for a run of
train.py --arch timm/NAME. What they return can be pickled, copied and sent to other
processes; torch.fx can trace the backbones (torchvision.models.feature_extraction).
"""

import argparse
import copyreg
import functools
import importlib.util
import os
import re
import sys
import types

import torch
from torch import nn

_FOLDER = os.path.dirname(os.path.abspath(__file__))


def _import(file: str) -> types.ModuleType:
    """Import a file of this folder by its path, as the calling program may have a model.py of its own.

    Once: each torch.hub.load runs this file anew, and pickle compares classes.
    """
    name, path = f"swav_{file.removesuffix('.py')}", os.path.join(_FOLDER, file)
    loaded = sys.modules.get(name)
    if loaded is None or loaded.__file__ != path:
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
    return loaded


model, foreign, data = _import("model.py"), _import("foreign.py"), _import("data.py")

dependencies = ["torch", "torchvision"]
globals().update({name: functools.partial(model.ResNet, name) for name in model.ARCHS})  # with random weights


# Pickle cannot import "swav_model" in another process, where torch.hub has not loaded it. So objects of our classes are
# pickled as a call of torch.hub.load, which does load it, and their contents.


def _new(file: str, class_name: str) -> object:
    """Make an empty object of a class of ours, for pickle to fill."""
    kind = getattr(_import(file), class_name)
    return kind.__new__(kind)


def _reduced(thing: object) -> tuple:
    load = functools.partial(torch.hub.load, _FOLDER, "_new", source="local")
    file = type(thing).__module__.removeprefix("swav_") + ".py"
    return load, (file, type(thing).__name__), thing.__dict__


for _class in (*vars(model).values(), data.CentreCrop):
    if isinstance(_class, type) and _class.__module__.startswith("swav_"):
        copyreg.pickle(_class, _reduced)


def from_checkpoint(path: str | os.PathLike, size: int | None = None, resize: int | None = None) -> nn.Module:
    """Load the backbone of a file, in evaluation mode: of train.py, a published SwAV one or torchvision's ResNet.

    Reads architecture and size off the weights. backbone.preprocess maps a PIL image or uint8 [3, H, W] to what the
    weights expect, float32 [3, size, size]: as in the evaluation of the run, else 224 pixels, from a shorter side of
    `resize`, 256. Raises ValueError with the file's name if torch.save did not write it, if it holds a class that could
    run code, or no whole ResNet; OSError if it cannot be opened.
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
    backbone.preprocess = data.expected_crop(contents, size, resize)
    return backbone.eval()


def swav(
    path: str | os.PathLike | None = None, size: int | None = None, resize: int | None = None, **arguments: object
) -> model.SwAV:
    """Load the whole model of a file, of train.py or a published SwAV one, in evaluation mode; without path: a new one.

    swav([images]) -> embeddings [B, D] of unit length, scores [B, K], for images [B, 3, S, S]. path, size and resize
    are those of `from_checkpoint`, as are preprocess and errors. arguments: of model.SwAV, for a new one.
    """
    if path is None:
        return model.SwAV(**arguments)
    if arguments:
        raise ValueError(f"swav: expected no {', '.join(arguments)} beside a file, which has its own architecture")
    contents = _load(path)
    try:
        weights = model.backbone_weights(contents)
        head, sizes = model.head_weights(contents)
        whole = model.SwAV(**model.architecture_of(weights), **sizes)
        whole.load_state_dict(weights | head)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{os.fspath(path)} holds no whole SwAV model: {error}".replace("\n", " ")) from None
    whole.preprocess = data.expected_crop(contents, size, resize)
    return whole.eval()


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
