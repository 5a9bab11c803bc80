"""Multi-crop, probe transforms and loaders for SwAV (Caron et al. 2020, section 3.2 and appendix A).

    # sizes in pixels, numbers of crops, smallest and largest share of the image's area
    transform = MultiCrop([224, 96], [2, 6], [0.14, 0.05], [1, 0.14])
    crops = transform(pil_image)    # list of 8 tensors [3, S, S], float32, normalised

The crops of an image depend only on (seed, epoch, index of the image), the order of the images only on (seed, epoch):
neither workers nor processes change what a run sees. Loaders can do all of this in their workers, or crop there and
augment whole batches on the training device (`training_loader(..., crop_only=True)`, then `crops_to_device`).
Copy this file to use it elsewhere: it needs only torch and torchvision.
"""

import ctypes
import gc
import math
import multiprocessing.util
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import cycle, permutations
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate, pad
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms.v2 import functional as F

# 0.228 (not the usual 0.229) is what the published weights were trained with.
MEAN, STD = (0.485, 0.456, 0.406), (0.228, 0.224, 0.225)


class UnreadableImage(ValueError):
    """An image of a Dataset that cannot be read: loaders take another one. reason: why, without the file's name."""

    def __init__(self, message: str, reason: str | None = None) -> None:
        super().__init__(message)
        self.reason = reason or message


# Multi-crop: sample a box of the image and augmentation parameters for each crop, crop the box (uint8), augment it.
# `augment` does the last step for a batch on the training device, `augment_one_by_one` in a loader's worker.

JITTER_PROBABILITY, BLUR_PROBABILITY = 0.8, 0.5
# What jitter blends an image with: black, its mean luminance, its luminance; as shares of luminance and mean luminance
BLENDED_WITH = {"brightness": (0, 0), "contrast": (0, 1), "saturation": (1, 0)}
BLEND_JITTER, HUE_JITTER = 0.8, 0.2  # at a color_strength of 1; of the hue in turns of the colour circle
JITTER_ORDERS = tuple(permutations((*BLENDED_WITH, "hue")))
MIN_BLUR, MAX_BLUR = 0.1, 2.0  # sigmas in pixels, published for crops of 224 and of 96 pixels
BLUR_REACH = 6  # pixels to each side of the largest blur kernel
SMALLEST_CROP = BLUR_REACH + 1  # pixels; a blur reflects at the border
BOX_ATTEMPTS = 10
BOX_UNIFORMS = 2 * BOX_ATTEMPTS + 2  # random numbers that decide a box
UNIFORMS = BOX_UNIFORMS + 10  # random numbers that decide a crop
BLENDS = 6  # slots for colour operations: three before the hue shift, three after it
PARAMS = 5 + 3 * BLENDS  # augmentation parameters of a crop


class CropParams(NamedTuple):
    """Augmentation parameters of crops by name, as views of an array or tensor [..., PARAMS] (see `by_name`).

    A blend is (weight of the other image, share of the luminance in it, share of the mean luminance in it), see
    BLENDED_WITH. The order of blends is random, and so is the place of the hue shift among them. Three of the six slots
    stay unused: their weight is 0.
    """

    vflip: np.ndarray | torch.Tensor  # [...], 1 for a vertical flip, else 0; MultiCrop.crop does it
    hflip: np.ndarray | torch.Tensor  # [...], 1 for a horizontal flip, else 0
    grey: np.ndarray | torch.Tensor  # [...], 1 for greyscale, else 0
    sigma: np.ndarray | torch.Tensor  # [...], of the blur in pixels, 0 for none
    hue: np.ndarray | torch.Tensor  # [...], shift in turns of the colour circle
    blends: np.ndarray | torch.Tensor  # [..., BLENDS, 3]


def by_name(params: np.ndarray | torch.Tensor) -> CropParams:
    """Views of parameters [..., PARAMS] by name."""
    blends = params[..., 5:].reshape(*params.shape[:-1], BLENDS, 3)
    return CropParams(*(params[..., column] for column in range(5)), blends)


def blend_slot(name: str, order: Sequence[str]) -> int:
    """The slot of a colour operation: 0 to 2 before the hue shift, 3 to 5 after it."""
    place, hue = order.index(name), order.index("hue")
    return place if place < hue else BLENDS // 2 + place - hue - 1


# Slots of brightness, contrast and saturation, for each order: [24, 3].
BLEND_SLOTS = np.array([[blend_slot(name, order) for name in BLENDED_WITH] for order in JITTER_ORDERS])


