"""Images, folders and files of options that are odd or broken: each with the message or the recovery it gets."""

import builtins
import errno
import json
import os
import struct
import subprocess
import zlib
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, run_processes, run_training
from PIL import Image, ImageOps

import decode
import eval_linear
import images as images_module
import launch
import sources
import train
from cache import CachedImages, cache_bytes, sizes_to_cache
from data import CroppedBatches, MultiCrop, SeededImages, UnreadableImage, start_epoch, training_loader
from decode import image_size, read_image, shown
from features import describe_images
from images import (
    BadImages,
    ImageFiles,
    check_folder,
    new_bad_images,
    open_images,
    typical_side,
)
from launch import OptionParser, RunStopped, UserError
from monitor import quality_crops, tracked_images

CROP = MultiCrop([8], [2], [0.3], [1.0])


def noise(width=20, height=12, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def save(path, image=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or noise()).save(path, **options)
    return path


def folder_of(root, count=4):
    for i in range(count):
        save(root / f"{i}.png", noise(seed=i))
    return root


# Files that cannot be read: {name: (what makes it, the reason)}


def cut(format, keep):
    def make(path):
        save(path, noise(90, 90), format=format)
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * keep)])

    return make


def written(content):
    return lambda path: path.write_bytes(content)


def changed(format, old, new):
    def make(path):
        save(path, format=format)
        path.write_bytes(path.read_bytes().replace(old, new, 1))

    return make


def png_of_size(width, height):
    def make(path):
        save(path, format="PNG")
        content = bytearray(path.read_bytes())
        content[16:24] = struct.pack(">II", width, height)
        content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
        path.write_bytes(content)

    return make


def jpeg_of_size(width, height):
    def make(path):
        save(path, format="JPEG")
        content = bytearray(path.read_bytes())
        at = content.index(b"\xff\xc0") + 5
        content[at : at + 4] = struct.pack(">HH", height, width)
        path.write_bytes(content)

    return make


UNREADABLE = {
    "text.jpg": (written(b"no image"), "as an image: it is in no format that is read here"),
    "page.png": (written(b"<html>404</html>"), "as an image: it is in no format that is read here"),
    "empty.png": (written(b""), "as an image: it is empty"),
    "zeros.jpg": (written(bytes(5000)), "as an image: it is in no format that is read here"),
    "program.png": (written(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "as an image: it is in no format"),
    "cut.jpg": (cut("JPEG", 0.5), "as an image: image file is truncated"),
    "cut.png": (cut("PNG", 0.5), "as an image: .*truncated"),
    "cut.webp": (cut("WEBP", 0.5), "as an image: "),
    "cut.tif": (cut("TIFF", 0.5), "as an image: "),
    "cut.bmp": (cut("BMP", 0.5), "as an image: .*truncated"),
    "cut.gif": (cut("GIF", 0.5), "as an image: .*truncated"),
    "cut.ppm": (cut("PPM", 0.5), "as an image: .*truncated"),
    "header.png": (cut("PNG", 0.002), "as an image: "),
    "chunk.png": (changed("PNG", b"IDAT", b"I\xa1AT"), "as an image: "),
    "checksum.png": (changed("PNG", b"IHDR\0", b"IHDR\1"), "as an image: "),
    "huge.png": (png_of_size(60000, 60000), "as an image: it has more than 179 megapixels.* cut it into tiles"),
    "huge.jpg": (jpeg_of_size(65000, 65000), "as an image: it has more than 179 megapixels.* cut it into tiles"),
    "no pixels.ppm": (written(b"P6 0 20 255 "), "as an image: "),
    "no number.ppm": (written(b"P6 2x0 200 255 "), "as an image: "),
    "dead link.png": (lambda path: path.symlink_to("no where"), r": No such file or directory, a link to no where"),
    "link to itself.png": (lambda path: path.symlink_to(path), ": Too many levels of symbolic links"),
    "pipe.png": (os.mkfifo, "as an image: it is not a regular file"),
    "device.png": (lambda path: path.symlink_to("/dev/zero"), "as an image: it is not a regular file"),
    "float.tif": (
        lambda path: Image.fromarray(np.full((9, 9), np.nan, np.float32)).save(path),
        "as an image: expected 8 or 16 bits a channel, got Pillow's mode F",
    ),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_an_unreadable_file_is_named_with_the_reason_and_another_image_takes_its_place(name, tmp_path):
    make, reason = UNREADABLE[name]
    path = folder_of(tmp_path) / name
    make(path)
    with pytest.raises(
        UnreadableImage, match=f"^data_path: cannot read {path} ?{reason}".replace(" ?:", ":")
    ) as raised:
        read_image(str(path))
    assert "\n" not in str(raised.value) and raised.value.reason in str(raised.value)
    images = ImageFiles(tmp_path)
    index = list(images.paths).index(str(path))
    crops, _ = SeededImages(images, CROP)[0, index]
    assert len(crops) == 2 and typical_side(images) == 12
    assert new_bad_images(images) == [(str(path), raised.value.reason)] and new_bad_images(images) == []


def test_an_eps_file_starts_no_other_program(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("started a program"))
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n")
    with pytest.raises(UnreadableImage):
        read_image(str(tmp_path / "a.png"))


def test_a_huge_image_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "decode_jpeg", lambda *_: pytest.fail("decoded"))
    jpeg_of_size(65000, 65000)(tmp_path / "a.jpg")
    with pytest.raises(UnreadableImage, match="megapixels"):
        read_image(str(tmp_path / "a.jpg"))


def test_a_file_that_vanishes_after_it_was_listed(tmp_path):
    images = ImageFiles(folder_of(tmp_path))
    (tmp_path / "2.png").unlink()
    SeededImages(images, CROP)[0, 2]
    assert new_bad_images(images) == [(f"{tmp_path}/2.png", "No such file or directory")]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="needs root, to read as another user")
