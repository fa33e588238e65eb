"""How many units to draft now; `mmspec.window_schedule` does it for Jacobi windows of images.

Schedules look at finished steps only. A schedule that peeked at the coming draft would bias the
rules that keep a law (docs/schedule.md).
"""

import logging
import math
import statistics
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence

from mmspec.checks import is_integer
from mmspec.records import Plan, StepRecord
from mmspec.tree import BUCKETS, bucket

logger = logging.getLogger("mmspec")


class FixedSchedule:
    """The same width in every step but the first, clamped at the end of the rows."""

    def __init__(self, width: int, remaining: Callable[[], int]) -> None:
        """Fixes the width.

        Args:
            width: Nodes per row, the root included.
            remaining: Largest number of units that an active row may still get.

        Raises:
            ValueError: If ``width`` is below 1 or above the largest bucket.
        """
        if not is_integer(width) or not 1 <= width <= BUCKETS[-1]:
            raise ValueError(f"window must be between 1 and {BUCKETS[-1]}, got {width!r}")
        self._width = width
        self._remaining = remaining
        self._has_begun = False

    def plan(self) -> Plan:
        """Returns the plan of the next step; the first is plain, for the prefill answers it."""
        if not self._has_begun:
            return Plan(width=1)
        return Plan(width=clamped(self._width, self._remaining()))

    def observe(self, record: StepRecord) -> None:
        """Learns nothing but that there was a step."""
        self._has_begun = True


def clamped(width: int, remaining: int) -> int:
    """A width that reaches no further than the rows do, still one of few shapes.

    The last unit of the longest row is drafted too rather than left to the bonus, so that what is
    verified in a row does not depend on how much its neighbours have left.
    """
    return min(width, bucket(min(max(remaining, 0) + 1, BUCKETS[-1])))


class StepCosts:
    """What steps of each width took lately."""

    #: Steps of one width whose median is its cost.
    MEMORY = 9
    #: How the cost is thought to grow with the width before two widths are known: rows of a batch
    #: fill a forward, and the more so the wider it is.
    GROWTH_OF_ROW = 0.2
    GROWTH_OF_BATCH = 0.35
    #: Steps of each width that a later generation takes over.
    CARRIED = 3

    def __init__(self, known: Mapping[int, Sequence[float]] | None = None) -> None:
        """Starts from the seconds of an earlier generation of the same kind, if any."""
        #: Seconds of the latest steps of each width.
        self.seconds: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=self.MEMORY))
        for width, seconds in list((known or {}).items()):
            self.seconds[width].extend(list(seconds)[-self.CARRIED :])

    def add(self, width: int, seconds: float) -> None:
        """One more step of a width."""
        self.seconds[width].append(seconds)

    def of(self, width: int, *, is_batch: bool) -> float | None:
        """Median seconds of a step of this width; a guess from other widths if new.

        The first step of a width may hold a compilation, so it may lower the guess but not raise
        it, and of two the faster counts.
        """
        samples = self.seconds[width]
        if len(samples) > 2:
            return statistics.median(samples)
        guess = self._guessed(width, is_batch) if len(samples) < 2 else None
        return min([*samples, *([guess] if guess is not None else [])], default=None)

    def _guessed(self, width: int, is_batch: bool) -> float | None:
        known = [w for w in sorted(self.seconds) if 0 < w < width and self.seconds[w]]
        if not known:
            return None
        nearest = self.of(known[-1], is_batch=is_batch)
        narrower = self.of(known[-2], is_batch=is_batch) if len(known) > 1 else None
        if nearest is None:
            return None
        power = floor = self.GROWTH_OF_BATCH if is_batch else self.GROWTH_OF_ROW
        if narrower is not None:
            growth = math.log(nearest / narrower) / math.log(known[-1] / known[-2])
            power = min(max(growth, floor), 1.0)
        # Nothing costs more than a wider step does.
        wider = [min(found) for w, found in self.seconds.items() if w > width and len(found) > 1]
        return min([nearest * (width / known[-1]) ** power, *wider])


