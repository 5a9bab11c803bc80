"""Where images come from: folders, named sets, drawn ones; and which of them cannot be read.

    images = open_images("folder", "imagenet", split="train")
    pixels, label = images[0]    # uint8 [3, H, W]; -1 where there is no label

    python images.py photos      # checks a folder before a run: what it holds, which files cannot be read

To add a named set: put its name into DATASETS, and in `open_images` return an ImageArrays or your own Dataset.
"""

import gzip
import hashlib
import mmap
import os
import sys
import time
import warnings
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torchvision
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from data import UnreadableImage
from decode import check_images, look_at, loses_bits, read_image, readable_formats, shown, size_of, value_limits
from labels import ChosenImages, align_classes, labelled_by_list, stratified
from launch import OptionParser, RunStopped, UserError, environment, log, show_progress, track, worker_count
from machine import available_cores
from processes import run_script
from shapes import SHAPES_CLASSES, draw_shapes

DATASETS = ("shapes", "folder", "cifar10", "cifar100", "stl10", "fashion_mnist")
NAMED_SPLITS = ("val", "valid", "validation", "test")  # beside train/: the first of these is the validation split
SAMPLE = 100  # images of a set that are looked at for what all have in common


# Files of a folder. Hidden ones, which systems and editors leave among images, are skipped.


def counted(counts: Counter) -> str:
    """Counts in words, the largest first."""
    return ", ".join(f"{count:,} {shown(what)}" for what, count in counts.most_common())


def ending_of(path: str) -> str:
    return os.path.splitext(path)[1].lower() or "no ending"


def _identity(path: str) -> tuple[int, int] | str:
    """(device, inode) of a file or folder: the same by every link to it."""
    try:
        status = os.stat(path)
    except OSError:
        return path
    return status.st_dev, status.st_ino


def files_below(root: str, seen: set) -> Iterator[str]:
    """Yield the path of each file in a folder and in those below it, each folder once; links to folders come last.

    seen: identities of folders to leave out, to which those visited are added. Links to a folder that root lies in are
    left out too: they lead back to root. Warns of folders that cannot be read.
    """
    seen |= {_identity(str(folder)) for folder in Path(root).resolve().parents}
    folders = deque([root])
    while folders:
        folder = folders.popleft()
        identity, subfolders, links = _identity(folder), [], []
        if folder != root and identity in seen:
            continue
        seen.add(identity)
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if not os.path.isdir(entry) if entry.is_symlink() else not entry.is_dir():
                        yield entry.path
                    else:
                        (links if entry.is_symlink() else subfolders).append(entry.path)
        except OSError as error:
            warnings.warn(f"data_path: {shown(folder)} is left out: {error.strerror}", stacklevel=2)
        folders.extendleft(sorted(subfolders, reverse=True))
        folders.extend(sorted(links))


