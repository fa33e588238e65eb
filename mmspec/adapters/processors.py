"""The logits processors of `transformers.generate` as a `mmspec.sampling.Law`.

`generate` calls its processors once per token with the ids so far; a verification forward judges
many nodes at once, each with a path of its own. Processors with a vectorised twin in
`mmspec.sampling` become that twin. Processors that ignore the ids are called once for all nodes.
The rest are called with every node's real ids, nodes of equal length together, which costs a read
of the drafts per step. What keeps a state from call to call has no meaning for drafts that are
dropped again, and is refused.

Shape suffixes as in `mmspec.records`, and
    P  columns of the prompts as `generate` lays them out, padding included
"""

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

from mmspec.adapters.constraints import Constrained, TokensByPosition
from mmspec.checks import is_list, require
from mmspec.sampling import (
    NEG_INF,
    BadWords,
    Law,
    LawContext,
    MinNewTokens,
    MinP,
    RepetitionPenalty,
    Stage,
    Temperature,
    TopK,
    TopP,
)

#: Keep a state between calls, or change the shape of the batch: they cannot judge a draft.
STATEFUL = frozenset(
    {
        "AlternatingCodebooksLogitsProcessor",
        "BarkEosPrioritizerLogitsProcessor",
        "ClassifierFreeGuidanceLogitsProcessor",
        "DiaClassifierFreeGuidanceLogitsProcessor",
        "DiaEOSChannelFilterLogitsProcessor",
        "DiaEOSDelayPatternLogitsProcessor",
        "SynthIDTextWatermarkLogitsProcessor",
        "UnbatchedClassifierFreeGuidanceLogitsProcessor",
        "WhisperNoSpeechDetection",
        "WhisperTimeStampLogitsProcessor",
    }
)

#: Look at the scores only: one call for all nodes.
FLAT = frozenset(
    {
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
        "InfNanRemoveLogitsProcessor",
        "LogitNormalization",
        "MinPLogitsWarper",
        "TemperatureLogitsWarper",
        "TopHLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "TypicalLogitsWarper",
    }
)

#: Look at the ids of their own row and at nothing else: called with the path to each node.
PATHWISE = frozenset(
    {
        "ExponentialDecayLengthPenalty",
        "NoRepeatNGramLogitsProcessor",
        "SequenceBiasLogitsProcessor",
        "WatermarkLogitsProcessor",
    }
)

Processor = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What a processor was told about the batch when `generate` made it.

    Attributes:
        prompt_ids_BP: The prompts with their padding, as processors see them.
        is_token_BP: Which columns are tokens and not padding.
        vocab_size: V.
    """

    prompt_ids_BP: Tensor
    is_token_BP: Tensor
    vocab_size: int

    @property
    def width(self) -> int:
        """P: the length of every row's ids before its first new token."""
        return self.prompt_ids_BP.shape[1]


def law_from_processors(
    processors: Iterable[Any],
    layout: Layout,
    *,
    is_greedy: bool,
    stateless: Sequence[Any] = (),
) -> Law:
    """Turns prepared processors into a law, in their order.

    Args:
        processors: The list that `generate` hands to its decoding loop.
        layout: The batch that they were made for.
        is_greedy: The choice is the argmax of what they return.
        stateless: Classes (or the very objects) that depend on ``(ids, scores)`` of a row alone,
            vouched for by the caller.

    Raises:
        ValueError: Naming a processor that keeps a state, or that nobody vouches for.
    """
    stages = (_stage(processor, layout, stateless) for processor in processors)
    return Law(stages=tuple(s for s in stages if s is not None), is_greedy=is_greedy)


def _stage(processor: Any, layout: Layout, stateless: Sequence[Any]) -> Stage | None:
    """The stage of one processor; None where it changes nothing."""
    kind = type(processor)
    # A subclass may do something else, so only the class itself is known by its name.
    name = kind.__name__ if getattr(transformers, kind.__name__, None) is kind else ""
    name = name or (kind.__name__ if kind.__module__.startswith("transformers.") else "")
    if name in STATEFUL:
        raise ValueError(
            f"logits processor {name} keeps a state from call to call, or works on several rows at "
            "once; drafts that are dropped again cannot be judged with it"
        )
    if name in _TWINS:
        twin = _TWINS[name](processor, layout)
        if twin is not NotImplemented:
            return twin
    if name in FLAT:
        return Flat(processor)
    if name in _BOUND:
        bound = [_BOUND[name](processor, row, layout) for row in range(len(layout.prompt_ids_BP))]
        return Pathwise(processors=tuple(bound), prompt_ids_BP=layout.prompt_ids_BP)
    if name in PATHWISE or _is_listed(processor, stateless):
        return Pathwise(processors=(processor,), prompt_ids_BP=layout.prompt_ids_BP)
    raise ValueError(
        f"logits processor {kind.__name__} is unknown. If it depends on (input_ids, scores) of a "
        "row alone and keeps nothing between calls, say so with "
        f"stateless_processors=[{kind.__name__}]"
    )