class MultiCrop:
    """Image -> list of crops, V = sum(nmb_crops) float32 tensors [3, S, S], mean subtracted, divided by std.

    size_crops, nmb_crops, min_scale_crops, max_scale_crops: for each resolution the side of its crops in pixels, their
    number, and the range of their area as a share of the image. blur_sigma: sigma of the strongest blur in pixels, 0
    for none. hflip, vflip, grayscale: probabilities of a horizontal and a vertical flip and of greyscale.
    color_strength: of the jitter of brightness, contrast, saturation and hue; 1 as in the paper, 0 for none.
    Use it as the transform of any Dataset of images, PIL or uint8 [3, H, W]. Randomness comes from `rng`, or from
    torch's global generator (which DataLoader seeds in each worker).
    Raises ValueError for lists of different lengths or values out of range.
    """

    def __init__(
        self,
        size_crops: Sequence[int],
        nmb_crops: Sequence[int],
        min_scale_crops: Sequence[float],
        max_scale_crops: Sequence[float],
        blur_sigma: float = MAX_BLUR,
        *,
        hflip: float = 0.5,
        vflip: float = 0.0,
        color_strength: float = 1.0,
        grayscale: float = 0.2,
    ) -> None:
        lists = dict(nmb_crops=nmb_crops, min_scale_crops=min_scale_crops, max_scale_crops=max_scale_crops)
        for name, values in lists.items():
            if len(values) != len(size_crops):
                expected = f"{len(size_crops)} values, one for each of size_crops {list(size_crops)}"
                raise ValueError(f"{name}: expected {expected}, got {list(values)}")
        if min(size_crops, default=0) < SMALLEST_CROP:
            raise ValueError(f"size_crops: expected {SMALLEST_CROP} pixels or more each, got {list(size_crops)}")
        if min(nmb_crops) < 1:
            raise ValueError(f"nmb_crops: expected 1 or more each, got {list(nmb_crops)}")
        scales = tuple(zip(min_scale_crops, max_scale_crops, strict=True))
        if not all(0 < low <= high <= 1 for low, high in scales):
            got = f"{list(min_scale_crops)} and {list(max_scale_crops)}"
            raise ValueError(f"min_scale_crops, max_scale_crops: expected 0 < min <= max <= 1, got {got}")
        if not 0 <= blur_sigma <= MAX_BLUR:
            raise ValueError(f"blur_sigma: expected 0 to {MAX_BLUR:g} pixels, got {blur_sigma:g}")
        for name, value in dict(hflip=hflip, vflip=vflip, color_strength=color_strength, grayscale=grayscale).items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name}: expected 0 to 1, got {value:g}")
        self.size_crops, self.nmb_crops, self.scales = tuple(size_crops), tuple(nmb_crops), scales
        self.blur_sigma, self.hflip, self.vflip = blur_sigma, hflip, vflip
        self.color_strength, self.grayscale = color_strength, grayscale

    def sample(
        self, sizes: Sequence[tuple[int, int]], rngs: Sequence[np.random.Generator]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Sample the crops of B images of these (width, height): boxes int64 [B, V, 4], params float32 [B, V, PARAMS].

        The crops of an image depend only on the state of its generator.
        """
        uniforms = np.stack([rng.random((sum(self.nmb_crops), UNIFORMS)) for rng in rngs])  # [B, V, UNIFORMS]
        scales = np.repeat(self.scales, self.nmb_crops, axis=0)  # [V, 2]
        boxes = sample_boxes(np.array(sizes)[:, None], scales, uniforms[..., :BOX_UNIFORMS])
        uniforms = uniforms[..., BOX_UNIFORMS:]
        params = sample_params(uniforms, self.blur_sigma, self.hflip, self.color_strength, self.grayscale)
        if self.vflip:  # drawn after the others, which are the same with and without it
            flips = np.stack([rng.random(sum(self.nmb_crops)) for rng in rngs])  # [B, V]
            by_name(params).vflip[...] = flips < self.vflip
        return boxes, params

    def crop(
        self, images: Sequence[Image.Image | torch.Tensor], rngs: Sequence[np.random.Generator]
    ) -> list[tuple[torch.Tensor, np.ndarray]]:
        """Crop B images, without augmentation except for vertical flips.

        Returns for each resolution of n crops: uint8 crops [n * B, 3, S, S] and their params [n * B, PARAMS], in the
        order of crops (the first crop of all images, then the second one).
        """
        pixels = [to_pixels(image) for image in images]
        boxes_and_params = self.sample([(image.shape[2], image.shape[1]) for image in pixels], rngs)
        resolutions, ends = [], np.cumsum(self.nmb_crops)[:-1]
        parts = (np.split(sampled.swapaxes(0, 1), ends) for sampled in boxes_and_params)  # of [V, B, ...]
        for size, boxes, params in zip(self.size_crops, *parts, strict=True):
            params = params.reshape(-1, PARAMS)
            places = zip(cycle(pixels), boxes.reshape(-1, 4).tolist(), by_name(params).vflip.tolist(), strict=False)
            with torch.inference_mode():  # entered once, as entering it for each crop takes a sixth of the time
                crops = [crop_and_resize(image, box, size)[:, :: -1 if vflip else 1] for image, box, vflip in places]
            # numpy stacks and splits colour planes three times as fast as torch
            resolutions.append((torch.from_numpy(np.stack(crops)), params))
        return resolutions

    def __call__(self, image: Image.Image | torch.Tensor, rng: np.random.Generator | None = None) -> list[torch.Tensor]:
        if rng is None:
            rng = np.random.default_rng(torch.randint(2**63 - 1, ()).item())
        resolutions = self.crop([image], [rng])
        return [crop for group in resolutions for crop in torch.from_numpy(augment_one_by_one(*group))]


def sample_boxes(sizes: np.ndarray, scales: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
    """Sample boxes (top, left, height, width): area uniform in scale, aspect log-uniform in [3/4, 4/3].

    Takes the first of ten attempts that fits the image, else the largest centred box of an allowed aspect.
    sizes [..., 2]: widths and heights of the images. scales [..., 2]: range of the area as a share of the image.
    uniforms [..., BOX_UNIFORMS] in [0, 1): areas and aspects of the attempts, and the place. Returns int64 [..., 4].
    """
    width, height = sizes[..., 0], sizes[..., 1]
    low, high = scales[..., :1], scales[..., 1:]
    side = np.sqrt((low + (high - low) * uniforms[..., :BOX_ATTEMPTS]) * (width * height)[..., None])
    root = (3 / 4) ** (0.5 - uniforms[..., BOX_ATTEMPTS : 2 * BOX_ATTEMPTS])  # of the aspect
    widths, heights = np.rint(side * root), np.rint(side / root)
    fit = (widths > 0) & (widths <= width[..., None]) & (heights > 0) & (heights <= height[..., None])
    found, first = fit.any(-1), fit.argmax(-1)[None, ..., None]
    box_width, box_height = np.take_along_axis(np.stack([widths, heights]), first, -1)[..., 0]
    box_width = np.where(found, box_width, np.minimum(width, np.rint(height * 4 / 3)))
    box_height = np.where(found, box_height, np.minimum(height, np.rint(width * 4 / 3)))
    down, across = uniforms[..., 2 * BOX_ATTEMPTS], uniforms[..., 2 * BOX_ATTEMPTS + 1]
    top = np.where(found, np.floor(down * (height - box_height + 1)), (height - box_height) // 2)
    left = np.where(found, np.floor(across * (width - box_width + 1)), (width - box_width) // 2)
    return np.stack([top, left, box_height, box_width], axis=-1).astype(np.int64)


def sample_params(
    uniforms: np.ndarray, blur_sigma: float, hflip: float, color_strength: float, grayscale: float
) -> np.ndarray:
    """Sample augmentation parameters float32 [..., PARAMS], from uniforms [..., 10] in [0, 1).

    The other arguments are those of MultiCrop. Vertical flips are left at 0.
    """
    min_sigma = min(MIN_BLUR, blur_sigma)
    flip, grey, is_blurred, sigma, is_jittered, order, hue, *factors = np.moveaxis(uniforms, -1, 0)
    is_jittered = is_jittered < JITTER_PROBABILITY
    order = (order * len(JITTER_ORDERS)).astype(np.int64)
    params = np.zeros((*uniforms.shape[:-1], PARAMS))
    named = by_name(params)
    named.hflip[...] = flip < hflip
    named.grey[...] = grey < grayscale
    named.sigma[...] = (is_blurred < BLUR_PROBABILITY) * (min_sigma + (blur_sigma - min_sigma) * sigma)
    named.hue[...] = is_jittered * color_strength * HUE_JITTER * (2 * hue - 1)
    blends = np.zeros((*order.shape, len(BLENDED_WITH), 3))
    blends[..., 0] = np.moveaxis(is_jittered * color_strength * BLEND_JITTER * (1 - 2 * np.stack(factors)), 0, -1)
    blends[..., 1:] = is_jittered[..., None, None] * np.array(list(BLENDED_WITH.values()))
    np.put_along_axis(named.blends, BLEND_SLOTS[order][..., None], blends, axis=-2)
    return params.astype(np.float32)


def has_16_bits(image: Image.Image) -> bool:
    """Whether an image has one channel of 16 bits."""
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))


def to_8_bits(values: np.ndarray, value_range: tuple[float, float] | None = None) -> np.ndarray:
    """Scale values to uint8, so that those of value_range (None: 0 and 65535) become 0 and 255; NaN becomes 0."""
    low, high = value_range or (0, 65535)
    scaled = (np.asarray(values, np.float64) - low) / ((high - low) / 255) + 0.5
    return np.nan_to_num(scaled).clip(0, 255).astype(np.uint8)


def to_pixels(image: Image.Image | torch.Tensor, value_range: tuple[float, float] | None = None) -> torch.Tensor:
    """Convert a PIL image to uint8 [3, H, W], stored pixel by pixel, which resizes fastest; return such a tensor as is.

    Transparent images are laid over white. value_range: the values that become 0 and 255 in images of 16 bits (None:
    0 and 65535) and in Pillow's modes I and F. Raises ValueError for another tensor, and UnreadableImage for the modes
    I and F without a value_range.
    """
    if torch.is_tensor(image):
        if image.dtype != torch.uint8 or image.ndim != 3 or len(image) != 3:
            raise ValueError(f"image: expected PIL or uint8 [3, H, W], got {image.dtype} {list(image.shape)}")
        return image
    if has_16_bits(image) or (image.mode in ("I", "F") and value_range):
        image = Image.fromarray(to_8_bits(image, value_range))
    elif image.mode in ("I", "F"):
        raise UnreadableImage(f"expected 8 or 16 bits a channel, got Pillow's mode {image.mode} of an unknown range")
    elif image.mode.endswith(("A", "a")) or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def crop_and_resize(pixels: torch.Tensor, box: Sequence[int], size: int) -> np.ndarray:
    """Crop a box (top, left, height, width) of uint8 [3, H, W] and resize it with antialias to [3, size, size]."""
    top, left, height, width = box
    part = pixels[None, :, top : top + height, left : left + width]
    return interpolate(part, (size, size), mode="bilinear", antialias=True)[0].numpy()


@torch.inference_mode()  # saves a tenth of the time
def augment_one_by_one(pixels: torch.Tensor, params: np.ndarray) -> np.ndarray:
    """Augment like `augment`, but one crop at a time, skipping operations that were not drawn; faster on one core.

    pixels: uint8 [N, 3, S, S]. params: float32 [N, PARAMS]. Returns float32 [N, 3, S, S].
    """
    images = pixels.float()
    black = images.new_zeros(1)
    values = (column.tolist() for column in by_name(params))
    for image, _, hflip, grey, sigma, hue, blends in zip(images.split(1), *values, strict=True):
        if hflip:
            image.copy_(image.flip(3))
        for slot, (weight, of_luminance, of_mean) in enumerate(blends):
            if slot == BLENDS // 2 and hue:
                adjust_hue(image, hue)
            if weight:
                other = black
                if of_luminance or of_mean:
                    other = to_grey(image if of_luminance else image.mean((2, 3), keepdim=True))
                image.lerp_(other, weight).clamp_(0, 255)
        grey_or_colour = to_grey(image) if grey else image
        if sigma:
            blur(grey_or_colour, sigma)
        if grey:
            image.copy_(grey_or_colour)
    return normalize(images).numpy()  # numpy, as an inference tensor could not be trained on


# Operations on images float32 [N, 3, S, S] with values from 0 to 255, in place. Factors are numbers, or tensors
# [N, 1, 1, 1] with one per image. They use lerp and no copies: on a CPU `where` costs as much as ten additions, and
# new memory as much as one.


def to_grey(images: torch.Tensor) -> torch.Tensor:
    """[N, 3, S, S] -> luminance [N, 1, S, S]."""
    red, green, blue = images.split(1, dim=1)
    return torch.mul(red, 0.299).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def adjust_hue(images: torch.Tensor, turns: float | torch.Tensor) -> None:
    """Shift the hue by at most 1/2 turn of the colour circle, keeping HSV's value and chroma."""
    red, green, blue = images.split(1, dim=1)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = torch.minimum(torch.minimum(red, green), blue).sub_(value).neg_()
    # The hue in sixths of a turn from red, times chroma, by the largest channel. Grey has chroma 0, whatever its hue.
    hue = torch.sub(red, green).add_(chroma, alpha=4)
    is_largest = torch.eq(value, green, out=torch.empty_like(value))
    hue.lerp_(torch.sub(blue, red).add_(chroma, alpha=2), is_largest)
    hue.lerp_(green - blue, torch.eq(value, red, out=is_largest))
    hue.div_((6 * chroma).clamp_(min=1e-9)).add_(turns)
    # Distance of the hue to each channel's own, in turns and the short way round: 1/2 - | |distance| - 1/2 |.
    # Within 1/6 the channel has the full value, beyond 1/3 the value minus the chroma.
    value.sub_(chroma, alpha=2)
    for third, channel in enumerate((red, green, blue)):
        nearness = torch.sub(hue, third / 3, out=is_largest).abs_().sub_(0.5).abs_().clamp_(1 / 6, 1 / 3)
        channel.copy_(value).addcmul_(chroma, nearness, value=6)


def normalize(images: torch.Tensor) -> torch.Tensor:
    """Subtract the mean, divide by std, in place; by channel, as a tensor of constants would have to be copied."""
    for channel, mean, std in zip(images.unbind(-3), MEAN, STD, strict=True):
        channel.sub_(255 * mean).mul_(1 / (255 * std))
    return images


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Undo `normalize`: pixels uint8 of normalised images [..., 3, H, W]."""
    mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (255 * (images * std + mean)).round().clamp(0, 255).to(torch.uint8)


def blur(images: torch.Tensor, sigma: float) -> None:
    """Blur all images, in place, with one Gaussian of sigma pixels, cut off at 3 sigma, reflected at the borders."""
    radius, size = math.ceil(3 * sigma), images.shape[3]
    kernel = [math.exp(-0.5 * (offset / sigma) ** 2) for offset in range(radius + 1)]
    total = kernel[0] + 2 * sum(kernel[1:])
    for axis in (2, 3):
        padding = (0, 0, radius, radius) if axis == 2 else (radius, radius, 0, 0)
        padded = pad(images, padding, mode="reflect")
        torch.mul(padded.narrow(axis, radius, size), kernel[0] / total, out=images)
        for offset in range(1, radius + 1):
            for start in (radius - offset, radius + offset):
                images.add_(padded.narrow(axis, start, size), alpha=kernel[offset] / total)


def augment(pixels: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
    """Flip, colour jitter, greyscale, blur and normalise a batch of crops, each by its own parameters.

    pixels: uint8 [N, 3, S, S]. params: float32 [N, PARAMS], on the same device. Returns float32 [N, 3, S, S].
    Every crop goes through every operation; parameters that were not drawn leave it unchanged. So nothing depends on
    values, and the host never waits for the device.
    """
    params = by_name(params)
    hflip, grey, hue = (column.view(-1, 1, 1, 1) for column in (params.hflip, params.grey, params.hue))
    images = pixels.float()
    images.lerp_(images.flip(3), hflip)
    for slot, blend in enumerate(params.blends.unbind(1)):
        if slot == BLENDS // 2:
            adjust_hue(images, hue)
        weight, of_luminance, of_mean = (column.view(-1, 1, 1, 1) for column in blend.unbind(1))
        luminance = to_grey(images)
        mean = luminance.mean((2, 3), keepdim=True) * of_mean
        images.lerp_(luminance.mul_(of_luminance).add_(mean), weight).clamp_(0, 255)
    images.lerp_(to_grey(images), grey)
    return blur_each(normalize(images), params.sigma)  # blurring after normalising gives the same


def blur_each(images: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """Blur each image like `blur`, with its own of sigmas [N]; 0 leaves it as it is.

    By matrix products, in blocks of columns, as the kernel reaches at most BLUR_REACH pixels to each side.
    """
    size, block, sigmas = images.shape[3], 64, sigmas.view(-1, 1, 1)
    offsets = torch.arange(-BLUR_REACH, BLUR_REACH + 1, device=sigmas.device)
    kernels = torch.exp(-0.5 * (offsets / sigmas.clamp(min=1e-3)) ** 2)
    kernels = kernels.masked_fill_(offsets.abs() > torch.ceil(3 * sigmas), 0)
    kernels = kernels / kernels.sum(2, keepdim=True)  # [N, 1, offsets]
    rows = torch.arange(size, device=sigmas.device).unsqueeze(1)
    columns = (size - 1) - ((size - 1) - (rows + offsets).abs()).abs()  # [size, offsets]
    weights = kernels.new_zeros(len(kernels), size, size)  # of the blur along one axis
    weights.scatter_add_(2, columns.expand(len(kernels), -1, -1), kernels.expand(-1, size, -1))
    for _ in range(2):  # along one axis, which becomes the other one
        lines = images.mT.flatten(1, 2)  # [N, 3 * S, S]
        blocks = []
        for start in range(0, size, block):
            near = slice(max(start - BLUR_REACH, 0), start + block + BLUR_REACH)
            blocks.append(lines[:, :, near] @ weights[:, start : start + block, near].mT)
        images = torch.cat(blocks, dim=2).unflatten(1, (3, size))
    return images


# Transforms of the evaluation


class ProbeCrop:
    """Training transform of a linear probe: random resized crop (area 0.08 to 1) and flip -> normalised [3, S, S].

    hflip: probability of a horizontal flip.
    """

    def __init__(self, size: int, hflip: float = 0.5) -> None:
        self.size, self.hflip = size, hflip

    def __call__(self, image: Image.Image | torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        pixels, (*uniforms, flip) = to_pixels(image), rng.random(BOX_UNIFORMS + 1)
        size = np.array([pixels.shape[2], pixels.shape[1]])
        box = sample_boxes(size, np.array([0.08, 1.0]), np.array(uniforms))
        crop = torch.from_numpy(crop_and_resize(pixels, box.tolist(), self.size))
        return normalize((crop.flip(2) if flip < self.hflip else crop).float())


LONGEST = 8  # longer side of an image over the shorter one


class CentreCrop:
    """Validation transform: resize the shorter side to `resize` pixels, crop the centre -> normalised [3, S, S].

    value_range: of PIL images of 16 bits, see `to_pixels`.
    """

    def __init__(self, resize: int, size: int, value_range: tuple[float, float] | None = None) -> None:
        self.resize, self.size, self.value_range = resize, size, value_range

    def __call__(self, image: Image.Image | torch.Tensor, rng: np.random.Generator | None = None) -> torch.Tensor:
        pixels = to_pixels(image, self.value_range)
        longest = LONGEST * min(pixels.shape[1:])  # of which the centre is enough; all of it could take gigabytes
        if max(pixels.shape[1:]) > longest:
            pixels = F.center_crop(pixels, [min(side, longest) for side in pixels.shape[1:]])
        resized = F.resize(pixels, [self.resize], antialias=True)
        return normalize(F.center_crop(resized, [self.size, self.size]).float().contiguous())


def expected_crop(checkpoint: Mapping, size: int | None = None, resize: int | None = None) -> CentreCrop:
    """The transform that a checkpoint's weights expect, of the sizes of its evaluation (224 of 256 pixels if unknown).

    checkpoint: as torch.load gives it, see checkpoint.py. size, resize: in pixels, instead of these. Raises
    ValueError if resize is smaller than size.
    """
    known = checkpoint if isinstance(checkpoint.get("options"), dict) else {}  # other programs save other things
    crop = max(known.get("options", {}).get("size_crops") or [224])
    known_size, known_resize = known.get("sizes") or (crop, round(crop * 8 / 7))
    size = size or known_size
    resize = resize or round(size * known_resize / known_size)
    if resize < size:
        raise ValueError(f"resize: expected at least the {size} pixels of size, got {resize}")
    return CentreCrop(resize, size, known.get("value_range"))


# Batches and loaders


class ShuffledBatches(Sampler):
    """Batches of (epoch, index) for one process; each image comes once an epoch over all processes.

    The order depends only on (seed, epoch). Step s takes the s-th block of batch_size * world_size images, and each
    process its part of that block. So a run may resume on another number of processes with the same global batch. An
    incomplete last batch is dropped. Set `epoch` before iterating, and `first_step` to begin with a later step.
    """

    def __init__(self, images: int, batch_size: int, *, seed: int = 0, rank: int = 0, world_size: int = 1) -> None:
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = self.first_step = 0

    def __len__(self) -> int:
        return self.images // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.images)
        for step in range(self.first_step, len(self)):
            start = (step * self.world_size + self.rank) * self.batch_size
            yield [(self.epoch, index) for index in order[start : start + self.batch_size].tolist()]


READ_ATTEMPTS, READ_ATTEMPTS_TAG = 50, 0xBAD  # images to try for one; if all are bad, something is wrong


def readable_image(images: Dataset, seed: int, epoch: int, index: int) -> tuple[Image.Image | torch.Tensor, int]:
    """Return images[index], or another image where that is unreadable: which one depends on (seed, epoch, index) alone.

    Raises UnreadableImage after READ_ATTEMPTS images.
    """
    try:
        return images[index]
    except UnreadableImage as error:
        first = error
    others = np.random.default_rng((seed, epoch, index, READ_ATTEMPTS_TAG))
    for other in others.integers(len(images), size=READ_ATTEMPTS - 1).tolist():
        with suppress(UnreadableImage):
            return images[other]
    raise UnreadableImage(f"{first}; {READ_ATTEMPTS - 1} other images, tried in its place, cannot be read either")


LOADER_TIMEOUT = 300  # seconds to wait for a batch of the workers
MAX_BATCH_BYTES = 2**26  # decoded images to hold at a time: a batch of photographs would fill a worker's memory


class CroppedBatches(Dataset):
    """Keys (epoch, index) -> for each resolution (uint8 crops [n, B, 3, S, S], params float32 [n, B, PARAMS]), labels.

    n: its number of crops. `crops_to_device` turns them into what MultiCrop gives as the transform of SeededImages.
    """

    def __init__(self, images: Dataset, multi_crop: MultiCrop, seed: int = 0) -> None:
        self.images, self.multi_crop, self.seed = images, multi_crop, seed

    def __getitems__(
        self, keys: Sequence[tuple[int, int]]
    ) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
        parts, images, rngs, labels = [], [], [], []
        for epoch, index in keys:
            image, label = readable_image(self.images, self.seed, epoch, index)
            images.append(to_pixels(image))
            rngs.append(np.random.default_rng((self.seed, epoch, index)))
            labels.append(label)
            if len(labels) == len(keys) or sum(map(torch.numel, images)) > MAX_BATCH_BYTES:
                parts.append(self.multi_crop.crop(images, rngs))
                images, rngs = [], []
        batch = []
        for count, of_parts in zip(self.multi_crop.nmb_crops, zip(*parts, strict=True), strict=True):
            crops = torch.cat([crops.unflatten(0, (count, -1)) for crops, _ in of_parts], dim=1)
            params = np.concatenate([params.reshape(count, -1, PARAMS) for _, params in of_parts], axis=1)
            batch.append((crops, torch.from_numpy(params)))
        return batch, torch.tensor(labels)


class SeededImages(Dataset):
    """(epoch, index) -> (transform(image, rng), label), with a generator that depends only on (seed, epoch, index)."""

    def __init__(self, images: Dataset, transform: Callable, seed: int = 0) -> None:
        self.images, self.transform, self.seed = images, transform, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[list[torch.Tensor] | torch.Tensor, int]:
        epoch, index = key
        image, label = readable_image(self.images, self.seed, epoch, index)
        return self.transform(image, np.random.default_rng((self.seed, epoch, index))), label


def training_loader(
    images: Dataset,
    transform: Callable,
    batch_size: int,
    *,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    pin_memory: bool = False,
    crop_only: bool = False,
) -> DataLoader:
    """Make a loader of shuffled batches (transformed images, labels [B]); batch_size is per process.

    crop_only: workers only crop (the transform is a MultiCrop), and `crops_to_device` augments on the device.
    Begin each epoch with `start_epoch`. Worker processes stay alive between epochs.
    """
    return DataLoader(
        CroppedBatches(images, transform, seed) if crop_only else SeededImages(images, transform, seed),
        batch_sampler=ShuffledBatches(len(images), batch_size, seed=seed, rank=rank, world_size=world_size),
        collate_fn=tuple if crop_only else None,  # tuple: CroppedBatches gives whole batches
        generator=torch.Generator(),  # a loader draws a seed for each epoch: not from the generator that runs save
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        **_worker_options(workers),
    )


def start_epoch(loader: DataLoader, epoch: int, first_step: int = 0) -> Iterator:
    """Begin an epoch of a `training_loader`: its batches from `first_step` on. Workers start to load at once."""
    loader.batch_sampler.epoch, loader.batch_sampler.first_step = epoch, first_step
    return iter(loader)


def crops_to_device(
    batch: Sequence[torch.Tensor | tuple[torch.Tensor, torch.Tensor]],
    device: torch.device,
    *,
    memory_format: torch.memory_format = torch.contiguous_format,
    stream: "torch.cuda.Stream | None" = None,
    augment: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = augment,
    parts: int = 1,
) -> list[torch.Tensor]:
    """Copy the crops of a `training_loader` with MultiCrop to the device: V crops float32 [B, 3, S, S].

    Crops of a loader with crop_only are augmented there. stream: a CUDA stream for copies and augmentation, so that
    they overlap with the step before; the current stream waits for it, the host does not. augment: `augment`, or a
    compiled one. parts: augment the crops of one size in so many parts, to save memory.
    """
    crops = []
    with torch.cuda.stream(stream):  # does nothing for None
        for part in batch:
            if torch.is_tensor(part):  # a crop that the workers augmented
                crops.append(part.to(device, non_blocking=True, memory_format=memory_format))
            else:
                pixels, params = (tensor.to(device, non_blocking=True) for tensor in part)
                chunks = zip(pixels.flatten(0, 1).chunk(parts), params.flatten(0, 1).chunk(parts), strict=True)
                images = [augment(*chunk).contiguous(memory_format=memory_format) for chunk in chunks]
                crops += (torch.cat(images) if parts > 1 else images[0]).chunk(len(pixels))
    if stream is not None:
        current = torch.cuda.current_stream(device)
        current.wait_stream(stream)
        for crop in crops:
            crop.record_stream(current)
    return crops


LEFT_OUT = -2  # the label of an image that an `ordered_loader` cannot read


class BlackIfUnreadable(Dataset):
    """The images of a Dataset, with (a black image, LEFT_OUT) in the place of those that cannot be read."""

    def __init__(self, images: Dataset) -> None:
        self.images = images

    def __getitem__(self, index: int) -> tuple[Image.Image | torch.Tensor, int]:
        try:
            return self.images[index]
        except UnreadableImage:
            return torch.zeros(3, 1, 1, dtype=torch.uint8), LEFT_OUT


def ordered_loader(
    images: Dataset,
    transform: Callable,
    batch_size: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader:
    """Make a loader of every image once, in order: this process's share (rank, rank + world_size, ...).

    An image that cannot be read keeps its place, as a black one with the label LEFT_OUT, for the caller to leave out.
    """
    share = [(0, index) for index in range(rank, len(images), world_size)]
    return DataLoader(
        SeededImages(BlackIfUnreadable(images), transform),
        batch_size=batch_size,
        sampler=share,
        pin_memory=pin_memory,
        **_worker_options(workers),
    )


def batch_bytes(multi_crop: MultiCrop, batch_size: int, *, crop_only: bool) -> int:
    """Bytes of a batch of a `training_loader`: uint8 crops and their parameters with crop_only, else float32 crops."""
    params, pixel = (4 * PARAMS, 3) if crop_only else (0, 12)  # bytes
    counts = zip(multi_crop.size_crops, multi_crop.nmb_crops, strict=True)
    return batch_size * sum(count * (params + pixel * size**2) for size, count in counts)


def _worker_options(workers: int) -> dict:
    if not workers:
        return {}
    # Ends workers before Python waits for its daemons, which would take forever.
    multiprocessing.util.Finalize(None, end_workers, exitpriority=100)
    options = dict(num_workers=workers, worker_init_fn=_start_worker, timeout=LOADER_TIMEOUT)
    if sys.platform == "linux":
        options["multiprocessing_context"] = "fork"  # shares images in memory; not the default from Python 3.14 on
    return options


def _start_worker(_worker: int) -> None:
    """Leave signals to the parent, which ends its workers when it has decided what a signal means."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):  # some systems have no SIGUSR1
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    # Image errors reach the parent by another way. This silences Python's memory-sharing thread after the parent's end.
    sys.excepthook = lambda *_: None
    gc.freeze()  # a garbage collection would write to all objects of the parent, and so copy their memory
    reuse_freed_memory()


def end_workers() -> None:
    """Kill this process's loader workers, and other daemons, at its end: they ignore signals."""
    if threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch reports killed workers by it
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def reuse_freed_memory() -> None:
    """Make glibc keep the memory of freed tensors, instead of returning it to the system.

    Memory that comes back has to be cleared page by page, which took a third of the time of multi-crop on a CPU and a
    tenth of that of training. Blocks above 32 MiB are still returned: the gaps that they leave between small ones
    would add up. Does nothing with other C libraries.
    """
    if sys.platform != "linux":
        return
    with suppress(AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD
