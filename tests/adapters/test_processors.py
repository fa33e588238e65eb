"""A law from processors is what the processors themselves say on the path to every node."""

import pytest
import torch
from transformers import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    LogitsProcessor,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
    WatermarkLogitsProcessor,
    WhisperTimeStampLogitsProcessor,
)
from transformers.generation.logits_process import TopHLogitsWarper

from mmspec.adapters.processors import Flat, Layout, Pathwise, law_from_processors
from mmspec.records import Proposal
from mmspec.rows import TokenRows
from mmspec.sampling import LawContext
from mmspec.tree import pack_trees

V = 13
PAD = 12
PROMPTS = [[1, 2, 3, 1, 2], [4, 5], [6, 7, 6, 7]]
OUTPUTS = [[3, 1], [5, 4, 5], [6]]
# One branching tree and two chains; the path of each node is spelled out by the parents.
DRAFTS = [[4, 3, 5, 1], [6, 5, 7], [7]]
PARENTS = [[-1, 0, 0, 1], [-1, 0, 1], [-1]]
WIDTH = 5


@pytest.fixture(scope="module")
def ids_BP():
    longest = max(map(len, PROMPTS))
    return torch.tensor([[PAD] * (longest - len(p)) + p for p in PROMPTS])


@pytest.fixture(scope="module")
def layout(ids_BP):
    return Layout(prompt_ids_BP=ids_BP, is_token_BP=ids_BP != PAD, vocab_size=V)


@pytest.fixture(scope="module")
def proposal() -> Proposal:
    roots = torch.tensor([tokens[-1] for tokens in OUTPUTS])
    return pack_trees(DRAFTS, PARENTS, roots, V, WIDTH)


@pytest.fixture(scope="module")
def context(proposal) -> LawContext:
    rows = TokenRows(
        [p + o for p, o in zip(PROMPTS, OUTPUTS, strict=True)],
        max_new_tokens=[8] * 3,
        keys_B=torch.arange(3),
    )
    rows.prompt_lengths_B = torch.tensor([len(p) for p in PROMPTS])
    return rows.context(proposal, rows.positions(proposal.depth_BN))


@pytest.fixture
def logits():
    scores = torch.randn(3, WIDTH, V, dtype=torch.float64) * 3
    scores[0, 0, 3] = float("-inf")
    return scores


def paths(ids_BP):
    """(row, node, ids up to and with the node), as `generate` would have them."""
    for row, (drafts, parents) in enumerate(zip(DRAFTS, PARENTS, strict=True)):
        prefix = ids_BP[row].tolist() + OUTPUTS[row]
        of_node = {-1: prefix}
        yield row, 0, prefix
        for node, (token, parent) in enumerate(zip(drafts, parents, strict=True)):
            of_node[node] = [*of_node[parent], token]
            yield row, node + 1, of_node[node]


def constraint(row, ids):
    """Knows its own paths only: a token it has not allowed is a KeyError."""
    after = {t: [(t * 2 + row) % V, (t + 1) % V, 4] for t in range(V) if t != 3}
    return after[int(ids[-1])] if len(ids) > 7 else [1, 2, 4, 7]


CASES = {
    "temperature": lambda ids: [TemperatureLogitsWarper(0.7)],
    "top_k": lambda ids: [TopKLogitsWarper(4)],
    "top_k floor": lambda ids: [TopKLogitsWarper(1, min_tokens_to_keep=3)],
    "top_k filter": lambda ids: [TopKLogitsWarper(4, filter_value=-50.0)],
    "top_p": lambda ids: [TopPLogitsWarper(0.8)],
    "top_p keep two": lambda ids: [TopPLogitsWarper(0.1, min_tokens_to_keep=2)],
    "min_p": lambda ids: [MinPLogitsWarper(0.1)],
    "min_p zero": lambda ids: [MinPLogitsWarper(0.0)],
    "top_h": lambda ids: [TopHLogitsWarper(0.5)],
    "typical": lambda ids: [TypicalLogitsWarper(0.7)],
    "epsilon": lambda ids: [EpsilonLogitsWarper(0.05)],
    "eta": lambda ids: [EtaLogitsWarper(0.05)],
    "repetition": lambda ids: [RepetitionPenaltyLogitsProcessor(1.4, (ids != PAD).int().argmax(1))],
    "repetition over padding": lambda ids: [RepetitionPenaltyLogitsProcessor(1.4)],
    "repetition of the output": lambda ids: [RepetitionPenaltyLogitsProcessor(1.4, 5)],
    "encoder repetition": lambda ids: [EncoderRepetitionPenaltyLogitsProcessor(1.4, ids)],
    "ngrams": lambda ids: [NoRepeatNGramLogitsProcessor(2)],
    "encoder ngrams": lambda ids: [EncoderNoRepeatNGramLogitsProcessor(2, ids)],
    "bad words": lambda ids: [NoBadWordsLogitsProcessor([[1], [3, 4], [2, 3, 1]], eos_token_id=0)],
    "bad words, ends only": lambda ids: [NoBadWordsLogitsProcessor([[0]], eos_token_id=0)],
    "sequence bias": lambda ids: [SequenceBiasLogitsProcessor({(3,): 2.0, (4, 5): -3.0})],
    "min_length": lambda ids: [MinLengthLogitsProcessor(8, [2, 9])],
    "min_new_tokens": lambda ids: [MinNewTokensLengthLogitsProcessor(5, 4, [2, V + 3])],
    "suppress": lambda ids: [SuppressTokensLogitsProcessor([2, 9])],
    "suppress at begin": lambda ids: [SuppressTokensAtBeginLogitsProcessor([2, 9], 8)],
    "forced bos": lambda ids: [ForcedBOSTokenLogitsProcessor(2)],
    "forced eos": lambda ids: [ForcedEOSTokenLogitsProcessor(9, [2, 4])],
    "decay": lambda ids: [ExponentialDecayLengthPenalty((1, 1.3), 4, 5)],
    "inf": lambda ids: [InfNanRemoveLogitsProcessor()],
    "normalise": lambda ids: [LogitNormalization()],
    "watermark": lambda ids: [WatermarkLogitsProcessor(V, "cpu", context_width=1)],
    "order": lambda ids: [
        NoRepeatNGramLogitsProcessor(2),
        SuppressTokensLogitsProcessor([1]),
        TemperatureLogitsWarper(4.0),
        TopKLogitsWarper(10),
        TypicalLogitsWarper(0.95),
        TopPLogitsWarper(0.95),
        LogitNormalization(),
    ],
}


