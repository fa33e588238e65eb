"""The icons of the emoji data set: their names, their split, and the captions of a picture.

Two packages draw the same things: Noto (Google) and Fluent Emoji Flat (Microsoft). A *name* such as
"man gesturing no" is what both share; an *icon* is a name in one style.
"""

import hashlib
import json
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

SIZE = 64
PACKAGES = {"noto": "@iconify-json/noto@1.2.9", "fluent": "@iconify-json/fluent-emoji-flat@1.2.6"}
STYLE_WORDS = {"noto": "noto", "fluent": "fluent flat"}
TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
NUM_HELDOUT_NAMES = 170
NUM_HELDOUT_STYLES = 80

# A mirrored picture of these is another thing, or is text.
_FIXED_WORDS = frozenset(
    word
    for line in (
        "left right leftwards rightwards clockwise counterclockwise oclock thirty calendar letter",
        "letters numbers button sign keycap medal abc input clock watch syringe scroll map globe",
        "quarter crescent gibbous waxing waning hundred atm top soon end back on newspaper ball",
        "receipt label passport 8",
    )
    for word in line.split()
)
_FIXED_CATEGORIES = frozenset({"symbols", "flags"})


@dataclass(frozen=True)
class Icon:
    """One drawing: its name in words, its style, its category, and the SVG's inside.

    Attributes:
        name: Words, lower case, e.g. "man gesturing no".
        style: "noto" or "fluent".
        category: One of nine, e.g. "people & body"; "" where the package gives none.
        body: The inside of the SVG.
        view: Width and height of the SVG's view box.
    """

    name: str
    style: str
    category: str
    body: str
    view: tuple[int, int]


def read_icons(package: Path, style: str) -> list[Icon]:
    """Reads the icons of one unpacked npm package, without variants of skin tone."""
    data = json.loads((package / "icons.json").read_text())
    categories = json.loads((package / "metadata.json").read_text())["categories"]
    category_of = {name: words.lower() for words, names in categories.items() for name in names}
    visible = {name: icon for name, icon in data["icons"].items() if not icon.get("hidden")}

    def is_tone(name: str) -> bool:
        bare = (name.removesuffix("-" + tone) for tone in TONES)
        return "skin-tone" in name or any(stem != name and stem in visible for stem in bare)

    return [
        Icon(
            name=name.replace("-", " "),
            style=style,
            category=category_of.get(name, ""),
            body=icon["body"],
            view=(
                icon.get("width", data.get("width", 16)),
                icon.get("height", data.get("height", 16)),
            ),
        )
        for name, icon in visible.items()
        if not is_tone(name)
    ]


def name_hash(text: str) -> str:
    """Returns a fixed order of texts that has nothing to do with what they say."""
    return hashlib.sha256(f"emoji:{text}".encode()).hexdigest()


def heldout_names(names: set[str]) -> set[str]:
    """Chooses the names that no style shows in training.

    By hash, among names of two or more words, all of which occur in at least two names that stay
    in training: what is asked for is new, the words are not.
    """
    uses = Counter(word for name in names for word in set(name.split()))
    chosen: set[str] = set()
    for name in sorted(names, key=name_hash):
        words = set(name.split())
        if len(words) >= 2 and all(uses[word] >= 3 for word in words):
            chosen.add(name)
            uses -= Counter(words)
        if len(chosen) == NUM_HELDOUT_NAMES:
            break
    return chosen


def heldout_styles(names_of_style: dict[str, set[str]], without: set[str]) -> dict[str, str]:
    """Chooses names of which training shows only one style; returns the style that is kept out."""
    both = set.intersection(*names_of_style.values()) - without
    chosen = sorted(both, key=lambda name: name_hash("style:" + name))[:NUM_HELDOUT_STYLES]
    styles = sorted(names_of_style)
    return {name: styles[int(name_hash("which:" + name), 16) % len(styles)] for name in chosen}


def split_icons(icons: list[Icon]) -> dict[str, list[Icon]]:
    """Splits into "train", "names" (new names) and "styles" (known names in an unseen style)."""
    by_style = {
        style: {icon.name for icon in icons if icon.style == style} for style in STYLE_WORDS
    }
    names = heldout_names(set.union(*by_style.values()))
    styles = heldout_styles(by_style, names)
    split: dict[str, list[Icon]] = {"train": [], "names": [], "styles": []}
    for icon in icons:
        if icon.name in names:
            split["names"].append(icon)
        elif styles.get(icon.name) == icon.style:
            split["styles"].append(icon)
        else:
            split["train"].append(icon)
    return split


def may_flip(name: str, category: str) -> bool:
    """Tells whether the mirror image of an icon is still a picture of its name."""
    return category not in _FIXED_CATEGORIES and _FIXED_WORDS.isdisjoint(name.split())


def full_caption(name: str, style: str, category: str) -> str:
    """Writes the caption that says everything: name, style, category."""
    return ", ".join(part for part in (name, STYLE_WORDS[style], category) if part)


def make_caption(name: str, style: str, category: str, rng: random.Random) -> str:
    """Writes one caption: always the name, mostly the style, sometimes the category."""
    parts = [name]
    if rng.random() < 0.85:
        parts.append(STYLE_WORDS[style])
    if category and rng.random() < 0.5:
        parts.append(category)
    return ", ".join(parts)
