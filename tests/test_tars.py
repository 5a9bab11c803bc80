"""tars.py, and images.py on tar files: the same images as in a folder, labels of webdataset, the index, damage."""

import gzip
import io
import json
import os
import pickle
import subprocess
import tarfile
from itertools import product

import numpy as np
import pytest
import torch
from conftest import assert_same, run_training, without_times
from PIL import Image

import decode
import launch
import tars
from cache import CachedImages, sizes_to_cache
from data import CentreCrop, MultiCrop, UnreadableImage, start_epoch, training_loader
from decode import Member, read_image
from images import ImageFiles, check_folder, fingerprint, new_bad_images, open_images, open_splits, typical_side
from labels import class_of
from launch import RunStopped, UserError
from monitor import knn_images
from tars import open_tars


def png(seed=0, width=20, height=12):
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_tar(path, contents, **options):
    """Write a tar file of {name: bytes, or (type, target) for a link}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            if isinstance(content, tuple):
                member.type, member.linkname = content
                tar.addfile(member)
            else:
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def write_shards(folder, shards):
    """Put the images of a folder into tar files shards/0.tar, ..., in turn."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
    for number in range(2):
        write_tar(shards / f"{number}.tar", {name: (folder / name).read_bytes() for name in names[number::2]})
    return shards


def names_of(images):
    return [path.name for path in images.paths]


# The same images


def test_a_run_on_tar_files_equals_that_on_the_folder_bit_for_bit(images, tmp_path):
    shards = write_shards(images / "train", tmp_path / "shards")
    expected = run_training(images / "train", tmp_path / "a", "--cache", "off", "--epochs", "2")
    found = run_training(shards, tmp_path / "b", "--cache", "off", "--epochs", "2", "--workers", "2")
    for part in ("state_dict", "optimizer", "queue", "images"):
        assert_same(found[part], expected[part], part)
    assert without_times(tmp_path / "b") == without_times(tmp_path / "a")


def test_a_run_on_a_folder_resumes_on_tar_files_of_it(images, tmp_path):
    shards = write_shards(images / "train", tmp_path / "shards")
    expected = run_training(images / "train", tmp_path / "a", "--epochs", "4")
    run_training(images / "train", tmp_path / "b", "--epochs", "4", "--log_freq", "1")
    (tmp_path / "b" / "checkpoint.pth").unlink()
    os.replace(tmp_path / "b" / "checkpoints" / "ckp-2.pth", tmp_path / "b" / "checkpoint.pth")
    found = run_training(shards, tmp_path / "b", "--epochs", "4")
    assert_same(found["state_dict"], expected["state_dict"])


@pytest.fixture
def both(images, tmp_path):
    """The same ten images as a folder and as tar files."""
    return ImageFiles(images / "train"), ImageFiles(write_shards(images / "train", tmp_path / "shards"))


def test_images_in_tar_files_are_those_of_the_folder_in_its_order(both):
    folder, shards = both
    assert len(shards) == 10 and fingerprint(shards) == fingerprint(folder)
    assert names_of(shards) == [os.path.relpath(path, folder.root) for path in folder.paths]
    assert all(torch.equal(shards[i][0], folder[i][0]) and shards[i][1] == -1 for i in range(10))
    assert typical_side(shards) == typical_side(folder) == 20
    assert shards.paths[:2] == [f"{shards.root}/0.tar/cats/0.png", f"{shards.root}/1.tar/cats/1.png"]


def test_workers_read_tar_files_that_their_parent_has_opened(both):
    crops = []
    for images in both:
        images[0]
        options = dict(batch_size=2, workers=2, crop_only=True)
        loader = training_loader(images, MultiCrop([8], [1], [0.5], [1.0]), **options)
        crops.append(torch.cat([batch[0][0] for batch, _ in start_epoch(loader, 0)], dim=1))
    assert torch.equal(*crops)


def test_images_of_tar_files_are_cached(both, tmp_path):
    sizes = sizes_to_cache(both[1], "ram")
    cached = CachedImages(both[1], sizes, str(tmp_path / "memory"))
    assert sizes == sizes_to_cache(both[0], "ram") and fingerprint(cached) == fingerprint(both[0])
    for _ in range(2):
        assert all(torch.equal(cached[i][0], both[0][i][0]) for i in range(10))


def test_a_member_is_a_path_that_pickles(both):
    member = both[1].paths[3]
    again = pickle.loads(pickle.dumps(member))
    assert again == member and isinstance(again, Member) and vars(again) == vars(member)
    assert torch.equal(read_image(again), both[0][3][0])


