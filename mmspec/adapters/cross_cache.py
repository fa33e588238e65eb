"""Keys and values of what an encoder said, next to a slot cache of what a decoder says.

The encoder runs once. The decoder's own first forward turns its states into keys and values of each
layer, and every later forward reads them. Rows that have ended are not fed: as the rows of a slot
cache change places, so do these.

Shape suffixes as in `mmspec.cache`, and
    E  states of an encoder
"""

import functools
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

from mmspec.cache import SlotCache, SlotLayer


class CrossLayer(SlotLayer):
    """One layer's keys and values of the encoder's states: written once, then read only."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Keeps ``[R, H, E, D]``; rows that the first forward does not feed are never fed."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._order = self.cursor.order
        missing = self.cursor.num_rows - key_states.shape[0]
        self.hold(
            torch.nn.functional.pad(states.transpose(1, 2), (0, 0, 0, 0, 0, 0, 0, missing))
            for states in (key_states, value_states)
        )
        self.is_initialized = True
        return key_states, value_states

    def get_seq_length(self) -> int:
        """E, or 0 before the first forward."""
        return self.buffers[0].shape[1] if self.is_initialized else 0

    def stand(self) -> None:
        """Shows the rows that the coming forward feeds, in its order."""
        if not self.is_initialized:
            return
        self.settle()
        num_fed = self.cursor.num_fed
        self.keys, self.values = (buffer[:num_fed].transpose(1, 2) for buffer in self.buffers)


class CrossCache(Cache):
    """The layers' keys and values of the encoder's states.

    Attributes:
        states: The encoder's states of the rows that the coming forward feeds, ``[R, E, hidden]``.
        mask: What to add to their scores, ``[R, 1, 1, E]``; None where no row is padded.
    """

    def __init__(self, cursor: Any, states: Tensor, mask: Tensor | None) -> None:
        """Holds the encoder's states; the keys come with the first forward.

        Args:
            cursor: That of the slot cache.
            states: Of all rows, ``[B, E, hidden]``.
            mask: Of all rows, ``[B, 1, 1, E]``.
        """
        super().__init__(layer_class_to_replicate=functools.partial(CrossLayer, cursor))
        self._cursor = cursor
        self._whole = states, mask
        self._fed = tuple(range(len(states)))
        self.states, self.mask = states, mask

    def stand(self) -> None:
        """Follows the slot cache: which rows are fed, and in which order."""
        fed = self._cursor.order[: self._cursor.num_fed]
        if fed != self._fed:
            states, mask = self._whole
            index = torch.tensor(fed, device=states.device)
            self.states = states.index_select(0, index)
            self.mask = None if mask is None else mask.index_select(0, index)
            self._fed = fed
        for layer in self.layers:
            layer.stand()


class BothHalves(EncoderDecoderCache):
    """Self-attention and cross-attention of one forward."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0: the decoder is given its mask, and its positions do not count.

        A number that changes in every step would be compiled into the forward.
        """
        return 0


class EncoderSlotCache(SlotCache):
    """A slot cache of a decoder that also attends to an encoder.

    Attributes:
        cross: What the encoder said.
    """

    def __init__(
        self, num_rows: int, capacity: int, states: Tensor, mask: Tensor | None = None
    ) -> None:
        """Makes an empty cache.

        Args:
            num_rows: B.
            capacity: As in `SlotCache`.
            states: As in `CrossCache`.
            mask: As in `CrossCache`.
        """
        super().__init__(num_rows, capacity)
        self.cross = CrossCache(self.cursor, states, mask)

    def aim(self, slots_BN: Tensor | None, extent: int, past: int = 0) -> None:
        """As in `SlotCache`; the encoder's keys follow."""
        super().aim(slots_BN, extent, past)
        self.cross.stand()

    def joint(self) -> EncoderDecoderCache:
        """Both halves as layers with cross-attention want them, for one forward."""
        return BothHalves(self, self.cross)

    def export_cross(self, own: DynamicCache) -> EncoderDecoderCache:
        """An exported self-attention cache together with a copy of the encoder's keys."""
        self.restore()
        self.cross.stand()
        cross = DynamicCache()
        for index, layer in enumerate(self.cross.layers):
            cross.update(layer.keys.clone(), layer.values.clone(), index)
        return EncoderDecoderCache(own, cross)
