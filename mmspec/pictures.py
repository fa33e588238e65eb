"""Drawings of results: step maps, contact sheets, and PNG files that say how they were made.

A step map shows for every cell of an image's grid the step in which it was committed. Plain
decoding commits one cell per step; runs of one shade are what a single forward brought.
"""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from mmspec.whole_file import whole_file

#: From the first step to the last: ink, violet, rose, amber. Lightness only grows, so the order
#: survives in greyscale.
_RAMP = np.array(
    [[38, 35, 92], [88, 54, 149], [160, 62, 148], [217, 84, 110], [245, 137, 76], [251, 207, 110]],
    dtype=np.float64,
)
_MISSING = (128, 128, 128)
#: Every other step is darkened to this share, so that neighbouring steps stay apart.
_ODD_SHADE = 0.72


def upscale(image: Image.Image, scale: int) -> Image.Image:
    """Enlarges by a whole number, keeping pixels square.

    Raises:
        ValueError: If ``scale`` is below 1.
    """
    if scale < 1:
        raise ValueError(f"scale must be >= 1, got {scale}")
    size = (image.width * scale, image.height * scale)
    return image.resize(size, Image.Resampling.NEAREST)


def contact_sheet(
    images: Sequence[Image.Image],
    *,
    columns: int | None = None,
    gap: int = 8,
    background: tuple[int, int, int] = (255, 255, 255),
) -> Image.Image:
    """Lays images of one size out on a grid, in reading order.

    Args:
        images: At least one.
        columns: Images in a row; None chooses up to four for a few and a near square for many.
        gap: Pixels between images and around them.
        background: Colour of the gaps.

    Raises:
        ValueError: If there are no images or their sizes differ.
    """
    if not images:
        raise ValueError("a contact sheet needs at least one image")
    width, height = images[0].size
    if any(image.size != (width, height) for image in images):
        raise ValueError(f"all images must be {width}x{height} like the first")
    if columns is None:
        columns = min(len(images), max(4, math.ceil(math.sqrt(len(images)))))
    rows = math.ceil(len(images) / columns)
    size = (columns * (width + gap) + gap, rows * (height + gap) + gap)
    sheet = Image.new("RGB", size, background)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        sheet.paste(image, (gap + column * (width + gap), gap + row * (height + gap)))
    return sheet


def step_map(steps_HW: Any, *, num_steps: int | None = None) -> Image.Image:
    """Colours the cells of a grid by the step that committed them, one pixel per cell.

    Args:
        steps_HW: Step of each cell from 0, -1 where there is none; a tensor, array or list.
        num_steps: Steps that the colours span; None takes the map's own last step. Give the same
            number to maps that are to be compared.

    Raises:
        ValueError: If the map is not two-dimensional.
    """
    steps = np.asarray(steps_HW)
    if steps.ndim != 2:
        raise ValueError(f"a step map has two dimensions, got shape {steps.shape}")
    last = max(int(steps.max()) if num_steps is None else num_steps - 1, 1)
    place = np.clip(steps / last, 0, 1) * (len(_RAMP) - 1)
    low = np.minimum(place.astype(int), len(_RAMP) - 2)
    share = (place - low)[..., None]
    colors = _RAMP[low] * (1 - share) + _RAMP[low + 1] * share
    colors = np.where((steps % 2 == 1)[..., None], colors * _ODD_SHADE, colors)
    colors = np.where((steps < 0)[..., None], _MISSING, colors)
    return Image.fromarray(np.round(colors).astype(np.uint8))


def overlay(image: Image.Image, drawn_map: Image.Image, opacity: float = 0.6) -> Image.Image:
    """Lays a step map over its image, enlarged to the image's size."""
    over = drawn_map.resize(image.size, Image.Resampling.NEAREST).convert("RGB")
    return Image.blend(image.convert("RGB"), over, opacity)


def steps_shown(image: Image.Image, steps_HW: Any) -> Image.Image:
    """A step map laid over its image, and the map alone to the right, each of the image's size.

    Args:
        image: The image, as large as it is to be shown.
        steps_HW: As in `step_map`.
    """
    drawn = step_map(steps_HW).resize(image.size, Image.Resampling.NEAREST)
    shown = Image.new("RGB", (2 * image.width, image.height))
    shown.paste(overlay(image, drawn))
    shown.paste(drawn, (image.width, 0))
    return shown


def save_png(image: Image.Image, path: str | Path, metadata: Mapping[str, str]) -> None:
    """Writes a PNG with text chunks; the file appears whole or not at all.

    Args:
        image: The image.
        path: Where to; its folder is made if needed.
        metadata: Keyword (up to 79 Latin letters) to text.
    """
    chunks = PngInfo()
    for key, value in metadata.items():
        chunks.add_text(key, value)
    with whole_file(Path(path)) as building:
        image.save(building, format="PNG", pnginfo=chunks)


def save_gif(frames: Sequence[Image.Image], path: str | Path, *, frame_ms: int = 120) -> None:
    """Writes a film that begins again after two seconds; the file appears whole or not at all.

    Args:
        frames: At least one, of one size.
        path: Where to; its folder is made if needed.
        frame_ms: Milliseconds of each frame.

    Raises:
        ValueError: If there is no frame.
    """
    if not frames:
        raise ValueError("a film needs at least one frame")
    durations = [frame_ms] * (len(frames) - 1) + [2000]
    with whole_file(Path(path)) as building:
        frames[0].save(
            building,
            format="GIF",
            save_all=True,
            append_images=frames[1:],
            duration=durations,
            loop=0,
        )


def read_png_metadata(path: str | Path) -> dict[str, str] | None:
    """Reads the text chunks of a PNG.

    Returns:
        The texts by keyword, or None if there is no such file or it is not a complete PNG.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()
            texts: dict[str, str] = getattr(image, "text", {})
            return {key: str(value) for key, value in texts.items()}
    except (OSError, UnidentifiedImageError, SyntaxError):
        return None


def png_data_url(image: Image.Image) -> str:
    """The image as a ``data:`` address, to stand in a page without any other file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
