"""Figures of paired videos: means with intervals, and differences at equal time.

Every setup makes a video of the same prompts from the same noise. Prompts are drawn with
replacement, the same for all setups (a paired bootstrap, Efron and Tibshirani 1993, chapter 13),
so an interval of a difference holds what prompts contribute, and nothing of what they share.
"""

from collections.abc import Sequence
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
    """Qualities and seconds of setups (S) over prompts (N), with draws (R) of the prompts."""

    def __init__(
        self, names: Sequence[str], quality_SN: Any, seconds_SN: Any, *, seed: int = 0
    ) -> None:
        """Draws.

        Args:
            names: Of the setups.
            quality_SN: Of each video.
            seconds_SN: Of each video.
            seed: Of the draws.
        """
        self._index = {name: number for number, name in enumerate(names)}
        quality, seconds = np.asarray(quality_SN, float), np.asarray(seconds_SN, float)
        num_prompts = quality.shape[1]
        draws_RN = np.random.default_rng(seed).integers(num_prompts, size=(DRAWS, num_prompts))
        counts_RN = np.stack([np.bincount(row, minlength=num_prompts) for row in draws_RN])
        # The first column is the sample itself.
        weights_RN = np.concatenate([np.ones((1, num_prompts)), counts_RN]) / num_prompts
        self._quality_SR = quality @ weights_RN.T
        self._seconds_SR = seconds @ weights_RN.T

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
        """Mean quality less that of a baseline which takes the same time.

        The baseline has several setups; between two of them its quality is on the straight line,
        which tossing a coin between the two for each video attains.

        Args:
            name: A setup.
            baseline: Setups, two or more.

        Returns:
            None if the setup is faster than all of the baseline, or slower.
        """
        rows = [self._index[one] for one in baseline]
        own = self._index[name]
        at_R = self._seconds_SR[own]
        known_BR, quality_BR = self._seconds_SR[rows], self._quality_SR[rows]
        if not known_BR[:, 0].min() <= at_R[0] <= known_BR[:, 0].max():
            return None
        theirs = [
            interpolated(known, quality, at)
            for known, quality, at in zip(known_BR.T, quality_BR.T, at_R, strict=True)
        ]
        return _estimate(self._quality_SR[own] - np.array(theirs))


def interpolated(seconds: Array, quality: Array, at: float) -> float:
    """Quality at a time, on straight lines between points; beyond them that of the nearest."""
    order = np.argsort(seconds, kind="stable")
    return float(np.interp(at, seconds[order], quality[order]))


def _estimate(values_R: Array) -> Estimate:
    """Of the sample in front and the draws behind it."""
    low, high = np.percentile(values_R[1:], ENDS)
    return Estimate(float(values_R[0]), float(low), float(high))
