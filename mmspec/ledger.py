"""Per-step accounting, and the figures made from it.

Steps are told by rows, everything else by requests: a row of a step belongs to the request that it
continued then (`mmspec.records.Outcome`).
"""

from collections.abc import Sequence

from mmspec.protocols import Drafted, Timed
from mmspec.records import Generation, Guarantee, Outcome, Stats, StepRecord


class Ledger:
    """Collects one `StepRecord` per step and the units committed to each row.

    Attributes:
        steps: The lines so far.
        units: Units per request, the prompt excluded.
        prefill_time_s: Seconds in which prompts were read.
        num_extra_forwards: Forwards of the target that the drafter asked for before the first step.
        later_reads: Requests whose prompts were read between two steps, for each forward that did.
    """

    def __init__(self, *, drafter: str, guarantee: Guarantee, num_requests: int = 0) -> None:
        """Starts an empty ledger.

        Args:
            drafter: Name of the drafter.
            guarantee: Of the rule.
            num_requests: Requests in all; 0 where each row is one.
        """
        self.steps: list[StepRecord] = []
        self.units: list[list[int]] = []
        self.prefill_time_s = 0.0
        self.num_extra_forwards = 0
        self.later_reads: list[Sequence[int]] = []
        self._num_requests = num_requests
        self._phases_s = [0.0, 0.0, 0.0]
        # Of each request the steps that it took part in, and its row there.
        self._turns: list[list[tuple[StepRecord, int]]] = []
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
        requests = outcome.requests or range(len(outcome.new_units))
        if not self.units:
            num_requests = self._num_requests or len(requests)
            self.units = [[] for _ in range(num_requests)]
            self._turns = [[] for _ in range(num_requests)]
        for request, new in zip(requests, outcome.new_units, strict=True):
            self.units[request].extend(new)
        for request, count in zip(requests, outcome.num_retracted, strict=False):
            del self.units[request][len(self.units[request]) - count :]
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
        times = (step.draft_time_s, step.verify_time_s, step.other_time_s)
        self._phases_s = [sum(pair) for pair in zip(self._phases_s, times, strict=True)]
        for row, request in enumerate(requests):
            if outcome.was_active[row]:
                self._turns[request].append((step, row))
        return step

    def generation(
        self, *, interrupted: bool = False, requests: Sequence[int] | None = None
    ) -> Generation:
        """Everything so far as one record.

        Args:
            interrupted: Whether it was stopped early.
            requests: Of these requests only; None is all.
        """
        if requests is None:
            requests = range(len(self.units))
        return Generation(
            units=tuple(list(self.units[request]) for request in requests),
            emitted=tuple(
                [step.num_emitted[row] for step, row in self._turns[request]]
                for request in requests
            ),
            stats=self._stats(requests),
            row_stats=tuple(self._stats([request]) for request in requests),
            steps=tuple(self.steps),
            interrupted=interrupted,
        )

    def _stats(self, requests: Sequence[int]) -> Stats:
        active = [turn for request in requests for turn in self._turns[request]]
        accepted = [s.num_accepted[r] for s, r in active]
        levels = [s.num_levels[r] for s, r in active]
        num_units = sum(len(self.units[request]) for request in requests)
        own = set(requests)
        num_reads = [len(own.intersection(read)) for read in self.later_reads]
        num_row_forwards = len(active) + self.num_extra_forwards * len(requests) + sum(num_reads)
        num_forwards = len({s.index for s, _ in active}) + self.num_extra_forwards
        draft_s, verify_s, other_s = self._phases_s
        return Stats(
            num_units=num_units,
            num_target_forwards=num_forwards + sum(count > 0 for count in num_reads),
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