@pytest.mark.parametrize("closed", ["file", "folder"])
def test_a_file_without_permission(closed, tmp_path):
    images = ImageFiles(folder_of(tmp_path / "set"))
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    (tmp_path / "set" / "1.png" if closed == "file" else tmp_path / "set").chmod(0)
    worker = os.fork()
    if worker == 0:
        code = 1
        try:
            os.setgid(65534), os.setuid(65534)
            read_image(images.paths[1])
        except UnreadableImage as error:
            code = 0 if str(error).endswith("1.png: Permission denied") else 2
        finally:
            os._exit(code)
    assert os.waitpid(worker, 0)[1] == 0


# Errors of storage


def failing_open(monkeypatch, path, number, times):
    """Let the next opens of a path fail. Returns the pauses that were taken."""
    left, real, pauses = [number] * times, builtins.open, []

    def fails(name, *args, **options):
        if str(name) == str(path) and left:
            raise OSError(left.pop(), os.strerror(number), str(path))
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "open", fails)
    monkeypatch.setattr(decode.time, "sleep", pauses.append)
    return pauses


@pytest.mark.parametrize("name", ["EIO", "ESTALE", "EMFILE", "ENFILE", "ETIMEDOUT", "EAGAIN"])
def test_an_error_of_storage_is_tried_again_once_after_a_pause(name, tmp_path, monkeypatch):
    path, number = save(tmp_path / "a.png"), getattr(errno, name)
    expected = read_image(str(path))
    pauses = failing_open(monkeypatch, path, number, times=1)
    assert torch.equal(read_image(str(path)), expected) and pauses == [1.0]
    pauses = failing_open(monkeypatch, path, number, times=2)
    with pytest.raises(UnreadableImage, match=f"^data_path: cannot read {path}: {os.strerror(number)}$"):
        read_image(str(path))
    assert pauses == [1.0]


def test_too_many_open_files_are_no_bad_image(tmp_path):
    """For real, in a process of its own that may open only few files."""
    resource = pytest.importorskip("resource")
    path = save(tmp_path / "a.png")
    worker = os.fork()
    if worker == 0:
        code = 1
        try:
            decode.time.sleep = lambda _: opened.pop().close()
            resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
            opened = []
            try:
                while True:
                    opened.append(open(path))
            except OSError:
                read_image(str(path))
                code = 0
        finally:
            os._exit(code)
    assert os.waitpid(worker, 0)[1] == 0


def test_memory_that_ends_is_no_bad_image(tmp_path, monkeypatch):
    def fails(*_, **__):
        raise MemoryError

    path = save(tmp_path / "a.png")
    monkeypatch.setattr(decode, "to_pixels", fails)
    with pytest.raises(MemoryError):
        read_image(str(path))


# Which image takes the place


def with_bad(root, count=12, bad=(3, 7)):
    folder_of(root, count)
    for i in bad:
        (root / f"{i}.png").write_bytes(b"cut")
    return ImageFiles(root)


def crops_of(images, epoch=0, workers=0, world_size=1, crop_only=True):
    """Crops [images, 2, 3, 8, 8] in the order of the permutation."""
    parts = []
    for rank in range(world_size):
        options = dict(seed=5, rank=rank, world_size=world_size, workers=workers, crop_only=crop_only)
        loader = training_loader(images, CROP, 4 // world_size, **options)
        for batch, _ in start_epoch(loader, epoch):
            crops = batch[0][0] if crop_only else torch.stack(batch)  # [2, B, 3, 8, 8]
            parts.append(crops.transpose(0, 1))
    steps = len(parts) // world_size
    return torch.cat([parts[rank * steps + step] for step in range(steps) for rank in range(world_size)])


@pytest.mark.parametrize("crop_only", [True, False])
def test_which_image_takes_the_place_depends_on_seed_epoch_and_index_alone(tmp_path, crop_only):
    images = with_bad(tmp_path)
    expected = crops_of(images, crop_only=crop_only)
    for workers, world_size in ((2, 1), (0, 2)):
        assert torch.equal(crops_of(images, 0, workers, world_size, crop_only), expected)
    assert not torch.equal(crops_of(images, 1, crop_only=crop_only), expected)
    for i in (3, 7):
        save(tmp_path / f"{i}.png", noise(seed=i))
    same = (crops_of(images, crop_only=crop_only) == expected).flatten(1).all(1)
    assert same.sum() == 10  # the crops of good images do not change


def test_the_others_are_chosen_from_the_whole_set_and_differ_between_epochs(tmp_path):
    images = with_bad(tmp_path, bad=(3,))
    batches = CroppedBatches(images, CROP)
    chosen = set()
    read = images_module.read_image
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images_module, "read_image", lambda path, *more: chosen.add(path) or read(path, *more))
        for epoch in range(60):
            batches.__getitems__([(epoch, list(images.paths).index(f"{tmp_path}/3.png"))])
    assert len(chosen) == 12


