"""The automaton against a search through its corpus; its file; the merging of drafts."""

import random

import numpy as np
import pytest

from mmspec.drafters.drafts import Draft, merge
from mmspec.drafters.suffix import SEPARATOR, Match, MatchState, SuffixAutomaton


def longest_match(text, tokens):
    """Longest tail of the tokens that the text holds and continues; its latest end; its count."""
    for length in range(min(len(tokens), len(text)), 0, -1):
        ends = [
            end
            for end in range(length - 1, len(text))
            if text[end - length + 1 : end + 1] == tokens[-length:]
        ]
        continued = [end for end in ends if text[end + 1] != SEPARATOR]
        if continued:
            return Match(length, max(continued), len(ends))
    return Match()


def continuation(text, match, limit):
    if not match.length:
        return []
    after = text[match.end + 1 : match.end + 1 + limit]
    return after[: after.index(SEPARATOR)] if SEPARATOR in after else after


def random_document(rng, vocab_size, documents):
    if documents and rng.random() < 0.3:
        return list(rng.choice(documents))
    return [rng.randrange(vocab_size) for _ in range(rng.randrange(14))]


def assert_is_tree(draft, budget, max_depth, branching):
    assert len(draft) <= budget
    edges = list(zip(draft.parents, draft.tokens, strict=True))
    assert len(set(edges)) == len(edges)
    depths = []
    for i, parent in enumerate(draft.parents):
        assert -1 <= parent < i
        depths.append(1 if parent < 0 else depths[parent] + 1)
        assert 0 <= draft.scores[i] <= (1 if parent < 0 else draft.scores[parent])
        assert draft.parents.count(parent) <= branching
    assert max(depths, default=0) <= max_depth
    assert draft.scores == sorted(draft.scores, reverse=True)


def paths_of(draft):
    paths = []
    for token, parent in zip(draft.tokens, draft.parents, strict=True):
        paths.append([*(paths[parent] if parent >= 0 else []), token])
    return paths


@pytest.mark.parametrize("seed", range(40))
def test_match_and_chain_equal_a_search_while_the_corpus_grows(seed):
    rng = random.Random(seed)
    vocab_size = rng.choice([1, 2, 3, 6])
    corpus, documents, tokens = SuffixAutomaton(), [], []
    state = MatchState(corpus)
    text: list[int] = []
    for step in range(25):
        for _ in range(rng.choice([0, 1, 2]) if step % 6 == 0 else 0):
            documents.append(random_document(rng, vocab_size, documents))
            corpus.add_document(documents[-1])
            text += [*documents[-1], SEPARATOR] if documents[-1] else []
        new = [rng.randrange(vocab_size + 1) for _ in range(rng.choice([1, 2, 4]))]
        tokens += new
        state.extend(new)
        match = longest_match(text, tokens)
        assert state.longest_match() == match
        chain = continuation(text, match, 8)
        assert corpus.draft(state, budget=8) == Draft.chain(chain, match.length)
        tree = corpus.draft(state, 12, 6, branching=3)
        assert_is_tree(tree, 12, 6, 3)
        assert tree.tokens[:1] == chain[:1]
        for path in paths_of(tree):
            seen = [tokens[-1], *path]
            assert any(text[i : i + len(seen)] == seen for i in range(len(text)))
    assert corpus.num_tokens == len(text)
    assert corpus.num_states <= 2 * max(1, len(text))
    assert corpus.num_documents == text.count(SEPARATOR)


def test_a_long_run_of_one_token_takes_linear_time_and_is_right():
    corpus = SuffixAutomaton()
    corpus.add_document([7] * 3000)
    state = MatchState(corpus)
    state.extend([7] * 5000)
    assert state.longest_match() == Match(length=2999, end=2998, count=2)


def test_a_match_beats_any_trie_depth_and_stops_at_the_end_of_its_document():
    corpus = SuffixAutomaton()
    corpus.add_document([1, 2, 3, 4, 5, 6])
    corpus.add_document([9, 4, 8, 8])
    state = MatchState(corpus)
    state.extend([1, 2, 3, 4])
    assert state.longest_match() == Match(length=4, end=3, count=1)
    assert corpus.draft(state, budget=9).tokens == [5, 6]
    # The tail [5, 6] ends its document: nothing to draft, though it occurs.
    state.extend([5, 6])
    assert state.longest_match() == Match()
    assert corpus.draft(state, budget=9, branching=2) == Draft()


def test_a_tree_adds_what_follows_shorter_matches():
    corpus = SuffixAutomaton()
    corpus.add_document([1, 2, 3])
    corpus.add_document([5, 2, 4])
    state = MatchState(corpus)
    state.extend([1, 2])
    tree = corpus.draft(state, budget=4, branching=2)
    assert tree.tokens == [3, 4]
    assert tree.parents == [-1, -1]
    # Match [1, 2]: trust 2/4. Escape to [2] with 1 - 2/4: trust 1/3, share (1/2 + 1)/2.
    assert tree.scores == pytest.approx([1 / 2, 1 / 2 * 1 / 3 * 3 / 4])


def test_a_full_corpus_refuses_and_stays_as_it_was():
    corpus = SuffixAutomaton(max_tokens=6)
    corpus.add_document([1, 2, 3])
    with pytest.raises(ValueError, match=r"max_tokens=6 .* this document of 2 it would hold 7"):
        corpus.add_document([4, 5])
    assert corpus.num_tokens == 4
    corpus.add_document([4])
    corpus.add_document([])
    assert (corpus.num_tokens, corpus.num_documents) == (6, 2)


