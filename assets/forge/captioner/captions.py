"""What the captioner says of an avatar: all of its attributes, always in the same order."""

from mmspec.assets.forge.avatars.attributes import Attributes


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