def test_workers_tell_which_images_are_bad(tmp_path):
    images = with_bad(tmp_path)
    crops_of(images, workers=2)
    assert sorted(Path(path).name for path, _ in new_bad_images(images)) == ["3.png", "7.png"]
    assert new_bad_images(images) == []


def test_a_set_in_which_nothing_can_be_read(tmp_path):
    images = with_bad(tmp_path, 3, bad=(0, 1, 2))
    with pytest.raises(UserError, match="^data_path: cannot read .*0.png .* nor can any other of 3 images of"):
        typical_side(images)
    with pytest.raises(UnreadableImage, match="0.png .*; 49 other images, tried in its place, cannot be read either"):
        SeededImages(images, CROP)[0, 0]


def test_all_that_looks_at_images_before_training_survives_bad_ones(tmp_path):
    images = with_bad(tmp_path, 40, bad=(0, 5, 39))
    assert typical_side(images) == 12 and cache_bytes(images)[0] == 40 * 3 * 20 * 12
    assert 0 <= describe_images(images)["plain_ground"] <= 1
    assert len(tracked_images(images, 8, 0, 1)) == 2
    assert len(quality_crops(images, MultiCrop([8], [1], [0.5], [1.0]))[0]) == 40
    sizes = sizes_to_cache(images, "auto")
    assert Counter(sizes) == {(20, 12): 37, (0, 0): 3}


def test_the_cache_works_with_bad_images(tmp_path):
    images = with_bad(tmp_path, 8, bad=(4,))
    cut("PNG", 0.7)(tmp_path / "5.png")  # a header that can be read
    cached = CachedImages(images, sizes_to_cache(images, "ram"), str(tmp_path / "memory"))
    for _ in range(2):
        assert torch.equal(crops_of(cached), crops_of(images))
    assert sorted(Path(path).name for path, _ in new_bad_images(cached)) == ["4.png", "5.png"]
    save(tmp_path / "4.png", noise(seed=1))  # repaired while the run goes on: its memory is too small for it
    assert cached[4][0].shape == (3, 12, 20)


# What a run and an evaluation do


def test_a_run_with_a_cut_image_ends_and_lists_it_once(tmp_path, capsys):
    folder = folder_of(tmp_path / "photos", 12)
    cut("PNG", 0.5)(folder / "it's \udcff\nodd.png")
    run_training(folder, tmp_path / "run", "--epochs", "2", "--log_freq", "1")
    out = capsys.readouterr().out
    line = (tmp_path / "run" / "bad_images.txt").read_bytes()
    assert line.endswith(b"\t" + os.fsencode(folder) + b"/it's \xff\\nodd.png\n") and b"truncated" in line
    assert "  1 bad image  ETA" in out
    run_training(folder, tmp_path / "run", "--epochs", "4")
    assert (tmp_path / "run" / "bad_images.txt").read_bytes() == line
    rows = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert max(row.get("bad_images", 0) for row in rows) == 1


def test_a_run_without_bad_images_does_not_speak_of_them(images, tmp_path, capsys):
    run_training(images, tmp_path, "--epochs", "1")
    assert "bad image" not in capsys.readouterr().out and not (tmp_path / "bad_images.txt").exists()


def test_a_run_stops_at_more_bad_images_than_allowed(tmp_path):
    with_bad(tmp_path / "photos", 12, bad=(1, 2, 3))
    message = (
        "^3 of 12 images cannot be read, and --max_bad_images allows 2: .*/photos/.*png .*; "
        "all are listed in .*bad_images.txt; repair or delete them, or set --max_bad_images$"
    )
    with pytest.raises(RunStopped, match=message):
        run_training(tmp_path / "photos", tmp_path / "run", "--max_bad_images", "2", "--log_freq", "1")
    assert len((tmp_path / "run" / "bad_images.txt").read_text().splitlines()) == 3
    run_training(tmp_path / "photos", tmp_path / "run", "--max_bad_images", "3", "--epochs", "1")


@pytest.mark.parametrize("count, most", [(3, 1), (199, 1), (200, 2), (1234, 12)])
def test_one_percent_may_be_bad_and_at_least_one(count, most):
    assert BadImages(range(count)).most == most


def test_max_bad_images_is_checked():
    with pytest.raises(UserError, match="^--max_bad_images: expected a whole number from 0, got -1"):
        train.parse_args([*TINY, "--max_bad_images", "-1"])


def bad_of_processes(rank, world_size, folder, shared):
    images = ImageFiles(folder)
    bad = BadImages(images, most=2, folder=Path(folder).parent)
    os.environ["RANK"] = str(rank)
    counts = []
    for index in (rank, 2, 3 + rank):
        with pytest.raises(UnreadableImage):
            images[index]
        try:
            counts.append(bad.update())
        except RunStopped as error:
            counts.append(int(str(error).split()[0]))
    with pytest.raises(UnreadableImage):
        shared[3 + rank]
    return torch.tensor(counts)


def test_all_processes_stop_together_and_list_each_image_once_and_spawned_ones_share_the_marks(tmp_path):
    shared = with_bad(tmp_path / "photos", 5, bad=range(5))
    counts = run_processes(bad_of_processes, 2, str(tmp_path / "photos"), shared)
    assert [part.tolist() for part in counts] == [[2, 3, 5]] * 2
    names = [line.rpartition("/")[2] for line in (tmp_path / "bad_images.txt").read_text().splitlines()]
    assert sorted(names) == [f"{i}.png" for i in range(5)]
    assert [Path(path).name for path, _ in new_bad_images(shared)] == ["3.png", "4.png"]


