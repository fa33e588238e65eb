"""Penalties of motion see what they are named for, and nothing else."""

import math

import pytest
import torch
from blocks import noise_frames, view
from torch.nn import functional

from mmspec.routers import build_router
from mmspec.routers.temporal import RADIUS, temporal_penalties


def scene(height=64, width=160, seed=0):
    """A smooth picture, ``[3, H, W]``."""
    coarse = noise_frames(1, height // 8, width // 8, seed)
    return functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)[0]


def panning(count, step, *, start=0, seed=0):
    """A view that moves over one scene."""
    wide = scene(seed=seed)
    return torch.stack([wide[..., start + k * step : start + k * step + 64] for k in range(count)])


def test_what_a_shift_explains_costs_little():
    still = temporal_penalties(panning(4, 0), None)
    assert all(one.abs().max() == 0 for one in still.values())
    moving = temporal_penalties(panning(4, 3), None)["warp"]
    # Only patches at the border, whose content came from outside, are left over.
    unmatched = (panning(4, 3)[1:] - panning(4, 3)[:-1]).abs().mean()
    assert moving.max() < 0.25 * unmatched
    faster = temporal_penalties(panning(4, RADIUS + 3), None)["warp"]
    assert faster.min() > 2 * moving.max()


def test_morphing_content_costs_warp():
    frames = panning(4, 1)
    frames[2:] = panning(2, 1, start=2, seed=1)
    warp = temporal_penalties(frames, None)["warp"]
    assert warp[1] > 3 * max(warp[0], warp[2])


def test_flicker_is_not_a_fade():
    fade = torch.linspace(0.8, 1.0, 6)[:, None, None, None] * scene()
    blink = torch.tensor([1.0, 0.9] * 3)[:, None, None, None] * scene()
    blinking = temporal_penalties(blink, None)["flicker"][1:].min()
    assert blinking > 0.01
    assert temporal_penalties(fade, None)["flicker"].max() < 0.05 * blinking


def test_a_jump_between_blocks_costs_the_seam():
    pan = panning(8, 1)
    smooth = temporal_penalties(pan[4:], pan[:4])
    jump = temporal_penalties(panning(4, 1, seed=1), pan[:4])
    assert smooth["seam"].max() < 0.01
    assert jump["seam"][0] > 10 * smooth["seam"].max().clamp_min(1e-3)
    assert jump["seam"][1:].max() == 0
    assert len(jump["seam"]) == 4
    assert len(temporal_penalties(pan[4:], None)["seam"]) == 3


BEFORE, SMOOTH = panning(8, 1).split(4)
JUMP = panning(4, 1, seed=1)
BLINK = SMOOTH * torch.tensor([1.0, 0.6] * 2)[:, None, None, None]


@pytest.mark.parametrize(
    ("see", "bad"), [("warp", BLINK), ("flicker", BLINK), ("seam", JUMP), ("all", JUMP)]
)
def test_the_router_keeps_the_smooth_block(see, bad):
    router = build_router(f"temporal:-0.03,see={see}")
    smooth, torn = (router.judge(view(frames, BEFORE)) for frames in (SMOOTH, bad))
    assert smooth.keep
    assert not torn.keep
    assert torn.score < -0.03 <= smooth.score <= 0


def test_one_picture_with_none_before_cannot_be_judged():
    judged = build_router("temporal:-inf").judge(view(panning(1, 0)))
    assert math.isnan(judged.score)
    assert not judged.keep
    assert build_router("temporal:-1").judge(view(panning(1, 0), panning(1, 0))).score == 0


def test_large_pictures_are_looked_at_small():
    small = panning(3, 2)
    large = functional.interpolate(small, scale_factor=4, mode="nearest")
    expected = temporal_penalties(functional.interpolate(large, (128, 128), mode="area"), None)
    for name, one in temporal_penalties(large, None).items():
        assert torch.allclose(one, expected[name], atol=1e-6)
