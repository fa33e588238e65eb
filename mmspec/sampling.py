"""Logits to law, and the counter-based noise that makes a seed a contract.

A *law* is kept as logits: filtered entries are -inf and nothing is normalised before somebody needs
probabilities. The random choice of a row at an absolute position is ``argmax(law + g)`` where ``g``
is Gumbel noise and a pure function of (row key, position, token): it does not depend on the batch,
the window, the drafter or the step at which the position is reached.

Shape suffixes as in `mmspec.records`.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

NEG_INF = float("-inf")


class Salt:
    """Independent streams of noise under one row key."""

    CHOICE = 0
    ACCEPT = 1
    RESIDUAL = 2
    DRAFT = 3
    BLOCK = 4


# --------------------------------------------------------------------------- noise


def _signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >= 1 << (bits - 1) else value


_GOLDEN_64 = _signed(0x9E3779B97F4A7C15, 64)
_MIX_A_64 = _signed(0xBF58476D1CE4E5B9, 64)
_MIX_B_64 = _signed(0x94D049BB133111EB, 64)
_MIX_A_32 = _signed(0x7FEB352D, 32)
_MIX_B_32 = _signed(0x846CA68B, 32)
_GOLDEN_32 = _signed(0x9E3779B9, 32)


def _mix64(x: Tensor) -> Tensor:
    """The finalizer of splitmix64 (Steele et al. 2014); shifts are made logical by masking."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _MIX_A_64
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _MIX_B_64
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def row_keys(
    generator: torch.Generator | Sequence[torch.Generator] | None, num_rows: int
) -> Int[Tensor, "B"]:
    """Draws one 64-bit noise key per row.

    Args:
        generator: One generator for all rows (each row draws the next key from it), one per row,
            or None for torch's global generator. Row i of a list gives the tokens that a single
            call with that generator gives.
        num_rows: Rows.

    Returns:
        Keys, int64, on the CPU.

    Raises:
        ValueError: If the list's length is not ``num_rows``.
    """
    if isinstance(generator, Sequence):
        if len(generator) != num_rows:
            raise ValueError(
                f"generator must be one torch.Generator or one per row: got a list of "
                f"{len(generator)} for {num_rows} rows"
            )
        return torch.cat([row_keys(one, 1) for one in generator])
    # torch.randint wants a generator of the tensor's device, so keys are drawn where it lives.
    device = "cpu" if generator is None else generator.device
    bounds = (-(1 << 63), (1 << 63) - 1)
    keys = torch.randint(*bounds, (num_rows,), generator=generator, device=device)
    return keys.cpu()


def _position_hash(
    keys_B: Int[Tensor, "B"], positions_BN: Int[Tensor, "B N"], salt: int, step: Tensor | int
) -> Int[Tensor, "B N"]:
    """64 well-mixed bits for each (row key, position, salt, step)."""
    offset = _signed((salt + 1) * _GOLDEN_64 % (1 << 64), 64)
    # Host integers do not wrap by themselves.
    mixed = _signed(step * _MIX_B_64 % (1 << 64), 64) if isinstance(step, int) else step * _MIX_B_64
    stream_B = _mix64(keys_B + offset) + mixed
    return _mix64(_mix64(stream_B)[:, None] + positions_BN * _GOLDEN_64)


def _unit_interval(bits: Tensor) -> Tensor:
    """The low 31 of 32 bits to a float32 strictly inside (0, 1), exact for small values."""
    unit = bits.bitwise_and(0x7FFFFFFF).to(torch.float32).add_(0.5).mul_(2.0**-31)
    return unit.clamp_(max=1.0 - 2.0**-24)


def uniform(
    keys_B: Int[Tensor, "B"],
    positions_BN: Int[Tensor, "B N"],
    salt: int,
    step: Tensor | int = 0,
) -> Float[Tensor, "B N"]:
    """Counter-based uniforms in (0, 1), float32.

    Args:
        keys_B: Row keys of `row_keys`.
        positions_BN: Absolute positions.
        salt: One of `Salt`, so that different uses are independent.
        step: Mixed in where a position is tested again in later steps and wants fresh noise.
    """
    bits = _position_hash(keys_B, positions_BN, salt, step)
    return _unit_interval((bits >> 32).to(torch.int32))


def gumbel(
    keys_B: Int[Tensor, "B"],
    positions_BN: Int[Tensor, "B N"],
    vocab_size: int,
    salt: int = Salt.CHOICE,
    step: Tensor | int = 0,
) -> Float[Tensor, "B N V"]:
    """Counter-based standard Gumbel noise, float32.

    The winner of ``argmax(law + g)`` is decided by the large values of g, which are the small
    values of the exponential ``e = -log(1 - u)``; ``log1p`` keeps them exact to the last bit and
    u never reaches 0 or 1, so every value is finite (g lies in [-2.9, 22.2]).

    Args:
        keys_B: Row keys of `row_keys`.
        positions_BN: Absolute position whose token is to be chosen.
        vocab_size: V.
        salt: One of `Salt`.
        step: As in `uniform`.
    """
    bits = _position_hash(keys_B, positions_BN, salt, step)
    high = (bits >> 32).to(torch.int32)[..., None]
    low = bits.to(torch.int32)[..., None]
    tokens = torch.arange(vocab_size, device=bits.device, dtype=torch.int32) * _GOLDEN_32
    # lowbias32 (Wellons) with the second half of the key added between its two rounds.
    x = tokens + low
    x = x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(_MIX_A_32).add_(high)
    x = x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).mul_(_MIX_B_32)
    x = x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))
    return _unit_interval(x).neg_().log1p_().neg_().log_().neg_()


