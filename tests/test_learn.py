"""python -m bench learn: our runs, other methods in the same seconds, tables, correlations, the chart."""

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from bench import learn, peers
from bench.__main__ import BENCHMARKS, parse_args
from bench.collapse import SETTINGS

NETWORK = "--arch resnet18 --width 8 --blocks 1 1 1 1 --hidden_mlp 16 --device cpu --workers 0"


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """imagenette/, with images of one colour per class and noise."""
    root, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for split in ("train", "val"):
        for label, colour in enumerate(((200, 60, 60), (60, 200, 60), (60, 60, 200))):
            folder = root / "imagenette" / split / str(label)
            folder.mkdir(parents=True)
            for i in range(24):
                pixels = np.array(colour) + rng.normal(0, 30, (64, 64, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")
    return root


def test_ours_and_a_peer_are_run_once_and_shown_with_what_they_have_to_beat(photographs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(learn, "SETS", {"imagenette64_1000": (1, NETWORK)})
    options = dict(peers=["with labels"], photographs=photographs, dump_path=tmp_path, jobs=1)
    rows = learn.run(torch.device("cpu"), **options)
    out = capsys.readouterr().out
    assert [row["method"] for row in rows] == ["derived", "with labels"]
    ours, labels = rows
    assert ours["accuracies"].keys() >= set(learn.BASELINES.values()) and ours["seconds"] > 0
    assert 0 <= labels["top1"] <= 100 and labels["steps"] > 0 and labels["seconds"] >= ours["seconds"]
    for heading in (*learn.BASELINES, "with labels"):
        assert f"\n{heading} " in out
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}
    assert len(written) == 2 and not list(tmp_path.rglob("*.pth"))
    assert json.loads(json.dumps(learn.run(torch.device("cpu"), **options))) == json.loads(json.dumps(rows))
    assert {path: path.stat().st_mtime_ns for path in written} == written


@pytest.mark.parametrize("name", peers.PEERS)
def test_every_peer_lowers_its_loss(name):
    if name.startswith("lightly") and find_spec("lightly") is None:
        pytest.skip("no lightly")
    torch.manual_seed(0)
    backbone = peers.ResNet("resnet18", width=8, blocks=[1, 1, 1, 1], stem="small")
    transform, step, optimizer, batch_size = peers.PEERS[name](backbone, 24, 3)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    views = transform(image)
    shapes = [tuple(view.shape) for view in (views if isinstance(views, list | tuple) else [views])]
    expected = {"with labels": [(3, 24, 24)], "lightly SimCLR": 2 * [(3, 24, 24)]}
    assert shapes == expected.get(name, 2 * [(3, 24, 24)] + 6 * [(3, 12, 12)]) and batch_size >= 64
    batch, labels = [torch.randn(16, *shape) for shape in shapes], torch.arange(16) % 3
    losses = []
    for _ in range(8):
        loss = step(batch[0] if name == "with labels" else batch, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_a_peer_trains_for_its_seconds_with_a_whole_schedule(monkeypatch):
    clock = iter(range(10_000))  # a tenth of a second passes at each look
    monkeypatch.setattr(peers.time, "perf_counter", lambda: next(clock) / 10)
    network = nn.Linear(2, 2)
    optimizer, lrs = torch.optim.SGD(network.parameters(), 0.1), []

    def step(views, labels):
        lrs.append(optimizer.param_groups[0]["lr"])
        return network(views).square().sum()

    loader = [(torch.ones(1, 2), torch.zeros(1))] * 7
    steps, seconds, _ = peers.train_for(5.0, loader, step, optimizer, schedule=peers.cosine)
    assert steps == len(lrs) == 49 and seconds == pytest.approx(5.1)
    assert lrs[0] == pytest.approx(0.1, rel=0.01) and lrs[24] == pytest.approx(0.05) and lrs[-1] < 2e-4
    shares = [peers.one_cycle(i / 100) for i in range(101)]
    assert shares[0] == 0.04 and shares[30] == 1 == max(shares) and shares[100] == pytest.approx(0)


def test_rank_correlation_shares_ranks_of_equal_values():
    assert learn.spearman([1, 2, 3, 4], [10, 20, 40, 80]) == pytest.approx(1)
    assert learn.spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert learn.spearman([1, 1, 2], [1, 2, 3]) == pytest.approx(0.8660254)  # ranks 1/2, 1/2, 2 against 0, 1, 2
    assert learn.spearman([1, 1, 1], [1, 2, 3]) == 0


def test_correlations_are_those_of_our_runs(capsys):
    values = {name: 1.0 for name in learn.QUALITY} | {"loss_per_ln_k": 0.5}
    rows = [{"set": "a", "knn": i, **values, "lidar": i**2, "rankme": -i} for i in (1, 2, 3)]
    learn.print_correlations([*rows, {"set": "a", "knn": 99}, {"set": "b", "knn": 1, **values}])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["rank", "a", "mean"]  # b has a single run
    assert [float(cell) for cell in lines[2].split()[1:]] == [3, 0, -1, 1, 0, 0, 0]


def test_the_chart_is_drawn_where_matplotlib_is_installed(tmp_path):
    pytest.importorskip("matplotlib")
    baseline = {"knn": {"top1": 30.0}, "linear": {"top1": 20.0}}
    rows = [{"set": name, "method": method, "seed": 1, "knn": 50.0, "accuracies": {"raw pixels": baseline}}
            for name in ("a", "b") for method in ("derived", "with labels")]  # fmt: skip
    learn.draw(rows, tmp_path / "learn.png")
    assert Image.open(tmp_path / "learn.png").size[0] > 500


def test_options_of_learn():
    args = parse_args(["learn", "--sets", "shapes", "--settings", "no blur", "--peers"])
    assert args.peers == [] and args.settings == ["no blur"] and set(BENCHMARKS["learn"].options) <= vars(args).keys()
    assert learn.SETS.keys() >= {"imagenette64", "imagenette64_4000", "imagenette64_1000", "cifar10", "cifar10_4000"}
    assert {"crops from 0.14", "jitter 1", "no greyscale"} <= SETTINGS.keys()
