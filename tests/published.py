"""Rules and drafters of published decoders of image tokens, where they differ from ours.

Each is our reimplementation of a rule as it is described, not its authors' code; most of them do
not keep the law, which is what `test_verify.py` and `benchmarks/published_image_decoders.py` show.
`CoupledBlock` is nobody's decoder: a rule of our own that was measured and not taken up.
"""

import dataclasses
from dataclasses import dataclass

import torch

from mmspec.drafters.jacobi import JacobiDrafter
from mmspec.noise import Salt, uniform
from mmspec.sampling import sample
from mmspec.verify import (
    BlockVerification,
    IndependentRedraft,
    node_noise,
    residual_choices,
    walked,
)


class StaleLaws(JacobiDrafter):
    """Where a guess was kept, keeps the law it was first drawn from (SCD as released)."""

    def commit(self, proposal, scores, verdict, outcome):
        super().commit(proposal, scores, verdict, outcome)
        if proposal.draft_probs_BNV is None:
            return
        kept = self.kept(verdict.choices_BN[:, :-1] == proposal.tokens_BN[:, 1:])
        slot = (scores.positions_BN[:, :-1] + 1) % self._ring
        stale = proposal.draft_probs_BNV[:, :-1].log()
        fresh = self._laws_BRV[self._row_B1, slot]
        self._laws_BRV[self._row_B1, slot] = torch.where(kept[..., None], stale, fresh)

    def kept(self, is_same_BN):
        return is_same_BN


class StaleAccepted(StaleLaws):
    """The same for accepted guesses that were not committed, for `BatchMinimum`."""

    def kept(self, is_same_BN):
        return is_same_BN.long().cumprod(1).bool()


class BatchMinimum(IndependentRedraft):
    """Two rows of a batch commit as much as the slower of them (SJD as released, batch above 1)."""

    def verify(self, proposal, scores):
        made = IndependentRedraft.verify(self, proposal, scores)
        # A row that has ended waits for nobody, and nobody for it.
        own_B = torch.where(self.rows.room_B == 0, proposal.width, made.num_accepted_B)
        least_B = own_B.view(-1, 2).amin(1).repeat_interleave(2)
        least_B = torch.minimum(least_B, made.num_accepted_B)
        return type(made)(
            choices_BN=made.choices_BN,
            path_BM=made.path_BM,
            emitted_BM=made.emitted_BM,
            num_accepted_B=least_B,
            law_logits_BNV=made.law_logits_BNV,
        )


class TargetForResidual(IndependentRedraft):
    """Draws from the target's law after a refusal, not from the residual (Lumina-mGPT-2.0)."""

    def choices(self, proposal, scores, law_logits):
        made = IndependentRedraft.choices(self, proposal, scores, law_logits)
        if proposal.draft_probs_BNV is None:
            return made
        noise = node_noise(self.rows, proposal, law_logits.shape[-1], Salt.RESIDUAL)
        child, has_child = child_of(proposal)
        return torch.where(has_child & (made != child), sample(law_logits, noise), made)


@dataclass(frozen=True, slots=True)
class ThresholdReuse(IndependentRedraft):
    """Keeps a guess behind the refusal where target/draft is above a threshold (as in SJD++)."""

    threshold: float = 0.5

    def verify(self, proposal, scores):
        made = IndependentRedraft.verify(self, proposal, scores)
        if proposal.draft_probs_BNV is None or self.law.is_greedy:
            return made
        child, has_child = child_of(proposal)
        laws = made.law_logits_BNV.softmax(-1), proposal.draft_probs_BNV
        target, draft = (law.gather(-1, child[..., None]).squeeze(-1) for law in laws)
        is_behind = proposal.depth_BN > made.num_accepted_B[:, None]
        keeps = is_behind & has_child & (target > self.threshold * draft)
        return walked(proposal, torch.where(keeps, child, made.choices_BN), made.law_logits_BNV)


class CoupledBlock(BlockVerification):
    """Block verification in a Jacobi window: behind the block, guesses are coupled, not redrawn.

    That the block ended before a guess tells something of it, so its law is no longer the draft's
    ``q`` but, with ``w`` the block's weight before it, the normalised ``max(q - w * target, 0)``.
    From that law it is coupled to the target's (docs/image_decoders.md has the proof).
    """

    def verify(self, proposal, scores):
        made = BlockVerification.verify(self, proposal, scores)
        if proposal.draft_probs_BNV is None or self.law.is_greedy:
            return made
        target = made.law_logits_BNV.softmax(-1)
        child_BN, has_child = child_of(proposal)
        has_child &= proposal.depth_BN < self.rows.room_B[:, None]
        weight_BN = block_weights(target, proposal.draft_probs_BNV, child_BN, has_child)
        left = proposal.draft_probs_BNV - self.told(weight_BN)[..., None] * target
        left = left.clamp(min=0)
        mass = left.sum(-1, keepdim=True)
        next_BN = scores.positions_BN + 1
        # The rule has used the noise of one node only, where the block ended.
        behind_BN = residual_choices(
            target,
            torch.where(mass > 1e-8, left / mass, proposal.draft_probs_BNV),
            child_BN[..., None],
            has_child[..., None],
            uniform(self.rows.keys_B, next_BN, Salt.ACCEPT, self.rows.step)[..., None],
            node_noise(self.rows, proposal, target.shape[-1], Salt.RESIDUAL),
        )
        is_behind = proposal.depth_BN > made.num_accepted_B[:, None]
        choices_BN = torch.where(is_behind, behind_BN, made.choices_BN)
        return dataclasses.replace(made, choices_BN=choices_BN)

    def told(self, weight_BN):
        """The weights by which the end of the block moves the laws behind it."""
        return weight_BN


class UntoldBlock(CoupledBlock):
    """Couples guesses from the law they were drawn from, as if the block's end told nothing."""

    def told(self, weight_BN):
        return torch.zeros_like(weight_BN)


def block_weights(target, draft, child_BN, has_child):
    """``w_0 = 1``, ``w_i = min(1, w_{i-1} target(x_i) / draft(x_i))``; 0 behind the drafts."""
    target_at, draft_at = (law.gather(-1, child_BN[..., None]) for law in (target, draft))
    ratio_BN = (target_at / draft_at.clamp(min=1e-37)).squeeze(-1) * has_child
    weights = [torch.ones_like(ratio_BN[:, 0])]
    for node in range(ratio_BN.shape[1] - 1):
        weights.append((weights[-1] * ratio_BN[:, node]).clamp(max=1))
    return torch.stack(weights, 1)


def child_of(proposal):
    """The draft behind each node of a chain, and whether there is one."""
    child_BN = torch.nn.functional.pad(proposal.tokens_BN[:, 1:], (0, 1))
    return child_BN, torch.nn.functional.pad(proposal.valid_BN[:, 1:], (0, 1), value=False)
