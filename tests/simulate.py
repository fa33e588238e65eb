"""A generation without a model: scripted acceptance and scripted seconds drive a schedule."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from mmspec.drafters.width import DEFAULT_NODE_PRICE
from mmspec.records import Plan, StepRecord
from mmspec.tree import BUCKETS


@dataclass(frozen=True, kw_only=True)
class World:
    """What drafting brings and costs.

    Attributes:
        accept: Chance that the draft at a depth is accepted if its parent was (last one repeats).
        verify: Seconds of a target forward of a width.
        draft: Seconds to draft for a width.
        noise: Relative spread of every time.
        silent: Chance that the drafter has no guess (retrieval); such a drafter heeds prices.
    """

    accept: tuple[float, ...]
    verify: dict[int, float]
    draft_per_node: float = 0.0
    draft_fixed: float = 0.0
    noise: float = 0.05
    silent: float = 0.0

    def seconds(self, width: int) -> float:
        below = [w for w in self.verify if w <= width]
        base = self.verify[max(below)]
        above = [w for w in self.verify if w > width]
        if above:
            low, high = max(below), min(above)
            base += (self.verify[high] - base) * (width - low) / (high - low)
        return base

    def chosen_width(self, plan: Plan) -> int:
        """What a drafter makes of a plan: retrieval drafts what pays, others what is asked for."""
        if not self.silent:
            return plan.width
        widths = [b for b in BUCKETS if 1 < b < plan.width] + [plan.width] * (plan.width > 1)

        def gain(width: int) -> float:
            price = plan.prices.get(width, DEFAULT_NODE_PRICE * (width - 1))
            survival, total = 1.0, 0.0
            for depth in range(width - 1):
                survival *= self.accept[min(depth, len(self.accept) - 1)]
                total += survival
            return total - price

        return max([1, *widths], key=lambda width: gain(width) if width > 1 else 0.0)

    def step(self, width: int, rng: random.Random, index: int = 0) -> StepRecord:
        drafted = 0 if width > 1 and rng.random() < self.silent else width - 1
        accepted = 0
        while (
            accepted < drafted and rng.random() < self.accept[min(accepted, len(self.accept) - 1)]
        ):
            accepted += 1
        width = drafted + 1
        spread = 1 + self.noise * rng.random() + (rng.random() < 0.01) * 2
        draft_s = self.draft_fixed + self.draft_per_node * drafted if drafted else 0.0
        return StepRecord(
            index=index,
            width=width,
            num_drafted=(drafted,),
            num_levels=(drafted,),
            num_accepted=(accepted,),
            num_emitted=(accepted + 1,),
            was_active=(True,),
            draft_time_s=draft_s * spread,
            verify_time_s=self.seconds(width) * spread,
            other_time_s=0.0,
        )


@dataclass
class Tally:
    """Seconds and units so far."""

    units: int = 0
    seconds: float = 0.0
    steps: int = 0

    @property
    def speed(self) -> float:
        return self.units / self.seconds


def generate(schedule, world: World, num_units: int, seed: int = 0, remaining=None) -> Tally:
    """Runs a schedule in a world; ``remaining`` is a one-element list that the schedule reads."""
    rng, tally = random.Random(seed), Tally()
    while tally.units < num_units:
        if remaining is not None:
            remaining[0] = num_units - tally.units
        record = world.step(world.chosen_width(schedule.plan()), rng, tally.steps)
        schedule.observe(record)
        tally.units += record.num_emitted[0]
        tally.seconds += record.wall_time_s
        tally.steps += 1
    return tally


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Jacobi windows over images of which every unit settles at its own time.

    The guess of a unit is right after the first forward that had it in its window and had been
    given all of a beginning of its own length. The lengths are drawn as they were found with the
    bundled avatars: a few units wait for their very neighbours, the others settle far ahead.

    Attributes:
        hard: Share of the units that wait for their neighbours.
        ahead: How far ahead the other units settle at most.
        fresh: Chance that a guess is right before any forward.
        chained: Chance that a unit needs the guess before it to be right as well.
        seconds: Of a step, by rows fed and width.
        noise: Relative spread of every time; one step in a hundred takes three times as long.
        growth: How much longer, relatively, a step takes at the end of the images.
        moment: How much longer any step takes after so many seconds; what it adds is seen by the
            schedule and not tallied.
    """

    hard: float
    ahead: int
    seconds: Callable[[int, int], float]
    fresh: float = 0.17
    chained: float = 0.1
    noise: float = 0.05
    size: int = 256
    growth: float = 0.0
    moment: Callable[[float], float] = lambda elapsed: 1.0

    def generate(self, make_schedule, num_images: int, seed: int = 0) -> Tally:
        """One batch; ``make_schedule`` gets functions for the units left and the rows going on."""
        rows = [_Picture(self, random.Random(100 * seed + row)) for row in range(num_images)]
        schedule = make_schedule(
            lambda: max(row.left for row in rows), lambda: sum(row.left > 0 for row in rows)
        )
        rng, tally = random.Random(seed), Tally()
        while any(row.left for row in rows):
            width = schedule.plan().width
            active = tuple(row.left > 0 for row in rows)
            place = max(row.length for row in rows) / self.size
            accepted = tuple(row.step(width) for row in rows)
            spread = 1 + self.noise * rng.random() + (rng.random() < 0.01) * 2
            spread *= 1 + self.growth * place
            seconds = self.seconds(sum(active), width) * spread if tally.steps else 0.0
            drafts = tuple((width - 1) * on for on in active)
            record = StepRecord(
                index=tally.steps,
                width=width,
                num_drafted=drafts,
                num_levels=drafts,
                num_accepted=accepted,
                num_emitted=tuple(a + on for a, on in zip(accepted, active, strict=True)),
                was_active=active,
                draft_time_s=0.0,
                verify_time_s=seconds * self.moment(tally.seconds),
                other_time_s=0.0,
            )
            schedule.observe(record)
            tally.units += sum(record.num_emitted)
            tally.seconds += seconds
            tally.steps += 1
        return tally


class _Picture:
    """One image: which of its guesses are right."""

    def __init__(self, world: Pictures, rng: random.Random) -> None:
        self.size, self.length = world.size, 0
        self.right = [rng.random() < world.fresh for _ in range(world.size)]
        self.needs_last = [rng.random() < world.chained for _ in range(world.size)]
        lags = [
            rng.randrange(4) if rng.random() < world.hard else rng.randint(5, world.ahead)
            for _ in range(world.size)
        ]
        self.settles = [max(unit - lag, 0) for unit, lag in enumerate(lags)]

    @property
    def left(self) -> int:
        return self.size - self.length

    def step(self, width: int) -> int:
        """Accepts what is right, looks at the whole window again; returns the accepted drafts."""
        start, end = self.length, min(self.length + width, self.size)
        accepted = 0
        while accepted < min(width, self.left) - 1 and self.right[start + accepted]:
            accepted += 1
        before = self.right[:]
        for unit in range(start, end):
            is_ready = self.settles[unit] <= start + accepted
            is_held_up = unit > start + accepted and self.needs_last[unit] and not before[unit - 1]
            self.right[unit] = is_ready and not is_held_up
        self.length += min(accepted + 1, self.left)
        return accepted
