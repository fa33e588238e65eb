"""Blocks of video through the engine: to the bit what diffusers' pipelines make."""

import math

import pytest
import torch
from video import (
    FAR,
    NUM_FRAMES,
    SIDE,
    Scripted,
    eager,
    embeds,
    far_pipe,
    plain,
    seeded,
    wan_vae,
)

from mmspec.adapters.block_frames import BlockFrames
from mmspec.adapters.block_video import (
    BlockDrafter,
    BlockRule,
    BlockSchedule,
    BlockTarget,
    Prompt,
    Sampler,
    Stitch,
    VideoRow,
)
from mmspec.adapters.video_family import check_pair, video_family
from mmspec.adapters.wan_codec import WanCodec
from mmspec.block_records import Judgement
from mmspec.engine import Engine
from mmspec.routers import build_router

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

STEPS = 3
T, D = ("target",) * STEPS, ("drafter",) * STEPS


@pytest.fixture(scope="module")
def pipes():
    return {"target": far_pipe(1, num_layers=2), "drafter": far_pipe(2)}


class Run:
    """One engine over rows with the given seeds."""

    def __init__(self, pipes, router, *, drafter_steps=STEPS, stitch=None, seeds=(0,)):
        target, drafter = video_family(pipes["target"]), video_family(pipes["drafter"])
        layout = target.layout(NUM_FRAMES, SIDE, SIDE, None)
        prompt = Prompt(text=None, embeds=embeds())
        self.rows = [
            VideoRow(
                target.noise(layout, 1, seeded(seed), None), layout.block_sizes, prompt,
                target.codec(),
            )
            for seed in seeds
        ]  # fmt: skip
        model = target.model(layout, 1.0)
        is_same = pipes["target"] is pipes["drafter"]
        self.target = Sampler(model, STEPS)
        self.drafter = Sampler(model if is_same else drafter.model(layout, 1.0), drafter_steps)
        router = build_router(router)
        self.generation = Engine(
            BlockTarget(self.rows, self.target, router, self.drafter, stitch),
            BlockDrafter(self.rows, self.drafter, router, stitch),
            BlockRule(router.guarantee),
            BlockSchedule(self.rows, router),
        ).run()

    def latents(self, row=0):
        return torch.cat(self.rows[row].context.blocks, dim=2)

    def sources(self, row=0):
        return [record.source for record in self.rows[row].records]


@pytest.mark.supports("target pipeline", FAR)
def test_nothing_drafted_is_the_target_pipeline(pipes):
    run = Run(pipes, "never")
    assert torch.equal(run.latents(), plain(pipes["target"], num_steps=STEPS))
    assert run.sources() == ["target"] * 3
    assert (run.drafter.num_forwards, run.drafter.num_prefills) == (0, 0)


def test_every_draft_rejected_is_the_target_pipeline(pipes):
    run = Run(pipes, Scripted([False] * 3))
    assert torch.equal(run.latents(), plain(pipes["target"], num_steps=STEPS))
    assert run.drafter.num_forwards == 3 * STEPS
    assert run.generation.stats.num_accepted == 0


def test_every_draft_kept_is_the_drafter_pipeline_and_the_target_never_runs(pipes):
    run = Run(pipes, "always", drafter_steps=2)
    assert torch.equal(run.latents(), plain(pipes["drafter"], num_steps=2))
    assert (run.target.num_forwards, run.target.num_prefills) == (0, 0)
    assert run.generation.stats.num_accepted == 3


@pytest.mark.parametrize("keep", [(0, 1, 0), (1, 0, 1), (1, 1, 0), (0, 0, 1)])
def test_reading_late_equals_reading_every_block_at_once(pipes, keep):
    run = Run(pipes, Scripted(list(map(bool, keep))))
    expected = eager(pipes, [D if kept else T for kept in keep], num_steps=STEPS)
    assert torch.equal(run.latents(), expected)
    # Once for each block that it writes behind the first; eager reading takes two.
    assert run.target.num_prefills == sum(not kept for kept in keep[1:])


def test_a_drafter_does_not_run_where_the_target_is_certain(pipes):
    run = Run(pipes, "first-block")
    assert torch.equal(run.latents(), eager(pipes, [T, D, D], num_steps=STEPS))
    assert run.sources() == ["target", "drafter", "drafter"]
    assert run.drafter.num_forwards == 2 * STEPS
    assert (run.target.num_forwards, run.target.num_prefills) == (STEPS, 0)


