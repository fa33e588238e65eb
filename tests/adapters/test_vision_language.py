"""Vision-language models: the tokens of `generate`, whatever the images and whoever drafts."""

import copy
import re

import pytest
import torch
import transformers
from tiny import tiny_model
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList
from vlm import IMAGE, SUPPORTED, TEXT, request, tiny_vlm
from vlm_processors import tokenizer

import mmspec
from mmspec.adapters import vision_language

#: Family -> how its positions go: as tokens are counted, or on the axes of an image.
FAMILIES = {
    "gemma3": "counted",
    "glm_ocr": "axes",
    "got_ocr2": "counted",
    "idefics3": "counted",
    "internvl": "counted",
    "llava": "counted",
    "llava_onevision": "counted",
    "paddleocr_vl": "axes",
    "paligemma": "counted",
    "qwen2_5_vl": "axes",
    "qwen2_vl": "axes",
    "qwen3_vl": "axes",
    "smolvlm": "counted",
}
AXES = [name for name, kind in FAMILIES.items() if kind == "axes"]
COUNTED = [name for name in FAMILIES if name not in AXES]
#: One image, two of other sizes, none; the longest in the middle.
ROWS = [
    [1, 2, (2, 3), 3, 4, 1, 2],
    [5, (2, 2), 6, (3, 2), 7, 8, 5, 6, 7],
    [9, 8, 7, 9, 8],
]
DRAFTERS = ["ngram", "jacobi", {"name": "early_exit", "num_layers": 1}]
NUM_NEW = 18
IN_BATCHES = [pytest.mark.supports(feature, SUPPORTED) for feature in ("batches", "images")]


@pytest.fixture(scope="module", params=FAMILIES)
def named(request):
    return request.param, tiny_vlm(request.param)


def decoded(model, inputs, custom_generate=None, **options):
    options = {"max_new_tokens": NUM_NEW, "do_sample": False} | options
    return model.generate(**inputs, **options, custom_generate=custom_generate)


def fixed(drafter, width=6, **options):
    return mmspec.speculate(drafter, width=width, schedule="fixed", **options)


@pytest.mark.supports("greedy", SUPPORTED)
@pytest.mark.parametrize("num_rows", [1, pytest.param(3, marks=IN_BATCHES)])
def test_greedy_equals_generate(named, num_rows):
    name, model = named
    rows = ROWS[:num_rows]
    expected = decoded(model, request(name, rows))
    num_accepted = 0
    for drafter in DRAFTERS:
        fast = fixed(drafter)
        assert torch.equal(decoded(model, request(name, rows), fast), expected), drafter
        num_accepted += fast.stats.num_accepted
    assert num_accepted > 0
    inputs = request(name, rows)
    inputs["pixel_values"] = inputs["pixel_values"].flip(-1)
    if num_rows > 1:
        assert not torch.equal(decoded(model, inputs), expected), "the images must matter"


@pytest.mark.parametrize("name", AXES)
def test_tokens_counted_in_one_row_would_be_wrong(name, monkeypatch):
    model = tiny_vlm(name)
    expected = decoded(model, request(name, ROWS))
    monkeypatch.setattr(vision_language, "_place", lambda *args: None)
    assert not torch.equal(decoded(model, request(name, ROWS), fixed("ngram")), expected)


class OtherRequest(StoppingCriteria):
    """What a request that is served in between leaves on the model."""

    def __init__(self, model):
        self.model = model

    def __call__(self, input_ids, scores, **kwargs):
        self.model.model.rope_deltas = torch.full((len(input_ids), 1), 7)
        return torch.zeros(len(input_ids), dtype=torch.bool)


def test_positions_belong_to_the_request():
    model = tiny_vlm("qwen2_5_vl")
    expected = decoded(model, request("qwen2_5_vl", ROWS))
    criteria = StoppingCriteriaList([OtherRequest(model)])
    out = decoded(model, request("qwen2_5_vl", ROWS), fixed("ngram"), stopping_criteria=criteria)
    assert torch.equal(out, expected)


@pytest.mark.supports("sampled", SUPPORTED)
@pytest.mark.parametrize("name", FAMILIES)
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


