"""bench.py end to end on tiny sizes. Nothing here looks at how long anything took."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bench

HOUSE = Path(__file__).resolve().parent.parent


def test_tables_and_figures_of_tiny_sizes(tmp_path):
    command = [sys.executable, "bench.py", "sinkhorn", "loss", "--device", "cpu", "--json", str(tmp_path / "b.json")]
    command += ["--batch_size", "3", "5", "--nmb_prototypes", "7", "--repetitions", "2"]
    result = subprocess.run(command, cwd=HOUSE, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "b.json").read_text())
    assert figures["machine"]["torch"] == torch.__version__ and figures["machine"]["sinkhorn_ext"] in ("cpp", "torch")
    for name, floors in (("sinkhorn", {"read", "read+write", "read+exp+write", "new"}), ("loss", {"read+write"})):
        rows = figures[name]
        assert [(row["B"], row["K"]) for row in rows] == [(3, 7), (5, 7)]
        for row in rows:
            assert row["median_ms"].keys() >= {"published", "fallback", "ours"} | floors
            for candidate, median in row["median_ms"].items():
                low, _, high = row["quartiles_ms"][candidate]
                assert 0 < low <= high and median > 0
            ratio = row["median_ms"]["published"] / row["median_ms"]["ours"]
            assert row["ratios"]["published/ours"] == pytest.approx(ratio)
            assert f"{ratio:.2f}" in result.stdout
    assert sys.platform != "linux" or figures["loss"][0]["peak_bytes"]["scores"] == 8 * 3 * 7 * 4


def test_peers_compute_the_same():
    scores = bench.cosines(1, 20, 30, torch.device("cpu"))[0]
    out = torch.empty_like(scores)
    bench.fallback_sinkhorn(scores, out)
    torch.testing.assert_close(out, bench.published_sinkhorn(scores))
    scores = bench.cosines(8, 6, 30, torch.device("cpu")).requires_grad_()
    potentials = bench.sinkhorn_potentials(scores.detach()[:2])
    published = bench.published_loss(scores, potentials)
    torch.testing.assert_close(published, bench.batched_loss(scores, potentials))
    torch.testing.assert_close(published, bench.swav_loss(scores, potentials))
    (grad,) = torch.autograd.grad(published, scores)
    torch.testing.assert_close(bench.fallback_loss(scores.detach(), potentials), grad)


@pytest.mark.parametrize(
    "options, name",
    [
        (["speed"], "what"),
        ([], "what"),
        (["loss", "--repetitions", "0"], "--repetitions: expected 1 or more, got 0"),
        (["loss", "--batch_size", "4", "-1"], "--batch_size: expected 1 or more"),
        (["loss", "--device", "abacus"], "--device abacus: expected a device that is here"),
    ],
)
def test_bad_options_are_named(options, name, capsys):
    with pytest.raises(SystemExit):
        bench.parse_args(options)
    assert name in capsys.readouterr().err
