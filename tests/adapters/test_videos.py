"""Videos inside `generate`: the tokens of its own loop, whoever drafts."""

import pytest
import torch
from vlm import FILMED, SUPPORTED, request, tiny_vlm

import mmspec

#: A video; a longer prompt with an image and a video; text alone.
ROWS = [
    [1, 2, (2, 2, 1), 3, 4, 1, 2],
    [5, (2, 2), 6, (2, 1, 2), 7, 8, 5, 6, 7],
    [9, 8, 7, 9, 8],
]
NO_IMAGE = [ROWS[0], [5, 6, (2, 1, 2), 7, (2, 2, 2), 8, 5, 6, 7], ROWS[2]]
DRAFTERS = ["ngram", "jacobi", {"name": "early_exit", "num_layers": 1}]


def rows_for(name):
    """GLM-OCR has one token for images and videos, and its own forward takes one of the two."""
    return NO_IMAGE if name == "glm_ocr" else ROWS


def decoded(model, inputs, custom_generate=None, **options):
    options = {"max_new_tokens": 14, "do_sample": False} | options
    return model.generate(**inputs, **options, custom_generate=custom_generate)


def fixed(drafter, **options):
    return mmspec.speculate(drafter, width=6, schedule="fixed", **options)


@pytest.mark.supports("videos", SUPPORTED)
@pytest.mark.parametrize("name", FILMED)
def test_greedy_equals_generate(name):
    model = tiny_vlm(name)
    num_accepted = 0
    for rows in (rows_for(name)[:1], rows_for(name)):
        expected = decoded(model, request(name, rows))
        for drafter in DRAFTERS:
            fast = fixed(drafter)
            assert torch.equal(decoded(model, request(name, rows), fast), expected), drafter
            num_accepted += fast.stats.num_accepted
        inputs = request(name, rows)
        inputs["pixel_values_videos"] = 3 * inputs["pixel_values_videos"] - 1
        assert not torch.equal(decoded(model, inputs), expected), "the videos must matter"
    assert num_accepted > 0


@pytest.mark.parametrize("name", FILMED)
def test_parts_of_a_video_are_read_one_after_the_other(name):
    model = tiny_vlm(name)
    expected = decoded(model, request(name, rows_for(name)))
    for size in (1, 3, 5):
        inputs = request(name, rows_for(name))
        assert torch.equal(
            decoded(model, inputs, fixed("ngram"), prefill_chunk_size=size), expected
        )


@pytest.mark.supports("sampled", SUPPORTED)
@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_5_vl"])
def test_a_seed_gives_the_same_tokens_with_every_drafter_and_in_every_batch(name):
    model = tiny_vlm(name)

    def sampled(rows, seeds, drafter):
        fast = fixed(drafter, generator=[torch.Generator().manual_seed(s) for s in seeds])
        inputs = request(name, rows)
        out = decoded(model, inputs, fast, do_sample=True, top_p=0.9)
        return out[:, inputs["input_ids"].shape[1] :]

    expected = sampled(ROWS, [4, 5, 6], "none")
    for drafter in DRAFTERS:
        assert torch.equal(sampled(ROWS, [4, 5, 6], drafter), expected), drafter
    assert torch.equal(sampled(ROWS[:1], [4], "jacobi"), expected[:1])


@pytest.mark.supports("model drafter", SUPPORTED)
@pytest.mark.parametrize("name", FILMED)
def test_a_clone_that_sees_the_videos_is_accepted_wholly(name):
    model = tiny_vlm(name)
    fast = fixed({"name": "model", "model": model, "visual_tokens": "all"})
    out = decoded(model, request(name, rows_for(name)), fast)
    assert torch.equal(out, decoded(model, request(name, rows_for(name))))
    assert fast.stats.num_target_forwards == 1 + -(-14 // 6)


def test_the_time_between_frames_places_them():
    model = tiny_vlm("qwen2_5_vl")
    outputs = []
    for seconds in (0.25, 1.0):
        inputs = request("qwen2_5_vl", ROWS[:1]) | {"second_per_grid_ts": [seconds]}
        outputs.append(decoded(model, inputs, fixed("ngram")))
        assert torch.equal(outputs[-1], decoded(model, inputs))
    assert not torch.equal(*outputs)


def test_images_and_videos_that_cannot_be_told_apart_are_refused():
    model = tiny_vlm("glm_ocr")
    with pytest.raises(ValueError, match="has one token for images and for videos"):
        decoded(model, request("glm_ocr", ROWS[1:2]), fixed("ngram"))
