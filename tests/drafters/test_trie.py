"""The trie against a search through all texts; its memory; the shape of its trees."""

import random

import pytest

from mmspec.drafters.drafts import Draft, confidence, merge
from mmspec.drafters.trie import NgramTrie


class Texts:
    """What a trie without a memory bound has to know: every text, and when each token came."""

    def __init__(self):
        self.tokens: dict[int, list[int]] = {}
        self.times: dict[int, list[int]] = {}
        self.clock = 0

    def extend(self, stream, tokens):
        self.tokens.setdefault(stream, []).extend(tokens)
        for _ in tokens:
            self.times.setdefault(stream, []).append(self.clock)
            self.clock += 1

    def longest_match(self, stream, max_match):
        """Length, text and index of the token after the longest, then latest, match."""
        own = self.tokens[stream]
        for length in range(min(max_match, len(own)), 0, -1):
            found = [
                (self.times[other][after], other, after)
                for other, tokens in self.tokens.items()
                for after in range(length, len(tokens))
                if tokens[after - length : after] == own[-length:]
            ]
            if found:
                return length, *max(found)[1:]
        return 0, None, None

    def chain(self, stream, max_match, limit):
        length, other, after = self.longest_match(stream, max_match)
        if not length:
            return 0, []
        if other != stream:
            return length, self.tokens[other][after : after + limit]
        text = list(self.tokens[stream])
        size = len(text)
        for i in range(limit):
            text.append(text[after + i])
        return length, text[size:]

    def contains(self, stream, path):
        """Whether the path was seen, or is a repetition of what the stream ends in."""
        width = len(path)
        texts = [t if s != stream else t + path[:-1] for s, t in self.tokens.items()]
        return any(
            text[i : i + width] == path for text in texts for i in range(len(text) - width + 1)
        )


def assert_is_tree(draft, budget, max_depth, branching):
    assert len(draft) <= budget
    edges = list(zip(draft.parents, draft.tokens, strict=True))
    assert len(set(edges)) == len(edges)
    depths = []
    for i, parent in enumerate(draft.parents):
        assert -1 <= parent < i
        depths.append(1 if parent < 0 else depths[parent] + 1)
        assert 0 <= draft.scores[i] <= (1 if parent < 0 else draft.scores[parent])
        assert draft.parents.count(parent) <= branching
    assert max(depths, default=0) <= max_depth
    assert draft.scores == sorted(draft.scores, reverse=True)


def paths_of(draft):
    paths = []
    for token, parent in zip(draft.tokens, draft.parents, strict=True):
        paths.append([*(paths[parent] if parent >= 0 else []), token])
    return paths


def next_tokens(rng, vocab_size, history):
    if len(history) > 4 and rng.random() < 0.3:
        start = rng.randrange(len(history))
        return history[start : start + 5]
    return [rng.randrange(vocab_size) for _ in range(rng.choice([1, 1, 2, 3]))]


def assert_sound(trie):
    """Nodes, leaves, parents and occurrences agree with each other and with the texts."""
    nodes, leaves = 0, set()
    stack = [(root, ()) for root in trie._roots.values()]
    while stack:
        node, gram = stack.pop()
        if gram:
            nodes += 1
            if not node.children:
                leaves.add(node)
            text_id, offset = divmod(node.next, 1 << 32)
            text = trie._texts.get(text_id)
            if text is not None:
                assert offset < len(text)
                assert tuple(text[offset - len(gram) : offset]) == gram
        for token, child in node.children.items():
            assert child.parent is node
            assert child.token == token
            stack.append((child, (*gram, token)))
    assert nodes == trie.num_nodes
    assert leaves == set(trie._leaves)


