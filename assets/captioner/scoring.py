"""Reads off a caption of `bundled:captioner` which attributes it states."""

#: Words that follow the value of an attribute.
_MARKS = {
    "hair": "hair_color",
    "hat": "hat_color",
    "skin": "skin",
    "background": "background",
    "shirt": "clothing_color",
}
#: Words that are the value of an attribute.
_VALUES = {
    "short": "hair_length",
    "long": "hair_length",
    "smile": "mouth",
    "frown": "mouth",
    "plain": "clothing_pattern",
    "checkered": "clothing_pattern",
    "sunglasses": "glasses",
}
#: Parts that an avatar may lack.
_PARTS = ("hat", "beard", "glasses")


def stated_attributes(caption: str) -> dict[str, str]:
    """The attributes that a caption states, named as in `held_out.jsonl` of the avatars.

    Args:
        caption: As the captioner writes it: "..., no hat, glasses, ... and a plain red shirt".

    Returns:
        Attribute -> value; attributes that the caption does not state are absent.
    """
    words = caption.replace(",", "").split()
    stated: dict[str, str] = {}
    for before, word in zip(["", *words], words, strict=False):
        if word in _MARKS:
            stated[_MARKS[word]] = "none" if before == "no" else before
        if word in _PARTS:
            stated[word] = "none" if before == "no" else word
        if word in _VALUES:
            stated[_VALUES[word]] = word
    return stated
