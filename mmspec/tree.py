"""Draft trees: packing, ancestors, and the walk that turns choices into an accepted path.

A tree is packed parents first; node 0 is the root (the last committed token). Worked example, used
by the tests: the drafts ``7 -> 8`` and ``7 -> 9 -> 4`` under the root ``5`` merge into

    node     0   1   2   3   4
    token    5   7   8   9   4
    parent   0   0   1   1   3
    depth    0   1   2   2   3

and if the rule chooses 7 after node 0, 9 after node 1 and 6 after node 3, the accepted path is
``[0, 1, 3]`` and the emitted tokens are ``[7, 9, 6]``.

Shape suffixes as in `mmspec.records`.
"""

import functools
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mmspec.records import Proposal

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)


def bucket(width: int, largest: int = BUCKETS[-1]) -> int:
    """The smallest bucket that holds ``width`` nodes, so that few shapes reach the target.

    Raises:
        ValueError: If ``width`` is below 1 or above ``largest``.
    """
    if not 1 <= width <= largest:
        raise ValueError(f"width must be between 1 and {largest}, got {width}")
    return next((b for b in BUCKETS if b >= width), width)


def pack_chain(
    tokens_BN: Int[Tensor, "B N"],
    num_drafted: Sequence[int],
    vocab_size: int | None,
    draft_probs_BNV: Tensor | None = None,
) -> Proposal:
    """A chain per row from the root and its drafts.

    Args:
        tokens_BN: The root and the drafts of each row; entries past a row's drafts are ignored.
        num_drafted: Drafts of each row, at most N - 1.
        vocab_size: The target's vocabulary; a draft outside it is made invalid. None if the drafts
            are known to lie inside.
        draft_probs_BNV: As in `Proposal`.

    Raises:
        ValueError: If ``num_drafted`` does not fit the tokens.
    """
    num_rows, num_nodes = tokens_BN.shape
    if len(num_drafted) != num_rows or not all(0 <= n < num_nodes for n in num_drafted):
        raise ValueError(
            f"num_drafted must hold {num_rows} counts of 0 to {num_nodes - 1}, got {num_drafted!r}"
        )
    parents_BN, depth_BN, ancestors_BNN = chains(num_rows, num_nodes, tokens_BN.device)
    valid_BN = ancestors_BNN[:, -1]  # the last node comes from all
    if min(num_drafted) < num_nodes - 1:
        count_B = torch.tensor(list(num_drafted), device=tokens_BN.device)
        valid_BN = depth_BN <= count_B[:, None]
    if vocab_size is not None:
        tokens_BN, valid_BN = _validated(tokens_BN, valid_BN, vocab_size)
    return Proposal(
        tokens_BN=tokens_BN,
        valid_BN=valid_BN,
        parents_BN=parents_BN,
        depth_BN=depth_BN,
        ancestors_BNN=ancestors_BNN,
        is_chain=True,
        num_drafted=tuple(num_drafted),
        num_levels=tuple(num_drafted),
        draft_probs_BNV=draft_probs_BNV,
    )


