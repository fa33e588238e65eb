"""Prompts that are read in parts: the same tokens, and no forward wider than was asked for."""

import pytest
import torch
from tiny import tiny_model
from vlm import FAMILIES, SUPPORTED, request, tiny_vlm

import mmspec
from mmspec.adapters.causal_lm import prompt_parts
from mmspec.rows import TokenRows

CAUSAL = sorted(set(FAMILIES) - {"gemma3", "paligemma"})
ROWS = [
    [1, 2, (2, 3), 3, 4, 1, 2],
    [5, (2, 2), 6, (3, 2), 7, 8, 5, 6, 7],
    [9, 8, 7, 9, 8],
]


class Widths:
    """Columns of every forward."""

    def __init__(self, model):
        self.seen = []
        self._hook = model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module, args, kwargs):
        self.seen.append(kwargs["input_ids"].shape[1])

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._hook.remove()


def decoded(model, inputs, drafter=None, **options):
    fast = None if drafter is None else mmspec.speculate(drafter, width=3, schedule="fixed")
    options = {"max_new_tokens": 12, "do_sample": False} | options
    return model.generate(**inputs, **options, custom_generate=fast)


@pytest.mark.supports("parts", SUPPORTED)
@pytest.mark.parametrize("name", CAUSAL)
def test_parts_give_the_tokens_of_the_whole(name):
    model = tiny_vlm(name)
    longest = request(name, ROWS)["input_ids"].shape[1]
    expected = decoded(model, request(name, ROWS))
    for size in (1, 3, 7):
        with Widths(model) as widths:
            out = decoded(model, request(name, ROWS), "jacobi", prefill_chunk_size=size)
        assert torch.equal(out, expected), size
        num_parts = -(-longest // size)
        assert widths.seen[:num_parts] == [size] * (longest // size) + [longest % size] * (
            longest % size > 0
        )
        # Behind the prompt the window says how wide a forward is.
        assert max(widths.seen[num_parts:]) == 3
    with Widths(model) as widths:
        decoded(model, request(name, ROWS), "jacobi")
    assert max(widths.seen) == longest


#: The last one has layers of both kinds.
TEXT_MODELS = {
    "Llama": {},
    "Mistral": {"sliding_window": 4},
    "Qwen2": {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1},
}


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_text_models_are_read_in_parts(name):
    model = tiny_model(name, **TEXT_MODELS[name])
    ids = torch.tensor([[0, 0, 0, 7, 3, 7, 3, 7], [5, 6, 5, 6, 5, 6, 5, 6]])
    inputs = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    expected = decoded(model, inputs)
    for size in (1, 3):
        with Widths(model) as widths:
            out = decoded(model, inputs, "early_exit", prefill_chunk_size=size)
        assert torch.equal(out, expected)
        assert max(widths.seen) == 3


@pytest.mark.parametrize("size", [6, 7, 11])
def test_no_border_cuts_an_image_that_sees_itself(size):
    model = tiny_vlm("gemma3")
    expected = decoded(model, request("gemma3", ROWS), max_new_tokens=24)
    with Widths(model) as widths:
        options = {"max_new_tokens": 24, "prefill_chunk_size": size}
        out = decoded(model, request("gemma3", ROWS), "ngram", **options)
    assert torch.equal(out, expected)
    assert max(widths.seen) <= size


def test_a_border_within_an_image_would_matter(monkeypatch):
    model = tiny_vlm("gemma3")
    options = {"max_new_tokens": 24}
    expected = decoded(model, request("gemma3", ROWS), **options)
    monkeypatch.setattr("mmspec.adapters.vision_language._spans", lambda *args: iter(()))
    options["prefill_chunk_size"] = 3
    out = decoded(model, request("gemma3", ROWS), "ngram", **options)
    assert not torch.equal(out, expected)


@pytest.mark.parametrize(
    ("name", "size", "span"), [("gemma3", 3, "tokens 3 to 6"), ("paligemma", 9, "tokens 0 to 11")]
)
def test_what_cannot_be_cut_is_refused(name, size, span):
    model = tiny_vlm(name)
    message = f"prefill_chunk_size={size} would cut {span} of a prompt, which see each other whole"
    with Widths(model) as widths, pytest.raises(ValueError, match=message):
        decoded(model, request(name, ROWS[:1]), "ngram", prefill_chunk_size=size)
    assert widths.seen == []


def test_a_prefix_that_fits_one_part_is_read():
    model = tiny_vlm("paligemma")
    inputs = request("paligemma", ROWS)
    longest = inputs["input_ids"].shape[1]
    out = decoded(model, inputs, "ngram", prefill_chunk_size=longest)
    assert torch.equal(out, decoded(model, request("paligemma", ROWS)))


def test_parts_behind_what_is_cached():
    keys = torch.zeros(2, dtype=torch.long)
    rows = TokenRows([[1] * 5, [2] * 2], max_new_tokens=[1, 1], keys_B=keys)
    assert list(prompt_parts(rows, None, 3)) == [([0, 0], [3, 2]), ([3, 1], [2, 1])]
    assert list(prompt_parts(rows, [4, 2], None)) == [([4, 1], [1, 1])]
    assert list(prompt_parts(rows, None, 3, [[(2, 4)], []])) == [
        ([0, 0], [2, 2]),
        ([2, 1], [3, 1]),
    ]
