"""From which score on a block is kept: a number, or a running quantile of the scores so far."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import ClassVar, Protocol

from mmspec.block_records import Judgement
from mmspec.checks import is_integer, is_number, require

History = Sequence[Judgement | None]


class Threshold(Protocol):
    """Says which score is enough.

    Attributes:
        reads_history: Whether it depends on the scores of earlier blocks. Then a score must be
            complete: a router may not stop at the first bad frame.
    """

    reads_history: ClassVar[bool]

    def at(self, history: History) -> float:
        """The lowest score that keeps the next block. Pure."""


@dataclass(frozen=True, slots=True)
class FixedThreshold:
    """The same for every block.

    Attributes:
        value: Infinite is allowed: nothing, or everything that can be judged, is kept.
    """

    reads_history: ClassVar[bool] = False
    value: float

    def __post_init__(self) -> None:
        """Refuses what is no number."""
        is_good = is_number(self.value) or self.value in (math.inf, -math.inf)
        require(is_good, "the threshold", "a number", self.value)

    def __str__(self) -> str:
        """As a user types it."""
        return repr(self.value)

    def at(self, history: History) -> float:
        """The value."""
        return self.value


@dataclass(frozen=True, slots=True)
class RunningQuantile:
    """Aims at a share of kept drafts: the quantile of the scores so far, with a prior.

    The prior is a normal law that stands for ``weight`` scores at its quantiles, so it counts
    fully before the first score and less with each. Scores are those of the same video only, which
    keeps a video independent of those made before it; a video has few blocks, so the prior counts.

    Attributes:
        accept_rate: Share of the drafted blocks to keep, in (0, 1].
        mean: Of the scores that are expected, as `mmspec.routers.calibration` measures it.
        std: Their standard deviation, above 0.
        weight: How many scores the prior stands for, at least 1.
    """

    reads_history: ClassVar[bool] = True
    accept_rate: float
    mean: float
    std: float
    weight: int = 5

    def __post_init__(self) -> None:
        """Refuses values out of their range."""
        check_rate(self.accept_rate)
        require(is_number(self.mean), "mean of the prior", "a finite number", self.mean)
        is_good = is_number(self.std) and self.std > 0
        require(is_good, "std of the prior", "a number > 0", self.std)
        is_good = is_integer(self.weight) and self.weight >= 1
        require(is_good, "weight of the prior", "an integer >= 1", self.weight)

    def __str__(self) -> str:
        """As a user types it."""
        prior = f"mean={self.mean},std={self.std},weight={self.weight}"
        return f"accept={self.accept_rate},{prior}"

    def at(self, history: History) -> float:
        """The score that the wanted share of prior and history reaches."""
        law = NormalDist(self.mean, self.std)
        scores = [law.inv_cdf((k + 0.5) / self.weight) for k in range(self.weight)]
        scores += [one.score for one in history if one is not None and math.isfinite(one.score)]
        return score_at_rate(scores, self.accept_rate)


def check_rate(rate: object) -> None:
    """Refuses what is no share of blocks to keep.

    Raises:
        ValueError: If it is not in (0, 1].
    """
    require(is_number(rate) and 0 < rate <= 1, "accept_rate", "a number in (0, 1]", rate)


def score_at_rate(scores: Sequence[float], accept_rate: float) -> float:
    """The highest of the scores that at least this share of them reaches.

    Args:
        scores: One or more; a NaN is one that no threshold reaches.
        accept_rate: In (0, 1].

    Raises:
        ValueError: If too few of them are numbers.
    """
    check_rate(accept_rate)
    # Rounding guards against 0.7 * 10 = 7.000000000000001.
    count = math.ceil(round(accept_rate * len(scores), 9))
    judged = sorted((one for one in scores if not math.isnan(one)), reverse=True)
    rule = f"numbers in {count} or more of {len(scores)} cases, for an accept rate of {accept_rate}"
    require(0 < count <= len(judged), "scores", rule, f"{len(judged)} numbers")
    return judged[count - 1]
