"""Logits to law.

A *law* is kept as logits: filtered entries are -inf and nothing is normalised before somebody needs
probabilities. The random choice of a row at an absolute position is ``argmax(law + g)`` where ``g``
is the noise of `mmspec.noise`.

Shape suffixes as in `mmspec.records`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmspec.law_config import AllowedTokens, LawConfig

NEG_INF = float("-inf")


def sample(law_logits: Float[Tensor, "B N V"], noise: Tensor | None) -> Int[Tensor, "B N"]:
    """The seeded choice ``argmax(law + g)``; greedy where ``noise`` is None."""
    # The same index as argmax (the first of equals), 2.7 times as fast on a CPU.
    return (law_logits if noise is None else law_logits + noise).max(-1).indices


# --------------------------------------------------------------------------- laws


@dataclass(frozen=True, slots=True, kw_only=True)
class LawContext:
    """What a law may look at besides the logits: the path to each node.

    Attributes:
        tokens_BN: Node tokens.
        ancestors_BNN: ``[b, i, j]``: j is i or an ancestor of i.
        depth_BN: Distance of a node from the root.
        positions_BN: Absolute position of each node.
        history_BT: Committed tokens of each row (the root is the last).
        lengths_B: How many of them count.
        prompt_lengths_B: How many of those were the prompt.
    """

    tokens_BN: torch.Tensor
    ancestors_BNN: torch.Tensor
    depth_BN: torch.Tensor
    positions_BN: torch.Tensor
    history_BT: torch.Tensor
    lengths_B: torch.Tensor
    prompt_lengths_B: torch.Tensor


Stage = Callable[[Tensor, LawContext], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Law:
    """An ordered list of stages; calling it turns logits into law logits.

    Attributes:
        stages: Applied in order.
        is_greedy: The choice is the plain argmax.
    """

    stages: tuple[Stage, ...]
    is_greedy: bool

    @property
    def allowed(self) -> "Allowed | None":
        """The stage of tokens by position, if there is one."""
        return next((stage for stage in self.stages if isinstance(stage, Allowed)), None)

    def __call__(
        self, logits_BNV: Float[Tensor, "B N V"], context: LawContext
    ) -> Float[Tensor, "B N V"]:
        """Returns the law logits; the input is not changed."""
        for stage in self.stages:
            logits_BNV = stage(logits_BNV, context)
        return logits_BNV


def build_law(config: LawConfig) -> Law:
    """Makes the law of a config, in the order transformers applies the same filters."""
    stages: list[Stage] = []
    if config.repetition_penalty != 1.0:
        stages.append(RepetitionPenalty(float(config.repetition_penalty)))
    if config.presence_penalty != 0.0:
        stages.append(PresencePenalty(float(config.presence_penalty)))
    if config.bad_words:
        stages.append(BadWords(tuple(map(tuple, config.bad_words))))
    if config.min_new_tokens and config.eos_token_ids:
        stages.append(MinNewTokens(config.min_new_tokens, tuple(config.eos_token_ids)))
    if config.allowed is not None:
        stages.append(Allowed(config.allowed))
    # At temperature 0 the warpers keep the argmax, so they are left out.
    if not config.is_greedy:
        stages += _warpers(config)
    return Law(stages=tuple(stages), is_greedy=config.is_greedy)


def _warpers(config: LawConfig) -> list[Stage]:
    stages: list[Stage] = []
    if config.temperature != 1.0:
        stages.append(Temperature(float(config.temperature)))
    if config.top_k is not None:
        stages.append(TopK(config.top_k))
    if config.top_p is not None and config.top_p < 1.0:
        stages.append(TopP(float(config.top_p)))
    if config.min_p:
        stages.append(MinP(float(config.min_p)))
    return stages


@dataclass(frozen=True, slots=True)
class Temperature:
    """Divides the logits."""

    value: float

    def __call__(self, logits: Tensor, context: LawContext) -> Tensor:
        """Applies the stage."""
        return logits / self.value


@dataclass(frozen=True, slots=True)
class TopK:
    """Keeps the k largest logits, ties included."""

    k: int

    def __call__(self, logits: Tensor, context: LawContext) -> Tensor:
        """Applies the stage."""
        kth = logits.topk(min(self.k, logits.shape[-1])).values[..., -1:]
        return logits.masked_fill(logits < kth, NEG_INF)


@dataclass(frozen=True, slots=True)
class TopP:
    """Nucleus filter (Holtzman et al. 2020): the smallest set with at least ``p`` of the mass."""

    p: float

    def __call__(self, logits: Tensor, context: LawContext) -> Tensor:
        """Applies the stage."""
        ordered, order = logits.sort(descending=False)
        removed = ordered.softmax(-1).cumsum(-1) <= 1 - self.p
        removed[..., -1:] = False
        return logits.masked_fill(removed.scatter(-1, order, removed), NEG_INF)


@dataclass(frozen=True, slots=True)
class MinP:
    """Drops tokens less likely than a share of the most likely one."""

    p: float

    def __call__(self, logits: Tensor, context: LawContext) -> Tensor:
        """Applies the stage."""
        floor = logits.amax(-1, keepdim=True) + math.log(self.p)
        return logits.masked_fill(logits < floor, NEG_INF)


@dataclass(frozen=True, slots=True)
class RepetitionPenalty:
    """CTRL's penalty (Keskar et al. 2019) over prompt and output, drafted path included."""

    value: float

    def __call__(self, logits: Tensor, context: LawContext) -> Tensor:
        """Applies the stage."""
        seen = seen_tokens(context, logits.shape[-1], since_prompt=False)
        penalised = torch.where(logits < 0, logits * self.value, logits / self.value)
        return torch.where(seen, penalised, logits)


