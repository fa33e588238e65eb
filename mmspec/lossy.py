"""Acceptance rules that change the law: fewer forwards for other, possibly worse, outputs.

They are asked for by name only and say `Guarantee.LOSSY`. Each is a lossless rule with one bound
relaxed, ``lenience`` in [0, 1]; at 0 it is that rule. docs/image_decoders.md measures what they
cost and bring. Shape suffixes as in `mmspec.records`; C counts the codes of a cluster, G grid rows.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mmspec.records import Guarantee, Proposal, Scores, Verdict
from mmspec.rows import TokenRows
from mmspec.sampling import Law, sample
from mmspec.verify import MaximalCoupling, node_noise, walked

# Keeps a quotient finite; such a draft is refused in any case.
_TINY = 1e-37


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedAcceptance(MaximalCoupling):
    """Accept a draft by the mass of its cluster of near codes (GSD, arXiv 2508.07747); lossy.

    The cluster of a draft: the codes within `RANKS` ranks of it in the order of the target's
    probability, less than `NEARNESS` away from it in probability, and less than ``lenience`` away
    in embedding. It is accepted with probability ``min(1, target(cluster) / draft(cluster))``; the
    draw after a refusal is that of speculative sampling. GSD redraws the rest of the window
    independently; here it is coupled, which needs fewer forwards.

    Attributes:
        codes_VH: Embedding of every code.
        lenience: Radius of a cluster, in root mean square distances between two codes. At 0 a
            cluster is the draft alone, and the rule is maximal coupling.
    """

    #: As in GSD's released code.
    RANKS: ClassVar[int] = 7
    NEARNESS: ClassVar[float] = 0.15
    codes_VH: Tensor
    lenience: float = 0.5
    guarantee: Guarantee = Guarantee.LOSSY

    def tests(
        self, target_probs: Tensor, draft_probs: Tensor, tokens_BNK: Tensor, next_BN: Tensor
    ) -> Tensor:
        """Uniforms scaled so that testing the draft alone is testing its cluster."""
        # Not super(): a dataclass with slots is another class than the one its methods know.
        tests = MaximalCoupling.tests(self, target_probs, draft_probs, tokens_BNK, next_BN)
        member_BNKC, is_near = self._clusters(target_probs, tokens_BNK)
        drafted = _mass_ratio(draft_probs, tokens_BNK, member_BNKC, is_near)
        lenient = tests * drafted / _mass_ratio(target_probs, tokens_BNK, member_BNKC, is_near)
        return torch.where(is_near.sum(-1) > 1, lenient, tests)

    def _clusters(self, target_probs: Tensor, tokens_BNK: Tensor) -> tuple[Tensor, Tensor]:
        """Candidates for each draft's cluster, and which of them are in it."""
        order_BNV = target_probs.sort(dim=-1, descending=True, stable=True).indices
        offset = torch.arange(-self.RANKS, self.RANKS + 1, device=order_BNV.device)
        rank_BNKC = order_BNV.argsort(-1).gather(2, tokens_BNK)[..., None] + offset
        is_near = (rank_BNKC >= 0) & (rank_BNKC < order_BNV.shape[-1])
        rank_BNKC = rank_BNKC.clamp(0, order_BNV.shape[-1] - 1)
        member_BNKC = order_BNV.gather(2, rank_BNKC.flatten(2)).view_as(rank_BNKC)
        probs = target_probs.gather(2, member_BNKC.flatten(2)).view_as(rank_BNKC)
        is_near &= (probs - target_probs.gather(2, tokens_BNK)[..., None]).abs() < self.NEARNESS
        # Twice the variance is the mean square distance of two codes, without making all pairs.
        scale = (2 * self.codes_VH.var(0, correction=0).sum()).sqrt()
        between = self.codes_VH[member_BNKC] - self.codes_VH[tokens_BNK][..., None, :]
        is_near &= between.norm(dim=-1) < self.lenience * scale
        return member_BNKC, is_near | (offset == 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class OverlappingRows:
    """Begin a row of a grid before the one above is complete (ZipAR, arXiv 2412.04062); lossy.

    Seeded match, but a choice of a later row is *settled* as soon as it was made with its
    neighbours settled: everything to its left in its row, and the row above up to some columns
    past its own. A settled choice is not judged again when the prefix reaches it, although what
    came in between may have changed. Rows so advance side by side, and each by as many codes as
    hold (as in PJD, arXiv 2606.05703). Unlike there, the rest of the row above is not hidden from
    the model: it sees the present guesses.

    Attributes:
        law: The target's.
        rows: The rows.
        stride: Positions in a grid row.
        first: New tokens before the grid, which are judged as ever.
        lenience: Share of the row above that need not be settled. At 0 a row waits for the whole
            row above, and the rule is seeded match; at 1 a code waits for the one above it.
    """

    law: Law
    rows: TokenRows
    stride: int
    first: int = 0
    lenience: float = 0.75
    guarantee: Guarantee = Guarantee.LOSSY

    def verify(self, proposal: Proposal, scores: Scores) -> Verdict:
        """Decides without a host read.

        Raises:
            ValueError: If the proposal is a tree.
        """
        if not proposal.is_chain:
            raise ValueError("overlapping rows need a chain, got a tree")
        law_logits = self.law(scores.logits_BNV, self.rows.context(proposal, scores.positions_BN))
        noise = None
        if not self.law.is_greedy:
            noise = node_noise(self.rows, proposal, law_logits.shape[-1])
        drawn_BN = sample(law_logits, noise)
        child_BN = torch.nn.functional.pad(proposal.tokens_BN[:, 1:], (0, 1))
        has_child = torch.nn.functional.pad(proposal.valid_BN[:, 1:], (0, 1), value=False)
        stands = torch.zeros_like(has_child)
        if proposal.settled_BN is not None:
            stands = torch.nn.functional.pad(proposal.settled_BN[:, 1:], (0, 1)) & has_child
        begin_B = self.rows.lengths_B - self.rows.prompt_lengths_B - self.first
        ready = settled_in_rows(
            stands | (has_child & (drawn_BN == child_BN)),
            begin_B,
            self.stride,
            round((1 - self.lenience) * self.stride),
        )
        choices_BN = torch.where(stands, child_BN, drawn_BN)
        return walked(proposal, choices_BN, law_logits, ready | stands)


def _mass_ratio(probs: Tensor, tokens_BNK: Tensor, member_BNKC: Tensor, is_near: Tensor) -> Tensor:
    """Mass of each draft's cluster over that of the draft."""
    mass = probs.gather(2, member_BNKC.flatten(2)).view_as(member_BNKC) * is_near
    return mass.sum(-1) / probs.gather(2, tokens_BNK).clamp(min=_TINY)


def settled_in_rows(
    holds_BN: Bool[Tensor, "B N"], begin_B: Int[Tensor, "B"], stride: int, lookahead: int
) -> Bool[Tensor, "B N"]:
    """Which choices were made with their neighbours settled.

    In a grid row the settled codes are the first few. With ``n_r`` of them known to the forward,
    ``n_r = min(run_r, n_{r-1} - lookahead)``, where ``run_r`` is how many hold from the left, and
    a complete row sets no limit. The choice behind them is settled as well.

    Args:
        holds_BN: The draft behind node n is settled, or is what the rule chose.
        begin_B: Place in the grid of the position behind the root; below 0 nothing is settled.
        stride: Positions in a grid row.
        lookahead: Columns of the row above past a code's own that must be settled before it.
    """
    num_rows, num_nodes = holds_BN.shape
    num_lines = (num_nodes + stride - 2) // stride + 1
    place_BN = begin_B[:, None] % stride + torch.arange(num_nodes, device=begin_B.device)
    # What lies left of the window in its first line is committed.
    column = torch.arange(num_lines * stride, device=begin_B.device)
    grid = (column < begin_B[:, None] % stride).scatter(1, place_BN, holds_BN)
    run_BG = grid.view(num_rows, num_lines, stride).long().cumprod(-1).sum(-1)
    behind = torch.arange(num_lines, device=begin_B.device) * lookahead
    no_limit = num_lines * (stride + lookahead) + stride
    reach_BG = torch.where(run_BG == stride, no_limit, run_BG + behind).cummin(1).values
    above_BG = torch.nn.functional.pad(reach_BG[:, :-1], (1, 0), value=no_limit)
    ready_BG = torch.minimum(run_BG + 1, above_BG - behind)
    is_ready = (column % stride) < ready_BG.repeat_interleave(stride, dim=1)
    return is_ready.gather(1, place_BN) & (begin_B >= 0)[:, None]
