"""More images than rows: an image begins where another one is complete, and none notices."""

import functools

import numpy as np
import pytest
import torch
from emu3 import PROMPTS as EMU3_PROMPTS
from emu3 import tiny_emu3, tiny_processor
from glm import glm_model, glm_processor
from saved import save_janus

from mmspec.denoiser import Denoiser, NoiseSchedule
from mmspec.pipelines import SpeculativeImagePipeline

PROMPTS = [
    "a pixel avatar", "a pixel avatar with red hair and glasses", "blue", "red hair",
    "the blue top with red glasses and the red top with blue glasses", "a red avatar",
    "glasses and red hair",
]  # fmt: skip


@pytest.fixture(scope="module")
def pipe(tmp_path_factory) -> SpeculativeImagePipeline:
    folder = save_janus(tmp_path_factory.mktemp("janus"))
    pipe = SpeculativeImagePipeline.from_pretrained(folder, dtype=torch.float64)
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(0)
    pipe.denoiser = Denoiser(32, NoiseSchedule(num_steps=3))
    pipe.denoiser.measure(torch.randn(40, 32))
    return pipe


def seeds(*values: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(value) for value in values]


def make(pipe, prompts=PROMPTS, **options):
    options = {"generator": seeds(*range(len(prompts))), "top_k": 4} | options
    return pipe(prompts, **({"output_type": "tokens"} | options))


@functools.cache
def alone(pipe, guidance) -> torch.Tensor:
    """Each image by plain decoding in a call of its own."""
    options = {"guidance_scale": guidance, "decoder": "sequential"}
    made = [
        make(pipe, [prompt], generator=seeds(seed), **options).tokens
        for seed, prompt in enumerate(PROMPTS)
    ]
    return torch.cat(made)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("window", [1, 7, 16, None])
def test_every_image_is_its_single_run(pipe, guidance, batch_size, window):
    out = make(pipe, guidance_scale=guidance, batch_size=batch_size, window=window)
    assert torch.equal(out.tokens, alone(pipe, guidance))
    assert [row.num_units for row in out.row_stats] == [16] * 7
    assert out.stats.num_units == 7 * 16


@pytest.mark.parametrize("decoder", ["sequential", "jacobi-denoise"])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_so_it_is_for_the_other_exact_decoders(pipe, decoder, temperature):
    plain = make(pipe, decoder="sequential", temperature=temperature).tokens
    out = make(pipe, decoder=decoder, temperature=temperature, batch_size=2)
    assert torch.equal(out.tokens, plain)


def test_forwards_stay_full_and_are_fewer_than_those_of_batches(pipe):
    fed = []
    layer = pipe.model.model.language_model.layers[-1].mlp
    hook = layer.register_forward_hook(lambda _, args, out: fed.append(tuple(out.shape[:2])))
    options = {"window": 8, "guidance_scale": 3.0}
    out = make(pipe, batch_size=3, **options)
    num_forwards, forwards = len(fed), list(fed)
    for first in range(0, 7, 3):
        part = slice(first, first + 3)
        make(pipe, PROMPTS[part], generator=seeds(*range(7)[part]), **options)
    hook.remove()
    assert num_forwards == out.stats.num_target_forwards
    assert num_forwards < len(fed) - num_forwards
    # Three prompts are read at the beginning, three when the first image is complete, then one.
    reads = [place for place, (_, width) in enumerate(forwards) if width not in (1, 2, 4, 8)]
    assert [forwards[place][0] for place in reads] == [6, 6, 2]
    assert {rows for rows, _ in forwards[: reads[-1]]} == {6}


def test_an_image_that_waited_takes_no_step_more(pipe):
    options = {"window": 8, "guidance_scale": 3.0}
    out = make(pipe, batch_size=2, **options)
    whole = make(pipe, **options)
    waited = [row.num_target_forwards for row in out.row_stats]
    assert waited[:2] == [row.num_target_forwards for row in whole.row_stats[:2]]
    # What is said behind its prompt is a guess there, which costs a place in the window.
    assert sum(waited) <= sum(row.num_target_forwards for row in whole.row_stats) + 1
    for step_map, stats in zip(out.step_maps[:2], out.row_stats, strict=False):
        assert int(step_map.max()) + 1 == stats.num_target_forwards
    for step_map, stats in zip(out.step_maps[2:], out.row_stats[2:], strict=True):
        assert int(step_map.min()) == 0
        assert int(step_map.max()) + 2 == stats.num_target_forwards


def test_one_generator_gives_the_images_of_a_whole_batch(pipe):
    options = {"generator": torch.Generator().manual_seed(9), "num_images_per_prompt": 2}
    whole = make(pipe, **options).tokens
    options["generator"] = torch.Generator().manual_seed(9)
    assert torch.equal(make(pipe, batch_size=4, **options).tokens, whole)


