"""Drafts by retrieval: what followed the longest recent match of a row's tail.

Works on the host, on the tokens that the step's one read has brought; needs no weights. The data
structures are in `mmspec.drafters.trie` (the rows themselves and earlier outputs) and
`mmspec.drafters.suffix` (external corpora).
"""

import bisect
import weakref
from collections.abc import Sequence

from mmspec.drafters.plain import root_only
from mmspec.drafters.suffix import MatchState, SuffixAutomaton, merge
from mmspec.drafters.trie import Draft, NgramTrie
from mmspec.records import Outcome, Plan, Proposal, Scores, Verdict
from mmspec.rows import TokenRows
from mmspec.tree import BUCKETS, bucket, pack_trees

# Context lengths whose acceptance is learned together: 1, 2, 3-4, 5-8, 9-16 and more.
_CLASSES = (1, 2, 4, 8, 16)
# Weight of the prior m / (m + 2), in observations.
_PRIOR = 2.0


class NgramDrafter:
    """Retrieves chains, or one merged tree per row.

    Attributes:
        memory: The trie. Pass the same one to several calls and their outputs help each other.
    """

    name = "ngram"
    #: Drafting costs microseconds and stays silent without a match.
    is_free = True

    def __init__(
        self,
        rows: TokenRows,
        vocab_size: int,
        *,
        max_match: int = 16,
        branching: int = 1,
        memory: NgramTrie | None = None,
        corpus: SuffixAutomaton | None = None,
    ) -> None:
        """Opens one stream per row.

        Args:
            rows: The rows.
            vocab_size: The target's vocabulary.
            max_match: Longest match that is looked for.
            branching: Most children of a node; 1 drafts the latest continuation as a chain.
            memory: Texts of earlier calls; a fresh trie if None.
            corpus: External texts; where they match longer than the memory, they draft.

        Raises:
            ValueError: If a number is out of range.
        """
        if memory is None:
            memory = NgramTrie(max_match=max_match, max_draft=BUCKETS[-1])
        self.memory = memory
        self._corpus = corpus
        self._rows = rows
        self._vocab_size = vocab_size
        self._branching = branching
        self._streams: list[int] = []
        self._states: list[MatchState] = []
        self._trust = _Trust()
        self._match_lengths: list[int] = []

    def prefill(self) -> None:
        """Reads the prompts."""
        for tokens in self._rows.host_tokens:
            stream = self.memory.open_stream()
            self.memory.extend(stream, tokens)
            self._streams.append(stream)
            # A run may be abandoned between steps; open streams would never be evicted.
            weakref.finalize(self, _close, self.memory, stream)
            if self._corpus is not None:
                state = MatchState(self._corpus)
                state.extend(tokens)
                self._states.append(state)

    def observe(self, tokens: Sequence[int]) -> None:
        """Learns a text that is not a row, such as the output of an earlier request."""
        self.memory.observe(tokens)

    def propose(self, plan: Plan) -> Proposal:
        """What followed each row's tail, as far as it is worth verifying."""
        rows = self._rows
        budget = plan.width - 1
        found = [
            Draft() if done or not budget else self._draft(row, budget)
            for row, done in enumerate(rows.host_done)
        ]
        self._match_lengths = [draft.match_length for draft in found]
        longest = max(self._trust.worth(draft, plan.min_survival) for draft in found)
        if longest == 0:
            return root_only(rows)
        # The step has the cost of its bucket, so every row drafts as much as fits into it.
        width = min(bucket(longest + 1), plan.width)
        drafts = [_first(draft, width - 1) for draft in found]
        return pack_trees(
            [draft.tokens for draft in drafts],
            [draft.parents for draft in drafts],
            rows.roots_B(),
            self._vocab_size,
            width,
        )

    def commit(
        self, proposal: Proposal, scores: Scores, verdict: Verdict, outcome: Outcome
    ) -> None:
        """Extends the streams and learns how far each kind of match can be trusted."""
        for row, new in enumerate(outcome.new_units):
            if not outcome.was_active[row]:
                continue
            levels = proposal.num_levels[row]
            self._trust.learn(self._match_lengths[row], levels, outcome.num_accepted[row])
            self.memory.extend(self._streams[row], new)
            if self._states:
                self._states[row].extend(new)

    def _draft(self, row: int, budget: int) -> Draft:
        draft = self.memory.draft(self._streams[row], budget, branching=self._branching)
        if self._corpus is not None:
            found = self._corpus.draft(
                self._states[row], budget, max_depth=budget, branching=self._branching
            )
            if self._branching > 1:
                draft = merge([draft, found], budget)
            elif found.match_length > draft.match_length:
                draft = found
        return draft


def _close(memory: NgramTrie, stream: int) -> None:
    memory.close_stream(stream)


def _first(draft: Draft, count: int) -> Draft:
    """The first nodes of a draft; parents come first, so they are a draft themselves."""
    return Draft(draft.tokens[:count], draft.parents[:count], draft.match_length)


class _Trust:
    """Chance that a copied token is right, learned for each length of the matched context.

    A draft whose first k tokens held has a context of ``match_length + k`` tokens, so one table
    by context length gives the survival of every node.
    """

    def __init__(self) -> None:
        self._tried = [_PRIOR] * (len(_CLASSES) + 1)
        lengths = (*_CLASSES, 2 * _CLASSES[-1])
        self._held = [_PRIOR * length / (length + 2) for length in lengths]

    def worth(self, draft: Draft, min_survival: float) -> int:
        """How many nodes survive often enough to be worth their verification."""
        if draft.parents != list(range(-1, len(draft) - 1)):
            return sum(score >= min_survival for score in draft.scores)
        survival = 1.0
        for depth in range(len(draft)):
            context = _class_of(draft.match_length + depth)
            survival *= self._held[context] / self._tried[context]
            if survival < min_survival:
                return depth
        return len(draft)

    def learn(self, match_length: int, num_levels: int, num_accepted: int) -> None:
        """Counts how many levels of a draft held; the first that did not is a failure."""
        for depth in range(min(num_accepted + 1, num_levels)):
            context = _class_of(match_length + depth)
            self._tried[context] += 1
            self._held[context] += depth < num_accepted


def _class_of(length: int) -> int:
    return bisect.bisect_left(_CLASSES, length)
