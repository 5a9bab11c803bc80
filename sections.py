"""What a page of a run shows: one function for each section, from a Run and the images Seen, to HTML by page.py.

look.py reads a run and its images, and writes the page.
"""

from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.utils.data import Dataset

import page
from data import MultiCrop, UnreadableImage, augment, by_name, to_pixels, to_uint8
from decode import shown
from features import feature_std, some_images, unique_prototypes
from guard import CollapseGuard, describe_collapse, describe_slow, diagnose_collapse
from launch import as_command_line
from run_folder import is_running, read_lock
from run_log import find_peak, kept_epochs

PROTOTYPES, MOST_CERTAIN = 20, 10  # prototypes on the page, and images of each
QUERIES, NEIGHBOURS = 12, 8
CROPPED = 8  # images whose crops are shown
MAPPED = 1000  # images of the map, at most
EPOCHS, BANDS = 8, 8  # columns and prototypes of the flow picture; one colour for each band
DUPLICATE = 0.99  # cosine of two images' centred features from which on they are nearly the same
COLLAPSED_SPREAD = 0.2  # feature std below it: 0 if collapsed, 0.6 and more in healthy runs


class Run(NamedTuple):
    """What a run's folder holds. facts: run.json. rows: metrics.jsonl. codes: codes.jsonl. These may be empty."""

    folder: Path
    path: Path  # of the checkpoint that is looked at
    contents: dict  # of the checkpoint
    facts: dict
    rows: list[dict]
    codes: list[dict]

    @property
    def options(self) -> dict:
        return self.contents["options"]

    def epochs(self) -> list[float]:
        """Epochs done at each row, with a fraction."""
        # Epochs differ in steps if the run was resumed with another batch.
        steps = {row["epoch"]: row["step"] / row["epoch"] for row in self.rows if "epoch_loss" in row}
        images, batch = self.contents.get("images"), self.options.get("global_batch_size")
        if images and batch:
            newest = images["images"] // batch
        else:  # an older checkpoint
            newest = next(reversed(steps.values()), max((row["step"] for row in self.rows), default=1))
        return [row["step"] / steps.get(row["epoch"], newest) for row in self.rows]


class Seen(NamedTuple):
    """N images that were looked at, all on the CPU."""

    indices: list[int]  # in the set
    names: list[str]  # paths, or numbers
    classes: list[str | None]  # None without labels
    pixels: np.ndarray  # uint8 [N, H, W, 3], small
    features: torch.Tensor  # [N, F]
    certainties: torch.Tensor  # [N, K], softmax of the scores over the temperature
    prototypes: torch.Tensor  # [K, D], of unit length

    @property
    def has_labels(self) -> bool:
        return any(name is not None for name in self.classes)

    def figure(self, i: int, caption: str = "", what: str = "", kind: str = "") -> str:
        """Image i as a thumbnail."""
        label = "" if self.classes[i] is None else f", labelled {shown(self.classes[i])}"
        return page.thumbnail(self.pixels[i], f"{what}{self.names[i]}{label}", caption, kind)


# The run


def about(run: Run, note: str, warnings: Sequence[str]) -> str:
    """What was trained on what, with options and their reasons, machine, time, figures, warnings, best checkpoint."""
    lines = [*facts_of(run), *figures_of(run)]
    reasons = run.facts.get("options", {})
    options = [
        (f"--{name}", as_command_line({name: value}).partition(" ")[2], reasons.get(name, {}).get("reason", ""))
        for name, value in run.options.items()
        if value not in (None, [])
    ]
    parts = [page.table(lines), page.paragraph(f"Which checkpoint is best? {best_checkpoint(run)}")]
    if not run.facts:
        parts.append(page.paragraph("run.json is missing: machine, command and reasons are unknown."))
    if note:
        parts.append(page.paragraph(note, "warning"))
    if warnings:
        parts.append(page.paragraph("Warnings; the end of this page has more on them:", "warning"))
        parts.append(page.listed(said.partition(". ")[0] for said in warnings))
    parts.append(page.folded("All options, with reasons", page.table(options, ("option", "value", "reason"))))
    text = (
        "What was trained, on what, and how far it came. A loss near ln K means that nothing was learned; kNN, where "
        "there are labels, is the share of validation images that their nearest training images classify correctly."
    )
    return page.section("The run", text, *parts)


