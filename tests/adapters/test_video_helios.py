"""Helios: chunks with their past as an input, to the bit what diffusers' pipeline makes."""

import copy

import numpy as np
import pytest
import torch
from video import HELIOS, SIDE, Scripted, embeds, helios_pipe, seeded

from mmspec.pipelines import SpeculativeVideoPipeline

# Its scheduler asks numpy for a range between two tensors.
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")

#: Three blocks of 2 latent frames, 5 pictures each; the last two pictures are cut off.
SIZES = [2, 2, 2]
CALL = {"height": SIDE, "width": SIDE, "num_frames": 15, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def pipes():
    return helios_pipe(1, num_layers=2), helios_pipe(2)


def made(target, drafter, **options):
    pipe = SpeculativeVideoPipeline.from_model(target, drafter=drafter)
    pipe.set_progress_bar_config(disable=True)
    options = {"block_sizes": SIZES, "output_type": "latent", "generator": seeded()} | options
    given = {"prompt_embeds": embeds(), "negative_prompt_embeds": embeds(4)}
    return pipe(**(CALL | given | options))


def plain(pipe, output_type="latent", **options):
    given = {"prompt_embeds": embeds(), "negative_prompt_embeds": embeds(4)}
    return pipe(
        num_latent_frames_per_chunk=2, output_type=output_type, generator=seeded(),
        **(CALL | given | options),
    ).frames  # fmt: skip


@pytest.mark.supports("target pipeline", HELIOS)
@pytest.mark.parametrize("output_type", ["latent", "np"])
def test_target_and_drafter_alone_are_their_pipelines(pipes, output_type):
    for router, pipe in zip(("never", "always"), pipes, strict=True):
        out = made(*pipes, router=router, output_type=output_type)
        assert np.array_equal(np.asarray(out.frames), plain(pipe, output_type))
        assert out.stats.num_target_prefills + out.stats.num_drafter_prefills == 0


def test_without_guidance_the_negative_prompt_is_not_looked_at(pipes):
    options = {"guidance_scale": 1.0, "negative_prompt_embeds": None}
    assert torch.equal(made(*pipes, **options).frames, plain(pipes[0], **options))


def test_every_draft_refused_is_the_target_pipeline(pipes):
    out = made(*pipes, router=Scripted([False] * 3))
    assert torch.equal(out.frames, plain(pipes[0]))
    assert (out.stats.num_drafted, out.stats.num_kept) == (3, 0)


@pytest.mark.supports("batches", HELIOS)
def test_a_row_of_a_batch_is_its_single_run_and_a_repeat_the_same(pipes):
    options = {"router": "random:0.5", "negative_prompt_embeds": None, "guidance_scale": 1.0}
    rows = embeds(7, num_rows=2)
    seeds = [seeded(4), seeded(5)]
    batch = made(*pipes, prompt_embeds=rows, generator=seeds, **options)
    for row, seed in enumerate((4, 5)):
        given = options | {"prompt_embeds": rows[row : row + 1]}
        alone, again = (made(*pipes, generator=seeded(seed), **given) for _ in range(2))
        assert torch.equal(batch.frames[row : row + 1], alone.frames)
        assert torch.equal(again.frames, alone.frames)
        assert [b.source for b in batch.blocks[row]] == [b.source for b in alone.blocks[0]]
    assert len({tuple(block.source for block in of_row) for of_row in batch.blocks}) == 2


def test_a_stream_is_the_call_block_by_block(pipes):
    router = Scripted([False, True, False], look=True)
    pipe = SpeculativeVideoPipeline.from_model(pipes[0], drafter=pipes[1])
    pipe.set_progress_bar_config(disable=True)
    options = {"block_sizes": SIZES, "output_type": "np", "router": router}
    given = {"prompt_embeds": embeds(), "negative_prompt_embeds": embeds(4)}
    stream = pipe.stream(**(CALL | given | options), generator=seeded())
    blocks = list(stream)
    assert [block.records[0].source for block in blocks] == ["target", "drafter", "target"]
    whole = made(*pipes, router=router, output_type="np").frames
    assert np.array_equal(np.concatenate([block.frames for block in blocks], axis=1), whole)


@pytest.mark.parametrize("keep", [(0, 1, 0), (1, 0, 1)])
def test_either_model_goes_on_from_the_blocks_of_the_other(pipes, keep):
    twin = copy.deepcopy(pipes[0])
    twins = made(pipes[0], twin, router=Scripted(list(map(bool, keep))))
    assert torch.equal(twins.frames, plain(pipes[0]))
    mixed = made(*pipes, router=Scripted(list(map(bool, keep))))
    # Up to the first change of hands it is the one pipeline, and not behind it.
    alone = plain(pipes[1] if keep[0] else pipes[0])
    assert torch.equal(mixed.frames[:, :, :2], alone[:, :, :2])
    assert not torch.equal(mixed.frames[:, :, 2:4], alone[:, :, 2:4])


def test_previews_start_anew_with_every_block(pipes):
    pipe = SpeculativeVideoPipeline.from_model(pipes[0], drafter=pipes[1])
    pipe.set_progress_bar_config(disable=True)
    options = {"block_sizes": SIZES, "prompt_embeds": embeds(), "guidance_scale": 1.0, **CALL}
    # Cut off at the end of a video are pictures, not latents.
    preview = pipe.fit_preview([options | {"router": "always", "generator": seeded()}])
    assert (preview.channels, preview.scale, preview.pictures_per_frame) == (16, 8, 4)
    seen = []

    class Looking(Scripted):
        def judge(self, block):
            seen.append((block.preview.frames(), block.preview.previous_frames()))
            return super().judge(block)

    options |= {"router": Looking([True] * 3), "generator": seeded(), "output_type": "latent"}
    blocks = pipe(**options).frames[0].transpose(0, 1).split(SIZES)
    for index, (made, before) in enumerate(seen):
        assert torch.equal(made, preview(blocks[index], is_start=True))
        assert len(made) == 5
        if index:
            assert torch.equal(before, preview(blocks[index - 1], is_start=True)[-4:])


def test_what_does_not_fit_is_refused(pipes):
    cases = [
        ({"num_frames": 16}, "num_frames must be 15 for 3 blocks of 2 latent frames, got 16"),
        ({"block_sizes": None}, "num_frames must be a multiple of 33, got 15"),
        ({"block_sizes": [2, 3, 2]}, "equal numbers of latent frames"),
        (
            {"stitch": 1, "router": "always"},
            "stitch must be None for HeliosPipeline",
        ),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            made(*pipes, **options)
