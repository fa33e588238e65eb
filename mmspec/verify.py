"""Acceptance rules. Each names its guarantee; see docs/verify.md for the derivations.

Every rule only *chooses a token after each node*; `mmspec.tree.walk` then accepts drafts for as
long as they equal the choice. So chains, trees and Jacobi windows share one walk, and a Jacobi
drafter finds its next guesses in the choices behind the accepted path.

Names follow the field: ``draft_probs`` is the law a draft was sampled from, ``target_probs`` the
law it should have. Shape suffixes as in `mmspec.records`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmspec import tree
from mmspec.noise import Salt, gumbel, uniform
from mmspec.records import Guarantee, Proposal, Scores, Verdict
from mmspec.rows import TokenRows
from mmspec.sampling import Law, sample

# Below this mass a residual is rounding error and the target's own law is used instead.
MIN_RESIDUAL = 1e-8


@dataclass(frozen=True, slots=True)
class SeededMatch:
    """Accept a draft while it equals the target's own seeded choice (greedy: its argmax).

    The output is the very sequence of plain decoding with the same seed, for every drafter, tree,
    window and batch. Also known as sample-and-match; the fixed-point form for windows goes back to
    predictive sampling (Wiggers and Hoogeboom 2020).
    """

    law: Law
    rows: TokenRows
    guarantee: Guarantee = Guarantee.EXACT

    def verify(self, proposal: Proposal, scores: Scores) -> Verdict:
        """Decides without a host read."""
        law_logits = self.law(scores.logits_BNV, self.rows.context(proposal, scores.positions_BN))
        noise = None
        if not self.law.is_greedy:
            noise = node_noise(self.rows, proposal, law_logits.shape[-1])
        return walked(proposal, sample(law_logits, noise), law_logits)


@dataclass(frozen=True, slots=True)
class SpeculativeSampling:
    """Accept with probability min(1, target/draft), else draw from the residual.

    Chains: Leviathan et al. 2023 (algorithm 1), Chen et al. 2023. Trees: children sampled without
    replacement are tried in order and the residual shrinks after each (Sequoia, Chen et al. 2024).
    Where the draft is deterministic the rule reduces to drawing once per node and walking to the
    child that equals the draw.
    """

    law: Law
    rows: TokenRows
    guarantee: Guarantee = Guarantee.DISTRIBUTION

    def verify(self, proposal: Proposal, scores: Scores) -> Verdict:
        """Decides without a host read."""
        law_logits = self.law(scores.logits_BNV, self.rows.context(proposal, scores.positions_BN))
        return walked(proposal, self.choices(proposal, scores, law_logits), law_logits)

    def choices(self, proposal: Proposal, scores: Scores, law_logits: Tensor) -> Tensor:
        """The token after each node."""
        vocab_size = law_logits.shape[-1]
        if proposal.draft_probs_BNV is None or self.law.is_greedy:
            noise = None
            if not self.law.is_greedy:
                noise = node_noise(self.rows, proposal, vocab_size)
            return sample(law_logits, noise)
        target_probs = law_logits.softmax(-1)
        draft_probs = proposal.draft_probs_BNV.to(target_probs.dtype)
        noise = node_noise(self.rows, proposal, vocab_size, Salt.RESIDUAL)
        next_BN = scores.positions_BN + 1
        children_BNK = children_of(proposal)
        tokens_BNK = proposal.tokens_BN[:, None].expand(-1, proposal.width, -1)
        tokens_BNK = tokens_BNK.gather(2, children_BNK.clamp(min=0))
        # The root is nobody's child, and its token may lie outside the vocabulary.
        tokens_BNK = torch.where(children_BNK >= 0, tokens_BNK, 0)
        tests = self.tests(target_probs, draft_probs, tokens_BNK, next_BN)
        return residual_choices(
            target_probs, draft_probs, tokens_BNK, children_BNK >= 0, tests, noise
        )

    def tests(
        self, target_probs: Tensor, draft_probs: Tensor, tokens_BNK: Tensor, next_BN: Tensor
    ) -> Tensor:
        """One uniform per child; it is accepted where ``test * draft <= target``."""
        num_tries = tokens_BNK.shape[-1]
        return torch.stack(
            [
                uniform(self.rows.keys_B, next_BN * num_tries + k, Salt.ACCEPT, self.rows.step)
                for k in range(num_tries)
            ],
            dim=-1,
        )


@dataclass(frozen=True, slots=True)
class MaximalCoupling(SpeculativeSampling):
    """Speculative sampling at *every* position of a Jacobi window, accepted prefix or not.

    The choice behind the prefix is the next draft, and its law is the law it was chosen by: that is
    what keeps the rule unbiased (SCD, arXiv 2510.24211; storing the old law does not).
    """


@dataclass(frozen=True, slots=True)
class IndependentRedraft(SpeculativeSampling):
    """Speculative Jacobi decoding as published (SJD, arXiv 2410.01699), for comparison.

    Positions behind the first rejection are drawn afresh from their new law, independently of what
    stood there.

    Attributes:
        law: The target's.
        rows: The rows.
        guarantee: Of the rule.
        shared_noise: Draw a position with the same noise in every step, so that it moves only as
            far as its law does (the Gumbel coupling of SCD, arXiv 2510.24211). The noise of a
            position decides nothing before it, so the law is kept.
    """

    shared_noise: bool = False

    def verify(self, proposal: Proposal, scores: Scores) -> Verdict:
        """Decides without a host read."""
        verdict = SpeculativeSampling.verify(self, proposal, scores)
        if self.law.is_greedy:
            return verdict
        law_logits = verdict.law_logits_BNV
        salt = Salt.CHOICE if self.shared_noise else Salt.DRAFT
        noise = node_noise(self.rows, proposal, law_logits.shape[-1], salt)
        is_behind = proposal.depth_BN > verdict.num_accepted_B[:, None]
        choices = torch.where(is_behind, sample(law_logits, noise), verdict.choices_BN)
        return Verdict(
            choices_BN=choices,
            path_BM=verdict.path_BM,
            emitted_BM=verdict.emitted_BM,
            num_accepted_B=verdict.num_accepted_B,
            law_logits_BNV=law_logits,
        )


@dataclass(frozen=True, slots=True)
class BlockVerification:
    """Judges a chain as a whole; never accepts fewer in expectation (Sun et al. 2024, 2403.10444).

    Trees are refused: the rule is defined for chains. A Jacobi drafter may use it: the guesses
    behind the accepted block are drawn afresh from their laws, whatever stood there.
    """

    law: Law
    rows: TokenRows
    guarantee: Guarantee = Guarantee.DISTRIBUTION

    def verify(self, proposal: Proposal, scores: Scores) -> Verdict:
        """Decides without a host read.

        Raises:
            ValueError: If the proposal is a tree.
        """
        if not proposal.is_chain:
            raise ValueError("block verification needs a chain, got a tree")
        law_logits = self.law(scores.logits_BNV, self.rows.context(proposal, scores.positions_BN))
        if proposal.draft_probs_BNV is None or self.law.is_greedy:
            noise = None
            if not self.law.is_greedy:
                noise = node_noise(self.rows, proposal, law_logits.shape[-1])
            return walked(proposal, sample(law_logits, noise), law_logits)
        # A block is judged as a whole, so drafts past the end of a row, where nodes share positions
        # and noise, would move those before them.
        in_row_BN = self.rows.last_B[:, None] + proposal.depth_BN < self.rows.limits_B[:, None]
        next_BN = scores.positions_BN + 1
        tests = uniform(self.rows.keys_B, next_BN, Salt.BLOCK, self.rows.step)
        noise = node_noise(self.rows, proposal, law_logits.shape[-1], Salt.RESIDUAL)
        emitted_BN, num_accepted_B = block_choices(
            law_logits.softmax(-1),
            proposal.draft_probs_BNV.to(law_logits.dtype),
            proposal.tokens_BN,
            proposal.valid_BN & in_row_BN,
            tests,
            noise,
        )
        # The noise behind the accepted block has decided nothing yet, so it may serve there.
        is_behind = proposal.depth_BN > num_accepted_B[:, None]
        return Verdict(
            choices_BN=torch.where(is_behind, sample(law_logits, noise), emitted_BN),
            path_BM=proposal.depth_BN,
            emitted_BM=emitted_BN,
            num_accepted_B=num_accepted_B,
            law_logits_BNV=law_logits,
        )


RULES: dict[str, Callable[[Law, TokenRows], SeededMatch | SpeculativeSampling | BlockVerification]]
RULES = {
    "exact": SeededMatch,
    "speculative": SpeculativeSampling,
    "block": BlockVerification,
    "coupled": MaximalCoupling,
    "sjd": IndependentRedraft,
}


def build_rule(
    name: str, law: Law, rows: TokenRows
) -> SeededMatch | SpeculativeSampling | BlockVerification:
    """Makes a rule by name.

    Raises:
        ValueError: If the name is unknown; the message lists the known ones.
    """
    if name not in RULES:
        raise ValueError(f"unknown rule {name!r}; known: {', '.join(sorted(RULES))}")
    return RULES[name](law, rows)


# --------------------------------------------------------------------------- tensor functions


def node_noise(
    rows: TokenRows, proposal: Proposal, vocab_size: int, salt: int = Salt.CHOICE
) -> Float[Tensor, "B N V"]:
    """Gumbel noise of the token after each node.

    The choice itself (`Salt.CHOICE`) depends on nothing but row and position. The other salts are
    for tests that may be repeated at a position, so the step is mixed in to keep them fresh.
    """
    # Nodes of one depth share their position, hence their noise: it is made once per depth.
    if salt == Salt.CHOICE:
        noise = rows.choice_noise(proposal.width, vocab_size)
    else:
        span = torch.arange(proposal.width, device=rows.lengths_B.device)
        noise = gumbel(rows.keys_B, rows.lengths_B[:, None] + span, vocab_size, salt, rows.step)
    if proposal.is_chain:
        return noise
    row_B1 = torch.arange(rows.num_rows, device=noise.device)[:, None]
    return noise[row_B1, proposal.depth_BN]


def children_of(proposal: Proposal) -> Int[Tensor, "B N K"]:
    """Valid children of each node in packed order, padded with -1."""
    if proposal.is_chain:
        child = torch.arange(1, proposal.width + 1, device=proposal.tokens_BN.device)
        is_real = torch.nn.functional.pad(proposal.valid_BN[:, 1:], (0, 1), value=False)
        return torch.where(is_real, child, -1)[..., None]
    width = proposal.width
    node = torch.arange(width, device=proposal.tokens_BN.device)
    is_child = (proposal.parents_BN[:, None, :] == node[:, None]) & (node > 0)
    is_child &= proposal.valid_BN[:, None, :]
    order = torch.where(is_child, node, width).sort(-1).values
    return torch.where(order < width, order, -1)[..., : proposal.branching]


def _sane_law(draft_probs: Tensor) -> Bool[Tensor, "..."]:
    """Which draft laws are laws; a draft from anything else is refused, which keeps the target."""
    finite = draft_probs.isfinite().all(-1) & (draft_probs >= 0).all(-1)
    return finite & ((draft_probs.sum(-1) - 1).abs() < 1e-3)


def residual_choices(
    target_probs: Float[Tensor, "B N V"],
    draft_probs: Float[Tensor, "B N V"],
    tokens: Int[Tensor, "B N K"],
    is_drafted: Bool[Tensor, "B N K"],
    tests: Float[Tensor, "B N K"],
    noise: Float[Tensor, "B N V"],
) -> Int[Tensor, "B N"]:
    """Tries each node's children in order; draws from what is left if none is accepted.

    Args:
        target_probs: Law of the token after each node.
        draft_probs: Law its children were sampled from, without replacement.
        tokens: Children's tokens.
        is_drafted: Which of them exist.
        tests: One uniform per child.
        noise: Gumbel noise for the final draw.
    """
    is_sane = _sane_law(draft_probs)
    draft = torch.where(is_sane[..., None], draft_probs, 0.0)
    left = target_probs
    chosen = torch.full_like(tokens[..., 0], -1)
    for k in range(tokens.shape[-1]):
        token = tokens[..., k : k + 1]
        draft_at = draft.gather(-1, token)
        left_at = left.gather(-1, token)
        # A child of draft mass 0 was not sampled from this law (a duplicate, a fault): refuse it.
        is_try = (is_drafted[..., k : k + 1] & (draft_at > 0)) & (chosen[..., None] < 0)
        accept = is_try & (left_at > 0) & (tests[..., k : k + 1] * draft_at <= left_at)
        chosen = torch.where(accept.squeeze(-1), token.squeeze(-1), chosen)
        refused = is_try & ~accept
        left = torch.where(refused, _normalised((left - draft).clamp(min=0), left), left)
        without = draft.scatter(-1, token, 0.0)
        draft = torch.where(refused, _normalised(without, without), draft)
    drawn = (left.log() + noise).argmax(-1)
    return torch.where(chosen >= 0, chosen, drawn)


def _normalised(weights: Tensor, fallback: Tensor) -> Tensor:
    mass = weights.sum(-1, keepdim=True)
    return torch.where(mass > MIN_RESIDUAL, weights / mass.clamp(min=MIN_RESIDUAL), fallback)


def block_choices(
    target_probs: Float[Tensor, "B N V"],
    draft_probs: Float[Tensor, "B N V"],
    tokens_BN: Int[Tensor, "B N"],
    valid_BN: Bool[Tensor, "B N"],
    tests: Float[Tensor, "B N"],
    noise: Float[Tensor, "B N V"],
) -> tuple[Int[Tensor, "B N"], Int[Tensor, "B"]]:
    """Block verification of a chain.

    With ``w_0 = 1`` and ``w_i = min(1, w_{i-1} * target(x_i) / draft(x_i))``, draft i is the end of
    the accepted block if it is the last with ``test_i <= h_i``, where
    ``h_i = S_i / (S_i + 1 - w_i)``, ``S_i = sum(max(w_i * target_{i+1} - draft_{i+1}, 0))``, and
    ``h = w`` at the end of the chain. The next token is drawn from
    ``max(w_i * target_{i+1} - draft_{i+1}, 0)``.

    Returns:
        The emitted tokens (accepted drafts, then the drawn token) and the number accepted.
    """
    child_BN = torch.nn.functional.pad(tokens_BN[:, 1:], (0, 1))
    has_child = torch.nn.functional.pad(valid_BN[:, 1:], (0, 1), value=False) & _sane_law(
        draft_probs
    )
    draft_at = draft_probs.nan_to_num(0.0).gather(-1, child_BN[..., None]).squeeze(-1)
    target_at = target_probs.gather(-1, child_BN[..., None]).squeeze(-1)
    has_child = (has_child & (draft_at > 0)).long().cumprod(1).bool()
    ratio = torch.where(has_child, target_at / draft_at.clamp(min=1e-37), 0.0)
    # w_i = min(1, w_{i-1} r_i) is a sum of logs reflected at 0: S_i - max(0, S_1, ..., S_i).
    total = torch.nn.functional.pad(ratio[:, :-1].log().cumsum(1), (1, 0))
    weight_BN = (total - total.cummax(1).values).exp()
    draft = torch.where(has_child[..., None], draft_probs.nan_to_num(0.0), 0.0)
    residual = (weight_BN[..., None] * target_probs - draft).clamp(min=0)
    mass = residual.sum(-1)
    inner = mass / (mass + 1 - weight_BN).clamp(min=MIN_RESIDUAL)
    accept_prob = torch.where(has_child, inner, weight_BN)
    node = torch.arange(tokens_BN.shape[1], device=tokens_BN.device)
    # Node i stands for draft i; node 0 (nothing accepted) is always possible. The test of draft i
    # is indexed by the token's own position, one before the position that follows it.
    passes = torch.roll(tests, 1, 1) <= accept_prob
    is_drafted = torch.nn.functional.pad(has_child[:, :-1], (1, 0), value=True)
    passes = (passes | (node == 0)) & is_drafted
    num_accepted_B = torch.where(passes, node, -1).amax(1)
    at_end = num_accepted_B[:, None, None].expand(-1, 1, target_probs.shape[-1])
    final = _normalised(residual, target_probs).gather(1, at_end).squeeze(1)
    drawn_B = (final.log() + noise.gather(1, at_end).squeeze(1)).argmax(-1)
    emitted = torch.where(node == num_accepted_B[:, None], drawn_B[:, None], child_BN)
    return emitted, num_accepted_B


def walked(
    proposal: Proposal, choices_BN: Tensor, law_logits: Tensor, settled_BN: Tensor | None = None
) -> Verdict:
    """The verdict of a rule that chose these tokens: drafts are accepted while they equal them."""
    path_BM, num_accepted_B = tree.walk(proposal, choices_BN)
    return Verdict(
        choices_BN=choices_BN,
        path_BM=path_BM,
        emitted_BM=choices_BN if proposal.is_chain else choices_BN.gather(1, path_BM),
        num_accepted_B=num_accepted_B,
        law_logits_BNV=law_logits,
        settled_BN=settled_BN,
    )
