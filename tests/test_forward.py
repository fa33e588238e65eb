"""The prefill answers the first step, and no more logits are made than are wanted."""

import itertools

import pytest
import torch
from test_engine import BUDGETS, PROMPTS
from tiny import make_engine, make_rows, tiny_model

import mmspec.forward
from mmspec.adapters.causal_lm import CausalTarget
from mmspec.cache import SlotCache
from mmspec.drafters.plain import root_only
from mmspec.forward import SlotForward
from mmspec.law_config import LawConfig
from mmspec.records import Plan

SAMPLED = LawConfig(temperature=1.0)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def whole(model, tokens):
    """Logits of the unmodified model behind some tokens."""
    with torch.no_grad():
        return model(torch.tensor([tokens]), use_cache=False).logits[0, -1]


def counted(model):
    """Shapes of what reached the model's embedding and its head, and how to stop counting."""
    fed, answered = [], []
    hooks = [
        model.get_input_embeddings().register_forward_hook(lambda _, x, y: fed.append(y.shape[1])),
        model.get_output_embeddings().register_forward_hook(
            lambda _, x, y: answered.append(y.shape[1])
        ),
    ]
    return fed, answered, lambda: [hook.remove() for hook in hooks]


# The head's columns for rows whose last tokens stand in three different columns.
@pytest.mark.parametrize(
    ("kind", "num_answered"), [("one device", 1), ("dispatched", 3), ("no logits_to_keep", 7)]
)
@torch.no_grad()
def test_only_the_last_logits_of_ragged_rows_are_made(kind, num_answered, model):
    forward = SlotForward(model, num_rows=3, capacity=20)
    forward._is_dispatched = kind == "dispatched"
    forward._takes_keep = kind != "no logits_to_keep"
    fed, answered, stop = counted(model)
    lengths = [len(prompt) for prompt in PROMPTS]
    ids = torch.tensor([prompt + [0] * (7 - len(prompt)) for prompt in PROMPTS])
    first = forward.extend({"input_ids": ids}, [0, 0, 0], lengths)
    second = forward.extend(
        {"input_ids": torch.tensor([[5, 6], [7, 0], [8, 9]])}, lengths, [2, 1, 2]
    )
    stop()
    assert fed == [7, 2]
    assert answered[0] == num_answered
    more = [[5, 6], [7], [8, 9]]
    for row, prompt in enumerate(PROMPTS):
        torch.testing.assert_close(first[row, 0], whole(model, prompt), rtol=1e-11, atol=1e-11)
        wanted = whole(model, prompt + more[row])
        torch.testing.assert_close(second[row, 0], wanted, rtol=1e-11, atol=1e-11)


@torch.no_grad()
def test_rows_of_one_length_need_no_mask(model):
    masks = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    SlotForward(model, num_rows=2, capacity=9).extend(
        {"input_ids": torch.tensor([[1, 2, 3], [4, 5, 6]])}, [0, 0], [3, 3]
    )
    hook.remove()
    assert masks == [None]


@pytest.mark.parametrize("limit", [mmspec.forward.MAX_BAND, 0])
def test_masks_of_chains_are_the_same_cut_out_or_made(limit, monkeypatch):
    monkeypatch.setattr(mmspec.forward, "MAX_BAND", limit)
    least = torch.finfo(torch.float32).min
    for num_nodes, past in itertools.product((1, 2, 16), (0, 1, 7, 40)):
        extent = past + num_nodes
        mask = mmspec.forward._causal(
            num_nodes, past, extent, 60, torch.float32, torch.device("cpu")
        )
        node, slot = torch.arange(num_nodes)[:, None], torch.arange(extent)
        assert torch.equal(mask, torch.where(slot <= past + node, 0.0, least))


