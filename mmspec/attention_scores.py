"""How much the text behind the images of a prompt attends to each cached token.

The text is read once more over the cache, which is left as it is, with eager attention, which
alone tells its weights. That is one forward over a few tokens and one more copy of a layer's keys.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mmspec.forward import SlotForward
from mmspec.rows import TokenRows

#: Most tokens of the text whose attention is averaged, from the end of the prompt.
MAX_QUERIES = 64


def attention_scores(forward: SlotForward, rows: TokenRows, starts: Sequence[int]) -> Tensor:
    """Mean attention over layers, heads and tokens of the prompts' ends.

    Args:
        forward: A model whose cache holds the prompts.
        rows: The rows.
        starts: Where the text behind the last image begins in each row; of longer texts the last
            `MAX_QUERIES` tokens count.

    Returns:
        ``[B, P]``, P being the length of the longest prompt.
    """
    lengths = rows.prompt_lengths
    starts = [max(s, n - MAX_QUERIES) for s, n in zip(starts, lengths, strict=True)]
    counts = [n - s for s, n in zip(starts, lengths, strict=True)]
    device = rows.tokens_BT.device
    node = torch.arange(max(counts), device=device)
    index = torch.tensor(starts, device=device)[:, None] + node
    tokens = rows.tokens_BT.gather(1, index.clamp(max=rows.capacity - 1))
    counts_B1 = torch.tensor(counts, device=device)[:, None]
    is_query_BQ = node < counts_B1
    scores_BP = torch.zeros(len(counts), max(lengths), device=device)
    layers = _attention_layers(forward.model)

    def add(module: nn.Module, args: Any, output: Any) -> None:
        weights_BHQS = output[1].to(device)
        weights_BQS = weights_BHQS.float().mean(1) * is_query_BQ[..., None]
        seen = min(weights_BQS.shape[-1], scores_BP.shape[1])
        scores_BP[:, :seen] += (weights_BQS.sum(1) / counts_B1)[:, :seen] / len(layers)

    scratch = SlotForward(
        forward.model,
        num_rows=rows.num_rows,
        capacity=forward.cache.capacity,
        cache=forward.cache.scratch(),
        place=forward.place,
    )
    hooks = [layer.register_forward_hook(add) for layer in layers]
    try:
        with _eager(layers):
            scratch.extend({"input_ids": tokens}, starts, counts)
    finally:
        for hook in hooks:
            hook.remove()
    return scores_BP


def _attention_layers(model: Any) -> list[Any]:
    """The attention of each layer of the decoder, which returns its weights beside its output."""
    modules = model.get_decoder().named_modules()
    return [module for name, module in modules if name.rpartition(".")[2] == "self_attn"]


@contextmanager
def _eager(layers: Sequence[Any]) -> Iterator[None]:
    """Lets these layers compute their weights, and puts back what they used before."""
    configs = {id(layer.config): layer.config for layer in layers}.values()
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = "eager"
        yield
    finally:
        for config, attention in zip(configs, before, strict=True):
            config._attn_implementation = attention
