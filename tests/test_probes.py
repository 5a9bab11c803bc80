"""probes.py: what trains on labels learns, resumes bit for bit, and is the same in one process and in many."""

import copy

import numpy as np
import pytest
import torch
from conftest import assert_same, run_processes
from torch import nn

import probes
from data import CentreCrop, ProbeCrop
from features import extract_features
from images import ImageArrays
from launch import RunStopped
from model import ResNet
from probes import Progress, decay_factor, fine_tune, fine_tuning_defaults, linear_probe

CPU = torch.device("cpu")


def squares(count: int) -> ImageArrays:
    """Noise with a bright square in one of two colours, which is the class."""
    rng, labels = np.random.default_rng(0), np.arange(count) % 2
    pixels = rng.integers(0, 100, (count, 16, 16, 3), dtype=np.uint8)
    for image, label in zip(pixels, labels, strict=True):
        image[4:12, 4:12, label] = 250
    return ImageArrays(pixels, labels, ["red", "green"])


def backbone() -> ResNet:
    torch.manual_seed(0)
    return ResNet("resnet18", width=8, blocks=(1, 1, 1, 1), stem="small").eval()


def probe(epochs=4, progress=None, rates=((0.3, 1e-6),), network=None):
    network, images = network or backbone(), squares(24)
    validation = extract_features(network, images, CentreCrop(16, 16), CPU, "", batch_size=8)
    options = dict(classes=2, epochs=epochs, batch_size=8, rates=rates, seed=1, progress=progress)
    return linear_probe(network, images, ProbeCrop(16), validation, CPU, **options)


def tune(epochs=4, progress=None, **options):
    images, crops = squares(24), (ProbeCrop(16), CentreCrop(16, 16))
    options = dict(classes=2, epochs=epochs, batch_size=8, seed=1, progress=progress) | options
    return fine_tune(backbone(), images, images, *crops, CPU, **options)


