"""Drafts by retrieval: a context trie over what was seen, and the trees that it proposes.

Pure Python on the host, no tensors: one token costs a few microseconds, one draft tens of them.

The trie holds n-grams of up to ``max_match`` tokens, read forwards from the root. Three ideas keep
it small and fast:

* **Cursors.** A stream keeps ``anchors[d]``, the node of its last d tokens. On token t the next
  ``anchors[d + 1]`` is ``anchors[d].child(t)``: O(max_match) per token and no re-matching.
* **Occurrences.** A node stores where the token after its latest occurrence stands in the text, so
  a draft of any length is a slice of the text; the trie only has to find the longest match.
* **Laziness.** An n-gram seen once needs no children, because its text says what follows. The
  cursor stops there, and the children are made when the n-gram is met again. Fresh text so costs
  about one node per token instead of ``max_match``.

Sources: the trie with incremental match state is that of SGLang (sglang PR 21243,
``cpp_ngram/trie.cpp``); drafting by frequency ratios follows SuffixDecoding (arXiv 2411.04975,
section 4); the escape to shorter contexts follows prediction by partial matching (Cleary and
Witten 1984). Laziness, and the closed form of the confidence, are our own.
"""

import heapq
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from operator import index
from typing import TypeVar

PlaceT = TypeVar("PlaceT")

