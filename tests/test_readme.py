"""The README's code does what the README says."""

import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from model import SwAV

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_features_of_a_checkpoint(tmp_path, monkeypatch):
    (code,) = (block for block in README.split("```")[1::2] if "backbone_weights(" in block)
    monkeypatch.chdir(tmp_path)
    model = SwAV("resnet18", width=8, blocks=[1, 1, 1, 1], hidden_mlp=16, nmb_prototypes=10).eval()
    Path("runs/swav").mkdir(parents=True)
    torch.save({"state_dict": model.state_dict(), "epoch": 1}, "runs/swav/checkpoint.pth")
    pixels = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("photo.jpg")
    names = {}
    exec(code, names)
    assert names["features"].shape == (1, 64)
    with torch.no_grad():
        torch.testing.assert_close(names["features"], model.features(names["image"][None]))


def test_links_to_headings_exist_once():
    names = re.findall(r"(?m)^#+ (.*)$", README)
    headings = [re.sub(r"[^\w\- ]", "", name.lower()).replace(" ", "-") for name in names]
    assert len(set(headings)) == len(headings)
    assert set(re.findall(r"\]\(#(.*?)\)", README)) <= set(headings)


def test_files_it_links_to_exist():
    links = re.findall(r"\]\((?!https?:|#)(.*?)\)", README)
    assert links and all((ROOT / link).exists() for link in links)
