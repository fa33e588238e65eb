"""Pages in parts: where a page is cut for an engine, and its text put together again.

A page that is read part by part takes as many CPU seconds and has as few errors as one that is read
whole, and the text of its first lines is there in a quarter of the time.
"""

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageFilter

from mmspec.ocr import LINE_PITCH, MOST_ENLARGED, PARAGRAPH_GAP, PageText, line_pitch

# The first part has so many lines and this share of the page at least, and another one at most:
# of a page whose lines are taken for further apart than they are it would be too much.
_FIRST_LINES = 3
_FIRST_SHARE = 0.1
_FIRST_MOST = 0.25
# In lines: how far before and behind its place a cut may be, and how many rows of pixels are looked
# at together. Between paragraphs more of them are empty than between lines.
_BEFORE, _BEHIND = 0.5, 2.0
_LOOK = 0.4
# How empty a cut must be, where 0 is the emptiest place of the page and 1 the usual one.
_EMPTY = 0.5


@dataclass(frozen=True, slots=True)
class Cuts:
    """Where a page is cut.

    Attributes:
        pitch: Distance of its lines, in pixels; None where nothing recurs.
        edges: First row of each part, and the height of the page.
    """

    pitch: float | None
    edges: tuple[int, ...]


def cuts_of(image: Image.Image) -> Cuts:
    """Cuts a page for reading: its first lines, and the rest in halves.

    It is cut where pixels hardly change from row to row across the whole page, which is between
    lines. Rules of a table may go on there. A page without such a place is left whole, and so is
    one whose lines are too close together to be read.
    """
    grey = image.convert("L")
    pitch, height = line_pitch(grey), image.height
    edges = [0]
    if pitch is not None and pitch * MOST_ENLARGED >= LINE_PITCH:
        pixels = np.asarray(grey.filter(ImageFilter.GaussianBlur(1.0)), dtype=np.float32)
        size = max(round(_LOOK * pitch), 1)
        changes = abs(np.diff(pixels, axis=0)).mean(1)
        around = np.convolve(changes, np.full(size, 1 / size), mode="same")
        # Outside of the page nothing changes.
        least = around[size:-size].min()
        most = least + _EMPTY * (np.median(around) - least)
        first = min(max(_FIRST_LINES * pitch, _FIRST_SHARE * height), _FIRST_MOST * height)
        for place in (first, (first + height) / 2):
            low = max(round(place - _BEFORE * pitch), edges[-1] + round(pitch))
            high = min(round(place + _BEHIND * pitch), height - round(pitch))
            if low < high and around[low:high].min() <= most:
                edges.append(low + int(around[low:high].argmin()))
    return Cuts(pitch, (*edges, height))


def joined(page: PageText, part: PageText, top: int, pitch: float | None) -> PageText:
    """A page's text with that of its next part behind it.

    Args:
        page: The text so far.
        part: What was found in the part.
        top: First row of the part.
        pitch: Distance of two lines; behind a larger step a paragraph starts.
    """
    boxes = [(left, above + top, right, below + top) for left, above, right, below in _boxes(part)]
    between = "\n" if page.text and part.text else ""
    if between and boxes and page.words and pitch is not None:
        step = min(box[1] for box in boxes) - max(box[1] for box in _boxes(page))
        between *= 1 + (step > PARAGRAPH_GAP * pitch)
    start = len(page.text) + len(between)
    words = [
        replace(word, box=box, end=word.end + start)
        for word, box in zip(part.words, boxes, strict=True)
    ]
    return PageText(page.text + between + part.text, (*page.words, *words))


def _boxes(text: PageText) -> list[tuple[int, int, int, int]]:
    return [word.box for word in text.words]
