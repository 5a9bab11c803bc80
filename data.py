"""Image sets, multi-crop and loaders for SwAV (Caron et al. 2020, section 3.2 and appendix A).

    # sides in pixels, numbers of crops, smallest and largest shares of the image's area
    transform = MultiCrop([224, 96], [2, 6], [0.14, 0.05], [1, 0.14])
    crops = transform(pil_image)    # list of 8 tensors [3, S, S], float32, normalised

Everything random about an image's crops follows from (seed, epoch, index of the image) alone, and the order of the
images from (seed, epoch): neither workers nor processes change what a run sees.
Copy this file to use it elsewhere: it needs torch and torchvision alone.
"""

import ctypes
import gzip
import io
import math
import os
import shutil
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import permutations
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torch.nn.functional import interpolate, pad
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from torchvision.transforms.v2 import functional as F

try:  # which torchvision will drop some day
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:
    decode_jpeg = None

# 0.228 (not the usual 0.229) is what the published weights were trained with.
MEAN, STD = (0.485, 0.456, 0.406), (0.228, 0.224, 0.225)

DATASETS = ("shapes", "folder", "cifar10", "cifar100", "stl10", "fashion_mnist")


# Multi-crop. What becomes of a crop is drawn as a box of the image and a row of numbers; the box is cut out as uint8,
# and the rest is done to that, in float, one by one (augment_singly) or in batches on the device (augment).

JITTER = {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8}
HUE_JITTER = 0.2
JITTER_ORDERS = tuple(permutations((*JITTER, "hue")))
BOX_ATTEMPTS = 10
BOX_UNIFORMS = 2 * BOX_ATTEMPTS + 2
UNIFORMS = BOX_UNIFORMS + 10  # numbers that decide a crop
# A row: flip (0 or 1), grey (0 or 1), sigma of the blur in pixels (0 for none), hue in turns, and then three numbers
# for each of six steps, of which any three are unused: three before the hue is turned and three after it. Brightness,
# contrast and saturation all draw an image towards another: black, its mean luminance, its luminance. The numbers are
# how far, 0 for an unused step, and what the other image has of the luminance and of its mean.
STEPS = 6
ROW = 4 + 3 * STEPS


def step_of(name: str, order: Sequence[str]) -> int:
    """At which of the STEPS an operation of this order is done."""
    place, hue = order.index(name), order.index("hue")
    return place if place < hue else STEPS // 2 + place - hue - 1


# Where in a row the numbers of brightness, contrast and saturation stand, by the number of the order: [24, 9].
COLUMNS = np.array([[4 + 3 * step_of(name, order) + i for name in JITTER for i in range(3)] for order in JITTER_ORDERS])
LEAST_BLUR, MOST_BLUR = 0.1, 2.0  # sigmas in pixels, published for crops of 224 and of 96 pixels
SMALLEST_CROP = 7  # the blur's largest kernel reaches 6 pixels, and reflects at the border


