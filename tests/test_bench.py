"""Run each benchmark end to end on tiny sizes. No test asserts a time."""

import json
import multiprocessing
import os
import shlex
import sys
from functools import partial

import pytest
import torch
import torch.multiprocessing as mp
from conftest import DEVICES, FORKED, forked
from torch import nn

import bench.memory
import bench.step
from bench import published
from bench.__main__ import BENCHMARKS, describe_benchmarks, main, parse_args
from bench.loss import compiled_loss, loss_candidates, relative_candidates
from bench.pipeline import write_photos
from bench.scaling import collectives, traffic
from bench.sinkhorn import fallback_sinkhorn, random_scores
from bench.step import PARTS, lars_candidates
from data import MultiCrop
from launch import UserError
from model import SwAV
from optim import LARS
from sinkhorn_ext import sinkhorn_potentials, swav_loss


@pytest.fixture
def figures_of(tmp_path, monkeypatch, capfd):
    """Run benchmarks as `python -m bench` does, with processes forked. Return their figures and what they print."""
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: FORKED)
    monkeypatch.setattr(mp, "spawn", lambda *words, **options: start(*words, **options, start_method="forkserver"))
    start = mp.start_processes

    def run(*words, device="cpu"):
        options = ["--device", device, "--threads", "1", "--json", str(tmp_path / "b.json"), "--repetitions", "2"]
        main(parse_args([*words, *options]))
        return json.loads((tmp_path / "b.json").read_text()), capfd.readouterr().out

    return run


def check_row(row, ratios, images=None):
    """Check that ratios are quotients of medians, and that images/s follow from the medians."""
    medians = row["median_ms"]
    assert row["ratios"] == {f"{a}/{b}": pytest.approx(medians[a] / medians[b]) for a, b in ratios}
    if images is not None:
        assert row["images_per_s"] == {name: pytest.approx(1e3 * images / ms) for name, ms in medians.items()}


