"""Networks and weights of other programs: timm's networks, and the backbone in any self-supervised program's file.

    found = find_backbone(torch.load("moco_v2_800ep.pth.tar", weights_only=True))  # found.taken: module.encoder_q.
    network = timm_network("timm/convnext_atto")                                    # images -> features [B, 320]

Copy this file to use it elsewhere: it needs only torch, and timm for timm's networks.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

TIMM = "timm/"  # before the names of timm's networks
NEARBY = 64  # pixels up to which `sizes_near` looks

# Of several backbones in a file, that with which each method is evaluated. DINO: the teacher; timm: the moving average.
PREFERRED = re.compile(r"teacher|(?<![a-z])ema(?![a-z])")
# MoCo: not the encoder of the keys; MoCo v3, BYOL, solo-learn, lightly: not the moving average.
SECONDARY = re.compile(r"student|momentum|target|encoder_k|key_encoder|encoder_key")

COUNTERS = "num_batches_tracked"  # which old files do not have


# Weights


class Found(NamedTuple):
    """A backbone in a file: its weights by the network's own names; the prefix that these have in the file, prefixes
    of other backbones there, and what else lies beside it, by the first part of the name.
    """

    weights: dict[str, torch.Tensor]
    taken: str
    others: list[str]
    left_over: list[str]


def find_backbone(contents: object, names: Sequence[str] | None = None) -> Found:
    """Find the weights of a backbone in what a file of another program holds.

    contents: as torch.load gives it: dicts of tensors, in other dicts or not. names: of the network's weights; None
    for any ResNet with torchvision's names, or numbered as nn.Sequential(*resnet.children()). The backbone is found by
    the prefix of its names. Of several, it takes the teacher's (DINO) or the average's (EMA), and not the student's,
    the key encoder's, the momentum encoder's or the target's (MoCo, BYOL), as these methods evaluate; else the first.
    Raises ValueError if there is none.
    """
    candidates: list[tuple[str, dict[str, str], dict[str, torch.Tensor]]] = []  # prefix, {own name: in file}, all
    closest: list[str] | None = None  # names that the most similar one lacks
    for place, tensors in state_dicts(contents):
        if names is None:
            renamed = [*_resnets(tensors), *_numbered_resnets(tensors)]
        else:
            prefixes = (name.removesuffix(names[0]) for name in tensors if _ends_with(name, names[0]))
            renamed = [(prefix, {name: prefix + name for name in names}) for prefix in prefixes]
        for prefix, old_names in renamed:
            missing = [name for name, old in old_names.items() if old not in tensors and not name.endswith(COUNTERS)]
            if not missing:
                candidates.append((place + prefix, {n: old for n, old in old_names.items() if old in tensors}, tensors))
            elif closest is None or len(missing) < len(closest):
                closest = missing
    if not candidates and names is None:
        raise ValueError("expected the weights of a ResNet (conv1.weight, layer1.0.conv1.weight, ...)")
    if not candidates:
        lacks = (
            f"it lacks {len(closest)} of {len(names)}, such as {closest[0]}" if closest else f"no {names[0]} is there"
        )
        raise ValueError(f"expected the weights of the network: {lacks}")
    prefix, old_names, tensors = min(candidates, key=lambda candidate: _rank(candidate[0]))  # the first of equal ones
    used, beside = {old for _, names_in_file, _ in candidates for old in names_in_file.values()}, prefix.split("/")[-1]
    rest = (name.removeprefix(beside).removeprefix("module.") for name in tensors if name not in used)
    return Found(
        {name: tensors[old] for name, old in old_names.items()},
        prefix,
        [other for other, *_ in candidates if other != prefix],
        sorted({name.partition(".")[0] for name in rest}),
    )


def state_dicts(contents: object, place: str = "") -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Every dict of tensors within dicts: (its keys, joined and ended by "/"; its tensors by name)."""
    if not isinstance(contents, Mapping):
        return
    tensors = {str(name): part for name, part in contents.items() if torch.is_tensor(part)}
    if tensors:
        yield place, tensors
    for name, part in contents.items():
        yield from state_dicts(part, f"{place}{name}/")


def _ends_with(name: str, end: str) -> bool:
    return name == end or name.endswith("." + end)


def _rank(prefix: str) -> int:
    return 0 if PREFERRED.search(prefix) else 2 if SECONDARY.search(prefix) else 1


def _resnets(tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, dict[str, str]]]:
    """Each prefix before conv1.weight, and {name in ResNet: name in the file}."""
    for stem in [name for name in tensors if _ends_with(name, "conv1.weight") and _is_stem(tensors[name])]:
        prefix = stem.removesuffix("conv1.weight")
        names = [name.removeprefix(prefix) for name in tensors if name.startswith(prefix)]
        if any(name.startswith("layer4.") for name in names):
            names = [name for name in names if name.startswith(("conv1.", "bn1.", "layer"))]
            yield prefix, {_ours(name): prefix + name for name in names}