def test_one_model_drafts_for_itself_in_fewer_steps_and_reads_once(pipes):
    alone = {"target": pipes["target"], "drafter": pipes["target"]}
    kept = Run(alone, "always", drafter_steps=1)
    assert torch.equal(kept.latents(), plain(pipes["target"], num_steps=1))
    rejected = Run(alone, Scripted([False] * 3), drafter_steps=1)
    assert torch.equal(rejected.latents(), plain(pipes["target"], num_steps=STEPS))
    assert rejected.target.num_prefills + rejected.drafter.num_prefills == 2


@pytest.mark.parametrize("first", [1, 2, 3])
@pytest.mark.parametrize("begins", ["drafter", "target"])
@pytest.mark.parametrize("is_drafted", [True, False])
def test_stitched_blocks_take_the_steps_of_both(pipes, first, begins, is_drafted):
    names = {"drafter": "target", "target": "drafter"}
    mixed = (begins,) * first + (names[begins],) * (STEPS - first)
    router = Scripted([False] * 3) if is_drafted else "never"
    run = Run(pipes, router, stitch=Stitch(first, begins))
    assert torch.equal(run.latents(), eager(pipes, [T, mixed, mixed], num_steps=STEPS))
    assert run.sources() == ["target"] + [begins if first == STEPS else "stitched"] * 2
    if not is_drafted:
        counts = {"drafter": run.drafter.num_forwards, "target": run.target.num_forwards - STEPS}
        assert counts == {begins: 2 * first, names[begins]: 2 * (STEPS - first)}


def test_stitching_every_step_is_first_target_then_draft(pipes):
    stitched = Run(pipes, "never", stitch=Stitch(STEPS))
    assert torch.equal(stitched.latents(), Run(pipes, "first-block").latents())
    assert stitched.target.num_prefills == 0


def test_the_same_bytes_again(pipes):
    once, again = (Run(pipes, Scripted([False, True, False])).latents() for _ in range(2))
    assert torch.equal(once, again)


