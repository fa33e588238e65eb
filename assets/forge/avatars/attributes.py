"""What an avatar of the bundled data set can look like, and how a caption says so.

The attributes are chosen here, in Python, and handed to DiceBear as single-choice options: the
caption and the picture then agree by construction. The colours of hair, clothing, hats, skin and
background are all different from one another, so that one pixel tells which part it belongs to;
the scorer (`assets/avatars/scoring.py`) rests on that.
"""

import random

Attributes = dict[str, str]

COLORS: dict[str, dict[str, str]] = {
    "hair_color": {
        "black": "241c2b",
        "brown": "6e3b12",
        "blonde": "e3b94f",
        "red": "c3420f",
        "grey": "9c9ca6",
        "blue": "2f62c9",
        "green": "3c9a3f",
        "pink": "ea6fb0",
    },
    "clothing_color": {
        "red": "d11141",
        "blue": "428bca",
        "green": "00b159",
        "yellow": "ffc425",
        "purple": "7b3fa0",
        "orange": "f57f29",
        "pink": "f59ac2",
        "black": "3a3a46",
    },
    "hat_color": {
        "red": "a3171f",
        "blue": "1f3f8f",
        "green": "1d6b4a",
        "purple": "5a3d8a",
        "white": "e8e8f0",
    },
    "skin": {"light": "ffdbac", "tan": "dcae7c", "brown": "a26d3d", "dark": "5a3825"},
    "background": {
        "blue": "a9d3f2",
        "green": "b9e3b4",
        "pink": "f7c6d6",
        "yellow": "f6eaa4",
        "purple": "d2bdec",
        "grey": "cfd3d6",
    },
}

# Attribute value -> DiceBear variants that show it. The variant itself is not in the caption.
VARIANTS: dict[str, dict[str, list[str]]] = {
    "hair_length": {
        "short": ["short01", "short06", "short09", "short14", "short15", "short16", "short17"],
        "long": ["long01", "long02", "long03", "long07", "long13", "long21"],
    },
    "clothing_pattern": {
        "plain": ["variant03", "variant04", "variant11", "variant14"],
        "checkered": ["variant06"],
    },
    "glasses": {
        "none": ["light05"],
        "glasses": ["light05", "light06"],
        "sunglasses": ["dark05", "dark07"],
    },
    "hat": {"none": ["variant04"], "hat": ["variant02", "variant04", "variant09"]},
    "beard": {"none": ["variant05"], "beard": ["variant05", "variant08"]},
    "mouth": {"smile": ["happy06", "happy09"], "frown": ["sad01", "sad09"]},
}
# Short hair that a hat does not hide completely (a caption with hat and hair stays true).
SHORT_UNDER_HAT = ["short01", "short14", "short15", "short17"]
EYES = ["variant04", "variant06", "variant09"]

# Drawn uniformly unless listed here.
WEIGHTS: dict[str, list[float]] = {
    "clothing_pattern": [0.75, 0.25],
    "glasses": [0.5, 0.25, 0.25],
    "hat": [0.65, 0.35],
    "beard": [0.7, 0.3],
}

# A held-out combination is a triple of these; none of them is ever rendered for training.
HELDOUT_KEYS = ("hair_color", "clothing_color", "glasses")
NUM_HELDOUT_TRIPLES = 24


def draw_attributes(rng: random.Random) -> Attributes:
    """Draws one avatar's attributes, `hat_color` being "none" where there is no hat."""
    chosen: Attributes = {}
    for name, values in (VARIANTS | COLORS).items():
        chosen[name] = rng.choices(list(values), weights=WEIGHTS.get(name))[0]
    if chosen["hat"] == "none":
        chosen["hat_color"] = "none"
    return chosen


def heldout_triples(seed: int) -> set[tuple[str, ...]]:
    """Returns the (hair colour, clothing colour, glasses) triples kept out of training."""
    triples = [
        (hair, clothing, glasses)
        for hair in COLORS["hair_color"]
        for clothing in COLORS["clothing_color"]
        for glasses in VARIANTS["glasses"]
    ]
    return set(random.Random(seed).sample(triples, NUM_HELDOUT_TRIPLES))


def is_heldout(attributes: Attributes, triples: set[tuple[str, ...]]) -> bool:
    """Tells whether these attributes fall into a held-out combination."""
    return tuple(attributes[key] for key in HELDOUT_KEYS) in triples


