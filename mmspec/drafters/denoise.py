"""Jacobi windows whose far end is noise: new positions are fed as embeddings not yet decided.

A position enters the window as a noisy embedding of its first guess. Every forward gives it a new
guess, which is fed with less noise in the next one, and after the last level it is a clean guess
that is refined as in any Jacobi window. What noise brings: the model, if it was trained on it,
knows how little a guess is worth, where a clean wrong token would mislead what comes behind it.

Only clean guesses are drafts. The first noisy node ends the drafts of its row, so nothing that saw
noise can be accepted, whatever the noise and the schedule are: the output is that of plain
decoding. Source: SJD2 (arXiv 2510.08994), with two differences: its rule accepts noisy positions as
well, and it carries the noisy state of a position on from forward to forward, where here the noise
of a position is drawn once and the guess under it replaced.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mmspec.denoiser import Denoiser
from mmspec.drafters.jacobi import JacobiDrafter
from mmspec.noise import gaussian
from mmspec.records import Plan, Proposal, Verdict
from mmspec.rows import TokenRows


class DenoiseDrafter(JacobiDrafter):
    """Adds noise to the young guesses of a Jacobi window."""

    name = "denoise"

    def __init__(
        self,
        rows: TokenRows,
        vocab_size: int,
        *,
        denoiser: Denoiser,
        embed: Callable[[Tensor], Tensor],
        **options: Any,
    ) -> None:
        """Makes an empty window.

        Args:
            rows: The rows.
            vocab_size: V.
            denoiser: Makes noisy embeddings of clean ones.
            embed: Tokens to clean embeddings ``[..., H]``.
            **options: Of `JacobiDrafter`.
        """
        super().__init__(rows, vocab_size, **options)
        self._denoiser = denoiser
        self._embed = embed
        # How far the forwards of each row reached, the farthest first: a position was fed in as
        # many forwards as reached it, and is clean once that is the number of steps.
        self._schedule = denoiser.schedule
        self._reached = [[0] * self._schedule.num_steps for _ in range(rows.num_rows)]
        self._sigmas = self._schedule.sigmas().to(rows.lengths_B.device)

    def admit(self, rows: Sequence[int], verdict: Verdict) -> None:
        """Forgets what it knew of rows that begin anew, as `JacobiDrafter.admit`."""
        super().admit(rows, verdict)
        for row in rows:
            self._reached[row] = [0] * self._schedule.num_steps

    def propose(self, plan: Plan) -> Proposal:
        """A chain of guesses: drafts up to the first noisy one, noisy embeddings from there on."""
        proposal = super().propose(plan)
        schedule = self._schedule
        if proposal.width == 1 or schedule.num_steps == 0:
            return proposal
        device = proposal.tokens_BN.device
        roots = [len(tokens) - 1 for tokens in self._rows.host_tokens]
        reached_BS = torch.tensor(self._reached, device=device)
        num_drafted = tuple(
            min(count, max(row[-1] - root, schedule.num_clean))
            for count, row, root in zip(proposal.num_drafted, self._reached, roots, strict=True)
        )
        self._reached = [
            sorted([*row, root + proposal.width - 1], reverse=True)[: schedule.num_steps]
            for row, root in zip(self._reached, roots, strict=True)
        ]
        position_BN = self._rows.lengths_B[:, None] - 1 + proposal.depth_BN
        num_fed_BN = (reached_BS[:, None] >= position_BN[..., None]).sum(-1)
        count_B1 = torch.tensor(num_drafted, device=device)[:, None]
        return replace(
            proposal,
            valid_BN=proposal.valid_BN & (proposal.depth_BN <= count_B1),
            num_drafted=num_drafted,
            num_levels=num_drafted,
            noisy_BNH=self._noisy(proposal.tokens_BN, position_BN, num_fed_BN),
        )

    def _noisy(self, tokens_BN: Tensor, position_BN: Tensor, num_fed_BN: Tensor) -> Tensor:
        """Every node's token with the noise that is left after so many forwards."""
        # The root may be a text token; it is fed as it is.
        embeds = self._embed(tokens_BN.clamp(max=self._vocab_size - 1))
        noise = gaussian(self._rows.keys_B, position_BN, embeds.shape[-1])
        # Clean nodes have no level; what they get here is not looked at.
        left_BN = (len(self._sigmas) - 1 - num_fed_BN).clamp(min=0)
        return self._denoiser(embeds, noise, self._sigmas[left_BN]).to(embeds.dtype)
