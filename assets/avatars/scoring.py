"""Judges avatars by exact lookup: which attributes does this picture show?

Every pixel is replaced by the nearest colour of `palette.json`. A colour that occurs with one value
of an attribute only (the red of hair is no other part's red) votes for that value. Length of hair
and mouth have no colours of their own and are read off the place of the pixels. No learned
weights, no npm, only numpy.
"""

import json
from functools import cache
from pathlib import Path

import numpy as np

SIZE = 16
# A value needs that many pixels; what has less counts as "none".
MIN_VOTES = 2
MOUTH_ROWS, MOUTH_COLUMNS = slice(9, 11), slice(6, 10)
# Offsets inside that box of the mouths that DiceBear draws.
MOUTHS: dict[str, list[list[str]]] = {
    "smile": [["####", ".##."], ["#..#", ".##."]],
    "frown": [[".##.", "#..#"], [".###", "#..."]],
}


@cache
def _table() -> tuple[np.ndarray, dict[str, dict[str, list[int]]]]:
    table = json.loads((Path(__file__).parent / "palette.json").read_text())
    colors = np.array([list(bytes.fromhex(color)) for color in table["colors"]], np.int64)
    return colors, table["votes"]


def to_codes(images: np.ndarray) -> np.ndarray:
    """Replaces pixels by the index of the nearest palette colour.

    Args:
        images: RGB pictures (N, 16, 16, 3): uint8, or floats in [0, 1].

    Returns:
        Palette indices (N, 16, 16).
    """
    pixels = np.asarray(images)
    if pixels.ndim != 4 or pixels.shape[1:] != (SIZE, SIZE, 3):
        raise ValueError(f"expected images of shape (N, {SIZE}, {SIZE}, 3), got {pixels.shape}")
    if np.issubdtype(pixels.dtype, np.floating):
        pixels = np.rint(pixels * 255)
    colors, _ = _table()
    flat = pixels.reshape(-1, 3).astype(np.int64)
    distances = (
        (flat**2).sum(1, keepdims=True) - 2 * flat @ colors.T + (colors**2).sum(1)
    )  # (pixels, K)
    return distances.argmin(1).reshape(pixels.shape[:3])


def _hair_codes(votes: dict[str, dict[str, list[int]]]) -> list[int]:
    """Codes of hair itself; beards are hair colours blended with skin."""
    beard = set(votes["beard"]["beard"])
    return [c for codes in votes["hair_color"].values() for c in codes if c not in beard]


def read_attributes(images: np.ndarray) -> list[dict[str, str]]:
    """Reads the attributes off pictures.

    Args:
        images: RGB pictures (N, 16, 16, 3): uint8, or floats in [0, 1].

    Returns:
        One dictionary per picture, with the attribute names of `heldout.jsonl`. A value is "none"
        where the picture does not show the part.
    """
    codes = to_codes(images)
    colors, votes = _table()
    mouth_code = [bytes(color.tolist()).hex() for color in colors].index("b5443f")
    results: list[dict[str, str]] = []
    for picture in codes:
        counts = np.bincount(picture.ravel(), minlength=len(colors))
        read: dict[str, str] = {}
        for name, by_value in votes.items():
            totals = {value: int(counts[list_].sum()) for value, list_ in by_value.items()}
            best = max(totals, key=totals.__getitem__)
            read[name] = best if totals[best] >= MIN_VOTES else "none"
        if read["clothing_pattern"] == "none":
            read["clothing_pattern"] = "plain"
        read["hair_length"] = _hair_length(picture, _hair_codes(votes))
        read["mouth"] = _mouth(picture == mouth_code)
        results.append(read)
    return results


def _hair_length(picture: np.ndarray, hair_codes: list[int]) -> str:
    """Long hair goes on beside the cheeks, below row 8; short hair has no pixel there."""
    hair = np.isin(picture, hair_codes)
    if hair.sum() < MIN_VOTES:
        return "none"
    return "long" if hair[8:].sum() >= 4 else "short"


def _mouth(mask: np.ndarray) -> str:
    """The mouth whose drawing differs in the fewest pixels; "none" if more than two differ."""
    box = mask[MOUTH_ROWS, MOUTH_COLUMNS]
    distances = {}
    for name, drawings in MOUTHS.items():
        drawn = [np.array([[mark == "#" for mark in row] for row in rows]) for rows in drawings]
        distances[name] = min(int((box != one).sum()) for one in drawn)
    best = min(distances, key=distances.__getitem__)
    return best if distances[best] <= 2 else "none"


def attribute_accuracy(images: np.ndarray, attributes: list[dict[str, str]]) -> dict[str, float]:
    """Measures how often pictures show what their captions state.

    Args:
        images: RGB pictures (N, 16, 16, 3): uint8, or floats in [0, 1].
        attributes: For each picture the stated attributes, such as a row of `heldout_fresh.jsonl`
            has under "attributes". Attributes that a caption leaves open are simply absent.

    Returns:
        The share of right answers per attribute; "mean" over all stated attributes; "all" is the
        share of pictures with every stated attribute right.
    """
    if len(images) != len(attributes):
        raise ValueError(f"got {len(images)} images, but {len(attributes)} attribute rows")
    hits: dict[str, list[bool]] = {}
    whole: list[bool] = []
    for read, stated in zip(read_attributes(images), attributes, strict=True):
        right = {name: read[name] == value for name, value in stated.items()}
        for name, hit in right.items():
            hits.setdefault(name, []).append(hit)
        whole.append(all(right.values()))
    result = {name: sum(marks) / len(marks) for name, marks in sorted(hits.items())}
    every = [mark for marks in hits.values() for mark in marks]
    result["mean"] = sum(every) / len(every) if every else float("nan")
    result["all"] = sum(whole) / len(whole) if whole else float("nan")
    return result
