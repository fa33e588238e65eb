"""How wide a Jacobi window should be: chosen while running, from what widths brought and cost.

`AdaptiveSchedule` asks how deep a draft survives. That question has no answer for a window: a guess
is right only after it has been in the window for some forwards, so what a wide window accepts says
nothing about the first positions of a narrow one, and the other way round. Here a curve with one
unknown says what a window of any width brings once it has settled (docs/schedule.md).
"""

import math
import statistics
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from mmspec.records import Plan, StepRecord
from mmspec.rows import TokenRows
from mmspec.schedule import clamped
from mmspec.tree import BUCKETS


def settled_units(width: int, endless: float) -> float:
    """Units per step of a window that has settled.

    Args:
        width: Of the window; 1 brings one unit.
        endless: Units per step of a window without end, which is how deep dependencies between
            neighbours reach; 1 where no guess is ever right.
    """
    reach, bend = width**WindowMemory.POWER, WindowMemory.BEND
    share = reach**-bend
    return float((share + (1 - share) * endless**-bend) ** (-1 / bend))


class WindowMemory:
    """What windows brought and cost; outlives a call.

    Attributes:
        costs: Seconds of the latest steps, by rows fed and width.
        trials: Row-steps by width, old ones discounted.
        units_of: Units of these row-steps.
    """

    #: Growth of the units with the width where nothing limits them, and how sharply the curve
    #: bends to its limit.
    POWER = 0.55
    BEND = 3.0
    #: Steps of one width whose median is its cost, and how many of them a new call takes over.
    KEPT = 9
    CARRIED = 3
    #: Units of an endless window before any evidence, and the row-steps that this guess counts.
    PRIOR_ENDLESS = 8.0
    PRIOR_TRIALS = 8.0
    #: Row-steps of a width after which half of its deviation from the curve is believed.
    TRUST_TRIALS = 200.0
    #: Row-steps remembered at most.
    SPAN = 1000.0
    #: Units of an endless window that are considered.
    ENDLESS = tuple(1.2**step for step in range(28))

    def __init__(self) -> None:
        """Knows nothing."""
        self.costs: dict[tuple[int, int], deque[float]] = defaultdict(
            lambda: deque(maxlen=self.KEPT)
        )
        self.trials: dict[int, float] = defaultdict(float)
        self.units_of: dict[int, float] = defaultdict(float)

    def begin_call(self) -> None:
        """Old evidence counts less, so that an unlucky finding is tried again."""
        for cell, samples in self.costs.items():
            self.costs[cell] = deque(list(samples)[-self.CARRIED :], self.KEPT)
        self._discount(0.7)

    def count(self, width: int, num_rows: int, num_units: int) -> None:
        """A step of a settled window."""
        self._discount(max(1 - num_rows / self.SPAN, 0.0))
        self.trials[width] += num_rows
        self.units_of[width] += num_units

    def _discount(self, keep: float) -> None:
        for width in self.trials:
            self.trials[width] *= keep
            self.units_of[width] *= keep

    def endless(self) -> float:
        """Units per row and step of a window without end, as far as is known."""
        seen = [(w, n, math.log(self.units_of[w] / n)) for w, n in self.trials.items() if n > 0.5]
        prior = math.log(self.PRIOR_ENDLESS)

        def misfit(endless: float) -> float:
            far = self.PRIOR_TRIALS * (math.log(endless) - prior) ** 2
            return far + sum(n * (u - math.log(settled_units(w, endless))) ** 2 for w, n, u in seen)

        return min(self.ENDLESS, key=misfit)

    def units(self, width: int, endless: float) -> float:
        """Units per row and step of a settled window, by the curve and by what was counted."""
        curve, trials = settled_units(width, endless), self.trials[width]
        if trials <= 0.5:
            return curve
        trust = trials / (trials + self.TRUST_TRIALS)
        return float(curve ** (1 - trust) * (self.units_of[width] / trials) ** trust)

    def slope(self) -> float:
        """Seconds that a node more takes."""
        return _line(self._nodes())[1] if self.costs else 0.0

    def _nodes(self) -> list[tuple[int, float]]:
        """Nodes fed and seconds of each cell."""
        return [
            (rows * width, statistics.median_low(samples))
            for (rows, width), samples in self.costs.items()
            if samples
        ]

    def cost(self, num_rows: int, width: int) -> float | None:
        """Seconds of a step: as measured, else from a line through what was measured.

        The first step of a width may hold a compilation; of two the faster counts, and the line
        may lower a single one.
        """
        samples = self.costs.get((num_rows, width), ())
        if len(samples) > 1:
            return statistics.median_low(samples)
        guess = self._guessed(num_rows, width)
        return min([*samples, *([] if guess is None else [guess])], default=None)

    def _guessed(self, num_rows: int, width: int) -> float | None:
        """A line over the nodes fed, moved so that it meets the nearest measured cell."""
        cells = {
            cell: statistics.median_low(samples)
            for cell, samples in self.costs.items()
            if cell != (num_rows, width) and samples
        }
        if not cells:
            return None
        base, slope = _line([(rows * width, seconds) for (rows, width), seconds in cells.items()])
        nodes = num_rows * width

        def distance(cell: tuple[int, int]) -> float:
            other_rows, other_width = cell
            return abs(math.log(other_width / width)) + 2 * abs(math.log(other_rows / num_rows))

        nearest = min(cells, key=distance)
        at_nearest = base + slope * nearest[0] * nearest[1]
        return cells[nearest] * (base + slope * nodes) / at_nearest


