"""Every stage of a law is transformers' processor, node by node."""

import pytest
import torch
from transformers import generation as hf

from mmspec.law_config import AllowedTokens, LawConfig
from mmspec.records import Proposal
from mmspec.sampling import (
    Allowed,
    BadWords,
    LawContext,
    MinNewTokens,
    MinP,
    PresencePenalty,
    RepetitionPenalty,
    Temperature,
    TopK,
    TopP,
    build_law,
    path_tail,
)
from mmspec.tree import pack_trees

V = 12


@pytest.fixture
def tree() -> Proposal:
    """Two rows: a branching tree and a short chain with padding."""
    return pack_trees(
        [[3, 5, 3, 7, 1], [4, 4]], [[-1, 0, 0, 2, -1], [-1, 0]], torch.tensor([2, 5]), V, 6
    )


HISTORY = [[1, 8, 2], [9, 3, 4, 4, 5]]
PROMPTS = [2, 3]


@pytest.fixture
def context(tree) -> LawContext:
    history = torch.full((2, 9), 6)  # 6 stands past the ends, where it must not count
    for row, tokens in enumerate(HISTORY):
        history[row, : len(tokens)] = torch.tensor(tokens)
    lengths = torch.tensor([len(tokens) for tokens in HISTORY])
    return LawContext(
        tokens_BN=tree.tokens_BN,
        ancestors_BNN=tree.ancestors_BNN,
        depth_BN=tree.depth_BN,
        positions_BN=lengths[:, None] - 1 + tree.depth_BN,
        history_BT=history,
        lengths_B=lengths,
        prompt_lengths_B=torch.tensor(PROMPTS),
    )


def path_to(tree: Proposal, row: int, node: int) -> list[int]:
    drafted = []
    while node:
        drafted.insert(0, int(tree.tokens_BN[row, node]))
        node = int(tree.parents_BN[row, node])
    return HISTORY[row] + drafted


def nodes() -> list[tuple[int, int]]:
    return [(0, n) for n in range(6)] + [(1, n) for n in range(3)]


def tied_logits() -> torch.Tensor:
    """Random logits with many ties and both signs."""
    return torch.randn(2, 6, V, dtype=torch.float64).mul(2).round()


def smooth_logits() -> torch.Tensor:
    return torch.randn(2, 6, V, dtype=torch.float64) * 2


BAD = ((3, 5), (7,), (2, 3, 3), (4, 4, 4, 1), (9, 3, 4, 4, 5, 0))
EOS = (0, 11)

STAGES = {
    "temperature": (Temperature(0.7), lambda row: hf.TemperatureLogitsWarper(0.7)),
    "top-k": (TopK(4), lambda row: hf.TopKLogitsWarper(4)),
    "top-k of more than there are": (TopK(99), lambda row: hf.TopKLogitsWarper(99)),
    "top-p": (TopP(0.8), lambda row: hf.TopPLogitsWarper(0.8)),
    "top-p tiny": (TopP(1e-6), lambda row: hf.TopPLogitsWarper(1e-6)),
    "min-p": (MinP(0.15), lambda row: hf.MinPLogitsWarper(0.15)),
    "repetition": (
        RepetitionPenalty(1.7),
        lambda row: hf.RepetitionPenaltyLogitsProcessor(1.7),
    ),
    "bad words": (
        BadWords(BAD),
        lambda row: hf.NoBadWordsLogitsProcessor([list(w) for w in BAD]),
    ),
    "min new tokens": (
        MinNewTokens(3, EOS),
        lambda row: hf.MinNewTokensLengthLogitsProcessor(PROMPTS[row], 3, list(EOS), device="cpu"),
    ),
}


# Which of two equal logits a nucleus keeps is left to the sort, so ties are looked at below.
CASES = [(name, smooth_logits) for name in STAGES]
CASES += [(name, tied_logits) for name in STAGES if not name.startswith("top-p")]


@pytest.mark.parametrize(("name", "make"), CASES)
def test_a_stage_is_the_processor_of_transformers_on_every_path(name, make, tree, context):
    stage, reference = STAGES[name]
    for _ in range(5):
        logits = make()
        untouched = logits.clone()
        got = stage(logits, context)
        assert torch.equal(logits, untouched)
        for row, node in nodes():
            ids = torch.tensor([path_to(tree, row, node)])
            wanted = reference(row)(ids, untouched[row, node][None].clone())[0]
            torch.testing.assert_close(got[row, node], wanted, rtol=1e-12, atol=1e-12)


def test_top_p_keeps_enough_and_no_more_under_ties(context):
    law = TopP(0.6)(tied_logits(), context).softmax(-1)
    logits = tied_logits()
    kept = TopP(0.6)(logits, context).isfinite()
    probs = logits.softmax(-1)
    mass = (probs * kept).sum(-1)
    smallest = probs.masked_fill(~kept, 2.0).amin(-1)
    assert bool((mass >= 0.6 - 1e-9).all())
    assert bool((mass - smallest < 0.6 + 1e-9).all())
    assert bool(law.isfinite().all())


