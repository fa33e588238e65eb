"""How wide a Jacobi window should be: chosen while running, from what widths brought and cost.

`AdaptiveSchedule` asks how deep a draft survives. That question has no answer for a window: a guess
is right only after it has been in the window for some forwards, so what a wide window accepts says
nothing about the first positions of a narrow one, and the other way round. Here a curve with one
unknown says what a window of any width brings once it has settled (docs/schedule.md).
"""

import functools
import math
import statistics
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterable
from typing import Any
from weakref import WeakKeyDictionary

from mmspec.records import Plan, StepRecord
from mmspec.rows import TokenRows
from mmspec.schedule import Progress, clamped
from mmspec.tree import BUCKETS


def settled_units(width: int, endless: float) -> float:
    """Units per step of a window that has settled.

    Args:
        width: Of the window; 1 brings one unit.
        endless: Units per step of a window without end, which is how deep dependencies between
            neighbours reach; 1 where no guess is ever right.
    """
    share = width**-WindowMemory.POWER
    return float(1 / (share + (1 - share) / endless))


# A width is chosen in every step, beside which a small model's forward is short: what does not
# change from step to step is kept.


@functools.lru_cache(maxsize=1024)
def _log_units(width: int) -> tuple[float, ...]:
    """Logarithms of what a settled window brings, for each of the limits that are considered."""
    return tuple(math.log(settled_units(width, endless)) for endless in WindowMemory.ENDLESS)


@functools.lru_cache(maxsize=1024)
def _at_beginning(samples: tuple[tuple[float, float], ...], growth: float) -> float:
    """Median of what steps would have cost at the beginning of a call.

    Args:
        samples: Seconds and place of each step.
        growth: Logarithm of how much longer a step takes at the end of a call.
    """
    return statistics.median_low(seconds * math.exp(-growth * at) for seconds, at in samples)


class _Trend:
    """How steps of one kind take longer along a call: logarithms of seconds against places."""

    #: Steps with whose mean a new one is compared, about.
    SPAN = 200

    def __init__(self) -> None:
        self._count = 0
        self._place = self._log_seconds = 0.0
        #: Squared distances of the places from their mean, and these times those of the logarithms.
        self.spread = self.product = 0.0

    def note(self, place: float, seconds: float) -> None:
        """A step was measured."""
        self._count = min(self._count + 1, self.SPAN)
        off, up = place - self._place, math.log(seconds) - self._log_seconds
        self._place += off / self._count
        self._log_seconds += up / self._count
        rest = 1 - 1 / self._count
        self.spread += rest * off * off
        self.product += rest * off * up

    def discount(self, keep: float) -> None:
        """What was found so far counts less."""
        self.spread *= keep
        self.product *= keep


