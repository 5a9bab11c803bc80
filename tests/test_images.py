"""images.py, decode.py, cache.py, shapes.py: image files, folders, named sets, the cache, the drawn shapes."""

import gzip
import hashlib
import math
import os
import pickle
import struct
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, assert_same, forked_ranks, run_training
from PIL import Image

import cache
import images as images_module
import shapes
import sources
import train
from cache import CachedImages, cache_bytes, sizes_to_cache
from data import MultiCrop, UnreadableImage, to_pixels, training_loader
from decode import image_size, read_image
from images import BadImages, GivenImages, ImageArrays, ImageFiles, fingerprint, open_images, open_splits, typical_side
from labels import class_of
from launch import RunStopped, UserError
from shapes import draw_shape

# Image files


def save(path, colour=(1, 2, 3), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 12), colour).convert(mode).save(path, **options)


def test_image_files_are_found_at_any_depth_in_order_of_path(tmp_path):
    for name in ("b.png", "a.JPG", "0/er/c.jpeg", "0/D.WebP", ".hidden.png"):
        save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "0" / "png").write_text("no image")
    images = ImageFiles(tmp_path)
    names = [path.removeprefix(f"{tmp_path}/") for path in images.paths]
    assert names == ["0/D.WebP", "0/er/c.jpeg", "a.JPG", "b.png"] and len(images) == 4
    assert all(label == -1 for _, label in images)


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="only Linux shows a process's memory")
@pytest.mark.parametrize("labelled", [False, True])
def test_a_worker_that_reads_paths_does_not_copy_them(labelled, tmp_path, monkeypatch):
    (tmp_path / "cats").mkdir()
    names = [f"{i:080d}.png" for i in range(100_000)]
    monkeypatch.setattr(sources, "files_below", lambda root, seen: (f"{root}/{name}" for name in names))
    images = ImageFiles(tmp_path, labelled=labelled)
    assert len(images) == len(names)
    paths = images.paths

    def own_bytes():
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty"))

    worker = os.fork()
    if worker == 0:
        before = own_bytes()
        for i in range(len(paths)):
            paths[i]
        os._exit(own_bytes() - before > 4_000_000)  # the copy of a list takes 17 MB
    assert os.waitpid(worker, 0)[1] == 0


def test_hidden_files_and_folders_are_skipped_in_training_and_evaluation(tmp_path):
    for split in ("train", "val"):
        for name in (
            "cats/0.png",
            "dogs/0.png",
            "dogs/._0.png",
            ".cache/0.png",
            ".cache/dogs/0.png",
            "cats/.cache/0.png",
        ):
            save(tmp_path / split / name)
    assert len(open_images("folder", tmp_path)) == 2
    labelled = open_images("folder", tmp_path, "train")
    assert len(labelled) == 2 and labelled.classes == ["cats", "dogs"]


def test_warns_of_a_folder_that_cannot_be_read(tmp_path, monkeypatch):
    save(tmp_path / "open" / "0.png")
    save(tmp_path / "closed" / "0.png")
    scandir = os.scandir

    def closed(folder):
        if str(folder).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.warns(UserWarning, match="^data_path: .*closed is left out: Permission denied"):
        assert len(ImageFiles(tmp_path)) == 1


def test_16_bits_are_scaled_to_8_and_more_are_refused(tmp_path):
    values = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(values).save(tmp_path / "16.png")
    Image.fromarray(values).save(tmp_path / "16.tif")
    (tmp_path / "16.pgm").write_bytes(b"P5 256 256 65535\n" + values.byteswap().tobytes())
    expected = torch.from_numpy((values / 257 + 0.5).astype(np.uint8))
    for name in ("16.png", "16.tif", "16.pgm"):
        pixels = read_image(str(tmp_path / name))
        assert pixels.shape == (3, 256, 256) and all(torch.equal(channel, expected) for channel in pixels), name
    for kind in (np.int32, np.float32):
        Image.fromarray(values.astype(kind)).save(tmp_path / "32.tif")
        with pytest.raises(UnreadableImage, match="^data_path: cannot read .*32.tif .*expected 8 or 16 bits a channel"):
            read_image(str(tmp_path / "32.tif"))