# What a tar file holds


def test_names_of_all_kinds(tmp_path):
    contents = {f"./a/{'long' * 60}.png": png(1), "./b.PNG": png(2), "雪.png": png(3), "\udcff.png": png(4)}
    contents |= {"./.hidden.png": png(), "a/._b.png": png(), ".x/c.png": png(), "notes.txt": b"", "a/seg.npy": b"1"}
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = write_tar(tmp_path / f"{format}.tar", contents, format=format, errors="surrogateescape")
        images = ImageFiles(path)
        assert names_of(images) == [f"a/{'long' * 60}.png", "b.PNG", "雪.png", "\udcff.png"]
        assert all(images[i][0].shape == (3, 12, 20) for i in range(4))
        assert images.left_out == {".txt": 1, ".npy": 1}


def test_links_and_repeated_names(tmp_path):
    contents = {"early.png": (tarfile.SYMTYPE, "d/1.png"), "d/0.png": png(0), "d/1.png": png(1)}
    contents |= {"hard.png": (tarfile.LNKTYPE, "d/0.png"), "d/soft.png": (tarfile.SYMTYPE, "../d/1.png")}
    contents |= {"dead.png": (tarfile.SYMTYPE, "/etc/0.png")}
    path = write_tar(tmp_path / "a.tar", contents)
    with tarfile.open(path, "a") as tar:  # as tar --update does
        member = tarfile.TarInfo("d/0.png")
        member.size = len(png(5))
        tar.addfile(member, io.BytesIO(png(5)))
    images = ImageFiles(path)
    assert names_of(images) == ["d/0.png", "d/1.png", "d/soft.png", "early.png", "hard.png"]
    (tmp_path / "5.png").write_bytes(png(5))
    (tmp_path / "1.png").write_bytes(png(1))
    for i, seed in enumerate((5, 1, 1, 1, 5)):
        assert torch.equal(images[i][0], read_image(str(tmp_path / f"{seed}.png")))
    assert images.left_out == {"links to other places": 1}


def test_equal_names_in_several_tar_files_are_different_images(tmp_path):
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", {"0.png": png(number), "1.png": png(10 + number)})
    images = ImageFiles(tmp_path)
    assert [(path.name, os.path.basename(path.tar)) for path in images.paths] == [
        (name, f"{number}.tar") for name in ("0.png", "1.png") for number in range(3)
    ]
    assert len({images[i][0].numpy().tobytes() for i in range(6)}) == 6


def test_tar_files_beside_images_are_left_out(tmp_path):
    write_tar(tmp_path / "a.tar", {"0.png": png()})
    (tmp_path / "1.png").write_bytes(png())
    images = ImageFiles(tmp_path)
    assert len(images) == 1 and images.left_out == {".tar": 1}


@pytest.mark.parametrize(
    "contents, message",
    [
        ({"a.tar": {"a.txt": b""}}, "data_path: expected image files in .*a.tar, found none, but 1 .txt"),
        ({"a.tar": {}}, "data_path: expected image files in .*a.tar, found none$"),
        ({"below/a.tar": {"0.png": png()}}, "found none, but 1 .tar; name the folder of the .tar files, or .* itself$"),
    ],
)
def test_tar_files_without_images(contents, message, tmp_path):
    for name, files in contents.items():
        write_tar(tmp_path / name, files)
    with pytest.raises(UserError, match=message):
        ImageFiles(tmp_path)


# Labels


def test_labels_of_webdataset(tmp_path, capsys):
    for split, count in (("train", 6), ("val", 3)):
        for shard in range(2):
            samples = {}
            for i in range(count):
                samples |= {f"{i}{shard}.png": png(i), f"{i}{shard}.cls": b"%d\n" % (10 * (i % 3)), f"{i}.json": b"{}"}
            write_tar(tmp_path / split / f"{shard}.tar", samples)
    train_images, val_images = open_splits("folder", str(tmp_path), 1)
    assert train_images.classes == val_images.classes == ["0", "10", "20"]
    assert [train_images[i][1] for i in range(12)] == [0, 0, 1, 1, 2, 2] * 2
    assert f"left out in {tmp_path}/train/, as no images: 12 .json" in capsys.readouterr().out
    assert len(open_images("folder", tmp_path)) == 12 and open_images("folder", tmp_path)[0][1] == -1
    assert len(open_images("folder", tmp_path / "train", "val")) == 6