def sample(law_logits: Float[Tensor, "B N V"], noise: Tensor | None) -> Int[Tensor, "B N"]:
    """The seeded choice ``argmax(law + g)``; greedy where ``noise`` is None."""
    return (law_logits if noise is None else law_logits + noise).argmax(-1)


# --------------------------------------------------------------------------- laws


@dataclass(frozen=True, slots=True, kw_only=True)
class AllowedTokens:
    """Token masks by absolute position.

    Attributes:
        class_of_position_T: Mask class of every position up to T; later positions use class 0.
        masks_CV: Allowed tokens of each class, bool.
    """

    class_of_position_T: torch.Tensor
    masks_CV: torch.Tensor

    def __post_init__(self) -> None:
        """Checks that no class forbids everything."""
        if not bool(self.masks_CV.any(-1).all()):
            raise ValueError("every class of allowed tokens must allow at least one token")


@dataclass(frozen=True, slots=True, kw_only=True)
class LawConfig:
    """How logits become the law that tokens are drawn from. Same meaning as in transformers.

    Attributes:
        temperature: 0 is greedy.
        top_k: Keep the k most likely tokens (ties kept); None keeps all.
        top_p: Keep the smallest set with at least this mass, in (0, 1]; None keeps all.
        min_p: Drop tokens less likely than this share of the most likely, in [0, 1].
        repetition_penalty: > 1 discourages tokens already in the prompt or output.
        presence_penalty: Subtracted once from the logit of a token already in the output.
        bad_words: Token sequences that must not appear.
        allowed: Token masks by absolute position.
        min_new_tokens: No end-of-sequence before this many tokens.
        eos_token_ids: The ends that ``min_new_tokens`` holds back.
    """

    temperature: float | int = 1.0
    top_k: int | None = None
    top_p: float | int | None = None
    min_p: float | int | None = None
    repetition_penalty: float | int = 1.0
    presence_penalty: float | int = 0.0
    bad_words: tuple[tuple[int, ...], ...] = ()
    allowed: AllowedTokens | None = None
    min_new_tokens: int = 0
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Refuses values outside their range."""
        checks = (
            (
                _is_number(self.temperature) and 0 <= self.temperature < math.inf,
                "temperature",
                "a number >= 0",
            ),
            (
                self.top_k is None or (isinstance(self.top_k, int) and self.top_k >= 1),
                "top_k",
                "None or an integer >= 1",
            ),
            (self.top_p is None or 0 < self.top_p <= 1, "top_p", "None or in (0, 1]"),
            (self.min_p is None or 0 <= self.min_p <= 1, "min_p", "None or in [0, 1]"),
            (0 < self.repetition_penalty < math.inf, "repetition_penalty", "a number > 0"),
            (abs(self.presence_penalty) < math.inf, "presence_penalty", "a finite number"),
            (self.min_new_tokens >= 0, "min_new_tokens", ">= 0"),
            (
                all(self.bad_words) and all(t >= 0 for word in self.bad_words for t in word),
                "bad_words",
                "non-empty sequences of token ids",
            ),
            (all(token >= 0 for token in self.eos_token_ids), "eos_token_ids", "token ids"),
        )
        for good, name, rule in checks:
            if not good:
                raise ValueError(f"{name} must be {rule}, got {getattr(self, name)!r}")

    @property
    def is_greedy(self) -> bool:
        """True at temperature 0."""
        return self.temperature == 0


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


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
        stages.append(RepetitionPenalty(config.repetition_penalty))
    if config.presence_penalty != 0.0:
        stages.append(PresencePenalty(config.presence_penalty))
    if config.bad_words:
        stages.append(BadWords(config.bad_words))
    if config.min_new_tokens and config.eos_token_ids:
        stages.append(MinNewTokens(config.min_new_tokens, config.eos_token_ids))
    if config.allowed is not None:
        stages.append(Allowed(config.allowed))
    # At temperature 0 the warpers keep the argmax, so they are left out.
    if not config.is_greedy:
        stages += _warpers(config)
    return Law(stages=tuple(stages), is_greedy=config.is_greedy)


def _warpers(config: LawConfig) -> list[Stage]:
    stages: list[Stage] = []
    if config.temperature != 1.0:
        stages.append(Temperature(config.temperature))
    if config.top_k is not None:
        stages.append(TopK(config.top_k))
    if config.top_p is not None and config.top_p < 1.0:
        stages.append(TopP(config.top_p))
    if config.min_p:
        stages.append(MinP(config.min_p))
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
    """Token masks by absolute position of the token to be chosen."""

    table: AllowedTokens

    def __call__(self, logits: Tensor, context: LawContext) -> Tensor:
        """Applies the stage."""
        classes = self.table.class_of_position_T.to(logits.device)
        position = context.positions_BN + 1
        inside = position < classes.shape[0]
        index = classes[position.clamp(max=classes.shape[0] - 1)]
        mask = self.table.masks_CV.to(logits.device)[torch.where(inside, index, 0)]
        return logits.masked_fill(~mask, NEG_INF)


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


def with_defaults(config: LawConfig, **changes: object) -> LawConfig:
    """A copy of a config with some fields replaced, checked again."""
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]
