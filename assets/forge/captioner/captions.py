"""What the captioner says of an avatar: all of its attributes, always in the same order."""

from mmspec.assets.forge.avatars.attributes import COLORS, Attributes

#: Words that say which value of an attribute a caption states, where they do not stand alone.
_MARKED = {
    "hair_color": "hair",
    "hat_color": "hat",
    "skin": "skin",
    "background": "background",
    "clothing_color": "shirt",
}


def full_caption(attributes: Attributes) -> str:
    """Describes an avatar in the wording of the prompts of `bundled:avatars`."""
    parts = [f"{attributes['hair_length']} {attributes['hair_color']} hair"]
    parts += [f"a {attributes['hat_color']} hat" if attributes["hat"] == "hat" else "no hat"]
    parts += ["no glasses" if attributes["glasses"] == "none" else attributes["glasses"]]
    parts += ["a beard" if attributes["beard"] == "beard" else "no beard"]
    parts += [f"{attributes['skin']} skin", f"a {attributes['mouth']}"]
    pattern, color = attributes["clothing_pattern"], attributes["clothing_color"]
    shirt = f"{_article(pattern)} {pattern} {color} shirt"
    background = f"{_article(attributes['background'])} {attributes['background']} background"
    return f"a pixel avatar with {', '.join(parts)} and {shirt} on {background}"


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def stated_attributes(caption: str) -> Attributes:
    """Reads the attributes off a caption; those it does not state are absent."""
    words = caption.replace(",", " ,").split()
    stated: Attributes = {}
    for before, word in zip(["", *words], words, strict=False):
        for name, mark in _MARKED.items():
            if word == mark and before in COLORS[name]:
                stated[name] = before
        if word in ("hat", "beard", "glasses"):
            stated[word] = "none" if before == "no" else word
        if word == "sunglasses":
            stated["glasses"] = word
        for name, values in (
            ("hair_length", ("short", "long")),
            ("mouth", ("smile", "frown")),
            ("clothing_pattern", ("plain", "checkered")),
        ):
            if word in values:
                stated[name] = word
    if stated.get("hat") == "none":
        stated["hat_color"] = "none"
    return stated
