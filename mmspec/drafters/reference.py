"""Drafts from a text that the output probably resembles: OCR, a text layer, an earlier version.

The reference is text, not tokens: after an insertion its own tokens would be cut differently from
the target's, so what follows the place where the output stands (`mmspec.drafters.alignment`) is
cut afresh in every step, together with the end of the row. It is merged with what retrieval finds
(`mmspec.drafters.ngram`), which is good at markup, where a reference is silent.

Source of the idea: OCR as the drafter of a document model, HSD (arXiv 2602.12957).
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mmspec.drafters.alignment import Alignment, Continuation, ReferenceText
from mmspec.drafters.drafts import Calibration, Draft, merge
from mmspec.drafters.ngram import NgramDrafter
from mmspec.drafters.plain import root_only
from mmspec.drafters.width import least_score, propose_worthwhile
from mmspec.ocr import PageText
from mmspec.records import Outcome, Plan, Proposal, Scores, Verdict
from mmspec.rows import TokenRows

# Tokens of the row that are cut together with a draft, so that it is cut as in running text.
_TAIL = 8
# Characters that a token is thought to have before any was read, and how many more than the row's
# own tokens have are cut, so that seldom too few come out.
_CHARACTERS_PER_TOKEN = 5
_SPARE = 1.25
# Places in the reference that are drafted from, and tokens of the one that is not the likeliest.
_PLACES = 2
_TOKENS_OF_OTHERS = 8
# Steps that a reference is trusted for beforehand, tokens that each is thought to have brought, and
# the weight of older steps.
_FIRST_TRUST = 1.0
_FIRST_TOKENS = 16.0
_MEMORY = 0.8
# Tokens drafted for one that drafts lately brought.
_STRETCH = 8
# Most nodes that retrieval adds.
_RETRIEVED = 31
# A reference whose drafts lately brought fewer tokens than this is silent, until so many letters in
# a row agree with it: that is seen without drafting.
_LEAST_TOKENS = 1.0
_EVIDENCE = 8
# Letters and digits of the output after which the beginning of a reference with which nothing of
# them agrees is useless: as many as it has itself, at least and at most these.
_LEAST_LETTERS, _MOST_LETTERS = 32, 128
# Chance of the first token where nothing before it agrees.
_NO_MATCH = 0.4
# Signs of a byte sequence that is not complete yet.
_INCOMPLETE = "\ufffd"


#: A text that the output probably resembles.
Reference = str | PageText | None


@dataclass(frozen=True, slots=True)
class LateText:
    """A reference that is being read, as far as it is there.

    Attributes:
        text: What there is by now.
        judge: Told once, when it is known, whether the output agrees with it. If it does not, no
            more of it is asked for.
        is_whole: No more will come.
    """

    text: str | PageText
    judge: Callable[[bool], None]
    is_whole: bool = False


#: What is asked for a reference: None while there is none.
AskedReference = Callable[[], Reference | LateText]
References = Sequence[Reference | AskedReference]


class ReferenceDrafter:
    """Drafts what follows in each row's reference, merged with what retrieval finds.

    Attributes:
        memory: The trie of the retrieval, as in `NgramDrafter`.
        on_arrival: Called when a reference has come after the rows were made. One that is
            not whole has when the output is seen to agree with it, and whenever it grows.
    """

    name = "reference"
    #: Drafting costs little, and `Plan.prices` is heeded.
    is_free = True

    def __init__(
        self,
        rows: TokenRows,
        vocab_size: int,
        *,
        references: References,
        tokenizer: Any,
        sources: Sequence[Counter[str]] | None = None,
        branching: int = 16,
        **retrieval: Any,
    ) -> None:
        """Aligns each row with its reference.

        Args:
            rows: The rows.
            vocab_size: The target's vocabulary.
            references: One per row: a text, None, or what is called for it after the prompts are
                read, and before every step as long as it returns None, or a `LateText` that is
                not whole or not judged.
            tokenizer: The target's tokenizer.
            sources: One counter per row, which is told where its tokens came from: "reference",
                "ngram" or "target". What both found counts for the reference.
            branching: As in `NgramDrafter`; 1 drafts from the reference alone where it has
                something.
            **retrieval: Other options of `NgramDrafter`.

        Raises:
            ValueError: If there is not one reference, or counter, per row, or one is no text.
        """
        if isinstance(references, str) or len(references) != rows.num_rows:
            raise ValueError(f"references must hold one per row, {rows.num_rows}: {references!r}")
        if sources is not None and len(sources) != rows.num_rows:
            raise ValueError(f"sources must hold one per row, {rows.num_rows}; got {len(sources)}")
        self._ngram = NgramDrafter(rows, vocab_size, branching=branching, **retrieval)
        self.memory = self._ngram.memory
        self._rows = rows
        self._vocab_size = vocab_size
        self._asked = {row: ask for row, ask in enumerate(references) if callable(ask)}
        self._spelling = _Spelling(tokenizer, rows)
        self._num_places = _PLACES if branching > 1 else 1
        self._sources = sources
        self.on_arrival: Callable[[], None] = lambda: None
        self._known: dict[int, tuple[Reference, bool]] = {}
        self._judged: set[int] = set()
        self._followers = [
            None if callable(one) or (text := _cut(one)) is None else self._follower(text)
            for one in references
        ]
        self._found: list[list[Draft]] = []

    def prefill(self) -> None:
        """Reads the prompts, and the references that were not there before."""
        self._ngram.prefill()
        self._ask()

    def propose(self, plan: Plan) -> Proposal:
        """What follows in reference and memory, as far as it is worth verifying."""
        self._ask()
        rows = self._rows
        if plan.width == 1:
            self._rest()
            return root_only(rows)
        budget, least = plan.width - 1, least_score(plan)
        told = [
            Draft()
            if follower is None or rows.host_done[row]
            else follower.find(rows.host_tokens[row][-_TAIL:], budget)
            for row, follower in enumerate(self._followers)
        ]
        settled = [_is_settled(draft, budget) for draft in told]
        self._found = [
            [draft, *([] if is_settled else [found])]
            for draft, is_settled, found in zip(
                told,
                settled,
                self._ngram.find(min(budget, _RETRIEVED), least, without=settled),
                strict=True,
            )
        ]
        drafts = [self._merged(found, budget) for found in self._found]
        return propose_worthwhile(drafts, rows, plan, self._vocab_size)

    def commit(
        self, proposal: Proposal, scores: Scores, verdict: Verdict, outcome: Outcome
    ) -> None:
        """Moves on in the references and learns how far they can be trusted."""
        self._ngram.commit(proposal, scores, verdict, outcome)
        for row, follower in enumerate(self._followers):
            if outcome.was_active[row]:
                new = outcome.new_units[row]
                if self._sources is not None:
                    self._sources[row].update(self._origins(row, new, outcome.num_accepted[row]))
                if follower is not None:
                    follower.learn(new)

    def _ask(self) -> None:
        """Follows the references as far as they have come by now."""
        for row, ask in list(self._asked.items()):
            given = None if self._rows.host_done[row] else ask()
            if isinstance(given, LateText):
                self._follow(row, given.text, is_whole=given.is_whole)
                self._judge(row, given)
            elif given is not None:
                del self._asked[row]
                self._follow(row, given, is_whole=True)

    def _follow(self, row: int, given: str | PageText, *, is_whole: bool) -> None:
        """Follows a reference if it has come or grown."""
        known, was_whole = self._known.get(row, (None, False))
        if given is known and is_whole == was_whole:
            return
        self._known[row] = given, is_whole
        text = _cut(given, is_whole=is_whole)
        if text is None:
            return
        follower = self._followers[row]
        if follower is None:
            self._followers[row] = follower = self._follower(text)
            follower.learn(self._rows.new_tokens(row))
        else:
            follower.grow(text)
        if is_whole or row in self._judged:
            self.on_arrival()

    def _judge(self, row: int, given: LateText) -> None:
        """Tells once whether the row agrees with what has come."""
        follower = self._followers[row]
        if follower is not None and row not in self._judged:
            agrees = follower.agrees()
            if agrees is None:
                return
            self._judged.add(row)
            given.judge(agrees)
            if agrees and not given.is_whole:
                self.on_arrival()
            elif not agrees:
                # What is whole may agree further down.
                self._followers[row] = follower if given.is_whole else None
                del self._asked[row]
                return
        if given.is_whole:
            del self._asked[row]

    def _follower(self, text: ReferenceText) -> "_Follower":
        return _Follower(text, self._spelling, self._num_places)

    def _rest(self) -> None:
        """Looks for nothing in this step, so that nothing is learnt of drafts."""
        self._found = []
        self._ngram.rest()
        for follower in self._followers:
            if follower is not None:
                follower.rest()

    def _merged(self, found: Sequence[Draft], budget: int) -> Draft:
        if self._num_places == 1:
            return next(filter(len, found), Draft())
        drafts = [draft for draft in found if len(draft)]
        return drafts[0] if len(drafts) == 1 else merge(drafts, budget)

    def _origins(self, row: int, new: Sequence[int], num_accepted: int) -> list[str]:
        """Where each new token came from."""
        drafted = min(num_accepted, len(new))
        told = min(_held(self._found[row][0], new), drafted) if self._found else 0
        return (
            ["reference"] * told + ["ngram"] * (drafted - told) + ["target"] * (len(new) - drafted)
        )


class _Spelling:
    """Text of tokens and tokens of text."""

    def __init__(self, tokenizer: Any, rows: TokenRows) -> None:
        self.tokenizer = tokenizer
        # Markup of its own tokens (<td>, <loc_12>): their letters are none of the page's.
        self.markup = frozenset(tokenizer.get_added_vocab().values())
        ends = rows.eos_E.tolist()
        self.end = ends[:1]

    def text(self, tokens: Sequence[int]) -> str:
        decoded: str = self.tokenizer.decode(
            list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return decoded

    def cut(self, tail: list[int], text: str) -> list[tuple[int, int]]:
        """Tokens of a text behind a tail, and where in the text each ends."""
        before = self.text(tail)
        tokens, ends = self._encoded(before + text)
        if tokens[: len(tail)] == tail:
            return [
                (token, end - len(before))
                for token, end in zip(tokens[len(tail) :], ends[len(tail) :], strict=True)
            ]
        return list(zip(*self._encoded(text), strict=True))

    def _encoded(self, text: str) -> tuple[list[int], list[int]]:
        encoded = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=self.tokenizer.is_fast
        )
        tokens = encoded["input_ids"]
        if "offset_mapping" in encoded:
            return tokens, [end for _, end in encoded["offset_mapping"]]
        return tokens, [len(text) * (i + 1) // len(tokens) for i in range(len(tokens))]


class _Follower:
    """Follows one row through its reference."""

    def __init__(self, reference: ReferenceText, spelling: _Spelling, num_places: int) -> None:
        self._alignment = Alignment(reference)
        self._num_places = num_places
        self._spelling = spelling
        self._calibration = Calibration()
        self._raw = Draft()
        # Steps whose draft began right, and all of them, and their tokens; the latest count most.
        self._right = self._drafted = _FIRST_TRUST
        self._brought = _FIRST_TOKENS * _FIRST_TRUST
        self._num_read = 1
        self._num_characters = _CHARACTERS_PER_TOKEN
        self._read: list[int] = []
        self._unread: list[int] = []
        self._noted: list[int] = []

    def find(self, tail: list[int], budget: int) -> Draft:
        """What follows the tail, its scores the chances of its nodes."""
        self._raw = Draft()
        self._catch_up()
        brought = self._brought / self._drafted
        alignment = self._alignment
        is_past = alignment.has_ended and not alignment.reference.is_whole
        if (is_past or brought < _LEAST_TOKENS) and alignment.num_agreed < _EVIDENCE:
            return self._raw
        trust = self._right / self._drafted
        most = min(budget, max(math.ceil(_STRETCH * brought), _TOKENS_OF_OTHERS))
        limits = [most, min(most, _TOKENS_OF_OTHERS)][: self._num_places]
        per_token = _SPARE * self._num_characters / self._num_read
        following = alignment.continuations(*(math.ceil(n * per_token) for n in limits))
        chains = [
            self._chain(one, tail, limit, trust * 0.5**rank)
            for rank, (one, limit) in enumerate(zip(following, limits, strict=False))
        ]
        self._raw = chains[0] if len(chains) == 1 else merge(chains, budget)
        return self._calibration.calibrated(self._raw)

    def grow(self, reference: ReferenceText) -> None:
        """Goes on in a reference that has more text behind what it had."""
        self._catch_up()
        self._alignment.grow(reference)

    def agrees(self) -> bool | None:
        """Whether the output agrees with the reference; None if that cannot be told by now."""
        self._catch_up()
        alignment = self._alignment
        if alignment.most_agreed >= _EVIDENCE:
            return True
        size = len(alignment.reference.symbols)
        patience = min(max(size, _LEAST_LETTERS), _MOST_LETTERS)
        return None if alignment.num_letters < patience else False

    def rest(self) -> None:
        """Drafts nothing in this step."""
        self._raw = Draft()

    def learn(self, new: Sequence[int]) -> None:
        """Notes what was committed behind the tail. It is read when a draft is next looked for."""
        self._calibration.learn(self._raw, new)
        if self._raw.tokens:
            held = _held(self._raw, new)
            self._right = self._right * _MEMORY + (held > 0)
            self._brought = self._brought * _MEMORY + held
            self._drafted = self._drafted * _MEMORY + 1
        self._noted += new

    def _catch_up(self) -> None:
        """Reads what was noted: all of it costs as much, but a drafter that rests may not wake."""
        noted, self._noted = self._noted, []
        for token in noted:
            if token in self._spelling.markup:
                self._read_text()
                self._alignment.extend(self._spelling.text([token]), is_markup=True)
                self._read = [token]
            else:
                self._unread.append(token)
        self._read_text()

    def _read_text(self) -> None:
        """Hands the text of the unread tokens to the alignment, unless a letter is incomplete."""
        before = self._spelling.text(self._read)
        text = self._spelling.text(self._read + self._unread)
        if self._unread and not text.endswith(_INCOMPLETE):
            self._alignment.extend(text[len(before) :])
            self._num_read += len(self._unread)
            self._num_characters += len(text) - len(before)
            # A token alone may be spelled without the space that it brings behind another.
            self._read = self._unread[-2:]
            self._unread = []

    def _chain(self, one: Continuation, tail: list[int], limit: int, share: float) -> Draft:
        # A byte sequence that is not complete stands for no text yet.
        cut = [] if self._unread else self._spelling.cut(tail, one.text)[:limit]
        chance = share * (1 - (1 - _NO_MATCH) / (1 + one.match_length))
        pieces = iter(one.chances)
        scores, reached = [], 0
        for _, end in cut:
            while reached < end:
                reached, holds = next(pieces, (end, 1.0))
                chance *= holds
            scores.append(chance)
        tokens = [token for token, _ in cut]
        if one.is_final and len(tokens) < limit:
            tokens += self._spelling.end
            scores += [chance] * len(self._spelling.end)
        return Draft(tokens, list(range(-1, len(tokens) - 1)), one.match_length, scores)


def _cut(given: Reference, *, is_whole: bool = True) -> ReferenceText | None:
    """A reference from what a user passes; None where it has no words.

    Raises:
        ValueError: If it is no text.
    """
    if given is None:
        return None
    if isinstance(given, str):
        given = PageText(given)
    if not isinstance(given, PageText):
        raise ValueError(f"a reference must be a text, a PageText or None, got {given!r}")
    # Half a surrogate pair is no text for a tokenizer; this keeps the length.
    readable = given.text.encode("utf-8", "replace").decode("utf-8")
    confidences = [(word.end, word.confidence) for word in given.words]
    text = ReferenceText(readable, confidences, is_whole=is_whole)
    return text if text.words else None


def _is_settled(draft: Draft, budget: int) -> bool:
    """No other node can be likelier than this chain's last: what is beside it shares the rest."""
    return len(draft) == budget and draft.is_chain and draft.scores[-1] >= 0.5


def _held(draft: Draft, emitted: Sequence[int]) -> int:
    """Depth to which a draft has what was emitted."""
    nodes = zip(draft.parents, draft.tokens, strict=True)
    children = {node: index for index, node in enumerate(nodes)}
    node = -1
    for depth, token in enumerate(emitted):
        node = children.get((node, token), -2)
        if node == -2:
            return depth
    return len(emitted)