class AdaptiveSchedule:
    """Drafts as much as pays: expected units per second from measured acceptance and cost.

    With conditional acceptance ``a_k`` at depth k, a row of width w gets
    ``1 + a_1 + a_1 a_2 + ...`` units from a step that costs what steps of that width took lately;
    the width with the best ratio wins. Where the drafter is silent the step is plain, so the ratio
    is taken over both.

    If plain decoding wins, drafts are a probe, and probes are paid from a budget: what they lose
    against plain decoding may grow to a fixed share of the time, so a useless drafter costs that
    share at most and a drafter that becomes useful is noticed.

    The very first step is plain and nothing is learnt from it: the prefill's logits answer it, so
    it costs no forward. Steps are counted from the one after it.
    """

    #: Weight of old evidence, per drafted step.
    DECAY = 0.97
    #: How many trials the guess for a depth counts, which is the rate of the depth before it.
    PRIOR_TRIALS = 2.0
    #: Acceptance of the first draft before anything is known.
    PRIOR_RATE = 0.6
    #: Plain steps are timed again this often, as long as the gain is below the next figure.
    PLAIN_EVERY = 64
    CLEAR_GAIN = 3.0
    #: Share of the time that probes may lose.
    PROBE_SHARE = 0.02
    #: Plain steps that probes may lose on top, mostly at the start, and the share of a generation
    #: that these may be.
    GRACE = 4
    GRACE_SHARE = 0.03
    #: Steps before the schedule may say that speculation does not pay.
    PATIENCE = 48

    def __init__(
        self,
        max_width: int,
        remaining: Callable[[], int],
    ) -> None:
        """Starts optimistic.

        Args:
            max_width: Largest width, a bucket.
            remaining: Largest number of units that an active row may still get.

        Raises:
            ValueError: If ``max_width`` is out of range.
        """
        self._widths = widths_up_to(max_width)
        self._remaining = remaining
        self._costs = StepCosts()
        self._levels: dict[int, float] = {}
        self._tried = [0.0] * BUCKETS[-1]
        self._accepted = [0.0] * BUCKETS[-1]
        self._share_of_steps = 1.0  # of the steps that may draft, those with any draft
        self._share_of_rows = 1.0  # of the rows of those steps, those with a draft
        self._has_begun = False
        self._grace = float(self.GRACE)
        self._steps = 0
        self._asked = 1
        self._elapsed_s = 0.0
        self._progress = Progress()
        self._lost_s = 0.0
        self._gain = 1.0  # of the best width over plain decoding
        self._warned = False

    def plan(self) -> Plan:
        """Returns the plan of the next step."""
        if not self._has_begun:
            self._grace = min(self.GRACE, self.GRACE_SHARE * self._remaining())
            return Plan(width=1)
        self._steps += 1
        self._asked = 1
        if self._widths and not self._is_plain_due():
            self._asked = clamped(self._chosen_width(), self._remaining())
        return Plan(width=self._asked)

    def observe(self, record: StepRecord) -> None:
        """Learns the cost and the acceptance of a finished step."""
        if not self._has_begun:
            self._has_begun = True
            return
        self._costs.add(record.width, record.wall_time_s)
        # A compilation is no measure of the speed: what is usual for the width counts.
        self._elapsed_s += min(record.wall_time_s, self._cost(record.width) or math.inf)
        units, behind = self._progress.advance(record)
        if self._asked == 1:
            return
        num_drafting = sum(record.num_levels[row] > 0 for row in behind)
        self._share_of_steps = _blended(self._share_of_steps, num_drafting > 0)
        if num_drafting:
            self._share_of_rows = _blended(self._share_of_rows, num_drafting / len(behind))
            levels = sum(record.num_levels[row] for row in behind) / num_drafting
            self._levels[record.width] = _blended(self._levels.get(record.width, levels), levels)
            self._count(record, behind)
        elif record.width == 1:
            return
        plain, cost = self._cost(1), self._cost(record.width)
        if plain is not None and cost is not None:
            self._lost_s = max(self._lost_s + cost - units * plain, 0.0)

    def _is_plain_due(self) -> bool:
        is_refresh = self._steps % self.PLAIN_EVERY == 2 and self._gain < self.CLEAR_GAIN
        return self._steps in (2, 3) or is_refresh

    def _chosen_width(self) -> int:
        plain = self._cost(1)
        if plain is None:
            return self._widths[min(2, len(self._widths) - 1)]
        is_paid = self._lost_s <= self._grace * plain + self.PROBE_SHARE * self._elapsed_s
        rates = {width: self._rate(width, plain) for width in self._widths}
        best = max(rates, key=lambda width: rates[width])
        self._gain = rates[best] * plain
        if self._gain > 1.0:
            return best
        self._warn_once(best, plain)
        return best if is_paid else 1

    def _rate(self, width: int, plain: float) -> float:
        """Units per second and row of a width, silent steps included."""
        drafting = self._share_of_steps
        units = 1.0 + drafting * self._share_of_rows * (self._expected(width) - 1.0)
        cost = self._cost(width)
        return units / (drafting * (plain if cost is None else cost) + (1.0 - drafting) * plain)

    def _count(self, record: StepRecord, behind: Sequence[int]) -> None:
        drafted = [(record.num_accepted[row], record.num_levels[row]) for row in behind]
        for depth in range(max(record.num_levels)):
            tried = [a for a, levels in drafted if levels > depth and a >= depth]
            if not tried:
                break
            hits = sum(accepted > depth for accepted in tried)
            self._tried[depth] = self._tried[depth] * self.DECAY + len(tried)
            self._accepted[depth] = self._accepted[depth] * self.DECAY + hits

    def _expected(self, width: int) -> float:
        """Units of a drafting row: one, and each draft times the chance that all above survive."""
        total, survival, rate = 1.0, 1.0, self.PRIOR_RATE
        levels = self._levels_of(width)
        for depth in range(math.ceil(levels)):
            hits = self._accepted[depth] + self.PRIOR_TRIALS * rate
            rate = hits / (self._tried[depth] + self.PRIOR_TRIALS)
            survival *= rate
            total += survival * min(levels - depth, 1.0)
        return total

    def _levels_of(self, width: int) -> float:
        """Depth of the drafts of this width: as seen, else guessed from the nearest seen.

        Where a width gave a chain, wider ones are thought to do so too; a tree gains one level.
        """
        if not self._levels:
            return width - 1
        nearest = min(self._levels, key=lambda seen: abs(math.log(seen / width)))
        levels = self._levels[nearest]
        if width > nearest:
            levels = width - 1 if levels > nearest - 1.5 else levels + 1
        return min(levels, width - 1)

    def _cost(self, width: int) -> float | None:
        return self._costs.of(width, is_batch=self._progress.num_rows > 1)

    def _warn_once(self, width: int, plain: float) -> None:
        if self._warned or self._steps < self.PATIENCE:
            return
        self._warned = True
        logger.warning(
            "speculation does not pay here: first drafts are accepted %.0f %% of the time, a step "
            "of %d takes %.1f ms against %.1f ms plain; falling back to plain decoding",
            100 * self._accepted[0] / max(self._tried[0], 1.0),
            width,
            1e3 * (self._cost(width) or 0.0),
            1e3 * plain,
        )


