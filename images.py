"""Where images come from: files, named sets, drawn ones, a Dataset of yours; and which of them cannot be read.

    images = open_images("folder", "imagenet", split="train")    # or a list of paths, or tar files
    pixels, label = images[0]    # uint8 [3, H, W]; -1 where there is no label

    python images.py photos      # checks images before a run: what is there, which files cannot be read

To add a named set: put its name into DATASETS, and in `open_images` return an ImageArrays or your own Dataset.
"""

import gzip
import hashlib
import json
import mmap
import os
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torchvision
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset

from data import UnreadableImage, to_pixels
from decode import Member, check_images, ending_of, image_size, look_at, loses_bits, read_image, shown, value_limits
from labels import ChosenImages, align_classes, labelled_by_list, stratified
from launch import OptionParser, RunStopped, UserError, environment, log, track, worker_count
from machine import available_cores
from processes import run_script
from shapes import SHAPES_CLASSES, draw_shapes
from sources import (
    check_data_path,
    counted,
    find_images,
    identity,
    refuse_one_class,
    split_paths,
    splits_around,
    validation_folder,
)

DATASETS = ("shapes", "folder", "cifar10", "cifar100", "stl10", "fashion_mnist")
GIVEN = "python"  # in the place of one of these: a Dataset that the caller of train.main gives
SAMPLE = 100  # images of a set that are looked at for what all have in common


# Image sets: Datasets of (uint8 [3, H, W], label), label -1 where there is none. value_range: see data.to_pixels


class Images(Dataset):
    """Images that are read one by one, and may be unreadable. A subclass has `read`, `name_of` and `size_of`.

    bad: a byte for each image, which workers share: 1 if it cannot be read, 2 if `new_bad_images` has told so.
    """

    in_memory = False
    labels = classes = value_range = None

    def __init__(self, count: int) -> None:
        self.bad = torch.frombuffer(mmap.mmap(-1, count), dtype=torch.uint8)  # /dev/shm may be full

    def __len__(self) -> int:
        return len(self.bad)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        try:
            return self.read(index)
        except UnreadableImage:
            if not self.bad[index]:
                self.bad[index] = 1
            raise


class ImageFiles(Images):
    """Image files, in the order of their paths: of a folder, a list of paths, or tar files.

    root, labelled: as sources.find_images takes them; without `labelled`, each item has the label -1. Attributes: root,
    the folder; source, what was given; paths, a Sequence of str (decode.Member in tar files); labels and classes, also
    without `labelled` what a list or tar files tell; left_out, the number of other files by ending. Raises UserError
    if there is no image; reading an image raises UnreadableImage.
    """

    def __init__(
        self, root: str | os.PathLike, value_range: tuple[float, float] | None = None, labelled: bool = False
    ) -> None:
        self.source, self.labelled = os.fspath(root), labelled
        self.root = os.path.dirname(self.source) if os.path.isfile(self.source) else self.source
        self.paths, self.labels, self.classes, self.left_out = find_images(self.source, labelled)
        super().__init__(len(self.paths))
        self.value_range = value_range or find_value_range(self)

    def __len__(self) -> int:  # benchmarks repeat paths
        return len(self.paths)

    def read(self, index: int) -> tuple[torch.Tensor, int]:
        return self.read_pixels(index), int(self.labels[index]) if self.labelled else -1

    def read_pixels(self, index: int) -> torch.Tensor:
        return read_image(self.paths[index], self.value_range)

    def name_of(self, index: int) -> str:
        return str(self.paths[index])

    def size_of(self, index: int) -> tuple[int, int]:
        return image_size(self.paths[index])

    def contents(self) -> bytes:
        """The sorted names of the files, below their folder or in their tar file, with a NUL between."""
        root = os.path.join(os.fsencode(self.root), b"")
        names = (getattr(path, "name", path) for path in self.paths)  # of a decode.Member, or a path
        return b"\0".join(sorted(os.fsencode(name).removeprefix(root) for name in names))


