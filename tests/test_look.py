"""look.py: pages of tiny runs, of old, unfinished and damaged ones, without images, and with hostile file names."""

import html
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, forked, run_training
from PIL import Image
from test_page import Tags

import look
from data import CentreCrop
from images import ImageArrays
from launch import UserError
from model import SwAV

pytest.importorskip("matplotlib")

SECTIONS = ["The run", "Training curves", "Crops", "Prototypes", "Balance", "Nearest neighbours", "Map",
            "How codes evolve", "Warnings"]  # fmt: skip


@pytest.fixture(scope="module")
def run(images, tmp_path_factory) -> Path:
    """A finished run of 4 epochs on the images of conftest.py."""
    folder = tmp_path_factory.mktemp("look") / "run"
    run_training(images, folder, "--eval_every", "2")
    return folder


@pytest.fixture
def copy(run, tmp_path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copy", ignore=shutil.ignore_patterns("look.html")))


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    """No t-SNE, which takes seconds to import, and charts that are not drawn; test_page.py draws them."""
    monkeypatch.setattr("sections.find_spec", lambda name: None)
    monkeypatch.setattr("page._png", lambda figure: b"\x89PNG")


def looked_at(*words: object) -> str:
    """The page that a command line writes."""
    path = look.main(look.option_parser().parse_args([*map(str, words), "--device", "cpu", "--workers", "0"]))
    return path.read_text()


def by_section(content: str) -> dict[str, str]:
    parts = content.split("<section ")[1:]
    return {html.unescape(re.search("<h2>(.*)</h2>", part)[1]): part for part in parts}


def test_a_page_has_all_sections_and_needs_nothing_else(run, capsys):
    content = looked_at(run)
    sections = by_section(content)
    assert list(sections) == SECTIONS
    pictures = {title: text.count("<img") for title, text in sections.items()}
    assert pictures["Training curves"] == 9 and pictures["Crops"] == 8 * (1 + 3) and pictures["Balance"] == 1
    assert pictures["Prototypes"] == 10 and pictures["Nearest neighbours"] == 10 * (1 + 8) and pictures["Map"] == 2
    assert pictures["How codes evolve"] >= 1
    assert not re.search(r"https?://|<script|src=\"(?!data:)|@import|url\(", content)
    assert all('alt=""' not in image and " alt=" in image for image in re.findall("<img[^>]*>", content))
    assert "labelled cats" in sections["Prototypes"] and "Label purity" in sections["Prototypes"]
    assert "finished: 4 of 4 epochs" in sections["The run"] and "kNN" in sections["The run"]
    assert "images of 24 pixels" not in content and len(content) < 2**20
    out = capsys.readouterr().out
    assert "looking at 10 of 10 images" in out and f"written to {run / 'look.html'}, 0." in out
    assert not list(run.glob("*.tmp"))


def test_nothing_is_written_but_the_page_and_a_second_page_takes_its_place(copy):
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    first = looked_at(copy)
    assert looked_at(copy) == first
    assert {p: p.stat().st_mtime_ns for p in copy.rglob("*") if p != copy / "look.html"} == before


def test_the_newest_run_is_the_default_and_the_page_may_go_elsewhere(copy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no runs/\*/checkpoint.pth here"):
        looked_at()
    (tmp_path / "runs").mkdir()
    copy.rename(tmp_path / "runs" / "mine")
    assert "<h1>mine</h1>" in looked_at("--output", "page.html")
    assert (tmp_path / "page.html").exists() and not (tmp_path / "runs" / "mine" / "look.html").exists()


def test_a_kept_epoch_or_any_file_of_the_run_can_be_looked_at(copy):
    assert "2 of 4 epochs" in looked_at(copy, "--checkpoint", "2")
    assert "2 of 4 epochs" in looked_at(copy / "checkpoints" / "ckp-2.pth")
    assert (copy / "look.html").exists() and not (copy / "checkpoints" / "look.html").exists()
    assert "4 of 4 epochs" in looked_at(copy / "checkpoint.pth")
    (copy / "checkpoint.pth").unlink()
    assert "checkpoint_previous.pth" in looked_at(copy)


def test_an_old_run_has_the_sections_that_it_has_files_for(copy):
    for name in ("run.json", "codes.jsonl", "metrics.jsonl"):
        (copy / name).unlink()
    sections = by_section(looked_at(copy))
    assert list(sections) == SECTIONS
    assert "run.json is missing" in sections["The run"] and "metrics.jsonl is missing" in sections["Training curves"]
    assert "codes.jsonl is missing" in sections["How codes evolve"] and sections["Prototypes"].count("<img") == 10


def test_half_a_row_of_a_run_that_trains_is_left_out(copy):
    for name in ("metrics.jsonl", "codes.jsonl"):
        with (copy / name).open("a") as file:
            file.write('{"epoch": 5, "step": 10, "prot')
    (copy / "run.json").write_text("{half")
    assert "4 of 4 epochs" in looked_at(copy)


def test_without_images_charts_still_come(images, tmp_path):
    moved = shutil.copytree(images, tmp_path / "data")
    run_training(images, tmp_path / "run", f"--data_path={moved}", "--epochs", "2")
    moved.rename(tmp_path / "moved")
    sections = by_section(looked_at(tmp_path / "run"))
    gone = [title for title, text in sections.items() if "The images cannot be opened" in text]
    assert gone == ["The run", "Crops", "Prototypes", "Balance", "Nearest neighbours", "Map"]
    assert sections["Training curves"].count("<img") >= 6 and sections["How codes evolve"].count("<img") == 1
    content = looked_at(tmp_path / "run", "--data_path", tmp_path / "moved")
    assert "cannot be opened" not in content and by_section(content)["Prototypes"].count("<img") == 10
    assert "not the images of the training" not in content
    (tmp_path / "moved" / "train" / "cats" / "0.png").unlink()
    assert "not the images of the training: 9 now, 10 then" in looked_at(
        tmp_path / "run", "--data_path", tmp_path / "moved"
    )


def test_a_set_without_a_validation_split_has_no_labels(images, tmp_path):
    shutil.copytree(images / "train", tmp_path / "sorted")
    run_training(images, tmp_path / "run", f"--data_path={tmp_path / 'sorted'}", "--epochs", "1")
    content = looked_at(tmp_path / "run")
    assert "labelled" not in content and "purity" not in content and "cats/0.png" in content


def test_hostile_names_and_unreadable_files_do_no_harm(tmp_path):
    folder = tmp_path / """a <script>alert('1')</script> "quoted" & é"""
    for i, name in enumerate(
        [b"<img src=x onerror=alert(1)>.png", b"new\nline.png", b"no utf-8 \xff\xfe.png", b'"q".png']
    ):
        path = os.path.join(os.fsencode(folder), b"<b>class", name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        Image.new("RGB", (20, 24), (60 * i, 90, 30)).save(os.fsdecode(path), "PNG")
    for i in range(4):
        Image.new("RGB", (20, 24), (60 * i, 90, 200)).save(folder / f"{i}.png")
    (folder / "bad\t<i>.png").write_bytes(b"no image")
    run_training(folder, tmp_path / "<run>", "--epochs", "1", "--max_bad_images", "5")
    content = looked_at(tmp_path / "<run>")
    found = Tags(content).found
    tags, attributes = {tag for tag, _ in found}, {name for _, attributes in found for name in attributes}
    known = "html head meta link title style body h1 h2 h3 nav a section p table tr th td details summary ul li div"
    assert tags <= {*known.split(), "figure", "figcaption", "img"}
    assert attributes <= set("lang charset name content rel href id class style alt title loading src".split())
    assert "1 images could not be read in training" in content and "no utf-8 \\xff\\xfe.png" in content
    assert "new\\nline.png" in content and by_section(content)["Prototypes"].count("<img") == 8


def test_a_set_of_which_nothing_can_be_read_any_more_is_said(images, tmp_path):
    shutil.copytree(images / "train", tmp_path / "data")
    run_training(images, tmp_path / "run", f"--data_path={tmp_path / 'data'}", "--epochs", "1")
    for path in (tmp_path / "data").rglob("*.png"):
        path.write_bytes(b"")
    assert "The images cannot be shown" in looked_at(tmp_path / "run")


@pytest.mark.parametrize(
    "words, message",
    [
        (["{run}/nothing"], "RUN: expected the folder of a run, got .*/nothing"),
        (["{images}"], "RUN: expected a folder with checkpoint.pth, got"),
        ([""], "RUN, --output: expected a name, got an empty one"),
        (["{run}", "--checkpoint", "3"], r"--checkpoint: expected a file or a kept epoch of .* \(2, 4\), got 3"),
        (["{run}/checkpoint.pth", "--checkpoint", "2"], "--checkpoint 2: expected none with the file"),
        (["{run}/metrics.jsonl"], "cannot read .*metrics.jsonl: it is cut short, damaged, or not a file"),
        (["{run}", "--data_path", "{run}/nothing"], "--data_path: expected a folder, a .tar file or a .*/nothing"),
        (["{run}", "--data_path", "{run}/checkpoints"], "--data_path: expected image files"),
        (["{run}", "--output", "{run}/no/page.html"], "--output: expected a file in a folder that exists"),
        (["{run}", "--output", "{run}/checkpoints"], "--output: cannot write .*/checkpoints: "),
        (["{run}", "--images", "2"], "--images: expected a whole number from 3, got 2"),
    ],
)
def test_errors_name_what_was_given_and_what_is_accepted(words, message, run, images):
    with pytest.raises(UserError, match=message):
        looked_at(*(word.format(run=run, images=images) for word in words))
    assert not list(run.rglob("*.tmp"))


def test_other_programs_checkpoints_are_refused(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "checkpoint.pth")
    with pytest.raises(UserError, match="checkpoint.pth: it is not a checkpoint of train.py"):
        looked_at(tmp_path)


def test_without_matplotlib_the_package_is_named(run, monkeypatch):
    monkeypatch.setattr(look, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        looked_at(run)


@pytest.mark.parametrize("hidden_mlp", [0, 16])
def test_features_and_certainties_are_those_of_the_network(hidden_mlp, tmp_path):
    pixels = np.random.default_rng(0).integers(256, size=(40, 20, 24, 3), dtype=np.uint8)
    images = ImageArrays(pixels, np.arange(40) % 3, ["a", "b", "c"])
    model = SwAV("resnet18", hidden_mlp, 8, 6, width=8, blocks=[1, 1, 1, 1], stem="small").eval()
    model.normalize_prototypes()
    options = {"dataset": "cifar10", "size_crops": [16], "temperature": 0.1}
    torch.save({"state_dict": model.state_dict(), "options": options, "epoch": 1}, tmp_path / "checkpoint.pth")
    run = look.read_run(tmp_path, tmp_path / "checkpoint.pth")
    more = dict(most=30, batch_size=7, workers=0)
    seen = look.look_at_images(run, images, torch.device("cpu"), labelled=True, **more)
    batch = torch.stack([CentreCrop(20, 20)(images[i][0]) for i in seen.indices])
    with torch.no_grad():
        scores = model([batch])[1]
        assert torch.allclose(seen.features, model.features(batch), atol=1e-4)
    assert torch.allclose(seen.certainties, (scores / 0.1).softmax(1), atol=1e-4)
    assert len(set(seen.indices)) == 30 and seen.classes == ["abc"[i % 3] for i in seen.indices]
    unlabelled = look.look_at_images(run, images, torch.device("cpu"), labelled=False, **more)
    assert set(unlabelled.classes) == {None}


def test_the_page_opens_in_a_browser(run, monkeypatch, capsys):
    opened = []
    monkeypatch.setattr("webbrowser.open", lambda uri: opened.append(uri))
    looked_at(run, "--open")
    assert opened == [(run / "look.html").absolute().as_uri()] and "no browser found" in capsys.readouterr().out


def test_the_command_works_from_another_folder(run, tmp_path):
    result = forked(ROOT / "look.py", run, "--images", "5", "--workers", "1", "--output", "page.html", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "looking at 5 of 10 images" in result.stdout and len(by_section((tmp_path / "page.html").read_text())) == 9
