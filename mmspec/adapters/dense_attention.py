"""Attention of AnyFlow-FAR as two matrix products, for machines where flex attention is slow.

diffusers runs AnyFlow-FAR with flex attention. Where that is not compiled, each call is traced
anew, which takes some 30 ms on a core whatever the size of the model. Here the same is computed
with ``scaled_dot_product_attention``; results agree to rounding. Masks are whole tensors, a byte
for each pair of tokens that are read together.
"""

import math
from typing import Any, Self
from weakref import WeakKeyDictionary

import torch
from diffusers.models.transformers.transformer_anyflow_far import apply_rotary_emb
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import create_mask

#: diffusers pads queries and keys to a multiple of this.
PADDING = 128
#: Bytes of masks that are kept of a transformer. Building one takes a small model as long as
#: several forwards.
KEPT_BYTES = 1 << 24
#: Transformer -> its latest masks, by the arguments that they are built from.
_MASKS: WeakKeyDictionary[torch.nn.Module, dict[str, Tensor]] = WeakKeyDictionary()


class DenseProcessor:
    """Stands in for diffusers' ``AnyFlowCausalAttnProcessor``, with a mask that is a tensor."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: dict[str, Tensor] | None = None,
        kv_cache: dict[str, Tensor] | None = None,
        kv_cache_flag: dict[str, Any] | None = None,
    ) -> Tensor:
        """Attends; arguments as those of diffusers' processor."""
        query, key, value = (
            part.to(hidden_states.dtype).unflatten(2, (attn.heads, -1)).transpose(1, 2)
            for part in (
                attn.norm_q(attn.to_q(hidden_states)),
                attn.norm_k(attn.to_k(hidden_states)),
                attn.to_v(hidden_states),
            )
        )
        if kv_cache is not None and kv_cache_flag is not None:
            key, value = _cached(key, value, kv_cache, kv_cache_flag)
        if rotary_emb is not None:
            query = apply_rotary_emb(query, rotary_emb["query"])
            key = apply_rotary_emb(key, rotary_emb["key"])
        num_padded = -query.shape[2] % PADDING
        if attention_mask is None:
            key, value, mask = _with_padding(key, value, num_padded)
        else:
            mask = attention_mask[..., : query.shape[2], : key.shape[2]]
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        mixed = mixed.transpose(1, 2).flatten(2, 3).type_as(query)
        result: Tensor = attn.to_out[1](attn.to_out[0](mixed))
        return result


class DenseAttention:
    """Dense attention of a transformer: between `install` and `remove`, or in a ``with``."""

    def __init__(self, transformer: Any) -> None:
        """Changes nothing yet.

        Args:
            transformer: An ``AnyFlowFARTransformer3DModel``.
        """
        self._transformer = transformer
        self._build = transformer.build_attention_mask
        self._own: list[Any] = []

    def install(self) -> None:
        """Gives the transformer this attention, for every caller."""
        self._own = [block.attn1.processor for block in self._transformer.blocks]
        for block in self._transformer.blocks:
            block.attn1.set_processor(DenseProcessor())
        self._transformer.build_attention_mask = self._mask

    def remove(self) -> None:
        """Gives it back what it had."""
        for block, own in zip(self._transformer.blocks, self._own, strict=True):
            block.attn1.set_processor(own)
        del self._transformer.build_attention_mask  # the class has its own

    def __enter__(self) -> Self:
        """Installs it."""
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        """Removes it."""
        self.remove()

    def _mask(self, **arguments: Any) -> Tensor:
        """The mask of blocks that diffusers builds, as a tensor."""
        key = repr((sorted(arguments.items()), self._transformer.config))
        masks = _MASKS.setdefault(self._transformer, {})
        mask = masks.pop(key, None)
        if mask is None:
            block_mask = self._build(**arguments)
            num_queries, num_keys = block_mask.seq_lengths
            mask = create_mask(
                block_mask.mask_mod, None, None, num_queries, num_keys, device=arguments["device"]
            )
        # The latest is last; older ones make room.
        masks[key] = mask
        while len(masks) > 1 and sum(one.nbytes for one in masks.values()) > KEPT_BYTES:
            del masks[next(iter(masks))]
        return mask


def _cached(
    key: Tensor, value: Tensor, cache: dict[str, Tensor], flag: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Writes keys and values in a reading step; puts those of the past before them in others."""
    if flag["is_cache_step"]:
        num_compressed, num_full = flag["num_compressed_tokens"], flag["num_full_tokens"]
        for place, part in enumerate((key, value)):
            cache["compressed_cache"][place, :, :, :num_compressed] = part[:, :, :num_compressed]
            cache["full_cache"][place, :, :, :num_full] = part[:, :, num_compressed:]
        return key, value
    num_compressed = flag["num_cached_compressed_tokens"]
    num_full = flag["num_cached_full_tokens"]
    key, value = (
        torch.cat(
            [
                cache["compressed_cache"][place, :, :, :num_compressed],
                cache["full_cache"][place, :, :, :num_full],
                part,
            ],
            dim=2,
        )
        for place, part in enumerate((key, value))
    )
    return key, value


def _with_padding(
    key: Tensor, value: Tensor, num_padded: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The keys of zeros that diffusers appends, as one: all have the score 0 and the value 0."""
    if num_padded == 0:
        return key, value, None
    bias = torch.zeros(1, key.shape[2] + 1, dtype=key.dtype, device=key.device)
    bias[:, -1] = math.log(num_padded)
    key, value = (
        torch.cat([part, torch.zeros_like(part[:, :, :1])], dim=2) for part in (key, value)
    )
    return key, value, bias
