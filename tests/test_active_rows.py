"""Rows that have ended are not fed, and nobody notices but the clock."""

import pytest
import torch
from test_cache import wrong_drafts
from test_engine import BUDGETS, CONFIGS, PROMPTS, Liar
from tiny import make_engine, make_rows, tiny_model

from mmspec import forward

SAMPLED = CONFIGS["sampled"]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def small():
    return tiny_model(num_hidden_layers=1, seed=5)


@pytest.fixture(scope="module")
def plain(model):
    """Each row alone."""
    keys = make_rows(PROMPTS, BUDGETS).keys_B
    units = []
    for row in range(3):
        rows = make_rows([PROMPTS[row]], [BUDGETS[row]])
        rows.keys_B = keys[row : row + 1]
        units += make_engine(rows, model, config=SAMPLED).run().units
    return tuple(units)


def rows_fed(module) -> list[int]:
    """Rows of every forward of a module from now on."""
    fed: list[int] = []
    module.register_forward_hook(lambda _, args, out: fed.append(len(out)))
    return fed


@pytest.mark.parametrize("drafter", ["none", "jacobi", "model", "early_exit", "tree"])
def test_a_forward_feeds_the_rows_that_go_on(drafter, model, small, plain):
    rows = make_rows(PROMPTS, BUDGETS)
    liar = Liar(rows, wrong_drafts(plain, 2, is_tree=True, noise=3))
    made = liar if drafter == "tree" else drafter
    make = (lambda *_: made) if drafter == "tree" else made
    engine = make_engine(rows, model, make, small=small, config=SAMPLED, width=5)
    engine.prefill()
    fed, drafted = rows_fed(model.model.layers[-1].mlp), rows_fed(small.model.layers[0].mlp)
    counts = []
    for record, _ in engine.stream():
        counts.append(sum(record.was_active))
        assert fed == counts[1:], "the first step is answered by the prefill"
        if record.width > 1 and drafter == "model":
            assert set(drafted) == {counts[-1]}
        drafted.clear()
    assert counts[0] == 3
    assert counts[-1] < 3
    assert engine.ledger.generation().units == plain
    model.model.layers[-1].mlp._forward_hooks.clear()
    small.model.layers[0].mlp._forward_hooks.clear()


@pytest.mark.parametrize("drafter", ["jacobi", "early_exit"])
def test_a_compiled_forward_feeds_all_rows(drafter, model, plain, monkeypatch):
    monkeypatch.setattr(forward, "compiled_forward", lambda module: module)
    rows = make_rows(PROMPTS, BUDGETS)
    engine = make_engine(rows, model, drafter, config=SAMPLED, compile=True)
    fed = rows_fed(model.model.layers[-1].mlp)
    assert engine.run().units == plain
    model.model.layers[-1].mlp._forward_hooks.clear()
    assert set(fed) == {3}


@pytest.mark.parametrize("drafter", ["none", "jacobi", "early_exit"])
def test_a_cache_is_whole_after_rows_have_left(drafter, model, plain):
    """What a row left behind when it ended is what a fresh run would cache."""
    rows = make_rows(PROMPTS, BUDGETS)
    engine = make_engine(rows, model, drafter, config=SAMPLED)
    assert engine.run().units == plain
    cache = engine.target.forward.cache
    cache.restore()
    for row, tokens in enumerate(rows.host_tokens):
        with torch.no_grad():
            wanted = model(torch.tensor([tokens[:-1]]), use_cache=True).past_key_values
        for ours, theirs in zip(cache.layers, wanted.layers, strict=True):
            got = ours.keys[row, :, : len(tokens) - 1]
            torch.testing.assert_close(got, theirs.keys[0], rtol=1e-11, atol=1e-11)
