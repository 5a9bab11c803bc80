"""Where images come from: folders, named sets, the cache in memory, and the drawn images of `shapes`.

    images = open_images("folder", "imagenet", split="train")
    pixels, label = images[0]    # uint8 [3, H, W]; -1 where there is no label

To add a named set: put its name into DATASETS, and in `open_images` return an ImageArrays or your own Dataset.
"""

import errno
import gzip
import hashlib
import io
import math
import os
import socket
import tempfile
import warnings
import zlib
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import torch
import torchvision
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from data import to_pixels
from launch import UserError, environment, exchange, log, memory_left, shared_memory_left, track

try:  # torchvision plans to drop it
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:
    decode_jpeg = None

DATASETS = ("shapes", "folder", "cifar10", "cifar100", "stl10", "fashion_mnist")


# Image sets: Datasets of (uint8 [3, H, W], label), label -1 where there is none


def is_image_file(path: str) -> bool:
    """Whether the name is that of an image; hidden files, which systems and editors leave among images, are not."""
    name = os.path.basename(path)
    return name.lower().endswith(IMG_EXTENSIONS) and not name.startswith(".")


def _warn_left_out(error: OSError) -> None:
    warnings.warn(f"data_path: {error.filename} is left out: {error.strerror}", stacklevel=2)


class ImageFiles(Dataset):
    """Every image file below a folder, at any depth, in the order of their paths; no labels. Skips hidden ones.

    Warns of folders that cannot be read. Raises UserError if the folder is missing or holds no image.
    """

    def __init__(self, root: str | os.PathLike) -> None:
        if not os.path.isdir(root):
            raise UserError(f"data_path: expected a folder of images, got {root}, which is not a folder")
        self.root = os.fspath(root)
        paths = []
        for folder, subfolders, names in os.walk(root, onerror=_warn_left_out, followlinks=True):
            subfolders[:] = [name for name in subfolders if not name.startswith(".")]
            paths += [os.path.join(folder, name) for name in names if is_image_file(name)]
        if not paths:
            raise UserError(
                f"data_path: expected image files ({', '.join(IMG_EXTENSIONS)}) in or below {root}, found none"
            )
        # An array, not a list: reading a Python string writes its reference count, so that each worker would end up
        # with a copy of all of them (138 MB for ImageNet).
        self.paths = np.array(sorted(paths))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return read_image(self.paths[index]), -1


class LabelledImageFiles(ImageFiles):
    """The image files below a folder's subfolders, which are the classes. Skips hidden ones.

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
    """Images in memory: uint8 [N, H, W, 3] or grey [N, H, W], labels [N]."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray, classes: Sequence[str] | None = None) -> None:
        self.pixels, self.labels, self.classes = pixels, labels, classes

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        pixels = torch.from_numpy(self.pixels[index])
        return pixels.expand(3, -1, -1) if pixels.ndim == 2 else pixels.permute(2, 0, 1), int(self.labels[index])


def read_image(path: str) -> torch.Tensor:
    """Decode an image file to uint8 [3, H, W]. Raises UserError with the file's name if it cannot be read.

    torchvision decodes JPEG files faster than Pillow. Pillow takes the rest, also JPEG files that are cut short or in
    other colour spaces.
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
        raise UserError(f"data_path: cannot read {path} as an image: {error}") from None


def image_size(path: str) -> tuple[int, int]:
    """(width, height) of an image file, from its header. Raises UserError with the file's name."""
    try:
        with Image.open(path) as image:
            return image.size
    except Exception as error:
        raise UserError(f"data_path: cannot read {path} as an image: {error}") from None


