"""The video pipeline as a user meets it: calls, streams, prompts, bad input."""

import gc
import io

import numpy as np
import pytest
import torch
from video import (
    FAR,
    NUM_FRAMES,
    SIDE,
    Scripted,
    embeds,
    far_pipe,
    plain,
    seeded,
    wan_vae,
    with_text,
)

from mmspec.block_records import Judgement
from mmspec.pipelines import SpeculativeVideoPipeline

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

STEPS = 2
SIZE = {"num_frames": NUM_FRAMES, "height": SIDE, "width": SIDE, "num_inference_steps": STEPS}


@pytest.fixture(scope="module")
def pipe():
    pipe = SpeculativeVideoPipeline.from_model(
        with_text(far_pipe(1, num_layers=2)), drafter=far_pipe(2)
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe, *prompt, **options):
    """A call with latents as its output, unless it says otherwise."""
    if not prompt:
        options = {"prompt_embeds": embeds()} | options
    return pipe(*prompt, **(SIZE | {"generator": seeded(), "output_type": "latent"} | options))


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_a_call_without_a_router_is_the_target_pipeline(pipe, output_type):
    out = call(pipe, output_type=output_type)
    expected = plain(pipe.target, num_steps=STEPS, output_type=output_type)
    if output_type == "pil":
        expected, got = (
            np.stack([np.stack(v) for v in frames]) for frames in (expected, out.frames)
        )
    else:
        expected, got = np.asarray(expected), np.asarray(out.frames)
    assert np.array_equal(expected, got)
    assert (out.stats.guarantee, out.stats.router, out.interrupted) == ("exact", "never", False)


@pytest.mark.supports("batches", FAR)
def test_prompts_are_those_of_diffusers_and_rows_those_of_single_calls(pipe):
    texts = ["a cat runs on the lawn", "the dog sleeps"]
    options = {"max_sequence_length": 8}
    batch = call(pipe, texts, generator=[seeded(0), seeded(1)], router="first-block", **options)
    for row, text in enumerate(texts):
        alone = call(pipe, text, generator=seeded(row), router="first-block", **options)
        assert torch.equal(batch.frames[row : row + 1], alone.frames)
    target = plain(
        pipe.target, num_steps=STEPS, prompt=texts[0], prompt_embeds=None, max_sequence_length=8
    )
    assert torch.equal(call(pipe, texts[0], **options).frames, target)


def test_figures_say_who_made_what(pipe):
    out = call(pipe, router=Scripted([True, False, True], score=0.25, wants=[False, True, True]))
    assert [record.source for record in out.blocks[0]] == ["target", "target", "drafter"]
    assert [record.score for record in out.blocks[0]] == [None, 0.25, 0.25]
    figures = out.stats.to_dict()
    expected = {
        "num_blocks": 3, "num_drafted": 2, "num_kept": 1, "num_target_forwards": 4,
        "num_target_prefills": 1, "num_drafter_forwards": 4, "num_drafter_prefills": 2,
        "guarantee": "lossy", "router": "scripted", "decode_time_s": 0,
    }  # fmt: skip
    assert {name: figures[name] for name in expected} == expected


def test_a_stream_is_the_call_block_by_block(pipe):
    router = Scripted([True, False, True], look=True)
    whole = call(pipe, router=router, output_type="np")
    stream = pipe.stream(
        prompt_embeds=embeds(), generator=seeded(), router=router, output_type="np", **SIZE
    )
    assert router.views[3:] == []
    first = next(stream)
    assert (first.index, first.frames.shape) == (0, (1, 1, SIDE, SIDE, 3))
    # Nothing runs ahead of the reader.
    assert len(router.views) == 4
    blocks = [first, *stream]
    assert np.array_equal(np.concatenate([block.frames for block in blocks], axis=1), whole.frames)
    assert [block.records[0].source for block in blocks] == ["drafter", "target", "drafter"]
    assert stream.is_complete
    assert stream.stats.num_blocks == 3


