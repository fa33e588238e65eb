"""Drafts by retrieval from a corpus: a suffix automaton, and the merging of several drafts.

The automaton holds every substring of every document, so the longest match of a stream's tail is
found in amortised O(1) per token at any length, and a draft is a slice of the corpus. It only
grows: use it for corpora that are known beforehand or reused (documents, code, earlier outputs),
and `mmspec.drafters.trie` for what is being written now.

Sources: online construction, Blumer et al. 1985; over several documents, Mohri, Moreno and
Weinstein 2009; as a drafter, with counts and ends taken up the links, SGLang (sglang PR 21425).
Packing the first transition of a state into an array is our own: most states have only one.
"""

import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any
from zipfile import BadZipFile

import numpy as np

from mmspec.drafters.drafts import Draft, grow_tree, require_at_least, require_tokens

#: Ends every document in the corpus; no token has this id, so no match and no draft crosses it.
SEPARATOR = -1

_NONE = -2  # no state, or no token
_MAX_TOKEN = 2**31 - 1
_MAX_CORPUS = 2**30  # the up to twice as many states are counted in 32 bits
_MAX_SCANNED_FOLLOWERS = 32
_MAX_ANCHORS = 4
_FORMAT = "mmspec-suffix-1"
# Per state: suffix link, longest length, first transition, own occurrences, own latest end.
_STATE_ARRAYS = ("link", "length", "first_token", "first_target", "own_count", "own_end")


@dataclass(frozen=True, slots=True)
class Match:
    """The longest match of a stream's tail that is followed by a token of the same document.

    Attributes:
        length: Matched tokens, 0 without a match.
        end: Index in the corpus of the last matched token, for the latest such occurrence; -1
            without a match.
        count: Occurrences in the corpus, those that end a document included.
    """

    length: int = 0
    end: int = -1
    count: int = 0


