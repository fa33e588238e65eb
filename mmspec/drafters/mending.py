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


class Mender:
    """Knows what was fed at each position, and finds where the same neighbours stood before."""

    def __init__(
        self, rows: TokenRows, vocab_size: int, *, stride: int | Tensor, ring: int
    ) -> None:
        """Makes an empty memory.

        Args:
            rows: The rows.
            vocab_size: V.
            stride: As in `mmspec.drafters.jacobi.JacobiDrafter`.
            ring: Positions that are remembered.
        """
        self._rows = rows
        self._vocab_size = vocab_size
        self._stride = stride
        self._ring = ring
        self._row_B1 = torch.arange(rows.num_rows, device=rows.lengths_B.device)[:, None]
        self._fed_BR = torch.full_like(self._row_B1, -1).repeat(1, ring)

    def note(self, tokens_BN: Tensor, positions_BN: Tensor) -> None:
        """These tokens were fed at these positions."""
        self._fed_BR[self._row_B1, positions_BN % self._ring] = tokens_BN

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
        rows = self._rows
        end = max(map(len, rows.host_tokens))
        tokens_BT = rows.tokens_BT[:, : end + guesses_BN.shape[1]].clone()
        place_T = torch.arange(end, device=tokens_BT.device)
        above_BT, above_BN = self._above(place_T), self._above(position_BN)
        above_BT = above_BT.masked_fill(place_T >= rows.lengths_B[:, None], -1)
        pairs_B1T = self._pairs(tokens_BT, place_T.expand_as(above_BT), above_BT)[:, None]
        fed_BN = self._fed_BR[self._row_B1, (position_BN - 1) % self._ring]
        is_new_BN, can_be_BN = ~is_known_BN, above_BN >= 0
        mended_BN, is_mended_BN = guesses_BN, torch.zeros_like(is_new_BN)
        for _ in range(SWEEPS):
            tokens_BT.scatter_(1, position_BN, mended_BN)
            is_stale_BN = is_new_BN | (tokens_BT.gather(1, position_BN - 1) != fed_BN)
            pair_BN = self._pairs(tokens_BT, position_BN, above_BN)
            # No pair stands at place 0, so that 0 says that there is none.
            place_BNT = (pair_BN[..., None] == pairs_B1T) * place_T
            last_BN = place_BNT.amax(-1)
            before_BN = place_BNT.masked_fill_(place_BNT == last_BN[..., None], 0).amax(-1)
            told_BN = tokens_BT.gather(1, last_BN)
            is_sure_BN = (before_BN > 0) & (told_BN == tokens_BT.gather(1, before_BN))
            is_mended_BN = is_stale_BN & can_be_BN & is_sure_BN
            mended_BN = torch.where(is_mended_BN, told_BN, guesses_BN)
        return mended_BN, is_mended_BN

    def _above(self, position: Tensor) -> Tensor:
        """Position above each one; -1 where there is none, or none on the left."""
        first_B1 = self._rows.prompt_lengths_B[:, None]
        back = self._stride
        if isinstance(back, Tensor):
            back = back[(position - first_B1).clamp(0, len(back) - 1)]
        above = position - back
        # A code that has one above it has one on the left, but where it has itself above.
        return above.masked_fill((above < first_B1) | (above == position), -1)

    def _pairs(self, tokens_BT: Tensor, position: Tensor, above: Tensor) -> Tensor:
        """The codes on the left and above as one number, at each position; -1 where not both."""
        left = tokens_BT.gather(1, (position - 1).clamp(min=0))
        pair = left * self._vocab_size + tokens_BT.gather(1, above.clamp(min=0))
        return pair.masked_fill(above < 0, -1)
