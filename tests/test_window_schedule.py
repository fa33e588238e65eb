"""The chosen window against every fixed one, in worlds of scripted images and seconds."""

import bisect
import dataclasses
import math
import random

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
        seeds = range(8) if num_images == 1 else range(2)
        speeds = {width: speed(world, fixed(width), num_images, seeds) for width in BUCKETS}
        mine = speed(world, chosen(WindowMemory()), num_images, seeds)
        found[cost, kind, num_images] = (mine / max(speeds.values()), mine / speeds[1])
    return found


@pytest.mark.parametrize("case", CASES)
def test_within_ten_percent_of_the_best_fixed_window(case, results):
    assert results[case][0] > 0.9


def test_within_five_percent_on_the_whole(results):
    ratios = [math.log(ratio) for ratio, _ in results.values()]
    assert math.exp(sum(ratios) / len(ratios)) > 0.95


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
    assert min(ratios.values()) > 0.84
    assert math.prod(ratios.values()) ** (1 / len(sizes)) > 0.9


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
    images = [(caption, seed) for caption in captions for seed in (7, 8, 9)]

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
        assert best / mine > 0.9
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


def test_the_curve_follows_what_was_counted():
    memory = WindowMemory()
    before = memory.expected()
    assert before(1) == pytest.approx(1)
    assert before(16) < before(64)
    for _ in range(100):
        memory.count(16, 8, 8 * 2)
    after = memory.expected()
    assert after(16) == pytest.approx(2, rel=0.02)
    assert after(64) < 0.6 * before(64)
    for _ in range(2000):
        memory.count(16, 8, 8 * 5)
    assert memory.expected()(16) == pytest.approx(5, rel=0.02)
    assert sum(memory.trials.values()) <= memory.SPAN


def without_doubt():
    memory = WindowMemory()
    memory.DOUBT = memory.OLD_DOUBT = 0.0
    return memory


def test_costs_of_other_widths_and_rows_lie_on_a_line():
    memory = without_doubt()
    assert memory.cost(1, 8) is None
    for rows, width in ((8, 1), (8, 8)):
        memory.costs[rows, width].extend([(2.0 + 0.1 * rows * width, 0.0)] * 3)
    assert memory.cost(8, 8) == pytest.approx(8.4)
    assert memory.cost(8, 16) == pytest.approx(14.8)
    assert memory.cost(2, 16) == pytest.approx(5.2)
    # A slow first step of a width (a compilation) is no measure; of two the faster counts.
    memory.costs[8, 16].append((300.0, 0.0))
    assert memory.cost(8, 16) == pytest.approx(14.8)
    memory.costs[8, 16].append((15.0, 0.0))
    assert memory.cost(8, 16) == 15.0


def test_costs_that_fall_with_the_width_make_a_flat_line():
    memory = without_doubt()
    memory.costs[1, 1].append((1.1, 0.0))
    memory.costs[1, 8].append((1.0, 0.0))
    assert 1.0 <= memory.cost(1, 128) < 1.1


def test_the_first_step_is_plain_and_teaches_nothing():
    memory = WindowMemory()
    schedule = WindowSchedule(64, endless, one, memory)
    assert [schedule.plan().width for _ in range(2)] == [1, 1]
    schedule.observe(record(1, 1e9))
    assert not memory.costs
    widths = []
    for _ in range(8):
        widths.append(schedule.plan().width)
        schedule.observe(record(widths[-1]))
    assert widths == [8, 1, 1, 8, 16, 16, 32, 64]  # the probes, then where a flat line leads


def test_a_wide_window_is_not_probed_where_a_narrower_one_is_dear():
    memory = WindowMemory()
    schedule = WindowSchedule(128, endless, one, memory)
    schedule.observe(record(1))
    for _ in range(20):
        width = schedule.plan().width
        schedule.observe(record(width, seconds=0.1 + 0.9 * width))
    assert {width for _, width in memory.costs} <= {1, 2, 4, 8}


def test_a_line_alone_leads_to_twice_the_width_at_most():
    memory = WindowMemory()
    for width in (1, 8):
        memory.costs[1, width].extend([(1.0, 0.0)] * 3)
    schedule = WindowSchedule(128, endless, one, memory)
    schedule.observe(record(1))
    widths = []
    for _ in range(3):
        widths.append(schedule.plan().width)
        schedule.observe(record(widths[-1]))
    assert widths == [16, 32, 64]


def test_what_a_call_found_serves_the_next():
    memory = WindowMemory()
    world = Pictures(seconds=COSTS["two cores, float32"], **PICTURES["easy"])
    world.generate(chosen(memory), 1)
    schedule = WindowSchedule(128, endless, one, memory)
    schedule.observe(record(1))
    assert schedule.plan().width >= 16
    assert all(len(samples) <= memory.CARRIED for samples in memory.costs.values())