def test_labels_of_keys_with_several_dots(tmp_path):
    samples = {"a.b/0.seg.png": png(), "a.b/0.cls": b"dog", "a.b/1.png": png(), "a.b/1.cls": b"cat"}
    images = ImageFiles(write_tar(tmp_path / "a.tar", samples), labelled=True)
    assert images.classes == ["cat", "dog"] and [label for _, label in images] == [1, 0]


def test_labels_by_folders_and_tar_files_as_splits(tmp_path, capsys):
    for split in ("train", "test"):
        write_tar(tmp_path / f"{split}.tar", {f"./{name}/{split}.png": png() for name in ("cats", "dogs")})
    train_images, val_images = open_splits("folder", str(tmp_path), 1)
    assert train_images.classes == val_images.classes == ["cats", "dogs"]
    assert names_of(val_images) == ["cats/test.png", "dogs/test.png"] and [label for _, label in val_images] == [0, 1]
    capsys.readouterr()
    assert names_of(open_images("folder", tmp_path)) == ["cats/train.png", "dogs/train.png"]
    assert "holds train.tar and test.tar: training uses train.tar alone" in capsys.readouterr().out
    assert names_of(open_images("folder", tmp_path / "train.tar", "val")) == ["cats/test.png", "dogs/test.png"]


@pytest.mark.parametrize("samples", [{"0.png": png()}, {"0.png": png(), "1.png": png(), "1.cls": b"3"}])
def test_an_image_without_a_label_is_named(samples, tmp_path):
    write_tar(tmp_path / "val" / "a.tar", samples)
    with pytest.raises(UserError, match="^data_path: expected a .cls file .* found none for 0.png"):
        open_images("folder", tmp_path, "val")


def test_classes_of_images_for_training_are_those_of_the_labels(tmp_path):
    """Not the name of the tar file that an image lies in."""
    samples = {
        "train_img/0.png": png(),
        "train_img/0.cls": b"dog",
        "b/1.png": png(),
        "b/1.cls": b"cat",
        "c/2.png": png(),
    }
    images = open_images("folder", write_tar(tmp_path / "with.tar", samples))
    assert [class_of(images, i) for i in range(3)] == ["cat", None, "dog"] and images[0][1] == -1
    images = open_images(
        "folder", write_tar(tmp_path / "folders" / "0.tar", {"cats/0.png": png(), "1.png": png()}).parent
    )
    assert [class_of(images, i) for i in range(2)] == [None, "cats"]
    images = open_images("folder", write_tar(tmp_path / "flat.tar", {"0.png": png()}))
    assert class_of(images, 0) is None


def test_knn_while_training_on_tar_files(tmp_path):
    for split, number in product(("train", "val"), range(2)):
        samples = {
            f"{number}{i}.{end}": png(i) if end == "png" else b"%d" % (i % 2)
            for i in range(4)
            for end in ("png", "cls")
        }
        write_tar(tmp_path / split / f"{number}.tar", samples)
    images, val_images = (open_images("folder", tmp_path, split) for split in ("pretrain", "val"))
    (_, labels), (_, val_labels) = knn_images(images, val_images, CentreCrop(8, 8))
    assert labels.bincount().tolist() == val_labels.bincount().tolist() == [4, 4]


# The index


@pytest.fixture
def shards(tmp_path):
    """Two tar files of two images each."""
    for number in range(2):
        write_tar(tmp_path / "shards" / f"{number}.tar", {f"{number}{i}.png": png(i) for i in range(2)})
    return tmp_path / "shards"


@pytest.fixture
def built(monkeypatch):
    """The names of the tar files of which an index was built since."""
    found, build = [], tars._read_shard
    monkeypatch.setattr(tars, "_read_shard", lambda path: found.append(os.path.basename(path)) or build(path))
    return found


def test_the_index_is_built_once_and_again_for_what_has_changed(shards, built, capsys):
    first = ImageFiles(shards)
    assert built == ["0.tar", "1.tar"] and sorted(os.listdir(shards)) == [".swav-index.npz", "0.tar", "1.tar"]
    assert f"built the index of 2 tar file(s), kept in {shards}/.swav-index.npz" in capsys.readouterr().out
    assert [vars(path) for path in ImageFiles(shards).paths] == [vars(path) for path in first.paths]
    assert len(built) == 2 and capsys.readouterr().out == ""
    write_tar(shards / "1.tar", {"new.png": png()})
    write_tar(shards / "2.tar", {"3.png": png()})
    images = ImageFiles(shards)
    assert built[2:] == ["1.tar", "2.tar"] and names_of(images) == ["00.png", "01.png", "3.png", "new.png"]
    os.utime(shards / "0.tar", (1, 1))
    (shards / "2.tar").unlink()
    assert len(ImageFiles(shards)) == 3 and built[4:] == ["0.tar"]
    ImageFiles(shards / "0.tar")
    assert built[5:] == ["0.tar"] and (shards / ".0.tar.swav-index.npz").exists()


