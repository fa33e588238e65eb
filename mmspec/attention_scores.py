"""How much some tokens attend to each cached token, as mean over layers and heads."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mmspec.cache import SlotCache
from mmspec.forward import SlotForward, as_law_dtype
from mmspec.queries import Noted, noted_queries
from mmspec.rows import TokenRows

#: Most tokens of the text whose attention is averaged, from the end of the prompt.
MAX_QUERIES = 64


def attention_scores(forward: SlotForward, rows: TokenRows, starts: Sequence[int]) -> Tensor:
    """Mean attention over layers, heads and tokens of the prompts' ends.

    The text is read once more over the cache, which is left as it is: one forward over a few tokens
    and one more copy of a layer's keys.

    Args:
        forward: A model whose cache holds the prompts.
        rows: The rows.
        starts: Where the text that is read begins in each row; of longer texts the last
            `MAX_QUERIES` tokens count.

    Returns:
        ``[B, S]``, S being at least the length of the longest prompt.
    """
    lengths = rows.prompt_lengths
    starts = [max(s, n - MAX_QUERIES) for s, n in zip(starts, lengths, strict=True)]
    counts = [n - s for s, n in zip(starts, lengths, strict=True)]
    device = rows.tokens_BT.device
    node = torch.arange(max(counts), device=device)
    index = torch.tensor(starts, device=device)[:, None] + node
    tokens = rows.tokens_BT.gather(1, index.clamp(max=rows.capacity - 1))
    scratch = SlotForward(
        forward.model,
        num_rows=rows.num_rows,
        capacity=forward.cache.capacity,
        cache=forward.cache.scratch(),
        place=forward.place,
    )
    with noted_queries(forward.model) as notes:
        scratch.extend({"input_ids": tokens}, starts, counts)
    is_asked_BQ = node < torch.tensor(counts, device=device)[:, None]
    return attention_of(notes, forward.cache, node.expand(len(counts), -1), is_asked_BQ)


def attention_of(
    notes: Mapping[int, Noted], cache: SlotCache, node_RQ: Tensor, is_asked_RQ: Tensor
) -> Tensor:
    """Mean attention over layers, heads and some tokens of the last forward.

    Args:
        notes: What was noted of it.
        cache: Holds the keys that it saw.
        node_RQ: Tokens of the forward, for the rows that were fed, in the order of the cache.
        is_asked_RQ: Which of these count; at least one a row.

    Returns:
        ``[R, S]``, S being the slots that the forward saw.
    """
    home = node_RQ.device
    share_RQ1 = (is_asked_RQ / is_asked_RQ.sum(1, keepdim=True))[..., None]
    total = torch.zeros((), device=home)
    for index, (query, mask, num_slots, scaling, softcap) in notes.items():
        node_RQ = node_RQ.to(query.device)
        wide = node_RQ[:, None, :, None]
        keys_RKSD = as_law_dtype(cache.layers[index].keys[: len(query), :, :num_slots])
        asked = query.gather(2, wide.expand(-1, query.shape[1], -1, query.shape[3]))
        asked_RKGQD = as_law_dtype(asked).unflatten(1, (keys_RKSD.shape[1], -1))
        logits = torch.einsum("rkgqd,rksd->rkgqs", asked_RKGQD, keys_RKSD) * scaling
        if softcap is not None:
            logits = (logits / softcap).tanh() * softcap
        if mask is not None:
            mask = as_law_dtype(mask[..., :num_slots]).expand(len(query), -1, -1, -1)
            logits = logits + mask.gather(2, wide.expand(-1, 1, -1, num_slots))[:, :, None]
        weights_RQS = logits.softmax(-1).mean((1, 2))
        share = share_RQ1.to(weights_RQS.device, weights_RQS.dtype)
        total = total + (weights_RQS * share).sum(1).to(home) / len(notes)
    return total