def facts_of(run: Run) -> list[tuple[str, object]]:
    """What the run is."""
    options, facts, epoch = run.options, run.facts, run.contents["epoch"]
    holder = read_lock(run.folder / "run.lock")
    is_training = bool(holder) and is_running(holder, run.folder / "run.lock")
    state = "training now" if is_training else "finished" if epoch >= options["epochs"] else "stopped"
    source = options["dataset"] if options["dataset"] != "folder" else shown(options["data_path"])
    count = (run.contents.get("images") or {}).get("images")
    crops = zip(options["nmb_crops"], options["size_crops"], strict=True)
    lines: list[tuple[str, object]] = [
        ("State", f"{state}: {epoch} of {options['epochs']} epochs, {run.contents['step']:,} steps"),
        ("Looked at", shown(run.path)),
        ("Images", f"{source}, {count:,} images" if count else source),
        ("Network", f"{options['arch']}, {options['nmb_prototypes']:,} prototypes"),
        ("Crops of an image", ", ".join(f"{count} of {size} x {size} pixels" for count, size in crops)),
    ]
    if facts:
        packages = ", ".join(f"{name} {version}" for name, version in facts.get("packages", {}).items() if version)
        lines.append(("Machine", f"{facts.get('host')}, {facts.get('device')}, {facts.get('world_size')} process(es)"))
        lines += [("Packages", packages), ("Code", facts.get("git") or "not in a git repository")]
        lines += [("Started", facts.get("started")), ("Command", facts.get("command"))]
    return lines


def figures_of(run: Run) -> list[tuple[str, str]]:
    """The newest figures of the run, and its time."""
    epochs = [row for row in run.rows if "epoch_loss" in row]
    if not epochs:
        return []
    last = epochs[-1]
    figures = f"loss {last['epoch_loss']:.3f} ({last['epoch_loss'] / last['ln_k']:.0%} of ln K)"
    for key, text in (("knn", "kNN {:.1f} %"), ("lidar", "LiDAR {:.1f}"), ("rankme", "RankMe {:.1f}")):
        newest = next((row for row in reversed(epochs) if row.get(key) is not None), None)
        if newest:
            figures += f"; {text.format(newest[key])}" + f" (epoch {newest['epoch']})" * (newest is not last)
    seconds = round(sum(row.get("epoch_seconds", 0) for row in epochs))
    speed = f", in the last one {last['epoch_images_per_s']:.0f} images/s" if "epoch_images_per_s" in last else ""
    return [("Newest figures", figures), ("Time", f"{timedelta(seconds=seconds)} for {len(epochs)} epochs{speed}")]


def best_checkpoint(run: Run) -> str:
    """The answer to: which checkpoint is best?"""
    kept, has_knn = kept_epochs(run.folder), any(row.get("knn") is not None for row in run.rows)
    peak = find_peak(run.rows, kept)
    if peak:
        return f"Not the last one: {peak.describe(run.folder)}."
    if len(kept) < 2 or not (has_knn or any(row.get("lidar") is not None for row in run.rows)):
        measured = [row["epoch"] for row in run.rows if row.get("knn" if has_knn else "lidar") is not None]
        epochs = (", ".join(map(str, epochs)) or "none" for epochs in (kept, measured))
        return (
            "Unknown: it takes two kept checkpoints (--checkpoint_freq) whose quality was measured (--eval_every); "
            "kept epochs: {}; measured: {}.".format(*epochs)
        )
    measure = "kNN" if has_knn else "LiDAR, which needs no labels and is not reliable on all images"
    return f"The last one: of the kept epochs {', '.join(map(str, kept))} none is clearly better by {measure}."


# Training curves. Each chart: title, y axis, {name: key of a row}, what it tells