@pytest.mark.parametrize("train", [probe, tune])
def test_an_interrupted_training_resumes_bit_for_bit(train, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(probes, "VALIDATE_EVERY", 2)
    network, fitted = train()
    assert list(fitted["history"]) == [2, 4]
    path, save = tmp_path / "a.unfinished", Progress.save

    def save_and_stop(self, state):
        save(self, state)
        if state["epoch"] == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            train(progress=Progress(path, {"lr": 1}))
    resumed, again = train(progress=Progress(path, {"lr": 1}))
    assert "resuming after epoch 3/4" in capsys.readouterr().out
    assert_same(dict(resumed.state_dict()), dict(network.state_dict()))
    assert_same(again, fitted)
    finished, again = train(progress=Progress(path, {"lr": 1}))  # trained, but what came after was interrupted
    assert "resuming after epoch 4/4" in capsys.readouterr().out
    assert_same(again, fitted)
    Progress(path).remove()
    assert not path.exists()


def test_batches_have_256_images_unless_said_otherwise(monkeypatch):
    sizes, loader = [], probes.training_loader

    def loader_of(images, transform, batch_size, **options):
        sizes.append(batch_size)
        return loader(images, transform, batch_size, **options)

    monkeypatch.setattr(probes, "training_loader", loader_of)
    images, crops, validation = squares(300), (ProbeCrop(16), CentreCrop(16, 16)), (torch.zeros(2, 64), torch.zeros(2))
    linear_probe(backbone(), images, crops[0], validation, CPU, classes=2, epochs=1)
    fine_tune(backbone(), images, images, *crops, CPU, classes=2, epochs=1)
    assert sizes == [256, 256]


def test_other_settings_or_a_damaged_file_start_anew_and_say_so(tmp_path, capsys):
    path = tmp_path / "a.unfinished"
    _, fitted = probe()
    probe(progress=Progress(path, {"lr": 1, "labels": None}))
    _, again = probe(progress=Progress(path, {"lr": 2, "labels": None}))
    assert "not resumed, starting anew, as it has other settings: lr 1, now 2\n" in capsys.readouterr().out
    assert_same(again, fitted)
    path.write_bytes(b"half")
    _, again = probe(progress=Progress(path, {"lr": 2}))
    assert f"{path}: not resumed, starting anew: checkpoint: cannot read" in capsys.readouterr().out
    assert_same(again, fitted)


def test_a_state_that_cannot_be_written_is_said_once(tmp_path, capsys):
    probe(progress=Progress(tmp_path / "none" / "a.unfinished", {}))
    assert capsys.readouterr().out.count("cannot be written (No such file or directory)") == 1


def test_many_probes_at_once_are_those_trained_alone():
    rates, calls = [(0.3, 1e-6), (0.01, 1e-2), (1e38, 0)], []
    network = backbone()
    network.register_forward_hook(lambda *_: calls.append(1))
    heads, fitted = probe(rates=rates, network=network)
    assert len(calls) == 3 + 4 * 3  # validation, then once for each step
    for i, rate in enumerate(rates[:2]):
        alone, fitted_alone = probe(rates=[rate])
        for ours, theirs in zip(heads.heads[i].parameters(), alone.heads[0].parameters(), strict=True):
            torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(fitted["scores"][i], fitted_alone["scores"][0])
    assert not heads.heads[2].weight.isfinite().all() and fitted["history"][4][2] == 0  # it does not stop the others


@pytest.mark.parametrize("train", [lambda: probe(rates=[(1e38, 0)]), lambda: tune(lr_last_layer=1e38)])
def test_a_loss_that_is_not_finite_stops(train):
    with pytest.raises(RunStopped, match="the loss is nan in epoch .; try a lower --lr") as stopped:
        train()
    assert stopped.value.code == 4


def test_fine_tuning_trains_everything_and_learns():
    before = copy.deepcopy(backbone().state_dict())
    network, fitted = tune(epochs=12, lr=0.05)
    after = network.backbone.state_dict()
    assert all(not torch.equal(before[name], after[name]) for name in before)  # BatchNorm's statistics too
    assert fitted["history"][12] == [100.0]
    frozen, _ = tune(epochs=1, lr=1e-30, lr_last_layer=0.2)
    torch.testing.assert_close(dict(frozen.backbone.named_parameters()), dict(backbone().named_parameters()))
    assert frozen.heads.heads[0].weight.abs().max() > 0.05


def test_rates_fall_as_published():
    factors = [decay_factor(epoch, 20) for epoch in range(20)]
    assert factors == pytest.approx([1] * 12 + [0.2] * 4 + [0.04] * 4)


@pytest.mark.parametrize(
    ("images", "given", "expected"),
    [
        (128_116, (None, None), (20, 256, 0.01, 0.2)),
        (12_811, (None, None), (20, 256, 0.01, 0.2)),  # 1 % of ImageNet: 1,000 steps
        (1_281_167, (None, None), (20, 256, 0.01, 0.2)),
        (500, (None, None), (63, 31, 0.00348, 0.0696)),
        (100, (None, None), (167, 16, 0.0025, 0.05)),
        (3, (None, None), (1000, 3, 0.00108, 0.0217)),
        (500, (5, 250), (5, 250, 0.00988, 0.198)),
    ],
)
def test_few_labels_get_enough_steps(images, given, expected):
    assert fine_tuning_defaults(images, *given) == expected


def test_networks_with_few_channels_train_in_the_safe_layout():
    assert probes.memory_layout(nn.Conv2d(3, 4, 3), CPU) == torch.contiguous_format
    assert probes.memory_layout(nn.Conv2d(3, 16, 3), CPU) == torch.channels_last


def trained_by(rank, world_size):
    images = squares(24)
    sharing = dict(rank=rank, world_size=world_size, batch_size=8 // world_size, classes=2, epochs=2, seed=1)
    network = backbone()
    share = dict(rank=rank, world_size=world_size)
    validation = extract_features(network, images, CentreCrop(16, 16), CPU, "", batch_size=4, **share)
    rates = [(0.3, 1e-6), (0.1, 0)]
    heads, fitted = linear_probe(network, images, ProbeCrop(16), validation, CPU, rates=rates, **sharing)
    tuned, refitted = fine_tune(network, images, images, ProbeCrop(16), CentreCrop(16, 16), CPU, **sharing)
    scores = {"probe": fitted["scores"], "tuned": refitted["scores"]}
    return scores | {"heads": dict(heads.state_dict()), "network": dict(tuned.state_dict())}


def test_two_processes_train_as_one():
    one = trained_by(0, 1)
    for result in run_processes(trained_by, 2):
        torch.testing.assert_close(result, one, rtol=1e-3, atol=1e-4)