class MultiCrop:
    """Image -> list of crops, V = sum(nmb_crops) float32 tensors [3, S, S], mean subtracted, divided by std.

    size_crops, nmb_crops, min_scale_crops, max_scale_crops: per resolution, the crops' side in pixels, their number,
    and the range of the area they cut out, as a share of the image. blur_sigma: of the strongest blur, in pixels; 0 for
    none. Use it as the transform of any Dataset of images, PIL or uint8 [3, H, W]. Randomness comes from `rng`, or from
    torch's global generator (which DataLoader seeds in each worker).
    Raises ValueError for lists of unequal length or values out of range.
    """

    def __init__(
        self,
        size_crops: Sequence[int],
        nmb_crops: Sequence[int],
        min_scale_crops: Sequence[float],
        max_scale_crops: Sequence[float],
        blur_sigma: float = MOST_BLUR,
    ) -> None:
        lists = dict(size_crops=size_crops, nmb_crops=nmb_crops)
        lists |= dict(min_scale_crops=min_scale_crops, max_scale_crops=max_scale_crops)
        for name, values in lists.items():
            if len(values) != len(size_crops):
                raise ValueError(
                    f"{name}: expected {len(size_crops)} values, one for each of size_crops {list(size_crops)}, "
                    f"got {list(values)}"
                )
        if min(size_crops, default=0) < SMALLEST_CROP:
            raise ValueError(f"size_crops: expected {SMALLEST_CROP} pixels or more each, got {list(size_crops)}")
        if min(nmb_crops) < 1:
            raise ValueError(f"nmb_crops: expected 1 or more each, got {list(nmb_crops)}")
        for low, high in zip(min_scale_crops, max_scale_crops, strict=True):
            if not 0 < low <= high <= 1:
                raise ValueError(
                    "min_scale_crops, max_scale_crops: expected 0 < min <= max <= 1, "
                    f"got {list(min_scale_crops)} and {list(max_scale_crops)}"
                )
        if not 0 <= blur_sigma <= MOST_BLUR:
            raise ValueError(f"blur_sigma: expected 0 to {MOST_BLUR:g} pixels, got {blur_sigma:g}")
        self.size_crops, self.nmb_crops = tuple(size_crops), tuple(nmb_crops)
        self.scales = tuple(zip(min_scale_crops, max_scale_crops, strict=True))
        self.blur_sigma = blur_sigma

    def sample(
        self, sizes: Sequence[tuple[int, int]], rngs: Sequence[np.random.Generator]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draw the crops of B images of these (width, height): boxes int64 [B, V, 4], rows float32 [B, V, ROW].

        The same state of an image's generator gives the same crops.
        """
        uniforms = np.stack([rng.random((sum(self.nmb_crops), UNIFORMS)) for rng in rngs])  # [B, V, UNIFORMS]
        scales = np.repeat(self.scales, self.nmb_crops, axis=0)  # [V, 2]
        boxes = sample_boxes(np.array(sizes)[:, None], scales, uniforms[..., :BOX_UNIFORMS])
        return boxes, sample_rows(uniforms[..., BOX_UNIFORMS:], self.blur_sigma)

    def cut(
        self, images: Sequence[Image.Image | torch.Tensor], rngs: Sequence[np.random.Generator]
    ) -> list[tuple[torch.Tensor, np.ndarray]]:
        """Cut crops out of B images: for each resolution, with n crops, uint8 [n * B, 3, S, S], rows [n * B, ROW].

        In the order of crops: the first of all images, then the second.
        """
        pixels = [to_pixels(image) for image in images]
        boxes, rows = self.sample([(image.shape[2], image.shape[1]) for image in pixels], rngs)
        groups, start = [], 0
        for size, count in zip(self.size_crops, self.nmb_crops, strict=True):
            nth = slice(start, start + count)
            of_crops = boxes[:, nth].swapaxes(0, 1).tolist()
            with torch.inference_mode():  # once for all, as entering it for each crop takes a sixth of the time
                cut = [cut_crop(*which, size) for of_crop in of_crops for which in zip(pixels, of_crop, strict=True)]
            # numpy takes the colours apart three times as fast as torch
            groups.append((torch.from_numpy(np.stack(cut)), rows[:, nth].swapaxes(0, 1).reshape(-1, ROW)))
            start += count
        return groups

    def __call__(self, image: Image.Image | torch.Tensor, rng: np.random.Generator | None = None) -> list[torch.Tensor]:
        if rng is None:
            rng = np.random.default_rng(torch.randint(2**63 - 1, ()).item())
        return [
            crop for pixels, rows in self.cut([image], [rng]) for crop in torch.from_numpy(augment_singly(pixels, rows))
        ]


def sample_boxes(sizes: np.ndarray, scales: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
    """(top, left, height, width) of random boxes: area uniform in scale, aspect log-uniform in [3/4, 4/3].

    Ten attempts to fit a box into its image, then the largest centred box of an allowed aspect. sizes [..., 2]: widths
    and heights of the images; scales [..., 2]: of the area; uniforms [..., BOX_UNIFORMS] in [0, 1): areas and aspects
    of the attempts, and the place. Returns int64 [..., 4].
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


def sample_rows(uniforms: np.ndarray, blur_sigma: float) -> np.ndarray:
    """Rows float32 [..., ROW] from uniforms [..., 10] in [0, 1) and the largest sigma of the blur."""
    least_blur = min(LEAST_BLUR, blur_sigma)
    flip, grey, blurred, sigma, jittered, order, hue, *factors = np.moveaxis(uniforms, -1, 0)
    jittered, order = jittered < 0.8, (order * len(JITTER_ORDERS)).astype(np.int64)
    rows = np.zeros((*uniforms.shape[:-1], ROW))
    rows[..., 0] = flip < 0.5
    rows[..., 1] = grey < 0.2
    rows[..., 2] = (blurred < 0.5) * (least_blur + (blur_sigma - least_blur) * sigma)
    rows[..., 3] = jittered * HUE_JITTER * (2 * hue - 1)
    numbers = [
        number
        for (name, strength), factor in zip(JITTER.items(), factors, strict=True)
        for number in (
            jittered * strength * (1 - 2 * factor),
            jittered * (name == "saturation"),
            jittered * (name == "contrast"),
        )
    ]
    np.put_along_axis(rows, COLUMNS[order], np.stack(numbers, axis=-1), axis=-1)
    return rows.astype(np.float32)


def to_pixels(image: Image.Image | torch.Tensor) -> torch.Tensor:
    """PIL image, or uint8 [3, H, W] as it is -> uint8 [3, H, W]; red, green and blue side by side in memory.

    Resizing is fastest on those. 16 bits are scaled to 8. Raises ValueError for another tensor, and for images whose
    largest value is unknown (Pillow's modes F and I, except of PNG and PGM files).
    """
    if not torch.is_tensor(image):
        if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):  # 16 bits
            image = Image.fromarray((np.asarray(image) / 257 + 0.5).astype(np.uint8))
        if image.mode in ("I", "F"):
            raise ValueError(f"expected 8 or 16 bits a channel, got Pillow's mode {image.mode}")
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    if image.dtype != torch.uint8 or image.ndim != 3 or len(image) != 3:
        raise ValueError(f"image: expected PIL or uint8 [3, H, W], got {image.dtype} {list(image.shape)}")
    return image


def cut_crop(pixels: torch.Tensor, box: Sequence[int], size: int) -> np.ndarray:
    """A box (top, left, height, width) of an image uint8 [3, H, W], resized with antialias: uint8 [3, size, size]."""
    top, left, height, width = box
    part = pixels[None, :, top : top + height, left : left + width]
    return interpolate(part, (size, size), mode="bilinear", antialias=True)[0].numpy()


