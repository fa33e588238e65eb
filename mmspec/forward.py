"""One forward of an unmodified transformers decoder over a ragged slot cache.

Target adapters and model drafters share it. It knows slots, masks and positions; it does not know
what the tokens mean. Shape suffixes as in `mmspec.records`, and
    R  rows fed to a forward, in the order of the cache
"""

import functools
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmspec.cache import SlotCache, slot_mask

SUPPORTED_ATTENTION = ("sdpa", "eager")
#: Numbers of a mask that is kept for chains of one width, in halves.
MAX_BAND = 1 << 19
SUPPORTED_LAYERS = frozenset({"full_attention", "sliding_attention"})


def check_supported(model: Any) -> None:
    """Refuses models whose cache or positions cannot be rolled back row by row.

    Raises:
        ValueError: Naming the model and what stands in the way.
    """
    config = model.config.get_text_config(decoder=True)
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder-decoder; a decoder-only model is needed")
    if getattr(model, "_is_stateful", False):
        raise ValueError(
            f"{name} keeps a recurrent state (linear attention or SSM) that cannot be rolled back; "
            "use its own generate()"
        )
    foreign = set(getattr(config, "layer_types", None) or ()) - SUPPORTED_LAYERS
    if foreign or getattr(config, "attention_chunk_size", None):
        kinds = ", ".join(sorted(foreign)) or "chunked_attention"
        raise ValueError(f"{name} has layers of kind {kinds}; full and sliding ones are supported")
    if getattr(config, "alibi", False) or getattr(config, "position_embedding_type", "") == "alibi":
        raise ValueError(f"{name} uses ALiBi, which ties positions to padded masks")
    if config.model_type in ("bloom", "mpt"):
        raise ValueError(f"{name} uses ALiBi, which ties positions to padded masks")
    if config.model_type == "gpt_neo":
        raise ValueError(f"{name} has a mask of its own that counts slots, not positions")
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise ValueError(f"{name} takes no position_ids, which ragged rows need")
    attention = config._attn_implementation
    if attention not in SUPPORTED_ATTENTION:
        raise ValueError(
            f"attention {attention!r} does not take 4-D masks; load {name} with "
            f"attn_implementation={' or '.join(map(repr, SUPPORTED_ATTENTION))}"
        )


def text_device(model: Any) -> torch.device:
    """The device on which a model wants its token ids."""
    embedding = model.get_input_embeddings()
    # accelerate keeps offloaded weights on "meta" and moves them, and the ids, when they run.
    hook = getattr(embedding, "_hf_hook", None)
    execution = getattr(hook, "execution_device", None)
    return embedding.weight.device if execution is None else torch.device(execution)


def as_law_dtype(logits: Tensor) -> Tensor:
    """Laws are computed in float32, or in float64 where the model is."""
    return logits if logits.dtype == torch.float64 else logits.float()


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptExtras:
    """What the prompts of some rows have besides token ids.

    Attributes:
        inputs: More inputs of the forward that reads the prompts, as the model's ``forward`` names
            them; those with a value per token are padded on the right.
        part: The same for a forward that reads a part of each prompt, from the index of its first
            token and the number of its tokens, per row; None where there are no more inputs.
        wholes: Spans of tokens, first and end, that see each other whole, per row; no forward may
            read a part of one. Empty where all attention is causal.
        place: As in `SlotForward`.
        kept: Indices in each prompt that the model reads, ascending, the last among them; None is
            all. ``inputs`` and ``place`` are then those of the shortened rows.
        padding: Value behind a row in inputs with a value per token.
        num_target_forwards: Forwards of the target that it took to say so.
        placeholders: Token ids that stand for something else than text.
        seen_by: What the same prompts have for another model, for each of some choices of visual
            tokens (`mmspec.visual_tokens.VisualTokens`). Refuses at once; what it returns is to be
            called when the target, whose forward is given, has read the prompts. None where that
            is not known.
    """

    inputs: Mapping[str, Any] = field(default_factory=dict)
    part: Callable[[Sequence[int], Sequence[int]], Mapping[str, Any]] | None = None
    wholes: Sequence[Sequence[tuple[int, int]]] = ()
    place: Callable[[Tensor], Tensor] | None = None
    kept: Sequence[Sequence[int]] | None = None
    padding: int = 0
    num_target_forwards: int = 0
    placeholders: Collection[int] = ()
    seen_by: (
        Callable[[Any, Sequence[Any], "SlotForward"], Callable[[], list["PromptExtras"]]] | None
    ) = None


