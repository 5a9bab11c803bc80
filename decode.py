"""Read one image file: to pixels as viewers show them, or what its header tells; all that may be wrong is one error.

    pixels = read_image("photo.jpg")      # uint8 [3, H, W]
    width, height = image_size("photo.jpg")
    pixels = read_image(Member("photos.tar", "photo.jpg", offset=512, size=7000))    # a file in a tar file

Copy this file with `data.py` to use it elsewhere: they need only torch, torchvision and Pillow.
"""

import errno
import functools
import io
import os
import stat
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError, features

from data import UnreadableImage, has_16_bits, to_8_bits, to_pixels

try:  # torchvision plans to drop it
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:
    decode_jpeg = None

ENDINGS = (".jpg", ".jpeg", ".jfif", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp", ".gif")
# Pillow's formats. Not all that it knows: to open some of them it starts other programs.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "DIB", "TIFF", "WEBP", "GIF", "JPEG2000")

# Errors of storage that may be gone a moment later
STORAGE_ERRORS = (
    "EIO ESTALE EMFILE ENFILE ETIMEDOUT EAGAIN EBUSY ENOMEM EREMOTEIO ENOTCONN ECONNRESET EHOSTDOWN".split()
)
STORAGE_ERRORS = [getattr(errno, name) for name in STORAGE_ERRORS if hasattr(errno, name)]
RETRY_PAUSE = 1.0  # seconds


@functools.cache
def readable_formats() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(endings of image files, Pillow's formats) that can be read on this machine."""
    endings, formats = ENDINGS, FORMATS
    if features.check("avif"):
        endings, formats = (*endings, ".avif"), (*formats, "AVIF")
    if find_spec("pillow_heif"):
        from pillow_heif import register_heif_opener  # a package that few have

        register_heif_opener()
        endings, formats = (*endings, ".heic", ".heif"), (*formats, "HEIF")
    return endings, formats


def shown(path: str | os.PathLike) -> str:
    """A path as a message shows it: in one line, also if it is not UTF-8."""
    text = os.fsencode(path).decode(errors="backslashreplace")
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def ending_of(path: str) -> str:
    return os.path.splitext(path)[1].lower() or "no ending"


# Open a file


class Member(str):
    """The path TAR/NAME of a file in an uncompressed tar file, with its place there: offset and size in bytes."""

    def __new__(cls, tar: str, name: str, offset: int, size: int) -> "Member":
        member = super().__new__(cls, f"{tar}/{name}")
        member.tar, member.name, member.offset, member.size = tar, name, offset, size
        return member

    def __getnewargs__(self) -> tuple[str, str, int, int]:  # to be pickled
        return self.tar, self.name, self.offset, self.size


def look_at(path: str, what: Callable[[Image.Image], Any], whole: bool = False) -> Any:
    """Return what(image) of an image file, opened by Pillow, which has read its header. Raises UnreadableImage.

    path: of a file, or a Member. whole: read the whole file at once. Retries once after errors of storage.
    """
    for pause in (RETRY_PAUSE, None):
        try:
            with _open_member(path) if isinstance(path, Member) else _open_file(path, whole) as source:
                with Image.open(source, formats=readable_formats()[1]) as image:  # refuses huge ones
                    return what(image)
        except MemoryError:
            raise
        except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError and more
            if pause is not None and getattr(error, "errno", None) in STORAGE_ERRORS:
                _opened_tar.cache_clear()
                time.sleep(pause)
                continue
            reason, of_system = _reason(path, error)
            how = "" if of_system else " as an image"
            raise UnreadableImage(f"data_path: cannot read {shown(path)}{how}: {reason}", reason) from None


@contextmanager
def _open_file(path: str, whole: bool) -> Iterator[BinaryIO]:
    no_waiting = getattr(os, "O_NONBLOCK", 0)  # a pipe would wait for its other end
    with open(path, "rb", opener=lambda path, flags: os.open(path, flags | no_waiting)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is not a regular file")
        if status.st_size == 0:
            raise ValueError("it is empty")
        yield io.BytesIO(file.read()) if whole else file


def _open_member(member: Member) -> io.BytesIO:
    descriptor = _opened_tar(member.tar).fileno()
    found = max(0, os.fstat(descriptor).st_size - member.offset)
    if found < member.size:
        raise ValueError(f"the tar file ends within it, after {found} of its {member.size} bytes")
    if member.size == 0:
        raise ValueError("it is empty")
    return io.BytesIO(os.pread(descriptor, member.size, member.offset))


@functools.lru_cache(maxsize=64)  # tar files that a process keeps open; one that leaves the cache is closed
def _opened_tar(path: str) -> io.FileIO:
    """A tar file to read by os.pread, which moves no position: forked processes may share it."""
    return io.FileIO(path)


def _reason(path: str, error: Exception) -> tuple[str, bool]:
    """(why a file cannot be read, in one line; whether the system refuses it, whatever it holds)."""
    if getattr(error, "errno", None) is not None:
        is_dead_link = isinstance(error, FileNotFoundError) and os.path.islink(path)
        return error.strerror + (f", a link to {shown(os.readlink(path))}" if is_dead_link else ""), True
    if isinstance(error, UnidentifiedImageError):
        return "it is in no format that is read here, or its header is damaged", False
    if isinstance(error, Image.DecompressionBombError):
        limit = 2 * Image.MAX_IMAGE_PIXELS / 1e6
        return f"it has more than {limit:.0f} megapixels, Pillow's limit; cut it into tiles", False
    return shown(" ".join(str(error).split())) or type(error).__name__, False


# Decode it


def read_image(path: str, value_range: tuple[float, float] | None = None) -> torch.Tensor:
    """Decode an image file to uint8 [3, H, W], turned as its EXIF orientation says. Raises UnreadableImage.

    value_range: the values that become 0 and 255, see data.to_pixels.
    """
    return look_at(path, lambda image: _to_rgb(image, value_range), whole=True)


def _to_rgb(image: Image.Image, value_range: tuple[float, float] | None) -> torch.Tensor:
    if decode_jpeg and image.format in ("JPEG", "MPO"):  # torchvision decodes them faster
        image.fp.seek(0)
        content = bytearray(image.fp.read())
        if content.endswith(b"\xff\xd9"):  # Pillow takes those that are cut short, and other colour spaces
            with suppress(RuntimeError):
                pixels = decode_jpeg(torch.frombuffer(content, dtype=torch.uint8), ImageReadMode.RGB)
                return _turn(pixels, orientation_of(image))
    values = deep_colours(image)
    image.load()  # also turns TIFF files
    orientation = orientation_of(image)
    if values is not None:
        image = Image.fromarray(np.concatenate([to_8_bits(values[0], value_range), to_8_bits(values[1])], axis=2))
    return _turn(to_pixels(image, value_range), orientation)


def deep_mode(image: Image.Image) -> str:
    """How Pillow unpacks an opened image with several channels of 16 bits, such as RGB;16B; empty for other images."""
    args = image.tile[0][3] if image.tile else ""
    mode = str(args[0]) if args and isinstance(args, tuple) else str(args)
    return mode if ";16" in mode and len(image.getbands()) > 1 else ""


def loses_bits(image: Image.Image) -> bool:
    """Whether `read_image` uses only the upper 8 of an opened image's 16 bits a channel."""
    is_known = image.format in ("PNG", "TIFF") and deep_mode(image)[:-1] in ("RGB;16", "RGBA;16", "LA;16")
    in_planes = image.format == "TIFF" and image.tag_v2.get(284) == 2
    return deep_mode(image) != "" and (in_planes or not is_known)


def deep_colours(image: Image.Image) -> tuple[np.ndarray, np.ndarray] | None:
    """(colours [H, W, 1 or 3], alpha [H, W, 1]) in 16 bits of an opened PNG or TIFF file with several such channels.

    None for other images. Raises ValueError for a TIFF file that Pillow would misread.
    """
    if image.format == "TIFF" and image.tile[0][3][0] == "R" and 16 in image.tag_v2.get(258, ()):
        raise ValueError("it has 16-bit channels in separate planes, which Pillow misreads; save it as 16-bit PNG")
    mode = deep_mode(image)
    if not mode or loses_bits(image):
        return None
    # Pillow gives the upper byte of each value. If told the other order of bytes, it gives the lower one.
    other_order = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}[mode[-1]]
    other = "RGBA" if mode == "LA;16B" else mode[:-1] + other_order  # RGBA: all four bytes
    image.fp.seek(0)
    with Image.open(image.fp, formats=[image.format]) as again:
        for i, (*place, args) in enumerate(again.tile):
            tile = (*place, other if isinstance(args, str) else (other, *args[1:]))
            again.tile[i] = getattr(type(again.tile[i]), "_make", tuple)(tile)  # older Pillow has tuples
        lower = np.asarray(again)
    values = lower.view(">u2") if other == "RGBA" else np.asarray(image).astype(np.uint16) << 8 | lower
    if values.shape[2] in (2, 4):
        return values[..., :-1], values[..., -1:]
    is_opaque = (values != image.info.get("transparency", -1)).any(2, keepdims=True)
    return values, np.where(is_opaque, 65535, 0)


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation of an image, 1 to 8; 1 if there is none."""
    with suppress(Exception):  # broken EXIF raises many kinds, and leaves the image as it is
        orientation = image.getexif().get(0x0112)
        return orientation if orientation in range(1, 9) else 1
    return 1


def _turn(pixels: torch.Tensor, orientation: int) -> torch.Tensor:
    """Turn and mirror [3, H, W] as an EXIF orientation says, to how viewers show it."""
    if orientation >= 5:
        pixels = pixels.mT
    flips = {2: [2], 3: [1, 2], 4: [1], 6: [2], 7: [1, 2], 8: [1]}.get(orientation)
    pixels = pixels.flip(flips) if flips else pixels
    return pixels.permute(1, 2, 0).contiguous().permute(2, 0, 1) if orientation >= 5 else pixels


# What the header tells


def size_of(image: Image.Image) -> tuple[int, int]:
    """(width, height) of an opened image, as `read_image` gives it."""
    is_turned = orientation_of(image) >= 5 and image.format != "TIFF"  # Pillow gives turned TIFF files turned
    return image.size[::-1] if is_turned else image.size


def image_size(path: str) -> tuple[int, int]:
    """(width, height) of an image file as `read_image` gives it, from its header. Raises UnreadableImage."""
    return look_at(path, size_of)


def value_limits(image: Image.Image) -> tuple[float, float, bool] | None:
    """(least, largest value, whether they have 16 bits) of an opened image that `read_image` scales by its value_range.

    Up to a thousandth of the values at each end; transparency aside. None for other images.
    """
    colours = deep_colours(image)
    is_16_bit = colours is not None or has_16_bits(image)
    if not is_16_bit and image.mode not in ("I", "F"):
        return None
    values = np.asarray(image) if colours is None else colours[0]
    values = values[np.isfinite(values)]
    return (*np.percentile(values, (0.1, 99.9)).tolist(), is_16_bit) if values.size else None


def check_images(paths: Sequence[str], value_range: tuple[float, float] | None) -> list[tuple]:
    """((format, mode, shorter side, loses bits), why it cannot be read) of each file; None for what is not known."""
    found = []
    for path in paths:
        facts = reason = None
        try:
            facts = look_at(path, lambda image: (image.format, image.mode, min(size_of(image)), loses_bits(image)))
            read_image(path, value_range)
        except UnreadableImage as error:
            reason = error.reason
        found.append((facts, reason))
    return found