class GivenImages(Images):
    """The images of somebody's Dataset, without labels.

    An item is an image, or a tuple that begins with one: PIL, uint8 tensor [3, H, W], or numpy uint8 [H, W, 3] or
    [H, W]. One that raises UnreadableImage, or an error of Pillow or the system, counts as unreadable. Raises UserError
    for a Dataset without length or index, and for items that are something else, such as normalised tensors.
    """

    def __init__(self, images: Dataset) -> None:
        name = type(images).__name__
        if isinstance(images, IterableDataset) or not (hasattr(images, "__len__") and hasattr(images, "__getitem__")):
            raise UserError(
                f"images: expected a Dataset with __len__ and __getitem__, as images are shuffled, got {name}; "
                "for a stream, write its images to a folder or to tar files"
            )
        if not len(images):
            raise UserError(f"images: expected a Dataset with images, got an empty {name}")
        self.given, self.source = images, f"{name} from Python"
        super().__init__(len(images))
        with suppress(UnreadableImage):
            self[0]  # one of a wrong kind is found at once

    def read(self, index: int) -> tuple[torch.Tensor, int]:
        try:
            item = self.given[index]
            image = item[0] if isinstance(item, (tuple, list)) and len(item) else item
            if isinstance(image, Image.Image):
                image.load()
                try:
                    return to_pixels(image), -1
                except ValueError as error:  # Pillow cannot convert some modes
                    raise UnreadableImage(str(error)) from None
        except (UnreadableImage, OSError, SyntaxError, Image.DecompressionBombError) as error:
            reason = shown(" ".join(str(error).split())) or type(error).__name__
            reason = error.reason if isinstance(error, UnreadableImage) else reason
            raise UnreadableImage(f"images: cannot read {self.name_of(index)}: {reason}", reason) from None
        kind = f"{getattr(image, 'dtype', '')} {list(image.shape)}" if hasattr(image, "shape") else ""
        is_array = isinstance(image, np.ndarray) and image.dtype == np.uint8
        if is_array and image.ndim > 1 and image.shape[2:] in ((), (1,), (3,)):
            image = torch.from_numpy(np.atleast_3d(image).copy()).permute(2, 0, 1).expand(3, -1, -1)
        if not torch.is_tensor(image) or image.dtype != torch.uint8 or image.ndim != 3 or len(image) != 3:
            raise UserError(
                f"images: expected items that are, or begin with, an image: PIL, uint8 tensor [3, H, W] or numpy uint8 "
                f"[H, W, 3]; got {type(image).__name__} {kind}".rstrip()
                + f" in {self.name_of(index)}; leave out transforms, training crops and normalises by itself"
            )
        return image, -1

    def name_of(self, index: int) -> str:
        return f"item {index}"

    def size_of(self, index: int) -> tuple[int, int]:
        return tuple(self.read(index)[0].shape[:0:-1])

    def contents(self) -> bytes:
        """A checksum of a few items; empty, with a line that says so, if they differ from one call to the next."""
        sums = []
        for index in sample_of(self)[::10]:
            with suppress(UnreadableImage):
                first, second = (zlib.crc32(self.read(index)[0].numpy().tobytes()) for _ in range(2))
                if first != second:
                    log("images: items differ from one call to the next, so a resumed run is not the same bit for bit")
                    return b""
                sums.append(first)
        return json.dumps(sums).encode()


class ImageArrays(Dataset):
    """Images in memory: uint8 [N, H, W, 3] or grey [N, H, W], labels [N]."""

    value_range, in_memory = None, True

    def __init__(self, pixels: np.ndarray, labels: np.ndarray, classes: Sequence[str] | None = None) -> None:
        self.pixels, self.labels, self.classes = pixels, labels, classes

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        pixels = torch.from_numpy(self.pixels[index])
        return pixels.expand(3, -1, -1) if pixels.ndim == 2 else pixels.permute(2, 0, 1), int(self.labels[index])

    def size_of(self, index: int) -> tuple[int, int]:
        return self.pixels.shape[2], self.pixels.shape[1]

    def contents(self) -> bytes:
        """A checksum of the pixels."""
        checksum = 0
        for start in range(0, len(self), 1000):  # a part at a time: pixels may be a view that is copied here
            checksum = zlib.crc32(np.ascontiguousarray(self.pixels[start : start + 1000]), checksum)
        return str(checksum).encode()


def fingerprint(images: Dataset) -> dict[str, int | str]:
    """What tells a set of images from another: {"images": how many, "paths": sha256 of their `contents`}."""
    return {"images": len(images), "paths": hashlib.sha256(images.contents()).hexdigest()}


# What a sample of a set tells


