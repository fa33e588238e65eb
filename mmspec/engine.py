"""The one loop. Open this file first.

A cheap drafter guesses several units ahead, the target checks them in one pass, a rule decides what
survives, and the survivors are committed. The engine knows no modality: it does not know whether a
unit is a text token, an image code or a block of video, and it never looks into a tensor. What
plugs into it is described in `mmspec.protocols`; what travels is in `mmspec.records`.
"""

import time
from collections.abc import Callable, Iterator
from typing import Generic

import torch

from mmspec.ledger import Ledger
from mmspec.protocols import Drafter, ProposalT, Rule, Schedule, ScoresT, Seats, Target, VerdictT
from mmspec.records import Generation, Outcome, StepRecord

StepCallback = Callable[[StepRecord, Outcome], bool | None]


class Engine(Generic[ProposalT, ScoresT, VerdictT]):
    """Runs a target, a drafter, a rule and a schedule until every row is done.

    The engine may be stopped between two steps and run again: it continues where it stood.
    """

    def __init__(
        self,
        target: Target[ProposalT, ScoresT, VerdictT],
        drafter: Drafter[ProposalT, ScoresT, VerdictT],
        rule: Rule[ProposalT, ScoresT, VerdictT],
        schedule: Schedule,
        seats: Seats | None = None,
    ) -> None:
        """Wires the parts; runs nothing.

        Args:
            target: The model whose output is wanted.
            drafter: Guesses ahead.
            rule: Decides what survives.
            schedule: Says how much to draft.
            seats: Gives rows that have ended to requests that wait; None where none does.
        """
        self.target = target
        self.drafter = drafter
        self.rule = rule
        self.schedule = schedule
        self.seats = seats
        self.ledger = Ledger(
            drafter=drafter.name,
            guarantee=rule.guarantee,
            num_requests=seats.num_requests if seats is not None else 0,
        )
        self._is_prefilled = False

    @torch.no_grad()
    def prefill(self) -> None:
        """Reads the prompts into the caches; done by the first step if not called."""
        started = time.perf_counter()
        self.target.prefill()
        self.drafter.prefill()
        self._is_prefilled = True
        self.ledger.num_extra_forwards += getattr(self.drafter, "num_target_forwards", 0)
        self.ledger.prefill_time_s += time.perf_counter() - started

    @torch.no_grad()
    def admit(self) -> None:
        """Gives rows that have ended to requests that wait; done by every step."""
        if self.seats is None:
            return
        started = time.perf_counter()
        self.ledger.later_reads += self.seats.fill()
        self.ledger.prefill_time_s += time.perf_counter() - started

    @torch.no_grad()
    def step(self) -> tuple[StepRecord, Outcome]:
        """One turn of the loop."""
        self.admit()
        started = time.perf_counter()
        # 1) Plan: how much to draft, from what is known of earlier steps.
        plan = self.schedule.plan()
        # 2) Propose: the drafter guesses ahead.
        drafting = time.perf_counter()
        proposal = self.drafter.propose(plan)
        drafted = time.perf_counter()
        # 3) Score: one forward of the target over every guess.
        scores = self.target.score(proposal)
        # 4) Verify: the rule decides, on the device.
        verdict = self.rule.verify(proposal, scores)
        # 5) Commit: keep the survivors; the one read of the step.
        outcome = self.target.commit(proposal, verdict)
        self.drafter.commit(proposal, scores, verdict, outcome)
        # 6) Record: what it brought and what it cost.
        record = self.ledger.record(
            proposal, scores, outcome, drafted - drafting, time.perf_counter() - started
        )
        self.schedule.observe(record)
        return record, outcome

    def stream(self) -> Iterator[tuple[StepRecord, Outcome]]:
        """Yields every step as it is committed; may be abandoned and started again."""
        if not self._is_prefilled:
            self.prefill()
        while not self.target.is_done:
            yield self.step()

    def run(self, callback: StepCallback | None = None) -> Generation:
        """Runs to the end.

        Args:
            callback: Called after each step; returning True interrupts the run, and calling `run`
                again continues it.

        Returns:
            What has been generated so far, by all runs of this engine.
        """
        interrupted = False
        for record, outcome in self.stream():
            if callback is not None and callback(record, outcome):
                interrupted = not self.target.is_done
                break
        return self.ledger.generation(interrupted=interrupted)