@pytest.mark.parametrize("content", [b"", b"no index", b"cut", b"other version"])
def test_an_index_that_cannot_be_read_is_built_again(content, shards, built, monkeypatch):
    path = shards / ".swav-index.npz"
    ImageFiles(shards)
    if content == b"other version":
        monkeypatch.setattr(tars, "INDEX_VERSION", 0)
    else:
        path.write_bytes(path.read_bytes()[:700] if content == b"cut" else content)
    assert len(ImageFiles(shards)) == 4 and len(built) == 4
    assert len(ImageFiles(shards)) == 4 and len(built) == 4


def test_an_index_is_built_again_where_other_formats_can_be_read(shards, built, monkeypatch):
    write_tar(shards / "1.tar", {"a.heic": png(), "b.png": png()})
    for endings, names in (((), ["00.png", "01.png", "b.png"]), ((".heic",), ["00.png", "01.png", "a.heic", "b.png"])):
        monkeypatch.setattr(tars, "readable_formats", lambda endings=endings: ((".png", *endings), ()))
        for _ in range(2):
            assert names_of(ImageFiles(shards)) == names
    assert built == ["0.tar", "1.tar"] * 2


def test_an_index_of_an_earlier_version_is_built_again(shards, built):
    """Version 1 did not tell which formats could be read."""
    ImageFiles(shards)
    with np.load(shards / ".swav-index.npz") as saved:
        arrays = dict(saved)
    about = json.loads(arrays["about"].tobytes())
    about = {"version": 1, "tars": about["tars"]}
    np.savez(shards / ".swav-index.npz", **arrays | {"about": np.frombuffer(json.dumps(about).encode(), np.uint8)})
    assert len(ImageFiles(shards)) == 4 and len(built) == 4


