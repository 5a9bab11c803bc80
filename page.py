"""A page of pictures in one file: HTML parts, JPEGs and matplotlib's charts, all inline. look.py says what they show.

    chart = line_chart("loss", {"loss": (epochs, losses)}, xlabel="epochs", ylabel="nats")       # PNG
    page = whole_page("A run", [section("Loss", "Lower is better.", picture(chart, "The loss falls."))])

Text is escaped here, once: arguments named title, text, alt or caption are plain text, those named parts are HTML.
"""

import base64
import html
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

# Colours that people with any colour vision tell apart (Okabe and Ito 2008, without its yellow, too light on white).
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#000000", "#8c6d31")
OTHERS = "#c8c8c8"
MARKERS = "os^Dv<>p*hXP"

STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 0 auto; padding: 0 16px 64px; }
h1 { font-size: 1.6em; margin: 24px 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.25em; margin: 40px 0 4px; border-top: 1px solid var(--line); padding-top: 16px; }
h3 { font-size: 1em; margin: 18px 0 4px; font-weight: 600; overflow-wrap: anywhere; }
p, ul { max-width: 46em; margin: 6px 0; overflow-wrap: anywhere; }
nav a { margin-right: 14px; white-space: nowrap; }
table { border-collapse: collapse; font-size: 15px; width: 100%; }
td, th { text-align: left; vertical-align: top; padding: 3px 12px 3px 0; border-bottom: 1px solid var(--soft);
  overflow-wrap: anywhere; }
