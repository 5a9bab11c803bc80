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
    monkeypatch.setattr(study, "FASHION_MNIST", str(tmp_path / "none"))
    with pytest.raises(SystemExit):
        bench.parse_args(["collapse", "--sets", "fashion_mnist_1500"])
    assert "apt-get install dataset-fashion-mnist" in capsys.readouterr().err
    assert bench.parse_args(["collapse"]).sets == ["shapes"]  # which needs nothing


def test_sets_have_the_images_that_they_promise(tmp_path):
    if study.find_spec("skimage") is None:
        pytest.skip("no scikit-image")
    root = study.set_options("patches", tmp_path).split()[1]
    counts = [len(list((tmp_path / "patches" / split).rglob("*.png"))) for split in ("train", "val")]
    assert root == str(tmp_path / "patches") and counts == [12 * 120, 12 * 60]
    assert study.set_options("patches", tmp_path).split()[1] == root
