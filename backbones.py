"""Backbones from files: load one without knowing its architecture, and the image size to evaluate it at.

    backbone, architecture, trained = load_backbone("runs/photos/checkpoint.pth")
    size, resize = choose_sizes(trained, typical_side(images), is_folder=True)
    start_from(model, "moco_v2_800ep.pth.tar", "resnet50")    # a model that continues from other weights

Files may be ours, published SwAV ones, or of any program whose backbone foreign.py finds. Evaluation, export and
pictures of a run use it, and training that starts from weights.
"""

import hashlib
import os
from argparse import ArgumentTypeError
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

import checkpoint
from data import MEAN
from foreign import TIMM, Found, check_sizes, close_names, find_backbone, nearest_size, takes, timm_network
from launch import OptionParser, UserError, as_command_line, log, positive_int, user_errors
from model import ARCHS, ResNet, SwAV, architecture_of

LARGER = 1.4  # images of up to this many times the crops are not cropped: derived crops are 3/4 of small images
CLOSE_UP = 0.25  # crops from less than this share of the area show objects larger than the whole image does
SHAPE_OPTIONS = ("arch", "width", "blocks", "stem")  # that a file's weights decide


# Networks


def arch_name(text: str) -> str:
    """The type of the option --arch: one of model.ARCHS, or timm/NAME."""
    try:
        if text.startswith(TIMM):
            with torch.device("meta"):
                timm_network(text)
        elif text not in ARCHS:
            close = close_names(text, list(ARCHS))
            raise ValueError(
                f"expected one of {', '.join(ARCHS)}, or {TIMM}NAME for a network of timm, got {text}{close}"
            )
    except ValueError as error:
        raise ArgumentTypeError(str(error).removeprefix("arch: ")) from None
    return text


def new_backbone(architecture: Mapping) -> nn.Module:
    """A backbone with random weights, images [B, 3, S, S] -> [B, num_features].

    architecture: of `load_backbone`: the arguments of ResNet; of timm's networks, arch, and sizes where known.
    """
    if architecture["arch"].startswith(TIMM):
        return timm_network(architecture["arch"], architecture.get("sizes", ()))
    return ResNet(**architecture)


def describe(architecture: Mapping) -> str:
    """An architecture in a few words: "resnet18 of width 32"."""
    width = architecture.get("width")
    return architecture["arch"] + (f" of width {width}" if width else "")


def foreign_backbone(arch: str, sizes: list[int]) -> nn.Module | None:
    """The backbone of a SwAV that is none of model.py's: timm's for "timm/NAME", else None.

    sizes: sides of the crops. On torch's meta device, raises ValueError for sizes that it cannot take.
    """
    if not arch.startswith(TIMM):
        return None
    network = timm_network(arch, sizes)
    if next(network.parameters()).is_meta:
        check_sizes(arch, sizes, network)
    return network


def sizes_taken(arch: str, sizes: list[int]) -> list[int]:
    """For each size of images the nearest one that a network of timm takes, if there is one; else, and for other
    networks, the size itself.
    """
    if not arch.startswith(TIMM):
        return sizes
    with user_errors("--"), torch.device("meta"):
        network = timm_network(arch, sizes)
    return [nearest_size(network, size) or size for size in sizes]


# Files


def load_backbone(path: Path, arch: str | None, contents: object = None) -> tuple[nn.Module, dict, dict]:
    """Load the backbone of any file: (backbone, architecture, options of its training, {} if unknown).

    architecture: for `new_backbone`. The options include value_range, of data.to_pixels, where training had one.
    contents: of the file, of `read_file`; None to read it. A run that trains replaces its file, so read it once.

    arch: the architecture it must have; None for any, but for files of timm's networks, which do not name it. Raises
    UserError if there is no whole backbone, or if it holds NaN. Weights of other programs were trained with a standard
    deviation of red of 0.229, the paper's and ours with 0.228, a difference of half a percent.
    """
    found, architecture, trained = read_backbone(path, arch, contents=contents)
    if arch not in (None, architecture["arch"]):
        raise UserError(f"--arch: {path} holds a {architecture['arch']}, got {arch}")
    if found.others:
        log(f"{path} holds several networks: weights of {found.taken}* are used{not_taken(found)}")
    backbone = new_backbone(architecture)
    load_weights(backbone, found.weights, f"checkpoint: {path}")
    return backbone, architecture, trained


