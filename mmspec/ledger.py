"""Per-step accounting, and the figures made from it."""

from mmspec.protocols import Drafted, Timed
from mmspec.records import Generation, Guarantee, Outcome, Stats, StepRecord


class Ledger:
    """Collects one `StepRecord` per step and the units committed to each row.

    Attributes:
        steps: The lines so far.
        units: Units per row, the prompt excluded.
        prefill_time_s: Seconds before the first step.
        num_extra_forwards: Forwards of the target that the drafter asked for before the first step.
    """

    def __init__(self, *, drafter: str, guarantee: Guarantee) -> None:
        """Starts an empty ledger."""
        self.steps: list[StepRecord] = []
        self.units: list[list[int]] = []
        self.prefill_time_s = 0.0
        self.num_extra_forwards = 0
        self._drafter = drafter
        self._guarantee = guarantee

    def record(
        self,
        proposal: Drafted,
        scores: Timed,
        outcome: Outcome,
        draft_time_s: float,
        wall_time_s: float,
    ) -> StepRecord:
        """Adds a step.

        Args:
            proposal: What was drafted.
            scores: The target's answer, which carries its own time.
            outcome: What was committed.
            draft_time_s: Seconds in the drafter.
            wall_time_s: Seconds of the whole step.
        """
        if not self.units:
            self.units = [[] for _ in outcome.new_units]
        for row, new in zip(self.units, outcome.new_units, strict=True):
            row.extend(new)
        for row, count in zip(self.units, outcome.num_retracted, strict=False):
            del row[len(row) - count :]
        step = StepRecord(
            index=len(self.steps),
            width=proposal.width,
            num_drafted=proposal.num_drafted,
            num_levels=proposal.num_levels,
            num_accepted=outcome.num_accepted,
            num_emitted=tuple(map(len, outcome.new_units)),
            was_active=outcome.was_active,
            draft_time_s=draft_time_s,
            verify_time_s=scores.forward_time_s,
            other_time_s=max(wall_time_s - draft_time_s - scores.forward_time_s, 0.0),
        )
        self.steps.append(step)
        return step

    def generation(self, *, interrupted: bool = False) -> Generation:
        """Everything so far as one record."""
        num_rows = len(self.units)
        return Generation(
            units=tuple(list(row) for row in self.units),
            stats=self._stats(range(num_rows)),
            row_stats=tuple(self._stats([row]) for row in range(num_rows)),
            steps=tuple(self.steps),
            interrupted=interrupted,
        )

    def _stats(self, rows: range | list[int]) -> Stats:
        active = [(s, r) for s in self.steps for r in rows if s.was_active[r]]
        accepted = [s.num_accepted[r] for s, r in active]
        levels = [s.num_levels[r] for s, r in active]
        num_units = sum(len(self.units[r]) for r in rows)
        num_row_forwards = len(active) + self.num_extra_forwards * len(rows)
        draft_s = sum(s.draft_time_s for s in self.steps)
        verify_s = sum(s.verify_time_s for s in self.steps)
        other_s = sum(s.other_time_s for s in self.steps)
        return Stats(
            num_units=num_units,
            num_target_forwards=len({s.index for s, _ in active}) + self.num_extra_forwards,
            tau=num_units / num_row_forwards if active else 0.0,
            num_drafted=sum(s.num_drafted[r] for s, r in active),
            num_accepted=sum(accepted),
            accepted_histogram=_histogram(accepted),
            acceptance_by_position=conditional_acceptance(accepted, levels),
            prefill_time_s=self.prefill_time_s,
            draft_time_s=draft_s,
            verify_time_s=verify_s,
            other_time_s=other_s,
            wall_time_s=self.prefill_time_s + draft_s + verify_s + other_s,
            guarantee=self._guarantee,
            drafter=self._drafter,
        )


def _histogram(values: list[int]) -> list[int]:
    counts = [0] * (max(values, default=-1) + 1)
    for value in values:
        counts[value] += 1
    return counts


def conditional_acceptance(accepted: list[int], levels: list[int]) -> list[float]:
    """Share accepted at each depth among those whose parent was accepted.

    Args:
        accepted: Accepted drafts of each row-step.
        levels: Deepest draft of each row-step.

    Example:
        Two chains of 3 drafts, of which 3 and 1 were accepted: ``[1.0, 0.5, 1.0]``.
    """
    rates = []
    for depth in range(max(levels, default=0)):
        tried = [a for a, n in zip(accepted, levels, strict=True) if n > depth and a >= depth]
        if not tried:
            break
        rates.append(sum(a > depth for a in tried) / len(tried))
    return rates
