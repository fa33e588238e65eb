"""Stop strings: a row ends with the first token that completes one of some texts."""

from collections.abc import Sequence
from typing import Any

from mmspec.checks import is_list, require

#: What a decoder writes for bytes that are no text, or not yet.
_BROKEN = "\N{REPLACEMENT CHARACTER}"
#: Characters in which the text of a run of tokens may differ from the same run inside a longer
#: one: a cut letter or a dropped space at its begin, a space cleaned up at its end.
_MARGIN = 8


class StopStrings:
    """Looks for the texts in what each row adds, and cuts the output at them.

    The verdict is that of decoding the whole output after each token. To spare most of that, a
    tail is decoded first, and the whole only if a text is in the tail. The tail starts so far
    before the last check that a text which was incomplete then lies in it. Tokens after which the
    text held broken letters do not count as checked, because later tokens may still mend them, in
    some decoders far back.

    Attributes:
        texts: The stop strings.
    """

    def __init__(self, tokenizer: Any, stop: str | Sequence[str]) -> None:
        """Takes one text or several.

        Args:
            tokenizer: Its ``decode`` must be local: a token changes the text near it only.
            stop: The texts; none is allowed.

        Raises:
            ValueError: If they are not non-empty strings.
        """
        texts = [stop] if isinstance(stop, str) else stop
        is_good = is_list(texts, lambda text: isinstance(text, str) and text != "")
        require(is_good, "stop", "non-empty strings", stop)
        self.texts = tuple(texts)
        self._tokenizer = tokenizer
        self._longest = max(map(len, self.texts), default=0)
        # A broken letter may hide anywhere, and be gone again.
        self._needs_whole = any(_BROKEN in text for text in self.texts)
        self._num_checked: dict[int, int] = {}
        self._num_settled: dict[int, int] = {}

    def check(self, row: int, new_tokens: list[int]) -> int | None:
        """As `mmspec.rows.StopCheck`."""
        first = self._num_checked.get(row, 0) + 1
        self._num_checked[row] = len(new_tokens)
        tail = self._tail(new_tokens, self._num_settled.get(row, 0))
        if _BROKEN not in tail:
            self._num_settled[row] = len(new_tokens)
        if not self._is_in(tail) or not self._is_in(self._decode(new_tokens)):
            return None
        for count in range(first, len(new_tokens)):
            if self._is_in(self._decode(new_tokens[:count])):
                return count
        return len(new_tokens)

    def cut(self, text: str) -> str:
        """The text before the first stop string."""
        places = [text.find(stop) for stop in self.texts]
        return text[: min((place for place in places if place >= 0), default=len(text))]

    def _tail(self, tokens: list[int], num_settled: int) -> str:
        """Text of the last tokens, beginning well before the first that is not settled."""
        if self._needs_whole:
            return self._decode(tokens)
        wanted = self._longest + _MARGIN
        start = num_settled
        while start > 0:
            start = max(start - wanted, 0)
            overlap = self._decode(tokens[start:num_settled])
            # Tokens may have no text of their own, and a start may cut a letter.
            if len(overlap) >= wanted and _BROKEN not in overlap:
                break
        return self._decode(tokens[start:])

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=False)

    def _is_in(self, text: str) -> bool:
        return any(stop in text for stop in self.texts)