@pytest.mark.parametrize("seed", range(40))
def test_match_and_chain_equal_a_search_at_every_step(seed):
    rng = random.Random(seed)
    max_match, vocab_size = rng.choice([1, 2, 3, 5, 16]), rng.choice([1, 2, 3, 6])
    trie, texts = NgramTrie(max_match, max_draft=8), Texts()
    live = [trie.open_stream() for _ in range(rng.choice([1, 2, 4]))]
    for stream in live:
        texts.extend(stream, [])
    for _ in range(50):
        if rng.random() < 0.04:
            live.append(trie.open_stream())
            texts.extend(live[-1], [])
        if rng.random() < 0.04 and len(live) > 1:
            trie.close_stream(live.pop(0))
        if rng.random() < 0.04:
            observed = [rng.randrange(vocab_size) for _ in range(rng.randrange(9))]
            trie.observe(observed)
            texts.extend(("observed", texts.clock), observed)
        stream = rng.choice(live)
        new = next_tokens(rng, vocab_size, texts.tokens[stream])
        trie.extend(stream, new)
        texts.extend(stream, new)
        for other in live:
            length, chain = texts.chain(other, max_match, 8)
            assert trie.match_length(other) == length
            assert trie.draft(other, budget=20) == Draft.chain(chain, length)
            assert trie.draft(other, budget=3).tokens == chain[:3]
    assert_sound(trie)


@pytest.mark.parametrize("seed", range(20))
def test_trees_are_valid_start_with_the_chain_and_were_seen(seed):
    rng = random.Random(seed)
    max_match, vocab_size = rng.choice([1, 3, 16]), rng.choice([1, 3, 6])
    trie, texts = NgramTrie(max_match), Texts()
    live = [trie.open_stream() for _ in range(3)]
    for stream in live:
        texts.extend(stream, [])
    for _ in range(40):
        stream = rng.choice(live)
        new = next_tokens(rng, vocab_size, texts.tokens[stream])
        trie.extend(stream, new)
        texts.extend(stream, new)
        budget, max_depth, branching = rng.randrange(20), rng.randrange(8), rng.choice([2, 3])
        tree = trie.draft(stream, budget, max_depth, branching=branching)
        assert_is_tree(tree, budget, max_depth, branching)
        if trie.match_length(stream):
            assert tree.tokens[:1] == trie.draft(stream, budget, max_depth).tokens[:1]
        assert all(texts.contains(stream, path) for path in paths_of(tree))
        chain = trie.draft(stream, budget, max_depth)
        assert_is_tree(chain, min(budget, max_depth), max_depth, 1)


@pytest.mark.parametrize("max_nodes", [1, 2, 7, 40])
@pytest.mark.parametrize("seed", range(6))
def test_eviction_keeps_the_budget_and_every_match_true(seed, max_nodes):
    rng = random.Random(seed)
    vocab_size = rng.choice([2, 5, 30])
    trie, texts = NgramTrie(max_match=4, max_draft=6, max_nodes=max_nodes), Texts()
    live = [trie.open_stream() for _ in range(3)]
    for stream in live:
        texts.extend(stream, [])
    for step in range(120):
        if step % 20 == 19:
            trie.close_stream(live.pop(0))
            live.append(trie.open_stream())
            texts.extend(live[-1], [])
        stream = rng.choice(live)
        new = next_tokens(rng, vocab_size, texts.tokens[stream])
        trie.extend(stream, new)
        texts.extend(stream, new)
        assert trie.num_nodes <= max_nodes
        assert trie.num_tokens <= max_nodes + sum(len(texts.tokens[s]) for s in live)
        assert_sound(trie)
        for other in live:
            length, draft = trie.match_length(other), trie.draft(other, budget=6)
            assert length <= texts.longest_match(other, 4)[0]
            assert bool(length) == bool(draft.tokens)
            tree = trie.draft(other, budget=9, branching=3)
            assert_is_tree(tree, 9, 6, 3)
            assert all(texts.contains(other, path) for path in paths_of(draft) + paths_of(tree))


def test_a_row_that_waited_while_its_nodes_were_evicted_matches_again():
    trie = NgramTrie(max_match=3, max_nodes=30)
    waiting, busy = trie.open_stream(), trie.open_stream()
    trie.extend(waiting, [1, 2, 3, 4, 1, 2, 3])
    trie.extend(busy, list(range(100, 160)))
    assert trie.match_length(waiting) == 0
    trie.extend(busy, [1, 2, 3, 5, 1, 2, 3, 6])
    assert trie.match_length(waiting) == 3
    assert trie.draft(waiting, budget=1).tokens == [6]


