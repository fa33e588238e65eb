"""Packing and walking, against loops over single nodes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmspec.tree import ancestors, bucket, nodes_on_path, pack_chain, pack_trees, walk

VOCAB = 10
WIDTH = 8


@st.composite
def trees(draw):
    """Drafts of one row and a choice after every node; few tokens, so that matches are common."""
    count = draw(st.integers(0, WIDTH - 1))
    parents = [draw(st.integers(-1, index - 1)) for index in range(count)]
    tokens = [draw(st.integers(-1, 3)) for _ in range(count)]
    choices = [draw(st.integers(0, 2)) for _ in range(WIDTH)]
    return tokens, parents, choices


def slow_walk(tokens, parents, choices) -> tuple[list[int], list[int]]:
    """From the root on: the first valid child whose token is the choice."""
    path, node = [0], 0
    while True:
        fitting = [
            i + 1
            for i, (token, parent) in enumerate(zip(tokens, parents, strict=True))
            if parent + 1 == node and token == choices[node] and 0 <= token < VOCAB
        ]
        if not fitting:
            return path, [choices[n] for n in path]
        node = fitting[0]
        path.append(node)


def slow_ancestors(parents: list[int], node: int) -> set[int]:
    found = {0, node}
    while node:
        found.add(node)
        node = parents[node - 1] + 1
    return found


@settings(max_examples=120, deadline=None)
@given(st.lists(trees(), min_size=1, max_size=3))
def test_random_trees_against_loops(rows):
    tokens, parents = [r[0] for r in rows], [r[1] for r in rows]
    roots = torch.arange(len(rows))
    proposal = pack_trees(tokens, parents, roots, VOCAB, WIDTH)
    assert proposal.tokens_BN[:, 0].tolist() == roots.tolist()
    assert bool(proposal.valid_BN[:, 0].all())
    assert proposal.num_drafted == tuple(map(len, tokens))
    path, accepted = walk(proposal, torch.tensor([r[2] for r in rows]))
    for row, (row_tokens, row_parents, choices) in enumerate(rows):
        depth = [0]
        for i, parent in enumerate(row_parents):
            depth.append(depth[parent + 1] + 1)
            family = slow_ancestors(row_parents, i + 1)
            assert set(proposal.ancestors_BNN[row, i + 1].nonzero()[:, 0].tolist()) == family
            if not proposal.is_chain:
                assert int(proposal.parents_BN[row, i + 1]) == parent + 1
                assert int(proposal.depth_BN[row, i + 1]) == depth[-1]
            is_inside = 0 <= row_tokens[i] < VOCAB
            assert bool(proposal.valid_BN[row, i + 1]) == is_inside
        assert not bool(proposal.valid_BN[row, len(depth) :].any())
        assert proposal.num_levels[row] == max(depth)
        assert int(proposal.ancestors_BNN[row, :, 0].sum()) == WIDTH
        wanted, emitted = slow_walk(row_tokens, row_parents, choices)
        assert int(accepted[row]) == len(wanted) - 1
        assert path[row, : len(wanted)].tolist() == wanted
        assert [choices[n] for n in path[row, : len(wanted)].tolist()] == emitted
    assert int(proposal.tokens_BN.min()) >= 0
    assert int(proposal.tokens_BN.max()) < VOCAB


def test_worked_example_of_the_module():
    proposal = pack_trees([[7, 8, 9, 4]], [[-1, 0, 0, 2]], torch.tensor([5]), VOCAB, 5)
    assert proposal.tokens_BN.tolist() == [[5, 7, 8, 9, 4]]
    assert proposal.parents_BN.tolist() == [[0, 0, 1, 1, 3]]
    assert proposal.depth_BN.tolist() == [[0, 1, 2, 2, 3]]
    assert proposal.branching == 2
    choices = torch.tensor([[7, 9, 0, 6, 0]])
    path, accepted = walk(proposal, choices)
    assert accepted.tolist() == [2]
    assert path[0, :3].tolist() == [0, 1, 3]
    assert choices.gather(1, path)[0, :3].tolist() == [7, 9, 6]


def test_of_twins_only_the_first_counts():
    """Rules that test drafts would otherwise test one guess twice."""
    proposal = pack_trees([[3, 3, 4]], [[-1, -1, 1]], torch.tensor([0]), VOCAB, 4)
    _, accepted = walk(proposal, torch.tensor([[3, 9, 4, 9]]))
    assert accepted.tolist() == [1]
    # A twin of an invalid node is no twin.
    proposal = pack_trees([[VOCAB, 0, 4]], [[-1, -1, 1]], torch.tensor([0]), VOCAB, 4)
    _, accepted = walk(proposal, torch.tensor([[0, 9, 4, 9]]))
    assert accepted.tolist() == [2]


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5, 8, 9])
def test_ancestors_of_a_chain_reach_the_root(depth):
    parents = torch.arange(-1, depth).clamp(min=0)[None]
    reach = ancestors(parents, depth)
    assert torch.equal(reach[0], torch.ones(depth + 1, depth + 1).tril().bool())


def test_nodes_on_path_by_hand():
    parents = torch.tensor([[0, 0, 1, 1, 3], [0, 0, 0, 2, 2]])
    depth = torch.tensor([[0, 1, 2, 2, 3], [0, 1, 1, 2, 2]])
    path = nodes_on_path(ancestors(parents, 3), depth, torch.tensor([4, 3]), 5)
    assert path[0, :4].tolist() == [0, 1, 3, 4]
    assert path[1, :3].tolist() == [0, 2, 3]


def test_chains_ignore_what_is_past_their_drafts():
    tokens = torch.tensor([[1, 2, 3, 4], [1, 2, -5, 4], [1, 99, 3, 4]])
    proposal = pack_chain(tokens, [3, 2, 0], VOCAB)
    assert proposal.valid_BN.tolist() == [
        [True, True, True, True],
        [True, True, False, False],
        [True, False, False, False],
    ]
    _, accepted = walk(proposal, torch.tensor([[2, 3, 4, 0], [2, 0, 4, 0], [99, 3, 4, 0]]))
    assert accepted.tolist() == [3, 1, 0]


def test_rows_of_chains_are_packed_as_a_chain():
    roots = torch.tensor([1, 1])
    assert pack_trees([[4, 5], []], [[-1, 0], []], roots, VOCAB, 4).is_chain
    assert not pack_trees([[4, 5], []], [[-1, -1], []], roots, VOCAB, 4).is_chain


@pytest.mark.parametrize(
    ("tokens", "parents", "message"),
    [
        ([1, 2], [-1], "one parent per token"),
        ([1, 2, 3, 4], [-1, 0, 1, 2], "does not fit into 3 nodes"),
        ([1, 2], [-1, 1], "must come before it, got 1"),
        ([1, 2], [-1, -2], "must come before it, got -2"),
    ],
)
def test_bad_trees_are_refused(tokens, parents, message):
    with pytest.raises(ValueError, match=message):
        pack_trees([tokens], [parents], torch.tensor([0]), VOCAB, 4)


@pytest.mark.parametrize("counts", [[4], [-1], [1, 1]])
def test_bad_chains_are_refused(counts):
    with pytest.raises(ValueError, match="num_drafted"):
        pack_chain(torch.zeros(1, 4, dtype=torch.long), counts, VOCAB)


def test_buckets():
    assert [bucket(w) for w in (1, 2, 3, 5, 64, 65, 128)] == [1, 2, 4, 8, 64, 128, 128]
    for width in (0, 129):
        with pytest.raises(ValueError, match="between 1 and 128"):
            bucket(width)
