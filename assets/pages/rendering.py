r"""Draws a page of Markdown as `bundled:pages` reads it: one line of Markdown, one row of the page.

    from mmspec.assets.pages.rendering import held_out_pages, render_page
    image = render_page("# Title\n\nSome words.", seed=1)
    worn = render_page(held_out_pages()[0]["markdown"], seed=0, blur=0.6, noise=15)

What a line becomes:
    ``# x``        bold, with a rule below it
    ``## x``       bold
    ``- x``        a bullet
    ``| x | y |``  a row of a table, its columns aligned, with rules between them
    ``|---|---|``  a rule over the width of the table
    all others     as they are
"""

import json
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 256
CELL_WIDTH, CELL_HEIGHT = 8, 16
NUM_COLUMNS, NUM_ROWS = 31, 15
FONTS = ("DejaVu Sans Mono", "Liberation Mono")
BULLET = "\u2022"
#: The characters of the sheet: printable ASCII, and the bullet that a page shows for a dash.
CHARACTERS = "".join(map(chr, range(32, 127))) + BULLET
SHEET = Path(__file__).parent / "glyphs.png"

_MAX_LEFT, _MAX_TOP = 7, 4  # the largest shifts of the text's corner, in pixels
_RULE = "\0"  # stands for a vertical rule in a laid-out row


