"""Turns of a conversation: what a later call of a pipeline need not read again."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from mmspec.cache import SlotCache
from mmspec.checks import require
from mmspec.engine import Engine
from mmspec.pipelines.writing import WrittenOutput


@dataclass(slots=True)
class TurnCache:
    """Keys and values of finished calls, for the next turn of the same rows.

    There is one object for a whole conversation: each call that gets it keeps, per row, the
    longest beginning that its prompt shares with what is cached, and replaces the rest. So an
    earlier output's ``cache`` is always this one, and never claims more than is there.

    Attributes:
        model: The model that made it.
        slots: Its keys and values.
        tokens: The tokens they belong to, per row; in the place of an image's or a video's tokens
            stands the hash of its content.
    """

    model: nn.Module
    slots: SlotCache
    tokens: list[list[Hashable]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnOutput(WrittenOutput):
    """What a pipeline returns whose calls may be turns of a conversation.

    Attributes:
        cache: Pass it as ``cache=`` with the prompt that continues these rows; None where the
            model is an encoder-decoder, which begins every prompt anew.
    """

    cache: TurnCache | None


def check_cache(cache: Any, model: nn.Module, num_rows: int) -> None:
    """Refuses what is no cache of these rows.

    Raises:
        ValueError: If it is none, or another model's, or has another number of rows.
    """
    if cache is None:
        return
    require(isinstance(cache, TurnCache), "cache", "None or an earlier output's cache", cache)
    if cache.model is not model:
        raise ValueError("cache was made by another model than this pipeline's")
    if len(cache.tokens) != num_rows:
        raise ValueError(f"cache holds {len(cache.tokens)} rows, got {num_rows} prompts")


def num_shared(cache: TurnCache | None, prompts: Sequence[Sequence[Hashable]]) -> list[int]:
    """Tokens of each prompt that need not be read again; the last one always is."""
    if cache is None:
        return [0] * len(prompts)
    return [
        min(num_common(cached, prompt), len(prompt) - 1)
        for cached, prompt in zip(cache.tokens, prompts, strict=True)
    ]


def claimed(
    cache: TurnCache | None,
    model: nn.Module,
    engine: Engine,
    prompts: Sequence[Sequence[Hashable]],
    num_cached: Sequence[int],
) -> TurnCache:
    """The cache of a call, claiming only what stays valid if the call is broken off."""
    if cache is None:
        target: Any = engine.target
        cache = TurnCache(model, target.forward.cache, [])
    cache.tokens = [list(p[:count]) for p, count in zip(prompts, num_cached, strict=True)]
    return cache


def num_common(left: Sequence[Hashable], right: Sequence[Hashable]) -> int:
    """Length of the common beginning."""
    pairs = zip(left, right, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))
