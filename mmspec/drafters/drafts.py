"""What a retrieval drafter drafts: chains and trees with scores, grown, merged and calibrated."""

import functools
import heapq
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count
from operator import index
from typing import TypeVar

PlaceT = TypeVar("PlaceT")

# Trust in the context of length 0, where the followers are the most frequent tokens of all.
_NO_CONTEXT_TRUST = 0.3


@dataclass(frozen=True, slots=True)
class Draft:
    """A drafted chain or tree, packed parents first; the root itself is not in it.

    Attributes:
        tokens: Token of every node.
        parents: Index of every node's parent, smaller than its own; -1 is the root, the last token
            of the stream.
        match_length: Tokens of the stream that matched an earlier text, for the longest match.
        scores: Confidence of every node in [0, 1], roughly the chance that it is accepted; empty
            stands for `confidence` at every node's depth.

    Raises:
        ValueError: If the lists differ in length.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    match_length: int = 0
    scores: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        size = len(self.tokens)
        if len(self.parents) != size or len(self.scores) not in (0, size):
            raise ValueError(
                f"a draft needs one parent per token and one score per token or none, got {size} "
                f"tokens, {len(self.parents)} parents and {len(self.scores)} scores"
            )

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def is_chain(self) -> bool:
        """True where every node follows the one before it."""
        return self.parents == list(range(-1, len(self.parents) - 1))

    @classmethod
    def chain(cls, tokens: list[int], match_length: int = 0) -> "Draft":
        """Makes the draft that is one path, nearest token first, with `confidence` as scores."""
        scores = [confidence(match_length, depth) for depth in range(1, len(tokens) + 1)]
        return cls(tokens, list(range(-1, len(tokens) - 1)), match_length, scores)


def confidence(match_length: int, depth: int) -> float:
    """Returns the chance that a copied continuation still holds at a depth, counted from 1.

    A context of m tokens is trusted with m / (m + 2), fitted on source code. It grows by one with
    every token that holds, so the product telescopes: m (m + 1) / ((m + depth) (m + depth + 1)).
    """
    reached = match_length + depth
    return match_length * (match_length + 1) / (reached * (reached + 1))


def grow_tree(
    anchors: Iterable[tuple[int, PlaceT]],
    followers: Callable[[PlaceT, tuple[int, ...]], list[tuple[int, float, PlaceT]]],
    *,
    budget: int,
    max_depth: int,
    branching: int,
    least: float = 0.0,
) -> Draft:
    """Grows one merged tree, the most confident node first, in O(nodes · branching · log) time.

    Args:
        anchors: Matched lengths and their places in the source of tokens, the longest first; one
            of length 0 is where tokens are drawn from that need no context.
        followers: Given a place and the path of tokens that led there from the root, lists what
            may follow: token, share among the followers, place after it.
        budget: Most nodes.
        max_depth: Longest path, in tokens; at least 1.
        branching: Most children of one node, the root included.
        least: Score below which no node is worth looking for.

    Returns:
        The tree in the order in which it grew, so that the scores do not rise.
    """
    tokens: list[int] = []
    parents: list[int] = []
    scores: list[float] = []
    slots: dict[tuple[int, ...], int] = {(): -1}
    num_children: defaultdict[int, int] = defaultdict(int)
    heap: list[tuple[float, int, int, tuple[int, ...], PlaceT]] = []
    ticks = count()

    def push(score: float, path: tuple[int, ...], length: int, place: PlaceT) -> None:
        trusted = score * _trust(length)
        if trusted < least:
            return
        for token, share, after in followers(place, path):
            item = (-trusted * share, next(ticks), length + 1, (*path, token), after)
            heapq.heappush(heap, item)

    longest, weight = 0, 1.0
    for length, place in anchors:
        longest = longest or length
        push(weight, (), length, place)
        weight *= 1 - _trust(length)
    while heap and len(tokens) < budget:
        negative, _, length, path, place = heapq.heappop(heap)
        if -negative < least:
            break
        if path not in slots:
            parent = slots[path[:-1]]
            if num_children[parent] == branching:
                continue
            num_children[parent] += 1
            slots[path] = len(tokens)
            tokens.append(path[-1])
            parents.append(parent)
            scores.append(-negative)
        if len(path) < max_depth:
            push(-negative, path, length, place)
    return Draft(tokens, parents, longest, scores)


@functools.lru_cache(maxsize=1024)
def _trust(length: int) -> float:
    return confidence(length, 1) if length else _NO_CONTEXT_TRUST


def merge(drafts: Sequence[Draft], budget: int) -> Draft:
    """Merges drafts for the same root into one tree under a node budget.

    Nodes with the same token under the same parent become one, with the higher score. The best
    nodes are kept; a node never scores above its parent, so the kept ones form a tree. Among equal
    scores the earlier draft, and the earlier node in it, comes first.

    Args:
        drafts: Drafts to merge, the preferred ones first.
        budget: Most nodes to keep.

    Returns:
        The tree, best node first, with the longest of the match lengths.

    Raises:
        ValueError: If the budget is negative, a parent does not come before its child, or a score
            lies outside [0, 1].

    Example:
        >>> tree = merge([Draft.chain([5, 6, 7], 4), Draft.chain([5, 8], 2)], budget=4)
        >>> tree.tokens, tree.parents  # 5: 4/5, 6: 4/6, 7: 4/7, 8: 2/4
        ([5, 6, 7, 8], [-1, 0, 1, 0])
    """
    require_at_least("budget", budget, 0)
    slots: dict[tuple[int, int], int] = {}
    tokens: list[int] = []
    parents: list[int] = []
    scores: list[float] = []
    for draft in drafts:
        own_slots: list[int] = []
        node_scores = draft.scores or _default_scores(draft)
        for i, (token, parent, score) in enumerate(
            zip(draft.tokens, draft.parents, node_scores, strict=True)
        ):
            if not (-1 <= parent < i and 0 <= score <= 1):
                raise ValueError(
                    "a parent must be -1 or come before its child, and a score lie in [0, 1], "
                    f"got parent {parent} and score {score} at node {i}"
                )
            above = own_slots[parent] if parent >= 0 else -1
            score = min(score, scores[above]) if above >= 0 else score
            slot = slots.setdefault((above, token), len(tokens))
            if slot == len(tokens):
                tokens.append(token)
                parents.append(above)
                scores.append(score)
            elif score > scores[slot]:
                scores[slot] = score
            own_slots.append(slot)
    # The sort is stable and a parent was entered before its children, so parents stay first.
    kept = sorted(range(len(tokens)), key=lambda slot: -scores[slot])[:budget]
    packed = {slot: i for i, slot in enumerate(kept)} | {-1: -1}
    return Draft(
        [tokens[slot] for slot in kept],
        [packed[parents[slot]] for slot in kept],
        max((draft.match_length for draft in drafts), default=0),
        [scores[slot] for slot in kept],
    )


def _default_scores(draft: Draft) -> list[float]:
    depths: list[int] = []
    for parent in draft.parents:
        depths.append(depths[parent] + 1 if 0 <= parent < len(depths) else 1)
    return [confidence(draft.match_length, depth) for depth in depths]


def require_at_least(name: str, value: int, least: int) -> int:
    """Returns the value, or raises ValueError if it is no whole number or too small."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    return value


