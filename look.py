"""Write a page of pictures of a run: what it learned, whether it is a good one, and what its prototypes are.

    python look.py                       # the newest run in runs/
    python look.py runs/photos --open    # and open the page in a browser

RUN/look.html is one file, without network or server. Runs that still train can be looked at. Labels, where a set has a
validation split and so labels that mean something, only say what the pictures show; nothing is fitted to them.
"""

import argparse
import json
import os
import sys
import webbrowser
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset, Subset

import checkpoint
import page
import sections
from backbones import choose_sizes, load_backbone
from data import LEFT_OUT, CentreCrop, ordered_loader, to_uint8
from decode import shown
from exchange import load_head
from features import bf16_on_gpus, some_images
from images import GIVEN, check_data_path, fingerprint, has_validation_split, open_images, typical_side
from labels import class_of
from launch import OptionParser, UserError, log, number, positive_int, track
from machine import add_machine_options, choose_device, set_threads_and_workers, workers_that_fit
from processes import run_script
from run_log import kept_epochs, read_rows
from sections import Run, Seen

THUMB = 96  # side of the images that the page shows, in pixels
FEWEST = 3  # images that the page needs; with fewer there are no neighbours


def option_parser() -> OptionParser:
    parser = OptionParser(
        prog="look.py",
        usage="look.py [RUN] [options]",
        description="Write RUN/look.html: curves, crops, prototypes, nearest neighbours, a map of the images.\n"
        "Without RUN it takes the newest in runs/. Works on runs that still train.",
        epilog="--help-all shows the other options.",
    )
    parser.start_group("run and images", affects="nothing")
    parser.common.append(
        parser.group.add_argument("run", nargs="?", help="The folder of a run, that is its --dump_path.")
    )
    add = parser.add
    add("checkpoint", None, str, "Look at this kept epoch, or at this file.", common="N|FILE",
        default_text="checkpoint.pth of the run")  # fmt: skip
    add("data_path", None, str, "The images are in this folder now.", common="DIR", default_text="as in training")
    add("images", 2000, number(int, FEWEST), "Look at this many of them at most.", common="N")
    parser.start_group("page", affects="nothing")
    add("output", None, str, "Write the page to this file.", common="FILE", default_text="RUN/look.html")
    parser.common.append(parser.group.add_argument("--open", action="store_true", help="Open the page in a browser."))
    parser.start_group("machine", affects="nothing")
    add_machine_options(parser)
    add("batch_size", 128, positive_int, "images at a time")
    return parser


# Read the run


def find_run(name: str | None, chosen: str | None) -> tuple[Path, Path]:
    """(folder of the run, checkpoint to look at). Raises UserError."""
    folder = checkpoint.newest_checkpoint().parent if name is None else Path(name)
    if name is not None and folder.is_file():  # somebody named the checkpoint
        if chosen is not None:
            raise UserError(f"--checkpoint {chosen}: expected none with the file {shown(folder)}")
        return (folder.parent.parent if folder.parent.name == "checkpoints" else folder.parent), folder
    if not folder.is_dir():
        raise UserError(f"RUN: expected the folder of a run, got {shown(folder) if name else 'an empty name'}")
    if chosen is None:
        path = next((p for p in (folder / checkpoint.NEWEST, folder / checkpoint.PREVIOUS) if p.exists()), None)
        if path is None:
            raise UserError(f"RUN: expected a folder with checkpoint.pth, got {shown(folder)}; a run writes one after "
                            "its first epoch")  # fmt: skip
        return folder, path
    path = folder / "checkpoints" / f"ckp-{chosen}.pth" if chosen.isdecimal() else Path(chosen)
    if not path.is_file():
        kept = ", ".join(map(str, kept_epochs(folder))) or "none"
        raise UserError(f"--checkpoint: expected a file or a kept epoch of {shown(folder)} ({kept}), got {chosen}")
    return folder, path