CURVES = (
    ("Loss", "nats", {"loss": "loss"}, "Lower is better; at ln K predictions know nothing."),
    ("Learning rate", "learning rate", {"lr": "lr"}, "As planned: warm-up, then a cosine."),
    ("Code entropy", "share of ln K", {"of a code": "code_entropy", "of the mean code": "mean_code_entropy"},
     "Of a code: lower is sharper. Of the mean code: 1 is balanced."),
    ("Prototypes in use", "share", {"of all": "prototypes_in_use", "of those possible": "distinct_codes"},
     "Those that were the largest entry of a code since the last log line. With fewer codes than prototypes, not all "
     "can be."),
    ("Embedding std", "std times sqrt(D)", {"std": "embedding_std"}, "0: all embeddings are equal; 1: isotropic."),
    ("Codes changed", "share of images", {"changed": "codes_changed"}, "Tracked images with another top prototype than "
     "an epoch before; should fall."),
    ("Dimensions in use", "effective rank", {"RankMe": "rankme", "LiDAR": "lidar"}, "RankMe: of the embeddings. LiDAR: "
     "of what tells images apart but not their crops. Higher is better, as a rule."),
    ("Quality without labels", "share", {"unique prototypes": "unique_prototypes", "neighbours agree":
     "neighbour_agreement", "trivial R2": "trivial_r2"}, "Neighbours agree: two crops of an image have the same "
     "nearest images. Trivial R2: what colour and brightness explain; lower is better."),
    ("kNN", "top-1 in %", {"kNN": "knn"}, "Validation images that their nearest training images classify correctly."),
)  # fmt: skip


def guard_words(run: Run) -> list[tuple[float, str]]:
    """(epochs done, what was said) for each warning of guard.py."""
    cause, words, guard = diagnose_collapse(run.options)[0], [], CollapseGuard(2)
    for row, epochs in zip(run.rows, run.epochs(), strict=True):
        if row.get("collapsing"):
            words.append((epochs, describe_collapse(row, cause, row["step"])))
        value = row.get("trivial_r2")
        if value is not None and guard.is_slow(value, row["epoch"] / run.options["epochs"]):
            words.append((row["epoch"], describe_slow(value, row["epoch"])))
    return words


def curves(run: Run) -> str:
    """Training curves, with the guard's words at their place."""
    words, rows, charts, missing = guard_words(run), list(zip(run.epochs(), run.rows, strict=True)), [], []
    for title, ylabel, keys, meaning in CURVES:
        lines = {}
        for name, key in keys.items():
            points = [(epochs, row[key]) for epochs, row in rows if row.get(key) is not None]
            if points:
                lines[name] = tuple(zip(*points, strict=True))
        if not lines:
            missing.append(title)
            continue
        more: dict = dict(bottom=0)
        if title == "Loss":
            ln_k = next((row["ln_k"] for row in run.rows if "ln_k" in row), None)
            more = dict(levels={"ln K": ln_k} if ln_k else {})
            more["marks"] = [(x, f" {i}") for i, (x, _) in enumerate(words, 1)]
        chart = page.line_chart(title, lines, xlabel="epochs", ylabel=ylabel, **more)
        ends = ", ".join(f"{name} from {y[0]:.3g} to {y[-1]:.3g}" for name, (_, y) in lines.items())
        charts.append(page.picture(chart, f"{title} over the epochs: {ends}.", caption=meaning))
    parts = [page.grid(charts)]
    if words:
        parts.append(page.paragraph("Numbers at dotted lines in the loss are warnings of guard.py:"))
        parts.append(page.listed(f"{i}, after {x:.3g} epochs: {said}" for i, (x, said) in enumerate(words, 1)))
    if missing:
        where = "" if run.rows else ", as metrics.jsonl is missing or empty"
        parts.append(page.paragraph(f"Not measured in this run{where}: {', '.join(missing)}."))
    text = (
        "Each chart shows a measure over the epochs. In a good run the loss leaves ln K (dashed), the embedding spread "
        "stays well above 0.05, most prototypes are in use, and fewer and fewer codes change."
    )
    return page.section("Training curves", text, *parts)


# Crops


