"""Frozen records that travel between the parts of one step.

Nothing here computes. The engine passes these along and never looks inside the tensors, which is
why one loop serves tokens, image codes and blocks of video.

Shape suffixes, used in the whole core:
    B  rows of the batch
    N  nodes fed to the target in one forward, the root included
    M  longest path through a draft, the root included (a chain has M == N)
    V  vocabulary
    H  channels of an embedding
    T  capacity of a row in tokens
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import torch


class Guarantee(StrEnum):
    """What a rule promises about the output, relative to plain decoding with the same seed."""

    EXACT = "exact"
    DISTRIBUTION = "distribution"
    LOSSY = "lossy"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much to draft in the coming step.

    Attributes:
        width: Nodes per row in the target's forward, the root included; 1 is plain decoding.
        prices: Units per row that the drafts of a step of each width must be expected to bring to
            be worth their verification; empty until measured. For drafters that may draft less
            than they are asked for.
    """

    width: int
    prices: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """A drafted chain or tree per row, packed parents first.

    Node 0 is the root: the last committed token, whose key and value are not cached yet. A node
    that was not really drafted has ``valid_BN`` False and can never be accepted, so a fault in a
    drafter costs speed and nothing else.

    Attributes:
        tokens_BN: Token of every node, already inside the vocabulary.
        parents_BN: Index of every node's parent, smaller than its own; the root points at itself.
        valid_BN: Which nodes are real drafts; the root is always valid.
        depth_BN: Distance from the root.
        ancestors_BNN: ``[b, i, j]`` is True where j is i or an ancestor of i.
        is_chain: Every row is a chain (parent of n is n - 1); commit then moves nothing.
        draft_probs_BNV: Law from which the children of each node were sampled, or None where the
            draft is deterministic (the law is then one-hot at each child).
        settled_BN: Drafts that a lossy rule settled in an earlier step, or None.
        num_drafted: Real drafts per row, on the host (the drafter knows it without a read).
        num_levels: Deepest draft per row, on the host; equals ``num_drafted`` for chains.
        branching: Most children that any node has, on the host.
        noisy_BNH: What to feed, instead of its token, where a node is not valid: embeddings that
            stand for no token yet. A target that does not know them feeds the tokens; nothing
            that is accepted depends on it.
    """

    tokens_BN: torch.Tensor
    parents_BN: torch.Tensor
    valid_BN: torch.Tensor
    depth_BN: torch.Tensor
    ancestors_BNN: torch.Tensor
    is_chain: bool
    num_drafted: tuple[int, ...]
    num_levels: tuple[int, ...]
    branching: int = 1
    draft_probs_BNV: torch.Tensor | None = None
    settled_BN: torch.Tensor | None = None
    noisy_BNH: torch.Tensor | None = None

    @property
    def width(self) -> int:
        """Nodes per row, the root included."""
        return self.tokens_BN.shape[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """What the target said of every node.

    Attributes:
        logits_BNV: Logits of the token that follows each node, guided, float32 or float64,
            before temperature and masks.
        positions_BN: Absolute position of every node in its row.
        forward_time_s: Seconds that the target's forward took; 0 where the prefill had the answer.
    """

    logits_BNV: torch.Tensor
    positions_BN: torch.Tensor
    forward_time_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a rule decided.

    Attributes:
        choices_BN: The token that the rule chose to follow each node.
        path_BM: Node indices of the accepted path, the root first; entries past
            ``num_accepted_B`` are meaningless.
        emitted_BM: ``choices_BN`` along that path: the accepted drafts and then the bonus token.
        num_accepted_B: Accepted drafts, so ``num_accepted_B + 1`` tokens are emitted.
        law_logits_BNV: The law the rule decided by (log scale, masked entries -inf).
        settled_BN: Choices that stand although what is before them may still change; for lossy
            rules only, else None.
    """

    choices_BN: torch.Tensor
    path_BM: torch.Tensor
    emitted_BM: torch.Tensor
    num_accepted_B: torch.Tensor
    law_logits_BNV: torch.Tensor
    settled_BN: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What was committed, on the host: the one read of a step.

    Attributes:
        new_units: Units appended to each row in this step (token ids for token rows).
        num_accepted: Accepted drafts per row before end-of-sequence and limits cut them.
        done: Whether each row has ended.
        was_active: Whether each row took part in the step.
        num_retracted: Units of earlier steps that a row's stop check took back (a stop string may
            begin before the step that completes it); empty where there were none.
        requests: Number of the request that each row continued; empty where row k has request k
            from the beginning to the end.
    """

    new_units: tuple[list[int], ...]
    num_accepted: tuple[int, ...]
    done: tuple[bool, ...]
    was_active: tuple[bool, ...]
    num_retracted: tuple[int, ...] = ()
    requests: tuple[int, ...] = ()

    @property
    def ended(self) -> list[int]:
        """Requests that ended in this step."""
        requests = self.requests or range(len(self.done))
        rows = zip(requests, self.done, self.was_active, strict=True)
        return [request for request, done, was_active in rows if done and was_active]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One line of the ledger.

    Attributes:
        index: Step number from 0.
        width: Nodes per row in the target's forward.
        num_drafted: Real drafts per row.
        num_levels: Deepest draft per row.
        num_accepted: Accepted drafts per row.
        num_emitted: Units committed per row.
        was_active: Rows that took part.
        draft_time_s: Seconds in ``propose``.
        verify_time_s: Seconds in the target's forward; 0 in a first step that the prefill answers.
        other_time_s: Seconds in law, rule, commit and bookkeeping.
    """

    index: int
    width: int
    num_drafted: tuple[int, ...]
    num_levels: tuple[int, ...]
    num_accepted: tuple[int, ...]
    num_emitted: tuple[int, ...]
    was_active: tuple[bool, ...]
    draft_time_s: float
    verify_time_s: float
    other_time_s: float

    @property
    def wall_time_s(self) -> float:
        """Seconds of the whole step."""
        return self.draft_time_s + self.verify_time_s + self.other_time_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """Figures of a generation, or of one row of it.

    Attributes:
        num_units: Units generated.
        num_target_forwards: Steps, which are the target's forwards with the prefill among them: it
            answers the first step, so plain decoding of N units takes N forwards. (A schedule of
            your own that drafts in the first step pays one forward more, and so do a drafter
            that asks the target which visual tokens matter, and a request that waited for a row.)
        tau: Units per target forward and row, the bonus included.
        num_drafted: Units drafted.
        num_accepted: Drafted units that were accepted.
        accepted_histogram: ``[k]`` is the number of row-steps with exactly k accepted drafts.
        acceptance_by_position: ``[k]`` is the share of drafts at depth k + 1 that were accepted
            among those whose parent was accepted (conditional acceptance).
        prefill_time_s: Seconds before the first step, the forward that answers it included.
        draft_time_s: Seconds drafting.
        verify_time_s: Seconds in the target's forwards.
        other_time_s: Everything else between the first step and the last.
        wall_time_s: Seconds in all, the prefill included.
        guarantee: What the rule promises.
        drafter: Name of the drafter.
    """

    num_units: int
    num_target_forwards: int
    tau: float
    num_drafted: int
    num_accepted: int
    accepted_histogram: list[int]
    acceptance_by_position: list[float]
    prefill_time_s: float
    draft_time_s: float
    verify_time_s: float
    other_time_s: float
    wall_time_s: float
    guarantee: Guarantee
    drafter: str

    def to_dict(self) -> dict[str, object]:
        """Returns the figures as plain JSON types."""
        figures = {name: getattr(self, name) for name in self.__slots__}
        return figures | {"guarantee": str(self.guarantee)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What the engine returns.

    Attributes:
        units: Committed units of each request, the prompt excluded. A request is a row, unless
            rows that had ended were given to others.
        emitted: How many of them each step brought that the request took part in.
        stats: Figures over all requests.
        row_stats: Figures per request; times are those of the batch.
        steps: The ledger's lines.
        interrupted: True when it was stopped before every request had ended.
    """

    units: tuple[list[int], ...]
    emitted: tuple[list[int], ...]
    stats: Stats
    row_stats: tuple[Stats, ...]
    steps: tuple[StepRecord, ...] = field(repr=False)
    interrupted: bool = False
