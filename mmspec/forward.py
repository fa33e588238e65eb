"""One forward of an unmodified transformers decoder over a ragged slot cache.

Target adapters and model drafters share it. It knows slots, masks and positions; it does not know
what the tokens mean. Shape suffixes as in `mmspec.records`.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmspec.cache import SlotCache, slot_mask

SUPPORTED_ATTENTION = ("sdpa", "eager")
# Chunks up to this many tokens are fed at once, logits and all.
WIDE = 32
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


class SlotForward:
    """Runs a decoder over a `SlotCache`.

    Attributes:
        cache: The model's keys and values.
        num_forwards: Forwards so far.
    """

    def __init__(
        self,
        model: Any,
        *,
        num_rows: int,
        capacity: int,
        compile: bool = False,
        cache: SlotCache | None = None,
    ) -> None:
        """Wraps a model.

        Args:
            model: A transformers decoder, with or without its head.
            num_rows: B.
            capacity: Tokens per row that the cache must hold, draft nodes included.
            compile: Compile the forward; the cache then shows its whole capacity to every forward,
                so that the shapes depend on the width alone.
            cache: A cache to share instead of a new one.
        """
        check_supported(model)
        config = model.config.get_text_config(decoder=True)
        self.model = model
        self.cache = cache if cache is not None else SlotCache(num_rows, capacity)
        self.num_forwards = 0
        self._is_compiled = compile
        self._call: Callable[..., object] = compiled_forward(model) if compile else model
        self._layer_types = sorted(set(getattr(config, "layer_types", None) or ()))
        self._window = getattr(config, "sliding_window", None)
        if not self._layer_types and not getattr(config, "use_sliding_window", True):
            self._window = None
        self._takes_keep = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._is_eager = config._attn_implementation == "eager"
        self._max_position = getattr(config, "max_position_embeddings", None)

    def prefill(
        self,
        inputs: Mapping[str, Tensor],
        cached_B: Tensor,
        host_cached: Sequence[int],
    ) -> None:
        """Caches a right-padded chunk of every row; its logits are not wanted.

        Args:
            inputs: ``input_ids`` ``[B, N]`` or ``inputs_embeds`` ``[B, N, hidden]``.
            cached_B: Tokens each row has cached already.
            host_cached: The same on the host.
        """
        num_rows, num_nodes = next(iter(inputs.values())).shape[:2]
        if num_nodes == 0:
            return
        node = torch.arange(num_nodes, device=cached_B.device)
        self.run(
            inputs,
            cached_B=cached_B,
            host_cached=host_cached,
            depth_BN=node.expand(num_rows, -1),
            ancestors_BNN=(node[:, None] >= node).expand(num_rows, -1, -1),
            positions_BN=cached_B[:, None] + node,
            is_chain=True,
            num_keep=1,
            allow_compiled=False,
        )

    def extend(
        self, ids_BN: Tensor, num_cached: Sequence[int], counts: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Feeds a right-padded chunk of tokens behind what each row has cached.

        Args:
            ids_BN: Token ids; entries past a row's count are padding.
            num_cached: Tokens each row has cached.
            counts: Tokens of the chunk that count, at least one per row.

        Returns:
            The logits behind each row's last token, ``[B, 1, V]`` in float32 or float64, and that
            token's position ``[B, 1]``.
        """
        if ids_BN.shape[1] > WIDE:
            # Logits of a whole prompt would fill the memory: cache it, then feed its last token.
            cached_B = torch.tensor(list(num_cached), device=ids_BN.device)
            self.prefill({"input_ids": ids_BN}, cached_B, num_cached)
            last = torch.tensor(list(counts), device=ids_BN.device)[:, None] - 1
            ids_BN = ids_BN.gather(1, last)
            num_cached = [n + count - 1 for n, count in zip(num_cached, counts, strict=True)]
            counts = [1] * len(counts)
        num_rows, num_nodes = ids_BN.shape
        node = torch.arange(num_nodes, device=ids_BN.device)
        cached_B = torch.tensor(list(num_cached), device=ids_BN.device)
        output = self.run(
            {"input_ids": ids_BN},
            cached_B=cached_B,
            host_cached=num_cached,
            depth_BN=node.expand(num_rows, -1),
            ancestors_BNN=(node[:, None] >= node).expand(num_rows, -1, -1),
            positions_BN=cached_B[:, None] + node,
            is_chain=True,
        )
        logits: Tensor = output.logits  # type: ignore[attr-defined]
        last_B1 = torch.tensor(list(counts), device=ids_BN.device)[:, None] - 1
        if num_nodes > 1:
            at_last = last_B1[..., None].expand(-1, -1, logits.shape[-1]).to(logits.device)
            logits = logits.gather(1, at_last)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return logits.to(ids_BN.device), cached_B[:, None] + last_B1

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
        num_keep: int = 0,
        allow_compiled: bool = True,
    ) -> object:
        """One forward over drafted nodes.

        Args:
            inputs: ``input_ids`` ``[B, N]`` or ``inputs_embeds`` ``[B, N, hidden]``.
            cached_B: Committed tokens in the cache, per row.
            host_cached: The same on the host; sizes the attention without a read.
            depth_BN: Depth of each node.
            ancestors_BNN: Ancestor relation.
            positions_BN: Position ids.
            is_chain: Every row is a chain.
            num_keep: Logits of the last so many nodes; 0 is all.
            allow_compiled: Use the compiled forward if there is one.

        Returns:
            The model's output.
        """
        compiled = self._is_compiled and allow_compiled
        num_nodes = depth_BN.shape[1]
        longest = max(host_cached)
        extent = self.cache.cursor.capacity if compiled else longest + num_nodes
        extent = min(extent, self.cache.cursor.capacity)
        node = torch.arange(num_nodes, device=cached_B.device)
        self.cache.aim(cached_B[:, None] + node, extent, longest)
        is_plain = (
            is_chain
            and not compiled
            and min(host_cached) == longest
            and (num_nodes == 1 or longest == 0)
            and (self._window is None or extent < self._window)
        )
        mask = None if is_plain else self._mask(cached_B, ancestors_BNN, depth_BN, extent)
        if self._max_position is not None:
            positions_BN = positions_BN.clamp(max=self._max_position - 1)
        arguments = dict(inputs)
        if self._takes_keep and num_keep:
            arguments["logits_to_keep"] = num_keep  # type: ignore[assignment]
        self.num_forwards += 1
        call = self._call if compiled else self.model
        return call(
            **arguments,
            attention_mask=mask,
            position_ids=positions_BN,
            past_key_values=self.cache,
            use_cache=True,
        )

    def _mask(
        self, cached_B: Tensor, ancestors_BNN: Tensor, depth_BN: Tensor, extent: int
    ) -> Tensor | dict[str, Tensor]:
        def build(window: int | None) -> Tensor:
            mask = slot_mask(cached_B, ancestors_BNN, depth_BN, extent, window)
            if not self._is_eager:
                return mask
            # Eager attention adds the mask to the scores, so it must be a float.
            dtype = self.model.dtype
            return torch.zeros((), dtype=dtype, device=mask.device).masked_fill(
                ~mask, torch.finfo(dtype).min
            )

        if not self._layer_types:
            return build(self._window)
        windows = {"full_attention": None, "sliding_attention": self._window}
        return {kind: build(windows[kind]) for kind in self._layer_types}


def compiled_forward(model: Any) -> Callable[..., object]:
    """The model's forward, compiled once per model and kept on it for later calls."""
    compiled = model.__dict__.get("_mmspec_compiled_forward")
    if compiled is None:
        compiled = torch.compile(model.forward, dynamic=False, fullgraph=True)
        model.__dict__["_mmspec_compiled_forward"] = compiled
    return compiled