@pytest.mark.parametrize("name", ["llava", "smolvlm", "qwen2_5_vl"])
def test_returned_sequences_share_the_images(name):
    model = tiny_vlm(name)
    seeds = [torch.Generator().manual_seed(s) for s in (4, 4, 5, 5)]
    options = {"do_sample": True, "num_return_sequences": 2}
    out = decoded(model, request(name, ROWS[:2]), fixed("ngram", generator=seeds), **options)
    assert torch.equal(out[0], out[1])
    assert torch.equal(out[2], out[3])
    seeds = [torch.Generator().manual_seed(s) for s in (4, 5)]
    once = decoded(model, request(name, ROWS[:2]), fixed("none", generator=seeds), do_sample=True)
    assert torch.equal(out[::2], once)


# --------------------------------------------------------------------------- smaller models


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_first_layers_that_say_it_all_are_accepted_wholly(name):
    """Any slip in the positions or the config of the cut model would cost an acceptance."""
    model = tiny_vlm(name)
    last = model.model.language_model.layers[-1]
    for weight in (last.self_attn.o_proj.weight, last.mlp.down_proj.weight):
        torch.nn.init.zeros_(weight)
    fast = fixed({"name": "early_exit", "num_layers": 1})
    assert torch.equal(
        decoded(model, request(name, ROWS), fast), decoded(model, request(name, ROWS))
    )
    assert fast.stats.num_target_forwards == 1 + -(-NUM_NEW // 6)


@pytest.mark.supports("model drafter", SUPPORTED)
@pytest.mark.parametrize(("num_rows", "num_new"), [(3, NUM_NEW), (1, NUM_NEW - 1)])
def test_a_clone_that_sees_the_images_is_accepted_wholly(named, num_rows, num_new):
    name, model = named
    drafter = {"name": "model", "model": copy.deepcopy(model), "visual_tokens": "all"}
    fast, rows = fixed(drafter), ROWS[:num_rows]
    out = decoded(model, request(name, rows), fast, max_new_tokens=num_new)
    assert torch.equal(out, decoded(model, request(name, rows), max_new_tokens=num_new))
    assert fast.stats.num_target_forwards == 1 + -(-num_new // 6)


@pytest.mark.supports("text drafter", SUPPORTED)
def test_a_text_model_reads_the_text_only(named):
    name, model = named
    text = tiny_model("Llama", vocab_size=50)
    fed = []
    text.register_forward_pre_hook(
        lambda module, args, kwargs: fed.append(kwargs["input_ids"]), with_kwargs=True
    )
    inputs = request(name, ROWS)
    expected = decoded(model, request(name, ROWS))
    assert torch.equal(decoded(model, request(name, ROWS), fixed(text)), expected)
    is_text = inputs["attention_mask"].bool() & (inputs["input_ids"] != IMAGE)
    # The target's first token stands behind each prompt by then.
    assert fed[0].shape == (3, int(is_text.sum(1).max()) + 1)


def test_a_text_model_of_another_tokenizer_reads_the_text_only():
    model, text = tiny_vlm("qwen2_vl"), tiny_model("Llama", vocab_size=61)
    fed = []
    text.register_forward_pre_hook(
        lambda module, args, kwargs: fed.append(kwargs["input_ids"]), with_kwargs=True
    )
    drafter = {
        "name": "cross_tokenizer",
        "model": text,
        "tokenizer": tokenizer(),
        "target_tokenizer": tokenizer(),
    }
    inputs = request("qwen2_vl", ROWS)
    expected = decoded(model, request("qwen2_vl", ROWS))
    assert torch.equal(decoded(model, request("qwen2_vl", ROWS), fixed(drafter)), expected)
    assert not torch.isin(fed[0], torch.tensor([IMAGE])).any()
    is_text = inputs["attention_mask"].bool() & (inputs["input_ids"] != IMAGE)
    assert fed[0].shape == (3, int(is_text.sum(1).max()) + 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3", "qwen2_5_vl"])
def test_compiled_steps_give_the_same_tokens(name):
    model = tiny_vlm(name)
    expected = decoded(model, request(name, ROWS))
    assert torch.equal(decoded(model, request(name, ROWS), fixed("jacobi", compile=True)), expected)


# --------------------------------------------------------------------------- reused caches


def filled_cache(model, inputs, custom_generate=None):
    cache = {"past_key_values": DynamicCache(config=model.config.text_config)}
    return cache, decoded(model, inputs, custom_generate, **cache)


@pytest.mark.supports("cached turns", SUPPORTED)
@pytest.mark.parametrize("name", COUNTED)
def test_a_turn_behind_a_reused_cache(name):
    model = tiny_vlm(name)
    outputs = []
    for fast in (None, fixed("ngram")):
        cache, first = filled_cache(model, request(name, ROWS), fast)
        inputs = {"input_ids": torch.cat([first, torch.tensor([[3, 4, 1, 2]] * 3)], dim=1)}
        mask = request(name, ROWS)["attention_mask"]
        behind = torch.ones(3, inputs["input_ids"].shape[1] - mask.shape[1], dtype=torch.long)
        inputs["attention_mask"] = torch.cat([mask, behind], dim=1)
        outputs.append(decoded(model, inputs, fast, **cache))
    assert torch.equal(*outputs)


def test_a_new_image_behind_a_reused_cache():
    model = tiny_vlm("llava")
    second = request("llava", [[(1, 1), 6, 5]])
    outputs = []
    for fast in (None, fixed("ngram")):
        cache, first = filled_cache(model, request("llava", ROWS[:1]), fast)
        inputs = {
            "input_ids": torch.cat([first, second["input_ids"]], dim=1),
            "pixel_values": second["pixel_values"].flip(-1),
        }
        # The placeholders of the first image are cached; its features are not wanted again.
        outputs.append(decoded(model, inputs, fast, **cache))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("name", AXES)
@pytest.mark.parametrize(
    ("rows", "more"), [(ROWS[:2], [3, 4, 1, 2]), (ROWS[1:2], [(2, 2), 6, (1, 3), 5])]
)
def test_positions_behind_a_cache_come_from_the_grids_of_the_whole_prompt(name, rows, more):
    """The tokens are those of a fresh run; alone, transformers goes on from its latest request."""
    model = tiny_vlm(name)
    cache, first = filled_cache(model, request(name, rows), fixed("ngram"))
    answers = first[:, -NUM_NEW:].tolist()
    # Another request leaves its own end on the model.
    decoded(model, request(name, [[(3, 3), 1]]))
    longer = [[*row, *answer, *more] for row, answer in zip(rows, answers, strict=True)]
    inputs, expected = request(name, longer), decoded(model, request(name, longer))
    if not any(isinstance(item, tuple) for item in more):
        del inputs["pixel_values"]
    assert torch.equal(decoded(model, inputs, fixed("jacobi"), **cache), expected)
    assert cache["past_key_values"].get_seq_length() == expected.shape[1] - 1


def test_images_that_are_given_again_behind_a_cache_are_not_read_again():
    model = tiny_vlm("llava")
    cache, first = filled_cache(model, request("llava", ROWS[:1]), fixed("ngram"))
    longer = [[*ROWS[0], *first[0, -NUM_NEW:].tolist(), (1, 1), 6, 5]]
    out = decoded(model, request("llava", longer), fixed("ngram"), **cache)
    assert torch.equal(out, decoded(model, request("llava", longer)))


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("qwen2_5_vl", [3, 4], "do not tell at which position an image ended; pass the whole"),
        ("gemma3", [(1, 1), 5], "new images behind past_key_values are not supported for Gemma3"),
    ],
)
def test_a_turn_that_the_cache_does_not_determine_is_refused(name, row, message):
    model = tiny_vlm(name)
    cache, first = filled_cache(model, request(name, ROWS[:1]))
    inputs = request(name, [row])
    inputs["input_ids"] = torch.cat([first, inputs["input_ids"]], dim=1)
    images = {k: v for k, v in inputs.items() if k in ("input_ids", "pixel_values")}
    with pytest.raises(ValueError, match=message):
        decoded(model, images, fixed("ngram"), **cache)


def test_text_behind_a_cache_is_not_placed_by_what_the_model_remembers():
    """transformers starts the second turn where the image of another request ended."""
    model = tiny_vlm("qwen2_vl")
    text = {"input_ids": torch.tensor([[7, 3, 7, 3]])}
    outputs = []
    for fast in (None, fixed("ngram")):
        cache, first = filled_cache(model, text)
        decoded(model, request("qwen2_vl", ROWS[:1]))
        assert int(model.model.rope_deltas) < 0
        longer = {"input_ids": torch.cat([first, torch.tensor([[3, 4]])], dim=1)}
        outputs.append(decoded(model, longer, fast, **cache))
    theirs, ours = outputs
    expected = decoded(model, longer)
    assert torch.equal(ours, expected)
    assert not torch.equal(theirs, expected)


def test_prompt_lookup_of_transformers_is_wrong_behind_a_reused_cache():
    """It feeds the cached prefix twice, and says nothing."""
    model = tiny_vlm("llava")
    outputs = []
    for fast, options in (
        (None, {}),
        (fixed("ngram"), {}),
        (None, {"prompt_lookup_num_tokens": 3}),
    ):
        cache, first = filled_cache(model, request("llava", ROWS[:1]))
        inputs = {"input_ids": torch.cat([first, torch.tensor([[3, 4, 1, 2]])], dim=1)}
        outputs.append(decoded(model, inputs, fast, **cache, **options))
    expected, ours, theirs = outputs
    assert torch.equal(ours, expected)
    assert not torch.equal(theirs, expected)


# --------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guidance_scale": 2.0}, "guidance_scale is not supported for models that read images"),
        ({"image_grid": torch.ones(1)}, "image_grid"),
    ],
)
def test_what_cannot_be_honoured_is_refused(changes, message):
    model = tiny_vlm("llava")
    with pytest.raises(ValueError, match=message):
        decoded(model, request("llava", ROWS), fixed("ngram"), **changes)


