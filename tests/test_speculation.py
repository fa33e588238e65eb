"""Inside `generate`: the same tokens, cut in the same place, and the same things handed back."""

import copy
import itertools
import threading

import pytest
import torch
from tiny import VOCAB, tiny_model
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
)
from transformers.generation.streamers import BaseStreamer

import mmspec
from mmspec.adapters.lockstep import sort_criteria
from mmspec.noise import gumbel, row_keys

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
    # The prefill gives one token, every step after it 8.
    assert fast.stats.num_target_forwards == 1 + -(-(NUM_NEW - 1) // 8)
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
    # The prefill gives one token, one step more than it may have, and the next finds it ended.
    assert fast.row_stats[1].num_target_forwards <= 3 < fast.stats.num_target_forwards


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


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.8, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.2},
        {"typical_p": 0.9, "no_repeat_ngram_size": 3, "min_new_tokens": 9, "eos_token_id": 59},
        {"min_p": 0.02, "epsilon_cutoff": 0.01, "eta_cutoff": 0.01, "bad_words_ids": [[1, 2]]},
    ],
)
def test_each_token_is_drawn_from_the_law_of_generate(model, options):
    """Redo every choice: `generate`'s own processors on whole forwards, then our noise."""
    prepared = {}

    def capture(model, input_ids, logits_processor, **kwargs):
        prepared["processors"] = logits_processor
        return input_ids

    options = {"do_sample": True} | options
    greedy(model, BATCH, capture, **options)
    fast = fixed("early_exit", generator=torch.Generator().manual_seed(3))
    out = greedy(model, BATCH, fast, **options)
    keys = row_keys(torch.Generator().manual_seed(3), 3)
    is_over = torch.zeros(3, dtype=torch.bool)
    for width in range(8, out.shape[1]):
        ids = out[:, :width]
        mask = torch.nn.functional.pad(BATCH["attention_mask"], (0, width - 8), value=1)
        positions = mask.cumsum(1)
        with torch.no_grad():
            logits = model(ids, attention_mask=mask, position_ids=(positions - 1).clamp(min=0))
        scores = prepared["processors"](ids, logits.logits[:, -1])
        noise = gumbel(keys, positions[:, -1:], VOCAB)[:, 0]
        choice = (scores + noise).argmax(-1)
        assert torch.equal(out[~is_over, width], choice[~is_over]), width
        is_over |= out[:, width] == options.get("eos_token_id")


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


# --------------------------------------------------------------------------- refusals


class Unknown(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores


REFUSED = {
    "beams": ({"num_beams": 2}, "generation mode 'beam_search'"),
    "lookup": ({"prompt_lookup_num_tokens": 3}, "'assisted_generation'.*lookup_num_tokens=3"),
    "guidance": (
        {"guidance_scale": 2.0, "negative_prompt_ids": torch.ones(3, 2, dtype=torch.long)},
        "negative_prompt_ids must hold one row per sequence",
    ),
    "processor": ({"logits_processor": LogitsProcessorList([Unknown()])}, "Unknown is unknown"),
    "scores": ({"return_dict_in_generate": True, "output_scores": True}, "output_scores"),
    "logits": ({"return_dict_in_generate": True, "output_logits": True}, "output_logits"),
    "hidden": (
        {"return_dict_in_generate": True, "output_hidden_states": True},
        "output_hidden_states",
    ),
    "context": ({"max_new_tokens": 500}, "has a context of 256"),
    "chunks": (
        {"prefill_chunk_size": 0},
        "prefill_chunk_size must be None or an integer >= 1, got 0",
    ),
    "guided chunks": (
        {"prefill_chunk_size": 4, "guidance_scale": 2.0},
        "prefill_chunk_size=4 cannot be combined with guidance_scale",
    ),
    "embeds": ({"token_type_ids": torch.zeros(1, 8)}, "token_type_ids"),
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drafter": "nonsense"}, "unknown drafter 'nonsense'; known: .*ngram"),
        ({"drafter": 3}, "drafter must be a name"),
        ({"rule": "nonsense"}, "unknown rule 'nonsense'; known: block, .*speculative"),
        ({"rule": ["exact"]}, r"unknown rule \['exact'\]; known: block"),
        ({"schedule": 5}, "unknown schedule 5; known: adaptive, fixed"),
        ({"width": "8"}, "width must be None or between 1 and 128, got '8'"),
        ({"compile": "yes"}, "compile must be True or False, got 'yes'"),
        ({"generator": 5}, "generator must be None, a torch.Generator or a list .*, got 5"),
        ({"stateless_processors": 5}, "stateless_processors must be a list of .*, got 5"),
        ({"stateless_processors": "ab"}, "stateless_processors must be a list of .*, got 'ab'"),
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
