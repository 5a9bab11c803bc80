"""Weights and networks in the forms of other programs: torchvision's, timm's and published names, ONNX, torch.export.

    weights = rename_weights(backbone, architecture, "timm", contents)    # for timm.create_model(..., num_classes=0)
    difference = write_onnx(backbone, Path("resnet50.onnx"), expected_crop(contents))

Each file says in itself which preprocessing its weights expect (`preprocessing`). timm, safetensors and ONNX are
optional: an error names what is missing.
"""

import json
from collections import OrderedDict
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch
import torchvision
from torch import nn

import checkpoint
from data import MEAN, STD, CentreCrop
from launch import RunStopped, UserError, user_errors
from model import ResNet, SwAV, head_weights

NAMINGS = ("torchvision", "timm", "swav")
TOLERANCE = 1e-4  # of the largest feature: by this an exported network may differ from ours
LARGEST_ONNX = 2**31  # bytes; a protobuf file can hold no more


def need(package: str, *more: str) -> ModuleType:
    """Import an optional package, and check that `more` are installed too. Raises UserError with the pip command."""
    for name in (package, *more):
        try:
            import_module(name)
        except ImportError as error:
            names = " ".join(name.partition(".")[0] for name in (package, *more))
            raise UserError(f"this needs {name}, which cannot be imported ({error}); pip install {names}") from None
    return import_module(package)


# Preprocessing


def preprocessing(crop: CentreCrop) -> dict:
    """What a transform does, as plain values that a program can read from the file of an export."""
    return {
        "resize": crop.resize,
        "size": crop.size,
        "interpolation": "bilinear with antialias",
        "mean": list(MEAN),
        "std": list(STD),
        "value_range": crop.value_range and list(crop.value_range),
        "input": f"float32 [N, 3, {crop.size}, {crop.size}], RGB, (value / 255 - mean) / std",
    }


def describe_preprocessing(crop: CentreCrop) -> str:
    """The same as one line for people."""
    low, high = crop.value_range or (0, 0)
    first = f"16-bit values from {low:g} to {high:g} scaled to 0 to 255, " if crop.value_range else ""
    return (
        f"{first}shorter side resized to {crop.resize} pixels (bilinear with antialias), centre crop of {crop.size}, "
        f"RGB / 255, minus {', '.join(map(str, MEAN))}, divided by {', '.join(map(str, STD))}"
    )


# Weights


def load_head(contents: Mapping, path: Path) -> tuple[nn.Module, nn.Linear]:
    """Load projection head and prototypes [K, D] (of length 1) of a checkpoint, in evaluation mode. Raises UserError.

    contents: as checkpoint.load gives them; path: their file.
    """
    with user_errors(f"RUN: {path} holds a backbone alone: "):
        weights, sizes = head_weights(contents)
    no_backbone, first = nn.Identity(), "projection_head.0.weight" if sizes["hidden_mlp"] else "projection_head.weight"
    no_backbone.num_features = weights[first].shape[1] if first in weights else 1  # 1: loading says what is missing
    model = SwAV(backbone=no_backbone, **sizes)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"RUN: {path} holds no whole projection head: {error}".replace("\n", " ")) from None
    model.normalize_prototypes()
    return model.projection_head.eval(), model.prototypes


def rename_weights(
    backbone: nn.Module, architecture: Mapping, naming: str, contents: Mapping
) -> dict[str, torch.Tensor]:
    """A backbone's weights under the names of other programs; of the whole model for "swav". Raises UserError.

    architecture: of backbones.load_backbone. naming: one of NAMINGS. contents: of its checkpoint, for "swav".
    torchvision: torchvision.models.NAME().load_state_dict(weights, strict=False), as they have no classifier.
    timm: timm.create_model(NAME, num_classes=0).load_state_dict(weights).
    swav: published names, module.conv1.weight to module.prototypes.weight.
    """
    weights, arch = backbone.state_dict(), str(architecture["arch"])
    others = "; write --to swav, which keeps every network of ours, or export it by onnx or torch_export"
    if naming == "swav":
        if not isinstance(backbone, ResNet):
            raise UserError(f"--to swav: expected a ResNet, got {arch}; write --to timm, or use onnx or torch_export")
        with user_errors("--to swav: RUN holds a backbone alone; write --to torchvision or timm instead: "):
            head, _ = head_weights(contents)
        return {f"module.{name}": tensor.contiguous() for name, tensor in {**weights, **head}.items()}
    theirs = _weights_of_timm(arch) if naming == "timm" else _weights_of_torchvision(arch)
    if theirs is None:
        raise UserError(f"--to {naming}: {naming} has no {arch}{others}")
    if not weights.keys() & theirs.keys():  # the network lies in a module of ours
        weights = {name.partition(".")[2]: tensor for name, tensor in weights.items()}
    for name in sorted(weights.keys() | theirs.keys()):
        ours, other = (list(part[name].shape) if name in part else "none" for part in (weights, theirs))
        if ours != other:
            raise UserError(
                f"--to {naming}: this {arch} differs from {naming}'s in stem, width or blocks: {name} is {ours}, there "
                f"{other}{others}"
            )
    return {name: tensor.contiguous() for name, tensor in weights.items()}


