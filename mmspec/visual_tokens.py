"""Which visual tokens of the prompts a drafter reads: the option, and the choice itself.

The target always reads all of them. What a drafter reads moves its guesses, never the output.
Scores, cells and indices of this file belong to the visual tokens of one row, in their order.
"""

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmspec.checks import require
from mmspec.forward import PromptExtras
from mmspec.rows import TokenRows

#: Share of the cache's visual tokens that a target drafts over where none is named.
DEFAULT_SHARE = 0.1
#: The most attended tokens are taken until they have this part of the attention; the rest of the
#: share is spread evenly (SpecVLM, arXiv:2508.16201, and its code).
ATTENDED_MASS = 0.4

_WITH_NUMBER = re.compile(r"(reuse\+)?(uniform|attention|pool|self):([0-9]*\.?[0-9]+)")
_RULE = (
    "'all', 'none', 'reuse', 'uniform:S', 'attention:S', 'pool:K', 'self' or 'self:S' with a share "
    "S above 0 and at most 1 and an integer K >= 2, with 'reuse+' before 'uniform', 'attention' "
    "or 'pool' if wanted"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class VisualTokens:
    """What a drafter is shown of the images in the prompts.

    Attributes:
        choice: "all", "none", "uniform", "attention", "pool" or "self".
        share: Largest share of a row's visual tokens that is kept, at least one of them.
        side: Side of the squares that "pool" takes the mean of, in visual tokens.
        reuse: The drafter is given the target's features; its own tower does not run.
        option: As the user wrote it.
    """

    choice: str = "none"
    share: float = 1.0
    side: int = 1
    reuse: bool = False
    option: str = field(default="none", compare=False)

    @classmethod
    def parse(cls, option: object) -> "VisualTokens":
        """Reads the option as users write it.

        Raises:
            ValueError: If it is none of the known ones, or a number is out of its range.
        """
        text = option if isinstance(option, str) else ""
        if text in ("all", "none", "reuse", "self"):
            share = DEFAULT_SHARE if text == "self" else 1.0
            choice = "all" if text == "reuse" else text
            return cls(choice=choice, share=share, reuse=text == "reuse", option=text)
        match = _WITH_NUMBER.fullmatch(text)
        reuse, choice, number = match.groups() if match else (None, "", "0")
        if choice == "pool":
            is_good = number.isdecimal() and int(number) >= 2
        else:
            is_good = 0 < float(number) <= 1 and not (choice == "self" and reuse)
        require(is_good, "visual_tokens", _RULE, option)
        of_choice = {"side": int(number)} if choice == "pool" else {"share": float(number)}
        return cls(choice=choice, reuse=bool(reuse), option=text, **of_choice)

    def __str__(self) -> str:
        """As the user wrote it."""
        return self.option

    def num_kept(self, count: int) -> int:
        """How many of some visual tokens are kept; none of none."""
        # The share is a decimal fraction: 10 % of 30 are 3, whatever floats make of it.
        return min(count, max(1, int(self.share * count + 1e-6)))


def places_of(rows: TokenRows, tokens: Collection[int]) -> list[list[int]]:
    """Where some tokens stand in each prompt."""
    wanted = frozenset(tokens)
    pairs = zip(rows.host_tokens, rows.prompt_lengths, strict=True)
    return [[i for i in range(n) if prompt[i] in wanted] for prompt, n in pairs]


def without(rows: TokenRows, left_out: Sequence[Collection[int]]) -> list[list[int]]:
    """What is left of each prompt without some of its indices; its last token always is."""
    pairs = zip(rows.prompt_lengths, map(frozenset, left_out), strict=True)
    return [[i for i in range(n) if i not in gone or i == n - 1] for n, gone in pairs]


def text_of(rows: TokenRows, placeholders: Collection[int]) -> PromptExtras:
    """The prompts' text, counted from 0: what any model with the target's tokens can read."""
    if not placeholders:
        return PromptExtras()
    return PromptExtras(kept=without(rows, places_of(rows, placeholders)))


def index_table(rows: TokenRows, kept: Sequence[Sequence[int]]) -> Tensor:
    """Where each token of a shortened row stands in the whole row, ``[R, T]``.

    Args:
        rows: The rows; what is written behind a prompt is kept.
        kept: Indices in each prompt that are kept. There may be several times as many as rows: R
            then counts all rows, and all of them again.
    """
    table = torch.full((len(kept), rows.capacity), rows.capacity - 1)
    for row, indices in enumerate(kept):
        length = rows.prompt_lengths[row % rows.num_rows]
        table[row, : len(indices)] = torch.as_tensor(indices)
        behind = torch.arange(length, rows.capacity)
        table[row, len(indices) : len(indices) + len(behind)] = behind
    return table.to(rows.tokens_BT.device)


def place_in_whole(
    rows: TokenRows, kept: Sequence[Sequence[int]], place: Callable[[Tensor], Tensor] | None
) -> Callable[[Tensor], Tensor]:
    """Positions of shortened rows: those that their tokens have in the whole rows.

    Args:
        rows: The rows.
        kept: Indices in each prompt that are kept.
        place: Positions of the whole rows, as in `mmspec.forward.SlotForward`.
    """
    table_BT = index_table(rows, kept)

    def shortened(slots_BN: Tensor) -> Tensor:
        index_BN = table_BT.gather(1, slots_BN.clamp(max=table_BT.shape[1] - 1))
        return index_BN if place is None else place(index_BN)

    return shortened


def text_behind(rows: TokenRows, places: Sequence[Sequence[int]]) -> list[int]:
    """Where the text behind the last image of each prompt begins; its last token if there is none.

    Args:
        rows: The rows.
        places: Where the visual tokens stand.
    """
    ends = [indices[-1] + 1 if indices else rows.capacity for indices in places]
    return [min(end, length - 1) for end, length in zip(ends, rows.prompt_lengths, strict=True)]


def evenly(count: int, kept: int) -> Tensor:
    """Indices of ``kept`` of ``count`` things, evenly spaced."""
    return (2 * torch.arange(kept) + 1) * count // max(2 * kept, 1)


def most_attended(scores: Tensor, kept: int) -> Tensor:
    """Indices of the fewest visual tokens with `ATTENDED_MASS` of the attention, filled up evenly.

    Args:
        scores: Attention to each of them, ``[n]``.
        kept: How many to return.
    """
    order = scores.argsort(descending=True, stable=True)
    mass = scores[order].cumsum(0)
    enough = int((mass < ATTENDED_MASS * mass[-1:]).sum()) + 1
    is_kept = torch.zeros(len(scores), dtype=torch.bool)
    is_kept[order[: min(enough, kept)].cpu()] = True
    rest = (~is_kept).nonzero()[:, 0]
    is_kept[rest[evenly(len(rest), kept - int(is_kept.sum()))]] = True
    return is_kept.nonzero()[:, 0]


def around_peak(scores_BV: Tensor, counts_B: Tensor, kept_B: Tensor, most_kept: int) -> Tensor:
    """Half of a choice by attention, half by what is read next.

    The most attended visual tokens, and those that follow the most attended one in reading order;
    behind the last comes the first.

    Args:
        scores_BV: Attention to the visual tokens of each row, padded behind.
        counts_B: How many visual tokens each row has.
        kept_B: How many to choose of each.
        most_kept: Most of these numbers.

    Returns:
        Their indices, ``[B, most_kept]``; what is behind a row's own number does not count.

    Example:
        Scores ``[0, 0, 5, 1, 0, 3]`` and 4 to keep: 2 and 5 are attended, 3 and 4 follow.
    """
    index_V = torch.arange(scores_BV.shape[1], device=scores_BV.device)
    is_there_BV = index_V < counts_B[:, None]
    order_BV = scores_BV.masked_fill(~is_there_BV, -1.0).argsort(
        dim=1, descending=True, stable=True
    )
    is_top_BV = order_BV.argsort(dim=1) < (kept_B[:, None] + 1) // 2
    num_behind_BV = (index_V - order_BV[:, :1]) % counts_B[:, None].clamp(min=1)
    first_BV = torch.where(is_top_BV, -1, num_behind_BV).masked_fill(~is_there_BV, len(index_V))
    return first_BV.argsort(dim=1, stable=True)[:, :most_kept]


def cells(grid: Tensor, side: int) -> Tensor:
    """The square that each visual token lies in, numbered in the order of their first tokens.

    Args:
        grid: Image, time, row and column of each visual token, ``[n, 4]``.
        side: Side of a square; those at a border may be cut.

    Returns:
        ``[n]``, from 0.
    """
    corner = torch.cat([grid[:, :2], grid[:, 2:] // side], dim=1)
    _, cell = corner.unique(dim=0, return_inverse=True)
    first = torch.full((int(cell.max()) + 1,), len(cell)).scatter_reduce_(
        0, cell, torch.arange(len(cell)), "amin"
    )
    return first.argsort().argsort()[cell]
