"""Image sets, multi-crop and loaders for SwAV (Caron et al. 2020, section 3.2 and appendix A).

    # sides in pixels, numbers of crops, smallest and largest shares of the image's area
    transform = MultiCrop([224, 96], [2, 6], [0.14, 0.05], [1, 0.14])
    crops = transform(pil_image)    # list of 8 tensors [3, S, S], float32, normalised

Everything random about an image's crops follows from (seed, epoch, index of the image) alone, and the order of the
images from (seed, epoch): neither workers nor processes change what a run sees.
Copy this file to use it elsewhere: it needs torch and torchvision alone.
"""

import gzip
import math
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import permutations
from typing import NamedTuple

import numpy as np
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.v2 import functional as F

# 0.228 (not the usual 0.229) is what the published weights were trained with.
MEAN, STD = (0.485, 0.456, 0.406), (0.228, 0.224, 0.225)

DATASETS = ("shapes", "folder", "cifar10", "cifar100", "stl10", "fashion_mnist")
FASHION_MNIST_FILES = {"train": "train", "val": "t10k"}
FASHION_MNIST_CLASSES = torchvision.datasets.FashionMNIST.classes


# Multi-crop


class Crop(NamedTuple):
    """Everything that turns an image into one of its crops; lengths in pixels of the image, sigma of the crop."""

    size: int
    top: int
    left: int
    height: int
    width: int
    flip: bool
    jitter: tuple[tuple[str, float], ...]  # (operation, factor) in order of use, empty for none
    grey: bool
    sigma: float  # 0 for no blur


JITTER = {
    "brightness": F.adjust_brightness,
    "contrast": F.adjust_contrast,
    "saturation": F.adjust_saturation,
    "hue": F.adjust_hue,
}
JITTER_STRENGTHS = {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2}
JITTER_ORDERS = tuple(permutations(JITTER))
SMALLEST_CROP = 9  # the blur's largest kernel reaches 8 pixels, and reflects at the border


