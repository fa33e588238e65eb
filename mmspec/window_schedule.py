"""How wide a Jacobi window should be: chosen while running, from what widths brought and cost.

`AdaptiveSchedule` asks how deep a draft survives. That question has no answer for a window: a guess
is right only after it has been in the window for some forwards, so what a wide window accepts says
nothing about the first positions of a narrow one, and the other way round. Here a curve with one
unknown says what a window of any width brings once it has settled (docs/schedule.md).
"""

import functools
import math
import statistics
from collections.abc import Callable, Hashable
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from mmspec.cost_belief import CostBelief
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


@functools.lru_cache(maxsize=1)
def _curves() -> NDArray[np.float64]:
    """Logarithms of what settled windows bring, by limit (`WindowMemory.ENDLESS`) and width."""
    return np.log([[settled_units(w, limit) for w in BUCKETS] for limit in WindowMemory.ENDLESS])


@functools.lru_cache(maxsize=1)
def _prior_misfits() -> NDArray[np.float64]:
    """What speaks against each limit before anything was counted."""
    far = np.log(WindowMemory.ENDLESS) - math.log(WindowMemory.PRIOR_ENDLESS)
    misfits: NDArray[np.float64] = WindowMemory.PRIOR_TRIALS * far**2
    return misfits


class WindowMemory:
    """What windows brought and cost; outlives a call.

    Attributes:
        costs: Of steps, by rows fed and width.
        widest: Largest width of a step; 0 if there was none.
        trials: Row-steps by width (of `BUCKETS`), old ones discounted.
        units: Units of these row-steps.
    """

    #: Growth of the units with the width where nothing limits them.
    POWER = 0.76
    #: How much of what widths brought counts in the next call.
    KEPT_EVIDENCE = 0.85
    #: Units of an endless window before any evidence, and the row-steps that this guess counts.
    PRIOR_ENDLESS = 12.0
    PRIOR_TRIALS = 4.0
    #: Row-steps of a width after which half of its deviation from the curve is believed.
    TRUST_TRIALS = 100.0
    #: Row-steps remembered at most.
    SPAN = 1000.0
    #: Units of an endless window that are considered.
    ENDLESS = tuple(1.2**step for step in range(28))

    def __init__(self) -> None:
        """Knows nothing."""
        self.costs = CostBelief()
        self.widest = 0
        self.trials = np.zeros(len(BUCKETS))
        self.units = np.zeros(len(BUCKETS))
        self._kind = (0, 0)
        self._seconds: list[float] = []
        self._new_trials = self._new_units = 0.0

    def begin_call(self) -> None:
        """Old evidence counts less, so that an unlucky finding is tried again."""
        self.learn()
        self.costs.begin_call()
        self._discount(self.KEPT_EVIDENCE)

    def note(self, num_rows: int, width: int, seconds: float) -> None:
        """A step was measured."""
        if (num_rows, width) != self._kind:
            self.learn()
            self._kind = num_rows, width
            self.widest = max(self.widest, width)
        self._seconds.append(seconds)

    def count(self, num_units: float) -> None:
        """The step last noted was one of a settled window, and its rows got these units."""
        self._new_trials += self._kind[0]
        self._new_units += num_units

    def learn(self) -> None:
        """Makes something of what was noted; once for many steps, for beside one it is not free."""
        num_rows, width = self._kind
        if self._seconds:
            # One step in a hundred takes twice as long as its neighbours.
            seconds = statistics.median(self._seconds)
            self.costs.note(num_rows, width, seconds, len(self._seconds))
        if self._new_trials:
            self._discount(max(1 - self._new_trials / self.SPAN, 0.0))
            self.trials[BUCKETS.index(width)] += self._new_trials
            self.units[BUCKETS.index(width)] += self._new_units
        self._seconds, self._new_trials, self._new_units = [], 0.0, 0.0

    def _discount(self, keep: float) -> None:
        self.trials *= keep
        self.units *= keep

    def log_units(self) -> NDArray[np.float64]:
        """Logarithms of units per row and step of settled windows, for the widths of `BUCKETS`."""
        trials = np.where(self.trials > 0.5, self.trials, 0.0)
        counted = np.log(np.maximum(self.units, 1e-9) / np.maximum(self.trials, 1e-9))
        misfits = (counted - _curves()) ** 2 @ trials + _prior_misfits()
        curve = _curves()[misfits.argmin()]
        trust = trials / (trials + self.TRUST_TRIALS)
        log_units: NDArray[np.float64] = curve + trust * (counted - curve)
        return log_units


