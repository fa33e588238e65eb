"""A ragged key/value cache: every row writes its keys and values at its own slots.

The slot of a committed token is its position, so rows of different lengths need no padding and a
roll-back is a smaller length: slots past a row's length are masked out and later overwritten. Draft
nodes sit behind the committed part in packed order; committing a tree path moves its nodes forward.

A forward may leave rows out (those that have ended). The rows that it feeds then stand first, the
others behind them; nothing is dropped, so a cache can still be handed on whole.

It is a `transformers.Cache`, so unmodified models write into it; the 4-D mask and the position ids
that go with it come from `slot_mask`. Shape suffixes as in `mmspec.records`, and
    S  slots seen by a forward     H  key/value heads     D  head dimension
    R  rows fed to a forward, in the order in which they stand
"""

import copy
import functools
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class _Cursor:
    """Where the coming forward writes; shared by all layers of a cache."""

    def __init__(self, num_rows: int, capacity: int) -> None:
        self.capacity = capacity
        self.is_pinned = False
        self.flat_slots: Tensor | None = None
        self.extent = 0
        self.past = 0
        self.hold_rows(num_rows)

    def hold_rows(self, num_rows: int) -> None:
        """All rows are fed, each in its own place."""
        self.num_rows = self.num_fed = num_rows
        #: Row that stands in each place; the first ``num_fed`` places are fed.
        self.order = tuple(range(num_rows))

    def feed(self, rows: Sequence[int] | None) -> None:
        """Lets these rows stand first; each one that steps aside changes places with one fed."""
        if rows is None or self.is_pinned or len(rows) == self.num_rows:
            self.hold_rows(self.num_rows)
            return
        self.num_fed = len(rows)
        order, wanted = list(self.order), set(rows)
        front, back = range(self.num_fed), range(self.num_fed, self.num_rows)
        ended = [place for place in front if order[place] not in wanted]
        fed = [place for place in back if order[place] in wanted]
        for one, other in zip(ended, fed, strict=True):
            order[one], order[other] = order[other], order[one]
        self.order = tuple(order)

    def flat(self, slots_RN: Tensor) -> Tensor:
        """Index of every slot where the rows stand one behind the other, ``[R * N]``."""
        first_R = torch.arange(slots_RN.shape[0], device=slots_RN.device) * self.capacity
        return (slots_RN.clamp(max=self.capacity - 1) + first_R[:, None]).flatten()


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, preallocated.

    Attributes:
        buffers: Keys and values as ``[B, capacity, H, D]``: each slot is one piece of memory, so
            that writing at any slots is one copy of rows.
        keys: A view of the first, ``[B, H, capacity, D]``.
        values: A view of the second.
    """

    is_sliding = False
    #: transformers builds a mask for every single-token step of a cache that says True, and sdpa
    #: is slower with one. A compiled forward is given its masks.
    is_compileable = False

    def __init__(self, cursor: _Cursor) -> None:
        """Allocates nothing yet: head count, dtype and device come with the first keys."""
        super().__init__()
        self.cursor = cursor
        self.buffers: list[Tensor] = []
        self._order = cursor.order

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocates the buffers on the keys' device."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._order = self.cursor.order
        shape = (self.cursor.num_rows, self.cursor.capacity)
        self.hold(
            states.new_zeros((*shape, states.shape[1], states.shape[3]))
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def hold(self, buffers: Iterable[Tensor]) -> None:
        """Takes these buffers from now on."""
        self.buffers = list(buffers)
        self.keys, self.values = (buffer.transpose(1, 2) for buffer in self.buffers)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Writes ``[R, H, N, D]`` where the cursor says; returns the first ``extent`` slots."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.settle()
        past, extent, flat = self.cursor.past, self.cursor.extent, self.cursor.flat_slots
        num_fed = self.cursor.num_fed
        seen = []
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            new = states.transpose(1, 2)
            fed = buffer if num_fed == self.cursor.num_rows else buffer[:num_fed]
            if flat is None:
                fed.narrow(1, past, new.shape[1]).copy_(new)
            else:
                buffer.flatten(0, 1).index_copy_(0, flat.to(new.device), new.flatten(0, 1))
            seen.append(fed.narrow(1, 0, extent).transpose(1, 2))
        return seen[0], seen[1]

    def settle(self) -> None:
        """Moves the rows to where the cursor says that they stand.

        Each layer for itself when it is next used: layers that share a cursor with an early-exit
        drafter are not all used by every forward.
        """
        if self._order == self.cursor.order:
            return
        place = {row: place for place, row in enumerate(self._order)}
        source = [place[row] for row in self.cursor.order]
        moved = [place for place, old in enumerate(source) if old != place]
        to = torch.tensor(moved, device=self.device)
        from_ = torch.tensor([source[place] for place in moved], device=self.device)
        for buffer in self.buffers:
            buffer.index_copy_(0, to, buffer.index_select(0, from_))
        self._order = self.cursor.order

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Slots seen by the coming forward, and their offset."""
        return self.cursor.extent, 0

    def get_seq_length(self) -> int:
        """Cached tokens, where every row has the same number (only then is a mask left out)."""
        return self.cursor.past

    def get_max_length(self) -> int:
        """Capacity in tokens."""
        return self.cursor.capacity

    def take_rows(self, rows: Tensor) -> None:
        """Keeps only some rows, in the given order."""
        self._order = self.cursor.order
        if self.is_initialized:
            self.hold(buffer.index_select(0, rows.to(buffer.device)) for buffer in self.buffers)

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copies slots to slots; both are flat, as `_Cursor.flat` gives them."""
        for buffer in self.buffers:
            flat = buffer.flatten(0, 1)
            kept = flat.index_select(0, source.to(flat.device))
            flat.index_copy_(0, target.to(flat.device), kept)


class _ScratchLayer(SlotLayer):
    """A layer whose forwards see what another one holds and what they write, and leave no trace."""

    def __init__(self, cursor: _Cursor, held: SlotLayer) -> None:
        super().__init__(cursor)
        self._held = held
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Writes into a copy, which goes when the layer has been run."""
        self.hold(buffer.clone() for buffer in self._held.buffers)
        seen = super().update(key_states, value_states)
        self.buffers = []
        del self.keys, self.values
        return seen


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

    def aim(self, slots_BN: Int[Tensor, "B N"] | None, extent: int, past: int = 0) -> None:
        """Says where the coming forward writes.

        Args:
            slots_BN: Slot of every node; slots past the capacity fall into the bin. None where
                every row writes at slots ``past``, ``past + 1``, ...: a slice, which is cheaper.
            extent: How many slots the forward attends over.
            past: Cached tokens, if equal in all rows; they are when no mask is given to the model.
        """
        self.cursor.flat_slots = None if slots_BN is None else self.cursor.flat(slots_BN)
        self.cursor.extent = extent
        self.cursor.past = past

    def feed(self, rows: Sequence[int] | None) -> tuple[int, ...]:
        """Says which rows the coming forwards feed; None is all of them, each in its own place.

        Nobody loses a key: a row that is left out steps behind those that are fed, and a row that
        was moved is moved back when all are fed again. That copies two rows per row that leaves,
        and every forward that feeds a row reads it once, so it pays after two forwards.

        Returns:
            The rows in the order in which the forward must feed them.
        """
        self.cursor.feed(rows)
        return self.fed

    @property
    def fed(self) -> tuple[int, ...]:
        """The rows that are fed, in the order in which they stand."""
        return self.cursor.order[: self.cursor.num_fed]

    def pin(self) -> None:
        """Feeds all rows from now on, so that shapes stay few (for compiled forwards)."""
        self.cursor.is_pinned = True
        self.cursor.feed(None)

    def commit_path(self, path_BM: Int[Tensor, "B M"], cached_B: Int[Tensor, "B"]) -> None:
        """Moves the nodes of a tree path to the slots right behind the committed part.

        Rows that the last forward did not feed have no nodes; what is said of them is ignored.

        Example:
            5 tokens cached and the path ``[0, 1, 3]``: the keys in slots 5, 6, 8 go to 5, 6, 7.
        """
        if self.fed != tuple(range(len(cached_B))):
            fed_R = torch.tensor(self.fed, device=cached_B.device)
            path_BM, cached_B = path_BM[fed_R], cached_B[fed_R]
        offset = torch.arange(path_BM.shape[1], device=path_BM.device)
        source = self.cursor.flat(cached_B[:, None] + path_BM)
        target = self.cursor.flat(cached_B[:, None] + offset)
        for layer in self._filled():
            layer.move(source, target)

    def first_layers(self, count: int) -> "SlotCache":
        """A cache that shares the buffers of the first layers (for an early-exit drafter)."""
        while len(self.layers) < count:  # before the first forward there are none
            self.layers.append(self.layer_class_to_replicate())
        shared = copy.copy(self)
        shared.layers = self.layers[:count]
        return shared

    def scratch(self) -> "SlotCache":
        """A cache of the same content that keeps nothing that is written into it."""
        self.restore()
        shared = SlotCache.__new__(SlotCache)
        cursor = _Cursor(self.cursor.num_rows, self.cursor.capacity)
        Cache.__init__(shared, layers=[_ScratchLayer(cursor, layer) for layer in self._filled()])
        shared.cursor = cursor
        return shared

    def copy_slots(self, source: "SlotCache", from_BN: Tensor, to_BN: Tensor) -> None:
        """Copies keys and values of another cache for the same layers and rows.

        Args:
            source: The other cache.
            from_BN: Its slots.
            to_BN: Slots of this cache; those past the capacity fall into the bin.
        """
        layers = source._filled()
        while len(self.layers) < len(layers):
            self.layers.append(self.layer_class_to_replicate())
        for own, layer in zip(self.layers, layers, strict=True):
            if not own.is_initialized:
                own.lazy_initialization(layer.keys, layer.values)
            own.settle()
            flat_from = source._flat(from_BN).to(layer.device)
            flat_to = self._flat(to_BN).to(own.device)
            for held, new in zip(own.buffers, layer.buffers, strict=True):
                states = new.flatten(0, 1).index_select(0, flat_from)
                held.flatten(0, 1).index_copy_(0, flat_to, states.to(held.device))

    def copy_rows(self, source: "SlotCache", from_: Sequence[int], to: Sequence[int]) -> None:
        """Copies all that some rows of another cache for the same layers hold.

        Args:
            source: The other cache, of no larger capacity.
            from_: Its rows.
            to: Rows of this cache.
        """
        place = {row: place for place, row in enumerate(self.cursor.order)}
        for own, layer in zip(self._filled(), source._filled(), strict=True):
            for held, new in zip(own.buffers, layer.buffers, strict=True):
                for row, other in zip(to, from_, strict=True):
                    held[place[row], : source.capacity].copy_(new[other, : source.capacity])

    def _flat(self, slots_BN: Tensor) -> Tensor:
        """As `_Cursor.flat`, for slots in the order of the batch."""
        place = {row: place for place, row in enumerate(self.cursor.order)}
        places_B = torch.tensor([place[row] for row in range(len(place))], device=slots_BN.device)
        slots_BN = slots_BN.clamp(max=self.cursor.capacity - 1)
        return (slots_BN + places_B[:, None] * self.cursor.capacity).flatten()

    def _filled(self) -> list[SlotLayer]:
        filled = [layer for layer in self.layers if layer.is_initialized]
        for layer in filled:
            layer.settle()
        return filled

    def restore(self) -> None:
        """Every row stands in its own place again: row b of a buffer is row b of the batch."""
        self.cursor.feed(None)
        self._filled()

    def select_rows(self, rows: Int[Tensor, "R"]) -> None:
        """Keeps only some rows, in the given order."""
        self.restore()
        self.cursor.hold_rows(rows.shape[0])
        for layer in self.layers:
            layer.take_rows(rows)

    def reserve(self, capacity: int) -> None:
        """Grows to at least this many tokens per row; never shrinks."""
        if capacity <= self.capacity:
            return
        self.cursor.capacity = capacity + 1
        for layer in self._filled():
            layer.hold(
                torch.nn.functional.pad(old, (0, 0, 0, 0, 0, capacity + 1 - old.shape[1]))
                for old in layer.buffers
            )


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
