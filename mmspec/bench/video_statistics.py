"""Figures of paired videos: means with intervals, and differences at equal time or share.

Every setup makes a video of the same prompts from the same noise. Prompts are drawn with
replacement, the same for all setups (a paired bootstrap, Efron and Tibshirani 1993, chapter 13),
so an interval of a difference holds what prompts contribute, and nothing of what they share.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
#: Draws of the bootstrap, and the ends of a 95 % interval in percent.
DRAWS = 4000
ENDS = (2.5, 97.5)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def is_positive(self) -> bool:
        """True if the whole interval lies above zero."""
        return self.low > 0

    @property
    def is_negative(self) -> bool:
        """True if the whole interval lies below zero."""
        return self.high < 0

    def to_list(self) -> list[float]:
        """For JSON."""
        return [self.value, self.low, self.high]


class Paired:
    """Figures of setups (S) over prompts (N), with draws (R) of the prompts."""

    def __init__(
        self, names: Sequence[str], quality_SN: Any, seconds_SN: Any, kept_SN: Any, *, seed: int = 0
    ) -> None:
        """Draws.

        Args:
            names: Of the setups.
            quality_SN: Of each video.
            seconds_SN: Of each video.
            kept_SN: Share of the blocks of each video whose draft was kept.
            seed: Of the draws.
        """
        self._index = {name: number for number, name in enumerate(names)}
        num_prompts = len(quality_SN[0])
        draws_RN = np.random.default_rng(seed).integers(num_prompts, size=(DRAWS, num_prompts))
        counts_RN = np.stack([np.bincount(row, minlength=num_prompts) for row in draws_RN])
        # The first column is the sample itself.
        weights_RN = np.concatenate([np.ones((1, num_prompts)), counts_RN]) / num_prompts
        self._quality_SR, self._seconds_SR, self._kept_SR = (
            np.asarray(of_videos_SN, float) @ weights_RN.T
            for of_videos_SN in (quality_SN, seconds_SN, kept_SN)
        )

    def quality(self, name: str) -> Estimate:
        """Mean quality."""
        return _estimate(self._quality_SR[self._index[name]])

    def seconds(self, name: str) -> float:
        """Mean seconds."""
        return float(self._seconds_SR[self._index[name], 0])

    def difference(self, name: str, other: str) -> Estimate:
        """Mean quality less that of another setup."""
        ours, theirs = (self._quality_SR[self._index[one]] for one in (name, other))
        return _estimate(ours - theirs)

    def retained(self, name: str, other: str) -> Estimate | None:
        """Mean quality as a share of that of another setup; None if that has none."""
        ours, theirs = (self._quality_SR[self._index[one]] for one in (name, other))
        return _estimate(ours / theirs) if (theirs > 0).all() else None

    def at_equal_time(self, name: str, baseline: Sequence[str]) -> Estimate | None:
        """Mean quality less the best that a baseline reaches in no more time.

        The baseline has several setups; between two of them its quality is on the straight line,
        which tossing a coin between the two for each video attains. Where more time makes it
        worse, less time is taken: a slow setup has to beat the best of what is faster.

        Args:
            name: A setup.
            baseline: Setups, two or more.

        Returns:
            None if the setup is faster than all of the baseline.
        """
        rows, own = [self._index[one] for one in baseline], self._index[name]
        if self._seconds_SR[own, 0] < self._seconds_SR[rows, 0].min():
            return None
        return self._above(own, rows, self._seconds_SR, best_until)

    def at_equal_share(self, name: str, baseline: Sequence[str]) -> Estimate | None:
        """Mean quality less that of a baseline which keeps as many drafts: which ones matters.

        Args:
            name: A setup.
            baseline: Setups, two or more; between two of them as in `at_equal_time`.

        Returns:
            None if the setup keeps more than all of the baseline, or less.
        """
        rows, own = [self._index[one] for one in baseline], self._index[name]
        shares = self._kept_SR[rows, 0]
        if not shares.min() <= self._kept_SR[own, 0] <= shares.max():
            return None
        return self._above(own, rows, self._kept_SR, interpolated)

    def _above(
        self,
        own: int,
        rows: Sequence[int],
        place_SR: Array,
        quality_at: Callable[[Array, Array, float], float],
    ) -> Estimate:
        """Quality less that of a curve at one's own place, in every draw."""
        curves = zip(place_SR[rows].T, self._quality_SR[rows].T, place_SR[own], strict=True)
        return _estimate(self._quality_SR[own] - np.array([quality_at(*one) for one in curves]))


def interpolated(places: Array, quality: Array, at: float) -> float:
    """Quality at a place, on straight lines between points; beyond them that of the nearest."""
    order = np.argsort(places, kind="stable")
    return float(np.interp(at, places[order], quality[order]))


def best_until(seconds: Array, quality: Array, at: float) -> float:
    """The best quality on those lines at no more than a time."""
    there = interpolated(seconds, quality, at)
    return max(there, float(quality[seconds <= at].max(initial=there)))


def _estimate(values_R: Array) -> Estimate:
    """Of the sample in front and the draws behind it."""
    low, high = np.percentile(values_R[1:], ENDS)
    return Estimate(float(values_R[0]), float(low), float(high))