def list_images(folders: Sequence[str], seen: set) -> tuple[list[list[bytes]], list[Counter]]:
    """(sorted paths of the images, counts of the other files by ending) in and below each folder. Logs progress.

    seen: of `files_below`.
    """
    endings, pause = readable_formats()[0], 1 if sys.stdout.isatty() else 30
    paths, left_out = [[] for _ in folders], [Counter() for _ in folders]
    found, has_line, next_line = 0, False, time.monotonic() + pause
    for of_folder, others, folder in zip(paths, left_out, folders, strict=True):
        for path in files_below(folder, seen):
            if path.lower().endswith(endings):
                of_folder.append(os.fsencode(path))
                found += 1
            else:
                others[ending_of(path)] += 1
            if time.monotonic() > next_line:
                show_progress(f"data: {found:,} images found so far, in {shown(os.path.dirname(path))}")
                has_line, next_line = True, time.monotonic() + pause
        of_folder.sort()
    if has_line:
        show_progress(f"data: {found:,} images found", keep=True)
    return paths, left_out


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
    """Every image file in and below a folder, in the order of their paths, without labels.

    labelled: only those in and below its subfolders, which are the classes. left_out: number of other files by ending.
    bad: a byte for each image, which workers share: 1 if it cannot be read, 2 if `new_bad_images` has told so. Raises
    UserError if a folder is missing or holds no image; reading an image raises UnreadableImage.
    """

    def __init__(
        self, root: str | os.PathLike, value_range: tuple[float, float] | None = None, labelled: bool = False
    ) -> None:
        self.root, hint = os.fspath(root), ""
        if labelled:
            hint = f"; labels need train/ and {'/ or '.join(NAMED_SPLITS)}/ with a folder of images for each class"
            hint += " (or --val_share, --val_labels)"
        try:
            with os.scandir(root) as entries:
                classes = sorted(e.name for e in entries if labelled and e.is_dir() and not e.name.startswith("."))
        except OSError as error:
            reason = f"{shown(root)}: {error.strerror}{hint}"
            raise UserError(f"data_path: expected a folder of images, got {reason}") from None
        if labelled and not classes:
            raise UserError(f"data_path: expected a folder for each class in {shown(root)}, found none{hint}")
        self.classes = classes if labelled else None
        folders = [os.path.join(self.root, name) for name in classes] if labelled else [self.root]
        # With what is seen from the start, no link leads from one class to another.
        paths, left_out = list_images(folders, {_identity(folder) for folder in (self.root, *folders)})
        for folder, of_folder, others in zip(folders, paths, left_out, strict=True):
            if not of_folder:
                raise UserError(
                    f"data_path: expected image files ({', '.join(readable_formats()[0])}) in or below "
                    f"{shown(folder)}, found none{f', but {counted(others)}' if others else ''}{hint}"
                )
        self.paths, self.left_out = Paths(list(chain(*paths))), sum(left_out, Counter())
        self.labels = np.repeat(np.arange(len(folders)), list(map(len, paths))) if labelled else None
        self.bad = torch.frombuffer(mmap.mmap(-1, len(self.paths)), dtype=torch.uint8)  # /dev/shm may be full
        self.value_range = value_range or find_value_range(self)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        try:
            pixels = read_image(self.paths[index], self.value_range)
        except UnreadableImage:
            if not self.bad[index]:
                self.bad[index] = 1
            raise
        return pixels, -1 if self.labels is None else int(self.labels[index])


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


def fingerprint(images: Dataset) -> dict[str, int | str]:
    """What tells a set of images from another: {"images": how many, "paths": sha256}.

    The sum is over the sorted paths below the set's folder, as bytes with a NUL between; of images in memory over a
    checksum of their pixels.
    """
    if isinstance(images, ChosenImages):
        chosen = f"{fingerprint(images.images)['paths']} {images.indices.tolist()} {images.labels.tolist()}"
        return {"images": len(images), "paths": hashlib.sha256(chosen.encode()).hexdigest()}
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


# What a sample of a set tells


