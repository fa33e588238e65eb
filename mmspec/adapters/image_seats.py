"""Seats of an image batch: where an image is complete, the next request begins in its row."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mmspec.adapters.token_image import TokenImageTarget
from mmspec.cache import SlotCache
from mmspec.protocols import Rule
from mmspec.records import Proposal, Scores, Verdict
from mmspec.tree import pack_roots


class SeatedDrafter(Protocol):
    """A drafter whose rows may begin anew between two steps."""

    def admit(self, rows: Sequence[int], verdict: Verdict) -> None:
        """Forgets what it knew of rows in which another prompt stands now.

        Args:
            rows: These rows.
            verdict: What the rule chooses behind their prompts; meaningless in all other rows.
        """


@dataclass(frozen=True, slots=True)
class _Read:
    """Prompts that were read: their requests, their keys, and what was said behind each."""

    requests: range
    cache: SlotCache
    logits_RNV: Tensor


class ImageSeats:
    """Gives rows whose images are complete to the prompts that wait.

    Prompts are read ahead, as many at once as there are rows: that takes as many forwards as
    batches would, where reading each prompt when its row is free would take one for each.
    """

    def __init__(
        self,
        target: TokenImageTarget,
        drafter: SeatedDrafter,
        rule: Rule[Proposal, Scores, Verdict],
    ) -> None:
        """Reads nothing yet.

        Args:
            target: The model over its rows.
            drafter: Guesses ahead of the same rows.
            rule: An exact one; it decides the first token of an image here, as a first guess.
        """
        self._rows = target.rows
        self._target = target
        self._drafter = drafter
        self._rule = rule
        self._read: _Read | None = None

    @property
    def num_requests(self) -> int:
        """Images in all."""
        return len(self._rows.prompts)

    def fill(self) -> list[range]:
        """Begins the next images; returns the requests that were read, for each forward."""
        reads: list[range] = []
        vacant = self._rows.vacant
        if not vacant:
            return reads
        answers = []
        for row in vacant:
            self._rows.admit(row)
            request = self._rows.requests[row]
            if self._read is None or request not in self._read.requests:
                self._read = self._read_from(request)
                reads.append(self._read.requests)
            place = request - self._read.requests.start
            self._target.admit(row, self._read.cache, place)
            answers.append(self._read.logits_RNV[place])
        if not self._rows.num_waiting:
            self._read = None
        self._drafter.admit(vacant, self._first(vacant, torch.stack(answers)))
        return reads

    def _read_from(self, request: int) -> _Read:
        requests = range(request, min(request + self._rows.num_rows, self.num_requests))
        return _Read(requests, *self._target.read(requests))

    def _first(self, rows: Sequence[int], answers_RNV: Tensor) -> Verdict:
        """What the rule chooses behind the prompts of these rows."""
        logits_BNV = answers_RNV.new_zeros(self._rows.num_rows, *answers_RNV.shape[1:])
        logits_BNV[torch.tensor(rows, device=logits_BNV.device)] = answers_RNV
        positions_BN = self._rows.last_B[:, None]
        scores = Scores(logits_BNV=logits_BNV, positions_BN=positions_BN, forward_time_s=0.0)
        return self._rule.verify(pack_roots(self._rows.roots_B()), scores)