def checked_stateless(processors: Any) -> tuple[Any, ...]:
    """The caller's stateless processors as a tuple.

    Raises:
        ValueError: If they are not a list of classes or callable objects.
    """
    rule = "a list of logits processors, classes or objects"
    require(is_list(processors, callable), "stateless_processors", rule, processors)
    return tuple(processors)


def _is_listed(processor: Any, stateless: Sequence[Any]) -> bool:
    classes = tuple(entry for entry in stateless if isinstance(entry, type))
    return isinstance(processor, classes) or any(processor is entry for entry in stateless)


# --------------------------------------------------------------------------- stages


@dataclass(frozen=True, slots=True)
class Suppress:
    """Forbids tokens, everywhere or as the n-th new token only.

    Attributes:
        token_ids: The tokens.
        new_index: New tokens before the one to be chosen; None is any number.
    """

    token_ids: tuple[int, ...]
    new_index: int | None = None

    def __call__(self, logits: Tensor, context: LawContext) -> Tensor:
        """Applies the stage."""
        banned = _one_hot(self.token_ids, logits)
        if self.new_index is not None:
            banned = banned & (_num_new(context) == self.new_index)[..., None]
        return logits.masked_fill(banned, NEG_INF)


@dataclass(frozen=True, slots=True)
class Forced:
    """Allows nothing but some tokens as the n-th new token.

    Attributes:
        token_ids: The tokens, equally likely.
        new_index: New tokens before the one to be chosen.
    """

    token_ids: tuple[int, ...]
    new_index: int

    def __call__(self, logits: Tensor, context: LawContext) -> Tensor:
        """Applies the stage."""
        forced = torch.where(_one_hot(self.token_ids, logits), 0.0, NEG_INF).to(logits.dtype)
        return torch.where((_num_new(context) == self.new_index)[..., None], forced, logits)


@dataclass(frozen=True, slots=True)
class Flat:
    """A processor that ignores the ids, called once with all nodes as its batch."""

    processor: Processor

    def __call__(self, logits: Tensor, context: LawContext) -> Tensor:
        """Applies the stage."""
        ids = context.tokens_BN.reshape(-1, 1)
        return self.processor(ids, logits.flatten(0, 1)).view_as(logits)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pathwise:
    """A processor called with the ids on the path to every node.

    A node whose own token is impossible after its parent can never be accepted, so it is left
    out: a constraint that only knows its own paths is not asked about a wrong draft.

    Attributes:
        processors: One for all rows, or one for each.
        prompt_ids_BP: The prompts with their padding, on the device the processors expect.
    """

    processors: tuple[Processor, ...]
    prompt_ids_BP: Tensor

    def __call__(self, logits: Tensor, context: LawContext) -> Tensor:
        """Applies the stage; reads the drafts to the host."""
        home = self.prompt_ids_BP.device
        scores = logits.to(home)
        output = scores.clone()
        parents, depths = _parents(context), context.depth_BN.tolist()
        heads = self._heads(context)
        paths: dict[tuple[int, int], Tensor] = {}
        keys = [(row, node) for row, of_row in enumerate(depths) for node in range(len(of_row))]
        for depth in range(max(map(max, depths)) + 1):
            level = [(row, node) for row, node in keys if depths[row][node] == depth]
            if depth == 0:
                paths |= {(row, node): heads[row] for row, node in level}
            else:
                level = [(r, n) for r, n in level if (r, parents[r][n]) in paths]
                paths |= self._extended(level, parents, paths, output, context)
            self._apply([key for key in level if key in paths], paths, scores, output)
        return output.to(logits.device)

    def _heads(self, context: LawContext) -> list[Tensor]:
        """Ids of each row up to its root."""
        starts, ends = context.prompt_lengths_B.tolist(), context.lengths_B.tolist()
        new = [
            context.history_BT[row, start:end].to(self.prompt_ids_BP.device)
            for row, (start, end) in enumerate(zip(starts, ends, strict=True))
        ]
        return [torch.cat(pair) for pair in zip(self.prompt_ids_BP, new, strict=True)]

    def _extended(
        self,
        level: list[tuple[int, int]],
        parents: list[list[int]],
        paths: dict[tuple[int, int], Tensor],
        output: Tensor,
        context: LawContext,
    ) -> dict[tuple[int, int], Tensor]:
        """Paths of the nodes of one depth that their parents' laws allow."""
        if not level:
            return {}
        rows = torch.tensor([row for row, _ in level], device=output.device)
        nodes = torch.tensor([node for _, node in level], device=output.device)
        above = torch.tensor([parents[row][node] for row, node in level], device=output.device)
        tokens = context.tokens_BN.to(output.device)[rows, nodes]
        # Where everything is impossible, the argmax is still taken and anything may follow.
        is_open = output[rows, above].isneginf().all(-1)
        is_possible = ((output[rows, above, tokens] > NEG_INF) | is_open).tolist()
        return {
            (row, node): torch.cat([paths[row, parents[row][node]], token[None]])
            for (row, node), token, possible in zip(level, tokens, is_possible, strict=True)
            if possible
        }

    def _apply(
        self,
        level: list[tuple[int, int]],
        paths: dict[tuple[int, int], Tensor],
        scores: Tensor,
        output: Tensor,
    ) -> None:
        """Calls the processor for the nodes of one depth, those of equal length together."""
        groups: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
        for row, node in level:
            owner = row if len(self.processors) > 1 else 0
            groups[owner, len(paths[row, node])].append((row, node))
        for (owner, _), members in groups.items():
            rows, nodes = (list(part) for part in zip(*members, strict=True))
            ids = torch.stack([paths[key] for key in members])
            judged = self.processors[owner](ids, scores[rows, nodes])
            output[rows, nodes] = judged.to(output.dtype)