# Children of one node that a tree looks at: a very common token has thousands of followers.
_MAX_SCANNED_CHILDREN = 64
# Match lengths that a tree draws from; each further one has a several times smaller share.
_MAX_ANCHORS = 4
# A place in a text is (sequence << 32) + offset: one int, compared and stored without allocation.
_OFFSET_BITS = 32
_OFFSET_MASK = (1 << _OFFSET_BITS) - 1


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
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    match_length: int = 0
    scores: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Checks the lengths.

        Raises:
            ValueError: If the lists differ in length.
        """
        size = len(self.tokens)
        if len(self.parents) != size or len(self.scores) not in (0, size):
            raise ValueError(
                f"a draft needs one parent per token and one score per token or none, got {size} "
                f"tokens, {len(self.parents)} parents and {len(self.scores)} scores"
            )

    def __len__(self) -> int:
        """Number of drafted nodes."""
        return len(self.tokens)

    @property
    def is_chain(self) -> bool:
        """True where every node is the only child of the one before it."""
        return self.parents == list(range(-1, len(self.parents) - 1))

    @classmethod
    def chain(cls, tokens: list[int], match_length: int = 0) -> "Draft":
        """Makes the draft that follows one path.

        Args:
            tokens: The path, nearest token first.
            match_length: Length of the match that it continues, in tokens.

        Returns:
            The chain, with `confidence` as scores.
        """
        depths = range(1, len(tokens) + 1)
        scores = [confidence(match_length, depth) for depth in depths]
        return cls(tokens, list(range(-1, len(tokens) - 1)), match_length, scores)


def confidence(match_length: int, depth: int) -> float:
    """Chance that a copied continuation still holds at a depth.

    A context of m tokens is trusted with m / (m + 1), and it grows by one with every token that
    holds, so the product telescopes: ``m / (m + depth)``. For m = 3 that is 3/4, 3/5, 3/6, ...

    Args:
        match_length: Matched tokens before the continuation, m.
        depth: Tokens into the continuation, from 1.

    Returns:
        The chance in [0, 1]; 0 without a match.
    """
    return match_length / (match_length + depth)


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


class TreeBuilder:
    """Grows one merged tree, the most confident node first.

    The source of the tokens is a function from a place in it to what may follow there, so the trie
    and the suffix automaton share the search. Time is O(nodes · branching · log) per tree.
    """

    def __init__(self, budget: int, max_depth: int, branching: int) -> None:
        """Makes an empty tree.

        Args:
            budget: Most nodes.
            max_depth: Longest path, in tokens.
            branching: Most children of one node, the root included.
        """
        self._budget = budget
        self._max_depth = max_depth
        self._branching = branching
        self._tokens: list[int] = []
        self._parents: list[int] = []
        self._depths: list[int] = []
        self._scores: list[float] = []
        self._children: dict[int, dict[int, int]] = {}

    def token_on_path(self, slot: int, depth: int) -> int:
        """Returns the token at a depth (from 1) on the path from the root to a slot."""
        for _ in range(self._depths[slot] - depth):
            slot = self._parents[slot]
        return self._tokens[slot]

    def grow(
        self,
        anchors: Iterable[tuple[int, PlaceT]],
        followers: Callable[[PlaceT, int], list[tuple[int, float, PlaceT]]],
    ) -> Draft:
        """Grows the tree and packs it.

        Args:
            anchors: Matched lengths and their places, the longest first.
            followers: Given a place and the slot of the tree that it continues (-1: the root),
                lists what may follow: token, share among the followers, its place.

        Returns:
            The tree, in the order in which it grew.
        """
        heap: list[tuple[float, int, int, int, int, PlaceT]] = []
        longest, weight, tick = 0, 1.0, 0

        def push(weight: float, slot: int, length: int, place: PlaceT) -> None:
            nonlocal tick
            trusted = weight * length / (length + 1)
            for token, share, next_place in followers(place, slot):
                tick += 1
                heapq.heappush(
                    heap, (-trusted * share, tick, slot, token, length + 1, next_place)
                )

        for length, place in anchors:
            longest = longest or length
            push(weight, -1, length, place)
            weight /= length + 1
        while heap and len(self._tokens) < self._budget:
            negative, _, parent, token, length, place = heapq.heappop(heap)
            slot = self._place(parent, token, -negative)
            if slot is not None and self._depths[slot] < self._max_depth:
                push(-negative, slot, length, place)
        return Draft(self._tokens, self._parents, longest, self._scores)

    def _place(self, parent: int, token: int, score: float) -> int | None:
        """Returns the slot of the node, made if it may be, else None."""
        siblings = self._children.setdefault(parent, {})
        slot = siblings.get(token)
        if slot is None and len(siblings) < self._branching:
            slot = siblings[token] = len(self._tokens)
            self._tokens.append(token)
            self._parents.append(parent)
            self._depths.append(self._depths[parent] + 1 if parent >= 0 else 1)
            self._scores.append(score)
        return slot


class _Node:
    """An n-gram: the path from the root.

    ``children`` is None for a leaf. ``next`` is the place of the token after the occurrence that
    was continued last, -1 if none was. ``parent`` is None once evicted; a root is its own parent,
    its ``token`` is its scope and its ``count`` the number of its open streams.
    """

    __slots__ = ("children", "count", "next", "parent", "token")

    def __init__(self, parent: "_Node | None", token: Hashable) -> None:
        self.parent = self if parent is None else parent
        self.token = token
        self.children: dict[int, _Node] | None = None
        self.next = -1
        self.count = 1


class _Stream:
    """A sequence that still grows, and where its tails of every length stand in the trie."""

    __slots__ = ("anchors", "base", "is_stale", "root", "tokens")

    def __init__(self, root: _Node, base: int) -> None:
        self.root = root
        self.base = base
        self.tokens: list[int] = []
        self.anchors: list[_Node | None] = [root]
        self.is_stale = False


class NgramTrie:
    """Finds the longest earlier match of a growing sequence, and drafts what followed it.

    A match is an occurrence of the stream's last d tokens, d at most ``max_match``, that is
    followed by a token. The longest wins; among equally long ones the latest does, by when the
    token after it arrived. Streams of one scope see each other's text and what was observed there.

    Memory: at most ``max_nodes`` nodes, of 100 to 400 bytes, whenever a call returns; the least
    recently seen leaves go first. Closed and observed texts are kept up to ``max_nodes`` tokens
    together, the oldest go first; open texts are the caller's, and are always kept. What was
    evicted is no longer found: matches then get shorter, never wrong. Not thread-safe.

    Example:
        >>> trie = NgramTrie()
        >>> row = trie.open_stream()
        >>> trie.extend(row, [1, 2, 3, 4, 5, 1, 2])
        >>> trie.match_length(row), trie.draft(row, budget=3).tokens
        (2, [3, 4, 5])
    """

    def __init__(
        self, max_match: int = 16, max_draft: int = 32, max_nodes: int = 200_000
    ) -> None:
        """Makes an empty trie.

        Args:
            max_match: Longest match that is looked for, in tokens.
            max_draft: Deepest draft, in tokens; a call may ask for less.
            max_nodes: Bound of the nodes, and of the tokens of closed texts.

        Raises:
            ValueError: If one of them is not a positive whole number.
        """
        self._max_match = require_at_least("max_match", max_match, 1)
        self._max_draft = require_at_least("max_draft", max_draft, 1)
        self._max_nodes = require_at_least("max_nodes", max_nodes, 1)
        self._roots: dict[Hashable, _Node] = {}
        self._streams: dict[int, _Stream] = {}
        self._texts: dict[int, list[int]] = {}
        self._closed: deque[int] = deque()
        self._num_closed_tokens = 0
        self._num_opened = 0
        self._num_nodes = 0
        self._leaves: OrderedDict[_Node, None] = OrderedDict()

    @property
    def num_nodes(self) -> int:
        """Nodes held now, the roots excluded."""
        return self._num_nodes

    @property
    def num_tokens(self) -> int:
        """Tokens of text held now, of open and closed streams."""
        return sum(map(len, self._texts.values()))

    def open_stream(self, scope: Hashable = "shared") -> int:
        """Opens an empty sequence, such as a row of a batch.

        Args:
            scope: Name of a space of its own: streams match text of the same scope only.

        Returns:
            The stream's id, never used again.
        """
        stream_id = self._num_opened
        self._num_opened += 1
        root = self._roots.get(scope)
        if root is None:
            root = self._roots[scope] = _Node(None, scope)
            root.children = {}
            root.count = 0
        root.count += 1
        stream = _Stream(root, stream_id << _OFFSET_BITS)
        self._streams[stream_id] = stream
        self._texts[stream_id] = stream.tokens
        return stream_id

    def close_stream(self, stream: int) -> None:
        """Ends a sequence. Its text stays, for the others, until it is the oldest.

        Raises:
            ValueError: If no open stream has this id.
        """
        ended = self._stream(stream)
        del self._streams[stream]
        ended.root.count -= 1
        self._closed.append(stream)
        self._num_closed_tokens += len(ended.tokens)
        while self._num_closed_tokens > self._max_nodes:
            self._num_closed_tokens -= len(self._texts.pop(self._closed.popleft()))
        self._forget_if_empty(ended.root)

    def observe(self, tokens: Sequence[int], scope: Hashable = "shared") -> None:
        """Adds a finished sequence, such as the output of an earlier request.

        Raises:
            ValueError: If a token is not a whole number of at least 0.
        """
        checked = require_tokens(tokens)
        stream = self.open_stream(scope)
        self.extend(stream, checked)
        self.close_stream(stream)

    def extend(self, stream: int, tokens: Sequence[int]) -> None:
        """Appends tokens to a stream: O(max_match) dictionary look-ups per token.

        Raises:
            ValueError: If no open stream has this id, or a token is not a whole number of at least
                0; nothing is appended then.
        """
        growing = self._stream(stream)
        for token in require_tokens(tokens):
            self._advance(growing, token)
            while self._num_nodes > self._max_nodes:
                self._evict()

    def match_length(self, stream: int) -> int:
        """Returns the length of the longest match of the stream's tail, 0 without one.

        Raises:
            ValueError: If no open stream has this id.
        """
        return next((length for length, _ in self._matches(self._stream(stream))), 0)

    def draft(
        self, stream: int, budget: int, max_depth: int | None = None, *, branching: int = 1
    ) -> Draft:
        """Drafts what may follow the stream.

        A chain is the text after the longest match. Where that runs into the stream's own end, it
        goes on as if the stretch in between repeated: after ``7 8 9 7`` comes ``8 9 7 8 9 ...``.
        A tree starts from the same continuation and adds those of other occurrences and of shorter
        matches, the most confident first; among followers of one context the latest gets half of
        the confidence, and the other half is shared by frequency.

        Args:
            stream: Id of an open stream.
            budget: Most nodes.
            max_depth: Longest path, in tokens; ``max_draft`` bounds it in any case.
            branching: Most children of one node; 1 gives the chain.

        Returns:
            The draft, empty without a match.

        Raises:
            ValueError: If no open stream has this id, or a number is too small.
        """
        own = self._stream(stream)
        require_at_least("budget", budget, 0)
        require_at_least("branching", branching, 1)
        depth = self._max_draft
        if max_depth is not None:
            depth = min(depth, require_at_least("max_depth", max_depth, 0))
        if not (budget and depth):
            return Draft()
        matches = self._matches(own)
        if branching == 1:
            length, node = next(iter(matches), (0, own.root))
            return Draft.chain(self._copy(own, node.next, min(budget, depth)), length)
        builder = TreeBuilder(budget, depth, branching)
        anchors: list[tuple[int, _Node | int]] = []
        num_seen = 0
        for length, node in matches:
            # Equally frequent means the very same occurrences: the shorter match adds nothing.
            if node.count != num_seen:
                anchors.append((length, node if node.children else node.next))
                num_seen = node.count
            if len(anchors) == _MAX_ANCHORS:
                break
        return builder.grow(anchors, partial(self._followers, own, builder, branching))

    def _stream(self, stream: int) -> _Stream:
        found = self._streams.get(stream)
        if found is None:
            raise ValueError(f"stream must be the id of an open stream, got {stream!r}")
        return found

    def _matches(self, stream: _Stream) -> Iterable[tuple[int, _Node]]:
        """Yields the lengths and nodes that can be continued, the longest first."""
        if any(node is not None and node.parent is None for node in stream.anchors):
            self._rematch(stream)
        for length in range(len(stream.anchors) - 1, 0, -1):
            node = stream.anchors[length]
            if node is not None and node.next >> _OFFSET_BITS in self._texts:
                yield length, node

    def _copy(self, stream: _Stream, place: int, limit: int) -> list[int]:
        """Copies at most ``limit`` tokens from a place on, past the stream's own end too."""
        if place < 0:
            return []
        text = self._texts[place >> _OFFSET_BITS]
        offset = place & _OFFSET_MASK
        copied = text[offset : offset + limit]
        if text is stream.tokens and len(copied) < limit:
            copied = (copied * (limit // len(copied) + 1))[:limit]
        return copied

    def _followers(
        self,
        stream: _Stream,
        builder: TreeBuilder,
        branching: int,
        place: "_Node | int",
        slot: int,
    ) -> list[tuple[int, float, "_Node | int"]]:
        """Lists what may follow a place: of a node its children, of a text the next token."""
        if isinstance(place, int):
            text = self._texts.get(place >> _OFFSET_BITS)
            past_end = (place & _OFFSET_MASK) - (0 if text is None else len(text))
            if text is None or (past_end >= 0 and text is not stream.tokens):
                return []
            token = text[past_end] if past_end < 0 else builder.token_on_path(slot, past_end + 1)
            return [(token, 1.0, place + 1)]
        children = place.children or {}
        text = self._texts.get(place.next >> _OFFSET_BITS)
        latest = -1 if text is None else text[place.next & _OFFSET_MASK]
        scanned = dict(islice(reversed(children.items()), _MAX_SCANNED_CHILDREN))
        if latest in children:
            scanned[latest] = children[latest]
        total = sum(child.count for child in scanned.values())
        ranked = [
            ((child.count / total + (token == latest)) / (2 if latest in scanned else 1), token)
            for token, child in scanned.items()
        ]
        found: list[tuple[int, float, _Node | int]] = []
        for share, token in heapq.nlargest(branching, ranked):
            child = scanned[token]
            after = place.next + 1 if token == latest else child.next
            found.append((token, share, child if child.children else after))
        return found

    def _advance(self, stream: _Stream, token: int) -> None:
        """Appends one token: moves every cursor from its node to the child."""
        place = stream.base + len(stream.tokens)
        stream.tokens.append(token)
        anchors = stream.anchors
        anchors.append(None)
        # Deepest first, so that the list can be updated in place.
        for depth in range(len(anchors) - 2, -1, -1):
            node = anchors[depth]
            child = None
            if node is not None and (
                node.children is not None or self._open_leaf(stream, node, depth, place)
            ):
                node.next = place
                child = node.children.get(token)
                if child is None:
                    child = self._add_child(node, token)
                else:
                    child.count += 1
                    if child.children is None:
                        self._leaves.move_to_end(child)
            anchors[depth + 1] = child
        while anchors[-1] is None:
            anchors.pop()
        if stream.is_stale:
            self._rematch(stream)

    def _open_leaf(self, stream: _Stream, node: _Node, depth: int, place: int) -> bool:
        """Makes a leaf ready for a child; False where the cursor ends here."""
        if node.parent is None:
            stream.is_stale = True
            return False
        is_only_occurrence = node.next < 0 and node.count == 1
        if depth == self._max_match or is_only_occurrence:
            node.next = place
            return False
        node.children = {}
        del self._leaves[node]
        if node.next >= 0:
            self._add_known_child(node, depth)
        return True

    def _add_known_child(self, node: _Node, depth: int) -> None:
        """Makes the child that laziness has spared so far, from the occurrence's text."""
        stream_id, offset = node.next >> _OFFSET_BITS, node.next & _OFFSET_MASK
        text = self._texts.get(stream_id)
        if text is None:
            return
        child = self._add_child(node, text[offset])
        if offset + 1 < len(text):
            child.next = node.next + 1
        elif stream_id in self._streams:
            # The occurrence is the very end of another open stream: its cursor takes up again.
            anchors = self._streams[stream_id].anchors
            anchors.extend([None] * (depth + 2 - len(anchors)))
            anchors[depth + 1] = child

    def _add_child(self, node: _Node, token: int) -> _Node:
        child = node.children[token] = _Node(node, token)
        self._leaves[child] = None
        self._num_nodes += 1
        return child

    def _evict(self) -> None:
        """Drops the leaf that was not seen for longest; its parent may become the next one."""
        leaf, _ = self._leaves.popitem(last=False)
        parent = leaf.parent
        leaf.parent = None
        self._num_nodes -= 1
        del parent.children[leaf.token]
        if parent.parent is parent:
            self._forget_if_empty(parent)
        elif not parent.children:
            parent.children = None
            self._leaves[parent] = None
            self._leaves.move_to_end(parent, last=False)

    def _forget_if_empty(self, root: _Node) -> None:
        if not (root.children or root.count):
            self._roots.pop(root.token, None)

    def _rematch(self, stream: _Stream) -> None:
        """Finds the nodes of all tails afresh, after a cursor's node was evicted."""
        stream.is_stale = False
        anchors: list[_Node | None] = [stream.root]
        for length in range(1, min(self._max_match, len(stream.tokens)) + 1):
            node: _Node | None = stream.root
            for token in stream.tokens[-length:]:
                node = node.children.get(token) if node is not None and node.children else None
            anchors.append(node)
        while anchors[-1] is None:
            anchors.pop()
        stream.anchors = anchors


def require_at_least(name: str, value: int, least: int) -> int:
    """Returns the value.

    Raises:
        ValueError: If it is not a whole number of at least ``least``.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    return value


def require_tokens(tokens: Iterable[int]) -> list[int]:
    """Returns the tokens as plain ints.

    Raises:
        ValueError: If one is not a whole number of at least 0.
    """
    try:
        checked = list(map(index, tokens))
    except TypeError as error:
        raise ValueError(f"tokens must be whole numbers, got {tokens!r}") from error
    if checked and min(checked) < 0:
        raise ValueError(f"tokens must be at least 0, got {min(checked)}")
    return checked
