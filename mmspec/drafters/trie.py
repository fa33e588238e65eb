"""Drafts by retrieval: a context trie over what was seen, and the trees that it proposes.

Pure Python on the host, no tensors: a token costs a few microseconds, a draft tens of them. The
trie holds n-grams of up to ``max_match`` tokens, read forwards. Three ideas keep it small and fast:

* **Cursors.** A stream keeps ``anchors[d]``, the node of its last d tokens. On token t the next
  ``anchors[d + 1]`` is ``anchors[d].child(t)``: O(max_match) per token and no re-matching.
* **Occurrences.** A node stores where the token after its latest occurrence stands in the text, so
  a draft of any length is a slice of the text; the trie only has to find the longest match.
* **Laziness.** An n-gram seen once needs no children, because its text says what follows. The
  cursor stops there, and the children are made when the n-gram is met again. Fresh text so costs
  about one node per token instead of ``max_match``.

Sources: incremental match state, SGLang (sglang PR 21243); drafting by frequency ratios,
SuffixDecoding (arXiv 2411.04975, section 4); escape to shorter contexts, prediction by partial
matching (Cleary and Witten 1984). Laziness and the closed form of the confidence are our own.
"""

import heapq
from collections import OrderedDict, deque
from collections.abc import Hashable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

from mmspec.drafters.drafts import Draft, grow_tree, require_at_least, require_tokens

# Children of one node that a tree looks at: a very common token has thousands of followers.
_MAX_SCANNED_CHILDREN = 32
# Match lengths that a tree draws from; each further one has a several times smaller share.
_MAX_ANCHORS = 4
# Tokens of a scope that are drafted without any context, the most frequent ones.
_MAX_COMMON = 32
# A place is one int: text id times the stride, plus the offset in the text.
_STRIDE = 1 << 32


class _Node:
    """An n-gram: the path from the root.

    A leaf has no ``children``. ``next`` is the place of the token after the occurrence that was
    continued last, -1 if none was. ``parent`` is `_EVICTED` once evicted.
    """

    __slots__ = ("children", "count", "next", "parent", "token")

    def __init__(self, parent: "_Node | None", token: Any) -> None:
        self.parent = parent or self
        self.token = token
        self.children: dict[int, _Node] = _NO_CHILDREN
        self.next = -1
        self.count = 1


class _Root(_Node):
    """The n-gram of length 0 of a scope.

    It is its own parent, its ``token`` is the scope and its ``count`` the number of open streams.
    ``common`` holds its most frequent children, ``total`` is how many tokens it has seen.
    """

    __slots__ = ("common", "total")

    def __init__(self, scope: Hashable) -> None:
        super().__init__(None, scope)
        self.children = {}
        self.common: dict[int, _Node] = {}
        self.total = 0
        self.count = 0

    def rank(self, child: _Node) -> None:
        """Counts an occurrence of a child; it may be one of the most frequent now."""
        self.total += 1
        if len(self.common) == _MAX_COMMON and child.token not in self.common:
            least = min(self.common.values(), key=lambda other: other.count)
            if least.count >= child.count:
                return
            del self.common[least.token]
        self.common[child.token] = child


_NO_CHILDREN: dict[int, _Node] = {}  # shared by all leaves, never written to
_EVICTED = _Node(None, None)


class _Stream:
    """A sequence that still grows, and where its tails of every length stand in the trie."""

    __slots__ = ("anchors", "base", "root", "tokens")

    def __init__(self, root: _Root, base: int) -> None:
        self.root = root
        self.base = base
        self.tokens: list[int] = []
        self.anchors: list[_Node | None] = [root]


