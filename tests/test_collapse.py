"""python -m bench collapse: its runs, and that it does not repeat them."""

import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
import torch
from PIL import Image

import train
from bench import collapse
from guard import is_stuck


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
    monkeypatch.setattr(collapse, "dataset_options", lambda name, folder, photographs: images)
    options = dict(settings=["derived"], sets=["shapes"], seeds=[1], epochs=1, jobs=1, threads=1, dump_path=tmp_path)
    first = collapse.run(torch.device("cpu"), **options)
    result = tmp_path / "shapes-1" / "derived" / "1" / "result.json"
    written = result.stat().st_mtime_ns
    capsys.readouterr()
    assert collapse.run(torch.device("cpu"), **options) == first
    out = capsys.readouterr().out
    assert "1 runs of 1 epochs, 1 of them done before" in out and result.stat().st_mtime_ns == written
    assert not list(tmp_path.rglob("*.pth"))
