"""Which image files there are: in a folder, a list of paths, or tar files; and where the splits of a set are.

    found = find_images("photos")        # any tree of images; also photos.txt, photos.tar, or a folder of tar files
    found.paths[0]                       # a path, or a decode.Member of a tar file
    found = find_images("photos/train", labelled=True)    # found.labels: numbers, of found.classes

`images.py` makes a Dataset of them.
"""

import codecs
import os
import shlex
import warnings
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from decode import Member, ending_of, readable_formats, shown
from launch import UserError, with_progress
from tars import COMPRESSED_ENDINGS, TarImages, open_tars, refuse_compressed

NAMED_SPLITS = ("val", "valid", "validation", "test")  # beside train/: the first of these is the validation split
SPLIT_ENDINGS = ("", ".txt", ".tar")  # of both splits: folders, lists of paths, tar files
LABELS_HINT = (
    f"; labels need train/ and {'/ or '.join(NAMED_SPLITS)}/ with a folder of images for each class, or .tar files; or "
    "train.txt and val.txt with a TAB and a label after each path (or --val_share, --val_labels)"
)
LIST_RULE = "a path a line, from the folder of the list or absolute; with labels: the path, a TAB, the label"


def counted(counts: Counter) -> str:
    """Counts in words, the largest first."""
    return ", ".join(f"{count:,} {shown(what)}" for what, count in counts.most_common())


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


class TarPaths(Paths):
    """Members of tar files, in little memory; each element is a decode.Member."""

    def __init__(self, tars: Sequence[str], images: TarImages) -> None:
        super().__init__(images.names)
        self.tars, self.of_tar, self.offsets, self.sizes = tars, images.of_tar, images.offsets, images.sizes

    def __getitem__(self, index: int | slice) -> Member | list[Member]:
        name = super().__getitem__(index)
        if isinstance(index, slice):
            return name  # a list of elements
        return Member(self.tars[self.of_tar[index]], name, int(self.offsets[index]), int(self.sizes[index]))


def number_labels(labels: Sequence[bytes]) -> tuple[list[str], np.ndarray]:
    """(sorted names of the classes, the class of each label as int64 [N], -1 for an empty label).

    Whole numbers are sorted as numbers.
    """
    names = set(labels) - {b""}
    are_numbers = all(name.isdigit() for name in names)
    names = sorted(names, key=lambda name: (int(name), name) if are_numbers else name)
    numbers = {b"": -1} | {name: number for number, name in enumerate(names)}
    return list(map(os.fsdecode, names)), np.fromiter(map(numbers.__getitem__, labels), np.int64, len(labels))


# Files of a folder. Hidden ones, which systems and editors leave among images, are skipped.


def identity(path: str) -> tuple[int, int] | str:
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
    seen |= {identity(str(folder)) for folder in Path(root).resolve().parents}
    folders = deque([root])
    while folders:
        folder = folders.popleft()
        this, subfolders, links = identity(folder), [], []
        if folder != root and this in seen:
            continue
        seen.add(this)
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
    endings = readable_formats()[0]
    paths, left_out = [[] for _ in folders], [Counter() for _ in folders]
    files = ((number, path) for number, folder in enumerate(folders) for path in files_below(folder, seen))

    def found() -> str:
        return f"{sum(map(len, paths)):,} images found"

    def line(file: tuple[int, str]) -> str:
        return f"data: {found()} so far, in {shown(os.path.dirname(file[1]))}"

    for number, path in with_progress(files, line, lambda: f"data: {found()}"):
        if path.lower().endswith(endings):
            paths[number].append(os.fsencode(path))
        else:
            left_out[number][ending_of(path)] += 1
    for of_folder in paths:
        of_folder.sort()
    return paths, left_out


# Lists of paths


