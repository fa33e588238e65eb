"""Guidance inside `generate`: as transformers' own loop, whatever is drafted."""

import pytest
import torch
from emu3 import PROMPTS, allowed_tokens, tiny_emu3, tiny_processor
from tiny import make_rows, tiny_model
from transformers import LogitsProcessorList, UnbatchedClassifierFreeGuidanceLogitsProcessor

import mmspec
from mmspec.adapters.constraints import TokensByPosition
from mmspec.adapters.guidance import Guidance
from mmspec.adapters.image_emu3 import emu3_constraint
from mmspec.law_config import AllowedTokens

PAD = 0
IDS = torch.tensor(
    [[PAD, PAD, 5, 9, 7, 5, 9], [3, 4, 8, 3, 4, 8, 3], [PAD, 11, 12, 13, 11, 12, 13]]
)
NEGATIVE = torch.tensor([[7, 2, 30], [PAD, 9, 4], [PAD, PAD, 6]])
INPUTS = {"input_ids": IDS, "attention_mask": (IDS != PAD).long()}
NEGATIVES = {
    "negative_prompt_ids": NEGATIVE,
    "negative_prompt_attention_mask": (NEGATIVE != PAD).long(),
}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def generate(model, fast=None, **options):
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": PAD} | INPUTS | options
    return model.generate(**options, custom_generate=fast)


def fixed(drafter, **options):
    return mmspec.speculate(drafter, width=8, schedule="fixed", **options)


@pytest.mark.parametrize("drafter", ["none", "ngram", "jacobi"])
@pytest.mark.parametrize("scale", [3.0, 0.5])
@pytest.mark.parametrize("negatives", [{}, NEGATIVES], ids=["last token", "prompts"])
@pytest.mark.parametrize(
    "more", [{}, {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3}], ids=["plain", "penalties"]
)
def test_greedy_is_that_of_transformers(model, drafter, scale, negatives, more):
    options = {"guidance_scale": scale, **negatives, **more}
    expected = generate(model, **options)
    assert not torch.equal(expected, generate(model, **more))
    assert torch.equal(generate(model, fixed(drafter), **options), expected)


def test_a_smaller_model_may_draft(model):
    small = tiny_model(num_hidden_layers=1, seed=1)
    options = {"guidance_scale": 3.0, **NEGATIVES}
    assert torch.equal(generate(model, fixed(small), **options), generate(model, **options))


@pytest.mark.parametrize("drafter", ["ngram", "jacobi"])
def test_sampled_tokens_are_those_of_plain_decoding(model, drafter):
    def sampled(name):
        fast = fixed(name, generator=[torch.Generator().manual_seed(s) for s in range(3)])
        options = {"do_sample": True, "top_k": 0, "guidance_scale": 3.0, **NEGATIVES}
        return generate(model, fast, **options)

    assert torch.equal(sampled(drafter), sampled("none"))


def test_the_returned_cache_is_that_of_the_conditional_rows(model):
    options = {"guidance_scale": 3.0, **NEGATIVES, "return_dict_in_generate": True}
    expected = generate(model, **options).past_key_values
    cache = generate(model, fixed("ngram"), **options).past_key_values
    assert cache.get_seq_length() == expected.get_seq_length()
    is_token = torch.nn.functional.pad(INPUTS["attention_mask"], (0, 19), value=1) != 0
    for ours, theirs in zip(cache.layers, expected.layers, strict=True):
        difference = (ours.keys - theirs.keys).abs().amax(dim=(1, 3))
        assert difference[is_token].max() < 1e-9


def test_guidance_is_one_forward_per_step(model):
    calls = []
    handle = model.register_forward_pre_hook(lambda *args: calls.append(1))
    fast = fixed("none")
    generate(model, fast, guidance_scale=3.0, **NEGATIVES)
    handle.remove()
    assert len(calls) == fast.stats.num_target_forwards == 20


def used(model):
    processor = UnbatchedClassifierFreeGuidanceLogitsProcessor(2.0, model)
    processor(IDS, torch.zeros(3, 61, dtype=torch.float64))
    return processor


