"""The things that plug into the engine: what each must do, mutate and raise.

Protocols, not base classes: nothing registers itself and nothing is tested with ``isinstance``.
They are generic over the unit. For tokens the records are those of `mmspec.records`; a block-wise
target passes records of its own through the same five calls.
"""

from collections.abc import Sequence
from typing import Protocol, TypeVar

from mmspec.records import Guarantee, Outcome, Plan, StepRecord


class Drafted(Protocol):
    """What engine and ledger want to know of a proposal of any modality, all on the host."""

    @property
    def width(self) -> int:
        """Units fed to the target per row, the root included."""

    @property
    def num_drafted(self) -> tuple[int, ...]:
        """Drafted units per row."""

    @property
    def num_levels(self) -> tuple[int, ...]:
        """Deepest draft per row."""


class Timed(Protocol):
    """What engine and ledger want to know of scores of any modality."""

    @property
    def forward_time_s(self) -> float:
        """Seconds that the target's forward took."""


ProposalT = TypeVar("ProposalT", bound=Drafted)
ScoresT = TypeVar("ScoresT", bound=Timed)
VerdictT = TypeVar("VerdictT")
# Protocols want the direction in which each record travels in their type variables.
ProposalIn = TypeVar("ProposalIn", contravariant=True)
ScoresIn = TypeVar("ScoresIn", contravariant=True)
ScoresOut = TypeVar("ScoresOut", covariant=True)
VerdictIn = TypeVar("VerdictIn", contravariant=True)
VerdictOut = TypeVar("VerdictOut", covariant=True)
PlaceIn = TypeVar("PlaceIn", contravariant=True)
BlockIn = TypeVar("BlockIn", contravariant=True)
JudgementOut = TypeVar("JudgementOut", covariant=True)


class Target(Protocol[ProposalIn, ScoresOut, VerdictIn]):
    """The model whose output is wanted."""

    def prefill(self) -> None:
        """Reads the prompts. Mutates the target's caches; called once, before the first step.

        A target may keep what it says behind the prompts and answer a first step without drafts
        from that: the schedules of mmspec make the first step plain.
        """

    def score(self, proposal: ProposalIn) -> ScoresOut:
        """Runs one forward over every drafted unit.

        Writes caches past the committed part only, so that dropping the proposal is free.
        """

    def commit(self, proposal: ProposalIn, verdict: VerdictIn) -> Outcome:
        """Keeps the accepted path, cuts at ends and limits, and reads the step to the host.

        This is the one place of a step that may wait for the device.
        """

    @property
    def is_done(self) -> bool:
        """True once every row has ended. Must not wait for the device."""


class Drafter(Protocol[ProposalT, ScoresIn, VerdictIn]):
    """The cheap guesser. It may be wrong in any way: that costs speed, never output."""

    name: str

    def prefill(self) -> None:
        """Reads the prompts. Mutates the drafter's own caches only."""

    def propose(self, plan: Plan) -> ProposalT:
        """Drafts at most ``plan.width - 1`` units per row; fewer, or none, is allowed."""

    def commit(
        self, proposal: ProposalT, scores: ScoresIn, verdict: VerdictIn, outcome: Outcome
    ) -> None:
        """Learns what was committed. Mutates the drafter's own state only."""


class Rule(Protocol[ProposalIn, ScoresIn, VerdictOut]):
    """Decides which drafted units survive, and names what that promises."""

    @property
    def guarantee(self) -> Guarantee:
        """What it promises about the output."""

    def verify(self, proposal: ProposalIn, scores: ScoresIn) -> VerdictOut:
        """Decides on the device, without a host read. Pure: the same input, the same verdict."""


class Schedule(Protocol):
    """Says how much to draft now, from the past only (it must not peek at the coming draft)."""

    def plan(self) -> Plan:
        """Returns the plan of the next step."""

    def observe(self, record: StepRecord) -> None:
        """Learns from a finished step."""


class Seats(Protocol):
    """Requests that wait for a row, where there are more of them than rows.

    A batch that was only decoded to its end would be fed ever fewer rows. Each request still gets
    what it gets alone: a row depends on nothing but its own prompt and key.
    """

    @property
    def num_requests(self) -> int:
        """Requests in all, those that have a row from the beginning among them."""

    def fill(self) -> Sequence[Sequence[int]]:
        """Gives rows that have ended to requests that wait; called between two steps.

        Mutates the rows and the caches of target and drafter, of these rows only.

        Returns:
            The requests whose prompts were read, for each forward of the target that it took.
        """


class Router(Protocol[PlaceIn, BlockIn, JudgementOut]):
    """Judges a drafted block where no exact check exists: keep it or let the target write it.

    Pure: the same block and the same history give the same judgement. The records of blocks of
    video are in `mmspec.block_records`.
    """

    @property
    def name(self) -> str:
        """As a user types it, its argument included."""

    @property
    def guarantee(self) -> Guarantee:
        """`exact` only if it keeps no draft at all."""

    @property
    def needs_prompt(self) -> bool:
        """Whether it reads the text of the prompt."""

    def wants_draft(self, place: PlaceIn) -> bool:
        """False where the target writes the block in any case: then nothing is drafted."""

    def judge(self, block: BlockIn) -> JudgementOut:
        """Scores a drafted block and decides."""