def read_run(folder: Path, path: Path) -> Run:
    """Read what a run's folder holds. Raises UserError if that is no run."""
    try:
        contents = checkpoint.load_run(path)
    except UserError as error:
        message = str(error) if str(path) in str(error) else f"{shown(path)}: {error}"
        raise UserError(message) from None
    try:
        facts = json.loads((folder / "run.json").read_text(errors="replace"))
    except (OSError, ValueError):
        facts = {}
    rows = [row for row in read_rows(folder / "metrics.jsonl") if "epoch" in row]
    codes = [row for row in read_rows(folder / "codes.jsonl") if row.get("prototypes")]
    return Run(folder, path, contents, facts if isinstance(facts, dict) else {}, rows, codes)


def open_run_images(run: Run, data_path: str | None) -> tuple[Dataset | None, str]:
    """(the run's images, or None where they are gone; what to say of them). Raises UserError for a wrong data_path."""
    dataset, folder = run.options["dataset"], data_path or run.options["data_path"]
    try:
        images = open_images(dataset, folder, "pretrain", value_range=run.contents.get("value_range"))
    except UserError as error:
        if data_path:
            raise UserError(f"--{error}") from None
        return None, f"The images cannot be opened ({error}); --data_path DIR says where they are now."
    trained_on = run.contents.get("images")
    if trained_on and fingerprint(images) != trained_on:
        note = f"These are not the images of the training: {len(images):,} now, {trained_on['images']:,} then"
        return images, f"{note}, or other names. Pictures show the images of now."
    return images, ""


def labels_mean_something(dataset: str, data_path: str | None) -> bool:
    """Whether labels measure: of a named set, or where a validation split lies beside; not a set's own sorting."""
    return dataset not in ("folder", GIVEN) or (dataset == "folder" and has_validation_split(data_path or "."))


# Look at the images


@torch.no_grad()
def look_at_images(
    run: Run, images: Dataset, device: torch.device, *, most: int, batch_size: int, workers: int | str, labelled: bool
) -> Seen:
    """Pass at most `most` images through the network. Images that cannot be read are left out. Raises UserError."""
    options = run.options
    (head, prototypes), backbone = load_head(run.contents, run.path), load_backbone(run.path, None, run.contents)[0]
    backbone, head = (module.to(device).eval() for module in (backbone, head))
    prototypes = prototypes.weight.detach()  # [K, D]
    size, resize = choose_sizes(options, typical_side(images), is_folder=options["dataset"] == "folder")
    workers = workers_that_fit(set_threads_and_workers(workers, device), 12 * batch_size * size**2)
    chosen = some_images(len(images), most)
    loader = ordered_loader(Subset(images, chosen), CentreCrop(resize, size), batch_size, workers=workers)
    features, certainties, pixels, is_read = [], [], [], []
    for batch, labels in track(loader, f"looking at {len(chosen):,} images"):
        is_read.append(labels != LEFT_OUT)
        batch = batch[is_read[-1]]
        if not len(batch):
            continue
        pixels.append(to_uint8(F.interpolate(batch, (THUMB, THUMB), mode="bilinear", antialias=True)))
        with bf16_on_gpus(device):
            batch_features = backbone(batch.to(device, memory_format=torch.channels_last)).float()
            embeddings = F.normalize(head(batch_features).float(), dim=1).cpu()
        features.append(batch_features.cpu())
        certainties.append((embeddings @ prototypes.T / options["temperature"]).softmax(1))
    indices = [index for index, read in zip(chosen, torch.cat(is_read).tolist(), strict=True) if read]
    if len(indices) < FEWEST:
        raise UserError(f"only {len(indices)} of {len(chosen)} images can be read; python images.py DIR tells why")
    features = torch.cat(features)
    if not features.isfinite().all():
        raise UserError("the features are inf or nan: the network overflows")
    paths, root = getattr(images, "paths", None), getattr(images, "root", None)
    names = [f"image {i}" if paths is None else shown(os.path.relpath(paths[i], root)) for i in indices]
    classes = [class_of(images, i) if labelled else None for i in indices]
    pixels = torch.cat(pixels).permute(0, 2, 3, 1).numpy()
    return Seen(indices, names, classes, pixels, features, torch.cat(certainties), prototypes)


