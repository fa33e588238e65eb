"""No drafting: the yardstick, through the same loop as everything else."""

from collections.abc import Sequence

from mmspec.records import Outcome, Plan, Proposal, Scores, Verdict
from mmspec.rows import TokenRows
from mmspec.tree import pack_roots


class PlainDrafter:
    """Proposes nothing, so each step is plain decoding of one token per row."""

    name = "none"

    def __init__(self, rows: TokenRows, vocab_size: int) -> None:
        """Remembers the rows; the vocabulary is not needed, every drafter is given it."""
        self._rows = rows

    def prefill(self) -> None:
        """Reads nothing."""

    def admit(self, rows: Sequence[int], verdict: Verdict) -> None:
        """Forgets nothing."""

    def propose(self, plan: Plan) -> Proposal:
        """The root alone."""
        return root_only(self._rows)

    def commit(
        self, proposal: Proposal, scores: Scores, verdict: Verdict, outcome: Outcome
    ) -> None:
        """Learns nothing."""


def root_only(rows: TokenRows) -> Proposal:
    """A proposal without drafts."""
    return pack_roots(rows.roots_B())