@torch.inference_mode()  # a tenth of the time
def augment_singly(pixels: torch.Tensor, rows: np.ndarray) -> np.ndarray:
    """What `augment` does, but each crop goes through its own operations alone: the cheaper way on a CPU's one core.

    pixels: uint8 [N, 3, S, S]. rows: float32 [N, ROW]. Returns float32 [N, 3, S, S].
    """
    images = pixels.float()
    black = images.new_zeros(1)
    for i, (flip, grey, sigma, hue, *steps) in enumerate(rows.tolist()):
        image = images[i : i + 1]
        if flip:
            image.copy_(image.flip(3))
        for step in range(STEPS):
            share, of_luminance, of_mean = steps[3 * step : 3 * step + 3]
            if step == STEPS // 2 and hue:
                adjust_hue(image, hue)
            if share:
                other = black
                if of_luminance or of_mean:
                    other = to_grey(image if of_luminance else image.mean((2, 3), keepdim=True))
                image.lerp_(other, share).clamp_(0, 255)
        seen = to_grey(image) if grey else image
        if sigma:
            blur(seen, sigma)
        if grey:
            image.copy_(seen)
    return normalize(images).numpy()  # not an inference tensor, which could not be trained on


# Operations on images float32 [N, 3, S, S], from 0 to 255, in place; factors are numbers, or tensors [N, 1, 1, 1] of
# one per image. On a CPU `where` costs as much as ten additions, new memory as much as one: hence lerp and no copies.

GREY = (0.299, 0.587, 0.114)


def to_grey(images: torch.Tensor) -> torch.Tensor:
    """[N, 3, S, S] -> luminance [N, 1, S, S]."""
    red, green, blue = images.split(1, dim=1)
    return torch.mul(red, GREY[0]).add_(green, alpha=GREY[1]).add_(blue, alpha=GREY[2])


def adjust_hue(images: torch.Tensor, turns: float | torch.Tensor) -> torch.Tensor:
    """Turn the hue by a share of the colour circle, at most 1/2; value and chroma stay."""
    red, green, blue = images.split(1, dim=1)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = torch.minimum(torch.minimum(red, green), blue).sub_(value).neg_()
    # Sixths of the circle from red, times chroma, by the largest channel; grey has no chroma, whatever its hue.
    hue = torch.sub(red, green).add_(chroma, alpha=4)
    is_largest = torch.eq(value, green, out=torch.empty_like(value))
    hue.lerp_(torch.sub(blue, red).add_(chroma, alpha=2), is_largest)
    hue.lerp_(green - blue, torch.eq(value, red, out=is_largest))
    hue.div_((6 * chroma).clamp_(min=1e-9)).add_(turns)
    # How far the hue is from each channel's own, in turns and the short way round: 1/2 - | |distance| - 1/2 |.
    # Within 1/6 the channel has the full value, beyond 1/3 it lacks all the chroma.
    value.sub_(chroma, alpha=2)
    for third, channel in enumerate((red, green, blue)):
        nearness = torch.sub(hue, third / 3, out=is_largest).abs_().sub_(0.5).abs_().clamp_(1 / 6, 1 / 3)
        channel.copy_(value).addcmul_(chroma, nearness, value=6)
    return images


def normalize(images: torch.Tensor) -> torch.Tensor:
    """Mean subtracted, divided by std. Channel by channel, as constants in a tensor would have to go to the device."""
    for channel, mean, std in zip(images.unbind(-3), MEAN, STD, strict=True):
        channel.sub_(255 * mean).mul_(1 / (255 * std))
    return images