def held_out_pages() -> list[dict[str, str]]:
    """Pages whose text the reader has not seen: "markdown", and what "kind" of page it is."""
    lines = (Path(__file__).parent / "held_out.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def check_page(markdown: str) -> None:
    """Checks that a text fits on a page.

    Raises:
        ValueError: On more rows, longer rows or other characters than a page has.
    """
    rows, _, _ = lay_out(markdown)
    if len(rows) > NUM_ROWS:
        raise ValueError(f"a page has at most {NUM_ROWS} rows, got {len(rows)}")
    for row in rows:
        if len(row) > NUM_COLUMNS:
            raise ValueError(f"a row has at most {NUM_COLUMNS} columns, got {len(row)}: {row!r}")
    unknown = sorted(set(markdown) - set(CHARACTERS[:-1]) - {"\n"})
    if unknown:
        raise ValueError(f"a page has printable ASCII only, got {unknown}")


def lay_out(markdown: str) -> tuple[list[str], list[bool], list[tuple[int, int, int]]]:
    """Turns Markdown into what stands on the page.

    Returns:
        The rows as text, which of them are bold, and the horizontal rules as (row, height within
        the row in pixels, columns).
    """
    lines = markdown.split("\n")
    rows: list[str] = []
    rules: list[tuple[int, int, int]] = []
    for index, line in enumerate(lines):
        if line.startswith("|"):
            text = _table_row(lines, index)
            if line.startswith("|-"):
                rules.append((index, CELL_HEIGHT // 2, len(text)))
        elif line.startswith("# "):
            text = line[2:]
            rules.append((index, CELL_HEIGHT - 1, NUM_COLUMNS))
        else:
            text = line.removeprefix("## ")
            text = BULLET + text[1:] if line.startswith("- ") else text
        rows.append(text)
    return rows, [line.startswith(("# ", "## ")) for line in lines], rules


def _table_row(lines: list[str], index: int) -> str:
    """One row of a table, its cells as wide as the widest of their column."""
    first = last = index
    while first > 0 and lines[first - 1].startswith("|"):
        first -= 1
    while last + 1 < len(lines) and lines[last + 1].startswith("|"):
        last += 1
    table = [line for line in lines[first : last + 1] if not line.startswith("|-")]
    widths = [max(map(len, column)) for column in zip(*map(cells, table), strict=True)]
    is_rule = lines[index].startswith("|-")
    own = [""] * len(widths) if is_rule else cells(lines[index])
    padded = [cell.ljust(width) for cell, width in zip(own, widths, strict=True)]
    return f"{_RULE} " + f" {_RULE} ".join(padded) + f" {_RULE}"


def cells(line: str) -> list[str]:
    """The cells of a table's line, without the blanks around them."""
    return [cell.strip() for cell in line.strip("|").split("|")]


@cache
def _sheet() -> np.ndarray:
    """Ink of all glyphs, 0 to 1: (font, weight, character, height, width)."""
    with Image.open(SHEET) as image:
        sheet = np.asarray(image, dtype=np.float32) / 255
    shape = (len(FONTS), 2, CELL_HEIGHT, len(CHARACTERS), CELL_WIDTH)
    return np.ascontiguousarray(sheet.reshape(shape).transpose(0, 1, 3, 2, 4))


def _grid(rows: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Index of every cell's glyph, and which cells have a vertical rule: (15, 31) both."""
    codes = np.zeros((NUM_ROWS, NUM_COLUMNS), dtype=np.int64)
    is_rule = np.zeros((NUM_ROWS, NUM_COLUMNS), dtype=bool)
    for index, row in enumerate(rows):
        points = np.frombuffer(row.encode("utf-16-le"), dtype=np.uint16).astype(np.int64)
        codes[index, : len(row)] = np.where(points == ord(BULLET), 95, points - 32).clip(0)
        is_rule[index, : len(row)] = points == ord(_RULE)
    return codes, is_rule


def cell_codes(markdown: str) -> np.ndarray:
    """What stands in every cell of the page: indices into `CHARACTERS`, (15, 31)."""
    codes, is_rule = _grid(lay_out(markdown)[0])
    codes[is_rule] = CHARACTERS.index("|")
    return codes


def draw_ink(markdown: str, font: int) -> np.ndarray:
    """The ink of the text area, 0 to 1: (240, 248)."""
    rows, is_bold, rules = lay_out(markdown)
    codes, is_rule = _grid(rows)
    weights = np.zeros(NUM_ROWS, dtype=np.int64)
    weights[: len(rows)] = is_bold
    ink = _sheet()[font, weights[:, None], codes]
    ink[is_rule, :, CELL_WIDTH // 2] = 1.0
    ink = ink.transpose(0, 2, 1, 3).reshape(NUM_ROWS * CELL_HEIGHT, NUM_COLUMNS * CELL_WIDTH)
    for row_index, height, num_columns in rules:
        left = CELL_WIDTH // 2 if is_rule[row_index, 0] else 0
        right = num_columns * CELL_WIDTH - (CELL_WIDTH // 2 - 1 if left else 0)
        ink[row_index * CELL_HEIGHT + height, left:right] = 1.0
    return ink


def draw_page(
    markdown: str, rng: np.random.Generator, *, blur: float = 0.0, noise: float = 0.0
) -> np.ndarray:
    """`render_page` without checks, as grey levels: (256, 256), uint8."""
    ink = draw_ink(markdown, int(rng.integers(len(FONTS))))
    left, top = rng.integers(_MAX_LEFT + 1), rng.integers(_MAX_TOP + 1)
    dark, bright = rng.uniform(0, 90), rng.uniform(205, 255)
    page = np.zeros((SIDE, SIDE), dtype=np.float32)
    page[top : top + ink.shape[0], left : left + ink.shape[1]] = ink
    if blur:
        page = _blurred(page, blur)
    page = bright + (dark - bright) * page
    if noise:
        page += noise * rng.standard_normal(page.shape, dtype=np.float32)
    return np.clip(np.rint(page), 0, 255).astype(np.uint8)


def _blurred(page: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur; no ink comes in from outside."""
    reach = int(np.ceil(3 * sigma))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).astype(np.float32)
    for _ in range(2):
        padded = np.pad(page, ((reach, reach), (0, 0)))
        page = sum(weight * padded[i : i + SIDE] for i, weight in enumerate(kernel))
        page = page.T
    return page


def render_page(
    markdown: str, *, seed: int = 0, blur: float = 0.0, noise: float = 0.0
) -> Image.Image:
    """Draws one page.

    Args:
        markdown: At most 15 lines; see the module. Nothing is wrapped here.
        seed: Decides the font, the text's place, the grey of ink and paper, and the noise.
        blur: Standard deviation of a Gaussian blur in pixels, 0 for none.
        noise: Standard deviation of Gaussian noise in grey levels of 255, 0 for none.

    Returns:
        The page, 256x256 pixels, RGB.

    Raises:
        ValueError: If the text does not fit on a page, or blur or noise is negative.
    """
    check_page(markdown)
    if blur < 0 or noise < 0:
        raise ValueError(f"blur and noise must be at least 0, got {blur} and {noise}")
    rng = np.random.default_rng(seed)
    return Image.fromarray(draw_page(markdown, rng, blur=blur, noise=noise)).convert("RGB")
