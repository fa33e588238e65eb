"""A generation without a model: scripted acceptance and scripted seconds drive a schedule."""

import random
from dataclasses import dataclass

from mmspec.drafters.ngram import DEFAULT_NODE_PRICE
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
