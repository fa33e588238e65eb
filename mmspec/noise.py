"""Counter-based noise, which makes a seed a contract.

Noise is a pure function of (row key, position, token): it does not depend on the batch, the window,
the drafter or the step at which a position is reached.

Shape suffixes as in `mmspec.records`.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmspec.checks import require_generator


class Salt:
    """Independent streams of noise under one row key."""

    CHOICE = 0
    ACCEPT = 1
    RESIDUAL = 2
    DRAFT = 3
    BLOCK = 4
    EMBED = 5
    ROUTE = 6


def _signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >= 1 << (bits - 1) else value


_GOLDEN_64 = _signed(0x9E3779B97F4A7C15, 64)
_MIX_A_64 = _signed(0xBF58476D1CE4E5B9, 64)
_MIX_B_64 = _signed(0x94D049BB133111EB, 64)
_MIX_A_32 = _signed(0x7FEB352D, 32)
_MIX_B_32 = _signed(0x846CA68B, 32)
_GOLDEN_32 = _signed(0x9E3779B9, 32)
_MAX_32 = 0x7FFFFFFF


def _mix64(x: Tensor) -> Tensor:
    """The finalizer of splitmix64 (Steele et al. 2014); shifts are made logical by masking."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _MIX_A_64
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _MIX_B_64
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def row_keys(generator: object, num_rows: int) -> Int[Tensor, "B"]:
    """Draws one 64-bit noise key per row.

    Args:
        generator: One `torch.Generator` for all rows (each row draws the next key from it), a list
            with one per row, or None for torch's global generator. Row i of a list gives the
            tokens that a single call with that generator gives.
        num_rows: Rows.

    Returns:
        Keys, int64, on the CPU.

    Raises:
        ValueError: If it is something else, or the list's length is not ``num_rows``.
    """
    require_generator(generator)
    if isinstance(generator, Sequence):
        if len(generator) != num_rows:
            raise ValueError(
                f"generator must be one torch.Generator or one per row: got a list of "
                f"{len(generator)} for {num_rows} rows"
            )
        return torch.cat([_drawn(one, 1) for one in generator])
    return _drawn(generator, num_rows)


def _drawn(generator: Any, count: int) -> Tensor:
    # torch.randint wants a generator of the tensor's device, so keys are drawn where it lives.
    device = "cpu" if generator is None else generator.device
    bounds = (-(1 << 63), (1 << 63) - 1)
    return torch.randint(*bounds, (count,), generator=generator, device=device).cpu()


def _position_hash(
    keys_B: Int[Tensor, "B"], positions_BN: Int[Tensor, "B N"], salt: int, step: Tensor | int
) -> Int[Tensor, "B N"]:
    """64 well-mixed bits for each (row key, position, salt, step)."""
    offset = _signed((salt + 1) * _GOLDEN_64 % (1 << 64), 64)
    # Host integers do not wrap by themselves.
    mixed = _signed(step * _MIX_B_64 % (1 << 64), 64) if isinstance(step, int) else step * _MIX_B_64
    stream_B = _mix64(keys_B + offset) + mixed
    return _mix64(_mix64(stream_B)[:, None] + positions_BN * _GOLDEN_64)


def _unit_interval(bits: Tensor) -> Tensor:
    """The low 31 of 32 bits to a float32 strictly inside (0, 1), exact for small values."""
    unit = bits.bitwise_and_(_MAX_32).to(torch.float32).add_(0.5).mul_(2.0**-31)
    return unit.clamp_(max=1.0 - 2.0**-24)


def uniform(
    keys_B: Int[Tensor, "B"],
    positions_BN: Int[Tensor, "B N"],
    salt: int,
    step: Tensor | int = 0,
) -> Float[Tensor, "B N"]:
    """Counter-based uniforms in (0, 1), float32.

    Args:
        keys_B: Row keys of `row_keys`.
        positions_BN: Absolute positions.
        salt: One of `Salt`, so that different uses are independent.
        step: Mixed in where a position is tested again in later steps and wants fresh noise.
    """
    bits = _position_hash(keys_B, positions_BN, salt, step)
    return _unit_interval((bits >> 32).to(torch.int32))


def gumbel(
    keys_B: Int[Tensor, "B"],
    positions_BN: Int[Tensor, "B N"],
    vocab_size: int,
    salt: int = Salt.CHOICE,
    step: Tensor | int = 0,
) -> Float[Tensor, "B N V"]:
    """Counter-based standard Gumbel noise, float32.

    The winner of ``argmax(law + g)`` is decided by the large values of g, which are the small
    values of the exponential ``e = -log(1 - u)``; they are exact to a few units in the last place,
    and u never reaches 0 or 1, so every value is finite (g lies in [-2.9, 22.2]).

    Args:
        keys_B: Row keys of `row_keys`.
        positions_BN: Absolute position whose token is to be chosen.
        vocab_size: V.
        salt: One of `Salt`.
        step: As in `uniform`.
    """
    bits = _position_hash(keys_B, positions_BN, salt, step)
    high = (bits >> 32).to(torch.int32)[..., None]
    low = bits.to(torch.int32)[..., None]
    # The mask changes no value. Without it inductor makes the product a strided range, whose lanes
    # it computes with signed overflow; the C++ compiler then drops all but the first vector.
    tokens = torch.arange(vocab_size, device=bits.device, dtype=torch.int32).bitwise_and(_MAX_32)
    # lowbias32 (Wellons) with the second half of the key added between its two rounds.
    x = tokens * _GOLDEN_32 + low
    shifted = x >> 16
    x = x.bitwise_xor_(shifted.bitwise_and_(0xFFFF)).mul_(_MIX_A_32).add_(high)
    torch.bitwise_right_shift(x, 15, out=shifted)
    x = x.bitwise_xor_(shifted.bitwise_and_(0x1FFFF)).mul_(_MIX_B_32)
    torch.bitwise_right_shift(x, 16, out=shifted)
    x = x.bitwise_xor_(shifted.bitwise_and_(0xFFFF))
    return _exponential(_unit_interval(x)).log_().neg_()