def test_the_least_recently_seen_text_is_forgotten_first():
    trie = NgramTrie(max_match=3, max_nodes=60)
    row = trie.open_stream()
    trie.extend(row, [1, 2, 3, 4])
    for block in range(6):
        trie.extend(row, [*range(100 * block + 10, 100 * block + 30), 1, 2, 3, 4])
    trie.extend(row, [1, 2, 3])
    assert trie.match_length(row) == 3
    trie.extend(row, [10, 11])
    assert trie.match_length(row) == 0


def test_a_leaf_that_was_seen_again_outlives_younger_ones():
    trie = NgramTrie(max_match=1, max_nodes=5)
    row = trie.open_stream()
    trie.extend(row, [1, 2, 3, 1, 4, 5, 6])
    assert set(trie._roots["shared"].children) == {1, 3, 4, 5, 6}
    trie.extend(row, [1])
    assert trie.draft(row, budget=2).tokens == [4, 5]


def test_a_node_whose_children_are_gone_goes_next():
    trie = NgramTrie(max_match=2, max_nodes=6)
    for tokens in ([1, 2], [1, 3], [5], [6], [7], [8]):
        trie.observe(tokens)
    assert set(trie._roots["shared"].children) == {1, 3, 5, 6, 7, 8}
    trie.observe([9])
    assert set(trie._roots["shared"].children) == {3, 5, 6, 7, 8, 9}


def test_scopes_do_not_see_each_other():
    trie = NgramTrie()
    trie.observe([1, 2, 3, 4])
    trie.observe([1, 2, 7, 8], scope="other")
    shared, other, fresh = trie.open_stream(), trie.open_stream("other"), trie.open_stream("fresh")
    for stream in (shared, other, fresh):
        trie.extend(stream, [1, 2])
    assert trie.draft(shared, budget=4).tokens == [3, 4]
    assert trie.draft(other, budget=4).tokens == [7, 8]
    assert trie.draft(fresh, budget=4) == Draft()


def test_scopes_that_hold_nothing_are_dropped():
    trie = NgramTrie(max_nodes=5)
    for scope in range(50):
        trie.observe([1, 2, 3], scope=scope)
        trie.close_stream(trie.open_stream(("empty", scope)))
    assert len(trie._roots) <= 5
    assert len(trie._texts) <= 5


def test_a_long_draft_goes_past_the_depth_of_the_trie():
    trie = NgramTrie(max_match=2)
    trie.observe(range(100))
    row = trie.open_stream()
    trie.extend(row, [3, 4])
    assert trie.draft(row, budget=50).tokens == list(range(5, 37))
    assert trie.draft(row, budget=50, max_depth=7).tokens == list(range(5, 12))


def test_a_repetition_goes_on_repeating():
    trie = NgramTrie()
    row = trie.open_stream()
    trie.extend(row, [7, 8, 9, 7])
    assert trie.draft(row, budget=7).tokens == [8, 9, 7, 8, 9, 7, 8]
    assert [8, 9, 7, 8, 9, 7, 8] in paths_of(trie.draft(row, budget=30, branching=2))


def test_a_tree_takes_the_latest_first_and_the_most_frequent_next():
    trie = NgramTrie()
    for follower in (2, 3, 3, 3, 2, 2, 2, 4):
        trie.observe([1, follower])
    row = trie.open_stream()
    trie.extend(row, [1])
    tree = trie.draft(row, budget=3, branching=3)
    # Trust 1/3 of a match of one token; shares (1/8 + 1)/2 and 4/8/2. Without any context, 1 is
    # the most frequent of 17 tokens and gets 0.3 of the other 2/3.
    assert tree.tokens == [4, 1, 2]
    assert tree.parents == [-1, -1, -1]
    assert tree.scores == pytest.approx([9 / 16 / 3, 9 / 17 * 0.3 * 2 / 3, 1 / 4 / 3])


