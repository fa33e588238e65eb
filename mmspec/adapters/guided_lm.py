"""Guidance inside `generate`: a causal model whose every row has a second one, in one forward.

transformers guides with a logits processor that runs the model once more per token and keeps a
cache of its own. That cache is never rolled back, so drafts break it without a word. Here the
processor is taken out of the list and its prompts become rows of the target's own forward.

Shape suffixes as in `mmspec.records`.
"""

import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from mmspec.adapters.guidance import Guidance
from mmspec.forward import SlotForward
from mmspec.records import Outcome, Proposal, Scores, Verdict
from mmspec.rows import TokenRows

GUIDE = "UnbatchedClassifierFreeGuidanceLogitsProcessor"


class GuidedTarget:
    """A causal language model over token rows, each guided away from a negative prompt.

    Attributes:
        rows: The committed tokens.
        forward: The model on its slot cache, with two rows for each of ``rows``.
        vocab_size: Size of the vocabulary.
    """

    def __init__(self, model: Any, guidance: Guidance, *, compile: bool = False) -> None:
        """Wraps a model.

        Args:
            model: A transformers model with a language model head.
            guidance: The rows and their second half.
            compile: Compile the step's forward.

        Raises:
            ValueError: If the model is not supported or a row does not fit its context.
        """
        guidance.check_fits(model)
        self.rows = guidance.rows
        self.vocab_size = model.get_output_embeddings().weight.shape[0]
        self.forward = SlotForward(
            model, num_rows=guidance.num_rows, capacity=guidance.capacity, compile=compile
        )
        self._guidance = guidance
        self._first_logits: Tensor | None = None

    @property
    def is_done(self) -> bool:
        """True once every row has ended."""
        return self.rows.is_done

    def prefill(self) -> None:
        """Caches both prompts of every row and keeps the logits behind them for a first step."""
        logits = self._guidance.prefill(self.forward, lambda ids: {"input_ids": ids})
        self._first_logits = self._guided(logits)

    def score(self, proposal: Proposal) -> Scores:
        """One forward over the drafts, guided; none for a first step without drafts."""
        positions_BN = self.rows.positions(proposal.depth_BN)
        first, self._first_logits = self._first_logits, None
        if first is not None and proposal.width == 1:
            return Scores(logits_BNV=first, positions_BN=positions_BN, forward_time_s=0.0)
        started = time.perf_counter()
        output = self.forward.run(
            {"input_ids": self._guidance.nodes(proposal.tokens_BN)},
            **self._guidance.run_arguments(proposal, positions_BN),
        )
        logits = self.forward.spread(output.logits)
        elapsed = time.perf_counter() - started
        return Scores(
            logits_BNV=self._guided(logits), positions_BN=positions_BN, forward_time_s=elapsed
        )

    def commit(self, proposal: Proposal, verdict: Verdict) -> Outcome:
        """Appends the survivors and moves a tree path's keys into place."""
        return self._guidance.commit(self.forward.cache, proposal, verdict)

    def drop_guidance(self) -> None:
        """Leaves the conditional rows in the cache and nothing else; no step may follow."""
        kept = torch.arange(self.rows.num_rows, device=self.rows.lengths_B.device)
        self.forward.cache.select_rows(kept)

    def _guided(self, logits: Tensor) -> Tensor:
        return self._guidance.mixed(logits.to(self.rows.lengths_B.device))


def split_guidance(processors: Iterable[Any]) -> tuple[list[Any], Any]:
    """Takes the guidance out of the processors that `generate` prepared.

    It mixes the model's own scores, so it is taken only where it comes first, as `generate` puts
    it. Anywhere else it stays, to be refused with the other processors that keep a state.

    Returns:
        The other processors, and the guidance or None.
    """
    listed = list(processors)
    if listed and type(listed[0]).__name__ == GUIDE:
        return listed[1:], listed[0]
    return listed, None


def guidance_of(processor: Any, model: Any, rows: TokenRows) -> Guidance:
    """The guidance of a processor that has not run yet.

    Args:
        processor: A `UnbatchedClassifierFreeGuidanceLogitsProcessor`.
        model: The target.
        rows: Its rows.

    Raises:
        ValueError: If the processor is of another model, has run before, or its negative prompts
            are not one per row or are padded on the right.
    """
    context = processor.unconditional_context
    if processor.model is not model:
        raise ValueError(
            f"{GUIDE} guides with another model ({type(processor.model).__name__}); speculate() "
            "runs both rows of a pair in one forward of the target"
        )
    if not context["first_pass"]:
        raise ValueError(f"{GUIDE} has run before and keeps what it saw; make a new one")
    ids = context["input_ids"]
    if processor.guidance_scale == 1:
        negatives = None
    elif ids is None:
        negatives = [[tokens[-1]] for tokens in rows.host_tokens]
    else:
        negatives = _unpadded(ids, context["attention_mask"], rows.num_rows)
    return Guidance(rows, processor.guidance_scale, negatives, is_normalised=True)


def _unpadded(ids: Tensor, mask: Tensor | None, num_rows: int) -> list[list[int]]:
    if ids.dim() != 2 or ids.shape[0] != num_rows:
        raise ValueError(
            f"negative_prompt_ids must hold one row per sequence, [{num_rows}, length], got "
            f"{list(ids.shape)}"
        )
    is_token = torch.ones_like(ids) if mask is None else mask.to(ids.device)
    is_token = is_token != 0
    if is_token.shape != ids.shape or not bool(is_token[:, -1].all()):
        raise ValueError(
            "negative_prompt_attention_mask must have the shape of negative_prompt_ids and leave "
            "its padding on the left"
        )
    return [row[kept].tolist() for row, kept in zip(ids, is_token, strict=True)]
