"""What steps of each width and number of rows cost, learnt from a clock that other things move too.

Attention looks back on ever more along a call, and other programs come and go: the same step takes
half as long again a second later. Seconds of two widths can therefore be compared only if what the
moment adds is told apart from what the width adds. A Kalman filter does both at once: its state is
the logarithm of the seconds of every kind of step and of the moment's factor, which wanders.
"""

import functools
import math

import numpy as np
from numpy.typing import NDArray

from mmspec.tree import BUCKETS

#: Numbers of rows are taken as equal within a factor of the root of 2.
_ROWS = tuple(2.0**power for power in range(8))


class CostBelief:
    """Expected logarithms of seconds and how sure they are; outlives a call.

    A kind of step is a number of rows and one of `BUCKETS`. Before any was measured, logarithms of
    seconds are thought to grow with the nodes fed like a sum of ``log(1 + nodes / scale)``; each
    kind of step deviates from that, and neighbours alike.
    """

    #: Scales of the nodes fed: where a step may begin to get dearer with more of them.
    SCALES = (1.0, 8.0, 64.0, 512.0)
    #: Expected growth with each scale and its standard deviation; all of them together make costs
    #: proportional to the nodes fed if they are a quarter each.
    GROWTH = 0.22
    GROWTH_SPREAD = 0.3
    #: Standard deviation of what is particular to a kind of step, and how far it reaches to others:
    #: a factor of ``exp(REACH)`` in widths, of its root in rows.
    PARTICULAR = 0.15
    REACH = 1.5
    #: Standard deviations of what the moment adds from step to step and from call to call, of what
    #: a step adds, of the same for the first step of a kind, and of what a kind of step gains or
    #: loses for good from call to call.
    DRIFT = 0.06
    CALL = 0.3
    NOISE = 0.08
    FIRST_NOISE = 0.15
    AGE = 0.02
    #: Standard deviations by which a step may be slower than expected; the rest is a disturbance.
    BOUND = 3.0

    def __init__(self) -> None:
        """Knows nothing."""
        self._kinds: set[int] = set()
        self._forget()

    def _forget(self) -> None:
        self._mean, self._covariance = (array.copy() for array in _prior())

    def begin_call(self) -> None:
        """Another moment, perhaps another load of the machine; what is known is older."""
        self._covariance[0, 0] += self.CALL**2
        self._covariance.flat[:: len(self._mean) + 1] += self.AGE**2

    def note(self, num_rows: int, width: int, seconds: float, num_steps: int = 1) -> None:
        """Steps of one kind were measured, one after another.

        Args:
            num_rows: Rows fed.
            width: One of `BUCKETS`.
            seconds: What such a step took.
            num_steps: How many there were.
        """
        cell = _cell(num_rows, width)
        is_first = cell not in self._kinds
        self._kinds.add(cell)
        self._covariance[0, 0] += num_steps * self.DRIFT**2
        shared = self._covariance[0] + self._covariance[cell]
        noise = self.FIRST_NOISE if is_first else self.NOISE
        variance = float(shared[0] + shared[cell]) + noise**2 / num_steps
        bound = self.BOUND * math.sqrt(variance)
        surprise = math.log(seconds) - float(self._mean[0] + self._mean[cell])
        if is_first and surprise > bound:
            return  # This one was a compilation.
        if surprise < -max(bound, 1.0):
            self._forget()  # What is known came from compilations.
            return
        gain = shared / variance
        self._mean += gain * min(surprise, bound)
        self._covariance -= gain[:, None] * shared

    def of(self, num_rows: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """What is known of steps with this many rows, for the widths of `BUCKETS`.

        Returns:
            Logarithms of seconds, shape ``(W,)``, and their covariance, shape ``(W, W)``. They hold
            for one and the same moment: differences between widths mean something, and no other.
        """
        first = _cell(num_rows, 1)
        cells = slice(first, first + len(BUCKETS))
        return self._mean[cells], self._covariance[cells, cells]


@functools.lru_cache(maxsize=1024)
def _cell(num_rows: int, width: int) -> int:
    """Place of a kind of step in the state; the moment has place 0."""
    group = min(round(math.log2(num_rows)), len(_ROWS) - 1)
    return 1 + group * len(BUCKETS) + BUCKETS.index(width)


@functools.lru_cache(maxsize=1)
def _prior() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and covariance of the state before anything was measured."""
    rows, widths = np.meshgrid(_ROWS, np.array(BUCKETS, dtype=float), indexing="ij")
    nodes = (rows * widths).reshape(-1, 1)
    growth = np.log1p(nodes / np.array(CostBelief.SCALES))
    places = np.stack([2 * np.log(rows).reshape(-1), np.log(widths).reshape(-1)], 1)
    distances = np.abs(places[:, None] - places).sum(-1)
    mean = np.zeros(len(nodes) + 1)
    mean[1:] = CostBelief.GROWTH * growth.sum(1)
    covariance = np.zeros((len(mean), len(mean)))
    covariance[1:, 1:] = CostBelief.GROWTH_SPREAD**2 * growth @ growth.T
    covariance[1:, 1:] += CostBelief.PARTICULAR**2 * np.exp(-distances / CostBelief.REACH)
    # Whether seconds are micro or kilo is for the moment to say: only ratios matter.
    covariance[0, 0] = 1e3
    return mean, covariance
