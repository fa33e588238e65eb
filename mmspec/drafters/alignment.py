"""Where an output stands in a reference text: alignment on letters and digits, and what follows.

The output resembles the reference (OCR text, a text layer, an earlier version) but is not equal to
it: it is Markdown where the reference has none, lines are broken elsewhere, letters were misread.
So the two are compared on *symbols*, their letters and digits in lower case with one `_BREAK` for
whatever stands between two words, and the markup is learned: what the output wrote where the
reference has a line break tells what it will write at the next one.

The alignment is the cheapest edit path, brought up to date symbol by symbol (Sellers 1980) over the
whole reference, with a constant price for a jump to anywhere. A pointer thus moves on by itself
over substitutions, insertions and deletions, and finds its way after a missing or moved paragraph.
"""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

#: Stands between two words, whatever is written there.
_BREAK = 0x20
# Tenths of an edit. A substitution is dearer than a deletion alone, so that of two equally long
# paths the one that ends with a match wins; a jump is as dear as six letters that do not fit.
_SUBSTITUTE, _INSERT, _DELETE, _JUMP = 10, 8, 7, 45
# Observations that a space between two words counts for before any was made.
_USUAL_SPACE = 3.0
# Weight below which what was written for a gap is forgotten.
_FORGOTTEN = 0.01
# Chance of a space behind punctuation that the reference has not.
_DOUBT = 0.5
_SPACE = re.compile(r"(\S*)(\s+)(.*)", re.DOTALL)
_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True, slots=True)
class Continuation:
    """What may follow the output.

    Attributes:
        text: The text.
        match_length: Symbols before it that agree.
        chances: For each piece of the text, where it ends and the chance that it holds if what
            is before it does.
        is_final: It goes to the end of the reference.
    """

    text: str
    match_length: int
    chances: tuple[tuple[int, float], ...]
    is_final: bool


class ReferenceText:
    """A text that the output probably resembles, cut into words and what stands between them.

    Attributes:
        words: The runs of letters and digits.
        gaps: What stands before each word, and behind the last; one more than words.
        confidences: Of each word, in [0, 1].
        symbols: Letters, digits and breaks, int32.
        places: For each number of symbols that were read, the index of the word and the letters of
            it that were read; where a gap was read, its word with 0 letters.
        is_whole: Nothing of the text is missing behind its last word.
    """

    def __init__(
        self,
        text: str,
        confidences: Sequence[tuple[int, float]] = (),
        default: float = 0.97,
        *,
        is_whole: bool = True,
    ) -> None:
        """Cuts a text.

        Args:
            text: The text.
            confidences: Where parts of the text end, in order, and how sure their letters are.
            default: Confidence of what is behind the last of them.
            is_whole: The output ends where it does.
        """
        self.is_whole = is_whole
        found = list(_WORD.finditer(text))
        self.words = [match.group() for match in found]
        stops = [0, *(match.end() for match in found)]
        starts = [*(match.start() for match in found), len(text)]
        self.gaps = [text[a:b] for a, b in zip(stops, starts, strict=True)]
        self.confidences: list[float] = []
        parts = iter([*confidences, (len(text), default)])
        end, confidence = next(parts)
        for match in found:
            while match.start() >= end:
                end, confidence = next(parts)
            self.confidences.append(confidence)
        symbols: list[int] = []
        self.places: list[tuple[int, int]] = [(0, 0)]
        for index, word in enumerate(self.words):
            if self.gaps[index] and index:
                symbols.append(_BREAK)
                self.places.append((index, 0))
            symbols += map(_symbol, word)
            self.places += [(index, count) for count in range(1, len(word) + 1)]
        self.symbols = np.array(symbols, dtype=np.int32)


