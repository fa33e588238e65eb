"""Drafts by retrieval: what followed the longest recent match of a row's tail.

Works on the host, on the tokens that the step's one read has brought; needs no weights. The data
structures are in `mmspec.drafters.trie` (the rows themselves and earlier outputs) and
`mmspec.drafters.suffix` (external corpora).
"""

import weakref
from collections.abc import Sequence

from mmspec.drafters.plain import root_only
from mmspec.drafters.suffix import MatchState, SuffixAutomaton, merge
from mmspec.drafters.trie import Draft, NgramTrie
from mmspec.records import Outcome, Plan, Proposal, Scores, Verdict
from mmspec.rows import TokenRows
from mmspec.tree import BUCKETS, bucket, pack_trees

# Longest context that is told apart when acceptance is learned; longer ones share its figures.
_LONGEST_CLASS = 24
# Weight of the prior m / (m + 2), in observations.
_PRIOR = 4.0


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
        self._drafts: list[Draft] = []

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
        self._drafts = [
            Draft() if done or not budget else self._draft(row, budget, plan.min_survival)
            for row, done in enumerate(rows.host_done)
        ]
        longest = max(map(len, self._drafts))
        if longest == 0:
            return root_only(rows)
        return pack_trees(
            [draft.tokens for draft in self._drafts],
            [draft.parents for draft in self._drafts],
            rows.roots_B(),
            self._vocab_size,
            min(bucket(longest + 1), plan.width),
        )

    def commit(
        self, proposal: Proposal, scores: Scores, verdict: Verdict, outcome: Outcome
    ) -> None:
        """Extends the streams and learns how far each kind of match can be trusted."""
        for row, new in enumerate(outcome.new_units):
            if not outcome.was_active[row]:
                continue
            levels = proposal.num_levels[row]
            self._trust.learn(self._drafts[row].match_length, levels, outcome.num_accepted[row])
            self.memory.extend(self._streams[row], new)
            if self._states:
                self._states[row].extend(new)

    def _draft(self, row: int, budget: int, min_survival: float) -> Draft:
        draft = self.memory.draft(self._streams[row], budget, branching=self._branching)
        if self._corpus is not None:
            found = self._corpus.draft(
                self._states[row], budget, max_depth=budget, branching=self._branching
            )
            if self._branching > 1:
                draft = merge([draft, found], budget)
            elif found.match_length > draft.match_length:
                draft = found
        return self._trust.cut(draft, min_survival)


def _close(memory: NgramTrie, stream: int) -> None:
    memory.close_stream(stream)


class _Trust:
    """Chance that a copied token is right, learned for each length of the matched context.

    A draft whose first k tokens held has a context of ``match_length + k`` tokens, so one table
    by context length gives the survival of every node.
    """

    def __init__(self) -> None:
        self._tried = [_PRIOR] * (_LONGEST_CLASS + 1)
        self._held = [_PRIOR * m / (m + 2) for m in range(_LONGEST_CLASS + 1)]

    def cut(self, draft: Draft, min_survival: float) -> Draft:
        """Drops the nodes that survive too rarely to be worth their verification."""
        if draft.parents != list(range(-1, len(draft) - 1)):
            kept = sum(score >= min_survival for score in draft.scores)
            return Draft(draft.tokens[:kept], draft.parents[:kept], draft.match_length)
        survival = 1.0
        for depth in range(len(draft)):
            context = min(draft.match_length + depth, _LONGEST_CLASS)
            survival *= self._held[context] / self._tried[context]
            if survival < min_survival:
                return Draft(draft.tokens[:depth], draft.parents[:depth], draft.match_length)
        return draft

    def learn(self, match_length: int, num_levels: int, num_accepted: int) -> None:
        """Counts how many levels of a draft held; the first that did not is a failure."""
        for depth in range(min(num_accepted + 1, num_levels)):
            context = min(match_length + depth, _LONGEST_CLASS)
            self._tried[context] += 1
            self._held[context] += depth < num_accepted
