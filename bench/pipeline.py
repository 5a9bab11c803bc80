"""The input pipeline: JPEG files to crops on one core, as a loader's worker does it, and augmentation on the device."""

import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image

from bench import published
from bench.measure import Times, fresh_process, measure, report, run_in, setup_process
from data import CroppedBatches, MultiCrop, SeededImages, augment, reuse_freed_memory
from decode import read_image
from images import ImageFiles

PHOTO, SMALL_PHOTO, JPEG_QUALITY = (500, 375), (160, 120), 89  # PHOTO takes about 110 KB, as the files of ImageNet do


def run(
    device: torch.device,
    *,
    repetitions: int = 15,
    threads: int = 1,
    batch_size: Sequence[int] | None = None,
    images: int = 32,
    size_crops: Sequence[int] | None = None,
    nmb_crops: Sequence[int] | None = None,
) -> dict[str, list[dict]]:
    """Measure both and print their tables. Return their rows as "crops" and "augment"."""
    multi_crop = MultiCrop(size_crops or [224, 96], nmb_crops or [2, 6], *published.SCALES)
    batch_sizes = batch_size or [64 if device.type == "cuda" else 16]
    print(
        f"\npipeline: files to crops on one core, {describe_crops(multi_crop)}, ms per image, files in the page cache"
    )
    print("published: Pillow and torchvision, crop by crop; workers: ours, all on the CPU; device: what is left to our")
    print("workers if the device augments; decode: floor. published runs in its own process, since only our workers")
    print("keep freed memory for reuse")
    crops, augmented = [], []
    with fresh_process() as theirs, fresh_process() as ours:
        processes = {"published": theirs, "workers": ours, "device": ours, "decode": ours}
        for width, height in (PHOTO, SMALL_PHOTO):
            with TemporaryDirectory() as folder:
                file_bytes = write_photos(Path(folder), images, width, height)
                print(f"{images} files of {width}x{height} pixels, {file_bytes / 1e3:.1f} KB on average", flush=True)
                rest = folder, multi_crop, batch_sizes[0]
                candidates = {
                    name: partial(run_in, process, load_folder, name, *rest) for name, process in processes.items()
                }
                times = measure(candidates, repetitions, torch.device("cpu"))
            times = {name: [seconds / images for seconds in values] for name, values in times.items()}
            ratios = [("published", "workers"), ("published", "device"), ("device", "decode")]
            row = report({"width": width, "height": height}, times, ratios, header=not crops, images=1)
            crops.append(row | {"file_bytes": file_bytes})
        print(f"\naugmentation on {device.type}, ms per batch; read+write: floor, read the crops and write the result")
        for size in batch_sizes:
            times = run_in(ours, augment_times, multi_crop, size, repetitions, threads, device)
            row = report({"B": size}, times, [("augment", "read+write")], header=not augmented, images=size)
            augmented.append(row)
    return {"crops": crops, "augment": augmented}


def describe_crops(multi_crop: MultiCrop) -> str:
    """Write the crops as "2x224 + 6x96"."""
    return " + ".join(f"{n}x{size}" for n, size in zip(multi_crop.nmb_crops, multi_crop.size_crops, strict=True))


def write_photos(folder: Path, count: int, width: int, height: int) -> float:
    """Write JPEG files with the spectrum of photographs, 1/f, in faint colours. Return their mean size in bytes."""
    rng = np.random.default_rng(0)
    frequencies = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)).clip(min=1 / width)
    for i in range(count):
        layers = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((4, height, width))) / frequencies, s=(height, width))
        layers /= layers.std(axis=(1, 2), keepdims=True)
        pixels = (128 + 50 * layers[:1] + 12 * layers[1:]).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels.transpose(1, 2, 0)).save(folder / f"{i:04}.jpg", quality=JPEG_QUALITY)
    return statistics.mean(path.stat().st_size for path in folder.iterdir())


def load_folder(candidate: str, folder: str, multi_crop: MultiCrop, batch_size: int) -> None:
    """Load all images of a folder once as a candidate does, in a process with one thread, like a loader's worker."""
    torch.set_num_threads(1)
    if candidate != "published":
        reuse_freed_memory()
    images = ImageFiles(folder)
    keys = [(0, index) for index in range(len(images))]
    if candidate == "published":
        crops = published.Crops(images.paths, multi_crop)
        for index in range(len(images)):
            crops[index]
    elif candidate == "workers":
        seeded = SeededImages(images, multi_crop)
        for key in keys:
            seeded[key]
    elif candidate == "device":
        batches = CroppedBatches(images, multi_crop)
        for start in range(0, len(keys), batch_size):
            batches.__getitems__(keys[start : start + batch_size])
    else:
        for path in images.paths:
            read_image(path)


def augment_times(
    multi_crop: MultiCrop, batch_size: int, repetitions: int, threads: int, device: torch.device
) -> Times:
    """Time the augmentation of a batch's crops on the device."""
    setup_process(threads, device)
    photos = torch.randint(256, (batch_size, 3, PHOTO[1], PHOTO[0]), dtype=torch.uint8)
    groups = multi_crop.crop(list(photos), [np.random.default_rng(i) for i in range(batch_size)])
    groups = [(pixels.to(device), torch.as_tensor(params).to(device)) for pixels, params in groups]
    out = [torch.empty(pixels.shape, device=device) for pixels, _ in groups]
    candidates = {
        "augment": lambda: [augment(*group) for group in groups],
        "read+write": lambda: [crops.copy_(pixels) for crops, (pixels, _) in zip(out, groups, strict=True)],
    }
    return measure(candidates, repetitions, device)