@dataclass(frozen=True, slots=True)
class PresencePenalty:
    """Subtracts a constant from tokens that the output already holds."""

    value: float

    def __call__(self, logits: Tensor, context: LawContext) -> Tensor:
        """Applies the stage."""
        seen = seen_tokens(context, logits.shape[-1], since_prompt=True)
        return torch.where(seen, logits - self.value, logits)


@dataclass(frozen=True, slots=True)
class BadWords:
    """Forbids the last token of a banned sequence where the path already holds the rest."""

    words: tuple[tuple[int, ...], ...]

    def __call__(self, logits: Tensor, context: LawContext) -> Tensor:
        """Applies the stage."""
        tail = path_tail(context, max(map(len, self.words)) - 1)
        banned = torch.zeros_like(logits, dtype=torch.bool)
        for word in self.words:
            prefix = torch.tensor(word[:-1], device=logits.device, dtype=tail.dtype)
            hit = (tail[..., tail.shape[-1] - len(prefix) :] == prefix).all(-1)
            banned[..., word[-1]] |= hit
        return logits.masked_fill(banned, NEG_INF)


@dataclass(frozen=True, slots=True)
class MinNewTokens:
    """Holds the end of sequence back until a row has enough new tokens."""

    count: int
    eos_token_ids: tuple[int, ...]

    def __call__(self, logits: Tensor, context: LawContext) -> Tensor:
        """Applies the stage."""
        num_new = context.positions_BN + 1 - context.prompt_lengths_B[:, None]
        early = (num_new < self.count)[..., None]
        is_end = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
        is_end[list(self.eos_token_ids)] = True
        return logits.masked_fill(early & is_end, NEG_INF)


