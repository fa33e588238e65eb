"""When to ask a drafter that retrieves, and what its drafts must bring.

Retrieval costs no forward, and it knows how good its drafts are. So it chooses the width of a step
itself, from the most that it may draft and a price for each width. The schedule decides whether it
is asked at all: looking for drafts takes the host's time, which for small models is as long as a
forward, so a plain step is one in which nobody looks.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence

from mmspec.records import Plan, StepRecord
from mmspec.schedule import Progress, StepCosts, clamped, widths_up_to

logger = logging.getLogger("mmspec")

#: Where the seconds of steps are booked whose drafter was asked and had nothing worth its price.
IN_VAIN = 0


class RetrievalSchedule:
    """Asks for drafts as long as they save time, and now and then while they do not.

    An asked step is compared with plain steps for as many units: what it saves, averaged over the
    latest such steps, says whether to ask again. Once it is a loss, asking is a probe, and probes
    are paid from a budget as in `mmspec.schedule.AdaptiveSchedule`.

    Each width has a price: the units that its longer forward would bring if it were plain
    steps. So no draft is verified that is not expected to be worth its forward, and every one that is.
    """

    #: Weight of the latest asked step in what asking saves, and the most plain steps one counts for.
    WEIGHT = 0.1
    MOST_SAVED = 8.0
    #: Plain steps are timed again this often, unless drafts bring this many units per step.
    PLAIN_EVERY = 64
    CLEAR_GAIN = 3.0
    #: Share of the time that probes may lose.
    PROBE_SHARE = 0.02
    #: Plain steps that probes may lose on top, and the share of a generation that these may be.
    GRACE = 4
    GRACE_SHARE = 0.03
    #: Steps before the schedule may say that drafts do not pay.
    PATIENCE = 48

    def __init__(
        self,
        max_width: int,
        remaining: Callable[[], int],
        *,
        costs: Mapping[int, Sequence[float]] | None = None,
    ) -> None:
        """Starts optimistic.

        Args:
            max_width: Largest width, a bucket.
            remaining: Largest number of units that an active row may still get.
            costs: Seconds of the steps of each width in an earlier generation of the same kind.

        Raises:
            ValueError: If ``max_width`` is out of range.
        """
        self._widths = widths_up_to(max_width)
        self._remaining = remaining
        self._costs = StepCosts(costs)
        self._progress = Progress()
        self._has_begun = False
        self._grace = 0.0
        self._steps = 0
        self._asked = 1
        self._last_plain = 0
        self._elapsed_s = 0.0
        self._saved = 0.0  # by an asked step, in plain steps
        self._lost = 0.0  # by probes, in plain steps
        self._warned = False

    @property
    def costs(self) -> Mapping[int, Sequence[float]]:
        """Seconds of the latest steps of each width."""
        return self._costs.seconds

    def plan(self) -> Plan:
        """Returns the plan of the next step."""
        if not self._has_begun:
            self._grace = min(self.GRACE, self.GRACE_SHARE * self._remaining())
            return Plan(width=1)
        self._steps += 1
        self._asked = 1
        plain = self._cost(1)
        # The first is plain: without it no draft has a price.
        if not self._widths or plain is None or not self._is_worth_asking(plain):
            return Plan(width=1)
        self._asked = clamped(self._widths[-1], self._remaining())
        return Plan(width=self._asked, prices=self._prices(plain))

    def observe(self, record: StepRecord) -> None:
        """Learns what the step cost and, if it was asked for, what it saved."""
        if not self._has_begun:
            self._has_begun = True
            return
        key = record.width if record.width > 1 or self._asked == 1 else IN_VAIN
        self._costs.add(key, record.wall_time_s)
        # A compilation is no measure of the speed: what is usual for the width counts.
        took = min(record.wall_time_s, self._cost(key) or math.inf)
        self._elapsed_s += took
        units, _ = self._progress.advance(record)
        plain = self._cost(1)
        if self._asked == 1:
            self._last_plain = self._steps
        elif plain is not None:
            saved = units - took / plain
            self._lost = max(self._lost - saved, 0.0)
            self._saved += self.WEIGHT * (min(saved, self.MOST_SAVED) - self._saved)

    def _is_worth_asking(self, plain: float) -> bool:
        if self._saved >= 0.0:
            wait = self.PLAIN_EVERY if len(self.costs[1]) > 1 else self.GRACE
            return self._saved > self.CLEAR_GAIN or self._steps - self._last_plain <= wait
        self._warn_once(plain)
        return self._lost * plain <= self._grace * plain + self.PROBE_SHARE * self._elapsed_s

    def _prices(self, plain: float) -> dict[int, float]:
        """Units in which plain steps would be as long as the wider forward of each width is longer."""
        least = self._cost(IN_VAIN) or plain
        return {w: max((self._cost(w) or plain) - least, 0.0) / plain for w in self._widths}

    def _cost(self, width: int) -> float | None:
        return self._costs.of(width, is_batch=self._progress.num_rows > 1)

    def _warn_once(self, plain: float) -> None:
        if self._warned or self._steps < self.PATIENCE:
            return
        self._warned = True
        logger.warning(
            "speculation does not pay here: a step with drafts loses %.1f plain ones of %.1f ms; "
            "falling back to plain decoding",
            -self._saved,
            1e3 * plain,
        )
