"""A ragged key/value cache: every row writes its keys and values at its own slots.

The slot of a committed token is its position, so rows of different lengths need no padding and a
roll-back is a smaller length: slots past a row's length are masked out and later overwritten. Draft
nodes sit behind the committed part in packed order; committing a tree path moves its nodes forward.

It is a `transformers.Cache`, so unmodified models write into it; the 4-D mask and the position ids
that go with it come from `slot_mask`. Shape suffixes as in `mmspec.records`, and
    S  slots seen by a forward     H  key/value heads     D  head dimension
"""

import functools

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class _Cursor:
    """Where the coming forward writes; shared by all layers of a cache."""

    def __init__(self, num_rows: int, capacity: int) -> None:
        self.num_rows = num_rows
        self.capacity = capacity
        self.slots_BN: Tensor | None = None
        self.extent = 0
        self.past = 0


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, preallocated as ``[B, H, capacity, D]``."""

    is_sliding = False
    is_compileable = True

    def __init__(self, cursor: _Cursor) -> None:
        """Allocates nothing yet: head count, dtype and device come with the first keys."""
        super().__init__()
        self.cursor = cursor

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocates the buffers on the keys' device."""
        self.dtype, self.device = key_states.dtype, key_states.device
        for name, states in (("keys", key_states), ("values", value_states)):
            shape = (self.cursor.num_rows, states.shape[1], self.cursor.capacity, states.shape[3])
            setattr(self, name, states.new_zeros(shape))
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Writes ``[B, H, N, D]`` at the cursor's slots and returns the first ``extent`` slots."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.cursor.slots_BN is not None, "aim() says where to write before each forward"
        slots = self.cursor.slots_BN.to(key_states.device)
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            if slots.shape[0] == 1:
                buffer.index_copy_(2, slots[0], states)
            else:
                buffer.scatter_(2, slots[:, None, :, None].expand_as(states), states)
        extent = self.cursor.extent
        return self.keys[:, :, :extent], self.values[:, :, :extent]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Slots seen by the coming forward, and their offset."""
        return self.cursor.extent, 0

    def get_seq_length(self) -> int:
        """Cached tokens, where every row has the same number (only then is a mask left out)."""
        return self.cursor.past

    def get_max_length(self) -> int:
        """Capacity in tokens."""
        return self.cursor.capacity

    def move(self, source_BM: Tensor, target_BM: Tensor) -> None:
        """Copies slots to slots, row by row."""
        for buffer in (self.keys, self.values):
            shape = (-1, buffer.shape[1], -1, buffer.shape[3])
            source = source_BM.to(buffer.device)[:, None, :, None].expand(shape)
            target = target_BM.to(buffer.device)[:, None, :, None].expand(shape)
            buffer.scatter_(2, target, buffer.gather(2, source))


class SlotCache(Cache):
    """The layers of one model and the cursor they share."""

    def __init__(self, num_rows: int, capacity: int) -> None:
        """Makes an empty cache.

        Args:
            num_rows: B.
            capacity: Tokens per row. One more slot is kept as a bin for writes that no row needs.
        """
        self.cursor = _Cursor(num_rows, capacity + 1)
        super().__init__(layer_class_to_replicate=functools.partial(SlotLayer, self.cursor))

    @property
    def capacity(self) -> int:
        """Tokens per row."""
        return self.cursor.capacity - 1

    def aim(self, slots_BN: Int[Tensor, "B N"], extent: int, past: int = 0) -> None:
        """Says where the coming forward writes.

        Args:
            slots_BN: Slot of every node; slots past the capacity fall into the bin.
            extent: How many slots the forward attends over.
            past: Cached tokens, if equal in all rows and no mask is given to the model.
        """
        self.cursor.slots_BN = slots_BN.clamp(max=self.cursor.capacity - 1)
        self.cursor.extent = extent
        self.cursor.past = past

    def commit_path(self, path_BM: Int[Tensor, "B M"], cached_B: Int[Tensor, "B"]) -> None:
        """Moves the nodes of a tree path to the slots right behind the committed part.

        Example:
            5 tokens cached and the path ``[0, 1, 3]``: the keys in slots 5, 6, 8 go to 5, 6, 7.
        """
        offset = torch.arange(path_BM.shape[1], device=path_BM.device)
        source, target = cached_B[:, None] + path_BM, cached_B[:, None] + offset
        last = self.cursor.capacity - 1
        for layer in self._filled():
            layer.move(source.clamp(max=last), target.clamp(max=last))

    def first_layers(self, count: int) -> "SlotCache":
        """A cache that shares the buffers of the first layers (for an early-exit drafter)."""
        while len(self.layers) < count:  # before the first forward there are none
            self.layers.append(self.layer_class_to_replicate())
        shared = SlotCache.__new__(SlotCache)
        Cache.__init__(shared, layers=self.layers[:count])
        shared.cursor = self.cursor
        return shared

    def _filled(self) -> list[SlotLayer]:
        return [layer for layer in self.layers if layer.is_initialized]

    def select_rows(self, rows: Int[Tensor, "R"]) -> None:
        """Keeps only some rows, in the given order."""
        self.cursor.num_rows = rows.shape[0]
        for layer in self._filled():
            layer.keys = layer.keys.index_select(0, rows.to(layer.keys.device))
            layer.values = layer.values.index_select(0, rows.to(layer.values.device))

    def reserve(self, capacity: int) -> None:
        """Grows to at least this many tokens per row; never shrinks."""
        if capacity <= self.capacity:
            return
        self.cursor.capacity = capacity + 1
        for layer in self._filled():
            for name in ("keys", "values"):
                old = getattr(layer, name)
                grown = old.new_zeros((*old.shape[:2], capacity + 1, old.shape[3]))
                grown[:, :, : old.shape[2]] = old
                setattr(layer, name, grown)


def slot_mask(
    cached_B: Int[Tensor, "B"],
    ancestors_BNN: Bool[Tensor, "B N N"],
    depth_BN: Int[Tensor, "B N"],
    extent: int,
    window: int | None = None,
) -> Bool[Tensor, "B 1 N S"]:
    """Which slots each node may see: the committed ones, its ancestors and itself.

    Args:
        cached_B: Committed tokens in the cache, per row; draft node i sits in slot cached + i.
        ancestors_BNN: Ancestor relation of the nodes.
        depth_BN: Depth of the nodes.
        extent: S.
        window: Sliding window in positions. Positions decide, not slots: nodes of one depth share
            a position wherever they are packed.
    """
    num_nodes = depth_BN.shape[1]
    slot = torch.arange(extent, device=cached_B.device)
    node_BS = slot - cached_B[:, None]
    is_draft = (node_BS >= 0) & (node_BS < num_nodes)
    index_BS = node_BS.clamp(0, num_nodes - 1)
    seen = ancestors_BNN.gather(2, index_BS[:, None].expand(-1, num_nodes, -1))
    mask = (node_BS < 0)[:, None] | (is_draft[:, None] & seen)
    if window is not None:
        slot_depth = torch.where(node_BS < 0, node_BS, depth_BN.gather(1, index_BS))
        mask &= depth_BN[:, :, None] - slot_depth[:, None] < window
    return mask[:, None]
