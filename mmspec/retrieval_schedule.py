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

    An asked step is compared with plain steps for as many units. What asked steps lose is added up,
    and what they save is taken off, some of it as credit; past a bound the drafter rests, that is,
    steps are plain for a while. Then it is asked again, with less to lose and twice the rest behind
    it, as long as it does not pay.

    Each width has a price: a share of the units that plain steps would bring while its longer
    forward takes.

    A plain step right behind an asked one takes a quarter more than one of a run of them, which is
    what decoding without drafts consists of. So it is not timed; the step behind it is.
    """

    #: Times the median that a step counts at most: a pause or a compilation is no cost of a width.
    PAUSE = 1.5
    #: Share of that price; near break-even the seconds hardly change, while more units per forward
    #: come out.
    LENIENCE = 0.8
    #: Plain steps that asking may lose before the first rest, as a share of a generation and at
    #: most, and the share of these before any later rest.
    GRACE_SHARE = 0.03
    GRACE = 8
    LATER_GRACE = 0.25
    #: Plain steps that were saved before and may be lost on top.
    CREDIT = 24
    #: Plain steps of the first rest; each further one is twice as long.
    FIRST_REST = 32
    #: Plain steps are timed again this often, unless drafts bring this many units per step.
    PLAIN_EVERY = 64
    CLEAR_GAIN = 3.0
    #: A second plain step is timed after this many.
    SECOND_PLAIN = 4
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
        # Of what may be lost, in plain steps.
        self._bound = min(self.GRACE, self.GRACE_SHARE * remaining())
        self._lost = 0.0
        self._rest = self.FIRST_REST
        self._wakes_at = 0
        self._steps = 0
        self._asked = 1
        self._last_plain = 0
        self._follows_ask = False
        self._units_per_ask = 1.0
        self._warned = False

    @property
    def costs(self) -> Mapping[int, Sequence[float]]:
        """Seconds of the latest steps of each width."""
        return self._costs.seconds

    def plan(self) -> Plan:
        """Returns the plan of the next step."""
        if not self._has_begun:
            return Plan(width=1)
        self._steps += 1
        self._asked = 1
        plain = self._cost(1)
        # The first is plain: without it no draft has a price.
        if not self._widths or plain is None or self._is_plain_due():
            return Plan(width=1)
        self._asked = clamped(self._widths[-1], self._remaining())
        return Plan(width=self._asked, prices=self._prices(plain))

    def wake(self) -> None:
        """Asks again from the next step on: there is something new to draft from.

        It may lose what may be lost after a rest, for what was lost before is not its fault.
        """
        self._wakes_at = self._steps
        self._rest = self.FIRST_REST
        self._lost = min(self._lost, (1.0 - self.LATER_GRACE) * self._bound)

    def observe(self, record: StepRecord) -> None:
        """Learns what the step cost and, if it was asked for, what it saved."""
        if not self._has_begun:
            self._has_begun = True
            return
        key = record.width if record.width > 1 or self._asked == 1 else IN_VAIN
        is_timed = self._asked > 1 or not self._follows_ask or self._cost(1) is None
        self._follows_ask = self._asked > 1
        if is_timed:
            self._costs.add(key, record.wall_time_s)
        slowest, _ = self._progress.advance(record)
        # A batch ends with its slowest row, but steps get shorter whenever one ends.
        units = 0.5 * (slowest + sum(record.num_emitted) / max(sum(record.was_active), 1))
        plain = self._cost(1)
        if self._asked == 1:
            self._last_plain = self._steps if is_timed else self._last_plain
        elif plain is not None:
            # Dear steps count in full, or drafts that lose seem to break even; pauses do not.
            took = min(record.wall_time_s, self.PAUSE * (self._cost(key) or math.inf))
            self._units_per_ask += 0.1 * (units - self._units_per_ask)
            self._weigh(units - took / plain, plain)

    def _weigh(self, saved: float, plain: float) -> None:
        """Adds up what asking loses; past the bound it rests."""
        self._lost = max(self._lost - saved, -self.CREDIT)
        if self._lost <= 0.0:
            self._rest = self.FIRST_REST
        elif self._lost > self._bound:
            self._warn_once(plain)
            self._wakes_at = self._steps + self._rest
            self._rest *= 2
            self._lost *= 1.0 - self.LATER_GRACE

    def _is_plain_due(self) -> bool:
        if self._steps <= self._wakes_at:
            return True
        wait = self.PLAIN_EVERY if len(self.costs[1]) > 1 else self.SECOND_PLAIN
        is_slow = self._units_per_ask < self.CLEAR_GAIN
        return is_slow and self._steps - self._last_plain > wait

    def _prices(self, plain: float) -> dict[int, float]:
        """A share of the units that plain steps would bring in the time that each width adds."""
        least = self._cost(IN_VAIN) or plain
        share = self.LENIENCE / plain
        return {w: share * max((self._cost(w) or plain) - least, 0.0) for w in self._widths}

    def _cost(self, width: int) -> float | None:
        return self._costs.of(width, is_batch=self._progress.num_rows > 1)

    def _warn_once(self, plain: float) -> None:
        if self._warned or self._steps < self.PATIENCE:
            return
        self._warned = True
        logger.warning(
            "speculation does not pay here: drafts have lost the time of %.1f plain steps, %.1f ms "
            "each; falling back to plain decoding",
            self._lost,
            1e3 * plain,
        )