def test_jpeg_files_are_read_as_pillow_reads_them(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    smooth = Image.fromarray(pixels).resize((61, 47), Image.Resampling.BICUBIC)
    for name, image, options in (
        ("rgb.jpg", smooth, {}),
        ("progressive.jpg", smooth, dict(progressive=True)),
        ("grey.jpg", smooth.convert("L"), {}),
        ("cmyk.jpg", smooth.convert("CMYK"), {}),
    ):
        image.save(tmp_path / name, quality=95, **options)
        pixels = read_image(tmp_path / name)
        assert pixels.dtype == torch.uint8 and image_size(tmp_path / name) == (61, 47)
        expected = np.array(Image.open(tmp_path / name).convert("RGB")).transpose(2, 0, 1).astype(int)
        assert np.abs(pixels.numpy() - expected).max() <= 3, name
    content = (tmp_path / "rgb.jpg").read_bytes()
    (tmp_path / "more.jpg").write_bytes(content + b"appended")
    assert torch.equal(read_image(tmp_path / "more.jpg"), to_pixels(Image.open(tmp_path / "rgb.jpg")))


def test_the_typical_side_is_the_median_and_only_headers_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(images_module, "read_image", lambda _: pytest.fail("decoded"))
    for i, side in enumerate((10, 12, 40)):
        (tmp_path / "val" / "a").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (50, side)).save(tmp_path / "val" / "a" / f"{i}.png")
    assert typical_side(open_images("folder", tmp_path, "val")) == typical_side(ImageFiles(tmp_path)) == 12
    assert typical_side(ImageArrays(np.zeros((3, 9, 7, 3), np.uint8), np.zeros(3, int))) == 7


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1"])
def test_images_of_any_mode_become_rgb(tmp_path, mode):
    save(tmp_path / "image.png", (255, 255, 255), mode)
    pixels, _ = ImageFiles(tmp_path)[0]
    assert pixels.shape == (3, 12, 20) and pixels.dtype == torch.uint8 and (pixels == 255).all()


@pytest.mark.parametrize("kind", ["missing", "empty", "file"])
def test_a_path_without_images_is_refused_by_name(tmp_path, kind):
    path = tmp_path / kind
    if kind == "empty":
        path.mkdir()
    if kind == "file":
        save(path.with_suffix(".png"))
        path = path.with_suffix(".png")
    for call in (ImageFiles, lambda path: open_images("folder", path)):
        with pytest.raises(UserError, match=f"^data_path: .*{path.name}"):
            call(path)


# Images in memory


