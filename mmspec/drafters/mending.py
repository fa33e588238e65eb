"""Guesses of a Jacobi window whose left neighbour has changed, mended from what was seen before.

A law is made for the guesses that were fed. Where the guess on the left turns out wrong, what was
drawn from the law to the right of it is stale, and what is drawn there next was made for it in
turn: where each code follows from the one before (stripes, edges, dithering), a window mends itself
by one position per forward, however wide it is. Three things are known that are better guesses:

1. What the target chose at this very position when it was last fed these two codes on the left and
   above. A window goes to and fro between few guesses, so it often was.
2. In the image so far, what followed these two codes the last two times, if it was the same; or the
   only time, if that was in the same line.
3. In a first line, which has nothing above it: the code on the left once more.

Nothing is trained and nothing is read from the device; tokens are compared with tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmspec.rows import TokenRows
from mmspec.sampling import Allowed

#: Times that a change may travel to the right in a step.
SWEEPS = 2
#: Steps whose choices are remembered at each position.
KEPT = 8
#: In place of a token above: with no token on the left does it make the number of a pair of codes.
_NOTHING = -(1 << 31)
#: A place in the image and the token there make one number, so that the latest is the largest.
_PLACE = 1 << 24
_TOKEN = _PLACE - 1


class Mender:
    """Knows what was fed and chosen at each position, and finds where the same neighbours stood."""

    def __init__(
        self,
        rows: TokenRows,
        vocab_size: int,
        *,
        stride: int | Tensor,
        allowed: Allowed | None = None,
    ) -> None:
        """Makes an empty memory.

        Args:
            rows: The rows.
            vocab_size: V.
            stride: As in `mmspec.drafters.jacobi.JacobiDrafter`.
            allowed: As there; guesses of forced tokens are left as they are.
        """
        self._rows = rows
        self._vocab_size = vocab_size
        self._stride = stride
        self._allowed = allowed
        # What stands above a first line is the last column.
        columns = rows.num_rows, rows.capacity + 1
        self._seen_BT = rows.tokens_BT.new_full(columns, _NOTHING)
        self._fed_BT = rows.tokens_BT.new_full(columns, -1)
        self._fed_BT[:, -1] = _NOTHING
        self._pairs_BTK = rows.tokens_BT.new_zeros(*rows.tokens_BT.shape, KEPT)
        self._chosen_BTK = torch.zeros_like(self._pairs_BTK)
        self._place_T = torch.arange(rows.capacity, device=rows.tokens_BT.device) * _PLACE
        self._steps = 0
        self.follow(())

    def follow(self, begun: Sequence[int]) -> None:
        """Takes the prompts that the rows continue now.

        Args:
            begun: Rows that begin anew, of which all is forgotten.
        """
        rows = self._rows
        for row in begun:
            self._chosen_BTK[row] = 0
            self._fed_BT[row, :-1] = -1
        self._above_BT = above_positions(rows, self._stride)
        is_first_BT = self._above_BT == rows.capacity
        # No place of a first line is looked at.
        self._place_BT = self._place_T.masked_fill(is_first_BT, 0)
        self._line_BT = line_starts(rows, self._stride) * _PLACE
        self._is_first_BT = is_first_BT
        self._is_forced_BT = None
        if self._allowed is not None:
            position_BT = (self._place_T // _PLACE).expand_as(rows.tokens_BT)
            self._is_forced_BT = self._allowed.is_forced(position_BT, rows.prompt_lengths_B)

    def note(self, tokens_BN: Tensor, positions_BN: Tensor, choices_BN: Tensor) -> None:
        """These tokens were fed at these positions, and those chosen behind them."""
        self._steps += 1
        self._fed_BT.scatter_(1, positions_BN, tokens_BN)
        next_BN = positions_BN + 1
        above_BN = self._fed_BT.gather(1, self._above_BT.gather(1, next_BN))
        pair_BN = torch.add(tokens_BN, above_BN, alpha=self._vocab_size)
        chosen_BN = choices_BN + (self._rows.capacity + self._steps) * _PLACE
        slot = self._steps % KEPT
        self._pairs_BTK[..., slot].scatter_(1, next_BN, pair_BN)
        self._chosen_BTK[..., slot].scatter_(1, next_BN, chosen_BN)

    def mended(self, guesses_BN: Tensor, position_BN: Tensor) -> tuple[Tensor, Tensor]:
        """Guesses behind the rows' ends, some of them replaced.

        Args:
            guesses_BN: What the window guesses.
            position_BN: Where: N positions from each row's end on.

        Returns:
            The guesses, and which of them were replaced. Those follow from what is known before
            they are verified, so their law is one-hot.
        """
        end = self._rows.max_length
        self._seen_BT[:, :end] = self._rows.tokens_BT[:, :end]
        pairs_BNS, found_BNS = self._memory(end, position_BN)
        left_BN, above_BN = position_BN - 1, self._above_BT.gather(1, position_BN)
        beside_B2N = torch.cat([left_BN, above_BN], 1)
        line_BN = self._line_BT.gather(1, position_BN)
        fed_BN = self._fed_BT.gather(1, left_BN)
        plain_BN, is_repeated_BN = self._repeated(guesses_BN, position_BN, fed_BN)
        mended_BN = plain_BN
        own = self._rows.capacity * _PLACE
        for _ in range(SWEEPS):
            self._seen_BT.scatter_(1, position_BN, mended_BN)
            at_left_BN, at_above_BN = self._seen_BT.gather(1, beside_B2N).chunk(2, 1)
            pair_BN = torch.add(at_left_BN, at_above_BN, alpha=self._vocab_size)
            found = (pair_BN[..., None] == pairs_BNS) * found_BNS
            last_BN = found.amax(-1)
            before_BN = found.masked_fill_(found == last_BN[..., None], 0).amax(-1)
            told_BN = last_BN & _TOKEN
            # Seen once it must be in this line, and seen with another token it must be its own.
            since_BN = (told_BN != before_BN & _TOKEN) * own
            since_BN = torch.where(before_BN < _PLACE, line_BN, since_BN)
            is_sure_BN = (last_BN >= since_BN) & (at_left_BN != fed_BN)
            mended_BN = torch.where(is_sure_BN, told_BN, plain_BN)
        # One that happens to be what it was is told as well, not drawn.
        is_mended_BN = is_sure_BN | is_repeated_BN
        if self._is_forced_BT is not None:
            is_forced_BN = self._is_forced_BT.gather(1, position_BN)
            mended_BN = torch.where(is_forced_BN, guesses_BN, mended_BN)
            is_mended_BN &= ~is_forced_BN
        return mended_BN, is_mended_BN

    def _memory(self, end: int, position_BN: Tensor) -> tuple[Tensor, Tensor]:
        """Pairs of codes and what was found beside them, in the image and at each place."""
        rows = self._rows
        place_BT = self._place_BT[:, 1:end]
        if min(map(len, rows.host_tokens)) < end:
            place_BT = place_BT * (self._place_T[1:end] < rows.lengths_B[:, None] * _PLACE)
        above_BT = self._seen_BT.gather(1, self._above_BT[:, 1:end])
        pairs_BT = torch.add(self._seen_BT[:, : end - 1], above_BT, alpha=self._vocab_size)
        found_BT = place_BT + self._seen_BT[:, 1:end]
        num_rows, num_nodes = position_BN.shape
        index = position_BN[..., None].expand(-1, -1, KEPT)
        shape = num_rows, num_nodes, end - 1
        pairs = pairs_BT[:, None].expand(shape), self._pairs_BTK.gather(1, index)
        found = found_BT[:, None].expand(shape), self._chosen_BTK.gather(1, index)
        return torch.cat(pairs, -1), torch.cat(found, -1)

    def _repeated(
        self, guesses_BN: Tensor, position_BN: Tensor, fed_BN: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The guesses, in a first line that has changed its last code again; and where."""
        rows = self._rows
        if not self._is_in_first_line():
            return guesses_BN, torch.zeros_like(guesses_BN, dtype=torch.bool)
        root_B1 = rows.roots_B()[:, None]
        # Behind a prompt the first guess is what the target chose there, and stays.
        is_begun_BN = position_BN > rows.prompt_lengths_B[:, None]
        last_B1 = torch.where(is_begun_BN[:, :1], root_B1, guesses_BN[:, :1])
        is_first_BN = self._is_first_BT.gather(1, position_BN).cumprod(1).bool()
        is_repeated_BN = is_first_BN & is_begun_BN & (root_B1 != fed_BN[:, :1])
        return torch.where(is_repeated_BN, last_B1, guesses_BN), is_repeated_BN

    def _is_in_first_line(self) -> bool:
        """Whether a row may be in one."""
        rows, stride = self._rows, self._stride
        lines = stride if isinstance(stride, int) else len(stride)
        return any(
            len(rows.host_tokens[row]) - rows.prompt_lengths[row] < lines for row in rows.active
        )


