"""Drafts by retrieval: what followed the longest recent match of a row's tail.

Works on the host, on the tokens that the step's one read has brought; needs no weights. The data
structures are in `mmspec.drafters.trie` (the rows themselves and earlier outputs) and
`mmspec.drafters.suffix` (external corpora).
"""

import weakref
from collections.abc import Collection, Sequence
from operator import or_

from mmspec.drafters.drafts import Calibration, Draft, merge
from mmspec.drafters.plain import root_only
from mmspec.drafters.suffix import MatchState, SuffixAutomaton
from mmspec.drafters.trie import NgramTrie
from mmspec.drafters.width import least_score, propose_worthwhile
from mmspec.records import Outcome, Plan, Proposal, Scores, Verdict
from mmspec.rows import TokenRows
from mmspec.tree import BUCKETS


class NgramDrafter:
    """Retrieves one merged tree per row, or chains, and drafts as much of them as pays.

    Attributes:
        memory: The trie. Pass the same one to several calls and their outputs help each other.
    """

    name = "ngram"
    #: Drafting costs next to nothing, and `Plan.prices` is heeded.
    is_free = True

    def __init__(
        self,
        rows: TokenRows,
        vocab_size: int,
        *,
        max_match: int = 16,
        branching: int = 16,
        memory: NgramTrie | None = None,
        corpus: SuffixAutomaton | None = None,
        placeholders: Collection[int] = (),
    ) -> None:
        """Opens one stream per row.

        Args:
            rows: The rows.
            vocab_size: The target's vocabulary.
            max_match: Longest match that is looked for.
            branching: Most children of a node; 1 drafts the latest continuation as a chain, and is
                silent without a match.
            memory: Texts of earlier calls; a fresh trie if None.
            corpus: External texts; where they match longer than the memory, they draft.
            placeholders: Tokens of a prompt that are not text (an image has hundreds); they are
                neither matched nor drafted.

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
        self._placeholders = frozenset(placeholders)
        self._streams: list[int] = []
        self._states: list[MatchState] = []
        self._calibration = Calibration()
        self._found: list[Draft] = []

    def prefill(self) -> None:
        """Reads the prompts."""
        for prompt in self._rows.host_tokens:
            tokens = [token for token in prompt if token not in self._placeholders]
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
        if plan.width == 1:
            self.rest()
            return root_only(self._rows)
        found = self.find(plan.width - 1, least_score(plan))
        return propose_worthwhile(found, self._rows, plan, self._vocab_size)

    def rest(self) -> None:
        """Looks for nothing in this step."""
        self._found = []

    def find(
        self, budget: int, least: float = 0.0, *, without: Sequence[bool] | None = None
    ) -> list[Draft]:
        """What followed each row's tail: a draft per row, its scores the chances of its nodes.

        Args:
            budget: Most nodes of a row; `commit` learns from what was found last.
            least: Score below which nodes are not looked for.
            without: Rows that are left out, besides those that have ended.
        """
        left_out = (
            self._rows.host_done if without is None else map(or_, self._rows.host_done, without)
        )
        self._found = [
            Draft() if is_out else self._draft(row, budget, least)
            for row, is_out in enumerate(left_out)
        ]
        return list(map(self._calibration.calibrated, self._found))

    def commit(
        self, proposal: Proposal, scores: Scores, verdict: Verdict, outcome: Outcome
    ) -> None:
        """Extends the streams and learns how far each size of score can be trusted."""
        for row, new in enumerate(outcome.new_units):
            if not outcome.was_active[row]:
                continue
            if self._found:
                self._calibration.learn(self._found[row], new)
            self.memory.extend(self._streams[row], new)
            if self._states:
                self._states[row].extend(new)

    def _draft(self, row: int, budget: int, least: float) -> Draft:
        draft = self.memory.draft(
            self._streams[row], budget, branching=self._branching, least=least
        )
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
