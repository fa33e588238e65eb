"""Caches cross over in both directions: the next turn is that of `generate`, whoever made them."""

import pytest
import torch
from tiny import VOCAB, tiny_model
from transformers import DynamicCache, QuantizedCache, StaticCache

import mmspec

PAD = VOCAB - 1
NUM_NEW = 24
IDS = torch.tensor(
    [
        [PAD, PAD, PAD, 9, 8, 9, 8, 9],
        [1, 2, 3, 4, 1, 2, 3, 4],
        [PAD, PAD, PAD, PAD, PAD, PAD, PAD, 3],
    ]
)
BATCH = {"input_ids": IDS, "attention_mask": (IDS != PAD).long()}
SINGLE = {"input_ids": IDS[1:2], "attention_mask": torch.ones(1, 8, dtype=torch.long)}


@pytest.fixture(scope="module")
def model():
    model = tiny_model(num_hidden_layers=3, pad_token_id=PAD)
    model.generation_config.pad_token_id = PAD
    return model


@pytest.fixture(scope="module")
def sliding():
    return tiny_model("Mistral", sliding_window=5, pad_token_id=PAD)


def fixed(spec):
    return mmspec.speculate(spec, width=8, schedule="fixed")


def greedy(model, inputs, custom_generate=None, **options):
    return model.generate(
        **inputs,
        **({"max_new_tokens": NUM_NEW, "do_sample": False} | options),
        custom_generate=custom_generate,
    )


def turn(model, ids, mask, past, custom_generate=None, **options):
    inputs = {"input_ids": ids, "attention_mask": mask, "past_key_values": past}
    return greedy(model, inputs, custom_generate, return_dict_in_generate=True, **options)


@pytest.mark.parametrize("kind", ["model", "sliding"])
@pytest.mark.parametrize("inputs", [BATCH, SINGLE], ids=["batch", "single"])
def test_a_reused_cache_gives_the_next_turn(request, kind, inputs):
    """Three turns; each cache comes from us and serves `generate` and us alike."""
    model = request.getfixturevalue(kind)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for spec in ("ngram", {"name": "ngram", "branching": 3}, "early_exit"):
        past, history = DynamicCache(config=model.config), (ids, mask)
        for question in ([5, 6], [7], [8, 9, 10]):
            expected = greedy(model, {"input_ids": history[0], "attention_mask": history[1]})
            out = turn(model, *history, past, fixed(spec))
            assert torch.equal(out.sequences, expected)
            assert out.past_key_values is past
            assert past.get_seq_length() == expected.shape[1] - 1
            more = torch.tensor(question).expand(len(ids), -1)
            sequences = torch.cat([expected, more], dim=1)
            added = sequences.shape[1] - history[1].shape[1]
            history = (sequences, torch.nn.functional.pad(history[1], (0, added), value=1))
        # transformers' own loop continues from our cache.
        expected = greedy(model, {"input_ids": history[0], "attention_mask": history[1]})
        assert torch.equal(turn(model, *history, past).sequences, expected)


@pytest.mark.parametrize("kind", ["model", "sliding"])
def test_a_cache_made_by_generate_is_taken_over(request, kind):
    model = request.getfixturevalue(kind)
    first = turn(model, **{"ids": IDS, "mask": BATCH["attention_mask"], "past": None})
    ids = torch.nn.functional.pad(first.sequences, (0, 2), value=5)
    mask = torch.nn.functional.pad(BATCH["attention_mask"], (0, NUM_NEW + 2), value=1)
    expected = greedy(model, {"input_ids": ids, "attention_mask": mask})
    for spec in ("jacobi", {"name": "ngram", "branching": 3}, "early_exit"):
        past = turn(model, IDS, BATCH["attention_mask"], None).past_key_values
        assert torch.equal(turn(model, ids, mask, past, fixed(spec)).sequences, expected)


def test_the_exported_keys_are_those_of_generate(model):
    mask = BATCH["attention_mask"]
    expected = turn(model, IDS, mask, None).past_key_values
    ours = turn(model, IDS, mask, None, fixed({"name": "ngram", "branching": 3})).past_key_values
    is_token = torch.nn.functional.pad(mask, (0, NUM_NEW - 1), value=1).bool()
    for layer, reference in zip(ours.layers, expected.layers, strict=True):
        for name in ("keys", "values"):
            states, wanted = getattr(layer, name), getattr(reference, name)
            assert states.shape == wanted.shape
            kept = is_token[:, None, :, None].expand_as(states)
            torch.testing.assert_close(states[kept], wanted[kept])


def test_the_end_of_a_row_is_cached(model):
    """A row that ends early hands back the key of its last token too, whenever it ended."""
    for step in (2, 5, 7, 8):
        end = int(greedy(model, BATCH)[1, 8 + step])
        out = turn(model, **{"ids": IDS, "mask": BATCH["attention_mask"], "past": None},
                   custom_generate=fixed(model), eos_token_id=end)  # fmt: skip
        sequences = torch.nn.functional.pad(out.sequences, (0, 2), value=5)
        # Padding behind a row's end is left out, as the next turn of a batch has to.
        is_end = (sequences == end).long()
        is_end[:, :8] = 0
        behind = is_end.cumsum(1) - is_end > 0
        mask = (~behind).long() * torch.nn.functional.pad(
            BATCH["attention_mask"], (0, sequences.shape[1] - 8), value=1
        )
        mask[:, -2:] = 1
        inputs = {"input_ids": sequences, "attention_mask": mask}
        again = turn(model, sequences, mask, out.past_key_values, fixed("ngram"))
        assert torch.equal(again.sequences, greedy(model, inputs)), step


def test_a_static_cache_of_generate_is_not_handed_back(model):
    out = greedy(
        model,
        SINGLE,
        fixed("ngram"),
        return_dict_in_generate=True,
        cache_implementation="static",
    )
    assert type(out.past_key_values) is DynamicCache
    assert out.past_key_values.get_seq_length() == 8 + NUM_NEW - 1


def test_caches_that_cannot_be_taken_over_are_refused(model):
    static = StaticCache(config=model.config, max_cache_len=64)
    with pytest.raises(ValueError, match="got StaticCache"):
        turn(model, *SINGLE.values(), static, fixed("ngram"))
    offloaded = DynamicCache(config=model.config)
    offloaded.offloading = True
    with pytest.raises(ValueError, match="got an offloaded cache"):
        turn(model, *SINGLE.values(), offloaded, fixed("ngram"))
    quantized = object.__new__(QuantizedCache)
    quantized.layers, quantized.offloading = [], False
    with pytest.raises(ValueError, match="got QuantizedCache"):
        turn(model, *SINGLE.values(), quantized, fixed("ngram"))
    full = turn(model, *SINGLE.values(), None).past_key_values
    with pytest.raises(ValueError, match="holds 31 columns and input_ids only 8"):
        turn(model, *SINGLE.values(), full, fixed("ngram"))
    mask = torch.ones(1, 33, dtype=torch.long)
    with pytest.raises(ValueError, match="pass the whole input_ids"):
        turn(model, IDS[1:2, :2], mask, full, fixed("ngram"))