def test_a_full_disk_below_the_list_ends_no_run(tmp_path, capsys):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    images = with_bad(tmp_path / "photos", 4, bad=(1,))
    SeededImages(images, CROP)[0, 1]
    (tmp_path / "bad_images.txt").symlink_to("/dev/full")
    images_module.Path.read_bytes, real = lambda _: b"", images_module.Path.read_bytes  # /dev/full never ends
    try:
        assert BadImages(images, folder=tmp_path).update() == 1
    finally:
        images_module.Path.read_bytes = real
    assert f"cannot write {tmp_path}/bad_images.txt: No space left on device" in capsys.readouterr().out


@pytest.fixture
def labelled(tmp_path):
    """train/ and valid/ with 2 classes of 4 and 3 images, of which one each cannot be read, and a checkpoint."""
    for split, count in (("train", 4), ("valid", 3)):
        for label in ("cats", "dogs"):
            folder_of(tmp_path / "set" / split / label, count)
    cut("PNG", 0.6)(tmp_path / "set" / "train" / "cats" / "1.png")
    (tmp_path / "set" / "valid" / "dogs" / "2.png").write_bytes(b"")
    from model import ResNet

    torch.save({"state_dict": ResNet("resnet18", width=2, blocks=(1, 1, 1, 1)).state_dict()}, tmp_path / "c.pth")
    return tmp_path


def evaluate(root, *words):
    words = [root / "c.pth", "--data_path", root / "set", "--workers", "0", "--device", "cpu", "--size", "16", *words]
    return eval_linear.main(eval_linear.parse_args(list(map(str, words))))


@pytest.mark.parametrize("mode", ["--cached", "--epochs=1"])
def test_the_evaluation_leaves_bad_images_out_and_counts_them(labelled, mode, capsys):
    result = evaluate(labelled, mode)
    assert result["left_out"] == {"train": 1, "val": 1}
    assert json.loads((labelled / "c.eval.json").read_text())["left_out"] == {"train": 1, "val": 1}
    out = capsys.readouterr().out
    assert "left out, as they cannot be read: 1 of 8 train images: " in out
    assert "left out, as they cannot be read: 1 of 6 val images: " in out and "dogs/2.png (it is empty)" in out
    (labelled / "set" / "train" / "cats" / "1.png").unlink()
    (labelled / "set" / "valid" / "dogs" / "2.png").unlink()
    if mode == "--cached":  # the same as without these files, except for statistics that depend on the order
        others = evaluate(labelled, mode)["rows"]
        assert all(others[name] == row for name, row in result["rows"].items() if "BatchNorm of" not in name)


@pytest.mark.parametrize("count, bad, words", [(1, 1, ["--max_bad_images", "0"]), (2, 2, [])])
def test_the_evaluation_stops_at_too_many_bad_images(labelled, count, bad, words):
    (labelled / "set" / "train" / "dogs" / "0.png").write_bytes(b"")
    if count == 1:
        save(labelled / "set" / "train" / "dogs" / "0.png")
    with pytest.raises(UserError, match=f"^{bad} of 8 images cannot be read, and --max_bad_images allows"):
        evaluate(labelled, "--cached", *words)
    assert not (labelled / "c.eval.json").exists()


def test_an_evaluation_of_nothing_that_can_be_read(labelled):
    for path in (labelled / "set" / "valid").rglob("*.png"):
        cut("PNG", 0.6)(path)
    with pytest.raises(UserError, match="none of the 6 validation images can be read; python images.py DIR tells why"):
        evaluate(labelled, "--cached")


# What a folder is


def names_of(images):
    return [os.path.relpath(path, images.root) for path in images.paths]


LINKS = {  # {name: (links to make as {link: target}, names of the images)}
    "to itself": ({"a/loop": "."}, ["a/0.png", "b/0.png"]),
    "up": ({"a/up": ".."}, ["a/0.png", "b/0.png"]),
    "above the set": ({"a/up": "../.."}, ["a/0.png", "b/0.png"]),
    "to each other": ({"a/x": "../b", "b/x": "../a"}, ["a/0.png", "b/0.png"]),
    "twice out of it": ({"c": "{out}", "d": "{out}"}, ["a/0.png", "b/0.png", "c/9.png"]),
    "to a real folder, before it by name": ({"0": "b"}, ["a/0.png", "b/0.png"]),
    "dead": ({"c": "nowhere"}, ["a/0.png", "b/0.png"]),
}


@pytest.mark.parametrize("name", LINKS)
def test_a_link_to_a_folder_is_followed_once(name, tmp_path):
    links, expected = LINKS[name]
    for path in ("set/a/0.png", "set/b/0.png", "out/9.png"):
        save(tmp_path / path)
    for link, target in links.items():
        (tmp_path / "set" / link).symlink_to(target.format(out=tmp_path / "out"))
    assert names_of(ImageFiles(tmp_path / "set")) == expected
    if "c" not in links:
        assert names_of(ImageFiles(tmp_path / "set", labelled=True))[:2] == (
            expected if "0" not in links else ["0/0.png", "a/0.png"]
        )


def test_a_set_may_be_a_link_and_hold_links_to_files(tmp_path):
    save(tmp_path / "set" / "0.png")
    (tmp_path / "set" / "1.png").symlink_to("0.png")
    (tmp_path / "link").symlink_to("set")
    assert names_of(ImageFiles(tmp_path / "link")) == ["0.png", "1.png"]


