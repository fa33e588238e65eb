"""Cuts a page into its regions: the recursive XY-cut, with columns kept whole.

A page is cut along its empty bands, again and again, at the widest first (Nagy and Seth,
"Hierarchical representation of optically scanned documents", ICPR 1984). Taken as such, that reads
two columns wrongly where their paragraphs happen to end at one height. So bands that lie below each
other and have a gutter in common are one row of columns, and are cut at the gutter before anything
within them is.

All widths are in units of the page's line pitch, so that they hold at any resolution, and gaps
between lines or words are no place to cut.
"""

import itertools
import statistics
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool
from PIL import Image, ImageFilter

from mmspec.ocr import Box

# Standard deviation of the blur, in pixels, that takes the noise of a scan.
_BLUR = 1.0
# Ink differs from the paper by so many times the median difference, which is 0.67 standard
# deviations of the noise, and by at least 32 levels of grey; 64 are enough.
_NOISE = 9
_INK = 32, 64
# In line pitches. Lines stand 0.2 to 0.8 apart, words 0.3, the columns of a paper 1 to 2.
_BAND = 0.9
_GUTTER = 0.75
# What is thinner is a rule.
_RULE = 1 / 4
# Share of a square, one line pitch wide, that has ink wherever there is a letter.
_SPECK = 0.05
# What a side of a gutter must have to be a column of text and not one of a table: so many lines, of
# such a width, and usually filled to this share, gaps narrower than a gutter included.
_LEAST_LINES = 3
_LEAST_WIDTH = 5
_FILLED = 0.65
# The line pitch is looked for in so many strips, since columns need not be in step and pages may be
# askew, and is this quantile of the steps from line to line: gaps between paragraphs are longer.
_STRIPS = 8
_USUAL = 0.3

_Ink = Bool[np.ndarray, "height width"]


@dataclass(frozen=True, slots=True)
class _Row:
    """A band of a region, across all of it.

    Attributes:
        box: Where it is.
        gutter: Left and right edge of the gap between its columns; None if it has none.
    """

    box: Box
    gutter: tuple[int, int] | None


# Rows that lie below each other.
_Region = tuple[_Row, ...]
# How early a cut is made: columns first, then what stands above or below columns, then wider gaps.
_Rank = tuple[int, int]
_UNCUT: _Rank = (-1, 0)


def split_into_regions(image: Image.Image, most: int = 8) -> list[Box]:
    """Cuts a page into its regions.

    Columns are cut before what is in them, and otherwise the widest gap is cut first. A region is
    as wide as its column, so all regions of a column show letters at one scale. Tables are not cut
    into their columns: both sides of a gutter must be lines of text that fill their width.

    Args:
        image: The page, upright; askew by a degree at most.
        most: Most regions, at least 1.

    Returns:
        Left, top, right and bottom (exclusive), in pixels, of each region in reading order: from
        top to bottom, and columns from left to right. One region where no lines can be told apart,
        none on an empty page.
    """
    ink = _find_ink(image)
    pitch = _pitch(ink)
    if pitch is not None:
        ink &= _is_dense(ink, pitch)
    rows = np.flatnonzero(ink.any(1))
    if not len(rows):
        return []
    whole = (0, int(rows[0]), image.width, int(rows[-1]) + 1)
    if pitch is None:
        return [whole]
    cutter = _Cutter(ink, pitch)
    regions = [cutter.rows_of(whole)]
    while len(regions) < most:
        ranks = [_rank(region) for region in regions]
        if max(ranks) == _UNCUT:
            break
        place = ranks.index(max(ranks))
        regions[place : place + 1] = cutter.cut(regions[place])
    return [_box_of(region) for region in regions]


def _rank(region: _Region) -> _Rank:
    """The rank of the best cut of a region."""
    if len(region) == 1 and region[0].gutter:
        return 2, region[0].gutter[1] - region[0].gutter[0]
    return max(map(_rank_between, region, region[1:]), default=_UNCUT)


def _rank_between(above: _Row, below: _Row) -> _Rank:
    return int(bool(above.gutter or below.gutter)), below.box[1] - above.box[3]


def _box_of(region: _Region) -> Box:
    left, top, right, _ = region[0].box
    return left, top, right, region[-1].box[3]


