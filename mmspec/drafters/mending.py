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

    def mended(self, guesses_BN: Tensor, position_BN: Tensor, is_known_BN: Tensor) -> Tensor:
        """Guesses behind the rows' ends, some of them replaced.

        Args:
            guesses_BN: What the window guesses.
            position_BN: Where: N positions from each row's end on.
            is_known_BN: Where a guess was drawn from a law of its own position.
        """
        rows = self._rows
        end = max(map(len, rows.host_tokens))
        tokens_BT = rows.tokens_BT[:, : end + guesses_BN.shape[1]].clone()
        above_BT = self._above(tokens_BT.shape[1])
        place_T = torch.arange(1, end + 1, device=tokens_BT.device, dtype=torch.int32)
        pairs_BT = self._pairs(tokens_BT[:, :end], above_BT[:, :end])
        pairs_BT = pairs_BT.masked_fill(place_T > rows.lengths_B[:, None], -1)
        fed_BN = self._fed_BR[self._row_B1, (position_BN - 1) % self._ring]
        mended_BN = guesses_BN
        for _ in range(SWEEPS):
            tokens_BT.scatter_(1, position_BN, mended_BN)
            is_stale_BN = ~is_known_BN | (tokens_BT.gather(1, position_BN - 1) != fed_BN)
            pair_BN = self._pairs(tokens_BT, above_BT).gather(1, position_BN)
            # Places count from 1, so that 0 says that there is none.
            found_BNT = (pair_BN[..., None] == pairs_BT[:, None]) & (pair_BN >= 0)[..., None]
            place_BNT = found_BNT * place_T
            last_BN = place_BNT.amax(-1)
            before_BN = place_BNT.masked_fill_(place_BNT == last_BN[..., None], 0).amax(-1)
            told_BN, told_before_BN = (
                tokens_BT.gather(1, (place_BN - 1).clamp(min=0).long())
                for place_BN in (last_BN, before_BN)
            )
            is_mended_BN = is_stale_BN & (before_BN > 0) & (told_BN == told_before_BN)
            mended_BN = torch.where(is_mended_BN, told_BN, guesses_BN)
        return mended_BN

    def _above(self, length: int) -> Tensor:
        """Position above each one, ``[B, length]``; -1 where there is none, or none on the left."""
        first_B1 = self._rows.prompt_lengths_B[:, None]
        position_T = torch.arange(length, device=first_B1.device)
        back = self._stride
        if isinstance(back, Tensor):
            back = back[(position_T - first_B1).clamp(0, len(back) - 1)]
        above_BT = position_T - back
        is_there = (above_BT >= first_B1) & (above_BT < position_T) & (position_T > first_B1)
        return above_BT.masked_fill(~is_there, -1)

    def _pairs(self, tokens_BT: Tensor, above_BT: Tensor) -> Tensor:
        """The codes on the left and above as one number, at each position; -1 where not both."""
        left_BT = tokens_BT.roll(1, 1)
        pair_BT = left_BT * self._vocab_size + tokens_BT.gather(1, above_BT.clamp(min=0))
        return pair_BT.masked_fill(above_BT < 0, -1)
