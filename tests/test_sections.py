"""sections.py: what each section says of a run with known rows, images and prototypes."""

import json
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch

import page
import sections
from images import ImageArrays
from run_folder import start_of_process
from sections import Run, Seen

pytest.importorskip("matplotlib")

OPTIONS = {
    "dataset": "folder", "data_path": "/photos/<b>", "epochs": 4, "arch": "resnet18", "nmb_prototypes": 4,
    "nmb_crops": [2, 3], "size_crops": [16, 8], "min_scale_crops": [0.4, 0.1], "max_scale_crops": [1.0, 0.4],
    "blur_sigma": 0.5, "hflip": 0.5, "vflip": 0.0, "color_strength": 1.0, "grayscale": 0.2, "seed": 1,
    "relative_epsilon": "on", "epsilon": 0.3, "queue_length": 0, "base_lr": 0.6, "final_lr": 0.0, "start_warmup": 0.0,
}  # fmt: skip


def new_run(folder: Path, rows=(), codes=(), epoch: int = 4, **facts) -> Run:
    contents = {"options": OPTIONS, "epoch": epoch, "step": 10 * epoch, "images": {"images": 8, "paths": ""}}
    return Run(folder, folder / "checkpoint.pth", contents, facts, list(rows), list(codes))


def epoch_row(epoch: int, **more) -> dict:
    return {"epoch": epoch, "step": 10 * epoch, "epoch_loss": 1.0, "ln_k": 1.386, "epoch_seconds": 60.0, **more}