class SlotForward:
    """Runs a decoder over a `SlotCache`.

    Attributes:
        cache: The model's keys and values.
        place: As in the constructor.
        around: What every forward is run in.
        is_compiled: As in the constructor.
    """

    def __init__(
        self,
        model: Any,
        *,
        num_rows: int,
        capacity: int,
        compile: bool = False,
        cache: SlotCache | None = None,
        place: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Wraps a model.

        Args:
            model: A transformers decoder, with or without its head.
            num_rows: B.
            capacity: Tokens per row that the cache must hold, draft nodes included.
            compile: Compile the forward; the cache then shows its whole capacity to every forward,
                so that the shapes depend on the width alone.
            cache: A cache to share instead of a new one.
            place: Turns indices in the rows, ``[B, N]``, into position ids as the model counts
                them, ``[..., B, N]``; None where they are the same.
        """
        check_supported(model)
        config = model.config.get_text_config(decoder=True)
        self.model = model
        self.cache = cache if cache is not None else SlotCache(num_rows, capacity)
        self.place = place
        if compile:
            self.cache.pin()
        self.around: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.is_compiled = compile
        self._call: Callable[..., object] = compiled_forward(model) if compile else model
        self._layer_types = sorted(set(getattr(config, "layer_types", None) or ()))
        self._window = getattr(config, "sliding_window", None)
        if not self._layer_types and not getattr(config, "use_sliding_window", True):
            self._window = None
        self._takes_keep = "logits_to_keep" in inspect.signature(model.forward).parameters
        devices = set((getattr(model, "hf_device_map", None) or {}).values())
        self._is_dispatched = len(devices) > 1
        self._max_position = getattr(config, "max_position_embeddings", None)

    def extend(
        self,
        inputs: Mapping[str, Tensor],
        num_cached: Sequence[int],
        counts: Sequence[int],
        rows: Sequence[int] | None = None,
        wholes: Sequence[Sequence[tuple[int, int]]] = (),
    ) -> Tensor:
        """Feeds a right-padded chunk of tokens behind what each row has cached.

        Args:
            inputs: ``input_ids`` ``[B, N]`` or ``inputs_embeds`` ``[B, N, hidden]``, N being the
                largest count; entries past a row's count are padding. Where all rows are fed,
                other inputs of the model may follow.
            num_cached: Tokens each row has cached.
            counts: Tokens of the chunk that count, at least one per row.
            rows: As in `run`.
            wholes: As in `PromptExtras`. From an empty cache the model builds its own mask, and
                must be told of them by its own inputs.

        Returns:
            What the model says behind each row's last token: logits ``[B, 1, V]``, or the hidden
            state ``[B, 1, hidden]`` of a model without a head; zeros in rows that are not fed.
            Other logits are not computed if the model lets one choose.
        """
        chunk = next(iter(inputs.values()))
        num_rows, num_nodes = chunk.shape[:2]
        node = torch.arange(num_nodes, device=chunk.device)
        cached_B = torch.tensor(list(num_cached), device=chunk.device)
        last_R = torch.tensor([counts[row] for row in self.cache.feed(rows)]) - 1
        output = self.run(
            inputs,
            cached_B=cached_B,
            host_cached=num_cached,
            depth_BN=node.expand(num_rows, -1),
            ancestors_BNN=_seen(node, num_cached, wholes).expand(num_rows, -1, -1),
            positions_BN=cached_B[:, None] + node,
            # What sees ahead is a chain only to an empty cache, where the model masks.
            is_chain=max(num_cached) == 0 or not any(wholes),
            keep=self._kept(last_R, chunk.device) if num_nodes > 1 else None,
            allow_compiled=False,
            rows=rows,
        )
        states = output.logits if hasattr(output, "logits") else output.last_hidden_state
        return self.spread(_at_last(states, last_R).to(chunk.device))

    def _kept(self, last_R: Tensor, device: torch.device) -> Tensor | int:
        """Which logits to ask for: each row's own last, or where that cannot be said, all lasts."""
        kept = last_R.unique()
        if len(kept) == 1:
            return 1
        # A choice per row must lie where the last layer is; one for all rows may be on the host.
        return kept if self._is_dispatched else last_R[:, None].to(device)

    def run(
        self,
        inputs: Mapping[str, Tensor],
        *,
        cached_B: Tensor,
        host_cached: Sequence[int],
        depth_BN: Tensor,
        ancestors_BNN: Tensor,
        positions_BN: Tensor,
        is_chain: bool,
        keep: Tensor | int | None = None,
        allow_compiled: bool = True,
        rows: Sequence[int] | None = None,
    ) -> Any:
        """One forward over drafted nodes.

        Rows that have ended need not be fed: name the others in ``rows`` and pass the answer
        through `spread`. All other arguments are those of the whole batch in any case.

        Args:
            inputs: ``input_ids`` ``[B, N]`` or ``inputs_embeds`` ``[B, N, hidden]``.
            cached_B: Committed tokens in the cache, per row.
            host_cached: The same on the host; sizes the attention without a read.
            depth_BN: Depth of each node.
            ancestors_BNN: Ancestor relation.
            positions_BN: Index of each node in its row.
            is_chain: Every row is a chain.
            keep: The model's ``logits_to_keep``, if it has it; None is all.
            allow_compiled: Use the compiled forward if there is one.
            rows: The rows to feed; None is all. A compiled forward feeds all rows whatever is
                named, because its shapes must stay few.

        Returns:
            The model's output, for the rows fed, in the order of the cache.
        """
        if self.place is not None:
            positions_BN = self.place(positions_BN)
        fed = self.cache.feed(rows)
        host_cached = [host_cached[row] for row in fed]
        if fed != tuple(range(len(cached_B))):
            fed_R = torch.tensor(fed, device=cached_B.device)
            inputs = {name: tensor[fed_R] for name, tensor in inputs.items()}
            cached_B, depth_BN = cached_B[fed_R], depth_BN[fed_R]
            ancestors_BNN = ancestors_BNN[fed_R]
            positions_BN = positions_BN.index_select(-2, fed_R)
        compiled = self.is_compiled and allow_compiled
        num_nodes = depth_BN.shape[1]
        longest, capacity = max(host_cached), self.cache.cursor.capacity
        extent = capacity if compiled else min(longest + num_nodes, capacity)
        # A slice at a place that moves would be compiled again in every step.
        is_even = not compiled and min(host_cached) == longest and longest + num_nodes <= capacity
        slots_BN = None
        if not is_even:
            slots_BN = cached_B[:, None] + torch.arange(num_nodes, device=cached_B.device)
        self.cache.aim(slots_BN, extent, longest)
        # From an empty cache the model's own masks are right for rows padded on the right, those of
        # windows, prefixes and images that see themselves whole among them.
        is_short = self._window is None or extent < self._window
        is_plain = is_chain and is_even and (longest == 0 or (num_nodes == 1 and is_short))
        mask = None
        if not is_plain:
            past = longest if is_chain and is_even else None
            mask = self._mask(cached_B, ancestors_BNN, depth_BN, extent, past)
        # Padding may stand behind the last position that the model knows.
        if self._max_position is not None and longest + num_nodes > self._max_position:
            positions_BN = positions_BN.clamp(max=self._max_position - 1)
        arguments: dict[str, Any] = dict(inputs)
        if self._takes_keep and keep is not None:
            arguments["logits_to_keep"] = keep
        call = self._call if compiled else self.model
        with self.around():
            return call(
                **arguments,
                attention_mask=mask,
                position_ids=positions_BN,
                past_key_values=self.cache,
                use_cache=True,
            )

    def spread(self, answer_RN: Tensor) -> Tensor:
        """What the last forward said, ``[R, N, ...]``, as ``[B, N, ...]``; zeros where not fed."""
        fed, num_rows = self.cache.fed, self.cache.cursor.num_rows
        if fed == tuple(range(num_rows)):
            return answer_RN
        spread = answer_RN.new_zeros((num_rows, *answer_RN.shape[1:]))
        return spread.index_copy_(0, torch.tensor(fed, device=spread.device), answer_RN)

    def _mask(
        self,
        cached_B: Tensor,
        ancestors_BNN: Tensor,
        depth_BN: Tensor,
        extent: int,
        past: int | None,
    ) -> Tensor | dict[str, Tensor]:
        """What each node may see, as a number to add; ``past`` is set for chains of one length."""
        # Added to the scores: eager attention wants it so, and sdpa would convert in each layer.
        # The least number, not -inf: a padding node that sees nothing must not turn into NaN.
        dtype, device = self.model.dtype, depth_BN.device
        least = torch.finfo(dtype).min
        capacity = self.cache.cursor.capacity

        def build(window: int | None) -> Tensor:
            if past is not None and (window is None or extent <= window):
                # Each node sees the cached tokens, the nodes before it and itself.
                seen_NS = _causal(depth_BN.shape[1], past, extent, capacity, dtype, device)
                return seen_NS.expand(len(depth_BN), 1, -1, -1)
            mask = slot_mask(cached_B, ancestors_BNN, depth_BN, extent, window)
            zero = torch.zeros((), dtype=dtype, device=device)
            return torch.where(mask, zero, least)

        if not self._layer_types:
            return build(self._window)
        windows = {"full_attention": None, "sliding_attention": self._window}
        if len(self._layer_types) == 1:
            # Not every model with layers of one kind takes masks by kind.
            return build(windows[self._layer_types[0]])
        return {kind: build(windows[kind]) for kind in self._layer_types}


def _causal(
    num_nodes: int, past: int, extent: int, capacity: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """What the nodes of a chain behind ``past`` cached tokens may see, ``[N, S]``, to be added."""
    if num_nodes * capacity <= MAX_BAND:
        return _band(num_nodes, capacity, dtype, device)[:, capacity - past :][:, :extent]
    least = torch.finfo(dtype).min
    return torch.full((num_nodes, extent), least, dtype=dtype, device=device).triu_(past + 1)


@functools.lru_cache(maxsize=8)
def _band(num_nodes: int, reach: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Masks of chains wherever they begin: columns ``reach - past`` on are that behind ``past``.

    A step then makes no mask but cuts one out. It is shared, and must not be written to.
    """
    least = torch.finfo(dtype).min
    return torch.full((num_nodes, 2 * reach), least, dtype=dtype, device=device).triu_(reach + 1)


def _seen(
    node: Tensor, num_cached: Sequence[int], wholes: Sequence[Sequence[tuple[int, int]]]
) -> Tensor:
    """Which nodes of a chunk each one sees: those before it, and those of its own span."""
    causal_NN = node[:, None] >= node
    if not any(wholes):
        return causal_NN
    # Numbers of spans; tokens outside of all are given numbers that no other token has.
    span_BN = torch.stack([-1 - node] * len(num_cached))
    for row, (cached, spans) in enumerate(zip(num_cached, wholes, strict=True)):
        for number, (first, end) in enumerate(spans):
            span_BN[row, max(first - cached, 0) : max(end - cached, 0)] = number
    return causal_NN | (span_BN[:, :, None] == span_BN[:, None])


def _at_last(states: Tensor, last_R: Tensor) -> Tensor:
    """Each row's last node, ``[R, 1, ...]``, from answers for all nodes or for those asked for."""
    if states.shape[1] == 1:
        return states
    kept = last_R.unique()
    if states.shape[1] == len(kept):
        last_R = torch.searchsorted(kept, last_R)
    index = last_R.to(states.device)[:, None, None]
    return states.gather(1, index.expand(-1, -1, states.shape[2]))


def compiled_forward(model: Any) -> Callable[..., object]:
    """The model's forward, compiled once per model and kept on it for later calls."""
    compiled = model.__dict__.get("_mmspec_compiled_forward")
    if compiled is None:
        compiled = torch.compile(model.forward, dynamic=False, fullgraph=True)
        model.__dict__["_mmspec_compiled_forward"] = compiled
    return compiled