def test_presence_penalty_counts_the_output_once_and_not_the_prompt(tree, context):
    logits = smooth_logits()
    got = PresencePenalty(0.5)(logits, context)
    for row, node in nodes():
        wanted = logits[row, node].clone()
        for token in set(path_to(tree, row, node)[PROMPTS[row] :]):
            wanted[token] -= 0.5
        torch.testing.assert_close(got[row, node], wanted)


def test_allowed_tokens_go_by_the_position_of_the_next_token(tree, context):
    masks = torch.zeros(3, V, dtype=torch.bool)
    masks[0] = True
    masks[1, :4] = True
    masks[2, 6] = True
    classes = torch.tensor([2, 2, 2, 1, 2, 0, 1])  # positions from 7 on use class 0
    logits = smooth_logits()
    got = Allowed(AllowedTokens(class_of_position_T=classes, masks_CV=masks))(logits, context)
    for row, node in nodes():
        position = len(path_to(tree, row, node))
        kind = int(classes[position]) if position < 7 else 0
        wanted = logits[row, node].masked_fill(~masks[kind], float("-inf"))
        assert torch.equal(got[row, node], wanted)


def test_allowed_tokens_may_count_from_the_end_of_each_prompt(tree, context):
    masks = torch.eye(4, V, dtype=torch.bool)
    table = AllowedTokens(
        class_of_position_T=torch.tensor([1, 2, 3, 1]), masks_CV=masks, since_prompt=True
    )
    got = Allowed(table)(smooth_logits(), context)
    for row, node in nodes():
        index = len(path_to(tree, row, node)) - PROMPTS[row]
        kind = [1, 2, 3, 1][index] if index < 4 else 0
        assert got[row, node].isfinite().nonzero().tolist() == [[kind]]


def test_a_law_is_cut_to_other_positions_and_never_to_nothing():
    masks = torch.zeros(2, 5, dtype=torch.bool)
    masks[0, :3], masks[1, 4] = True, True
    table = AllowedTokens(
        class_of_position_T=torch.tensor([0, 1, 0]), masks_CV=masks, since_prompt=True
    )
    law = torch.tensor([1.0, 2.0, 3.0, 4.0, float("-inf")])
    law = torch.stack([law, law, torch.full((5,), float("-inf"))])[None]
    positions, prompts = torch.tensor([[7, 8, 9]]), torch.tensor([7])
    got = Allowed(table).restricted(law, positions, prompts).softmax(-1)
    expected = torch.zeros(1, 3, 5)
    expected[0, 0, :3] = law[0, 0, :3].softmax(-1)
    expected[0, 1, 4] = 1.0  # nothing of the law may stand there, and one token may
    expected[0, 2, :3] = 1 / 3
    torch.testing.assert_close(got, expected)


def test_a_whole_law_applies_its_stages_in_the_order_of_transformers(tree, context):
    config = LawConfig(
        temperature=0.7, top_k=9, top_p=0.9, min_p=0.02, repetition_penalty=1.2, bad_words=BAD,
        min_new_tokens=3, eos_token_ids=EOS,
    )  # fmt: skip
    logits = smooth_logits()
    got = build_law(config)(logits, context)
    order = ["repetition", "bad words", "min new tokens"]
    for row, node in nodes():
        ids = torch.tensor([path_to(tree, row, node)])
        wanted = logits[row, node][None].clone()
        processors = [STAGES[name][1](row) for name in order]
        processors[0] = hf.RepetitionPenaltyLogitsProcessor(1.2)
        processors += [
            hf.TemperatureLogitsWarper(0.7),
            hf.TopKLogitsWarper(9),
            hf.TopPLogitsWarper(0.9),
            hf.MinPLogitsWarper(0.02),
        ]
        for processor in processors:
            wanted = processor(ids, wanted)
        torch.testing.assert_close(got[row, node], wanted[0], rtol=1e-12, atol=1e-12)


def test_greedy_leaves_the_warpers_out_and_keeps_the_rest():
    config = LawConfig(temperature=0, top_k=3, top_p=0.5, min_p=0.1, repetition_penalty=1.2)
    law = build_law(config)
    assert law.is_greedy
    assert [type(stage) for stage in law.stages] == [RepetitionPenalty]


def test_history_outside_the_vocabulary_counts_as_nothing(context):
    """An image row has a text prompt, whose ids are not the target's."""
    import dataclasses

    history = context.history_BT.clone()
    history[0, 0], history[1, 0] = 10**6, -1
    strange = dataclasses.replace(context, history_BT=history)
    logits = smooth_logits()
    got = RepetitionPenalty(2.0)(logits, strange)
    same = [t for t in range(V) if t not in (1, 9)]  # what the history held before
    wanted = RepetitionPenalty(2.0)(logits, context)
    assert torch.equal(got[..., same], wanted[..., same])


def test_path_tails_by_hand(tree, context):
    tail = path_tail(context, 4)
    assert tail[0, 0].tolist() == [-1, 1, 8, 2]
    assert tail[0, 4].tolist() == [2, 3, 3, 7]
    assert tail[1, 2].tolist() == [4, 5, 4, 4]
    assert path_tail(context, 0).shape == (2, 6, 0)
