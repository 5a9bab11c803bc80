"""Labels of a set of images: classes of two splits made the same, shares of the labels, lists of names and classes.

    val_images = align_classes(train_images, val_images)
    few = ChosenImages(images, stratified(images.labels, 0.1, seed=1))    # a tenth of each class

It works with any Dataset that has `labels` [N] and `classes`, and, where names are asked for, `paths`.
"""

import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from launch import UserError, log

MOST_UNMATCHED = 0.01  # share of names in a list that may match no image


class ChosenImages(Dataset):
    """Some images of a set: those at `indices` [N], with labels [N] and classes of their own, by default the set's."""

    def __init__(
        self,
        images: Dataset,
        indices: np.ndarray,
        labels: np.ndarray | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        self.images, self.indices = images, np.asarray(indices)
        self.labels = np.asarray(images.labels)[self.indices] if labels is None else np.asarray(labels)
        self.classes = images.classes if classes is None else classes

    @property
    def value_range(self) -> tuple[float, float] | None:
        return self.images.value_range

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        pixels, _ = self.images[int(self.indices[index])]
        return pixels, int(self.labels[index])

    def size_of(self, index: int) -> tuple[int, int]:
        return self.images.size_of(int(self.indices[index]))

    def contents(self) -> bytes:
        """Those of the set, which images of it, and their labels."""
        return b"%s %s %s" % (self.images.contents(), self.indices.tobytes(), self.labels.tobytes())


def class_of(images: Dataset, index: int) -> str | None:
    """The class of an image by name: its label, or the folder that it lies in below the set's; None if it has none.

    images: a Dataset with labels (those of lists and tar files may be -1, for none), or one with paths below a root.
    """
    labels, classes = getattr(images, "labels", None), getattr(images, "classes", None)
    if labels is not None:
        label = int(labels[index])
        return None if label < 0 else str(classes[label] if classes else label)
    if not hasattr(images, "paths"):
        return None
    folder, _, below = os.path.relpath(images.paths[index], images.root).partition(os.sep)
    return folder if below else None


def stratified(labels: Sequence[int], share: float, seed: int, *, leave_one: bool = False) -> np.ndarray:
    """Draw a share of the images of each class, at least one: sorted indices, for labels [N].

    leave_one: leave at least one image of each class, and so take none of a class of one.
    """
    rng, chosen, labels = np.random.default_rng((seed, 0xC1A55)), [], np.asarray(labels)
    for label in np.unique(labels):
        of_class = rng.permutation(np.flatnonzero(labels == label))
        count = max(1, round(share * len(of_class)))
        chosen.append(of_class[: min(count, len(of_class) - 1) if leave_one else count])
    return np.sort(np.concatenate(chosen))


def some(names: Iterable[str]) -> str:
    """At most five names, in words."""
    names = list(names)
    return ", ".join(map(str, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def align_classes(train_images: Dataset, val_images: Dataset) -> Dataset:
    """Return the validation images with the labels that the training images' classes have.

    Leaves out images of classes that training lacks, and logs them, as it does classes without a validation image.
    Raises UserError if no image is left.
    """
    new_label = {name: label for label, name in enumerate(train_images.classes)}
    old_labels, old_classes = np.asarray(val_images.labels), val_images.classes
    is_known = np.isin(old_labels, [label for label, name in enumerate(old_classes) if name in new_label])
    if not is_known.any():
        raise UserError(
            f"data_path: expected the same classes in training and validation, got {some(train_images.classes)} and "
            f"{some(old_classes)}"
        )
    if not is_known.all():
        unknown = [name for name in old_classes if name not in new_label]
        _log_left_out(np.sum(~is_known), len(old_labels), unknown)
    if list(old_classes) != list(train_images.classes):
        indices = np.flatnonzero(is_known)
        labels = [new_label[old_classes[label]] for label in old_labels[indices]]
        val_images = ChosenImages(val_images, indices, np.array(labels), train_images.classes)
    present = set(np.asarray(val_images.labels).tolist())
    without = [name for label, name in enumerate(train_images.classes) if label not in present]
    if without:
        log(
            f"data: {len(without)} of {len(train_images.classes)} classes have no validation images ({some(without)}): "
            "accuracies say nothing about these"
        )
    return val_images


def _log_left_out(images: int, total: int, classes: Iterable[str]) -> None:
    why = f"their classes have no training images ({some(classes)})"
    log(f"data: left out {images:,} of {total:,} validation images: {why}")


# Lists


def read_lines(path: str | os.PathLike, option: str) -> dict[int, str]:
    """{number: line} of the lines of a text file that are not empty. Raises UserError, naming the option."""
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
            lines = {number: line.strip() for number, line in enumerate(file, 1) if line.strip()}
    except OSError as error:
        raise UserError(f"{option}: cannot read {os.fspath(path)!r}: {error.strerror}") from None
    if not lines:
        raise UserError(f"{option}: expected lines in {os.fspath(path)!r}, found none")
    return lines


def stem(name: str) -> str:
    """A file's name without folders and ending. What holds a space or a comma is no ending."""
    file = name.replace("\\", "/").rpartition("/")[2]
    beginning, ending = os.path.splitext(file)
    return file if re.search(r"[\s,]", ending) else beginning


def listed_images(images: Dataset, path: str | os.PathLike, option: str = "--subset") -> ChosenImages:
    """The images that a file lists, one name a line: NAME.JPEG or CLASS/NAME.JPEG; the ending may differ.

    Counts names without an image, and raises UserError if they are more than MOST_UNMATCHED.
    """
    if not hasattr(images, "paths"):
        raise UserError(f"{option}: expected images in files, which have names; for this data set use --labels SHARE")
    of_name: dict[str, list[int]] = {}
    for index, file in enumerate(images.paths):
        name = stem(file)
        for key in (name, f"{images.classes[images.labels[index]]}/{name}"):
            of_name.setdefault(key, []).append(index)
    indices, unmatched, lines = set(), [], read_lines(path, option)
    for line in lines.values():
        *folders, _ = line.replace("\\", "/").split("/")
        found = of_name.get(f"{folders[-1]}/{stem(line)}" if folders else stem(line), [])
        if len(found) > 1:
            raise UserError(
                f"{option}: {line} in {path} is the name of {len(found)} files, such as {images.paths[found[0]]} and "
                f"{images.paths[found[1]]}; write CLASS/NAME"
            )
        indices.update(found)
        if not found:
            unmatched.append(line)
    _refuse_if_many(unmatched, len(lines), f"{option}: {path}: names without an image")
    if not indices:
        raise UserError(
            f"{option}: none of the names in {path} is one of the training images, such as {next(iter(of_name))}"
        )
    return ChosenImages(images, np.array(sorted(indices)))


def _refuse_if_many(unmatched: Sequence[str], total: int, what: str) -> None:
    if len(unmatched) > max(1, MOST_UNMATCHED * total):
        raise UserError(f"{what}: {len(unmatched)} of {total} ({some(unmatched)}); at most 1 % may be missing")
    if unmatched:
        log(f"{what}: {len(unmatched)} of {total}, left out ({some(unmatched)})")


def split_line(line: str, names: Collection[str], classes: Collection[str]) -> tuple[str, str]:
    """(name without ending, class) of a line; names: those of the images, without ending; classes: the known ones.

    Where the line has a TAB, both end at TABs. Otherwise a comma or spaces lie between: the name is the longest that an
    image has. The class is the rest; if that is none, what stands before a comma or before numbers (ImageNet's boxes).
    """
    if "\t" in line:
        name, label = re.split(r"\t+", line)[:2]
        return stem(name.strip()), label.strip()
    splits = [(line[: gap.start()], line[gap.end() :]) for gap in re.finditer(r"[\s,]+", line)]
    splits = [(stem(name.strip('"')), rest.strip('"')) for name, rest in splits]
    name, rest = next((split for split in reversed(splits) if split[0] in names), splits[0])
    without_numbers = re.split(r"[\s,]+-?[\d.]+(?![^\s,])", rest)[0]
    return name, next((label for label in (rest, rest.partition(",")[0]) if label in classes), without_numbers)


def labelled_by_list(
    images: Dataset, classes: Sequence[str], path: str | os.PathLike, option: str = "--val_labels"
) -> ChosenImages:
    """Images of one folder without class folders, with labels from a file. Raises UserError.

    Each line is NAME CLASS, see `split_line`. NAME may lack its ending. CLASS is one of `classes` or, unless these are
    numbers themselves, its number, from 0. Or the file is ImageNet's ILSVRC2012_validation_ground_truth.txt, a number a
    line in the order of the files' names; its meta.mat then has to lie beside it. Images of classes that are not in
    `classes` are left out, and counted.
    """
    lines, names = read_lines(path, option), list(map(stem, images.paths))
    label_of = {name: label for label, name in enumerate(classes)}
    are_numbers = all(name.isdecimal() for name in classes)
    if not are_numbers:
        label_of = {str(label): label for label in range(len(classes))} | label_of
    if all(line.isdecimal() for line in lines.values()):
        if len(lines) != len(names):
            raise UserError(f"{option}: {path} has {len(lines)} numbers for {len(names)} validation images")
        wordnet_names, numbers = read_devkit(path, option), map(int, lines.values())
        class_of = {name: wordnet_names.get(number) for name, number in zip(sorted(names), numbers, strict=True)}
    else:
        for number, line in lines.items():
            if not re.search(r"[\s,]", line):
                raise UserError(f"{option}: {path}, line {number}: expected NAME CLASS, got {line}")
        known = set(names)
        class_of = dict(split_line(line, known, label_of) for line in lines.values())
    indices, labels, unmatched, unknown = [], [], [], Counter()
    for index, name in enumerate(names):
        if name not in class_of:
            unmatched.append(name)
        elif class_of[name] not in label_of:
            if are_numbers and str(class_of[name]).isdecimal():
                raise UserError(
                    f"{option}: {path}: expected one of the classes, {some(classes)}, got {class_of[name]} for {name}; "
                    "as these names are numbers, a number is a name, not a count from 0"
                )
            unknown[class_of[name]] += 1
        else:
            indices.append(index)
            labels.append(label_of[class_of[name]])
    _refuse_if_many(unmatched, len(names), f"{option}: {path}: validation images without a class")
    if not indices:
        raise UserError(
            f"{option}: {path}: expected classes of the training images, such as {classes[0]}"
            f"{'' if are_numbers else f', or their numbers, 0 to {len(classes) - 1}'}, got {some(unknown)}"
        )
    if unknown:
        _log_left_out(unknown.total(), len(names), unknown)
    return ChosenImages(images, np.array(indices), np.array(labels), classes)


def read_devkit(path: str | os.PathLike, option: str) -> dict[int, str]:
    """{ILSVRC2012_ID: WordNet name} from the meta.mat beside ImageNet's ground truth. Its order is not alphabetical."""
    meta = os.path.join(os.path.dirname(path), "meta.mat")
    reason = f"{path} holds numbers alone, as ImageNet's ground truth does, whose classes are named by"
    try:
        from scipy.io import loadmat

        synsets = loadmat(meta, squeeze_me=True)["synsets"]
        return {int(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in synsets}
    except ImportError:
        raise UserError(f"{option}: {reason} meta.mat; to read it: pip install scipy") from None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{option}: {reason} {meta}, which cannot be read: {error}") from None
