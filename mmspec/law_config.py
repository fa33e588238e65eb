"""What a user may say about the law that tokens are drawn from, checked when it is made.

It stands apart from `mmspec.sampling` because its checks are for people: a wrong type is answered
with the rule and the value got, in the test run too, where the numeric files check annotations.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from mmspec.checks import is_integer, is_list, is_number, require


@dataclass(frozen=True, slots=True, kw_only=True)
class AllowedTokens:
    """Token masks by position: absolute, or counted from the end of each row's prompt.

    Attributes:
        class_of_position_T: Mask class of every position up to T; later positions use class 0.
        masks_CV: Allowed tokens of each class, bool.
        since_prompt: Position 0 is a row's first new token, wherever its prompt ends. For rows
            whose prompts differ in length.
    """

    class_of_position_T: torch.Tensor
    masks_CV: torch.Tensor
    since_prompt: bool = False

    def __post_init__(self) -> None:
        """Checks that no class forbids everything."""
        if not bool(self.masks_CV.any(-1).all()):
            raise ValueError("every class of allowed tokens must allow at least one token")


def _is_token(value: Any) -> bool:
    return is_integer(value) and value >= 0


def _is_share(value: Any) -> bool:
    return is_number(value) and 0 <= value <= 1


#: Field -> the rule in words, and whether a value keeps it.
_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "temperature": ("a number >= 0", lambda v: is_number(v) and v >= 0),
    "top_k": ("None or an integer >= 1", lambda v: v is None or (is_integer(v) and v >= 1)),
    "top_p": ("None or in (0, 1]", lambda v: v is None or (_is_share(v) and v > 0)),
    "min_p": ("None or in [0, 1]", lambda v: v is None or _is_share(v)),
    "repetition_penalty": ("a number > 0", lambda v: is_number(v) and v > 0),
    "presence_penalty": ("a finite number", is_number),
    "bad_words": (
        "non-empty sequences of token ids",
        lambda v: is_list(v, lambda word: is_list(word, _is_token) and bool(word)),
    ),
    "allowed": ("None or AllowedTokens", lambda v: v is None or isinstance(v, AllowedTokens)),
    "min_new_tokens": ("an integer >= 0", lambda v: is_integer(v) and v >= 0),
    "eos_token_ids": ("token ids", lambda v: is_list(v, _is_token)),
}


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

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    bad_words: tuple[tuple[int, ...], ...] = ()
    allowed: AllowedTokens | None = None
    min_new_tokens: int = 0
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Refuses values of another type or outside their range."""
        for name, (rule, is_good) in _RULES.items():
            value = getattr(self, name)
            require(is_good(value), name, rule, value)

    @property
    def is_greedy(self) -> bool:
        """True at temperature 0."""
        return self.temperature == 0
