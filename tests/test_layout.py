"""Layout: what the regions of a page hold, and in what order they are read."""

import textwrap

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont, ImageOps

from mmspec.assets.pages.rendering import held_out_pages, render_page
from mmspec.layout import split_into_regions

SIZE, PITCH = 16, 24
TEXT = (
    "A class can implement certain operations that are invoked by special syntax, such as "
    "arithmetic or subscripting and slicing, by defining methods with special names. This is the "
    "approach of the language to operator overloading; it allows classes to define their own. "
)
TABLE = [
    ["Article", "Region", "Units", "Price"],
    ["Washer", "North", "317", "41.09"],
    ["Bracket", "South", "259", "22.86"],
    ["Long nails", "West", "374", "12.13"],
    ["Spring", "East", "8", "9.74"],
]
WIDE_CELLS = [(0, 30), (26, 36), (30, 42), (60, 75), (98, 105), (120, 140)]


class Paper:
    """A page to write blocks of text on."""

    def __init__(self, size=(800, 640)):
        self.image = Image.new("L", size, 255)
        self.middles = {}
        self.draw = ImageDraw.Draw(self.image)

    def write(self, name, place, lines, size=SIZE):
        """Writes the lines of a block one below the other, and says where the next would be."""
        left, top = place
        font = ImageFont.load_default(size)
        for number, line in enumerate(lines):
            self.draw.text((left, top + number * size * 3 // 2), line, fill=0, font=font)
        bottom = top + len(lines) * size * 3 // 2
        self.middles[name] = left + 2 * size, (top + bottom) / 2
        return bottom

    def column(self, names, left, top, width=300):
        """Writes paragraphs of 4, 3 and 5 lines, with an empty line between them."""
        for number, name in enumerate(names):
            text = TEXT[29 * number % 200 :] + TEXT
            lines = textwrap.wrap(text, width * 2 // SIZE)[: (4, 3, 5)[number % 3]]
            top = self.write(name, (left, top), lines) + PITCH
        return top

    def table(self, name, top, cells=TABLE, step=180):
        for column, texts in enumerate(zip(*cells, strict=True)):
            bottom = self.write(f"{name}{column}", (40 + column * step, top), texts)
        return bottom

    def read(self, image=None, **options):
        """The names of the blocks in each region."""
        boxes = split_into_regions(image or self.image, **options)
        return [" ".join(name for name in self.middles if self.lies(name, box)) for box in boxes]

    def lies(self, name, box):
        across, down = self.middles[name]
        return box[0] <= across < box[2] and box[1] <= down < box[3]


def headed():
    """A heading over two columns whose paragraphs end at one height."""
    paper = Paper()
    paper.write("heading", (40, 20), ["Operators of the language and their methods"], 28)
    paper.column("abc", 40, 100)
    paper.column("def", 420, 100)
    return paper


IN_ORDER = ["heading", "a", "b", "c", "d", "e", "f"]


def test_one_column_is_read_from_top_to_bottom():
    paper = Paper()
    paper.column("abc", 40, 40, 640)
    assert paper.read() == ["a", "b", "c"]
    assert {(box[0], box[2]) for box in split_into_regions(paper.image)} == {(0, 800)}


@pytest.mark.parametrize("shift", [0, PITCH // 2, 2 * PITCH])
def test_columns_are_read_one_after_the_other(shift):
    """In step, out of step by half a line, and the right one beginning further down, or up."""
    paper = Paper()
    paper.column("abc", 40, 40)
    paper.column("def", 420, 40 + shift)
    assert paper.read() == list("abcdef")
    mirrored = Paper()
    mirrored.column("abc", 40, 40 + shift)
    mirrored.column("def", 420, 40)
    assert mirrored.read() == list("abcdef")


def test_three_columns():
    paper = Paper()
    for number, names in enumerate(("ab", "cd", "ef")):
        paper.column(names, 40 + 250 * number, 40, 200)
    assert paper.read() == list("abcdef")
    assert paper.read(most=3) == ["a b", "c d", "e f"]


def test_what_stands_above_and_below_columns_is_cut_from_them():
    """Even if gaps within the columns are wider."""
    assert headed().read() == IN_ORDER
    paper = Paper((800, 900))
    paper.write("heading", (40, 20), ["Operators of the language and their methods"], 28)
    for top, left, right in ((80, "a", "b"), (400, "c", "d")):
        paper.column(left, 40, top)
        paper.column(right, 420, top)
    paper.draw.rectangle((100, 220, 700, 350), fill=80)
    paper.middles["figure"] = 400, 300
    paper.write("footer", (40, 600), [TEXT[:80]])
    assert paper.read() == ["heading", "a", "b", "figure", "c", "d", "footer"]


def test_the_number_of_regions_is_bounded():
    """Columns come before their paragraphs, and a heading before its columns."""
    paper = headed()
    assert paper.read(most=1) == ["heading a b c d e f"]
    assert paper.read(most=2) == ["heading", "a b c d e f"]
    assert paper.read(most=3) == ["heading", "a b c", "d e f"]
    long = Paper((800, 2400))
    long.column("abcdefghijklmno", 40, 40)
    assert len(long.read()) == 8
    assert " ".join(long.read()).split() == list("abcdefghijklmno")


@pytest.mark.parametrize(
    "cells",
    [
        TABLE,
        [row[:2] for row in TABLE],
        [[TEXT[start : start + 29], TEXT[start:end]] for start, end in WIDE_CELLS],
    ],
    ids=["four columns", "two columns", "one wide column"],
)
def test_tables_stay_whole(cells):
    paper = Paper()
    top = paper.table("cell", paper.column("a", 40, 40, 640), cells, 720 // len(cells[0]))
    paper.column("b", 40, top + PITCH, 640)
    above, *tables, below = paper.read()
    assert (above, below) == ("a", "b")
    assert tables == [" ".join(f"cell{column}" for column in range(len(cells[0])))]
    alone = Paper()
    alone.table("cell", 40, cells)
    assert len(alone.read()) == 1


def test_items_are_not_cut_from_their_bullets():
    paper = Paper()
    lines = textwrap.wrap(TEXT, 60)
    paper.write("text", (80, 40), lines)
    paper.write("bullets", (40, 40), ["\u2022"] * len(lines))
    assert paper.read() == ["text bullets"]


def worn(image, kind):
    rng = np.random.default_rng(0)
    pixels = np.asarray(image).astype(float)
    if kind == "noise":
        pixels += rng.normal(0, 40, pixels.shape)
    elif kind == "dirt":
        for top, left in rng.integers(0, 620, (40, 2)):
            pixels[top : top + 3, left : left + 3] = 0
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize(
    "worsened",
    [
        lambda image: worn(image, "noise"),
        lambda image: worn(image, "dirt"),
        ImageOps.invert,
        lambda image: image.rotate(1, Image.Resampling.BICUBIC, fillcolor=255),
        lambda image: image.rotate(-1, Image.Resampling.BICUBIC, fillcolor=255),
        lambda image: image.resize((400, 320), Image.Resampling.LANCZOS),
        lambda image: ImageOps.contain(image, (2400, 1920)).convert("RGB"),
    ],
    ids=["noise", "dirt", "white on black", "askew", "askew back", "small", "large"],
)
def test_a_worn_page_has_the_same_regions(worsened):
    paper = headed()
    image = worsened(paper.image)
    scale = image.width / paper.image.width
    paper.middles = {name: (x * scale, y * scale) for name, (x, y) in paper.middles.items()}
    assert paper.read(image) == IN_ORDER


def test_a_rule_between_columns_is_no_column():
    paper = headed()
    paper.draw.line((400, 90, 400, 600), fill=0, width=2)
    assert paper.read() == IN_ORDER


def test_a_page_without_lines_is_one_region_or_none():
    blank = Image.new("RGB", (300, 200), "white")
    assert split_into_regions(blank) == []
    ImageDraw.Draw(blank).rectangle((50, 60, 99, 119), fill="black")
    ((left, top, right, bottom),) = split_into_regions(blank)
    assert (left, right) == (0, 300)
    assert (top, bottom) == pytest.approx((60, 120), abs=2)
    assert split_into_regions(Image.new("L", (1, 1))) == []
    form = Paper()
    for top in range(100, 500, 30):
        form.draw.line((40, top, 300, top), fill=0, width=2)
        form.draw.line((420, top, 700, top), fill=0, width=2)
    assert [box[0] for box in split_into_regions(form.image)] == [0, pytest.approx(420, abs=2)]


@pytest.mark.parametrize("seed", range(8))
def test_regions_lie_apart_and_within_the_page(seed):
    """Whatever is on it."""
    rng = np.random.default_rng(seed)
    values = np.full(rng.integers(3, 200, 2), 255, dtype=np.uint8)
    for _ in range(rng.integers(30)):
        top, left = rng.integers(0, values.shape)
        values[top : top + rng.integers(1, 20), left : left + rng.integers(1, 60)] = 0
    seen = np.zeros(values.shape, dtype=int)
    boxes = split_into_regions(Image.fromarray(values), most=5)
    for left, top, right, bottom in boxes:
        assert 0 <= left < right <= values.shape[1]
        assert 0 <= top < bottom <= values.shape[0]
        seen[top:bottom, left:right] += 1
    assert seen.max(initial=0) <= 1
    assert len(boxes) <= 5


def test_pages_of_the_bundled_reader_are_not_taken_for_columns():
    """Its lines are short and its tables wide, so a gap from top to bottom is soon found."""
    for seed, row in enumerate(held_out_pages()[:60]):
        for left, _, right, _ in split_into_regions(render_page(row["markdown"], seed=seed)):
            assert (left, right) == (0, 256)