@pytest.fixture
def cached(tmp_path):
    """(image files, the same images cached): five of different sizes."""
    rng = np.random.default_rng(0)
    for i in range(5):
        Image.fromarray(rng.integers(0, 256, (8 + i, 11, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    files = ImageFiles(tmp_path)
    memory = tmp_path / "memory"
    images = CachedImages(files, [image_size(path) for path in files.paths], str(memory))
    memory.unlink()
    return files, images


def test_cached_images_equal_the_files_and_are_read_once(cached, monkeypatch):
    files, images = cached
    expected = [files[i][0] for i in range(5)]
    for _ in range(2):
        assert len(images) == 5 and all(torch.equal(images[i][0], expected[i]) and images[i][1] == -1 for i in range(5))
        monkeypatch.setattr(images_module, "read_image", None)


def test_an_image_that_a_worker_reads_is_cached_for_all_processes(cached, monkeypatch):
    files, images = cached
    expected = [files[i][0] for i in range(5)]
    loader = training_loader(images, MultiCrop([8], [1], [0.5], [1.0]), 5, workers=2, crop_only=True)
    assert len(list(loader)) == 1
    monkeypatch.setattr(images_module, "read_image", None)
    assert all(torch.equal(images[i][0], expected[i]) for i in range(5))


def test_the_size_of_a_cache_is_known_in_advance(cached):
    files, images = cached
    needed, allowed = cache_bytes(files)
    assert needed == sum(3 * 11 * (8 + i) for i in range(5)) == images.ends[-1] - 5 and allowed > 2**20
    assert cache_bytes(files, share=1e-9) == (needed, pytest.approx(allowed * 4e-9, abs=10))
    assert cache_bytes(ImageArrays(np.zeros((3, 40, 40, 3), np.uint8), np.arange(3))) == (0, 0)


def test_a_cache_takes_its_share_of_what_control_groups_allow(cached, monkeypatch):
    monkeypatch.setattr(cache, "memory_left", lambda: 4000)
    assert cache_bytes(cached[0])[1] == 1000


def test_a_cache_leaves_workers_their_share_of_shared_memory(cached, monkeypatch):
    monkeypatch.setattr(cache, "shared_memory_left", lambda: 4000)
    assert [cache_bytes(cached[0], 0.8, needed)[1] for needed in (0, 1000, 3900, 5000)] == [3200, 3000, 100, 0]


def test_a_system_without_shared_memory_has_no_cache(cached, monkeypatch):
    monkeypatch.setattr(cache, "shared_memory_left", lambda: math.inf)
    assert cache_bytes(cached[0])[1] == 0 and sizes_to_cache(cached[0], "auto") is None
    with pytest.raises(UserError, match="^--cache ram: expected at most 0.0 GiB"):
        sizes_to_cache(cached[0], "ram")


def test_a_fingerprint_tells_sets_by_their_relative_paths(tmp_path):
    def prints(name, *files):
        for file in files:
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            save(tmp_path / name / file)
        return fingerprint(ImageFiles(tmp_path / name))

    first = prints("one", "a/1.png", "a.png", "b/2.png")
    assert first == {"images": 3, "paths": hashlib.sha256(b"a.png\0a/1.png\0b/2.png").hexdigest()}
    assert prints("two", "b/2.png", "a.png", "a/1.png") == first  # another place, the same images
    assert prints("three", "a/1.png", "a.png", "b/3.png")["paths"] != first["paths"]
    assert prints("four", "a/1.png")["images"] == 1
    files = ImageFiles(tmp_path / "one")
    (tmp_path / "memory").touch()
    assert (
        fingerprint(CachedImages(files, [image_size(path) for path in files.paths], str(tmp_path / "memory"))) == first
    )


def test_a_fingerprint_of_images_in_memory_is_that_of_their_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (1500, 4, 5, 3), dtype=np.uint8)
    first = fingerprint(ImageArrays(pixels, np.arange(1500)))
    transposed = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)
    assert fingerprint(ImageArrays(transposed, np.zeros(1500))) == first and first["images"] == 1500
    pixels[-1, -1, -1, -1] ^= 1
    assert fingerprint(ImageArrays(pixels, np.arange(1500))) != first


def test_images_that_do_not_fit_into_memory_are_not_cached(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cache, "cache_bytes", lambda images, share, for_workers: (2**40, 2**33))
    run_training(images, tmp_path, "--epochs", "1")
    assert "cached in memory" not in capsys.readouterr().out
    message = "^--cache ram: expected at most 8.0 GiB .* got about 1024.0; write --cache off"
    with pytest.raises(UserError, match=message):
        run_training(images, tmp_path, "--cache", "ram")
    allowed = 10 * 20 * 24 * 3 - 1  # the estimate is too low: then the sizes of all images decide
    monkeypatch.setattr(cache, "cache_bytes", lambda images, share, for_workers: (1, allowed))
    assert sizes_to_cache(open_images("folder", images), "auto") is None
    monkeypatch.setattr(cache, "cache_bytes", lambda images, share, for_workers: (1, allowed + 1))
    assert sizes_to_cache(open_images("folder", images), "auto") == [(24, 20)] * 10


# Folders with labels


@pytest.fixture
def labelled(tmp_path):
    """train/ with 2 + 1 images of the classes cat and dog, val/ with 1 + 1."""
    for name in ("train/cat/0.png", "train/cat/1.png", "train/dog/0.png", "val/cat/0.png", "val/dog/0.png"):
        save(tmp_path / name)
    return tmp_path


def test_pretraining_on_a_folder_with_splits_takes_only_its_train_folder(labelled):
    assert len(open_images("folder", labelled)) == 3
    assert len(open_images("folder", labelled / "train")) == 3
    (labelled / "val").rename(labelled / "other")
    assert len(open_images("folder", labelled)) == 5


@pytest.mark.parametrize("below", ["", "train", "train/"])
def test_labelled_splits_are_found_from_the_folder_and_from_its_train_folder(labelled, below):
    for split, expected in (("train", [0, 0, 1]), ("val", [0, 1])):
        images = open_images("folder", f"{labelled}/{below}", split)
        assert [label for _, label in images] == expected and images.classes == ["cat", "dog"]
        assert images[0][0].shape == (3, 12, 20)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_missing_split_or_one_without_class_folders_is_refused(labelled, split):
    (labelled / split).rename(labelled / "other")
    with pytest.raises(UserError, match=f"^data_path: .*{split}"):
        open_images("folder", labelled, split)
    save(labelled / split / "flat.png")
    with pytest.raises(UserError, match=f"^data_path: .*{split}"):
        open_images("folder", labelled, split)


# Named sets


def write_fashion_mnist(folder):
    """Write the four files, with 6 training and 3 validation images; returns {prefix: (pixels, labels)}."""
    rng, contents = np.random.default_rng(0), {}
    for prefix, count in (("train", 6), ("t10k", 3)):
        pixels = rng.integers(0, 4, (count, 28, 28), dtype=np.uint8)
        labels = rng.integers(0, 10, count, dtype=np.uint8)
        images_header = struct.pack(">iiii", 2051, count, 28, 28)
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images_header + pixels.tobytes()))
        labels_header = struct.pack(">ii", 2049, count)
        (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels_header + labels.tobytes()))
        contents[prefix] = pixels, labels
    return contents


