"""Backbones from files: load one without knowing its architecture, and the image size to evaluate it at.

    backbone, architecture, trained = load_backbone("runs/photos/checkpoint.pth")
    size, resize = choose_sizes(trained, typical_side(images), is_folder=True)

Evaluation, export and pictures of a run use it.
"""

from collections.abc import Mapping
from pathlib import Path

import checkpoint
from launch import UserError, user_errors
from model import ResNet, architecture_of, backbone_weights

LARGER = 1.4  # images of up to this many times the crops keep their size: derived crops are 3/4 of small images


def load_backbone(path: Path, arch: str | None) -> tuple[ResNet, dict, dict]:
    """Load the backbone of a checkpoint: (backbone, arguments of ResNet, options of its training, {} if unknown).

    The options include value_range, of data.to_pixels, where training had one.

    arch: the architecture it must have; None for any. Raises UserError if it is not a whole ResNet, or holds NaN.
    """
    contents = checkpoint.load(path)
    with user_errors(f"{path}: "):
        weights = backbone_weights(contents)
        architecture = architecture_of(weights)
    if arch not in (None, architecture["arch"]):
        raise UserError(f"--arch: {path} holds a {architecture['arch']}, got {arch}")
    with user_errors(f"checkpoint: {path} holds no whole ResNet: "):
        backbone = ResNet(**architecture)
    try:
        backbone.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"checkpoint: {path} does not hold a whole ResNet: {error}".replace("\n", " ")) from None
    if not all(tensor.isfinite().all() for tensor in weights.values()):
        raise UserError(f"checkpoint: {path} holds weights that are nan or inf")
    options, value_range = contents.get("options"), contents.get("value_range")
    is_ours = isinstance(options, dict)  # other programs save other things
    return backbone, architecture, {**options, "value_range": value_range} if is_ours else {}


def choose_sizes(
    trained: Mapping, side: int, *, is_folder: bool, size: int | None = None, resize: int | None = None
) -> tuple[int, int]:
    """(size, resize) for data.CentreCrop, in pixels, of images that a backbone evaluates. Raises UserError.

    trained: options of its training, from `load_backbone`. side: the images' typical shorter side. is_folder: whether
    they are files. size, resize: what the user set.

    By default images keep their own size, and none are smaller than the training's crops. Images of a folder are
    shrunk to the training's crops (224 pixels if unknown) and cropped, as in the paper, if they are larger than LARGER
    times these, or than 224 pixels and the crops.
    """
    crop = max(trained.get("size_crops", [224 if is_folder else 0]))
    is_cropped = is_folder and side > min(LARGER * crop, max(224, crop))
    size = size or (crop if is_cropped else max(side, crop))
    is_cropped = is_folder and side > size
    resize = resize or (round(size * 8 / 7) if is_cropped else size)
    if resize < size:
        raise UserError(f"--resize: expected at least the {size} pixels of --size, got {resize}")
    return size, resize