def crops(run: Run, images: Dataset, indices: Sequence[int]) -> str:
    """Images with all their crops, as in the first epoch, and the crops' parameters."""
    names = "size_crops", "nmb_crops", "min_scale_crops", "max_scale_crops", "blur_sigma"
    more = "hflip", "vflip", "color_strength", "grayscale"
    options = run.options
    multi_crop = MultiCrop(*(options[n] for n in names), **{n: options[n] for n in more if n in options})
    rows = []
    for index in indices[:CROPPED]:
        try:
            pixels = to_pixels(images[index][0])
        except UnreadableImage:  # it could be read before
            continue
        seeds, (height, width) = (options["seed"], 0, index), pixels.shape[1:]
        boxes = multi_crop.sample([(width, height)], [np.random.default_rng(seeds)])[0][0].tolist()
        whole = draw_boxes(pixels, boxes, large=options["nmb_crops"][0])
        figures = [page.thumbnail(whole, f"image {index} with the boxes of its crops", "image", "first", 224)]
        for pixels_of_crops, params in multi_crop.crop([pixels], [np.random.default_rng(seeds)]):
            seen = to_uint8(augment(pixels_of_crops, torch.from_numpy(params))).permute(0, 2, 3, 1).numpy()
            for crop, param in zip(seen, params, strict=True):
                _, _, h, w = boxes[len(figures) - 1]
                caption = ", ".join([f"{len(figures)}: {h * w / (height * width):.0%}", *changes(param)])
                figures.append(page.thumbnail(crop, f"crop {len(figures)} of image {index}", caption))
        rows.append(page.strip(figures, side=100))
    colours = " (large ones orange, small ones blue)" if len(options["nmb_crops"]) > 1 else ""
    text = (
        f"Each row is an image with the boxes of its crops{colours}, and these crops as the network sees them: it "
        "learns that they are of the same image. Below each stand its number, its share of the image's area and, where "
        "it has them, flip, grey, hue shift in degrees and the blur's sigma in pixels; brightness, contrast and "
        "saturation change too."
    )
    return page.section("Crops", text, *rows)


def draw_boxes(pixels: torch.Tensor, boxes: Sequence[Sequence[int]], large: int) -> np.ndarray:
    """An image uint8 [3, H, W] of at most 224 pixels a side, with boxes (top, left, height, width)."""
    scale = 224 / max(pixels.shape[1:])
    height, width = (max(1, round(scale * side)) for side in pixels.shape[1:])
    whole = Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize((width, height))
    for nth, (top, left, h, w) in enumerate(boxes):
        corners = [scale * left, scale * top, scale * (left + w) - 1, scale * (top + h) - 1]
        colour, draw = page.COLOURS[1 if nth < large else 5], ImageDraw.Draw(whole)
        draw.rectangle(corners, outline=colour, width=3)
        outlined = dict(fill=colour, font_size=30, stroke_fill="black", stroke_width=3)
        draw.text((corners[0] + 5, corners[1] + 3), str(nth + 1), **outlined)
    return np.array(whole)


def changes(params: np.ndarray) -> list[str]:
    """What the augmentation parameters of a crop change, in words."""
    named = by_name(params)
    words = [name for name, value in (("flip", named.hflip), ("vflip", named.vflip), ("grey", named.grey)) if value]
    words += [f"hue {360 * named.hue:+.0f}°"] if abs(360 * named.hue) >= 1 and not named.grey else []
    return words + ([f"blur {named.sigma:.1f}"] if named.sigma else [])


# Prototypes


def pair_purity(seen: Seen, top: torch.Tensor) -> tuple[float, float] | None:
    """How often two images of one prototype have the same label, and how often any two; None if there are no such two.

    top: the prototype of each image, int64 [N]. Unlike the share of the most frequent label it is not higher by chance
    for prototypes of few images.
    """

    def pairs(keys: Sequence) -> int:
        return sum(count * (count - 1) for count in Counter(keys).values())

    labelled = [(p, name) for p, name in zip(top.tolist(), seen.classes, strict=True) if name is not None]
    same_prototype = pairs([prototype for prototype, _ in labelled])
    if not same_prototype:
        return None
    any_two = len(labelled) * (len(labelled) - 1)
    return pairs(labelled) / same_prototype, pairs([name for _, name in labelled]) / any_two


def by_similarity(vectors: torch.Tensor) -> list[int]:
    """An order of unit vectors [N, D] in which each is followed by the most similar of those left."""
    cosines, order = vectors @ vectors.T, [0]
    while len(order) < len(vectors):
        nearest = cosines[order[-1]].clone()
        nearest[order] = -torch.inf
        order.append(int(nearest.argmax()))
    return order