def dicebear_options(attributes: Attributes, rng: random.Random) -> dict[str, object]:
    """Turns attributes into DiceBear pixelArt options; variants inside a value are random."""

    def variant(name: str) -> list[str]:
        return [rng.choice(VARIANTS[name][attributes[name]])]

    def color(name: str) -> list[str]:
        return [COLORS[name].get(attributes[name], "000000")]

    hair = variant("hair_length")
    if attributes["hat"] == "hat" and attributes["hair_length"] == "short":
        hair = [rng.choice(SHORT_UNDER_HAT)]
    return {
        "seed": "avatar",
        "size": 16,
        "hair": hair,
        "hairColor": color("hair_color"),
        "clothing": variant("clothing_pattern"),
        "clothingColor": color("clothing_color"),
        "eyes": [rng.choice(EYES)],
        "eyesColor": ["4a5f78"],
        "mouth": variant("mouth"),
        "mouthColor": ["b5443f"],
        "skinColor": color("skin"),
        "glasses": variant("glasses"),
        "glassesColor": ["0d0d12"],
        "glassesProbability": 0 if attributes["glasses"] == "none" else 100,
        "hat": variant("hat"),
        "hatColor": color("hat_color"),
        "hatProbability": 0 if attributes["hat"] == "none" else 100,
        "beard": variant("beard"),
        "beardProbability": 0 if attributes["beard"] == "none" else 100,
        "accessoriesProbability": 0,
        "backgroundColor": color("background"),
    }


PREFIXES = [
    "a pixel avatar",
    "a pixel art avatar",
    "an avatar",
    "a portrait",
    "a pixel portrait of a person",
    "pixel art of a person",
]
BARE_PREFIXES = ["avatar", "pixel avatar", "pixel art", "portrait"]

# Groups of attributes which one phrase can mention.
PHRASES: dict[str, tuple[str, ...]] = {
    "hair": ("hair_color", "hair_length"),
    "clothing": ("clothing_color", "clothing_pattern"),
    "glasses": ("glasses",),
    "hat": ("hat", "hat_color"),
    "beard": ("beard",),
    "skin": ("skin",),
    "mouth": ("mouth",),
    "background": ("background",),
}


def _phrase(group: str, attributes: Attributes, rng: random.Random) -> tuple[str, Attributes]:
    """Words for one group, without article, and the attributes those words state."""
    words, names = [attributes.get(group, "")], [group]
    match group:
        case "hair":
            names = ["hair_color"] if rng.random() < 0.5 else ["hair_length", "hair_color"]
            words = [attributes[name] for name in names] + ["hair"]
        case "clothing":
            checkered = attributes["clothing_pattern"] == "checkered"
            named = rng.random() < (0.8 if checkered else 0.2)
            names = ["clothing_pattern", "clothing_color"] if named else ["clothing_color"]
            words = [attributes[name] for name in names] + [rng.choice(["shirt", "shirt", "top"])]
        case "glasses":
            words = ["no glasses"] if attributes["glasses"] == "none" else words
        case "hat":
            names = ["hat"]
            words = ["no hat"] if attributes["hat"] == "none" else ["hat"]
            if attributes["hat"] != "none" and rng.random() < 0.85:
                names, words = ["hat", "hat_color"], [attributes["hat_color"], "hat"]
        case "beard":
            words = ["no beard"] if attributes["beard"] == "none" else words
        case "skin" | "background":
            words.append(group)
    return " ".join(words), {name: attributes[name] for name in names}


def make_caption(
    attributes: Attributes,
    rng: random.Random,
    always: tuple[str, ...] = (),
    only: tuple[str, ...] = (),
) -> tuple[str, Attributes]:
    """Writes one caption of an avatar.

    Args:
        attributes: The complete attributes of the avatar.
        rng: Chooses which groups to mention, their order and the wording.
        always: Groups of `PHRASES` that must be mentioned.
        only: If given, exactly these groups are mentioned.

    Returns:
        The caption, and the attributes it states (what a picture may be judged by).
    """
    groups = list(only or PHRASES)
    if not only and rng.random() >= 0.35:
        keep = rng.uniform(0.15, 0.9)
        groups = [group for group in groups if group in always or rng.random() < keep]
    rng.shuffle(groups)
    tags = rng.random() < 0.2  # the short style of prompts: "avatar, red hair, glasses"
    parts: list[str] = []
    stated: Attributes = {}
    background = ""
    for group in groups:
        words, claims = _phrase(group, attributes, rng)
        stated |= claims
        if group in ("clothing", "hat", "beard", "mouth") and not words.startswith("no "):
            words = words if tags else f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
        if group == "background" and not tags:
            background = f"on {'an' if words[0] in 'aeiou' else 'a'} {words}"
        else:
            parts.append(words)
    if tags:
        return ", ".join([rng.choice(BARE_PREFIXES), *parts]), stated
    caption = rng.choice(PREFIXES)
    if parts:
        listed = " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
        caption = f"{caption} with {listed}"
    return (f"{caption} {background}" if background else caption), stated


def caption_words() -> list[str]:
    """Returns every word and mark that `make_caption` can write, sorted."""
    text = [*PREFIXES, *BARE_PREFIXES, "with and on a an no hair shirt top hat beard skin , ."]
    text += ["background glasses sunglasses"]
    for values in (VARIANTS | COLORS).values():
        text.extend(values)
    return sorted({word for line in text for word in line.split()})
