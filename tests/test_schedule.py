"""The adaptive schedule in scripted worlds: wide where it pays, plain where it does not."""

import dataclasses
import logging
import random

import pytest
from simulate import World, generate

from mmspec.records import StepRecord
from mmspec.retrieval_schedule import IN_VAIN, RetrievalSchedule
from mmspec.schedule import AdaptiveSchedule, FixedSchedule
from mmspec.tree import BUCKETS

FLAT = {1: 1.0, 8: 1.05, 16: 1.1, 32: 1.2, 64: 1.5, 128: 2.2}  # a GPU: nodes are nearly free
LINEAR = {1: 1.0, 2: 1.3, 4: 1.6, 8: 2.4, 16: 4, 32: 7, 64: 13, 128: 26}  # a CPU
MIDDLE = {1: 1.0, 2: 1.02, 4: 1.1, 8: 1.3, 16: 1.8, 32: 3, 64: 5, 128: 9}

USELESS = {
    "free": World(accept=(0.0,), verify=FLAT),
    "on a cpu": World(accept=(0.02,), verify=LINEAR, draft_per_node=0.1),
    "expensive": World(accept=(0.01,), verify=LINEAR, draft_fixed=2, draft_per_node=1),
    "retrieval": World(accept=(0.05,), verify=LINEAR, silent=0.3),
    "poor": World(accept=(0.2, 0.1), verify=MIDDLE, draft_per_node=0.15),
}
USEFUL = {
    "good": World(accept=(0.8,), verify=FLAT, draft_per_node=0.02),
    "great": World(accept=(0.95,), verify=FLAT),
    "good on a cpu": World(accept=(0.85,), verify=LINEAR, draft_per_node=0.05),
    "decaying": World(accept=(0.9, 0.7, 0.5, 0.3), verify=MIDDLE, draft_per_node=0.05),
    "parallel": World(accept=(0.8, 0.8, 0.7, 0.6, 0.5), verify=FLAT, draft_fixed=0.3),
    "break-even": World(accept=(0.35,), verify=MIDDLE, draft_per_node=0.15),
    "retrieval": World(accept=(0.6, 0.8, 0.9), verify=MIDDLE, silent=0.6),
}


def endless() -> int:
    return 10**9


def adaptive(world: World, max_width: int = 64) -> AdaptiveSchedule | RetrievalSchedule:
    return (RetrievalSchedule if world.silent else AdaptiveSchedule)(max_width, endless)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", USELESS)
def test_a_useless_drafter_costs_less_than_five_percent(name, seed):
    world = USELESS[name]
    plain = generate(FixedSchedule(1, endless), world, 3000, seed).speed
    assert generate(adaptive(world), world, 3000, seed).speed > 0.95 * plain


def test_without_a_budget_the_same_drafter_would_cost_more():
    world = USELESS["on a cpu"]
    plain = generate(FixedSchedule(1, endless), world, 3000).speed
    assert generate(FixedSchedule(4, endless), world, 3000).speed < 0.6 * plain


@pytest.mark.parametrize("name", USEFUL)
def test_a_useful_drafter_runs_within_five_percent_of_its_best_width(name):
    world = USEFUL[name]
    best = max(generate(FixedSchedule(w, endless), world, 12_000).speed for w in BUCKETS[:-1])
    assert generate(adaptive(world), world, 12_000).speed > 0.95 * best


def test_wide_when_acceptance_is_high_and_narrow_when_it_falls():
    high, low = USEFUL["great"], World(accept=(0.3,), verify=MIDDLE)
    schedule = adaptive(high)
    generate(schedule, high, 1000)
    assert max(schedule.plan().width for _ in range(2)) >= 16
    generate(schedule, low, 1000)
    assert max(schedule.plan().width for _ in range(2)) <= 4


def test_a_drafter_that_becomes_useful_is_noticed():
    bad = World(accept=(0.02,), verify=MIDDLE, draft_per_node=0.05)
    good = World(accept=(0.9,), verify=MIDDLE, draft_per_node=0.05)
    schedule = adaptive(bad)
    assert generate(schedule, bad, 1000).steps > 900
    generate(schedule, good, 3000)
    assert generate(schedule, good, 1000).speed > 2


def test_one_slow_first_step_of_a_width_is_forgiven():
    """With torch.compile the first step of every width holds a compilation."""
    world = World(accept=(0.9,), verify=FLAT, noise=0.0)
    schedule, seen, tally = adaptive(world), set(), []
    rng = random.Random(0)
    for _ in range(200):
        record = world.step(schedule.plan().width, rng)
        if record.width not in seen:
            seen.add(record.width)
            fields = {name: getattr(record, name) for name in StepRecord.__slots__}
            record = StepRecord(**(fields | {"other_time_s": 300.0}))
        schedule.observe(record)
        tally.append(record.width)
    assert min(tally[-10:]) >= 8


