"""ResNets (torchvision's, and 2, 4 and 5 times as wide), SwAV's projection head and prototypes (Caron et al. 2020).

    model = SwAV("resnet50").to(device)            # then, on several processes: model = sync_batchnorm(model)
    embeddings, scores = model([images_224, other_images_224, images_96])    # [V*B, 128], [V*B, 3000]
    features = model.features(images)                                         # [B, 2048]

Parameter names are torchvision's (backbone) and the published checkpoints' (`projection_head.*`, `prototypes.weight`),
so weights load from either and back. Copy this file to use it elsewhere: it needs only torch.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

SMALL_MAPS_ARE_SLOW = torch.backends.cpu.get_cpu_capability() == "AVX2"  # see SmallMapConvolution


class Conv3x3(nn.Conv2d):
    """3x3 convolution, padded by 1, without bias."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(in_channels, out_channels, 3, stride=stride, padding=1, groups=groups, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not isinstance(x, fx.Proxy) and x.device.type == "cpu":  # torch.fx traces a plain convolution
            height, width = [(side - 1) // self.stride[0] + 1 for side in x.shape[2:]]
            out_pixels = height * width
            is_autocast = torch.is_autocast_enabled("cpu")
            if is_autocast and out_pixels == 1:
                # on 1x1 maps some torch builds return uninitialised memory as a stride-2 weight's bf16 gradient
                with torch.autocast("cpu", enabled=False):
                    return super().forward(x.float())
            if SMALL_MAPS_ARE_SLOW and not is_autocast and out_pixels <= 9 and self.groups == 1:
                return SmallMapConvolution.apply(x, self.weight, self.stride)
        return super().forward(x)


class SmallMapConvolution(torch.autograd.Function):
    """A 3x3 convolution that computes its weight gradient as one matrix product over all images.

    On CPUs without AVX-512, oneDNN takes up to seven times as long for it on maps of 2x2 pixels and below, as in the
    last stage for crops of 32 pixels, and a little longer on 3x3.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, stride: tuple[int, int]) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        return F.conv2d(x, weight, stride=stride, padding=1)

    @staticmethod
    def backward(ctx: Any, out_gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor, None]:
        x, weight = ctx.saved_tensors
        x_gradient = None
        if ctx.needs_input_grad[0]:
            x_gradient = nn.grad.conv2d_input(x.shape, weight, out_gradient, ctx.stride, padding=1)
        padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))  # [N, H + 2, W + 2, I]
        patches = padded.unfold(1, 3, ctx.stride[0]).unfold(2, 3, ctx.stride[1])  # [N, h, w, I, 3, 3]
        patches = patches.permute(0, 1, 2, 4, 5, 3).reshape(-1, 9 * x.shape[1])
        weight_gradient = out_gradient.permute(0, 2, 3, 1).flatten(0, 2).T @ patches  # [O, 9 * I]
        return x_gradient, weight_gradient.unflatten(1, (3, 3, -1)).permute(0, 3, 1, 2), None


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = Conv3x3(in_channels, channels, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = Conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = downsample

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += shortcut
        return self.relu(out)


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(
        self, in_channels: int, channels: int, stride: int, downsample: nn.Module | None, groups: int, per_group: int
    ) -> None:
        super().__init__()
        inner = channels * per_group // 64 * groups
        self.conv1 = nn.Conv2d(in_channels, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = Conv3x3(inner, inner, stride, groups)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, channels * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += shortcut
        return self.relu(out)


# name: (block, blocks per stage, channels of the stem, groups of a bottleneck's 3x3 convolution, its width_per_group,
# as in torchvision)
ARCHS = {
    "resnet18": (BasicBlock, (2, 2, 2, 2), 64, 1, 64),
    "resnet34": (BasicBlock, (3, 4, 6, 3), 64, 1, 64),
    "resnet50": (Bottleneck, (3, 4, 6, 3), 64, 1, 64),
    "resnet101": (Bottleneck, (3, 4, 23, 3), 64, 1, 64),
    "resnet152": (Bottleneck, (3, 8, 36, 3), 64, 1, 64),
    "wide_resnet50_2": (Bottleneck, (3, 4, 6, 3), 64, 1, 128),
    "wide_resnet101_2": (Bottleneck, (3, 4, 23, 3), 64, 1, 128),
    "resnext50_32x4d": (Bottleneck, (3, 4, 6, 3), 64, 32, 4),
    "resnext101_32x8d": (Bottleneck, (3, 4, 23, 3), 64, 32, 8),
    "resnext101_64x4d": (Bottleneck, (3, 4, 23, 3), 64, 64, 4),
    "resnet50w2": (Bottleneck, (3, 4, 6, 3), 128, 1, 64),
    "resnet50w4": (Bottleneck, (3, 4, 6, 3), 256, 1, 64),
    "resnet50w5": (Bottleneck, (3, 4, 6, 3), 320, 1, 64),
}

# name: (kernel, stride, max-pool after it). Kernels differ, so that a state dict shows which stem it has.
STEMS = {"imagenet": (7, 2, True), "medium": (5, 2, False), "small": (3, 1, False)}


class ResNet(nn.Module):
    """A backbone without classifier: images [B, 3, S, S] -> pooled features [B, num_features].

    arch: one of ARCHS. width: channels of the stem, doubled at each later stage (None: those of the arch).
    blocks: residual blocks of the four stages (None: those of the arch).
    stem: "imagenet" (7x7, stride 2, max-pool), "medium" (5x5, stride 2, for crops below 96 pixels) or "small"
    (3x3, stride 1, for 32 pixels and less). Raises ValueError for an unknown name, a size below 1, or a width that does
    not fit the groups of a ResNeXt.
    """

    recomputes_blocks = False  # of `checkpoint_activations`

    def __init__(
        self,
        arch: str = "resnet50",
        *,
        width: int | None = None,
        blocks: Sequence[int] | None = None,
        stem: str = "imagenet",
    ) -> None:
        super().__init__()
        if arch not in ARCHS:
            raise ValueError(f"arch: expected one of {', '.join(ARCHS)}, got {arch}")
        if stem not in STEMS:
            raise ValueError(f"stem: expected one of {', '.join(STEMS)}, got {stem}")
        block, arch_blocks, arch_width, groups, per_group = ARCHS[arch]
        width = arch_width if width is None else width
        blocks = arch_blocks if blocks is None else tuple(blocks)
        if width < 1:
            raise ValueError(f"width: expected 1 or more, got {width}")
        if width * per_group % 64:
            raise ValueError(f"width: expected a multiple of {64 // per_group} for {arch}, got {width}")
        if len(blocks) != 4 or min(blocks) < 1:
            raise ValueError(f"blocks: expected four numbers of 1 or more, got {list(blocks)}")
        kernel, stride, pool = STEMS[stem]
        self.conv1 = nn.Conv2d(3, width, kernel, stride=stride, padding=kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if pool else nn.Identity()
        inside = dict(groups=groups, per_group=per_group) if block is Bottleneck else {}
        self.layer1 = _stage(block, width, width, blocks[0], stride=1, **inside)
        self.layer2 = _stage(block, width * block.expansion, width * 2, blocks[1], stride=2, **inside)
        self.layer3 = _stage(block, width * 2 * block.expansion, width * 4, blocks[2], stride=2, **inside)
        self.layer4 = _stage(block, width * 4 * block.expansion, width * 8, blocks[3], stride=2, **inside)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.num_features = width * 8 * block.expansion
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """images [B, 3, S, S] -> pooled features [B, num_features]."""
        if self.recomputes_blocks and torch.is_grad_enabled():
            x = images
            for block in chain([self._stem], self.layer1, self.layer2, self.layer3, self.layer4):
                x = checkpoint(block, x, use_reentrant=False)
        else:
            x = self.layer4(self.layer3(self.layer2(self.layer1(self._stem(images)))))
        return self.avgpool(x).flatten(1)

    def _stem(self, images: torch.Tensor) -> torch.Tensor:
        return self.maxpool(self.relu(self.bn1(self.conv1(images))))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.features(images)


def _stage(block: type, in_channels: int, channels: int, depth: int, stride: int, **inside: int) -> nn.Sequential:
    out_channels = channels * block.expansion
    downsample = None
    if stride != 1 or in_channels != out_channels:
        downsample = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
        )
    first = block(in_channels, channels, stride, downsample, **inside)
    return nn.Sequential(first, *(block(out_channels, channels, 1, None, **inside) for _ in range(depth - 1)))


class SwAV(ResNet):
    """Backbone, projection head and prototypes (section 4).

    hidden_mlp: width of the head's hidden layer; 0 for a single linear layer. feat_dim: D, dimensions of an embedding.
    nmb_prototypes: K. width, blocks and stem are those of `ResNet`. backbone: another network, images [B, 3, S, S] ->
    [B, num_features], in the place of a ResNet; its weights get the names backbone.*. Raises ValueError for values out
    of range.

    parts: set this attribute to N, a divisor of B, to need memory for a part of B/N images only. Forward works through
    the batch part by part and keeps no activations, only outputs, which are those of the whole batch. Backward runs
    each part's forward again, so gradients are those of the whole batch too. BatchNorm has statistics of each part.
    Call backward within `statistics_kept`.
    """

    parts = 1

    def __init__(
        self,
        arch: str = "resnet50",
        hidden_mlp: int = 2048,
        feat_dim: int = 128,
        nmb_prototypes: int = 3000,
        *,
        width: int | None = None,
        blocks: Sequence[int] | None = None,
        stem: str = "imagenet",
        backbone: nn.Module | None = None,
    ) -> None:
        if backbone is None:
            super().__init__(arch, width=width, blocks=blocks, stem=stem)
        else:
            nn.Module.__init__(self)
            self.backbone, self.num_features = backbone, backbone.num_features
        if hidden_mlp < 0:
            raise ValueError(f"hidden_mlp: expected 0 or more, got {hidden_mlp}")
        for name, value in dict(feat_dim=feat_dim, nmb_prototypes=nmb_prototypes).items():
            if value < 1:
                raise ValueError(f"{name}: expected 1 or more, got {value}")
        if hidden_mlp:
            self.projection_head = nn.Sequential(
                nn.Linear(self.num_features, hidden_mlp),
                nn.BatchNorm1d(hidden_mlp),
                nn.ReLU(inplace=True),
                nn.Linear(hidden_mlp, feat_dim),
            )
        else:
            self.projection_head = nn.Linear(self.num_features, feat_dim)
        self.prototypes = nn.Linear(feat_dim, nmb_prototypes, bias=False)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """images [B, 3, S, S] -> pooled features [B, num_features]."""
        return self.backbone(images) if "backbone" in self._modules else super().features(images)

    def forward(self, crops: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """V crops [B, 3, S, S] -> embeddings [V*B, D] of unit length and scores [V*B, K], in the order of the crops.

        One backbone pass per resolution (section 3.2), so BatchNorm has statistics of each; one head pass over all.
        With `parts`, this holds for each part, except under torch.no_grad().
        """
        if len({len(crop) for crop in crops}) != 1:
            raise ValueError(f"crops: expected the same number of images in each, got {[len(crop) for crop in crops]}")
        if self.parts == 1 or not torch.is_grad_enabled():
            return self._forward(*crops)
        if len(crops[0]) % self.parts:
            raise ValueError(f"crops: expected a multiple of the {self.parts} parts of images, got {len(crops[0])}")
        parts = zip(*(crop.chunk(self.parts) for crop in crops), strict=True)
        outputs = [checkpoint(self._forward, *part, use_reentrant=False) for part in parts]
        return tuple(
            torch.cat([output.unflatten(0, (len(crops), -1)) for output in of_parts], dim=1).flatten(0, 1)
            for of_parts in zip(*outputs, strict=True)
        )

    def _forward(self, *crops: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features: dict[int, torch.Tensor] = {}
        for resolution in dict.fromkeys(crop.shape[2:] for crop in crops):
            members = [i for i, crop in enumerate(crops) if crop.shape[2:] == resolution]
            passed = self.features(torch.cat([crops[i] for i in members]))
            features |= zip(members, passed.chunk(len(members)), strict=True)
        projections = self.projection_head(torch.cat([features[i] for i in range(len(crops))]))  # [V*B, D]
        # Codes are exp(scores / 0.05): half-precision scores would be off by up to 8 % of a code.
        with torch.autocast(projections.device.type, enabled=False):
            embeddings = F.normalize(projections.to(self.prototypes.weight.dtype), dim=1)
            return embeddings, self.prototypes(embeddings)

    @torch.no_grad()
    def normalize_prototypes(self) -> None:
        """Normalise each prototype to length 1, in place. Call it before each forward pass in training."""
        self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=1))


def checkpoint_activations(model: SwAV) -> None:
    """Keep only the inputs of stem and blocks for backward, which computes the rest again: less memory, more time.

    Networks of timm do it by their own set_grad_checkpointing. Call backward within `statistics_kept`. Raises
    ValueError for a network that cannot do it.
    """
    if "backbone" in model._modules:
        try:
            model.backbone.set_grad_checkpointing(True)
        except (AttributeError, AssertionError):  # timm asserts that the network can do it
            name = type(model.backbone).__name__
            raise ValueError(
                f"checkpoint_activations: expected off, as {name} cannot do it (set_grad_checkpointing)"
            ) from None
    model.recomputes_blocks = True


@contextmanager
def statistics_kept(model: SwAV) -> Iterator[None]:
    """Keep BatchNorm's running statistics as forward left them, while backward runs parts of forward again.

    So each forward updates them once. Does nothing for a model that keeps its activations.
    """
    buffers = list(model.buffers()) if model.parts > 1 or model.recomputes_blocks else []
    kept = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, value in zip(buffers, kept, strict=True):
            buffer.copy_(value)


def memory_layout(model: nn.Module, device: torch.device) -> torch.memory_format:
    """The memory format in which the model trains fastest: channels_last.

    Contiguous on CPUs if a convolution has fewer than 16 channels, the floats of an AVX-512 register (AVX2: 8): there
    torch 2.14's channels_last gradients, as of 1 x 1 convolutions with stride 2, overwrite memory.
    """
    channels = (module.out_channels for module in model.modules() if isinstance(module, nn.Conv2d))
    is_safe = device.type == "cuda" or min(channels, default=16) >= 16
    return torch.channels_last if is_safe else torch.contiguous_format


def data_parallel(model: nn.Module, device: torch.device) -> DistributedDataParallel:
    """Wrap a model on this device so that backward averages gradients over all processes."""
    devices = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True, static_graph=True)


def batchnorm_group(sync_bn: str, group_size: int, timeout: timedelta | None = None) -> dist.ProcessGroup | None:
    """The processes that share BatchNorm statistics with this one. Every process must call it.

    sync_bn: "pytorch" for all processes (None), "apex" for groups of group_size, as in the paper for large batches.
    timeout: how long a process waits for the others; None for torch's default.
    """
    if sync_bn == "pytorch" or group_size >= dist.get_world_size():
        return None
    return dist.new_subgroups(group_size, timeout=timeout)[0]


def sync_batchnorm(model: nn.Module, group: dist.ProcessGroup | None = None) -> nn.Module:
    """Replace each BatchNorm by one that computes its statistics over the processes of a group (None: all).

    Parameters and buffers stay the same tensors. Every process must have the same number of images. With statistics of
    their own, processes differ, and embeddings can learn to encode the process instead of the image.
    """
    for name, child in model.named_children():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
            setattr(model, name, SyncBatchNorm(child, group))
        else:
            sync_batchnorm(child, group)
    return model


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """A BatchNorm (1d, 2d, or timm's with an activation) with the statistics of all processes of a group (None: all).

    As nn.SyncBatchNorm, but on CPUs too; torch.compile traces it without a graph break, and the host never waits for
    the device. One all-reduce per pass in forward, and one in backward. Raises ValueError for a BatchNorm without
    weights, running statistics or momentum.
    """

    def __init__(self, norm: nn.Module, group: dist.ProcessGroup | None = None) -> None:
        if not (norm.affine and norm.track_running_stats) or norm.momentum is None:
            raise ValueError(f"norm: expected a BatchNorm with weights, running statistics and momentum, got {norm}")
        super().__init__(norm.num_features, norm.eps, norm.momentum, device="meta")
        for name, tensor in (*norm.named_parameters(recurse=False), *norm.named_buffers(recurse=False)):
            setattr(self, name, tensor)
        group = dist.group.WORLD if group is None else group
        self.group_name, self.world_size = group.group_name, group.size()
        self.drop, self.act = (getattr(norm, name, nn.Identity()) for name in ("drop", "act"))  # of timm's
        self.train(norm.training)

    def _check_input_dim(self, x: torch.Tensor) -> None:
        """Accept any number of dimensions after the channels."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, C, ...] -> the same shape and dtype. In training it raises ValueError for one value per channel."""
        return self.act(self.drop(self._over_processes(x) if self.training else super().forward(x)))

    def _over_processes(self, x: torch.Tensor) -> torch.Tensor:
        count = x.numel() // x.shape[1] * self.world_size
        if count == 1:
            raise ValueError(f"BatchNorm: expected more than one value per channel in training, got {list(x.shape)}")
        if torch.compiler.is_compiling():  # plain operations, which torch.compile fuses and differentiates
            values, per_channel = x.to(self.weight.dtype), [1, -1] + [1] * (x.dim() - 2)
            var, mean = torch.var_mean(values, dim=[0, *range(2, x.dim())], correction=0)
            mean, var = _moments_over_processes(mean, var, self.group_name, self.world_size)
            scale = self.weight * (var + self.eps).rsqrt()
            mean_, scale, bias = (vector.view(per_channel) for vector in (mean, scale, self.bias))
            out = torch.addcmul(bias, values - mean_, scale).to(x.dtype)
        else:
            parameters = self.weight, self.bias, self.eps, self.group_name, self.world_size
            out, mean, var = NormalizeOverProcesses.apply(x, *parameters)
        with torch.no_grad():
            self.num_batches_tracked.add_(1)  # in place, which torch.compile also traces where blocks run twice
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (count / (count - 1)), self.momentum)
        return out


def _moments_over_processes(
    mean: torch.Tensor, var: torch.Tensor, group_name: str, world_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance [C] of all processes from those of each, which has as many images as the others.

    In float64, as the difference of squares would cancel in float32. These vectors are so short that it costs nothing.
    """
    dtype, mean, var = mean.dtype, mean.double(), var.double()
    moments = torch.stack([mean, torch.addcmul(var, mean, mean)])
    mean, square = sum_over_processes(moments, group_name) / world_size
    var = torch.addcmul(square, mean, mean, value=-1).clamp_min(0)
    return mean.to(dtype), var.to(dtype)


# An operator of its own, as the functional all-reduce of torch 2.6 has no gradient.
@torch.library.custom_op("swav_model::sum_over_processes", mutates_args=())
def sum_over_processes(term: torch.Tensor, group_name: str) -> torch.Tensor:
    """All-reduce of a tensor. Its gradient is an all-reduce too, as the loss of each process depends on all terms."""
    total = torch.ops._c10d_functional.all_reduce(term.contiguous(), "sum", group_name)
    return torch.ops._c10d_functional.wait_tensor(total)  # the device waits, the host does not


def _keep_group_name(ctx: Any, inputs: tuple[torch.Tensor, str], output: torch.Tensor) -> None:
    ctx.group_name = inputs[1]


sum_over_processes.register_fake(lambda term, group_name: torch.empty_like(term))
sum_over_processes.register_autograd(
    lambda ctx, gradient: (sum_over_processes(gradient, ctx.group_name), None), setup_context=_keep_group_name
)


class NormalizeOverProcesses(torch.autograd.Function):
    """BatchNorm of x [B, C, ...] by torch's own kernels: (output, mean and variance [C] of x over all processes).

    Without torch.compile these take two passes over x in forward and two in backward, and only x is kept in between.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        eps: float,
        group_name: str,
        world_size: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        # The kernel also updates running statistics, here unused ones: those of all processes are not known yet. On
        # CPUs their dtype is the one of the result.
        unused = torch.empty(2, x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        mean, var = torch.batch_norm_update_stats(x, *unused, 0.0)
        mean, var = _moments_over_processes(mean, var, group_name, world_size)
        ctx.save_for_backward(x, weight, mean, var)
        ctx.eps, ctx.group_name, ctx.count = eps, group_name, x.numel() // x.shape[1] * world_size
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)  # they have none: fill no zeros for them
        return torch.batch_norm(x, weight, bias, mean, var, False, 0.0, eps, False), mean, var

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor, *_: None) -> tuple[torch.Tensor | None, ...]:
        x, weight, mean, var = ctx.saved_tensors
        invstd = (var + ctx.eps).rsqrt()
        _, weight_gradient, bias_gradient = torch.ops.aten.native_batch_norm_backward(
            gradient, x, weight, None, None, mean, invstd, True, ctx.eps, [False, True, True]
        )
        # x_gradient = weight / std * (gradient - mean(gradient) - y mean(gradient y)), with y = (x - mean) / std
        sums = sum_over_processes(torch.stack([bias_gradient, weight_gradient]), ctx.group_name)
        if x.is_cuda:  # one pass, by a kernel that torch has only for GPUs; not yet run on a GPU
            count = torch.full((1,), ctx.count, dtype=torch.int32, device=x.device)
            vectors = mean, invstd, weight, sums[0], sums[1] / invstd
            x_gradient = torch.batch_norm_backward_elemt(gradient, x, *vectors, count)
        else:
            scale = weight * invstd
            shift, slope = sums * (scale / -ctx.count)
            x_gradient = torch.batch_norm(x, slope, shift, mean, var, False, 0.0, ctx.eps, False)
            x_gradient.addcmul_(gradient, scale.view([1, -1] + [1] * (x.dim() - 2)))
        return x_gradient, weight_gradient, bias_gradient, None, None, None


# Backbones by name. They take the other arguments of `ResNet`.
resnet18 = partial(ResNet, "resnet18")
resnet50 = partial(ResNet, "resnet50")
resnet50w2 = partial(ResNet, "resnet50w2")
resnet50w4 = partial(ResNet, "resnet50w4")
resnet50w5 = partial(ResNet, "resnet50w5")


def _weights_of(checkpoint: Mapping, beginnings: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint whose names, without a `module.` prefix, begin with one of these."""
    weights = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, Mapping) else {}
    entries = weights.items() if isinstance(weights, Mapping) else ()
    named = ((str(name).removeprefix("module."), tensor) for name, tensor in entries if torch.is_tensor(tensor))
    return {name: tensor for name, tensor in named if name.startswith(beginnings)}


def backbone_weights(checkpoint: Mapping) -> dict[str, torch.Tensor]:
    """Take the backbone out of a checkpoint: one of ours, a published SwAV file or a torchvision ResNet's state dict.

    checkpoint: as `torch.load` gives it. Drops a `module.` prefix and everything but the backbone.
    Raises ValueError if it holds no ResNet.
    """
    weights = _weights_of(checkpoint, ("conv1.", "bn1.", "layer"))
    stem = weights.get("conv1.weight")
    if stem is None or stem.ndim != 4 or not any(name.startswith("layer4.") for name in weights):
        raise ValueError("checkpoint: expected the weights of a ResNet (conv1.weight, layer1.0.conv1.weight, ...)")
    return weights


def head_weights(checkpoint: Mapping) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """Take projection head and prototypes out of a checkpoint: (weights, hidden_mlp, feat_dim and nmb_prototypes).

    checkpoint: of ours or a published SwAV file, as `torch.load` gives it. Raises ValueError if it lacks them.
    """
    weights = _weights_of(checkpoint, ("projection_head.", "prototypes."))
    hidden, prototypes = weights.get("projection_head.0.weight"), weights.get("prototypes.weight")
    if prototypes is None or prototypes.ndim != 2 or len(weights) < 3:
        raise ValueError("expected the weights of a projection head and prototypes.weight, as SwAV has them")
    sizes = {"hidden_mlp": 0 if hidden is None else len(hidden), "feat_dim": prototypes.shape[1]}
    return weights, sizes | {"nmb_prototypes": len(prototypes)}


def architecture_of(weights: Mapping[str, torch.Tensor]) -> dict[str, str | int | list[int]]:
    """Read the arguments of `ResNet` off the names and shapes of its weights (from `backbone_weights`).

    Raises ValueError for a stem that is none of STEMS, and for convolutions of none of ARCHS.
    """
    width, _, kernel, _ = weights["conv1.weight"].shape
    stem = next((name for name, (stem_kernel, *_) in STEMS.items() if stem_kernel == kernel), None)
    if stem is None:
        raise ValueError(f"checkpoint: expected a stem of 7x7, 5x5 or 3x3, got {kernel}x{kernel}")
    blocks = [len({name.split(".")[1] for name in weights if name.startswith(f"layer{i}.")}) for i in (1, 2, 3, 4)]
    block = Bottleneck if "layer1.0.conv3.weight" in weights else BasicBlock
    conv = weights.get("layer1.0.conv2.weight")
    inner, inputs = conv.shape[:2] if conv is not None and conv.ndim == 4 else (0, 1)
    groups, per_group = inner // inputs, 64 * inputs // width
    similar = {name: known for name, known in ARCHS.items() if known[0] is block and known[3:] == (groups, per_group)}
    if not similar:
        raise ValueError(
            f"checkpoint: expected a ResNet like {', '.join(ARCHS)}, got convolutions layer1.0.conv2 of "
            f"{list(conv.shape) if conv is not None else 'no weights'}"
        )
    same = (name for name, known in similar.items() if known[1:3] == (tuple(blocks), width))
    return {"arch": next(same, next(iter(similar))), "width": width, "blocks": blocks, "stem": stem}