REFUSED = {
    "number": (lambda m: {"negative_prompt_ids": NEGATIVE[:2]}, r"one row per sequence, \[3, "),
    "padding": (
        lambda m: {
            "negative_prompt_ids": NEGATIVE.flip(1),
            "negative_prompt_attention_mask": (NEGATIVE.flip(1) != PAD).long(),
        },
        "leave its padding on the left",
    ),
    "context": (
        lambda m: {"negative_prompt_ids": NEGATIVE.repeat(1, 80)},
        "has a context of 256",
    ),
    "used": (
        lambda m: {"guidance_scale": None, "logits_processor": LogitsProcessorList([used(m)])},
        "has run before",
    ),
    "another model": (
        lambda m: {
            "guidance_scale": None,
            "logits_processor": LogitsProcessorList(
                [UnbatchedClassifierFreeGuidanceLogitsProcessor(2.0, tiny_model("Qwen2"))]
            ),
        },
        r"another model \(Qwen2ForCausalLM\)",
    ),
    "not first": (
        lambda m: {
            "guidance_scale": None,
            "repetition_penalty": 1.3,
            "logits_processor": LogitsProcessorList(
                [UnbatchedClassifierFreeGuidanceLogitsProcessor(2.0, m)]
            ),
        },
        "keeps a state from call to call",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_honoured_is_refused(model, case):
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        generate(model, fixed("ngram"), **({"guidance_scale": 2.0} | make(model)))


def test_early_exit_is_refused(model):
    with pytest.raises(ValueError, match="'early_exit' shares the target's cache"):
        generate(model, fixed("early_exit"), guidance_scale=2.0)


def test_an_earlier_cache_is_refused(model):
    one = {name: tensor[1:2] for name, tensor in INPUTS.items()}
    first = generate(model, **one, max_new_tokens=2, return_dict_in_generate=True)
    later = {"input_ids": torch.cat([first.sequences, torch.tensor([[5]])], dim=1)}
    later["attention_mask"] = torch.ones_like(later["input_ids"])
    with pytest.raises(ValueError, match="they hold nothing of the negative prompts"):
        generate(
            model,
            fixed("ngram"),
            **later,
            past_key_values=first.past_key_values,
            guidance_scale=2.0,
        )


@pytest.mark.parametrize(
    ("negatives", "message"),
    [([[1]], "one negative prompt per row: got 1 for 2 rows"), ([[1], []], "got an empty one")],
)
def test_bad_negative_prompts_are_refused(negatives, message):
    with pytest.raises(ValueError, match=message):
        Guidance(make_rows([[1, 2], [3]], [4, 4]), 2.0, negatives)


# --------------------------------------------------------------------------- Emu3

ROWS, COLUMNS = 3, 4


@pytest.fixture(scope="module")
def emu3():
    return tiny_emu3()


@pytest.fixture(scope="module")
def emu3_inputs():
    processor = tiny_processor()
    inputs = processor(
        text=PROMPTS,
        return_for_image_generation=True,
        ratio=f"{COLUMNS}:{ROWS}",
        image_area=ROWS * COLUMNS * 64,
        padding=True,
        return_tensors="pt",
    )
    negative = processor(text=["lowres hair", "a", "red", "lowres"], padding=True,
                         return_tensors="pt")  # fmt: skip
    return {
        "input_ids": inputs["input_ids"],
        "attention_mask": inputs["attention_mask"],
        "negative_prompt_ids": negative["input_ids"],
        "negative_prompt_attention_mask": negative["attention_mask"],
        "max_new_tokens": ROWS * (COLUMNS + 1) + 6,
    }


def emu3_generate(model, inputs, constraint, fast=None, **options):
    if constraint == "function":
        allowed = allowed_tokens(model, ROWS, COLUMNS)
    else:
        width = inputs["input_ids"].shape[1]
        allowed = emu3_constraint(model, height=8 * ROWS, width=8 * COLUMNS, prompt_width=width)
    options = {"do_sample": False, "guidance_scale": 3.0} | inputs | options
    return model.generate(**options, prefix_allowed_tokens_fn=allowed, custom_generate=fast)


def test_the_constraint_by_position_is_that_of_the_documentation(emu3, emu3_inputs):
    function = emu3_generate(emu3, emu3_inputs, "function")
    assert torch.equal(emu3_generate(emu3, emu3_inputs, "position"), function)


@pytest.mark.parametrize("constraint", ["function", "position"])
@pytest.mark.parametrize("window", [1, 2, 7, 16, 64])
def test_emu3_writes_what_transformers_writes(emu3, emu3_inputs, constraint, window):
    expected = emu3_generate(emu3, emu3_inputs, constraint)
    drafter = {"name": "jacobi", "stride": COLUMNS + 1}
    fast = mmspec.speculate(drafter, width=window, schedule="fixed")
    assert torch.equal(emu3_generate(emu3, emu3_inputs, constraint, fast), expected)
    if window > 2:
        assert fast.stats.num_target_forwards < ROWS * (COLUMNS + 1) + 3


def test_emu3_samples_what_plain_decoding_samples(emu3, emu3_inputs):
    options = {"do_sample": True, "temperature": 0.9, "top_k": 12, "top_p": 0.9}
    outputs = []
    for drafter in ("none", "jacobi"):
        fast = fixed(drafter, generator=torch.Generator().manual_seed(5))
        outputs.append(emu3_generate(emu3, emu3_inputs, "position", fast, **options))
    assert torch.equal(*outputs)


def test_a_constraint_of_other_prompts_is_refused(emu3, emu3_inputs):
    allowed = emu3_constraint(emu3, height=24, width=32, prompt_width=3)
    width = emu3_inputs["input_ids"].shape[1]
    with pytest.raises(ValueError, match=f"columns of input_ids, {width}, got 3"):
        emu3.generate(
            **emu3_inputs, prefix_allowed_tokens_fn=allowed, custom_generate=fixed("jacobi")
        )


def test_a_constraint_by_absolute_position_is_refused():
    table = AllowedTokens(
        class_of_position_T=torch.zeros(2, dtype=torch.long),
        masks_CV=torch.ones(1, 4, dtype=torch.bool),
    )
    with pytest.raises(ValueError, match="since_prompt=True"):
        TokensByPosition(table=table, prompt_width=4)