def prototypes(seen: Seen) -> str:
    """The most used prototypes, with their most certain images."""
    certainties, top = seen.certainties.max(1)
    counts = top.bincount(minlength=len(seen.prototypes))
    used = counts.argsort(descending=True, stable=True)[:PROTOTYPES]
    used = used[counts[used] > 0]
    parts = []
    for prototype in used[by_similarity(seen.prototypes[used])].tolist():
        members = (top == prototype).nonzero().flatten()
        members = members[certainties[members].argsort(descending=True, stable=True)].tolist()
        best, label = members[:MOST_CERTAIN], ""
        if seen.has_labels:
            common = Counter(seen.classes[i] for i in members).most_common(2)
            label = ": " + ", ".join(f"{count / len(members):.0%} {shown(n or 'no label')}" for n, count in common)
        certain = f"certainty {certainties[best[0]]:.2g} to {certainties[best[-1]]:.2g}"
        parts.append(page.heading(f"#{prototype}, {len(members)} images{label}; the {len(best)} shown: {certain}"))
        parts.append(page.strip((seen.figure(i, what=f"prototype {prototype}: ") for i in best), side=84))
    unique, total = round(unique_prototypes(seen.prototypes) * len(seen.prototypes)), len(seen.prototypes)
    facts = [
        f"{unique:,} of {total:,} prototypes are unique, that is not within a cosine distance of 0.025 of another one. "
        "Unique ones may still have the same kind of images.",
        f"Certainty is the softmax of an image's scores over all prototypes: 1 at most, {1 / total:.2g} by chance.",
    ]
    if seen.has_labels:
        facts.append("Percentages are the labels of all images of a prototype, not only of those that are shown.")
    if purity := pair_purity(seen, top):
        facts.append(f"Label purity: two images of one prototype have the same label in {purity[0]:.0%} of pairs, "
                     f"any two images in {purity[1]:.0%}.")  # fmt: skip
    text = (
        f"The {len(used)} most used prototypes, each with the images that it is most certain of; similar prototypes "
        "follow each other. A good one's images have something in common that you can name, more than colour or "
        "brightness."
    )
    return page.section("Prototypes", text, page.listed(facts), *parts)


def balance(seen: Seen) -> str:
    """How evenly prototypes are used."""
    counts = seen.certainties.argmax(1).bincount(minlength=len(seen.prototypes)).numpy()
    shares = counts[counts > 0] / counts.sum()
    effective = np.exp(-(shares * np.log(shares)).sum())
    words = (
        f"{len(shares):,} of {len(counts):,} prototypes are the first choice of some image, the most used one of "
        f"{counts.max():,} images. Effective number in use: {effective:,.0f}, the exponential of the entropy."
    )
    chart = page.use_chart(counts, len(seen.indices) / len(counts))
    text = (
        f"How many of {len(seen.indices):,} images have each prototype as their first choice, without the balancing "
        "that codes get in training; so fewer are in use here than in the curve above. A few prototypes with most of "
        "the images mean that predictions do not follow their codes."
    )
    alt = f"Images of each prototype, the most used first. {words}"
    return page.section("Balance", text, page.picture(chart, alt, "chart wide"), page.paragraph(words))


# Features


def cosines_of(features: torch.Tensor, centred: bool = False) -> torch.Tensor:
    """Cosines [N, N] of features [N, F]; -2 of each with itself."""
    features = features - features.mean(0) if centred else features
    directions = torch.nn.functional.normalize(features, dim=1)
    return (directions @ directions.T).fill_diagonal_(-2)


def neighbours(seen: Seen) -> str:
    """The nearest neighbours of some images."""
    cosines, rows = cosines_of(seen.features), []
    any_two = cosines[cosines > -2].mean().item()
    for i in range(min(QUERIES, len(cosines))):
        values, nearest = cosines[i].topk(min(NEIGHBOURS, len(cosines) - 1))
        figures = [seen.figure(i, "image", "query: ", "first")]
        for cosine, j in zip(values.tolist(), nearest.tolist(), strict=True):
            figures.append(seen.figure(j, f"{cosine:.2f}", f"neighbour of {seen.names[i]}: "))
        rows.append(page.strip(figures, side=84))
    if seen.has_labels:
        nearest = [seen.classes[j] for j in cosines.argmax(1).tolist()]
        same = [a == b for a, b in zip(seen.classes, nearest, strict=True) if a is not None]
        rows.append(page.paragraph(f"The nearest neighbour has the same label for {np.mean(same):.0%} of all images."))
    text = (
        f"Each row is an image (outlined) and its nearest neighbours among {len(seen.indices):,} images, with the "
        f"cosine of their features; that of two images at random is {any_two:.2f}. In a good run they show the same "
        "kind of thing, also in other colours and places."
    )
    return page.section("Nearest neighbours", text, *rows)


