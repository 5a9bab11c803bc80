"""The README's code works, and links lead to existing files and headings."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model import SwAV

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = "README.md", "MEASURED.md"


def test_features_of_a_checkpoint(tmp_path, monkeypatch):
    (code,) = (block for block in README.split("```")[1::2] if "from_checkpoint" in block)
    monkeypatch.chdir(tmp_path)
    model = SwAV("resnet18", width=8, blocks=[1, 1, 1, 1], hidden_mlp=16, nmb_prototypes=10).eval()
    Path("runs/photos").mkdir(parents=True)
    torch.save({"state_dict": model.state_dict(), "epoch": 1}, "runs/photos/checkpoint.pth")
    pixels = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("photo.jpg")
    names = {}
    assert 'load("."' in code
    exec(code.replace('load("."', f'load("{ROOT}"'), names)
    assert names["features"].shape == (1, 64) and not names["backbone"].training
    with torch.no_grad():
        torch.testing.assert_close(names["features"], model.features(names["image"][None]))


def headings(text):
    names = re.findall(r"(?m)^#+ (.*)$", text)
    return [re.sub(r"[^\w\- ]", "", name.lower()).replace(" ", "-") for name in names]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_existing_files_and_headings(page):
    text = (ROOT / page).read_text()
    links = re.findall(r"\]\((?!https?:)(.*?)\)", text)
    assert links and len(set(headings(text))) == len(headings(text))
    for link in links:
        file, _, heading = link.partition("#")
        target = ROOT / (file or page)
        assert target.exists(), link
        assert not heading or heading in headings(target.read_text()), link