def not_taken(found: Found) -> str:
    """The other networks of a file, for messages."""
    return "".join(f", not {other}*" for other in found.others)


def read_backbone(
    path: str | Path, arch: str | None, option: str = "checkpoint", contents: object = None
) -> tuple[Found, dict, dict]:
    """Find the backbone in a file: (weights, architecture, options of its training), and check that it is whole.

    arch: what to look for if it is one of timm's. option: that names the file. Otherwise as `load_backbone`.
    """
    try:
        contents = read_file(path) if contents is None else contents
    except UserError as error:
        raise UserError(f"{option}: {str(error).removeprefix('checkpoint: ')}") from None
    options = contents.get("options") if isinstance(contents, Mapping) else None
    is_ours = isinstance(options, dict)  # other programs save other things
    trained = {**options, "value_range": contents.get("value_range")} if is_ours else {}
    named = next((name for name in (trained.get("arch"), arch) if str(name).startswith(TIMM)), None)
    if named:
        architecture = {"arch": named, "sizes": trained.get("size_crops", ())}
        with user_errors(f"{option}: {path}: "), torch.device("meta"):
            names = list(new_backbone(architecture).state_dict())
    try:
        found = find_backbone(contents, names if named else None)
        architecture = architecture if named else architecture_of(found.weights)
        with torch.device("meta"):
            network = new_backbone(architecture)
    except ValueError as error:
        raise UserError(f"{option}: {str(error).removeprefix('checkpoint: ')}, in {path}") from None
    load_weights(network, found.weights, f"{option}: {path}")
    if not all(tensor.isfinite().all() for tensor in found.weights.values()):
        raise UserError(f"{option}: {path} holds weights that are nan or inf")
    mean = getattr(network, "pretrained_cfg", {}).get("mean", MEAN)
    if not trained and abs(mean[0] - MEAN[0]) > 0.01:  # 0.229 in the place of our 0.228 makes no difference
        log(f"{path}: such weights of timm may expect images with a mean of {mean[0]:g}, here it is {MEAN[0]:g}")
    return found, architecture, trained


def load_weights(network: nn.Module, weights: Mapping[str, torch.Tensor], file: str) -> None:
    """Load weights into a backbone. Raises UserError, which begins with `file`, if they are not exactly its own."""
    try:
        network.load_state_dict(weights, assign=next(network.parameters()).is_meta)
    except RuntimeError as error:
        raise UserError(f"{file} does not hold a whole {type(network).__name__}: {error}".replace("\n", " ")) from None