def _num_new(context: LawContext) -> Tensor:
    """New tokens on the path to each node, the node's own token included."""
    return (context.lengths_B - context.prompt_lengths_B)[:, None] + context.depth_BN


def _one_hot(token_ids: Sequence[int], logits: Tensor) -> Tensor:
    marked = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
    marked[list(token_ids)] = True
    return marked


def _parents(context: LawContext) -> list[list[int]]:
    """Parent of every node, on the host; the root is its own."""
    above = context.depth_BN[:, :, None] - 1 == context.depth_BN[:, None, :]
    is_parent = context.ancestors_BNN & above
    return is_parent.long().argmax(-1).tolist()


# --------------------------------------------------------------------------- twins


def _inside(token_ids: Any, layout: Layout) -> tuple[int, ...]:
    """Token ids as a tuple, those outside the vocabulary dropped as `torch.isin` drops them."""
    return tuple(
        t for t in torch.as_tensor(token_ids).flatten().tolist() if 0 <= t < layout.vocab_size
    )


def _temperature(processor: Any, layout: Layout) -> Stage:
    return Temperature(processor.temperature)


def _top_k(processor: Any, layout: Layout) -> Any:
    return TopK(processor.top_k) if processor.filter_value == NEG_INF else NotImplemented


def _top_p(processor: Any, layout: Layout) -> Any:
    is_plain = processor.filter_value == NEG_INF and processor.min_tokens_to_keep == 1
    return TopP(processor.top_p) if is_plain else NotImplemented


def _min_p(processor: Any, layout: Layout) -> Any:
    if processor.min_p == 0:
        return None
    is_plain = processor.filter_value == NEG_INF and processor.min_tokens_to_keep == 1
    return MinP(processor.min_p) if is_plain else NotImplemented


def _repetition(processor: Any, layout: Layout) -> Any:
    ignored = processor.prompt_ignore_length
    if ignored is None:
        ignored = torch.zeros(len(layout.prompt_ids_BP))
    # Plain: it looks at each row's tokens, at all of them and at no padding.
    num_padding_B = layout.width - layout.is_token_BP.sum(1)
    is_plain = isinstance(ignored, Tensor) and ignored.tolist() == num_padding_B.tolist()
    return RepetitionPenalty(processor.penalty) if is_plain else NotImplemented


def _bad_words(processor: Any, layout: Layout) -> Stage | None:
    words = tuple(tuple(map(int, word)) for word in processor.sequence_bias)
    foreign = sorted({token for word in words for token in word if token >= layout.vocab_size})
    if foreign:
        raise ValueError(f"bad_words_ids must be below {layout.vocab_size}, got {foreign}")
    return BadWords(words) if words else None


def _min_length(processor: Any, layout: Layout) -> Stage | None:
    # `min_length` counts the padded prompt.
    return _min_new(processor.min_length - layout.width, processor, layout)


def _min_new_tokens(processor: Any, layout: Layout) -> Stage | None:
    skipped = processor.prompt_length_to_skip - layout.width
    return _min_new(processor.min_new_tokens + skipped, processor, layout)


