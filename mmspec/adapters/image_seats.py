"""Seats of an image batch: where an image is complete, the next request begins in its row."""

from typing import Protocol

from mmspec.adapters.token_image import TokenImageTarget
from mmspec.cache import SlotCache


class SeatedDrafter(Protocol):
    """A drafter whose rows may begin anew between two steps."""

    def admit(self, row: int) -> None:
        """Forgets what it knew of a row, where another prompt stands now."""


class ImageSeats:
    """Gives rows whose images are complete to the prompts that wait.

    Prompts are read ahead, as many at once as there are rows: that takes as many forwards as
    batches would, where reading each prompt when its row is free would take one for each.
    """

    def __init__(self, target: TokenImageTarget, drafter: SeatedDrafter) -> None:
        """Reads nothing yet."""
        self._rows = target.rows
        self._target = target
        self._drafter = drafter
        self._ahead: SlotCache | None = None
        self._read: range = range(0)

    @property
    def num_requests(self) -> int:
        """Images in all."""
        return len(self._rows.prompts)

    def fill(self) -> list[range]:
        """Begins the next images; returns the requests that were read, for each forward."""
        reads = []
        for row in self._rows.vacant:
            self._rows.admit(row)
            request = self._rows.requests[row]
            if request not in self._read:
                end = min(request + self._rows.num_rows, self.num_requests)
                self._read = range(request, end)
                self._ahead = self._target.read(self._read)
                reads.append(self._read)
            self._target.admit(row, self._ahead, request - self._read.start)
            self._drafter.admit(row)
        return reads
