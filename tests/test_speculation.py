"""Inside `generate`: the same tokens, cut in the same place, and the same things handed back."""

import copy
import itertools
import threading

import pytest
import torch
from tiny import VOCAB, tiny_model
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    MaxTimeCriteria,
    QuantizedCache,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
)
from transformers.generation.streamers import BaseStreamer

import mmspec
from mmspec.adapters.lockstep import sort_criteria

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


def specs(model):
    return ["jacobi", "ngram", {"name": "ngram", "branching": 3}, "early_exit", model]


def fixed(spec, width=8, **options):
    return mmspec.speculate(spec, width=width, schedule="fixed", **options)


def greedy(model, inputs, custom_generate=None, **options):
    return model.generate(
        **inputs,
        **({"max_new_tokens": NUM_NEW, "do_sample": False} | options),
        custom_generate=custom_generate,
    )


def common_token(model, step):
    """A token that row 1 emits at a step, to serve as an end."""
    return int(greedy(model, BATCH)[1, 8 + step])


class Parity(StoppingCriteria):
    """Ends a row on a token; looks at nothing but the row."""

    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] == self.token


class WholeBatch(StoppingCriteria):
    """Ends everything, judged by two rows at once, and returns a plain bool."""

    def __call__(self, input_ids, scores, **kwargs):
        return bool(input_ids.shape[1] > 12 and input_ids[0, -1] != input_ids[1, -2])