def blur(images: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian blur of one standard deviation in pixels for all images, reflected at the borders, cut at 3 sigma."""
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
    return images


def augment(pixels: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Flip, colour jitter, greyscale, blur and normalise crops uint8 [N, 3, S, S], each by its row of MultiCrop.sample.

    rows: float32 [N, ROW], on the same device. Returns float32 [N, 3, S, S]. Every crop goes through every operation,
    with numbers that leave it as it is where an operation was not drawn: so nothing waits for the device.
    """
    flip, grey, sigma, turns, *steps = rows.view(-1, ROW, 1, 1, 1).unbind(1)
    images = pixels.float()
    images = images.lerp_(images.flip(3), flip)
    for step in range(STEPS):
        if step == STEPS // 2:
            images = adjust_hue(images, turns)
        images = blend(images, *steps[3 * step : 3 * step + 3])
    images = normalize(images.lerp_(to_grey(images), grey))
    return blur_each(images, blur_weights(pixels.shape[3], sigma))  # which leaves mean and std alone


def blend(images: torch.Tensor, share: torch.Tensor, of_luminance: torch.Tensor, of_mean: torch.Tensor) -> torch.Tensor:
    """Images drawn by a share towards of_luminance * luminance + of_mean * its mean; all three [N, 1, 1, 1]."""
    luminance = to_grey(images)
    mean = luminance.mean((2, 3), keepdim=True) * of_mean
    return images.lerp_(luminance.mul_(of_luminance).add_(mean), share).clamp_(0, 255)


def blur_weights(size: int, sigmas: torch.Tensor) -> torch.Tensor:
    """[N] standard deviations -> [N, size, size] weights of a Gaussian blur along one axis.

    Reflected at the borders, cut at 3 sigma; the identity where sigma is 0.
    """
    sigmas = sigmas.view(-1, 1, 1)
    offsets = torch.arange(1 - SMALLEST_CROP, SMALLEST_CROP, device=sigmas.device)
    kernels = torch.exp(-0.5 * (offsets / sigmas.clamp(min=1e-3)) ** 2)
    kernels = kernels.masked_fill_(offsets.abs() > torch.ceil(3 * sigmas), 0)
    kernels = kernels / kernels.sum(2, keepdim=True)  # [N, 1, offsets]
    rows = torch.arange(size, device=sigmas.device).unsqueeze(1)
    columns = (size - 1) - ((size - 1) - (rows + offsets).abs()).abs()  # [size, offsets]
    weights = kernels.new_zeros(len(kernels), size, size)
    return weights.scatter_add_(2, columns.expand(len(kernels), -1, -1), kernels.expand(-1, size, -1))


def blur_each(images: torch.Tensor, weights: torch.Tensor, block: int = 64) -> torch.Tensor:
    """`blur` with a sigma for each image, by weights of `blur_weights`.

    By blocks of columns, as a pixel depends on less than SMALLEST_CROP others to each side.
    """
    size, reach = images.shape[3], SMALLEST_CROP - 1
    for _ in range(2):  # along one axis, which becomes the other one
        lines = images.mT.flatten(1, 2)  # [N, 3 * S, S]
        blocks = []
        for start in range(0, size, block):
            near = slice(max(start - reach, 0), start + block + reach)
            blocks.append(lines[:, :, near] @ weights[:, start : start + block, near].mT)
        images = torch.cat(blocks, dim=2).unflatten(1, (3, size))
    return images


# Transforms of the linear probe


class ProbeCrop:
    """Training transform of a probe: random resized crop (area 0.08 to 1) and flip -> normalised [3, S, S]."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, image: Image.Image | torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        pixels, (*uniforms, flip) = to_pixels(image), rng.random(BOX_UNIFORMS + 1)
        size = np.array([pixels.shape[2], pixels.shape[1]])
        box = sample_boxes(size, np.array([0.08, 1.0]), np.array(uniforms))
        cut = torch.from_numpy(cut_crop(pixels, box.tolist(), self.size))
        return normalize((cut.flip(2) if flip < 0.5 else cut).float())


class CentreCrop:
    """Validation transform: shorter side to `resize` pixels, centre crop of `size` -> normalised [3, S, S]."""

    def __init__(self, resize: int, size: int) -> None:
        self.resize, self.size = resize, size

    def __call__(self, image: Image.Image | torch.Tensor, rng: np.random.Generator | None = None) -> torch.Tensor:
        resized = F.resize(to_pixels(image), [self.resize], antialias=True)
        return normalize(F.center_crop(resized, [self.size, self.size]).float().contiguous())


# Image sets: item -> (uint8 [3, H, W], label), label -1 where there is none


def is_image_file(path: str) -> bool:
    """By its name; hidden ones, which systems and editors leave beside images, are none."""
    name = os.path.basename(path)
    return name.lower().endswith(IMG_EXTENSIONS) and not name.startswith(".")


def _leave_out(error: OSError) -> None:
    warnings.warn(f"data_path: {error.filename} is left out: {error.strerror}", stacklevel=2)


class ImageFiles(Dataset):
    """Every image file below a folder, at any depth, in the order of their paths; no labels. Hidden ones are left out.

    Warns of folders that cannot be read. Raises ValueError if the folder is missing or holds no image.
    """

    def __init__(self, root: str | os.PathLike) -> None:
        if not os.path.isdir(root):
            raise ValueError(f"data_path: expected a folder of images, got {root}, which is not a folder")
        self.root = os.fspath(root)
        paths = []
        for folder, subfolders, names in os.walk(root, onerror=_leave_out, followlinks=True):
            subfolders[:] = [name for name in subfolders if not name.startswith(".")]
            paths += [os.path.join(folder, name) for name in names if is_image_file(name)]
        if not paths:
            raise ValueError(
                f"data_path: expected image files ({', '.join(IMG_EXTENSIONS)}) in or below {root}, found none"
            )
        # No list: reading a Python string writes to it (its reference count), so that each worker would end with a copy
        # of all of them, 138 MB of ImageNet's.
        self.paths = np.array(sorted(paths))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return read_image(self.paths[index]), -1


class LabelledImageFiles(ImageFiles):
    """The image files below a folder's folders, which are the classes; hidden ones are left out.

    Raises FileNotFoundError if there is no class, or one without images.
    """

    def __init__(self, root: str | os.PathLike) -> None:
        self.classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and entry.name[0] != ".")
        if not self.classes:
            raise FileNotFoundError(f"no folder in {root}")
        self.root = os.fspath(root)
        files = make_dataset(
            self.root,
            {name: label for label, name in enumerate(self.classes)},
            is_valid_file=lambda path: is_image_file(path) and os.sep + "." not in path[len(self.root) :],
        )
        self.paths, self.labels = map(np.array, zip(*files, strict=True))

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return read_image(self.paths[index]), int(self.labels[index])


class ImageArrays(Dataset):
    """Images held in memory: uint8 [N, H, W, 3] or grey [N, H, W], labels [N]."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray, classes: Sequence[str] | None = None) -> None:
        self.pixels, self.labels, self.classes = pixels, labels, classes

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        pixels = torch.from_numpy(self.pixels[index])
        return pixels.expand(3, -1, -1) if pixels.ndim == 2 else pixels.permute(2, 0, 1), int(self.labels[index])


def read_image(path: str) -> torch.Tensor:
    """A file as uint8 [3, H, W]; raises ValueError that names the file if it cannot be read.

    torchvision decodes JPEG files faster than Pillow, which takes the rest, JPEGs cut short or in odd colours included.
    """
    try:
        with open(path, "rb") as file:
            content = bytearray(file.read())
        if decode_jpeg and content.startswith(b"\xff\xd8") and content.endswith(b"\xff\xd9"):
            with suppress(RuntimeError):
                return decode_jpeg(torch.frombuffer(content, dtype=torch.uint8), ImageReadMode.RGB)
        with Image.open(io.BytesIO(content)) as image:
            return to_pixels(image)
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError and more
        raise ValueError(f"data_path: cannot read {path} as an image: {error}") from None


def open_images(
    dataset: str = "shapes", data_path: str | os.PathLike | None = None, split: str = "pretrain", download: bool = False
) -> Dataset:
    """A set of (image uint8 [3, H, W], label).

    dataset: one of DATASETS. split: "pretrain" (all that may be trained on without labels), "train" or "val".
    data_path: of "folder", any tree of images for "pretrain" (its train/ alone where it has train/ and val/) and a
    folder with train/ and val/, a folder per class in each, for the others. Of the named sets, where torchvision keeps
    them; of fashion_mnist also a folder with its four .gz files. Not used by "shapes".
    Raises ValueError where it finds no images.
    """
    if dataset not in DATASETS:
        raise ValueError(f"dataset: expected one of {', '.join(DATASETS)}, got {dataset}")
    if split not in ("pretrain", "train", "val"):
        raise ValueError(f"split: expected pretrain, train or val, got {split}")
    if dataset == "shapes":
        return draw_shapes("val" if split == "val" else "train")
    if data_path is None:
        raise ValueError(f"data_path: --dataset {dataset} needs the folder that holds it")
    if dataset == "folder":
        return _open_folder(data_path, split)
    if dataset == "fashion_mnist" and os.path.exists(os.path.join(data_path, "train-images-idx3-ubyte.gz")):
        return _read_fashion_mnist(data_path, "t10k" if split == "val" else "train")
    return _open_torchvision(dataset, data_path, split, download)


def _open_folder(root: str | os.PathLike, split: str) -> Dataset:
    if split == "pretrain":
        has_splits = all(os.path.isdir(os.path.join(root, name)) for name in ("train", "val"))
        return ImageFiles(os.path.join(root, "train") if has_splits else root)
    if os.path.basename(os.path.normpath(root)) == "train" and not os.path.isdir(os.path.join(root, "train")):
        root = os.path.dirname(os.path.normpath(root))  # what training was given; val/ is beside it
    folder = os.path.join(root, split)
    try:
        return LabelledImageFiles(folder)
    except OSError as error:
        raise ValueError(
            f"data_path: expected {folder} with a folder of images for each class; "
            f"labels need train/ and val/ with the same class folders ({error})"
        ) from None


def _open_torchvision(dataset: str, root: str | os.PathLike, split: str, download: bool) -> ImageArrays:
    sets = torchvision.datasets
    kinds = dict(cifar10=sets.CIFAR10, cifar100=sets.CIFAR100, stl10=sets.STL10, fashion_mnist=sets.FashionMNIST)
    which = dict(train=split != "val")
    if dataset == "stl10":
        which = dict(split={"pretrain": "train+unlabeled", "train": "train", "val": "test"}[split])
    try:
        images = kinds[dataset](root, download=download, **which)
    except (RuntimeError, OSError) as error:
        tried = "could not be downloaded to it" if download else "is downloaded by a run of one process"
        raise ValueError(f"data_path: {dataset} is not in {root} and {tried}: {error}") from None
    pixels = np.asarray(images.data)  # [N, H, W, 3], of Fashion-MNIST [N, H, W], of STL-10 [N, 3, H, W]
    if dataset == "stl10":
        return ImageArrays(pixels.transpose(0, 2, 3, 1), images.labels, images.classes)
    return ImageArrays(pixels, np.asarray(images.targets), images.classes)


def _read_fashion_mnist(root: str | os.PathLike, prefix: str) -> ImageArrays:
    def values(kind: str, header: int, *shape: int) -> np.ndarray:
        path = os.path.join(root, f"{prefix}-{kind}-ubyte.gz")
        try:
            with gzip.open(path) as file:
                return np.frombuffer(bytearray(file.read()), np.uint8, offset=header).reshape(-1, *shape)
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise ValueError(f"data_path: cannot read {path}: {error}") from None

    pixels, labels = values("images-idx3", 16, 28, 28), values("labels-idx1", 8)
    if len(pixels) != len(labels):
        raise ValueError(f"data_path: {root} holds {len(pixels)} {prefix} images but {len(labels)} labels")
    return ImageArrays(pixels, labels, torchvision.datasets.FashionMNIST.classes)


# Images in memory


class CachedImages(Dataset):
    """Image files that are decoded once, into memory that all processes and workers of a machine share.

    sizes: (width, height) of each. path: a file in memory (on Linux below /dev/shm), the same one for all processes,
    none of which must have written anything else to it; it may be unlinked once all have it open.
    """

    def __init__(self, images: ImageFiles, sizes: Sequence[tuple[int, int]], path: str) -> None:
        self.images, self.root = images, images.root
        self.sizes = np.array(sizes)  # no list, as of paths: each worker would end with a copy
        self.ends = len(images) + np.cumsum(3 * self.sizes.prod(axis=1))
        # A byte for each image, 1 if it is there, then the images.
        self.memory = torch.from_file(path, shared=True, size=int(self.ends[-1]), dtype=torch.uint8)
        self.is_there = self.memory[: len(images)].numpy()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        (width, height), end = self.sizes[index].tolist(), int(self.ends[index])
        pixels = self.memory[end - 3 * width * height : end].view(height, width, 3).permute(2, 0, 1)
        if not self.is_there[index]:
            pixels.copy_(self.images[index][0])
            self.is_there[index] = 1  # two workers may come here at once: they write the same
        return pixels, -1


def cached_size(images: Dataset, share: float = 1 / 4) -> tuple[int, int]:
    """Bytes that the decoded images need (an estimate from some of them), and bytes that a cache may take here.

    share: of the memory that is free, and of /dev/shm, which loader workers need too.

    (0, 0) for sets that are in memory as it is; none may be taken where there is no /dev/shm, as on other systems.
    """
    if not isinstance(images, ImageFiles):
        return 0, 0
    some = images.paths[:: -(-len(images) // 100)]
    needed = sum(3 * width * height for width, height in map(image_size, some)) / len(some) * len(images)
    if not os.path.isdir("/dev/shm"):
        return int(needed), 0
    with open("/proc/meminfo") as file:
        free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    free = min(free, memory_limit(), shutil.disk_usage("/dev/shm").free)
    return int(needed), int(share * free)


def memory_limit() -> float:
    """Bytes that the control groups of this process, as Docker's and Slurm's, leave it; inf without a limit."""
    limits = [math.inf]
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, kinds, group = line.split(":", 2)
            mount, name = ("memory", "memory.limit_in_bytes") if kinds else ("", "memory.max")  # of version 1, 2
            if kinds in ("", "memory"):
                for folder in (Path(group), *Path(group).parents):  # a group's limit holds for those in it
                    with suppress(OSError, ValueError):  # "max" is no limit
                        limits.append(int(Path("/sys/fs/cgroup", mount, str(folder)[1:], name).read_text()))
    return min(limits)


def image_size(path: str) -> tuple[int, int]:
    """(width, height) of an image file, from its header. Raises ValueError that names the file."""
    try:
        with Image.open(path) as image:
            return image.size
    except Exception as error:
        raise ValueError(f"data_path: cannot read {path} as an image: {error}") from None


def typical_side(images: Dataset) -> int:
    """Median of the images' shorter sides in pixels, over a hundred of them."""
    some = range(0, len(images), -(-len(images) // 100))
    if isinstance(images, ImageFiles):
        sides = [min(image_size(images.paths[i])) for i in some]
    else:
        sides = [min(images[i][0].shape[1:]) for i in some]
    return int(np.median(sides))


# Order and loading


class ShuffledBatches(Sampler):
    """Batches of (epoch, index) for one process: each image once an epoch, over all processes together.

    The order is a permutation of (seed, epoch); step s takes the s-th stretch of it, of batch_size * world_size
    images, and this process its own part of that, so the images of a step depend on the global batch alone.
    An incomplete last batch is dropped. Set `epoch` before iterating.
    """

    def __init__(self, images: int, batch_size: int, *, seed: int = 0, rank: int = 0, world_size: int = 1) -> None:
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = 0

    def __len__(self) -> int:
        return self.images // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.images)
        for step in range(len(self)):
            start = (step * self.world_size + self.rank) * self.batch_size
            yield [(self.epoch, index) for index in order[start : start + self.batch_size].tolist()]


BYTES_AT_A_TIME = 2**26  # of decoded images: a batch of photographs would fill a worker's memory


class CutBatches(Dataset):
    """Keys (epoch, index) -> for each resolution (cut crops uint8 [n, B, 3, S, S], rows float32 [n, B, ROW]), labels.

    n: its number of crops. What `place_batch` makes of them is what MultiCrop makes as the transform of SeededImages.
    """

    def __init__(self, images: Dataset, multi_crop: MultiCrop, seed: int = 0) -> None:
        self.images, self.multi_crop, self.seed = images, multi_crop, seed

    def __getitems__(
        self, keys: Sequence[tuple[int, int]]
    ) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
        cut, images, rngs, labels, held = [], [], [], [], 0
        for epoch, index in keys:
            image, label = self.images[index]
            images.append(to_pixels(image))
            held += images[-1].numel()
            rngs.append(np.random.default_rng((self.seed, epoch, index)))
            labels.append(label)
            if len(labels) == len(keys) or held > BYTES_AT_A_TIME:
                cut.append([(p.unflatten(0, (-1, len(images))), r) for p, r in self.multi_crop.cut(images, rngs)])
                images, rngs, held = [], [], 0
        batch = []
        for of_resolution in zip(*cut, strict=True):
            pixels = torch.cat([pixels for pixels, _ in of_resolution], dim=1)
            rows = np.concatenate([rows.reshape(len(pixels), -1, ROW) for _, rows in of_resolution], axis=1)
            batch.append((pixels, torch.from_numpy(rows)))
        return batch, torch.tensor(labels)


class SeededImages(Dataset):
    """(epoch, index) -> (transform(image, rng), label), with a generator of (seed, epoch, index) alone."""

    def __init__(self, images: Dataset, transform: Callable, seed: int = 0) -> None:
        self.images, self.transform, self.seed = images, transform, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[list[torch.Tensor] | torch.Tensor, int]:
        epoch, index = key
        image, label = self.images[index]
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
    cut_only: bool = False,
) -> DataLoader:
    """Shuffled batches (transformed images, labels [B]); batch_size is per process.

    cut_only: workers do no more of a MultiCrop than cutting crops out, `place_batch` does the rest on the device.
    Set `loader.batch_sampler.epoch` before each epoch. Worker processes stay between epochs.
    """
    return DataLoader(
        CutBatches(images, transform, seed) if cut_only else SeededImages(images, transform, seed),
        batch_sampler=ShuffledBatches(len(images), batch_size, seed=seed, rank=rank, world_size=world_size),
        collate_fn=_as_they_are if cut_only else None,
        pin_memory=pin_memory,
        **_worker_options(workers, persistent=True),
    )


def place_batch(
    batch: Sequence[torch.Tensor | tuple[torch.Tensor, torch.Tensor]],
    device: torch.device,
    *,
    memory_format: torch.memory_format = torch.contiguous_format,
    stream: "torch.cuda.Stream | None" = None,
    augment: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = augment,
) -> list[torch.Tensor]:
    """Crops of a `training_loader` with MultiCrop -> V crops float32 [B, 3, S, S] on the device.

    stream: a CUDA stream for copies and augmentation, so that they need not wait for the step before. The current
    stream waits for it, the host for nothing. augment: to pass a compiled one.
    """
    crops = []
    with torch.cuda.stream(stream):  # nothing for None
        for part in batch:
            if torch.is_tensor(part):  # a crop that the workers finished
                crops.append(part.to(device, non_blocking=True, memory_format=memory_format))
            else:
                pixels, rows = (tensor.to(device, non_blocking=True) for tensor in part)
                images = augment(pixels.flatten(0, 1), rows.flatten(0, 1)).contiguous(memory_format=memory_format)
                crops += images.chunk(len(pixels))
    if stream is not None:
        current = torch.cuda.current_stream(device)
        current.wait_stream(stream)
        for crop in crops:
            crop.record_stream(current)
    return crops


def _as_they_are(batch: tuple) -> tuple:
    return batch


def _worker_options(workers: int, persistent: bool = False) -> dict:
    options = dict(num_workers=workers, worker_init_fn=keep_freed_memory, persistent_workers=persistent and workers > 0)
    if workers and sys.platform == "linux":
        options["multiprocessing_context"] = "fork"  # which shares images in memory; not the default from Python 3.14
    return options


def keep_freed_memory(_worker: int = 0) -> None:
    """Make glibc reuse the memory of freed tensors (it gives blocks this large back, and clears new ones page by page).

    A third of a CPU's time went into that in multi-crop, a tenth in training. Nothing happens with other C libraries.
    Blocks above 32 MiB are still given back: among small ones that stay, the gaps that they leave would add up.
    """
    if sys.platform != "linux":
        return
    with suppress(AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD


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
    """Every image once, in order, none dropped or repeated: this process's share (rank, rank + world_size, ...)."""
    share = [(0, index) for index in range(rank, len(images), world_size)]
    return DataLoader(
        SeededImages(images, transform),
        batch_size=batch_size,
        sampler=share,
        pin_memory=pin_memory,
        **_worker_options(workers),
    )


# Shapes: drawn images, whose classes are textures


SHAPES_CLASSES = ("stripes", "checks", "dots", "rings", "waves", "camouflage", "grid", "rays", "bricks", "zigzags")
SHAPES_COUNTS = {"train": 5000, "val": 2000}
TAU = 2 * math.pi


def draw_shapes(split: str, size: int = 64) -> ImageArrays:
    """The built-in set, "train" or "val": SHAPES_COUNTS images of `size` pixels, as many of each class."""
    drawn = [draw_shape(split, index, size) for index in range(SHAPES_COUNTS[split])]
    return ImageArrays(np.stack([pixels for pixels, _ in drawn]), np.array([y for _, y in drawn]), SHAPES_CLASSES)


def draw_shape(split: str, index: int, size: int = 64) -> tuple[np.ndarray, int]:
    """Image `index` of a split, uint8 [size, size, 3], and its label; the same in every run.

    Two or three overlapping blobs lie on a noisy ground. All carry the texture of the class, each with its own angle,
    period, phase, polarity, contrast and brightness: so the class is what two crops of an image have in common, where
    a colour or frequency per image would be learned in its stead. They also share where the image is light, which some
    runs learn first (tests/what_crops_share.py).
    """
    rng = np.random.default_rng((zlib.crc32(split.encode()), index))
    label = index % len(SHAPES_CLASSES)
    blobs = int(rng.integers(2, 4))
    place = (np.arange(size, dtype=np.float32) + 0.5) / size
    bend_x, bend_y, shade, fade, *tint = _smooth_noise(rng, 7, size, 3)

    # Where each blob lies: a wobbly outline around its centre. Later blobs cover earlier ones.
    spread = rng.uniform(0, TAU) + TAU * np.arange(blobs) / blobs
    reach = rng.uniform(0.17, 0.29, blobs)
    centre = 0.5 + reach * np.stack([np.cos(spread), np.sin(spread)])
    owner = np.full((size, size), blobs)  # the value `blobs` stands for the ground
    for blob in range(blobs):
        dx, dy = place[None] - np.float32(centre[0, blob]), place[:, None] - np.float32(centre[1, blob])
        turn, radius = np.arctan2(dy, dx), rng.uniform(0.26, 0.38)
        for lobes in (2, 3):
            radius = radius * (1 + rng.uniform(0, 0.15) * np.sin(lobes * turn + rng.uniform(0, TAU)))
        owner[dx * dx + dy * dy < radius * radius] = blob

    # The texture, in coordinates that are shifted, turned and scaled by blob, and slightly bent.
    def by_blob(low, high):
        return rng.uniform(low, high, blobs + 1).astype(np.float32)[owner]

    angle, rate = by_blob(0, TAU), 1 / (np.exp(by_blob(np.log(0.11), np.log(0.18))))
    ox, oy = (np.append(axis, 0).astype(np.float32)[owner] + by_blob(-0.1, 0.1) for axis in centre)
    dx, dy = (place[None] - ox) * rate, (place[:, None] - oy) * rate
    x = np.cos(angle) * dx + np.sin(angle) * dy + 0.12 * bend_x
    y = np.cos(angle) * dy - np.sin(angle) * dx + 0.12 * bend_y
    ink = np.clip(_texture(SHAPES_CLASSES[label], rng, x, y) * np.float32(rng.uniform(1, 3)), -1, 1)

    # Light: contrast and polarity by blob, uneven brightness, a faint changing tint, grain.
    strength = by_blob(0.12, 0.3) * np.sign(by_blob(-1, 1)) * (1 + 0.15 * fade)
    ground = rng.uniform(0, 0.08) * _smooth_noise(rng, 1, size, int(rng.integers(4, 12)))[0]
    grey = 0.5 + by_blob(-0.13, 0.13) + rng.uniform(0.02, 0.06) * shade
    grey = grey + np.where(owner < blobs, ink * strength, ground)
    grey += rng.uniform(0.01, 0.06) * rng.standard_normal((size, size), dtype=np.float32)
    image = grey[..., None] + 0.04 * np.stack(tint, -1)
    return (255 * np.clip(image, 0, 1) + 0.5).astype(np.uint8), label


def _smooth_noise(rng: np.random.Generator, count: int, size: int, cells: int) -> np.ndarray:
    """[count, size, size] of random hills, about `cells` a side, with unit spread."""
    place = (np.arange(size, dtype=np.float32) + 0.5) / size
    basis = np.cos(np.pi * np.outer(place, np.arange(1, cells + 1, dtype=np.float32)))
    weights = rng.standard_normal((count, cells, cells), dtype=np.float32)
    return basis @ weights @ basis.T * (2 / cells)


def _texture(name: str, rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The texture's height at each point (x, y), both in periods; positive is ink."""
    if name == "stripes":
        return np.sin(TAU * x)
    if name == "checks":
        return 2 * np.sin(np.pi * x) * np.sin(np.pi * y)
    if name == "dots":  # on a hexagonal lattice
        row = np.floor(y / 0.866)
        return 6 * (0.32 - np.hypot((x + row / 2) % 1 - 0.5, y - 0.866 * (row + 0.5)))
    if name == "rings":
        return np.sin(TAU * np.hypot(x, y))
    if name == "waves":
        return np.sin(TAU * (x + 0.5 * np.sin(TAU * y / 3)))
    if name == "camouflage":  # plane waves in all directions, of about the same length
        turn = TAU * (np.arange(5) + rng.uniform(0, 1, 5)) / 10
        pitch, phase = rng.uniform(0.4, 0.8, 5), rng.uniform(0, TAU, 5)
        directions = np.stack([TAU * pitch * np.cos(turn), TAU * pitch * np.sin(turn), phase], 1).astype(np.float32)
        return sum(np.cos(a * x + b * y + c) for a, b, c in directions)
    if name == "grid":
        return 6 * (np.maximum(np.cos(TAU * x), np.cos(TAU * y)) - 0.75)
    if name == "rays":
        return 1.5 * np.sin(rng.integers(6, 12) * np.arctan2(y, x))
    if name == "bricks":  # distance to the nearest joint of a running bond
        row = np.floor(1.5 * y)
        across = 0.7 - np.abs((x + 0.7 * row) % 1.4 - 0.7)
        along = 0.333 - np.abs(y - (row + 0.5) / 1.5)
        return 10 * (np.minimum(across, along) - 0.09)
    return np.sin(TAU * (x + 0.9 * np.abs(y / 1.6 % 1 - 0.5)))  # zigzags