@pytest.mark.parametrize("case", CASES)
def test_law_equals_the_processors_on_every_path(case, ids_BP, layout, context, logits):
    processors = CASES[case](ids_BP)
    law = law_from_processors(processors, layout, is_greedy=False)
    before = logits.clone()
    laws = law(logits, context)
    assert torch.equal(logits, before), "the target's own logits were changed"
    is_pathwise = any(isinstance(stage, Pathwise) for stage in law.stages)
    reached = {(row, -1) for row in range(3)}
    for row, node, ids in paths(ids_BP):
        parent = PARENTS[row][node - 1] + 1 if node else -1
        is_possible = node == 0 or laws[row, parent, ids[-1]] > float("-inf")
        if is_pathwise and ((row, parent) not in reached or not is_possible):
            continue  # can never be accepted, so its law does not matter
        reached.add((row, node))
        # Rows beside this one keep the batch what the processor was made for.
        whole = torch.stack([torch.tensor(ids)] * 3)
        scores = logits[:, 0].clone()
        scores[row] = logits[row, node]
        for processor in processors:
            scores = processor(whole, scores)
        torch.testing.assert_close(laws[row, node], scores[row], msg=f"row {row}, node {node}")
    assert len(reached) > 3 + 4, "too few nodes were compared"


def test_a_constraint_is_asked_about_possible_drafts_only(ids_BP, layout, context, logits):
    processor = PrefixConstrainedLogitsProcessor(constraint, 1)
    laws = law_from_processors([processor], layout, is_greedy=True)(logits, context)
    assert laws[0, 0].isfinite().nonzero().flatten().tolist() == [1, 2, 4, 7]
    assert laws[0, 1].isfinite().nonzero().flatten().tolist() == [4, 5, 8]
    # 3 is not among them, so neither it nor the draft behind it was asked about.
    assert torch.equal(laws[0, 2], logits[0, 2])
    assert torch.equal(laws[0, 4], logits[0, 4])


def test_an_unsatisfiable_constraint_wins(layout, context, logits):
    stuck = torch.full_like(logits, float("-inf"))
    processor = PrefixConstrainedLogitsProcessor(lambda row, ids: [4], 1)
    laws = law_from_processors([processor], layout, is_greedy=True)(stuck, context)
    assert laws[0, 0].argmax() == 4


class Halved(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return torch.where(input_ids[:, -1:] % 2 == 0, scores / 2, scores)


class Quiet(TopKLogitsWarper):
    def __call__(self, input_ids, scores):
        return scores


def test_a_processor_vouched_for(ids_BP, layout, context, logits):
    for listed in ([Halved], (own := Halved(), [own])[1]):
        processor = listed[0] if not isinstance(listed[0], type) else Halved()
        laws = law_from_processors([processor], layout, is_greedy=True, stateless=listed)(
            logits, context
        )
        for row, node, ids in paths(ids_BP):
            expected = logits[row, node] / (2 if ids[-1] % 2 == 0 else 1)
            assert torch.equal(laws[row, node], expected)


@pytest.mark.parametrize("processor", [Halved(), Quiet(3), lambda ids, scores: scores])
def test_an_unknown_processor_is_refused_by_name(layout, processor):
    name = type(processor).__name__
    with pytest.raises(ValueError, match=rf"logits processor {name} is unknown.*stateless_proc"):
        law_from_processors([processor], layout, is_greedy=True)


@pytest.mark.parametrize(
    "cls",
    [
        SynthIDTextWatermarkLogitsProcessor,
        UnbatchedClassifierFreeGuidanceLogitsProcessor,
        WhisperTimeStampLogitsProcessor,
    ],
)
def test_a_stateful_processor_is_refused_by_name_even_if_listed(layout, cls):
    processor = object.__new__(cls)
    with pytest.raises(ValueError, match=f"{cls.__name__} keeps a state"):
        law_from_processors([processor], layout, is_greedy=True, stateless=[cls])


def test_bad_words_outside_the_vocabulary_are_refused(layout):
    with pytest.raises(ValueError, match=r"bad_words_ids must be below 13, got \[13\]"):
        law_from_processors([NoBadWordsLogitsProcessor([[V]])], layout, is_greedy=True)


def test_common_processors_stay_on_the_device(ids_BP, layout):
    """No call per node for what a usual request holds."""
    usual = (
        "temperature", "top_k", "top_p", "min_p", "repetition", "bad words", "min_length",
        "min_new_tokens", "suppress", "suppress at begin", "forced bos", "forced eos",
    )  # fmt: skip
    processors = [p for case in usual for p in CASES[case](ids_BP)]
    stages = law_from_processors(processors, layout, is_greedy=False).stages
    assert not any(isinstance(stage, Flat | Pathwise) for stage in stages)