def test_the_blocks_of_the_published_models_are_those_of_diffusers():
    sizes = (1, 3, 3, 3, 3, 3, 3, 2)
    target, drafter = (far_pipe(seed, chunk_partition=sizes, full_chunk_limit=3) for seed in (1, 2))
    alone = SpeculativeVideoPipeline.from_model(target, drafter=drafter)
    alone.set_progress_bar_config(disable=True)
    out = call(alone, num_frames=81, num_inference_steps=1)
    expected = target(
        prompt_embeds=embeds(), generator=seeded(), output_type="latent",
        **SIZE | {"num_frames": 81, "num_inference_steps": 1},
    ).frames  # fmt: skip
    assert torch.equal(out.frames, expected)
    assert (len(out.blocks[0]), out.frames.shape[2]) == (8, 21)


def test_the_first_block_is_there_before_the_others(pipe):
    stream = pipe.stream(prompt_embeds=embeds(), generator=seeded(), output_type="np", **SIZE)
    assert stream.stats.first_block_time_s is None
    next(stream)
    first = stream.stats.first_block_time_s
    assert first == stream.stats.wall_time_s > 0
    list(stream)
    # Later blocks take time of their own and leave that of the first as it was.
    assert stream.stats.first_block_time_s == first < stream.stats.wall_time_s
    assert stream.stats.to_dict()["first_block_time_s"] == first


class Looking(Scripted):
    """Looks at the draft and at what stands before, and remembers neither."""

    def judge(self, block):
        shown = [block.frames(), block.previous_frames()]
        score = sum(float(one.mean()) for one in shown if one is not None)
        return Judgement(score=score, keep=self.kept[block.place.index])


def bytes_of_tensors():
    """Of all tensors that are alive, each storage once; those of tracers have none."""
    gc.collect()
    found = [one for one in gc.get_objects() if type(one) is torch.Tensor]
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in found}
    return sum(storages.values())


def test_what_a_stream_holds_does_not_grow_but_by_the_latents(pipe):
    router = Looking([True, False, True, False, True, False])
    options = SIZE | {"num_frames": 21, "block_sizes": [1] * 6, "output_type": "pt"}
    stream = pipe.stream(prompt_embeds=embeds(), generator=seeded(), router=router, **options)
    held = []
    for block in stream:
        size = block.latents.nbytes
        del block
        held.append(bytes_of_tensors())
    assert held[5] - held[3] == held[4] - held[2] == 2 * size


def test_the_bar_counts_blocks_and_kept_drafts(pipe):
    written = io.StringIO()
    loud = SpeculativeVideoPipeline.from_model(pipe.target, drafter=pipe.drafter)
    loud.set_progress_bar_config(file=written, leave=True, mininterval=0)
    call(loud, router=Scripted([False, True, True]))
    shown = written.getvalue().split("\r")[-1]
    assert "3/3" in shown
    assert "block" in shown
    assert "2 drafts kept" in shown


def test_a_stream_can_be_left_at_any_block(pipe):
    stream = pipe.stream(prompt_embeds=embeds(), generator=seeded(), output_type="latent", **SIZE)
    first = next(stream)
    stream.cancel()
    assert list(stream) == []
    assert not stream.is_complete
    assert torch.equal(first.frames, plain(pipe.target, num_steps=STEPS)[:, :, :1])


@pytest.mark.parametrize("router", ["never", "always"])
def test_a_new_prompt_continues_as_diffusers_continues_a_video(pipe, router):
    model = pipe.target if router == "never" else pipe.drafter
    stream = pipe.stream(
        prompt_embeds=embeds(), generator=seeded(), router=router, output_type="latent", **SIZE
    )
    made = [next(stream).frames, next(stream).frames]
    stream.set_prompt(prompt_embeds=embeds(9))
    made += [block.frames for block in stream]
    context = torch.cat(made[:2], dim=2).permute(0, 2, 1, 3, 4)
    expected = plain(model, num_steps=STEPS, prompt_embeds=embeds(9), video_latents=context)
    assert torch.equal(torch.cat(made, dim=2), expected)
    assert not torch.equal(expected, plain(model, num_steps=STEPS))


