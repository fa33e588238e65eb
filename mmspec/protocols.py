"""The five things that plug into the engine: what each must do, mutate and raise.

Protocols, not base classes: nothing registers itself and nothing is tested with ``isinstance``.
They are generic over the unit. For tokens the records are those of `mmspec.records`; a block-wise
target passes records of its own through the same five calls.
"""

from typing import Protocol, TypeVar

from mmspec.records import Guarantee, Outcome, Plan, StepRecord

ProposalT = TypeVar("ProposalT")
ScoresT = TypeVar("ScoresT")
VerdictT = TypeVar("VerdictT")
BlockT = TypeVar("BlockT", contravariant=True)


class Target(Protocol[ProposalT, ScoresT, VerdictT]):
    """The model whose output is wanted."""

    def prefill(self) -> None:
        """Reads the prompts. Mutates the target's caches; called once, before the first step."""

    def score(self, proposal: ProposalT) -> ScoresT:
        """Runs one forward over every drafted unit.

        Writes caches past the committed part only, so that dropping the proposal is free.
        """

    def commit(self, proposal: ProposalT, verdict: VerdictT) -> Outcome:
        """Keeps the accepted path, cuts at ends and limits, and reads the step to the host.

        This is the one place of a step that may wait for the device.
        """

    @property
    def is_done(self) -> bool:
        """True once every row has ended. Must not wait for the device."""


class Drafter(Protocol[ProposalT, ScoresT, VerdictT]):
    """The cheap guesser. It may be wrong in any way: that costs speed, never output."""

    name: str

    def prefill(self) -> None:
        """Reads the prompts. Mutates the drafter's own caches only."""

    def propose(self, plan: Plan) -> ProposalT:
        """Drafts at most ``plan.width - 1`` units per row; fewer, or none, is allowed."""

    def commit(
        self, proposal: ProposalT, scores: ScoresT, verdict: VerdictT, outcome: Outcome
    ) -> None:
        """Learns what was committed. Mutates the drafter's own state only."""


class Rule(Protocol[ProposalT, ScoresT, VerdictT]):
    """Decides which drafted units survive, and names what that promises."""

    guarantee: Guarantee

    def verify(self, proposal: ProposalT, scores: ScoresT) -> VerdictT:
        """Decides on the device, without a host read. Pure: the same input, the same verdict."""


class Schedule(Protocol):
    """Says how much to draft now, from the past only (it must not peek at the coming draft)."""

    def plan(self) -> Plan:
        """Returns the plan of the next step."""

    def observe(self, record: StepRecord) -> None:
        """Learns from a finished step."""


class Router(Protocol[BlockT]):
    """Judges a drafted block where no exact check exists: keep it or let the target redo it."""

    name: str

    def keep(self, block: BlockT) -> bool:
        """Returns True to keep the drafted block."""
