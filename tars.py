"""Images in uncompressed tar files: an index says where each one lies, so any can be read, in any order.

    images = open_tars(["shards/0.tar", "shards/1.tar"], "shards/.swav-index.npz")
    images.names[0], images.of_tar[0], images.offsets[0], images.sizes[0]      # images are sorted by name

The index is built once and kept beside the tar files, or else in the user's cache folder. Labels are those of
webdataset: the image key.jpg has the one in key.cls, where key is the name up to the first dot.
"""

import hashlib
import json
import os
import shlex
import socket
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import repeat
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np

from decode import ending_of, readable_formats, shown
from launch import UserError, log, with_progress

BLOCK = tarfile.BLOCKSIZE
INDEX_VERSION = 2  # of the file that holds an index; one of another version is built again
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")  # first bytes of gzip, bzip2, xz, zstd
COMPRESSED_ENDINGS = (".tgz", ".tbz2", ".txz", ".tzst", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
MAX_LABEL = 1000  # bytes


class TarImages(NamedTuple):
    """The images of tar files, sorted by name: N of each."""

    names: list[bytes]
    of_tar: np.ndarray  # the number of its tar file
    offsets: np.ndarray  # in bytes, int64
    sizes: np.ndarray
    labels: list[bytes]  # empty where an image has none
    left_out: Counter  # number of other files by ending


class Shard(NamedTuple):
    """What one tar file holds, and its size and time of change when it was read."""

    size: int
    changed: int  # ns
    names: list[bytes]  # of the images, in the order of the tar file
    labels: list[bytes]  # of each image; empty where there is none
    offsets: list[int]  # in bytes
    sizes: list[int]
    left_out: dict[str, int]
    damage: str  # what a message says of it; empty for a tar file that is whole


def open_tars(tars: Sequence[str], index_path: str) -> TarImages:
    """Index tar files, or load their index where it is kept and they did not change since.

    index_path: where to keep it. Logs progress, and what is damaged. Raises UserError for a file that is no tar file,
    is compressed, or is damaged in the middle; a last image that is cut short can be found but not read.
    """
    kept, shards = _load(index_path), {}
    for tar in tars:
        try:
            status = os.stat(tar)
        except OSError as error:
            raise UserError(f"data_path: cannot read {shown(tar)}: {error.strerror}") from None
        shards[tar] = kept.get((os.path.basename(tar), status.st_size, status.st_mtime_ns))
    new = [tar for tar in tars if shards[tar] is None]
    if new:
        shards |= _index(new)
        kept_at = _keep({os.path.basename(tar): shard for tar, shard in shards.items()}, index_path)
        place = f"kept in {shown(kept_at)}" if kept_at else "which cannot be kept: it is built at each start"
        log(f"data: built the index of {len(new):,} tar file(s), {place}")
    for tar in tars:
        if shards[tar].damage:
            log(f"data: {shown(tar)} {shards[tar].damage}")
    rows = []
    for number, shard in enumerate(shards[tar] for tar in tars):
        rows += zip(shard.names, repeat(number), shard.offsets, shard.sizes, shard.labels)  # names differ in a tar file
    rows.sort()
    names, *numbers, labels = ([row[i] for row in rows] for i in range(5))
    left_out = sum((Counter(shards[tar].left_out) for tar in tars), Counter())
    return TarImages(names, *(np.array(column, np.int64) for column in numbers), labels, left_out)


# Build an index


def _index(tars: Sequence[str]) -> dict[str, Shard]:
    shards, total = {}, sum(map(os.path.getsize, tars))

    def members() -> Iterator[Shard]:
        for tar in tars:
            for shard in _read_shard(tar):
                shards[tar] = shard
                yield shard

    def found() -> str:
        return f"{sum(len(shard.names) for shard in shards.values()):,} images"

    def line(last: Shard) -> str:
        done = sum(shard.size for shard in shards.values()) - last.size + max(last.offsets, default=0)
        return f"data: building the index of {len(tars):,} tar file(s): {done / max(1, total):.0%}, {found()}"

    for _ in with_progress(members(), line, lambda: f"data: index of {len(tars):,} tar file(s): {found()}"):
        pass
    return shards


def refuse_compressed(path: str) -> None:
    """Raise UserError for a compressed file, with the command that unpacks it."""
    folder = os.path.basename(path).partition(".")[0] or "images"
    command = f"mkdir {shlex.quote(folder)} && tar -xf {shlex.quote(shown(path))} -C {shlex.quote(folder)}"
    raise UserError(
        f"data_path: {shown(path)} is compressed, so single images in it cannot be read; unpack it: {command}"
    )


def _read_shard(path: str) -> Iterator[Shard]:
    """Yield what is known of a tar file after each of its members, and at last all. Raises UserError."""
    try:
        with open(path, "rb") as file:
            with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
                yield from _read_members(tar)
    except (tarfile.TarError, OSError) as error:
        with suppress(OSError), open(path, "rb") as file:
            if file.read(6).startswith(COMPRESSED):
                refuse_compressed(path)
        reason = getattr(error, "strerror", None) or f"it is no tar file, or damaged: {error}"
        raise UserError(f"data_path: cannot read {shown(path)}: {reason}") from None


def _read_members(tar: tarfile.TarFile) -> Iterator[Shard]:
    descriptor, endings = tar.fileobj.fileno(), readable_formats()[0]
    status = os.fstat(descriptor)
    # By name; of equal names the last one counts, as when a tar file is unpacked.
    places, links, labels, left_out = {}, {}, {}, Counter()  # places: (offset, size)
    names, offsets = [], []  # of the images; offsets of those so far, for the progress
    shard = Shard(status.st_size, status.st_mtime_ns, names, [], offsets, [], left_out, "")
    while True:
        try:
            member = tar.next()
        except tarfile.ReadError:
            if tar.offset <= shard.size or not tar.offset:
                raise
            break  # the last member is cut short
        if member is None:
            break
        tar.members.clear()  # which would fill the memory
        name = member.name.removeprefix("./")
        if member.isdir() or any(part.startswith(".") for part in name.split("/")):
            continue  # hidden files are skipped, as in folders
        ending = ending_of(name)
        if member.isreg() and not member.issparse():
            places[name] = member.offset_data, member.size
        elif member.islnk() or member.issym():
            folder = os.path.dirname(name) if member.issym() else ""
            links[name] = os.path.normpath(os.path.join(folder, member.linkname))
        if ending == ".cls" and name in places:
            content = os.pread(descriptor, min(member.size, MAX_LABEL), member.offset_data)
            labels[_key_of(name)] = content.replace(b"\0", b"").strip()
        elif ending in endings:
            names.append(name)
            offsets.append(member.offset_data)
            yield shard
        else:
            left_out[ending] += 1
    damage = _end_of(descriptor, tar.offset, shard.size)
    places |= {name: places[target] for name, target in links.items() if target in places}
    images = [name for name in dict.fromkeys(names) if name in places]
    left_out["links to other places"] = len(set(names)) - len(images)
    yield shard._replace(
        names=list(map(os.fsencode, images)),
        labels=[labels.get(_key_of(name), b"") for name in images],
        offsets=[places[name][0] for name in images],
        sizes=[places[name][1] for name in images],
        left_out=+left_out,
        damage=damage,
    )


def _key_of(name: str) -> str:
    """What the files of one sample have in common, in webdataset: the name up to the first dot."""
    folder, _, file = name.rpartition("/")
    return f"{folder}/{file.partition('.')[0]}"


def _end_of(descriptor: int, offset: int, size: int) -> str:
    """What is wrong with the end of a tar file, whose last member ends at offset; empty if nothing is."""
    block = os.pread(descriptor, BLOCK, offset)
    if offset > size or 0 < len(block) < BLOCK:
        return "is cut short: its last image may not be readable, and others may be missing"
    if not block:
        return "has no end mark: it may be cut short, and images may be missing"
    if any(block):
        raise tarfile.ReadError(f"no header of a file at byte {offset:,}")
    for start in range(offset, size, 2**20):
        if os.pread(descriptor, 2**20, start).strip(b"\0"):
            raise tarfile.ReadError("more follows its end mark; keep tar files apart, cat does not put them together")
    return ""


# Keep it


def _load(index_path: str) -> dict[tuple[str, int, int], Shard]:
    """{(name, size, time of change) of a tar file: what it holds}, of the indices that are kept and can be read.

    Not of one for other endings of images: it was built with, or without, a package that reads more formats.
    """
    shards, kind = {}, {"version": INDEX_VERSION, "endings": list(readable_formats()[0])}
    for path in (index_path, _path_in_cache(index_path)):
        with suppress(OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile, zlib.error):  # built again
            with np.load(path) as saved:
                about = json.loads(saved["about"].tobytes())
                if {key: about[key] for key in kind} != kind:
                    continue
                columns = [saved[name].tobytes().split(b"\0")[:-1] for name in ("names", "labels")]
                columns += [saved[name].tolist() for name in ("offsets", "sizes")]
            start = 0
            for name, size, changed, images, left_out, damage in about["tars"]:
                parts = [column[start : start + images] for column in columns]
                if all(len(part) == images for part in parts):
                    shards[name, size, changed] = Shard(size, changed, *parts, left_out, damage)
                start += images
    return shards


def _keep(shards: dict[str, Shard], index_path: str) -> str | None:
    """Write an index and return its path: index_path, or in the user's cache folder; None if neither can be written."""
    about = [
        (name, shard.size, shard.changed, len(shard.names), shard.left_out, shard.damage)
        for name, shard in shards.items()
    ]
    about = {"version": INDEX_VERSION, "endings": readable_formats()[0], "tars": about}
    arrays = {"about": np.frombuffer(json.dumps(about).encode(), np.uint8)}
    for column in ("names", "labels"):
        text = b"".join(value + b"\0" for shard in shards.values() for value in getattr(shard, column))
        arrays[column] = np.frombuffer(text, np.uint8)
    for column in ("offsets", "sizes"):
        arrays[column] = np.array([value for shard in shards.values() for value in getattr(shard, column)], np.int64)
    for path in (index_path, _path_in_cache(index_path)):
        unfinished = f"{path}.{socket.gethostname()}.{os.getpid()}.tmp"  # machines may build it at the same time
        try:
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            with open(unfinished, "wb") as file:
                np.savez(file, **arrays)
            os.replace(unfinished, path)
            return path
        except OSError:
            with suppress(OSError):
                os.unlink(unfinished)
    return None


def _path_in_cache(index_path: str) -> str:
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    name = hashlib.sha256(os.fsencode(os.path.abspath(index_path))).hexdigest()[:16]
    return os.path.join(folder, "swav", f"index-{name}.npz")