def test_files_left_out_are_counted_by_ending(tmp_path, capsys):
    save(tmp_path / "0.png")
    for name in ("a.txt", "b.TXT", "c.heic", "README", ".hidden", "d.odd\n"):
        (tmp_path / name).write_bytes(b"")
    open_images("folder", tmp_path)
    out = capsys.readouterr().out
    assert f"data: left out in {tmp_path}, as no images: 2 .txt, " in out and "1 no ending" in out
    assert ("1 .heic" in out) == ("pip install pillow-heif" in out) and "1 .odd\\n" in out and "hidden" not in out


def test_a_long_listing_shows_its_progress(tmp_path, monkeypatch, capsys):
    folder_of(tmp_path / "b", 3)
    (tmp_path / "b" / "0.txt").write_bytes(b"")
    ticks = iter(range(0, 1000, 16))  # seconds; a line every 30
    monkeypatch.setattr(launch.time, "monotonic", lambda: next(ticks))
    ImageFiles(tmp_path)
    *lines, last = [line for line in capsys.readouterr().out.splitlines() if line.startswith("data: ")]
    assert lines and all(line.endswith(f" images found so far, in {tmp_path}/b") for line in lines)
    assert last == "data: 3 images found"
    monkeypatch.setattr(launch.time, "monotonic", lambda: 0)
    ImageFiles(tmp_path)
    assert capsys.readouterr().out == ""


def test_a_folder_of_other_files_tells_what_it_holds(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"")
    with pytest.raises(UserError, match="expected image files .* found none, but 1 .mp4"):
        ImageFiles(tmp_path)


@pytest.mark.parametrize("present, used", [("test val", "val"), ("valid test", "valid"), ("validation", "validation")])
def test_training_takes_train_alone_and_the_evaluation_finds_the_other_split(present, used, tmp_path, capsys):
    for split in ("train", *present.split()):
        save(tmp_path / split / "cats" / f"{split}.png")
    assert names_of(open_images("folder", tmp_path)) == ["cats/train.png"]
    assert f"holds train/ and {used}/: training uses train/ alone" in capsys.readouterr().out
    for root in (tmp_path, tmp_path / "train"):
        assert names_of(open_images("folder", root, "val")) == [f"cats/{used}.png"]


ODD_NAMES = [
    "with space.png",
    "it's.png",
    'a"quote".png',
    "new\nline.png",
    "tab\t.png",
    "\udcff\udcfe.png",
    "雪.png",
    "#.png",
]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_path_may_hold_anything(name, tmp_path):
    try:
        save(tmp_path / "images" / "0.png").rename(tmp_path / "images" / name)
    except OSError:
        pytest.skip("this file system refuses the name")
    images = ImageFiles(tmp_path / "images")
    assert list(images.paths) == [f"{tmp_path}/images/{name}"] and images[0][0].shape == (3, 12, 20)
    (tmp_path / "images" / name).write_bytes(b"")
    with pytest.raises(UnreadableImage) as raised:
        images[0]
    str(raised.value).encode()  # can be printed
    assert shown(name) in str(raised.value) and "\n" not in str(raised.value)
    with pytest.raises(RunStopped):
        BadImages(images, most=0, folder=tmp_path).update()
    assert (tmp_path / "bad_images.txt").read_bytes().count(b"\n") == 1


def test_paths_take_little_more_than_their_text(tmp_path):
    paths = sources.Paths([b"/data/%06d.png" % i for i in range(1000)])
    assert len(paths.text) + paths.ends.nbytes == 1000 * (len("/data/000000.png") + 8)
    assert paths[999] == paths[-1] == paths[np.int64(999)] == "/data/000999.png" and paths[2:4] == [paths[2], paths[3]]
    with pytest.raises(IndexError):
        paths[1000]


