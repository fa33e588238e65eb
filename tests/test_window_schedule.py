"""The chosen window against every fixed one, in worlds of scripted images and seconds."""

import bisect
import dataclasses
import itertools
import math
import random

import numpy as np
import pytest
import torch
from simulate import Pictures

from mmspec.adapters.token_image import image_family
from mmspec.assets import bundled_names
from mmspec.law_config import LawConfig
from mmspec.pipelines.image import SpeculativeImagePipeline, image_engine
from mmspec.records import StepRecord
from mmspec.sampling import build_law
from mmspec.schedule import FixedSchedule
from mmspec.tree import BUCKETS
from mmspec.window_schedule import WindowMemory, WindowSchedule, settled_units

# Milliseconds of a forward of the avatars with guidance on two cores, for 1 and for 8 images, at
# the widths of BUCKETS (benchmarks/results/).
FLOAT32 = (
    (5.37, 5.35, 5.68, 6.50, 7.71, 9.87, 14.9, 21.2),
    (8.66, 9.47, 11.3, 16.3, 22.9, 39.8, 71.0, 169),
)
BFLOAT16 = (
    (7.99, 7.95, 7.91, 8.28, 8.63, 9.59, 13.0, 16.0),
    (23.2, 22.8, 23.8, 28.2, 32.1, 41.1, 51.1, 79.1),
)


def measured(table):
    def seconds(num_rows: int, width: int) -> float:
        at = min(bisect.bisect_left(BUCKETS, width), len(BUCKETS) - 1)
        one, eight = (1e-3 * times[at] for times in table)
        return one + (eight - one) * (num_rows - 1) / 7

    return seconds


COSTS = {
    "memory-bound": lambda rows, width: 1.0 + 0.0003 * rows * width,
    "two cores, float32": measured(FLOAT32),
    "two cores, bfloat16": measured(BFLOAT16),
    "compute-bound": lambda rows, width: 0.7 + 0.3 * rows * width,
    "nothing but compute": lambda rows, width: 1.0 * rows * width,
}
PICTURES = {
    "easy": {"hard": 0.08, "ahead": 130},
    "hard": {"hard": 0.25, "ahead": 80},
    "hopeless": {"hard": 1.0, "ahead": 5, "fresh": 0.0},
}
CASES = [(cost, kind, rows) for cost in COSTS for kind in PICTURES for rows in (1, 8)]


def fixed(width):
    return lambda remaining, num_active: FixedSchedule(width, remaining)


def chosen(memory):
    return lambda remaining, num_active: WindowSchedule(128, remaining, num_active, memory)


def speed(world, make, num_images, seeds) -> float:
    runs = [world.generate(make, num_images, seed) for seed in seeds]
    return sum(run.units for run in runs) / sum(run.seconds for run in runs)


@pytest.fixture(scope="module")
def results():
    """Speed of the chosen window over that of the best fixed one, and over plain decoding."""
    found = {}
    for cost, kind, num_images in CASES:
        world = Pictures(seconds=COSTS[cost], **PICTURES[kind])
        seeds = range(8) if num_images == 1 else range(4)
        speeds = {width: speed(world, fixed(width), num_images, seeds) for width in BUCKETS}
        mine = speed(world, chosen(WindowMemory()), num_images, seeds)
        found[cost, kind, num_images] = (mine / max(speeds.values()), mine / speeds[1])
    return found


@pytest.mark.parametrize("case", CASES)
def test_within_ten_percent_of_the_best_fixed_window(case, results):
    assert results[case][0] > 0.9


def test_within_four_percent_on_the_whole(results):
    ratios = [math.log(ratio) for ratio, _ in results.values()]
    assert math.exp(sum(ratios) / len(ratios)) > 0.965


@pytest.mark.parametrize("case", CASES)
def test_never_below_95_percent_of_plain_decoding(case, results):
    assert results[case][1] > 0.95


def replayed(cost, kind, sizes, num_calls):
    """Speed of later calls over that of the best fixed window, by images per call, in turns."""
    world = Pictures(seconds=COSTS[cost], growth=0.5, **PICTURES[kind])
    best = {
        size: max(speed(world, fixed(width), size, range(num_calls)) for width in BUCKETS)
        for size in sizes
    }
    memory = WindowMemory()
    runs = [
        (size, world.generate(chosen(memory), size, seed))
        for seed in range(num_calls)
        for size in sizes
    ]
    own = {size: [run for one, run in runs if one == size] for size in sizes}
    return {
        size: sum(run.units for run in of) / sum(run.seconds for run in of) / best[size]
        for size, of in own.items()
    }


