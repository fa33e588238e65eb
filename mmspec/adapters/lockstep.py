"""Rows that advance unevenly, shown as the rectangular steps of `transformers.generate`.

`generate` appends one column to all rows at a time, asks the stopping criteria about the whole
batch and hands the column to the streamer. Here some rows run ahead of others. This class replays
what is committed column by column, as far as all rows have come, so criteria and streamers see
exactly what `generate` shows them and the output is cut exactly where `generate` cuts it.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteriaList
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
)

from mmspec.rows import TokenRows


@dataclass(frozen=True, slots=True, kw_only=True)
class Ends:
    """The prepared stopping criteria, sorted by who looks after them.

    Attributes:
        max_length: Columns, prompt and padding included.
        eos_token_ids: Tokens that end a row.
        deadline_s: Monotonic time at which to stop, or None.
        pads_ended_rows: Ended rows get padding; otherwise, as in `generate` without any end of
            sequence, they keep producing tokens until all rows have ended.
        custom: Everything else.
    """

    max_length: int
    eos_token_ids: tuple[int, ...] = ()
    deadline_s: float | None = None
    pads_ended_rows: bool = False
    custom: StoppingCriteriaList = field(default_factory=StoppingCriteriaList)


def sort_criteria(criteria: Sequence[Any]) -> Ends:
    """Sorts prepared criteria.

    Raises:
        ValueError: If nothing limits the length.
    """
    lengths, eos_ids, deadlines, custom = [], set(), [], StoppingCriteriaList()
    for criterion in criteria:
        kind = type(criterion)
        if kind is MaxLengthCriteria:
            lengths.append(criterion.max_length)
        elif kind is EosTokenCriteria:
            eos_ids |= set(criterion.eos_token_id.flatten().tolist())
        elif kind is MaxTimeCriteria:
            # Stated in wall-clock time; kept in a clock that cannot be set back.
            left_s = criterion.initial_timestamp + criterion.max_time - time.time()
            deadlines.append(time.monotonic() + left_s)
        else:
            custom.append(criterion)
    if not lengths:
        raise ValueError("a limit is needed: pass max_new_tokens or max_length")
    return Ends(
        max_length=min(lengths),
        eos_token_ids=tuple(sorted(eos_ids)),
        deadline_s=min(deadlines, default=None),
        pads_ended_rows=any(hasattr(criterion, "eos_token_id") for criterion in criteria),
        custom=custom,
    )


def token_mask(input_ids: Tensor, model_kwargs: Mapping[str, Any]) -> Tensor:
    """Which columns of the prompts are tokens, bool ``[B, P]``.

    Args:
        input_ids: The prompts, ``[B, P]``.
        model_kwargs: What `generate` passes on.

    Raises:
        ValueError: If the mask or the position ids are not those of left-padded whole prompts.
    """
    mask = model_kwargs.get("attention_mask")
    positions = model_kwargs.get("position_ids")
    for name, given in (("attention_mask", mask), ("position_ids", positions)):
        # `generate` drops a mask of ones, so the positions may be all that is left of it.
        if given is not None and given.shape[-1] != input_ids.shape[1]:
            raise ValueError(
                f"{name} has {given.shape[-1]} columns and input_ids {input_ids.shape[1]}; "
                "with reused past_key_values, pass the whole input_ids, cached part included"
            )
    is_token = torch.ones_like(input_ids) if mask is None else mask.to(input_ids.device)
    is_token = is_token != 0
    if not bool(is_token[:, -1].all()):
        raise ValueError("prompts must be padded on the left; a row of attention_mask ends in 0")
    if positions is not None:
        expected = is_token.long().cumsum(1) - 1
        if positions.ndim == 3:
            # The first of four axes counts tokens, the others place them in images. A single one
            # starts from what the model remembers of its last request: it says nothing of this one.
            positions = {4: positions[0], 1: expected}.get(len(positions), positions)
        if not bool((positions.to(expected.device) == expected)[..., is_token].all()):
            raise ValueError("position_ids must count each row's tokens from 0; others are given")
    return is_token


class Lockstep:
    """The columns so far.

    Attributes:
        num_columns: Steps of `generate` so far.
        num_real: Tokens of each row before its padding.
        budget: Most columns there can be.
    """

    def __init__(
        self, prompt_ids_BP: Tensor, ends: Ends, pad_token_id: int | None, streamer: Any = None
    ) -> None:
        """Starts behind the prompts.

        Args:
            prompt_ids_BP: The padded prompts.
            ends: When rows end.
            pad_token_id: Fills ended rows.
            streamer: Gets every column; `generate` has shown it the prompts.

        Raises:
            ValueError: If rows may end before others and there is nothing to fill them with.
        """
        if ends.pads_ended_rows and pad_token_id is None:
            raise ValueError("an end of sequence needs a pad_token_id, got None")
        num_rows, width = prompt_ids_BP.shape
        self.num_columns = 0
        self.num_real = [0] * num_rows
        self._is_open = [True] * num_rows
        self._ends = ends
        self._pad = pad_token_id
        self._streamer = streamer
        self._width = width
        # `generate` appends at least one column, whatever the limit says.
        self.budget = max(ends.max_length - width, 1)
        self._ids_BC = torch.nn.functional.pad(prompt_ids_BP, (0, self.budget))

    @property
    def is_done(self) -> bool:
        """True once `generate` would have returned."""
        return not any(self._is_open)

    def stop_check(self, row: int, new_tokens: list[int]) -> int | None:
        """For `TokenRows`: ends rows that a criterion has ended, so that they stop drafting."""
        if self._is_open[row] or not self._ends.pads_ended_rows:
            return None
        return min(self.num_real[row], len(new_tokens))

    def advance(self, rows: TokenRows) -> bool:
        """Replays the columns that all rows have by now; returns True at the end."""
        new = [rows.new_tokens(row) for row in range(rows.num_rows)]
        while not self.is_done and self._has_column(new):
            self._add_column(new)
        deadline_s = self._ends.deadline_s
        if deadline_s is not None and time.monotonic() > deadline_s:
            self._is_open = [False] * rows.num_rows
        return self.is_done

    def finish(self) -> Tensor:
        """Closes the streamer; returns prompts and columns, int64 ``[B, P + steps]``."""
        if self._streamer is not None:
            self._streamer.end()
        return self._sequences()

    def is_token_BC(self, is_prompt_token_BP: Tensor) -> Tensor:
        """Which columns of the result are tokens and not padding."""
        device = is_prompt_token_BP.device
        step = torch.arange(self.num_columns, device=device)
        is_real = step < torch.tensor(self.num_real, device=device)[:, None]
        return torch.cat([is_prompt_token_BP, is_real], dim=1)

    def _sequences(self) -> Tensor:
        return self._ids_BC[:, : self._width + self.num_columns]

    def _has_column(self, new: list[list[int]]) -> bool:
        step = self.num_columns
        waits_for_all = not self._ends.pads_ended_rows
        return all(
            len(tokens) > step
            for tokens, is_open in zip(new, self._is_open, strict=True)
            if is_open or waits_for_all
        )

    def _add_column(self, new: list[list[int]]) -> None:
        step = self.num_columns
        column: list[Any] = []
        for row, tokens in enumerate(new):
            is_real = self._is_open[row] or not self._ends.pads_ended_rows
            column.append(tokens[step] if is_real else self._pad)
            self.num_real[row] += is_real
        tokens_B = torch.tensor(column)
        self._ids_BC[:, self._width + step] = tokens_B.to(self._ids_BC.device)
        self.num_columns += 1
        ended = [token in self._ends.eos_token_ids for token in column]
        if self._ends.custom:
            judged = self._ends.custom(self._sequences(), None).tolist()
            ended = [a or b for a, b in zip(ended, judged, strict=True)]
        is_full = self.num_columns >= self.budget
        self._is_open = [
            is_open and not over and not is_full
            for is_open, over in zip(self._is_open, ended, strict=True)
        ]
        if self._streamer is not None:
            self._streamer.put(tokens_B)