def typical_side(images: Dataset) -> int:
    """Median of the images' shorter sides in pixels, from a hundred of them."""
    some = range(0, len(images), -(-len(images) // 100))
    if isinstance(images, ImageFiles):
        sides = [min(image_size(images.paths[i])) for i in some]
    else:
        sides = [min(images[i][0].shape[1:]) for i in some]
    return int(np.median(sides))


# Open a set


def open_images(
    dataset: str = "shapes", data_path: str | os.PathLike | None = None, split: str = "pretrain", download: bool = False
) -> Dataset:
    """Open a data set of (image uint8 [3, H, W], label).

    dataset: one of DATASETS. split: "pretrain" (all images for training without labels), "train" or "val".
    data_path: for "folder" and "pretrain", any tree of images (only its train/ if it has train/ and val/); for
    "folder" and the other splits, a folder with train/ and val/, which hold a folder per class. For the named sets,
    where torchvision keeps them; for fashion_mnist also a folder with its four .gz files. "shapes" does not use it.
    Raises UserError if there are no images.
    """
    if dataset not in DATASETS:
        raise UserError(f"dataset: expected one of {', '.join(DATASETS)}, got {dataset}")
    if split not in ("pretrain", "train", "val"):
        raise UserError(f"split: expected pretrain, train or val, got {split}")
    if dataset == "shapes":
        return draw_shapes("val" if split == "val" else "train")
    if data_path is None:
        raise UserError(f"data_path: --dataset {dataset} needs the folder that holds it")
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
        root = os.path.dirname(os.path.normpath(root))  # training was given train/, and val/ lies next to it
    folder = os.path.join(root, split)
    try:
        return LabelledImageFiles(folder)
    except OSError as error:
        raise UserError(
            f"data_path: expected {folder} with a folder of images for each class; "
            f"labels need train/ and val/ with the same class folders ({error})"
        ) from None


def _open_torchvision(dataset: str, root: str | os.PathLike, split: str, download: bool) -> ImageArrays:
    sets = torchvision.datasets
    kinds = dict(cifar10=sets.CIFAR10, cifar100=sets.CIFAR100, stl10=sets.STL10, fashion_mnist=sets.FashionMNIST)
    split_arguments = dict(train=split != "val")
    if dataset == "stl10":
        split_arguments = dict(split={"pretrain": "train+unlabeled", "train": "train", "val": "test"}[split])
    try:
        images = kinds[dataset](root, download=download, **split_arguments)
    except (RuntimeError, OSError) as error:
        reason = "could not be downloaded to it" if download else "only a single process downloads it"
        raise UserError(f"data_path: {dataset} is not in {root} and {reason}: {error}") from None
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
            raise UserError(f"data_path: cannot read {path}: {error}") from None

    pixels, labels = values("images-idx3", 16, 28, 28), values("labels-idx1", 8)
    if len(pixels) != len(labels):
        raise UserError(f"data_path: {root} holds {len(pixels)} {prefix} images but {len(labels)} labels")
    return ImageArrays(pixels, labels, torchvision.datasets.FashionMNIST.classes)


# Images in memory


class CachedImages(Dataset):
    """Image files, decoded once into memory that all processes and workers of a machine share.

    sizes: (width, height) of each image. path: the file that holds the memory (on Linux below /dev/shm), the same one
    for all processes and empty at first. It may be unlinked once all have opened it.
    """

    def __init__(self, images: ImageFiles, sizes: Sequence[tuple[int, int]], path: str) -> None:
        self.images, self.root = images, images.root
        self.sizes = np.array(sizes)  # an array, like paths: each worker would end up with a copy of a list
        # One byte per image, 1 if it is decoded, then the images.
        self.ends = len(images) + np.cumsum(3 * self.sizes.prod(axis=1))
        self.memory = torch.from_file(path, shared=True, size=int(self.ends[-1]), dtype=torch.uint8)
        self.is_decoded = self.memory[: len(images)].numpy()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        (width, height), end = self.sizes[index].tolist(), int(self.ends[index])
        pixels = self.memory[end - 3 * width * height : end].view(height, width, 3).permute(2, 0, 1)
        if not self.is_decoded[index]:
            pixels.copy_(self.images[index][0])
            self.is_decoded[index] = 1  # two workers may decode it at the same time: they write the same
        return pixels, -1


def sizes_to_cache(images: Dataset, cache: str, for_workers: int = 0) -> list[tuple[int, int]] | None:
    """(width, height) of each image if they are to be cached, else None.

    cache: "off"; "auto" (if they fit into a quarter of the free memory); "ram" (into 80 %). for_workers: bytes of
    /dev/shm that loader workers need. Raises UserError if "ram" does not fit.
    """
    if cache == "off":
        return None
    share = 1 / 4 if cache == "auto" else 0.8
    needed, allowed = cache_bytes(images, share, for_workers)
    if 0 < needed <= allowed:
        paths = track(images.paths, "cache: reading the sizes of all images", unit="image")
        sizes = [image_size(path) for path in paths]
        needed = sum(3 * width * height for width, height in sizes)
        if needed <= allowed:
            return sizes
    if cache == "ram" and needed:
        raise UserError(
            f"--cache ram: expected at most {allowed / 2**30:.1f} GiB of decoded images ({share:.0%} of the free "
            f"memory, and of Linux' /dev/shm), got about {needed / 2**30:.1f}; write --cache off"
        )
    return None


def cache_images(images: Dataset, sizes: list[tuple[int, int]] | None) -> Dataset:
    """Cache the images if this machine's first process gives their sizes. All processes have to call it.

    sizes: from `sizes_to_cache` on the first process of each machine, None on the others. Without the memory for it
    nothing is cached, with a line that says so.
    """
    path = sizes and _allocate_cache(sizes)
    if path:
        np.save(path + ".npy", sizes)  # for the other processes of this machine
    machine = [socket.gethostname(), environment("GROUP_RANK", 0)]
    try:
        offers = exchange("sharing the cache", [machine, path])
        offer = next((theirs for place, theirs in offers if place == machine and theirs), None)
        if offer is not None:
            images = CachedImages(images, np.load(offer + ".npy"), offer)
        exchange("opening the cache", None)
    finally:
        if path:
            os.unlink(path)  # the memory stays until the last process that opened it ends
            os.unlink(path + ".npy")
    return images


def _allocate_cache(sizes: Sequence[tuple[int, int]]) -> str | None:
    """The path of a file below /dev/shm with the memory for a cache; None, and a line, if there is not enough.

    Allocated now, as writing to memory that is missing later would kill the process.
    """
    total, path = len(sizes) + sum(3 * width * height for width, height in sizes), None
    try:
        descriptor, path = tempfile.mkstemp(prefix="swav-", dir="/dev/shm")
        with open(descriptor, "wb", buffering=0) as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(descriptor, 0, total)
            else:
                for start in range(0, total, 2**24):
                    file.write(bytes(min(2**24, total - start)))
                if os.path.getsize(path) < total:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        if path:
            os.unlink(path)
        log(f"cache: none, as {total / 2**20:.0f} MiB of /dev/shm could not be allocated: {error.strerror}")
        return None
    return path


def cache_bytes(images: Dataset, share: float = 1 / 4, for_workers: int = 0) -> tuple[int, int]:
    """Bytes that the decoded images need (estimated from a hundred of them), and bytes that a cache may take.

    share: of the free memory and of /dev/shm. for_workers: bytes of /dev/shm to leave at least. (0, 0) for sets that
    are in memory already; a cache may take nothing where there is no /dev/shm, as on other systems than Linux.
    """
    if not isinstance(images, ImageFiles):
        return 0, 0
    some = images.paths[:: -(-len(images) // 100)]
    needed = sum(3 * width * height for width, height in map(image_size, some)) / len(some) * len(images)
    free = shared_memory_left()
    if math.isinf(free):
        return int(needed), 0
    return int(needed), max(0, int(min(share * min(free, memory_left()), free - for_workers)))


# What tells sets apart


def fingerprint(images: Dataset) -> dict[str, int | str]:
    """What tells a set of images from another: {"images": how many, "paths": sha256}.

    The sum is over the sorted paths below the set's folder, as bytes with a NUL between; of images in memory over a
    checksum of their pixels.
    """
    images = getattr(images, "images", images)  # below a cache
    if isinstance(images, ImageFiles):
        root = os.path.join(os.fsencode(images.root), b"")
        names = b"\0".join(sorted(os.fsencode(path).removeprefix(root) for path in images.paths))
    else:
        checksum = 0
        for start in range(0, len(images), 1000):  # a part at a time: pixels may be a view that is copied here
            checksum = zlib.crc32(np.ascontiguousarray(images.pixels[start : start + 1000]), checksum)
        names = str(checksum).encode()
    return {"images": len(images), "paths": hashlib.sha256(names).hexdigest()}


# Shapes: drawn images, whose classes are textures


SHAPES_CLASSES = ("stripes", "checks", "dots", "rings", "waves", "camouflage", "grid", "rays", "bricks", "zigzags")
SHAPES_COUNTS = {"train": 5000, "val": 2000}
TAU = 2 * math.pi


def draw_shapes(split: str, size: int = 64) -> ImageArrays:
    """Draw the built-in set, "train" or "val": SHAPES_COUNTS images of `size` pixels, in balanced classes."""
    drawn = [draw_shape(split, index, size) for index in range(SHAPES_COUNTS[split])]
    return ImageArrays(np.stack([pixels for pixels, _ in drawn]), np.array([y for _, y in drawn]), SHAPES_CLASSES)


def draw_shape(split: str, index: int, size: int = 64) -> tuple[np.ndarray, int]:
    """Draw image `index` of a split, uint8 [size, size, 3], and give its label; the same in every run.

    Two or three overlapping blobs lie on a noisy ground. All carry the texture of the class, each with its own angle,
    period, phase, polarity, contrast and brightness. So the class is what two crops of an image have in common; a
    colour or a frequency per image would be learned instead. Crops also share the image's brightness pattern, which
    some runs learn first (bench/what_crops_share.py).
    """
    rng = np.random.default_rng((zlib.crc32(split.encode()), index))
    label = index % len(SHAPES_CLASSES)
    blobs = int(rng.integers(2, 4))
    place = (np.arange(size, dtype=np.float32) + 0.5) / size
    bend_x, bend_y, shade, fade, *tint = _smooth_noise(rng, 7, size, 3)

    # The outline of each blob, a wobbly circle around its centre. Later blobs cover earlier ones.
    direction = rng.uniform(0, TAU) + TAU * np.arange(blobs) / blobs
    reach = rng.uniform(0.17, 0.29, blobs)
    centre = 0.5 + reach * np.stack([np.cos(direction), np.sin(direction)])
    owner = np.full((size, size), blobs)  # the value `blobs` stands for the ground
    for blob in range(blobs):
        dx, dy = place[None] - np.float32(centre[0, blob]), place[:, None] - np.float32(centre[1, blob])
        turn, radius = np.arctan2(dy, dx), rng.uniform(0.26, 0.38)
        for lobes in (2, 3):
            radius = radius * (1 + rng.uniform(0, 0.15) * np.sin(lobes * turn + rng.uniform(0, TAU)))
        owner[dx * dx + dy * dy < radius * radius] = blob

    # The texture, in coordinates that each blob shifts, turns and scales, slightly bent.
    def by_blob(low, high):
        return rng.uniform(low, high, blobs + 1).astype(np.float32)[owner]

    angle, frequency = by_blob(0, TAU), 1 / (np.exp(by_blob(np.log(0.11), np.log(0.18))))
    ox, oy = (np.append(axis, 0).astype(np.float32)[owner] + by_blob(-0.1, 0.1) for axis in centre)
    dx, dy = (place[None] - ox) * frequency, (place[:, None] - oy) * frequency
    x = np.cos(angle) * dx + np.sin(angle) * dy + 0.12 * bend_x
    y = np.cos(angle) * dy - np.sin(angle) * dx + 0.12 * bend_y
    ink = np.clip(_texture(SHAPES_CLASSES[label], rng, x, y) * np.float32(rng.uniform(1, 3)), -1, 1)

    # Brightness: contrast and polarity of each blob, uneven light, a faint tint that changes, grain.
    strength = by_blob(0.12, 0.3) * np.sign(by_blob(-1, 1)) * (1 + 0.15 * fade)
    ground = rng.uniform(0, 0.08) * _smooth_noise(rng, 1, size, int(rng.integers(4, 12)))[0]
    grey = 0.5 + by_blob(-0.13, 0.13) + rng.uniform(0.02, 0.06) * shade
    grey = grey + np.where(owner < blobs, ink * strength, ground)
    grey += rng.uniform(0.01, 0.06) * rng.standard_normal((size, size), dtype=np.float32)
    image = grey[..., None] + 0.04 * np.stack(tint, -1)
    return (255 * np.clip(image, 0, 1) + 0.5).astype(np.uint8), label


def _smooth_noise(rng: np.random.Generator, count: int, size: int, cells: int) -> np.ndarray:
    """Random smooth fields [count, size, size] of about `cells` hills a side, with a std of 1."""
    place = (np.arange(size, dtype=np.float32) + 0.5) / size
    basis = np.cos(np.pi * np.outer(place, np.arange(1, cells + 1, dtype=np.float32)))
    weights = rng.standard_normal((count, cells, cells), dtype=np.float32)
    return basis @ weights @ basis.T * (2 / cells)


def _texture(name: str, rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The texture's height at each point (x, y), both in periods of the texture; positive is ink."""
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
