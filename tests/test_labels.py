"""labels.py, and open_splits of images.py: which images have labels, for which split."""

import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import images as images_module
from images import BadImages, ImageArrays, ImageFiles, fingerprint, open_splits, typical_side
from labels import ChosenImages, align_classes, class_of, labelled_by_list, listed_images, split_line, stratified
from launch import UserError


def tree(root, counts: dict[str, int], suffix=".png"):
    """A folder for each class with images of 12 x 10 pixels, named CLASS_0, CLASS_1 ..."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.fromarray(np.full((10, 12, 3), 10 * i % 256, np.uint8)).save(
                root / name / f"{name or 'v'}_{i}{suffix}"
            )
    return root


def arrays(labels, classes):
    labels = np.array(labels)
    return ImageArrays(np.zeros((len(labels), 4, 4, 3), np.uint8) + labels[:, None, None, None], labels, classes)


# Shares


def test_a_share_is_of_each_class_and_depends_on_the_seed():
    labels = np.repeat([0, 1, 2], [100, 30, 1])
    chosen = stratified(labels, 0.1, seed=1)
    assert np.bincount(labels[chosen]).tolist() == [10, 3, 1]
    assert (chosen == stratified(labels, 0.1, seed=1)).all() and (np.diff(chosen) > 0).all()
    assert set(chosen) != set(stratified(labels, 0.1, seed=2))
    others = stratified(labels, 0.999, seed=1, leave_one=True)
    assert np.bincount(labels[others], minlength=3).tolist() == [99, 29, 0]


def test_chosen_images_are_those_of_the_set(tmp_path):
    files = ImageFiles(tree(tmp_path, {"a": 6, "b": 4}), labelled=True)
    chosen = ChosenImages(files, np.array([1, 7, 9]))
    assert len(chosen) == 3 and chosen.labels.tolist() == [0, 1, 1] and chosen[1][1] == 1
    assert torch.equal(chosen[2][0], files[9][0])
    again = ChosenImages(chosen, np.array([0, 2]))
    assert typical_side(again) == 10 and again.value_range is None
    sums = {fingerprint(images)["paths"] for images in (files, chosen, again, ChosenImages(files, [1, 7, 8]))}
    assert len(sums) == 4 and fingerprint(again)["images"] == 2


def test_bad_images_of_a_choice_are_its_own(tmp_path):
    tree(tmp_path, {"a": 4, "b": 4})
    for name in ("a/a_1.png", "b/b_3.png"):
        (tmp_path / name).write_bytes(b"")
    files = ImageFiles(tmp_path, labelled=True)
    first, second = ChosenImages(ChosenImages(files, range(8)), [0, 1, 2]), ChosenImages(files, [5, 6, 7])
    bad = BadImages(first), BadImages(second)
    for chosen in (first, second):
        for i in range(3):
            try:
                chosen[i]
            except ValueError:
                pass
    assert [images.update() for images in bad] == [1, 1]
    assert [next(iter(images.reasons)).endswith(name) for images, name in zip(bad, ("a_1.png", "b_3.png"), strict=True)]


def test_one_folder_of_class_folders_is_split(tmp_path, capsys):
    tree(tmp_path, {"a": 10, "b": 5, "c": 1})
    train, val = open_splits("folder", str(tmp_path), 1, val_share=0.2, seed=3)
    assert np.bincount(train.labels).tolist() == [8, 4, 1] and np.bincount(val.labels).tolist() == [2, 1]
    assert len(set(train.indices) | set(val.indices)) == 16 and val.classes == ["a", "b", "c"]
    out = capsys.readouterr().out
    assert "data: 1 of 3 classes have no validation images (c)" in out
    with pytest.raises(UserError, match="--val_share: expected two images or more of a class"):
        open_splits("folder", str(tree(tmp_path / "single", {"a": 1, "b": 1})), 1, val_share=0.2)


ALONE = "^data_path: expected two classes or more, found images alone; labels are the "


def test_one_class_alone_is_refused(tmp_path):
    """All images would count as right."""
    wrapped = tree(tmp_path / "wrapped" / "images", {"cat": 3, "dog": 3}).parent
    with pytest.raises(UserError, match=f"{ALONE}folders in {wrapped}; .* give --data_path {wrapped}/images --val_sh"):
        open_splits("folder", str(wrapped), 1, val_share=0.4)
    assert open_splits("folder", f"{wrapped}/images", 1, val_share=0.4)[0].classes == ["cat", "dog"]
    for split in ("train", "val"):
        tree(tmp_path / "splits" / split, {"images": 2})
    with pytest.raises(UserError, match=f"{ALONE}folders in {tmp_path}/splits/train/; put each class into a folder of"):
        open_splits("folder", str(tmp_path / "splits"), 1)


def test_one_class_alone_in_a_list_or_tar_files_is_refused(tmp_path):
    tree(tmp_path / "images", {"cat": 3, "dog": 3})
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        tar.add(tmp_path / "images", "images")
    with pytest.raises(UserError, match=f"{ALONE}first folders .*set.tar; .*: tar -cf NEW.tar -C images [.]$"):
        open_splits("folder", str(tmp_path / "set.tar"), 1, val_share=0.4)
    with tarfile.open(tmp_path / "again.tar", "w") as tar:  # as the message says
        tar.add(tmp_path / "images", ".")
    assert open_splits("folder", str(tmp_path / "again.tar"), 1, val_share=0.4)[0].classes == ["cat", "dog"]
    (tmp_path / "images" / "dog" / "dog_0.cls").write_text("images")
    with tarfile.open(tmp_path / "cls.tar", "w") as tar:
        for name in ("dog_0.png", "dog_0.cls"):
            tar.add(tmp_path / "images" / "dog" / name, name)
    with pytest.raises(UserError, match=f"{ALONE}.cls files in .*cls.tar; write the class of each image there"):
        open_splits("folder", str(tmp_path / "cls.tar"), 1, val_share=0.4)
    (tmp_path / "list.txt").write_text("images/cat/cat_0.png\timages\nimages/dog/dog_0.png\timages\n")
    with pytest.raises(UserError, match="found images alone; labels are what follows the TABs in .*list.txt; write"):
        open_splits("folder", str(tmp_path / "list.txt"), 1, val_share=0.4)


def test_a_named_set_splits_its_training_images(monkeypatch):
    monkeypatch.setattr(images_module, "open_images", lambda *_: arrays([0, 1] * 10, ["a", "b"]))
    train, val = open_splits("shapes", None, 1, val_share=0.3)
    assert (len(train), len(val)) == (14, 6)


# Classes of two splits


def test_classes_that_a_split_lacks_are_said(capsys):
    train, val = arrays([0, 1, 2], ["a", "c", "d"]), arrays([0, 1, 1, 2, 0], ["a", "b", "c"])
    aligned = align_classes(train, val)
    assert aligned.labels.tolist() == [0, 1, 0] and aligned.classes == ["a", "c", "d"]
    assert [int(aligned[i][0].max()) for i in range(3)] == [0, 2, 0]
    assert capsys.readouterr().out.splitlines() == [
        "data: left out 2 of 5 validation images: their classes have no training images (b)",
        "data: 1 of 3 classes have no validation images (d): accuracies say nothing about these",
    ]
    same = arrays([0, 1, 2], ["a", "c", "d"])
    assert align_classes(train, same) is same and not capsys.readouterr().out
    with pytest.raises(UserError, match="expected the same classes in training and validation, got a, c, d and x"):
        align_classes(train, arrays([0], ["x"]))


# Lists


@pytest.fixture
def labelled(tmp_path):
    return ImageFiles(tree(tmp_path / "train", {"n1": 200, "n2": 3}), labelled=True)


def test_a_subset_by_names(labelled, tmp_path, capsys):
    listed = tmp_path / "list.txt"
    listed.write_text("n1_5.JPEG\r\nn2/n2_1.png\n\nn1_17.png\nn1_5.JPEG\n")
    chosen = listed_images(labelled, listed)
    assert sorted(labelled.paths[i].rpartition("/")[2] for i in chosen.indices) == ["n1_17.png", "n1_5.png", "n2_1.png"]
    assert chosen.labels.tolist() == [0, 0, 1] and not capsys.readouterr().out
    listed.write_text("n1_5\nn9_1\n")
    assert len(listed_images(labelled, listed)) == 1
    assert "names without an image: 1 of 2, left out (n9_1)" in capsys.readouterr().out
    tree(tmp_path / "other", {"n1": 2})
    (tmp_path / "other" / "n3").mkdir()
    (tmp_path / "other" / "n1" / "n1_0.png").rename(tmp_path / "other" / "n3" / "n1_1.png")
    twice = ImageFiles(tmp_path / "other", labelled=True)
    for text, images, message in [
        ("n1_5\nn9_1\nn9_2\nn9_3\n", labelled, r"names without an image: 3 of 4 \(n9_1, n9_2, n9_3\)"),
        ("n9_1\n", labelled, "none of the names in .* such as n1_0"),
        ("", labelled, "--subset: expected lines in .*list.txt', found none"),
        ("n1_1\n", twice, "n1_1 in .* is the name of 2 files, .* write CLASS/NAME"),
        ("a\n", arrays([0], ["a"]), "--subset: expected images in files"),
    ]:
        listed.write_text(text)
        with pytest.raises(UserError, match=message):
            listed_images(images, listed)
    listed.write_text("n3/n1_1\n")
    assert twice.paths[listed_images(twice, listed).indices[0]].endswith("n3/n1_1.png")
    with pytest.raises(UserError, match="--subset: cannot read .*none.txt'"):
        listed_images(labelled, tmp_path / "none.txt")


@pytest.mark.parametrize(
    "text",
    [
        "v_0.png n2\nv_1.png n1\nv_2.png n2\n",
        "v_0.JPEG\t1\nv_1.JPEG\t0\nv_2.JPEG\t1\n",
        "ImageId,PredictionString\nv_0,n2 85 1 499 272\nv_1,n1 1 2 3 4 n1 1 1 1 1\nv_2,n2 1 1 1 1\n",
    ],
    ids=["names", "numbers", "csv"],
)
def test_a_flat_validation_folder_with_a_file_of_classes(text, tmp_path, capsys):
    tree(tmp_path / "train", {"n1": 2, "n2": 2})
    tree(tmp_path / "val", {"": 3})
    (tmp_path / "labels.txt").write_text(text)
    for data_path in (tmp_path, tmp_path / "train"):
        train, val = open_splits("folder", str(data_path), 1, val_labels=str(tmp_path / "labels.txt"))
        assert val.labels.tolist() == [1, 0, 1] and val.classes == train.classes == ["n1", "n2"]
        assert [int(val[i][0].max()) for i in range(3)] == [0, 10, 20]
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    "line, name, label",
    [
        ("a.jpg\tgolden retriever", "a", "golden retriever"),
        ("my photo 1.jpg\tcat", "my photo 1", "cat"),
        ("my photo 1.jpg\tn1\t0\t32", "my photo 1", "n1"),  # as in Tiny ImageNet
        ("a.jpg \t\t cat", "a", "cat"),
        ("a.jpg\tdog, hot", "a", "dog, hot"),
        ("a.jpg\tgolden", "a", "golden"),
        ("a.jpg,golden retriever", "a", "golden retriever"),
        ("a.jpg, golden retriever", "a", "golden retriever"),
        ('a.jpg,"dog, hot"', "a", "dog, hot"),
        ("a.jpg,cat,0.97", "a", "cat"),
        ("a.jpg,cat,sure", "a", "cat"),
        ("my, photo.jpg,cat", "my, photo", "cat"),
        ('"my, photo.jpg",cat', "my, photo", "cat"),
        ("my, photo.jpg cat", "my, photo", "cat"),
        ("my photo 1.jpg golden retriever", "my photo 1", "golden retriever"),
        ("folder of/my photo 1 cat", "my photo 1", "cat"),
        ("my cat", "my", "cat"),
        ("a,n1 85 1 499 272 n1 1 2 3 4", "a", "n1"),
        ("a.jpg golden zebra", "a", "golden zebra"),  # not golden
        ("a.jpg zebra 0", "a", "zebra"),
        ("a.jpg,zebra 1 2 3 4", "a", "zebra"),
    ],
)
def test_a_line_is_split_where_its_name_ends(line, name, label):
    names = {"a", "my", "my photo 1", "my, photo"}
    assert split_line(line, names, ["cat", "golden", "golden retriever", "dog, hot", "n1", "0"]) == (name, label)


def test_names_and_classes_with_spaces(tmp_path):
    tree(tmp_path / "train", {"cat": 2, "golden retriever": 2})
    tree(tmp_path / "val", {"": 3})
    (tmp_path / "val" / "v_0.png").rename(tmp_path / "val" / "my photo 1.png")
    for text in (
        "my photo 1.png\tcat\nv_1.png\tgolden retriever\nv_2.png\t0\n",
        "my photo 1.png cat\nv_1.png,golden retriever\nv_2.png 0\n",
    ):
        (tmp_path / "labels.txt").write_text(text)
        _, val = open_splits("folder", str(tmp_path), 1, val_labels=str(tmp_path / "labels.txt"))
        assert val.labels.tolist() == [0, 1, 0] and len(val) == 3


def test_numbers_where_the_names_of_the_classes_are_numbers_are_names(tmp_path):
    images, listed = ImageFiles(tree(tmp_path / "val", {"": 3})), tmp_path / "labels.txt"
    classes = [f"{number:02}" for number in range(1, 11)]
    listed.write_text("v_0.png 01\nv_1.png 10\nv_2.png 02\n")
    assert labelled_by_list(images, classes, listed).labels.tolist() == [0, 9, 1]
    listed.write_text("v_0.png 1\nv_1.png 10\nv_2.png 2\n")
    with pytest.raises(
        UserError, match="--val_labels: .*expected one of the classes, 01, 02, .* 5 more, got 1 for v_0; "
    ):
        labelled_by_list(images, classes, listed)
    listed.write_text("v_0.png 01\nv_1.png x\nv_2.png 02\n")
    assert len(labelled_by_list(images, classes, listed)) == 2


def test_what_a_file_of_classes_lacks_is_said_or_refused(tmp_path, capsys):
    images, listed = ImageFiles(tree(tmp_path / "val", {"": 4})), tmp_path / "labels.txt"
    listed.write_text("v_0 a\nv_1 zebra\nv_3 b\n")
    val = labelled_by_list(images, ["a", "b"], listed)
    assert val.indices.tolist() == [0, 3] and val.labels.tolist() == [0, 1]
    out = capsys.readouterr().out
    assert "validation images without a class: 1 of 4, left out (v_2)" in out
    assert "data: left out 1 of 4 validation images: their classes have no training images (zebra)" in out
    for text, message in [
        ("v_0 a\n", "validation images without a class: 3 of 4"),
        ("v_0 a\n\nv_1\nv_2 b\n", "labels.txt, line 3: expected NAME CLASS, got v_1"),
        ("v_0 x\nv_1 y\nv_2 x\nv_3 9", "expected classes of the training images, such as a, .* 0 to 1, got x, y, 9"),
        ("1\n2\n1\n", "has 3 numbers for 4 validation images"),
        ("1\n2\n1\n2\n", "holds numbers alone, as ImageNet's ground truth does, whose classes are named by"),
    ]:
        listed.write_text(text)
        with pytest.raises(UserError, match=message):
            labelled_by_list(images, ["a", "b"], listed)


def test_imagenets_own_ground_truth(tmp_path):
    """Its numbers are not those of the sorted class folders: meta.mat names them."""
    scipy_io = pytest.importorskip("scipy.io")
    images = ImageFiles(tree(tmp_path / "val", {"": 4}))
    synsets = np.array([(1, "n03"), (2, "n01"), (3, "n02")], dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O")])
    scipy_io.savemat(tmp_path / "meta.mat", {"synsets": synsets[:, None]})
    (tmp_path / "ground_truth.txt").write_text("1\n2\n3\n1\n")
    val = labelled_by_list(images, ["n01", "n02", "n03"], tmp_path / "ground_truth.txt")
    assert val.labels.tolist() == [2, 0, 1, 2]


# Classes by name


def test_classes_of_files_are_their_first_folder(tmp_path):
    for path in ("a b/deep/x.png", "a b/y.png", "c/z.png", "top.png"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(tmp_path / path)
    images = images_module.open_images("folder", tmp_path)
    named = {Path(images.paths[i]).name: class_of(images, i) for i in range(4)}
    assert named == {"x.png": "a b", "y.png": "a b", "z.png": "c", "top.png": None}
    chosen = ChosenImages(ImageFiles(tmp_path, labelled=True), [2])
    assert class_of(chosen, 0) == "c"
    labelled = arrays([-1, 1], ["above", "below"])
    assert class_of(labelled, 0) is None and class_of(labelled, 1) == "below"
    assert class_of(torch.utils.data.TensorDataset(torch.zeros(1)), 0) is None