def test_a_callback_sees_every_block_and_interrupts(pipe):
    seen = []

    def watch(caller, index, details):
        seen.append((caller, index, details["stream"].records[0][-1].source))
        return index == 1

    out = call(pipe, router="first-block", callback_on_step_end=watch)
    assert seen == [(pipe, 0, "target"), (pipe, 1, "drafter")]
    assert out.interrupted
    assert out.frames.shape[2] == 3


def test_interrupting_from_outside_keeps_what_there_is(pipe):
    def press(caller, index, details):
        caller.interrupt()

    out = call(pipe, callback_on_step_end=press)
    assert (out.interrupted, out.stats.num_blocks) == (True, 1)
    assert not call(pipe).interrupted


def test_of_two_streams_the_later_one_is_interrupted(pipe):
    options = {"prompt_embeds": embeds(), "output_type": "latent", **SIZE}
    first, second = (pipe.stream(generator=seeded(), **options) for _ in range(2))
    made = [next(first), next(second)]
    pipe.interrupt()
    assert [len(list(second)), second.is_complete] == [1, False]
    made += list(first)
    assert first.is_complete
    assert torch.equal(
        torch.cat([made[0].frames, *[b.frames for b in made[2:]]], dim=2), call(pipe).frames
    )


def test_a_stream_that_is_left_behind_is_not_interrupted_for_a_call(pipe):
    def press(caller, index, details):
        next(caller.stream(prompt_embeds=embeds(), output_type="latent", **SIZE))
        gc.collect()
        caller.interrupt()

    out = call(pipe, callback_on_step_end=press)
    assert (out.interrupted, out.stats.num_blocks) == (True, 1)


def test_noise_that_is_passed_in_serves_both_models(pipe):
    noise = torch.randn(1, 16, 4, 4, 4)
    target, drafter = (
        call(pipe, latents=noise, router=name, generator=None).frames
        for name in ("never", "always")
    )
    assert torch.equal(target, plain(pipe.target, num_steps=STEPS, latents=noise))
    assert torch.equal(drafter, plain(pipe.drafter, num_steps=STEPS, latents=noise))


def test_guidance_of_both_models(pipe):
    options = {"guidance_scale": 2.0, "negative_prompt_embeds": embeds(3)}
    expected = plain(pipe.target, num_steps=STEPS, **options)
    assert torch.equal(call(pipe, **options).frames, expected)
    drafted = call(pipe, router="always", drafter_guidance_scale=1.0, **options).frames
    assert torch.equal(drafted, plain(pipe.drafter, num_steps=STEPS))


def test_pipelines_are_loaded_from_folders(pipe, tmp_path):
    pipe.target.save_pretrained(tmp_path / "target")
    with_text(far_pipe(2)).save_pretrained(tmp_path / "drafter")
    loaded = SpeculativeVideoPipeline.from_pretrained(
        tmp_path / "target", drafter=tmp_path / "drafter", dtype=torch.bfloat16
    )
    assert loaded.drafter.text_encoder is None
    for one in (loaded, loaded.target):
        one.set_progress_bar_config(disable=True)
    options = {"max_sequence_length": 8, "output_type": "pt"}
    expected = plain(loaded.target, num_steps=STEPS, prompt="a cat", prompt_embeds=None, **options)
    assert expected.dtype == torch.bfloat16
    assert torch.equal(call(loaded, "a cat", **options).frames, expected)


def test_the_target_drafts_for_itself_if_there_is_no_other(pipe):
    alone = SpeculativeVideoPipeline.from_model(pipe.target)
    alone.set_progress_bar_config(disable=True)
    drafted = call(alone, router="always", drafter_steps=1)
    assert torch.equal(drafted.frames, plain(pipe.target, num_steps=1))
    with pytest.raises(ValueError, match="drafter_steps must be given where the target drafts"):
        call(alone, router="always")