def widths_up_to(max_width: int) -> list[int]:
    """The widths of drafts to choose from.

    Raises:
        ValueError: If ``max_width`` is out of range.
    """
    if not 1 <= max_width <= BUCKETS[-1]:
        raise ValueError(f"width must be between 1 and {BUCKETS[-1]}, got {max_width}")
    return [b for b in BUCKETS if 1 < b < max_width] + [max_width] * (max_width > 1)


class Progress:
    """How far the rows of a batch have come."""

    def __init__(self) -> None:
        """Nobody has moved yet."""
        self._units: list[int] = []

    @property
    def num_rows(self) -> int:
        """Rows, 0 before the first step."""
        return len(self._units)

    def advance(self, record: StepRecord) -> tuple[int, list[int]]:
        """Units by which the batch has come closer to its end, and the rows it waits for."""
        if not self._units:
            self._units = [0] * len(record.num_emitted)
        behind = rows_behind(self._units, record.was_active)
        active = [row for row, on in enumerate(record.was_active) if on]
        before = min((self._units[row] for row in active), default=0)
        self._units = [
            units + new for units, new in zip(self._units, record.num_emitted, strict=True)
        ]
        return min((self._units[row] for row in active), default=0) - before, behind


def rows_behind(units: Sequence[int], is_active: Sequence[bool]) -> list[int]:
    """The active rows with the fewest units so far, or nearly so: a batch ends when they do.

    What drafts bring the other rows ends those rows earlier and the batch not at all, while wide
    steps cost all rows.
    """
    active = [row for row, on in enumerate(is_active) if on]
    least = min((units[row] for row in active), default=0)
    return [row for row in active if units[row] <= 1.1 * least + 1]


def _blended(old: float, new: float, weight: float = 0.1) -> float:
    return old + weight * (new - old)