@dataclass(frozen=True, slots=True)
class Allowed:
    """Token masks by the position of the token to be chosen."""

    table: AllowedTokens

    def __call__(self, logits: Tensor, context: LawContext) -> Tensor:
        """Applies the stage."""
        mask = self.mask(context.positions_BN + 1, context.prompt_lengths_B)
        return logits.masked_fill(~mask, NEG_INF)

    def mask(
        self, positions_BN: Int[Tensor, "B N"], prompt_lengths_B: Int[Tensor, "B"]
    ) -> Bool[Tensor, "B N V"]:
        """Which tokens may stand at these absolute positions."""
        return self.table.masks_CV.to(positions_BN.device)[
            self._class(positions_BN, prompt_lengths_B)
        ]

    def is_forced(
        self, positions_BN: Int[Tensor, "B N"], prompt_lengths_B: Int[Tensor, "B"]
    ) -> Bool[Tensor, "B N"]:
        """At which of these absolute positions only one token may stand."""
        is_forced_C = self.table.masks_CV.sum(-1) == 1
        index = self._class(positions_BN, prompt_lengths_B)
        return is_forced_C.to(positions_BN.device)[index]

    def _class(
        self, positions_BN: Int[Tensor, "B N"], prompt_lengths_B: Int[Tensor, "B"]
    ) -> Int[Tensor, "B N"]:
        """Row of the masks for each position; past the table that of class 0."""
        classes = self.table.class_of_position_T.to(positions_BN.device)
        index = positions_BN
        if self.table.since_prompt:
            index = positions_BN - prompt_lengths_B[:, None]
        inside = index < classes.shape[0]
        return torch.where(inside, classes[index.clamp(0, classes.shape[0] - 1)], 0)

    def restricted(
        self,
        law_logits: Float[Tensor, "B N V"],
        positions_BN: Int[Tensor, "B N"],
        prompt_lengths_B: Int[Tensor, "B"],
    ) -> Float[Tensor, "B N V"]:
        """Laws of other positions as laws of these; uniform where nothing of them may stand.

        At a position that allows one token this is the one-hot law of that token.
        """
        mask = self.mask(positions_BN, prompt_lengths_B)
        masked = law_logits.masked_fill(~mask, NEG_INF)
        is_empty = masked.amax(-1, keepdim=True) == NEG_INF
        return torch.where(is_empty & mask, 0.0, masked)


# --------------------------------------------------------------------------- paths


def seen_tokens(
    context: LawContext, vocab_size: int, *, since_prompt: bool
) -> Bool[Tensor, "B N V"]:
    """Which tokens the path to each node already holds (its own token included)."""
    num_rows, num_nodes = context.tokens_BN.shape
    history_BT = context.history_BT
    slot = torch.arange(history_BT.shape[1], device=history_BT.device)
    # An image row may have a text prompt, whose tokens are not of the target's vocabulary.
    counted = (slot < context.lengths_B[:, None]) & (history_BT >= 0) & (history_BT < vocab_size)
    if since_prompt:
        counted &= slot >= context.prompt_lengths_B[:, None]
    # One column past the vocabulary swallows everything that must not count.
    spill = torch.full_like(history_BT, vocab_size)
    seen_BV = torch.zeros(num_rows, vocab_size + 1, dtype=torch.bool, device=history_BT.device)
    seen_BV.scatter_(1, torch.where(counted, history_BT, spill), True)
    seen_BNV = seen_BV[:, None].repeat(1, num_nodes, 1)
    # The root is committed already, so its own column adds nothing where it may not count.
    drafted = context.ancestors_BNN & (context.depth_BN > 0)[:, None, :]
    path = context.tokens_BN[:, None, :].expand(-1, num_nodes, -1)
    seen_BNV.scatter_(2, torch.where(drafted, path, torch.full_like(path, vocab_size)), True)
    return seen_BNV[..., :vocab_size]


def path_tail(context: LawContext, count: int) -> Int[Tensor, "B N L"]:
    """The last ``count`` tokens on the path to each node, the node's own token last.

    Example:
        Committed ``[5, 6, 7]`` and a chain of drafts ``[8, 9]``: with ``count=3`` the node of 9
        has the tail ``[7, 8, 9]`` and the root has ``[5, 6, 7]``. Positions before the start of
        the row hold -1.
    """
    back = torch.arange(count - 1, -1, -1, device=context.tokens_BN.device)
    wanted_depth = context.depth_BN[..., None] - back
    # [B, N, L, N]: the ancestor of n at the wanted depth; depths below 0 lie in the history.
    is_it = context.ancestors_BNN[:, :, None, :] & (
        context.depth_BN[:, None, None, :] == wanted_depth[..., None]
    )
    drafted = (is_it * context.tokens_BN[:, None, None, :]).sum(-1)
    index = context.lengths_B[:, None, None] - 1 + wanted_depth
    flat = index.clamp(0, context.history_BT.shape[1] - 1).flatten(1)
    committed = context.history_BT.gather(1, flat).view_as(index)
    committed = torch.where(index >= 0, committed, -1)
    return torch.where(wanted_depth >= 0, drafted, committed)
