"""Rules and drafters of published decoders of image tokens, where they differ from ours.

Each is our reimplementation of a rule as it is described, not its authors' code; most of them do
not keep the law, which is what `test_verify.py` and `benchmarks/published_image_decoders.py` show.
"""

from dataclasses import dataclass

import torch

from mmspec.drafters.jacobi import JacobiDrafter
from mmspec.noise import Salt
from mmspec.sampling import sample
from mmspec.verify import IndependentRedraft, node_noise, walked


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


def child_of(proposal):
    """The draft behind each node of a chain, and whether there is one."""
    child_BN = torch.nn.functional.pad(proposal.tokens_BN[:, 1:], (0, 1))
    return child_BN, torch.nn.functional.pad(proposal.valid_BN[:, 1:], (0, 1), value=False)
