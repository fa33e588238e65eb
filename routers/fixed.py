"""Routers that decide by a block's place alone."""

import math
from typing import Self

from mmspec.block_records import BlockPlace, BlockView, Judgement
from mmspec.checks import require
from mmspec.records import Guarantee


class _ByPlace:
    """Takes no argument, needs no prompt, keeps every block that it wants drafted."""

    name: str
    needs_prompt = False
    guarantee = Guarantee.LOSSY

    @classmethod
    def from_argument(cls, argument: str | None) -> Self:
        """Builds the router from what follows its name.

        Raises:
            ValueError: If anything does.
        """
        require(argument is None, f"the argument of router {cls.name!r}", "left out", argument)
        return cls()

    def judge(self, block: BlockView) -> Judgement:
        """Keeps the block."""
        return Judgement(score=math.inf, keep=True)


class AlwaysRouter(_ByPlace):
    """Every block is drafted and kept: the drafter alone."""

    name = "always"

    def wants_draft(self, place: BlockPlace) -> bool:
        """True."""
        return True


class NeverRouter(_ByPlace):
    """No block is drafted: the target alone."""

    name = "never"
    guarantee = Guarantee.EXACT

    def wants_draft(self, place: BlockPlace) -> bool:
        """False."""
        return False


class FirstBlockRouter(_ByPlace):
    """The target writes the first block, and every other draft is kept."""

    name = "first-block"

    def wants_draft(self, place: BlockPlace) -> bool:
        """True behind the first block."""
        return place.index > 0
