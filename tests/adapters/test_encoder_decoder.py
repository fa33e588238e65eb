"""Encoder-decoders: the tokens of `generate`, whatever the encoder reads and whoever drafts."""

import copy
import functools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from encoder_decoders import (
    BOS,
    EOS,
    NUM_NEW,
    PAD,
    START,
    SUPPORTED,
    TEXT,
    TEXTS,
    VOCAB,
    clone_of,
    decoded,
    fixed,
    made,
    request,
    tiny_encoder_decoder,
)
from tiny import tiny_model
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import StoppingCriteria, StoppingCriteriaList

import mmspec
from mmspec import forward
from mmspec.adapters import encoder_decoder
from mmspec.adapters.encoder_decoder import decoder_of, prepare_by_item
from mmspec.adapters.image_features import FeatureCache
from mmspec.adapters.vision_language import prepare
from mmspec.drafters.suffix import SuffixAutomaton
from mmspec.drafters.trie import NgramTrie
from mmspec.forward import check_supported

#: Family -> where its text is: in the encoder, in the decoder, or in both.
FAMILIES = {
    "bart": "both",
    "donut": "decoder",
    "florence2": "both",
    "mbart": "both",
    "nougat": "decoder",
    "vit": "decoder",
}
DRAFTERS = ["ngram", "jacobi", {"name": "early_exit", "num_layers": 1}]


@pytest.fixture(scope="module", params=FAMILIES)
def named(request):
    return request.param, made(request.param)


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def uneven_ends(sequences):
    """Tokens as ends of sequence by which rows end in different steps."""
    rows = sequences[:, 1:].tolist()
    by_token = {token: [row.index(token) for row in rows if token in row] for token in range(VOCAB)}
    spread = {t: len(set(at)) + len(at) + (min(at) > 1) for t, at in by_token.items() if at}
    return max(spread, key=spread.get)


@pytest.mark.supports("greedy", SUPPORTED)
@pytest.mark.supports("batches", SUPPORTED)
@pytest.mark.parametrize("num_rows", [1, 3])
def test_greedy_equals_generate(named, num_rows):
    name, model = named
    inputs = request(name, TEXTS[:num_rows])
    expected = decoded(model, inputs)
    assert len({tuple(row) for row in expected.tolist()}) > 1 or num_rows == 1
    num_accepted = 0
    for drafter in ["none", *DRAFTERS, clone_of(model)]:
        fast = fixed(drafter)
        assert torch.equal(decoded(model, inputs, fast), expected), drafter
        num_accepted += fast.stats.num_accepted * (drafter in DRAFTERS)
    assert num_accepted > 0
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].flip(-1)
        assert not torch.equal(decoded(model, inputs), expected), "the picture must matter"


@pytest.mark.parametrize("name", ["donut", "florence2"])
def test_rows_end_at_different_times_and_are_not_fed_any_longer(name):
    model = made(name)
    inputs = request(name, TEXTS)
    end = uneven_ends(decoded(model, inputs))
    expected = decoded(model, inputs, eos_token_id=end)
    ends = (expected == PAD).sum(1)
    assert len(set(ends.tolist())) > 1, "rows must end unevenly"
    for drafter in ["none", *DRAFTERS, clone_of(model), tiny_encoder_decoder(name, seed=3)]:
        fed = []
        hook = (
            decoder_of(model)
            .decoder.layers[-1]
            .fc2.register_forward_hook(lambda _, args, out, fed=fed: fed.append(len(out)))
        )
        out = decoded(model, inputs, fixed(drafter), eos_token_id=end)
        hook.remove()
        assert torch.equal(out, expected), drafter
        assert fed[0] == 3
        assert fed[-1] < 3
        assert fed == sorted(fed, reverse=True)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_both_kinds_of_attention(attention):
    model = tiny_encoder_decoder("florence2", attention=attention)
    inputs = request("florence2", TEXTS)
    expected = decoded(model, inputs)
    assert torch.equal(decoded(model, inputs, fixed("ngram")), expected)


@pytest.mark.supports("sampled", SUPPORTED)
@pytest.mark.parametrize("name", ["bart", "donut", "florence2", "nougat"])
def test_a_seed_gives_the_same_tokens_with_every_drafter_and_in_every_batch(name):
    model = made(name)
    inputs = request(name, TEXTS)

    def sampled(inputs, seeds, drafter):
        fast = fixed(drafter, generator=seeded(*seeds))
        return decoded(model, inputs, fast, do_sample=True, top_p=0.9, temperature=2.0)

    expected = sampled(inputs, [4, 5, 6], "none")
    for drafter in [*DRAFTERS, clone_of(model)]:
        assert torch.equal(sampled(inputs, [4, 5, 6], drafter), expected), drafter
    for row, seed in enumerate([4, 5]):
        alone = {key: value[row : row + 1] for key, value in inputs.items()}
        if "attention_mask" in alone:
            kept = int(alone["attention_mask"].sum())
            alone["input_ids"] = alone["input_ids"][:, :kept]
            del alone["attention_mask"]
        assert torch.equal(sampled(alone, [seed], "jacobi"), expected[row : row + 1])