def test_what_the_last_call_did_not_measure_is_an_upper_bound():
    memory = without_doubt()
    for width, seconds in ((1, 1.0), (8, 1.0), (32, 9.0)):
        for _ in range(3):
            memory.note_cost(1, width, seconds)
    memory.begin_call()
    assert memory.cost(1, 32) == 9.0
    for width in (1, 8):
        memory.note_cost(1, width, 1.0)
    memory.begin_call()
    assert memory.cost(1, 32) == pytest.approx(1.0)  # as the line through the others says


def test_a_little_better_is_no_reason_to_change():
    memory = WindowMemory()
    memory.costs[1, 1].extend([(1.0, 0.0)] * 3)
    schedule = WindowSchedule(128, endless, one, memory)
    schedule.observe(record(1))
    units = memory.expected()
    for width in BUCKETS[1:]:
        seconds = units(width) / (1.2 if width == 16 else 1.1)
        memory.costs[1, width].extend([(seconds, 0.0)] * 3)
    assert schedule.plan().width == 16
    memory.costs[1, 32].extend([(units(32) / 1.23, 0.0)] * 9)
    assert schedule.plan().width == 16
    memory.costs[1, 32].extend([(units(32) / 1.3, 0.0)] * 9)
    # A choice that was confirmed stands for some steps.
    widths = [schedule.plan().width for _ in range(schedule.PATIENCE)]
    assert widths == [16] * (schedule.PATIENCE - 1) + [32]


def test_what_was_never_measured_is_doubted_by_its_distance():
    memory, certain = WindowMemory(), without_doubt()
    for one in (memory, certain):
        for width in (1, 1, 8, 8):
            one.note_cost(8, width, 2.0 + 0.8 * width)
    assert memory.cost(8, 8) == certain.cost(8, 8)
    shares = [memory.cost(*cell) / certain.cost(*cell) for cell in ((8, 16), (8, 32), (16, 32))]
    assert shares == pytest.approx([2**-0.2, 4**-0.2, 4**-0.2 * 2**-0.4])


def test_what_a_call_has_not_measured_itself_is_doubted():
    memory = WindowMemory()
    for width in (1, 1, 8, 8):
        memory.note_cost(1, width, 2.0)
    memory.begin_call()
    assert memory.cost(1, 8) == pytest.approx(2.0 * math.exp(-0.08))
    memory.note_cost(1, 8, 2.0)
    assert memory.cost(1, 8) == pytest.approx(2.0)


def test_steps_are_compared_at_one_place_of_the_call():
    memory = WindowMemory()
    for step in range(101):
        place = step / 100
        memory.note_cost(4, 8, 2.0 * math.exp(0.5 * place), place)
        if step < 3:
            memory.note_cost(4, 16, 3.0 * math.exp(0.5 * place), place)
    for place in (0.0, 0.5, 1.0):
        at = memory.costs_at(4, (8, 16), place)
        assert at[16] / at[8] == pytest.approx(1.5, rel=0.06)
        # Steps of 16, all at the beginning, grow as most steps do.
        assert at[8] == pytest.approx(2.0 * math.exp(0.5 * place), rel=0.05)


def test_a_step_that_grows_faster_is_told_apart():
    memory = WindowMemory()
    for step in range(400):
        place = step % 200 / 200
        memory.note_cost(4, 1, 1.0 + place, place)
        memory.note_cost(4, 8, 2.0, place)
    first, last = (memory.costs_at(4, (1, 8), place) for place in (0.0, 1.0))
    assert last[1] / first[1] == pytest.approx(2.0, rel=0.1)
    assert last[8] / first[8] == pytest.approx(1.0, rel=0.1)


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


@pytest.mark.parametrize(("num_waiting", "units"), [(0, 3.0), (1, 5.0)])
def test_half_of_what_counts_is_the_slowest_row_unless_others_wait(num_waiting, units):
    memory = WindowMemory()
    schedule = WindowSchedule(64, endless, lambda: 2, memory, lambda: num_waiting)
    schedule.observe(record(1, num_rows=2))
    for _ in range(40):
        step = record(schedule.plan().width, num_rows=2)
        schedule.observe(dataclasses.replace(step, num_emitted=(1, 9)))
    width = max(memory.trials, key=lambda width: memory.trials[width])
    assert memory.units[width] / memory.trials[width] == pytest.approx(units)


def test_the_window_ends_with_the_rows():
    left = [100]
    schedule = WindowSchedule(64, lambda: left[0], one)
    rng = random.Random(0)
    for _ in range(20):
        schedule.observe(record(schedule.plan().width, 1 + 0.01 * rng.random(), units=4))
    for remaining, most in [(5, 8), (3, 4), (1, 2), (0, 1)]:
        left[0] = remaining
        assert schedule.plan().width <= most


@pytest.mark.parametrize("width", [0, 129])
def test_widths_out_of_range_are_refused(width):
    with pytest.raises(ValueError, match=f"between 1 and 128, got {width}"):
        WindowSchedule(width, endless, one)
