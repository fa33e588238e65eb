"""How many units to draft now.

Schedules look at finished steps only. A schedule that peeked at the coming draft would bias the
rules that keep a law (docs/schedule.md).
"""

import logging
import statistics
from collections import defaultdict, deque
from collections.abc import Callable

from mmspec.records import Plan, StepRecord
from mmspec.tree import BUCKETS, bucket

logger = logging.getLogger("mmspec")


class FixedSchedule:
    """The same width in every step, clamped at the end of the rows."""

    def __init__(self, width: int, remaining: Callable[[], int]) -> None:
        """Fixes the width.

        Args:
            width: Nodes per row, the root included.
            remaining: Largest number of units that an active row may still get.

        Raises:
            ValueError: If ``width`` is below 1 or above the largest bucket.
        """
        if not 1 <= width <= BUCKETS[-1]:
            raise ValueError(f"window must be between 1 and {BUCKETS[-1]}, got {width}")
        self._width = width
        self._remaining = remaining

    def plan(self) -> Plan:
        """Returns the plan of the next step."""
        return Plan(width=_clamped(self._width, self._remaining()))

    def observe(self, record: StepRecord) -> None:
        """Learns nothing."""


def _clamped(width: int, remaining: int) -> int:
    """A width that reaches no further than the rows do, still one of few shapes."""
    return min(width, bucket(min(max(remaining, 1), BUCKETS[-1])))


class AdaptiveSchedule:
    """Drafts as much as pays: expected units per second from measured acceptance and cost.

    With conditional acceptance ``a_k`` at depth k, a step of width w brings
    ``1 + a_1 + a_1 a_2 + ...`` units and costs what steps of that width took lately; the width with
    the best ratio wins. If plain decoding wins, the drafter rests and is probed again at growing
    intervals, so a useless drafter costs a bounded share of the time.
    """

    #: Steps of one width whose median is its cost.
    MEMORY = 9
    #: Weight of old evidence, per drafted step.
    DECAY = 0.97
    #: Plain steps are timed again this often.
    PLAIN_EVERY = 64
    #: Drafted steps before the schedule may say that speculation does not pay.
    PATIENCE = 8

    def __init__(
        self, max_width: int, remaining: Callable[[], int], *, is_free: bool = False
    ) -> None:
        """Starts optimistic.

        Args:
            max_width: Largest width, a bucket.
            remaining: Largest number of units that an active row may still get.
            is_free: The drafter costs next to nothing and stays silent when it has no guess
                (retrieval), so plain steps happen by themselves and need not be forced.

        Raises:
            ValueError: If ``max_width`` is out of range.
        """
        if not 1 <= max_width <= BUCKETS[-1]:
            raise ValueError(f"width must be between 1 and {BUCKETS[-1]}, got {max_width}")
        self._widths = [b for b in BUCKETS if 1 < b <= bucket(max_width)]
        self._remaining = remaining
        self._is_free = is_free
        self._costs: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=self.MEMORY))
        self._tried = [2.0] * BUCKETS[-1]
        self._accepted = [1.2] * BUCKETS[-1]
        self._steps = 0
        self._drafted_steps = 0
        self._rest = 0
        self._next_rest = 4
        self._warned = False

    def plan(self) -> Plan:
        """Returns the plan of the next step."""
        self._steps += 1
        if not self._widths:
            return Plan(width=1)
        if self._rest > 0:
            self._rest -= 1
            return Plan(width=1)
        if not self._is_free and self._steps % self.PLAIN_EVERY == 2:
            return Plan(width=1)
        width = self._best_width()
        if width == 1:
            self._start_rest()
            width = self._widths[0] if self._is_free else 1
        else:
            self._next_rest = 4
        return Plan(width=_clamped(width, self._remaining()))

    def observe(self, record: StepRecord) -> None:
        """Learns the cost and the acceptance of a finished step."""
        self._costs[record.width].append(record.wall_time_s)
        if not any(record.num_drafted):
            return
        self._drafted_steps += 1
        for depth in range(max(record.num_levels)):
            pairs = [
                (accepted, levels)
                for accepted, levels, active in zip(
                    record.num_accepted, record.num_levels, record.was_active, strict=True
                )
                if active and levels > depth and accepted >= depth
            ]
            if not pairs:
                break
            self._tried[depth] = self._tried[depth] * self.DECAY + len(pairs)
            hits = sum(accepted > depth for accepted, _ in pairs)
            self._accepted[depth] = self._accepted[depth] * self.DECAY + hits

    def _best_width(self) -> int:
        plain = self._cost(1)
        if plain is None:
            return self._widths[min(2, len(self._widths) - 1)]
        rates = {1: 1.0 / plain}
        for width in self._widths:
            rates[width] = self._expected(width) / (self._cost(width) or plain)
        best = max(rates, key=lambda width: rates[width])
        if best == 1 and self._drafted_steps < self.PATIENCE:
            return self._widths[0]
        return best

    def _expected(self, width: int) -> float:
        """Units per step: one, and each draft times the chance that all before it survive."""
        total, survival = 1.0, 1.0
        for depth in range(width - 1):
            survival *= self._accepted[depth] / self._tried[depth]
            total += survival
        return total

    def _cost(self, width: int) -> float | None:
        """Median seconds of a step of this width; a guess from the nearest smaller one if new."""
        if self._costs[width]:
            return statistics.median(self._costs[width])
        known = [w for w in self._costs if w < width and self._costs[w]]
        if not known:
            return None
        nearest = max(known)
        return statistics.median(self._costs[nearest]) * (width / nearest) ** 0.2

    def _start_rest(self) -> None:
        self._rest = self._next_rest
        self._next_rest = min(self._next_rest * 2, 256)
        if self._warned or self._drafted_steps < 4 * self.PATIENCE:
            return
        self._warned = True
        plain, narrow = self._cost(1), self._cost(self._widths[0])
        logger.warning(
            "speculation does not pay here: first drafts are accepted %.0f %% of the time, a step "
            "of %d takes %.1f ms against %.1f ms plain; falling back to plain decoding",
            100 * self._accepted[0] / self._tried[0],
            self._widths[0],
            1e3 * (narrow or 0.0),
            1e3 * (plain or 0.0),
        )
