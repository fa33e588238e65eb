"""What the tokens of a forward look for: their queries, taken down beside the forward.

Attention is computed by the very function that the model is set to; what is noted costs a reference
to a tensor. With the cached keys the queries say where any one token looked, for the price of one
row of an attention matrix and without eager attention.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_PREFIX = "noted_"


class Noted(NamedTuple):
    """One layer's part of a forward.

    Attributes:
        query: Queries with their positions rotated in, as those of cached keys are,
            ``[R, heads, N, D]``.
        mask: What is added to their scores, ``[R, 1, N, S]``; None where all S slots are seen.
        num_slots: S.
        scaling: Factor of the scores.
        softcap: What scores are held under; None is nothing.
    """

    query: Tensor
    mask: Tensor | None
    num_slots: int
    scaling: float
    softcap: float | None


#: By layer. Per thread, so that requests which share a model do not meet.
_NOTES: ContextVar[dict[int, Noted] | None] = ContextVar("_NOTES", default=None)


@contextmanager
def noted_queries(model: Any) -> Iterator[dict[int, Noted]]:
    """Notes the queries of a decoder's forwards while it is open.

    Args:
        model: The model. Its text layers go through `transformers.AttentionInterface`.

    Yields:
        What is noted, by the index of the layer; a later forward's replaces an earlier one's.
    """
    configs = {id(layer.config): layer.config for layer in attention_layers(model)}.values()
    notes: dict[int, Noted] = {}
    token = _NOTES.set(notes)
    for config in configs:
        config._attn_implementation = _noting(config._attn_implementation)
    try:
        yield notes
    finally:
        for config in configs:
            config._attn_implementation = config._attn_implementation.removeprefix(_PREFIX)
        _NOTES.reset(token)


def attention_layers(model: Any) -> list[Any]:
    """The attention of each layer of the decoder."""
    modules = model.get_decoder().named_modules()
    return [module for name, module in modules if name.rpartition(".")[2] == "self_attn"]


def _noting(kind: str) -> str:
    """The name of an attention that also notes; makes it known to transformers."""
    if kind.startswith(_PREFIX):
        return kind
    name = _PREFIX + kind
    if name not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        ALL_ATTENTION_FUNCTIONS.register(name, _beside(kind))
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[kind])
    return name


def _beside(kind: str) -> Callable[..., Any]:
    """The attention of a name, which notes its queries first."""

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> Any:
        notes = _NOTES.get()
        if notes is not None:
            scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
            softcap = kwargs.get("softcap")
            layer: int = module.layer_idx  # type: ignore[assignment]
            notes[layer] = Noted(query, attention_mask, key.shape[2], scaling, softcap)
        # Eager attention is a function of each family's own module, not one that is registered.
        own = sys.modules[type(module).__module__]
        function = own.eager_attention_forward if kind == "eager" else ALL_ATTENTION_FUNCTIONS[kind]
        return function(module, query, key, value, attention_mask, **kwargs)

    return attention
