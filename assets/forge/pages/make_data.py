"""Collects the text of the pages: prose, headings and lists, split by where they come from.

    python -m mmspec.assets.forge.pages.make_data --work-dir build/pages

Needs Debian's packages python3.11-doc and wordnet-base. A source file, and a synset, belongs as a
whole to one part: "train", "dev" (for decisions) or "heldout" (for the published figures).
"""

import argparse
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

DOCS = Path("/usr/share/doc/python3.11/html/_sources")
WORDNET = Path("/usr/share/wordnet")
PARTS = ("train", "dev", "heldout")

_TYPOGRAPHY = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "."})
_INLINE = (
    (re.compile(r":[\w:.+-]+:`[!~]?([^`<]*?)\s*(?:<[^`]*>)?`"), r"\1"),
    (re.compile(r"``([^`]*)``"), r"\1"),
    (re.compile(r"`([^`<]*?)\s*(?:<[^`]*>)?`_{0,2}"), r"\1"),
    (re.compile(r"\*\*([^*]+)\*\*"), r"\1"),
    (re.compile(r"\*([^*\s][^*]*)\*"), r"\1"),
    (re.compile(r"\|([\w ]+)\|"), r"\1"),
    (re.compile(r"\\(.)"), r"\1"),
    (re.compile(r"::$"), ":"),
    (re.compile(r"\s+"), " "),
)
_UNDERLINE = re.compile(r"([=*~\-^\"#])\1{2,}$")
_ITEM = re.compile(r"[*-] +")
# Entries of a dictionary that are no good as sample pages.
_COARSE = re.compile(
    r"obscen|vulgar|disparag|offensive|slur|derog|insult|sex|genital|penis|vagina|anus|rape|prosti"
    r"|nazi|fellat|copulat|intercourse|sodom|masturb|excre|feces|incest|breast|homosex|erotic|lust",
    re.IGNORECASE,
)


def part_of(name: str) -> str:
    """The part that a source belongs to: 3 % held out, 2 % dev."""
    share = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) % 100
    return "heldout" if share < 3 else "dev" if share < 5 else "train"


def clean(text: str) -> str | None:
    """Text without markup, or None if it has characters that a page lacks."""
    text = text.strip().translate(_TYPOGRAPHY)
    for pattern, replacement in _INLINE:
        text = pattern.sub(replacement, text)
    text = text.strip()
    return text if text and text.isascii() and text.isprintable() else None


def doc_blocks(source: str) -> Iterator[tuple[str, str | list[str]]]:
    """Yields the headings, paragraphs and lists of a reStructuredText file."""
    is_code = False
    for chunk in re.split(r"\n\s*\n", source):
        lines = chunk.strip("\n").split("\n")
        indent = len(lines[0]) - len(lines[0].lstrip())
        if is_code and indent:
            continue
        is_code = lines[-1].endswith("::") or lines[0].lstrip().startswith(".. ")
        if lines[0].lstrip().startswith(("..", ":", ">>>", "+-", "==", "|")):
            continue
        block = _block([line.strip() for line in lines])
        if block is not None:
            yield block


def _block(lines: list[str]) -> tuple[str, str | list[str]] | None:
    """The block that these lines are, if it is one a page can show."""
    if len(lines) == 2 and _UNDERLINE.match(lines[1]):
        title = clean(lines[0])
        return title and ("h1" if lines[1][0] in "=*" else "h2", title)
    if _ITEM.match(lines[0]):
        joined = "\n".join(lines)
        items = [clean(one) for one in re.split(r"(?:^|\n)[*-] +", joined)[1:]]
        return ("list", items) if items and all(items) else None
    text = clean(" ".join(lines))
    letters = sum(c.isalpha() or c == " " for c in text or "")
    return ("p", text) if text and len(text) > 20 and letters > 0.8 * len(text) else None


def synsets() -> Iterator[tuple[str, str, list[str], str]]:
    """Yields offset and kind, the first word, the others and the gloss of WordNet's synsets."""
    for kind in ("noun", "verb", "adj", "adv"):
        for line in (WORDNET / f"data.{kind}").read_text().splitlines():
            if line.startswith("  "):
                continue
            fields, _, gloss = line.partition(" | ")
            parts = fields.split()
            words = [parts[4 + 2 * i].replace("_", " ") for i in range(int(parts[3], 16))]
            yield f"{kind} {parts[0]}", words[0], words[1:], gloss.strip()


def main() -> None:
    """Writes `blocks.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work-dir", type=Path, required=True)
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    blocks: dict[str, dict[str, list]] = {part: {"docs": [], "wordnet": []} for part in PARTS}
    for path in sorted(DOCS.rglob("*.rst.txt")):
        name = str(path.relative_to(DOCS))
        found = list(doc_blocks(path.read_text()))
        if found:
            blocks[part_of(name)]["docs"].append(found)
    for key, word, others, gloss in synsets():
        text = clean(gloss)
        is_coarse = _COARSE.search(" ".join([gloss, word, *others]))
        if text and not is_coarse and all(clean(one) for one in (word, *others)):
            blocks[part_of(key)]["wordnet"].append([word, others, text])
    (args.work_dir / "blocks.json").write_text(json.dumps(blocks))
    for part, sources in blocks.items():
        num_blocks = sum(map(len, sources["docs"]))
        print(part, len(sources["docs"]), "files", num_blocks, "blocks,", len(sources["wordnet"]))


if __name__ == "__main__":
    main()