def _weights_of_torchvision(arch: str) -> dict[str, torch.Tensor] | None:
    """Names and shapes of a network of torchvision, without the classifier; None if it has none of this name."""
    if arch not in torchvision.models.list_models(torchvision.models):
        return None
    with torch.device("meta"):
        network = torchvision.models.get_model(arch, weights=None)
    *_, (classifier, _) = network.named_children()
    return {name: w for name, w in network.state_dict().items() if not name.startswith(f"{classifier}.")}


def _weights_of_timm(arch: str) -> dict[str, torch.Tensor] | None:
    timm, name = need("timm"), arch.removeprefix("timm/")
    if not timm.is_model(name.partition(".")[0]):
        return None
    with torch.device("meta"):
        return timm.create_model(name, pretrained=False, num_classes=0).state_dict()


def write_weights(weights: Mapping[str, torch.Tensor], path: Path, crop: CentreCrop) -> None:
    """Write weights to a .pth or .safetensors file. The preprocessing is in the metadata: as JSON in the latter.

    torch.load(FILE)._metadata["preprocess"] has it for .pth.
    """
    if path.suffix == ".safetensors":
        metadata = {"format": "pt", "preprocess": json.dumps(preprocessing(crop))}
        need("safetensors.torch").save_file(dict(weights), path, metadata)
        return
    named = OrderedDict(weights)
    named._metadata = {"preprocess": preprocessing(crop)}  # which torch keeps beside the weights, and ignores here
    checkpoint.write(named, path)


# Networks


def largest_difference(run: Callable[[torch.Tensor], torch.Tensor], backbone: nn.Module, size: int) -> float:
    """The largest difference of run(images) from the backbone's features, for batches of 1 and 3 random images.

    Raises RunStopped if it is above TOLERANCE of the largest feature.
    """
    largest, generator = 0.0, torch.Generator().manual_seed(0)
    for count in (1, 3):
        images = torch.randn(count, 3, size, size, generator=generator)
        with torch.no_grad():
            expected, got = backbone(images), run(images)
        difference = (got - expected).abs().max().item()
        if not difference <= TOLERANCE * expected.abs().max().item():
            raise RunStopped(
                f"the exported network differs from PyTorch's by up to {difference:.2g}, of features of up to "
                f"{expected.abs().max().item():.2g}; it is not written; try another version of torch"
            )
        largest = max(largest, difference)
    return largest


def _dynamic_batch(size: int) -> tuple[tuple[torch.Tensor], tuple[dict]]:
    """An example of the input, and which of its dimensions are free."""
    return (torch.zeros(2, 3, size, size),), ({0: torch.export.Dim("batch", min=1)},)


def write_onnx(backbone: nn.Module, path: Path, crop: CentreCrop) -> float:
    """Write a backbone as ONNX, images -> features, for any batch; returns `largest_difference` of onnxruntime.

    The metadata of the file has the preprocessing as JSON. Raises UserError if packages are missing or it is too large.
    """
    onnxruntime = need("onnxruntime", "onnx", "onnxscript")
    size_in_bytes = sum(weight.nbytes for weight in backbone.state_dict().values())
    if size_in_bytes > LARGEST_ONNX:
        raise UserError(f"onnx: expected weights of at most 2 GB, got {size_in_bytes / 1e9:.1f}; use torch_export")
    example, shapes = _dynamic_batch(crop.size)
    names = dict(input_names=["images"], output_names=["features"])
    program = torch.onnx.export(backbone, example, dynamo=True, dynamic_shapes=shapes, verbose=False, **names)
    program.model.metadata_props["preprocess"] = json.dumps(preprocessing(crop))
    program.save(str(path), external_data=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    run = lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])  # noqa: E731
    return largest_difference(run, backbone, crop.size)


def write_torch_export(backbone: nn.Module, path: Path, crop: CentreCrop) -> float:
    """Write a backbone by torch.export, for any batch; returns `largest_difference` of the file read back.

    torch.export.load(path).module()(images) gives features; the extra file "preprocess.json" has the preprocessing.
    """
    example, shapes = _dynamic_batch(crop.size)
    with torch.no_grad():
        program = torch.export.export(backbone, example, dynamic_shapes=shapes)
    torch.export.save(program, path, extra_files={"preprocess.json": json.dumps(preprocessing(crop))})
    return largest_difference(torch.export.load(path).module(), backbone, crop.size)