@pytest.mark.parametrize("kind", ["easy", "hard"])
@pytest.mark.parametrize("cost", ["two cores, float32", "two cores, bfloat16"])
@pytest.mark.parametrize("sizes", [(1,), (8,), (1, 4, 16)])
def test_near_the_best_fixed_window_where_steps_grow_along_the_images(cost, kind, sizes):
    ratios = replayed(cost, kind, sizes, 6)
    assert min(ratios.values()) > 0.88
    assert math.prod(ratios.values()) ** (1 / len(sizes)) > 0.93


# --------------------------------------------------------------------------- real images


class Scripted:
    """A schedule whose steps take the seconds of a table, whatever the clock says."""

    def __init__(self, schedule, seconds):
        self.schedule, self.seconds = schedule, seconds
        self.steps = []
        self.has_begun = False

    def plan(self):
        return self.schedule.plan()

    def observe(self, record):
        step = sum(record.was_active), record.width
        seconds = self.seconds(*step) if self.has_begun else 0.0
        # The first step has no forward of its own.
        self.steps += [step] * self.has_begun
        self.has_begun = True
        times = {"draft_time_s": 0.0, "other_time_s": 0.0, "verify_time_s": seconds}
        self.schedule.observe(dataclasses.replace(record, **times))


@pytest.mark.slow
@pytest.mark.skipif("avatars" not in bundled_names(), reason="needs the avatars")
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_first_images_of_the_avatars_are_near_the_best_fixed_window(guidance):
    pipe = SpeculativeImagePipeline.from_pretrained("bundled:avatars")
    family = image_family(pipe.model)
    layout = family.layout(None, None)
    captions = ["a pixel avatar with red hair and glasses", "a pixel avatar with a blue hat"]
    # A single image may take more forwards at 32 than at 16, by chance.
    images = [(caption, seed) for caption in captions for seed in range(8)]

    def steps(image, seconds, make):
        caption, seed = image
        engine, rows = image_engine(
            family,
            layout,
            [pipe._prompt_ids(caption)],
            rule="exact",
            law=build_law(LawConfig(temperature=1.0)),
            window=BUCKETS[-1],
            guidance_scale=guidance,
            keys_B=torch.tensor([seed]),
            device=pipe.device,
        )
        engine.schedule = Scripted(
            make(lambda: rows.max_remaining, lambda: len(rows.active)), seconds
        )
        engine.run()
        return engine.schedule.steps

    runs = {
        w: [s for i in images for s in steps(i, lambda *_: 0.0, fixed(w))] for w in (8, 16, 32, 64)
    }
    for table in (measured(FLOAT32), measured(BFLOAT16)):
        best = min(sum(table(*step) for step in run) for run in runs.values())
        own = [s for i in images for s in steps(i, table, chosen(WindowMemory()))]
        mine = sum(table(*step) for step in own)
        assert best / mine > 0.92
        assert len(images) * 255 * table(1, 1) / mine > 0.95


# --------------------------------------------------------------------------- parts


def record(width, seconds=1.0, units=1, num_rows=1):
    return StepRecord(
        index=0,
        width=width,
        num_drafted=(width - 1,) * num_rows,
        num_levels=(width - 1,) * num_rows,
        num_accepted=(units - 1,) * num_rows,
        num_emitted=(units,) * num_rows,
        was_active=(True,) * num_rows,
        draft_time_s=0.0,
        verify_time_s=seconds,
        other_time_s=0.0,
    )


def endless() -> int:
    return 10**9


def one() -> int:
    return 1


def test_a_settled_window_brings_one_unit_at_least_and_the_limit_at_most():
    for limit in (1.0, 3.0, 10.0):
        units = [round(settled_units(width, limit), 9) for width in BUCKETS]
        assert units[0] == 1
        assert units == sorted(units)
        assert units[-1] <= limit
    assert settled_units(10**6, 10.0) == pytest.approx(10, rel=0.01)


def counted(memory, width, num_rows, num_units, num_steps=1):
    for _ in range(num_steps):
        memory.note(num_rows, width, 1.0)
        memory.count(num_units)
        memory.learn()