class MultiCrop:
    """Image -> list of crops, V = sum(nmb_crops) float32 tensors [3, S, S], mean subtracted, divided by std.

    size_crops, nmb_crops, min_scale_crops, max_scale_crops: per resolution, the crops' side in pixels, their number,
    and the range of the area they cut out, as a share of the image. Use it as the transform of any Dataset of PIL
    images. Randomness comes from `rng`, or from torch's global generator (which DataLoader seeds in each worker).
    Raises ValueError for lists of unequal length or values out of range.
    """

    def __init__(
        self,
        size_crops: Sequence[int],
        nmb_crops: Sequence[int],
        min_scale_crops: Sequence[float],
        max_scale_crops: Sequence[float],
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
        self.resolutions = [
            (size, (low, high))
            for size, count, low, high in zip(size_crops, nmb_crops, min_scale_crops, max_scale_crops, strict=True)
            for _ in range(count)
        ]

    def sample(self, width: int, height: int, rng: np.random.Generator) -> list[Crop]:
        """Draw the crops of an image of this size; the same generator state gives the same crops."""
        return [_sample_crop(width, height, size, scale, rng) for size, scale in self.resolutions]

    def __call__(self, image: Image.Image, rng: np.random.Generator | None = None) -> list[torch.Tensor]:
        if rng is None:
            rng = np.random.default_rng(torch.randint(2**63 - 1, ()).item())
        image = image.convert("RGB")
        return [apply_crop(image, crop) for crop in self.sample(*image.size, rng)]


def _sample_crop(width: int, height: int, size: int, scale: tuple[float, float], rng: np.random.Generator) -> Crop:
    box = sample_box(width, height, scale, rng)
    flip, jittered, grey, blurred = rng.random(4) < (0.5, 0.8, 0.2, 0.5)
    order = JITTER_ORDERS[rng.integers(len(JITTER_ORDERS))]
    factors = {name: rng.uniform(-strength, strength) for name, strength in JITTER_STRENGTHS.items()}
    jitter = tuple((name, factors[name] if name == "hue" else 1 + factors[name]) for name in order) if jittered else ()
    sigma = rng.uniform(0.1, 2.0)
    return Crop(size, *box, bool(flip), jitter, bool(grey), sigma if blurred else 0.0)


def sample_box(
    width: int, height: int, scale: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random box: area uniform in scale, aspect log-uniform in [3/4, 4/3].

    Ten attempts to fit it into the image, then the largest centred box of an allowed aspect.
    """
    for area, log_aspect in zip(
        rng.uniform(*scale, 10), rng.uniform(math.log(3 / 4), math.log(4 / 3), 10), strict=True
    ):
        box_width = round(math.sqrt(area * width * height * math.exp(log_aspect)))
        box_height = round(math.sqrt(area * width * height / math.exp(log_aspect)))
        if 0 < box_width <= width and 0 < box_height <= height:
            top, left = rng.integers((height - box_height + 1, width - box_width + 1))
            return int(top), int(left), box_height, box_width
    box_width, box_height = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def apply_crop(image: Image.Image, crop: Crop) -> torch.Tensor:
    """Cut the crop out of a PIL RGB image: float32 [3, S, S], normalised."""
    box = (crop.top, crop.left, crop.height, crop.width)
    pixels = F.resized_crop(image, *box, [crop.size, crop.size], antialias=True)
    if crop.flip:
        pixels = F.horizontal_flip(pixels)
    for operation, factor in crop.jitter:
        pixels = JITTER[operation](pixels, factor)
    if crop.grey:
        pixels = F.rgb_to_grayscale(pixels, num_output_channels=3)
    pixels = to_unit_range(pixels)
    if crop.sigma:
        weights = blur_matrix(crop.size, crop.sigma)
        pixels = weights @ pixels @ weights.T
    return normalize(pixels)


def blur_matrix(size: int, sigma: float) -> torch.Tensor:
    """[size, size] weights of a Gaussian blur along one axis, reflected at the borders, cut at 4 sigma."""
    radius = math.ceil(4 * sigma)
    offsets = torch.arange(-radius, radius + 1)
    kernel = torch.softmax(-0.5 * (offsets / sigma) ** 2, dim=0, dtype=torch.float32)
    rows = torch.arange(size).unsqueeze(1)
    columns = (size - 1) - ((size - 1) - (rows + offsets).abs()).abs()  # [size, 2 * radius + 1]
    return torch.zeros(size, size, dtype=torch.float32).scatter_add_(1, columns, kernel.expand(size, -1))


def to_unit_range(image: Image.Image) -> torch.Tensor:
    """PIL RGB image -> float32 [3, H, W] in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(255)


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    """[3, H, W] in [0, 1] -> mean subtracted, divided by std, contiguous."""
    return F.normalize(pixels.contiguous(), MEAN, STD)


# Transforms of the linear probe


class ProbeCrop:
    """Training transform of a probe: random resized crop (area 0.08 to 1) and flip -> normalised [3, S, S]."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> torch.Tensor:
        box = sample_box(*image.size, (0.08, 1.0), rng)
        return apply_crop(image, Crop(self.size, *box, bool(rng.random() < 0.5), (), False, 0.0))


class CentreCrop:
    """Validation transform: shorter side to `resize` pixels, centre crop of `size` -> normalised [3, S, S]."""

    def __init__(self, resize: int, size: int) -> None:
        self.resize, self.size = resize, size

    def __call__(self, image: Image.Image, rng: np.random.Generator | None = None) -> torch.Tensor:
        pixels = F.center_crop(F.resize(image, [self.resize], antialias=True), [self.size, self.size])
        return normalize(to_unit_range(pixels))


# Image sets: item -> (PIL RGB image, label), label -1 where there is none


class ImageFiles(Dataset):
    """Every image file below a folder, at any depth, in the order of their paths; no labels.

    Raises ValueError if the folder is missing or holds no image.
    """

    def __init__(self, root: str | os.PathLike) -> None:
        if not os.path.isdir(root):
            raise ValueError(f"data_path: expected a folder of images, got {root}, which is not a folder")
        self.root = os.fspath(root)
        self.paths = sorted(
            os.path.join(folder, name)
            for folder, _, names in os.walk(root, followlinks=True)
            for name in names
            if name.lower().endswith(IMG_EXTENSIONS) and not name.startswith(".")
        )
        if not self.paths:
            raise ValueError(
                f"data_path: expected image files ({', '.join(IMG_EXTENSIONS)}) in or below {root}, found none"
            )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return read_image(self.paths[index]), -1


class ImageArrays(Dataset):
    """Images held in memory: uint8 [N, H, W, 3] or grey [N, H, W], labels [N]."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray, classes: Sequence[str] | None = None) -> None:
        self.pixels, self.labels, self.classes = pixels, labels, classes

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[index]).convert("RGB"), int(self.labels[index])


def read_image(path: str) -> Image.Image:
    """A file as PIL RGB image; raises ValueError that names the file if it cannot be read."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError and more
        raise ValueError(f"data_path: cannot read {path} as an image: {error}") from None


def open_images(
    dataset: str = "shapes", data_path: str | os.PathLike | None = None, split: str = "pretrain", download: bool = False
) -> Dataset:
    """A set of (PIL RGB image, label).

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
        return _read_fashion_mnist(data_path, "val" if split == "val" else "train")
    return _open_torchvision(dataset, data_path, split, download)


def _open_folder(root: str | os.PathLike, split: str) -> Dataset:
    if split == "pretrain":
        has_splits = all(os.path.isdir(os.path.join(root, name)) for name in ("train", "val"))
        return ImageFiles(os.path.join(root, "train") if has_splits else root)
    if os.path.basename(os.path.normpath(root)) == "train" and not os.path.isdir(os.path.join(root, "train")):
        root = os.path.dirname(os.path.normpath(root))  # what training was given; val/ is beside it
    folder = os.path.join(root, split)
    try:
        return torchvision.datasets.ImageFolder(folder, loader=read_image)
    except FileNotFoundError as error:
        raise ValueError(
            f"data_path: expected {folder} with a folder of images for each class; "
            f"labels need train/ and val/ with the same class folders ({error})"
        ) from None


def _open_torchvision(dataset: str, root: str | os.PathLike, split: str, download: bool) -> Dataset:
    def opened(**options) -> Dataset:
        sets = torchvision.datasets
        kinds = dict(cifar10=sets.CIFAR10, cifar100=sets.CIFAR100, stl10=sets.STL10, fashion_mnist=sets.FashionMNIST)
        try:
            return kinds[dataset](root, transform=_as_rgb, download=download, **options)
        except (RuntimeError, OSError) as error:
            tried = "could not be downloaded to it" if download else "is downloaded by a run of one process"
            raise ValueError(f"data_path: {dataset} is not in {root} and {tried}: {error}") from None

    if dataset == "stl10":
        return opened(split={"pretrain": "train+unlabeled", "train": "train", "val": "test"}[split])
    return opened(train=split != "val")


def _as_rgb(image: Image.Image) -> Image.Image:
    return image.convert("RGB")


def _read_fashion_mnist(root: str | os.PathLike, split: str) -> ImageArrays:
    def values(kind: str, header: int, *shape: int) -> np.ndarray:
        path = os.path.join(root, f"{FASHION_MNIST_FILES[split]}-{kind}-ubyte.gz")
        try:
            with gzip.open(path) as file:
                return np.frombuffer(file.read(), np.uint8, offset=header).reshape(-1, *shape)
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise ValueError(f"data_path: cannot read {path}: {error}") from None

    pixels, labels = values("images-idx3", 16, 28, 28), values("labels-idx1", 8)
    if len(pixels) != len(labels):
        raise ValueError(f"data_path: {root} holds {len(pixels)} {split} images but {len(labels)} labels")
    return ImageArrays(pixels, labels, FASHION_MNIST_CLASSES)


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
) -> DataLoader:
    """Shuffled batches (transformed images, labels [B]); batch_size is per process.

    Set `loader.batch_sampler.epoch` before each epoch. Worker processes stay between epochs.
    """
    return DataLoader(
        SeededImages(images, transform, seed),
        batch_sampler=ShuffledBatches(len(images), batch_size, seed=seed, rank=rank, world_size=world_size),
        num_workers=workers,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
    )


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
        num_workers=workers,
        pin_memory=pin_memory,
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
    a colour or frequency per image would be learned in its stead.
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