def sample_of(images: Dataset) -> range:
    """Indices of at most SAMPLE images, spread over a set."""
    return range(0, len(images), -(-len(images) // SAMPLE))


def look_at_some(images: Dataset, what: Callable[[int], Any]) -> list:
    """what(index) of a sample, for the images that can be opened. Raises UserError if there are none."""
    seen, errors = [], []
    for index in sample_of(images):
        try:
            seen.append(what(index))
        except UnreadableImage as error:
            errors.append(error)
    if not seen:
        raise UserError(f"{errors[0]}; nor can any other of {len(errors)} images of {shown(images.source)}")
    return seen


def typical_side(images: Dataset) -> int:
    """Median of the images' shorter sides in pixels, from a sample. Raises UserError if none can be read."""
    return int(np.median([min(size) for size in look_at_some(images, images.size_of)]))


LOST_BITS = "16 bits a channel in colour, of which only the upper 8 are used; save them as 16-bit PNG to use all"


def find_value_range(images: ImageFiles) -> tuple[float, float] | None:
    """The values that become 0 and 255 in images of 16 bits and in Pillow's modes I and F, from a sample; logs them.

    None if the sample has no such image. If some 16-bit values lie above half of their range, all of it: (0, 65535).
    Else from the least to the largest value, up to a thousandth of each image's values. Also logs whether files have
    several pages, or bits that are not used.
    """

    def facts_of(image: Image.Image) -> tuple[bool, bool, tuple[float, float, bool] | None]:
        return getattr(image, "n_frames", 1) > 1, loses_bits(image), value_limits(image)

    try:
        facts = look_at_some(images, lambda index: look_at(images.paths[index], facts_of))
    except UserError:  # none can be read: who needs one says so
        return None
    pages, lossy, limits = zip(*facts, strict=True)
    if any(pages):
        log(f"data: {sum(pages)} of {len(facts)} files looked at have several pages or frames; the first one is used")
    if any(lossy):
        log(f"data: {sum(lossy)} of {len(facts)} files looked at have {LOST_BITS}")
    ranges = [of_file for of_file in limits if of_file]
    if not ranges:
        return None
    lows, highs, are_16_bit = zip(*ranges, strict=True)
    low, high = min(lows), max(highs)
    if all(are_16_bit) and high >= 2**15:
        return 0.0, 65535.0
    high = high if high > low else low + 1
    log(f"data: values from {low:g} to {high:g} become 0 to 255, by {len(ranges)} of {len(facts)} files")
    return low, high


# Images that cannot be read


def new_bad_images(images: Dataset) -> list[tuple[str, str]]:
    """(name, reason) of the images that this process and its loader's workers could not read since the last call."""
    used = None  # indices of the images that are used, of those below; None: all
    while isinstance(images, ChosenImages):
        images, used = images.images, images.indices if used is None else images.indices[used]
    if not isinstance(images, Images):
        return []
    new, found = np.flatnonzero(images.bad.numpy() == 1), []
    if used is not None:
        new = np.intersect1d(new, used)
    images.bad[new] = 2
    for index in new.tolist():
        reason = "it could not be read once, but can be read now"
        try:
            images.read(index)
        except UnreadableImage as error:
            reason = error.reason
        found.append((images.name_of(index), reason))
    return found


def most_bad(images: int) -> int:
    """How many images of a set may be bad by default: 1 %, at least 1."""
    return max(1, images // 100)


class BadImages:
    """The images of a set that could not be read, over all processes: {path: reason}. Every process needs one.

    most: how many may be bad (None: 1 % of the set, at least 1). folder: where to list them in bad_images.txt.
    """

    def __init__(self, images: Dataset, most: int | None = None, folder: Path | None = None) -> None:
        self.images, self.list_path = images, folder and folder / "bad_images.txt"
        self.most = most_bad(len(images)) if most is None else most
        self.reasons: dict[str, str] = {}

    def update(self) -> int:
        """Add what is new, and return how many are bad. Every process must call it; raises RunStopped if too many."""
        new = new_bad_images(self.images)
        parts = [new]
        if dist.is_initialized():
            parts = [None] * dist.get_world_size()
            dist.all_gather_object(parts, new)
        new = {path: reason for part in parts for path, reason in part if path not in self.reasons}
        self.reasons |= new
        if new and self.list_path and environment("RANK", 0) == 0:
            self._list(new)
        if len(self.reasons) > self.most:
            some = "; ".join(f"{shown(path)} ({reason})" for path, reason in list(self.reasons.items())[:3])
            listed = f"all are listed in {shown(self.list_path)}; " if self.list_path else ""
            raise RunStopped(
                f"{len(self.reasons)} of {len(self.images)} images cannot be read, and --max_bad_images allows "
                f"{self.most}: {some}; {listed}repair or delete them, or set --max_bad_images"
            )
        return len(self.reasons)

    def _list(self, new: dict[str, str]) -> None:
        """Append lines of reason<TAB>path, in the path's own bytes; newlines in it as \\n, backslashes doubled."""
        try:
            before = self.list_path.read_bytes() if self.list_path.exists() else b""
            listed = {line.partition(b"\t")[2] for line in before.split(b"\n")}
            with open(self.list_path, "ab") as file:
                for path, reason in new.items():
                    line = os.fsencode(path).replace(b"\\", b"\\\\").replace(b"\n", b"\\n").replace(b"\r", b"\\r")
                    if line not in listed:
                        file.write(b"%s\t%s\n" % (reason.encode(), line))
        except OSError as error:  # a full disk: no reason to end a run
            log(f"cannot write {shown(self.list_path)}: {error.strerror}")


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
    data_path: for "folder", a folder with train/ and one of NAMED_SPLITS (or both as .txt or .tar), whose labels are
    the folders in them or those of lists and tar files; "pretrain" uses train/ alone, and also takes what `ImageFiles`
    takes. For the named sets, where torchvision keeps them; for fashion_mnist also a folder with its four .gz files.
    "shapes" does not use it. value_range: of data.to_pixels, for files (None: find it). Raises UserError if there are
    no images.
    """
    if dataset == GIVEN:
        raise UserError("data_path: training had its images from Python; name images, by data_path or a data set")
    if dataset not in DATASETS:
        raise UserError(f"dataset: expected one of {', '.join(DATASETS)}, got {dataset}")
    if split not in ("pretrain", "train", "val"):
        raise UserError(f"split: expected pretrain, train or val, got {split}")
    if dataset == "shapes":
        return ImageArrays(*draw_shapes("val" if split == "val" else "train"), SHAPES_CLASSES)
    if data_path is None:
        raise UserError(f"data_path: --dataset {dataset} needs the folder that holds it")
    if dataset == "folder":
        return _open_folder(os.fspath(data_path), split, value_range)
    if dataset == "fashion_mnist" and os.path.exists(os.path.join(data_path, "train-images-idx3-ubyte.gz")):
        return _read_fashion_mnist(data_path, "t10k" if split == "val" else "train")
    return _open_torchvision(dataset, data_path, split, download)


def open_splits(
    dataset: str,
    data_path: str | None,
    world_size: int,
    value_range: tuple[float, float] | None = None,
    *,
    val_share: float | None = None,
    val_labels: str | None = None,
    seed: int = 0,
) -> tuple[Dataset, Dataset]:
    """Training and validation images with labels of the same classes, two or more. Raises UserError.

    value_range: of the checkpoint's training (None: that of the training images), see data.to_pixels. val_share: take
    this share of each class for validation; data_path then is one folder of class folders (or has them in train/).
    seed: of that draw. val_labels: a file with the classes of a flat folder of validation images, see
    labels.labelled_by_list. Logs classes that one of the splits lacks; images that training has no class for are left
    out.
    """
    download, in_train = world_size == 1, os.path.isdir(os.path.join(data_path or "", "train"))
    if val_share is not None and dataset == "folder" and not in_train:
        train_images = ImageFiles(data_path, value_range, labelled=True)
    else:
        train_images = open_images(dataset, data_path, "train", download, value_range)
    if dataset == "folder" and len(train_images.classes) < 2:  # whatever the features, all would be right
        refuse_one_class(train_images.source, train_images.paths, train_images.classes[0])
    if val_share is not None:
        chosen = stratified(train_images.labels, val_share, seed, leave_one=True)
        others = np.setdiff1d(np.arange(len(train_images)), chosen)
        if not len(chosen):
            got = f"{len(train_images)} images in all"
            raise UserError(f"--val_share: expected two images or more of a class, got {got}")
        train_images, val_images = (ChosenImages(train_images, indices) for indices in (others, chosen))
    elif val_labels is not None:
        folder = os.path.dirname(os.path.normpath(train_images.root))
        images = ImageFiles(os.path.join(folder, validation_folder(folder)), train_images.value_range)
        val_images = labelled_by_list(images, train_images.classes, val_labels)
    else:
        val_images = open_images(dataset, data_path, "val", download, train_images.value_range)
    val_images = align_classes(train_images, val_images)
    if min(len(train_images), len(val_images)) < world_size:
        raise UserError(f"data_path: expected at least an image for each of {world_size} processes in train/ and val/")
    return train_images, val_images


def _open_folder(root: str, split: str, value_range: tuple[float, float] | None) -> ImageFiles:
    """Open a split of a folder with splits; for "pretrain" also a folder without them, a list of paths, tar files."""
    if split != "pretrain":
        root, splits = splits_around(root)
        splits = splits or ("train", validation_folder(root))
        root = os.path.join(root, splits[split == "val"])
    elif splits := split_paths(root):
        log(f"data: {shown(root)} holds {splits[0]} and {splits[1]}: training uses {splits[0]} alone")
        root = os.path.join(root, splits[0])
    images = ImageFiles(root, value_range, labelled=split != "pretrain")
    if images.left_out:
        hint = "; .heic needs pip install pillow-heif" if images.left_out.keys() & {".heic", ".heif"} else ""
        log(f"data: left out in {shown(images.source)}, as no images: {counted(images.left_out)}{hint}")
    return images


def has_validation_split(data_path: str | os.PathLike) -> bool:
    """Whether a validation split lies in a folder, or beside it if it is the training split (also a list, a tar file).

    Without one, class folders are no labels: they may be anybody's way of sorting.
    """
    return splits_around(os.fspath(data_path))[1] is not None


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


# Check images: python images.py DIR

# Of shorter sides in pixels: the least and the largest
SIDES = {"below 32": (0, 31), "32 to 95": (32, 95), "96 to 223": (96, 223), "224 to 511": (224, 511),
         "from 512": (512, sys.maxsize)}  # fmt: skip


def check_folder(root: str, workers: int) -> int:
    """Read every image of a folder, list or tar files, print what is there, and return how many cannot be read."""
    check_data_path(root)
    images = ImageFiles(root)
    log(f"{shown(root)}: {len(images):,} image files; reading them all in {workers or 1} process(es)")
    options = dict(multiprocessing_context="fork") if workers and sys.platform == "linux" else {}
    check = partial(check_images, value_range=images.value_range)
    batches = DataLoader(images.paths, 32, num_workers=workers, collate_fn=check, **options)
    found = list(chain.from_iterable(track(batches, "checking", unit="batch of 32")))
    bad = {path: reason for path, (_, reason) in zip(images.paths, found, strict=True) if reason}
    formats, modes, sides, losses = (Counter(facts[i] for facts, _ in found if facts) for i in range(4))
    first, links = {}, {}
    for path in images.paths:
        place = (path.tar, path.offset) if isinstance(path, Member) else identity(path)
        same = first.setdefault(place, path)
        if same != path:
            links[path] = same
    for name, counts in dict(endings=Counter(map(ending_of, images.paths)), formats=formats, modes=modes).items():
        log(f"{name}: {counted(counts) or 'none'}")
    counts = {name: sum(sides[s] for s in sides if low <= s <= high) for name, (low, high) in SIDES.items()}
    log("shorter side in pixels: " + (", ".join(f"{name}: {n:,}" for name, n in counts.items() if n) or "none"))
    if losses[True]:
        log(f"{losses[True]:,} files have {LOST_BITS}")
    log(f"left out, as no images: {counted(images.left_out) or 'none'}")
    log(f"links to an image that is counted already: {len(links):,}")
    for path, other in list(links.items())[:20]:
        log(f"  {shown(path)} is {shown(other)}")
    if len(links) > 20:
        log("  ...")
    log(f"cannot be read: {len(bad):,}")
    for path, reason in bad.items():
        log(f"  {reason}\t{shown(path)}")
    if bad:
        most = most_bad(len(images.paths))
        stops = f"so it stops unless you set --max_bad_images {len(bad)}" if len(bad) > most else "so it goes on"
        log(f"repair or delete these; train.py takes other images in the place of {most} at most, {stops}")
    return len(bad)


def main(argv: Sequence[str]) -> None:
    """Check the images of a command line; exits with 1 if an image cannot be read. Raises UserError."""
    parser = OptionParser(
        prog="images.py",
        usage="images.py DIR [options]",
        description="Read every image of a folder, a list or tar files, as a run does, and print what is there:\n"
        "endings, formats, colour modes, sizes, other files, links to the same image; what cannot be read, and why.\n"
        "Exit code 1 if an image cannot be read, else 0. Example: python images.py photos > found.txt",
    )
    parser.start_group("check", affects="nothing")
    what = "A folder, a .txt list of paths or a .tar file, as for --data_path of train.py."
    parser.common.append(parser.group.add_argument("folder", metavar="DIR", help=what))
    parser.add("workers", None, worker_count, "Read in this many processes.", common="N",
        default_text="one per CPU core")  # fmt: skip
    args = parser.parse_args(argv)
    sys.exit(1 if check_folder(args.folder, available_cores() if args.workers is None else args.workers) else 0)


if __name__ == "__main__":
    run_script(lambda: main(sys.argv[1:]))