def units(memory):
    return dict(zip(BUCKETS, np.exp(memory.log_units()), strict=True))


def test_the_curve_follows_what_was_counted():
    memory = WindowMemory()
    before = units(memory)
    assert before[1] == pytest.approx(1)
    assert before[16] < before[64]
    counted(memory, 16, 8, 8 * 2, num_steps=100)
    after = units(memory)
    assert after[16] == pytest.approx(2, rel=0.02)
    assert after[64] < 0.6 * before[64]
    counted(memory, 16, 8, 8 * 5, num_steps=2000)
    assert units(memory)[16] == pytest.approx(5, rel=0.02)
    assert sum(memory.trials) <= memory.SPAN


def test_steps_that_were_noted_together_count_as_one_after_another():
    one, many = WindowMemory(), WindowMemory()
    for memory in (one, many):
        for step in range(10):
            memory.note(2, 8, 1.0 + 0.01 * step)
            memory.count(7.0)
            if memory is one:
                memory.learn()
        memory.learn()
    assert sum(one.trials) == pytest.approx(sum(many.trials), rel=0.02) == pytest.approx(20, 0.02)
    assert one.log_units() == pytest.approx(many.log_units(), abs=0.01)
    assert one.costs.of(2)[0] == pytest.approx(many.costs.of(2)[0], abs=0.05)


def test_the_first_step_is_plain_and_teaches_nothing():
    memory = WindowMemory()
    schedule = WindowSchedule(64, endless, one, memory)
    before = memory.costs.of(1)[0].copy()
    assert [schedule.plan().width for _ in range(2)] == [1, 1]
    schedule.observe(record(1, 1e9))
    assert memory.costs.of(1)[0] == pytest.approx(before)
    widths = []
    for _ in range(6):
        widths.append(schedule.plan().width)
        schedule.observe(record(widths[-1]))
    assert widths == [8, 1, 16, 32, 64, 64]  # the probes, then where steps of one cost lead


def test_where_wide_steps_are_dear_none_is_tried():
    schedule = WindowSchedule(128, endless, one)
    schedule.observe(record(1))
    widths = []
    for _ in range(40):
        widths.append(schedule.plan().width)
        schedule.observe(record(widths[-1], seconds=0.1 + 0.9 * widths[-1]))
    assert max(widths) == 8
    assert widths.count(8) == 1


def test_what_a_call_found_serves_the_next():
    memory = WindowMemory()
    world = Pictures(seconds=COSTS["two cores, float32"], **PICTURES["easy"])
    world.generate(chosen(memory), 1)
    before = memory.trials.copy()
    schedule = WindowSchedule(128, endless, one, memory)
    assert 0 < sum(memory.trials) < sum(before) + 8  # the last steps of the call are counted yet
    schedule.observe(record(1))
    assert schedule.plan().width >= 16


def known(costs):
    """A memory that has seen much of steps with these costs, by width."""
    memory = WindowMemory()
    for _ in range(40):
        for width, seconds in costs.items():
            memory.note(1, width, seconds)
    memory.learn()
    return memory


def begun(memory, remaining=endless):
    schedule = WindowSchedule(128, remaining, one, memory)
    schedule.observe(record(1))
    return schedule


@pytest.mark.parametrize(("better", "is_taken"), [(1.02, False), (1.2, True)])
def test_a_little_better_is_no_reason_to_change(better, is_taken):
    usual = units(WindowMemory())
    costs = {width: usual[width] / (1.2 if width == 16 else 1.0) for width in BUCKETS}
    schedule = begun(known(costs))
    assert schedule.plan().width == 16
    costs[32] /= 1.2 * better
    schedule.memory = known(costs)
    widths = [schedule.plan().width for _ in range(20)]
    assert set(widths) == ({32} if is_taken else {16})


def test_a_choice_that_was_confirmed_stands_for_some_steps():
    usual = units(WindowMemory())
    costs = {width: usual[width] / (1.2 if width == 16 else 1.0) for width in BUCKETS}
    schedule = begun(known(costs))
    assert [schedule.plan().width for _ in range(2)] == [16, 16]
    costs[32] /= 2
    schedule.memory = known(costs)
    widths = [schedule.plan().width for _ in range(schedule.PATIENCE)]
    assert widths == [16] * (schedule.PATIENCE - 1) + [32]