class WindowMemory:
    """What windows brought and cost; outlives a call.

    A place is how much of a call is done, from 0 to 1: attention looks back on ever more, so the
    same step takes longer and longer, and what was measured at one place says little of another
    until this is known.

    Attributes:
        costs: Seconds and places of the latest steps, by rows fed and width.
        trials: Row-steps by width, old ones discounted.
        units: Units of these row-steps.
    """

    #: Growth of the units with the width where nothing limits them.
    POWER = 0.76
    #: Steps of one width whose median is its cost, and how many of them a new call takes over.
    KEPT = 9
    CARRIED = 3
    #: How much other evidence counts in the next call.
    KEPT_EVIDENCE = 0.85
    #: Units of an endless window before any evidence, and the row-steps that this guess counts.
    PRIOR_ENDLESS = 12.0
    PRIOR_TRIALS = 4.0
    #: Row-steps of a width after which half of its deviation from the curve is believed.
    TRUST_TRIALS = 100.0
    #: What a step's own trend along a call must outweigh to be believed rather than that of all
    #: steps, and what that must outweigh; both in squared places.
    OWN_TREND = 3.0
    ANY_TREND = 1.0
    #: Logarithms of how much lower costs may be than what is known of them. Of one that was never
    #: measured, times its distance from what was; and of one that this call has not measured yet.
    #: A width that is thought a little too dear would else never be tried.
    DOUBT = 0.2
    OLD_DOUBT = 0.08
    #: Row-steps remembered at most.
    SPAN = 1000.0
    #: Units of an endless window that are considered.
    ENDLESS = tuple(1.2**step for step in range(28))

    def __init__(self) -> None:
        """Knows nothing."""
        self.costs: dict[tuple[int, int], deque[tuple[float, float]]] = defaultdict(
            lambda: deque(maxlen=self.KEPT)
        )
        self._trends: dict[tuple[int, int], _Trend] = defaultdict(_Trend)
        self._measured: set[tuple[int, int]] = set()
        self.trials: dict[int, float] = defaultdict(float)
        self.units: dict[int, float] = defaultdict(float)

    def begin_call(self) -> None:
        """Old evidence counts less, so that an unlucky finding is tried again."""
        levels = self._levels()
        for cell, samples in self.costs.items():
            is_recent = cell in self._measured
            kept = list(samples)[-self.CARRIED :] if is_recent else [(levels[cell][0], 0.0)]
            self.costs[cell] = deque(kept, self.KEPT)
        self._measured.clear()
        self._discount(self.KEPT_EVIDENCE)
        for trend in self._trends.values():
            trend.discount(self.KEPT_EVIDENCE)

    def note_cost(self, num_rows: int, width: int, seconds: float, place: float = 0.0) -> None:
        """A step was measured."""
        cell = num_rows, width
        self.costs[cell].append((seconds, place))
        self._trends[cell].note(place, seconds)
        self._measured.add(cell)

    def count(self, width: int, num_rows: int, num_units: float) -> None:
        """A step of a settled window."""
        self._discount(max(1 - num_rows / self.SPAN, 0.0))
        self.trials[width] += num_rows
        self.units[width] += num_units

    def _discount(self, keep: float) -> None:
        for width in self.trials:
            self.trials[width] *= keep
            self.units[width] *= keep

    def expected(self) -> Callable[[int], float]:
        """Units per row and step of a settled window, as a function of its width."""
        seen = [(w, n, math.log(self.units[w] / n)) for w, n in self.trials.items() if n > 0.5]
        prior = math.log(self.PRIOR_ENDLESS)
        misfits = [self.PRIOR_TRIALS * (math.log(e) - prior) ** 2 for e in self.ENDLESS]
        for width, trials, log_units in seen:
            for place, curve in enumerate(_log_units(width)):
                misfits[place] += trials * (log_units - curve) ** 2
        place = misfits.index(min(misfits))
        known = {w: (n / (n + self.TRUST_TRIALS), u) for w, n, u in seen}

        def units(width: int) -> float:
            curve = _log_units(width)[place]
            trust, log_units = known.get(width, (0.0, 0.0))
            return math.exp((1 - trust) * curve + trust * log_units)

        return units

    def _levels(self) -> dict[tuple[int, int], tuple[float, float]]:
        """Seconds at the beginning of a call of each kind of step, and how they grow."""
        spread = sum(trend.spread for trend in self._trends.values())
        product = sum(trend.product for trend in self._trends.values())
        common = product / (spread + self.ANY_TREND)
        levels = {}
        for cell, samples in self.costs.items():
            trend = self._trends[cell]
            own = trend.product + self.OWN_TREND * common
            # In steps of 5 %, so that medians are found again.
            growth = round(20 * own / (trend.spread + self.OWN_TREND)) / 20
            levels[cell] = _at_beginning(tuple(samples), growth), growth
        return levels

    def cost(self, num_rows: int, width: int, place: float = 0.0) -> float | None:
        """Seconds of a step, as `costs_at` says; None where nothing is known."""
        return self.costs_at(num_rows, [width], place).get(width)

    def costs_at(
        self, num_rows: int, widths: Iterable[int], place: float = 0.0
    ) -> dict[int, float]:
        """Seconds of steps: as measured, else from a line through what was measured.

        The first step of a width may hold a compilation; of two the faster counts, and the line
        may lower a single one.

        Args:
            num_rows: Rows fed.
            widths: Those that are asked for; one of which nothing is known is left out.
            place: How much of the call is done.
        """
        levels = self._levels().items()
        cells = {cell: level * math.exp(growth * place) for cell, (level, growth) in levels}
        costs = {}
        for width in widths:
            cell = num_rows, width
            measured = cells.get(cell)
            if measured is not None and cell not in self._measured:
                measured *= math.exp(-self.OLD_DOUBT)
            if measured is not None and len(self.costs[cell]) > 1:
                costs[width] = measured
                continue
            others = {other: cells[other] for other in cells if other != cell}
            known = [] if measured is None else [measured]
            if others:
                guess, distance = _guessed(tuple(others.items()), num_rows, width)
                known.append(guess * math.exp(-self.DOUBT * distance))
            if known:
                costs[width] = min(known)
        return costs


@functools.lru_cache(maxsize=256)
def _guessed(
    cells: tuple[tuple[tuple[int, int], float], ...], num_rows: int, width: int
) -> tuple[float, float]:
    """Seconds on a line over the nodes fed, moved so that it meets the nearest measured cell.

    Also returns how far that cell is.
    """
    base, slope = _line(tuple((rows * wide, seconds) for (rows, wide), seconds in cells))
    (rows, wide), seconds = min(cells, key=lambda cell: _distance(*cell[0], num_rows, width))
    seconds *= (base + slope * num_rows * width) / (base + slope * rows * wide)
    return seconds, _distance(rows, wide, num_rows, width)


@functools.lru_cache(maxsize=4096)
def _distance(rows: int, width: int, other_rows: int, other_width: int) -> float:
    """How little the cost of one kind of step says of that of another."""
    return abs(math.log(width / other_width)) + 2 * abs(math.log(rows / other_rows))


