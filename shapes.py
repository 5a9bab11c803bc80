"""The built-in images, drawn as they are needed: 64-pixel images of ten textures, with labels.

    pixels, labels = draw_shapes("train")    # uint8 [5000, 64, 64, 3], int64 [5000]

Copy this file to use it elsewhere: it needs only NumPy.
"""

import math
import zlib

import numpy as np

SHAPES_CLASSES = ("stripes", "checks", "dots", "rings", "waves", "camouflage", "grid", "rays", "bricks", "zigzags")
SHAPES_COUNTS = {"train": 5000, "val": 2000}
TAU = 2 * math.pi


def draw_shapes(split: str, size: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Draw a split, "train" or "val": uint8 [N, size, size, 3] and labels [N], in balanced classes.

    N is SHAPES_COUNTS[split]. A label is an index into SHAPES_CLASSES.
    """
    drawn = [draw_shape(split, index, size) for index in range(SHAPES_COUNTS[split])]
    return np.stack([pixels for pixels, _ in drawn]), np.array([label for _, label in drawn])


def draw_shape(split: str, index: int, size: int = 64) -> tuple[np.ndarray, int]:
    """Draw image `index` of a split: (uint8 [size, size, 3], label), the same in every run.

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
