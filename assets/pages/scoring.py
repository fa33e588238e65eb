"""Counts the characters that were read wrong."""

from collections.abc import Sequence

import numpy as np


def edit_distance(first: str, second: str) -> int:
    """Insertions, deletions and substitutions that turn one text into the other (Levenshtein)."""
    points = np.array([ord(c) for c in second])
    steps = np.arange(len(second) + 1)
    row = steps.copy()
    for index, character in enumerate(first, 1):
        best = np.minimum(row[1:] + 1, row[:-1] + (points != ord(character)))
        # A run of insertions costs its length: the least of all places before, plus the way.
        row = np.minimum.accumulate(np.concatenate([[index], best]) - steps) + steps
    return int(row[-1])


def error_rate(read: Sequence[str], truth: Sequence[str]) -> float:
    """Character error rate: the edits of all pages over the characters of all pages.

    Args:
        read: What was read, a text for each page.
        truth: What is on the pages.

    Raises:
        ValueError: If there are not as many texts as pages, or the pages are empty.
    """
    if len(read) != len(truth):
        raise ValueError(f"got {len(read)} texts, but {len(truth)} pages")
    length = sum(map(len, truth))
    if length == 0:
        raise ValueError(f"the {len(truth)} pages have no characters")
    return sum(edit_distance(a, b) for a, b in zip(read, truth, strict=True)) / length