# The page


def read_bad_images(folder: Path) -> list[str]:
    """Lines of a run's bad_images.txt, as a message shows them: reason, path."""
    path = folder / "bad_images.txt"
    lines = path.read_bytes().splitlines() if path.exists() else []
    return [shown(os.fsdecode(line.replace(b"\t", b": "))) for line in lines]


SECTIONS = ("The run", "Training curves", "Crops", "Prototypes", "Balance", "Nearest neighbours", "Map",
            "How codes evolve", "Warnings")  # fmt: skip


def build_page(run: Run, images: Dataset | None, note: str, seen: Seen | None) -> str:
    """The page's HTML. note: what to say of the images; sections that need them say it if none were seen."""
    found = sections.find_warnings(run, seen, read_bad_images(run.folder))
    name = shown(run.folder.absolute().name)
    parts = [
        page.title(name),
        page.links(SECTIONS),
        sections.about(run, note, [said for said, _ in found]),
        sections.curves(run),
    ]
    if seen is None:
        parts += [page.section(title, note) for title in SECTIONS[2:7]]
    else:
        parts.append(sections.crops(run, images, seen.indices))
        parts += [part(seen) for part in (sections.prototypes, sections.balance, sections.neighbours)]
        log("drawing the map ...")
        parts.append(sections.feature_map(seen))
    parts.append(sections.evolution(run, seen, None if images is None else len(images)))
    parts.append(sections.warnings(found, seen is not None))
    return page.whole_page(f"{name}: SwAV", parts)


def check_args(args: argparse.Namespace) -> None:
    """Raise UserError, naming option, value and what is accepted."""
    if find_spec("matplotlib") is None:
        raise UserError("look.py draws with matplotlib: pip install matplotlib")
    if args.run == "" or args.output == "":
        raise UserError("RUN, --output: expected a name, got an empty one; leave it out for the default")
    if args.data_path is not None:
        check_data_path(args.data_path)
    if args.output and not Path(args.output).absolute().parent.is_dir():
        raise UserError(f"--output: expected a file in a folder that exists, got {args.output}")


def main(args: argparse.Namespace) -> Path:
    """Write the page and return its path. Raises UserError."""
    check_args(args)
    folder, path = find_run(args.run, args.checkpoint)
    output = Path(args.output) if args.output else folder / "look.html"
    device = choose_device(args.device)
    run = read_run(folder, path)
    images, note = open_run_images(run, args.data_path)
    seen = None
    if images is not None:
        labelled = labels_mean_something(run.options["dataset"], args.data_path or run.options["data_path"])
        options = dict(most=args.images, batch_size=args.batch_size, workers=args.workers, labelled=labelled)
        try:
            log(f"looking at {min(args.images, len(images)):,} of {len(images):,} images ...")
            seen = look_at_images(run, images, device, **options)
        except UserError as error:
            note = f"The images cannot be shown: {error}."
    content = build_page(run, images, note, seen).encode(errors="backslashreplace")
    unfinished = output.with_name(output.name + ".tmp")
    try:
        unfinished.write_bytes(content)
        os.replace(unfinished, output)
    except OSError as error:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise UserError(f"--output: cannot write {shown(output)}: {error.strerror}") from None
    log(f"written to {shown(output)}, {len(content) / 2**20:.1f} MB")
    if args.open and not webbrowser.open(output.absolute().as_uri()):
        log("no browser found; open the file yourself")
    return output


if __name__ == "__main__":
    run_script(lambda: main(option_parser().parse_args(sys.argv[1:])))