class _Cutter:
    """Finds where a page can be cut."""

    def __init__(self, ink: _Ink, pitch: float) -> None:
        """Takes where the page has ink, and the distance of its lines in pixels."""
        self._ink = ink
        self._pitch = pitch

    def cut(self, region: _Region) -> tuple[_Region, _Region]:
        """Cuts a region in two, at its gutter or at its best gap."""
        if len(region) == 1 and region[0].gutter:
            left, top, right, bottom = region[0].box
            end, start = region[0].gutter
            sides = (left, top, end, bottom), (start, top, right, bottom)
            return self.rows_of(sides[0]), self.rows_of(sides[1])
        ranks = list(map(_rank_between, region, region[1:]))
        place = ranks.index(max(ranks)) + 1
        return region[:place], region[place:]

    def rows_of(self, box: Box) -> _Region:
        """The rows of a box; as many bands make one as have a gutter in common."""
        left, _, right, _ = box
        bands = self._bands(box) or [box]
        inked = self._columns(box)
        across = [(inked[0][0], inked[-1][1])] if inked else []
        rows = []
        while bands:
            row, size = _Row(bands[0], None), 1
            for number, (_, _, _, bottom) in enumerate(bands, 1):
                joined = (left, bands[0][1], right, bottom)
                spans = self._columns(joined)
                if spans == across:
                    break
                gutter = self._gutter(joined, spans)
                if gutter:
                    row, size = _Row(joined, gutter), number
            rows.append(row)
            bands = bands[size:]
        return tuple(rows)

    def _bands(self, box: Box) -> list[Box]:
        """What wide gaps across a box leave."""
        left, top, right, bottom = box
        spans = _closed(_spans(self._ink[top:bottom, left:right], 1), _BAND * self._pitch)
        return [
            (left, top + first, right, top + end)
            for first, end in spans
            if end - first > _RULE * self._pitch
        ]

    def _columns(self, box: Box) -> list[tuple[int, int]]:
        """Left and right edge of what the gaps from top to bottom of a box leave."""
        left, top, right, bottom = box
        spans = _spans(self._ink[top:bottom, left:right], 0)
        spans = [span for span in spans if span[1] - span[0] > _RULE * self._pitch]
        closed = _closed(spans, _GUTTER * self._pitch)
        return [(left + first, left + end) for first, end in closed]

    def _gutter(self, box: Box, spans: list[tuple[int, int]]) -> tuple[int, int] | None:
        """The widest gap, if there is one and all that it leaves in the box are columns of text."""
        _, top, _, bottom = box
        gaps = [(one[1], other[0]) for one, other in itertools.pairwise(spans)]
        if gaps and all(self._is_column(self._ink[top:bottom, slice(*span)]) for span in spans):
            return max(gaps, key=lambda gap: gap[1] - gap[0])
        return None

    def _is_column(self, ink: _Ink) -> bool:
        """Whether this is lines of text that fill their width."""
        height, width = ink.shape
        if width < _LEAST_WIDTH * self._pitch:
            return False
        # Slices instead of lines, since a page that is askew has no empty rows between these.
        filled = []
        size = round(self._pitch)
        for start in range(0, height, size):
            spans = _spans(ink[start : start + size], 0)
            if spans:
                closed = _closed(spans, _GUTTER * self._pitch)
                filled.append(sum(end - first for first, end in closed))
        return len(filled) >= _LEAST_LINES and statistics.median(filled) >= _FILLED * width


def _find_ink(image: Image.Image) -> _Ink:
    """Where a page differs from its paper, pictures and dirt included."""
    grey = image.convert("L").filter(ImageFilter.GaussianBlur(_BLUR))
    pixels = np.asarray(grey, dtype=np.int16)
    distance = abs(pixels - np.median(pixels))
    return np.asarray(distance > np.clip(_NOISE * np.median(distance), *_INK))


def _pitch(ink: _Ink) -> float | None:
    """The usual distance of lines that follow each other, in pixels; None if none do."""
    steps: list[float] = []
    for strip in np.array_split(ink, _STRIPS, axis=1):
        middles = [(first + end) / 2 for first, end in _spans(strip, 1)]
        steps += [below - above for above, below in itertools.pairwise(middles)]
    return float(np.quantile(steps, _USUAL)) if steps else None


def _is_dense(ink: _Ink, pitch: float) -> _Ink:
    """Where there is as much ink around as a letter has, and not only dirt."""
    smooth = Image.fromarray(ink).convert("L").filter(ImageFilter.BoxBlur(pitch / 2))
    return np.asarray(smooth) > _SPECK * 255


def _spans(ink: _Ink, over: int) -> list[tuple[int, int]]:
    """First and last index, exclusive, of each run with ink; over rows (0) or columns (1)."""
    has_ink = np.asarray(ink.any(over))
    edges = np.flatnonzero(np.diff(np.concatenate([[False], has_ink, [False]]))).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def _closed(spans: list[tuple[int, int]], least_gap: float) -> list[tuple[int, int]]:
    """Spans with the gaps between them filled that are narrower than this."""
    closed = spans[:1]
    for span in spans[1:]:
        if span[0] - closed[-1][1] < least_gap:
            closed[-1] = closed[-1][0], span[1]
        else:
            closed.append(span)
    return closed