class BySeed(Scripted):
    """Decides by the video's own seed, so that the rows of a batch part."""

    def wants_draft(self, place):
        return (place.seed + place.index) % 2 == 0

    def judge(self, block):
        assert self.wants_draft(block.place)
        keep = (block.place.seed // 2 + block.place.index) % 2 == 0
        return Judgement(score=0.0, keep=keep)


@pytest.mark.parametrize("stitch", [None, Stitch(1, "target")])
def test_a_row_of_a_batch_is_its_single_run(pipes, stitch):
    seeds = (0, 1, 2, 3)
    batch = Run(pipes, BySeed([]), seeds=seeds, stitch=stitch)
    for row, seed in enumerate(seeds):
        alone = Run(pipes, BySeed([]), seeds=(seed,), stitch=stitch)
        assert torch.equal(batch.latents(row), alone.latents())
        assert batch.sources(row) == alone.sources()
    assert len({tuple(batch.sources(row)) for row in range(len(seeds))}) > 1


def test_a_score_of_nan_never_keeps(pipes):
    run = Run(pipes, Scripted([True] * 3, score=math.nan))
    assert run.sources() == ["target"] * 3
    assert torch.equal(run.latents(), plain(pipes["target"], num_steps=STEPS))


def test_a_broken_draft_is_not_shown_to_the_router(pipes):
    broken = far_pipe(2)
    torch.nn.init.constant_(broken.transformer.proj_out.bias, math.inf)
    router = Scripted([True] * 3)
    run = Run(pipes | {"drafter": broken}, router)
    assert router.views == []
    assert all(math.isnan(record.score) for record in run.rows[0].records)
    assert torch.equal(run.latents(), plain(pipes["target"], num_steps=STEPS))


def test_what_a_router_is_told(pipes):
    router = Scripted([True, False, True], score=0.5)
    run = Run(pipes, router)
    places = [view.place for view in router.views]
    assert [place.index for place in places] == [0, 1, 2]
    assert len({place.seed for place in places}) == 1
    assert [[judged.keep for judged in place.history] for place in places] == [
        [], [True], [True, False],
    ]  # fmt: skip
    assert torch.equal(router.views[0].latents_FCHW, run.latents()[0, :, :1].transpose(0, 1))
    # Nobody asked for a picture.
    assert run.rows[0].frames.decode_time_s == 0


def pictures(vae, latents):
    """diffusers' decode of a whole video, ``[F, 3, H, W]`` in [0, 1]."""
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    with torch.no_grad():
        pixels = vae.decode(latents / (1.0 / std) + mean, return_dict=False)[0]
    return (pixels[0].transpose(0, 1) * 0.5 + 0.5).clamp(0, 1)


def test_a_router_sees_the_draft_behind_the_pictures_that_stayed(pipes):
    seen = []

    class Looking(Scripted):
        def judge(self, block):
            seen.append((block.frames(), block.previous_frames()))
            return super().judge(block)

    run = Run(pipes, Looking([True, False, True]))
    whole = pictures(pipes["target"].vae, run.latents())
    drafts, before = zip(*seen, strict=True)
    assert torch.equal(drafts[0], whole[:1])
    assert not torch.equal(drafts[1], whole[1:9])
    assert torch.equal(drafts[2], whole[9:])
    assert before[0] is None
    assert torch.equal(before[1], whole[:1])
    assert torch.equal(before[2], whole[5:9])


class CountingCodec(WanCodec):
    num_decodes = 0

    def decode(self, latents, state):
        self.num_decodes += 1
        return super().decode(latents, state)


PATCHED = {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12}


@pytest.mark.parametrize("settings", [{}, PATCHED], ids=["Wan 2.1", "Wan 2.2"])
def test_blocks_decode_to_the_pictures_of_the_whole_whatever_was_dropped_between(settings):
    vae, latents = wan_vae(**settings), torch.randn(1, 16, 6, 4, 4)
    codec = CountingCodec(vae)
    frames = BlockFrames(codec)
    taken = []
    for block in latents.split([1, 2, 2, 1], dim=2):
        frames.draft(torch.randn_like(block))
        frames.draft(block)
        frames.commit(block)
        taken += frames.take()
    pixels = torch.cat(taken, dim=2)[0].transpose(0, 1)
    assert torch.equal((pixels * 0.5 + 0.5).clamp(0, 1), pictures(vae, latents))
    # Each draft once, and none again because it was kept.
    assert codec.num_decodes == 8


def test_what_the_decoder_holds_does_not_grow_with_the_video():
    frames = BlockFrames(WanCodec(wan_vae()))
    sizes = []
    for block in torch.randn(1, 16, 5, 4, 4).split(1, dim=2):
        frames.draft(torch.randn_like(block))
        frames.commit(block)
        frames.take()
        held = [*frames._state, frames._last, *frames._waiting, *frames._ready]
        sizes.append(sum(one.nbytes for one in held if isinstance(one, torch.Tensor)))
    assert sizes[2] == sizes[3] == sizes[4] > 0


def test_a_vae_in_tiles_is_refused():
    vae = wan_vae()
    vae.enable_tiling()
    with pytest.raises(ValueError, match="use_tiling must be off"):
        WanCodec(vae)


def test_guidance_is_that_of_the_pipeline():
    pipe, other = far_pipe(1), embeds(5)
    family = video_family(pipe)
    layout = family.layout(NUM_FRAMES, SIDE, SIDE, None)
    prompt = Prompt(text=None, embeds=embeds(), negative_embeds=other)
    row = VideoRow(
        family.noise(layout, 1, seeded(), None), layout.block_sizes, prompt, family.codec()
    )
    sampler = Sampler(family.model(layout, 2.0), STEPS)
    router = build_router("never")
    Engine(
        BlockTarget([row], sampler, router, sampler, None),
        BlockDrafter([row], sampler, router, None),
        BlockRule(router.guarantee),
        BlockSchedule([row], router),
    ).run()
    expected = plain(pipe, num_steps=STEPS, guidance_scale=2.0, negative_prompt_embeds=other)
    assert torch.equal(torch.cat(row.context.blocks, dim=2), expected)


@pytest.mark.parametrize(
    ("drafter", "message"),
    [
        ({"in_channels": 8, "out_channels": 8}, "drafter's transformer.in_channels must be"),
        ({"text_dim": 16}, "drafter's transformer.text_dim must be the target's, 32, got 16"),
        ({"vae": wan_vae(latents_mean=[0.5] * 16)}, "drafter's vae.latents_mean must be"),
    ],
)
def test_a_drafter_with_other_latents_is_refused(drafter, message):
    with pytest.raises(ValueError, match=message):
        check_pair(far_pipe(1), far_pipe(2, **drafter))


def test_another_pipeline_is_refused_by_name():
    with pytest.raises(ValueError, match="int is not a known pipeline of block-wise video; known"):
        video_family(3)