def read_list(path: str, labelled: bool = False) -> tuple[list[bytes], list[bytes]]:
    """(sorted paths, their labels) of a text file with a path a line, from its folder or absolute.

    A label stands after a TAB, the last one of the line; it is empty if there is none, which `labelled` refuses. Paths
    are taken as the bytes that they are. Raises UserError for such a line, and if none of a sample of the files exists.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"data_path: cannot read the list {shown(path)}: {error.strerror}") from None
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) and b"\0" in content:
        content = content.decode("utf-16", "replace").encode()  # as PowerShell writes it
    folder, rows, endings = os.path.join(os.fsencode(os.path.dirname(path)), b""), [], readable_formats()[0]
    endings = tuple(map(str.encode, endings))
    for number, line in enumerate(content.removeprefix(codecs.BOM_UTF8).split(b"\n"), 1):
        line, place = line.rstrip(b"\r"), f"data_path: {shown(path)}, line {number}"
        file, tab, label = line.rpartition(b"\t")
        file, label = (file, label.strip()) if tab else (line, b"")
        if b"\0" in line:
            raise UserError(f"{place}: expected text, got a zero byte; a list has {LIST_RULE}")
        if not tab and file.rpartition(b" ")[0].lower().endswith(endings) and not file.lower().endswith(endings):
            raise UserError(f"{place}: expected a TAB before the label, got {shown(os.fsdecode(line))}")
        if labelled and file.strip() and not label:
            raise UserError(f"{place}: expected a TAB and a label after the path, got {shown(os.fsdecode(line))}")
        while file.startswith(b"./"):
            file = file[2:].lstrip(b"/")
        if file.strip():
            rows.append((os.path.join(folder, file), label))
    if not rows:
        raise UserError(f"data_path: the list {shown(path)} is empty; expected {LIST_RULE}")
    rows.sort(key=lambda row: row[0])
    some = rows[:: -(-len(rows) // 100)]
    if not any(os.path.lexists(file) for file, _ in some):
        missing = f"{shown(os.fsdecode(some[0][0]))} is not there, nor is any other of {len(some)} files looked for"
        raise UserError(f"data_path: {shown(path)}: {missing}; a list has {LIST_RULE}")
    return [file for file, _ in rows], [label for _, label in rows]


# What is given


class Found(NamedTuple):
    """Image files, in order. labels: numbers of classes [N], -1 for none; None for a folder's without `labelled`."""

    paths: Paths
    labels: np.ndarray | None
    classes: list[str] | None
    left_out: Counter  # number of other files by ending


def find_images(source: str, labelled: bool = False) -> Found:
    """Find the image files of a folder, of a .txt list of paths or of .tar files. Raises UserError if there are none.

    A folder has images at any depth, or, where it has none, .tar files. labelled: each image needs a label; of a folder
    only images in and below its subfolders, which are the classes.
    """
    if os.path.isfile(source) and source.lower().endswith(".txt"):
        paths, labels = read_list(source, labelled)
        classes, labels = number_labels(labels)
        return Found(Paths(paths), labels, classes, Counter())
    if os.path.isfile(source) and source.lower().endswith((".tar", *COMPRESSED_ENDINGS)):
        folder, name = os.path.split(source)
        return _find_in_tars([source], os.path.join(folder, f".{name}.swav-index.npz"), labelled)
    return _find_in_folder(source, labelled)


def check_data_path(path: str | None) -> None:
    """Raise UserError unless a path is what `find_images` takes."""
    is_file = os.path.isfile(path or "")
    if is_file and path.lower().endswith(COMPRESSED_ENDINGS):
        refuse_compressed(path)
    if not os.path.isdir(path or "") and not (is_file and path.lower().endswith((".txt", ".tar"))):
        raise UserError(f"--data_path: expected a folder, a .tar file or a .txt list of paths, got {path or 'none'}")


def split_paths(root: str) -> tuple[str, str] | None:
    """(training, validation split) that a folder holds, both as folders, lists of paths or tar files; None without."""
    for ending in SPLIT_ENDINGS:
        exists = os.path.isfile if ending else os.path.isdir
        beside = [name + ending for name in NAMED_SPLITS if exists(os.path.join(root, name + ending))]
        if beside and exists(os.path.join(root, "train" + ending)):
            return "train" + (ending or "/"), beside[0] + ("" if ending else "/")
    return None


def splits_around(path: str) -> tuple[str, tuple[str, str] | None]:
    """(folder that holds a path's splits, these): the folder around the path if that is the training split itself."""
    folder, name = os.path.split(os.path.abspath(path))
    is_train = name in [f"train{ending}" for ending in SPLIT_ENDINGS]
    root = folder if is_train and not split_paths(path) else path
    return root, split_paths(root)


def validation_folder(root: str) -> str:
    """The first of NAMED_SPLITS that a folder holds, "val" if it holds none."""
    return next((name for name in NAMED_SPLITS if os.path.isdir(os.path.join(root, name))), NAMED_SPLITS[0])