def _min_new(count: int, processor: Any, layout: Layout) -> Stage | None:
    ends = _inside(processor.eos_token_id, layout)
    return MinNewTokens(count, ends) if count > 0 and ends else None


def _suppress(processor: Any, layout: Layout) -> Stage:
    return Suppress(_inside(processor.suppress_tokens, layout))


def _suppress_at_begin(processor: Any, layout: Layout) -> Stage:
    index = processor.begin_index - layout.width
    return Suppress(_inside(processor.begin_suppress_tokens, layout), index)


def _forced_bos(processor: Any, layout: Layout) -> Stage:
    return Forced(_inside(processor.bos_token_id, layout), 1 - layout.width)


def _forced_eos(processor: Any, layout: Layout) -> Stage:
    index = processor.max_length - 1 - layout.width
    return Forced(_inside(processor.eos_token_id, layout), index)


def _by_position(processor: Any, layout: Layout) -> Any:
    constraint = processor._prefix_allowed_tokens_fn
    if not isinstance(constraint, TokensByPosition):
        return NotImplemented
    rule = f"the number of columns of input_ids, {layout.width}"
    is_good = constraint.prompt_width == layout.width
    require(is_good, "prompt_width of TokensByPosition", rule, constraint.prompt_width)
    return Constrained(constraint.table)


#: Name -> the vectorised stage; `NotImplemented` where these settings have none.
_TWINS: dict[str, Callable[[Any, Layout], Any]] = {
    "ForcedBOSTokenLogitsProcessor": _forced_bos,
    "ForcedEOSTokenLogitsProcessor": _forced_eos,
    "MinLengthLogitsProcessor": _min_length,
    "MinNewTokensLengthLogitsProcessor": _min_new_tokens,
    "MinPLogitsWarper": _min_p,
    "NoBadWordsLogitsProcessor": _bad_words,
    "PrefixConstrainedLogitsProcessor": _by_position,
    "RepetitionPenaltyLogitsProcessor": _repetition,
    "SuppressTokensAtBeginLogitsProcessor": _suppress_at_begin,
    "SuppressTokensLogitsProcessor": _suppress,
    "TemperatureLogitsWarper": _temperature,
    "TopKLogitsWarper": _top_k,
    "TopPLogitsWarper": _top_p,
}


# --------------------------------------------------------------------------- one per row


def _copied(processor: Any, **changes: Any) -> Any:
    clone = copy.copy(processor)
    for name, value in changes.items():
        setattr(clone, name, value)
    return clone


def _repetition_of_row(processor: Any, row: int, layout: Layout) -> Processor:
    ignored = processor.prompt_ignore_length
    if isinstance(ignored, Tensor):
        ignored = int(ignored[row])
    return _copied(processor, prompt_ignore_length=ignored)


def _encoder_repetition_of_row(processor: Any, row: int, layout: Layout) -> Processor:
    ids = processor.encoder_input_ids
    source = row // (len(layout.prompt_ids_BP) // len(ids))
    ids = ids[source : source + 1]

    def judge(input_ids: Tensor, scores: Tensor) -> Tensor:
        return _copied(processor, encoder_input_ids=ids)(input_ids, scores)

    return judge


def _encoder_ngrams_of_row(processor: Any, row: int, layout: Layout) -> Processor:
    source = row // (len(layout.prompt_ids_BP) // processor.batch_size)
    return _copied(processor, batch_size=1, generated_ngrams=[processor.generated_ngrams[source]])


def _constraint_of_row(processor: Any, row: int, layout: Layout) -> Processor:
    ask = processor._prefix_allowed_tokens_fn

    def judge(input_ids: Tensor, scores: Tensor) -> Tensor:
        mask = torch.full_like(scores, -math.inf)
        for index, ids in enumerate(input_ids):
            allowed = ask(row, ids)
            if len(allowed) == 0:
                raise ValueError(f"`prefix_allowed_tokens_fn` allows no token for row {row}")
            mask[index, allowed] = 0
        judged = scores + mask
        # As in transformers: where the allowed tokens are all impossible, the constraint wins.
        is_stuck = judged.amax(-1, keepdim=True).isneginf()
        return torch.where(is_stuck, mask, judged)

    return judge


#: Name -> the processor as it is for one row.
_BOUND: dict[str, Callable[[Any, int, Layout], Processor]] = {
    "EncoderNoRepeatNGramLogitsProcessor": _encoder_ngrams_of_row,
    "EncoderRepetitionPenaltyLogitsProcessor": _encoder_repetition_of_row,
    "PrefixConstrainedLogitsProcessor": _constraint_of_row,
    "RepetitionPenaltyLogitsProcessor": _repetition_of_row,
}