def _exponential(unit: Tensor) -> Tensor:
    """``-log1p(-unit)`` to a few units in the last place, in a fifth of its time on a CPU.

    What rounding ``1 - u`` loses of a small u is lost by ``(1 - u) - 1`` too, so the quotient of
    the logarithm and that difference is right, and u gives it its size (Goldberg 1991, theorem 4).
    """
    rest = (1 - unit).clamp_(max=1.0 - 2.0**-24)
    size = rest.log()
    return size.div_(rest.sub_(1)).mul_(unit)


def gaussian(
    keys_B: Int[Tensor, "B"],
    positions_BN: Int[Tensor, "B N"],
    num_channels: int,
    salt: int = Salt.EMBED,
) -> Float[Tensor, "B N H"]:
    """Counter-based standard normal noise, float32: one number per channel of a position.

    Args:
        keys_B: Row keys of `row_keys`.
        positions_BN: Absolute positions.
        num_channels: H.
        salt: One of `Salt`.
    """
    exponential = gumbel(keys_B, positions_BN, num_channels, salt).neg_().exp_()
    # The uniform behind the exponential: it reaches neither 0 nor 1, so every value is finite.
    return torch.special.ndtri(exponential.neg_().expm1_().neg_())


class NoiseWindow:
    """Choice noise of the coming positions of every row, made once per position and kept.

    A position is looked at in many steps (drafted, verified, rejected, verified again) and its
    noise never changes, so it waits in a ring by position until its row has passed it. The ring
    stands twice in a row: rows of one length then find any stretch of it in one piece.
    """

    #: Numbers made ahead in one go where rows need few of them: small tensors cost their launch.
    AHEAD = 1 << 17
    #: Positions made ahead at most.
    MAX_AHEAD = 15
    #: The ring holds a multiple of this, because what it holds is made anew when it grows.
    GRAIN = 16

    def __init__(self, keys_B: Int[Tensor, "B"], vocab_size: int) -> None:
        """Makes no noise yet.

        Args:
            keys_B: Row keys of `row_keys`.
            vocab_size: V.
        """
        self._keys_B = keys_B
        self._vocab_size = vocab_size
        self._row_B1 = torch.arange(keys_B.shape[0], device=keys_B.device)[:, None]
        per_position = max(keys_B.shape[0] * vocab_size, 1)
        self._ahead = min(self.AHEAD // per_position, self.MAX_AHEAD)
        self._size = 0
        self._ring_BRV = keys_B.new_zeros(keys_B.shape[0], 0, vocab_size, dtype=torch.float32)
        self._made_until: list[int] = []

    def take(
        self,
        lengths_B: Int[Tensor, "B"],
        host_lengths: Sequence[int],
        num_positions: int,
        offset: int = 0,
        room: int = sys.maxsize,
    ) -> Float[Tensor, "B N V"]:
        """Noise of N positions of each row, the first ``offset`` behind its length.

        Args:
            lengths_B: Committed tokens per row; they never become fewer in a row that goes on.
            host_lengths: The same on the host, so that nothing is read.
            num_positions: N.
            offset: Positions to skip.
            room: Tokens that any row may still get, at least 1; behind them no noise is made, and
                what is given there is meaningless.
        """
        reach = offset + num_positions
        if reach + self._ahead > self._size:
            # A window is drafted with a position less than it is verified with: grow for both.
            self._grow(-(-(reach + self._ahead) // self.GRAIN) * self.GRAIN)
            self._made_until = list(host_lengths)
        missing = max(
            length + min(reach, room) - made
            for length, made in zip(host_lengths, self._made_until, strict=True)
        )
        if missing > 0:
            end = min(reach + self._ahead, room)
            self._make(lengths_B, host_lengths, end, missing + end - min(reach, room))
        if len(set(host_lengths)) == 1:
            # Rows of one length want the same piece of the ring.
            return self._ring_BRV.narrow(1, (host_lengths[0] + offset) % self._size, num_positions)
        position_BN = lengths_B[:, None] + torch.arange(offset, reach, device=lengths_B.device)
        return self._ring_BRV[self._row_B1, position_BN % self._size]

    def restart(self, row: int, length: int) -> None:
        """A row begins anew at this length; its key, in the tensor of keys, is another one."""
        if self._made_until:
            self._made_until[row] = length

    def _grow(self, size: int) -> None:
        self._size = size
        self._ring_BRV = self._ring_BRV.new_zeros(
            self._ring_BRV.shape[0], 2 * size, self._vocab_size
        )

    def _make(self, lengths_B: Tensor, host_lengths: Sequence[int], reach: int, count: int) -> None:
        """Makes the last ``count`` positions up to ``reach`` of every row, as many as any lacks."""
        span = torch.arange(max(reach - count, 0), reach, device=lengths_B.device)
        position_BN = lengths_B[:, None] + span
        noise = gumbel(self._keys_B, position_BN, self._vocab_size)
        slot_BN = position_BN % self._size
        self._ring_BRV[self._row_B1, slot_BN] = noise
        self._ring_BRV[self._row_B1, slot_BN + self._size] = noise
        self._made_until = [length + reach for length in host_lengths]