class SuffixAutomaton:
    """Every substring of a set of documents, with how often and where last it occurs.

    Memory: at most 2 states per token, 32 bytes each, and a dictionary of about 250 bytes for each
    state with several followers. `save` and `load` keep it between runs. Not thread-safe.

    Args:
        max_tokens: Most tokens of all documents together, separators included.

    Raises:
        ValueError: If it is not a whole number from 1 to 2**30.

    Example:
        >>> corpus = SuffixAutomaton()
        >>> corpus.add_document([1, 2, 3, 4, 5])
        >>> state = MatchState(corpus)
        >>> state.extend([9, 2, 3])
        >>> state.longest_match().length, corpus.draft(state, budget=4).tokens
        (2, [4, 5])
    """

    def __init__(self, max_tokens: int = 1_000_000) -> None:
        self._max_tokens = require_at_least("max_tokens", max_tokens, 1)
        if max_tokens > _MAX_CORPUS:
            raise ValueError(f"max_tokens must be at most {_MAX_CORPUS}, got {max_tokens}")
        self._text = array("i")
        self._link = array("i")
        self._length = array("i")
        # The first follower of a state; the others are in `_more`.
        self._first_token = array("i")
        self._first_target = array("i")
        self._more: dict[int, dict[int, int]] = {}
        self._own_count = array("i")
        self._own_end = array("i")
        # The same over all longer contexts, brought up to date when a match is asked for.
        self._count = array("i")
        self._end = array("i")
        self._is_propagated = True
        self._num_documents = 0
        self._add_state(0)

    @property
    def num_tokens(self) -> int:
        """Tokens held, one separator per document included."""
        return len(self._text)

    @property
    def num_states(self) -> int:
        """States held, at most twice the tokens."""
        return len(self._link)

    @property
    def num_documents(self) -> int:
        """Documents added so far."""
        return self._num_documents

    def add_document(self, tokens: Sequence[int]) -> None:
        """Adds a document: amortised O(1) per token. Open match states stay valid.

        The next match after it takes O(states) once, so add documents in bulk where possible.

        Args:
            tokens: Token ids from 0 to 2**31 - 1; an empty document adds nothing.

        Raises:
            ValueError: If a token is out of range, or the corpus would hold more than
                ``max_tokens``; nothing is added then.
        """
        checked = require_tokens(tokens)
        if not checked:
            return
        if max(checked) > _MAX_TOKEN:
            raise ValueError(f"tokens must be at most {_MAX_TOKEN}, got {max(checked)}")
        num_needed = len(self._text) + len(checked) + 1
        if num_needed > self._max_tokens:
            raise ValueError(
                f"the corpus holds at most max_tokens={self._max_tokens} tokens, separators "
                f"included; with this document of {len(checked)} it would hold {num_needed}"
            )
        start = len(self._text)
        self._text.extend(checked)
        self._text.append(SEPARATOR)
        state = 0
        for end, token in enumerate(checked, start):
            state = self._append(state, token)
            self._own_count[state] += 1
            # The occurrence that ends a document has no continuation to draft from.
            if end + 2 < num_needed:
                self._own_end[state] = end
        self._num_documents += 1
        self._is_propagated = False

    def draft(
        self,
        state: "MatchState",
        budget: int,
        max_depth: int = 32,
        *,
        branching: int = 1,
    ) -> Draft:
        """Drafts what followed the match in the corpus.

        Args:
            state: A match state of this automaton.
            budget: Most nodes.
            max_depth: Longest path, in tokens.
            branching: Most children of one node; 1 gives the chain, a slice of the corpus after
                the latest occurrence of the longest match, up to the end of its document. A tree
                adds other occurrences and shorter matches, the most confident first.

        Returns:
            The draft, empty without a match.

        Raises:
            ValueError: If the state is another automaton's, or a number is no whole one or too
                small.
        """
        require_at_least("budget", budget, 0)
        require_at_least("max_depth", max_depth, 0)
        require_at_least("branching", branching, 1)
        if state.automaton is not self:
            raise ValueError("state must be a match state of this automaton, got another's")
        if not (budget and max_depth):
            return Draft()
        if branching == 1:
            match = state.longest_match()
            limit = min(budget, max_depth) if match.length else 0
            return Draft.chain(self._slice(match.end + 1, limit), match.length)
        return grow_tree(
            islice(state._matches(), _MAX_ANCHORS),
            lambda place, _: self._followers(place, branching),
            budget=budget,
            max_depth=max_depth,
            branching=branching,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the automaton to a file of numpy's ``.npz`` format, under exactly this name.

        Raises:
            OSError: If the file cannot be written.
        """
        edges = [
            (state, token, target)
            for state, others in self._more.items()
            for token, target in others.items()
        ]
        arrays: dict[str, Any] = {
            name: np.array(getattr(self, f"_{name}")) for name in _STATE_ARRAYS
        }
        with open(path, "wb") as file:
            np.savez(
                file,
                format=np.array(_FORMAT),
                max_tokens=np.array(self._max_tokens),
                text=np.array(self._text),
                more=np.array(edges, dtype=np.int32).reshape(-1, 3),
                **arrays,
            )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "SuffixAutomaton":
        """Reads what `save` wrote. Runs no code from the file.

        Raises:
            OSError: If the file cannot be read.
            ValueError: If it is not such a file, or its indices do not fit together.
        """
        names = ("format", "max_tokens", "text", "more", *_STATE_ARRAYS)
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in names}
        except (KeyError, ValueError, EOFError, TypeError, AttributeError, BadZipFile) as error:
            raise ValueError(f"{path} is not a saved suffix automaton: {error}") from error
        _check_arrays(arrays, str(path))
        loaded = cls(int(arrays["max_tokens"]))
        for name in ("text", *_STATE_ARRAYS):
            setattr(loaded, f"_{name}", array("i", arrays[name].tobytes()))
        for state, token, target in arrays["more"].tolist():
            loaded._more.setdefault(state, {})[token] = target
        loaded._num_documents = loaded._text.count(SEPARATOR)
        loaded._is_propagated = False
        return loaded

    def _slice(self, start: int, limit: int) -> list[int]:
        """Copies at most ``limit`` tokens, up to the end of the document."""
        copied = self._text[start : start + limit].tolist()
        return copied[: copied.index(SEPARATOR)] if SEPARATOR in copied else copied

    def _followers(self, state: int, limit: int) -> list[tuple[int, float, int]]:
        """Lists the transitions of a state: the latest first, the rest by frequency."""
        first, target = self._first_token[state], self._first_target[state]
        if state not in self._more:
            return [] if first == _NONE else [(first, 1.0, target)]
        others = self._more[state]
        targets = dict(islice(others.items(), _MAX_SCANNED_FOLLOWERS))
        targets[first] = target
        latest = self._text[self._end[state] + 1]
        targets[latest] = others.get(latest, target)
        total = sum(self._count[target] for target in targets.values())
        ranked = [
            (token, (self._count[target] / total + (token == latest)) / 2, target)
            for token, target in targets.items()
        ]
        return sorted(ranked, key=lambda follower: -follower[1])[:limit]

    def _next(self, state: int, token: int) -> int:
        """Returns the state after a token, `_NONE` where there is no transition."""
        if self._first_token[state] == token:
            return self._first_target[state]
        others = self._more.get(state)
        return _NONE if others is None else others.get(token, _NONE)

    def _set_next(self, state: int, token: int, target: int) -> None:
        first = self._first_token[state]
        if first in (token, _NONE):
            self._first_token[state] = token
            self._first_target[state] = target
        else:
            self._more.setdefault(state, {})[token] = target

    def _add_state(self, length: int) -> int:
        for values, initial in (
            (self._link, _NONE),
            (self._length, length),
            (self._first_token, _NONE),
            (self._first_target, _NONE),
            (self._own_count, 0),
            (self._own_end, -1),
        ):
            values.append(initial)
        return len(self._link) - 1

    def _append(self, last: int, token: int) -> int:
        """Extends the document whose text so far is state ``last``; returns the new state."""
        known = self._next(last, token)
        if known != _NONE:
            return self._fitting(last, token, known)
        state = self._add_state(self._length[last] + 1)
        while last != _NONE and self._next(last, token) == _NONE:
            self._set_next(last, token, state)
            last = self._link[last]
        self._link[state] = (
            0 if last == _NONE else self._fitting(last, token, self._next(last, token))
        )
        return state

    def _fitting(self, state: int, token: int, target: int) -> int:
        """Returns the state of exactly ``state`` plus the token, split off the target if longer."""
        length = self._length[state] + 1
        if self._length[target] == length:
            return target
        clone = self._add_state(length)
        self._first_token[clone] = self._first_token[target]
        self._first_target[clone] = self._first_target[target]
        if target in self._more:
            self._more[clone] = self._more[target].copy()
        self._link[clone] = self._link[target]
        self._link[target] = clone
        while state != _NONE and self._next(state, token) == target:
            self._set_next(state, token, clone)
            state = self._link[state]
        return clone

    def _propagate(self) -> None:
        """Adds up the counts, and takes the latest ends, over the tree of suffix links."""
        if self._is_propagated:
            return
        link = np.array(self._link)
        link[0] = 0
        count, end = np.array(self._own_count), np.array(self._own_end)
        # Depth in the tree of links by pointer jumping: after i rounds ``above`` is 2**i links up.
        depth, above = (link != np.arange(len(link))).astype(np.int32), link
        while above.any():
            depth += depth[above]
            above = above[above]
        order = np.argsort(depth, kind="stable")
        starts = np.searchsorted(depth[order], np.arange(1, depth.max() + 2))
        for begin, stop in zip(starts[-2::-1], starts[:0:-1], strict=True):
            level = order[begin:stop]
            np.add.at(count, link[level], count[level])
            np.maximum.at(end, link[level], end[level])
        self._count = array("i", count.tobytes())
        self._end = array("i", end.tobytes())
        self._is_propagated = True


class MatchState:
    """The longest suffix of a stream that occurs in an automaton, moved on token by token.

    Documents may be added meanwhile: the stream is then matched afresh, once.

    Attributes:
        automaton: What is matched against.
    """

    __slots__ = ("_length", "_num_documents", "_state", "_tokens", "automaton")

    def __init__(self, automaton: SuffixAutomaton) -> None:
        self.automaton = automaton
        self._tokens: list[int] = []
        self._state = 0
        self._length = 0
        self._num_documents = automaton.num_documents

    def extend(self, tokens: Sequence[int]) -> None:
        """Appends tokens: amortised O(1) per token, by transitions and suffix links.

        Raises:
            ValueError: If a token is not a whole number of at least 0; nothing is appended then.
        """
        checked = require_tokens(tokens)
        self._tokens.extend(checked)
        self._advance(checked)

    def longest_match(self) -> Match:
        """Returns the longest match of the stream's tail that the corpus can continue."""
        length, state = next(self._matches(), (0, 0))
        if not length:
            return Match()
        return Match(length, self.automaton._end[state], self.automaton._count[state])

    def _matches(self) -> Iterator[tuple[int, int]]:
        """Yields the lengths and states that can be continued, the longest first."""
        automaton = self.automaton
        if self._num_documents != automaton.num_documents:
            self._state = self._length = 0
            self._num_documents = automaton.num_documents
            self._advance(self._tokens)
        automaton._propagate()
        state, length = self._state, self._length
        while length:
            if automaton._end[state] >= 0:
                yield length, state
            state = automaton._link[state]
            length = automaton._length[state]

    def _advance(self, tokens: Sequence[int]) -> None:
        automaton, state, length = self.automaton, self._state, self._length
        find, link, longest = automaton._next, automaton._link, automaton._length
        for token in tokens:
            target = find(state, token)
            while target == _NONE and state:
                state = link[state]
                length = longest[state]
                target = find(state, token)
            if target != _NONE:
                state, length = target, length + 1
        self._state, self._length = state, length


def _check_arrays(arrays: dict[str, np.ndarray], path: str) -> None:
    """Raises ValueError where an index points outside, so that later code need not look."""
    link, length, first_token, first_target, own_count, own_end = (
        arrays[name] for name in _STATE_ARRAYS
    )
    text, more = arrays["text"], arrays["more"]
    is_shaped = (
        str(arrays["format"]) == _FORMAT
        and arrays["max_tokens"].shape == ()
        and all(arrays[name].dtype == np.int32 for name in ("text", "more", *_STATE_ARRAYS))
        and all(arrays[name].shape == link.shape for name in _STATE_ARRAYS)
        and (text.ndim, link.ndim, more.ndim, more.shape[-1:]) == (1, 1, 2, (3,))
        and link.size > 0
    )
    if not is_shaped:
        raise ValueError(f"{path} is not a saved suffix automaton: its arrays have other shapes")
    targets = np.concatenate([link[1:], first_target[first_token != _NONE], more[:, ::2].ravel()])
    fits = (
        text.size <= int(arrays["max_tokens"])
        and bool((text >= SEPARATOR).all())
        and (text.size == 0 or text[-1] == SEPARATOR)
        and bool(((targets >= 0) & (targets < link.size)).all())
        and (link[0], length[0]) == (_NONE, 0)
        and bool((length[link[1:]] < length[1:]).all())
        and bool(((own_end >= -1) & (own_end + 1 < max(1, text.size)) & (own_count >= 0)).all())
    )
    if not fits:
        raise ValueError(f"{path} is not a sound suffix automaton: an index is out of range")
