"""The pictures of a video that is written block by block: each is decoded once, when asked for."""

import time
from typing import Any, Protocol

from torch import Tensor

#: Pictures of the block before that a router may see.
NUM_PREVIOUS = 4


class Codec(Protocol):
    """Turns latents of blocks into pictures, in order.

    Attributes:
        remembers: Whether a block is decoded behind those before it; else each starts anew.
    """

    remembers: bool

    def decode(self, latents: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Decodes a block ``[1, C, F, H, W]`` behind what ``state`` has seen; None at the start.

        Returns:
            Pictures ``[1, 3, F, H, W]`` in [-1, 1], and the state behind them. The old state stays
            as it was.
        """


class BlockFrames:
    """The pictures of one video, decoded when asked for, each block once.

    Attributes:
        decode_time_s: Seconds so far.
    """

    def __init__(self, codec: Codec) -> None:
        """Starts a video."""
        self._codec = codec
        self._state: Any = None
        self._waiting: list[Tensor] = []
        self._ready: list[Tensor] = []
        self._last: Tensor | None = None
        self._drafted: tuple[Tensor, Tensor, Any] | None = None
        self.decode_time_s = 0.0

    def commit(self, latents: Tensor) -> None:
        """Adds a block; a draft that was looked at is taken over or forgotten."""
        drafted, self._drafted = self._drafted, None
        if drafted is not None and drafted[0] is latents:
            self._keep(*drafted[1:])
        else:
            self._waiting.append(latents)

    def draft(self, latents: Tensor) -> Tensor:
        """Pictures of a block that may be dropped, ``[1, 3, F, H, W]`` in [-1, 1]."""
        if self._drafted is None or self._drafted[0] is not latents:
            self._catch_up()
            self._drafted = (latents, *self._decode(latents))
        return self._drafted[1]

    def last(self) -> Tensor | None:
        """The last pictures of the last committed block; None where there is none."""
        self._catch_up()
        return self._last

    def take(self) -> list[Tensor]:
        """Pictures of the committed blocks that were not taken before, per block."""
        self._catch_up()
        ready, self._ready = self._ready, []
        return ready

    def drop(self) -> None:
        """Forgets pictures that nobody will take; does not decode."""
        self._ready = []

    def _catch_up(self) -> None:
        waiting, self._waiting = self._waiting, []
        for latents in waiting:
            self._keep(*self._decode(latents))

    def _keep(self, frames: Tensor, state: Any) -> None:
        self._state = state
        self._ready.append(frames)
        self._last = frames[:, :, -NUM_PREVIOUS:]

    def _decode(self, latents: Tensor) -> tuple[Tensor, Any]:
        started = time.perf_counter()
        decoded = self._codec.decode(latents, self._state)
        self.decode_time_s += time.perf_counter() - started
        return decoded


def pictures(pixels: Tensor) -> Tensor:
    """``[1, 3, F, H, W]`` in [-1, 1] to float32 ``[F, 3, H, W]`` in [0, 1]."""
    return (pixels[0].transpose(0, 1).float() * 0.5 + 0.5).clamp(0, 1)