def test_an_index_that_cannot_be_kept_beside_the_tar_files(shards, built, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    files = [str(shards / "0.tar")]
    closed = str(tmp_path / "file" / "index.npz")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for _ in range(2):
        assert open_tars(files, closed).names == [b"00.png", b"01.png"]
    assert built == ["0.tar"] and f"kept in {tmp_path}/cache/swav/index-" in capsys.readouterr().out
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for _ in range(2):
        assert open_tars(files, closed).names == [b"00.png", b"01.png"]
    assert len(built) == 3 and "which cannot be kept: it is built at each start" in capsys.readouterr().out


def test_building_an_index_shows_its_progress(shards, monkeypatch, capsys):
    ticks = iter(range(0, 1000, 16))  # seconds; a line every 30
    monkeypatch.setattr(launch.time, "monotonic", lambda: next(ticks))
    open_tars([f"{shards}/{number}.tar" for number in range(2)], f"{shards}/index.npz")
    *lines, last, _ = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("data: building the index of 2 tar file(s): ") and lines[0].endswith("%, 2 images")
    assert last == "data: index of 2 tar file(s): 4 images"


# Compressed and damaged tar files


@pytest.mark.parametrize("name", ["a b.tar.gz", "a.tgz", "a.tar"])
def test_a_compressed_tar_file_is_refused_with_the_command_that_unpacks_it(name, tmp_path, monkeypatch):
    path = write_tar(tmp_path / "set" / "plain.tar", {"x/0.png": png()})
    (tmp_path / "set" / name).write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    messages = []
    for source in (tmp_path / "set" / name, tmp_path / "set"):
        with pytest.raises(UserError, match=f"^data_path: {source}.* is compressed, .*; unpack it: ") as raised:
            ImageFiles(source)
        messages.append(str(raised.value))
    monkeypatch.chdir(tmp_path)
    subprocess.run(messages[0].partition("unpack it: ")[2], shell=True, check=True, timeout=60)
    assert len(ImageFiles(name.partition(".")[0])) == 1


def test_a_tar_file_whose_first_name_looks_compressed(tmp_path):
    assert len(ImageFiles(write_tar(tmp_path / "a.tar", {"BZh.png": png()}))) == 1


def cut_to(path, size):
    path.write_bytes(path.read_bytes()[:size])


def test_a_last_image_that_is_cut_is_a_bad_image(shards, capsys):
    last = ImageFiles(shards).paths[3]
    cut_to(shards / "1.tar", last.offset + 100)
    images = ImageFiles(shards)
    assert f"{shards}/1.tar is cut short: its last image may not be readable" in capsys.readouterr().out
    assert len(images) == 4 and images[2][0].shape == (3, 12, 20)
    with pytest.raises(
        UnreadableImage, match=f"cannot read {last} as an image: the tar file ends within it, after 100 "
    ):
        images[3]
    assert new_bad_images(images) == [
        (last, f"the tar file ends within it, after 100 of its {last.size} bytes"),
    ]
    ImageFiles(shards)
    assert "is cut short" in capsys.readouterr().out  # also where the index was kept


@pytest.mark.parametrize("size, message", [(-300, "is cut short"), (-512, "has no end mark")])
def test_a_tar_file_that_is_cut_at_a_header(size, message, shards, capsys):
    second = ImageFiles(shards).paths[1]
    cut_to(shards / "0.tar", second.offset + size)
    assert names_of(ImageFiles(shards)) == ["00.png", "10.png", "11.png"]
    assert f"{shards}/0.tar {message}" in capsys.readouterr().out


def test_a_tar_file_that_shrinks_after_it_was_indexed(shards):
    images = ImageFiles(shards)
    cut_to(shards / "0.tar", 600)
    with pytest.raises(UnreadableImage, match="the tar file ends within it"):
        images[0]
    (shards / "1.tar").unlink()
    decode._opened_tar.cache_clear()
    with pytest.raises(UnreadableImage, match="1.tar/10.png: No such file or directory"):
        images[2]


DAMAGE = {
    "text": (lambda content, at: b"text " * 1000, "it is no tar file, or damaged"),
    "empty": (lambda content, at: b"", "it is no tar file, or damaged: empty file"),
    "a header": (
        lambda content, at: content[:at] + b"\1" * 100 + content[at + 100 :],
        "damaged: no header .* at byte ",
    ),
    "two by cat": (lambda content, at: content + content, "damaged: more follows its end mark"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_tar_file_is_named(name, shards):
    damage, message = DAMAGE[name]
    path = shards / "0.tar"
    second = ImageFiles(shards).paths[1]
    path.write_bytes(damage(path.read_bytes(), second.offset - 512))
    with pytest.raises(UserError, match=f"^data_path: cannot read {path}: .*{message}"):
        ImageFiles(shards)


def test_an_error_of_storage_is_tried_again_with_the_tar_file_opened_anew(shards, monkeypatch):
    images, pauses, opened = ImageFiles(shards), [], []
    expected, read, real = images[0][0], os.pread, decode.io.FileIO
    errors = [OSError(116, "Stale file handle")]
    monkeypatch.setattr(decode.time, "sleep", pauses.append)
    monkeypatch.setattr(decode.io, "FileIO", lambda path: opened.append(path) or real(path))

    def fails_once(*args):
        if errors:
            raise errors.pop()
        return read(*args)

    monkeypatch.setattr(os, "pread", fails_once)
    assert torch.equal(images[0][0], expected) and pauses == [1.0] and opened == [f"{shards}/0.tar"]


def test_a_run_stops_at_too_many_bad_images_in_tar_files(tmp_path):
    contents = {f"{i}.png": b"no image" if i < 3 else png(i) for i in range(12)}
    path = write_tar(tmp_path / "a.tar", contents)
    with pytest.raises(RunStopped, match="^3 of 12 images cannot be read, and --max_bad_images allows 2: .*a.tar/"):
        run_training(path, tmp_path / "run", "--max_bad_images", "2", "--log_freq", "1")
    lines = (tmp_path / "run" / "bad_images.txt").read_text().splitlines()
    assert sorted(line.rpartition("/")[2] for line in lines) == ["0.png", "1.png", "2.png"]


def test_tar_files_are_checked(shards, capsys):
    write_tar(shards / "2.tar", {"bad.png": b"no image", "a.png": png(), "link.png": (tarfile.LNKTYPE, "a.png")})
    assert check_folder(str(shards), workers=2) == 1
    out = capsys.readouterr().out
    assert f"{shards}: 7 image files; reading them all in 2 process(es)" in out and "formats: 6 PNG" in out
    assert f"  {shards}/2.tar/link.png is {shards}/2.tar/a.png" in out
    assert f"\t{shards}/2.tar/bad.png" in out