def test_what_is_not_known_may_be_cheaper_than_thought():
    usual = units(WindowMemory())
    # As good as the present width, if steps of 64 cost what those of 32 make one think.
    memory = known({16: usual[16], 32: 1.02 * usual[32]})
    schedule = begun(memory)
    schedule.OPTIMISM = 0.0
    assert {schedule.plan().width for _ in range(20)} == {16}
    schedule.OPTIMISM = 3.0
    assert 64 in {schedule.plan().width for _ in range(20)}


def test_a_window_is_not_widened_for_the_last_steps():
    left = [10**6]
    usual = units(WindowMemory())
    narrow, wide = (
        known({w: usual[w] / (1.3 if w == best else 1) for w in BUCKETS}) for best in (8, 64)
    )
    schedule = begun(narrow, lambda: left[0])
    assert schedule.plan().width == 8
    schedule.memory = wide
    left[0] = 30
    assert {schedule.plan().width for _ in range(20)} == {8}
    left[0] = 60
    assert {schedule.plan().width for _ in range(20)} == {8, 64}


def test_compilations_are_no_measure():
    seen = set()

    def seconds(num_rows, width):
        compilation = 0.0 if (num_rows, width) in seen else 60.0
        seen.add((num_rows, width))
        return measured(FLOAT32)(num_rows, width) + compilation

    world = Pictures(seconds=seconds, **PICTURES["easy"])
    memory = WindowMemory()
    for seed in range(3):
        world.generate(chosen(memory), 8, seed)
    warm = Pictures(seconds=measured(FLOAT32), **PICTURES["easy"])
    best = max(speed(warm, fixed(width), 8, range(3, 7)) for width in BUCKETS)
    assert speed(warm, chosen(memory), 8, range(3, 7)) > 0.9 * best


def test_disturbances_are_not_put_down_to_the_widths_that_run():
    def moment(elapsed):
        """Half of the time, in turns of 0.6 seconds, all steps take 1.7 times as long."""
        return 1.7 if int(elapsed / 0.6) % 2 else 1.0

    ratios = []
    for cost, kind in itertools.product(["float32", "bfloat16"], ["easy", "hard"]):
        seconds = COSTS[f"two cores, {cost}"]
        world = Pictures(seconds=seconds, growth=0.4, moment=moment, **PICTURES[kind])
        memory = WindowMemory()
        world.generate(chosen(memory), 8, 99)
        best = max(speed(world, fixed(width), 8, range(6)) for width in BUCKETS)
        ratios.append(speed(world, chosen(memory), 8, range(6)) / best)
    assert min(ratios) > 0.93
    assert math.prod(ratios) ** (1 / 4) > 0.96


def test_fewer_rows_get_a_wider_window():
    world = Pictures(seconds=COSTS["two cores, float32"], **PICTURES["easy"])
    memory = WindowMemory()
    for seed in range(2):
        world.generate(chosen(memory), 8, seed)
    active = [8]
    schedule = WindowSchedule(128, endless, lambda: active[0], memory)
    schedule.observe(record(1))
    wide = schedule.plan().width
    active[0] = 1
    assert schedule.plan().width > wide


@pytest.mark.parametrize(("num_waiting", "expected"), [(0, 3.0), (1, 5.0)])
def test_half_of_what_counts_is_the_slowest_row_unless_others_wait(num_waiting, expected):
    memory = WindowMemory()
    schedule = WindowSchedule(64, endless, lambda: 2, memory, lambda: num_waiting)
    schedule.observe(record(1, num_rows=2))
    for _ in range(40):
        step = record(schedule.plan().width, num_rows=2)
        schedule.observe(dataclasses.replace(step, num_emitted=(1, 9)))
    memory.learn()
    place = memory.trials.argmax()
    assert memory.units[place] / memory.trials[place] == pytest.approx(expected)


def test_the_window_ends_with_the_rows():
    left = [100]
    schedule = WindowSchedule(64, lambda: left[0], one)
    rng = random.Random(0)
    for _ in range(20):
        schedule.observe(record(schedule.plan().width, 1 + 0.01 * rng.random(), units=4))
    for remaining, most in [(5, 8), (3, 4), (1, 2), (0, 1)]:
        left[0] = remaining
        assert schedule.plan().width <= most


@pytest.mark.parametrize("width", [0, 24, 129])
def test_widths_out_of_range_are_refused(width):
    with pytest.raises(ValueError, match=f"one of .*, got {width}"):
        WindowSchedule(width, endless, one)
