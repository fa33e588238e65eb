import math

import numpy as np
import pytest
from PIL import Image

from mmspec.block_records import BlockRecord
from mmspec.timeline import COLORS, spread, timeline


def record(index, source="drafter", score=-0.02):
    return BlockRecord(
        index=index, source=source, score=score, draft_time_s=0.25, judge_time_s=0.5,
        target_time_s=1.0,
    )  # fmt: skip


def plain(value, size=(32, 16)):
    """A picture of one colour, which no text has."""
    return Image.new("RGB", size, (value, 3, 200))


def has(image, color):
    return bool((np.asarray(image) == np.array(color, np.uint8)).all(-1).any())


def test_borders_say_who_made_a_block_and_pictures_keep_their_pixels():
    blocks = [record(0, "target", None), record(1), record(2, "stitched", math.nan)]
    shown = [[plain(77)], [plain(78), plain(79), plain(80)], [plain(81)]]
    drawn = timeline(blocks, shown, title="a cat")
    assert all(has(drawn, color) for color in COLORS.values())
    pixels = np.asarray(drawn)
    # 16 rows are enlarged six times.
    counts = [int((pixels == (value, 3, 200)).all(-1).sum()) for value in range(77, 82)]
    assert counts == [32 * 16 * 36] * 5
    alone = timeline(blocks[1:2], shown[1:2])
    assert has(alone, COLORS["drafter"])
    assert not has(alone, COLORS["target"])


def test_long_videos_go_on_below_and_large_pictures_are_reduced():
    blocks = [record(k, score=math.inf) for k in range(30)]
    drawn = timeline(blocks, [[plain(k, (416, 240))] for k in range(30)], title="long " * 200)
    assert drawn.width <= 1600
    assert drawn.height > 3 * 96
    assert all(has(drawn, (k, 3, 200)) for k in range(30))


@pytest.mark.parametrize(
    ("title", "same", "other"),
    [
        ("a “cat”\n…", "a “cat” …", r"a \u201ccat\u201d \u2026"),
        ("für 猫 \N{GRINNING FACE}", r"f\xfcr \u732b \U0001f600", r"f\xfcr \u72ac \U0001f600"),
        ("a\N{ZERO WIDTH SPACE}b", r"a\u200bb", "ab"),
    ],
)
def test_what_the_font_lacks_is_escaped_and_nothing_else(title, same, other):
    drawn = [
        timeline([record(0)], [[plain(1, (400, 96))]], title=one).tobytes()
        for one in (title, same, other)
    ]
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]


def test_some_pictures_of_a_block():
    assert spread(range(9), 3) == [0, 4, 8]
    assert spread(range(9), 1) == [4]
    assert spread(range(2), 3) == [0, 1]


def test_a_timeline_needs_pictures_of_each_block():
    for blocks, shown in (([], []), ([record(0)], []), ([record(0)], [[]])):
        with pytest.raises(ValueError, match="a timeline needs blocks and pictures of each, got"):
            timeline(blocks, shown)