def new_seen(features=None, certainties=None, classes=None, prototypes=None) -> Seen:
    """Eight images: two of each of four prototypes."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(8, 6, generator=generator) if features is None else features
    certainties = torch.full((8, 4), 0.1) if certainties is None else certainties
    certainties[range(8), [0, 0, 1, 1, 2, 2, 3, 3]] = 0.7
    pixels = torch.randint(256, (8, 16, 16, 3), generator=generator, dtype=torch.uint8).numpy()
    names = [f"a/{i}.png" for i in range(8)]
    prototypes = torch.eye(4, 5) if prototypes is None else prototypes
    return Seen(list(range(8)), names, classes or [None] * 8, pixels, features, certainties, prototypes)


def test_the_run_is_described_and_its_options_have_reasons(tmp_path):
    rows = [epoch_row(1), epoch_row(2, knn=61.2, lidar=7.0)]
    reasons = {"epsilon": {"value": 0.3, "reason": "small & safe"}}
    text = sections.about(
        new_run(tmp_path, rows, epoch=2, host="h", options=reasons), "a note", ["Odd: 3 files. Look."]
    )
    for part in ("stopped: 2 of 4 epochs", "/photos/&lt;b&gt;, 8 images", "2 of 16 x 16 pixels, 3 of 8 x 8 pixels",
                 "kNN 61.2 %; LiDAR 7.0",
                 "loss 1.000 (72% of ln K)", "0:02:00 for 2 epochs", "--epsilon", "small &amp; safe", "a note",
                 "<li>Odd: 3 files</li>"):  # fmt: skip
        assert part in text
    assert "run.json is missing" not in text and "kept epochs: none; measured: 2." in text
    without = sections.about(new_run(tmp_path), "", [])
    assert "run.json is missing" in without and "finished: 4 of 4" in without and "Warnings" not in without


def test_figures_of_earlier_epochs_name_them(tmp_path):
    text = sections.about(new_run(tmp_path, [epoch_row(1, knn=61.2), epoch_row(2, lidar=7.0)]), "", [])
    assert "kNN 61.2 % (epoch 1); LiDAR 7.0<" in text


def test_a_run_that_trains_is_said_to_train(tmp_path):
    holder = {"host": socket.gethostname(), "pid": os.getppid(), "started": start_of_process(os.getppid())}
    (tmp_path / "run.lock").write_text(json.dumps(holder))
    assert "training now: 4 of 4" in sections.about(new_run(tmp_path), "", [])


@pytest.mark.parametrize("key, name, values", [("knn", "kNN", [50.0, 60.0, 40.0]), ("lidar", "LiDAR", [5.0, 9.0, 4.0])])
def test_the_best_kept_checkpoint_is_named(key, name, values, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    for epoch in (1, 2, 3):
        (tmp_path / "checkpoints" / f"ckp-{epoch}.pth").touch()
    run = new_run(tmp_path, [epoch_row(i, **{key: value}) for i, value in enumerate(values, 1)])
    text = sections.best_checkpoint(run)
    assert text.startswith("Not the last one") and f"{tmp_path}/checkpoints/ckp-2.pth" in text and name in text
    rising = new_run(tmp_path, [epoch_row(i, **{key: value}) for i, value in enumerate(sorted(values), 1)])
    assert sections.best_checkpoint(rising).startswith("The last one: of the kept epochs 1, 2, 3")
    assert ("not reliable" in sections.best_checkpoint(rising)) == (key == "lidar")


def test_curves_name_what_is_there_and_what_is_missing(tmp_path):
    step = {"epoch": 2, "step": 15, "loss": 1.38, "ln_k": 1.386, "lr": 0.1, "collapsing": True, "loss_per_ln_k": 0.996,
            "code_entropy": 0.99, "prototypes_in_use": 0.5, "embedding_std": 0.02, "distinct_codes": 0.5}  # fmt: skip
    rows = [{**step, "step": 1, "epoch": 1, "collapsing": False}, epoch_row(1), step, epoch_row(2, trivial_r2=0.9)]
    text = sections.curves(new_run(tmp_path, rows))
    assert "Loss over the epochs" in text and "loss from 1.38 to 1.38" in text
    assert "Not measured in this run: Codes changed, Dimensions in use, kNN." in text
    assert "1, after 1.5 epochs: collapsing: the loss is 0.996 ln K" in text
    assert "2, after 2 epochs: slow: after epoch 2 colour and brightness explain 90%" in text
    empty = sections.curves(new_run(tmp_path))
    assert "metrics.jsonl is missing or empty: Loss" in empty and "<img" not in empty


def test_epochs_of_rows_where_a_run_was_resumed_with_another_batch(tmp_path):
    rows = [
        {"epoch": 1, "step": 5},
        epoch_row(1),
        epoch_row(2),
        {"epoch": 3, "step": 42},
    ]  # 20 in epoch 3
    run = new_run(tmp_path, rows)
    run.contents["options"] = {**OPTIONS, "global_batch_size": 2}
    run.contents["images"]["images"] = 41
    assert run.epochs() == pytest.approx([0.5, 1, 2, 2.1])


def test_crops_are_those_of_the_first_epoch(tmp_path):
    from data import CroppedBatches, MultiCrop, augment, by_name, to_uint8

    pixels = np.random.default_rng(0).integers(256, size=(8, 30, 40, 3), dtype=np.uint8)
    images, shown = ImageArrays(pixels, np.zeros(8)), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "thumbnail", lambda pixels, alt, caption, *_: shown.append((pixels, alt, caption)) or "")
        sections.crops(new_run(tmp_path), images, [3, 5])
    assert [alt for _, alt, _ in shown[:3]] == ["image 3 with the boxes of its crops", "crop 1 of image 3",
                                                "crop 2 of image 3"]  # fmt: skip
    assert len(shown) == 2 * (1 + 5) and shown[0][0].shape == (168, 224, 3)
    multi_crop = MultiCrop([16, 8], [2, 3], [0.4, 0.1], [1.0, 0.4], 0.5)
    batch, _ = CroppedBatches(images, multi_crop, seed=1).__getitems__([(0, 3)])
    trained_on = [
        (crop, param)
        for crops, params in batch
        for crop, param in zip(to_uint8(augment(crops[:, 0], params[:, 0])), params[:, 0], strict=True)
    ]
    for (crop, param), (drawn, _, caption) in zip(trained_on, shown[1:6], strict=True):
        assert np.array_equal(crop.permute(1, 2, 0).numpy(), drawn)
        assert ("flip" in caption, "grey" in caption) == (bool(by_name(param).hflip), bool(by_name(param).grey))


def test_prototypes_are_shown_with_their_images_and_labels():
    classes = ["<cat>"] * 4 + ["dog"] * 4
    text = sections.prototypes(new_seen(classes=classes))
    assert [f"#{p}, 2 images: 100% " in text for p in range(5)] == [True] * 4 + [False]
    assert "&lt;cat&gt;" in text and "4 of 4 prototypes are unique" in text
    assert "same label in 100% of pairs, any two images in 43%" in text
    assert "prototype 0: a/0.png, labelled &lt;cat&gt;" in text
    unlabelled = sections.prototypes(new_seen(prototypes=torch.eye(4, 5)[[0, 0, 1, 2]]))
    assert "3 of 4 prototypes are unique" in unlabelled and "labels" not in unlabelled and "purity" not in unlabelled


def test_purity_of_pairs_is_that_of_chance_for_random_prototypes():
    generator = torch.Generator().manual_seed(0)
    seen = new_seen()._replace(classes=[str(i % 4) for i in range(4000)])
    within, any_two = sections.pair_purity(seen, torch.randint(1500, (4000,), generator=generator))
    assert within == pytest.approx(0.25, abs=0.03) and any_two == pytest.approx(0.25, abs=0.01)
    assert sections.pair_purity(seen, torch.arange(4000)) is None


def test_prototypes_are_sorted_by_similarity():
    angles = torch.tensor([0.0, 2.0, 0.5, 1.5, 1.0])
    assert sections.by_similarity(torch.stack([angles.cos(), angles.sin()], 1)) == [0, 2, 4, 3, 1]


def test_balance_counts_first_choices():
    text = sections.balance(new_seen())
    assert "4 of 4 prototypes are the first choice" in text and "Effective number in use: 4," in text
    certainties = torch.zeros(8, 50)
    certainties[:, 7] = 1
    text = sections.balance(new_seen()._replace(certainties=certainties, prototypes=torch.eye(50)))
    assert "1 of 50 prototypes are the first choice of some image, the most used one of 8" in text
    assert "in use: 1," in text


def test_neighbours_are_the_nearest_by_cosine():
    features = torch.eye(4).repeat_interleave(2, 0) + 0.1 * torch.rand(8, 4, generator=torch.Generator().manual_seed(0))
    text = sections.neighbours(new_seen(features=features * torch.arange(1, 9).view(8, 1), classes=list("aabbccdd")))
    rows = text.split('<div class="strip"')[1:]
    for i, row in enumerate(rows):
        assert row.split('alt="')[1].startswith(f"query: a/{i}.png")
        assert row.split('alt="')[2].startswith(f"neighbour of a/{i}.png: a/{i ^ 1}.png")
    assert len(rows) == 8 and "same label for 100% of all images" in text


@pytest.mark.parametrize("has_sklearn", [True, False])
def test_a_map_is_drawn_with_and_without_scikit_learn(has_sklearn, monkeypatch):
    if has_sklearn:
        pytest.importorskip("sklearn")
    monkeypatch.setattr(sections, "find_spec", lambda name: has_sklearn or None)
    generator = torch.Generator().manual_seed(0)
    more = dict(features=torch.randn(40, 6, generator=generator), classes=["a", "b"] * 20, names=["x"] * 40)
    seen = new_seen()._replace(pixels=np.zeros((40, 8, 8, 3), np.uint8), **more)
    text = sections.feature_map(seen)
    assert ("images by t-SNE:" in text) == has_sklearn and ("principal components" in text) != has_sklearn
    assert text.count("<img") == 2 and sections.feature_map(seen._replace(classes=[None] * 40)).count("<img") == 1
    assert "<img" in sections.feature_map(new_seen(features=torch.ones(8, 1)))  # all alike, in one dimension


def codes_row(epoch: int, prototypes: list[int]) -> dict:
    return {"epoch": epoch, "step": epoch, "prototypes": prototypes, "certainties": [0.1 * epoch] * len(prototypes)}


def test_codes_evolve(tmp_path):
    codes = [codes_row(1, [0, 0, 1, 2]), codes_row(2, [3, 3, 1, 2]), codes_row(3, [3, 3, 1, 3])]
    text = sections.evolution(new_run(tmp_path, codes=codes), new_seen(), 8)
    assert "Of 4 tracked images, 25% changed their top prototype in the last epoch, 50% in the first" in text
    assert "from 0.1 to 0.3 " in text and "#3: 3 images at the end" in text and "#1: 1 images at the end" in text
    assert text.count("prototype 3: a/") >= 3
    assert text.count("<img") == 1 + 4
    gone = sections.evolution(new_run(tmp_path, codes=codes), None, None)
    assert gone.count("<img") == 1
    assert "codes.jsonl is missing" in sections.evolution(new_run(tmp_path), None, None)
    assert "codes.jsonl has one epoch so far" in sections.evolution(new_run(tmp_path, codes=codes[:1]), None, None)


def said(seen: Seen | None, bad=(), rows=(), folder: Path = Path()) -> str:
    return "\n".join(text for text, _ in sections.find_warnings(new_run(folder, rows), seen, bad))


def test_warnings_name_duplicates_collapsed_dimensions_and_unsure_images():
    assert not said(new_seen())
    features = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    features[1], features[3] = features[0], 1.0001 * features[2]
    seen = new_seen(features=features)
    seen.pixels[1] = seen.pixels[0]
    found = sections.find_warnings(new_run(Path()), seen, [])
    assert "4 of 8 images have nearly the features" in found[0][0] and "Of 2 such pairs 1 are the same" in found[0][0]
    assert [figure.split('alt="')[1][:7] for figure in found[0][1]] == ["a/0.png", "a/1.png", "a/2.png", "a/3.png"]
    features = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    features[:, 4] = 5.0
    assert "1 of 6 feature dimensions hardly differ" in said(new_seen(features=features))
    assert "feature std 0.0" in said(new_seen(features=100 + 0.01 * torch.randn(8, 6)))
    seen = new_seen()
    seen.certainties[5] = 0.2
    assert "No prototype is sure of 1 of 8 images" in said(seen)
    assert "No prototype is sure of any image" in said(seen._replace(certainties=torch.full((8, 4), 0.25)))


def test_warnings_of_bad_images_and_the_guard_need_no_images():
    text = said(None, ["cut short: a.jpg"], [epoch_row(2, trivial_r2=0.9)])
    assert "1 images could not be read in training: cut short: a.jpg" in text and "slow: after epoch 2" in text
    assert "Nothing found." in sections.warnings([], False)
    assert "duplicates, collapsed" in sections.warnings([], True)


def test_each_section_has_two_sentences_on_how_to_read_it(tmp_path):
    images = ImageArrays(np.zeros((8, 30, 40, 3), np.uint8), np.zeros(8))
    run, seen = new_run(tmp_path), new_seen()
    made = [part(seen) for part in (sections.prototypes, sections.balance, sections.neighbours, sections.feature_map)]
    made += [sections.about(run, "", []), sections.curves(run), sections.crops(run, images, [0])]
    made += [sections.evolution(run, seen, 8), sections.warnings([], True)]
    for text in made:
        reading = text.split("<p>")[1].split("</p>")[0]
        assert reading.endswith(".") and len(reading.split(". ")) == 2, reading
