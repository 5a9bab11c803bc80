"""The cache: image files decoded once, into memory that all processes and workers of a machine share.

sizes = sizes_to_cache(images, "auto")    # None if they do not fit; on the first process of each machine
images = cache_images(images, sizes)      # on all processes
"""

import math
import os
import socket
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from data import UnreadableImage
from decode import image_size
from images import ImageFiles, look_at_some
from launch import UserError, at_exit, environment, log, track
from machine import memory_left, shared_memory_left
from processes import exchange


class CachedImages(ImageFiles):
    """The same image files, decoded once into memory that all processes and workers of a machine share.

    sizes: (width, height) of each image, (0, 0) if unknown. path: the file that holds the memory (on Linux below
    /dev/shm), the same one for all processes and empty at first. It may be unlinked once all have opened it.
    """

    in_memory = True

    def __init__(self, images: ImageFiles, sizes: Sequence[tuple[int, int]], path: str) -> None:
        vars(self).update(vars(images))
        self.sizes = np.array(sizes)  # an array, like paths: each worker would end up with a copy of a list
        # One byte per image, 1 if it is decoded, then the images.
        self.ends = len(images) + np.cumsum(3 * self.sizes.prod(axis=1))
        self.memory = torch.from_file(path, shared=True, size=int(self.ends[-1]), dtype=torch.uint8)
        self.is_decoded = self.memory[: len(images)].numpy()

    def read_pixels(self, index: int) -> torch.Tensor:
        (width, height), end = self.sizes[index].tolist(), int(self.ends[index])
        pixels = self.memory[end - 3 * width * height : end].view(height, width, 3).permute(2, 0, 1)
        if not self.is_decoded[index]:
            read = super().read_pixels(index)
            if read.shape != pixels.shape:  # the header could not be read, or the file has changed
                return read
            pixels.copy_(read)
            self.is_decoded[index] = 1  # two workers may decode it at the same time: they write the same
        return pixels


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
        sizes = []
        for path in track(images.paths, "cache: reading the sizes of all images", unit="image"):
            try:
                sizes.append(image_size(path))
            except UnreadableImage:
                sizes.append((0, 0))
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
    machine = [socket.gethostname(), environment("GROUP_RANK", 0)]
    # The memory stays until the last process that opened it ends.
    with at_exit(lambda: path and _delete_cache(path)):
        offers = exchange("sharing the cache", [machine, path])
        offer = next((theirs for place, theirs in offers if place == machine and theirs), None)
        if offer is not None:
            images = CachedImages(images, np.load(offer + ".npy"), offer)
        exchange("opening the cache", None)
    return images


def _allocate_cache(sizes: Sequence[tuple[int, int]]) -> str | None:
    """The path of a file below /dev/shm with the memory for a cache; None, and a line, if there is not enough.

    Allocated now, as writing to memory that is missing later would kill the process. Beside it, path.npy tells the
    sizes to the other processes of this machine.
    """
    total, path = len(sizes) + sum(3 * width * height for width, height in sizes), None
    try:
        descriptor, path = tempfile.mkstemp(prefix="swav-", dir="/dev/shm")
        with open(descriptor, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, total)
        np.save(path + ".npy", sizes)
    except OSError as error:
        if path:
            _delete_cache(path)
        log(f"cache: none, as {total / 2**20:.0f} MiB of /dev/shm could not be allocated: {error.strerror}")
        return None
    return path


def _delete_cache(path: str) -> None:
    for name in (path, path + ".npy"):
        Path(name).unlink(missing_ok=True)


def cache_bytes(images: Dataset, share: float = 1 / 4, for_workers: int = 0) -> tuple[int, int]:
    """Bytes that the decoded images need (estimated from a hundred of them), and bytes that a cache may take.

    share: of the free memory and of /dev/shm. for_workers: bytes of /dev/shm to leave at least. (0, 0) for sets that
    are in memory already; a cache may take nothing where there is no /dev/shm, as on other systems than Linux.
    """
    if not isinstance(images, ImageFiles):
        return 0, 0
    sizes = look_at_some(images, images.size_of)
    needed = sum(3 * width * height for width, height in sizes) / len(sizes) * len(images)
    free = shared_memory_left()
    if math.isinf(free):
        return int(needed), 0
    return int(needed), max(0, int(min(share * min(free, memory_left()), free - for_workers)))