def test_a_saved_corpus_matches_and_grows_like_the_first(tmp_path):
    rng = random.Random(3)
    corpus = SuffixAutomaton(max_tokens=900)
    for _ in range(12):
        corpus.add_document([rng.randrange(4) for _ in range(30)])
    corpus.save(tmp_path / "corpus.bin")
    loaded = SuffixAutomaton.load(tmp_path / "corpus.bin")
    more = [rng.randrange(4) for _ in range(30)]
    tokens = [rng.randrange(4) for _ in range(40)]
    for _ in range(2):
        results = []
        for automaton in (corpus, loaded):
            state = MatchState(automaton)
            state.extend(tokens)
            draft = automaton.draft(state, 20, branching=2)
            results.append((state.longest_match(), draft, automaton.num_states))
            automaton.add_document(more)
        assert results[0] == results[1]
    with pytest.raises(ValueError, match="max_tokens=900"):
        loaded.add_document([1] * 900)


def test_an_empty_corpus_is_saved_too(tmp_path):
    SuffixAutomaton().save(tmp_path / "empty.npz")
    loaded = SuffixAutomaton.load(str(tmp_path / "empty.npz"))
    state = MatchState(loaded)
    state.extend([1, 2])
    assert state.longest_match() == Match()


@pytest.mark.parametrize(
    "change",
    [
        {"format": np.array("other")},
        {"link": np.array([0, 1], dtype=np.int32)},
        {"text": np.array([1, 2], dtype=np.int64)},
        {"more": np.array([[0, 1, 10**6]], dtype=np.int32)},
        {"max_tokens": np.array(1)},
        {"link": None},
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path, change):
    corpus = SuffixAutomaton()
    corpus.add_document([1, 2, 1, 3])
    path = tmp_path / "corpus.npz"
    corpus.save(path)
    with np.load(path) as stored:
        arrays = dict(stored) | change
    np.savez(path, **{name: values for name, values in arrays.items() if values is not None})
    with pytest.raises(ValueError, match=r"corpus\.npz is not a s"):
        SuffixAutomaton.load(path)


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 cut off"])
def test_a_file_of_another_kind_is_refused(tmp_path, content):
    path = tmp_path / "corpus.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"corpus\.npz is not a saved"):
        SuffixAutomaton.load(path)
    np.save(tmp_path / "corpus.npy", np.arange(3))
    with pytest.raises(ValueError, match=r"corpus\.npy is not a saved"):
        SuffixAutomaton.load(tmp_path / "corpus.npy")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda corpus, state: SuffixAutomaton(0), "max_tokens must be .* got 0"),
        (lambda corpus, state: SuffixAutomaton(2**31), "max_tokens must be at most .* got"),
        (lambda corpus, state: corpus.add_document([-1]), "tokens must be at least 0, got -1"),
        (lambda corpus, state: corpus.add_document([2**31]), "tokens must be at most .* got 2147"),
        (lambda corpus, state: state.extend(["a"]), "tokens must be whole numbers"),
        (lambda corpus, state: corpus.draft(state, -1), "budget must be .* got -1"),
        (lambda corpus, state: corpus.draft(state, 1, -1), "max_depth must be .* got -1"),
        (lambda corpus, state: corpus.draft(state, 1, branching=0), "branching must be .* got 0"),
        (
            lambda corpus, state: SuffixAutomaton().draft(state, 1),
            "state must be a match state of this automaton",
        ),
    ],
)
def test_bad_input_names_the_rule_and_the_value(call, message):
    corpus = SuffixAutomaton()
    state = MatchState(corpus)
    with pytest.raises(ValueError, match=message):
        call(corpus, state)
    assert corpus.num_tokens == 0


def test_merge_is_the_example_of_its_docstring():
    tree = merge([Draft.chain([5, 6, 7], 4), Draft.chain([5, 8], 2)], budget=4)
    assert tree.tokens == [5, 6, 7, 8]
    assert tree.parents == [-1, 0, 1, 0]
    assert tree.scores == pytest.approx([20 / 30, 20 / 42, 20 / 56, 6 / 20])
    assert tree.match_length == 4


def test_merge_without_scores_ranks_by_match_length_and_depth():
    tree = merge([Draft([1, 2], [-1, 0], 1), Draft([3, 4], [-1, -1], 5)], budget=3)
    assert tree.tokens == [3, 4, 1]
    assert tree.parents == [-1, -1, -1]


def test_merge_of_nothing_is_empty():
    assert merge([], 5) == Draft()
    assert merge([Draft(), Draft()], 5) == Draft()
    assert merge([Draft.chain([1], 1)], 0).tokens == []


@pytest.mark.parametrize("seed", range(40))
def test_merge_keeps_the_best_nodes_and_no_others(seed):
    rng = random.Random(seed)
    drafts = []
    for _ in range(rng.randrange(1, 5)):
        size = rng.randrange(8)
        drafts.append(
            Draft(
                [rng.randrange(3) for _ in range(size)],
                [rng.randrange(-1, i) for i in range(size)],
                rng.randrange(4),
                [rng.random() for _ in range(size)] if rng.random() < 0.7 else [],
            )
        )
    whole = merge(drafts, 100)
    assert_is_tree(whole, 100, 8, 3)
    paths = [tuple(path) for draft in drafts for path in paths_of(draft)]
    assert {tuple(path) for path in paths_of(whole)} == set(paths)
    budget = rng.randrange(10)
    kept = merge(drafts, budget)
    assert kept.tokens == whole.tokens[:budget]
    assert kept.parents == whole.parents[:budget]