@functools.lru_cache(maxsize=32)
def chains(num_rows: int, num_nodes: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Parents, depth and ancestors of chains; windows of one width ask in every step.

    They are shared by all who ask, and must not be written to.
    """
    node = torch.arange(num_nodes, device=device)
    return (
        (node - 1).clamp(min=0).expand(num_rows, -1),
        node.expand(num_rows, -1),
        (node[:, None] >= node).expand(num_rows, -1, -1),
    )


@functools.lru_cache(maxsize=32)
def _lone_root(num_rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Index 0 and "yes" for the only node of each row; plain decoding asks in every step."""
    zeros_B1 = torch.zeros(num_rows, 1, dtype=torch.long, device=device)
    return zeros_B1, torch.ones_like(zeros_B1, dtype=torch.bool)


def pack_roots(roots_B: Int[Tensor, "B"]) -> Proposal:
    """No drafts: plain decoding of one token per row, with nothing to compute."""
    zeros_B1, true_B1 = _lone_root(roots_B.shape[0], roots_B.device)
    none = (0,) * roots_B.shape[0]
    return Proposal(
        tokens_BN=roots_B[:, None],
        parents_BN=zeros_B1,
        valid_BN=true_B1,
        depth_BN=zeros_B1,
        ancestors_BNN=true_B1[..., None],
        is_chain=True,
        num_drafted=none,
        num_levels=none,
    )


def pack_trees(
    tokens: Sequence[Sequence[int]],
    parents: Sequence[Sequence[int]],
    roots_B: Int[Tensor, "B"],
    vocab_size: int,
    width: int,
) -> Proposal:
    """A tree per row from host lists.

    Args:
        tokens: Drafted tokens of each row, parents first.
        parents: Index of each draft's parent within the row's drafts, -1 for the root.
        roots_B: The last committed token of each row.
        vocab_size: The target's vocabulary.
        width: N; every row's drafts must fit into N - 1.

    Raises:
        ValueError: If a row has too many drafts or a parent that does not come before its child.
    """
    for row_tokens, row_parents in zip(tokens, parents, strict=True):
        _check_tree(row_tokens, row_parents, width)
    drafted = tuple(map(len, tokens))
    # Padding is no token, and hangs under the root, where nobody takes it for an ancestor.
    token_rows = [[0, *row, *[-1] * (width - 1 - len(row))] for row in tokens]
    if all(list(row) == list(range(-1, len(row) - 1)) for row in parents):
        tokens_BN = torch.from_numpy(np.array(token_rows, dtype=np.int64)).to(roots_B.device)
        tokens_BN[:, 0] = roots_B
        return pack_chain(tokens_BN, drafted, vocab_size)
    parent_rows = [[0, *(p + 1 for p in row), *[0] * (width - 1 - len(row))] for row in parents]
    depth_rows = list(map(_depths, parent_rows))
    # All is known on the host, where these are not worth a tensor's call: only the result moves.
    packed_3BN = np.array([token_rows, parent_rows, depth_rows], dtype=np.int64)
    is_valid_BN = (packed_3BN[0] >= 0) & (packed_3BN[0] < vocab_size)
    packed_3BN[0] *= is_valid_BN
    tokens_BN, parents_BN, depth_BN = torch.from_numpy(packed_3BN).to(roots_B.device).unbind()
    tokens_BN[:, 0] = roots_B
    return Proposal(
        tokens_BN=tokens_BN,
        valid_BN=torch.from_numpy(is_valid_BN).to(roots_B.device),
        parents_BN=parents_BN,
        depth_BN=depth_BN,
        ancestors_BNN=ancestors(parents_BN, int(packed_3BN[2].max())),
        is_chain=False,
        num_drafted=drafted,
        num_levels=tuple(
            max(row[: count + 1]) for row, count in zip(depth_rows, drafted, strict=True)
        ),
        branching=max(max(Counter(row).values(), default=1) for row in map(list, parents)),
    )


def _depths(parents: Sequence[int]) -> list[int]:
    """Depth of each node of a packed tree, the root's being 0."""
    depths = [0]
    for parent in parents[1:]:
        depths.append(depths[parent] + 1)
    return depths


def _check_tree(tokens: Sequence[int], parents: Sequence[int], width: int) -> None:
    if len(tokens) != len(parents):
        raise ValueError(f"a tree needs one parent per token, got {len(parents)} for {len(tokens)}")
    if len(tokens) > width - 1:
        raise ValueError(f"a tree of {len(tokens)} drafts does not fit into {width - 1} nodes")
    for index, parent in enumerate(parents):
        if not -1 <= parent < index:
            raise ValueError(f"parent of node {index} must come before it, got {parent}")


def _validated(tokens_BN: Tensor, drafted_BN: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Ids outside the vocabulary become invalid before anything can embed them."""
    valid_BN = drafted_BN & (tokens_BN >= 0) & (tokens_BN < vocab_size)
    # The root is committed; in image generation it may be a text token of another vocabulary.
    valid_BN[:, 0] = True
    return torch.where(valid_BN, tokens_BN, 0), valid_BN


def ancestors(parents_BN: Int[Tensor, "B N"], max_depth: int) -> Bool[Tensor, "B N N"]:
    """``[b, i, j]`` is True where j is i or an ancestor of i.

    Every node takes over what a node above it sees, from twice as far up each time, so the number
    of steps is logarithmic in the depth.
    """
    num_rows, num_nodes = parents_BN.shape
    eye = torch.eye(num_nodes, dtype=torch.bool, device=parents_BN.device)
    reach = eye.expand(num_rows, -1, -1).scatter(2, parents_BN[..., None], True)
    up_BN = parents_BN
    for _ in range(max(max_depth - 1, 0).bit_length()):
        up_BN = up_BN.gather(1, up_BN)
        reach = reach | reach.gather(1, up_BN[..., None].expand_as(reach))
    return reach


def nodes_on_path(
    ancestors_BNN: Bool[Tensor, "B N N"],
    depth_BN: Int[Tensor, "B N"],
    leaf_B: Int[Tensor, "B"],
    length: int,
) -> Int[Tensor, "B M"]:
    """Node indices from the root to a leaf; entries past the leaf's depth repeat the root."""
    num_nodes = depth_BN.shape[1]
    on_path = ancestors_BNN.gather(1, leaf_B[:, None, None].expand(-1, 1, num_nodes)).squeeze(1)
    slot = torch.where(on_path, depth_BN, length)
    path = torch.zeros((leaf_B.shape[0], length + 1), dtype=torch.long, device=depth_BN.device)
    node = torch.arange(num_nodes, device=depth_BN.device).expand_as(slot)
    # Nodes off the path all land in the spare last column, which is dropped.
    return path.scatter(1, slot, node)[:, :length]


def walk(
    proposal: Proposal, choices_BN: Int[Tensor, "B N"]
) -> tuple[Int[Tensor, "B M"], Int[Tensor, "B"]]:
    """Follows the choices from the root down for as long as they were drafted.

    A node survives if it equals the choice after its parent and its parent survives. Every node is
    judged once, never once per path. Of duplicate siblings (a drafter may send them) only the first
    survives: rules that test drafts would otherwise test twice and keep the longer path.

    Returns:
        The accepted path (M = N for a chain) and the number of accepted drafts.
    """
    depth_BN = proposal.depth_BN
    if proposal.width == 1:
        return depth_BN, depth_BN[:, 0]
    if proposal.is_chain:
        fits = (proposal.tokens_BN[:, 1:] == choices_BN[:, :-1]) & proposal.valid_BN[:, 1:]
        return depth_BN, fits.cumprod(1).sum(1)
    parent_choice = choices_BN.gather(1, proposal.parents_BN)
    fits = (proposal.tokens_BN == parent_choice) & proposal.valid_BN & (depth_BN > 0)
    # The root needs no choice; every other node needs all its ancestors.
    fits = (fits & ~_repeats(proposal, fits)) | (depth_BN == 0)
    survives = (proposal.ancestors_BNN <= fits[:, None]).all(-1)
    num_accepted_B, leaf_B = torch.where(survives, depth_BN, -1).max(1)
    path = nodes_on_path(proposal.ancestors_BNN, depth_BN, leaf_B, proposal.width)
    return path, num_accepted_B


def _repeats(proposal: Proposal, fits_BN: Bool[Tensor, "B N"]) -> Bool[Tensor, "B N"]:
    """Nodes behind a sibling that fits; of those that fit, all have the token of the choice."""
    parents_BN = proposal.parents_BN
    is_sibling = parents_BN[:, :, None] == parents_BN[:, None]
    return (is_sibling & fits_BN[:, None]).tril_(-1).any(-1)
