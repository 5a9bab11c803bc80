"""Where images come from: folders, named sets, the cache in memory, and the drawn images of `shapes`.

    images = open_images("folder", "imagenet", split="train")
    pixels, label = images[0]    # uint8 [3, H, W]; -1 where there is no label

    python images.py photos      # checks a folder before a run: what it holds, which files cannot be read

To add a named set: put its name into DATASETS, and in `open_images` return an ImageArrays or your own Dataset.
"""

import errno
import functools
import gzip
import hashlib
import io
import math
import mmap
import os
import socket
import stat
import sys
import tempfile
import time
import warnings
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import torch.distributed as dist
import torchvision
from PIL import Image, UnidentifiedImageError, features
from torch.utils.data import DataLoader, Dataset

from data import UnreadableImage, has_16_bits, to_pixels
from launch import OptionParser, RunStopped, UserError, environment, log, track, worker_count
from machine import available_cores, memory_left, shared_memory_left
from processes import exchange, run_script

try:  # torchvision plans to drop it
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:
    decode_jpeg = None

DATASETS = ("shapes", "folder", "cifar10", "cifar100", "stl10", "fashion_mnist")
NAMED_SPLITS = ("val", "valid", "validation", "test")  # beside train/: the first of these is the validation split
ENDINGS = (".jpg", ".jpeg", ".jfif", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp", ".gif")
# Pillow's formats. Not all that it knows: to open some of them it starts other programs.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "DIB", "TIFF", "WEBP", "GIF", "JPEG2000")
SAMPLE = 100  # images of a set that are looked at for what all have in common

# Errors of storage that may be gone a moment later
STORAGE_ERRORS = tuple(
    getattr(errno, name)
    for name in "EIO ESTALE EMFILE ENFILE ETIMEDOUT EAGAIN EBUSY ENOMEM EREMOTEIO ENOTCONN ECONNRESET EHOSTDOWN".split()
    if hasattr(errno, name)
)
RETRY_PAUSE = 1.0  # seconds


# Files of a folder


@functools.cache
def readable_formats() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(endings of image files, Pillow's formats) that can be read on this machine."""
    endings, formats = list(ENDINGS), list(FORMATS)
    if features.check("avif"):
        endings, formats = [*endings, ".avif"], [*formats, "AVIF"]
    if find_spec("pillow_heif"):
        from pillow_heif import register_heif_opener  # a package that few have

        register_heif_opener()
        endings, formats = [*endings, ".heic", ".heif"], [*formats, "HEIF"]
    return tuple(endings), tuple(formats)


def shown(path: str | os.PathLike) -> str:
    """A path as a message shows it: in one line, also if it is not UTF-8."""
    text = os.fsencode(path).decode(errors="backslashreplace")
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def is_image_file(path: str) -> bool:
    """Whether the name is that of an image; hidden files, which systems and editors leave among images, are not."""
    name = os.path.basename(path)
    return name.lower().endswith(readable_formats()[0]) and not name.startswith(".")


def ending_of(name: str) -> str:
    return os.path.splitext(name)[1].lower() or "no ending"


def counted(counts: Counter) -> str:
    """Counts in words, the largest first."""
    return ", ".join(f"{count:,} {shown(what)}" for what, count in counts.most_common())


def _warn_left_out(error: OSError) -> None:
    warnings.warn(f"data_path: {shown(error.filename)} is left out: {error.strerror}", stacklevel=2)


def _identity(path: str) -> tuple[int, int] | str:
    """(device, inode) of a file or folder: the same by every link to it."""
    try:
        status = os.stat(path)
    except OSError:
        return path
    return status.st_dev, status.st_ino


def walk_once(root: str, seen: set) -> Iterator[tuple[str, list[str]]]:
    """Yield (folder, names of its files) for a folder and those below it, each once; links to folders come last.

    seen: identities of folders to leave out, to which those visited are added. Skips hidden folders, and links to a
    folder that root lies in: they lead back to root.
    """
    seen |= {_identity(str(folder)) for folder in Path(root).resolve().parents}
    starts = deque([root])
    while starts:
        start = starts.popleft()
        if start != root and _identity(start) in seen:
            continue
        for folder, subfolders, names in os.walk(start, onerror=_warn_left_out):
            seen.add(_identity(folder))
            paths = [os.path.join(folder, name) for name in sorted(subfolders) if not name.startswith(".")]
            starts += filter(os.path.islink, paths)
            subfolders[:] = [os.path.basename(path) for path in paths if _identity(path) not in seen]
            yield folder, names


def image_paths(root: str, seen: set) -> tuple[list[bytes], Counter]:
    """The paths of all images below a folder, sorted, and how many other files there are by ending. Skips hidden ones.

    seen: of `walk_once`.
    """
    paths, left_out = [], Counter()
    for folder, names in walk_once(root, seen):
        paths += [os.fsencode(os.path.join(folder, name)) for name in names if is_image_file(name)]
        left_out.update(ending_of(n) for n in names if not n.startswith(".") and not is_image_file(n))
    return sorted(paths), left_out


class Paths(Sequence):
    """Paths of files, as bytes in one piece.

    A list of strings takes several times as much. Each worker would end up with a copy of it besides, as reading a
    Python string writes its reference count.
    """

    def __init__(self, paths: Sequence[bytes]) -> None:
        self.text = b"".join(paths)
        self.ends = np.fromiter(map(len, paths), np.int64, len(paths)).cumsum()

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        start = self.ends[index - 1] if index else 0
        return os.fsdecode(self.text[start : self.ends[index]])


# Image sets: Datasets of (uint8 [3, H, W], label), label -1 where there is none. value_range: see data.to_pixels


class ImageFiles(Dataset):
    """Every image file below a folder, at any depth, in the order of their paths; no labels. Skips hidden ones.

    left_out: number of other files by ending. Warns of folders that cannot be read. Raises UserError if the folder is
    missing or holds no image; reading an image raises UnreadableImage.
    """

    def __init__(self, root: str | os.PathLike, value_range: tuple[float, float] | None = None) -> None:
        if not os.path.isdir(root):
            raise UserError(f"data_path: expected a folder of images, got {shown(root)}, which is not a folder")
        self.root = os.fspath(root)
        paths, left_out = image_paths(self.root, set())
        if not paths:
            raise UserError(
                f"data_path: expected image files ({', '.join(readable_formats()[0])}) in or below {shown(root)}, "
                f"found none{f', but {counted(left_out)}' if left_out else ''}"
            )
        self._keep(paths, left_out, value_range)

    def _keep(self, paths: Sequence[bytes], left_out: Counter, value_range: tuple[float, float] | None) -> None:
        self.paths, self.left_out = Paths(paths), left_out
        # A byte for each image that workers share: 1 if it cannot be read, 2 if that is known (`new_bad_images`). Not
        # in /dev/shm, which may be full.
        self.bad = torch.frombuffer(mmap.mmap(-1, len(paths)), dtype=torch.uint8)
        self.value_range = value_range or find_value_range(self)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        try:
            return read_image(self.paths[index], self.value_range), -1
        except UnreadableImage:
            if not self.bad[index]:
                self.bad[index] = 1
            raise


class LabelledImageFiles(ImageFiles):
    """The image files below a folder's subfolders, which are the classes. Skips hidden ones.

    Raises FileNotFoundError if there is no class, or one without images.
    """

    def __init__(self, root: str | os.PathLike, value_range: tuple[float, float] | None = None) -> None:
        self.root = os.fspath(root)
        self.classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and entry.name[0] != ".")
        if not self.classes:
            raise FileNotFoundError(f"no folder in {shown(root)}")
        folders = [os.path.join(self.root, name) for name in self.classes]
        seen = {_identity(folder) for folder in (self.root, *folders)}  # no link leads from one class to another
        paths, labels, left_out = [], [], Counter()
        for label, folder in enumerate(folders):
            of_class, others = image_paths(folder, seen)
            if not of_class:
                raise FileNotFoundError(f"no image in {shown(folder)}{f', but {counted(others)}' if others else ''}")
            paths += of_class
            labels += [label] * len(of_class)
            left_out += others
        self.labels = np.array(labels)
        self._keep(paths, left_out, value_range)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return super().__getitem__(index)[0], int(self.labels[index])


class ImageArrays(Dataset):
    """Images in memory: uint8 [N, H, W, 3] or grey [N, H, W], labels [N]."""

    value_range = None

    def __init__(self, pixels: np.ndarray, labels: np.ndarray, classes: Sequence[str] | None = None) -> None:
        self.pixels, self.labels, self.classes = pixels, labels, classes

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        pixels = torch.from_numpy(self.pixels[index])
        return pixels.expand(3, -1, -1) if pixels.ndim == 2 else pixels.permute(2, 0, 1), int(self.labels[index])


# Read a file


def read_image(path: str, value_range: tuple[float, float] | None = None) -> torch.Tensor:
    """Decode an image file to uint8 [3, H, W], turned as its EXIF orientation says. Raises UnreadableImage.

    torchvision decodes JPEG files faster than Pillow. Pillow takes the rest, also JPEG files that are cut short or in
    other colour spaces. value_range: of data.to_pixels.
    """

    def decode(file: BinaryIO) -> torch.Tensor:
        content = bytearray(file.read())
        with Image.open(io.BytesIO(content), formats=readable_formats()[1]) as image:  # refuses huge ones
            if decode_jpeg and content.startswith(b"\xff\xd8") and content.endswith(b"\xff\xd9"):
                with suppress(RuntimeError):
                    pixels = decode_jpeg(torch.frombuffer(content, dtype=torch.uint8), ImageReadMode.RGB)
                    return turned(pixels, orientation_of(image))
            image.load()  # also turns TIFF files
            return turned(to_pixels(image, value_range), orientation_of(image))

    return _read(path, decode)


def look_at(path: str, what: Callable[[Image.Image], Any]) -> Any:
    """Return what(image) of an image file of which only the header is read. Raises UnreadableImage."""

    def look(file: BinaryIO) -> Any:
        with Image.open(file, formats=readable_formats()[1]) as image:
            return what(image)

    return _read(path, look)


def image_size(path: str) -> tuple[int, int]:
    """(width, height) of an image file as `read_image` gives it, from its header. Raises UnreadableImage."""
    return look_at(path, _size)


def _size(image: Image.Image) -> tuple[int, int]:
    is_turned = orientation_of(image) >= 5 and image.format != "TIFF"  # Pillow gives turned TIFF files turned
    return image.size[::-1] if is_turned else image.size


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation of an image, 1 to 8; 1 if there is none."""
    with suppress(Exception):  # broken EXIF raises many kinds, and leaves the image as it is
        orientation = image.getexif().get(0x0112)
        return orientation if orientation in range(1, 9) else 1
    return 1


def turned(pixels: torch.Tensor, orientation: int) -> torch.Tensor:
    """Turn and mirror [3, H, W] as an EXIF orientation says, to how viewers show it."""
    if orientation >= 5:
        pixels = pixels.mT
    flips = {2: [2], 3: [1, 2], 4: [1], 6: [2], 7: [1, 2], 8: [1]}.get(orientation)
    pixels = pixels.flip(flips) if flips else pixels
    return pixels.permute(1, 2, 0).contiguous().permute(2, 0, 1) if orientation >= 5 else pixels


def _read(path: str, decode: Callable[[BinaryIO], Any]) -> Any:
    """Return decode(file). Retries once after errors of storage. Raises UnreadableImage with the file's name."""
    for pause in (RETRY_PAUSE, None):
        try:
            with open(path, "rb", opener=_open_without_waiting) as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    raise ValueError("it is not a regular file")
                if status.st_size == 0:
                    raise ValueError("it is empty")
                return decode(file)
        except MemoryError:
            raise
        except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError and more
            if pause is not None and getattr(error, "errno", None) in STORAGE_ERRORS:
                time.sleep(pause)
                continue
            reason, of_system = _reason(path, error)
            how = "" if of_system else " as an image"
            message = f"data_path: cannot read {shown(path)}{how}: {reason}"
            raise UnreadableImage(message, reason) from None


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # a pipe would wait for its other end


def _reason(path: str, error: Exception) -> tuple[str, bool]:
    """(why a file cannot be read, in one line; whether that is not for what the file holds)."""
    if getattr(error, "errno", None) is not None:
        is_dead_link = isinstance(error, FileNotFoundError) and os.path.islink(path)
        return error.strerror + (f", a link to {shown(os.readlink(path))}" if is_dead_link else ""), True
    if isinstance(error, UnidentifiedImageError):
        return "it is in no format that is read here, or its header is damaged", False
    if isinstance(error, Image.DecompressionBombError):
        limit = 2 * Image.MAX_IMAGE_PIXELS / 1e6
        return f"it has more than {limit:.0f} megapixels, Pillow's limit; cut it into tiles", False
    return shown(" ".join(str(error).split())) or type(error).__name__, False


# What a sample of a set tells


def sample_of(images: Dataset) -> range:
    """Indices of at most SAMPLE images, spread over a set."""
    return range(0, len(images), -(-len(images) // SAMPLE))


def look_at_some(images: ImageFiles, what: Callable[[Image.Image], Any]) -> list:
    """what(image) of a sample, for those whose header can be read. Raises UserError if there are none."""
    seen, first_error = [], None
    for i in sample_of(images):
        try:
            seen.append(look_at(images.paths[i], what))
        except UnreadableImage as error:
            first_error = first_error or error
    if not seen:
        raise UserError(f"{first_error}; nor can any other of {len(sample_of(images))} images of {shown(images.root)}")
    return seen


def typical_side(images: Dataset) -> int:
    """Median of the images' shorter sides in pixels, from a sample. Raises UserError if none can be read."""
    if isinstance(images, ImageFiles):
        return int(np.median([min(size) for size in look_at_some(images, _size)]))
    return int(np.median([min(images[i][0].shape[1:]) for i in sample_of(images)]))


def find_value_range(images: ImageFiles) -> tuple[float, float] | None:
    """The values that are to become 0 and 255 in images of 16 bits and in Pillow's modes I and F, from a sample.

    None if the sample has no such image. If some 16-bit values lie above half of their range, all of it: (0, 65535).
    Else from the least to the largest value, up to a thousandth of each image's pixels. Logs it, and whether files
    have several pages.
    """

    def values_of(image: Image.Image) -> tuple | None:
        if image.mode not in ("I", "F") and not has_16_bits(image):
            return None
        values = np.asarray(image, np.float64)
        values = values[np.isfinite(values)]
        low, high = np.percentile(values, (0.1, 99.9)) if values.size else (math.nan, math.nan)
        return low, high, has_16_bits(image)

    with suppress(UserError):  # none can be read: who needs one says so
        some = look_at_some(images, lambda image: (getattr(image, "n_frames", 1), values_of(image)))
        pages = sum(n > 1 for n, _ in some)
        if pages:
            log(f"data: {pages} of {len(some)} files looked at have several pages or frames; the first one is used")
        ranges = np.array([values for _, values in some if values is not None]).reshape(-1, 3)
        if len(ranges) and not np.isnan(ranges[:, :2]).all():
            low, high = float(np.nanmin(ranges[:, 0])), float(np.nanmax(ranges[:, 1]))
            if ranges[:, 2].all() and high >= 2**15:
                return 0.0, 65535.0
            high = high if high > low else low + 1
            log(f"data: values from {low:g} to {high:g} become 0 to 255, by {len(ranges)} of {len(some)} files")
            return low, high
    return None


# Images that cannot be read


def new_bad_images(images: Dataset) -> list[tuple[str, str]]:
    """(path, reason) of the images that this process and its loader's workers could not read since the last call."""
    files = images.images if isinstance(images, CachedImages) else images
    if not isinstance(files, ImageFiles):
        return []
    new = (files.bad == 1).nonzero().flatten().tolist()
    files.bad[new] = 2
    return [(files.paths[i], why_unreadable(files.paths[i], files.value_range)) for i in new]


def why_unreadable(path: str, value_range: tuple[float, float] | None = None) -> str:
    """The reason why an image file cannot be read; says so if it can."""
    try:
        read_image(path, value_range)
        return "it could not be read once, but can be read now"
    except UnreadableImage as error:
        return error.reason


class BadImages:
    """The images of a set that could not be read, over all processes: {path: reason}. Every process needs one.

    most: how many may be bad (None: 1 % of the set, at least 1). folder: where to list them in bad_images.txt.
    """

    def __init__(self, images: Dataset, most: int | None = None, folder: Path | None = None) -> None:
        self.images, self.list_path = images, folder and folder / "bad_images.txt"
        self.most = max(1, len(images) // 100) if most is None else most
        self.reasons: dict[str, str] = {}

    def update(self) -> int:
        """Add what is new, and return how many are bad. Every process must call it; raises RunStopped if too many."""
        new = new_bad_images(self.images)
        if dist.is_initialized():
            parts = [None] * dist.get_world_size()
            dist.all_gather_object(parts, new)
            new = [bad for part in parts for bad in part]
        new = {path: reason for path, reason in new if path not in self.reasons}
        self.reasons |= new
        if new and self.list_path and environment("RANK", 0) == 0:
            self._list(new)
        if len(self.reasons) > self.most:
            some = "; ".join(f"{shown(path)} ({reason})" for path, reason in list(self.reasons.items())[:3])
            listed = f"all are listed in {shown(self.list_path)}; " if self.list_path else ""
            raise RunStopped(
                f"{len(self.reasons)} of {len(self.images)} images cannot be read, more than --max_bad_images "
                f"{self.most}: {some}; {listed}repair or delete them, or set --max_bad_images"
            )
        return len(self.reasons)

    def _list(self, new: dict[str, str]) -> None:
        """Append lines of reason<TAB>path, in the path's own bytes; newlines in it as \\n, backslashes doubled."""
        try:
            before = self.list_path.read_bytes() if self.list_path.exists() else b""
            listed = {line.partition(b"\t")[2] for line in before.split(b"\n")}
            lines = {_as_one_line(path): reason for path, reason in new.items()}
            with open(self.list_path, "ab") as file:
                file.writelines(b"%s\t%s\n" % (lines[line].encode(), line) for line in lines if line not in listed)
        except OSError as error:  # a full disk: no reason to end a run
            log(f"cannot write {shown(self.list_path)}: {error.strerror}")


def _as_one_line(path: str) -> bytes:
    return os.fsencode(path).replace(b"\\", b"\\\\").replace(b"\n", b"\\n").replace(b"\r", b"\\r")


# Open a set


def open_images(
    dataset: str = "shapes",
    data_path: str | os.PathLike | None = None,
    split: str = "pretrain",
    download: bool = False,
    value_range: tuple[float, float] | None = None,
) -> Dataset:
    """Open a data set of (image uint8 [3, H, W], label).

    dataset: one of DATASETS. split: "pretrain" (all images for training without labels), "train" or "val".
    data_path: for "folder" and "pretrain", any tree of images (only its train/ if there is one of NAMED_SPLITS beside
    it); for "folder" and the other splits, a folder with train/ and one of NAMED_SPLITS, which hold a folder per class.
    For the named sets, where torchvision keeps them; for fashion_mnist also a folder with its four .gz files. "shapes"
    does not use it. value_range: of data.to_pixels, for folders (None: find it). Raises UserError if there are no
    images.
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
        return _open_folder(os.fspath(data_path), split, value_range)
    if dataset == "fashion_mnist" and os.path.exists(os.path.join(data_path, "train-images-idx3-ubyte.gz")):
        return _read_fashion_mnist(data_path, "t10k" if split == "val" else "train")
    return _open_torchvision(dataset, data_path, split, download)


def _open_folder(root: str, split: str, value_range: tuple[float, float] | None) -> ImageFiles:
    if split == "pretrain":
        beside = validation_folder(root)
        if beside and os.path.isdir(os.path.join(root, "train")):
            log(f"data: {shown(root)} holds train/ and {beside}/: training uses train/ alone")
            root = os.path.join(root, "train")
        images = ImageFiles(root, value_range)
    else:
        if os.path.basename(os.path.normpath(root)) == "train" and not os.path.isdir(os.path.join(root, "train")):
            root = os.path.dirname(os.path.normpath(root))  # training was given train/, and val/ lies next to it
        folder = os.path.join(root, "train" if split == "train" else validation_folder(root) or NAMED_SPLITS[0])
        try:
            images = LabelledImageFiles(folder, value_range)
        except OSError as error:
            raise UserError(
                f"data_path: expected {shown(folder)} with a folder of images for each class; labels need train/ and "
                f"{'/ or '.join(NAMED_SPLITS)}/ with the same class folders ({error})"
            ) from None
    if images.left_out:
        hint = "; .heic needs pip install pillow-heif" if images.left_out.keys() & {".heic", ".heif"} else ""
        log(f"data: left out in {shown(images.root)}, as no images: {counted(images.left_out)}{hint}")
    return images


def validation_folder(root: str) -> str | None:
    """The first of NAMED_SPLITS that a folder holds."""
    return next((name for name in NAMED_SPLITS if os.path.isdir(os.path.join(root, name))), None)


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

    sizes: (width, height) of each image, (0, 0) if unknown. path: the file that holds the memory (on Linux below
    /dev/shm), the same one for all processes and empty at first. It may be unlinked once all have opened it.
    """

    def __init__(self, images: ImageFiles, sizes: Sequence[tuple[int, int]], path: str) -> None:
        self.images, self.root = images, images.root
        self.sizes = np.array(sizes)  # an array, like paths: each worker would end up with a copy of a list
        # One byte per image, 1 if it is decoded, then the images.
        self.ends = len(images) + np.cumsum(3 * self.sizes.prod(axis=1))
        self.memory = torch.from_file(path, shared=True, size=int(self.ends[-1]), dtype=torch.uint8)
        self.is_decoded = self.memory[: len(images)].numpy()

    @property
    def value_range(self) -> tuple[float, float] | None:
        return self.images.value_range

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        (width, height), end = self.sizes[index].tolist(), int(self.ends[index])
        pixels = self.memory[end - 3 * width * height : end].view(height, width, 3).permute(2, 0, 1)
        if not self.is_decoded[index]:
            read = self.images[index][0]
            if read.shape != pixels.shape:  # the header could not be read, or the file has changed
                return read, -1
            pixels.copy_(read)
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
        sizes = [_size_if_readable(path) for path in paths]
        needed = sum(3 * width * height for width, height in sizes)
        if needed <= allowed:
            return sizes
    if cache == "ram" and needed:
        raise UserError(
            f"--cache ram: expected at most {allowed / 2**30:.1f} GiB of decoded images ({share:.0%} of the free "
            f"memory, and of Linux' /dev/shm), got about {needed / 2**30:.1f}; write --cache off"
        )
    return None


def _size_if_readable(path: str) -> tuple[int, int]:
    try:
        return image_size(path)
    except UnreadableImage:
        return 0, 0


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
    sizes = look_at_some(images, _size)
    needed = sum(3 * width * height for width, height in sizes) / len(sizes) * len(images)
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


# Check a folder: python images.py DIR

SIDES = (32, 96, 224, 512)  # pixels, between the classes of sizes


class _Checks(Dataset):
    """What a check of each image file tells: (format, mode, shorter side or None, identity, reason if it is bad)."""

    def __init__(self, images: ImageFiles) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[str | None, str | None, int | None, Any, str | None]:
        path, facts, reason = self.images.paths[index], (None, None, None), None
        try:
            facts = look_at(path, lambda image: (image.format, image.mode, min(_size(image))))
            read_image(path, self.images.value_range)
        except UnreadableImage as error:
            reason = error.reason
        return *facts, _identity(path), reason


def check_folder(root: str, workers: int) -> int:
    """Read every image below a folder, print what it holds, and return the number of images that cannot be read."""
    images = ImageFiles(root)
    log(f"{shown(root)}: {len(images):,} image files; reading them all in {workers} process(es)")
    options = dict(multiprocessing_context="fork") if workers and sys.platform == "linux" else {}
    loader = DataLoader(_Checks(images), 32, num_workers=workers, collate_fn=list, **options)
    formats, modes, sizes, first, copies, bad = Counter(), Counter(), Counter(), {}, [], {}
    checks = (check for batch in track(loader, "checking") for check in batch)
    for index, (format, mode, side, identity, reason) in enumerate(checks):
        if reason is not None:
            bad[index] = reason
        if format is not None:
            formats[format] += 1
            modes[mode] += 1
            sizes[sum(side >= limit for limit in SIDES)] += 1
        if first.setdefault(identity, index) != index:
            copies.append(index)
    between = [f"{low} to {high - 1}" for low, high in zip(SIDES, SIDES[1:], strict=False)]
    names = [f"below {SIDES[0]}", *between, f"from {SIDES[-1]}"]
    log(f"endings: {counted(Counter(map(ending_of, images.paths)))}")
    log(f"formats: {counted(formats)}")
    log(f"modes: {counted(modes)}")
    log("shorter side in pixels: " + ", ".join(f"{sizes[i]:,} {name}" for i, name in enumerate(names) if sizes[i]))
    log(f"left out, as no images: {counted(images.left_out) or 'none'}")
    log(f"the same file as another, by a link: {len(copies):,}")
    for index in copies[:20]:
        log(f"  {shown(images.paths[index])} is {shown(images.paths[first[_identity(images.paths[index])]])}")
    log(f"cannot be read: {len(bad):,}")
    for index, reason in bad.items():
        log(f"  {reason}\t{shown(images.paths[index])}")
    return len(bad)


def main(argv: Sequence[str]) -> None:
    """Check the folder of a command line; exits with 1 if an image cannot be read. Raises UserError."""
    parser = OptionParser(
        prog="images.py",
        usage="images.py DIR [options]",
        description="Read every image below a folder and print what it holds: endings, formats, modes, sizes, files\n"
        "left out, copies by links, and images that cannot be read. Exit code 1 if there are any of these.",
    )
    parser.start_group("check", affects="nothing")
    parser.common.append(parser.group.add_argument("folder", metavar="DIR", help="Check the images of this folder."))
    parser.add("workers", None, worker_count, "Read in this many processes.", common="N",
        default_text="one per CPU core")  # fmt: skip
    args = parser.parse_args(argv)
    sys.exit(1 if check_folder(args.folder, available_cores() if args.workers is None else args.workers) else 0)


if __name__ == "__main__":
    run_script(lambda: main(sys.argv[1:]))
