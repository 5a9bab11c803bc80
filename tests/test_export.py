"""export.py end to end, as its users run it."""

import csv
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, forked, run_training

import export
import hubconf
from backbones import load_backbone
from data import CentreCrop, expected_crop
from decode import read_image
from launch import RunStopped, UserError
from model import ResNet
from processes import run_script


def run(*words: object) -> None:
    words = [str(word) for word in words]
    machine = ["--device", "cpu", "--workers", "0"]
    export.main(export.parse_args([*words, *machine]))


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory) -> Path:
    """The folder of a tiny run."""
    folder = tmp_path_factory.mktemp("trained") / "runs" / "tiny"
    run_training(images, folder, "--epochs", "1")
    return folder


@pytest.fixture
def photos(images, tmp_path) -> Path:
    """A tree of ten images and a damaged one, with odd names."""
    shutil.copytree(images / "train", tmp_path / "photos")
    (tmp_path / "photos" / "cats" / "0.png").rename(tmp_path / "photos" / "a, b.png")
    (tmp_path / "photos" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n no image")
    return tmp_path / "photos"


def features_of(trained: Path, files: list[Path]) -> torch.Tensor:
    """What the backbone makes of files, one by one; images of 24 x 20 pixels, crops of 16 in training."""
    backbone = load_backbone(trained / "checkpoint.pth", None)[0].eval()
    with torch.no_grad():
        return torch.cat([backbone(CentreCrop(20, 20)(read_image(str(file)))[None]) for file in files])


def read_csv(path: Path) -> list[list[str]]:
    with open(path, newline="") as file:
        return list(csv.reader(file))


def test_features_of_a_tree_as_npz_and_csv(trained, photos, tmp_path, capsys):
    run(trained, "features", photos, tmp_path / "new" / "f.npz", "--batch_size", "4")
    out = capsys.readouterr().out
    assert "left out, as they cannot be read: 1 of 11 images: " in out and "broken.png" in out
    assert (
        "shorter side resized to 20 pixels (bilinear with antialias), centre crop of 20, RGB / 255, minus 0.485" in out
    )
    found = np.load(tmp_path / "new" / "f.npz")
    files = sorted(path for path in photos.rglob("*.png") if path.name != "broken.png")
    assert found["root"] == str(photos) and [photos / name for name in found["files"]] == files
    assert found["features"].dtype == np.float32
    expected = features_of(trained, files)
    torch.testing.assert_close(torch.from_numpy(found["features"]), expected, rtol=1e-4, atol=1e-4)
    assert (found["size"], found["resize"]) == (20, 20) and found["std"].tolist() == [0.228, 0.224, 0.225]
    assert found["checkpoint"] == str(trained / "checkpoint.pth")

    run(trained / "checkpoint.pth", "features", photos, tmp_path / "f.CSV", "--batch_size", "4")
    header, *rows = read_csv(tmp_path / "f.CSV")
    assert header == ["file", *(f"feature_{i}" for i in range(expected.shape[1]))]
    assert [row[0] for row in rows] == found["files"].tolist() and "a, b.png" in found["files"]
    assert np.array_equal(np.array([row[1:] for row in rows], np.float32), found["features"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.CSV", "new", "photos"]


def test_size_and_resize_reach_the_features(trained, photos, tmp_path):
    run(trained, "features", photos, "--size", "8", tmp_path / "f.npz", "--resize=12")  # options between paths
    found = np.load(tmp_path / "f.npz")
    assert (found["size"], found["resize"]) == (8, 12)


def test_names_that_are_not_utf8_keep_their_bytes(trained, photos, tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    try:
        shutil.copy(photos / "dogs" / "0.png", photos / name)
    except OSError:
        pytest.skip("this file system has only UTF-8 names")
    run(trained, "clusters", photos, tmp_path / "c.csv")
    run(trained, "features", photos, tmp_path / "f.npz")
    assert b"\ncaf\xe9.png," in (tmp_path / "c.csv").read_bytes()
    assert name in np.load(tmp_path / "f.npz")["files"].tolist()


def test_too_many_unreadable_images_end_it_and_leave_no_file(trained, photos, tmp_path):
    (tmp_path / "f.csv").write_text("of before")
    for out in ("f.csv", "f.npz"):
        with pytest.raises(RunStopped, match="1 of 11 images cannot be read, and --max_bad_images allows 0"):
            run(trained, "features", photos, tmp_path / out, "--max_bad_images", "0")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.csv", "photos"]
    assert (tmp_path / "f.csv").read_text() == "of before"
    run(trained, "features", photos, tmp_path / "f.csv")  # replaced once it is complete
    assert (tmp_path / "f.csv").read_text().startswith("file,")
    for path in photos.rglob("*.png"):
        path.write_bytes((photos / "broken.png").read_bytes()[:20])
    with pytest.raises(UserError, match="nor can any other of 11 images"):
        run(trained, "features", photos, tmp_path / "f.csv", "--max_bad_images", "11")


def test_clusters_are_the_nearest_prototypes(trained, photos, tmp_path):
    run(trained, "weights", tmp_path / "published.pth.tar.pth", "--to", "swav")
    contents = torch.load(trained / "checkpoint.pth", weights_only=True)
    contents["options"]["temperature"] = 0.3
    torch.save(contents, tmp_path / "warm.pth")
    whole = hubconf.swav(trained / "checkpoint.pth")
    whole.normalize_prototypes()
    for file, temperature in (("warm.pth", 0.3), ("published.pth.tar.pth", 0.1)):  # 0.1 where it is unknown
        run(tmp_path / file, "clusters", photos, tmp_path / "c.csv", "--size", "16")
        header, *rows = read_csv(tmp_path / "c.csv")
        assert header == ["file", "prototype", "certainty", "second_choice"] and len(rows) == 10
        pixels = torch.stack([CentreCrop(18, 16)(read_image(str(photos / row[0]))) for row in rows])
        with torch.no_grad():
            certainties, nearest = (whole([pixels])[1] / temperature).softmax(1).sort(1, descending=True)
        assert [[int(row[1]), int(row[3])] for row in rows] == nearest[:, :2].tolist()
        assert [float(row[2]) for row in rows] == pytest.approx(certainties[:, 0].tolist(), abs=1e-4)


def test_clusters_of_a_damaged_head_are_refused(trained, photos, tmp_path):
    contents = torch.load(trained / "checkpoint.pth", weights_only=True)
    contents["state_dict"]["prototypes.weight"][0, 0] = torch.nan
    torch.save(contents, tmp_path / "damaged.pth")
    with pytest.raises(RunStopped, match="certainties are inf or nan") as stopped:
        run(tmp_path / "damaged.pth", "clusters", photos, tmp_path / "c.csv", "--size", "16")
    assert stopped.value.code == 4 and not (tmp_path / "c.csv").exists()


def test_a_single_prototype_has_no_second_choice():
    found = export.nearest_prototypes(torch.randn(2, 3), torch.nn.Identity(), torch.nn.Linear(3, 1), 0.1)
    assert found == ([0, 0], [1, 1], [-1, -1])


def test_similar_images_by_cosine_without_the_image_itself(trained, photos, tmp_path, capsys):
    query = photos / "dogs" / "1.png"
    shutil.copy(query, photos / "copy.png")
    (tmp_path / "link.png").symlink_to(query)
    run(trained, "similar", tmp_path / "link.png", photos, "--k", "3")
    out = capsys.readouterr().out
    assert f"left out: {tmp_path / 'link.png'} itself" in out
    lines = out.partition("cosine  file\n")[2].splitlines()
    assert lines[0] == f"1.0000  {photos / 'copy.png'}" and len(lines) == 3
    others = sorted(path for path in photos.rglob("*.png") if path.name != "broken.png" and path != query)
    cosines = F.cosine_similarity(features_of(trained, others), features_of(trained, [query]))
    best = cosines.sort(descending=True)
    assert [line[8:] for line in lines] == [str(others[i]) for i in best.indices[:3]]
    assert [float(line[:6]) for line in lines] == pytest.approx(best.values[:3].tolist(), abs=2e-4)
    shutil.copy(query, tmp_path / "elsewhere.png")
    run(trained, "similar", tmp_path / "elsewhere.png", photos)
    out = capsys.readouterr().out
    assert "itself" not in out and len(out.partition("cosine  file\n")[2].splitlines()) == 10


@pytest.mark.parametrize("what, name", [("onnx", "b.onnx"), ("torch_export", "b.pt2"), ("weights", "w.pth")])
def test_networks_are_written_with_what_they_expect(what, name, trained, tmp_path, capsys, monkeypatch):
    # test_exchange.py has the real one, which takes seconds
    monkeypatch.setattr(export.exchange, "write_onnx", lambda backbone, path, crop: path.write_text("onnx") / 1e6)
    run(trained, what, tmp_path / name, *(("--to", "swav") if what == "weights" else ()))
    out = capsys.readouterr().out
    assert f"written to {tmp_path / name}\nthe weights expect: shorter side resized to 20 pixels" in out
    assert ("largest difference from PyTorch: " in out) == (what != "weights")
    assert [path.name for path in tmp_path.iterdir()] == [name]
    if what == "weights":
        assert torch.equal(
            hubconf.swav(tmp_path / name).prototypes.weight, hubconf.swav(trained / "checkpoint.pth").prototypes.weight
        )


def test_an_export_that_fails_leaves_the_file_of_before(trained, tmp_path, monkeypatch):
    (tmp_path / "b.pt2").write_text("of before")
    monkeypatch.setattr(export.exchange, "TOLERANCE", -1.0)
    with pytest.raises(RunStopped, match="it is not written"):
        run(trained, "torch_export", tmp_path / "b.pt2")
    assert [path.name for path in tmp_path.iterdir()] == ["b.pt2"]
    assert (tmp_path / "b.pt2").read_text() == "of before"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_is_named(trained, photos, tmp_path):
    (tmp_path / "c.unfinished.csv").symlink_to("/dev/full")
    with pytest.raises(RunStopped, match="cannot write .*c.csv: No space left on device; make room"):
        run(trained, "clusters", photos, tmp_path / "c.csv")
    assert not list(tmp_path.glob("c*"))


def test_the_checkpoint_itself_is_not_overwritten(trained, tmp_path):
    shutil.copy(trained / "checkpoint.pth", tmp_path / "c.pth")
    (tmp_path / "link.pth").symlink_to("c.pth")
    with pytest.raises(UserError, match="OUT: expected another file than the checkpoint .*c.pth"):
        run(tmp_path / "c.pth", "weights", tmp_path / "link.pth", "--to", "swav")


@pytest.mark.parametrize(
    "words, message",
    [
        ("{run}", "required: WHAT"),
        ("{run} feature {images} f.npz", "WHAT: expected one of features, clusters, .* after RUN, got feature"),
        ("{run} features {images}", "expected python export.py RUN features DIR OUT, got {images} after features"),
        ("{run} onnx", "expected python export.py RUN onnx OUT, got nothing after onnx"),
        ("{run} onnx a.onnx b.onnx", "expected python export.py RUN onnx OUT, got a.onnx b.onnx after onnx"),
        ("{run} features {images} f.txt", "OUT: expected a name that ends in .npz or .csv, got f.txt"),
        ("{run} weights {tmp}/d.pth --to swav", "OUT: expected a file, got .*d.pth, which is a folder"),
        ("{run} weights {tmp}/file/w.pth --to swav", "OUT: cannot write .*w.pth: "),
        ("{run} weights w.pth", "--to: expected one of torchvision, timm, swav for weights, got none"),
        ("{run} weights w.pth --to keras", "--to: invalid choice"),
        (
            "{run} weights w.pth --to swav --size 20 --resize 8",
            "--resize: expected at least the 20 pixels of size, got 8",
        ),
        ("{run} features none f.npz", "DIR: expected a folder of images, got none, which does not exist"),
        ("{run} features {tmp}/d.pth f.npz", "data_path: expected image files"),
        ("{run} similar none.png {images}", "IMAGE: expected an image file, got none.png"),
        ("{run} similar {tmp}/file {images}", "IMAGE: cannot read .*file as an image: "),
        ("{run} similar {images} {images} --k 0", "--k: expected a whole number from 1, got 0"),
        ("{tmp} onnx b.onnx", "RUN: expected a run's folder or a checkpoint, got {tmp} without checkpoint.pth"),
        ("{tmp}/none.pth onnx b.onnx", "checkpoint: cannot read .*none.pth: No such file"),
        ("{tmp}/backbone.pth clusters {images} {tmp}/c.csv", "RUN: .*backbone.pth holds a backbone alone: expected"),
        ("{tmp}/backbone.pth weights {tmp}/w.pth --to swav", "--to swav: RUN holds a backbone alone; write --to tor"),
    ],
)
def test_bad_input_is_refused_by_its_name_and_leaves_nothing(words, message, trained, images, tmp_path):
    (tmp_path / "d.pth").mkdir()
    (tmp_path / "file").write_text("no folder")
    weights = ResNet("resnet18", width=2, blocks=(1, 1, 1, 1), stem="small").state_dict()
    torch.save(weights, tmp_path / "backbone.pth")
    places = dict(run=trained, images=images, tmp=tmp_path)
    with pytest.raises(UserError, match=message.format(**places)):
        run(*words.format(**places).split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["backbone.pth", "d.pth", "file"]


def test_options_without_effect_are_said(trained):
    args = export.parse_args([str(trained), "weights", "w.pth", "--to", "timm", "--k", "3", "--batch-size", "8"])
    assert export.options_without_effect(args) == [
        "--k 3 has no effect on weights",
        "--batch_size 8 has no effect on weights",
    ]
    assert not export.options_without_effect(export.parse_args([str(trained), "similar", "a", "b", "--k", "3"]))


def test_the_run_knows_the_sizes_of_its_evaluation(trained):
    contents = torch.load(trained / "checkpoint.pth", weights_only=True)
    assert contents["sizes"] == [20, 20] and hubconf.from_checkpoint(trained / "checkpoint.pth").preprocess.size == 20
    crop = expected_crop(contents | {"value_range": (3.0, 9.0)})
    assert (crop.size, crop.resize, crop.value_range) == (20, 20, (3.0, 9.0))


def test_it_runs_from_another_folder(trained, photos, tmp_path):
    words = [ROOT / "export.py", os.path.relpath(trained, tmp_path), "clusters", "photos", "out/c.csv"]
    done = forked(*words, "--device", "cpu", "--workers", "0", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(read_csv(tmp_path / "out" / "c.csv")) == 11


def test_it_explains_itself_with_an_example_of_each_command(trained, capsys):
    text = export.option_parser().format_help()
    assert all(f"export.py runs/photos {what} " in text for what in export.COMMANDS)
    assert "--max_bad_images" in export.option_parser().format_help(all_options=True)
    with pytest.raises(SystemExit) as end:
        run_script(lambda: run(trained, "clusters", ".", "c.txt"))
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and line == "error: OUT: expected a name that ends in .csv, got c.txt"