@functools.lru_cache(maxsize=64)
def _line(points: tuple[tuple[int, float], ...]) -> tuple[float, float]:
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
    """Takes the width that brings most units per second, for the rows that are still going on."""

    #: A width must be this much better than the present one to replace it.
    MARGIN = 1.05
    #: Widths of the first steps where nothing is known of the costs. Two of each, for the first
    #: of a width may hold a compilation. Plain ones come second: the first window accepts guesses
    #: that are right from the start, the next ones hardly any, however wide they are.
    PROBES = (8, 1, 1, 8, 16, 16)
    #: A wider window is not probed where the widest one so far costs more plain steps than this.
    DEAR = 2.5
    #: Largest width over the largest one whose cost was measured: a line is no proof.
    STRIDE = 2
    #: Steps at the beginning, and after a change of width, that say nothing about what a settled
    #: window brings.
    BEGINNING = 14
    SETTLING = 4
    #: Steps for which a width stands that has been chosen twice, while no row ends: beside a small
    #: model's forward, choosing is not free.
    PATIENCE = 4

    def __init__(
        self,
        max_width: int,
        remaining: Callable[[], int],
        num_active: Callable[[], int],
        memory: WindowMemory | None = None,
        num_waiting: Callable[[], int] = lambda: 0,
    ) -> None:
        """Starts from a guess or from what earlier calls found.

        Args:
            max_width: Largest width.
            remaining: Largest number of units that an active row may still get.
            num_active: Rows that go on.
            memory: Kept by the caller from call to call.
            num_waiting: Requests that no row has begun.

        Raises:
            ValueError: If ``max_width`` is out of range.
        """
        if not 1 <= max_width <= BUCKETS[-1]:
            raise ValueError(f"width must be between 1 and {BUCKETS[-1]}, got {max_width}")
        self.memory = memory or WindowMemory()
        self.memory.begin_call()
        self._widths = [b for b in BUCKETS if b < max_width] + [max_width]
        self._remaining = remaining
        self._num_active = num_active
        self._num_waiting = num_waiting
        self._progress = Progress()
        self._probes = [] if self.memory.costs else list(self.PROBES)
        self._has_begun = False
        self._width = 0
        self._steps = 0
        self._last_change = 0
        self._next_choice = 0
        self._num_rows = 0
        self._longest = 1
        self._place = 0.0

    def plan(self) -> Plan:
        """Returns the plan of the next step; the first is plain, for the prefill answers it."""
        if not self._has_begun:
            return Plan(width=1)
        self._steps += 1
        remaining = self._remaining()
        self._longest = max(self._longest, remaining)
        self._place = 1 - remaining / self._longest
        num_rows = max(self._num_active(), 1)
        if self._steps >= self._next_choice or num_rows != self._num_rows:
            is_probing = bool(self._probes)
            width = self._chosen_width(num_rows)
            stands = width == self._width and not is_probing
            self._num_rows, self._next_choice = num_rows, self._steps + self.PATIENCE * stands
            if width != self._width:
                self._width, self._last_change = width, self._steps
        return Plan(width=clamped(self._width, remaining))

    def observe(self, record: StepRecord) -> None:
        """Learns the cost and the acceptance of a finished step."""
        if not self._has_begun:
            self._has_begun = True
            return
        num_rows = sum(record.was_active)
        self.memory.note_cost(num_rows, record.width, record.wall_time_s, self._place)
        num_units = float(sum(record.num_emitted))
        slowest, _ = self._progress.advance(record)
        if not self._num_waiting():
            # The batch ends with its slowest row, but its steps get shorter whenever one ends.
            num_units = 0.5 * (num_units + num_rows * slowest)
        is_settled = self._steps > max(self.BEGINNING, self._last_change + self.SETTLING)
        if is_settled and record.width == self._width:
            self.memory.count(record.width, num_rows, num_units)

    def _chosen_width(self, num_rows: int) -> int:
        probe = self._probe(num_rows)
        if probe is not None:
            return probe
        units = self.memory.expected()
        costs = self.memory.costs_at(num_rows, self._widths, self._place)
        rates = {w: units(w) / costs[w] if w in costs else math.inf for w in self._widths}
        best = max(rates, key=lambda width: rates[width])
        if rates[best] <= self.MARGIN * rates.get(self._width, 0.0):
            return self._width
        widest = max((width for _, width in self.memory.costs), default=1)
        return max(width for width in self._widths if width <= min(best, self.STRIDE * widest))

    def _probe(self, num_rows: int) -> int | None:
        """The next width to be tried for its cost; None if there is no need."""
        known = [width for rows, width in self.memory.costs if rows == num_rows]
        while self._probes:
            probe = min(self._probes.pop(0), self._widths[-1])
            if not known or probe <= max(known):
                return probe
            one, widest = (
                self.memory.cost(num_rows, width, self._place) for width in (1, max(known))
            )
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
        lambda: rows.max_remaining,
        lambda: len(rows.active),
        memory,
        lambda: rows.num_waiting,
    )