def test_it_warns_once_with_figures(caplog):
    world = USELESS["on a cpu"]
    schedule = adaptive(world)
    with caplog.at_level(logging.WARNING, logger="mmspec"):
        generate(schedule, world, 2000)
    assert len(caplog.records) == 1
    text = caplog.records[0].getMessage()
    assert "speculation does not pay here" in text
    assert "against 10" in text  # plain decoding takes 1.0 s and a little: 10xx.x ms
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="mmspec"):
        generate(adaptive(USEFUL["good"]), USEFUL["good"], 2000)
    assert not caplog.records


def test_widths_of_trees_are_judged_by_their_depth():
    """A wide tree is no deeper than a narrow one; it must not count as a long chain."""

    class Trees(World):
        def step(self, width, rng, index=0):
            chain = World.step(self, width, rng, index)
            levels = min(chain.num_levels[0], 3)
            fields = {name: getattr(chain, name) for name in StepRecord.__slots__}
            accepted = min(chain.num_accepted[0], levels)
            fields |= {"num_levels": (levels,), "num_accepted": (accepted,)}
            return StepRecord(**(fields | {"num_emitted": (accepted + 1,)}))

    world = Trees(accept=(0.9,), verify=MIDDLE)
    best = generate(FixedSchedule(4, endless), world, 5000).speed
    assert generate(adaptive(world), world, 5000).speed > 0.95 * best


def test_a_batch_counts_rows_that_are_done_as_nothing():
    schedule = AdaptiveSchedule(8, endless)
    for _ in range(200):
        width = schedule.plan().width
        schedule.observe(
            StepRecord(
                index=0,
                width=width,
                num_drafted=(width - 1, 0),
                num_levels=(width - 1, 0),
                num_accepted=(width - 1, 0),
                num_emitted=(width, 0),
                was_active=(True, False),
                draft_time_s=0.0,
                verify_time_s=1.0 + 0.01 * width,
                other_time_s=0.0,
            )
        )
    assert schedule.plan().width == 8


def test_a_batch_is_as_fast_as_its_slowest_row():
    """One row accepts everything, the other nothing: wide steps would end the batch later."""
    schedule = AdaptiveSchedule(8, endless)
    widths = []
    for _ in range(200):
        width = schedule.plan().width
        widths.append(width)
        schedule.observe(
            StepRecord(
                index=0,
                width=width,
                num_drafted=(width - 1, width - 1),
                num_levels=(width - 1, width - 1),
                num_accepted=(width - 1, 0),
                num_emitted=(width, 1),
                was_active=(True, True),
                draft_time_s=0.0,
                verify_time_s=1.0 + 0.2 * width,
                other_time_s=0.0,
            )
        )
    assert widths[20:].count(1) > 150


@pytest.mark.parametrize("make", [FixedSchedule, AdaptiveSchedule])
def test_width_is_clamped_at_the_end_of_the_rows(make):
    left = [100]
    schedule = make(32, lambda: left[0])
    generate(schedule, USEFUL["great"], 500)
    for remaining, most in [(20, 32), (5, 8), (3, 4), (1, 2), (0, 1)]:
        left[0] = remaining
        assert max(schedule.plan().width for _ in range(3)) <= most
    if make is FixedSchedule:
        left[0] = 5
        assert schedule.plan().width == 8


@pytest.mark.parametrize("make", [FixedSchedule, AdaptiveSchedule])
@pytest.mark.parametrize("width", [0, 129])
def test_widths_out_of_range_are_refused(make, width):
    with pytest.raises(ValueError, match=f"between 1 and 128, got {width}"):
        make(width, endless)


def test_a_schedule_of_width_one_is_plain_decoding():
    schedule = AdaptiveSchedule(1, endless)
    assert {schedule.plan().width for _ in range(100)} == {1}


def test_a_drafter_that_is_never_silent_gets_its_plain_steps_too():
    world = World(accept=(0.05,), verify=LINEAR)
    schedule = RetrievalSchedule(64, endless)
    widths = []
    rng = random.Random(0)
    for _ in range(100):
        widths.append(schedule.plan().width)
        schedule.observe(world.step(widths[-1], rng))
    assert widths[50:].count(1) > 40


@pytest.mark.parametrize("make", [FixedSchedule, AdaptiveSchedule])
def test_the_first_step_is_plain_until_it_was_made(make):
    schedule = make(16, endless)
    assert [schedule.plan().width for _ in range(3)] == [1, 1, 1]
    schedule.observe(USEFUL["great"].step(1, random.Random(0)))
    assert schedule.plan().width > 1