# What an image is


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_as_viewers_do(format, orientation, tmp_path):
    image = noise(16, 8).resize((64, 32), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{format.lower()}"
    image.save(path, format, exif=exif, **({"quality": 95} if format in ("JPEG", "AVIF") else {}))
    if format == "PNG":
        path = path.rename(tmp_path / "a.png")
    expected = np.array(ImageOps.exif_transpose(Image.open(path)).convert("RGB")).transpose(2, 0, 1).astype(int)
    assert expected.shape == ((3, 32, 64) if orientation < 5 else (3, 64, 32))
    pixels = read_image(str(path))
    assert np.abs(pixels.numpy() - expected).max() <= 4  # two decoders of JPEG
    assert image_size(str(path)) == pixels.shape[:0:-1] and pixels.stride(0) == 1


def test_broken_exif_leaves_the_image_as_it_is(tmp_path):
    save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\xff\xff\xff\xff")
    assert read_image(str(tmp_path / "a.jpg")).shape == (3, 12, 20)


def transparent(mode):
    image = Image.new("RGBA", (20, 12), (200, 0, 0, 0))
    image.paste((0, 0, 200, 255), (0, 0, 10, 12))
    return image.convert(mode) if mode != "RGBA" else image


@pytest.mark.parametrize(
    "name, image, options",
    [
        ("rgba.png", transparent("RGBA"), {}),
        ("rgba.webp", transparent("RGBA"), dict(lossless=True)),
        ("rgba.tif", transparent("RGBA"), {}),
        ("palette.gif", transparent("RGBA"), {}),
        ("palette.png", transparent("RGBA").quantize(4), {}),
        ("grey.png", transparent("LA"), {}),
        ("colour key.png", transparent("RGBA").convert("RGB"), dict(transparency=(200, 0, 0))),
    ],
)
def test_transparent_images_are_laid_over_white(name, image, options, tmp_path):
    pixels = read_image(str(save(tmp_path / name, image, **options)))
    assert (pixels[:, :, 10:] == 255).all() and (pixels[0, :, :10] < 60).all()


@pytest.mark.parametrize(
    "kind, low, high, expected",
    [(np.uint16, 100, 4000, (100, 4000)), (np.float32, -1, 3, (-1, 3)), (np.int32, 0, 10**6, (0, 10**6))],
)
def test_values_in_a_part_of_the_range_are_scaled_by_the_set(kind, low, high, expected, tmp_path, capsys):
    ramp = np.linspace(low, high, 100 * 100).reshape(100, 100).astype(kind)
    dark = np.full((100, 100), low, kind)
    for name, values in (("ramp.tif", ramp), ("dark.tif", dark)):
        Image.fromarray(values).save(tmp_path / name)
    images = open_images("folder", tmp_path)
    assert images.value_range == pytest.approx(expected, rel=0.03, abs=0.02 * (high - low))
    assert "data: values from " in capsys.readouterr().out
    assert images[0][0].max() == 0 and images[1][0].min() == 0 and images[1][0].max() == 255
    assert abs(images[1][0][0, 50, 0].item() - 128) < 3
    given = open_images("folder", tmp_path, value_range=(low, 2 * high - low))  # of another set's training
    assert abs(given[1][0].max().item() - 128) < 3 and capsys.readouterr().out == ""


def test_files_of_all_16_bits_stay_as_they_are_and_8_bits_have_no_range(tmp_path):
    values = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    (tmp_path / "16").mkdir()
    Image.fromarray(values).save(tmp_path / "16" / "16.png")
    images = ImageFiles(tmp_path / "16")
    assert images.value_range == (0, 65535)
    assert np.array_equal(images[0][0][0], (values / 257 + 0.5).astype(np.uint8))
    assert ImageFiles(folder_of(tmp_path / "8")).value_range is None


def deep_png(values, colour_type, before_data=b""):
    """A PNG file of values uint16 [H, W, C], which Pillow cannot write."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, colour_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    data = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + before_data + data + chunk(b"IEND", b"")


def deep_tiff(values, planes=False, compressed=False, order="<"):
    """A TIFF file of values uint16 [H, W, 3 or 4]; order: < or > for its bytes."""
    height, width, channels = values.shape
    parts = [part.astype(order + "u2").tobytes() for part in (values.transpose(2, 0, 1) if planes else [values])]
    parts = [zlib.compress(part) for part in parts] if compressed else parts
    content = struct.pack(order + "4H", *[16] * 4)  # bits
    places = [8 + len(content) + sum(map(len, parts[:i])) for i in range(len(parts))]
    content += b"".join(parts)
    tables = 8 + len(content), 8 + len(content) + 4 * len(parts)
    places_and_sizes = tables if planes else (places[0], len(parts[0]))
    content += struct.pack(f"{order}{2 * len(parts)}L", *places, *map(len, parts))
    tags = [(256, width), (257, height), (258, 8), (259, 8 if compressed else 1), (262, 2)]
    tags += [(273, places_and_sizes[0]), (277, channels), (278, height), (279, places_and_sizes[1])]
    tags += [(284, 2 if planes else 1), *([(338, 2)] if channels == 4 else [])]
    counts = {258: channels, 273: len(parts), 279: len(parts)}
    directory = struct.pack(order + "H", len(tags))
    for tag, value in tags:
        directory += struct.pack(order + "HHLL", tag, 3 if tag == 258 else 4, counts.get(tag, 1), value)
    start = struct.pack(order + "2sHL", b"II" if order == "<" else b"MM", 42, 8 + len(content))
    return start + content + directory + bytes(4)


def deep_values(channels, low=0, high=65535):
    return np.random.default_rng(0).integers(low, high, (40, 50, channels), dtype=np.uint16, endpoint=True)


DEEP = {  # {name: (channels, what makes the file)}
    "grey and alpha.png": (2, lambda values: deep_png(values, 4)),
    "colour.png": (3, lambda values: deep_png(values, 2)),
    "colour and alpha.png": (4, lambda values: deep_png(values, 6)),
    "little-endian.tif": (3, deep_tiff),
    "big-endian.tif": (4, partial(deep_tiff, order=">")),
    "compressed.tif": (4, partial(deep_tiff, compressed=True)),
    "compressed big-endian.tif": (3, partial(deep_tiff, compressed=True, order=">")),
}


@pytest.mark.parametrize("name", DEEP)
@pytest.mark.parametrize("low, high", [(100, 4000), (0, 65535)])
def test_colours_of_16_bits_are_scaled_like_grey_ones(name, low, high, tmp_path, capsys):
    channels, make = DEEP[name]
    has_alpha = channels in (2, 4)
    values = deep_values(channels, low, high)
    if has_alpha:
        values[..., -1] = 65535
        values[:, 25:, -1] = 0  # transparent
    (tmp_path / name).write_bytes(make(values))
    images = open_images("folder", tmp_path)
    found = images.value_range
    assert found == (pytest.approx((low, high), abs=0.005 * (high - low)) if high < 2**15 else (0, 65535))
    assert ("data: values from" in capsys.readouterr().out) == (high < 2**15)
    colours = values[..., : channels - has_alpha].astype(float)
    expected = np.clip((colours - found[0]) / (found[1] - found[0]), 0, 1) * 255
    expected = np.broadcast_to(expected, (40, 50, 3)).copy()
    if has_alpha:
        expected[:, 25:] = 255
    pixels = images[0][0]
    assert pixels.dtype == torch.uint8 and np.abs(pixels.permute(1, 2, 0).numpy() - expected).max() <= 0.5 + 1e-6
    assert image_size(tmp_path / name) == (50, 40) and pixels.stride(0) == 1


def test_a_transparent_colour_of_16_bits_is_white(tmp_path):
    values = deep_values(3)
    values[3:9] = 300, 5, 40_000
    values[10] = 300, 5, 40_001
    key = struct.pack(">3H", 300, 5, 40_000)
    chunk = struct.pack(">I", 6) + b"tRNS" + key + struct.pack(">I", zlib.crc32(b"tRNS" + key))
    (tmp_path / "a.png").write_bytes(deep_png(values, 2, chunk))
    pixels = read_image(tmp_path / "a.png")
    assert (pixels[:, 3:9] == 255).all() and (pixels[:, 10, 0].tolist()) == [1, 0, 156]


def test_a_damaged_png_of_16_bits_is_named_with_a_reason(tmp_path):
    content = deep_png(deep_values(3), 2)
    (tmp_path / "a.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(UnreadableImage, match="^data_path: cannot read .*/a.png as an image: .*truncated"):
        read_image(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes(content.replace(b"IDAT", b"JDAT"))
    with pytest.raises(UnreadableImage, match="^data_path: cannot read .*/a.png as an image: "):
        read_image(tmp_path / "a.png")


def lost(count):
    return f"{count} have 16 bits a channel in colour, of which only the upper 8 are used; save them as 16-bit PNG"


def test_bits_of_a_tiff_that_are_lost_are_told_at_the_start_and_by_a_check(tmp_path, capsys):
    values = deep_values(3)
    for i in range(2):
        (tmp_path / f"{i}.tif").write_bytes(deep_tiff(values, planes=True, compressed=True))
    save(tmp_path / "8.tif")
    images = open_images("folder", tmp_path)
    assert images.value_range is None and np.array_equal(images[0][0].permute(1, 2, 0), values >> 8)
    assert capsys.readouterr().out.count(f"data: {lost('2 of 3 files looked at')}") == 1
    assert check_folder(str(tmp_path), workers=0) == 0
    assert f"\n{lost('2 files')}" in capsys.readouterr().out


def test_a_tiff_that_pillow_misreads_is_refused(tmp_path):
    (tmp_path / "a.tif").write_bytes(deep_tiff(deep_values(3), planes=True))
    with pytest.raises(UnreadableImage, match="it has 16-bit channels in separate planes.*; save it as 16-bit PNG$"):
        read_image(tmp_path / "a.tif")


def test_without_torchvisions_decoder_pillow_reads_jpeg(tmp_path, monkeypatch):
    expected = read_image(save(tmp_path / "1.jpg")).int()
    monkeypatch.setattr(decode, "decode_jpeg", None)
    assert (read_image(tmp_path / "1.jpg") - expected).abs().max() <= 3


def test_nan_and_infinity_in_a_float_image_are_ends_of_the_range(tmp_path):
    values = np.linspace(0, 1, 400, dtype=np.float32).reshape(20, 20)
    values[0, :2], values[1, :2] = np.nan, np.inf
    Image.fromarray(values).save(tmp_path / "a.tif")
    pixels = ImageFiles(tmp_path)[0][0]
    assert (pixels[:, 0, :2] == 0).all() and (pixels[:, 1, :2] == 255).all()


def test_the_evaluation_scales_by_the_range_of_the_training(labelled, monkeypatch):
    seen = []
    opened = images_module.open_images
    monkeypatch.setattr(images_module, "open_images", lambda *args: seen.append(args[4]) or opened(*args))
    contents = torch.load(labelled / "c.pth", weights_only=True)
    torch.save(contents | {"options": {"size_crops": [16]}, "value_range": (3.0, 9.0)}, labelled / "c.pth")
    evaluate(labelled, "--cached")
    assert seen == [(3.0, 9.0)] * 2


@pytest.mark.parametrize("format", ["TIFF", "GIF", "WEBP"])
def test_the_first_page_is_used_and_that_is_said_once(format, tmp_path, capsys):
    pages = [Image.new("RGB", (20, 12), colour) for colour in ("white", "black", "black")]
    for i in range(3):
        pages[0].save(tmp_path / f"{i}.{format.lower()}", format, save_all=True, append_images=pages[1:])
    images = open_images("folder", tmp_path)
    assert (images[1][0] > 250).all()
    message = "data: 3 of 3 files looked at have several pages or frames; the first one is used"
    assert capsys.readouterr().out.count(message) == 1


@pytest.mark.parametrize("name, format", [("a.jfif", "JPEG"), ("a.AVIF", "AVIF"), ("a.gif", "GIF"), ("a.png", "JPEG")])
def test_other_endings_and_wrong_ones(name, format, tmp_path):
    save(tmp_path / name, format=format)
    assert ImageFiles(tmp_path)[0][0].shape == (3, 12, 20)


def test_heic_files_are_read_where_pillow_heif_is_installed(tmp_path, monkeypatch):
    heif = pytest.importorskip("pillow_heif")
    decode.readable_formats.cache_clear()
    heif.from_pillow(noise(64, 48)).save(tmp_path / "a.heic")
    assert ImageFiles(tmp_path)[0][0].shape == (3, 48, 64)


def test_an_image_of_one_pixel_is_trained_on(tmp_path):
    save(tmp_path / "1.png", Image.new("RGB", (1, 1), (9, 9, 9)))
    crops, _ = SeededImages(ImageFiles(tmp_path), CROP)[0, 0]
    assert crops[0].shape == (3, 8, 8)


# python images.py DIR


def test_a_folder_is_checked(tmp_path, capsys):
    root = folder_of(tmp_path / "set", 3)
    save(root / "sub" / "grey.jpg", Image.new("L", (300, 400)))
    (root / "link.png").symlink_to("1.png")
    os.link(root / "2.png", root / "sub" / "hard.png")
    cut("PNG", 0.5)(root / "cut.png")
    (root / "notes.txt").write_bytes(b"")
    assert check_folder(str(root), workers=2) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{root}: 7 image files; reading them all in 2 process(es)"
    for line in (
        "endings: 6 .png, 1 .jpg",
        "formats: 6 PNG, 1 JPEG",
        "modes: 6 RGB, 1 L",
        "shorter side in pixels: below 32: 5, 32 to 95: 1, 224 to 511: 1",
        "left out, as no images: 1 .txt",
        "links to an image that is counted already: 2",
        f"  {root}/link.png is {root}/1.png",
        f"  {root}/sub/hard.png is {root}/2.png",
        "cannot be read: 1",
    ):
        assert line in lines, line
    assert lines[-2].endswith(f"\t{root}/cut.png") and "truncated" in lines[-2]
    assert lines[-1].startswith("repair or delete these")


@pytest.mark.parametrize("bad, code", [((), 0), ((1,), 1)])
def test_the_exit_code_of_a_check(bad, code, tmp_path):
    with_bad(folder_of(tmp_path), 4, bad)
    with pytest.raises(SystemExit) as left:
        images_module.main([str(tmp_path), "--workers", "0"])
    assert left.value.code == code


@pytest.mark.parametrize(
    "words, message", [(["{tmp}/none"], "expected a folder"), ([], "required: DIR"), (["{tmp}"], "none")]
)
def test_a_check_of_no_folder_is_a_user_error(words, message, tmp_path):
    with pytest.raises(UserError, match=message):
        images_module.main([word.format(tmp=tmp_path) for word in words])


# Files of options


def parsed(tmp_path, text, name="o.args"):
    parser = OptionParser(prog="small.py", fromfile_prefix_chars="@")
    parser.add("data_path", None, str, "a folder")
    parser.add("count", 1, int, "a number")
    parser.add("sizes", None, int, "numbers", nargs="+")
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return parser.parse_args([f"@{tmp_path / name}"])


@pytest.mark.parametrize(
    "line, expected",
    [
        (r"--data_path C:\new\table", r"C:\new\table"),
        ("--data_path /data/Anna's", "/data/Anna's"),
        ("--data_path /data/a#1 # a comment", "/data/a#1"),
        ("--data_path /data/a#1\t# it's a comment", "/data/a#1"),
        ('--data_path "my photos"', "my photos"),
        ("--data_path 'my photos'", "my photos"),
        ('--data-path="my #1 photos" # x', "my #1 photos"),
        ("--data_path='Anna's photos'", "Anna's photos"),
        ('--data_path 5"disk', '5"disk'),
        ('--data_path "$HOME/`x`"', "$HOME/`x`"),
        ('--data_path ""', ""),
        ("# --data_path a\n#\n\n  --data_path b", "b"),
        ("\ufeff--data_path a\r\n", "a"),
        ("--data_path 雪", "雪"),
        (b"--data_path \xff\xfe", "\udcff\udcfe"),
    ],
)
def test_a_file_of_options_has_no_rules_of_a_shell(line, expected, tmp_path):
    assert parsed(tmp_path, line).data_path == expected


def test_a_list_may_go_on_in_the_next_line(tmp_path):
    assert parsed(tmp_path, "--sizes\n1 2\n3\n--count 2").sizes == [1, 2, 3]


@pytest.mark.parametrize(
    "text, message",
    [
        ('\n--data_path "my photos', r"o.args, line 2: expected a second \" at the end of \"my photos"),
        ("--count 2\n--data_path 't Hooft", "o.args, line 2: expected a second ' at the end of 't Hooft"),
        ("# x\n--count 2\n--count many", "o.args, line 3: --count: invalid int value: 'many' "),
        ("--sizes\n1 2\n--count 3\n--unknown 4\n--count 5", "o.args, line 4: unrecognized arguments: --unknown 4 "),
    ],
)
def test_an_error_in_a_file_of_options_names_file_and_line(text, message, tmp_path):
    with pytest.raises(UserError, match=message):
        parsed(tmp_path, text)


def test_a_missing_file_of_options(tmp_path):
    parser = OptionParser(prog="small.py", fromfile_prefix_chars="@")
    with pytest.raises(UserError, match="^@.*none.args: cannot read this file of options: No such file or directory"):
        parser.parse_args([f"@{tmp_path}/none.args"])