def read_file(path: str | Path) -> Mapping:
    """What a file of weights holds, of torch.save or safetensors, without running code. Raises UserError."""
    if Path(path).suffix != ".safetensors":
        return checkpoint.load(path)
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise UserError(f"checkpoint: {path} needs safetensors: pip install safetensors") from None
    try:
        with safe_open(path, "pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            arch = (file.metadata() or {}).get("arch", "")
    except OSError as error:
        raise UserError(f"checkpoint: cannot read {path}: {error.strerror or error}") from None
    except SafetensorError as error:
        raise UserError(f"checkpoint: cannot read {path}: it is cut short, damaged, or not a safetensors file "
                        f"({error})") from None  # fmt: skip
    return {"state_dict": weights} | ({"options": {"arch": arch}} if arch.startswith(TIMM) else {})


# The start of a run


def start_file(init: str, arch: str, *, download: bool) -> Path | None:
    """The file that --init names: a path, or torchvision's weights for this arch, such as IMAGENET1K_V2.

    download: whether to download the latter, once. None if it is not there. Raises UserError for any other name, and
    if a download fails.
    """
    from torchvision.models import get_model_weights, list_models

    if os.path.lexists(init):
        return Path(init)
    known = get_model_weights(arch).__members__ if arch in list_models() else {}
    if init not in known:
        if not download:
            return None
        names = f"torchvision's weights for {arch} ({', '.join(known)})" if known else f"no weights of {arch} by name"
        raise UserError(f"--init: expected a file, or {names}, got {init}, which is no file here")
    path = Path(torch.hub.get_dir(), "checkpoints", known[init].url.rpartition("/")[2])
    if not path.exists() and not download:
        return None
    try:
        known[init].get_state_dict(progress=False, check_hash=True)
    except Exception as error:  # of the network, the disk or the checksum
        reason = str(getattr(error, "reason", None) or error).splitlines()[0]
        raise UserError(f"--init: cannot download {init} for {arch} ({reason}); download {known[init].url} elsewhere, "
                        "and give that file") from None  # fmt: skip
    return path


def read_start(init: str, asked: Mapping[str, object]) -> dict[str, object]:
    """Check the weights that a run is to start from: {option that they decide: value}, and init_sha256 of the file.

    asked: the SHAPE_OPTIONS, None where the user left them open. Prints what the file holds. Raises UserError for a
    file without whole weights, and for another architecture than asked for.
    """
    arch = asked["arch"] or "resnet50"
    path = start_file(init, arch, download=True)
    found, architecture, _ = read_backbone(path, arch, "--init")
    refuse_other_shape(path, architecture, asked)
    read_off = {name: architecture[name] for name in SHAPE_OPTIONS if name in architecture and asked[name] is None}
    taken = f" ({found.taken}*{not_taken(found)})" if found.taken else ""
    log(f"--init: starting from {path}{taken}, a {describe(architecture)}")
    if read_off:
        log(f"  {as_command_line(read_off)}  (read off {path})")
    left_over = f"left over in the file: {some(found.left_over)}; " if found.left_over else ""
    log(f"  {left_over}new: projection head and prototypes")
    return {**asked, **read_off, "init_sha256": sha256(path)}


def refuse_other_shape(path: Path, architecture: Mapping, asked: Mapping[str, object]) -> None:
    """Raise UserError, by the option's name, if the user asked for another architecture than the file's."""
    wrong = [name for name, value in asked.items() if value not in (None, architecture.get(name))]
    if not wrong:
        return
    if asked["arch"] in ARCHS:  # resnet50 with --blocks 3 4 23 3 is a resnet101
        with user_errors("--"), torch.device("meta"):
            built = ResNet(**{name: value for name, value in asked.items() if value is not None})
        if architecture_of(built.state_dict()) == architecture:
            return
    values = [
        " ".join(map(str, v)) if isinstance(v, list) else v for v in (architecture.get(wrong[0]), asked[wrong[0]])
    ]
    raise UserError(f"--{wrong[0]}: {path} of --init holds {values[0]}, got {values[1]}; leave the option out")


def start_from(model: SwAV, init: str, arch: str) -> None:
    """Give a model's backbone the weights that --init names. Head and prototypes keep theirs. Raises UserError."""
    path = start_file(init, arch, download=True)
    found, _, _ = read_backbone(path, arch, "--init")
    prefix = "backbone." if arch.startswith(TIMM) else ""
    try:
        result = model.load_state_dict({prefix + name: part for name, part in found.weights.items()}, strict=False)
    except RuntimeError as error:
        raise UserError(f"--init: {path} does not fit {arch}: {error}".replace("\n", " ")) from None
    wrong = [name for name in result.missing_keys if not name.startswith(("projection_head.", "prototypes."))]
    if wrong + result.unexpected_keys:
        raise UserError(f"--init: {path} does not fit {arch}: {some(wrong + result.unexpected_keys)}")


def start_backbone(trained: Mapping) -> nn.Module | None:
    """The backbone that a run started from, if its --init names a file that is still there and unchanged; else None.

    trained: options of the run, from `load_backbone`.
    """
    init, arch = trained.get("init"), trained.get("arch")
    path = start_file(init, arch, download=False) if init and trained.get("init_sha256") else None
    if path is None or not path.is_file() or sha256(path) != trained["init_sha256"]:
        return None
    found, architecture, _ = read_backbone(path, arch)
    backbone = new_backbone({**architecture, "sizes": trained["size_crops"]} if arch.startswith(TIMM) else architecture)
    load_weights(backbone, found.weights, f"checkpoint: {path}")
    return backbone


def sha256(path: Path) -> str:
    """The checksum of a file."""
    checksum = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            checksum.update(part)
    return checksum.hexdigest()


def some(names: list[str]) -> str:
    """The first of many names, and how many more there are."""
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


# Sizes of images


def add_size_options(parser: OptionParser) -> None:
    """Add --size and --resize, see `choose_sizes`."""
    add = parser.add
    add("size", None, positive_int, "Resize images to this many pixels.", common="N",
        default_text="their own, but at least the crops' of training, or twice that for photographs")  # fmt: skip
    add("resize", None, positive_int, "shorter side in pixels before the centre crop (default: 8/7 of --size for "
        "larger images, else --size)")  # fmt: skip


def choose_sizes(
    trained: Mapping, side: int, *, is_folder: bool, size: int | None = None, resize: int | None = None
) -> tuple[int, int]:
    """(size, resize) for data.CentreCrop, in pixels, of images that a backbone evaluates. Raises UserError.

    trained: options of its training, from `load_backbone`. side: the images' typical shorter side. is_folder: whether
    they are files. size, resize: what the user set.

    By default images keep their own size, and none are smaller than the training's crops (224 pixels if unknown).
    Images of a folder that are larger than LARGER times these, or than 224 pixels and the crops, are shrunk to the
    crops' size and cropped, as in the paper. If crops came from less than CLOSE_UP of the area, as those of photographs
    do, twice the crops' size counts, or 224 pixels if that is less: objects then look as large as training showed them
    (Touvron et al. 2019, "Fixing the train-test resolution discrepancy"). Networks of timm get the nearest size that
    they take.
    """
    crop = max(trained.get("size_crops", [224 if is_folder else 0]))
    is_large = is_folder and side > min(LARGER * crop, max(224, crop))
    is_close_up = trained.get("min_scale_crops", [1])[0] < CLOSE_UP
    smallest = max(crop, min(2 * crop, 224)) if is_close_up else crop
    wanted, size = size, size or (smallest if is_large else max(side, smallest))
    if trained.get("arch", "").startswith(TIMM):
        size = _evaluated_size(trained, size, is_fixed=wanted is not None)
    resize = resize or (round(size * 8 / 7) if is_folder and side > size else size)
    if resize < size:
        raise UserError(f"--resize: expected at least the {size} pixels of --size, got {resize}")
    return size, resize


def _evaluated_size(trained: Mapping, size: int, is_fixed: bool) -> int:
    """The size nearest to `size` that a network of timm takes. Raises UserError if it is fixed, and another one."""
    with user_errors("checkpoint: "), torch.device("meta"):
        network = timm_network(trained["arch"], trained.get("size_crops", ()))
    near = [near for near in trained.get("size_crops", ()) if takes(network, near)] or [size]
    nearest = nearest_size(network, size) or min(near, key=lambda other: abs(other - size))
    if is_fixed and nearest != size:
        raise UserError(f"--size: expected one that {trained['arch']} takes, such as {nearest}, got {size}")
    return nearest