@pytest.mark.parametrize("make", [AdaptiveSchedule, RetrievalSchedule])
@pytest.mark.parametrize("first_s", [0.0, 1e-9, 1e6])
def test_nothing_is_learnt_from_the_first_step(first_s, make):
    """The prefill answers it, so its seconds are not those of a plain step."""

    def widths(free_s):
        schedule, rng = make(32, endless), random.Random(1)
        planned = []
        for index in range(300):
            planned.append(schedule.plan().width)
            world = USELESS["poor"] if index % 100 < 50 else USEFUL["decaying"]
            record = world.step(planned[-1], rng, index)
            if index == 0:
                record = dataclasses.replace(record, verify_time_s=free_s)
            schedule.observe(record)
        return planned

    assert widths(first_s) == widths(1.0)
    # Behind the free step it begins as ever: one step with drafts, then two plain ones to time.
    if make is AdaptiveSchedule:
        assert [width > 1 for width in widths(first_s)[:5]] == [False, True, False, False, True]


def record(width, seconds, accepted=0):
    return StepRecord(
        index=0,
        width=width,
        num_drafted=(width - 1,),
        num_levels=(width - 1,),
        num_accepted=(accepted,),
        num_emitted=(accepted + 1,),
        was_active=(True,),
        draft_time_s=0.0,
        verify_time_s=seconds,
        other_time_s=0.0,
    )


def free_schedule(costs=None):
    schedule = RetrievalSchedule(16, endless, costs=costs)
    schedule.observe(record(1, 0.0))  # the step that the prefill answers
    return schedule


def test_a_free_drafter_is_told_what_its_drafts_must_bring():
    costs = {1: [1.0] * 3, 2: [1.0] * 3, 4: [1.5] * 3, 8: [2.0] * 3, 16: [3.0] * 3}
    schedule = free_schedule(costs)
    share = schedule.LENIENCE
    plan = schedule.plan()
    assert plan.width == 16
    assert plan.prices == pytest.approx({2: 0.0, 4: 0.5 * share, 8: share, 16: 2 * share})
    # Looking for drafts took half a plain step, which is spent whatever is verified then.
    prices = free_schedule(costs | {IN_VAIN: [1.5] * 3}).plan().prices
    assert prices == pytest.approx({2: 0.0, 4: 0.0, 8: 0.5 * share, 16: 1.5 * share})


def test_the_time_of_looking_in_vain_is_not_that_of_a_plain_step():
    schedule = free_schedule({1: [1.0] * 3})
    for _ in range(3):
        assert schedule.plan().width == 16
        schedule.observe(record(1, 1.8))
    assert list(schedule.costs[1]) == [1.0] * 3
    assert list(schedule.costs[IN_VAIN]) == [1.8] * 3


def test_a_plain_step_behind_an_asked_one_is_not_what_plain_decoding_costs():
    """Lone plain steps take longer; drafts that only beat those rest all the same."""
    schedule, asked, known = free_schedule({1: [1.0] * 3}), [True], set()
    for _ in range(700):
        asked.append(schedule.plan().width > 1)
        is_lone = asked[-2] and not asked[-1]
        schedule.observe(record(4, 2.3, 1) if asked[-1] else record(1, 1.3 if is_lone else 1.0))
        known |= set(schedule.costs[1])
    assert known == {1.0}
    assert 0.3 * sum(asked) < 0.06 * len(asked)


def test_something_new_to_draft_from_ends_a_rest():
    def plans(wakes_at):
        schedule, planned = free_schedule({1: [1.0] * 3}), []
        for step in range(400):
            if step == wakes_at:
                schedule.wake()
            planned.append(schedule.plan().width > 1)
            # What is asked before the news brings nothing, and then it is all accepted.
            is_good = planned[-1] and step >= wakes_at
            lost = record(4, 3.0) if planned[-1] else record(1, 1.0)
            schedule.observe(record(16, 3.0, 15) if is_good else lost)
        return planned

    asleep = plans(10**6)
    assert not any(asleep[60:70])
    woken = plans(60)
    assert woken[:60] == asleep[:60]
    assert all(woken[60:])


def test_news_that_bring_nothing_are_not_believed_for_long():
    schedule, asked = free_schedule({1: [1.0] * 3}), 0
    for step in range(1000):
        if step % 100 == 50:
            schedule.wake()
        is_asked = schedule.plan().width > 1
        asked += is_asked
        schedule.observe(record(4, 3.0) if is_asked else record(1, 1.0))
    # Each asked step loses two plain ones. Ten whole bounds would be more than a tenth of the time.
    assert 2.0 * asked < 0.1 * 1000


