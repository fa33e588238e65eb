"""Constraints of `generate` that go by position, which a drafter can follow too.

Shape suffixes as in `mmspec.records`.
"""

from dataclasses import dataclass

from torch import Tensor

from mmspec.law_config import AllowedTokens
from mmspec.sampling import Allowed, LawContext


@dataclass(frozen=True, slots=True, kw_only=True)
class TokensByPosition:
    """A ``prefix_allowed_tokens_fn`` that looks at the number of new tokens and at nothing else.

    `generate` calls it like any other. `speculate` knows it: one mask for all drafts of a step in
    the place of one call for each, and the "jacobi" drafter guesses forced tokens right.

    Attributes:
        table: Allowed tokens, counted from the prompt's end (``since_prompt``), over the model's
            vocabulary.
        prompt_width: Columns of the ``input_ids`` that `generate` is called with.
    """

    table: AllowedTokens
    prompt_width: int

    def __post_init__(self) -> None:
        """Refuses a table of absolute positions: `generate` counts padding, rows do not."""
        if not self.table.since_prompt:
            raise ValueError("the table must count from the prompt's end (since_prompt=True)")

    def __call__(self, row: int, ids: Tensor) -> list[int]:
        """Allowed tokens behind the ids of a row, padding included."""
        classes = self.table.class_of_position_T
        index = len(ids) - self.prompt_width
        kind = int(classes[index]) if index < len(classes) else 0
        return self.table.masks_CV[kind].nonzero().flatten().tolist()


@dataclass(frozen=True, slots=True)
class Constrained(Allowed):
    """`TokensByPosition` as a stage."""

    def __call__(self, logits: Tensor, context: LawContext) -> Tensor:
        """As in transformers: where the allowed tokens are all impossible, they are free."""
        return self.restricted(logits, context.positions_BN + 1, context.prompt_lengths_B)
