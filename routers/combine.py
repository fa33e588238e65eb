"""Several routers at once: a block is kept where all of them keep it."""

from collections.abc import Sequence

from mmspec.block_records import BlockPlace, BlockRouter, BlockView, Judgement
from mmspec.checks import require
from mmspec.records import Guarantee
from mmspec.routers.fixed import PlaceRouter


class AllRouter:
    """Keeps what all of its routers keep, asked in order: put the cheap ones first.

    A block is drafted where all of them want it drafted. The first that does not keep it ends the
    questions. The score is that of the last one asked; routers that look at no block are not.
    """

    def __init__(self, routers: Sequence[BlockRouter]) -> None:
        """Combines routers.

        Raises:
            ValueError: If there are none, or one of several that look at the block has a running
                threshold: the history holds one score per block, which need not be its own.
        """
        require(len(routers) > 0, "the routers to combine", "one or more", routers)
        self._routers = tuple(routers)
        self._judges = [one for one in routers if not isinstance(one, PlaceRouter)]
        running = [one.name for one in self._judges if getattr(one, "reads_history", False)]
        if running and len(self._judges) > 1:
            rule = "alone among those that look at a block, for it reads earlier scores"
            require(False, f"router {running[0]!r}", rule, self.name)

    @property
    def name(self) -> str:
        """As a user types it."""
        return "+".join(one.name for one in self._routers)

    @property
    def guarantee(self) -> Guarantee:
        """`exact` if one of them never keeps anything."""
        is_exact = any(one.guarantee == Guarantee.EXACT for one in self._routers)
        return Guarantee.EXACT if is_exact else Guarantee.LOSSY

    @property
    def needs_prompt(self) -> bool:
        """True if one of them does."""
        return any(one.needs_prompt for one in self._routers)

    @property
    def needs_preview(self) -> bool:
        """True if one of them does."""
        return any(getattr(one, "needs_preview", False) for one in self._judges)

    @property
    def reads_history(self) -> bool:
        """True if one of them has a running threshold."""
        return any(getattr(one, "reads_history", False) for one in self._judges)

    def wants_draft(self, place: BlockPlace) -> bool:
        """True if all of them do."""
        return all(one.wants_draft(place) for one in self._routers)

    def judge(self, block: BlockView) -> Judgement:
        """Asks one after the other until one does not keep the block."""
        judgement = PlaceRouter().judge(block)
        for one in self._judges:
            judgement = one.judge(block)
            # A NaN is the one number that does not equal itself; it never keeps.
            if not judgement.keep or judgement.score != judgement.score:
                break
        return judgement
