"""page.py: HTML that escapes what it is given, thumbnails, and charts that show their numbers."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

import page

NASTY = """<script>alert("1")</script> ' & \n é \udcff"""


class Tags(HTMLParser):
    """Collects tags with their attributes, and checks that they are closed in order."""

    EMPTY = {"meta", "link", "img", "br"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found, self.open = [], []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_text_is_escaped_wherever_it_stands():
    pixels = np.zeros((4, 4, 3), np.uint8)
    parts = [
        page.title(NASTY),
        page.links([NASTY]),
        page.section(NASTY, NASTY, page.paragraph(NASTY, "warning"), page.heading(NASTY, "#fff"), page.listed([NASTY])),
        page.table([(NASTY, NASTY)], (NASTY, NASTY)),
        page.folded(NASTY, page.strip([page.thumbnail(pixels, NASTY, NASTY)])),
        page.picture(page.jpeg(Image.new("RGB", (4, 4))), NASTY),
    ]
    content = page.whole_page(NASTY, parts)
    tags = Tags(content)
    assert not [tag for tag, _ in tags.found if tag == "script"]
    attributes = {name for _, attributes in tags.found for name in attributes}
    assert attributes <= {"lang", "charset", "name", "content", "rel", "href", "id", "class", "style", "alt", "title",
        "loading", "src"}  # fmt: skip
    images = [attributes for tag, attributes in tags.found if tag == "img"]
    assert len(images) == 2 and all(image["alt"] == NASTY for image in images)
    content.encode(errors="backslashreplace").decode()


def test_a_page_needs_no_network_and_fits_a_phone():
    content = page.whole_page("a run", [page.title("a run")])
    assert 'name="viewport" content="width=device-width' in content and "color-scheme: light dark" in content
    assert not re.search(r"https?://|<script|@import", content)


def test_links_lead_to_the_sections():
    content = page.links(["Training curves"]) + page.section("Training curves", "How to read it.")
    assert 'href="#training-curves"' in content and 'id="training-curves"' in content


def image_of(figure: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(re.search(r"base64,([^\"]+)", figure)[1]))).convert("RGB")


def test_thumbnails_are_small_jpegs_of_the_pixels():
    pixels = np.full((300, 200, 3), (200, 30, 90), np.uint8)
    image = image_of(page.thumbnail(pixels, "red"))
    assert image.size == (64, 96)
    assert np.abs(np.asarray(image, int) - (200, 30, 90)).max() < 12
    assert pixels.shape == (300, 200, 3)


def drawn(content: bytes) -> np.ndarray:
    assert content.startswith(b"\x89PNG")
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int)


def amount(pixels: np.ndarray, colour: str) -> int:
    """Pixels of nearly this colour."""
    rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return int((np.abs(pixels - rgb).max(2) < 24).sum())


def test_line_charts_have_a_colour_for_each_line_and_show_levels_and_marks():
    pytest.importorskip("matplotlib")
    lines = {"first": ([1, 2, 3], [3.0, 2, 1]), "second": ([1, 2, 3], [1.0, 1, 1])}
    plain = drawn(page.line_chart("a chart", lines, xlabel="epochs", ylabel="nats"))
    assert amount(plain, page.COLOURS[0]) > 100 and amount(plain, page.COLOURS[1]) > 100
    assert amount(plain, page.COLOURS[3]) == 0
    options = dict(xlabel="epochs", ylabel="nats", levels={"ln K": 3.5}, marks=[(2, "1")], bottom=0)
    marked = drawn(page.line_chart("$a_b^ chart", lines | {"one point": ([2], [2.0])}, **options))
    assert amount(marked, "#d55e00") > 50


def test_the_use_of_prototypes_is_drawn_in_proportion():
    pytest.importorskip("matplotlib")
    few, all_used = (amount(drawn(page.use_chart(np.array(counts), 5)), page.COLOURS[0])
                     for counts in ([20, 0, 0, 0], [20, 20, 20, 20]))  # fmt: skip
    assert 3.5 < all_used / few < 4.2


def test_ribbons_lead_from_where_images_were_to_where_they_are():
    pytest.importorskip("matplotlib")
    stays, comes = np.array([[7] * 6] * 3), np.array([[1] * 6, [1] * 6, [7] * 6])
    stayed, came = (drawn(page.flow_chart(codes, [1, 5, 9], [7])) for codes in (stays, comes))
    bar, others = (amount(came, colour) for colour in (page.COLOURS[0], page.OTHERS))
    assert amount(stayed, page.COLOURS[0]) > 2.5 * bar
    assert others - amount(stayed, page.OTHERS) > 1.5 * bar  # text has grey pixels too


def test_points_of_many_names_and_of_none_are_drawn():
    pytest.importorskip("matplotlib")
    points = np.random.default_rng(0).normal(size=(200, 2))
    names = [f"_name {i % 20} $x" for i in range(199)] + [None]
    pixels = drawn(page.scatter_chart("a map", points, names))
    assert amount(pixels, page.OTHERS) > 50 and amount(pixels, page.COLOURS[0]) > 50


def test_a_confusion_matrix_is_drawn_in_shares_of_its_rows_with_any_names():
    pytest.importorskip("matplotlib")
    diagonal, row = (drawn(page.confusion_chart(np.array(counts), ["$_^$", "b"])) for counts in ([[9, 0], [0, 1]],
        [[9, 0], [1, 0]]))  # fmt: skip
    dark = "#08306b"  # of Blues, for all of a row
    assert amount(diagonal, dark) > 1000 and amount(diagonal, dark) == pytest.approx(amount(row, dark), rel=0.05)
    assert page.confusion_chart(np.zeros((60, 60), int), ["x"] * 60)  # without names


def test_a_map_has_images_at_their_places():
    pixels = np.zeros((3, 8, 8, 3), np.uint8)
    pixels[0, ..., 0], pixels[1, ..., 1], pixels[2, ..., 2] = 255, 255, 255
    points = np.array([[0.0, 0.0], [10, 10], [10, 0]])
    canvas = np.asarray(Image.open(io.BytesIO(page.thumbnail_map(points, pixels, cells=4, side=16)))).astype(int)
    assert canvas.shape == (64, 64, 3)
    for place, channel in (((56, 8), 0), ((8, 56), 1), ((56, 56), 2)):  # (row, column); y points up
        assert canvas[place].argmax() == channel and canvas[place].max() > 200
    assert canvas[32, 32].min() > 240
    assert page.thumbnail_map(np.zeros((3, 2)), pixels)  # all in one place
