"""Routers that decide by a block's place alone."""

import math
from typing import Self

from mmspec.block_records import BlockPlace, BlockView, Judgement
from mmspec.checks import require
from mmspec.records import Guarantee


class PlaceRouter:
    """Looks at no block: it keeps every one that it wants drafted. Needs no prompt."""

    needs_prompt = False
    guarantee = Guarantee.LOSSY

    def judge(self, block: BlockView) -> Judgement:
        """Keeps the block."""
        return Judgement(score=math.inf, keep=True)


class _Plain(PlaceRouter):
    """Takes no argument."""

    name: str

    @classmethod
    def from_argument(cls, argument: str | None) -> Self:
        """Builds the router from what follows its name.

        Raises:
            ValueError: If anything does.
        """
        require(argument is None, f"the argument of router {cls.name!r}", "left out", argument)
        return cls()


class AlwaysRouter(_Plain):
    """Every block is drafted and kept: the drafter alone."""

    name = "always"

    def wants_draft(self, place: BlockPlace) -> bool:
        """True."""
        return True


class NeverRouter(_Plain):
    """No block is drafted: the target alone."""

    name = "never"
    guarantee = Guarantee.EXACT

    def wants_draft(self, place: BlockPlace) -> bool:
        """False."""
        return False


class FirstBlockRouter(_Plain):
    """The target writes the first block, and every other draft is kept."""

    name = "first-block"

    def wants_draft(self, place: BlockPlace) -> bool:
        """True behind the first block."""
        return place.index > 0
