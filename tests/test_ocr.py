"""OCR: what engines read, in what order, and what is said where one is missing."""

import difflib
import importlib.util
import itertools
import math
import os
import sys

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from mmspec.ocr import (
    ENGINES,
    LINE_PITCH,
    PageText,
    Word,
    installed_engines,
    line_pitch,
    open_engine,
    tessdata_folder,
)
from mmspec.ocr_parts import cuts_of, joined

LINES = [
    "A class can implement certain operations that are",
    "invoked by special syntax, such as arithmetic or",
    "subscripting and slicing, by defining methods.",
    "",
    "This is the approach of the language to operator",
    "overloading; it allows classes to define their own",
    "behavior with respect to operators of 1995.",
]
CELLS = [
    ["Article", "Region", "Units", "Price"],
    ["Washer", "North", "317", "41.09"],
    ["Bracket", "South", "259", "22.86"],
    ["Hinge", "West", "374", "12.13"],
    ["Spring", "East", "208", "49.74"],
]


def font(size):
    folder = "/usr/share/fonts/truetype/dejavu"
    if not os.path.isdir(folder):
        pytest.skip(f"the DejaVu fonts are not installed in {folder}")
    return ImageFont.truetype(f"{folder}/DejaVuSans.ttf", size)


def drawn(rows, size=24, columns=1):
    """A page with rows of cells."""
    image = Image.new("L", (34 * size, (len(rows) + 2) * size * 3 // 2), 255)
    draw = ImageDraw.Draw(image)
    for number, row in enumerate(rows):
        for column, cell in enumerate(row):
            place = (size + column * 7 * size, size + number * size * 3 // 2)
            draw.text(place, cell, fill=0, font=font(size))
    return image


def prose(size=24):
    return drawn([[line] for line in LINES], size)


def difference(text, lines=LINES):
    """Share of letters that differ, spaces not heeded."""
    one, other = "".join(text.split()), "".join("".join(lines).split())
    return 1 - difflib.SequenceMatcher(None, one, other, autojunk=False).ratio()


@pytest.fixture(scope="module", params=ENGINES)
def engine(request):
    if importlib.util.find_spec(ENGINES[request.param][0]) is None:
        pytest.skip(f"the package {request.param} is not installed")
    if request.param == "tesserocr":
        try:
            tessdata_folder()
        except ValueError as error:
            pytest.skip(str(error))
    return open_engine(request.param)


@pytest.mark.parametrize("size", [9, 14, 24])
def test_a_page_is_read(engine, size):
    page = engine(prose(size))
    assert difference(page.text) < 0.05
    assert page.text.count("\n\n") == 1
    for word in page.words:
        assert page.text[word.end - len(word.text) : word.end] == word.text
        assert 0 <= word.confidence <= 1
        left, top, right, bottom = word.box
        assert 0 <= left < right <= 34 * size + 2
        assert 0 <= top < bottom <= len(LINES) * size * 3
    assert np.mean([word.confidence for word in page.words]) > 0.7


def test_noise_is_read_over(engine):
    image = prose().filter(ImageFilter.GaussianBlur(1.2))
    noise = np.random.default_rng(0).normal(0, 40, (image.height, image.width))
    scan = Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))
    assert difference(engine(scan).text) < 0.2


def test_a_table_is_read_row_by_row(engine):
    lines = engine(drawn(CELLS, columns=4)).text.replace("\n\n", "\n").split("\n")
    assert lines == ["\t".join(row) for row in CELLS]


def test_a_page_without_text_has_none(engine):
    assert engine(Image.new("RGB", (300, 200), "white")) == PageText("")


def read_in_parts(engine, image):
    page, cuts = PageText(""), cuts_of(image)
    for top, bottom in itertools.pairwise(cuts.edges):
        part = engine(image.crop((0, top, image.width, bottom)), cuts.pitch)
        page = joined(page, part, top, cuts.pitch)
    return page


@pytest.mark.parametrize("size", [14, 24])
def test_a_page_is_read_in_parts_as_it_is_whole(engine, size):
    image, lines = drawn([[line] for line in LINES * 2], size), LINES * 2
    assert len(cuts_of(image).edges) == 4
    page = read_in_parts(engine, image)
    assert difference(page.text, lines) < 0.05
    assert page.text.count("\n\n") == engine(image).text.count("\n\n") == 2
    for word in page.words:
        assert page.text[word.end - len(word.text) : word.end] == word.text
        assert word.box[1] < word.box[3] <= image.height
    tops = [word.box[1] for word in page.words]
    assert all(after > before - size for before, after in itertools.pairwise(tops))


def test_a_table_is_read_in_parts_row_by_row(engine):
    rows = [*CELLS, *CELLS[1:], *CELLS[1:]]
    lines = read_in_parts(engine, drawn(rows, columns=4)).text.replace("\n\n", "\n").split("\n")
    assert lines == ["\t".join(row) for row in rows]


# --------------------------------------------------------------------------- geometry


def test_pages_are_cut_between_lines():
    image = drawn([[line] for line in LINES * 2], 24)
    ruled = image.copy()
    for column in range(100, 800, 200):
        ImageDraw.Draw(ruled).line((column, 0, column, image.height), fill=0, width=3)
    for page in (image, ruled):
        cuts = cuts_of(page)
        assert cuts.pitch == pytest.approx(36, abs=1)
        assert len(cuts.edges) == 4
        for row in cuts.edges[1:-1]:
            assert len(np.unique(np.asarray(page)[row - 2 : row + 2], axis=0)) == 1
    beside = Image.new("L", (2 * image.width, image.height), 255)
    beside.paste(image, (0, 0))
    beside.paste(image, (image.width, 18))
    # No row is empty in both columns but those between paragraphs.
    for row in cuts_of(beside).edges[1:-1]:
        assert np.asarray(beside)[row].min() == 255


def test_what_cannot_be_cut_is_one_part():
    small = prose().resize((200, 80))
    assert cuts_of(small).pitch < LINE_PITCH / 4
    for page in (small, Image.new("L", (100, 100), 255), drawn([["word"]])):
        assert cuts_of(page).edges == (0, page.height)


@pytest.mark.parametrize("size", [9, 14, 24])
def test_line_pitch_is_that_of_the_lines(size):
    assert line_pitch(prose(size)) == pytest.approx(size * 3 // 2, abs=1)
    assert line_pitch(Image.new("L", (100, 100), 255)) is None


def test_the_text_between_two_heights():
    words = [("one", (0, 0, 9, 9)), ("two", (10, 0, 19, 9)), ("three", (0, 20, 9, 29))]
    ends = [3, 7, 13]
    page = PageText(
        "one two\nthree",
        tuple(Word(text, 0.5, box, end) for (text, box), end in zip(words, ends, strict=True)),
    )
    assert page.between(0, 12).text == "one two"
    assert page.between(12, 40) == PageText("three", (Word("three", 0.5, (0, 20, 9, 29), 5),))
    assert page.between(40, 50) == PageText("")


def test_the_text_of_a_column_of_lines_across_columns():
    """Words that are left out leave the widest blank around them."""
    lines = [["one", "far", "two"], ["three", "away", ""], ["four", "off", "five"]]
    text, words = "", []
    for row, cells in enumerate(lines):
        text += ("\n\n" if row == 2 else "\n") * bool(row)
        for column, cell in enumerate(filter(None, cells)):
            text += "\t" * bool(column) + cell
            box = (40 * column, 20 * row, 40 * column + 9, 20 * row + 9)
            words.append(Word(cell, 0.5, box, len(text)))
    page = PageText(text, tuple(words))
    assert text == "one\tfar\ttwo\nthree\taway\n\nfour\toff\tfive"
    assert page.between(0, 60, 0, 30).text == "one\nthree\n\nfour"
    outer = PageText(text, tuple(word for word in words if word.text != "far"))
    assert outer.between(0, 60, 60).text == "two\n\nfive"
    for part in (page.between(0, 60, 30, 70), page.between(0, 60), outer.between(0, 60, 0, 30)):
        for word in part.words:
            assert part.text[word.end - len(word.text) : word.end] == word.text
    assert page.between(-math.inf, math.inf) == page


# --------------------------------------------------------------------------- what is missing


@pytest.mark.parametrize("given", [None, "3"])
def test_tesseract_is_loaded_with_one_thread_and_nothing_else_is(monkeypatch, tmp_path, given):
    """Unless something else is asked for."""
    (tmp_path / "tesserocr.py").write_text(
        "import os\nraise ImportError('limit ' + os.environ['OMP_THREAD_LIMIT'])"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tesserocr", raising=False)
    monkeypatch.delenv("OMP_THREAD_LIMIT", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_THREAD_LIMIT", given)
    with pytest.raises(ValueError, match=f"limit {given or 1}"):
        open_engine("tesserocr")
    assert os.environ.get("OMP_THREAD_LIMIT") == given


@pytest.mark.parametrize(("name", "extra"), [("tesserocr", "ocr"), ("rapidocr", "rapidocr")])
def test_a_missing_package_is_named(monkeypatch, name, extra):
    monkeypatch.setitem(sys.modules, name, None)
    message = rf"needs the package {name}.*pip install 'mmspec\[{extra}\]'"
    with pytest.raises(ValueError, match=message):
        open_engine(name)


def test_missing_data_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("TESSDATA_PREFIX", str(tmp_path))
    (tmp_path / "tessdata").mkdir()
    with pytest.raises(ValueError, match=rf"xyz.traineddata .* not found in {tmp_path}.*Debian"):
        tessdata_folder("xyz")
    (tmp_path / "tessdata" / "xyz.traineddata").touch()
    assert tessdata_folder("xyz") == f"{tmp_path}/tessdata/"


def test_an_engine_without_its_data_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr("mmspec.ocr._TESSDATA", (str(tmp_path / "*"),))
    monkeypatch.delenv("TESSDATA_PREFIX", raising=False)
    assert installed_engines() == ["rapidocr"]
    (tmp_path / "5").mkdir()
    (tmp_path / "5" / "eng.traineddata").touch()
    assert installed_engines() == ["tesserocr", "rapidocr"]


def test_an_unknown_engine_is_refused():
    with pytest.raises(ValueError, match="unknown OCR engine 'x'; known: tesserocr, rapidocr"):
        open_engine("x")
