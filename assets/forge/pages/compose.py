"""Puts text on pages: Markdown of at most 15 lines of at most 31 characters."""

import json
import textwrap
from pathlib import Path
from random import Random
from typing import Any

from mmspec.assets.pages.rendering import CHARACTERS, NUM_COLUMNS, NUM_ROWS

KINDS = ("docs", "wordnet", "table", "random")
WEIGHTS = (0.45, 0.2, 0.17, 0.18)
_SEPARATOR = "---"
# What a row of prose must not begin with, since a page would show it as something else.
_MARKS = ("# ", "## ", "- ", "|")


def load_blocks(work_dir: Path, part: str) -> dict[str, list[Any]]:
    """The text of "train", "dev" or "heldout"."""
    blocks: dict[str, list[Any]] = json.loads((work_dir / "blocks.json").read_text())[part]
    return blocks


def wrap(text: str, first: str = "", later: str = "") -> list[str]:
    """Rows of a text; none where a row would read as markup."""
    rows = textwrap.wrap(text, NUM_COLUMNS, initial_indent=first, subsequent_indent=later)
    bare = rows[1:] if first else rows
    return [] if any(row.startswith(_MARKS) for row in bare) else rows


def block_rows(kind: str, content: Any, rng: Random) -> list[str]:
    """Rows of one block of the docs."""
    if kind == "h1":
        return wrap(content)[:1] and ["# " + wrap(content)[0]]
    if kind == "h2":
        return wrap(content)[:1] and ["## " + wrap(content)[0]]
    if kind == "list":
        start = rng.randrange(len(content))
        return [row for item in content[start:] for row in wrap(item, "- ", "  ")]
    return wrap(content)


def docs_blocks(blocks: dict[str, list[Any]], rng: Random) -> list[list[str]]:
    """Blocks that follow each other in one file."""
    source = rng.choice(blocks["docs"])
    start = rng.randrange(len(source))
    return [block_rows(kind, content, rng) for kind, content in source[start : start + 12]]


def wordnet_blocks(blocks: dict[str, list[Any]], rng: Random) -> list[list[str]]:
    """Words with what they mean, as entries or as a list."""
    chosen = rng.sample(blocks["wordnet"], 6)
    if rng.random() < 0.4:
        entries = [wrap(f"{word}: {gloss}", "- ", "  ") for word, _, gloss in chosen]
        return [["# " + chosen[0][0][: NUM_COLUMNS - 2]], [row for rows in entries for row in rows]]
    found = []
    for word, others, gloss in chosen:
        found.append(["## " + word[:NUM_COLUMNS]])
        found.append(wrap(gloss))
        if others and rng.random() < 0.5:
            found.append([row for other in others for row in wrap(other, "- ", "  ")])
    return found


def random_word(blocks: dict[str, list[Any]], rng: Random) -> str:
    """A number, some characters, or a word."""
    pick = rng.random()
    if pick < 0.25:
        return f"{rng.uniform(0, 10 ** rng.randrange(1, 6)):.{rng.randrange(4)}f}"
    if pick < 0.4:
        return "".join(rng.choices(CHARACTERS[1:-1], k=rng.randrange(1, 9)))
    if pick < 0.55:
        return "".join(rng.choices("abcdefghijklmnopqrstuvwxyzABCDEFGHIJ_", k=rng.randrange(2, 10)))
    return rng.choice(rng.choice(blocks["wordnet"])[2].split())


def random_blocks(blocks: dict[str, list[Any]], rng: Random) -> list[list[str]]:
    """Words in no order, which no language model can guess."""
    found = []
    for _ in range(5):
        words = [random_word(blocks, rng) for _ in range(rng.randrange(1, 24))]
        kind = rng.choice(["p", "p", "p", "h1", "h2", "list"])
        content: Any = " ".join(words)
        if kind == "list":
            content = [" ".join(words[i : i + 4]) for i in range(0, len(words), 4)]
        found.append(block_rows(kind, content, rng))
    return found


def table_rows(blocks: dict[str, list[Any]], rng: Random, max_rows: int) -> list[str]:
    """A table of words and numbers."""
    num_columns = rng.choice([2, 2, 3, 3, 4])
    budget = NUM_COLUMNS - 1 - 3 * num_columns
    kinds = rng.choices(["word", "number", "any"], k=num_columns)
    kinds[0] = "word"

    def cell(kind: str, width: int) -> str:
        if kind == "number":
            text = f"{rng.uniform(0, 10 ** rng.randrange(1, 5)):.{rng.randrange(3)}f}"
        elif kind == "any":
            text = random_word(blocks, rng).replace("|", "")
        else:
            text = rng.choice(blocks["wordnet"])[0]
        return text[:width].strip().lstrip("-") or "0"

    widths = [budget // num_columns] * num_columns
    widths[rng.randrange(num_columns)] += budget % num_columns
    num_lines = rng.randrange(1, max(2, max_rows - 1))
    head = [cell("word", width) for width in widths]
    lines = [[cell(k, w) for k, w in zip(kinds, widths, strict=True)] for _ in range(num_lines)]
    rule = "|" + "|".join([_SEPARATOR] * num_columns) + "|"
    return [_joined(head), rule, *map(_joined, lines)]


def _joined(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def compose(blocks: dict[str, list[Any]], rng: Random, max_rows: int = NUM_ROWS) -> tuple[str, str]:
    """Makes one page.

    Args:
        blocks: See `load_blocks`.
        rng: Decides everything.
        max_rows: Lines of the page at most.

    Returns:
        The Markdown, and its kind.
    """
    kind = rng.choices(KINDS, WEIGHTS)[0]
    if max_rows < 3 and kind == "table":
        kind = "random"
    makers = {"docs": docs_blocks, "wordnet": wordnet_blocks, "random": random_blocks}
    while True:
        if kind == "table":
            table = table_rows(blocks, rng, max_rows)
            around = docs_blocks(blocks, rng) if rng.random() < 0.5 else wordnet_blocks(blocks, rng)
            place = rng.randrange(2) if max_rows > 5 else 0
            found = [*around[:place], table, *around[place:]]
        else:
            found = makers[kind](blocks, rng)
        rows: list[str] = []
        for block in found:
            if block:
                rows += [""] * bool(rows) + block
        page = "\n".join(rows[:max_rows]).strip("\n")
        if page and not page.startswith("  ") and not page.endswith("\n|---"):
            return page, kind