class Alignment:
    """Follows an output through a reference.

    Attributes:
        reference: The reference.
        num_letters: Letters and digits of the output.
        most_agreed: The largest `num_agreed` so far.
        has_ended: The output has come to the end of the reference.
    """

    #: Weight of older observations of what the output writes for a kind of gap.
    DECAY = 0.8
    #: Symbols that agreed in a row after which no other place is thought of.
    SETTLED = 12
    #: Most symbols looked back at to say how well a place fits.
    LOOK_BACK = 32

    def __init__(self, reference: ReferenceText) -> None:
        """Starts at the beginning of the reference."""
        self.num_letters = 0
        self.most_agreed = 0
        self._here = 0
        self._agreed = 0
        self._tail: list[int] = []
        self._begin(reference)
        # What the output has written since its last letter or digit.
        self._gap = ""
        self._gaps: dict[str, dict[str, float]] = {}

    def _begin(self, reference: ReferenceText) -> None:
        """The output may stand at the beginning, or anywhere after a jump."""
        self.reference = reference
        self._slope = np.arange(len(reference.symbols) + 1, dtype=np.int32) * _DELETE
        self._cost = np.minimum(self._slope, _JUMP)
        self.has_ended = False

    def grow(self, reference: ReferenceText) -> None:
        """Goes on in a reference that has more text behind what it had.

        What was learned of gaps is kept. Where the output does not agree just now, the latest
        symbols of it find their place anew.
        """
        is_settled, tail = self._agreed >= self.SETTLED, self._tail
        self._begin(reference)
        if is_settled:
            return
        if len(tail) == self.LOOK_BACK:
            # More was written than they are: the first of them may stand anywhere.
            self._cost[:] = 0
        else:
            self._here = 0
        self._tail, self._agreed = [], 0
        for symbol in tail:
            self._advance(symbol)

    def extend(self, text: str, *, is_markup: bool = False) -> None:
        """Reads what was appended to the output; markup holds no letters of the text."""
        for character in text:
            if not is_markup and character.isalnum():
                symbol = _symbol(character)
                self.num_letters += 1
                if self._gap:
                    self._learn(symbol)
                    self._gap = ""
                self._advance(symbol)
            else:
                if not self._gap and self._tail:
                    self._advance(_BREAK)
                self._gap += character

    @property
    def num_agreed(self) -> int:
        """Symbols in a row that agreed lately; they are counted up to `SETTLED`."""
        return self._agreed

    def continuations(self, *num_characters: int) -> list[Continuation]:
        """What may follow, the likeliest first, each text another.

        Args:
            num_characters: For each text that is wanted the length at which it ends, up to a word.
        """
        found: list[Continuation] = []
        for place, length in zip(self._places(len(num_characters)), num_characters, strict=False):
            continuation = self._continuation(place, length)
            if not any(one.text.startswith(continuation.text) for one in found):
                found.append(continuation)
        return found

    def _advance(self, symbol: int) -> None:
        """One more symbol of the output: the cheapest way to every place."""
        self._tail.append(symbol)
        del self._tail[: -self.LOOK_BACK]
        symbols = self.reference.symbols
        agrees = self._here < len(symbols) and symbols[self._here] == symbol
        if agrees and self._agreed >= self.SETTLED:
            self._here += 1
            self.has_ended = self.has_ended or self._here == len(symbols)
            return
        old = self._cost = self._costs()
        new = old + _INSERT
        # Nothing was read where the output stands before the reference.
        np.minimum(new[1:], old[:-1] + (symbols != symbol) * _SUBSTITUTE, out=new[1:])
        new -= self._slope
        np.minimum.accumulate(new, out=new)
        new += self._slope
        new -= new.min()
        self._cost = np.minimum(new, _JUMP, out=new)
        best = np.flatnonzero(new == 0)
        ahead = np.searchsorted(best, self._here)
        moved_to = int(best[ahead] if ahead < len(best) else best[-1])
        self._agreed = self._agreed + 1 if agrees and moved_to == self._here + 1 else 0
        self.most_agreed = max(self.most_agreed, self._agreed)
        self._here = moved_to
        self.has_ended = self.has_ended or moved_to == len(symbols)

    def _costs(self) -> np.ndarray:
        """What it costs to stand at each place.

        While the output agrees, all that matters is how far a place is from where it stands, so
        nothing is computed then.
        """
        if self._agreed < self.SETTLED:
            return self._cost
        distance = np.arange(len(self._slope), dtype=np.int32) - self._here
        return np.minimum(np.maximum(distance * _DELETE, -distance * _INSERT), _JUMP)

    def _places(self, count: int) -> list[int]:
        """Numbers of symbols read, the likeliest first."""
        cost = self._costs()
        near = np.flatnonzero(cost <= _SUBSTITUTE)
        near = near[np.argsort(cost[near] * 1000 + abs(near - self._here).clip(0, 999))]
        return [self._here, *(int(place) for place in near[:count] if place != self._here)][:count]

    def _match_length(self, place: int) -> int:
        symbols = self.reference.symbols
        tail = self._tail
        length = 0
        while length < min(len(tail), place) and symbols[place - 1 - length] == tail[-1 - length]:
            length += 1
        return length

    def _continuation(self, place: int, num_characters: int) -> Continuation:
        """Gaps and words from a place on."""
        reference = self.reference
        pieces: list[tuple[str, float]] = []
        index, letters = reference.places[place]
        if letters:
            pieces.append((reference.words[index][letters:], reference.confidences[index]))
            index += 1
        total, begun = 0, self._gap
        while index < len(reference.words) and total < num_characters:
            pieces.append(self._written(reference.gaps[index], begun))
            pieces.append((reference.words[index], reference.confidences[index]))
            total += len(pieces[-2][0]) + len(pieces[-1][0])
            index, begun = index + 1, ""
        is_final = index == len(reference.words) and reference.is_whole
        if is_final:
            # Whatever space ends a text, an output seldom does.
            pieces.append((reference.gaps[index].rstrip().removeprefix(begun), 1.0))
        ends = itertools.accumulate(len(piece) for piece, _ in pieces)
        return Continuation(
            "".join(piece for piece, _ in pieces),
            self._match_length(place),
            tuple(zip(ends, (chance for _, chance in pieces), strict=True)),
            is_final,
        )

    def _written(self, gap: str, begun: str) -> tuple[str, float]:
        """What the output will write for a gap of which it has begun some, and the chance of it."""
        parts = _SPACE.fullmatch(gap)
        if parts is None:
            return (gap.removeprefix(begun) if gap.startswith(begun) else ""), 1.0
        before, space, after = parts.groups()
        seen = self._gaps.get(_kind(space)) or {space: 1.0}
        if len(seen) == 1 and not begun:
            return before + next(iter(seen)) + after, 1.0
        fitting = {
            before + written + after: weight
            for written, weight in seen.items()
            if (before + written + after).startswith(begun)
        }
        if fitting:
            best = max(fitting, key=lambda written: fitting[written])
            return best[len(begun) :], fitting[best] / sum(fitting.values())
        if begun[-1].isspace():
            return "", 1.0
        # Other punctuation than the reference's; a space is still due behind it.
        return max(seen, key=lambda written: seen[written]), _DOUBT

    def _learn(self, symbol: int) -> None:
        """The output's gap has ended: it stands for the reference's, if both sides agree."""
        reference, here = self.reference, self._here
        if self._match_length(here) < 2 or here >= len(reference.symbols):
            return
        index, letters = reference.places[here]
        parts = _SPACE.fullmatch(reference.gaps[index])
        if letters or parts is None or reference.symbols[here] != symbol:
            return
        before, space, after = parts.groups()
        gap = self._gap
        if len(gap) < len(before + after) or not (gap.startswith(before) and gap.endswith(after)):
            return
        kind = _kind(space)
        # One bold word says little of all others; how a line ends is soon known.
        seen = self._gaps.setdefault(kind, {space: _USUAL_SPACE} if kind == " " else {})
        for written, weight in list(seen.items()):
            seen[written] = weight * self.DECAY
            if weight < _FORGOTTEN:
                del seen[written]
        written = gap[len(before) : len(gap) - len(after)]
        seen[written] = seen.get(written, 0.0) + 1.0


def _symbol(character: str) -> int:
    return ord(character.lower()[0])


def _kind(space: str) -> str:
    """Spaces that the output is likely to treat alike: columns, paragraphs, lines, words."""
    if "\n" in space:
        return "\n\n" if space.count("\n") > 1 else "\n"
    return "\t" if len(space) > 1 or "\t" in space else " "