@pytest.fixture
def compile_quickly(monkeypatch):
    """Let torch.compile trace functions, but generate no code."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


def test_tables_and_figures_of_tiny_sizes(figures_of, compile_quickly):
    figures, out = figures_of("sinkhorn", "loss", "--batch_size", "3", "5", "--nmb_prototypes", "7")
    assert figures["machine"]["torch"] == torch.__version__ and figures["machine"]["sinkhorn_ext"] in ("cpp", "torch")
    relative = [row["relative"] for row in figures["loss"]]
    of_loss, of_sinkhorn = {"fallback", "batched", "read+write"}, {"fallback", "new", "read+write", "exp"}
    for rows, others in ((figures["sinkhorn"], of_sinkhorn), (figures["loss"], of_loss), (relative, {"read+write"})):
        assert [(row["B"], row["K"]) for row in rows] == [(3, 7), (5, 7)]
        for row in rows:
            assert row["median_ms"].keys() == {"published", "compiled", "ours"} | others
            for candidate, median in row["median_ms"].items():
                low, middle, high = row["quartiles_ms"][candidate]  # of two times: low may be below 0
                assert low <= middle <= high and middle == pytest.approx(median) and median > 0
            for peer in ("published", "compiled"):
                ratio = row["median_ms"][peer] / row["median_ms"]["ours"]
                assert row["ratios"][f"{peer}/ours"] == pytest.approx(ratio)
                assert f"{ratio:.2f}" in out
    assert max(len(line) for line in out.splitlines() if not line.startswith("all figures: ")) < 165
    assert sys.platform != "linux" or figures["loss"][0]["peak_bytes"]["scores"] == 8 * 3 * 7 * 4


def test_without_torch_compile_a_line_says_so_and_the_column_is_left_out(figures_of, monkeypatch):
    def broken(graph, example_inputs):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=broken))
    figures, out = figures_of("sinkhorn", "--batch_size", "3", "--nmb_prototypes", "7")
    (row,) = figures["sinkhorn"]
    assert "compiled" not in row["median_ms"] and row["ratios"].keys() == {"published/ours", "ours/exp"}
    (line,) = [line for line in out.splitlines() if "no column" in line]
    assert "torch.compile does not work here" in line and "no compiler here" in line


# Whole training processes take as long as all else here: once, with compiled kernels, is enough.
with_kernels = pytest.mark.skipif(os.environ.get("SINKHORN_EXT") == "torch", reason="runs only with compiled kernels")


@with_kernels
@pytest.mark.parametrize("device", DEVICES)
def test_pipeline_of_tiny_sizes(device, figures_of):
    words = ["pipeline", "--images", "2", "--size_crops", "16", "8", "--nmb_crops", "2", "1", "--batch_size", "4"]
    figures, out = figures_of(*words, device=device)
    crops, (augment,) = figures["pipeline"]["crops"], figures["pipeline"]["augment"]
    assert [(row["width"], row["height"]) for row in crops] == [(500, 375), (160, 120)]
    assert 100e3 < crops[0]["file_bytes"] < 120e3 and crops[1]["file_bytes"] < 20e3
    for row in crops:
        check_row(row, [("published", "workers"), ("published", "device"), ("device", "decode")], images=1)
    check_row(augment, [("augment", "read+write")], images=4)
    assert augment["B"] == 4 and "2x16 + 1x8" in out


@with_kernels
@pytest.mark.parametrize("device", DEVICES)
def test_step_of_tiny_sizes(device, figures_of, monkeypatch):
    monkeypatch.setattr(bench.step, "SwAV", lambda arch: SwAV(arch, width=4))  # whose parameters LARS is timed on
    words = ["step", "--images", "2", "--size_crops", "16", "8", "--nmb_crops", "2", "1", "--steps", "1"]
    words += ["--batch_size", "4", "--nmb_prototypes", "7", "--compile", "off"]
    figures, out = figures_of(*words, device=device)
    (row,), (lars,) = figures["step"]["steps"], figures["step"]["lars"]
    assert (row["B"], row["K"]) == (4, 7)
    check_row(row, [("published", "ours")], images=4)
    check_row(lars, [("published", "ours"), ("ours", "fused SGD")])
    check_row(figures["step"]["small maps"][0], [("torch's", "ours")], images=16)
    assert lars["params"] == len(list(SwAV("resnet50").parameters()))
    for program in ("published", "ours"):
        parts = row["parts_ms"][program]
        assert tuple(parts) == PARTS
        absent = {"all-reduce"} | ({"augment", "guard"} if program == "published" else set())
        assert {part for part in PARTS if parts[part] == 0} == absent
    assert all(part in out for part in PARTS)


@with_kernels
@pytest.mark.parametrize("device", DEVICES)
def test_memory_of_tiny_sizes(device, figures_of, monkeypatch):
    monkeypatch.setattr(bench.memory, "ARCH", "resnet18")
    monkeypatch.setattr(bench.memory, "PARTS", (2,))
    words = "memory --size_crops 32 16 --nmb_crops 2 1 --batch_size 8 --nmb_prototypes 7".split()
    figures, out = figures_of(*words, device=device)
    names = ["N=2", "N=2, checkpoints"]
    counted, (measured,) = figures["memory"]["counted"], figures["memory"]["measured"]
    assert [row["setting"] for row in counted] == names and all(name in out for name in names)
    for row in counted:
        assert row["total"] == sum(row[part] for part in ("crops", "model", "augment", "rest"))
        assert row["crops"] == 8 * 3 * (2 * 32**2 + 16**2) * 4
    check_row(measured, [(names[1], names[0])])
    assert measured["peak_bytes"].keys() == set(names)


def test_parts_and_checkpoints_need_less_memory():
    settings = (1, False), (4, False), (1, True)
    whole, in_parts, recomputed = (
        bench.memory.count_step(bench.memory.Setting("resnet18", (64, 64), 128, 7, *setting))["rest"]
        for setting in settings
    )
    assert in_parts < whole / 2 and recomputed < 0.8 * whole


@with_kernels
def test_scaling_of_tiny_sizes(figures_of):
    words = ["scaling", "--size_crops", "16", "8", "--steps", "1", "--processes", "1", "2", "--nmb_small_crops", "0"]
    figures, out = figures_of(*words, "--batch_size", "4", "--nmb_prototypes", "7", "--step_ms", "180")
    rows, computed = figures["scaling"]["measured"], figures["scaling"]["computed"]
    assert [(row["W"], row["K"], row["small"], row["B"]) for row in rows] == [(1, 7, 0, 4), (2, 7, 0, 4)]
    for row in rows:
        check_row(row, [("step", "base")])
        assert row["median_ms"]["base"] == rows[0]["median_ms"]["step"]
        assert row["median_ms"].keys() == {"step", "base", *row["bytes_sent"]} and row["collectives"]["codes"] == 3
        assert row["efficiency"] == pytest.approx(row["median_ms"]["base"] / row["median_ms"]["step"])
        assert row["images_per_s"]["step"] == pytest.approx(1e3 * 4 * row["W"] / row["median_ms"]["step"])
    model = SwAV("resnet18", nmb_prototypes=7)
    parameters = sum(p.numel() for p in model.parameters())
    channels = sum(m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d))
    assert set(rows[0]["bytes_sent"].values()) == {0}
    # Each of two processes sends a half of a sum twice, and what is gathered once.
    expected = {"gradients": 4 * parameters, "BN forward": 8 * 2 * channels, "BN backward": 4 * 2 * channels}
    norms = sum(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) for m in model.modules())
    expected |= {"codes": 3 * 2 * 4 * 7, "means": 8 * (2 * 7 + 2), "buffers": 4 * 2 * channels + 8 * norms}
    assert rows[1]["bytes_sent"] == expected
    assert [row["GPUs"] for row in computed] == [8, 64, 512]
    for row in computed:
        ms = [row[f"{name}_ms"] for name in ("gradients", "BN forward", "BN backward", "codes", "means", "buffers")]
        assert row["exposed_ms"] == pytest.approx(sum(ms) - min(ms[0], 120))
        assert row["efficiency"] == pytest.approx(180 / (180 + row["exposed_ms"]))
    lines = out[out.index("computed") :].splitlines()
    assert len(lines) == 8 and all("computed" in line for line in lines[:-1])


def test_traffic_of_a_ring():
    model = SwAV("resnet18", hidden_mlp=16, feat_dim=8, nmb_prototypes=30, width=8, blocks=[1, 1, 1, 1])
    sent = traffic(collectives(model, resolutions=2), 4)
    assert sent["gradients"] == (2 * 3 / 4 * 4 * sum(p.numel() for p in model.parameters()), 1)
    assert sent["codes"] == ((3 + 2 * 2 * 3 / 4) * 2 * 30 * 4, 3)
    # The stem and two or three layers in each of four stages, for two resolutions; one layer in the head.
    widths = 2 * (3 * [8] + 3 * [16] + 3 * [32] + 3 * [64]) + [16]
    assert sent["BN forward"] == (8 * 1.5 * 2 * sum(widths), len(widths))
    assert sent["BN backward"] == (4 * 1.5 * 2 * sum(widths), len(widths))
    assert {size for size, _ in traffic(collectives(model, resolutions=2), 1).values()} == {0}


def test_published_lars_computes_our_weights():
    torch.manual_seed(0)
    start = [torch.randn(5, 3), torch.zeros(4), torch.randn(7)]
    theirs, ours = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    reference = published.LARS(theirs)
    optimizer = LARS(ours, published.LEARNING_RATE, weight_decay=published.WEIGHT_DECAY)
    for step in range(3):
        for a, b in zip(theirs, ours, strict=True):
            gradient = torch.randn(a.shape) * (step != 1)  # a norm of zero once
            a.grad, b.grad = gradient.clone(), gradient.clone()
        reference.step()
        optimizer.step()
    for p, a, b in zip(start, theirs, ours, strict=True):
        assert not torch.equal(p, b)
        torch.testing.assert_close(a, b)
    lars_candidates([p.shape for p in start], torch.device("cpu"))  # checks the same


def test_published_crops(tmp_path):
    write_photos(tmp_path, 2, 40, 30)
    paths = sorted(str(path) for path in tmp_path.iterdir())
    crops = published.Crops(paths, MultiCrop([16, 8], [2, 1], *published.SCALES))
    assert len(crops) == 2
    assert [tuple(crop.shape) for crop in crops[0]] == [(3, 16, 16), (3, 16, 16), (3, 8, 8)]
    assert not torch.equal(crops[0][0], crops[0][1])


def test_all_candidates_compute_the_same(compile_quickly):
    scores = random_scores(1, 20, 30, torch.device("cpu"))[0]
    out = torch.empty_like(scores)
    fallback_sinkhorn(scores, out)
    torch.testing.assert_close(out, published.sinkhorn(scores))
    scores = random_scores(8, 6, 30, torch.device("cpu")).requires_grad_()
    potentials = sinkhorn_potentials(scores.detach()[:2])
    loss = published.loss(scores, potentials)
    torch.testing.assert_close(loss, published.batched_loss(scores, potentials))
    torch.testing.assert_close(loss, swav_loss(scores, potentials))
    (grad,) = torch.autograd.grad(loss, scores)
    for name, candidate in (loss_candidates(scores.detach()) | compiled_loss(scores.detach())).items():
        if name != "read+write":
            torch.testing.assert_close(candidate(), grad)
    relative = relative_candidates(scores.detach())
    for name in ("compiled", "ours"):
        torch.testing.assert_close(relative[name](), relative["published"]())
    codes = [published.sinkhorn(crop_scores) for crop_scores in scores[:2].detach()]
    torch.testing.assert_close(published.swapped_loss(scores, codes), loss)


@pytest.mark.parametrize(
    "options, message",
    [
        (["speed"], "NAME: invalid choice: 'speed'"),
        ([], "the following arguments are required: NAME"),
        (["loss", "--repetitions", "1"], "--repetitions: expected 2 or more, got 1"),
        (["loss", "--batch_size", "4", "-1"], "--batch_size: expected 1 or more"),
        (["loss", "--device", "abacus"], "--device abacus: expected a device of this machine"),
        (["pipeline", "--size_crops", "16", "6"], "--size_crops: expected 7 or more, got [16, 6]"),
        (["step", "--nmb_crops", "1", "6"], "--nmb_crops: expected 2 or more large ones, got 1"),
        (["step", "--steps", "0"], "--steps: expected 1 or more, got 0"),
        (["scaling", "--nmb_small_crops", "2", "-1"], "--nmb_small_crops: expected 0 or more, got [2, -1]"),
        (["scaling", "--step_ms", "nan"], "--step_ms: expected a number above 0, got nan"),
        (["collapse", "--sets", "shapes", "cats"], "--sets: expected one of shapes, shapes_128, "),
        (["collapse", "--settings", "K 31"], "got K 31"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(UserError) as error:
        parse_args(options)
    assert message in str(error.value)


def test_a_bad_option_ends_the_command_with_one_line():
    result = forked("-m", "bench", "loss", "--repetitions", "0")
    assert result.returncode == 2
    assert result.stderr == "error: --repetitions: expected 2 or more, got 0\n" and not result.stdout


def test_help_shows_each_benchmark_with_an_example_that_parses(capsys, monkeypatch):
    monkeypatch.setattr("bench.__main__.check_sets", lambda *_: None)  # photographs lie elsewhere
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    out = capsys.readouterr().out
    assert describe_benchmarks() in out and len(out.splitlines()) < 50
    for name, benchmark in BENCHMARKS.items():
        words = shlex.split(benchmark.example)
        assert f"python -m bench {benchmark.example}\n" in out and words[0] == name
        assert vars(parse_args(words)).keys() >= set(benchmark.options)
