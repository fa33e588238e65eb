"""After any drafting, committing and rolling back, the cache is what a fresh run would have."""

import pytest
import torch
from test_engine import BUDGETS, PROMPTS, Liar, hints, reference
from tiny import VOCAB, make_engine, make_rows, tiny_model
from transformers import DynamicCache

from mmspec.adapters.causal_lm import CausalTarget
from mmspec.cache import SlotCache, slot_mask
from mmspec.drafters.plain import root_only
from mmspec.forward import check_supported
from mmspec.law_config import LawConfig
from mmspec.tree import ancestors, pack_trees

#: Windows are far shorter than the outputs, so that every step crosses them.
FAMILIES = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": 5}),
    "gemma2": ("Gemma2", {"sliding_window": 5}),
    "gemma3": (
        "Gemma3",
        {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "qwen2": ("Qwen2", {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1}),
}
CASES = [
    (family, attention)
    for family in FAMILIES
    for attention in ("sdpa", "eager")
    if (family, attention) != ("gemma2", "sdpa")  # transformers refuses the pair
]


def family_model(family: str, attention: str, dtype=torch.float64):
    name, changes = FAMILIES[family]
    if name == "Gemma3":
        import transformers

        torch.manual_seed(0)
        from tiny import SHAPE

        config = transformers.Gemma3TextConfig(**(SHAPE | changes))
        config._attn_implementation = attention
        return transformers.Gemma3ForCausalLM(config).to(dtype).eval()
    return tiny_model(name, attention=attention, dtype=dtype, **changes)


def fresh_cache(model, tokens: list[int]) -> DynamicCache:
    """Keys and values of one row from one pass of the unmodified model."""
    cache = DynamicCache()  # without a config no layer is cropped to its window
    with torch.no_grad():
        model(torch.tensor([tokens]), past_key_values=cache, use_cache=True)
    return cache


def run_with_drafts(model, drafter: str, tolerance: float) -> None:
    config = LawConfig(temperature=0.0)
    keys = make_rows(PROMPTS, BUDGETS).keys_B
    expected = [reference(model, *row, config) for row in zip(PROMPTS, BUDGETS, keys, strict=True)]
    rows = make_rows(PROMPTS, BUDGETS)
    if drafter == "tree":
        liar = Liar(rows, hints(expected, "late"))
        engine = make_engine(rows, model, lambda *_: liar, width=8)
    else:
        engine = make_engine(rows, model, drafter, width=6)
    target = engine.target
    steps = 0
    for _ in engine.stream():
        steps += 1
        if steps in (1, 3) or target.is_done:
            compare_with_fresh(model, target, tolerance)
    assert [rows.new_tokens(r) for r in range(3)] == expected
    if drafter == "tree":
        assert steps < max(BUDGETS) / 2, "trees were hardly accepted, so nothing was moved"


def compare_with_fresh(model, target: CausalTarget, tolerance: float) -> None:
    rows = target.rows
    with torch.no_grad():
        logits = target.score(root_only(rows)).logits_BNV[:, 0]
    target.forward.cache.restore()
    for row, tokens in enumerate(rows.host_tokens):
        num_cached = len(tokens) - 1
        with torch.no_grad():
            wanted = model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
        if row in rows.active:
            torch.testing.assert_close(logits[row], wanted, rtol=tolerance, atol=tolerance)
        if not num_cached:
            continue
        fresh = fresh_cache(model, tokens[:-1])
        for ours, theirs in zip(target.forward.cache.layers, fresh.layers, strict=True):
            for name in ("keys", "values"):
                got = getattr(ours, name)[row, :, :num_cached]
                want = getattr(theirs, name)[0]
                torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("drafter", ["jacobi", "tree", "early_exit"])
@pytest.mark.parametrize(("family", "attention"), CASES)
def test_committed_slots_and_next_logits_are_those_of_a_fresh_run(family, attention, drafter):
    # Eager attention of transformers takes its softmax in float32, whatever the model's dtype.
    tolerance = 1e-11 if attention == "sdpa" else 2e-5
    run_with_drafts(family_model(family, attention), drafter, tolerance)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_float32_differs_by_rounding_only(family):
    run_with_drafts(family_model(family, "sdpa", torch.float32), "tree", tolerance=2e-4)


def test_window_must_be_counted_in_positions():
    """A window counted in slots sees other tokens than a fresh run; the test above notices."""
    parents = torch.tensor([[0, 0, 0, 0, 3]])
    depth = torch.tensor([[0, 1, 1, 1, 2]])
    mask = slot_mask(torch.tensor([6]), ancestors(parents, 2), depth, 11, window=4)[0, 0]
    # Node 4 stands at position 8: of 4 positions, 5 and 6 are committed or root, then 3 and 4.
    assert mask[4].nonzero().squeeze(1).tolist() == [5, 6, 9, 10]
    assert mask[0].nonzero().squeeze(1).tolist() == [3, 4, 5, 6]
    assert mask[2].nonzero().squeeze(1).tolist() == [4, 5, 6, 8]


def test_mask_of_ragged_rows_by_hand():
    parents = torch.tensor([[0, 0, 1], [0, 0, 0]])
    depth = torch.tensor([[0, 1, 2], [0, 1, 1]])
    mask = slot_mask(torch.tensor([2, 0]), ancestors(parents, 2), depth, 5)[:, 0].int()
    assert mask.tolist() == [
        [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]],
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0]],
    ]