def test_a_tree_without_a_match_drafts_what_is_frequent():
    trie = NgramTrie()
    row = trie.open_stream()
    trie.extend(row, [7, 5, 5, 5, 5, 5, 5, 8, 8, 8, 9])
    assert trie.draft(row, budget=3) == Draft()
    tree = trie.draft(row, budget=3, branching=2)
    assert tree.tokens[0] == 5
    assert tree.match_length == 0
    assert tree.scores[0] == pytest.approx(0.3 * 6 / 11)


def test_the_frequent_tokens_are_the_most_frequent_ones():
    rng = random.Random(0)
    trie = NgramTrie(max_match=2, max_nodes=120)
    row = trie.open_stream()
    for _ in range(300):
        trie.extend(row, [min(int(rng.expovariate(0.05)), 90)])
        root = trie._roots["shared"]
        counts = sorted((child.count for child in root.children.values()), reverse=True)
        common = sorted((child.count for child in root.common.values()), reverse=True)
        assert all(root.children[token] is child for token, child in root.common.items())
        if trie.num_nodes < 120:
            assert common == counts[:32]


def test_a_draft_knows_whether_it_is_a_chain():
    assert Draft().is_chain
    assert Draft.chain([4, 4, 4], 1).is_chain
    assert not Draft([1, 2], [-1, -1]).is_chain


def test_confidence_telescopes():
    assert confidence(3, 1) == pytest.approx(3 / 5)
    assert confidence(3, 3) == pytest.approx(3 / 5 * 4 / 6 * 5 / 7)
    assert confidence(0, 1) == 0


def test_an_empty_stream_and_an_empty_budget_draft_nothing():
    trie = NgramTrie()
    row = trie.open_stream()
    assert trie.match_length(row) == 0
    assert trie.draft(row, budget=5) == Draft()
    trie.extend(row, [1, 1])
    assert trie.draft(row, budget=0) == Draft()
    assert trie.draft(row, budget=5, max_depth=0, branching=2) == Draft()


def test_numpy_tokens_become_plain_ints():
    numpy = pytest.importorskip("numpy")
    trie = NgramTrie()
    row = trie.open_stream()
    trie.extend(row, numpy.array([1, 2, 1]))
    assert type(trie.draft(row, budget=1).tokens[0]) is int


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda trie, row: NgramTrie(max_match=0), "max_match must be .* at least 1, got 0"),
        (lambda trie, row: NgramTrie(max_draft=2.5), r"max_draft must be .* got 2\.5"),
        (lambda trie, row: NgramTrie(max_nodes=True), "max_nodes must be .* got True"),
        (lambda trie, row: trie.extend(row + 1, [1]), "id of an open stream, got 1"),
        (lambda trie, row: trie.match_length(-1), "id of an open stream, got -1"),
        (lambda trie, row: trie.extend(row, [1, -1]), "tokens must be at least 0, got -1"),
        (lambda trie, row: trie.observe([0.5]), r"tokens must be whole numbers, got \[0\.5\]"),
        (lambda trie, row: trie.draft(row, -1), "budget must be .* got -1"),
        (lambda trie, row: trie.draft(row, 1, -2), "max_depth must be .* got -2"),
        (lambda trie, row: trie.draft(row, 1, branching=0), "branching must be .* got 0"),
        (lambda trie, row: Draft([1], []), "one parent per token"),
        (lambda trie, row: merge([], -1), "budget must be .* got -1"),
        (lambda trie, row: merge([Draft([1], [0])], 1), "come before its child.* got parent 0"),
        (lambda trie, row: merge([Draft([1], [-1], 1, [2.0])], 1), r"\[0, 1\], got .* 2\.0"),
    ],
)
def test_bad_input_names_the_rule_and_the_value(call, message):
    trie = NgramTrie()
    row = trie.open_stream()
    with pytest.raises(ValueError, match=message):
        call(trie, row)
    assert trie.num_tokens == 0


def test_a_closed_stream_is_closed():
    trie = NgramTrie()
    row = trie.open_stream()
    trie.close_stream(row)
    with pytest.raises(ValueError, match="open stream"):
        trie.close_stream(row)