@torch.no_grad()
def test_the_first_plain_step_costs_no_forward_and_the_second_does(model):
    rows = make_rows(PROMPTS, BUDGETS)
    target = CausalTarget(model, rows)
    fed, _, stop = counted(model)
    target.prefill()
    first, second = (target.score(root_only(rows)) for _ in range(2))
    stop()
    assert fed == [7, 1]
    assert first.forward_time_s == 0 < second.forward_time_s
    torch.testing.assert_close(first.logits_BNV, second.logits_BNV, rtol=1e-11, atol=1e-11)
    assert torch.equal(first.positions_BN, second.positions_BN)


@pytest.mark.parametrize("prompts", [PROMPTS, [[7], [9], [3]], [[1, 2], [3, 4], [5, 6]]])
def test_plain_decoding_takes_one_forward_per_token(prompts, model):
    fed, _, stop = counted(model)
    made = make_engine(make_rows(prompts, BUDGETS), model, config=SAMPLED).run()
    stop()
    assert len(fed) == made.stats.num_target_forwards == max(BUDGETS)
    assert [row.num_target_forwards for row in made.row_stats] == BUDGETS
    assert made.stats.tau == 1


class Wide:
    """Drafts from the very first step on."""

    def plan(self):
        return Plan(width=4)

    def observe(self, record):
        pass


@pytest.mark.parametrize("drafter", ["clone", "early_exit"])
def test_a_first_step_with_drafts_is_a_forward_like_any_other(drafter, model):
    plain = make_engine(make_rows(PROMPTS, BUDGETS), model, config=SAMPLED).run()
    engine = make_engine(make_rows(PROMPTS, BUDGETS), model, drafter, config=SAMPLED)
    engine.schedule = Wide()
    made = engine.run()
    assert made.units == plain.units
    assert made.steps[0].width == 4


@pytest.mark.parametrize("num_kept", [0, 3, 4])
def test_a_cache_may_hold_all_of_a_prompt(num_kept, model):
    """What is known of the prompt already is fed again only as far as its answer is wanted."""
    plain = make_engine(make_rows(PROMPTS, BUDGETS), model, config=SAMPLED).run()
    cache = SlotCache(3, 64)
    forward = SlotForward(model, num_rows=3, capacity=64, cache=cache)
    ids = torch.tensor([prompt + [0] * (7 - len(prompt)) for prompt in PROMPTS])
    with torch.no_grad():
        forward.extend({"input_ids": ids}, [0] * 3, [len(prompt) for prompt in PROMPTS])
    kept = [min(num_kept, len(prompt)) for prompt in PROMPTS]
    rows = make_rows(PROMPTS, BUDGETS)
    engine = make_engine(rows, model, config=SAMPLED, cache=cache, num_cached=kept)
    fed, _, stop = counted(model)
    engine.prefill()
    stop()
    assert fed == [max(max(len(p) - n, 1) for p, n in zip(PROMPTS, kept, strict=True))]
    assert engine.run().units == plain.units


@torch.no_grad()
@pytest.mark.parametrize(
    ("dtype", "ragged"), list(itertools.product(["float32", "bfloat16"], [0, 1]))
)
def test_slices_and_indices_write_the_same(dtype, ragged):
    """Rows of one length are written as a slice, others by index."""
    states = torch.randn(2, 3, 4, 5, dtype=getattr(torch, dtype))
    sliced, indexed = SlotCache(2, 12), SlotCache(2, 12)
    slots = torch.tensor([[2], [2 + ragged]]) + torch.arange(4)
    for cache, where in ((sliced, None), (indexed, slots)):
        cache.aim(where, 8, past=2)
        cache.update(states, states + 1, 0)
    keys, values = indexed.layers[0].keys, indexed.layers[0].values
    for row in range(2):
        first = 2 + ragged * row
        assert torch.equal(keys[row, :, first : first + 4], states[row])
        assert torch.equal(values[row, :, first : first + 4], states[row] + 1)
        assert not keys[row, :, :first].any()
        assert not keys[row, :, first + 4 :].any()
    assert torch.equal(sliced.layers[0].keys, keys) == (not ragged)
