"""Guesses of a Jacobi window whose left neighbour has changed, mended from what stood there before.

A law is made for the guesses that were fed. Where the guess on the left turns out wrong, what was
drawn from the law to the right of it is stale, and what is drawn there next was made for it in
turn: where each code follows from the one before (stripes, edges, dithering), a window mends itself
by one position per forward, however wide it is. But an image repeats itself: if the last two times
that these two codes stood on the left and above, the same code followed, that is a better guess.

Nothing is trained and nothing is read from the device; tokens are compared with tokens.
"""

import torch
from torch import Tensor

from mmspec.rows import TokenRows

#: Times that a change may travel to the right in a step. On `bundled:avatars` (window 32, guidance
#: 3) 1, 2, 4 and as many as there are positions save 11.5, 13, 13 and 14 % of the forwards.
SWEEPS = 2
#: In place of a token above: with no token on the left does it make the number of a pair of codes.
_NOTHING = -(1 << 31)


class Mender:
    """Knows what was fed at each position, and finds where the same neighbours stood before."""

    def __init__(self, rows: TokenRows, vocab_size: int, *, stride: int | Tensor) -> None:
        """Makes an empty memory.

        Args:
            rows: The rows.
            vocab_size: V.
            stride: As in `mmspec.drafters.jacobi.JacobiDrafter`.
        """
        self._rows = rows
        self._vocab_size = vocab_size
        self._stride = stride
        self._fed_BT = torch.full_like(rows.tokens_BT, -1)
        self._index_T = torch.arange(rows.capacity, device=rows.tokens_BT.device)
        self.follow()

    def follow(self) -> None:
        """Takes the prompts that the rows continue now."""
        above_BT = above_positions(self._rows, self._stride)
        # Place 0 is in the prompt and says that there is none.
        self._above_BT = above_BT.masked_fill(above_BT == self._rows.capacity, 0)
        self._place_BT = self._index_T.masked_fill(self._above_BT == 0, 0)

    def note(self, tokens_BN: Tensor, positions_BN: Tensor) -> None:
        """These tokens were fed at these positions."""
        self._fed_BT.scatter_(1, positions_BN, tokens_BN)

    def mended(
        self, guesses_BN: Tensor, position_BN: Tensor, is_known_BN: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Guesses behind the rows' ends, some of them replaced.

        Args:
            guesses_BN: What the window guesses.
            position_BN: Where: N positions from each row's end on.
            is_known_BN: Where a guess was drawn from a law of its own position.

        Returns:
            The guesses, and which of them were replaced. Those follow from what is known before
            they are verified, so their law is one-hot.
        """
        vocab_size = self._vocab_size
        lengths = [len(tokens) for tokens in self._rows.host_tokens]
        end = max(lengths)
        tokens_BT = self._rows.tokens_BT[:, : end + guesses_BN.shape[1]].clone()
        # No pair of codes is that of a position without one above it.
        tokens_BT[:, 0] = _NOTHING
        place_BT = self._place_BT[:, 1:end]
        if min(lengths) < end:
            is_there_BT = self._index_T[1:end] < self._rows.lengths_B[:, None]
            place_BT = place_BT * is_there_BT
        above_BT = tokens_BT.gather(1, self._above_BT[:, 1:end])
        pairs_B1T = torch.add(tokens_BT[:, : end - 1], above_BT, alpha=vocab_size)[:, None]
        place_B1T = place_BT[:, None]
        left_BN, above_BN = position_BN - 1, self._above_BT.gather(1, position_BN)
        fed_BN, is_new_BN = self._fed_BT.gather(1, left_BN), ~is_known_BN
        mended_BN, is_mended_BN = guesses_BN, torch.zeros_like(is_new_BN)
        for _ in range(SWEEPS):
            tokens_BT.scatter_(1, position_BN, mended_BN)
            at_left_BN = tokens_BT.gather(1, left_BN)
            pair_BN = torch.add(at_left_BN, tokens_BT.gather(1, above_BN), alpha=vocab_size)
            place_BNT = (pair_BN[..., None] == pairs_B1T) * place_B1T
            last_BN = place_BNT.amax(-1)
            before_BN = place_BNT.masked_fill_(place_BNT == last_BN[..., None], 0).amax(-1)
            told_BN = tokens_BT.gather(1, last_BN)
            is_sure_BN = (told_BN == tokens_BT.gather(1, before_BN)) & (before_BN > 0)
            is_mended_BN = is_sure_BN & (is_new_BN | (at_left_BN != fed_BN))
            mended_BN = torch.where(is_mended_BN, told_BN, guesses_BN)
        return mended_BN, is_mended_BN


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