@pytest.mark.parametrize("name", ["donut", "florence2"])
@pytest.mark.parametrize("drafter", ["ngram", "clone"])
def test_returned_sequences_share_what_the_encoder_says(name, drafter):
    model = made(name)
    drafter = clone_of(model) if drafter == "clone" else drafter
    fast = fixed(drafter, generator=seeded(4, 4, 5, 5))
    options = {"do_sample": True, "num_return_sequences": 2, "temperature": 2.0}
    out = decoded(model, request(name, TEXTS[:2]), fast, **options)
    assert torch.equal(out[0], out[1])
    assert torch.equal(out[2], out[3])
    options |= {"num_return_sequences": 1}
    once = decoded(
        model, request(name, TEXTS[:2]), fixed("none", generator=seeded(4, 5)), **options
    )
    assert torch.equal(out[::2], once)
    if drafter != "ngram":
        assert fast.stats.num_target_forwards == 1 + -(-NUM_NEW // 6)


# --------------------------------------------------------------------------- prompts


@pytest.mark.parametrize("name", ["donut", "vit", "florence2"])
@pytest.mark.parametrize(
    "prompts",
    [
        [[START, 7, 8], [START, 9, 7], [START, 8, 8]],
        [[7, 8, 9], [9, 7, 7], [8, 8, 8]],
        [[PAD, PAD, START, 7], [START, 7, 8, 9], [PAD, START, 9, 9]],
    ],
    ids=["with start", "without start", "padded"],
)
def test_decoder_prompts(name, prompts):
    """`generate` counts padding as positions, and puts a start token before it as well."""
    model = made(name)
    inputs = request(name, TEXTS)
    inputs["decoder_input_ids"] = torch.tensor(prompts)
    inputs["decoder_attention_mask"] = (inputs["decoder_input_ids"] != PAD).long()
    expected = decoded(model, inputs)
    for drafter in ["jacobi", clone_of(model)]:
        fast = fixed(drafter)
        assert torch.equal(decoded(model, inputs, fast), expected), drafter
    assert fast.stats.num_target_forwards == 1 + -(-NUM_NEW // 6)


def test_ngrams_of_the_text_that_the_encoder_reads():
    model = made("florence2")
    memory = NgramTrie(max_match=8, max_draft=16)
    fast = fixed({"name": "ngram", "memory": memory})
    decoded(model, request("florence2", [[31, 32, 33, 34]]), fast)
    stream = memory.open_stream()
    memory.extend(stream, [31, 32])
    assert memory.draft(stream, 2).tokens == [33, 34]
    stream = memory.open_stream()
    memory.extend(stream, [50])
    assert memory.draft(stream, 2).tokens == []


@pytest.mark.parametrize(
    "options",
    [
        {"no_repeat_ngram_size": 3},
        {"forced_bos_token_id": BOS, "forced_eos_token_id": EOS},
        {"min_length": 12, "eos_token_id": list(range(40))},
        {"min_new_tokens": 5, "eos_token_id": list(range(40))},
        {"repetition_penalty": 1.5},
        {"encoder_repetition_penalty": 1.5, "encoder_no_repeat_ngram_size": 2},
        {"begin_suppress_tokens": [13, 36], "suppress_tokens": [47]},
        {"bad_words_ids": [[13, 47], [36]]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_processors_count_the_tokens_of_the_decoder(options):
    model = made("florence2")
    inputs = request("florence2", TEXTS)
    expected = decoded(model, inputs, **options)
    assert not torch.equal(expected, decoded(model, inputs))
    for drafter in ["jacobi", clone_of(model)]:
        assert torch.equal(decoded(model, inputs, fixed(drafter), **options), expected), drafter


# --------------------------------------------------------------------------- what runs how often


def test_the_encoder_runs_once_and_its_keys_are_made_once(named):
    name, model = named
    calls = {}

    def counted(module, args, out, key):
        calls[key] = calls.get(key, 0) + 1

    hooks = [
        part.register_forward_hook(functools.partial(counted, key=key))
        for key, part in model.named_modules()
        if key.endswith(("encoder_attn.k_proj", "encoder_attn.q_proj", "encoder", "vision_tower"))
    ]
    fast = fixed({"name": "early_exit", "num_layers": 1})
    decoded(model, request(name, TEXTS), fast)
    for hook in hooks:
        hook.remove()
    keys = [count for key, count in calls.items() if key.endswith("k_proj")]
    assert keys == [1] * TEXT["decoder_layers"]
    assert {count for key, count in calls.items() if not key.endswith("_proj")} == {1}
    assert max(count for key, count in calls.items() if key.endswith("q_proj")) > 10


@pytest.mark.supports("model drafter", SUPPORTED)
def test_a_clone_is_accepted_wholly_and_runs_its_encoder_once(named):
    name, model = named
    drafter = clone_of(model)
    seen = []
    encoder = drafter["model"].get_encoder()
    encoder.register_forward_hook(lambda *_: seen.append(1))
    fast = fixed(drafter)
    decoded(model, request(name, TEXTS), fast)
    assert fast.stats.num_target_forwards == 1 + -(-NUM_NEW // 6)
    assert len(seen) == 1


def test_a_drafter_whose_picture_is_another_is_not_believed(monkeypatch):
    """The clone is accepted because of what its encoder sees."""
    model = made("donut")
    real = encoder_decoder.prepare

    def flipped(model, given):
        return real(model, {"pixel_values": given["pixel_values"].flip(-1)})

    inputs = request("donut", TEXTS)
    expected = decoded(model, inputs)
    monkeypatch.setattr(encoder_decoder, "prepare", flipped)
    fast = fixed(clone_of(model))
    assert torch.equal(decoded(model, inputs, fast), expected)
    assert fast.stats.num_target_forwards > 2 + -(-NUM_NEW // 6)


@pytest.mark.parametrize("drafter", ["none", "jacobi", "early_exit", "model"])
def test_a_step_reads_the_device_once(drafter, monkeypatch):
    model, small = made("florence2"), tiny_encoder_decoder("florence2", seed=3)
    reads, steps = [], []
    real = {name: getattr(torch.Tensor, name) for name in READS}
    step = mmspec.engine.Engine.step

    def counting(name):
        def read(self, *args, **kwargs):
            reads.append(name)
            return real[name](self, *args, **kwargs)

        return read

    def counted(engine):
        reads.clear()
        with monkeypatch.context() as patch:
            for name in READS:
                patch.setattr(torch.Tensor, name, counting(name))
            done = step(engine)
        steps.append(list(reads))
        return done

    monkeypatch.setattr(mmspec.engine.Engine, "step", counted)
    spec = small if drafter == "model" else drafter
    decoded(model, request("florence2", TEXTS), fixed(spec), eos_token_id=47)
    assert len(steps) > 2
    assert all(read == ["tolist"] for read in steps)


READS = ["tolist", "item", "__bool__", "__int__", "__float__", "__index__", "numpy", "cpu"]


def test_a_compiled_decoder_is_one_graph_for_every_request(monkeypatch):
    torch._dynamo.reset()
    name, model = "florence2", tiny_encoder_decoder("florence2", decoder_layers=1)
    counter = CompileCounterWithBackend("eager")

    def counted(module):
        if "_compiled_here" not in module.__dict__:
            module.__dict__["_compiled_here"] = torch.compile(
                module.forward, dynamic=False, fullgraph=True, backend=counter
            )
        return module.__dict__["_compiled_here"]

    monkeypatch.setattr(forward, "compiled_forward", counted)
    counts = []
    for _ in range(2):
        expected = decoded(model, request(name, TEXTS))
        out = decoded(model, request(name, TEXTS), fixed("jacobi", width=4, compile=True))
        assert torch.equal(out, expected)
        counts.append(counter.frame_count)
    assert counts[0] == counts[1]
    assert 1 <= counts[0] <= 3
    torch._dynamo.reset()


class Breaks(StoppingCriteria):
    """Raises in the middle of a request."""

    def __call__(self, input_ids, scores, **kwargs):
        if input_ids.shape[1] > 5:
            raise RuntimeError("broken off")
        return torch.zeros(len(input_ids), dtype=torch.bool)


def test_the_model_is_left_as_it_was(named):
    name, model = named
    modules, config = dict(model.named_modules()), model.config.to_json_string()
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    own = {key: set(module.__dict__) for key, module in modules.items()}
    fast = fixed({"name": "early_exit", "num_layers": 1})
    decoded(model, request(name, TEXTS), fast)
    criteria = StoppingCriteriaList([Breaks()])
    with pytest.raises(RuntimeError, match="broken off"):
        decoded(model, request(name, TEXTS), fast, stopping_criteria=criteria)
    assert dict(model.named_modules()) == modules
    assert model.config.to_json_string() == config
    assert {key: set(module.__dict__) for key, module in modules.items()} == own
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_requests_of_several_threads_do_not_meet():
    model = made("florence2")
    inputs = [request("florence2", [text]) for text in TEXTS] * 2
    expected = [decoded(model, one) for one in inputs]
    with ThreadPoolExecutor(3) as pool:
        outputs = list(pool.map(lambda one: decoded(model, one, fixed("jacobi")), inputs))
    assert all(map(torch.equal, outputs, expected))


def test_a_view_follows_the_model():
    model = tiny_encoder_decoder("bart")
    view = decoder_of(model)
    assert decoder_of(model) is view
    model.lm_head = copy.deepcopy(model.lm_head)
    torch.nn.init.normal_(model.lm_head.weight)
    assert decoder_of(model) is not view
    inputs = request("bart", TEXTS)
    assert torch.equal(decoded(model, inputs, fixed("jacobi")), decoded(model, inputs))
    model.model.decoder.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="does not take 4-D masks"):
        check_supported(decoder_of(model))


# --------------------------------------------------------------------------- drafts that lie


def nan_model(name):
    model = tiny_encoder_decoder(name, seed=5)
    torch.nn.init.constant_(model.get_output_embeddings().weight, torch.nan)
    return model


LIARS = {
    "NaN": lambda: nan_model("donut"),
    "other weights": lambda: tiny_encoder_decoder("donut", seed=5),
    "smaller vocabulary": lambda: tiny_encoder_decoder(
        "donut", seed=5, vocab_size=54, pad_token_id=53
    ),
    "fewer layers": lambda: tiny_encoder_decoder("donut", seed=5, decoder_layers=1),
    "text only": lambda: tiny_model("Llama", vocab_size=VOCAB),
    "foreign corpus": lambda: {"name": "ngram", "corpus": corpus([[START, 999, 10**9] * 3])},
}


def corpus(texts):
    automaton = SuffixAutomaton()
    for text in texts:
        automaton.add_document(text)
    return automaton


@pytest.mark.parametrize("liar", LIARS)
def test_a_bad_drafter_costs_speed_and_nothing_else(liar):
    model = made("donut")
    drafter = LIARS[liar]()
    outputs = [
        decoded(
            model,
            request("donut", TEXTS),
            fixed(one, generator=seeded(1, 2, 3)),
            do_sample=True,
        )
        for one in ("none", drafter)
    ]
    assert torch.equal(*outputs)


# --------------------------------------------------------------------------- what comes back


def test_the_cache_that_comes_back_is_that_of_generate():
    model = made("florence2")
    inputs = request("florence2", TEXTS)
    end = uneven_ends(decoded(model, inputs))
    options = {"return_dict_in_generate": True, "eos_token_id": end}
    theirs = decoded(model, inputs, **options)
    ours = decoded(model, inputs, fixed("jacobi"), **options)
    assert type(ours) is type(theirs)
    assert torch.equal(ours.sequences, theirs.sequences)
    halves = ("self_attention_cache", "cross_attention_cache")
    for half in halves:
        pairs = zip(
            getattr(ours.past_key_values, half).layers,
            getattr(theirs.past_key_values, half).layers,
            strict=True,
        )
        is_token = (ours.sequences[:, :-1] != PAD)[:, None, :, None]
        for our, their in pairs:
            mask = is_token if half == halves[0] else torch.ones(1, dtype=torch.bool)
            for a, b in ((our.keys, their.keys), (our.values, their.values)):
                torch.testing.assert_close(a * mask, b * mask, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["donut", "florence2", "nougat", "vit"])
@pytest.mark.parametrize("num_rows", [1, 3])
def test_what_an_encoder_says_is_bitwise_that_of_no_cache(name, num_rows):
    model, inputs = made(name), request(name, TEXTS[:num_rows])
    # The last picture is the first one again.
    inputs["pixel_values"][-1] = inputs["pixel_values"][0]
    cache = FeatureCache()
    with torch.no_grad():
        cold, kept, plain = (
            prepare_by_item(model, inputs, one)["encoder_outputs"][0]
            for one in (cache, cache, FeatureCache(0))
        )
        batch = prepare(model, inputs)["encoder_outputs"][0]
    assert torch.equal(cold, plain)
    assert torch.equal(kept, plain)
    assert cache.num_misses == min(num_rows, 2)
    assert cache.num_hits == 2 * num_rows - cache.num_misses
    torch.testing.assert_close(plain, batch, rtol=1e-12, atol=1e-12)