def _numbered_resnets(tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, dict[str, str]]]:
    """The same for nn.Sequential(*children), as lightly makes it: 0 is conv1, 1 is bn1, and four numbers are stages."""
    for stem in [name for name in tensors if _ends_with(name, "0.weight") and _is_stem(tensors[name])]:
        prefix = stem.removesuffix("0.weight")
        stages = (re.match(re.escape(prefix) + r"(\d+)\.0\.conv1\.weight$", name) for name in tensors)
        stages = sorted(int(stage[1]) for stage in stages if stage)
        if len(stages) == 4:
            parts = {"0": "conv1", "1": "bn1"} | {str(n): f"layer{i}" for i, n in enumerate(stages, 1)}
            found = (re.match(re.escape(prefix) + r"(\d+)\.(.*)", name) for name in tensors)
            yield prefix, {_ours(f"{parts[m[1]]}.{m[2]}"): m[0] for m in found if m and m[1] in parts}


def _is_stem(weight: torch.Tensor) -> bool:
    return weight.ndim == 4 and weight.shape[1] == 3


def _ours(name: str) -> str:
    return name.replace(".shortcut.", ".downsample.")  # as many programs for CIFAR call it


# timm's networks


def timm_network(arch: str, sizes: Sequence[int] = ()) -> nn.Module:
    """Build a network of timm without its classifier, with random weights: images [B, 3, S, S] -> [B, num_features].

    arch: "timm/NAME". sizes: sides of the images in pixels. Transformers get timm's dynamic_img_size, and take any
    size that their patches allow; those that have none are built for the one size, if sizes holds only one. Raises
    ValueError if timm is not installed or has no such network.
    """
    name = arch.removeprefix(TIMM)
    try:
        import timm
    except ImportError:
        raise ValueError(f"arch: {arch} needs timm: pip install timm") from None
    if not timm.is_model(name):
        raise ValueError(f"arch: timm {timm.__version__} has no {name}{close_names(name, timm.list_models())}")
    one_size = [{"img_size": sizes[0]}] if len(set(sizes)) == 1 else []
    for options in ({"dynamic_img_size": True}, *one_size, {}):
        try:
            network = timm.create_model(name, num_classes=0, **options)
            break
        except TypeError as error:  # it does not take this option
            if not options:
                raise ValueError(f"arch: timm cannot build {name}: {error}") from None
        except (RuntimeError, AssertionError, AttributeError) as error:
            raise ValueError(f"arch: timm cannot build {name}: {error}") from None
    # Some, such as MobileNetV3, have a layer behind the pooling.
    network.num_features = getattr(network, "head_hidden_size", None) or network.num_features
    return network


def close_names(name: str, names: Sequence[str]) -> str:
    """For an error message: the names that are close to a wrong one."""
    close = difflib.get_close_matches(name, names, n=4, cutoff=0.5)
    return f"; close names: {', '.join(close)}" if close else ""


@torch.no_grad()
def takes(network: nn.Module, side: int) -> bool:
    """Whether a network on torch's meta device turns images of side x side pixels into features."""
    try:
        features = network.eval()(torch.empty(2, 3, side, side, device="meta"))
    except Exception:  # networks differ in what they raise
        return False
    return features.shape == (2, network.num_features)


def sizes_near(network: nn.Module, side: int) -> list[int]:
    """The sizes nearest to `side` that a network on the meta device takes: at most one below and one above."""
    below = next((size for size in range(side - 1, max(0, side - NEARBY - 1), -1) if takes(network, size)), None)
    above = next((size for size in range(side + 1, side + NEARBY + 1) if takes(network, size)), None)
    return [size for size in (below, above) if size]


def nearest_size(network: nn.Module, side: int) -> int | None:
    """The size nearest to `side` that a network on the meta device takes: side itself, or at most NEARBY from it."""
    if takes(network, side):
        return side
    return min(sizes_near(network, side), key=lambda size: abs(size - side), default=None)


def check_sizes(arch: str, sizes: Sequence[int], network: nn.Module) -> None:
    """Raise ValueError, with sizes that it takes, for images that a network of timm cannot take.

    network: of `timm_network`, on torch's meta device.
    """
    refused = [size for size in dict.fromkeys(sizes) if not takes(network, size)]
    if not refused:
        return
    with torch.device("meta"):
        takes_each_alone = len(set(sizes)) > 1 and all(takes(timm_network(arch, [size]), size) for size in sizes)
    if takes_each_alone:
        wanted = f"one size, as {arch} takes images of only one"
    else:
        near = sizes_near(network, refused[0])
        wanted = f"sizes that {arch} takes{', such as ' * bool(near)}{' and '.join(map(str, near))}"
    raise ValueError(f"size_crops: expected {wanted}, got {' '.join(map(str, sizes))}")