def _line(points: list[tuple[int, float]]) -> tuple[float, float]:
    """Base and slope, neither below 0, with the least relative squares."""
    # Weights 1 / seconds**2: ten percent matter as much in a narrow step as in a wide one.
    one = sum(1 / s**2 for _, s in points)
    x = sum(n / s**2 for n, s in points)
    xx = sum(n * n / s**2 for n, s in points)
    y = sum(1 / s for _, s in points)
    xy = sum(n / s for n, s in points)
    spread = one * xx - x * x
    slope = (one * xy - x * y) / spread if spread > 1e-9 * one * xx else 0.0
    if slope <= 0:
        return y / one, 0.0
    base = (y - slope * x) / one
    return (base, slope) if base > 0 else (0.0, xy / xx)


class WindowSchedule:
    """Takes the width with which the rows are expected to be finished first.

    A batch takes as many steps as its slowest row, and a slow row gains less from a wide window
    than the mean. So what is compared is not units per second but the seconds that are left: rows
    end one after the other, and steps get cheaper as they do.
    """

    #: The present width must take this much longer than the best one to be left.
    MARGIN = 1.03
    #: Widths of the first steps where nothing is known of the costs. Two of each, for the first
    #: of a width may hold a compilation. Plain ones come second: the first window accepts guesses
    #: that are right from the start, the next ones hardly any, however wide they are.
    PROBES = (8, 1, 1, 8, 32, 32)
    #: A wider window is not probed where the widest one so far costs more plain steps than this.
    DEAR = 2.5
    #: Largest width over the largest one whose cost was measured: a line is no proof.
    STRIDE = 2
    #: Steps at the beginning of a row, and after a change of width, that say nothing about what a
    #: settled window brings; and what a step brings a row at its beginning, at most.
    BEGINNING = 14
    BEGINNING_UNITS = 2.5
    SETTLING = 4
    #: Spread of the rows: of the logarithm of what an endless window brings them.
    SPREAD = 0.25
    #: Steps from one choice to the next while as many rows go on.
    PERIOD = 4

    def __init__(
        self,
        max_width: int,
        remaining: Callable[[], Sequence[int]],
        waiting: Callable[[], Sequence[int]] = tuple,
        memory: WindowMemory | None = None,
    ) -> None:
        """Starts from a guess or from what earlier calls found.

        Args:
            max_width: Largest width.
            remaining: Units that each row may still get; 0 where it has ended.
            waiting: Units of each row that waits for a place.
            memory: Kept by the caller from call to call.

        Raises:
            ValueError: If ``max_width`` is out of range.
        """
        if not 1 <= max_width <= BUCKETS[-1]:
            raise ValueError(f"width must be between 1 and {BUCKETS[-1]}, got {max_width}")
        self.memory = memory or WindowMemory()
        self.memory.begin_call()
        self._widths = [b for b in BUCKETS if b < max_width] + [max_width]
        self._remaining = remaining
        self._waiting = waiting
        self._probes = [] if self.memory.costs else list(self.PROBES)
        self._has_begun = False
        self._width = 0
        self._steps = 0
        self._last_change = 0
        self._left: list[int] = []
        self._ages: list[int] = []
        self._choice = (0, 0)

    def plan(self) -> Plan:
        """Returns the plan of the next step; the first is plain, for the prefill answers it."""
        self._look()
        if not self._has_begun:
            return Plan(width=1)
        self._steps += 1
        width = self._chosen_width()
        if width != self._width:
            self._width, self._last_change = width, self._steps
        return Plan(width=clamped(width, max(self._left)))

    def observe(self, record: StepRecord) -> None:
        """Learns the cost and the acceptance of a finished step."""
        if not self._has_begun:
            self._has_begun = True
            return
        num_rows = sum(record.was_active)
        self.memory.costs[num_rows, record.width].append(record.wall_time_s)
        if record.width != self._width or self._steps <= self._last_change + self.SETTLING:
            return
        rows = zip(record.was_active, self._ages, record.num_emitted, strict=True)
        units = [new for is_on, age, new in rows if is_on and age > self.BEGINNING]
        if units:
            self.memory.count(record.width, len(units), sum(units))

    def _look(self) -> None:
        """Counts the steps of each row; one that has more left than before has begun anew."""
        left = list(self._remaining())
        rows = zip(left, self._left or left, self._ages or [-1] * len(left), strict=True)
        self._ages = [0 if now > then else age + 1 for now, then, age in rows]
        self._left = left

    def _chosen_width(self) -> int:
        num_rows = max(sum(left > 0 for left in self._left), 1)
        probe = self._probe(num_rows)
        if probe is not None:
            return probe
        rows_then, until = self._choice
        if num_rows == rows_then and self._steps < until:
            return self._width
        self._choice = num_rows, self._steps + self.PERIOD
        seconds = self._seconds_left(num_rows)
        best = min(seconds, key=lambda width: seconds[width])
        if seconds.get(self._width, math.inf) <= self.MARGIN * seconds[best]:
            return self._width
        widest = max((width for _, width in self.memory.costs), default=1)
        return max(width for width in self._widths if width <= min(best, self.STRIDE * widest))

    def _seconds_left(self, num_rows: int) -> dict[int, float]:
        """Seconds until all rows have ended, by width; 0 where no cost is known."""
        memory, waiting = self.memory, self._waiting()
        endless, slope = memory.endless(), memory.slope()
        # The row with most left is taken to be the slowest from now on as well.
        rows = sorted(
            ((left, age) for left, age in zip(self._left, self._ages, strict=True) if left),
            reverse=True,
        ) or [(1, 0)]
        law = statistics.NormalDist(math.log(endless), self.SPREAD)
        reach = [math.exp(law.inv_cdf((rank + 0.5) / num_rows)) for rank in range(num_rows)]
        seconds = {}
        for width in self._widths:
            cost = memory.cost(num_rows, width)
            if cost is None:
                return dict.fromkeys(self._widths, 0.0)
            trusted = memory.units(width, endless) / settled_units(width, endless)
            ahead = sum(self._num_steps(left, 0, memory.units(width, endless)) for left in waiting)
            ends = sorted(
                ahead / num_rows
                + self._num_steps(left, age, max(trusted * settled_units(width, of_row), 1.0))
                for (left, age), of_row in zip(rows, reach, strict=True)
            )
            steps = [end - start for start, end in zip([0.0, *ends], ends, strict=False)]
            # Row by row the steps get cheaper.
            saved = min(slope * width, cost / num_rows)
            seconds[width] = sum(
                count * (cost - ended * saved) for ended, count in enumerate(steps)
            )
        return seconds

    def _num_steps(self, left: int, age: int, units: float) -> float:
        """Steps of a row that gets so many units in each, its slow beginning aside."""
        beginning = max(self.BEGINNING - age, 0)
        slow = min(units, self.BEGINNING_UNITS)
        if left <= beginning * slow:
            return left / slow
        return beginning + (left - beginning * slow) / units

    def _probe(self, num_rows: int) -> int | None:
        """The next width to be tried for its cost; None if there is no need."""
        known = [width for rows, width in self.memory.costs if rows == num_rows]
        while self._probes:
            probe = min(self._probes.pop(0), self._widths[-1])
            if not known or probe <= max(known):
                return probe
            one, widest = (self.memory.cost(num_rows, width) for width in (1, max(known)))
            if one is not None and widest is not None and widest <= self.DEAR * one:
                return probe
        return None


#: What earlier calls found, by model and kind of call.
_MEMORIES: WeakKeyDictionary[Any, dict[Hashable, WindowMemory]] = WeakKeyDictionary()


def window_schedule(model: Any, kind: Hashable, rows: TokenRows) -> WindowSchedule:
    """A schedule that goes on from what earlier calls of this kind found.

    Args:
        model: Whose memory it is; forgotten with the model.
        kind: Whatever else moves acceptance or cost (guidance, law, dtype, device). Rows are told
            apart by the memory itself.
        rows: The rows.
    """
    memory = _MEMORIES.setdefault(model, {}).setdefault(kind, WindowMemory())
    longest = max(rows.max_remaining, 1)
    return WindowSchedule(
        min(b for b in BUCKETS if b >= min(longest, BUCKETS[-1])),
        lambda: rows.remaining,
        lambda: rows.budgets[len(rows.prompts) - rows.num_waiting :],
        memory,
    )
