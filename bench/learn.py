"""What SwAV learns from real images in the minutes of one core, beside other methods in the same minutes.

Our runs are train.py with derived defaults (or --settings), then eval_linear.py --cached. Then each peer trains the
same network on one thread for as many seconds as our run with the same seed took: with labels, which is the ceiling,
and by lightly's SimCLR and SwAV where lightly is installed. Runs that have a result are not repeated. Draws
learn.png if matplotlib is installed.
"""

from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean

import torch

from bench.collapse import results, run_of_setting
from bench.peers import PEERS, PeerRun, do_peer
from bench.sets import dataset_options
from monitor import QUALITY

PHOTOGRAPHS = "--arch resnet18 --width 32 --blocks 1 1 1 1 --hidden_mlp 512 --device cpu --workers 0"
OTHERS = "--arch resnet18 --width 16 --blocks 1 1 1 1 --hidden_mlp 256 --device cpu --workers 0"
# set: (epochs, options of the network); 5 to 25 minutes on one Zen 5 core
SETS = {
    "imagenette64": (20, PHOTOGRAPHS),
    "imagenette64_4000": (33, PHOTOGRAPHS),
    "imagenette64_1000": (100, PHOTOGRAPHS),
    "cifar10": (14, PHOTOGRAPHS),
    "cifar10_4000": (60, PHOTOGRAPHS),
    "fashion_mnist_1500": (12, OTHERS),
    "fashion_mnist_60000": (12, OTHERS),
    "shapes": (20, OTHERS),
    "patches": (12, OTHERS),
    "mnist_1440": (30, OTHERS),
}
BASELINES = {
    "random init": "random init, BatchNorm untouched",
    "random init, BN": "random init, BatchNorm of the training images",
    "raw pixels": "raw pixels",
}
# heading: key of a result
COLUMNS = {
    "kNN": "knn", "linear": "linear", "loss/ln K": "loss_per_ln_k", "RankMe": "rankme", "LiDAR": "lidar",
    "unique": "unique_prototypes", "agreement": "neighbour_agreement", "trivial R2": "trivial_r2", "seconds": "seconds",
}  # fmt: skip


def run(
    device: torch.device,
    *,
    sets: Sequence[str] | None = None,
    settings: Sequence[str] | None = None,
    peers: Sequence[str] = tuple(PEERS),
    seeds: Sequence[int] = (1,),
    jobs: int = 2,
    photographs: Path | None = None,
    dump_path: Path | None = None,
) -> list[dict]:
    """Do the runs that have no result yet, `jobs` at a time on a thread each, and print the tables. Return the rows.

    settings: of collapse.SETTINGS. peers: of PEERS; those of a missing package are left out. photographs: see
    sets.check_sets. With more jobs than free cores, seconds mean less.
    """
    dump_path, settings = dump_path or Path("runs/learn"), settings or ("derived",)
    if any(name.startswith("lightly") for name in peers) and find_spec("lightly") is None:
        print("learn: lightly's methods are left out: pip install lightly")
        peers = [name for name in peers if not name.startswith("lightly")]
    rows = []
    for name in sets or SETS:
        epochs, network = SETS[name]
        options = dataset_options(name, dump_path / "sets", photographs)
        print(f"\n{name}, {epochs} epochs\n{'method':28s} {'seed':>4s} " + cells(COLUMNS), flush=True)
        ours = [(setting, seed) for setting in settings for seed in seeds]
        folders = {case: dump_path / name / case[0].replace(" ", "_") / str(case[1]) for case in ours}
        runs = [
            run_of_setting(setting, options, epochs, seed, folders[setting, seed], network) for setting, seed in ours
        ]
        rows += show(name, ours, results(runs, jobs, 1))
        show_baselines(row for row in rows if row["set"] == name)
        theirs = [(peer, seed) for peer in peers for seed in seeds]
        beside = [folders[settings[0], seed] for _, seed in theirs]  # in the folder of the run whose seconds it gets
        runs = [
            PeerRun(*case, folder, folder / case[0].replace(" ", "_"))
            for case, folder in zip(theirs, beside, strict=True)
        ]
        rows += show(name, theirs, results(runs, jobs, 1, do_peer))
    print_correlations(rows)
    if find_spec("matplotlib") is None:
        print("learn: no chart, as matplotlib is not installed")
    else:
        draw(rows, dump_path / "learn.png")
    return rows