def _find_in_folder(root: str, labelled: bool) -> Found:
    hint = LABELS_HINT if labelled else ""
    try:
        with os.scandir(root) as entries:
            visible = sorted((e.name, os.path.isdir(e)) for e in entries if not e.name.startswith("."))
    except OSError as error:
        reason = f"{shown(root)}: {error.strerror}{hint}"
        raise UserError(f"data_path: expected a folder of images, got {reason}") from None
    classes = [name for name, is_folder in visible if labelled and is_folder]
    folders = [os.path.join(root, name) for name in classes] if labelled else [root]
    # With what is seen from the start, no link leads from one class to another.
    paths, left_out = list_images(folders, {identity(folder) for folder in (root, *folders)})
    if not any(paths):
        names = [name for name, is_folder in visible if not is_folder]
        tars = [os.path.join(root, name) for name in names if name.lower().endswith(".tar")]
        if tars:
            return _find_in_tars(tars, os.path.join(root, ".swav-index.npz"), labelled)
        for name in names:
            if name.lower().endswith(COMPRESSED_ENDINGS):
                refuse_compressed(os.path.join(root, name))
    if labelled and not classes:
        raise UserError(f"data_path: expected a folder for each class in {shown(root)}, found none{hint}")
    for folder, of_folder, others in zip(folders, paths, left_out, strict=True):
        if not of_folder:
            if others.keys() & {".tar", ".txt"}:
                hint += "; name the folder of the .tar files, or the .txt list of paths, itself"
            raise UserError(
                f"data_path: expected image files ({', '.join(readable_formats()[0])}), or .tar files of them, in or "
                f"below {shown(folder)}, found none{f', but {counted(others)}' if others else ''}{hint}"
            )
    labels = np.repeat(np.arange(len(folders)), list(map(len, paths))) if labelled else None
    return Found(Paths(list(chain(*paths))), labels, classes if labelled else None, sum(left_out, Counter()))


def _find_in_tars(tars: Sequence[str], index_path: str, labelled: bool) -> Found:
    found = open_tars(tars, index_path)
    if not found.names:
        others = f", but {counted(found.left_out)}" if found.left_out else ""
        some = ", ".join(map(shown, tars[:3])) + (" ..." if len(tars) > 3 else "")
        raise UserError(f"data_path: expected image files in {some}, found none{others}")
    classes, labels = number_labels(labels_of(found, labelled))
    return Found(TarPaths(tars, found), labels, classes, found.left_out)


def refuse_one_class(source: str, paths: Paths, name: str) -> None:
    """Raise UserError for labelled images whose only class is `name`: where labels were looked for, what to give."""
    in_tars, remedy = isinstance(paths, TarPaths), "put each class into a folder of its own there"
    if in_tars and paths[0].name.startswith(f"{name}/"):
        level = f"the first folders of the names in {shown(source)}"
        if paths[0].name.count("/") > 1:
            command = f"tar -cf NEW.tar -C {shlex.quote(shown(name))} ."
            remedy = f"if the classes lie one level down, write the tar file from inside that folder: {command}"
    elif in_tars or os.path.isfile(source):
        level = f"the .cls files in {shown(source)}" if in_tars else f"what follows the TABs in {shown(source)}"
        remedy = "write the class of each image there"
    else:
        folder, level = os.path.join(source, name), f"the folders in {shown(source)}"
        if any(os.path.dirname(path) != folder for path in (paths[0], paths[-1])):
            remedy = f"if the classes lie one level down, give --data_path {shown(folder)} --val_share 0.2"
            remedy += ", or, beside a validation split, move them up"
    raise UserError(f"data_path: expected two classes or more, found {shown(name)} alone; labels are {level}; {remedy}")


def labels_of(images: TarImages, labelled: bool) -> list[bytes]:
    """The label of each image: of its .cls file; if no image has one, the top folder of its name; else empty.

    labelled: raise UserError for an image without a label.
    """
    labels, how = images.labels, "a .cls file with its label"
    if not any(labels):
        labels = [name.partition(b"/")[0] if b"/" in name else b"" for name in images.names]
        how += ", or a folder for each class"
    if labelled and b"" in labels:
        name = shown(os.fsdecode(images.names[labels.index(b"")]))
        raise UserError(f"data_path: expected {how} for each image in the tar files, found none for {name}")
    return labels