th { font-weight: 500; width: 9em; }
figure { margin: 0; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 330px), 1fr)); gap: 12px; }
.chart img { width: 100%; height: auto; background: #fff; border-radius: 4px; display: block; }
.charts .chart { max-width: 420px; }
.wide { max-width: 640px; }
.strip { display: flex; flex-wrap: wrap; gap: 6px 4px; align-items: flex-start; margin: 4px 0; }
.strip figure { width: min(var(--side), (100% - 20px) / 5); }
.strip img { width: 100%; height: auto; display: block; border-radius: 3px; }
figcaption { font-size: 12px; line-height: 1.3; overflow-wrap: anywhere; }
.chart figcaption { font-size: 13px; }
.first img { outline: 3px solid #e69f00; outline-offset: -3px; }
.swatch { display: inline-block; width: 1em; height: 1em; vertical-align: -2px; margin-right: 6px; }
.warning { border-left: 4px solid #d55e00; padding-left: 10px; }
"""


# HTML


def whole_page(title: str, parts: Iterable[str]) -> str:
    """A complete HTML page: one file, without scripts, that needs no network."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{html.escape(title)}</title>\n<style>{STYLE}</style></head>\n<body>\n'
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def title(text: str) -> str:
    """The heading of the page."""
    return f"<h1>{html.escape(text)}</h1>"


def section(title: str, text: str, *parts: str) -> str:
    """A section with a heading and how to read it."""
    top = f'<section id="{_anchor(title)}">\n<h2>{html.escape(title)}</h2>\n{paragraph(text)}'
    return "\n".join([top, *parts, "</section>"])


def links(titles: Iterable[str]) -> str:
    """Links to sections."""
    anchors = (f'<a href="#{_anchor(title)}">{html.escape(title)}</a>' for title in titles)
    return f"<nav>{' '.join(anchors)}</nav>"


def _anchor(title: str) -> str:
    return re.sub("[^a-z0-9]+", "-", title.lower())


def paragraph(text: str, kind: str = "") -> str:
    return f'<p class="{kind}">{html.escape(text)}</p>' if kind else f"<p>{html.escape(text)}</p>"


def heading(text: str, colour: str | None = None) -> str:
    swatch = f'<span class="swatch" style="background:{colour}"></span>' if colour else ""
    return f"<h3>{swatch}{html.escape(text)}</h3>"


def listed(lines: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>"


def table(rows: Iterable[Sequence[object]], head: Sequence[str] = ()) -> str:
    """Rows of plain values; the first of each is its name. head: titles of the columns."""

    def cells(kind: str, values: Iterable[object]) -> str:
        return "".join(f"<{kind}>{html.escape(str(value))}</{kind}>" for value in values)

    body = (f"<tr>{cells('th', row[:1])}{cells('td', row[1:])}</tr>" for row in rows)
    top = f"<tr>{cells('th', head)}</tr>" if head else ""
    return f"<table>{top}{''.join(body)}</table>"


def folded(title: str, *parts: str) -> str:
    """Parts that a click opens."""
    return f"<details><summary>{html.escape(title)}</summary>{''.join(parts)}</details>"


def picture(content: bytes, alt: str, kind: str = "chart", caption: str = "") -> str:
    """A chart (PNG) or a large picture (JPEG)."""
    return f'<figure class="{kind}">{_inline(content, alt)}{_caption(caption)}</figure>'


def _caption(text: str) -> str:
    return f"<figcaption>{html.escape(text)}</figcaption>" if text else ""


def thumbnail(pixels: np.ndarray, alt: str, caption: str = "", kind: str = "", most: int = 96) -> str:
    """A small image, uint8 [H, W, 3], shrunk to at most `most` pixels."""
    image = Image.fromarray(np.ascontiguousarray(pixels))
    image.thumbnail((most, most))
    return f'<figure class="{kind}">{_inline(jpeg(image), alt, caption or alt)}{_caption(caption)}</figure>'


def strip(figures: Iterable[str], side: int = 64) -> str:
    """Thumbnails of `side` CSS pixels in a row, which wraps."""
    return f'<div class="strip" style="--side:{side}px">{"".join(figures)}</div>'


def grid(figures: Iterable[str]) -> str:
    """Charts beside each other, or below each other on a narrow screen."""
    return f'<div class="charts">{"".join(figures)}</div>'


def jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=82, optimize=True)
    return buffer.getvalue()


def _inline(content: bytes, alt: str, title: str = "") -> str:
    kind = "png" if content.startswith(b"\x89PNG") else "jpeg"
    hint = f' title="{html.escape(title)}"' if title else ""
    data = base64.b64encode(content).decode()
    return f'<img alt="{html.escape(alt)}"{hint} loading="lazy" src="data:image/{kind};base64,{data}">'


# Charts. All return a PNG, on white, so that they are legible on light and dark pages.


def _new_figure(width: float = 4.4, height: float = 2.9) -> tuple:
    from matplotlib.figure import Figure  # slow to import, and only charts need it

    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)
    return figure, axes


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    image = Image.open(buffer).convert("RGB").quantize(128, dither=Image.Dither.NONE)  # a third of the bytes
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def line_chart(
    title: str,
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    xlabel: str,
    ylabel: str,
    levels: Mapping[str, float] | None = None,
    marks: Iterable[tuple[float, str]] = (),
    bottom: float | None = None,
) -> bytes:
    """At most three lines by name. levels: horizontal ones. marks: (x, text) of vertical ones. bottom: least y."""
    figure, axes = _new_figure()
    for i, (name, (x, y)) in enumerate(lines.items()):
        style = dict(marker=MARKERS[i], markersize=3.5) if len(x) < 40 else {}
        style |= dict(color=COLOURS[i], linestyle=("-", "--", ":")[i], clip_on=False)
        axes.plot(x, y, linewidth=1.5, label=name, **style)
    for name, y in (levels or {}).items():
        axes.axhline(y, color="#555555", linestyle="--", linewidth=1)
        axes.annotate(name, (1, y), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=9)
    for x, text in marks:
        axes.axvline(x, color="#d55e00", linestyle=":", linewidth=1.5)
        axes.annotate(text, (x, 1), xycoords=("data", "axes fraction"), va="top", fontsize=9, color="#d55e00")
    if bottom is not None:
        axes.set_ylim(bottom=bottom)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel(xlabel, fontsize=9)
    axes.set_ylabel(ylabel, fontsize=9)
    axes.grid(alpha=0.25)
    if len(lines) > 1:
        axes.legend(fontsize=9, framealpha=0.8)
    return _png(figure)


def use_chart(counts: np.ndarray, even: float) -> bytes:
    """Images of each prototype, the most used first. even: images of each if all had as many."""
    figure, axes = _new_figure(4.8, 2.6)
    ranked = np.sort(counts)[::-1]
    axes.fill_between(np.arange(len(ranked) + 1), np.append(ranked, 0), step="post", color=COLOURS[0])
    axes.axhline(even, color=COLOURS[3], linestyle="--", linewidth=1.5)
    axes.annotate(f"all equal: {even:.3g}", (1, even), xycoords=("axes fraction", "data"), ha="right", va="bottom",
        fontsize=9, color=COLOURS[3])  # fmt: skip
    axes.set_xlim(0, len(ranked))
    axes.set_ylim(bottom=0)
    axes.set_title("Images of each prototype", fontsize=11, loc="left")
    axes.set_xlabel("prototypes, the most used first", fontsize=9)
    axes.set_ylabel("images", fontsize=9)
    return _png(figure)


def flow_chart(assigned: np.ndarray, epochs: Sequence[int], bands: Sequence[int]) -> bytes:
    """How images move between prototypes: a column for each epoch, a ribbon for images that go from band to band.

    assigned: int [epochs, images], the prototype of each. bands: prototypes with a band each, from the bottom; the
    others share a grey one on top.
    """
    figure, axes = _new_figure(4.8, 3.8)
    images, colours, width = assigned.shape[1], [*COLOURS[: len(bands)], OTHERS], 0.09
    band_of = {prototype: band for band, prototype in enumerate(bands)}
    of = np.array([[band_of.get(prototype, len(bands)) for prototype in column] for column in assigned.tolist()])
    counts = np.stack([np.bincount(column, minlength=len(bands) + 1) for column in of])  # [epochs, bands + 1]
    gap = 0.03 * images
    bottoms = np.cumsum(counts, axis=1) - counts + gap * np.arange(len(bands) + 1)
    x = np.linspace(0, 1, 30)
    ease = x * x * (3 - 2 * x)
    for column in range(len(epochs)):
        axes.bar(column, counts[column], width, bottoms[column], color=colours)
        if column + 1 == len(epochs):
            break
        leave, enter = bottoms[column].astype(float), bottoms[column + 1].astype(float)
        for a in range(len(bands) + 1):
            for b in range(len(bands) + 1):
                count = ((of[column] == a) & (of[column + 1] == b)).sum()
                if count and not a == b == len(bands):  # from grey to grey: not drawn
                    low = leave[a] + (enter[b] - leave[a]) * ease
                    along = column + width / 2 + x * (1 - width)
                    colour = colours[a if a < len(bands) else b]
                    axes.fill_between(along, low, low + count, color=colour, alpha=0.45, linewidth=0)
                leave[a] += count
                enter[b] += count
    for band, prototype in enumerate([*(f"#{p}" for p in bands), "others"]):
        middle = bottoms[-1, band] + counts[-1, band] / 2
        if counts[-1, band]:
            axes.annotate(prototype, (len(epochs) - 1 + width, middle), va="center", fontsize=9)
    axes.set_xticks(range(len(epochs)), [str(epoch) for epoch in epochs])
    axes.set_xlim(-0.2, len(epochs) - 1 + 0.7)
    axes.set_yticks([])
    axes.set_title("Where images go", fontsize=11, loc="left")
    axes.set_xlabel("after epoch", fontsize=9)
    axes.set_ylabel(f"{images} images", fontsize=9)
    return _png(figure)


def scatter_chart(title: str, points: np.ndarray, names: Sequence[str | None]) -> bytes:
    """Points [N, 2] with colours and markers by name; the most frequent names are told apart, all others are grey."""
    figure, axes = _new_figure(4.8, 5)
    names = np.array([name if name is not None else "no label" for name in names])
    known, counts = np.unique(names, return_counts=True)
    shown = known[np.argsort(-counts, kind="stable")[: len(MARKERS)]]
    rest = ~np.isin(names, shown)
    axes.scatter(*points[rest].T, s=10, color=OTHERS, label="others" if rest.any() else None)
    for i, name in enumerate(sorted(shown)):
        short = name if len(name) < 24 else name[:22] + "…"
        style = dict(color=COLOURS[i % len(COLOURS)], marker=MARKERS[i], edgecolor="white", linewidth=0.3)
        axes.scatter(*points[names == name].T, s=16, label=short.replace("$", r"\$").removeprefix("_"), **style)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.set_title(title, fontsize=11, loc="left")
    axes.legend(fontsize=9, markerscale=1.6, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=3, frameon=False)
    return _png(figure)


def confusion_chart(confusion: np.ndarray, classes: Sequence[str]) -> bytes:
    """Counts [classes, classes] as shares of each row, with names and numbers where they fit."""
    shares = 100 * confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    side = min(24.0, max(5.0, 2 + 0.45 * len(classes)))
    figure, axes = _new_figure(side, side)
    picture = axes.imshow(shares, vmin=0, vmax=100, cmap="Blues")
    axes.set_xlabel("taken for")
    axes.set_ylabel("class")
    figure.colorbar(picture, ax=axes, label="% of the class's images", shrink=0.6)
    if len(classes) <= 50:
        names = [name.replace("$", r"\$") for name in classes]  # no formulas
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
    if len(classes) <= 20:
        for (row, column), value in np.ndenumerate(shares):
            if value >= 0.5:
                axes.text(column, row, f"{value:.0f}", ha="center", va="center", color="w" if value > 50 else "k")
    return _png(figure)


def thumbnail_map(points: np.ndarray, pixels: np.ndarray, cells: int = 24, side: int = 48) -> bytes:
    """A JPEG of images uint8 [N, H, W, 3] at their points [N, 2]: one image in each cell of a grid that holds any."""
    low, high = points.min(0), points.max(0)
    places = (points - low) / np.maximum(high - low, 1e-9) * (cells - 1e-6)
    distances = np.abs(places - np.floor(places) - 0.5).max(1)  # from the middle of the cell
    canvas, taken = Image.new("RGB", (cells * side, cells * side), "white"), set()
    for i in np.argsort(distances, kind="stable"):
        column, row = (int(place) for place in places[i])
        if (column, row) not in taken:
            taken.add((column, row))
            image = Image.fromarray(np.ascontiguousarray(pixels[i])).resize((side - 2, side - 2))
            canvas.paste(image, (column * side + 1, (cells - 1 - row) * side + 1))
    return jpeg(canvas)