# Tables


def cells(values: Iterable[str | float | None]) -> str:
    """Return the cells of a row, 10 characters each."""
    texts = (value if isinstance(value, str) else "-" if value is None else f"{value:.3g}" for value in values)
    return " ".join(f"{text:>10s}" for text in texts)


def show(name: str, cases: Sequence[tuple[str, int]], done: Iterable[dict]) -> list[dict]:
    """Print a line for each result of (method, seed) as it comes. Return the rows."""
    rows = []
    for (method, seed), result in zip(cases, done, strict=True):
        rows.append({"set": name, "method": method, "seed": seed, **result})
        collapsed = "  COLLAPSED" * result.get("collapsed", False)
        values = cells(result.get(key) for key in COLUMNS.values())
        print(f"{method:28s} {seed:4d} {values}{collapsed}", flush=True)
    return rows


def show_baselines(rows: Iterable[dict]) -> None:
    """Print what features have to beat: means over the runs of one set."""
    accuracies = [row["accuracies"] for row in rows if "accuracies" in row]
    for heading, name in BASELINES.items():
        known = [table[name] for table in accuracies if name in table]
        if known:
            means = (fmean(row[kind]["top1"] for row in known) for kind in ("knn", "linear"))
            print(f"{heading:28s}      {cells(means)}", flush=True)


def print_correlations(rows: Sequence[dict]) -> None:
    """Print the rank correlation of each label-free measure with kNN over our runs, by set and on average over sets."""
    measures = ("loss_per_ln_k", *QUALITY)
    by_set = {}
    for name in dict.fromkeys(row["set"] for row in rows):
        ours = [row for row in rows if row["set"] == name and row.get("lidar") is not None]
        if len(ours) > 2:
            by_set[name] = (
                [spearman([row[m] for row in ours], [row["knn"] for row in ours]) for m in measures],
                len(ours),
            )
    if not by_set:
        return
    print(f"\nrank correlation with kNN{'':8s} {'runs':>4s} " + cells(measures))
    for name, (values, count) in by_set.items():
        print(f"{name:32s} {count:4d} {cells(values)}")
    means = [fmean(column) for column in zip(*(values for values, _ in by_set.values()), strict=True)]
    print(f"{'mean':32s} {'':4s} {cells(means)}", flush=True)


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's rank correlation; values that are equal share their mean rank. 0 if one of the two is constant."""
    ranks = torch.stack([mean_ranks(torch.tensor(values, dtype=torch.double)) for values in (first, second)])
    return torch.corrcoef(ranks)[0, 1].nan_to_num().item()


def mean_ranks(values: torch.Tensor) -> torch.Tensor:
    """Return the ranks of values [N], from 0."""
    smaller, smaller_or_equal = ((op(values[None], values[:, None])).sum(1) for op in (torch.lt, torch.le))
    return (smaller + smaller_or_equal - 1) / 2


def draw(rows: Sequence[dict], path: Path) -> None:
    """Draw kNN by set and method, a bar for the mean and a dot for each seed, with the best baseline as a line."""
    from matplotlib.figure import Figure  # optional

    sets = list(dict.fromkeys(row["set"] for row in rows))
    figure = Figure(figsize=(3 * len(sets) + 1, 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(sets), squeeze=False)[0], sets, strict=True):
        found: dict[str, list[float]] = {}
        for row in rows:
            if row["set"] == name:
                found.setdefault(row["method"], []).append(row["knn"])
        baselines = [row["accuracies"][b]["knn"]["top1"] for row in rows if row["set"] == name and "accuracies" in row
                     for b in BASELINES.values() if b in row["accuracies"]]  # fmt: skip
        axes.bar(range(len(found)), [fmean(values) for values in found.values()], color="#9bb8d3")
        for i, values in enumerate(found.values()):
            axes.plot([i] * len(values), values, "o", color="#204060", markersize=4)
        if baselines:
            axes.axhline(max(baselines), color="#b04030", linestyle="--", label="best of random init and raw pixels")
        axes.set_xticks(range(len(found)), found, rotation=60, ha="right")
        axes.set(title=name, ylabel="kNN top-1 in %")
    axes.legend(loc="lower right", fontsize="small")
    figure.savefig(path, dpi=120)
    print(f"chart: {path}", flush=True)