def feature_map(seen: Seen) -> str:
    """Images at their place in two dimensions: t-SNE where scikit-learn is installed, else principal components."""
    centred = seen.features[:MAPPED] - seen.features[:MAPPED].mean(0)
    centred = torch.nn.functional.normalize(centred, dim=1)
    components = centred @ torch.linalg.svd(centred, full_matrices=False)[2].T  # [N, F], the largest first
    if find_spec("sklearn") and len(centred) > 10:
        from sklearn.manifold import TSNE  # optional, and seconds to import

        tsne = TSNE(perplexity=min(30, (len(centred) - 1) / 3), init="pca", random_state=0)
        points, how = tsne.fit_transform(components[:, :50].numpy()), "t-SNE"
    else:
        how = "principal components (pip install scikit-learn for t-SNE)"
        points = np.pad(components[:, :2].numpy(), ((0, 0), (0, max(0, 2 - components.shape[1]))))
    alt = f"A map of {len(centred):,} images by {how}: similar ones lie close together."
    parts = [page.picture(page.thumbnail_map(points, seen.pixels[:MAPPED]), alt, "chart wide")]
    if seen.has_labels:
        names = [name and shown(name) for name in seen.classes[:MAPPED]]
        chart = page.scatter_chart("The same map, by label", points, names)
        parts.append(page.picture(chart, "The same map, a point for each image, coloured by label.", "chart wide"))
    text = (
        f"{len(centred):,} images by {how}: similar ones lie close together, and each cell shows one of the images "
        "that lie there. Groups that show one kind of thing are a good sign; a mere gradient from dark to bright, or "
        "by colour, is a poor one."
    )
    return page.section("Map", text, *parts)


# How codes evolve


def evolution(run: Run, seen: Seen | None, images: int | None) -> str:
    """How the prototypes of fixed images change from epoch to epoch. images: of the set, if it is there."""
    text = (
        f"The picture follows the tracked images that end in the {BANDS} prototypes with most of them: each column is "
        "an epoch, each bar a prototype (grey: all others), each ribbon the images that go from one to another. "
        "Ribbons that run straight are images that have found their place; where many still cross in the last epochs, "
        "codes have not settled."
    )
    rows = [row for _, row in sorted({row["epoch"]: row for row in run.codes}.items())]
    rows = [row for row in rows if len(row["prototypes"]) == len(rows[-1]["prototypes"])]
    if len(rows) < 2:
        missing = "has one epoch so far" if rows else "is missing, as in runs of older versions"
        return page.section("How codes evolve", text, page.paragraph(f"This takes two epochs: codes.jsonl {missing}."))
    codes, epochs = np.array([row["prototypes"] for row in rows]), [row["epoch"] for row in rows]  # [epochs, images]
    largest = [float(np.mean(row["certainties"])) for row in rows]
    changed = (codes[1:] != codes[:-1]).mean(1).tolist()
    columns = sorted(set(np.linspace(0, len(rows) - 1, EPOCHS).round().astype(int).tolist()))
    bands = [prototype for prototype, _ in Counter(codes[-1].tolist()).most_common(BANDS)]
    words = (
        f"Of {codes.shape[1]} tracked images, {changed[-1]:.0%} changed their top prototype in the last epoch, "
        f"{changed[0]:.0%} in the first one shown. The largest entry of their codes went from {largest[0]:.2g} to "
        f"{largest[-1]:.2g} on average. A ribbon has the colour of the prototype that its images leave; from grey, of "
        "the one that they enter."
    )
    followed = codes[columns][:, np.isin(codes[-1], bands)]
    flow = page.flow_chart(followed, [epochs[column] for column in columns], bands)
    alt = f"Where the {followed.shape[1]} images that end in {len(bands)} prototypes were before. {words}"
    parts = [page.picture(flow, alt, "chart wide"), page.paragraph(words)]
    if seen and images:
        places = {index: i for i, index in enumerate(seen.indices)}
        tracked = some_images(images, codes.shape[1])
        for band, prototype in enumerate(bands):
            members = [index for index, p in zip(tracked, codes[-1], strict=True) if p == prototype]
            parts.append(page.heading(f"#{prototype}: {len(members)} images at the end", page.COLOURS[band]))
            there = [places[index] for index in members if index in places][:MOST_CERTAIN]
            parts.append(page.strip((seen.figure(i, what=f"prototype {prototype}: ") for i in there), side=64))
    return page.section("How codes evolve", text, *parts)


