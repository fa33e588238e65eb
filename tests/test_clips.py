"""The bundled clips: their prompts, what judges them, and what the pair makes."""

import json

import pytest
import torch

from mmspec.assets import bundled_path
from mmspec.assets.clips.prompts import SPEEDS, Scene, all_scenes, parse_prompt
from mmspec.assets.clips.scoring import ROOM, score_clips, trajectories
from mmspec.assets.forge.clips.simulator import bounce, paste
from mmspec.pipelines import SpeculativeVideoPipeline


def drawn(scenes, start=(3.0, 11.0)):
    """White squares with a corner missing on the ways of the scenes."""
    sprites = torch.ones(len(scenes), 3, 16, 16)
    sprites[:, :, :8, :8] = 0
    velocity = torch.tensor([scene.velocity for scene in scenes])
    return paste(sprites, bounce(torch.tensor([start] * len(scenes)), velocity, ROOM))


def test_every_prompt_is_read_back():
    scenes = all_scenes()
    assert len({scene.prompt for scene in scenes}) == len(scenes) == 1024
    assert [parse_prompt(scene.prompt) for scene in scenes] == scenes
    with pytest.raises(ValueError, match="got 'a red sneaker'"):
        parse_prompt("a red sneaker")


def test_a_drawn_way_is_right_and_any_other_wrong():
    scenes = [scene for scene in all_scenes() if scene.object == "bag" and scene.colour == "red"]
    frames = drawn(scenes)
    assert trajectories(frames, scenes).min() > 0.95
    other_speed = dict(zip(SPEEDS, reversed(SPEEDS), strict=True))
    for change in (
        lambda scene: Scene("bag", "red", scene.direction, other_speed[scene.speed]),
        lambda scene: Scene(
            "bag", "red", "up" if "right" in scene.direction else "right", scene.speed
        ),
    ):
        assert trajectories(frames, [change(scene) for scene in scenes]).mean() < 0.3
    stands_still = frames[:, :1].expand_as(frames)
    assert trajectories(stands_still, scenes).max() < 0.1
    assert trajectories(torch.zeros_like(frames), scenes).max() == 0


def test_scores_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match=r"frames must be .*, got \(\(1, 33, 3, 16, 16\), 1\)"):
        score_clips(torch.zeros(1, 33, 3, 16, 16), ["a red bag moving up slowly"])


def test_held_out_prompts_are_disjoint_and_of_these_clips():
    lines = (bundled_path("clips") / "held_out.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    prompts = {
        split: {row["prompt"] for row in rows if row["split"] == split}
        for split in ("calibration", "test")
    }
    assert len(prompts["calibration"]) == 64
    assert len(prompts["test"]) == 256
    assert not prompts["calibration"] & prompts["test"]
    for row in rows:
        parse_prompt(row["prompt"])


@pytest.mark.slow
def test_the_pair_makes_clips_of_their_prompts():
    """The default call, judged by its own prompts and by those of other objects and colours."""
    prompts = [
        f"a {colour} {thing} moving {way} slowly"
        for colour, thing, way in (
            ("red", "bag", "right"), ("green", "sneaker", "up"), ("blue", "trouser", "left"),
            ("yellow", "dress", "down"),
        )
    ]  # fmt: skip
    pipe = SpeculativeVideoPipeline.from_pretrained("bundled:clips")
    pipe.set_progress_bar_config(disable=True)
    seeds = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    out = pipe(prompts, generator=seeds, output_type="pt")
    assert out.frames.shape == (4, 33, 3, 32, 32)
    made = [record.source for record in out.blocks[0]]
    assert made == ["target"] + ["drafter"] * 8
    own, swapped = (
        sum(one["class"] for one in score_clips(out.frames, texts)) / len(texts)
        for texts in (prompts, prompts[1:] + prompts[:1])
    )
    assert own > 0.6
    assert swapped < 0.1
