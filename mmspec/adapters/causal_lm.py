"""Causal language models as targets.

Every family that transformers loads with a plain or sliding key/value cache.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmspec.cache import SlotCache
from mmspec.forward import PromptExtras, SlotForward, as_law_dtype, text_device
from mmspec.records import Outcome, Proposal, Scores, Verdict
from mmspec.rows import TokenRows


class CausalTarget:
    """A causal language model over token rows.

    Attributes:
        rows: The committed tokens.
        forward: The model on its slot cache. Tokens cached are the committed ones less the root,
            which is fed together with its drafts; only the first root is fed with its prompt.
        extras: What the prompts have besides token ids.
    """

    def __init__(
        self,
        model: Any,
        rows: TokenRows,
        *,
        compile: bool = False,
        cache: SlotCache | None = None,
        num_cached: Sequence[int] | None = None,
        extras: PromptExtras | None = None,
    ) -> None:
        """Wraps a model.

        Args:
            model: A transformers ``...ForCausalLM``.
            rows: The rows to serve.
            compile: Compile the step's forward.
            cache: A cache from earlier turns whose first ``num_cached`` tokens are those of the
                rows.
            num_cached: Tokens that each row has in ``cache``.
            extras: What the prompts have besides token ids.

        Raises:
            ValueError: If the model is not supported or a row does not fit its context.
        """
        check_fits(model, rows)
        self.rows = rows
        self.extras = extras or PromptExtras()
        if cache is not None:
            cache.reserve(rows.capacity)
        self.forward = SlotForward(
            model,
            num_rows=rows.num_rows,
            capacity=rows.capacity,
            compile=compile,
            cache=cache,
            place=self.extras.place,
        )
        self.vocab_size = model.get_output_embeddings().weight.shape[0]
        self._num_cached = list(num_cached or [0] * rows.num_rows)
        self._first_logits: Tensor | None = None

    @property
    def is_done(self) -> bool:
        """True once every row has ended."""
        return self.rows.is_done

    def prefill(self) -> None:
        """Caches every prompt and keeps the logits behind it, which answer a first plain step."""
        self._first_logits = prefill_rows(
            self.forward, self.rows, self._num_cached, self.extras.inputs
        )

    def score(self, proposal: Proposal) -> Scores:
        """One forward over the drafts of the rows that go on; none for a plain first step."""
        rows = self.rows
        positions_BN = rows.positions(proposal.depth_BN)
        first, self._first_logits = self._first_logits, None
        if first is not None and proposal.width == 1:
            return Scores(logits_BNV=first, positions_BN=positions_BN, forward_time_s=0.0)
        started = time.perf_counter()
        output = self.forward.run(
            {"input_ids": proposal.tokens_BN},
            cached_B=rows.last_B,
            host_cached=[len(tokens) - 1 for tokens in rows.host_tokens],
            depth_BN=proposal.depth_BN,
            ancestors_BNN=proposal.ancestors_BNN,
            positions_BN=positions_BN,
            is_chain=proposal.is_chain,
            rows=rows.active,
        )
        logits = self.forward.spread(output.logits)
        elapsed = time.perf_counter() - started
        return Scores(
            logits_BNV=as_law_dtype(logits).to(rows.lengths_B.device),
            positions_BN=positions_BN,
            forward_time_s=elapsed,
        )

    def commit(self, proposal: Proposal, verdict: Verdict) -> Outcome:
        """Appends the survivors and moves a tree path's keys into place."""
        return commit_rows(self.forward.cache, self.rows, proposal, verdict)


def prefill_rows(
    forward: SlotForward,
    rows: TokenRows,
    num_cached: Sequence[int],
    more: Mapping[str, Any] | None = None,
) -> Tensor:
    """Caches the committed tokens that are not cached yet, the root included.

    Args:
        forward: The model on its slot cache.
        rows: The rows.
        num_cached: Tokens of each row in the cache.
        more: Other inputs of the model.

    Returns:
        The logits behind each root, ``[B, 1, V]``.
    """
    lengths = [len(tokens) for tokens in rows.host_tokens]
    # The root is fed again where it is cached: its logits are wanted.
    num_cached = [min(n, length - 1) for n, length in zip(num_cached, lengths, strict=True)]
    counts = [length - n for n, length in zip(num_cached, lengths, strict=True)]
    device = rows.tokens_BT.device
    cached_B = torch.tensor(num_cached, device=device)
    columns = cached_B[:, None] + torch.arange(max(counts), device=device)
    tokens = rows.tokens_BT.gather(1, columns.clamp(max=rows.capacity - 1))
    return as_law_dtype(forward.extend({"input_ids": tokens, **(more or {})}, num_cached, counts))


def commit_rows(cache: SlotCache, rows: TokenRows, proposal: Proposal, verdict: Verdict) -> Outcome:
    """Appends what the verdict kept; of a tree, moves only the accepted path."""
    cached_B = rows.last_B
    outcome = rows.commit(verdict)
    longest = max(outcome.num_accepted)
    if not proposal.is_chain and longest > 0:
        cache.commit_path(verdict.path_BM[:, : longest + 1], cached_B)
    return outcome


def check_fits(model: Any, rows: TokenRows, more: Sequence[int] = ()) -> None:
    """Refuses rows that are longer than the model's context, before anything runs.

    Args:
        model: The model.
        rows: The rows.
        more: By how many tokens the longest prompt that each row is decoded with exceeds the
            row's own; empty where there is no other.

    Raises:
        ValueError: With the row's length and the model's.
    """
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if context is None:
        return
    for row, (prompt, limit) in enumerate(zip(rows.prompt_lengths, rows.host_limits, strict=True)):
        extra = more[row] if more else 0
        if limit + extra > context:
            raise ValueError(
                f"row {row} has {prompt + extra} prompt tokens and may get {limit - prompt} new "
                f"ones, {limit + extra} in all; {type(model).__name__} has a context of {context}. "
                "Shorten the prompt, or ask for fewer tokens or a smaller image"
            )


__all__ = [
    "CausalTarget",
    "check_fits",
    "commit_rows",
    "prefill_rows",
    "text_device",
]
