"""Who made which block of a video, as a picture: a strip of blocks from left to right."""

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from mmspec.block_records import BlockRecord

#: Colour of a block's border. They differ in lightness too, for print and for colour-blind eyes.
COLORS = {"target": (38, 35, 92), "drafter": (245, 137, 76), "stitched": (160, 62, 148)}
_INK = (40, 40, 40)
_PAPER = (255, 255, 255)
_BORDER, _GAP, _LINE = 4, 10, 15
#: A picture is enlarged by a whole number to about this height, or reduced to it.
_HEIGHT = 96
#: Where a strip goes on below.
_WIDTH = 1600


@dataclass(frozen=True, slots=True)
class _Column:
    """A block as it is drawn: pictures side by side, lines of text below."""

    color: tuple[int, int, int]
    pictures: Sequence[Image.Image]
    lines: Sequence[str]


def spread(frames: Sequence[Any], count: int) -> list[Any]:
    """Some of the pictures of a block, evenly spread; all of them if there are no more.

    Args:
        frames: The pictures.
        count: How many to take; one is the middle one.
    """
    if len(frames) <= count:
        return list(frames)
    if count == 1:
        return [frames[len(frames) // 2]]
    return [frames[round(k * (len(frames) - 1) / (count - 1))] for k in range(count)]


def timeline(
    blocks: Sequence[BlockRecord],
    pictures: Sequence[Sequence[Image.Image]],
    *,
    title: str = "",
) -> Image.Image:
    r"""Draws a video as a strip of its blocks.

    The border of a block says who made it; below it stand the router's score of the draft and the
    seconds that drafter, router and target took for it.

    Args:
        blocks: How each block came about, as `VideoOutput.blocks` has it for a video.
        pictures: Of each block one or more pictures, all of one size; see `spread`.
        title: Stands above, such as the prompt. A character that Pillow's own font lacks is
            written as Python's escape, ``\u732b``.

    Raises:
        ValueError: If there is no block, or not the same number of both, or a block has no picture.
    """
    if not blocks or len(blocks) != len(pictures) or not all(map(len, pictures)):
        counts = [len(of_block) for of_block in pictures]
        raise ValueError(
            f"a timeline needs blocks and pictures of each, got {len(blocks)} blocks and {counts}"
        )
    columns = [
        _Column(COLORS[block.source], list(map(_sized, shown)), _lines(block))
        for block, shown in zip(blocks, pictures, strict=True)
    ]
    font = ImageFont.load_default(12)
    rows = list(_rows(columns, font))
    top = _GAP + 2 * _LINE
    num_lines = max(len(column.lines) for column in columns)
    row_height = columns[0].pictures[0].height + 2 * _BORDER + num_lines * _LINE + 2 * _GAP
    width = max(_GAP + sum(_width(column, font) + _GAP for column in row) for row in rows)
    width = max(width, 3 * 90)
    sheet = Image.new("RGB", (width, top + len(rows) * row_height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    shown = _shortened(_legible(title, font), width - 2 * _GAP, font)
    draw.text((_GAP, _GAP // 2), shown, fill=_INK, font=font)
    _legend(draw, sorted({block.source for block in blocks}), _GAP // 2 + _LINE, font)
    for number, row in enumerate(rows):
        left = _GAP
        for column in row:
            _draw(sheet, draw, column, left, top + number * row_height, font)
            left += _width(column, font) + _GAP
    return sheet


def _sized(picture: Image.Image) -> Image.Image:
    picture = picture.convert("RGB")
    if picture.height > _HEIGHT:
        size = (max(1, round(picture.width * _HEIGHT / picture.height)), _HEIGHT)
        return picture.resize(size, Image.Resampling.LANCZOS)
    scale = max(1, _HEIGHT // picture.height)
    size = (picture.width * scale, picture.height * scale)
    return picture.resize(size, Image.Resampling.NEAREST)


def _lines(block: BlockRecord) -> list[str]:
    seconds = block.draft_time_s + block.judge_time_s + block.target_time_s
    lines = [f"{block.index}  {block.source}"]
    if block.score is None:
        lines.append("no draft")
    elif math.isnan(block.score):
        lines.append("not judged")
    elif math.isfinite(block.score):
        lines.append(f"score {block.score:.3g}")
    else:  # of a router that looks at the place alone
        lines.append("no score")
    return [*lines, f"{seconds:.2f} s"]


def _width(column: _Column, font: Any) -> int:
    shown = sum(picture.width for picture in column.pictures) + len(column.pictures) - 1
    written = max(math.ceil(font.getlength(line)) for line in column.lines)
    return max(shown + 2 * _BORDER, written)


def _rows(columns: Sequence[_Column], font: Any) -> Iterator[list[_Column]]:
    """Columns that fit beside each other."""
    row: list[_Column] = []
    width = _GAP
    for column in columns:
        more = _width(column, font) + _GAP
        if row and width + more > _WIDTH:
            yield row
            row, width = [], _GAP
        row.append(column)
        width += more
    yield row


def _draw(sheet: Any, draw: Any, column: _Column, left: int, top: int, font: Any) -> None:
    width = sum(picture.width for picture in column.pictures) + len(column.pictures) - 1
    height = column.pictures[0].height
    right, bottom = left + width + 2 * _BORDER - 1, top + height + 2 * _BORDER - 1
    draw.rectangle((left, top, right, bottom), fill=column.color)
    place = left + _BORDER
    for picture in column.pictures:
        sheet.paste(picture, (place, top + _BORDER))
        place += picture.width + 1
    for number, line in enumerate(column.lines):
        draw.text((left, bottom + 3 + number * _LINE), line, fill=_INK, font=font)


def _legend(draw: Any, sources: Sequence[str], top: int, font: Any) -> None:
    left = _GAP
    for source in sources:
        draw.rectangle((left, top + 3, left + 9, top + 12), fill=COLORS[source])
        draw.text((left + 14, top), source, fill=_INK, font=font)
        left += 90


def _legible(text: str, font: Any) -> str:
    """The text in one line, with escapes for characters that the font has no picture of."""

    def picture(character: str) -> tuple[object, bytes]:
        mask = font.getmask(character)
        return mask.size, bytes(mask)

    none = picture(
        "\uffff"
    )  # which Unicode keeps free of characters: what stands for a missing one
    return "".join(
        one.encode("ascii", "backslashreplace").decode() if picture(one) == none else one
        for one in " ".join(text.split())
    )


def _shortened(text: str, width: int, font: Any) -> str:
    if font.getlength(text) <= width:
        return text
    length = bisect_right(
        range(len(text)), width, key=lambda length: font.getlength(text[:length] + "...")
    )
    return text[: max(0, length - 1)] + "..."
