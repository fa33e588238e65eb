"""Draws the picture of the README: avatars, and in which forward each of their codes was made.

    python benchmarks/readme_figure.py docs/images/avatars.png

The upper row is what the model drew; the lower row colours every code by the forward that committed
it, dark first. Plain decoding would need 256 colours; the number under each map is what was needed.
"""

import sys

import torch
from PIL import Image, ImageDraw

from mmspec.pictures import step_map, upscale
from mmspec.pipelines import SpeculativeImagePipeline

PROMPTS = (
    "a pixel avatar with long red hair, glasses and a grey background",
    "a pixel avatar with dark skin, a blue hat and a smile",
    "a pixel avatar with short black hair, sunglasses and a pink background",
    "a pixel avatar with long pink hair, tan skin and a green background",
    "a pixel avatar with a red hat, blonde hair and a frown",
    "a pixel avatar with long blue hair, light skin and glasses",
)
SCALE, GAP, CAPTION = 8, 12, 22


def main(path: str) -> None:
    """Draws and saves."""
    pipe = SpeculativeImagePipeline.from_pretrained("bundled:avatars")
    out = pipe(
        PROMPTS,
        guidance_scale=3.0,
        window=32,
        generator=[torch.Generator().manual_seed(seed) for seed in range(len(PROMPTS))],
    )
    side = 16 * SCALE
    width = GAP + len(PROMPTS) * (side + GAP)
    sheet = Image.new("RGB", (width, 2 * (side + GAP) + CAPTION + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    rows = zip(out.images, out.step_maps, out.row_stats, strict=True)
    for column, (image, steps, stats) in enumerate(rows):
        left = GAP + column * (side + GAP)
        sheet.paste(upscale(image, SCALE), (left, GAP))
        sheet.paste(upscale(step_map(steps), SCALE), (left, 2 * GAP + side))
        text = f"256 codes, {stats.num_target_forwards} forwards"
        pen.text((left, 2 * (side + GAP) + 6), text, fill=(60, 60, 60))
    sheet.save(path, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
