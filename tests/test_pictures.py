import base64
import io
from itertools import pairwise

import pytest
import torch
from PIL import Image

from mmspec.pictures import (
    contact_sheet,
    overlay,
    png_data_url,
    read_png_metadata,
    save_png,
    step_map,
    steps_shown,
    upscale,
)

CHUNKS = {"prompt": "eine Brille, 眼鏡, naïve", "seed": "7", "window": "auto"}


def square(color=(200, 10, 10), size=3):
    return Image.new("RGB", (size, size), color)


def test_metadata_round_trip(tmp_path):
    path = tmp_path / "deep" / "folder" / "a.png"
    save_png(square(), path, CHUNKS)
    assert read_png_metadata(path) == CHUNKS
    assert list(path.parent.iterdir()) == [path], "no building file is left behind"


def test_missing_broken_and_foreign_files_have_no_metadata(tmp_path):
    whole = tmp_path / "a.png"
    save_png(upscale(square(), 40), whole, CHUNKS)
    cut = tmp_path / "cut.png"
    cut.write_bytes(whole.read_bytes()[:-60])
    other = tmp_path / "b.png"
    other.write_text("not a picture")
    assert [read_png_metadata(p) for p in (cut, other, tmp_path / "none.png")] == [None] * 3


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    save_png(square(), path, CHUNKS)

    def fail(self, file, **_):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_png(square(), path, {})
    monkeypatch.undo()
    assert read_png_metadata(path) == CHUNKS
    assert list(tmp_path.iterdir()) == [path]


def test_upscale_keeps_pixels_square():
    image = square()
    image.putpixel((1, 2), (1, 2, 3))
    large = upscale(image, 4)
    assert large.size == (12, 12)
    assert {large.getpixel((x, y)) for x in range(4, 8) for y in range(8, 12)} == {(1, 2, 3)}
    with pytest.raises(ValueError, match="scale must be >= 1, got 0"):
        upscale(image, 0)


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (3, 3), (8, 4), (30, 6)])
def test_contact_sheet_size_and_order(count, columns):
    sheet = contact_sheet([square((i, 0, 0)) for i in range(count)], gap=2)
    rows = -(-count // columns)
    assert sheet.size == (columns * 5 + 2, rows * 5 + 2)
    row, column = divmod(count - 1, columns)
    assert sheet.getpixel((2 + column * 5, 2 + row * 5)) == (count - 1, 0, 0)
    assert sheet.getpixel((0, 0)) == (255, 255, 255)


def test_contact_sheet_refuses_nothing_and_mixed_sizes():
    with pytest.raises(ValueError, match="at least one"):
        contact_sheet([])
    with pytest.raises(ValueError, match="3x3"):
        contact_sheet([square(), square(size=4)])


def test_step_map_colors():
    drawn = step_map(torch.tensor([[0, 0, 1], [1, 2, -1]]))
    assert drawn.size == (3, 2)
    at = {(x, y): drawn.getpixel((x, y)) for x in range(3) for y in range(2)}
    assert at[0, 0] == at[1, 0]
    assert at[2, 0] == at[0, 1]
    assert at[2, 1] == (128, 128, 128)
    assert len({at[0, 0], at[2, 0], at[1, 1], at[2, 1]}) == 4
    assert step_map([[0]]).getpixel((0, 0)) == step_map([[0, 9]], num_steps=10).getpixel((0, 0))
    with pytest.raises(ValueError, match="two dimensions"):
        step_map([1, 2])


def test_neighbouring_steps_stay_apart():
    row = step_map([list(range(256))])
    colors = [row.getpixel((x, 0)) for x in range(256)]
    gaps = [sum(abs(a - b) for a, b in zip(*pair, strict=True)) for pair in pairwise(colors)]
    assert min(gaps) > 20


def test_overlay_has_the_size_of_the_image():
    image, drawn = square(size=8), step_map([[0, 1], [2, 3]])
    assert overlay(image, drawn).size == (8, 8)
    assert overlay(image, drawn, 0.0).tobytes() == image.tobytes()


def test_steps_are_shown_over_the_image_and_beside_it():
    steps = [[0, 1], [2, 3]]
    image = upscale(square(size=4), 2)
    image.putpixel((7, 0), (0, 0, 250))
    shown, drawn = steps_shown(image, steps), upscale(step_map(steps), 4)
    assert shown.size == (16, 8)
    assert shown.crop((8, 0, 16, 8)).tobytes() == drawn.tobytes()
    over = shown.crop((0, 0, 8, 8))
    # Both are seen: the image under one step, and the steps on one colour of the image.
    assert over.getpixel((7, 0)) != over.getpixel((6, 0)) == over.getpixel((5, 0))
    assert len({over.getpixel(at) for at in [(0, 0), (6, 0), (0, 7), (7, 7)]}) == 4


def test_data_url_is_the_image():
    head, _, data = png_data_url(square()).partition(",")
    assert head == "data:image/png;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).tobytes() == square().tobytes()