# Warnings


def find_warnings(run: Run, seen: Seen | None, bad_images: Sequence[str]) -> list[tuple[str, list[str]]]:
    """(what may be wrong, thumbnails of it) for each thing found. bad_images: what could not be read in training."""
    found: list[tuple[str, list[str]]] = [(said, []) for _, said in guard_words(run)]
    if bad_images:
        found.append((f"{len(bad_images)} images could not be read in training: {'; '.join(bad_images[:5])}.", []))
    if seen is None:
        return found
    cosines = cosines_of(seen.features, centred=True).triu(1)
    pairs = (cosines > DUPLICATE).nonzero()
    if len(pairs):
        pairs = pairs[cosines[pairs[:, 0], pairs[:, 1]].argsort(descending=True, stable=True)].tolist()
        small = seen.pixels[:, ::4, ::4].reshape(len(seen.indices), -1).astype(np.int16)
        same = sum(np.abs(small[a] - small[b]).mean() < 2 for a, b in pairs)
        text = (
            f"Near duplicates: {len({i for pair in pairs for i in pair}):,} of {len(seen.names):,} images have nearly "
            f"the features of another one (cosine above {DUPLICATE}). Of {len(pairs):,} such pairs {same:,} are "
            "the same picture; others are pictures that the network does not tell apart."
        )
        found.append((text, [seen.figure(i, f"pair {n}") for n, pair in enumerate(pairs[:6], 1) for i in pair]))
    stds, spread = seen.features.std(0), feature_std(seen.features)
    collapsed = int((stds <= 0.01 * stds.median()).sum())
    if collapsed:
        found.append((f"Collapsed: {collapsed} of {len(stds)} feature dimensions hardly differ between images.", []))
    if spread < COLLAPSED_SPREAD:
        found.append((f"The features differ little between images: feature std {spread:.2f}, 0 if collapsed, about 0.6 "
                      "in good runs.", []))  # fmt: skip
    return found + unsure_images(seen)


def unsure_images(seen: Seen) -> list[tuple[str, list[str]]]:
    """Warnings of images that no prototype is sure of."""
    certainties, k = seen.certainties.amax(1), len(seen.prototypes)
    usual = certainties.median().item()
    if usual < 2 / k:
        return [(f"No prototype is sure of any image: the usual certainty is {usual:.3g}, by chance {1 / k:.3g}.", [])]
    order = certainties.argsort(stable=True)
    unsure = order[certainties[order] < usual / 2].tolist()
    if not unsure:
        return []
    text = f"No prototype is sure of {len(unsure):,} of {len(certainties):,} images, with less than half of the usual "
    figures = [seen.figure(i, f"{certainties[i]:.3f}") for i in unsure[:12]]
    return [(f"{text}certainty, {usual:.2f}. The least certain ones:", figures)]


def warnings(found: Sequence[tuple[str, list[str]]], has_images: bool) -> str:
    """The section of what `find_warnings` found."""
    checked = "near duplicates, collapsed dimensions, images that no prototype is sure of, " if has_images else ""
    text = (
        "What may be wrong with the images, or with what was learned; a few duplicates or unsure images are normal. "
        f"Checked: {checked}files that could not be read, and warnings of guard.py."
    )
    parts = [page.paragraph(said, "warning") + page.strip(figures) for said, figures in found]
    return page.section("Warnings", text, *(parts or [page.paragraph("Nothing found.")]))
