"""Causal language models as targets.

Every family that transformers loads with a plain or sliding key/value cache.
"""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmspec.cache import SlotCache
from mmspec.forward import SlotForward, text_device
from mmspec.records import Outcome, Proposal, Scores, Verdict
from mmspec.rows import TokenRows


class CausalTarget:
    """A causal language model over token rows.

    Attributes:
        rows: The committed tokens.
        forward: The model on its slot cache. Tokens cached are always the committed ones less the
            root, which is fed together with its drafts.
    """

    def __init__(
        self,
        model: Any,
        rows: TokenRows,
        *,
        compile: bool = False,
        cache: SlotCache | None = None,
        num_cached: Sequence[int] | None = None,
    ) -> None:
        """Wraps a model.

        Args:
            model: A transformers ``...ForCausalLM``.
            rows: The rows to serve.
            compile: Compile the step's forward.
            cache: A cache from earlier turns whose first ``num_cached`` tokens are those of the
                rows.
            num_cached: Tokens that each row has in ``cache``.

        Raises:
            ValueError: If the model is not supported or a row does not fit its context.
        """
        check_fits(model, rows)
        self.rows = rows
        if cache is not None:
            cache.reserve(rows.capacity)
        self.forward = SlotForward(
            model, num_rows=rows.num_rows, capacity=rows.capacity, compile=compile, cache=cache
        )
        self.vocab_size = model.get_output_embeddings().weight.shape[0]
        self._num_cached = list(num_cached or [0] * rows.num_rows)

    @property
    def is_done(self) -> bool:
        """True once every row has ended."""
        return self.rows.is_done

    def prefill(self) -> None:
        """Caches every prompt but its last token, which becomes the first root."""
        prefill_rows(self.forward, self.rows, self._num_cached)

    def score(self, proposal: Proposal) -> Scores:
        """One forward over the drafts."""
        rows = self.rows
        positions_BN = rows.positions(proposal.depth_BN)
        started = time.perf_counter()
        output = self.forward.run(
            {"input_ids": proposal.tokens_BN},
            cached_B=rows.lengths_B - 1,
            host_cached=[len(tokens) - 1 for tokens in rows.host_tokens],
            depth_BN=proposal.depth_BN,
            ancestors_BNN=proposal.ancestors_BNN,
            positions_BN=positions_BN,
            is_chain=proposal.is_chain,
        )
        logits = output.logits  # type: ignore[attr-defined]
        elapsed = time.perf_counter() - started
        return Scores(
            logits_BNV=as_law_dtype(logits).to(rows.lengths_B.device),
            positions_BN=positions_BN,
            forward_time_s=elapsed,
        )

    def commit(self, proposal: Proposal, verdict: Verdict) -> Outcome:
        """Appends the survivors and moves a tree path's keys into place."""
        return commit_rows(self.forward.cache, self.rows, proposal, verdict)


def as_law_dtype(logits: Tensor) -> Tensor:
    """Laws are computed in float32, or in float64 where the model is."""
    return logits if logits.dtype == torch.float64 else logits.float()


def prefill_rows(forward: SlotForward, rows: TokenRows, num_cached: Sequence[int]) -> None:
    """Caches the committed tokens that are not cached yet, all but the root."""
    missing = [len(t) - 1 - n for t, n in zip(rows.host_tokens, num_cached, strict=True)]
    if max(missing) <= 0:
        return
    device = rows.tokens_BT.device
    cached_B = torch.tensor(list(num_cached), device=device)
    columns = cached_B[:, None] + torch.arange(max(missing), device=device)
    tokens = rows.tokens_BT.gather(1, columns.clamp(max=rows.capacity - 1))
    forward.prefill({"input_ids": tokens}, cached_B, num_cached)


def commit_rows(cache: SlotCache, rows: TokenRows, proposal: Proposal, verdict: Verdict) -> Outcome:
    """Appends what the verdict kept; of a tree, moves only the accepted path."""
    cached_B = rows.lengths_B - 1
    outcome = rows.commit(verdict)
    longest = max(outcome.num_accepted)
    if not proposal.is_chain and longest > 0:
        cache.commit_path(verdict.path_BM[:, : longest + 1], cached_B)
    return outcome


def check_fits(model: Any, rows: TokenRows) -> None:
    """Refuses rows that are longer than the model's context, before anything runs.

    Raises:
        ValueError: With the row's length and the model's.
    """
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if context is None:
        return
    for row, (prompt, limit) in enumerate(zip(rows.prompt_lengths, rows.host_limits, strict=True)):
        if limit > context:
            raise ValueError(
                f"row {row} has {prompt} prompt tokens and may get {limit - prompt} new ones, "
                f"{limit} in all; {type(model).__name__} has a context of {context}. "
                "Shorten the prompt or lower max_new_tokens"
            )


__all__ = [
    "CausalTarget",
    "as_law_dtype",
    "check_fits",
    "commit_rows",
    "prefill_rows",
    "text_device",
]