def sample_of(images: Dataset) -> range:
    """Indices of at most SAMPLE images, spread over a set."""
    return range(0, len(images), -(-len(images) // SAMPLE))


def look_at_some(images: ImageFiles, what: Callable[[Image.Image], Any]) -> list:
    """what(opened image) of a sample, for those that can be opened. Raises UserError if there are none."""
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
    while isinstance(images, ChosenImages):
        images = images.images
    if isinstance(images, ImageFiles):
        return int(np.median([min(size) for size in look_at_some(images, size_of)]))
    return int(np.median([min(images[i][0].shape[1:]) for i in sample_of(images)]))


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
        facts = look_at_some(images, facts_of)
    except UserError:  # none can be read: who needs one says so
        return None
    pages, lossy = (sum(column) for column in list(zip(*facts, strict=True))[:2])
    if pages:
        log(f"data: {pages} of {len(facts)} files looked at have several pages or frames; the first one is used")
    if lossy:
        log(f"data: {lossy} of {len(facts)} files looked at have {LOST_BITS}")
    ranges = [found for *_, found in facts if found]
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
    """(path, reason) of the images that this process and its loader's workers could not read since the last call."""
    files, chosen = images, slice(None)  # indices of the files that `images` holds
    while not hasattr(files, "bad") and hasattr(files, "images"):  # below a cache or a choice
        chosen = files.indices[chosen] if isinstance(files, ChosenImages) else chosen
        files = files.images
    if not isinstance(files, ImageFiles):
        return []
    chosen = np.arange(len(files))[chosen]
    new, found = chosen[files.bad.numpy()[chosen] == 1].tolist(), []
    files.bad[new] = 2
    for path in (files.paths[i] for i in new):
        try:
            read_image(path, files.value_range)
            found.append((path, "it could not be read once, but can be read now"))
        except UnreadableImage as error:
            found.append((path, error.reason))
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
    """Training and validation images with labels of the same classes. Raises UserError.

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
    if val_share is not None:
        chosen = stratified(train_images.labels, val_share, seed, leave_one=True)
        others = np.setdiff1d(np.arange(len(train_images)), chosen)
        if not len(chosen):
            raise UserError(
                f"--val_share: expected two images or more of a class, got {len(train_images)} images in all"
            )
        train_images, val_images = (ChosenImages(train_images, indices) for indices in (others, chosen))
    elif val_labels is not None:
        flat = os.path.dirname(train_images.root), validation_folder(os.path.dirname(train_images.root))
        images = ImageFiles(os.path.join(flat[0], flat[1] or NAMED_SPLITS[0]), train_images.value_range)
        val_images = labelled_by_list(images, train_images.classes, val_labels)
    else:
        val_images = open_images(dataset, data_path, "val", download, train_images.value_range)
    val_images = align_classes(train_images, val_images)
    if min(len(train_images), len(val_images)) < world_size:
        raise UserError(f"data_path: expected at least an image for each of {world_size} processes in train/ and val/")
    return train_images, val_images


def _open_folder(root: str, split: str, value_range: tuple[float, float] | None) -> ImageFiles:
    train = os.path.join(root, "train")
    if split == "pretrain":
        beside = validation_folder(root)
        if beside and os.path.isdir(train):
            log(f"data: {shown(root)} holds train/ and {beside}/: training uses train/ alone")
            root = train
    else:
        if os.path.basename(os.path.normpath(root)) == "train" and not os.path.isdir(train):
            root = os.path.dirname(os.path.normpath(root))  # training was given train/, and val/ lies next to it
        root = os.path.join(root, "train" if split == "train" else validation_folder(root) or NAMED_SPLITS[0])
    images = ImageFiles(root, value_range, labelled=split != "pretrain")
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


# Check a folder: python images.py DIR

SIDES = {"below 32": 0, "32 to 95": 32, "96 to 223": 96, "224 to 511": 224, "from 512": 512}  # least pixels of each


def check_folder(root: str, workers: int) -> int:
    """Read every image below a folder, print what it holds, and return the number of images that cannot be read."""
    images = ImageFiles(root)
    log(f"{shown(root)}: {len(images):,} image files; reading them all in {workers or 1} process(es)")
    options = dict(multiprocessing_context="fork") if workers and sys.platform == "linux" else {}
    check = partial(check_images, value_range=images.value_range)
    batches = DataLoader(images.paths, 32, num_workers=workers, collate_fn=check, **options)
    endings, formats, modes, sides, lossy = Counter(map(ending_of, images.paths)), Counter(), Counter(), Counter(), 0
    first, links, bad = {}, {}, {}
    found = chain.from_iterable(track(batches, "checking", unit="batch of 32"))
    for path, (facts, reason) in zip(images.paths, found, strict=True):
        if facts:
            format, mode, side, loses = facts
            formats[format] += 1
            modes[mode] += 1
            sides[[name for name, least in SIDES.items() if side >= least][-1]] += 1
            lossy += loses
        if reason:
            bad[path] = reason
        same = first.setdefault(_identity(path), path)
        if same != path:
            links[path] = same
    for name, counts in dict(endings=endings, formats=formats, modes=modes).items():
        log(f"{name}: {counted(counts) or 'none'}")
    log("shorter side in pixels: " + (", ".join(f"{name}: {sides[name]:,}" for name in SIDES if sides[name]) or "none"))
    if lossy:
        log(f"{lossy:,} files have {LOST_BITS}")
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
    """Check the folder of a command line; exits with 1 if an image cannot be read. Raises UserError."""
    parser = OptionParser(
        prog="images.py",
        usage="images.py DIR [options]",
        description="Read every image in and below a folder, as a run does, and print what is there: endings,\n"
        "formats, colour modes, sizes, other files, links to the same image, and what cannot be read, and why.\n"
        "Exit code 1 if an image cannot be read, else 0. Example: python images.py photos > found.txt",
    )
    parser.start_group("check", affects="nothing")
    parser.common.append(
        parser.group.add_argument("folder", metavar="DIR", help="The folder, as for --data_path of train.py.")
    )
    parser.add("workers", None, worker_count, "Read in this many processes.", common="N",
        default_text="one per CPU core")  # fmt: skip
    args = parser.parse_args(argv)
    sys.exit(1 if check_folder(args.folder, available_cores() if args.workers is None else args.workers) else 0)


if __name__ == "__main__":
    run_script(lambda: main(sys.argv[1:]))