def require_tokens(tokens: Iterable[int]) -> list[int]:
    """Returns the tokens as plain ints, or raises ValueError if one is not, or is negative."""
    try:
        checked = list(map(index, tokens))
    except TypeError as error:
        raise ValueError(f"tokens must be whole numbers, got {tokens!r}") from error
    if checked and min(checked) < 0:
        raise ValueError(f"tokens must be at least 0, got {min(checked)}")
    return checked


class Calibration:
    """How often drafted nodes really hold, learned for each size of score.

    The score of a node is a guess of its survival; here it counts as a few trials. Nodes that were
    not verified teach too: what the target chose shows whether they would have held.
    """

    #: Trials that the score itself counts for.
    PRIOR_TRIALS = 8.0
    #: Weight of old evidence, per node of the class.
    DECAY = 0.98
    #: Classes per halving of the score.
    FINENESS = 2
    LEAST = 1e-4

    def __init__(self) -> None:
        """Trusts the scores."""
        num_classes = self._class_of(self.LEAST) + 1
        self._tried = [0.0] * num_classes
        self._held = [0.0] * num_classes

    def survival(self, score: float) -> float:
        """The chance that a node of this score is accepted."""
        klass = self._class_of(score)
        held = self._held[klass] + self.PRIOR_TRIALS * score
        return held / (self._tried[klass] + self.PRIOR_TRIALS)

    def calibrated(self, draft: Draft) -> Draft:
        """The draft with survivals for scores, in the same order."""
        chances = list(map(self.survival, draft.scores))
        return Draft(draft.tokens, draft.parents, draft.match_length, chances)

    def learn(self, draft: Draft, emitted: Sequence[int]) -> None:
        """Compares a draft with what followed in the end; nodes beyond it teach nothing."""
        depths: list[int] = []
        holds: list[bool | None] = []
        for token, parent, score in zip(draft.tokens, draft.parents, draft.scores, strict=True):
            depth, above = (depths[parent] + 1, holds[parent]) if parent >= 0 else (0, True)
            held = above
            if above:
                held = emitted[depth] == token if depth < len(emitted) else None
            depths.append(depth)
            holds.append(held)
            if held is not None:
                klass = self._class_of(score)
                self._tried[klass] = self._tried[klass] * self.DECAY + 1
                self._held[klass] = self._held[klass] * self.DECAY + held

    def _class_of(self, score: float) -> int:
        return round(-self.FINENESS * math.log2(max(score, self.LEAST)))
