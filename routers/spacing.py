"""Routers that space the target's blocks out, evenly or at random."""

from typing import Self

import torch

from mmspec.block_records import BlockPlace
from mmspec.checks import is_integer, is_number, require
from mmspec.noise import Salt, uniform
from mmspec.routers.fixed import PlaceRouter


class EveryRouter(PlaceRouter):
    """The target writes the blocks 0, n, 2n, ...; every other draft is kept."""

    def __init__(self, interval: int) -> None:
        """Takes the distance between two blocks of the target.

        Raises:
            ValueError: If it is no integer of at least 2.
        """
        is_good = is_integer(interval) and interval >= 2
        require(is_good, "the interval of router 'every'", "an integer >= 2", interval)
        self.name = f"every:{interval}"
        self._interval = interval

    @classmethod
    def from_argument(cls, argument: str | None) -> Self:
        """Builds the router from "n".

        Raises:
            ValueError: As the constructor.
        """
        text = argument or ""
        is_good = text.isdecimal()
        require(is_good, "the argument of router 'every'", "an integer >= 2, as every:3", argument)
        return cls(int(text))

    def wants_draft(self, place: BlockPlace) -> bool:
        """True between the target's blocks."""
        return place.index % self._interval > 0


class RandomRouter(PlaceRouter):
    """Drafts, and keeps, each block with one probability: the baseline that a router has to beat.

    The choice is a pure function of the video's seed and the block's place.
    """

    def __init__(self, rate: float) -> None:
        """Takes the share of blocks that are drafted.

        Raises:
            ValueError: If it is not in [0, 1].
        """
        is_good = is_number(rate) and 0 <= rate <= 1
        require(is_good, "the rate of router 'random'", "a number in [0, 1]", rate)
        self.name = f"random:{rate}"
        self._rate = rate

    @classmethod
    def from_argument(cls, argument: str | None) -> Self:
        """Builds the router from "rate".

        Raises:
            ValueError: As the constructor.
        """
        try:
            return cls(float(argument or ""))
        except ValueError as error:
            rule = "a number in [0, 1], as random:0.7"
            message = f"the argument of router 'random' must be {rule}, got {argument!r}"
            raise ValueError(message) from error

    def wants_draft(self, place: BlockPlace) -> bool:
        """True with the probability of the rate."""
        key, index = torch.tensor([place.seed]), torch.tensor([[place.index]])
        # The noise is inside (0, 1), so that the rates 0 and 1 are certain.
        return uniform(key, index, Salt.ROUTE).item() < self._rate