def above_positions(rows: TokenRows, stride: int | Tensor) -> Tensor:
    """Position above each one, ``[B, T]``; the capacity of the rows where there is none.

    Args:
        rows: The rows.
        stride: As in `mmspec.drafters.jacobi.JacobiDrafter`.
    """
    position_T = torch.arange(rows.capacity, device=rows.tokens_BT.device)
    first_B1 = rows.prompt_lengths_B[:, None]
    back: Tensor | int = stride
    if isinstance(stride, Tensor):
        back = stride[(position_T - first_B1).clamp(0, len(stride) - 1)]
    above_BT = position_T - back
    is_none_BT = (above_BT < first_B1) | (above_BT >= position_T)
    return above_BT.masked_fill(is_none_BT, rows.capacity)


def line_starts(rows: TokenRows, stride: int | Tensor) -> Tensor:
    """Where the line of each position begins, ``[B, T]``; meaningless in the prompt.

    Args:
        rows: The rows.
        stride: As in `mmspec.drafters.jacobi.JacobiDrafter`; zeros begin a grid.
    """
    position_T = torch.arange(rows.capacity, device=rows.tokens_BT.device)
    first_B1 = rows.prompt_lengths_B[:, None]
    new_BT = (position_T - first_B1).clamp(min=0)
    if isinstance(stride, int):
        return first_B1 + new_BT // stride * stride
    index = torch.arange(len(stride), device=position_T.device)
    is_first = stride == 0
    begins = is_first & ~torch.nn.functional.pad(is_first, (1, 0))[:-1]
    grid = torch.where(begins, index, 0).cummax(0).values
    back = stride.clamp(min=1)
    line = torch.where(is_first, grid, grid + (index - grid) // back * back)
    return first_B1 + line[new_BT.clamp(max=len(stride) - 1)]