# --------------------------------------------------------------------------- roll-back


def wrong_drafts(tokens_of_row, num_right, is_tree, noise):
    """Drafts that are right in their first levels and wrong elsewhere, ``noise`` says how."""

    def make(rows, width, generator):
        del generator
        random = torch.Generator().manual_seed(1000 * noise + rows.step)
        tokens, parents = [], []
        for row in range(rows.num_rows):
            ahead = tokens_of_row[row][len(rows.new_tokens(row)) :][: (width - 1) // (1 + is_tree)]
            row_tokens, row_parents, last = [], [], -1
            for level, right in enumerate(ahead):
                others = (right + torch.randint(1, VOCAB, (2,), generator=random)) % VOCAB
                nodes = [right if level < num_right else int(others[0])]
                if is_tree:  # what is accepted is never the first child, so it has to be moved
                    nodes.insert(0, int(others[1]))
                row_tokens += nodes
                row_parents += [last] * len(nodes)
                last = len(row_tokens) - 1
            tokens.append(row_tokens)
            parents.append(row_parents)
        return pack_trees(tokens, parents, rows.roots_B(), VOCAB, width)

    return make


def trace(model, make):
    """After every step: the logits behind the root, and the keys and values of each row."""
    rows = make_rows(PROMPTS, BUDGETS)
    engine = make_engine(rows, model, lambda *_: Liar(rows, make), width=7)
    scores, score = [], engine.target.score
    engine.target.score = lambda proposal: scores.append(score(proposal)) or scores[-1]
    steps = []
    for _ in engine.stream():
        engine.target.forward.cache.restore()
        cached = [b.clone() for b in buffers(engine.target.forward.cache)]
        steps.append((scores[-1].logits_BNV[:, 0], cached, [len(t) for t in rows.host_tokens]))
    return steps, engine.ledger.generation()


@pytest.mark.parametrize("is_tree", [False, True])
@pytest.mark.parametrize("num_right", [0, 2])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_rejected_draft_leaves_no_bit_behind(family, attention, num_right, is_tree):
    """Two runs of the same shapes that saw different wrong drafts are equal bit for bit."""
    model = family_model(family, attention)
    keys = make_rows(PROMPTS, BUDGETS).keys_B
    greedy = LawConfig(temperature=0.0)
    right = [reference(model, *row, greedy) for row in zip(PROMPTS, BUDGETS, keys, strict=True)]
    one, made = trace(model, wrong_drafts(right, num_right, is_tree, noise=1))
    two, other = trace(model, wrong_drafts(right, num_right, is_tree, noise=2))
    assert made.units == other.units == tuple(right)
    assert (made.stats.num_accepted > 0) == (num_right > 0)
    assert made.stats.num_accepted < made.stats.num_drafted
    saw_other_drafts = False
    for (logits, cached, lengths), (wanted, others, wanted_lengths) in zip(one, two, strict=True):
        assert torch.equal(logits, wanted)
        assert lengths == wanted_lengths
        for ours, theirs in zip(cached, others, strict=True):
            for row, length in enumerate(lengths):
                assert torch.equal(ours[row, :, : length - 1], theirs[row, :, : length - 1])
            saw_other_drafts |= not torch.equal(ours, theirs)
    assert saw_other_drafts


# --------------------------------------------------------------------------- the cache alone


def filled(num_rows=2, capacity=9, num_layers=2) -> SlotCache:
    cache = SlotCache(num_rows, capacity)
    slots = torch.arange(capacity).expand(num_rows, -1)
    cache.aim(slots, capacity)
    for layer in range(num_layers):
        shape = (num_rows, 3, capacity, 4)
        cache.update(torch.randn(shape), torch.randn(shape), layer)
    return cache


def buffers(cache: SlotCache) -> list[torch.Tensor]:
    return [b for layer in cache.layers for b in (layer.keys, layer.values)]


def test_committing_a_path_moves_it_bit_for_bit_and_touches_nothing_committed():
    cache = filled()
    before = [b.clone() for b in buffers(cache)]
    cache.commit_path(torch.tensor([[0, 1, 3], [0, 2, 0]]), torch.tensor([5, 2]))
    for old, new in zip(before, buffers(cache), strict=True):
        assert torch.equal(new[0, :, :7], old[0, :, [0, 1, 2, 3, 4, 5, 6]])
        assert torch.equal(new[0, :, 7], old[0, :, 8])
        assert torch.equal(new[1, :, :4], old[1, :, [0, 1, 2, 4]])


@pytest.mark.parametrize("num_rows", [1, 2])
def test_writes_past_the_capacity_fall_into_the_bin(num_rows):
    cache = filled(num_rows)
    before = [b.clone() for b in buffers(cache)]
    cache.aim(torch.tensor([[8, 9, 10, 11]]).expand(num_rows, -1), 10)
    shape = (num_rows, 3, 4, 4)
    keys, _ = cache.update(torch.ones(shape), torch.ones(shape), 0)
    assert keys.shape[2] == 10
    assert bool((keys[:, :, 8] == 1).all())
    assert torch.equal(keys[:, :, :8], before[0][:, :, :8])


def test_rows_can_be_selected_and_room_reserved():
    cache = filled()
    before = [b.clone() for b in buffers(cache)]
    cache.select_rows(torch.tensor([1, 1, 0]))
    cache.reserve(20)
    cache.reserve(3)
    assert cache.capacity == 20
    for old, new in zip(before, buffers(cache), strict=True):
        assert new.shape[:3] == (3, 3, 21)
        assert torch.equal(new[:, :, :9], old[[1, 1, 0], :, :9])
    empty = SlotCache(2, 4)
    empty.first_layers(2)  # makes layers without buffers
    empty.reserve(8)
    empty.select_rows(torch.tensor([0]))
    assert empty.capacity == 8


def test_rows_that_are_left_out_lose_nothing_and_come_back():
    random = torch.Generator().manual_seed(0)
    cache = filled(num_rows=6, capacity=4)
    before = [b.clone() for b in buffers(cache)]
    for count in (5, 3, 4, 1, 6, 2, 1):
        rows = torch.randperm(6, generator=random)[:count].tolist()
        fed = cache.feed(rows)
        assert sorted(fed) == sorted(rows)
        cache.aim(torch.arange(5).expand(count, -1), 5)
        states = [b[list(fed)] for b in before]
        for layer in range(2):
            seen = cache.update(states[2 * layer], states[2 * layer + 1], layer)
            assert all(torch.equal(a, b) for a, b in zip(seen, states[2 * layer :], strict=False))
        assert len(cache.feed(rows)) == count
    cache.restore()
    assert all(torch.equal(a, b) for a, b in zip(buffers(cache), before, strict=True))


def test_a_row_that_leaves_changes_places_with_one_row():
    cache = SlotCache(5, 4)
    assert cache.feed([0, 2, 3, 4]) == (0, 4, 2, 3)
    assert cache.feed([0, 3, 4]) == (0, 4, 3)
    assert cache.feed(None) == (0, 1, 2, 3, 4)


def test_a_path_is_committed_where_its_row_stands():
    cache = filled()
    before = [b.clone() for b in buffers(cache)]
    assert cache.feed([1]) == (1,)
    cache.commit_path(torch.tensor([[0, 3], [0, 2]]), torch.tensor([5, 2]))
    cache.restore()
    for old, new in zip(before, buffers(cache), strict=True):
        assert torch.equal(new[0], old[0])
        assert torch.equal(new[1, :, 3], old[1, :, 4])


def test_an_early_exit_cache_shares_buffers_and_cursor():
    cache = filled()
    shallow = cache.first_layers(1)
    assert len(shallow.layers) == 1
    assert shallow.layers[0].keys.data_ptr() == cache.layers[0].keys.data_ptr()
    shallow.aim(torch.zeros(2, 1, dtype=torch.long), 7)
    assert cache.cursor.extent == 7


def test_a_cache_kept_over_turns_equals_a_new_one():
    model = tiny_model()
    first = make_rows(PROMPTS, BUDGETS)
    engine = make_engine(first, model, "jacobi")
    engine.run()
    turns = [[*tokens, 50 + row, 3] for row, tokens in enumerate(first.host_tokens)]
    num_cached = [len(tokens) - 1 for tokens in first.host_tokens]
    again = make_rows(turns, [150, 6, 6])
    kept = make_engine(
        again, model, "jacobi", cache=engine.target.forward.cache, num_cached=num_cached
    )
    new = make_engine(make_rows(turns, [150, 6, 6]), model, "none")
    assert kept.run().units == new.run().units


# --------------------------------------------------------------------------- refusals


TINY = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2}


