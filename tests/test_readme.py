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


def check_crops(names):
    assert [list(crop.shape) for crop in names["crops"]] == [[4, 3, 224, 224]] * 2 + [[4, 3, 96, 96]] * 6
    assert names["labels"].shape == (4,)


def check_module(names):
    module = names["Pretraining"]()
    crops = [torch.randn(4, 3, size, size) for size in (64, 64, 32, 32, 32, 32, 32, 32)]
    loss = module.training_step((crops, None), 0)
    loss.backward()
    assert loss.isfinite() and all(weight.grad is not None for weight in module.parameters())


def check_supervised(names):
    assert names["optimizer"].steps == 4 == len(names["learning_rates"]) and names["optimizer"].skipped == 0
    assert names["lr"] == names["learning_rates"][-1]


def check_codes(names):
    codes = names["codes"]
    assert codes.shape == (16, 65536) and codes.sum(1).allclose(torch.ones(16)) and (codes > 0).any(1).all()
    assert names["loss"].isfinite() and 0 < names["loss"] < 2 * np.log(65536)


def check_run(names):
    contents = torch.load("runs/mine/checkpoint.pth", weights_only=True)
    assert contents["epoch"] == 1 and contents["images"]["images"] == 16


# Blocks that begin with ```python NAME: each runs as it stands in an empty folder, and leaves what is checked here.
EXAMPLES = {
    "your_dataset.py": check_crops,
    "lightning.py": check_module,
    "supervised.py": check_supervised,
    "many_prototypes.py": check_codes,
    "your_images.py": check_run,
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_works_in_an_empty_folder(name, tmp_path, monkeypatch):
    blocks = dict(re.findall(r"(?ms)^```python (\w+\.py)\n(.*?)^```$", README))
    assert blocks.keys() == EXAMPLES.keys()
    lines = list(filter(None, blocks[name].splitlines()))  # without the blank ones of the formatter
    assert len(lines) <= 12 and max(map(len, lines)) <= 120
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    exec(compile(blocks[name], name, "exec"), names)
    EXAMPLES[name](names)


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
