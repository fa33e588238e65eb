"""What steps cost, told apart from what the moment adds."""

import math
import random

import numpy as np
import pytest

from mmspec.cost_belief import CostBelief
from mmspec.tree import BUCKETS


def line(num_rows, width):
    """Seconds of a step of a model that is neither memory-bound nor compute-bound."""
    return 0.004 + 0.0001 * num_rows * width


def ratio(belief, num_rows, width, other):
    """Cost of one width over that of another."""
    costs, _ = belief.of(num_rows)
    return math.exp(costs[BUCKETS.index(width)] - costs[BUCKETS.index(other)])


def doubt(belief, num_rows, width, other):
    """Standard deviation of the logarithm of this ratio."""
    _, covariance = belief.of(num_rows)
    one, two = BUCKETS.index(width), BUCKETS.index(other)
    return math.sqrt(covariance[one, one] + covariance[two, two] - 2 * covariance[one, two])


def believe(steps):
    belief = CostBelief()
    for num_rows, width, seconds in steps:
        belief.note(num_rows, width, seconds)
    return belief


def test_widths_are_compared_wherever_in_a_call_they_were_measured():
    belief = CostBelief()
    for _ in range(4):
        belief.begin_call()
        for step in range(40):
            # Narrow steps first, and the last ones take 1.8 times as long: medians say 2.1.
            width = 8 if step < 20 else 16
            belief.note(8, width, line(8, width) * (1 + 0.02 * step))
    true = line(8, 16) / line(8, 8)
    assert true == pytest.approx(1.6, rel=0.02)
    assert ratio(belief, 8, 16, 8) == pytest.approx(true, rel=0.1)


def test_a_disturbance_is_not_put_down_to_the_width_that_ran():
    belief = believe((1, width, line(1, width)) for width in [8] * 10 + [16] * 10)
    before = ratio(belief, 1, 16, 8)
    for _ in range(40):
        belief.note(1, 16, 1.7 * line(1, 16))
    assert ratio(belief, 1, 16, 8) == pytest.approx(before, rel=0.05)


def test_many_steps_at_once_say_as_much_as_one_after_another():
    one = believe([(1, width, line(1, width)) for width in [4] * 8 + [32] * 8 + [4] * 8])
    many = CostBelief()
    for width in (4, 32, 4):
        many.note(1, width, line(1, width), 8)
    true = line(1, 32) / line(1, 4)
    assert ratio(one, 1, 32, 4) == pytest.approx(true, rel=0.05)
    assert ratio(many, 1, 32, 4) == pytest.approx(true, rel=0.05)


@pytest.mark.parametrize("num_rows", [1, 8])
def test_other_widths_and_rows_are_guessed_and_doubted_by_their_distance(num_rows):
    belief = believe((num_rows, w, line(num_rows, w)) for _ in range(5) for w in (1, 8, 16))
    for width in (2, 4, 32):
        true = line(num_rows, width) / line(num_rows, 8)
        assert ratio(belief, num_rows, width, 8) == pytest.approx(true, rel=0.25)
    doubts = [doubt(belief, num_rows, width, 16) for width in (16, 32, 64, 128)]
    assert doubts == sorted(doubts)
    assert doubt(belief, num_rows, 16, 8) < 0.5 * doubt(CostBelief(), num_rows, 16, 8)
    assert doubt(belief, 2 * num_rows, 16, 8) < 0.8 * doubt(CostBelief(), 2 * num_rows, 16, 8)


@pytest.mark.parametrize(
    "seconds",
    [lambda n: 1.0 + 0.0003 * n, lambda n: 0.01 * n, lambda n: 5.0 + 0.1 * n],
    ids=["memory", "compute", "both"],
)
def test_any_machine_is_learnt_in_a_few_steps(seconds):
    belief = believe((4, width, seconds(4 * width)) for _ in range(4) for width in (8, 1, 32))
    for width in (1, 32):
        true = seconds(4 * width) / seconds(4 * 8)
        assert ratio(belief, 4, width, 8) == pytest.approx(true, rel=0.15)


def test_a_compilation_is_no_measure():
    belief = believe((1, width, line(1, width)) for width in [8] * 4 + [1] * 4)
    before = belief.of(1)[0].copy()
    belief.note(1, 16, 30.0)
    assert belief.of(1)[0] == pytest.approx(before)


def test_what_came_from_compilations_is_forgotten():
    belief, seen = CostBelief(), set()
    rng = random.Random(0)
    for _ in range(60):
        width = rng.choice([1, 8, 16])
        compilation = 0.0 if width in seen else rng.uniform(10, 60)
        belief.note(1, width, line(1, width) + compilation)
        seen.add(width)
    for width in (1, 16):
        assert ratio(belief, 1, width, 8) == pytest.approx(line(1, width) / line(1, 8), rel=0.1)


def test_a_new_call_doubts_a_little_more():
    belief = believe((1, width, line(1, width)) for width in [8] * 9 + [16] * 9)
    before = doubt(belief, 1, 16, 8)
    belief.begin_call()
    assert before < doubt(belief, 1, 16, 8) < before + 0.05


def test_doubts_stay_real_after_many_steps():
    belief, rng = CostBelief(), random.Random(1)
    for step in range(5000):
        if step % 50 == 0:
            belief.begin_call()
        num_rows, width = rng.choice([1, 3, 8, 500]), rng.choice(BUCKETS)
        belief.note(num_rows, width, line(num_rows, width) * math.exp(rng.gauss(0, 0.3)))
    for num_rows in (1, 8, 500):
        _, covariance = belief.of(num_rows)
        assert np.linalg.eigvalsh(covariance).min() > -1e-9
        assert np.isfinite(belief.of(num_rows)[0]).all()
