"""Causal language models as targets.

Every family that transformers loads with a plain or sliding key/value cache.
"""

import time
from collections.abc import Iterator, Sequence
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
        prefill_chunk_size: int | None = None,
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
            prefill_chunk_size: Most tokens of a row that one forward reads of its prompt; None is
                all of them.

        Raises:
            ValueError: If the model is not supported, a row does not fit its context, or the
                prompts cannot be cut.
        """
        check_fits(model, rows)
        self.rows = rows
        self.extras = extras or PromptExtras()
        self._parts = list(prompt_parts(rows, num_cached, prefill_chunk_size, self.extras.wholes))
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
        self._first_logits: Tensor | None = None

    @property
    def is_done(self) -> bool:
        """True once every row has ended."""
        return self.rows.is_done

    def prefill(self) -> None:
        """Caches every prompt and keeps the logits behind it, which answer a first plain step."""
        for starts, counts in self._parts:
            self._first_logits = read_part(self.forward, self.rows, starts, counts, self.extras)

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


def prompt_parts(
    rows: TokenRows,
    num_cached: Sequence[int] | None,
    chunk_size: int | None,
    wholes: Sequence[Sequence[tuple[int, int]]] = (),
) -> Iterator[tuple[list[int], list[int]]]:
    """The parts in which forwards read the prompts, the roots included.

    All rows are fed by every forward. A row that has been read feeds its root again, which writes
    what is there already; so the last forward answers for every row.

    Args:
        rows: The rows.
        num_cached: Tokens of each row in the cache; None is none.
        chunk_size: Most tokens of a row in a part; None is all.
        wholes: As in `PromptExtras`; a part ends before a span that it cannot hold.

    Yields:
        The first token of each row's part, and the number of its tokens.

    Raises:
        ValueError: If a span alone is longer than a part.

    Example:
        Prompts of 5 and 2 tokens in chunks of 3: ``[0, 0], [3, 2]`` and ``[3, 1], [2, 1]``.
    """
    lengths = [len(tokens) for tokens in rows.host_tokens]
    starts = list(num_cached or [0] * len(lengths))
    spans = wholes or [()] * len(lengths)
    while True:
        # The root is fed again where it is cached: its logits are wanted.
        starts = [min(n, length - 1) for n, length in zip(starts, lengths, strict=True)]
        ends = [
            _border(start, length, chunk_size, own)
            for start, length, own in zip(starts, lengths, spans, strict=True)
        ]
        yield starts, [end - start for start, end in zip(starts, ends, strict=True)]
        if ends == lengths:
            return
        starts = ends


def _border(
    start: int, length: int, chunk_size: int | None, spans: Sequence[tuple[int, int]]
) -> int:
    """Where a row's part ends that starts here."""
    end = length if chunk_size is None else min(length, start + chunk_size)
    for first, behind in spans:
        if first < end < behind:
            if first <= start:
                raise ValueError(
                    f"prefill_chunk_size={chunk_size} would cut tokens {first} to {behind - 1} of "
                    "a prompt, which see each other whole; it must be at least "
                    f"{behind - first}, or None"
                )
            end = first
    return end


def read_part(
    forward: SlotForward,
    rows: TokenRows,
    starts: Sequence[int],
    counts: Sequence[int],
    extras: PromptExtras,
) -> Tensor:
    """Caches a part of every prompt.

    Args:
        forward: The model on its slot cache.
        rows: The rows.
        starts: First token of each row's part; all before it are cached.
        counts: Tokens of each row's part.
        extras: What the prompts have besides token ids.

    Returns:
        The logits behind each part, ``[B, 1, V]``.
    """
    device = rows.tokens_BT.device
    node = torch.arange(max(counts), device=device)
    columns_BN = torch.tensor(starts, device=device)[:, None] + node
    tokens_BN = rows.tokens_BT.gather(1, columns_BN.clamp(max=rows.capacity - 1))
    # What a part leaves for later may be placeholders, whose features are not there yet.
    tokens_BN = tokens_BN * (node < torch.tensor(counts, device=device)[:, None])
    more = extras.part(starts, counts) if extras.part is not None else {}
    logits = forward.extend({"input_ids": tokens_BN, **more}, starts, counts, wholes=extras.wholes)
    return as_law_dtype(logits)


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
            row's own; empty where there is no other. Prompts that wait for a row count as rows.

    Raises:
        ValueError: With the row's length and the model's.
    """
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if context is None:
        return
    for row, (prompt, budget) in enumerate(zip(rows.prompts, rows.budgets, strict=True)):
        length = len(prompt) + (more[row] if more else 0)
        if length + budget > context:
            raise ValueError(
                f"row {row} has {length} prompt tokens and may get {budget} new ones, "
                f"{length + budget} in all; {type(model).__name__} has a context of {context}. "
                "Shorten the prompt, or ask for fewer tokens or a smaller image"
            )


__all__ = [
    "CausalTarget",
    "check_fits",
    "commit_rows",
    "prompt_parts",
    "text_device",
]