@pytest.mark.parametrize("split, prefix", [("pretrain", "train"), ("train", "train"), ("val", "t10k")])
def test_fashion_mnist_is_read_from_its_four_files(tmp_path, split, prefix):
    pixels, labels = write_fashion_mnist(tmp_path)[prefix]
    images = open_images("fashion_mnist", tmp_path, split)
    assert len(images) == len(pixels)
    for index, (image, label) in enumerate(images[i] for i in range(len(images))):
        assert label == labels[index] and np.array_equal(image, np.repeat(pixels[index][None], 3, axis=0))


CORRUPT = {
    "no gzip": lambda content: b"no gzip",
    "empty": lambda content: b"",
    "truncated": lambda content: content[: len(content) // 2],
    "only a header": lambda content: gzip.compress(bytes(3)),
    "checksum": lambda content: content[:-8] + bytes(8),
    "overwritten": lambda content: content[:40] + bytes(40) + content[80:],
    "part of an image": lambda content: gzip.compress(gzip.decompress(content)[:-5]),
}


@pytest.mark.parametrize("damage", CORRUPT)
def test_a_corrupt_fashion_mnist_file_is_named(tmp_path, damage):
    write_fashion_mnist(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(CORRUPT[damage](path.read_bytes()))
    with pytest.raises(UserError, match=f"^data_path: .*{path.name}"):
        open_images("fashion_mnist", tmp_path, "train")


def test_a_missing_fashion_mnist_file_is_named(tmp_path):
    write_fashion_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(UserError, match="^data_path: .*t10k-labels-idx1-ubyte.gz"):
        open_images("fashion_mnist", tmp_path, "val")


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "stl10", "fashion_mnist"])
@pytest.mark.parametrize("split", ["pretrain", "val"])
def test_a_missing_named_set_is_refused_without_a_download(tmp_path, dataset, split):
    with pytest.raises(UserError, match=f"^data_path: {dataset} is not in .*nowhere"):
        open_images(dataset, tmp_path / "nowhere", split)


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("dataset", ("imagenet", "somewhere")),
        ("split", ("shapes", None, "test")),
        ("data_path", ("folder",)),
        ("data_path", ("cifar10", None)),
    ],
)
def test_unknown_sets_unknown_splits_and_a_missing_path_are_refused_by_name(name, arguments):
    with pytest.raises(UserError, match=f"^{name}: "):
        open_images(*arguments)


# Shapes


