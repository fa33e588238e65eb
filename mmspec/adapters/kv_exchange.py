"""Keys and values to and from the caches of transformers.

A `DynamicCache` keeps a batch in columns: column c of every row is column c of the padded ids. A
`SlotCache` keeps each row's tokens from slot 0 on. The mask that says which columns are tokens
leads from one to the other, so padding may stand anywhere.

Shape suffixes as in `mmspec.records`, and
    C  columns of the padded ids
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from mmspec.adapters.cross_cache import EncoderSlotCache
from mmspec.adapters.guided_lm import GuidedTarget
from mmspec.cache import SlotCache
from mmspec.rows import TokenRows


def check_exchangeable(cache: Any) -> None:
    """Refuses caches whose keys cannot be taken over as they are.

    Raises:
        ValueError: Naming the class of the cache or of its layer.
    """
    if not isinstance(cache, Cache) or getattr(cache, "offloading", False):
        kind = "an offloaded cache" if isinstance(cache, Cache) else type(cache).__name__
        raise ValueError(f"past_key_values must be a plain DynamicCache, got {kind}")
    foreign = {type(layer).__name__ for layer in cache.layers} - {
        DynamicLayer.__name__,
        DynamicSlidingWindowLayer.__name__,
    }
    if foreign or not isinstance(cache, DynamicCache):
        layers = f" with layers {', '.join(sorted(foreign))}" if foreign else ""
        raise ValueError(
            f"past_key_values must be a plain DynamicCache, got {type(cache).__name__}{layers}"
        )


def import_cache(past: DynamicCache, is_token_BC: Tensor, capacity: int) -> SlotCache:
    """Copies keys and values into a slot cache.

    Args:
        past: Filled for the first columns of the batch; of a sliding layer only the last columns
            that its window reaches are there, and no later token looks further back.
        is_token_BC: Which columns of the whole prompts are tokens, bool.
        capacity: Tokens per row of the new cache.

    Raises:
        ValueError: If the cache is of another kind or another batch.
    """
    check_exchangeable(past)
    num_rows, num_columns = is_token_BC.shape[0], past.get_seq_length()
    cache = SlotCache(num_rows, capacity)
    # Columns of padding go to the bin behind the last slot.
    slots_BC = torch.where(is_token_BC, is_token_BC.cumsum(1) - 1, capacity)[:, :num_columns]
    for index, layer in enumerate(past.layers):
        if not layer.is_initialized:
            continue
        if layer.keys.shape[0] != num_rows:
            raise ValueError(
                f"past_key_values holds {layer.keys.shape[0]} rows, the batch has {num_rows}"
            )
        held = layer.keys.shape[2]
        cache.aim(slots_BC[:, num_columns - held :], extent=0)
        cache.update(layer.keys, layer.values, index)
    return cache


def import_prefix(
    past: Any, is_token_BP: Tensor, rows: TokenRows
) -> tuple[SlotCache | None, list[int] | None]:
    """The slot cache of a reused cache, and how much of each row it holds.

    Args:
        past: What `generate` passes on as ``past_key_values``; None or empty where none is reused.
        is_token_BP: Which columns of the whole prompts are tokens, bool.
        rows: The rows of the whole prompts.

    Raises:
        ValueError: If the cache is of a foreign kind, or the prompts are no longer than it.
    """
    if past is None:
        return None, None
    if getattr(past, "_is_user_defined", False):
        check_exchangeable(past)
    num_columns = past.get_seq_length()
    if num_columns == 0:
        return None, None
    if num_columns >= is_token_BP.shape[1]:
        raise ValueError(
            f"past_key_values holds {num_columns} columns and input_ids only "
            f"{is_token_BP.shape[1]}; pass the whole input_ids, cached part included"
        )
    device = rows.lengths_B.device
    cache = import_cache(past, is_token_BP.to(device), rows.capacity)
    return cache, is_token_BP[:, :num_columns].sum(1).tolist()


def export_cache(cache: SlotCache, past: DynamicCache, is_token_BC: Tensor) -> None:
    """Refills a dynamic cache, in place, from a slot cache.

    Args:
        cache: Holds the tokens of every row from slot 0 on.
        past: Whatever it held is replaced. Columns that are no tokens become zeros, so the mask
            of the next turn has to leave them out.
        is_token_BC: Which columns are tokens, bool; every column is written.
    """
    cache.restore()
    slots_BC = (is_token_BC.cumsum(1) - 1).clamp(min=0)
    for index, layer in enumerate(cache.layers):
        if not layer.is_initialized:
            continue
        states = []
        for buffer in (layer.keys, layer.values):
            slots = slots_BC.to(buffer.device)[:, None, :, None]
            columns = buffer.gather(2, slots.expand(-1, buffer.shape[1], -1, buffer.shape[3]))
            is_token = is_token_BC.to(buffer.device)[:, None, :, None]
            states.append(columns.masked_fill(~is_token, 0))
        if index < len(past.layers):
            past.layers[index].reset()
        past.update(*states, index)


def refilled(past: Any, target: Any, is_token_BC: Tensor) -> Cache:
    """The cache that `generate` was given, refilled as its own loop would leave it.

    Args:
        past: Any cache; where it is no plain `DynamicCache`, `generate` has made it itself for
            fewer tokens than drafts need, and another one is filled.
        target: The target at the end of its run.
        is_token_BC: Which columns are tokens, bool.
    """
    if not isinstance(past, DynamicCache):
        past = DynamicCache(config=target.forward.model.config.get_text_config(decoder=True))
    rows = target.rows
    if isinstance(target, GuidedTarget):
        target.drop_guidance()
    if rows.num_rows > 1:
        # A row that ended in the last step has its last token not cached yet.
        host_cached = [len(tokens) - 1 for tokens in rows.host_tokens]
        last = {"input_ids": rows.roots_B()[:, None]}
        target.forward.extend(last, host_cached, [1] * rows.num_rows)
    cache = target.forward.cache
    export_cache(cache, past, is_token_BC.to(rows.lengths_B.device))
    return cache.export_cross(past) if isinstance(cache, EncoderSlotCache) else past