class WindowSchedule:
    """Takes the width that brings most units per second, for the rows that are still going on."""

    #: A width must be this much better than the present one to replace it.
    MARGIN = 1.05
    #: Standard deviations by which the cost of another width may be lower than what is known of it:
    #: one that is thought a little too dear would else never be tried.
    OPTIMISM = 0.5
    #: Widths of the first steps where nothing is known. The plain one is second: the first window
    #: accepts guesses that are right from the start, the next ones hardly any, however wide.
    PROBES = (8, 1)
    #: Largest width over the largest one so far: belief is no proof.
    STRIDE = 2
    #: Steps that must be left for a window to be widened: it brings more only once it has settled.
    HORIZON = 10
    #: Steps at the beginning, and after a change of width, that say nothing about what a settled
    #: window brings.
    BEGINNING = 14
    SETTLING = 4
    #: Steps for which a width stands that has been chosen twice, while no row ends: beside a small
    #: model's forward, choosing is not free.
    PATIENCE = 8

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
            max_width: Largest width, one of `BUCKETS`.
            remaining: Largest number of units that an active row may still get.
            num_active: Rows that go on.
            memory: Kept by the caller from call to call.
            num_waiting: Requests that no row has begun.

        Raises:
            ValueError: If ``max_width`` is none of `BUCKETS`.
        """
        if max_width not in BUCKETS:
            raise ValueError(f"the largest width must be one of {BUCKETS}, got {max_width}")
        self.memory = memory or WindowMemory()
        self.memory.begin_call()
        self._max_width = max_width
        self._remaining = remaining
        self._num_active = num_active
        self._num_waiting = num_waiting
        self._progress = Progress()
        self._has_begun = False
        self._probes = [] if self.memory.widest else list(self.PROBES)
        self._width = 0
        self._steps = 0
        self._last_change = 0
        self._next_choice = 0
        self._num_rows = self._rows_before = 0

    def plan(self) -> Plan:
        """Returns the plan of the next step; the first is plain, for the prefill answers it."""
        if not self._has_begun:
            return Plan(width=1)
        self._steps += 1
        num_rows = max(self._num_active(), 1)
        if self._steps >= self._next_choice or num_rows != self._num_rows:
            self.memory.learn()
            width = self._chosen_width(num_rows)
            stands = width == self._width
            self._num_rows, self._next_choice = num_rows, self._steps + self.PATIENCE * stands
            if width != self._width:
                self._width, self._last_change = width, self._steps
        return Plan(width=clamped(self._width, self._remaining()))

    def observe(self, record: StepRecord) -> None:
        """Learns the cost and the acceptance of a finished step."""
        if not self._has_begun:
            self._has_begun = True
            return
        num_rows = sum(record.was_active)
        slowest, _ = self._progress.advance(record)
        # The first step of other rows also makes their caches.
        are_others, self._rows_before = num_rows != self._rows_before, num_rows
        if are_others and self.memory.widest:
            return
        self.memory.note(num_rows, record.width, record.wall_time_s)
        is_settled = self._steps > max(self.BEGINNING, self._last_change + self.SETTLING)
        if is_settled and record.width == self._width:
            num_units = float(sum(record.num_emitted))
            if not self._num_waiting():
                # The batch ends with its slowest row, but its steps get shorter whenever one ends.
                num_units = 0.5 * (num_units + num_rows * slowest)
            self.memory.count(num_units)

    def _chosen_width(self, num_rows: int) -> int:
        if self._probes:
            return min(self._probes.pop(0), self._max_width)
        costs, covariance = self.memory.costs.of(num_rows)
        units = self.memory.log_units()
        rates = units - costs
        widest = min(self.STRIDE * self.memory.widest, self._max_width)
        if not self._width:
            return _best(rates, widest)
        own = BUCKETS.index(self._width)
        if self._remaining() < self.HORIZON * math.exp(units[own]):
            widest = self._width
        doubt = covariance.diagonal() + covariance[own, own] - 2 * covariance[own]
        rates += self.OPTIMISM * np.sqrt(np.maximum(doubt, 0.0))
        rates[own] += math.log(self.MARGIN)
        return _best(rates, widest)


def _best(rates: NDArray[np.float64], widest: int) -> int:
    """The width with the highest rate."""
    return BUCKETS[int(rates[: BUCKETS.index(widest) + 1].argmax())]


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