class NgramTrie:
    """Finds the longest earlier match of a growing sequence, and drafts what followed it.

    A match is an occurrence of the stream's last d tokens, d at most ``max_match``, that is
    followed by a token. The longest wins; among equally long ones the latest does, by when the
    token after it arrived. Streams of one scope see each other's text and what was observed there.

    Memory: at most ``max_nodes`` nodes, of 100 to 400 bytes, whenever a call returns; the least
    recently seen leaves go first. Closed and observed texts are kept up to ``max_nodes`` tokens
    together, the oldest go first; open texts are the caller's, and are always kept. What was
    evicted is no longer found: matches then get shorter, never wrong. Not thread-safe.

    Args:
        max_match: Longest match that is looked for, in tokens.
        max_draft: Deepest draft, in tokens; a call may ask for less.
        max_nodes: Bound of the nodes, and of the tokens of closed texts.

    Raises:
        ValueError: If one of them is not a positive whole number.

    Example:
        >>> trie = NgramTrie()
        >>> row = trie.open_stream()
        >>> trie.extend(row, [1, 2, 3, 4, 5, 1, 2])
        >>> trie.match_length(row), trie.draft(row, budget=3).tokens
        (2, [3, 4, 5])
    """

    def __init__(self, max_match: int = 16, max_draft: int = 32, max_nodes: int = 200_000) -> None:
        self._max_match = require_at_least("max_match", max_match, 1)
        self._max_draft = require_at_least("max_draft", max_draft, 1)
        self._max_nodes = require_at_least("max_nodes", max_nodes, 1)
        self._roots: dict[Hashable, _Root] = {}
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
        """Opens an empty sequence, such as a row of a batch, and returns its id.

        Streams match text of the same scope only.
        """
        stream_id = self._num_opened
        self._num_opened += 1
        root = self._roots.get(scope)
        if root is None:
            root = self._roots[scope] = _Root(scope)
        root.count += 1
        stream = _Stream(root, stream_id * _STRIDE)
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
        # One more per text, so that empty ones do not pile up.
        self._num_closed_tokens += len(ended.tokens) + 1
        while self._num_closed_tokens > self._max_nodes:
            self._num_closed_tokens -= len(self._texts.pop(self._closed.popleft())) + 1
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
        self,
        stream: int,
        budget: int,
        max_depth: int | None = None,
        *,
        branching: int = 1,
        least: float = 0.0,
    ) -> Draft:
        """Drafts what may follow the stream.

        A chain is the text after the longest match. Where that runs into the stream's own end, it
        goes on as if the stretch in between repeated: after ``7 8 9 7`` comes ``8 9 7 8 9 ...``.
        A tree starts from the same continuation and adds those of other occurrences and of shorter
        matches, down to no match at all (the most frequent tokens), the most confident first;
        among followers of one context the latest gets half of the confidence, and the other half
        is shared by frequency.

        Args:
            stream: Id of an open stream.
            budget: Most nodes.
            max_depth: Longest path, in tokens; ``max_draft`` bounds it in any case.
            branching: Most children of one node; 1 gives the chain.
            least: Score below which a tree's nodes are not looked for.

        Returns:
            The draft; a chain is empty without a match.

        Raises:
            ValueError: If no open stream has this id, or a number is no whole one or too small.
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
            length, node = next(matches, (0, None))
            copied = self._copy(own, node.next, min(budget, depth)) if node else []
            return Draft.chain(copied, length)
        followers = partial(self._followers, own, branching)
        # The longest match of each frequency: a shorter one has the very same occurrences.
        by_count = {node.count: (length, node) for length, node in reversed(list(matches))}
        anchors = sorted(by_count.values(), key=lambda anchor: -anchor[0])[:_MAX_ANCHORS]
        places: list[tuple[int, _Node | int]] = [
            (length, node if node.children else node.next) for length, node in anchors
        ]
        places.append((0, own.root))
        return grow_tree(
            places, followers, budget=budget, max_depth=depth, branching=branching, least=least
        )

    def _stream(self, stream: int) -> _Stream:
        found = self._streams.get(stream)
        if found is None:
            raise ValueError(f"stream must be the id of an open stream, got {stream!r}")
        if any(node is not None and node.parent is _EVICTED for node in found.anchors):
            self._rematch(found)
        return found

    def _matches(self, stream: _Stream) -> Iterator[tuple[int, _Node]]:
        """Yields the lengths and nodes that can be continued, the longest first."""
        for length in range(len(stream.anchors) - 1, 0, -1):
            node = stream.anchors[length]
            if node is not None and node.next // _STRIDE in self._texts:
                yield length, node

    def _copy(self, stream: _Stream, place: int, limit: int) -> list[int]:
        """Copies at most ``limit`` tokens from a place on, past the stream's own end too."""
        text_id, offset = divmod(place, _STRIDE)
        text = self._texts[text_id]
        copied = text[offset : offset + limit]
        if text is stream.tokens and len(copied) < limit:
            copied = (copied * (limit // len(copied) + 1))[:limit]
        return copied

    def _followers(
        self, stream: _Stream, limit: int, place: "_Node | int", path: tuple[int, ...]
    ) -> list[tuple[int, float, "_Node | int"]]:
        """Lists what may follow a place: of a text the next token, of a node its children."""
        if isinstance(place, int):
            text_id, offset = divmod(place, _STRIDE)
            text = self._texts.get(text_id, [])
            if offset < len(text):
                return [(text[offset], 1.0, place + 1)]
            # Past the stream's own end come the tokens drafted so far, as in `_copy`.
            return [(path[offset - len(text)], 1.0, place + 1)] if text is stream.tokens else []
        if isinstance(place, _Root):
            common = heapq.nlargest(limit, place.common.values(), key=lambda child: child.count)
            return [
                (child.token, child.count / place.total, child if child.children else child.next)
                for child in common
            ]
        text = self._texts.get(place.next // _STRIDE, [])
        latest = text[place.next % _STRIDE] if text else -1
        scanned = place.children
        if len(scanned) > _MAX_SCANNED_CHILDREN:
            scanned = dict(islice(reversed(scanned.items()), _MAX_SCANNED_CHILDREN))
            if latest in place.children:
                scanned[latest] = place.children[latest]
        total = sum([child.count for child in scanned.values()])
        ranked = [
            ((child.count / total + (token == latest)) / 2, token)
            for token, child in scanned.items()
        ]
        ranked.sort(reverse=True)
        found: list[tuple[int, float, _Node | int]] = []
        for share, token in ranked[:limit]:
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
            if node and (node.children or self._open_leaf(node, depth, place)):
                node.next = place
                child = node.children.get(token)
                if child is None:
                    child = self._add_child(node, token)
                else:
                    child.count += 1
                    if not child.children:
                        self._leaves.move_to_end(child)
            anchors[depth + 1] = child
        # Always there: the cursor of length 0 ends nowhere.
        stream.root.rank(stream.root.children[token])
        while anchors[-1] is None:
            anchors.pop()

    def _open_leaf(self, node: _Node, depth: int, place: int) -> bool:
        """Makes a leaf ready for a child; False where the cursor ends here."""
        if depth == 0:
            return True
        if node.parent is _EVICTED:
            return False
        # Nothing known to follow yet: this occurrence is left to the text.
        if depth == self._max_match or node.next < 0:
            node.next = place
            return False
        node.children = {}
        del self._leaves[node]
        if node.next >= 0:
            self._add_known_child(node, depth)
        return True

    def _add_known_child(self, node: _Node, depth: int) -> None:
        """Makes the child that laziness has spared so far, from the occurrence's text."""
        stream_id, offset = divmod(node.next, _STRIDE)
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
        node.children[token] = child = _Node(node, token)
        self._leaves[child] = None
        self._num_nodes += 1
        return child

    def _evict(self) -> None:
        """Drops the leaf that was not seen for longest; its parent may become the next one."""
        leaf, _ = self._leaves.popitem(last=False)
        parent = leaf.parent
        leaf.parent = _EVICTED
        self._num_nodes -= 1
        del parent.children[leaf.token]
        if isinstance(parent, _Root):
            parent.common.pop(leaf.token, None)
            self._forget_if_empty(parent)
        elif not parent.children:
            parent.children = _NO_CHILDREN
            self._leaves[parent] = None
            self._leaves.move_to_end(parent, last=False)

    def _forget_if_empty(self, root: _Root) -> None:
        if not (root.children or root.count):
            self._roots.pop(root.token, None)

    def _rematch(self, stream: _Stream) -> None:
        """Finds the nodes of all tails afresh; until found, a tail stays marked as evicted."""
        stream.anchors[1:] = []
        for length in range(1, min(self._max_match, len(stream.tokens)) + 1):
            node: _Node | None = stream.root
            for token in stream.tokens[-length:]:
                node = node.children.get(token) if node else None
            stream.anchors.append(node or _EVICTED)
