"""No drafting: the yardstick, through the same loop as everything else."""

from mmspec.records import Outcome, Plan, Proposal, Scores, Verdict
from mmspec.rows import TokenRows
from mmspec.tree import pack_chain


class PlainDrafter:
    """Proposes nothing, so each step is plain decoding of one token per row."""

    name = "none"

    def __init__(self, rows: TokenRows, vocab_size: int) -> None:
        """Remembers the rows."""
        self._rows = rows
        self._vocab_size = vocab_size

    def prefill(self) -> None:
        """Reads nothing."""

    def propose(self, plan: Plan) -> Proposal:
        """The root alone."""
        return root_only(self._rows, self._vocab_size)

    def commit(
        self, proposal: Proposal, scores: Scores, verdict: Verdict, outcome: Outcome
    ) -> None:
        """Learns nothing."""


def root_only(rows: TokenRows, vocab_size: int) -> Proposal:
    """A proposal without drafts."""
    return pack_chain(rows.roots_B()[:, None], [0] * rows.num_rows, vocab_size)