def test_shapes_are_the_same_in_every_call_and_differ_by_split_and_index():
    assert all(np.array_equal(draw_shape("train", i)[0], draw_shape("train", i)[0]) for i in range(10))
    drawn = [draw_shape(split, i)[0].tobytes() for split in ("train", "val") for i in range(40)]
    assert len(set(drawn)) == 80


def test_the_first_shape_is_the_stored_one():
    # Means over squares of 16 pixels. Sines differ in the last bit between processors, so a few pixels differ by one
    # of 255 steps.
    stored = [
        [148.56, 131.51, 112.68, 102.80],
        [167.07, 163.49, 125.14, 135.73],
        [142.56, 154.52, 136.43, 131.55],
        [94.32, 122.37, 131.71, 139.95],
    ]
    image, label = draw_shape("train", 0)
    assert label == 0 and image.shape == (64, 64, 3) and image.dtype == np.uint8
    np.testing.assert_allclose(image.reshape(4, 16, 4, 16, 3).mean(axis=(1, 3, 4)), stored, rtol=0, atol=0.02)


@pytest.mark.parametrize("split, count", [("pretrain", 30), ("train", 30), ("val", 20)])
def test_shapes_are_small_colour_images_with_balanced_labels(monkeypatch, split, count):
    assert all(full % len(shapes.SHAPES_CLASSES) == 0 for full in shapes.SHAPES_COUNTS.values())
    monkeypatch.setattr(shapes, "SHAPES_COUNTS", {"train": 30, "val": 20})
    images = open_images("shapes", split=split)
    assert images.pixels.shape == (count, 64, 64, 3) and images.pixels.dtype == np.uint8
    assert np.bincount(images.labels).tolist() == [count // 10] * 10 and len(images.classes) == 10
    image, label = images[3]
    assert image.shape == (3, 64, 64) and label == images.labels[3]
    expected, _ = draw_shape("val" if split == "val" else "train", 3)
    assert np.array_equal(image.permute(1, 2, 0), expected)


# Lists of paths


@pytest.fixture
def listed(tmp_path):
    """A folder with set/a.png, "set/b c.png", set/d.png and a function that writes a list of bytes beside it."""
    for name in ("a", "b c", "d"):
        save(tmp_path / "set" / f"{name}.png")

    def write(content, name="list.txt"):
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    return write


@pytest.mark.parametrize(
    "content",
    [
        b"set/d.png\nset/a.png\nset/b c.png\n",
        b"\n./set/a.png\n.//set/d.png\n\nset/b c.png",
        b"\xef\xbb\xbfset/a.png\r\nset/b c.png\r\nset/d.png\r\n",
        "\ufeffset/a.png\r\nset/b c.png\r\nset/d.png\r\n".encode("utf-16-le"),
        b"set/a.png\tdog\nset/b c.png\t1\nset/d.png\ta label with spaces\n",
        b"{folder}/set/a.png\nset/b c.png\nset/d.png\n",
    ],
)
def test_a_list_of_a_folders_images_gives_the_images_of_the_folder(content, listed, tmp_path):
    path = listed(content.replace(b"{folder}", os.fsencode(tmp_path)))
    images, folder = open_images("folder", path), ImageFiles(tmp_path / "set")
    assert list(images.paths) == list(folder.paths)
    assert all(torch.equal(images[i][0], folder[i][0]) and images[i][1] == -1 for i in range(3))
    assert fingerprint(images)["paths"] == hashlib.sha256(b"set/a.png\0set/b c.png\0set/d.png").hexdigest()


def test_a_list_of_paths_in_any_encoding_and_without_endings(listed, tmp_path):
    for name in (b"\xff\xfe", b"\xe9t\xe9.png", "雪".encode()):
        os.link(tmp_path / "set" / "a.png", os.fsencode(tmp_path / "set") + b"/" + name)
    images = ImageFiles(listed(b"set/\xff\xfe\nset/\xe9t\xe9.png\nset/\xe9\x9b\xaa\n"))
    names = [os.fsencode(path).rpartition(b"/")[2] for path in images.paths]
    assert names == [b"\xe9t\xe9.png", "雪".encode(), b"\xff\xfe"]
    assert all(images[i][0].shape == (3, 12, 20) for i in range(3))


def test_missing_files_of_a_list_are_bad_images(listed, tmp_path):
    images = ImageFiles(listed(b"set/a.png\nset/none.png\n/nowhere/0.png\n"))
    assert typical_side(images) == 12
    for index in (0, 2):
        with pytest.raises(UnreadableImage, match="No such file or directory"):
            images[index]
    assert images_module.new_bad_images(images) == [
        ("/nowhere/0.png", "No such file or directory"),
        (f"{tmp_path}/set/none.png", "No such file or directory"),
    ]
    message = (
        "^data_path: .*/list.txt: .*/0.png is not there, nor is any other of 100 files looked for; a list has a path"
    )
    with pytest.raises(UserError, match=message):
        ImageFiles(listed(b"".join(b"%d.png\n" % i for i in range(1000))))


@pytest.mark.parametrize(
    "content, labelled, message",
    [
        (b"\n \n", False, "list.txt is empty; expected a path a line"),
        (b"set/a.png\0set/d.png\0", False, "line 1: expected text, got a zero byte; a list has a path a line"),
        (b"set/d.png\nset/a.png 3\n", False, "line 2: expected a TAB before the label, got set/a.png 3"),
        (b"set/a.png\t1\nset/d.png\n", True, "line 2: expected a TAB and a label after the path, got set/d.png"),
        (b"set/a.png\t\n", True, "line 1: expected a TAB and a label after the path"),
    ],
)
def test_a_list_that_cannot_be_used_is_refused_by_its_line(content, labelled, message, listed):
    with pytest.raises(UserError, match=f"^data_path: .*{message}"):
        ImageFiles(listed(content), labelled=labelled)


def test_lists_with_labels_are_the_splits_of_a_folder(listed, tmp_path, capsys):
    listed(b"set/d.png\t10\nset/a.png\t9\nset/b c.png\t9\n", "train.txt")
    listed(b"set/a.png\t10\nset/d.png\t9\n", "valid.txt")
    train_images, val_images = open_splits("folder", str(tmp_path), 1)
    assert train_images.classes == val_images.classes == ["9", "10"]  # numbers, not text
    assert [label for _, label in train_images] == [0, 0, 1] and [label for _, label in val_images] == [1, 0]
    assert [label for _, label in open_images("folder", tmp_path / "train.txt", "val")] == [1, 0]
    capsys.readouterr()
    assert len(open_images("folder", tmp_path)) == 3
    assert "holds train.txt and valid.txt: training uses train.txt alone" in capsys.readouterr().out
    listed(b"set/a.png\n", "valid.txt")
    with pytest.raises(UserError, match="valid.txt, line 1: expected a TAB and a label"):
        open_images("folder", tmp_path, "val")


def test_classes_of_images_for_training_on_a_list_are_its_labels(listed):
    """Not the first folder of their paths."""
    images = open_images("folder", listed(b"set/a.png\tcat\nset/d.png\nset/b c.png\tgolden retriever\n"))
    assert [class_of(images, i) for i in range(3)] == ["cat", "golden retriever", None] and images[0][1] == -1
    images = open_images("folder", listed(b"set/a.png\n"))
    assert class_of(images, 0) is None


def test_a_run_on_a_list_equals_that_on_the_folder(images, tmp_path, capsys):
    names = sorted((images / "train").rglob("*.png"))
    (tmp_path / "cats and dogs.txt").write_text("".join(f"{name}\t{name.parent.name}\n" for name in names))
    expected = run_training(images / "train", tmp_path / "a", "--epochs", "1")
    found = run_training(tmp_path / "cats and dogs.txt", tmp_path / "b", "--epochs", "1")
    assert_same(found["state_dict"], expected["state_dict"])
    assert f"data: 10 images (folder, {tmp_path}/cats and dogs.txt" in capsys.readouterr().out


# A Dataset from Python


class Given(torch.utils.data.Dataset):
    """The training images of a folder, as somebody's own Dataset. kind: of its items. bad: an index with an error."""

    def __init__(self, folder, kind="PIL", bad=None):
        self.paths, self.kind, self.bad = sorted(Path(folder).rglob("*.png")), kind, bad

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        if index == self.bad:
            raise OSError("image file is truncated")
        image = Image.open(self.paths[index])
        array = np.asarray(image)
        return {
            "PIL": (image, "a label of any kind"),
            "alone": image,
            "numpy": (array, 3),
            "tensor": (torch.from_numpy(array.copy()).permute(2, 0, 1), 3, "more"),
            "random": (np.random.default_rng().integers(0, 256, array.shape, dtype=np.uint8), 3),
        }[self.kind]


def train_on(dataset, dump, *more):
    args = train.parse_args([*TINY, "--dataset", "python", "--dump_path", str(dump), *more])
    train.main(args, images=dataset)
    return torch.load(dump / "checkpoint.pth", weights_only=True)


@pytest.mark.parametrize("kind", ["PIL", "alone", "numpy", "tensor"])
def test_items_of_a_dataset_from_python(kind, images):
    files, given = ImageFiles(images / "train"), GivenImages(Given(images / "train", kind))
    assert len(given) == 10 and all(torch.equal(given[i][0], files[i][0]) and given[i][1] == -1 for i in range(10))
    assert typical_side(given) == 20 and given.size_of(0) == (24, 20)
    assert fingerprint(given) == fingerprint(GivenImages(Given(images / "train", "numpy")))
    assert torch.equal(pickle.loads(pickle.dumps(given))[3][0], files[3][0])


def test_grey_numpy_items_become_rgb():
    values = np.arange(12, dtype=np.uint8).reshape(3, 4)
    for array in (values, values[..., None]):
        assert all(np.array_equal(channel, values) for channel in GivenImages([array, array])[0][0])


def test_a_run_on_a_dataset_from_python_equals_that_on_its_files_and_resumes(images, tmp_path, capsys):
    expected = run_training(images / "train", tmp_path / "a", "--cache", "off", "--epochs", "2")
    options = "--cache", "ram", "--epochs", "2", "--workers", "2"
    found = train_on(Given(images / "train"), tmp_path / "b", *options)
    assert_same(found["state_dict"], expected["state_dict"])
    out = capsys.readouterr().out
    assert "data: 10 images (python, Given from Python)" in out and "--cache ram has no effect as sizes" in out
    (tmp_path / "b" / "checkpoint.pth").unlink()
    os.replace(tmp_path / "b" / "checkpoints" / "ckp-2.pth", tmp_path / "b" / "checkpoint.pth")
    longer = train_on(Given(images / "train", "tensor"), tmp_path / "b", "--epochs", "3")
    assert longer["epoch"] == 3
    with pytest.raises(UserError, match=r"holds an unfinished run with other options \(images 10 .* -> 6 "):
        train_on(Given(images / "val"), tmp_path / "b")


def test_options_follow_from_a_dataset_from_python(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = train.parse_args("--dataset python --arch resnet18 --epochs 1 --device cpu --workers 0".split())
    assert args.dump_path == "runs/python" and args.size_crops is None
    train.check_args(args)
    given = GivenImages(Given(images / "train"))
    settings, reasons = train.resolve_options(args, given, 1)
    assert settings["options"]["size_crops"] and "20" in " ".join(reasons.values())
    assert settings["images"] == fingerprint(given) and settings["options"]["dataset"] == "python"


def test_a_bad_item_is_counted_and_another_one_takes_its_place(images, tmp_path):
    train_on(Given(images / "train", bad=4), tmp_path, "--epochs", "1", "--workers", "2", "--log_freq", "1")
    assert (tmp_path / "bad_images.txt").read_text() == "image file is truncated\titem 4\n"
    with pytest.raises(RunStopped, match="^1 of 10 images cannot be read, .*: item 4 .image file is truncated"):
        train_on(Given(images / "train", bad=4), tmp_path / "b", "--max_bad_images", "0", "--log_freq", "1")


def test_an_item_that_cannot_be_downloaded_is_a_bad_image(tmp_path):
    class Remote(list):
        def __getitem__(self, index):
            raise URLError(OSError("no route to host"))  # whose reason is no text

    images = GivenImages(Remote([0]))
    with pytest.raises(UnreadableImage, match="^images: cannot read item 0: .*no route to host"):
        images[0]
    assert BadImages(images, folder=tmp_path).update() == 1
    assert (tmp_path / "bad_images.txt").read_text() == "<urlopen error no route to host>\titem 0\n"


def test_an_image_that_pillow_cannot_convert_is_a_bad_image():
    with pytest.raises(UnreadableImage, match="^images: cannot read item 0: conversion from La "):
        GivenImages([Image.new("La", (9, 9))])[0]


def test_items_that_differ_between_calls_have_no_checksum(images, capsys):
    print_of = fingerprint(GivenImages(Given(images / "train", "random")))
    assert print_of == {"images": 10, "paths": hashlib.sha256(b"").hexdigest()}
    assert "images: items differ from one call to the next" in capsys.readouterr().out


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter([Image.new("RGB", (9, 9))])


@pytest.mark.parametrize(
    "dataset, message",
    [
        (Stream(), "expected a Dataset with __len__ and __getitem__, .* got Stream; for a stream, write its images to"),
        (iter([]), "expected a Dataset with __len__ and __getitem__, .* got list_iterator"),
        ([], "expected a Dataset with images, got an empty list"),
        ([torch.zeros(3, 9, 9)], r"expected items .* got Tensor torch.float32 \[3, 9, 9\] in item 0; leave out transf"),
        ([np.zeros((9, 9, 4), np.uint8)], r"expected items .* got ndarray uint8 \[9, 9, 4\] in item 0"),
        ([np.zeros(9, np.uint8)], r"expected items .* got ndarray uint8 \[9\] in item 0"),
        ([{"image": 1}], "expected items .* got dict in item 0"),
    ],
)
def test_a_dataset_that_cannot_be_used_is_refused(dataset, message, tmp_path):
    with pytest.raises(UserError, match=f"^images: {message}"):
        train_on(dataset, tmp_path / "run")


def test_a_dataset_and_dataset_python_need_each_other(images, tmp_path):
    message = (
        "^--dataset: expected python with a Dataset from Python, and only then, got {} one; write train.main.train."
    )
    for words, given, got in (([], Given(images), "shapes with"), (["--dataset", "python"], None, "python without")):
        with pytest.raises(UserError, match=message.format(got)):
            train.main(train.parse_args([*TINY, *words, "--dump_path", str(tmp_path)]), images=given)
    with pytest.raises(UserError, match="^--data_path: expected none for --dataset python, got "):
        train_on(Given(images), tmp_path, f"--data_path={images}")
    with pytest.raises(UserError, match="^data_path: training had its images from Python; name images"):
        open_images("python", None, "train")


def test_a_step_of_a_run_on_a_dataset_from_python_is_replayed_with_it(images, tmp_path, capsys):
    with pytest.raises(RunStopped, match="nan|inf"):
        train_on(Given(images / "train"), tmp_path, "--base_lr", "1e30", "--log_freq", "1")
    path = tmp_path / "bad_step-0.pth"
    with pytest.raises(UserError, match=f'^--replay: .*"--replay", "{path}"\\]\\), images=dataset'):
        train.main(train.parse_args(["--replay", str(path), "--device", "cpu"]))
    train.main(train.parse_args(["--replay", str(path), "--device", "cpu"]), images=Given(images / "train"))
    assert "first bad tensor: " in capsys.readouterr().out


def test_several_processes_train_on_a_dataset_from_python(images, tmp_path):
    program = f"""
import sys, torch
sys.path.insert(0, {str(ROOT)!r})
import train
from torchvision.datasets import ImageFolder
words = {[*TINY, "--epochs", "1", "--dataset", "python"]!r} + ["--batch_size", "2", "--dump_path", sys.argv[1]]
train.main(train.parse_args(words), images=ImageFolder(sys.argv[2]))
"""
    (tmp_path / "mine.py").write_text(program)
    result = forked_ranks(2, tmp_path / "mine.py", tmp_path / "run", images / "train")
    assert result.returncode == 0, result.stderr
    expected = train_on(Given(images / "train"), tmp_path / "one", "--epochs", "1")
    two = torch.load(tmp_path / "run" / "checkpoint.pth", weights_only=True)
    assert two["images"] == expected["images"] and two["options"]["global_batch_size"] == 4
