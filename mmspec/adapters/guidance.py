"""Classifier-free guidance: every row a second time, behind another prompt, in the same forward.

The second half of a forward holds what guidance steers away from. Both halves share the new
tokens and every draft, so they advance, end and roll back together; only their prompts differ, in
length too, which the slot cache does not mind.

Shape suffixes as in `mmspec.records`, and
    G  rows of a forward: B, or 2 B with guidance, the conditional ones first
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmspec.adapters.causal_lm import check_fits
from mmspec.cache import SlotCache
from mmspec.forward import SlotForward, as_law_dtype
from mmspec.records import Outcome, Proposal, Verdict
from mmspec.rows import TokenRows
from mmspec.tree import chains


class Guidance:
    """What doubles the rows of a forward and makes one law of each pair.

    Attributes:
        rows: The committed tokens of the conditional half.
        scale: ``s`` in ``negative + s * (conditional - negative)``.
        is_on: Whether there is a second half.
    """

    def __init__(
        self,
        rows: TokenRows,
        scale: float = 1.0,
        negatives: Sequence[Sequence[int]] | None = None,
        *,
        is_normalised: bool = False,
    ) -> None:
        """Lays out the second half.

        Args:
            rows: The rows.
            scale: The scale.
            negatives: Second prompt for each prompt of the rows, at least one token each; None
                where there is no second half.
            is_normalised: Mix log-probabilities, as `transformers.generate` does. The law is the
                same; only processors that look at the size of a score see a difference.

        Raises:
            ValueError: If the scale is negative, or the prompts are not one per row or empty.
        """
        if not scale >= 0:
            raise ValueError(f"guidance_scale must be >= 0, got {scale}")
        self.rows = rows
        self.scale = scale
        self.is_on = negatives is not None
        self._is_normalised = is_normalised
        self._negatives = [list(map(int, prompt)) for prompt in negatives or ()]
        if self.is_on and len(self._negatives) != len(rows.prompts):
            raise ValueError(
                f"guidance needs one negative prompt per row: got {len(self._negatives)} for "
                f"{len(rows.prompts)} rows"
            )
        if not all(self._negatives):
            raise ValueError("a negative prompt needs at least one token, got an empty one")
        pairs = zip(self._negatives, rows.prompts, strict=False)
        self._shifts = [len(negative) - len(prompt) for negative, prompt in pairs]
        self.follow()

    def follow(self) -> None:
        """Takes the second prompts of the requests that the rows continue now."""
        device = self.rows.lengths_B.device
        requests = self.rows.requests if self.is_on else ()
        self._shift = [self._shifts[request] for request in requests]
        self._shift_B = torch.tensor(self._shift, dtype=torch.long, device=device)
        last = [self._negatives[request][-1] for request in requests]
        self._last_B = torch.tensor(last, dtype=torch.long, device=device)

    @property
    def num_rows(self) -> int:
        """G."""
        return self.rows.num_rows * (2 if self.is_on else 1)

    @property
    def capacity(self) -> int:
        """Tokens that a row of the cache must hold."""
        return self.rows.capacity + max([0, *self._shifts])

    def prompts(self, requests: Sequence[int]) -> list[list[int]]:
        """What each row of a forward over these requests has before its first new token."""
        halves = [self.rows.prompts, self._negatives] if self.is_on else [self.rows.prompts]
        return [half[request] for half in halves for request in requests]

    def check_fits(self, model: Any) -> None:
        """Refuses rows of either half that are longer than the model's context.

        Raises:
            ValueError: With the row's length and the model's.
        """
        check_fits(model, self.rows, [max(0, shift) for shift in self._shifts])

    def twice(self, tensor: Tensor) -> Tensor:
        """The same for both halves, ``[B, ...]`` to ``[G, ...]``."""
        return torch.cat([tensor, tensor]) if self.is_on else tensor

    def shifted(self, count: Tensor) -> Tensor:
        """Lengths or positions, ``[B, ...]`` to ``[G, ...]``: each half counts its own prompt."""
        if not self.is_on:
            return count
        shift = self._shift_B.view(-1, *[1] * (count.dim() - 1))
        return torch.cat([count, count + shift])

    def nodes(self, tokens_BN: Tensor) -> Tensor:
        """Tokens of both halves, ``[G, N]``: before any new token a root ends its own prompt."""
        if not self.is_on:
            return tokens_BN
        is_fresh = self.rows.lengths_B == self.rows.prompt_lengths_B
        second = tokens_BN.clone()
        second[:, 0] = torch.where(is_fresh, self._last_B, tokens_BN[:, 0])
        return torch.cat([tokens_BN, second])

    def prefill(
        self, forward: SlotForward, inputs: Any, requests: Sequence[int] | None = None
    ) -> Tensor:
        """Caches the prompts of both halves.

        Args:
            forward: The model on its slot cache, still empty.
            inputs: Makes the model's input of token ids ``[G, N]``: a mapping of one name.
            requests: Whose prompts; None is those that the rows continue.

        Returns:
            What the model says behind each prompt, ``[G, 1, ...]``.
        """
        prompts = self.prompts(self.rows.requests if requests is None else requests)
        counts = [len(prompt) for prompt in prompts]
        padded = [prompt + [0] * (max(counts) - len(prompt)) for prompt in prompts]
        ids = torch.tensor(padded, device=self.rows.tokens_BT.device)
        return forward.extend(inputs(ids), [0] * len(counts), counts)

    def run_arguments(self, proposal: Proposal, positions_BN: Tensor) -> dict[str, Any]:
        """Where the nodes of a proposal stand in both halves, for `SlotForward.run`."""
        rows = self.rows
        host_cached = [len(tokens) - 1 for tokens in rows.host_tokens]
        pairs = zip(host_cached, self._shift, strict=False)
        if proposal.is_chain:
            _, depth, ancestors = chains(self.num_rows, proposal.width, positions_BN.device)
        else:
            depth, ancestors = map(self.twice, (proposal.depth_BN, proposal.ancestors_BNN))
        return {
            "cached_B": self.shifted(rows.last_B),
            "host_cached": host_cached + [cached + shift for cached, shift in pairs],
            "depth_BN": depth,
            "ancestors_BNN": ancestors,
            "positions_BN": self.shifted(positions_BN),
            "is_chain": proposal.is_chain,
            "rows": rows.active + [rows.num_rows + row for row in rows.active] * self.is_on,
        }

    def mixed(self, logits: Tensor) -> Tensor:
        """One row of logits of each pair, ``[G, N, V]`` to ``[B, N, V]``, as laws have them."""
        # Half by half: on a CPU a pass over less memory stays in the cache.
        halves = [as_law_dtype(half) for half in logits.chunk(2 if self.is_on else 1)]
        if self._is_normalised:
            halves = [half.log_softmax(-1) for half in halves]
        if not self.is_on:
            return halves[0]
        conditional, negative = halves
        is_own = self._is_normalised or conditional.dtype != logits.dtype
        difference = conditional.sub_(negative) if is_own else conditional - negative
        return difference.mul_(self.scale).add_(negative)

    def commit(self, cache: SlotCache, proposal: Proposal, verdict: Verdict) -> Outcome:
        """Appends the survivors; of a tree, moves only the accepted path, in both halves."""
        cached = self.shifted(self.rows.last_B)
        outcome = self.rows.commit(verdict)
        longest = max(outcome.num_accepted)
        if not proposal.is_chain and longest > 0:
            cache.commit_path(self.twice(verdict.path_BM[:, : longest + 1]), cached)
        return outcome