def test_prompts_of_both_halves_and_forced_tokens_follow_the_image():
    pipe = SpeculativeImagePipeline.from_model(tiny_emu3(), tiny_processor())
    pipe.set_progress_bar_config(disable=True)
    options = {"height": 24, "width": 32, "top_k": 4}
    options["negative_prompt"] = ["lowres", "a blue pixel and red hair", "glasses", "blue red"]
    whole = make(pipe, EMU3_PROMPTS, **options)
    out = make(pipe, EMU3_PROMPTS, batch_size=2, window=8, **options)
    assert torch.equal(out.tokens, whole.tokens)


def test_positions_that_are_counted_by_the_grid_follow_the_image():
    pipe = SpeculativeImagePipeline.from_model(glm_model(), glm_processor())
    pipe.set_progress_bar_config(disable=True)
    prompts = ["a cat", "a red dog", "a blue hat", "a red cat 3 hat"]
    options = {"height": 64, "width": 96, "window": 16}
    whole = make(pipe, prompts, **options)
    assert torch.equal(make(pipe, prompts, batch_size=2, **options).tokens, whole.tokens)


def test_images_are_handed_over_when_they_are_complete(pipe):
    seen, ended = {}, []

    def take(pipeline, index, output):
        assert index not in seen
        seen[index] = output

    def note(pipeline, step, details):
        ended.append(details["outcome"].ended)
        assert set(seen) == {index for of_step in ended for index in of_step}
        assert len(details["preview"]()) == 7

    options = {"window": 8, "output_type": "np"}
    out = make(pipe, batch_size=3, callback_on_image_end=take, callback_on_step_end=note, **options)
    assert sorted(seen) == list(range(7))
    assert ended[-1]
    assert sum(map(bool, ended)) > 3
    assert out.images is None
    wanted = make(pipe, **options)
    assert torch.equal(out.tokens, wanted.tokens)
    for index, output in seen.items():
        assert torch.equal(output.tokens[0], wanted.tokens[index])
        assert torch.equal(output.step_maps[0], out.step_maps[index])
        assert np.allclose(output.images[0], wanted.images[index], atol=1e-6)
        assert output.stats.num_target_forwards == out.row_stats[index].num_target_forwards


def test_an_interrupted_run_keeps_what_there_is(pipe):
    options = {"window": 4, "guidance_scale": 3.0, "batch_size": 2}
    whole, finished = alone(pipe, 3.0), []

    def stop(pipeline, step, details):
        finished.extend(details["outcome"].ended)
        return len(finished) == 3

    out = make(pipe, callback_on_step_end=stop, **options)
    assert out.interrupted
    is_there = out.tokens >= 0
    assert torch.equal(out.tokens[is_there], whole[is_there])
    assert is_there[finished].all()
    assert not is_there[5:].any()
    assert [row.num_target_forwards > 0 for row in out.row_stats] == [True] * 4 + [False] * 3


def test_a_preview_shows_images_that_are_complete_and_those_that_wait():
    pipe = SpeculativeImagePipeline.from_pretrained("bundled:avatars")
    pipe.set_progress_bar_config(disable=True)
    counts, frames = [[0, 0, 0]], []

    def look(pipeline, step, details):
        outcome = details["outcome"]
        new = dict(zip(outcome.requests, map(len, outcome.new_units), strict=True))
        counts.append([count + new.get(index, 0) for index, count in enumerate(counts[-1])])
        frames.append(details["preview"]())

    options = {"window": 64, "output_type": "pil", "guidance_scale": 1.0}
    out = make(pipe, PROMPTS[:3], batch_size=2, callback_on_step_end=look, **options)
    wanted = [np.asarray(image).reshape(-1, 3) for image in out.images]
    for known, pictures in zip(counts[1:], frames, strict=True):
        for pixels, count, picture in zip(wanted, known, pictures, strict=True):
            # This model's decoder makes one pixel of each code, whatever is around it.
            drawn = np.asarray(picture).reshape(-1, 3)
            assert (drawn[:count] == pixels[:count]).all()
            assert (drawn[count:] == 128).all()
    assert any(0 in known and 256 in known for known in counts[1:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be an integer >= 1, got 0"),
        ({"batch_size": 2.0}, "batch_size must be an integer >= 1, got 2.0"),
        ({"batch_size": 2, "decoder": "coupled"}, "sequential, exact, jacobi-denoise, got 2 for 7"),
        ({"batch_size": 6, "decoder": "lossy-rows"}, "got 6 for 7 images with 'lossy-rows'"),
        ({"callback_on_image_end": lambda: None}, "callback_on_image_end must take"),
    ],
)
def test_bad_options_are_refused_before_any_forward(pipe, monkeypatch, options, message):
    monkeypatch.setattr(pipe.model.model.language_model, "forward", None)
    with pytest.raises(ValueError, match=message):
        make(pipe, **options)


def test_rows_for_all_images_are_plain_batches(pipe):
    out = make(pipe, decoder="coupled", batch_size=7, window=8)
    assert torch.equal(out.tokens, make(pipe, decoder="coupled", window=8).tokens)


def test_a_prompt_that_waits_is_checked_before_any_forward(pipe, monkeypatch):
    monkeypatch.setattr(pipe.model.model.language_model, "forward", None)
    with pytest.raises(ValueError, match=r"row 2 has .* context of 128"):
        make(pipe, ["a", "b", "a " * 120], batch_size=1)