def test_drafts_that_do_not_pay_rest_longer_and_longer_until_they_do():
    schedule, asked = free_schedule({1: [1.0] * 3}), []
    for _ in range(700):
        asked.append(schedule.plan().width > 1)
        schedule.observe(record(1, 1.5 if asked[-1] else 1.0))
    runs = "".join("?" if one else "." for one in asked).split("?")
    assert [len(run) for run in runs if len(run) > 1][:4] == [32, 64, 128, 256]
    assert 0.5 * sum(asked) < 0.05 * len(asked)
    while schedule.plan().width == 1:
        schedule.observe(record(1, 1.0))
    for _ in range(20):
        schedule.observe(record(16, 1.5, 15))
        assert schedule.plan().width == 16


def test_other_drafters_are_told_no_prices():
    schedule = AdaptiveSchedule(16, endless)
    schedule.observe(record(1, 0.0))
    assert schedule.plan().prices == {}


def test_a_free_drafter_is_plain_first_and_once_more_unless_it_gains_much():
    slow, fast = free_schedule(), free_schedule()
    slow_widths, fast_widths = [], []
    for _ in range(40):
        for schedule, widths, accepted in ((slow, slow_widths, 1), (fast, fast_widths, 7)):
            width = schedule.plan().width
            widths.append(width)
            took = record(width, 1 + 0.01 * width, accepted if width > 1 else 0)
            schedule.observe(took)
    assert slow_widths[0] == fast_widths[0] == 1  # what a draft must bring is not known before
    # The second time takes two steps, for the one behind a draft is not timed.
    assert slow_widths.count(1) == 3
    assert fast_widths.count(1) == 1


def test_costs_are_carried_over_but_soon_replaced():
    schedule = free_schedule({1: [9.0] * 9, 16: [9.0] * 9})
    for _ in range(4):
        schedule.plan()
        schedule.observe(record(16, 1.0))
    assert schedule.plan().prices[16] == 0.0
    assert list(schedule.costs[1]) == [9.0] * 3
    assert list(schedule.costs[16]) == [9.0] * 3 + [1.0] * 4


#: What asking costs in plain steps and how many drafts are accepted, behind so many units.
SCRIPTS = {
    "nearly two units for more than two steps": lambda units, dice: (2.2, int(dice.random() < 0.9)),
    "runs of copies": lambda units, dice: (2.0, 15) if units % 100 < 24 else (1.15, 0),
    "useless, then good": lambda units, dice: (2.0, 3 * (units >= 1750)),
    "good, then useless": lambda units, dice: (2.0, 3 * (units < 1750)),
    "good": lambda units, dice: (1.6, int(dice.random() < 0.9)),
}


def scripted(make, script, seed, *, pause_every=0):
    """Units per plain step over ten pages of 350 units.

    Times are spread as on a busy machine. Neither the spread nor pauses of ten steps count.
    """
    dice, costs, seconds, units, steps = random.Random(seed), {}, 0.0, 0, 0
    for page in range(10):
        left = [480]
        schedule = make(lambda left=left: left[0], costs)
        schedule.observe(record(1, 0.0))
        while units < 350 * (page + 1):
            steps += 1
            took, accepted = script(units, dice) if schedule.plan().width > 1 else (1.0, 0)
            spread = dice.lognormvariate(0.0, 0.15)
            if pause_every and steps % pause_every == 0:
                spread *= 10.0
            schedule.observe(record(16 if took > 1.5 else 1, took * spread, accepted))
            seconds += took
            units += accepted + 1
            left[0] = 480 - units + 350 * page
        costs = getattr(schedule, "costs", {})
    return units / seconds


@pytest.mark.parametrize("pause_every", [0, 50])
@pytest.mark.parametrize("name", SCRIPTS)
def test_asking_loses_little_against_the_better_of_always_and_never(name, pause_every):
    def speed(make):
        runs = [scripted(make, SCRIPTS[name], seed, pause_every=pause_every) for seed in range(2)]
        return sum(runs) / 2

    best = max(speed(lambda left, _, w=w: FixedSchedule(w, left)) for w in (1, 16))
    assert speed(lambda left, costs: RetrievalSchedule(16, left, costs=costs)) > 0.94 * best


def test_steps_whose_cost_varies_are_not_taken_for_their_median():
    """Two of five steps take half as long again: drafts that pay at the median lose time."""
    schedule, asked = free_schedule({1: [1.0] * 3}), []
    for _ in range(700):
        asked.append(schedule.plan().width > 1)
        seconds = 1.6 + 0.8 * (sum(asked) % 5 < 2)
        schedule.observe(record(8, seconds, sum(asked) % 5 > 0) if asked[-1] else record(1, 1.0))
    assert sum(asked) < 250