class Reading(Scripted):
    needs_prompt = True


BAD = {
    "no prompt": ({"prompt_embeds": None}, "given, one of them, got 'neither'"),
    "embeds of another width": (
        {"prompt_embeds": torch.zeros(1, 8, 3)}, r"shape \(videos, tokens, 32\), got \(1, 8, 3\)",
    ),
    "frames between two latents": ({"num_frames": 12}, "num_frames must be a multiple of 4"),
    "frames that do not fill the blocks": ({"num_frames": 17}, "with the sum 5.*got \\[1, 2, 1\\]"),
    "blocks that do not fit": ({"block_sizes": [2, 1]}, "with the sum 4.*got \\[2, 1\\]"),
    "an empty block": ({"block_sizes": [4, 0]}, "each >= 1, got \\[4, 0\\]"),
    "a side": ({"height": 40}, "height must be a multiple of 16, got 40"),
    "no frames": ({"num_frames": 0}, "num_frames must be an integer >= 1, got 0"),
    "steps": ({"num_inference_steps": 0}, "num_inference_steps must be an integer >= 1, got 0"),
    "steps of the drafter": ({"drafter_steps": 1.5}, "drafter_steps must be an integer >= 1"),
    "noise": ({"latents": torch.zeros(1, 16, 4, 4, 5)}, "latents must be of the shape"),
    "generators": ({"generator": [seeded(), seeded()]}, "one per video, 1, got"),
    "a router": ({"router": "sometimes"}, "unknown router 'sometimes'; known: always"),
    "an argument": ({"router": "never:3"}, "argument of router 'never' must be left out, got '3'"),
    "no router": ({"router": 3}, "router must be a name or an object with wants_draft and judge"),
    "a router without text": ({"router": Reading([True] * 3)}, "the router 'scripted' reads it"),
    "a stitch": ({"stitch": 3}, "stitch must be k, .* from 1 to num_inference_steps, 2, got 3"),
    "a beginner": ({"stitch": "router:1"}, "stitch must be k, .* got 'router:1'"),
    "stitched steps": ({"stitch": 1, "drafter_steps": 1}, "drafter_steps must be .* with stitch"),
    "an output": ({"output_type": "gif"}, "unknown output_type 'gif'; known: pil, np, pt, latent"),
    "guidance": ({"guidance_scale": float("nan")}, "guidance_scale must be a finite number"),
    "a callback": ({"callback_on_step_end": lambda: None}, "callback_on_step_end must take"),
    "an unknown option": ({"fps": 8}, "unknown option 'fps'; known: negative_prompt"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_anything_runs(pipe, case, monkeypatch):
    def fail(*arguments, **options):
        raise AssertionError("a model ran")

    for model in (pipe.target.transformer, pipe.drafter.transformer, pipe.target.text_encoder):
        monkeypatch.setattr(model, "forward", fail)
    options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call(pipe, **options)


def test_bad_prompts_are_refused(pipe):
    with pytest.raises(ValueError, match="prompt 0 must be a non-empty string, got ' '"):
        call(pipe, " ")
    with pytest.raises(ValueError, match="given, one of them, got 'both'"):
        call(pipe, "a cat", prompt_embeds=embeds())
    stream = pipe.stream("a cat", **SIZE)
    with pytest.raises(ValueError, match="number of prompts must be one per video, 1, got 2"):
        stream.set_prompt(["a cat", "a dog"])


def test_a_drafter_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"drafter's vae\.z_dim must be the target's, 16, got 8"):
        SpeculativeVideoPipeline.from_model(far_pipe(1), drafter=far_pipe(2, vae=wan_vae(z_dim=8)))


def test_models_on_other_schedules_are_not_stitched(pipe):
    drafter = far_pipe(2)
    drafter.scheduler.register_to_config(shift=1.0)
    other = SpeculativeVideoPipeline.from_model(pipe.target, drafter=drafter)
    with pytest.raises(ValueError, match="drafter's scheduler must be the target's with stitch"):
        call(other, router="never", stitch=1)