def refused_model(kind: str):
    import transformers as t

    if kind == "flash":
        model = tiny_model()
        model.config._attn_implementation = "flash_attention_2"
        return model
    if kind == "chunked":
        model = tiny_model()
        model.config.attention_chunk_size = 8
        return model
    if kind == "linear layers":
        model = tiny_model("Qwen3")
        model.config.layer_types = ["linear_attention", "full_attention"]
        return model
    if kind == "mamba":
        return t.MambaForCausalLM(t.MambaConfig(**TINY, state_size=4, pad_token_id=None))
    if kind == "bloom":
        return t.BloomForCausalLM(
            t.BloomConfig(vocab_size=VOCAB, hidden_size=16, n_layer=1, n_head=2)
        )
    if kind == "falcon alibi":
        config = t.FalconConfig(**TINY, num_attention_heads=2, alibi=True)
        return t.FalconForCausalLM(config)
    if kind == "encoder-decoder":
        shape = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
        return t.T5ForConditionalGeneration(t.T5Config(vocab_size=VOCAB, **shape))
    if kind == "gpt-neo":
        return tiny_model(
            "GPTNeo", attention="eager", num_layers=2, num_heads=4,
            attention_types=[[["global", "local"], 1]], window_size=5,
        )  # fmt: skip
    assert kind == "decoder of bart"
    shape = {"d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2}
    return t.BartForCausalLM(t.BartConfig(vocab_size=VOCAB, decoder_ffn_dim=16, **shape))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("flash", "4-D masks.*sdpa"),
        ("chunked", "chunked_attention"),
        ("linear layers", "linear_attention"),
        ("mamba", "recurrent state"),
        ("bloom", "ALiBi"),
        ("falcon alibi", "ALiBi"),
        ("encoder-decoder", "encoder-decoder"),
        ("gpt-neo", "mask of its own"),
        ("decoder of bart", "position_ids"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_models_that_would_go_wrong_are_refused(kind, reason):
    model = refused_model(kind)
    with pytest.raises(ValueError, match=reason) as caught:
        check_supported(model)
    assert type(model).__name__ in str(caught.value)


def test_a_tree_pack_is_what_the_mask_expects():
    """One step by hand: logits of each node are those of its own path."""
    model = tiny_model()
    rows = make_rows([[1, 2, 3], [4]], [9, 9])
    target = CausalTarget(model, rows)
    tree = pack_trees([[7, 8, 9, 4], [5]], [[-1, 0, 0, 2], [-1]], rows.roots_B(), VOCAB, 5)
    with torch.no_grad():
        target.prefill()
        logits = target.score(tree).logits_BNV
        for row, node, path in [(0, 2, [7, 8]), (0, 4, [7, 9, 4]), (1, 1, [5])]:
            whole = torch.tensor([rows.host_tokens[row] + path])
            wanted = model(whole, use_cache=False).logits[0, -1]
            torch.testing.assert_close(logits[row, node], wanted, rtol=1e-11, atol=1e-11)
