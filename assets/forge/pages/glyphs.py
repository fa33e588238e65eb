"""Draws the glyph sheet of the pages: every character of two fixed-width fonts, plain and bold.

    python -m mmspec.assets.forge.pages.glyphs

The sheet is bundled, so that pages look the same on machines without these fonts.
"""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mmspec.assets.pages.rendering import CELL_HEIGHT, CELL_WIDTH, CHARACTERS, SHEET

# Debian's packages fonts-dejavu-core and fonts-liberation, in the order of `rendering.FONTS`.
FILES = [
    ("dejavu/DejaVuSansMono.ttf", "dejavu/DejaVuSansMono-Bold.ttf"),
    ("liberation/LiberationMono-Regular.ttf", "liberation/LiberationMono-Bold.ttf"),
]
FOLDER = "/usr/share/fonts/truetype/"
POINTS = 13  # an advance of 7.8 pixels in both families
BASELINE = 12


def draw_glyph(font: ImageFont.FreeTypeFont, character: str) -> np.ndarray:
    """The ink of one character, 0 to 255, of one cell's size."""
    cell = Image.new("L", (CELL_WIDTH, CELL_HEIGHT), 0)
    ImageDraw.Draw(cell).text((0, BASELINE), character, fill=255, font=font, anchor="ls")
    return np.asarray(cell)


def main() -> None:
    """Writes the sheet: a row of cells for each font and weight."""
    rows = []
    for names in FILES:
        for name in names:
            font = ImageFont.truetype(FOLDER + name, POINTS)
            rows.append(np.concatenate([draw_glyph(font, one) for one in CHARACTERS], axis=1))
    Image.fromarray(np.concatenate(rows)).save(SHEET, optimize=True)


if __name__ == "__main__":
    main()