GREEDY_OPTIONS = {
    "plain": {},
    "repetition": {"repetition_penalty": 1.4},
    "ngrams": {"no_repeat_ngram_size": 2},
    "bad words": {"bad_words_ids": [[7], [8, 9], [3, 4]]},
    "min length": {"min_length": 20, "eos_token_id": list(range(0, 30))},
    "min new": {"min_new_tokens": 10, "eos_token_id": list(range(0, 30))},
    "ends": {"eos_token_id": list(range(0, 60, 5))},
    "no early end": {"eos_token_id": 59},
    "max length": {"max_new_tokens": None, "max_length": 15},
    "one token": {"max_new_tokens": 1},
    "forced end": {"forced_eos_token_id": 5},
    "decay": {"exponential_decay_length_penalty": (3, 1.6), "eos_token_id": [5, 6]},
    "suppress": {"suppress_tokens": [3, 6], "begin_suppress_tokens": [8, 9, 10]},
    "encoder": {"encoder_repetition_penalty": 1.3, "encoder_no_repeat_ngram_size": 3},
    "bias": {"sequence_bias": [[[7, 3], 4.0], [[5], 2.0]]},
    "renormalise": {"renormalize_logits": True, "remove_invalid_values": True},
    "constraint": {
        "prefix_allowed_tokens_fn": lambda b, i: [(int(i[-1]) * 3 + b) % 40, int(i[-1]) % 7, 4]
    },
    "static": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("case", GREEDY_OPTIONS)
def test_greedy_equals_generate(model, case):
    options = GREEDY_OPTIONS[case]
    for inputs in (BATCH, SINGLE):
        expected = greedy(model, inputs, **options)
        for spec in specs(model):
            out = greedy(model, inputs, fixed(spec), **options)
            assert torch.equal(out, expected), spec


@pytest.mark.parametrize("schedule", ["fixed", "adaptive"])
@pytest.mark.parametrize("width", [1, 2, 3, 8, 64])
def test_no_width_changes_the_tokens(model, width, schedule):
    expected = greedy(model, BATCH)
    for spec in ("ngram", "early_exit"):
        fast = mmspec.speculate(spec, width=width, schedule=schedule)
        assert torch.equal(greedy(model, BATCH, fast), expected)


def test_a_perfect_drafter_is_fast(model):
    fast = fixed(model)
    greedy(model, BATCH, fast)
    assert fast.stats.num_target_forwards == NUM_NEW // 8
    assert len(fast.row_stats) == 3


def test_rows_end_on_their_own(model):
    """An end in the middle of a draft, at another step in every row; the rest is padding."""
    end = [common_token(model, 6), int(greedy(model, BATCH)[0, 8 + 11])]
    expected = greedy(model, BATCH, eos_token_id=end)
    lengths = (expected[:, 8:] != PAD).sum(1)
    assert lengths.unique().numel() > 1
    assert lengths.min() < NUM_NEW
    for spec in specs(model):
        assert torch.equal(greedy(model, BATCH, fixed(spec), eos_token_id=end), expected)


@pytest.mark.parametrize("with_eos", [False, True])
def test_custom_criteria_cut_where_generate_cuts(model, with_eos):
    """Without any end of sequence, ended rows go on until all have ended; with one, they pad."""
    eos = {"eos_token_id": 59} if with_eos else {}
    rules = ([Parity(common_token(model, 5))], [WholeBatch()], [Parity(1), WholeBatch()])
    for rule, inputs in itertools.product(rules, (BATCH, SINGLE)):
        if WholeBatch in map(type, rule) and inputs is SINGLE:
            continue
        criteria = {"stopping_criteria": StoppingCriteriaList(rule)}
        expected = greedy(model, inputs, **criteria, **eos)
        for spec in specs(model):
            out = greedy(model, inputs, fixed(spec), **criteria, **eos)
            assert torch.equal(out, expected), (spec, rule)
    expected = greedy(model, SINGLE, stopping_criteria=StoppingCriteriaList(rules[0]))
    assert expected.shape[1] < 8 + NUM_NEW


def test_a_row_that_a_criterion_ended_stops_drafting(model):
    criteria = StoppingCriteriaList([Parity(common_token(model, 2))])
    fast = fixed(model)
    out = greedy(model, BATCH, fast, stopping_criteria=criteria, eos_token_id=59)
    assert (out[1, 8:] != PAD).sum() == 3
    assert fast.row_stats[1].num_target_forwards <= 2


def test_max_time_keeps_a_beginning(model):
    expected = greedy(model, BATCH)
    criteria = StoppingCriteriaList([MaxTimeCriteria(max_time=1e-9)])
    for spec in ("ngram", model):
        out = greedy(model, BATCH, fixed(spec), stopping_criteria=criteria)
        assert 8 < out.shape[1] < 8 + NUM_NEW
        assert torch.equal(out, expected[:, : out.shape[1]])


def test_a_limit_is_needed():
    with pytest.raises(ValueError, match="a limit is needed: pass max_new_tokens"):
        sort_criteria([])


# --------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_k": 9, "top_p": 0.9}])
@pytest.mark.parametrize("copies", [1, 3])
def test_sampling_depends_on_the_seed_alone(model, options, copies):
    def sampled(spec, width, schedule="fixed", seed=3):
        generator = torch.Generator().manual_seed(seed)
        fast = mmspec.speculate(spec, width=width, schedule=schedule, generator=generator)
        return greedy(model, BATCH, fast, do_sample=True, num_return_sequences=copies, **options)

    expected = sampled("none", 1)
    assert expected.shape == (3 * copies, 8 + NUM_NEW)
    if copies > 1:
        assert not torch.equal(expected[0], expected[1]), "copies must have noise of their own"
    assert not torch.equal(sampled("none", 1, seed=4), expected)
    for spec, width in itertools.product(specs(model), (2, 8)):
        assert torch.equal(sampled(spec, width), expected), (spec, width)
    assert torch.equal(sampled("ngram", 16, "adaptive"), expected)


def test_a_row_of_a_batch_equals_its_own_run(model):
    def sampled(inputs, seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return greedy(model, inputs, fixed("ngram", generator=generators), do_sample=True)

    whole = sampled(BATCH, [5, 6, 7])
    alone = {name: value[:1, 3:] for name, value in BATCH.items()}
    assert torch.equal(sampled(SINGLE, [6])[0], whole[1])
    assert torch.equal(sampled(alone, [5])[0], whole[0, 3:])


def test_the_global_seed_counts_without_a_generator(model):
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(greedy(model, SINGLE, fixed("ngram"), do_sample=True))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("rule", ["speculative", "block"])
def test_other_rules_run_and_name_their_guarantee(model, rule):
    fast = fixed("early_exit", rule=rule, generator=torch.Generator().manual_seed(0))
    out = greedy(model, BATCH, fast, do_sample=True)
    assert out.shape == (3, 8 + NUM_NEW)
    assert fast.stats.guarantee == "distribution"


# --------------------------------------------------------------------------- streamers


class Recorder(BaseStreamer):
    def __init__(self):
        self.values = []

    def put(self, value):
        self.values.append(value.tolist())

    def end(self):
        self.values.append("end")


class Letters:
    """The least tokenizer that a text streamer takes."""

    def decode(self, ids, **kwargs):
        ids = ids if isinstance(ids, list) else [ids]
        return "".join(chr(ord("0") + int(token)) for token in ids)


@pytest.mark.parametrize("inputs", [BATCH, SINGLE], ids=["batch", "single"])
def test_a_streamer_sees_what_generate_shows_it(model, inputs):
    end = [common_token(model, 6), 59]
    greedy(model, inputs, streamer=(expected := Recorder()), eos_token_id=end)
    for spec in specs(model):
        greedy(model, inputs, fixed(spec), streamer=(shown := Recorder()), eos_token_id=end)
        assert shown.values == expected.values


def test_text_streamers(model, capsys):
    greedy(model, SINGLE, streamer=TextStreamer(Letters(), skip_prompt=True))
    expected = capsys.readouterr().out
    greedy(model, SINGLE, fixed("ngram"), streamer=TextStreamer(Letters(), skip_prompt=True))
    assert capsys.readouterr().out == expected
    with pytest.raises(ValueError, match="batch size 1"):
        greedy(model, BATCH, fixed("ngram"), streamer=TextStreamer(Letters()))


def test_an_iterator_streamer_ends(model):
    streamer = TextIteratorStreamer(Letters(), skip_prompt=True, timeout=60)
    worker = threading.Thread(target=greedy, args=(model, SINGLE, fixed("ngram")),
                              kwargs={"streamer": streamer})  # fmt: skip
    worker.start()
    text = "".join(streamer)
    worker.join()
    assert text == Letters().decode(greedy(model, SINGLE)[0, 8:].tolist())


# --------------------------------------------------------------------------- caches


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
    for step in range(2, 12):
        end = common_token(model, step)
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


# --------------------------------------------------------------------------- refusals


class Unknown(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores


REFUSED = {
    "beams": ({"num_beams": 2}, "generation mode 'beam_search'"),
    "lookup": ({"prompt_lookup_num_tokens": 3}, "'assisted_generation'.*lookup_num_tokens=3"),
    "guidance": ({"guidance_scale": 2.0}, "UnbatchedClassifierFreeGuidanceLogitsProcessor"),
    "processor": ({"logits_processor": LogitsProcessorList([Unknown()])}, "Unknown is unknown"),
    "scores": ({"return_dict_in_generate": True, "output_scores": True}, "output_scores"),
    "logits": ({"return_dict_in_generate": True, "output_logits": True}, "output_logits"),
    "hidden": (
        {"return_dict_in_generate": True, "output_hidden_states": True},
        "output_hidden_states",
    ),
    "context": ({"max_new_tokens": 500}, "has a context of 256"),
    "positions": ({"position_ids": torch.arange(8)[None] + 1}, "position_ids must count"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_honoured_is_named_before_any_forward(model, case):
    options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message), forbidden_forward(model):
        greedy(model, SINGLE, fixed("ngram"), **options)


class forbidden_forward:
    """Fails if the model runs."""

    def __init__(self, model):
        self.model = model

    def __enter__(self):
        def fail(*args):
            raise AssertionError("the model ran")

        self.handle = self.model.register_forward_pre_hook(fail)

    def __exit__(self, *error):
        self.handle.remove()


@pytest.mark.parametrize("kind", ["quantized", "offloaded"])
def test_caches_that_save_memory_are_refused(model, kind):
    """Called directly: `generate` wants a GPU or more packages before it comes to us."""
    config = copy.deepcopy(model.generation_config)
    config.cache_implementation, config.num_beams = kind, 1
    with pytest.raises(ValueError, match=f"cache_implementation='{kind}'"):
        fixed("ngram")(model, IDS, [], [], config)


def test_an_assistant_is_refused(model, sliding):
    with pytest.raises(ValueError, match="assistant_model=MistralForCausalLM"):
        greedy(model, SINGLE, fixed("ngram"), assistant_model=sliding)


def test_right_padding_is_refused(model):
    inputs = {"input_ids": SINGLE["input_ids"], "attention_mask": torch.tensor([[1] * 7 + [0]])}
    with pytest.raises(ValueError, match="padded on the left"):
        greedy(model, inputs, fixed("ngram"))


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drafter": "nonsense"}, "unknown drafter 'nonsense'; known: .*ngram"),
        ({"drafter": 3}, "drafter must be a name"),
        ({"rule": "nonsense"}, "unknown rule 'nonsense'; known: block, .*speculative"),
        ({"drafter": "jacobi", "rule": "block"}, "rule 'block' works with .*; got 'jacobi'"),
        ({"drafter": "ngram", "rule": "coupled"}, "works with the drafters jacobi; got 'ngram'"),
        ({"drafter": {"name": "ngram", "branching": 2}, "rule": "block"}, "got branching=2"),
        ({"width": 0}, "width must be None or between 1 and 128, got 0"),
        ({"width": 129}, "width must be None or between 1 and 128, got 129"),
        ({"width": True}, "width must be None or between 1 and 128, got True"),
        ({"schedule": "nonsense"}, "unknown schedule 'nonsense'; known: adaptive, fixed"),
    ],
)
def test_bad_settings_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        mmspec.speculate(**options)


def test_the_package_names():
    assert {"speculate", "Speculation", "__version__"} <= set(dir(mmspec))
    assert mmspec.__version__
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        mmspec.nonsense  # noqa: B018
