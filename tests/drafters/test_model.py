"""A smaller model as drafter: its cache, its vocabulary, and its noise."""

import pytest
import torch
from tiny import VOCAB, make_engine, make_rows, tiny_model

from mmspec.drafters.model import ModelDrafter, first_layers
from mmspec.law_config import LawConfig
from mmspec.visual_tokens import text_of

PROMPTS = [[1, 2, 3, 4], [5, 6, 7, 8, 9, 10, 11], [3]]
BUDGETS = [14, 9, 17]
SAMPLED = LawConfig(temperature=1.0, repetition_penalty=1.2, bad_words=((3, 4), (9,)))


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def plain(model):
    return make_engine(make_rows(PROMPTS, BUDGETS), model, config=SAMPLED).run().units


def run(model, small, *, width=4, **options):
    def make(target, rows, law):
        return ModelDrafter(small, rows, target.vocab_size, law)

    rows = make_rows(PROMPTS, BUDGETS)
    return make_engine(rows, model, make, config=SAMPLED, width=width, **options).run()


@pytest.mark.parametrize("width", [2, 3, 8])
def test_the_target_itself_is_accepted_in_full(model, plain, width):
    """Any slip in the drafter's cache, positions, law or noise would cost an acceptance."""
    made = run(model, model, width=width)
    assert made.units == plain
    left = list(BUDGETS)
    for step in made.steps:
        for row, drafted in enumerate(step.num_drafted):
            # Drafts past the end of a row stand at clamped positions; they never show.
            assert step.num_accepted[row] >= min(drafted, left[row] - 1)
            left[row] -= step.num_emitted[row]


@pytest.mark.parametrize("own_vocab", [VOCAB - 20, VOCAB + 7])
def test_a_vocabulary_of_another_size_is_aligned(model, plain, own_vocab):
    small = tiny_model(vocab_size=own_vocab, seed=3)
    assert run(model, small).units == plain


def test_shared_noise_and_fresh_noise_are_both_lossless_in_their_way(model, plain):
    small = tiny_model(num_hidden_layers=1, seed=5)
    assert run(model, small).units == plain
    fresh = make_engine(
        make_rows(PROMPTS, BUDGETS), model, "model", small=small, config=SAMPLED, rule="speculative"
    ).run()
    assert [len(u) for u in fresh.units] == BUDGETS
    assert all(not ({9} & set(u)) for u in fresh.units)


def test_a_drafter_whose_law_is_the_targets_is_always_accepted_by_rejection(model):
    made = make_engine(
        make_rows(PROMPTS, BUDGETS), model, "clone", config=SAMPLED, rule="speculative"
    ).run()
    assert made.stats.acceptance_by_position[0] > 0.999


def test_placeholders_are_left_out_of_what_is_read(model):
    """Every draft is what the smaller model writes behind the prompt without them."""
    small, hole = tiny_model(num_hidden_layers=1, seed=5), VOCAB - 1
    short = [[1, 2, 3, 4], [5, 6, 7], [3]]
    prompts = [[1, hole, hole, 2, 3, 4], [5, 6, 7], [hole, hole, hole, hole, 3]]
    proposals = []

    def make(target, rows, law):
        drafter = ModelDrafter(
            small, rows, target.vocab_size, law, view=lambda: text_of(rows, (hole,))
        )
        propose = drafter.propose

        def watched(plan):
            before = [rows.new_tokens(row) for row in range(3)]
            proposal = propose(plan)
            proposals.append((before, proposal.tokens_BN))
            return proposal

        drafter.propose = watched
        return drafter

    made = make_engine(make_rows(prompts, [12] * 3), model, make, width=4).run()
    assert made.units == make_engine(make_rows(prompts, [12] * 3), model).run().units
    drafted = [proposal for proposal in proposals if proposal[1].shape[1] == 4]
    assert len(drafted) > 4
    for before, tokens_BN in drafted[:5]:
        for prompt, new, chain in zip(short, before, tokens_BN, strict=True):
            ids = torch.tensor([prompt + new])
            written = small.generate(ids, max_new_tokens=3, do_sample=False)[0, -3:]
            assert torch.equal(written, chain[1:])


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_early_exit_shares_weights_and_stops_early(num_layers):
    model = tiny_model(num_hidden_layers=4)
    shallow = first_layers(model, num_layers)
    assert len(shallow.model.layers) == num_layers
    assert len(model.model.layers) == 4
    assert model.config.num_hidden_layers == 4
    ours = {id(p) for p in shallow.parameters()}
    assert ours <= {id(p) for p in model.parameters()}
    hidden = model.model(torch.tensor([[1, 2, 3]]), output_hidden_states=True).hidden_states
    wanted = model.lm_head(model.model.norm(hidden[num_layers])) if num_layers < 4 else None
    torch.testing.assert_close(shallow(torch.tensor([[1, 2, 3]])).logits, wanted)


@pytest.mark.parametrize("num_layers", [0, 4])
def test_early_exit_out_of_range(num_layers):
    with pytest.raises(ValueError, match="after layer 1 to 3"):
        first_layers(tiny_model(num_hidden_layers=4), num_layers)