PIXEL_INPUTS = ("pixel_values", "image_grid_thw", "pixel_attention_mask", "image_sizes")


@pytest.mark.parametrize("num_given", [1, 2])
def test_images_that_do_not_fill_their_places_are_refused(named, num_given):
    name, model = named
    one, two = ([1, 2, *[(2, 3), 3] * count, 4, 1, 2] for count in (1, 2))
    given, asked = (one, two) if num_given == 1 else (two, one)
    images = {key: value for key, value in request(name, [given]).items() if key in PIXEL_INPUTS}
    asked = request(name, [asked]) | images
    if num_given == 1 and name in AXES:
        with pytest.raises(StopIteration):  # of transformers, which places tokens before it calls
            decoded(model, asked, fixed("ngram"))
        return
    message = r"prompts have (\d+) image tokens .* the images given fill (\d+)"
    with pytest.raises(ValueError, match=message) as caught:
        decoded(model, asked, fixed("ngram"))
    wanted, filled = map(int, re.search(message, str(caught.value)).groups())
    assert num_given * wanted == (3 - num_given) * filled


def test_a_family_that_is_not_known_is_refused_with_images_only(monkeypatch):
    model = tiny_vlm("llava")
    monkeypatch.delitem(mmspec.speculation._FAMILIES, "llava")
    with pytest.raises(ValueError, match=r"model inputs not supported .*: mm_encoder_outputs"):
        decoded(model, request("llava", ROWS), fixed("ngram"))
    text = request("llava", ROWS[2:])
    assert torch.equal(decoded(model, text, fixed("ngram")), decoded(model, text))


def test_layers_without_masks_of_their_own_are_refused():
    """PaliGemma 2: the family's forward takes one mask, and its layers are of two kinds."""
    model = tiny_vlm("paligemma", text_config=transformers.Gemma2Config(**TEXT, sliding_window=5))
    with pytest.raises(
        ValueError, match=r"full_attention, sliding_attention layers takes no masks by layer"
    ):
        decoded(model, request("paligemma", ROWS), fixed("ngram"))


@pytest.mark.parametrize(
    ("drafter", "row", "visual_tokens", "message"),
    [
        ("llava", 0, "half", "visual_tokens must be 'all', 'none', .* got 'half'"),
        ("qwen2_vl", 0, "all", "Qwen2VLForConditionalGeneration does not read the images of Llava"),
    ],
)
def test_a_model_drafter_that_cannot_see_is_refused(drafter, row, visual_tokens, message):
    model = tiny_vlm("llava")
    drafter = {"name": "model", "model": tiny_vlm(drafter), "visual_tokens": visual_tokens}
    with pytest.raises(ValueError, match=message):
        decoded(model, request("llava", ROWS[row : row + 1]), fixed(drafter))
